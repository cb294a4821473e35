"""The page of `tools/view_rollouts.py`: scores and lengths over the steps as a picture, and samples to filter."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.html_page import draw_table, write_page
from tools.rollout_figures import StepFigures, head, number_text, reward_names, turns_of

_WIDTH, _HEIGHT, _LEFT, _TOP = 760, 220, 60, 20
_LINES = (("score", "#1a7f37"), ("length", "#0969da"))
_STYLE = (
    "article{border-top:1px solid #d0d7de;margin-top:1em}.prompt{background:#f6f8fa}.up{border-left:4px solid #1a7f37}"
    ".down{border-left:4px solid #cf222e}.fault{color:#9a6700}label{margin-right:1em}svg text{font:12px sans-serif}"
)
_SCRIPT = """<script>
const rows=[...document.querySelectorAll("article")],get=id=>document.getElementById(id);
function filter(){
  const step=get("step").value,least=parseFloat(get("least").value),most=parseFloat(get("most").value);
  const words=get("words").value.toLowerCase();let shown=0;
  for(const row of rows){
    const score=parseFloat(row.dataset.score);
    const fits=(!step||row.dataset.step===step)&&(isNaN(least)||score>=least)&&(isNaN(most)||score<=most)
      &&(!words||row.textContent.toLowerCase().includes(words));
    row.hidden=!fits;shown+=fits;
  }
  get("shown").textContent=shown+" of "+rows.length;
}
for(const one of document.querySelectorAll("select,input"))one.addEventListener("input",filter);
filter();
</script>"""


def write_rollout_page(
    path: Path, title: str, figures: Sequence[StepFigures], samples: Sequence[Mapping[str, Any]]
) -> None:
    """Write a page with the figures of all steps and some of their samples."""
    names = reward_names(figures)
    table = draw_table([head(names), *(one.row(names) for one in figures)], has_head=True)
    steps = sorted({one["step"] for one in samples})
    choices = "".join(f"<option>{step}" for step in steps)
    filters = (
        f"<p><label>step <select id=step><option value=''>all{choices}</select></label>"
        "<label>score from <input id=least size=5></label><label>to <input id=most size=5></label>"
        "<label>with the words <input id=words></label><span id=shown></span>"
    )
    articles = [_draw_sample(one) for one in samples]
    parts = [
        draw_chart(figures),
        f"<details><summary>all steps</summary>{table}</details>",
        filters,
        *articles,
        _SCRIPT,
    ]
    write_page(path, title, _STYLE, parts)


def draw_chart(figures: Sequence[StepFigures]) -> str:
    """Return mean scores and lengths over the steps as SVG, each from its least to its largest value."""
    first, last = figures[0].step, figures[-1].step
    width, height = _WIDTH - 2 * _LEFT, _HEIGHT - 2 * _TOP
    parts = [f"<svg viewBox='0 0 {_WIDTH} {_HEIGHT}' role=img aria-label='score and length over the steps'>"]
    for side, (name, colour) in enumerate(_LINES):
        known = [(one.step, value) for one in figures if (value := getattr(one, name)) is not None]
        if not known:
            continue
        low, high = min(value for _, value in known), max(value for _, value in known)
        places = [
            (
                _LEFT + width * (step - first) / max(last - first, 1),
                _TOP + height * ((high - value) / (high - low) if high > low else 0.5),
            )
            for step, value in known
        ]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f"<polyline points='{line}' fill=none stroke='{colour}' stroke-width=1.5 />")
        for (x, y), (step, value) in zip(places, known, strict=True):
            note = f"step {step}: {name} {value:.3f}"
            parts.append(f"<circle cx={x:.1f} cy={y:.1f} r=2.5 fill='{colour}'><title>{note}</title></circle>")
        at, anchor = ((_LEFT - 6, "end"), (_WIDTH - _LEFT + 6, "start"))[side]
        for y, text in ((_TOP - 8, name), (_TOP + 6, f"{high:.3g}"), (_TOP + height, f"{low:.3g}")):
            parts.append(f"<text x={at} y={y} text-anchor={anchor} fill='{colour}'>{text}</text>")
    for x, anchor, step in ((_LEFT, "start", first), (_LEFT + width, "end", last)):
        parts.append(f"<text x={x} y={_HEIGHT - 4} text-anchor={anchor}>step {step}</text>")
    return "\n".join([*parts, "</svg>"])


def _draw_sample(one: Mapping[str, Any]) -> str:
    advantage = one["advantage"] or 0.0
    way = "up" if advantage > 0 else "down" if advantage < 0 else ""
    score = "" if one["score"] is None else f"{one['score']:g}"
    faults = "".join(f"<p class=fault>{html.escape(f'{name}: {text}')}" for name, text in one["faults"].items())
    turns = "".join(
        f"<pre class='{way if is_answer else 'prompt'}'>{html.escape(text)}</pre>" for text, is_answer in turns_of(one)
    )
    return (
        f"<article data-step={one['step']} data-score='{score}'><h3>{html.escape(title_of(one))}</h3>"
        f"<pre class=prompt>{html.escape(one['prompt'])}</pre>{turns}{faults}</article>"
    )


def title_of(one: Mapping[str, Any]) -> str:
    """Return what a sample is and what it was worth, in a line."""
    rewards = ", ".join(f"{name} {number_text(value)}" for name, value in one["rewards"].items())
    return (
        f"step {one['step']}  {one['source']}:{one['row']}  group {one['group']}  sample {one['sample']}  "
        f"score {number_text(one['score'])} ({rewards})  advantage {number_text(one['advantage'], '+')}  "
        f"{one['num_sampled_tokens']} tokens, {one['finish']}"
    )
