"""How much attention the first tokens of a text draw, whatever they say: attention sinks.

A softmax must place all of its attention somewhere, and many models learn to leave what they do not need with the first
token (StreamingLLM, arXiv 2309.17453). Who drops that token takes from each query what it left there.
"""

from dataclasses import dataclass

import torch

from kvneox_lib.neox.cache import CompactCache
from kvneox_lib.neox.checks import check_ids, check_int
from kvneox_lib.neox.modeling import KVNeoXForCausalLM, with_model
from kvneox_lib.presses.applying import attention

EARLIEST = 64  # the first query that counts: those before it see little but the first tokens
MOST_BYTES = 2**28  # of attention weights held at once, over all layers


@dataclass(frozen=True)
class SinkAttention:
    """Means over queries of shares of a query's attention, beside what they would be if all that it sees drew alike."""

    first: torch.Tensor  # (layers, heads): to the first token
    several: torch.Tensor  # (layers, heads): to the first `n_first`
    even_first: float
    even_several: float
    n_first: int
    n_queries: int


@torch.no_grad()
@with_model
def sink_attention(model, input_ids: torch.Tensor, *, n_first: int = 4, earliest: int = EARLIEST) -> SinkAttention:
    """Of each row of `input_ids` (batch, T), read from its beginning, the queries from position `earliest` on.

    Rows are read one by one and in chunks, so that eager attention over the trained length fits.
    """
    input_ids = check_ids("input_ids", input_ids, model)
    check_int("n_first", n_first, 1)
    check_int("earliest", earliest, n_first)
    length = input_ids.shape[1]
    if length <= earliest:
        raise ValueError(f"input_ids: has {length} tokens; allowed is more than earliest={earliest}")
    seen = torch.arange(earliest, length).double() + 1  # tokens, by each query
    totals = sum(_totals(model, row[None], n_first, earliest) for row in input_ids)
    first, several = totals / (len(input_ids) * len(seen))
    even = float((1 / seen).mean())
    return SinkAttention(first, several, even, n_first * even, n_first, len(input_ids) * len(seen))


def _totals(model: KVNeoXForCausalLM, ids: torch.Tensor, n_first: int, earliest: int) -> torch.Tensor:
    """(2, layers, heads) float64 on the CPU: to the first token and to the first `n_first`, summed over queries."""
    ids, cache = ids.to(model.model.embed_tokens.weight.device), CompactCache(headroom=ids.shape[1])
    totals, start = torch.zeros(2, model.config.num_hidden_layers, model.config.num_attention_heads).double(), 0
    with attention(model, "eager"):
        for part in ids.split(_queries_at_once(model, ids.shape[1]), dim=1):
            read = model.model(input_ids=part, past_key_values=cache, output_attentions=True)
            counted = slice(max(0, earliest - start), None)
            for layer, weights in enumerate(read.attentions):  # (1, heads, queries, keys)
                of_first = weights[0, :, counted, :n_first].float().sum(1).cpu().double()
                totals[:, layer] += torch.stack([of_first[:, 0], of_first.sum(-1)])
            start += part.shape[1]
    return totals


def _queries_at_once(model: KVNeoXForCausalLM, n_keys: int) -> int:
    of_a_query = model.config.num_hidden_layers * model.config.num_attention_heads * n_keys * 4
    return max(1, MOST_BYTES // of_a_query)
