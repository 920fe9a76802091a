"""What pages say of tasks, on runs and documents of which the answers are known by hand."""

import numpy as np
import pandas as pd
import pytest

from kvneox_lib.measures.intervals import comparison, holm
from kvneox_lib.pages import task_verdicts
from kvneox_lib.pages import tasks as pages
from kvneox_lib.pages.report import Missing, Records
from kvneox_lib.studies.records import write_table

N = 100  # documents
WHOLE = {"kvneox_passkey": 0.95, "kvneox_copy": 0.4}  # without a press
SCORES = {  # task, press, question: score
    ("kvneox_passkey", "random", "outside"): 0.3,
    ("kvneox_passkey", "keydiff", "outside"): 0.9,
    ("kvneox_passkey", "snapkv", "outside"): 0.1,
    ("kvneox_copy", "random", "outside"): 0.3,
    ("kvneox_copy", "keydiff", "outside"): 0.32,
    ("kvneox_copy", "snapkv", "outside"): 0.3,
    ("kvneox_passkey", "snapkv", "inside"): 0.6,
    ("kvneox_passkey", "keydiff", "inside"): 0.9,
    ("kvneox_copy", "random", "inside"): 0.05,
    ("kvneox_copy", "snapkv", "inside"): 0.32,
}


def hits(score: float) -> np.ndarray:
    """The same documents are hard in every run."""
    return (np.arange(N) * 37 % N < round(N * score)).astype(float)


def run(task: str, press: str, question: str, score: float, p: float = 0.9, **more) -> dict:
    known = {"dataset": task, "press": press, "question": question, "score": score, "mcnemar_p": p}
    ends = {"delta_score": -0.2, "delta_score_ci95_low": -0.3, "delta_score_ci95_high": -0.1}
    return known | ends | {"compression_ratio": 0.0 if press == "no_press" else 0.5, **more}


@pytest.fixture
def records(tmp_path) -> Records:
    rows = []
    for (task, press, question), score in SCORES.items():
        name = f"{task} {press} {question}"
        write_table(tmp_path, name, "documents", pd.DataFrame({"doc_id": range(N), "score": hits(score)}))
        rows.append(run(task, press, question, score, run_id=name, path=str(tmp_path / f"{name}.json")))
    rows += [run(task, "no_press", "outside", score) for task, score in WHOLE.items()]
    return Records("tasks", tmp_path, tmp_path, pd.DataFrame(rows))


def test_presses_are_judged_on_the_same_documents(records):
    found = task_verdicts.against_random(records, 0.5).set_index(["dataset", "press"])
    p = [
        comparison(hits(SCORES[task, press, "outside"]) - hits(SCORES[task, "random", "outside"]), np.arange(N)).p
        for task, press in found.index
    ]
    assert found["p"].tolist() == pytest.approx(holm(np.array(p)).tolist())
    assert task_verdicts.random_table(records, 0.5).to_numpy().tolist() == [
        ["口令", "0.95", "0.30", "keydiff", "snapkv", "0 种"],
        ["抄写", "0.40", "0.30", "—", "—", "2 种"],
    ]
    assert task_verdicts.told_apart(records, 0.5).startswith(
        "与随机淘汰分得出高下的，口令 2 种方法里 2 种，抄写 2 种方法里 0 种。"
    )
    with pytest.raises(Missing, match="random"):
        task_verdicts.against_random(records, 0.75)


def test_where_one_press_stands(records):
    assert task_verdicts.stands(records, "keydiff", 0.5, "outside") == (
        "问题在外、压缩率 0.5 时，keydiff 明确好于随机淘汰的是口令（0.90 对 0.30），"
        "分不出高下的是抄写（0.32 对 0.30）。"
    )
    assert task_verdicts.stands(records, "snapkv", 0.5, "outside").startswith(
        "问题在外、压缩率 0.5 时，snapkv 明确差于随机淘汰的是口令（0.10 对 0.30），"
    )


def test_what_it_is_worth_to_see_the_question(records):
    assert task_verdicts.seeing_in_words(records) == (
        "压缩率 0.5 时，看得到问题之后明确变化的（同样的文档上成对比较，按 Holm 法一起校正）："
        "口令 2 种方法里更好的 1 种、更差的 0 种；抄写 1 种方法里更好的 0 种、更差的 0 种。"
        "获益最多的是 snapkv 在口令上，由 0.10 到 0.60。"
    )


def test_harm_is_told_by_the_corrected_p_and_by_the_interval_where_there_is_none():
    runs = pd.DataFrame(
        [
            run("kvneox_passkey", "no_press", "outside", 1.0),
            run("kvneox_passkey", "snapkv", "outside", 0.2, 1e-9),
            run("kvneox_passkey", "keydiff", "outside", 0.8, 0.04),  # not after correction
            run("kvneox_passkey", "tova", "outside", 0.8, 0.045, delta_score=0.2),
            run("kvneox_copy", "snapkv", "outside", 0.2, None),
            run("kvneox_copy", "keydiff", "outside", 0.2, None, delta_score_ci95_high=0.1),
            run("kvneox_copy", "tova", "outside", 0.2, 1e-9),
        ]
    )
    found = pages.harmed(runs)
    assert list(zip(found["dataset"], found["press"])) == [
        ("kvneox_passkey", "snapkv"),
        ("kvneox_copy", "snapkv"),
        ("kvneox_copy", "tova"),
    ]
    said = pages.unharmed(runs, "outside")
    assert said.startswith("压缩率 0.5 时，3 种方法里，各项任务都看不出变差的有 keydiff（")
    assert said.endswith("；tova 只在口令上看不出变差；其余 1 种各项都明确变差。")
    alike = runs.assign(mcnemar_p=0.9)
    assert pages.unharmed(alike, "outside").endswith("按 Holm 法一起校正）。")


def test_orders_that_agree_at_every_ratio_are_named():
    names = [f"press {i}" for i in range(8)]
    rising = [0.1 * i for i in range(8)]
    both = []
    for ratio in (0.5, 0.75):
        both += [run("kvneox_copy", name, "outside", x, compression_ratio=ratio) for name, x in zip(names, rising)]
    runs = pd.DataFrame(both)
    known = {"press": names * 2, "compression_ratio": [0.5] * 8 + [0.75] * 8, "query_aware": False}
    recall = pd.DataFrame(known | {"accuracy": [0.5, 0.1, 0.9, 0.3, 0.8, 0.0, 0.6, 0.2] * 2})
    loss = pd.DataFrame(known | {"delta_nll": [1 - x for x in rising] * 2})
    said = pages.agreeing(runs, recall, {"pg19_ppl": loss}, (0.5, 0.75))
    assert said == "3 对里，区间在压缩率 0.5、0.75 上都在零以上的有 1 对：抄写与长书的损失。"
    turned = loss.assign(delta_nll=1 - loss["delta_nll"])
    assert "没有一对的区间" in pages.agreeing(runs, recall, {"pg19_ppl": turned}, (0.5, 0.75))
