"""What is attached to a model for a while, and whose turn it is.

A press acts through hooks on a model's modules and through its config: whatever reads the model meanwhile is compressed
too. So all that reads or changes a model takes a turn, and another thread waits for its own.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from threading import Lock, RLock

import torch
from torch import nn

# Beside the models, not in them: a lock can be neither copied nor pickled.
_turns: weakref.WeakKeyDictionary[nn.Module, RLock] = weakref.WeakKeyDictionary()
_registering = Lock()


def turn(model: nn.Module) -> RLock:
    """`with turn(model):` waits until no other thread reads that model. Within a turn further ones can be taken."""
    with _registering:
        return _turns.setdefault(getattr(model, "base_model", model), RLock())


def in_turn(function: Callable) -> Callable:
    """`function(model, ...)`, in a turn of the model's."""

    @wraps(function)
    def taking_turns(model, *args, **kwargs):
        if torch.compiler.is_compiling():  # a lock cannot be in a graph
            return function(model, *args, **kwargs)
        with turn(model):
            return function(model, *args, **kwargs)

    return taking_turns


def attached(model: nn.Module) -> list:
    """What acts on all that the model reads: presses, by a hook on an attention layer or in place of the decoder's
    forward (KVzip), and a StreamingDecoder, by a hook before the decoder.

    Told by what a hook belongs to: this room knows neither kvpress nor the decoder.
    """
    decoder = model.base_model
    hooks = [hook for layer in decoder.layers for hook in layer.attention._forward_hooks.values()]
    owners = [getattr(hook, "__self__", None) for hook in [*hooks, *decoder._forward_pre_hooks.values()]]
    replaced = getattr(decoder.__dict__.get("forward"), "__func__", None)
    owners += [cell.cell_contents for cell in getattr(replaced, "__closure__", None) or ()]
    return list({id(owner): owner for owner in owners if is_press(owner) or hasattr(owner, "stands_in")}.values())


def is_pressed(model: nn.Module) -> bool:
    """Whether a press has hooks on attention layers, be they its methods or, as some have, functions of kvpress'."""
    hooks = [hook for layer in model.base_model.layers for hook in layer.attention._forward_hooks.values()]
    told = [getattr(hook, "__module__", None) or "" for hook in hooks]
    return any(is_press(getattr(hook, "__self__", None)) for hook in hooks) or any("kvpress" in one for one in told)


def is_press(owner) -> bool:
    return hasattr(owner, "compress") and hasattr(owner, "forward_hook")


def refuse_attached(model: nn.Module, but=None) -> None:
    """What is measured or generated under a press of its own must meet no other one; `but` may be there."""
    for owner in attached(model):
        name = type(owner).__name__
        if owner is not but and is_press(owner):
            raise ValueError(
                f"{name} is applied to this model already and would compress what is read here, too. Leave its `with` "
                "statement first, and give the press as an argument where there is one"
            )
        if owner is not but:
            raise ValueError(
                f"a {name} is registered on this model and would put {owner.stands_in} in the place of the cache. "
                "remove() it first, or leave its `with` statement"
            )


def refuse_padding(model: nn.Module, attention_mask: torch.Tensor | None) -> None:
    """A press scores and evicts padding as if it were text, and masks are lost with the entries that they are about."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        return
    presses = [type(owner).__name__ for owner in attached(model) if is_press(owner)]
    if presses and not attention_mask.all():
        raise ValueError(
            f"attention_mask marks padding, but {presses[0]} cannot tell padding from text, and after compression "
            "nobody knows which entries were padding. Use prompts of equal length, or one by one"
        )


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable, *, before: bool = False) -> Iterator[None]:
    """`hook(module, args, kwargs, output)` after each call of the modules; `hook(module, args, kwargs)` before it."""
    handles = []
    try:
        for module in modules:
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            handles.append(register(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
