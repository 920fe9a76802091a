"""Finding weights: on the hub or a mirror of it, in its cache, on disk, in the box, or made up.

One idea: every way ends in a local folder, which is loaded without any network. Whatever was asked for and whatever was
found, `LoadedModel.weights` says which values the model holds, so that no figure is ever told of other weights.
"""

import hashlib
import importlib.resources
import json
import os
import pickle
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import httpx
import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError
from transformers import AutoTokenizer, GPTNeoXConfig, PreTrainedTokenizerBase
from transformers.activations import ACT2FN
from transformers.initialization import no_init_weights

from kvneox_lib.inputs import hub
from kvneox_lib.inputs.files import digest_of_files
from kvneox_lib.neox.checks import check_choice, did_you_mean
from kvneox_lib.neox.modeling import KVNeoXForCausalLM

# Published dimensions: layers, hidden size, heads, vocabulary. All else is the same throughout the family.
PYTHIA = {
    "pythia-14m": (6, 128, 4, 50304),
    "pythia-31m": (6, 256, 8, 50304),
    "pythia-70m": (6, 512, 8, 50304),
    "pythia-160m": (12, 768, 12, 50304),
    "pythia-410m": (24, 1024, 16, 50304),
    "pythia-1b": (16, 2048, 8, 50304),
    "pythia-1.4b": (24, 2048, 16, 50304),
    "pythia-2.8b": (32, 2560, 32, 50304),
    "pythia-6.9b": (32, 4096, 32, 50432),
    "pythia-12b": (36, 5120, 40, 50688),
}
PYTHIA_NAMES = [*PYTHIA, *(f"{name}-deduped" for name in PYTHIA)]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ATTENTION = ("sdpa", "eager", "flash_attention_2")

SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
SHAPE += ("max_position_embeddings", "use_parallel_residual", "attention_bias", "rope_parameters")
SMALL_FILES = ["config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json"]


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with its tokenizer, and whose weights they truly are."""

    model: KVNeoXForCausalLM
    tokenizer: PreTrainedTokenizerBase
    name: str  # the alias, hub id or folder's name; "demo" after a fallback to it
    weights: str  # "pretrained", "bundled" or "random"
    source: str  # repo@commit, a folder, or how the weights were made
    revision: str | None = None  # that was asked for; None: main, or the folder itself

    @property
    def weights_id(self) -> str:
        """Tells this model from others: the hub's commit, or a digest of the files. Random weights follow from the
        shape and the seed, which is a parameter of its own."""
        if self.weights == "random":
            shape = {name: getattr(self.model.config, name) for name in SHAPE}
            return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]
        if commit := re.fullmatch(r"[^@]+/[^@]+@([0-9a-f]{16})[0-9a-f]*", self.source):
            return commit[1]
        return digest_of_weights(demo_folder() if self.weights == "bundled" else Path(self.source))


@dataclass(frozen=True)
class Target:
    """What a name stands for: a folder, or a repo of the hub."""

    name: str
    folder: Path | None = None
    repo: str | None = None
    revision: str | None = None  # None: main


def load_model(
    name: str | os.PathLike,
    *,
    weights: str = "auto",
    fallback: str = "demo",
    attn_implementation: str = "auto",
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    seed: int = 0,
) -> LoadedModel:
    """Load a GPT-NeoX model, ready for every press, with its tokenizer.

    `name` is an alias (`pythia-14m` ... `pythia-12b`, also with `-deduped`, or `demo`), a hub id, or a local folder.

    `revision`: a branch, tag or commit of the hub (Pythia's checkpoints are step0 ... step143000; None is main), or in
    a local folder the subfolder of that name, so that a folder of checkpoints is one model in several revisions.

    `weights`: "pretrained" is that model or an error; "random" is its shape with weights made from `seed`, for figures
    that do not depend on their values (time, memory); "auto" is the pretrained model if it can be had, else `fallback`,
    announced on stderr: the bundled "demo" where values matter, "random" where they don't.

    device: "all" spreads the layers over all GPUs that are visible, by accelerate's device map.

    HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are honoured; what the cache holds is never asked for again.
    """
    check_choice("weights", weights, ("auto", "pretrained", "random"))
    check_choice("fallback", fallback, ("demo", "random"))
    check_choice("attn_implementation", attn_implementation, ("auto", *ATTENTION))
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed={seed!r}: allowed is an integer, 0 or above")
    spread = isinstance(device, str) and device == "all"
    if spread and weights == "random":
        raise ValueError("device='all' goes with weights that are read from files; for random ones name a device")
    device = find_device("auto" if spread else device)
    options = dict(
        attn_implementation="sdpa" if attn_implementation == "auto" else attn_implementation,
        dtype=find_dtype(dtype, device),
        device=device,
    )
    target = find_target(name, revision)
    if weights == "random":
        return _load_random(target, revision, seed, **options)
    try:
        folder = target.folder or fetch(target.repo, revision)
    except ConnectionError as error:
        if weights == "pretrained":
            raise
        if fallback == "random":
            loaded = _load_random(target, revision, seed, **options)
        else:
            loaded = _load_folder(Target("demo", demo_folder()), demo_folder(), spread, **options)
        _announce(target.name, loaded, error)
        return loaded
    return _load_folder(target, folder, spread, **options)


def digest_of_weights(folder: Path) -> str:
    """Of all that a figure depends on: the same weights under another config, or tokenizer, are another model."""
    names = _names(folder)
    wanted = [*_weight_files(names), *(name for name in ("config.json", "tokenizer.json") if name in names)]
    return digest_of_files(folder / name for name in wanted)


def demo_folder() -> Path:
    """The folder of the bundled model."""
    return Path(str(importlib.resources.files("kvneox_lib") / "demo"))


# ---- arguments ----


def find_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        allowed = "'auto', 'all', or a torch device such as 'cpu' or 'cuda:0'"
        raise ValueError(f"device={device!r}: allowed is {allowed}") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={device!r}: this machine has {torch.cuda.device_count()} usable CUDA devices")
    try:
        torch.zeros(1, device=found)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise ValueError(f"device={device!r}: torch cannot use it here ({error})") from error
    return found


def find_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """What "auto" means is decided here alone."""
    if dtype == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if dtype in DTYPES.values():
        return dtype
    check_choice("dtype", dtype, ("auto", *DTYPES))
    return DTYPES[dtype]


def find_target(name: str | os.PathLike, revision: str | None) -> Target:
    """Aliases come first: a folder that is called like one is written ./demo. The revision of a folder is the subfolder
    that is called so; its model is still called after the folder."""
    name = os.fspath(name) if isinstance(name, os.PathLike) else name
    allowed = f"{', '.join(PYTHIA)} (also with -deduped), demo, a hub id (owner/model) or a local folder"
    if not isinstance(name, str) or not name:
        raise ValueError(f"name={name!r}: allowed is one of {allowed}")
    alias = name.removeprefix("EleutherAI/")
    if name == "demo":
        target = Target("demo", folder=demo_folder())
    elif alias in PYTHIA_NAMES:
        target = Target(alias, repo=f"EleutherAI/{alias}")
    elif Path(name).expanduser().is_dir():
        folder = Path(name).expanduser().resolve()
        target = Target(folder.name, folder=folder)
    elif re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        target = Target(name, repo=name)
    elif re.search(r"[/\\]", name):
        raise ValueError(f"name={name!r}: there is no such folder, and a hub id reads owner/model")
    else:
        near = did_you_mean(name, [*PYTHIA_NAMES, "demo"], most=1)
        raise ValueError(f"name={name!r}: {near}allowed is one of {allowed}")
    if revision in (None, "main"):
        return target
    folder = None if target.folder is None else _revision_in(target.folder, name, revision)
    return replace(target, folder=folder, revision=revision)


def _revision_in(folder: Path, name: str, revision: str) -> Path:
    found = {path.parent.name: path.parent for path in sorted(folder.glob("*/config.json"))}
    if revision not in found:
        allowed = f"None, or a subfolder that holds a model: {', '.join(found)}" if found else "None"
        raise ValueError(f"revision={revision!r}: {name} is a folder; allowed is {allowed}")
    return found[revision]


def _announce(asked: str, loaded: LoadedModel, error: ConnectionError):
    """Printed rather than warned: a warning shows once per place, this must show at every run."""
    meaning = f"Every figure from here on belongs to '{loaded.name}', not to '{asked}'."
    if loaded.weights == "random":
        meaning = "Time and memory are those of the model; perplexity and recall would mean nothing."
    lines = [
        f"kvneox_lib: the weights of '{asked}' could not be had.",
        *str(error).splitlines(),
        f"Going on with '{loaded.name}', weights='{loaded.weights}' ({loaded.source}).",
        meaning,
    ]
    print("=" * 100, *lines, "=" * 100, sep="\n", file=sys.stderr, flush=True)


# ---- from the hub to a folder ----


def fetch(repo: str, revision: str | None = None) -> Path:
    """The folder that holds all of `repo`: the cached one without any request, else downloaded into the cache."""
    folder = cached_folder(repo, revision)
    if folder is not None and _weight_files(_names(folder)) and (folder / "tokenizer.json").is_file():
        return folder
    if reason := hub.out_of_reach():
        raise _no_connection(repo, reason)
    endpoint = hub.endpoint()
    print(f"kvneox_lib: fetching {repo} from {endpoint}", file=sys.stderr, flush=True)
    try:
        return _download(repo, revision, endpoint)
    except RevisionNotFoundError as error:
        raise ValueError(
            f"revision={revision!r}: {repo} has no such branch, tag or commit at {endpoint}; "
            "Pythia models have 'main' and 'step0' ... 'step143000'"
        ) from error
    except (httpx.HTTPError, RuntimeError, OSError) as error:  # hf_xet raises RuntimeError
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        if status in (401, 403, 404):
            raise ValueError(
                f"name={repo!r}, revision={revision!r}: {endpoint} has no such model, or wants a token for it "
                f"(HTTP {status}). Check the spelling, or log in with `hf auth login`"
            ) from error
        if hub.is_the_disks_fault(error):
            raise
        reason = str(error) or type(error).__name__
        raise _no_connection(repo, f"the transfer from {endpoint} broke ({reason})") from error


def cached_folder(repo: str, revision: str | None = None) -> Path | None:
    """The cached folder of that revision with at least its config.json, whoever put it there."""
    try:
        folder = snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=["config.json"])
    except LocalEntryNotFoundError:
        return None
    return Path(folder) if (Path(folder) / "config.json").is_file() else None


def _no_connection(repo: str, reason: str) -> ConnectionError:
    local_copy = "as name a local folder with config.json, tokenizer.json and model.safetensors"
    return hub.not_to_be_had(repo, reason, local_copy, "name='demo', which is bundled")


def _download(repo: str, revision: str | None, endpoint: str) -> Path:
    """Config and tokenizer first, so that a model of another kind is refused before its weights are fetched.

    huggingface_hub writes each file under another name and renames it when it is whole.
    """
    info = HfApi(endpoint=endpoint).model_info(repo, revision=revision, timeout=hub.ANSWER_SECONDS)
    names = [file.rfilename for file in info.siblings]
    weights = _weight_files(names)
    if not weights:
        raise ValueError(f"name={repo!r}: the repo holds no complete weights, only {', '.join(sorted(names))}")
    get = partial(snapshot_download, repo, endpoint=endpoint, etag_timeout=hub.ANSWER_SECONDS)
    folder = Path(get(revision=revision, allow_patterns=SMALL_FILES))
    read_config(folder)
    get(revision=folder.name, allow_patterns=weights)  # that very commit
    return folder


def _weight_files(names: list[str]) -> list[str]:
    """The first complete set of weights, safetensors before pickles: Pythia repos hold both."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        if f"{stem}.{suffix}" in names:
            return [f"{stem}.{suffix}"]
        index = f"{stem}.{suffix}.index.json"
        shards = [name for name in names if re.fullmatch(rf"{stem}-\d+-of-\d+\.{suffix}", name)]
        if index in names and shards and len(shards) == int(re.search(r"of-(\d+)", shards[0])[1]):
            return [index, *shards]
    return []


# ---- from a folder to a model ----


def _names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.is_file())


def read_config(folder: Path) -> GPTNeoXConfig:
    if not (folder / "config.json").is_file():
        raise ValueError(f"name={str(folder)!r}: the folder holds no config.json, so it is no model")
    try:
        read = dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"name={str(folder)!r}: its config.json is damaged ({error}). Fetch it again") from error
    if read.get("model_type") != "gpt_neox":
        raise ValueError(f"name={str(folder)!r}: its model_type is {read.get('model_type')!r}; allowed is 'gpt_neox'")
    for name in SIZES:  # before transformers divides by them
        _check_size(folder, name, read.get(name, 1))
    hidden, heads = read.get("hidden_size", 0), read.get("num_attention_heads", 1)
    if hidden % heads:
        allowed = f"a multiple of num_attention_heads={heads}"
        raise ValueError(f"name={str(folder)!r}: its config.json has hidden_size={hidden}; allowed is {allowed}")
    config = GPTNeoXConfig.from_pretrained(folder)
    _check_config(folder, config)
    return config


SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
SIZES += ("max_position_embeddings",)


def _check_size(folder: Path, name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        allowed = "a whole number of at least 1"
        raise ValueError(f"name={str(folder)!r}: its config.json has {name}={value!r}; allowed is {allowed}")


def _check_config(folder: Path, config: GPTNeoXConfig) -> None:
    """What would fail deep in the model otherwise, or not at all."""
    where = f"name={str(folder)!r}: its config.json has"
    if config.hidden_act not in ACT2FN:
        near = did_you_mean(config.hidden_act, ACT2FN)
        raise ValueError(f"{where} hidden_act={config.hidden_act!r}; {near}allowed is one of {', '.join(ACT2FN)}")
    share = (config.rope_parameters or {}).get("partial_rotary_factor")
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise ValueError(f"{where} rotary_pct={share!r}; allowed is a number above 0 and up to 1")


def _load_folder(target: Target, folder: Path, spread: bool, *, attn_implementation, dtype, device) -> LoadedModel:
    read_config(folder)
    weights = _weight_files(_names(folder))
    if not weights or not (folder / "tokenizer.json").is_file():
        missing = "tokenizer.json" if weights else "complete weights (model.safetensors, or pytorch_model.bin)"
        raise ValueError(f"name={str(folder)!r}: the folder holds no {missing}; only weights='random' does without")
    try:
        model, report = KVNeoXForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=attn_implementation,
            use_safetensors=weights[0].startswith("model."),
            device_map="auto" if spread else None,
            local_files_only=True,
            output_loading_info=True,
        )
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        if "mismatch" in str(error):
            raise ValueError(f"name={str(folder)!r}: its weights have not the shapes of its config.json") from error
        raise ValueError(f"name={str(folder)!r}: its weights are damaged ({error}). Fetch them again") from error
    if report["missing_keys"]:  # transformers would leave these random
        raise ValueError(f"name={str(folder)!r}: its weights lack {', '.join(sorted(report['missing_keys']))}")
    if report["unexpected_keys"]:  # a part of a model, which transformers would run without the rest
        raise ValueError(f"name={str(folder)!r}: its config.json has no place for {_some(report['unexpected_keys'])}")
    _check_finite(folder, model)
    tokenizer = _tokenizer(folder)
    bundled = folder == demo_folder()
    source = f"{target.repo}@{folder.name}" if target.repo else "kvneox_lib/demo" if bundled else str(folder)
    kind = "bundled" if bundled else "pretrained"
    model = (model if spread else model.to(device)).eval()
    return LoadedModel(model, tokenizer, target.name, kind, source, target.revision)


def _some(names: Iterable[str], most: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@torch.no_grad()
def _check_finite(folder: Path, model: KVNeoXForCausalLM) -> None:
    """One reading of the weights: a sum takes part in whatever is not finite. Those kept elsewhere are on "meta"."""
    held = [(name, tensor) for name, tensor in model.named_parameters() if tensor.device.type != "meta"]
    wrong = [name for name, tensor in held if not tensor.sum(dtype=torch.float32).isfinite()]
    if wrong:
        dtype = str(model.dtype).removeprefix("torch.")
        raise ValueError(f"name={str(folder)!r}: not all values are finite, in {dtype}, of {_some(wrong)}")


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise ValueError(f"name={str(folder)!r}: its tokenizer.json is damaged ({error}). Fetch it again") from error


def _load_random(target: Target, revision, seed: int, *, attn_implementation, dtype, device) -> LoadedModel:
    """The shape comes from a config at hand, else from the table; the tokenizer likewise, else it is the demo's."""
    folder = target.folder or cached_folder(target.repo, revision)
    alias = target.name.removesuffix("-deduped")
    if folder is not None:
        config = read_config(folder)
    elif alias in PYTHIA:
        config = _pythia_config(alias)
    else:
        raise ValueError(
            f"name={target.name!r}: random weights need a known shape: a model in the cache, a local folder, "
            f"or one of {', '.join(PYTHIA)}"
        )
    at_hand = folder is not None and (folder / "tokenizer.json").is_file()
    tokenizer_folder = folder if at_hand else demo_folder()
    tokenizer = _tokenizer(tokenizer_folder)
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"name={target.name!r}: its vocabulary of {config.vocab_size} is smaller than the {len(tokenizer)} "
            f"tokens of the tokenizer in {tokenizer_folder}"
        )
    config.name_or_path = str(tokenizer_folder)  # some presses load the tokenizer from there
    config._attn_implementation = attn_implementation
    model = _random_model(config, dtype, device, seed)
    source = f"shape of {target.name}, seed {seed}"
    return LoadedModel(model, tokenizer, target.name, "random", source, target.revision)


def _pythia_config(alias: str) -> GPTNeoXConfig:
    layers, hidden, heads, vocabulary = PYTHIA[alias]
    return GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        bos_token_id=0,
        eos_token_id=0,
    )


def _random_model(config: GPTNeoXConfig, dtype: torch.dtype, device: torch.device, seed: int) -> KVNeoXForCausalLM:
    """Made where and as it is wanted: no copy in float32, no initialisation that is then thrown away.

    Matrices are uniform with the standard deviation of the config: on a CPU a third of the time of normal ones.
    """
    config.dtype, before = dtype, torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), no_init_weights():
            model = KVNeoXForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(seed)
    bound = 3**0.5 * config.initializer_range
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # tied ones come once
            if parameter.dim() > 1:
                parameter.uniform_(-bound, bound, generator=generator)
            else:
                parameter.fill_(float(name.endswith("norm.weight")))
    return model.eval()
