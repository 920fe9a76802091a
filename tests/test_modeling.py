"""Our model against transformers' own class with the same weights."""

import contextlib
import copy
import gc
import json
import pickle
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import DEMO, relative_difference, stock_and_ours, tiny_config
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GPTNeoXForCausalLM, StaticCache, pipeline

from kvneox_lib import CompactCache, KVNeoXForCausalLM, adapt, generate, make_press, streaming_nll
from kvneox_lib.neox.modeling import half_split
from kvneox_lib.presses.calibration import _fingerprint

SHAPES = {
    "head 32 (14m, 31m)": {"head_dim": 32},
    "head 64 (70m to 410m, 1b's half)": {"head_dim": 64},
    "head 80 (2.8b)": {"head_dim": 80},
    "head 128 (1.4b, 6.9b)": {"head_dim": 128},
    "head 256 (1b)": {"head_dim": 256},
    "rotary 1.0": {"rotary_pct": 1.0},
    "rotary 0.5": {"rotary_pct": 0.5},
    "sequential residual": {"use_parallel_residual": False},
    "no attention bias": {"attention_bias": False},
    "tied embeddings": {"tie_word_embeddings": True},
    "scaled rotary": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}},
}
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@torch.no_grad()
def read_in_chunks(model, ids: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    cache = DynamicCache()
    return torch.cat([model(chunk, past_key_values=cache).logits for chunk in ids.split(sizes, dim=1)], dim=1)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_logits_are_the_stock_models(changes, implementation):
    stock, ours = stock_and_ours(tiny_config(**changes), implementation)
    ids = torch.randint(0, 97, (2, 48))
    with torch.no_grad():
        expected = stock(ids, use_cache=False).logits
        assert relative_difference(ours(ids, use_cache=False).logits, expected) < LIMIT[torch.float32]
    for sizes in ([48], [20, 1, 27], [1] * 48):
        assert relative_difference(read_in_chunks(ours, ids, sizes), expected) < LIMIT[torch.float32], sizes


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_logits_in_bfloat16(implementation):
    stock, ours = stock_and_ours(tiny_config(initializer_range=0.05), implementation, torch.bfloat16)
    ids = torch.randint(0, 97, (2, 48))
    expected = read_in_chunks(stock, ids, [48])
    for sizes in ([48], [30, 18], [1] * 48):
        assert relative_difference(read_in_chunks(ours, ids, sizes), expected) < LIMIT[torch.bfloat16], sizes


def test_the_order_of_dimensions_does_not_change_products():
    query, key = torch.randn(2, 5, 80, dtype=torch.float64)
    products = half_split(query, 20) @ half_split(key, 20).T
    assert torch.allclose(products, query @ key.T)
    assert half_split(torch.arange(8), 4).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]  # pairs (0, 2), (1, 3) four apart


def test_padding_and_static_cache_generate_what_stock_generates():
    for implementation in ("eager", "sdpa"):
        stock, ours = stock_and_ours(tiny_config(), implementation)
        ids, mask = torch.randint(1, 97, (2, 20)), torch.ones(2, 20, dtype=torch.long)
        mask[0, :7] = 0
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        for extra in ({"attention_mask": mask}, {"cache_implementation": "static", "disable_compile": True}):
            assert torch.equal(ours.generate(ids, **extra, **settings), stock.generate(ids, **extra, **settings))


def test_static_cache_logits():
    stock, ours = stock_and_ours(tiny_config())
    ids = torch.randint(0, 97, (1, 24))
    cache = StaticCache(config=ours.config, max_cache_len=40)
    with torch.no_grad():
        ours(ids[:, :16], past_key_values=cache)
        rest = ours(ids[:, 16:], past_key_values=cache, cache_position=torch.arange(16, 24)).logits
        assert relative_difference(rest, stock(ids).logits[:, 16:]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("n_tokens", [1, 3, 5])
def test_a_short_text_is_read_into_a_cache_that_holds_no_layers_yet(n_tokens):
    stock, ours = stock_and_ours(tiny_config())
    ids = torch.randint(0, 97, (1, n_tokens))
    expected = stock(ids).logits
    for cache in (DynamicCache(), CompactCache()):
        assert relative_difference(ours(ids, past_key_values=cache).logits, expected) < 1e-5
        assert cache.get_seq_length() == n_tokens


def test_parameters_and_files_are_the_stock_models(tmp_path):
    stock, ours = stock_and_ours(tiny_config())
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in stock.parameters())
    with make_press("snapkv", window_size=4)(ours):  # hooks and the rotary module that kvpress hangs in leave no trace
        ours(torch.randint(0, 97, (1, 16)))
    ours.save_pretrained(tmp_path)
    again = GPTNeoXForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 97, (1, 30))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, stock(ids).logits)
    mine = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(mine) is KVNeoXForCausalLM
    with torch.no_grad():
        assert relative_difference(mine.eval()(ids).logits, stock(ids).logits) < 1e-5


def test_a_rotary_share_other_than_pythias_survives_saving(tmp_path):
    """Saved by stock transformers 5.2 it comes back as 0.25; our config says it in the words that are read."""
    stock, ours = stock_and_ours(tiny_config(rotary_pct=0.5))
    ids = torch.randint(0, 97, (1, 30))
    ours.save_pretrained(tmp_path / "ours")
    for loaded in (GPTNeoXForCausalLM, AutoModelForCausalLM):
        again = loaded.from_pretrained(tmp_path / "ours").eval()
        with torch.no_grad():
            assert relative_difference(again(ids).logits, stock(ids).logits) < 1e-5


def test_head_dimensions_that_cannot_be_halved_are_refused():
    with pytest.raises(ValueError, match="head_dim=12, 3 of it rotary: allowed are even"):
        KVNeoXForCausalLM(tiny_config(head_dim=12))


def test_labels_give_the_stock_loss_and_logits_to_keep_its_last_logits():
    stock, ours = stock_and_ours(tiny_config())
    ids = torch.randint(0, 97, (2, 30))
    with torch.no_grad():
        assert torch.allclose(ours(ids, labels=ids).loss, stock(ids, labels=ids).loss)
        assert relative_difference(ours(ids, logits_to_keep=3).logits, stock(ids).logits[:, -3:]) < 1e-5
        assert relative_difference(ours(ids, return_dict=False)[0], stock(ids).logits) < 1e-5


def test_a_checkpoint_as_the_hub_has_it_loads_cleanly(tmp_path):
    """Config fields and buffers of 2023: rotary_pct, rotary_emb_base, torch_dtype, masks and inv_freq in the file."""
    stock, _ = stock_and_ours(tiny_config(), dtype=torch.float16)
    tensors = {name: tensor.clone() for name, tensor in stock.state_dict().items()}
    for layer in range(2):
        prefix = f"gpt_neox.layers.{layer}.attention."
        tensors[prefix + "bias"] = torch.ones(1, 1, 256, 256, dtype=torch.uint8)
        tensors[prefix + "masked_bias"] = torch.tensor(-1e9)
        tensors[prefix + "rotary_emb.inv_freq"] = torch.full((8,), 7.0)  # wrong on purpose: it must not be used
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = {
        **{key: getattr(stock.config, key) for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")},
        **{key: getattr(stock.config, key) for key in ("intermediate_size", "vocab_size", "max_position_embeddings")},
        "model_type": "gpt_neox",
        "architectures": ["GPTNeoXForCausalLM"],
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "torch_dtype": "float16",
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype="auto")
    assert type(ours) is KVNeoXForCausalLM and ours.dtype == torch.float16
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ids = torch.randint(0, 97, (1, 40))
    with torch.no_grad():
        expected = GPTNeoXForCausalLM.from_pretrained(tmp_path).float().eval()(ids).logits
        assert relative_difference(ours.float().eval()(ids).logits, expected) < 1e-5


def test_adapt_converts_in_place():
    stock, _ = stock_and_ours(tiny_config(head_dim=80))
    ids = torch.randint(0, 97, (2, 40))
    with torch.no_grad():
        expected = stock(ids).logits
    before = {name: parameter.data_ptr() for name, parameter in stock.named_parameters()}
    ours = adapt(stock)
    assert ours is stock and type(ours) is KVNeoXForCausalLM and adapt(ours) is ours
    assert {name: parameter.data_ptr() for name, parameter in ours.named_parameters()} == before
    assert relative_difference(read_in_chunks(ours, ids, [25, 15]), expected) < 1e-5
    with pytest.raises(ValueError, match="model is a Linear"):
        adapt(torch.nn.Linear(2, 2))

    class Other(GPTNeoXForCausalLM):
        pass

    with pytest.raises(ValueError, match="model is a Other; allowed is transformers' GPTNeoXForCausalLM"):
        adapt(Other(tiny_config()))


def test_adapt_keeps_what_accelerate_hooked_in(tmp_path):
    """A model dispatched with part of it on disk: weights come and go around the adapted forward."""
    from accelerate import dispatch_model

    stock, ours = stock_and_ours(tiny_config())
    ids = torch.randint(0, 97, (1, 30))
    with torch.no_grad():
        expected = stock(ids).logits
    device_map = {"gpt_neox.embed_in": "cpu", "gpt_neox.emb_dropout": "cpu", "gpt_neox.rotary_emb": "cpu"}
    device_map |= {"gpt_neox.layers.0": "cpu", "gpt_neox.layers.1": "disk", "gpt_neox.final_layer_norm": "cpu"}
    dispatch_model(stock, {**device_map, "embed_out": "cpu"}, main_device="cpu", offload_dir=tmp_path)
    adapted = adapt(stock)
    assert adapted.model.layers[1].attention.query_key_value.weight.is_meta
    with torch.no_grad():
        assert relative_difference(adapted(ids).logits, expected) < 1e-5
        caches = DynamicCache(), DynamicCache()
        for model, cache in zip((adapted, ours), caches):
            with make_press("snapkv", 0.5, window_size=8)(model):  # asks q_proj of a layer whose weights are away
                model(ids, past_key_values=cache)
    for one, other in zip(caches[0].layers, caches[1].layers):
        assert one.keys.shape[2] == 15 and torch.allclose(one.keys, other.keys, atol=1e-5)
    assert _fingerprint(adapted) == _fingerprint(ours)
    press = make_press("adakv_snapkv", 0.5, window_size=8)
    said = [generate(model, ids, press=press, max_new_tokens=4).tokens for model in (adapted, ours)]
    nll = [streaming_nll(model, ids, n_sink=2, window=5) for model in (adapted, ours)]
    assert torch.equal(*said) and torch.allclose(*nll, atol=1e-5)


def test_captured_outputs_after_adapt_in_a_fresh_process():
    """What `output_attentions` records is registered when a model is built; an adapted one was never built by us."""
    script = """
        import torch
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM
        config = GPTNeoXConfig(vocab_size=50, hidden_size=64, num_hidden_layers=3, num_attention_heads=2,
                               intermediate_size=64, attn_implementation="eager", initializer_range=0.2)
        model, ids = GPTNeoXForCausalLM(config).eval(), torch.arange(12)[None]
        want = dict(output_attentions=True, output_hidden_states=True)
        with torch.no_grad():
            plain = GPTNeoXForCausalLM(config).eval()
            plain.load_state_dict(model.state_dict())
            expected = plain(ids, **want)
            import kvneox_lib
            got = kvneox_lib.adapt(model)(ids, **want)
        assert len(got.attentions) == 3 and len(got.hidden_states) == 4
        for one, other in zip(got.attentions + got.hidden_states, expected.attentions + expected.hidden_states):
            assert torch.allclose(one, other, atol=1e-5)
        print("same")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert done.stdout.strip() == "same", done.stderr


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_layers_of_different_length_read_many_tokens_as_one_by_one(implementation):
    _, ours = stock_and_ours(tiny_config(), implementation)
    ids = torch.randint(0, 97, (2, 60))
    logits = []
    for sizes in ([12], [1] * 12):
        cache = DynamicCache()
        with torch.no_grad(), make_press("pyramidkv", 0.5, window_size=2, beta=4)(ours):
            ours(ids[:, :48], past_key_values=cache)
        assert cache.get_seq_length(0) > cache.get_seq_length(1)
        position, parts = 48, []
        for chunk in ids[:, 48:].split(sizes, dim=1):
            positions = torch.arange(position, position + chunk.shape[1])[None]
            with torch.no_grad():
                parts.append(ours(chunk, past_key_values=cache, position_ids=positions).logits)
            position += chunk.shape[1]
        logits.append(torch.cat(parts, dim=1))
    assert relative_difference(logits[0], logits[1]) < 1e-5


def test_evicted_entries_are_hidden_alike_by_eager_and_sdpa_even_from_many_queries():
    """kvpress' own way, a fake key found by search, has no answer for many queries and none for eager."""
    _, ours = stock_and_ours(tiny_config())
    ids = torch.randint(0, 97, (2, 230))
    evicted = torch.rand(2, 2, 40) < 0.5
    evicted[:, :, 0] = False
    logits = {}
    for implementation in ("eager", "sdpa"):
        ours.config._attn_implementation = implementation
        cache = DynamicCache()
        with torch.no_grad():
            ours(ids[:, :40], past_key_values=cache)
            for layer in ours.model.layers:
                layer.self_attn.masked_key_indices = torch.nonzero(evicted, as_tuple=True)
            keys = cache.layers[0].keys.clone()
            logits[implementation] = ours(ids[:, 40:], past_key_values=cache).logits
        assert torch.equal(cache.layers[0].keys[:, :, :40], keys), "keys were overwritten by fake ones"
        assert ours.model.layers[0].self_attn.masked_key_indices is not None
    assert relative_difference(logits["eager"], logits["sdpa"]) < 1e-5
    with torch.no_grad():
        full = ours(ids).logits[:, 40:]
    assert relative_difference(logits["sdpa"], full) > 1e-2


def test_what_was_evicted_belongs_to_its_cache(demo, reading):
    """Two conversations on one model, and a copied cache: each is read as it was compressed."""
    contexts = [reading[:, :100], reading[:, 100:260], reading[:, 300:400]]
    next_token, alone = reading[:, 400:401], []

    def read(context, press):
        cache = DynamicCache()
        with torch.no_grad(), press(demo) if press else contextlib.nullcontext():
            demo(context, past_key_values=cache)
        return cache

    def go_on(cache, length):
        with torch.no_grad():
            return demo(next_token, past_key_values=cache, position_ids=torch.tensor([[length]])).logits

    names = (("adakv_snapkv", 0.5), ("critical_adakv_snapkv", 0.8))
    presses = [*(make_press(name, ratio, window_size=16) for name, ratio in names), None]
    for context, press in zip(contexts, presses):
        alone.append(go_on(read(context, press), context.shape[1]))
    caches = [read(context, press) for context, press in zip(contexts, presses)]
    copied = copy.deepcopy(caches[0])
    for cache, context, expected in zip([*caches, copied], [*contexts, contexts[0]], [*alone, alone[0]]):
        assert torch.equal(go_on(cache, context.shape[1]), expected)
    assert not torch.allclose(alone[0], go_on(read(contexts[0], None), 100), atol=1e-2)


def test_a_used_model_can_be_copied_and_pickled():
    _, ours = stock_and_ours(tiny_config())
    cache, ids = DynamicCache(), torch.randint(0, 97, (1, 20))
    with torch.no_grad():
        expected = ours(ids, past_key_values=cache).logits
        for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(again(ids).logits, expected)


def test_adapt_refuses_heads_of_another_size_than_their_frequencies():
    stock = GPTNeoXForCausalLM(tiny_config(head_dim=64))
    assert adapt(stock).config.head_dim == 64
    config = tiny_config(head_dim=64)
    config.head_dim = 32
    with pytest.raises(ValueError, match="head_dim=32: with hidden_size=128 and num_attention_heads=2 allowed is 64"):
        adapt(GPTNeoXForCausalLM(config))


PADDED = ("knorm", "adakv_snapkv", "think", "simlayerkv", "dms_leverage", "kvzip", "kvcompose")
PADDED += ("kvcompose_unstructured", "ratio_decoding_knorm", "cam_streaming_llm", "prefill_decoding_knorm")


@pytest.mark.parametrize("name", PADDED)
def test_padding_under_compression_is_refused(demo, reading, name):
    """Also where no entry is removed, and where all happens when the context closes, or while decoding."""
    ids = reading[:, :200].view(2, 100)
    mask = torch.ones_like(ids)
    mask[0, :10] = 0
    with pytest.raises(ValueError, match="attention_mask marks padding, but"), make_press(name)(demo):
        demo.generate(ids, attention_mask=mask, max_new_tokens=3)
    with torch.no_grad(), pytest.raises(ValueError, match="attention_mask marks padding, but"), make_press(name)(demo):
        demo.model(ids, mask, past_key_values=DynamicCache())
    assert demo.config._attn_implementation == "sdpa"


def test_padding_without_a_press_and_a_full_mask_with_one_are_welcome(demo, reading):
    ids, settings = reading[:, :120].view(1, 120), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    alone = demo.generate(ids[:, 20:], **settings)[:, 100:]
    mask = torch.ones_like(ids)
    with make_press("knorm", 0.3)(demo):
        compressed = demo.generate(ids, **settings)
        assert torch.equal(demo.generate(ids, attention_mask=mask, **settings), compressed)
    mask[:, :20] = 0
    assert torch.equal(demo.generate(ids, attention_mask=mask, **settings)[:, 120:], alone)


def test_generate_under_a_press_goes_on_at_true_positions(demo, reading):
    """`model.generate` does right what a bare call without position_ids does wrong."""
    ids = reading[:, :120]
    with make_press("knorm", 0.5)(demo):
        generated = demo.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)[:, 120:]
    cache = DynamicCache()
    with torch.no_grad():
        with make_press("knorm", 0.5)(demo):
            token = demo(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        by_hand = [token]
        for step in range(7):
            position = torch.tensor([[120 + step]])
            token = demo(token, past_key_values=cache, position_ids=position).logits.argmax(-1)
            by_hand.append(token)
    assert torch.equal(generated, torch.cat(by_hand, dim=1))


def test_flash_attention_without_its_package_says_what_to_do():
    with pytest.raises(ImportError, match="pip install flash-attn.*sdpa"):
        AutoModelForCausalLM.from_pretrained(DEMO, attn_implementation="flash_attention_2")


# -- the kvpress pipeline -----------------------------------------------------------------------------------------


def expected_answer(model, tokenizer, context: str, question: str, prefix: str, n: int) -> str:
    """The stock model's greedy continuation of the same ids, with its whole cache."""
    parts = [tokenizer.bos_token + context, question + "\n" + prefix]
    ids = torch.cat([tokenizer.encode(part, return_tensors="pt", add_special_tokens=False) for part in parts], dim=1)
    stock = GPTNeoXForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    generated = stock.generate(ids, max_new_tokens=n, do_sample=False)
    return tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("prefix", ["", "Well,"])
def test_pipeline_without_compression_answers_as_stock(demo, tokenizer, prefix):
    pipe = pipeline("kv-press-text-generation", model=demo, tokenizer=tokenizer)
    context = "It was a dark and stormy night; the rain fell in torrents, and the sea rose. " * 3
    questions = ["Who was there?", "What fell?"]
    answers = pipe(context, questions=questions, answer_prefix=prefix, max_new_tokens=8)["answers"]
    assert answers == [expected_answer(demo, tokenizer, context, question, prefix, 8) for question in questions]
    single = pipe(
        context, question=questions[1], answer_prefix=prefix, press=make_press("snapkv", 0.0), max_new_tokens=8
    )
    assert single["answer"] == answers[1]
    without = pipe(context, max_new_tokens=8, answer_prefix=prefix)["answer"]
    assert without == expected_answer(demo, tokenizer, context, "", prefix, 8)


def test_pipeline_truncates_and_loads_by_itself_with_a_device_map(tokenizer):
    pipe = pipeline("kv-press-text-generation", model=str(DEMO), device_map="auto", dtype=torch.float32)
    assert type(pipe.model) is KVNeoXForCausalLM
    text = "The sea rose and the rain fell in torrents on the old town. " * 8
    short = tokenizer.decode(tokenizer(tokenizer.bos_token + text).input_ids[1:40])
    press = make_press("knorm", 0.3)
    assert (
        pipe(text, question="Why?", press=press, max_context_length=40, max_new_tokens=6)["answer"]
        == pipe(short, question="Why?", press=press, max_new_tokens=6)["answer"]
    )


def test_pipeline_finds_the_tokenizer_of_a_folder(demo):
    pipe = pipeline("kv-press-text-generation", model=demo, tokenizer=AutoTokenizer.from_pretrained(DEMO))
    long = "A passage about ships, storms and harbours. " * 20
    compressed = pipe(long, question="What?", press=make_press("streaming_llm", 0.9), max_new_tokens=12)["answer"]
    assert compressed != pipe(long, question="What?", max_new_tokens=12)["answer"], "90 % evicted, and nothing changed"


def test_pipeline_with_a_quantized_cache(demo, tokenizer):
    """Four bits are near enough that the first words stay; the cache really holds quantized tensors."""
    pytest.importorskip("optimum.quanto", reason="the extra `quant` is not installed")
    if shutil.which("ninja") is None or shutil.which("c++") is None:
        pytest.skip("optimum-quanto compiles on first use: it needs ninja and a C++ compiler on PATH")
    from transformers import QuantizedCache

    pipe = pipeline("kv-press-text-generation", model=demo, tokenizer=tokenizer)
    context = "It was a dark and stormy night; the rain fell in torrents, and the sea rose. " * 12
    press = make_press("snapkv", 0.5)
    caches = [QuantizedCache(backend="quanto", config=demo.config, nbits=4) for _ in range(2)]
    quantized = pipe(context, question="What fell?", press=press, cache=caches[0], max_new_tokens=5)["answer"]
    assert quantized == pipe(context, question="What fell?", press=press, max_new_tokens=5)["answer"]
    ids = tokenizer(context, return_tensors="pt").input_ids
    with torch.no_grad(), press(demo):
        demo(ids, past_key_values=caches[1])
    assert caches[1].get_seq_length() == ids.shape[1] // 2
    assert caches[1].layers[0]._quantized_keys.qtype.bits == 4


def test_what_was_evicted_can_be_read_after_its_cache_is_gone_and_acts_on_no_other(demo, reading):
    attentions = [layer.self_attn for layer in demo.model.layers]
    ids, longer = reading[:, :120], reading[:, 200:420]
    other = DynamicCache()
    with torch.no_grad():
        demo(longer, past_key_values=other)
        expected = demo(reading[:, :1], past_key_values=copy.deepcopy(other)).logits
        cache = DynamicCache()
        with make_press("adakv_snapkv", 0.5)(demo):
            demo(ids, past_key_values=cache)
        evicted = [attention.masked_key_indices for attention in attentions]
        assert all(len(indices[0]) == 4 * 60 for indices in evicted)
        del cache
        gc.collect()
        for attention, indices in zip(attentions, evicted):
            assert attention.masked_key_indices is indices
        assert torch.equal(demo(reading[:, :1], past_key_values=other).logits, expected)
        demo(ids)
    assert all(attention.masked_key_indices is None for attention in attentions)  # a new prefill


def test_a_copy_of_a_model_has_read_nothing():
    _, model = stock_and_ours(tiny_config())
    ids = torch.randint(0, 97, (1, 100))
    with torch.no_grad(), make_press("adakv_snapkv", 0.5)(model):
        model(ids)
    assert model.model.layers[0].self_attn.masked_key_indices is not None
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.model.layers[0].self_attn.masked_key_indices is None
        assert torch.equal(twin(ids).logits, model(ids).logits)
