"""Teacher and student in three domains in one chart: score and time for a row, published and here.

    PYTHONPATH=src python benchmarks/domains.py

Draws `recipes/domains.svg` from `benchmarks/recipes.csv`, and trains nothing.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from distillery.files import atomic_write, repository_root
from distillery.report.style import ROLE_COLOURS, drawing
from distillery.report.svg import figure_svg

TABLE, FIGURE = "benchmarks/recipes.csv", "recipes/domains.svg"
SCALE = "small"
DOMAINS = {  # domain: recipe, teacher, student, score
    "finance": ("multiteacher-distilbert", "finbert", "distilbert-kd", "accuracy"),
    "trivia": ("trivia-t5", "t5-large", "t5-small", "token_f1"),
    "common sense": ("commonsense-t5", "flan-t5-xl", "t5-large", "accuracy"),
}
MILLISECONDS = {"latency_p50_ms": lambda value: value, "sentences_per_second": lambda value: 1000 / value}


def domain_rows(table: pd.DataFrame) -> pd.DataFrame:
    """Domain, role, origin (published, this run), score and milliseconds a row; NaN where the table has none.

    This run's are those at scale :data:`SCALE`: the others have models of the same names.
    """
    rows = []
    for domain, (recipe, teacher, student, score) in DOMAINS.items():
        for role, model in (("teacher", teacher), ("student", student)):
            of_model = table[(table["recipe"] == recipe) & (table["model"] == model)]
            published = of_model.dropna(subset=["published"]).drop_duplicates("score")
            tables = {"published": published, "this run": of_model[of_model["scale"] == SCALE]}
            for origin, part in tables.items():
                values = part.set_index("score")[origin].astype(float)
                times = [of(values[name]) for name, of in MILLISECONDS.items() if name in values]
                row = {"domain": domain, "role": role, "origin": origin, "score": values.get(score, np.nan)}
                rows.append(row | {"milliseconds": times[0] if times else np.nan})
    return pd.DataFrame(rows)


def figure_domains(rows: pd.DataFrame) -> Figure:
    """Bars of :func:`domain_rows`: the published ones filled, those of the small runs as outlines."""
    with drawing():
        figure, panels = plt.subplots(1, 2, figsize=(7.4, 3), layout="constrained")
        bars = list(rows.groupby(["role", "origin"], sort=False))
        for axes, column in zip(panels, ("score", "milliseconds"), strict=True):
            for k, ((role, origin), part) in enumerate(bars):
                at, colour = np.arange(len(part)) + 0.2 * (k - 1.5), ROLE_COLOURS[role]
                fill = colour if origin == "published" else "none"
                axes.bar(at, part[column], 0.18, color=fill, edgecolor=colour, label=f"{role}, {origin}")
            axes.set_xticks(range(len(DOMAINS)), list(DOMAINS))
            axes.grid(axis="x", visible=False)
        panels[0].set(title="accuracy; in trivia token F1", ylim=(0, 1))
        panels[1].set(title="milliseconds a row, logarithmic", yscale="log", ylim=(1, None))
        panels[1].yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")  # the page typesets no formula
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=4, handlelength=1)
    return figure


def write_figure(root: Path) -> None:
    """Draw `recipes/domains.svg` anew."""
    svg = figure_svg(figure_domains(domain_rows(pd.read_csv(root / TABLE))))
    with atomic_write(root / FIGURE) as path:
        path.write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    write_figure(repository_root())
