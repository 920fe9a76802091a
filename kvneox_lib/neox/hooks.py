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
