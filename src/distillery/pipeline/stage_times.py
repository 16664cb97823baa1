"""How long each stage took on this machine: printed before it runs again, and summed up at the end of a run."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from distillery.files import Paths, write_json
from distillery.wording import human_duration


class StageTime(TypedDict):
    """seconds: how long a stage took. ended: when, in seconds since 1970."""

    seconds: float
    ended: float


def _file(root: Path) -> Path:
    return Paths(root).cache / "stage_times.json"


def read_stage_times(root: Path) -> dict[str, StageTime]:
    """The last time of every stage that ran in the folder `root`, by its name."""
    return json.loads(_file(root).read_text(encoding="utf-8")) if _file(root).exists() else {}


@contextmanager
def timed_stage(root: Path, name: str) -> Iterator[None]:
    """Print how long the stage `name` took the last time, run the block, and keep how long it took if it ends well."""
    last = read_stage_times(root).get(name)
    if last:
        print(f"{name}: took {human_duration(last['seconds'])} the last time on this machine", flush=True)
    start = time.time()
    yield
    seconds = time.time() - start
    write_json(_file(root), read_stage_times(root) | {name: StageTime(seconds=round(seconds, 1), ended=time.time())})


def summarize_stage_times(root: Path, since: float = 0.0) -> str:
    """A table (stage, seconds, share) of the stages that ended after `since`, in this order; empty when none did."""
    times = {name: entry for name, entry in read_stage_times(root).items() if entry["ended"] >= since}
    if not times:
        return ""
    total = sum(entry["seconds"] for entry in times.values())
    width = max(map(len, times))
    ordered = sorted(times.items(), key=lambda item: item[1]["ended"])
    lines = [f"{'stage':<{width}}  seconds  share"]
    lines += [f"{name:<{width}}  {entry['seconds']:7.1f}  {entry['seconds'] / total:5.0%}" for name, entry in ordered]
    return "\n".join([*lines, f"{'all':<{width}}  {total:7.1f}  ({human_duration(total)})"])
