"""How presses choose, against what the library knows of them when they are built."""

import pandas as pd
import pytest

from kvneox_lib.pages import kinds
from kvneox_lib.presses.by_name import make_press, ratio_for
from kvneox_lib.presses.facts import acts, attention_needed
from kvneox_lib.presses.registry import REGISTRY


@pytest.mark.parametrize("name", list(REGISTRY)[1:])
def test_every_press_has_a_kind_that_agrees_with_when_it_acts(name, demo):
    press, kind, cost = make_press(name, ratio_for(name, 0.5, demo)), kinds.kind_of(name), kinds.cost_of(name)
    assert kind != kinds.OTHER
    assert (kind == "解码中压缩") == (acts(press) == "decoding") == ("续文" in cost)
    assert (kind == kinds.AT_EXIT) == (acts(press) == "exit") == ("再读一遍" in cost)
    assert ("eager" in cost) == (attention_needed(press) == "eager")


def test_groups_stand_together_the_best_first():
    table = pd.DataFrame({"press": ["knorm", "snapkv", "random", "lagkv", "adakv_snapkv"], "loss": [5, 2, 3, 1, 1]})
    ordered = kinds.in_groups(table, "loss")
    assert ordered["press"].tolist() == ["adakv_snapkv", "snapkv", "lagkv", "knorm", "random"]
    assert kinds.kind_of("of another") == kinds.OTHER and kinds.cost_of("of another") == "—"
    assert kinds.methods(table)["press"].tolist() == ["knorm", "snapkv", "lagkv", "adakv_snapkv"], "a control is none"
    assert [name for name in ("random", "random_recent", "snapkv", "kvzip", "of another") if kinds.is_core(name)] == [
        "random",
        "random_recent",
        "snapkv",
    ]
