"""The harness: data, tokenizer, rows, loader, the metric. The person's, fixed during a night.

    uv run prepare.py        prepare what DATASET names (train.py does it by itself)

B batch (rows) · T time (tokens of a row) · V vocabulary. A row holds T + 1 tokens: inputs are its
first T, targets its last T. BOS, which no text gives, starts every document and every row.
"""

import argparse
import base64
import gzip
import hashlib
import json
import os
import re
import sys
import time
import zlib
from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata, util
from itertools import chain, count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet
import rustbpe
import tiktoken
import torch
from filelock import FileLock, Timeout

# --- Benchmark constants ------------------
# No flag and no variable changes what is measured; each of these changes the benchmark id.

_CUDA = torch.cuda.is_available()
# climbmix, tinystories, pysource, or the path of a folder or file of your own.
DATASET = "climbmix" if _CUDA else "pysource"
VOCAB_SIZE = 8192 if _CUDA else 2048  # tokens: 256 single bytes, merges, 4 special ones
MAX_SEQ_LEN = 2048 if _CUDA else 512  # T, in tokens
EVAL_TOKENS = 40 * 524288 if _CUDA else 524288  # scored, if the validation text has as many
TIME_BUDGET = 300  # seconds of training; start-up, compilation and evaluation not counted

# --- Paths --------------------------------


def dataset_directory() -> Path:
    cache = os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch"
    return Path(cache).expanduser() / name_and_folder()[1]


def short_hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:8]


def sha256_of(path: Path) -> str:
    return hashlib.sha256(np.memmap(path, np.uint8, "r")).hexdigest()


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def write_whole(path: Path, parts: Iterable) -> None:
    """Write a file that gets its name only once it is complete and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def alone_in(directory: Path):
    """The directory's lock, for a `with`; it ends with the process."""
    lock = FileLock(directory / "lock")
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        say(f"another process is preparing {directory}; waiting for it")
        return lock.acquire()


# --- Data sets ----------------------------

VALIDATION_SHARE = 0.1  # of local documents, chosen by the hash of their text
SHARD_BYTES = 256 << 20  # of local files, about
PYSOURCE_PACKAGES = ("sympy", "pandas", "numpy", "matplotlib", "networkx")
# Not the same on all platforms:
PYSOURCE_SKIPS = ("__config__.py", "_distributor_init.py", "_distributor_init_local.py")
SKIPPED: set[Path] = set()  # files that are not text, or lines of them without a "text"

Reader = Callable[[], Iterator[str]]  # gives some documents, anew at each call

# On the Hugging Face hub: repository, files to train on (the first 10), file to validate on; each
# [file], [file, first row] or [file, first row, the row after the last].
CLIMBMIX = [[f"shard_{n:05d}.parquet"] for n in range(6543)]
TINY, STORIES = "karpathy/tinystories-gpt4-clean", "tinystories_gpt4_clean.parquet"
HUB = {
    "climbmix": ("karpathy/climbmix-400b-shuffle", CLIMBMIX[:-1], CLIMBMIX[-1]),
    "tinystories": (TINY, [[STORIES, 20_000]], [STORIES, 10_000, 20_000]),
}


def own_path() -> Path:
    return Path(__file__).resolve().parent / Path(DATASET).expanduser()


def name_and_folder() -> tuple[str, str]:
    """The data set's name in the benchmark id, and its folder in the cache."""
    if DATASET in HUB:
        return DATASET, DATASET
    name = re.sub(r"\W+", "-", own_path().stem).strip("-").lower() or "text"
    versions = [metadata.version(package) for package in PYSOURCE_PACKAGES]
    return name, f"{name}-{short_hash(versions if DATASET == 'pysource' else str(own_path()))}"


def find_documents(num_shards: int | None) -> tuple:
    """Readers to train on, by name, one to validate on, and a signature that text changes."""
    if DATASET in HUB:
        repository, files, held_out = HUB[DATASET]
        raw, files = dataset_directory() / "raw", files[: num_shards or 10]
        download(repository, [name for name, *_ in [held_out, *files]], raw)
        train = {Path(f).stem: partial(parquet_texts, raw / f, *rows) for f, *rows in files}
        validation = partial(parquet_texts, raw / held_out[0], *held_out[1:])
        return train, validation, [[*file, size_of(raw / file[0])] for file in [held_out, *files]]
    own = DATASET != "pysource"  # documents of a row's worth of characters, not definitions
    files, least_chars = (own_files(), MAX_SEQ_LEN) if own else (pysource_files(), 200)
    states = [[str(file), size_of(file), file.stat().st_mtime_ns] for file in files if own]
    parts, num_bytes = {}, 0
    for file in files:
        parts.setdefault(str(num_bytes // SHARD_BYTES), []).append(file)
        num_bytes += size_of(file)
    train = {name: partial(local_texts, part, least_chars, False) for name, part in parts.items()}
    signature = [least_chars, SHARD_BYTES, VALIDATION_SHARE, PYSOURCE_SKIPS, states]
    return train, partial(local_texts, files, least_chars, True), signature


def pysource_files() -> list[Path]:
    """Of packages that the lock file pins: the same bytes on every machine."""
    folders = [Path(util.find_spec(name).origin).parent for name in PYSOURCE_PACKAGES]
    files = chain(*(sorted(folder.rglob("*.py"), key=Path.as_posix) for folder in folders))
    return [file for file in files if file.name not in PYSOURCE_SKIPS]


def own_files() -> list[Path]:
    root, names = own_path(), ", ".join([*HUB, "pysource"])
    paths = sorted(path for path in [root, *root.rglob("*")] if path.is_file())
    files = [p for p in paths if not any(s[0] == "." for s in p.relative_to(root).parts)]
    if not files:
        raise ValueError(f'DATASET = "{DATASET}" in prepare.py: not {names}, no file in {root}')
    return files


def local_texts(files: list[Path], least_chars: int, validation: bool) -> Iterator[str]:
    """Of one split, chosen by the text alone: new files move no document."""
    for text in chain.from_iterable(file_texts(file, least_chars) for file in files):
        number = int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16)
        if text.strip() and (number < VALIDATION_SHARE * 2**64) == validation:
            yield text


def is_parquet(path: Path) -> bool:
    """Whole: the footer, at its very end, can be read."""
    try:
        return bool(pyarrow.parquet.read_metadata(path))
    except (OSError, pyarrow.ArrowInvalid):
        return False


def parquet_texts(path: Path, first: int = 0, last: int | None = None) -> Iterator[str]:
    file = pyarrow.parquet.ParquetFile(path)
    if "text" not in (names := file.schema_arrow.names):
        raise ValueError(f"{path} has no column `text`; its columns: {names}")
    batches = file.iter_batches(batch_size=1024, columns=["text"])
    columns = (batch.column(0).cast(pyarrow.binary()).to_pylist() for batch in batches)
    texts = islice(chain.from_iterable(columns), first, last)
    yield from (text.decode(errors="replace") for text in texts if text)


def file_texts(path: Path, least_chars: int) -> Iterator[str]:
    if path.suffix == ".parquet" and is_parquet(path):
        yield from parquet_texts(path)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        for line in filter(bytes.strip, file_lines(path)):
            try:  # JSON can hold lone surrogates, UTF-8 cannot
                yield json.loads(line)["text"].encode(errors="replace").decode()
            except (ValueError, LookupError, TypeError, AttributeError):
                SKIPPED.add(path)
    elif b"\0" in (raw := b"".join(file_lines(path)))[:8192]:
        SKIPPED.add(path)
    else:
        yield from split_text(raw.decode(errors="replace").replace("\r\n", "\n"), least_chars)


def file_lines(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            yield from file
    except (gzip.BadGzipFile, EOFError, zlib.error):
        SKIPPED.add(path)


def split_text(text: str, least_chars: int) -> list[str]:
    """Cut at blank lines before an unindented line: between definitions, or paragraphs."""
    pieces, paragraphs = [""], re.split(r"(?<=\n\n)(?=\S)", text)
    if len(text) > 10 * BPE_DOCUMENT_CHARS * len(paragraphs):  # a list, a log: at every line
        paragraphs = text.splitlines(True)
    for paragraph in paragraphs:
        if len(pieces[-1]) >= least_chars:
            pieces.append("")
        pieces[-1] += paragraph
    return pieces


# --- Download -----------------------------

RETRY_WAITS_S = (1, 2, 4, 8, 16)  # after each failure that brought no new byte
TIMEOUT_S = (10, 30)  # to connect; between two bytes


def download(repository: str, names: list[str], directory: Path, workers: int = 8) -> None:
    """Fetch what is missing; the first file alone, as one failure there is enough to end."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    missing = [name for name in dict.fromkeys(names) if not is_parquet(directory / name)]
    if missing:
        say(f"downloading {len(missing)} files of {repository}")
    failures = []

    def fetch(name: str) -> None:
        try:
            if len(failures) <= workers:  # more: it is the network, not the file
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                url = f"{endpoint}/datasets/{repository}/resolve/main/{name}"
                download_file(url, directory / name)
                say(f"{name}: {size_of(directory / name) / 1e6:.0f} MB")
        except (OSError, RuntimeError) as failure:
            failures.append(failure)

    with ThreadPoolExecutor(workers) as pool:
        for some in (missing[:1], missing[1:]):
            list(pool.map(fetch, [] if failures else some))
    if failures:
        lost = [name for name in missing if not is_parquet(directory / name)]
        raise ConnectionError(
            f"{len(lost)} of {len(missing)} files are still missing ({', '.join(lost[:20])}): "
            f"{explain(failures[0])}. To go on, run: uv run prepare.py; without a network, set "
            'DATASET = "pysource" in prepare.py'
        ) from failures[0]


def download_file(url: str, path: Path) -> None:
    part, waits_s = path.with_name(f"{path.name}.part"), iter(RETRY_WAITS_S)
    most_bytes = size_of(part)
    while True:
        try:
            digest = receive(url, part)
            if is_parquet(part) and digest in (None, sha256_of(part)):
                return os.replace(part, path)
            part.unlink(missing_ok=True)
            raise OSError(f"{url} gave other bytes than the file's")
        except OSError as failure:  # those of requests are OSErrors without a number
            if size_of(part) > most_bytes:
                most_bytes, waits_s = size_of(part), iter(RETRY_WAITS_S)
            wait_s = next(waits_s, None)
            if wait_s is None or failure.errno is not None:
                raise
        time.sleep(wait_s)


def receive(url: str, part: Path) -> str | None:
    """Append what `part` lacks; gives the SHA-256 that the hub names, if it does."""
    import requests

    headers = {"Accept-Encoding": "identity", "Range": f"bytes={size_of(part)}-"}
    if token := os.environ.get("HF_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"  # dropped by requests at another host
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as answer:
        # Behind the redirect the ETag is of another kind.
        hops, status = [hop.headers for hop in answer.history or [answer]], answer.status_code
        tags = [hop.get("X-Linked-ETag") or hop.get("ETag") for hop in hops]
        if status < 400:
            with open(part, "ab" if status == 206 else "wb") as file:  # 200: all from the start
                file.writelines(answer.iter_content(1 << 16))  # a block that breaks off is lost
        elif status != 416:  # 416: nothing is missing
            message = f"{url}: {status} {answer.headers.get('X-Error-Message', answer.reason)}"
            if status in (401, 403, 404, 410):  # trying again is useless
                raise RuntimeError(f"{message} (if it has terms: accept them there, set HF_TOKEN)")
            wait_s = answer.headers.get("Retry-After", "")
            time.sleep(min(int(wait_s), 300) if wait_s.isdecimal() else 0)
            raise OSError(message)
    return next(iter(re.findall(r"\b[0-9a-f]{64}\b", str(tags))), None)


def flash_attention_3(fetch: bool = False) -> Path:
    """The folder of Flash Attention 3 for this machine; from the hub only if `fetch`."""
    note = dataset_directory().with_name("flash-attn3.path")
    if fetch:
        from kernels import install_kernel

        build = install_kernel("kernels-community/flash-attn3", version=1)
        write_whole(note, [str(build.parents[1]).encode()])
    return Path(note.read_text())


def runs_flash_attention_3() -> bool:
    """Whether the chip does: newer ones have been seen to end the whole process."""
    nvidia = torch.cuda.is_available() and torch.version.hip is None
    return nvidia and (8, 0) <= torch.cuda.get_device_capability() <= (9, 0)


def fetch_flash_attention() -> None:
    """Before any run: all have the same backend."""
    if runs_flash_attention_3():
        try:
            flash_attention_3(fetch=True)
        except Exception as failure:
            say(f"no Flash Attention 3 ({failure!r:.300}); to try again: uv run prepare.py")


# --- Tokenizer ----------------------------

SPECIAL_TOKENS = tuple(f"<|reserved_{n}|>" for n in range(4))  # number 0 is BOS
SPLIT_PATTERN = (  # GPT-4's, but for numbers: at most 2 digits, for a small vocabulary
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
BPE_CHARS = 1_000_000_000  # of training text, at most, make the vocabulary,
BPE_DOCUMENT_CHARS = 10_000  # and of one document
ENCODE_CHARS = 100_000  # tiktoken's regular expression runs out of stack on very long blanks
TOKENIZER_FILE = "tokenizer.tiktoken"  # tiktoken's ranks format: text, never pickle


class Tokenizer:
    """Byte-pair encoding: the merges in order, then 4 special tokens."""

    def __init__(self, ranks: dict[bytes, int]):
        self.ranks, self.bos = ranks, len(ranks)
        special = {token: len(ranks) + n for n, token in enumerate(SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            "autoresearch", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )

    @classmethod
    def from_directory(cls, directory: str | Path | None = None) -> "Tokenizer":
        """By default the prepared one, for which it prepares the data."""
        directory = Path(directory or open_prepared().tokens)
        lines = (line.split() for line in (directory / TOKENIZER_FILE).read_bytes().splitlines())
        return cls({base64.b64decode(token): int(rank) for token, rank in lines})

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Smaller if the text does not hold as much."""
        bpe, merged = rustbpe.Tokenizer(), vocab_size - len(SPECIAL_TOKENS)
        bpe.train_from_iterator(iter(texts), merged, pattern=SPLIT_PATTERN)
        return cls({bytes(token): rank for token, rank in bpe.get_mergeable_ranks()})

    def lines(self) -> Iterator[bytes]:
        return (base64.b64encode(token) + b" %d\n" % rank for token, rank in self.ranks.items())

    def get_vocab_size(self) -> int:
        return len(self.ranks) + len(SPECIAL_TOKENS)

    def encode(self, text: str) -> list[int]:
        """Without BOS. No text gives a special token."""
        return self.encode_array(text)[1:].tolist()

    def encode_array(self, text: str) -> np.ndarray:
        """With BOS."""
        slices = (text[i : i + ENCODE_CHARS] for i in range(0, len(text), ENCODE_CHARS))
        arrays = [self._encoding.encode_to_numpy(s, disallowed_special=()) for s in slices]
        return np.concatenate([[self.bos], *arrays]).astype(np.uint16)

    def decode(self, tokens: Iterable[int]) -> str:
        return self._encoding.decode(list(tokens))

    def token_lengths(self) -> np.ndarray:
        """Of raw bytes, 0 for special tokens. Decoded, half a character would be three bytes."""
        lengths_V = np.zeros(self.get_vocab_size(), np.int64)
        lengths_V[list(self.ranks.values())] = [len(token) for token in self.ranks]
        return lengths_V


# --- Token shards -------------------------
# A folder, named by a hash of the text's signature and of how it is cut into tokens, holds
# vocabulary, tokens and rows; a manifest, named by the constants, says which it uses.

FORMAT = 2  # raise it when you change how text is read, cut, encoded or packed


class Prepared(NamedTuple):
    tokens: Path  # the folder
    manifest: dict

    def rows(self) -> np.ndarray:
        """What is scored: (rows, T + 1) uint16."""
        rows = np.fromfile(self.tokens / self.manifest["rows"], np.uint16)
        return rows.reshape(-1, MAX_SEQ_LEN + 1)

    def damaged(self) -> list[Path]:
        """Files that are gone or of another size than they were."""
        sizes = self.manifest["bytes"].items()
        return [self.tokens / name for name, size in sizes if size_of(self.tokens / name) != size]


def manifest_path() -> Path:
    if not (260 <= VOCAB_SIZE <= 65536 and 2 <= MAX_SEQ_LEN <= EVAL_TOKENS // LEAST_ROWS):
        raise ValueError(
            f"prepare.py: {VOCAB_SIZE = } must be within 260 … 65536 and "
            f"{MAX_SEQ_LEN = } within 2 … {EVAL_TOKENS = } / {LEAST_ROWS}"
        )
    return dataset_directory() / f"f{FORMAT}-v{VOCAB_SIZE}-t{MAX_SEQ_LEN}-e{EVAL_TOKENS}.json"


def read_manifest(path: Path) -> Prepared:
    manifest = json.loads(path.read_text())
    return Prepared(path.parent / manifest["tokens_in"], manifest)


def open_prepared() -> Prepared:
    """For the present constants; prepares what is not there yet, but sees no change of text."""
    path = manifest_path()
    if not path.exists():
        say(f"{DATASET} is not prepared yet; doing it now, in {path.parent}")
        return prepare()
    prepared = read_manifest(path)
    for file in prepared.damaged():
        raise FileNotFoundError(f"{file} is missing or cut short; run: uv run prepare.py")
    return prepared


def prepare(num_shards: int | None = None) -> Prepared:
    """Make what is missing, of so many training files (default: as before); a next call goes on.

    Raises OSError or ValueError that say what to do.
    """
    started_s, path = time.perf_counter(), manifest_path()
    SKIPPED.clear()
    with alone_in(path.parent):
        if num_shards is None and path.exists():
            num_shards = len(read_manifest(path).manifest["train"])
        train, validation, signature = find_documents(num_shards)
        key = [FORMAT, VOCAB_SIZE, SPLIT_PATTERN, BPE_CHARS, BPE_DOCUMENT_CHARS, signature]
        folder = path.parent / f"v{VOCAB_SIZE}-{short_hash(key)}"
        damaged = [read_manifest(m).damaged() for m in path.parent.glob("*.json")]
        # The lock is ours, so whoever made a .tmp was killed.
        for file in chain(*damaged, path.parent.rglob("*.tmp")):
            file.unlink(missing_ok=True)
        rows = f"rows-t{MAX_SEQ_LEN}-n{EVAL_TOKENS // MAX_SEQ_LEN}.bin"
        # Generators: each begins when it is written, below, after the files before it.
        files = {TOKENIZER_FILE: learn_vocabulary(train.values())}
        files |= {f"train_{name}.bin": encode_all(read, folder) for name, read in train.items()}
        files |= {"val.bin": encode_all(validation, folder), rows: validation_rows(folder)}
        for name, parts in files.items():
            if not (folder / name).exists():
                say(f"making {folder / name}")
                write_whole(folder / name, parts)
        manifest = {
            "tokens_in": folder.name,
            "train": [name for name in files if name.startswith("train_")],
            "rows": rows,
            "bytes": {name: size_of(folder / name) for name in files},
            "sha256": {name: sha256_of(folder / name) for name in (TOKENIZER_FILE, rows)},
        }
        write_whole(path, [json.dumps(manifest, indent=1).encode()])
    if SKIPPED:
        say(f'note: {len(SKIPPED):,} files are damaged, no text, or have lines without a "text"')
    fetch_flash_attention()
    say(f"prepared {DATASET} in {time.perf_counter() - started_s:.0f} s, in {path.parent}")
    return read_manifest(path)


def learn_vocabulary(train: Iterable[Reader]) -> Iterator[bytes]:
    """Lines of TOKENIZER_FILE, from the training split alone."""

    def texts(chars: int = 0) -> Iterator[str]:
        for text in (text[:BPE_DOCUMENT_CHARS] for read in train for text in read()):
            chars += len(text)
            yield text
            if chars >= BPE_CHARS:
                return

    tokenizer = Tokenizer.train(texts(), VOCAB_SIZE)
    check_enough(tokenizer.get_vocab_size(), VOCAB_SIZE, "tokens")
    yield from tokenizer.lines()


def check_enough(found: int, needed: int, what: str) -> None:
    if found < needed:
        chars = max(100 * VOCAB_SIZE, 640 * MAX_SEQ_LEN)
        raise ValueError(
            f'DATASET = "{DATASET}" has too little text: {found} of {needed} {what}; bring '
            f"{chars:,} varied characters, or lower VOCAB_SIZE or MAX_SEQ_LEN in prepare.py"
        )


def encode_all(read: Reader, folder: Path) -> Iterator[np.ndarray]:
    tokenizer, documents = Tokenizer.from_directory(folder), read()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while texts := list(islice(documents, 1000)):
            yield from pool.map(tokenizer.encode_array, texts)


def validation_rows(folder: Path) -> Iterator[np.ndarray]:
    tokens, bos = np.fromfile(folder / "val.bin", np.uint16), Tokenizer.from_directory(folder).bos
    pieces = np.stack(document_spans(tokens, bos), 1).tolist()
    packed = islice(pack_rows(pieces, MAX_SEQ_LEN + 1), EVAL_TOKENS // MAX_SEQ_LEN)
    rows = [fill_row(row, tokens, bos) for row in packed]
    check_enough(len(rows), LEAST_ROWS, "rows to validate on")
    yield from rows


def benchmark_id(prepared: Prepared) -> str:
    """All that makes two scores comparable, with a hash over the very rows."""
    name, constants = name_and_folder()[0], [VOCAB_SIZE, MAX_SEQ_LEN, TIME_BUDGET]
    content = short_hash([name, constants, sorted(prepared.manifest["sha256"].items())])
    return f"{name}-v{VOCAB_SIZE}-t{MAX_SEQ_LEN}-{TIME_BUDGET}s-{content}"


# --- Rows and loader ----------------------

BUFFER_DOCUMENTS = 1000  # among which the packing chooses
LEAST_ROWS = 16  # of validation text: fewer would measure nothing
BATCHES_AHEAD = 2


def document_spans(tokens: np.ndarray, bos: int) -> tuple:
    """Where documents start, and their lengths with BOS."""
    starts = np.flatnonzero(tokens == bos)
    return starts, np.diff(starts, append=len(tokens))


def cut_long(starts, lengths, row_tokens: int) -> tuple:
    """Spans of pieces that fill a row, and of rests: BOS, which `fill_row` writes, then text."""
    room = row_tokens - 1  # behind BOS
    num_pieces = -(-(lengths - 1) // room)  # 0 without text
    first = np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    skipped = room * (np.arange(num_pieces.sum()) - first)
    rest = np.repeat(lengths - 1, num_pieces) - skipped
    return np.repeat(starts, num_pieces) + skipped, np.minimum(rest, room) + 1


def pack_rows(
    pieces: Iterable, row_tokens: int, buffer_size=BUFFER_DOCUMENTS, keep=False
) -> Iterator[list[tuple]]:
    """Pack pieces, (place of BOS, length with it), into full rows by the reference rule.

    Of `buffer_size` pieces take the longest that still fits; when none does, cut the shortest to
    fill the row, and drop its rest. Of equals take the first. With `keep`, for training, that rest,
    behind a new BOS, keeps its place in the queue, and a row begins with what has waited longest:
    nothing waits for more than `buffer_size` rows, and only the last, unfilled row is lost.
    """
    arriving, waiting = enumerate(pieces), []  # (length, number), sorted
    queue = {}  # pieces by number, oldest first
    while True:
        row, room = [], row_tokens
        while room:
            for number, piece in islice(arriving, buffer_size - len(waiting)):
                queue[number] = piece
                insort(waiting, (piece[1], number))
            if not waiting:
                return
            if keep and not row:
                oldest = next(iter(queue))
                wanted = (queue[oldest][1], oldest)
            else:
                fitting = bisect_right(waiting, (room, np.inf))
                wanted = (waiting[max(fitting - 1, 0)][0], -1)  # the first of this length
            length, number = waiting.pop(bisect_left(waiting, wanted))
            start = queue[number][0]
            taken = min(length, room)
            row.append((start, taken))
            room -= taken
            if keep and taken < length:
                queue[number] = (start + taken - 1, length - taken + 1)
                insort(waiting, (length - taken + 1, number))
            else:
                del queue[number]
        yield row


def fill_row(pieces: list[tuple], tokens: np.ndarray, bos: int) -> np.ndarray:
    row = np.concatenate([tokens[start : start + length] for start, length in pieces])
    row[np.cumsum([0, *(length for _, length in pieces[:-1])])] = bos
    return row


def training_rows(files: list[Path], row_tokens: int, bos: int) -> Iterator[tuple]:
    """Endless rows, each with its epoch: all pieces in an order that is the same in every run.

    Before them, also called epoch 1, come beginnings, which are what validation rows hold, for runs
    that end within an epoch: the first pieces of all documents of a file, if some have more.
    """
    for turn in count():
        epoch, beginnings, row = max(turn, 1), turn == 0, None
        for n, path in enumerate(filter(size_of, files)):
            tokens = np.asarray(np.memmap(path, np.uint16, "r"))
            starts, lengths = document_spans(tokens, bos)
            if beginnings and lengths.max() <= row_tokens:
                continue
            if beginnings:
                lengths = np.minimum(lengths, row_tokens)
            pieces = np.stack(cut_long(starts, lengths, row_tokens), 1)
            order = np.random.default_rng((epoch, n, beginnings)).permutation(len(pieces))
            for packed in pack_rows(pieces[order].tolist(), row_tokens, keep=True):
                row = fill_row(packed, tokens, bos)
                yield row, epoch
        if row is None and not beginnings:
            raise ValueError(f"the training text does not fill one row of {row_tokens} tokens")


def batches(rows: Iterator[tuple], B: int, pinned: bool) -> Iterator[tuple]:
    """In fresh memory: torch keeps it, pinned and let go, until copies from it have ended."""
    while True:
        taken, epochs = zip(*islice(rows, B), strict=True)
        batch = torch.from_numpy(np.stack(taken).astype(np.int64))
        halves = batch[:, :-1].clone(), batch[:, 1:].clone()
        yield *(half.pin_memory() if pinned else half for half in halves), epochs[-1]


def make_dataloader(
    tokenizer: Tokenizer, B: int, T: int, split: str = "train", device: str | None = None
) -> Iterator[tuple]:
    """Endless inputs (B, T) int64, targets (B, T) int64 and the epoch, from 1 on.

    On `device` (default: the GPU if there is one), made ahead in a thread, the same in every run.
    """
    if split != "train":
        raise ValueError(f'split "{split}" is not "train"; evaluate_bpb has the other')
    device = torch.device(device or ("cuda" if _CUDA else "cpu"))
    # Only pinned memory outlives a copy that still runs: other devices' copies are waited for.
    prepared, cuda = open_prepared(), device.type == "cuda"
    files = [prepared.tokens / name for name in prepared.manifest["train"]]
    made = batches(training_rows(files, T + 1, tokenizer.bos), B, pinned=cuda)
    pool = ThreadPoolExecutor(1)
    ahead = [pool.submit(next, made) for _ in range(BATCHES_AHEAD)]

    def serve(_: int) -> tuple:
        *halves, epoch = ahead.pop(0).result()
        ahead.append(pool.submit(next, made))
        return *(half.to(device, non_blocking=cuda) for half in halves), epoch

    return map(serve, count())


# --- Evaluation ---------------------------

LOGITS_AT_ONCE = 1 << 26  # more are turned into losses a slice at a time
# An honest model repeats a loss to the last bit; what hides below is less than two seeds' spread.
LOSS_TOLERANCE_NATS = 0.002
BATCHES_PER_PROBE = 40  # 2.5 % of an evaluation at the GPU scale; two probes at least


class Refused(ValueError):
    """A model, or a state of the files, that is given no number."""


def is_out_of_memory(failure: BaseException) -> bool:
    """Also where a compiler or a library wrapped it."""
    words = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
    return isinstance(failure, MemoryError) or any(word in str(failure) for word in words)


@torch.no_grad()
def evaluate_bpb(model: torch.nn.Module, tokenizer: Tokenizer, batch_size: int) -> float:
    """Bits per byte of `model` on the validation rows, the same for every `batch_size`.

    `model(idx)` must give finite logits (B, T, V) from tokens (B, T). Raises Refused for one that
    looks at future tokens, other rows or earlier batches or changes itself, and for altered files.
    """
    rows, lengths_V = read_unaltered(open_prepared(), tokenizer)
    modes = [(module, module.training) for module in model.modules()]
    losses = None
    try:
        model.eval()
        before = raw_state(model)
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
    return float(nats / (np.log(2) * num_bytes))


def read_unaltered(prepared: Prepared, tokenizer) -> tuple:
    """Rows (N, T + 1) and `lengths_V`."""
    folder = prepared.tokens
    for name, digest in prepared.manifest["sha256"].items():
        if sha256_of(folder / name) != digest:
            raise Refused(f"{folder / name} was altered; remove {folder}, run: uv run prepare.py")
    fresh = Tokenizer.from_directory(folder)
    if getattr(tokenizer, "ranks", None) != fresh.ranks:
        raise Refused("the tokenizer is not the prepared one; use Tokenizer.from_directory()")
    return prepared.rows(), fresh.token_lengths()


def raw_state(model) -> dict:
    """Copies as bytes, in which NaN equals itself."""
    state = chain(model.named_parameters(), model.named_buffers())
    return {name: tensor.flatten().view(torch.uint8).clone() for name, tensor in state}


def checked_losses(model, rows: np.ndarray, B: int, V: int) -> np.ndarray:
    """Losses (N, T) in nats of a model that looks at nothing but earlier tokens of a row."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    batches, T = -(-len(rows) // B), rows.shape[1] - 1
    numbers = np.arange(batches * B) % len(rows)  # the last batch is filled with the first rows
    tokens = torch.from_numpy(rows[numbers].astype(np.int64)).to(device)
    losses = torch.cat([token_losses(model, V, batch) for batch in tokens.split(B)])
    refuse_where(~losses.isfinite(), "logits that are not finite", numbers)
    secret = np.random.default_rng()  # seeded by the system: no model can foresee it
    for n in range(max(2, batches // BATCHES_PER_PROBE)):
        # Rows of any batch, at their places, with other tokens from a cut on: a look ahead shows
        # before it. Probe 0, of batch 0, leaves one row whole: there a look at other rows shows.
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


def token_losses(model, V: int, tokens, added_BT=0) -> torch.Tensor:
    """Cross-entropy (B, T) in nats; not finite where the logits are not."""
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
    # 0 x -inf is NaN: the loss alone does not show a logit of -inf for another token.
    loss = partial(torch.nn.functional.cross_entropy, reduction="none")
    losses = [loss(x.float(), y) + 0 * x.amin(-1) for x, y in zip(*slices, strict=True)]
    return torch.cat(losses).view_as(targets)


def refuse_where(bad_BT, what: str, numbers) -> None:
    if bad_BT.any():
        row, position = divmod(int(bad_BT.flatten().int().argmax()), bad_BT.shape[1])
        raise Refused(f"the model gave {what}: row {numbers[row]}, position {position}")


# --- Command line -------------------------


say = partial(print, flush=True)


def explain(failure: Exception) -> str:
    if getattr(failure, "errno", None) is None:  # the network's have none either
        return str(failure)
    return f"{failure}: free some space or set AUTORESEARCH_CACHE to a folder that you may use"


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare the data set that DATASET names.")
    parser.add_argument("--num-shards", type=int, help="training files (default: as before, or 10)")
    num_shards = parser.parse_args().num_shards
    if num_shards is not None and num_shards < 1:
        parser.error("--num-shards must be at least 1")
    try:
        prepared = prepare(num_shards)
    except (OSError, ValueError) as failure:
        sys.exit(f"error: {explain(failure)}")
    tokens = sum(map(prepared.manifest["bytes"].get, prepared.manifest["train"])) // 2
    say(f"tokens:    {tokens:,} to train on, {len(prepared.rows()):,} rows to validate on")
    say(f"benchmark: {benchmark_id(prepared)}\nnext:      uv run train.py")


if __name__ == "__main__":
    main()
