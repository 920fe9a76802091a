"""Statistics of a model's queries, for the three presses that want them and find none published for Pythia.

One pass over a calibration text gives what Q-Filter, expected attention with statistics and DuoAttention need. The text
is the docstrings of Python's standard library: every machine has it, and no study here is evaluated on it. Results are
kept in a cache folder, keyed by the weights; all are in the dimension order of the cache. Nothing goes online.
"""

import ast
import hashlib
import importlib.util
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import align_module_device
from kvpress import DuoAttentionPress, ExpectedAttentionStatsPress, QFilterPress
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from transformers import AutoTokenizer

from kvneox_lib.inputs.files import cache_folder, write_atomically
from kvneox_lib.neox.hooks import hooked, refuse_attached

DOCSTRINGS_OF = (
    "argparse asyncio.streams datetime decimal difflib inspect logging optparse subprocess tarfile turtle typing"
)
WINDOW, MAX_WINDOWS, N_SINK = 1024, 24, 4
DUO_SINK, DUO_RECENT, DUO_DISTANCE = 64, 256, 500
SHAPING = ("rope_parameters", "hidden_act", "use_parallel_residual", "layer_norm_eps", "max_position_embeddings")
SETTINGS = f"{DOCSTRINGS_OF} {WINDOW} {MAX_WINDOWS} {N_SINK} {DUO_DISTANCE}"


@dataclass(frozen=True)
class QueryStatistics:
    """L layers, H heads, D head dimensions; float32 on the CPU."""

    mean: torch.Tensor  # (L, H, D) of queries before rotation
    covariance: torch.Tensor  # (L, H, D, D) of the same
    direction: torch.Tensor  # (L, H, D) main direction of rotated queries, on the side of their mean
    reach: torch.Tensor  # (L, H) in [0, 1]: how far back the mean query looks, the retrieval score of DuoAttention
    seconds: float = math.nan  # that measuring them took


def query_statistics(model) -> QueryStatistics:
    """The statistics of `model`, computed once and then read from the cache folder."""

    def measure() -> dict[str, torch.Tensor]:
        found = vars(_measure(model, _calibration_windows(model)))
        return {name: value.contiguous() for name, value in found.items() if isinstance(value, torch.Tensor)}

    found = calibrated(model, "query-statistics", SETTINGS, measure)
    return QueryStatistics(**found.tensors, seconds=found.seconds)


@dataclass(frozen=True)
class Calibration:
    tensors: dict[str, torch.Tensor]
    seconds: float  # that measuring took, when it was done on this kind of device


def calibrated(model, what: str, settings: str, measure: Callable[[], dict[str, torch.Tensor]]) -> Calibration:
    """What `measure` finds out about `model`, done once for these weights and then read from the cache folder.

    settings: all that the result depends on besides the weights.
    """
    path = cache_folder() / f"{what}-{_fingerprint(model, f'{settings} {model.device.type}')}.safetensors"
    try:
        tensors = load_file(path)
        return Calibration(tensors, float(tensors.pop("seconds")))
    except (OSError, SafetensorError, KeyError):
        pass  # not there, or damaged
    refuse_attached(model)  # what is kept must be of the model alone
    clock = time.perf_counter()
    with torch.inference_mode(False), torch.no_grad():
        tensors = measure()
    seconds = time.perf_counter() - clock
    content = save({**tensors, "seconds": torch.tensor(seconds, dtype=torch.float64)})
    try:
        write_atomically(path, lambda file: file.write(content))
    except OSError as error:  # a cache that cannot be written costs time, not the run
        said = f"{what.replace('-', ' ')} are not cached: {error}; set KVNEOX_CACHE to a folder that can be written"
        warnings.warn(said, stacklevel=3)
    return Calibration(tensors, seconds)


def _fingerprint(model, settings: str = SETTINGS) -> str:
    """A name for this model: how it rotates and adds, a thousand values of every parameter, and the settings of the
    measurement."""
    digest = hashlib.sha256(f"{settings} {[getattr(model.config, name, None) for name in SHAPING]}".encode())
    for path, module in model.named_modules():
        with align_module_device(module):  # brings weights here that accelerate keeps elsewhere
            for name, parameter in module.named_parameters(prefix=path, recurse=False):
                step = max(1, parameter.numel() // 1024)
                digest.update(name.encode() + parameter.detach().flatten()[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _calibration_windows(model) -> list[torch.Tensor]:
    folder = model.config.name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model.config.name_or_path={folder!r} holds no tokenizer, and this press reads a calibration text. "
            "kvneox_lib.load_model sets it; for a model of your own point it at a local folder with a tokenizer."
        ) from error
    ids = tokenizer(standard_library_docstrings(), return_tensors="pt", verbose=False).input_ids
    return list(ids[:, : WINDOW * MAX_WINDOWS].split(WINDOW, dim=1))


@lru_cache
def standard_library_docstrings() -> str:
    texts = []
    for module in DOCSTRINGS_OF.split():
        source = Path(importlib.util.find_spec(module).origin).read_text(encoding="utf-8")
        documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts += [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    return "\n\n".join(text for text in texts if text)


def _measure(model, windows: list[torch.Tensor]) -> QueryStatistics:
    n_layers, n_heads = model.config.num_hidden_layers, model.config.num_attention_heads
    dim = model.config.head_dim
    plain_sum, rotated_sum, key_sum = (torch.zeros(n_layers, n_heads, dim, dtype=torch.float64) for _ in range(3))
    plain_square, rotated_square = (torch.zeros(n_layers, n_heads, dim, dim, dtype=torch.float64) for _ in range(2))
    count = 0

    def collect(module, args, kwargs, output):
        hidden = kwargs["hidden_states"][:, N_SINK:]  # the first tokens are outliers
        cos, sin = (x[0, N_SINK:].double().cpu() for x in kwargs["position_embeddings"])
        query, key = (
            project(hidden).unflatten(-1, (n_heads, dim))[0].transpose(0, 1).double().cpu()  # (heads, T, D)
            for project in (module.q_proj, module.k_proj)
        )
        rotated, layer = _rotate(query, cos, sin), module.layer_idx
        plain_sum[layer] += query.sum(1)
        key_sum[layer] += key.sum(1)
        rotated_sum[layer] += rotated.sum(1)
        plain_square[layer] += query.mT @ query
        rotated_square[layer] += rotated.mT @ rotated

    with hooked([layer.self_attn for layer in model.model.layers], collect):
        for window in windows:
            model.model(input_ids=window.to(model.device), use_cache=False)
            count += max(window.shape[1] - N_SINK, 0)

    mean = plain_sum / count
    covariance = plain_square / count - mean[..., :, None] * mean[..., None, :]
    direction = torch.linalg.eigh(rotated_square).eigenvectors[..., -1]
    direction = direction * torch.where((direction * rotated_sum).sum(-1, keepdim=True) < 0, -1, 1)
    reach = _reach(model, mean, key_sum / count)
    return QueryStatistics(mean.float(), covariance.float(), direction.float(), reach.float())


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _reach(model, mean_query: torch.Tensor, mean_key: torch.Tensor) -> torch.Tensor:
    """Let the mean query look back over mean keys: 1 if it attends to the farthest only, near 0 to the nearest only."""
    dtype = mean_query.dtype
    like = torch.zeros(1, device=model.device)
    positions = torch.arange(DUO_DISTANCE, device=model.device)[None]
    cos, sin = (x[0].to("cpu", dtype) for x in model.model.rotary_emb(like, positions))  # (distance, D)
    query = _rotate(mean_query[:, :, None], cos[-1:], sin[-1:])
    keys = _rotate(mean_key[:, :, None], cos, sin)
    attention = (query @ keys.mT / mean_query.shape[-1] ** 0.5).softmax(-1)[:, :, 0]
    return attention.cumsum(-1).mean(-1)


# -- the presses, taking their statistics from here instead of the hub ----------------------------------------------


@dataclass
class CalibratedQFilter(QFilterPress):
    """Q-Filter: a key is worth its projection on the main direction of the queries."""

    def post_init_from_model(self, model):
        statistics = query_statistics(model)
        self.calibration_s = statistics.seconds
        # QFilterPress scores a key by *minus* its product with the filter
        self.q_filters = -statistics.direction.to(model.device, model.dtype)


@dataclass
class CalibratedExpectedAttention(ExpectedAttentionStatsPress):
    """Expected attention with query statistics of the model instead of those of the context."""

    stats_folder: str | None = field(init=False, default=None)
    dataset_name: str = field(init=False, default="")
    num_samples: int = field(init=False, default=MAX_WINDOWS)
    sample_seq_len: int = field(init=False, default=WINDOW)

    def post_init_from_model(self, model):
        statistics = query_statistics(model)
        self.calibration_s = statistics.seconds
        self.mu = statistics.mean.to(model.device, model.dtype)
        self.cov = statistics.covariance.to(model.device, model.dtype)


@dataclass
class CalibratedDuoAttention(DuoAttentionPress):
    """DuoAttention: the heads that look back least keep only sinks and recent tokens."""

    on_the_fly_scoring: bool = field(init=False, default=True)

    def post_init_from_model(self, model):
        statistics = query_statistics(model)
        self.calibration_s, reach = statistics.seconds, statistics.reach.numpy()
        self.sink_size, self.recent_size = DUO_SINK, DUO_RECENT
        streaming = np.argsort(reach, axis=None)[: round(reach.size * self.head_compression_ratio)]
        mask = np.zeros(reach.size, dtype=bool)
        mask[streaming] = True
        self.streaming_mask = torch.from_numpy(mask.reshape(reach.shape)).to(model.device)
