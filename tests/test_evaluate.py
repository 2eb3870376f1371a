"""The metric: against a slow evaluation in float64 and arithmetic by hand; honest models pass.

The slow evaluation shares no code with prepare.py: from the text files and the raw ranks file on,
it splits, encodes, packs and scores by the definitions in its own words.
"""

import base64
import hashlib
import itertools
import math

import numpy as np
import pytest
import regex
import torch
import torch.nn.functional as F
from test_rows import slow_rows

import prepare

ODD_TEXTS = [
    "敏捷的棕色狐狸跳过了懒狗，然后消失在夜色里。".encode(),
    "😀 👩‍👩‍👧‍👦 🇫🇷🇯🇵 emoji, ZWJ and flags 🏴‍☠️".encode(),
    "Grüße, señor — naïve café à 3,50 £".encode("latin-1", errors="replace"),
    "半个字符".encode()[:-1] + b" \xf0\x9f\x98 cut in the middle \xe6\x95",
    b"plain words, and a\tfew <|reserved_0|> of another kind",
]


# The slow evaluation


def tokens_by_hand(prepared) -> dict[bytes, int]:
    """The raw ranks file: a line is a token's bytes in base64, and its number."""
    lines = (prepared.tokens / "tokenizer.tiktoken").read_text().split("\n")[:-1]
    return {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}


def encode_by_hand(text: str, numbers: dict[bytes, int]) -> list[int]:
    """BPE: in each match of the pattern join the pair with the lowest number, while any."""
    encoded = []
    for piece in regex.findall(prepare.SPLIT_PATTERN, text):
        parts = [bytes([byte]) for byte in piece.encode()]
        while True:
            pairs = enumerate(itertools.pairwise(parts))
            best, i = min(
                ((numbers.get(a + b, math.inf), i) for i, (a, b) in pairs), default=(math.inf, 0)
            )
            if best == math.inf:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        encoded += [numbers[part] for part in parts]
    return encoded


def validation_by_hand(folder, prepared) -> list[list[int]]:
    """Rows from the text files: those whose text's hash falls into the lowest tenth."""
    numbers = tokens_by_hand(prepared)
    documents = []
    for path in sorted(folder.iterdir()):
        text = path.read_bytes().decode("utf-8", errors="replace")
        digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        if int(digest, 16) < 2**64 / 10:
            documents.append([len(numbers), *encode_by_hand(text, numbers)])
    rows = slow_rows([len(document) for document in documents], prepare.MAX_SEQ_LEN + 1)
    rows = [[token for n, taken in row for token in documents[n][:taken]] for row in rows]
    return rows[: prepare.EVAL_TOKENS // prepare.MAX_SEQ_LEN]


@torch.no_grad()
def slow_bpb(model, rows: list[list[int]], numbers: dict[bytes, int]) -> float:
    """Sum over targets of -log2 of their probability, over the bytes of these targets."""
    length = {number: len(token) for token, number in numbers.items()}  # none for special ones
    bits, num_bytes = 0.0, 0
    model.eval()
    for row in rows:
        probs = model(torch.tensor([row[:-1]]))[0].double().softmax(-1)
        for position, target in enumerate(row[1:]):
            if target in length:
                bits -= math.log2(probs[position, target])
                num_bytes += length[target]
    model.train()
    return bits / num_bytes


# Models


class Table(torch.nn.Module):
    """Logits by the present token alone: the smallest honest model."""

    def __init__(self, logits_VV: torch.Tensor):
        super().__init__()
        self.logits_VV = torch.nn.Parameter(logits_VV)

    def forward(self, idx):
        return self.logits_VV[idx]


class Attention(torch.nn.Module):
    """An honest model that uses every earlier token."""

    def __init__(self, width: int = 32):
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(prepare.VOCAB_SIZE, width)
        self.qkv, self.head = torch.nn.Linear(width, 3 * width), torch.nn.Linear(width, 400)

    def forward(self, idx):
        x = self.table(idx)
        q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
        return self.head(x + F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])


def score(model, batch_size: int = 8) -> float:
    return prepare.evaluate_bpb(model, prepare.Tokenizer.from_directory(), batch_size)


# Laws


@pytest.fixture
def odd(small, tmp_path, monkeypatch):
    """`small`, with 500 more documents: other scripts, bytes that are no UTF-8, half characters."""
    folder = tmp_path / "odd"
    folder.mkdir()
    for path in (tmp_path / "text").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for n in range(500):
        order = np.random.default_rng(n).permutation(len(ODD_TEXTS))
        (folder / f"odd-{n}.txt").write_bytes(b" ".join(ODD_TEXTS[i] for i in order))
    monkeypatch.setattr(prepare, "DATASET", str(folder))
    return prepare.prepare()


def test_bpb_equals_a_slow_float64_evaluation_to_the_byte(odd, tmp_path):
    rows, numbers = validation_by_hand(tmp_path / "odd", odd), tokens_by_hand(odd)
    assert np.array_equal(rows, odd.rows()), "other rows than those that the rule packs"
    tokens = {number: token for token, number in numbers.items()}
    scored = b"".join(tokens.get(n, b"") for n in itertools.chain(*rows))
    assert "狐狸".encode() in scored and "😀".encode() in scored
    assert "Gr\ufffd\ufffde".encode() in scored, "latin-1 bytes become U+FFFD, three bytes each"
    halves = {
        n for row in rows for n in row if "\ufffd" in tokens.get(n, b"").decode(errors="replace")
    }
    assert halves, "no token was half a character: this test tests nothing"
    for model in (
        Attention(),
        Table(1e4 + torch.randn(400, 400)),  # far from zero
        Table(3 * torch.randn(400, 400).bfloat16()),
    ):
        expected = slow_bpb(model, rows, numbers)
        for batch_size in (1, 7, 64, 100):
            assert score(model, batch_size) == pytest.approx(expected, rel=1e-6), batch_size


def test_losses_do_not_depend_on_how_many_logits_are_taken_at_once(small, monkeypatch):
    model = Attention()
    whole = score(model)
    for tokens in (1, 5, 100):
        monkeypatch.setattr(prepare, "LOGITS_AT_ONCE", 400 * tokens)
        assert score(model) == pytest.approx(whole, rel=1e-9)


def test_evaluation_leaves_no_trace(small, monkeypatch):
    model = Attention()
    for number, module in enumerate(model.modules()):
        module.training = number % 3 == 0
    modes = [module.training for module in model.modules()]
    weights = [weight.clone() for weight in model.parameters()]
    random_state, seen = torch.get_rng_state(), []
    model.register_forward_hook(lambda *_: seen.extend(m.training for m in model.modules()))
    assert score(model) == score(model)
    assert seen and not any(seen), "not in eval mode while it was evaluated"
    assert torch.equal(torch.get_rng_state(), random_state)
    for weight, old in zip(model.parameters(), weights, strict=True):
        assert weight.grad is None and torch.equal(weight, old)
    assert [module.training for module in model.modules()] == modes
    monkeypatch.setattr(model, "forward", lambda idx: None)
    with pytest.raises(prepare.Refused):
        score(model)
    assert [module.training for module in model.modules()] == modes


class Limited(Table):
    """Runs out of memory above some number of rows."""

    most_rows = 5
    failure = torch.OutOfMemoryError("CUDA out of memory")

    def forward(self, idx):
        if len(idx) > self.most_rows:
            raise self.failure
        return super().forward(idx)


OUT_OF_MEMORY = [
    Limited.failure,
    RuntimeError("inductor: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("failure", OUT_OF_MEMORY)
def test_out_of_memory_halves_the_batch_and_says_so(failure, small, capsys):
    logits_VV = torch.randn(400, 400, generator=torch.Generator().manual_seed(0))
    expected = score(Table(logits_VV))
    capsys.readouterr()
    model = Limited(logits_VV)
    model.failure = failure
    assert score(model, 30) == pytest.approx(expected, rel=1e-9)
    said = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
    assert len(said) == 3  # 30, 15, 7: too many; 3 fits
    assert "3 rows at a time" in said[-1]
    model.most_rows = 0
    with pytest.raises(type(failure)):
        score(model, 4)


def test_another_failure_of_the_model_is_raised_at_once(small, capsys):
    model = Limited(torch.zeros(400, 400))
    model.failure = RuntimeError("a slip in the model")
    with pytest.raises(RuntimeError, match="a slip"):
        score(model, 30)
    assert "starting again" not in capsys.readouterr().out


def test_the_model_sees_nothing_but_tokens_in_memory_of_their_own(small):
    class Curious(Table):
        def forward(self, idx):
            assert idx.dtype == torch.int64 and idx.is_contiguous() and idx.grad_fn is None
            assert not torch.is_grad_enabled()
            assert idx._base is None
            assert idx.untyped_storage().nbytes() == 8 * idx.numel(), (
                "targets lie next to the inputs"
            )
            return super().forward(idx)

    for batch_size in (1, 100):
        score(Curious(torch.zeros(400, 400)), batch_size)


class Counting(Table):
    calls = 0

    def forward(self, idx):
        type(self).calls += 1
        return super().forward(idx)


@pytest.mark.parametrize(
    ("rows", "batch_size", "batches", "checks"),
    [(10_240, 128, 80, 2), (64, 8, 8, 2), (64, 100, 1, 2), (10_240, 16, 640, 16)],
)
def test_checks_cost_at_most_two_passes_or_a_fortieth(
    rows, batch_size, batches, checks, monkeypatch
):
    monkeypatch.setattr(Counting, "calls", 0)
    tokens = np.random.default_rng(0).integers(0, 9, (rows, 4)).astype(np.uint16)
    losses = prepare.checked_losses(Counting(torch.zeros(9, 9)), tokens, batch_size, 9)
    assert losses.shape == (rows, 3)
    assert Counting.calls == batches + checks
    assert checks <= max(2, batches / 40)  # at the GPU scale, 80 batches, 2.5 % more


# Honest models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_honest_models_are_never_refused(small, dtype):
    model = Attention().to(dtype)
    # NaN where no logit comes from, and a state that is no float
    model.register_buffer("unused", torch.full((3,), math.nan))
    model.register_buffer("scalar", torch.tensor(2, dtype=torch.int8))
    assert len({score(model, 16) for _ in range(20)}) == 1


@pytest.mark.gpu
def test_gpu_gives_the_number_of_the_cpu_and_refuses_no_honest_model(small):
    model = Attention()
    expected = score(model)
    assert score(model.to("cuda")) == pytest.approx(expected, rel=1e-4)
    model.bfloat16().compile(dynamic=False)
    assert len({score(model, 16) for _ in range(20)}) == 1
