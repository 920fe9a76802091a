"""Weights from a hub on 127.0.0.1, from its cache, from disk, from the box, and made up. Nothing else is ever asked."""

import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from conftest import relative_difference
from hub_server import HubServer
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

from kvneox_lib import KVNeoXForCausalLM
from kvneox_lib.inputs import hub as hub_module
from kvneox_lib.inputs import weights as models
from kvneox_lib.inputs.text import load_text
from kvneox_lib.inputs.weights import demo_folder, load_model
from kvneox_lib.inputs.windows import windows

REPO = "someone/tiny-neox"
IDS = torch.arange(2, 62)[None]
TOKENIZER_FILES = {name: (demo_folder() / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
CHECKOUT = Path(__file__).parent.parent


def old_pythia_config() -> dict:
    """As EleutherAI wrote them in 2023, before transformers renamed the rotary settings and `torch_dtype`."""
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 256,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "model_type": "gpt_neox",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "transformers_version": "4.24.0",
        "use_cache": True,
        "use_parallel_residual": True,
        "vocab_size": 8192,
    }


def old_pythia(folder: Path, form: str = "safetensors", seed: int = 0) -> tuple[dict[str, bytes], torch.Tensor]:
    """The files of a checkpoint in the old Pythia format, and the logits of transformers' own class for `IDS`."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    old_names = ("rotary_emb_base", "rotary_pct", "torch_dtype", "transformers_version", "architectures", "model_type")
    settings = {key: value for key, value in old_pythia_config().items() if key not in old_names}
    torch.manual_seed(seed)
    stock = GPTNeoXForCausalLM(GPTNeoXConfig(**settings, rope_parameters=rope)).eval()
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).half())  # what float16 can hold
        logits = stock(IDS).logits

    state = {name: tensor.half().clone() for name, tensor in stock.state_dict().items()}
    for layer in range(2):  # buffers that were part of the state then
        attention = f"gpt_neox.layers.{layer}.attention"
        state[f"{attention}.bias"] = torch.ones(1, 1, 2048, 2048, dtype=torch.bool).tril()
        state[f"{attention}.masked_bias"] = torch.tensor(-1e9, dtype=torch.float16)
        state[f"{attention}.rotary_emb.inv_freq"] = 1.0 / 10000 ** (torch.arange(0, 8, 2) / 8)

    folder.mkdir()
    if form == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif form == "sharded":
        names = sorted(state)
        shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
        for shard, members in shards.items():
            save_file({name: state[name] for name in members}, folder / shard, metadata={"format": "pt"})
        weight_map = {name: shard for shard, members in shards.items() for name in members}
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(old_pythia_config()))
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    return {**files, **TOKENIZER_FILES}, logits


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def nobody(monkeypatch) -> str:
    """HF_ENDPOINT at a port of this machine where nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setenv("HF_ENDPOINT", url)
    return url


@torch.no_grad()
def logits_of(loaded) -> torch.Tensor:
    return loaded.model(IDS).logits


def names_three_ways_out(message: str) -> bool:
    return all(way in message for way in ("HF_ENDPOINT", "local folder", "name='demo'"))


# ---- from a hub ----


@pytest.mark.parametrize("form", ["safetensors", "bin", "sharded"])
def test_an_old_pythia_checkpoint_is_downloaded_once_and_gives_the_stock_logits(hub, tmp_path, form, capfd):
    files, expected = old_pythia(tmp_path / "files", form)
    if form == "safetensors":
        files["pytorch_model.bin"] = b"the same weights again: never to be fetched"
    commit = hub.add(REPO, {**files, "README.md": b"", "optimizer.bin": b"big"})

    loaded = load_model(REPO, weights="pretrained")
    assert relative_difference(logits_of(loaded), expected) < 1e-5
    assert (loaded.name, loaded.weights, loaded.source) == (REPO, "pretrained", f"{REPO}@{commit}")
    assert type(loaded.model) is KVNeoXForCausalLM and not loaded.model.training
    assert loaded.model.dtype == torch.float32  # on a CPU, though stored in float16
    fetched = {name for name in files if name != "pytorch_model.bin" or form == "bin"}
    assert sorted(hub.downloads()) == sorted(fetched)
    assert "MISSING" not in capfd.readouterr().err

    hub.stop()
    hub.requests.clear()
    again = load_model(REPO, weights="pretrained")
    assert torch.equal(logits_of(again), logits_of(loaded)) and hub.requests == []
    found = AutoTokenizer.from_pretrained(again.model.config.name_or_path)  # as KVzip does
    assert found("The cache is full.").input_ids == again.tokenizer("The cache is full.").input_ids


def test_alias_and_deduped_alias_stand_for_the_published_repos(hub, tmp_path):
    for number, repo in enumerate(("EleutherAI/pythia-14m", "EleutherAI/pythia-31m-deduped")):
        files, expected = old_pythia(tmp_path / str(number), seed=number)
        hub.add(repo, files)
        for name in (repo, repo.removeprefix("EleutherAI/")):
            loaded = load_model(name)
            assert loaded.weights == "pretrained" and loaded.name == repo.removeprefix("EleutherAI/")
            assert relative_difference(logits_of(loaded), expected) < 1e-5


def test_revisions_are_kept_apart(hub, tmp_path, monkeypatch):
    expected = {}
    for number, revision in enumerate(("main", "step1000")):
        files, expected[revision] = old_pythia(tmp_path / revision, seed=number)
        commit = hub.add(REPO, files, revision)
    assert not torch.allclose(expected["main"], expected["step1000"])
    for revision in (None, "step1000", "main"):
        logits = logits_of(load_model(REPO, revision=revision))
        assert relative_difference(logits, expected[revision or "main"]) < 1e-5
    assert load_model(REPO, revision="step1000").source == f"{REPO}@{commit}"

    for weights in ("pretrained", "auto"):  # a slip of the pen is not a matter of connection: no fallback
        with pytest.raises(ValueError, match="revision='step999'.*step0"):
            load_model(REPO, revision="step999", weights=weights)
        with pytest.raises(ValueError, match="name='someone/tiny'.*no such model"):
            load_model("someone/tiny", weights=weights)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert relative_difference(logits_of(load_model(REPO, revision="step1000")), expected["step1000"]) < 1e-5
    with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE forbids"):
        load_model(REPO, revision="step2000", weights="pretrained")
    assert hub.requests == []


def test_a_broken_transfer_leaves_no_half_written_model(hub, tmp_path, cache, capsys):
    files, expected = old_pythia(tmp_path / "files")
    hub.add(REPO, files)
    hub.broken.add("model.safetensors")
    with pytest.raises(ConnectionError, match="broke") as raised:
        load_model(REPO, weights="pretrained")
    assert names_three_ways_out(str(raised.value))
    assert "model.safetensors" in hub.downloads()
    on_disk = [file for file in cache.rglob("*") if file.is_file()]
    assert not [file for file in on_disk if file.name == "model.safetensors" or file.suffix == ".incomplete"]
    assert not [file for file in on_disk if file.stat().st_size == len(files["model.safetensors"]) // 2]

    loaded = load_model(REPO, fallback="demo")  # nor is the half-filled cache taken for a model
    assert (loaded.name, loaded.weights) == ("demo", "bundled") and "broke" in capsys.readouterr().err
    hub.broken.clear()
    assert relative_difference(logits_of(load_model(REPO)), expected) < 1e-5


def test_a_slow_answer_is_waited_for(hub, tmp_path, capsys):
    files, expected = old_pythia(tmp_path / "files")
    hub.add(REPO, files)
    hub.delays_s = [5.5]  # longer than it may take to find that there is no connection
    assert relative_difference(logits_of(load_model(REPO)), expected) < 1e-5
    assert f"fetching {REPO} from {hub.url}" in capsys.readouterr().err


def test_a_hub_that_accepts_and_never_answers_is_given_up_after_the_timeout(monkeypatch):
    monkeypatch.setattr(hub_module, "ANSWER_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
        start = time.perf_counter()
        with pytest.raises(ConnectionError, match="timed out"):
            load_model("pythia-70m", weights="pretrained")
    assert 0.9 < time.perf_counter() - start < 4


def test_a_model_of_another_kind_is_refused_before_its_weights_are_fetched(hub):
    config = json.dumps({"model_type": "llama"}).encode()
    hub.add("someone/llama", {"config.json": config, "model.safetensors": b"many gigabytes", **TOKENIZER_FILES})
    with pytest.raises(ValueError, match="model_type is 'llama'"):
        load_model("someone/llama")
    assert "model.safetensors" not in hub.downloads()
    hub.add("someone/empty", {"config.json": config, "flax_model.msgpack": b""})
    with pytest.raises(ValueError, match="no complete weights"):
        load_model("someone/empty")


def test_a_proxy_leads_to_the_hub(hub, tmp_path, monkeypatch):
    """Behind a campus proxy the hub's own name often cannot even be looked up."""
    files, expected = old_pythia(tmp_path / "files")
    hub.add(REPO, files)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    monkeypatch.setenv("http_proxy", hub.url)
    assert relative_difference(logits_of(load_model(REPO)), expected) < 1e-5


def test_the_environment_alone_is_enough(tmp_path):
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE as a shell sets them, in fresh processes."""
    script = textwrap.dedent(f"""
        import kvneox_lib.inputs.weights as models
        loaded = models.load_model({REPO!r}, weights="pretrained")
        print(loaded.source, float(loaded.model(models.torch.arange(2, 62)[None]).logits.sum()))
    """)

    def run(**environment) -> str:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment = {**inherited, "HF_HOME": str(tmp_path / "home"), **environment}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    with HubServer() as hub:
        files, expected = old_pythia(tmp_path / "files")
        commit = hub.add(REPO, files)
        first = run(HF_ENDPOINT=hub.url, NO_PROXY="*")
        assert first.split()[0] == f"{REPO}@{commit}"
        assert float(first.split()[1]) == pytest.approx(float(expected.sum()), rel=1e-4)
        assert (tmp_path / "home" / "hub" / "models--someone--tiny-neox").is_dir()
        hub.requests.clear()
        assert run(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1") == first
        assert hub.requests == []


# ---- without a hub ----


@pytest.mark.parametrize("trouble", ["nobody listens", "name unknown", "name server silent", "dead proxy"])
def test_without_connection_the_decision_takes_less_than_5_seconds(trouble, nobody, monkeypatch):
    if trouble != "nobody listens":
        monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    if trouble == "name server silent":
        monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: time.sleep(10) or [])
    if trouble == "dead proxy":
        monkeypatch.setenv("https_proxy", nobody)
    start = time.perf_counter()
    with pytest.raises(ConnectionError) as raised:
        load_model("EleutherAI/pythia-70m", weights="pretrained")
    assert time.perf_counter() - start < 5
    assert names_three_ways_out(str(raised.value)) and "EleutherAI/pythia-70m" in str(raised.value)


def test_auto_falls_back_in_plain_sight(nobody, capsys):
    demo = load_model("pythia-14m")
    assert (demo.name, demo.weights, demo.source) == ("demo", "bundled", "kvneox_lib/demo")
    banner = capsys.readouterr().err
    assert "'pythia-14m' could not be had" in banner and "belongs to 'demo', not to 'pythia-14m'" in banner

    shaped = load_model("pythia-14m-deduped", fallback="random", seed=3)
    assert (shaped.name, shaped.weights) == ("pythia-14m-deduped", "random") and "seed 3" in shaped.source
    assert "weights='random'" in capsys.readouterr().err
    assert sum(parameter.numel() for parameter in shaped.model.parameters()) == 14_067_712
    with pytest.raises(ValueError, match="name='someone/tiny-neox'.*known shape"):
        load_model(REPO, fallback="random")


# ---- from a folder ----


@pytest.fixture
def folder(tmp_path) -> Path:
    files, _ = old_pythia(tmp_path / "local")
    for name, content in files.items():
        (tmp_path / "local" / name).write_bytes(content)
    return tmp_path / "local"


def test_a_local_folder_loads_from_wherever_one_stands(folder, monkeypatch):
    expected = logits_of(load_model(str(folder)))
    monkeypatch.chdir(folder.parent)
    loaded = load_model("local", attn_implementation="eager", dtype="bfloat16")
    assert (loaded.name, loaded.weights, loaded.source) == ("local", "pretrained", str(folder))
    assert loaded.model.dtype == torch.bfloat16 and loaded.model.config._attn_implementation == "eager"
    monkeypatch.chdir("/")
    AutoTokenizer.from_pretrained(loaded.model.config.name_or_path, local_files_only=True)
    assert torch.nn.functional.cosine_similarity(logits_of(loaded).float().flatten(), expected.flatten(), dim=0) > 0.999


def cut_off(weights: Path):
    weights.write_bytes(weights.read_bytes()[:-1000])


def drop_a_layer(weights: Path):
    state = {name: tensor for name, tensor in load_file(weights).items() if ".layers.1.mlp" not in name}
    save_file(state, weights, metadata={"format": "pt"})


def forget_a_shard(weights: Path):
    weights.rename(weights.with_name("model-00001-of-00002.safetensors"))
    weights.with_name("model.safetensors.index.json").write_text('{"weight_map": {}}')


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (cut_off, "weights are damaged"),
        (lambda weights: weights.write_bytes(struct.pack("<Q", 1 << 40)), "weights are damaged"),
        (drop_a_layer, r"lack gpt_neox\.layers\.1\.mlp"),
        (forget_a_shard, "no complete weights"),
        (Path.unlink, "no complete weights"),
        (lambda weights: weights.with_name("tokenizer.json").unlink(), "no tokenizer.json"),
        (lambda weights: weights.with_name("config.json").unlink(), "no config.json"),
    ],
)
def test_a_damaged_folder_is_refused_and_not_replaced_by_something_else(folder, damage, complaint):
    damage(folder / "model.safetensors")
    for weights in ("pretrained", "auto"):
        with pytest.raises(ValueError, match=f"(?s)local.*{complaint}"):
            load_model(str(folder), weights=weights)


# ---- random ----

PUBLISHED_PARAMETERS = {  # the totals of the Pythia paper's table and of the model cards
    "pythia-14m": 14_067_712,
    "pythia-31m": 30_494_720,
    "pythia-70m": 70_426_624,
    "pythia-160m": 162_322_944,
    "pythia-410m": 405_334_016,
    "pythia-1b": 1_011_781_632,
    "pythia-1.4b": 1_414_647_808,
    "pythia-2.8b": 2_775_208_960,
    "pythia-6.9b": 6_857_302_016,
    "pythia-12b": 11_846_072_320,
}
PUBLISHED_HEAD_SIZES = [32, 32, 64, 64, 64, 256, 128, 80, 128, 128]


def test_the_table_gives_the_published_sizes():
    assert list(models.PYTHIA) == list(PUBLISHED_PARAMETERS)
    for name, head_size in zip(models.PYTHIA, PUBLISHED_HEAD_SIZES):
        config = models._pythia_config(name)
        with torch.device("meta"):
            model = GPTNeoXForCausalLM(config)
        assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED_PARAMETERS[name], name
        attention = model.gpt_neox.layers[0].attention
        assert attention.head_size == head_size and attention.rotary_ndims == head_size // 4
        assert not config.tie_word_embeddings and config.max_position_embeddings == 2048


def test_random_weights_follow_the_seed_and_nothing_else():
    torch.manual_seed(5)
    expected_next = torch.rand(1)
    torch.manual_seed(5)
    one = load_model("pythia-14m", weights="random", seed=1)
    assert torch.equal(torch.rand(1), expected_next)  # the caller's random numbers go on undisturbed
    same, other = (load_model("pythia-14m", weights="random", seed=seed) for seed in (1, 2))
    assert torch.equal(logits_of(one), logits_of(same)) and not torch.equal(logits_of(one), logits_of(other))

    stock = GPTNeoXForCausalLM(one.model.config)  # the same spread as transformers' own initialisation
    for (name, ours), (_, theirs) in zip(one.model.named_parameters(), stock.named_parameters(), strict=True):
        assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
        if ours.dim() == 1:
            assert torch.equal(ours, theirs), name
        else:
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05), name
    stock.load_state_dict(one.model.state_dict())
    torch.testing.assert_close(stock.eval()(IDS).logits, logits_of(one), rtol=1e-4, atol=1e-5)  # rotary included


def test_random_weights_take_the_config_and_tokenizer_at_hand(folder, hub, tmp_path, nobody):
    table = load_model("pythia-14m", weights="random")
    assert table.model.config.name_or_path == str(demo_folder())
    assert max(table.tokenizer("An example.").input_ids) < table.model.config.vocab_size

    (folder / "model.safetensors").unlink()
    local = load_model(str(folder), weights="random", dtype=torch.bfloat16)
    assert local.weights == "random" and {p.dtype for p in local.model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    assert local.model.config.hidden_size == 64 and local.model.config.name_or_path == str(folder)
    (folder / "tokenizer.json").unlink()
    assert load_model(str(folder), weights="random").model.config.name_or_path == str(demo_folder())

    tied = load_model("demo", weights="random").model
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight


def test_random_weights_of_a_cached_model_have_its_shape(hub, tmp_path):
    hub.add(REPO, old_pythia(tmp_path / "files")[0])
    load_model(REPO)
    hub.stop()
    loaded = load_model(REPO, weights="random")
    assert loaded.weights == "random" and loaded.model.config.hidden_size == 64


@pytest.mark.slow
def test_random_pythia_2_8b_in_bfloat16_stays_under_7_gb():
    script = textwrap.dedent("""
        import resource, torch
        from kvneox_lib.inputs.weights import load_model
        model = load_model("pythia-2.8b", weights="random", dtype="bfloat16", device="cpu").model
        print(sum(parameter.numel() for parameter in model.parameters()))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    parameters, peak_bytes = map(int, done.stdout.split())
    assert parameters == PUBLISHED_PARAMETERS["pythia-2.8b"] and 2 * parameters < peak_bytes < 7e9


# ---- the bundled model ----


@torch.no_grad()
def perplexity(model, token_ids: torch.Tensor) -> float:
    return float(model(token_ids, labels=token_ids).loss.exp())


@pytest.fixture
def python_docs(tokenizer) -> torch.Tensor:
    """Windows (4, 1024) from the language reference that comes with Python."""
    text = "\n\n".join(
        topics[name] for name in ("compound", "specialnames", "formatstrings", "types") if name in topics
    )
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0, :4096].view(4, 1024)


def test_demo_reads_python_documentation_as_well_as_its_record_says(python_docs):
    for weights in ("auto", "pretrained"):
        loaded = load_model("demo", weights=weights)
        assert (loaded.name, loaded.weights) == ("demo", "bundled")
    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == pytest.approx(6.84e6, rel=1e-3)
    assert 28 < perplexity(loaded.model, python_docs) < 35  # 30.9 in train.json, in windows of 2,048


@pytest.mark.parametrize(
    ("folder", "low", "high"),
    [("wikitext-2-v1", 34, 40), ("gutenberg-pre1919", 41, 47)],  # measured 36.7 and 43.6
)
def test_demo_reads_texts_it_was_not_trained_on(folder, low, high):
    path = Path(__file__).parents[2] / "shared" / "data" / folder
    if not path.is_dir():
        pytest.skip(f"{path} is not here")
    loaded = load_model("demo")
    cut = windows(load_text(str(path)), loaded.tokenizer, context_length=1024, continuation_length=256, max_windows=12)
    assert low < perplexity(loaded.model, cut.input_ids) < high


@pytest.mark.parametrize("layer", range(6))
def test_the_range_would_notice_one_damaged_matrix(python_docs, layer):
    model = load_model("demo").model
    matrix = model.gpt_neox.layers[layer].attention.dense.weight.data
    matrix.copy_(matrix.roll(1, dims=0))
    assert perplexity(model, python_docs) > 35


def test_demo_continues_a_page_in_recognisable_english(tokenizer):
    page = tokenizer(topics["execmodel"], return_tensors="pt", verbose=False).input_ids[:, :600]
    known = set(re.findall(r"[a-z]+", " ".join(topics.values()).lower()))

    def continuation(model) -> tuple[float, int]:
        """The share of English words in what the model writes, and how many different ones."""
        torch.manual_seed(0)
        written = model.generate(page, max_new_tokens=70, min_new_tokens=70, do_sample=True, top_k=40)
        words = re.findall(r"[a-z]+", tokenizer.decode(written[0, page.shape[1] :]).lower())
        return sum(word in known for word in words) / len(words), len(set(words))

    share, different = continuation(load_model("demo").model)
    assert share > 0.8 and different > 20  # repeating one word would not do
    assert continuation(load_model("demo", weights="random").model)[0] < 0.5


def test_demo_recalls_passkeys_from_anywhere_in_its_context(tokenizer):
    model = load_model("demo").model
    filler = tokenizer(topics["compound"], verbose=False).input_ids[:1800]
    right = 0
    for number, name in enumerate(("Tarvo", "Belune", "Mirasot", "Kodrel", "Sanivu", "Polgem", "Ruvika", "Zelto")):
        digits = str(10007 + 11117 * number)
        statement = tokenizer(f" The passkey of {name} is {digits}. Remember it.").input_ids
        question = tokenizer(f"\n\nWhat is the passkey of {name}? The passkey of {name} is").input_ids
        place = 220 * number
        prompt = torch.tensor([filler[:place] + statement + filler[place:] + question])
        answer = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
        right += tokenizer.decode(answer).strip().startswith(digits)
    assert right >= 7  # chance is nil; 251 of 251 digits in train.json


@pytest.mark.slow
def test_the_wheel_installed_outside_the_checkout_loads_demo(tmp_path):
    sources = tmp_path / "sources"
    sources.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "kvneox_lib"):  # building must not litter the checkout
        subprocess.run(["cp", "-r", str(CHECKOUT / name), str(sources)], check=True)
    pip = [sys.executable, "-m", "pip", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(sources)]
    subprocess.run(build, check=True)
    installed = tmp_path / "installed"
    wheel = next(tmp_path.glob("*.whl"))
    assert wheel.stat().st_size < 20e6
    subprocess.run([*pip, "install", "--no-deps", "--target", str(installed), str(wheel)], check=True)
    script = (
        "import kvneox_lib.inputs.weights as m; print(m.__file__, m.load_model('demo', weights='pretrained').weights)"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(installed / "kvneox_lib" / "inputs" / "weights.py"), "bundled"]


# ---- arguments ----


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"name": "pythia-70"}, "name='pythia-70': did you mean pythia-70m"),
        ({"name": "pythia-1.4b-dedupe"}, "did you mean pythia-1.4b-deduped"),
        ({"name": "Demo"}, "did you mean demo"),
        ({"name": "./nowhere"}, "name='./nowhere': there is no such folder"),
        ({"name": None}, "name=None: allowed"),
        ({"weights": "best"}, "weights='best'.*pretrained"),
        ({"fallback": "none"}, "fallback='none'.*allowed is one of demo, random"),
        ({"attn_implementation": "fast"}, "attn_implementation='fast'.*eager"),
        ({"dtype": "int8"}, "dtype='int8'.*bfloat16"),
        ({"dtype": torch.int8}, "dtype=torch.int8"),
        ({"device": "toaster"}, "device='toaster'"),
        ({"device": "cuda:99"}, "device='cuda:99'"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": "x"}, "seed='x'"),
        ({"revision": "step1000"}, "revision='step1000'"),
    ],
)
def test_wrong_arguments_are_named_with_what_is_allowed(arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        load_model(**{"name": "demo", **arguments})


def test_an_endpoint_that_is_no_url_is_named(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "my-mirror")
    with pytest.raises(ValueError, match="HF_ENDPOINT='my-mirror'"):
        load_model("pythia-70m")


@pytest.mark.parametrize(("bf16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_dtype_auto_follows_the_card(monkeypatch, bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    assert models.find_dtype("auto", torch.device("cuda")) == expected
    assert models.find_dtype("auto", torch.device("cpu")) == torch.float32


def test_a_folder_may_be_given_as_a_path():
    assert load_model(demo_folder()).weights == "bundled"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "", "config.json is damaged"),
        ("config.json", "[]", "config.json is damaged|model_type is None"),
        ("tokenizer.json", "{", "tokenizer.json is damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, file, content, message):
    folder = tmp_path / "model"
    shutil.copytree(demo_folder(), folder)
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=f"model.*({message})"):
        load_model(str(folder))


def changed_copy(folder: Path, **changes) -> Path:
    shutil.copytree(demo_folder(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads=0; allowed is a whole number of at least 1"),
        ({"num_hidden_layers": -1}, "num_hidden_layers=-1; allowed"),
        ({"max_position_embeddings": "2048"}, "max_position_embeddings='2048'; allowed"),
        ({"max_position_embeddings": None}, "max_position_embeddings=None; allowed"),
        ({"vocab_size": 8192.5}, "vocab_size=8192.5; allowed"),
        ({"num_attention_heads": 3}, "hidden_size=256; allowed is a multiple of num_attention_heads=3"),
        ({"hidden_act": "gellu"}, "hidden_act='gellu'; did you mean gelu .*allowed is one of"),
        ({"rotary_pct": 1.5}, "rotary_pct=1.5; allowed is a number above 0 and up to 1"),
        ({"rotary_pct": 0}, "rotary_pct=0; allowed"),
        ({"rotary_pct": "half"}, "rotary_pct='half'; allowed"),
        ({"head_dim": 32}, "head_dim=32: with hidden_size=256 and num_attention_heads=4 allowed is 64"),
        ({"num_hidden_layers": 4}, r"no place for gpt_neox\.layers\.4\.\S+, .* and \d+ more"),
    ],
)
def test_a_config_that_makes_no_model_or_a_part_of_one_is_refused(tmp_path, changes, message):
    folder = changed_copy(tmp_path / "model", **changes)
    with pytest.raises(ValueError, match=message):
        load_model(str(folder))
    if "num_hidden_layers" not in changes:
        with pytest.raises(ValueError, match=message):
            load_model(str(folder), weights="random")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 60000.0])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value):
    """60,000 is, though its tensor's sum is beyond float16; a cast to float16 can make others infinite."""
    folder = changed_copy(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "gpt_neox.layers.3.attention.dense.bias"
    tensors[name][5:9] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if value == 60000:
        assert load_model(str(folder), dtype="float16").weights == "pretrained"
        tensors[name] = tensors[name].float() * 2
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        load_model(str(folder), dtype="float32")
    with pytest.raises(ValueError, match=f"not all values are finite, in float16, of {name}$"):
        load_model(str(folder), dtype="float16")


def test_weights_of_another_shape_are_not_called_damaged(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(demo_folder(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 512}))
    with pytest.raises(ValueError, match="have not the shapes of its config.json"):
        load_model(str(folder))


def test_a_device_that_torch_cannot_use_is_refused_before_loading():
    with pytest.raises(ValueError, match="device='mps': torch cannot use it here"):
        load_model("demo", device="mps")
    with pytest.raises(ValueError, match="seed=True"):
        load_model("demo", seed=True)


def test_a_model_on_all_devices_is_the_same_model(tokenizer, monkeypatch):
    """Where there are several, accelerate moves what passes between them; here its map names the CPU alone."""
    asked, original = [], KVNeoXForCausalLM.from_pretrained

    def watched(folder, *, device_map, **options):
        asked.append(device_map)
        return original(folder, device_map=device_map, **options)

    monkeypatch.setattr(KVNeoXForCausalLM, "from_pretrained", watched)
    spread, whole = (load_model("demo", device=device, dtype="float32").model for device in ("all", "cpu"))
    assert asked == ["auto", None]
    ids = tokenizer("What is an object?", return_tensors="pt").input_ids
    assert torch.equal(spread(ids.to(spread.device)).logits.cpu(), whole(ids).logits)
    with pytest.raises(ValueError, match="device='all' goes with weights"):
        load_model("demo", device="all", weights="random")
