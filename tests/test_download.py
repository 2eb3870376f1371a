"""Downloading, from a hub on this machine that misbehaves on demand (hub.py)."""

import errno
import io
import json
import os
import random
import shutil
import subprocess
import sys
import threading
from itertools import chain, count, islice, repeat
from pathlib import Path

import hub as hubs
import pyarrow
import pyarrow.parquet
import pytest
from hub import REPOSITORY, Hub

import prepare

ROOT = Path(prepare.__file__).parent
VALIDATION, *TRAIN = NAMES = ["shard_06542.parquet", "shard_00000.parquet", "shard_00001.parquet"]
KILLS = 4  # also tried with 30


def parquet_file(seed: int, num_bytes: int) -> bytes:
    """A parquet file of documents of random words, about so long."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 9))) for _ in range(500)]
    texts = [" ".join(draw.choices(words, k=100)) for _ in range(num_bytes // 600)]
    buffer = io.BytesIO()
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, buffer, compression="none", use_dictionary=False)
    return buffer.getvalue()


FILES = {name: parquet_file(seed, 300_000) for seed, name in enumerate(NAMES)}


@pytest.fixture
def hub(monkeypatch):
    with Hub(FILES) as running:
        monkeypatch.setenv("HF_ENDPOINT", f"{running.url}/")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(prepare, "RETRY_WAITS_S", (0.01,) * 5)
        yield running


@pytest.fixture
def waits_s(monkeypatch):
    """The waits between tries, which take no time."""
    waits = []
    monkeypatch.setattr(prepare.time, "sleep", waits.append)
    return waits


def download(directory: Path, names=NAMES, workers: int = 2) -> None:
    prepare.download(REPOSITORY, names, directory, workers)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def first_bytes(asked: list[hubs.Asked], name: str = VALIDATION) -> list[int]:
    return [request.first_byte for request in asked if request.name == name]


# --- A hub that behaves ----------------------------------------------------------


def test_files_arrive_byte_identical_and_are_not_asked_for_again(hub, tmp_path):
    download(tmp_path, NAMES[:2])
    download(tmp_path)
    assert contents(tmp_path) == FILES
    assert [request.name for request in hub.endpoint.asked] == NAMES


def test_first_name_has_arrived_before_another_is_asked_for(hub, tmp_path):
    hub.content.faults[VALIDATION] = iter([hubs.cut_after(100_000)])
    download(tmp_path, workers=8)
    order = [request.name for request in hub.endpoint.asked]
    assert order[:2] == [VALIDATION] * 2 and sorted(order[2:]) == TRAIN


def test_token_goes_to_the_endpoint_and_never_to_the_content_host(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.renamed_from = "someone/old-name"
    prepare.download("someone/old-name", NAMES, tmp_path, 2)
    assert {request.authorization for request in hub.endpoint.asked} == {"Bearer secret"}
    assert {request.authorization for request in hub.content.asked} == {None}
    assert contents(tmp_path) == FILES


@pytest.mark.parametrize("endpoint", ["", "https://mirror.example/hf/"])
def test_endpoint_is_the_hub_unless_HF_ENDPOINT_names_another(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    asked = []
    monkeypatch.setattr(prepare, "download_file", lambda url, path: asked.append(url))
    prepare.download("a/b", ["c.parquet"], tmp_path, 1)
    host = (endpoint or "https://huggingface.co").rstrip("/")
    assert asked == [f"{host}/datasets/a/b/resolve/main/c.parquet"]


@pytest.mark.parametrize("header", ["X-Linked-ETag", "ETag", None])
@pytest.mark.parametrize("fault", [None, hubs.no_length])
def test_digest_is_the_hubs_wherever_it_names_one(hub, tmp_path, header, fault):
    hub.digest_header = header  # the content host's own ETag is no SHA-256
    hub.content.faults[VALIDATION] = repeat(fault)
    download(tmp_path)
    assert contents(tmp_path) == FILES


# --- Faults that pass ------------------------------------------------------------


@pytest.mark.parametrize("code", [408, 429, 503])
@pytest.mark.parametrize("where", ["endpoint", "content"])
def test_trouble_three_times_is_waited_out(hub, tmp_path, code, where):
    getattr(hub, where).faults[VALIDATION] = iter([hubs.status(code)] * 3)
    download(tmp_path)
    assert contents(tmp_path) == FILES
    assert len(first_bytes(hub.endpoint.asked)) == 4


def test_server_that_names_a_wait_gets_it(hub, tmp_path, waits_s):
    hub.endpoint.faults[VALIDATION] = iter([hubs.status(429, Retry_After="7")])
    download(tmp_path)
    assert 7 <= sum(waits_s) < 8
    assert contents(tmp_path) == FILES


@pytest.mark.parametrize("fault", [hubs.cut_after(200_000), hubs.short_by(100_000)])
def test_broken_transfer_goes_on_where_it_stopped(hub, tmp_path, fault):
    hub.content.faults[VALIDATION] = iter([fault])
    download(tmp_path)
    first, second = first_bytes(hub.content.asked)
    assert first == 0 and second > 100_000
    assert contents(tmp_path) == FILES


def test_any_number_of_breaks_is_outlasted_while_bytes_come(hub, tmp_path):
    hub.files = {VALIDATION: parquet_file(9, 1_000_000)}
    hub.content.faults[VALIDATION] = repeat(hubs.cut_after(80_000))  # some 15 times
    download(tmp_path, [VALIDATION])
    asked = first_bytes(hub.content.asked)
    assert len(asked) > len(prepare.RETRY_WAITS_S) + 1 and asked == sorted(set(asked))
    assert contents(tmp_path) == hub.files


def test_server_that_falls_silent_is_left_and_asked_for_the_rest(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "TIMEOUT_S", (1, 0.2))
    hub.endpoint.faults[VALIDATION] = iter([lambda request, name: request.wait(None)])
    hub.content.faults[VALIDATION] = iter([hubs.stalls_after(200_000)])
    download(tmp_path)
    first, second = first_bytes(hub.content.asked)
    assert first == 0 and second > 100_000
    assert contents(tmp_path) == FILES


@pytest.mark.parametrize(
    "header, repository",
    [("X-Linked-ETag", REPOSITORY), ("X-Linked-ETag", "someone/old-name"), ("ETag", REPOSITORY)],
)
def test_wrong_bytes_of_the_right_length_are_fetched_again(hub, tmp_path, header, repository):
    hub.digest_header, hub.renamed_from = header, "someone/old-name"
    hub.content.faults[VALIDATION] = iter([hubs.wrong_bytes])
    prepare.download(repository, NAMES, tmp_path, 2)
    assert first_bytes(hub.content.asked) == [0, 0]
    assert contents(tmp_path) == FILES


def test_file_shorter_than_the_hub_promised_is_fetched_again(hub, tmp_path):
    hub.content.faults[VALIDATION] = iter([hubs.truncated_by(100_000)])
    download(tmp_path)
    assert first_bytes(hub.content.asked) == [0, 0]
    assert contents(tmp_path) == FILES


def test_server_that_ignores_ranges_after_a_break_sends_it_whole(hub, tmp_path):
    hub.content.faults[VALIDATION] = iter([hubs.cut_after(200_000), hubs.ignores_ranges])
    download(tmp_path)
    first, second = first_bytes(hub.content.asked)
    assert first == 0 and second > 100_000
    assert contents(tmp_path) == FILES


WHOLE = FILES[VALIDATION]


@pytest.mark.parametrize(
    "left",
    [b"", WHOLE[:150_000], WHOLE[:-1], WHOLE, WHOLE + b"more", b"\0" * len(WHOLE), b"\0" * 1000],
    ids=lambda left: f"{len(left)}-bytes",
)
@pytest.mark.parametrize("ending", [".part", ""])
def test_remains_of_any_kind_end_as_the_whole_file(hub, tmp_path, left, ending):
    (tmp_path / (VALIDATION + ending)).write_bytes(left)
    download(tmp_path)
    assert contents(tmp_path) == FILES
    if left == WHOLE:  # and only lacked its name, or not even that
        assert first_bytes(hub.content.asked) == [len(WHOLE)] * (ending == ".part")


# --- Faults that stay ------------------------------------------------------------


def fails(match: str):
    return pytest.raises(RuntimeError, match=match)


@pytest.mark.parametrize("code, tries", [(401, 1), (403, 1), (404, 1), (429, 6), (500, 6)])
def test_failure_that_stays_names_the_shards_and_the_command(hub, tmp_path, code, tries):
    for name in TRAIN:
        hub.endpoint.faults[name] = repeat(hubs.status(code))
    with fails(f"(?s){TRAIN[0]}.*{TRAIN[1]}.* {code} .*uv run prepare.py"):
        download(tmp_path)
    assert contents(tmp_path) == {VALIDATION: FILES[VALIDATION]}
    assert [len(first_bytes(hub.endpoint.asked, name)) for name in TRAIN] == [tries, tries]


def test_one_failure_leaves_the_other_shards(hub, tmp_path):
    hub.files = {name: FILES[name] for name in NAMES if name != TRAIN[0]}
    with fails(rf"1 of 3 .*\({TRAIN[0]}\).*404"):
        download(tmp_path)
    assert contents(tmp_path) == hub.files
    hub.files = FILES
    download(tmp_path)
    assert contents(tmp_path) == FILES


def test_network_that_is_gone_is_not_tried_for_every_shard(hub, tmp_path):
    names = [VALIDATION, *(f"shard_{n:05d}.parquet" for n in range(1000))]
    hub.endpoint.faults = {name: repeat(hubs.status(503)) for name in names[1:]}
    with fails("1000 of 1001 .*shard_00000.*uv run prepare.py") as failure:
        download(tmp_path, names, workers=8)
    assert len({request.name for request in hub.endpoint.asked}) < 30
    assert len(str(failure.value)) < 2000


def test_gated_repository_is_explained_in_the_hubs_words(hub, tmp_path):
    words = f"Access to dataset {REPOSITORY} is restricted"
    hub.endpoint.faults[VALIDATION] = repeat(hubs.status(403, X_Error_Message=words))
    with fails(f"{words}.*HF_TOKEN"):
        download(tmp_path)
    assert {request.name for request in hub.endpoint.asked} == {VALIDATION}


def test_waits_grow_and_end(hub, tmp_path, waits_s, monkeypatch):
    monkeypatch.setattr(prepare, "RETRY_WAITS_S", (1, 2, 4, 8, 16))
    hub.endpoint.faults[VALIDATION] = repeat(hubs.status(500))
    with fails(f"{VALIDATION}.*500"):
        download(tmp_path)
    assert [wait for wait in waits_s if wait] == [1, 2, 4, 8, 16]


@pytest.mark.parametrize(
    "answers",
    [
        repeat(hubs.wrong_bytes),
        chain.from_iterable(repeat([hubs.cut_after(200_000), hubs.wrong_bytes])),
        chain([hubs.wrong_bytes], repeat(hubs.short_by(1))),
        (hubs.ignores_ranges_and_cut_after(n) for n in chain.from_iterable(repeat([2**17, 2**18]))),
        repeat(hubs.truncated_by(100_000)),
        repeat(hubs.status(200, b"<html>Please log in</html>")),
        repeat(hubs.status(200)),
        repeat(hubs.status(416)),
    ],
    ids=["wrong", "cut-wrong", "wrong-short", "unranged", "truncated", "page", "empty", "416"],
)
def test_file_that_is_never_whole_is_given_up_and_never_named(hub, tmp_path, answers):
    hub.content.faults[VALIDATION] = islice(answers, 30)
    with fails(VALIDATION):
        download(tmp_path)
    assert VALIDATION not in contents(tmp_path)
    assert len(hub.content.asked) < 20


def test_full_disk_ends_at_once_and_keeps_what_it_has(hub, tmp_path, monkeypatch):
    class SmallDisk(io.FileIO):
        def write(self, block) -> int:
            if self.tell() + len(block) > 200_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(block)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "open", lambda *a: SmallDisk(*a), raising=False)
        with fails(f"{VALIDATION}.*No space left.*free some space"):
            download(tmp_path)
    assert len(hub.content.asked) == 1 and VALIDATION not in contents(tmp_path)
    download(tmp_path)
    assert first_bytes(hub.content.asked)[1] > 100_000
    assert contents(tmp_path) == FILES


# --- Killed ----------------------------------------------------------------------

# Forks a process for each line, which holds the seconds after which it is to be killed: importing
# torch anew each time would take longer than the rest.
NURSERY = """
import json, os, signal, sys, time
from pathlib import Path
import prepare, pyarrow.parquet, requests
repository, directory, *names = sys.argv[1:]
prepare.say = lambda line: None
for line in sys.stdin:
    if not (child := os.fork()):
        try:
            prepare.download(repository, names, Path(directory), 2)
            os._exit(0)
        finally:
            os._exit(1)
    if delay_s := json.loads(line):
        time.sleep(delay_s)
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_kills_at_any_moment_leave_only_whole_files(hub, tmp_path):
    hub.content.faults = {name: repeat(hubs.paced(bytes_per_s=1e6)) for name in NAMES}
    moments = random.Random(4)
    killed = 0
    command = [sys.executable, "-c", NURSERY, REPOSITORY, str(tmp_path / "raw"), *NAMES]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as nursery:
        for run in count():
            delay_s = moments.uniform(0.01, 0.4) if killed < KILLS else None
            print(json.dumps(delay_s), file=nursery.stdin, flush=True)
            exit_status = int(nursery.stdout.readline())
            assert exit_status in (0, -9), exit_status
            killed += exit_status == -9
            left = contents(tmp_path / "raw") if (tmp_path / "raw").exists() else {}
            whole = {name: data for name, data in left.items() if name in NAMES}
            assert whole.items() <= FILES.items(), f"run {run}"
            if exit_status == 0:
                assert left == FILES
                if killed == KILLS:
                    break
                shutil.rmtree(tmp_path / "raw")
        nursery.stdin.close()
    assert any(request.first_byte for request in hub.content.asked)


# --- The command -----------------------------------------------------------------

SMALL = """
import prepare
prepare.DATASET = "climbmix"
prepare.VOCAB_SIZE, prepare.MAX_SEQ_LEN, prepare.EVAL_TOKENS = 300, 32, 1024
prepare.RETRY_WAITS_S = (0.01, 0.01)
prepare.main()
"""


def start_prepare(cache: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", SMALL, "--num-shards", "2", "--download-workers", "2"]
    environment = {**os.environ, "AUTORESEARCH_CACHE": str(cache)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def test_command_started_twice_at_once_downloads_once_and_ends_well_twice(hub, tmp_path):
    hub.repository = "karpathy/climbmix-400b-shuffle"
    both_began = threading.Event()
    hub.content.faults[VALIDATION] = iter([hubs.sent_after(both_began)])
    processes = [start_prepare(tmp_path), start_prepare(tmp_path)]
    try:
        first_lines = sorted(process.stdout.readline() for process in processes)
    finally:
        both_began.set()
    for process in processes:
        output, errors = process.communicate()
        assert (process.returncode, errors) == (0, "")
        assert output.splitlines()[-1] == "next:      uv run train.py"
    assert "waiting for it" in first_lines[0] and "downloading 3 files" in first_lines[1]
    assert contents(tmp_path / "climbmix" / "raw") == FILES
    assert sorted(request.name for request in hub.endpoint.asked) == sorted(NAMES)


def test_command_without_a_network_names_the_remedy_in_one_line(own_text, monkeypatch):
    with Hub({}) as gone:
        monkeypatch.setenv("HF_ENDPOINT", gone.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(prepare, "DATASET", "climbmix")
    monkeypatch.setattr(prepare, "RETRY_WAITS_S", (0.01, 0.01))
    monkeypatch.setattr(sys, "argv", ["prepare.py"])
    with pytest.raises(SystemExit) as ended:
        prepare.main()
    error = ended.value.code  # a string as code is printed, and the status is 1
    assert error.startswith("error: ") and "\n" not in error and VALIDATION in error
    assert error.endswith(
        'run: uv run prepare.py; without a network, set DATASET = "pysource" in prepare.py'
    )
