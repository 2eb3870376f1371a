"""The update rules, against torch's AdamW and rules written out in float64; the schedules."""

import pytest
import torch
from torch import nn

import train
from train import GPT, GPTConfig, MuonAdamW, make_optimizer, orthogonalize

REFERENCE = dict(
    EMBEDDING_LR=0.6,
    UNEMBEDDING_LR=0.004,
    MATRIX_LR=0.04,
    SCALAR_LR=0.5,
    RESIDUAL_LR_SCALE=0.01,
    ADAM_BETAS=(0.8, 0.95),
    SKIP_BETAS=(0.96, 0.95),
    ADAM_EPS=1e-10,
    WEIGHT_DECAY=0.2,
    MUON_MOMENTUM=(0.85, 0.95),
    MUON_MOMENTUM_STEPS=300,
    MUON_BETA2=0.95,
    WARMUP_RATIO=0.0,
    WARMDOWN_RATIO=0.5,
    FINAL_LR_FRAC=0.0,
)
SHAPES = [(24, 24), (16, 64), (64, 16), (4, 32)]


@pytest.fixture(autouse=True)
def _reference(monkeypatch):
    """The reference's constants, whatever train.py has come to."""
    for name, value in REFERENCE.items():
        monkeypatch.setattr(train, name, value)


def parameters(shapes, seed: int = 0, dtype=torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in shapes]


def set_gradients(params: list, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)


def adam_group(params, **changes) -> dict:
    defaults = dict(kind="adamw", lr=0.01, betas=(0.8, 0.95), weight_decay=0.0)
    return {**defaults, "params": params, **changes}


def muon_group(params, **changes) -> dict:
    defaults = dict(kind="muon", lr=0.1, momentum=0.9, weight_decay=0.0)
    return {**defaults, "params": params, **changes}


# --- AdamW ---


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_matches_torch(decay):
    ours, theirs = (parameters([(5, 7), (3,), (2, 3, 4)]) for _ in range(2))
    mine = MuonAdamW([adam_group(ours, weight_decay=decay)])
    torchs = torch.optim.AdamW(theirs, lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=decay)
    for step in range(10):
        for optimizer, params in ((mine, ours), (torchs, theirs)):
            set_gradients(params, seed=step)
            optimizer.param_groups[0]["lr"] = 0.01 * (10 - step)  # read at each step
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_thousand_tiny_updates_are_not_lost_in_bf16(kind):
    """They add up as in float32: in bf16 alone, 1 - 0.0001 is 1 again, and nothing moves."""
    moved = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(torch.ones(8, 8, dtype=dtype))
        group = adam_group([weight]) if kind == "adamw" else muon_group([weight])
        optimizer = MuonAdamW([{**group, "lr": 1e-4}])
        gradient = torch.randn(8, 8, generator=torch.Generator().manual_seed(5)).bfloat16()
        for _ in range(1000):  # of the same gradient, so that all updates go one way
            weight.grad = gradient.to(dtype)
            optimizer.step()
        moved.append(weight.detach().float() - 1)
    assert moved[0].abs().mean() > 0.02
    assert (moved[1] - moved[0]).abs().mean() < 0.1 * moved[0].abs().mean()


# --- Muon ---


def through_polynomials(values: torch.Tensor) -> torch.Tensor:
    """What the five steps of arXiv 2505.16932 make of singular values: a·s + b·s³ + c·s⁵."""
    for a, b, c in train.POLAR_EXPRESS:
        values = a * values + b * values**3 + c * values**5
    return values


def test_polar_express_coefficients_are_the_papers():
    first, last = train.POLAR_EXPRESS[0], train.POLAR_EXPRESS[-1]
    assert first == (8.156554524902461, -22.48329292557795, 15.878769915207462)
    assert last == (2.3465413258596377, -1.7097828382687081, 0.42323551169305323)
    # A published property: everything from 0.005 to 1 comes out near 1.
    out = through_polynomials(torch.linspace(0.005, 1, 2000).double())
    assert 0.7 < out.min() and out.max() < 1.2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_orthogonalizing_brings_singular_values_near_one(shape, dtype):
    matrix = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrix.to(dtype))
    assert result.shape == matrix.shape and result.dtype == dtype
    before = torch.linalg.svdvals(matrix.double())
    before /= 1.02 * matrix.double().norm(dim=(-2, -1))[:, None]
    after = torch.linalg.svdvals(result.double())
    assert after.max() < 1.25 and after[before > 0.005].min() > 0.7
    if dtype == torch.float32:
        wanted = through_polynomials(before).sort(descending=True).values
        torch.testing.assert_close(after, wanted, rtol=1e-4, atol=1e-4)


def test_orthogonalizing_keeps_the_singular_vectors():
    matrix = torch.randn(1, 10, 30, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    in_its_axes = u.mT @ orthogonalize(matrix) @ vh.mT
    off_diagonal = in_its_axes - torch.diag_embed(in_its_axes.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-4 and (in_its_axes.diagonal(dim1=-2, dim2=-1) > 0.5).all()


def test_orthogonalizing_nothing_gives_nothing():
    assert not orthogonalize(torch.zeros(2, 4, 8)).any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_first_muon_update_is_near_orthogonal(shape):
    (weight,) = parameters([shape])
    weight.data.zero_()
    set_gradients([weight], seed=1)
    optimizer = MuonAdamW([muon_group([weight], lr=1.0)])
    optimizer.step()
    rows, columns = shape
    values = torch.linalg.svdvals(weight.detach()) / max(1, rows / columns) ** 0.5
    assert values.max() < 1.4 and values.median() > 0.7
    assert (weight * weight.grad).sum() < 0  # downhill


class SlowMuon:
    """FACTS.md's rule for one matrix, in float64 and in sentences."""

    def __init__(self, weight: torch.Tensor):
        self.weight = weight.detach().double().clone()
        self.buffer = torch.zeros_like(self.weight)
        rows, columns = weight.shape
        self.by_row = rows >= columns
        self.squares = torch.zeros(rows if self.by_row else columns).double()

    def step(self, gradient, lr, momentum, decay, beta2=0.95):
        gradient = gradient.double()
        self.buffer = momentum * self.buffer + (1 - momentum) * gradient
        looked_ahead = momentum * self.buffer + (1 - momentum) * gradient
        u, s, vh = torch.linalg.svd(looked_ahead, full_matrices=False)
        update = u @ torch.diag(through_polynomials(s / (1.02 * s.norm()))) @ vh
        size = update.norm()
        self.squares = beta2 * self.squares + (1 - beta2) * update.square().mean(int(self.by_row))
        root = self.squares.sqrt()
        update = update / (root[:, None] if self.by_row else root)
        update = update * size / update.norm()
        rows, columns = self.weight.shape
        agree = (update * self.weight > 0).double()
        update = update + decay * agree * self.weight
        self.weight = self.weight - lr * max(1, rows / columns) ** 0.5 * update


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_muon_follows_the_rule_written_out(shape):
    params = parameters([shape] * 3)
    slow = [SlowMuon(p) for p in params]
    optimizer = MuonAdamW([muon_group(params)])
    (group,) = optimizer.param_groups
    for step in range(4):
        group["lr"], group["momentum"], group["weight_decay"] = 0.1 + step, 0.8 + step / 50, 0.2
        set_gradients(params, seed=step)
        optimizer.step()
        for p, rule in zip(params, slow, strict=True):
            rule.step(p.grad, group["lr"], group["momentum"], group["weight_decay"])
            torch.testing.assert_close(p.double(), rule.weight, rtol=1e-3, atol=1e-3)


def test_a_stack_is_updated_as_each_matrix_alone():
    stacked, alone = parameters([(6, 10)] * 3), parameters([(6, 10)] * 3)
    together = MuonAdamW([muon_group(stacked, weight_decay=0.2)])
    apart = MuonAdamW([muon_group([p], weight_decay=0.2) for p in alone])
    for step in range(3):
        for optimizer, params in ((together, stacked), (apart, alone)):
            set_gradients(params, seed=step)
            optimizer.step()
    for a, b in zip(stacked, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_decay_acts_only_where_update_and_weight_agree_in_sign():
    plain, decayed = parameters([(6, 10)]), parameters([(6, 10)])
    start = plain[0].detach().clone()
    for params, decay in ((plain, 0.0), (decayed, 0.2)):
        set_gradients(params, seed=1)
        MuonAdamW([muon_group(params, weight_decay=decay)]).step()
    update = (start - plain[0]) / 0.1
    agree = update * start > 0
    assert 0.2 < agree.float().mean() < 0.8
    torch.testing.assert_close(plain[0] - decayed[0], torch.where(agree, 0.1 * 0.2 * start, 0.0))


@pytest.mark.parametrize("shape", [(1, 6, 10), (2, 10, 6), (2, 8, 8)], ids=str)
def test_normuon_keeps_the_norm_and_evens_out_the_neurons(shape):
    _, rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    update = torch.randn(shape, generator=generator)
    by_row = rows >= columns
    sizes = torch.linspace(0.1, 3, rows if by_row else columns)
    update = update * (sizes[:, None] if by_row else sizes)
    second = torch.zeros((shape[0], rows, 1) if by_row else (shape[0], 1, columns))
    evened = train.normalize_neurons(update, second, 0.95)
    torch.testing.assert_close(evened.norm(dim=(-2, -1)), update.norm(dim=(-2, -1)))
    of_neurons = evened.norm(dim=-1 if by_row else -2)
    torch.testing.assert_close(of_neurons, of_neurons[:, :1].expand_as(of_neurons))


# --- Groups ---


def model_and_groups(**changes) -> tuple:
    sizes = dict(sequence_len=8, vocab_size=50, n_layer=4, n_head=2, n_kv_head=2, n_embd=512)
    model = GPT(GPTConfig(**{**sizes, **changes}))
    return model, make_optimizer(model).param_groups


@pytest.mark.parametrize("extra", [{}, {"bigram_rows": 97, "guess_orders": (1, 3)}])
def test_every_parameter_is_in_exactly_one_group(extra):
    model, groups = model_and_groups(n_embd=32, **extra)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.numel()}


def test_rates_and_betas_are_the_reference_figures():
    model, groups = model_and_groups(bigram_rows=97)
    of = {id(p): group for group in groups for p in group["params"]}
    width_scale = (512 / 768) ** -0.5
    wanted = {
        "lm_head.weight": (0.004 * width_scale, (0.8, 0.95)),
        "wte.weight": (0.6 * width_scale, (0.8, 0.95)),
        "value_embeds.3.weight": (0.6 * width_scale, (0.8, 0.95)),
        "bigrams.weight": (0.6 * width_scale, (0.8, 0.95)),
        "residual_scales": (0.005, (0.8, 0.95)),
        "skip_scales": (0.5, (0.96, 0.95)),
    }
    for name, (lr, betas) in wanted.items():
        group = of[id(model.get_parameter(name))]
        assert group["kind"] == "adamw" and group["weight_decay"] == 0, name
        assert group["lr"] == group["initial_lr"] == pytest.approx(lr), name
        assert group["betas"] == betas, name
    for name, weight in model.blocks.named_parameters():
        assert of[id(weight)]["kind"] == "muon", name
        assert of[id(weight)]["lr"] == 0.04, name
        assert of[id(weight)]["weight_decay"] == 0.2, name
        assert {p.shape for p in of[id(weight)]["params"]} == {weight.shape}, name


def test_wider_models_learn_slower_outside_the_layers():
    rates = [model_and_groups(n_embd=width)[1][0]["lr"] for width in (32, 128)]
    assert rates[0] == pytest.approx(2 * rates[1])


# --- Schedules ---


@pytest.mark.parametrize(
    "progress, wanted",
    [(0, 1), (0.2, 1), (0.5, 1), (0.75, 0.55), (1, 0.1)],
)
def test_rates_are_constant_and_then_fall_linearly(progress, wanted, monkeypatch):
    monkeypatch.setattr(train, "FINAL_LR_FRAC", 0.1)
    assert train.lr_scale(progress) == pytest.approx(wanted)


@pytest.mark.parametrize("progress, wanted", [(0, 0), (0.1, 0.5), (0.2, 1), (0.5, 1), (1, 0)])
def test_rates_rise_linearly_in_the_warm_up(progress, wanted, monkeypatch):
    monkeypatch.setattr(train, "WARMUP_RATIO", 0.2)
    assert train.lr_scale(progress) == pytest.approx(wanted)


@pytest.mark.parametrize("warmdown, wanted", [(0.0, [1, 1, 1]), (1.0, [1, 0.5, 0])])
def test_a_warm_down_of_nothing_or_everything(warmdown, wanted, monkeypatch):
    monkeypatch.setattr(train, "WARMDOWN_RATIO", warmdown)
    assert [train.lr_scale(progress) for progress in (0, 0.5, 1)] == pytest.approx(wanted)


@pytest.mark.parametrize("step, wanted", [(0, 0.85), (150, 0.9), (300, 0.95), (1000, 0.95)])
def test_momentum_rises_over_300_steps(step, wanted):
    assert train.muon_momentum(step) == pytest.approx(wanted)


def test_decay_falls_linearly_to_nothing():
    assert [train.weight_decay(p) for p in (0, 0.5, 1)] == pytest.approx([0.2, 0.1, 0])


def test_schedules_reach_every_group():
    optimizer = make_optimizer(GPT(GPTConfig(8, 50, 2, n_head=2, n_kv_head=2, n_embd=32)))
    for progress, step in ((0.75, 150), (0.9, 1000), (0.75, 150)):  # scales never multiply up
        train.apply_schedules(optimizer, progress, step)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.5 * group["initial_lr"])
        if group["kind"] == "muon":
            assert group["momentum"] == pytest.approx(0.9)
            assert group["weight_decay"] == pytest.approx(0.05)
        else:
            assert group["weight_decay"] == 0


def test_the_last_step_of_all_moves_nothing():
    """At progress 1 with a floor of 0, rates are 0: warm-up steps use it too."""
    model = GPT(GPTConfig(8, 50, 2, n_head=2, n_kv_head=2, n_embd=32))
    model.init_weights(seed=1)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = make_optimizer(model)
    set_gradients(list(model.parameters()), seed=0)
    train.apply_schedules(optimizer, 1.0, 0)
    optimizer.step()
    for was, p in zip(before, model.parameters(), strict=True):
        assert torch.equal(was, p)
