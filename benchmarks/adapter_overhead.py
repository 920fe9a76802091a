"""Is the adapted model as fast as the stock one? Prints ours / stock for prefill and decoding, measured interleaved.

python benchmarks/adapter_overhead.py [--repeats 15] [--dtype float32]
"""

import argparse
import statistics
import time

import torch
from transformers import DynamicCache, GPTNeoXConfig, GPTNeoXForCausalLM

import kvneox_lib

PYTHIA_70M = dict(
    vocab_size=50304,
    hidden_size=512,
    num_hidden_layers=6,
    num_attention_heads=8,
    intermediate_size=2048,
)


@torch.inference_mode()
def run(model, prompt: torch.Tensor, decode_steps: int) -> tuple[float, float]:
    """Seconds for one prefill of `prompt` and for `decode_steps` single tokens after it."""
    cache = DynamicCache()
    start = time.perf_counter()
    model(prompt, past_key_values=cache, logits_to_keep=1)
    prefilled = time.perf_counter()
    for _ in range(decode_steps):
        model(prompt[:, :1], past_key_values=cache, logits_to_keep=1)
    return prefilled - start, time.perf_counter() - prefilled


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()

    dtype = getattr(torch, arguments.dtype)
    prompt = torch.randint(0, 50000, (1, 1024), generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    print(f"shape of pythia-70m, {arguments.dtype}, prefill of 1,024 tokens, then 64 steps; {threads} threads")
    for implementation in ("sdpa", "eager"):
        torch.manual_seed(0)
        config = GPTNeoXConfig(**PYTHIA_70M, attn_implementation=implementation)
        stock = GPTNeoXForCausalLM(config).to(dtype).eval()
        ours = kvneox_lib.KVNeoXForCausalLM(config).to(dtype).eval()
        ours.load_state_dict(stock.state_dict())
        ratios = []
        for repeat in range(arguments.repeats + 1):
            models = (stock, ours) if repeat % 2 else (ours, stock)
            seconds = {model: run(model, prompt, 64) for model in models}
            if repeat:  # the first round warms up
                ratios.append([mine / theirs for mine, theirs in zip(seconds[ours], seconds[stock])])
        for name, values in zip(("prefill", "decode"), zip(*ratios)):
            low, middle, high = statistics.quantiles(values, n=4)
            print(f"{implementation:6} {name:8} ours / stock = {middle:.3f}   (quartiles {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
