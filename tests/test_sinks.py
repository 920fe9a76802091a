"""Attention to the first tokens: against transformers' own class, and against a model that is made to have a sink."""

import numpy as np
import pytest
import torch
from conftest import stock_and_ours, tiny_config

from kvneox_lib.measures import sinks
from kvneox_lib.measures.sinks import sink_attention

IDS = torch.randint(0, 97, (3, 150), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("most_bytes", [2**28, 4 * 4 * 150 * 7])  # in one piece, and seven queries at a time
def test_it_is_that_of_the_stock_model(most_bytes, monkeypatch):
    monkeypatch.setattr(sinks, "MOST_BYTES", most_bytes)
    stock, ours = stock_and_ours(tiny_config())
    stock.set_attn_implementation("eager")
    with torch.no_grad():
        weights = torch.stack(stock(IDS, output_attentions=True).attentions)  # (layers, batch, heads, queries, keys)
    ours.config._attn_implementation = "sdpa"  # the two share their config
    for n_first, earliest in ((4, 64), (1, 5)):
        found = sink_attention(ours, IDS, n_first=n_first, earliest=earliest)
        counted = weights[:, :, :, earliest:]
        torch.testing.assert_close(found.first.float(), counted[..., 0].mean((1, 3)), atol=1e-6, rtol=1e-5)
        several = counted[..., :n_first].sum(-1).mean((1, 3))
        torch.testing.assert_close(found.several.float(), several, atol=1e-6, rtol=1e-5)
        assert found.n_queries == 3 * (150 - earliest)
    assert ours.config._attn_implementation == "sdpa"


def test_where_all_draw_alike_it_is_what_is_called_even():
    """A model whose queries are zero."""
    _, ours = stock_and_ours(tiny_config())
    for layer in ours.model.layers:
        fused = layer.self_attn.query_key_value
        rows = torch.arange(3 * ours.config.hidden_size).view(2, 3, -1)[:, 0].flatten()  # of the queries, by head
        with torch.no_grad():
            fused.weight[rows] = fused.bias[rows] = 0.0
    found = sink_attention(ours, IDS)
    assert found.first.numpy() == pytest.approx(np.full((2, 2), found.even_first), rel=1e-5)
    assert found.several.numpy() == pytest.approx(np.full((2, 2), found.even_several), rel=1e-5)
    assert found.even_first == pytest.approx(np.mean([1 / (1 + position) for position in range(64, 150)]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_first": 0}, "n_first=0"),
        ({"earliest": 2}, "earliest=2: must be a whole number of at least 4"),
        ({"earliest": 150}, "input_ids: has 150 tokens; allowed is more than earliest=150"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    _, ours = stock_and_ours(tiny_config())
    with pytest.raises(ValueError, match=message):
        sink_attention(ours, IDS, **wrong)
