"""A budget in tokens: a press that keeps so many entries of each head, however long the context is.

kvpress' presses know a share of the context. Here the share follows from the length of each context as it is read, so
that the press' own rule comes to that number. A press that acts in hooks is told the length by each prefill; one that
acts when its context manager closes knows its context by itself.
"""

from functools import cache

import kvpress
from kvpress import BasePress
from kvpress.presses.base_press import is_prefilling

from kvneox_lib.neox.checks import check_int
from kvneox_lib.presses.facts import ACTS_AT_EXIT, ratio_owner

_EXACT = 1e-12  # kvpress rounds products of a length and a ratio down; more than their error, less than an entry


def with_budget(press: BasePress, keep_tokens: int) -> BasePress:
    """The same press, from now on with this budget in place of its ratio. It stays an instance of its class."""
    check_int("keep_tokens", keep_tokens, 1)
    press.__class__ = _budgeted(type(press))
    press.keep_tokens = keep_tokens
    return press


def ratio_at(keep_tokens: int, n_tokens: int) -> float:
    """The share of `n_tokens` that goes when so many are kept; 0.0 where there are no more."""
    return max(0.0, 1 - keep_tokens / n_tokens)


@cache
def _budgeted(kind: type[BasePress]) -> type[BasePress]:
    if issubclass(kind, ACTS_AT_EXIT):
        own = {"compression_ratio": property(_ratio_of_what_was_read, _ratio_until_then)}
    elif issubclass(kind, kvpress.CompressionRatioDecodingPress):
        own = {"_resolve_target_size": lambda self, kwargs: self.keep_tokens}
    else:
        own = {"forward_hook": _hook_of(kind)}
    return type(kind.__name__, (kind,), {"__doc__": kind.__doc__, "__module__": kind.__module__, "kind": kind, **own})


def _hook_of(kind: type[BasePress]):
    def forward_hook(self, module, input, kwargs, output):
        n_tokens = kwargs["hidden_states"].shape[1]
        if is_prefilling(kwargs["cache_position"], n_tokens):
            ratio = ratio_at(self.keep_tokens, n_tokens)
            ratio_owner(self).compression_ratio = max(0.0, ratio - _EXACT)  # they keep int(length * (1 - ratio))
        return kind.forward_hook(self, module, input, kwargs, output)

    return forward_hook


def _ratio_of_what_was_read(self) -> float:
    """Of KVzip, which evicts int(entries * ratio), and of KVCompose, which keeps int(entries * (1 - ratio))."""
    if isinstance(self, kvpress.KVComposePress):
        n_tokens, rounding = getattr(self, "context_len", 0), -_EXACT
    else:
        n_tokens, rounding = 0 if self._context_ids is None else self._context_ids.shape[1], _EXACT
    if not n_tokens:
        return self.__dict__["compression_ratio"]
    ratio = ratio_at(self.keep_tokens, n_tokens)
    return ratio + rounding if ratio else 0.0


def _ratio_until_then(self, ratio: float) -> None:
    self.__dict__["compression_ratio"] = ratio
