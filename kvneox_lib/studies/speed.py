"""Time and memory of decoding, variant by variant in turns: what notebook 03 runs."""

import itertools
import warnings

import numpy as np
import torch
from tqdm.auto import tqdm

from kvneox_lib.measures.speed import (
    ENGINES,
    WARM_UP,
    Timing,
    can_batch,
    figures,
    is_out_of_memory,
    read_bandwidth,
    time_once,
    weight_bytes,
)
from kvneox_lib.presses.by_name import expand_presses
from kvneox_lib.studies import arguments as may_be
from kvneox_lib.studies.plan import Planned, as_list, at_ratios
from kvneox_lib.studies.provenance import provenance
from kvneox_lib.studies.runs import Runs, Study

RANDOM_TOKENS = "random-tokens"


def plan(asked: dict, trained: int | None) -> list[Planned]:
    """For each context length and batch size: no compression in ours and in transformers' own, each press at each
    ratio in ours and in kvpress' loop."""
    presses = list(dict.fromkeys(["no_press", *expand_presses(asked["press"])]))
    return [
        run
        for length, batch in itertools.product(
            *(dict.fromkeys(as_list(asked[n])) for n in ("context_lengths", "batch_sizes"))
        )
        for engine in ENGINES
        for name in for_engine(engine, presses)
        for run in at_ratios(
            name,
            asked["compression_ratio"],
            dataset=RANDOM_TOKENS,
            context_length=length,
            batch_size=batch,
            engine=engine,
        )
    ]


def _cell(run: Planned) -> tuple[int, int]:
    return run.settings["context_length"], run.settings["batch_size"]


def measure_speed(
    *,
    model: may_be.Model = "pythia-70m",
    weights: may_be.Weights = "auto",
    press: may_be.Presses = "snapkv",
    compression_ratio: may_be.Ratios = 0.75,
    context_lengths: may_be.Counts = (512, 2048),
    batch_sizes: may_be.Counts = (1, 4),
    max_new_tokens: may_be.Count = 200,
    min_new_tokens: may_be.Count | None = None,
    decode_only: may_be.YesOrNo = False,
    repeats: may_be.Count = 3,
    attn_implementation: may_be.Attention = "auto",
    dtype: may_be.Dtype = "auto",
    device: may_be.Device = "auto",
    seed: may_be.Index = 0,
    output_dir: may_be.OutputDir = "results/speed",
    overwrite: may_be.Overwrite = False,
) -> Study:
    """Time and memory of prefill and decoding: each press at each ratio in ours and in kvpress' loop, no compression in
    ours and in transformers' own, for each context length and batch size.

    The variants of one context length and batch size take turns, `repeats` times; in a turn each reads the context and
    decodes its share of `max_new_tokens`, and nothing ends early. min_new_tokens: so many in each turn at least.
    """
    runs = Runs(measure_speed, plan, locals())
    runs.times_on_this_machine()
    lm, n_turn = runs.loaded.model, max(-(-max_new_tokens // repeats), min_new_tokens or 0, 2)
    open_runs = runs.open()
    progress = tqdm(total=repeats * len(open_runs), unit="轮", desc="速度")
    for (length, batch), cell in itertools.groupby(open_runs, _cell):
        started, variants = provenance(runs.device), list(cell)
        ids = torch.randint(lm.config.vocab_size, (batch, length), device=runs.device)
        timings, bandwidths = [[] for _ in variants], []
        for _ in range(repeats):
            bandwidths.append(read_bandwidth(runs.device))
            for run, found in zip(variants, timings):
                progress.set_postfix_str(f"{run.settings['engine']} {run.press}, {length} × {batch}")
                found.append(_time_or_why_not(runs, run, ids, n_turn))
                progress.update()
        for run, found in zip(variants, timings):
            record = _record(lm, found, run.settings, max_new_tokens, decode_only, float(np.median(bandwidths)))
            runs.write(run, length, started, record, {})
    progress.close()
    return runs.study()


def for_engine(engine: str, names: list[str]) -> list[str]:
    if engine == "ours":
        return names
    return ["no_press"] if engine == "stock" else [name for name in names if name != "no_press"]


def _time_or_why_not(runs: Runs, run: Planned, ids, n_turn: int) -> Timing | str:
    engine = run.settings["engine"]
    with runs.presses([run]) as (press,), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*the model was trained on")  # time does not depend on that
        if not can_batch(engine, press, len(ids)):
            return "mixes the rows of a batch"
        try:
            time_once(runs.loaded.model, engine, press, ids[:, :WARM_UP], 2)
            return time_once(runs.loaded.model, engine, press, ids, n_turn)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return "out of memory"
        except (ValueError, AssertionError) as refusal:  # kvpress states its limits by assertion
            return " ".join(str(refusal).split()) or f"{run.press} refuses this context"


def _record(lm, timings: list, cell: dict, max_new_tokens: int, decode_only: bool, bandwidth: float) -> dict:
    """The figures of one variant; of one that could not be timed, why."""
    batch, n_cached = cell["batch_size"], 2 * lm.config.num_hidden_layers * lm.config.hidden_size
    token_bytes = n_cached * batch * lm.dtype.itemsize
    found = dict.fromkeys(["kept_fraction", "nll_mean", "n_tokens", "failure"])
    found |= {"bandwidth_bytes_per_s": bandwidth, "weight_bytes": weight_bytes(lm)}
    found["kv_bytes_full"] = cell["context_length"] * token_bytes
    failed = [timing for timing in timings if isinstance(timing, str)]
    if failed:
        return found | {"failure": failed[0]}
    found |= figures(timings, batch, max_new_tokens, decode_only)
    found |= {"kept_fraction": timings[-1].kept_fraction, "n_tokens": batch * max_new_tokens}
    read = found["weight_bytes"] + found["kv_bytes_compressed"] + timings[0].n_new / 2 * token_bytes
    return found | {"floor_s": read / bandwidth, "times_floor": found["step_s"] * bandwidth / read}
