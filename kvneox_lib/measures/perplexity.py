"""What compression costs in perplexity.

A press acts after the attention of its layer, so the pass that reads the context knows nothing of it: whatever the
ratio, its perplexity is that of no compression. What counts is the text *after* the context, each token predicted by a
query that read the compressed cache. `continuation_nll` measures that; `teacher_forced_nll` is the control that shows
the artefact.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy
from transformers import Cache, DynamicCache

from kvneox_lib.measures.intervals import interval
from kvneox_lib.measures.prefill import bits_of_each, first_position, prefill_each, store, with_delimiter
from kvneox_lib.measures.survivors import kept_counts
from kvneox_lib.neox.checks import check_ids
from kvneox_lib.neox.hooks import in_turn
from kvneox_lib.neox.modeling import KVNeoXForCausalLM, with_model
from kvneox_lib.presses.applying import applied, check_context, readable_at_once
from kvneox_lib.presses.facts import decoding_part

LOGITS_AT_ONCE = 2**24  # numbers, 64 MiB in float32: a window's logits are never in memory as a whole
ROWS_AT_ONCE = 512  # of them: more leave the processor's cache
TOKENS_AT_ONCE = 1024  # of a continuation: nor is a mask for all its queries


@dataclass(frozen=True)
class Scored:
    """A batch of windows read on from one compressed cache."""

    nll: torch.Tensor  # (batch, T - n_context - 1)
    kept: torch.Tensor  # (layers, batch, heads) entries that each head sees when the continuation begins; when it ends,
    kv_bytes: int  # at most n_context, for presses that act while decoding. And bytes allocated for the batch, then


@torch.no_grad()
def continuation_nll(
    model,
    input_ids: torch.Tensor,
    *,
    n_context: int,
    press=None,
    kv_bits: int | None = None,
    prefill_chunk: int | None = None,
    evict_while_reading: bool = False,
) -> torch.Tensor:
    """(batch, T - n_context - 1): nll of tokens n_context + 1 ... T - 1 after `press` compressed the first `n_context`.

    The token at n_context itself is predicted by the prefill, which no press has touched, and is not scored.
    kv_bits: 8, 4 or 2 for each number that is left of the context. prefill_chunk, evict_while_reading: how it is read,
    see `chunks`.
    """
    how = {"kv_bits": [kv_bits], "prefill_chunk": prefill_chunk, "evict_while_reading": evict_while_reading}
    return score_each(model, input_ids, n_context=n_context, presses=[press], **how)[0].nll


@torch.no_grad()
@with_model
def score_each(
    model,
    input_ids: torch.Tensor,
    *,
    n_context: int,
    presses: list,
    kv_bits: list[int | None] | None = None,
    prefill_chunk: int | None = None,
    evict_while_reading: bool = False,
) -> list[Scored]:
    """`continuation_nll` under each press, in the bits that are given for each, with what it kept; the context is read
    once for all that allow it, unless it is read in chunks."""
    input_ids = check_ids("input_ids", input_ids, model, least=3)
    if isinstance(n_context, bool) or not isinstance(n_context, int) or not 1 <= n_context <= input_ids.shape[1] - 2:
        raise ValueError(
            f"n_context={n_context!r}: must be from 1 to {input_ids.shape[1] - 2}, so that of these tokens"
            " one is read after compression and one is scored"
        )
    stored = list(zip(presses, bits_of_each(kv_bits, presses)))
    reading = {"prefill_chunk": prefill_chunk, "evict_while_reading": evict_while_reading}
    rows_at_once = readable_at_once(input_ids, *presses)
    parts = [_score_at_once(model, rows, n_context, stored, reading) for rows in rows_at_once]
    return [_stacked(scored) for scored in zip(*parts)]


def _score_at_once(
    model: KVNeoXForCausalLM, input_ids: torch.Tensor, n_context: int, stored: list, reading: dict
) -> list[Scored]:
    caches = prefill_each(model, input_ids[:, :n_context], [press for press, _ in stored], **reading)
    scored = []
    for press, bits in stored:
        cache = caches.pop(0)  # freed when it is done with
        kept, position = kept_counts(cache), first_position(cache, n_context, press)
        store(cache, press, bits)
        kv_bytes = cache.kv_bytes
        nll, _ = read_on(model, cache, input_ids[:, n_context:], position, press)
        if decoding_part(press) is not None:  # what it evicted while reading on is gone only now
            kept, kv_bytes = kept_counts(cache).clamp(max=n_context), cache.kv_bytes
        scored.append(Scored(nll, kept, kv_bytes))
    return scored


def _stacked(parts: list[Scored]) -> Scored:
    nll, kept = torch.cat([part.nll for part in parts]), torch.cat([part.kept for part in parts], dim=1)
    return Scored(nll, kept, sum(part.kv_bytes for part in parts))


@torch.no_grad()
@in_turn
def read_on(
    model: KVNeoXForCausalLM, cache: Cache, input_ids: torch.Tensor, position: int, press
) -> list[torch.Tensor]:
    """Read `input_ids` (batch, n) into `cache` from `position` on. For all of them but the first, (batch, n - 1): the
    nll, and whether the model would have chosen that token.

    A press that acts while decoding goes on doing so, which takes a step for each token.
    """
    decoding, scored, last = decoding_part(press), [], input_ids.shape[1] - 1
    step = TOKENS_AT_ONCE if decoding is None else 1
    with applied(decoding, model):
        for start in range(0, last, step):
            fed = input_ids[:, start : min(start + step, last)]
            positions = torch.arange(start, start + fed.shape[1], device=fed.device)[None] + position
            hidden = model.model(input_ids=fed, past_key_values=cache, position_ids=positions).last_hidden_state
            scored.append(score(model, hidden, input_ids[:, start + 1 : start + 1 + fed.shape[1]]))
    return [torch.cat(parts, dim=1) for parts in zip(*scored)]


@torch.no_grad()
@with_model
def teacher_forced_nll(model, input_ids: torch.Tensor, *, press=None) -> torch.Tensor:
    """(batch, T - 1): the control, all tokens in one pass inside the press. No press can move it; see above."""
    input_ids = check_ids("input_ids", input_ids, model, least=2)
    check_context(press, input_ids.shape[1])
    nll = []
    for rows in readable_at_once(input_ids, press):
        fed = with_delimiter(press, rows)
        with applied(press, model):
            hidden = model.model(input_ids=fed, past_key_values=DynamicCache()).last_hidden_state
            nll.append(score(model, hidden[:, :-1], rows[:, 1:])[0])
    return torch.cat(nll)


def score(model: KVNeoXForCausalLM, hidden: torch.Tensor, targets: torch.Tensor) -> list[torch.Tensor]:
    """nll and hits (batch, n) from the last hidden states (batch, n, d), by chunks of the vocabulary projection."""
    rows = max(1, min(ROWS_AT_ONCE, LOGITS_AT_ONCE // model.config.vocab_size))
    scored = []
    for states, ids in zip(hidden.flatten(0, 1).split(rows), targets.to(hidden.device).flatten().split(rows)):
        logits = model.embed_out(states).float()
        scored.append((cross_entropy(logits, ids, reduction="none"), logits.argmax(-1) == ids))
    return [torch.cat(parts).view(targets.shape) for parts in zip(*scored)]


# ---- figures of a run -----------------------------------------------------------------------------------------------


@np.errstate(divide="ignore", over="ignore", invalid="ignore")
def summarize(
    nll: np.ndarray,
    n_bytes: np.ndarray,
    n_words: np.ndarray,
    baseline: np.ndarray,
    documents: np.ndarray | None = None,
) -> dict[str, float]:
    """The figures of a record from nll (windows, L), in nat; `baseline` is that of no compression on the same windows.
    documents: which each window is of, in the order of the text (see `interval`); without it, all are of one.

    Differences are paired: most of what makes one window harder than another is in both and cancels. A figure that
    does not exist is None: those of words in text without spaces, intervals from a few windows.
    """
    n_tokens, total = np.full(len(nll), nll.shape[1]), nll.sum(1)
    n_documents = 1 if documents is None else len(np.unique(documents))
    figures = {"n_windows": len(nll), "n_documents": n_documents, "n_tokens": int(n_tokens.sum())}
    for name, values, worth in (
        ("nll_mean", total, n_tokens),
        ("delta_nll", total - baseline.sum(1), n_tokens),
        ("bits_per_byte", total / np.log(2), n_bytes),
        ("nll_per_word", total, n_words),
    ):
        low, high = interval(values, worth, documents).ends
        figures |= {name: values.sum() / worth.sum(), f"{name}_ci95_low": low, f"{name}_ci95_high": high}
    for name, of in (("ppl", "nll_mean"), ("ppl_ratio", "delta_nll"), ("word_ppl", "nll_per_word")):
        for end in ("", "_ci95_low", "_ci95_high"):
            figures[name + end] = float(np.exp(figures[of + end]))
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def by_distance(nll: np.ndarray, baseline: np.ndarray, documents: np.ndarray | None = None) -> pd.DataFrame:
    """How long the damage lasts: nll and paired difference by distance from the cut, in bins that double."""
    edges = [0, *(2**i for i in range(nll.shape[1].bit_length()) if 2**i < nll.shape[1]), nll.shape[1]]
    rows = []
    for start, end in zip(edges[:-1], edges[1:]):
        part, delta = nll[:, start:end], (nll - baseline)[:, start:end]
        low, high = interval(delta.mean(1), None, documents).ends
        row = {"from_token": start + 1, "to_token": end, "nll_mean": part.mean(), "delta_nll": delta.mean()}
        rows.append(row | {"delta_nll_ci95_low": low, "delta_nll_ci95_high": high})
    return pd.DataFrame(rows)
