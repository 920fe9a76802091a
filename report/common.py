"""The names that the cells of all sections use: records, and what pages/ says and draws of them."""

# ruff: noqa: F401 (cells use them)

from importlib.metadata import version

import pandas as pd
import torch
from IPython.display import Markdown

from kvneox_lib import make_press
from kvneox_lib.neox import modeling
from kvneox_lib.neox.masks import LayerMasks
from kvneox_lib.pages import (
    copying,
    correctness,
    decision,
    degenerate,
    diagrams,
    earlier,
    figures,
    first_page,
    front,
    heads,
    interactive,
    losses,
    lost_tokens,
    machines,
    orders,
    overview,
    payoff,
    quality,
    retrieval,
    setup,
    shapes,
    storage,
    streams,
    suite,
    tables,
    task_verdicts,
    timings,
    turns,
    verdicts,
    wordings,
)
from kvneox_lib.pages import report as reporting
from kvneox_lib.pages import tasks as task_pages
from kvneox_lib.pages.report import code, draw, say, sentences, tabulate
from kvneox_lib.pages.words import READINGS

figures.use_style()

measured = [
    wordings.read_as_usual() if study == "recall" else reporting.read(study)  # 口令的其他说法只用于 @sec-wordings
    for study in ("wikitext_ppl", "pg19_ppl", "recall", "tasks", "speed", "streaming", "adapter")
]
wiki, books, recall, tasks, speed, streaming, adapter = map(storage.as_it_is, measured)
in_wordings = wordings.of_each_model()  # 每个模型一份
in_a_crowd = wordings.with_crowds(in_wordings)
causes = reporting.read("heads")
with_bits = measured[:4]  # 质量的记录，连同缓存存成几位的；只有 @sec-bits 与摘要用到
kvpress_version, transformers_version = version("kvpress"), version("transformers")
