"""The heads that copy, found from the model alone, and a press that gives them most of the budget.

A head copies when it looks for an earlier occurrence of the token that is being read and attends to what came after it.
What a model repeats from far back, a name, a number, a phrase, it has from these heads, and there are few of them. A
query of the context's end need not be looking for anything, so a press that scores by such queries evicts there what
will be asked for later; the other heads look near, and lose little with all that is far.
"""

import warnings
from dataclasses import dataclass, field

import torch
from kvpress import BasePress, ScorerPress
from kvpress.utils import compute_n_kept

from kvneox_lib.neox.checks import check_int
from kvneox_lib.neox.hooks import hooked
from kvneox_lib.presses.applying import attention
from kvneox_lib.presses.calibration import Calibration, calibrated

REPEATED, DRAWS = 256, 8  # random tokens that are read twice, and how often others are drawn


# -- which heads copy -------------------------------------------------------------------------------------------------


def copying_scores(model) -> torch.Tensor:
    """(layers, heads) in [0, 1]: the share of its attention with which each head copies, far from any text.

    Random tokens, each of them once, are read twice. Reading one for the second time, a head that copies attends to
    the token that followed it the first time; one that does not has no reason to. The mean over all tokens that have
    such a successor and over all draws; chance is below one in the number of tokens.
    """
    return _calibration(model).tensors["scores"]


def _calibration(model) -> Calibration:
    return calibrated(model, "copying-heads", f"{REPEATED} {DRAWS}", lambda: {"scores": measure_copying(model)})


def measure_copying(model) -> torch.Tensor:
    """`copying_scores`, measured now."""
    scores = torch.zeros(model.config.num_hidden_layers, model.config.num_attention_heads)
    draws = repeated_tokens(model.config)
    n = draws.shape[1] // 2

    def collect(module, args, kwargs, output):
        weights = output[1]  # (1, heads, queries, keys); query n + i looks for key i + 1, n - 1 before it
        successors = weights.diagonal(offset=1 - n, dim1=2, dim2=3)[..., 1:n]
        scores[module.layer_idx] += successors[0].float().mean(-1).cpu() / len(draws)

    with attention(model, "eager"), hooked([layer.self_attn for layer in model.model.layers], collect):
        for ids in draws.split(1):
            model.model(input_ids=ids.to(model.device), use_cache=False)
    return scores


def repeated_tokens(config) -> torch.Tensor:
    """(draws, 2 n): n different tokens of the vocabulary, and the same again, within the trained length."""
    n = min(REPEATED, config.max_position_embeddings // 2, config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([torch.randperm(config.vocab_size, generator=generator)[:n] for _ in range(DRAWS)])
    return drawn.repeat(1, 2)


# -- who gets how much ------------------------------------------------------------------------------------------------


def allot(scores: torch.Tensor, copying: torch.Tensor, n_tokens: int, n_kept: int, floor: int) -> torch.Tensor:
    """(layers, heads): how many of `n_tokens` entries each head keeps, `n_kept` in the mean exactly.

    All keep `floor`; what remains goes to the heads that copy in proportion to their `scores`, none more than there is,
    and what these have no use for to the others in equal parts. Parts of an entry go to who is owed the largest.
    """
    kept = torch.full(scores.shape, floor)
    for heads, weights in ((copying, scores), (~copying, torch.ones_like(scores))):
        left = n_kept * kept.numel() - int(kept.sum())
        kept[heads] += _divide(left, weights[heads].double(), n_tokens - floor)
    return kept


def _divide(amount: int, weights: torch.Tensor, most: int) -> torch.Tensor:
    """Whole numbers in proportion to `weights`, none above `most`; together `amount`, or all at `most`."""
    amount = min(amount, most * len(weights))
    full = torch.zeros_like(weights, dtype=torch.bool)
    while True:
        owed = (amount - most * int(full.sum())) * weights / weights[~full].sum()
        overfull = ~full & (owed >= most)
        if not overfull.any():
            break
        full |= overfull
    owed[full] = most
    whole = owed.floor().long()
    largest_parts = (owed - whole).argsort(descending=True, stable=True)
    whole[largest_parts[: amount - int(whole.sum())]] += 1
    return whole


# -- the press --------------------------------------------------------------------------------------------------------


@dataclass
class CopyingHeadsPress(BasePress):
    """Most of the budget for the heads that copy, which keep the entries that one press scores highest; the others get
    by with few, which another one scores. What all heads keep together is what any press keeps at that ratio.

    A head whose budget is the whole context keeps it whatever its scores. Of entries with equal scores the later stay.
    In a model without heads that copy all that is left is the second press; a warning says so.
    """

    presses: list[ScorerPress]  # for the heads that copy, and for the others; the ratio is that of the first
    threshold: float = 0.1  # a head copies when `copying_scores` gives it at least that
    floor: int = 32  # entries that every head keeps at least; half of its equal part where that is less
    scores: torch.Tensor | None = field(init=False, default=None, repr=False, compare=False)  # of the model

    def __post_init__(self):
        if len(self.presses) != 2 or not all(isinstance(press, ScorerPress) for press in self.presses):
            raise ValueError(f"presses={self.presses!r}: must be two that score, for heads that copy and for others")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold!r}: must be a share of attention above 0, at most 1")
        check_int("floor", self.floor, 1)
        self.compression_ratio = self.presses[0].compression_ratio

    @property
    def compression_ratio(self) -> float:
        return self.presses[0].compression_ratio

    @compression_ratio.setter
    def compression_ratio(self, ratio: float):
        for press in self.presses:
            press.compression_ratio = ratio

    def post_init_from_model(self, model):
        for press in self.presses:
            press.post_init_from_model(model)
        found = _calibration(model)
        self.scores, self.calibration_s = found.tensors["scores"], found.seconds
        if not self.copying.any():
            said = f"no head of this model copies with {self.threshold:g} of its attention"
            warnings.warn(f"{said}: copying_heads keeps what {type(self.presses[1]).__name__} keeps", stacklevel=2)

    @property
    def copying(self) -> torch.Tensor:
        """(layers, heads) booleans, of the model it was applied to last."""
        return self.scores >= self.threshold

    def budgets(self, n_tokens: int) -> torch.Tensor:
        """(layers, heads): entries that each head keeps of a context of so many tokens."""
        n_kept = compute_n_kept(n_tokens, self.compression_ratio)
        return allot(self.scores, self.copying, n_tokens, n_kept, min(self.floor, max(1, n_kept // 2)))

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        if self.compression_ratio == 0:
            return keys, values
        seen = (module, hidden_states, keys, values, attentions, kwargs)
        for_copying, for_others = self.presses
        if not self.copying.any():
            return for_others.compress(*seen)
        n_tokens, copying = keys.shape[2], self.copying[module.layer_idx].to(keys.device)
        scores = for_others.score(*seen)  # (batch, heads, T)
        if copying.any():
            scores = torch.where(copying[:, None], for_copying.score(*seen), scores)
        # From the last to the first, so that of equals the later comes first
        best = n_tokens - 1 - scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
        beyond = torch.arange(n_tokens) >= self.budgets(n_tokens)[module.layer_idx][:, None]  # (heads, T) of ranks
        evicted = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, beyond.to(best.device).expand_as(best))
        # Masked until the cache stores each head in its own length
        module.masked_key_indices = evicted.nonzero(as_tuple=True)
        return keys, values
