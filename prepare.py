"""The harness: data, tokenizer, row packing, loader, the clock's length and the metric.

The person's file, fixed during a night: an agent reads it and changes nothing in it.

    uv run prepare.py        prepare the data set that DATASET names (train.py does it by itself)

B batch (rows) · T time (tokens of a row) · V vocabulary. A row holds T + 1 tokens: the inputs are
its first T, the targets its last T. Documents are stored, and packed into rows, behind BOS: the
token that starts every document and every row, and that no text can produce.
"""

import argparse
import base64
import errno
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
from collections import Counter, OrderedDict, deque
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
    cache = Path(os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch").expanduser()
    if DATASET == "pysource":
        versions = [importlib.metadata.version(package) for package in PYSOURCE_PACKAGES]
        return cache / f"pysource-{short_hash(versions)}"
    if DATASET in HUB:
        return cache / DATASET
    return cache / f"{benchmark_name()}-{short_hash(str(own_path()))}"


def own_path() -> Path:
    """The folder or file that DATASET names, seen from this file's folder."""
    return Path(__file__).resolve().parent / Path(DATASET).expanduser()


def short_hash(value: object) -> str:
    """Eight hexadecimal digits that change with `value` (anything json can write)."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


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

DEFAULT_SHARDS = 10  # training files, of a data set of many
VALIDATION_SHARE = 0.1  # of local documents, chosen by the hash of their text
SHARD_BYTES = 256 << 20  # local files are gathered into shards of about this size
PYSOURCE_PACKAGES = ("sympy", "pandas", "numpy", "matplotlib", "networkx")
# These differ between platforms.
PYSOURCE_SKIPS = ("__config__.py", "_distributor_init.py", "_distributor_init_local.py")


class Shard(NamedTuple):
    """A part of a data set that becomes one file of tokens."""

    name: str
    documents: Callable[[], Iterator[str]]  # reads them anew at each call


class HubFiles(NamedTuple):
    """Parquet files with a `text` column, in a data set repository of the Hugging Face hub."""

    repository: str
    train_files: list[str]
    validation_file: str
    train_rows: tuple[int, int | None] = (0, None)  # from, to
    validation_rows: tuple[int, int | None] = (0, None)


HUB = {
    "climbmix": HubFiles(
        "karpathy/climbmix-400b-shuffle",
        [f"shard_{n:05d}.parquet" for n in range(6542)],
        "shard_06542.parquet",
    ),
    "tinystories": HubFiles(
        "karpathy/tinystories-gpt4-clean",
        ["tinystories_gpt4_clean.parquet"],
        "tinystories_gpt4_clean.parquet",
        train_rows=(20_000, None),
        validation_rows=(10_000, 20_000),
    ),
}


class DataSet(NamedTuple):
    """Documents to read: shards to train on, one to validate on."""

    train: list[Shard]
    validation: Shard
    signature: list  # changes when the training text does
    notes: Counter  # what had to be skipped or replaced while reading


def find_dataset(num_shards: int | None, workers: int) -> DataSet:
    """The data set that DATASET names, downloaded; ValueError if nothing goes by that name."""
    if DATASET in HUB:
        return hub_dataset(HUB[DATASET], num_shards or DEFAULT_SHARDS, workers)
    if DATASET == "pysource":
        return local_dataset(pysource(), [PYSOURCE_SKIPS], least_chars=200)
    root = own_path()
    if not root.exists():
        raise ValueError(
            f'DATASET = "{DATASET}" is neither one of {", ".join([*HUB, "pysource"])} nor a file '
            f"or folder: there is no {root}; mend DATASET in prepare.py"
        )
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file())
    files = [p for p in files if not any(s.startswith(".") for s in p.relative_to(root).parts)]
    if not files:
        raise ValueError(f'DATASET = "{DATASET}": there is no file in {root}; put text there')
    states = [(str(path.relative_to(root)), path.stat()) for path in files]
    signature = [[name, state.st_size, state.st_mtime_ns] for name, state in states]
    return local_dataset(files, signature, least_chars=MAX_SEQ_LEN)


def hub_dataset(hub: HubFiles, num_shards: int, workers: int) -> DataSet:
    """Files of the hub, the validation file downloaded first."""
    raw, names = dataset_directory() / "raw", hub.train_files[:num_shards]
    download(hub.repository, list(dict.fromkeys([hub.validation_file, *names])), raw, workers)

    def shard(split: str, name: str, rows: tuple) -> Shard:
        return Shard(f"{split}_{Path(name).stem}", partial(parquet_texts, raw / name, *rows))

    signature = [[name, (raw / name).stat().st_size] for name in names]
    train = [shard("train", name, hub.train_rows) for name in names]
    validation = shard("val", hub.validation_file, hub.validation_rows)
    return DataSet(train, validation, signature, Counter())


def local_dataset(files: list[Path], signature: list, least_chars: int) -> DataSet:
    """Files of this machine, whose documents are divided by the hash of their text."""
    notes: Counter = Counter()

    def documents(files: list[Path], validation: bool) -> Iterator[str]:
        for path in files:
            for text in file_texts(path, least_chars, notes if validation else Counter()):
                if text.strip() and is_validation(text) == validation:
                    yield text

    groups: list[list[Path]] = []
    room = 0
    for path in files:
        if room <= 0:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(path)
        room -= path.stat().st_size
    train = [Shard(f"train_{n}", partial(documents, g, False)) for n, g in enumerate(groups)]
    signature = [least_chars, SHARD_BYTES, VALIDATION_SHARE, *signature]
    return DataSet(train, Shard("val", partial(documents, files, True)), signature, notes)


def pysource() -> list[Path]:
    """Python source of packages that the lock file pins: the same bytes on every machine."""
    return [
        Path(str(entry.locate()))
        for package in PYSOURCE_PACKAGES
        for entry in sorted(importlib.metadata.distribution(package).files or [], key=str)
        if entry.suffix == ".py" and entry.parts[0] == package and entry.name not in PYSOURCE_SKIPS
    ]


def is_validation(text: str) -> bool:
    """Whether a local document is held out: by its text alone, so that new files move none."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < VALIDATION_SHARE * 2**64


def parquet_texts(path: Path, first: int = 0, last: int | None = None) -> Iterator[str]:
    """The `text` column of rows first … last − 1, some rows in memory at a time."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        if "text" not in file.schema_arrow.names:
            raise ValueError(f"{path} has no column `text`; its columns: {file.schema_arrow.names}")
        batches = file.iter_batches(batch_size=1024, columns=["text"])
        columns = (batch.column(0).cast(pyarrow.binary()) for batch in batches)
        texts = islice(chain.from_iterable(column.to_pylist() for column in columns), first, last)
        yield from (text.decode(errors="replace") for text in texts if text)


def file_texts(path: Path, least_chars: int, notes: Counter) -> Iterator[str]:
    """The documents of one file; what had to be skipped or replaced is counted in `notes`."""
    if path.suffix == ".parquet" and is_parquet(path):
        yield from parquet_texts(path)
        return
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            if path.name.endswith((".jsonl", ".jsonl.gz")):
                yield from (text for line in file for text in json_text(line, notes))
                return
            raw = file.read()
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raw = b"\0"
    if b"\0" in raw[:8192]:
        notes["files that are not text: skipped"] += 1
        return
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = raw.decode(errors="replace")
        notes["files that are not UTF-8: odd bytes replaced"] += 1
    yield from split_text(text.replace("\r\n", "\n"), least_chars)


def json_text(line: bytes, notes: Counter) -> list[str]:
    """The "text" of a line of JSON; none if there is none."""
    try:
        # JSON can hold lone surrogates, UTF-8 cannot.
        return [json.loads(line)["text"].encode(errors="replace").decode()]
    except (ValueError, LookupError, TypeError, AttributeError):
        if line.strip():
            notes['lines of .jsonl without a "text": skipped'] += 1
        return []


def split_text(text: str, least_chars: int) -> list[str]:
    r"""Cut at blank lines before an unindented line, into pieces of at least `least_chars`.

    In source code these are the top-level definitions, in prose the paragraphs.

        >>> split_text("a = 1\n\nb = 2\n\n    c\n\nd", 1)
        ['a = 1\n\n', 'b = 2\n\n    c\n\n', 'd']
    """
    pieces, start = [], 0
    for match in re.finditer(r"\n\n(?=\S)", text):
        if match.end() - start >= least_chars:
            pieces.append(text[start : match.end()])
            start = match.end()
    return [*pieces, text[start:]]


# --- Download --------------------------------------------------------------------

RETRY_WAITS_S = (1, 2, 4, 8, 16)  # after each failure that brought no new byte
TIMEOUT_S = (10, 30)  # to connect; between two bytes


def download(repository: str, names: list[str], directory: Path, workers: int) -> None:
    """Fetch files of a hub data set into `directory`, the first alone and before the others.

    Raises RuntimeError with the names of those that are still missing; the others stay.
    """
    from tqdm import tqdm

    directory.mkdir(parents=True, exist_ok=True)
    missing = [name for name in names if not is_parquet(directory / name)]
    if not missing:
        return
    say(f"downloading {len(missing)} files of {repository}")
    failures: list[Exception] = []
    with tqdm(unit="B", unit_scale=True, disable=None, desc="download") as bar:

        def fetch(name: str) -> None:
            if len(failures) <= workers:  # more: it is the network, not the file
                try:
                    download_file(file_url(repository, name), directory / name, bar)
                except (OSError, RuntimeError) as failure:
                    failures.append(failure)

        fetch(missing[0])
        if not failures:
            bar.total = len(missing) * (directory / missing[0]).stat().st_size  # all much alike
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(fetch, missing[1:]))
    if failures:
        lost = [name for name in missing if not is_parquet(directory / name)]
        raise RuntimeError(
            f"{len(lost)} of {len(missing)} files are still missing ({', '.join(lost[:20])}"
            f"{', …' * (len(lost) > 20)}): {explain(failures[0])}. To go on, run: uv run "
            'prepare.py; without a network, set DATASET = "pysource" in prepare.py'
        ) from failures[0]


def file_url(repository: str, name: str) -> str:
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return f"{endpoint.rstrip('/')}/datasets/{repository}/resolve/main/{name}"


def is_parquet(path: Path) -> bool:
    """Whether a whole parquet file lies there: its footer, at its very end, can be read."""
    import pyarrow.parquet

    try:
        pyarrow.parquet.read_metadata(path)
    except (OSError, pyarrow.ArrowInvalid):
        return False
    return True


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def download_file(url: str, path: Path, bar) -> None:
    """Download one parquet file, going on where an earlier try stopped, checked before renamed.

    The caller holds the data set's lock, so a partial file that lies there has no other owner.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    for orphan in path.parent.glob(f"{path.name}.*.part"):
        orphan.replace(partial)
    most_bytes, failures = size_of(partial), 0
    while True:
        try:
            digest = receive(url, partial, bar)
            if digest not in (None, sha256_of(partial)) or not is_parquet(partial):
                partial.unlink()
                raise OSError(f"{url} gave other bytes than the file's")
            os.replace(partial, path)
            return
        except OSError as failure:  # those of requests are OSErrors without a number
            num_bytes = size_of(partial)
            failures = 0 if num_bytes > most_bytes else failures + 1
            most_bytes = max(num_bytes, most_bytes)
            if failures > len(RETRY_WAITS_S) or failure.errno is not None:
                raise
        time.sleep(RETRY_WAITS_S[max(failures - 1, 0)])


def receive(url: str, partial: Path, bar) -> str | None:
    """Append to `partial` what it lacks; the SHA-256 that the hub names, if it names one.

    Raises RuntimeError where trying again is useless, else OSError.
    """
    import requests

    headers = {"Accept-Encoding": "identity", "Range": f"bytes={size_of(partial)}-"}
    if token := os.environ.get("HF_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"  # dropped by requests at another host
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as answer:
        hops = [*answer.history, answer]  # an ETag behind the redirect is of another kind
        tags = [*(hop.headers.get("X-Linked-ETag") for hop in hops), hops[0].headers.get("ETag")]
        digest = next(iter(re.findall(r"\b[0-9a-f]{64}\b", str(tags))), None)
        if answer.status_code == 416 and partial.exists():  # nothing is missing
            return digest
        refuse(answer)
        bar.total = bar.total or int(answer.headers.get("Content-Length", 0))
        # 200, not 206: the server ignores ranges. Small blocks, as one that breaks off is lost.
        with open(partial, "ab" if answer.status_code == 206 else "wb") as file:
            for block in answer.iter_content(1 << 16):
                bar.update(file.write(block))
    return digest


def refuse(answer) -> None:
    """Raise if an answer has no content, after the wait that it asks for."""
    status = answer.status_code
    if status < 400:
        return
    words = answer.headers.get("X-Error-Message", answer.reason)
    message = f"{answer.url.split('?')[0]}: {status} {words}"
    if status in (401, 403):
        message += "; accept its terms on the hub and set HF_TOKEN"
    if status in (401, 403, 404, 410):
        raise RuntimeError(message)
    wait = answer.headers.get("Retry-After", "")
    time.sleep(min(float(wait), 300.0) if wait.isdecimal() else 0.0)
    raise OSError(message)


# --- Tokenizer -------------------------------------------------------------------

SPECIAL_TOKENS = tuple(f"<|reserved_{n}|>" for n in range(4))  # number 0 is BOS
# GPT-4's, with numbers cut into runs of at most 2 digits: better for a small vocabulary.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
TOKENIZER_FILES = ("tokenizer.tiktoken", "tokenizer.json")
BPE_CHARS = 1_000_000_000  # the vocabulary is made from at most this much training text
BPE_DOCUMENT_CHARS = 10_000  # and this much of one document
ENCODE_CHARS = 100_000  # tiktoken's regular expression runs out of stack on very long blanks


class Tokenizer:
    """Byte-pair encoding: ranks 0 … V − 5 are the merges in order, the last 4 are special."""

    def __init__(self, ranks: dict[bytes, int], pattern: str = SPLIT_PATTERN):
        import tiktoken

        self.ranks, self.pattern = ranks, pattern
        special = {token: len(ranks) + n for n, token in enumerate(SPECIAL_TOKENS)}
        self.bos = special[SPECIAL_TOKENS[0]]
        self._encoding = tiktoken.Encoding(
            "autoresearch", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )

    @classmethod
    def from_directory(cls, directory: str | Path | None = None) -> "Tokenizer":
        """The prepared tokenizer. Prepares the data first where nothing is prepared yet."""
        return cls.load(Path(directory) if directory else open_prepared().tokens)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn a vocabulary; a smaller one than asked for if the text does not hold as much."""
        import rustbpe

        bpe = rustbpe.Tokenizer()
        merges = vocab_size - len(SPECIAL_TOKENS)
        bpe.train_from_iterator(iter(texts), merges, pattern=SPLIT_PATTERN)
        ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
        return cls(ranks)

    def save(self, directory: Path) -> None:
        """Write tiktoken's ranks format and a small JSON: text, never pickle."""
        lines = (base64.b64encode(t) + b" %d\n" % rank for t, rank in self.ranks.items())
        ranks_file, about_file = (directory / name for name in TOKENIZER_FILES)
        with written_whole(ranks_file) as file:
            file.write(b"".join(lines))
        about = {"pattern": self.pattern, "special_tokens": SPECIAL_TOKENS}
        with written_whole(about_file) as file:
            file.write(json.dumps(about, indent=1).encode())

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        ranks_file, about_file = (directory / name for name in TOKENIZER_FILES)
        lines = ranks_file.read_bytes().splitlines()
        ranks = {base64.b64decode(t): int(rank) for t, rank in (line.split() for line in lines)}
        return cls(ranks, json.loads(about_file.read_text())["pattern"])

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
        """Bytes of every token as `lengths_V`, 0 for the special ones.

        Raw bytes: decoding one token turns half a character into U+FFFD, which would count as
        three bytes.
        """
        lengths_V = np.zeros(self.get_vocab_size(), dtype=np.int64)
        for token, rank in self.ranks.items():
            lengths_V[rank] = len(token)
        return lengths_V


def get_token_bytes(device: str | torch.device = "cpu") -> torch.Tensor:
    """Bytes of every token of the prepared tokenizer: (V,) int64, 0 for the special tokens."""
    return torch.from_numpy(Tokenizer.from_directory().token_lengths()).to(device)


# --- Token shards ----------------------------------------------------------------


class Prepared(NamedTuple):
    """What lies ready for the present constants, as its manifest tells."""

    directory: Path
    manifest: dict

    @property
    def tokens(self) -> Path:
        """The folder with the tokenizer and all that was made with it."""
        return self.directory / self.manifest["tokens_in"]

    def rows(self) -> np.ndarray:
        """The rows that are scored: (rows, T + 1) uint16, mapped from the disk."""
        file = self.tokens / self.manifest["rows"]
        return np.memmap(file, dtype=np.uint16, mode="r").reshape(-1, MAX_SEQ_LEN + 1)

    def damaged(self) -> list[Path]:
        """The files that are gone or have another size than when they were made."""
        sizes = self.manifest["bytes"].items()
        return [self.tokens / name for name, size in sizes if size_of(self.tokens / name) != size]


def manifest_path() -> Path:
    """Where the manifest lies; ValueError, with the values, for constants that cannot work."""
    if not 260 <= VOCAB_SIZE <= 65536:
        raise ValueError(
            f"VOCAB_SIZE = {VOCAB_SIZE} in prepare.py is not within 260 … 65536: 256 tokens are "
            "the bytes, 4 are special, and all are uint16"
        )
    if not 2 <= MAX_SEQ_LEN <= EVAL_TOKENS:
        raise ValueError(f"MAX_SEQ_LEN = {MAX_SEQ_LEN} in prepare.py is not within 2 … EVAL_TOKENS")
    name = f"prepared-v{VOCAB_SIZE}-t{MAX_SEQ_LEN}-e{EVAL_TOKENS}.json"
    return dataset_directory() / name


def open_prepared() -> Prepared:
    """What is prepared for the present constants; prepares it first if nothing is.

    Raises FileNotFoundError if a file that the manifest names is gone or has another size.
    """
    path = manifest_path()
    if not path.exists():
        say(f"{DATASET} is not prepared yet; doing it now, in {path.parent}")
        return prepare()
    prepared = read_manifest(path)
    for file in prepared.damaged():
        raise FileNotFoundError(f"{file} is missing or cut short; run: uv run prepare.py")
    return prepared


def read_manifest(path: Path) -> Prepared:
    return Prepared(path.parent, json.loads(path.read_text()))


def prepare(num_shards: int | None = None, workers: int = 8) -> Prepared:
    """Make whatever the present constants need and is not there yet; keep what is.

    `num_shards`: training files, of a data set of many; by default as many as before. `workers`:
    parallel downloads.
    Raises OSError, ValueError or RuntimeError that say what to do; the next call goes on.
    """
    started_s = time.perf_counter()
    path = manifest_path()
    with alone_in(path.parent):
        if num_shards is None and path.exists():  # what was chosen before stays
            num_shards = len(read_manifest(path).manifest["train"])
        data = find_dataset(num_shards, workers)
        # All that tokens depend on: the text, and how documents and vocabulary are cut from it.
        key = [VOCAB_SIZE, SPLIT_PATTERN, BPE_CHARS, BPE_DOCUMENT_CHARS]
        folder = path.parent / f"v{VOCAB_SIZE}-{short_hash([*key, data.signature])}"
        manifests = path.parent.glob("prepared-*.json")
        damaged = chain.from_iterable(read_manifest(manifest).damaged() for manifest in manifests)
        for file in (*damaged, *folder.glob("*.tmp")):  # the lock is ours: their maker was killed
            file.unlink(missing_ok=True)
        tokenizer = make_tokenizer(data, folder)
        train = [tokenize(shard, tokenizer, folder) for shard in data.train]
        validation = tokenize(data.validation, tokenizer, folder)
        rows = make_rows(validation, tokenizer.bos)
        manifest = describe(tokenizer, train, validation, rows)
        content = json.dumps(manifest, indent=1).encode()
        if not path.exists() or path.read_bytes() != content:
            with written_whole(path) as file:
                file.write(content)
    for note, times in data.notes.items():
        say(f"note: {times:,} {note}")
    say(f"prepared {DATASET} in {time.perf_counter() - started_s:.0f} s, in {path.parent}")
    return Prepared(path.parent, manifest)


def make_tokenizer(data: DataSet, folder: Path) -> Tokenizer:
    """Learn the vocabulary from the training split alone, or load the one that is there."""
    if all((folder / name).exists() for name in TOKENIZER_FILES):
        say(f"vocabulary: reusing {folder.name}")
        return Tokenizer.load(folder)
    say(f"vocabulary: learning {VOCAB_SIZE:,} tokens from the training text")
    chars = 0

    def texts() -> Iterator[str]:
        nonlocal chars
        for text in chain.from_iterable(shard.documents() for shard in data.train):
            chars += len(text[:BPE_DOCUMENT_CHARS])
            yield text[:BPE_DOCUMENT_CHARS]
            if chars >= BPE_CHARS:
                return

    tokenizer = Tokenizer.train(texts(), VOCAB_SIZE)
    least = max(100 * VOCAB_SIZE, 400 * MAX_SEQ_LEN)
    if chars < least or tokenizer.get_vocab_size() < VOCAB_SIZE:
        raise ValueError(
            f'DATASET = "{DATASET}" holds {chars:,} characters to train on, which give '
            f"{tokenizer.get_vocab_size()} tokens; VOCAB_SIZE = {VOCAB_SIZE} with MAX_SEQ_LEN = "
            f"{MAX_SEQ_LEN} needs {least:,} of varied text: bring more, or lower these two in "
            "prepare.py"
        )
    tokenizer.save(folder)
    return tokenizer


def tokenize(shard: Shard, tokenizer: Tokenizer, folder: Path) -> Path:
    """Write a shard's documents as one flat uint16 file, each starting with BOS."""
    from tqdm import tqdm

    path = folder / f"{shard.name}.bin"
    if path.exists():
        say(f"{shard.name}: reusing {path.stat().st_size // 2:,} tokens")
        return path
    started_s = time.perf_counter()
    bar = tqdm(unit=" tokens", unit_scale=True, disable=None, desc=f"tokenize {shard.name}")
    with written_whole(path) as file, bar:
        for tokens in encode_all(tokenizer, shard.documents()):
            bar.update(file.write(tokens) // 2)
    tokens, seconds = path.stat().st_size // 2, time.perf_counter() - started_s
    say(f"{shard.name}: {tokens:,} tokens in {seconds:.0f} s")
    return path


def encode_all(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[np.ndarray]:
    """Encode documents in their order, on every core; yields some of them at a time."""

    own = threading.local()

    def begin() -> None:
        # Of threads that share one, all but the first take half as long again (tiktoken 0.14).
        own.tokenizer = Tokenizer(tokenizer.ranks, tokenizer.pattern)

    def encode(texts: list[str]) -> np.ndarray:
        empty = np.zeros(0, np.uint16)
        return np.concatenate([empty, *(own.tokenizer.encode_array(text) for text in texts)])

    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores, initializer=begin) as pool:
        group, chars, running = [], 0, deque()
        for text in documents:
            group.append(text)
            chars += len(text)
            if chars > 500_000:  # long enough for threads to pay, short enough for little memory
                running.append(pool.submit(encode, group))
                group, chars = [], 0
            if len(running) > 2 * cores:
                yield running.popleft().result()
        running.append(pool.submit(encode, group))
        yield from (future.result() for future in running)


def make_rows(validation: Path, bos: int) -> Path:
    """Pack the validation rows by the reference rule and store them, ready to be scored."""
    wanted = EVAL_TOKENS // MAX_SEQ_LEN
    path = validation.with_name(f"rows-t{MAX_SEQ_LEN}-n{wanted}.bin")
    if path.exists():
        say(f"rows: reusing {path.name}")
        return path
    tokens = np.fromfile(validation, dtype=np.uint16)
    starts, lengths = document_spans(tokens, bos)
    starts, packing = starts.tolist(), pack_rows(lengths.tolist(), MAX_SEQ_LEN + 1)
    rows = [write_row(p, tokens, starts, MAX_SEQ_LEN + 1, bos) for p in islice(packing, wanted)]
    if len(rows) < LEAST_ROWS:
        raise ValueError(
            f'DATASET = "{DATASET}": its validation text fills {len(rows)} rows of MAX_SEQ_LEN + 1 '
            f"= {MAX_SEQ_LEN + 1} tokens, at least {LEAST_ROWS} are needed: bring more documents "
            "(text files are cut at blank lines)"
        )
    with written_whole(path) as file:
        file.write(np.stack(rows))
    return path


def describe(tokenizer: Tokenizer, train: list[Path], validation: Path, rows: Path) -> dict:
    """The manifest: the files by size and hash, and what a person wants to know of them."""
    counts_V = np.zeros(VOCAB_SIZE, np.int64)
    for path in train:
        tokens = np.memmap(path, dtype=np.uint16, mode="r") if path.stat().st_size else []
        for i in range(0, len(tokens), 1 << 22):
            counts_V += np.bincount(tokens[i : i + (1 << 22)], minlength=VOCAB_SIZE)
    scored = [*(rows.with_name(name) for name in TOKENIZER_FILES), rows]
    return {
        "tokens_in": rows.parent.name,
        "train": [path.name for path in train],
        "rows": rows.name,
        "bytes": {path.name: path.stat().st_size for path in [*scored, *train, validation]},
        "sha256": {path.name: sha256_of(path) for path in scored},
        "documents": int(counts_V[tokenizer.bos]),
        "tokens": int(counts_V.sum()),
        "bytes_per_token": float(counts_V @ tokenizer.token_lengths() / max(1, counts_V.sum())),
    }


def benchmark_name() -> str:
    """DATASET, or for a path of one's own its last part."""
    if DATASET in HUB or DATASET == "pysource":
        return DATASET
    return re.sub(r"\W+", "-", own_path().stem).strip("-").lower() or "text"


def benchmark_id(prepared: Prepared) -> str:
    """The name of everything that makes two scores comparable, the budget included.

    It ends in a hash over data set, vocabulary, row length and the very rows that are scored.
    """
    name, constants = benchmark_name(), [VOCAB_SIZE, MAX_SEQ_LEN, TIME_BUDGET]
    content = short_hash([name, constants, sorted(prepared.manifest["sha256"].items())])
    return f"{name}-v{VOCAB_SIZE}-t{MAX_SEQ_LEN}-{TIME_BUDGET}s-{content}"


# --- Rows and loader -------------------------------------------------------------

BUFFER_DOCUMENTS = 1000  # among which the packing chooses
LEAST_ROWS = 16  # of validation text: fewer would measure nothing
BATCHES_AHEAD = 2

# document · its tokens after BOS to skip · tokens to take, BOS included
Part = tuple[int, int, int]

# from · to: of all documents, by a number from 0 to 1 that is drawn for each
Share = tuple[float, float]


def document_spans(tokens: np.ndarray, bos: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the documents of a flat file start, and their lengths with BOS."""
    starts = np.flatnonzero(tokens == bos)
    return starts, np.diff(starts, append=len(tokens))


def cut_long(starts: np.ndarray, lengths: np.ndarray, row_tokens: int) -> tuple:
    """Cut documents longer than a row into pieces that fill one, each with a BOS of its own.

    Takes and returns starts and lengths; a start is where the BOS stands or, in a later piece,
    the token before the piece, whose place BOS will take. Documents without text are left out.
    """
    text = row_tokens - 1  # what a row has room for behind BOS
    pieces = -(-(lengths - 1) // text)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    skipped = text * (np.arange(pieces.sum()) - first)
    rest = np.repeat(lengths - 1, pieces) - skipped
    return np.repeat(starts, pieces) + skipped, np.minimum(rest, text) + 1


def pack_rows(
    lengths: Iterable[int], row_tokens: int, buffer_size: int = BUFFER_DOCUMENTS, keep: bool = False
) -> Iterator[list[Part]]:
    """Pack documents into full rows by the reference rule, best fit with cropping.

    Of `buffer_size` documents take the longest that still fits; when none fits, cut the shortest
    to fill the row, and drop its rest. Of equal ones take the first to arrive. `lengths` count BOS.

    With `keep`, for training and pieces of at most a row, that rest, behind a new BOS, keeps its
    place in the queue, and a row begins with what has waited longest: nothing waits for more than
    `buffer_size` rows, and nothing is lost but the last, unfilled row.
    """
    arriving = enumerate(lengths)
    waiting: list[tuple[int, int]] = []  # (length, document), sorted
    queue: OrderedDict = OrderedDict()  # document -> (length, used), oldest first
    while True:
        row, room = [], row_tokens
        while room:
            for document, length in islice(arriving, buffer_size - len(waiting)):
                insort(waiting, (length, document))
                queue[document] = (length, 0)
            if not waiting:
                return
            oldest_first = keep and not row
            document = next(iter(queue)) if oldest_first else best_fit(waiting, room)
            length, used = queue[document]
            del waiting[bisect_left(waiting, (length, document))]
            taken = min(length, room)
            row.append((document, used, taken))
            room -= taken
            if keep and taken < length:
                queue[document] = (length - taken + 1, used + taken - 1)  # each with a BOS
                insort(waiting, (length - taken + 1, document))
            else:
                del queue[document]
        yield row


def best_fit(waiting: list[tuple[int, int]], room: int) -> int:
    """Of the longest documents that fit, or else of the shortest, the first to arrive."""
    fitting = bisect_right(waiting, (room, math.inf))
    return waiting[bisect_left(waiting, (waiting[max(fitting - 1, 0)][0], -1))][1]


def write_row(
    parts: list[Part], tokens: np.ndarray, starts: list[int], row_tokens: int, bos: int
) -> np.ndarray:
    """Copy the parts of one row, each behind BOS."""
    row = np.empty(row_tokens, np.uint16)
    at = 0
    for document, used, length in parts:
        begin = starts[document] + 1 + used
        row[at] = bos
        row[at + 1 : at + length] = tokens[begin : begin + length - 1]
        at += length
    assert at == row_tokens, (at, row_tokens)
    return row


def training_rows(
    files: list[Path], row_tokens: int, bos: int, share: Share = (0, 1)
) -> Iterator[tuple]:
    """Endless training rows, (T + 1) uint16 each, with their epoch, from 1 on.

    Each epoch serves every piece of every document in the share, in an order of its own, the same
    in every run. Before that the first one serves, of shards with documents longer than a row, the
    documents' first pieces. They are what validation rows hold: a run that ends within an epoch has
    then seen text of the kind that it is scored on.
    """
    for epoch, first_pieces in chain([(1, True)], zip(count(1), repeat(False))):
        served = 0
        for n, path in enumerate(files):
            if not size_of(path):
                continue
            tokens = np.asarray(np.memmap(path, dtype=np.uint16, mode="r"))
            starts, lengths = document_spans(tokens, bos)
            chosen = documents_in(share, n, len(starts))
            starts, lengths = starts[chosen], lengths[chosen]
            if first_pieces:
                if lengths.max(initial=0) <= row_tokens:
                    continue
                lengths = np.minimum(lengths, row_tokens)
            starts, lengths = cut_long(starts, lengths, row_tokens)
            order = np.random.default_rng((epoch, n, first_pieces)).permutation(len(starts))
            starts = starts[order].tolist()
            for parts in pack_rows(lengths[order].tolist(), row_tokens, keep=True):
                yield write_row(parts, tokens, starts, row_tokens, bos), epoch
                served += 1
        if not (served or first_pieces):
            raise ValueError(f"the training text does not fill one row of {row_tokens} tokens")


def documents_in(share: Share, shard: int, documents: int) -> np.ndarray:
    """Which of a shard's documents are in the share: (documents,) bool, the same in every run."""
    drawn = np.random.default_rng(shard).permutation(documents) / documents
    return (share[0] <= drawn) & (drawn < share[1])


def training_text(tokenizer: Tokenizer, share: Share = (0, 1)) -> Iterator[np.ndarray]:
    """The training documents in the share: of each shard flat uint16 tokens, each behind BOS."""
    prepared = open_prepared()
    for n, name in enumerate(prepared.manifest["train"]):
        tokens = np.fromfile(prepared.tokens / name, dtype=np.uint16)
        _, lengths = document_spans(tokens, tokenizer.get_bos_token_id())
        yield tokens[np.repeat(documents_in(share, n, len(lengths)), lengths)]


def batches(rows: Iterator[tuple], B: int, device: torch.device) -> Iterator[tuple]:
    """Gather (row, note) into (B, T + 1) int64 tensors of fresh memory, with the last row's note.

    Pinned memory that is let go while a copy from it still runs is kept by torch until that copy's
    event has passed, so no batch in flight is ever written over.
    """
    while taken := list(islice(rows, B)):
        batch = torch.empty(
            (len(taken), len(taken[0][0])), dtype=torch.int64, pin_memory=device.type == "cuda"
        )
        np.stack([row for row, _ in taken], out=batch.numpy(), casting="same_kind")
        yield batch, taken[-1][1]


def ahead(items: Iterator) -> Iterator:
    """The same items, made by a thread a little before they are asked for."""
    with ThreadPoolExecutor(1) as pool:
        made = deque(pool.submit(next, items, None) for _ in range(BATCHES_AHEAD))
        while (item := made.popleft().result()) is not None:
            made.append(pool.submit(next, items, None))
            yield item


def inputs_and_targets(batch: torch.Tensor, device: torch.device) -> tuple:
    """Split (B, T + 1) into (B, T) and (B, T) on `device`, which share no memory."""
    batch = batch.to(device, non_blocking=True)
    return batch[:, :-1].clone(), batch[:, 1:].clone()


def make_dataloader(
    tokenizer: Tokenizer,
    B: int,
    T: int,
    split: str,
    device: str | torch.device | None = None,
    share: Share = (0, 1),
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Endless batches of inputs (B, T) int64, targets (B, T) int64 and the epoch, from 1 on.

    `split` is "train", of which the documents in `share` are served, or "val". Batches are fresh
    memory on `device` (default: the GPU if there is one), made ahead in a thread; their order is
    the same in every run. For "val", T must be MAX_SEQ_LEN. Raises ValueError for other arguments.
    """
    if split not in ("train", "val"):
        raise ValueError(f'split = "{split}" is neither "train" nor "val"')
    if split == "val" and T != MAX_SEQ_LEN:
        raise ValueError(f"validation rows are packed for T = MAX_SEQ_LEN = {MAX_SEQ_LEN}, not {T}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    prepared = open_prepared()
    if split == "train":
        rows = training_rows(
            [prepared.tokens / name for name in prepared.manifest["train"]],
            T + 1,
            tokenizer.get_bos_token_id(),
            share,
        )
    else:
        rows = ((row, epoch) for epoch in count(1) for row in prepared.rows())
    made = ahead(batches(rows, B, device))
    return ((*inputs_and_targets(batch, device), epoch) for batch, epoch in made)


# --- Evaluation ------------------------------------------------------------------

LOGITS_AT_ONCE = 1 << 26  # more are turned into losses a slice at a time
# An honest model gives a row the same loss again to the last bit: the same shapes run the same
# kernels (largest difference in 400 rounds on a CPU: 0; float32, bf16, eager, compiled, 1 and 8
# rows). What hides below is worth at most 0.002 nats a token: less than the spread of two seeds.
LOSS_TOLERANCE_NATS = 0.002
BATCHES_PER_PROBE = 40  # and two probes at least: 2.5 % of an evaluation at the GPU scale


class Refused(ValueError):
    """A model, or a state of the files, that is given no number."""


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Cross-entropy per UTF-8 byte of target text, in bits; ValueError if there was no text.

    >>> bits_per_byte(nats=math.log(256), num_bytes=1)  # a uniform guess over bytes
    8.0
    """
    if num_bytes <= 0:
        raise ValueError(f"{num_bytes} bytes were scored")
    return nats / (math.log(2) * num_bytes)


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
            except RuntimeError as failure:  # a compiler wraps it in an error of its own
                full = isinstance(failure, torch.OutOfMemoryError)
                if batch_size == 1 or not (full or "out of memory" in str(failure)):
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
    return bits_per_byte(float(losses[lengths_NT > 0].sum(dtype=float)), int(lengths_NT.sum()))


def read_unaltered(prepared: Prepared, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, T + 1) and `lengths_V`, from the very bytes that are hashed; Refused if altered."""
    contents, folder = {}, prepared.tokens
    for name, digest in prepared.manifest["sha256"].items():
        contents[name] = (folder / name).read_bytes()
        if hashlib.sha256(contents[name]).hexdigest() != digest:
            raise Refused(f"{folder / name} was altered; remove {folder}, run: uv run prepare.py")
    fresh = Tokenizer.load(folder)
    if getattr(tokenizer, "ranks", None) != fresh.ranks:
        raise Refused("the tokenizer is not the prepared one; use Tokenizer.from_directory()")
    rows = np.frombuffer(contents[prepared.manifest["rows"]], np.uint16)
    return rows.reshape(-1, MAX_SEQ_LEN + 1), fresh.token_lengths()


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
        # Rows at their places in a batch, each with other tokens from a cut of its own on: a look
        # ahead shows before it. First those of the first batch, one left whole, in which a look at
        # other rows shows; then rows of any batch.
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
    if isinstance(failure, OSError) and failure.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{failure}: free some space, or set AUTORESEARCH_CACHE to a folder on another disk"
    unusable = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
    if isinstance(failure, OSError) and failure.errno in unusable:
        return f"{failure}: mend this, or set AUTORESEARCH_CACHE to a folder that you may write to"
    return str(failure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare the data set that DATASET names.")
    many = f"training files, of a data set of many (default: as before; at first {DEFAULT_SHARDS})"
    parser.add_argument("--num-shards", type=int, help=many)
    parser.add_argument("--download-workers", type=int, default=8, help="parallel downloads")
    arguments = parser.parse_args()
    for name, value in vars(arguments).items():
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    try:
        prepared = prepare(arguments.num_shards, arguments.download_workers)
    except (OSError, ValueError, RuntimeError) as failure:
        sys.exit(f"error: {explain(failure)}")
    manifest = prepared.manifest
    say(f"documents:       {manifest['documents']:,} to train on")
    say(f"tokens:          {manifest['tokens']:,}")
    say(f"bytes_per_token: {manifest['bytes_per_token']:.3f}")
    say(f"rows_to_score:   {len(prepared.rows()):,} of {MAX_SEQ_LEN} tokens")
    disk = sum(file.stat().st_size for file in prepared.directory.rglob("*") if file.is_file())
    say(f"disk_mb:         {disk / 1e6:.0f} in {prepared.directory}")
    say(f"benchmark:       {benchmark_id(prepared)}")
    say("next:            uv run train.py")


if __name__ == "__main__":
    main()
