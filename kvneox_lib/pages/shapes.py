"""What follows from the shapes of models alone: the bytes of a decoding step, and the cache's share of them."""

import pandas as pd
from matplotlib.figure import Figure

from kvneox_lib.inputs.weights import PYTHIA
from kvneox_lib.pages import figures

MODELS = ("pythia-70m", "pythia-410m", "pythia-1.4b", "pythia-2.8b", "pythia-12b")
LENGTHS = (128, 256, 512, 1024, 2048)


def bytes_read(shape: tuple[int, int, int, int], tokens: int, batch: int = 1, itemsize: int = 2) -> tuple[int, int]:
    """What a decoding step reads of a Pythia of this shape (layers, hidden size, heads, vocabulary): bytes of weights,
    but for the input embedding, of which it looks up a row, and bytes of a cache of so many tokens."""
    layers, hidden, _, vocabulary = shape
    of_a_layer = 12 * hidden * hidden + 13 * hidden  # attention 4, MLP 8; biases 3 + 1 + 4 + 1, two norms 4
    weights = layers * of_a_layer + 2 * hidden + vocabulary * hidden
    return weights * itemsize, 2 * layers * hidden * tokens * batch * itemsize


def cache_shares(batch: int) -> pd.DataFrame:
    """The share of the cache in what a step reads, by model and length; a model stands where figures have a press."""
    rows = []
    for name in MODELS:
        for tokens in LENGTHS:
            weights, cache = bytes_read(PYTHIA[name], tokens, batch)
            rows.append({"press": name, "tokens": tokens, "share": cache / (weights + cache)})
    return pd.DataFrame(rows)


def share_lines(*batches: int) -> Figure:
    return figures.press_line_panels(
        {f"批 {batch}": cache_shares(batch) for batch in batches},
        "tokens",
        "share",
        xlabel="上下文长度（词元）",
        ylabel="缓存所占的比例",
        log_x=True,
    )


def where_it_pays(few: int, many: int) -> str:
    """At the trained length, alone and with many rows in a batch."""
    alone, together = (
        cache_shares(batch).query(f"tokens == {LENGTHS[-1]}").set_index("press")["share"] for batch in (few, many)
    )
    least, most = alone.idxmin(), alone.idxmax()
    return (
        f"在训练长度 {LENGTHS[-1]} 处、批为 {few} 时，这个比例最高的是 {most}（{alone[most]:.0%}），最低的是 "
        f"{least}（{alone[least]:.0%}）：把缓存压到四分之一，{most} 每步最多省 {0.75 * alone[most]:.0%} 的时间，"
        f"{least} 只有 {0.75 * alone[least]:.0%}。批为 {many} 时，{least} 的比例是 {together[least]:.0%}。"
        f"**收益来自长上下文和大批**；批为 {few}、上下文不超过训练长度时，{least} 这样的模型为了速度不值得压缩，"
        "为了内存才值得。"
    )
