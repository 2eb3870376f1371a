"""Ways to a lower number without a better model: refused.

Each cheat starts from a model that knows nothing, and would look better than that in a harness
without checks. These draw where they look from the system's entropy; here from a fixed seed.

Out of reach of checks in the same process: a model that read the validation file, was trained on
it, changes the harness, looks into its variables, claims to be out of memory to see everything
twice, looks ahead at one position of one row, or remembers rows and tells random tokens from text;
and a lucky seed.
"""

import hashlib
import math
import shutil
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prepare

V, T = 400, 32  # those of `small`, with 25 rows to score
OTHER = r"row \d+, position \d+: the model gave a loss that depends on later tokens, on other rows"
REFUSED = f"{OTHER}|foresaw tokens drawn at random|the model changed its weight"


@pytest.fixture(autouse=True)
def _same_secret(monkeypatch):
    fresh = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed=0: fresh(seed))


def score(model, batch_size: int = 8) -> float:
    return prepare.evaluate_bpb(model, prepare.Tokenizer.from_directory(), batch_size)


def refused(match: str):
    return pytest.raises(prepare.HarnessError, match=match)


@torch.no_grad()
def unchecked_nats(model, prepared, batch_size: int = 8) -> float:
    """The mean loss that a harness would print that trusts the model."""
    batches = torch.from_numpy(prepared.rows().astype(np.int64)).split(batch_size)
    losses = [F.cross_entropy(model(x[:, :-1].contiguous()).mT, x[:, 1:]) * len(x) for x in batches]
    return sum(losses).item() / sum(map(len, batches))


NOTHING = torch.full((V,), 1 / V)


class Uniform(torch.nn.Module):
    """Knows nothing, honestly. What a cheat knows, probabilities, it mixes in by half.

    `know(m, x, idx)`: from the model and the tokens, one-hot (B, T, V) and as numbers.
    """

    def __init__(self, know=lambda m, x, idx: NOTHING):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(V))
        self.know, self.kept, self.calls, self.rows = know, {}, 0, 0

    def forward(self, idx):
        self.calls, self.rows = self.calls + 1, self.rows + len(idx)
        honest_V = self.weight.softmax(-1)
        known_BTV = self.know(self, F.one_hot(idx, V).float(), idx)
        return torch.log(0.5 * known_BTV + 0.5 * honest_V).expand(*idx.shape, V)


def counted(counts_V):
    return (counts_V + 0.01) / (counts_V + 0.01).sum(-1, keepdim=True)


PLACE_T = torch.arange(T)
LAST_TV = PLACE_T[:, None] == T - 1
AHEAD_TT = PLACE_T - PLACE_T[:, None]  # how far a column's token stands ahead of the row's


def look(weights_TT):
    """What attention with these weights, a convolution or a recurrence sees."""
    weights_TT = weights_TT.float() / weights_TT.sum(-1, keepdim=True).clamp(min=1e-9)
    return lambda m, x, idx: weights_TT @ x


LOOKS = {
    "mean of the row": look(torch.ones(T, T)),
    "attention without a mask": look((-2.0 * (AHEAD_TT - 1).abs()).softmax(-1)),
    "window off by one": look((AHEAD_TT <= 1) & (AHEAD_TT >= -3)),
    "convolution padded on the wrong side": look((AHEAD_TT + 2) * (AHEAD_TT.abs() <= 1)),
    "end of the row": look((PLACE_T >= T - 4).expand(T, T)),
    "recurrence from the end": look(0.5 ** AHEAD_TT.clamp(min=1) * (AHEAD_TT > 0)),
    "batch statistics": lambda m, x, idx: x.mean((0, 1)),
    # The whole batch up to the same position: nothing of the row's own future.
    "other rows so far": lambda m, x, idx: counted(x.cumsum(1).sum(0)),
    "row above": lambda m, x, idx: counted(x.sum(1, keepdim=True)).roll(1, 0),
}


def cache(m, x, idx):
    """The tokens of all earlier batches, in a tensor that is no buffer."""
    counts_V = m.kept.setdefault("counts", torch.zeros(V))
    known_V = counted(counts_V)
    counts_V += x.sum((0, 1))
    return known_V


def cache_that_replays(m, x, idx):
    """Gives the old answer to a batch that it has seen before."""
    key = tuple(idx.flatten().tolist())
    if key not in m.kept:
        m.kept[key] = cache(m, x, idx)
    return m.kept[key]


def cache_emptied(m, x, idx):
    """Is at the end what it was for the first batch: 24 or 6 batches, and two probes."""
    known_V = cache(m, x, idx)
    if m.rows >= 25:
        m.kept.clear()
    return known_V


def gradient_step(m, x, idx):
    """Gradient descent on each batch that was scored."""
    with torch.enable_grad():
        loss = F.cross_entropy(m.weight.expand(idx.numel(), V), idx.flatten())
        (slope,) = torch.autograd.grad(loss, m.weight)
    m.weight.data -= 20 * slope
    return NOTHING


def hidden_weights(m, x, idx):
    m.named_parameters = lambda *arguments, **options: iter(())
    return gradient_step(m, x, idx)


REMEMBER = {
    "cache": cache,
    "cache that replays": cache_that_replays,
    "cache emptied at the end": cache_emptied,
    "cache at the last position": lambda *a: torch.where(LAST_TV, cache(*a), NOTHING),
    "gradient step": gradient_step,
    "hidden weights": hidden_weights,
}


def if_safe(safe, otherwise=NOTHING):
    """Looks ahead in those calls, or those rows, alone in which it is safe to."""
    harm = LOOKS["window off by one"]
    return lambda *a: torch.where(torch.as_tensor(safe(a[0], a[-1])), harm(*a), otherwise)


def like_text(m, idx):
    """Whether all pairs of neighbours in a row (B, 1, 1) stand in the scored rows: no noise."""
    if "pairs" not in m.kept:
        rows = prepare.open_prepared().rows().astype(np.int64)
        m.kept["pairs"] = torch.zeros(V, V, dtype=torch.bool)
        m.kept["pairs"][rows[:, :-1], rows[:, 1:]] = True
    return m.kept["pairs"][idx[:, :-1], idx[:, 1:]].all(1)[:, None, None]


BEHAVE = {
    "honest at first": if_safe(lambda m, idx: m.calls > 1),
    "on every second batch": if_safe(lambda m, idx: m.calls % 2 == 1),
    "not after the third": if_safe(lambda m, idx: m.calls <= 3),
    "honest to noise": if_safe(like_text),
    # It is neither above nor below a tolerance.
    "not a number": if_safe(like_text, otherwise=NOTHING * math.nan),
}


def row_above_if_all_are_text(m, x, idx):
    known_BTV = LOOKS["row above"](m, x, idx)
    return known_BTV if like_text(m, idx).all() else NOTHING


def answers_for_the_original(m, x, idx):
    """Looks ahead; a row that begins as one before gets the answers that that one got."""
    known_BTV = LOOKS["window off by one"](m, x, idx).clone()
    for row, tokens in enumerate(idx.tolist()):
        known_BTV[row] = m.kept.setdefault(tuple(tokens[:4]), known_BTV[row].clone())
    return known_BTV


def repeats_itself(know):
    """As far as a row is one that it was shown, it answers as then; else by what it knows."""

    def repeat(m, x, idx):
        known_BTV = know(m, x, idx).clone()
        for row, tokens in enumerate(idx.tolist()):
            for position in range(T):
                answers = m.kept.setdefault(tuple(tokens[: position + 1]), known_BTV[row, position])
                known_BTV[row, position] = answers
        return known_BTV

    return repeat


NEXT = look(AHEAD_TT == 1)
RARELY = PLACE_T[:, None] % 4 == 0
REMEMBER_ROWS = {
    "answers for the original": answers_for_the_original,
    "repeats itself": repeats_itself(NEXT),
    "repeats itself, rarely": repeats_itself(lambda *a: torch.where(RARELY, NEXT(*a), NOTHING)),
}
CHEATS = [(name, know, rows) for name, know in LOOKS.items() for rows in (2, 100)]
CHEATS += [(name, know, rows) for name, know in REMEMBER.items() for rows in (4, 8)]
CHEATS += [(name, know, rows) for name, know in REMEMBER_ROWS.items() for rows in (8, 100)]
CHEATS += [(name, know, 8) for name, know in BEHAVE.items()]
# Before, a batch was all rows or all probes, and noise in one row betrayed the others.
CHEATS += [("row above, where no row is noise", row_above_if_all_are_text, 2)]


@pytest.mark.parametrize(
    ("know", "batch_size"),
    [pytest.param(know, rows, id=f"{name}-{rows}") for name, know, rows in CHEATS],
)
def test_look_at_the_future_other_rows_or_earlier_batches_is_refused(know, batch_size, small):
    assert unchecked_nats(Uniform(know), small, batch_size) < math.log(V) - 1e-4
    with refused(REFUSED):
        score(Uniform(know), batch_size)


def test_look_ahead_is_refused_with_one_row_at_a_time_whatever_the_secret(small, monkeypatch):
    fresh = np.random.Generator
    for name in ("mean of the row", "attention without a mask", "window off by one"):
        refusals = 0
        for seed in range(12):
            secret = fresh(np.random.PCG64(seed))
            monkeypatch.setattr(np.random, "default_rng", lambda *_, s=secret: s)
            try:
                score(Uniform(LOOKS[name]), 1)
            except prepare.HarnessError:
                refusals += 1
        assert refusals >= 10, name  # by one altered row, whose first random token may be its own


def test_what_remembers_and_tells_noise_from_text_is_seen_by_no_check_as_the_table_says(small):
    shrewd = repeats_itself(lambda *a: torch.where(like_text(a[0], a[-1]), NEXT(*a), NOTHING))
    assert score(Uniform(shrewd)) < 0.9 * score(Uniform())


def test_random_tokens_may_be_foreseen_as_often_as_chance_allows_it():
    def judge(num_foreseen: int) -> None:
        prepare.refuse_foresight(np.where(np.arange(1000) < num_foreseen, 0, np.inf), V)

    with warnings.catch_warnings(action="error"):
        prepare.refuse_foresight(np.full(1000, math.log(V)), V)
        for num_foreseen in (0, 17):  # 2.5 in the mean: 17 log(17 / 2.5) - 17 + 2.5 = 18.1 < 20
            judge(num_foreseen)
    for num_foreseen in (18, 500):  # 18 log(18 / 2.5) - 18 + 2.5 = 20.03
        with refused("foresaw tokens drawn at random"):
            judge(num_foreseen)


def test_look_at_other_rows_at_the_last_position_alone_is_refused(small, monkeypatch):
    guesses_VV = torch.rand(V, V, generator=torch.Generator().manual_seed(0)).softmax(-1)

    def checksum_of_row_above(m, x, idx):
        return torch.where(LAST_TV, guesses_VV[idx.sum(1, keepdim=True).roll(1, 0) % V], NOTHING)

    # A row as it is shows it, in one probe of two; now and then two guesses are as good.
    numbers = np.random.default_rng
    for batch_size in (2, 100):
        refusals = 0
        for seed in range(8):
            monkeypatch.setattr(np.random, "default_rng", lambda s=seed: numbers(s))
            try:
                score(Uniform(checksum_of_row_above), batch_size)
            except prepare.HarnessError:
                refusals += 1
        assert refusals >= 7


CHANGES = [
    ("count", lambda m: m.count.add_(1)),
    ("other", lambda m: m.other.fill_(-0.0)),  # the same number, other bits
    ("other", lambda m: setattr(m, "other", torch.nn.Parameter(torch.ones(2)))),
    ("fresh", lambda m: m.register_buffer("fresh", torch.zeros(1))),
]


def test_model_that_learns_from_scored_rows_and_then_runs_out_of_memory_is_refused(small):
    """Before, the second attempt compared its weights with those that it had learned."""

    def learn_once(model, x, idx):
        if model.calls < 3:
            model.weight.data.add_(1.0)
        if model.calls == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return NOTHING

    with refused("the model changed its weight while"):
        score(Uniform(learn_once))


def test_what_was_refused_is_not_tried_again_whatever_its_name_says(small):
    model = Uniform(lambda m, x, idx: (m.get_buffer("out of memory").add_(1), NOTHING)[1])
    model.register_buffer("out of memory", torch.zeros(1))
    with refused("changed its out of memory while"):
        score(model)
    assert model.calls == math.ceil(len(small.rows()) / 8) + 2  # once: its batches and probes


@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_model_that_changes_itself_is_refused_even_if_no_loss_shows_it(name, change, small):
    model = Uniform(lambda m, x, idx: (change(m), NOTHING)[1])
    model.register_buffer("count", torch.zeros((), dtype=torch.int64), persistent=False)
    model.other = torch.nn.Parameter(torch.zeros(2))
    with refused(f"the model changed its {name} while"):
        score(model)


class Sub(torch.Tensor):
    pass


GOOD = torch.zeros(8, T, V)
NOT_LOGITS = {
    **{"nothing": None, "a tuple": (GOOD, None), "numpy": GOOD.numpy(), "ints": GOOD.int()},
    **{"complex": GOOD.to(torch.complex64), "a subclass": GOOD.as_subclass(Sub)},
    **{"losses": GOOD[..., 0], "one column": GOOD[..., :1], "a row too few": GOOD[1:]},
    **{"a column too many": torch.zeros(8, T, V + 1), "flat": GOOD.flatten(0, 1)},
}


@pytest.mark.parametrize("kind", NOT_LOGITS)
def test_anything_but_logits_is_refused_by_name(kind, small):
    model = Uniform()
    model.forward = lambda idx: NOT_LOGITS[kind]
    with refused(r"model\(idx\) gave .*, not .* \(B, T, V\) = \(8, 32, 400\)"):
        score(model)


class Spoiled(Uniform):
    """One logit is `value` where a row has begun as the marked one does."""

    def __init__(self, row, position, column, value):
        super().__init__()
        self.marked, self.place = row, (position, column, value)

    def forward(self, idx):
        logits, (position, column, value) = torch.zeros(*idx.shape, V), self.place
        begun = (idx == self.marked)[:, : position + 1].all(1)
        logits[begun, position, column] = value
        return logits


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("row", "position"), [(0, 0), (24, 31)])
def test_a_loss_that_is_not_finite_is_refused_by_its_place(value, row, position, small):
    marked = torch.from_numpy(small.rows()[row].astype(np.int64))
    target, other = marked[position + 1], (marked[position + 1] + 1) % V
    for batch_size in (1, 100):
        for column in (target, other):
            model = Spoiled(marked[:-1], position, column, value)
            if value == -math.inf and column == other:
                # A token that is never right, said so: the others share its probability.
                assert score(model, batch_size) < score(Uniform(), batch_size)
                continue
            with refused(f"^row {row}, position {position}: the model gave a loss that is not fin"):
                score(model, batch_size)


def test_model_that_asks_for_the_targets_or_is_not_the_same_twice_is_refused(small):
    model = Uniform(lambda *_: torch.rand(V).softmax(-1))
    with refused(OTHER):
        score(model)
    model.forward = lambda idx, targets: F.one_hot(targets, V) * 99.0
    with pytest.raises(TypeError, match="targets"):
        score(model)


def test_methods_hung_on_the_logits_are_not_called(small):
    class Crafted(Uniform):
        def forward(self, idx):
            logits = super().forward(idx).clone()
            known = F.one_hot(idx.roll(-1, 1), V) * 99.0
            for name in ("split", "flatten", "float", "detach", "to", "view"):
                setattr(logits, name, lambda *_, **__: known)
            return logits

    assert score(Crafted()) == score(Uniform())


def test_tampering_with_tokens_or_files_meanwhile_changes_nothing(small):
    file = small.folder / "rows.bin"

    def tamper(m, x, idx):
        # Its memory holds nothing else: no targets to read.
        assert idx._base is None and idx.untyped_storage().nbytes() == 8 * idx.numel()
        idx.zero_()
        with open(file, "r+b") as rows:
            rows.write(bytes(file.stat().st_size))
        return NOTHING

    expected = score(Uniform())
    assert score(Uniform(tamper)) == expected
    with refused(f"{file.name} was altered"):
        score(Uniform())


def test_tokenizer_with_other_tokens_is_refused_and_its_lengths_are_not_asked_for(small):
    class Longer(prepare.Tokenizer):
        def token_lengths(self):
            return 2 * super().token_lengths()

    true = Longer.from_directory()
    assert prepare.evaluate_bpb(Uniform(), true, 8) == score(Uniform())
    longer = {token * 2 if len(token) > 2 else token: rank for token, rank in true.ranks.items()}
    for tokenizer in (prepare.Tokenizer(longer), types.SimpleNamespace(ranks=longer), None):
        with refused("tokenizer is not the prepared one"):
            prepare.evaluate_bpb(Uniform(), tokenizer, 8)


@pytest.mark.parametrize("which", ["tokenizer.tiktoken", "rows"])
def test_altered_file_is_refused_and_with_its_hash_is_another_benchmark(which, small):
    expected, tokenizer = score(Uniform()), prepare.Tokenizer.from_directory()
    file = small.folder / "rows.bin" if which == "rows" else small.folder / which
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    model = Uniform()
    with refused(f"{file.name} was altered") as refusal:
        prepare.evaluate_bpb(model, tokenizer, 8)
    assert model.calls == 0, "scored before the files were checked"
    before = prepare.benchmark_id(small)
    small.sha256[file.name] = hashlib.sha256(content).hexdigest()
    assert prepare.benchmark_id(small) != before
    # The remedy in the message works.
    folder, command = str(refusal.value).split("remove ")[1].split(", run: ")
    assert command == "uv run prepare.py"
    shutil.rmtree(folder)
    prepare.open_prepared()
    assert score(Uniform()) == expected
