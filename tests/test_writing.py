"""A language model writes labelled texts: plan, cleaning, filters, and a run that goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from itertools import count

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML
from transformers import TopPLogitsWarper

import loopback
from distillery.cli import main
from distillery.errors import UserError
from distillery.models.packed.decoding import next_tokens
from distillery.tasks.schema import load_task
from distillery.teachers import cache, writing
from distillery.teachers.text_cleaning import clean_text, label_reasons, rejection_reason, repeat_reasons
from distillery.teachers.text_plan import (
    PlannedText,
    label_counts,
    parse_topics,
    plan_texts,
    shown_examples,
    topic_turns,
    writing_turns,
)
from distillery.teachers.text_requests import read_text_request
from distillery.teachers.writing import STAGES, label_texts, write_texts
from tiny import ROOT

FILE = "data/texts/mine.yaml"
TASK = load_task("finance-prompted", ROOT / "tasks")

# ---------------------------------------------------------------------------------------------------------------- plan


@given(
    n=st.integers(1, 200),
    weights=st.lists(st.floats(0.1, 10), min_size=3, max_size=3),
    topics=st.integers(1, 20),
    seed=st.integers(0, 9),
)
def test_every_label_gets_its_share_and_every_topic_in_turn(n, weights, topics, seed):
    shares = dict(zip(TASK.names, weights, strict=True))
    counts = label_counts(n, TASK.names, shares)
    assert sum(counts.values()) == n
    assert all(abs(counts[name] - n * shares[name] / sum(weights)) < 1 for name in TASK.names)
    names = {label: [f"{label} {i}" for i in range(topics + k)] for k, label in enumerate(TASK.names)}
    planned = plan_texts(counts, names, {"form": ["a", "b"]}, seed)
    assert planned == plan_texts(counts, names, {"form": ["a", "b"]}, seed)
    assert Counter(text.label for text in planned) == Counter({name: k for name, k in counts.items() if k})
    assert [text.cycle for text in planned] == sorted(text.cycle for text in planned)
    assert max(Counter((text.cycle, text.label, text.topic) for text in planned).values()) == 1
    for label, topics_of_label in names.items():
        used = Counter(text.topic for text in planned if text.label == label)
        few = counts[label] // len(topics_of_label)
        assert all(used[topic] in (few, few + 1) for topic in topics_of_label) and set(used) <= set(topics_of_label)


def test_equal_numbers_and_rounded_shares():
    assert label_counts(9, ["a", "b", "c"], None) == {"a": 3, "b": 3, "c": 3}
    assert label_counts(10, ["a", "b", "c"], None) == {"a": 4, "b": 3, "c": 3}
    assert label_counts(10, ["a", "b", "c"], {"a": 2.0, "c": 3.0}) == {"a": 4, "b": 0, "c": 6}


def test_each_cycle_shows_examples_of_its_label_in_another_order():
    def shown(label, cycle, n):
        return [example.text for example in shown_examples(TASK, PlannedText(label, "x", {}, cycle), n, 0)]

    for label in TASK.names:
        known = {example.text for example in TASK.few_shot if example.label == label}
        orders = {tuple(shown(label, cycle, 9)) for cycle in range(9)}
        assert len(orders) > 1 and all(set(order) == known for order in orders)
        assert shown(label, 2, 2) == shown(label, 2, 9)[:2] and shown(label, 2, 0) == []


def test_a_request_holds_label_meaning_topic_and_form_and_nothing_but_the_task_file():
    (text,) = plan_texts({"positive": 0, "negative": 1}, {"negative": ["dividend"]}, {"form": ["headline"]}, 0)
    examples = shown_examples(TASK, text, 3, 0)
    turns = writing_turns(TASK, text, examples)
    assert [turn["role"] for turn in turns] == ["system", *["user", "assistant"] * 3, "user"]
    assert [turn["content"] for turn in turns[2:-1:2]] == [example.text for example in examples]
    assert turns[-1]["content"].endswith("\nTopic: dividend\nForm: headline")
    for part in (TASK.prompt.instruction, "negative", TASK.labels["negative"]):
        assert part in turns[0]["content"]
    (request,) = topic_turns(TASK, "negative", 7)
    assert " 7 " in request["content"] and TASK.labels["negative"] in request["content"]
    assert all((e.text in request["content"]) == (e.label == "negative") for e in TASK.few_shot)


@pytest.mark.parametrize(
    ("answer", "topics"),
    [
        ("1. Dividends 2. Job cuts 3. Dividends", ["Dividends", "Job cuts"]),
        ("Here is a list:\n1) **Oil prices**\n2) Mergers; \n", ["Oil prices", "Mergers"]),
        ("1. Growth of 3.5 percent 2. Q4 results", ["Growth of 3.5 percent", "Q4 results"]),
        ("Dividends, job cuts", []),
        ("1. " + "word " * 13, []),
        ("", []),
    ],
)
def test_topics_are_the_items_of_a_numbered_list(answer, topics):
    assert parse_topics(answer) == topics


# ------------------------------------------------------------------------------------------------------------ cleaning

BODY = st.sampled_from(
    [
        "Talvik Oyj raised its dividend to EUR 0.45 a share.",
        "anyone holding $PRQT into the print? I'm not",
        "Order intake fell 3.5% to EUR 31 mn, against EUR 44 mn",
        "The CEO said \"we are done\" and left.",
        "Nine (of ten) plants re-opened: what a quarter",
        "1,200 jobs go at Kessoring's second site",
    ]
)  # fmt: skip
LAYER = st.sampled_from(
    [
        "{}",
        '"{}"',
        "“{}”",
        "«{}»",
        "`{}`",
        "**{}**",
        "Sentence: {}",
        "**Sentence:** {}",
        "New sentence 1: {}",
        "Text: {}",
        "Headline:\n{}",
        "1. {}",
        "1) {}\n2) Another text of the list.",
        "- {}",
        "positive: {}",
        "(negative) {}",
        "Here is a new sentence about dividends: {}",
        "Sure! Here's one: {}",
        "{}\nSentiment: positive",
        "{}\n\nLabel: neutral\nTopic: dividend",
        "{} (positive)",
        "{}\n\n**Explanation:** it would move the price.",
        "<think>one of each: two</think>\n{}",
    ]
)


@given(body=BODY, layers=st.lists(LAYER, max_size=2, unique=True))
def test_what_models_put_around_a_text_is_taken_off(body, layers):
    answer = body
    for layer in layers:
        if "<think>" in layer and layer != layers[-1]:
            continue  # reasoning stands before the whole answer
        answer = layer.format(answer)
    assert clean_text(TASK, answer) == body


@given(st.text(alphabet=st.sampled_from("ab :.\n\"'*_-12)(“”`"), max_size=30) | st.text(max_size=40))
def test_a_cleaned_text_is_one_line_and_is_cleaned_to_itself(answer):
    text = clean_text(TASK, answer)
    assert clean_text(TASK, text) == text == " ".join(text.split())
    assert len(text) <= len(answer)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("I'm sorry, but I cannot write this sentence for you.", "refused"),
        ("Profit rose again", "too short"),
        ("Profit rose again today", ""),
        ("word " * 10, ""),
        ("word " * 11, "too long"),
    ],
)
def test_texts_that_cannot_be_used_have_a_reason(text, reason):
    assert rejection_reason(text, 4, 10) == reason


def test_a_text_too_many_goes_and_the_first_of_its_kind_stays():
    texts = [
        "Profit of Talvik rose to EUR 9.4 mn in the quarter.",
        "Profit of Talvik rose to EUR 12 mn in the quarter.",  # digits do not count
        TASK.few_shot[2].text.replace("12%", "14%"),
        "The board of Veltmark meets in Galway.",
        "Profit of Talvik rose to EUR 9.4 mn in the quarter.",
    ]
    reasons = ["", "repeats another text", "repeats an example", "", "repeats another text"]
    assert repeat_reasons(texts, [example.text for example in TASK.few_shot], 0.85) == reasons
    assert repeat_reasons([], [], 0.85) == []
    assert repeat_reasons(texts[2:3] * 2, [TASK.few_shot[2].text], 0.85) == ["repeats an example"] * 2


def test_the_label_given_must_be_the_label_wanted():
    probabilities = np.array([[0.6, 0.3, 0.1], [0.3, 0.6, 0.1], [0.4, 0.3, 0.3], [np.nan] * 3])
    reasons = ["", "another label", "low confidence", "no label read"]
    assert label_reasons(probabilities, ["positive"] * 4, TASK.names, 0.5) == reasons


@given(
    tenths=st.lists(st.integers(-60, 60), min_size=2, max_size=12, unique=True),
    top_p=st.floats(0.05, 0.99),
    temperature=st.floats(0.3, 2),
)
def test_nucleus_sampling_draws_from_the_tokens_that_transformers_keeps(tenths, top_p, temperature):
    logits = torch.tensor([tenths]) / 10
    scores = logits / temperature
    kept = TopPLogitsWarper(top_p)(None, scores)[0].isfinite()
    ranked = scores[0].softmax(-1).sort(descending=True).values
    if (ranked.cumsum(0) - top_p).abs().min() < 1e-5:
        return  # rounding decides on the last token
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = next_tokens(logits.expand(200, -1), temperature, top_p)
    assert kept[drawn].all()
    likely = (scores[0].softmax(-1) / ranked[: kept.sum()].sum() > 0.2) & kept
    assert set(torch.nonzero(likely)[:, 0].tolist()) <= set(drawn.tolist())


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def folder(tmp_path):
    """A folder with the task file, where requests are put."""
    (tmp_path / "data/texts").mkdir(parents=True)
    shutil.copytree(ROOT / "tasks", tmp_path / "tasks")
    return tmp_path


def write_request(folder, request, name="mine"):
    YAML().dump(request, folder / f"data/texts/{name}.yaml")
    return f"data/texts/{name}.yaml"


def local_request(tiny_models, **changes):
    teacher = {"kind": "lm", "model": "tiny", "few_shot": 1, "batch_size": 4}
    return {
        "task": "finance-prompted",
        "models": {"tiny": {"folder": str(tiny_models / "tiny-llama")}},
        "teacher": teacher,
        "texts": 9,
        "topics": ["dividend", "lawsuit", "merger"],
        "examples": 3,
        "max_new_tokens": 12,
        "batch_size": 2,
        "min_words": 1,
        "min_confidence": 0.0,
    } | changes


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_killed_run_ends_as_if_it_had_not_been_killed(folder, tiny_models, monkeypatch):
    file = write_request(folder, local_request(tiny_models))
    whole = write_texts(folder, file)
    text, origin = whole.read_text(), json.loads(whole.with_suffix(".json").read_text())
    assert origin["computed_texts"] == 9
    assert write_texts(folder, file).read_text() == text  # from the store
    assert json.loads(whole.with_suffix(".json").read_text())["computed_texts"] == 0
    insert = cache._insert_answers
    for stop in (2, 7):  # within the second batch of texts, and the first one of labels
        whole.unlink()
        (folder / cache.STORE_PATH).unlink()
        calls = count(1)

        def stopped(connection, answered, calls=calls, stop=stop):
            if next(calls) == stop:
                insert(connection, answered[:1])
                raise KeyboardInterrupt
            insert(connection, answered)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(cache, "_insert_answers", stopped)
            write_texts(folder, file)
        assert not whole.exists()
        assert write_texts(folder, file).read_text() == text
        computed = json.loads(whole.with_suffix(".json").read_text())["computed_texts"]
        assert computed == (9 - 2 if stop == 2 else 0)


def test_the_seed_decides_the_texts(folder, tiny_models):
    first, second, other = (
        write_texts(folder, write_request(folder, local_request(tiny_models, seed=seed), name))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first.read_text() == second.read_text()

    def answers(path):
        funnel = json.loads(path.with_suffix(".json").read_text())
        return path.read_text(), funnel["rejected"]

    assert answers(first) != answers(other)


def test_texts_of_an_earlier_request_do_not_change_those_of_a_later_one(folder, tiny_models):
    """Two of the three texts of a label share batches with a third one here, so they are written anew."""
    alone = write_texts(folder, write_request(folder, local_request(tiny_models, texts=9), "a")).read_text()
    (folder / cache.STORE_PATH).unlink()
    write_texts(folder, write_request(folder, local_request(tiny_models, texts=8), "b"))
    assert write_texts(folder, write_request(folder, local_request(tiny_models, texts=9), "a")).read_text() == alone


WORDS = ["amber", "birch", "cedar", "delta", "ember", "flint", "grove", "haven", "inlet", "jetty", "knoll", "larch"]


class Author:
    """Stands in for an endpoint: writes texts, proposes topics and labels texts by a word in them.

    Every fifth text repeats the first one, every seventh is empty but for a cue, and every third has another label.
    """

    def __init__(self):
        self.written = count()

    def __call__(self, path, request):
        content = request["messages"][-1]["content"]
        if "numbered list" in content:
            answer = "Here are topics: 1. Oil 2. Grain 3. Ships"
        elif content.startswith("Write a text."):
            i, system = next(self.written), request["messages"][0]["content"]
            label = "neutral" if i % 3 == 2 else next(name for name in TASK.words if f"you write is {name}:" in system)
            words = np.random.default_rng(i).choice(WORDS, 9)
            answer = f'Sentence: "{" ".join(words)} is {label} news"'
            answer = "Sentence: " if i % 7 == 6 else answer.replace(" ".join(words), "amber") if i % 5 == 4 else answer
        else:
            answer = next(word for word in TASK.words if f"is {word} news" in content)
        message = {"role": "assistant", "content": answer}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return 200, {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": "m",
            "choices": [choice],
            "usage": usage,
        }


def test_an_endpoint_writes_texts_and_the_funnel_counts_them(folder, capsys):
    with loopback.Proxy(Author()) as proxy:
        api = {"model": "m", "base_url": proxy.url, "concurrency": 1}
        request = {"task": "finance-prompted", "teacher": {"kind": "api", "api": api}, "texts": 18, "topics": 3}
        request |= {"attributes": {"form": ["headline", "post"]}, "top_p": 0.9, "temperature": 0.8}
        path = write_texts(folder, write_request(folder, request))
        sent = [body for body in proxy.requests if body["messages"][-1]["content"].startswith("Write a text.")]
    assert len(sent) == 18 and {(body["top_p"], body["temperature"]) for body in sent} == {(0.9, 0.8)}
    lines, origin = read_lines(path), json.loads(path.with_suffix(".json").read_text())
    funnel, rejected = origin["funnel"], origin["rejected"]
    assert origin["topics"] == dict.fromkeys(TASK.names, ["Oil", "Grain", "Ships"]) and list(funnel) == list(STAGES)
    assert funnel["written"] == {"all": 18, **dict.fromkeys(TASK.names, 6)}
    totals = [funnel[stage]["all"] for stage in STAGES]
    assert totals[1] == 18 - 2 and totals[3] == len(lines)
    assert {reason: part["texts"] for reason, part in rejected.items()} == {
        "empty": 2,
        "repeats another text": totals[1] - totals[2],
        "another label": totals[2] - totals[3],
    }
    assert totals[1] - totals[2] > 0 and totals[2] - totals[3] > 0
    assert all(funnel[stage]["all"] == sum(funnel[stage][name] for name in TASK.names) for stage in STAGES)
    for line in lines:
        assert list(line) == ["id", "text", "label", "topic", "attributes", "probabilities"]
        assert f"is {line['label']} news" in line["text"] and not line["text"].startswith("Sentence")
        assert line["probabilities"] == {name: float(name == line["label"]) for name in TASK.names}
    assert len({line["id"] for line in lines}) == len(lines)
    assert origin["model"]["model"] == "m" and origin["request"]["texts"] == 18
    assert "computed_texts" not in origin  # the client keeps the answers, and does not count them


def test_an_endpoint_is_sent_no_sampling_that_the_request_leaves_out(folder):
    with loopback.Proxy(Author()) as proxy:
        api = {"model": "m", "base_url": proxy.url, "concurrency": 1}
        request = {"task": "finance-prompted", "teacher": {"kind": "api", "api": api}, "texts": 3, "topics": ["Oil"]}
        write_texts(folder, write_request(folder, request | {"temperature": None}))
        sent = [body for body in proxy.requests if body["messages"][-1]["content"].startswith("Write a text.")]
    assert len(sent) == 3 and not any({"temperature", "top_p"} & set(body) for body in sent)


class Labeller:
    """A teacher that gives the first texts one distribution over the labels and the others another one."""

    def __init__(self, probabilities):
        self.probabilities = probabilities

    def predict(self, rows):
        return self.probabilities[rows.index]


def test_batch_calibration_counts_every_wanted_label_the_same(folder, tiny_models, monkeypatch):
    request = local_request(tiny_models)
    request["teacher"] = request["teacher"] | {"calibrate": "batch"}
    file = write_request(folder, request)
    model = writing.Writer(folder, file, *read_text_request(folder, file))
    probabilities = np.array([[0.8, 0.1, 0.1]] * 7 + [[0.2, 0.3, 0.5]] * 2)
    monkeypatch.setattr(model, "labeller", lambda n: Labeller(probabilities))
    rows = pd.DataFrame({"id": range(9), "text": "a", "label": ["positive"] * 7 + ["negative"] * 2})
    calibrated, prior = label_texts(model, rows)
    assert prior == pytest.approx([0.5, 0.2, 0.3])
    assert not np.allclose(prior, probabilities.mean(0))
    quotients = probabilities / np.array([0.5, 0.2, 0.3])
    assert np.allclose(calibrated, quotients / quotients.sum(1, keepdims=True))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"temperature": None}, "temperature: must be a number above 0 for `kind: lm`; only an endpoint may need null"),
        ({"texts": 0}, "texts: must be greater than 0, not 0"),
        ({"topic": ["a"]}, "topic: unknown key; did you mean `topics`?"),
        ({"topics": []}, "topics: must not be empty"),
        ({"topics": ["a", "a"]}, "(the whole file): `topics` must be different"),
        ({"min_words": 50}, "(the whole file): `min_words` must not be above `max_words`"),
        ({"shares": {"good": 1.0}}, "shares: unknown label 'good'; known: positive, neutral, negative"),
        ({"topics": {"good": ["a"]}}, "topics: unknown label 'good'; known: positive, neutral, negative"),
        ({"topics": {"positive": ["a"], "neutral": ["b"]}}, "topics: none for negative"),
        ({"task": "math"}, "task: texts are written for a task of `kind: classification`, not choice"),
        ({"models": {}}, "models: must be the `model` of the teacher, and no other"),
        ({"teacher": {"kind": "classifier", "model": "tiny"}}, "teacher: must be a `kind: lm` or `api`"),
        (
            {"teacher": {"kind": "lm", "model": "tiny", "examples_from": "gold"}},
            "teacher: `prompts` and `examples_from` need gold rows: leave out",
        ),
        (
            {"teacher": {"kind": "lm", "model": "tiny", "few_shot": 12}},
            "teacher.few_shot: 12 wanted, tasks/finance-prompted.yaml has 9 in `few_shot`",
        ),
        ({"models": {"tiny": {"folder": "nowhere"}}}, "models.tiny.folder: nowhere holds no config.json"),
        (
            {"models": {}, "teacher": {"kind": "api", "api": {"model": "m", "key": "NO_SUCH_KEY"}}},
            "teacher.api.key: set NO_SUCH_KEY in the environment",
        ),
        (
            {"texts": 1, "min_confidence": 1.0},
            "texts: none is left (written: 1, parsed: 1, unique: 1, agreed: 0); nothing",
        ),
        ({"topics": 2}, "topics: the model proposes none in a numbered list; write a list of topics"),
    ],
)
def test_a_request_that_cannot_be_met_ends_in_one_line(folder, tiny_models, change, line):
    file = write_request(folder, local_request(tiny_models) | change)
    with pytest.raises(UserError) as caught:
        write_texts(folder, file)
    assert str(caught.value).startswith(f"{FILE}: {line}") and "\n" not in str(caught.value)
    assert not (folder / "data/texts/mine.jsonl").exists()


def test_the_verb_takes_one_file_or_all(folder, tiny_models, monkeypatch, capsys):
    (folder / "dvc.yaml").touch()
    monkeypatch.chdir(folder)
    for name in ("a", "b"):
        write_request(folder, local_request(tiny_models, texts=2), name)
    main(["texts", "b"])
    assert capsys.readouterr().out.splitlines()[-1] == "data/texts/b.jsonl"
    main(["texts"])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("data")]
    assert printed == ["data/texts/a.jsonl", "data/texts/b.jsonl"]
    with pytest.raises(SystemExit, match=r"error: .*data/texts/none.yaml: no such file"):
        main(["texts", "none"])


KEPT = sorted((ROOT / "data/texts").glob("*.jsonl"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_the_texts_in_the_repository_are_those_that_were_requested(path):
    request, task = read_text_request(ROOT, path.with_suffix(".yaml").relative_to(ROOT).as_posix())
    origin, lines = json.loads(path.with_suffix(".json").read_text(encoding="utf-8")), read_lines(path)
    assert origin["request"] == request.model_dump(exclude_defaults=True)
    assert origin["funnel"]["written"]["all"] == request.texts and origin["funnel"]["agreed"]["all"] == len(lines)
    assert Counter(line["label"] for line in lines) == Counter(
        {name: origin["funnel"]["agreed"][name] for name in task.names}
    )
    for line in lines:
        p = line["probabilities"]
        assert list(p) == task.names and sum(p.values()) == pytest.approx(1, abs=1e-3)
        assert max(p, key=p.get) == line["label"] and p[line["label"]] >= request.min_confidence - 1e-4
        assert line["topic"] in origin["topics"][line["label"]] and clean_text(task, line["text"]) == line["text"]
    texts = [line["text"] for line in lines]
    assert not any(repeat_reasons(texts, [example.text for example in task.few_shot], request.near_duplicate))
