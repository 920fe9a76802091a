"""The table of studies. To add one: a module with a plan and a measuring function, a row here, a notebook."""

from collections.abc import Callable
from dataclasses import dataclass

from kvneox_lib.studies import adapter, explore, heads, perplexity, recall, speed, streaming, tasks
from kvneox_lib.studies.arguments import defaults_of, values_matter
from kvneox_lib.studies.plan import FOUND_BY, OF_A_GRID, PLACES


@dataclass(frozen=True)
class StudyRow:
    name: str  # of its folder in results/, and of its packed file in results/reference/
    notebook: str
    measure: Callable
    plan: Callable[[dict, int | None], list]  # parameters and the trained length -> the runs that will be written
    axes: tuple[str, ...] = ("press", "compression_ratio")  # what it varies: runs that differ otherwise never meet
    is_timed: bool = False  # a clock wants the machine for itself, and times are of one machine
    has_baseline: bool = False  # measures no_press along with any press

    @property
    def parameters(self) -> list[str]:
        """Those in a record."""
        left_out = (*OF_A_GRID, *PLACES, *FOUND_BY)
        asked = [name for name in defaults_of(self.measure) if name not in left_out]
        return [*asked, "weights_id", "text_sha256", "n_threads", "device_name"]

    @property
    def values_matter(self) -> bool:
        """Whether a figure depends on the values of the weights: then random ones are refused."""
        return values_matter(self.measure)


_GRID = ("press", "compression_ratio", "kv_bits")
ROWS = [
    StudyRow("adapter", "00_adapter", adapter.measure_adapter, adapter.plan),
    StudyRow(
        "wikitext_ppl", "01_wikitext_ppl", perplexity.measure_perplexity, perplexity.plan, _GRID, has_baseline=True
    ),
    StudyRow("pg19_ppl", "02_pg19_ppl", perplexity.measure_perplexity, perplexity.plan, _GRID, has_baseline=True),
    StudyRow(
        "speed",
        "03_speed",
        speed.measure_speed,
        speed.plan,
        axes=(*_GRID, "engine", "context_length", "batch_size", "dtype", "prefill_chunk", "evict_while_reading"),
        is_timed=True,
    ),
    StudyRow(
        "streaming",
        "04_streaming",
        streaming.measure_streaming,
        streaming.plan,
        axes=("press", "compression_ratio", "n_sink", "window", "timed"),
        is_timed=True,
    ),
    StudyRow(
        "recall",
        "05_recall",
        recall.measure_recall,
        recall.plan,
        axes=(*_GRID, "query_aware", "template", "n_distractors", "keys_per_context"),
        has_baseline=True,
    ),
    StudyRow(
        "tasks", "07_tasks", tasks.measure_tasks, tasks.plan, axes=(*_GRID, "dataset", "question"), has_baseline=True
    ),
    StudyRow("heads", "08_heads", heads.measure_heads, heads.plan, has_baseline=True),
    StudyRow("explore", "06_explore", explore.record_exploration, explore.plan),
]
STUDIES = {row.name: row for row in ROWS}
BY_NOTEBOOK = {row.notebook: row for row in ROWS}
