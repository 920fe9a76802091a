import os
import shutil
import socket
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: no test may reach for the hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small shapes: threads would mostly wait for each other

import huggingface_hub
import pytest
import torch
from hub_server import HubServer
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM
from transformers.utils.logging import disable_progress_bar

import kvneox_lib
from kvneox_lib.studies.packing import unpack

disable_progress_bar()

REPOSITORY = Path(__file__).parent.parent
DEMO = Path(kvneox_lib.__file__).parent / "demo"


def pytest_collection_modifyitems(items):
    """Files with long runs first: processes that take whole files then end at about the same time."""
    long_runs = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -long_runs[item.path])


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Nothing of a test run lands in the user's cache."""
    os.environ["KVNEOX_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def styled():
    """Figures in the style of the pages; none stays open."""
    from matplotlib import pyplot, rc_context

    from kvneox_lib.pages import figures

    with rc_context():
        figures.use_style()
        yield
    pyplot.close("all")


@pytest.fixture(scope="session")
def loose_reference(tmp_path_factory):
    """results/reference with a file for each record, as runs leave them."""
    folder = tmp_path_factory.mktemp("results") / "reference"
    shutil.copytree(REPOSITORY / "results" / "reference", folder)
    for path in sorted(folder.glob("*.csv")):
        if path.name.count(".") == 1:
            unpack(folder / path.stem)
    return folder


def tiny_config(head_dim: int = 64, **changes) -> GPTNeoXConfig:
    """Two heads, two layers, and weights large enough that attention matters."""
    settings = {
        "vocab_size": 97,
        "hidden_size": 2 * head_dim,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 3 * head_dim,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPTNeoXConfig(**{**settings, **changes})


def stock_and_ours(config: GPTNeoXConfig, attn_implementation: str = "sdpa", dtype=torch.float32):
    """The same random weights in transformers' class and in ours."""
    config._attn_implementation = attn_implementation
    stock = GPTNeoXForCausalLM(config).to(dtype).eval()
    for parameter in stock.parameters():
        if parameter.dim() == 1:  # biases start at zero, norms at one: make a mistake with them visible
            parameter.data += 0.1 * torch.randn_like(parameter)
    ours = kvneox_lib.KVNeoXForCausalLM(config).to(dtype).eval()
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def relative_difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).abs().max() / other.float().abs().max())


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="session")
def _demo():
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32, attn_implementation="sdpa").eval()


@pytest.fixture
def demo(_demo):
    """The bundled model, checked to be handed back as it was given."""
    yield _demo
    assert _demo.config._attn_implementation == "sdpa"
    assert hooks_of_presses(_demo) == []


def hooks_of_presses(model) -> list:
    """Forward hooks on the attention layers, but for those with which transformers captures outputs."""
    hooks = [hook for layer in model.model.layers for hook in layer.self_attn._forward_hooks.values()]
    return [hook for hook in hooks if "output_capturing" not in hook.__qualname__]


@pytest.fixture(scope="session")
def reading(tokenizer):
    """Token ids (1, n) of English text that is always there."""
    from kvneox_lib.presses.calibration import standard_library_docstrings

    return tokenizer(standard_library_docstrings(), return_tensors="pt", verbose=False).input_ids


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, no proxy, online, and no address but this machine's own."""
    for variable in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(variable)
    folder = tmp_path / "hub-cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    look_up = socket.getaddrinfo

    def only_here(host, *arguments, **options):
        if host not in ("127.0.0.1", "localhost"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", only_here)
    huggingface_hub.close_session()
    yield folder
    huggingface_hub.close_session()


@pytest.fixture
def hub(monkeypatch, cache):
    """A hub on this machine, as the mirror to use."""
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server
