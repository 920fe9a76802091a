"""Every kvpress method by name. The names are the rows of `registry`."""

import numbers

from kvpress import BasePress

from kvneox_lib.neox.checks import check_int, did_you_mean
from kvneox_lib.neox.modeling import KVNeoXForCausalLM
from kvneox_lib.presses.budget import with_budget
from kvneox_lib.presses.registry import RATIO_PER_LAYER, REGISTRY, ROWS, UNAVAILABLE, PressRow


def press_names() -> list[str]:
    return list(REGISTRY)


def expand_presses(press: str | list[str]) -> list[str]:
    """A name, a list of names, "all" (no_press and the core dozen) or "every" (all rows) as a list of known names."""
    if press == "all":
        return ["no_press"] + [row.name for row in ROWS if row.core]
    if press == "every":
        return press_names()
    if isinstance(press, str):
        return [press_row(press).name]
    return list(dict.fromkeys(name for one in press for name in expand_presses(one)))


def press_row(name: str) -> PressRow:
    if isinstance(name, str) and name in UNAVAILABLE:
        raise ValueError(f"press {name!r} {UNAVAILABLE[name]}")
    if not isinstance(name, str) or name not in REGISTRY:
        near = did_you_mean(name, REGISTRY, most=4)
        raise ValueError(f"press {name!r} is unknown; {near}press_names() lists all {len(REGISTRY)}")
    return REGISTRY[name]


class _Unsaid(float):
    """A default that can be told from the same number given."""


HALF = _Unsaid(0.5)


def make_press(
    name: str, compression_ratio: float | list[float] = HALF, *, keep_tokens: int | None = None, **options
) -> BasePress | None:
    """The press of that name; None for "no_press".

    `compression_ratio` is the share of the cache to evict. Rows whose `takes_ratio` is false have a strength of their
    own (an option named in `strength`) and ignore it; per_layer_* take a list with one ratio a layer. `keep_tokens`, in
    its place, is how many entries of a context each head keeps, however long the context is: all where it is shorter,
    and as many in total where a press gives its heads unequal shares. `options` are kvpress' own field names, of the
    wrapper or of the press inside.
    """
    row = press_row(name)
    if keep_tokens is not None:
        _check_budget(row, keep_tokens, compression_ratio)
    elif row.strength == RATIO_PER_LAYER:
        if not isinstance(compression_ratio, (list, tuple)) or not compression_ratio:
            raise ValueError(
                f"compression_ratio={compression_ratio!r}: {name} takes a list with one ratio for each layer"
            )
        for ratio in compression_ratio:
            _check_ratio(ratio)
        return row.build(**{RATIO_PER_LAYER: list(compression_ratio)}, **options)
    _check_ratio(compression_ratio)
    try:
        press = row.build(float(compression_ratio), **options)
    except AssertionError as error:  # kvpress' own check of a value
        raise ValueError(f"{name} refuses {options}: {error}") from error
    return press if keep_tokens is None or press is None else with_budget(press, keep_tokens)


def _check_budget(row: PressRow, keep_tokens: int, compression_ratio) -> None:
    check_int("keep_tokens", keep_tokens, 1)
    if not isinstance(compression_ratio, _Unsaid):
        raise ValueError(
            f"keep_tokens={keep_tokens!r} and compression_ratio={compression_ratio!r}: both say how much is kept; "
            "allowed is one of them"
        )
    if not row.takes_ratio:
        raise ValueError(f"keep_tokens={keep_tokens!r}: {row.name} takes {row.strength} instead; allowed is None")


def _check_ratio(ratio) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, numbers.Real) or not 0 <= ratio < 1:
        raise ValueError(f"compression_ratio={ratio!r}; allowed is a number from 0 (keep all) to below 1")


def layer_ramp(mean: float, n_layers: int) -> list[float]:
    """One ratio a layer for per_layer_* presses, rising over the layers by as much as fits around `mean`."""
    spread = min(mean, 1 - mean) / 2
    return [mean + spread * (2 * layer / max(n_layers - 1, 1) - 1) for layer in range(n_layers)]


def ratio_for(name: str, ratio: float, model: KVNeoXForCausalLM) -> float | list[float]:
    """`ratio` as that press takes it: a ramp over the model's layers for per_layer_* presses."""
    return layer_ramp(ratio, model.config.num_hidden_layers) if press_row(name).strength == RATIO_PER_LAYER else ratio
