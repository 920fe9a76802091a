"""Using a press: refused before any work where the model cannot serve it, and leaving nothing behind."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import kvpress
import torch
from kvpress import BasePress

from kvneox_lib.neox.hooks import refuse_attached, turn
from kvneox_lib.neox.modeling import KVNeoXForCausalLM
from kvneox_lib.presses.facts import attention_needed, kind_of, not_scored, parts_of, rows_independent


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
    if model.dtype == torch.float16 and any(kind_of(part) is kvpress.KVgradPress for part in parts_of(press)):
        raise ValueError(
            "dtype='float16': the gradients of kvpress' own KVgradPress overflow, and what it keeps is left to chance. "
            "make_press('kvgrad') scales them; or load the model with dtype='bfloat16'"
        )
    layers = model.config.num_hidden_layers
    if isinstance(press, kvpress.PerLayerCompressionPress) and len(press.compression_ratios) != layers:
        raise ValueError(
            f"compression_ratios has {len(press.compression_ratios)} entries; the model has {layers} layers"
        )


def check_context(press: BasePress | None, n_tokens: int) -> None:
    """Refuse a context that is all window or sinks."""
    what, n_not_scored = not_scored(press, n_tokens)
    if n_tokens <= n_not_scored:
        raise ValueError(
            f"input_ids: a context of {n_tokens} tokens should be greater than {what}; allowed is one of at least "
            f"{n_not_scored + 1}"
        )


def readable_at_once(input_ids: torch.Tensor, *presses: BasePress | None) -> tuple[torch.Tensor, ...]:
    """The batch, whole; row by row where a press would mix its rows."""
    return (input_ids,) if all(map(rows_independent, presses)) else input_ids.split(1)


@contextmanager
def attention(model: KVNeoXForCausalLM, implementation: str) -> Iterator[KVNeoXForCausalLM]:
    """Another implementation for a while, in a turn of the model's."""
    with turn(model):
        before, model.config._attn_implementation = model.config._attn_implementation, implementation
        try:
            yield model
        finally:
            model.config._attn_implementation = before


@contextmanager
def applied(press: BasePress | None, model: KVNeoXForCausalLM):
    """`with press(model)` in a turn of the model's, checked before and leaving nothing behind when something raises."""
    with turn(model):
        refuse_attached(model)
        if press is None:
            yield
            return
        check_press(press, model)
        with left_as_found(press(model), model):
            yield


@contextmanager
def left_as_found(context: AbstractContextManager, model: KVNeoXForCausalLM):
    """`context`, a press' own; when something fails in it, that is what is told, and nothing stays attached."""
    implementation = model.config._attn_implementation
    forward = model.model.__dict__.get("forward")  # accelerate's wrapper, or none
    hooks = [set(layer.self_attn._forward_hooks) for layer in model.model.layers]
    failure = None
    try:
        with context:
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
