"""The proof that the adapter is exact, with what each press keeps and what is said then: what notebook 00 runs."""

from dataclasses import dataclass
from typing import Annotated

import pandas as pd
import torch
from tqdm.auto import tqdm

from kvneox_lib.inputs.weights import LoadedModel, demo_folder, find_device
from kvneox_lib.measures.decoding import generate
from kvneox_lib.measures.survivors import kept_positions
from kvneox_lib.measures.verify import press_matrix, run_checks
from kvneox_lib.presses.by_name import expand_presses, make_press
from kvneox_lib.presses.calibration import standard_library_docstrings
from kvneox_lib.presses.facts import attention_needed
from kvneox_lib.presses.registry import REGISTRY
from kvneox_lib.studies import arguments as may_be
from kvneox_lib.studies.arguments import Attention, Device, Dtype, Model, OutputDir, Presses, Rule, rule_of, whole
from kvneox_lib.studies.plan import Planned, target_of
from kvneox_lib.studies.provenance import provenance
from kvneox_lib.studies.runs import Runs

RATIO = 0.5
SHORTEST = 128  # tokens that every press has something left to choose from
SAID_TOKENS = 24
SAID = (("no_press", 0.0), ("snapkv", 0.5), ("snapkv", 0.99), ("random", 0.99))
_SPREAD = dict.fromkeys(
    ("auto", "all"), "00_adapter names its record after the one device: allowed is cpu, cuda:0, ..."
)
OneDevice = Annotated[str, Rule(rule_of(Device).check, not_in_a_sweep=_SPREAD)]


@dataclass(frozen=True)
class Proof:
    loaded: LoadedModel
    run_id: str
    n_tokens: int
    checks: pd.DataFrame  # what was measured, and the limit it had to keep
    matrix: pd.DataFrame  # every press, every way of using it
    kept: dict[str, torch.Tensor]  # (layers, heads, T) of the core presses whose positions can be told
    continuations: pd.DataFrame  # of one sentence, uncompressed and compressed


def plan(asked: dict, trained: int | None) -> list[Planned]:
    target = target_of(asked)
    named = {name: asked[name] for name in ("attn_implementation", "dtype", "device", "context_length")}
    named["device"] += ":0" if asked["device"] in ("cuda", "mps") else ""
    named["weights"] = "bundled" if target.folder == demo_folder() else "pretrained"
    settings = {**named, "dataset": "stdlib-docstrings"}
    return [Planned(asked["presses"], RATIO, settings, always_named=tuple(named), is_press=False)]


def measure_adapter(
    *,
    model: Model = "demo",
    revision: may_be.Revision | None = None,
    attn_implementation: Attention = "sdpa",
    dtype: Dtype = "float32",
    device: OneDevice = "auto",
    context_length: Annotated[int, whole(SHORTEST)] = 400,
    presses: Presses = "every",
    output_dir: OutputDir = "results/adapter",
) -> Proof:
    """Every check against the stock model, always anew, on two pieces of the docstrings of the standard library."""
    asked = locals()
    asked["device"] = str(find_device(device)) if device == "auto" else device
    runs, names = Runs(measure_adapter, plan, asked), expand_presses(presses)
    (run,), lm, tokenizer = runs.planned, runs.loaded.model, runs.loaded.tokenizer
    started = provenance(runs.device)
    ids = tokenizer(standard_library_docstrings(), return_tensors="pt", verbose=False).input_ids
    longest = min(ids.shape[1] // 2, lm.config.max_position_embeddings - SAID_TOKENS)
    if context_length > longest:
        raise ValueError(f"context_length={context_length}: allowed is at most {longest} here")
    input_ids = ids[:, : 2 * context_length].view(2, context_length).to(lm.device)

    rows = [
        {"检查": check.name, "测得": check.figure, "要求": "≥" if check.at_least else "≤", "界限": check.limit}
        | {"通过": check.passed}
        for check in tqdm(run_checks(lm, input_ids), desc="检查")
    ]
    checks, context = pd.DataFrame(rows), tokenizer.decode(input_ids[0])
    matrix = pd.DataFrame(list(tqdm(press_matrix(lm, tokenizer, context, names), desc="全表", total=len(names))))
    cells = matrix.drop(columns=["press", "acts"]).to_numpy()
    figures = {
        "source": runs.loaded.source,
        "n_tokens": input_ids.numel(),
        "n_checks": len(checks),
        "n_checks_failed": int((~checks["通过"]).sum()),
        "n_cells": cells.size,
        "n_cells_refused": int((cells != "ok").sum()),
        **dict.fromkeys(["kept_fraction", "nll_mean", "seed"]),  # quality is not measured, nothing is drawn
    }
    kept = {name: kept_positions(lm, input_ids[:1], make_press(name, RATIO))[:, 0] for name in _drawn(lm, names)}
    said = pd.DataFrame([_continuation(runs.loaded, input_ids[:1], *one) for one in SAID])
    runs.write(run, context_length, started, figures, {"checks": checks, "matrix": matrix})
    return Proof(runs.loaded, runs.run_id(run), input_ids.numel(), checks, matrix, kept, said)


def _drawn(lm, names: list[str]) -> list[str]:
    served = ("any", lm.config._attn_implementation)
    return [name for name in names if REGISTRY[name].core and attention_needed(make_press(name)) in served]


def _continuation(loaded: LoadedModel, input_ids: torch.Tensor, name: str, ratio: float) -> dict:
    torch.manual_seed(0)
    context, last = input_ids[:, :-1], input_ids[:, -1:]
    how = {"press": make_press(name, ratio), "question_ids": last, "max_new_tokens": SAID_TOKENS, "stop_at_eos": False}
    tokens = generate(loaded.model, context, **how).tokens[0]
    return {"press": name, "compression_ratio": ratio, "continuation": loaded.tokenizer.decode(tokens)}
