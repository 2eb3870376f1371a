"""Ways to a lower number without a better model: refused.

Each cheat starts from a model that knows nothing, and would score better than that in a harness
without checks (`unchecked_bpb`). The checks draw where they look from the system's entropy; here
they draw from a fixed seed, so that every test gives the same answer each time.

Out of reach of checks in the same process: a model that read the validation file, was trained on
it, changes the harness, looks into its variables, answers the checks from memory, claims to be out
of memory to see everything twice, or looks ahead at one position of one row; and a lucky seed.
"""

import hashlib
import itertools
import json
import math
import shutil
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import some_text

import prepare

V, T = 400, 32
LOOKS_AHEAD = r"another loss when only later tokens and other rows .*row \d+, position \d+"
REMEMBERS = r"another loss when scored again: row \d+, position \d+"
CHANGES = "the model changed its"


@pytest.fixture(autouse=True)
def _same_secret(monkeypatch):
    fresh = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed=0: fresh(seed))


@pytest.fixture(scope="module")
def prepared_once(tmp_path_factory):
    text, cache = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("cache")
    for n in range(300):
        (text / f"{n}.txt").write_text(some_text(n, 1 + n % 7), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTORESEARCH_CACHE", str(cache))
        set_constants(patch, text)
        prepare.prepare()
    return text, cache


def set_constants(patch, text) -> None:
    values = {"DATASET": str(text), "VOCAB_SIZE": V, "MAX_SEQ_LEN": T, "EVAL_TOKENS": 64 * T}
    for name, value in values.items():
        patch.setattr(prepare, name, value)


@pytest.fixture
def small(prepared_once, tmp_path, monkeypatch):
    """A copy for every test: 300 documents of own text, V = 400, T = 32, 25 rows to score."""
    text, cache = prepared_once
    shutil.copytree(cache, tmp_path / "cache")
    set_constants(monkeypatch, text)
    prepared = prepare.open_prepared()
    assert prepared.tokens.is_relative_to(tmp_path) and len(prepared.rows()) == 25
    return prepared


def score(model, batch_size: int = 8) -> float:
    return prepare.evaluate_bpb(model, prepare.Tokenizer.from_directory(), batch_size)


@torch.no_grad()
def unchecked_bpb(model, prepared, batch_size: int = 8) -> float:
    """What a harness would print that trusts the model."""
    lengths_V = torch.from_numpy(prepare.Tokenizer.from_directory().token_lengths())
    nats, num_bytes = 0.0, 0
    for batch in torch.from_numpy(prepared.rows().astype(np.int64)).split(batch_size):
        inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:]
        loss = F.cross_entropy(model(inputs).mT, targets, reduction="none")
        nats += loss[lengths_V[targets] > 0].sum().item()
        num_bytes += lengths_V[targets].sum().item()
    return nats / math.log(2) / num_bytes


PLACE_T = torch.arange(T)


class Uniform(torch.nn.Module):
    """Knows nothing, honestly. What a cheat gets to know, from a `look`, it mixes in by half."""

    def __init__(self, look=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(V))
        self.look = look
        self.calls = self.rows = 0

    def forward(self, idx):
        self.calls += 1
        self.rows += len(idx)
        known_BTV = self.known(F.one_hot(idx, V).float(), idx)
        return torch.log(0.5 * known_BTV + 0.5 * self.weight.softmax(-1)).expand(*idx.shape, V)

    def known(self, seen_BTV, idx):
        """Probabilities, from the tokens as one-hot vectors and as numbers."""
        return self.look(seen_BTV, idx) if self.look else torch.full((V,), 1 / V)


def counted(counts_V):
    return (counts_V + 0.01) / (counts_V + 0.01).sum(-1, keepdim=True)


# Looking ahead, or at other rows


def alone_at(positions_T, guess_BTV):
    """Only there, and nothing elsewhere."""
    return torch.where(positions_T[:, None], guess_BTV, 1 / V)


def mean_over_time(seen_BTV, idx):
    return seen_BTV.mean(1, keepdim=True)


def attention_without_mask(seen_BTV, idx):
    scores_TT = -2.0 * (PLACE_T[None] - PLACE_T[:, None] - 1).abs()
    return scores_TT.softmax(-1) @ seen_BTV


def window_off_by_one(seen_BTV, idx):
    distance_TT = PLACE_T[:, None] - PLACE_T
    window_TT = ((distance_TT >= -1) & (distance_TT <= 3)).float()
    return window_TT / window_TT.sum(-1, keepdim=True) @ seen_BTV


def convolution_padded_on_the_wrong_side(seen_BTV, idx):
    kernel = torch.tensor([0.2, 0.3, 0.5]).expand(V, 1, 3)
    return F.conv1d(F.pad(seen_BTV.mT, (1, 1)), kernel, groups=V).mT


def backwards(seen_BTV, idx):
    """A recurrence that runs from the last token to the first."""
    state, states = torch.full_like(seen_BTV[:, 0], 1 / V), []
    for t in reversed(range(T)):
        states.append(state)
        state = 0.5 * state + 0.5 * seen_BTV[:, t]
    return torch.stack(states[::-1], dim=1)


def far_ahead(seen_BTV, idx):
    """At the last tokens of a row alone."""
    return seen_BTV[:, -4:].mean(1, keepdim=True)


def batch_statistics(seen_BTV, idx):
    return seen_BTV.mean((0, 1))


def other_rows_so_far(seen_BTV, idx):
    """The tokens of the whole batch up to the same position: nothing of the row's own future."""
    return counted(seen_BTV.cumsum(1).sum(0))


def row_above(seen_BTV, idx):
    return counted(seen_BTV.sum(1, keepdim=True)).roll(1, 0)


LOOKS = [mean_over_time, attention_without_mask, window_off_by_one, far_ahead, backwards]
LOOKS += [convolution_padded_on_the_wrong_side, batch_statistics, other_rows_so_far, row_above]


@pytest.mark.parametrize("batch_size", [2, 100])
@pytest.mark.parametrize("look", LOOKS)
def test_model_that_sees_the_future_or_other_rows_is_refused(look, batch_size, small):
    assert unchecked_bpb(Uniform(look), small, batch_size) < unchecked_bpb(Uniform(), small)
    with pytest.raises(prepare.Refused, match=LOOKS_AHEAD):
        score(Uniform(look), batch_size)


def test_look_ahead_is_refused_with_one_row_at_a_time_whatever_the_secret(small, monkeypatch):
    for seed in range(8):
        monkeypatch.setattr(
            np.random, "default_rng", lambda n=seed: np.random.Generator(np.random.PCG64(n))
        )
        for look in LOOKS[:3]:
            with pytest.raises(prepare.Refused, match=LOOKS_AHEAD):
                score(Uniform(look), 1)


@pytest.mark.parametrize("batch_size", [2, 100])
def test_look_at_other_rows_at_the_last_position_alone_is_refused(batch_size, small):
    guesses_VV = torch.rand(V, V, generator=torch.Generator().manual_seed(0)).softmax(-1)

    def checksum_of_row_above(seen_BTV, idx):
        return alone_at(PLACE_T == T - 1, guesses_VV[idx.sum(1, keepdim=True).roll(1, 0) % V])

    with pytest.raises(prepare.Refused, match=LOOKS_AHEAD):
        score(Uniform(checksum_of_row_above), batch_size)


def test_where_the_checks_look_is_drawn_from_the_systems_entropy(small, monkeypatch):
    seeds, fresh = [], np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda *seed: seeds.append(seed) or fresh(*seed))
    score(Uniform())
    assert seeds == [()]


# Remembering


class Cache(Uniform):
    """The tokens of all earlier batches, in a tensor that is no buffer."""

    def known(self, seen_BTV, idx):
        if self.calls == 1:
            self.counts_V = torch.zeros(V)
        known_V = counted(self.counts_V)
        self.counts_V = self.counts_V + seen_BTV.sum((0, 1))
        return known_V


class CacheAtTheLastPosition(Cache):
    def known(self, seen_BTV, idx):
        return alone_at(PLACE_T == T - 1, super().known(seen_BTV, idx))


class NGramTable(Uniform):
    """What followed each token in earlier batches, in a dictionary of Python's."""

    def known(self, seen_BTV, idx):
        if self.calls == 1:
            self.after = {}
        nothing = torch.zeros(V)
        known_BTV = counted(
            torch.stack([self.after.get(n, nothing) for n in idx.flatten().tolist()])
        )
        for row in idx.tolist():
            for token, following in itertools.pairwise(row):
                self.after.setdefault(token, torch.zeros(V))[following] += 1
        return known_BTV.view(*idx.shape, V)


class WeightsChangedByHook(Uniform):
    def __init__(self):
        super().__init__()
        self.register_forward_hook(self.learn)

    @staticmethod
    def learn(self, arguments, logits):
        self.weight += 0.05 * F.one_hot(arguments[0], V).sum((0, 1)).clamp(max=4)


class HidesItsWeights(WeightsChangedByHook):
    def named_parameters(self, *arguments, **options):
        return iter(())


class LearnsByGradient(Uniform):
    """A step of gradient descent on each batch that was scored."""

    def forward(self, idx):
        logits = self.weight.detach().clone().expand(*idx.shape, V)
        with torch.enable_grad():
            loss = F.cross_entropy(self.weight.expand(idx.numel(), V), idx.flatten())
            (slope,) = torch.autograd.grad(loss, self.weight)
        self.weight.data -= 20 * slope
        return logits


class ReplaysAnswers(Cache):
    """A cache that gives the old answer to a batch that it has seen before."""

    def forward(self, idx):
        answers = self.__dict__.setdefault("answers", {})
        key = hash(tuple(idx.flatten().tolist()))
        if key not in answers:
            answers[key] = super().forward(idx)
        return answers[key]


class PreviousBatch(Uniform):
    """A state that is handed from batch to batch."""

    def known(self, seen_BTV, idx):
        before, self.state = getattr(self, "state", seen_BTV[:1, :1].mean((0, 1))), None
        self.state = counted(seen_BTV.sum((0, 1)))
        return before


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize(
    "cheat",
    [
        Cache,
        CacheAtTheLastPosition,
        NGramTable,
        WeightsChangedByHook,
        HidesItsWeights,
        LearnsByGradient,
        ReplaysAnswers,
        PreviousBatch,
    ],
)
def test_model_that_remembers_earlier_batches_is_refused(cheat, batch_size, small):
    with torch.no_grad():
        assert unchecked_bpb(cheat(), small, batch_size) < unchecked_bpb(Uniform(), small)
    with pytest.raises(prepare.Refused, match=f"{REMEMBERS}|{LOOKS_AHEAD}"):
        score(cheat(), batch_size)


@pytest.mark.parametrize("change", ["buffer", "weight", "new buffer", "replaced weight"])
def test_model_that_changes_itself_is_refused_even_if_no_loss_shows_it(change, small):
    class Changes(Uniform):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros((), dtype=torch.int64), persistent=False)
            self.other = torch.nn.Parameter(torch.zeros(2))

        def known(self, seen_BTV, idx):
            if change == "buffer":
                self.count += 1
            elif change == "weight":
                self.other[0] = -0.0  # the same number, other bits
            elif change == "new buffer":
                self.register_buffer("fresh", torch.zeros(1))
            else:
                self.other = torch.nn.Parameter(torch.ones(2))
            return super().known(seen_BTV, idx)

    name = {"buffer": "count", "new buffer": "fresh"}.get(change, "other")
    with pytest.raises(prepare.Refused, match=f"{CHANGES} {name} while"):
        score(Changes())


# Knowing that one is being checked


class Sometimes(Uniform):
    """Looks ahead in those calls alone in which it is safe to."""

    def known(self, seen_BTV, idx):
        safe = self.safe(idx)
        return torch.where(safe, window_off_by_one(seen_BTV, idx), torch.full((V,), 1 / V))


class HonestAtFirst(Sometimes):
    def safe(self, idx):
        return torch.tensor(self.calls > 1)


class CheatsOnEverySecondBatch(Sometimes):
    def safe(self, idx):
        return torch.tensor(self.calls % 2 == 1)


class HonestOnceAllIsScored(Sometimes):
    """Cheats on every second batch, and no longer after the last."""

    def safe(self, idx):
        return torch.tensor(self.calls % 2 == 0 and self.rows <= 32)


class HonestToNoise(Sometimes):
    """Looks ahead only where the row reads like text: special tokens stand in no text."""

    def safe(self, idx):
        return (idx <= V - 4).all(1)[:, None, None]


class NotANumberWhenChecked(Uniform):
    """NaN is neither above nor below a tolerance."""

    def forward(self, idx):
        return super().forward(idx) + (0 if self.rows <= 32 else math.nan)

    known = staticmethod(window_off_by_one)


class ForgetsAtTheEnd(Cache):
    """Is at the end what it was for the first batch."""

    def known(self, seen_BTV, idx):
        known_V = super().known(seen_BTV, idx)
        if self.rows >= 32:
            self.counts_V = torch.zeros(V)
        return known_V


@pytest.mark.parametrize(
    "cheat",
    [
        HonestAtFirst,
        CheatsOnEverySecondBatch,
        HonestOnceAllIsScored,
        ForgetsAtTheEnd,
        NotANumberWhenChecked,
        HonestToNoise,
    ],
)
def test_model_that_behaves_while_it_is_checked_is_refused(cheat, small):
    assert unchecked_bpb(cheat(), small) < unchecked_bpb(Uniform(), small)
    with pytest.raises(prepare.Refused, match=f"{REMEMBERS}|{LOOKS_AHEAD}"):
        score(cheat())


def test_model_that_is_not_the_same_twice_is_refused(small):
    with pytest.raises(prepare.Refused, match=REMEMBERS):
        score(Uniform(lambda seen_BTV, idx: torch.rand(V).softmax(-1)))


# Logits of another kind


class Sub(torch.Tensor):
    pass


GOOD = torch.zeros(8, T, V)
NOT_LOGITS = {
    "nothing": lambda idx: None,
    "a tuple": lambda idx: (GOOD, None),
    "numpy": lambda idx: GOOD.numpy(),
    "a loss": lambda idx: torch.tensor(0.0),
    "losses": lambda idx: torch.zeros(8, T),
    "ints": lambda idx: GOOD.int(),
    "complex": lambda idx: GOOD.to(torch.complex64),
    "a subclass": lambda idx: GOOD.as_subclass(Sub),
    "a column too many": lambda idx: torch.zeros(8, T, V + 1),
    "a row too few": lambda idx: GOOD[1:],
    "flat": lambda idx: GOOD.flatten(0, 1),
    "one column": lambda idx: GOOD[..., :1],
}


@pytest.mark.parametrize("kind", NOT_LOGITS)
def test_anything_but_logits_is_refused_by_name(kind, small):
    model = Uniform()
    model.forward = NOT_LOGITS[kind]
    with pytest.raises(
        prepare.Refused, match=r"model\(idx\) gave .*, not .* \(B, T, V\) = \(8, 32, 400\)"
    ):
        score(model)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("row", "position", "column"), [(0, 0, 0), (24, 31, 399)])
def test_a_single_logit_that_is_not_finite_is_refused_by_its_place(
    value, row, position, column, small
):
    marked = small.rows()[row, :-1].astype(np.int64)

    class Spoiled(Uniform):
        def forward(self, idx):
            logits = super().forward(idx).clone()
            here_B = (idx == torch.from_numpy(marked)).all(1)
            logits[here_B, position, column] = value
            return logits

    for batch_size in (1, 100):
        with pytest.raises(prepare.Refused, match=f"not finite: row {row}, position {position}$"):
            score(Spoiled(), batch_size)


def test_model_that_asks_for_the_targets_is_refused(small):
    class Asks(Uniform):
        def forward(self, idx, targets):
            return F.one_hot(targets, V) * 99.0

    with pytest.raises(prepare.Refused, match="from tokens alone.*targets"):
        score(Asks())


# Tricks that change nothing


def test_methods_hung_on_the_logits_are_not_called(small):
    class Crafted(Uniform):
        def forward(self, idx):
            logits = super().forward(idx).clone()
            known = F.one_hot(idx.roll(-1, 1), V) * 99.0
            for name in ("split", "flatten", "float", "detach", "amin", "to", "view"):
                setattr(logits, name, lambda *_, **__: known)
            return logits

    assert score(Crafted()) == score(Uniform())


def test_writing_into_the_tokens_changes_nothing(small):
    class Writes(Uniform):
        def forward(self, idx):
            logits = super().forward(idx)
            idx.zero_()
            torch.as_strided(idx, (idx.untyped_storage().nbytes() // 8,), (1,), 0).zero_()
            return logits

    for batch_size in (1, 8):
        assert score(Writes(), batch_size) == pytest.approx(score(Uniform()), rel=1e-9)


def test_rewriting_the_rows_on_the_disk_meanwhile_changes_nothing(small):
    file = small.tokens / small.manifest["rows"]

    class Rewrites(Uniform):
        def forward(self, idx):
            with open(file, "r+b") as rows:
                rows.write(bytes(file.stat().st_size))
            return super().forward(idx)

    expected = score(Uniform())
    assert score(Rewrites()) == expected
    with pytest.raises(prepare.Refused, match=f"{file.name} was altered"):
        score(Uniform())


def test_lengths_of_a_tokenizer_object_are_not_asked_for(small):
    class Longer(prepare.Tokenizer):
        def token_lengths(self):
            return 2 * super().token_lengths()

    tokenizer = Longer.from_directory()
    assert prepare.evaluate_bpb(Uniform(), tokenizer, 8) == score(Uniform())


# Files


def test_tokenizer_with_other_tokens_is_refused(small):
    true = prepare.Tokenizer.from_directory()
    longer = {token * 2 if len(token) > 2 else token: rank for token, rank in true.ranks.items()}
    for tokenizer in (prepare.Tokenizer(longer), types.SimpleNamespace(ranks=longer), None):
        with pytest.raises(prepare.Refused, match="tokenizer is not the prepared one"):
            prepare.evaluate_bpb(Uniform(), tokenizer, 8)


@pytest.mark.parametrize("which", ["tokenizer.tiktoken", "rows"])
def test_altered_file_is_refused_and_the_remedy_in_the_message_works(which, small):
    expected, tokenizer = score(Uniform()), prepare.Tokenizer.from_directory()
    file = small.tokens / small.manifest.get(which, which)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    model = Uniform()
    with pytest.raises(prepare.Refused, match=f"{file.name} was altered") as refusal:
        prepare.evaluate_bpb(model, tokenizer, 8)
    assert model.calls == 0, "scored before the files were checked"
    folder, command = str(refusal.value).split("remove ")[1].split(", run: ")
    assert command == "uv run prepare.py"
    shutil.rmtree(folder)
    prepare.prepare()
    assert score(Uniform()) == expected


def test_rows_altered_together_with_their_hash_are_another_benchmark(small):
    before = prepare.benchmark_id(prepare.open_prepared())
    file = small.tokens / small.manifest["rows"]
    easy = np.full(file.stat().st_size // 2, 97, np.uint16).tobytes()
    file.write_bytes(easy)
    small.manifest["sha256"][file.name] = hashlib.sha256(easy).hexdigest()
    prepare.manifest_path().write_text(json.dumps(small.manifest))
    score(Uniform())
    assert prepare.benchmark_id(prepare.open_prepared()) != before
