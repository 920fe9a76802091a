"""Tokens and windows against naive computations of the same."""

import unicodedata

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvneox_lib.inputs.text import Text
from kvneox_lib.inputs.windows import tokenize, windows

BOOKS = ["It was a bright cold day.\nThe clocks struck.\n" * 40, "Call me Ishmael.\n\nSome years ago.\n" * 30]
ODD = (
    "naïve façade — “quoted” 日本語のテキスト 🙂👩‍👩‍👧 x\u00a0y\u2003z\r\n\ttab  two e\u0301 Å <|endoftext|> end\x1cfs"
)


@pytest.fixture(scope="module")
def nfc_tokenizer():
    """A small byte-level BPE made as Pythia's is: Unicode NFC before it, runs of spaces among its added tokens."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"])
    backend.train_from_iterator(BOOKS + [ODD], trainer)
    backend.add_tokens([AddedToken(content, normalized=True) for content in ("  ", "    ", "日本")])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("text", [ODD, *BOOKS, "", " ", "\n\nx", "🙂" * 50])
def test_bytes_and_words_of_all_tokens_are_those_of_the_text(tokenizer, nfc_tokenizer, text):
    for tok, expected in ((tokenizer, text), (nfc_tokenizer, unicodedata.normalize("NFC", text))):
        tokens = tokenize(text, tok)
        assert tokens.n_bytes.sum() == len(expected.encode()) and tokens.n_words.sum() == len(expected.split())
        assert tokens.ids.tolist() == tok(text, add_special_tokens=False).input_ids
        decoder = {i: c for c, i in byte_alphabet().items()}
        for i, n in zip(tokens.ids.tolist(), tokens.n_bytes.tolist()):  # token by token, with another table
            piece = tok.convert_ids_to_tokens(i)
            added = i in tok.added_tokens_decoder
            assert n == len(piece.encode() if added else bytes(decoder_of(decoder, piece)))


def byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def decoder_of(decoder: dict[int, str], piece: str) -> list[int]:
    alphabet = {character: byte for byte, character in decoder.items()}
    return [alphabet[character] for character in piece]


def test_words_belong_to_the_token_in_which_they_begin(tokenizer):
    tokens = tokenize("One incomprehensibility, two.\n\n Three", tokenizer)
    pieces = ["", *(tokenizer.decode(i) for i in tokens.ids)]
    after_space = [piece[:1].isspace() or before[-1:] in ("", "\n", " ") for before, piece in zip(pieces, pieces[1:])]
    begins = [space and not piece.isspace() for space, piece in zip(after_space, pieces[1:])]
    assert tokens.n_words.tolist() == [int(b) for b in begins] and sum(begins) == 4 < len(tokens.ids)


@pytest.mark.parametrize("lengths", [(16, 8), (5, 2), (100, 28)])
def test_windows_are_those_of_a_naive_tokenization(tokenizer, lengths):
    documents = [*BOOKS, "too short", ODD * 30]
    cut = windows(documents, tokenizer, context_length=lengths[0], continuation_length=lengths[1])
    naive = []
    for d, document in enumerate(documents):
        ids = tokenizer(document, add_special_tokens=False).input_ids
        while len(ids) >= sum(lengths):
            naive.append((d, ids[: sum(lengths)]))
            ids = ids[sum(lengths) :]
    assert cut.input_ids.dtype == torch.int64 and cut.input_ids.tolist() == [ids for _, ids in naive]
    assert cut.document.tolist() == [d for d, _ in naive]
    for d, p, ids in zip(cut.document.tolist(), cut.position.tolist(), cut.input_ids.tolist()):
        assert tokenizer(documents[d], add_special_tokens=False).input_ids[p : p + sum(lengths)] == ids


def test_bytes_and_words_are_of_the_scored_tokens(tokenizer):
    cut = windows(BOOKS, tokenizer, context_length=20, continuation_length=12)
    assert cut.token_bytes.shape == cut.token_words.shape == cut.input_ids.shape
    for ids, n_bytes, n_words in zip(cut.input_ids, cut.n_bytes, cut.n_words):
        scored = tokenizer.decode(ids[21:])
        assert len(ids[21:]) == 11 and len(scored.encode()) == n_bytes
        assert n_words in (len(scored.split()), len(scored.split()) - 1)  # a word may have begun before
    assert cut.n_words.sum() > 0


def test_max_windows_spreads_evenly_and_changes_nothing_when_there_are_fewer(tokenizer):
    lengths = {"context_length": 8, "continuation_length": 2}
    every = windows(BOOKS, tokenizer, **lengths)
    n = len(every.input_ids)
    some = windows(BOOKS, tokenizer, **lengths, max_windows=10)
    rows = [every.input_ids.tolist().index(row) for row in some.input_ids.tolist()]
    chosen = [int((i + 0.5) * n / 10) for i in range(10)]
    assert torch.equal(some.input_ids, every.input_ids[chosen]) and torch.equal(some.position, every.position[chosen])
    assert len(rows) == 10 and set(some.document.tolist()) == {0, 1}
    assert torch.equal(windows(BOOKS, tokenizer, **lengths, max_windows=n + 5).input_ids, every.input_ids)
    assert len(windows(BOOKS, tokenizer, **lengths, max_windows=1).input_ids) == 1


def test_a_text_too_short_says_how_many_tokens_it_has_and_how_many_are_wanted(tokenizer):
    n = len(tokenizer(BOOKS[0]).input_ids)
    with pytest.raises(ValueError, match=rf"wants {n + 1} tokens, the longest of 2 document\(s\) has {n};"):
        windows([BOOKS[0], "short"], tokenizer, context_length=n - 1, continuation_length=2)
    assert len(windows([BOOKS[0]], tokenizer, context_length=n - 2, continuation_length=2).input_ids) == 1
    for wrong in ({"context_length": 0}, {"continuation_length": 1}, {"max_windows": 0}, {"context_length": 1.5}):
        arguments = {"context_length": 8, "continuation_length": 8, **wrong}
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
            windows(BOOKS, tokenizer, **arguments)


class Counting:
    """A tokenizer that counts how often it is called."""

    def __init__(self, tokenizer):
        self.tokenizer, self.calls = tokenizer, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *arguments, **options):
        self.calls += 1
        return self.tokenizer(*arguments, **options)


def test_tokens_are_cached_for_this_text_and_this_tokenizer(tokenizer, nfc_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("KVNEOX_CACHE", str(tmp_path / "cache"))
    counting, other = Counting(tokenizer), Counting(nfc_tokenizer)
    first = tokenize(ODD, counting)
    again = tokenize(ODD, counting)
    assert counting.calls == 1
    assert all(np.array_equal(getattr(first, f), getattr(again, f)) for f in ("ids", "n_bytes", "n_words"))
    tokenize(ODD + " ", counting)
    tokenize(ODD, other)
    assert counting.calls == 2 and other.calls == 1

    files = {file: file.read_bytes() for file in (tmp_path / "cache").rglob("*") if file.is_file()}
    assert [file.suffix for file in files] == [".npz"] * 3
    for damage in ("cut", "empty", "flipped", "junk"):
        for file, b in files.items():
            middle = len(b) // 2
            flipped = b[:middle] + bytes([b[middle] ^ 1]) + b[middle + 1 :]
            file.write_bytes({"cut": b[:middle], "empty": b"", "flipped": flipped, "junk": b"junk"}[damage])
        before = counting.calls
        assert tokenize(ODD, counting).ids.tolist() == first.ids.tolist() and counting.calls == before + 1
        assert tokenize(ODD, counting).ids.tolist() == first.ids.tolist() and counting.calls == before + 1  # rewritten


def test_a_cache_that_cannot_be_written_costs_only_time(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("KVNEOX_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not cached.*KVNEOX_CACHE"):
        assert len(tokenize("some words", tokenizer).ids) > 0


def test_a_tokenizer_that_is_no_byte_level_bpe_is_refused():
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "some": 1, "words": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="need a byte-level BPE"):
        tokenize("some other words", PreTrainedTokenizerFast(tokenizer_object=backend))
    with pytest.raises(ValueError, match="must be a fast tokenizer"):
        tokenize("some words", object())


def test_a_text_is_cut_like_its_documents(tokenizer):
    text = Text(BOOKS, ["", ""], "two", "here")
    lengths = {"context_length": 8, "continuation_length": 2}
    assert torch.equal(windows(text, tokenizer, **lengths).input_ids, windows(BOOKS, tokenizer, **lengths).input_ids)
    one = windows(BOOKS[0], tokenizer, **lengths).input_ids
    assert torch.equal(one, windows([BOOKS[0]], tokenizer, **lengths).input_ids)
