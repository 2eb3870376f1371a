"""Packing: validation rows by the reference rule, training rows that lose and delay nothing."""

from itertools import groupby, takewhile

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import prepare
from prepare import pack_rows

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


def code_like(number: int) -> list[int]:
    """Lengths as in pysource: median 208, mean 561, 99th percentile 5,800, the longest 315,000."""
    rng = np.random.default_rng(1)
    lengths = rng.lognormal(5.4, 0.95, number) + 60 * rng.pareto(0.9, number)
    return (2 + lengths).clip(max=315_000).astype(int).tolist()


@lengths_and_shapes
@example(lengths=code_like(1500), row_tokens=513, buffer_size=1000)
def test_validation_rows_equal_the_slow_rule(lengths, row_tokens, buffer_size):
    rows = pack_rows(enumerate(lengths), row_tokens, buffer_size)
    assert [list(row) for row in rows] == slow_rows(lengths, row_tokens, buffer_size)


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


def epochs(lengths: list[int], row_tokens: int, path) -> tuple[list[int], list[list[np.ndarray]]]:
    """Text of documents whose tokens, but BOS, all differ, and the rows of epochs 1 and 2."""
    starts = np.cumsum([0, *lengths])
    tokens = (np.arange(starts[-1]) % BOS).astype(np.uint16)
    tokens[starts[:-1]] = BOS
    tokens.tofile(path)
    rows = prepare.training_rows([path], row_tokens, BOS)
    rows = takewhile(lambda row: row[1] <= 2, rows)
    served = [[row for row, _ in rows] for _, rows in groupby(rows, lambda row: row[1])]
    return tokens[tokens != BOS].tolist(), served


@given(lengths=st.lists(st.integers(1, 40), max_size=80), row_tokens=st.integers(3, 24))
def test_training_rows_are_full_and_serve_all_once(lengths, row_tokens, tmp_path_factory):
    lengths = [row_tokens, *lengths]  # at least one row
    text, (_, rows) = epochs(lengths, row_tokens, tmp_path_factory.getbasetemp() / "train.bin")
    served = []
    for row in rows:
        assert row[0] == BOS and len(row) == row_tokens
        for part in np.split(row, np.flatnonzero(row == BOS)[1:]):
            assert (np.diff(part[1:].astype(int)) == 1).all()  # of one document, as it stood there
            served += part[1:].tolist()
    assert len(set(served)) == len(served) and set(served) <= set(text)
    assert len(text) - len(served) < row_tokens  # only the last row, which is not full, is lost


def test_the_first_epoch_serves_all_beginnings_and_then_everything(tmp_path):
    lengths = [1, *np.random.default_rng(0).integers(2, 40, 200).tolist()]  # the first has no text
    text, (first, _) = epochs(lengths, 9, tmp_path / "train.bin")
    beginnings: set[int] = set()
    for start, length in zip(np.cumsum([0, *lengths]).tolist(), lengths, strict=False):
        beginnings |= set(range(start + 1, start + min(length, 9)))
    rows, left, n = [row[row != BOS].tolist() for row in first], set(beginnings), 0
    while left.issuperset(rows[n]):
        left -= set(rows[n])
        n += 1
    assert len(left) < 9
    everything = [token for row in rows[n:] for token in row]
    assert len(set(everything)) == len(everything) > len(text) - 9


@pytest.mark.parametrize("T", [256, 2048])
def test_at_least_95_percent_of_an_epoch_is_served(T, tmp_path):
    lengths = code_like(3000)
    text, (_, rows) = epochs(lengths, T + 1, tmp_path / "train.bin")
    assert sum(np.count_nonzero(row != BOS) for row in rows) >= 0.95 * len(text)
