"""How fast decoding is, how much memory it takes, and how far both are from what the machine allows.

A decoding step reads all weights once and the cache once. Bytes over the machine's own bandwidth, measured in the same
run, is the floor that no implementation gets under; beside it stands what was measured.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import Cache, DynamicCache

from kvneox_lib.measures.clock import Clock, PeakMemory
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
    prefill_peak_bytes: int | None = None

    @property
    def step_s(self) -> float:
        return self.decode_s / self.n_new


def time_once(model: KVNeoXForCausalLM, engine: str, press, input_ids: torch.Tensor, n_new: int) -> Timing:
    """Read `input_ids` under `press` and decode `n_new` tokens after the first, never stopping early."""
    if engine == "ours":
        made = generate(model, input_ids, press=press, max_new_tokens=n_new + 1, stop_at_eos=False)
        compressed = int(made.kv_lengths.sum()) * 2 * model.config.head_dim * model.dtype.itemsize
        kept = float(made.kv_lengths.float().mean()) / input_ids.shape[1]
        peaks = made.peak_bytes, made.prefill_peak_bytes
        return Timing(made.prefill_s, made.decode_s, n_new, kept, compressed, made.kv_bytes, *peaks)
    stock = engine == "stock"
    return _time_loop(stock_twin(model, model.config._attn_implementation) if stock else model, press, input_ids, n_new)


@torch.no_grad()
@in_turn
def _time_loop(model, press, input_ids: torch.Tensor, n_new: int) -> Timing:
    check_context(press, input_ids.shape[1])
    peak, clock, cache = PeakMemory(input_ids.device), Clock(input_ids.device), DynamicCache()
    with applied(press, model):
        read = with_delimiter(press, input_ids)
        hidden = model.base_model(input_ids=read, past_key_values=cache).last_hidden_state[:, -1:]
    token = model.embed_out(hidden).argmax(-1)
    prefill_s, compressed = clock.lap(), _bytes(cache)
    kept, prefill_peak = float(kept_counts(cache).float().mean()) / input_ids.shape[1], peak.lap()
    position = first_position(cache, input_ids.shape[1], press)
    with applied(decoding_part(press), model):
        for step in range(n_new):
            positions = torch.full((1, 1), position + step, device=token.device)
            token = model(token, past_key_values=cache, position_ids=positions).logits.argmax(-1)
    decode_s, kv_bytes = clock.lap(), _bytes(cache)
    return Timing(prefill_s, decode_s, n_new, kept, compressed, kv_bytes, peak.lap(), prefill_peak)


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
    return batch_size == 1 or rows_independent(press) or (engine == "ours" and decoding_part(press) is None)


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
