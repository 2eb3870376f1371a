"""The model: its size, its parts and its loss, against a second model written from the rules."""

import copy
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from train import GPT, GPTConfig, written_out

FULL = dict(sequence_len=2048, vocab_size=8192, n_layer=8, n_head=4, n_kv_head=4, n_embd=512)
FULL |= dict(window_pattern="SSSL", short_window=1 / 2, value_embedding_every=2)
REFERENCE = dict(
    **dict(ROTARY_BASE=10_000, LOGIT_SOFT_CAP=15.0, GATE_CHANNELS=32),
    **dict(MLP_RATIO=4, EMBEDDING_STD=1.0, HEAD_STD=0.001, MATRIX_STD=1.0),
    **dict(RESIDUAL_START=1.0, SKIP_START=0.1),
)
TINY = dict(FULL, sequence_len=12, vocab_size=50, n_layer=4, n_embd=32)


@pytest.fixture(autouse=True)
def _reference(monkeypatch):
    """The reference's constants, whatever train.py has come to."""
    for name, value in REFERENCE.items():
        monkeypatch.setattr(train, name, value)


def make_model(dtype=torch.float32, **changes) -> GPT:
    """A tiny model none of whose weights is zero, so that every part shows in the logits."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(**{**TINY, **changes}), written_out, dtype)
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn(weight.shape)
    return model


def some_tokens(rows: int = 2, T: int = 12, seed: int = 3) -> torch.Tensor:
    return torch.randint(50, (rows, T), generator=torch.Generator().manual_seed(seed))


def gradients_of(model: GPT, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def off_by(some: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((some - wanted).norm() / wanted.norm()).item()


# --- Size ---


def full_size(module=train) -> GPT:
    with torch.device("meta"):  # shapes, but no memory
        return module.GPT(module.GPTConfig(**FULL), module.written_out)


def test_parameter_counts_and_flops_are_the_reference_figures():
    model = full_size()
    assert model.wte.weight.numel() == model.lm_head.weight.numel() == 4_194_304
    assert sum(p.numel() for p in model.tables()) == 4_194_304 + 16_777_216
    assert sum(p.numel() for n, p in model.named_parameters() if "gate" in n) == 512
    assert sum(p.numel() for p in model.parameters() if p.ndim < 2) == 16
    assert sum(p.numel() for p in model.parameters()) == 50_332_176
    # Head and matrices multiply: 4,194,304 + 25,166,336. Windows SSSLSSSL: six of 1024, two of
    # 2048. 4 heads of 128.
    multiplied, windows = 4_194_304 + 25_166_336, 6 * 1024 + 2 * 2048
    assert model.flops_per_token() == 6 * multiplied + 12 * 4 * 128 * windows == 239_078_400


def at_scale(is_cuda: bool) -> ModuleType:
    """train.py as it is on a machine with CUDA, or without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: is_cuda)
        module = ModuleType("train_at_a_scale")
        patch.setitem(sys.modules, module.__name__, module)  # where a dataclass looks
        exec(Path(train.__file__).read_text(encoding="utf-8"), vars(module))
    return module


def test_between_the_scales_only_numbers_differ():
    """At most 14 of them, none that decides what GPT makes of a GPTConfig; and a name."""
    models, constants = [], []
    for module in (at_scale(True), at_scale(False)):
        models.append([(n, p.shape) for n, p in full_size(module).named_parameters()])
        named = {n: v for n, v in vars(module).items() if n.isupper() and type(v) is not type}
        del named["SCALE"], named["BACKENDS"]
        constants.append(named)
    assert models[0] == models[1]
    one, other = constants
    differing = [name for name in one if one[name] != other[name]]
    assert 0 < len(differing) <= 14, differing
    assert all(isinstance(v[name], int | float) for v in constants for name in differing)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`")
def test_the_gpu_scale_traced_without_a_gpu_has_its_shapes_and_types_and_fits(monkeypatch):
    """On fake tensors, which hold no numbers, with torch's own fake of Flash Attention.

    The graph is cut into forward and backward as the compiler cuts it, by what they keep.
    """
    gpu, compile, kept, graphs = at_scale(True), torch.compile, {}, []
    cut = torch._dynamo.lookup_backend("aot_eager_decomp_partition")

    def backend(graph, inputs):
        graphs.append(graph)
        return cut(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile(f, **{**kw, "backend": backend}))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with FakeTensorMode():
        model = gpu.GPT(gpu.GPTConfig(**FULL), gpu.torch_varlen, torch.bfloat16)
        torch.nn.Module.compile(model, dynamic=False, fullgraph=True)
        tokens = torch.zeros(gpu.DEVICE_BATCH_SIZE, 2048, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(tokens, tokens)
        loss.backward()
        assert len(graphs) == 1
        assert all(p.grad.dtype == loss.dtype == torch.float32 for p in model.parameters())
        for optimizer in gpu.make_optimizers(model):
            optimizer.step()
        # Beside what is kept: weights' gradients, the optimizers' two means, that of the logits.
        peak = sum(kept.values()) + 3 * 4 * 50_332_176 + 2 * tokens.numel() * 8192
        assert 20e9 < peak < 28e9, peak
        with torch.no_grad():
            logits = model(tokens[: gpu.EVAL_BATCH_SIZE])
        assert logits.shape == (gpu.EVAL_BATCH_SIZE, 2048, 8192) and logits.dtype == torch.float32
        assert 4 * logits.numel() < 3e9
    torch.compiler.reset()


# --- Against a second model, from FACTS.md's table: one head and one token at a time ---


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def turned(x: torch.Tensor, position: int) -> torch.Tensor:
    half = x.numel() // 2
    angles = torch.tensor([position * 10_000 ** (-i / half) for i in range(half)]).double()
    pairs = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half).double(), -angles)
    return torch.cat((pairs.real, pairs.imag))


def slow_logits(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) in float64 of one row of tokens (T,)."""
    w = {name: weight.detach().double() for name, weight in model.named_parameters()}
    config = model.config
    T, heads, D = len(tokens), config.n_head, config.n_embd // config.n_head
    per_key = heads // config.n_kv_head
    x = x0 = unit(w["wte.weight"][tokens])
    for layer in range(config.n_layer):
        own = {n.removeprefix(f"blocks.{layer}."): p for n, p in w.items()}
        x = own["residual_scale"] * x + own["skip_scale"] * x0
        y, out = unit(x), torch.zeros(T, heads * D).double()
        q, k, v = (y @ own[f"attn.c_{part}.weight"].T for part in "qkv")
        if (config.n_layer - 1 - layer) % config.value_embedding_every == 0:
            gate_TH = 2 * torch.sigmoid(y[:, :32] @ own["attn.gate.weight"].T)
            table = own["attn.value_embedding.weight"]
            v = v + gate_TH.repeat_interleave(D, dim=1) * table[tokens]
        whole = layer == config.n_layer - 1 or config.window_pattern[layer % 4] == "L"
        window = T if whole else int(config.sequence_len * config.short_window)
        for head in range(heads):
            mine, its = slice(head * D, head * D + D), slice(head // per_key * D, None)
            queries = [unit(turned(q[t, mine], t)) for t in range(T)]
            keys = [unit(turned(k[t, its][:D], t)) for t in range(T)]
            for t in range(T):
                seen = range(max(0, t - window), t + 1)
                scores = torch.stack([queries[t] @ keys[s] for s in seen]) / D**0.5
                weights = scores.exp() / scores.exp().sum()
                out[t, mine] = sum(p * v[s, its][:D] for p, s in zip(weights, seen, strict=True))
        x = x + out @ own["attn.c_proj.weight"].T
        inner = (unit(x) @ own["mlp.c_fc.weight"].T).clamp(min=0) ** 2
        x = x + inner @ own["mlp.c_proj.weight"].T
    return 15 * torch.tanh(unit(x) @ w["lm_head.weight"].T / 15)


@pytest.mark.parametrize(
    "changes",
    [
        *({}, {"n_kv_head": 2}, {"n_kv_head": 1, "n_layer": 3}, {"n_layer": 1}, {"n_embd": 64}),
        {"short_window": 1 / 4, "value_embedding_every": 1},
    ],
    ids=str,
)
def test_logits_are_those_of_the_model_written_out(changes):
    model, tokens = make_model(**changes), some_tokens(rows=1)
    with torch.no_grad():
        logits = model(tokens)[0].double()
    torch.testing.assert_close(logits, slow_logits(model, tokens[0]), rtol=1e-4, atol=1e-4)


# --- Loss and gradients ---


def test_loss_is_the_cross_entropy_of_the_logits():
    model, idx, targets = make_model(), some_tokens(), some_tokens(seed=4)
    with torch.no_grad():
        wanted = -model(idx).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        torch.testing.assert_close(model(idx, targets, reduction="none"), wanted)
        torch.testing.assert_close(model(idx, targets, reduction="sum"), wanted.sum())
        torch.testing.assert_close(model(idx, targets), wanted.mean())


def test_gradients_do_not_depend_on_the_number_of_micro_batches():
    """In bf16, of the same tokens: off by 0.0026 at most; summed in bf16, by 0.0043 at least."""
    model, summed = make_model(torch.bfloat16), {}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    model.lm_head.weight.data *= 0.2
    idx, targets = some_tokens(rows=64), some_tokens(rows=64, seed=4)
    assert model(idx).dtype == torch.float32
    for count in (1, 4, 16):
        batches = list(zip(idx.chunk(count), targets.chunk(count), strict=True))
        parts = [gradients_of(model, model(*batch) / count) for batch in batches]
        model.zero_grad()
        for batch in batches:
            (model(*batch) / count).backward()
        summed[count] = {n: p.grad for n, p in model.named_parameters() if p.ndim > 1}
    for name, wanted in summed[1].items():
        assert wanted.dtype == torch.float32, name
        assert off_by(summed[4][name], wanted) < 0.0035, name
        assert off_by(summed[16][name], wanted) < 0.0035, name
        in_bf16 = sum((part[name].bfloat16() for part in parts[1:]), parts[0][name].bfloat16())
        assert off_by(in_bf16.float(), wanted) > 0.0035, name


# --- Compiled ---


@pytest.fixture
def graphs(monkeypatch):
    """torch.compile without a compiler: the graphs that it would get, run as they are."""
    made, compile = [], torch.compile

    def backend(graph, inputs):
        made.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda f, **kw: compile(f, **{**kw, "backend": backend}))
    yield made
    torch.compiler.reset()


def test_each_kind_of_layer_is_compiled_once_and_gives_the_same(graphs):
    # Of 8 layers: short window without and with value embedding, whole row with one; and the head.
    model, idx, targets = make_model(n_layer=8), some_tokens(), some_tokens(seed=4)
    loss, logits = model(idx, targets), model(idx)
    wanted = gradients_of(model, loss)
    model.compile()
    compiled_loss = model(idx, targets)
    assert len(graphs) == 3 + 1
    torch.testing.assert_close(compiled_loss, loss)
    for name, gradient in gradients_of(model, compiled_loss).items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)
    torch.testing.assert_close(model(idx), logits)


def test_on_cuda_the_model_is_one_graph(monkeypatch):
    compiled, model = [], make_model()
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled.append(self))
    model.compile()
    assert compiled == [*model.blocks, model.lm_head]
    del compiled[:], model.wte
    model.wte = SimpleNamespace(weight=SimpleNamespace(is_cuda=True))
    model.compile()
    assert compiled == [model]


def test_a_copy_of_a_compiled_model_computes_with_its_own_weights(graphs):
    """The beginning of averaged weights. And an edit of the original's shows in its own logits."""
    model, idx = make_model(n_layer=2), some_tokens()
    model.compile()
    with torch.no_grad():
        for edited in ("lm_head.weight", "blocks.0.mlp.c_fc.weight", "wte.weight"):
            before, copied = model(idx), copy.deepcopy(model)
            copied.get_parameter(edited).mul_(0.5)
            after = copied(idx)
            assert not torch.allclose(after, before) and torch.equal(model(idx), before), edited
            model.get_parameter(edited).mul_(0.5)
            torch.testing.assert_close(model(idx), after)


# --- First weights ---


def test_a_matrix_says_how_it_starts():
    """Before, a deviation left out meant zeros: two of them multiplied never learn."""
    with pytest.raises(TypeError, match="std"):
        train.Linear(4, 4)


def test_the_soft_cap_is_a_hyperbolic_tangent_also_far_out():
    head = train.Head(GPTConfig(**TINY))
    z = torch.tensor([-1e4, -300.0, -15.0, -1e-3, 0.0, 1.0, 40.0, 700.0, 1e4])
    head.weight.data = z[:, None] / 32**0.5 * torch.ones(32) / 32**0.5
    x = torch.ones(1, 1, 32, requires_grad=True)
    logits = head(x)
    torch.testing.assert_close(logits[0, 0], 15 * torch.tanh(z / 15), rtol=1e-4, atol=1e-5)
    logits.sum().backward()
    assert x.grad.isfinite().all() and head.weight.grad.isfinite().all()


def test_first_weights_have_the_reference_spread():
    torch.manual_seed(7)
    sizes = dict(sequence_len=32, vocab_size=1000, n_layer=2, n_head=2, n_kv_head=2, n_embd=128)
    fresh = GPT(GPTConfig(**{**FULL, **sizes}), written_out)
    for name, weight in fresh.named_parameters():
        if weight.ndim == 0:
            assert weight.item() == pytest.approx(1.0 if "residual" in name else 0.1), name
            continue
        if "c_proj" in name or "gate" in name:
            assert not weight.any(), name
            continue
        normal = {"wte.weight": 1.0, "lm_head.weight": 0.001}.get(name)
        std, n = normal or 128**-0.5, weight.numel()
        # The standard error of a deviation: a normal's is s / √2n, a uniform's s · √(0.2 / n), as
        # its fourth moment is 1.8 s⁴.
        error = std * ((0.5 if normal else 0.2) / n) ** 0.5
        assert abs(weight.std().item() - std) < 3 * error, name
        assert abs(weight.mean().item()) < 3 * std / n**0.5, name
        largest = weight.abs().max() / std
        assert largest > 3 if normal else 0.99 * 3**0.5 < largest <= 1.0001 * 3**0.5, name


def test_a_gpus_model_built_by_its_sizes_alone_has_the_first_columns_numbers():
    source = Path(train.__file__).read_text(encoding="utf-8")
    fields = train.GPTConfig.__dataclass_fields__
    for constant, field in (
        ("SHORT_WINDOW", "short_window"),
        ("VALUE_EMBEDDING_EVERY", "value_embedding_every"),
    ):
        (first_column,) = re.findall(rf"^{constant} = scale\((.+?),", source, re.M)
        assert eval(first_column) == fields[field].default
