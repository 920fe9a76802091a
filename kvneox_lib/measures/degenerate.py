"""Settings at which a press does not do what its name says, found on one context.

A budget can be smaller than what a press keeps whatever its scores say, or than the number of entries that score best
alike: then chance, or the order in memory, chooses. It can come out as another than was asked for, where a rule counts
in blocks; or as what a simpler press keeps. Such runs compare no presses, so records say which they are.

How a press cuts is observed: kvpress' rules choose by `topk`, each call of which is looked at while a context is read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import kvpress
import torch
from torch.overrides import TorchFunctionMode

from kvneox_lib.measures.prefill import prefill
from kvneox_lib.measures.survivors import kept_counts, prefill_and_find
from kvneox_lib.neox.checks import check_ids
from kvneox_lib.neox.hooks import in_turn
from kvneox_lib.neox.modeling import KVNeoXForCausalLM
from kvneox_lib.presses.applying import check_context
from kvneox_lib.presses.budget import ratio_at
from kvneox_lib.presses.copying import CopyingHeadsPress
from kvneox_lib.presses.facts import keep_tokens_of, parts_of, ratio_owner

MOST_TIED = 0.1  # of the entries kept; a few ties are made by rounding, and by ranks that repeat
MOST_OFF = 0.01  # of the whole context
MOST_FIXED = 0.9  # of the entries kept
N_SINK = 4  # as kvpress' StreamingLLMPress
OF_CHUNKS = (kvpress.ChunkPress, kvpress.ChunkKVPress)  # topk chooses chunks, or within one
FROM_THE_BOTTOM = (kvpress.AdaKVPress, kvpress.CriticalAdaKVPress, kvpress.KVzipPress)  # topk says what goes


@dataclass(frozen=True)
class Behaviour:
    """What a press did to one context."""

    # Of the entries kept, those that the cut chose among equals, and those of a window or of sinks, which score alike
    # and above all others; means over heads. None where it cannot be told, or there are no scores.
    tied_share: float | None
    fixed_share: float | None
    kept_share: float  # of the context
    asked_share: float | None  # None: the press' strength is its own
    same_as: str | None  # a simpler press that keeps the same entries

    @property
    def phrases(self) -> list[str]:
        """What is degenerate, a word and its figures each."""
        found = [f"tied {self.tied_share:.2f}"] if (self.tied_share or 0) > MOST_TIED else []
        if self.asked_share is not None and abs(self.kept_share - self.asked_share) > MOST_OFF:
            found.append(f"kept {self.kept_share:.3f} for {self.asked_share:.3f}")
        found += [f"same as {self.same_as}"] if self.same_as else []
        return found + ([f"fixed {self.fixed_share:.2f}"] if (self.fixed_share or 0) > MOST_FIXED else [])

    @property
    def figures(self) -> dict:
        """For a record."""
        return {"degenerate": "; ".join(self.phrases) or None, "fixed_share": self.fixed_share}


NOTHING = {"degenerate": None, "fixed_share": None}  # of a run without a press, or of one that evicts while decoding


def figures_of_each(model: KVNeoXForCausalLM, input_ids: torch.Tensor, presses: list) -> list[dict]:
    """The figures of a record for each press on a context (1, T). Draws nothing that would be drawn later, too."""
    return [NOTHING if found is None else found.figures for found in behaviours(model, input_ids, presses)]


@torch.no_grad()
@in_turn
def behaviours(model: KVNeoXForCausalLM, input_ids: torch.Tensor, presses: list) -> list[Behaviour | None]:
    """Of each press on a context (1, T); None where it does nothing to one, or cannot read one so short."""
    acting = [_acts_on(press, input_ids.shape[1]) for press in presses]
    if not any(acting):
        return [None] * len(presses)
    input_ids = check_ids("input_ids", input_ids, model, rows=1)
    asked = [press for press, acts in zip(presses, acting) if acts]
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        kept = iter([kept for _, kept in prefill_and_find(model, input_ids, asked)])
        return [
            _behaviour(model, input_ids, press, next(kept)) if acts else None for press, acts in zip(presses, acting)
        ]


def _acts_on(press, n_tokens: int) -> bool:
    if press is None or isinstance(press, kvpress.DecodingPress):
        return False
    try:
        check_context(press, n_tokens)
    except ValueError:
        return False
    return True


def _behaviour(model: KVNeoXForCausalLM, input_ids: torch.Tensor, press, kept: torch.Tensor | None) -> Behaviour:
    n_tokens, config = input_ids.shape[1], model.config
    with _seen() as calls:
        counts = kept_counts(prefill(model, input_ids, press))
    scored, cuts = _calls_of_layers(press, calls, config.num_hidden_layers, config.num_attention_heads, n_tokens)
    n_kept = float(counts.float().mean())
    copying = next((part for part in parts_of(press) if isinstance(part, CopyingHeadsPress)), None)
    if copying is not None:
        return _of_copying_heads(copying, kept[:, 0].cpu(), asked_share(press, n_tokens))
    return Behaviour(
        tied_share=_mean([_tied(call, _is(press, FROM_THE_BOTTOM)) for call in cuts]),
        fixed_share=_mean([_fixed(call, n_kept, _is(press, OF_CHUNKS)) for call in scored]),
        kept_share=n_kept / n_tokens,
        asked_share=asked_share(press, n_tokens),
        same_as=None if kept is None else _same_as(kept[:, 0], press),
    )


def _of_copying_heads(press: CopyingHeadsPress, kept: torch.Tensor, asked: float | None) -> Behaviour:
    """kept: (layers, heads, T). Fixed is the window of the second press, in the heads that do not copy."""
    window = press.presses[1].window_size
    in_window = kept[..., -window:].sum(-1)[~press.copying].sum()
    return Behaviour(
        tied_share=None,
        fixed_share=float(in_window / kept.sum()),
        kept_share=float(kept.float().mean()),
        asked_share=asked,
        same_as=_same_as(kept, press) if press.copying.any() else f"snapkv with a window of {window}",
    )


def asked_share(press, n_tokens: int) -> float | None:
    """Of a context of so many tokens, how much a press is to keep; None where its strength is its own."""
    if keep_tokens_of(press) is not None:
        return 1 - ratio_at(keep_tokens_of(press), n_tokens)
    owner = ratio_owner(press)
    own = (kvpress.DuoAttentionPress, kvpress.ThinKPress, kvpress.SimLayerKVPress, kvpress.DMSPress)
    return None if isinstance(owner, own) else 1 - owner.compression_ratio


# ---- how it cut -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One call of topk."""

    scores: torch.Tensor  # (..., n)
    k: int


@contextmanager
def _seen() -> Iterator[list[Call]]:
    """The calls of topk, by whatever is read meanwhile."""
    calls: list[Call] = []

    class Looking(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if func in (torch.topk, torch.Tensor.topk):
                k = kwargs["k"] if "k" in kwargs else args[1]
                calls.append(Call((args[0] if args else kwargs["input"]).detach().clone(), int(k)))
            return func(*args, **kwargs)

    with Looking():
        yield calls


def _calls_of_layers(
    press, calls: list[Call], n_layers: int, n_heads: int, n_tokens: int
) -> tuple[list[Call], list[Call]]:
    """Of each layer the first call, which sees the scores of the press inside, and the last, which cuts; where each
    chunk of a context is cut for itself, all. None where a press chooses otherwise, or has no scores."""
    if _is(press, kvpress.ChunkPress):
        return calls, calls
    if not _is(press, (kvpress.BlockPress, kvpress.ChunkKVPress)):
        calls = [call for call in calls if call.scores.shape[-1] in (n_tokens, n_heads * n_tokens)]
    if not calls or len(calls) % n_layers:
        return [], []
    of_a_layer = len(calls) // n_layers
    only_cut = _is(press, (kvpress.KVzipPress, kvpress.StreamingLLMPress))
    return [] if only_cut else calls[::of_a_layer], calls[of_a_layer - 1 :: of_a_layer]


def _is(press, kinds) -> bool:
    return any(isinstance(part, kinds) for part in parts_of(press))


def _tied(call: Call, goes: bool) -> float:
    """Of the entries kept, the share that was chosen among equals."""
    n, k = call.scores.shape[-1], call.k
    if not 0 < k < n:
        return 0.0
    at_the_cut = call.scores.topk(k, dim=-1).values[..., -1:]
    above, equal = (call.scores > at_the_cut).sum(-1), (call.scores == at_the_cut).sum(-1)
    chosen = k - above  # of them
    n_kept, by_chance = (n - k, equal - chosen) if goes else (k, chosen)
    return float(torch.where(equal > chosen, by_chance / n_kept, 0.0).float().mean())


def _fixed(call: Call, n_kept: float, of_chunks: bool) -> float:
    """Of the entries kept, the share of those that score alike above all others: a window, or sinks."""
    at_the_top = (call.scores == call.scores.amax(-1, keepdim=True)).sum(-1).float()
    n_kept = call.k if of_chunks else n_kept
    share = (at_the_top / n_kept).clamp(max=1)
    return float(torch.where(at_the_top > 1, share, 0.0).mean())


def _mean(shares: list[float]) -> float | None:
    return sum(shares) / len(shares) if shares else None


# ---- what it kept ---------------------------------------------------------------------------------------------------


def _same_as(kept: torch.Tensor, press) -> str | None:
    """kept: (layers, heads, T). The simpler press that keeps the same, as many in each head."""
    if _is(press, kvpress.StreamingLLMPress) or kept.all():
        return None
    counts, places = kept.sum(-1, keepdim=True), torch.arange(kept.shape[-1], device=kept.device)
    sinks = counts.clamp(max=N_SINK)
    recent = places >= kept.shape[-1] - counts
    streaming = (places < sinks) | (places >= kept.shape[-1] - (counts - sinks))
    simpler = {"streaming_llm": streaming, "recent window": recent}
    return next((name for name, expected in simpler.items() if torch.equal(kept, expected)), None)
