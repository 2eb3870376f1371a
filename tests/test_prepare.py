"""Preparing: once, anew where something changed, whole or not at all; any text of one's own."""

import errno
import gzip
import json
import os
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock, call

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import some_text

import prepare


def files_in(directory: Path) -> dict[str, tuple]:
    """Every file's content and time of change, but the lock's."""
    paths = [path for path in directory.rglob("*") if path.is_file() and path.name != "lock"]
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def contents_in(directory: Path) -> dict[str, bytes]:
    return {name: content for name, (content, _) in files_in(directory).items()}


def prepare_afresh(monkeypatch, cache: Path, *arguments) -> prepare.Prepared:
    """Prepare for the same constants in an empty cache."""
    with monkeypatch.context() as patch:
        patch.setenv("AUTORESEARCH_CACHE", str(cache))
        return prepare.prepare(*arguments)


def run_command(monkeypatch, *arguments: str) -> str | None:
    """What `uv run prepare.py` ends with, if it ends early, on one line: a string, and status 1."""
    monkeypatch.setattr(sys, "argv", ["prepare.py", *arguments])
    try:
        prepare.main()
    except SystemExit as ended:
        assert ended.code == 2 or ended.code.startswith("error: ") and "\n" not in ended.code
        return ended.code


def write_parquet(path: Path, **columns) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def documents_of(prepared: prepare.Prepared, *names: str) -> set[str]:
    """Those in these files; in all, if none is named."""
    tokenizer = prepare.Tokenizer.from_directory(prepared.tokens)
    names = names or ("val.bin", *prepared.manifest["train"])
    tokens = np.concatenate([np.fromfile(prepared.tokens / name, np.uint16) for name in names])
    parts = np.split(tokens, np.flatnonzero(tokens == tokenizer.bos)[1:])
    return {tokenizer.decode(part[1:].tolist()) for part in parts}


@pytest.mark.parametrize(
    ("name", "value", "make", "new"),
    [
        ("VOCAB_SIZE", 450, prepare.open_prepared, (True, True)),
        ("MAX_SEQ_LEN", 48, prepare.open_prepared, (True, True)),  # text files are cut for it
        ("EVAL_TOKENS", 20 * 32, prepare.open_prepared, (False, True)),
        ("FORMAT", -1, prepare.open_prepared, (True, False)),  # makes the same files anew
        ("SHARD_BYTES", 20_000, prepare.prepare, (True, False)),
        ("VALIDATION_SHARE", 0.3, prepare.prepare, (True, True)),
    ],
)
def test_a_changed_constant_mixes_nothing(own_text, tmp_path, monkeypatch, name, value, make, new):
    paragraphs = "".join(f"{n}: short enough to be put together.\n\n" for n in range(100))
    (own_text / "book.txt").write_text(paragraphs)
    small = prepare.prepare()
    before = files_in(small.tokens)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, name, value)
        changed = make()
        # What came before makes no difference: an empty cache gives the same files.
        fresh = prepare_afresh(monkeypatch, tmp_path / "fresh")
        assert changed.manifest == fresh.manifest
        assert contents_in(changed.tokens).items() >= contents_in(fresh.tokens).items()
        new_id = prepare.benchmark_id(changed) != prepare.benchmark_id(small)
        assert (changed.tokens != small.tokens, new_id) == new
    assert prepare.prepare() == small
    assert files_in(small.tokens).items() >= before.items()


def test_text_that_was_added_is_prepared_beside_and_moves_no_document(small, own_text):
    before = files_in(small.tokens)
    for n in range(50):
        (own_text / f"new{n}.md").write_text(some_text(1000 + n, 3), encoding="utf-8")
    new = prepare.prepare()
    assert files_in(small.tokens) == before and new.tokens != small.tokens
    for names in (["val.bin"], small.manifest["train"]):
        assert documents_of(small, *names) < documents_of(new, *names)
    assert not documents_of(new, "val.bin") & documents_of(new, *new.manifest["train"])


def test_a_vocabulary_of_fewer_shards_is_not_used_for_more(own_text, tmp_path, monkeypatch):
    def download(repository, names, directory):
        directory.mkdir(parents=True, exist_ok=True)
        for name in names:
            seed = 1000 * int(name[6:11])
            write_parquet(directory / name, text=[some_text(seed + n, 9) for n in range(130)])

    monkeypatch.setattr(prepare, "DATASET", "climbmix")
    monkeypatch.setattr(prepare, "download", download)
    one = prepare.prepare(num_shards=1)
    assert prepare.prepare() == one  # as an agent's set-up does: what a person chose stays
    two = prepare.prepare(num_shards=2)
    fresh = prepare_afresh(monkeypatch, tmp_path / "fresh", 2)
    assert len(two.manifest["train"]) == 2 and two.manifest == fresh.manifest
    assert one.manifest["sha256"] != two.manifest["sha256"]
    assert prepare.prepare(num_shards=1) == one == prepare.open_prepared()
    repository, train, held_out = prepare.HUB["climbmix"]
    monkeypatch.setitem(prepare.HUB, "climbmix", (repository, train, [*held_out, 10]))
    assert prepare.prepare(num_shards=1).manifest["sha256"] != one.manifest["sha256"]


def test_a_file_that_is_gone_or_cut_short_is_an_error_and_prepare_mends_it(small, monkeypatch):
    before = contents_in(small.tokens)
    fewer = small.rows()[:20]
    assert len(before) == 4  # the tokenizer, two of tokens, the rows
    for name in before:
        for damage in (Path.unlink, lambda path: os.truncate(path, 100)):
            damage(small.tokens / name)
            (small.tokens / f"{name}.12345.tmp").write_bytes(b"of a killed process")
            with pytest.raises(FileNotFoundError, match=f"{name} .*run: uv run prepare.py"):
                prepare.open_prepared()
            with monkeypatch.context() as patch:  # it is not used under other constants either
                patch.setattr(prepare, "EVAL_TOKENS", 20 * 32)
                assert prepare.prepare().rows().tolist() == fewer.tolist()
            assert prepare.prepare() == small
            assert contents_in(small.tokens).items() >= before.items()


def test_a_full_disk_says_what_to_do_and_leaves_nothing_half_made(own_text, tmp_path, monkeypatch):
    whole = contents_in(prepare_afresh(monkeypatch, tmp_path / "fresh").tokens)
    directory, fsync, before = prepare.dataset_directory(), os.fsync, {}

    def full(file):
        if not next(room, None):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    monkeypatch.setattr(os, "fsync", full)
    for number in range(1, 5):  # the tokenizer, two of tokens, the rows; each call one more
        room = iter([True])
        assert "free some space or set AUTORESEARCH_CACHE" in run_command(monkeypatch)
        left = files_in(directory)
        assert len(left) == number and contents_in(directory).items() <= whole.items()
        assert before.items() < left.items()
        before = left
    room = iter([True])
    assert contents_in(prepare.prepare().tokens) == whole


REMEDY = 'run: uv run prepare.py; without a network, set DATASET = "pysource" in prepare.py'


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("DATASET", "no/such/place", "not climbmix, tinystories, pysource, no file in /"),
        ("DATASET", "climbmix", REMEDY),  # there is no network
        ("VOCAB_SIZE", 259, "VOCAB_SIZE = 259 must be within 260 … 65536"),
        ("VOCAB_SIZE", 65537, "VOCAB_SIZE = 65537 must be within 260 … 65536"),
        ("EVAL_TOKENS", 511, "MAX_SEQ_LEN = 32 within 2 … EVAL_TOKENS = 511 / 16"),
        ("VALIDATION_SHARE", 0.01, "of 16 rows to validate on; bring 40,000 varied characters"),
        ("AUTORESEARCH_CACHE", __file__, "set AUTORESEARCH_CACHE to a folder that you may use"),
        ("table.parquet", None, r"has no column `text`; its columns: ['words', 'n']"),
    ],
)
def test_what_cannot_be_is_an_error_that_says_what_to_do(own_text, monkeypatch, name, value, words):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(prepare, "RETRY_WAITS_S", (0.01,))
    if name == "AUTORESEARCH_CACHE":
        monkeypatch.setenv(name, value)
    elif value is None:
        write_parquet(own_text / name, words=["one"], n=[1])
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
    # 100 characters a token of the vocabulary, or 640 a token of a row.
    assert "bring 40,000 varied characters" in run_command(monkeypatch)
    monkeypatch.setattr(prepare, "MAX_SEQ_LEN", 200)
    monkeypatch.setattr(prepare, "EVAL_TOKENS", 16 * 200)
    assert "bring 128,000 varied characters" in run_command(monkeypatch)
    assert files_in(prepare.dataset_directory()) == {}


def test_documents_come_from_every_kind_of_file_and_what_is_odd_is_counted(own_text, capsys):
    usual = documents_of(prepare.prepare())
    (own_text / "deep" / "er").mkdir(parents=True)
    lines = [json.dumps({"text": f"{n} {some_text(n, 9)}"}) for n in range(200)]
    torn = gzip.compress("\n".join(lines).encode())
    odd = pyarrow.array([b"caf\xe9 in parquet"], pyarrow.binary()).view(pyarrow.string())
    more_json = '{"text": "of zipped JSON"}\n{"text": ""}\n{"n": 2}\nnot JSON\n["text"]\n7\n'
    for name, content in {
        ".hidden": b"not read",
        "a.txt": b"of a text file\r\n",
        "deep/b.md": "# of Markdown: 狐狸 😀".encode(),
        "deep/er/c.py": b"code = 1\n",
        "d.jsonl": b'{"text": "of JSON, 1", "n": 1}\n\n{"text": "\\ud800 of JSON, 2"}',
        "e.jsonl.gz": gzip.compress(more_json.encode()),
        "f.1.gz": gzip.compress(b"of a zipped manual"),
        "latin.txt": "Käse für alle".encode("latin-1"),
        "greek.txt": "τυρί".encode("iso8859-7"),
        "image.png": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        "not-zipped.gz": b"plain",
        "torn.jsonl.gz": torn[: len(torn) // 2],
        "torn.parquet": b"PAR1\0\0 and no end",
        "empty.txt": b"",
        "blank.txt": b" \n\t\n\n",
    }.items():
        (own_text / name).write_bytes(content)
    (own_text / "gone.txt").symlink_to(own_text / "nowhere")
    write_parquet(own_text / "g.parquet", n=[1, 2, 3], text=["of parquet", None, ""])
    write_parquet(own_text / "h.parquet", text=odd)
    write_parquet(own_text / "i.parquet", text=pyarrow.array(["twice"] * 2).dictionary_encode())
    write_parquet(own_text / "j.parquet", text=pyarrow.array(["large"], pyarrow.large_string()))
    capsys.readouterr()
    documents = documents_of(prepare.prepare()) - usual
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    # Of what is cut off, the documents before the cut are served.
    before_cut = {text for text in documents if text.split()[0].isdecimal()}
    assert before_cut == {f"{n} {some_text(n, 9)}" for n in range(len(before_cut))}
    assert documents - before_cut == (
        {"of a text file\n", "# of Markdown: 狐狸 😀", "code = 1\n", "of JSON, 1", "? of JSON, 2"}
        | {"of zipped JSON", "of a zipped manual", "K\ufffdse f\ufffdr alle", 4 * "\ufffd"}
        | {"of parquet", "caf\ufffd in parquet", "twice", "large"}
    )
    # e.jsonl.gz, image.png, torn.parquet, not-zipped.gz, torn.jsonl.gz
    note = 'note: 5 files are damaged, no text, or have lines without a "text"'
    assert len(before_cut) > 20 and notes == [note]


def test_rows_of_a_parquet_file_can_be_chosen(tmp_path):
    file, texts = tmp_path / "table.parquet", [f"text {n}" for n in range(5000)]
    write_parquet(file, text=texts)
    assert list(prepare.parquet_texts(file, 1000, 2500)) == texts[1000:2500]
    assert list(prepare.parquet_texts(file, 4990)) == texts[4990:]


def test_one_big_file_is_a_data_set_of_its_paragraphs_or_else_of_its_lines(
    own_text, tmp_path, monkeypatch
):
    lines = [some_text(n, 5).replace("\n", " ") for n in range(300)]
    # Short paragraphs are put together with the next.
    paragraphs = [f"{n}:\n\n{line}\n\n" for n, line in enumerate(lines)]
    book = tmp_path / "My Book.txt"
    book.write_text("".join(paragraphs), encoding="utf-8")
    monkeypatch.setattr(prepare, "DATASET", str(book))
    prepared = prepare.prepare()
    assert documents_of(prepared) == set(paragraphs)
    assert prepare.benchmark_id(prepared).startswith("my-book-v400-t32-2s-")
    lines = [some_text(n, 1).replace("\n", " ") + "\n" for n in range(3000)]
    book.write_text("".join(lines), encoding="utf-8")
    documents = documents_of(prepare.prepare())
    assert len(documents) > 1000 and sorted("".join(documents).splitlines(True)) == sorted(lines)


def test_benchmark_id_is_of_name_and_budget_not_of_place(small, own_text, tmp_path, monkeypatch):
    elsewhere = {}
    for name in (own_text.name, "other"):
        copy = tmp_path / "elsewhere" / name
        shutil.copytree(own_text, copy, copy_function=shutil.copyfile)  # other times of change
        monkeypatch.setattr(prepare, "DATASET", str(copy))
        prepared = prepare_afresh(monkeypatch, tmp_path / "another machine")
        assert prepared.rows().tolist() == small.rows().tolist()
        elsewhere[name] = prepare.benchmark_id(prepared)
    monkeypatch.setattr(prepare, "DATASET", str(own_text))
    assert elsewhere[own_text.name] == prepare.benchmark_id(small) != elsewhere["other"]
    monkeypatch.setattr(prepare, "TIME_BUDGET", prepare.TIME_BUDGET + 1)
    assert prepare.benchmark_id(small) != elsewhere[own_text.name]


def test_command_ends_with_what_is_there_and_what_to_type_next(own_text, monkeypatch, capsys):
    run_command(monkeypatch, "--num-shards", "3")
    prepared = prepare.open_prepared()
    tokens = len(np.fromfile(prepared.tokens / "train_0.bin", np.uint16))
    assert capsys.readouterr().out.splitlines()[-3:] == [
        f"tokens:    {tokens:,} to train on, {len(prepared.rows())} rows to validate on",
        f"benchmark: {prepare.benchmark_id(prepared)}",
        "next:      uv run train.py",
    ]
    for number in ("-1", "0"):
        run_command(monkeypatch, "--num-shards", number)
        assert "must be at least 1" in capsys.readouterr().err


def test_flash_attention_is_fetched_while_preparing_where_it_runs(small, monkeypatch, capsys):
    kernels = Mock()
    kernels.install_kernel.side_effect = ValueError("no network\nand a second line")
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    for capability in (None, (10, 0), (9, 0)):  # the last one runs it
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=capability: gpu is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda gpu=capability: gpu)
        assert prepare.prepare() == small  # a failure ends nothing
    assert kernels.mock_calls == [call.install_kernel("kernels-community/flash-attn3", version=1)]
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "Flash" in line)
    assert "no network" in line and "uv run prepare.py" in line
    # Once fetched, a run finds its folder without asking anybody.
    kernels.install_kernel = lambda *a, **k: Path("/hub/snapshots/1234/build/torch-cuda")
    prepare.prepare()
    monkeypatch.setitem(sys.modules, "kernels", None)
    assert prepare.flash_attention_3() == Path("/hub/snapshots/1234")
