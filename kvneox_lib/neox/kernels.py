"""The two products that a decoding step spends its time on, each in the form that reads memory fastest.

A step multiplies few rows with all weights and one query with all keys: it is as fast as memory is read. For such
shapes libraries choose kernels made for large ones, which on a CPU read at a half or a quarter of the possible speed.
"""

import torch
from torch import nn

FEW_ROWS = 32


def linear_of_few_rows(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """`module(x)`. In float32 on a CPU, with few rows, as weight @ x^T: 1.2 to 4 times as fast as x @ weight^T (MKL, 2
    cores of an AMD EPYC). A single row is the slowest of all and is doubled."""
    n_rows = x.numel() // x.shape[-1]
    if n_rows > FEW_ROWS or x.device.type != "cpu" or x.dtype != torch.float32 or not is_plain(module):
        return module(x)
    rows = x.reshape(n_rows, -1)
    columns = (rows.repeat(2, 1) if n_rows == 1 else rows).t()
    if module.bias is None:
        product = torch.mm(module.weight, columns)
    else:
        product = torch.addmm(module.bias[:, None], module.weight, columns)
    return product.t()[:n_rows].reshape(*x.shape[:-1], -1)


def is_plain(module: nn.Module) -> bool:
    """Whether calling it is multiplying with its weight: not quantized, adapted (LoRA), offloaded or watched."""
    return type(module) is nn.Linear and not is_watched(module)


def is_watched(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))


def attend_with_one_query(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
    """softmax(query key^T) value for query (rows, 1, D), key and value (rows, n, D).

    key @ query^T, rather than query @ key^T, reads the keys twice as fast as the fused kernel does.
    """
    scores = torch.bmm(key, (query * scaling).transpose(1, 2)).squeeze(-1)  # (rows, n)
    return torch.bmm(scores.softmax(-1).unsqueeze(1), value)  # (rows, 1, D)


def one_query_is_faster_alone(query: torch.Tensor) -> bool:
    """query (batch, heads, queries, D)"""
    return query.shape[2] == 1 and query.device.type == "cpu" and query.dtype == torch.float32
