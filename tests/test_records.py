import json
import os
import subprocess
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from kvneox_lib.inputs.files import make_ready
from kvneox_lib.studies import provenance as provenance_module
from kvneox_lib.studies import records
from kvneox_lib.studies.packing import pack, unpack
from kvneox_lib.studies.provenance import PROVENANCE, provenance
from kvneox_lib.studies.records import (
    find_record,
    load_records,
    output_folder,
    run_id,
    table_path,
    tables_of,
    write_record,
    write_table,
)

PARAMETERS = {"model": "demo", "weights": "bundled", "compression_ratio": 0.5, "depths": [0.0, 0.5], "seed": 0}


@pytest.fixture
def record():
    figures = {"n_tokens": 1000, "nll_mean": 3.25, "ppl": 25.79, "context_tokens": 1024, "kept_fraction": 0.5}
    run = {"model": "demo", "weights": "bundled", "dataset": "python-docs 3.11.7", "press": "knorm"}
    how = {"compression_ratio": 0.5, "device": "cpu", "dtype": "float32", "seed": 0, "depths": (0.0, 0.5)}
    return {**run, **figures, **how, **provenance()}


def test_run_id_reads_as_promised():
    assert run_id("wikitext", "EleutherAI/pythia-70m", "snapkv", 0.5) == "wikitext__pythia-70m__snapkv__0.50"
    assert run_id("pg19", "demo", "no_press", 0, seed=1, batch_size=4).endswith("__0.00__batch_size=4__seed=1")
    assert run_id("pg19", "demo", "knorm", 0.125, depths=[0.0, 0.5]).endswith("__0.125__depths=0.0,0.5")


def test_run_ids_differ_where_runs_differ_and_are_file_names(tmp_path):
    values = [
        "a",
        "a_b",
        "a__b",
        "a/b",
        "a+b",
        "a b",
        "a~b",
        "a,b",
        ["a", "b"],
        ["a"],
        "_a",
        "a_",
        ".a",
        "../a",
        "ä",
        "A=1",
    ]
    values += [0.5, 0.25, [0.5, 0.25], [], None, True, 3, "../../etc/passwd", {"window": 3}, "x" * 300, "x" * 301]
    ids = [run_id("wikitext", "demo", "knorm", 0.5, option=value) for value in values]
    ids += [run_id(value, "demo", "knorm", 0.5) for value in values if isinstance(value, str)]
    ids += [run_id("wikitext", value, "knorm", 0.5) for value in values if isinstance(value, str)]
    ids += [run_id("wikitext", "demo", "knorm", ratio) for ratio in (0.12, 0.125, 0.1249, 0, 1)]
    # the separator inside a value must not look like the next parameter
    ids += [run_id("a__b", "c", "p", 0.5), run_id("a", "b__c", "p", 0.5), run_id("a", "b", "c", 0.5)]
    ids += [run_id("w", "m", "p", 0.5, a="1__b=2"), run_id("w", "m", "p", 0.5, a="1", b="2")]
    assert all(one != other for one, other in combinations(ids, 2))
    for name in ids:
        assert Path(name).name == name and not name.startswith(".") and len(name) < 200
        (tmp_path / f"{name}.json").touch()
    assert len(list(tmp_path.iterdir())) == len(ids)


def test_provenance_names_this_checkout_and_these_versions(monkeypatch):
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as inside a hook of git's
    found = provenance("cpu")
    assert found["torch_version"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(found) == set(PROVENANCE) and found["device_name"]
    checkout = Path(provenance_module.__file__).parents[2]
    if (checkout / ".git").exists():
        monkeypatch.delenv("GIT_DIR")
        head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=checkout, text=True).strip()
        assert found["git_commit"] == head
    else:
        assert found["git_commit"] is None and found["git_dirty"] is None


def test_an_installed_copy_does_not_take_the_commit_of_the_repository_around_it(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "kvneox_lib" / "studies"
    package.mkdir(parents=True)
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "-C", tmp_path, *author, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    monkeypatch.setattr(provenance_module, "__file__", str(package / "provenance.py"))
    assert provenance()["git_commit"] is None


def test_changed_code_is_dirty_and_new_results_are_not(tmp_path, monkeypatch):
    for name in ("kvneox_lib/studies/records.py", "results/reference/a.json"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("before")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr(provenance_module, "__file__", str(tmp_path / "kvneox_lib" / "studies" / "provenance.py"))
    assert provenance()["git_dirty"] is False
    (tmp_path / "results/reference/a.json").write_text("after")
    assert provenance()["git_dirty"] is False
    (tmp_path / "kvneox_lib/studies/records.py").write_text("after")
    assert provenance()["git_dirty"] is True


def test_a_record_is_one_file_of_plain_values(tmp_path, record):
    path = write_record(tmp_path / "new" / "ppl", "a__b__0.50", record)
    row = json.loads(path.read_text())
    assert row["nll_mean"] == 3.25 and row["weights"] == "bundled" and json.loads(row["depths"]) == [0.0, 0.5]
    assert set(row) == {"run_id", *record} and [file.name for file in path.parent.iterdir()] == ["a__b__0.50.json"]
    assert path.stat().st_mode & 0o044 == 0o044


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nll_mean": float("nan")}, "nll_mean=nan"),
        ({"ppl": float("inf")}, "ppl=inf"),
        ({"ppl": torch.tensor(float("nan"))}, "ppl=nan"),
        ({"nested": {"a": 1}}, "nested=.*flat"),
        ({"rows": [[1, 2]]}, "rows=.*flat"),
        ({"tensor": torch.zeros(2)}, "tensor=.*flat"),
        ({"weights": "auto"}, "weights='auto'"),
    ],
)
def test_a_record_that_is_not_one_is_refused_and_nothing_is_written(tmp_path, record, change, message):
    with pytest.raises(ValueError, match=message):
        write_record(tmp_path, "id", {**record, **change})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", records.REQUIRED)
def test_every_required_field_is_required_but_may_be_none(tmp_path, record, name):
    with pytest.raises(ValueError, match=f"lacks {name}"):
        write_record(tmp_path, "id", {key: record[key] for key in record if key != name})
    if name != "weights":
        write_record(tmp_path, "id", {**record, name: None})
        assert json.loads((tmp_path / "id.json").read_text())[name] is None


def test_scalars_of_numpy_and_torch_become_plain(tmp_path, record):
    odd = {"nll_mean": np.float32(0.5), "n_tokens": torch.tensor(3), "dtype": torch.bfloat16, "where": Path("a/b")}
    row = json.loads(write_record(tmp_path, "id", {**record, **odd}).read_text())
    assert (row["nll_mean"], row["n_tokens"], row["dtype"], row["where"]) == (0.5, 3, "bfloat16", "a/b")


def test_an_interrupted_write_leaves_no_file(tmp_path, record, monkeypatch):
    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_record(tmp_path, "id", record)
    assert list(tmp_path.iterdir()) == []
    assert find_record(tmp_path, "id", PARAMETERS) is None


def test_an_interrupted_rewrite_leaves_the_old_record(tmp_path, record, monkeypatch):
    write_record(tmp_path, "id", record)

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_record(tmp_path, "id", {**record, "ppl": 1.0})
    assert find_record(tmp_path, "id", PARAMETERS)["ppl"] == record["ppl"]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_record_is_found_for_equal_parameters_only(tmp_path, record):
    write_record(tmp_path, "id", record)
    same = dict(reversed(PARAMETERS.items())) | {"depths": (0.0, 0.5)}
    assert find_record(tmp_path, "id", same)["ppl"] == record["ppl"]
    for name, value in {"seed": 1, "weights": "random", "depths": [0.0], "compression_ratio": 0.50001}.items():
        assert find_record(tmp_path, "id", {**PARAMETERS, name: value}) is None, name
    assert find_record(tmp_path, "id", {**PARAMETERS, "seed": False}) is None  # False == 0 in Python
    assert find_record(tmp_path, "id", {**PARAMETERS, "query_aware": None}) is None  # newer than the record
    assert find_record(tmp_path, "other", PARAMETERS) is None


def test_records_come_back_as_one_frame_without_the_damaged(tmp_path, record):
    for i in range(3):
        write_record(tmp_path, f"id{i}", {**record, "nll_mean": 1.0 + i})
    write_record(tmp_path / "copy", "id0", record)  # a folder below is not of this study
    (tmp_path / "id1.json").write_text('{"run_id": "id1", "nll_mea')
    (tmp_path / "renamed.json").write_text((tmp_path / "id0.json").read_text())
    (tmp_path / "list.json").write_text("[]")
    with pytest.warns(UserWarning) as caught:
        frame = load_records(tmp_path)
    told = " ".join(str(warning.message) for warning in caught)
    assert all(name in told for name in ("id1.json", "renamed.json", "list.json"))
    assert list(frame["run_id"]) == ["id0", "id2"] and list(frame["nll_mean"]) == [1.0, 3.0]
    assert set(frame["study"]) == {tmp_path.name}
    with pytest.warns(UserWarning, match="id1.json"):
        assert find_record(tmp_path, "id1", {"seed": 0}) is None


def test_a_parameter_that_came_later_has_a_value_for_before(tmp_path, record):
    write_record(tmp_path, "id", record)
    for before in ({}, {"evict_while_reading": None}):  # a packed cell is empty beside later records
        write_record(tmp_path, "id", record | before)
        assert find_record(tmp_path, "id", {**PARAMETERS, "evict_while_reading": False}) is not None
        assert find_record(tmp_path, "id", {**PARAMETERS, "evict_while_reading": True}) is None
        write_record(tmp_path, "later", record | {"evict_while_reading": False})
        assert load_records(tmp_path)["evict_while_reading"].tolist() == [False, False]
    assert find_record(tmp_path, "id", {**PARAMETERS, "kv_bits": None})["ppl"] == record["ppl"]
    assert find_record(tmp_path, "id", {**PARAMETERS, "kv_bits": 8}) is None
    assert find_record(tmp_path, "other", {"kv_bits": None}) is None


def test_bits_are_packed_beside_records_that_know_of_none(tmp_path, record):
    study = tmp_path / "reference" / "recall"
    bits = {"old": {}, "plain": {"kv_bits": None, "kv_group": None}, "coarse": {"kv_bits": 4, "kv_group": 64}}
    for name in ("old", "plain"):
        write_record(study, name, {**record, **bits[name]})
    pack(study)
    write_record(study, "coarse", {**record, **bits["coarse"]})
    write_table(study, "coarse", "keys", pd.DataFrame({"right": [True]}))
    for turn in (pack, unpack, pack):
        turn(study)
        for name, own in bits.items():
            for value in (None, 4):
                found = find_record(study, name, {**PARAMETERS, "kv_bits": value})
                assert (found is not None) == (own.get("kv_bits") == value), (name, value, turn)
        found = find_record(study, "coarse", {"kv_bits": 4})
        assert (type(found["kv_bits"]), found["kv_group"]) == (int, 64)
        assert tables_of(load_records(study), "keys")["kv_bits"].tolist() == [4]


def keys(right: list[bool], names: list[str]) -> pd.DataFrame:
    return pd.DataFrame({"right": right, "name": names, "share": [1 / 3, None], "n": [1, 2]})


def test_packed_and_unpacked_they_are_the_same(tmp_path, record):
    study = tmp_path / "reference" / "recall"
    odd = {
        "git_commit": "1" * 40,
        "torch_version": "2.13",
        "nll_mean": 1e-17 + 0.1,
        "query_aware": False,
        "n_keys": 2.0,
    }
    write_record(study, "a__0.50", {**record, **odd, "kept_fraction": None})
    write_record(study, "b__0.50", {**record, **odd, "query_aware": True, "extra": 1})
    write_table(study, "a__0.50", "keys", keys([True, False], ["a,b", 'say "c"\nnext']))
    write_table(study, "b__0.50", "keys", keys([False, True], ["d", "NA "]))
    write_table(study, "b__0.50", "heads", pd.DataFrame({"head": [0]}))
    before = load_records(study)
    tables = {name: tables_of(before, name) for name in ("keys", "heads", "none")}
    pack(study)
    assert not study.exists()
    assert {path.name for path in study.parent.iterdir()} == {"recall.csv", "recall.keys.csv", "recall.heads.csv"}
    after = load_records(study)
    pd.testing.assert_frame_equal(after.drop(columns="path"), before.drop(columns="path"), check_like=True)
    for name, table in tables.items():
        pd.testing.assert_frame_equal(tables_of(after, name), table)
    assert find_record(study, "b__0.50", {"query_aware": True, "n_keys": 2.0})["extra"] == 1
    assert find_record(study, "a__0.50", {"n_keys": 2}) is None

    write_record(study, "b__0.50", {**record, **odd, "extra": 2})  # measured anew, with other tables
    write_table(study, "b__0.50", "keys", keys([True, True], ["e", "f"]))
    assert load_records(study)["extra"].tolist()[1] == 2
    pack(study)
    frame = load_records(study)
    assert frame["extra"].tolist()[1] == 2 and tables_of(frame, "heads").empty
    assert tables_of(frame, "keys")["name"].tolist() == ["a,b", 'say "c"\nnext', "e", "f"]

    unpack(study)
    assert not (study.parent / "recall.csv").exists() and len(list(study.glob("*.json"))) == 2
    pd.testing.assert_frame_equal(load_records(study).drop(columns="path"), frame.drop(columns="path"))


def test_what_would_come_back_as_something_else_is_not_packed(tmp_path, record):
    write_record(tmp_path / "study", "id", {**record, "remark": "12"})
    with pytest.raises(ValueError, match="remark='12' would come back as 12: name it in TEXTS"):
        pack(tmp_path / "study")
    assert load_records(tmp_path / "study")["remark"].tolist() == ["12"]


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda text: text.replace("3.25", "NaN"), "NaN is no figure"),
        (lambda text: text.replace('"started_at"', '"began_at"'), "lacks started_at"),
        (lambda text: text.replace("3.25", "[" * 100_000 + "]" * 100_000), "recursion"),
    ],
)
def test_what_is_no_whole_record_is_named_and_left_out(tmp_path, record, damage, told):
    path = write_record(tmp_path, "id", record)
    path.write_text(damage(path.read_text()))
    with pytest.warns(UserWarning, match=f"id.json: left out, .*{told}"):
        assert load_records(tmp_path).empty


def test_a_table_that_broke_off_is_named_and_left_out(tmp_path, record):
    path = write_table(tmp_path, "id", "keys", pd.DataFrame({"right": [True, False, True]}))
    write_record(tmp_path, "id", {**record, "table_rows": "heads=2 keys=3"})
    assert len(tables_of(load_records(tmp_path), "keys")) == 3
    write_record(tmp_path, "old", record)  # from before it was said
    write_table(tmp_path, "old", "keys", pd.DataFrame({"right": [True]}))
    assert len(tables_of(load_records(tmp_path), "keys")) == 4
    (tmp_path / "old.json").unlink()
    path.write_text("\n".join(path.read_text().splitlines()[:3]))
    with pytest.warns(UserWarning, match="its table keys has 2 rows, not 3: left out"):
        assert tables_of(load_records(tmp_path), "keys").empty


def test_a_folder_is_made_ready_before_any_work(tmp_path):
    (tmp_path / "out").mkdir()
    for name, age in ((".old.tmp", 7200), (".new.tmp", 0)):
        path = tmp_path / "out" / name
        path.touch()
        os.utime(path, (time.time() - age,) * 2)
    make_ready(tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".new.tmp"]  # somebody may still write it
    (tmp_path / "file").touch()
    with pytest.raises(OSError):
        make_ready(tmp_path / "file" / "out")


def test_no_folder_no_records(tmp_path):
    assert load_records(tmp_path / "nowhere").empty


def test_tables_lie_beside_the_record(tmp_path):
    frame = pd.DataFrame({"depth": [0.0, 0.5], "right": [True, False]})
    path = write_table(tmp_path, "a__0.50", "keys", frame)
    assert path == table_path(tmp_path, "a__0.50", "keys") and path.name == "a__0.50.keys.csv"
    pd.testing.assert_frame_equal(pd.read_csv(path), frame)
    for wrong in ("", "../x", "A"):
        with pytest.raises(ValueError, match="name="):
            write_table(tmp_path, "a", wrong, frame)
    with pytest.raises(ValueError, match="run_id="):
        write_table(tmp_path, "../a", "keys", frame)


def test_output_folder_is_seen_from_the_folder_that_holds_params(tmp_path, monkeypatch):
    (tmp_path / "project" / "params").mkdir(parents=True)
    (tmp_path / "project" / "notebooks" / "deep").mkdir(parents=True)
    for place in ("project", "project/notebooks", "project/notebooks/deep"):
        monkeypatch.chdir(tmp_path / place)
        assert output_folder("results/ppl") == tmp_path / "project" / "results" / "ppl"
    assert output_folder(tmp_path / "else") == tmp_path / "else"
    monkeypatch.chdir(tmp_path)
    assert output_folder("results") == tmp_path / "results"
