"""What must be known of a press to use it honestly.

What it demands (eager, sdpa), when it acts and whether it may see a batch
follows from its classes, so it is known for presses that a user built without us, too.
"""

import logging
import sys
from collections.abc import Iterator

import kvpress
from kvpress import BasePress, ScorerPress

from kvneox_lib.neox.modeling import KVNeoXForCausalLM

for _module in [module for name, module in list(sys.modules.items()) if name.split(".")[0] == "kvpress"]:
    if KVNeoXForCausalLM not in getattr(_module, "SUPPORTED_MODELS", (KVNeoXForCausalLM,)):
        _module.SUPPORTED_MODELS += (KVNeoXForCausalLM,)  # else kvpress warns "not tested" at every call

_said: set[str] = set()


def _worth_saying(record: logging.LogRecord) -> bool:
    """kvpress warns at every construction: let each warning through once, and those that are moot here never."""
    message = record.getMessage()
    moot = "not tested" in message or "only works with flash attention" in message  # tested, and masks are per layer
    new = message not in _said
    _said.add(message)
    return new and not moot


for _press in ("kvcompose_press", "kvzip_press", "kvgrad_press", "per_layer_compression_press"):
    logging.getLogger(f"kvpress.presses.{_press}").addFilter(_worth_saying)

# -- what follows from the classes of a press ---------------------------------------------------------------------

NEEDS_EAGER = (kvpress.ObservedAttentionPress,)
REFUSES_EAGER = (
    kvpress.AdaKVPress,
    kvpress.CriticalAdaKVPress,
    kvpress.ChunkPress,
    kvpress.ChunkKVPress,
    kvpress.BlockPress,
    kvpress.KVzipPress,
    kvpress.DuoAttentionPress,
)
ACTS_AT_EXIT = (kvpress.KVzipPress, kvpress.KVComposePress)
ACTS_WHILE_DECODING = (kvpress.DecodingPress, kvpress.PrefillDecodingPress)
# Scores or budgets that mix the rows of a batch, a batch of one by design, or draws that would differ with the batch.
MIXES_ROWS = (
    kvpress.ChunkKVPress,
    kvpress.CriticalAdaKVPress,
    kvpress.SimLayerKVPress,
    kvpress.NonCausalAttnPress,
    kvpress.LeverageScorePress,
    kvpress.CompactorPress,
    kvpress.RandomPress,
    kvpress.CAMPress,
    kvpress.KVzipPress,
    kvpress.KVComposePress,
    kvpress.FinchPress,
)


def parts_of(press: BasePress) -> Iterator[BasePress]:
    """The press and every press inside it."""
    yield press
    inner = [getattr(press, name, None) for name in ("press", "base_press", "prefilling_press", "decoding_press")]
    for part in inner + list(getattr(press, "presses", [])):
        if isinstance(part, BasePress):
            yield from parts_of(part)


def ratio_owner(press: BasePress) -> BasePress:
    """The part whose `compression_ratio` says how much of a context goes; the press itself where it hands it on."""
    if isinstance(press, kvpress.ComposedPress):
        return press.presses[0]
    return press.prefilling_press if isinstance(press, kvpress.PrefillDecodingPress) else press


def keep_tokens_of(press: BasePress | None) -> int | None:
    """How many entries each head keeps, however long the context is; None where a share of it is kept."""
    return getattr(press, "keep_tokens", None)


def kind_of(press: BasePress) -> type[BasePress]:
    """kvpress' class, where one with a budget in tokens stands in for it."""
    return getattr(type(press), "kind", type(press))


def _is(press: BasePress, classes: tuple[type, ...]) -> bool:
    return any(isinstance(part, classes) for part in parts_of(press))


def attention_needed(press: BasePress | None) -> str:
    """ "eager", "sdpa" (or a kernel like it), or "any"."""
    if press is None or not _is(press, NEEDS_EAGER + REFUSES_EAGER):
        return "any"
    return "eager" if _is(press, NEEDS_EAGER) else "sdpa"


def acts(press: BasePress | None) -> str:
    """When the cache is compressed: in a "hook" of the prefill, at the "exit" of the context, while "decoding"."""
    if press is None:
        return "never"
    if _is(press, ACTS_WHILE_DECODING) or any(getattr(part, "decoding", False) is True for part in parts_of(press)):
        return "decoding"
    return "exit" if _is(press, ACTS_AT_EXIT) else "hook"


def decoding_part(press: BasePress | None) -> BasePress | None:
    """What must stay applied while decoding: the press, if it acts then."""
    return press if acts(press) == "decoding" else None


def calibration_seconds(press: BasePress | None) -> float | None:
    """How long a used press measured its model before the first context, if it does so."""
    parts = () if press is None else parts_of(press)
    return next((part.calibration_s for part in parts if hasattr(part, "calibration_s")), None)


def rows_independent(press: BasePress | None) -> bool:
    """Whether a row of a batch is compressed as it would be alone; if not, rows must be run one by one."""
    return press is None or not _is(press, MIXES_ROWS)


def rerotates(press: BasePress | None) -> bool:
    """Whether kept keys are rotated to consecutive positions, so that positions go on from the compressed length."""
    return press is not None and any(
        isinstance(part, kvpress.KeyRerotationPress) or getattr(part, "rerotate_keys", False) is True
        for part in parts_of(press)
    )


# What is never scored in a prefill, by the options that say how much; kvpress fails where nothing else is left.
NOT_SCORED = {
    kvpress.SnapKVPress: ("window_size",),
    kvpress.StreamingLLMPress: ("n_sink",),
    kvpress.ExpectedAttentionPress: ("n_sink",),
    kvpress.CapPress: ("n_sink",),
    kvpress.CompactorPress: ("sink_size_start", "sink_size_end"),
    kvpress.TOVAPress: (),  # the last token
}
FINCH_WINDOW = 64  # tokens at the end of a context, which FINCH takes for the question


def not_scored(press: BasePress | None, n_tokens: int | None = None) -> tuple[str, int]:
    """What a context must be longer than: "window_size=64 of SnapKVPress", 64; ("", 0) where any length will do. One of
    `n_tokens` is not scored at all where a budget holds it."""
    if press is None or isinstance(press, kvpress.DecodingPress):  # the latter sees the tokens decoded
        return "", 0
    if n_tokens is not None and n_tokens <= (keep_tokens_of(press) or 0):
        return "", 0
    if isinstance(press, kvpress.PrefillDecodingPress):
        return not_scored(press.prefilling_press)
    if isinstance(press, kvpress.FinchPress):
        return f"the {FINCH_WINDOW} tokens that FINCH takes for the question", FINCH_WINDOW
    # These score whatever the ratio of the press inside; others do not score at ratio 0
    always = isinstance(press, kvpress.DMSPress) or any(getattr(press, "compression_ratios", None) or [])
    found = [("", 0)]
    for part in parts_of(press):
        names = next((names for kind, names in NOT_SCORED.items() if isinstance(part, kind)), None)
        if names is not None and (always or part.compression_ratio > 0):
            said = " + ".join(f"{name}={getattr(part, name)}" for name in names) or "the last token"
            total = sum(getattr(part, name) for name in names) if names else 1
            found.append((f"{said} of {type(part).__name__}", total))
    return max(found, key=lambda option: option[1])


# -- contexts that are read in chunks ---------------------------------------------------------------------------------

# What their context managers do to a prefill is known: reset, look for FINCH's window, note what KVzip is to replay.
KNOWN_AROUND_A_PASS = (
    kvpress.DecodingPress,
    kvpress.PrefillDecodingPress,
    kvpress.FinchPress,
    kvpress.KVzipPress,
)
# How many of the last hidden states a score reads besides keys and values, or the option that says so. Those that are
# not named read more. Expected attention with statistics asks how many there are, not what they are.
READS_LAST = {
    kvpress.RandomPress: 0,
    kvpress.KnormPress: 0,
    kvpress.KeyDiffPress: 0,
    kvpress.StreamingLLMPress: 0,
    kvpress.LagKVPress: 0,
    kvpress.CURPress: 0,
    kvpress.QFilterPress: 0,
    kvpress.ExpectedAttentionStatsPress: 0,
    kvpress.CriticalKVPress: 0,  # what the press inside reads
    kvpress.TOVAPress: 1,
    kvpress.SnapKVPress: "window_size",
}


def needs_whole_pass(press: BasePress | None) -> str | None:
    """Why a context cannot be read in chunks under `press`; None if it can."""
    if press is None:
        return None
    if _is(press, NEEDS_EAGER):
        return "it reads the attention weights of all queries of the context"
    if _is(press, (kvpress.KVComposePress,)):
        return "it replays the whole context in a pass of its own"
    if type(press).__call__ is not BasePress.__call__ and not isinstance(press, KNOWN_AROUND_A_PASS):
        return "it surrounds the pass with work of its own"
    return None


def last_states_read(press: BasePress) -> int | None:
    """How many of the last hidden states the scores of `press` are made from; None: more than those."""
    most = 0
    for part in parts_of(press):
        reads = next((reads for kind, reads in READS_LAST.items() if isinstance(part, kind)), None)
        if reads is None:
            return None
        most = max(most, getattr(part, reads) if isinstance(reads, str) else reads)
    return most


def evicts_only_at_the_end(press: BasePress) -> str | None:
    """Why `press` cannot evict while the context is still being read; None if it can."""
    for part in parts_of(press):
        keeps_the_best = (
            isinstance(part, ScorerPress)
            and type(part).compress is ScorerPress.compress
            and kind_of(part).forward_hook is BasePress.forward_hook
        )
        if not keeps_the_best:
            return f"{type(part).__name__} does more than keep the best-scored entries of each head"
    if last_states_read(press) is None:
        return "it scores by queries, keys or attention weights of the whole context"
    return None
