"""One idea, one place: eighteen ideas as patches of train.py, each of at most two places.

They are examples of what an agent writes in a night. Each is trained for a few steps as a run is,
with warm-up and evaluation, and traced whole. A place is a constant, a function, or a class.
"""

import sys
from pathlib import Path
from types import ModuleType

import bench_gpu
import pytest
import torch
import torch.nn.functional as F

import prepare
import train

SOURCE = Path(train.__file__).read_text(encoding="utf-8")

# Each: pairs of a text that train.py holds once, and what the idea makes of it. What a text begins
# with is its place: `class X`, `def x`, or a constant.
IDEAS = {
    "table of the token before": """
        self.lm_head = Head(config)
-->
        self.lm_head = Head(config)
        self.before = nn.Embedding(config.vocab_size, config.n_embd)
        nn.init.zeros_(self.before.weight)
===
self.wte(idx)
-->
(self.wte(idx) + self.before(F.pad(idx, (1, 0))[:, :-1]))
""",
    "gain in every layer": """
        self.mlp = MLP(config)
-->
        self.mlp = MLP(config)
        self.gain = nn.Parameter(torch.ones(config.n_embd))
===
x + self.mlp(norm(x))
-->
x + self.mlp(self.gain.to(x.dtype) * norm(x))
""",
    "tied head": """
        self.lm_head = Head(config)
-->
        self.lm_head = Head(config)
        self.wte.weight = self.lm_head.weight
""",
    "z-loss": """
        return loss.view_as(targets) if reduction == "none" else loss
-->
        z_loss = 1e-2 * logits.logsumexp(-1).square()
        loss = loss + (z_loss.mean() if reduction == "mean" else z_loss.flatten())
        return loss.view_as(targets) if reduction == "none" else loss
""",
    "document mask, written out": """
        y = self.attend(q, k, v, self.window)
-->
        document = (idx == BOS).cumsum(1)
        seen = window_mask(T, self.window, x.device)
        seen = seen & (document[:, :, None] == document[:, None])
        q, k, v = heads_first(q, k, v)
        y = F.scaled_dot_product_attention(q, k, v, seen[:, None]).transpose(1, 2)
""",
    "rate of the queries": """
        dict(name="matrices",
-->
        dict(name="queries", kind="muon", params=[b.attn.c_q.weight for b in model.blocks],
             lr=2 * MATRIX_LR, momentum_from_to=(0.9, 0.9), weight_decay=0.0),
        dict(name="matrices",
""",
    "SwiGLU": """
        self.c_fc = Linear(C, MLP_RATIO * C, std=MATRIX_STD * C**-0.5)
-->
        self.c_fc = Linear(C, MLP_RATIO * C, std=MATRIX_STD * C**-0.5)
        self.c_gate = Linear(C, MLP_RATIO * C, std=MATRIX_STD * C**-0.5)
===
F.relu(self.c_fc(x)).square()
-->
F.silu(self.c_gate(x)) * self.c_fc(x)
""",
    "averaged weights": """
        self.model.zero_grad(set_to_none=True)
        # torch pins
-->
        if step == 0:
            self.average = [p.detach().clone() for p in self.model.parameters()]
        torch._foreach_lerp_(self.average, [p.detach() for p in self.model.parameters()], 0.1)
        self.model.zero_grad(set_to_none=True)
        # torch pins
===
    trained.add(running)
    trained.bar.close()
-->
    for p, average in zip(run.model.parameters(), run.average, strict=True):
        p.data.copy_(average)
    trained.add(running)
    trained.bar.close()
""",
    "grouped queries": """
N_KV_HEAD = 0
-->
N_KV_HEAD = 1
""",
    "AdamW for all": """
        dict(name="matrices", kind="muon", params=matrices, lr=MATRIX_LR),
-->
        dict(name="matrices", kind="adamw", params=matrices, lr=0.003),
""",
    "gradient clipping": """
        apply_schedules(self.optimizers, progress, step)
-->
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        apply_schedules(self.optimizers, progress, step)
""",
    "document mask by varlen": """
        y = self.attend(q, k, v, self.window)
-->
        y = self.attend(q, k, v, self.window, idx == BOS)
===
def torch_varlen(q, k, v, window):
-->
def torch_varlen(q, k, v, window, is_start=None):
===
    options = dict(window_size
-->
    if is_start is not None:  # a place for each token; unused ones are empty documents at the end
        places = torch.arange(B * T, device=q.device, dtype=torch.int32)
        places = torch.where(is_start.flatten(), places, B * T).sort().values
        starts = F.pad(places, (0, 1), value=B * T).to(torch.int32)
    options = dict(window_size
""",
    "soft-cap in attention": """
        scores = scores.masked_fill(
-->
        scores = 5 * torch.tanh(scores / 5)
        scores = scores.masked_fill(
""",
    "growing batch": """
        micro_batches = TOTAL_BATCH_SIZE // (self.rows * MAX_SEQ_LEN)
-->
        micro_batches = TOTAL_BATCH_SIZE // (self.rows * MAX_SEQ_LEN)
        if progress < 0.5:
            micro_batches = micro_batches // 2
""",
    "growing rows": """
            self.end_part("data")
-->
            if progress < 0.5:
                inputs = inputs[:, : MAX_SEQ_LEN // 2].contiguous()
                targets = targets[:, : MAX_SEQ_LEN // 2].contiguous()
            self.end_part("data")
""",
    "two tokens ahead": """
        self.lm_head = Head(config)
-->
        self.lm_head = Head(config)
        self.next_head = Head(config)
===
        return self.lm_head(x, targets, reduction)
-->
        loss = self.lm_head(x, targets, reduction)
        if targets is not None and reduction == "mean":
            loss = loss + 0.3 * self.next_head(x[:, :-1], targets[:, 1:].contiguous())
        return loss
""",
    "mixture of two experts": """
        self.c_fc = Linear(C, MLP_RATIO * C, std=MATRIX_STD * C**-0.5)
        self.c_proj = Linear(MLP_RATIO * C, C, std=0.0)
-->
        self.router = Linear(C, 2, std=MATRIX_STD * C**-0.5)
        self.experts_in = nn.Parameter(C**-0.5 * torch.randn(2, C, 2 * C))
        self.experts_out = nn.Parameter(torch.zeros(2, 2 * C, C))
===
        return self.c_proj(F.relu(self.c_fc(x)).square())
-->
        inner = F.relu(torch.einsum("btc,ech->bteh", x, self.experts_in.to(x.dtype))).square()
        inner = inner * self.router(x).softmax(-1).unsqueeze(-1)
        return torch.einsum("bteh,ehc->btc", inner, self.experts_out.to(x.dtype))
===
        dict(name="scalars",
-->
        dict(name="experts", kind="adamw", lr=0.003, params=[
            p for block in model.blocks for p in (block.mlp.experts_in, block.mlp.experts_out)
        ]),
        dict(name="scalars",
""",
    "another window letter": """
        sizes = {"S":
-->
        sizes = {"M": self.sequence_len // 2, "S":
===
WINDOW_PATTERN = "SSSL"
-->
WINDOW_PATTERN = "MSSL"
""",
}
TINY = dict(DEPTH=2, ASPECT_RATIO=16, HEAD_DIM=16, TOTAL_BATCH_SIZE=512, DEVICE_BATCH_SIZE=8)
TINY |= dict(EVAL_BATCH_SIZE=8, TIME_BUDGET=300, HUNG_AFTER_S=600)
BOS = 396  # of 400 tokens, the last 4 are special


def hunks(name: str) -> list[tuple[str, str]]:
    pairs = [hunk.split("\n-->\n") for hunk in IDEAS[name].strip("\n").split("\n===\n")]
    return [(old, new) for old, new in pairs]


def place_of(position: int) -> str:
    """The constant, function or class that this position of train.py is in; a method's class."""
    lines = SOURCE[: SOURCE.index("\n", position + 1)].splitlines()
    (last,) = [line for line in lines if line[:1].isalpha() or line[:1] == "@"][-1:]
    return last.split("(")[0].split(":")[0].split(" =")[0]


def patched(name: str) -> ModuleType:
    """train.py with this idea, as a module."""
    source = SOURCE
    for old, new in hunks(name) if name else []:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    module = ModuleType("train_with_an_idea")
    sys.modules[module.__name__] = module  # where a dataclass looks
    vars(module)["BOS"] = BOS
    exec(compile(source, "train_with_an_idea.py", "exec"), vars(module))
    for constant, value in TINY.items():
        setattr(module, constant, value)
    return module


class Trial:
    """A run of a tiny model by a patched train.py: warm-up, some steps by the clock, evaluation."""

    def __init__(self, name: str, monkeypatch, steps: int = 12, compiles=False, **constants):
        module = self.module = patched(name)
        for constant, value in constants.items():
            setattr(module, constant, value)
        attention = module.ATTENTION or "written_out"
        cpu = torch.device("cpu")
        self.platform = module.Platform(cpu, "test", torch.float32, compiles, attention)
        run = self.run = module.Run(self.platform)
        module.warm_up(run)
        self.before = {n: p.detach().clone() for n, p in run.model.named_parameters()}
        self.losses, self.tokens = [], []
        now_s = [0.0]
        take_step = run.take_step

        def counted(progress, step):
            taken = take_step(progress, step)
            now_s[0] += 300.0 / steps
            self.losses.append(taken.loss.item())
            self.tokens.append(taken.tokens)
            return taken._replace(end=now_s[0])

        run.take_step = counted
        monkeypatch.setattr(module.time, "perf_counter", lambda: now_s[0])
        module.train(run)
        monkeypatch.undo()
        self.model = run.model
        self.groups = module.groups_of(run.optimizers)

    def score(self) -> float:
        return prepare.evaluate_bpb(self.model, self.run.tokenizer, self.run.eval_rows)

    def group_of(self, name: str) -> dict:
        """The one group that the parameter is in; it has moved."""
        parameter = self.model.get_parameter(name)
        assert not torch.equal(parameter, self.before[name]), name
        (group,) = [g for g in self.groups if any(p is parameter for p in g["params"])]
        return group


@pytest.fixture
def trial(small, monkeypatch):
    """Make a trial, its clock apart from the fixtures' patches."""

    def make(name: str, **constants) -> Trial:
        with pytest.MonkeyPatch.context() as patch:
            return Trial(name, patch, **constants)

    return make


@pytest.fixture
def only_traced(monkeypatch):
    compile = torch.compile
    eager = dict(backend="eager")
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile(f, **{**kw, **eager}))
    yield
    torch.compiler.reset()


@pytest.fixture
def varlen(monkeypatch):
    """torch's varlen_attn, as far as a CPU can compute it: packed documents, by their starts."""
    module = pytest.importorskip("torch.nn.attention.varlen")

    def varlen_attn(q, k, v, starts, ends, max_q, max_k, *, window_size):
        window = window_size[0]
        document = torch.searchsorted(starts[1:], torch.arange(len(q)), right=True, out_int32=True)
        seen = train.window_mask(len(q), window if window >= 0 else len(q), q.device)
        seen = seen & (document[:, None] == document)
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, seen).transpose(0, 1)

    monkeypatch.setattr(module, "varlen_attn", varlen_attn)


@pytest.mark.parametrize("name", IDEAS)
def test_an_idea_is_written_in_two_places_at_most_learns_and_is_scored(
    name, trial, only_traced, varlen
):
    """Trained as a run is, traced whole: a graph break is an error."""
    assert 1 <= len({place_of(SOURCE.index(old)) for old, _ in hunks(name)}) <= 2
    named = dict(ATTENTION="torch_varlen") if "varlen" in name else {}
    done = trial(name, compiles=True, **named)
    assert done.losses[-1] < 0.9 * done.losses[0]
    assert 0 < done.score() < 8
    assert {p for g in done.groups for p in g["params"]} == set(done.model.parameters())


def test_one_of_them_is_compiled_for_real(trial):
    done = trial("gain in every layer", compiles=True, steps=4, DEPTH=1)
    assert done.losses[-1] < done.losses[0]
    torch.compiler.reset()


def test_the_variants_of_bench_gpu_are_found_in_the_code():
    for constants in (*bench_gpu.VARIANTS.values(), *bench_gpu.PAIRS.values(), bench_gpu.TINY):
        for name in constants:
            known = hasattr(train, name) or hasattr(train.prepare, name)
            assert known if name.isidentifier() else SOURCE.count(name) == 1, name


# --- Each does what it says ---


def test_tables_gains_and_heads_go_where_they_belong(trial):
    plain, tied = trial("", steps=1), trial("tied head", steps=1)
    looked_up = trial("table of the token before", steps=3)
    assert looked_up.group_of("before.weight") is looked_up.group_of("wte.weight")
    assert looked_up.model.flops_per_token() == plain.model.flops_per_token()
    gain = trial("gain in every layer", steps=3).group_of("blocks.1.gain")
    assert gain["betas"] == train.ADAM_BETAS and gain["name"] == "scalars"
    assert tied.group_of("wte.weight")["name"] == plain.group_of("lm_head.weight")["name"] == "head"
    sizes = [sum(p.numel() for p in done.model.parameters()) for done in (plain, tied)]
    assert sizes[0] - sizes[1] == 400 * 32
    assert tied.model.flops_per_token() == plain.model.flops_per_token()  # it multiplies, once
    ahead = trial("two tokens ahead", steps=3)
    assert ahead.group_of("next_head.weight")["name"] == "head"
    experts = trial("mixture of two experts", steps=3)
    assert experts.group_of("blocks.0.mlp.experts_in")["name"] == "experts"
    assert experts.group_of("blocks.0.mlp.router.weight")["kind"] == "muon"


def test_a_groups_own_rates_hold_and_adamw_can_move_all(trial):
    queries = trial("rate of the queries", steps=3)
    own, others = (queries.group_of(f"blocks.0.attn.c_{part}.weight") for part in "qk")
    assert own["initial_lr"] == 2 * others["initial_lr"] and own["momentum"] == 0.9
    assert own["weight_decay"] == 0 < others["initial_weight_decay"]
    optimizers = trial("AdamW for all", steps=1).run.optimizers
    assert {type(optimizer) for optimizer in optimizers} == {torch.optim.AdamW}


def test_both_matrices_of_swiglu_learn(trial):
    """Before, each of them started at zero by itself, and stayed there."""
    done = trial("SwiGLU", steps=3)
    for part in ("c_fc", "c_gate", "c_proj"):
        done.group_of(f"blocks.0.mlp.{part}.weight")


def test_averaged_weights_are_those_that_are_scored(trial):
    done = trial("averaged weights", steps=4)
    for p, average in zip(done.model.parameters(), done.run.average, strict=True):
        assert torch.equal(p, average)
    plain = trial("", steps=4)
    assert not torch.equal(plain.model.wte.weight, done.model.wte.weight)
    assert plain.losses == done.losses  # what is trained is as before


def test_grouped_queries_share_keys_and_another_letter_is_another_window(trial):
    assert trial("grouped queries", steps=1).model.blocks[0].attn.c_k.weight.shape == (16, 32)
    assert trial("another window letter", steps=1).run.config.windows() == [16, 32]


def test_clipped_gradients_are_short(trial):
    done = trial("gradient clipping", DIAGNOSED_AT=(0.0,), steps=2)
    total = sum(gradient.square() for gradient, _ in done.run.figures[0].values()) ** 0.5
    assert total.item() == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("name", ["growing batch", "growing rows"])
def test_what_grows_with_progress_is_compiled_before_the_clock_and_counted(name, trial):
    done = trial(name, steps=4)
    assert done.tokens == [256, 256, 512, 512]


def test_a_z_loss_is_in_the_loss_and_not_in_the_logits(trial):
    model = trial("z-loss", steps=1).model
    idx, targets = torch.randint(396, (2, 4, 32))
    logits = model(idx)
    wanted = F.cross_entropy(logits.mT, targets, reduction="none")
    wanted = wanted + 1e-2 * logits.logsumexp(-1).square()
    torch.testing.assert_close(model(idx, targets), wanted.mean())
    torch.testing.assert_close(model(idx, targets, "none"), wanted)


def test_a_soft_cap_in_attention_bounds_its_scores(trial):
    module = patched("soft-cap in attention")
    q, v = (
        100 * torch.ones(1, 2, 1, 16),
        torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 1, 16),
    )
    k = q * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    share = module.written_out(q, k, v, 2)[0, 1, 0, 0]
    assert share.item() == pytest.approx(1 / (1 + 2.718281828**-10), rel=1e-4)


@pytest.mark.parametrize(
    "name, masked",
    [("document mask, written out", True), ("document mask by varlen", True), ("", False)],
)
def test_with_a_document_mask_none_sees_another(name, masked, trial, varlen):
    rows = torch.tensor([[BOS, 1, 2, 3, BOS, 4, 5, 6], [BOS, 7, 8, 9, BOS, 4, 5, 6]])
    named = dict(ATTENTION="torch_varlen") if "varlen" in name else {}
    one, other = trial(name, steps=3, **named).model(rows)
    assert not torch.allclose(one[1:4], other[1:4])
    assert torch.allclose(one[4:], other[4:], atol=1e-5) == masked
