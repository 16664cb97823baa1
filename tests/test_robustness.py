"""Rewriting by rule: what must change does, what decides the label stays, and what is unsure is left alone."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from distillery.evaluation.perturbations import (
    FIGURE,
    WORD,
    contrast_pairs_right,
    double_amounts,
    known_words,
    perturbations,
    replace_names,
    respell,
)
from distillery.tasks.schema import Perturbations, load_task

ROOT = Path(__file__).resolve().parents[1]
RULES = load_task("finance-sentiment", ROOT / "tasks").perturbations


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    lines = (ROOT / "data/corpora/finance.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("the profit of Lautakivi rose, said Lautakivi's owner", "the profit of {0} rose, said {0}'s owner"),
        ("$YMBO fell 4%", "$FTIV fell 4%"),
        ("Shares fell in March", "Shares fell in March"),  # a word that opens a sentence could be any word
        ("shares of the EBITDA margin fell", "shares of the EBITDA margin fell"),
        ("the July-to-September stretch", "the July-to-September stretch"),
        ("lender Monte Sibilla and lender Corvato Bank", "lender {0} {1} and lender {2} Bank"),
    ],
)
def test_names_by_hand(text, changed):
    known = known_words(["shares fell, the profit rose, lender to margin owner said stretch of"])
    got = replace_names(text, known, RULES)
    names = [n for n in re.findall(r"[A-Z][a-z]+", got) if n in RULES.names.invented]
    assert got == changed.format(*dict.fromkeys(names))
    assert len(set(names)) == len(set(re.findall(r"\{\d\}", changed)))


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        (
            "operating profit rose to EUR 13.1 mn from EUR 8.7 mn",
            "operating profit rose to EUR 26.2 mn from EUR 17.4 mn",
        ),
        ("profit will be EUR 9-10 mn", "profit will be EUR 18-20 mn"),
        ("costs of $1,204.5 million, 12 % more than in 2019", "costs of $2,409.0 million, 12 % more than in 2019"),
        ("€70m on 4 July, in the 3rd quarter of Q3", "€140m on 4 July, in the 3rd quarter of Q3"),
        ("moved 40 billion euros", "moved 80 billion euros"),
        ("EUR 120 a unit, up from 100", "EUR 120 a unit, up from 100"),  # what is the 100?
        ("61,000 homes at GBP 3 mln", "61,000 homes at GBP 3 mln"),
        ("sales rose 12 %", "sales rose 12 %"),
    ],
)
def test_amounts_by_hand(text, changed):
    assert double_amounts(text, RULES) == changed


@pytest.mark.parametrize(
    ("text", "changed"),
    [
        ("EUR 13.1 mn and 4 %", "€13.1 million and 4 percent"),
        ("it can't pay, won't pay & doesn't pay", "it cannot pay, will not pay and does not pay"),
        ("SEK 5 bn", "SEK 5 billion"),
        ("nothing to change here", "nothing to change here"),
    ],
)
def test_spelling_by_hand(text, changed):
    assert respell(text, RULES.spelling) == changed


def test_on_a_corpus_only_what_a_rule_is_about_changes(corpus):
    rules, known = perturbations(corpus, RULES), known_words(corpus)
    digits = re.compile(r"\d+")
    counted = dict.fromkeys(rules, 0)
    for text in corpus:
        names, amounts, spelling = (rules[change](text) for change in ("names", "amounts", "spelling"))
        for change, new in (("names", names), ("amounts", amounts), ("spelling", spelling)):
            counted[change] += new != text
        assert digits.findall(names) == digits.findall(text) == digits.findall(spelling)
        lower = [word for word in WORD.findall(text) if word.islower()]
        assert lower == [word for word in WORD.findall(names) if word.islower()]  # only names moved
        assert set(WORD.findall(amounts)) == set(WORD.findall(text))  # only numbers moved
        old, new = ([float(n.replace(",", "")) for n in re.findall(FIGURE, t)] for t in (text, amounts))
        assert all(b in (a, pytest.approx(2 * a)) for a, b in zip(old, new, strict=True))
        assert names == rules["names"](text) and replace_names(text, known, RULES) == names
    assert counted["names"] > 1000 and min(counted.values()) > 300


def test_a_rule_without_its_section_is_off(corpus):
    assert perturbations(corpus, Perturbations()) == {}
    assert list(perturbations(corpus, Perturbations(spelling={"a": "b"}))) == ["spelling"]
    assert list(perturbations(corpus, RULES.model_copy(update={"names": None}))) == ["amounts", "spelling"]
    no_calendar = RULES.model_copy(update={"calendar": []})
    assert double_amounts("EUR 5 mn in 12 shops", no_calendar) == "EUR 5 mn in 12 shops"  # no word is a month
    no_units = Perturbations(amounts={"currencies": ["USD"]})
    assert double_amounts("USD 5 mn and 7%", no_units) == "USD 10 mn and 7%"
    assert double_amounts("5 mn", no_units) == "5 mn"
    plain = Perturbations(names={"invented": ["Veltora"]})
    assert replace_names("owner of Nokia and $ABC", {"owner"}, plain) == "owner of Veltora and $ABC"


def test_contrast_pairs_are_right_as_a_whole_or_not_at_all():
    groups = ["a", "a", "b", "b", "c", "c", "d"]
    label = ["up", "down", "up", "down", "up", "up", "down"]  # c differs in no label, d is alone
    right = np.array([[1, 1, 1, 0, 0, 0, 1], [1, 0, 0, 1, 1, 1, 1]], bool)
    share, number = contrast_pairs_right(right, label, groups)
    assert share.tolist() == [0.5, 0.0] and number == 2
    one_answer = np.array(label) == "up"
    assert contrast_pairs_right(one_answer, label, groups)[0].tolist() == [0.0]
    share, number = contrast_pairs_right(right[:, :1], label[:1], groups[:1])
    assert np.isnan(share).all() and number == 0
