"""The loader: what a batch is, where it comes from, and that nothing writes over it."""

import threading
from collections import Counter
from itertools import islice, takewhile

import numpy as np
import pytest
import torch

import prepare
from prepare import Tokenizer, make_dataloader


def loader(B=4, T=32, split="train", device="cpu"):
    return make_dataloader(Tokenizer.from_directory(), B, T, split, device)


def rows_of_epoch(number: int) -> np.ndarray:
    """The rows put together again: (rows, T + 1)."""
    batches = takewhile(lambda batch: batch[2] <= number, loader(1))
    rows = [[*x[0].tolist(), y[0, -1].item()] for x, y, epoch in batches if epoch == number]
    return np.stack(rows)


@pytest.mark.parametrize("B", [1, 4])
def test_targets_are_the_inputs_shifted_by_one_in_memory_of_their_own(small, B):
    bos = Tokenizer.from_directory().bos
    for inputs, targets, epoch in islice(loader(B), 5):
        assert inputs.shape == targets.shape == (B, 32)
        assert inputs.dtype == targets.dtype == torch.int64 and epoch == 1
        assert inputs[:, 1:].equal(targets[:, :-1])
        assert (inputs[:, 0] == bos).all()
        assert inputs.untyped_storage().size() == targets.untyped_storage().size() == 8 * B * 32
        assert inputs.data_ptr() != targets.data_ptr()


def test_order_is_the_same_for_every_batch_size_and_no_batch_is_written_over_later(small):
    by_one = torch.cat([x for x, _, _ in islice(loader(1), 200)])  # read only once all are there
    by_eight = [x.clone() for x, _, _ in islice(loader(8), 25)]
    assert by_one.equal(torch.cat(by_eight))


@pytest.mark.parametrize(("shard_bytes", "shards"), [(1 << 28, [1]), (20_000, range(3, 30))])
def test_epoch_rises_when_all_text_was_served_once(own_text, shard_bytes, shards, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_BYTES", shard_bytes)
    prepared = prepare.prepare()
    names = prepared.manifest["train"]
    assert len(names) in shards
    tokens = np.concatenate([np.fromfile(prepared.tokens / name, np.uint16) for name in names])
    whole, served = Counter(tokens.tolist()), Counter(rows_of_epoch(2).flatten().tolist())
    bos = Tokenizer.from_directory().bos
    whole[bos] = served[bos] = 0  # a row may need more of these, or fewer
    assert served <= whole
    # What does not fill the last row of a shard is lost.
    assert whole.total() - served.total() < 33 * len(names)


def test_each_epoch_has_an_order_of_its_own(small):
    first, second, third = (rows_of_epoch(number) for number in (1, 2, 3))
    assert len(first) > len(second) and abs(len(second) - len(third)) <= 1
    assert not np.array_equal(second[:20], third[:20])
    assert not np.array_equal(first[-len(second) :][:20], second[:20])


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_only_copies_from_pinned_memory_are_not_waited_for(small, monkeypatch, device):
    pinned, copies = [], []

    def to(tensor, device, non_blocking):
        copies.append((tensor.data_ptr() in pinned, non_blocking, torch.device(device).type))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t.data_ptr()) or t)
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


def test_what_cannot_be_served_is_refused(small):
    for split in ("test", "val"):
        with pytest.raises(ValueError, match=f'split "{split}" is not "train"'):
            loader(split=split)
    with pytest.raises(ValueError, match="does not fill one row of 60001 tokens"):
        next(loader(T=60_000))


def test_the_thread_ends_with_its_loader(small):
    before = set(threading.enumerate())
    batches = loader()
    next(batches)
    (thread,) = set(threading.enumerate()) - before
    del batches
    thread.join(10)
    assert not thread.is_alive()


def test_an_error_in_the_thread_reaches_the_caller(small, monkeypatch):
    def training_rows(*_):
        yield np.arange(33), 1
        raise OSError(5, "the disk went away")

    monkeypatch.setattr(prepare, "training_rows", training_rows)
    with pytest.raises(OSError, match="the disk went away"):
        list(islice(loader(B=1), 5))
