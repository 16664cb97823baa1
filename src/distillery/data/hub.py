"""Read data sets of the Hugging Face hub."""

from __future__ import annotations

import logging
import re

from distillery.config.schema import SourceConfig
from distillery.data.records import RawRows
from distillery.errors import UserError


def read_hub(spec: SourceConfig) -> RawRows:
    """The rows of `spec.source`, `hub:owner/name[@revision]`. Raises UserError when it cannot be reached."""
    source = spec.origin
    match = re.fullmatch(r"hub:(\w[\w.-]*(?:/\w[\w.-]*)?)(?:@([\w./-]+))?", source)
    if not match:
        raise UserError(f"{source}: not a hub data set; write hub:owner/name or hub:owner/name@revision")
    repo, revision = match.groups()
    hub_splits = spec.own_splits  # split -> split of the hub
    import datasets  # slow to import, and only needed here

    loggers = [logging.getLogger(n) for n in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    progress_bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        for logger in loggers:  # retries and hints of the library would hide the one line that matters
            logger.setLevel(logging.CRITICAL)
        parts = [
            datasets.load_dataset(repo, spec.hub_config, revision=revision, split=hub_split)
            for hub_split in hub_splits.values() or [spec.hub_split]
        ]
    except OSError as error:  # no network, offline mode, unknown and gated data sets differ only in the library's prose
        unreachable = "no network (or HF_HUB_OFFLINE is set), unknown data set or revision, or no right to read it"
        raise UserError(f"{source}: {error.strerror or unreachable}") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{source}: cannot be read: {reason[:300]}") from None
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if progress_bars:
            datasets.enable_progress_bars()
    labels = getattr(parts[0].features.get(spec.columns.label), "names", None)
    rows = [row for part in parts for row in part.to_list()]
    splits = None
    if hub_splits:
        splits = [split for split, part in zip(hub_splits, parts, strict=True) for _ in range(len(part))]
    return RawRows(source, "row", rows, list(range(1, len(rows) + 1)), labels=labels, splits=splits)
