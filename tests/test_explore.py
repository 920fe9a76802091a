"""What notebook 06 shows is what the studies measure, and its page and widgets say so readably."""

from html.parser import HTMLParser

import pytest
import torch

from kvneox_lib import continuation_nll, make_press
from kvneox_lib.inputs.text import Text
from kvneox_lib.inputs.weights import LoadedModel
from kvneox_lib.measures.explore import CHANGED, LATER, ROTATED, excerpt, explore, token_texts
from kvneox_lib.measures.prefill import prefill
from kvneox_lib.pages import explore_page
from kvneox_lib.pages.explorer import OWN_TEXT, Explorer
from kvneox_lib.studies import records
from kvneox_lib.studies.explore import record_exploration

N_CONTEXT = 160
ASKED = {"model": "demo", "dataset": "python-docs", "context_length": 160, "continuation_length": 12}


@pytest.fixture(scope="module")
def ids(reading):
    return reading[:, 3000 : 3000 + N_CONTEXT + 12]


def look(demo, tokenizer, ids, name: str, ratio: float = 0.5):
    return explore(demo, tokenizer, ids, n_context=N_CONTEXT, press=make_press(name, ratio))


def test_the_map_of_streaming_llm_is_known_in_closed_form(demo, tokenizer, ids):
    kept = look(demo, tokenizer, ids, "streaming_llm", 0.75).kept
    assert kept.shape == (6, 4, N_CONTEXT)
    expected = torch.zeros(N_CONTEXT, dtype=torch.bool)
    expected[:4] = expected[-(N_CONTEXT // 4 - 4) :] = True
    assert torch.equal(kept, expected.expand_as(kept))


def test_a_press_that_rotates_is_mapped_by_the_values_it_kept(demo, tokenizer, ids):
    """Values are not rotated; above the first layer no two of them are the same."""
    found, press = look(demo, tokenizer, ids, "key_rerotation_snapkv"), make_press("key_rerotation_snapkv")
    full, some = (prefill(demo, ids[:, :N_CONTEXT], one) for one in (None, press))
    for layer in range(1, 6):
        values, kept = full.layers[layer].values[0], found.kept[layer]
        assert torch.equal(torch.stack([head[mask] for head, mask in zip(values, kept)]), some.layers[layer].values[0])


def test_what_cannot_be_mapped_is_said(demo, tokenizer, ids):
    for name, remark in [("think", CHANGED), ("finch", ROTATED)]:
        found = look(demo, tokenizer, ids, name)
        assert found.kept is None and found.remark == remark and remark in explore_page.token_map(found)
    found = look(demo, tokenizer, ids, "prefill_decoding_knorm", 0.75)
    assert found.kept.float().mean() == 0.25 and found.remark == LATER
    for name in ("kvcompose", "adakv_snapkv"):
        found = look(demo, tokenizer, ids, name)
        assert float(found.kept.float().mean()) == pytest.approx(found.after.kept_fraction), name
        assert found.remark == ""


def test_readings_agree_with_the_studies(demo, tokenizer, ids):
    found = look(demo, tokenizer, ids, "knorm", 0.9)
    first = ids[0, N_CONTEXT + 1]
    for reading, press in ((found.before, None), (found.after, make_press("knorm", 0.9))):
        nll = continuation_nll(demo, ids, n_context=N_CONTEXT, press=press)[0]
        assert reading.nll == pytest.approx(float(nll.mean()), rel=1e-5)
        assert float(-reading.next_token[first].log()) == pytest.approx(float(nll[0]), abs=1e-4)
        assert reading.continuation[0] == tokenizer.decode([reading.next_token.argmax()])
        assert len(reading.continuation) == len(found.truth) == 11
    assert found.after.kv_bytes < 0.2 * found.before.kv_bytes
    expected = torch.nn.functional.kl_div(
        found.after.next_token.log(), found.before.next_token.log(), log_target=True, reduction="sum"
    )
    assert found.kl_nat == pytest.approx(float(expected), rel=1e-3) and found.kl_nat > 0.01


def test_no_press_changes_nothing(demo, tokenizer, ids):
    found = explore(demo, tokenizer, ids, n_context=N_CONTEXT, press=None)
    assert found.kept.all() and found.kl_nat == 0 and found.before.continuation == found.after.continuation
    assert "逐字相同" in explore_page.summary(found) and "<u>" not in explore_page.continuations(found)


def test_texts_of_tokens_put_together_are_the_text(tokenizer):
    text = "naïve 中文 🙂\n\tend"
    pieces = token_texts(tokenizer, tokenizer(text).input_ids)
    assert "·" in pieces and "".join(pieces).replace("·", "") == text
    assert token_texts(tokenizer, tokenizer("🙂").input_ids[:-1])[-1] == "·"  # never completed


def test_an_excerpt_fits_the_text_and_the_model(demo, tokenizer):
    loaded, text = (
        LoadedModel(demo, tokenizer, "demo", "bundled", ""),
        Text(["one two three " * 40], [""], "own", "own"),
    )
    all_ids = tokenizer(text.documents[0]).input_ids
    places = {"context_length": 20, "continuation_length": 5}
    for position, start in ((0, 0), (1, len(all_ids) - 25), (0.5, round((len(all_ids) - 25) / 2))):
        ids, n_context = excerpt(text, loaded, position=position, **places)
        assert ids.tolist() == [all_ids[start : start + 25]] and n_context == 20
    ids, n_context = excerpt(text, loaded, position=0.3, context_length=10**6, continuation_length=5)
    assert ids.tolist() == [all_ids] and n_context == len(all_ids) - 5
    for wrong, message in [
        ({"position": 1.5}, "position=1.5: must be from 0"),
        ({"position": True}, "position=True"),
        ({"continuation_length": 1}, "continuation_length=1"),
        ({"continuation_length": 10**4}, "continuation_length=10000: leaves no context"),
        ({"context_length": 0}, "context_length=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            excerpt(text, loaded, **{"position": 0, **places, **wrong})


# -- the page ---------------------------------------------------------------------------------------------------------


class TextOf(HTMLParser):
    def __init__(self, page: str):
        super().__init__()
        self.text, self.tags = "", set()
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_markup_of_the_text_as_text(demo, tokenizer):
    text = "<script>alert(1)</script> & <b>bold</b>\n\tx" * 8
    ids = tokenizer(text, return_tensors="pt").input_ids
    found = explore(demo, tokenizer, ids, n_context=ids.shape[1] - 12, press=make_press("knorm"))
    parts = [explore_page.token_map, explore_page.continuations, explore_page.next_tokens, explore_page.figures]
    page = TextOf("".join(part(found) for part in parts))
    assert page.tags <= {"div", "span", "table", "tr", "td", "th", "b", "u"}
    shown = "".join(found.context).replace("\n", "⏎\n").replace("\t", "⇥\t")
    assert "<script>alert(1)</script> & <b>" in shown and shown in page.text


def luminance(colour: str) -> float:
    """As WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_shades_are_readable_and_told_apart_without_colour():
    papers = []
    for share in (0, *(i / 24 for i in range(1, 25))):
        rules = dict(rule.split(":") for rule in explore_page.shade(share).split(";"))
        paper, ink = luminance(rules["background"]), luminance(rules["color"])
        assert (paper + 0.05) / (ink + 0.05) >= 4.5, share
        papers.append(paper)
    assert papers == sorted(papers, reverse=True) and papers[0] == pytest.approx(1) and papers[-1] < 0.45


def test_the_map_can_be_of_a_layer_and_a_head(demo, tokenizer, ids):
    found = look(demo, tokenizer, ids, "tova", 0.75)
    n_heads = {(None, None): 24, (2, None): 4, (2, 3): 1, (None, 3): 6}
    for (layer, head), n in n_heads.items():
        page = explore_page.token_map(found, layer, head)
        mask = found.kept if layer is None else found.kept[layer : layer + 1]
        mask = mask if head is None else mask[:, head : head + 1]
        for place in (0, 77, N_CONTEXT - 1):
            assert f'title="第 {place} 个词元：{n} 个头中 {int(mask[:, :, place].sum())} 个留下了它"' in page


# -- the widgets ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def explorer(tmp_path_factory):
    made = record_exploration(**ASKED, output_dir=str(tmp_path_factory.mktemp("out")))
    defaults = {name: None for name in ("subset", "sample_idx", "data_dir")} | {"split": "test", "weights": "auto"}
    asked = {**defaults, "attn_implementation": "auto", "dtype": "auto", "device": "auto", "seed": 0, **ASKED}
    return Explorer(made, {**asked, "press": "snapkv", "compression_ratio": 0.75, "position": 0.5}), made


def test_the_record_of_the_default_choice(explorer):
    _, made = explorer
    (record,) = records.load_records(made.path.parent).to_dict("records")
    assert record["run_id"].startswith("python-docs__demo__snapkv__0.75__") and record["context_tokens"] == 160
    assert record["nll_mean"] == made.exploration.after.nll and record["n_tokens"] == 11
    assert record["kept_fraction"] == 0.25 and record["kv_bytes"] == made.exploration.after.kv_bytes


def test_controls_change_what_is_shown(explorer):
    shown, made = explorer
    assert shown.found is made.exploration and shown.map.value == explore_page.token_map(made.exploration)
    shown.ratio.value = 0.5
    assert shown.found.after.kept_fraction == 0.5
    shown.press.value = "streaming_llm"
    kept = shown.found.kept
    assert torch.equal(kept, kept[:1, :1].expand_as(kept)) and "streaming_llm" in shown.status.value
    before = shown.found
    shown.layer.value, shown.head.value = 2, 3
    assert shown.found is before and shown.map.value == explore_page.token_map(before, 2, 3)
    assert not shown.ratio.disabled
    shown.press.value = "think"
    assert shown.ratio.disabled and CHANGED in shown.map.value and "key_channel_compression_ratio" in shown.status.value
    shown.press.value = "observed_attention"  # eager, and back
    assert shown.found.kept.float().mean() == 0.5 and shown.loaded.model.config._attn_implementation == "sdpa"
    text = shown.found.context
    shown.position.value = 0.1
    assert shown.found.context != text and len(shown.found.context) == 160


def test_own_text_and_what_fails(explorer):
    shown, _ = explorer
    shown.press.value, shown.dataset.value = "snapkv", OWN_TEXT
    assert shown.found is None and shown.map.value == "" and "算不出来" in shown.status.value  # there is none yet
    shown.position.value = 0
    shown.layer.value = 0  # nothing to draw, nothing to fail
    shown.own_text.value = "A <b>word</b>. " * 40
    assert "".join(shown.found.context).startswith("A <b>word</b>.") and OWN_TEXT in shown.status.value
    shown.context_length.value = 32
    assert shown.found is None and "算不出来" in shown.status.value  # SnapKV looks at the last 64
    shown.press.value, shown.dataset.value = "knorm", "python-docs"
    assert shown.found is not None and len(shown.found.context) == 32
