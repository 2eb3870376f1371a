"""How fast data is, in medians of 7; by hand, on an idle machine: uv run tests/bench_data.py

Loaders are timed by the processor's seconds in all threads (one core's work, however busy the
machine), tokenizing and opening by the clock.
"""

import statistics
import sys
import time
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import prepare  # noqa: E402


def median_s(run, clock=time.perf_counter) -> float:
    seconds = []
    for _ in range(7):
        started_s = clock()
        run()
        seconds.append(clock() - started_s)
    return statistics.median(seconds)


def main() -> None:
    print(f"opening what is prepared: {1000 * median_s(prepare.open_prepared):.1f} ms (< 300)")
    prepared = prepare.open_prepared()
    tokenizer = prepare.Tokenizer.from_directory()
    for B, T, target in ((16, 2048, 20), (16, 256, 10)):
        batches = prepare.make_dataloader(tokenizer, B, T, "train", device="cpu")
        next(batches)  # what is done once, such as filling a buffer, is not counted
        number = 3_000_000 // (B * T)
        seconds = median_s(lambda b=batches, n=number: list(islice(b, n)), time.process_time)
        millions = number * B * T / 1e6
        print(f"loader, T {T}, one core: {millions / seconds:.1f} M tokens/s (>= {target})")
    text = prepare.find_documents(prepared.folder, prepare.NUM_SHARDS, workers=8)
    sample = list(islice(text.documents(text.train[0]), 5000))
    encoders = [prepare.Tokenizer.from_directory() for _ in range(prepare.usable_cores())]
    seconds = median_s(lambda: sum(map(len, prepare.encode_all(sample, encoders))))
    megabytes = sum(len(text.encode()) for text in sample) / 1e6
    print(f"tokenizing, all cores: {megabytes / seconds:.1f} MB/s (>= 25 on 2 cores)")


if __name__ == "__main__":
    main()
