"""The update rules, against rules written out in float64; groups, rates and schedules."""

import pytest
import torch
from torch import nn

import train
from prepare import HarnessError
from train import GPT, GPTConfig, Muon, groups_of, make_optimizers, orthogonalize, written_out

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
    monkeypatch.setattr(train, "lr_scale", lambda progress: 1.0)
    unused, *params = parameters(SHAPES[:1] + SHAPES * 3)  # by an idea: it stays as it is
    before, rules = unused.detach().clone(), [SlowMuon(p) for p in params]
    own = dict(kind="muon", momentum_from_to=(0.5, 0.8), weight_decay=0.3, beta2=0.9)
    own |= dict(initial_lr=0.1, initial_weight_decay=0.3, lr=0.1)
    optimizer = Muon([dict(params=[unused, *params], **own)], torch.float32)
    for number, momentum in enumerate((0.5, 0.65, 0.8, 0.8)):
        train.apply_schedules([optimizer], 0.0, number)
        step([optimizer], params, seed=int(100 * momentum))
        for p, rule in zip(params, rules, strict=True):
            rule.step(p.grad, 0.1, momentum, 0.3, 0.9)
            torch.testing.assert_close(p.double(), rule.weight, rtol=1e-3, atol=1e-3)
    assert torch.equal(unused, before)
    # Where torch's optimizers keep theirs, so that it is saved, loaded and forgotten with them.
    assert len(optimizer.state_dict()["state"]) == len(SHAPES)


# --- Groups ---


def tiny(dtype=torch.float32, **changes) -> GPT:
    sizes = dict(sequence_len=8, vocab_size=50, n_layer=4, n_head=2, n_kv_head=2, n_embd=32)
    sizes |= dict(window_pattern="SSSL", short_window=1 / 2, value_embedding_every=2)
    torch.manual_seed(1)
    return GPT(GPTConfig(**{**sizes, **changes}), written_out, dtype)


def groups_by_parameter(model: GPT) -> dict[str, tuple]:
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
        "lm_head.weight": ("head", train.UNEMBEDDING_LR * scale, betas),
        "wte.weight": ("tables", train.EMBEDDING_LR * scale, betas),
        "value_embedding.weight": ("tables", train.EMBEDDING_LR * scale, betas),
        "residual_scale": ("scalars", train.SCALAR_LR * train.RESIDUAL_LR_SCALE, betas),
        "skip_scale": ("skips", train.SCALAR_LR, train.SKIP_BETAS),
    }
    muon = dict(name="matrices", kind="muon", lr=train.MATRIX_LR, weight_decay=train.WEIGHT_DECAY)
    muon |= dict(momentum_from_to=train.MUON_MOMENTUM, beta2=train.MUON_BETA2)
    for name, (rule, group) in groups_by_parameter(tiny(n_embd=512)).items():
        own, lr, betas = next((wanted[end] for end in wanted if name.endswith(end)), (0, 0, 0))
        adamw = dict(name=own, lr=pytest.approx(lr), weight_decay=train.ADAM_WEIGHT_DECAY)
        adamw |= dict(kind="adamw", betas=betas, eps=train.ADAM_EPS)
        assert rule is (torch.optim.AdamW if lr else Muon), name
        assert group.items() >= (adamw if lr else muon).items(), name


class OddBlock(train.Block):
    """A layer with a gain and a matrix with bias."""

    def __init__(self, config, layer, attend):
        super().__init__(config, layer, attend)
        self.gain = nn.Parameter(torch.ones(config.n_embd))
        self.linear = nn.Linear(config.n_embd, config.n_embd)


def test_gains_and_biases_go_to_the_last_group_by_themselves(monkeypatch):
    monkeypatch.setattr(train, "Block", OddBlock)
    model = tiny()
    groups = {name: group["name"] for name, (_, group) in groups_by_parameter(model).items()}
    assert groups["blocks.0.linear.weight"] == "matrices"
    assert groups["blocks.0.gain"] == groups["blocks.0.linear.bias"] == "scalars"
    params = list(model.parameters())
    before = [p.detach().clone() for p in params]
    step(make_optimizers(model), params)
    assert not any(torch.equal(p, was) for p, was in zip(params, before, strict=True))


@pytest.mark.parametrize("shape", [(32, 32), (2, 32, 32)])
def test_a_weight_of_two_dimensions_or_more_that_no_group_names_is_an_error(shape, monkeypatch):
    """Before, it was trained at the scalars' rate, in silence."""
    model = tiny()
    model.blocks[1].experts = nn.Parameter(torch.zeros(shape))
    with pytest.raises(HarnessError) as failure:
        make_optimizers(model)
    assert str(failure.value).startswith(f"blocks.1.experts {shape} is in no group")
    name_one(monkeypatch, "matrices", lambda model: [model.blocks[1].experts])
    if len(shape) == 2:
        assert groups_by_parameter(model)["blocks.1.experts"][0] is Muon


def name_one(monkeypatch, group_name: str, more=lambda model: [], **changes) -> None:
    """An edit of parameter_groups: another member of a group, or other values."""
    original = train.parameter_groups

    def edited(model):
        groups = original(model)
        (group,) = [group for group in groups if group["name"] == group_name]
        group.update(changes)
        group["params"] = [*more(model), *group["params"]]
        return groups

    monkeypatch.setattr(train, "parameter_groups", edited)


def test_adamw_can_move_all_and_an_unknown_kind_is_an_error(monkeypatch):
    name_one(monkeypatch, "matrices", kind="adamw", lr=0.01)
    model = tiny()
    optimizers = make_optimizers(model)  # before: "optimizer got an empty parameter list"
    assert {type(optimizer) for optimizer in optimizers} == {torch.optim.AdamW}
    moved = [p for group in groups_of(optimizers) for p in group["params"]]
    assert len(moved) == len([*model.parameters()])
    train.apply_schedules(optimizers, 0.5, 3)
    step(optimizers, list(model.parameters()))
    name_one(monkeypatch, "matrices", kind="adamm")
    with pytest.raises(ValueError, match="adamm"):
        make_optimizers(model)


def test_a_parameter_belongs_to_the_first_group_that_names_it(monkeypatch):
    name_one(monkeypatch, "head", lambda model: [model.wte.weight])
    assert groups_by_parameter(tiny())["wte.weight"][1]["name"] == "head"


def test_layers_that_share_their_weights_are_updated_once():
    model = tiny()
    model.blocks = nn.ModuleList([model.blocks[1]] * 4)
    for group in groups_of(make_optimizers(model)):
        assert len(set(group["params"])) == len(group["params"]), group["name"]


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
        train.apply_schedules(optimizers, progress, 0)
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
    queries = dict(momentum_from_to=(0.7, 0.9), weight_decay=0.6, lr=0.3)
    name_one(monkeypatch, "matrices", **queries)
    name_one(monkeypatch, "tables", weight_decay=0.5)
    model = tiny()
    optimizers = make_optimizers(model)
    wanted = {group["name"]: group["lr"] / 2 for group in groups_of(optimizers)}
    for progress, number in ((0.0, 10), (0.9, 0), (0.75, 150)):  # scales never multiply up
        train.apply_schedules(optimizers, progress, number)
    groups = {group["name"]: group for group in groups_of(optimizers)}
    assert {name: group["lr"] for name, group in groups.items()} == pytest.approx(wanted)
    assert groups["matrices"]["weight_decay"] == pytest.approx(0.15)  # it falls to 0
    assert groups["tables"]["weight_decay"] == 0.5
    assert groups["matrices"]["momentum"] == pytest.approx(0.8)  # half of 300 steps
    train.apply_schedules(optimizers, 0.0, 10_000)
    assert groups["matrices"]["momentum"] == pytest.approx(0.9)


@pytest.mark.parametrize("progress", [1 + 1e-9, 1.5, -1e-9])
def test_progress_beyond_its_ends_counts_as_the_end(progress, monkeypatch):
    """Before, a microsecond too many gave a negative rate, or divided by zero."""
    for warmdown in (0.5, 0.0):
        monkeypatch.setattr(train, "WARMDOWN_RATIO", warmdown)
        optimizers = make_optimizers(tiny())
        train.apply_schedules(optimizers, progress, 0)
        got = [(group["lr"], group["weight_decay"]) for group in groups_of(optimizers)]
        train.apply_schedules(optimizers, min(max(progress, 0), 1), 0)
        assert got == [(group["lr"], group["weight_decay"]) for group in groups_of(optimizers)]
        assert all(lr >= 0 and decay >= 0 for lr, decay in got)
