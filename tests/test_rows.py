"""Packing: one rule, the reference's; training rows that lose nothing, and beginnings first."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prepare import Piece, pack_rows, training_rows

BOS = 65535

lengths_and_shapes = given(
    lengths=st.lists(st.integers(1, 40), max_size=80),  # so short that many are equal
    row_tokens=st.integers(3, 24),
    buffer_size=st.integers(1, 9),
    keep_rest=st.booleans(),
)


def slow_rows(pieces: list, row_tokens: int, buffer_size: int, keep_rest: bool) -> list:
    """FACTS.md's rule word for word, the whole buffer looked through for each choice.

    "Put in the longest that still fits; when none fits, cut the shortest to fill the row exactly.
    Ties: the one that arrived first." With `keep_rest` what is cut off, behind a BOS in place of
    the last token served, keeps its document's place in the buffer.
    """
    arriving, buffer, rows = [[n, *piece] for n, piece in enumerate(pieces)], [], []
    while True:
        row, room = [], row_tokens
        while room > 0:
            while arriving and len(buffer) < buffer_size:
                buffer.append(arriving.pop(0))
            if not buffer:
                return rows
            buffer.sort()  # by arrival
            fitting = [piece for piece in buffer if piece[2] <= room]
            length = max(n for _, _, n in fitting) if fitting else min(n for _, _, n in buffer)
            number, start, _ = chosen = next(piece for piece in buffer if piece[2] == length)
            buffer.remove(chosen)
            served = min(length, room)
            row.append((start, served))
            room -= served
            if served < length and keep_rest:
                buffer.append([number, start + served - 1, length - served + 1])
        rows.append(row)


def code_like(number: int) -> list[int]:
    """Lengths as in pysource: median 208, mean 561, 99th percentile 5,800, the longest 315,000."""
    rng = np.random.default_rng(1)
    lengths = rng.lognormal(5.4, 0.95, number) + 60 * rng.pareto(0.9, number)
    return (2 + lengths).clip(max=315_000).astype(int).tolist()


def log_normal(number: int) -> list[int]:
    """Lengths as of pages of the web: mean 700, median 425."""
    lengths = np.random.default_rng(2).lognormal(np.log(700) - 0.5, 1, number)
    return lengths.clip(min=2).astype(int).tolist()


@lengths_and_shapes
@example(lengths=code_like(1500), row_tokens=513, buffer_size=1000, keep_rest=False)
@example(lengths=log_normal(700), row_tokens=257, buffer_size=100, keep_rest=True)
def test_rows_equal_the_slow_rule(lengths, row_tokens, buffer_size, keep_rest):
    ends = np.cumsum(lengths, dtype=int).tolist()
    pieces = [Piece(end - length, length) for end, length in zip(ends, lengths, strict=True)]
    if keep_rest:  # in training no piece is longer than a row
        pieces = [Piece(start, min(length, row_tokens)) for start, length in pieces]
    rows = list(pack_rows(iter(pieces), row_tokens, buffer_size, keep_rest=keep_rest))
    assert rows == slow_rows(pieces, row_tokens, buffer_size, keep_rest)


def files_of(files: list[list[int]]) -> list[np.ndarray]:
    """Documents of these lengths, whose tokens, but BOS, all differ (as far as numbers go)."""
    tokens = (np.arange(sum(map(sum, files))) % BOS).astype(np.uint16)
    tokens[np.cumsum([0, *(length for lengths in files for length in lengths)])[:-1]] = BOS
    return np.split(tokens, np.cumsum([sum(lengths) for lengths in files])[:-1])


def rows_of(files: list[np.ndarray], row_tokens: int, folder, epoch: int) -> list[np.ndarray]:
    paths = [folder / f"{n}.bin" for n in range(len(files))]
    for path, tokens in zip(paths, files, strict=True):
        tokens.tofile(path)
    return list(training_rows(paths, row_tokens, 100, epoch))


@given(
    files=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=40), min_size=1, max_size=3),
    row_tokens=st.integers(3, 24),
    epoch=st.integers(1, 2),
)
def test_training_rows_are_full_and_serve_all_once(files, row_tokens, epoch, tmp_path_factory):
    files[0].append(row_tokens)  # at least one row
    files = files_of(files)
    served = []
    for row in rows_of(files, row_tokens, tmp_path_factory.getbasetemp(), epoch):
        assert row[0] == BOS and len(row) == row_tokens
        for part in np.split(row, np.flatnonzero(row == BOS)[1:]):
            assert (np.diff(part[1:].astype(int)) == 1).all()  # of a document, as it stands
            served += part[1:].tolist()
    assert len(set(served)) == len(served)
    for tokens in files:  # lost: the last row, which is not full, of either pass
        assert len({*tokens.tolist()} - {BOS, *served}) < 2 * row_tokens


def test_an_epoch_serves_all_beginnings_before_any_rest_file_by_file(tmp_path):
    rng = np.random.default_rng(0)
    files = files_of([[1, *rng.integers(2, 40, 200)] for _ in range(3)])  # the first has no text
    documents = [
        part for tokens in files for part in np.split(tokens, np.flatnonzero(tokens == BOS))
    ]
    beginnings = {token for document in documents for token in document[1:9].tolist()}
    rows = rows_of(files, 9, tmp_path, 1)
    kinds = []  # of every row: its pass and file
    for row in rows:
        text = set(row[row != BOS].tolist())
        (file,) = (n for n, tokens in enumerate(files) if not text.isdisjoint(tokens.tolist()))
        assert text <= beginnings or text.isdisjoint(beginnings)
        kinds.append((not text <= beginnings, file))
    assert kinds == sorted(kinds) and len(set(kinds)) == 6
    # The order is not that of the file, the same in every run, and another one in every epoch.
    firsts = [int(row[1]) for row in rows]
    assert firsts != sorted(firsts)
    assert np.array_equal(rows, rows_of(files, 9, tmp_path, 1))
    assert not np.array_equal(rows[:20], rows_of(files, 9, tmp_path, 2)[:20])


@pytest.mark.parametrize("T", [256, 512, 2048])
@pytest.mark.parametrize("lengths", [code_like(3000), log_normal(3000)], ids=["code", "log-normal"])
def test_at_least_95_percent_of_an_epoch_is_served(lengths, T, tmp_path):
    (tokens,) = files_of([lengths])
    rows = rows_of([tokens], T + 1, tmp_path, 1)
    served = sum(np.count_nonzero(row != BOS) for row in rows)
    # All but the last row, which is not full, of both passes.
    assert np.count_nonzero(tokens != BOS) - 2 * (T + 1) < served
    assert 0.95 * np.count_nonzero(tokens != BOS) <= served <= np.count_nonzero(tokens != BOS)
