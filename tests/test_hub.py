"""Models and data sets from a hub, through the real clients: what is fetched, what is refused, and the messages."""

from __future__ import annotations

import json

import pytest

import hub

WORDS = ["profit", "sales", "margin", "orders", "costs", "output", "cash", "debt", "staff", "stock", "price", "volume"]


def served_repos(model: dict[str, bytes]) -> dict[str, hub.Repo]:
    """Good and faulty models of the files `model`, and data sets."""
    config = json.loads(model["config.json"])
    own_classes = {"AutoConfig": "code.StrangeConfig", "AutoModelForSequenceClassification": "code.Strange"}
    config |= {"auto_map": own_classes, "model_type": "strange"}
    code = {"code.py": b"raise SystemExit('ran')"}
    weights = {"pytorch_model.bin": b"pickle"}
    pickled = {k: v for k, v in model.items() if not k.endswith(".safetensors")} | weights
    tables = {}
    for part in ("train", "validation", "test"):
        rows = [{"sentence": f"{word} in the {part}", "label": i % 3} for i, word in enumerate(WORDS)]
        names = {"label": ["negative", "neutral", "positive"]}
        tables[f"data/{part}-00000-of-00001.parquet"] = hub.parquet(rows, names)
    return {
        "me/good": hub.Repo(model | weights | code, branches=("v1",)),
        "me/gated": hub.Repo(model, fault="gated"),
        "me/private": hub.Repo(model, fault="private"),
        "me/truncated": hub.Repo(model, fault="truncated"),
        "me/altered": hub.Repo(model, fault="altered"),
        "me/pickled": hub.Repo(pickled, others=(hub.Repo(model | weights, branches=("refs/pr/8",)),)),
        "me/strange": hub.Repo(model | code | {"config.json": json.dumps(config).encode()}),
        "datasets/me/table": hub.Repo(tables),
        "datasets/me/gated": hub.Repo(tables, fault="gated"),
        "datasets/me/script": hub.Repo({"script.py": code["code.py"]}),
    }


def model_job(name: str, revision: str = "main", **options: str) -> tuple:
    return ("model", "m", {"hub": f"me/{name}", "revision": revision}, options or None)


def data_job(name: str, **options: object) -> tuple:
    source = {"source": f"hub:me/{name}", "task": "finance-sentiment", "columns": {"text": "sentence"}}
    options = options or {"split": {"train": 0.5, "validation": 0.25, "test": 0.25}}
    return ("data", "d", source | {"near_duplicate": 1.0} | options, None)


@pytest.fixture(scope="module")
def fetched(tiny_models, tmp_path_factory):
    """The result of each job below, the requests to the hub, and the home folder: one process does all jobs."""
    repos = served_repos(hub.folder(tiny_models / "tiny-bert"))
    hub_splits = {"train": "train[:50%]", "validation": "validation[50%:]", "test": "test"}
    jobs = {
        "pinned": model_job("good", repos["me/good"].commit, arch="classifier"),
        "tag": model_job("good", "v1"),
        "no revision": model_job("good", "v2"),
        "gated": model_job("gated"),
        "private": model_job("private"),
        "gated, with a token": model_job("gated", token=hub.TOKEN),
        "private, with a token": model_job("private", token=hub.TOKEN),
        "none": model_job("none"),
        "truncated": model_job("truncated"),
        "altered": model_job("altered"),
        "pickled": model_job("pickled"),
        "converted": model_job("pickled", "refs/pr/8", arch="classifier"),
        "remote code": model_job("strange", arch="classifier"),
        "table": data_job("table@main"),
        "own splits": data_job("table@main", splits=hub_splits),
        "table, no revision": data_job("table@v9"),
        "table, gated": data_job("gated@main"),
        "table, none": data_job("none"),
        "table, script": data_job("script"),
    }
    home = tmp_path_factory.mktemp("hub")
    with hub.serving(repos) as (url, requests):
        results = dict(zip(jobs, hub.fetch(url, home, list(jobs.values())), strict=True))
    return results, requests, home


def test_a_pinned_model_is_fetched_as_safetensors_without_code(fetched):
    results, requests, home = fetched
    assert results["pinned"]["class"] == "BertForSequenceClassification"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(results["pinned"]["files"])
    assert not {"pytorch_model.bin", "code.py", ".cache"} & set(results["pinned"]["files"])
    assert results["tag"]["files"] == results["pinned"]["files"]
    assert not [
        line for line in requests if line.endswith((".bin", ".py")) and "/datasets/" not in line
    ]  # not requested
    assert (
        len(list((home / "models").iterdir())) == 5
    )  # by commit, tag, token and pull request, and the one with own code; no refused one


REFUSED = {
    "no revision": "cannot fetch me/good@v2: no such revision",
    "gated": "cannot fetch me/gated@main: its owner must let you; accept its terms on the hub and set HF_TOKEN",
    "gated, with a token": "cannot fetch me/gated@main: its owner must let you; accept its terms on the hub and set",
    "private": "cannot fetch me/private@main: no such model (or it is private; then set HF_TOKEN)",
    "none": "cannot fetch me/none@main: no such model (or it is private; then set HF_TOKEN)",
    "truncated": "cannot fetch me/truncated@main: ",
    "altered": "cannot fetch me/altered@main: model.safetensors differs from its checksum; nothing kept",
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_cannot_be_had_ends_in_one_line(fetched, case):
    message = fetched[0][case]["error"]
    assert message.startswith(f"params.yaml: models.m.hub: {REFUSED[case]}")
    assert "\n" not in message


def test_a_token_opens_a_private_model(fetched):
    assert "model.safetensors" in fetched[0]["private, with a token"]["files"]


def test_weights_that_a_pull_request_converts_are_fetched_by_its_revision(fetched):
    converted = fetched[0]["converted"]
    assert converted["class"] == "BertForSequenceClassification"
    assert "model.safetensors" in converted["files"] and "pytorch_model.bin" not in converted["files"]


def test_pickled_weights_and_code_of_others_are_refused(fetched):
    assert fetched[0]["pickled"]["error"] == (
        "params.yaml: models.m: no safetensors weights, and pickled weights are not loaded; "
        "name a `revision` of me/pickled that holds converted weights, often an open pull request: refs/pr/N"
    )
    assert "trust_remote_code" in fetched[0]["remote code"]["error"]
    assert "\n" not in fetched[0]["remote code"]["error"]


def test_a_table_of_the_hub_is_split_or_keeps_its_own_splits(fetched):
    result = fetched[0]["table"]
    assert "error" not in result, result
    assert result["labels"] == ["negative", "neutral", "positive"]
    assert sum(result["rows"].values()) == 12
    assert fetched[0]["own splits"].get("rows", fetched[0]["own splits"]) == {
        "train": 6,
        "pool": 0,
        "validation": 6,
        "test": 12,
    }


@pytest.mark.parametrize("case", ["table, no revision", "table, gated", "table, none", "table, script"])
def test_a_table_that_cannot_be_had_ends_in_one_line(fetched, case):
    message = fetched[0][case]["error"]
    assert message.startswith("hub:me/")
    assert "\n" not in message
