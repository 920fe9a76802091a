"""The widgets of notebook 06 when another model is chosen, and what its page makes of names from outside."""

import copy
import dataclasses

import pytest
from test_explore import TextOf

from kvneox_lib import KVNeoXForCausalLM
from kvneox_lib.pages import explore_page, explorer
from kvneox_lib.studies.explore import record_exploration

ASKED = {"model": "demo", "weights": "auto", "dataset": "python-docs", "subset": None, "split": "test"}
ASKED |= {"sample_idx": None, "data_dir": None, "press": "snapkv", "compression_ratio": 0.75, "position": 0.5}
ASKED |= {"context_length": 160, "continuation_length": 12, "attn_implementation": "auto", "dtype": "auto"}
ASKED |= {"device": "auto", "seed": 0}


@pytest.fixture(scope="module")
def explored(tmp_path_factory):
    return record_exploration(**ASKED, output_dir=str(tmp_path_factory.mktemp("out")))


def smaller(loaded):
    """The demo model's shape with two layers of two heads."""
    config = copy.deepcopy(loaded.model.config)
    config.num_hidden_layers, config.num_attention_heads, config.head_dim = 2, 2, config.hidden_size // 2
    model = KVNeoXForCausalLM(config).eval()
    return dataclasses.replace(loaded, model=model, name="smaller")


@pytest.mark.parametrize(("layer", "head"), [(5, 3), (5, explorer.EVERY), (explorer.EVERY, 3), (1, 1)])
def test_a_layer_and_a_head_that_the_next_model_lacks(explored, layer, head, monkeypatch):
    shown = explorer.Explorer(explored, ASKED)
    monkeypatch.setattr(explorer, "load_model", lambda name, **more: smaller(explored.loaded))
    shown.layer.value, shown.head.value = layer, head
    shown.model.value = "pythia-70m"  # what stands in for it has fewer of both
    assert shown.found is not None and shown.found.kept.shape[:2] == (2, 2) and "smaller" in shown.status.value
    assert shown.layer.options == shown.head.options == (explorer.EVERY, 0, 1)
    assert shown.layer.value == shown.head.value == explorer.EVERY
    assert shown.map.value == explore_page.token_map(shown.found)
    monkeypatch.setattr(explorer, "load_model", lambda name, **more: explored.loaded)
    shown.layer.value, shown.head.value = 1, 0
    assert shown.map.value == explore_page.token_map(shown.found, 1, 0)
    shown.model.value = "demo"  # and back to more
    assert len(shown.layer.options) == 7 and shown.map.value == explore_page.token_map(shown.found)
    shown.layer.value = 5
    assert shown.map.value == explore_page.token_map(shown.found, 5)


def test_names_from_outside_are_text(explored):
    loaded = dataclasses.replace(explored.loaded, name="<script>a_b*")
    text = dataclasses.replace(explored.text, name="<i>&book")
    page = explore_page.title(dataclasses.replace(explored, loaded=loaded, text=text), "<u>")
    read = TextOf(page)
    assert read.tags == {"p", "b"}
    assert read.text.startswith("模型 <script>a_b*（权重：bundled），文本 <i>&book，上下文 160 个词元，press <u>。")
