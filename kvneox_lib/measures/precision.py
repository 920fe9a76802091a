"""A model in another precision, and what a precision costs in accuracy.

The cost is measured on the bundled model, whatever model is timed: random weights have no accuracy to lose.
"""

import copy
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.functional import cross_entropy

from kvneox_lib.inputs.text import load_text
from kvneox_lib.inputs.weights import load_model
from kvneox_lib.inputs.windows import windows
from kvneox_lib.measures.prefill import prefill
from kvneox_lib.neox.modeling import KVNeoXForCausalLM

N_CONTEXT, N_NEW, N_WINDOWS = 512, 64, 4


@dataclass(frozen=True)
class PrecisionCost:
    """Of the bundled model, against float32."""

    logits_rel_diff: float  # the largest difference, as a share of the largest logit
    nll_diff: float  # of a token of the continuation, in nat


def in_precision(model: KVNeoXForCausalLM, dtype: torch.dtype) -> KVNeoXForCausalLM:
    """A copy with its parameters rounded to `dtype`. Buffers stay: rotary frequencies are float32 in any model."""
    converted = copy.deepcopy(model)
    converted.config.dtype = dtype
    for parameter in converted.parameters():
        parameter.data = parameter.data.to(dtype)
    return converted


@lru_cache
def cost_of_precision(dtype: torch.dtype, device: torch.device) -> PrecisionCost:
    """Windows of the Python documentation: the context in one pass, then the continuation token by token, as decoding
    reads it."""
    loaded = load_model("demo", dtype=torch.float32, device=device)
    text = load_text("python-docs")
    cut = windows(
        text, loaded.tokenizer, context_length=N_CONTEXT, continuation_length=N_NEW + 1, max_windows=N_WINDOWS
    )
    ids = cut.input_ids.to(device)
    exact, rounded = (_logits(model, ids) for model in (loaded.model, in_precision(loaded.model, dtype)))
    losses = [cross_entropy(logits.flatten(0, 1), ids[:, N_CONTEXT + 1 :].flatten()) for logits in (exact, rounded)]
    largest = (rounded - exact).abs().max() / exact.abs().max()
    return PrecisionCost(logits_rel_diff=float(largest), nll_diff=float(losses[1] - losses[0]))


@torch.no_grad()
def _logits(model: KVNeoXForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """(batch, N_NEW, vocabulary) in float32: what each token of the continuation but the last says of the next."""
    cache, logits = prefill(model, ids[:, :N_CONTEXT], None, headroom=N_NEW), []
    for position in range(N_CONTEXT, N_CONTEXT + N_NEW):
        positions = torch.tensor([[position]], device=ids.device)
        made = model(input_ids=ids[:, [position]], past_key_values=cache, position_ids=positions)
        logits.append(made.logits[:, -1].float())
    return torch.stack(logits, dim=1)
