"""Which runs a page is about."""

import pandas as pd

from kvneox_lib.inputs.templates import TEMPLATES


def pressed(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with a ratio, without the baseline and the presses whose strength is their own."""
    return runs[(runs["press"] != "no_press") & runs["compression_ratio"].notna()]


def middle_ratio(runs: pd.DataFrame) -> float | None:
    """The middle one of the ratios at which most presses were measured, the upper of two; None where there is none."""
    counts = pressed(runs).groupby("compression_ratio")["press"].nunique()
    ratios = sorted(counts.index[counts == counts.max()])
    return ratios[len(ratios) // 2] if ratios else None


def numeric(runs: pd.DataFrame) -> pd.DataFrame:
    """With the ends of intervals as floats: a record from a few windows has None."""
    ends = [name for name in runs if name.endswith(("_ci95_low", "_ci95_high"))]
    return runs.assign(**{name: pd.to_numeric(runs[name]) for name in ends})


def at_ratio(runs: pd.DataFrame, ratio: float | None) -> pd.DataFrame:
    """What belongs to a press at this ratio, and to those whose strength is their own."""
    chosen = runs["compression_ratio"].isna() | (runs["compression_ratio"] == ratio)
    return runs[chosen & (runs["press"] != "no_press")]


def with_strength(run) -> str:
    """Press and ratio or budget, and in how many bits what is left was kept; a press with a strength of its own has
    neither."""
    ratio = "" if pd.isna(run.compression_ratio) else f"，压缩率 {run.compression_ratio:g}"
    budget = getattr(run, "keep_tokens", None)
    return run.press + (ratio if pd.isna(budget) else and_budget(budget)) + and_storage(getattr(run, "kv_bits", None))


# ---- a budget in tokens, in the place of a ratio --------------------------------------------------------------------


def budget_of(runs: pd.DataFrame) -> pd.Series:
    """Of each run; NaN where a share was kept, as in all records from before there was a choice."""
    return pd.to_numeric(runs["keep_tokens"]) if "keep_tokens" in runs else pd.Series(float("nan"), runs.index)


def of_ratios(runs: pd.DataFrame) -> pd.DataFrame:
    """Without the runs under a budget: the share that it comes to is of one length, and must meet no ratio."""
    return runs[budget_of(runs).isna()]


def and_budget(budget) -> str:
    """After a name."""
    return "" if pd.isna(budget) else f"，每头 {budget:.0f} 个条目"


def budget_column(runs: pd.DataFrame) -> dict[str, list[str]]:
    """Of a table; none where there was no budget."""
    budgets = budget_of(runs)
    return {"每头条目": ["—" if pd.isna(one) else f"{one:.0f}" for one in budgets]} if budgets.notna().any() else {}


def strength_axis(runs: pd.DataFrame) -> tuple[str, str]:
    """The column that says how much was asked for, and its name."""
    return ("keep_tokens", "每头条目") if budget_of(runs).notna().any() else ("compression_ratio", "压缩率")


def of_one_wording(runs: pd.DataFrame) -> pd.DataFrame:
    """For what has one place for a press at a ratio: the runs of recall in the first wording, without numbers that
    nobody asks for, and with as many keys to a context as most have (the fewest of several such numbers); where there
    are none of these, the first there."""
    for name, usual in {"template": next(iter(TEMPLATES)), "n_distractors": 0}.items():
        if name in runs and len(runs):
            there = usual if (runs[name] == usual).any() else runs[name].iloc[0]
            runs = runs[runs[name] == there]
    return of_one_crowd(runs)


def of_one_crowd(runs: pd.DataFrame) -> pd.DataFrame:
    """With as many keys to a context as most have."""
    if "keys_per_context" not in runs or runs.empty:
        return runs
    return runs[runs["keys_per_context"] == runs["keys_per_context"].value_counts().sort_index().idxmax()]


def wordings_left_out(runs: pd.DataFrame) -> list[str]:
    """A sentence where what is shown is of one wording among several."""
    several = [name for name in TEMPLATES if "template" in runs and (runs["template"] == name).any()]
    if len(several) < 2:
        return []
    return [f"以下各图各表只用说法 {of_one_wording(runs)['template'].iloc[0]}，各种说法的比较在最后。"]


# ---- in which state of training -------------------------------------------------------------------------------------


def of_finished_models(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs without a revision: those of a model as it is used. All records were, before there was a choice."""
    return runs[runs["revision"].isna()] if "revision" in runs else runs


def of_revisions(runs: pd.DataFrame) -> pd.DataFrame:
    """The others, which only pages on training are about."""
    return runs.drop(of_finished_models(runs).index)


# ---- in how many bits what is left was kept -------------------------------------------------------------------------


def bits_of(runs: pd.DataFrame) -> pd.Series:
    """Of each run; NaN where numbers were kept as they are, as in all records from before there was a choice."""
    return pd.to_numeric(runs["kv_bits"]) if "kv_bits" in runs else pd.Series(float("nan"), runs.index)


def storage(bits) -> str:
    return "原样" if pd.isna(bits) else f"{bits:.0f} 位"


def and_storage(bits) -> str:
    """After a name: nothing where numbers are as they are."""
    return "" if pd.isna(bits) else f"，{storage(bits)}"


def storage_column(runs: pd.DataFrame) -> dict[str, list[str]]:
    """Of a table; none where nothing was rounded."""
    bits = bits_of(runs)
    return {"存储": [storage(one) for one in bits]} if bits.notna().any() else {}


def of_one_storage(runs: pd.DataFrame) -> pd.DataFrame:
    """For what has one place for a press at a ratio: the runs that keep numbers as they are, else those in most bits.
    The baseline is as it is."""
    bits, compressed = bits_of(runs), runs["press"] != "no_press"
    shown = _bits_shown(bits[compressed])
    same = bits.isna() if shown is None else bits == shown
    return runs[(compressed & same) | (~compressed & bits.isna())]


def _bits_shown(bits: pd.Series) -> float | None:
    return None if bits.isna().any() or bits.empty else bits.max()


def left_out_of_figures(runs: pd.DataFrame) -> list[str]:
    """A sentence where runs in several numbers of bits would lie on one line, as `of_one_storage` chooses."""
    bits = bits_of(runs)[runs["press"] != "no_press"]
    shown, several = _bits_shown(bits), sorted(bits.dropna().unique(), reverse=True)
    others = [storage(one) for one in several if one != shown]
    if not others:
        return []
    return [f"图里每种 press 只画一种存储：{storage(shown)}；{'、'.join(others)}的运行只在表里。"]
