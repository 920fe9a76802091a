"""The table of presses: one row each, from which `make_press` builds and README and report print.

A row lists kvpress classes from the outside in, `(AdaKVPress, SnapKVPress)` for adakv_snapkv, and those defaults of ours
that make it act on contexts of a thousand tokens, which kvpress' own don't always. To add a press, add a row.
"""

import inspect
import math
from contextlib import contextmanager
from dataclasses import dataclass, field

import kvpress as K
from kvpress import BasePress

from kvneox_lib.presses.applying import left_as_found
from kvneox_lib.presses.calibration import CalibratedDuoAttention, CalibratedExpectedAttention, CalibratedQFilter
from kvneox_lib.presses.copying import CopyingHeadsPress


class TidyKVCompose(K.KVComposePress):
    """KVCompose that says what went wrong. kvpress' goes on to compress what was never read, hides the true error behind
    one of its own, and leaves the model on eager attention."""

    @contextmanager
    def __call__(self, model):
        with left_as_found(super().__call__(model), model):
            yield


class ScaledKVgrad(K.KVgradPress):
    """KVgrad that can be used in float16, where its gradients and scores overflow and what it keeps is left to chance.

    Gradients are those of an objective in another unit, a power of four, so that dividing and multiplying by it are
    exact; scores are kept in float32 and in kvpress' unit, as those of several chunks are compared.
    """

    def prepare(self, model, tokenizer, *args):
        chunks = super().prepare(model, tokenizer, *args)
        self.score_val = self.score_val.float()
        return chunks

    def _register_gradient_hooks(self, model, cache, captures):
        def change_unit(module, args, output):
            hidden = captures["hidden_states"].float()
            largest = float(hidden.detach().abs().max())
            captures["unit"] = 4.0 ** math.ceil(math.log(largest, 4)) if 0 < largest < math.inf else 1.0
            captures["hidden_states"] = hidden / captures["unit"] ** 0.5

        hooks = super()._register_gradient_hooks(model, cache, captures)
        return [*hooks, model.model.layers[-1].register_forward_hook(change_unit)]

    def _update_scores(self, model, cache, layer_idx, captures):
        captures["attn_weights"][layer_idx] = captures["attn_weights"][layer_idx].float()
        super()._update_scores(model, cache, layer_idx, captures)
        scores = self.score_val[layer_idx][..., self.start_idx : self.end_idx]
        scores *= captures["unit"]
        if not scores.isfinite().all():
            raise ValueError(
                f"dtype={str(model.dtype).removeprefix('torch.')!r}: KVgrad's gradients through this model overflow. Load "
                "it with dtype='bfloat16' or 'float32'"
            )


class UnstructuredKVCompose(TidyKVCompose):
    """KVCompose that evicts per head. kvpress scores by replaying the context, and leaves the replay in the cache."""

    def compress_unstructured(self, model):
        super().compress_unstructured(model)
        for layer in self.cache.layers:
            layer.keys = layer.keys[:, :, : self.context_len]
            layer.values = layer.values[:, :, : self.context_len]


@dataclass
class RandomRecentPress(K.RandomPress):
    """The most recent entries and a random choice of the others: the window that SnapKV always keeps, without its
    scores. What a press with such a window gains over `random` may be the window's; beside this one it is not."""

    window_size: int = 64

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        scores = super().score(module, hidden_states, keys, values, attentions, kwargs)
        scores[..., -self.window_size :] = 1.0  # above every draw
        return scores


class EvenChunkPress(K.ChunkPress):
    """ChunkPress with chunks of nearly equal length, as near to what is asked for as that allows.

    kvpress' last chunk is whatever remains, often too short for the observation window of the press inside.
    """

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        asked, length = self.chunk_length, keys.shape[2]
        self.chunk_length = -(-length // max(1, round(length / asked)))
        try:
            return super().compress(module, hidden_states, keys, values, attentions, kwargs)
        finally:
            self.chunk_length = asked


@dataclass(frozen=True)
class PressRow:
    name: str
    parts: tuple[type[BasePress], ...]  # from the outside in
    paper: str
    about: str  # one line in Chinese, for the tables of README and report
    defaults: dict = field(default_factory=dict)
    core: bool = False
    strength: str = "compression_ratio"  # the option that says how much goes; the ratio sets it, unless it has its own

    @property
    def takes_ratio(self) -> bool:
        return self.strength in ("compression_ratio", "target_compression_ratio")

    def build(self, compression_ratio=0.5, **options) -> BasePress | None:
        wanted = self._distribute({**self.defaults, **options})
        if not self.parts:
            return None
        if self.takes_ratio:
            owner = 0 if self.strength == "target_compression_ratio" else self._ratio_owner()
            wanted[owner][self.strength] = compression_ratio
        return _nest(self.parts, wanted)

    def _ratio_owner(self) -> int:
        return next(i for i, part in enumerate(self.parts) if "compression_ratio" in _options(part))

    def _distribute(self, options: dict) -> list[dict]:
        """Give each option to the outermost class that has a field of that name."""
        wanted = [{} for _ in self.parts]
        set_by_ratio = ("compression_ratio", "target_compression_ratio")
        for name, value in options.items():
            owner = next((i for i, part in enumerate(self.parts) if name in _options(part)), None)
            if owner is None or name in set_by_ratio:
                allowed = sorted({name for part in self.parts for name in _options(part)}.difference(set_by_ratio))
                raise ValueError(f"{self.name} has no option {name}={value!r}; allowed: {', '.join(allowed) or 'none'}")
            _check_option(name, value, _options(self.parts[owner])[name])
            wanted[owner][name] = value
        return wanted


_INNER = {"self", "press", "base_press", "presses", "prefilling_press", "decoding_press"}


def _options(press_class: type[BasePress]) -> dict[str, object]:
    """Option to its default value."""
    parameters = inspect.signature(press_class.__init__).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name not in _INNER}


def _check_option(name: str, value, default) -> None:
    """kvpress checks few of its options; a window of 0 or a ratio of 2 would silently mean something else."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    number = isinstance(value, float) or whole
    if name.endswith("_ratio"):
        fits, allowed = number and 0 <= value <= 1, "a number from 0 to 1"
    elif isinstance(default, bool):
        fits, allowed = isinstance(value, bool), "True or False"
    elif isinstance(default, int):
        least = 0 if "sink" in name or name in ("n_initial", "hidden_states_buffer_size") else 1
        fits, allowed = whole and value >= least, f"a whole number of at least {least}"
    elif isinstance(default, float):
        fits, allowed = number, "a number"
    else:
        return
    if not fits:
        raise ValueError(f"{name}={value!r}; allowed is {allowed}")


def _nest(parts: tuple[type[BasePress], ...], options: list[dict]) -> BasePress:
    outer, *rest = parts
    if not rest:
        return outer(**options[0])
    if outer in (K.ComposedPress, CopyingHeadsPress):
        return outer([part(**own) for part, own in zip(rest, options[1:])], **options[0])
    if outer is K.PrefillDecodingPress:
        prefilling, decoding, scorer = rest
        return outer(prefilling(**options[1]), decoding(base_press=scorer(**options[3]), **options[2]))
    inner = _nest(tuple(rest), options[1:])
    return outer(**{"base_press" if issubclass(outer, K.DecodingPress) else "press": inner}, **options[0])


_DECODING = {"compression_interval": 32, "target_size": 512}
_PYRAMID = {"window_size": 8, "beta": 10}  # with 64 and 20 short contexts fall back to snapkv
# LagKV ranks entries within each lag, so that entries of the same rank tie; and it keeps the sinks and the last lag (up
# to two) whatever the scores. With kvpress' 128 the latter are all that is kept of 1,024 tokens at 0.75, and more than
# that from 0.9 on. A cut is by rank if it keeps more than n_sink + 2 * lag_size, and by little but rank if it keeps
# several of each lag, so of 1,024 tokens: up to 0.9 with 32. None does at 0.99, which keeps 10: they would have to be
# more than one of each lag, of lags shorter than 6. See `measures.degenerate`, which finds that cell.
_LAG = {"lag_size": 32}
RATIO_PER_LAYER = "compression_ratios"

ROWS = [
    PressRow("no_press", (), "", "不压缩，作为基线"),
    PressRow("random", (K.RandomPress,), "", "随机淘汰，作为对照", core=True),
    PressRow("random_recent", (RandomRecentPress,), "", "最近 64 个词元之外随机淘汰，作为对照"),
    PressRow("knorm", (K.KnormPress,), "arXiv:2406.11430", "保留键向量范数小的位置", core=True),
    PressRow("streaming_llm", (K.StreamingLLMPress,), "arXiv:2309.17453", "保留开头的注意力汇聚点和最近的窗口", core=True),
    PressRow("tova", (K.TOVAPress,), "arXiv:2401.06104", "按最后一个查询的注意力（各头平均）打分", core=True),
    PressRow("snapkv", (K.SnapKVPress,), "arXiv:2404.14469", "按末尾 64 个词元（观察窗口，自身优先留下）的注意力打分并池化", core=True),
    PressRow("pyramidkv", (K.PyramidKVPress,), "arXiv:2406.02069", "SnapKV 打分，观察窗口 8 个词元，低层多留、高层少留", _PYRAMID, core=True),
    PressRow("expected_attention", (K.ExpectedAttentionPress,), "arXiv:2510.00636", "按未来查询的期望注意力打分", core=True),
    PressRow("keydiff", (K.KeyDiffPress,), "arXiv:2504.15364", "保留与平均键方向差异大的位置（一次选定；论文逐块淘汰，见 block_keydiff）", core=True),
    PressRow("lagkv", (K.LagKVPress,), "arXiv:2504.04704", "以后一段（32 个词元）为参照，按键值的相对离散度在段内排名", _LAG, core=True),
    PressRow("chunkkv_snapkv", (K.ChunkKVPress, K.SnapKVPress), "arXiv:2502.00299", "以 20 个词元的小块为单位取舍，块数向下取整（SnapKV 打分）", core=True),
    PressRow("adakv_snapkv", (K.AdaKVPress, K.SnapKVPress), "arXiv:2407.11550", "预算在各头之间自适应分配（SnapKV 打分）", core=True),
    PressRow("criticalkv_snapkv", (K.CriticalKVPress, K.SnapKVPress), "arXiv:2502.03805", "打分再乘以值经输出投影后的范数", core=True),
    PressRow("observed_attention", (K.ObservedAttentionPress,), "arXiv:2306.14048", "按全部查询的平均注意力打分，需 eager（与 H2O 相近，但一次选定，也不另留近窗）"),
    PressRow("non_causal_attention", (K.NonCausalAttnPress,), "arXiv:2507.08143", "分块的非因果注意力打分"),
    PressRow("leverage", (K.LeverageScorePress,), "arXiv:2507.08143", "按键矩阵的近似杠杆分数打分（随机投影）"),
    PressRow("compactor", (K.CompactorPress,), "arXiv:2507.08143", "杠杆分数与非因果注意力之和"),
    PressRow("cur", (K.CURPress,), "arXiv:2509.15038", "按键与值的局部能量近似 CUR 分解"),
    PressRow("cap", (K.CapPress,), "arXiv:2604.25975", "按值向量对信息容量的贡献打分"),
    PressRow("qfilter", (CalibratedQFilter,), "arXiv:2503.02812", "按键在查询主方向上的投影打分（统计量由本库算出）"),
    PressRow("expected_attention_stats", (CalibratedExpectedAttention,), "arXiv:2510.00636", "期望注意力，查询统计量离线算出"),
    PressRow("duo_attention", (CalibratedDuoAttention,), "arXiv:2410.10819", "流式头只留汇聚点与近窗，检索头全留", {"head_compression_ratio": 0.5}, strength="head_compression_ratio"),
    PressRow("copying_heads", (CopyingHeadsPress, K.KeyDiffPress, K.SnapKVPress), "", "抄写的头先分预算（KeyDiff 打分），其余的头只留一点（SnapKV 打分）", {"window_size": 32}),
    PressRow("think", (K.ThinKPress,), "arXiv:2407.21018", "裁剪键的通道而非位置（置零，不省内存）", {"key_channel_compression_ratio": 0.5}, strength="key_channel_compression_ratio"),
    PressRow("simlayerkv", (K.SimLayerKVPress,), "arXiv:2410.13846", "“懒惰”的层只留开头与最近", {"lazy_threshold": 0.5, "n_recent": 256}, strength="lazy_threshold"),
    PressRow("finch", (K.FinchPress,), "arXiv:2408.00167", "按上下文之后的问题打分，键重新旋转到连续位置"),
    PressRow("kvzip", (K.KVzipPress,), "arXiv:2505.23416", "让模型复述上下文，按复述时的注意力打分"),
    PressRow("kvgrad", (ScaledKVgrad,), "openreview:cg1wTCJjjk", "KVzip 打分，再以梯度衡量影响"),
    PressRow("kvcompose", (TidyKVCompose,), "arXiv:2509.05165", "各头各自排序后拼成复合条目，各层长度不同"),
    PressRow("kvcompose_unstructured", (UnstructuredKVCompose,), "arXiv:2509.05165", "同上，但逐头淘汰", {"structured": False}),
    PressRow("adakv_expected_attention", (K.AdaKVPress, K.ExpectedAttentionPress), "arXiv:2407.11550", "逐头预算（期望注意力打分）"),
    PressRow("criticalkv_expected_attention", (K.CriticalKVPress, K.ExpectedAttentionPress), "arXiv:2502.03805", "期望注意力乘以输出投影范数", {"use_vnorm": False}),
    PressRow("critical_adakv_snapkv", (K.CriticalAdaKVPress, K.SnapKVPress), "arXiv:2502.03805", "CriticalKV 加逐头预算（SnapKV 打分）"),
    PressRow("critical_adakv_expected_attention", (K.CriticalAdaKVPress, K.ExpectedAttentionPress), "arXiv:2502.03805", "CriticalKV 加逐头预算（期望注意力打分）", {"use_vnorm": False}),
    PressRow("chunk_snapkv", (EvenChunkPress, K.SnapKVPress), "arXiv:2408.00167", "每段上下文各按比例淘汰（SnapKV 打分）", {"chunk_length": 256}),
    PressRow("chunk_knorm", (EvenChunkPress, K.KnormPress), "arXiv:2408.00167", "每段上下文各按比例淘汰（键范数打分）", {"chunk_length": 256}),
    PressRow("entropy_chunkkv_snapkv", (K.EntropyGatedChunkKVPress, K.SnapKVPress), "arXiv:2502.00299", "ChunkKV，分数集中的块内再挑选"),
    PressRow("block_keydiff", (K.BlockPress, K.KeyDiffPress), "arXiv:2504.15364", "按块逐次淘汰，模拟分块预填充（KeyDiff）"),
    PressRow("block_knorm", (K.BlockPress, K.KnormPress), "arXiv:2504.15364", "按块逐次淘汰，模拟分块预填充（键范数）"),
    PressRow("key_rerotation_knorm", (K.KeyRerotationPress, K.KnormPress), "arXiv:2408.00167", "淘汰后把键旋转到连续位置（键范数）"),
    PressRow("key_rerotation_snapkv", (K.KeyRerotationPress, K.SnapKVPress), "arXiv:2408.00167", "淘汰后把键旋转到连续位置（SnapKV）"),
    PressRow("key_rerotation_streaming_llm", (K.KeyRerotationPress, K.StreamingLLMPress), "arXiv:2309.17453", "StreamingLLM，位置在缓存内重新编号"),
    PressRow("per_layer_snapkv", (K.PerLayerCompressionPress, K.SnapKVPress), "", "每层一个比例（列表；SnapKV 打分）", strength=RATIO_PER_LAYER),
    PressRow("per_layer_knorm", (K.PerLayerCompressionPress, K.KnormPress), "", "每层一个比例（列表；键范数打分）", strength=RATIO_PER_LAYER),
    PressRow("composed_snapkv_think", (K.ComposedPress, K.SnapKVPress, K.ThinKPress), "arXiv:2407.21018", "先淘汰位置，再裁剪键通道", {"key_channel_compression_ratio": 0.5}),
    PressRow("merging_snapkv", (K.MergingPress, K.SnapKVPress), "arXiv:2406.13035", "被淘汰的值并入最相近的幸存者（SnapKV）"),
    PressRow("merging_knorm", (K.MergingPress, K.KnormPress), "arXiv:2406.13035", "被淘汰的值并入最相近的幸存者（键范数）"),
    PressRow("decoding_knorm", (K.DecodingPress, K.KnormPress), "", "解码中每隔若干步压到定长（键范数）", _DECODING, strength="target_size"),
    PressRow("decoding_streaming_llm", (K.DecodingPress, K.StreamingLLMPress), "arXiv:2309.17453", "解码中每隔若干步压到定长（StreamingLLM）", _DECODING, strength="target_size"),
    PressRow("decoding_snapkv", (K.DecodingPress, K.SnapKVPress), "arXiv:2404.14469", "解码中每隔若干步压到定长（SnapKV）", {**_DECODING, "window_size": 16}, strength="target_size"),
    PressRow("ratio_decoding_knorm", (K.CompressionRatioDecodingPress, K.KnormPress), "", "解码中按已读长度的比例压缩（键范数）", {"compression_interval": 32}, strength="target_compression_ratio"),
    PressRow("prefill_decoding_knorm", (K.PrefillDecodingPress, K.KnormPress, K.DecodingPress, K.KnormPress), "", "预填充按比例、解码按定长压缩（键范数）", {**_DECODING, "target_size": 256}),
    PressRow("prefill_decoding_snapkv_knorm", (K.PrefillDecodingPress, K.SnapKVPress, K.DecodingPress, K.KnormPress), "arXiv:2404.14469", "预填充用 SnapKV，解码用键范数", {**_DECODING, "target_size": 256}),
    PressRow("dms_leverage", (K.DMSPress, K.LeverageScorePress), "arXiv:2506.05345", "滑窗之外低于阈值者逐头淘汰（标准化杠杆分数代替 DMS 训练的淘汰器）", {"threshold": 0.0}, strength="threshold"),
    PressRow("cam_streaming_llm", (K.CAMPress, K.StreamingLLMPress), "openreview:LCTmppB165", "解码中淘汰前把值并入其后的邻居", _DECODING, strength="target_size"),
]  # fmt: skip
REGISTRY = {row.name: row for row in ROWS}

_TRAINED = "needs trained {} that exist for {} only, none of them a GPT-NeoX; nothing here can compute them"
UNAVAILABLE = {
    "kvzap": _TRAINED.format("surrogate weights (nvidia/KVzap-*)", "Llama-3.1 and Qwen3"),
    "fastkvzip": _TRAINED.format("gates (Jang-Hyun/Fast-KVzip)", "Qwen and Gemma"),
    "restorekv": _TRAINED.format("restore tokens and adapters (higokri/RestoreKV-*)", "Llama and Qwen"),
    "lukv": _TRAINED.format("budget curves", "Llama and Qwen"),
}
