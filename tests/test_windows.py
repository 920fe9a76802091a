"""Tokens and windows against naive computations of the same."""

import os
import random
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvneox_lib.inputs import windows as windows_module
from kvneox_lib.inputs.text import Text, load_text
from kvneox_lib.inputs.windows import first_tokens, part_at, parts, tokenize, windows

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


# ---- large documents ------------------------------------------------------------------------------------------------


@pytest.fixture
def small_parts(monkeypatch):
    """What is large from 4,000 bytes on, so that a test is quick."""
    monkeypatch.setattr(windows_module, "LARGE", 4_000)
    monkeypatch.setattr(windows_module, "PART", 1_000)


@pytest.mark.parametrize(
    "document", [BOOKS[0] * 9, ODD * 90, "日本語のテキスト" * 900, "naïve 🙂\n" * 3000, "x" * 9000, " " * 9000]
)
def test_parts_are_the_document_and_have_its_tokens(tokenizer, nfc_tokenizer, small_parts, document):
    found = parts(document)
    assert "".join(found) == document and all(found) and len(found) == -(-len(document.encode()) // 1_000)
    if len(document.split()) > 1:
        assert not any(part[-1].isspace() for part in found[:-1]) and all(part[0].isspace() for part in found[1:])
        for tok in (tokenizer, nfc_tokenizer):
            whole = tok(document, add_special_tokens=False).input_ids
            assert sum((tokenize(part, tok).ids.tolist() for part in found), []) == whole
            for n in (1, 700, None):
                assert first_tokens(document, tok, n).tolist() == whole[:n]


def test_a_document_of_usual_size_is_one_part():
    document = "x" * windows_module.LARGE
    assert parts(document) == [document] and len(parts(document + "é")) == 9
    assert part_at("one", 0.3) == ("one", 0.3)
    assert parts("") == [""]


def test_a_place_of_the_document_is_in_its_part(small_parts):
    document = "".join(f"{i} " for i in range(5_000))
    for place in (0, 0.2, 0.5, 0.77, 1):
        part, inside = part_at(document, place)
        assert 0 <= inside <= 1 and abs(int(part[int(inside * (len(part) - 10)) :].split()[1]) / 5_000 - place) < 0.05


def test_windows_of_a_large_document_are_those_of_its_parts(tokenizer, small_parts):
    rng = random.Random(0)
    large = ["".join(rng.choice(BOOKS)[:900] + f"{rng.random()}\n" for _ in range(n)) for n in (9, 25)]
    documents, lengths = [large[0], "too short", BOOKS[1], large[1]], {"context_length": 30, "continuation_length": 10}
    every = windows(documents, tokenizer, **lengths)
    naive = [
        (d, k, p, ids[p : p + 40])
        for d, document in enumerate(documents)
        for k, part in enumerate(parts(document))
        for ids in [tokenizer(part, add_special_tokens=False).input_ids]
        for p in range(0, len(ids) - 39, 40)
    ]
    columns = every.document, every.part, every.position, every.input_ids
    assert list(zip(*(column.tolist() for column in columns))) == naive
    for d, k, p, ids in naive:
        assert tokenizer.decode(ids) in documents[d]
        before = tokenizer.decode(tokenizer(parts(documents[d])[k], add_special_tokens=False).input_ids[:p])
        start = len("".join(parts(documents[d])[:k]) + before)
        assert documents[d].startswith(tokenizer.decode(ids), start)
    for most in (1, 2, 7, 50, len(naive) - 1, len(naive), len(naive) + 1):
        some = windows(documents, tokenizer, **lengths, max_windows=most)
        places = list(zip(some.document.tolist(), some.part.tolist(), some.position.tolist()))
        at = [[row[:3] for row in naive].index(place) for place in places]
        assert at == sorted(set(at)) and len(at) == min(most, len(naive))
        evenly = (np.arange(len(at)) + 0.5) * len(naive) / len(at)
        assert np.abs(np.array(at) - evenly).max() < 0.1 * len(naive)  # what is not read is counted by a guess
        assert [naive[i][3] for i in at] == some.input_ids.tolist()


def test_only_the_parts_of_windows_are_tokenized(tokenizer, tmp_path, monkeypatch, small_parts):
    monkeypatch.setenv("KVNEOX_CACHE", str(tmp_path))
    counting, document = Counting(tokenizer), "".join(f"It was day {i}.\n" for i in range(4_000))
    assert len(parts(document)) > 60
    windows(document, counting, context_length=20, continuation_length=4, max_windows=2)
    assert counting.calls <= 6
    windows(document, counting, context_length=20, continuation_length=4)
    assert counting.calls == len(parts(document))
    with pytest.raises(ValueError, match=r"wants 5004 tokens, the longest of \d\d document\(s\) and parts"):
        windows(document, counting, context_length=5_000, continuation_length=4)


MEASURE = """
import re, sys, time
from pathlib import Path
from transformers import AutoTokenizer
import kvneox_lib

def most_memory():  # ru_maxrss begins with that of the process that started this one
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

tokenizer = AutoTokenizer.from_pretrained(Path(kvneox_lib.__file__).parent / "demo")
used, start = most_memory(), time.perf_counter()
text = kvneox_lib.load_text(sys.argv[1])
cut = kvneox_lib.windows(text, tokenizer, context_length=1024, continuation_length=256, max_windows=2)
print(most_memory() - used, time.perf_counter() - start, *cut.part.tolist())
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory is read from Linux' /proc")
def test_two_windows_of_44_megabytes_cost_little(tmp_path):
    words, rng = load_text("python-docs").documents[0].split(" "), random.Random(0)
    starts = [rng.randrange(len(words) - 400) for _ in range(21_000)]
    file = tmp_path / "large.txt"
    file.write_text("\n".join(" ".join(words[start : start + 400]) for start in starts), encoding="utf-8")
    assert file.stat().st_size > 44_000_000
    environment = {**os.environ, "KVNEOX_CACHE": str(tmp_path / "cache")}
    made = subprocess.run(
        [sys.executable, "-c", MEASURE, str(file)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert made.returncode == 0, made.stderr
    grown, seconds, first, second = map(float, made.stdout.split())
    print(f"{grown / 1e9:.2f} GB, {seconds:.1f} s")
    assert grown < 1e9
    n = file.stat().st_size / windows_module.PART
    assert 0.2 < first / n < 0.3 and 0.7 < second / n < 0.8
