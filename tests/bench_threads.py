"""How a step fares beside other work, by settings of OpenMP: uv run tests/bench_threads.py

For a quiet machine without a GPU. Settings alternate, each in a process of its own, as they are
read when torch is loaded; figures are medians of the small scale's step, alone and beside one busy
loop. The first process compiles (a minute), the others find its code.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROUNDS, STEPS = 3, 20
SETTINGS = {
    "as it is": {},
    "bound to cores": {"OMP_PROC_BIND": "true"},
    "passive waiting": {"OMP_WAIT_POLICY": "passive"},
    "short spinning": {"GOMP_SPINCOUNT": "10000"},
    "shorter spinning": {"GOMP_SPINCOUNT": "1000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
BUSY = "while True: pass"


def median_ms(run) -> float:
    steps_s = []
    for step in range(STEPS):
        started_s = time.perf_counter()
        run.take_step(0.0, step).wait()
        steps_s.append(time.perf_counter() - started_s)
    return 1e3 * statistics.median(steps_s)


def measure() -> None:
    """One process: a warm run, a step alone, and beside a busy loop."""
    sys.path.insert(0, str(ROOT))
    import train

    train.prepare.DATASET = "pysource"
    train.prepare.open_prepared()
    started_s = time.perf_counter()
    run = train.Run(train.find_platform())
    train.warm_up(run)
    warm_up_s = time.perf_counter() - started_s
    alone_ms = median_ms(run)
    busy = subprocess.Popen([sys.executable, "-c", BUSY])
    beside_ms = median_ms(run)
    busy.kill()
    print(f"RESULT {alone_ms:.0f} {beside_ms:.0f} {warm_up_s:.0f}")


def main() -> None:
    if sys.argv[1:] == ["--case"]:
        return measure()
    command = [sys.executable, __file__, "--case"]
    for number in range(ROUNDS):
        for name, setting in SETTINGS.items():
            environment = {**os.environ, **setting}
            out = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
            figures = out.partition("RESULT ")[2].split() or ["failed"] * 3
            alone, beside, warm_up = figures
            print(
                f"{number} {name:16s} alone {alone} ms · beside {beside} ms · warm-up {warm_up} s"
            )


if __name__ == "__main__":
    main()
