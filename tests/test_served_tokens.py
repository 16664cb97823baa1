"""Endpoints as teachers of tokens: what a server returns is what the same model computes here, and no call is lost."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from openai.types import Completion
from ruamel.yaml import YAML

import loopback
import stages
import tiny
from distillery import losses
from distillery.config.load import load_params, validate_section
from distillery.config.schema import ApiConfig, PhaseConfig, StudentConfig
from distillery.data.storage import read_task
from distillery.errors import UserError
from distillery.files import read_yaml, write_json
from distillery.models.label_model import LabelModel
from distillery.models.load import load_model, load_tokenizer
from distillery.models.token_strings import TokenStrings, token_string
from distillery.pipeline.inputs import write_student_inputs
from distillery.pipeline.strip import strip_notebook, write_models
from distillery.tasks.schema import load_task
from distillery.teachers.api.client import Endpoint
from distillery.teachers.api.failures import RetryableError
from distillery.teachers.api.responses import read_completion, read_scored_tokens
from distillery.teachers.api.teacher import ApiTeacher, GivenTokens
from distillery.teachers.api.transport import UNREADABLE, Transport
from distillery.teachers.base import gather_rows
from distillery.teachers.cache import AnswerStore
from distillery.teachers.served_tokens import collect_tokens, vocabulary_check
from distillery.training.openable_teachers import OpenableTeacher
from distillery.training.rows import phase_rows
from distillery.training.run import train_phase
from distillery.training.served_teacher import ServedTeacher, map_tokens, rows_with_tokens, top_k_arrays
from distillery.training.student import build_student
from distillery.training.teacher_outputs import collect_teacher_outputs
from forked import fork_context

TASK = load_task("finance-sentiment", tiny.ROOT / "tasks")
TEXTS = list(dict.fromkeys(tiny.texts()))[:40]
K = 8


def subword_tokenizer(kind: str):
    """A tokenizer of 600 tokens: `bytes`, byte-level as GPT-2's, or `pieces`, with byte fallback as Llama 2's."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|im_start|>", "<|im_end|>"]
    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        special = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
        backend = Tokenizer(models.BPE(byte_fallback=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder, alphabet = decoders.Sequence(steps), []
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=special[0], eos_token=special[1])
    tokenizer.chat_template = tiny.CHAT
    return tokenizer


@pytest.fixture(scope="module")
def speaker(tmp_path_factory) -> Path:
    """The folder of a tiny model that mostly answers with labels."""
    return loopback.build_speaker(tmp_path_factory.mktemp("served") / "speaker", TASK.words)


@pytest.fixture(scope="module")
def ending_speaker(tmp_path_factory) -> Path:
    """The folder of a tiny model whose answers end now and then."""
    return loopback.build_speaker(tmp_path_factory.mktemp("served") / "ending", [*TASK.words, tiny.ROLES[1]])


def open_local(folder: Path) -> LabelModel:
    """The model that a server has, on this machine."""
    return LabelModel(load_model(folder, "causal").eval(), load_tokenizer(folder), TASK, "causal", max_length=512)


@pytest.fixture(scope="module")
def local(speaker) -> LabelModel:
    return open_local(speaker)


def teacher(url: str, path: Path, **settings: Any) -> ApiTeacher:
    base = {"model": "m", "base_url": url, "max_tokens": 1, "timeout": 5.0, "max_attempts": 20, "tokens": "generated"}
    base |= {"top_logprobs": K, "tokenizer": None if settings.get("tokens", "generated") == "generated" else "speaker"}
    spec = validate_section(ApiConfig, base | settings, "params.yaml")
    opened = ApiTeacher(Endpoint("far", spec, AnswerStore(path / "answers.sqlite")), TASK)
    opened.messages = []
    opened.endpoint.log = opened.messages.append
    return opened


def rows(n: int = len(TEXTS)) -> pd.DataFrame:
    return pd.DataFrame({"id": [f"row-{i}" for i in range(n)], "text": TEXTS[:n], "group": None})


# ------------------------------------------------------------------------------- tokens as strings


TEXT = " Umsatz € 5,3 – für das „Jahr“ 🙂\n\tprofit rose\n\n"


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_a_token_is_recognised_in_every_form_that_servers_send(kind):
    tokenizer = subword_tokenizer(kind)
    strings, ids = TokenStrings(tokenizer), tokenizer(TEXT)["input_ids"]
    written = {token_id: data for data, token_id in strings.ids.items()}
    assert b"".join(written[i] for i in ids).removeprefix(b" " if kind == "pieces" else b"") == TEXT.encode()
    assert [strings.find(token_string("?", list(written[i]))) for i in ids] == ids
    assert [strings.find(name) for name in tokenizer.convert_ids_to_tokens(ids)] == ids
    assert [strings.find(f"token_id:{i}") for i in ids] == ids
    assert strings.find(tiny.ROLES[1]) == tokenizer.eos_token_id
    texts = {i: written[i].decode(errors="replace") for i in ids}
    for i, text in texts.items():  # a part of a character is lost where a server sends text alone, and never guessed
        assert strings.find(text) == (None if "\ufffd" in text else i)
    assert any("\ufffd" in text for text in texts.values())
    end = token_string("", [], tokenizer.eos_token_id)  # of llama.cpp
    assert strings.find(end) == tokenizer.eos_token_id and strings.find(token_string("", [], ids[-1])) is None
    for unknown in ("Unternehmensgewinnsteuer", "", "token_id:600", "bytes:\\xff\\xfe"):
        assert strings.find(unknown) is None


def test_text_that_looks_like_a_stored_form_stays_apart_from_it():
    strings = TokenStrings(subword_tokenizer("bytes"))
    name = next(name for name in strings.names if name.startswith("Ġ") and len(name) > 3)
    assert strings.find(name) == strings.find(name.replace("Ġ", " ")) == strings.names[name]
    assert strings.find(token_string(name, name.encode())) is None  # a letter of Maltese, not a blank


# ------------------------------------------------------------------------------- what a server returns


def local_top_k(local: LabelModel, texts: list[str], completions: list, folder: Path, k: int = K):
    return collect_teacher_outputs(
        folder, lambda _: local, texts, fold=[-1] * len(texts), completions=lambda _: completions, top_k=k
    )


def assert_same_signals(arrays: dict[str, np.ndarray], expected: Any) -> None:
    """The served top-k is that of the local model, within the rounding of float16 and of float32 products."""
    np.testing.assert_array_equal(arrays["token_offsets"], expected.token_offsets)
    np.testing.assert_array_equal(arrays["completion_lengths"], expected.completion_lengths)
    np.testing.assert_array_equal(arrays["token_indices"], expected.token_indices)
    served, known = arrays["token_logprobs"].astype(float), expected.top_k(range(len(expected.token_offsets) - 1))[0]
    exact = np.isin(np.arange(len(served)), expected.exact_positions)
    assert exact.any()
    np.testing.assert_allclose(served[exact], known[exact], rtol=2e-3, atol=2e-3)
    # of a rationale the local model's are in one byte, down to -24 nats, and scaled to the mass of the rest
    in_bytes = known[~exact].numpy()
    largest_error = np.sqrt(24 * -in_bytes.min(-1, keepdims=True)) / 255
    assert (np.abs(np.maximum(served[~exact], -24) - in_bytes) <= 0.002 + 2 * largest_error).all()
    # of a tail that is nearly empty a server's answer holds no more than the rounding of the other tokens
    np.testing.assert_allclose(np.exp(arrays["tail_logprobs"]), np.exp(expected.tail_logprobs), rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("form", ["bytes", "text", "ids", "names"])
def test_generated_tokens_have_the_local_models_log_probabilities(ending_speaker, tmp_path, form):
    local = open_local(ending_speaker)
    with loopback.Proxy(loopback.TokenServer(ending_speaker, form)) as proxy:
        answers = teacher(proxy.url, tmp_path, max_tokens=4).own_tokens(rows(5))
    mapped = [map_tokens(tokens, TokenStrings(local.tokenizer)) for tokens in answers]
    expected = local.generate_tokens(local.encode(TEXTS[:5]), max_new_tokens=4, temperature=0.0, seed=0, batch_size=5)
    assert [one.ids for one in mapped] == expected and len({len(one.ids) for one in mapped}) > 1
    assert max(max(one.lost) for one in mapped) == 0
    completions = [[(one.ids, 0)] for one in mapped]
    assert_same_signals(
        top_k_arrays([[one] for one in mapped], K), local_top_k(local, TEXTS[:5], completions, tmp_path / "o")
    )


@pytest.mark.parametrize("way", ["prompt_logprobs", "echo"])
def test_given_tokens_have_the_local_models_log_probabilities(speaker, local, tmp_path, way):
    completions = [local.row_completions(i % 3, "Profit rose") for i in range(6)]
    given = [
        GivenTokens("r", [*local.prompt_ids(text), *tokens[:skip]], tokens[skip:], text, "x")
        for text, row in zip(TEXTS, completions, strict=False)
        for tokens, skip in row
    ]
    with loopback.Proxy(loopback.TokenServer(speaker)) as proxy:
        opened = teacher(proxy.url, tmp_path, tokens=way)
        answers = opened.score_tokens(given)
        assert [answer.metadata for answer in opened.score_tokens(given)] == [a.metadata for a in answers]
        assert proxy.calls == {"whole": 12}
    mapped = [map_tokens(answer.metadata["tokens"], TokenStrings(local.tokenizer)) for answer in answers]
    pairs = [mapped[i : i + 2] for i in range(0, 12, 2)]
    assert_same_signals(top_k_arrays(pairs, K), local_top_k(local, TEXTS[:6], completions, tmp_path / "o"))


# ------------------------------------------------------------------------------- calls


def refuse(request: dict[str, Any], status: int, answer: Any) -> tuple[int, Any]:
    """Refuses one row, as an endpoint with a content filter does."""
    if "messages" in request and TEXTS[3] in request["messages"][-1]["content"]:
        return 400, {"error": {"message": "blocked by the content filter", "code": "content_filter"}}
    return status, answer


def test_every_fault_is_survived_and_labels_and_tokens_share_one_call(speaker, tmp_path):
    server = loopback.TokenServer(speaker)
    with loopback.Proxy(server) as proxy:
        expected = teacher(proxy.url, tmp_path / "undisturbed", labels="logprobs").own_tokens(rows(24))
    faults = ("429", "500", "reset", "truncated", "empty")
    with loopback.Proxy(server, share=0.3, faults=faults, seed=1, alter=refuse) as proxy:
        opened = teacher(proxy.url, tmp_path, labels="logprobs", max_unreadable=None)
        probabilities = opened.predict(rows(24))
        calls, whole = sum(proxy.calls.values()), proxy.calls["whole"]
        assert len(set(faults) & set(proxy.calls)) >= 4 and set(proxy.delivered.values()) == {1} and whole == 23
        tokens = opened.own_tokens(rows(24))
        assert sum(proxy.calls.values()) == calls  # the answers that the labels were read from
    assert tokens[3] is None and np.isnan(probabilities[3]).all() and not np.isnan(np.delete(probabilities, 3, 0)).all()
    assert [one for i, one in enumerate(tokens) if i != 3] == [one for i, one in enumerate(expected) if i != 3]
    assert any("row `row-3` is refused" in line and "blocked by the content filter" in line for line in opened.messages)
    assert opened.endpoint.store.outcomes(opened.endpoint.servers[0].identity)["row refused"] == 1


def score(settings: dict[str, Any], path: str, given: list[GivenTokens]) -> None:
    """Query an endpoint for the scores of `given`; runs in a process of its own."""
    spec = validate_section(ApiConfig, settings, "params.yaml")
    ApiTeacher(Endpoint("far", spec, AnswerStore(Path(path))), TASK).score_tokens(given)


def test_scores_of_a_killed_run_are_kept_and_not_paid_twice(speaker, local, tmp_path):
    given = [GivenTokens(f"r{i}", local.prompt_ids(text), [5, 3], text, "x") for i, text in enumerate(TEXTS[:24])]
    with loopback.Proxy(loopback.TokenServer(speaker), share=0.2, faults=("429", "reset"), seed=2) as proxy:
        settings = {"model": "m", "base_url": proxy.url, "tokens": "echo", "tokenizer": "t", "max_attempts": 20}
        settings |= {"concurrency": 2, "top_logprobs": K}
        process = fork_context().Process(target=score, args=(settings, str(tmp_path / "answers.sqlite"), given))
        process.start()
        while process.is_alive() and proxy.calls["whole"] < 10:
            time.sleep(0.01)
        process.kill()
        process.join(60)
        opened = teacher(proxy.url, tmp_path, tokens="echo")
        answers = opened.score_tokens(given)
        assert 24 <= proxy.calls["whole"] <= 26  # at most one call a connection was on its way
    with loopback.Proxy(loopback.TokenServer(speaker)) as proxy:
        undisturbed = teacher(proxy.url, tmp_path / "undisturbed", tokens="echo").score_tokens(given)
    assert [answer.metadata["tokens"] for answer in answers] == [answer.metadata["tokens"] for answer in undisturbed]


def without_logprobs(_: dict[str, Any], status: int, answer: Any) -> tuple[int, Any]:
    answer["choices"][0]["logprobs"] = None
    return status, answer


def test_a_server_without_log_probabilities_ends_the_run_at_once(speaker, local, tmp_path):
    with loopback.Proxy(loopback.TokenServer(speaker), alter=without_logprobs) as proxy:
        opened = teacher(proxy.url, tmp_path, concurrency=1)
        line = r"^params.yaml: teachers.far.api.tokens: http://.* returned no log-probabilities \(`logprobs: null`\)"
        with pytest.raises(UserError, match=line):
            opened.predict(rows(4))
        given = [GivenTokens("r", local.prompt_ids(TEXTS[0]), [5], TEXTS[0], "x")] * 2
        line = r"returned no log-probabilities of the tokens that it was sent: it has no `echo`; use `tokens: gen"
        with pytest.raises(UserError, match=line):
            teacher(proxy.url, tmp_path, tokens="echo", concurrency=1).score_tokens(given)
        assert sum(proxy.calls.values()) == 2


def test_a_ceiling_holds_for_token_scores(speaker, local, tmp_path):
    given = [GivenTokens("r", local.prompt_ids(text), [5], text, "x") for text in TEXTS[:6]]
    with loopback.Proxy(loopback.TokenServer(speaker)) as proxy:
        price = {"input": 1.0, "output": 1.0}
        opened = teacher(proxy.url, tmp_path, tokens="echo", concurrency=1, price=price, max_cost=5e-4)
        with pytest.raises(
            UserError, match=r"^params.yaml: teachers.far.api.max_cost: the next call might pass 0.0005"
        ):
            opened.score_tokens(given)
        assert 0 < proxy.calls["whole"] < 6 and opened.endpoint.budget.cost(*opened.endpoint.budget.used) <= 5e-4


THINKING = ("<think>", "Hm", ".", "</think>", "\n\n")


def test_tokens_follow_the_reasoning(speaker, tmp_path):
    def think(_: dict[str, Any], status: int, answer: Any) -> tuple[int, Any]:
        entries = [{"token": t, "bytes": list(t.encode()), "logprob": -0.1, "top_logprobs": []} for t in THINKING]
        answer["choices"][0]["logprobs"]["content"][:0] = entries
        answer["choices"][0]["message"]["content"] = "".join(THINKING) + answer["choices"][0]["message"]["content"]
        return status, answer

    server = loopback.TokenServer(speaker)
    with loopback.Proxy(server) as proxy, loopback.Proxy(server, alter=think) as thinking:
        plain = teacher(proxy.url, tmp_path / "plain").own_tokens(rows(3))
        assert teacher(thinking.url, tmp_path).own_tokens(rows(3)) == plain


# ------------------------------------------------------------------------------- students


N = 8


def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"split_ref": "toy/train", "id": [f"row-{i}" for i in range(N)], "text": TEXTS[:N]})
    table["label"] = [TASK.names[i % 3] for i in range(N)]
    return table.assign(probabilities_far=list(rng.dirichlet(np.ones(3), N)), fold_far=-1)


def phase(**settings: Any) -> PhaseConfig:
    base = {"data": ["toy/train"], "teachers": ["far"], "loss": {"kl": 1.0, "ce": 0.5}, "space": "vocabulary"}
    base |= {"top_k": K, "steps": 3, "batch_size": 4, "learning_rate": 1e-3, "warmup": 0.0}
    return PhaseConfig(**base | settings)


def student(folder: Path) -> LabelModel:
    return build_student(StudentConfig(model="m", arch="causal", phases=[]), folder, TASK, 0)


def served(path: Path, tokens: dict[int, tuple[str, list]], generates: bool) -> ServedTeacher:
    """A teacher with the `tokens` of rows, as its stage has stored them."""
    table = [("toy", "train", f"row-{i}", part, json.dumps(steps)) for i, (part, steps) in tokens.items()]
    path.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(table, columns=["source", "split", "id", "part", "tokens"]).to_parquet(path / "tokens.parquet")
    return ServedTeacher("far", path / "tokens.parquet", str(path), path / "signals", generates)


def trained(model: LabelModel, spec: PhaseConfig, teachers: dict, folder: Path) -> pd.DataFrame:
    rows_of_phase = phase_rows(frame(), spec, TASK.names)
    return train_phase(model, rows_of_phase, spec, folder=folder, seed=0, teachers=teachers)


def test_a_student_of_served_tokens_becomes_that_of_the_local_model(speaker, local, tiny_models, tmp_path):
    completions = [local.row_completions(i % 3)[0][0] for i in range(N)]
    given = [
        GivenTokens("r", local.prompt_ids(text), tokens, text, "x")
        for text, tokens in zip(TEXTS, completions, strict=False)
    ]
    with loopback.Proxy(loopback.TokenServer(speaker)) as proxy:
        answers = teacher(proxy.url, tmp_path, tokens="echo").score_tokens(given)
    tokens = {i: ("answer", answer.metadata["tokens"]) for i, answer in enumerate(answers)}
    teachers = {
        "served": served(tmp_path / "served", tokens, generates=False),
        "local": OpenableTeacher(lambda _: local, "local", 2, tmp_path / "signals"),
    }
    histories, models = [], []
    for name, one in teachers.items():
        models.append(student(tiny_models / "tiny-llama"))
        histories.append(trained(models[-1], phase(), {"far": one}, tmp_path / f"run-{name}"))
    np.testing.assert_allclose(histories[0]["kl"], histories[1]["kl"], rtol=1e-3)
    np.testing.assert_allclose(histories[0]["loss"], histories[1]["loss"], rtol=1e-3)
    start = dict(student(tiny_models / "tiny-llama").model.named_parameters())
    for (name, one), other in zip(models[0].model.named_parameters(), models[1].model.parameters(), strict=True):
        moved = (other - start[name]).norm()
        assert (one - other).norm() <= 0.02 * moved  # of what the training has changed


def test_a_student_learns_at_the_tokens_of_the_teachers_own_answers(speaker, local, tiny_models, tmp_path):
    with loopback.Proxy(loopback.TokenServer(speaker)) as proxy:
        answers = teacher(proxy.url, tmp_path, max_tokens=3).own_tokens(rows(N))
    mapped = [map_tokens(tokens, TokenStrings(local.tokenizer)) for tokens in answers]
    model, own, gold = student(tiny_models / "tiny-llama"), [], []
    with torch.no_grad():
        for i, one in enumerate(mapped):
            known = local.label_completion(i % 3)
            ids = model.encode([TEXTS[i]])
            logits = model.forward(ids, [[known, (one.ids, 0)]], label_space=False).completion_logits
            gold += (-logits[: len(known[0])].log_softmax(-1))[range(len(known[0])), known[0]].tolist()
            whole = local.forward(local.encode([TEXTS[i]]), [[(one.ids, 0)]], label_space=False).completion_logits
            own.append(losses.kl_top_k(logits[len(known[0]) :], *losses.to_top_k(whole.log_softmax(-1), K)))
    far = served(tmp_path / "far", {i: ("generated", tokens) for i, tokens in enumerate(answers)}, generates=True)
    spec = phase(steps=1, batch_size=N, learning_rate=1e-9)
    logged = trained(model, spec, {"far": far}, tmp_path / "run").iloc[0]
    assert logged["kl"] == pytest.approx(torch.cat(own).mean().item(), rel=2e-3)
    assert logged["ce"] == pytest.approx(np.mean(gold), rel=1e-4)  # of the gold labels, not of these answers
    del answers[2]
    far = served(tmp_path / "less", {i: ("generated", tokens) for i, tokens in enumerate(answers)}, generates=True)
    left = rows_with_tokens(frame(), spec, {"far": far}, model)
    assert left["id"].tolist() == [f"row-{i}" for i in range(N - 1)]


def step(token: str, *others: tuple[str, float]) -> list:
    return [token, np.log(0.5), [[token, np.log(0.5)], *([other, np.log(p)] for other, p in others)]]


def test_tokens_that_the_student_lacks_are_counted_and_never_dropped_in_silence(local, tmp_path, capsys):
    rising, falling = step("positive", ("Ü", 0.25), ("negative", 0.125)), step("negative", ("positive", 0.25))
    one, other = ("generated", [rising]), ("generated", [falling])
    far = served(tmp_path / "a", {0: one, 1: other, 2: other}, generates=True)
    mapped = far.mapped(local)["toy/train", "row-0"]["generated"]
    assert mapped.lost == pytest.approx([0.25])
    arrays = top_k_arrays([[mapped]], 4)
    assert np.exp(arrays["tail_logprobs"]) == pytest.approx([0.375])  # what was lost, and what was not returned
    assert np.exp(arrays["token_logprobs"][0]) == pytest.approx([0.5, 0.125, 0, 0], rel=1e-3)
    known = set(arrays["token_indices"][0][:2].tolist())
    assert known == set(local.tokenizer.convert_tokens_to_ids(["positive", "negative"]))
    assert "0 of 3 rows have tokens" in (line := capsys.readouterr().out) and "; elsewhere 8.33 % of the" in line
    with pytest.raises(
        UserError, match=r"^teachers.far: 0 of 2 rows .*; elsewhere 12.50 % of the probability is on such"
    ):
        served(tmp_path / "b", {0: one, 1: other}, generates=True).mapped(local)
    strange = {0: other, 1: ("generated", [step("Ü")]), 2: ("generated", [falling, step("Ü")])}
    with pytest.raises(UserError, match=r"^teachers.far: 2 of 3 rows have .* lacks, such as 'Ü' of row `row-1`;"):
        served(tmp_path / "c", strange, generates=True).mapped(local)


# ------------------------------------------------------------------------------- the pipeline


OWN = {"tokens": "generated"}


def write_experiment(repo: Path, url: str, far: dict[str, Any], **settings: Any) -> None:
    """An experiment with one teacher, behind the endpoint at `url`, and one student of its tokens."""
    tree = read_yaml(repo / "params.yaml")
    api = {"model": "m", "base_url": url, "max_tokens": 1, "top_logprobs": K, "max_unreadable": None} | far
    tree["teachers"] = {"far": {"kind": "api", "api": api}}
    tree["augment"] = {"source": "finance", "teacher": "far", "per_row": 0}
    tree["data"]["finance"]["limit"] = 48
    steps = {"steps": 2, "batch_size": 4, "learning_rate": 1e-3}
    taught = {"data": ["finance/train", "finance/pool"], "teachers": ["far"], "loss": {"kl": 1.0}, "top_k": K}
    student_phase = taught | {"space": "vocabulary"} | steps | settings.pop("phase", {})
    tree["students"] = {"pupil": {"model": "tiny-llama", "arch": "causal", "phases": [student_phase]} | settings}
    tree["evaluate"]["headline"] = "pupil"
    with (repo / "params.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(tree, file)


def test_the_pipeline_trains_a_student_from_served_tokens(speaker, tiny_models, tmp_path, monkeypatch):
    repo = tiny.experiment(tmp_path / "repo", tiny_models)
    server = loopback.TokenServer(speaker)
    with loopback.Proxy(server, share=0.1, seed=3, faults=("429", "500")) as proxy:
        write_experiment(repo, proxy.url, OWN)
        params = load_params(repo / "params.yaml")
        tiny.prepare_data(repo)
        for name in ("02_teach", "04_distill"):
            notebook = strip_notebook(repo / f"notebooks/{name}.ipynb")
            write_json(repo / f"build/notebooks/{name}.ipynb", notebook)
        write_models(repo, params)
        stages.run_notebook(repo, "02_teach", teacher="far")
        assert set(proxy.delivered.values()) == {1}
        write_student_inputs(repo, params)
        calls = sum(proxy.calls.values())
        stages.run_notebook(repo, "04_distill", student="pupil", seed=0)
        assert sum(proxy.calls.values()) == calls  # no training calls an endpoint
        # the same rows at an endpoint that scores their labels
        write_experiment(repo, proxy.url, {"tokens": "echo", "tokenizer": "tiny-llama"})
        params, task = load_params(repo / "params.yaml"), read_task(repo / "data/processed/finance")
        signals = pd.read_parquet(repo / "data/teacher/far/signals.parquet")
        monkeypatch.chdir(repo)
        signals.loc[0, "rationale"] = "Profit rose."
        scored = collect_tokens(repo, "far", params, task, gather_rows(repo, params, "far"), signals)
    table = pd.read_parquet(repo / "data/teacher/far/tokens.parquet")
    taught = signals[signals["split"].isin(["train", "pool"])]
    assert set(table["id"]) == set(taught["id"][taught["label"].notna()]) and set(table["part"]) == {"generated"}
    answers = scored[scored["part"] == "answer"]
    assert set(answers["id"]) == set(taught["id"][taught["label"].notna() | (taught["split"] == "train")])
    explained = scored["id"][scored["part"] == "rationale"].tolist()
    assert explained == signals["id"][:1].tolist() and len(json.loads(answers["tokens"].iloc[0])) == 2  # label and end
    history = pd.read_csv(repo / "runs/pupil-0/history.csv")
    assert history["kl"].gt(0).all() and len(history)
    record = json.loads((repo / "data/inputs/pupil/experiment.json").read_text())["openable_teachers"]["far"]
    assert "data/teacher/far/tokens.parquet" in record["weights"]


@pytest.mark.parametrize(
    ("far", "settings", "line"),
    [
        ({"top_logprobs": 20}, {}, "teachers: `far` (api) gives no token log-probabilities; set `teachers.far.api.t"),
        (OWN, {"phase": {"top_k": None}}, "top_k: `far` (api) gives its 8 likeliest tokens alone: set `top_k` to 8 "),
        (OWN, {"phase": {"top_k": 9}}, "top_k: `far` (api) gives its 8 likeliest tokens alone: set `top_k` to 8 or "),
        (OWN, {"phase": {"tail_samples": 4}}, "tail_samples: `far` (api) gives no tokens of the rest; leave it out"),
        (OWN, {"prompt": "plain"}, "teachers: `far` (api) answers in a chat: the student needs `prompt: chat`"),
        (
            OWN,
            {"phase": {"rationales": True}},
            "rationales: needs `teachers.far.api.tokens: prompt_logprobs` or `echo`",
        ),
        (OWN, {"phase": {"data": ["finance/augmented"]}}, "data: `finance/augmented`: `far` (api) gives no token log-"),
    ],
)
def test_a_phase_that_an_endpoint_cannot_teach_ends_in_one_line(tmp_path, far, settings, line):
    (tmp_path / "tasks").mkdir()
    for name in ("tasks/finance-sentiment.yaml", "params.yaml"):
        source = tiny.ROOT / ("tests/smoke.yaml" if name == "params.yaml" else name)
        (tmp_path / name).write_bytes(source.read_bytes())
    write_experiment(tmp_path, "http://127.0.0.1:1", far, **settings)
    with pytest.raises(UserError) as raised:
        load_params(tmp_path / "params.yaml")
    assert str(raised.value).startswith(f"params.yaml: students.pupil.phases.0.{line}"), raised.value


def test_an_alternative_without_a_number_has_no_probability_and_an_own_token_needs_one():
    entry = {"token": "a", "logprob": -0.5, "top_logprobs": [{"token": "b", "logprob": None}]}
    body = {"choices": [{"message": {"content": "a"}, "logprobs": {"content": [entry]}}]}
    assert read_completion(body, all_tokens=True).metadata["tokens"] == [["a", -0.5, [["a", -0.5]]]]
    entry["logprob"] = None
    with pytest.raises(TypeError):
        read_completion(body, all_tokens=True)


@pytest.mark.parametrize(
    "logprobs",
    [
        {"tokens": ["a", "b"], "token_logprobs": [None], "top_logprobs": [None, {"b": 0.0}]},
        {"tokens": ["a", "b"], "token_logprobs": [None, 0.0], "top_logprobs": [None, 7]},
    ],
)
def test_scores_of_a_broken_form_are_a_failure_that_may_pass(logprobs):
    transport = Transport("far", ApiConfig(model="m", base_url="http://127.0.0.1:1"))
    body = Completion.construct(choices=[{"logprobs": logprobs}])
    with pytest.raises(RetryableError, match=UNREADABLE):
        transport._read_openai(body, lambda content: read_scored_tokens(content, 1, 1))


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"tokens": "none", "top_logprobs": 5}, "`top_logprobs` is for `tokens`"),
        ({"tokens": "echo", "tokenizer": None}, "`tokens: prompt_logprobs` or `echo`, and `tokenizer`"),
        ({"tokenizer": "m"}, "`tokens: prompt_logprobs` or `echo`, and `tokenizer`"),
        ({"client": "anthropic"}, "`tokens: generated` is not for `client: anthropic`"),
        ({"labels": "structured"}, "leave out `labels: structured`"),
        ({"samples": 3, "temperature": 0.7}, "leave out `samples`"),
        ({"extra_body": {"echo": True}}, "`extra_body` cannot set `echo`: use `tokens` of this section"),
        ({"extra_body": {"top_logprobs": 5}}, "`extra_body` cannot set `top_logprobs`: use `top_logprobs` of this"),
    ],
)
def test_settings_that_do_not_fit_end_in_one_line(tmp_path, settings, line):
    with pytest.raises(UserError) as raised:
        teacher("http://127.0.0.1:1", tmp_path, **settings)
    assert line in str(raised.value) and "\n" not in str(raised.value)


def test_an_endpoint_with_another_vocabulary_is_named(local):
    given = GivenTokens("r", [5], local.tokenizer.convert_tokens_to_ids(["positive", "profit"]), "x", "y")
    check = vocabulary_check("far", "tiny-llama", local.tokenizer)
    check(given, ["positive", " profit"])
    with pytest.raises(UserError, match="far.api.tokenizer: the endpoint has another vocabulary than `tiny-llama`: it"):
        check(given, ["positive", "loss"])
