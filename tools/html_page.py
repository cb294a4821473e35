"""The pages that tools write for `--html`: one file, no network, all text escaped. Torch-free."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

_STYLE = (
    "body{font:15px sans-serif;max-width:60em;margin:2em auto}"
    "pre{white-space:pre-wrap;overflow-wrap:anywhere;border:1px solid #d0d7de;padding:1em}td,th{padding-right:2em}"
)


def write_page(path: Path, title: str, style: str, parts: Sequence[str]) -> None:
    """Write a page with a title, CSS beside that of all pages, and parts that are HTML already."""
    name = html.escape(title)
    head = f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{_STYLE}{style}</style><h1>{name}</h1>"
    path.write_text("\n".join([head, *parts]) + "\n", encoding="utf-8")


def draw_table(rows: Sequence[Sequence[str]], *, has_head: bool = False) -> str:
    """Return rows of text as an HTML table, whose first row names its columns if it `has_head`."""
    lines = []
    for number, row in enumerate(rows):
        cell = "th" if has_head and number == 0 else "td"
        lines.append("<tr>" + "".join(f"<{cell}>{html.escape(text)}" for text in row))
    return "\n".join(["<table>", *lines, "</table>"])
