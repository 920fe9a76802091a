"""The four readings of a text, their records, and what is compared."""

import numpy as np
import pytest

from kvneox_lib import streaming_nll
from kvneox_lib.inputs.text import load_text
from kvneox_lib.inputs.weights import load_model
from kvneox_lib.inputs.windows import tokenize
from kvneox_lib.measures.sinks import sink_attention
from kvneox_lib.pages.streams import compare_at_samples
from kvneox_lib.studies.streaming import Reading, measure_streaming, readings_of

SMALL = {"model": "demo", "dataset": "python-docs", "device": "cpu", "dtype": "float32", "max_tokens": 700}
SMALL |= {"window": 60, "dense_limit": 512, "recompute_samples": 20, "sample_tokens": 300}
SMALL |= {"ablation_sinks": [0, 4, 4], "ablation_sizes": [32, 64]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def study(folder):
    return measure_streaming(**SMALL, output_dir=str(folder))


def test_each_reading_is_a_record_once(study):
    frame = study.records
    assert list(zip(frame["press"], frame["n_sink"], frame["window"].fillna(-1)))[:4] == [
        ("dense", 0, -1),
        ("window", 0, 64),
        ("sinks", 4, 60),
        ("recompute", 0, 64),
    ]
    rest = frame.iloc[4:]
    assert list(zip(rest["n_sink"], rest["window"])) == [(0, 32), (4, 28)]
    assert frame["n_tokens"].tolist() == [511, 699, 699, 20, 699, 699]
    assert frame["kv_bytes"].iloc[1] == frame["kv_bytes"].iloc[2] == 65 * 2 * 6 * 4 * 64 * 4


def test_figures_are_those_of_the_functions(study):
    loaded = load_model("demo", device="cpu", dtype="float32")
    ids = tokenize(load_text("python-docs").documents[0], loaded.tokenizer).ids[:700].astype(np.int64)
    nll = streaming_nll(loaded.model, loaded.model.dummy_inputs["input_ids"].new_tensor(ids)[None], n_sink=4, window=60)
    row = study.records.iloc[2]
    assert row.nll_mean == pytest.approx(float(nll.double().mean()), abs=1e-6)
    assert row.within_ppl == pytest.approx(row.ppl) and np.isnan(row.beyond_ppl or np.nan)
    running = study.table("running")
    running = running[running["press"] == "sinks"]
    assert running.iloc[1]["nll_mean"] == pytest.approx(float(nll[0, 256:512].mean()), abs=1e-5)
    assert running.iloc[1]["ppl_so_far"] == pytest.approx(float(nll[0, :512].mean().exp()), rel=1e-5)


def test_all_are_compared_on_the_same_tokens(study):
    samples = study.table("samples")
    compared = compare_at_samples(samples, beyond=0)
    assert set(compared["n"]) == {14, 20}  # dense ends at 512 of 700
    wide = samples.pivot_table(index="position", columns=["press", "n_sink", "window"], values="nll", dropna=False)
    expected = (wide["sinks", 4, 60] - wide["recompute", 0, 64]).mean()
    found = compared[(compared["press"] == "sinks") & (compared["window"] == 60)].iloc[0]
    assert found.difference == pytest.approx(expected) and found.low <= found.difference <= found.high
    assert compare_at_samples(samples, beyond=699).empty


def test_costs_grow_where_all_is_kept(study):
    cost = study.table("cost")
    by_method = {name: part["kv_bytes"].tolist() for name, part in cost.groupby("press")}
    assert len(by_method["dense"]) >= 12 and np.all(np.diff(by_method["dense"]) > 0)
    assert len(set(by_method["sinks"])) == 1 and set(by_method["recompute"]) == {0}
    assert (cost["step_s_q25"] <= cost["step_s"]).all() and (cost["step_s"] > 0).all()


def test_attention_to_the_first_tokens_is_in_the_run_with_sinks(study):
    """700 tokens are one window, as the model was trained on 2,048."""
    loaded = load_model("demo", device="cpu", dtype="float32")
    ids = tokenize(load_text("python-docs").documents[0], loaded.tokenizer).ids[:700].astype(np.int64)
    found = sink_attention(loaded.model, loaded.model.dummy_inputs["input_ids"].new_tensor(ids)[None], n_first=4)
    table, row = study.table("sinks"), study.records.iloc[2]
    assert set(zip(table["press"], table["n_sink"], table["window"])) == {("sinks", 4, 60)}
    wide = table.pivot_table(index="layer", columns="head", values=["first", "several"])
    assert wide["first"].to_numpy() == pytest.approx(found.first.numpy(), rel=1e-4)
    assert wide["several"].to_numpy() == pytest.approx(found.several.numpy(), rel=1e-4)
    assert (row.sink_windows, row.sink_window_tokens) == (1, 700)
    assert row.attention_to_sinks == pytest.approx(table["several"].mean(), rel=1e-6)
    assert row.even_to_sinks == pytest.approx(4 * np.mean(1 / np.arange(65, 701)), rel=1e-6)


def test_a_sample_is_in_pieces(study):
    sample = study.table("sample")
    assert set(sample["press"]) == {"window", "sinks"} and sample["from_token"].tolist() == [251, 501] * 2
    assert sample["distinct_4grams"].between(0, 1).all() and sample["text"].str.len().min() > 50


def test_runs_are_found_again_and_told_apart(study, folder):
    again = measure_streaming(**SMALL, output_dir=str(folder))
    assert again.records["started_at"].tolist() == study.records["started_at"].tolist()
    other = measure_streaming(
        **SMALL | {"window": 28, "methods": "sinks", "ablation_sizes": [], "sample_tokens": 0}, output_dir=str(folder)
    )
    assert len(other.records) == 1 and other.records["run_id"][0] not in set(study.records["run_id"])
    assert other.table("sample").empty and "press" in other.table("sample")


def test_without_sinks_there_is_one_reading_less():
    asked = {"methods": ["window", "sinks"], "n_sink": 0, "window": 60, "ablation_sinks": 0, "ablation_sizes": 60}
    assert readings_of(asked) == [Reading("window", 0, 60, timed=True)]
    assert readings_of({**asked, "methods": "sinks"}) == [Reading("sinks", 0, 60, timed=True)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"methods": ["sink"]},
            "methods='sink': did you mean sinks.*allowed is one of dense, window",
        ),
        ({"window": 2044}, "2048; allowed is below 2048"),
        ({"ablation_sizes": [64, 4096]}, "ablation_sizes: 4096; allowed is below 2048"),
        ({"ablation_sizes": [4]}, "ablation_sizes=4: must be a whole number of at least 5"),
        ({"max_tokens": 100}, "max_tokens=100: must be a whole number of at least 512"),
        ({"max_tokens": 10**9}, "max_tokens=1000000000: The Python Language Reference has"),
        ({"dense_limit": 10}, "dense_limit=10"),
    ],
)
def test_wrong_parameters_are_refused_before_anything_is_read(wrong, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        measure_streaming(**{**SMALL, **wrong}, output_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_two_books_are_not_read_as_one(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text("A word or two. " * 500)
    with pytest.raises(ValueError, match="sample_idx=None: one document is read"):
        measure_streaming(**{**SMALL, "dataset": str(tmp_path), "sample_idx": None}, output_dir=str(tmp_path / "out"))
