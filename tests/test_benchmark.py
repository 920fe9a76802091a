"""What is timed is the right thing: the same tokens from every engine, bytes from the shapes, failures as rows."""

import itertools
import json
import subprocess
import sys
import timeit
from math import inf

import pandas as pd
import pytest
import torch
from conftest import stock_and_ours, tiny_config

from kvneox_lib.inputs.weights import load_model
from kvneox_lib.measures.clock import PeakMemory, resident_bytes
from kvneox_lib.measures.precision import cost_of_precision, in_precision
from kvneox_lib.measures.speed import (
    WARM_UP,
    Product,
    Timing,
    figures,
    floors,
    is_out_of_memory,
    peak_flop_per_s,
    roofline_s,
    step_products,
    time_once,
    weight_bytes,
)
from kvneox_lib.presses.by_name import make_press
from kvneox_lib.studies import speed as study_of_speed
from kvneox_lib.studies.arguments import defaults_of
from kvneox_lib.studies.plan import declared
from kvneox_lib.studies.speed import measure_speed, plan

DEFAULTS = defaults_of(measure_speed)
SMALL = {"model": "demo", "context_lengths": 150, "batch_sizes": 2, "max_new_tokens": 9, "press": "snapkv"}


def test_every_engine_decodes_the_same_tokens(demo, reading, monkeypatch):
    """Ours and kvpress' under a press, ours and both of transformers' own without one."""
    ids, chosen = reading[:, 4000:4200], []
    project = torch.nn.Module.__call__

    def spy(module, *args, **kwargs):
        out = project(module, *args, **kwargs)
        if type(module).__name__ in ("KVNeoXModel", "GPTNeoXModel"):
            chosen.append((out.last_hidden_state[:, -1] @ demo.embed_out.weight.T).argmax(-1).tolist())
        return out

    monkeypatch.setattr(torch.nn.Module, "__call__", spy)
    said = {}
    for engine, press in (
        *(("ours", None), ("stock", None), ("static", None)),
        *(("ours", "snapkv"), ("kvpress", "snapkv")),
    ):
        chosen.clear()
        with torch.no_grad():
            timing = time_once(demo, engine, press and make_press(press, 0.75), ids, 6)
        said[engine, press] = list(chosen)
        assert timing.n_new == 6 and timing.step_s == timing.decode_s / 6 > 0
    assert said["ours", None] == said["stock", None] == said["static", None] and len(said["ours", None]) == 7
    assert said["ours", "snapkv"] == said["kvpress", "snapkv"] != said["ours", None]


def test_bytes(demo, reading):
    ids, token = reading[:, :200], 2 * 6 * 256 * 4
    ours = time_once(demo, "ours", make_press("knorm", 0.75), ids, 5)
    assert (ours.kv_bytes_compressed, ours.kv_bytes) == (50 * token, 56 * token)
    masked = time_once(demo, "kvpress", make_press("adakv_snapkv", 0.75), ids, 5)
    freed = time_once(demo, "ours", make_press("adakv_snapkv", 0.75), ids, 5)
    assert masked.kv_bytes_compressed == 200 * token and freed.kv_bytes_compressed == 50 * token
    assert masked.kept_fraction == freed.kept_fraction == 0.25
    static = time_once(demo, "static", None, ids, 5)
    assert (static.kv_bytes_compressed, static.kv_bytes, static.kept_fraction) == (200 * token, 205 * token, 1.0)
    _, apart = stock_and_ours(tiny_config())  # embeddings not tied: a step looks one row up
    assert weight_bytes(apart) == 4 * (sum(p.numel() for p in apart.parameters()) - 97 * 128)
    assert weight_bytes(demo) == 4 * sum(p.numel() for p in demo.parameters())


def test_figures_are_medians_of_the_turns():
    turns = [
        Timing(
            1.0 + i, 2.0 * (1 + i), 4, 0.5, 10, 20, peak_bytes=100 * i, prefill_peak_bytes=900, resident_bytes=90 * i
        )
        for i in (0, 1, 2, 3, 10)
    ]
    found = figures(turns, batch_size=3, max_new_tokens=11, decode_only=False)
    assert (found["prefill_s"], found["step_s"], found["step_s_q25"], found["step_s_q75"]) == (3.0, 1.5, 1.0, 2.0)
    assert found["decode_tok_per_s"] == 2.0 and found["total_tok_per_s"] == 3 * 11 / (3.0 + 10 * 1.5)
    assert (found["peak_bytes"], found["peak_above_bytes"]) == (1000, 100)
    assert (found["prefill_peak_bytes"], found["prefill_peak_above_bytes"]) == (900, 900)
    assert found["prefill_turns_s"] == [1.0, 2.0, 3.0, 4.0, 11.0] and found["step_turns_s"] == [0.5, 1.0, 1.5, 2.0, 5.5]
    without = figures(turns, 3, 11, decode_only=True)
    assert without["step_turns_s"] == found["step_turns_s"] and without["prefill_turns_s"] is None
    assert without["prefill_s"] is without["prefill_peak_above_bytes"] is None and without["peak_above_bytes"] == 100


def test_the_study(tmp_path, monkeypatch):
    study = measure_speed(**SMALL, output_dir=str(tmp_path))
    rows = study.records.set_index(["engine", "press"])
    plain, pressed = ("ours", "stock", "static"), ("ours", "kvpress")
    assert set(rows.index) == {*((name, "no_press") for name in plain), *((name, "snapkv") for name in pressed)}
    assert rows["failure"].isna().all() and (rows["step_s_q25"] <= rows["step_s"]).all()
    row = rows.loc[("ours", "snapkv")]
    norms = 4 * sum(p.numel() for name, p in study.loaded.model.named_parameters() if "norm" in name)
    read = row["weight_bytes"] - norms + 2 * (37 + 1.5) * 2 * 6 * 256 * 4
    assert row["floor_bytes_s"] == pytest.approx(read / row["bandwidth_bytes_per_s"])
    assert row["floor_bytes_s"] <= row["floor_s"] <= row["floor_bytes_s"] + row["floor_operations_s"]
    assert row["times_floor"] == pytest.approx(row["step_s"] / row["floor_s"])
    rates = [row[f"bandwidth_{part}bytes_per_s"] for part in ("low_", "", "high_")]
    assert rates == sorted(rates) and rates[0] > 0 and row["demo_nll_diff"] is None
    assert (row["kv_bytes_full"], row["n_tokens"], row["context_tokens"]) == (2 * 150 * 2 * 6 * 256 * 4, 18, 150)
    monkeypatch.setattr(study_of_speed, "time_once", None)  # whoever measures now fails
    again = measure_speed(**SMALL, output_dir=str(tmp_path))
    assert again.records["step_s"].tolist() == study.records["step_s"].tolist()


def test_what_each_turn_took_is_in_the_records(tmp_path, monkeypatch):
    """A clock that counts what is timed: in the second turn the variants go the other way."""
    calls = itertools.count()

    def counted(lm, engine, press, ids, n_new, **_):
        at = float(next(calls)) if ids.shape[1] > WARM_UP else 0.0
        return Timing(at, 2 * at * n_new, n_new, 1.0, 1, 1, None)

    monkeypatch.setattr(study_of_speed, "time_once", counted)
    asked = {**SMALL, "engines": ["ours", "stock"], "repeats": 3, "output_dir": str(tmp_path)}
    rows = measure_speed(**asked).records.set_index(["engine", "press"])
    told = {at: json.loads(row["prefill_turns_s"]) for at, row in rows.iterrows()}
    order = [("ours", "no_press"), ("ours", "snapkv"), ("stock", "no_press")]
    assert [told[at] for at in order] == [[0, 5, 6], [1, 4, 7], [2, 3, 8]]
    assert all(json.loads(row["step_turns_s"]) == [2 * at for at in told[i]] for i, row in rows.iterrows())
    assert rows["started_at"].nunique() == 1 and rows["failure"].isna().all()
    assert rows.loc[order[1], "prefill_s"] == 4 and rows.loc[order[1], "step_s"] == 8


def test_what_runs_out_of_memory_is_a_row_and_the_rest_goes_on(tmp_path, monkeypatch):
    timed = study_of_speed.time_once

    def scarce(model, engine, *rest):
        if engine == "stock":
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")
        return timed(model, engine, *rest)

    monkeypatch.setattr(study_of_speed, "time_once", scarce)
    rows = measure_speed(**SMALL, output_dir=str(tmp_path)).records.set_index(["engine", "press"])
    assert rows.loc[("stock", "no_press"), "failure"] == "out of memory" and rows["failure"].notna().sum() == 1
    monkeypatch.setattr(study_of_speed, "time_once", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure_speed(**{**SMALL, "overwrite": True}, output_dir=str(tmp_path))


def test_what_a_press_refuses_is_a_row_too(tmp_path):
    short = {**SMALL, "context_lengths": 40, "press": ["snapkv", "finch", "knorm"]}
    rows = measure_speed(**short, output_dir=str(tmp_path)).records.set_index(["engine", "press"])["failure"]
    assert "should be greater than" in rows["ours", "snapkv"] and rows["kvpress", "snapkv"] == rows["ours", "snapkv"]
    assert rows[["ours", "kvpress"]][:, "knorm"].isna().all()


def test_out_of_memory_is_told_apart():
    with pytest.raises(RuntimeError) as refusal:
        torch.empty(2**60)
    assert is_out_of_memory(refusal.value) and is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))


def test_wrong_arguments_are_refused(tmp_path):
    alone = {"engines": "kvpress", "press": "no_press"}
    with pytest.raises(ValueError, match="engines='kvpress': kvpress alone times nothing without a press"):
        measure_speed(**{**SMALL, **alone}, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="evict_while_reading=True: wants prefill_chunk"):
        measure_speed(**SMALL, evict_while_reading=True, output_dir=str(tmp_path))
    with pytest.raises(ValueError, match="engines='vllm'"):
        measure_speed(**SMALL, engines=["ours", "vllm"], output_dir=str(tmp_path))
    for wrong in ({"repeats": 0}, {"max_new_tokens": 0}, {"batch_sizes": 0}, {"context_lengths": [100, 0]}):
        ((name, _),) = wrong.items()
        with pytest.raises(ValueError, match=f"{name}=0: must be a whole number of at least 1"):
            measure_speed(**{**SMALL, **wrong}, output_dir=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_highest_use_of_memory_is_told_phase_by_phase(demo, reading):
    if (peak := PeakMemory(torch.device("cpu"))).lap() is None:
        pytest.skip("this system does not tell")
    before = peak.lap()
    torch.ones(2**26)  # 256 MiB, and gone
    high, after = peak.lap(), peak.lap()
    assert high - before > 2**27 and high - after > 2**27
    for engine in ("ours", "static", "kvpress"):
        timing = time_once(demo, engine, None, reading[:, :100], 2)
        assert timing.prefill_peak_bytes > 0 and timing.peak_bytes > 0 and timing.resident_bytes > 0


def test_decoding_is_not_charged_with_what_the_prefill_used():
    """Of 2000 tokens the cache takes 24.6 MB, a tenth of it when compressed; all else that decoding needs is small.

    In a process of its own: what other tests leave behind may be freed in the middle of a turn.
    """
    if resident_bytes(torch.device("cpu")) is None:
        pytest.skip("this system does not tell")
    script = """
import torch
from kvneox_lib import load_model, make_press
from kvneox_lib.measures.speed import time_once

model, ids = load_model("demo").model, torch.randint(2, 8000, (1, 2000))
for press in (None, make_press("knorm", 0.9)):
    timings = [time_once(model, "ours", press, ids, 2) for _ in range(4)][1:]  # the first may compile
    for phase in ("prefill_peak_bytes", "peak_bytes"):
        print(sorted(getattr(timing, phase) - timing.resident_bytes for timing in timings)[1])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    full_prefill, full, compressed_prefill, compressed = (int(line) / 1e6 for line in done.stdout.split())
    assert full_prefill - full > 5 and compressed_prefill - compressed > 5
    assert 20 < full < 50 and compressed < 20


def test_what_is_resident_is_told_without_what_was_freed():
    """Small tensors: the C library keeps their room for the next ones."""
    if (before := resident_bytes(torch.device("cpu"))) is None:
        pytest.skip("this system does not tell")
    held = [torch.ones(2**14) for _ in range(2**12)]  # 256 MiB in pieces of 64 KiB; some find room freed before
    assert (most := resident_bytes(torch.device("cpu")) - before) > 160 * 2**20
    held.clear()
    assert resident_bytes(torch.device("cpu")) - before < most - 160 * 2**20


# ---- the roofline ---------------------------------------------------------------------------------------------------


def test_products_of_a_step_by_hand():
    """The shape of pythia-70m: 6 layers, 512 wide, 8 heads of 64, an MLP of 2048, a vocabulary of 50304; bfloat16."""
    model = load_model("pythia-70m", weights="random", dtype="bfloat16").model
    found = step_products(model, batch=4, entries=6 * 4 * 8 * 1000)
    layer = [(512, 1536), (512, 512), (512, 2048), (2048, 512)]
    expected = [Product(2 * (n * m + m), 2 * 4 * n * m) for n, m in 6 * layer] + [
        Product(2 * 512 * 50304, 2 * 4 * 512 * 50304),
        Product(2 * 2 * 64 * 192_000, 4 * 64 * 192_000),
    ]
    as_pairs = [sorted((product.bytes, product.operations) for product in listed) for listed in (found, expected)]
    assert as_pairs[0] == as_pairs[1]


def test_the_roofline_is_the_longer_of_reading_and_computing_of_each_product():
    """At 10 bytes and 100 operations a second: 3 s of reading, then 4 s of computing."""
    products = [Product(bytes=30, operations=100), Product(bytes=10, operations=400)]
    assert roofline_s(products, 10, 100) == 7
    assert floors(products, 10, 100) == {"floor_s": 7, "floor_bytes_s": 4, "floor_operations_s": 5}
    assert roofline_s(products, inf, 100) == 5


def test_the_peak_is_that_of_large_products():
    """Those of a row read far more than they compute."""
    square, row = torch.ones(2048, 2048), torch.ones(1, 2048)
    times = [timeit.timeit(lambda: row @ square, number=1) for _ in range(5)]
    assert peak_flop_per_s(torch.device("cpu"), torch.float32) > 2 * 2 * 2048**2 / min(times)


# ---- precisions -----------------------------------------------------------------------------------------------------


def test_a_copy_in_another_precision_is_the_rounded_model(demo):
    ids = torch.randint(demo.config.vocab_size, (1, 50))
    rounded = in_precision(demo, torch.bfloat16)
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16} and demo.dtype == torch.float32
    assert weight_bytes(rounded) == weight_bytes(demo) / 2
    own = load_model("demo", dtype="bfloat16").model
    with torch.no_grad():
        assert torch.equal(rounded(ids).logits, own(ids).logits)


def test_what_a_precision_costs():
    cpu = torch.device("cpu")
    coarse, fine = (cost_of_precision(dtype, cpu) for dtype in (torch.bfloat16, torch.float16))
    assert 1e-4 < fine.logits_rel_diff < coarse.logits_rel_diff < 0.05
    assert abs(fine.nll_diff) < abs(coarse.nll_diff) < 0.02


def test_precisions_take_turns_in_one_run(tmp_path):
    asked = {**SMALL, "engines": ["ours", "static"], "dtype": ["float32", "bfloat16"], "output_dir": str(tmp_path)}
    rows = measure_speed(**asked).records.set_index(["dtype", "engine", "press"])
    assert len(rows) == 2 * 3 and rows["failure"].isna().all() and rows["weights_id"].nunique() == 1
    full, half = (rows.loc[(dtype, "ours", "no_press")] for dtype in ("float32", "bfloat16"))
    for column in ("weight_bytes", "kv_bytes_full", "kv_bytes_compressed"):
        assert full[column] == 2 * half[column]
    assert full["bandwidth_bytes_per_s"] == half["bandwidth_bytes_per_s"]
    assert full["peak_flop_per_s"] != half["peak_flop_per_s"]
    assert rows["demo_nll_diff"].notna().sum() == 1 and half["demo_logits_rel_diff"] > 0
    assert "__dtype=bfloat16__" in half["run_id"] and "__dtype=float32__" in full["run_id"]


def test_bits_are_ours_alone_and_the_floor_counts_what_is_read(tmp_path):
    small = {**SMALL, "engines": ["ours", "kvpress"], "context_lengths": 200, "max_new_tokens": 4, "repeats": 1}
    small |= {"compression_ratio": 0.75, "dtype": "bfloat16", "kv_bits": [None, 4]}
    rows = measure_speed(**small, output_dir=str(tmp_path)).records
    assert rows["failure"].isna().all() and rows.loc[rows["engine"] == "kvpress", "kv_bits"].isna().all()
    assert len(rows) == 2 * 2 + 1 and rows["kv_bits"].eq(4).sum() == 2
    lm, n_heads, batch = load_model("demo", dtype="bfloat16").model, 6 * 4, 2
    products = [module for module in lm.modules() if isinstance(module, torch.nn.Linear)]
    weights = sum(parameter.nbytes for module in products for parameter in module.parameters())
    for _, row in rows[rows["engine"] == "ours"].iterrows():
        kept = {"no_press": 200, "snapkv": 50}[row["press"]]
        # in blocks of 64 tokens: half a byte for each number, and four for each channel and each token
        in_full, rounded = kept * 64 * 2 * 2, -(-kept // 64) * (64 * 64 * 2 // 2 + 4 * (64 + 64))
        held = batch * n_heads * (in_full if pd.isna(row["kv_bits"]) else rounded)
        added = batch * n_heads * 4 / 2 * 64 * 2 * 2  # half of the new tokens, in bfloat16
        assert row["kv_bytes_compressed"] == held
        assert row["floor_bytes_s"] * row["bandwidth_bytes_per_s"] == pytest.approx(weights + held + added, rel=1e-6)
        operations = 2 * batch * sum(module.weight.numel() for module in products)
        operations += 4 * 64 * batch * n_heads * (kept + 4 / 2)  # as many, however they are stored
        assert row["floor_operations_s"] * row["peak_flop_per_s"] == pytest.approx(operations, rel=1e-6)
    assert rows["demo_nll_diff"].notna().sum() == 1  # of precision alone


def test_names_without_what_is_left_at_its_default():
    def names(**asked):
        return declared(measure_speed, plan, {**DEFAULTS, **SMALL, **asked})

    plain = names()
    assert len(plain) == 5 and not any("dtype" in name or "chunk" in name or "engines" in name for name in plain)
    assert names(engines="static") == [name for name in plain if "engine=static" in name]
    chunks = names(prefill_chunk=64, evict_while_reading=True)
    assert {name for name in chunks if "engine=ours" not in name} == {
        name for name in plain if "engine=ours" not in name
    }
    told = {name.split("__")[2]: ("prefill_chunk=64" in name, "evict" in name) for name in chunks if "=ours" in name}
    assert told == {"no_press": (True, False), "snapkv": (True, True)}
    assert names(kv_bits=[None]) == plain and names(engines="stock", kv_bits=4) == names(engines="stock")
    rounded = set(names(kv_bits=[None, 8])) - set(plain)
    assert len(rounded) == 2 and all("engine=ours__kv_bits=8" in name for name in rounded)
