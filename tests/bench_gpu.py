"""The checks for a machine with a GPU, by hand: uv run tests/bench_gpu.py [part ...]

Parts: rate, suite, attention, loader, speed, evaluation, memory, micro_batches, candidates. Without
any, all but the last two, in about nine minutes. Each prints a short table; a run's whole log goes
to $OUT or ./bench_gpu_logs. Text is `pysource`, so that no network is needed: its scores compare
only with one another. Set HF_HUB_OFFLINE=1 where the hub cannot be reached, else the search for
Flash Attention 3 counts as start-up.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import prepare  # noqa: E402
import train  # noqa: E402

LOGS = Path(os.environ.get("OUT") or "bench_gpu_logs")

# One-line changes that others measured on one H100, tried against the constants as they are.
CANDIDATES = {
    "batch 2^18": {"TOTAL_BATCH_SIZE": 2**18},
    "depth 9, aspect 57": {"DEPTH": 9, "ASPECT_RATIO": 57},
    "learning rates": {"EMBEDDING_LR": 0.9, "UNEMBEDDING_LR": 0.005},
    "windows T/8, SSSSL, rotary 200k": {
        "SHORT_WINDOW": 1 / 8,
        "WINDOW_PATTERN": "SSSSL",
        "ROTARY_BASE": 200_000,
    },
    "warm-down 0.75, floor 0.05": {"WARMDOWN_RATIO": 0.75, "FINAL_LR_FRAC": 0.05},
    "starts": {"SKIP_START": 0.05, "MATRIX_STD": 0.68},
    "momentum ramp 200": {"MUON_MOMENTUM_STEPS": 200},
    "documents masked": {"documents": 64},  # by varlen_attn, also where the other has FA3
}

# With and without computing cheap activations again, by rows of a micro-batch.
MICRO_BATCHES = {
    "128 rows, 0.95": {"DEVICE_BATCH_SIZE": 128, "ACTIVATION_MEMORY": 0.95},
    "128 rows, 1.0": {"DEVICE_BATCH_SIZE": 128, "ACTIVATION_MEMORY": 1.0},
    "64 rows, 0.95": {"DEVICE_BATCH_SIZE": 64, "ACTIVATION_MEMORY": 0.95},
    "64 rows, 1.0": {"DEVICE_BATCH_SIZE": 64, "ACTIVATION_MEMORY": 1.0},
}


def document_starts(idx: torch.Tensor, bos: int, most: int) -> torch.Tensor:
    """Where documents begin in rows (B, T) laid end to end, as (B x most + 1) int32.

    A row's list always has `most` places, so that nothing recompiles; those left over hold the
    row's end: documents of no length. Documents beyond the last place count as one. Every row
    has to begin with BOS, as the loader's do.
    """
    B, T = idx.shape
    number_BT = (idx == bos).cumsum(1) - 1
    place_BT = torch.where((idx == bos) & (number_BT < most), number_BT, most)
    at = torch.arange(T, device=idx.device).expand(B, T)
    starts = torch.full((B, most + 1), T, device=idx.device).scatter(1, place_BT, at)[:, :most]
    starts = (starts + T * torch.arange(B, device=idx.device)[:, None]).flatten()
    return F.pad(starts, (0, 1), value=B * T).int()


def mask_documents(most: int) -> None:
    """Patch train.py so that no token sees another document, by torch's varlen_attn."""
    hidden, now = train.GPT.hidden, []

    def hidden_with_starts(self, idx):
        now[:] = [document_starts(idx, self.config.vocab_size - len(prepare.SPECIAL_TOKENS), most)]
        return hidden(self, idx)

    def masked_varlen(config, device):
        from torch.nn.attention.varlen import varlen_attn

        def attend(q, k, v, window):
            B, T, H, D = q.shape
            if now:
                starts = now[0]
            else:  # tried out before there is a model
                starts = torch.arange(0, B * T + 1, T, device=q.device, dtype=torch.int32)
            flat = [train.repeat_heads(t, H).flatten(0, 1) for t in (q, k, v)]
            sizes = (window if window < T - 1 else -1, 0)
            return varlen_attn(*flat, starts, starts, T, T, window_size=sizes).view(B, T, H, D)

        return attend

    train.GPT.hidden = hidden_with_starts
    train.attention_candidates = lambda platform: [masked_varlen]


def run_train(
    name: str, budget_s: int, overrides: dict, gpu_gb: float = 0, cache: str = ""
) -> dict:
    """One run of train.py in a process of its own; its summary, and seconds to the first step."""
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import prepare
prepare.DATASET, prepare.TIME_BUDGET = "pysource", {budget_s}
import train, torch, bench_gpu
for name, value in {overrides!r}.items():
    if name == "documents":
        bench_gpu.mask_documents(value)
        continue
    assert hasattr(train, name), name
    setattr(train, name, value)
if {gpu_gb}:
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, {gpu_gb} * 2**30 / total))
train.main()
"""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if cache:
        environment["TORCHINDUCTOR_CACHE_DIR"] = cache
    LOGS.mkdir(parents=True, exist_ok=True)
    started_s, first_s, lines = time.perf_counter(), None, []
    command = [sys.executable, "-c", code]
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, env=environment, **pipe) as process:
        for line in process.stdout:
            if line.startswith("training for") and first_s is None:
                first_s = time.perf_counter() - started_s
            lines.append(line)
    (LOGS / f"{name.replace(' ', '_').replace('/', '-')}.log").write_text("".join(lines))
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    summary = {key: value.strip() for key, value in pairs}
    summary["start_s"] = f"{first_s:.1f}" if first_s else "-"
    return summary


def show(title: str, rows: list[dict], columns: list[str]) -> None:
    print(f"\n{title}\n" + " | ".join(columns))
    for row in rows:
        print(" | ".join(str(row.get(column, "-")) for column in columns), flush=True)


def rate() -> None:
    """Measured rate of a large bf16 product on random data, beside the datasheet's."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    tflops = []
    for _ in range(30):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        tflops.append(2 * 8192**3 / start.elapsed_time(end) / 1e9)
    platform = train.find_platform()
    row = {
        "device": platform.name,
        "measured": f"{statistics.median(tflops[10:]):.0f}",
        "datasheet": f"{platform.peak_flops / 1e12:.0f}",
    }
    show("bf16 product, TFLOP/s", [row], list(row))


def suite() -> None:
    """The whole test suite with the GPU present."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", str(ROOT)], cwd=ROOT, text=True)
    print(f"\ntest suite: exit status {done.returncode}")


def attention() -> None:
    """Every backend, forward and backward, against the written-out one in float32."""
    rows = []
    for T in (256, 2048):
        for B in (1, 8):
            for window in (0, 1, 127, 128, 1024, T):
                if window <= T:
                    rows += [{"T": T, "B": B, "window": window, **attention_errors(T, B, window)}]
    names = ["flash_attention_3", "torch_varlen", "torch_sdpa"]
    show(
        "attention, |out - ref| / |ref|: forward, worst of dq dk dv",
        rows,
        ["T", "B", "window", *names],
    )


@functools.cache
def flash_kernel():
    """The same for every shape; or why there is none, so that the hub is asked once."""
    try:
        return train.flash_attention_3(None, None)
    except Exception as failure:
        return failure


def flash_attention_3(config, device):
    if isinstance(flash_kernel(), Exception):
        raise flash_kernel()
    return flash_kernel()


def attention_errors(T: int, B: int, window: int) -> dict:
    config = train.GPTConfig(T, 8192, 1, 4, 4, 512, "L")
    config.windows = lambda: [window]
    device = torch.device("cuda")
    q, k, v = (torch.randn(B, T, 4, 128, device=device, dtype=torch.bfloat16) for _ in range(3))

    def results(make, dtype):
        leaves = [t.to(dtype).detach().requires_grad_() for t in (q, k, v)]
        y = make(config, device)(*leaves, window)
        torch.manual_seed(0)
        y.backward(torch.randn(y.shape, device=device).to(dtype))
        return [t.float() for t in (y.detach(), *(leaf.grad for leaf in leaves))]

    wanted, found = results(train.written_out, torch.float32), {}
    for make in (flash_attention_3, train.torch_varlen, train.torch_sdpa):
        try:
            got = results(make, torch.bfloat16)
            errors = [
                ((g - w).norm() / w.norm().clamp_min(1.0)).item()  # window 0: dq and dk are 0
                for g, w in zip(got, wanted, strict=True)
            ]
            found[make.__name__] = f"{errors[0]:.1e} {max(errors[1:]):.1e}"
        except Exception as failure:
            found[make.__name__] = type(failure).__name__
    return found


def loader() -> None:
    """200 batches behind a slow stream: what the device saw equals what was packed."""
    prepare.DATASET = "pysource"
    tokenizer, T = prepare.Tokenizer.from_directory(), prepare.MAX_SEQ_LEN
    busy = torch.randn(4096, 4096, device="cuda")
    seen = []
    for _, (inputs, targets, _) in zip(
        range(200), prepare.make_dataloader(tokenizer, 16, T, "train", "cuda"), strict=False
    ):
        for _ in range(20):
            busy = busy @ busy * 1e-3  # the copy queues behind this
        seen.append((inputs.sum(), targets.sum(), (inputs * targets % 8191).sum()))
    packed = prepare.make_dataloader(tokenizer, 16, T, "train", "cpu")
    wrong = 0
    for sums, (inputs, targets, _) in zip(seen, packed, strict=False):
        wanted = (inputs.sum(), targets.sum(), (inputs * targets % 8191).sum())
        wrong += any(a.item() != b.item() for a, b in zip(sums, wanted, strict=True))
    print(f"\nloader: {wrong} of {len(seen)} batches differ")


def speed() -> None:
    """The constants as they are for 60 s, with a cold and then a warm compile cache."""
    with tempfile.TemporaryDirectory() as cache:
        rows = [
            {"run": name, **run_train(f"speed {name}", 60, {}, cache=cache)}
            for name in ("cold", "warm")
        ]
    for row in rows:
        outside_s = float(row.get("total_seconds", "nan")) - float(row.get("training_seconds", 0))
        row["outside_s"] = round(outside_s, 1)
    columns = ["run", "tokens_per_second", "mfu_percent", "peak_vram_mb", "start_s", "outside_s"]
    show("train.py, 60 s", rows, [*columns, "attention", "num_steps", "val_bpb"])
    step_parts()


def step_parts() -> None:
    """Where a step's time goes, in ms: medians of 10 steps, synchronised after each part."""
    prepare.DATASET = "pysource"
    run = train.Run(train.find_platform())
    train.warm_up(run)
    times: dict[str, list] = {"data": [], "forward": [], "backward": [], "optimizer": []}

    def timed(part, work):
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        result = work()
        torch.cuda.synchronize()
        times[part].append(1e3 * (time.perf_counter() - started_s))
        return result

    for _ in range(10):
        for _ in range(run.micro_batches):
            inputs, targets, _ = timed("data", lambda: next(run.batches))
            loss = timed("forward", lambda i=inputs, t=targets: run.model(i, t))
            timed("backward", loss.backward)
        timed("optimizer", run.optimizer.step)
        run.model.zero_grad(set_to_none=True)

    def whole_step():
        run.take_step(1.0, 0)

    whole = times["whole step"] = []
    for _ in range(10):
        timed("whole step", whole_step)
    row = {part: f"{statistics.median(ms):.2f}" for part, ms in times.items()}
    parts = [statistics.median(times[part]) for part in ("data", "forward", "backward")]
    row["rest of the step"] = f"{statistics.median(whole) - run.micro_batches * sum(parts):.2f}"
    show("a micro-batch's parts, the optimizer and a step, in ms", [row], list(row))
    torch.cuda.empty_cache()


def evaluation() -> None:
    """Seconds for 40 x 524288 tokens, the GPU scale's: pysource's rows over and over."""
    prepare.DATASET = "pysource"
    run = train.Run(train.find_platform())
    train.warm_up(run)
    T = prepare.MAX_SEQ_LEN
    shape = (40 * 524288 // T, T + 1)
    rows = np.resize(prepare.open_prepared().rows(), shape)
    run.model.eval()
    times_s = []
    for _ in range(3):
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        with torch.no_grad():
            prepare.checked_losses(run.model, rows, run.rows, run.config.vocab_size)
        times_s.append(time.perf_counter() - started_s)
    row = {"rows": len(rows), "seconds": f"{statistics.median(times_s):.1f}"}
    show("evaluation", [row], list(row))
    torch.cuda.empty_cache()


def memory() -> None:
    """Less memory: the micro-batch halves by itself, the total batch stays."""
    rows = []
    for gigabytes in (24, 12):
        rows.append({"GB": gigabytes, **run_train(f"memory {gigabytes}", 20, {}, gpu_gb=gigabytes)})
    show(
        "with less memory",
        rows,
        ["GB", "tokens_per_second", "peak_vram_mb", "num_steps", "val_bpb"],
    )


def micro_batches() -> None:
    """Which micro-batch is fastest, in turn, 30 s each, and what it takes."""
    rows = [
        {"change": name, **run_train(f"{name} {n}", 30, changes)}
        for n in range(2)
        for name, changes in MICRO_BATCHES.items()
    ]
    columns = ["change", "tokens_per_second", "mfu_percent", "peak_vram_mb", "val_bpb"]
    show("micro-batches", rows, columns)


def candidates() -> None:
    """Each change against the constants as they are, A B A B, 120 s each."""
    rows = []
    for name, overrides in {
        **CANDIDATES,
        "all": {k: v for c in CANDIDATES.values() for k, v in c.items()},
    }.items():
        pairs = [
            run_train(f"{name} {n} {side}", 120, changes)
            for n in range(2)
            for side, changes in (("A", {}), ("B", overrides))
        ]
        scores = [float(pair.get("val_bpb", "nan")) for pair in pairs]
        rows.append(
            {
                "change": name,
                "A": scores[0::2],
                "B": scores[1::2],
                "B - A": round((sum(scores[1::2]) - sum(scores[0::2])) / 2, 5),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    show("val_bpb after 120 s", rows, ["change", "A", "B", "B - A"])


def main() -> None:
    checks = (rate, suite, attention, loader, speed, evaluation, memory, micro_batches, candidates)
    parts = {part.__name__: part for part in checks}
    chosen = sys.argv[1:] or list(parts)[:-2]
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device here; this is for a machine with one")
    if unknown := set(chosen) - set(parts):
        sys.exit(f"error: no part {', '.join(unknown)}; there are {', '.join(parts)}")
    failed = []
    for name in chosen:
        try:
            parts[name]()
        except Exception:  # the others still run
            traceback.print_exc()
            failed.append(name)
    if failed:
        sys.exit(f"error: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
