"""The platform: device and compute type, attention against a loop, and the choice by rule."""

import inspect
import io
import itertools
import math
import sys
from types import SimpleNamespace
from unittest.mock import Mock, create_autospec

import pytest
import torch
from test_training import CPU

import prepare
import train
from train import check_attention, flash_attn_3, torch_sdpa, torch_varlen, written_out

T = 9


def config_for(*windows: int) -> SimpleNamespace:
    """What the check reads of a GPTConfig, with any windows."""
    return SimpleNamespace(sequence_len=T, windows=lambda: windows, n_head=2, n_embd=16)


def loop(q, k, v, window: int) -> torch.Tensor:
    """Attention a query at a time: it sees itself and the `window` tokens before it."""
    B, T, H, D = q.shape
    y = torch.zeros(B, T, H, D, dtype=torch.float64)
    q, k, v = q.double(), k.double(), v.double()
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = slice(max(0, t - window), t + 1)
                weights = torch.exp(k[b, seen, h] @ q[b, t, h] / math.sqrt(D))
                y[b, t, h] = (weights / weights.sum()) @ v[b, seen, h]
    return y


def agree_with_loop(attend, window: int, T: int = T) -> None:
    """Forward and backward, of a sum in which every output has a weight of its own."""
    shape, generator = (3, 2, T, 2, 8), torch.Generator().manual_seed(0)
    inputs, results = torch.randn(shape, generator=generator), []
    for rule in (attend, loop):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = rule(*leaves, window)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
        results.append([y.detach().double(), *(x.grad.double() for x in leaves)])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


# --- Fakes ---


def slow_varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size):
    """Packed sequences (tokens, H, D), one after the other, as torch documents varlen_attn."""
    assert cu_seq_q.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
    assert window_size[1] == 0, "causal"
    ends = cu_seq_q.tolist()
    assert ends[0] == 0 and ends[-1] == len(query) == len(key) == len(value)
    spans = list(itertools.pairwise(ends))
    assert max_q == max_k == max(end - start for start, end in spans)
    window = window_size[0] if window_size[0] >= 0 else len(query)
    rows = [loop(*(t[None, a:b] for t in (query, key, value)), window)[0] for a, b in spans]
    return torch.cat(rows).to(query.dtype)


@pytest.fixture
def varlen(monkeypatch):
    """torch's varlen_attn in slow, called by the real one's signature."""
    module = pytest.importorskip("torch.nn.attention.varlen")
    slow = create_autospec(module.varlen_attn, side_effect=slow_varlen_attn)
    if "window_size" not in inspect.signature(module.varlen_attn).parameters:
        slow = slow_varlen_attn  # torch before 2.11, where the next backend is taken
    monkeypatch.setattr(module, "varlen_attn", slow)


# --- Backends ---


@pytest.mark.parametrize("window", [0, 1, 5, T - 1, T])
@pytest.mark.parametrize("attend", [written_out, torch_sdpa, torch_varlen])
def test_each_backend_sees_a_token_and_a_window_before_it(attend, window, varlen, monkeypatch):
    monkeypatch.setattr(train, "QUERY_BLOCK", 4)  # two blocks, and a rest of one query
    agree_with_loop(attend, window)
    agree_with_loop(attend, window, T=5)  # a row shorter than the longest
    for dtype in (torch.float32, torch.bfloat16):
        check_attention(attend, config_for(max(1, window)), CPU._replace(dtype=dtype))


@pytest.mark.parametrize("gives", [lambda y: y, lambda y: (y, "log-sum-exp")], ids=["y", "pair"])
def test_flash_attention_3_is_read_from_where_prepare_fetched_it_to(gives, monkeypatch):
    def flash_attn_func(q, k, v, *, causal, window_size):
        assert causal and window_size[1] == 0
        return gives(loop(q, k, v, window_size[0]).to(q.dtype))

    found = {"where it lies": SimpleNamespace(flash_attn_func=flash_attn_func)}
    # Nothing else is in it: a run asks no network.
    kernels = SimpleNamespace(get_local_kernel=found.__getitem__)
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    monkeypatch.setattr(prepare, "flash_attention_3", lambda: "where it lies")
    agree_with_loop(flash_attn_3(), 5)


WRONG = {
    "window off by one": lambda q, k, v, window: loop(q, k, v, max(0, window - 1)),
    "right in one window alone": lambda q, k, v, window: loop(q, k, v, 4),
    "right results, wrong gradients": lambda q, k, v, window: (
        loop(q, k, v, window) + v - v.detach()
    ),
    "not a number": lambda q, k, v, window: (q + k + v) * math.nan,
    "not causal": lambda q, k, v, window: loop(*(x.flip(1) for x in (q, k, v)), T),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_results_and_gradients_are_found(name):
    with pytest.raises(ArithmeticError, match="^its results are off by .* at window [49]$"):
        check_attention(lambda *a: WRONG[name](*a).float(), config_for(4, 9), CPU)


# --- Device, compute type and backend: by rule ---

FLASH_FIRST = [flash_attn_3, torch_varlen, torch_sdpa, written_out]
B16, F32 = torch.bfloat16, torch.float32


@pytest.fixture
def machine(monkeypatch):
    """A function that makes this machine another one, and then finds its platform."""

    def no_glibc(name):
        raise OSError("not to be changed by a test")

    def make(capability=None, hip=None, name="a GPU", mps=False, newer=False, fast=(False, False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *a: newer)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast[0])
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: fast[1])
        return train.find_platform()

    monkeypatch.setattr(train.ctypes, "CDLL", no_glibc)
    threads = torch.get_num_threads()
    yield make
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "device, what, dtype, backends",
    [
        ("cpu", dict(), F32, [written_out]),
        ("cpu", dict(fast=(True, False)), B16, [written_out]),
        ("cpu", dict(fast=(False, True)), B16, [written_out]),
        ("mps", dict(mps=True), F32, [torch_sdpa, written_out]),
        ("mps", dict(mps=True, newer=True), B16, [torch_sdpa, written_out]),
        ("cuda", dict(capability=(8, 0)), B16, FLASH_FIRST),
        ("cuda", dict(capability=(9, 0)), B16, FLASH_FIRST),
        ("cuda", dict(capability=(10, 0)), B16, FLASH_FIRST[1:]),
        ("cuda", dict(capability=(7, 5)), F32, FLASH_FIRST[2:]),
        ("cuda", dict(capability=(9, 4), hip="6.4"), B16, FLASH_FIRST[1:]),  # MI300X
        ("cuda", dict(capability=(9, 0), hip="6.4"), B16, FLASH_FIRST[1:]),  # MI250
    ],
)
def test_type_and_backends_by_device_and_capability(device, what, dtype, backends, machine, capsys):
    platform = machine(**what)
    assert platform.device.type == device and platform.is_cuda == (device == "cuda")
    assert platform.dtype == dtype and train.attention_backends(platform) == backends
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"device: {platform.name}; products in {dtype}")


# NVIDIA's datasheets: dense bf16, without sparsity; 0 for chips that the table does not know.
PEAKS = {
    **{"NVIDIA H100 80GB HBM3": 989.5, "NVIDIA H100 PCIe": 756, "NVIDIA A100-SXM4-80GB": 312},
    **{"NVIDIA H100 NVL": 0, "NVIDIA RTX A1000": 0, "NVIDIA H100 80GB HBM3 MIG 1g.10gb": 0},
}


def test_peak_rate_is_the_datasheets_or_unknown(machine):
    found = {name: machine((9, 0), name=name).peak_flops / 1e12 for name in PEAKS}
    assert found == PEAKS


@pytest.mark.parametrize(
    "quota, wanted", [("max 100000", 4), ("200000 100000", 2), ("50000 100000", 1), (None, 4)]
)
def test_threads_are_no_more_than_a_containers_quota(quota, wanted, machine, monkeypatch):
    answer = [io.StringIO(quota)] if quota else FileNotFoundError  # not Linux, or no cgroup
    monkeypatch.setattr(train, "open", Mock(side_effect=answer), raising=False)
    torch.set_num_threads(4)
    assert machine().name == f"CPU, {wanted} threads"
    assert torch.get_num_threads() == wanted
    train.open.assert_called_once_with("/sys/fs/cgroup/cpu.max")


def test_the_allocator_is_told_before_torch_is_loaded_and_a_persons_setting_holds():
    head = inspect.getsource(train).partition("\nimport torch\n")[0]
    assert 'os.environ.setdefault("PYTORCH_ALLOC_CONF"' in head
    assert "import prepare" not in head and "from prepare" not in head  # which loads it too
