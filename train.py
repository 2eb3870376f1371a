"""One experiment: train a small language model for TIME_BUDGET seconds and print its val_bpb.

The agent's file: everything in it may change. What it is judged by stands in prepare.py.

    uv run train.py > run.log 2>&1

B batch (rows) · T time · C width · H heads · D head width · V vocabulary. A bare `x` is (B, T, C).
"""

import faulthandler
import gc
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

# The allocator reads this when torch is loaded.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402
from torch.optim.adamw import adamw  # noqa: E402

from prepare import (  # noqa: E402
    MAX_SEQ_LEN,
    TIME_BUDGET,
    Tokenizer,
    benchmark_id,
    evaluate_bpb,
    explain,
    make_dataloader,
    open_prepared,
    training_text,
)

# --- Hyperparameters -------------------------------------------------------------


def scale(gpu, small):
    """The value for a machine with CUDA, and the one for a machine without."""
    return gpu if torch.cuda.is_available() else small


DEPTH = scale(8, 4)  # layers
ASPECT_RATIO = scale(64, 48)  # width = DEPTH x ASPECT_RATIO, rounded up to a multiple of HEAD_DIM
HEAD_DIM = scale(128, 64)
WINDOW_PATTERN = "SSSL"  # tiled over the layers: S short, L the whole row; the last is always L
SHORT_WINDOW = 1 / 2  # of a row
ROTARY_BASE = 10_000
LOGIT_SOFT_CAP = 15.0
VALUE_EMBEDDING_EVERY = scale(2, 1)  # layers, counted back from the last one
SHIFT_KEYS = scale(False, True)  # half of each key from the token before
BIGRAM_ROWS = scale(0, 2**14)  # table of embeddings for hashed pairs of tokens; 0 for none
GUESS_ORDERS = scale((), (2, 3, 4, 5, 6, 8, 12))  # last tokens that are looked up, rising
GUESS_ROWS = 2**24  # of the table of each order; a power of 2
GUESS_TOKENS = int(min(12e6, 40e3 * TIME_BUDGET))  # of text to look up in, at most, at a time
TRAINED_SHARE = 0.5  # of the documents, if there are guesses: these come from the others first
GUESS_RESERVE = 0.8  # of the time that took, kept for the rest at the end: it meets full rows
GATE_CHANNELS = 32  # of a layer's input; they steer its value embedding
MLP_RATIO = 4  # width of an MLP's hidden layer, in widths of the model

EMBEDDING_STD = 1.0
HEAD_STD = 0.001
MATRIX_STD = 1.0  # x width^-1/2
RESIDUAL_START = 1.0  # r: how much of x a layer keeps
SKIP_START = 0.1  # s: how much of the normalised embedding it adds

TOTAL_BATCH_SIZE = scale(2**19, 2**12)  # tokens a step
DEVICE_BATCH_SIZE = scale(128, 8)  # rows at a time; halved by itself where memory is short

EMBEDDING_LR = scale(0.6, 0.5)  # this and the next x (width / 768)^-1/2
UNEMBEDDING_LR = scale(0.004, 0.008)
MATRIX_LR = scale(0.04, 0.03)
SCALAR_LR = 0.5
RESIDUAL_LR_SCALE = 0.01  # of SCALAR_LR, for r
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

SEED = int(os.environ.get("SEED", "42"))  # a second one tells a gain from luck
WARMUP_STEPS = 3  # on weights that are thrown away
QUERY_BLOCK = 128  # queries at a time, where attention is written out
LOSS_SLICE = scale(2**15, 2**10)  # tokens whose logits exist at one time
ACTIVATION_MEMORY = scale(0.95, 1.0)  # below 1 cheap activations are computed again, not kept
MAX_LOSS = 100.0  # a run beyond it is ended
LOG_LINES = 25
HUNG_AFTER_S = TIME_BUDGET + 300  # from when the data is ready, and again for the evaluation

# --- Platform --------------------------------------------------------------------

# Dense bf16 products, in FLOP/s, by words of the device's name: datasheets, without sparsity.
PEAK_FLOPS = {
    "H200 NVL": 835e12,
    "H200": 989.5e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989.5e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "5090": 209.5e12,
    "4090": 165.2e12,
    "3090": 71e12,
    "MI300X": 1307e12,
}
KERNEL_WAIT_S = 60  # for the hub to answer with Flash Attention 3
TRIAL_S = 0.5  # for timing the attention backends

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


@dataclass
class Platform:
    """What this machine runs on, and why."""

    device: torch.device
    dtype: torch.dtype
    name: str
    peak_flops: float  # 0 if unknown

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"


def find_platform() -> Platform:
    """CUDA (ROCm answers to that name), MPS or CPU; bf16 where it is faster than float32."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        words = f"{name} ".replace("-", " ")  # L4 is not L40, nor A100 A1000
        peak = next((flops for part, flops in PEAK_FLOPS.items() if f" {part} " in words), 0.0)
        if " Laptop " in words or " MIG " in words:  # less than the whole chip
            peak = 0.0
        if not peak:
            print(f"peak rate of {name} unknown: mfu_percent will be 0.00")
        fast = torch.version.hip is not None or torch.cuda.get_device_capability() >= (8, 0)
        device = torch.device("cuda")
    elif torch.backends.mps.is_available():
        name, peak, device = "Apple GPU", 0.0, torch.device("mps")
        fast = torch.backends.mps.is_macos_or_newer(14, 0)
    else:
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
        name, peak = f"CPU, {torch.get_num_threads()} threads", 0.0
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        device = torch.device("cpu")
        keep_freed_memory()
    dtype = torch.bfloat16 if fast else torch.float32
    why = "multiplies faster than float32" if fast else "no fast bfloat16 here"
    print(f"device: {name}; computing in {str(dtype).removeprefix('torch.')} ({why})")
    return Platform(device, dtype, name, peak)


def usable_cores() -> int:
    """Cores that this process may use: a container often has fewer than the machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = open("/sys/fs/cgroup/cpu.max").read().split()
        return max(1, min(cores, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: mapping a step's memory anew costs 5 % of a step on a CPU."""
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return
    mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD; older ones refuse more
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# Attention of rows (B, T, H, D) in which each token sees itself and the `window` tokens before it:
# window + 1 keys. k and v may have fewer heads than q.


def window_mask(T: int, window: int, device: torch.device) -> torch.Tensor:
    """Which key (column) each query (row) sees: (T, T) bool."""
    distance = torch.arange(T, device=device)[:, None] - torch.arange(T, device=device)
    return (distance >= 0) & (distance <= window)


def repeat_heads(t: torch.Tensor, heads: int) -> torch.Tensor:
    return t if t.size(2) == heads else t.repeat_interleave(heads // t.size(2), dim=2)


def written_out(config: "GPTConfig", device: torch.device) -> Attend:
    """Matrix product, softmax, matrix product. The reference of all others; fast on short rows.

    Some queries at a time, so that keys which none of them sees are not multiplied.
    """
    T = config.sequence_len
    blocked = {w: ~window_mask(T, w, device) for w in set(config.windows())}

    def attend(q, k, v, window):
        T = q.size(1)
        k, v = repeat_heads(k, q.size(2)), repeat_heads(v, q.size(2))
        q, k, v = (t.transpose(1, 2) for t in (q * q.size(-1) ** -0.5, k, v))  # (B, H, T, D)
        parts = []
        for start in range(0, T, QUERY_BLOCK):
            queries = slice(start, min(T, start + QUERY_BLOCK))
            keys = slice(max(0, start - window), queries.stop)
            scores = q[:, :, queries] @ k[:, :, keys].mT
            scores = scores.masked_fill(blocked[window][queries, keys], -math.inf)
            parts.append(scores.softmax(-1) @ v[:, :, keys])
        return torch.cat(parts, 2).transpose(1, 2)

    return attend


def torch_sdpa(config: "GPTConfig", device: torch.device) -> Attend:
    """torch.nn.functional.scaled_dot_product_attention."""
    T = config.sequence_len
    masks = {w: window_mask(T, w, device) for w in set(config.windows()) if w < T - 1}

    def attend(q, k, v, window):
        T = q.size(1)
        k, v = repeat_heads(k, q.size(2)), repeat_heads(v, q.size(2))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mask = masks[window][:T, :T] if window < T - 1 else None
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return y.transpose(1, 2)

    return attend


def torch_varlen(config: "GPTConfig", device: torch.device) -> Attend:
    """Flash Attention as torch has it, over rows laid end to end (torch 2.11 and later)."""
    from torch.nn.attention.varlen import varlen_attn

    def attend(q, k, v, window):
        B, T, H, D = q.shape
        k, v = repeat_heads(k, H), repeat_heads(v, H)
        starts = torch.arange(0, B * T + 1, T, device=q.device, dtype=torch.int32)
        flat = [t.flatten(0, 1) for t in (q, k, v)]
        sizes = (window if window < T - 1 else -1, 0)  # -1: the whole row, by a faster kernel
        return varlen_attn(*flat, starts, starts, T, T, window_size=sizes).view(B, T, H, D)

    return attend


def flash_attention_3(config: "GPTConfig", device: torch.device) -> Attend:
    """Flash Attention 3 from the kernels hub, which may hang where there is no network.

    Once fetched, the disk has it: the same kernel all night, whatever becomes of the network.
    """
    got = []

    def load():
        try:
            from huggingface_hub.constants import HF_HUB_CACHE
            from kernels import get_kernel, get_local_kernel

            fetched = Path(os.environ.get("KERNELS_CACHE") or HF_HUB_CACHE)
            snapshots = fetched.glob("kernels--kernels-community--flash-attn3/snapshots/*")
            for snapshot in sorted(snapshots):
                with suppress(Exception):  # cut off, or for another torch
                    got.append(get_local_kernel(snapshot))
                    return
            got.append(get_kernel("kernels-community/flash-attn3", version=1))
        except Exception as failure:
            got.append(failure)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(KERNEL_WAIT_S)
    kernel = got[0] if got else TimeoutError(f"the hub did not answer in {KERNEL_WAIT_S} s")
    if isinstance(kernel, Exception):
        raise kernel

    def attend(q, k, v, window):
        y = kernel.flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
        return y[0] if isinstance(y, tuple) else y

    return attend


def attention_candidates(platform: Platform) -> list[Callable]:
    """The backends worth trying, best first."""
    if not platform.is_cuda:
        return [written_out, torch_sdpa]
    backends = [torch_sdpa]
    if platform.dtype == torch.bfloat16:
        backends.insert(0, torch_varlen)
        # On newer chips than 9.0 the kernel has been seen to end the whole process.
        major, minor = torch.cuda.get_device_capability()
        if torch.version.hip is None and (major == 8 or (major, minor) == (9, 0)):
            backends.insert(0, flash_attention_3)
    return backends


def choose_attention(config: "GPTConfig", platform: Platform) -> tuple[Attend, str]:
    """The first backend that works on CUDA, the fastest elsewhere; says why.

    Elsewhere they are timed in turn, so that other processes disturb all alike, and a later one
    must win clearly: two runs of one commit are to have the same.
    """
    tried, fastest_s = {}, {}
    for make in attention_candidates(platform):
        try:
            attend = make(config, platform.device)
            trial = attention_trial(attend, config, platform)
            fastest_s[make.__name__] = min(trial() for _ in range(3))
        except Exception as failure:
            print(f"attention: not {make.__name__}: {first_line(failure)}")
            continue
        tried[make.__name__] = attend, trial
        if platform.is_cuda:
            break
    if not tried:
        return written_out(config, platform.device), "written_out"
    ends_s = time.perf_counter() + TRIAL_S
    while len(tried) > 1 and time.perf_counter() < ends_s:
        for name, (_, trial) in tried.items():
            fastest_s[name] = min(fastest_s[name], trial())
    first, name = next(iter(tried)), min(fastest_s, key=fastest_s.get)
    name = name if fastest_s[name] < 0.8 * fastest_s[first] else first
    times = ", ".join(f"{other} {seconds * 1e3:.1f} ms" for other, seconds in fastest_s.items())
    print(f"attention: {name} ({times})")
    return tried[name][0], name


def first_line(failure: Exception) -> str:
    """Of what may be a page, or nothing."""
    return f"{type(failure).__name__}: {str(failure).strip()[:120]}".splitlines()[0]


def attention_trial(attend: Attend, config: "GPTConfig", platform: Platform) -> Callable:
    """A function that gives the seconds of one pass, forward and backward, at each window.

    It raises ArithmeticError if results or gradients are wrong.
    """
    D, T = config.n_embd // config.n_head, config.sequence_len
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 2, T, config.n_head, D, generator=generator).to(platform.device)

    def results(attend: Attend, dtype: torch.dtype) -> list[torch.Tensor]:
        found = []
        for window in sorted(set(config.windows())):
            leaves = [t.to(dtype).requires_grad_() for t in rows[:3]]
            y = attend(*leaves, window)
            found += [y, *torch.autograd.grad(y, leaves, rows[3].to(dtype))]
        return found

    wanted = results(written_out(config, platform.device), torch.float32)
    limit = 1e-2 if platform.dtype == torch.bfloat16 else 1e-4

    def trial() -> float:
        started_s = time.perf_counter()
        pairs = zip(results(attend, platform.dtype), wanted, strict=True)
        errors = [((a.float() - b).norm() / b.norm()).item() for a, b in pairs]  # waits
        seconds = time.perf_counter() - started_s
        worst = torch.tensor(errors).max().item()  # NaN if one is
        if not worst < limit:
            raise ArithmeticError(f"its results are off by {worst:.1e}")
        return seconds

    return trial


# --- Model -----------------------------------------------------------------------


@dataclass
class GPTConfig:
    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    window_pattern: str = "SSSL"
    bigram_rows: int = 0
    guess_orders: tuple[int, ...] = ()

    def windows(self) -> list[int]:
        """For each layer, how many tokens before itself a token sees."""
        sizes = {"L": self.sequence_len, "S": max(1, int(self.sequence_len * SHORT_WINDOW))}
        pattern = self.window_pattern
        letters = [pattern[layer % len(pattern)] for layer in range(self.n_layer - 1)]
        return [sizes[letter] for letter in [*letters, "L"]]


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm without parameters."""
    return F.rms_norm(x, (x.size(-1),))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (arXiv 2104.09864) of (B, T, H, D): first half paired with the second."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def shift(k: torch.Tensor) -> torch.Tensor:
    """Take the slowly rotating half of each key (B, T, H, D) from the token before.

    Then one layer finds what came after an earlier token like the present one. Otherwise that
    takes two that work together (induction heads, arXiv 2209.11895), found late and by luck.
    """
    own, shifted = k.unflatten(-1, (2, -1)).chunk(2, dim=-1)  # rotation pairs i with i + D / 2
    shifted = F.pad(shifted[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
    return torch.cat((own, shifted), dim=-1).flatten(-2)


def fill_table(table: np.ndarray, contexts: np.ndarray, tokens: np.ndarray) -> None:
    """Fill rows of a table of guesses that are still empty, from contexts (N,) and what follows."""
    pairs = (contexts << 16 | tokens)[table[contexts >> 12] < 0]
    pairs, counts = np.unique(pairs, return_counts=True)  # those of one context stand together
    starts = np.flatnonzero(np.diff(pairs >> 16, prepend=-1))
    totals = np.add.reduceat(counts, starts)
    totals = np.repeat(totals, np.diff(starts, append=len(pairs)))
    certainties = 8 * counts // (totals + 1)  # 0 to 7; of what was seen once, 4
    entries = (certainties << 28 | pairs & 0xFFFFFFF).astype(np.int32)
    rising = np.argsort(counts, kind="stable")
    table[(pairs >> 28)[rising]] = entries[rising]  # of a row's entries the last stays


class Guesses(nn.Module):
    """The token that mostly followed the same last tokens in other training text, embedded.

    Each order, a number of last tokens, has a table. Their hash names a row and 12 bits that tell
    them from others with that row. A row holds certainty (3 bits) · those 12 · the token (16), or
    -1. Of contexts that share a row, the one seen most often has it; full rows stay.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.orders, self.vocab_size = config.guess_orders, config.vocab_size
        sizes = config.vocab_size + 9, config.n_embd  # tokens; certainties, from 0 for no guess
        self.embeds = nn.ModuleList(nn.Embedding(*sizes) for _ in self.orders)
        none = torch.full((len(self.orders), GUESS_ROWS), -1, dtype=torch.int32)
        self.register_buffer("tables", none, persistent=False)
        # Of 43 bits: times 16 bits of a token, over at most 16 tokens, nothing overflows.
        factors = np.random.default_rng(0).integers(2**42, 2**43, max(self.orders, default=0))
        self.factors = factors.tolist()

    def contexts(self, idx: torch.Tensor) -> list[torch.Tensor]:
        """For each order, the hash at each place of (…, T): row of the table · 12 bits."""
        hashed, found = 0, []
        for back, factor in enumerate(self.factors):
            hashed = hashed + F.pad(idx, (back, 0))[..., : idx.size(-1)] * factor
            if back + 1 in self.orders:
                found.append(hashed >> 7 & (GUESS_ROWS << 12) - 1)
        return found

    def fill(self, texts: Iterator[np.ndarray]) -> None:
        """Fill rows that are still empty from flat tokens, at most GUESS_TOKENS of them."""
        parts, left = [np.zeros(0, np.uint16)], GUESS_TOKENS
        for text in texts:
            parts.append(text[:left])
            left -= len(parts[-1])
            if not left:
                break
        tokens = torch.from_numpy(np.concatenate(parts).astype(np.int64))
        tables = self.tables.cpu()
        with ThreadPoolExecutor(2) as pool:  # each takes most of a gigabyte
            contexts = [each[:-1].numpy() for each in self.contexts(tokens)]
            list(pool.map(fill_table, tables.numpy(), contexts, repeat(tokens[1:].numpy())))
        self.tables.copy_(tables)

    def forward(self, idx: torch.Tensor) -> torch.Tensor:
        x = 0
        parts = zip(self.contexts(idx), self.tables, self.embeds, strict=True)
        for contexts, table, embed in parts:
            entries = table[contexts >> 12].long()
            known = (entries >= 0) & (entries >> 16 & 0xFFF == contexts & 0xFFF)
            certainty = torch.where(known, (entries >> 28) + 1, 0)
            guess = embed(torch.where(known, entries & 0xFFFF, 0))
            share = (certainty / 8).to(guess.dtype).unsqueeze(-1)
            x = x + share * guess + embed(self.vocab_size + certainty)
        return x


class CausalSelfAttention(nn.Module):
    """Attention with QK norm (arXiv 2010.04245) and value embeddings (ResFormer, 2410.17897)."""

    def __init__(self, config: GPTConfig, layer: int, attend: Attend):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.window, self.attend = config.windows()[layer], attend
        C, kv_width = config.n_embd, config.n_embd // config.n_head * config.n_kv_head
        self.c_q = nn.Linear(C, C, bias=False)
        self.c_k = nn.Linear(C, kv_width, bias=False)
        self.c_v = nn.Linear(C, kv_width, bias=False)
        self.c_proj = nn.Linear(C, C, bias=False)
        self.gate = None
        if (config.n_layer - 1 - layer) % VALUE_EMBEDDING_EVERY == 0:
            self.gate = nn.Linear(min(GATE_CHANNELS, C), config.n_kv_head, bias=False)

    def forward(self, x, value_embedding, cos, sin):
        B, T, C = x.shape
        q = self.c_q(x).view(B, T, self.n_head, -1)
        k = self.c_k(x).view(B, T, self.n_kv_head, -1)
        v = self.c_v(x).view(B, T, self.n_kv_head, -1)
        if self.gate:
            gate_BTH = 2 * torch.sigmoid(self.gate(x[..., : self.gate.in_features]))
            v = v + gate_BTH.unsqueeze(-1) * value_embedding.view_as(v)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(shift(k) if SHIFT_KEYS else k, cos, sin))
        return self.c_proj(self.attend(q, k, v, self.window).reshape(B, T, C))


class MLP(nn.Module):
    """Two layers with a squared ReLU (Primer, arXiv 2109.08668)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, MLP_RATIO * config.n_embd, bias=False)
        self.c_proj = nn.Linear(MLP_RATIO * config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int, attend: Attend):
        super().__init__()
        self.attn = CausalSelfAttention(config, layer, attend)
        self.mlp = MLP(config)

    def forward(self, x, value_embedding, cos, sin):
        x = x + self.attn(norm(x), value_embedding, cos, sin)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """Logits (B, T, V) float32 from tokens (B, T), or with targets (B, T) their loss in nats."""

    def __init__(self, config: GPTConfig, attend: Attend | None = None):
        super().__init__()
        self.config = config
        attend = attend or written_out(config, torch.device("cpu"))
        head_dim = config.n_embd // config.n_head
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.bigrams = nn.Embedding(config.bigram_rows, config.n_embd)
        self.guesses = Guesses(config)
        self.blocks = nn.ModuleList(Block(config, i, attend) for i in range(config.n_layer))
        gated = [str(layer) for layer, block in enumerate(self.blocks) if block.attn.gate]
        sizes = config.vocab_size, config.n_kv_head * head_dim
        self.value_embeds = nn.ModuleDict({layer: nn.Embedding(*sizes) for layer in gated})
        self.residual_scales = nn.Parameter(torch.empty(config.n_layer))  # r
        self.skip_scales = nn.Parameter(torch.empty(config.n_layer))  # s
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        frequencies = ROTARY_BASE ** -(torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.outer(torch.arange(config.sequence_len), frequencies)[:, None]  # (T, 1, D/2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.run_eagerly()

    def run_eagerly(self) -> None:
        self.trunk = self.hidden
        self.capped_logits, self.loss_of_slice = capped_logits, loss_of_slice

    def compile(self) -> None:
        """Compile the trunk and the head, each for the shapes that it meets."""
        from torch._functorch import config

        config.activation_memory_budget = ACTIVATION_MEMORY
        self.run_eagerly()
        for name in ("trunk", "capped_logits", "loss_of_slice"):
            setattr(self, name, torch.compile(getattr(self, name), dynamic=False))

    def place(self, platform: Platform) -> "GPT":
        """Move to the device; matrices and tables in the compute type, scalars in float32."""
        self.to(platform.device)
        for tensor in [*self.parameters(), *self.buffers()]:
            if tensor.ndim > 1 and tensor.is_floating_point():
                tensor.data = tensor.data.to(platform.dtype)
        return self

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fresh weights, the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        bound = math.sqrt(3 / self.config.n_embd) * MATRIX_STD  # a uniform on ±√3·s has deviation s
        for name, weight in self.named_parameters():
            if weight is self.residual_scales:
                fresh = torch.full(weight.shape, RESIDUAL_START)
            elif weight is self.skip_scales:
                fresh = torch.full(weight.shape, SKIP_START)
            elif weight is self.wte.weight or weight is self.lm_head.weight:
                std = EMBEDDING_STD if weight is self.wte.weight else HEAD_STD
                fresh = torch.randn(weight.shape, generator=generator) * std
            elif name.startswith(("bigrams", "guesses")) or "c_proj" in name or "gate" in name:
                fresh = torch.zeros(weight.shape)
            else:
                fresh = (torch.rand(weight.shape, generator=generator) * 2 - 1) * bound
            weight.copy_(fresh)

    def hidden(self, idx: torch.Tensor) -> torch.Tensor:
        """Everything below the head."""
        cos, sin = self.cos[: idx.size(1)], self.sin[: idx.size(1)]
        x = self.wte(idx)
        if self.config.bigram_rows:
            previous = F.pad(idx[:, :-1], (1, 0))
            x = x + self.bigrams((previous * 36313 + idx * 27191) % self.config.bigram_rows)
        if self.config.guess_orders:
            x = x + self.guesses(idx)
        x = x0 = norm(x)
        for layer, block in enumerate(self.blocks):
            x = self.residual_scales[layer] * x + self.skip_scales[layer] * x0
            table = self.value_embeds[str(layer)] if block.attn.gate else None
            x = block(x, table(idx) if table else None, cos, sin)
        return norm(x)

    def forward(self, idx, targets=None, reduction="mean"):
        x = self.trunk(idx)
        if targets is not None and reduction == "mean":
            weight, rows = self.lm_head.weight, (x.flatten(0, 1), targets.flatten())
            return SlicedLoss.apply(*rows, weight, self.loss_of_slice)
        logits = self.capped_logits(x, self.lm_head.weight)
        if targets is None:
            return logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)
        return loss.view(targets.shape) if reduction == "none" else loss

    def flops_per_token(self) -> int:
        """Forward and backward, of matrix products alone: 6 a weight, and the attention."""
        tables = [self.wte, self.bigrams, *self.guesses.embeds, *self.value_embeds.values()]
        unmultiplied = sum(table.weight.numel() for table in tables) + 2 * self.config.n_layer
        T, windows = self.config.sequence_len, self.config.windows()
        attention = sum(12 * self.config.n_embd * min(window, T) for window in windows)
        return 6 * (sum(p.numel() for p in self.parameters()) - unmultiplied) + attention


def capped_logits(x, weight):
    """Soft-capped logits (…, V) float32."""
    return LOGIT_SOFT_CAP * torch.tanh(F.linear(x, weight).float() / LOGIT_SOFT_CAP)


def loss_of_slice(x, targets, weight):
    """Summed loss of tokens (N, C), and its gradients by x and by the head's weight (V, C)."""
    tanh = torch.tanh(F.linear(x, weight).float() / LOGIT_SOFT_CAP)
    logits = LOGIT_SOFT_CAP * tanh
    normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
    hit = torch.arange(weight.size(0), device=x.device) == targets[:, None]
    loss = (normaliser.squeeze(-1) - torch.where(hit, logits, 0).sum(-1)).sum()
    slope = (torch.exp(logits - normaliser) - hit.float()) * (1 - tanh.square())
    slope = slope.to(x.dtype)
    return loss, slope @ weight, slope.mT @ x


class SlicedLoss(torch.autograd.Function):
    """Mean cross-entropy of the soft-capped head over tokens (N, C), a slice at a time.

    The gradient is taken along with the loss, so that only one slice's logits ever exist.
    """

    @staticmethod
    def forward(ctx, x, targets, weight, loss_of_slice):
        parts = zip(x.split(LOSS_SLICE), targets.split(LOSS_SLICE), strict=True)
        total, grads_x = 0.0, []
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for x_part, targets_part in parts:
            loss, grad_x, grad_part = loss_of_slice(x_part, targets_part, weight)
            total = total + loss
            grads_x.append(grad_x)
            grad_weight += grad_part
        ctx.save_for_backward(torch.cat(grads_x), grad_weight)
        return total / len(x)

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_weight = ctx.saved_tensors
        grad = grad / len(grad_x)
        return grad_x * grad.to(grad_x.dtype), None, (grad_weight * grad).to(grad_x.dtype), None


# --- Optimizer -------------------------------------------------------------------

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
    """NorMuon (arXiv 2510.05491): even out rows or columns; the whole keeps its norm.

    `second` is the running mean of the squares, (count, rows, 1) or (count, 1, columns).
    """
    dim = -1 if second.size(-1) == 1 else -2
    second.lerp_(update.square().mean(dim=dim, keepdim=True), 1 - beta2)
    evened = update * second.clamp_min(1e-10).rsqrt()
    norms = [torch.linalg.vector_norm(u, dim=(-2, -1), keepdim=True) for u in (update, evened)]
    return evened * (norms[0] / norms[1].clamp_min(1e-10))


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Keller Jordan, 2024) for the matrices of the layers, AdamW for all else.

    Weights are kept in float32 here and copied into the model, in its type, once a step. Each
    group is a dictionary with `kind` "muon" (matrices of one shape, updated as one stack) or
    "adamw". lr, momentum and weight_decay are read at each step.
    """

    def __init__(self, groups: list[dict]):
        super().__init__(groups, {})
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]
            weights = [p.detach().float().clone() for p in group["params"]]
            if group["kind"] == "muon":
                weights = [torch.stack(weights)]
                rows, columns = weights[0].shape[1:]
                # The longer side: the vectors along the shorter one come out of norm 1 anyway.
                shape = (len(group["params"]), *((rows, 1) if rows >= columns else (1, columns)))
                group["second"] = [weights[0].new_zeros(shape)]
            else:
                group["second"] = [torch.zeros_like(w) for w in weights]
                group["steps"] = [torch.zeros((), device=w.device) for w in weights]
            group["weights"] = weights
            group["first"] = [torch.zeros_like(w) for w in weights]

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            grads = [p.grad.float() for p in group["params"]]
            if group["kind"] == "muon":
                self.muon(group, torch.stack(grads))
                updated = list(group["weights"][0])
            else:
                self.adamw(group, grads)
                updated = group["weights"]
            torch._foreach_copy_(group["params"], updated)

    @staticmethod
    def adamw(group: dict, grads: list[torch.Tensor]) -> None:
        beta1, beta2 = group["betas"]
        state = (group["weights"], grads, group["first"], group["second"], [], group["steps"])
        rates = dict(lr=group["lr"], weight_decay=group["weight_decay"], eps=ADAM_EPS)
        adamw(*state, fused=True, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2, **rates)

    @staticmethod
    def muon(group: dict, grad: torch.Tensor) -> None:
        (weight,), (first,), (second,) = group["weights"], group["first"], group["second"]
        first.lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(first, group["momentum"])  # Nesterov
        update = orthogonalize(update.to(group["params"][0].dtype)).float()
        update = normalize_neurons(update, second, MUON_BETA2)
        lr = group["lr"] * max(1, weight.size(-2) / weight.size(-1)) ** 0.5
        # Cautious decay (arXiv 2510.12402): only where update and weight have the same sign.
        decay = torch.where(update * weight > 0, weight, 0)
        weight.sub_(update.add_(decay, alpha=group["weight_decay"]), alpha=lr)


def make_optimizer(model: GPT) -> MuonAdamW:
    """The groups of parameters with their rules, rates and betas."""
    width_scale = (model.config.n_embd / 768) ** -0.5
    tables = [model.wte, *model.guesses.embeds, *model.value_embeds.values()]
    if model.config.bigram_rows:
        tables.append(model.bigrams)

    def adam(params, lr, betas=ADAM_BETAS):
        return dict(kind="adamw", params=params, lr=lr, betas=betas, weight_decay=ADAM_WEIGHT_DECAY)

    groups = [
        adam([model.lm_head.weight], UNEMBEDDING_LR * width_scale),
        adam([table.weight for table in tables], EMBEDDING_LR * width_scale),
        adam([model.residual_scales], SCALAR_LR * RESIDUAL_LR_SCALE),
        adam([model.skip_scales], SCALAR_LR, SKIP_BETAS),
    ]
    matrices = list(model.blocks.parameters())
    for shape in sorted({matrix.shape for matrix in matrices}):
        params = [matrix for matrix in matrices if matrix.shape == shape]
        groups.append(
            dict(kind="muon", params=params, lr=MATRIX_LR, momentum=0.0, weight_decay=WEIGHT_DECAY)
        )
    return MuonAdamW(groups)


# --- Schedules -------------------------------------------------------------------
# Functions of progress, the used share of the time budget, from 0 to 1.


def lr_scale(progress: float) -> float:
    """Linear warm-up, constant, linear warm-down to FINAL_LR_FRAC."""
    if progress < WARMUP_RATIO:
        return progress / WARMUP_RATIO
    if progress <= 1 - WARMDOWN_RATIO:
        return 1.0
    return FINAL_LR_FRAC + (1 - FINAL_LR_FRAC) * (1 - progress) / WARMDOWN_RATIO


def muon_momentum(step: int) -> float:
    start, end = MUON_MOMENTUM
    return start + (end - start) * min(1.0, step / MUON_MOMENTUM_STEPS)


def weight_decay(progress: float) -> float:
    return WEIGHT_DECAY * (1 - progress)


def apply_schedules(optimizer: MuonAdamW, progress: float, step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * lr_scale(progress)
        if group["kind"] == "muon":
            group["momentum"] = muon_momentum(step)
            group["weight_decay"] = weight_decay(progress)


# --- Training --------------------------------------------------------------------


class Diverged(RuntimeError):
    """The loss is not a number, or far too large."""


class Clock:
    """Time from the first step to the last, as a share of the budget."""

    def __init__(self, budget_s: float, now: Callable[[], float] = time.perf_counter):
        self.budget_s, self.now = budget_s, now
        self.step, self.step_s = 0, 0.0  # steps that have ended; the last one's length
        self.started_s = self.last_s = now()

    @property
    def used_s(self) -> float:
        return self.now() - self.started_s

    @property
    def progress(self) -> float:
        return min(1.0, self.used_s / self.budget_s)

    def tick(self) -> None:
        """A step has ended."""
        ended_s = self.now()
        self.step, self.step_s, self.last_s = self.step + 1, ended_s - self.last_s, ended_s


def read_later(loss: torch.Tensor) -> Callable[[], float]:
    """A function that waits for the work queued so far and gives the loss.

    On CUDA it is called a step late, so that the next step is queued before this one has ended.
    """
    if loss.device.type != "cuda":
        value = loss.item()
        return lambda: value
    on_host = torch.empty((), pin_memory=True)
    on_host.copy_(loss, non_blocking=True)
    ended = torch.cuda.Event()
    ended.record()

    def value() -> float:
        ended.synchronize()
        return on_host.item()

    return value


def check_finite(loss: float, step: int) -> None:
    if not -math.inf < loss <= MAX_LOSS:
        raise Diverged(f"loss {loss:.4g} at step {step}")


def accumulate_gradients(model: nn.Module, batches: Iterator, micro_batches: int) -> tuple:
    """Mean loss over the micro-batches, its gradients added to the weights; and the epoch."""
    total = 0.0
    for _ in range(micro_batches):
        inputs, targets, epoch = next(batches)
        loss = model(inputs, targets)
        (loss / micro_batches).backward()
        total = total + loss.detach() / micro_batches
    return total.float(), epoch


class Run:
    """The parts of a run that warm-up tries out and training then uses afresh."""

    def __init__(self, platform: Platform):
        self.platform = platform
        self.tokenizer = Tokenizer.from_directory()
        width = -(-DEPTH * ASPECT_RATIO // HEAD_DIM) * HEAD_DIM
        heads = width // HEAD_DIM
        sizes = (MAX_SEQ_LEN, self.tokenizer.get_vocab_size(), DEPTH, heads, heads, width)
        self.config = GPTConfig(*sizes, WINDOW_PATTERN, BIGRAM_ROWS, GUESS_ORDERS)
        self.rows = rows_that_divide(TOTAL_BATCH_SIZE, DEVICE_BATCH_SIZE)
        self.attend, self.attention = choose_attention(self.config, platform)
        self.model = GPT(self.config, self.attend).place(platform)
        self.model.compile()
        self.start_afresh()

    def start_afresh(self) -> None:
        """Weights, optimizer, random state and data as if nothing had happened yet."""
        torch.manual_seed(SEED)
        self.model.init_weights(SEED)
        self.model.zero_grad(set_to_none=True)
        self.optimizer = make_optimizer(self.model)
        data = (self.tokenizer, self.rows, MAX_SEQ_LEN, "train", self.platform.device)
        self.batches = make_dataloader(*data, share=(0, TRAINED_SHARE if GUESS_ORDERS else 1))

    def guess_from(self, share: tuple[float, float]) -> None:
        """Let the model guess from these training documents too."""
        if GUESS_ORDERS:
            started_s = time.perf_counter()
            self.model.guesses.fill(training_text(self.tokenizer, share))
            print(f"guesses: text read in {time.perf_counter() - started_s:.1f} s")

    @property
    def micro_batches(self) -> int:
        return TOTAL_BATCH_SIZE // (self.rows * MAX_SEQ_LEN)

    def take_step(self, progress: float, step: int) -> tuple[torch.Tensor, int]:
        loss, epoch = accumulate_gradients(self.model, self.batches, self.micro_batches)
        apply_schedules(self.optimizer, progress, step)
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return loss, epoch


def rows_that_divide(total_tokens: int, rows: int) -> int:
    """Rows of a micro-batch; ValueError if TOTAL_BATCH_SIZE is no multiple of it."""
    rows = min(rows, max(1, total_tokens // MAX_SEQ_LEN))
    if total_tokens % (rows * MAX_SEQ_LEN):
        raise ValueError(
            f"TOTAL_BATCH_SIZE = {total_tokens} is not a multiple of DEVICE_BATCH_SIZE x "
            f"MAX_SEQ_LEN = {rows} x {MAX_SEQ_LEN}; change one of the first two in train.py"
        )
    return rows


def warm_up(run: Run) -> None:
    """Compile, and find the micro-batch that fits, on weights that are then thrown away."""
    for step in range(WARMUP_STEPS):
        while not try_step(run, step):
            pass
    run.start_afresh()
    if run.platform.is_cuda:
        torch.cuda.synchronize()


def try_step(run: Run, step: int) -> bool:
    """One step and one evaluation batch; False after mending what kept them from working."""
    try:
        loss, _ = run.take_step(1.0, step)
        check_finite(loss.item(), step)
        run.model.eval()
        with torch.no_grad():
            run.model(next(run.batches)[0])
        run.model.train()
        return True
    except Diverged:
        raise
    except Exception as failure:  # whatever a compiler, its absence or a full device can raise
        is_full = isinstance(failure, torch.OutOfMemoryError) or "out of memory" in str(failure)
        if run.rows == 1 if is_full else run.model.trunk == run.model.hidden:
            raise
        problem = None if is_full else first_line(failure)
    # Outside the handlers: a traceback would keep the failed step's memory alive.
    if problem:
        print(f"not compiled, so slower ({problem}); install g++ or clang")
        run.model.run_eagerly()
    else:
        run.rows = math.gcd(run.rows, run.rows // 2)  # 1 after an odd number: the total stays
        print(f"out of memory: DEVICE_BATCH_SIZE {run.rows}, {run.micro_batches} micro-batches")
    run.optimizer = None  # with the gradients, so that their memory goes back too
    run.model.zero_grad(set_to_none=True)
    gc.collect()
    torch.compiler.reset()  # after some recompilations it would leave the model uncompiled
    if run.platform.is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    run.start_afresh()
    return False


class Log:
    """A line now and then; on a terminal, one that renews itself."""

    def __init__(self, clock: Clock):
        self.clock, self.began_s = clock, clock.used_s
        self.lines, self.train_loss, self.epoch = 0, math.nan, 1

    def line(self, loss: float, epoch: int) -> None:
        self.epoch = epoch
        old = loss if math.isnan(self.train_loss) else self.train_loss
        self.train_loss = 0.95 * old + 0.05 * loss
        progress = self.clock.progress
        due = progress * LOG_LINES >= self.lines
        if not (due or sys.stdout.isatty()):
            return
        elapsed_s = max(self.clock.used_s - self.began_s, 1e-9)
        rate = self.clock.step * TOTAL_BATCH_SIZE / elapsed_s
        text = (
            f"step {self.clock.step:5d} · {progress:4.0%} · loss {self.train_loss:.4f} · "
            f"lr x{lr_scale(progress):.2f} · {rate:,.0f} tokens/s · epoch {epoch}"
        )
        start, end = ("\r", "\n" if due else "") if sys.stdout.isatty() else ("", "\n")
        print(start + text, end=end)
        self.lines += due


def train(run: Run, clock: Clock) -> Log:
    """Take steps until the budget is used; the last one ends less than a step beyond it."""
    log = Log(clock)
    queued = []  # steps that are still running on the device
    try:
        while clock.used_s + len(queued) * clock.step_s < clock.budget_s:
            loss, epoch = run.take_step(clock.progress, clock.step + len(queued))
            queued.append((read_later(loss), epoch))
            late = run.platform.is_cuda and clock.step > 0  # the first shows how long a step is
            if len(queued) > late:
                finish_step(queued.pop(0), clock, log)
        while queued:
            finish_step(queued.pop(0), clock, log)
    finally:
        if sys.stdout.isatty():
            print()  # after the line that renews itself
    return log


def finish_step(queued: tuple, clock: Clock, log: Log) -> None:
    wait_for_loss, epoch = queued
    loss = wait_for_loss()
    clock.tick()
    check_finite(loss, clock.step)
    log.line(loss, epoch)


# --- Summary ---------------------------------------------------------------------


def peak_memory_mb(platform: Platform) -> float:
    """Of the GPU with CUDA; elsewhere the process's peak resident memory."""
    if platform.is_cuda:
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def summary(run: Run, clock: Clock, log: Log, val_bpb: float, training_s: float, total_s: float):
    """The lines that `program.md` reads."""
    tokens = clock.step * TOTAL_BATCH_SIZE
    flops = run.model.flops_per_token() * tokens / training_s
    peak = run.platform.peak_flops
    return {
        "val_bpb": f"{val_bpb:.6f}",
        "training_seconds": f"{training_s:.1f}",
        "total_seconds": f"{total_s:.1f}",
        "peak_vram_mb": f"{peak_memory_mb(run.platform):.1f}",
        "mfu_percent": f"{100 * flops / peak if peak else 0:.2f}",
        "total_tokens_M": f"{tokens / 1e6:.1f}",
        "num_steps": f"{clock.step}",
        "num_params_M": f"{sum(p.numel() for p in run.model.parameters()) / 1e6:.1f}",
        "depth": f"{DEPTH}",
        "benchmark": benchmark_id(open_prepared()),
        "device": run.platform.name,
        "attention": run.attention,
        "seed": f"{SEED}",
        "train_loss": f"{log.train_loss:.4f}",
        "epoch": f"{log.epoch}",
        "tokens_per_second": f"{tokens / training_s:.0f}",
    }


def run_experiment() -> None:
    started_s = time.perf_counter() - time.process_time()  # imports count
    open_prepared()  # prepares what is missing
    faulthandler.dump_traceback_later(HUNG_AFTER_S, exit=True)
    platform = find_platform()
    if platform.is_cuda:
        torch.set_float32_matmul_precision("high")
    run = Run(platform)
    warm_up(run)
    gc.collect()
    gc.freeze()
    gc.disable()  # its pauses would fall into steps
    print(f"training for {TIME_BUDGET} s: {run.micro_batches} x {run.rows} rows a step")
    clock = Clock(TIME_BUDGET)
    run.guess_from((TRAINED_SHARE, 1))
    clock.budget_s -= GUESS_RESERVE * clock.used_s
    log = train(run, clock)
    run.guess_from((0, TRAINED_SHARE))
    training_s = clock.used_s
    gc.enable()
    faulthandler.dump_traceback_later(HUNG_AFTER_S, exit=True)  # anew: slow cards take minutes
    val_bpb = evaluate_bpb(run.model, run.tokenizer, run.rows)
    total_s = time.perf_counter() - started_s
    print("---")
    for name, value in summary(run, clock, log, val_bpb, training_s, total_s).items():
        print(f"{name + ':':<17} {value}")
    faulthandler.cancel_dump_traceback_later()


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # whoever reads the log sees all, errors last
    try:
        run_experiment()
    except (OSError, ValueError, RuntimeError) as failure:
        sys.exit(f"error: {explain(failure)}")


if __name__ == "__main__":
    main()
