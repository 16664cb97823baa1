"""The PhraseBank study on artificial sentences in the benchmark's file format, with tiny models."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from ruamel.yaml import YAML

import tiny
from distillery.config.load import validate_section
from distillery.config.schema import StudentConfig
from distillery.data.near_duplicates import nearest_texts
from distillery.errors import UserError
from distillery.files import read_yaml
from distillery.pipeline.recipe import merge_overlay
from forked import preloaded_python
from studies.phrasebank import data, results, sentences, study, training
from studies.phrasebank.settings import StudySettings, read_settings

FOLDER = tiny.ROOT / "studies/phrasebank"
LOST = "\N{REPLACEMENT CHARACTER}"
WORDS = {"positive": "rose", "neutral": "was at par with", "negative": "fell from"}


def benchmark_rows() -> list[tuple[str, str]]:
    """200 artificial sentences with umlauts; the last 40 are near-duplicates of others, with other numbers."""
    rng, rows = np.random.default_rng(0), []
    for i in range(160):
        label = list(WORDS)[i % 3]
        syllables = ["".join(rng.choice(list("bdfgklmnrstvaeiouäö"), 6)) for _ in range(4)]
        rows.append(
            (f"{syllables[0]} of {syllables[1]} Oyj {WORDS[label]} EUR {i}.5 mn {' @ '.join(syllables[2:])} .", label)
        )
    return rows + [(re.sub(r"\d+", "7", text), label) for text, label in rows[::4]]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """50-agree and all-agree as published: latin-1, `sentence@label`; all-agree is every second row."""
    folder = tmp_path_factory.mktemp("fpb")
    for name, rows in (("50Agree", benchmark_rows()), ("AllAgree", benchmark_rows()[::2])):
        lines = "".join(f"{text}@{label}\r\n" for text, label in rows)
        (folder / f"Sentences_{name}.txt").write_bytes(lines.encode("latin-1"))
    return folder


def test_both_encodings_and_the_lost_letters_are_read(files, tmp_path):
    rows = data.read_phrasebank(files)
    assert list(zip(rows["text"], rows["label"], strict=True)) == benchmark_rows()
    assert rows["allagree"].tolist() == [i % 2 == 0 for i in range(len(rows))]
    assert rows["group"].nunique() == 160 and rows["group"][0] == rows["group"][160]

    # the re-saved file: UTF-8, some letters lost; it is preferred, and all-agree's rows are still matched with it
    (tmp_path / "derived").mkdir()
    lost = [(text.replace("ä", LOST), label) for text, label in benchmark_rows()]
    lines = "".join(f"{text}@{label}\n" for text, label in lost)
    (tmp_path / "derived/Sentences_50Agree.repaired.utf8.txt").write_text(lines, encoding="utf-8")
    for name in ("50Agree", "AllAgree"):
        (tmp_path / f"Sentences_{name}.txt").write_bytes((files / f"Sentences_{name}.txt").read_bytes())
    repaired = data.read_phrasebank(tmp_path)
    assert repaired["text"].tolist() == [text for text, _ in lost] and LOST in "".join(repaired["text"])
    assert repaired["allagree"].tolist() == rows["allagree"].tolist()


def test_files_that_are_not_the_benchmark_end_in_one_line(files, tmp_path):
    with pytest.raises(UserError, match=r"^/.*: no derived/.*txt or Sentences_50Agree.txt there; `data` must be"):
        data.read_phrasebank(tmp_path)
    with pytest.raises(UserError, match=r"^/.*: no \.csv with a column `Headlines` there; `headlines` must be"):
        data.read_headlines(tmp_path)
    (tmp_path / "Sentences_50Agree.txt").write_bytes((files / "Sentences_50Agree.txt").read_bytes())
    for line, reason in (
        ("No label here .", "line 2: must be `sentence@label` with one of negative, neutral, positive"),
        ("@positive", "line 2: must be `sentence@label` with one of negative, neutral, positive"),
        ("Nowhere in the other file .@positive", "sentence 2: not in Sentences_50Agree.txt"),
    ):
        first = "@".join(benchmark_rows()[0])
        (tmp_path / "Sentences_AllAgree.txt").write_text(f"{first}\n{line}\n", encoding="latin-1")
        with pytest.raises(UserError) as caught:
            data.read_phrasebank(tmp_path)
        assert str(caught.value) == f"Sentences_AllAgree.txt, {reason}"


@pytest.fixture(scope="module")
def headlines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("headlines")
    near_duplicate = benchmark_rows()[1][0].replace("1.5", "9.9")
    rows = [f"Harbour firm number {n} sells its {n} ferries to rival" for n in range(12)]
    lines = [
        "Headlines,Description",
        *(f'"{row}",short' for row in rows),
        f'"Company news\n\n{near_duplicate}",',
        f'"{rows[0]}",',
    ]
    (folder / "a.csv").write_bytes("\n".join(lines).encode("cp1252"))
    return folder


def tiny_settings(folder, tiny_models, **pools):
    """The file of the study's settings with tiny models and short phases; its content."""
    tree = read_yaml(FOLDER / "params.yaml")
    tree["pools"] |= {"headlines": 8} | pools
    tree["transfer_runs"] = []
    tree["models"] = {name: {"folder": str(tiny_models / "tiny-bert")} for name in tree["models"]}
    for spec in itertools.chain(*(tree[section].values() for section in ("teachers", "students", "transfer"))):
        for phase in spec["phases"]:
            phase.pop("epochs", None)
            phase["steps"] = 1
    for spec in tree["teachers"].values():
        spec["adapter"].pop("targets")  # the names of MPNet's layers
    with open(folder / "params.yaml", "w") as file:
        YAML(typ="safe", pure=True).dump(tree, file)
    return folder / "params.yaml", tree


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "bert", "`minilm-l6-kd`: `models` has no `bert`; it has: minilm-l6, mpnet"),
        ("control", "gold", "`minilm-l6-kd`: `students` has no `gold`; it has: minilm-l6-gold, "),
        ("teachers", ["bert"], "`minilm-l6-kd`: `teachers` has no `bert`; it has: mpnet-folds"),
    ],
)
def test_a_name_that_the_settings_lack_ends_in_one_line(tiny_models, tmp_path, key, value, message):
    path, tree = tiny_settings(tmp_path, tiny_models)
    student = tree["students"]["minilm-l6-kd"]
    (student["phases"][0] if key == "teachers" else student)[key] = value
    with open(path, "w") as file:
        YAML(typ="safe", pure=True).dump(tree, file)
    with pytest.raises(UserError) as caught:
        read_settings(path)
    assert str(caught.value).startswith("params.yaml: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_seed_has_a_split_without_near_duplicates_across_it(files, headlines, tiny_models, tmp_path):
    settings = read_settings(tiny_settings(tmp_path, tiny_models, written=True)[0])
    phrasebank, texts_of_news = data.read_phrasebank(files), data.read_headlines(headlines)
    assert len(texts_of_news) == 13  # each once, without the section's name; too short ones left out
    tests = []
    for seed in (0, 1):
        rows = data.study_rows(phrasebank, texts_of_news, settings, seed)
        texts = {split_ref: part["text"].tolist() for split_ref, part in rows.groupby("split_ref")}
        assert [len(texts[f"50agree/{split}"]) for split in ("train", "validation", "test")] == pytest.approx(
            [0.75 * len(phrasebank), 0.10 * len(phrasebank), 0.15 * len(phrasebank)], abs=12
        )
        for split in ("validation", "test"):
            for other in set(texts) - {"50agree/test", f"50agree/{split}"}:
                assert nearest_texts(texts[f"50agree/{split}"], texts[other])[0].max() < 0.85
        assert len(texts["headlines/pool"]) == 8 and len(texts["finance/pool"]) > 2000 and "spliced/pool" in texts
        assert len(texts["written/pool"]) > 150
        pool = rows[rows["split_ref"].str.endswith("/pool")]
        assert pool["label"].isna().all() and not pool["allagree"].any() and rows["id"].is_unique
        tests.append(texts["50agree/test"])
    assert tests[0] != tests[1]


@pytest.mark.parametrize("name", read_yaml(FOLDER / "trials.yaml"))
def test_each_trial_changes_valid_settings_of_the_student(tmp_path, name):
    raw = merge_overlay(read_yaml(FOLDER / "params.yaml"), read_yaml(FOLDER / "trials.yaml")[name])
    settings, as_it_is = validate_section(StudySettings, raw, name), read_settings(FOLDER / "params.yaml")
    student, committed = (one.students["minilm-l6-kd"] for one in (settings, as_it_is))
    changed = settings.pools != as_it_is.pools or student != committed
    assert changed == (name != "as it is")
    written = "written/pool" in student.phases[0].data
    assert settings.pools.written == written == ("wrote" in name)
    assert (len(student.phases[0].teachers), len(student.phases[1].teachers)) == (1 + ("two" in name),) * 2
    assert student.phases[1].epochs == (6 if "six epochs" in name or "twice the epochs" in name else 3)
    assert student.phases[1].data == (["allagree/train"] if "unanimous" in name else ["50agree/train"])
    assert ["hidden" in phase.loss for phase in student.phases] == ["hidden" in name, False]
    assert settings.pools.spliced == (6 if "spliced" in name or "six epochs" in name else 2)


def test_spliced_sentences_join_two_at_the_same_word():
    texts = [
        f"The {kind} of Company {i} {moved} to EUR {i}.1 mn from EUR {i + 7} mn in the same quarter of {1990 + i} ."
        for i, (kind, moved) in enumerate(itertools.product(["operating profit", "net sales"], ["rose", "fell"] * 4))
    ]
    spliced = data.splice(texts, 3, 0)
    assert spliced == data.splice(texts, 3, 0) != data.splice(texts, 3, 1)
    assert len(spliced) == len(set(spliced)) > 15 and not set(spliced) & set(texts)
    for text in spliced:
        cuts = [match.end() for match in data.CUT.finditer(text)]
        heads = [cut for cut in cuts if any(original.startswith(text[:cut]) for original in texts)]
        word = {cut: text[:cut].rsplit(" ", 1)[1] for cut in heads}
        assert any(any(other.endswith(f"{word[cut]}{text[cut:]}") for other in texts) for cut in heads), text
    assert data.splice(texts, 0, 0) == [] == data.splice([], 3, 0)


def test_a_second_run_trains_nothing_and_gives_the_same_tables(
    files, headlines, tiny_models, tmp_path, monkeypatch, capsys
):
    path, tree = tiny_settings(tmp_path, tiny_models, finance=False)  # 2,020 texts
    settings = read_settings(path)
    rows, texts_of_news = data.read_phrasebank(files), data.read_headlines(headlines)

    def run(seeds):
        evaluated = study.run_study(settings, rows, texts_of_news, seeds, tmp_path / "cache")
        gains = results.gain_table(evaluated, settings.students)
        results.write_results(results.result_table(evaluated), gains, tmp_path)
        return [(tmp_path / f"{name}.csv").read_bytes() for name in ("results", "gains")]

    first = run(2)
    table = pd.read_csv(tmp_path / "results.csv")
    assert table.columns.tolist() == pd.read_csv(FOLDER / "results.csv").columns.tolist()
    assert pd.read_csv(tmp_path / "gains.csv").columns.tolist() == pd.read_csv(FOLDER / "gains.csv").columns.tolist()
    roles = dict(zip(table["model"], table["role"], strict=True))
    assert roles == {
        "majority label": "majority",
        "minilm-l6, untrained": "untrained",
        "minilm-l6-finance": "transfer",
        "mpnet-folds": "teacher",
        "minilm-l6-kd": "student",
        "minilm-l6-gold": "control",
        "minilm-l6-gold-long": "control",
    }
    trained = table.set_index("model").loc[[*tree["teachers"], *tree["students"]]]
    assert set(table["subset"]) == {"50agree", "allagree"} and (trained["seeds"] == 2).all()
    assert ((table["accuracy_low"] <= table["accuracy"]) & (table["accuracy"] <= table["accuracy_high"])).all()
    assert (trained["minutes"] >= 0).all() and (trained["million_parameters"] > 0).all()
    assert "seed 1, minilm-l6-kd: training" in capsys.readouterr().out

    monkeypatch.setattr(training, "train_phases", None)  # all that is left is reading
    assert run(2) == first
    with pytest.raises(TypeError):  # a third seed needs training
        run(3)


def test_a_teacher_labels_another_pool_without_being_trained_again(files, tiny_models, tmp_path, capsys):
    phrasebank, tables = data.read_phrasebank(files), []
    for spliced in (1, 2):
        settings = read_settings(tiny_settings(tmp_path, tiny_models, finance=False, headlines=0, spliced=spliced)[0])
        rows = data.study_rows(phrasebank, [], settings, 0)
        (fit,) = study.fit_teachers("minilm-l6-kd", settings, rows, 0, tmp_path / "cache").values()
        labelled = rows[["text"]].assign(p=list(fit.probabilities), minutes=fit.cost.minutes)
        tables.append(labelled.drop_duplicates("text").set_index("text"))
        printed = capsys.readouterr().out
        assert ("without fold 0: training" in printed, "without fold 0: predicting" in printed) == (
            spliced == 1,
            spliced == 2,
        )
    both = tables[0].join(tables[1], rsuffix="_again", how="inner")
    assert len(tables[1]) > len(tables[0]) and len(both) > len(phrasebank) / 2
    assert (both["minutes"] == both["minutes_again"]).all()  # of the one training
    np.testing.assert_allclose(np.stack(both["p"]), np.stack(both["p_again"]), atol=1e-6)


def test_a_student_learns_the_hidden_states_of_the_model_that_has_not_seen_the_row(
    files, tiny_models, tmp_path, monkeypatch
):
    _, tree = tiny_settings(tmp_path, tiny_models, finance=False, headlines=0)
    phases = tree["students"]["minilm-l6-kd"]["phases"]
    phases[0] |= {"early_stopping": {"metric": "agreement"}}  # needs the teacher's labels of validation rows
    phases[1] |= {"loss": {"kl": 1.0, "hidden": 1.0}, "layers": [1, 2]}
    settings = validate_section(StudySettings, tree, "params.yaml")
    rows, cache = data.study_rows(data.read_phrasebank(files), [], settings, 0), tmp_path / "cache"
    teachers = study.fit_teachers("minilm-l6-kd", settings, rows, 0, cache)
    ((name, fit),) = teachers.items()
    opened = training.openable_teacher(name, settings, fit, 0, cache)
    assert opened.num_layers == 4 and sorted(set(fit.fold)) == [-1, 0, 1]
    for fold in (0, 1):  # the labels of a fold's rows are those of the model that is opened for it
        predicted = opened.open_fold(fold).predict(rows["text"][fit.fold == fold].tolist())
        np.testing.assert_allclose(predicted, fit.probabilities[fit.fold == fold], atol=1e-6)
    first = opened.open_fold(0).predict(rows["text"].tolist())
    np.testing.assert_allclose(opened.open_fold(-1).predict(rows["text"].tolist()), first, atol=1e-6)
    assert np.abs(opened.open_fold(1).predict(rows["text"].tolist()) - first).max() > 1e-6

    folds = []

    def open_and_list(fold):
        folds.append(fold)
        return opened.open_fold(fold)

    listed = dataclasses.replace(opened, open_fold=open_and_list)
    monkeypatch.setattr(study, "openable_teacher", lambda *_: listed)
    predictions, _ = study.train_student("minilm-l6-kd", settings, rows, teachers, 0, cache)
    assert sorted(set(folds)) == [0, 1]
    (history,) = cache.glob("*/phases/phase-2/history.csv")
    assert (pd.read_csv(history)["hidden"] > 0).all()
    assert set(predictions["split"]) == {"untrained", "validation", "test"}


def test_the_command_trains_and_leaves_the_committed_copy_alone(files, tiny_models, tmp_path):
    """With `data`, the executed notebook shows rows that must not be published."""
    for name in ("studies", "tasks", "data/corpora"):
        shutil.copytree(tiny.ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "benchmarks").mkdir()
    for name in ("dvc.yaml", "benchmarks/keep.py"):
        shutil.copy(tiny.ROOT / name, tmp_path / name)
    tiny_settings(tmp_path / "studies/phrasebank", tiny_models, finance=False, headlines=0)
    command = ["study", "phrasebank", "-p", "data", str(files), "-p", "train", "true", "-p", "seeds", "1"]
    options = {"cwd": tmp_path, "env": os.environ | preloaded_python(), "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-m", "distillery", *command], **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 0, minilm-l6-kd: training" in done.stdout
    assert not (tmp_path / "reports").exists()
    cells = json.loads((tmp_path / ".cache/studies/phrasebank.ipynb").read_text(encoding="utf-8"))["cells"]
    text = json.dumps([cell.get("outputs") for cell in cells], ensure_ascii=False)
    assert "No held-out row has a near-duplicate" in text and "spliced/pool" in text
    table = pd.read_csv(tmp_path / "studies/phrasebank/results.csv")
    assert "tiny-kd" not in set(table["model"]) and set(table["seeds"]) == {1}


def test_a_killed_training_continues_and_has_no_minutes(files, tiny_models, tmp_path, monkeypatch):
    settings = read_settings(tiny_settings(tmp_path, tiny_models)[0])
    rows = data.split_phrasebank(data.read_phrasebank(files), settings, 0)
    splits = {split: rows[rows["split_ref"] == f"50agree/{split}"] for split in ("validation", "test")}
    spec = settings.students["minilm-l6-gold"]
    spec = spec.model_copy(update={"phases": [spec.phases[0]] * 2})
    arguments = (spec, settings.models["minilm-l6"], rows, splits)
    whole, cost, _ = training.train(*arguments, seed=0, cache=tmp_path / "whole", title="whole")
    assert cost.minutes is not None and set(whole["split"]) == {"untrained", "validation", "test"}

    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "write_json", fail)
        training.train(*arguments, seed=0, cache=tmp_path / "killed", title="killed")
    monkeypatch.setattr("distillery.training.run.train_phase", None)  # its phases are finished
    continued, cost, _ = training.train(*arguments, seed=0, cache=tmp_path / "killed", title="killed")
    assert cost.minutes is None
    assert np.array_equal(np.stack(whole["probabilities"]), np.stack(continued["probabilities"]))


def test_a_missing_run_of_the_main_experiment_ends_in_one_line(files):
    with pytest.raises(UserError, match=r"^transfer_runs: no finished student in runs/none-0; run `make repro` or"):
        training.predict_with_run("none-0", data.read_phrasebank(files))


def test_tables_average_over_seeds_and_pair_gains():
    names = data.sentiment_task().names
    rows = pd.DataFrame(
        {"label": names * 4, "group": [str(i) for i in range(12)], "allagree": [True] * 6 + [False] * 6}
    )
    right = np.eye(3)[[names.index(label) for label in rows["label"]]]
    wrong = np.roll(right, 1, axis=1)
    half = np.where(np.arange(12)[:, None] < 6, right, wrong)
    cost = training.Cost(5_000_000, 2.0, "abc")
    interrupted = training.Cost(5_000_000, None, "abc")
    evaluated = [
        results.EvaluatedModel(name, role, seed, study.with_predictions(rows, p), cost_of_seed)
        for name, role, seed, p, cost_of_seed in (
            ("kd", "student", 0, right, cost),
            ("kd", "student", 1, half, interrupted),
            ("gold", "control", 0, wrong, cost),
            ("gold", "control", 1, wrong, cost),
            ("longer", "control", 0, right, cost),
            ("longer", "control", 1, right, cost),
        )
    ]
    table = results.result_table(evaluated).set_index(["subset", "model"])
    assert table.loc[("50agree", "kd"), "accuracy"] == 0.75 and table.loc[("allagree", "kd"), "accuracy"] == 1
    assert table.loc[("50agree", "kd"), "accuracy_low"] < 0.75 < table.loc[("50agree", "kd"), "accuracy_high"]
    columns = ["seeds", "minutes", "million_parameters", "commit"]
    assert table.loc[("50agree", "kd"), columns].tolist() == [2, 2.0, 5.0, "abc"]
    student = StudentConfig(model="x", arch="classifier", phases=[], control="gold")
    control = StudentConfig(model="x", arch="classifier", phases=[])
    gains = results.gain_table(evaluated, {"kd": student, "gold": control, "longer": control})
    assert len(gains) == 8
    gains = gains.set_index(["subset", "control", "score"])
    assert gains.loc[("50agree", "longer", "accuracy"), "difference"] == -0.25
    assert gains.loc[("50agree", "gold", "accuracy"), "difference"] == 0.75
    assert gains.loc[("allagree", "gold", "accuracy"), ["difference", "low", "high"]].tolist() == [1, 1, 1]


ROW = pd.Series(
    {"subset": "50agree", "model": "m", "million_parameters": 10.0}
    | {"accuracy": 0.8, "accuracy_low": 0.75, "accuracy_high": 0.85}
)
BETTER, WORSE = (pd.Series(dict(ROW) | {"accuracy": accuracy}) for accuracy in (0.9, 0.6))
GAIN = pd.Series({"subset": "50agree", "student": "s", "control": "c", "difference": 0.02, "low": 0.01, "high": 0.03})
LOSS = pd.Series(dict(GAIN) | {"difference": -0.02, "low": -0.03, "high": -0.01})
UNSURE = pd.Series(dict(GAIN) | {"low": -0.01})
TEST_ROWS = pd.DataFrame({"split_ref": ["50agree/test", "spliced/pool"]})
CASES = [  # function, facts and a part of their sentence, other facts and a part of the opposite one
    (sentences.teacher_sentence, (ROW, BETTER), "10.0 points are lost", (ROW, WORSE), "**as good** as its teacher"),
    (sentences.gain_sentence, (GAIN,), "+2.0 points (+1.0 to +3.0): better", (LOSS,), "**worse**"),
    (sentences.gain_sentence, (GAIN,), "better", (UNSURE,), "**no evidence**"),
    (sentences.published_sentence, (ROW, BETTER), "**above** the interval", (ROW, WORSE), "below the interval"),
    (sentences.published_sentence, (ROW, ROW), "no difference can be seen", (ROW, WORSE), "below the interval"),
    (sentences.transfer_sentence, (ROW, WORSE, BETTER), "10.0 points more", (ROW, BETTER, BETTER), "**nothing**"),
    (sentences.transfer_sentence, (ROW, WORSE, BETTER), "points more", (ROW, WORSE, WORSE), "replaces its own labels"),
    (sentences.split_sentence, (TEST_ROWS, 0), "No held-out row", (TEST_ROWS, 2), "**2 held-out rows**"),
]


@pytest.mark.parametrize(("function", "facts", "part", "other_facts", "opposite"), CASES)
def test_other_facts_give_the_opposite_sentence(function, facts, part, other_facts, opposite):
    assert part in function(*facts) and opposite in function(*other_facts)
    assert part not in function(*other_facts) and opposite not in function(*facts)


def test_every_sentence_has_its_opposite_tested():
    functions = {name for name in vars(sentences) if name.endswith("_sentence")}
    assert functions == {case[0].__name__ for case in CASES}


def test_the_committed_tables_belong_together():
    """The gains are differences of the results; published models are of the same subsets and columns."""
    table, gains, published = (pd.read_csv(FOLDER / f"{name}.csv") for name in ("results", "gains", "published"))
    models = table.set_index(["subset", "model"])
    for gain in gains.itertuples():
        student, control = (models.loc[(gain.subset, name), gain.score] for name in (gain.student, gain.control))
        assert student - control == pytest.approx(gain.difference, abs=6e-5)
    assert set(published.columns) <= set(table.columns) and set(published["role"]) == {"published"}
    settings = read_settings(FOLDER / "params.yaml")
    trained = {*settings.teachers, *settings.students, *settings.transfer}
    assert trained | {"majority label", "minilm-l6, untrained", "tiny-kd"} == set(table["model"])
