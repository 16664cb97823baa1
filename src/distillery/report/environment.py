"""The Jinja environment of the report's templates."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from distillery.wording import (
    human_count,
    human_dollars,
    human_duration,
    human_milliseconds,
    human_ratio,
    p_value,
    percent,
    percentage_points,
)

TEMPLATES = Path(__file__).parent / "templates"

ENVIRONMENT = Environment(
    loader=FileSystemLoader(TEMPLATES),
    autoescape=select_autoescape(["html"]),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.filters |= {
    "percent": percent,
    "points": percentage_points,
    "count": human_count,
    "ratio": human_ratio,
    "ms": human_milliseconds,
    "duration": human_duration,
    "dollars": human_dollars,
    "p_value": p_value,
}
