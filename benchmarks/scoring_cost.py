"""What scoring a window costs, in plain forward passes over it: `continuation_nll` under a press against the model's
own forward pass over the whole window, interleaved in one run. Also the peak memory of a 16,384-token window with
Pythia's vocabulary, beside the model.

    python benchmarks/scoring_cost.py
"""

import resource
import statistics
import time

import torch

from kvneox_lib import continuation_nll, load_model, make_press
from kvneox_lib.presses.by_name import expand_presses

REPEATS, CONTEXT, CONTINUATION = 5, 1024, 256


@torch.no_grad()
def main() -> None:
    model = load_model("pythia-70m", weights="random", dtype="float32").model
    ids = torch.randint(0, 50_000, (1, CONTEXT + CONTINUATION))
    presses = {name: make_press(name, 0.5) for name in expand_presses("all")}
    variants = {
        name: lambda p=press: continuation_nll(model, ids, n_context=CONTEXT, press=p)
        for name, press in presses.items()
    }
    variants["plain forward"] = lambda: model(ids)
    times = {name: [] for name in variants}
    for repeat in range(REPEATS + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if repeat:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    plain = statistics.median(times.pop("plain forward"))
    print(f"shape of pythia-70m, float32, {CONTEXT} + {CONTINUATION} tokens, {torch.get_num_threads()} threads")
    print(f"plain forward pass: {plain:.3f} s")
    for name, measured in times.items():
        ratios = sorted(t / plain for t in measured)
        print(f"{name:22} {statistics.median(ratios):5.2f} times  (from {ratios[0]:.2f} to {ratios[-1]:.2f})")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    long = torch.randint(0, 50_000, (1, 16_384))
    continuation_nll(model, long, n_context=8_192, press=make_press("snapkv", 0.5))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"16,384 tokens: peak {peak / 2**20:.2f} GiB, {before / 2**20:.2f} GiB before; logits alone would be 3.07 GiB"
    )


if __name__ == "__main__":
    main()
