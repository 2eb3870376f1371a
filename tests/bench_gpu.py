"""What an issue report from a machine with a GPU needs: uv run tests/bench_gpu.py [part ...]

Parts: rate, loader, variants and evaluation, which decide, then attention, speed and memory, all in
under ten minutes; by name only suite and candidates (90 minutes). Each case has a process and a
limit of its own. Text is `pysource`: no network needed. Without CUDA sizes are tiny.
"""

import faulthandler
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOG = Path(os.environ.get("OUT") or tempfile.gettempdir(), "bench_gpu.log")
OVERALL_S = 585  # of the parts that run without a name
TINY = dict(DEPTH=2, ASPECT_RATIO=32, HEAD_DIM=32, TOTAL_BATCH_SIZE=1024, DEVICE_BATCH_SIZE=4)
TINY |= dict(EVAL_BATCH_SIZE=4, TIME_BUDGET=2, VOCAB_SIZE=2048, MAX_SEQ_LEN=128, EVAL_TOKENS=8192)


def report(bars: dict | None = None, **figures) -> None:
    """Hand figures to the table; what is True or False is a check; bars hold on a GPU alone."""
    figures |= bars if bars and on_gpu else {}
    print("REPORT " + json.dumps(figures), flush=True)


def seconds(work, *arguments) -> float:
    """How long one call takes, to the end of what it queued."""
    wait = torch.cuda.synchronize if on_gpu else bool
    wait()
    started_s = time.perf_counter()
    work(*arguments)
    wait()
    return time.perf_counter() - started_s


def built():
    """A run that is warmed up."""
    run = train.Run(train.find_platform())
    warm_up_s = seconds(train.warm_up, run)
    report(attention=run.platform.attention, compiled=run.platform.compiles)
    report(rows=run.rows, warm_up_s=round(warm_up_s, 1))
    return run


def rate(case: str) -> None:
    """A large bf16 product on random data, beside the datasheet's."""
    platform, n = train.find_platform(), 8192 if on_gpu else 256
    a, b = (torch.randn(n, n, device=platform.device, dtype=platform.dtype) for _ in range(2))
    times_s = [seconds(lambda: [a @ b for _ in range(5)]) / 5 for _ in range(40)]
    tflops = 2e-12 * n**3 / sorted(times_s[20:])[10]
    datasheet = train.PEAK_TFLOPS.get(platform.name, 0)
    report({"70 %": tflops > 0.7 * datasheet}, tflops=round(tflops, 2), datasheet=datasheet)


def loader(case: str) -> None:
    """Batches behind a slow stream: what the device saw equals what was packed."""
    prepare.open_prepared()
    T, tokenizer = train.MAX_SEQ_LEN, prepare.Tokenizer.from_directory()
    factors = torch.randint(2**40, (2, 16, T), generator=torch.Generator().manual_seed(0))

    def sums(device: str):  # of products that wrap: another token or order gives another sum
        busy, on_device, seen = torch.randn(4096, 4096, device=device), factors.to(device), []
        batches = prepare.make_dataloader(tokenizer, 16, T, "train", device=device)
        for _, (inputs, targets, _) in zip(range(200), batches, strict=False):
            for _ in range(20 * (device == "cuda")):  # the copy queues behind this
                busy @ busy
            seen.append((torch.stack([inputs, targets]) * on_device).sum())
        return torch.stack(seen).cpu()

    report(all_equal=sums("cuda" if on_gpu else "cpu").equal(sums("cpu")))


def variants(case: str) -> None:
    """Ten steps without a clock, then one whose 25 longest kernels the log shows."""
    run = built()
    peak = 1e12 * train.PEAK_TFLOPS.get(run.platform.name, 0)

    def steps(count: int):
        return [run.take_step(0.0, step) for step in range(count)]

    steps(2)
    run.marks.clear()
    step_s = seconds(steps, 10) / 10
    losses = [step.loss for step in steps(1) if step.wait()]
    train.check_finite(losses[0].item(), "step 13")
    train.diagnose(run)  # where the time goes; the table below shows that line
    flops = run.model.flops_per_token() * train.TOTAL_BATCH_SIZE / step_s
    mfu, mb = flops / peak if peak else 0.0, round(train.peak_memory_mb(run.platform))
    report(ms_a_step=round(1e3 * step_s, 1), mfu=round(mfu, 4), peak_mb=mb)
    if case == "as it is":  # estimated: 42.4 % with Flash Attention 3, 24.5 GB
        least = 0.41 if run.platform.attention == "flash_attn_3" else 0.38
        report({f"MFU >= {least:.0%}": mfu >= least, "peak < 28 GB": mb < 28 * 1024})
        activity = getattr(torch.profiler.ProfilerActivity, "CUDA" if on_gpu else "CPU")
        with torch.profiler.profile(activities=[activity]) as seen:
            seconds(steps, 1)
        print(seen.key_averages().table("self_device_time_total", 25, max_name_column_width=100))
        kernels = [e for e in seen.events() if "CPU" not in str(e.device_type) or not on_gpu]
        spans = [e.time_range for e in kernels if not e.is_user_annotation]
        step_us = max(span.end for span in spans) - min(span.start for span in spans)
        report(gpu_busy=round(sum(span.elapsed_us() for span in spans) / step_us, 3))


def evaluation(case: str) -> None:
    """The GPU scale's 40 x 524288 tokens: pysource's rows over and over."""
    run, rows = built(), prepare.open_prepared().rows()
    run.model.eval()
    count = 40 * 524288 // train.MAX_SEQ_LEN if on_gpu else 4 * run.eval_rows + 1
    rows, score = prepare.np.resize(rows, (count, rows.shape[1])), prepare.checked_losses
    work = (torch.no_grad()(score), run.model, rows, run.eval_rows, run.config.vocab_size)
    times_s = [round(seconds(*work), 1) for _ in range(2)]  # first: was anything left to compile?
    report({"<= 6 s": times_s[1] <= 6}, seconds=times_s, mb=train.peak_memory_mb(run.platform))


def attention(case: str) -> None:
    """One backend, forward and backward, against the written-out one in float32."""
    train.ATTENTION = case if on_gpu else "torch_sdpa"
    platform = train.find_platform()._replace(compiles=False)
    train.ATTENTION = ""  # else it is not compared
    torch.set_float32_matmul_precision("highest")
    for T, window in [(256, 1), (256, 127), (2048, 1), (2048, 128), (2048, 1024)][: 2 + 3 * on_gpu]:
        sizes = dict(sequence_len=T, vocab_size=8192, n_layer=2, n_head=4, n_embd=512)
        sizes |= dict(window_pattern="S", short_window=window / T)  # and a window of T
        for kv_heads in (4, 1):
            config = train.GPTConfig(**sizes, n_kv_head=kv_heads, value_embedding_every=2)
            train.check_attention(platform, config)
    report(equal=True)


def training(case: str) -> None:
    """A whole run, whose summary its log keeps; within so many GB, if the case says so."""
    if on_gpu and case.endswith(" GB"):
        share = int(case[:-3]) * 2**30 / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    train.main()


QKV = "qkv.split(self.head_counts, dim=2)"  # and the product, unused then, is not compiled
APART = "[f(x).view(B, T, n, -1) for f, n in zip([self.c_q, self.c_k, self.c_v], self.head_counts)]"
SIGMOID = "(2 * torch.sigmoid(2 / LOGIT_SOFT_CAP * z) - 1)"
VARIANTS = {
    "as it is": {},
    "128 rows": {"DEVICE_BATCH_SIZE": 128},
    "q, k, v apart": {QKV: APART},
    "soft-cap by tanh": {SIGMOID: "torch.tanh(z / LOGIT_SOFT_CAP)"},
    "layer by layer": {"if self.wte.weight.is_cuda:": "if False:"},
}
CANDIDATES = """TOTAL_BATCH_SIZE=2**18; DEPTH=9, ASPECT_RATIO=57; ROTARY_BASE=200000
SHORT_WINDOW=1/8, WINDOW_PATTERN="SSSSL"; EMBEDDING_LR=.9, UNEMBEDDING_LR=.005
SKIP_START=.05, MATRIX_STD=.68; WARMDOWN_RATIO=.75, FINAL_LR_FRAC=.05; MUON_MOMENTUM_STEPS=200"""
PAIRS = {  # what others found better, each A B A B
    f"{side} {changes}": eval(f"dict(TIME_BUDGET=120, {changes if side[0] == 'B' else ''})")
    for changes in re.split("; |\n", CANDIDATES)
    for side in ("A1", "B1", "A2", "B2")
}
PARTS = {  # function, limit in seconds, cases: constants to set in train.py, or code to replace
    "rate": (rate, 60, {"": {}}),
    "loader": (loader, 150, {"": {}}),  # prepares the text where it is not yet
    "variants": (variants, 120, VARIANTS),
    "evaluation": (evaluation, 120, {"": {}}),
    "attention": (attention, 60, {"flash_attn_3": {}, "torch_varlen": {}, "torch_sdpa": {}}),
    "speed": (training, 180, dict.fromkeys(("cold", "warm"), {"TIME_BUDGET": 30})),
    "memory": (training, 200, dict.fromkeys(("24 GB", "12 GB"), {"TIME_BUDGET": 15})),
    "suite": (None, 3000, {"-m gpu": {}, "": {}}),
    "candidates": (training, 400, PAIRS),
}


def run_here(part: str, case: str) -> None:
    """One case, in this process. train.py, which sets the allocator, runs before torch does."""
    global train, prepare, torch, on_gpu
    print(f"=== {part} {case}", flush=True)
    function, limit_s, cases = PARTS[part]
    faulthandler.dump_traceback_later(limit_s - 5)  # where a hung one is; train.py has its own
    constants = {"DATASET": "pysource", "HUNG_AFTER_S": limit_s - 5, **cases[case]}
    sys.path.insert(0, str(ROOT))
    train, path = types.ModuleType("train"), ROOT / "train.py"
    sys.modules["train"], train.__file__, source = train, str(path), path.read_text("utf-8")
    for old in [name for name in constants if not name.isidentifier()]:
        assert source.count(old) == 1, f"train.py does not hold once: {old}"
        source = source.replace(old, constants.pop(old))
    exec(compile(source, path, "exec"), vars(train))
    prepare, torch, on_gpu = train.prepare, train.torch, train.torch.cuda.is_available()
    for name, value in {**constants, **({} if on_gpu else TINY)}.items():
        assert hasattr(train, name) or hasattr(prepare, name), name
        vars(train)[name] = vars(prepare)[name] = value
    report(cuda=torch.version.cuda if on_gpu else None)
    function(case)


def run_case(part: str, case: str, limit_s: float, caches: str) -> str:
    """One case in a process of its own: whether it passed, and its figures."""
    if limit_s < 20:
        return f"{part} {case}: not run, as the ten minutes are over"
    command = [sys.executable, __file__, "--case", part, case]
    if part == "suite":
        command = [sys.executable, *"-m pytest -q --maxfail=20".split(), *case.split()]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # the first of speed is to find no cache
    environment["TORCHINDUCTOR_CACHE_DIR"] = f"{caches}/{part if part == 'speed' else 'others'}"
    LOG.parent.mkdir(parents=True, exist_ok=True)
    with open(LOG, "ab") as file:
        begin = file.tell()
        how = dict(cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            ended = subprocess.run(command, timeout=limit_s, **how).returncode
        except subprocess.TimeoutExpired:
            ended = f"no end after {limit_s:.0f} s"
    text, figures = LOG.read_bytes()[begin:].decode(errors="replace"), {}
    for line in re.findall("^REPORT (.*)$", text, re.M):
        figures |= json.loads(line)
    summary = dict(re.findall(r"^(\w+): +(\S.*)$", text.partition("\n---\n")[2], re.M))
    if summary:
        overhead_s = float(summary["total_seconds"]) - float(summary["training_seconds"])
        figures |= summary | {"overhead_s": round(overhead_s, 1)}
        if case == "warm" and figures["cuda"]:
            figures["overhead <= 18 s"] = overhead_s <= 18
    checks = [name for name, value in figures.items() if value is False]
    checks += [f"ended: {ended}", *text.splitlines()[-1:]] if ended else []
    verdict = "passed" if figures.get("cuda") or part == "suite" else "skipped: needs CUDA"
    verdict = f"FAILED: {'; '.join(checks)[:200]}" if checks else verdict
    shown = [f"{name} {value}" for name, value in figures.items()]
    shown += re.findall(r"^(?:not |no |out of memory|training |time: |device: \w).*$", text, re.M)
    return f"{part} {case}: {verdict}\n    " + " · ".join(shown)


def main() -> None:
    chosen = sys.argv[1:] or list(PARTS)[:-2]
    if chosen[0] == "--case":
        return run_here(*chosen[1:])
    if unknown := set(chosen) - set(PARTS):
        sys.exit(f"error: no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    LOG.unlink(missing_ok=True)
    ends_s = time.monotonic() + (1e9 if sys.argv[1:] else OVERALL_S)
    packages = {d.name: d.version for d in importlib.metadata.distributions()}
    table = [f"{name} {packages.get(name, '-')}" for name in ("torch", "triton", "kernels")]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches:
        for part, case in [(p, c) for p in chosen for c in PARTS[p][2]]:
            limit_s = min(PARTS[part][1], ends_s - time.monotonic())
            table.append(run_case(part, case, limit_s, caches))
            print(table[-1].splitlines()[0], flush=True)
    print("\n" + "\n".join(table) + f"\nlog: {LOG}")
    sys.exit(any("FAILED" in row for row in table))


if __name__ == "__main__":
    main()
