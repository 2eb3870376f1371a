"""Packing: validation rows by the reference rule, training rows that lose and delay nothing."""

from itertools import takewhile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import prepare
from prepare import cut_long, document_spans, fill_row, pack_rows

BOS = 65535

lengths_and_shapes = given(
    lengths=st.lists(st.integers(1, 40), max_size=80),  # so short that many are equal
    row_tokens=st.integers(3, 24),
    buffer_size=st.integers(1, 9),
)


def slow_rows(lengths: list[int], row_tokens: int, buffer_size: int = 1000) -> list:
    """FACTS.md's rule word for word: rows of (document, tokens), the whole buffer looked through.

    "Put in the longest that still fits; when none fits, cut the shortest to fill the row exactly.
    Ties: the one that arrived first."
    """
    arriving, buffer, rows = list(enumerate(lengths)), [], []
    while True:
        row, room = [], row_tokens
        while room > 0:
            while arriving and len(buffer) < buffer_size:
                buffer.append(arriving.pop(0))
            if not buffer:
                return rows
            fitting = [document for document in buffer if document[1] <= room]
            length = max(n for _, n in fitting) if fitting else min(n for _, n in buffer)
            chosen = next(document for document in buffer if document[1] == length)
            buffer.remove(chosen)
            row.append((chosen[0], min(length, room)))
            room -= min(length, room)
        rows.append(row)


def fast_rows(lengths: list[int], *shape) -> list:
    return [list(row) for row in pack_rows(enumerate(lengths), *shape)]


@lengths_and_shapes
def test_validation_rows_equal_the_slow_rule(lengths, row_tokens, buffer_size):
    shape = row_tokens, buffer_size
    assert fast_rows(lengths, *shape) == slow_rows(lengths, *shape)


def test_validation_rows_equal_the_slow_rule_at_full_size():
    lengths = web_like(1500)
    assert fast_rows(lengths, 513) == slow_rows(lengths, 513)


def flat_file(lengths: list[int]) -> np.ndarray:
    """Documents whose tokens all differ: consecutive inside one, with a gap between two."""
    starts = np.cumsum([0, *lengths])
    numbers = np.arange(starts[-1]) + np.repeat(np.arange(len(lengths)), lengths)
    numbers[starts[:-1]] = BOS
    return numbers.astype(np.uint16)


@lengths_and_shapes
def test_training_rows_are_full_and_serve_every_token_at_most_once(
    lengths, row_tokens, buffer_size
):
    tokens = flat_file(lengths)
    starts, lengths = cut_long(*document_spans(tokens, BOS), row_tokens)
    pieces, served = zip(starts.tolist(), lengths.tolist(), strict=True), []
    for packed in pack_rows(pieces, row_tokens, buffer_size, keep=True):
        row = fill_row(packed, tokens, BOS)
        assert row[0] == BOS and len(row) == row_tokens
        for part in np.split(row, np.flatnonzero(row == BOS)[1:]):
            assert (np.diff(part[1:].astype(int)) == 1).all()  # of one document, as it stood there
            served += part[1:].tolist()
    text = tokens[tokens != BOS].tolist()
    assert len(set(served)) == len(served) and set(served) <= set(text)
    assert len(text) - len(served) < row_tokens  # only the last row, which is not full, is lost


@lengths_and_shapes
def test_no_piece_waits_longer_than_buffer_size_rows(lengths, row_tokens, buffer_size):
    pieces = [2 + length % (row_tokens - 1) for length in lengths]
    arrived, waits, rows = [], [0], 0

    def arriving():
        for length in pieces:
            arrived.append(rows)
            yield 1000 * (len(arrived) - 1), length  # as if a piece stood every 1000 tokens

    for row in pack_rows(arriving(), row_tokens, buffer_size, keep=True):
        waits += [rows - arrived[start // 1000] for start, _ in row]
        rows += 1
    assert max(waits) <= buffer_size


def test_the_first_epoch_serves_all_beginnings_and_then_everything(tmp_path):
    rng, row_tokens = np.random.default_rng(0), 9
    lengths = [1, *rng.integers(2, 40, 200).tolist()]  # the first has no text
    tokens = flat_file(lengths)
    tokens.tofile(tmp_path / "train.bin")
    starts = np.cumsum([0, *lengths[:-1]])
    beginnings = {
        token
        for start, length in zip(starts, lengths, strict=True)
        for token in tokens[start + 1 : start + min(length, row_tokens)].tolist()
    }
    rows = prepare.training_rows([tmp_path / "train.bin"], row_tokens, BOS)
    of_epoch_1 = [row[row != BOS].tolist() for row, _ in takewhile(lambda row: row[1] == 1, rows)]
    served: set = set()
    number = 0
    while not served & set(of_epoch_1[number]) and set(of_epoch_1[number]) <= beginnings:
        served |= set(of_epoch_1[number])
        number += 1
    assert len(beginnings) - len(served) < row_tokens
    everything = [token for row in of_epoch_1[number:] for token in row]
    assert len(set(everything)) == len(everything) > sum(lengths) - len(lengths) - 2 * row_tokens


def pysource_like(number: int) -> list[int]:
    """Measured: median 208 tokens, mean 561, 99th percentile 5,800, the longest 315,000."""
    rng = np.random.default_rng(1)
    lengths = rng.lognormal(5.4, 0.95, number) + 60 * rng.pareto(0.9, number)
    return (2 + lengths).clip(max=315_000).astype(int).tolist()


def web_like(number: int) -> list[int]:
    """Log-normal with a long tail."""
    rng = np.random.default_rng(3)
    lengths = rng.lognormal(6.0, 1.2, number) + rng.pareto(1.1, number) * 100
    return (2 + lengths).clip(max=200_000).astype(int).tolist()


@pytest.mark.parametrize("T", [256, 2048])
@pytest.mark.parametrize("like", [pysource_like, web_like])
def test_at_least_95_percent_of_an_epoch_is_served(like, T):
    lengths = like(4000)
    text = sum(lengths) - len(lengths)

    def share_served(rows) -> float:
        return sum(taken - 1 for row in rows for _, taken in row) / text

    starts = np.cumsum([0, *lengths[:-1]])
    pieces = cut_long(starts, np.array(lengths), T + 1)[1].tolist()
    assert sum(piece - 1 for piece in pieces) == text
    assert share_served(pack_rows(enumerate(pieces), T + 1, keep=True)) >= 0.95
    if T == 256:
        assert share_served(pack_rows(enumerate(lengths), T + 1)) < 0.95, (
            "what the reference rule serves"
        )


def test_a_document_is_cut_into_pieces_that_fill_a_row():
    # Rows of 5 tokens hold BOS and 4 of text: 1 + 10 tokens are cut into 4 + 4 + 2; of the document
    # of 1 + 4 one piece is made; nothing of the one that is BOS alone.
    starts, lengths = cut_long(np.array([0, 11, 12]), np.array([11, 1, 5]), 5)
    assert lengths.tolist() == [5, 5, 3, 5]
    assert starts.tolist() == [0, 4, 8, 12]  # the second piece's text is at 5 … 8
