"""The vocabulary: lengths in bytes, round trips, special tokens, what it is learned from."""

import json

import numpy as np
import regex
import tiktoken.load
from conftest import SENTENCES, some_text
from hypothesis import example, given
from hypothesis import strategies as st

import prepare


@given(text=st.text(max_size=50))
@example(text="敏捷的棕色狐狸 😀👩‍👩‍👧‍👦🇫🇷 𠜎 12,345\n\tisn't\r\n")
@example(text=b"caf\xe9 \xff\xfe \xf0\x9f\x98 half".decode(errors="replace"))
@example(text=" " * 1_000_000)  # tiktoken's regular expression would run out of stack
def test_any_text_comes_back_and_its_bytes_are_counted(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.token_lengths()[tokens].sum() == len(text.encode())


def test_a_byte_counts_as_one_and_special_tokens_as_none_which_no_text_gives(tokenizer):
    first_special = tokenizer.get_vocab_size() - 4
    assert tokenizer.get_bos_token_id() == first_special
    lengths = tokenizer.token_lengths().tolist()
    # Decoded to text, a byte that is only part of a character would be U+FFFD, of three.
    assert lengths[:256] == [1] * 256 and lengths[first_special:] == [0] * 4
    for text in (*prepare.SPECIAL_TOKENS, "".join(prepare.SPECIAL_TOKENS), "<|endoftext|>"):
        assert max(tokenizer.encode(f"so {text}.")) < first_special


def test_saved_as_text_and_loaded_equal(tokenizer, tmp_path, monkeypatch):
    (tmp_path / prepare.TOKENIZER_FILE).write_bytes(tokenizer.to_text())
    (file,) = tmp_path.iterdir()
    assert file.read_bytes().isascii()
    assert prepare.Tokenizer.from_directory(tmp_path).ranks == tokenizer.ranks
    # tiktoken's own reader agrees about the format.
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    assert tiktoken.load.load_tiktoken_bpe(str(file)) == tokenizer.ranks


def test_numbers_are_cut_into_runs_of_at_most_two_digits():
    numbers = prepare.Tokenizer.train(["2024 123456 ٣٤٥٦ ", "x=20242024;"] * 200, 400)
    assert b"20" in numbers.ranks
    for token in numbers.ranks:
        assert not regex.search(r"\p{N}{3}", token.decode(errors="replace")), token


def test_the_same_text_gives_the_same_vocabulary_the_most_frequent_pair_first(tokenizer):
    texts = [*SENTENCES, some_text(0, 2000)]
    assert prepare.Tokenizer.train(iter(texts), 400).ranks == tokenizer.ranks
    # "ab" stands 30 times, every other pair at most 10 times.
    first = prepare.Tokenizer.train(["ab " * 30 + "cd " * 10 + "ef " * 9], 300)
    assert first.ranks[b"ab"] == 256


def test_a_word_that_stands_only_in_validation_text_earns_no_merge(own_text, tmp_path, monkeypatch):
    # 120 documents, each of one word of its own, two Chinese characters long, 300 times.
    words = [chr(0x4E00 + 2 * n) + chr(0x4E01 + 2 * n) for n in range(120)]
    text = tmp_path / "words.jsonl"
    text.write_text("".join(json.dumps({"text": f"{word} " * 300}) + "\n" for word in words))
    monkeypatch.setattr(prepare, "DATASET", str(text))
    monkeypatch.setattr(prepare, "VOCAB_SIZE", 600)
    monkeypatch.setattr(prepare, "LEAST_ROWS", 1)
    prepared = prepare.open_prepared()
    tokenizer = prepare.Tokenizer.from_directory()
    validation = tokenizer.decode(np.fromfile(prepared.folder / "val.bin", np.uint16))
    held_out = {word for word in words if word in validation}
    merged = {token.decode(errors="ignore").strip() for token in tokenizer.ranks}
    assert len(held_out) >= 5 and not held_out & merged
    assert len(merged.intersection(words)) > 60  # a word that is trained on does earn one


def test_no_more_text_than_BPE_CHARS_is_read_for_the_vocabulary(own_text, monkeypatch):
    monkeypatch.setattr(prepare, "BPE_CHARS", 20_000)
    train, read = prepare.Tokenizer.train, []

    def counting(texts, vocab_size):
        return train((read.append(len(text)) or text for text in texts), vocab_size)

    monkeypatch.setattr(prepare.Tokenizer, "train", counting)
    prepare.open_prepared()
    assert 20_000 <= sum(read) < 20_000 + prepare.BPE_DOCUMENT_CHARS
