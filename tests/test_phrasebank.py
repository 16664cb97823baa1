"""The public benchmark's script on made-up sentences in PhraseBank's file format."""

from __future__ import annotations

import importlib.util
import itertools
import re
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

FILE = tiny.ROOT / "benchmarks" / "phrasebank.py"
LOST = "\N{REPLACEMENT CHARACTER}"
WORDS = {"positive": "rose", "neutral": "was at par with", "negative": "fell from"}


@pytest.fixture(scope="module")
def bank():
    sys.path.insert(0, str(FILE.parent))  # as when it is run
    spec = importlib.util.spec_from_file_location("phrasebank", FILE)
    module = sys.modules["phrasebank"] = importlib.util.module_from_spec(spec)  # pydantic looks there
    spec.loader.exec_module(module)
    return module


def sentences() -> list[tuple[str, str]]:
    """200 made-up sentences with umlauts; the last 40 are twins of others, but for their numbers."""
    rng, out = np.random.default_rng(0), []
    for i in range(160):
        label = list(WORDS)[i % 3]
        syllables = ["".join(rng.choice(list("bdfgklmnrstvaeiouäö"), 6)) for _ in range(4)]
        out.append(
            (f"{syllables[0]} of {syllables[1]} Oyj {WORDS[label]} EUR {i}.5 mn {' @ '.join(syllables[2:])} .", label)
        )
    return out + [(re.sub(r"\d+", "7", text), label) for text, label in out[::4]]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """50-agree and all-agree as published: latin-1, `sentence@label`; all-agree is every second row."""
    folder = tmp_path_factory.mktemp("fpb")
    for name, rows in (("50Agree", sentences()), ("AllAgree", sentences()[::2])):
        lines = "".join(f"{text}@{label}\r\n" for text, label in rows)
        (folder / f"Sentences_{name}.txt").write_bytes(lines.encode("latin-1"))
    return folder


def test_both_encodings_and_the_lost_letters_are_read(bank, files, tmp_path):
    rows = bank.phrasebank(files)
    assert list(zip(rows["text"], rows["label"], strict=True)) == sentences()
    assert rows["allagree"].tolist() == [i % 2 == 0 for i in range(len(rows))]

    # the re-saved file: UTF-8, some letters lost; it goes before, and all-agree's rows are still found in it
    (tmp_path / "derived").mkdir()
    lost = [(text.replace("ä", LOST), label) for text, label in sentences()]
    lines = "".join(f"{text}@{label}\n" for text, label in lost)
    (tmp_path / "derived/Sentences_50Agree.repaired.utf8.txt").write_text(lines, encoding="utf-8")
    for name in ("50Agree", "AllAgree"):
        (tmp_path / f"Sentences_{name}.txt").write_bytes((files / f"Sentences_{name}.txt").read_bytes())
    repaired = bank.phrasebank(tmp_path)
    assert repaired["text"].tolist() == [text for text, _ in lost] and LOST in "".join(repaired["text"])
    assert repaired["allagree"].tolist() == rows["allagree"].tolist()


def test_files_that_are_not_the_benchmark_end_in_one_line(bank, files, tmp_path):
    with pytest.raises(UserError, match=r"^--data .*: no derived/.*txt or Sentences_50Agree.txt there$"):
        bank.phrasebank(tmp_path)
    (tmp_path / "Sentences_50Agree.txt").write_bytes((files / "Sentences_50Agree.txt").read_bytes())
    for line, why in (
        ("No label here .", "must be `sentence@label` with one of negative, neutral, positive"),
        ("@positive", "must be `sentence@label` with one of negative, neutral, positive"),
        ("Nowhere in the other file .@positive", "not in Sentences_50Agree.txt"),
    ):
        first = "@".join(sentences()[0])
        (tmp_path / "Sentences_AllAgree.txt").write_text(f"{first}\n{line}\n", encoding="latin-1")
        with pytest.raises(UserError) as caught:
            bank.phrasebank(tmp_path)
        assert str(caught.value) == f"Sentences_AllAgree.txt, line 2: {why}"


@pytest.fixture(scope="module")
def headlines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("headlines")
    twin = sentences()[1][0].replace("1.5", "9.9")
    rows = [f"Harbour firm number {n} sells its {n} ferries to rival" for n in range(12)]
    lines = [
        "Headlines,Description",
        *(f'"{row}",short' for row in rows),
        f'"Company news\n\n{twin}",',
        f'"{rows[0]}",',
    ]
    (folder / "a.csv").write_bytes("\n".join(lines).encode("cp1252"))
    return folder


def settings(folder, tiny_models):
    """The script's own settings with a tiny model, short phases, and one more student that goes on from another."""
    text = YAML(typ="safe", pure=True).load((tiny.ROOT / "benchmarks/phrasebank.yaml").read_text(encoding="utf-8"))
    text["headlines"] = 8
    text["models"] = {name: {"folder": str(tiny_models / "tiny-bert")} for name in text["models"]}
    for spec in itertools.chain(*(text[part].values() for part in ("starts", "teachers", "students"))):
        for phase in spec["phases"]:
            phase.pop("epochs", None)
            phase["steps"] = 1
    with open(folder / "settings.yaml", "w") as file:
        YAML(typ="safe", pure=True).dump(text, file)
    return folder / "settings.yaml", text


def test_every_seed_draws_a_split_without_twins_across_it(bank, files, headlines, tiny_models, tmp_path):
    path, _ = settings(tmp_path, tiny_models)
    chosen = validate_section(bank.Settings, read_yaml(path), path.name)
    rows, pool = bank.phrasebank(files), bank.read_headlines(headlines)
    assert len(pool) == 13  # each once, without the section's name; too short ones left out
    seen = []
    for seed in (0, 1):
        drawn = bank.draw(rows, pool, chosen, seed, tmp_path)
        texts = {where: part["text"].tolist() for where, part in drawn.groupby("split_ref")}
        assert [len(texts[f"50agree/{part}"]) for part in ("train", "validation", "test")] == pytest.approx(
            [0.75 * len(rows), 0.10 * len(rows), 0.15 * len(rows)], abs=12
        )
        for part in ("validation", "test"):
            for other in set(texts) - {"50agree/test", f"50agree/{part}"}:
                assert nearest_texts(texts[f"50agree/{part}"], texts[other])[0].max() < 0.85
        assert len(texts["headlines/pool"]) == 8 and len(texts["own/pool"]) > 2000 and "spliced/pool" in texts
        seen.append(texts["50agree/test"])
    assert seen[0] != seen[1]


def test_spliced_sentences_join_two_at_the_same_word(bank):
    texts = [
        f"The {kind} of Company {i} {moved} to EUR {i}.1 mn from EUR {i + 7} mn in the same quarter of {1990 + i} ."
        for i, (kind, moved) in enumerate(itertools.product(["operating profit", "net sales"], ["rose", "fell"] * 4))
    ]
    made = bank.splice(texts, 3, 0)
    assert made == bank.splice(texts, 3, 0) != bank.splice(texts, 3, 1)
    assert len(made) == len(set(made)) > 15 and not set(made) & set(texts)
    for text in made:
        cuts = [m.end() for m in bank.CUT.finditer(text)]
        heads = [cut for cut in cuts if any(a.startswith(text[:cut]) for a in texts)]
        word = {cut: text[:cut].rsplit(" ", 1)[1] for cut in heads}
        assert any(any(b.endswith(f"{word[cut]}{text[cut:]}") for b in texts) for cut in heads), text
    assert bank.splice(texts, 0, 0) == [] == bank.splice([], 3, 0)


def test_a_run_writes_its_tables_and_a_second_one_trains_nothing(
    bank, files, headlines, tiny_models, tmp_path, monkeypatch, capsys
):
    path, text = settings(tmp_path, tiny_models)
    (tmp_path / "phrasebank.md").write_text("# Title\n\n<!-- table -->\nstale\n<!-- end -->\n\nProse.\n")
    arguments = ["--data", files, "--headlines", headlines, "--settings", path, "--cache", tmp_path / "cache"]
    arguments = [str(a) for a in [*arguments, "--out", tmp_path, "--seeds"]]
    bank.main([*arguments, "2"])
    table = pd.read_csv(tmp_path / "phrasebank.csv")
    assert tuple(table.columns) == bank.COLUMNS
    taught = {
        who for spec in text["students"].values() for phase in spec["phases"] for who in phase.get("teachers", [])
    }
    ours = table[table["role"] != "published"]
    assert set(ours["model"]) == {
        *("commonest label", "minilm-l6, untrained", "minilm-l6-finance, no PhraseBank row"),
        *taught,
        *text["students"],
    }
    assert set(ours["subset"]) == {"50agree", "allagree"}
    assert (ours.set_index("model").loc[[*taught, *text["students"]], "seeds"] == 2).all()
    assert ((ours["accuracy_low"] <= ours["accuracy_mean"]) & (ours["accuracy_mean"] <= ours["accuracy_high"])).all()
    assert (ours.set_index("model").loc[list(text["students"]), "minutes"] > 0).all()
    md = (tmp_path / "phrasebank.md").read_text(encoding="utf-8")
    assert md.startswith("# Title") and md.endswith("Prose.\n") and "stale" not in md and "| commonest label |" in md

    written = (tmp_path / "phrasebank.csv").read_bytes()
    monkeypatch.setattr(bank, "train_phase", None)  # all that is left is reading
    bank.main([*arguments, "2"])
    assert (tmp_path / "phrasebank.csv").read_bytes() == written
    with pytest.raises(TypeError):  # a third seed needs new parts
        bank.main([*arguments, "3"])


def test_the_board_counts_right_answers_seed_by_seed(bank):
    board, names = bank.Board(), bank.task().names
    cost = {"minutes": 2.0, "parameters": 5_000_000, "commit": "abc"}
    gold = pd.DataFrame(
        {"label": names * 4, "group": [str(i) for i in range(12)], "allagree": [True] * 6 + [False] * 6}
    )
    right = np.eye(3)[[names.index(label) for label in gold["label"]]]
    board.add("m", "student", 0, gold, right, cost)
    wrong = np.roll(right, 1, axis=1)
    half = np.where(np.arange(12)[:, None] < 6, right, wrong)
    board.add("m", "student", 1, gold, half, cost)
    table = board.table().set_index(["subset", "model"])
    assert table.loc[("50agree", "m"), "accuracy_mean"] == 0.75 and table.loc[("allagree", "m"), "accuracy_mean"] == 1
    assert table.loc[("50agree", "m"), "accuracy_low"] < 0.75 < table.loc[("50agree", "m"), "accuracy_high"]
    assert table.loc[("50agree", "m"), ["seeds", "minutes", "params_m", "commit"]].tolist() == [2, 2.0, 5.0, "abc"]
    for seed in (0, 1):
        board.add("c", "control", seed, gold, wrong, cost)
        board.add("longer", "control", seed, gold, right, cost)
    student = StudentConfig(model="x", arch="classifier", phases=[], control="c")
    longer = StudentConfig(model="x", arch="classifier", phases=[])
    lines = board.differences({"m": student, "longer": longer})
    assert len(lines) == 8 and "| 50agree | m | longer | 2 | accuracy | -0.2500 |" in lines[4]
    assert (
        "| 50agree | m | c | 2 | accuracy | +0.7500 |" in lines[0]
        and "| allagree | m | c | 2 | accuracy | +1.0000 | +1" in lines[2]
    )
