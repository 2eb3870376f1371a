"""Attention against a loop; and the platform: what this machine can do, found out by rule."""

import inspect
import itertools
import json
import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
import torch
from test_model import TINY
from test_training import CPU

import prepare
import train
from prepare import HarnessError
from train import GPTConfig, check_attention, flash_attn_3, torch_sdpa, torch_varlen, written_out

T = 9
B16, F32 = torch.bfloat16, torch.float32
ROWS = GPTConfig(**{**TINY, "sequence_len": T, "n_head": 2, "n_kv_head": 2, "n_embd": 16})


def loop(q, k, v, window: int) -> torch.Tensor:
    """Attention a query at a time: it sees itself and the `window` tokens before it."""
    B, T, H, D = q.shape
    k, v = (t.repeat_interleave(H // t.size(2), dim=2) for t in (k, v))
    y = torch.zeros(B, T, H, D, dtype=torch.float64)
    q, k, v = q.double(), k.double(), v.double()
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = slice(max(0, t - window), t + 1)
                weights = torch.exp(k[b, seen, h] @ q[b, t, h] / math.sqrt(D))
                y[b, t, h] = (weights / weights.sum()) @ v[b, seen, h]
    return y


def agree_with_loop(attend, window: int, T: int = T, kv_heads: int = 2) -> None:
    """Forward and backward, of a sum in which every output has a weight of its own."""
    generator, results = torch.Generator().manual_seed(0), []
    inputs = [torch.randn(2, T, H, 8, generator=generator) for H in (2, kv_heads, kv_heads)]
    for rule in (attend, loop):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = rule(*leaves, window)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
        results.append([y.detach().double(), *(x.grad.double() for x in leaves)])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


# --- Fakes ---


def slow_varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa=False
):
    """Packed sequences (tokens, H, D), one after the other, as torch documents varlen_attn."""
    assert enable_gqa == (key.size(1) < query.size(1))
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


def a_library(
    flash_attn_func=lambda q, k, v, *, causal, window_size: loop(q, k, v, window_size[0]),
):
    """What `kernels` gives for Flash Attention 3."""
    return SimpleNamespace(flash_attn_func=flash_attn_func)


# --- Backends ---


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("window", [0, 1, 5, T - 1, T])
@pytest.mark.parametrize("attend", [written_out, torch_sdpa, torch_varlen])
def test_each_backend_sees_a_token_and_a_window_before_it(
    attend, window, kv_heads, varlen, monkeypatch
):
    monkeypatch.setattr(train, "QUERY_BLOCK", 4)  # two blocks, and a rest of one query
    agree_with_loop(attend, window, kv_heads=kv_heads)
    agree_with_loop(attend, window, T=5, kv_heads=kv_heads)  # a row shorter than the longest


@pytest.mark.parametrize("gives", [lambda y: y, lambda y: (y, "log-sum-exp")], ids=["y", "pair"])
def test_flash_attention_3_gets_grouped_heads_as_they_are(gives, monkeypatch):
    def flash_attn_func(q, k, v, *, causal, window_size):
        assert causal and window_size[1] == 0
        return gives(loop(q, k, v, window_size[0]).to(q.dtype))

    monkeypatch.setattr(train, "flash_attn_3_kernel", a_library(flash_attn_func))
    for kv_heads in (2, 1):
        agree_with_loop(flash_attn_3, 5, kv_heads=kv_heads)


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
def test_a_backend_with_other_results_is_an_error_unless_it_is_named(name, monkeypatch):
    """Before, the next backend was taken, unchanged: an idea was measured as the baseline."""
    platform = CPU._replace(attention="torch_sdpa")
    monkeypatch.setitem(train.BACKENDS, "torch_sdpa", lambda *a: WRONG[name](*a).float())
    with pytest.raises(
        HarnessError, match="^attention by torch_sdpa is not that of written_out: off"
    ) as failure:
        check_attention(platform, ROWS)
    assert str(failure.value).endswith('or set ATTENTION = "torch_sdpa" in train.py')
    monkeypatch.setattr(train, "ATTENTION", "torch_sdpa")
    check_attention(platform, ROWS)


def test_a_backend_that_fails_ends_at_its_line_and_names_the_constant(monkeypatch, capsys):
    def mistaken(q, k, v, window):
        return q @ undefined  # noqa: F821

    monkeypatch.setitem(train.BACKENDS, "torch_sdpa", mistaken)
    with pytest.raises(NameError) as failure:
        check_attention(CPU._replace(attention="torch_sdpa"), ROWS)
    assert failure.traceback[-1].name == "mistaken"
    assert "attention by torch_sdpa fails; mend it, or name another one with ATTENTION" in (
        capsys.readouterr().out
    )


def test_backends_that_agree_pass_also_in_bf16_compiled_and_grouped(varlen, monkeypatch):
    compile, traced = torch.compile, []
    eager = dict(backend="eager")
    monkeypatch.setattr(
        torch, "compile", lambda f, **kw: traced.append(f) or compile(f, **kw, **eager)
    )
    grouped = GPTConfig(**{**TINY, "sequence_len": T, "n_head": 2, "n_kv_head": 1, "n_embd": 16})
    for dtype, config in itertools.product((F32, B16), (ROWS, grouped)):
        check_attention(CPU._replace(dtype=dtype, attention="torch_varlen"), config)
    assert not traced
    check_attention(CPU._replace(attention="torch_sdpa", compiles=True), grouped)
    assert traced == [torch_sdpa]
    torch.compiler.reset()


# --- Flash Attention 3: fetched once, then read from the disk ---


@pytest.fixture
def h100(monkeypatch):
    """This machine has one, says torch."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(train, "flash_attn_3_kernel", None)
    return torch.device("cuda")


class FakeKernels:
    """The library: a hub that may be out of reach, and folders."""

    def __init__(self, monkeypatch, tmp_path, failure=None):
        self.asked, self.failure, self.folder = 0, failure, tmp_path / "snapshot"
        monkeypatch.setitem(sys.modules, "kernels", self)

    def install_kernel(self, repository, version):
        assert (repository, version) == ("kernels-community/flash-attn3", 1)
        self.asked += 1
        if self.failure:
            raise self.failure
        variant = self.folder / "build" / "torch-cuda"
        variant.mkdir(parents=True)
        return variant

    def get_local_kernel(self, folder):
        assert folder == self.folder and folder.exists()
        return a_library()


def test_flash_attention_3_is_fetched_once_for_each_version_of_torch_and_cuda(
    h100, tmp_path, monkeypatch
):
    hub = FakeKernels(monkeypatch, tmp_path)
    for _ in range(3):
        assert train.choose_attention(h100, B16) == "flash_attn_3"
    assert hub.asked == 1
    agree_with_loop(flash_attn_3, 5)
    (note,) = prepare.cache_directory().glob("flash-attn-3-*.txt")
    assert torch.__version__ in note.name and f"cuda-{torch.version.cuda}" in note.name
    assert note.read_text() == str(hub.folder)
    monkeypatch.setattr(torch.version, "cuda", "99.0")  # before: another version's build was loaded
    hub.folder = tmp_path / "other"
    assert train.choose_attention(h100, B16) == "flash_attn_3" and hub.asked == 2


def test_a_failure_to_fetch_is_noted_and_says_how_to_try_again(h100, tmp_path, monkeypatch, capsys):
    hub = FakeKernels(monkeypatch, tmp_path, OSError("no network"))
    for _ in range(3):
        assert train.choose_attention(h100, B16) == "torch_varlen"
    (note,) = prepare.cache_directory().glob("flash-attn-3-*.txt")
    output = capsys.readouterr().out
    lines = [line for line in output.splitlines() if "no Flash" in line]
    assert hub.asked == 1 and len(lines) == 3 and output.count("OSError: no network\n") == 1
    assert all(line.endswith(f"; to try again, remove {note}") for line in lines)
    note.unlink()
    hub.failure = None
    assert train.choose_attention(h100, B16) == "flash_attn_3"
    os.rename(hub.folder, tmp_path / "moved")  # what was fetched is gone
    with pytest.raises(HarnessError, match="Flash Attention 3 does not load") as raised:
        train.choose_attention(h100, B16)
    assert str(raised.value).endswith(f"; remove {note}, or set ATTENTION in train.py")


KERNEL = """import torch
def flash_attn_func(q, k, v, causal, window_size):
    return torch.zeros_like(q) + window_size[0]
"""


def test_the_real_library_loads_a_folder_laid_out_as_the_hubs_without_a_network(
    tmp_path, monkeypatch
):
    kernels = pytest.importorskip("kernels")
    variant = tmp_path / "build" / "torch-universal"
    variant.mkdir(parents=True)
    metadata = {"name": "flash-attn3", "id": "flash_attn3", "version": 1, "license": "BSD-3-Clause"}
    metadata |= {"python-depends": [], "backend": {"type": "cpu"}}
    (variant / "metadata.json").write_text(json.dumps(metadata))
    (variant / "__init__.py").write_text(KERNEL)
    folder = prepare.cache_directory()
    versions = f"torch-{torch.__version__}-cuda-{torch.version.cuda}"
    folder.mkdir(parents=True)
    (folder / f"flash-attn-3-{versions}.txt").write_text(str(tmp_path))
    monkeypatch.setattr(kernels, "get_local_kernel", cpu_kernel(kernels.get_local_kernel))
    assert train.load_flash_attn_3()
    q = torch.ones(1, 2, 1, 8)
    assert flash_attn_3(q, q, q, 5).equal(5 * q)


def cpu_kernel(load):
    return lambda folder: load(folder, backend="cpu")


def test_an_autograd_function_over_custom_operators_compiles_whole(monkeypatch):
    """Flash Attention 3's form; its backward writes into what it is given."""

    @torch.library.custom_op("autoresearch_test::forward", mutates_args=())
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        return loop(q, k, v, window).to(q.dtype)

    @forward.register_fake
    def _(q, k, v, window):
        return torch.empty_like(q)

    grads = ("dq", "dk", "dv")

    @torch.library.custom_op("autoresearch_test::backward", mutates_args=grads)
    def backward(
        dy: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, window: int,
    ) -> None:  # fmt: skip
        q, k, v, dy = (t.double().transpose(1, 2) for t in (q, k, v, dy))
        hidden = ~train.window_mask(T, window, q.device)
        weights = (q @ k.mT / q.size(-1) ** 0.5).masked_fill(hidden, -math.inf).softmax(-1)
        seen = weights * (dy @ v.mT)
        scores = (seen - weights * seen.sum(-1, keepdim=True)) / q.size(-1) ** 0.5
        for out, gradient in zip(
            (dq, dk, dv), (scores @ k, scores.mT @ q, weights.mT @ dy), strict=True
        ):
            out.copy_(gradient.transpose(1, 2))

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, window):
            ctx.save_for_backward(q, k, v)
            ctx.window = window
            return torch.ops.autoresearch_test.forward(q, k, v, window)

        @staticmethod
        def backward(ctx, dy):
            gradients = [torch.empty_like(t) for t in ctx.saved_tensors]
            torch.ops.autoresearch_test.backward(dy, *ctx.saved_tensors, *gradients, ctx.window)
            return *gradients, None

    def flash_attn_func(q, k, v, *, causal, window_size):
        return Attention.apply(q, k, v, window_size[0])

    monkeypatch.setattr(train, "flash_attn_3_kernel", a_library(flash_attn_func))
    whole = dict(backend="aot_eager", fullgraph=True, dynamic=False)
    attend = torch.compile(flash_attn_3, **whole)
    agree_with_loop(attend, 5)
    with torch.no_grad():
        agree_q = torch.randn(2, T, 2, 8)
        wanted = loop(agree_q, agree_q, agree_q, 5).float()
        torch.testing.assert_close(attend(agree_q, agree_q, agree_q, 5), wanted)
    torch.compiler.reset()


# --- Device, compute type and backend: by rule ---


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A function that makes this machine another one, and then finds its platform."""

    def no_glibc(name):
        raise OSError("not to be changed by a test")

    def make(capability=None, hip=None, name="a GPU", mps=False, newer=False, fast=None, maker=""):
        has_avx512_bf16, has_amx = fast or (False, False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *a: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *a: newer)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx512_bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
        (tmp_path / "cpuinfo").write_text(f"vendor_id : {maker}")
        files = {"/proc/cpuinfo": tmp_path / "cpuinfo", "/dev/kfd": tmp_path / "kfd"}
        monkeypatch.setattr(train, "Path", lambda path: files.get(path, Path(path)))
        return train.find_platform()

    monkeypatch.setattr(train, "can_compile", lambda device, dtype: True)
    monkeypatch.setattr(train, "load_flash_attn_3", lambda: True)
    monkeypatch.setattr(train.ctypes, "CDLL", no_glibc)
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    yield make
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize(
    "device, what, dtype, attention",
    [
        ("cpu", dict(), F32, "written_out"),
        ("cpu", dict(fast=(True, False), maker="AuthenticAMD"), B16, "written_out"),
        # Before: bf16, with which a step took a third longer.
        ("cpu", dict(fast=(True, False), maker="GenuineIntel"), F32, "written_out"),
        ("cpu", dict(fast=(True, True), maker="GenuineIntel"), B16, "written_out"),
        ("mps", dict(mps=True), F32, "torch_sdpa"),
        ("mps", dict(mps=True, newer=True), B16, "torch_sdpa"),
        ("cuda", dict(capability=(8, 0)), B16, "torch_varlen"),  # before: Flash Attention 3
        ("cuda", dict(capability=(9, 0)), B16, "flash_attn_3"),
        ("cuda", dict(capability=(10, 0)), B16, "torch_varlen"),
        ("cuda", dict(capability=(7, 5)), F32, "torch_sdpa"),
        ("cuda", dict(capability=(9, 4), hip="6.4"), B16, "torch_sdpa"),  # MI300X
        ("cuda", dict(capability=(9, 0), hip="6.4"), B16, "torch_sdpa"),  # MI250
    ],
)
def test_type_and_backend_by_device_and_capability(
    device, what, dtype, attention, machine, monkeypatch, capsys
):
    platform = machine(**what)
    assert platform.device.type == device
    assert (platform.dtype, platform.attention) == (dtype, attention)
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"device: {platform.name}; products in {dtype}")
    assert torch.get_float32_matmul_precision() == ("high" if device == "cuda" else "highest")
    monkeypatch.setattr(train, "ATTENTION", "written_out")
    assert machine(**what).attention == "written_out"
    monkeypatch.setattr(train, "ATTENTION", "flash_attn_4")
    with pytest.raises(
        HarnessError, match='^ATTENTION = "flash_attn_4" in train.py; there are .*sdpa'
    ):
        machine(**what)


@pytest.mark.parametrize("version, built", [("2.10.0", True), ("2.13.0", False)])
def test_where_varlen_is_not_there_the_next_backend_is_taken_with_a_line(
    version, built, machine, monkeypatch, capsys
):
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    assert machine(capability=(8, 0)).attention == "torch_sdpa"
    assert "no varlen_attn" in capsys.readouterr().out


# NVIDIA's datasheets: dense bf16, without sparsity; 0 for chips that the table does not know.
PEAKS = {
    **{"NVIDIA H100 80GB HBM3": 989.5, "NVIDIA H100 PCIe": 756, "NVIDIA A100-SXM4-80GB": 312},
    **{"NVIDIA H100 NVL": 0, "NVIDIA RTX A1000": 0, "NVIDIA H100 80GB HBM3 MIG 1g.10gb": 0},
}


def test_peak_rate_is_the_datasheets_or_unknown(machine):
    names = {name: machine((9, 0), name=name).name for name in PEAKS}
    found = {name: train.PEAK_TFLOPS.get(names[name], 0) for name in PEAKS}
    assert found == PEAKS


@pytest.mark.parametrize("cores, wanted", [(8, 4), (4, 4), (1, 1)])
def test_threads_are_no_more_than_the_cores_that_are_ours(cores, wanted, machine, monkeypatch):
    monkeypatch.setattr(prepare, "usable_cores", lambda: cores)
    torch.set_num_threads(4)
    assert machine().name == f"CPU, {wanted} threads"
    assert torch.get_num_threads() == wanted


def test_under_wsl_memory_ends_where_the_gpus_does(machine, monkeypatch):
    shares = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (6 << 30, 8 << 30))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    for is_wsl in (False, True):
        monkeypatch.setattr(train, "IS_WSL", is_wsl)
        machine((8, 9))
    assert shares == [0.75]


# --- A GPU that is there and cannot be used ---

TOO_OLD = "The NVIDIA driver on your system is too old (found version 12020). Please update"
NOT_THERE = "No CUDA GPUs are available"
NO_DRIVER = "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU"


@pytest.mark.parametrize(
    "answer, visible, refused",
    [
        *((NO_DRIVER, None, False), (TOO_OLD, None, True), (TOO_OLD, "", False)),
        *((NO_DRIVER, "0", True), (NO_DRIVER, "-1", False)),
        *((TOO_OLD, "0", True), (NOT_THERE, None, False), (NOT_THERE, "7", True)),
    ],
)
def test_an_unusable_nvidia_gpu_ends_the_run_before_any_data_is_prepared(
    answer, visible, refused, machine, monkeypatch
):
    """Before, an H100 with an old driver trained the small scale on the CPU."""

    def init():
        raise RuntimeError(answer)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if not refused:
        assert machine().device.type == "cpu"
        return
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(prepare, "open_prepared", lambda: pytest.fail("data is prepared"))
    with pytest.raises(SystemExit) as ended:
        train.main()
    assert ended.value.code.startswith("error: ") and answer[:40] in ended.value.code
    remedy = "uv lock -P torch==2.10.0 && uv sync && uv run prepare.py"
    assert remedy in ended.value.code and "CUDA_VISIBLE_DEVICES" in ended.value.code


def test_an_amd_gpu_beside_a_torch_for_cuda_gets_a_line(machine, tmp_path, capsys):
    machine()
    assert "AMD" not in capsys.readouterr().out
    (tmp_path / "kfd").touch()
    machine()
    assert "there is an AMD GPU, which is not used" in capsys.readouterr().out
    machine((9, 4), hip="6.4")
    assert "AMD" not in capsys.readouterr().out


# --- The compiler ---


def test_without_a_compiler_all_runs_eagerly_with_a_line(monkeypatch, capsys):
    def no_compiler(function, **how):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    cpu = torch.device("cpu")
    monkeypatch.setattr(torch, "compile", no_compiler)
    assert not train.can_compile(cpu, F32)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("not compiled, so slower (RuntimeError: Failed to find C compiler.)")


def test_a_compiler_that_is_switched_off_is_seen(monkeypatch, capsys):
    """Before, the summary said `compiled: yes` of an eager run."""
    cpu, compile = torch.device("cpu"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: f)  # as TORCH_COMPILE_DISABLE does
    assert not train.can_compile(cpu, F32)
    assert "TORCH_COMPILE_DISABLE is set" in capsys.readouterr().out
    monkeypatch.setattr(torch._dynamo.config, "suppress_errors", True)
    monkeypatch.setattr(torch, "compile", lambda f: compile(f, backend="eager"))
    assert train.can_compile(cpu, F32) and train.can_compile(cpu, B16)
    assert not torch._dynamo.config.suppress_errors


def test_a_dead_device_is_not_taken_for_a_missing_compiler(monkeypatch):
    def dead(function):
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch, "compile", dead)
    with pytest.raises(torch.AcceleratorError):
        train.can_compile(torch.device("cpu"), F32)


def test_what_torch_reads_once_is_set_before_it_is_loaded_and_a_persons_setting_holds():
    head = inspect.getsource(train).partition("\nimport torch\n")[0]
    assert "if not IS_WSL" in head and 'os.environ.setdefault("PYTORCH_ALLOC_CONF"' in head
    assert 'os.environ.setdefault("TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD"' in head
    assert 'os.environ.setdefault("GOMP_SPINCOUNT"' in head
    assert "import prepare" not in head and "from prepare" not in head  # which loads it too
    assert os.environ["TORCHINDUCTOR_AUTOGRAD_CACHE_ALLOW_CUSTOM_AUTOGRAD"] == "1"
    from torch._functorch import config

    assert config.autograd_cache_allow_custom_autograd_functions
