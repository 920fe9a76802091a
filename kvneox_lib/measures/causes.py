"""Which heads copy, and what it does to drop or keep entries in these heads, or in others, alone.

A correlation says that recall goes with what is left in certain heads. Here their entries are taken or given, exactly,
and nothing else is changed: the context is read once, and what each head may not see is named with the cache.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import kvpress
import numpy as np
import torch
from kvpress import BasePress, ScorerPress

from kvneox_lib.inputs.passkeys import RecallSample
from kvneox_lib.measures.perplexity import read_on
from kvneox_lib.measures.prefill import prefill_each
from kvneox_lib.measures.survivors import prefill_and_find
from kvneox_lib.neox.cache import CompactCache
from kvneox_lib.neox.checks import check_ids
from kvneox_lib.neox.modeling import KVNeoXForCausalLM, evictions, with_model
from kvneox_lib.presses.applying import readable_at_once
from kvneox_lib.presses.facts import decoding_part, parts_of, rerotates

LEAST_ATTENTION = 0.1  # Wu et al. 2024 (arXiv:2404.15574) call a head one for retrieval from this share on
OF_THE_MOST = 0.5
CHANGES_ENTRIES = (kvpress.ThinKPress, kvpress.MergingPress)  # what they leave is no choice among what was there
NEAR = 64  # tokens at the end of a context

# ---- groups of heads ------------------------------------------------------------------------------------------------


def find_copying_heads(reading: torch.Tensor) -> torch.Tensor:
    """(layers, heads) booleans from `recall.copy_attention`: the heads that give the digit to be said a tenth of their
    attention, and at least half of what the head gives that looks most. In a model that does not copy there is none."""
    return reading >= max(LEAST_ATTENTION, OF_THE_MOST * float(reading.max()))


def control_heads(copying: torch.Tensor, seed: int, draw: int) -> torch.Tensor:
    """(layers, heads) booleans: as many heads that do not copy, drawn; all of them where there are fewer."""
    others = (~copying).flatten().nonzero()[:, 0].numpy()
    n = min(int(copying.sum()), len(others))
    drawn = np.random.default_rng((seed, draw)).choice(others, n, replace=False)
    chosen = torch.zeros(copying.numel(), dtype=torch.bool)
    chosen[torch.from_numpy(drawn)] = True
    return chosen.view_as(copying)


# ---- what is kept ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """What a press keeps of a context, and in what order it would let go."""

    kept: torch.Tensor  # (layers, batch, heads, T) booleans
    scores: torch.Tensor  # the same shape; the lowest go first

    def with_positions(self, wanted: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """`kept`, in which `heads` (layers, heads) hold the `wanted` positions (T,) and no more than before: the
        lowest-scored others leave for them, and of the wanted what exceeds the budget stays out."""
        return self._chosen_anew(2 * wanted.long(), heads)

    def without_positions(self, unwanted: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """`kept`, in which `heads` do not hold the `unwanted` positions (T,): as far as there are others, the
        highest-scored of what was evicted comes in their place."""
        return self._chosen_anew(-4 * unwanted.long(), heads) & ~(unwanted & heads[:, None, :, None])

    def in_heads(self, heads: torch.Tensor) -> torch.Tensor:
        """As if the press acted in these heads only: others keep everything."""
        return self.kept | ~heads[:, None, :, None]

    def of_size(self, n_kept: torch.Tensor) -> torch.Tensor:
        """`kept`, grown or shrunk by score to so many (layers, batch, heads) in each head."""
        n = self.scores.shape[-1]
        order = _places(_places(self.scores) + n * self.kept.long())
        return order >= n - n_kept[..., None]

    def _chosen_anew(self, preference: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """By preference (T,), then whether it was kept, then by score; as many in each head as before."""
        n = self.scores.shape[-1]
        by_score = _places(self.scores)
        order = _places(by_score + n * (self.kept.long() + preference))
        chosen = order >= n - self.kept.sum(-1, keepdim=True)
        return torch.where(heads[:, None, :, None], chosen, self.kept)


def _places(values: torch.Tensor) -> torch.Tensor:
    """The place of each in ascending order."""
    return values.argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)


@dataclass
class _Listening(BasePress):
    """Evicts nothing, and hears how the press inside scores."""

    press: BasePress

    def __post_init__(self):
        self.heard = []

    def post_init_from_model(self, model):
        self.press.post_init_from_model(model)

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        self.heard.append(self.press.score(module, hidden_states, keys, values, attentions, kwargs).float().cpu())
        return keys, values


def check_choosing(press: BasePress | None) -> None:
    """Refuse a press of which it cannot be said which entries it keeps as they are."""
    if press is None:
        return
    why = None
    if decoding_part(press) is not None:
        why = "evicts while decoding"
    elif rerotates(press) or any(isinstance(part, CHANGES_ENTRIES) for part in parts_of(press)):
        why = "changes the entries that it keeps"
    if why:
        raise ValueError(f"press={type(press).__name__}: it {why}; allowed is one that chooses among a context's")


@torch.no_grad()
def choices(
    model: KVNeoXForCausalLM, input_ids: torch.Tensor, presses: Sequence[BasePress | None]
) -> tuple[CompactCache, list[Choice]]:
    """The cache of all of a context (batch, T), and what each press would keep of it.

    Scores are those of the scorer in a press. One that has none (KVzip, DuoAttention) lets go by lot, always the same.
    """
    for press in presses:
        check_choosing(press)
    (full, everything), *found = prefill_and_find(model, input_ids, [None, *presses])
    scorers = [_scorer_of(press) for press in presses]
    listening = [None if scorer is None else _Listening(scorer) for scorer in scorers]
    if any(listening):
        prefill_each(model, input_ids, [one for one in listening if one])
    made = []
    for press, one, (_, kept) in zip(presses, listening, found):
        if kept is None:
            raise ValueError(f"press={type(press).__name__}: it changes the keys that it keeps")
        lots = torch.rand(everything.shape, generator=torch.Generator().manual_seed(0))
        made.append(Choice(kept.cpu(), torch.stack(one.heard) if one else lots))
    return full, made


def _scorer_of(press: BasePress | None) -> ScorerPress | None:
    parts = () if press is None else parts_of(press)
    return next((part for part in parts if isinstance(part, ScorerPress)), None)


def see_only(cache: CompactCache, kept: torch.Tensor) -> None:
    """From now on each head of `cache` sees of the context what is `kept`, (layers, batch, heads, T)."""
    for layer, of_layer in enumerate(kept):
        gone = (~of_layer).nonzero(as_tuple=True)
        evictions(cache)[layer] = gone if len(gone[0]) else None


def read_after(model: KVNeoXForCausalLM, cache: CompactCache, read: torch.Tensor, n_context: int) -> list[torch.Tensor]:
    """`read_on` of what follows the context, which is left in `cache` as it was."""
    found = read_on(model, cache, read, n_context, None)
    cache.crop(n_context)
    return found


# ---- the trial ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """What is done to what a press keeps."""

    digits: str = "as_is"  # or "kept", "dropped", or "lent": these heads keep what another press would, as many
    heads: str = "none"  # in which that is done: a name of a group


@dataclass(frozen=True)
class Trial:
    """A context's keys, asked under one condition."""

    condition: Condition
    correct: list[bool]  # of each key
    nll: list[float]  # of each key, mean over the tokens of its answer
    kept_fraction: float


def conditions(groups: Mapping[str, torch.Tensor], press, lender) -> list[Condition]:
    """Those that say something: nothing can be added to everything, or done to heads that there are none of."""
    done = [*(["kept"] if press is not None else []), "dropped"]
    found = [Condition(what, heads) for what in done for heads, chosen in groups.items() if chosen.any()]
    if press is not None and lender is not None and groups["copying"].any():
        found += [Condition("lent", heads) for heads in ("copying", "others")]
    return [Condition(), *found]


@torch.no_grad()
@with_model
def try_each(
    model, sample: RecallSample, presses: list, lenders: list, groups: Mapping[str, torch.Tensor]
) -> Iterator[list[Trial]]:
    """The keys of a sample, asked under all conditions of each press, beside each of which stands the one that lends
    (or None). groups: name to (layers, heads) booleans, among them "copying" and "others"."""
    ids = check_ids("context_ids", sample.context_ids[None].to(model.device), model)
    lending = [lender for lender in lenders if lender is not None]
    cache, found = choices(model, ids, [*presses, *lending])
    own, lent = found[: len(presses)], iter(found[len(presses) :])
    digits = torch.zeros(ids.shape[1], dtype=torch.bool)
    for key in sample.keys:
        digits[slice(*key.digits_span)] = True
    for press, lender, choice in zip(presses, lenders, own):
        other = None if lender is None else next(lent)
        yield [
            _ask_all(model, cache, sample, condition, _kept_under(condition, choice, other, digits, groups))
            for condition in conditions(groups, press, lender)
        ]


def _kept_under(condition: Condition, own: Choice, lent: Choice | None, digits: torch.Tensor, groups) -> torch.Tensor:
    if condition.digits == "as_is":
        return own.kept
    heads = groups[condition.heads]
    if condition.digits == "lent":
        return torch.where(heads[:, None, :, None], lent.of_size(own.kept.sum(-1)), own.kept)
    changed = own.with_positions if condition.digits == "kept" else own.without_positions
    return changed(digits, heads)


def _ask_all(model, cache: CompactCache, sample: RecallSample, condition: Condition, kept: torch.Tensor) -> Trial:
    see_only(cache, kept)
    correct, losses = [], []
    for key in sample.keys:
        read = torch.cat([key.question_ids, key.answer_ids])[None].to(model.device)
        nll, hit = read_after(model, cache, read, len(sample.context_ids))
        answer = slice(-len(key.answer_ids), None)
        correct.append(bool(hit[0, answer].all()))
        losses.append(float(nll[0, answer].mean()))
    return Trial(condition, correct, losses, float(kept.float().mean()))


# ---- losses ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@with_model
def nll_by_heads(
    model, input_ids: torch.Tensor, *, n_context: int, presses: list, groups: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """nll (batch, T - n_context - 1) of what follows a context of which everything is kept; and for each press, with
    the press acting in each group of heads alone."""
    input_ids = check_ids("input_ids", input_ids, model, least=n_context + 2)
    parts = [_nll_at_once(model, rows, n_context, presses, groups) for rows in readable_at_once(input_ids, *presses)]
    bare, pressed = zip(*parts)
    by_press = [{name: torch.cat([part[name] for part in of_press]) for name in groups} for of_press in zip(*pressed)]
    return torch.cat(bare), by_press


def _nll_at_once(model, rows: torch.Tensor, n_context: int, presses: list, groups):
    """Rows that all presses may see together."""
    cache, found = choices(model, rows[:, :n_context], presses)

    def nll_of(kept: torch.Tensor) -> torch.Tensor:
        see_only(cache, kept)
        return read_after(model, cache, rows[:, n_context:], n_context)[0].double().cpu()

    bare = nll_of(torch.ones(cache.kv_lengths.shape + (n_context,), dtype=torch.bool))
    return bare, [
        {name: bare if press is None else nll_of(choice.in_heads(heads)) for name, heads in groups.items()}
        for press, choice in zip(presses, found)
    ]


def where_seen(input_ids: torch.Tensor, n_context: int, near: int = NEAR) -> torch.Tensor:
    """(batch, T - n_context - 1) of tokens n_context + 1 ... T - 1: where the token and the one before it stood side by
    side already. 2: in the context, before its last `near` tokens; 1: only later than that; 0: nowhere."""
    pairs = torch.stack([input_ids[:, :-1], input_ids[:, 1:]], -1)  # the one that ends at position 1, 2, ...
    ends = torch.arange(1, input_ids.shape[1], device=input_ids.device)
    same = (pairs[:, n_context:, None] == pairs[:, None]).all(-1)  # (batch, scored, T - 1)
    far = (same & (ends < n_context - near)).any(-1)
    earlier = (same & (ends < ends[n_context:, None])).any(-1)
    return earlier.long() + far.long()
