"""The report reads the right records, and says so where there are none."""

import json
import shutil
from dataclasses import dataclass

import pandas as pd
import pypandoc
import pytest
import torch
from conftest import REPOSITORY

from kvneox_lib.inputs.weights import PYTHIA, _pythia_config
from kvneox_lib.neox.modeling import KVNeoXForCausalLM
from kvneox_lib.pages import report as reporting
from kvneox_lib.pages.shapes import bytes_read
from kvneox_lib.pages.words import with_interval
from kvneox_lib.studies.records import all_records, tables_of, write_table

REFERENCE = REPOSITORY / "results" / "reference"


def put(root, folder, study, press, ratio, table=None, **changes):
    """A record of `study`, made from a reference record of perplexity."""
    start = f"gutenberg-pre1919__demo__{press}__{ratio}__max_windows=200"
    name, original = next(item for item in all_records(REFERENCE / "pg19_ppl").items() if item[0].startswith(start))
    record = {key: value for key, value in original.items() if key not in ("study", "path")} | changes
    record["run_id"] = "__".join([name, *map(str, changes.values())]).replace("/", "-").replace(" ", "-")
    target = root / folder / study
    target.mkdir(parents=True, exist_ok=True)
    (target / f"{record['run_id']}.json").write_text(json.dumps(record))
    if table:
        write_table(target, record["run_id"], table, tables_of(pd.DataFrame([original]), table))
    return record


def test_results_come_before_the_reference_study_by_study(tmp_path):
    put(tmp_path, "results/reference", "pg19_ppl", "snapkv", "0.50")
    put(tmp_path, "results/reference", "wikitext_ppl", "snapkv", "0.50")
    put(tmp_path, "results", "pg19_ppl", "random", "0.50")
    books, wiki = (reporting.read(study, tmp_path) for study in ("pg19_ppl", "wikitext_ppl"))
    assert (books.folder.as_posix(), list(books.frame["press"])) == ("results/pg19_ppl", ["random"])
    assert (wiki.folder.as_posix(), list(wiki.frame["press"])) == ("results/reference/wikitext_ppl", ["snapkv"])


def test_models_and_texts_stay_apart(tmp_path):
    for press in ("snapkv", "random"):
        put(tmp_path, "results", "pg19_ppl", press, "0.50")
    for changes in ({"device": "cuda"}, {"model": "pythia-70m"}, {"dataset": "a letter"}, {"max_windows": 3}):
        put(tmp_path, "results", "pg19_ppl", "snapkv", "0.75", **changes)
    first, *others = reporting.settings("pg19_ppl", tmp_path)
    assert sorted(first.frame["press"]) == ["random", "snapkv"] and [len(one.frame) for one in others] == [1] * 4
    assert "来源：results/pg19_ppl，2 份记录；模型 demo（随包附带的权重）" in first.source
    assert any("device cuda" in words for words in first.left_out) and "其余设置见 @tbl-records。" in first.source
    assert "（cuda，" in next(one for one in others if one.frame["device"].iloc[0] == "cuda").source


def test_processors_stay_apart_where_time_is_measured(tmp_path):
    for study in ("pg19_ppl", "speed"):
        put(tmp_path, "results", study, "snapkv", "0.50", device_name="one")
        put(tmp_path, "results", study, "random", "0.50", device_name="other")
    (quality,) = reporting.settings("pg19_ppl", tmp_path)
    assert len(quality.frame) == 2 and "设备 other、one（cpu" in quality.source
    assert [len(one.frame) for one in reporting.settings("speed", tmp_path)] == [1, 1]


def test_the_contexts_of_a_speed_study_are_one_setting(tmp_path):
    for length in (512, 2048):
        put(tmp_path, "results", "speed", "snapkv", "0.50", context_length=length)
        put(tmp_path, "results", "pg19_ppl", "snapkv", "0.50", context_length=length)
    assert [len(reporting.settings(study, tmp_path)) for study in ("speed", "pg19_ppl")] == [1, 2]


def test_reference_records_are_in_one_setting_but_for_the_number_of_windows_and_the_reading(tmp_path):
    for study in ("wikitext_ppl", "pg19_ppl"):
        (tmp_path / "results" / "reference").mkdir(parents=True, exist_ok=True)
        shutil.copy(REFERENCE / f"{study}.csv", tmp_path / "results" / "reference")
        found = reporting.settings(study, tmp_path)
        many, few, *readings = [records for records in found if records.run()["device"] == "cpu"]
        elsewhere = [records for records in found if records.run()["device"] != "cpu"]
        of_finished = [one for one in all_records(REFERENCE / study).values() if one.get("revision") is None]
        assert set(many.frame["max_windows"]) == {200} and set(few.frame["max_windows"]) == {20}
        evicting = [records.frame["evict_while_reading"].iloc[0] for records in readings]
        assert sorted(evicting) == ([False, True] if study == "wikitext_ppl" else [])
        assert sum(len(one.frame) for one in (many, few, *readings, *elsewhere)) == len(of_finished)


@pytest.mark.parametrize("differing", [{"sample_idx": 1}, {"text_sha256": "0"}, {"seed": 1}, {"control_windows": 2}])
def test_runs_with_other_parameters_stay_apart(tmp_path, differing):
    put(tmp_path, "results", "pg19_ppl", "snapkv", "0.50")
    put(tmp_path, "results", "pg19_ppl", "snapkv", "0.75")
    put(tmp_path, "results", "pg19_ppl", "snapkv", "0.50", **differing)
    first, other = reporting.settings("pg19_ppl", tmp_path)
    assert sorted(first.frame["compression_ratio"]) == [0.5, 0.75] and list(other.frame["compression_ratio"]) == [0.5]
    name, value = next(iter(differing.items()))
    assert first.left_out == (f"{name} {value}（1 份）",)


@pytest.mark.parametrize("differing", ["max_new_tokens", "min_new_tokens", "repeats", "decode_only", "n_threads"])
def test_other_timings_stay_apart(tmp_path, differing):
    for value in (1, 2):
        put(tmp_path, "results", "speed", "snapkv", "0.50", **{differing: value})
    assert [len(one.frame) for one in reporting.settings("speed", tmp_path)] == [1, 1]


def test_of_two_precisions_timed_alike_float32_comes_first(tmp_path):
    for dtype in ("bfloat16", "float32"):
        put(tmp_path, "results", "speed", "snapkv", "0.50", dtype=dtype)
    assert [one.run()["dtype"] for one in reporting.settings("speed", tmp_path)] == ["float32", "bfloat16"]


def test_of_two_attention_implementations_the_newest_counts_except_in_timings(tmp_path):
    """Which one serves depends on the press, so both belong to one study; of the same press one is shown."""
    for name, when in (("sdpa", "2030-01-02"), ("eager", "2030-01-01")):
        for study in ("pg19_ppl", "speed"):
            put(tmp_path, "results", study, "snapkv", "0.50", attn_implementation=name, started_at=when)
    put(tmp_path, "results", "pg19_ppl", "random", "0.50", attn_implementation="eager")
    (one,) = reporting.settings("pg19_ppl", tmp_path)
    shown = one.frame.set_index("press")["attn_implementation"].to_dict()
    assert shown == {"snapkv": "sdpa", "random": "eager"} and len(one.frame) == 2
    assert len(reporting.settings("speed", tmp_path)) == 2


def test_a_source_names_the_packed_table_where_there_is_one(tmp_path):
    (tmp_path / "results" / "reference").mkdir(parents=True)
    shutil.copy(REFERENCE / "pg19_ppl.csv", tmp_path / "results" / "reference")
    packed = reporting.read("pg19_ppl", tmp_path).source
    put(tmp_path, "results", "pg19_ppl", "snapkv", "0.50")
    loose = reporting.read("pg19_ppl", tmp_path).source
    assert packed.startswith("来源：results/reference/pg19_ppl.csv，")
    assert loose.startswith("来源：results/pg19_ppl，1 份")
    assert all(source.count("；笔记本 notebooks/02_pg19_ppl.ipynb。") == 1 for source in (packed, loose))


def test_the_sources_of_several_settings(tmp_path):
    for model in ("demo", "pythia-70m"):
        put(tmp_path, "results", "pg19_ppl", "snapkv", "0.50", model=model)
    text = reporting.sources(reporting.settings("pg19_ppl", tmp_path))
    assert text.startswith("来源：results/pg19_ppl，2 份记录；模型 ") and text.count("来源：") == 1
    assert "demo（随包附带的权重）" in text and "pythia-70m（随包附带的权重）" in text and "tbl-records" not in text


def test_what_is_asked_for_is_found_or_named(tmp_path):
    record = put(tmp_path, "results", "pg19_ppl", "snapkv", "0.50", table="distance")
    records = reporting.read("pg19_ppl", tmp_path)
    assert records.show("ppl", ".2f", press="snapkv", compression_ratio=0.5) == f"{record['ppl']:.2f}"
    records.table("distance", press="snapkv")["compression_ratio"] = 0.9  # of a copy
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
    assert reporting.sentences((reporting.named, records), (str, "乙。")).data == note + "乙。"
    assert reporting.draw(reporting.pressed, records).axes[0].texts[0].get_text() == note


def test_a_table_keeps_words_whole_and_quotes_straight():
    frame = pd.DataFrame({"方法": ["knorm", "critical_adakv_expected_attention_of_all"], "说": ["it's a|b", "长" * 30]})
    assert reporting.column_widths(frame) == [40 + 4, 24 + 4]
    assert reporting.column_widths(frame[:1]) == [5 + 4, 8 + 4]
    assert reporting.column_widths(pd.DataFrame({"源": ["[@expected_attention]"]})) == [4 + 4]  # shown as a number
    header, widths, first, _ = reporting.tabulate(lambda: frame).data.splitlines()
    assert [len(part) - 1 for part in widths.strip("|").split("|")] == reporting.column_widths(frame)
    read = pypandoc.convert_text(f"{header}\n{widths}\n{first}", "plain", "markdown", extra_args=["--columns=200"])
    assert "it's a|b" in read


def test_in_a_table_long_texts_give_way_and_numbers_do_not_break():
    frame = pd.DataFrame({f"第{i}列": ["119 3/6", "0.5 [0.4, -0.6]" if i % 2 else "长" * 30] for i in range(5)})
    narrow, wide = frame, pd.concat([frame, frame.add_suffix("二")], axis=1)
    assert reporting.column_widths(narrow) == [24, 15 + 4, 24, 15 + 4, 24]  # one alone takes 28
    of_narrow, of_wide = (reporting.tabulate(pd.DataFrame.copy, one).data for one in (narrow, wide))
    assert "119\u00a03/6" in of_narrow and "0.5\u00a0[0.4,\u00a0-0.6]" in of_narrow
    assert "0.5 [0.4, -0.6]" in of_wide and "\u00a0" not in of_wide  # wider than a page: better there than in a number


@dataclass
class LongLines:
    value: int

    def method(self, first: int, second: int, third: int, fourth: int, fifth: int = 5, sixth: int = 6) -> int:
        """What it comes to, in a sentence that is longer than a page is wide, as sentences will be at times."""
        both = self.value * (first + second) if first > second else abs(self.value - third) + fourth  # either "a  # b"
        return f"both, of {both}, and a text with, commas, that must not be broken in two at any of them  # {fifth}"


def test_code_is_shown_in_lines_that_fit_a_page_and_still_says_the_same():
    text = reporting.code(LongLines.method).data
    lines = text.splitlines()
    assert lines[0] == "```python" and lines[1].startswith("def method(") and max(map(len, lines)) > 80
    assert [line for line in lines if len(line) > 80] == [lines[-2]] and lines[-2].lstrip().startswith('return f"both')
    shown = {}
    exec("\n".join(lines[1:-1]), shown)
    for first in (1, 3):
        asked = LongLines(7), first, 2, 3, 4
        assert shown["method"](*asked) == LongLines.method(*asked)


def test_short_code_is_shown_as_it_is():
    assert reporting.narrow("a = 1  # one\n") == "a = 1  # one\n" and reporting.narrow("if x:  # not Python") != ""


def test_other_errors_are_not_taken_for_missing_records(tmp_path):
    with pytest.raises(KeyError, match="no_such"):
        reporting.say(lambda: {}["no_such"])


def test_names_from_records_are_text(tmp_path):
    evil = "<script>alert(1)</script>|*x*"
    put(tmp_path, "results", "pg19_ppl", "snapkv", "0.50", device_name=evil)
    records = reporting.read("pg19_ppl", tmp_path)
    for markdown in (
        records.source,
        reporting.tabulate(lambda: pd.DataFrame({"机器": [records.run().device_name]})).data,
    ):
        html = pypandoc.convert_text(markdown, "html", "markdown")
        assert "<script" not in html and "&lt;script&gt;" in html and "<em>" not in html


def test_intervals():
    row = pd.Series({"ppl": 3.14159, "ppl_ci95_low": 3.0, "ppl_ci95_high": 3.25, "nll": 1.5, "nll_ci95_low": None})
    assert with_interval(row, "ppl", 2) == "3.14 [3.00, 3.25]"
    assert with_interval(row, "nll") == "1.500" and with_interval(row, "bytes") == "—"


@pytest.mark.parametrize("name", PYTHIA)
def test_bytes_of_a_step_are_those_of_the_model(name):
    with torch.device("meta"):
        model = KVNeoXForCausalLM(_pythia_config(name))
    numbers = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    config = model.config
    cache = 2 * config.num_hidden_layers * 3 * config.num_key_value_heads * 100 * config.head_dim * 2
    assert bytes_read(PYTHIA[name], 100, batch=3) == (2 * numbers, cache)
