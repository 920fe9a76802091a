"""What EleutherAI published of each Pythia model's task scores, to hold an uncompressed run on real weights against.

`published.csv` has the last checkpoint (step 143000), with zero and five shots, as a harness of early 2023 measured it.
Today's harness has another name for one metric, and other prompts for some tasks: a figure that is far off may tell of
the prompt as well as of the run.
"""

import math
from functools import cache
from numbers import Real
from pathlib import Path

import pandas as pd

SOURCE = "github.com/EleutherAI/pythia, evals/pythia-v1, step 143000"
REVISION = "step143000"  # which is main
TODAYS_NAMES = {"ppl": "perplexity"}
STANDARD_ERRORS = 3  # of the difference; more is far


def published(model: str, task: str, num_fewshot: int) -> dict[str, tuple[float, float]]:
    """metric → (value, standard error), the metrics named as lm-eval 0.4.13 names them; {} if nothing was published.

    model: `pythia-70m` or `EleutherAI/pythia-70m`. A deduplicated model has figures of its own, and only its own. There
    is no `pythia-1b`: what was published is called `pythia-1b-bf16`.
    """
    return dict(_table().get((model.removeprefix("EleutherAI/"), task, num_fewshot), {}))


def far_from_published(model: str, task: str, num_fewshot: int, metric: str, value: float, stderr: float) -> bool:
    """Is the difference beyond three of its standard errors, which both figures bring about? False where none was
    published: then nothing is contradicted."""
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"value={value!r}: must be a finite number")
    if not isinstance(stderr, Real) or not 0 <= stderr < math.inf:
        raise ValueError(f"stderr={stderr!r}: must be a finite number, 0 or above")
    figures = published(model, task, num_fewshot)
    if metric not in figures:
        return False
    their_value, their_stderr = figures[metric]
    return abs(value - their_value) > STANDARD_ERRORS * math.hypot(stderr, their_stderr)


@cache
def _table() -> dict[tuple[str, str, int], dict[str, tuple[float, float]]]:
    table = {}
    for row in pd.read_csv(Path(__file__).with_name("published.csv")).itertuples():
        figures = table.setdefault((row.model, row.task, row.num_fewshot), {})
        figures[TODAYS_NAMES.get(row.metric, row.metric)] = (row.value, row.stderr)
    return table
