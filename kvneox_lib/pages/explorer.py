"""The widgets of notebook 06: choose model, text, press and ratio, and see an `Exploration` of them.

Needs ipywidgets, which comes with the extra `notebooks`.
"""

from contextlib import contextmanager
from html import escape

import ipywidgets as widgets

from kvneox_lib.inputs.text import HUB, Text, load_text
from kvneox_lib.inputs.weights import PYTHIA, load_model
from kvneox_lib.measures.explore import excerpt, explore
from kvneox_lib.pages import explore_page
from kvneox_lib.presses.by_name import press_names, press_row
from kvneox_lib.studies.explore import Explored
from kvneox_lib.studies.plan import at_ratios, own_ratios
from kvneox_lib.studies.runs import made_presses

OWN_TEXT = "自己输入"
EVERY = "全部"


class Explorer:
    """`box` is what to display. A new value of a control makes a new `found`; layer and head only draw it anew."""

    def __init__(self, explored: Explored, asked: dict):
        """`asked`: the parameters of `record_exploration` that made `explored`, with which it begins."""
        self.asked, self.loaded, self.text, self.found = asked, explored.loaded, explored.text, explored.exploration
        self.model = _choice("模型", [asked["model"], "demo", *PYTHIA], asked["model"])
        self.dataset = _choice("文本", [asked["dataset"], "python-docs", *HUB, OWN_TEXT], asked["dataset"])
        self.own_text = widgets.Textarea(
            placeholder="选“自己输入”后在这里粘贴文字（不少方法要求上下文至少 65 个词元），点别处即更新",
            continuous_update=False,
            layout=widgets.Layout(width="98%", height="6em"),
        )
        self.press = _choice("press", press_names(), asked["press"])
        self.ratio = _slider(widgets.FloatSlider, "压缩率", asked["compression_ratio"], 0, 0.99, 0.01)
        self.context_length = _slider(widgets.IntSlider, "上下文", asked["context_length"], 16, 4096, 16)
        self.position = _slider(widgets.FloatSlider, "文中位置", asked["position"], 0, 1, 0.01)
        self.layer, self.head = _choice("层", [EVERY], EVERY), _choice("头", [EVERY], EVERY)
        self.status, self.map, self.results = widgets.HTML(), widgets.HTML(), widgets.HTML()
        for control in (self.press, self.ratio, self.context_length, self.position):
            control.observe(self._look, "value")
        self.model.observe(self._load_model, "value")
        for control in (self.dataset, self.own_text):
            control.observe(self._load_text, "value")
        for control in (self.layer, self.head):
            control.observe(self._draw_map, "value")
        choices = [self.model, self.dataset, self.press, self.ratio, self.context_length, self.position]
        rows = [widgets.HBox(choices[:3]), widgets.HBox(choices[3:]), self.own_text, self.status]
        self.box = widgets.VBox([*rows, widgets.HBox([self.layer, self.head]), self.map, self.results])
        self._show()

    def _load_model(self, change) -> None:
        self.status.value = "正在取模型……"
        with self._failures():
            more = {name: self.asked[name] for name in ("weights", "attn_implementation", "dtype", "device", "seed")}
            self.loaded = load_model(self.model.value, **more)
            self._look(change)

    def _load_text(self, change) -> None:
        with self._failures():
            name = self.dataset.value
            if name == OWN_TEXT:
                self.text = Text([self.own_text.value], [""], OWN_TEXT, OWN_TEXT)
            elif name in HUB:
                more = {key: self.asked[key] for key in ("subset", "split", "sample_idx")}
                more["data_dir"] = self.asked["data_dir"] if name == self.asked["dataset"] else None
                self.text = load_text(name, **more, fallback="python-docs" if self.asked["weights"] == "auto" else None)
            else:
                self.text = load_text(name)
            self._look(change)

    def _look(self, change) -> None:
        self.status.value = "正在计算……"
        with self._failures():
            input_ids, n_context = excerpt(
                self.text,
                self.loaded,
                position=self.position.value,
                context_length=self.context_length.value,
                continuation_length=self.asked["continuation_length"],
            )
            model, runs, asked = self.loaded.model, at_ratios(self.press.value, self.ratio.value), self.asked
            with made_presses(model, runs, asked["attn_implementation"], asked["seed"]) as (press,):
                self.found = explore(model, self.loaded.tokenizer, input_ids, n_context=n_context, press=press)
            self._show()

    @contextmanager
    def _failures(self):
        """What fails is said where the user looks; what was shown before is of something else, and goes away."""
        try:
            yield
        except Exception as error:
            self.found = None
            self.status.value = f"<b>这个组合算不出来：</b>{escape(str(error) or type(error).__name__)}"
            self.map.value = self.results.value = ""

    def _show(self) -> None:
        found, row = self.found, press_row(self.press.value)
        self.ratio.disabled = own_ratios(row.name, 0.5) != [0.5]
        self._offer_layers_and_heads()
        self._draw_map(None)
        parts = (explore_page.figures, explore_page.next_tokens, explore_page.continuations)
        self.results.value = "".join(part(found) for part in parts)
        strength = f"强度由 {row.strength} 决定。" if self.ratio.disabled and row.name != "no_press" else ""
        self.status.value = escape(
            f"模型 {self.loaded.name}（权重：{self.loaded.weights}），文本 {self.text.name}，上下文 "
            f"{len(found.context)} 个词元。{row.name}：{row.about}。{strength}{explore_page.summary(found)}"
        )

    def _offer_layers_and_heads(self) -> None:
        """Of another model all of them are shown first: a layer chosen before may not be there."""
        config, self.drawing = self.loaded.model.config, False  # each change of a control would draw, the other one old
        for control, n in ((self.layer, config.num_hidden_layers), (self.head, config.num_attention_heads)):
            if len(control.options) != n + 1:
                control.options = [EVERY, *range(n)]
        self.drawing = True

    def _draw_map(self, change) -> None:
        if self.found is None or not self.drawing:
            return
        layer, head = (None if control.value == EVERY else control.value for control in (self.layer, self.head))
        self.map.value = explore_page.token_map(self.found, layer, head)


def _choice(label: str, options: list, value) -> widgets.Dropdown:
    return widgets.Dropdown(description=label, options=list(dict.fromkeys(options)), value=value)


def _slider(kind, label: str, value, low, high, step):
    """Moved, it acts when let go."""
    return kind(description=label, value=value, min=low, max=max(high, value), step=step, continuous_update=False)
