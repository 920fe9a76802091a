"""Query statistics against direct computations on the stock model."""

import socket

import pytest
import torch
from conftest import DEMO
from transformers import AutoModelForCausalLM, GPTNeoXForCausalLM

from kvneox_lib import make_press
from kvneox_lib.measures.prefill import prefill
from kvneox_lib.neox.modeling import half_split
from kvneox_lib.presses import calibration


@pytest.fixture(scope="module")
def stock_queries(reading):
    """Queries (layers, heads, tokens, D) before and after rotation, read off inside the stock attention."""
    import transformers.models.gpt_neox.modeling_gpt_neox as neox

    stock = GPTNeoXForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    plain, rotated, original = [], [], neox.apply_rotary_pos_emb

    def spy(q, k, cos, sin):
        turned = original(q, k, cos, sin)
        plain.append(half_split(q[0], 16))
        rotated.append(half_split(turned[0][0], 16))
        return turned

    neox.apply_rotary_pos_emb = spy
    try:
        with torch.no_grad():
            stock(reading[:, :300])
    finally:
        neox.apply_rotary_pos_emb = original
    return torch.stack(plain)[:, :, 4:].double(), torch.stack(rotated)[:, :, 4:].double()


def test_statistics_are_those_of_the_stock_models_queries(demo, reading, stock_queries):
    measured = calibration._measure(demo, [reading[:, :300]])
    plain, rotated = stock_queries
    assert torch.allclose(measured.mean.double(), plain.mean(2), atol=1e-4)
    for layer in range(6):
        for head in range(4):
            covariance = torch.cov(plain[layer, head].T, correction=0)
            assert torch.allclose(measured.covariance[layer, head].double(), covariance, atol=1e-3)
            main = torch.linalg.svd(rotated[layer, head], full_matrices=False).Vh[0]
            main = main * (rotated[layer, head].mean(0) @ main).sign()
            assert float(main.detach() @ measured.direction[layer, head].double()) > 0.9999
    assert (measured.reach > 0).all() and (measured.reach <= 1).all()


def test_reach_tells_far_from_near(demo):
    """A head whose mean query and key only match when close together looks back less than one that looks anywhere."""
    n_layers, heads, dim = 6, 4, 64
    query, key = (torch.zeros(n_layers, heads, dim, dtype=torch.float64) for _ in range(2))
    query[:, 0, :1] = key[:, 0, :1] = 30  # rotary dimension of the highest frequency, equal phase: near
    reach = calibration._reach(demo, query, key)
    assert torch.allclose(reach[:, 1], torch.full((n_layers,), 0.5, dtype=torch.float64), atol=0.01)  # attends evenly
    assert (reach[:, 0] != reach[:, 1]).all()


def test_cached_statistics_are_read_back_and_a_damaged_file_is_replaced(demo, monkeypatch, tmp_path):
    monkeypatch.setenv("KVNEOX_CACHE", str(tmp_path))
    monkeypatch.setattr(calibration, "MAX_WINDOWS", 1)
    first = calibration.query_statistics(demo)
    (file,) = tmp_path.iterdir()
    with monkeypatch.context() as patched:
        patched.setattr(calibration, "_measure", lambda *_: pytest.fail("measured again"))
        assert torch.equal(calibration.query_statistics(demo).mean, first.mean)
    file.write_bytes(file.read_bytes()[:1000])
    assert torch.equal(calibration.query_statistics(demo).mean, first.mean)
    assert list(tmp_path.iterdir()) == [file]


def test_other_weights_have_other_statistics(demo):
    other = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    assert calibration._fingerprint(other) == calibration._fingerprint(demo)
    other.model.layers[2].attention.dense.bias.data += 1e-3
    assert calibration._fingerprint(other) != calibration._fingerprint(demo)


def test_nothing_goes_online(demo, reading, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was tried"))
    for name in ("qfilter", "expected_attention_stats", "duo_attention"):
        prefill(demo, reading[:, :400], make_press(name))


def test_a_model_without_tokenizer_is_told_so():
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    model.config.name_or_path = "/no/such/folder"
    model.model.layers[0].attention.dense.bias.data += 1  # weights that no cache knows
    with pytest.raises(ValueError, match="holds no tokenizer.*load_model sets it"), make_press("qfilter")(model):
        pass


def test_qfilter_ranks_keys_by_the_attention_they_get(demo, reading):
    """Keys with a high score must on average get more attention than those with a low one, or the sign is wrong."""
    demo.config._attn_implementation = "eager"
    with torch.no_grad():
        attentions = demo(reading[:, 5000:5400], output_attentions=True).attentions
    demo.config._attn_implementation = "sdpa"
    from kvneox_lib.measures.survivors import kept_positions

    kept = kept_positions(demo, reading[:, 5000:5400], make_press("qfilter", 0.5))
    last = torch.stack(attentions)[:, :, :, -100:, :300].mean(3)  # what the last queries see of the first 300
    inside = (last * kept[..., :300]).sum(-1) / kept[..., :300].sum(-1)
    outside = (last * ~kept[..., :300]).sum(-1) / (~kept[..., :300]).sum(-1)
    assert (inside.mean() > 1.2 * outside.mean()).item()


def test_a_cache_that_cannot_be_written_costs_time_and_not_the_run(demo, reading, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "_calibration_windows", lambda model: [reading[:, :200]])
    (tmp_path / "file").write_text("a file where a folder should be")
    monkeypatch.setenv("KVNEOX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="query statistics are not cached: .*KVNEOX_CACHE"):
        cache = prefill(demo, reading[:, :200], make_press("qfilter", 0.5))
    assert cache.get_seq_length() == 100
