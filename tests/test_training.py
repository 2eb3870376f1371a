"""Training: the clock, warm-up, memory, logs, the summary, and every way in which a run ends."""

import gc
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, call

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import prepare
import train
from prepare import HarnessError
from train import warm_up, written_out

CPU = train.Platform(
    device=torch.device("cpu"),
    name="test",
    dtype=torch.float32,
    compiles=False,
    attention="written_out",
)
CUDA = CPU._replace(device=torch.device("cuda"))
TINY = dict(DEPTH=2, ASPECT_RATIO=8, HEAD_DIM=8, TOTAL_BATCH_SIZE=8 * 32, DEVICE_BATCH_SIZE=4)


@pytest.fixture
def make_run(small, monkeypatch):
    """A run of a tiny model on the CPU in float32, not compiled, with any constants."""
    monkeypatch.setattr(train, "find_platform", lambda: CPU)

    def make(platform=CPU, **constants) -> train.Run:
        for name, value in {**TINY, "TRIAL_PROGRESS": (0.0,), **constants}.items():
            monkeypatch.setattr(train, name, value)
        return train.Run(platform)

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

    It stands in for a run: `take_step` queues work on the device; waiting for a step waits for it.
    """

    def __init__(self, monkeypatch, budget_s, is_cuda, step_s, loss=lambda step: 1.0):
        device = torch.device("cuda" if is_cuda else "cpu")
        self.platform, self.step_s, self.loss = CPU._replace(device=device), step_s, loss
        self.now_s = self.free_s = 100.0
        self.queued_s, self.ended_s, self.progress, self.unread = [], [], [], []
        monkeypatch.setattr(train, "TIME_BUDGET", budget_s)
        monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=lambda: self.now_s))

    def take_step(self, progress: float, step: int):
        assert step == len(self.queued_s)  # of the launched ones
        self.progress.append(progress)
        self.queued_s.append(self.now_s)
        self.free_s = max(self.now_s, self.free_s) + self.step_s
        self.ended_s.append(self.free_s)
        self.unread.append(step)
        assert len(self.unread) <= 2  # read a step late, never more
        if self.platform.device.type == "cpu":  # the host does the work
            self.now_s = self.free_s

        def wait() -> float:
            self.unread.remove(step)  # once
            self.now_s = max(self.now_s, self.ended_s[step])
            return self.ended_s[step]

        loss = torch.tensor(self.loss(step))
        return SimpleNamespace(progress=progress, wait=wait, loss=loss, tokens=256, epoch=1)


@pytest.mark.parametrize("is_cuda", [False, True])
@pytest.mark.parametrize("step_s", [0.3, 1.0, 3.3, 9.9, 10.0, 25.0])
def test_steps_are_inside_the_clock_and_the_last_overshoots_by_less_than_one(
    is_cuda, step_s, monkeypatch
):
    world = World(monkeypatch, 10, is_cuda, step_s)
    trained = train.train(world)
    ends_s = [end - 100 for end in world.ended_s]
    assert trained.steps_s == pytest.approx([step_s] * len(ends_s))
    assert trained.ended_s == pytest.approx(ends_s[-1]) and not world.unread
    assert 10 - 1e-9 <= ends_s[-1] < 10 + step_s
    for n, progress in enumerate(world.progress):
        assert 0 <= progress <= 1 and progress == pytest.approx(n * step_s / 10)
    if is_cuda:  # no pause between steps
        assert all(q < e for q, e in zip(world.queued_s[1:], world.ended_s, strict=False))


@pytest.mark.parametrize("is_cuda", [False, True])
def test_a_budget_that_ends_between_any_two_looks_at_the_clock_loses_nothing(is_cuda, monkeypatch):
    for looks in range(2, 60):  # after which the clock jumps beyond the budget
        world, seen = World(monkeypatch, 10, is_cuda, 0.1), []

        def now_s(world=world, seen=seen, looks=looks):
            seen.append(world.now_s)
            return world.now_s + 10.0 * (len(seen) > looks)

        monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=now_s))
        trained = train.train(world)
        assert len(trained.steps_s) == len(world.ended_s) and not world.unread


@pytest.mark.parametrize("is_cuda", [False, True])
@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 100.1])
def test_a_diverging_run_ends_on_that_step_or_the_next(loss, is_cuda, monkeypatch):
    world = World(monkeypatch, 100, is_cuda, 1.0, lambda step: loss if step > 5 else 100.0)
    with pytest.raises(HarnessError, match=f"^loss {loss:.4g} at step 7$"):
        train.train(world)
    assert len(world.ended_s) <= 8


@pytest.mark.parametrize("step_s", [0.05, 0.3, 5.0])
def test_a_log_is_a_few_short_lines(step_s, monkeypatch, capsys):
    world = World(monkeypatch, 300, True, step_s, lambda step: 2.0 if step else 4.0)
    trained = train.train(world)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert "\r" not in out and max(map(len, lines)) < 100 and 20 <= len(lines) <= 30
    pattern = r"step +\d+ · +\d+% · loss (\d\.\d+) · lr x\d\.\d\d · [\d,]+ tokens/s · epoch 1"
    assert all(re.fullmatch(pattern, line) for line in lines) and not err
    assert f"{256 / step_s:,.0f} tokens/s" in lines[-1]
    # A running mean that begins with the first loss.
    assert trained.loss == pytest.approx(2 + 2 * 0.95 ** (len(world.ended_s) - 1))
    assert trained.tokens == 256 * len(world.ended_s)


def test_a_terminal_shows_loss_speed_and_the_time_left(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    train.train(World(monkeypatch, 10, False, 0.5))
    shown = capsys.readouterr().err
    assert re.search(
        r"100%\|.+\| 00:00 left, loss 1.0000, 512 tokens/s", shown.replace("00:01", "00:00")
    )


def test_on_cuda_a_step_is_waited_for_by_an_event(monkeypatch):
    every = Mock()
    monkeypatch.setattr(torch.cuda, "Event", every.Event)
    run = SimpleNamespace(platform=CUDA, marks=[])
    end = train.Run.end_part(run, "optimizer")
    assert run.marks == [("optimizer", end)]
    assert every.mock_calls == [call.Event(enable_timing=True), call.Event().record()]
    train.Step(0.0, torch.tensor(1.0), 256, 1, end).wait()
    assert every.mock_calls[2:] == [call.Event().synchronize()]


# --- Steps ---


def test_training_lowers_the_loss_and_two_runs_are_bit_identical(make_run):
    results = []
    for seed in ("42", "42", "43"):
        run = make_run(SEED=seed)
        run.start_afresh()
        losses = [run.take_step(0.0, n).loss.item() for n in range(30)]
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
    """Nor does one whose update is measured."""
    run = make_run(DEPTH=8, ASPECT_RATIO=4, WINDOW_PATTERN="SSSL")  # the GPU scale's kinds
    run.start_afresh()
    with Calls() as calls:
        for progress in (0.1, 0.3):
            loss = run.take_step(progress, 7).loss
        with pytest.raises(AssertionError, match="_local_scalar_dense"):
            loss.item()
        run.model(*next(run.batches)[:2]).backward()
        before = calls.count
        for optimizer in run.optimizers:
            optimizer.step()
    assert 100 < calls.count - before < 400 and len(run.figures) == 1


def test_micro_batches_make_up_the_total_and_an_error_names_the_values(make_run):
    for total, rows, wanted in ((256, 100, 8), (256, 2, 2), (32, 4, 1)):
        run = make_run(TOTAL_BATCH_SIZE=total, DEVICE_BATCH_SIZE=rows)
        run.start_afresh()
        assert run.rows == wanted and run.take_step(0.0, 0).tokens == total
    with pytest.raises(
        HarnessError, match="TOTAL_BATCH_SIZE = 96 is not a multiple .* = 2 x 32; c"
    ):
        make_run(TOTAL_BATCH_SIZE=96, DEVICE_BATCH_SIZE=2)
    with pytest.raises(HarnessError, match="N_KV_HEAD = 3 does not divide 2 heads of queries"):
        make_run(TOTAL_BATCH_SIZE=256, N_KV_HEAD=3)
    make_run(N_KV_HEAD=0, SKIP_START=0, RESIDUAL_START=1)  # whole numbers, too
    with pytest.raises(HarnessError, match="^SEED=abc is not a whole number; set one, or leave it"):
        make_run(SEED="abc")


def test_what_an_update_did_is_measured_at_a_few_stages(make_run, capsys):
    run = make_run(DIAGNOSED_AT=(0.5, 0.75))
    run.start_afresh()
    for number, progress in enumerate((0.0, 0.4, 0.5)):
        before = weights_of(run)
        run.take_step(progress, number)
    assert len(run.figures) == 1
    (group,) = [g for g in train.groups_of(run.optimizers) if g["name"] == "matrices"]
    moved = {n: p - before[n] for n, p in run.model.named_parameters() if "c_" in n or "gate" in n}
    assert len(group["params"]) == len(moved)
    norms = [
        sum(t.square().sum() for t in d.values()) ** 0.5
        for d in (moved, {n: before[n] for n in moved})
    ]
    assert run.figures[0]["matrices"][1].item() == pytest.approx(
        (norms[0] / norms[1]).item(), rel=1e-4
    )
    assert run.figures[0]["head"][0] > 0
    run.take_step(1.0, 3)
    ends = (9.0, 10.0, 14.0, 15.0, 15.5, 15.5, 18.0, 19.0)
    parts = 2 * ("rest", "data", "forward and backward", "optimizer")
    run.marks = [*zip(parts, ends, strict=True)]
    train.diagnose(run)
    *groups, times = capsys.readouterr().out.splitlines()
    assert times == "time: forward and backward 65% · optimizer 20% · data 10% · rest 5%"
    number = r"\d\.?\d*(e[-+]\d+)?"
    pattern = rf"group \w+: gradient norm {number} {number} · update / weights {number} {number}"
    assert len(groups) == 5 and all(re.fullmatch(pattern, line) for line in groups), groups


# --- Warm-up ---


def test_warm_up_leaves_no_trace(make_run, monkeypatch):
    results, norm = [], train.norm
    monkeypatch.setattr(train, "norm", lambda x: norm(x) + 0 * torch.rand(()))  # it draws numbers
    for trials in ((), (0.0, 0.5, 1.0)):
        run = make_run(TRIAL_PROGRESS=trials, WARMDOWN_RATIO=0.0)  # steps at full rate
        warm_up(run)
        fresh, losses = weights_of(run), [run.take_step(n / 5, n).loss for n in range(5)]
        inputs, targets, _ = next(run.batches)
        left = {"inputs": inputs, "targets": targets, "random": torch.get_rng_state()}
        left.update((f"loss {n}", loss) for n, loss in enumerate(losses))
        (muon,) = [o for o in run.optimizers if isinstance(o, train.Muon)]
        for n, state in enumerate(muon.state.values()):
            left.update({f"average {n}": state["average"], f"squares {n}": state["squares"]})
        results.append((fresh, weights_of(run), left))
    for without, with_warm_up in zip(*results, strict=True):
        assert_same(without, with_warm_up)
    torch.manual_seed(int(train.SEED))
    assert_same(results[0][0], dict(train.GPT(run.config, written_out).named_parameters()))


def test_warm_up_steps_at_the_beginning_the_middle_and_the_end_of_progress(make_run, monkeypatch):
    """So that what a schedule switches on later is compiled before the clock starts."""
    seen, real = [], train.apply_schedules

    def schedules(optimizers, progress, step):
        seen.append((progress, step))
        real(optimizers, progress, step)

    monkeypatch.setattr(train, "apply_schedules", schedules)
    default = train.TRIAL_PROGRESS
    run = make_run(TRIAL_PROGRESS=default)
    warm_up(run)
    assert seen == [(0.0, 0), (0.5, 1), (1.0, 2)]
    assert run.step_s > 0


def test_a_model_that_the_evaluation_would_refuse_is_refused_before_the_clock(
    make_run, monkeypatch, capsys
):
    make_run()
    forward = train.Head.forward

    def sees_the_future(self, x, *rest):
        return forward(self, x + x.roll(-1, dims=1), *rest)

    monkeypatch.setattr(train.Head, "forward", sees_the_future)
    monkeypatch.setattr(train.faulthandler, "dump_traceback_later", lambda *a, **k: None)
    monkeypatch.setattr(train, "train", lambda run: pytest.fail("the clock has started"))
    with pytest.raises(SystemExit, match="^error: row .* gave a loss that depends on later"):
        train.main()


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
CUBLAS = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def full_over(rows: int, failure: Exception, monkeypatch, in_eval: bool = False) -> None:
    """Memory for this many rows and no more, in training or in the evaluation."""
    forward = train.Block.forward

    def limited(self, x, *rest):
        if len(x) > rows and torch.is_grad_enabled() != in_eval:
            raise failure
        return forward(self, x, *rest)

    monkeypatch.setattr(train.Block, "forward", limited)


@pytest.mark.parametrize(
    "rows, fitting, wanted, failure",
    [(8, 3, 2, FULL), (5, 4, 1, FULL), (12, 4, 3, FULL), (8, 1, 1, CUBLAS)],
)
def test_out_of_memory_halves_the_rows_of_training_alone_and_keeps_the_total(
    rows, fitting, wanted, failure, make_run, monkeypatch, capsys
):
    run = make_run(DEVICE_BATCH_SIZE=rows, TOTAL_BATCH_SIZE=rows * 32, EVAL_BATCH_SIZE=8)
    full_over(fitting, failure, monkeypatch)
    warm_up(run)
    assert (run.rows, run.eval_rows) == (wanted, 8)  # before: both were halved
    assert run.take_step(0.0, 0).tokens == rows * 32
    assert next(run.batches)[0].shape == (wanted, 32)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"out of memory: going on with DEVICE_BATCH_SIZE = {wanted}"


def test_out_of_memory_in_the_evaluation_halves_its_rows_alone(make_run, monkeypatch, capsys):
    run = make_run(EVAL_BATCH_SIZE=8)
    full_over(3, FULL, monkeypatch, in_eval=True)
    warm_up(run)
    assert (run.rows, run.eval_rows) == (4, 2)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"out of memory: going on with EVAL_BATCH_SIZE = {n}" for n in (4, 2)]


def test_memory_that_did_not_fit_in_warm_up_is_not_in_the_runs_peak(make_run, monkeypatch):
    run = make_run()
    monkeypatch.setattr(train.Run, "take_step", lambda *a: Mock(loss=torch.tensor(1.0), wait=float))
    monkeypatch.setattr(prepare, "check_model", lambda *a: None)
    run.platform, resets = CUDA, []
    monkeypatch.setattr(run, "start_afresh", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: resets.append(1))
    warm_up(run)
    assert resets == [1]


def test_what_failed_holds_no_memory_when_fewer_rows_are_tried(monkeypatch):
    held, lines = [], []
    monkeypatch.setattr(prepare, "say", lines.append)

    def attempt(rows):
        activations = torch.ones(rows)
        held.append(activations.untyped_storage()._weak_ref())
        if len(held) > 1:
            assert not torch.UntypedStorage._new_with_weak_ptr(held[-2])
        if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    prepare.halve_until_it_fits(attempt, 8, "ROWS")
    assert [line[-8:] for line in lines] == ["ROWS = 4", "ROWS = 2"]


DEAD = torch.AcceleratorError("CUDA error: an illegal memory access was encountered, out of memory")


@pytest.mark.parametrize("failure", [FULL, ValueError("too many values to unpack"), DEAD])
def test_any_other_failure_of_the_model_is_raised_as_it_is_at_once(
    failure, make_run, monkeypatch, capsys
):
    """Out of memory with one row; an agent's mistake; a device on which nothing works any more."""
    run = make_run()
    tried, limit = [], 4
    if failure is FULL:
        limit = 0
    full_over(limit if failure is FULL else 0, failure, monkeypatch)
    start = run.start_afresh
    monkeypatch.setattr(run, "start_afresh", lambda: tried.append(start()))
    with pytest.raises(type(failure)) as raised:
        warm_up(run)
    assert raised.value is failure
    assert len(tried) == (3 if failure is FULL else 1)  # 4, 2 and 1 rows; else no second time


@pytest.mark.parametrize(
    "mistake",
    [
        *(lambda x: None + x, lambda x: x @ x, lambda x: x.view(7), lambda x: 1 / (0 * len(x))),
        *(lambda x: next(iter(())), lambda x: open("/nowhere/to be found"), lambda x: int("x")),
    ],
)
def test_a_mistake_in_the_model_ends_with_the_line_that_holds_it(mistake, make_run, monkeypatch):
    """Before, a ValueError, an OSError, a ZeroDivisionError ended in a line without its place."""
    make_run()
    monkeypatch.setattr(train, "norm", mistake)
    with pytest.raises(Exception) as failure:  # noqa: B017
        train.main()
    assert not isinstance(failure.value, SystemExit | HarnessError)
    assert failure.traceback[-1].path == Path(__file__)


# --- Compiled: traced whole, all of it before the clock ---

COMPILED = CPU._replace(compiles=True)


@pytest.fixture
def only_traced(monkeypatch):
    """torch.compile that runs the graphs as they are; gives how many frames it has traced."""
    compile, graphs = torch.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile(f, **{**kw, "backend": backend}))
    yield graphs
    torch.compiler.reset()


def test_nothing_is_compiled_inside_the_clock_or_the_evaluation(make_run, only_traced, monkeypatch):
    run = make_run(COMPILED, DEPTH=4, EVAL_BATCH_SIZE=4, WINDOW_PATTERN="SL")
    warm_up(run)
    compiled = len(only_traced)
    assert compiled == 2 + 2  # two windows, for training and evaluation alike; the head for each
    monkeypatch.setattr(train, "TIME_BUDGET", 0.5)
    train.train(run)
    prepare.evaluate_bpb(run.model, run.tokenizer, run.eval_rows)
    assert len(only_traced) == compiled


def test_an_edit_that_cannot_be_traced_whole_is_an_error(make_run, only_traced, monkeypatch):
    """Before, it ran eagerly, at a third of the speed, and the summary did not say so."""
    norm = train.norm

    def broken(x):
        torch._dynamo.graph_break()
        return norm(x)

    run = make_run(COMPILED)
    monkeypatch.setattr(train, "norm", broken)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        warm_up(run)


def test_the_backend_does_not_depend_on_how_long_each_takes(monkeypatch):
    now_s = [0.0]

    def slow():
        now_s[0] += 100
        return now_s[0]

    for name in ("perf_counter", "monotonic", "time", "process_time"):
        monkeypatch.setattr(train.time, name, slow)
    assert train.choose_attention(torch.device("cpu"), torch.float32) == "written_out"


# --- Summary ---

SUMMARY = """val_bpb training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M
num_steps num_params_M depth benchmark scale device attention compiled seed train_loss epoch
tokens_per_second slow_share""".split()  # DESIGN.md's, in its order


@pytest.mark.parametrize("peaks, mfu", [({}, "0.00"), ({"a CPU": 0.016}, "8.00")])
def test_summary_figures_are_those_worked_out_by_hand(peaks, mfu, make_run, capsys, monkeypatch):
    run = make_run(SEED="7", SCALE="gpu")
    parameters = [torch.ones(50_332_176 // 8)]
    run.model = SimpleNamespace(flops_per_token=lambda: 10**6, parameters=lambda: parameters)
    run.platform = COMPILED._replace(name="a CPU")
    monkeypatch.setattr(train, "PEAK_TFLOPS", peaks)
    # 10,000 steps of 256 tokens in 2000 s: 1280 tokens/s, 1.28 GFLOP/s. One in 20 takes over twice
    # 0.18 s, 0.58 s: 290 s of 2000.
    steps_s = ([0.58] + [0.18] * 19) * 500
    trained = SimpleNamespace(steps_s=steps_s, ended_s=sum(steps_s), tokens=2_560_000)
    trained.loss, trained.epoch = 2.34567, 3
    train.summarize(run, trained, 0.99790049, 2025.91)
    separator, *lines = capsys.readouterr().out.splitlines()
    values = dict(line.split(None, 1) for line in lines)
    assert separator == "---" and [name.rstrip(":") for name in values] == SUMMARY
    held = torch.ones(1 << 24)  # 64 MiB
    assert held.nbytes / 2**20 < float(values.pop("peak_vram_mb:")) < 20_000
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 << 30)
    assert train.peak_memory_mb(CUDA) == 3072
    assert list(values.values()) == [
        *("0.997900", "2000.0", "2025.9", mfu, "2.6", "10000", "6.3", "2"),
        *(prepare.benchmark_id(prepare.open_prepared()), "gpu", "a CPU", "written_out", "yes", "7"),
        *("2.3457", "3", "1280", "0.14"),
    ]


@pytest.mark.parametrize("scale, column", [("gpu", "first"), ("small", "second")])
def test_a_line_before_the_clock_says_what_was_built_and_which_column_is_read(
    scale, column, make_run, capsys
):
    run = make_run(SCALE=scale)
    run.start_afresh()
    train.describe(run)
    built, *groups, last = capsys.readouterr().out.splitlines()
    assert built.startswith(
        f"scale {scale}, the {column} column: 2 layers, width 16, 2 heads, 0.0 M"
    )
    assert len(groups) == 5 and "group matrices: 14 tensors, muon, rate 0.0" in "\n".join(groups)
    assert last == "training for 2 s, 4 rows of 32 tokens at a time"


# --- Whole runs ---


def test_a_run_ends_with_the_summary_of_weights_touched_by_timed_steps_alone(
    make_run, capsys, monkeypatch
):
    """Fresh when the clock starts; when the last step has ended, as they are when scored."""
    seen, real_train, real_evaluate = [], train.train, prepare.evaluate_bpb
    later = "dump_traceback_later"
    monkeypatch.setattr(train.faulthandler, later, lambda *a, **k: seen.append((a, k)))

    def timed(run):
        seen.append(weights_of(run))
        trained = real_train(run)
        seen.extend([weights_of(run), run, trained])
        return trained

    def scored(model, tokenizer, batch_size):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return real_evaluate(model, tokenizer, batch_size)

    monkeypatch.setattr(train, "train", timed)
    monkeypatch.setattr(prepare, "evaluate_bpb", scored)
    make_run()
    monkeypatch.setattr(train, "TIME_BUDGET", 0.5)
    train.main()
    gc.unfreeze()
    *watches, start, end, run, trained, once_more, scored_weights = seen
    # The watch over a hung run begins anew with the clock, and with the evaluation.
    assert watches == 2 * [((train.HUNG_AFTER_S,), {"exit": True})]
    evaluation_s = 64 * 32 * trained.ended_s / trained.tokens  # as slow as training
    assert once_more == ((train.HUNG_AFTER_S + evaluation_s,), {"exit": True})
    torch.manual_seed(int(train.SEED))
    assert_same(start, dict(train.GPT(run.config, written_out).named_parameters()))
    assert_same(end, scored_weights)
    assert not torch.equal(start["wte.weight"], end["wte.weight"])
    out = capsys.readouterr().out
    log, _, tail = out.partition("\n---\n")
    assert "group matrices: gradient norm" in log and "time: forward and backward" in log
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
train.can_compile = lambda device, dtype: False
train.main()
"""
    done = run_python(hung, tmp_path)
    assert done.returncode == 1, done.stderr
    assert "Timeout (0:00:01)!" in done.stderr and "in never_ends" in done.stderr
    assert "device: " in done.stdout and "---" not in done.stdout  # nothing said before is lost


def test_imports_count_in_wall_time(tmp_path):
    """A second of waiting for an import, which takes no time of the processor, counts."""
    slow = """
class Waits:
    def find_spec(self, name, path=None, target=None):
        if name == "tqdm":
            sys.meta_path.remove(self)
            time.sleep(1)
sys.meta_path.insert(0, Waits())
source, begun = open("train.py").read(), "    sys.stdout.reconfigure"
assert source.count(begun) == 1
source = source.replace(begun, "    return print(time.perf_counter() - started_s)\\n" + begun)
exec(compile(source, "train.py", "exec"), {"__name__": "__main__"})
"""
    done = run_python(slow, tmp_path)
    assert float(done.stdout) > 1, done.stderr


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
