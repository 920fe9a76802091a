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


def text(folder: Path, study: str, level: tuple[str, ...] = (), press_missing: str = "", nll=NLL) -> Records:
    """Presses in `level` lose as much as snapkv, but for noise."""
    rng, rows = np.random.default_rng(len(study)), []
    hard = rng.normal(3, 1, N)
    for press, ratio, bits in grid(set(NLL) - {press_missing}):
        cost = nll["snapkv" if press in level else press] * ratio if ratio else 0.0
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


@pytest.fixture
def apart(tmp_path, several):
    """On short text snapkv is the better, on books keydiff; by as much, so that a mean of both would hide it."""
    turned = NLL | {"snapkv": NLL["keydiff"], "keydiff": NLL["snapkv"]}
    return several[0], text(tmp_path / "apart", "pg19_ppl", nll=turned), *several[2:]


def test_texts_that_disagree_have_each_their_own(apart):
    chosen = [one for one in decision.choices(*apart) if one.use == USES[0]]
    assert [(one.ratio, one.press, one.parts) for one in chosen] == [
        (ratio, *of) for ratio in RATIOS for of in (("snapkv", ("短文",)), ("keydiff", ("长书",)))
    ]
    assert "压缩率 0.5、0.75、0.9 的短文用 snapkv，压缩率 0.5、0.75、0.9 的长书用 keydiff" in decision.advice(*apart)
    table = decision.table([speed()], *apart)
    assert table["方法"].tolist()[1:3] == ["短文：snapkv", "长书：keydiff"]


def test_what_is_level_in_one_part_and_worse_in_the_other_is_not_level(tmp_path, several):
    half = several[0], text(tmp_path / "half", "pg19_ppl", level=("keydiff",)), *several[2:]
    for one in decision.choices(*half):
        if one.use == USES[0]:
            assert (one.press, one.level, one.parts) == ("snapkv", (), ())
            assert set(decision.best_by_part(*half)[USES[0], one.ratio]["长书"]) == {"snapkv", "keydiff"}


def test_a_degenerate_run_is_not_chosen(several):
    wiki = several[0]
    bad = wiki.frame["press"].eq("snapkv") & wiki.frame["compression_ratio"].eq(0.9)
    frame = wiki.frame.assign(degenerate=np.where(bad, "fixed 1.00", None))
    marked = Records(wiki.study, wiki.folder, wiki.root, frame)
    chosen = [one.press for one in decision.choices(marked, *several[1:]) if one.use == USES[0]]
    assert chosen == ["snapkv", "snapkv", "keydiff"]


def test_what_was_not_measured_in_all_that_a_use_asks_is_not_chosen(tmp_path, several):
    without = tasks(tmp_path / "without", missing=("keydiff", "outside"))
    four = *several[:3], without
    chosen = {one.press for one in decision.choices(*four) if one.use == AFTERWARDS}
    assert "keydiff" not in chosen and decision.not_candidates(AFTERWARDS, *four) == []  # it is best nowhere else
    without_snapkv = *several[:3], tasks(tmp_path / "no", missing=("snapkv", "outside"))
    assert "snapkv 没有按事后提问测全，不在那几行的候选里。" in decision.rule(*without_snapkv)
    assert "没有按" not in decision.rule(*several)


def test_uses_without_records_are_left_out_and_without_any_that_is_said(several):
    empty = [Records(records.study, None, None, pd.DataFrame()) for records in several]
    assert {one.use for one in decision.choices(*several[:2], *empty[2:])} == {USES[0]}
    with pytest.raises(Missing, match="wikitext_ppl"):
        decision.choices(*empty)


@pytest.mark.parametrize(
    ("missing", "verdict"),
    [
        (("", ""), "：各项都分不出"),  # 34 right outside, 36 inside
        (("snapkv", "inside"), "末词在压缩率 0.5、0.75、0.9 是不看的更好"),  # 34, 20
        (("keydiff", "outside"), "抄写在压缩率 0.5、0.75、0.9 是看到的更好"),  # 6, 36
    ],
)
def test_the_question_helps_only_where_the_pairs_say_so(tmp_path, several, missing, verdict):
    said = decision.knowing(*several[:3], tasks(tmp_path / "some", missing))
    assert said.startswith("问题已知时") and verdict in said


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
    ]  # at the nearest ratio
    said = decision.columns([speed(), elsewhere], *several)
    assert "每步写的是同一压缩率下别的方法；首词元的用时，keydiff 的取自上下文 512、批 4、压缩率 0.5，" in said


def test_the_first_token_is_of_the_nearest_run_and_says_which(several):
    """The same model before another, the nearest length before a longer one."""

    def timed_at(tokens: int, times: float, model: str = "pythia-70m") -> Records:
        where = {"context_tokens": tokens, "batch_size": 1, "model": model}
        runs = [timed("no_press", 0.0, 0.01, 1.0, **where), timed("keydiff", 0.75, 0.01, times, **where)]
        return Records("speed", None, None, pd.DataFrame(runs))

    demo, near, far = timed_at(2048, 1.5, "demo"), timed_at(2048, 7.0), timed_at(8192, 5.0)
    for others, times, place in (
        ((demo, far, near), "7.00", "上下文 2048、批 1、压缩率 0.75"),
        ((demo, far), "5.00", "上下文 8192、批 1、压缩率 0.75"),
        ((demo,), "1.50", "演示模型、上下文 2048、批 1、压缩率 0.75"),
    ):
        settings = [speed(), *others]
        assert set(decision.table(settings, *several).set_index("方法").loc["keydiff", "首词元"]) == {
            f"{times}{ELSEWHERE}"
        }
        assert f"keydiff 的取自{place}。" in decision.columns(settings, *several)


# ---- the lines ------------------------------------------------------------------------------------------------------


def with_ratios(records: Records) -> Records:
    ends = {f"{name}_ci95_{end}": 1.0 for name in ("delta_nll", "ppl_ratio") for end in ("low", "high")}
    return Records(
        records.study, None, None, records.frame.assign(ppl_ratio=np.exp(records.frame["delta_nll"]), **ends)
    )


def test_compression_and_implementation_are_told_apart():
    said = first_page.faster(speed())
    compression, implementation, both = 1 / (1 - 0.9 / 2), 0.036 / 0.03, 0.036 / (0.03 * (1 - 0.9 / 2))
    assert said.index(f"{compression:.2f} 倍") < said.index(f"{implementation:.2f} 倍") < said.index(f"{both:.2f} 倍")
    assert "（snapkv，压缩率 0.9）" in said and "transformers（StaticCache）" in said
    assert "缓存由 200 MB 变为 20 MB" in first_page.smaller(speed())


def test_the_lines_are_of_the_shortest_step_and_name_what_is_as_fast(several):
    wiki, books = map(with_ratios, several[:2])
    as_fast = timed("knorm", 0.9, 0.029 * (1 - 0.9 / 2), 2.2, turns=(0.9, 1.0, 1.2))  # nobody can tell
    assert "（knorm，压缩率 0.9）" in first_page.faster(speed(as_fast))
    assert "snapkv 0.90 与 knorm 分不出快慢" in first_page.details(speed(as_fast))
    alone = speed(timed("keydiff", 0.9, 0.01, 2.2))
    lost = first_page.lost(alone, wiki, books, *several[2:])
    assert f"口令答对 {34 / N:.2f}" in lost and "续写损失最小的是 snapkv（短文 0." in lost
    assert "续写损失最小" not in first_page.lost(speed(), wiki, books, *several[2:])


def test_where_texts_disagree_the_line_names_both(apart):
    wiki, books = map(with_ratios, apart[:2])
    lost = first_page.lost(speed(timed("knorm", 0.9, 0.01, 2.2)), wiki, books, *apart[2:])
    assert "续写损失最小的是 snapkv（短文 0.04" in lost and "、keydiff（长书 0.04" in lost


def with_ends(records: Records) -> Records:
    """As storage wants them: intervals of what is shown, and in which precision it was."""
    ends = {f"{name}_ci95_{end}": 0.5 for name in ("delta_nll", "accuracy", "score") for end in ("low", "high")}
    return Records(records.study, None, None, records.frame.assign(dtype="float32", **ends))


def test_answers_are_told_for_what_keeps_them(several):
    said = first_page.answers(*several[2:])
    assert "压缩率 0.75：3 种方法里 0 种几乎答不出口令" in said  # 2 of 40 is a twentieth
    assert "keydiff（0.85，0.85）" in said and "snapkv（" not in said and "不压缩（0.90，0.90）" in said


def test_controls_and_what_is_not_what_it_says_are_not_counted(several):
    asked, about = several[2:]
    frame = asked.frame.assign(degenerate=np.where(asked.frame["press"] == "keydiff", "tied 0.11", None))
    random = frame[frame["press"] == "snapkv"].assign(press="random", accuracy=0.0)
    said = first_page.answers(Records("recall", None, None, pd.concat([frame, random])), about)
    assert "：2 种方法里 0 种几乎答不出口令" in said and "keydiff（0.85）名不副实，不在其列" in said


def test_what_the_own_method_is_said_to_win_is_what_the_parts_say(tmp_path, several):
    """keydiff stands for it: 34 of 40 in each part, where the next has 6."""
    renamed = [
        Records(one.study, one.folder, one.root, one.frame.replace({"press": {"keydiff": "copying_heads"}}))
        for one in several
    ]
    said = first_page._budget_for_them(tuple(renamed))
    assert "（0.5、0.75、0.9）上，是唯一在口令、末词、抄写上都没有明确输给最好者的方法" in said
    assert "口令上它明确好于其余各种" in said and "没有测全" not in said
    assert first_page._budget_for_them(several) == ""
    assert first_page._won({0.5: set(), 0.9: {"a"}}) == "它只在压缩率 0.5 明确好于其余各种"
    assert first_page._won({0.5: {"a", "b"}, 0.9: {"a"}}) == "它与 a 分不出"
    assert first_page._won({0.5: {"b"}, 0.9: {"a"}}) == "它总与别的某一种分不出"


def test_fewer_bits_are_advised_where_they_lose_to_nothing(several):
    """4 bits lose nothing here, take an eighth, and cannot take less."""
    records = [*map(with_ends, several)]
    assert "时只量化，没有一项分明不如淘汰" in first_page.saving(*records)
    assert "float32 的 1/2、1/4、1/8 时" in first_page.saving(*records)
    assert "每个数只记 4 位：缓存是 float32 的 0.12，短文的损失是 0.000 nat" in first_page.fewer_bits(*records)


def test_an_address_is_shown_only_where_others_can_open_it():
    assert first_page.public_address("https://me:secret@example.org/a/b.git") == "https://example.org/a/b"
    for private in ("/home/me/b", "git@example.org:a/b.git", "file:///home/me/b", ""):
        assert first_page.public_address(private) == ""
