"""Studies: each run once, found again only for equal parameters, the same alone as among others."""

import json
import shutil
import warnings

import pandas as pd
import pytest
import torch
from conftest import REPOSITORY, tiny_config
from transformers import GPTNeoXForCausalLM

from kvneox_lib.inputs.text import load_text
from kvneox_lib.inputs.windows import windows
from kvneox_lib.measures.intervals import interval, wilson_ci95
from kvneox_lib.measures.perplexity import continuation_nll, teacher_forced_nll
from kvneox_lib.measures.recall import recall_accuracy
from kvneox_lib.presses.by_name import make_press
from kvneox_lib.studies import perplexity as studies
from kvneox_lib.studies import records
from kvneox_lib.studies.arguments import defaults_of
from kvneox_lib.studies.explore import record_exploration
from kvneox_lib.studies.perplexity import measure_perplexity, plan
from kvneox_lib.studies.plan import declared
from kvneox_lib.studies.recall import measure_recall
from kvneox_lib.studies.streaming import measure_streaming
from kvneox_lib.studies.table import STUDIES

SMALL = {
    "model": "demo",
    "dataset": "python-docs",
    "context_length": 96,
    "continuation_length": 32,
    "max_windows": 6,
    "control_windows": 2,
}


def figures(study) -> pd.DataFrame:
    measured = [name for name in study.records if not name.endswith(("_s", "_at", "path"))]
    return study.records.set_index("run_id")[measured[1:]]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return measure_perplexity(
        **SMALL,
        press=["random", "snapkv"],
        compression_ratio=[0.3, 0.8],
        output_dir=str(tmp_path_factory.mktemp("out")),
    )


def test_figures_are_those_of_the_functions(study, demo, tokenizer):
    cut = windows(load_text("python-docs"), tokenizer, context_length=96, continuation_length=32, max_windows=6)
    assert study.records["press"].tolist() == ["no_press", "random", "random", "snapkv", "snapkv"]
    nll = continuation_nll(demo, cut.input_ids, n_context=96, press=make_press("snapkv", 0.8)).double()
    plain = continuation_nll(demo, cut.input_ids, n_context=96).double()
    row = study.records.iloc[-1]
    assert row["nll_mean"] == pytest.approx(float(nll.mean()), abs=1e-5)
    assert row["delta_nll"] == pytest.approx(float((nll - plain).mean()), abs=1e-5)
    low, high = interval((nll - plain).mean(1).numpy()).ends  # one book
    assert (row["delta_nll_ci95_low"], row["delta_nll_ci95_high"]) == pytest.approx((low, high), abs=1e-5)
    control = teacher_forced_nll(demo, cut.input_ids[:2])[:, 96:].mean()
    assert (row["n_tokens"], row["n_windows"], row["context_tokens"]) == (6 * 31, 6, 96)
    assert row["control_nll_mean"] == pytest.approx(float(control), abs=1e-5) and abs(row["control_delta_nll"]) < 1e-6
    assert row["kept_fraction"] == pytest.approx(0.2, abs=0.01)
    assert row["kv_bytes"] == 2 * 6 * 19 * 256 * 4
    assert (row["model"], row["weights"], row["press"], row["compression_ratio"]) == ("demo", "bundled", "snapkv", 0.8)
    assert row["dataset"].startswith("python-docs 3.")


def test_tables_are_one_for_each_run(study):
    table = study.table("windows")
    by_run = table.groupby(["press", "compression_ratio"])["nll_mean"].mean()
    assert len(table) == 5 * 6
    assert by_run["snapkv", 0.3] == pytest.approx(study.records.iloc[3]["nll_mean"])
    heads = study.table("heads")
    assert heads.groupby(["press", "compression_ratio"])["kept"].mean()["random", 0.8] == pytest.approx(0.2, abs=0.01)
    assert len(heads) == 5 * 24 and study.table("distance")["to_token"].max() == 31


def test_runs_are_the_same_alone_and_are_not_done_again(study, tmp_path, monkeypatch):
    for name, ratio in (("snapkv", 0.3), ("random", 0.8), ("random", 0.3)):
        alone = measure_perplexity(**SMALL, press=name, compression_ratio=ratio, output_dir=str(tmp_path))
        row, other = alone.records.iloc[-1], study.records.set_index("run_id").loc[alone.records.iloc[-1]["run_id"]]
        assert row["nll_mean"] == pytest.approx(other["nll_mean"], abs=1e-6), name
    monkeypatch.setattr(studies, "score_each", None)  # whoever measures now fails
    again = measure_perplexity(**SMALL, press=["random", "snapkv"], compression_ratio=0.3, output_dir=str(study.folder))
    assert again.records["nll_mean"].tolist() == study.records["nll_mean"][[0, 1, 3]].tolist()
    for changed in ({"seed": 1}, {"context_length": 95}, {"overwrite": True}, {"dtype": "bfloat16"}):
        with pytest.raises(TypeError):
            measure_perplexity(**{**SMALL, **changed}, press="snapkv", output_dir=str(study.folder))


def test_names_say_what_differs_from_the_defaults(study):
    names = study.records["run_id"].tolist()
    differing = "__".join(f"{name}={SMALL[name]}" for name in sorted(SMALL) if name not in ("model", "dataset"))
    assert names[4] == f"python-docs__demo__snapkv__0.80__{differing}"
    assert (study.folder / f"{names[4]}.json").exists() and len(list(study.folder.glob("*.json"))) == 5


def test_presses_without_a_ratio_are_measured_once_and_those_that_need_eager_get_it(tmp_path):
    study = measure_perplexity(
        **SMALL,
        press=["think", "observed_attention", "per_layer_knorm", "chunkkv_snapkv"],
        compression_ratio=[0.2, 0.6],
        output_dir=str(tmp_path),
    )
    table = study.records.set_index(["press"])
    assert len(table) == 1 + 1 + 2 + 2 + 2
    assert table.loc["think", "run_id"].startswith("python-docs__demo__think__own__")
    assert set(table.loc["observed_attention", "attn_implementation"]) == {"eager"}
    assert set(table.loc["chunkkv_snapkv", "attn_implementation"]) == {"sdpa"}
    assert table.loc["per_layer_knorm", "kept_fraction"].tolist() == pytest.approx([0.8, 0.4], abs=0.02)
    assert study.loaded.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"press": ["knorm", "adakv_snapkv"], "attn_implementation": "eager"}, "'eager' cannot serve AdaKVPress"),
        ({"press": ["knorm", "snapvk"]}, "press 'snapvk' is unknown; did you mean snapkv"),
        ({"context_limit": 32}, "context_limit=32: the 32 tokens after the context leave no room"),
        ({"compression_ratio": 1.5}, "compression_ratio=1.5: allowed is a number from 0 to below 1"),
        ({"max_windows": 0}, "max_windows=0: must be a whole number of at least 1"),
        ({"batch_size": 0}, "batch_size=0: must be a whole number of at least 1"),
        ({"control_windows": 0}, "control_windows=0: must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_run(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        measure_perplexity(**{**SMALL, **wrong}, output_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_query_aware_is_yes_or_no():
    with pytest.raises(ValueError, match="query_aware='yes': allowed is true or false"):
        measure_recall(query_aware=[True, "yes"])


def test_context_limit_cuts_the_context(tmp_path):
    study = measure_perplexity(**SMALL, context_limit=100, press="knorm", output_dir=str(tmp_path))
    assert set(study.records["context_tokens"]) == {68}


def test_a_context_beyond_the_trained_length_is_cut_and_said(tmp_path):
    long = {**SMALL, "context_length": 4096, "max_windows": 1, "control_windows": 1}
    with pytest.warns(UserWarning, match="context_length=4096 is cut to 2016, so that a window has the trained length"):
        study = measure_perplexity(**long, press="no_press", output_dir=str(tmp_path))
    assert set(study.records["context_tokens"]) == {2016} and "context_length=2016" in study.records["run_id"][0]
    with pytest.raises(
        ValueError,
        match="continuation_length=2048: the 2048 tokens after .* leave no room",
    ):
        measure_perplexity(**{**long, "continuation_length": 2048}, output_dir=str(tmp_path))


def test_recall_does_not_ask_presses_that_would_sleep_through_it(tmp_path):
    asked = {"n_keys": 2, "keys_per_context": 2, "context_length": 200, "depths": None}
    with pytest.warns(UserWarning, match="not asked, as they compress only after more tokens.*: decoding_knorm"):
        study = measure_recall(
            model="demo", dataset="python-docs", press=["decoding_knorm"], **asked, output_dir=str(tmp_path)
        )
    assert study.records["press"].tolist() == ["no_press"]


def test_recall_study(tmp_path):
    study = measure_recall(
        model="demo",
        dataset="python-docs",
        press="streaming_llm",
        compression_ratio=0.5,
        query_aware=[False, True],
        n_keys=6,
        keys_per_context=3,
        depths=[0.2, 0.9],
        context_length=400,
        output_dir=str(tmp_path),
    )
    assert study.records["query_aware"].tolist() == [False, False, True, True]
    keys = study.table("keys")
    assert len(keys) == 4 * 6 and set(keys["depth"]) == {0.2, 0.9}
    outside = keys[(keys["press"] == "streaming_llm") & ~keys["query_aware"]]
    assert outside.groupby("depth")["digits_kept"].mean().to_dict() == {0.2: 0.0, 0.9: 1.0}  # the window's half
    row = study.records.iloc[1]
    assert row["accuracy"] == outside["correct"].mean() and row["nll_mean"] == pytest.approx(outside["nll"].mean())
    assert row["accuracy_ci95_low"] < row["accuracy"] < row["accuracy_ci95_high"]
    heads = study.table("heads").query("press == 'streaming_llm' and not query_aware")
    assert len(heads) == 24 and heads["digits_kept"].mean() == pytest.approx(row["digits_kept"])
    assert row["digits_kept_where_read"] == pytest.approx(0.5)  # all heads alike


# ---- in how many bits ----

STORED = {
    **SMALL,
    "context_length": 160,
    "batch_size": 6,
    "press": ["snapkv", "decoding_knorm"],
    "compression_ratio": [0.4, 0.6],
}


def test_each_number_of_bits_is_what_continuation_nll_says_of_it_alone(demo, tokenizer, tmp_path, monkeypatch):
    read, score_each = [], studies.score_each

    def counting(*args, presses, **how):
        read.append(len(presses))
        return score_each(*args, presses=presses, **how)

    monkeypatch.setattr(studies, "score_each", counting)
    found = measure_perplexity(**STORED, kv_bits=[None, 4], output_dir=str(tmp_path)).records
    assert read == [1 + 2, 1 + 2 * 2, 1 + 1]  # windows are read once for all ratios and bits of a press
    told = found[["press", "compression_ratio", "kv_bits"]].astype(object).where(lambda cells: cells.notna(), None)
    assert [*told.itertuples(index=False, name=None)] == [
        *(("no_press", 0.0, bits) for bits in (None, 4)),
        *(("snapkv", ratio, bits) for bits in (None, 4) for ratio in (0.4, 0.6)),
        ("decoding_knorm", None, None),  # acts while decoding: as it is alone
    ]
    cut = windows(load_text("python-docs"), tokenizer, context_length=160, continuation_length=32, max_windows=6)
    alone = {"n_context": 160, "press": make_press("snapkv", 0.6)}
    plain = continuation_nll(demo, cut.input_ids, n_context=160).double()
    for row, bits in ((found.iloc[3], None), (found.iloc[5], 4)):
        nll = continuation_nll(demo, cut.input_ids, kv_bits=bits, **alone).double()
        assert row["nll_mean"] == pytest.approx(float(nll.mean()), abs=1e-5)
        assert row["delta_nll"] == pytest.approx(float((nll - plain).mean()), abs=1e-5)
        assert ("__kv_bits=4__" in row["run_id"]) == (bits == 4)
    full, coarse = found.iloc[3], found.iloc[5]
    assert full["nll_mean"] != coarse["nll_mean"] and full["kept_fraction"] == coarse["kept_fraction"]
    assert full["kv_bytes"] == 2 * 6 * 64 * 256 * 4
    # a block of 64 tokens: half a byte for each of its numbers, and four for each channel and each token
    assert coarse["kv_bytes"] == 6 * 4 * (64 * 64 * 2 // 2 + 4 * (64 + 64))
    assert (coarse["kv_group"], coarse["kv_residual"]) == (64, 0) and pd.isna(full["kv_group"])
    assert found["run_id"].tolist() == declared(
        measure_perplexity, plan, {**defaults_of(measure_perplexity), **STORED, "kv_bits": [None, 4]}
    )


def test_what_evicts_while_decoding_is_left_out_where_all_is_rounded(tmp_path):
    asked = {**defaults_of(measure_perplexity), **STORED, "kv_bits": [8, 2]}
    assert [(run.press, run.settings["kv_bits"]) for run in plan(asked, 2048)] == [
        *(("no_press", bits) for bits in (None, 8, 2)),
        *(("snapkv", bits) for bits in (8, 8, 2, 2)),
    ]
    small = {**STORED, "max_windows": 1, "control_windows": 1, "output_dir": str(tmp_path / "out")}
    with pytest.warns(UserWarning) as caught:
        measure_perplexity(**small, kv_bits=4)
    assert [str(one.message) for one in caught if "leaves out decoding_knorm" in str(one.message)] == [
        "kv_bits=4 leaves out decoding_knorm: what evicts while decoding needs keys and values as they are"
    ]
    for bits in (4, [8, 4]):
        with pytest.raises(ValueError, match=r"kv_bits=.*: decoding_knorm would be left out.*allowed is None, or a"):
            measure_perplexity(**{**small, "press": "decoding_knorm", "output_dir": str(tmp_path / "b")}, kv_bits=bits)
    for bits in (3, True, 8.0, "4", [None, 16]):
        with pytest.raises(ValueError, match="kv_bits=.*: allowed is None, 8, 4, 2"):
            measure_perplexity(**{**small, "output_dir": str(tmp_path / "b")}, kv_bits=bits)
    assert not (tmp_path / "b").exists()


def test_records_from_before_there_were_bits_are_used_again(study, tmp_path, monkeypatch):
    for path in study.folder.iterdir():
        shutil.copy(path, tmp_path)
    for path in tmp_path.glob("*.json"):
        old = {name: value for name, value in json.loads(path.read_text()).items() if not name.startswith("kv_bits")}
        path.write_text(json.dumps(old))
    monkeypatch.setattr(studies, "score_each", None)  # whoever measures now fails
    asked = {**SMALL, "press": ["random", "snapkv"], "compression_ratio": [0.3, 0.8], "output_dir": str(tmp_path)}
    again = measure_perplexity(**asked)
    assert again.records["nll_mean"].tolist() == study.records["nll_mean"].tolist()
    for bits in (4, [None, 4]):
        with pytest.raises(TypeError):
            measure_perplexity(**asked, kv_bits=bits)


@pytest.mark.parametrize("name", ["wikitext_ppl", "pg19_ppl", "recall", "speed", "tasks"])
def test_the_committed_records_are_found_by_parameters_of_today(name):
    """With kv_bits None, not 4. (Which of their columns are parameters, the table of studies says.)"""
    folder = REPOSITORY / "results" / "reference" / name
    rows = [row for row in records.packed(folder).values() if row.get("kv_bits") is None]
    for row in (rows[0], rows[-1]):
        lacking = [key for key in records.CAME_LATER if row.get(key) is None]
        known = {key: row[key] for key in STUDIES[name].parameters if key in row and key not in lacking}
        assert records.find_record(folder, row["run_id"], known | {"kv_bits": None})["run_id"] == row["run_id"]
        assert records.find_record(folder, row["run_id"], known | {"kv_bits": 4}) is None


def test_recall_in_bits_is_what_recall_accuracy_says(demo, tokenizer, tmp_path):
    asked = {"n_keys": 4, "keys_per_context": 2, "context_length": 300}
    study = measure_recall(
        model="demo",
        dataset="python-docs",
        press="keydiff",
        compression_ratio=0.5,
        kv_bits=[None, 2],
        depths=None,
        **asked,
        output_dir=str(tmp_path),
    )
    filler, found = "\n\n".join(load_text("python-docs").documents), study.records
    assert found["press"].tolist() == ["no_press"] * 2 + ["keydiff"] * 2
    for (_, row), bits in zip(found.iterrows(), (None, 2, None, 2)):
        press = make_press(row["press"], 0.5)
        alone = recall_accuracy(demo, tokenizer, press=press, filler=filler, kv_bits=bits, **asked)
        assert row["nll_mean"] == pytest.approx(alone.nll, abs=1e-5) and row["accuracy"] == alone.accuracy
        assert row["kv_bytes"] == alone.rows[0].kv_bytes and ("kv_bits=2" in row["run_id"]) == (bits == 2)
    assert found["nll_mean"].nunique() == 4
    keys = study.table("keys")
    assert keys["kv_bits"].eq(2).sum() == keys["kv_bits"].isna().sum() == 2 * 4
    with warnings.catch_warnings(record=True) as caught:  # asleep, whatever the bits: one warning says so
        warnings.simplefilter("always")
        small = {**asked, "n_keys": 2, "depths": None, "press": ["decoding_knorm"], "kv_bits": 4}
        measure_recall(model="demo", dataset="python-docs", **small, output_dir=str(tmp_path / "b"))
    assert sum("decoding_knorm" in str(one.message) for one in caught) == 1


def test_wilsons_interval():
    """Where the score test just rejects: |share - p| = z sqrt(p (1 - p) / n)."""
    for hits, n in ((0, 20), (7, 20), (20, 20)):
        for p in wilson_ci95(hits, n):
            assert abs(hits / n - p) == pytest.approx(1.959964 * (p * (1 - p) / n) ** 0.5, abs=1e-6)


def test_fallbacks_are_named(tmp_path, cache):
    """No connection: the demo model and python-docs stand in, under their own names."""
    with pytest.warns(UserWarning, match="STANDS IN for wikitext"):
        study = measure_perplexity(
            press="knorm", compression_ratio=0.5, max_windows=1, control_windows=1, output_dir=str(tmp_path)
        )
    row = study.records.iloc[-1]
    assert (row["model"], row["weights"], row["dataset"].split()[0]) == ("demo", "bundled", "python-docs")
    assert row["run_id"].startswith("python-docs__demo__knorm__0.50__") and study.text.name == row["dataset"]


@pytest.mark.parametrize("measure", [measure_perplexity, measure_recall, measure_streaming, record_exploration])
def test_no_quality_of_random_weights_is_written(measure, tmp_path):
    with pytest.raises(ValueError, match="weights='random': quality is measured, which random weights have none of"):
        measure(model="pythia-14m", weights="random", dataset="python-docs", output_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())
    assert STUDIES["speed"].values_matter is False and STUDIES["recall"].values_matter


def another_model(folder, seed: int, tokenizer):
    """A tiny model saved in `folder`, and what it makes of some tokens."""
    torch.manual_seed(seed)
    model = GPTNeoXForCausalLM(tiny_config(vocab_size=len(tokenizer)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_two_models_in_folders_of_one_name_are_never_one(tmp_path, tokenizer):
    small = {**SMALL, "max_windows": 5, "press": "knorm", "compression_ratio": 0.5, "output_dir": str(tmp_path / "out")}
    folders = [another_model(tmp_path / place / "m", seed, tokenizer) for seed, place in enumerate(("a", "b"))]
    one, other = (measure_perplexity(**{**small, "model": folder}).records for folder in folders)
    assert set(one["model"]) == set(other["model"]) == {"m"} and set(one["weights_id"]) != set(other["weights_id"])
    assert set(one["run_id"]).isdisjoint(other["run_id"]) and (one["nll_mean"] != other["nll_mean"]).all()
    assert measure_perplexity(**{**small, "model": folders[0]}).records["nll_mean"].tolist() == one["nll_mean"].tolist()

    another_model(tmp_path / "a" / "m", 2, tokenizer)  # trained on, in place
    anew = measure_perplexity(**{**small, "model": folders[0]}).records
    assert (anew["nll_mean"] != one["nll_mean"]).all()
    assert declared(measure_perplexity, plan, {**defaults_of(measure_perplexity), **small, "model": folders[0]}) == (
        anew["run_id"].tolist()
    )


def test_two_texts_of_one_name_are_never_one(tmp_path):
    small = {**SMALL, "press": "no_press", "max_windows": 5, "output_dir": str(tmp_path / "out")}
    found = []
    for place, word in (("a", "river"), ("b", "mountain")):
        (tmp_path / place).mkdir()
        path = tmp_path / place / "x.txt"
        path.write_text(f"The {word} is long and the night is short. " * 200)
        found.append(measure_perplexity(**{**small, "dataset": str(path)}).records.iloc[0])
    assert found[0]["run_id"] != found[1]["run_id"] and found[0]["text_sha256"] != found[1]["text_sha256"]
    assert len(list((tmp_path / "out").glob("*.json"))) == 2
    (tmp_path / "c").mkdir()
    shutil.copy(tmp_path / "a" / "x.txt", tmp_path / "c")  # the same text elsewhere is the same
    assert (
        measure_perplexity(**{**small, "dataset": str(tmp_path / "c" / "x.txt")}).records["run_id"][0]
        == (found[0]["run_id"])
    )
