"""One long text read in four ways, and what each costs: what notebook 04 runs.

`dense` keeps everything, `window` the last tokens, `sinks` the first few and the last, `recompute` computes the keys of
the last tokens anew for every token. The last three see equally many: n_sink + window tokens and the one being read.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from kvneox_lib.inputs.windows import first_tokens
from kvneox_lib.measures.clock import Clock
from kvneox_lib.measures.intervals import interval
from kvneox_lib.measures.perplexity import read_on, teacher_forced_nll
from kvneox_lib.measures.sinks import EARLIEST, sink_attention
from kvneox_lib.measures.streaming import StreamingDecoder, recomputed_nll, streaming_nll
from kvneox_lib.neox.cache import CompactCache
from kvneox_lib.neox.checks import check_int
from kvneox_lib.neox.modeling import KVNeoXForCausalLM
from kvneox_lib.studies import arguments as may_be
from kvneox_lib.studies.arguments import one_of, whole
from kvneox_lib.studies.plan import Planned, as_list
from kvneox_lib.studies.provenance import provenance
from kvneox_lib.studies.runs import Runs, Study, head_table

METHODS = ("dense", "window", "sinks", "recompute")
BLOCK = 256  # tokens, of which the running figures are means
SAMPLES_A_BLOCK = 8  # of those on which recomputation is scored
CHECKPOINTS, STEPS = 12, 16  # where a token's cost is measured, and over how many tokens
PROMPT, PIECE = 250, 250  # tokens: what a sample of text begins with, and how it is looked at
SHORTEST = 512  # text that shows anything
SINK_WINDOWS = 4  # pieces of the text in which attention to their first tokens is measured
Methods = Annotated[str | Sequence[str], one_of(*METHODS, several=True)]
Sinks = Annotated[int | Sequence[int], whole(0, several=True, may_be_empty=True)]
Sizes = Annotated[int | Sequence[int], whole(1, several=True, may_be_empty=True)]
Tokens = Annotated[int, whole(SHORTEST)]


@dataclass(frozen=True)
class Reading:
    """One way of reading. A query of `window` and `sinks` sees n_sink first tokens, window last ones, and itself."""

    method: str
    n_sink: int
    window: int | None  # None: everything
    timed: bool = False  # and with a sample of text

    @property
    def size(self) -> int | None:
        return None if self.window is None else self.n_sink + self.window

    @classmethod
    def of(cls, run: Planned) -> "Reading":
        return cls(run.press, **run.settings)

    @property
    def planned(self) -> Planned:
        settings = {"n_sink": self.n_sink, "window": self.window} | ({"timed": True} if self.timed else {})
        return Planned(self.method, None, settings, is_press=False)


def plan(asked: dict, trained: int | None) -> list[Planned]:
    """Each way of reading, and of the ablation each number of sinks in each size."""
    readings = readings_of(asked)
    for reading in readings if trained is not None else ():
        if reading.size and reading.size >= trained and (asked["rerotate"] or reading.method == "recompute"):
            raise ValueError(
                f"n_sink + window, or ablation_sizes: {reading.size}; allowed is below {trained}, on which the model "
                "was trained"
            )
    return [reading.planned for reading in readings]


def measure_streaming(
    *,
    model: may_be.Model = "pythia-70m",
    revision: may_be.Revision | None = None,
    weights: may_be.QualityWeights = "auto",
    dataset: may_be.Dataset = "pg19",
    subset: may_be.Subset | None = "wikitext-103-v1",
    split: may_be.Split = "test",
    sample_idx: may_be.Index | None = 0,
    data_dir: may_be.Folder | None = None,
    methods: Methods = METHODS,
    n_sink: may_be.Index = 4,
    window: may_be.Count = 1020,
    rerotate: may_be.YesOrNo = True,
    max_tokens: Tokens | None = 12288,
    dense_limit: Tokens = 8192,
    recompute_samples: may_be.Count = 256,
    ablation_sinks: Sinks = (0, 1, 2, 4, 8),
    ablation_sizes: Sizes = (128, 256, 512, 1024),
    sample_tokens: may_be.Index = 2000,
    attn_implementation: may_be.Attention = "auto",
    dtype: may_be.Dtype = "auto",
    device: may_be.Device = "auto",
    seed: may_be.Index = 0,
    output_dir: may_be.OutputDir = "results/streaming",
    overwrite: may_be.Overwrite = False,
) -> Study:
    """nll along the first `max_tokens` of one document (None: all of it), time and bytes of a token, and a sample of
    generated text with and without sinks.

    dense stops at dense_limit tokens. recompute is scored at `recompute_samples` evenly spread tokens, and so are, for
    comparison, the others. The ablation reads with every number of sinks in a cache of every size. Beside the run with
    sinks stands how much attention the first tokens draw, by layer and head.
    """
    runs = Runs(measure_streaming, plan, locals())
    runs.times_on_this_machine()
    lm, ids = runs.loaded.model, _first_tokens(runs, max_tokens)
    runs.turned_out["max_tokens"] = ids.shape[1]
    sampled = _spread(ids.shape[1] - 1, recompute_samples)

    pending = [(run, Reading.of(run)) for run in runs.open()]
    timed = [reading for _, reading in pending if reading.timed]
    costs = _costs(lm, ids, timed, rerotate, dense_limit) if timed else None
    for run, reading in tqdm(pending, unit="种", desc="流式"):
        started, clock = provenance(runs.device), time.perf_counter()
        positions, nll = _read_all(lm, ids, reading, rerotate, dense_limit, sampled)
        figures = _figures(nll, positions, lm, reading)
        may_draw = min(lm.config.max_position_embeddings, ids.shape[1]) > max(EARLIEST, reading.n_sink)
        at = np.isin(positions, sampled)
        tables = {"samples": pd.DataFrame({"position": positions[at], "nll": nll[at]})}
        tables["running"] = _running(nll, positions, BLOCK if reading.method != "recompute" else SAMPLES_A_BLOCK)
        if reading.timed:
            tables["cost"] = cost = costs[costs["method"] == reading.method].drop(columns="method")
            figures |= {name: cost[name].iloc[-1] for name in ("step_s", "kv_bytes")}
        if reading.timed and reading.method in ("window", "sinks") and sample_tokens:
            torch.manual_seed(seed)
            tables["sample"] = _sample(runs.loaded, ids[:, :PROMPT], reading, rerotate, sample_tokens)
        if reading.timed and reading.method == "sinks" and reading.n_sink and may_draw:
            tables["sinks"], found = _sinks(lm, ids, reading.n_sink)
            figures |= found
        figures["run_s"] = time.perf_counter() - clock
        n_read = int(positions[-1]) + 1
        runs.write(run, n_read, started, figures, tables)
    return runs.study()


def readings_of(asked: dict) -> list[Reading]:
    """What a call with these parameters reads, and how; each reading is a record."""
    methods, n_sink, window = as_list(asked["methods"]), asked["n_sink"], asked["window"]
    sinks, sizes = as_list(asked["ablation_sinks"]), as_list(asked["ablation_sizes"])
    size = n_sink + window
    main = {
        "dense": Reading("dense", 0, None, timed=True),
        "window": Reading("window", 0, size, timed=True),
        "sinks": Reading("sinks", n_sink, window, timed=True),
        "recompute": Reading("recompute", 0, size, timed=True),
    }
    if n_sink == 0 and "window" in methods:
        main["sinks"] = main["window"]  # the same
    readings = list(dict.fromkeys(main[name] for name in methods))
    known = {(reading.n_sink, reading.window) for reading in readings if reading.method in ("window", "sinks")}
    for total in sizes:
        for first in sinks:
            check_int("ablation_sizes", total, first + 1)
            if (first, total - first) not in known:
                readings.append(Reading("sinks" if first else "window", first, total - first))
                known.add((first, total - first))
    return readings


def _first_tokens(runs: Runs, max_tokens: int | None) -> torch.Tensor:
    if len(runs.text.documents) != 1:
        raise ValueError(f"sample_idx={runs.asked['sample_idx']!r}: one document is read; give the number of one")
    ids = first_tokens(runs.text.documents[0], runs.loaded.tokenizer, max_tokens)
    if len(ids) < (max_tokens or SHORTEST):
        wanted = max_tokens or f"at least {SHORTEST}"
        raise ValueError(f"max_tokens={max_tokens}: {runs.text.titles[0]} has {len(ids)} tokens; wanted are {wanted}")
    return torch.from_numpy(ids.astype(np.int64))[None].to(runs.device)


def _spread(n_queries: int, n: int) -> np.ndarray:
    """At most `n` of the queries, evenly: the same for all readings of a text."""
    return np.unique(np.linspace(0, n_queries - 1, n).round().astype(int))


def _read_all(lm, ids, reading: Reading, rerotate: bool, dense_limit: int, sampled) -> tuple[np.ndarray, np.ndarray]:
    """The positions of queries, and the nll of the token after each."""
    if reading.method == "recompute":
        nll = recomputed_nll(lm, ids, window=reading.window, positions=torch.from_numpy(sampled))
        return sampled, nll[0].double().cpu().numpy()
    if reading.method == "dense":
        nll = read_on(lm, CompactCache(headroom=dense_limit), ids[:, :dense_limit], 0, None)[0]
    else:
        nll = streaming_nll(lm, ids, n_sink=reading.n_sink, window=reading.window, rerotate=rerotate)
    return np.arange(nll.shape[1]), nll[0].double().cpu().numpy()


def _running(nll: np.ndarray, positions: np.ndarray, size: int) -> pd.DataFrame:
    """By block of `size` scored tokens, the last and shorter one left out: its mean, and `ppl_so_far`."""
    n = len(nll) // size * size
    blocks, ends = nll[:n].reshape(-1, size), positions[:n].reshape(-1, size)
    table = pd.DataFrame({"from_token": ends[:, 0] + 1, "to_token": ends[:, -1] + 1, "nll_mean": blocks.mean(1)})
    return table.assign(ppl_so_far=np.exp(table["nll_mean"].expanding().mean()))


def _figures(nll: np.ndarray, positions: np.ndarray, lm: KVNeoXForCausalLM, reading: Reading) -> dict:
    """Of all tokens, and of those within and beyond the trained length; intervals over runs of pieces of 256 tokens,
    or of tokens where they lie apart; they speak of this text."""
    n_read, figures = int(positions[-1]) + 1, {"n_tokens": len(nll)}
    size = 1 if reading.method == "recompute" else BLOCK
    inside = positions < lm.config.max_position_embeddings
    for name, part in (("", nll), ("within_", nll[inside]), ("beyond_", nll[~inside])):
        blocks = np.array_split(part, max(1, len(part) // size)) if len(part) else []
        low, high = interval(np.array([b.sum() for b in blocks]), np.array([len(b) for b in blocks])).ends
        mean = part.mean() if len(part) else np.nan
        figures[f"{name}nll_mean"] = mean
        figures |= {f"{name}ppl{end}": np.exp(x) for end, x in (("", mean), ("_ci95_low", low), ("_ci95_high", high))}
    figures["kept_fraction"] = 1.0 if reading.size is None else min(1.0, (reading.size + 1) / n_read)
    return {name: float(x) if np.isfinite(x) else None for name, x in figures.items()} | {"n_tokens": len(nll)}


def _sinks(lm: KVNeoXForCausalLM, ids: torch.Tensor, n_sink: int) -> tuple[pd.DataFrame, dict]:
    """Attention to the first token and to the first `n_sink` of a few windows of the trained length, which lie one
    after the other in the text: by layer and head, and its means with what even attention would give."""
    length = min(lm.config.max_position_embeddings, ids.shape[1])
    windows = ids[0, : ids.shape[1] // length * length].view(-1, length)[:SINK_WINDOWS]
    found = sink_attention(lm, windows, n_first=n_sink, earliest=max(EARLIEST, n_sink))
    table = head_table(first=found.first.numpy(), several=found.several.numpy())
    means = {"attention_to_first": found.first.mean(), "attention_to_sinks": found.several.mean()}
    even = {"even_to_first": found.even_first, "even_to_sinks": found.even_several}
    return table, {**means, **even, "sink_windows": len(windows), "sink_window_tokens": length}


# ---- what a token costs ----


def _costs(lm: KVNeoXForCausalLM, ids: torch.Tensor, readings: list[Reading], rerotate: bool, dense_limit: int):
    """Seconds and bytes of a token after more and more tokens, the methods taking turns."""
    readers = {reading.method: _READERS[reading.method](lm, ids, reading, rerotate) for reading in readings}
    clock, rows, read, last = Clock(ids.device), [], 0, ids.shape[1] - STEPS - 1
    stops = [np.linspace(0, end, CHECKPOINTS + 1)[1:] for end in (last, min(last, dense_limit - STEPS))]
    for stop in sorted({int(stop) for part in stops for stop in part}):
        if stop <= read:
            continue
        taking_part = {name: reader for name, reader in readers.items() if name != "dense" or stop <= dense_limit}
        for reader in taking_part.values():
            reader.read(read, stop)
        spent = {name: [] for name in taking_part}
        for position in range(stop, stop + STEPS):
            for name, reader in taking_part.items():
                if name == "recompute" and position % 4:  # a whole window each
                    continue
                clock.lap()
                reader.step(position)
                spent[name].append(clock.lap())
        for name, reader in taking_part.items():
            low, middle, high = np.percentile(spent[name], [25, 50, 75])
            row = {"method": name, "tokens_read": stop, "step_s": middle, "step_s_q25": low, "step_s_q75": high}
            rows.append(row | {"kv_bytes": reader.kv_bytes})
        read = stop + STEPS
    return pd.DataFrame(rows)


class _Dense:
    def __init__(self, lm, ids, reading, rerotate):
        self.lm, self.ids, self.cache = lm, ids, CompactCache()

    def read(self, start: int, stop: int) -> None:
        read_on(self.lm, self.cache, self.ids[:, start : stop + 1], start, None)

    @torch.no_grad()
    def step(self, position: int) -> None:
        positions = torch.tensor([[position]], device=self.ids.device)
        self.lm(self.ids[:, position : position + 1], past_key_values=self.cache, position_ids=positions)

    @property
    def kv_bytes(self) -> int:
        """Of the entries held; head-room beside them is a choice."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)


class _Streaming:
    def __init__(self, lm, ids, reading, rerotate):
        self.lm, self.ids, self.decoder = lm, ids, StreamingDecoder(reading.n_sink, reading.window, rerotate)

    def read(self, start: int, stop: int) -> None:
        self.decoder.read(self.lm, self.ids[:, start:stop])

    def step(self, position: int) -> None:
        self.decoder.read(self.lm, self.ids[:, position : position + 1])

    @property
    def kv_bytes(self) -> int:
        return self.decoder.kv_bytes


class _Recompute:
    def __init__(self, lm, ids, reading, rerotate):
        self.lm, self.ids, self.window = lm, ids, reading.window

    def read(self, start: int, stop: int) -> None:
        """Nothing is kept."""

    @torch.no_grad()
    def step(self, position: int) -> None:
        seen = self.ids[:, max(0, position - self.window) : position + 1]
        self.lm(seen, use_cache=False, logits_to_keep=1)

    kv_bytes = 0


_READERS = {"dense": _Dense, "window": _Streaming, "sinks": _Streaming, "recompute": _Recompute}


# ---- a sample of text ----


def _sample(loaded, prompt: torch.Tensor, reading: Reading, rerotate: bool, n_tokens: int) -> pd.DataFrame:
    """Text drawn at temperature 1 after `prompt`, in pieces. A piece is judged by the model reading it afresh after the
    piece before it, all within the trained length: nll_mean; and by the share of its runs of four tokens that are new.
    """
    decoder = StreamingDecoder(reading.n_sink, reading.window, rerotate)
    tokens = decoder.stream(loaded.model, prompt, max_new_tokens=n_tokens, stop_at_eos=False, temperature=1.0)
    text = torch.cat([prompt, torch.stack(list(tokens), dim=1)], dim=1)
    rows = []
    for start in range(PROMPT, text.shape[1], PIECE):
        piece = text[0, start : start + PIECE].tolist()
        nll = teacher_forced_nll(loaded.model, text[:, start - PIECE : start + PIECE])[:, PIECE - 1 :]
        runs = [tuple(piece[i : i + 4]) for i in range(len(piece) - 3)]
        row = {"from_token": start + 1, "text": loaded.tokenizer.decode(piece), "nll_mean": float(nll.mean())}
        rows.append(row | {"distinct_4grams": len(set(runs)) / max(1, len(runs))})
    return pd.DataFrame(rows)
