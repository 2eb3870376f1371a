"""The loader: what a batch is, where it comes from, and that nothing writes over it."""

import threading
from collections import Counter
from itertools import islice, takewhile

import numpy as np
import pytest
import torch

import prepare
from prepare import Tokenizer, make_dataloader

CPU = torch.device("cpu")


def loader(B=4, T=32, split="train"):
    return make_dataloader(Tokenizer.from_directory(), B, T, split, device="cpu")


def rows_of_epochs(*epochs: int, T=32) -> np.ndarray:
    """The rows of these epochs put together again: (rows, T + 1)."""
    batches = takewhile(lambda batch: batch[2] <= max(epochs), loader(1, T))
    rows = [[*x[0].tolist(), y[0, -1].item()] for x, y, epoch in batches if epoch in epochs]
    return np.stack(rows)


def documents_in(tokens: np.ndarray, bos: int) -> list[np.ndarray]:
    return [part[1:] for part in np.split(tokens, np.flatnonzero(tokens == bos)) if len(part)]


# --- What a batch is -------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("B", [1, 4])
def test_targets_are_the_inputs_shifted_by_one(small, split, B):
    bos = Tokenizer.from_directory().get_bos_token_id()
    for inputs, targets, epoch in islice(loader(B, split=split), 5):
        assert inputs.shape == targets.shape == (B, 32)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.device == targets.device == CPU and epoch == 1
        assert inputs[:, 1:].equal(targets[:, :-1])
        assert (inputs[:, 0] == bos).all()


@pytest.mark.parametrize("B", [1, 4])
def test_inputs_and_targets_share_no_memory(small, B):
    (inputs, targets, _) = next(loader(B))
    before = targets.clone()
    inputs.zero_()
    assert targets.equal(before)
    assert inputs.untyped_storage().size() == targets.untyped_storage().size() == 8 * B * 32


def test_two_loaders_give_the_same_batches(small):
    for one, other in zip(islice(loader(), 200), loader(), strict=False):
        assert one[0].equal(other[0]) and one[1].equal(other[1]) and one[2] == other[2]


def test_batch_size_does_not_change_the_order_of_rows(small):
    by_one = torch.cat([x for x, _, _ in islice(loader(1), 24)])
    by_eight = torch.cat([x for x, _, _ in islice(loader(8), 3)])
    assert by_one.equal(by_eight)


@pytest.mark.parametrize("T", [32, 100])
def test_rows_are_the_text_of_training_documents(small, T):
    tokenizer = Tokenizer.from_directory()
    pieces = {rank: token for token, rank in tokenizer.ranks.items()}

    def text_of(tokens: np.ndarray) -> bytes:
        return b"".join(pieces[token] for token in tokens.tolist())

    rows = rows_of_epochs(1, 2, T=T)
    (train,) = (np.fromfile(small.tokens / name, np.uint16) for name in small.manifest["train"])
    validation = np.fromfile(small.tokens / "val.bin", np.uint16)
    held_out = {text_of(document) for document in documents_in(validation, tokenizer.bos)}
    files = [path.read_bytes() for path in prepare.own_path().iterdir()]
    trained_on = b"\0".join(text for text in files if text not in held_out)
    assert 0 < len(held_out) < len(files) / 4
    for row in rows:
        for part in documents_in(row, tokenizer.bos):
            assert text_of(part) in trained_on


def test_shares_divide_the_documents(small):
    """A loader serves the documents of its share, and `training_text` gives the same ones."""
    tokenizer = Tokenizer.from_directory()

    def found(share) -> Counter:
        (text,) = prepare.training_text(tokenizer, share)
        return Counter(part.tobytes() for part in documents_in(text, tokenizer.bos))

    parts = [found((0, 0.3)), found((0.3, 1))]
    assert parts[0] + parts[1] == found((0, 1)) and not parts[0] & parts[1]
    assert 0.2 < parts[0].total() / found((0, 1)).total() < 0.4
    batches = make_dataloader(tokenizer, 1, 32, "train", device="cpu", share=(0, 0.3))
    served = b"".join(parts[0])
    for inputs, _, epoch in batches:
        if epoch == 3:
            break
        for part in documents_in(inputs[0].numpy().astype(np.uint16), tokenizer.bos):
            assert part.tobytes() in served


# --- Epochs ----------------------------------------------------------------------


@pytest.mark.parametrize("T", [32, 100])
def test_epoch_rises_when_the_training_text_was_served_once(small, T):
    (train,) = (np.fromfile(small.tokens / name, np.uint16) for name in small.manifest["train"])
    bos = Tokenizer.from_directory().bos
    whole, served = Counter(train.tolist()), Counter(rows_of_epochs(2, T=T).flatten().tolist())
    whole[bos] = served[bos] = 0  # a row may need more of these, or fewer
    assert served <= whole
    # What does not fill the last row is lost.
    assert whole.total() - served.total() < T + 1


def test_epochs_count_from_1_and_each_has_an_order_of_its_own(small):
    rows: dict[int, list] = {}
    for inputs, _, epoch in takewhile(lambda batch: batch[2] < 4, loader(1)):
        rows.setdefault(epoch, []).append(inputs.flatten().tolist())
    assert list(rows) == [1, 2, 3]
    assert len(rows[1]) > len(rows[2]) and abs(len(rows[2]) - len(rows[3])) <= 1
    assert rows[1][:20] != rows[2][:20] != rows[3][:20]


def test_several_shards_are_served_one_after_the_other(own_text, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_BYTES", 20_000)
    prepared = prepare.prepare()
    names = prepared.manifest["train"]
    assert len(names) > 2
    bos = Tokenizer.from_directory().bos
    tokens = [np.fromfile(prepared.tokens / name, np.uint16) for name in names]
    text = sum(int((shard != bos).sum()) for shard in tokens)
    assert text - len(names) * 33 < (rows_of_epochs(2) != bos).sum() <= text


# --- Memory ----------------------------------------------------------------------


def batches_in_one_buffer(rows, B, device):
    """The reference's flaw: the buffer is filled again while a copy from it may still run."""
    buffer = None
    while taken := list(islice(rows, B)):
        if buffer is None:
            buffer = torch.empty((B, len(taken[0][0])), dtype=torch.int64)
        for place, (row, _) in enumerate(taken):
            buffer[place] = torch.from_numpy(row.astype(np.int64))
        yield buffer, taken[-1][1]


def read_late(monkeypatch, how_late: int) -> list[torch.Tensor]:
    """Batches as a device sees them that copies each one only `how_late` batches later."""
    queued, seen = [], []

    def copy_later(batch: torch.Tensor, device: torch.device) -> tuple:
        queued.append(batch)
        if len(queued) > how_late:
            seen.append(queued.pop(0).clone())
        return batch, batch

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "inputs_and_targets", copy_later)
        for _ in islice(loader(), 40):
            pass
    return seen


def test_a_slow_device_still_reads_what_was_packed(small, monkeypatch):
    expected = [torch.cat([x, y[:, -1:]], dim=1) for x, y, _ in islice(loader(), 30)]
    late = read_late(monkeypatch, how_late=10)
    assert len(late) == 30 and all(map(torch.equal, late, expected))
    # The same check notices a loader that has one buffer.
    monkeypatch.setattr(prepare, "batches", batches_in_one_buffer)
    late = read_late(monkeypatch, how_late=10)
    assert len(late) == 30 and not any(map(torch.equal, late, expected))


@pytest.mark.gpu
def test_a_busy_gpu_still_reads_what_was_packed(small):
    expected = list(islice(loader(), 50))
    torch.cuda._sleep(1_000_000_000)  # cycles: half a second, in which the copies only queue
    seen = list(islice(make_dataloader(Tokenizer.from_directory(), 4, 32, "train", "cuda"), 50))
    for (x, y, _), (inputs, targets, _) in zip(seen, expected, strict=True):
        assert x.cpu().equal(inputs) and y.cpu().equal(targets)


# --- Validation, arguments, ends -------------------------------------------------


def test_validation_batches_are_the_stored_rows_again_and_again(small):
    rows = torch.from_numpy(small.rows().astype(np.int64))
    again = rows.repeat(3, 1)  # a batch may hold the end of one turn and the start of the next
    for n, (inputs, targets, epoch) in enumerate(islice(loader(7, split="val"), len(again) // 7)):
        assert inputs.equal(again[7 * n : 7 * n + 7, :-1])
        assert targets.equal(again[7 * n : 7 * n + 7, 1:])
        assert epoch == 1 + (7 * n + 6) // len(rows)


def test_other_arguments_are_refused_at_once(small):
    with pytest.raises(ValueError, match='"train" nor "val"'):
        loader(split="test")
    with pytest.raises(ValueError, match="MAX_SEQ_LEN = 32, not 64"):
        loader(T=64, split="val")


def test_text_that_fills_no_row_is_an_error(small):
    with pytest.raises(ValueError, match="does not fill one row of 60001 tokens"):
        next(loader(T=60_000))


def test_closing_the_iterator_ends_its_thread(small):
    before = threading.active_count()
    batches = loader()
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before
    next(batches := loader())
    del batches
    assert threading.active_count() == before


def test_an_error_in_the_thread_reaches_the_caller(small, monkeypatch):
    def write_row(*_):
        raise OSError(5, "the disk went away")

    batches = loader()
    next(batches)
    monkeypatch.setattr(prepare, "write_row", write_row)
    with pytest.raises(OSError, match="the disk went away"):
        for _ in islice(batches, 5):
            pass
