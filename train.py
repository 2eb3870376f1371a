"""One experiment: train a small language model for TIME_BUDGET seconds and print its val_bpb.

The agent's file: everything in it may change. What it is judged by stands in prepare.py.

    uv run train.py > run.log 2>&1

B batch (rows) · T time · C width · H heads · D head width · V vocabulary. A bare `x` is (B, T, C).
"""

import ctypes
import faulthandler
import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, count, pairwise
from pathlib import Path
from platform import processor, release
from typing import NamedTuple

# Above the import of torch, so that total_seconds counts it; importing this file reads no clock.
STARTED_S = time.perf_counter() if __name__ == "__main__" else None
IS_WSL = "microsoft" in release().lower()
# torch reads these when it is imported. The first lets its compiler cache graphs with Flash
# Attention 3: a warm-up is 5 s shorter. The second makes waiting threads of a CPU spin less: beside
# a busy program a step takes a third less time, on an idle machine 1 % more (bench_threads.py). The
# third spares a test of the CPU's vector instructions: 10 s of a first run, 2 s of any other.
os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
if not IS_WSL:  # in WSL, drivers before R615 fail with expandable segments
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import get_total_norm
from tqdm import tqdm

import prepare
from prepare import MAX_SEQ_LEN, TIME_BUDGET, HarnessError, say

# --- Hyperparameters -----------------------------------------------------------

SCALE = "gpu" if torch.cuda.is_available() else "small"


def scale(gpu, small):
    """Two columns: the number for a machine with CUDA, and that for one without."""
    return gpu if SCALE == "gpu" else small


DEPTH = scale(8, 4)  # layers
ASPECT_RATIO = scale(64, 40)  # width = DEPTH x ASPECT_RATIO, rounded up to a multiple of HEAD_DIM
HEAD_DIM = scale(128, 80)
N_KV_HEAD = 0  # heads of keys and values; must divide the number of query heads; 0: equal to it
WINDOW_PATTERN = "SSSL"  # tiled over the layers: S short, L the whole row; the last is always L
SHORT_WINDOW = scale(1 / 2, 1 / 4)  # of a row
ROTARY_BASE = 10_000
LOGIT_SOFT_CAP = 15.0
VALUE_EMBEDDING_EVERY = scale(2, 1)  # in every n-th layer, counted down from the last
GATE_CHANNELS = 32  # the first channels of a layer's input decide how much value embedding it adds
MLP_RATIO = 4  # width of an MLP's hidden layer, in widths of the model

EMBEDDING_STD = 1.0
HEAD_STD = 0.001
MATRIX_STD = 1.0  # x width^-1/2; value embeddings use it, too
RESIDUAL_START = 1.0  # r: how much of x a layer keeps
SKIP_START = 0.1  # s: how much of the normalised embedding it adds

TOTAL_BATCH_SIZE = scale(2**19, 2**12)  # tokens a step
DEVICE_BATCH_SIZE = 64  # rows at a time, if a step has as many; halved where memory is short
EVAL_BATCH_SIZE = scale(32, 8)  # rows at a time; memory holds all their logits
EMBEDDING_LR = scale(0.6, 0.5)  # x (width / 768)^-1/2
UNEMBEDDING_LR = scale(0.004, 0.01)  # x (width / 768)^-1/2
MATRIX_LR = scale(0.04, 0.015)
SCALAR_LR = 0.5
RESIDUAL_LR_SCALE = 0.01  # of SCALAR_LR: for r, and for a gain or bias that you bring in
ADAM_BETAS = (0.8, 0.95)
SKIP_BETAS = (0.96, 0.95)  # for s
ADAM_EPS = 1e-10
ADAM_WEIGHT_DECAY = 0.0
WEIGHT_DECAY = 0.2  # of the matrices; falls to 0 with progress
MUON_MOMENTUM = (0.85, 0.95)  # from, to
MUON_MOMENTUM_STEPS = 300
MUON_BETA2 = 0.95
WARMUP_RATIO = 0.0  # of the time budget
WARMDOWN_RATIO = scale(0.5, 0.7)
FINAL_LR_FRAC = 0.0
SEED = os.environ.get("SEED", "42")  # a run with another one tells a gain from luck

ATTENTION = ""  # "": chosen for this machine, and checked; or a name of BACKENDS, not checked
QUERY_BLOCK = 128  # queries at a time, where attention is written out
TRIAL_PROGRESS = (0.0, 0.5, 1.0)  # a trial step at each, on weights that are thrown away
MAX_LOSS = 100.0  # a run beyond it is ended
LOG_LINES = 25
DIAGNOSED_AT = (0.25, 0.5, 0.75, 0.98)  # of the time budget
HUNG_AFTER_S = TIME_BUDGET + 300  # most that warm-up and training may take, each

# --- Model ---------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The sizes of a model; with the constants above, all that decides what it is."""

    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    window_pattern: str
    # By default as on a GPU, whose model can so be built anywhere from the sizes above:
    short_window: float = 1 / 2
    value_embedding_every: int = 2

    def windows(self) -> list[int]:
        """For each layer, how many tokens before itself a token sees."""
        sizes = {"S": int(self.sequence_len * self.short_window), "L": self.sequence_len}
        pattern = self.window_pattern
        windows = [sizes[pattern[layer % len(pattern)]] for layer in range(self.n_layer)]
        windows[-1] = self.sequence_len
        return windows


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotate(x_BTHD: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (arXiv 2104.09864): a head's first half is paired with its second."""
    a, b = x_BTHD.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


class Linear(nn.Linear):
    """A matrix without bias, in float32, that is multiplied in the type of its input.

    Of two in a row at most one may start at std=0: else neither gets a gradient.
    """

    def __init__(self, inputs: int, outputs: int, std: float):
        super().__init__(inputs, outputs, bias=False)
        bound = 3**0.5 * std  # a uniform on ±√3·s has standard deviation s, and no outliers
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class CausalSelfAttention(nn.Module):
    """Attention with QK norm (arXiv 2010.04245) and value embeddings (ResFormer, 2410.17897)."""

    def __init__(self, config: GPTConfig, layer: int, attend: Callable):
        super().__init__()
        self.attend = attend
        self.window = config.windows()[layer]
        self.head_counts = [config.n_head, config.n_kv_head, config.n_kv_head]  # of q, k, v
        C = config.n_embd
        kv_width = C // config.n_head * config.n_kv_head
        std = MATRIX_STD * C**-0.5
        self.c_q = Linear(C, C, std)
        self.c_k = Linear(C, kv_width, std)
        self.c_v = Linear(C, kv_width, std)
        self.c_proj = Linear(C, C, std=0.0)
        self.value_embedding = None
        layers_above = config.n_layer - 1 - layer
        if layers_above % config.value_embedding_every == 0:
            self.value_embedding = nn.Embedding(config.vocab_size, kv_width)
            bound = 3**0.5 * std  # as in Linear
            nn.init.uniform_(self.value_embedding.weight, -bound, bound)
            self.gate = Linear(min(GATE_CHANNELS, C), config.n_kv_head, std=0.0)

    def forward(self, x, idx, cos, sin):
        B, T, C = x.shape
        # Three weights, as Muon orthogonalizes each; one product, as that is faster.
        weight = torch.cat([self.c_q.weight, self.c_k.weight, self.c_v.weight])
        qkv = F.linear(x, weight.to(x.dtype)).view(B, T, sum(self.head_counts), -1)
        q, k, v = qkv.split(self.head_counts, dim=2)  # each (B, T, H, D)
        if self.value_embedding is not None:
            # At first the gate is 2 sigmoid(0) = 1.
            gate_BTH = 2 * torch.sigmoid(self.gate(x[..., : self.gate.in_features]))
            v = v + gate_BTH.unsqueeze(-1) * self.value_embedding(idx).to(x.dtype).view_as(v)
        q = norm(rotate(q, cos, sin))
        k = norm(rotate(k, cos, sin))
        y = self.attend(q, k, v, self.window)
        return self.c_proj(y.reshape(B, T, C))


class MLP(nn.Module):
    """Two layers with a squared ReLU (Primer, arXiv 2109.08668)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C = config.n_embd
        self.c_fc = Linear(C, MLP_RATIO * C, std=MATRIX_STD * C**-0.5)
        self.c_proj = Linear(MLP_RATIO * C, C, std=0.0)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """A layer: x <- r·x + s·x0, then attention and MLP of the normalised x are added."""

    def __init__(self, config: GPTConfig, layer: int, attend: Callable):
        super().__init__()
        self.residual_scale = nn.Parameter(torch.tensor(float(RESIDUAL_START)))  # r
        self.skip_scale = nn.Parameter(torch.tensor(float(SKIP_START)))  # s
        self.attn = CausalSelfAttention(config, layer, attend)
        self.mlp = MLP(config)

    def forward(self, x, x0, idx, cos, sin):
        x = self.residual_scale.to(x.dtype) * x + self.skip_scale.to(x.dtype) * x0
        x = x + self.attn(norm(x), idx, cos, sin)
        return x + self.mlp(norm(x))


class Head(Linear):
    """Soft-capped logits (B, T, V) float32; with targets (B, T) their cross-entropy in nats."""

    def __init__(self, config: GPTConfig):
        super().__init__(config.n_embd, config.vocab_size, std=HEAD_STD)
        nn.init.normal_(self.weight, std=HEAD_STD)  # in place of Linear's uniform

    def forward(self, x, targets=None, reduction="mean"):
        z = super().forward(norm(x)).float()
        # cap · tanh(z / cap), by a sigmoid, as tanh is slow on a GPU.
        logits = LOGIT_SOFT_CAP * (2 * torch.sigmoid(2 / LOGIT_SOFT_CAP * z) - 1)
        if targets is None:
            return logits
        # Compiled together with the soft-cap, this never writes logits in float32 to memory.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
        return loss.view_as(targets) if reduction == "none" else loss


class GPT(nn.Module):
    """Logits (B, T, V) float32 from tokens (B, T), or with targets (B, T) their loss in nats.

    Weights are float32, drawn on the CPU (the same on every device) and multiplied in `dtype`.
    """

    def __init__(self, config: GPTConfig, attend: Callable, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        self.dtype = dtype
        self.is_compiled_by_layer = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        nn.init.normal_(self.wte.weight, std=EMBEDDING_STD)
        self.blocks = nn.ModuleList(Block(config, i, attend) for i in range(config.n_layer))
        self.lm_head = Head(config)
        half = config.n_embd // config.n_head // 2
        frequencies = ROTARY_BASE ** -(torch.arange(half) / half)
        angles = torch.outer(torch.arange(config.sequence_len), frequencies)[:, None]  # (T, 1, D/2)
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)

    def compile(self) -> None:
        """On CUDA as one graph, the fastest; else layer by layer, which compiles sooner.

        What cannot be traced whole is an error. A deep copy has to be compiled by itself.
        """
        # The layers share a limit of compiled variants, by default 8. Each combination of window,
        # value embedding or none, and number of rows needs one.
        torch._dynamo.config.recompile_limit = 64
        if self.wte.weight.is_cuda:
            super().compile(dynamic=False, fullgraph=True)
        else:
            for part in [*self.blocks, self.lm_head]:
                part.compile(dynamic=False, fullgraph=True)
            self.is_compiled_by_layer = True

    def forward(self, idx, targets=None, reduction="mean"):
        cos = self.cos[: idx.size(1)]
        sin = self.sin[: idx.size(1)]
        # Without gradients torch would compile every layer a second time. So gradients stay on in
        # the evaluation, too, if the layers were compiled one by one.
        with torch.set_grad_enabled(self.is_compiled_by_layer or torch.is_grad_enabled()):
            x0 = norm(self.wte(idx).to(self.dtype))
            x = x0.clone()  # if x were x0, the first layer would be compiled apart from the others
            for block in self.blocks:
                x = block(x, x0, idx, cos, sin)
            return self.lm_head(x, targets, reduction)

    def tables(self) -> list[nn.Parameter]:
        """Weights of embeddings, except those that a Linear multiplies by, as a tied head does."""
        multiplied = {module.weight for module in self.modules() if isinstance(module, nn.Linear)}
        tables = [module.weight for module in self.modules() if isinstance(module, nn.Embedding)]
        return [table for table in tables if table not in multiplied]

    def flops_per_token(self) -> int:
        """FLOPs of all matrix products, forward and backward, as if a token saw its whole window.

        A multiply-add is 2 FLOPs, and backward costs twice what forward does: 6 for each weight.
        Attention has two products (q·k, p·v): 12 for each channel and each key in a window.
        """
        weights = sum(p.numel() for p in self.parameters() if p.ndim > 1)
        weights -= sum(table.numel() for table in self.tables())
        return 6 * weights + 12 * self.config.n_embd * sum(self.config.windows())


# --- Optimizer -----------------------------------------------------------------

# Amsel et al., arXiv 2505.16932: a, b, c of X <- aX + (bA + cA²)X with A = XXᵀ, for 5 steps, after
# a division by 1.02 times the Frobenius norm.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Polar Express: bring the singular values of (count, height, width) near 1."""
    norms = matrices.float().norm(dim=(-2, -1), keepdim=True)
    x = (matrices / (1.02 * norms + 1e-6)).to(matrices.dtype)
    is_tall = x.size(-2) > x.size(-1)
    if is_tall:
        x = x.mT
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # bA + cA²
        x = torch.baddbmm(x, polynomial, x, beta=a)  # aX + (bA + cA²)X
    return x.mT if is_tall else x


class Muon(torch.optim.Optimizer):
    """Muon (Keller Jordan, 2024) of matrices.

    All of one shape are updated as one stack, whose state is kept under the first of them.
    """

    def __init__(self, groups: list[dict], dtype: torch.dtype):
        self.dtype = dtype  # of the products in orthogonalize
        defaults = dict(momentum=MUON_MOMENTUM[0], momentum_from_to=MUON_MOMENTUM, beta2=MUON_BETA2)
        super().__init__(groups, defaults | dict(weight_decay=WEIGHT_DECAY))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for shape in sorted({p.shape for p in group["params"]}):
                self.update([p for p in group["params"] if p.shape == shape], group)

    def update(self, params: list[nn.Parameter], group: dict) -> None:
        weight = torch.stack(params)
        grad = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
        height, width = weight.shape[-2:]
        averaged_dim = -1 if height >= width else -2  # tall: one mean a row; wide: one a column
        state = self.state[params[0]]
        if not state:
            state["average"] = torch.zeros_like(grad)
            state["squares"] = torch.zeros_like(grad.mean(averaged_dim, keepdim=True))
        state["average"].lerp_(grad, 1 - group["momentum"])
        nesterov = grad.lerp(state["average"], group["momentum"])
        orthogonal = orthogonalize(nesterov.to(self.dtype)).float()
        # NorMuon (arXiv 2510.05491): divide each row (column) by the root of its running mean
        # square; then give the matrix its norm back.
        squares = orthogonal.square().mean(averaged_dim, keepdim=True)
        state["squares"].lerp_(squares, 1 - group["beta2"])
        evened = orthogonal * state["squares"].clamp_min(1e-10).rsqrt()
        norm_before = orthogonal.norm(dim=(-2, -1), keepdim=True)
        norm_after = evened.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10)
        update = evened * (norm_before / norm_after)
        # Cautious decay (arXiv 2510.12402): only where update and weight have the same sign.
        update += group["weight_decay"] * torch.where(update * weight > 0, weight, 0)
        lr = group["lr"] * max(1, height / width) ** 0.5
        torch._foreach_add_(params, list(update), alpha=-lr)


def parameter_groups(model: GPT) -> list[dict]:
    """The groups, with optimizer and rate; a parameter listed twice belongs to the first group."""
    width_scale = (model.config.n_embd / 768) ** -0.5
    heads = [module.weight for module in model.modules() if isinstance(module, Head)]
    matrices = [module.weight for module in model.blocks.modules() if isinstance(module, nn.Linear)]
    skips = [block.skip_scale for block in model.blocks]
    scalars = [p for p in model.parameters() if p.ndim < 2]  # also skips, whose own group is above
    return [
        dict(name="head", kind="adamw", params=heads, lr=UNEMBEDDING_LR * width_scale),
        dict(name="tables", kind="adamw", params=model.tables(), lr=EMBEDDING_LR * width_scale),
        dict(name="skips", kind="adamw", params=skips, lr=SCALAR_LR, betas=SKIP_BETAS),
        dict(name="matrices", kind="muon", params=matrices, lr=MATRIX_LR),
        dict(name="scalars", kind="adamw", params=scalars, lr=SCALAR_LR * RESIDUAL_LR_SCALE),
    ]


def groups_of(optimizers: list[torch.optim.Optimizer]) -> list[dict]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def make_optimizers(model: GPT) -> list[torch.optim.Optimizer]:
    """One for each group that has parameters. Raises HarnessError for a parameter in no group."""
    adamw = dict(betas=ADAM_BETAS, eps=ADAM_EPS, weight_decay=ADAM_WEIGHT_DECAY, fused=True)
    optimizers = []
    grouped = set()
    for group in parameter_groups(model):
        group["params"] = [p for p in dict.fromkeys(group["params"]) if p not in grouped]
        grouped.update(group["params"])
        if not group["params"]:
            continue
        if group["kind"] == "adamw":
            optimizers.append(torch.optim.AdamW([group], **adamw))
        elif group["kind"] == "muon":
            optimizers.append(Muon([group], model.dtype))
        else:
            raise ValueError(f"group {group['name']}: no optimizer is of kind {group['kind']}")
    for name, p in model.named_parameters():
        if p not in grouped:
            raise HarnessError(f"{name} {tuple(p.shape)} is in no group of parameter_groups")
    for group in groups_of(optimizers):
        group["initial_lr"] = group["lr"]
        group["initial_weight_decay"] = group["weight_decay"]
    return optimizers


# --- Schedules -----------------------------------------------------------------


def lr_scale(progress: float) -> float:
    """The factor on every rate at `progress`, the used share of the budget: up, 1, down."""
    if progress < WARMUP_RATIO:
        return progress / WARMUP_RATIO
    if progress <= 1 - WARMDOWN_RATIO:
        return 1.0
    return FINAL_LR_FRAC + (1 - FINAL_LR_FRAC) * (1 - progress) / WARMDOWN_RATIO


def apply_schedules(optimizers: list, progress: float, step: int) -> None:
    """Set every group's rate, and of Muon's groups the momentum and the decay, which falls to 0."""
    progress = min(max(progress, 0.0), 1.0)
    for group in groups_of(optimizers):
        group["lr"] = group["initial_lr"] * lr_scale(progress)
        if group["kind"] == "muon":
            group["weight_decay"] = group["initial_weight_decay"] * (1 - progress)
            start, end = group["momentum_from_to"]
            group["momentum"] = start + (end - start) * min(1.0, step / MUON_MOMENTUM_STEPS)


# --- Training ------------------------------------------------------------------


class Step(NamedTuple):
    """One update of the weights; on CUDA it may still be running."""

    progress: float  # the share of the budget that its rates were set for
    loss: torch.Tensor  # on the host, in nats; to be read once the step has ended
    tokens: int
    epoch: int
    end: float | torch.cuda.Event  # by time.perf_counter; on CUDA an event

    def wait(self) -> float:
        """Wait until the step has ended; gives the time by time.perf_counter."""
        if isinstance(self.end, float):
            return self.end
        self.end.synchronize()
        return time.perf_counter()  # an event has no time of its own on this clock


def check_finite(loss: float, step: str) -> None:
    if not math.isfinite(loss) or loss > MAX_LOSS:
        raise HarnessError(f"loss {loss:.4g} at {step}")


def step_and_measure(optimizers: list[torch.optim.Optimizer]) -> dict[str, tuple]:
    """Take the optimizers' step; gives two figures of each group, by its name.

    The norm of its gradients, and norm(update) / norm(weights).
    """
    figures = {}
    for optimizer in optimizers:
        groups = optimizer.param_groups
        weights_before = [[p.detach().clone() for p in group["params"]] for group in groups]
        optimizer.step()
        for group, before in zip(groups, weights_before, strict=True):
            gradients = [p.grad for p in group["params"] if p.grad is not None]
            changes = torch._foreach_sub([p.detach() for p in group["params"]], before)
            relative_update = get_total_norm(changes) / get_total_norm(before)
            figures[group["name"]] = (get_total_norm(gradients), relative_update)
    return figures


class Run:
    """Model, optimizers and data of one experiment: warm-up tries them, training starts afresh."""

    def __init__(self, platform: "Platform"):
        if not str(SEED).isdecimal():
            raise HarnessError(f"SEED={SEED} is not a whole number; set one, or leave it out")
        self.rows = min(DEVICE_BATCH_SIZE, TOTAL_BATCH_SIZE // MAX_SEQ_LEN)
        if self.rows == 0 or TOTAL_BATCH_SIZE % (self.rows * MAX_SEQ_LEN) != 0:
            raise HarnessError(
                f"TOTAL_BATCH_SIZE = {TOTAL_BATCH_SIZE} is not a multiple of rows x MAX_SEQ_LEN = "
                f"{self.rows} x {MAX_SEQ_LEN}; change it, or DEVICE_BATCH_SIZE"
            )
        self.eval_rows = EVAL_BATCH_SIZE
        self.platform = platform
        self.benchmark = prepare.benchmark_id(prepare.open_prepared())
        self.tokenizer = prepare.Tokenizer.from_directory()
        n_head = math.ceil(DEPTH * ASPECT_RATIO / HEAD_DIM)
        n_kv_head = N_KV_HEAD if N_KV_HEAD > 0 else n_head
        if n_head % n_kv_head != 0:
            raise HarnessError(f"{N_KV_HEAD = } does not divide {n_head} heads of queries")
        self.config = GPTConfig(
            sequence_len=MAX_SEQ_LEN,
            vocab_size=self.tokenizer.get_vocab_size(),
            n_layer=DEPTH,
            n_head=n_head,
            n_kv_head=n_kv_head,
            n_embd=n_head * HEAD_DIM,
            window_pattern=WINDOW_PATTERN,
            short_window=SHORT_WINDOW,
            value_embedding_every=VALUE_EMBEDDING_EVERY,
        )
        check_attention(platform, self.config)
        torch.manual_seed(int(SEED))
        self.model = GPT(self.config, BACKENDS[platform.attention], platform.dtype)
        self.fresh = [tensor.clone() for tensor in self.tensors()]
        self.model.to(platform.device)
        if platform.compiles:
            self.model.compile()

    def tensors(self) -> list[torch.Tensor]:
        """Weights and buffers."""
        return [t.detach() for t in (*self.model.parameters(), *self.model.buffers())]

    def start_afresh(self) -> None:
        """Weights, buffers, optimizers, random state and data as if nothing had happened yet."""
        torch.manual_seed(int(SEED))
        for tensor, fresh in zip(self.tensors(), self.fresh, strict=True):
            tensor.copy_(fresh)
        self.model.zero_grad(set_to_none=True)
        self.optimizers = make_optimizers(self.model)
        self.marks = []  # (part of a step, when it ended); it began at the mark before
        self.figures = []  # from step_and_measure, for each of DIAGNOSED_AT that was reached
        batches = prepare.make_dataloader(
            self.tokenizer, self.rows, MAX_SEQ_LEN, "train", device=self.platform.device
        )
        first_batch = next(batches)  # opens the text, which takes a while, before the clock starts
        self.batches = chain([first_batch], batches)

    def end_part(self, part: str) -> float | torch.cuda.Event:
        """Mark that a part of a step ends here. Waits for nothing."""
        if self.platform.device.type == "cuda":
            when = torch.cuda.Event(enable_timing=True)
            when.record()
        else:
            when = time.perf_counter()
        self.marks.append((part, when))
        return when

    def take_step(self, progress: float, step: int) -> Step:
        """Update the weights once. Nothing in here waits for CUDA."""
        micro_batches = TOTAL_BATCH_SIZE // (self.rows * MAX_SEQ_LEN)
        total_loss = torch.zeros((), device=self.platform.device)
        tokens = 0
        self.end_part("rest")  # the gap since the last step; a run's first mark starts its time
        for _ in range(micro_batches):
            inputs, targets, epoch = next(self.batches)
            self.end_part("data")
            loss = self.model(inputs, targets) / micro_batches
            loss.backward()
            total_loss += loss.detach()
            tokens += inputs.numel()
            self.end_part("forward and backward")
        apply_schedules(self.optimizers, progress, step)
        num_measured = len(self.figures)
        if num_measured < len(DIAGNOSED_AT) and progress >= DIAGNOSED_AT[num_measured]:
            self.figures.append(step_and_measure(self.optimizers))
        else:
            for optimizer in self.optimizers:
                optimizer.step()
        self.model.zero_grad(set_to_none=True)
        # torch pins this copy's memory, so that nothing waits here.
        loss_on_host = total_loss.to("cpu", non_blocking=self.platform.device.type == "cuda")
        end = self.end_part("optimizer")  # behind the copy: when this has passed, the loss is there
        return Step(progress, loss_on_host, tokens, epoch, end)

    def try_training(self, rows: int) -> None:
        """Take trial steps, early, midway and late, so that training finds all compiled."""
        self.rows = rows
        self.start_afresh()
        for number, progress in enumerate(TRIAL_PROGRESS):
            started_s = time.perf_counter()
            step = self.take_step(progress, number)
            self.step_s = step.wait() - started_s  # the last trial's stays: all is compiled then
            check_finite(step.loss.item(), f"trial step {number}")

    def try_evaluation(self, rows: int) -> None:
        """Compile what the evaluation needs, and refuse now a model that it would refuse."""
        self.eval_rows = rows
        prepare.check_model(self.model, self.tokenizer, rows)


def warm_up(run: Run) -> None:
    """Compile, and find how many rows fit, on weights that are thrown away.

    Each attempt sets run.rows or run.eval_rows; the last, which fitted, stays.
    """
    prepare.halve_until_it_fits(run.try_training, run.rows, "DEVICE_BATCH_SIZE")
    prepare.halve_until_it_fits(run.try_evaluation, run.eval_rows, "EVAL_BATCH_SIZE")
    run.start_afresh()
    if run.platform.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # what did not fit is not the run's peak


class Trained:
    """Totals of the steps that have ended, and their log."""

    def __init__(self, usual_s: float):
        form = "{percentage:3.0f}%|{bar}| {remaining} left{postfix}"
        self.bar = tqdm(total=TIME_BUDGET, bar_format=form, mininterval=1, disable=None)
        self.num_lines = 0
        self.loss = 0.0  # a running mean
        self.tokens = 0
        self.epoch = 1
        self.steps_s = []  # how long each took
        self.usual_s = usual_s  # of a step: at first a trial step's, then the last ones' median
        self.ended_s = 0.0  # from started_s to the end of the last step
        self.started_s = time.perf_counter()  # here the clock starts

    def add(self, step: Step) -> None:
        """Wait for a step's end, look at its loss, and say now and then how it goes."""
        previous_end_s = self.ended_s
        self.ended_s = step.wait() - self.started_s
        self.steps_s.append(self.ended_s - previous_end_s)
        self.usual_s = statistics.median(self.steps_s[-9:])
        self.tokens += step.tokens
        self.epoch = step.epoch
        number = len(self.steps_s)
        loss = step.loss.item()
        check_finite(loss, f"step {number}")
        self.loss = loss if number == 1 else 0.95 * self.loss + 0.05 * loss
        progress = min(1.0, self.ended_s / TIME_BUDGET)
        rate = self.tokens / self.ended_s
        self.bar.set_postfix_str(f"loss {self.loss:.4f}, {rate:,.0f} tokens/s", refresh=False)
        self.bar.update(progress * TIME_BUDGET - self.bar.n)
        if progress >= self.num_lines / LOG_LINES:
            self.num_lines += 1
            say(
                f"step {number:5d} · {progress:4.0%} · loss {self.loss:.4f} · "
                f"lr x{lr_scale(step.progress):.2f} · {rate:,.0f} tokens/s · "
                f"epoch {self.epoch}"
            )


def train(run: Run) -> Trained:
    """Take steps while the budget lasts; the final one may end beyond it.

    Each is launched before the one before it is waited for, so that a GPU always has work.
    """
    trained = Trained(run.step_s)
    running = run.take_step(0.0, 0)  # a step that is launched and not yet added
    for number in count(1):
        begins_s = time.perf_counter() - trained.started_s
        if run.platform.device.type == "cuda":
            # The host is a step ahead: what is launched below starts when `running` ends.
            begins_s += trained.usual_s
        if begins_s >= TIME_BUDGET:
            break
        step = run.take_step(begins_s / TIME_BUDGET, number)
        trained.add(running)
        running = step
    trained.add(running)
    trained.bar.close()
    return trained


# --- Attention backends --------------------------------------------------------
# Functions of q, k and v, (B, T, H, D) each, in which a token sees itself and the `window` tokens
# before it: window + 1 keys. k and v may have fewer heads, each of which serves a group of q's.


def window_mask(T: int, window: int, device: torch.device) -> torch.Tensor:
    """Which key (column) each query (row) sees: (T, T) bool."""
    positions = torch.arange(T, device=device)
    distance = positions[:, None] - positions
    return (distance >= 0) & (distance <= window)


def heads_first(q, k, v):
    """Give q, k and v as (B, H, T, D), all with as many heads."""
    if k.size(2) < q.size(2):
        k = k.repeat_interleave(q.size(2) // k.size(2), dim=2)
        v = v.repeat_interleave(q.size(2) // v.size(2), dim=2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def written_out(q, k, v, window):
    """Matrix product, softmax, matrix product: the reference of all others, fast on short rows."""
    T = q.size(1)
    hidden = ~window_mask(T, window, q.device)
    q, k, v = heads_first(q, k, v)
    q = q * q.size(-1) ** -0.5
    parts = []
    for start in range(0, T, QUERY_BLOCK):
        queries = slice(start, min(T, start + QUERY_BLOCK))
        keys = slice(max(0, start - window), queries.stop)  # each that any of these queries sees
        scores = q[:, :, queries] @ k[:, :, keys].mT
        scores = scores.masked_fill(hidden[queries, keys], -math.inf)
        parts.append(scores.softmax(-1) @ v[:, :, keys])
    return torch.cat(parts, dim=2).transpose(1, 2)


def torch_sdpa(q, k, v, window):
    """torch's own scaled_dot_product_attention."""
    T = q.size(1)
    mask = window_mask(T, window, q.device) if window < T - 1 else None
    q, k, v = heads_first(q, k, v)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
    return y.transpose(1, 2)


def torch_varlen(q, k, v, window):
    """Flash Attention as torch has it, over rows laid end to end."""
    from torch.nn.attention.varlen import varlen_attn

    B, T, H, D = q.shape
    starts = torch.arange(0, B * T + 1, T, device=q.device, dtype=torch.int32)
    tokens_before = window if window < T - 1 else -1  # -1: all, by a faster kernel
    options = dict(window_size=(tokens_before, 0))
    if k.size(2) < H:
        options["enable_gqa"] = True  # torch 2.12 and later
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    return varlen_attn(*packed, starts, starts, T, T, **options).view(B, T, H, D)


flash_attn_3_kernel = None  # the library's module, once it is loaded


def flash_attn_3(q, k, v, window):
    """Flash Attention 3, a library from the hub."""
    y = flash_attn_3_kernel.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
    return y[0] if isinstance(y, tuple) else y  # some builds add the log-sum-exp


BACKENDS = {f.__name__: f for f in (flash_attn_3, torch_varlen, torch_sdpa, written_out)}


def load_flash_attn_3() -> bool:
    """Load Flash Attention 3, if there is a build; the first run fetches it and notes what came."""
    global flash_attn_3_kernel
    import kernels

    versions = f"torch-{torch.__version__}-cuda-{torch.version.cuda}"
    note = prepare.cache_directory() / f"flash-attn-3-{versions}.txt"
    if not note.exists():
        say("fetching Flash Attention 3, this once")
        folder = ""  # an empty note means that none came: later runs do not ask again
        try:
            variant = kernels.install_kernel("kernels-community/flash-attn3", version=1)
            folder = str(variant.parents[1])  # FOLDER of FOLDER/build/VARIANT
        except Exception as failure:  # of the network, or there is no build for these versions
            say(f"{type(failure).__name__}: {failure}"[:300])
        with prepare.written_whole(note) as file:
            file.write(folder.encode())
    folder = note.read_text()
    if folder == "":
        say(f"no Flash Attention 3; to try again, remove {note}")
        return False
    try:
        flash_attn_3_kernel = kernels.get_local_kernel(Path(folder))
    except Exception as failure:
        why = f"Flash Attention 3 does not load: {type(failure).__name__}: {failure}"
        raise HarnessError(f"{why}; remove {note}, or set ATTENTION in train.py") from failure
    return True


def choose_attention(device: torch.device, dtype: torch.dtype) -> str:
    """The backend that ATTENTION names; else by device, versions, and what lies on the disk."""
    if ATTENTION:
        if ATTENTION not in BACKENDS:
            raise HarnessError(f'ATTENTION = "{ATTENTION}" in train.py; there are {[*BACKENDS]}')
        if ATTENTION == "flash_attn_3" and not load_flash_attn_3():
            raise HarnessError(f'ATTENTION = "{ATTENTION}" in train.py is not here; see above')
        return ATTENTION
    if device.type == "cpu":
        return "written_out"
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    # On older chips Flash Attention 3 is slower; on newer ones it ends the whole process.
    if is_nvidia and torch.cuda.get_device_capability() == (9, 0) and load_flash_attn_3():
        return "flash_attn_3"
    if is_nvidia and dtype == torch.bfloat16:
        # A TorchVersion compares with tuples. Grouped keys came with 2.12, windows with 2.11.
        needed = (2, 12) if N_KV_HEAD > 0 else (2, 11)
        if torch.__version__ >= needed and torch.backends.cuda.is_flash_attention_available():
            return "torch_varlen"
        say(f"no varlen_attn, which is faster: torch is older than {needed}, or built without it")
    return "torch_sdpa"


def output_and_gradients(attend: Callable, q, k, v, dy, window: int) -> list[torch.Tensor]:
    """The output, and the gradients of q, k and v."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    y = attend(*leaves, window)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def check_attention(platform: "Platform", config: GPTConfig) -> None:
    """Compare the backend that was chosen with written_out, before there is a model.

    Both run on two rows, forwards and backwards. A backend that ATTENTION names is not compared:
    whoever names it may have changed what attention is.
    """
    name = platform.attention
    if name == "written_out" or ATTENTION:
        return
    attend = BACKENDS[name]
    if platform.compiles:
        attend = torch.compile(attend, dynamic=False, fullgraph=True)
    inputs = []  # q, k, v, and the gradient of the output
    for heads in (config.n_head, config.n_kv_head, config.n_kv_head, config.n_head):
        shape = (2, config.sequence_len, heads, config.n_embd // config.n_head)
        inputs.append(torch.randn(shape).to(platform.device, platform.dtype))
    in_float32 = [x.float() for x in inputs]
    limit = 1e-2 if platform.dtype == torch.bfloat16 else 1e-4
    for window in sorted(set(config.windows())):
        try:
            results = output_and_gradients(attend, *inputs, window)
        except Exception:
            say(f"attention by {name} fails; mend it, or name another one with ATTENTION")
            raise
        wanted = output_and_gradients(written_out, *in_float32, window)
        for result, reference in zip(results, wanted, strict=True):
            error = (result.float() - reference).norm() / reference.norm()
            if error.isnan() or error >= limit:
                raise HarnessError(
                    f"attention by {name} is not that of written_out: off by {error:.1e} at window "
                    f"{window}; if you changed what attention is, change written_out, too, or set "
                    f'ATTENTION = "{name}" in train.py'
                )


# --- Platform ------------------------------------------------------------------


class Platform(NamedTuple):
    """What this machine runs on; found out before there is a model."""

    device: torch.device  # ROCm answers to the name of CUDA
    name: str
    dtype: torch.dtype  # of products
    compiles: bool
    attention: str


def refuse_unusable_gpu() -> None:
    """Raise HarnessError for an NVIDIA GPU that torch cannot use; an AMD one gets a line."""
    if Path("/dev/kfd").exists() and torch.version.hip is None:
        say("note: there is an AMD GPU, which is not used: this torch is not built for ROCm")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None or torch.cuda.is_available() or visible in ("", "-1"):
        return  # not built for CUDA, or all is well, or the CPU is meant
    try:
        torch.cuda.init()
    except RuntimeError as failure:
        why = str(failure).strip()
        there_is_none = "Found no NVIDIA driver" in why or "No CUDA GPUs" in why
        if there_is_none and visible is None:  # and nobody asked for one
            return
        raise HarnessError(
            f"torch cannot use the GPU here: {why[:120]}… If CUDA_VISIBLE_DEVICES names one that "
            "is not there, change it (set to nothing, the CPU is used). With an older driver, run: "
            "uv lock -P torch==2.10.0 && uv sync && uv run prepare.py"
        ) from failure


def set_up_cpu() -> None:
    """Use no more threads than usable cores; make glibc keep freed memory for the next step."""
    torch.set_num_threads(min(torch.get_num_threads(), prepare.usable_cores()))
    with suppress(OSError, AttributeError, TypeError):  # without glibc there is no mallopt
        # Mapping a step's memory anew takes 8 % of a step.
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, the most that older glibc accepts
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def cpu_has_fast_bf16() -> bool:
    """Whether this CPU multiplies bf16 faster than float32: AMD's by AVX-512, Intel's by AMX.

    By AVX-512 an Intel core is slower: 165 GFLOP/s were measured, and 320 in float32.
    """
    if torch.cpu._is_amx_tile_supported():
        return True
    cpuinfo = Path("/proc/cpuinfo")  # Linux has it
    maker = cpuinfo.read_text() if cpuinfo.exists() else processor()
    return "AuthenticAMD" in maker and torch.cpu._is_avx512_bf16_supported()


def can_compile(device: torch.device, dtype: torch.dtype) -> bool:
    """Try torch.compile on a function of torch's, which no mistake in the model can touch."""
    torch._dynamo.config.suppress_errors = False  # whatever the environment says
    x = torch.ones(2, 16, device=device, dtype=dtype, requires_grad=True)

    def forward(x):
        # The second is False where a variable like TORCH_COMPILE_DISABLE is set.
        return F.rms_norm(x, (16,)).exp().sum(), torch.compiler.is_compiling()

    try:
        loss, is_compiled = torch.compile(forward)(x)
        loss.backward()
    except (torch.AcceleratorError, torch.OutOfMemoryError):
        raise  # the GPU failed, not the compiler
    except Exception as failure:  # the C++ compiler or Triton failed, or is missing
        why = str(failure).strip().partition("\n")[0][:120]
        say(f"not compiled, so slower ({type(failure).__name__}: {why}); is g++ or clang there?")
        return False
    if not is_compiled:
        say("not compiled, so slower: a variable like TORCH_COMPILE_DISABLE is set")
    return is_compiled


def find_platform() -> Platform:
    """Device, the faster type there, whether torch.compile works, and the attention backend."""
    refuse_unusable_gpu()
    if torch.cuda.is_available():
        device = torch.device("cuda")
        name = torch.cuda.get_device_name()
        has_fast_bf16 = torch.cuda.get_device_capability() >= (8, 0)  # on ROCm it is always
        torch.set_float32_matmul_precision("high")  # TF32
        if IS_WSL:  # there, more than the GPU's free memory would silently come from the host
            free_bytes, total_bytes = torch.cuda.mem_get_info()
            torch.cuda.set_per_process_memory_fraction(free_bytes / total_bytes)
    elif torch.backends.mps.is_available():
        device = torch.device("mps")
        name = "Apple GPU"
        has_fast_bf16 = torch.backends.mps.is_macos_or_newer(14, 0)
    else:
        set_up_cpu()
        device = torch.device("cpu")
        name = f"CPU, {torch.get_num_threads()} threads"
        has_fast_bf16 = cpu_has_fast_bf16()
    dtype = torch.bfloat16 if has_fast_bf16 else torch.float32
    compiles = can_compile(device, dtype)
    attention = choose_attention(device, dtype)
    say(f"device: {name}; products in {dtype}, the faster type here; attention by {attention}")
    return Platform(device=device, name=name, dtype=dtype, compiles=compiles, attention=attention)


# --- Summary -------------------------------------------------------------------

# Dense bf16 products in TFLOP/s, by the datasheets; of another device nothing is known.
PEAK_TFLOPS = {
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 80GB HBM3": 989.5,
    "NVIDIA H200": 989.5,
    "NVIDIA B200": 2250,
}


def describe(run: Run) -> None:
    """Say what was built, before the clock starts."""
    config = run.config
    column = {"gpu": "first", "small": "second"}[SCALE]
    num_params = sum(p.numel() for p in run.model.parameters())
    say(
        f"scale {SCALE}, the {column} column: {config.n_layer} layers, width {config.n_embd}, "
        f"{config.n_head} heads, {num_params / 1e6:.1f} M parameters, "
        f"{run.model.flops_per_token() / 1e6:.1f} MFLOP a token"
    )
    for group in groups_of(run.optimizers):
        tensors = len(group["params"])
        say(f"group {group['name']}: {tensors} tensors, {group['kind']}, rate {group['lr']:.4g}")
    say(f"training for {TIME_BUDGET} s, {run.rows} rows of {MAX_SEQ_LEN} tokens at a time")


def diagnose(run: Run) -> None:
    """Say how each group moved, stage by stage, and where the time went."""
    for group in groups_of(run.optimizers):
        pairs = [stage[group["name"]] for stage in run.figures]
        gradients = " ".join(f"{gradient:.2g}" for gradient, _ in pairs)
        updates = " ".join(f"{update:.1e}" for _, update in pairs)
        say(f"group {group['name']}: gradient norm {gradients} · update / weights {updates}")
    spent = {"forward and backward": 0.0, "optimizer": 0.0, "data": 0.0, "rest": 0.0}
    for (_, began), (part, ended) in pairwise(run.marks):
        if run.platform.device.type == "cuda":
            spent[part] += began.elapsed_time(ended) / 1000
        else:
            spent[part] += ended - began
    whole = sum(spent.values())
    say("time: " + " · ".join(f"{part} {spent[part] / whole:.0%}" for part in spent))


def peak_memory_mb(platform: Platform) -> float:
    """Peak memory in MiB: with CUDA what torch allocated, else what the process had resident."""
    if platform.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, else KiB


def summarize(run: Run, trained: Trained, val_bpb: float, total_s: float) -> None:
    """Print the lines that program.md reads."""
    platform = run.platform
    tokens_per_s = trained.tokens / trained.ended_s
    flops = run.model.flops_per_token() * tokens_per_s
    peak_flops = 1e12 * PEAK_TFLOPS.get(platform.name, math.inf)  # unknown: 0 % is shown
    median_s = statistics.median(trained.steps_s)
    slow_steps_s = [step_s for step_s in trained.steps_s if step_s > 2 * median_s]
    print(f"""---
val_bpb:          {val_bpb:.6f}
training_seconds: {trained.ended_s:.1f}
total_seconds:    {total_s:.1f}
peak_vram_mb:     {peak_memory_mb(platform):.1f}
mfu_percent:      {100 * flops / peak_flops:.2f}
total_tokens_M:   {trained.tokens / 1e6:.1f}
num_steps:        {len(trained.steps_s)}
num_params_M:     {sum(p.numel() for p in run.model.parameters()) / 1e6:.1f}
depth:            {DEPTH}
benchmark:        {run.benchmark}
scale:            {SCALE}
device:           {platform.name}
attention:        {platform.attention}
compiled:         {"yes" if platform.compiles else "no"}
seed:             {SEED}
train_loss:       {trained.loss:.4f}
epoch:            {trained.epoch}
tokens_per_second: {tokens_per_s:.0f}
slow_share:       {sum(slow_steps_s) / trained.ended_s:.2f}""")


# --- Main ----------------------------------------------------------------------


def main() -> None:
    started_s = time.perf_counter() if STARTED_S is None else STARTED_S
    sys.stdout.reconfigure(line_buffering=True)  # so that in a log the error comes last
    try:
        platform = find_platform()
        prepare.open_prepared()  # prepares what is missing, however long that takes
        faulthandler.dump_traceback_later(HUNG_AFTER_S, exit=True)
        run = Run(platform)
        warm_up(run)
        describe(run)
        gc.collect()
        gc.freeze()  # so that collections within steps are short
        faulthandler.dump_traceback_later(HUNG_AFTER_S, exit=True)
        trained = train(run)
        diagnose(run)
        # An upper bound: a token takes longer in training.
        evaluation_s = prepare.EVAL_TOKENS * trained.ended_s / trained.tokens
        faulthandler.dump_traceback_later(HUNG_AFTER_S + evaluation_s, exit=True)
        val_bpb = prepare.evaluate_bpb(run.model, run.tokenizer, run.eval_rows)
        summarize(run, trained, val_bpb, time.perf_counter() - started_s)
    except HarnessError as failure:
        sys.exit(f"error: {failure}")
    finally:
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
