"""The kernels of a decoding step compute what the ordinary ones do."""

import pytest
import torch
from conftest import relative_difference, stock_and_ours, tiny_config
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from kvneox_lib.neox.kernels import attend_with_one_query, is_plain, linear_of_few_rows
from kvneox_lib.neox.modeling import stock_twin


@pytest.mark.parametrize("shape", [(1, 1, 24), (2, 24), (3, 1, 24), (32, 24), (33, 24), (2, 5, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_few_rows(shape, bias):
    module, x = nn.Linear(24, 40, bias=bias), torch.randn(shape)
    out = linear_of_few_rows(module, x)
    assert out.shape == (*shape[:-1], 40) and relative_difference(out, module(x)) < 1e-5
    low = module.to(torch.bfloat16)
    assert torch.equal(linear_of_few_rows(low, x.bfloat16()), low(x.bfloat16()))


def test_a_module_that_is_watched_or_replaced_is_called_itself():
    """Hooks, adapters and quantized layers would be passed by otherwise."""

    class Doubling(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    module, x, calls = Doubling(8, 8), torch.randn(1, 8), []
    assert torch.equal(linear_of_few_rows(module, x), module(x))
    module = nn.Linear(8, 8)
    assert is_plain(module)
    handle = module.register_forward_hook(lambda *_: calls.append(1))
    linear_of_few_rows(module, x)
    handle.remove()
    assert calls == [1]


def test_attention_with_one_query():
    query, key, value = torch.randn(6, 1, 16), torch.randn(6, 30, 16), torch.randn(6, 30, 16)
    expected = scaled_dot_product_attention(query, key, value)
    assert relative_difference(attend_with_one_query(query, key, value, 0.25), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_single_tokens_through_the_model_are_the_stock_models(batch):
    _, ours = stock_and_ours(tiny_config())
    ids = torch.randint(0, 97, (batch, 30))
    cache = ours(ids[:, :20], use_cache=True).past_key_values
    steps = [ours(ids[:, t : t + 1], past_key_values=cache).logits for t in range(20, 30)]
    assert relative_difference(torch.cat(steps, dim=1), stock_twin(ours)(ids).logits[:, 20:]) < 1e-5


@torch.no_grad()
def test_the_mlp_in_slices_is_the_mlp(monkeypatch):
    _, ours = stock_and_ours(tiny_config())
    ids = torch.randint(0, 97, (2, 50))
    expected = ours(ids).logits
    monkeypatch.setattr("kvneox_lib.neox.modeling.TOKENS_PER_SLICE", 14)
    widest = []
    handle = ours.model.layers[0].mlp.dense_h_to_4h.register_forward_hook(lambda m, a, out: widest.append(out.shape[1]))
    assert relative_difference(ours(ids).logits, expected) < 1e-5
    handle.remove()
    assert widest == [7] * 7 + [1]
