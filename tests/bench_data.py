"""How fast data is, in medians of 7; run by hand, on a machine with nothing else to do.

    uv run tests/bench_data.py

Loaders are timed by the processor's seconds in all threads (one core's work, however busy the
machine), tokenizing and opening by the clock.
"""

import os
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import cycle, islice, takewhile
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import prepare  # noqa: E402

ROWS = 16  # in a batch
TIMES = 7


def median_s(run: Callable[[], object], clock: Callable[[], float]) -> float:
    seconds = []
    for _ in range(TIMES):
        started_s = clock()
        run()
        seconds.append(clock() - started_s)
    return statistics.median(seconds)


def tokens_per_second(batches: Iterator, T: int, tokens: int) -> float:
    """Of batches that are taken one after the other, `tokens` a time."""
    next(batches)  # what is done once, such as filling a buffer, is not counted
    number = max(1, tokens // (ROWS * T))

    def take() -> None:
        for _ in islice(batches, number):
            pass

    return number * ROWS * T / median_s(take, time.process_time)


def plain_batches(texts: list[str], tokenizer: prepare.Tokenizer, T: int) -> Iterator:
    """The reference's rule written plainly: tokenize in the loop, look through 1000 documents."""
    documents, buffer = cycle(texts), []
    while True:
        batch = torch.empty((ROWS, T + 1), dtype=torch.int64)
        for row in batch:
            at = 0
            while at <= T:
                while len(buffer) < 1000:
                    tokens = tokenizer._encoding.encode_ordinary(next(documents))
                    buffer.append([tokenizer.bos, *tokens])
                room, best = T + 1 - at, None
                for place, document in enumerate(buffer):
                    length = len(document)
                    if length <= room and (best is None or length > len(buffer[best])):
                        best = place
                if best is None:
                    best = min(range(len(buffer)), key=lambda place: len(buffer[place]))
                document = buffer.pop(best)[:room]
                row[at : at + len(document)] = torch.tensor(document)
                at += len(document)
        yield batch[:, :-1].clone(), batch[:, 1:].clone()


def big_shards_mb(T: int, shards: int = 2, tokens: int = 62_000_000) -> float:
    """Peak memory that making rows takes, from shards of ClimbMix's size."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{n}.bin" for n in range(shards)]
        for path in paths:
            with open(path, "wb") as file:
                for _ in range(tokens // 1_000_000):
                    part = rng.integers(1, 8188, 1_000_000, dtype=np.uint16)
                    part[rng.integers(0, len(part), 1700)] = 0  # 590 tokens a document
                    part[0] = 0
                    file.write(part)
        tracemalloc.start()
        for _ in takewhile(lambda row: row[1] == 1, prepare.training_rows(paths, T + 1, bos=0)):
            pass
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak_bytes / 1e6


def line(what: str, value: str, target: str) -> None:
    print(f"{what:<48} {value:>22}   {target}", flush=True)


def main() -> None:
    line("", "measured", "target")
    prepared = prepare.open_prepared()
    opening_s = median_s(prepare.open_prepared, time.perf_counter)
    line("opening the prepared data set", f"{1000 * opening_s:.1f} ms", "< 300 ms")
    for T in (2048, 256):
        memory = f"{big_shards_mb(T):.0f} MB"
        line(f"rows from shards of 62 M tokens, T = {T}", memory, "< 300 MB")
    tokenizer = prepare.Tokenizer.from_directory()
    texts = list(islice(prepare.find_dataset(None, 8).train[0].documents(), 20_000))
    for T, target in ((2048, "≥ 20 M, ≥ 50 times"), (256, "≥ 10 M")):
        batches = prepare.make_dataloader(tokenizer, ROWS, T, "train", "cpu")
        fast = tokens_per_second(batches, T, tokens=prepared.manifest["tokens"])
        slow = tokens_per_second(plain_batches(texts, tokenizer, T), T, tokens=500_000)
        line(f"loader, T = {T}, one core", f"{fast / 1e6:.1f} M tokens/s", target)
        line("  the reference's rule, plainly", f"{slow / 1e6:.3f} M tokens/s", "")
        line("  ratio", f"{fast / slow:.0f}", "")
    sample = texts[:: max(1, len(texts) // 5000)]
    num_bytes = sum(len(text.encode()) for text in sample)
    rates, cpu_count = {}, os.cpu_count
    for threads in sorted({1, cpu_count() or 1}):
        os.cpu_count = lambda threads=threads: threads
        seconds = median_s(
            lambda: sum(map(len, prepare.encode_all(tokenizer, sample))), time.perf_counter
        )
        rates[threads] = num_bytes / seconds
        line(f"tokenizing, {threads} threads", f"{rates[threads] / 1e6:.1f} MB/s", "")
    os.cpu_count = cpu_count
    line("  ratio", f"{rates[max(rates)] / rates[1]:.2f}", "≥ 1.8 on 2 cores")


if __name__ == "__main__":
    main()
