"""What README.md and docs/ show a newcomer, done: from a table of one's own to the finished model."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import re
import subprocess
import sys
from importlib.metadata import distributions, version
from pathlib import Path

import pandas as pd
import pytest
from packaging.specifiers import SpecifierSet
from ruamel.yaml import YAML

import stages
import tiny
from distillery.config.load import load_params, validate_section
from distillery.config.schema import ModelConfig, StudentConfig, TeacherConfig
from distillery.pipeline.draft import new_experiment
from distillery.report.page import leaderboard_markdown

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
BLOCKS = [text for page in PAGES.values() for _, text in re.findall(r"^```(\w+)\n(.*?)^```$", page, flags=re.M | re.S)]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")


def block(start: str) -> str:
    """The one code block of README.md and docs/ that starts with `start`."""
    (text,) = [text for text in BLOCKS if text.startswith(start)]
    return text


def messages() -> str:
    """A table like the README's, long enough to be split: columns text and label."""
    openings = {
        "question": ("Where can I see", "When do you send", "Who signs for"),
        "complaint": ("Nobody has replaced", "I still miss", "You broke"),
        "praise": ("Lovely,", "Thank you for", "I am glad about"),
    }
    things = ("my invoice", "the red parcel", "a refund for two chairs", "the lamp of last week", "order 1234, again")
    file = io.StringIO()
    writer = csv.writer(file)
    for row in csv.reader(io.StringIO(block("text,label\n"))):
        writer.writerow(row)
    for (label, starts), thing in itertools.product(openings.items(), things):
        writer.writerows([f"{start} {thing}", label] for start in starts)
    return file.getvalue()


@pytest.fixture(scope="module")
def own_experiment(tmp_path_factory, tiny_models) -> Path:
    """The table of docs/own-data.md, drafted by `distillery new` and run with tiny models in place of the real ones."""
    repo = tiny.experiment(tmp_path_factory.mktemp("mine") / "repo", tiny_models)
    (repo / "data/mine.csv").write_text(messages(), encoding="utf-8")
    (repo / "params.yaml").unlink()
    new_experiment(repo, str(repo / "data/mine.csv"))
    yaml = YAML()
    content = yaml.load((repo / "params.yaml").read_text(encoding="utf-8"))
    content["models"] = {"smollm2": {"folder": "models/tiny-llama"}, "minilm-l6": {"folder": "models/tiny-bert"}}
    content["teachers"]["smollm2"]["finetune"]["epochs"] = 1
    for phase in content["students"]["small"]["phases"]:
        phase["steps"] = 2
    content["students"]["small-gold"]["phases"][0]["steps"] = 4
    for student in content["students"].values():
        student["init"]["layers"] = [0, 1, 3]  # the tiny model has four
    content["augment"] |= {"per_row": 1, "max_new_tokens": 8}  # as the comment there suggests
    yaml.dump(content, repo / "params.yaml")
    counts = stages.run_experiment(repo)
    assert counts["03_augment"] and max(counts["03_augment"]) == 0, "the paraphrases need one model at a time"
    return repo


def test_the_experiments_in_the_readme_are_valid(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/mine.yaml").write_text(block("# tasks/mine.yaml\n"), encoding="utf-8")
    (tmp_path / "params.yaml").write_text(block("# params.yaml\n"), encoding="utf-8")
    example = load_params(tmp_path / "params.yaml")
    main = load_params(ROOT / "params.yaml")
    assert example.models == {name: main.models[name] for name in example.models}  # pins do not fall behind
    hub = YAML(typ="safe").load(block("models:\n  distilbert").replace("<commit>", "abc"))
    assert ModelConfig.model_validate(hub["models"]["distilbert"]).hub
    api = "teachers:\n  far:\n    kind: api\n    api:\n      model: "
    far = YAML(typ="safe", pure=True).load(block(f"{api}gpt"))["teachers"]
    assert [validate_section(TeacherConfig, spec, "docs").kind for spec in far.values()] == ["api", "answers"]
    served = YAML(typ="safe", pure=True).load(block(f"{api}qwen"))
    assert validate_section(TeacherConfig, served["teachers"]["far"], "docs").api.tokens == "generated"
    assert validate_section(StudentConfig, served["students"]["pupil"], "docs").phases[0].top_k == 20


def test_the_example_for_a_gpu_is_a_valid_experiment(tmp_path):
    yaml = YAML(typ="safe", pure=True)
    content = yaml.load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    content |= yaml.load(block("models:\n  qwen-7b").replace("<commit>", "abc"))
    content["augment"] |= {"teacher": "qwen-7b"}
    content["evaluate"] |= {"headline": "small"}
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/finance-sentiment.yaml").touch()
    with (tmp_path / "params.yaml").open("w", encoding="utf-8") as file:
        yaml.dump(content, file)
    assert load_params(tmp_path / "params.yaml").students["small"].adapter.kind == "qlora"


def test_a_table_of_ones_own_becomes_a_model(own_experiment):
    board = pd.read_csv(own_experiment / "reports/leaderboard.csv")
    assert {"small", "small-gold", "smollm2"} <= set(board["model"])
    assert (own_experiment / "reports/index.html").exists()


def test_the_model_loads_where_this_package_is_not(own_experiment, tmp_path):
    """The README's snippet, in a process of its own, says of the test rows what `predictions.parquet` says."""
    snippet = block("from transformers import pipeline\n").replace(
        "runs/tiny-kd-0/model", str(own_experiment / "runs/small-0/model")
    )
    rows = pd.read_parquet(own_experiment / "data/processed/mine/test.parquet")
    predictions = (
        pd.read_parquet(own_experiment / "runs/small-0/predictions.parquet").query("split == 'test'").set_index("id")
    )
    (tmp_path / "texts.json").write_text(json.dumps(rows["text"].tolist()), encoding="utf-8")
    code = snippet + (
        "import json, sys\n"
        "print(json.dumps([found['label'] for found in classify(json.load(open('texts.json')))]))\n"
        "assert not any(name.startswith('distillery') for name in sys.modules)\n"
    )
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == predictions.loc[rows["id"], "prediction"].tolist()


def test_every_file_that_a_page_links_is_there():
    missing = []
    for path, text in PAGES.items():
        links = [link for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if not link.startswith("http")]
        missing += [f"{path.name}: {link}" for link in links if not (path.parent / link).exists()]
    assert missing == []


def test_the_readme_stays_short():
    assert len(README.splitlines()) <= 160


def test_the_leaderboard_in_the_readme_is_that_of_the_committed_run():
    table = re.search(r"<!-- leaderboard -->\n(.*?)\n<!-- /leaderboard -->", README, flags=re.S)[1]
    assert table == leaderboard_markdown(pd.read_csv(ROOT / "reports/leaderboard.csv"))


def test_the_printed_leaderboard_holds_the_table():
    scores = {"accuracy": 0.661, "accuracy_low": 0.63, "accuracy_high": 0.694}
    scores |= {key.replace("accuracy", "macro_f1"): value for key, value in scores.items()}
    against = {"versus": "gold", "difference": 0.08, "difference_low": 0.04, "difference_high": 0.12, "p": 0.01}
    alone = dict.fromkeys(against) | {"verdict": None, "sentences_per_second": None}
    rows = [
        {"model": "kd", "role": "student", "parameters": 17.1e6, "sentences_per_second": 312.4, "verdict": "better"}
        | scores
        | against,
        {"model": "majority", "role": "majority", "parameters": None} | scores | alone,
    ]
    lines = leaderboard_markdown(pd.DataFrame(rows)).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == (
        "| kd | student | 17.1 M | 66.1 % (63.0–69.4) | 66.1 % (63.0–69.4) | 312 "
        "| +8.0 (+4.0 to +12.0) over gold: better |"
    )
    assert lines[3] == "| majority | majority | – | 66.1 % (63.0–69.4) | 66.1 % (63.0–69.4) | – |  |"


def test_every_pin_installs_on_the_oldest_python_that_the_readme_promises():
    """A lock written on a newer Python must not pin a package that has left the oldest behind."""
    oldest = re.search(r"You need Python (3\.\d+) or newer", README)[1]
    pins = re.findall(r"^([\w-]+)==", LOCK, flags=re.M)
    installed = {re.sub(r"[-_.]+", "-", one.metadata["Name"]).lower(): one for one in distributions()}
    requires = {name: installed[name].metadata.get("Requires-Python") or "" for name in pins if name in installed}
    assert len(requires) > 150
    assert not {name: versions for name, versions in requires.items() if f"{oldest}.0" not in SpecifierSet(versions)}


def test_every_pin_but_that_of_torch_has_hashes():
    blocks = re.split(r"^(?=[a-z])", LOCK, flags=re.M)[1:]
    assert len(blocks) > 200
    assert [block for block in blocks if not re.search(r"--hash=sha256:[0-9a-f]{64}$", block, flags=re.M)] == []
    torch = (ROOT / "requirements-torch.lock").read_text(encoding="utf-8")
    assert re.findall(r"^[^#].*", torch, flags=re.M) == [f"torch=={version('torch').partition('+')[0]}"]
    assert "://" not in LOCK + torch  # pip knows its index
