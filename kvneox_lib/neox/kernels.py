"""The two products that a decoding step spends its time on, each in the form that reads memory fastest.

A step multiplies few rows with all weights and few queries with all keys: it is as fast as memory is read. For such
shapes libraries choose kernels made for large ones, which on a CPU read at a half or a quarter of the possible speed.
Attention reads keys and values once, compiled by numba (see `compiled`). With weights it depends on the numbers:

    rows       float32                           bfloat16, float16
    one        numba                             numba
    2 to 4     numba                             numba; large weights: oneDNN, on a packed copy of them
    5 to 32    oneDNN, on a packed copy          oneDNN, on a packed copy
    more       the module itself                 the module itself

Copies are made and used within `packed_weights` alone. Without numba all is as torch has it. Up to four tokens go
through all layers in one call (see `layers`).
"""

import os
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from threading import Lock
from types import ModuleType

import torch
from torch import nn
from transformers.utils.output_capturing import _active_collector

from kvneox_lib.neox import bits

FEW_ROWS, FEW_QUERIES = 32, 8
LARGE = 2**22  # numbers in a weight
PACKED_SHARE = 1 / 8  # of the machine's memory: so much do the copies of all models take together at most


@cache
def compiled() -> ModuleType | None:
    """The kernels made by numba; None where it cannot be had, which is said once."""
    try:
        from kvneox_lib.neox import compiled
    except ImportError as error:
        warnings.warn(f"numba cannot be imported ({error}): on a CPU decoding takes 2 to 4 times as long", stacklevel=2)
        return None
    return compiled


def _may_be_compiled(x: torch.Tensor) -> bool:
    """Numba knows neither gradients nor graphs nor autocast."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    return compiled() is not None and x.dtype in compiled().WORDS


def is_plain(module: nn.Module) -> bool:
    """Whether calling it is multiplying with its weight: not quantized, adapted (LoRA), offloaded or watched."""
    return type(module) is nn.Linear and not is_watched(module)


def is_watched(module: nn.Module) -> bool:
    """By hooks, or by a `forward` put in the place of its own."""
    own, hooks = module.__dict__, [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return "_hf_hook" in own or "forward" in own or not all(map(_is_asleep, hooks))


def _is_asleep(hook) -> bool:
    """transformers leaves its hooks on a model that was once asked for hidden states."""
    return "output_capturing" in getattr(hook, "__qualname__", "") and not _active_collector.get()


# ---- few rows times all weights -------------------------------------------------------------------------------------


def linear_of_few_rows(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """`module(x)`, for few rows in the form that is fastest."""
    n_rows = x.numel() // x.shape[-1]
    if n_rows > FEW_ROWS or x.device.type != "cpu" or not is_plain(module):
        return module(x)
    packed = module.__dict__.get("kvneox_packed")
    if packed is not None and x.dtype == packed.dtype and _may_be_compiled(x):
        return torch.ops.mkldnn._linear_pointwise(x, packed, module.bias, "none", [], "")
    if _is_for_numba(n_rows, module) and _fits(x, module.weight) and _may_be_compiled(x):
        product = compiled().multiply(x.reshape(n_rows, -1), module.weight, module.bias)
        return product.to(x.dtype).view(*x.shape[:-1], -1)
    if x.dtype != torch.float32:
        return module(x)
    # as weight @ x^T: 1.2 to 4 times as fast as x @ weight^T; a single row is the slowest of all and is doubled
    rows = x.reshape(n_rows, -1)
    columns = (rows.repeat(2, 1) if n_rows == 1 else rows).t()
    if module.bias is None:
        product = torch.mm(module.weight, columns)
    else:
        product = torch.addmm(module.bias[:, None], module.weight, columns)
    return product.t()[:n_rows].reshape(*x.shape[:-1], -1)


def _fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return x.dtype == weight.dtype and x.shape[-1] == weight.shape[1]


def _is_for_numba(n_rows: int, module: nn.Linear) -> bool:
    weight = module.weight
    few = 0 < n_rows <= (4 if weight.dtype == torch.float32 or weight.numel() < LARGE else 1)
    return few and is_in_place(module)


def is_in_place(module: nn.Module) -> bool:
    """Whether the numbers of its weight and bias lie in the machine's memory as they are, rows in whole words."""
    weight, bias = module.weight, module.bias
    parts = [weight] if bias is None else [weight, bias]
    whole = weight.dtype == torch.float32 or weight.shape[-1] % 2 == 0 and all(p.data_ptr() % 4 == 0 for p in parts)
    plain = all(type(p) is nn.Parameter and p.device.type == "cpu" and p.is_contiguous() for p in parts)
    return whole and plain and (bias is None or (bias.dtype == weight.dtype and len(bias) == len(weight)))


_packing = Lock()
_copies: weakref.WeakKeyDictionary[nn.Module, tuple[torch.Tensor, torch.Tensor]] = weakref.WeakKeyDictionary()


@contextmanager
def packed_weights(model: nn.Module, n_rows: int) -> Iterator[None]:
    """Within it, `n_rows` are multiplied with packed copies of the model's weights, where that is faster and the copies
    are within their share of memory. They are kept, and made anew where weights have changed."""
    modules = []
    if model.device.type == "cpu" and n_rows <= FEW_ROWS and _packing_works(model.dtype):
        plain = [module for module in model.modules() if is_plain(module) and is_in_place(module)]
        modules = [module for module in plain if not _is_for_numba(n_rows, module)]
    try:
        for module in modules:
            with _packing:
                module.__dict__["kvneox_packed"] = _packed_copy(module)
        yield
    finally:
        for module in modules:
            module.__dict__.pop("kvneox_packed", None)


@torch.no_grad()
def _packed_copy(module: nn.Linear) -> torch.Tensor | None:
    """Torch does not tell when weights are written to: what they make of a probe does."""
    weight = module.weight
    probe = torch.randn(1, weight.shape[1], generator=torch.Generator().manual_seed(0))
    told = compiled().multiply(probe, weight, None)
    known, copy = _copies.get(module, (None, None))
    if known is not None and torch.equal(known, told):
        return copy
    _copies.pop(module, None)
    taken = sum(copy.numel() * copy.element_size() for _, copy in _copies.values())
    if taken + weight.nbytes > PACKED_SHARE * memory_bytes():
        return None
    # for 16 rows: packed so, it is read as fast for any number of them
    _copies[module] = told, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)
    return _copies[module][1]


@cache
@torch.no_grad()
def _packing_works(dtype: torch.dtype) -> bool:
    """Whether this build of torch and this processor can, and the result is right."""
    if compiled() is None or dtype not in compiled().WORDS:
        return False
    weight, x = (torch.arange(n, dtype=torch.float32).view(-1, 16).sin().to(dtype) for n in (512, 32))
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 16)
        product = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(product.float(), x.float() @ weight.float().t(), rtol=0.02, atol=0.02)


@cache
def memory_bytes() -> int:
    """Of the machine, or of the container that this runs in."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # on Windows
        found = 8 * 2**30
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found = min(found, int(Path(limit).read_text()))
        except (OSError, ValueError):  # there is none
            pass
    return found


# ---- few queries over all keys and values ---------------------------------------------------------------------------


def is_for_few_queries(query: torch.Tensor) -> bool:
    """query (batch, heads, n, D)"""
    return query.shape[2] <= FEW_QUERIES and _may_be_compiled(query)


def attend_with_few_queries(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """softmax(query key^T) value, all (batch, heads, n, D); the last query sees all keys, the one before it all but the
    last, and so on. For what `is_for_few_queries` is true of."""
    if key.stride() != value.stride() or key.stride(-1) != 1 or any(step % 2 for step in key.stride()[:3]):
        key, value = key.contiguous(), value.contiguous()
    return attend_to_rows(query, None, rows_of(key, value, key.shape[2]), scaling)


def attend_to_rows(query: torch.Tensor, held, new, scaling: float) -> torch.Tensor:
    """query (batch, heads, n, D), a sample and head of it a row; held (or None) and new: `compiled.Rows`."""
    queries = compiled().in_order_of_words(query.flatten(0, 1).float() * scaling, query.dtype)
    return compiled().attend(queries, held or new.none(), new).view(query.shape).to(query.dtype)


def rows_of(keys: torch.Tensor, values: torch.Tensor, length: int):
    """`compiled.Rows` of keys and values (batch, heads, _, D) that lie in memory alike, `length` entries of each."""
    of_a_sample, of_a_head, stride = (step // compiled().per(keys.dtype) for step in keys.stride()[:3])
    return compiled().Rows(keys, values, _starts(*keys.shape[:2], of_a_sample, of_a_head), length, stride)


@lru_cache(64)
def _starts(batch: int, heads: int, of_a_sample: int, of_a_head: int) -> torch.Tensor:
    """The word with which each row begins."""
    with torch.inference_mode(False):
        return (torch.arange(batch)[:, None] * of_a_sample + torch.arange(heads) * of_a_head).flatten()


def may_be_turned(x: torch.Tensor, cos: torch.Tensor) -> bool:
    """Whether compiled code can turn the queries and keys of x (batch, n, ...) by cos (1 or batch, n, D)."""
    batch, n = x.shape[:2]
    of_these = tuple(cos.shape[:2]) in ((1, n), (batch, n)) and cos.dtype == x.dtype
    return n <= FEW_QUERIES and of_these and x.dtype != torch.float16 and _may_be_compiled(x)


def attend_turned(fused: torch.Tensor, cos, sin, half: int, layer, scaling: float) -> torch.Tensor:
    """From what `query_key_value` gives for a few tokens to what `dense` takes, both (batch, n, heads * ...): keys and
    values are written into the room that a cache's `layer` makes, and read with all others there.

    One call in the place of some thirty operations on a few numbers each: a step spent a third of its time on those.
    """
    batch, n, width = fused.shape
    dim = cos.shape[-1]
    held, new, at = layer.make_room(batch, width // (3 * dim), n, dim, fused.dtype)
    queries = compiled().turn_into(new, at, fused.contiguous(), cos.contiguous(), sin.contiguous(), half, scaling)
    output = compiled().attend(queries, held or new.none(), new).to(fused.dtype)  # (batch * heads, n, D)
    return output.view(batch, -1, n, output.shape[-1]).transpose(1, 2).flatten(2)


def pack_blocks(keys: torch.Tensor, values: torch.Tensor, counts: torch.Tensor, form: bits.Form) -> torch.Tensor:
    """See `bits.pack`."""
    if not _may_be_compiled(keys):
        return bits.pack(keys, values, counts, form)
    from kvneox_lib.neox import packer  # wants numba

    return packer.pack(keys, values, counts, form)


def read_layers(layers, rooms, x, cos, sin) -> torch.Tensor:
    return _layers().read_layers(layers, rooms, x, cos, sin)


def _layers() -> ModuleType:
    """Wants numba."""
    from kvneox_lib.neox import layers

    return layers


def attend_with_one_query(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """The same without numba, in float32 on a CPU, for query (rows, 1, D), key and value (rows, n, D).

    key @ query^T, rather than query @ key^T, reads the keys twice as fast as the fused kernel does.
    """
    scores = torch.bmm(key, (query * scaling).transpose(1, 2)).squeeze(-1)  # (rows, n)
    return torch.bmm(scores.softmax(-1).unsqueeze(1), value)  # (rows, 1, D)


def one_query_is_faster_alone(query: torch.Tensor) -> bool:
    """query (batch, heads, queries, D)"""
    return query.shape[2] == 1 and query.device.type == "cpu" and query.dtype == torch.float32


# ---- before a clock runs --------------------------------------------------------------------------------------------


@cache
@torch.no_grad()
def make_ready(dtype: torch.dtype, kv_bits: int = 0) -> None:
    """Compile, or fetch from the disk, what a step in that precision needs, from a cache in so many bits (0: as it is):
    seconds, once."""
    states = torch.zeros(1, 1, 1, 16, dtype=dtype)
    if is_for_few_queries(states):
        for bits_held in {0, kv_bits}:
            compiled().kernel_for(compiled()._attend, dtype, bits_held)
        if kv_bits:
            block = states[0].expand(1, bits.GROUP, -1)
            pack_blocks(block, block, torch.ones(1, dtype=torch.long), bits.form_of(kv_bits, block))
        compiled().multiply(states[0, 0], states[0, 0], None)
        _packing_works(dtype)
        if may_be_turned(states[0], states[0]):
            for bits_held in {0, kv_bits}:
                _layers().compile_for(dtype, bits_held)
