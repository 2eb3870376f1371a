"""How a step fares beside other work, by settings of OpenMP: uv run tests/bench_threads.py

For a quiet machine without a GPU. Each setting has a process of its own, as it is read when torch
is loaded; they take turns of a few steps, so that a machine that drifts does so for all. Figures
are medians of the small scale's step, alone and beside one busy loop, and of its ratio to the first
setting's step of the same round.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROUNDS, STEPS = 12, 4
SETTINGS = {
    "as torch has it": {"GOMP_SPINCOUNT": "300000"},
    "as train.py sets it": {},
    "10,000 spins": {"GOMP_SPINCOUNT": "10000"},
    "5,000 spins": {"GOMP_SPINCOUNT": "5000"},
    "1,000 spins": {"GOMP_SPINCOUNT": "1000"},
    "passive waiting": {"OMP_WAIT_POLICY": "passive"},
    "bound to cores": {"OMP_PROC_BIND": "true"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
BUSY = [sys.executable, "-c", "while True: pass"]


def take_turns() -> None:
    """One setting's process: for each line that it is sent, the median of STEPS steps in ms."""
    sys.path.insert(0, str(ROOT))
    import train

    train.prepare.DATASET = "pysource"
    run = train.Run(train.find_platform())
    train.warm_up(run)
    print("READY", flush=True)
    for _ in sys.stdin:
        steps_s = []
        for step in range(STEPS):
            started_s = time.perf_counter()
            run.take_step(0.0, step).wait()
            steps_s.append(time.perf_counter() - started_s)
        print(f"STEP {1e3 * statistics.median(steps_s)}", flush=True)


def answer(process: subprocess.Popen, begins: str) -> str:
    """What follows `begins` in the process's next line that has it."""
    while not (line := process.stdout.readline()).startswith(begins):
        assert line, f"{process.args} ended with {process.wait()}"
    return line.removeprefix(begins)


def main() -> None:
    if sys.argv[1:] == ["--turns"]:
        return take_turns()
    processes = {}
    for name, setting in SETTINGS.items():  # the first compiles, the others find its code
        command = [sys.executable, __file__, "--turns"]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        processes[name] = subprocess.Popen(command, env={**os.environ, **setting}, **pipes)
        answer(processes[name], "READY")
    for beside in ("alone", "beside a busy loop"):
        busy = subprocess.Popen(BUSY) if beside != "alone" else None
        steps_ms = {name: [] for name in SETTINGS}
        for _ in range(ROUNDS):
            for name, process in processes.items():
                print(file=process.stdin, flush=True)
                steps_ms[name].append(float(answer(process, "STEP ")))
        for name, own in steps_ms.items():
            firsts = steps_ms["as torch has it"]
            ratios = [ms / first for ms, first in zip(own, firsts, strict=True)]
            print(
                f"{beside:18s} · {name:19s} {statistics.median(own):5.0f} ms · "
                f"x {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )
        if busy:
            busy.kill()
    for process in processes.values():
        process.kill()


if __name__ == "__main__":
    main()
