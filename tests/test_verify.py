"""The checks of the proof: they pass on a sound model and fail on a broken one."""

import subprocess
import sys

import pytest
import torch
from conftest import DEMO, stock_and_ours, tiny_config
from transformers import AutoModelForCausalLM

from kvneox_lib import __main__
from kvneox_lib.measures import verify
from kvneox_lib.neox import modeling
from kvneox_lib.pages import correctness
from kvneox_lib.pages.tables import press_table
from kvneox_lib.presses.registry import REGISTRY


@pytest.fixture(scope="module")
def pages(reading):
    return reading[:, 7000:7400].view(2, 200)


def test_every_check_passes_on_the_demo_model(demo, pages):
    checks = list(verify.run_checks(demo, pages))
    assert len(checks) == 16 and all(check.passed for check in checks), "\n".join(map(str, checks))
    assert [check.name for check in checks if check.name == correctness.in_words(check.name)[0]] == [], "not in Chinese"


def test_checks_serve_eager_attention_and_bfloat16(demo, pages):
    with verify.attention(demo, "eager"):
        checks = list(verify.run_checks(demo, pages))
    assert len(checks) == 16 and all(check.passed for check in checks), "\n".join(map(str, checks))
    low = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    checks = list(verify.run_checks(low, pages))
    assert len(checks) == 6 and all(check.passed for check in checks), "\n".join(map(str, checks))


@pytest.mark.parametrize("head_dim", [32, 80])
def test_positions_on_other_head_sizes(head_dim):
    _, ours = stock_and_ours(tiny_config(head_dim))
    ids = torch.randint(0, 97, (2, 160))
    for name in verify.POSITIONS_CHECKED:
        check = verify.check_positions(ours, ids, name, 0.5)
        assert check.passed, check
    for name in ("streaming_llm", "adakv_snapkv"):
        assert all(check.passed for check in verify.check_generation(ours, ids, name))


def broken(demo, pages) -> set[str]:
    return {check.name for check in verify.run_checks(demo, pages) if not check.passed}


def test_a_wrong_permutation_is_noticed(demo, pages, monkeypatch):
    """Keys for the presses left in native order: the model still answers right, the presses choose wrongly."""
    monkeypatch.setattr(modeling, "half_split", lambda x, rotary_ndims, dim=-1: x)
    failed = broken(demo, pages)
    assert "snapkv at 0.5: kept positions that differ from the stock model's attention" in failed
    assert not any(name.startswith("logits") for name in failed)


def test_a_rotation_off_by_one_pair_is_noticed(demo, pages, monkeypatch):
    padded = modeling.PaddedRotary.forward

    def shifted(self, x, position_ids):
        return tuple(part.roll(1, dims=-1) for part in padded(self, x, position_ids))

    monkeypatch.setattr(modeling.PaddedRotary, "forward", shifted)
    failed = broken(demo, pages)
    assert any(name.startswith("logits") for name in failed)
    assert any(name.startswith("rotated keys in the cache") for name in failed)


def test_a_press_that_does_nothing_is_noticed(demo, pages, monkeypatch):
    import kvpress

    monkeypatch.setattr(kvpress.KnormPress, "compress", lambda self, module, hidden, keys, values, *_: (keys, values))
    failed = broken(demo, pages)
    assert any(name.startswith("knorm keeping 1 %") for name in failed)


def test_evicted_entries_that_stay_visible_are_noticed(demo, pages, monkeypatch):
    for_layer = modeling.LayerMasks.for_layer
    monkeypatch.setattr(
        modeling.LayerMasks, "for_layer", lambda self, query, kv_len, _: for_layer(self, query, kv_len, None)
    )
    failed = broken(demo, pages)
    assert failed and all(name.startswith("generation under adakv_snapkv") for name in failed)


def test_recall_of_a_passkey_collapses_when_nearly_nothing_is_kept(demo, tokenizer, reading):
    """The bundled model recalls five digits from its cache; with 1 % of it kept they are gone."""
    from kvneox_lib import make_press

    statement = tokenizer(" The passkey of Belmora is 48213. Remember it.", return_tensors="pt").input_ids
    question = tokenizer("\n\nWhat is the passkey of Belmora? The passkey of Belmora is", return_tensors="pt").input_ids
    context = torch.cat([reading[:, 3000:3200], statement, reading[:, 3200:3400]], dim=1)
    answers = {}
    for ratio in (0.0, 0.99):
        # the question is read after compression: a press acts after attention, the prefill would answer by itself
        answers[ratio] = tokenizer.decode(read_question(demo, context, question, make_press("random", ratio)))
    assert answers[0.0].strip().startswith("48213")
    assert not answers[0.99].strip().startswith("48213")


@torch.no_grad()
def read_question(model, context, question, press) -> list[int]:
    from kvneox_lib.measures.prefill import prefill

    cache, length, tokens = prefill(model, context, press), context.shape[1], []
    logits = model(
        question, past_key_values=cache, position_ids=torch.arange(length, length + question.shape[1])[None]
    ).logits
    for step in range(8):
        tokens.append(int(logits[0, -1].argmax()))
        position = torch.tensor([[length + question.shape[1] + step]])
        logits = model(torch.tensor([tokens[-1:]]), past_key_values=cache, position_ids=position).logits
    return tokens


@pytest.mark.slow
def test_no_cell_of_the_matrix_is_blank(demo, tokenizer, reading):
    rows = list(verify.press_matrix(demo, tokenizer, tokenizer.decode(reading[0, :400])))
    assert [row["press"] for row in rows] == list(REGISTRY)
    for row in rows:
        cells = {key: cell for key, cell in row.items() if key not in ("press", "acts")}
        assert len(cells) == 6
        for key, cell in cells.items():
            assert cell == "ok" or (cell.startswith("refused: ") and len(cell) > 30), (row["press"], key, cell)
        # a press runs in every mode with at least one kind of attention, decoding presses but for the second question
        served = {mode for mode in verify.MODES if "ok" in (cells[f"eager {mode}"], cells[f"sdpa {mode}"])}
        assert served == set(verify.MODES) - ({"two questions"} if row["acts"] == "decoding" else set()), row


@pytest.mark.slow
def test_the_command_line_ends_with_a_verdict(tmp_path):
    command = [sys.executable, "-m", "kvneox_lib", "verify", "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("VERDICT: all checks passed") and "continuation under knorm" in done.stdout


def test_the_command_line_prints_the_presses(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kvneox_lib", "presses"])
    assert __main__.main() == 0
    assert capsys.readouterr().out.strip() == press_table().strip()


def test_the_command_line_fails_when_a_check_fails(monkeypatch, capsys):
    monkeypatch.setattr(verify, "run_checks", lambda *_: iter([verify.Check("made up", 2.0, 1.0)]))
    monkeypatch.setattr(sys, "argv", ["kvneox_lib", "verify", "--smoke"])
    assert __main__.main() == 1
    assert "FAIL  made up: 2 (<= 1)" in capsys.readouterr().out
