"""What lm-evaluation-harness says of a task, beside what it says without a press: paired, document by document."""

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import pandas as pd

from kvneox_lib.inputs.published import REVISION, far_from_published, published
from kvneox_lib.inputs.weights import LoadedModel
from kvneox_lib.measures.intervals import interval, mcnemar_p, wilson_ci95


@dataclass(frozen=True)
class Reading:
    """What became of the prompt of a request."""

    task: str | None
    doc_id: int | None
    prompt_tokens: int
    context_tokens: int  # of them
    n_cut: int
    rule: str
    compressed: bool  # not so without a press, and where the context is too short for it
    kept_fraction: float  # of the context's entries
    kv_bytes: int  # of the entries that are kept


def of_documents(readings: Sequence[Reading]) -> list[Reading]:
    """The first of each document's requests; those of no known document, all."""
    found = {}
    for number, reading in enumerate(readings):
        found.setdefault(number if reading.doc_id is None else (reading.task, reading.doc_id), reading)
    return list(found.values())


def summary(readings: Sequence[Reading], with_press: bool) -> dict:
    """How much of the prompts was compressed, and by which rule their contexts were found; counts are of documents."""
    found = of_documents(readings)
    if not found:
        return {}
    compressed, n = [reading for reading in found if reading.compressed], len(found)
    rules = Counter(reading.rule for reading in found)
    return {
        "prompt_tokens": sum(reading.prompt_tokens for reading in found) / n,
        "context_tokens": sum(reading.context_tokens for reading in found) / n,
        "compressed_share": sum(r.context_tokens for r in compressed) / sum(r.prompt_tokens for r in found),
        "kept_fraction": sum(r.kept_fraction for r in compressed) / len(compressed) if compressed else 1.0,
        "kv_bytes": sum(reading.kv_bytes for reading in found) / n,
        "n_cut": sum(reading.n_cut > 0 for reading in found),
        "n_not_compressed": n - len(compressed) if with_press else 0,
        "context_rule": " ".join(f"{rule}={count}" for rule, count in sorted(rules.items())),
    }


@dataclass(frozen=True)
class Scores:
    """One task under one press, as the harness tells it."""

    metrics: pd.DataFrame  # metric, filter, value, stderr, higher_is_better
    samples: list[dict]
    readings: list
    num_fewshot: int
    version: object

    @classmethod
    def of(cls, results: dict, readings: list, task: str | None = None) -> "Scores":
        """task: of several."""
        task = task or next(iter(results["results"]))
        found, rows = results["results"][task], []
        for key, value in found.items():
            metric, _, filtered = key.partition(",")
            if filtered and not metric.endswith("_stderr"):
                stderr = found.get(f"{metric}_stderr,{filtered}")
                better = results["higher_is_better"][task].get(metric, True)
                rows.append((metric, filtered, _number(value), _number(stderr), better))
        columns = ["metric", "filter", "value", "stderr", "higher_is_better"]
        metrics, samples = pd.DataFrame(rows, columns=columns), results.get("samples", {}).get(task, [])
        return cls(metrics, samples, readings, results["n-shot"][task], results["versions"][task])

    @property
    def main(self) -> tuple[str, str]:
        """The metric that stands for the task: the first, better when higher, that is a mean over documents. (RULER
        writes -1 under the lengths that a document is not of.)"""
        for row in self.metrics.itertuples():
            values = self.by_document(row.metric, row.filter)
            if row.higher_is_better and _mean_to(row.value, values) and (values >= 0).all():
                return row.metric, row.filter
        return self.metrics["metric"].iloc[0], self.metrics["filter"].iloc[0]

    def chosen(self, filtered: str) -> list[dict]:
        return sorted((one for one in self.samples if one["filter"] == filtered), key=lambda one: one["doc_id"])

    def by_document(self, metric: str, filtered: str) -> np.ndarray:
        return np.array([_number(one.get(metric)) for one in self.chosen(filtered)], dtype=float)

    def table(self, baseline: "Scores") -> pd.DataFrame:
        """A row for each metric, with its difference to the baseline, paired by document, where it is a mean."""
        rows = []
        for row in self.metrics.itertuples():
            mine, theirs = (scores.by_document(row.metric, row.filter) for scores in (self, baseline))
            texts = _texts_of(self.chosen(row.filter))
            rows.append(_beside(mine, theirs, texts) if _mean_to(row.value, mine) else {})
        return pd.concat([self.metrics, pd.DataFrame(rows, columns=COMPARED)], axis=1)

    def figures(self, table: pd.DataFrame, with_press: bool) -> dict:
        metric, filtered = self.main
        row = table[(table["metric"] == metric) & (table["filter"] == filtered)].iloc[0]
        names = {"value": "score", "stderr": "score_stderr", **{name: name for name in COMPARED}}
        figures = {"metric": metric, "filter": filtered, **{new: row[old] for old, new in names.items()}}
        figures |= {"published": row.get("published"), "published_stderr": row.get("published_stderr")}
        figures = {name: None if pd.isna(value) else value for name, value in figures.items()}
        asked = {"n_documents": len(self.chosen(filtered)), "n_shot": self.num_fewshot}
        asked |= {"task_version": str(self.version), "lm_eval_version": version("lm_eval")}
        return {**figures, **asked, **summary(self.readings, with_press), "n_tokens": None, "nll_mean": None}

    def documents(self, baseline: "Scores") -> pd.DataFrame:
        """The predictions, with what became of each prompt; of a document's requests the first."""
        metric, filtered = self.main
        first = {reading.doc_id: reading for reading in of_documents(self.readings)}
        rows = []
        for one, score, bare in zip(
            self.chosen(filtered), self.by_document(metric, filtered), baseline.by_document(metric, filtered)
        ):
            reading = first[one["doc_id"]]
            rows.append(
                {
                    "doc_id": one["doc_id"],
                    "target": _short(one["target"]),
                    "prediction": prediction(one),
                    "score": score,
                    "baseline_score": bare,
                    "prompt_tokens": reading.prompt_tokens,
                    "context_tokens": reading.context_tokens,
                    "n_cut": reading.n_cut,
                    "context_rule": reading.rule,
                }
            )
        return pd.DataFrame(rows)


COMPARED = ("score_ci95_low", "score_ci95_high", "delta_score", "delta_score_ci95_low", "delta_score_ci95_high")
COMPARED += ("mcnemar_p",)


def _beside(mine: np.ndarray, theirs: np.ndarray, texts: np.ndarray) -> dict[str, float]:
    """How sure the mean is, and its difference to another one of the same documents. Wilson's interval and McNemar's
    test take documents to be independent, so that they are not asked where some are about the same text."""
    difference = mine - theirs
    right_or_wrong = {*np.unique(mine), *np.unique(theirs)} <= {0.0, 1.0} and len(np.unique(texts)) == len(texts)
    ends = wilson_ci95(int(mine.sum()), len(mine)) if right_or_wrong else interval(mine, None, texts).ends
    p = mcnemar_p(int((difference > 0).sum()), int((difference < 0).sum())) if right_or_wrong else math.nan
    return dict(zip(COMPARED, (*ends, difference.mean(), *interval(difference, None, texts).ends, p)))


def _texts_of(samples: list[dict]) -> np.ndarray:
    """The number of the text that each document is about: several questions may be about one. That text is the longest
    of the document's fields."""
    fields = [[value for value in one.get("doc", {}).values() if isinstance(value, str)] for one in samples]
    longest = [max(texts, key=len, default="") or number for number, texts in enumerate(fields)]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(longest))}
    return np.array([numbers[text] for text in longest])


def _mean_to(value: float, values: np.ndarray) -> bool:
    return bool(np.isfinite(values).all()) and bool(np.isclose(values.mean(), value))


def _number(value) -> float:
    """NaN for what is none: the harness writes "N/A", and some metrics hold pairs until they are put together."""
    return float(value) if isinstance(value, int | float | np.number) else np.nan


def prediction(sample: dict) -> str:
    """What the model said, the number of the choice that it found likeliest, or, of a single continuation, whether it
    would have said that."""
    answers = sample["filtered_resps"]
    if isinstance(answers[0], str):
        return _short(answers[0])
    if len(answers) == 1:
        return "greedy" if answers[0][1] else ""
    return str(int(np.argmax([likelihood for likelihood, _ in answers])))


def _short(value, most: int = 200) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= most else text[: most - 1] + "…"


def beside_published(table: pd.DataFrame, loaded: LoadedModel, task: str, num_fewshot: int) -> pd.DataFrame:
    """With what EleutherAI published of this model, if it did; a difference beyond three standard errors is said."""
    same = loaded.weights == "pretrained" and loaded.revision in (None, REVISION)
    known = published(loaded.name, task, num_fewshot) if same else {}
    values, errors = zip(*(known.get(metric, (np.nan, np.nan)) for metric in table["metric"]))
    for row in table.itertuples():
        told = row.metric in known and row.stderr >= 0  # NaN of a single document
        if told and far_from_published(loaded.name, task, num_fewshot, row.metric, row.value, row.stderr):
            warnings.warn(
                f"{task} {row.metric} of {loaded.name} is {row.value:.4f} ± {row.stderr:.4f}, but EleutherAI published "
                f"{known[row.metric][0]:.4f} ± {known[row.metric][1]:.4f}: more than three standard errors apart. Look "
                "at the weights, the harness' version, num_fewshot and limit before you trust what follows",
                stacklevel=3,
            )
    return table.assign(published=values, published_stderr=errors)
