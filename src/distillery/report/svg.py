"""Figures as SVG text."""

from __future__ import annotations

import io
import re

import matplotlib.pyplot as plt
from markupsafe import Markup
from matplotlib.figure import Figure

from distillery.report.style import GRID, INK, MUTED, PAPER, STYLE


def figure_svg(figure: Figure) -> str:
    """The figure as SVG text, the same for the same figure."""
    file = io.StringIO()
    with plt.rc_context(STYLE):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def inline_svg(name: str, text: str) -> Markup:
    """SVG text for use inside a page: colours follow the page's theme, ids are its own, nothing points outside."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\1{name}-", text).replace("xlink:href", "href")
    text = re.sub(r'<svg ([^>]*?)(width|height)="[^"]*"([^>]*?)(width|height)="[^"]*"', r"<svg \1\3", text, count=1)
    for colour, variable in ((INK, "ink"), (MUTED, "muted"), (GRID, "line"), (PAPER, "clear")):
        text = text.replace(colour, f"var(--{variable})")
    text = re.sub(r"font: ((?:\w+ )*)([\d.]+px) [^;\"]*", r"font: \1\2 var(--font)", text)
    return Markup(text)
