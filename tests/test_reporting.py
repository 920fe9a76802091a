"""The report reads the right records, and says so where there are none."""

import json
import shutil

import pandas as pd
import pytest
import torch
from conftest import REPOSITORY

from kvneox_lib import reporting
from kvneox_lib.modeling import KVNeoXForCausalLM
from kvneox_lib.models import PYTHIA, _pythia_config

REFERENCE = REPOSITORY / "results" / "reference"


def put(root, folder, study, press, ratio, table=None, **changes):
    """A record of `study`, made from a reference record of perplexity."""
    name = f"gutenberg-pre1919__demo__{press}__{ratio}__max_windows=200"
    record = json.loads((REFERENCE / "pg19_ppl" / f"{name}.json").read_text()) | changes
    record["run_id"] = "__".join([name, *map(str, changes.values())]).replace("/", "-").replace(" ", "-")
    target = root / folder / study
    target.mkdir(parents=True, exist_ok=True)
    (target / f"{record['run_id']}.json").write_text(json.dumps(record))
    if table:
        source = REFERENCE / "pg19_ppl" / f"{name}.{table}.csv"
        shutil.copyfile(source, target / f"{record['run_id']}.{table}.csv")
    return record


def test_results_come_before_the_reference_study_by_study(tmp_path):
    put(tmp_path, "results/reference", "pg19_ppl", "snapkv", "0.50")
    put(tmp_path, "results/reference", "wikitext_ppl", "snapkv", "0.50")
    put(tmp_path, "results", "pg19_ppl", "random", "0.50")
    books, wiki = (reporting.read(study, tmp_path) for study in ("pg19_ppl", "wikitext_ppl"))
    assert (books.folder.as_posix(), list(books.frame["press"])) == ("results/pg19_ppl", ["random"])
    assert (wiki.folder.as_posix(), list(wiki.frame["press"])) == ("results/reference/wikitext_ppl", ["snapkv"])


def test_machines_models_and_texts_stay_apart(tmp_path):
    for press in ("snapkv", "random"):
        put(tmp_path, "results", "pg19_ppl", press, "0.50")
    for changes in ({"device_name": "H200"}, {"model": "pythia-70m"}, {"dataset": "a letter"}, {"max_windows": 3}):
        put(tmp_path, "results", "pg19_ppl", "snapkv", "0.75", **changes)
    first, *others = reporting.settings("pg19_ppl", tmp_path)
    assert sorted(first.frame["press"]) == ["random", "snapkv"] and [len(one.frame) for one in others] == [1] * 4
    assert "来源：results/pg19_ppl，2 份记录；模型 demo（随包附带的权重）" in first.source
    assert "device_name H200" in first.source and "未用于此处" in first.source
    assert "H200（cpu" in next(one for one in others if one.frame["device_name"].iloc[0] == "H200").source


def test_the_contexts_of_a_speed_study_are_one_setting(tmp_path):
    for length in (512, 2048):
        put(tmp_path, "results", "speed", "snapkv", "0.50", context_length=length)
        put(tmp_path, "results", "pg19_ppl", "snapkv", "0.50", context_length=length)
    assert [len(reporting.settings(study, tmp_path)) for study in ("speed", "pg19_ppl")] == [1, 2]


def test_what_is_asked_for_is_found_or_named(tmp_path):
    record = put(tmp_path, "results", "pg19_ppl", "snapkv", "0.50", table="distance")
    records = reporting.read("pg19_ppl", tmp_path)
    assert records.show("ppl", ".2f", press="snapkv", compression_ratio=0.5) == f"{record['ppl']:.2f}"
    assert records.table("distance", press="snapkv")["compression_ratio"].eq(0.5).all()
    missing = "（缺少记录：pg19_ppl 的 {}，运行 notebooks/02_pg19_ppl.ipynb 可得）"
    assert records.show("ppl", ".2f", press="snapkv", compression_ratio=0.9) == missing.format("snapkv，0.9")
    assert records.show("peak_bytes", ".0f", press="snapkv") == missing.format("peak_bytes")
    with pytest.raises(reporting.Missing, match="表 windows"):
        records.table("windows", press="snapkv")
    with pytest.raises(ValueError, match=r"study='speeds': must be one of adapter, .*speed"):
        reporting.read("speeds", tmp_path)


def test_a_missing_study_leaves_a_note_in_place_of_everything(tmp_path):
    records = reporting.read("speed", tmp_path)
    note = "（缺少记录：speed，运行 notebooks/03_speed.ipynb 可得）"
    assert records.source == note
    assert reporting.say(lambda: records.run().model) == note
    assert reporting.draw(lambda: records.runs()).axes[0].texts[0].get_text() == note
    assert note in reporting.tabulate(records.runs).data
    text = reporting.sentences(lambda: records.run().model, lambda: "甲。", lambda: records.run().press).data
    assert text == note + "甲。"


def test_other_errors_are_not_taken_for_missing_records(tmp_path):
    with pytest.raises(KeyError, match="no_such"):
        reporting.say(lambda: {}["no_such"])


def test_intervals():
    row = pd.Series({"ppl": 3.14159, "ppl_ci95_low": 3.0, "ppl_ci95_high": 3.25, "nll": 1.5, "nll_ci95_low": None})
    assert reporting.with_interval(row, "ppl", 2) == "3.14 [3.00, 3.25]"
    assert reporting.with_interval(row, "nll") == "1.500" and reporting.with_interval(row, "bytes") == "—"


@pytest.mark.parametrize("name", PYTHIA)
def test_bytes_of_a_step_are_those_of_the_model(name):
    with torch.device("meta"):
        model = KVNeoXForCausalLM(_pythia_config(name))
    numbers = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    config = model.config
    cache = 2 * config.num_hidden_layers * 3 * config.num_key_value_heads * 100 * config.head_dim * 2
    assert reporting.bytes_read(PYTHIA[name], 100, batch=3) == (2 * numbers, cache)
