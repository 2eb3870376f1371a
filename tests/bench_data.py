"""How fast data is, in medians of 7; run by hand, on a machine with nothing else to do.

    uv run tests/bench_data.py

Loaders are timed by the processor's seconds in all threads (one core's work, however busy the
machine), tokenizing and opening by the clock.
"""

import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from itertools import islice, takewhile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import prepare  # noqa: E402

ROWS = 16  # in a batch


def median_s(run: Callable[[], object], clock: Callable[[], float]) -> float:
    seconds = []
    for _ in range(7):
        started_s = clock()
        run()
        seconds.append(clock() - started_s)
    return statistics.median(seconds)


def big_shards_mb(T: int, tokens: int = 62_000_000) -> float:
    """Peak memory that making rows takes, from two shards of ClimbMix's size."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{n}.bin" for n in range(2)]
        for path in paths:
            part = rng.integers(1, 8188, tokens, dtype=np.uint16)
            part[rng.integers(0, tokens, tokens // 590)] = 0  # 590 tokens a document
            part[0] = 0
            part.tofile(path)
        tracemalloc.start()
        for _ in takewhile(lambda row: row[1] == 1, prepare.training_rows(paths, T + 1, bos=0)):
            pass
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak_bytes / 1e6


def main() -> None:
    prepare.open_prepared()
    opening_s = median_s(prepare.open_prepared, time.perf_counter)
    print(f"opening the prepared data set: {1000 * opening_s:.1f} ms (< 300)", flush=True)
    for T in (2048, 256):
        print(
            f"rows from shards of 62 M tokens, T {T}: {big_shards_mb(T):.0f} MB (< 300)", flush=True
        )
    tokenizer = prepare.Tokenizer.from_directory()
    for T, target in ((2048, 20), (256, 10)):
        batches = prepare.make_dataloader(tokenizer, ROWS, T, "train", "cpu")
        next(batches)  # what is done once, such as filling a buffer, is not counted
        number = 3_000_000 // (ROWS * T)
        seconds = median_s(lambda b=batches, n=number: list(islice(b, n)), time.process_time)
        rate = number * ROWS * T / seconds / 1e6
        print(f"loader, T {T}, one core: {rate:.1f} M tokens/s (>= {target})", flush=True)
    parts, _, _ = prepare.find_documents(None, 8)
    sample = list(islice(next(iter(parts.values()))(), 5000))
    encode_s = median_s(
        lambda: sum(map(len, prepare.encode_all(tokenizer, iter(sample)))), time.perf_counter
    )
    rate = sum(len(text.encode()) for text in sample) / encode_s / 1e6
    print(f"tokenizing, all cores: {rate:.1f} MB/s (>= 25 on 2 cores)")


if __name__ == "__main__":
    main()
