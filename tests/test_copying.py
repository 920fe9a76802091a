"""The heads that copy against the stock model's attention; what the press keeps against the presses inside it."""

import copy
import re
from dataclasses import replace
from pathlib import Path

import kvpress
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import DEMO, stock_and_ours, tiny_config
from transformers import AutoModelForCausalLM

from kvneox_lib import CompactCache, adapt, continuation_nll, make_press
from kvneox_lib.inputs.passkeys import recall_samples
from kvneox_lib.measures.intervals import comparison
from kvneox_lib.measures.perplexity import score_each
from kvneox_lib.measures.prefill import prefill, prefill_each
from kvneox_lib.measures.recall import ask_each, copy_attention
from kvneox_lib.measures.survivors import kept_counts, kept_positions
from kvneox_lib.neox.modeling import stock_twin
from kvneox_lib.pages import copying as page
from kvneox_lib.pages.report import Missing, Records
from kvneox_lib.presses import calibration
from kvneox_lib.presses.copying import CopyingHeadsPress, allot, copying_scores, measure_copying, repeated_tokens
from kvneox_lib.presses.facts import calibration_seconds
from kvneox_lib.studies.records import write_table

RATIOS = [0.5, 0.75, 0.9, 0.99]


@pytest.fixture(scope="module")
def thousand(reading):
    return reading[:, 2000:3024]


@pytest.fixture(scope="module")
def samples(reading, tokenizer):
    filler = tokenizer.decode(reading[0, 4000:9000])
    return recall_samples(tokenizer, filler=filler, n_keys=20, keys_per_context=4, context_length=1024, seed=3)


# -- which heads copy -------------------------------------------------------------------------------------------------


def test_scores_are_the_stock_models_attention_to_what_followed(demo):
    """By hand: for each token read for the second time, the weight of the one after its first occurrence."""
    stock, draws = stock_twin(demo), repeated_tokens(demo.config)
    n, expected = draws.shape[1] // 2, torch.zeros(6, 4, dtype=torch.float64)
    assert torch.equal(draws[:, :n], draws[:, n:]) and all(len(draw.unique()) == n for draw in draws)
    for draw in draws:
        with torch.no_grad():
            attentions = stock(draw[None], output_attentions=True).attentions
        for layer, weights in enumerate(attentions):
            for second in range(n, 2 * n - 1):
                first = draw[:n].tolist().index(int(draw[second]))
                expected[layer] += weights[0, :, second, first + 1].double()
    expected /= len(draws) * (n - 1)
    assert torch.allclose(measure_copying(demo).double(), expected, atol=1e-5)


def test_heads_that_copy_random_tokens_are_those_that_read_passkeys(demo, samples):
    """Two trials with nothing in common but the model: random tokens, and digits asked for in English prose."""
    copying, at_digits = copying_scores(demo) >= 0.1, copy_attention(demo, samples[:3])
    assert 0 < copying.sum() < copying.numel() / 2
    assert at_digits[copying].min() > at_digits[~copying].max()


def test_permuted_heads_have_permuted_scores(demo):
    """Heads of a layer are exchanged in the weights that make queries, keys, values, and in those that read them."""
    layer, order = int(copying_scores(demo).amax(1).argmax()), [2, 0, 3, 1]
    permuted = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32, attn_implementation="sdpa").eval()
    own = permuted.base_model.layers[layer].attention
    for of_heads in (own.query_key_value.weight, own.query_key_value.bias):
        of_heads.data = of_heads.data.unflatten(0, (4, -1))[order].flatten(0, 1)
    own.dense.weight.data = own.dense.weight.data.unflatten(1, (4, -1))[:, order].flatten(1, 2)
    expected = copying_scores(demo).clone()
    expected[layer] = expected[layer, order]
    assert torch.allclose(copying_scores(adapt(permuted)), expected, atol=1e-4)
    assert not torch.equal(expected, copying_scores(demo))


def test_a_model_without_copying_heads_keeps_what_the_second_press_keeps():
    _, ours = stock_and_ours(tiny_config())
    ids, press = torch.randint(97, (2, 120)), make_press("copying_heads", 0.6, window_size=16)
    with pytest.warns(UserWarning, match="no head of this model copies.*keeps what SnapKVPress keeps"):
        kept = kept_positions(ours, ids, press)
    assert torch.equal(kept, kept_positions(ours, ids, make_press("snapkv", 0.6, window_size=16)))


def test_calibration_is_done_once_and_says_what_it_took(demo, thousand, monkeypatch, tmp_path):
    monkeypatch.setenv("KVNEOX_CACHE", str(tmp_path))
    first, again = (make_press("copying_heads", 0.5) for _ in range(2))
    assert calibration_seconds(first) is None and calibration_seconds(make_press("snapkv")) is None
    prefill(demo, thousand, first)
    monkeypatch.setattr("kvneox_lib.presses.copying.measure_copying", lambda _: pytest.fail("measured again"))
    prefill(demo, thousand, again)
    assert calibration_seconds(again) == calibration_seconds(first) > 0
    monkeypatch.setattr(calibration, "MAX_WINDOWS", 1)
    duo = make_press("duo_attention")
    prefill(demo, thousand, duo)
    assert calibration_seconds(duo) > 0


# -- who gets how much ------------------------------------------------------------------------------------------------


def test_budgets_add_up_whatever_is_asked_for():
    generator = torch.Generator().manual_seed(0)
    for n_tokens in (1, 5, 64, 777, 4096):
        for n_copying in (0, 1, 5, 12):
            scores = torch.rand(3, 4, generator=generator)
            copying = (scores >= scores.flatten().sort(descending=True).values[n_copying - 1]) & (n_copying > 0)
            for n_kept in {1, n_tokens // 7 + 1, n_tokens // 2 + 1, n_tokens} & set(range(1, n_tokens + 1)):
                for floor in {1, max(1, n_kept // 2), n_kept}:
                    kept = allot(scores, copying, n_tokens, n_kept, floor)
                    assert int(kept.sum()) == 12 * n_kept
                    assert floor <= int(kept.min()) and int(kept.max()) <= n_tokens
                    others, richest = kept[~copying], kept[copying]
                    assert others.numel() == 0 or int(others.max() - others.min()) <= 1
                    # others get more than the floor only when no head that copies has use for more
                    assert others.numel() == 0 or int(others.max()) == floor or (richest == n_tokens).all()


def test_heads_that_copy_get_shares_in_proportion_to_their_scores():
    scores = torch.tensor([[0.0, 0.6, 0.02], [0.3, 0.1, 0.0]])
    kept = allot(scores, scores >= 0.1, n_tokens=1000, n_kept=110, floor=10)
    assert kept.tolist() == [[10, 10 + 360, 10], [10 + 180, 10 + 60, 10]]
    capped = allot(scores, scores >= 0.1, n_tokens=302, n_kept=110, floor=10)  # 292 for the first, 308 remain for two
    assert capped.tolist() == [[10, 302, 10], [10 + 231, 10 + 77, 10]]
    spared = allot(scores, scores >= 0.1, n_tokens=200, n_kept=120, floor=10)  # 120 remain for three
    assert spared.tolist() == [[40, 200, 40], [200, 200, 40]]


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("length", [1024, 333])
def test_heads_hold_together_what_they_hold_under_any_press(demo, reading, ratio, length):
    ids = reading[:, 500 : 500 + length]
    caches = [prefill(demo, ids, make_press(name, ratio)) for name in ("copying_heads", "snapkv", "keydiff")]
    for cache in caches:
        cache.make_ragged()  # what is evicted is given back
    assert len({int(cache.kv_lengths.sum()) for cache in caches}) == 1
    assert caches[0].kv_lengths.unique().numel() > 1 and caches[1].kv_lengths.unique().numel() == 1


# -- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS[:3])
def test_each_head_keeps_what_its_press_would_keep_with_that_budget(demo, thousand, ratio):
    """kvpress' own presses, each with the ratio that leaves a head's budget to all heads."""
    press = make_press("copying_heads", ratio)
    kept = kept_positions(demo, thousand, press)
    budgets, copying = press.budgets(1024), copying_scores(demo) >= press.threshold
    assert torch.equal(kept.sum(-1)[:, 0], budgets) and budgets[copying].min() > budgets[~copying].max()
    for layer in range(6):
        for head in range(4):
            share = max(0, 1 - (int(budgets[layer, head]) + 0.5) / 1024)
            alone = kvpress.KeyDiffPress(share) if copying[layer, head] else kvpress.SnapKVPress(share, window_size=32)
            expected = kept_positions(demo, thousand, alone)[layer, 0, head]
            assert torch.equal(kept[layer, 0, head], expected), (layer, head)


def test_of_equal_scores_the_later_stay(demo, thousand):
    """Half of an equal part is less than SnapKV's window, whose entries have one score."""
    press = make_press("copying_heads", 0.98)
    kept = kept_positions(demo, thousand, press)[:, 0]
    others = kept[copying_scores(demo) < press.threshold]
    floor = int(1024 * 0.02) // 2
    assert (others.sum(-1) == floor).all() and others[:, -floor:].all()


def test_behind_a_mask_the_stock_model_says_the_same(demo, thousand):
    """What the compressed cache predicts, and what the stock model does with the evicted entries hidden by hand."""
    n, press = 900, make_press("copying_heads", 0.75)
    kept = kept_positions(demo, thousand[:, :n], press)
    stock, length = copy.deepcopy(stock_twin(demo, "eager")), thousand.shape[1]

    def hide(layer):
        def before(module, args, kwargs):
            mask = torch.ones(length, length, dtype=torch.bool).tril().repeat(4, 1, 1)
            mask[:, n:, :n] &= kept[layer, 0][:, None]
            kwargs["attention_mask"] = torch.zeros(1, 4, length, length).masked_fill(~mask, float("-inf"))
            return args, kwargs

        return before

    for index, layer in enumerate(stock.gpt_neox.layers):
        layer.attention.register_forward_pre_hook(hide(index), with_kwargs=True)
    with torch.no_grad():
        logits = stock(thousand).logits[0, n:-1]
    expected = torch.nn.functional.cross_entropy(logits, thousand[0, n + 1 :], reduction="none")
    measured = continuation_nll(demo, thousand, n_context=n, press=press)[0]
    assert torch.allclose(measured, expected, atol=1e-3)
    assert (measured - continuation_nll(demo, thousand, n_context=n)[0]).abs().max() > 1e-3


def test_in_bfloat16_and_eager_it_keeps_as_many(thousand, demo):
    half = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16, attn_implementation="eager").eval()
    press, full = make_press("copying_heads", 0.75), make_press("copying_heads", 0.75)
    kept, expected = kept_positions(half, thousand, press), kept_positions(demo, thousand, full)
    assert int(kept.sum()) == int(expected.sum()) == 24 * 256
    assert float((kept & expected).sum() / expected.sum()) > 0.9


# -- what for ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_passkeys_survive_and_prose_suffers_less_than_under_snapkv(demo, samples, reading, ratio):
    presses = [None, make_press("copying_heads", ratio), make_press("snapkv", ratio)]
    plain, ours, snapkv = zip(*(rows for sample in samples for rows in ask_each(demo, sample, presses)))
    share = sum(row.correct for row in plain)
    assert sum(row.correct for row in ours) >= 0.9 * share > sum(row.correct for row in snapkv)
    ids = torch.cat([reading[:, start : start + 1100] for start in range(10000, 18000, 2000)])
    plain, ours, snapkv = (scored.nll.mean() for scored in score_each(demo, ids, n_context=1024, presses=presses))
    assert ours - plain < snapkv - plain


def test_it_shares_a_pass_and_goes_back_into_a_conversation(demo, thousand):
    presses = [make_press(name, 0.75) for name in ("copying_heads", "snapkv", "copying_heads")]
    together = prefill_each(demo, thousand, presses)
    alone = prefill(demo, thousand, presses[0])
    assert isinstance(together[0], CompactCache)
    assert torch.equal(kept_counts(together[0]), kept_counts(alone))
    assert torch.equal(kept_counts(together[0]), kept_counts(together[2]))


def test_wrong_options_are_refused_by_name():
    for options in ({"threshold": 0.0}, {"threshold": 1.5}, {"floor": 0}, {"floor": 2.5}):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name}="):
            make_press("copying_heads", 0.5, **options)
    for presses in ([kvpress.SnapKVPress()], [kvpress.SnapKVPress(), kvpress.ThinKPress()]):
        with pytest.raises(ValueError, match="presses="):
            CopyingHeadsPress(presses)
    press = CopyingHeadsPress([kvpress.KeyDiffPress(0.3), kvpress.SnapKVPress()])
    press.compression_ratio = 0.7
    assert [part.compression_ratio for part in press.presses] == [0.7, 0.7]


# -- what is said of it -----------------------------------------------------------------------------------------------

HALF_WIDTH = 0.05
MADE_UP = {  # press, ratio: what it keeps, its loss, recall and score
    ("copying_heads", 0.5): (0.5, 0.01, 0.99, 0.50),
    ("copying_heads", 0.9): (0.1, 0.20, 0.97, 0.50),
    ("snapkv", 0.5): (0.5, 0.30, 0.10, 0.52),  # level in the task
    ("snapkv", 0.9): (0.1, 0.60, 0.05, 0.80),  # better in the task
    ("duo_attention", None): (0.6, 0.02, 0.98, 0.50),
    ("no_press", 0.0): (1.0, 0.0, 1.0, 0.5),
}


def made_up(folder: Path, study: str, column: str, place: int, **more) -> Records:
    rows = []
    for (press, ratio), values in MADE_UP.items():
        row = {"press": press, "compression_ratio": ratio, "kept_fraction": values[0], **more, column: values[place]}
        low, high = values[place] - HALF_WIDTH, values[place] + HALF_WIDTH
        row |= {"run_id": f"{study} {press} {ratio}", f"{column}_ci95_low": low, f"{column}_ci95_high": high}
        name, table = units(study, values[place])
        write_table(folder, row["run_id"], name, table)
        rows.append(row | {"path": str(folder / f"{row['run_id']}.json")})
    return Records(study, folder, folder, pd.DataFrame(rows))


def units(study: str, mean: float) -> tuple[str, pd.DataFrame]:
    """A hundred windows, keys or documents, hard and easy ones at the same places in every run."""
    number = np.arange(100)
    hits = number * 37 % 100 < round(100 * mean)
    if study == "recall":
        return "keys", pd.DataFrame({"context": number // 5, "name": number, "correct": hits})
    if study == "tasks":
        return "documents", pd.DataFrame({"doc_id": number, "score": hits.astype(float)})
    nll = 3 + np.sin(number) + mean * (1 + 0.3 * np.cos(7 * number))
    return "windows", pd.DataFrame({"document": 0, "position": 1000 * number, "nll_mean": nll})


@pytest.fixture
def four(tmp_path) -> list[Records]:
    wiki, books = (made_up(tmp_path, study, "delta_nll", 1) for study in ("wikitext_ppl", "pg19_ppl"))
    recall = made_up(tmp_path, "recall", "accuracy", 2, query_aware=False)
    tasks = made_up(tmp_path, "tasks", "score", 3, question="outside", dataset="kvneox_copy")
    return [wiki, books, recall, tasks]


def nothing(study: str) -> Records:
    return Records(study, Path(), Path(), pd.DataFrame())


def test_every_place_where_another_press_is_better_is_named(four):
    pairs = page.compared(*four)
    verdicts = pairs.set_index(["measure", "compression_ratio"])["verdict"].to_dict()
    task = next(name for name, _ in verdicts if name not in ("短文的损失", "长书的损失", "口令检索"))
    assert verdicts == {
        **{(name, ratio): "better" for name in ("短文的损失", "长书的损失", "口令检索") for ratio in (0.5, 0.9)},
        (task, 0.5): "",
        (task, 0.9): "worse",
    }
    said = page.verdicts(*four)
    assert (
        f"明确更好的，对 snapkv 8 项里 6 项；明确更差的共 1 项，即不如 snapkv（{task}，压缩率 0.9），其余分不出" in said
    )
    assert said.endswith("短文的损失、长书的损失的文本只有一篇或几篇，好坏只说这些文本。")


def test_a_verdict_is_of_pairs_and_not_of_intervals_that_overlap(four):
    """The recorded intervals all overlap, and those of the differences do not."""
    for records in four[:2]:
        records.frame["delta_nll_ci95_low"], records.frame["delta_nll_ci95_high"] = -9.0, 9.0
    pairs = page.compared(*four).set_index(["measure", "compression_ratio"])
    assert pairs.loc[("短文的损失", 0.5), "verdict"] == "better"
    assert pairs.loc[("短文的损失", 0.5), "ahead"] == pytest.approx(0.29, abs=0.01)
    assert pairs.loc[("口令检索", 0.9), "ahead"] == pytest.approx(0.92)
    values = [units("tasks", mean)[1]["score"] for mean in (0.5, 0.52)]
    alone = comparison((values[0] - values[1]).to_numpy(), np.arange(100)).p
    assert pairs["p"].max() == pytest.approx(alone)  # the largest is multiplied by one
    assert [pairs.loc[(name, 0.5), "documents"] for name in ("短文的损失", "口令检索", "抄写")] == [1, 20, 100]


def test_degenerate_runs_are_not_compared_and_leave_a_dash(four):
    wiki = four[0].frame
    wiki["degenerate"] = np.where((wiki["press"] == "snapkv") & (wiki["compression_ratio"] == 0.9), "tied 0.63", None)
    pairs = page.compared(*four)
    assert len(pairs) == 7 and ("短文的损失", 0.9) not in set(zip(pairs["measure"], pairs["compression_ratio"]))
    table = page.table(*four).set_index(["press", "压缩率"])
    assert table.loc[("snapkv", "0.9"), "短文的损失"] == "—" != table.loc[("snapkv", "0.9"), "长书的损失"]


def test_the_short_table_has_the_two_highest_ratios_and_an_arrow_where_it_is_clear(four):
    table = page.short_table(*four).set_index(["压缩率", "press"])
    task = list(table)[-1]
    assert table.index.tolist() == [(ratio, name) for ratio in ("0.5", "0.9") for name in ("copying_heads", "snapkv")]
    assert table["短文的损失"].tolist() == ["0.010", "0.300 ↓", "0.200", "0.600 ↓"]
    assert table[task].tolist() == ["0.50", "0.52", "0.50", "0.80 ↑"]


def test_what_is_said_is_of_the_right_runs(four):
    duo = page.at_own_strength(*four)
    assert "它留下缓存的 60% 时，与只留 50% 的 copying_heads 相比，" in duo
    found = page.measured(*four)
    best = found[(found["press"] == "copying_heads") & (found["compression_ratio"] == 0.5)]
    pairs = found[found["press"] == "duo_attention"].merge(best, on=["measure", "study"], suffixes=("", "_other"))
    told = page.paired.judged(pairs, four).set_index("measure")["verdict"]
    apart = list(told.index[told != ""])
    assert len(told) == 4 and 0 < len(apart) < 4
    assert re.findall(r"[：，]([^：，]+?) [\d.]+ 对 ", duo) == apart and duo.endswith("；其余分不出。")
    for records in four:
        records.frame.loc[records.frame["press"] == "duo_attention", "run_id"] = "nobody kept its units"
    with pytest.raises(Missing, match="成对"):
        page.at_own_strength(*map(replace, four))


def test_what_it_costs_all_the_same_is_said_at_the_highest_ratio_that_shows_it(four):
    four[3].frame[["mcnemar_p", "delta_score", "delta_score_ci95_high"]] = 0.9, -0.1, -0.05
    lost = page.still_lost(*four)  # 0.01 ± 0.05 holds zero
    assert "短文的损失在压缩率 0.9 时是 0.200 [0.150, 0.250] nat" in lost and "压缩率 0.5" not in lost
    tasks = four[3].frame
    tasks.loc[(tasks["press"] == "copying_heads") & (tasks["compression_ratio"] == 0.5), "mcnemar_p"] = 1e-6
    assert page.still_lost(*four).endswith("在压缩率 0.5 时少 0.10 分。")
    for records in four[:2]:
        records.frame["delta_nll_ci95_low"] = -1.0
    tasks["mcnemar_p"] = 0.9
    assert page.still_lost(*four) == "与不压缩相比，看不出 copying_heads 损失了什么。"


def test_the_table_has_what_keeps_most_first(four):
    table = page.table(*four)
    order = list(zip(table["press"], table["压缩率"]))
    assert order[0] == ("duo_attention", "自定") and order[1][1] == order[2][1] == "0.5"
    assert order[3:] == [("copying_heads", "0.9"), ("snapkv", "0.9")]
    assert table.loc[4, "口令检索"] == "0.05 [0.00, 0.10]"
    alone = page.table(four[0], *map(nothing, ("pg19_ppl", "recall", "tasks")))
    assert list(alone) == ["press", "压缩率", "实际保留", "短文的损失"]


def test_who_got_the_budget(tmp_path):
    kept = [0.1] * 4 + [0.9, 0.5]
    table = pd.DataFrame({"layer": 0, "head": range(6), "kept": kept})
    write_table(tmp_path, "one", "heads", table)
    run = {"run_id": "one", "press": "copying_heads", "compression_ratio": 0.7, "path": str(tmp_path / "one.json")}
    records = Records("wikitext_ppl", tmp_path, tmp_path, pd.DataFrame([run]))
    said = page.uneven(records)
    assert "6 个头里 2 个各留上下文的 50% 到 90%" in said and "的 78%；其余每个头只留 10.0%" in said
    write_table(tmp_path, "one", "heads", table.assign(kept=0.3))
    assert page.uneven(replace(records)) == "压缩率 0.7 时，各头留下的一样多，没有哪个头多分到预算。"


def test_what_is_not_measured_is_said_to_be_missing(four):
    studies = ("wikitext_ppl", "pg19_ppl", "recall", "tasks")
    for sentence in (page.verdicts, page.short_table, page.still_lost, page.at_own_strength, page.table):
        with pytest.raises(Missing, match="copying_heads"):
            sentence(*map(nothing, studies))
    with pytest.raises(Missing, match="calibration_s"):
        page.calibrating(four[0])
    four[0].frame.loc[four[0].frame["press"] == "copying_heads", "calibration_s"] = 0.5
    runs = four[0].frame.assign(device="cpu", device_name="a machine", dtype="float32")
    said = page.calibrating(replace(four[0], frame=runs))
    assert "copying_heads 0.5 秒" in said and "duo_attention 也要校准，用时没有记下" in said
    assert said.endswith("snapkv 不用校准。") and "kvzip" not in said


def test_heads_found_by_random_tokens_are_counted_among_those_that_say_passkeys(tmp_path):
    scores = [0.5, 0.2, 0.05, 0.3]
    table = pd.DataFrame({"layer": 0, "head": range(4), "copies": [True, False, True, True], "repeated_tokens": scores})
    write_table(tmp_path, "one", "heads", table)
    run = {"run_id": "one", "press": "no_press", "compression_ratio": 0.0, "path": str(tmp_path / "one.json")}
    records = Records("heads", tmp_path, tmp_path, pd.DataFrame([run]))
    assert page.same_heads(records) == (
        "4 个头里，按随机词元找到的有 3 个，其中 2 个也在 @sec-trial 按口令找到的 3 个之中。"
    )
    write_table(tmp_path, "one", "heads", table.assign(copies=[True, True, False, True]))
    assert page.same_heads(replace(records)) == "按随机词元找到的 3 个头，正是 @sec-trial 按口令找到的那 3 个。"


def test_the_criterion_is_that_of_the_press():
    press = make_press("copying_heads")
    said = page.criterion()
    assert f"达到 {press.threshold:g} 的" in said and f"至少留 {press.floor} 个条目" in said
    assert f"窗口是 {press.presses[1].window_size} 个" in said
    assert f"有 {repeated_tokens(tiny_config(max_position_embeddings=2048, vocab_size=999)).shape[1] // 2} 个" in said
