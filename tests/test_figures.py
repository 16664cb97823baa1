"""Figures hold the numbers of the leaderboard and of the predictions."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from sklearn import metrics as sk

from distillery.config.schema.students import StudentInit
from distillery.evaluation.gather import gather_results
from distillery.evaluation.leaderboard import leaderboard
from distillery.notebook.distill import plot_training
from distillery.report.figures import (
    all_figures,
    figure_confusion,
    figure_cost,
    figure_coverage,
    figure_history,
    figure_labels,
    figure_leaderboard,
    figure_reliability,
)
from distillery.report.sentences import left_out_sentence
from distillery.report.style import INK, ROLE_COLOURS
from distillery.report.svg import figure_svg, inline_svg
from distillery.report.tables import MIN_BIN_ROWS, reliability_table, size_series
from report_project import ACCURACY, LABELS, WORDS, experiment, finished_project, write_project


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    _, _, results, board = finished_project(tmp_path_factory.mktemp("project"))
    return results, board.reset_index()


def points(axes, marker="o") -> list[tuple[float, float]]:
    """The single dots of `axes`, in the order in which they were drawn."""
    dots = [line for line in axes.lines if line.get_marker() == marker and len(line.get_xdata()) == 1]
    return [(float(dot.get_xdata()[0]), float(dot.get_ydata()[0])) for dot in dots]


def test_the_leaderboard_shows_every_accuracy_with_its_interval(finished):
    results, board = finished
    axes = figure_leaderboard(results, board).axes[0]
    rows = board.iloc[::-1]  # the best on top
    assert [label.get_text() for label in axes.get_yticklabels()] == rows["model"].tolist()
    assert points(axes) == list(zip(rows["accuracy"], range(len(rows)), strict=True))
    bars = [tuple(line.get_xdata()) for line in axes.lines if len(line.get_xdata()) == 2]
    assert bars == list(zip(rows["accuracy_low"], rows["accuracy_high"], strict=True))
    assert [text.get_text() for text in axes.texts] == [f"{100 * value:.1f}" for value in rows["accuracy"]]
    colours = [to_hex(line.get_color()) for line in axes.lines if line.get_marker() == "o"]
    assert colours == [ROLE_COLOURS[role] for role in rows["role"]]
    bold = [label.get_text() for label in axes.get_yticklabels() if label.get_fontweight() == "bold"]
    assert bold == ["tiny-kd"]


@pytest.mark.parametrize("cost", ["parameters", "latency_p50_ms"])
def test_accuracy_by_cost_with_the_pareto_front(finished, cost):
    results, board = finished
    axes = figure_cost(results, board, cost).axes[0]
    rows = board[board[cost].notna() & (board["role"] != "untrained")]
    assert sorted(points(axes)) == sorted(zip(rows[cost].astype(float), rows["accuracy"], strict=True))
    assert sorted(text.get_text() for text in axes.texts) == sorted(rows["model"])
    front = list(zip(*axes.lines[0].get_data(), strict=True))
    better = [
        (c, a)
        for c, a in zip(rows[cost].astype(float), rows["accuracy"], strict=True)
        if not any((rows[cost] <= c) & (rows["accuracy"] > a))
    ]
    assert front == sorted(better)
    assert axes.get_xscale() == "log"


def test_a_line_joins_students_that_differ_in_size_alone(finished):
    """Here five layers of one model, and one student more with another rate; two sizes are no line."""
    results, _ = finished
    spec = results.params.students["tiny-kd"]
    sized = {f"layers-{n}": spec.model_copy(update={"init": StudentInit(layers=f"first-{n}")}) for n in (6, 1, 3)}
    phase = spec.phases[0].model_copy(update={"learning_rate": 0.5})
    other = {"other": spec.model_copy(update={"phases": [phase, *spec.phases[1:]]})}
    board = pd.DataFrame({"model": ["layers-6", "layers-1", "other", "layers-3", "teacher"]})
    board = board.assign(parameters=[6.0, 1.0, 2.0, 3.0, 9.0], accuracy=[0.7, 0.5, 0.6, 0.65, 0.8], role="student")
    board = board.assign(accuracy_low=board["accuracy"] - 0.1, accuracy_high=board["accuracy"] + 0.1)
    params = results.params.model_copy(update={"students": sized | other})
    (series,) = size_series(params, board)
    assert series["model"].tolist() == ["layers-1", "layers-3", "layers-6"]
    line = figure_cost(replace(results, params=params), board).axes[0].lines[1]
    assert [tuple(at) for at in line.get_xydata()] == [(1.0, 0.5), (3.0, 0.65), (6.0, 0.7)]
    assert size_series(params, board[board["model"] != "layers-3"]) == []
    assert size_series(params, board.assign(parameters=[6.0, 6.0, 2.0, 3.0, 9.0])) == []


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        ({"kind": "answers"}, "only its answers are here, in files"),
        ({"kind": "api"}, "it is behind an endpoint"),
        ({}, "it was not measured"),
    ],
)
def test_a_model_without_a_known_cost_is_named_below_the_picture(finished, teacher, reason):
    results, board = finished
    assert left_out_sentence(results, board, "parameters") == ""
    spec = results.params.teachers["big"].model_copy(update=teacher)
    results = replace(results, params=results.params.model_copy(update={"teachers": {"big": spec}}))
    board = board.assign(parameters=board["parameters"].where(board["model"] != "big"))
    assert left_out_sentence(results, board, "parameters") == f"Not in the picture: big ({reason})."
    assert "big" not in [text.get_text() for text in figure_cost(results, board).axes[0].texts]


def test_confusion_matrices_are_those_of_the_predictions(finished):
    results, _ = finished
    figure = figure_confusion(results)
    label = results.tests["demo"]["label"]
    assert [axes.get_title(loc="center") for axes in figure.axes] == ["tiny-kd", "tiny-gold", "big"]
    for axes, result in zip(figure.axes, results.compared, strict=True):
        counts = np.mean([sk.confusion_matrix(label, p, labels=LABELS) for p in result.predictions], axis=0)
        share = 100 * counts / counts.sum(1, keepdims=True)
        assert [text.get_text() for text in axes.texts] == [f"{x:.0f}" for x in share.flatten()]
        assert [tick.get_text() for tick in axes.get_xticklabels()] == LABELS
        assert [patch.get_alpha() for patch in axes.patches] == pytest.approx(0.04 + 0.006 * share.flatten())
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == LABELS


def test_confusion_matrices_of_the_models_that_params_names(finished):
    """Without the untrained models that start from them; of models on other rows there are none."""
    results, _ = finished
    chosen = results.params.evaluate.model_copy(update={"confusion": ["other", "big"]})
    results = replace(results, params=results.params.model_copy(update={"evaluate": chosen}))
    assert [axes.get_title(loc="center") for axes in figure_confusion(results).axes] == ["other", "big"]


def test_bars_are_precision_and_recall_of_each_label(finished):
    results, board = finished
    figure, rows = figure_labels(results, board), board.set_index("model")
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == LABELS
    for axes, score in zip(figure.axes, ("precision", "recall"), strict=True):
        assert axes.get_title(loc="left") == score
        assert [bars.get_label() for bars in axes.containers] == ["tiny-kd", "tiny-gold", "big"]
        for bars in axes.containers:
            widths = [bar.get_width() for bar in bars]
            assert widths == [rows.loc[bars.get_label(), f"{score}_{label}"] for label in LABELS]
        tops = [bars[0].get_y() for bars in axes.containers]
        assert tops == sorted(tops)  # the axis points down: the headline is on top


def test_reliability_is_that_of_the_bins(finished):
    results, _ = finished
    axes, table = figure_reliability(results).axes[0], reliability_table(results)
    assert table["rows"].min() >= MIN_BIN_ROWS
    for line, dots, result in zip(axes.lines[1:], axes.collections, results.compared, strict=True):
        bins = table[table["model"] == result.name]
        p = np.concatenate(results.find(result.key).probabilities if result.role != "teacher" else result.probabilities)
        label = np.tile(results.tests["demo"]["label"], len(result.predictions))
        right = np.array(LABELS)[p.argmax(1)] == label
        for confidence, accuracy, rows in bins[["confidence", "accuracy", "rows"]].itertuples(index=False):
            inside = np.floor(10 * p.max(1)) == np.floor(10 * confidence)
            assert rows == inside.sum() and accuracy == pytest.approx(right[inside].mean())
        assert line.get_xdata().tolist() == bins["confidence"].tolist()
        assert line.get_ydata().tolist() == bins["accuracy"].tolist()
        assert dots.get_label() == result.name
        assert dots.get_sizes() == pytest.approx(8 + 160 * bins["rows"] / bins["rows"].sum())


def test_coverage_ends_at_the_error_rate_of_all_rows(finished):
    results, board = finished
    axes, rows = figure_coverage(results).axes[0], board.set_index("model")
    assert [line.get_label() for line in axes.lines] == ["tiny-kd", "tiny-gold", "big"]
    for line in axes.lines:
        coverage, risk = line.get_data()
        assert coverage[-1] == 1 and risk[-1] == pytest.approx(1 - rows.loc[line.get_label(), "accuracy"])
        result = next(r for r in results.compared if r.name == line.get_label())
        p = np.concatenate(result.probabilities)
        wrong = np.array(LABELS)[p.argmax(1)] != np.tile(results.tests["demo"]["label"], len(result.predictions))
        half = int(np.searchsorted(coverage, 0.5))
        rows_predicted = round(coverage[half] * len(p))
        most_confident = np.argsort(-p.max(1), kind="stable")[:rows_predicted]
        assert risk[half] == pytest.approx(wrong[most_confident].mean())


def test_losses_by_step_with_phases_counted_from_1(finished):
    results, _ = finished
    figure = figure_history(results)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in panels] == ["tiny-kd", "tiny-gold", "other"]
    for axes in panels:
        runs = [line for line in axes.lines if line.get_alpha() == 0.3]
        assert [line.get_xdata().tolist() for line in runs] == [[1, 2, 3, 4]] * 2  # a line a seed
        assert [line.get_ydata().tolist() for line in runs] == [[1.0, 0.8, 0.6, 0.5]] * 2
        rules = [line.get_xdata() for line in axes.lines if line.get_linestyle() == ":"]
        assert rules == [[3, 3]] and [text.get_text() for text in axes.texts] == ["phase 2"]
        assert axes.get_yscale() == "log"


def test_validation_losses_are_dashed(finished):
    results, _ = finished
    looks = results.history["loss"].where(results.history["step"] % 2 == 0) / 2
    with_looks = replace(results, history=results.history.assign(validation_loss=looks))
    for axes in [axes for axes in figure_history(with_looks).axes if axes.get_visible()]:
        dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert [line.get_ydata().tolist() for line in dashed] == [[0.4], [0.25]] * 2  # a line a phase and seed
        assert [line.get_xdata().tolist() for line in dashed] == [[2], [4]] * 2


def test_training_curves_have_a_panel_of_looks():
    history = pd.DataFrame({"phase": [1, 1, 2], "step": [10, 20, 10], "loss": [1.0, 0.8, 0.6]})
    phases = pd.DataFrame({"phase": [0, 1], "split": "validation", "label": "a", "prediction": ["b", "a"]})
    plot_training(history, phases)
    left, right = plt.gcf().axes
    assert (left.get_ylabel(), right.get_xlabel()) == ("loss (nats), logarithmic", "phase")
    looks = history.assign(validation_loss=[0.9, np.nan, 0.5], validation_accuracy=[0.5, np.nan, 1.0])
    plot_training(looks, phases, {"big": 0.7, "unscored": None})
    left, middle, right = plt.gcf().axes
    for axes in (middle, right):  # the teacher's accuracy, which does not change
        teacher = axes.lines[-1]
        assert (list(teacher.get_ydata()), teacher.get_linestyle()) == ([0.7, 0.7], ":")
        teacher.remove()
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["teacher big"]
    assert [line.get_linestyle() for line in left.lines] == ["-", "--", "-", "--"]
    assert [line.get_xydata().tolist() for line in middle.lines] == [[[10, 0.5]], [[30, 1.0]]]
    plt.close("all")


def test_without_measured_speed_there_is_no_figure_of_latency(finished):
    results, board = finished
    names = {"leaderboard", "cost", "confusion", "labels", "reliability", "coverage", "history"}
    assert set(all_figures(results, board)) == names | {"latency"}
    assert set(all_figures(results, board.assign(latency_p50_ms=np.nan))) == names


def test_many_labels_leave_the_cells_of_the_confusion_matrix_empty(tmp_path):
    labels = [f"l{i}" for i in range(12)]
    rng = np.random.default_rng(0)
    corpus = [{"id": f"r{i}", "text": " ".join(rng.choice(WORDS, 9)), "label": labels[i % 12]} for i in range(240)]
    task = f"kind: classification\nlabels: {{{', '.join(f'{name}: a' for name in labels)}}}\n"
    spec = experiment(seeds=[0])
    spec["data"]["demo"]["near_duplicate"] = 1.0
    results = gather_results(tmp_path, write_project(tmp_path, spec, corpus=corpus, task=task))
    axes = figure_confusion(results).axes[0]
    assert not axes.texts and len(axes.patches) == 144
    assert len(leaderboard(results)) == 1 + len(ACCURACY) + 1  # and the majority, and a second untrained student


def test_figures_are_deterministic_and_follow_the_theme(finished):
    results, board = finished
    first, second = (figure_svg(figure_cost(results, board)) for _ in range(2))
    assert first == second
    page = str(inline_svg("cost", first))
    assert "var(--ink)" in page and INK not in page and "<metadata" not in page and "xmlns" not in page


@pytest.mark.parametrize(
    "dots",
    [
        [(17.4, 0.657), (17.4, 0.589), (22.7, 0.609), (81.4, 0.655), (134.5, 0.739)],
        [(20, 0.6), (21, 0.6), (20, 0.61), (130, 0.62)],
        [(20, 0.6)],
    ],
)
def test_names_of_dots_overlap_no_other_dot_or_name(finished, dots):
    board = pd.DataFrame(dots, columns=["parameters", "accuracy"])
    board = board.assign(model=[f"student-{i}" for i in range(len(dots))], role="student")
    board = board.assign(accuracy_low=board["accuracy"] - 0.04, accuracy_high=board["accuracy"] + 0.04)
    figure = figure_cost(finished[0], board)
    figure.canvas.draw()
    axes = figure.axes[0]
    names = [text.get_window_extent() for text in axes.texts]
    assert sorted(text.get_text() for text in axes.texts) == board["model"].tolist()
    for i, box in enumerate(names):
        assert not box.count_overlaps(names[:i] + names[i + 1 :]), board["model"][i]
        assert not any(box.contains(*axes.transData.transform(dot)) for dot in dots), board["model"][i]
