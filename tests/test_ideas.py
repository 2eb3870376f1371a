"""One idea, one place: six ideas as patches of train.py, each of at most two places.

They are examples of what an agent writes in a night; each is trained for a few steps.
"""

from pathlib import Path
from types import ModuleType

import bench_gpu
import pytest
import torch
import torch.nn.functional as F

import train

SOURCE = Path(train.__file__).read_text(encoding="utf-8")
BOS = 46  # of 50 tokens, the last 4 are special

IDEAS = {
    "table of the token before": [
        (
            "        self.blocks = nn.ModuleList(",
            "        self.before = nn.Embedding(config.vocab_size, config.n_embd)\n"
            "        nn.init.zeros_(self.before.weight)\n"
            "        self.blocks = nn.ModuleList(",
        ),
        ("self.wte(idx)", "(self.wte(idx) + self.before(F.pad(idx, (1, 0))[:, :-1]))"),
    ],
    "gain in every layer": [
        (
            "        self.mlp = MLP(config)\n",
            "        self.mlp = MLP(config)\n"
            "        self.gain = nn.Parameter(torch.ones(config.n_embd))\n",
        ),
        ("x + self.mlp(norm(x))", "x + self.mlp(self.gain.to(x.dtype) * norm(x))"),
    ],
    "tied head": [
        (
            "        self.lm_head = Head(config)\n",
            "        self.lm_head = Head(config)\n        self.wte.weight = self.lm_head.weight\n",
        ),
    ],
    "z-loss": [
        (
            "        return loss.view_as(targets)",
            "        z_loss = 1e-2 * logits.logsumexp(-1).square()\n"
            "        loss = loss + (z_loss.mean() if reduction == 'mean' else z_loss.flatten())\n"
            "        return loss.view_as(targets)",
        ),
    ],
    "document mask": [  # written out; on a GPU, varlen_attn with the starts of documents is faster
        (
            "        self.window, self.attend =",
            "        self.bos = config.vocab_size - 4  # the first of 4 special tokens\n"
            "        self.window, self.attend =",
        ),
        (
            "        return self.c_proj(self.attend(q, k, v, self.window).reshape(B, T, C))",
            "        document = (idx == self.bos).cumsum(1)\n"
            "        seen = window_mask(T, self.window, x.device)\n"
            "        seen = seen & (document[:, :, None] == document[:, None])\n"
            "        q, k, v = (t.transpose(1, 2) for t in (q, k, v))\n"
            "        y = F.scaled_dot_product_attention(q, k, v, seen[:, None]).transpose(1, 2)\n"
            "        return self.c_proj(y.reshape(B, T, C))",
        ),
    ],
    "rate of the queries": [
        (
            "        dict(params=matrices,",
            "        dict(params=[block.attn.c_q.weight for block in blocks], lr=2 * MATRIX_LR,\n"
            "             momentum=(0.9, 0.9), weight_decay=0.0),\n"
            "        dict(params=matrices,",
        ),
    ],
}


def patched(patch: list[tuple[str, str]]) -> ModuleType:
    """train.py with these texts replaced, as a module."""
    source = SOURCE
    assert len(patch) <= 2
    for old, new in patch:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    module = ModuleType("train_with_an_idea")
    exec(compile(source, "train_with_an_idea.py", "exec"), vars(module))
    return module


class Trial:
    """A tiny model of a patched train.py, trained for some steps on rows that repeat themselves."""

    def __init__(self, patch: list[tuple[str, str]]):
        self.module = patched(patch)
        config = self.module.GPTConfig(16, 50, 2, 2, 2, 32)
        torch.manual_seed(0)
        self.model = self.module.GPT(config, self.module.written_out)
        self.optimizers = self.module.make_optimizers(self.model)
        self.groups = [g for optimizer in self.optimizers for g in optimizer.param_groups]
        self.rows = torch.randint(46, (8, 8)).repeat(1, 3)[:, :17]
        self.rows[:, [0, 8, 16]] = BOS
        self.before = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        self.losses = []
        for _ in range(12):
            loss = self.model(self.rows[:, :-1], self.rows[:, 1:])
            loss.backward()
            self.losses.append(loss.item())
            for optimizer in self.optimizers:
                optimizer.step()
            self.model.zero_grad(set_to_none=True)

    def group_of(self, name: str) -> dict:
        """The one group that the parameter is in; it has moved."""
        parameter = self.model.get_parameter(name)
        assert not torch.equal(parameter, self.before[name]), name
        (group,) = [g for g in self.groups if any(p is parameter for p in g["params"])]
        return group


@pytest.mark.parametrize("name", IDEAS)
def test_an_idea_is_written_in_two_places_at_most_and_learns(name):
    trial = Trial(IDEAS[name])
    assert trial.losses[-1] < 0.8 * trial.losses[0]
    assert {p for g in trial.groups for p in g["params"]} == set(trial.model.parameters())


def test_the_variants_of_bench_gpu_are_found_in_the_code():
    for constants in (*bench_gpu.VARIANTS.values(), *bench_gpu.PAIRS.values(), bench_gpu.TINY):
        for name in constants:
            known = hasattr(train, name) or hasattr(train.prepare, name)
            assert known if name.isidentifier() else SOURCE.count(name) == 1, name


def test_each_idea_does_what_it_says():
    plain, tied = Trial([]), Trial(IDEAS["tied head"])
    looked_up = Trial(IDEAS["table of the token before"])
    assert looked_up.group_of("before.weight") is looked_up.group_of("wte.weight")
    assert looked_up.model.flops_per_token() == plain.model.flops_per_token()
    gain = Trial(IDEAS["gain in every layer"]).group_of("blocks.1.gain")
    assert gain["betas"] == train.ADAM_BETAS
    assert tied.group_of("wte.weight")["lr"] == plain.group_of("lm_head.weight")["lr"]
    parameters = [sum(p.numel() for p in trial.model.parameters()) for trial in (plain, tied)]
    assert parameters[0] - parameters[1] == 50 * 32
    assert tied.model.flops_per_token() == plain.model.flops_per_token()  # it multiplies, once
    queries = Trial(IDEAS["rate of the queries"])
    own, others = (queries.group_of(f"blocks.0.attn.c_{part}.weight") for part in "qk")
    assert own["lr"] == 2 * others["lr"] and own["step"] == others["step"] == 12
    assert own["weight_decay"] == 0 < others["weight_decay"] and own["momentum"] == (0.9, 0.9)


def test_a_z_loss_is_in_the_loss_and_not_in_the_logits():
    trial = Trial(IDEAS["z-loss"])
    idx, targets = trial.rows[:, :-1], trial.rows[:, 1:]
    logits = trial.model(idx)
    wanted = F.cross_entropy(logits.mT, targets, reduction="none")
    wanted = wanted + 1e-2 * logits.logsumexp(-1).square()
    torch.testing.assert_close(trial.model(idx, targets), wanted.mean())
    torch.testing.assert_close(trial.model(idx, targets, "none"), wanted)


def test_with_a_document_mask_none_sees_another():
    rows = torch.tensor([[BOS, 1, 2, 3, BOS, 4, 5, 6], [BOS, 7, 8, 9, BOS, 4, 5, 6]])
    for patch, masked in ((IDEAS["document mask"], True), ([], False)):
        one, other = Trial(patch).model(rows)
        assert not torch.allclose(one[1:4], other[1:4])
        assert torch.allclose(one[4:], other[4:], atol=1e-5) == masked
