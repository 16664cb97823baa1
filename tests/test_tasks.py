"""Task files: their schema, and the prompts from them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from distillery.errors import UserError
from distillery.tasks.parsing import parse_explained_label, parse_label
from distillery.tasks.prompts import chat_turns, label_question, render_answer, render_prompt, user_turn, with_options
from distillery.tasks.schema import FewShotExample, Task, TaskPrompt, load_task

MOOD = """
kind: classification
labels: {good: it went well, bad: it went badly}
prompt: {system: Judge., instruction: Good or bad?, template: "{instruction} {text} Mood:"}
verbalizer: {good: "+"}
few_shot:
  - {text: we won, label: good}
  - {text: we lost, label: bad}
"""
LABELS = "kind: classification\nlabels: {a: one, b: two}\n"


@pytest.fixture
def load(tmp_path):
    def of(content: str) -> Task:
        (tmp_path / "mood.yaml").write_text(content, encoding="utf-8")
        return load_task("mood", tmp_path)

    return of


def test_words_and_the_order_of_labels(load):
    task = load(MOOD)
    assert task.names == ["good", "bad"]
    assert [task.word(label) for label in task.names] == ["+", "bad"]
    assert render_answer(task, "good") == "+"
    assert render_answer(task, "good", "plain") == " +"


def test_labels_that_yaml_1_1_would_take_for_booleans(load):
    assert load("kind: classification\nlabels: {yes: it is, no: it is not}").names == ["yes", "no"]


def test_turns_with_and_without_examples(load):
    task = load(MOOD)
    request = {"role": "user", "content": "Good or bad? we drew Mood:"}
    system = {"role": "system", "content": "Judge."}
    examples = [
        {"role": "user", "content": "Good or bad? we won Mood:"},
        {"role": "assistant", "content": "+"},
        {"role": "user", "content": "Good or bad? we lost Mood:"},
        {"role": "assistant", "content": "bad"},
    ]
    assert chat_turns(task, "we drew") == [system, request]
    assert chat_turns(task, "we drew", 1) == [system, *examples[:2], request]
    assert chat_turns(task, "we drew", 2) == [system, *examples, request]
    with pytest.raises(UserError, match="few_shot: 3 examples wanted, the task file has 2"):
        chat_turns(task, "we drew", 3)


def test_no_system_turn_without_a_system_prompt(load):
    assert [turn["role"] for turn in chat_turns(load(LABELS), "x")] == ["user"]


def test_plain_rendering(load):
    task = load(MOOD)
    prompt = render_prompt(chat_turns(task, "we drew", 1), None, "plain")
    assert prompt == "Judge.\n\nGood or bad? we won Mood: +\n\nGood or bad? we drew Mood:"
    # an example in the prompt looks just like the prompt with its answer
    assert f"{user_turn(task, 'we won')}{render_answer(task, 'good', 'plain')}" in prompt


def test_chat_rendering_ends_where_the_answer_starts(load):
    tokenizer = tiny.word_tokenizer(["Judge Good or bad we drew Mood"], "llama")
    prompt = render_prompt(chat_turns(load(MOOD), "we drew"), tokenizer)
    assert prompt == (
        "<|im_start|>system\nJudge.<|im_end|>\n<|im_start|>user\nGood or bad? we drew Mood:<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "beginning",
    [
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}",
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('Only user and assistant roles!') }}{% endif %}",
        "{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}",  # left out without a word
    ],
)
def test_a_template_without_a_system_role_gets_its_text_in_the_first_user_turn(load, beginning):
    tokenizer, task = tiny.word_tokenizer(["Judge Good or bad we drew Mood"], "llama"), load(MOOD)
    tokenizer.chat_template = beginning + tokenizer.chat_template
    rendered = render_prompt(chat_turns(task, "we drew", 1), tokenizer)
    assert rendered.startswith(
        "<|im_start|>user\nJudge.\n\nGood or bad? we won Mood:<|im_end|>\n<|im_start|>assistant\n+"
    )
    assert rendered.count("Judge.") == 1 and "system" not in rendered


def test_a_template_that_refuses_the_conversation_ends_in_one_line(load):
    tokenizer = tiny.word_tokenizer(["we drew"], "llama")
    tokenizer.chat_template = "{{ raise_exception('One turn of the user only!') }}"
    with pytest.raises(
        UserError, match=r"the chat template refuses the prompt \(One turn of the user only!\); set `prom"
    ):
        render_prompt(chat_turns(load(MOOD), "we drew"), tokenizer)


def test_chat_rendering_needs_a_chat_template(load):
    tokenizer = tiny.word_tokenizer(["we drew"], "bert")
    with pytest.raises(UserError, match="no chat template; set `prompt: plain`"):
        render_prompt(chat_turns(load(MOOD), "we drew"), tokenizer)


@given(st.text())
def test_any_text_goes_into_the_prompt_unchanged(text):
    """Braces and percent signs in a text are not fields."""
    task = Task(kind="classification", labels={"a": "", "b": ""})
    assert user_turn(task, text) == f"\n\nText: {text}\nLabel:"


def test_the_task_in_the_repository():
    task = load_task("finance-sentiment", tiny.ROOT / "tasks")
    assert task.names == ["positive", "neutral", "negative"]
    assert {shot.label for shot in task.few_shot} == set(task.names)
    assert "{" not in user_turn(task, "Sales rose.")


@pytest.mark.parametrize("path", sorted((tiny.ROOT / "tasks").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_task_in_the_repository_can_be_read_and_has_a_prompt(path):
    task = load_task(path.stem, path.parent)
    assert "{" not in user_turn(task, "Sales rose.")
    for shot in task.few_shot:
        n_options = shot.text.count("\n") if task.kind == "choice" else len(task.names)
        assert task.kind == "qa" or task.names.index(shot.label) < n_options


def test_each_option_stands_after_the_verbalizer_of_its_label():
    task = Task(kind="choice", labels={"A": "", "B": "", "C": ""}, verbalizer={"A": "a"})
    text = with_options(task, "which?", ["this", "that"])
    assert text == "which?\na) this\nB) that"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("", "(the whole file): must be a section of keys and values, not None"),
        (
            "kind: clasification\nlabels: {a: x, b: y}",
            "kind: must be 'classification', 'multilabel', 'choice' or 'qa', not 'clasification'",
        ),
        ("kind: classification", "labels: missing"),
        ("kind: classification\nlabels: {a: one}", "labels: needs at least 2"),
        ("kind: classification\nlabels: [a, b]", "labels: must be a section of keys and values"),
        ("kind: classification\nlabels: {1: x, 2: y}", "labels.1: must be text, not 1"),
        ("kind: classification\nlabels: {a: , b: y}", "labels.a: must be text, not None"),
        ('kind: classification\nlabels: {" a": x, b: y}', "labels. a: must be text without white space around it"),
        (LABELS + "severity: {c: 1.0}", "(the whole file): `severity` names the unknown label 'c'; known: a, b"),
        (LABELS + "severity: {a: 2.0}", "severity.a: must be less than or equal to 1, not 2.0"),
        ("kind: qa\nlabels: {a: x, b: y}", "(the whole file): `kind: qa` has no labels of its own: leave `labels` out"),
        (LABELS + "promt: {}", "promt: unknown key; did you mean `prompt`? allowed: kind, labels, prompt,"),
        (LABELS + "prompt: {sytem: x}", "prompt.sytem: unknown key; did you mean `system`? allowed: system,"),
        (LABELS + 'prompt: {template: "x"}', "prompt: `template` must hold {text}"),
        (
            LABELS + 'prompt: {template: "{txt}"}',
            "prompt: `template` knows no field {txt}; allowed: {instruction}, {response}, {text}",
        ),
        (
            LABELS + 'prompt: {template: "{text} {}"}',
            "prompt: `template` knows no field {}; allowed: {instruction}, {response}, {text}",
        ),
        (LABELS + 'prompt: {template: "{text"}', "prompt: expected '}' before end of string"),
        (LABELS + 'prompt: {rationale: "{text}"}', "prompt: `rationale` knows no field {text}; allowed: {label}"),
        (LABELS + 'prompt: {paraphrase: "{text}"}', "prompt: `paraphrase` knows no field {text}; allowed: none"),
        (LABELS + "verbalizer: {c: x}", "(the whole file): `verbalizer` names the unknown label 'c'; known: a, b"),
        (LABELS + "verbalizer: {a: b}", "(the whole file): two labels have the same word in `verbalizer`"),
        (LABELS + 'verbalizer: {a: ""}', "verbalizer.a: must be text without white space around it, not ''"),
        (LABELS + "few_shot: [{text: x, label: c}]", "(the whole file): `few_shot` names the unknown label 'c'; known"),
        (LABELS + 'few_shot: [{text: "", label: a}]', "few_shot.0.text: must not be empty, not ''"),
        (LABELS + "few_shot: [{label: a}]", "few_shot.0.text: missing"),
        (LABELS + "perturbations: {names: {}}", "perturbations.names.invented: missing"),
        (LABELS + "perturbations: {names: {invented: []}}", "perturbations.names.invented: must not be empty"),
        (
            LABELS + "perturbations: {tickers: '('}",
            "perturbations.tickers: must be a regular expression: missing ), unt",
        ),
        (
            LABELS + "perturbations: {spelling: {'(': x}}",
            "perturbations.spelling.(: must be a regular expression: miss",
        ),
        (
            LABELS + "perturbations: {spelling: {a: '\\1'}}",
            "perturbations: `spelling`: 'a': '\\\\1' does not fit: inv",
        ),
        (
            LABELS + "perturbations: {directions: {up: [Rose]}}",
            "perturbations: `directions.up`: 'Rose' must be in lower",
        ),
        (
            LABELS + "perturbations: {directions: {up: [cut], down: [cut]}}",
            "perturbations: `directions`: 'cut' is in two families, up and down",
        ),
    ],
)
def test_mistakes_give_one_line(load, content, line):
    with pytest.raises(UserError) as caught:
        load(content)
    assert str(caught.value).startswith(f"tasks/mood.yaml: {line}")
    assert "\n" not in str(caught.value)


def test_missing_and_malformed_files(tmp_path):
    with pytest.raises(UserError, match=r"mood\.yaml: no such file"):
        load_task("mood", tmp_path)
    (tmp_path / "mood.yaml").write_text("kind: [")
    with pytest.raises(UserError, match=r"mood\.yaml, line 1: not valid YAML"):
        load_task("mood", tmp_path)


@pytest.mark.parametrize(
    "text, label",
    [
        ("up", "up"),
        (" **Up.** ", "up"),
        ("Answer: DOWN", "down"),
        ("answer - down", "down"),
        ("'Up'\n\nbecause sales rose", "up"),
        ("Up. Sales rose, not down.", "up"),
        ("up: sales rose", "up"),
        ("", None),
        ("Upwards", None),
        ("up, down", None),
        ("up or down", None),
        ("It is up", None),
        ("up\ndown", None),
        ("down, because it fell", None),
        ("dow", None),
    ],
)
def test_an_answer_is_read_strictly_or_not_at_all(text, label):
    task = Task(kind="classification", labels={"up": "", "down": ""}, prompt={"template": "{text}\nAnswer:"})
    assert parse_label(task, text) == label


@pytest.mark.parametrize(
    "text, label",
    [
        ("<think>\nSales rose.\n</think>\n\nup", "up"),
        ("<think>\n\n</think>\n\ndown", "down"),
        ("Sales rose. It may be down.\n</think>\nup", "up"),  # the template has put the first tag into the prompt
        ("<THINK>up?</THINK><think>down?</think>up", "up"),
        ("<thinking>down</thinking>\nup. Sales rose.", "up"),
        ("[THINK]down[/THINK]up", "up"),
        ("<think>\nup", None),  # cut off
        ("up\n</think>\n<think>down", None),
        ("<think>up</think>", None),
        ('{"label": "up"}', "up"),
        ('{"Label": "up", "confidence": 0.9}', "up"),
        ('{"sentiment": "Down"}', "down"),
        ('{"reason": "up", "score": 1}', None),
        ('{"label": ["up", "down"]}', None),
        ('{"label": null}', None),
        ('{"answer": "up"', None),
        ('["up"]', "up"),
        ("{" * 100_000, None),
        ('```json\n{"label": "up"}\n```', "up"),
        ('```JSON\n{"label": "up"}', "up"),
        ('Here it is:\n\n```json\n{\n  "label": "down"\n}\n```\nSales fell.', "down"),
        ("```\nup\n```", "up"),
        ("```up```", "up"),
        ('<think>{"label": "down"}</think>\n```json\n{"label": "up"}\n```', "up"),
        ('```json\n{"label": "up"}\n```\n```json\n{"label": "down"}\n```', None),
        ('down\n```json\n{"label": "up"}\n```', None),
    ],
)
def test_reasoning_fences_and_json_around_a_label_are_read_past(text, label):
    task = Task(kind="classification", labels={"up": "", "down": ""})
    assert parse_label(task, text) == label


def test_numbers_and_truth_values_in_json_are_labels_too():
    task = Task(kind="classification", labels={"1": "", "10": "", "true": ""})
    assert [parse_label(task, f'{{"label": {value}}}') for value in ("1", "10", "true", "2")] == [
        "1",
        "10",
        "true",
        None,
    ]


def test_what_follows_a_label_is_its_explanation_and_words_stand_for_labels():
    task = Task(kind="classification", labels={"up": "", "down": ""}, verbalizer={"up": "1", "down": "2"})
    assert parse_explained_label(task, "2\n\nSales fell.\nBadly.") == ("down", "Sales fell.\nBadly.")
    assert parse_label(task, "up") is None and parse_label(task, "1.5") is None and parse_label(task, "1.") == "up"


def test_solved_examples_may_be_given_and_a_response_format_stands_in_the_template():
    prompt = {"instruction": "I", "response": "R", "template": "{instruction} {response}: {text} ="}
    task = Task(kind="classification", labels={"up": "", "down": ""}, prompt=prompt)
    examples = [FewShotExample(text="a", label="up")]
    assert [turn["content"] for turn in chat_turns(task, "b", examples)] == ["I R: a =", "up", "I R: b ="]
    with pytest.raises(ValueError, match=r"`template` must hold \{response\}"):
        TaskPrompt(response="R")


@pytest.mark.parametrize(
    ("prompt", "turn"),
    [
        ({}, "Does the label up (it {rises}) fit this text? Answer yes or no.\n\nText: a\nAnswer:"),
        (
            {"instruction": "You read news."},
            "You read news.\nDoes the label up (it {rises}) fit this text? Answer yes or no.\n\nText: a\nAnswer:",
        ),
        (
            {
                "instruction": "{label}? {meaning}",
                "template": "{text}\n{instruction} {response}",
                "response": "yes or no:",
            },
            "a\nup? it {rises} yes or no:",
        ),
        (
            {"instruction": "", "template": "{text}\nTopics:"},
            "Does the label up (it {rises}) fit this text? Answer yes or no.\n\na\nTopics:",
        ),
    ],
)
def test_a_question_about_one_label(prompt, turn):
    task = Task.model_validate({"kind": "multilabel", "labels": {"up": "it {rises}", "down": ""}, "prompt": prompt})
    question = label_question(task, "up")
    assert question.names == ["no", "yes"] and chat_turns(question, "a")[-1]["content"] == turn
