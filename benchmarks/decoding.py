"""What CompactCache gains, on the shape of pythia-70m with random weights, in one interleaved run: ratios of decoding
steps to transformers' DynamicCache and to kvpress' loop, times over the memory floor, bytes, and the peak of memory.

    python benchmarks/decoding.py            # about 10 minutes on two cores
    python benchmarks/decoding.py --quick    # contexts of an eighth, to see that it runs
"""

import subprocess
import sys
import warnings

import numpy as np
import torch

from kvneox_lib import load_model, make_press
from kvneox_lib.measures.speed import read_bandwidth, time_once, weight_bytes

warnings.filterwarnings("ignore", message=".*the model was trained on")
ROUNDS, N_NEW = 3, 16
SHORTER = 8 if "--quick" in sys.argv else 1
CELLS = {  # (batch, context): the variants that take turns
    (16, 2048): [("stock", "no_press"), ("ours", "no_press"), ("ours", "snapkv")],
    (4, 2048): [("ours", "no_press")],
    (1, 16384): [
        *(("stock", "no_press"), ("ours", "no_press"), ("ours", "snapkv"), ("kvpress", "snapkv")),
        ("ours", "adakv_snapkv"),
    ],
}


def load():
    return load_model("pythia-70m", weights="random", dtype="float32").model


def run_cell(model, batch: int, context: int, variants: list) -> dict:
    ids = torch.randint(50_000, (batch, context // SHORTER))
    steps, kv_bytes, floors = {variant: [] for variant in variants}, {}, []
    for _ in range(ROUNDS):
        bandwidth = read_bandwidth(ids.device)
        for engine, name in variants:
            timing = time_once(model, engine, make_press(name, 0.75), ids, N_NEW)
            steps[engine, name].append(timing.step_s)
            kv_bytes[engine, name] = timing.kv_bytes
            if (engine, name) == ("ours", "no_press"):
                read = weight_bytes(model) + timing.kv_bytes_compressed
                floors.append((timing.step_s * bandwidth / read, bandwidth))
    print(f"\nbatch {batch}, {context // SHORTER} tokens")
    for (engine, name), values in steps.items():
        low, middle, high = 1e3 * np.percentile(values, [25, 50, 75])
        allocated = kv_bytes[engine, name] / 1e6
        print(f"  {engine:8} {name:13} {middle:7.1f} ms a step ({low:.1f} to {high:.1f}), {allocated:6.1f} MB of cache")
    times, bandwidth = np.median(floors, axis=0)
    print(f"  ours without a press takes {times:.2f} times the floor (reading {bandwidth / 1e9:.0f} GB/s)")
    return {variant: float(np.median(values)) for variant, values in steps.items()} | {"bytes": kv_bytes}


def peak_memory(engine: str, name: str) -> int:
    """Of prefill and decoding, above the loaded model, in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--peak", engine, name], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def print_peak(engine: str, name: str) -> None:
    model = load()
    time_once(model, engine, make_press(name, 0.75), torch.randint(50_000, (1, 128)), 2)  # libraries are loaded now
    with open("/proc/self/status") as status:
        before = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
    ids = torch.randint(50_000, (1, 16_384 // SHORTER))
    timing = time_once(model, engine, make_press(name, 0.75), ids, N_NEW)
    print(max(timing.prefill_peak_bytes, timing.peak_bytes) - before * 1024)


def main() -> None:
    model = load()
    wide, _, long = (run_cell(model, *cell, variants) for cell, variants in CELLS.items())
    stock, plain, snapkv, kvpress = (
        ("stock", "no_press"),
        ("ours", "no_press"),
        ("ours", "snapkv"),
        ("kvpress", "snapkv"),
    )
    adakv = ("ours", "adakv_snapkv")
    print("\nratios of steps")
    print(f"  batch 16: stock / ours                    {wide[stock] / wide[plain]:5.2f}   (aim 3.3)")
    print(f"  batch 16: stock / ours snapkv 0.75        {wide[stock] / wide[snapkv]:5.2f}   (aim 6.5)")
    print(f"  batch 1:  stock / ours snapkv 0.75        {long[stock] / long[snapkv]:5.2f}   (aim 8.5)")
    print(f"  batch 1:  kvpress snapkv / ours snapkv    {long[kvpress] / long[snapkv]:5.2f}   (aim 1.4)")
    print(f"  batch 1:  ours adakv_snapkv / ours snapkv {long[adakv] / long[snapkv]:5.2f}   (aim at most 1.3)")
    share = long["bytes"][adakv] / long["bytes"][plain]
    print(f"cache under adakv_snapkv 0.75: {share:.3f} of uncompressed (aim at most 0.30)")
    peaks = {variant: peak_memory(*variant) for variant in (stock, snapkv)}
    print(
        f"peak of prefill and decoding above the model: stock {peaks[stock] / 1e6:.0f} MB, snapkv 0.75 "
        f"{peaks[snapkv] / 1e6:.0f} MB, {peaks[snapkv] / peaks[stock]:.2f} of it (aim at most 0.6)"
    )


if __name__ == "__main__":
    if "--peak" in sys.argv:
        print_peak(*sys.argv[sys.argv.index("--peak") + 1 :][:2])
    else:
        main()
