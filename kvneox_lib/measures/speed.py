"""How fast decoding is, how much memory it takes, and how far both are from what the machine allows.

A decoding step reads all weights once and the cache once. Bytes over the machine's own bandwidth, measured in the same
run, is the floor that no implementation gets under; beside it stands what was measured.
"""

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import Cache, DynamicCache

from kvneox_lib.inputs.windows import check_int
from kvneox_lib.measures.decoding import Clock, PeakMemory, first_position, generate, kept_counts, with_delimiter
from kvneox_lib.measures.verify import stock_twin
from kvneox_lib.neox.modeling import KVNeoXForCausalLM
from kvneox_lib.presses.facts import acts, applied, expand_presses, rows_independent
from kvneox_lib.studies import records
from kvneox_lib.studies.runs import Runs, Study, as_list

WARM_UP = 128  # tokens of context
ENGINES = {
    "ours": "generate() on a CompactCache",
    "stock": "transformers' GPTNeoXForCausalLM on a DynamicCache",
    "kvpress": "the loop of the kvpress pipeline on a DynamicCache",
}


@dataclass(frozen=True)
class Timing:
    """One prefill and the decoding of `n_new` tokens after the first."""

    prefill_s: float
    decode_s: float
    n_new: int
    kept_fraction: float  # of the entries, seen when decoding begins
    kv_bytes_compressed: int  # of the entries held then, masked ones included
    kv_bytes: int  # allocated when it ends
    peak_bytes: int | None  # of decoding

    @property
    def step_s(self) -> float:
        return self.decode_s / self.n_new


def time_once(model: KVNeoXForCausalLM, engine: str, press, input_ids: torch.Tensor, n_new: int) -> Timing:
    """Read `input_ids` under `press` and decode `n_new` tokens after the first, never stopping early."""
    if engine == "ours":
        made = generate(model, input_ids, press=press, max_new_tokens=n_new + 1, stop_at_eos=False)
        compressed = int(made.kv_lengths.sum()) * 2 * model.config.head_dim * model.dtype.itemsize
        kept = float(made.kv_lengths.float().mean()) / input_ids.shape[1]
        return Timing(made.prefill_s, made.decode_s, n_new, kept, compressed, made.kv_bytes, made.peak_bytes)
    stock = engine == "stock"
    return _time_loop(stock_twin(model, model.config._attn_implementation) if stock else model, press, input_ids, n_new)


@torch.no_grad()
def _time_loop(model, press, input_ids: torch.Tensor, n_new: int) -> Timing:
    clock, cache = Clock(input_ids.device), DynamicCache()
    with applied(press, model):
        read = with_delimiter(press, input_ids)
        hidden = model.base_model(input_ids=read, past_key_values=cache).last_hidden_state[:, -1:]
    token = model.embed_out(hidden).argmax(-1)
    prefill_s, compressed = clock.lap(), _bytes(cache)
    kept, peak = float(kept_counts(cache).float().mean()) / input_ids.shape[1], PeakMemory(input_ids.device)
    position = first_position(cache, input_ids.shape[1], press)
    with applied(press if acts(press) == "decoding" else None, model):
        for step in range(n_new):
            positions = torch.full((1, 1), position + step, device=token.device)
            token = model(token, past_key_values=cache, position_ids=positions).logits.argmax(-1)
    return Timing(prefill_s, clock.lap(), n_new, kept, compressed, _bytes(cache), peak.read())


def _bytes(cache: Cache) -> int:
    return sum(held.nbytes for layer in cache.layers for held in (layer.keys, layer.values))


def figures(timings: list[Timing], batch_size: int, max_new_tokens: int, decode_only: bool) -> dict[str, float | None]:
    """Medians and quartiles over the turns, for `max_new_tokens` tokens a sample. decode_only: without the prefill."""
    steps = [timing.step_s for timing in timings]
    prefills = [timing.prefill_s for timing in timings]
    found = {}
    for name, values in (("step_s", steps), ("prefill_s", prefills)):
        low, middle, high = np.percentile(values, [25, 50, 75])
        found |= {name: middle, f"{name}_q25": low, f"{name}_q75": high}
    whole = found["prefill_s"] + (max_new_tokens - 1) * found["step_s"]
    found |= {"decode_tok_per_s": batch_size / found["step_s"], "total_tok_per_s": batch_size * max_new_tokens / whole}
    if decode_only:
        found |= dict.fromkeys([name for name in found if name.startswith(("prefill", "total"))])
    peaks = [timing.peak_bytes for timing in timings if timing.peak_bytes is not None]
    found |= {"kv_bytes_compressed": timings[-1].kv_bytes_compressed, "kv_bytes": timings[-1].kv_bytes}
    return found | {"peak_bytes": max(peaks, default=None)}


def can_batch(engine: str, press, batch_size: int) -> bool:
    """kvpress' loop has no way to run row by row what mixes the rows of a batch; nor has ours while decoding."""
    return batch_size == 1 or rows_independent(press) or (engine == "ours" and acts(press) != "decoding")


def read_bandwidth(device: torch.device, repeats: int = 5) -> float:
    """Bytes a second, the best of a few sums over what no processor's cache holds."""
    n_bytes = 2**32 if device.type == "cuda" else 2**28  # so that starting a kernel costs nothing beside it
    data, clock, best = torch.ones(n_bytes // 4, device=device), Clock(device), float("inf")
    for _ in range(repeats):
        clock.lap()
        data.sum()
        best = min(best, clock.lap())
    return n_bytes / best


def weight_bytes(model: KVNeoXForCausalLM) -> int:
    """What a step reads of the weights: all but the input embedding, of which it looks up a row."""
    embedded = model.get_input_embeddings().weight
    tied = model.embed_out.weight.data_ptr() == embedded.data_ptr()
    return sum(p.nbytes for p in model.parameters()) - (0 if tied else embedded.nbytes)


def is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text


# ---- the study ----


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
