"""What is timed is the right thing: the same tokens from every engine, bytes from the shapes, failures as rows."""

import pytest
import torch
from conftest import stock_and_ours, tiny_config

from kvneox_lib.measures.clock import PeakMemory
from kvneox_lib.measures.speed import Timing, figures, is_out_of_memory, time_once, weight_bytes
from kvneox_lib.presses.by_name import make_press
from kvneox_lib.studies import speed as study_of_speed
from kvneox_lib.studies.speed import measure_speed

SMALL = {"model": "demo", "context_lengths": 150, "batch_sizes": 2, "max_new_tokens": 9, "press": "snapkv"}


def test_every_engine_decodes_the_same_tokens(demo, reading, monkeypatch):
    """Ours and kvpress' under a press, ours and stock without one."""
    ids, chosen = reading[:, 4000:4200], []
    project = torch.nn.Module.__call__

    def spy(module, *args, **kwargs):
        out = project(module, *args, **kwargs)
        if type(module).__name__ in ("KVNeoXModel", "GPTNeoXModel"):
            chosen.append((out.last_hidden_state[:, -1] @ demo.embed_out.weight.T).argmax(-1).tolist())
        return out

    monkeypatch.setattr(torch.nn.Module, "__call__", spy)
    said = {}
    for engine, press in (("ours", None), ("stock", None), ("ours", "snapkv"), ("kvpress", "snapkv")):
        chosen.clear()
        with torch.no_grad():
            timing = time_once(demo, engine, press and make_press(press, 0.75), ids, 6)
        said[engine, press] = list(chosen)
        assert timing.n_new == 6 and timing.step_s == timing.decode_s / 6 > 0
    assert said["ours", None] == said["stock", None] and len(said["ours", None]) == 7
    assert said["ours", "snapkv"] == said["kvpress", "snapkv"] != said["ours", None]


def test_bytes(demo, reading):
    ids, token = reading[:, :200], 2 * 6 * 256 * 4
    ours = time_once(demo, "ours", make_press("knorm", 0.75), ids, 5)
    assert (ours.kv_bytes_compressed, ours.kv_bytes) == (50 * token, 56 * token)
    masked = time_once(demo, "kvpress", make_press("adakv_snapkv", 0.75), ids, 5)
    freed = time_once(demo, "ours", make_press("adakv_snapkv", 0.75), ids, 5)
    assert masked.kv_bytes_compressed == 200 * token and freed.kv_bytes_compressed == 50 * token
    assert masked.kept_fraction == freed.kept_fraction == 0.25
    _, apart = stock_and_ours(tiny_config())  # embeddings not tied: a step looks one row up
    assert weight_bytes(apart) == 4 * (sum(p.numel() for p in apart.parameters()) - 97 * 128)
    assert weight_bytes(demo) == 4 * sum(p.numel() for p in demo.parameters())


def test_figures_are_medians_of_the_turns():
    turns = [Timing(1.0 + i, 2.0 * (1 + i), 4, 0.5, 10, 20, 100 * i) for i in (0, 1, 2, 3, 10)]
    found = figures(turns, batch_size=3, max_new_tokens=11, decode_only=False)
    assert (found["prefill_s"], found["step_s"], found["step_s_q25"], found["step_s_q75"]) == (3.0, 1.5, 1.0, 2.0)
    assert found["decode_tok_per_s"] == 2.0 and found["total_tok_per_s"] == 3 * 11 / (3.0 + 10 * 1.5)
    assert found["peak_bytes"] == 1000
    assert figures(turns, 3, 11, decode_only=True)["prefill_s"] is None


def test_the_study(tmp_path, monkeypatch):
    study = measure_speed(**SMALL, output_dir=str(tmp_path))
    rows = study.records.set_index(["engine", "press"])
    assert set(rows.index) == {("ours", "no_press"), ("ours", "snapkv"), ("stock", "no_press"), ("kvpress", "snapkv")}
    assert rows["failure"].isna().all() and (rows["step_s_q25"] <= rows["step_s"]).all()
    row = rows.loc[("ours", "snapkv")]
    read = row["weight_bytes"] + 2 * (37 + 1.5) * 2 * 6 * 256 * 4
    assert row["floor_s"] == pytest.approx(read / row["bandwidth_bytes_per_s"])
    assert row["times_floor"] == pytest.approx(row["step_s"] / row["floor_s"])
    assert (row["kv_bytes_full"], row["n_tokens"], row["context_tokens"]) == (2 * 150 * 2 * 6 * 256 * 4, 18, 150)
    monkeypatch.setattr(study_of_speed, "time_once", None)  # whoever measures now fails
    again = measure_speed(**SMALL, output_dir=str(tmp_path))
    assert again.records["step_s"].tolist() == study.records["step_s"].tolist()


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
    for engine in ("ours", "kvpress"):
        timing = time_once(demo, engine, None, reading[:, :100], 2)
        assert timing.prefill_peak_bytes > 0 and timing.peak_bytes > 0
