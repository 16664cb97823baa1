"""The features of the published systems and where each stands: recipes/features.csv, and its page docs/published.md.

The page also has the published figures that no run compares, which recipes/published.csv holds.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

FEATURES_FILE, FIGURES_FILE, PAGE_FILE = "recipes/features.csv", "recipes/published.csv", "docs/published.md"
COLUMNS = ("source", "feature", "status", "where", "remark")
FIGURE_COLUMNS = ("source", "of", "figure", "value", "place", "note")
STATUSES = ("works", "partial", "differs", "missing", "n/a")
HEADING = """# The published systems, feature by feature

What the documents of the published systems describe, and where it stands here. `make recipe NAME=all SETTINGS=1` makes
this page from [recipes/features.csv](../recipes/features.csv); a test looks up every place that is named. Settings, one
by one, are in [recipes/SETTINGS.md](../recipes/SETTINGS.md). *differs*: it is here in another way; *n/a*: a remark of
the source on related or future work. `project` is what this project set out to be.
"""
FIGURES_HEADING = """
## Figures that no run compares

Published figures of data, memory and candidates, from [recipes/published.csv](../recipes/published.csv). The scores of
students and teachers are in each recipe, under `recipe.published`.
"""


def read_features(root: Path) -> pd.DataFrame:
    """The rows of `recipes/features.csv`: source, feature, status, where (`file` or `file: text`, by `; `), remark."""
    return pd.read_csv(root / FEATURES_FILE, keep_default_na=False, dtype=str)


def read_figures(root: Path) -> pd.DataFrame:
    """The rows of `recipes/published.csv`: source, of (model or data), figure, value, place in the source, note."""
    return pd.read_csv(root / FIGURES_FILE, keep_default_na=False, dtype={"value": float})


def missing_places(root: Path, places: str) -> list[str]:
    """The places in `places` that do not exist: a file that is not there, or a text that it does not hold."""
    missing = []
    for place in filter(None, places.split("; ")):
        file, _, text = place.partition(": ")
        path = root / file
        if not path.is_file() or text not in path.read_text(encoding="utf-8"):
            missing.append(place)
    return missing


def features_page(root: Path) -> str:
    """The page in Markdown: counts for each source, every feature, and the figures of `recipes/published.csv`."""
    rows = read_features(root)
    counts = pd.crosstab(rows["source"], rows["status"]).reindex(
        index=list(dict.fromkeys(rows["source"])), columns=list(STATUSES), fill_value=0
    )
    counts.loc["all"] = counts.sum()
    lines = [f"| source | {' | '.join(STATUSES)} | rows |", f"|---|{'--:|' * (len(STATUSES) + 1)}"]
    lines += [f"| {source} | {' | '.join(map(str, row))} | {sum(row)} |" for source, *row in counts.itertuples()]
    parts = [HEADING, "\n".join(lines)]
    for source, part in rows.groupby("source", sort=False):
        table = ["| feature | status | where | remark |", "|---|---|---|---|"]
        for row in part.itertuples():
            places = [place.partition(": ")[0] for place in filter(None, row.where.split("; "))]
            links = ", ".join(f"[{Path(file).name}](../{file})" for file in dict.fromkeys(places))
            table.append(f"| {row.feature} | {row.status} | {links} | {row.remark} |")
        parts.append(f"\n## {source}\n\n" + "\n".join(table))
    table = ["| source | of | figure | value | place | note |", "|---|---|---|--:|---|---|"]
    for row in read_figures(root).itertuples():
        year = row.figure.endswith("year")
        value = f"{row.value:.0f}" if year else f"{row.value:,.10g}"
        table.append(f"| {row.source} | {row.of} | {row.figure} | {value} | {row.place} | {row.note} |")
    parts.append(FIGURES_HEADING + "\n" + "\n".join(table))
    return "\n".join(parts) + "\n"
