"""Which method for which use, on records in which the best is known."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from kvneox_lib.pages import decision, first_page
from kvneox_lib.pages.decision import AFTERWARDS, ELSEWHERE, RATIOS, USES
from kvneox_lib.pages.report import Missing, Records
from kvneox_lib.studies.records import write_table

N = 40  # windows, keys, documents
NLL = {"snapkv": 0.05, "keydiff": 0.3, "knorm": 0.9}  # times the ratio
RIGHT = {  # of N, whatever the ratio
    "outside": {"no_press": 36, "snapkv": 2, "keydiff": 34, "knorm": 6},
    "inside": {"no_press": 36, "snapkv": 36, "keydiff": 20, "knorm": 6},
}


def row(folder: Path, name: str, table: pd.DataFrame, press: str, ratio: float, bits, **known) -> dict:
    run_id = "__".join(map(str, [*known.values(), press, ratio, bits]))
    write_table(folder, run_id, name, table)
    known = {
        "dataset": "a letter",
        "press": press,
        "compression_ratio": ratio,
        "kv_bits": bits,
        "degenerate": None,
    } | known
    size = 1000 * (1 - ratio) * (1 if bits is None else bits / 32)
    return known | {"run_id": run_id, "kv_bytes": size, "path": str(folder / f"{run_id}.json")}


def grid(presses):
    return [
        ("no_press", 0.0, None),
        ("no_press", 0.0, 4),
        *((press, ratio, None) for press in presses for ratio in RATIOS),
    ]


def text(folder: Path, study: str, level: tuple[str, ...] = (), press_missing: str = "") -> Records:
    """Presses in `level` lose as much as snapkv, but for noise."""
    rng, rows = np.random.default_rng(len(study)), []
    hard = rng.normal(3, 1, N)
    for press, ratio, bits in grid(set(NLL) - {press_missing}):
        cost = NLL["snapkv" if press in level else press] * ratio if ratio else 0.0
        losses = cost + 0.01 * rng.normal(size=N) * (ratio > 0)
        table = pd.DataFrame({"document": 0, "position": np.arange(N), "nll_mean": hard + losses})
        rows.append(row(folder / study, "windows", table, press, ratio, bits) | {"delta_nll": losses.mean()})
    return Records(study, folder, folder, pd.DataFrame(rows))


def recall(folder: Path) -> Records:
    rows = []
    for question, right in RIGHT.items():
        for press, ratio, bits in grid(NLL):
            correct = np.arange(N) < right[press]
            table = pd.DataFrame({"context": np.arange(N) // 4, "name": np.arange(N), "correct": correct})
            aware = question == "inside"
            found = row(folder / "recall", "keys", table, press, ratio, bits, query_aware=aware, dataset="a letter")
            rows.append(found | {"accuracy": correct.mean()})
    return Records("recall", folder, folder, pd.DataFrame(rows))


def tasks(folder: Path, missing: tuple[str, str] = ("", "")) -> Records:
    """`missing`: a press and where the question is when it was not measured."""
    rows = []
    for question, right in RIGHT.items():
        for dataset in (*decision.ABOUT_THE_TEXT, "kvneox_passkey"):
            for press, ratio, bits in grid(NLL):
                if (press, question) == missing:
                    continue
                score = (np.arange(N) < right[press]).astype(float)
                table = pd.DataFrame({"doc_id": np.arange(N), "score": score})
                found = row(
                    folder / "tasks", "documents", table, press, ratio, bits, question=question, dataset=dataset
                )
                rows.append(found | {"score": score.mean()})
    return Records("tasks", folder, folder, pd.DataFrame(rows))


@pytest.fixture
def several(tmp_path):
    return text(tmp_path, "wikitext_ppl"), text(tmp_path, "pg19_ppl"), recall(tmp_path), tasks(tmp_path)


def timed(press: str, ratio: float, step: float, first: float, turns=(0.9, 1.0, 1.1), **where) -> dict:
    """A run that took turns with those of its cell."""
    step_turns, first_turns = ([value * turn for turn in turns] for value in (step, first))
    found = {"engine": "ours", "press": press, "compression_ratio": ratio, "step_s": step, "prefill_s": first}
    found |= {"step_turns_s": json.dumps(step_turns), "prefill_turns_s": json.dumps(first_turns), "failure": None}
    found |= {"context_tokens": 2048, "batch_size": 4, "dtype": "float32", "started_at": "now", "model": "pythia-70m"}
    found |= {
        "device": "cpu",
        "device_name": "a machine",
        "times_floor": 1.5,
        "decode_tok_per_s": 1 / step,
        "kv_bits": None,
    }
    found |= {"kv_bytes": 200e6 * (1 - ratio), "peak_above_bytes": 210e6 * (1 - ratio), "peak_bytes": 1e9}
    return found | {"prefill_peak_above_bytes": 600e6} | where


def speed(*more: dict) -> Records:
    rows = [timed("no_press", 0.0, 0.03, 2.0), timed("no_press", 0.0, 0.04, 2.0, engine="stock")]
    rows += [timed("no_press", 0.0, 0.036, 2.0, engine="static")]
    rows += [timed("snapkv", ratio, 0.03 * (1 - ratio / 2), 2.2) for ratio in RATIOS]
    return Records("speed", None, None, pd.DataFrame([*rows, *more]))


# ---- what is chosen -------------------------------------------------------------------------------------------------


def test_each_use_gets_what_loses_least_of_what_it_asks(several):
    chosen = {(one.use, one.ratio): one for one in decision.choices(*several)}
    assert list(chosen) == [(use, ratio) for use in USES for ratio in RATIOS]
    for ratio in RATIOS:
        assert [chosen[use, ratio].press for use in USES] == ["snapkv", "keydiff", "snapkv"]
        assert all(chosen[use, ratio].level == () for use in USES)


def test_what_cannot_be_told_from_the_best_is_named(tmp_path, several):
    level = tuple(text(tmp_path / "level", study, level=("keydiff",)) for study in decision.TEXTS)
    for one in decision.choices(*level, *several[2:]):
        if one.use == USES[0]:
            assert {one.press, *one.level} == {"snapkv", "keydiff"}


def test_a_degenerate_run_is_not_chosen(several):
    wiki = several[0]
    bad = wiki.frame["press"].eq("snapkv") & wiki.frame["compression_ratio"].eq(0.9)
    frame = wiki.frame.assign(degenerate=np.where(bad, "fixed 1.00", None))
    marked = Records(wiki.study, wiki.folder, wiki.root, frame)
    chosen = [one.press for one in decision.choices(marked, *several[1:]) if one.use == USES[0]]
    assert chosen == ["snapkv", "snapkv", "keydiff"]


def test_what_was_not_measured_in_all_that_a_use_asks_is_not_chosen(tmp_path, several):
    without = tasks(tmp_path / "without", missing=("keydiff", "outside"))
    chosen = [one.press for one in decision.choices(*several[:3], without) if one.use == AFTERWARDS]
    assert chosen == ["knorm"] * len(RATIOS)


def test_uses_without_records_are_left_out_and_without_any_that_is_said(several):
    empty = [Records(records.study, None, None, pd.DataFrame()) for records in several]
    assert {one.use for one in decision.choices(*several[:2], *empty[2:])} == {USES[0]}
    with pytest.raises(Missing, match="wikitext_ppl"):
        decision.choices(*empty)


@pytest.mark.parametrize(
    ("missing", "verdict"),
    [
        (("", ""), "两者分不出"),  # 34 right outside, 36 inside
        (("snapkv", "inside"), "不看的更好"),  # 34, 20
        (("keydiff", "outside"), "看到的更好"),  # 6, 36
    ],
)
def test_the_question_helps_only_where_the_pairs_say_so(tmp_path, several, missing, verdict):
    said = decision.knowing(*several[:3], tasks(tmp_path / "some", missing))
    assert said.startswith("问题已知时") and f"压缩率 0.5、0.75、0.9 {verdict}" in said


def test_advice_is_what_the_table_says(several):
    assert "- **只续写**：压缩率 0.5、0.75、0.9 用 snapkv。" in decision.advice(*several).splitlines()


# ---- the table ------------------------------------------------------------------------------------------------------


def test_the_table_says_what_each_choice_keeps_and_takes(several):
    table = decision.table([speed()], *several).set_index("方法")
    assert len(table) == 1 + len(USES) * len(RATIOS) + 1
    assert table["用途"].tolist().count("") == 2 * len(USES)
    keydiff = table.loc["keydiff"].iloc[1]  # 0.75, of three
    assert keydiff["口令"] == f"{34 / N:.2f}" and keydiff["末词、抄写"] == f"{34 / N:.2f}" and keydiff["缓存"] == "0.25"
    assert keydiff["每步"] == f"{1 - 0.75 / 2:.2f}{ELSEWHERE}" and keydiff["首词元"] == "—"  # only snapkv was timed
    snapkv = table.loc["snapkv"]
    assert snapkv.iloc[0]["每步"] == "0.75" and snapkv.iloc[0]["首词元"] == "1.10"
    assert snapkv.iloc[0]["口令"] == f"{2 / N:.2f}" and snapkv.iloc[-1]["口令"] == f"{36 / N:.2f}"
    assert table.loc["4 位", "缓存"] == "0.12" and table.loc["4 位", "每步"] == "—"


def test_the_first_token_of_what_was_timed_elsewhere_is_marked(several):
    elsewhere = Records(
        "speed",
        None,
        None,
        pd.DataFrame(
            [
                timed("no_press", 0.0, 0.01, 1.0, context_tokens=512),
                timed("keydiff", 0.5, 0.01, 3.0, context_tokens=512),
                timed("keydiff", 0.75, 0.01, 2.0, context_tokens=512),
            ]
        ),
    )
    table = decision.table([speed(), elsewhere], *several).set_index("方法").loc["keydiff"]
    assert table["首词元"].tolist() == [
        f"{times}{ELSEWHERE}" for times in ("3.00", "2.00", "2.00")
    ]  # at the same ratio, else at the last
    assert "每步写的是同一压缩率下别的方法" in decision.columns([speed()])


# ---- the lines ------------------------------------------------------------------------------------------------------


def with_ratios(records: Records) -> Records:
    ends = {f"{name}_ci95_{end}": 1.0 for name in ("delta_nll", "ppl_ratio") for end in ("low", "high")}
    return Records(
        records.study, None, None, records.frame.assign(ppl_ratio=np.exp(records.frame["delta_nll"]), **ends)
    )


def test_compression_and_implementation_are_told_apart(several):
    wiki, books = map(with_ratios, several[:2])
    said = first_page.faster(speed(), wiki, books)
    compression, implementation, both = 1 / (1 - 0.9 / 2), 0.036 / 0.03, 0.036 / (0.03 * (1 - 0.9 / 2))
    assert said.index(f"{compression:.2f} 倍") < said.index(f"{implementation:.2f} 倍") < said.index(f"{both:.2f} 倍")
    assert "（snapkv，压缩率 0.9）" in said and "transformers（StaticCache）" in said
    assert "缓存由 200 MB 变为 20 MB" in first_page.smaller(speed(), wiki, books)


def test_of_what_is_as_fast_the_lines_are_of_what_loses_least(several):
    wiki, books = map(with_ratios, several[:2])
    as_fast = timed("knorm", 0.9, 0.029 * (1 - 0.9 / 2), 2.2, turns=(0.9, 1.0, 1.2))  # nobody can tell
    found = first_page.setting(speed(as_fast), wiki, books)
    assert found.run["press"] == "snapkv" and found.level["press"].tolist() == ["knorm"]
    alone = speed(timed("keydiff", 0.9, 0.01, 2.2))
    lost = first_page.lost(alone, wiki, books, *several[2:])
    assert f"口令答对 {34 / N:.2f}" in lost and "续写损失最小的是 snapkv" in lost


def with_ends(records: Records) -> Records:
    """As storage wants them: intervals of what is shown, and in which precision it was."""
    ends = {f"{name}_ci95_{end}": 0.5 for name in ("delta_nll", "accuracy", "score") for end in ("low", "high")}
    return Records(records.study, None, None, records.frame.assign(dtype="float32", **ends))


def test_answers_are_told_for_what_keeps_them(several):
    said = first_page.answers(*several[2:])
    assert "压缩率 0.75：3 种方法里 0 种几乎答不出口令" in said  # 2 of 40 is a twentieth
    assert "keydiff（0.85，0.85）" in said and "snapkv（" not in said and "（0.90，0.90）" in said


def test_fewer_bits_are_advised_where_they_lose_to_nothing(several):
    """4 bits lose nothing here, take an eighth, and cannot take less."""
    records = [*map(with_ends, several)]
    assert "时只量化，没有一项分明不如核心方法的淘汰" in first_page.saving(*records)
    assert "float32 的 1/2、1/4、1/8 时" in first_page.saving(*records)
    assert "每个数只记 4 位：缓存是 float32 的 0.12，短文的损失是 0.000 nat" in first_page.fewer_bits(*records)


def test_an_address_is_shown_only_where_others_can_open_it():
    assert first_page.public_address("https://me:secret@example.org/a/b.git") == "https://example.org/a/b"
    for private in ("/home/me/b", "git@example.org:a/b.git", "file:///home/me/b", ""):
        assert first_page.public_address(private) == ""
