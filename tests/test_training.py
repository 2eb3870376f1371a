"""Training: the clock, warm-up, memory, logs, the summary, and every way in which a run ends."""

import gc
import math
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch

import prepare
import train

ROOT = Path(train.__file__).parent
CPU = train.Platform(torch.device("cpu"), torch.float32, "test", 0.0)
TINY = dict(
    DEPTH=2,
    ASPECT_RATIO=8,
    HEAD_DIM=8,
    TOTAL_BATCH_SIZE=8 * 32,
    DEVICE_BATCH_SIZE=4,
    LOSS_SLICE=50,
    WARMUP_STEPS=0,
    GUESS_ORDERS=(2, 4),
    TRAINED_SHARE=0.5,
)


@pytest.fixture
def make_run(small, monkeypatch):
    """A run of a tiny model on the CPU in float32, not compiled, with any constants."""
    monkeypatch.setattr(train.GPT, "compile", lambda self: None)
    monkeypatch.setattr(train, "attention_candidates", lambda platform: [train.written_out])
    monkeypatch.setattr(train, "find_platform", lambda: CPU)

    def make(**constants) -> train.Run:
        for name, value in {**TINY, **constants}.items():
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

    It stands in for a run: `take_step` queues work on the device and, without CUDA, waits for it.
    """

    def __init__(self, monkeypatch, is_cuda: bool, lengths_s, losses=None):
        self.platform = SimpleNamespace(is_cuda=is_cuda)
        self.lengths_s = lengths_s if callable(lengths_s) else lambda step: lengths_s
        self.losses = losses or (lambda step: 1.0)
        self.now_s, self.device_free_s = 100.0, 0.0
        self.started_s, self.ended_s, self.progress, self.numbers = [], [], [], []
        monkeypatch.setattr(train, "read_later", self.read_later)

    def now(self) -> float:
        return self.now_s

    def take_step(self, progress: float, step: int) -> tuple[torch.Tensor, int]:
        self.progress.append(progress)
        self.numbers.append(step)
        self.started_s.append(max(self.now_s, self.device_free_s))
        self.device_free_s = self.started_s[-1] + self.lengths_s(len(self.started_s) - 1)
        self.ended_s.append(self.device_free_s)
        return torch.tensor(self.losses(len(self.started_s) - 1)), 1

    def read_later(self, loss: torch.Tensor):
        ended_s = self.device_free_s

        def wait() -> float:
            self.now_s = max(self.now_s, ended_s)
            return loss.item()

        if not self.platform.is_cuda:
            wait()
        return wait

    def train(self, budget_s: float) -> train.Clock:
        self.clock = train.Clock(budget_s, now=self.now)
        self.log = train.train(self, self.clock)
        return self.clock


@pytest.mark.parametrize("is_cuda", [False, True])
@pytest.mark.parametrize("step_s", [0.3, 0.7, 1.0, 3.3, 9.9, 10.0, 25.0])
def test_all_steps_are_inside_the_clock_and_the_last_overshoots_by_less_than_one(
    is_cuda, step_s, monkeypatch
):
    world = World(monkeypatch, is_cuda, step_s)
    clock = world.train(budget_s=10)
    assert world.started_s[0] >= clock.started_s == 100
    # Whoever reads the clock now reads a time after the last step's end, less than one step late.
    assert clock.used_s == pytest.approx(world.ended_s[-1] - 100)
    assert 10 - 1e-9 <= clock.used_s < 10 + step_s
    assert clock.step == len(world.started_s) == math.ceil(10 / step_s - 1e-9)
    assert world.numbers == list(range(clock.step))


@pytest.mark.parametrize("is_cuda", [False, True])
def test_progress_is_the_share_of_the_budget_at_each_steps_start(is_cuda, monkeypatch):
    world = World(monkeypatch, is_cuda, 0.5)
    world.train(budget_s=10)
    assert world.progress[0] == 0 and world.progress == sorted(world.progress)
    late = 0.05 * is_cuda  # there a step is queued while the one before it still runs
    for n, progress in enumerate(world.progress):
        assert n / 20 - late - 1e-9 <= progress <= n / 20 + 1e-9


@pytest.mark.parametrize("is_cuda", [False, True])
def test_steps_of_uneven_length_end_the_run_in_time(is_cuda, monkeypatch):
    lengths_s = [0.5, 1.5, 1.0, 0.7] * 20
    world = World(monkeypatch, is_cuda, lambda step: lengths_s[step])
    clock = world.train(budget_s=20)
    # With CUDA, the step that still runs is taken to be as long as the one before it.
    assert 18 < clock.used_s < 20 + max(lengths_s) * (1 + is_cuda)


def test_cuda_works_without_pause_between_steps(monkeypatch):
    """Step n + 1 is queued before step n has ended, from the second step on."""
    world = World(monkeypatch, True, 1.0)
    queued_s = []
    take_step = world.take_step
    monkeypatch.setattr(
        world, "take_step", lambda *a: (queued_s.append(world.now_s), take_step(*a))[1]
    )
    world.train(budget_s=10)
    ends_s = world.ended_s
    assert all(queued < end for queued, end in zip(queued_s[2:], ends_s[1:], strict=False))


@pytest.mark.parametrize("is_cuda", [False, True])
@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 1000.0])
def test_a_diverging_run_ends_on_that_step_or_the_next(loss, is_cuda, monkeypatch):
    world = World(monkeypatch, is_cuda, 1.0, lambda step: loss if step >= 6 else 2.0)
    with pytest.raises(train.Diverged, match=f"^loss {loss:.4g} at step 7$"):
        world.train(budget_s=100)
    assert len(world.started_s) <= 7 + is_cuda


def test_a_loss_up_to_the_limit_goes_on():
    train.check_finite(train.MAX_LOSS, 1)
    train.check_finite(0.0, 1)


# --- Steps ---


def test_four_micro_batches_give_the_gradients_of_one_of_four_times_the_rows(make_run):
    results = []
    for rows in (2, 8):
        run = make_run(DEVICE_BATCH_SIZE=rows)
        for weight in run.model.parameters():
            weight.data += 0.1  # the output projections start at zero, and stop gradients
        assert run.micro_batches == 8 // rows
        loss, epoch = train.accumulate_gradients(run.model, run.batches, run.micro_batches)
        results.append((loss, {n: p.grad for n, p in run.model.named_parameters()}))
        assert epoch == 1
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_training_lowers_the_loss(make_run):
    run = make_run()
    losses = [run.take_step(0.0, step)[0].item() for step in range(30)]
    assert losses[0] == pytest.approx(math.log(400), rel=0.01)  # a fresh model knows nothing
    assert losses[-1] < losses[0] - 1


def test_two_runs_are_bit_identical(make_run):
    runs = [make_run(), make_run()]
    losses = [[run.take_step(0.0, n)[0].item() for n in range(3)] for run in runs]
    assert losses[0] == losses[1]
    assert_same(*map(weights_of, runs))


def test_another_seed_gives_another_run(make_run):
    first = weights_of(make_run(SEED=42))
    assert not torch.equal(first["wte.weight"], weights_of(make_run(SEED=43))["wte.weight"])


@pytest.mark.parametrize(
    "total, rows, wanted",
    [(8 * 32, 4, 4), (8 * 32, 100, 8), (32, 4, 1), (96, 2, None), (100, 4, None)],
)
def test_micro_batches_make_up_the_total_batch_or_the_error_names_the_values(
    total, rows, wanted, small
):
    if wanted:
        assert train.rows_that_divide(total, rows) == wanted
        return
    with pytest.raises(ValueError, match=f"TOTAL_BATCH_SIZE = {total} is not a multiple") as error:
        train.rows_that_divide(total, rows)
    tried = min(rows, max(1, total // 32))
    assert f"DEVICE_BATCH_SIZE x MAX_SEQ_LEN = {tried} x 32; change" in str(error.value)


# --- Warm-up ---


def test_warm_up_leaves_no_trace(make_run):
    results = []
    for warm_up_steps in (0, 3):
        run = make_run(WARMUP_STEPS=warm_up_steps, WARMDOWN_RATIO=0.0)  # steps at full rate
        torch.rand(warm_up_steps)  # a model may draw numbers
        train.warm_up(run)
        fresh = weights_of(run)
        for step in range(5):
            run.take_step(step / 5, step)
        state = {
            f"{n} {name} {i}": tensor.clone()
            for n, group in enumerate(run.optimizer.param_groups)
            for name in ("weights", "first", "second", "steps")
            for i, tensor in enumerate(group.get(name, []))
        }
        inputs, targets, _ = next(run.batches)
        loader = {"inputs": inputs, "targets": targets, "random": torch.get_rng_state()}
        results.append((fresh, weights_of(run), state, loader))
    for without, with_warm_up in zip(*results, strict=True):
        assert_same(without, with_warm_up)


def out_of_memory_over(run: train.Run, rows: int, monkeypatch) -> None:
    take_step = run.take_step

    def limited(*args):
        if run.rows > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return take_step(*args)

    monkeypatch.setattr(run, "take_step", limited)


@pytest.mark.parametrize("fitting, wanted", [(4, 4), (3, 2), (1, 1)])
def test_out_of_memory_halves_the_rows_and_keeps_the_total(
    fitting, wanted, make_run, monkeypatch, capsys
):
    run = make_run(DEVICE_BATCH_SIZE=8, WARMUP_STEPS=2)
    wanted_weights = weights_of(run)
    capsys.readouterr()
    out_of_memory_over(run, fitting, monkeypatch)
    train.warm_up(run)
    halvings = [8 // 2**n for n in range(1, 4) if 8 // 2**n >= wanted]
    assert capsys.readouterr().out.splitlines() == [
        f"out of memory: DEVICE_BATCH_SIZE {rows}, {8 // rows} micro-batches" for rows in halvings
    ]
    assert run.rows == wanted and run.rows * run.micro_batches * 32 == train.TOTAL_BATCH_SIZE
    assert next(run.batches)[0].shape == (wanted, 32)
    assert_same(weights_of(run), wanted_weights)


def test_what_a_failed_step_left_is_let_go_before_memory_is_given_back(make_run, monkeypatch):
    run = make_run(DEVICE_BATCH_SIZE=8, WARMUP_STEPS=1)
    out_of_memory_over(run, 4, monkeypatch)
    run.take_step, limited = type(run).take_step.__get__(run), run.take_step
    run.take_step(0.0, 0)
    train.accumulate_gradients(run.model, run.batches, 1)  # a step that was cut off
    monkeypatch.setattr(run, "take_step", limited)
    held = []

    def collect():
        held.append([run.optimizer, *(p.grad for p in run.model.parameters())])

    monkeypatch.setattr(train.gc, "collect", collect)
    train.warm_up(run)
    assert held and all(thing is None for thing in held[0])


@pytest.mark.parametrize("rows", [5, 6, 7, 12, 25])
def test_an_odd_number_of_rows_keeps_the_total_too(rows, make_run, monkeypatch):
    run = make_run(DEVICE_BATCH_SIZE=rows, TOTAL_BATCH_SIZE=rows * 32, WARMUP_STEPS=1)
    out_of_memory_over(run, rows - 1, monkeypatch)
    train.warm_up(run)
    assert run.rows < rows and run.rows * run.micro_batches == rows


def test_out_of_memory_in_evaluation_is_found_in_warm_up(make_run):
    run = make_run(DEVICE_BATCH_SIZE=8, WARMUP_STEPS=1)
    trunk = run.model.trunk

    def limited(idx):
        if len(idx) > 4 and not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return trunk(idx)

    run.model.trunk = limited
    train.warm_up(run)
    assert run.rows == 4


def test_not_even_one_row_fits(make_run, monkeypatch):
    run = make_run(WARMUP_STEPS=1)
    out_of_memory_over(run, 0, monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        train.warm_up(run)


@pytest.mark.parametrize(
    "failure, said",
    [
        (RuntimeError("\nno g++\nlong text"), "RuntimeError: no g++)"),
        (AssertionError(), "AssertionError"),
        (ImportError("x" * 1000), "ImportError: xxx"),
    ],
    ids=["compiler", "silent", "long"],
)
def test_a_model_that_does_not_compile_runs_eagerly(failure, said, make_run, capsys):
    run = make_run(WARMUP_STEPS=1)
    wanted = run.take_step(0.0, 0)[0]
    run.start_afresh()

    def broken(*args):
        raise failure

    run.model.trunk = run.model.loss_of_slice = broken
    capsys.readouterr()
    train.warm_up(run)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"not compiled, so slower ({said}") and len(line) < 250
    assert "install g++ or clang" in line
    assert run.rows == 4 and torch.equal(run.take_step(0.0, 0)[0], wanted)


def test_a_mistake_in_the_model_is_not_taken_for_a_compilers(make_run, monkeypatch):
    run = make_run(WARMUP_STEPS=1)

    def mistake(x):
        raise TypeError("a slip of the agent's")

    monkeypatch.setattr(train, "norm", mistake)
    with pytest.raises(TypeError, match="slip"):
        train.warm_up(run)


def test_a_model_that_is_nan_from_the_start_ends_in_warm_up(make_run, monkeypatch):
    monkeypatch.setattr(train, "EMBEDDING_STD", math.nan)
    run = make_run(WARMUP_STEPS=1)
    with pytest.raises(train.Diverged, match="loss nan at step 0"):
        train.warm_up(run)


# --- Logs ---


@pytest.mark.parametrize("step_s", [0.05, 0.3, 5.0])
def test_a_log_is_a_few_short_lines(step_s, monkeypatch, capsys):
    World(monkeypatch, True, step_s).train(budget_s=300)
    out = capsys.readouterr().out
    assert "\r" not in out and out.endswith("\n")
    assert len(out.encode()) < 5000 and max(map(len, out.splitlines())) < 100
    assert 20 <= out.count("\n") <= 30
    first, last = out.splitlines()[0], out.splitlines()[-1]
    pattern = r"step +\d+ · +\d+% · loss \d+\.\d+ · lr x\d\.\d\d · [\d,]+ tokens/s · epoch 1"
    assert re.fullmatch(pattern, first) and re.fullmatch(pattern, last)


@pytest.mark.parametrize("diverges", [False, True])
def test_a_terminal_has_one_line_that_renews_itself(diverges, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    losses = (lambda step: math.nan if step > 50 else 1.0) if diverges else None
    world = World(monkeypatch, True, lambda step: 0.3 - 0.001 * (step > 90), losses)
    try:
        world.train(budget_s=30)
    except train.Diverged:
        assert diverges
    out = capsys.readouterr().out
    assert out.count("\r") > 40 and out.count("\n") < 35
    assert out.endswith("\n")  # so that what comes next has a line of its own


def test_train_loss_is_a_running_mean(monkeypatch, capsys):
    world = World(monkeypatch, False, 1.0, lambda step: [4.0, 2.0, 2.0][min(step, 2)])
    world.train(budget_s=3)
    assert world.log.train_loss == pytest.approx(2 + 2 * 0.95**2)


# --- Summary ---

SUMMARY = (  # DESIGN.md's, in its order
    "val_bpb training_seconds total_seconds peak_vram_mb mfu_percent total_tokens_M num_steps "
    "num_params_M depth benchmark device attention seed train_loss epoch tokens_per_second"
).split()


def test_peak_memory_is_the_process_without_cuda():
    held = torch.ones(1 << 24)  # 64 MiB
    peak_mb = train.peak_memory_mb(CPU)
    assert held.numel() * 4 / 2**20 < peak_mb < 20_000
    if sys.platform == "linux":
        (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
        assert peak_mb == pytest.approx(int(line.split()[1]) / 1024, rel=0.2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 0


def test_peak_memory_is_the_gpus_with_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 << 30)
    assert train.peak_memory_mb(SimpleNamespace(is_cuda=True)) == 3072


@pytest.mark.parametrize("peak_flops, mfu", [(0.0, "0.00"), (16e9, "8.00")])
def test_summary_figures_are_those_worked_out_by_hand(peak_flops, mfu, small, monkeypatch):
    for name, value in TINY.items():
        monkeypatch.setattr(train, name, value)
    run = SimpleNamespace(
        model=SimpleNamespace(
            flops_per_token=lambda: 1_000_000, parameters=lambda: [torch.ones(50_332_176 // 8)]
        ),
        platform=train.Platform(torch.device("cpu"), torch.float32, "a CPU", peak_flops),
        attention="written_out",
    )
    clock = SimpleNamespace(step=10_000)  # of 256 tokens, in 2000 s: 1280 tokens/s, 1.28 GFLOP/s
    log = SimpleNamespace(train_loss=2.34567, epoch=3)
    lines = train.summary(run, clock, log, val_bpb=0.99790049, training_s=2000.04, total_s=2025.91)
    assert list(lines) == SUMMARY
    assert float(lines.pop("peak_vram_mb")) > 0
    assert lines == {
        "val_bpb": "0.997900",
        "training_seconds": "2000.0",
        "total_seconds": "2025.9",
        "mfu_percent": mfu,
        "total_tokens_M": "2.6",
        "num_steps": "10000",
        "num_params_M": "6.3",
        "depth": "2",
        "benchmark": prepare.benchmark_id(prepare.open_prepared()),
        "device": "a CPU",
        "attention": "written_out",
        "seed": str(train.SEED),
        "train_loss": "2.3457",
        "epoch": "3",
        "tokens_per_second": "1280",
    }


# --- Whole runs ---


@pytest.fixture
def whole(make_run, monkeypatch):
    """main() in this process, with a tiny model and half a second to train it."""
    make_run()
    monkeypatch.setattr(train, "TIME_BUDGET", 0.5)
    monkeypatch.setattr(train.faulthandler, "dump_traceback_later", lambda *a, **k: None)
    yield train.main
    gc.enable()
    gc.unfreeze()


def test_a_run_ends_with_the_summary(whole, capsys):
    whole()
    out = capsys.readouterr().out
    log, _, tail = out.partition("\n---\n")
    lines = tail.splitlines()
    assert [line.split(":")[0] for line in lines] == SUMMARY
    assert all(re.fullmatch(r"\w+: +\S.*", line) for line in lines)
    assert "training for 0.5 s: 2 x 4 rows a step" in log
    assert "\r" not in out and len(out.encode()) < 8000
    values = {line.split(":")[0]: line.split(None, 1)[1] for line in lines}
    assert 0 < float(values["val_bpb"]) < 8
    assert 0.5 <= float(values["training_seconds"]) < float(values["total_seconds"])


def test_a_slow_cards_evaluation_has_minutes_of_its_own(whole, monkeypatch):
    armed, real_evaluate = [], train.evaluate_bpb
    monkeypatch.setattr(
        train.faulthandler, "dump_traceback_later", lambda *a, **k: armed.append((a, k))
    )

    def scored(*args):
        assert armed == 2 * [((train.HUNG_AFTER_S,), {"exit": True})]
        return real_evaluate(*args)

    monkeypatch.setattr(train, "evaluate_bpb", scored)
    whole()


def test_scored_weights_are_touched_by_timed_steps_alone(whole, capsys, monkeypatch):
    """Fresh when the clock starts; when the last step has ended, as they are when scored."""
    seen, real_train, real_evaluate = {}, train.train, train.evaluate_bpb
    monkeypatch.setattr(train, "WARMUP_STEPS", 2)

    def timed(run, clock):
        seen["start"], seen["clock"], seen["run"] = weights_of(run), clock, run
        assert clock.step == 0 and clock.used_s < 0.1 and not gc.isenabled()
        log = real_train(run, clock)
        seen["end"], seen["used_s"] = weights_of(run), clock.used_s
        return log

    def scored(model, tokenizer, batch_size):
        seen["scored"] = {name: p.detach().clone() for name, p in model.named_parameters()}
        return real_evaluate(model, tokenizer, batch_size)

    monkeypatch.setattr(train, "train", timed)
    monkeypatch.setattr(train, "evaluate_bpb", scored)
    whole()
    fresh = train.GPT(seen["run"].config)
    fresh.init_weights(train.SEED)
    assert_same(seen["start"], dict(fresh.named_parameters()))
    assert_same(seen["end"], seen["scored"])
    assert not torch.equal(seen["start"]["wte.weight"], seen["end"]["wte.weight"])
    said = float(re.search(r"training_seconds: +([\d.]+)", capsys.readouterr().out)[1])
    assert abs(said - seen["used_s"]) <= 0.2


def test_guesses_come_from_text_not_trained_on_and_in_the_end_from_all(whole, monkeypatch):
    seen, real_train = [], train.train

    def timed(run, clock):
        seen.append((run, run.model.guesses.tables.clone()))
        return real_train(run, clock)

    monkeypatch.setattr(train, "train", timed)
    whole()
    ((run, tables),) = seen
    expected = train.Guesses(run.config)
    expected.fill(prepare.training_text(run.tokenizer, (0.5, 1)))
    assert tables.equal(expected.tables)
    expected.fill(prepare.training_text(run.tokenizer, (0, 0.5)))
    assert run.model.guesses.tables.equal(expected.tables)


def test_a_run_trains_on_its_share_of_the_documents_alone(make_run):
    run = make_run()
    (text,) = prepare.training_text(run.tokenizer, (0, 0.5))
    bos = run.tokenizer.get_bos_token_id()
    for _ in range(20):
        inputs, _, _ = next(run.batches)
        for row in inputs.numpy().astype("uint16"):
            for part in np.split(row, np.flatnonzero(row == bos))[1:]:
                assert part[1:].tobytes() in text.tobytes()


def test_reading_for_guesses_is_inside_the_clock(whole, capsys, monkeypatch):
    now_s, read = [100.0], []

    def guess_from(run, share):
        now_s[0] += 0.1
        read.append(share)

    def take_step(run, progress, step):
        now_s[0] += 0.01
        return torch.tensor(1.0), 1

    clock = train.Clock
    monkeypatch.setattr(train.Run, "guess_from", guess_from)
    monkeypatch.setattr(train.Run, "take_step", take_step)
    monkeypatch.setattr(train, "Clock", lambda budget_s: clock(budget_s, now=lambda: now_s[0]))
    whole()
    lines = dict(re.findall(r"^(\w+): +([\d.]+)", capsys.readouterr().out, re.M))
    assert read == [(0.5, 1), (0, 0.5)]
    steps_s = 0.5 - 0.1 - 0.1 * train.GUESS_RESERVE
    assert int(lines["num_steps"]) == pytest.approx(steps_s / 0.01, abs=1.1)
    assert float(lines["training_seconds"]) == 0.5


def test_nan_ends_the_run_with_one_line_and_no_summary(whole, capsys, monkeypatch):
    real, steps = train.accumulate_gradients, []

    def diverging(*args):
        loss, epoch = real(*args)
        steps.append(loss)
        return (loss * math.nan if len(steps) == 3 else loss), epoch

    monkeypatch.setattr(train, "accumulate_gradients", diverging)
    monkeypatch.setattr(train, "TIME_BUDGET", 60)
    with pytest.raises(SystemExit) as ended:
        whole()
    # A string given to sys.exit is printed on standard error, and the status is 1.
    assert ended.value.code == "error: loss nan at step 3"
    out = capsys.readouterr().out
    assert "---" not in out and "val_bpb" not in out


@pytest.mark.parametrize("failure", [OSError("disk gone"), ValueError("odd"), RuntimeError("CUDA")])
def test_what_the_world_does_is_one_line(failure, whole, monkeypatch):
    def broken(*args):
        raise failure

    monkeypatch.setattr(train, "evaluate_bpb", broken)
    with pytest.raises(SystemExit, match=f"^error: {failure}$"):
        whole()


def run_python(code: str, tmp_path, timeout_s: float = 120) -> subprocess.CompletedProcess:
    environment = conftest.run_environment(tmp_path)
    environment.pop("PYTHONUNBUFFERED", None)
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def test_a_hung_run_is_ended_and_says_where_it_hung(small, tmp_path):
    done = run_python(
        f"""
import time, prepare, train
prepare.DATASET, prepare.VOCAB_SIZE = {prepare.DATASET!r}, 400
prepare.MAX_SEQ_LEN = train.MAX_SEQ_LEN = 32
prepare.EVAL_TOKENS = {prepare.EVAL_TOKENS}
train.HUNG_AFTER_S = 1
def never_ends(self, platform):
    time.sleep(60)
train.Run.__init__ = never_ends
train.main()
""",
        tmp_path,
    )
    assert done.returncode == 1, done.stderr
    assert "Timeout (0:00:01)!" in done.stderr and "in never_ends" in done.stderr
    assert "device: " in done.stdout and "---" not in done.stdout  # nothing said before is lost


def test_importing_train_does_nothing(tmp_path):
    """No network, no clock, no file written, no process started, nothing put on a GPU."""
    done = run_python(
        """
import sys, time
import numpy, torch, torch.optim.adamw
import prepare  # and what it imports
del sys.modules["prepare"]
def refused(*args):
    raise AssertionError("the clock was read")
def watch(event, args):
    writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if writes and not str(args[0]).endswith(".pyc") and "__pycache__" not in str(args[0]):
        raise AssertionError((event, args))
    if event.startswith(("socket.", "subprocess.", "os.mkdir", "os.rename", "os.remove")):
        if "__pycache__" not in str(args):
            raise AssertionError((event, args))
sys.addaudithook(watch)
for name in ("time", "perf_counter", "monotonic", "process_time"):
    setattr(time, name, refused)
import train
assert not torch.cuda.is_initialized()
print("nothing")
""",
        tmp_path,
    )
    assert done.stdout == "nothing\n" and not done.stderr, done.stderr
    assert not (tmp_path / "cache").exists()


# --- A train.py of somebody else's ---

BIGRAM_MODEL = """
import torch
import torch.nn.functional as F
from prepare import MAX_SEQ_LEN, TIME_BUDGET, Tokenizer, make_dataloader, evaluate_bpb

class Bigram(torch.nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.table = torch.nn.Embedding(vocab_size, vocab_size)
        torch.nn.init.zeros_(self.table.weight)

    def forward(self, idx, targets=None, reduction="mean"):
        logits = self.table(idx)
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)

tokenizer = Tokenizer.from_directory()
model = Bigram(tokenizer.get_vocab_size()).to("cuda" if torch.cuda.is_available() else "cpu")
untrained_bpb = evaluate_bpb(model, tokenizer, 16)
loader = make_dataloader(tokenizer, 16, MAX_SEQ_LEN, "train")
optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
for step in range(40):
    x, y, epoch = next(loader)
    assert x.shape == y.shape == (16, MAX_SEQ_LEN) and x.dtype == y.dtype == torch.int64
    model(x, y).backward()
    optimizer.step()
    optimizer.zero_grad()
model.train()
val_bpb = evaluate_bpb(model, tokenizer, 16)
assert model.training
"""


def test_a_script_for_the_reference_runs_on_this_harness(small):
    names = {}
    exec(BIGRAM_MODEL, names)
    # A uniform model needs log2(400) bits a token.
    bytes_a_token = math.log2(400) / names["untrained_bpb"]
    assert 1 < bytes_a_token < 8
    assert names["val_bpb"] < 0.7 * names["untrained_bpb"]
    assert names["epoch"] >= 1 and names["TIME_BUDGET"] == prepare.TIME_BUDGET
