"""The harness: data, tokenizer, rows, loader, the metric. A person's file: agents leave it alone.

    uv run prepare.py        prepare what DATASET names (train.py does it by itself)

One way through it, downwards: text, tokens, rows, batches, number.

B batch (rows) · T time (positions of a row) · V vocabulary · N scored rows · P probes. A row
holds T + 1 tokens: inputs are its first T, targets its last T. BOS, which no text is encoded to,
begins every document, and every piece of a document in a row.
"""

import argparse
import base64
import gc
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache, partial
from importlib import metadata, util
from itertools import count, islice
from pathlib import Path
from typing import BinaryIO, NamedTuple, TextIO

import numpy as np
import pyarrow.parquet
import requests
import rustbpe
import tiktoken
import torch
from filelock import FileLock
from tqdm import tqdm

# --- Benchmark constants ------------------------------------------------------
# They define what is measured, and with it the benchmark id. Without CUDA, most are smaller.

_CUDA = torch.cuda.is_available()
# climbmix, tinystories, pysource, or the path of a folder or file of your own.
DATASET = "climbmix" if _CUDA else "pysource"
NUM_SHARDS = 10  # how many of the hub's files are trained on, from the first one on; -1: all
VOCAB_SIZE = 8192 if _CUDA else 2048  # tokens: 256 single bytes, merges, 4 special ones
MAX_SEQ_LEN = 2048 if _CUDA else 512  # T, in tokens
EVAL_TOKENS = 40 * 524288 if _CUDA else 524288  # the most tokens that are scored
TIME_BUDGET = 300  # seconds of training; start-up, compilation and evaluation not counted
BUFFER_SIZE = 1000  # pieces of documents among which the packing of rows chooses
FORMAT = 5  # raise it when you change how text is read, cut, encoded or packed

# --- Files and messages -------------------------------------------------------


class HarnessError(Exception):
    """What a person or an agent can mend: one line that says what, where, and what to do next."""


def say(text: str) -> None:
    """Print a line at once, above a progress bar if there is one."""
    tqdm.write(text)
    sys.stdout.flush()


# For work that takes a while: seen at a terminal, silent where there is none.
progress_bar = partial(tqdm, disable=None, unit_scale=True, leave=False)


def cache_directory() -> Path:
    folder = os.environ.get("AUTORESEARCH_CACHE") or "~/.cache/autoresearch"
    return Path(folder).expanduser().resolve()


def __getattr__(name: str) -> str:
    """CACHE_DIR, DATA_DIR and TOKENIZER_DIR: computed when asked for, not when imported."""
    if name == "CACHE_DIR":
        return str(cache_directory())
    if name == "DATA_DIR":
        return str(cache_directory() / "data")
    if name == "TOKENIZER_DIR":
        return str(prepared_directory(NUM_SHARDS))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which gets its name once it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=path.parent) as folder:
        unfinished = Path(folder, path.name)
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file)
        os.replace(unfinished, path)


def usable_cores() -> int:
    """Cores that this process may use: os.cpu_count knows no affinity and no container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with suppress(OSError, ValueError):  # no such file, as on macOS; no number but "max": no quota
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


# --- Data sets ----------------------------------------------------------------


class Shard(NamedTuple):
    """Texts `first` to `last - 1` of a file; each is a document."""

    file: str
    first: int = 0
    last: int | None = None


class DataSet(NamedTuple):
    """Text that is trained on, text that is scored, and where they lie."""

    train: list[Shard]
    validation: Shard
    repository: str = ""  # of the Hugging Face hub; local text has none
    directory: Path = Path()  # on this machine

    def documents(self, shard: Shard) -> Iterator[str]:
        texts = file_texts(self.directory / shard.file)
        return filter(str.strip, islice(texts, shard.first, shard.last))


CLIMBMIX = [Shard(f"shard_{n:05d}.parquet") for n in range(6543)]
STORIES = "tinystories_gpt4_clean.parquet"  # its first 10,000 rows are a test split
HUB = {
    "climbmix": DataSet(CLIMBMIX[:-1], CLIMBMIX[-1], "karpathy/climbmix-400b-shuffle"),
    "tinystories": DataSet(
        train=[Shard(STORIES, first=20_000)],
        validation=Shard(STORIES, first=10_000, last=20_000),
        repository="karpathy/tinystories-gpt4-clean",
    ),
}
PYSOURCE_PACKAGES = ("sympy", "pandas", "numpy", "matplotlib", "networkx")
# Left out, as they differ between platforms:
PYSOURCE_SKIPS = ("__config__.py", "_distributor_init.py", "_distributor_init_local.py")

# Of local text, the documents with the lowest hashes are held out, a fair sample of every folder
# and topic, up to the smaller of two limits.
HELD_OUT_SHARE = 0.1  # of the bytes of all text
# For each of EVAL_TOKENS: a token is about 4 bytes, and packing drops about two tokens of three,
# the rests of documents that it cuts.
HELD_OUT_BYTES_PER_TOKEN = 12
LEAST_ROWS = 16  # of validation text: fewer would measure nothing


def dataset_name() -> str:
    """For the benchmark id; of a path the last part, so that it does not say where text lies."""
    return re.sub(r"\W+", "-", Path(DATASET).stem).strip("-").lower() or "text"


@cache
def local_files(dataset: str) -> list[tuple[str, int, float]]:
    """Names, sizes and times of the files of local text, as they are at the first call.

    The name of the folder of prepared text of your own is made from them: it stays during a run.
    """
    files = []
    if dataset == "pysource":
        for name in PYSOURCE_PACKAGES:  # which the lock file pins
            package = Path(util.find_spec(name).origin).parent
            files += [path for path in package.rglob("*.py") if path.name not in PYSOURCE_SKIPS]
    else:
        root = (Path(__file__).parent / Path(dataset).expanduser()).resolve()
        for path in [root, *root.rglob("*")]:  # root may be a file itself
            is_hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
            if path.is_file() and not is_hidden and cache_directory() not in path.parents:
                files.append(path)
        if not files:
            names = ", ".join([*HUB, "pysource"])
            raise HarnessError(
                f'DATASET = "{DATASET}" in prepare.py: not {names}, no file in {root}'
            )
    files.sort(key=Path.as_posix)  # by the same characters on every platform
    return [(f.as_posix(), f.stat().st_size, f.stat().st_mtime) for f in files]


def cut_into_documents(file: TextIO) -> Iterator[str]:
    """The documents of a text file: of pysource about a definition each, else about a row each.

    A document ends at the first blank line that an unindented line follows, once it has `least`
    characters, and before any line that would give it more than `most`.
    """
    if DATASET == "pysource":
        least = 200
        most = 2**20
    else:  # a token is 3 or 4 characters
        least = 3 * MAX_SEQ_LEN
        most = 4 * MAX_SEQ_LEN
    document = ""
    while line := file.readline(most):  # a longer line comes in parts
        follows_blank_line = document.endswith("\n\n")
        can_end = len(document) >= least and follows_blank_line and not line[0].isspace()
        if can_end or len(document) + len(line) > most:
            yield document
            document = ""
        document += line
    yield document


def file_texts(path: Path) -> Iterator[str]:
    """The texts of a file.

    Raises HarnessError where it cannot go on, and at the end if lines of JSON have no text.
    """
    lines_without_text = 0
    try:
        if path.suffix == ".parquet":
            file = pyarrow.parquet.ParquetFile(path)
            for batch in file.iter_batches(batch_size=1024, columns=["text"]):
                # As bytes: to_pylist raises at text that is no UTF-8.
                for text in batch.column("text").cast(pyarrow.binary()).to_pylist():
                    yield (text or b"").decode(errors="replace")
            return
        with open(path, "rb") as file:
            if b"\0" in file.read(8192):
                raise ValueError("no text")
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            if path.suffix != ".jsonl":
                yield from cut_into_documents(file)
                return
            for line in filter(str.strip, file):
                try:
                    # JSON may hold lone surrogates, UTF-8 cannot: they become question marks.
                    yield json.loads(line)["text"].encode(errors="replace").decode()
                except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                    lines_without_text += 1
        if lines_without_text > 0:
            raise ValueError(f'{lines_without_text} lines have no "text"')
    except (OSError, pyarrow.ArrowException, ValueError, KeyError) as failure:
        why = " ".join(f"{type(failure).__name__}: {failure}".split())  # in one line
        remedy = f"remove {path}, run: uv run prepare.py"
        raise HarnessError(f"{path} cannot be read: {why}; {remedy}") from failure


def too_little_text(found: int, needed: int, what: str) -> HarnessError:
    """Make the error, which says how many characters would do, at one byte each."""
    chars_to_validate = LEAST_ROWS * MAX_SEQ_LEN * HELD_OUT_BYTES_PER_TOKEN / HELD_OUT_SHARE
    chars_to_learn = 100 * VOCAB_SIZE  # varied text has a merge in fewer than 100 characters
    chars = max(chars_to_learn, round(chars_to_validate))
    return HarnessError(
        f'DATASET = "{DATASET}" has too little text: {found} of {needed} {what}; bring '
        f"{chars:,} varied characters, or lower VOCAB_SIZE or MAX_SEQ_LEN in prepare.py"
    )


def local_documents(unread: set[Path]) -> Iterator[tuple[int, str]]:
    """(hash, text) of each document of local text; adds files that are not all text to `unread`."""
    for name, _, _ in progress_bar(local_files(DATASET), desc="reading", unit=" files"):
        try:
            for text in filter(str.strip, file_texts(Path(name))):
                digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
                yield int.from_bytes(digest, "big"), text
        except HarnessError:
            unread.add(Path(name))


def gather_local_text(train: Path, validation: Path) -> None:
    """Write the documents of the lowest hashes into `validation`, all others into `train`."""
    unread: set[Path] = set()
    found = sorted((text_hash, len(text.encode())) for text_hash, text in local_documents(unread))
    if unread:
        names = ", ".join(sorted(map(str, unread))[:5])
        say(f"note: {len(unread):,} files, or parts of them, cannot be read as text: {names}")
    if not found:
        raise too_little_text(0, 1, "documents")
    num_bytes = sum(size for _, size in found)
    bytes_left = min(HELD_OUT_BYTES_PER_TOKEN * EVAL_TOKENS, HELD_OUT_SHARE * num_bytes)
    for text_hash, size in found:
        bytes_left -= size
        if bytes_left < 0:  # always reached, because HELD_OUT_SHARE is below 1
            lowest_trained_hash = text_hash
            break
    found_again = []
    held_out = []
    with written_whole(train) as file:
        for text_hash, text in local_documents(unread=set()):  # those are named above
            found_again.append((text_hash, len(text.encode())))
            line = json.dumps({"text": text}).encode() + b"\n"
            if text_hash < lowest_trained_hash:
                held_out.append((text_hash, line))
            else:
                file.write(line)
        if sorted(found_again) != found:
            raise HarnessError("the text changed while it was read; run: uv run prepare.py")
    with written_whole(validation) as file:
        file.writelines(line for _, line in sorted(held_out))


# --- Download -----------------------------------------------------------------

RETRY_WAITS_S = (1, 2, 4, 8, 16)  # between attempts; progress starts the series again
TIMEOUT_S = (10, 30)  # for the connection; for silence between two bytes


def is_parquet(path: Path) -> bool:
    """Whether the file is whole: its footer, at the very end, can be read."""
    try:
        pyarrow.parquet.read_metadata(path)
        return True
    except (OSError, pyarrow.ArrowInvalid):
        return False


def receive(url: str, part: Path) -> str | None:
    """Append what `part` lacks; gives the hub's SHA-256 of the file, or None."""
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={size_of(part)}-"}
    if token := os.environ.get("HF_TOKEN"):
        headers["Authorization"] = f"Bearer {token}"  # dropped by requests at another host
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as answer:
        status = answer.status_code
        # 416: `part` is complete; an earlier call ended before it was renamed.
        if status >= 400 and status != 416:
            message = f"{url}: {status} {answer.headers.get('X-Error-Message', answer.reason)}"
            if status in (401, 403, 404, 410):  # trying again is useless
                raise HarnessError(f"{message} (if it has terms: accept them there, set HF_TOKEN)")
            wait_s = answer.headers.get("Retry-After", "0")
            if wait_s.isdecimal():
                time.sleep(min(int(wait_s), 300))
            raise requests.ConnectionError(message)
        if status == 200:  # all of it, from the start
            part.unlink(missing_ok=True)
        if status != 416:
            total = size_of(part) + int(answer.headers.get("Content-Length", 0))
            bar = progress_bar(desc=part.stem, unit="B", initial=size_of(part), total=total)
            with bar, open(part, "ab") as file:
                for block in answer.iter_content(1 << 16):
                    file.write(block)
                    bar.update(len(block))
    # The hub's own answers have the SHA-256; the host that they redirect to has another ETag.
    for hub_answer in answer.history or [answer]:
        tag = hub_answer.headers.get("X-Linked-ETag") or hub_answer.headers.get("ETag") or ""
        if digest := re.search(r"\b[0-9a-f]{64}\b", tag):
            return digest[0]
    return None


def download_file(url: str, path: Path) -> None:
    """Fetch into `path`.part, with which a next call goes on, and rename it once it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    longest_ever = size_of(part)  # to fetch again what was deleted is no progress
    waits_left_s = list(RETRY_WAITS_S)
    while True:
        try:
            digest = receive(url, part)
            if is_parquet(part) and digest in (None, sha256_of(part)):
                os.replace(part, path)
                return
            part.unlink(missing_ok=True)
            problem = requests.RequestException(f"{url} gave other bytes than the file's")
        except requests.RequestException as failure:
            problem = failure
        if size_of(part) > longest_ever:
            longest_ever = size_of(part)
            waits_left_s = list(RETRY_WAITS_S)
        if not waits_left_s:
            raise problem
        time.sleep(waits_left_s.pop(0))


def download(repository: str, names: list[str], directory: Path, workers: int) -> None:
    """Fetch what is missing; the first file alone, so that a network that is gone fails once."""
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")

    def fetch(name: str) -> None:
        download_file(f"{endpoint}/datasets/{repository}/resolve/main/{name}", directory / name)
        say(f"{name}: {size_of(directory / name) / 1e6:.0f} MB")

    unique_names = dict.fromkeys(names)  # two splits can lie in one file
    missing = [name for name in unique_names if not is_parquet(directory / name)]
    if not missing:
        return
    say(f"downloading {len(missing)} files of {repository}")
    try:
        fetch(missing[0])
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fetch, missing[1:]))  # raises the first failure
    except (requests.RequestException, HarnessError) as failure:
        lost = [name for name in missing if not is_parquet(directory / name)]
        raise HarnessError(
            f"{len(lost)} of {len(missing)} files are still missing ({', '.join(lost[:20])}): "
            f"{failure}. To go on, run: uv run prepare.py; without a network, set "
            'DATASET = "pysource" in prepare.py'
        ) from failure


# --- Tokenizer ----------------------------------------------------------------

SPECIAL_TOKENS = [f"<|reserved_{n}|>" for n in range(4)]
BOS_TOKEN = SPECIAL_TOKENS[0]
SPLIT_PATTERN = (  # GPT-4's, but for numbers: at most 2 digits, for a small vocabulary
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
BPE_CHARS = 1_000_000_000  # the most characters of training text that make the vocabulary
BPE_DOCUMENT_CHARS = 10_000  # the most of one document
# The most that is encoded at once: over a longer run of blanks, tiktoken's regular expression runs
# out of stack.
ENCODE_CHARS = 100_000
TOKENIZER_FILE = "tokenizer.tiktoken"  # tiktoken's ranks format: text, never pickle


def prepared_directory(num_shards: int) -> Path:
    """The folder of tokenizer, tokens and rows; its name holds a hash of what they depend on."""
    if DATASET in HUB:
        sources = [HUB[DATASET].repository, num_shards]
    elif DATASET == "pysource":
        sources = [metadata.version(package) for package in PYSOURCE_PACKAGES]
    else:
        sources = local_files(DATASET)
    constants = [FORMAT, VOCAB_SIZE, MAX_SEQ_LEN, EVAL_TOKENS]
    constants += [HELD_OUT_SHARE, HELD_OUT_BYTES_PER_TOKEN, SPLIT_PATTERN, SPECIAL_TOKENS]
    constants += [BPE_CHARS, BPE_DOCUMENT_CHARS, ENCODE_CHARS, BUFFER_SIZE]
    digest = hashlib.sha256(json.dumps([constants, sources]).encode()).hexdigest()
    return cache_directory() / f"{dataset_name()}-v{VOCAB_SIZE}-{digest[:8]}"


class Tokenizer:
    """Byte-pair encoding: bytes, merges in order, 4 special tokens, of which the first is BOS."""

    def __init__(self, ranks: dict[bytes, int]):
        self.ranks = ranks
        special = {token: len(ranks) + n for n, token in enumerate(SPECIAL_TOKENS)}
        self._encoding = tiktoken.Encoding(
            "autoresearch", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn a vocabulary; a smaller one if the text gives too few merges."""
        bpe = rustbpe.Tokenizer()
        num_ranks = vocab_size - len(SPECIAL_TOKENS)
        bpe.train_from_iterator(iter(texts), num_ranks, pattern=SPLIT_PATTERN)
        return cls({bytes(token): rank for token, rank in bpe.get_mergeable_ranks()})

    def to_text(self) -> bytes:
        """A file's content, which `from_directory` reads: a token a line."""
        lines = [f"{base64.b64encode(t).decode()} {rank}\n" for t, rank in self.ranks.items()]
        return "".join(lines).encode()

    @classmethod
    def from_directory(cls, tokenizer_dir: str | Path | None = None) -> "Tokenizer":
        """Load the tokenizer of `tokenizer_dir`, by default of TOKENIZER_DIR."""
        file = Path(tokenizer_dir or prepared_directory(NUM_SHARDS)) / TOKENIZER_FILE
        if not file.exists():
            raise HarnessError(f"no tokenizer in {file.parent}; run: uv run prepare.py")
        lines = [line.split() for line in file.read_bytes().splitlines()]
        return cls({base64.b64decode(token): int(rank) for token, rank in lines})

    def get_vocab_size(self) -> int:
        return len(self.ranks) + len(SPECIAL_TOKENS)

    def get_bos_token_id(self) -> int:
        return len(self.ranks)

    def encode(self, text: str | list[str], prepend: int | str | None = None, num_threads: int = 8):
        """The ids of a text; of a list of texts, a list of such lists.

        Text that spells a special token is encoded as any other text.
        `prepend`, the number or the text of a token, comes before each: `prepend=BOS_TOKEN`.
        """
        if isinstance(text, list):
            with ThreadPoolExecutor(num_threads) as pool:
                return list(pool.map(lambda one: self.encode(one, prepend), text))
        ids = self.encode_document(text)[1:].tolist()  # without BOS
        if isinstance(prepend, str):
            prepend = self._encoding.encode_single_token(prepend)
        return ids if prepend is None else [prepend, *ids]

    def encode_document(self, text: str) -> np.ndarray:
        """BOS and the tokens of a text, uint16."""
        parts = [np.array([self.get_bos_token_id()], np.uint16)]
        for start in range(0, len(text), ENCODE_CHARS):
            part = text[start : start + ENCODE_CHARS]
            tokens = self._encoding.encode_to_numpy(part, disallowed_special=())
            parts.append(tokens.astype(np.uint16))
        return np.concatenate(parts)

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode(list(ids))

    def token_lengths(self) -> np.ndarray:
        """Lengths in raw bytes, (V,) int32; special tokens have 0.

        Decoding one token would turn half a character into U+FFFD, which counts as three bytes.
        """
        lengths_V = np.zeros(self.get_vocab_size(), np.int32)
        for token, rank in self.ranks.items():
            lengths_V[rank] = len(token)
        return lengths_V


def get_token_bytes(device: str | torch.device = "cpu") -> torch.Tensor:
    """Lengths of the prepared tokenizer's tokens in raw bytes, (V,) int32; special ones have 0."""
    return torch.from_numpy(Tokenizer.from_directory().token_lengths()).to(device)


# --- Rows ---------------------------------------------------------------------


class Piece(NamedTuple):
    """Part of a document: BOS and tokens[start : start + length - 1]; `length` counts the BOS."""

    start: int
    length: int


def whole_documents(tokens: np.ndarray) -> list[Piece]:
    places = np.flatnonzero(tokens == tokens[:1])  # of BOS, with which every file begins
    lengths = np.diff(places, append=len(tokens))
    return [Piece(*piece) for piece in zip((places + 1).tolist(), lengths.tolist(), strict=True)]


def beginnings(documents: list[Piece], most: int) -> list[Piece]:
    """The first `most` tokens of each, BOS included."""
    return [Piece(start, min(length, most)) for start, length in documents]


def rests(documents: list[Piece], most: int) -> list[Piece]:
    """What follows the beginnings, in pieces of at most `most` tokens.

    With 4, the document BOS a b c d e has the beginning BOS a b c and the rest BOS d e.
    """
    pieces = []
    step = most - 1  # tokens of text in a full piece, besides its BOS
    for start, length in documents:
        text_length = length - 1
        for served in range(step, text_length, step):  # tokens of text in the pieces before
            piece_text = min(step, text_length - served)
            pieces.append(Piece(start + served, piece_text + 1))  # 1: the piece's own BOS
    return pieces


def pack_rows(
    pieces: Iterable[Piece], row_tokens: int, buffer_size: int = BUFFER_SIZE, keep_rest=False
) -> Iterator[list[Piece]]:
    """Best-fit packing into full rows, by the rule behind the published scores on ClimbMix.

    Of a buffer of pieces take the longest that still fits; when none does, cut the shortest to fill
    the row. Of equals take the first that arrived. What is cut off is lost; with `keep_rest`, for
    training, it goes back into the buffer under the same number of arrival.
    """
    arriving = enumerate(pieces)
    # Sorted by length; of equal lengths, the piece that arrived first stands last.
    buffer: list[tuple[int, int, int]] = []  # (length, -number of arrival, start)
    while True:
        row = []
        room = row_tokens
        while room > 0:
            for number, (start, length) in islice(arriving, buffer_size - len(buffer)):
                insort(buffer, (length, -number, start))
            if not buffer:
                return  # without the last row, which is not full
            shortest = buffer[0][0]
            limit = max(room, shortest)  # where none fits, one of the shortest is taken, and cut
            place = bisect_left(buffer, (limit + 1,)) - 1  # the last that is at most `limit` long
            length, minus_number, start = buffer.pop(place)
            taken = min(length, room)
            row.append(Piece(start, taken))
            room -= taken
            if keep_rest and taken < length:
                text_taken = taken - 1  # without BOS; 0 if that alone fitted
                text_left = (length - 1) - text_taken
                # + 1: what is left begins with a BOS of its own.
                insort(buffer, (text_left + 1, minus_number, start + text_taken))
        yield row


def fill_row(pieces: list[Piece], tokens: np.ndarray) -> np.ndarray:
    parts = []
    for start, length in pieces:
        parts.append(tokens[:1])  # BOS
        parts.append(tokens[start : start + length - 1])
    return np.concatenate(parts)


def validation_rows(file: Path, row_tokens: int, buffer_size: int) -> Iterator[np.ndarray]:
    """Rows of documents that arrive whole and in the order of the file."""
    tokens = np.fromfile(file, np.uint16)
    for packed in pack_rows(whole_documents(tokens), row_tokens, buffer_size):
        yield fill_row(packed, tokens)


def training_rows(
    files: list[Path], row_tokens: int, buffer_size: int, epoch: int
) -> Iterator[np.ndarray]:
    """Rows of one epoch.

    First come the beginnings of all documents, so that a short run sees as many as it can, then
    the rests. All is served, but for the last row of each pass over a file, which is not full.
    The pieces of a file are shuffled, by a seed of epoch and file: the same in every run.
    """
    for part_of in (beginnings, rests):
        for n, file in enumerate(files):
            tokens = np.asarray(np.memmap(file, np.uint16, "r"))  # a memmap is slow to slice
            pieces = part_of(whole_documents(tokens), row_tokens)
            np.random.default_rng((epoch, n)).shuffle(pieces)
            for packed in pack_rows(pieces, row_tokens, buffer_size, keep_rest=True):
                yield fill_row(packed, tokens)


# --- Preparing ----------------------------------------------------------------
# Four steps, each skipped when its file is whole: documents, vocabulary, tokens, rows.

DOCUMENTS_AT_ONCE = 500  # a thread's share of a round of encoding


class Prepared(NamedTuple):
    """What is prepared for the present constants: the folder, and its manifest's content."""

    folder: Path
    train: list[str]  # files of uint16 tokens, each document behind a BOS
    sizes: dict[str, int]  # of all files, in bytes
    sha256: dict[str, str]  # of tokenizer and rows

    def rows(self) -> np.ndarray:
        """What is scored: (N, T + 1) uint16."""
        return np.fromfile(self.folder / "rows.bin", np.uint16).reshape(-1, MAX_SEQ_LEN + 1)


def read_manifest(folder: Path) -> Prepared | None:
    """What is prepared there; None if it is not, or if a file is gone or of another size."""
    if not (folder / "manifest.json").exists():
        return None
    prepared = Prepared(folder, **json.loads((folder / "manifest.json").read_text()))
    is_whole = all(size_of(folder / name) == size for name, size in prepared.sizes.items())
    return prepared if is_whole else None


def find_documents(folder: Path, num_shards: int, workers: int) -> DataSet:
    """Step 1: download files of the hub, or gather local text."""
    if DATASET in HUB:
        data_set = HUB[DATASET]._replace(directory=cache_directory() / "data")
        if num_shards != -1:
            data_set = data_set._replace(train=data_set.train[:num_shards])
        names = [shard.file for shard in [data_set.validation, *data_set.train]]
        download(data_set.repository, names, data_set.directory, workers)
        return data_set
    data_set = DataSet([Shard("0000.jsonl")], Shard("val.jsonl"), directory=folder / "documents")
    train = data_set.directory / data_set.train[0].file
    validation = data_set.directory / data_set.validation.file
    if not (train.exists() and validation.exists()):
        say(f"reading the text of {DATASET}")
        gather_local_text(train, validation)
    return data_set


def learn_vocabulary(data_set: DataSet) -> Tokenizer:
    """Step 2: the merges, from the training split alone."""
    bar = progress_bar(desc="vocabulary", unit=" characters", total=BPE_CHARS)

    def beginnings_of_documents() -> Iterator[str]:
        num_chars = 0
        for shard in data_set.train:
            for document in data_set.documents(shard):
                if num_chars >= BPE_CHARS:
                    return
                document = document[:BPE_DOCUMENT_CHARS]
                num_chars += len(document)
                bar.update(len(document))
                yield document

    with bar:
        tokenizer = Tokenizer.train(beginnings_of_documents(), VOCAB_SIZE)
    if tokenizer.get_vocab_size() < VOCAB_SIZE:
        raise too_little_text(tokenizer.get_vocab_size(), VOCAB_SIZE, "tokens")
    return tokenizer


def encode_all(texts: Iterable[str], encoders: list[Tokenizer]) -> Iterator[np.ndarray]:
    """Step 3: the tokens of documents, in order.

    In a round each encoder has a thread and a share of its own: sharing an encoder is slower.
    """

    def encode(encoder: Tokenizer, share: list[str]) -> list[np.ndarray]:
        return [encoder.encode_document(text) for text in share]

    texts = iter(texts)
    with ThreadPoolExecutor(len(encoders)) as pool:
        while True:
            shares = [list(islice(texts, DOCUMENTS_AT_ONCE)) for _ in encoders]
            if not shares[0]:  # no document is left
                return
            for documents in pool.map(encode, encoders, shares):
                yield from documents


def pack_validation(tokens: Path) -> np.ndarray:
    """Step 4: the scored rows (N, T + 1) uint16, up to EVAL_TOKENS."""
    every_row = validation_rows(tokens, MAX_SEQ_LEN + 1, BUFFER_SIZE)
    rows = list(islice(every_row, EVAL_TOKENS // MAX_SEQ_LEN))
    if len(rows) < LEAST_ROWS:
        raise too_little_text(len(rows), LEAST_ROWS, "rows to validate on")
    return np.stack(rows)


def make(folder: Path, num_shards: int, workers: int) -> Prepared:
    """Go through the four steps; a next call goes on where this one was stopped."""
    prepared = read_manifest(folder)
    if prepared is not None:
        return prepared
    manifest = folder / "manifest.json"
    if manifest.exists():  # and a file that it lists is damaged: none of them can be trusted
        shutil.rmtree(folder)
    for unfinished in list(folder.rglob("unfinished-*")):  # by a process that was killed
        shutil.rmtree(unfinished)
    data_set = find_documents(folder, num_shards, workers)
    vocabulary_file = folder / TOKENIZER_FILE
    if not vocabulary_file.exists():
        say("learning the vocabulary")
        tokenizer = learn_vocabulary(data_set)
        with written_whole(vocabulary_file) as file:
            file.write(tokenizer.to_text())
    encoders = [Tokenizer.from_directory(folder) for _ in range(usable_cores())]
    shards = [(f"train_{Path(shard.file).stem}.bin", shard) for shard in data_set.train]
    for name, shard in [("val.bin", data_set.validation), *shards]:
        if not (folder / name).exists():
            say(f"encoding {shard.file}")
            documents = progress_bar(data_set.documents(shard), desc=name, unit=" documents")
            with written_whole(folder / name) as file:
                file.writelines(encode_all(documents, encoders))
    rows_file = folder / "rows.bin"
    if not rows_file.exists():
        with written_whole(rows_file) as file:
            file.write(pack_validation(folder / "val.bin"))
    train = [name for name, _ in shards]
    names = [vocabulary_file.name, *train, "val.bin", rows_file.name]
    content = {
        "train": train,
        "sizes": {name: size_of(folder / name) for name in names},
        "sha256": {file.name: sha256_of(file) for file in (vocabulary_file, rows_file)},
    }
    with written_whole(manifest) as file:
        file.write(json.dumps(content, indent=1).encode())
    return Prepared(folder, **content)


def open_prepared(num_shards: int | None = None, workers: int = 8) -> Prepared:
    """What is prepared for the present constants, made first if it is missing or torn."""
    num_shards = NUM_SHARDS if num_shards is None else num_shards
    if num_shards != -1 and num_shards < 1:
        raise HarnessError(f"NUM_SHARDS = {num_shards} must be at least 1, or -1 for all files")
    if not (260 <= VOCAB_SIZE <= 65536 and 2 <= MAX_SEQ_LEN <= EVAL_TOKENS // LEAST_ROWS):
        raise HarnessError(
            f"prepare.py: {VOCAB_SIZE = } must be within 260 … 65536 and "
            f"{MAX_SEQ_LEN = } within 2 … {EVAL_TOKENS = } / {LEAST_ROWS}"
        )
    try:
        folder = prepared_directory(num_shards)
        prepared = read_manifest(folder)
        if prepared is None:
            why = "it is not prepared yet, or no longer whole; doing it now"
            say(f"preparing {DATASET} in {folder}: {why}")
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(cache_directory() / "lock"):  # the system frees it when a process dies
                prepared = make(folder, num_shards, workers)
        return prepared
    except OSError as failure:
        remedy = "free some space or set AUTORESEARCH_CACHE to a folder that you may use"
        raise HarnessError(f"{failure}; {remedy}") from failure


def benchmark_id(prepared: Prepared) -> str:
    """All that makes two scores comparable: what is trained on, for how long, the scored rows."""
    trained_on = {name: prepared.sizes[name] for name in prepared.train}
    content = json.dumps([FORMAT, trained_on, prepared.sha256], sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()
    return f"{dataset_name()}-v{VOCAB_SIZE}-t{MAX_SEQ_LEN}-{TIME_BUDGET}s-{digest[:8]}"


# --- Loader -------------------------------------------------------------------

BATCHES_AHEAD = 2


def endless_rows(
    prepared: Prepared, split: str, row_tokens: int, buffer_size: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Rows, each with its epoch, from 1 on."""
    files = [prepared.folder / name for name in prepared.train]
    for epoch in count(1):
        if split == "train":
            rows = training_rows(files, row_tokens, buffer_size, epoch)
        else:
            rows = validation_rows(prepared.folder / "val.bin", row_tokens, buffer_size)
        num_rows = 0
        for row in rows:
            num_rows += 1
            yield row, epoch
        if num_rows == 0:
            raise too_little_text(0, 1, f"rows of {row_tokens} tokens")


def make_dataloader(
    tokenizer: Tokenizer, B: int, T: int, split: str, buffer_size: int = BUFFER_SIZE, device=None
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Endless inputs (B, T) int64, targets (B, T) int64 and the epoch, of split "train" or "val".

    On `device`, by default the GPU if there is one; made ahead in a thread, the same in every run.
    The files hold tokens already: `tokenizer` is there for those who give one.
    """
    if split not in ("train", "val"):
        raise ValueError(f'split "{split}" is neither "train" nor "val"')
    rows = endless_rows(open_prepared(), split, T + 1, buffer_size)
    device = torch.device(device or ("cuda" if _CUDA else "cpu"))
    is_cuda = device.type == "cuda"

    def make_batch() -> tuple[torch.Tensor, int]:
        batch = list(islice(rows, B))
        tokens = torch.from_numpy(np.stack([row for row, _ in batch]).astype(np.int64))
        _, epoch = batch[-1]
        return tokens.pin_memory() if is_cuda else tokens, epoch

    def serve() -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
        with ThreadPoolExecutor(1) as pool:
            ahead = [pool.submit(make_batch) for _ in range(BATCHES_AHEAD)]
            while True:
                tokens, epoch = ahead.pop(0).result()
                ahead.append(pool.submit(make_batch))
                # Do not wait for a copy from pinned memory: torch keeps that memory until the copy
                # has ended, and nothing here writes to a batch again.
                tokens = tokens.to(device, non_blocking=is_cuda)
                yield tokens[:, :-1].clone(), tokens[:, 1:].clone(), epoch

    return serve()


# --- Evaluation ---------------------------------------------------------------
# A probe is a copy of a row up to a secret position, the cut; behind it stands noise. Rows and
# probes are scored together, in a secret order. What a model may not do, and how it shows:
#
#   look at later tokens           its loss just before a cut is not that of the row
#   look, but remember rows and    a probe behind its cut was never seen: looking ahead, it predicts
#   repeat their losses            noise there, which it could not know
#   look at other rows or batches  its loss before a cut is not that of the row
#   learn from scored rows         its weights or buffers change, or its losses do
#   give losses of its own         it is asked for logits, and not given the targets
#   score other rows or tokens     the SHA-256 of rows or tokenizer is not the manifest's
#
# To look ahead at 1 % of positions gains about 1 % of the bits. Measured:
#
#   of models that look ahead at       are refused
#   1.5 % of positions, no CUDA        half, by losses before a cut
#   0.15 % of positions, with CUDA     half, by losses before a cut
#   0.25 % of positions, no CUDA       nine of ten, by predictions behind a cut; at 0.5 % all
#
# What no check in one process can see: training on validation rows; another harness in this one's
# place; work outside the clock; a lucky seed; a model that remembers rows, and looks ahead only if
# text goes on as expected; one that feigns to be out of memory, and so sees all rows twice.

BATCHES_PER_PROBE_BATCH = 20  # 5 % more evaluation
# The tolerance is for CUDA kernels that add in no fixed order (atomics). Without them an honest
# model repeats a loss to the last bit, at the same place in a batch of the same shape. A leak below
# the tolerance gains about 0.001 bits a byte at most, less than two seeds differ by.
LOSS_TOLERANCE_NATS = 0.002
FORESIGHT_EXPONENT = 20.0  # an honest model is refused at most once in e^20 evaluations
OTHER_LOSS = (
    "a loss that depends on later tokens, on other rows of the batch, on earlier batches or on "
    "chance; if unintended: quantise a row at a time, share no capacity between rows, add in a "
    "fixed order"
)


def halve_until_it_fits(attempt: Callable, num_rows: int, name: str):
    """attempt(num_rows), with fewer rows where memory is short; any other failure is raised."""
    # The words of CUDA, cuBLAS and a CPU, also where a compiler has wrapped them:
    full = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")
    while True:
        try:
            return attempt(num_rows)
        except Exception as failure:
            is_full = isinstance(failure, MemoryError) or any(word in str(failure) for word in full)
            # An AcceleratorError leaves the device unusable; a HarnessError is no lack of memory.
            is_final = isinstance(failure, torch.AcceleratorError | HarnessError)
            if is_final or num_rows == 1 or not is_full:
                raise
        # In training num_rows divides the rows of a step, and so does its half; of an odd number
        # only 1 is sure to.
        num_rows = num_rows // 2 if num_rows % 2 == 0 else 1
        say(f"out of memory: going on with {name} = {num_rows}")
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def token_losses(model, V: int, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (B, T) in nats of logits that the model gives from the inputs alone."""
    logits = model(inputs.clone())  # a view's storage holds all other rows
    shape = (*inputs.shape, V)
    if type(logits) is not torch.Tensor or not logits.is_floating_point() or logits.shape != shape:
        seen = f"{type(logits)}, {getattr(logits, 'dtype', '')} {getattr(logits, 'shape', '')}"
        raise HarnessError(f"model(idx) gave {seen}, not floating-point logits (B, T, V) = {shape}")
    logits = torch.Tensor.detach(logits)  # not logits.detach(), which a model can replace
    losses = []
    for x, y in zip(logits, targets, strict=True):  # a row at a time, as float32 takes memory
        losses.append(torch.nn.functional.cross_entropy(x.float(), y, reduction="none"))
    return torch.stack(losses)


def state_of(model: torch.nn.Module) -> dict[str, str]:
    """Digests of weights and buffers."""
    digests = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        content = tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy()
        digests[name] = hashlib.sha256(content).hexdigest()
    return digests


@torch.no_grad()
def score(model, V: int, inputs: np.ndarray, targets: np.ndarray, batch_size: int) -> np.ndarray:
    """Losses in nats of inputs and targets, all (rows, T), in evaluation mode."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    inputs = torch.from_numpy(inputs.astype(np.int64)).to(device).split(batch_size)
    targets = torch.from_numpy(targets.astype(np.int64)).to(device).split(batch_size)
    modes = [(module, module.training) for module in model.modules()]
    before = state_of(model)
    try:
        model.eval()
        losses = [token_losses(model, V, x, y) for x, y in zip(inputs, targets, strict=True)]
        return torch.cat(losses).cpu().numpy()
    finally:  # also after a failure: another attempt would see the change in its own `before`
        for module, mode in modes:
            module.training = mode
        after = state_of(model)
        changed = [name for name in before | after if before.get(name) != after.get(name)]
        if changed:
            raise HarnessError(f"the model changed its {', '.join(changed)} while it was evaluated")


def refuse_at(bad: np.ndarray, numbers: np.ndarray, what: str) -> None:
    """Raise for the first position of `bad`, (rows, T), with that row's number."""
    if bad.any():
        row, position = np.argwhere(bad)[0]
        raise HarnessError(f"row {numbers[row]}, position {position}: the model gave {what}")


def refuse_foresight(losses: np.ndarray, V: int) -> None:
    """Refuse a model that predicts random tokens better than chance; their losses are in nats."""
    given = np.exp(-losses.astype(np.float64)).sum()  # the probabilities that it gave them
    # Its probabilities sum to 1, so a token drawn at random gets 1/V in the mean.
    by_chance = len(losses) / V
    if given <= by_chance:
        return
    # Chernoff's bound: a sum of numbers within 0 … 1 whose mean is m reaches s, above m, with a
    # chance of at most exp(-(s ln(s/m) - s + m)).
    exponent = given * np.log(given / by_chance) - given + by_chance
    if exponent > FORESIGHT_EXPONENT:
        raise HarnessError("the model foresaw tokens drawn at random: it looks at later tokens")


class Probes(NamedTuple):
    """Copies of P rows, each up to its cut."""

    inputs: np.ndarray  # (P, T)
    targets: np.ndarray  # (P, T)
    is_before_cut: np.ndarray  # (P, T) bool: target and all inputs so far are the row's


def make_probes(rows: np.ndarray, V: int, secret: np.random.Generator) -> Probes:
    """Probes of `rows` (P, T + 1).

    Position t reads token t and predicts token t + 1. With a cut of 3, and n for noise:

        inputs 0 1 2 n3 n4 · targets 1 2 3 n4 n5

    Position 2 has the row's token 3 as its target, though the next input is noise: a model that
    looks one token ahead gets another loss there. Behind the cut it predicts the noise it sees.
    """
    P = len(rows)
    T = rows.shape[1] - 1
    noise = secret.integers(V, size=rows.shape, dtype=np.uint16)
    cuts_P1 = secret.integers(1, T, size=(P, 1))
    # One in eight is a whole copy, cut at T: no cut above leaves the last position to be compared.
    cuts_P1[secret.choice(P, math.ceil(P / 8), replace=False)] = T
    is_before_cut = np.arange(T) < cuts_P1
    inputs = np.where(is_before_cut, rows[:, :-1], noise[:, :-1])
    targets = np.where(is_before_cut, rows[:, 1:], noise[:, 1:])
    return Probes(inputs, targets, is_before_cut)


def checked_losses(model, rows: np.ndarray, B: int, V: int) -> np.ndarray:
    """Losses (N, T) in nats of rows (N, T + 1), if no check refuses the model."""
    secret = np.random.default_rng()  # seeded by the system: no model can foresee it
    N = len(rows)
    num_batches = math.ceil(N / B)
    # Fill the last batch with the first rows again: row i is row i % N of those that were given.
    rows = np.resize(rows, (num_batches * B, rows.shape[1]))
    # A loss repeats to the last bit only at the same place in a batch: a probe is a copy of the row
    # at its own place in a random batch.
    P = B * max(2, num_batches // BATCHES_PER_PROBE_BATCH)
    place_P = np.arange(P) % B
    batch_P = secret.integers(num_batches, size=P)
    originals_P = B * batch_P + place_P
    probes = make_probes(rows[originals_P], V, secret)
    inputs = np.concatenate([rows[:, :-1], probes.inputs])
    targets = np.concatenate([rows[:, 1:], probes.targets])
    numbers = np.arange(len(inputs)).reshape(-1, B)  # of rows and probes; a line is a batch
    # Each column is shuffled on its own: rows and probes change batches, and keep their place.
    order = secret.permuted(numbers, axis=0).ravel()
    losses = np.empty(targets.shape, np.float32)
    losses[order] = score(model, V, inputs[order], targets[order], B)  # back in the first order

    losses_NT = losses[:N]
    refuse_at(~np.isfinite(losses_NT), np.arange(N), "a loss that is not finite")
    losses_PT = losses[len(rows) :]
    gaps_PT = np.abs(losses_PT - losses[originals_P])
    is_other_PT = probes.is_before_cut & ~(gaps_PT <= LOSS_TOLERANCE_NATS)  # a > lets NaN pass
    refuse_at(is_other_PT, originals_P % N, OTHER_LOSS)
    # Behind a cut nothing was compared, so that NaN would still be there.
    refuse_at(np.isnan(losses_PT), originals_P % N, "a loss that is not a number")
    refuse_foresight(losses_PT[~probes.is_before_cut], V)
    return losses_NT


def check_model(model: torch.nn.Module, tokenizer: Tokenizer, batch_size: int) -> None:
    """Run the checks on a batch of training rows: a model is refused before the clock starts."""
    rows = endless_rows(open_prepared(), "train", MAX_SEQ_LEN + 1, BUFFER_SIZE)
    batch = np.stack([row for row, _ in islice(rows, batch_size)])
    checked_losses(model, batch, batch_size, tokenizer.get_vocab_size())


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Cross-entropy per UTF-8 byte of target text, in bits. Lower is better.

    Raises ValueError if `num_bytes` is not positive: nothing was scored.

    >>> bits_per_byte(nats=np.log(256), num_bytes=1)  # a uniform guess over bytes
    8.0
    """
    if num_bytes <= 0:
        raise ValueError(f"{num_bytes = }: nothing was scored")
    return float(nats / (np.log(2) * num_bytes))


def say_bits(what: str, kinds_NT: np.ndarray, nats_NT: np.ndarray, lengths_NT: np.ndarray) -> None:
    """Say the bits a byte of each kind of targets; `kinds_NT` has a label for each target."""
    nats = np.bincount(kinds_NT.ravel(), nats_NT.ravel())
    num_bytes = np.bincount(kinds_NT.ravel(), lengths_NT.ravel())
    kinds = np.flatnonzero(num_bytes)
    shown = [f"{kind} {bits_per_byte(nats[kind], num_bytes[kind]):.3f}" for kind in kinds]
    say(f"bits a byte by {what}: {' · '.join(shown)}")


def evaluate_bpb(model: torch.nn.Module, tokenizer: Tokenizer, batch_size: int) -> float:
    """Bits per byte of `model` on the validation rows, the same for every `batch_size`.

    `model(idx)` must give logits (B, T, V) from tokens (B, T) int64. Prints where the bits go.
    Raises HarnessError for a model that fails a check (the table above), and for altered files.
    """
    prepared = open_prepared()
    for name, digest in prepared.sha256.items():
        if sha256_of(prepared.folder / name) != digest:
            remedy = f"remove {prepared.folder}, run: uv run prepare.py"
            raise HarnessError(f"{prepared.folder / name} was altered; {remedy}")
    fresh = Tokenizer.from_directory(prepared.folder)
    if getattr(tokenizer, "ranks", None) != fresh.ranks:
        raise HarnessError("the tokenizer is not the prepared one; use Tokenizer.from_directory()")
    rows = prepared.rows()
    V = fresh.get_vocab_size()
    losses_NT = halve_until_it_fits(
        lambda size: checked_losses(model, rows, size, V), batch_size, "rows of evaluation"
    )
    lengths_NT = fresh.token_lengths()[rows[:, 1:]]
    nats_NT = np.where(lengths_NT > 0, losses_NT, 0).astype(np.float64)  # special ones do not count
    eighth = math.ceil(MAX_SEQ_LEN / 8)
    spans_T = np.arange(MAX_SEQ_LEN) // eighth * eighth  # a span is named by its first position
    say_bits("position", np.broadcast_to(spans_T, nats_NT.shape), nats_NT, lengths_NT)
    say_bits("token length (8 or more)", lengths_NT.clip(max=8), nats_NT, lengths_NT)
    return bits_per_byte(nats_NT.sum(), lengths_NT.sum())


# --- Command line -------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare the data set that DATASET names.")
    parser.add_argument("--num-shards", type=int, help="fetch and encode so many files; -1: all")
    parser.add_argument("--download-workers", type=int, default=8, help="files at a time")
    arguments = parser.parse_args()
    if arguments.download_workers < 1:
        parser.error("--download-workers must be at least 1")
    try:
        prepared = open_prepared(arguments.num_shards, arguments.download_workers)
    except HarnessError as failure:
        sys.exit(f"error: {failure}")
    num_tokens = sum(prepared.sizes[name] for name in prepared.train) // 2  # of two bytes each
    say(f"tokens:    {num_tokens:,} to train on, {len(prepared.rows()):,} rows to validate on")
    say(f"benchmark: {benchmark_id(prepared)}")
    if arguments.num_shards not in (None, NUM_SHARDS) and DATASET in HUB:
        say(f"to train on these files, set NUM_SHARDS = {arguments.num_shards} in prepare.py")
    say("next:      uv run train.py")


if __name__ == "__main__":
    main()
