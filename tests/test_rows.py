"""Packing: validation rows by the reference rule, training rows that lose and delay nothing."""

from itertools import takewhile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare
from prepare import cut_long, document_spans, pack_rows, write_row

BOS = 65535

lengths_and_shapes = given(
    lengths=st.lists(st.integers(1, 40), max_size=80),  # so short that many are equal
    row_tokens=st.integers(3, 24),
    buffer_size=st.integers(1, 9),
)


# --- Validation rows: the reference rule -----------------------------------------


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
            best = shortest = None
            for document in buffer:
                if document[1] <= room and (best is None or document[1] > best[1]):
                    best = document
                if shortest is None or document[1] < shortest[1]:
                    shortest = document
            chosen = best or shortest
            buffer.remove(chosen)
            row.append((chosen[0], min(chosen[1], room)))
            room -= min(chosen[1], room)
        rows.append(row)


@settings(max_examples=300)
@lengths_and_shapes
def test_validation_rows_equal_the_slow_rule(lengths, row_tokens, buffer_size):
    packed = pack_rows(lengths, row_tokens, buffer_size)
    expected = slow_rows(lengths, row_tokens, buffer_size)
    assert [[(document, taken) for document, _, taken in row] for row in packed] == expected


def test_validation_rows_equal_the_slow_rule_at_full_size():
    lengths = web_like(2500)
    packed = list(pack_rows(lengths, 513))
    assert [[(part[0], part[2]) for part in row] for row in packed] == slow_rows(lengths, 513)


def test_stored_rows_are_those_that_the_slow_rule_gives(small):
    tokens = np.fromfile(small.tokens / "val.bin", np.uint16)
    bos = prepare.Tokenizer.load(small.tokens).bos
    documents = np.split(tokens, np.flatnonzero(tokens == bos)[1:])
    rows = slow_rows([len(document) for document in documents], 33)
    expected = [np.concatenate([documents[n][:taken] for n, taken in row]) for row in rows[:64]]
    assert small.rows().tolist() == np.stack(expected).tolist()
    assert (small.rows()[:, 0] == bos).all()


# --- Training rows ---------------------------------------------------------------


def flat_file(lengths: list[int]) -> np.ndarray:
    """Documents whose tokens all differ: consecutive inside one, with a gap between two."""
    starts = np.cumsum([0, *lengths])
    numbers = np.arange(starts[-1]) + np.repeat(np.arange(len(lengths)), lengths)
    numbers[starts[:-1]] = BOS
    return numbers.astype(np.uint16)


@settings(max_examples=300)
@lengths_and_shapes
def test_training_rows_are_full_and_serve_every_token_at_most_once(
    lengths, row_tokens, buffer_size
):
    tokens = flat_file(lengths)
    starts, pieces = cut_long(*document_spans(tokens, BOS), row_tokens)
    packed = pack_rows(pieces.tolist(), row_tokens, buffer_size, keep=True)
    rows = [write_row(parts, tokens, starts.tolist(), row_tokens, BOS) for parts in packed]
    served = []
    for row in rows:
        assert row[0] == BOS and len(row) == row_tokens
        for part in np.split(row, np.flatnonzero(row == BOS)[1:]):
            assert (np.diff(part[1:].astype(int)) == 1).all()  # of one document, as it stood there
            served += part[1:].tolist()
    text = tokens[tokens != BOS].tolist()
    assert len(set(served)) == len(served)
    assert set(served) <= set(text)
    assert len(text) - len(served) < row_tokens  # only the last row, which is not full, is lost


@settings(max_examples=300)
@lengths_and_shapes
def test_no_piece_waits_longer_than_buffer_size_rows(lengths, row_tokens, buffer_size):
    pieces = [2 + length % (row_tokens - 1) for length in lengths]
    assert longest_wait(pieces, row_tokens, buffer_size) <= buffer_size


def longest_wait(pieces: list[int], row_tokens: int, buffer_size: int) -> int:
    """Rows between a piece's arrival in the buffer and the row that serves its last token."""
    arrived, waits, rows = [], [0], 0

    def arriving():
        for length in pieces:
            arrived.append(rows)
            yield length

    for row in pack_rows(arriving(), row_tokens, buffer_size, keep=True):
        waits += [rows - arrived[piece] for piece, _, _ in row]
        rows += 1
    return max(waits)


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


def stories_like(number: int) -> list[int]:
    """One to two hundred words each, none of them long."""
    return np.random.default_rng(2).normal(210, 70, number).clip(30, 900).astype(int).tolist()


def web_like(number: int) -> list[int]:
    """Log-normal with a long tail."""
    rng = np.random.default_rng(3)
    lengths = rng.lognormal(6.0, 1.2, number) + rng.pareto(1.1, number) * 100
    return (2 + lengths).clip(max=200_000).astype(int).tolist()


def share_served(rows, lengths: list[int]) -> float:
    return sum(taken - 1 for row in rows for _, _, taken in row) / (sum(lengths) - len(lengths))


@pytest.mark.parametrize("T", [256, 512, 2048])
@pytest.mark.parametrize("like", [pysource_like, stories_like, web_like])
def test_at_least_95_percent_of_an_epoch_is_served(like, T):
    lengths = like(8000)
    starts = np.cumsum([0, *lengths[:-1]])
    pieces = cut_long(starts, np.array(lengths), T + 1)[1].tolist()
    assert sum(piece - 1 for piece in pieces) == sum(lengths) - len(lengths)
    assert share_served(pack_rows(pieces, T + 1, keep=True), lengths) >= 0.95
    assert longest_wait(pieces, T + 1, prepare.BUFFER_DOCUMENTS) <= prepare.BUFFER_DOCUMENTS


@pytest.mark.parametrize("T", [256, 512])
def test_the_reference_rule_would_not_serve_95_percent(T):
    lengths = web_like(8000)
    assert share_served(pack_rows(lengths, T + 1), lengths) < 0.95


def test_a_document_is_cut_into_pieces_that_fill_a_row():
    # Rows of 5 tokens hold BOS and 4 of text: 1 + 10 tokens are cut into 4 + 4 + 2; of the document
    # of 1 + 4 one piece is made; nothing of the one that is BOS alone.
    starts, lengths = cut_long(np.array([0, 11, 12]), np.array([11, 1, 5]), 5)
    assert lengths.tolist() == [5, 5, 3, 5]
    assert starts.tolist() == [0, 4, 8, 12]  # the second piece's text is at 5 … 8


def test_a_row_that_cannot_be_filled_is_not_served():
    assert list(pack_rows([3, 1], 5)) == []
    assert list(pack_rows([3, 1], 5, keep=True)) == []
    assert [len(row) for row in pack_rows([3, 2], 5, keep=True)] == [2]
