"""A toy is trained by the recipe of the bundled model, interrupted and not."""

import json
import math
import random
import re
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPTNeoXForCausalLM

from kvneox_lib.inputs.templates import TEMPLATES
from kvneox_lib.inputs.weights import demo_folder, load_model

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import train_demo  # noqa: E402

TOY = "--windows 128 256 --tokens 5120 5120 --batch-tokens 256 --vocabulary 512 "
TOY = (
    TOY + "--layers 2 --hidden 64 --heads 2 --muon-lr 0.04 --adamw-lr 0.01 --checkpoint-every 6 --device cpu"
).split()
STEPS = 40


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name in ("compound", "specialnames", "formatstrings"):
        (folder / f"{name}.txt").write_text(topics[name], encoding="utf-8")
    (folder / "notes.csv").write_text("not text to train on")
    return folder


@pytest.fixture(scope="module")
def toy(texts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    held_out = folder / "held-out.txt"
    held_out.write_text(topics["types"], encoding="utf-8")
    train_demo.main([str(texts), "--output", str(folder / "model"), "--held-out", str(held_out), *TOY])
    return folder / "model"


def test_the_loss_falls_in_both_stages_and_beyond_the_text_it_saw(toy):
    record = json.loads((toy / "train.json").read_text())
    steps, losses = zip(*record["log"])
    assert steps == tuple(range(STEPS))
    assert losses[0] == pytest.approx(math.log(512), abs=0.2)  # it starts knowing nothing
    tens = [sum(losses[start : start + 10]) / 10 for start in range(0, STEPS, 10)]
    assert tens[0] > tens[1] > tens[3] and tens[3] < tens[0] - 0.5
    assert record["evaluation"]["held-out.txt"]["perplexity"] < 512 / 2
    assert not list(toy.glob("checkpoint*"))


def test_what_comes_out_is_the_same_kind_of_model_as_the_demo(toy):
    def kind(config: dict) -> dict:
        sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
        other = ("max_position_embeddings", "transformers_version")
        return {key: value for key, value in config.items() if key not in sizes + other}

    configs = [json.loads((folder / "config.json").read_text()) for folder in (toy, demo_folder())]
    assert kind(configs[0]) == kind(configs[1])
    assert load_file(toy / "model.safetensors").keys() <= GPTNeoXForCausalLM.from_pretrained(toy).state_dict().keys()
    assert all(tensor.dtype == torch.float16 for tensor in load_file(toy / "model.safetensors").values())

    loaded, demo = load_model(str(toy)), load_model("demo")
    for text in ("The caché — 漢字 \n\tif x:", " twice  spaced"):  # what was never seen can be written all the same
        assert loaded.tokenizer.decode(loaded.tokenizer(text).input_ids) == text
    assert loaded.tokenizer.special_tokens_map == demo.tokenizer.special_tokens_map
    assert loaded.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|padding|>"]) == [0, 1]


def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(toy, texts, tmp_path, monkeypatch, capsys):
    command = [str(texts), "--output", str(tmp_path), *TOY]
    save, saves = train_demo.save_checkpoint, []

    def cut_short(*arguments):
        if len(saves) == 4:  # in the second stage, 4 steps after its last checkpoint
            raise KeyboardInterrupt
        saves.append(save(*arguments))

    monkeypatch.setattr(train_demo, "save_checkpoint", cut_short)
    with pytest.raises(KeyboardInterrupt):
        train_demo.main(command)
    monkeypatch.setattr(train_demo, "save_checkpoint", save)
    assert not (tmp_path / "model.safetensors").exists()
    with pytest.raises(ValueError, match="other settings"):
        train_demo.main([*command, "--seed", "1"])
    train_demo.main(command)
    assert "going on from step 24" in capsys.readouterr().out

    logs = [json.loads((folder / "train.json").read_text())["log"] for folder in (toy, tmp_path)]
    assert logs[0] == logs[1]
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (toy, tmp_path))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_windows_of_the_second_stage(toy):
    tokenizer = load_model(str(toy)).tokenizer
    rng = random.Random(0)
    tokens = train_demo.encode(tokenizer, list(topics.values())[:20], at_least=2048)
    for _ in range(20):
        window = train_demo.plain_window(tokens, 1024, rng)
        copied = train_demo.with_returning_passage(window, rng)
        changed = [place for place, (old, new) in enumerate(zip(window, copied)) if old != new]
        assert len(copied) == 1024 and 20 < changed[-1] - changed[0] + 1 <= 256
        passage = copied[changed[0] : changed[-1] + 1]
        earlier = [copied[start : start + len(passage)] for start in range(changed[0] - len(passage) + 1)]
        assert passage in earlier


@pytest.mark.parametrize("name", train_demo.RECIPES)
def test_numbers_are_told_once_and_asked_for(toy, name):
    tokenizer, recipe, rng = load_model(str(toy)).tokenizer, train_demo.RECIPES[name], random.Random(0)
    tokens, stage = train_demo.encode(tokenizer, list(topics.values())[:20], at_least=2048), recipe.stages[-1]
    n_asked = set()
    for _ in range(20):
        window = train_demo.plain_window(tokens, 1024, rng)
        mixed, answers = train_demo.with_numbers(window, tokenizer, recipe, stage, rng)
        assert len(mixed) == 1024 and answers[-1].stop == 1024
        n_asked.add(len(answers))
        text = tokenizer.decode(mixed)
        for answer in answers:
            digits = tokenizer.decode(mixed[answer]).strip(" .")
            assert digits.isdigit() and len(digits) == 5 and text.count(digits) == 2  # told and answered
            before = tokenizer.decode(mixed[: answer.start])
            assert any(_tells(wording, digits, before) for wording in stage.wordings)
    assert min(n_asked) >= recipe.asked[0] and max(n_asked) <= recipe.asked[1]
    assert (len(n_asked) == 1) == (recipe.asked[0] == recipe.asked[1])
    with pytest.raises(ValueError, match="too short"):
        train_demo.with_numbers(tokens[:30].tolist(), tokenizer, recipe, stage, rng)


def _tells(wording, digits: str, text: str) -> bool:
    """Whether the text states the number in these words of the name that it asks for last."""
    asked = re.search(re.escape(wording.asked("NAME")).replace("NAME", r"(\w+)", 1).replace("NAME", r"\1") + "$", text)
    return asked is not None and "".join(wording.told(asked[1], digits)) in text


def test_recipes_read_the_wordings_that_the_table_says():
    for name, recipe in train_demo.RECIPES.items():
        read = {wording.statement for stage in recipe.stages for wording in stage.wordings}
        assert {one.statement for one in TEMPLATES.values() if name in one.trained} <= read
        assert not read & {one.statement for one in TEMPLATES.values() if name not in one.trained}
    readme = (demo_folder() / "README.md").read_text().replace("{Name}", "{name}").replace("{five digits}", "{digits}")
    for wording in TEMPLATES.values():
        assert (f"`{wording.statement}`" in readme) == ("demo" in wording.trained)


def test_learning_rates_fall_to_zero_and_begin_anew_where_the_recipe_says(tmp_path):
    chosen = train_demo.options([str(tmp_path), "--output", "x", "--recipe", "demo-wordings"])
    rates = [np.array(of_stage) for of_stage in train_demo.learning_rates(chosen)]
    recipe = train_demo.RECIPES["demo-wordings"]
    assert [len(of_stage) for of_stage in rates] == [stage.tokens // recipe.batch_tokens for stage in recipe.stages]
    before, last = np.concatenate(rates[:2]), rates[2]
    for part, peak in ((before, 1.0), (last, 0.4)):
        np.testing.assert_allclose(part, np.linspace(peak, 0, len(part) + 1)[:-1])
    with pytest.raises(SystemExit):
        train_demo.options([str(tmp_path), "--output", "x", "--tokens", "1", "2", "3"])


def test_text_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    for path, complaint in ((tmp_path / "latin.txt", "latin.txt is not UTF-8"), (tmp_path / "none", "no such file")):
        with pytest.raises(ValueError, match=complaint):
            train_demo.read_texts([path])
    with pytest.raises(SystemExit):
        train_demo.options([str(tmp_path), "--output", "x", "--batch-tokens", "1024"])
