"""The model: its size, its parts and its loss, against a second model written from the rules."""

import math
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from train import GPT, GPTConfig

FULL = GPTConfig(2048, 8192, n_layer=8, n_head=4, n_kv_head=4, n_embd=512)
REFERENCE = dict(
    SHORT_WINDOW=1 / 2,
    ROTARY_BASE=10_000,
    LOGIT_SOFT_CAP=15.0,
    VALUE_EMBEDDING_EVERY=2,
    SHIFT_KEYS=False,
    GATE_CHANNELS=32,
    EMBEDDING_STD=1.0,
    HEAD_STD=0.001,
    MATRIX_STD=1.0,
    RESIDUAL_START=1.0,
    SKIP_START=0.1,
)
TINY = dict(sequence_len=12, vocab_size=50, n_layer=4, n_head=4, n_kv_head=4, n_embd=32)


@pytest.fixture(autouse=True)
def _reference(monkeypatch):
    """The reference's constants, whatever train.py has come to."""
    for name, value in REFERENCE.items():
        monkeypatch.setattr(train, name, value)


def make_model(**changes) -> GPT:
    """A tiny model none of whose weights is zero, so that every part shows in the logits."""
    model = GPT(GPTConfig(**{**TINY, **changes}))
    model.init_weights(seed=1)
    generator = torch.Generator().manual_seed(2)
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    return model


def some_tokens(rows: int = 2, T: int = 12, seed: int = 3) -> torch.Tensor:
    return torch.randint(50, (rows, T), generator=torch.Generator().manual_seed(seed))


def full_size() -> GPT:
    with torch.device("meta"):  # shapes, but no memory
        return GPT(FULL)


def test_parameter_counts_are_the_reference_figures():
    model = full_size()
    counts = {
        "embedding": model.wte.weight.numel(),
        "head": model.lm_head.weight.numel(),
        "value embeddings": sum(p.numel() for p in model.value_embeds.parameters()),
        "matrices": sum(p.numel() for p in model.blocks.parameters()),
        "gates": sum(p.numel() for n, p in model.named_parameters() if "gate" in n),
        "scalars": model.residual_scales.numel() + model.skip_scales.numel(),
        "all": sum(p.numel() for p in model.parameters()),
    }
    assert counts == {
        "embedding": 4_194_304,
        "head": 4_194_304,
        "value embeddings": 16_777_216,
        "matrices": 25_166_336,
        "gates": 512,
        "scalars": 16,
        "all": 50_332_176,
    }


def test_flops_per_token_are_those_worked_out_by_hand():
    # Head and matrices multiply: 4,194,304 + 25,166,336. Windows SSSLSSSL, but L last: six of 1024,
    # two of 2048. 4 heads of 128.
    multiplied, windows = 4_194_304 + 25_166_336, 6 * 1024 + 2 * 2048
    assert full_size().flops_per_token() == 6 * multiplied + 12 * 4 * 128 * windows == 239_078_400


def test_last_layer_sees_the_whole_row():
    def windows(layers, pattern):
        return GPTConfig(2048, 8192, layers, 4, 4, 512, pattern).windows()

    assert windows(8, "SSSL") == [1024] * 3 + [2048] + [1024] * 3 + [2048]
    assert windows(6, "SSSL") == [1024] * 3 + [2048] + [1024] + [2048]
    assert windows(3, "S") == [1024, 1024, 2048]
    assert windows(1, "SSSL") == [2048]


@pytest.mark.parametrize("layers", range(1, 7))
def test_every_second_layer_from_the_last_has_value_embeddings(layers):
    model = make_model(n_layer=layers)
    wanted = {str(layer) for layer in range(layers - 1, -1, -2)}
    assert set(model.value_embeds) == wanted
    gated = {str(n) for n, block in enumerate(model.blocks) if block.attn.gate is not None}
    assert gated == wanted


# A second model, from FACTS.md's table: every step written out, one head and one token at a time.


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def turned(x: torch.Tensor, position: int) -> torch.Tensor:
    half = x.numel() // 2
    angles = torch.tensor([position * 10_000 ** (-i / half) for i in range(half)]).double()
    pairs = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half).double(), -angles)
    return torch.cat((pairs.real, pairs.imag))


def bigram_rows(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """The rows (T,) of the table for pairs that the model looks up."""
    rows = []
    handle = model.bigrams.register_forward_hook(lambda module, args, out: rows.append(args[0]))
    with torch.no_grad():
        model(tokens[None])
    handle.remove()
    return rows[0][0]


def k_shifted(k: torch.Tensor, t: int) -> torch.Tensor:
    """The key (D,) of token t from those of a head (T, D); its slower half is of t - 1."""
    if not train.SHIFT_KEYS:
        return k[t]
    quarter, key = k.size(1) // 4, k[t].clone()
    for slow in (slice(quarter, 2 * quarter), slice(3 * quarter, None)):
        key[slow] = k[t - 1, slow] if t else 0
    return key


def some_text_of(vocabulary: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).geometric(2 / vocabulary, length).astype(np.uint16) % 50


def guesses_after(text: np.ndarray, order: int) -> dict[tuple, Counter]:
    """What followed each context, counted the slow way; before the text stand zeros."""
    followers = defaultdict(Counter)
    tokens = [0] * (order - 1) + text.tolist()
    for at in range(order, len(tokens)):
        followers[tuple(tokens[at - order : at])][tokens[at]] += 1
    return followers


def guess(text: np.ndarray, order: int, tokens: list[int]) -> tuple[int, int]:
    """What followed the last tokens most often in the text, of equal ones the last; certainty."""
    context = tuple(([0] * order + tokens)[-order:])
    counts = guesses_after(text, order).get(context, Counter())
    most, token = max([(0, 0), *((count, token) for token, count in counts.items())])
    return token, 8 * most // (counts.total() + 1) + (most > 0)


def slow_logits(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) in float64 of one row of tokens (T,)."""
    w = {name: weight.detach().double() for name, weight in model.named_parameters()}
    config = model.config
    T, heads, D = len(tokens), config.n_head, config.n_embd // config.n_head
    per_key = heads // config.n_kv_head
    x = w["wte.weight"][tokens]
    if config.bigram_rows:
        x = x + w["bigrams.weight"][bigram_rows(model, tokens)]
    for order, table in zip(config.guess_orders, model.guesses.embeds, strict=True):
        E = table.weight.detach().double()
        for t in range(T):
            token, certainty = guess(TEXT, order, tokens[: t + 1].tolist())
            x[t] = x[t] + certainty / 8 * E[token] + E[config.vocab_size + certainty]
    x = x0 = unit(x)
    for layer in range(config.n_layer):
        own = {n.removeprefix(f"blocks.{layer}."): p for n, p in w.items()}
        x = w["residual_scales"][layer] * x + w["skip_scales"][layer] * x0
        y, out = unit(x), torch.zeros(T, heads * D).double()
        q, k, v = (y @ own[f"attn.c_{part}.weight"].T for part in "qkv")
        if (table := f"value_embeds.{layer}.weight") in w:
            gate_TH = 2 * torch.sigmoid(y[:, :32] @ own["attn.gate.weight"].T)
            v = v + gate_TH.repeat_interleave(D, dim=1) * w[table][tokens]
        whole = layer == config.n_layer - 1 or config.window_pattern[layer % 4] == "L"
        window = T if whole else config.sequence_len // 2
        for head in range(heads):
            mine, its = slice(head * D, head * D + D), slice(head // per_key * D, None)
            queries = [unit(turned(q[t, mine], t)) for t in range(T)]
            keys = [unit(turned(k_shifted(k[:, its][:, :D], t), t)) for t in range(T)]
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
        {},
        {"n_kv_head": 2},
        {"n_kv_head": 1, "n_layer": 3},
        {"n_layer": 1},
        {"n_embd": 64},
        {"bigram_rows": 97},
    ],
    ids=str,
)
def test_logits_are_those_of_the_model_written_out(changes):
    model, tokens = make_model(**changes), some_tokens(rows=1)
    model.guesses.fill(iter([TEXT]))
    wanted = slow_logits(model, tokens[0])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[0].double(), wanted, rtol=1e-4, atol=1e-4)


def test_logits_with_guesses_are_those_of_the_model_written_out(monkeypatch):
    monkeypatch.setattr(train, "GUESS_ROWS", 2**20)
    test_logits_are_those_of_the_model_written_out({"guess_orders": (1, 3)})


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_logits_with_shifted_keys_are_those_of_the_model_written_out(kv_heads, monkeypatch):
    monkeypatch.setattr(train, "SHIFT_KEYS", True)
    test_logits_are_those_of_the_model_written_out({"n_kv_head": kv_heads})


def test_with_shifted_keys_one_layer_finds_what_followed_an_earlier_token(monkeypatch):
    """Weights by hand: a query like a key's slow half meets the token after its own kind."""
    monkeypatch.setattr(train, "SHIFT_KEYS", True)
    A, B, C = torch.eye(16)[[4, 5, 12]]  # of 16 dimensions 4 … 7 and 12 … 15 turn slowly
    k = torch.stack([A, B, A, C]).view(1, 4, 1, 16)
    scores = train.shift(k)[0, :, 0] @ A
    assert scores.tolist() == [0, 1, 0, 1]  # at B and at C, which came after A


def test_a_bigrams_row_depends_on_the_pair_alone():
    model = make_model(bigram_rows=2**14, sequence_len=200)
    tokens = some_tokens(rows=1, T=200)[0] % 9
    rows = bigram_rows(model, tokens).tolist()
    pairs = list(zip([0, *tokens[:-1].tolist()], tokens.tolist(), strict=True))
    row_of = dict(zip(pairs, rows, strict=True))
    assert [row_of[pair] for pair in pairs] == rows
    assert len(set(rows)) > 0.9 * len(row_of) > 50  # few share one


def test_bigrams_start_as_if_they_were_not_there():
    plain, paired = (GPT(GPTConfig(**TINY, bigram_rows=rows)) for rows in (0, 97))
    for model in (plain, paired):
        model.init_weights(seed=1)
    with torch.no_grad():
        assert torch.equal(plain(some_tokens()), paired(some_tokens()))


def test_logits_are_float32_and_capped():
    model = make_model().place(SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16))
    model.lm_head.weight.data *= 1000
    logits = model(some_tokens())
    assert logits.dtype == torch.float32 and logits.shape == (2, 12, 50)
    assert logits.isfinite().all() and 14.9 < logits.abs().max() <= 15


@pytest.mark.parametrize("extra", [{}, {"bigram_rows": 97}, {"guess_orders": (1, 3)}])
def test_later_tokens_and_other_rows_change_nothing(extra):
    model, tokens = make_model(**extra), some_tokens()
    model.guesses.fill(iter([TEXT]))
    changed = tokens.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 50
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[0, :7], after[0, :7]) and torch.equal(before[1], after[1])
    assert (before[0, 7:] != after[0, 7:]).any(-1).all()


def test_short_rows_score_as_the_start_of_long_ones():
    model, tokens = make_model(), some_tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens[:, :5]), model(tokens)[:, :5])


def test_rotary_embedding_keeps_norms_and_relative_positions():
    cos, sin = make_model(sequence_len=64).cos, make_model(sequence_len=64).sin
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    q, k = (train.rotate(x.expand(1, 64, 1, 8), cos, sin)[0, :, 0] for x in (q, k))  # (T, D)
    torch.testing.assert_close(q.norm(dim=-1), q[0].norm().expand(64))
    scores = q @ k.T
    for distance in range(-20, 40, 7):  # on a diagonal, all scores are one
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[0].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert scores[:, 0].std() > 0.1  # and they do depend on the distance


# --- Guesses ---


TEXT = some_text_of(50, 3000)


def look_up(guesses: train.Guesses, rows: torch.Tensor) -> list[tuple]:
    """(token, certainty) of each order's guess at each place, read from the embeddings' input."""
    asked = []
    guesses.embeds.requires_grad_(False)
    for embed in guesses.embeds:
        embed.register_forward_pre_hook(lambda module, args: asked.append(args[0]))
    guesses(rows)
    certainties = [each - guesses.vocab_size for each in asked[1::2]]
    return list(zip(asked[::2], certainties, strict=True))


def test_guesses_are_what_followed_most_often(monkeypatch):
    monkeypatch.setattr(train, "GUESS_ROWS", 2**16)
    guesses = train.Guesses(GPTConfig(**TINY, guess_orders=(1, 2, 5)))
    text, other = some_text_of(8, 3000), some_text_of(8, 3000, seed=1)
    guesses.fill(iter([text]))
    rows = torch.from_numpy(other[:2000].astype(np.int64)).view(4, 500)
    places = unknown = lost = mistaken = 0
    for order, (tokens, certainties) in zip((1, 2, 5), look_up(guesses, rows), strict=True):
        followers = guesses_after(text, order)
        for row, row_tokens, row_certainties in zip(
            rows.tolist(), tokens, certainties, strict=True
        ):
            padded = [0] * (order - 1) + row
            for at in range(len(row)):
                counts = followers.get(tuple(padded[at : at + order]))
                if counts is None:
                    unknown += 1
                    mistaken += int(row_certainties[at] > 0)  # of one hash with another
                    continue
                places += 1
                if row_certainties[at] == 0:  # another context has its place
                    lost += 1
                    continue
                most = max(counts.values())
                assert counts[row_tokens[at].item()] == most
                assert row_certainties[at] == 8 * most // (counts.total() + 1) + 1
    assert places > 3000 and unknown > 300 and lost < places / 20 and mistaken < 3


def test_later_text_fills_empty_places_alone_and_up_to_the_limit(monkeypatch):
    config = GPTConfig(**TINY, guess_orders=(2, 3))
    first, second, both = (train.Guesses(config) for _ in range(3))
    texts = [some_text_of(50, 300, seed) for seed in range(2)]
    first.fill(iter(texts[:1]))
    second.fill(iter(texts[1:]))
    both.fill(iter(texts[:1]))
    both.fill(iter(texts[1:]))
    old = first.tables >= 0
    assert old.any() and both.tables[old].equal(first.tables[old])
    new = ~old & (second.tables >= 0)
    assert new.any() and both.tables[new].equal(second.tables[new])
    monkeypatch.setattr(train, "GUESS_TOKENS", 300)
    limited = train.Guesses(config)
    limited.fill(iter([np.zeros(0, np.uint16), *texts]))
    assert limited.tables.equal(first.tables)
    for nothing in ([], [np.zeros(0, np.uint16)], [np.ones(1, np.uint16)]):
        empty = train.Guesses(config)
        empty.fill(iter(nothing))
        assert (empty.tables == -1).all()


# --- Loss ---


def losses_and_gradients(model: GPT, loss: torch.Tensor) -> tuple:
    model.zero_grad()
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.numel()}


@pytest.mark.parametrize("tokens_at_once", [1, 7, 24, 100])  # of 24
def test_sliced_loss_and_its_gradients_are_autograds(tokens_at_once, monkeypatch):
    monkeypatch.setattr(train, "LOSS_SLICE", tokens_at_once)
    model, idx, targets = make_model(), some_tokens(), some_tokens(seed=4)
    model.lm_head.weight.data *= 5  # deep into the soft cap
    plain = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    wanted, wanted_gradients = losses_and_gradients(model, 3 * plain)
    loss, gradients = losses_and_gradients(model, 3 * model(idx, targets))
    assert loss == pytest.approx(wanted, rel=1e-5)
    for name, gradient in gradients.items():
        error = (gradient - wanted_gradients[name]).norm() / wanted_gradients[name].norm()
        assert error < 1e-5, name


def test_sliced_loss_in_bf16_is_near_float32():
    model, idx, targets = make_model(), some_tokens(), some_tokens(seed=4)
    model.lm_head.weight.data *= 0.2
    wanted, wanted_gradients = losses_and_gradients(model, model(idx, targets))
    model.place(SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16))
    loss, gradients = losses_and_gradients(model, model(idx, targets))
    assert loss == pytest.approx(wanted, rel=0.02)
    gradient, reference = (g["lm_head.weight"].float() for g in (gradients, wanted_gradients))
    assert (gradient - reference).norm() < 0.05 * reference.norm()


def test_reductions_agree():
    model, idx, targets = make_model(), some_tokens(), some_tokens(seed=4)
    with torch.no_grad():
        loss_BT = model(idx, targets, reduction="none")
        wanted = -model(idx).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        torch.testing.assert_close(loss_BT, wanted)
        torch.testing.assert_close(model(idx, targets, reduction="sum"), loss_BT.sum())
        torch.testing.assert_close(model(idx, targets), loss_BT.mean())
        torch.testing.assert_close(model(idx, targets, reduction="mean"), loss_BT.mean())


def test_trunk_and_loss_are_one_graph_each():
    """torch.compile meets nothing that it has to leave to Python."""
    model, idx = make_model(bigram_rows=97, guess_orders=(1, 3)), some_tokens()
    whole = dict(backend="eager", fullgraph=True, dynamic=False)
    x = torch.compile(model.hidden, **whole)(idx)
    torch.testing.assert_close(x, model.hidden(idx))
    rows = x.flatten(0, 1), idx.flatten(), model.lm_head.weight
    loss = torch.compile(train.loss_of_slice, **whole)(*rows)[0]
    torch.testing.assert_close(loss, train.loss_of_slice(*rows)[0])


def test_a_compiled_model_gives_the_same_and_can_be_made_eager_again(monkeypatch):
    compiled = []

    def recorded(function, **options):
        assert options == {"dynamic": False}
        compiled.append(function)
        return lambda *args: function(*args)

    monkeypatch.setattr(torch, "compile", recorded)
    model, idx = make_model(), some_tokens()
    wanted = model(idx), model(idx, idx)
    eager = model.trunk, model.capped_logits, model.loss_of_slice
    model.compile()
    assert compiled == list(eager)
    assert (model.trunk, model.capped_logits, model.loss_of_slice) != eager
    assert torch.equal(model(idx), wanted[0]) and torch.equal(model(idx, idx), wanted[1])
    model.run_eagerly()
    assert (model.trunk, model.capped_logits, model.loss_of_slice) == eager


# --- First weights ---


@pytest.fixture
def fresh():
    model = GPT(GPTConfig(32, 1000, n_layer=2, n_head=2, n_kv_head=2, n_embd=128))
    model.init_weights(seed=7)
    return model


def test_first_weights_have_the_reference_spread(fresh):
    uniform_bound = math.sqrt(3 / 128)
    for name, weight in fresh.named_parameters():
        n = weight.numel()
        if n == 0:
            continue
        if weight.ndim == 1:
            wanted = 1.0 if name == "residual_scales" else 0.1
            assert torch.equal(weight, torch.full_like(weight, wanted)), name
        elif "c_proj" in name or "gate" in name:
            assert not weight.any(), name
        elif name in ("wte.weight", "lm_head.weight"):
            std = 1.0 if name == "wte.weight" else 0.001
            # The standard error of a normal's deviation is s / √2n.
            assert abs(weight.std().item() - std) < 3 * std / math.sqrt(2 * n), name
            assert abs(weight.mean().item()) < 3 * std / math.sqrt(n), name
            assert weight.abs().max() > 3 * std, name  # it is no uniform
        else:
            # Of a uniform's: s · √(0.2 / n), as its fourth moment is 1.8 s⁴.
            std = 128**-0.5
            assert abs(weight.std().item() - std) < 3 * std * math.sqrt(0.2 / n), name
            assert abs(weight.mean().item()) < 3 * std / math.sqrt(n), name
            assert 0.99 * uniform_bound < weight.abs().max() <= uniform_bound, name


def test_first_weights_depend_on_the_seed_alone(fresh):
    again, other = GPT(fresh.config), GPT(fresh.config)
    torch.manual_seed(99)
    again.init_weights(seed=7)
    other.init_weights(seed=8)
    for name, weight in fresh.named_parameters():
        assert torch.equal(weight, again.get_parameter(name)), name
    assert not torch.equal(fresh.wte.weight, other.wte.weight)


def test_value_embeddings_start_at_their_full_weight(fresh):
    """The gate starts at zero, so 2·sigmoid gives 1: v is c_v(x) + table[token]."""
    seen = {}

    def attend(q, k, v, window):
        seen["v"] = v
        return torch.zeros_like(q)

    model = GPT(GPTConfig(32, 1000, n_layer=1, n_head=2, n_kv_head=2, n_embd=128), attend)
    model.init_weights(seed=1)
    idx = some_tokens(T=6)
    model(idx)
    x = train.norm(1.1 * train.norm(model.wte(idx)))  # r·x + s·x0, both the embedding
    wanted = model.blocks[0].attn.c_v(x) + model.value_embeds["0"](idx)
    torch.testing.assert_close(seen["v"].flatten(2), wanted)


def test_place_keeps_scalars_in_float32():
    model = make_model().place(SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16))
    for name, weight in model.named_parameters():
        wanted = torch.float32 if weight.ndim == 1 else torch.bfloat16
        assert weight.dtype == wanted, name
