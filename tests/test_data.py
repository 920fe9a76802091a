"""Text from a hub on 127.0.0.1, from disk and from the box, and what it is cut into. Nothing else is ever asked."""

import json
import os
import re
import socket
import threading
import time
import unicodedata
from pathlib import Path

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch
from hub_server import HubServer
from huggingface_hub import constants
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvneox_lib import data
from kvneox_lib.data import Text, load_text, recall_samples, tokenize, windows

DATA = Path(__file__).parents[2] / "shared" / "data"
BOOKS = ["It was a bright cold day.\nThe clocks struck.\n" * 40, "Call me Ishmael.\n\nSome years ago.\n" * 30]
LINES = ["", " = Robert <unk> = \n", "", " Robert <unk> is an English film , television and theatre actor . \n", ""]
ODD = (
    "naïve façade — “quoted” 日本語のテキスト 🙂👩‍👩‍👧 x\u00a0y\u2003z\r\n\ttab  two e\u0301 Å <|endoftext|> end\x1cfs"
)


def parquet(folder: Path, frame: dict, name="test-00000-of-00001.parquet") -> bytes:
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(frame).to_parquet(folder / name)
    return (folder / name).read_bytes()


def shared(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not here")
    return DATA / name


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


# ---- from a hub -----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, no proxy, online, and no address but this machine's own."""
    for variable in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(variable)
    folder = tmp_path / "hub-cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    look_up = socket.getaddrinfo

    def only_here(host, *arguments, **options):
        if host not in ("127.0.0.1", "localhost"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", only_here)
    huggingface_hub.close_session()
    yield folder
    huggingface_hub.close_session()


@pytest.fixture
def hub(monkeypatch, cache):
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def names_three_ways_out(message: str) -> bool:
    return all(way in message for way in ("HF_ENDPOINT", "data_dir", "dataset='python-docs'"))


def test_wikitext_is_downloaded_once_and_only_its_split(hub, tmp_path):
    content = parquet(tmp_path / "files", {"text": LINES})
    names = [f"wikitext-{s}/{p}-00000-of-00001.parquet" for s in ("2-v1", "103-v1") for p in ("test", "train")]
    commit = hub.add("Salesforce/wikitext", {name: content for name in names}, kind="datasets")
    text = load_text("wikitext", subset="wikitext-2-v1")
    assert hub.downloads() == ["wikitext-2-v1/test-00000-of-00001.parquet"]
    assert text.documents == [" \n" + LINES[1] + " \n" + LINES[3]]
    assert text.name == "wikitext-2-v1" and text.source == f"Salesforce/wikitext@{commit}/wikitext-2-v1/test"

    hub.stop()
    hub.requests.clear()
    assert load_text("wikitext", subset="wikitext-2-v1") == text and hub.requests == []
    with pytest.raises(ConnectionError):  # what is in the cache is not another subset
        load_text("wikitext")


def test_pg19_is_read_from_the_parquet_copy_of_the_hub(hub, tmp_path):
    columns = {"short_book_title": ["One", "Two"], "publication_date": [1900, 1901], "text": BOOKS}
    content = parquet(tmp_path / "files", columns)
    files = {f"data/{split}-00000-of-00001-0a1b2c3d.parquet": content for split in data.SPLITS}
    hub.add("emozilla/pg19", files, kind="datasets")
    text = load_text("pg19", sample_idx=1)
    assert (text.documents, text.titles, text.name) == ([BOOKS[1]], ["Two"], "PG-19")
    assert hub.downloads() == ["data/test-00000-of-00001-0a1b2c3d.parquet"]
    assert load_text("pg19", split="validation").name == "PG-19 (validation)"
    with pytest.raises(ValueError, match="sample_idx=2: emozilla/pg19@.* has 2 document.* 0 to 1"):
        load_text("pg19", sample_idx=2)


def test_shards_are_joined_and_a_missing_one_is_not_passed_over(hub, tmp_path, cache, monkeypatch):
    names = [f"wikitext-103-v1/train-0000{i}-of-00002.parquet" for i in range(2)]
    shards = [parquet(tmp_path / "files", {"text": [f"line {i}\n"]}) for i in range(2)]
    hub.add("Salesforce/wikitext", dict(zip(names, shards)), kind="datasets")
    hub.broken.add(names[1])
    with pytest.raises(ConnectionError, match="did not deliver") as raised:
        load_text("wikitext", split="train")
    assert names_three_ways_out(str(raised.value)) and names[0] in hub.downloads()
    hub.broken.clear()
    text = load_text("wikitext", split="train")
    assert text.documents == ["line 0\nline 1\n"] and text.name == "wikitext-103-v1 (train)"

    hub.stop()
    assert load_text("wikitext", split="train") == text
    [lost] = cache.rglob(Path(names[1]).name)
    lost.unlink()
    # huggingface_hub notices by itself where it has kept a listing; without one it gives the folder as it is
    monkeypatch.setattr(data, "snapshot_download", lambda *_, **__: str(lost.parents[1]))
    with pytest.raises(ConnectionError):
        load_text("wikitext", split="train")


def test_a_slow_answer_is_waited_for_but_not_for_ever(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CONNECT_SECONDS", 0.5)
    files = {"wikitext-103-v1/test-00000-of-00001.parquet": parquet(tmp_path / "files", {"text": LINES})}
    hub.add("Salesforce/wikitext", files, kind="datasets")
    hub.delays_s = [1.5]  # longer than it may take to find that there is no connection
    assert load_text("wikitext").name == "wikitext-103-v1"
    monkeypatch.setattr(data, "ANSWER_SECONDS", 0.3)
    hub.delays_s = [1.5]
    with pytest.raises(ConnectionError, match="ReadTimeout"):
        load_text("wikitext", split="train")


def test_without_connection_the_answer_comes_at_once_and_names_the_ways_out(cache, monkeypatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    for endpoint in (f"http://127.0.0.1:{port}", "https://huggingface.co"):  # nobody listens; no such host
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        start = time.perf_counter()
        with pytest.raises(ConnectionError) as raised:
            load_text("wikitext")
        assert time.perf_counter() - start < 5 and names_three_ways_out(str(raised.value))
        with pytest.warns(UserWarning, match="python-docs .* STANDS IN for wikitext"):
            assert load_text("wikitext", fallback="python-docs") == load_text("python-docs")


def test_a_network_that_swallows_everything_is_given_up_within_5_s(cache, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://huggingface.co")
    done = threading.Event()

    def look_up(*_, **__):
        done.wait(30)
        raise socket.gaierror("the name server did not answer")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    start = time.perf_counter()
    with pytest.raises(ConnectionError, match="did not answer within 4 s"):
        load_text("pg19")
    assert time.perf_counter() - start < 5
    done.set()


def test_offline_is_honoured(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE"):
        load_text("wikitext")
    assert hub.requests == []


def test_a_mirror_without_the_data_set_says_so(hub):
    with pytest.raises(ConnectionError, match="RepositoryNotFound") as raised:
        load_text("pg19")
    assert names_three_ways_out(str(raised.value))


# ---- from disk and from the box -------------------------------------------------------------------------------------


def test_python_docs_is_the_language_reference_of_this_python():
    from pydoc_data.topics import topics

    text = load_text("python-docs")
    assert text == load_text() and len(text.documents) == 1
    assert re.fullmatch(r"python-docs 3\.\d+\.\d+", text.name)
    assert all(topic.strip("\n") in text.documents[0] for topic in topics.values())
    order = [text.documents[0].index(topics[name].strip("\n")[:300]) for name in ("assert", "import", "with", "yield")]
    assert order == sorted(order)


def test_rows_of_one_line_are_a_running_text_and_rows_of_many_are_books(tmp_path):
    parquet(tmp_path / "lines", {"text": LINES})
    parquet(tmp_path / "books", {"text": BOOKS})
    parquet(tmp_path / "titled", {"title": ["A", "B"], "text": ["One line.", "Another."]})
    assert load_text(str(tmp_path / "lines")).documents == [f" \n{LINES[1]} \n{LINES[3]}"]
    assert load_text(str(tmp_path / "books")).documents == BOOKS
    titled = load_text(str(tmp_path / "titled"))
    assert titled.documents == ["One line.", "Another."] and titled.titles == ["A", "B"]


def test_every_kind_of_file_is_read(tmp_path):
    for name in ("a.txt", "b.md"):
        (tmp_path / name).write_text(f"text of {name}: é\n", encoding="utf-8")
        assert load_text(str(tmp_path / name)).documents == [f"text of {name}: é\n"]
    rows = [{"text": "first\nsecond\u2028third"}, {"text": "2020-01-01"}]
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n")
    assert load_text(str(tmp_path / "c.jsonl")).documents == ["first\nsecond\u2028third", "2020-01-01"]
    (tmp_path / "README.md").write_text("not text to measure on")
    text = load_text(str(tmp_path))
    assert text.name == tmp_path.name
    assert sorted(text.titles) == ["", "", "a", "b"] and len(text.documents) == 4


def test_the_split_of_a_folder_is_respected(tmp_path):
    for split, ending in {"test": "-0a1b2c3d", "train": ""}.items():  # some data sets of the hub have a hash there
        parquet(tmp_path / "d", {"text": [f"{split}\n"]}, f"{split}-00000-of-00001{ending}.parquet")
    assert load_text(str(tmp_path / "d")).documents == ["test\n"]
    train = load_text(str(tmp_path / "d"), split="train")
    assert train.documents == ["train\n"] and train.name == "d (train)"
    with pytest.raises(ValueError, match="split='validation': must be one of test, train"):
        load_text(str(tmp_path / "d"), split="validation")


def test_data_dir_is_named_for_what_it_is(tmp_path):
    for subset in ("wikitext-2-v1", "wikitext-103-v1"):
        parquet(tmp_path / "wikitext" / subset, {"text": [f"{subset}\n"]})
    parquet(tmp_path / "pg19" / "data", {"text": BOOKS})
    mirror = tmp_path / "wikitext"
    assert load_text("wikitext", subset="wikitext-2-v1", data_dir=mirror).documents == ["wikitext-2-v1\n"]
    assert load_text("wikitext", data_dir=mirror).name == "wikitext-103-v1"
    assert load_text("wikitext", data_dir=mirror / "wikitext-2-v1").name == "wikitext-2-v1"
    pg19 = load_text("pg19", subset="wikitext-2-v1", data_dir=tmp_path / "pg19", sample_idx=1)
    assert pg19.documents == [BOOKS[1]] and pg19.name == "pg19"
    with pytest.raises(ValueError, match="subset='wikitext-103-v1': .* is wikitext-2-v1"):
        load_text("wikitext", subset="wikitext-103-v1", data_dir=mirror / "wikitext-2-v1")
    with pytest.raises(ValueError, match="data_dir=.*goes with"):
        load_text("python-docs", data_dir=mirror)
    with pytest.raises(ValueError, match="data_dir=.*goes with"):
        load_text(str(mirror / "wikitext-2-v1"), data_dir=mirror)


def test_the_folders_that_stand_in_are_read_as_pandas_reads_them():
    wiki = load_text("wikitext", data_dir=shared("wikitext-2-v1"))
    rows = pd.read_parquet(DATA / "wikitext-2-v1")["text"]
    assert wiki.documents == ["".join(rows)] and wiki.name == "wikitext-2-v1"
    books = load_text("pg19", data_dir=shared("gutenberg-pre1919"))
    frame = pd.read_parquet(DATA / "gutenberg-pre1919")
    assert books.documents == list(frame["text"]) and books.titles == list(frame["short_book_title"])
    assert books.name == "Gutenberg (pre-1919)"


def bad_files(folder: Path):
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    yield "latin.txt", r"not UTF-8 \(byte 0xe9 at 3\); convert it.*iconv"
    (folder / "latin.jsonl").write_bytes('{"text": "café"}'.encode("latin-1"))
    yield "latin.jsonl", "not UTF-8.*iconv"
    (folder / "empty.txt").touch()
    yield "empty.txt", "empty"
    (folder / "blank.md").write_text(" \n")
    yield "blank.md", "empty"
    (folder / "empty.jsonl").touch()
    yield "empty.jsonl", "empty"
    (folder / "empty.parquet").touch()
    yield "empty.parquet", "empty"
    (folder / "column.jsonl").write_text('{"body": "x", "id": 1}\n')
    yield "column.jsonl", "no column `text`, only body, id; rename"
    pd.DataFrame({"content": ["x"]}).to_parquet(folder / "column.parquet")
    yield "column.parquet", "no column `text`, only content"
    (folder / "cut.jsonl").write_text('{"text": "x"}\n{"text": "y')
    yield "cut.jsonl", "damaged or not .jsonl"
    (folder / "number.jsonl").write_text('{"text": "x"}\n5\n')
    yield "number.jsonl", "damaged or not .jsonl"
    (folder / "cut.parquet").write_bytes((folder / "column.parquet").read_bytes()[:-20])
    yield "cut.parquet", "damaged or not .parquet"
    (folder / "null.jsonl").write_text('{"text": "x"}\n{"text": null}\n')
    yield "null.jsonl", "row 1 of column `text` is None"
    (folder / "table.csv").write_text("text\nx\n")
    yield "table.csv", "must end in .parquet, .jsonl, .txt, .md"
    (folder / "nothing").mkdir()
    yield "nothing", "no file to read"


def test_what_cannot_be_read_is_an_error_with_the_path_and_the_fix(tmp_path):
    for name, message in bad_files(tmp_path):
        with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path / name))}: .*{message}"):
            load_text(str(tmp_path / name))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "wikitxt"}, "dataset='wikitxt'.*Did you mean wikitext"),
        ({"dataset": "no/such/file.txt"}, "dataset='no/such/file.txt'.*nor is there a file"),
        ({"dataset": "wikitext", "subset": "wikitext-102-v1"}, "subset='wikitext-102-v1'.*Did you mean wikitext-10"),
        ({"dataset": "wikitext", "split": "tests"}, "split='tests'.*Did you mean test"),
        ({"dataset": "wikitext", "data_dir": "no/such"}, "data_dir='no/such': no such folder"),
        ({"dataset": "python-docs", "sample_idx": 1}, "sample_idx=1.*0 to 0"),
        ({"dataset": "python-docs", "sample_idx": -1}, "sample_idx=-1"),
        ({"dataset": "wikitext", "fallback": "demo"}, "fallback='demo'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_text(**arguments)


# ---- tokens and windows ---------------------------------------------------------------------------------------------


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


# ---- recall ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filler():
    return load_text("python-docs").documents[0]


@pytest.fixture(scope="module")
def asked(tokenizer, filler):
    return {"filler": filler, "n_keys": 10, "keys_per_context": 4, "context_length": 600, "seed": 3}


def test_contexts_have_their_length_and_spans_are_exact(tokenizer, asked):
    samples = recall_samples(tokenizer, **asked)
    assert [len(sample.keys) for sample in samples] == [4, 4, 2]
    for sample in samples:
        assert sample.context_ids.shape == (600,)
        assert len({key.name for key in sample.keys}) == len(sample.keys)
        ends = 0
        for key in sample.keys:
            assert re.fullmatch(r"[A-Z][a-z]{3,6}", key.name) and re.fullmatch(r"\d{5}", key.digits)
            start, end = key.span
            statement = tokenizer.decode(sample.context_ids[start:end])
            assert statement == f" The passkey of {key.name} is {key.digits}. Remember it."
            assert tokenizer.decode(sample.context_ids[slice(*key.digits_span)]) == f" {key.digits}"
            assert torch.equal(sample.context_ids[slice(*key.digits_span)], key.answer_ids)
            question = f"\n\nWhat is the passkey of {key.name}? The passkey of {key.name} is"
            assert tokenizer.decode(key.question_ids) == question
            whole = tokenizer(f"{question} {key.digits}").input_ids  # apart they are the tokens that they are together
            assert torch.cat([key.question_ids, key.answer_ids]).tolist() == whole
            assert start >= ends
            ends = end


def test_filler_goes_on_across_a_statement_and_sentences_stay_whole(tokenizer, asked, filler):
    for sample in recall_samples(tokenizer, **asked):
        ids, holes = sample.context_ids.tolist(), [key.span for key in sample.keys]
        rest = [i for at, i in enumerate(ids) if not any(start <= at < end for start, end in holes)]
        assert tokenizer.decode(rest) in filler
        for start, end in holes:
            before, after = tokenizer.decode(ids[:start])[-1:], tokenizer.decode(ids[end:])[:1]
            assert not before.isspace() and after in ("", " ", "\n")
        whole = tokenizer(tokenizer.decode(ids[:590])).input_ids  # the last token may be half of a word
        assert whole[:580] == ids[:580]


def test_the_seed_decides(tokenizer, asked):
    def flat(samples):
        return [(s.context_ids.tolist(), [(k.name, k.digits, k.depth, k.span) for k in s.keys]) for s in samples]

    one = flat(recall_samples(tokenizer, **asked))
    assert one == flat(recall_samples(tokenizer, **asked))
    other = flat(recall_samples(tokenizer, **{**asked, "seed": 4}))
    assert all(a[0] != b[0] for a, b in zip(one, other))
    assert not {k[1] for _, keys in one for k in keys} & {k[1] for _, keys in other for k in keys}


def test_depths_are_where_they_were_asked_for(tokenizer, asked):
    depths = [0.0, 0.25, 0.5, 0.75, 1.0]
    samples = recall_samples(tokenizer, **{**asked, "n_keys": 40, "keys_per_context": 2}, depths=depths)
    keys = [key for sample in samples for key in sample.keys]
    assert sorted(key.depth for key in keys) == sorted(depths * 8)
    assert {key.span[0] for key in keys if key.depth == 0.0} == {0}
    errors = [abs(key.depth - key.span[0] / (600 - (key.span[1] - key.span[0]))) for key in keys]
    assert max(errors) < 0.08
    random = [key.depth for sample in recall_samples(tokenizer, **{**asked, "n_keys": 60}) for key in sample.keys]
    assert len(set(random)) == 60 and 0.35 < np.mean(random) < 0.65 and min(random) < 0.15 and max(random) > 0.85


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_keys": 0}, "n_keys=0"),
        ({"keys_per_context": 0}, "keys_per_context=0"),
        ({"context_length": 40}, "context_length=40: 4 statements have"),
        ({"depths": [0.5, 1.5]}, "depths="),
        ({"depths": []}, "depths="),
        ({"filler": "Too short. Indeed."}, "leave 532 for the filler, which has 6"),
    ],
)
def test_what_recall_cannot_do_is_refused(tokenizer, asked, wrong, message):
    with pytest.raises(ValueError, match=message):
        recall_samples(tokenizer, **{**asked, **wrong})


def test_the_bundled_model_knows_this_form(demo, tokenizer, asked):
    """Each digit is predicted by a query that has the statement before it, in a context of the filler's own words."""
    [sample] = recall_samples(tokenizer, **{**asked, "n_keys": 4, "context_length": 400})
    for key in sample.keys:
        ids = torch.cat([sample.context_ids, key.question_ids, key.answer_ids])[None]
        with torch.no_grad():
            logits = demo(ids, logits_to_keep=len(key.answer_ids) + 1).logits[0, :-1]
        assert torch.equal(logits.argmax(-1), key.answer_ids), key


def test_a_text_is_cut_like_its_documents(tokenizer):
    text = Text(BOOKS, ["", ""], "two", "here")
    lengths = {"context_length": 8, "continuation_length": 2}
    assert torch.equal(windows(text, tokenizer, **lengths).input_ids, windows(BOOKS, tokenizer, **lengths).input_ids)
    one = windows(BOOKS[0], tokenizer, **lengths).input_ids
    assert torch.equal(one, windows([BOOKS[0]], tokenizer, **lengths).input_ids)
