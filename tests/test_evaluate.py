"""The metric: against a slow evaluation in float64 and arithmetic by hand; honest models pass.

The slow evaluation shares no code with prepare.py: from the text files and the raw ranks file on,
it splits, packs and scores by the definitions in its own words; tiktoken alone encodes for both.
"""

import base64
import hashlib
import itertools
import json
import math
import shutil

import numpy as np
import pytest
import tiktoken
import torch
import torch.nn.functional as F
from test_cheats import LOOKS, Uniform, score
from test_rows import slow_rows
from test_training import CUBLAS, FULL

import prepare

ODD_TEXTS = [
    "敏捷的棕色狐狸跳过了懒狗，然后消失在夜色里。".encode(),
    "😀 👩‍👩‍👧‍👦 🇫🇷🇯🇵 emoji, ZWJ and flags 🏴‍☠️".encode(),
    "Grüße, señor — naïve café à 3,50 £".encode("latin-1", errors="replace"),
    "半个字符".encode()[:-1] + b" \xf0\x9f\x98 cut in the middle \xe6\x95",
    b"plain words, and a\tfew <|reserved_0|> of another kind",
]


def validation_by_hand(texts: list[str], numbers: dict[bytes, int]) -> list[list[int]]:
    """Rows of the documents whose hashes are the lowest, up to a tenth of all bytes."""
    bpe = tiktoken.Encoding(
        "own",
        pat_str=prepare.SPLIT_PATTERN,
        mergeable_ranks=numbers,
        special_tokens={"BOS": len(numbers)},
    )
    most_bytes = sum(len(text.encode()) for text in texts) / 10
    documents = []
    for text in sorted(texts, key=lambda t: hashlib.blake2b(t.encode(), digest_size=8).digest()):
        most_bytes -= len(text.encode())
        if most_bytes < 0:
            break
        documents.append([bpe.n_vocab - 1, *bpe.encode_ordinary(text)])
    tokens = list(itertools.chain(*documents))
    starts = itertools.accumulate(map(len, documents), initial=0)
    pieces = [(start, len(document)) for start, document in zip(starts, documents, strict=False)]
    rows = slow_rows(pieces, prepare.MAX_SEQ_LEN + 1, 1000, keep_rest=False)
    rows = [[token for start, n in row for token in tokens[start : start + n]] for row in rows]
    return rows[: prepare.EVAL_TOKENS // prepare.MAX_SEQ_LEN]


@torch.no_grad()
def slow_bpb(model, rows: list[list[int]], numbers: dict[bytes, int]) -> float:
    """Sum over targets of -log2 of their probability, over the bytes of these targets."""
    length = {number: len(token) for token, number in numbers.items()}  # none for special ones
    bits, num_bytes = 0.0, 0
    for row in rows:
        probs = model(torch.tensor([row[:-1]]))[0].double().softmax(-1)
        for position, target in enumerate(row[1:]):
            if target in length:
                bits -= math.log2(probs[position, target])
                num_bytes += length[target]
    return bits / num_bytes


class Table(torch.nn.Module):
    """Logits by the present token alone: the smallest honest model.

    Runs out of memory, with `failure`, above `most_rows`.
    """

    def __init__(self, logits_VV: torch.Tensor, most_rows: float = math.inf, failure=None):
        super().__init__()
        self.logits_VV = torch.nn.Parameter(logits_VV)
        self.calls, self.most_rows, self.failure = 0, most_rows, failure

    def forward(self, idx):
        self.calls += 1
        if len(idx) > self.most_rows:
            raise self.failure
        return self.logits_VV[idx]


class Attention(torch.nn.Module):
    """An honest model that uses every earlier token."""

    def __init__(self, width: int = 32):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = torch.nn.Embedding(400, width), torch.nn.Linear(width, 400)

    def forward(self, idx):
        x = self.table(idx)[:, None]
        return self.head(x + F.scaled_dot_product_attention(x, x, x, is_causal=True))[:, 0]


def test_bpb_equals_a_slow_float64_evaluation_to_the_byte(own_text, monkeypatch):
    texts = [path.read_text(encoding="utf-8") for path in own_text.iterdir()]
    for n in range(500):  # other scripts, bytes that are no UTF-8, half characters
        order = np.random.default_rng(n).permutation(len(ODD_TEXTS))
        texts.append(b" ".join(ODD_TEXTS[i] for i in order).decode(errors="replace") + str(n))
    shutil.rmtree(own_text)
    own_text.mkdir()
    lines = [json.dumps({"text": text}) for text in texts]  # each a document, however long it is
    (own_text / "texts.jsonl").write_text("\n".join(lines))
    prepared = prepare.open_prepared()
    lines = (prepared.folder / "tokenizer.tiktoken").read_text().splitlines()
    numbers = {base64.b64decode(line.split()[0]): int(line.split()[1]) for line in lines}
    rows = validation_by_hand(texts, numbers)
    assert np.array_equal(rows, prepared.rows()), "other rows than those that the rule packs"
    tokens = {number: token for token, number in numbers.items()}
    scored = [tokens.get(n, b"") for n in itertools.chain(*rows)]
    for text in ("狐狸", "😀", "Gr\ufffd\ufffde"):  # latin-1 bytes become U+FFFD, three bytes each
        assert text.encode() in b"".join(scored)
    halves = [token for token in scored if "\ufffd" in token.decode(errors="replace")]
    assert halves, "no token was half a character: this test tests nothing"
    far_from_zero, coarse = 1e4 + torch.randn(400, 400), 3 * torch.randn(400, 400).bfloat16()
    for model in (Attention(), Table(far_from_zero), Table(coarse)):
        expected = slow_bpb(model, rows, numbers)
        for batch_size in (1, 7, 64, 100):
            assert score(model, batch_size) == pytest.approx(expected, rel=1e-6), batch_size


def test_uniform_model_scores_log2_vocab_over_mean_bytes(small):
    lengths_NT = prepare.Tokenizer.from_directory().token_lengths()[small.rows()[:, 1:]]
    mean_bytes = lengths_NT[lengths_NT > 0].mean()  # of the scored tokens, special ones left out
    expected = math.log2(400) / mean_bytes
    assert score(Table(torch.zeros(400, 400))) == pytest.approx(expected, rel=1e-6)


def test_evaluation_leaves_no_trace(small, monkeypatch):
    model = Attention()
    model.table.eval()
    modes = [module.training for module in model.modules()]
    weights = [weight.clone() for weight in model.parameters()]
    random_state, seen = torch.get_rng_state(), []
    model.register_forward_hook(lambda *_: seen.extend(m.training for m in model.modules()))
    model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    assert score(model) == score(model)
    assert seen and not any(seen), "not in eval mode, or with gradients, while it was evaluated"
    assert torch.equal(torch.get_rng_state(), random_state)
    for weight, old in zip(model.parameters(), weights, strict=True):
        assert weight.grad is None and torch.equal(weight, old)
    monkeypatch.setattr(model, "forward", lambda idx: None)
    with pytest.raises(prepare.HarnessError):
        score(model)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    "failure", [FULL, RuntimeError("inductor: out of memory"), RuntimeError(CUBLAS)]
)
def test_out_of_memory_halves_the_batch_and_says_so(failure, small, capsys):
    logits_VV = torch.randn(400, 400, generator=torch.Generator().manual_seed(0))
    expected = score(Table(logits_VV))
    for rows, fewer in ((32, (16, 8, 4)), (30, (15, 1))):  # 5 at most fit; what is odd becomes 1
        capsys.readouterr()
        assert score(Table(logits_VV, 5, failure), rows) == pytest.approx(expected, rel=1e-9)
        said = [line for line in capsys.readouterr().out.splitlines() if "out of memory" in line]
        assert said == [f"out of memory: going on with rows of evaluation = {n}" for n in fewer]
    for hopeless in (Table(logits_VV, 0, failure), Table(logits_VV, 5, RuntimeError("a slip"))):
        with pytest.raises(type(hopeless.failure), match=str(hopeless.failure)[:9]):
            score(hopeless, 6)
    assert hopeless.calls == 1, "a slip in the model was tried again"


@pytest.mark.parametrize(
    ("batch_size", "batches", "checks"), [(128, 80, 4), (10_240, 1, 2), (32, 320, 16)]
)
def test_checks_cost_at_most_two_batches_or_a_twentieth(batch_size, batches, checks):
    model = Table(torch.zeros(9, 9))
    tokens = np.random.default_rng(0).integers(0, 9, (10_240, 4)).astype(np.uint16)
    assert prepare.checked_losses(model, tokens, batch_size, 9).shape == (10_240, 3)
    assert model.calls == batches + checks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_honest_models_are_never_refused(small, dtype):
    model = Attention().to(dtype)
    # NaN where no logit comes from, and a state that is no float
    model.register_buffer("unused", torch.full((3,), math.nan))
    model.register_buffer("scalar", torch.tensor(2, dtype=torch.int8))
    assert len({score(model, 16) for _ in range(20)}) == 1


def test_a_model_that_never_predicts_special_tokens_is_honest_and_gains(small):
    masked_VV = torch.zeros(400, 400)
    masked_VV[:, 397:] = -math.inf  # all but BOS, of which rows hold some
    assert score(Table(masked_VV)) < score(Table(torch.zeros(400, 400)))


def test_the_checks_before_the_clock_see_training_rows_alone(small, monkeypatch):
    seen = []
    model = Table(torch.zeros(400, 400))
    model.register_forward_hook(lambda m, args, logits: seen.extend(args[0].tolist()))
    monkeypatch.setattr(prepare.Prepared, "rows", lambda self: pytest.fail("a scored row"))
    prepare.check_model(model, prepare.Tokenizer.from_directory(), 8)
    loader = prepare.make_dataloader(prepare.Tokenizer.from_directory(), 8, 32, "train")
    assert all(row in seen for row in next(loader)[0].tolist())
    assert len(seen) == 8 * 3 and model.training
    with pytest.raises(prepare.HarnessError, match="a loss that depends on"):
        future = Uniform(LOOKS["window off by one"])
        prepare.check_model(future, prepare.Tokenizer.from_directory(), 8)


def test_where_the_bits_go_is_said_by_position_and_by_length(small, capsys):
    model = Table(torch.zeros(400, 400))
    bpb = score(model)
    one, other = capsys.readouterr().out.splitlines()[-2:]
    assert one.startswith("bits a byte by position: 0 ") and one.count(" · ") == 7
    # A uniform guess costs log2(400) bits, whatever the token's length.
    shown = dict(part.split() for part in other.split(": ")[1].split(" · "))
    for length in range(1, 8):
        assert float(shown[str(length)]) == pytest.approx(math.log2(400) / length, abs=1e-3)
    assert float(shown["8"]) < bpb < float(shown["1"])


@pytest.mark.gpu
def test_gpu_gives_the_number_of_the_cpu_and_refuses_no_honest_model(small):
    model = Attention()
    expected = score(model)
    assert score(model.to("cuda")) == pytest.approx(expected, rel=1e-4)
    model.bfloat16().compile(dynamic=False)
    assert len({score(model, 16) for _ in range(20)}) == 1


def test_bits_of_nothing_are_an_error():
    with pytest.raises(ValueError, match="nothing was scored"):
        prepare.bits_per_byte(nats=1.0, num_bytes=0)
