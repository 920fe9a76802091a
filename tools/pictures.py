"""The pictures of the READMEs and of docs/gallery.md, drawn from the records in results/reference alone.

A picture carries a digest of what is drawn in it and of the looks of all figures, by which a test knows whether it is
current: the drawing itself differs between versions of matplotlib and between fonts.
"""

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib import pyplot
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from kvneox_lib import expand_presses
from kvneox_lib.pages import figures, heads, looks, losses, lost_tokens, retrieval, storage, streams, timings, wordings
from kvneox_lib.pages import tasks as task_pages
from kvneox_lib.pages.report import Records, settings_in
from kvneox_lib.pages.selecting import middle_ratio, of_finished_models, of_one_storage, of_one_wording, of_ratios
from kvneox_lib.studies.records import load_records

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
REFERENCE = ROOT / "results" / "reference"
FEW = ("random", "streaming_llm", "snapkv", "keydiff")  # where a panel each, or a line each, would be too many


# ---- which records --------------------------------------------------------------------------------------------------


def settings(study: str) -> list[Records]:
    return settings_in(Path(study), REFERENCE)


def first(study: str) -> Records:
    return settings(study)[0]


def runs_of(study: str) -> pd.DataFrame:
    return of_finished_models(load_records(REFERENCE / study))


def bundled_runs(study: str) -> pd.DataFrame:
    """Those under the bundled model, on the largest number of windows or keys, the cache as it is."""
    frame = of_one_wording(of_ratios(of_one_storage(runs_of(study))))
    frame = frame[frame["weights"] == "bundled"]
    most = "n_keys" if study == "recall" else "max_windows"
    return frame[frame[most] == frame[most].max()]


def core_runs(study: str) -> pd.DataFrame:
    """Of the core presses and no_press."""
    return bundled_runs(study).loc[lambda runs: runs["press"].isin(expand_presses("all"))]


def asked_afterwards(runs: pd.DataFrame) -> pd.DataFrame:
    """Of study `recall`: first compressed, then asked."""
    return runs[~runs["query_aware"].astype(bool)]


# ---- pictures -------------------------------------------------------------------------------------------------------

Panels = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Picture:
    data: Callable[[], Panels]
    draw: Callable[[Panels], Figure]


def _loss_and_recall() -> Panels:
    """The same lines twice: what perplexity sees, and what it does not."""
    return {
        "续读的 nll 多出多少（nat/词元）": _as_value(core_runs("wikitext_ppl"), "delta_nll"),
        "口令答对的比例": _as_value(asked_afterwards(core_runs("recall")), "accuracy"),
    }


def _as_value(runs: pd.DataFrame, column: str) -> pd.DataFrame:
    pressed = runs[runs["press"] != "no_press"]
    values = {f"value{end}": pressed[f"{column}{end}"] for end in ("", "_ci95_low", "_ci95_high")}
    return pressed[["press", "compression_ratio"]].assign(**values)


def _side_by_side(panels: Panels) -> Figure:
    return figures.press_line_panels(panels, "compression_ratio", "value", xlabel="压缩率", ylabel="", own_scale=True)


def _distances() -> Panels:
    table = first("wikitext_ppl").table("distance")
    return {"": table[table["press"].isin(expand_presses("all"))]}


def _along_a_book() -> Panels:
    table = first("pg19_ppl").table("windows")
    return {"": table[table["press"].isin(("no_press", *FEW))]}


def _steps() -> Panels:
    return {"": timings.against_plain(settings("speed"))}


def _readings() -> Panels:
    running = streams.read(first("streaming"), "running", "dense", "window", "sinks")
    return {"": streams.named(streams.in_stretches(running))}


def _depths() -> Panels:
    recall = max(map(wordings.as_usual, settings("recall")), key=lambda records: len(records.frame))
    recall = storage.as_it_is(recall)  # at ratios that most were measured at: the panels have one axis
    return {"": retrieval.by_depth(recall.table("keys"), "问题在外", FEW)}


def _scores() -> Panels:
    runs = of_one_storage(first("tasks").frame)
    return {f"得分（先压缩，再提问，压缩率 {middle_ratio(runs):g}）": task_pages.at_middle_ratio(runs, "outside")}


def _score_map(panels: Panels) -> Figure:
    ((label, table),) = panels.items()
    return figures.score_map(table, label=label)


def _heat_maps(panels: Panels) -> Figure:
    by = ("depth", "compression_ratio", "correct")
    return figures.heat_maps(panels[""], *by, ylabel="口令的深度", xlabel="压缩率", label="准确率")


def _lines_along(panels: Panels) -> Figure:
    return figures.press_lines(panels[""], "to_token", "nll_mean", xlabel="读到第几个词元", ylabel="nll（nat/词元）")


def _of_heads(table: str) -> Panels:
    return {"": first("heads").table(table)}


PICTURES = {
    "loss_and_recall.png": Picture(_loss_and_recall, _side_by_side),
    "distance.png": Picture(_distances, lambda panels: losses.distance_lines(panels[""], middle_ratio(panels[""]))),
    "book.png": Picture(_along_a_book, lambda panels: losses.book_lines(panels[""], "delta_nll")),
    "speed.png": Picture(_steps, lambda panels: figures.dots(timings.step_dots(panels[""]))),
    "streaming.png": Picture(_readings, _lines_along),
    "depth.png": Picture(_depths, _heat_maps),
    "tasks.png": Picture(_scores, _score_map),
    "heads.png": Picture(lambda: _of_heads("trial"), lambda panels: heads.trial_bars(panels[""])),
    "lost_tokens.png": Picture(lambda: _of_heads("losses"), lambda panels: lost_tokens.loss_bars(panels[""])),
}


def digest(name: str) -> str:
    drawn = {title: table.round(6).to_csv() for title, table in PICTURES[name].data().items()}
    return hashlib.sha256((repr(drawn) + inspect.getsource(looks)).encode()).hexdigest()


def digest_in(path: Path) -> str | None:
    with Image.open(path) as picture:
        return picture.text.get("Description")


def draw(name: str) -> Figure:
    """With the style set up."""
    return PICTURES[name].draw(PICTURES[name].data())


def save(name: str, folder: Path = DOCS) -> None:
    """In few colours, which a drawing has anyway: a third of the bytes."""
    drawn, told = BytesIO(), PngInfo()
    with matplotlib.rc_context():
        figures.use_style()
        figure = draw(name)
        figure.savefig(drawn, dpi=200)
        pyplot.close(figure)
    told.add_text("Description", digest(name))
    few_colours = Image.open(drawn).convert("RGB").quantize(64, dither=Image.Dither.NONE)
    few_colours.save(folder / name, optimize=True, pnginfo=told)
