"""How long stages took: printed before they run again, and summed up."""

from __future__ import annotations

import pytest

from distillery.pipeline import stage_times
from distillery.pipeline.stage_times import read_stage_times, summarize_stage_times, timed_stage
from distillery.training import progress
from distillery.training.progress import ProgressPrinter, time_left


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self):
        self.now = 1_000.0

    def time(self) -> float:
        return self.now

    monotonic = time


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stage_times, "time", clock)
    monkeypatch.setattr(progress, "time", clock)
    return clock


def run(root, clock, name: str, seconds: float) -> None:
    with timed_stage(root, name):
        clock.now += seconds


def test_a_second_run_prints_the_time_of_the_first(tmp_path, clock, capsys):
    run(tmp_path, clock, "02_teach-big", 125)
    assert capsys.readouterr().out == ""
    run(tmp_path, clock, "02_teach-big", 61)
    assert capsys.readouterr().out == "02_teach-big: took 2 min 5 s the last time on this machine\n"
    assert read_stage_times(tmp_path) == {"02_teach-big": {"seconds": 61.0, "ended": 1186.0}}


def test_a_stage_that_failed_leaves_the_time_of_its_last_good_run(tmp_path, clock):
    run(tmp_path, clock, "02_teach-big", 125)
    with pytest.raises(OSError, match="full"), timed_stage(tmp_path, "02_teach-big"):
        raise OSError("disk full")
    assert read_stage_times(tmp_path)["02_teach-big"]["seconds"] == 125


def test_the_summary_has_the_stages_of_this_run_in_their_order(tmp_path, clock):
    run(tmp_path, clock, "old", 500)
    since = clock.now + 1
    clock.now += 2
    run(tmp_path, clock, "05_evaluate", 25)
    run(tmp_path, clock, "01_data", 75)
    assert summarize_stage_times(tmp_path, since).splitlines() == [
        "stage        seconds  share",
        "05_evaluate     25.0    25%",
        "01_data         75.0    75%",
        "all            100.0  (1 min 40 s)",
    ]
    assert summarize_stage_times(tmp_path, clock.now + 1) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.4, "about 4 s left"), (99, "about 99 s left"), (200, "about 3 min left")]
)
def test_the_time_that_is_left_in_words(seconds, text):
    assert time_left(seconds) == text


def test_training_estimates_the_time_that_is_left_from_its_own_steps(clock, capsys):
    """In a run that continues from step 100, the steps before it took no time."""
    printer, state = ProgressPrinter("teacher"), type("State", (), {"global_step": 100, "max_steps": 300})()
    printer.on_step_begin(None, state, None)
    for step in (120, 300):
        clock.now += 40
        state.global_step = step
        printer.on_log(None, state, None, {"loss": 0.5})
    assert capsys.readouterr().out.splitlines() == [
        "teacher: step 120/300, loss 0.5000, about 6 min left",
        "teacher: step 300/300, loss 0.5000",
    ]
