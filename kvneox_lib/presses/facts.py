"""Every kvpress method by name, and what must be known to use it honestly.

The names are the rows of `registry`. What a press demands (eager, sdpa), when it acts and whether it may see a batch
follows from its classes, so it is known for presses that a user built without us, too.
"""

import difflib
import logging
import numbers
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import kvpress
from kvpress import BasePress

from kvneox_lib.neox.modeling import KVNeoXForCausalLM
from kvneox_lib.presses.registry import RATIO_PER_LAYER, REGISTRY, ROWS, UNAVAILABLE, PressRow

for _module in [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "kvpress"]:
    if KVNeoXForCausalLM not in getattr(_module, "SUPPORTED_MODELS", (KVNeoXForCausalLM,)):
        _module.SUPPORTED_MODELS += (KVNeoXForCausalLM,)  # else kvpress warns "not tested" at every call

_said: set[str] = set()


def _worth_saying(record: logging.LogRecord) -> bool:
    """kvpress warns at every construction: let each warning through once, and those that are moot here never."""
    message = record.getMessage()
    moot = "not tested" in message or "only works with flash attention" in message  # tested, and masks are per layer
    new = message not in _said
    _said.add(message)
    return new and not moot


for _press in ("kvcompose_press", "kvzip_press", "kvgrad_press", "per_layer_compression_press"):
    logging.getLogger(f"kvpress.presses.{_press}").addFilter(_worth_saying)

# -- what follows from the classes of a press ---------------------------------------------------------------------

NEEDS_EAGER = (kvpress.ObservedAttentionPress,)
REFUSES_EAGER = (
    kvpress.AdaKVPress,
    kvpress.CriticalAdaKVPress,
    kvpress.ChunkPress,
    kvpress.ChunkKVPress,
    kvpress.BlockPress,
    kvpress.KVzipPress,
    kvpress.DuoAttentionPress,
)
ACTS_AT_EXIT = (kvpress.KVzipPress, kvpress.KVComposePress)
ACTS_WHILE_DECODING = (kvpress.DecodingPress, kvpress.PrefillDecodingPress)
# Scores or budgets that mix the rows of a batch, a batch of one by design, or draws that would differ with the batch.
MIXES_ROWS = (
    kvpress.ChunkKVPress,
    kvpress.CriticalAdaKVPress,
    kvpress.SimLayerKVPress,
    kvpress.NonCausalAttnPress,
    kvpress.LeverageScorePress,
    kvpress.CompactorPress,
    kvpress.RandomPress,
    kvpress.CAMPress,
    kvpress.KVzipPress,
    kvpress.KVComposePress,
    kvpress.FinchPress,
)


def parts_of(press: BasePress) -> Iterator[BasePress]:
    """The press and every press inside it."""
    yield press
    inner = [getattr(press, name, None) for name in ("press", "base_press", "prefilling_press", "decoding_press")]
    for part in inner + list(getattr(press, "presses", [])):
        if isinstance(part, BasePress):
            yield from parts_of(part)


def _is(press: BasePress, classes: tuple[type, ...]) -> bool:
    return any(isinstance(part, classes) for part in parts_of(press))


def attention_needed(press: BasePress | None) -> str:
    """ "eager", "sdpa" (or a kernel like it), or "any"."""
    if press is None or not _is(press, NEEDS_EAGER + REFUSES_EAGER):
        return "any"
    return "eager" if _is(press, NEEDS_EAGER) else "sdpa"


def acts(press: BasePress | None) -> str:
    """When the cache is compressed: in a "hook" of the prefill, at the "exit" of the context, while "decoding"."""
    if press is None:
        return "never"
    if _is(press, ACTS_WHILE_DECODING) or any(getattr(part, "decoding", False) is True for part in parts_of(press)):
        return "decoding"
    return "exit" if _is(press, ACTS_AT_EXIT) else "hook"


def rows_independent(press: BasePress | None) -> bool:
    """Whether a row of a batch is compressed as it would be alone; if not, rows must be run one by one."""
    return press is None or not _is(press, MIXES_ROWS)


def rerotates(press: BasePress | None) -> bool:
    """Whether kept keys are rotated to consecutive positions, so that positions go on from the compressed length."""
    return press is not None and any(
        isinstance(part, kvpress.KeyRerotationPress) or getattr(part, "rerotate_keys", False) is True
        for part in parts_of(press)
    )


# -- by name ------------------------------------------------------------------------------------------------------


def press_names() -> list[str]:
    return list(REGISTRY)


def expand_presses(press: str | list[str]) -> list[str]:
    """A name, a list of names, "all" (no_press and the core dozen) or "every" (all rows) as a list of known names."""
    if press == "all":
        return ["no_press"] + [row.name for row in ROWS if row.core]
    if press == "every":
        return press_names()
    return [press_row(name).name for name in ([press] if isinstance(press, str) else press)]


def press_row(name: str) -> PressRow:
    if isinstance(name, str) and name in UNAVAILABLE:
        raise ValueError(f"press {name!r} {UNAVAILABLE[name]}")
    if not isinstance(name, str) or name not in REGISTRY:
        near = difflib.get_close_matches(str(name), REGISTRY, n=4, cutoff=0.4)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise ValueError(f"press {name!r} is unknown{hint}. press_names() lists all {len(REGISTRY)}.")
    return REGISTRY[name]


def make_press(name: str, compression_ratio: float | list[float] = 0.5, **options) -> BasePress | None:
    """The press of that name; None for "no_press".

    `compression_ratio` is the share of the cache to evict. Rows whose `takes_ratio` is false have a strength of their
    own (an option named in `strength`) and ignore it; per_layer_* take a list with one ratio a layer. `options` are
    kvpress' own field names, of the wrapper or of the press inside.
    """
    row = press_row(name)
    if row.strength == RATIO_PER_LAYER:
        if not isinstance(compression_ratio, (list, tuple)) or not compression_ratio:
            raise ValueError(
                f"compression_ratio={compression_ratio!r}: {name} takes a list with one ratio for each layer"
            )
        for ratio in compression_ratio:
            _check_ratio(ratio)
        return row.build(**{RATIO_PER_LAYER: list(compression_ratio)}, **options)
    _check_ratio(compression_ratio)
    try:
        return row.build(float(compression_ratio), **options)
    except AssertionError as error:  # kvpress' own check of a value
        raise ValueError(f"{name} refuses {options}: {error}") from error


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


def press_table() -> str:
    """The registry as a table in Chinese, for README and report."""
    when = {"hook": "预填充", "exit": "退出上下文时", "decoding": "解码中", "never": ""}
    lines = [
        "| 名称 | 做法 | 注意力 | 何时压缩 | 强度由谁决定 | 可整批 | 核心 | 出处 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS[1:]:
        press = make_press(row.name, [0.5] if row.strength == RATIO_PER_LAYER else 0.5)
        attention = {"any": "都可", "sdpa": "sdpa", "eager": "eager"}[attention_needed(press)]
        strength = "压缩率" if row.takes_ratio else f"`{row.strength}`"
        marks = ["✓" if true else "" for true in (rows_independent(press), row.core)]
        cells = [f"`{row.name}`", row.about, attention, when[acts(press)], strength, *marks, _linked(row.paper)]
        lines.append("| " + " | ".join(cells) + " |")
    missing = "、".join(f"`{name}`" for name in UNAVAILABLE)
    lines += ["", f"{missing} 要用训练出来的权重，只为别的模型发布过，这里无从算出；`make_press` 会说明各缺什么。"]
    return "\n".join(lines)


def _linked(paper: str) -> str:
    site, _, number = paper.partition(":")
    address = {"arXiv": "https://arxiv.org/abs/", "openreview": "https://openreview.net/forum?id="}.get(site)
    return f"[{number}]({address}{number})" if address else ""


# -- using a press ------------------------------------------------------------------------------------------------


def check_press(press: BasePress | None, model: KVNeoXForCausalLM) -> None:
    """Refuse, before any work, what this model cannot serve."""
    needed, has = attention_needed(press), model.config._attn_implementation
    reason = {
        "eager": "it reads attention weights, which only eager attention returns",
        "sdpa": "kvpress refuses to run it on eager attention",
    }
    if (needed == "eager" and has != "eager") or (needed == "sdpa" and has == "eager"):
        raise ValueError(
            f"attn_implementation={has!r} cannot serve {type(press).__name__}: {reason[needed]}. "
            f"Load the model with attn_implementation={needed!r}."
        )
    layers = model.config.num_hidden_layers
    if isinstance(press, kvpress.PerLayerCompressionPress) and len(press.compression_ratios) != layers:
        raise ValueError(
            f"compression_ratios has {len(press.compression_ratios)} entries; the model has {layers} layers"
        )


@contextmanager
def attention(model: KVNeoXForCausalLM, implementation: str) -> Iterator[KVNeoXForCausalLM]:
    before, model.config._attn_implementation = model.config._attn_implementation, implementation
    try:
        yield model
    finally:
        model.config._attn_implementation = before


@contextmanager
def applied(press: BasePress | None, model: KVNeoXForCausalLM):
    """`with press(model)`, checked before and leaving nothing behind when something raises inside."""
    if press is None:
        yield
        return
    check_press(press, model)
    implementation = model.config._attn_implementation
    forward = model.model.__dict__.get("forward")  # accelerate's wrapper, or none
    hooks = [set(layer.self_attn._forward_hooks) for layer in model.model.layers]
    failure = None
    try:
        with press(model):
            try:
                yield
            except BaseException as error:
                failure = error
                raise
    except BaseException as last:
        # KVCompose goes on to compress after a failure and raises an error of its own, which would hide the true one
        raise failure or last from None
    finally:
        model.config._attn_implementation = implementation  # KVCompose switches to eager and may fail to switch back
        model.model.__dict__.pop("forward", None)  # KVzip and KVCompose leave theirs here
        if forward is not None:
            model.model.forward = forward
        for layer, before in zip(model.model.layers, hooks):
            for handle in set(layer.self_attn._forward_hooks) - before if failure else ():
                del layer.self_attn._forward_hooks[handle]
                layer.self_attn._forward_hooks_with_kwargs.pop(handle, None)
