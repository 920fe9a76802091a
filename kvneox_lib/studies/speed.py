"""Time and memory of decoding, variant by variant in turns: what notebook 03 runs."""

import itertools
import warnings
from collections.abc import Sequence

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
from kvneox_lib.neox.checks import check_int
from kvneox_lib.presses.by_name import expand_presses
from kvneox_lib.studies import records
from kvneox_lib.studies.runs import Runs, Study, as_list


def measure_speed(
    *,
    model: str = "pythia-70m",
    weights: str = "auto",
    press: str | Sequence[str] = "snapkv",
    compression_ratio: float | Sequence[float] = 0.75,
    context_lengths: Sequence[int] = (512, 2048),
    batch_sizes: Sequence[int] = (1, 4),
    max_new_tokens: int = 200,
    min_new_tokens: int | None = None,
    decode_only: bool = False,
    repeats: int = 3,
    attn_implementation: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    seed: int = 0,
    output_dir: str = "results/speed",
    overwrite: bool = False,
) -> Study:
    """Time and memory of prefill and decoding: each press at each ratio in ours and in kvpress' loop, no compression in
    ours and in transformers' own, for each context length and batch size.

    The variants of one context length and batch size take turns, `repeats` times; in a turn each reads the context and
    decodes its share of `max_new_tokens`, and nothing ends early. min_new_tokens: so many in each turn at least.
    """
    asked = locals()
    for name, value in (("max_new_tokens", max_new_tokens), ("repeats", repeats)):
        check_int(name, value, 1)
    runs = Runs(measure_speed, asked)
    lm, n_turn = runs.loaded.model, max(-(-max_new_tokens // repeats), min_new_tokens or 0, 2)
    runs.parameters |= {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens, "repeats": repeats}
    runs.parameters |= {"decode_only": decode_only, "n_threads": torch.get_num_threads()}
    runs.parameters |= {"device_name": records.provenance(runs.device)["device_name"]}  # times are of one machine
    names, cells = ["no_press", *expand_presses(press)], []
    for context_length, batch_size in itertools.product(as_list(context_lengths), as_list(batch_sizes)):
        check_int("context_lengths", context_length, 1)
        check_int("batch_sizes", batch_size, 1)
        cell = {"context_length": context_length, "batch_size": batch_size}
        pending = [
            (engine, name, ratio)
            for engine in ENGINES
            for name, ratios in runs.pending(for_engine(engine, names), compression_ratio, **cell, engine=engine)
            for ratio in ratios
        ]
        cells.append((cell, pending))
    progress = tqdm(total=repeats * sum(len(pending) for _, pending in cells), unit="轮", desc="速度")
    for cell, pending in cells:
        started = records.provenance(runs.device)
        ids = torch.randint(lm.config.vocab_size, (cell["batch_size"], cell["context_length"]), device=runs.device)
        timings, bandwidths = {variant: [] for variant in pending}, []
        for _ in range(repeats if pending else 0):
            bandwidths.append(read_bandwidth(runs.device))
            for variant in pending:
                progress.set_postfix_str(f"{variant[0]} {variant[1]}, {cell['context_length']} × {cell['batch_size']}")
                timings[variant].append(_time_or_why_not(runs, *variant, ids, n_turn))
                progress.update()
        for (engine, name, ratio), found in timings.items():
            record = _record(lm, found, cell, max_new_tokens, decode_only, float(np.median(bandwidths)))
            runs.write(name, ratio, cell["context_length"], started, record, {}, **cell, engine=engine)
    progress.close()
    return runs.study()


def for_engine(engine: str, names: list[str]) -> list[str]:
    if engine == "ours":
        return names
    return ["no_press"] if engine == "stock" else [name for name in names if name != "no_press"]


def _time_or_why_not(runs: Runs, engine: str, name: str, ratio: float | None, ids, n_turn: int) -> Timing | str:
    with runs.presses(name, [ratio]) as (press,), warnings.catch_warnings():
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
            return " ".join(str(refusal).split()) or f"{name} refuses this context"


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
