"""Training: the clock, warm-up, memory, logs, the summary, and every way in which a run ends."""

import gc
import math
import os
import re
import subprocess
import sys
import weakref
from itertools import chain, repeat
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import prepare
import train
from train import torch_sdpa, warm_up, written_out

CPU = train.Platform(torch.device("cpu"), torch.float32, "test", 0.0, False)
TINY = dict(DEPTH=2, ASPECT_RATIO=8, HEAD_DIM=8, TOTAL_BATCH_SIZE=8 * 32, DEVICE_BATCH_SIZE=4)


@pytest.fixture
def make_run(small, monkeypatch):
    """A run of a tiny model on the CPU in float32, not compiled, with any constants."""
    monkeypatch.setattr(train, "find_platform", lambda: CPU)
    monkeypatch.setattr(train.GPT, "compile", lambda self: None)

    def make(**constants) -> train.Run:
        for name, value in {**TINY, "TRIAL_STEPS": 1, **constants}.items():
            monkeypatch.setattr(train, name, value)
        return train.Run(CPU)

    return make


def weights_of(run: train.Run) -> dict:
    return {name: weight.detach().clone() for name, weight in run.model.named_parameters()}


def assert_same(some: dict, others: dict) -> None:
    assert some.keys() == others.keys()
    for name, tensor in some.items():
        assert torch.equal(tensor, others[name]), name


# --- The clock ---


class World:
    """A host with a clock of its own and a device that takes `step_s` for a step.

    It stands in for a run: `take_step` queues work on the device; reading a loss waits for it.
    """

    def __init__(self, monkeypatch, budget_s, is_cuda, step_s, loss=lambda step: 1.0):
        self.platform, self.step_s, self.loss = SimpleNamespace(is_cuda=is_cuda), step_s, loss
        self.now_s = self.free_s = 100.0
        self.queued_s, self.ended_s, self.progress, self.unread = [], [], [], []
        monkeypatch.setattr(train, "TIME_BUDGET", budget_s)
        monkeypatch.setattr(train, "read_later", lambda loss: self.reader(len(self.ended_s) - 1))
        monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: self.now_s))

    def take_step(self, progress: float) -> tuple[torch.Tensor, int]:
        self.progress.append(progress)
        self.queued_s.append(self.now_s)
        self.free_s = max(self.now_s, self.free_s) + self.step_s
        self.ended_s.append(self.free_s)
        return torch.tensor(1.0), 1

    def reader(self, step: int):
        self.unread.append(step)
        assert len(self.unread) <= 1 + self.platform.is_cuda  # read at most a step late

        def wait() -> float:
            self.unread.remove(step)  # once
            self.now_s = max(self.now_s, self.ended_s[step])
            return self.loss(step)

        return wait


@pytest.mark.parametrize("is_cuda", [False, True])
@pytest.mark.parametrize("step_s", [0.3, 1.0, 3.3, 9.9, 10.0, 25.0])
def test_steps_are_inside_the_clock_and_the_last_overshoots_by_less_than_one(
    is_cuda, step_s, monkeypatch
):
    world = World(monkeypatch, 10, is_cuda, step_s)
    ends_s, _, _ = train.train(world)
    assert ends_s == pytest.approx([0.0, *(end - 100 for end in world.ended_s)])
    assert 10 - 1e-9 <= ends_s[-1] < 10 + step_s and not world.unread
    late = step_s / 10 * is_cuda  # there a step is queued while the one before it still runs
    for n, progress in enumerate(world.progress):
        assert n * step_s / 10 - late - 1e-9 <= progress <= n * step_s / 10 + 1e-9
    if is_cuda:  # no pause between steps, from the second one on
        assert all(q < e for q, e in zip(world.queued_s[2:], world.ended_s[1:], strict=False))


@pytest.mark.parametrize("is_cuda", [False, True])
def test_a_budget_that_ends_between_any_two_looks_at_the_clock_loses_nothing(is_cuda, monkeypatch):
    for looks in range(2, 60):  # after which the clock jumps beyond the budget
        world, later_s = World(monkeypatch, 10, is_cuda, 0.1), chain([0.0] * looks, repeat(10.0))
        now_s = lambda w=world, later_s=later_s: w.now_s + next(later_s)  # noqa: E731
        monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=now_s))
        ends_s, _, _ = train.train(world)
        assert len(ends_s) == 1 + len(world.ended_s) and not world.unread


@pytest.mark.parametrize("is_cuda", [False, True])
@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 100.1])
def test_a_diverging_run_ends_on_that_step_or_the_next(loss, is_cuda, monkeypatch):
    world = World(monkeypatch, 100, is_cuda, 1.0, lambda step: loss if step > 5 else 100.0)
    with pytest.raises(FloatingPointError, match=f"^loss {loss:.4g} at step 7$"):
        train.train(world)
    assert len(world.ended_s) <= 7 + is_cuda


@pytest.mark.parametrize("step_s", [0.05, 0.3, 5.0])
def test_a_log_is_a_few_short_lines(step_s, monkeypatch, capsys):
    world = World(monkeypatch, 300, True, step_s, lambda step: 2.0 if step else 4.0)
    _, train_loss, _ = train.train(world)
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "\r" not in out and max(map(len, lines)) < 100 and 20 <= len(lines) <= 30
    pattern = r"step +\d+ · +\d+% · loss (\d\.\d+) · lr x\d\.\d\d · [\d,]+ tokens/s · epoch 1"
    assert all(re.fullmatch(pattern, line) for line in lines)
    assert f"{train.TOTAL_BATCH_SIZE / step_s:,.0f} tokens/s" in lines[-1]
    # A running mean that begins with the first loss.
    assert train_loss == pytest.approx(2 + 2 * 0.95 ** (len(world.ended_s) - 1))


def test_on_cuda_a_loss_is_copied_without_waiting_and_waited_for_when_read(monkeypatch):
    every, loss = Mock(), Mock(device=torch.device("cuda"))
    every.Event().synchronize.return_value = None
    every.reset_mock()
    monkeypatch.setattr(torch, "empty", every.empty)
    monkeypatch.setattr(torch.cuda, "Event", every.Event)
    read = train.read_later(loss)
    copied = [call.empty((), pin_memory=True), call.empty().copy_(loss, non_blocking=True)]
    assert every.mock_calls == [*copied, call.Event(), call.Event().record()]
    assert read() is every.empty().item() and not loss.mock_calls
    assert every.mock_calls[4:6] == [call.Event().synchronize(), call.empty().item()]


# --- Steps ---


def test_training_lowers_the_loss_and_two_runs_are_bit_identical(make_run):
    results = []
    for seed in ("42", "42", "43"):
        run = make_run(SEED=seed)
        run.build()
        losses = [run.take_step(0.0)[0].item() for _ in range(30)]
        results.append((losses, weights_of(run)))
    (losses, weights), again, other = results
    assert losses[0] == pytest.approx(math.log(400), rel=0.01)  # a fresh model knows nothing
    assert losses[-1] < losses[0] - 0.5
    assert losses == again[0] != other[0]
    assert_same(weights, again[1])


class Calls(TorchDispatchMode):
    """Count torch's calls; refuse those for which a GPU's host waits: values that Python reads."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal.default")
        assert not any(name in str(function) for name in waits), function
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device_and_an_optimizers_takes_under_400_calls(make_run):
    run = make_run(DEPTH=8, ASPECT_RATIO=4, WINDOW_PATTERN="SSSL")  # the GPU scale's kinds
    run.build()
    with Calls() as calls:
        loss, _ = run.take_step(0.7)
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            loss.item()
        run.model(*next(run.batches)[:2]).backward()
        before = calls.count
        for optimizer in run.optimizers:
            optimizer.step()
    assert 100 < calls.count - before < 400


def test_micro_batches_make_up_the_total_and_an_error_names_the_values(make_run):
    for total, rows, wanted in ((256, 100, 8), (256, 2, 2), (32, 4, 1)):
        run = make_run(TOTAL_BATCH_SIZE=total, DEVICE_BATCH_SIZE=rows)
        assert run.rows == wanted and run.micro_batches * wanted * 32 == total
    with pytest.raises(ValueError, match="TOTAL_BATCH_SIZE = 96 is not a multiple .* = 2 x 32; ch"):
        make_run(TOTAL_BATCH_SIZE=96, DEVICE_BATCH_SIZE=2)
    with pytest.raises(ValueError, match="^SEED=abc is not a whole number; set one, or leave it"):
        make_run(SEED="abc")


# --- Warm-up ---


def test_warm_up_leaves_no_trace(make_run, monkeypatch):
    results, norm = [], train.norm
    monkeypatch.setattr(train, "norm", lambda x: norm(x) + 0 * torch.rand(()))  # it draws numbers
    for steps in (0, 3):
        run = make_run(TRIAL_STEPS=steps, WARMDOWN_RATIO=0.0)  # steps at full rate
        warm_up(run)
        fresh, losses = weights_of(run), [run.take_step(n / 5)[0] for n in range(5)]
        inputs, targets, _ = next(run.batches)
        left = {"inputs": inputs, "targets": targets, "random": torch.get_rng_state()}
        left.update((f"loss {n}", loss) for n, loss in enumerate(losses))
        for n, group in enumerate(run.optimizers[1].param_groups):
            left.update({f"first {n}": group["first"], f"second {n}": group["second"]})
        results.append((fresh, weights_of(run), left))
    for without, with_warm_up in zip(*results, strict=True):
        assert_same(without, with_warm_up)
    torch.manual_seed(run.seed)
    assert_same(results[0][0], dict(train.GPT(run.config, written_out).named_parameters()))


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"


def full_over(rows: int, failure: Exception, monkeypatch, in_eval: bool = False) -> None:
    """Memory for this many rows and no more."""
    forward = train.Block.forward

    def limited(self, x, *rest):
        if len(x) > rows and torch.is_grad_enabled() != in_eval:
            raise failure
        return forward(self, x, *rest)

    monkeypatch.setattr(train.Block, "forward", limited)


@pytest.mark.parametrize(
    "rows, fitting, wanted, failure",
    [(8, 3, 2, FULL), (5, 4, 1, FULL), (12, 4, 3, FULL), (8, 1, 1, RuntimeError(CUBLAS))],
)
def test_out_of_memory_halves_the_rows_keeps_the_total_and_lets_go_of_what_failed(
    rows, fitting, wanted, failure, make_run, monkeypatch, capsys
):
    run, held = make_run(DEVICE_BATCH_SIZE=rows, TOTAL_BATCH_SIZE=rows * 32), []
    full_over(fitting, failure, monkeypatch)
    init, reset = train.GPT.__init__, torch.compiler.reset

    def remembered(model, *args):
        init(model, *args)
        held.extend(map(weakref.ref, [model, *model.parameters()]))

    def checked():  # before the next try
        assert held and all(thing() is None for thing in held)
        held.clear()
        reset()

    monkeypatch.setattr(train.GPT, "__init__", remembered)
    monkeypatch.setattr(torch.compiler, "reset", checked)
    warm_up(run)
    assert held and run.rows == wanted and run.micro_batches * wanted == rows
    assert next(run.batches)[0].shape == (wanted, 32)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"out of memory: DEVICE_BATCH_SIZE {wanted}, {rows // wanted} micro-batches"
    assert run.plans[0] == (written_out, True)  # it says nothing about the backend


def test_out_of_memory_in_evaluation_is_found_in_warm_up_and_what_no_try_mends_is_raised(
    make_run, monkeypatch
):
    run = make_run(EVAL_BATCH_SIZE=8)
    full_over(4, FULL, monkeypatch, in_eval=True)
    warm_up(run)
    assert run.eval_rows == 4
    full_over(0, FULL, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):  # not even one row fits
        warm_up(run)


@pytest.mark.parametrize("mistake", [lambda x: None + x, lambda x: x @ x, lambda x: x.view(7)])
def test_a_mistake_in_the_model_ends_with_the_line_that_holds_it(mistake, make_run, monkeypatch):
    make_run()
    monkeypatch.setattr(train, "norm", mistake)
    with pytest.raises((TypeError, RuntimeError)) as failure:
        train.main()
    assert failure.traceback[-1].path == Path(__file__)


# --- Backends: by rule, compiled first ---

REAL_COMPILE = train.GPT.compile


def eagerly_alone(q, k, v, window):
    if torch.compiler.is_compiling():
        raise ImportError("a module that the build lacks\nand more")
    return torch_sdpa(q, k, v, window)


def off_by_one(q, k, v, window):
    return torch_sdpa(q, k, v, window - 1)


def test_what_does_not_compile_whole_gives_way_to_what_does_and_else_all_runs_eagerly(
    make_run, monkeypatch, capsys
):
    compile, norm = torch.compile, train.norm  # layers are only traced
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile(f, **{**kw, "backend": "eager"}))
    monkeypatch.setattr(train.GPT, "compile", REAL_COMPILE)
    backends = [eagerly_alone, off_by_one, torch_sdpa, written_out]
    monkeypatch.setattr(train, "attention_backends", lambda platform: backends)
    run = make_run(SHORT_WINDOW=1 / 2)
    warm_up(run)
    assert run.plans[0] == (torch_sdpa, True)
    one, other = capsys.readouterr().out.splitlines()
    assert one.startswith("not eagerly_alone, compiled: ") and len(one) < 200
    assert other.startswith("not off_by_one, compiled: ArithmeticError: its results are off by")

    def broken(x):
        torch._dynamo.graph_break()
        return norm(x)

    monkeypatch.setattr(train, "norm", broken)
    del backends[:2]
    run = train.Run(CPU)
    warm_up(run)
    torch.compiler.reset()
    assert run.plans == [(torch_sdpa, False), (written_out, False)]
    *refused, last = capsys.readouterr().out.splitlines()
    for name, line in zip(("torch_sdpa", "written_out"), refused, strict=True):
        assert line.startswith(f"not {name}, compiled: Unsupported: ") and len(line) < 200
    assert last == "not compiled, for these reasons, so slower; is g++ or clang installed?"


def test_the_backend_does_not_depend_on_how_long_each_takes(make_run, monkeypatch):
    now_s, backends = [0.0], [lambda *args: slow(*args), torch_sdpa, written_out]

    def slow(*args):
        now_s[0] += 100
        return torch_sdpa(*args)

    for name in ("perf_counter", "monotonic", "time", "process_time"):
        monkeypatch.setattr(train.time, name, lambda: now_s[0])
    monkeypatch.setattr(train, "attention_backends", lambda platform: backends)
    run = make_run()
    warm_up(run)
    assert run.plans == [(attend, way) for way in (True, False) for attend in backends]
    assert run.model.blocks[0].attn.attend is backends[0]


# --- Summary ---

SUMMARY = """val_bpb training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M
num_steps num_params_M depth benchmark device attention seed train_loss epoch tokens_per_second
slow_step_ratio""".split()  # DESIGN.md's, in its order, and how even the steps were


@pytest.mark.parametrize("peak_flops, mfu", [(0.0, "0.00"), (16e9, "8.00")])
def test_summary_figures_are_those_worked_out_by_hand(
    peak_flops, mfu, make_run, capsys, monkeypatch
):
    run = make_run(SEED="7")
    parameters = [torch.ones(50_332_176 // 8)]
    run.model = SimpleNamespace(flops_per_token=lambda: 10**6, parameters=lambda: parameters)
    run.platform = CPU._replace(name="a CPU", peak_flops=peak_flops)
    # 10,000 steps of 256 tokens in 2000 s: 1280 tokens/s, 1.28 GFLOP/s. A tenth takes 0.38 s.
    lengths_s = torch.tensor([0.38] + [0.18] * 9, dtype=torch.float64).repeat(1000)
    train.summarize(run, ([0.0, *lengths_s.cumsum(0).tolist()], 2.34567, 3), 0.99790049, 2025.91)
    separator, *lines = capsys.readouterr().out.splitlines()
    values = dict(line.split(None, 1) for line in lines)
    assert separator == "---" and [name.rstrip(":") for name in values] == SUMMARY
    held = torch.ones(1 << 24)  # 64 MiB
    assert held.nbytes / 2**20 < float(values.pop("peak_vram_mb:")) < 20_000
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 << 30)
    assert train.peak_memory_mb(CPU._replace(is_cuda=True)) == 3072
    assert list(values.values()) == [
        *("0.997900", "2000.0", "2025.9", mfu, "2.6", "10000", "6.3", "2"),
        *(prepare.benchmark_id(prepare.open_prepared()), "a CPU", "written_out", "7"),
        *("2.3457", "3", "1280", "2.11"),
    ]


# --- Whole runs ---


def test_a_run_ends_with_the_summary_of_weights_touched_by_timed_steps_alone(
    make_run, capsys, monkeypatch
):
    """Fresh when the clock starts; when the last step has ended, as they are when scored."""
    seen, real_train, real_evaluate = [], train.train, train.evaluate_bpb
    later = "dump_traceback_later"
    monkeypatch.setattr(train.faulthandler, later, lambda *a, **k: seen.append((a, k)))

    def timed(run):
        seen.append(weights_of(run))
        trained = real_train(run)
        seen.extend([weights_of(run), run])
        return trained

    def scored(model, tokenizer, batch_size):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return real_evaluate(model, tokenizer, batch_size)

    monkeypatch.setattr(train, "train", timed)
    monkeypatch.setattr(train, "evaluate_bpb", scored)
    make_run()
    monkeypatch.setattr(train, "TIME_BUDGET", 0.5)
    train.main()
    gc.unfreeze()
    hung, again, start, end, run, once_more, scored_weights = seen
    # The watch over a hung run begins anew with the clock, and with the evaluation.
    assert hung == again == once_more == ((train.HUNG_AFTER_S,), {"exit": True})
    torch.manual_seed(run.seed)
    assert_same(start, dict(train.GPT(run.config, written_out).named_parameters()))
    assert_same(end, scored_weights)
    assert not torch.equal(start["wte.weight"], end["wte.weight"])
    out = capsys.readouterr().out
    log, _, tail = out.partition("\n---\n")
    assert "training for 0.5 s: 2 x 4 rows a step" in log
    assert "\r" not in out and len(out.encode()) < 8000
    values = dict(re.fullmatch(r"(\w+): +(\S.*)", line).groups() for line in tail.splitlines())
    assert list(values) == SUMMARY and 0 < float(values["val_bpb"]) < 8
    assert 0.5 <= float(values["training_seconds"]) < float(values["total_seconds"])


def run_python(code: str, tmp_path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", f"import os, sys, time\n{code}"]
    env = {**os.environ, "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    streams = dict(capture_output=True, text=True, timeout=120)
    return subprocess.run(command, cwd=Path(train.__file__).parent, env=env, **streams)


def test_a_hung_run_is_ended_and_says_where_it_hung(tmp_path):
    hung = """
import prepare, train
prepare.open_prepared = lambda: None
train.HUNG_AFTER_S = 1
def never_ends(self, platform):
    time.sleep(60)
train.Run.__init__ = never_ends
train.main()
"""
    done = run_python(hung, tmp_path)
    assert done.returncode == 1, done.stderr
    assert "Timeout (0:00:01)!" in done.stderr and "in never_ends" in done.stderr
    assert "device: " in done.stdout and "---" not in done.stdout  # nothing said before is lost


def test_importing_does_nothing(tmp_path):
    """No network, no clock, no file written, no process started, nothing put on a GPU."""
    watched = """
import prepare, torch.optim.adamw
del sys.modules["prepare"]  # but what it imports stays
def refused(*args):
    raise AssertionError("the clock was read")
def watch(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    other = event.startswith(("socket.", "subprocess.", "os.mkdir", "os.rename", "os.remove"))
    if (writes or other) and not ".pyc" in str(args) and not "__pycache__" in str(args):
        raise AssertionError((event, args))
vars(time).update(dict.fromkeys(("time", "perf_counter", "monotonic", "process_time"), refused))
sys.addaudithook(watch)
import train
assert not train.torch.cuda.is_initialized()
print("nothing", flush=True)
os._exit(0)
"""
    done = run_python(watched, tmp_path)
    assert (done.returncode, done.stdout) == (0, "nothing\n"), done.stderr


# --- A train.py of somebody else's ---

BIGRAM_MODEL = """
import torch
import torch.nn.functional as F
from prepare import MAX_SEQ_LEN, TIME_BUDGET, Tokenizer, make_dataloader, evaluate_bpb

class Bigram(torch.nn.Embedding):
    def forward(self, idx, targets=None, reduction="mean"):
        logits = super().forward(idx)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)

tokenizer = Tokenizer.from_directory()
V = tokenizer.get_vocab_size()
model = Bigram(V, V, _weight=torch.zeros(V, V)).to("cuda" if torch.cuda.is_available() else "cpu")
untrained_bpb = evaluate_bpb(model, tokenizer, 16)
loader = make_dataloader(tokenizer, 16, MAX_SEQ_LEN, "train")
optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
for step in range(40):
    x, y, epoch = next(loader)
    assert x.shape == y.shape == (16, MAX_SEQ_LEN) and x.dtype == y.dtype == torch.int64
    model(x, y).backward()
    optimizer.step()
    optimizer.zero_grad()
val_bpb = evaluate_bpb(model, tokenizer, 16)
assert model.training
"""


def test_a_script_for_the_reference_runs_on_this_harness(small):
    names = {}
    exec(BIGRAM_MODEL, names)
    # A uniform model needs log2(400) bits a token.
    assert 1 < math.log2(400) / names["untrained_bpb"] < 8  # bytes a token
    assert names["val_bpb"] < 0.7 * names["untrained_bpb"]
    assert names["epoch"] >= 1 and names["TIME_BUDGET"] == prepare.TIME_BUDGET
