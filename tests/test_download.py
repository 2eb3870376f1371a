"""Downloading, from a hub on this machine that misbehaves on demand (hub.py)."""

import errno
import io
import os
import subprocess
import sys
import threading
from itertools import chain, cycle, islice, repeat
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import requests
from conftest import some_text
from hub import REPOSITORY, Asked, Hub, close, reset, send, sends, stall, status

import prepare

ROOT = Path(prepare.__file__).parent
VALIDATION, *TRAIN = NAMES = ["shard_06542.parquet", "shard_00000.parquet", "shard_00001.parquet"]


def parquet_file(seed: int) -> bytes:
    buffer, texts = io.BytesIO(), [some_text(500 * seed + n, 11) for n in range(500)]
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, buffer, compression="none", use_dictionary=False)
    return buffer.getvalue()


FILES = {name: parquet_file(seed) for seed, name in enumerate(NAMES)}  # of 0.3 MB
WHOLE = FILES[VALIDATION]


@pytest.fixture
def hub(monkeypatch):
    with Hub(FILES) as running:
        monkeypatch.setenv("HF_ENDPOINT", f"{running.url}/")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr(prepare, "RETRY_WAITS_S", (0.01,) * 5)
        yield running


def download(directory: Path, names=NAMES, workers=2, repository=REPOSITORY) -> None:
    """And see that the files have arrived, and nothing else."""
    prepare.download(repository, names, directory, workers)
    assert contents(directory) == {name: FILES[name] for name in names}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def first_bytes(asked: list[Asked], name: str = VALIDATION) -> list[int]:
    return [request.first_byte for request in asked if request.name == name]


CUT, SHORTER = sends(most=200_000, then=reset), sends(change=lambda body: body[:-100_000])
FLIP = sends(change=lambda body: body[:250_000] + bytes([body[250_000] ^ 1]) + body[250_001:])


def test_files_arrive_whole_and_once_and_the_first_before_another_is_asked_for(hub, tmp_path):
    hub.content.faults[VALIDATION] = iter([CUT])
    download(tmp_path, NAMES[:2], workers=8)
    download(tmp_path)
    assert [request.name for request in hub.endpoint.asked] == [VALIDATION, *NAMES]


def test_a_file_in_a_folder_of_the_repository_arrives(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "receive", lambda url, part: part.write_bytes(WHOLE) and None)
    prepare.download(REPOSITORY, ["sub/one.parquet"], tmp_path / "data", 2)
    assert (tmp_path / "data/sub/one.parquet").read_bytes() == WHOLE


def test_token_goes_to_the_endpoint_and_never_to_the_content_host(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.renamed_from = "someone/old-name"
    download(tmp_path, repository=hub.renamed_from)
    assert {request.authorization for request in hub.endpoint.asked} == {"Bearer secret"}
    assert {request.authorization for request in hub.content.asked} == {None}


@pytest.mark.parametrize("endpoint", ["", "https://mirror.example/hf/"])
def test_endpoint_is_the_hub_unless_HF_ENDPOINT_names_another(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setattr(requests, "get", lambda url, **_: pytest.fail(f"asked for {url}"))
    url = (endpoint or "https://huggingface.co/") + "datasets/a/b/resolve/main/c.parquet"
    with pytest.raises(pytest.fail.Exception, match=f"asked for {url}$"):
        download(tmp_path, ["c.parquet"], repository="a/b")


TROUBLE = [status(408), status(429), status(503)]


@pytest.mark.parametrize(
    ("endpoint", "content", "tries", "least"),
    [
        (TROUBLE, [], 1, 0),
        ([], TROUBLE, 4, 0),
        ([stall], [CUT], 2, 100_000),
        ([], [sends(most=-100_000, then=close)], 2, 100_000),
        ([], [sends(most=200_000, then=stall)], 2, 100_000),
        ([], [CUT, sends(ranges=False)], 2, 100_000),
    ],
)
def test_passing_trouble_is_outlasted(hub, tmp_path, monkeypatch, endpoint, content, tries, least):
    monkeypatch.setattr(prepare, "TIMEOUT_S", (1, 0.3))
    hub.endpoint.faults[VALIDATION], hub.content.faults[VALIDATION] = iter(endpoint), iter(content)
    download(tmp_path)
    asked = first_bytes(hub.content.asked)
    assert len(asked) == tries and asked[0] == 0 and asked[-1] >= least


def test_any_number_of_breaks_is_outlasted_while_bytes_come(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "RETRY_WAITS_S", (0.01,))
    hub.content.faults[VALIDATION] = repeat(sends(most=70_000, then=reset))
    download(tmp_path)
    asked = first_bytes(hub.content.asked)
    assert len(asked) > 3 and asked == sorted(set(asked))


@pytest.mark.parametrize(
    ("header", "repository", "fault", "tries"),
    [
        ("X-Linked-ETag", REPOSITORY, FLIP, 2),
        ("X-Linked-ETag", "someone/old-name", FLIP, 2),
        ("ETag", REPOSITORY, FLIP, 2),
        (None, REPOSITORY, SHORTER, 2),  # no digest: but it is no parquet file
        (None, REPOSITORY, sends(), 1),  # the content host's own ETag is no SHA-256
    ],
)
def test_wrong_bytes_are_fetched_again(hub, tmp_path, header, repository, fault, tries):
    hub.digest_header, hub.renamed_from = header, "someone/old-name"
    hub.content.faults[VALIDATION] = iter([fault])
    download(tmp_path, repository=repository)
    assert first_bytes(hub.content.asked) == [0] * tries


@pytest.mark.parametrize(
    "left",
    [b"", WHOLE[:150_000], WHOLE[:-1], WHOLE, WHOLE + b"more", b"\0" * len(WHOLE), b"\0" * 1000],
    ids=lambda left: f"{len(left)}-bytes",
)
@pytest.mark.parametrize("ending", [".part", ""])
def test_remains_of_any_kind_end_as_the_whole_file(hub, tmp_path, left, ending):
    (tmp_path / (VALIDATION + ending)).write_bytes(left)
    download(tmp_path)
    if left == WHOLE:  # and only lacked its name, or not even that
        assert first_bytes(hub.content.asked) == [len(WHOLE)] * (ending == ".part")


def fails(match: str):
    return pytest.raises(prepare.HarnessError, match=match)


@pytest.mark.parametrize("code, tries", [(401, 1), (403, 1), (404, 1), (429, 6), (500, 6)])
def test_failure_that_stays_names_shard_and_remedy_and_harms_no_other(hub, tmp_path, code, tries):
    words = f"Access to dataset {REPOSITORY} is restricted"
    hub.endpoint.faults[TRAIN[0]] = repeat(status(code, X_Error_Message=words))
    terms = ".*HF_TOKEN" if code in (401, 403) else ""
    with fails(rf"1 of 3 .*\({TRAIN[0]}\).* {code} {words}{terms}.*uv run prepare.py"):
        download(tmp_path)
    assert len(first_bytes(hub.endpoint.asked, TRAIN[0])) == tries
    assert contents(tmp_path) == {name: FILES[name] for name in (VALIDATION, TRAIN[1])}
    hub.endpoint.faults.clear()
    download(tmp_path)


def test_network_that_is_gone_is_not_tried_for_every_shard(hub, tmp_path):
    names = [VALIDATION, *(f"shard_{n:05d}.parquet" for n in range(1000))]
    hub.endpoint.faults = {name: repeat(status(503)) for name in names[1:]}
    with fails("1000 of 1001 .*shard_00000.*uv run prepare.py") as failure:
        download(tmp_path, names, workers=8)
    assert len({request.name for request in hub.endpoint.asked}) < 30
    assert len(str(failure.value)) < 2000


def test_waits_grow_and_end_and_a_server_that_names_one_gets_it(hub, tmp_path, monkeypatch):
    waits_s = []
    monkeypatch.setattr(prepare.time, "sleep", waits_s.append)
    monkeypatch.setattr(prepare, "RETRY_WAITS_S", (1, 2, 4, 8, 16))
    hub.endpoint.faults[VALIDATION] = chain([status(429, Retry_After="7")], repeat(status(500)))
    with fails(f"{VALIDATION}.*500"):
        download(tmp_path)
    assert [wait for wait in waits_s if wait] == [7, 1, 2, 4, 8, 16]


@pytest.mark.parametrize(
    "answers",
    [
        repeat(FLIP),
        cycle([CUT, FLIP]),
        chain([FLIP], repeat(sends(most=-1, then=close))),
        cycle([sends(most=most, then=reset, ranges=False) for most in (2**17, 2**18)]),
        repeat(SHORTER),
        repeat(status(200, b"<html>Please log in</html>")),
        repeat(status(200)),
        repeat(status(416)),
    ],
)
def test_file_that_is_never_whole_is_given_up_and_never_named(hub, tmp_path, answers):
    hub.content.faults[VALIDATION] = islice(answers, 30)
    with fails(VALIDATION):
        download(tmp_path)
    assert VALIDATION not in contents(tmp_path)
    assert len(hub.content.asked) < 20
    assert {request.name for request in hub.endpoint.asked} == {VALIDATION}


@pytest.fixture
def climbmix(hub, monkeypatch):
    """The hub's files are ClimbMix's, two to train on; constants are small."""
    hub.repository = prepare.HUB["climbmix"].repository
    constants = {"VOCAB_SIZE": 300, "MAX_SEQ_LEN": 32, "EVAL_TOKENS": 1024, "NUM_SHARDS": 2}
    for name, value in (constants | {"DATASET": "climbmix"}).items():
        monkeypatch.setattr(prepare, name, value)
    return hub


def test_full_disk_ends_at_once_and_keeps_what_it_has(climbmix, monkeypatch):
    class SmallDisk(io.FileIO):
        def write(self, block) -> int:
            if self.tell() + len(block) > 200_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(block)

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "open", lambda *a: SmallDisk(*a), raising=False)
        with fails("No space left.*free some space"):
            prepare.open_prepared()
    assert len(climbmix.content.asked) == 1
    assert VALIDATION not in contents(Path(prepare.DATA_DIR))
    prepare.open_prepared()
    assert contents(Path(prepare.DATA_DIR)) == FILES
    assert first_bytes(climbmix.content.asked)[1] > 100_000


def test_shards_that_the_reference_has_left_are_used_and_not_fetched_again(climbmix):
    directory = Path(prepare.CACHE_DIR, "data")
    directory.mkdir(parents=True)
    for name in (VALIDATION, TRAIN[1]):
        (directory / name).write_bytes(FILES[name])
    prepare.open_prepared()
    assert {request.name for request in climbmix.endpoint.asked} == {TRAIN[0]}
    assert contents(directory) == FILES
    climbmix.endpoint.asked.clear()
    prepare.open_prepared(num_shards=1)
    assert climbmix.endpoint.asked == []


# Forks: importing torch anew for each kill would take longer than the rest. The timer's signal
# kills as SIGKILL does; after 0 seconds none comes.
KILLED = """
import os, shutil, signal, sys
from pathlib import Path
import prepare, pyarrow.parquet, requests
repository, directory, *names = sys.argv[1:]
for n, seconds in enumerate((0.1, 0.4, 0.2, 0.3, 0)):
    if not (child := os.fork()):
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            prepare.download(repository, names, Path(directory), 2)
            os._exit(0)
        finally:
            os._exit(1)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    shutil.copytree(directory, f"{directory} {n} {ended}")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and its signals")
def test_kills_at_any_moment_leave_only_whole_files(hub, tmp_path):
    hub.content.faults = {name: repeat(sends(piece_s=0.016)) for name in NAMES}  # 0.5 MB/s
    (tmp_path / "raw").mkdir()
    command = [sys.executable, "-c", KILLED, REPOSITORY, str(tmp_path / "raw"), *NAMES]
    subprocess.run(command, cwd=ROOT, check=True)
    names = [f"raw {n} -14" for n in range(4)] + ["raw 4 0"]  # SIGALRM four times, then all is well
    for name in names:
        whole = {name: data for name, data in contents(tmp_path / name).items() if name in NAMES}
        assert whole.items() <= FILES.items()
    assert whole == FILES
    assert any(request.first_byte for request in hub.content.asked)


SMALL = """
import prepare
prepare.DATASET = "climbmix"
prepare.VOCAB_SIZE, prepare.MAX_SEQ_LEN, prepare.EVAL_TOKENS = 300, 32, 1024
prepare.main()
"""


def test_command_started_twice_at_once_downloads_once_and_ends_well_twice(hub, tmp_path):
    hub.repository, both_began = prepare.HUB["climbmix"].repository, threading.Event()
    hub.content.faults[VALIDATION] = iter([lambda *a: (both_began.wait(), send(*a))])
    command = [sys.executable, "-c", SMALL, "--num-shards", "2", "--download-workers", "3"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]
    try:
        assert all("preparing climbmix" in process.stdout.readline() for process in processes)
    finally:
        both_began.set()
    for process in processes:
        output, errors = process.communicate()
        assert (process.returncode, errors) == (0, "")
        assert output.splitlines()[-1] == "next:      uv run train.py"
    assert contents(tmp_path / "cache/data") == FILES
    assert sorted(request.name for request in hub.endpoint.asked) == sorted(NAMES)
