"""The loader: what a batch is, where it comes from, and that nothing writes over it."""

import threading
from collections import Counter
from itertools import islice, takewhile

import numpy as np
import pytest
import torch

import prepare
from prepare import HarnessError, Tokenizer, make_dataloader


def loader(B=4, T=32, split="train", device="cpu"):
    return make_dataloader(Tokenizer.from_directory(), B, T, split, device=device)


def rows_of_epoch(number: int, split: str = "train") -> np.ndarray:
    """The rows put together again: (rows, T + 1)."""
    batches = takewhile(lambda batch: batch[2] <= number, loader(1, split=split))
    rows = [[*x[0].tolist(), y[0, -1].item()] for x, y, epoch in batches if epoch == number]
    return np.stack(rows)


@pytest.mark.parametrize("B", [1, 4])
@pytest.mark.parametrize("split", ["train", "val"])
def test_targets_are_the_inputs_shifted_by_one_in_memory_of_their_own(small, B, split):
    bos = Tokenizer.from_directory().get_bos_token_id()
    for inputs, targets, epoch in islice(loader(B, split=split), 5):
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


def test_val_serves_the_scored_rows_first_and_no_text_of_train(small):
    scored, served = small.rows(), rows_of_epoch(1, "val")
    assert np.array_equal(served[: len(scored)], scored)
    assert np.array_equal(rows_of_epoch(2, "val"), served)  # in the same order
    tokenizer = Tokenizer.from_directory()
    trained = tokenizer.decode(rows_of_epoch(1).flatten())
    assert not any(tokenizer.decode(row[1:20]) in trained for row in scored)


@pytest.mark.parametrize("num_files", [1, 7])
def test_epoch_rises_when_all_text_was_served_once(small, num_files, monkeypatch):
    """Also of text that lies in several files, as that of the hub."""
    (whole,) = small.train
    tokens = np.fromfile(small.folder / whole, np.uint16)
    bos = Tokenizer.from_directory().get_bos_token_id()
    documents = np.split(tokens, np.flatnonzero(tokens == bos)[1:])
    names = [f"train_{n}.bin" for n in range(num_files)]
    for n, name in enumerate(names):
        np.concatenate(documents[n::num_files]).tofile(small.folder / name)
    prepared = small._replace(train=names)
    monkeypatch.setattr(prepare, "open_prepared", lambda: prepared)
    tokens = [np.fromfile(prepared.folder / name, np.uint16) for name in prepared.train]
    whole = Counter(np.concatenate(tokens).tolist())
    for number in (1, 2):
        served = Counter(rows_of_epoch(number).flatten().tolist())
        whole[bos] = served[bos] = 0  # a row may need more of these, or fewer
        assert served <= whole
        # What does not fill the last row of a file is lost, of first pieces and of rests.
        assert whole.total() - served.total() < 2 * 33 * len(prepared.train)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_only_copies_from_pinned_memory_are_not_waited_for(small, monkeypatch, device):
    pinned, copies = [], []

    def to(tensor, device, non_blocking):
        copies.append((tensor.data_ptr() in pinned, non_blocking, torch.device(device).type))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: pinned.append(t.data_ptr()) or t)
    monkeypatch.setattr(torch.Tensor, "to", to)
    next(loader(device=device))
    assert copies == [(device == "cuda", device == "cuda", device)]


@pytest.mark.gpu
def test_a_busy_gpu_still_reads_what_was_packed(small):
    expected = list(islice(loader(), 50))
    torch.cuda._sleep(1_000_000_000)  # cycles: half a second, in which the copies only queue
    seen = list(islice(loader(device=None), 50))  # the GPU, as there is one
    for (x, y, _), (inputs, targets, _) in zip(seen, expected, strict=True):
        assert x.is_cuda and x.cpu().equal(inputs) and y.cpu().equal(targets)


def test_what_cannot_be_served_is_refused(small):
    with pytest.raises(ValueError, match='split "test" is neither "train" nor "val"'):
        loader(split="test")
    for split in ("train", "val"):
        with pytest.raises(HarnessError, match="too little text: 0 of 1 rows of 60001 tokens"):
            next(loader(T=60_000, split=split))


def test_the_thread_ends_with_its_loader(small):
    before = set(threading.enumerate())
    batches = loader()
    next(batches)
    (thread,) = set(threading.enumerate()) - before
    del batches
    thread.join(10)
    assert not thread.is_alive()


def test_an_error_in_the_thread_reaches_the_caller(small, monkeypatch):
    def endless_rows(*_, **__):
        yield np.arange(33), 1
        raise OSError(5, "the disk went away")

    monkeypatch.setattr(prepare, "endless_rows", endless_rows)
    with pytest.raises(OSError, match="the disk went away"):
        list(islice(loader(B=1), 5))
