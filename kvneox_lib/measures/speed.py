"""How fast decoding is, how much memory it takes, and how far both are from what the machine allows.

A decoding step is a series of products: few rows with each weight, one query with the keys and values held. None of
them can be done before its operands are read, nor before its operations are done; both rates of the machine are
measured in the same run. The sum over the products, the roofline, is the floor; beside it stands what was measured.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

import numpy as np
import torch
from torch import nn
from transformers import Cache, DynamicCache, StaticCache

from kvneox_lib.measures.clock import Clock, PeakMemory, resident_bytes
from kvneox_lib.measures.decoding import generate
from kvneox_lib.measures.prefill import first_position, with_delimiter
from kvneox_lib.measures.survivors import kept_counts
from kvneox_lib.neox.hooks import in_turn
from kvneox_lib.neox.modeling import KVNeoXForCausalLM, stock_twin
from kvneox_lib.presses.applying import applied, check_context
from kvneox_lib.presses.facts import decoding_part, rows_independent

WARM_UP = 128  # tokens of context
ENGINES = {
    "ours": "generate() on a CompactCache",
    "stock": "transformers' GPTNeoXForCausalLM on a DynamicCache",
    "static": "the same on a StaticCache",
    "kvpress": "the loop of the kvpress pipeline on a DynamicCache",
}


# ---- what was measured ----------------------------------------------------------------------------------------------


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
    prefill_peak_bytes: int | None = None
    resident_bytes: int | None = None  # before the run

    @property
    def step_s(self) -> float:
        return self.decode_s / self.n_new


def time_once(model: KVNeoXForCausalLM, engine: str, press, input_ids: torch.Tensor, n_new: int, **reading) -> Timing:
    """Read `input_ids` under `press` and decode `n_new` tokens after the first, never stopping early. reading: how ours
    reads the context and keeps it, for `generate`."""
    if engine != "ours":
        stock = engine in ("stock", "static")
        other = stock_twin(model, model.config._attn_implementation) if stock else model
        return _time_loop(other, engine, press, input_ids, n_new)
    before = resident_bytes(input_ids.device)
    made = generate(model, input_ids, press=press, max_new_tokens=n_new + 1, stop_at_eos=False, **reading)
    kept = float(made.kv_lengths.float().mean()) / input_ids.shape[1]
    memory = made.kv_bytes, made.peak_bytes, made.prefill_peak_bytes, before
    return Timing(made.prefill_s, made.decode_s, n_new, kept, made.kv_bytes_compressed, *memory)


@torch.no_grad()
@in_turn
def _time_loop(model, engine: str, press, input_ids: torch.Tensor, n_new: int) -> Timing:
    n_context = input_ids.shape[1]
    check_context(press, n_context)
    before = resident_bytes(input_ids.device)
    static = engine == "static"
    cache = StaticCache(config=model.config, max_cache_len=n_context + n_new) if static else DynamicCache()
    peak, clock = PeakMemory(input_ids.device), Clock(input_ids.device)
    with applied(press, model):
        read = with_delimiter(press, input_ids)
        hidden = model.base_model(input_ids=read, past_key_values=cache).last_hidden_state[:, -1:]
    token = model.embed_out(hidden).argmax(-1)
    prefill_s, compressed, kept = clock.lap(), _bytes(cache), float(kept_counts(cache).float().mean()) / n_context
    if static:  # what it holds are the context, and room
        compressed, kept = compressed * n_context // (n_context + n_new), 1.0
    prefill_peak = peak.lap()
    clock.lap()  # asking for the peak takes milliseconds
    position = n_context if static else first_position(cache, n_context, press)
    with applied(decoding_part(press), model):
        for step in range(n_new):
            positions = torch.full((1, 1), position + step, device=token.device)
            # A static cache that is not told looks through its keys at each step for how many there are.
            place = {"cache_position": positions[0]} if static else {}
            token = model(token, past_key_values=cache, position_ids=positions, **place).logits.argmax(-1)
    decode_s, kv_bytes = clock.lap(), _bytes(cache)
    return Timing(prefill_s, decode_s, n_new, kept, compressed, kv_bytes, peak.lap(), prefill_peak, before)


def _bytes(cache: Cache) -> int:
    return sum(held.nbytes for layer in cache.layers for held in (layer.keys, layer.values))


def figures(timings: list[Timing], batch_size: int, max_new_tokens: int, decode_only: bool) -> dict:
    """Medians and quartiles over the turns, for `max_new_tokens` tokens a sample, and what each turn took: what is
    compared with another variant is compared within a turn. decode_only: without the prefill."""
    steps = [timing.step_s for timing in timings]
    prefills = [timing.prefill_s for timing in timings]
    found = {"step_turns_s": steps, "prefill_turns_s": prefills}
    for name, values in (("step_s", steps), ("prefill_s", prefills)):
        low, middle, high = np.percentile(values, [25, 50, 75])
        found |= {name: middle, f"{name}_q25": low, f"{name}_q75": high}
    whole = found["prefill_s"] + (max_new_tokens - 1) * found["step_s"]
    found |= {"decode_tok_per_s": batch_size / found["step_s"], "total_tok_per_s": batch_size * max_new_tokens / whole}
    found |= _peaks(timings)
    if decode_only:
        found |= dict.fromkeys([name for name in found if name.startswith(("prefill", "total"))])
    return found | {"kv_bytes_compressed": timings[-1].kv_bytes_compressed, "kv_bytes": timings[-1].kv_bytes}


def _peaks(timings: list[Timing]) -> dict[str, int | None]:
    """The highest of both phases: of all that the process has in use, and above what it had before the run."""
    found = {}
    for phase in ("", "prefill_"):
        peaks = [(getattr(timing, f"{phase}peak_bytes"), timing.resident_bytes) for timing in timings]
        known = [(peak, before) for peak, before in peaks if peak is not None and before is not None]
        found[f"{phase}peak_bytes"] = max((peak for peak, _ in known), default=None)
        found[f"{phase}peak_above_bytes"] = max((peak - before for peak, before in known), default=None)
    return found


def can_batch(engine: str, press, batch_size: int) -> bool:
    """kvpress' loop has no way to run row by row what mixes the rows of a batch; nor has ours while decoding."""
    return batch_size == 1 or rows_independent(press) or (engine == "ours" and decoding_part(press) is None)


def is_out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in text


# ---- what the machine allows ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Product:
    """What one product cannot do without."""

    bytes: int  # read
    operations: int


def step_products(model: KVNeoXForCausalLM, batch: int, entries: float, kv_bytes: float | None = None) -> list[Product]:
    """Those of a decoding step. entries: held by all heads of all layers for all rows, a key and a value each, in so
    many bytes, if they are not as the model's numbers are."""
    kv_bytes = entries * entry_bytes(model) if kv_bytes is None else kv_bytes
    found = [_product(module, batch) for module in model.modules() if isinstance(module, nn.Linear)]
    return [*found, Product(round(kv_bytes), round(entries * 4 * model.config.head_dim))]


def _product(module: nn.Linear, rows: int) -> Product:
    weights = sum(parameter.nbytes for parameter in module.parameters(recurse=False))
    return Product(weights, 2 * rows * module.weight.numel())


def roofline_s(products: Iterable[Product], bandwidth: float, peak: float) -> float:
    """Seconds, one product after the other, each as long as the longer of reading and computing."""
    return sum(max(product.bytes / bandwidth, product.operations / peak) for product in products)


def floors(products: list[Product], bandwidth: float, peak: float) -> dict[str, float]:
    """The roofline, and what it would be if reading, or computing, cost nothing."""
    return {
        "floor_s": roofline_s(products, bandwidth, peak),
        "floor_bytes_s": roofline_s(products, bandwidth, inf),
        "floor_operations_s": roofline_s(products, inf, peak),
    }


def entry_bytes(model: KVNeoXForCausalLM) -> int:
    """Of a key and a value of one head."""
    return 2 * model.config.head_dim * model.dtype.itemsize


def weight_bytes(model: KVNeoXForCausalLM) -> int:
    """What a step reads of the weights: all but the input embedding, of which it looks up a row."""
    embedded = model.get_input_embeddings().weight
    tied = model.embed_out.weight.data_ptr() == embedded.data_ptr()
    return sum(p.nbytes for p in model.parameters()) - (0 if tied else embedded.nbytes)


def read_bandwidth(device: torch.device, repeats: int = 5) -> float:
    """Bytes a second, the best of a few sums over what no processor's cache holds."""
    n_bytes = 2**32 if device.type == "cuda" else 2**28  # so that starting a kernel costs nothing beside it
    data = torch.ones(n_bytes // 4, device=device)
    return n_bytes / _best_s(device, data.sum, repeats)


def peak_flop_per_s(device: torch.device, dtype: torch.dtype, repeats: int = 5) -> float:
    """Operations a second, the best of a few products of large matrices."""
    n = 8192 if device.type == "cuda" else 1024
    square = torch.ones(n, n, device=device, dtype=dtype)
    return 2 * n**3 / _best_s(device, lambda: square @ square, repeats)


def _best_s(device: torch.device, work, repeats: int) -> float:
    clock, best = Clock(device), inf
    for _ in range(repeats):
        clock.lap()
        work()
        best = min(best, clock.lap())
    return best
