"""Scores of lm-evaluation-harness' tasks under a grid of presses and ratios, each measured once and kept: what notebook
07 runs.

The harness makes the prompts and the scores; what is added is the comparison with no press on the same documents.
"""

import time

from tqdm.auto import tqdm

from kvneox_lib.measures.degenerate import figures_of_each
from kvneox_lib.measures.scores import Scores, beside_published
from kvneox_lib.presses.by_name import expand_presses
from kvneox_lib.studies import arguments as may_be
from kvneox_lib.studies.plan import Planned, as_list, at_ratios, bits_of, but_for_what_is_kept, left_out, strengths
from kvneox_lib.studies.provenance import provenance
from kvneox_lib.studies.runs import Runs, Study, bits_in

AT_ONCE = 16  # runs, unless one press has more
IN_THE_BOX = ("kvneox_passkey", "kvneox_cloze", "kvneox_copy")


def plan(asked: dict, trained: int | None) -> list[Planned]:
    """For each task, with the question outside, inside, or both: no compression, and each press at each ratio, in each
    number of bits."""
    presses = expand_presses(asked["press"])
    left_out(presses, asked["kv_bits"])
    return [
        run
        for task in dict.fromkeys(as_list(asked["tasks"]))
        for mode in dict.fromkeys(as_list(asked["question"]))
        for name in dict.fromkeys(["no_press", *presses])
        for bits in bits_of(name, asked["kv_bits"])
        for run in at_ratios(name, *strengths(asked), dataset=task, question=mode, kv_bits=bits)
    ]


def measure_tasks(
    *,
    model: may_be.Model = "pythia-70m",
    revision: may_be.Revision | None = None,
    weights: may_be.QualityWeights = "auto",
    tasks: may_be.Tasks = IN_THE_BOX,
    press: may_be.Presses = ("random", "streaming_llm", "snapkv", "keydiff"),
    compression_ratio: may_be.Ratios = (0.5, 0.9),
    keep_tokens: may_be.Budgets | None = None,
    kv_bits: may_be.Bits = None,
    question: may_be.Questions = "outside",
    num_fewshot: may_be.Index | None = None,
    limit: may_be.Limit | None = 24,
    cut: may_be.Cut = "left",
    batch_size: may_be.Count = 1,
    attn_implementation: may_be.Attention = "auto",
    dtype: may_be.Dtype = "auto",
    device: may_be.Device = "auto",
    seed: may_be.Index = 0,
    output_dir: may_be.OutputDir = "results/tasks",
    overwrite: may_be.Overwrite = False,
) -> Study:
    """Scores of tasks after each context was compressed. `no_press` is always measured too: differences are to it,
    document by document.

    limit: documents of each task, a number or (below 1) a share; None: all. num_fewshot: None is what the task says.
    keep_tokens: entries of each head to keep, one budget or several, in the place of compression_ratio.
    kv_bits: in how many bits a number of what is left of a context is kept; None: as it is.
    """
    runs = Runs(measure_tasks, plan, locals())
    runs.say_what_is_left_out()
    from kvneox_lib.measures.evaluation import asked_tasks, evaluate_each  # an extra, and slow
    from kvneox_lib.measures.tasks import KVNeoXLM

    names = list(dict.fromkeys(as_list(tasks)))
    asked = asked_tasks(names, runs.loaded, num_fewshot=num_fewshot, limit=limit, seed=seed)
    runs.of_text = {name: {"documents_sha256": found.documents_sha256} for name, found in asked.items()}
    groups = _together(runs)
    progress = tqdm(
        total=sum(len(asked[group[0].settings["dataset"]].requests) for group in groups), unit="问", desc="任务"
    )
    for group in groups:
        task, mode = (group[0].settings[name] for name in ("dataset", "question"))
        progress.set_postfix_str(task)
        started, clock = provenance(runs.device), time.perf_counter()
        with runs.presses(group) as presses:
            lm = KVNeoXLM(runs.loaded, question=mode, cut=cut, batch_size=batch_size, seed=seed)
            lm.progress = progress
            told = evaluate_each(lm, [None, *presses], asked[task], [None, *bits_in(group)])
            baseline, *scored = [Scores.of(*found) for found in told]
            behaved = figures_of_each(runs.loaded.model, lm.typical_context, presses)
        seconds = (time.perf_counter() - clock) / len(group)
        for run, scores, behaviour in zip(group, scored, behaved):
            table = scores.table(baseline)
            if run.press == "no_press" and run.settings["kv_bits"] is None:
                table = beside_published(table, runs.loaded, task, scores.num_fewshot)
            figures = scores.figures(table, with_press=run.press != "no_press")
            documents = scores.documents(baseline)
            tables = {"scores": table, "documents": documents}
            figures |= {**behaviour, "run_s": seconds}
            runs.write(run, round(figures.pop("context_tokens")), started, figures, tables)
    progress.close()
    return runs.study()


def _together(runs: Runs) -> list[list[Planned]]:
    """The open runs in groups that are answered in one go, as they share the reading of each context: of one task and
    place of the question, under one attention. Each holds a cache for every run in it; those of a press, at all ratios
    and in all numbers of bits, are in one."""
    groups: dict[tuple, list[list[Planned]]] = {}
    for of_a_press in runs.open_together():
        alike = (*but_for_what_is_kept(of_a_press[0]).values(), runs.attention_for(of_a_press[0]))
        found = groups.setdefault(alike, [[]])
        if found[-1] and len(found[-1]) + len(of_a_press) > AT_ONCE:
            found.append([])
        found[-1] += of_a_press
    return [group for found in groups.values() for group in found]
