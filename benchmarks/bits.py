"""What fewer bits do to a decoding step on the shape of pythia-70m with random weights, no press, in one run in which
all take turns: a step from a bfloat16 cache over one from 8, 4 and 2 bits, steps over their rooflines (of the bytes
really read), what packing adds to the first token, and the kernel alone, which shows where unpacking takes over from
reading.

    python benchmarks/bits.py            # about 5 minutes on two cores
    python benchmarks/bits.py --quick    # contexts of an eighth, to see that it runs
"""

import sys
import time
import warnings

import numpy as np
import torch

from kvneox_lib import load_model
from kvneox_lib.measures.speed import peak_flop_per_s, read_bandwidth, roofline_s, step_products, time_once
from kvneox_lib.neox import compiled
from kvneox_lib.neox.bits import BITS
from kvneox_lib.neox.ragged import RaggedLayer

warnings.filterwarnings("ignore", message=".*the model was trained on")
SHORTER = 8 if "--quick" in sys.argv else 1
ROUNDS, N_NEW = 5, 33
STORED = (None, *BITS)
CELLS = ((16, 2048), (1, 16384))  # batch, context
AIMS = {8: "at least 1.15", 4: "at least 1"}


def measure_steps(model, batch: int, n_context: int, peak: float) -> None:
    ids = torch.randint(50_000, (batch, n_context))
    for bits in STORED:
        time_once(model, "ours", None, ids[:, :128], N_NEW, kv_bits=bits)
    timed, bandwidths = {bits: [] for bits in STORED}, []
    for _ in range(ROUNDS):
        bandwidths.append(read_bandwidth(ids.device))
        for bits in STORED:
            timed[bits].append(time_once(model, "ours", None, ids, N_NEW, kv_bits=bits))
    print(f"\nbatch {batch}, {n_context} tokens, {ROUNDS} rounds, {spread(np.array(bandwidths) / 1e9)} GB/s")
    entries = model.config.num_hidden_layers * model.config.num_attention_heads * batch * n_context
    for bits, timings in timed.items():
        steps, prefills = (np.array([getattr(one, name) for one in timings]) for name in ("step_s", "prefill_s"))
        products = step_products(model, batch, entries, timings[0].kv_bytes_compressed)
        floors = np.array([roofline_s(products, bandwidth, peak) for bandwidth in bandwidths])
        bytes_read = timings[0].kv_bytes_compressed / 1e6
        print(f"  {named(bits):9} {spread(1e3 * steps)} ms a step, {spread(steps / floors)} of its roofline; ", end="")
        print(f"{bytes_read:.0f} MB of cache; first token after {spread(prefills)} s")
    for bits in BITS:
        ratios = [one.step_s / other.step_s for one, other in zip(timed[None], timed[bits])]
        aim = f"   (aim: {AIMS[bits]})" if bits in AIMS else ""
        print(f"  bfloat16 / {named(bits):9} {spread(np.array(ratios))}{aim}", flush=True)


@torch.no_grad()
def measure_kernel(batch: int, n_context: int, heads: int = 8, dim: int = 64) -> None:
    """One query over one layer's cache, of which there are as many as no processor's cache holds."""
    states = torch.randn(batch * heads, n_context, dim, dtype=torch.bfloat16)
    n_copies = max(1, 2**28 // (2 * states.nbytes))
    queries = torch.randn(batch * heads, 1, dim)
    layers = {
        bits: [RaggedLayer([*states], [*states], batch, n_context, 1, bits or 0) for _ in range(n_copies)]
        for bits in STORED
    }
    seconds = {bits: [] for bits in STORED}
    one = torch.randn(batch, heads, 1, dim, dtype=torch.bfloat16)
    for same in layers.values():
        for layer in same:
            layer.attend(one, one, one, dim**-0.5)
    for _ in range(ROUNDS):
        for bits, same in layers.items():
            start = time.perf_counter()
            for layer in same:
                compiled.attend(queries, layer.held.as_rows(), layer._new_rows())
            seconds[bits].append((time.perf_counter() - start) / n_copies)
    print("  the kernel alone:")
    for bits, same in layers.items():
        rates = same[0].held.nbytes / np.array(seconds[bits]) / 1e9
        numbers = 2 * states.numel() / np.array(seconds[bits]) / 1e9
        print(f"  {named(bits):9} {spread(rates)} GB/s, {spread(numbers)} thousand million numbers a second")


def named(bits: int | None) -> str:
    return "bfloat16" if bits is None else f"{bits} bits"


def spread(values: np.ndarray) -> str:
    return f"{np.median(values):.2f} ({values.min():.2f} to {values.max():.2f})"


if __name__ == "__main__":
    torch.manual_seed(0)
    model = load_model("pythia-70m", weights="random", dtype="bfloat16", device="cpu").model
    peak = peak_flop_per_s(model.device, model.dtype)
    for batch, n_context in CELLS:
        measure_steps(model, batch, n_context // SHORTER, peak)
        measure_kernel(batch, n_context // SHORTER)
