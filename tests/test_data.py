"""Text from a hub on 127.0.0.1, from disk and from the box, and what it is cut into. Nothing else is ever asked."""

import json
import re
import socket
import threading
import time
from pathlib import Path

import pandas as pd
import pytest
from huggingface_hub import constants

from kvneox_lib.inputs import hub as hub_module
from kvneox_lib.inputs import text as data
from kvneox_lib.inputs.text import load_text

DATA = Path(__file__).parents[2] / "shared" / "data"
BOOKS = ["It was a bright cold day.\nThe clocks struck.\n" * 40, "Call me Ishmael.\n\nSome years ago.\n" * 30]
LINES = ["", " = Robert <unk> = \n", "", " Robert <unk> is an English film , television and theatre actor . \n", ""]


def parquet(folder: Path, frame: dict, name="test-00000-of-00001.parquet") -> bytes:
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(frame).to_parquet(folder / name)
    return (folder / name).read_bytes()


def shared(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not here")
    return DATA / name


# ---- from a hub -----------------------------------------------------------------------------------------------------


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
    monkeypatch.setattr(hub_module, "CONNECT_SECONDS", 0.5)
    files = {"wikitext-103-v1/test-00000-of-00001.parquet": parquet(tmp_path / "files", {"text": LINES})}
    hub.add("Salesforce/wikitext", files, kind="datasets")
    hub.delays_s = [1.5]  # longer than it may take to find that there is no connection
    assert load_text("wikitext").name == "wikitext-103-v1"
    monkeypatch.setattr(hub_module, "ANSWER_SECONDS", 0.3)
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
    with pytest.raises(ValueError, match="split='validation': .*allowed is one of test, train"):
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
        ({"dataset": "wikitxt"}, "dataset='wikitxt'.*did you mean wikitext"),
        ({"dataset": "no/such/file.txt"}, "dataset='no/such/file.txt'.*or the path of a file or folder that exists"),
        ({"dataset": "wikitext", "subset": "wikitext-102-v1"}, "subset='wikitext-102-v1'.*did you mean wikitext-10"),
        ({"dataset": "wikitext", "split": "tests"}, "split='tests'.*did you mean test"),
        ({"dataset": "wikitext", "data_dir": "no/such"}, "data_dir='no/such': no such folder"),
        ({"dataset": "python-docs", "sample_idx": 1}, "sample_idx=1.*0 to 0"),
        ({"dataset": "python-docs", "sample_idx": -1}, "sample_idx=-1"),
        ({"dataset": "wikitext", "fallback": "demo"}, "fallback='demo'"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_text(**arguments)


def test_arguments_are_checked_before_the_network_is_asked(monkeypatch):
    monkeypatch.setattr(data, "_hub_files", lambda *_: pytest.fail("the hub was asked"))
    for arguments, message in [
        ({"dataset": "pg19", "sample_idx": -1}, "sample_idx=-1"),
        ({"dataset": ""}, "dataset='': must be"),
        ({"dataset": None}, "dataset=None: must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_text(**arguments)


def test_odd_folders_and_encodings(tmp_path):
    (tmp_path / "UPPER.TXT").write_text("Some text.", encoding="utf-8")
    (tmp_path / "folder.txt").mkdir()
    assert load_text(str(tmp_path)).documents == ["Some text."]
    (tmp_path / "wide.txt").write_text("Some text.", encoding="utf-16")
    with pytest.raises(ValueError, match="iconv -f utf-16"):
        load_text(str(tmp_path / "wide.txt"))


def test_a_line_of_json_that_cannot_be_text_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    for second, told in (
        ('{"text": "half a pair: \\ud83d"}', "surrogates not allowed"),
        ('{"text": ', "Expecting value"),
    ):
        path.write_text('{"text": "fine"}\n' + second + "\n")
        with pytest.raises(ValueError, match=rf"x\.jsonl: damaged or not \.jsonl \(line 2: .*{told}"):
            load_text(path)
