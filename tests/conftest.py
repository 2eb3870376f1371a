"""A cache of its own for every test, small constants, one thread, no network.

Where DESIGN.md's laws are tested:

 1 one command            test_program (a real run), test_prepare, test_training (compilers, memory)
 2 one number             test_evaluate, test_cheats, test_tokenizer (lengths of tokens)
 3 one clock              test_training (the clock, warm-up leaves no trace)
 4 comparable or refused  test_prepare (constants and the id), test_cheats (altered files)
 5 nothing is lost        test_download (two at once), test_prepare (kills), test_program (git)
 6 drop-in                test_prepare (each name of it), test_training (somebody else's train.py)
 7 importing does nothing test_training, test_prepare
 8 quiet logs             test_training, test_program
 9 small                  test_program (lines, bytes), test_ideas (one idea, one place)
10 a plain baseline       test_model (parameters, a second model, numbers of the two scales)
11 same path              test_attention (by rule), test_training (however slow a backend is)
12 runs as what it says   test_attention (by name, checked), test_training (failures are loud)
"""

import random
import socket

import pytest
import torch
from hypothesis import settings

import prepare
import train

torch.set_num_threads(1)  # two on a busy core are far slower than one
settings.register_profile("laws", database=None, deadline=None, derandomize=True)
settings.load_profile("laws")

SENTENCES = [
    "The quick brown fox jumps over 1234 lazy dogs, doesn't it?",
    "def add(a, b):\n    return a + b\n",
    "敏捷的棕色狐狸跳过了懒狗。",
    "Ein Stück Käse für 3,50 €, s'il vous plaît!",
    "😀 emoji 👩‍👩‍👧‍👦 families and flags 🇫🇷🇯🇵",
    "x = [i**2 for i in range(10)]  # squares",
    "\ufffd half characters were here \ufffd",
]


def some_text(seed: int, sentences: int) -> str:
    """Sentences whose words are shuffled, the same for the same seed."""
    rng = random.Random(seed)
    words = [word for sentence in SENTENCES for word in sentence.split(" ")]
    return " ".join(rng.choice(words) for _ in range(9 * sentences))


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Nothing that a test does reaches the home directory or the network."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    prepare.local_files.cache_clear()
    for name in ("HF_ENDPOINT", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    connect = socket.socket.connect

    def local_only(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"no network in tests: {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(scope="session")
def tokenizer():
    """400 tokens learned from SENTENCES and their shuffled words."""
    return prepare.Tokenizer.train([*SENTENCES, some_text(0, 2000)], 400)


@pytest.fixture
def own_text(tmp_path, monkeypatch):
    """A folder of 300 documents, not prepared, and constants: V = 400, T = 32, 25 rows to score."""
    folder = tmp_path / "text"
    folder.mkdir()
    for n in range(300):
        (folder / f"{n}.txt").write_text(some_text(n, 1 + n % 7), encoding="utf-8")
    monkeypatch.setattr(prepare, "DATASET", str(folder))
    constants = {"VOCAB_SIZE": 400, "MAX_SEQ_LEN": 32, "EVAL_TOKENS": 64 * 32, "TIME_BUDGET": 2}
    for name, value in constants.items():
        monkeypatch.setattr(prepare, name, value)
        if hasattr(train, name):
            monkeypatch.setattr(train, name, value)
    return folder


@pytest.fixture
def small(own_text):
    """The same text prepared."""
    return prepare.open_prepared()


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
