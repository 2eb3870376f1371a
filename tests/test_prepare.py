"""Preparing: once, anew where something changed, whole or not at all; any text of one's own."""

import errno
import gzip
import hashlib
import itertools
import json
import os
import random
import runpy
import shutil
import sys
import tempfile
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import regex
import torch
from conftest import some_text

import prepare


def files_in(directory: Path) -> dict[str, tuple]:
    """Every file's content and time of change."""
    files = {}
    for path in filter(Path.is_file, directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        files[name] = (path.read_bytes(), path.stat().st_mtime_ns)
    return files


def contents_in(directory: Path) -> dict[str, bytes]:
    return {name: content for name, (content, _) in files_in(directory).items()}


def prepare_afresh(monkeypatch, cache: Path, *arguments) -> prepare.Prepared:
    """Prepare for the same constants in an empty cache."""
    with monkeypatch.context() as patch:
        patch.setenv("AUTORESEARCH_CACHE", str(cache))
        return prepare.open_prepared(*arguments)


def run_command(monkeypatch, *arguments: str) -> str | None:
    """What `uv run prepare.py` ends with, if it ends early, on one line: a string, and status 1."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", *arguments])
    prepare.local_files.cache_clear()  # as a new process
    try:
        prepare.main()
    except SystemExit as ended:
        assert ended.code == 2 or ended.code.startswith("error: ") and "\n" not in ended.code
        return ended.code


def write_parquet(path: Path, **columns) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def documents_of(prepared: prepare.Prepared, *names: str) -> list[str]:
    """Those in these files, in their order; in all, if none is named."""
    tokenizer = prepare.Tokenizer.from_directory(prepared.folder)
    names = names or ("val.bin", *prepared.train)
    tokens = np.concatenate([np.fromfile(prepared.folder / name, np.uint16) for name in names])
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.get_bos_token_id())[1:])
    return [tokenizer.decode(part[1:].tolist()) for part in parts]


@pytest.mark.parametrize(
    ("name", "value", "new_id"),
    [
        ("VOCAB_SIZE", 450, True),
        ("MAX_SEQ_LEN", 48, True),
        ("EVAL_TOKENS", 20 * 32, True),
        ("HELD_OUT_SHARE", 0.2, True),
        ("FORMAT", -1, False),  # makes the same files anew
    ],
)
def test_a_changed_constant_mixes_nothing(own_text, tmp_path, monkeypatch, name, value, new_id):
    small = prepare.open_prepared()
    before = files_in(small.folder)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, name, value)
        changed = prepare.open_prepared()
        # What came before makes no difference: an empty cache gives the same files.
        fresh = prepare_afresh(monkeypatch, tmp_path / "fresh")
        assert contents_in(changed.folder) == contents_in(fresh.folder)
        assert changed == fresh._replace(folder=changed.folder) != small
        assert (prepare.benchmark_id(changed) != prepare.benchmark_id(small)) == new_id
    assert prepare.open_prepared() == small and files_in(small.folder) == before


def test_changed_text_is_another_benchmark_and_what_was_prepared_before_stays(small, own_text):
    before, known = files_in(small.folder), prepare.benchmark_id(small)
    shutil.rmtree(small.folder / "documents")  # to save space
    assert prepare.open_prepared() == small  # a night goes on with what is left
    (own_text / "new.md").write_text(some_text(1000, 300), encoding="utf-8")
    assert prepare.open_prepared() == small  # and so does a run
    prepare.local_files.cache_clear()  # another process
    more = prepare.open_prepared()
    assert prepare.benchmark_id(more) != known and more.folder != small.folder
    changed = (own_text / "1.txt").read_text().swapcase()  # as long as before
    (own_text / "1.txt").write_text(changed)
    os.utime(own_text / "1.txt", (1, 1))
    prepare.local_files.cache_clear()
    assert changed in documents_of(prepare.open_prepared())
    after = files_in(small.folder)
    assert after == {name: file for name, file in before.items() if name in after}


def test_the_id_is_of_training_files_by_name_and_size_what_is_scored_and_the_clock(
    small, monkeypatch
):
    (name,) = small.train
    renamed = {"train": ["train_1.bin"], "sizes": {"train_1.bin": small.sizes[name]}}
    changes = [{}, renamed, {"sizes": {name: small.sizes[name] + 2}}]
    changes += [{"sha256": small.sha256 | {file: "0" * 64}} for file in small.sha256]
    ids = {prepare.benchmark_id(small._replace(**change)) for change in changes}
    monkeypatch.setattr(prepare, "TIME_BUDGET", prepare.TIME_BUDGET + 1)
    assert len(ids | {prepare.benchmark_id(small)}) == 6  # two of sha256: tokenizer and rows


def test_the_id_is_of_a_folders_name_and_not_of_its_place(small, own_text, tmp_path, monkeypatch):
    known = prepare.benchmark_id(small)
    for name in (own_text.name, "other"):
        copy = tmp_path / "elsewhere" / name
        shutil.copytree(own_text, copy, copy_function=shutil.copyfile)  # other times of change
        monkeypatch.setattr(prepare, "DATASET", str(copy))
        prepared = prepare_afresh(monkeypatch, tmp_path / "another machine")
        assert prepared.rows().tolist() == small.rows().tolist()
        assert (prepare.benchmark_id(prepared) == known) == (name == own_text.name)


@pytest.fixture
def climbmix(own_text, monkeypatch):
    """Downloads that need no hub, of 130 documents a shard; one is trained on."""

    def download(repository, names, directory, workers):
        directory.mkdir(parents=True, exist_ok=True)
        for name in names:
            seed = 1000 * int(name[6:11])
            write_parquet(directory / name, text=[some_text(seed + n, 9) for n in range(130)])

    monkeypatch.setattr(prepare, "DATASET", "climbmix")
    monkeypatch.setattr(prepare, "NUM_SHARDS", 1)
    monkeypatch.setattr(prepare, "download", download)


def test_more_shards_are_another_benchmark_and_leave_a_night_alone(
    climbmix, tmp_path, monkeypatch, capsys
):
    one = prepare.open_prepared()
    before = files_in(one.folder)
    run_command(monkeypatch, "--num-shards", "2")  # as somebody does in another worktree
    assert "NUM_SHARDS = 2 in prepare.py" in capsys.readouterr().out
    assert prepare.open_prepared() == one and files_in(one.folder) == before
    assert one.train == ["train_shard_00000.bin"]
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "NUM_SHARDS", 2)
        patch.setattr(prepare, "make", lambda *_: pytest.fail("was prepared ahead"))
        two = prepare.open_prepared()
        assert two.train == ["train_shard_00000.bin", "train_shard_00001.bin"]
        assert prepare.benchmark_id(two) != prepare.benchmark_id(one)
    # The vocabulary is learned from all that is trained on, whatever came before.
    fresh = prepare_afresh(monkeypatch, tmp_path / "fresh", 2)
    assert fresh._replace(folder=two.folder) == two
    assert one.sha256["tokenizer.tiktoken"] != two.sha256["tokenizer.tiktoken"]
    few = prepare.HUB["climbmix"]._replace(train=prepare.CLIMBMIX[:3])
    monkeypatch.setitem(prepare.HUB, "climbmix", few)
    run_command(monkeypatch, "--num-shards", "-1", "--download-workers", "2")
    monkeypatch.setattr(prepare, "NUM_SHARDS", -1)
    assert len(prepare.open_prepared().train) == 3


def test_files_of_the_hub_keep_their_order_and_rows_of_them_can_be_chosen(climbmix, tmp_path):
    prepared = prepare.open_prepared()
    assert documents_of(prepared, "val.bin") == [some_text(6_542_000 + n, 9) for n in range(130)]
    texts = [f"text {n}" for n in range(5000)]
    write_parquet(tmp_path / "table.parquet", text=texts)
    text = prepare.DataSet([], prepare.Shard("table.parquet"), directory=tmp_path)
    assert list(text.documents(prepare.Shard("table.parquet", 1000, 2500))) == texts[1000:2500]
    assert list(text.documents(prepare.Shard("table.parquet", 4990))) == texts[4990:]


def test_what_is_gone_or_cut_short_is_made_anew_with_a_line(small, own_text, capsys):
    before = contents_in(small.folder)
    assert len(small.sizes) == 4  # the tokenizer, two of tokens, the rows
    for name in small.sizes:
        for damage in (Path.unlink, lambda path: os.truncate(path, 100)):
            damage(small.folder / name)
            (small.folder / "unfinished-12345").mkdir()  # of a killed process
            assert prepare.open_prepared() == small
            assert "or no longer whole; doing it now" in capsys.readouterr().out
            assert contents_in(small.folder) == before
            assert not list(small.folder.glob("unfinished-*"))


def test_a_file_cut_short_is_not_used_under_other_constants(climbmix, tmp_path, monkeypatch):
    one = prepare.open_prepared()
    os.truncate(one.folder / one.train[0], 1000)
    monkeypatch.setattr(prepare, "MAX_SEQ_LEN", 48)  # of a hub's data set: in the same folder
    fresh = prepare_afresh(monkeypatch, tmp_path / "fresh")
    assert prepare.open_prepared()._replace(folder=fresh.folder) == fresh


class Killed(BaseException):
    """Nothing after it is run, not even what removes temporary folders."""


@pytest.mark.parametrize("killed", [False, True], ids=["full disk", "killed"])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_full_disk_or_a_kill_at_any_moment_leaves_nothing_half_made(
    own_text, tmp_path, monkeypatch, killed, function
):
    whole = contents_in(prepare_afresh(monkeypatch, tmp_path / "fresh").folder)
    folder, real, before, stops, message = (
        prepare.prepared_directory(prepare.NUM_SHARDS),
        getattr(os, function),
        {},
        0,
        "",
    )

    def stopped(*arguments):
        nonlocal calls_left
        calls_left -= 1
        if calls_left < 0:
            raise Killed if killed else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments)

    @contextmanager
    def left_behind(**named):
        yield tempfile.mkdtemp(**named)

    if killed:
        monkeypatch.setattr(tempfile, "TemporaryDirectory", left_behind)
    monkeypatch.setattr(os, function, stopped)
    while message is not None:
        calls_left = stops  # once more each time, as some steps need several
        try:
            message = run_command(monkeypatch)
            assert message is None or "free some space or set AUTORESEARCH_CACHE" in message
        except Killed:
            stops += 1
        else:
            stops += message is not None
        left = {name: of for name, of in files_in(folder).items() if "unfinished-" not in name}
        assert {name: content for name, (content, _) in left.items()}.items() <= whole.items()
        done = {name: of for name, of in before.items() if "documents/" not in name}
        assert done.items() <= left.items()  # what was done is not done again
        assert len(left) == len(whole) or not list(folder.glob("*.json"))
        before = left
    assert contents_in(folder) == whole and stops >= 3
    assert killed or not list(folder.glob("unfinished-*"))


REMEDY = 'run: uv run prepare.py; without a network, set DATASET = "pysource" in prepare.py'


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("DATASET", "no/such/place", "not climbmix, tinystories, pysource, no file in /"),
        ("DATASET", "climbmix", REMEDY),  # there is no network
        ("VOCAB_SIZE", 259, "VOCAB_SIZE = 259 must be within 260 … 65536"),
        ("VOCAB_SIZE", 65537, "VOCAB_SIZE = 65537 must be within 260 … 65536"),
        ("EVAL_TOKENS", 511, "MAX_SEQ_LEN = 32 within 2 … EVAL_TOKENS = 511 / 16"),
        ("HELD_OUT_SHARE", 0.01, "of 16 rows to validate on; bring 614,400 varied characters"),
        ("AUTORESEARCH_CACHE", __file__, "set AUTORESEARCH_CACHE to a folder that you may use"),
    ],
)
def test_what_cannot_be_is_an_error_that_says_what_to_do(own_text, monkeypatch, name, value, words):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(prepare, "RETRY_WAITS_S", (0.01,))
    if name == "AUTORESEARCH_CACHE":
        monkeypatch.setenv(name, value)
    else:
        monkeypatch.setattr(prepare, name, value)
    assert words in run_command(monkeypatch)


@pytest.mark.parametrize("text", [None, "", " \n", "Too little. " * 1000])
def test_too_little_text_names_the_least_amount(own_text, monkeypatch, text):
    shutil.rmtree(own_text)
    (own_text / ".git").mkdir(parents=True)
    (own_text / ".git" / "HEAD").write_text("what begins with a dot is not read")
    if text is None:
        assert f"no file in {own_text}" in run_command(monkeypatch)
        return
    (own_text / "little.txt").write_text(text)
    # 100 characters a token of the vocabulary, or 1,920 a token of a row.
    assert "bring 61,440 varied characters" in run_command(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "MAX_SEQ_LEN", 200)
        patch.setattr(prepare, "EVAL_TOKENS", 16 * 200)
        assert "bring 384,000 varied characters" in run_command(monkeypatch)


def test_text_that_was_brought_after_there_was_too_little_is_used(own_text, monkeypatch):
    shutil.copytree(own_text, more := own_text.with_name("more"))
    for path in list(own_text.iterdir())[20:]:
        path.unlink()
    assert "too little text" in run_command(monkeypatch)
    shutil.copytree(more, own_text, dirs_exist_ok=True)
    assert run_command(monkeypatch) is None


def test_one_long_document_is_too_little_to_validate_on(own_text, monkeypatch):
    shutil.rmtree(own_text)
    write_jsonl(own_text / "one.jsonl", [some_text(0, 5000)])
    assert "of 16 rows to validate on; bring 61,440 varied" in run_command(monkeypatch)


def test_what_cannot_be_read_is_named_and_no_space_is_asked_for(own_text, monkeypatch, capsys):
    write_parquet(own_text / "table.parquet", words=["one"], n=[1])  # no column `text`

    def denied(path, *arguments, **named):  # whoever is root may read everything
        if Path(path).name == "7.txt":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open(path, *arguments, **named)

    monkeypatch.setattr(prepare, "open", denied, raising=False)
    assert run_command(monkeypatch) is None
    (note,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("note: "))
    names = f"{own_text}/7.txt, {own_text}/table.parquet"
    assert note == f"note: 2 files, or parts of them, cannot be read as text: {names}"
    for name in ("7.txt", "table.parquet"):
        monkeypatch.setattr(prepare, "DATASET", str(own_text / name))
        message = run_command(monkeypatch)
        assert "too little text: 0 of 1 documents" in message and "space" not in message
        assert f"cannot be read as text: {own_text}/{name}\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["shard_00000.parquet", "shard_06542.parquet"])
def test_a_file_of_the_hub_with_damaged_data_is_named(climbmix, monkeypatch, name):
    shutil.rmtree(prepare.open_prepared().folder)
    monkeypatch.setattr(prepare, "download", lambda *_: None)  # all files are there
    file = prepare.cache_directory() / "data" / name
    with open(file, "r+b") as content:
        content.write(b"PAR1" + bytes(2000))
    assert prepare.is_parquet(file)  # by its footer
    message = run_command(monkeypatch)
    assert f"{file} cannot be read: " in message and "space" not in message
    assert "; remove /" in message and message.endswith(", run: uv run prepare.py")


@pytest.mark.parametrize("name", ["0000.jsonl", "val.jsonl"])
def test_a_gathered_file_with_a_damaged_line_is_an_error_whose_remedy_works(
    small, monkeypatch, name
):
    before = contents_in(small.folder)
    for file in small.folder.glob("*.*"):
        file.unlink()
    damaged = small.folder / "documents" / name
    os.truncate(damaged, damaged.stat().st_size - 5)
    message = run_command(monkeypatch)
    assert f'{damaged} cannot be read: ValueError: 1 lines have no "text"; remove /' in message
    damaged.unlink()
    assert run_command(monkeypatch) is None and contents_in(small.folder) == before


def test_held_out_are_the_documents_of_the_lowest_hashes_as_far_as_they_fit(
    own_text, tmp_path, monkeypatch
):
    """Whatever their lengths and their order; what stands twice is on one side."""

    def hash_of(text: str) -> bytes:
        return hashlib.blake2b(text.encode(), digest_size=8).digest()

    rng = random.Random(0)
    for seed in range(20):
        texts = [f"{rng.random()} " * rng.choice((1, 2, 90)) for _ in range(300)]
        texts += rng.choices(texts, k=100)
        folder = own_text.with_name(f"lines {seed}")
        write_jsonl(folder / "all.jsonl", texts)
        monkeypatch.setattr(prepare, "DATASET", str(folder))
        monkeypatch.setattr(prepare, "EVAL_TOKENS", rng.choice((50, 500, 50_000)))
        out = tmp_path / f"out {seed}"
        prepare.gather_local_text(out / "0000.jsonl", out / "val.jsonl")
        most = min(12 * prepare.EVAL_TOKENS, sum(map(len, texts)) / 10)
        wanted, ends = sorted(texts, key=hash_of), itertools.accumulate
        fitting = sum(end <= most for end in ends(map(len, wanted)))
        wanted, others = wanted[:fitting], wanted[fitting:]
        wanted = [text for text in wanted if text != others[0]]
        held_out, trained = (
            [json.loads(line)["text"] for line in (out / name).open()]
            for name in ("val.jsonl", "0000.jsonl")
        )
        assert held_out == wanted and sorted(held_out + trained) == sorted(texts)


def test_a_tokenizer_that_is_not_prepared_is_an_error_and_none_is_made(own_text):
    with pytest.raises(prepare.HarnessError, match="no tokenizer in .*run: uv run prepare.py"):
        prepare.Tokenizer.from_directory()
    assert not prepare.cache_directory().exists()


def test_cores_are_those_of_a_containers_quota(monkeypatch):
    for quota, cores in (("150000 100000", 2), ("10000 100000", 1), ("max 100000", 64)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
        monkeypatch.setattr(Path, "read_text", lambda _, quota=quota: quota)
        assert prepare.usable_cores() == cores


SHARES = {"sympy": 0.36, "pandas": 0.33, "numpy": 0.12, "matplotlib": 0.10, "networkx": 0.09}


def package_documents(number: int) -> dict[str, list[str]]:
    """Short documents, each of which begins with its package's name."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 9))) for _ in range(300)]
    packages = {}
    for package, share in SHARES.items():
        lengths = [rng.randint(3, 12) for _ in range(round(share * number))]
        packages[package] = [" ".join([package, *rng.choices(words, k=k)]) for k in lengths]
    return packages


def assert_in_proportion(texts: list[str]) -> None:
    """Within four standard deviations of a fair sample."""
    for package, share in SHARES.items():
        found = sum(text.startswith(package) for text in texts) / len(texts)
        assert abs(found - share) < 4 * (share * (1 - share) / len(texts)) ** 0.5, package


def test_scored_rows_hold_every_package_in_proportion_wherever_documents_lie(own_text, monkeypatch):
    monkeypatch.setattr(prepare, "EVAL_TOKENS", 350 * 32)
    packages = package_documents(30_000)
    for package, texts in packages.items():
        for n in range(10):  # all of a package lie together
            write_jsonl(own_text.with_name("code") / package / f"{n}.jsonl", texts[n::10])
    monkeypatch.setattr(prepare, "DATASET", str(own_text.with_name("code")))
    prepared = prepare.open_prepared()
    assert_in_proportion(documents_of(prepared, *prepared.train))
    scored = prepare.Tokenizer.from_directory().decode(prepared.rows().flatten())
    pieces = [text for text in scored.split(prepare.BOS_TOKEN) if len(text) > len("matplotlib")]
    assert len(prepared.rows()) == 350 and len(pieces) > 350
    assert_in_proportion(pieces)
    # At most a tenth is held out, and at most 12 bytes for each of EVAL_TOKENS.
    held_out, trained = documents_of(prepared, "val.bin"), documents_of(prepared, *prepared.train)
    everything = [text for texts in packages.values() for text in texts]
    assert sorted(held_out + trained) == sorted(everything)
    most = min(sum(map(len, everything)) / 10, 12 * 350 * 32)
    assert most - 200 < sum(map(len, held_out)) <= most
    # In one file and another order, one of them twice: the same are scored, in the same order, and
    # no document is in both splits.
    write_jsonl(own_text / "all.jsonl", [held_out[0], *reversed(everything)])
    monkeypatch.setattr(prepare, "DATASET", str(own_text / "all.jsonl"))
    again = prepare.open_prepared()
    same = [held_out[0], *held_out][: len(held_out) // 2]
    assert documents_of(again, "val.bin")[: len(same)] == same
    assert not set(documents_of(again, "val.bin")) & set(documents_of(again, *again.train))


def test_text_that_changes_while_it_is_read_is_an_error_and_nothing_is_kept(own_text, monkeypatch):
    """It is read twice: for the hashes, then for the two files."""
    texts, readings = prepare.file_texts, []

    def edited(path):
        readings.append(path)
        is_torn = path.name == "7.txt" and readings.count(path) == 2
        return iter(()) if is_torn else texts(path)

    monkeypatch.setattr(prepare, "file_texts", edited)
    assert "the text changed while it was read; run: uv run prepare.py" in run_command(monkeypatch)
    assert not files_in(prepare.prepared_directory(prepare.NUM_SHARDS))
    assert run_command(monkeypatch) is None


def test_files_are_read_in_the_same_order_on_every_platform(own_text):
    for name in ("a/x.txt", "a-b/x.txt", "a.txt", "A/x.txt", "a/b/x.txt"):
        (own_text / name).parent.mkdir(parents=True, exist_ok=True)
        (own_text / name).write_text("text")
    files = prepare.local_files(prepare.DATASET)
    names = [Path(name).relative_to(own_text).as_posix() for name, _, _ in files]
    # By the characters of the path with slashes: "-" and "." stand before "/".
    assert names[-5:] == ["A/x.txt", "a-b/x.txt", "a.txt", "a/b/x.txt", "a/x.txt"]


def test_documents_come_from_every_kind_of_file_and_what_is_odd_is_named(own_text, capsys):
    usual = set(documents_of(prepare.open_prepared()))
    prepare.local_files.cache_clear()  # as a new process
    (own_text / "deep" / "er").mkdir(parents=True)
    lines = [json.dumps({"text": f"{n} {some_text(n, 9)}"}) for n in range(200)]
    odd = pyarrow.array([b"caf\xe9 in parquet"], pyarrow.binary()).view(pyarrow.string())
    nested = 100_000 * "["  # too deep for Python's stack
    for n, line in enumerate(('{"n": 2}', '["text"]', "7", '{"text": null}', nested)):
        more_json = (
            f'{{"text": "of more JSON"}}\n{{"text": ""}}\n{line}\n{{"text": "behind {n}"}}\n'
        )
        (own_text / f"e{n}.jsonl").write_text(more_json)
    for name, content in {
        "a.txt": b"of a text file\r\n",
        "deep/b.md": "# of Markdown: 狐狸 😀".encode(),
        "deep/er/c.py": b"code = 1\n",
        "d.jsonl": b'\xef\xbb\xbf{"text": "of JSON, 1", "n": 1}\n\n{"text": "\\ud800 of JSON, 2"}',
        "latin.txt": "Käse für alle".encode("latin-1"),
        "greek.txt": "τυρί".encode("iso8859-7"),
        "image.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        "not-zipped.gz": b"plain",
        "pack.gz": gzip.compress(b"of a packed manual" * 9, mtime=0),
        "torn.jsonl": "\n".join(lines)[:-9].encode(),
        "torn.parquet": b"PAR1\0\0 and no end",
        "weights.bin": b"",
        "blank.txt": b" \n\t\n\n",
    }.items():
        (own_text / name).write_bytes(content)
    os.truncate(own_text / "weights.bin", 200 << 30)  # sparse: read whole, it would end us
    (own_text / "gone.txt").symlink_to(own_text / "nowhere")
    write_parquet(own_text / "g.parquet", n=[1, 2, 3], text=["of parquet", None, ""])
    write_parquet(own_text / "h.parquet", text=odd)
    write_parquet(own_text / "i.parquet", text=pyarrow.array(["twice"] * 2).dictionary_encode())
    write_parquet(own_text / "j.parquet", text=pyarrow.array(["large"], pyarrow.large_string()))
    capsys.readouterr()
    documents = set(documents_of(prepare.open_prepared())) - usual
    (note,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("note: "))
    # Of what is cut off, the documents before the cut are served.
    before_cut = {text for text in documents if text.split()[0].isdecimal()}
    assert before_cut == {f"{n} {some_text(n, 9)}" for n in range(199)}
    assert documents - before_cut == (
        {"of a text file\n", "# of Markdown: 狐狸 😀", "code = 1\n", "of JSON, 1", "? of JSON, 2"}
        | {
            "of more JSON",
            *(f"behind {n}" for n in range(5)),
            "plain",
            "K\ufffdse f\ufffdr alle",
            4 * "\ufffd",
        }
        | {"of parquet", "caf\ufffd in parquet", "twice", "large"}
    )
    odd_ones = [f"e{n}.jsonl" for n in range(5)]
    # An image, an archive, two torn ones and weights.bin, too: five are named.
    assert note.startswith("note: 10 files, or parts of them, ")
    assert note.endswith(": " + ", ".join(f"{own_text}/{name}" for name in odd_ones))


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("".join(f"{n}: {some_text(n, 1)[:9]}.\n\n" for n in range(9000)), "\n\n"),
        ("".join(f"{n}: a line of a log or of a poem\n" for n in range(5000)), "\n"),
        ("".join(f"{n} is a word of text8 " for n in range(5000)), ""),
        ("敏捷的棕色狐狸" * 5000, ""),
    ],
    ids=["paragraphs", "lines", "one line", "no blank"],
)
def test_a_book_is_cut_into_pieces_of_about_a_row_of_tokens(
    tmp_path, monkeypatch, own_text, text, end
):
    book = tmp_path / "My Book.txt"
    book.write_text(text, encoding="utf-8")
    pieces = list(prepare.file_texts(book))
    assert "".join(pieces) == text
    # A token of a small vocabulary is 2 to 4 characters, a row 32 of them.
    assert all(3 * 32 <= len(piece) <= 4 * 32 for piece in pieces[:-1]) and len(pieces) > 100
    assert all(piece.endswith(end) for piece in pieces)
    if end == "\n\n":
        monkeypatch.setattr(prepare, "DATASET", str(book))
        prepared = prepare.open_prepared()
        assert prepare.benchmark_id(prepared).startswith("my-book-v400-t32-2s-")
        assert set(documents_of(prepared)) == set(pieces)
        tokens = sum(prepared.sizes[name] // 2 for name in (*prepared.train, "val.bin"))
        assert 32 / 2 < tokens / len(pieces) < 32 * 2


def test_a_big_file_is_never_whole_in_memory(own_text, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_SEQ_LEN", 2048)
    big = own_text / "text8"
    big.write_text("a word and another one " * 1_000_000)  # 23 MB, no line end
    tracemalloc.start()
    num_chars = sum(map(len, prepare.file_texts(big)))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num_chars == 23_000_000 and peak_bytes < 12_000_000


class Uniform(torch.nn.Module):
    """With the signature of the reference's models."""

    def forward(self, idx, targets=None, reduction="mean"):
        return torch.zeros(*idx.shape, 400)


NAMES = """from prepare import CACHE_DIR, DATA_DIR, TOKENIZER_DIR, MAX_SEQ_LEN, TIME_BUDGET, \
EVAL_TOKENS, VOCAB_SIZE, SPLIT_PATTERN, SPECIAL_TOKENS, BOS_TOKEN, Tokenizer, get_token_bytes, \
make_dataloader, evaluate_bpb"""
SURFACE = """
(MAX_SEQ_LEN, TIME_BUDGET, EVAL_TOKENS, VOCAB_SIZE) == (32, 2, 2048, 400)
os.path.join(CACHE_DIR, "data") == DATA_DIR
os.path.isdir(TOKENIZER_DIR) and "text-v400" in TOKENIZER_DIR
len(SPECIAL_TOKENS) == 4 and BOS_TOKEN == SPECIAL_TOKENS[0]
regex.findall(SPLIT_PATTERN, "it is 1234") == ["it", " is", " ", "12", "34"]
Tokenizer.from_directory(tokenizer_dir=TOKENIZER_DIR).get_vocab_size() == 400
t.get_bos_token_id() == 396
t.decode(t.encode("fox, 狐狸")) == "fox, 狐狸"
t.encode("fox", prepend=396) == t.encode("fox", prepend=BOS_TOKEN) == [396, *t.encode("fox")]
t.encode(["fox", ""], prepend=396, num_threads=2) == [[396, *t.encode("fox")], [396]]
t.encode(["fox", "dogs"]) == [t.encode("fox"), t.encode("dogs")] and t.encode([]) == []
(b.shape, b.dtype, b.device.type) == ((400,), torch.int32, "cpu")
get_token_bytes(device="cpu")[[0, 255, 396, 399]].tolist() == [1, 1, 0, 0]
b[t.encode("Käse 😀")].sum().item() == 1 + 2 + 1 + 1 + 1 + 4
[x.shape for x in next(make_dataloader(t, 2, 32, "train"))[:2]] == [(2, 32), (2, 32)]
next(make_dataloader(t, 2, 16, "val"))[2] == 1
next(make_dataloader(t, 2, 32, "train", 500))[0].dtype == torch.int64
next(make_dataloader(t, B=1, T=8, split="val", buffer_size=9))[0][0, 0].item() == 396
evaluate_bpb(model, t, 4) == approx(uniform_bpb, abs=1e-6)
evaluate_bpb(model, tokenizer=t, batch_size=3) == approx(uniform_bpb, abs=1e-6)
"""


def test_what_is_written_against_the_reference_works(small):
    names = {"torch": torch, "os": os, "regex": regex, "approx": pytest.approx, "model": Uniform()}
    exec(f"{NAMES}\nt = Tokenizer.from_directory()\nb = get_token_bytes()", names)
    lengths = names["b"].numpy()[small.rows()[:, 1:].astype(int)]
    names["uniform_bpb"] = (lengths > 0).sum() * np.log2(400) / lengths.sum()
    for call in SURFACE.strip().splitlines():
        assert eval(call, names), call


def test_importing_opens_no_file_but_its_own_and_paths_are_computed_later(tmp_path):
    opened, watching = [], True

    def watch(event, arguments):
        if watching and event.startswith(("open", "os.", "socket.", "subprocess.")):
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)
    names = runpy.run_path(prepare.__file__, run_name="prepare_anew")
    watching = False
    assert opened and not [path for path in opened if "prepare" not in path]
    assert names["__getattr__"]("DATA_DIR") == str(tmp_path / "cache" / "data")
    assert not (tmp_path / "cache").exists()


def test_command_ends_with_what_is_there_and_what_to_type_next(own_text, monkeypatch, capsys):
    run_command(monkeypatch, "--num-shards", "3")
    prepared = prepare.open_prepared()
    tokens = len(np.fromfile(prepared.folder / "train_0000.bin", np.uint16))
    output, errors = capsys.readouterr()
    assert output.splitlines()[-3:] == [
        f"tokens:    {tokens:,} to train on, {len(prepared.rows())} rows to validate on",
        f"benchmark: {prepare.benchmark_id(prepared)}",
        "next:      uv run train.py",
    ]
    assert errors == "" and "\r" not in output and len(output) < 2000  # no bar in a log
    for number in ("0", "-2"):
        assert "must be at least 1" in run_command(monkeypatch, "--num-shards", number)
    assert run_command(monkeypatch, "--download-workers", "0") == 2
    assert "must be at least 1" in capsys.readouterr().err
