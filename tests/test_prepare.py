"""Preparing: once, anew where something changed, whole or not at all; any text of one's own."""

import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import run_environment, some_text
from hypothesis import given
from hypothesis import strategies as st

import prepare

ROOT = Path(prepare.__file__).parent


def files_in(directory: Path) -> dict[str, tuple]:
    """Every file's content and time of change, but the lock's."""
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name != "lock"]
    return {
        str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in paths
    }


def contents_in(directory: Path) -> dict[str, bytes]:
    return {name: content for name, (content, _) in files_in(directory).items()}


def prepare_afresh(monkeypatch, cache: Path) -> prepare.Prepared:
    """Prepare for the same constants in an empty cache."""
    with monkeypatch.context() as patch:
        patch.setenv("AUTORESEARCH_CACHE", str(cache))
        return prepare.prepare()


def prepare_by_command(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["prepare.py", *arguments])
    prepare.main()


def error_of_command(monkeypatch) -> str:
    """What `uv run prepare.py` ends with: one paragraph behind "error: ", and status 1."""
    with pytest.raises(SystemExit) as ended:
        prepare_by_command(monkeypatch)
    error = ended.value.code  # a string as code is printed, and the status is 1
    assert error.startswith("error: ") and "\n" not in error, error
    return error


def documents_of(prepared: prepare.Prepared, *names: str) -> set[str]:
    tokenizer = prepare.Tokenizer.from_directory(prepared.tokens)
    tokens = np.concatenate([np.fromfile(prepared.tokens / name, np.uint16) for name in names])
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.bos)[1:])
    return {tokenizer.decode(part[1:].tolist()) for part in parts}


# --- Prepared once ---------------------------------------------------------------


def test_what_is_missing_is_prepared_on_the_way_with_a_line_that_says_so(own_text, capsys):
    tokenizer = prepare.Tokenizer.from_directory()
    first, *_, last = capsys.readouterr().out.splitlines()
    assert "is not prepared yet; doing it now" in first and str(own_text) in first
    assert re.fullmatch(r"prepared .* in \d+ s, in .*", last)
    next(prepare.make_dataloader(tokenizer, 2, 32, "train", "cpu"))
    assert capsys.readouterr().out == ""


def test_prepared_twice_is_prepared_once(small, capsys):
    before = files_in(small.tokens)
    capsys.readouterr()
    assert prepare.prepare() == small == prepare.open_prepared()
    assert files_in(small.tokens) == before
    assert capsys.readouterr().out.count("\n") == 1


CHANGES = [("VOCAB_SIZE", 450), ("MAX_SEQ_LEN", 48), ("EVAL_TOKENS", 20 * 32)]
MORE_CHANGES = [("VALIDATION_SHARE", 0.3), ("SHARD_BYTES", 20_000), ("FORMAT", -1)]


@pytest.mark.parametrize("change", CHANGES + MORE_CHANGES, ids=lambda change: change[0])
def test_a_changed_constant_mixes_nothing_and_spoils_nothing(
    own_text, change, tmp_path, monkeypatch
):
    paragraphs = "".join(f"{n}: short enough to be put together.\n\n" for n in range(100))
    (own_text / "book.txt").write_text(paragraphs)
    small, directory = prepare.prepare(), prepare.dataset_directory()
    before = contents_in(directory)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, *change)
        changed = prepare.prepare()
        # What came before makes no difference: an empty cache gives the same files.
        fresh = prepare_afresh(monkeypatch, tmp_path / "fresh")
        assert changed.manifest == fresh.manifest
        assert contents_in(fresh.tokens) == {
            name: (changed.tokens / name).read_bytes() for name in contents_in(fresh.tokens)
        }
        if change in CHANGES:
            assert prepare.benchmark_id(changed) != prepare.benchmark_id(small)
    assert prepare.prepare() == small
    assert contents_in(directory).items() >= before.items()


def test_a_new_row_length_needs_no_new_tokens(own_text, monkeypatch):
    # Not of a person's text files, which are cut into documents for the row length.
    monkeypatch.setattr(prepare, "DATASET", "pysource")
    monkeypatch.setattr(prepare, "PYSOURCE_PACKAGES", ("tqdm",))
    before = files_in(prepare.prepare().tokens)
    monkeypatch.setattr(prepare, "MAX_SEQ_LEN", 64)
    after = files_in(prepare.prepare().tokens)
    assert before.items() <= after.items() and len(after) == len(before) + 1


def test_a_format_that_was_raised_makes_everything_anew(small, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "FORMAT", prepare.FORMAT + 1)
    capsys.readouterr()
    anew = prepare.open_prepared()
    assert "is not prepared yet" in capsys.readouterr().out
    assert anew.tokens != small.tokens and anew.manifest["sha256"] == small.manifest["sha256"]


def test_text_that_was_added_is_prepared_beside_and_moves_no_document(small, own_text):
    before = files_in(small.tokens)
    for n in range(50):
        (own_text / f"new{n}.md").write_text(some_text(1000 + n, 3), encoding="utf-8")
    new = prepare.prepare()
    assert files_in(small.tokens) == before and new.tokens != small.tokens
    for names in (["val.bin"], small.manifest["train"]):
        assert documents_of(small, *names) < documents_of(new, *names)


def test_a_vocabulary_of_fewer_shards_is_not_used_for_more(own_text, tmp_path, monkeypatch):
    names = ["a.parquet", "b.parquet", "c.parquet"]
    hub = ("someone/some-data", names[:2], names[2], prepare.ALL, prepare.ALL)
    monkeypatch.setitem(prepare.HUB, "mini", hub)
    monkeypatch.setattr(prepare, "DATASET", "mini")

    def download(repository, names, directory, workers):
        directory.mkdir(parents=True, exist_ok=True)
        for name in names:
            texts = [some_text(ord(name[0]) + n, 9) for n in range(130)]
            pyarrow.parquet.write_table(pyarrow.table({"text": texts}), directory / name)

    monkeypatch.setattr(prepare, "download", download)
    one = prepare.prepare(num_shards=1)
    assert prepare.prepare() == one  # as an agent's set-up does: what a person chose stays
    two = prepare.prepare(num_shards=2)
    fresh = prepare_afresh(monkeypatch, tmp_path / "fresh")
    assert one.manifest["train"] == ["train_a.bin"]
    assert two.manifest == fresh.manifest
    assert one.manifest["sha256"] != two.manifest["sha256"]
    again = prepare.prepare(num_shards=1)
    assert again == one == prepare.open_prepared()


# --- Half a data directory -------------------------------------------------------


def test_a_file_that_is_gone_or_cut_short_is_an_error_and_prepare_mends_it(small):
    before = contents_in(small.tokens)
    assert len(small.manifest["bytes"]) == 4  # the tokenizer, two of tokens, the rows
    for name in small.manifest["bytes"]:
        for damage in (Path.unlink, lambda path: os.truncate(path, 100)):
            damage(small.tokens / name)
            with pytest.raises(FileNotFoundError, match=f"{name} .*run: uv run prepare.py"):
                prepare.open_prepared()
            assert prepare.prepare() == small
            assert contents_in(small.tokens) == before


def test_a_file_cut_short_is_not_used_under_other_constants(small, monkeypatch):
    before = contents_in(small.tokens)
    for name in ("train_0.bin", "val.bin"):
        os.truncate(small.tokens / name, 100)
    monkeypatch.setattr(prepare, "EVAL_TOKENS", 20 * 32)
    prepared = prepare.prepare()
    assert contents_in(prepared.tokens).items() >= before.items()
    assert prepared.rows().tolist() == small.rows()[:20].tolist()


def test_what_a_killed_process_left_is_removed(small):
    (small.tokens / "train_0.bin.12345.tmp").write_bytes(b"half")
    (small.tokens / "train_0.bin").unlink()
    prepare.prepare()
    assert {path.name for path in small.tokens.iterdir()} == set(small.manifest["bytes"])


# --- Errors that say what to do --------------------------------------------------


@pytest.mark.parametrize(
    ("constant", "value", "words"),
    [
        (
            "DATASET",
            "no/such/place",
            "prepare.py: not climbmix, tinystories, pysource, no file in /",
        ),
        ("VOCAB_SIZE", 259, "VOCAB_SIZE = 259 in prepare.py is not within 260 … 65536"),
        ("VOCAB_SIZE", 65537, "VOCAB_SIZE = 65537 in prepare.py is not within 260 … 65536"),
        ("EVAL_TOKENS", 31, "MAX_SEQ_LEN = 32 in prepare.py is not within 2 … EVAL_TOKENS"),
        ("VALIDATION_SHARE", 0.01, "rows to validate on; 16 are needed; bring more, or lower "),
    ],
)
def test_a_constant_that_cannot_be_is_an_error_with_its_value(
    own_text, monkeypatch, constant, value, words
):
    monkeypatch.setattr(prepare, constant, value)
    assert words in error_of_command(monkeypatch)


def test_an_empty_folder_is_named(own_text, monkeypatch):
    shutil.rmtree(own_text)
    (own_text / ".git").mkdir(parents=True)
    (own_text / ".git" / "HEAD").write_text("what begins with a dot is not read")
    assert f"no file in {own_text}" in error_of_command(monkeypatch)


@pytest.mark.parametrize("text", ["", " \n", "Too little. " * 1000])
def test_too_little_text_names_the_least_amount(own_text, monkeypatch, text):
    shutil.rmtree(own_text)
    own_text.mkdir()
    (own_text / "little.txt").write_text(text)
    # 100 characters a token of the vocabulary, or 400 a token of a row.
    assert "it takes 40,000 varied ones" in error_of_command(monkeypatch)
    monkeypatch.setattr(prepare, "MAX_SEQ_LEN", 200)
    assert "it takes 80,000 varied ones" in error_of_command(monkeypatch)
    assert files_in(prepare.dataset_directory()) == {}


def test_a_full_disk_says_what_to_do_and_leaves_nothing_half_made(own_text, tmp_path, monkeypatch):
    directory = prepare.dataset_directory()
    prepare_afresh(monkeypatch, tmp_path / "fresh")
    whole = contents_in(tmp_path / "fresh" / directory.name)
    fsync = os.fsync

    def fill_up(files: int) -> None:
        """Let the disk take so many files more."""
        room = iter(range(files))

        def full(file):
            if next(room, None) is None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(file)

        monkeypatch.setattr(os, "fsync", full)

    for files in range(5):  # the tokenizer, two of tokens, the rows; each call one more
        fill_up(1)
        before = files_in(directory) if directory.exists() else {}
        if files < 4:
            assert "free some space or set AUTORESEARCH_CACHE" in error_of_command(monkeypatch)
            left = contents_in(directory)
            assert len(left) == files + 1 and left.items() < whole.items()
            assert before.items() < files_in(directory).items()
    prepare.prepare()
    assert contents_in(directory) == whole


def test_a_cache_that_cannot_be_written_says_what_to_do(own_text, tmp_path, monkeypatch):
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "a file"))
    remedy = "set AUTORESEARCH_CACHE to a folder that you may use"
    assert remedy in error_of_command(monkeypatch)

    def mkdir(path, *_, **__):  # root may write anywhere
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert remedy in error_of_command(monkeypatch)


# --- Text of one's own -----------------------------------------------------------


def read_all(monkeypatch, root: Path) -> tuple[Counter, dict[str, set[str]]]:
    """Every document of both splits, and the notes with the names of their files."""
    monkeypatch.setattr(prepare, "DATASET", str(root))
    prepare.NOTES.clear()
    train, validation, _ = prepare.find_documents(None, 1)
    documents = Counter(text for read in train.values() for text in read())
    held_out = Counter(validation())
    assert not documents & held_out
    notes = {note: {path.name for path in paths} for note, paths in prepare.NOTES.items()}
    return documents + held_out, notes


def test_documents_come_from_every_kind_of_file(tmp_path, monkeypatch):
    root = tmp_path / "mine"
    (root / "deep" / "er").mkdir(parents=True)
    (root / ".hidden").mkdir()
    (root / ".hidden" / "secret.txt").write_text("not read")
    (root / "a.txt").write_text("of a text file\r\n", newline="")
    (root / "deep" / "b.md").write_text("# of Markdown: 狐狸 😀", encoding="utf-8")
    (root / "deep" / "er" / "c.py").write_text("code = 1\n")
    (root / "d.jsonl").write_text(
        '{"text": "of JSON, 1", "n": 1}\n\n{"text": "\\ud800 of JSON, 2"}'
    )
    with gzip.open(root / "e.jsonl.gz", "wt") as file:
        file.write('{"text": "of zipped JSON"}\n{"text": ""}\n{"n": 2}\nnot JSON\n["text"]\n7\n')
    with gzip.open(root / "f.1.gz", "wt") as file:
        file.write("of a zipped manual")
    for name, compression in (("g.parquet", "zstd"), ("h.parquet", "none")):
        table = pyarrow.table({"n": [1, 2, 3], "text": [f"of {name}", None, ""]})
        pyarrow.parquet.write_table(table, root / name, compression=compression)
    documents, notes = read_all(monkeypatch, root)
    assert documents == Counter(
        [
            "of a text file\n",
            "# of Markdown: 狐狸 😀",
            "code = 1\n",
            "of JSON, 1",
            "? of JSON, 2",
            "of zipped JSON",
            "of a zipped manual",
            "of g.parquet",
            "of h.parquet",
        ]
    )
    assert notes == {'.jsonl files: lines without a "text" skipped': {"e.jsonl.gz"}}


def test_odd_files_are_replaced_or_skipped_and_counted(tmp_path, monkeypatch):
    root = tmp_path / "mine"
    root.mkdir()
    (root / "latin.txt").write_bytes("Käse für alle".encode("latin-1"))
    (root / "greek.txt").write_bytes("τυρί".encode("iso8859-7"))
    (root / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (root / "not-zipped.gz").write_bytes(b"plain")
    lines = "".join(json.dumps({"text": f"{n} {some_text(n, 9)}"}) + "\n" for n in range(200))
    torn = gzip.compress(lines.encode())
    (root / "torn.jsonl.gz").write_bytes(torn[: len(torn) // 2])
    (root / "torn.parquet").write_bytes(b"PAR1\0\0 and no end")
    (root / "empty.txt").write_bytes(b"")
    (root / "blank.txt").write_bytes(b" \n\t\n\n")
    (root / "gone.txt").symlink_to(root / "nowhere")
    documents, notes = read_all(monkeypatch, root)
    served = {text for text in documents if text.split()[0].isdecimal()}
    assert documents.keys() - served == {"K\ufffdse f\ufffdr alle", "\ufffd\ufffd\ufffd\ufffd"}
    # Of what is cut off, the documents before the cut are served.
    assert served == {f"{n} {some_text(n, 9)}" for n in range(len(served))} and len(served) > 20
    assert notes == {
        "files that are not UTF-8: odd bytes replaced": {"latin.txt", "greek.txt"},
        "files that are not text: skipped": {"image.png", "torn.parquet"},
        "files .gz cut off or damaged: read up to there": {"not-zipped.gz", "torn.jsonl.gz"},
    }


def test_notes_are_told_once_with_their_number(own_text, capsys):
    for n in range(3):
        (own_text / f"latin{n}.txt").write_bytes(b"caf\xe9")
    prepare.prepare()
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert notes == ["note: 3 files that are not UTF-8: odd bytes replaced"]


def test_parquet_without_a_text_column_names_its_columns(tmp_path, monkeypatch):
    path = tmp_path / "table.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"words": ["one"], "n": [1]}), path)
    monkeypatch.setattr(prepare, "DATASET", str(path))
    assert re.search(r"table.parquet has no column `text`.*words", error_of_command(monkeypatch))


def test_parquet_may_hold_any_kind_of_string_and_odd_bytes(tmp_path):
    odd = pyarrow.array([b"caf\xe9", b"fine"], pyarrow.binary()).view(pyarrow.string())
    repeated = pyarrow.array(["fine", "fine"]).dictionary_encode()
    for column in (odd, repeated, pyarrow.array(["fine"], pyarrow.large_string())):
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "table.parquet")
        texts = list(prepare.parquet_texts(tmp_path / "table.parquet"))
        assert len(texts) == len(column) and set(texts) <= {"caf\ufffd", "fine"}


def test_rows_of_a_parquet_file_can_be_chosen(tmp_path):
    path, texts = tmp_path / "table.parquet", [f"text {n}" for n in range(5000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=700)
    assert list(prepare.parquet_texts(path, 1000, 2500)) == texts[1000:2500]
    assert list(prepare.parquet_texts(path, 4990)) == texts[4990:]


def test_one_big_file_is_a_data_set(own_text, tmp_path, monkeypatch):
    lines = [some_text(n, 5).replace("\n", " ") for n in range(300)]
    paragraphs = [f"{n}: {line}\n\n" for n, line in enumerate(lines)]
    book = tmp_path / "My Book.txt"
    book.write_text("".join(paragraphs), encoding="utf-8")
    monkeypatch.setattr(prepare, "DATASET", str(book))
    prepared = prepare.prepare()
    documents = documents_of(prepared, "val.bin", *prepared.manifest["train"])
    assert documents == set(paragraphs)
    assert prepare.benchmark_id(prepared).startswith("my-book-v400-t32-2s-")


@given(text=st.text(st.sampled_from("a \n"), max_size=60), least=st.integers(1, 12))
def test_cutting_a_file_loses_nothing_and_makes_no_small_pieces(text, least):
    pieces = prepare.split_text(text, least)
    assert "".join(pieces) == text
    assert all(len(piece) >= least for piece in pieces[:-1])
    assert not any(piece[0].isspace() for piece in pieces[1:])


# --- Benchmark id ----------------------------------------------------------------


def test_benchmark_id_changes_with_the_data_set_and_the_budget(small, own_text, monkeypatch):
    before = prepare.benchmark_id(small)
    shutil.copytree(own_text, own_text.parent / "other")
    monkeypatch.setattr(prepare, "DATASET", str(own_text.parent / "other"))
    other = prepare.prepare()
    assert other.rows().tolist() == small.rows().tolist()
    assert prepare.benchmark_id(other) != before
    monkeypatch.setattr(prepare, "TIME_BUDGET", prepare.TIME_BUDGET + 1)
    assert prepare.benchmark_id(small) != before


def lowest_tenth(text: str) -> bool:
    return int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) < 2**64 / 10


def test_benchmark_id_changes_with_the_scored_rows_alone(small, own_text):
    rows, before = small.rows(), prepare.benchmark_id(small)
    # Only a held-out document changes.
    document = max(documents_of(small, "val.bin"), key=len)
    (path,) = [path for path in own_text.iterdir() if path.read_text("utf-8") == document]
    held_out = (text for n in range(99) if lowest_tenth(text := f"{n} {document}"))
    path.write_text(next(held_out), encoding="utf-8")
    after = prepare.prepare()
    assert [name for name in small.manifest["sha256"] if name.startswith("tokenizer.")]
    for name, digest in small.manifest["sha256"].items():
        assert (after.manifest["sha256"][name] == digest) == name.startswith("tokenizer."), name
    assert after.rows().tolist() != rows.tolist()
    assert prepare.benchmark_id(after) != before


def test_benchmark_id_is_the_same_on_another_machine(small, own_text, tmp_path, monkeypatch):
    before = prepare.benchmark_id(small)
    copy = tmp_path / "elsewhere" / own_text.name
    shutil.copytree(own_text, copy, copy_function=shutil.copyfile)  # with other times of change
    monkeypatch.setattr(prepare, "DATASET", str(copy))
    assert prepare.benchmark_id(prepare_afresh(monkeypatch, tmp_path / "fresh")) == before


# --- Commands and processes ------------------------------------------------------


def test_command_ends_with_what_is_there_and_what_to_type_next(own_text, monkeypatch, capsys):
    prepare_by_command(monkeypatch, "--num-shards", "3", "--download-workers", "2")
    lines = capsys.readouterr().out.splitlines()
    prepared = prepare.open_prepared()
    tokens = len(np.fromfile(prepared.tokens / "train_0.bin", np.uint16))
    assert lines[-3:] == [
        f"tokens:    {tokens:,} to train on, {len(prepared.rows())} rows to validate on",
        f"benchmark: {prepare.benchmark_id(prepared)}",
        "next:      uv run train.py",
    ]


@pytest.mark.parametrize("arguments", [["--num-shards", "-1"], ["--download-workers", "0"]])
def test_command_refuses_numbers_below_one(own_text, monkeypatch, capsys, arguments):
    with pytest.raises(SystemExit):
        prepare_by_command(monkeypatch, *arguments)
    assert "must be at least 1" in capsys.readouterr().err


IMPORT_ALONE = """
import os, sys, time
import numpy, torch, torch.nn.functional
torch.cuda.is_available()

def forbid(event, arguments):
    writes = event == "open" and arguments[1] is not None and set(arguments[1]) & set("wax+")
    starts = ("socket.", "os.mkdir", "os.rename", "os.remove", "subprocess.", "os.posix_spawn")
    assert not writes and not event.startswith(starts), (event, arguments)

def no_clock(*_):
    raise AssertionError("the clock was read")

sys.addaudithook(forbid)
for name in ("time", "time_ns", "perf_counter", "monotonic", "sleep", "localtime"):
    setattr(time, name, no_clock)
import prepare
assert not torch.cuda.is_initialized()
assert not os.path.exists(os.environ["AUTORESEARCH_CACHE"])
"""


def test_importing_touches_no_network_no_disk_and_no_clock(tmp_path):
    environment = {**run_environment(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-B", "-c", IMPORT_ALONE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr


# --- Flash Attention 3 -----------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "hip", "fetched"),
    [((8, 6), None, True), ((9, 0), None, True), ((10, 0), None, False), ((9, 0), "6", False)],
)
def test_flash_attention_is_fetched_while_preparing_where_it_runs(
    small, monkeypatch, capsys, capability, hip, fetched
):
    asked = []

    def install_kernel(repository, revision, local_files_only):
        asked.append((repository, revision, local_files_only))
        raise ValueError("no network\nand a second line")

    kernels = types.SimpleNamespace(install_kernel=install_kernel)
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    capsys.readouterr()
    for _ in range(2):  # a failure ends nothing, and the next call tries again
        assert prepare.prepare() == small
    wanted = ("kernels-community/flash-attn3", "v1", False)
    assert asked == [wanted] * 2 * fetched
    lines = [line for line in capsys.readouterr().out.splitlines() if "Flash" in line]
    assert len(lines) == 2 * fetched
    assert all("no network" in line and "uv run prepare.py" in line for line in lines)
    kernels.install_kernel = lambda *a, local_files_only, **k: Path("there" * local_files_only)
    assert prepare.flash_attention_3() == Path("there")  # a run reads the disk only


def test_without_a_gpu_nothing_is_fetched(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels", None)  # importing it would fail
    monkeypatch.setattr(prepare, "flash_attention_3", lambda fetch: pytest.fail("asked for"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    prepare.prepare()
