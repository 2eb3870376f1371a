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
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from typing import NamedTuple

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # torch reads it once

import torch
import torch.nn.functional as F
from torch import nn

import prepare
from prepare import MAX_SEQ_LEN, TIME_BUDGET, Tokenizer, evaluate_bpb, make_dataloader

# --- Hyperparameters ----------------------


def scale(gpu, small):
    """The value for a machine with CUDA, and the one for a machine without."""
    return gpu if torch.cuda.is_available() else small


DEPTH = scale(8, 4)  # layers
ASPECT_RATIO = scale(64, 40)  # width = DEPTH x ASPECT_RATIO, rounded up to a multiple of HEAD_DIM
HEAD_DIM = scale(128, 80)
WINDOW_PATTERN = "SSSL"  # tiled over the layers: S short, L the whole row; the last is always L
SHORT_WINDOW = scale(1 / 2, 1 / 4)  # of a row
ROTARY_BASE = 10_000
LOGIT_SOFT_CAP = 15.0
VALUE_EMBEDDING_EVERY = scale(2, 1)  # layers, counted back from the last one
GATE_CHANNELS = 32  # of a layer's input; they steer its value embedding
MLP_RATIO = 4  # width of an MLP's hidden layer, in widths of the model

EMBEDDING_STD = 1.0
HEAD_STD = 0.001
MATRIX_STD = 1.0  # x width^-1/2
RESIDUAL_START = 1.0  # r: how much of x a layer keeps
SKIP_START = 0.1  # s: how much of the normalised embedding it adds

TOTAL_BATCH_SIZE = scale(2**19, 2**12)  # tokens a step
DEVICE_BATCH_SIZE = 64  # rows at a time, if a step has as many; halved where memory is short
EVAL_BATCH_SIZE = scale(32, 8)  # rows; their logits exist as a whole
EMBEDDING_LR = scale(0.6, 0.5)  # this and the next x (width / 768)^-1/2
UNEMBEDDING_LR = scale(0.004, 0.01)
MATRIX_LR = scale(0.04, 0.015)
SCALAR_LR = 0.5
RESIDUAL_LR_SCALE = 0.01  # of SCALAR_LR, for r and for whatever has no group of its own
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
SEED = os.environ.get("SEED", "42")  # a second one tells a gain from luck
QUERY_BLOCK = 128  # queries at a time, where attention is written out
TRIAL_STEPS = 2  # on weights that are thrown away
MAX_LOSS = 100.0  # a run beyond it is ended
LOG_LINES = 25
HUNG_AFTER_S = TIME_BUDGET + 300  # each: before the clock, in it, after it

# --- Model --------------------------------


class GPTConfig(NamedTuple):
    """The sizes of a model; with the constants above, all that decides what it is."""

    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    window_pattern: str = "SSSL"
    short_window: float = 1 / 2
    value_embedding_every: int = 2

    def windows(self) -> list[int]:
        """For each layer, how many tokens before itself a token sees."""
        short = max(1, int(self.sequence_len * self.short_window))
        sizes, pattern = {"L": self.sequence_len, "S": short}, self.window_pattern
        letters = [pattern[layer % len(pattern)] for layer in range(self.n_layer - 1)]
        return [sizes[letter] for letter in [*letters, "L"]]


def norm(x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (arXiv 2104.09864) of (B, T, H, D): first half paired with the second."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def uniform(weight: torch.Tensor, std: float) -> None:
    nn.init.uniform_(weight, -(3**0.5) * std, 3**0.5 * std)  # of standard deviation std


class Linear(nn.Linear):
    """A matrix without bias, uniform or zero, in float32; multiplied in the type of its input."""

    def __init__(self, inputs: int, outputs: int, std: float = 0.0):
        super().__init__(inputs, outputs, bias=False)
        uniform(self.weight, std)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class CausalSelfAttention(nn.Module):
    """Attention with QK norm (arXiv 2010.04245) and value embeddings (ResFormer, 2410.17897)."""

    def __init__(self, config: GPTConfig, layer: int, attend: Callable):
        super().__init__()
        self.heads = [config.n_head, config.n_kv_head, config.n_kv_head]  # of q, k, v
        self.window, self.attend = config.windows()[layer], attend
        C, kv_width = config.n_embd, config.n_embd // config.n_head * config.n_kv_head
        std = MATRIX_STD * C**-0.5
        self.c_q, self.c_proj = Linear(C, C, std), Linear(C, C)
        self.c_k, self.c_v = Linear(C, kv_width, std), Linear(C, kv_width, std)
        self.value_embedding = None
        if (config.n_layer - 1 - layer) % config.value_embedding_every == 0:
            self.value_embedding = nn.Embedding(config.vocab_size, kv_width)
            uniform(self.value_embedding.weight, std)
            self.gate = Linear(min(GATE_CHANNELS, C), config.n_kv_head)

    def forward(self, x, idx, cos, sin):
        B, T, C = x.shape
        weight = torch.cat([self.c_q.weight, self.c_k.weight, self.c_v.weight])  # one product
        qkv = F.linear(x, weight.to(x.dtype)).view(B, T, sum(self.heads), -1)
        q, k, v = qkv.split(self.heads, 2)
        if self.value_embedding is not None:
            gate_BTH = 2 * torch.sigmoid(self.gate(x[..., : self.gate.in_features]))
            v = v + gate_BTH.unsqueeze(-1) * self.value_embedding(idx).to(x.dtype).view_as(v)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        if k.size(2) < q.size(2):
            k, v = (t.repeat_interleave(q.size(2) // t.size(2), dim=2) for t in (k, v))
        return self.c_proj(self.attend(q, k, v, self.window).reshape(B, T, C))


class MLP(nn.Module):
    """Two layers with a squared ReLU (Primer, arXiv 2109.08668)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        C, hidden = config.n_embd, MLP_RATIO * config.n_embd
        self.c_fc, self.c_proj = Linear(C, hidden, MATRIX_STD * C**-0.5), Linear(hidden, C)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """A layer: x <- r·x + s·x0, then attention and MLP of the normalised x are added."""

    def __init__(self, config: GPTConfig, layer: int, attend: Callable):
        super().__init__()
        self.residual_scale = nn.Parameter(torch.tensor(RESIDUAL_START))  # r
        self.skip_scale = nn.Parameter(torch.tensor(SKIP_START))  # s
        self.attn = CausalSelfAttention(config, layer, attend)
        self.mlp = MLP(config)

    def forward(self, x, x0, idx, cos, sin):
        x = self.residual_scale.to(x.dtype) * x + self.skip_scale.to(x.dtype) * x0
        x = x + self.attn(norm(x), idx, cos, sin)
        return x + self.mlp(norm(x))


class Head(Linear):
    """Soft-capped logits (B, T, V) float32; with targets (B, T) their cross-entropy in nats."""

    def __init__(self, config: GPTConfig):
        super().__init__(config.n_embd, config.vocab_size)
        nn.init.normal_(self.weight, std=HEAD_STD)

    def forward(self, x, targets=None, reduction="mean"):
        z = super().forward(norm(x)).float()
        logits = LOGIT_SOFT_CAP * torch.tanh(z / LOGIT_SOFT_CAP)
        if targets is None:
            return logits
        # Compiled, this never holds the logits in float32.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
        return loss.view_as(targets) if reduction == "none" else loss


class GPT(nn.Module):
    """Logits (B, T, V) float32 from tokens (B, T), or with targets (B, T) their loss in nats.

    Weights are float32, drawn on the CPU (the same on every device) and multiplied in `dtype`.
    """

    def __init__(self, config: GPTConfig, attend: Callable, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        nn.init.normal_(self.wte.weight, std=EMBEDDING_STD)
        self.blocks = nn.ModuleList(Block(config, i, attend) for i in range(config.n_layer))
        self.lm_head = Head(config)
        D = config.n_embd // config.n_head
        frequencies = ROTARY_BASE ** -(torch.arange(0, D, 2) / D)
        angles = torch.outer(torch.arange(config.sequence_len), frequencies)[:, None]  # (T, 1, D/2)
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)

    def compile(self) -> None:
        """Compile the layers, each kind once, and the head. A copy of the model runs eagerly."""
        torch._dynamo.config.recompile_limit = 64  # kinds: value embedding, window, evaluation
        for part in [*self.blocks, self.lm_head]:
            part.compile(dynamic=False, fullgraph=True)  # a break would be silent, and slow

    def forward(self, idx, targets=None, reduction="mean"):
        cos, sin = self.cos[: idx.size(1)], self.sin[: idx.size(1)]
        x0 = norm(self.wte(idx).to(self.dtype))
        x = x0.clone()  # given one tensor twice, the first layer would be a kind of its own
        for block in self.blocks:
            x = block(x, x0, idx, cos, sin)
        return self.lm_head(x, targets, reduction)

    def tables(self) -> list[nn.Parameter]:
        """The weights that are looked up and never multiplied."""
        embeddings = [m.weight for m in self.modules() if isinstance(m, nn.Embedding)]
        multiplied = {m.weight for m in self.modules() if isinstance(m, nn.Linear)}
        return [weight for weight in embeddings if weight not in multiplied]

    def flops_per_token(self) -> int:
        """Forward and backward, of matrix products alone: 6 a weight, and the attention."""
        matrices = sum(p.numel() for p in self.parameters() if p.ndim > 1)
        matrices -= sum(table.numel() for table in self.tables())
        return 6 * matrices + sum(12 * self.config.n_embd * w for w in self.config.windows())


# --- Optimizer ----------------------------

# Amsel et al., arXiv 2505.16932: a, b, c of X <- aX + (bA + cA²)X with A = XXᵀ, for 5 steps.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Polar Express: bring the singular values of (count, rows, columns) near 1."""
    size = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = (matrices / (1.02 * size + 1e-6)).to(matrices.dtype)
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def normalize_neurons(update: torch.Tensor, second: torch.Tensor, beta2: float) -> torch.Tensor:
    """NorMuon (arXiv 2510.05491): even out rows or columns; the whole keeps its norm."""
    # `second`, the running mean of squares, is (count, rows, 1) or (count, 1, columns).
    dim = -1 if second.size(-1) == 1 else -2
    second.lerp_(update.square().mean(dim=dim, keepdim=True), 1 - beta2)
    evened = update * second.clamp_min(1e-10).rsqrt()
    norms = [torch.linalg.vector_norm(u, dim=(-2, -1), keepdim=True) for u in (update, evened)]
    return evened * (norms[0] / norms[1].clamp_min(1e-10))


class Muon(torch.optim.Optimizer):
    """Muon (Keller Jordan, 2024): matrices of one shape as one stack; momentum is (from, to)."""

    def __init__(self, groups: list[dict], dtype: torch.dtype):
        by_shape, self.dtype = [], dtype
        for group in groups:
            for shape in sorted({p.shape for p in group["params"]}):
                params = [p for p in group["params"] if p.shape == shape]
                by_shape.append({**group, "params": params, "step": 0})
        super().__init__(by_shape, dict(weight_decay=WEIGHT_DECAY, beta2=MUON_BETA2))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = group["params"]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            grad, weight = torch.stack(grads), torch.stack(params)
            if not group["step"]:
                group["first"] = torch.zeros_like(grad)
                # A tall matrix comes out with columns of norm 1: its rows are to be evened out.
                dim = -1 if grad.size(-2) >= grad.size(-1) else -2
                group["second"] = torch.zeros_like(grad.mean(dim=dim, keepdim=True))
            start, end = group["momentum"]
            momentum = start + (end - start) * min(1, group["step"] / MUON_MOMENTUM_STEPS)
            group["step"] += 1
            group["first"].lerp_(grad, 1 - momentum)
            update = grad.lerp(group["first"], momentum)  # Nesterov
            update = orthogonalize(update.to(self.dtype)).float()
            update = normalize_neurons(update, group["second"], group["beta2"])
            # Cautious decay (arXiv 2510.12402): only where update and weight have the same sign.
            update += group["weight_decay"] * torch.where(update * weight > 0, weight, 0)
            lr = group["lr"] * max(1, grad.size(-2) / grad.size(-1)) ** 0.5
            torch._foreach_add_(params, list(update), alpha=-lr)


def make_optimizers(model: GPT) -> list[torch.optim.Optimizer]:
    """Groups of parameters with their rates: those with a momentum are Muon's, else AdamW's.

    A parameter belongs to the first group that names it, so to the last one if no other does.
    """
    width_scale, blocks = (model.config.n_embd / 768) ** -0.5, model.blocks
    matrices = [p for p in blocks.parameters() if p.ndim == 2]
    groups = [
        dict(params=[model.lm_head.weight], lr=UNEMBEDDING_LR * width_scale),
        dict(params=model.tables(), lr=EMBEDDING_LR * width_scale),
        dict(params=[block.skip_scale for block in blocks], lr=SCALAR_LR, betas=SKIP_BETAS),
        dict(params=matrices, lr=MATRIX_LR, momentum=MUON_MOMENTUM, weight_decay=WEIGHT_DECAY),
        dict(params=model.parameters(), lr=SCALAR_LR * RESIDUAL_LR_SCALE),
    ]
    named: set[nn.Parameter] = set()
    for group in groups:
        group["params"] = [p for p in group["params"] if p not in named]
        named.update(group["params"])
    rates = dict(betas=ADAM_BETAS, eps=ADAM_EPS, weight_decay=ADAM_WEIGHT_DECAY, fused=True)
    adamw = torch.optim.AdamW([group for group in groups if "momentum" not in group], **rates)
    return [adamw, Muon([group for group in groups if "momentum" in group], model.dtype)]


# --- Schedules ----------------------------


def lr_scale(progress: float) -> float:
    """Linear warm-up, constant, linear warm-down; of progress, the used share of the budget."""
    if progress < WARMUP_RATIO:
        return progress / WARMUP_RATIO
    if progress <= 1 - WARMDOWN_RATIO:
        return 1.0
    return FINAL_LR_FRAC + (1 - FINAL_LR_FRAC) * (1 - progress) / WARMDOWN_RATIO


def apply_schedules(optimizers: list[torch.optim.Optimizer], progress: float) -> None:
    """Scale each group's own rate; Muon's weight decay falls to 0."""
    for group in chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
        lr = group.setdefault("initial_lr", group["lr"])
        group["lr"] = lr * lr_scale(progress)
        if "momentum" in group:
            decay = group.setdefault("initial_weight_decay", group["weight_decay"])
            group["weight_decay"] = decay * (1 - progress)


# --- Platform -----------------------------

# Dense bf16 products of the whole chip: datasheets, without sparsity. By words of the name.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989.5, "H200": 989.5, "B200": 2250, "A100": 312}


class Platform(NamedTuple):
    """What this machine runs on."""

    device: torch.device
    dtype: torch.dtype  # of products
    name: str
    peak_flops: float  # a second; 0 if unknown
    is_cuda: bool


def find_platform() -> Platform:
    """CUDA (or ROCm: all its chips have bf16), MPS or CPU; bf16 where it is the faster type."""
    peak = 0.0
    if torch.cuda.is_available():
        device, name = torch.device("cuda"), torch.cuda.get_device_name()
        words = f" {name} ".replace("-", " ")  # A100 is not A1000
        if not any(part in words for part in (" NVL ", " MIG ", " Laptop ")):  # other peaks
            peak = next((1e12 * t for part, t in PEAK_TFLOPS.items() if f" {part} " in words), 0.0)
        fast = torch.version.hip is not None or torch.cuda.get_device_capability() >= (8, 0)
    elif torch.backends.mps.is_available():
        device, name = torch.device("mps"), "Apple GPU"
        fast = torch.backends.mps.is_macos_or_newer(14, 0)
    else:
        set_up_cpu()
        device, name = torch.device("cpu"), f"CPU, {torch.get_num_threads()} threads"
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    dtype = torch.bfloat16 if fast else torch.float32
    print(f"device: {name}; products in {dtype}, the faster type here")
    return Platform(device, dtype, name, peak, device.type == "cuda")


def set_up_cpu() -> None:
    """No more threads than a container's quota; and glibc keeps what is freed."""
    with suppress(OSError, ValueError):
        quota, period = open("/sys/fs/cgroup/cpu.max").read().split()
        cores = max(1, round(int(quota) / int(period)))
        torch.set_num_threads(min(torch.get_num_threads(), cores))
    with suppress(OSError, AttributeError, TypeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt  # mapping a step's memory anew costs 8 % of a step
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD; older ones refuse more
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# Attention: functions of q, k, v (B, T, H, D) in which a token sees itself and the `window` tokens
# before it: window + 1 keys.


def window_mask(T: int, window: int, device: torch.device) -> torch.Tensor:
    """Which key (column) each query (row) sees: (T, T) bool."""
    distance = torch.arange(T, device=device)[:, None] - torch.arange(T, device=device)
    return (distance >= 0) & (distance <= window)


def written_out(q, k, v, window):
    """Matrix product, softmax, matrix product: the reference of all others, fast on short rows."""
    T, parts = q.size(1), []
    hidden = ~window_mask(T, window, q.device)
    q, k, v = (t.transpose(1, 2) for t in (q * q.size(-1) ** -0.5, k, v))  # (B, H, T, D)
    for start in range(0, T, QUERY_BLOCK):  # keys that none of these sees are not multiplied
        queries = slice(start, min(T, start + QUERY_BLOCK))
        keys = slice(max(0, start - window), queries.stop)
        scores = q[:, :, queries] @ k[:, :, keys].mT
        scores = scores.masked_fill(hidden[queries, keys], -math.inf)
        parts.append(scores.softmax(-1) @ v[:, :, keys])
    return torch.cat(parts, 2).transpose(1, 2)


def torch_sdpa(q, k, v, window):
    """torch's own scaled_dot_product_attention."""
    T = q.size(1)
    mask = window_mask(T, window, q.device) if window < T - 1 else None
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None).transpose(1, 2)


def torch_varlen(q, k, v, window):
    """Flash Attention as torch has it (2.11 and later), over rows laid end to end."""
    from torch.nn.attention.varlen import varlen_attn

    B, T, H, D = q.shape
    starts = torch.arange(0, B * T + 1, T, device=q.device, dtype=torch.int32)
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    sizes = (window if window < T - 1 else -1, 0)  # -1: the whole row, by a faster kernel
    return varlen_attn(*flat, starts, starts, T, T, window_size=sizes).view(B, T, H, D)


def flash_attn_3() -> Callable:
    """Load Flash Attention 3, which prepare.py has fetched: a run only reads the disk."""
    from kernels import get_local_kernel

    kernel = get_local_kernel(prepare.flash_attention_3())

    # An autograd.Function, which torch's ahead-of-time cache refuses: each run traces anew (5 s).
    def attend(q, k, v, window):
        y = kernel.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
        return y[0] if isinstance(y, tuple) else y

    return attend


def attention_backends(platform: Platform) -> list[Callable]:
    """The backends worth trying, best first, by rule: no timing decides what is run."""
    if platform.device.type == "cpu":
        return [written_out]
    if not platform.is_cuda or platform.dtype != torch.bfloat16:
        return [torch_sdpa, written_out]
    best = [flash_attn_3] * prepare.runs_flash_attention_3()  # a loader, which `build` calls
    return [*best, torch_varlen, torch_sdpa, written_out]


def check_attention(attend: Callable, config: GPTConfig, platform: Platform) -> None:
    """Raise ArithmeticError if results or gradients are not the written-out ones."""
    shape = (4, 2, config.sequence_len, config.n_head, config.n_embd // config.n_head)
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows = rows.to(platform.device, platform.dtype)
    limit = 1e-2 if platform.dtype == torch.bfloat16 else 1e-4
    for window in sorted(set(config.windows())):
        results = []
        for function, dtype in ((attend, platform.dtype), (written_out, torch.float32)):
            leaves = [t.to(dtype).requires_grad_() for t in rows[:3]]
            y = function(*leaves, window)
            gradients = torch.autograd.grad(y, leaves, rows[3].to(dtype))
            results.append(torch.stack([y, *gradients]).detach().float().flatten(1))
        error = ((results[0] - results[1]).norm(dim=1) / results[1].norm(dim=1)).max()
        if not error < limit:  # or not a number
            raise ArithmeticError(f"its results are off by {error:.1e} at window {window}")


# --- Training -----------------------------


class Run:
    """Model, optimizers and data of one experiment: warm-up tries them, training starts afresh."""

    def __init__(self, platform: Platform):
        if not str(SEED).isdecimal():
            raise ValueError(f"SEED={SEED} is not a whole number; set one, or leave it out")
        self.seed, self.platform, self.tokenizer = int(SEED), platform, Tokenizer.from_directory()
        V, heads = self.tokenizer.get_vocab_size(), -(-DEPTH * ASPECT_RATIO // HEAD_DIM)
        sizes = (MAX_SEQ_LEN, V, DEPTH, heads, heads, heads * HEAD_DIM)
        self.config = GPTConfig(*sizes, WINDOW_PATTERN, SHORT_WINDOW, VALUE_EMBEDDING_EVERY)
        self.rows = min(DEVICE_BATCH_SIZE, max(1, TOTAL_BATCH_SIZE // MAX_SEQ_LEN))
        if TOTAL_BATCH_SIZE % (self.rows * MAX_SEQ_LEN):
            raise ValueError(
                f"TOTAL_BATCH_SIZE = {TOTAL_BATCH_SIZE} is not a multiple of DEVICE_BATCH_SIZE x "
                f"MAX_SEQ_LEN = {self.rows} x {MAX_SEQ_LEN}; change one of the first two"
            )
        self.eval_rows, backends = EVAL_BATCH_SIZE, attention_backends(platform)
        self.plans = [(attend, compiled) for compiled in (True, False) for attend in backends]

    def build(self) -> None:
        """Make the model as the first plan says, and take some steps on weights thrown away."""
        attend, compiled = self.plans[0]
        attend = attend() if attend is flash_attn_3 else attend
        check_attention(attend, self.config, self.platform)
        torch.manual_seed(self.seed)
        self.model = GPT(self.config, attend, self.platform.dtype)
        self.fresh_weights = {n: w.clone() for n, w in self.model.state_dict().items()}
        self.model.to(self.platform.device)
        if compiled:
            self.model.compile()
        self.start_afresh()
        for step in range(TRIAL_STEPS):
            check_finite(self.take_step(0.0)[0].item(), step)
        self.model.eval()
        with torch.no_grad():
            self.model(next(self.batches)[0][:1].repeat(self.eval_rows, 1))  # as evaluation does
        self.model.train()
        self.start_afresh()

    def start_afresh(self) -> None:
        """Weights, optimizers, random state and data as if nothing had happened yet."""
        torch.manual_seed(self.seed)
        self.model.load_state_dict(self.fresh_weights)
        self.model.zero_grad(set_to_none=True)
        self.optimizers = make_optimizers(self.model)
        sizes = (self.rows, MAX_SEQ_LEN)
        batches = make_dataloader(self.tokenizer, *sizes, "train", self.platform.device)
        self.batches = chain([next(batches)], batches)  # the first one waits ready

    @property
    def micro_batches(self) -> int:
        return TOTAL_BATCH_SIZE // (self.rows * MAX_SEQ_LEN)

    def take_step(self, progress: float) -> tuple[torch.Tensor, int]:
        """One update of the weights; the mean loss over its micro-batches, and the epoch."""
        total = 0.0
        for _ in range(self.micro_batches):
            inputs, targets, epoch = next(self.batches)
            loss = self.model(inputs, targets) / self.micro_batches
            loss.backward()
            total = total + loss.detach()
        apply_schedules(self.optimizers, progress)
        for optimizer in self.optimizers:
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return total, epoch


def warm_up(run: Run) -> None:
    """Build the run, by the first plan and with the largest micro-batch that work."""
    while True:
        try:
            run.build()
            if not run.plans[0][1]:
                print("not compiled, for these reasons, so slower; is g++ or clang installed?")
            return
        except FloatingPointError:  # of the loss: another plan gives no other
            raise
        except Exception as error:  # of a compiler, or its absence, of a device or a library
            traceback.clear_frames(error.__traceback__)
            failure, is_full = error, prepare.is_out_of_memory(error)
        if is_full and (run.rows > 1 or run.eval_rows > 1):
            run.rows = math.gcd(run.rows, run.rows // 2)  # 1 after an odd number: the total stays
            run.eval_rows = max(1, run.eval_rows // 2)
            print(f"out of memory: DEVICE_BATCH_SIZE {run.rows}, {run.micro_batches} micro-batches")
        elif is_full or len(run.plans) == 1:
            raise failure
        else:
            attend, compiled = run.plans.pop(0)
            why = f"{type(failure).__name__}: {str(failure).strip()[:120]}".splitlines()[0]
            print(f"not {attend.__name__}, {'compiled' if compiled else 'eager'}: {why}")
        # Nothing of the failed steps may hold memory.
        run.model = run.optimizers = run.batches = failure = None
        gc.collect()
        torch.compiler.reset()
        if run.platform.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def check_finite(loss: float, step: int) -> None:
    if not -math.inf < loss <= MAX_LOSS:
        raise FloatingPointError(f"loss {loss:.4g} at step {step}")


def read_later(loss: torch.Tensor) -> Callable[[], float]:
    """A function that waits for the work queued so far and gives the loss."""
    if loss.device.type != "cuda":
        return loss.item
    on_host = torch.empty((), pin_memory=True)
    on_host.copy_(loss, non_blocking=True)
    ended = torch.cuda.Event()
    ended.record()
    return lambda: ended.synchronize() or on_host.item()


def train(run: Run) -> tuple[list[float], float, int]:
    """Take steps until the budget is used, the last one less than a step beyond it.

    On CUDA a loss is read a step late, so that the next step is queued before this one has ended.
    Gives when the steps ended, in seconds from 0 on, a running mean of the loss, and the epoch.
    """
    started_s, ends_s, queued, train_loss, lines, logged = time.perf_counter(), [0.0], [], 0.0, 0, 0

    def used_s() -> float:
        return time.perf_counter() - started_s

    while queued or used_s() < TIME_BUDGET:
        step = len(ends_s)  # the one to be read next, counted from 1
        step_s = ends_s[-1] - ends_s[-2] if step > 1 else 0.0  # a queued one takes it too
        if not queued or used_s() + step_s < TIME_BUDGET:
            loss, epoch = run.take_step(used_s() / TIME_BUDGET)
            queued.append((read_later(loss), epoch))
            if run.platform.is_cuda and step > 1 and len(queued) == 1:
                continue  # but the first step is waited for: it shows how long one is
        wait_for_loss, epoch = queued.pop(0)
        loss = wait_for_loss()
        ends_s.append(used_s())
        check_finite(loss, step)
        train_loss = loss if step == 1 else 0.95 * train_loss + 0.05 * loss
        progress = min(1.0, ends_s[-1] / TIME_BUDGET)
        if progress * LOG_LINES >= lines:
            rate = (step - logged) * TOTAL_BATCH_SIZE / (ends_s[-1] - ends_s[logged])
            lines, logged = lines + 1, step
            print(
                f"step {step:5d} · {progress:4.0%} · loss {train_loss:.4f} · "
                f"lr x{lr_scale(progress):.2f} · {rate:,.0f} tokens/s · epoch {epoch}"
            )
    return ends_s, train_loss, epoch


# --- Summary ------------------------------


def peak_memory_mb(platform: Platform) -> float:
    """Of the GPU with CUDA; elsewhere the process's peak resident memory."""
    if platform.is_cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    with suppress(ImportError):  # Windows
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)
    return 0.0


def summarize(run: Run, trained: tuple, val_bpb: float, total_s: float) -> None:
    """Print the lines that program.md reads."""
    ends_s, train_loss, epoch = trained
    training_s, steps, lengths_s = ends_s[-1], len(ends_s) - 1, torch.tensor(ends_s).diff()
    tokens, peak = steps * TOTAL_BATCH_SIZE, run.platform.peak_flops
    flops = run.model.flops_per_token() * tokens / training_s
    print(f"""---
val_bpb:          {val_bpb:.6f}
training_seconds: {training_s:.1f}
total_seconds:    {total_s:.1f}
peak_vram_mb:     {peak_memory_mb(run.platform):.1f}
mfu_percent:      {100 * flops / peak if peak else 0:.2f}
total_tokens_M:   {tokens / 1e6:.1f}
num_steps:        {steps}
num_params_M:     {sum(p.numel() for p in run.model.parameters()) / 1e6:.1f}
depth:            {DEPTH}
benchmark:        {prepare.benchmark_id(prepare.open_prepared())}
device:           {run.platform.name}
attention:        {run.plans[0][0].__name__}
seed:             {run.seed}
train_loss:       {train_loss:.4f}
epoch:            {epoch}
tokens_per_second: {tokens / training_s:.0f}
slow_step_ratio:  {lengths_s.quantile(0.95) / lengths_s.median():.2f}""")


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # whoever reads the log sees all, errors last
    started_s = time.perf_counter() - time.process_time()  # imports count
    try:
        prepare.open_prepared()  # prepares what is missing
        faulthandler.dump_traceback_later(HUNG_AFTER_S, exit=True)
        run = Run(find_platform())
        warm_up(run)
        gc.collect()
        gc.freeze()  # else its pauses would fall into steps
        print(f"training for {TIME_BUDGET} s: {run.micro_batches} x {run.rows} rows a step")
        faulthandler.dump_traceback_later(HUNG_AFTER_S, exit=True)
        trained = train(run)
        faulthandler.dump_traceback_later(HUNG_AFTER_S, exit=True)
        val_bpb = evaluate_bpb(run.model, run.tokenizer, run.eval_rows)
        summarize(run, trained, val_bpb, time.perf_counter() - started_s)
    except (ArithmeticError, MemoryError, OSError, ValueError) as failure:
        sys.exit(f"error: {prepare.explain(failure)}")
    finally:
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
