"""What the READMEs and docs/ say is so: commands and examples run, tables and figures are of today's records.

A block of commands that cannot run here has a line `<!-- needs: ... -->` above it, with words of NEEDS. Of such a block
the syntax is checked, and that the files are there that it names. All others run: examples on the bundled model, make
and snakemake up to doing what they plan (-n), and papermill's through its own command line up to the notebook, whose
one call into the library is then made in its place, with smaller numbers.
"""

import ast
import json
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import pandas as pd
import papermill
import papermill.cli
import pytest
from click.testing import CliRunner
from conftest import REPOSITORY
from matplotlib import pyplot

from kvneox_lib.pages import figures, kinds, quality, storage
from kvneox_lib.pages.report import Missing
from kvneox_lib.studies import explore, heads, perplexity, recall, records, speed, streaming, tasks

sys.path.insert(0, str(REPOSITORY / "tools"))
import pictures  # noqa: E402
import readme  # noqa: E402

matplotlib.use("agg")

PAGES = {path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8") for path in readme.WRITTEN}
BLOCK = re.compile(r"(?:<!-- needs: (?P<needs>[^>]*?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)```", re.DOTALL)
NEEDS = {
    "browser": "a person in front of it",
    "conda": "conda",
    "gpu": "a CUDA GPU",
    "network": "what is not on this machine",
    "quant": "optimum-quanto and a C++ compiler",
    "slurm": "a cluster",
    "time": "many minutes",
    "windows": "Windows",
    "wsl": "Linux within Windows",
}
ENDS = ("_ci95_low", "_ci95_high")
CHECKED = ("export", "make", "papermill", "snakemake")


def blocks(page: str, language: str) -> list[tuple[str, set[str]]]:
    """Code of that language, with what it needs."""
    found = [match for match in BLOCK.finditer(page) if match["language"] == language]
    return [(match["code"], set((match["needs"] or "").replace(" ", "").split(",")) - {""}) for match in found]


def commands(page: str) -> list[str]:
    """Those that need nothing: the lines of blocks, and what stands as code within the text."""
    lines = [line for code, needs in blocks(page, "bash") if not needs for line in code.splitlines()]
    within = re.findall(r"`([^`\n]+)`", BLOCK.sub("", page))
    lines += [code for code in within if len(code.split()) > 1 and code.split()[0] in CHECKED]
    return [line for line in (re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines) if line]


COMMANDS = sorted({line for page in PAGES.values() for line in commands(page)})


def starting_with(word: str) -> list[str]:
    return [line for line in COMMANDS if line.split()[0] == word]


# -- the scheme itself ------------------------------------------------------------------------------------------------


def test_every_block_is_of_a_kind_that_is_checked():
    for name, page in PAGES.items():
        drawings = {""} if name == "docs/architecture.md" else set()
        assert {match["language"] for match in BLOCK.finditer(page)} <= {"bash", "python"} | drawings
        assert page.count("```") == 2 * len(BLOCK.findall(page)) and page.count("needs:") == len(marks(page))
        assert set().union(*marks(page), set()) <= set(NEEDS)
    # tests/test_task_study.py runs those of the harness' command line; the others are make's
    by_hand = {" ".join(line.split()[:4]) for line in COMMANDS if line.split()[0] not in CHECKED}
    assert by_hand == {"python -m kvneox_lib tasks", "python -m kvneox_lib verify", "python -m pytest -n"}
    assert len(starting_with("papermill")) > 15 and len(starting_with("make")) > 6


@pytest.mark.parametrize(("target", "module"), [("smoke", "kvneox_lib"), ("test", "pytest")])
def test_what_stands_for_make_on_windows_is_what_make_runs(target, module):
    done = subprocess.run(["make", target, "-n"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    ours = next(
        line for line in starting_with("python") if line.startswith(f"python -m {module} ") and " tasks" not in line
    )
    asked = [word for word in ours.split()[1:] if not word.startswith("tests/")]
    assert " ".join(asked) in done.stdout


UNIX_ONLY = {"fcntl", "grp", "pwd", "resource", "termios", "fork", "getuid", "killpg", "setsid"}


def names_in(path: Path) -> set[str]:
    """Modules that it imports, and attributes of os that it asks for."""
    tree = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    found = {alias.name for node in tree if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
    found |= {node.module for node in tree if isinstance(node, ast.ImportFrom)}
    return found | {node.attr for node in tree if isinstance(node, ast.Attribute)}


def test_nothing_but_the_sweep_needs_unix():
    """As the section for Windows says, of what its commands run."""
    (tests,) = (line for line in starting_with("python") if "pytest" in line)
    paths = [REPOSITORY / word for word in tests.split() if word.startswith("tests/")]
    for folder in ("kvneox_lib", "report", "tools"):
        paths += (REPOSITORY / folder).rglob("*.py")
    assert len(paths) > 60 and all(not names_in(path) & UNIX_ONLY for path in paths)
    assert "fcntl" in names_in(REPOSITORY / "workflow" / "only_one.py")


def marks(page: str) -> list[set[str]]:
    return [needs for language in ("bash", "python") for _, needs in blocks(page, language) if needs]


def test_what_cannot_run_here_is_at_least_well_formed():
    for page in PAGES.values():
        for code, needs in blocks(page, "bash"):
            if needs:
                assert subprocess.run(["bash", "-n"], input=code, text=True).returncode == 0, code
                for word in shlex.split(code, comments=True):
                    if re.fullmatch(r"[\w/.-]+\.(py|ipynb|yml|yaml|txt)", word):
                        assert (REPOSITORY / word).exists(), word
        for code, _ in blocks(page, "python"):
            compile(code, "README", "exec")


def slugs(page: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)", BLOCK.sub("", page), re.M)
    return {re.sub(r"[^\w -]", "", title.strip().lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)]*)\)", BLOCK.sub("", PAGES[name])):
        if target.startswith("https://"):
            continue
        path, _, place = target.partition("#")
        there = ((REPOSITORY / name).parent / path).resolve() if path else REPOSITORY / name
        assert there.exists(), target
        assert not place or place in slugs(there.read_text(encoding="utf-8")), target


def test_every_page_is_reached_and_the_longest_is_not_long():
    linked = set(re.findall(r"\]\((docs/\w+\.md)\)", PAGES["README_zh.md"]))
    assert linked == {name for name in PAGES if name.startswith("docs/")}
    assert len(PAGES["README_zh.md"].splitlines()) <= 481


# -- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in PAGES if name.startswith("README")])
def test_the_examples_run(name, tmp_path):
    """In order, on the bundled model."""
    parts = [code for code, needs in blocks(PAGES[name], "python") if not needs]
    script = "\n".join(parts).replace("pythia-410m", "demo")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert parts and done.returncode == 0, done.stderr


@pytest.mark.parametrize("line", starting_with("make"))
def test_make_knows_the_target(line):
    done = subprocess.run([*shlex.split(line), "-n"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def plans() -> list[str]:
    """Lines of one params file and one goal that differ in cores alone plan the same."""
    return list({re.sub(r" -[nc]( \d+)?", "", line): line for line in starting_with("snakemake")}.values())


@pytest.mark.parametrize("line", plans())
def test_snakemake_plans_it(line):
    command = [sys.executable, "-m", "snakemake", *shlex.split(line)[1:], "-n", "--quiet"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("line", starting_with("export"))
def test_variables_are_set(line):
    name, _, value = line.removeprefix("export ").partition("=")
    done = subprocess.run(["bash", "-c", f'{line}; printf %s "${name}"'], capture_output=True, text=True)
    assert done.stdout == value and value


MEASURE = {
    "01_wikitext_ppl": perplexity.measure_perplexity,
    "02_pg19_ppl": perplexity.measure_perplexity,
    "03_speed": speed.measure_speed,
    "04_streaming": streaming.measure_streaming,
    "05_recall": recall.measure_recall,
    "06_explore": explore.record_exploration,
    "07_tasks": tasks.measure_tasks,
    "08_heads": heads.measure_heads,
}
SMALLER = {  # whatever the line says
    "model": "demo",
    **{"context_length": 320, "continuation_length": 16, "max_windows": 2, "control_windows": 1},
    **{"context_lengths": [160], "batch_sizes": [1], "max_new_tokens": 4, "repeats": 1},
    **{"n_keys": 4, "keys_per_context": 4, "depths": [0.1, 0.3, 0.6, 0.9]},
    **{"window": 60, "max_tokens": 600, "dense_limit": 512, "recompute_samples": 4, "ablation_sinks": [0]},
    **{"ablation_sizes": [64], "sample_tokens": 8, "tasks": ["kvneox_copy"], "limit": 2},
    **{"search_keys": 4, "control_draws": 1, "window_context": 160},
}


@pytest.mark.slow
@pytest.mark.parametrize("line", starting_with("papermill"))
def test_papermill_runs_it(line, tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(papermill.cli, "execute_notebook", lambda **given: asked.update(given))
    done = CliRunner().invoke(papermill.cli.papermill, shlex.split(line)[1:])
    assert done.exit_code == 0, done.output
    path = REPOSITORY / asked["input_path"]
    known, given = papermill.inspect_notebook(path), asked["parameters"]
    assert set(given) <= set(known)
    if path.stem == "00_adapter":
        return  # no single call of the library; tests/test_notebooks.py runs it
    smaller = {name: value for name, value in SMALLER.items() if name in known}
    if "compression_ratio" in known and "compression_ratio" not in given:
        smaller["compression_ratio"] = 0.5
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the texts of the hub are not here
        MEASURE[path.stem](**{**given, **smaller, "output_dir": str(tmp_path / "out")})
    kept = records.load_records(tmp_path / "out")
    assert len(kept) and ("failure" not in kept or kept["failure"].isna().all())


# -- tables and figures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_the_tables_are_current(name):
    assert readme.filled(PAGES[name]) == PAGES[name], "run: make readme"


def test_spans_of_notebooks():
    assert readme.spans(["00", "01", "03", "04", "05", "08"]) == "00、01、03–05、08"


def test_every_block_stands_in_one_place():
    assert sorted(re.findall(r"^<!-- /(\S+) -->$", "\n".join(PAGES.values()), re.M)) == sorted(readme.BLOCKS)
    with pytest.raises(ValueError, match="must have <!-- presses -->"):
        readme.filled("<!-- /presses -->")


def test_the_table_of_quality_is_of_the_records():
    rows = [line for line in readme.quality_table().splitlines() if line.startswith("| `")]
    row = next(line for line in rows if line.startswith("| `lagkv`"))
    assert len(rows) == len(readme.SHOWN_PRESSES) <= 8
    assert len([line for line in readme.task_table().splitlines() if line.startswith("| `")]) <= 8
    expected = []
    for study, column in (("wikitext_ppl", "ppl_ratio"), ("pg19_ppl", "ppl_ratio"), ("recall", "accuracy")):
        runs = records.load_records(pictures.REFERENCE / study).query("press == 'lagkv'")
        runs = runs[runs["max_windows"] == 200] if "max_windows" in runs else runs[~runs["query_aware"].astype(bool)]
        shown = runs.set_index("compression_ratio").loc[[0.5, 0.9]]
        degenerate = shown["degenerate"].notna()
        expected += ["—" if gone else f"{value:.3f}" for gone, value in zip(degenerate, shown[column])]
    assert row.strip("| ").split(" | ")[1:] == expected and "—" in expected


def write(folder: Path, name: str, **row) -> None:
    folder.mkdir(exist_ok=True)
    where = {"model": "demo", "weights": "bundled", "device_name": "A", "dtype": "float32", "dataset": "book"}
    where = dict.fromkeys(records.REQUIRED) | where
    (folder / f"{name}.json").write_text(json.dumps({"run_id": name, **where, **row}))


def steps():
    return pictures.PICTURES["speed.png"].data()[""]


def test_the_table_of_speed_is_of_one_machine_and_the_figure_of_all(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "REFERENCE", tmp_path)
    assert "还没有记录" in readme.speed_table() and "还没有记录" in readme.streaming_table()
    measured = [
        (machine, engine, ms)
        for machine, steps in {"A": (40, 31), "B": (80, 9)}.items()
        for engine, ms in zip(("stock", "ours"), steps)
    ]
    for i, (machine, engine, ms) in enumerate([*measured, ("C", "ours", 77)]):
        press, ratio = ("no_press", 0.0) if engine == "stock" else ("snapkv", 0.5)
        cell = {"batch_size": 4, "engine": engine, "press": press, "device_name": machine}
        times = {f"step_s{end}": ms / 1e3 * by for end, by in (("", 1), ("_q25", 0.9), ("_q75", 1.2))}
        times |= {name: 1.0 for name in ("prefill_s", "prefill_s_q25", "prefill_s_q75", "times_floor")}
        cell |= {"compression_ratio": ratio, "failure": None, **times}
        for length in (512, 256):
            where = {"context_tokens": length, "context_length": length, "decode_tok_per_s": 4e3 / ms * (512 / length)}
            write(tmp_path / "speed", f"run{i}-{length}", **cell, **where)
    failed = {"press": "tova", "device_name": "A", "failure": "out of memory"}
    write(tmp_path / "speed", "bad", **{**cell, **where, **failed})
    table = readme.speed_table()
    assert "A，float32，上下文 512，批 4；" in table and "不是置信区间" in table and len(table.splitlines()) < 10
    assert "| transformers（DynamicCache），不压缩 | 1000 (1000–1000) | 40.0 (36.0–48.0) | 1.00 | 100 | —" in table
    assert "| 31.0 (27.9–37.2) |" in table and not re.search(r"tova|\| 200 \||77.0|\| 9.0", table)
    with pytest.raises(Missing, match="与本库不压缩的对照"):
        steps()
    for machine, ms in (("A", 20), ("B", 10)):
        cell |= {"engine": "ours", "press": "no_press", "compression_ratio": 0.0, "device_name": machine}
        cell |= {f"step_s{end}": ms / 1e3 for end in ("", "_q25", "_q75")}
        write(tmp_path / "speed", f"plain-{machine}", **cell, **{**where, "context_tokens": 512, "context_length": 512})
    shown = steps().set_index(["device_name", "name"])["value"].to_dict()
    assert shown == pytest.approx(
        {
            ("A", "transformers（DynamicCache），不压缩"): 2.0,
            ("A", "本库，snapkv 0.50"): 1.55,
            ("B", "transformers（DynamicCache），不压缩"): 8.0,
            ("B", "本库，snapkv 0.50"): 0.9,
        }
    )


def test_the_table_of_streaming(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "REFERENCE", tmp_path)
    ppl = {f"{part}_ppl{end}": 20.5 + i for part in ("within", "beyond") for i, end in enumerate(("", *ENDS))}
    held = {"n_tokens": 1000, "timed": True}
    write(tmp_path / "streaming", "a", press="sinks", n_sink=4, window=60, kv_bytes=2.5e6, step_s=0.0031, **held, **ppl)
    ppl |= {f"beyond_ppl{end}": None for end in ENDS}
    write(tmp_path / "streaming", "b", press="dense", n_sink=0, window=None, kv_bytes=9e6, step_s=None, **held, **ppl)
    write(tmp_path / "streaming", "c", press="sinks", n_sink=8, window=56, kv_bytes=None, step_s=None, n_tokens=1000)
    table = readme.streaming_table()
    assert "| 汇聚点加窗口 | 4 | 60 | 1000 | 20.5 [21.5, 22.5] | 20.5 [21.5, 22.5] | 2.50 | 3.1 |" in table
    assert "| 全部保留 | 0 | — | 1000 | 20.5 [21.5, 22.5] | 20.5 | 9.00 | — |" in table and "| 56 |" not in table


# -- the results in three sentences -----------------------------------------------------------------------------------


def write_kept(monkeypatch, ppl: dict, recall: dict) -> None:
    """Records in which these presses, at every ratio, have that perplexity and answer that share."""
    rows = {"wikitext_ppl": ("ppl_ratio", ppl), "recall": ("accuracy", {"no_press": 0.8, **recall})}
    tables = {
        study: pd.DataFrame(
            [
                {"press": press, "compression_ratio": ratio, "query_aware": False, name: value, "degenerate": None}
                for press, value in values.items()
                for ratio in ([0.0] if press == "no_press" else readme.SHOWN_RATIOS)
            ]
        )
        for study, (name, values) in rows.items()
    }
    monkeypatch.setattr(readme, "bundled_runs", tables.get)
    core = readme.expand_presses("all")
    monkeypatch.setattr(readme, "core_runs", lambda study: tables[study].loc[lambda runs: runs["press"].isin(core)])
    run = pd.Series(
        {"model": "m", "weights": "random", "context_tokens": 2, "batch_size": 4, "device_name": "A", "dtype": "f"}
    )
    monkeypatch.setattr(readme, "faster", lambda: [readme.Faster(run, 0.75, (0.25, 0.25), (0.5, 0.75), (0.96, 1.45))])


def test_the_results_in_words(monkeypatch):
    losses = {"keydiff": 1.5, "tova": 1.25, "knorm": 2.0, "lagkv": 1.1, "random": 9.0, "kvzip": 1.02, "kvcompose": 1.0}
    recall = {"keydiff": 0.6, "tova": 0.01, "knorm": 0.125, "random": 0.3, "kvzip": 0.07, "random_recent": 0.5}
    write_kept(monkeypatch, losses, recall)
    chinese, english = readme.results_in_chinese(), readme.results_in_english()
    assert "核心方法里 `keydiff` 答对 60%，其余 2 种最多答对 12.5%；不压缩时 80%。两项都可比的核心方法里，" in chinese
    assert "困惑度增加得最少（点估计）的 `tova` 答对 1%。" in chinese and "rises least (a point" in english
    assert "of the core methods `keydiff` answers 60%, the other 2 at most 12.5%; without compression 80%." in english
    assert "丢掉 50%，核心方法的困惑度变为 1.10–2.00 倍" in chinese and "core methods is 1.10–2.00 times" in english
    assert chinese.endswith("：`kvzip`（压缩时再读一遍上下文）困惑度 1.02、1.02 倍，口令答对 7%、7%。")
    assert "`kvzip` (reads the context again to compress it) has 1.02 and 1.02 times" in english
    assert "`random" not in chinese + english and "kvcompose" not in chinese + english
    assert (
        "缓存占原来的 25%，一步用时是本库不压缩时的 0.50–0.75 倍；" in chinese and "是本库的 0.96–1.45 倍。" in chinese
    )
    assert "a step takes 0.50–0.75 times as long" in english and "uncompressed, 0.96–1.45 times." in english


def test_the_results_in_words_when_they_are_others(monkeypatch):
    losses = {"keydiff": 1.5, "tova": 1.25}
    write_kept(monkeypatch, losses, {"keydiff": 0.01, "tova": 0.7})
    assert "困惑度增加得最少" not in readme.results_in_chinese() and "rises least" not in readme.results_in_english()
    assert "之外" not in readme.results_in_chinese() and "Beside" not in readme.results_in_english()
    write_kept(monkeypatch, losses, {"keydiff": 0.01, "tova": 0.02})
    assert "核心方法里 2 种最多答对 2%；" in readme.results_in_chinese()
    assert "of the core methods 2 at most 2%;" in readme.results_in_english()


def test_what_a_method_asks_for_is_said_in_english_too():
    assert set(readme.COSTS_IN_ENGLISH) == set(kinds.COSTS)
    assert readme._cost_in_english("copying_heads") == "measures a model once before"
    assert readme._cost_in_english("snapkv") == "at no price of its own"


def test_the_runs_of_the_control_are_those_of_the_report():
    texts = [storage.as_it_is(pictures.first(study)) for study in readme.TEXTS]
    told = quality.unmoved(*texts)
    assert re.search(r"共 (\d+) 次", readme.control_line())[1] == re.match(r"\d+", told)[0]
    assert ("一次也没有动" in readme.control_line()) == ("逐位相同" in told)


def test_the_ranges_of_times(tmp_path, monkeypatch):
    """Of all presses and precisions of a model and size; quartiles where turns were not written down."""
    monkeypatch.setattr(pictures, "REFERENCE", tmp_path)
    steps = {"ours": 10, "static": 15, "stock": 30, "a": 5, "b": 8}
    for dtype, slower in (("float32", 1), ("bfloat16", 1.25)):
        for name, ms in steps.items():
            engine, press = (name, "no_press") if name in ("ours", "static", "stock") else ("ours", name)
            ends = {"": 1, "_q25": 0.9, "_q75": 1.2} if name == "a" else dict.fromkeys(("", "_q25", "_q75"), 1)
            longer = slower if name == "b" else 1
            times = {f"step_s{end}": ms * longer / 1e3 * by for end, by in ends.items()} | {"times_floor": 1.0}
            where = {
                "context_tokens": 9,
                "context_length": 9,
                "batch_size": 2,
                "kv_bytes_compressed": 4,
                "kv_bytes_full": 16,
            }
            asked = {"engine": engine, "press": press, "compression_ratio": 0.75 if press in "ab" else 0.0}
            write(tmp_path / "speed", f"{dtype}-{name}", **asked, **where, **times, dtype=dtype, failure=None)
    (found,) = readme.faster()
    assert found.step == pytest.approx((0.45, 1.0)) and found.transformers == pytest.approx((1.5, 1.5))
    assert found.cache == (0.25, 0.25) and found.ratio == 0.75


def test_which_records_are_of_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "REFERENCE", tmp_path)
    write(tmp_path / "recall", "a", device="cpu")
    assert readme.on_gpus().startswith("没有")
    write(tmp_path / "recall", "b", device="cuda", device_name="G", dtype="bfloat16")
    assert "检索 2 份里的 1 份（G，bfloat16）在 GPU 上测得，其余都在 CPU 上。速度没有" in readme.on_gpus()
    write(tmp_path / "speed", "c", device="cuda", device_name="G", dtype="bfloat16")
    assert "速度没有" not in readme.on_gpus()


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_the_pictures_are_current_and_whole(name, tmp_path):
    path = REPOSITORY / "docs" / name
    assert pictures.digest_in(path) == pictures.digest(name), "run: make readme"
    assert path.stat().st_size < 100_000 and re.search(rf"!\[[^\]]+\]\((docs/)?{name}\)", "".join(PAGES.values()))
    with matplotlib.rc_context(), warnings.catch_warnings():
        figures.use_style()
        warnings.filterwarnings("error", message="Glyph")
        figure = pictures.draw(name)
        figure.savefig(tmp_path / name)
    pyplot.close(figure)


def drawn_in(axes) -> set[tuple]:
    return {tuple(map(float, line.get_ydata())) for line in axes.lines}


def test_the_first_picture_draws_the_records():
    name = "loss_and_recall.png"
    figure, panels = pictures.draw(name), pictures.PICTURES[name].data()
    pyplot.close(figure)
    for axes, shown in zip(figure.axes, panels.values()):
        for press, rows in shown.sort_values("compression_ratio").groupby("press"):
            assert tuple(rows["value"].astype(float)) in drawn_in(axes), press
        assert {*readme.SHOWN_PRESSES} - {"copying_heads"} <= {*shown["press"]} <= {*readme.expand_presses("all")}
    assert all(f"(docs/{name})" in PAGES[page] for page in ("README.md", "README_zh.md"))


def test_the_panels_of_depth_have_one_axis():
    """Heat maps side by side share the ticks of the first."""
    by_press = pictures.PICTURES["depth.png"].data()[""].groupby("press")["compression_ratio"]
    assert len(by_press) == len(pictures.FEW) and len({frozenset(ratios) for _, ratios in by_press}) == 1


def test_a_picture_of_other_data_or_looks_is_noticed(monkeypatch):
    name = "depth.png"
    before, picture = pictures.digest(name), pictures.PICTURES[name]
    changed = picture.data()[""].assign(correct=lambda table: table["correct"] + 0.001)
    monkeypatch.setitem(pictures.PICTURES, name, pictures.Picture(lambda: {"": changed}, picture.draw))
    assert pictures.digest(name) != before
    monkeypatch.undo()
    monkeypatch.setattr(pictures.inspect, "getsource", lambda module: "COLOURS = ()")
    assert pictures.digest(name) != before
