"""How fast a decoding step is on the shape of pythia-70m with random weights, in one run in which all take turns: over
the roofline (each product the longer of its bytes over the bandwidth and its operations over the peak), in both
precisions, beside transformers, kvpress and, if asked for, engines that are no part of this project.

    python benchmarks/decoding.py            # about 10 minutes on two cores
    python benchmarks/decoding.py --peers    # also CTranslate2 and llama.cpp, which it installs, and removes afterwards
    python benchmarks/decoding.py --quick    # contexts of an eighth, to see that it runs
"""

import signal
import subprocess
import sys
import tempfile
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from peers import PEERS, Peer, make_environment

from kvneox_lib import generate, load_model, make_press
from kvneox_lib.measures.speed import peak_flop_per_s, read_bandwidth, roofline_s, step_products, time_once
from kvneox_lib.neox.modeling import stock_twin

warnings.filterwarnings("ignore", message=".*the model was trained on")
SHORTER = 8 if "--quick" in sys.argv else 1
ROUNDS, N_NEW, RATIO = 3, 16, 0.75
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SINGLE, FEW, MANY, LONG = (1, 2048), (4, 2048), (16, 2048), (1, 16384)  # batch, context


class Variant(NamedTuple):
    engine: str  # of time_once, a peer, or "roofline"
    dtype: str = "float32"
    press: str = "no_press"

    def __str__(self) -> str:
        return f"{self.engine} {self.dtype}" + (f" {self.press} {RATIO}" if self.press != "no_press" else "")


class Line(NamedTuple):
    """A ratio of steps, as it is printed."""

    cell: tuple[int, int]
    above: Variant
    below: Variant
    aim: str = ""


PEER_AIMS = {(Variant("CTranslate2"), FEW): "at least 2", (Variant("CTranslate2"), MANY): "at least 8"}


def lines(peers: list[Variant]) -> list[Line]:
    ours, half = Variant("ours"), Variant("ours", "bfloat16")
    snapkv, half_snapkv = ours._replace(press="snapkv"), half._replace(press="snapkv")
    found = []
    for cell in (SINGLE, FEW, MANY):
        found.append(Line(cell, ours, Variant("roofline"), "at most 1.4"))
        found.append(Line(cell, half, Variant("roofline", "bfloat16"), "at most 1.6"))
        found += [] if cell == SINGLE else [Line(cell, half, ours, "at most 0.6")]
        found += [Line(cell, Variant(engine), ours) for engine in ("stock", "static")]
        found += [Line(cell, peer, ours, PEER_AIMS.get((peer, cell), "")) for peer in peers]
    found.append(Line(MANY, Variant("stock"), snapkv, "at least 14"))
    found.append(Line(MANY, Variant("stock", "bfloat16"), half_snapkv, "at least 20"))
    found.append(Line(LONG, Variant("kvpress", press="snapkv"), snapkv, "at least 1.4"))
    found.append(Line(LONG, ours._replace(press="adakv_snapkv"), snapkv, "at most 1.1"))
    return found


# ---- one cell: all its variants in turns ----


def measure(cell: tuple[int, int], wanted: list[Line], models: dict, peers: dict, peaks: dict) -> None:
    ids = torch.randint(50_000, (cell[0], cell[1] // SHORTER))
    steps = {variant: [] for line in wanted for variant in (line.below, line.above)}
    for variant in steps:
        if variant.engine != "roofline":
            step_s(variant, ids[:, :128], models, peers)  # what is compiled or packed on first use is not timed
    bandwidths = []
    for _ in range(ROUNDS):
        bandwidths.append(read_bandwidth(ids.device))
        for variant, seconds in steps.items():
            if variant.engine == "roofline":
                seconds.append(floor_s(models[variant.dtype], ids, bandwidths[-1], peaks[variant.dtype]))
            else:
                seconds.append(step_s(variant, ids, models, peers))
    low, high = min(bandwidths) / 1e9, max(bandwidths) / 1e9
    print(f"\nbatch {ids.shape[0]}, {ids.shape[1]} tokens: median and range of {ROUNDS} rounds, ", end="")
    print(f"which read memory at {low:.0f} to {high:.0f} GB/s")
    for variant, seconds in steps.items():
        print(f"  {variant!s:58} {spread(1e3 * np.array(seconds))} ms a step")
    for line in wanted:
        ratios = np.divide(steps[line.above], steps[line.below])  # round by round: those two met the same machine
        aim = f"   (aim: {line.aim})" if line.aim else ""
        print(f"  {f'{line.above} / {line.below}':58} {spread(ratios)}{aim}", flush=True)


def step_s(variant: Variant, ids: torch.Tensor, models: dict, peers: dict) -> float:
    if variant in peers:
        return peers[variant].decode(ids.tolist(), N_NEW)["step_s"]
    press = make_press(variant.press, RATIO)
    return time_once(models[variant.dtype], variant.engine, press, ids, N_NEW).step_s


def floor_s(model, ids: torch.Tensor, bandwidth: float, peak: float) -> float:
    heads = model.config.num_hidden_layers * model.config.num_attention_heads
    products = step_products(model, len(ids), heads * len(ids) * (ids.shape[1] + N_NEW / 2))
    return roofline_s(products, bandwidth, peak)


def spread(values: np.ndarray) -> str:
    return f"{np.median(values):7.2f} ({values.min():.2f} to {values.max():.2f})"


# ---- peers ----


def start_peers(model, stack: ExitStack) -> dict[Variant, Peer]:
    """Those that can be had here and decode our tokens; of another is printed why it is not measured."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # killed, too, it leaves no environment behind
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peers-")))
    stock_twin(model).save_pretrained(folder / "weights")
    started = {}
    for engine, dtypes in PEERS.items():
        print(f"installing {engine} …", flush=True)
        try:
            python = make_environment(engine, folder / engine)
            for dtype in dtypes:
                peer = Peer(engine, dtype, python, folder / "weights", torch.get_num_threads())
                stack.callback(peer.close)
                share = same_tokens(model, peer)
                if share < 1 and dtype != "int8":
                    raise RuntimeError(f"only {share:.0%} of its tokens are ours: it decodes another model")
                print(f"{engine} {peer.version}, {dtype}: {share:.0%} of its tokens are ours")
                started[Variant(engine, dtype)] = peer
        except RuntimeError as error:
            print(f"{engine} is not measured: {error}")
    return started


def same_tokens(model, peer: Peer) -> float:
    """The share of equal ones, of which one that differs makes all that follow differ."""
    ids = torch.randint(50_000, (4, 64), generator=torch.Generator().manual_seed(0))
    ours = generate(model, ids, max_new_tokens=N_NEW + 1, stop_at_eos=False).tokens
    theirs = torch.tensor(peer.decode(ids.tolist(), N_NEW)["tokens"])
    return (ours == theirs).float().mean().item()


# ---- the peak of memory ----


def peak_memory(engine: str, name: str) -> int:
    """Of prefill and decoding, above the loaded model, in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peak", engine, name]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def print_peak(engine: str, name: str) -> None:
    model = load_model("pythia-70m", weights="random", dtype="float32").model
    time_once(model, engine, make_press(name, RATIO), torch.randint(50_000, (1, 128)), 2)  # libraries are loaded now
    ids = torch.randint(50_000, (1, LONG[1] // SHORTER))
    timing = time_once(model, engine, make_press(name, RATIO), ids, N_NEW)
    print(max(timing.prefill_peak_bytes, timing.peak_bytes) - timing.resident_bytes)


def main() -> None:
    models = {name: load_model("pythia-70m", weights="random", dtype=name).model for name in DTYPES}
    peaks = {name: peak_flop_per_s(torch.device("cpu"), dtype) for name, dtype in DTYPES.items()}
    print(f"{torch.get_num_threads()} threads;", *(f"{name} {peak / 1e9:.0f} GFLOP/s" for name, peak in peaks.items()))
    with ExitStack() as stack:
        peers = start_peers(models["float32"], stack) if "--peers" in sys.argv else {}
        wanted = lines(list(peers))
        for cell in (SINGLE, FEW, MANY, LONG):
            measure(cell, [line for line in wanted if line.cell == cell], models, peers, peaks)
    stock, snapkv = peak_memory("stock", "no_press"), peak_memory("ours", "snapkv")
    print(
        f"\npeak of prefill and decoding above the model, {LONG[1] // SHORTER} tokens: stock {stock / 1e6:.0f} MB, "
        f"ours snapkv {RATIO} {snapkv / 1e6:.0f} MB, {snapkv / stock:.2f} of it (aim: at most 0.6)"
    )


if __name__ == "__main__":
    if "--peak" in sys.argv:
        print_peak(*sys.argv[sys.argv.index("--peak") + 1 :])
    else:
        main()
