"""An `Exploration` as HTML, for notebook 06. Every box brings its own ink and paper, so that it reads the same in light
and dark themes; shares are told by how dark one hue is, which the colour-blind see too."""

from html import escape

import torch

from kvneox_lib.measures.explore import Exploration, Reading
from kvneox_lib.studies.explore import Explored

PAPER, INK, FAINT = "#ffffff", "#111111", "#767676"
KEPT = (0x56, 0xB4, 0xE9)  # sky blue: INK stays readable on it
BOX = f"background:{PAPER};color:{INK};border:1px solid {FAINT};padding:8px;margin:4px 0;"
TEXT = "font:13px/1.9 sans-serif;white-space:pre-wrap;overflow-wrap:anywhere;max-height:30em;overflow:auto;"
CELL = f"padding:2px 8px;border:0;background:{PAPER};color:{INK};vertical-align:top;"


def title(explored: Explored, press: str) -> str:
    """What is looked at; the names come from outside."""
    model, weights, text, press = map(
        escape, (explored.loaded.name, explored.loaded.weights, explored.text.name, press)
    )
    n, said = len(explored.exploration.context), escape(summary(explored.exploration))
    what = f"模型 <b>{model}</b>（权重：{weights}），文本 <b>{text}</b>，上下文 {n} 个词元，press <b>{press}</b>"
    return f"<p>{what}。{said}</p>"


def token_map(found: Exploration, layer: int | None = None, head: int | None = None) -> str:
    """The context, each token shaded by the share of heads that kept it: of all, of a layer, of that head in it or in
    every layer."""
    remark = f'<div style="{BOX}">{escape(found.remark)}</div>' if found.remark else ""
    if found.kept is None:
        return remark
    chosen = found.kept[slice(None) if layer is None else [layer]][:, slice(None) if head is None else [head]]
    counts, n = chosen.sum((0, 1)).tolist(), chosen[:, :, 0].numel()
    words = "".join(_token(text, i, count, n) for i, (text, count) in enumerate(zip(found.context, counts)))
    return f'{remark}{_legend()}<div style="{BOX}{TEXT}">{words}</div>'


def _token(text: str, place: int, count: int, n: int) -> str:
    title = f"第 {place} 个词元：{n} 个头中 {count} 个留下了它"
    return f'<span title="{title}" style="{shade(count / n)}">{visible(text)}</span>'


def shade(share: float) -> str:
    """What every head evicted is grey on white: that shows without colours, too."""
    colour = "".join(f"{round(255 + (full - 255) * share):02x}" for full in KEPT)
    return f"background:#{colour};color:{INK if share else FAINT}"


def visible(text: str) -> str:
    """Escaped for HTML; line breaks and tabs leave a mark beside what they do."""
    return escape(text).replace("\r", "␍").replace("\n", "⏎\n").replace("\t", "⇥\t")


def _legend() -> str:
    steps = "".join(f'<span style="{shade(i / 4)};padding:2px 6px">{i / 4:.0%}</span>' for i in range(5))
    return f'<div style="{BOX}font:13px sans-serif">留下它的头所占的比例：{steps}　（鼠标停在词元上看个数）</div>'


def next_tokens(found: Exploration) -> str:
    """The likeliest next tokens, with and without compression."""
    rows = "".join(
        f'<tr><td style="{CELL}white-space:pre">{visible(text)}</td>{_probability(before)}{_probability(after)}</tr>'
        for text, before, after in found.next_tokens
    )
    head = "".join(f'<th style="{CELL}text-align:left">{name}</th>' for name in ("词元", "不压缩", "压缩后"))
    return f'<div style="{BOX}"><table><tr>{head}</tr>{rows}</table></div>'


def _probability(share: float) -> str:
    bar = f"linear-gradient(to right,rgb{KEPT} {share:.1%},{PAPER} {share:.1%})"
    return f'<td style="{CELL}min-width:12em;background:{bar};text-align:left">{share:.1%}</td>'


def continuations(found: Exploration) -> str:
    """How the text goes on, and how the model does; what it says otherwise after compression is bold and underlined."""
    before, after = found.before.continuation, found.after.continuation
    differs = [place >= len(before) or before[place] != text for place, text in enumerate(after)]
    columns = {"原文": (found.truth, []), "模型，不压缩": (before, []), "模型，压缩后": (after, differs)}
    cells = "".join(
        f'<td style="{CELL}width:33%;text-align:left"><b>{name}</b><div style="{TEXT}">{_marked(*column)}</div></td>'
        for name, column in columns.items()
    )
    return f'<div style="{BOX}"><table style="width:100%;table-layout:fixed"><tr>{cells}</tr></table></div>'


def _marked(texts: list[str], marks: list[bool]) -> str:
    marks = marks or [False] * len(texts)
    return "".join(f"<b><u>{visible(text)}</u></b>" if mark else visible(text) for text, mark in zip(texts, marks))


def figures(found: Exploration) -> str:
    rows = {
        "KV 缓存（MB）": lambda reading: f"{reading.kv_bytes / 1e6:.2f}",
        "看得见的比例": lambda reading: f"{reading.kept_fraction:.3f}",
        "原文续文的 nll（nat/词元）": lambda reading: f"{reading.nll:.3f}",
        "读完上下文到首词元（毫秒）": lambda reading: f"{1e3 * reading.prefill_s:.0f}",
        "解码每步（毫秒）": _step,
    }
    cells = "".join(
        f'<tr><td style="{CELL}">{name}</td>'
        + "".join(f'<td style="{CELL}text-align:right">{show(one)}</td>' for one in (found.before, found.after))
        + "</tr>"
        for name, show in rows.items()
    )
    head = "".join(f'<th style="{CELL}">{name}</th>' for name in ("", "不压缩", "压缩后"))
    return f'<div style="{BOX}"><table><tr>{head}</tr>{cells}</table></div>'


def _step(reading: Reading) -> str:
    return "—" if reading.step_s is None else f"{1e3 * reading.step_s:.1f}"


def summary(found: Exploration) -> str:
    """One sentence or two, in plain text."""
    same = 0
    for one, other in zip(found.before.continuation, found.after.continuation):
        if one != other:
            break
        same += 1
    whole = same == len(found.before.continuation) == len(found.after.continuation)
    said = "续写与不压缩逐字相同" if whole else f"续写从第 {same + 1} 个词元起与不压缩不同"
    kept = "" if found.kept is None else f"{_lost(found.kept):.0%} 的词元没有一个头留下；"
    return f"{kept}下一个词元的分布与不压缩相差 {found.kl_nat:.4f} nat（KL 散度），{said}。"


def _lost(kept: torch.Tensor) -> float:
    return float((~kept.flatten(0, 1).any(0)).float().mean())
