"""The harness: data, tokenizer, row packing, loader, the clock's length and the metric.

The person's file, fixed during a night: an agent reads it and changes nothing in it.

    uv run prepare.py        prepare the data set that DATASET names (train.py does it by itself)

B batch (rows) · T time (tokens of a row) · V vocabulary. A row holds T + 1 tokens: the inputs are
its first T, the targets its last T. BOS, which no text gives, starts every document and every row.
"""

import argparse
import base64
import gzip
import hashlib
import importlib.metadata
import json
import math
import os
import re
import sys
import threading
import time
import zlib
from bisect import bisect_left, bisect_right, insort
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import chain, count, islice, repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

# --- Benchmark constants ---------------------------------------------------------
# The person's configuration: no flag and no environment variable changes what is measured.
# Scores compare only under one benchmark id, which changes with every one of these.

_CUDA = torch.cuda.is_available()

# climbmix, tinystories, pysource, or the path of a folder or file of your own.
DATASET = "climbmix" if _CUDA else "pysource"
VOCAB_SIZE = 8192 if _CUDA else 2048  # tokens, 4 of them special
MAX_SEQ_LEN = 2048 if _CUDA else 512  # T, in tokens
EVAL_TOKENS = 40 * 524288 if _CUDA else 524288  # scored, where the validation text has as many
TIME_BUDGET = 300  # seconds of training; start-up, compilation and evaluation not counted

# --- Paths -----------------------------------------------------------------------


def dataset_directory() -> Path:
    """Where the present data set lies prepared; AUTORESEARCH_CACHE moves it."""
    cache = os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch"
    return Path(cache).expanduser() / name_and_folder()[1]


def short_hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


def sha256_of(path: Path) -> str:
    return hashlib.sha256(np.memmap(path, np.uint8, "r")).hexdigest()


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


@contextmanager
def written_whole(path: Path) -> Iterator:
    """Open a binary file that gets its name only once it is complete and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def alone_in(directory: Path):
    """The directory's lock, for a `with`; ends with the process. Waits for whoever has it."""
    from filelock import FileLock, Timeout

    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / "lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        say(f"another process is preparing {directory}; waiting for it")
        return lock.acquire()


# --- Data sets -------------------------------------------------------------------

VALIDATION_SHARE = 0.1  # of local documents, chosen by the hash of their text
SHARD_BYTES = 256 << 20  # local files are gathered into shards of about this size
PYSOURCE_PACKAGES = ("sympy", "pandas", "numpy", "matplotlib", "networkx")
# These differ between platforms.
PYSOURCE_SKIPS = ("__config__.py", "_distributor_init.py", "_distributor_init_local.py")
NOTES: dict[str, set[Path]] = defaultdict(set)  # what was skipped or replaced, in which files

Reader = Callable[[], Iterator[str]]  # gives some documents, anew at each call


# Parquet files with a column `text` on the Hugging Face hub: repository, files to train on (10 if
# no other number is asked for), file to validate on, and of either the rows from … to.
CLIMBMIX = [f"shard_{n:05d}.parquet" for n in range(6543)]
STORIES_REPOSITORY, STORIES = "karpathy/tinystories-gpt4-clean", "tinystories_gpt4_clean.parquet"
ALL = (0, None)
HUB = {
    "climbmix": ("karpathy/climbmix-400b-shuffle", CLIMBMIX[:-1], CLIMBMIX[-1], ALL, ALL),
    "tinystories": (STORIES_REPOSITORY, [STORIES], STORIES, (20_000, None), (10_000, 20_000)),
}


def own_path() -> Path:
    """The folder or file that DATASET names, seen from this file's folder."""
    return Path(__file__).resolve().parent / Path(DATASET).expanduser()


def name_and_folder() -> tuple[str, str]:
    """The data set's name in the benchmark id, and its folder in the cache."""
    if DATASET in HUB:
        return DATASET, DATASET
    source: object = str(own_path())
    if DATASET == "pysource":
        source = [importlib.metadata.version(package) for package in PYSOURCE_PACKAGES]
    name = re.sub(r"\W+", "-", own_path().stem).strip("-").lower() or "text"
    return name, f"{name}-{short_hash(source)}"


def find_documents(num_shards: int | None, workers: int) -> tuple[dict[str, Reader], Reader, list]:
    """Parts to train on, what to validate on, and what changes with the text; downloads it."""
    if DATASET in HUB:
        repository, train_files, validation_file, train_rows, validation_rows = HUB[DATASET]
        raw, names = dataset_directory() / "raw", train_files[: num_shards or 10]
        download(repository, list(dict.fromkeys([validation_file, *names])), raw, workers)
        train = {Path(name).stem: partial(parquet_texts, raw / name, *train_rows) for name in names}
        validation = partial(parquet_texts, raw / validation_file, *validation_rows)
        return train, validation, [[name, size_of(raw / name)] for name in names]
    if DATASET == "pysource":
        files, signature, least_chars = pysource_files(), [*PYSOURCE_SKIPS], 200
    else:
        files, least_chars = own_files(), MAX_SEQ_LEN
        signature = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]

    def documents(files: list[Path], validation: bool) -> Iterator[str]:
        for text in chain.from_iterable(file_texts(file, least_chars) for file in files):
            # By its text alone: new files move no document from one split to the other.
            number = int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16)
            if text.strip() and (number < VALIDATION_SHARE * 2**64) == validation:
                yield text

    parts, num_bytes = defaultdict(list), 0
    for file in files:
        parts[str(num_bytes // SHARD_BYTES)].append(file)
        num_bytes += size_of(file)
    train = {name: partial(documents, part, False) for name, part in parts.items()}
    key = [least_chars, SHARD_BYTES, VALIDATION_SHARE, *signature]
    return train, partial(documents, files, True), key


def pysource_files() -> list[Path]:
    """Python source of packages that the lock file pins: the same bytes on every machine."""
    return [
        Path(str(entry.locate()))
        for package in PYSOURCE_PACKAGES
        for entry in sorted(importlib.metadata.files(package) or [], key=str)
        if entry.suffix == ".py" and entry.parts[0] == package and entry.name not in PYSOURCE_SKIPS
    ]


def own_files() -> list[Path]:
    root, names = own_path(), ", ".join([*HUB, "pysource"])
    paths = sorted(path for path in [root, *root.rglob("*")] if path.is_file())
    files = [p for p in paths if not any(s[0] == "." for s in p.relative_to(root).parts)]
    if not files:
        raise ValueError(f'DATASET = "{DATASET}" in prepare.py: not {names}, no file in {root}')
    return files


def is_parquet(path: Path) -> bool:
    """Whether a whole parquet file lies there: its footer, at its very end, can be read."""
    import pyarrow.parquet

    try:
        return bool(pyarrow.parquet.read_metadata(path))
    except (OSError, pyarrow.ArrowInvalid):
        return False


def parquet_texts(path: Path, first: int = 0, last: int | None = None) -> Iterator[str]:
    """The `text` column of rows first … last − 1, some rows in memory at a time."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        if "text" not in file.schema_arrow.names:
            raise ValueError(f"{path} has no column `text`; its columns: {file.schema_arrow.names}")
        batches = file.iter_batches(batch_size=1024, columns=["text"])
        columns = (batch.column(0).cast(pyarrow.binary()).to_pylist() for batch in batches)
        texts = islice(chain.from_iterable(columns), first, last)
        yield from (text.decode(errors="replace") for text in texts if text)


def file_texts(path: Path, least_chars: int) -> Iterator[str]:
    """The documents of a file: rows, lines of JSON, or pieces of text."""
    if path.suffix == ".parquet" and is_parquet(path):
        yield from parquet_texts(path)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        for line in filter(bytes.strip, file_parts(path, by_line=True)):
            try:  # JSON can hold lone surrogates, UTF-8 cannot
                yield json.loads(line)["text"].encode(errors="replace").decode()
            except (ValueError, LookupError, TypeError, AttributeError):
                NOTES['.jsonl files: lines without a "text" skipped'].add(path)
    elif b"\0" in (raw := b"".join(file_parts(path)))[:8192]:
        NOTES["files that are not text: skipped"].add(path)
    else:
        text = raw.decode(errors="replace")
        if "\ufffd" in text and text.encode() != raw:
            NOTES["files that are not UTF-8: odd bytes replaced"].add(path)
        yield from split_text(text.replace("\r\n", "\n"), least_chars)


def file_parts(path: Path, by_line: bool = False) -> Iterator[bytes]:
    """The bytes of a file, unzipped if it is a .gz, as far as that goes."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            yield from file if by_line else iter(partial(file.read1, 1 << 20), b"")
    except (gzip.BadGzipFile, EOFError, zlib.error):
        NOTES["files .gz cut off or damaged: read up to there"].add(path)


def split_text(text: str, least_chars: int) -> list[str]:
    r"""Cut at blank lines before an unindented line, into pieces of at least `least_chars`.

    In source code these are the top-level definitions, in prose the paragraphs.

        >>> split_text("a = 1\n\nb = 2\n\n    c\n\nd", 1)
        ['a = 1\n\n', 'b = 2\n\n    c\n\n', 'd']
    """
    pieces = [""]
    for paragraph in re.split(r"(?<=\n\n)(?=\S)", text):
        if len(pieces[-1]) >= least_chars:
            pieces.append("")
        pieces[-1] += paragraph
    return pieces


# --- Download --------------------------------------------------------------------

RETRY_WAITS_S = (1, 2, 4, 8, 16)  # after each failure that brought no new byte
TIMEOUT_S = (10, 30)  # to connect; between two bytes


def download(repository: str, names: list[str], directory: Path, workers: int) -> None:
    """Fetch files of a hub data set into `directory`, the first alone and before the others.

    Raises RuntimeError with the names of those that are still missing; the others stay.
    """
    missing = [name for name in names if not is_parquet(directory / name)]
    if not missing:
        return
    say(f"downloading {len(missing)} files of {repository}")
    directory.mkdir(parents=True, exist_ok=True)
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    failures: list[Exception] = []

    def fetch(name: str) -> None:
        url = f"{endpoint}/datasets/{repository}/resolve/main/{name}"
        try:
            if len(failures) <= workers:  # more: it is the network, not the file
                download_file(url, directory / name)
                say(f"{name}: {size_of(directory / name) / 1e6:.0f} MB")
        except (OSError, RuntimeError) as failure:
            failures.append(failure)

    fetch(missing[0])
    if not failures:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fetch, missing[1:]))
    if failures:
        lost = [name for name in missing if not is_parquet(directory / name)]
        names = ", ".join(lost[:20] + ["…"] * (len(lost) > 20))
        raise RuntimeError(
            f"{len(lost)} of {len(missing)} files are still missing ({names}): "
            f"{explain(failures[0])}. To go on, run: uv run prepare.py; without a network, set "
            'DATASET = "pysource" in prepare.py'
        ) from failures[0]


def download_file(url: str, path: Path) -> None:
    """Fetch one file, going on where an earlier try stopped, under the data set's lock."""
    part = path.with_name(f"{path.name}.part")
    most_bytes, failures = size_of(part), 0
    while True:
        try:
            digest = receive(url, part)
            if is_parquet(part) and digest in (None, sha256_of(part)):
                os.replace(part, path)
                return
            part.unlink()
            raise OSError(f"{url} gave other bytes than the file's")
        except OSError as failure:  # those of requests are OSErrors without a number
            failures = 0 if size_of(part) > most_bytes else failures + 1
            most_bytes = max(size_of(part), most_bytes)
            if failures > len(RETRY_WAITS_S) or failure.errno is not None:
                raise
        time.sleep(RETRY_WAITS_S[max(failures - 1, 0)])


def receive(url: str, part: Path) -> str | None:
    """Append to `part` what it lacks; the SHA-256 that the hub names, if it names one.

    Raises RuntimeError where trying again is useless, else OSError, after a wait that is asked for.
    """
    import requests

    headers = {"Accept-Encoding": "identity", "Range": f"bytes={size_of(part)}-"}
    if token := os.environ.get("HF_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"  # dropped by requests at another host
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as answer:
        hops, status = [*answer.history, answer], answer.status_code
        # The ETag behind the redirect is of another kind.
        tags = [hop.headers.get("X-Linked-ETag") for hop in hops] + [hops[0].headers.get("ETag")]
        digest = next(iter(re.findall(r"\b[0-9a-f]{64}\b", str(tags))), None)
        if status == 416 and part.exists():  # nothing is missing
            return digest
        if status >= 400:
            words = answer.headers.get("X-Error-Message", answer.reason)
            message = f"{answer.url.split('?')[0]}: {status} {words}"
            if status in (401, 403, 404, 410):
                raise RuntimeError(f"{message} (if it has terms: accept them there, set HF_TOKEN)")
            wait = answer.headers.get("Retry-After", "")
            time.sleep(min(float(wait), 300.0) if wait.isdecimal() else 0.0)
            raise OSError(message)
        # 200, not 206: the server ignores ranges. Small blocks, as one that breaks off is lost.
        with open(part, "ab" if status == 206 else "wb") as file:
            for block in answer.iter_content(1 << 16):
                file.write(block)
    return digest


def flash_attention_3(fetch: bool = False) -> Path:
    """The folder of the Flash Attention 3 build for this machine, downloaded if `fetch`.

    By the name of its branch, which an offline call finds again. Raises whatever `kernels` does.
    """
    from kernels import install_kernel

    repository = "kernels-community/flash-attn3"
    return install_kernel(repository, revision="v1", local_files_only=not fetch)


def fetch_flash_attention() -> None:
    """Have it on the disk before any run, where it works: so all runs have the same backend."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
    if torch.version.hip is None and (capability[0] == 8 or capability == (9, 0)):
        try:
            flash_attention_3(fetch=True)
        except Exception as failure:
            trouble = f"no Flash Attention 3: {failure!r:.300}; the next best is used"
            say(f"{trouble}; to try again: uv run prepare.py")


# --- Tokenizer -------------------------------------------------------------------

SPECIAL_TOKENS = tuple(f"<|reserved_{n}|>" for n in range(4))  # number 0 is BOS
# GPT-4's, with numbers cut into runs of at most 2 digits: better for a small vocabulary.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
BPE_CHARS = 1_000_000_000  # the vocabulary is made from at most this much training text
BPE_DOCUMENT_CHARS = 10_000  # and this much of one document
ENCODE_CHARS = 100_000  # tiktoken's regular expression runs out of stack on very long blanks
TOKENIZER_FILE = "tokenizer.tiktoken"  # tiktoken's ranks format: text, never pickle


class Tokenizer:
    """Byte-pair encoding: ranks 0 … V − 5 are the merges in order, the last 4 are special."""

    def __init__(self, ranks: dict[bytes, int]):
        import tiktoken

        self.ranks, self.bos = ranks, len(ranks)
        special = {token: len(ranks) + n for n, token in enumerate(SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            "autoresearch", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )

    @classmethod
    def from_directory(cls, directory: str | Path | None = None) -> "Tokenizer":
        """The one saved there; by default the prepared one, for which it prepares the data."""
        directory = Path(directory) if directory else open_prepared().tokens
        lines = (line.split() for line in (directory / TOKENIZER_FILE).read_bytes().splitlines())
        return cls({base64.b64decode(token): int(rank) for token, rank in lines})

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn a vocabulary; a smaller one than asked for if the text does not hold as much."""
        import rustbpe

        bpe = rustbpe.Tokenizer()
        merges = vocab_size - len(SPECIAL_TOKENS)
        bpe.train_from_iterator(iter(texts), merges, pattern=SPLIT_PATTERN)
        return cls({bytes(token): rank for token, rank in bpe.get_mergeable_ranks()})

    def save(self, directory: Path) -> None:
        with written_whole(directory / TOKENIZER_FILE) as file:
            for token, rank in self.ranks.items():
                file.write(base64.b64encode(token) + b" %d\n" % rank)

    def get_vocab_size(self) -> int:
        return len(self.ranks) + len(SPECIAL_TOKENS)

    def get_bos_token_id(self) -> int:
        return self.bos

    def encode(self, text: str) -> list[int]:
        """Tokens of `text`, without BOS. No text gives a special token."""
        return self.encode_array(text)[1:].tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """BOS and the tokens of `text`, as uint16."""
        slices = (text[i : i + ENCODE_CHARS] for i in range(0, len(text), ENCODE_CHARS))
        arrays = [self._encoding.encode_to_numpy(s, disallowed_special=()) for s in slices]
        return np.concatenate([[self.bos], *arrays]).astype(np.uint16)

    def decode(self, tokens: Iterable[int]) -> str:
        return self._encoding.decode(list(tokens))

    def token_lengths(self) -> np.ndarray:
        """Raw bytes of every token as `lengths_V`, 0 for the special ones."""
        # Decoded, half a character would be U+FFFD, of three bytes.
        lengths_V = np.zeros(self.get_vocab_size(), np.int64)
        lengths_V[list(self.ranks.values())] = [len(token) for token in self.ranks]
        return lengths_V


# --- Token shards ----------------------------------------------------------------
# Two levels. A folder, named by a hash of the text and of how it is cut into tokens, holds the
# vocabulary, the tokens and rows, never written over. A manifest, named by the constants, says
# which of them they use. So a new row length needs new rows and no new tokens.

# Raise it when you change how text is read, cut, encoded or packed: all is then made anew.
FORMAT = 1


class Prepared(NamedTuple):
    """What lies ready for the present constants, as its manifest tells."""

    tokens: Path  # the folder
    manifest: dict

    def rows(self) -> np.ndarray:
        """The rows that are scored: (rows, T + 1) uint16."""
        rows = np.fromfile(self.tokens / self.manifest["rows"], np.uint16)
        return rows.reshape(-1, MAX_SEQ_LEN + 1)

    def damaged(self) -> list[Path]:
        """The files that are gone or have another size than when they were made."""
        sizes = self.manifest["bytes"].items()
        return [self.tokens / name for name, size in sizes if size_of(self.tokens / name) != size]


def manifest_path() -> Path:
    """Where the manifest lies; ValueError, with the values, for constants that cannot work."""
    if not 260 <= VOCAB_SIZE <= 65536:  # 256 single bytes and 4 special ones; uint16
        raise ValueError(f"VOCAB_SIZE = {VOCAB_SIZE} in prepare.py is not within 260 … 65536")
    if not 2 <= MAX_SEQ_LEN <= EVAL_TOKENS:
        raise ValueError(f"MAX_SEQ_LEN = {MAX_SEQ_LEN} in prepare.py is not within 2 … EVAL_TOKENS")
    name = f"prepared-f{FORMAT}-v{VOCAB_SIZE}-t{MAX_SEQ_LEN}-e{EVAL_TOKENS}.json"
    return dataset_directory() / name


def read_manifest(path: Path) -> Prepared:
    manifest = json.loads(path.read_text())
    return Prepared(path.parent / manifest["tokens_in"], manifest)


def open_prepared() -> Prepared:
    """What is prepared for the present constants; it is prepared now if it is not yet."""
    path = manifest_path()
    if not path.exists():
        say(f"{DATASET} is not prepared yet; doing it now, in {path.parent}")
        return prepare()
    prepared = read_manifest(path)
    for file in prepared.damaged():
        raise FileNotFoundError(f"{file} is missing or cut short; run: uv run prepare.py")
    return prepared


def prepare(num_shards: int | None = None, workers: int = 8) -> Prepared:
    """Make whatever the present constants need and is not there yet.

    `num_shards`: training files (default: as before). `workers`: parallel downloads. Raises
    OSError, ValueError or RuntimeError that say what to do; the next call goes on from there.
    """
    started_s, path = time.perf_counter(), manifest_path()
    NOTES.clear()
    with alone_in(path.parent):
        if num_shards is None and path.exists():
            num_shards = len(read_manifest(path).manifest["train"])
        train, validation, signature = find_documents(num_shards, workers)
        key = [FORMAT, VOCAB_SIZE, SPLIT_PATTERN, BPE_CHARS, BPE_DOCUMENT_CHARS, signature]
        folder = path.parent / f"v{VOCAB_SIZE}-{short_hash(key)}"
        damaged = (read_manifest(m).damaged() for m in path.parent.glob("prepared-*.json"))
        # The lock is ours, so whoever made a .tmp was killed.
        for file in [*chain.from_iterable(damaged), *path.parent.rglob("*.tmp")]:
            file.unlink(missing_ok=True)
        tokenizer = make_tokenizer(train.values(), folder)
        files = [tokenize(read, tokenizer, folder / f"train_{p}.bin") for p, read in train.items()]
        held_out = tokenize(validation, tokenizer, folder / "val.bin")
        rows = make_rows(held_out, tokenizer.bos)
        scored = [folder / TOKENIZER_FILE, rows]
        manifest = {
            "tokens_in": folder.name,
            "train": [file.name for file in files],
            "rows": rows.name,
            "bytes": {file.name: size_of(file) for file in [*scored, *files, held_out]},
            "sha256": {file.name: sha256_of(file) for file in scored},
        }
        with written_whole(path) as file:
            file.write(json.dumps(manifest, indent=1).encode())
    for note, paths in NOTES.items():
        say(f"note: {len(paths):,} {note}")
    fetch_flash_attention()
    say(f"prepared {DATASET} in {time.perf_counter() - started_s:.0f} s, in {path.parent}")
    return Prepared(folder, manifest)


def make_tokenizer(train: Iterable[Reader], folder: Path) -> Tokenizer:
    """Learn the vocabulary from the training split alone, or load the one that is there."""
    if (folder / TOKENIZER_FILE).exists():
        return Tokenizer.from_directory(folder)
    say(f"vocabulary: learning {VOCAB_SIZE:,} tokens from the training text")
    chars = 0

    def texts() -> Iterator[str]:
        nonlocal chars
        for text in chain.from_iterable(read() for read in train):
            chars += len(text[:BPE_DOCUMENT_CHARS])
            yield text[:BPE_DOCUMENT_CHARS]
            if chars >= BPE_CHARS:
                return

    tokenizer = Tokenizer.train(texts(), VOCAB_SIZE)
    least, learned = max(100 * VOCAB_SIZE, 400 * MAX_SEQ_LEN), tokenizer.get_vocab_size()
    if chars < least or learned < VOCAB_SIZE:
        raise too_little(f"{chars:,} characters, {learned} tokens; it takes {least:,} varied ones")
    tokenizer.save(folder)
    return tokenizer


def too_little(found: str) -> ValueError:
    remedy = f"bring more, or lower VOCAB_SIZE = {VOCAB_SIZE} or MAX_SEQ_LEN = {MAX_SEQ_LEN}"
    return ValueError(f'DATASET = "{DATASET}" has too little text: {found}; {remedy} in prepare.py')


def tokenize(read: Reader, tokenizer: Tokenizer, path: Path) -> Path:
    """Write documents as one flat uint16 file, each starting with BOS."""
    if path.exists():
        return path
    started_s = time.perf_counter()
    with written_whole(path) as file:
        for tokens in encode_all(tokenizer, read()):
            file.write(tokens)
    say(f"{path.stem}: {size_of(path) // 2:,} tokens in {time.perf_counter() - started_s:.0f} s")
    return path


def encode_all(tokenizer: Tokenizer, documents: Iterator[str]) -> Iterator[np.ndarray]:
    """Encode documents in their order, on every core; yields some of them at a time."""
    own = threading.local()

    def begin() -> None:
        # Of threads that share one, all but the first take half as long again (tiktoken 0.14).
        own.encode = Tokenizer(tokenizer.ranks).encode_array

    def encode(texts: list[str]) -> np.ndarray:
        return np.concatenate([own.encode(text) for text in texts])

    cores, running = os.cpu_count() or 1, deque()
    with ThreadPoolExecutor(cores, initializer=begin) as pool:
        while texts := list(islice(documents, 100)):
            running.append(pool.submit(encode, texts))
            if len(running) > 2 * cores:
                yield running.popleft().result()
        yield from (future.result() for future in running)


def make_rows(validation: Path, bos: int) -> Path:
    """Pack the validation rows by the reference rule and store them, ready to be scored."""
    wanted = EVAL_TOKENS // MAX_SEQ_LEN
    path = validation.with_name(f"rows-t{MAX_SEQ_LEN}-n{wanted}.bin")
    if path.exists():
        return path
    tokens = np.fromfile(validation, np.uint16)
    starts, lengths = document_spans(tokens, bos)
    documents = zip(starts.tolist(), lengths.tolist(), strict=True)
    packed = islice(pack_rows(documents, MAX_SEQ_LEN + 1), wanted)
    rows = [fill_row(pieces, tokens, bos) for pieces in packed]
    if len(rows) < LEAST_ROWS:
        raise too_little(f"{len(rows)} rows to validate on; {LEAST_ROWS} are needed")
    with written_whole(path) as file:
        file.write(np.stack(rows))
    return path


def benchmark_id(prepared: Prepared) -> str:
    """The name of all that makes two scores comparable, with a hash over the very rows."""
    name, constants = name_and_folder()[0], [VOCAB_SIZE, MAX_SEQ_LEN, TIME_BUDGET]
    content = short_hash([name, constants, sorted(prepared.manifest["sha256"].items())])
    return f"{name}-v{VOCAB_SIZE}-t{MAX_SEQ_LEN}-{TIME_BUDGET}s-{content}"


# --- Rows and loader -------------------------------------------------------------

BUFFER_DOCUMENTS = 1000  # among which the packing chooses
LEAST_ROWS = 16  # of validation text: fewer would measure nothing
BATCHES_AHEAD = 2

# The place of its BOS, or of the token whose place BOS takes · its length with BOS.
Piece = tuple[int, int]


def document_spans(tokens: np.ndarray, bos: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the documents of a flat file start, and their lengths with BOS."""
    starts = np.flatnonzero(tokens == bos)
    return starts, np.diff(starts, append=len(tokens))


def cut_long(starts: np.ndarray, lengths: np.ndarray, row_tokens: int) -> tuple:
    """Starts and lengths of pieces that fill a row, and of what is left; none without text."""
    text = row_tokens - 1  # what a row has room for behind BOS
    pieces = -(-(lengths - 1) // text)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    skipped = text * (np.arange(pieces.sum()) - first)
    rest = np.repeat(lengths - 1, pieces) - skipped
    return np.repeat(starts, pieces) + skipped, np.minimum(rest, text) + 1


def pack_rows(
    pieces: Iterable[Piece],
    row_tokens: int,
    buffer_size: int = BUFFER_DOCUMENTS,
    keep: bool = False,
) -> Iterator[list[Piece]]:
    """Pack documents into full rows by the reference rule.

    Of `buffer_size` documents take the longest that still fits; when none fits, cut the shortest
    to fill the row, and drop its rest. Of equal ones take the first to arrive.

    With `keep`, for training and pieces of at most a row, that rest, behind a new BOS, keeps its
    place in the queue, and a row begins with what has waited longest: nothing waits for more than
    `buffer_size` rows, and nothing is lost but the last, unfilled row.
    """
    arriving, waiting = enumerate(pieces), []  # (length, number), sorted
    queue: dict[int, Piece] = {}  # by number, oldest first
    while True:
        row, room = [], row_tokens
        while room:
            for number, piece in islice(arriving, buffer_size - len(waiting)):
                queue[number] = piece
                insort(waiting, (piece[1], number))
            if not waiting:
                return
            number = next(iter(queue)) if keep and not row else best_fit(waiting, room)
            start, length = queue[number]
            del waiting[bisect_left(waiting, (length, number))]
            taken = min(length, room)
            row.append((start, taken))
            room -= taken
            if keep and taken < length:
                queue[number] = start, length = start + taken - 1, length - taken + 1
                insort(waiting, (length, number))
            else:
                del queue[number]
        yield row


def best_fit(waiting: list[tuple[int, int]], room: int) -> int:
    """Of the longest that fit, or else of the shortest, the first to arrive."""
    length = waiting[max(bisect_right(waiting, (room, math.inf)) - 1, 0)][0]
    return waiting[bisect_left(waiting, (length, -1))][1]


def fill_row(pieces: list[Piece], tokens: np.ndarray, bos: int) -> np.ndarray:
    row = np.concatenate([tokens[start : start + length] for start, length in pieces])
    row[np.cumsum([0, *(length for _, length in pieces[:-1])])] = bos
    return row


def training_rows(files: list[Path], row_tokens: int, bos: int) -> Iterator[tuple]:
    """Endless training rows, (T + 1) uint16 each, with their epoch, from 1 on.

    Each epoch serves every piece of every document, in an order of its own, the same in every run.
    Before that, the first one serves the first pieces of the documents, where some have more: what
    validation rows hold is then seen by a run that ends within an epoch.
    """
    for epoch, beginnings in chain([(1, True)], zip(count(1), repeat(False))):
        row = None
        for n, path in enumerate(files):
            if not size_of(path):
                continue
            tokens = np.asarray(np.memmap(path, np.uint16, "r"))
            starts, lengths = document_spans(tokens, bos)
            if beginnings and lengths.max() <= row_tokens:
                continue
            if beginnings:
                lengths = np.minimum(lengths, row_tokens)
            starts, lengths = cut_long(starts, lengths, row_tokens)
            order = np.random.default_rng((epoch, n, beginnings)).permutation(len(starts))
            pieces = zip(starts[order].tolist(), lengths[order].tolist(), strict=True)
            for packed in pack_rows(pieces, row_tokens, keep=True):
                row = fill_row(packed, tokens, bos)
                yield row, epoch
        if row is None and not beginnings:
            raise ValueError(f"the training text does not fill one row of {row_tokens} tokens")


def batches(rows: Iterator[tuple], B: int, pinned: bool) -> Iterator[tuple]:
    """Inputs and targets (B, T) int64, each in fresh memory, and the epoch.

    Torch keeps pinned memory that is let go until copies from it have ended.
    """
    while taken := list(islice(rows, B)):
        batch = torch.from_numpy(np.stack([row for row, _ in taken]).astype(np.int64))
        inputs, targets = batch[:, :-1].clone(), batch[:, 1:].clone()
        if pinned:
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        yield inputs, targets, taken[-1][1]


def ahead(items: Iterator) -> Iterator:
    """The same items, made by a thread before they are asked for, the first ones from now on."""
    pool = ThreadPoolExecutor(1)
    made = deque(pool.submit(next, items, None) for _ in range(BATCHES_AHEAD))

    def serve() -> Iterator:
        with pool:
            while (item := made.popleft().result()) is not None:
                made.append(pool.submit(next, items, None))
                yield item

    return serve()


def make_dataloader(
    tokenizer: Tokenizer, B: int, T: int, split: str, device: str | torch.device | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Endless batches of inputs (B, T) int64, targets (B, T) int64 and the epoch, from 1 on.

    `split` is "train" or, for T = MAX_SEQ_LEN, "val". Batches are fresh memory on `device`
    (default: the GPU if there is one), made ahead in a thread, in the same order in every run.
    """
    if split not in ("train", "val") or (split == "val" and T != MAX_SEQ_LEN):
        raise ValueError(f'"{split}", {T}: not "train", nor "val" with T = {MAX_SEQ_LEN}')
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    prepared, cuda = open_prepared(), device.type == "cuda"
    if split == "train":
        files = [prepared.tokens / name for name in prepared.manifest["train"]]
        rows = training_rows(files, T + 1, tokenizer.get_bos_token_id())
    else:
        rows = ((row, epoch) for epoch in count(1) for row in prepared.rows())
    # Only pinned memory outlives a copy that still runs: other devices' copies are waited for.
    move = partial(torch.Tensor.to, device=device, non_blocking=cuda)
    made = ahead(batches(rows, B, pinned=cuda))
    return ((move(inputs), move(targets), epoch) for inputs, targets, epoch in made)


# --- Evaluation ------------------------------------------------------------------

LOGITS_AT_ONCE = 1 << 26  # more are turned into losses a slice at a time
# An honest model gives a row the same loss again to the last bit, as the same shapes run the same
# kernels. What hides below is worth less than the spread of two seeds.
LOSS_TOLERANCE_NATS = 0.002
BATCHES_PER_PROBE = 40  # and two probes at least: 2.5 % of an evaluation at the GPU scale


class Refused(ValueError):
    """A model, or a state of the files, that is given no number."""


def is_out_of_memory(failure: BaseException) -> bool:
    """Also where a compiler or a library wrapped it in an error of its own."""
    words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
    full = isinstance(failure, (torch.OutOfMemoryError, MemoryError))
    return full or any(word in str(failure) for word in words)


@torch.no_grad()
def evaluate_bpb(model: torch.nn.Module, tokenizer: Tokenizer, batch_size: int) -> float:
    """Bits per byte of `model` on the validation rows, `batch_size` rows at a time.

    `model(idx)` must give finite logits (B, T, V) from tokens (B, T). The number does not depend on
    `batch_size`; out of memory halves it. Raises Refused for a model that looks at future tokens,
    other rows or earlier batches or changes itself, and for files that are not those prepared.
    """
    rows, lengths_V = read_unaltered(open_prepared(), tokenizer)
    modes = [(module, module.training) for module in model.modules()]
    losses = None
    try:
        model.eval()
        before = {name: state.clone() for name, state in raw_state(model).items()}
        while losses is None:
            try:
                losses = checked_losses(model, rows, batch_size, len(lengths_V))
            except RuntimeError as failure:
                if batch_size == 1 or not is_out_of_memory(failure):
                    raise
                batch_size //= 2
                say(f"evaluation: out of memory; starting again, {batch_size} rows at a time")
        for name, state in raw_state(model).items():
            if name not in before or not before[name].equal(state):
                raise Refused(f"the model changed its {name} while it was evaluated")
    finally:
        for module, mode in modes:
            module.training = mode
    lengths_NT = lengths_V.astype(np.int32)[rows[:, 1:]]  # special tokens: 0, in neither sum
    nats, num_bytes = losses[lengths_NT > 0].sum(dtype=float), lengths_NT.sum()
    return float(nats) / (math.log(2) * int(num_bytes))


def read_unaltered(prepared: Prepared, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, T + 1) and `lengths_V`, in memory; Refused if files or tokenizer were altered."""
    folder = prepared.tokens
    for name, digest in prepared.manifest["sha256"].items():
        if sha256_of(folder / name) != digest:
            raise Refused(f"{folder / name} was altered; remove {folder}, run: uv run prepare.py")
    fresh = Tokenizer.from_directory(folder)
    if getattr(tokenizer, "ranks", None) != fresh.ranks:
        raise Refused("the tokenizer is not the prepared one; use Tokenizer.from_directory()")
    return prepared.rows(), fresh.token_lengths()


def raw_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights and buffers as bytes, in which NaN equals itself."""
    state = chain(model.named_parameters(), model.named_buffers())
    return {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in state}


def checked_losses(model: torch.nn.Module, rows: np.ndarray, B: int, V: int) -> np.ndarray:
    """Losses (N, T) in nats of a model that looks at nothing but earlier tokens of a row."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batches, T = -(-len(rows) // B), rows.shape[1] - 1
    numbers = np.arange(batches * B) % len(rows)  # the last batch is filled with the first rows
    tokens = torch.from_numpy(rows[numbers].astype(np.int64)).to(device)
    losses = torch.cat([token_losses(model, V, batch) for batch in tokens.split(B)])
    refuse_where(~losses.isfinite(), "logits that are not finite", numbers)
    secret = np.random.default_rng()  # seeded by the system: no model can foresee it
    for n in range(max(2, batches // BATCHES_PER_PROBE)):
        # Rows, at their places in a batch, with other tokens from a cut on: a look ahead shows
        # before it. First those of the first batch, one left whole: a look at other rows shows
        # there. Then those of any batch.
        picks = secret.integers(batches if n else 1, size=B) * B + np.arange(B)
        cut_B1 = secret.integers(1, T, (B, 1))
        cut_B1[secret.integers(B)] += T * (n == 0)
        added_BT = secret.integers(1, V, (B, T)) * (np.arange(T) >= cut_B1)
        added_BT = torch.from_numpy(added_BT).to(device)
        gaps_BT = (token_losses(model, V, tokens[picks], added_BT) - losses[picks]).abs()
        other_BT = ~(gaps_BT <= LOSS_TOLERANCE_NATS) & (added_BT == 0)
        if other_BT.any():
            gaps_BT = (token_losses(model, V, tokens[picks]) - losses[picks]).abs()
            leaks = gaps_BT[other_BT].max() <= LOSS_TOLERANCE_NATS  # with nothing changed
            why = "only later tokens and other rows were changed" if leaks else "scored again"
            refuse_where(other_BT, f"another loss when {why}", numbers[picks])
    return losses[: len(rows)].cpu().numpy()


def token_losses(model, V: int, tokens: torch.Tensor, added_BT: torch.Tensor | int = 0):
    """Cross-entropy (B, T) in nats of the model's logits; not finite where these are not."""
    inputs, targets = (tokens[:, :-1] + added_BT) % V, tokens[:, 1:]  # share no memory
    try:
        logits = model(inputs)
    except TypeError as failure:
        raise Refused(f"model(idx) must give logits from tokens alone, but: {failure}") from failure
    shape = (*inputs.shape, V)
    if type(logits) is not torch.Tensor or not logits.is_floating_point() or logits.shape != shape:
        seen = [getattr(logits, name, None) for name in ("__class__", "dtype", "shape")]
        raise Refused(f"model(idx) gave {seen}, not floating-point logits (B, T, V) = {shape}")
    logits = torch.Tensor.detach(logits)  # without methods that the model hung on it
    slices = (t.flatten(0, 1).split(LOGITS_AT_ONCE // V) for t in (logits, targets))
    pairs = zip(*slices, strict=True)
    # 0 x -inf is NaN: the loss alone does not show a logit of -inf for another token.
    losses = [F.cross_entropy(x.float(), y, reduction="none") + 0 * x.amin(-1) for x, y in pairs]
    return torch.cat(losses).view_as(targets)


def refuse_where(bad_BT: torch.Tensor, what: str, numbers: np.ndarray) -> None:
    if bad_BT.any():
        row, position = divmod(int(bad_BT.flatten().int().argmax()), bad_BT.shape[1])
        raise Refused(f"the model gave {what}: row {numbers[row]}, position {position}")


# --- Command line ----------------------------------------------------------------


def say(line: str) -> None:
    print(line, flush=True)


def explain(failure: Exception) -> str:
    """One paragraph for a person: what failed and what to do."""
    if getattr(failure, "errno", None) is None:  # the network's have none either
        return str(failure)
    remedy = "free some space or set AUTORESEARCH_CACHE to a folder that you may use"
    return f"{failure}: mend this, {remedy}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare the data set that DATASET names.")
    parser.add_argument("--num-shards", type=int, help="training files (default: as before, or 10)")
    parser.add_argument("--download-workers", type=int, default=8, help="parallel downloads")
    arguments = parser.parse_args()
    if min(arguments.num_shards or 1, arguments.download_workers) < 1:
        parser.error("--num-shards and --download-workers must be at least 1")
    try:
        prepared = prepare(arguments.num_shards, arguments.download_workers)
    except (OSError, ValueError, RuntimeError) as failure:
        sys.exit(f"error: {explain(failure)}")
    tokens = sum(size_of(prepared.tokens / name) for name in prepared.manifest["train"]) // 2
    say(f"tokens:    {tokens:,} to train on, {len(prepared.rows()):,} rows to validate on")
    say(f"benchmark: {benchmark_id(prepared)}\nnext:      uv run train.py")


if __name__ == "__main__":
    main()
