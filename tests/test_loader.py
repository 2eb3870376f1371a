"""The loader: what a batch is, where it comes from, and that nothing writes over it."""

import threading
import time
from collections import Counter
from itertools import islice, takewhile

import numpy as np
import pytest
import torch

import prepare
from prepare import Tokenizer, make_dataloader


def loader(B=4, T=32, split="train", device="cpu"):
    return make_dataloader(Tokenizer.from_directory(), B, T, split, device)


def rows_of_epochs(*epochs: int, T=32) -> np.ndarray:
    """The rows of these epochs put together again: (rows, T + 1)."""
    batches = takewhile(lambda batch: batch[2] <= max(epochs), loader(1, T))
    rows = [[*x[0].tolist(), y[0, -1].item()] for x, y, epoch in batches if epoch in epochs]
    return np.stack(rows)


def documents_in(tokens: np.ndarray, bos: int) -> list[np.ndarray]:
    return [part[1:] for part in np.split(tokens, np.flatnonzero(tokens == bos)) if len(part)]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("B", [1, 4])
def test_targets_are_the_inputs_shifted_by_one_in_memory_of_their_own(small, split, B):
    bos = Tokenizer.from_directory().get_bos_token_id()
    for inputs, targets, epoch in islice(loader(B, split=split), 5):
        assert inputs.shape == targets.shape == (B, 32)
        assert inputs.dtype == targets.dtype == torch.int64 and epoch == 1
        assert inputs[:, 1:].equal(targets[:, :-1])
        assert (inputs[:, 0] == bos).all()
        assert inputs.untyped_storage().size() == targets.untyped_storage().size() == 8 * B * 32
        assert inputs.data_ptr() != targets.data_ptr()


def test_order_is_the_same_in_every_run_and_for_every_batch_size(small):
    by_one = torch.cat([x for x, _, _ in islice(loader(1), 200)])
    by_eight = torch.cat([x for x, _, _ in islice(loader(8), 25)])
    assert by_one.equal(by_eight)


@pytest.mark.parametrize("T", [32, 100])
def test_rows_are_the_text_of_training_documents(small, own_text, T):
    tokenizer = Tokenizer.from_directory()
    pieces = {rank: token for token, rank in tokenizer.ranks.items()}

    def text_of(tokens: np.ndarray) -> bytes:
        return b"".join(pieces[token] for token in tokens.tolist())

    validation = np.fromfile(small.tokens / "val.bin", np.uint16)
    held_out = {text_of(document) for document in documents_in(validation, tokenizer.bos)}
    files = [path.read_bytes() for path in own_text.iterdir()]
    trained_on = b"\0".join(text for text in files if text not in held_out)
    assert 0 < len(held_out) < len(files) / 4
    for row in rows_of_epochs(1, T=T):
        for part in documents_in(row, tokenizer.bos):
            assert text_of(part) in trained_on


@pytest.mark.parametrize("shard_bytes", [1 << 28, 20_000])
def test_epoch_rises_when_the_training_text_was_served_once(own_text, shard_bytes, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_BYTES", shard_bytes)
    prepared = prepare.prepare()
    names = prepared.manifest["train"]
    assert len(names) == 1 if shard_bytes > 20_000 else len(names) > 2
    tokens = np.concatenate([np.fromfile(prepared.tokens / name, np.uint16) for name in names])
    whole, served = Counter(tokens.tolist()), Counter(rows_of_epochs(2).flatten().tolist())
    bos = Tokenizer.from_directory().bos
    whole[bos] = served[bos] = 0  # a row may need more of these, or fewer
    assert served <= whole
    # What does not fill the last row of a shard is lost.
    assert whole.total() - served.total() < 33 * len(names)


def test_epochs_count_from_1_and_each_has_an_order_of_its_own(small):
    rows: dict[int, list] = {}
    for inputs, _, epoch in takewhile(lambda batch: batch[2] < 4, loader(1)):
        rows.setdefault(epoch, []).append(inputs.flatten().tolist())
    assert list(rows) == [1, 2, 3]
    assert len(rows[1]) > len(rows[2]) and abs(len(rows[2]) - len(rows[3])) <= 1
    assert rows[1][:20] != rows[2][:20] != rows[3][:20]


def test_no_batch_is_written_over_while_a_slow_device_still_reads_it(small):
    """As a device sees them that copies each batch only ten batches later."""
    queued, late = [], []
    for inputs, targets, _ in islice(loader(), 40):
        queued.append((inputs, targets))
        late += [[half.clone() for half in queued[-10]]] if len(queued) >= 10 else []
    for (x, y), (inputs, targets, _) in zip(late, loader(), strict=False):
        assert x.equal(inputs) and y.equal(targets)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_only_copies_from_pinned_memory_are_not_waited_for(small, monkeypatch, device):
    pinned, copies = [], []

    def pin_memory(tensor):
        pinned.append(tensor.data_ptr())
        return tensor

    def to(tensor, device, non_blocking):
        copies.append((tensor.data_ptr() in pinned, non_blocking, torch.device(device).type))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    next(loader(device=device))
    assert copies == [(device == "cuda", device == "cuda", device)] * 2


@pytest.mark.gpu
def test_a_busy_gpu_still_reads_what_was_packed(small):
    expected = list(islice(loader(), 50))
    torch.cuda._sleep(1_000_000_000)  # cycles: half a second, in which the copies only queue
    seen = list(islice(loader(device="cuda"), 50))
    for (x, y, _), (inputs, targets, _) in zip(seen, expected, strict=True):
        assert x.cpu().equal(inputs) and y.cpu().equal(targets)


def test_first_batches_are_made_before_they_are_asked_for_and_no_more(small, monkeypatch):
    made = []
    batches = prepare.batches
    monkeypatch.setattr(
        prepare, "batches", lambda *a, **k: (made.append(1) or b for b in batches(*a, **k))
    )
    waiting = loader()
    deadline_s = time.monotonic() + 5
    while len(made) < prepare.BATCHES_AHEAD and time.monotonic() < deadline_s:
        threading.Event().wait(0.01)
    assert len(made) == prepare.BATCHES_AHEAD
    next(waiting)


def test_validation_batches_are_the_stored_rows_again_and_again(small):
    rows = torch.from_numpy(small.rows().astype(np.int64))
    again = rows.repeat(3, 1)  # a batch may hold the end of one turn and the start of the next
    for n, (inputs, targets, epoch) in enumerate(islice(loader(7, split="val"), len(again) // 7)):
        assert inputs.equal(again[7 * n : 7 * n + 7, :-1])
        assert targets.equal(again[7 * n : 7 * n + 7, 1:])
        assert epoch == 1 + (7 * n + 6) // len(rows)


@pytest.mark.parametrize("arguments", [{"split": "test"}, {"T": 64, "split": "val"}])
def test_other_arguments_are_refused_at_once(small, arguments):
    with pytest.raises(ValueError, match='not "train", nor "val" with T = 32'):
        loader(**arguments)


def test_text_that_fills_no_row_is_an_error(small):
    with pytest.raises(ValueError, match="does not fill one row of 60001 tokens"):
        next(loader(T=60_000))


@pytest.mark.parametrize("taken", [0, 1])
def test_a_loader_that_is_let_go_ends_its_thread(small, taken):
    before = set(threading.enumerate())
    batches = loader()
    for _ in range(taken):
        next(batches)
    (thread,) = set(threading.enumerate()) - before
    del batches
    thread.join(10)
    assert not thread.is_alive()


def test_an_error_in_the_thread_reaches_the_caller(small, monkeypatch):
    def fill_row(*_):
        raise OSError(5, "the disk went away")

    batches = loader()
    next(batches)
    monkeypatch.setattr(prepare, "fill_row", fill_row)
    with pytest.raises(OSError, match="the disk went away"):
        for _ in islice(batches, 5):
            pass
