"""The update rules, against rules written out in float64; groups, rates and schedules."""

import pytest
import torch
from torch import nn

import train
from train import GPT, GPTConfig, Muon, make_optimizers, orthogonalize, written_out

SHAPES = [(24, 24), (16, 64), (64, 16), (4, 32)]


def parameters(shapes: list) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def step(optimizers: list, params: list, seed: int = 0) -> None:
    """With gradients of N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    for optimizer in optimizers:
        optimizer.step()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_orthogonalizing_brings_singular_values_near_one(shape, dtype):
    matrix = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrix.to(dtype))
    assert result.shape == matrix.shape and result.dtype == dtype
    before = torch.linalg.svdvals(matrix) / matrix.norm(dim=(-2, -1))[:, None]
    after = torch.linalg.svdvals(result.float())
    assert after.max() < 1.25 and after[before > 0.005].min() > 0.7
    assert not orthogonalize(torch.zeros(2, *shape)).any()  # of nothing, nothing


class SlowMuon:
    """FACTS.md's rule for one matrix, in float64 and in sentences: NorMuon, cautious decay."""

    def __init__(self, weight: torch.Tensor):
        self.weight = weight.detach().double().clone()
        self.buffer = torch.zeros_like(self.weight)
        rows, columns = weight.shape
        self.by_row = rows >= columns
        self.squares = torch.zeros(rows if self.by_row else columns).double()

    def step(self, gradient, lr, momentum, decay, beta2):
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


def test_muon_follows_the_rule_written_out_and_a_groups_own_values_hold(monkeypatch):
    """Three matrices of each shape, in one group; momentum rises, here over two steps."""
    monkeypatch.setattr(train, "MUON_MOMENTUM_STEPS", 2)
    unused, *params = parameters(SHAPES[:1] + SHAPES * 3)  # by an idea: it stays as it is
    before, rules = unused.detach().clone(), [SlowMuon(p) for p in params]
    own = dict(params=[unused, *params], lr=0.1, momentum=(0.5, 0.8), weight_decay=0.3, beta2=0.9)
    optimizer = Muon([own], torch.float32)
    assert len(optimizer.param_groups) == len(SHAPES)
    for momentum in (0.5, 0.65, 0.8, 0.8):
        step([optimizer], params, seed=int(100 * momentum))
        for p, rule in zip(params, rules, strict=True):
            rule.step(p.grad, 0.1, momentum, 0.3, 0.9)
            torch.testing.assert_close(p.double(), rule.weight, rtol=1e-3, atol=1e-3)
    assert torch.equal(unused, before)


# --- Groups ---


def tiny(dtype=torch.float32, **changes) -> GPT:
    sizes = dict(sequence_len=8, vocab_size=50, n_layer=4, n_head=2, n_kv_head=2, n_embd=32)
    torch.manual_seed(1)
    return GPT(GPTConfig(**{**sizes, **changes}), written_out, dtype)


def groups_of(model: GPT) -> dict[str, tuple]:
    """(optimizer, group) of each parameter by name; each is in exactly one."""
    names, found = {p: name for name, p in model.named_parameters()}, {}
    for optimizer in make_optimizers(model):
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert names[p] not in found, names[p]
                found[names[p]] = (type(optimizer), group)
    assert found.keys() == set(names.values())
    return found


def test_every_parameter_has_the_rule_and_the_rates_of_the_reference():
    scale, betas = (512 / 768) ** -0.5, train.ADAM_BETAS
    wanted = {
        "lm_head.weight": (train.UNEMBEDDING_LR * scale, betas),
        "wte.weight": (train.EMBEDDING_LR * scale, betas),
        "value_embedding.weight": (train.EMBEDDING_LR * scale, betas),
        "residual_scale": (train.SCALAR_LR * train.RESIDUAL_LR_SCALE, betas),
        "skip_scale": (train.SCALAR_LR, train.SKIP_BETAS),
    }
    muon = dict(lr=train.MATRIX_LR, weight_decay=train.WEIGHT_DECAY)
    muon |= dict(momentum=train.MUON_MOMENTUM, beta2=train.MUON_BETA2)
    for name, (rule, group) in groups_of(tiny(n_embd=512)).items():
        lr, betas = next((wanted[end] for end in wanted if name.endswith(end)), (0, 0))
        adamw = dict(lr=pytest.approx(lr), weight_decay=train.ADAM_WEIGHT_DECAY)
        adamw |= dict(betas=betas, eps=train.ADAM_EPS)
        assert rule is (torch.optim.AdamW if lr else Muon), name
        assert group.items() >= (adamw if lr else muon).items(), name


class OddBlock(train.Block):
    """A layer with a gain, a matrix with bias and a convolution."""

    def __init__(self, config, layer, attend):
        super().__init__(config, layer, attend)
        self.gain = nn.Parameter(torch.ones(config.n_embd))
        self.linear = nn.Linear(config.n_embd, config.n_embd)
        self.mixed = nn.Conv1d(config.n_embd, config.n_embd, 3, groups=config.n_embd)


def test_what_is_no_matrix_of_the_layers_goes_to_adamw_by_itself(monkeypatch):
    monkeypatch.setattr(train, "Block", OddBlock)
    model = tiny()
    rules = {name.removeprefix("blocks.0."): rule for name, (rule, _) in groups_of(model).items()}
    assert rules["linear.weight"] is Muon
    for name in ("gain", "linear.bias", "mixed.weight", "mixed.bias"):
        assert rules[name] is torch.optim.AdamW, name
    params = list(model.parameters())
    before = [p.detach().clone() for p in params]
    step(make_optimizers(model), params)
    assert not any(torch.equal(p, was) for p, was in zip(params, before, strict=True))


def test_an_edit_of_the_weights_between_steps_survives_the_next(monkeypatch):
    """Averaging, clipping, fresh starts: there is no other copy of the weights."""
    monkeypatch.setattr(train, "FINAL_LR_FRAC", 0.0)
    model = tiny(torch.bfloat16)
    optimizers, params = make_optimizers(model), list(model.parameters())
    for progress in (0.0, 1.0):  # at 1, with a floor of 0, rates are 0 and nothing moves
        with torch.no_grad():
            for p in params:
                p.mul_(0.5).add_(0.01)
        edited = [p.detach().clone() for p in params]
        train.apply_schedules(optimizers, progress)
        step(optimizers, params)
    assert all(torch.equal(p, was) for p, was in zip(params, edited, strict=True))


# --- Schedules ---


@pytest.mark.parametrize(
    "warmup, warmdown, floor, wanted",
    [
        (0.0, 0.5, 0.1, {0: 1, 0.2: 1, 0.5: 1, 0.75: 0.55, 1: 0.1}),
        (0.2, 0.5, 0.0, {0: 0, 0.1: 0.5, 0.2: 1, 0.5: 1, 1: 0}),
        (0.0, 0.0, 0.0, {0: 1, 0.5: 1, 1: 1}),
    ],
)
def test_rates_rise_stay_and_fall_linearly(warmup, warmdown, floor, wanted, monkeypatch):
    monkeypatch.setattr(train, "WARMUP_RATIO", warmup)
    monkeypatch.setattr(train, "WARMDOWN_RATIO", warmdown)
    monkeypatch.setattr(train, "FINAL_LR_FRAC", floor)
    assert [train.lr_scale(p) for p in wanted] == pytest.approx(list(wanted.values()))


def test_schedules_scale_each_groups_own_values(monkeypatch):
    monkeypatch.setattr(train, "lr_scale", lambda progress: 0.5)
    weights = parameters([(8, 8), (8, 8), (5,)])
    plain = dict(params=weights[:1], lr=0.1, momentum=(0.9, 0.9))
    own = dict(params=weights[1:2], lr=0.3, momentum=(0.7, 0.7), weight_decay=0.6)
    adamw = torch.optim.AdamW([dict(params=weights[2:], lr=0.2, weight_decay=0.5)])
    optimizers = [Muon([plain, own], torch.float32), adamw]
    for progress in (0.0, 0.9, 0.75):  # scales never multiply up
        train.apply_schedules(optimizers, progress)
        step(optimizers, weights)
    groups = [*optimizers[0].param_groups, *adamw.param_groups]
    assert [group["lr"] for group in groups] == pytest.approx([0.05, 0.15, 0.1])
    decays = [train.WEIGHT_DECAY / 4, 0.15, 0.5]  # the matrices' falls to 0
    assert [group["weight_decay"] for group in groups] == pytest.approx(decays)
    torch.testing.assert_close(groups[1]["first"][0], (1 - 0.7**3) * weights[1].grad)
