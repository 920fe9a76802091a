"""What reading in chunks gains over reading token by token, and that a stream's time per token does not grow.

    python benchmarks/streaming.py            # about 5 minutes on two cores
    python benchmarks/streaming.py --quick    # fewer tokens, to see that it runs

The loop it is compared with is written as the public implementations of StreamingLLM are: one token at a time, keys
cached unrotated, all of them rotated to their places in the cache at every step.
"""

import copy
import sys
import time
from functools import partial

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import GPTNeoXForCausalLM
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

from kvneox_lib import StreamingDecoder, load_model, streaming_nll
from kvneox_lib.neox.modeling import stock_twin

N_SINK, WINDOW = 4, 1020
QUICK = "--quick" in sys.argv
AIMS = {"demo": 50, "pythia-70m": 10}


class PublicLoop:
    """Token by token through transformers' own model, whose attention layers are replaced; nothing of this library."""

    def __init__(self, model: GPTNeoXForCausalLM, n_sink: int, window: int, rerotate: bool = True):
        self.model, self.n_sink, self.window, self.rerotate = model, n_sink, window, rerotate
        self.caches = [None] * len(model.gpt_neox.layers)
        self.positions = torch.arange(0)
        for layer in model.gpt_neox.layers:
            layer.attention.forward = partial(self._attend, layer.attention)

    @torch.no_grad()
    def step(self, token: torch.Tensor) -> torch.Tensor:
        """Logits (batch, vocabulary) after token (batch, 1)."""
        if len(self.positions) > self.n_sink + self.window:
            kept = [slice(0, self.n_sink), slice(len(self.positions) - self.window, None)]
            self.positions = torch.cat([self.positions[part] for part in kept])
            self.caches = [[torch.cat([x[:, :, part] for part in kept], dim=2) for x in kv] for kv in self.caches]
        now = int(self.positions[-1]) + 1 if len(self.positions) else 0
        self.positions = torch.cat([self.positions, torch.tensor([now])])
        return self.model(input_ids=token, use_cache=False).logits[:, -1]

    def _attend(self, attention, hidden_states, *_, **__):
        query, key, value = (
            attention.query_key_value(hidden_states)
            .view(*hidden_states.shape[:2], -1, 3 * attention.head_size)
            .transpose(1, 2)
            .chunk(3, dim=-1)
        )
        cached = self.caches[attention.layer_idx]
        if cached is not None:
            key, value = (torch.cat([old, new], dim=2) for old, new in zip(cached, (key, value)))
        self.caches[attention.layer_idx] = [key, value]
        places = torch.arange(len(self.positions)) if self.rerotate else self.positions
        cos, sin = self.model.gpt_neox.rotary_emb(value, places[None])
        rotated, _ = apply_rotary_pos_emb(key, key, cos, sin)
        query, _ = apply_rotary_pos_emb(query, query, cos[:, -1:], sin[:, -1:])
        weights = (query @ rotated.transpose(2, 3) * attention.scaling).softmax(-1)
        return attention.dense((weights @ value).transpose(1, 2).flatten(2)), None


def token_by_token(step, input_ids: torch.Tensor) -> torch.Tensor:
    """nll (batch, T - 1) by a `step` from token (batch, 1) to logits."""
    nll = [
        cross_entropy(step(token), following, reduction="none")
        for token, following in zip(input_ids.split(1, dim=1), input_ids.T[1:])
    ]
    return torch.stack(nll, dim=1)


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def read(step, tokens: torch.Tensor) -> None:
    for token in tokens.split(1, dim=1):
        step(token).log_softmax(-1)


def compare(name: str, n_tokens: int) -> None:
    """Each reads the same tokens in turns: a turn of a loop is one part of its text, with chunks read in between."""
    model = load_model(name, weights="auto" if name == "demo" else "random", dtype="float32").model
    ids = torch.randint(8192, (1, n_tokens + 1))
    loops = {
        "public": PublicLoop(copy.deepcopy(stock_twin(model, "sdpa")), N_SINK, WINDOW).step,
        "decoder": partial(StreamingDecoder(N_SINK, WINDOW).read, model),
    }
    spent, chunked = dict.fromkeys(loops, 0.0), []
    streaming_nll(model, ids[:, :2000], n_sink=N_SINK, window=WINDOW)
    for part in ids[:, :-1].split(n_tokens // 8, dim=1):
        for loop, step in loops.items():
            spent[loop] += seconds(partial(read, step, part))
        chunked.append(seconds(lambda: streaming_nll(model, ids, n_sink=N_SINK, window=WINDOW)))
    ours = float(np.median(chunked))
    print(f"\n{name}, {n_tokens} tokens, {N_SINK} + {WINDOW}: streaming_nll {ours:.2f} s", end="")
    print(f" ({min(chunked):.2f} to {max(chunked):.2f}), {n_tokens / ours:.0f} tokens a second")
    print(f"  public-style loop / streaming_nll  {spent['public'] / ours:5.1f}   (aim {AIMS[name]})")
    print(f"  StreamingDecoder  / streaming_nll  {spent['decoder'] / ours:5.1f}   (aim 15)")
    print(f"  public-style loop / StreamingDecoder {spent['public'] / spent['decoder']:5.2f}")


def flatness(n_tokens: int) -> None:
    """Of generation on the demo model, by the thousand."""
    model = load_model("demo", dtype="float32").model
    decoder = StreamingDecoder(N_SINK, WINDOW)
    stream = decoder.stream(model, torch.randint(8192, (1, 8)), stop_at_eos=False, temperature=1.0)
    spent, held = [], []
    for _ in range(n_tokens // 1000):
        spent.append(seconds(lambda: [next(stream) for _ in range(1000)]))
        held.append(decoder.kv_bytes)
    print(f"\ndemo, {n_tokens} tokens generated: ms a token, by the thousand", " ".join(f"{s:.2f}" for s in spent))
    print(f"  last thousand / second thousand {spent[-1] / spent[1]:.3f}   (aim 0.9 to 1.1)")
    print(f"  bytes of the cache: {held[0]} after the first thousand, {held[-1]} after the last")


if __name__ == "__main__":
    compare("demo", 2048 if QUICK else 8192)
    compare("pythia-70m", 1024 if QUICK else 4096)
    flatness(3000 if QUICK else 20_000)
