"""Which packages the trackers under `tracking` need."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from distillery.errors import UserError

IN_THE_PROJECT = "pip install '.[tracking]' in the project's folder"
INSTALLATION = {
    "tensorboard": IN_THE_PROJECT,
    "mlflow": IN_THE_PROJECT,
    "wandb": "pip install wandb",
    "dvclive": "pip install dvclive",
}


def check_trackers(trackers: Iterable[str]) -> None:
    """Raises UserError with the way out when one of `trackers` is not installed."""
    for name in trackers:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"params.yaml: tracking: `{name}` is not installed; run: {INSTALLATION[name]}")
