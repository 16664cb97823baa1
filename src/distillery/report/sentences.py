"""The result in words, all of it from the numbers."""

from __future__ import annotations

from typing import Any

import pandas as pd

from distillery.evaluation.leaderboard import count_comparisons
from distillery.evaluation.results import Results
from distillery.report.wording import (
    human_count,
    human_milliseconds,
    human_ratio,
    interval_text,
    percent,
    percentage_points,
)


def describe_result(results: Results, board: pd.DataFrame) -> dict[str, Any]:
    """The result in words: `title`, `sentences`, `tiles` (value, label, note, tone), all of it from the numbers.

    It must read right whatever came out: a student that is worse, one seed, no teacher, no control, no augmentation.
    """
    params, e = results.params, results.params.evaluate
    head = results.headline
    lines = board.set_index("model")
    row, teacher, control = lines.loc[head.name], results.teacher_of(head), results.find(head.control)
    level, n, name = f"{100 * e.confidence:g} %", len(results.tests[head.source]), head.name
    accuracy = f"{percent(row['accuracy'])} ({level} interval {percent(row['accuracy_low'])} to "
    accuracy += f"{percent(row['accuracy_high'])})"
    tiles, sentences, claims = [], [], []

    # What it is, and what it saves.
    if teacher is None:
        sentences.append(f"{name} ({human_count(head.parameters)} parameters) was trained without a teacher.")
    else:
        what = f"{name} ({human_count(head.parameters)} parameters) was distilled from {teacher.name} "
        what += f"({human_count(teacher.parameters)})"
        if head.parameters and teacher.parameters:
            ratio = teacher.parameters / head.parameters
            smaller = (
                f"{human_ratio(ratio)} times smaller" if ratio >= 1.05 else f"{human_ratio(1 / ratio)} times larger"
            )
            smaller = "of the same size" if 1 / 1.05 < ratio < 1.05 else smaller
            what += f" and is {smaller}"
            claims.append(smaller)
            note = f"{human_count(head.parameters)} against {human_count(teacher.parameters)} parameters"
            if 1 / 1.05 < ratio < 1.05:
                tiles.append(("same size", "as its teacher", note, ""))
            else:
                value = f"{human_ratio(max(ratio, 1 / ratio))}×"
                tiles.append((value, "smaller" if ratio > 1 else "larger", note, "good" if ratio > 1 else "bad"))
        mine, its = row["sentences_per_second"], lines.loc[teacher.name, "sentences_per_second"]
        if pd.notna(mine) and pd.notna(its):
            ratio = mine / its
            fast = f"{human_ratio(ratio)} times as fast" if ratio >= 1.05 else f"{human_ratio(1 / ratio)} times slower"
            fast = "equally fast" if 1 / 1.05 < ratio < 1.05 else fast
            note = f"{mine:,.0f} against {its:,.0f} sentences a second"
            what += f"; side by side on one machine it is {fast} ({note})"
            alone = row["latency_p50_ms"], lines.loc[teacher.name, "latency_p50_ms"]
            if all(pd.notna(ms) for ms in alone):
                what += f" and answers a single one in {human_milliseconds(alone[0])} ({human_milliseconds(alone[1])})"
            claims.append(fast)
            value = f"{human_ratio(max(ratio, 1 / ratio))}×"
            tiles.append((value, "faster" if ratio >= 1 else "slower", note, "good" if ratio > 1.05 else "bad"))
        sentences.append(what + ".")

    # What it costs.
    tiles.append((percent(row["accuracy"]), "accuracy", f"{level} interval {100 * row['accuracy_low']:.1f} to "
                  f"{percent(row['accuracy_high'])}", ""))  # fmt: skip
    text = f"On {n:,} test sentences it is right on {accuracy}"
    if teacher is not None:
        verdict, d = row["teacher_verdict"], {k: row[f"teacher_difference_{k}"] for k in ("low", "high")}
        d["mean"] = row["teacher_difference"]
        text += f", its teacher on {percent(lines.loc[teacher.name, 'accuracy'])}"
        if verdict == "worse":
            given = {"low": -d["high"], "high": -d["low"]}
            text += f": it gives up {100 * -d['mean']:.1f} points ({interval_text(given, sign='')})."
            claims.append(f"{100 * -d['mean']:.1f} points less accurate")
        elif verdict == "better":
            text += f": it is {100 * d['mean']:.1f} points better than its teacher ({interval_text(d, sign='')})."
            claims.append(f"{100 * d['mean']:.1f} points more accurate")
        else:
            text += (
                f": the difference of {percentage_points(d['mean'])} points ({interval_text(d)}) is within what chance "
            )
            text += "explains; "
            text += f"one of about {100 * row['teacher_detectable']:.1f} would have shown."
            claims.append("no evidence that it is less accurate" if d["mean"] < 0 else "about as accurate")
    else:
        text += "."
    sentences.append(text)

    # Is it real.
    if control is None:
        sentences.append("It names no control, so nothing here shows what its way of training contributed.")
    else:
        verdict, mean = row["verdict"], row["difference"]
        d = {"low": row["difference_low"], "high": row["difference_high"]}
        taught = any(phase.teachers for phase in params.students[control.key].phases)
        text = f"Its control {control.name}{'' if taught else ', which had no teacher,'} reaches "
        text += f"{percent(lines.loc[control.name, 'accuracy'])}. "
        number = count_comparisons(board)
        p = f"p {'= ' + format(row['p'], '.3f') if row['p'] >= 0.0005 else '< 0.001'}" + (
            f" after Holm's correction for {number} comparisons" if number > 1 else ""
        )
        interval = f"{level} interval {interval_text(d)}; {p}"
        tone = {"better": "good", "worse": "bad"}.get(verdict, "")
        once = len(params.seeds) == 1  # then the runs themselves may have been lucky
        if verdict == "better":
            real = "more than the choice of test rows explains" if once else "real"
            text += f"The gain of {100 * mean:.1f} points is {real} ({interval})."
        elif verdict == "worse":
            text += f"The student is {100 * -mean:.1f} points worse, "
            text += (
                f"{'more than the choice of test rows explains' if once else 'and that is no accident'} ({interval})."
            )
        else:
            text += (
                f"The difference of {percentage_points(mean)} points is no evidence of a gain or a loss ({interval}): "
            )
            text += f"only a true difference of about {100 * row['detectable']:.1f} points would have shown here."
        sentences.append(text)
        label = {"better": "a gain" if once else "a real gain", "worse": "worse"}.get(verdict, "no evidence of a gain")
        tiles.append(
            (
                f"{percentage_points(mean)} points",
                f"{label} over {control.name}",
                f"{level} interval {interval_text(d)}",
                tone,
            )
        )
    if len(params.seeds) == 1:
        sentences.append(
            "Each student was trained once: the intervals speak of other test rows, not of other random seeds."
        )
    else:
        text = f"Scores are means of {len(params.seeds)} training runs a student. "
        sentences.append(text + "The intervals draw near-duplicates together, and training runs with them.")

    # What would have been had for nothing.
    always = [s.name for s in results.models if s.role == "majority" and s.source == head.source]
    given = [f"{name} is right on {percent(lines.loc[name, 'accuracy'])}" for name in always]
    untrained = [s for s in results.models if s.role == "untrained" and s.source == head.source]
    same = [s for s in untrained if params.students[s.key].init == params.students[head.key].init]
    same = [s for s in same if params.students[s.key].model == params.students[head.key].model]
    if same:
        before = percent(lines.loc[same[0].name, "accuracy"])
        given.append(f"the untrained student on {before}" if given else f"the untrained student is right on {before}")
    if given:
        nothing = any(row["accuracy"] <= lines.loc[name, "accuracy"] for name in always)
        told = ": the student has learned nothing that beats the commonest answer" if nothing else ""
        sentences.append(f"For comparison, {', '.join(given)}{told}.")
    keys = ("value", "label", "note", "tone")
    title = f"{name} beside {teacher.name}: {', '.join(claims)}" if teacher else f"{name}: {accuracy}"
    return {"title": title, "sentences": sentences, "tiles": [dict(zip(keys, t, strict=True)) for t in tiles]}
