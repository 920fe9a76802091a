"""Time and memory of decoding, variant by variant in turns: what notebook 03 runs."""

import itertools
import warnings
from collections.abc import Iterable, Sequence
from typing import Annotated

import numpy as np
import torch
from tqdm.auto import tqdm

from kvneox_lib.inputs.weights import find_dtype
from kvneox_lib.measures.precision import cost_of_precision, in_precision
from kvneox_lib.measures.speed import (
    ENGINES,
    WARM_UP,
    Timing,
    can_batch,
    entry_bytes,
    figures,
    floors,
    is_out_of_memory,
    peak_flop_per_s,
    read_bandwidth,
    step_products,
    time_once,
    weight_bytes,
)
from kvneox_lib.neox.modeling import KVNeoXForCausalLM
from kvneox_lib.presses.by_name import expand_presses
from kvneox_lib.studies import arguments as may_be
from kvneox_lib.studies.plan import Planned, as_list, at_ratios, bits_of, left_out, strengths
from kvneox_lib.studies.provenance import provenance
from kvneox_lib.studies.runs import Runs, Study, made_presses

RANDOM_TOKENS = "random-tokens"
Engines = Annotated[str | Sequence[str], may_be.one_of(*ENGINES, several=True)]


def plan(asked: dict, trained: int | None) -> list[Planned]:
    """For each context length, batch size and precision: no compression in ours and in transformers' own, each press at
    each ratio in ours, in each number of bits, and in kvpress' loop."""
    if asked["evict_while_reading"] and asked["prefill_chunk"] is None:
        raise ValueError(
            "evict_while_reading=True: wants prefill_chunk, the number of tokens read before each eviction"
        )
    presses = list(dict.fromkeys(["no_press", *expand_presses(asked["press"])]))
    kv_bits = {"ours": asked["kv_bits"]}  # the others know of none
    if "ours" in as_list(asked["engines"]):
        left_out(presses, asked["kv_bits"])
    varied = (dict.fromkeys(as_list(asked[name])) for name in ("context_lengths", "batch_sizes", "dtype", "engines"))
    planned = [
        run
        for length, batch, dtype, engine in itertools.product(*varied)
        for name in for_engine(engine, presses)
        for bits in bits_of(name, kv_bits.get(engine))
        for run in at_ratios(
            name,
            *strengths(asked),
            dataset=RANDOM_TOKENS,
            context_length=length,
            batch_size=batch,
            dtype=dtype,
            engine=engine,
            kv_bits=bits,
            **_reading(asked, engine, name),
        )
    ]
    if not planned:
        raise ValueError(
            f"engines={asked['engines']!r}: kvpress alone times nothing without a press; give one, or ours"
        )
    return planned


def _reading(asked: dict, engine: str, press: str) -> dict:
    """Chunks are ours alone, and without a press nothing is evicted: those runs are the same whatever is asked."""
    chunk = asked["prefill_chunk"] if engine == "ours" else None
    return {
        "prefill_chunk": chunk,
        "evict_while_reading": bool(chunk and asked["evict_while_reading"] and press != "no_press"),
    }


def _cell(run: Planned) -> tuple[int, int]:
    return run.settings["context_length"], run.settings["batch_size"]


def measure_speed(
    *,
    model: may_be.Model = "pythia-70m",
    revision: may_be.Revision | None = None,
    weights: may_be.Weights = "auto",
    press: may_be.Presses = "snapkv",
    compression_ratio: may_be.Ratios = 0.75,
    keep_tokens: may_be.Budgets | None = None,
    kv_bits: may_be.Bits = None,
    context_lengths: may_be.Counts = (2048,),
    batch_sizes: may_be.Counts = (1, 4),
    engines: Engines = ("ours", "stock", "static", "kvpress"),
    prefill_chunk: may_be.Count | None = None,
    evict_while_reading: may_be.YesOrNo = False,
    max_new_tokens: may_be.Count = 200,
    min_new_tokens: may_be.Count | None = None,
    decode_only: may_be.YesOrNo = False,
    repeats: may_be.Count = 3,
    attn_implementation: may_be.Attention = "auto",
    dtype: may_be.Dtypes = "auto",
    device: may_be.Device = "auto",
    seed: may_be.Index = 0,
    output_dir: may_be.OutputDir = "results/speed",
    overwrite: may_be.Overwrite = False,
) -> Study:
    """Time and memory of prefill and decoding: each press at each ratio in ours and in kvpress' loop, no compression in
    ours and in transformers' own, for each context length, batch size and precision.

    The variants of one context length and batch size take turns, `repeats` times; in a turn each reads the context and
    decodes its share of `max_new_tokens`, and nothing ends early. What they took in each turn is in their records, and
    those that took turns with each other have the same `started_at`. min_new_tokens: so many in each turn at least.
    keep_tokens: entries of each head to keep, one budget or several, in the place of compression_ratio.
    prefill_chunk, evict_while_reading, kv_bits: how ours reads the context and keeps what is left; see `generate`.
    """
    runs = Runs(measure_speed, plan, locals())
    if "ours" in as_list(engines):
        runs.say_what_is_left_out()
    runs.times_on_this_machine()
    n_turn = max(-(-max_new_tokens // repeats), min_new_tokens or 0, 2)
    open_runs = runs.open()
    models = _models(runs, open_runs)
    progress = tqdm(total=repeats * len(open_runs), unit="轮", desc="速度")
    for (length, batch), cell in itertools.groupby(open_runs, _cell):
        started, variants = provenance(runs.device), list(cell)
        ids = torch.randint(runs.loaded.model.config.vocab_size, (batch, length), device=runs.device)
        timings, rates = [[] for _ in variants], []
        for turn in range(repeats):
            rates.append(_rates(runs.device, models))
            for run, found in _to_and_fro(list(zip(variants, timings)), turn):
                progress.set_postfix_str(f"{run.settings['engine']} {run.press}, {length} × {batch}")
                found.append(_time_or_why_not(models[_precision(runs, run)], run, ids, n_turn, runs.asked))
                progress.update()
        for run, found in zip(variants, timings):
            lm = models[_precision(runs, run)]
            record = _record(lm, found, run.settings, max_new_tokens, decode_only, rates)
            runs.write(run, length, started, record | _accuracy(run, lm), {})
    progress.close()
    return runs.study()


def _to_and_fro(variants: list, turn: int) -> list:
    """Every other turn in reverse: a machine that grows slower all the time then favours no variant."""
    return variants[:: -1 if turn % 2 else 1]


def for_engine(engine: str, names: list[str]) -> list[str]:
    if engine == "ours":
        return names
    return [name for name in names if name != "no_press"] if engine == "kvpress" else ["no_press"]


def _precision(runs: Runs, run: Planned) -> torch.dtype:
    return find_dtype(run.settings["dtype"], runs.device)


def _models(runs: Runs, open_runs: list[Planned]) -> dict[torch.dtype, KVNeoXForCausalLM]:
    """The model in each precision: rounded from the one that was loaded, so that all have the same weights."""
    loaded, wanted = runs.loaded.model, dict.fromkeys(_precision(runs, run) for run in open_runs)
    return {dtype: loaded if dtype == loaded.dtype else in_precision(loaded, dtype) for dtype in wanted}


def _rates(device: torch.device, dtypes: Iterable[torch.dtype]) -> dict:
    """Of the machine now: bytes a second, and operations a second in each precision."""
    return {"bytes": read_bandwidth(device)} | {dtype: peak_flop_per_s(device, dtype) for dtype in dtypes}


def _time_or_why_not(lm: KVNeoXForCausalLM, run: Planned, ids, n_turn: int, asked: dict) -> Timing | str:
    engine, chunk = run.settings["engine"], run.settings["prefill_chunk"]
    evicting = run.settings["evict_while_reading"]
    reading = {} if chunk is None else {"prefill_chunk": chunk, "evict_while_reading": evicting}
    reading |= {} if run.settings["kv_bits"] is None else {"kv_bits": run.settings["kv_bits"]}
    with made_presses(lm, [run], asked["attn_implementation"], asked["seed"]) as (press,), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*the model was trained on")  # time does not depend on that
        if not can_batch(engine, press, len(ids)):
            return "mixes the rows of a batch"
        try:
            time_once(lm, engine, press, ids[:, :WARM_UP], 2, **reading)
            return time_once(lm, engine, press, ids, n_turn, **reading)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return "out of memory"
        except (ValueError, AssertionError) as refusal:  # kvpress states its limits by assertion
            return " ".join(str(refusal).split()) or f"{run.press} refuses this context"


def _record(lm, timings: list, cell: dict, max_new_tokens: int, decode_only: bool, rates: list[dict]) -> dict:
    """The figures of one variant; of one that could not be timed, why."""
    batch, n_heads = cell["batch_size"], lm.config.num_hidden_layers * lm.config.num_attention_heads
    found = dict.fromkeys(["kept_fraction", "nll_mean", "n_tokens", "failure"])
    reads, works = [rate["bytes"] for rate in rates], [rate[lm.dtype] for rate in rates]
    bandwidth, peak = float(np.median(reads)), float(np.median(works))
    found |= {"bandwidth_bytes_per_s": bandwidth, "peak_flop_per_s": peak, "weight_bytes": weight_bytes(lm)}
    found |= {"bandwidth_low_bytes_per_s": min(reads), "bandwidth_high_bytes_per_s": max(reads)}
    found["kv_bytes_full"] = cell["context_length"] * batch * n_heads * entry_bytes(lm)
    failed = [timing for timing in timings if isinstance(timing, str)]
    if failed:
        return found | {"failure": failed[0]}
    found |= figures(timings, batch, max_new_tokens, decode_only)
    found |= {"kept_fraction": timings[-1].kept_fraction, "n_tokens": batch * max_new_tokens}
    held, added = found["kv_bytes_compressed"] / entry_bytes(lm), timings[0].n_new / 2 * batch * n_heads
    if cell["kv_bits"] is not None:  # then bytes do not tell how many there are
        held = found["kept_fraction"] * cell["context_length"] * batch * n_heads
    read = found["kv_bytes_compressed"] + added * entry_bytes(lm)
    found |= floors(step_products(lm, batch, held + added, read), bandwidth, peak)
    return found | {"times_floor": found["step_s"] / found["floor_s"]}


def _accuracy(run: Planned, lm: KVNeoXForCausalLM) -> dict[str, float | None]:
    """What rounding the weights costs: once for each precision, in the records of ours without a press."""
    plain = (run.settings["engine"], run.press, run.settings["kv_bits"]) == ("ours", "no_press", None)
    if lm.dtype == torch.float32 or not plain:
        return {"demo_logits_rel_diff": None, "demo_nll_diff": None}
    cost = cost_of_precision(lm.dtype, lm.device)
    return {"demo_logits_rel_diff": cost.logits_rel_diff, "demo_nll_diff": cost.nll_diff}
