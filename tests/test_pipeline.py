"""What depends on what: dvc.yaml against the real imports, and every kind of change against the stages it reruns."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from ruamel.yaml import YAML

import tiny
from distillery import fingerprint
from distillery.config.schema import Params, StudentConfig, TeacherConfig
from distillery.files import read_yaml
from distillery.pipeline.environment import ENVIRONMENT
from distillery.pipeline.inputs import StageTables, _agreeing_rationales, student_rows
from distillery.pipeline.run_notebook import notebook_parameters
from distillery.pipeline.strip import notebook_code, stage_modules, strip_notebook
from distillery.tasks.schema import Task, load_task
from forked import preloaded_python

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src/distillery"
NOTEBOOKS = ("01_data", "02_teach", "03_augment", "04_distill", "05_evaluate")


def pipeline() -> dict[str, dict[str, Any]]:
    """The stages of dvc.yaml as they are written: name -> cmd, deps, outs, ..."""
    stages = read_yaml(ROOT / "dvc.yaml")["stages"]
    return {name: body.get("do", body) for name, body in stages.items()}


# ------------------------------------------------------------------------------- modules


def stages(kinds: dict[str, str]) -> dict[str, dict[str, str]]:
    """The modules of each stage with their fingerprints, as `strip` writes them for teachers of these kinds."""
    return stage_modules({name: strip_notebook(ROOT / f"notebooks/{name}.ipynb") for name in NOTEBOOKS}, kinds)


REALLY_IMPORTED = """
import json, sys
for code in json.load(sys.stdin):
    for name in [name for name in sys.modules if name.partition(".")[0] == "distillery"]:
        del sys.modules[name]  # other packages stay: loading torch takes seconds
    exec(code, {})
    print("modules", json.dumps([name for name in sys.modules if name.startswith("distillery.")]))
"""


def imports_of(code: str) -> str:
    """The import statements at the top level of `code`."""
    return "\n".join(
        ast.unparse(node) for node in ast.parse(code).body if isinstance(node, ast.Import | ast.ImportFrom)
    )


def code_of(notebook: str) -> str:
    return notebook_code(strip_notebook(ROOT / f"notebooks/{notebook}.ipynb"))


def test_a_stage_depends_on_what_python_itself_imports_for_it():
    """Against `sys.modules` after the imports were run, which print nothing."""
    found = stages({"lm": "lm"})
    entries = {name: imports_of(code_of(name)) for name in NOTEBOOKS} | {"inputs": "import distillery.pipeline.inputs"}
    done = subprocess.run(
        [sys.executable, "-c", REALLY_IMPORTED],
        input=json.dumps(list(entries.values())),
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env=ENVIRONMENT | os.environ | PATHS,
    )
    assert not done.stderr  # it would stand in the notebooks
    loaded = [json.loads(line) for line in re.findall(r"^modules (.*)", done.stdout, flags=re.M)]
    for name, modules in zip(entries, loaded, strict=True):
        listed = {"02_teach": "02_teach-lm", "inputs": "inputs-teachers"}.get(name, name)
        assert set(modules) == set(found[listed]), name


PATHS = {"PYTHONPATH": str(ROOT / "src")}


def test_every_stage_of_dvc_yaml_reads_the_file_of_its_modules():
    written = {re.sub("-lm$", "-${key}", name) for name in stages({"lm": "lm"})}
    for name, body in pipeline().items():
        if name == "strip":
            continue
        listed = [dep for dep in body["deps"] if dep.startswith("build/code/")]
        assert len(listed) == 1 and Path(listed[0]).stem in written, name
        entry = re.search(r"-m distillery (\w+) (\w+)", body["cmd"])
        expected = entry[2] if entry[1] == "run" else f"inputs-{entry[2]}"
        assert Path(listed[0]).stem.removesuffix("-${key}") == expected
        assert not [dep for dep in body["deps"] if dep.endswith(".py")]
        assert entry[1] != "run" or f"build/notebooks/{entry[2]}.ipynb" in body["deps"]


def all_modules() -> set[str]:
    """The dotted names of all modules of the package but its own `__init__`."""
    paths = {path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")}
    parts = {path.parts[:-1] if path.name == "__init__" else path.parts for path in paths}
    return {".".join(("distillery", *names)) for names in parts if names}


def test_every_module_is_a_part_of_some_stage_or_known_to_be_none():
    used = {module for found in stages({"far": "api"}).values() for module in found}
    outside = {"__main__", "cli", "config.reference_docs"}
    outside |= {f"pipeline.{name}" for name in ("environment", "recipe", "run_notebook", "search", "strip")}
    outside |= {"pipeline.draft", "pipeline.guess", "pipeline.model_checks", "pipeline.stage_times", "pipeline.studies"}
    checks = ("label_set_checks", "task_checks")
    outside |= {f"pipeline.{name}" for name in (*checks, "published_features", "published_settings")}
    outside |= {f"notebook.{name}" for name in ("lessons", "lesson_sentences", "one_gpu", "tiny_causal")}
    outside |= {"pipeline.lessons", "data.word_vectors"}  # of the latter see the test below
    outside |= {f"deploy.{name}" for name in ("decisions", "predict", "push", "serve", "tables")} | {"teachers.asking"}
    outside |= {name.removeprefix("distillery.") for name in all_modules() if ".pipeline.plan" in name}
    outside |= {f"teachers.{name}" for name in ("parts", "text_cleaning", "text_plan", "text_requests", "writing")}
    outside |= {"training.worker", "teachers.worker"}  # the same calls as in a notebook, in another process
    assert all_modules() - used == {f"distillery.{name}" for name in outside}


def test_only_an_endpoint_depends_on_the_client():
    client = "distillery.teachers.api.client"
    found = stages({"near": "lm", "far": "api"})
    # the stages of all teachers: only where one of this kind takes part
    shared = {"03_augment", "05_evaluate"}
    assert {name for name in found if client in found[name]} == {"02_teach-far", *shared}
    assert not [name for name, modules in stages({"near": "lm"}).items() if client in modules]


def test_only_a_filter_by_vectors_lets_the_data_depend_on_models():
    notebooks = {name: strip_notebook(ROOT / f"notebooks/{name}.ipynb") for name in NOTEBOOKS}
    modules = stage_modules(notebooks, {"near": "lm"}, word_vectors=True)["01_data"]
    assert {"distillery.data.word_vectors", "distillery.models.embeddings"} <= {*modules}
    assert not [name for name in stages({"near": "lm"})["01_data"] if name.startswith("distillery.models")]


def test_a_student_depends_on_no_report_and_no_evaluation():
    packages = {module.split(".")[1] for module in stages({"lm": "lm"})["04_distill"]}
    expected = "config errors files fingerprint label_sets losses metrics models notebook tasks training wording"
    assert packages == set(expected.split())


def test_the_package_itself_imports_nothing():
    # `src/distillery/__init__.py` is no dependency of any stage, so nothing may hang on it
    assert not fingerprint.imported((PACKAGE / "__init__.py").read_text(encoding="utf-8"))


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_every_selector_in_dvc_yaml_is_a_parameter_of_its_notebook(notebook):
    commands = [body["cmd"] for body in pipeline().values() if f" {notebook}" in body["cmd"]]
    assert len(commands) == 1
    given = re.findall(r"-p (\w+) ", commands[0])
    assert list(notebook_parameters(ROOT / f"notebooks/{notebook}.ipynb")) == given


# ------------------------------------------------------------------------------- what a change reruns


def dvc(repo: Path, *arguments: str) -> str:
    """What `dvc` prints. Fails with it when dvc fails."""
    environment = os.environ | preloaded_python(repo, with_torch=False)
    done = subprocess.run(["dvc", *arguments], cwd=repo, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rerun(repo: Path) -> set[str]:
    """Run `dvc repro`; the stages that ran, but for `strip`, which always does."""
    return set(re.findall(r"^Running stage '(.*)':", dvc(repo, "repro"), flags=re.M)) - {"strip"}


def toy_notebook(path: Path, text: str) -> None:
    """A notebook with one code cell, as it stands in git."""
    path.parent.mkdir(exist_ok=True)
    cell = {"cell_type": "code", "id": "a", "source": text, "metadata": {}, "outputs": [], "execution_count": None}
    path.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A repository in which everything is up to date: the real graph, with tests/quick_stage.py for the notebooks."""
    repo = tiny.experiment(tmp_path_factory.mktemp("base") / "repo")
    shutil.copy(ROOT / "tests/quick_stage.py", repo / "src/distillery/pipeline/run_notebook.py")
    for name in NOTEBOOKS:
        toy_notebook(repo / f"notebooks/{name}.ipynb", imports_of(code_of(name)))
    ran = rerun(repo)
    assert ran == {
        *("data@finance", "teacher-inputs", "teach@lm", "teach@encoder", "augment", "inputs"),
        *("distill@tiny-kd-0", "distill@tiny-gold-0", "distill@half-gkd-0", "evaluate"),
    }
    return repo


Change = Callable[[Path], None]


def setting(*keys: str | int, value: Any) -> Change:
    """params.yaml with another value at `keys` (None: the key is removed)."""

    def change(repo: Path) -> None:
        yaml, file = YAML(), repo / "params.yaml"
        tree = node = yaml.load(file.read_text(encoding="utf-8"))
        for key in keys[:-1]:
            node = node[key]
        if value is None:
            del node[keys[-1]]
        else:
            node[keys[-1]] = value
        with file.open("w", encoding="utf-8") as out:
            yaml.dump(tree, out)

    return change


def both(*changes: Change) -> Change:
    return lambda repo: [change(repo) for change in changes] and None


def replacing(file: str, old: str, new: str) -> Change:
    def change(repo: Path) -> None:
        text = (repo / file).read_text(encoding="utf-8")
        assert old in text
        (repo / file).write_text(text.replace(old, new, 1), encoding="utf-8")

    return change


def appending(file: str, text: str) -> Change:
    def change(repo: Path) -> None:
        with (repo / file).open("a", encoding="utf-8") as out:
            out.write(text)

    return change


def saved_by_jupyter(repo: Path) -> None:
    for path in (repo / "notebooks").glob("*.ipynb"):
        book = json.loads(path.read_text(encoding="utf-8"))
        book["metadata"] = {"language_info": {"name": "python", "version": "3.99"}}
        output = {"output_type": "stream", "name": "stdout", "text": ["ran\n"]}
        book["cells"][0] |= {"execution_count": 3, "outputs": [output], "id": "b", "metadata": {"scrolled": True}}
        path.write_text(json.dumps(book, indent=1))


def own_data(repo: Path) -> None:
    """A second source with a task and a teacher of its own, which no student learns from."""
    (repo / "elsewhere").mkdir()
    rows = [{"id": f"m{i}", "text": f"row {i}", "label": "yes", "group": f"m{i}"} for i in range(8)]
    (repo / "elsewhere/mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (repo / "tasks/mine.yaml").write_text("kind: classification\nlabels: {'yes': good, 'no': bad}\n")
    tree = YAML().load((repo / "params.yaml").read_text(encoding="utf-8"))
    tree["data"]["mine"] = tree["data"]["finance"] | {"source": "elsewhere/mine.jsonl", "task": "mine"}
    for teacher in tree["teachers"].values():
        teacher["data"] = ["finance"]
    encoder = tree["teachers"]["encoder"]
    tree["teachers"]["mine"] = encoder | {"data": ["mine"], "finetune": encoder["finetune"] | {"on": "mine/train"}}
    with (repo / "params.yaml").open("w", encoding="utf-8") as out:
        YAML().dump(json.loads(json.dumps(tree)), out)


def prose_everywhere(repo: Path) -> None:
    """Other docstrings, comments and annotations of functions, and another layout, in each module of the package."""
    for path in (repo / "src/distillery").rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                node.returns = ast.Name("object")
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) and ast.get_docstring(node) is not None:
                node.body[0] = ast.Expr(ast.Constant("Other words."))
        # comments go, for a syntax tree has none; `from __future__` stays behind the docstring
        path.write_text(ast.unparse(ast.fix_missing_locations(tree)) + "\n# a last remark\n", encoding="utf-8")


SMOKE = read_yaml(ROOT / "tests/smoke.yaml")
NEW_STUDENT = SMOKE["students"]["tiny-gold"] | {"init": {"layers": [0]}}
NEW_TEACHER = SMOKE["teachers"]["encoder"] | {"seed": 1}
ONE_TEACHER = SMOKE["students"]["half-gkd"]["phases"][0] | {"teachers": ["lm"]}
FIRST_PHASE = ("students", "tiny-kd", "phases", 0)
AFTER_DATA = ["teacher-inputs", "teach@lm", "augment", "inputs", "distill@tiny-kd-0", "distill@half-gkd-0", "evaluate"]
DISTILL = ["distill@tiny-kd-0", "distill@tiny-gold-0", "distill@half-gkd-0"]

CARD = "src/distillery/report/templates/model_card.md.jinja"

# what is changed, how, and the stages that run again (strip runs always; teacher-inputs and inputs take a second)
CHANGES: dict[str, tuple[Change, list[str]]] = {
    # each of these changes shows by itself: what reruns a stage reruns it whatever the others do
    "nothing that a result hangs on": (
        both(
            setting("tracking", value=["tensorboard", "mlflow"]),
            setting("compute", value={"processes": 2}),
            # of the API client, which only a teacher of its kind runs
            replacing("src/distillery/teachers/api/client.py", "MAX_EMPTY_ANSWERS = 3", "MAX_EMPTY_ANSWERS = 4"),
            lambda repo: prose_everywhere(repo),
        ),
        [],
    ),
    "an option of the evaluation, and notebooks run and saved in Jupyter": (
        both(setting("evaluate", "bootstrap", value=200), saved_by_jupyter),
        ["evaluate"],
    ),
    "a student's control, and a default spelt out": (
        both(setting("students", "tiny-kd", "control", value=None), setting(*FIRST_PHASE, "schedule", value="linear")),
        ["inputs", "evaluate"],
    ),
    "a student's learning rate, a student more, another less": (
        both(
            setting(*FIRST_PHASE, "learning_rate", value=2.0e-3),
            setting("students", "new.one", value=NEW_STUDENT),
            setting("students", "half-gkd", value=None),
        ),
        ["inputs", "distill@tiny-kd-0", "distill@new.one-0", "evaluate"],
    ),
    "a seed more": (
        setting("seeds", value=[0, 1]),
        ["distill@tiny-kd-1", "distill@tiny-gold-1", "distill@half-gkd-1", "evaluate"],
    ),
    "a teacher's learning rate": (
        setting("teachers", "encoder", "finetune", "learning_rate", value=2.0e-3),
        ["teacher-inputs", "teach@encoder", "augment", "inputs", "distill@half-gkd-0", "evaluate"],
    ),
    "a teacher more, whom no student has": (
        setting("teachers", "new", value=NEW_TEACHER),
        ["teacher-inputs", "teach@new", "augment", "inputs", "evaluate"],
    ),
    "a teacher less": (
        both(
            setting("teachers", "encoder", value=None), setting("students", "half-gkd", "phases", 0, value=ONE_TEACHER)
        ),
        ["teacher-inputs", "inputs", "distill@half-gkd-0", "evaluate"],
    ),
    "where a model comes from": (
        setting("models", "tiny-llama", value={"hub": "owner/name", "revision": "abc"}),
        AFTER_DATA,
    ),
    "what a model's folder holds": (
        appending("models/tiny-bert/config.json", "\n"),
        ["teacher-inputs", "teach@encoder", "augment", "inputs", *DISTILL, "evaluate"],
    ),
    "a task's prompt, which classifiers never see": (
        replacing("tasks/finance-sentiment.yaml", "You are", "You were"),
        ["data@finance", *AFTER_DATA],
    ),
    "a direction word of a task, which no model sees": (
        replacing("tasks/finance-sentiment.yaml", "plunge, plunged", "plunge, plunged, sank"),
        ["data@finance", "teacher-inputs", "augment", "inputs", "evaluate"],
    ),
    "a row of the corpus": (
        replacing("data/corpora/finance.jsonl", '"text": "', '"text": "Today, '),
        ["data@finance", *AFTER_DATA, "teach@encoder", "distill@tiny-gold-0"],
    ),
    "a source more, with its own task and teacher": (
        own_data,
        ["data@mine", "teacher-inputs", "teach@mine", "augment", "inputs", "evaluate"],
    ),
    "how paraphrases are drawn": (
        setting("augment", "temperature", value=0.5),
        ["augment", "inputs", "distill@tiny-kd-0", "evaluate"],
    ),
    "a comment in a task, and the report's page": (
        both(
            appending("tasks/finance-sentiment.yaml", "# more\n"),
            appending("src/distillery/report/templates/report.html", "\n"),
        ),
        ["data@finance", "evaluate"],
    ),
    "a cell of 04_distill": (
        lambda repo: toy_notebook(repo / "notebooks/04_distill.ipynb", imports_of(code_of("04_distill")) + "\n'other'"),
        DISTILL,
    ),
    "the code of the losses": (
        replacing("src/distillery/losses/divergences.py", "IGNORE_INDEX = -100", "IGNORE_INDEX = -101"),
        ["teach@lm", "teach@encoder", *DISTILL],
    ),
    "the model card's template": (
        replacing(CARD, "## Use", "## How to use it"),
        ["evaluate"],
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_reruns_what_depends_on_it_and_nothing_else(base, tmp_path, what):
    repo = shutil.copytree(base, tmp_path / "repo", symlinks=True)
    change, expected = CHANGES[what]
    change(repo)
    assert rerun(repo) == set(expected)


def test_an_experiment_by_command_line_and_what_it_shows(base, tmp_path):
    repo = shutil.copytree(base, tmp_path / "repo", symlinks=True)
    for command in (["config", "user.name", "test"], ["config", "user.email", "test@localhost"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=repo, check=True)
    subprocess.run(["git", "commit", "-q", "-m", "ran"], cwd=repo, check=True)
    out = dvc(repo, "exp", "run", "-S", "students.tiny-kd.phases.0.temperature=4")
    assert set(re.findall(r"Running stage 'distill@(.*)'", out)) == {"tiny-kd-0"}
    assert "tiny-kd" in dvc(repo, "metrics", "diff")
    assert "students.tiny-kd.phases" in dvc(repo, "params", "diff")
    plots = json.loads(dvc(repo, "plots", "diff", "--json", "-o", "plots"))
    assert set(plots["data"]) == {"training", "scores", "reliability", "confusion"} and not plots.get("errors")
    for name, columns in {"scores": {"score", "low", "high"}, "reliability": {"model", "rows"}}.items():
        (drawn,) = [found for found in plots["data"][name] if found["type"] == "vega"]
        content = drawn["content"] if isinstance(drawn["content"], str) else json.dumps(drawn["content"])
        assert "<DVC_METRIC_" not in content, name  # every placeholder of the template was filled
        rows = json.loads(content)["data"]["values"]
        assert {row["rev"] for row in rows} == {"HEAD", "workspace"} and columns <= set(rows[0]), name


@pytest.fixture
def bucket(monkeypatch) -> Iterator[str]:
    """The address of a server on this machine that speaks the protocol of S3, with an empty bucket `bucket`."""
    pytest.importorskip("dvc_s3")
    moto = pytest.importorskip("moto.server")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT")).close()
    yield address
    server.stop()


def share(repo: Path) -> None:
    """Commit, and push one student."""
    author = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["add", "-A"], [*author, "commit", "-q", "-m", "Share the students"]):
        subprocess.run(["git", *command], cwd=repo, check=True)
    dvc(repo, "push", "distill@tiny-kd-0")


def pull_into(clone: Path, repo: Path) -> None:
    """Pull that student into a clone, which has none."""
    assert not (clone / "runs").exists()
    dvc(clone, "pull", "distill@tiny-kd-0")
    assert [path.name for path in (clone / "runs").iterdir()] == ["tiny-kd-0"]
    pulled = {path.relative_to(clone): path for path in (clone / "runs").rglob("*") if path.is_file()}
    assert len(pulled) == 3 and all(path.read_bytes() == (repo / name).read_bytes() for name, path in pulled.items())


def cloned(repo: Path, folder: Path) -> Path:
    subprocess.run(["git", "clone", "-q", ".", str(folder)], cwd=repo, check=True)
    return folder


def test_a_student_is_pushed_to_a_folder_and_pulled_into_a_clone(base, tmp_path):
    """The commands of docs/tracking.md."""
    repo = shutil.copytree(base, tmp_path / "repo", symlinks=True)
    dvc(repo, "remote", "add", "-d", "storage", str(tmp_path / "shared"))
    share(repo)
    pull_into(cloned(repo, tmp_path / "clone"), repo)


def test_a_student_is_pushed_to_a_bucket_and_pulled_into_a_clone(base, bucket, tmp_path, monkeypatch):
    """The commands of docs/tracking.md: with keys in the environment, and in a file that git does not track."""
    repo = shutil.copytree(base, tmp_path / "repo", symlinks=True)
    dvc(repo, "remote", "add", "--default", "storage", "s3://bucket/distillery")
    dvc(repo, "remote", "modify", "storage", "endpointurl", bucket)
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "an-id")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
        share(repo)
    clone = cloned(repo, tmp_path / "clone")
    dvc(clone, "remote", "modify", "--local", "storage", "access_key_id", "an-id")
    dvc(clone, "remote", "modify", "--local", "storage", "secret_access_key", "a-secret")
    pull_into(clone, repo)
    done = subprocess.run(["git", "status", "--porcelain"], cwd=clone, capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_outputs_are_ignored_by_git_but_for_the_reports(base):
    done = subprocess.run(["git", "status", "--porcelain"], cwd=base, capture_output=True, text=True, check=True)
    new = {line[3:] for line in done.stdout.splitlines() if line.startswith("??")}
    assert {path.split("/")[0] for path in new} <= {"dvc.lock", "notebooks", "reports"}


# ------------------------------------------------------------------------------- what a student learns from


def table(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path)


def test_a_student_finds_exactly_what_its_phases_name(base):
    rows = table(base / "data/inputs/tiny-kd/rows.parquet")
    finance = base / "data/processed/finance"
    sizes = {f"finance/{split}": len(table(finance / f"{split}.parquet")) for split in ("pool", "train")}
    assert rows["split_ref"].value_counts(sort=False).to_dict() == {
        "finance/pool": sizes["finance/pool"],
        "finance/augmented": sizes["finance/train"],  # one paraphrase a row
        "finance/train": sizes["finance/train"],
    }
    assert rows.columns.tolist() == [
        "split_ref",
        "id",
        "text",
        "label",
        "group",
        "rationale",
        "probabilities_lm",
        "fold_lm",
    ]
    assert (rows["label"].isna() == (rows["split_ref"] == "finance/pool")).all()
    signals = table(base / "data/teacher/lm/signals.parquet")
    signals["split_ref"] = signals["source"] + "/" + signals["split"]
    augmented = table(base / "data/augmented/finance/signals.parquet").query("teacher == 'lm'")
    signals = pd.concat([signals, augmented.assign(split_ref="finance/augmented")])
    probabilities = signals.set_index(["split_ref", "id"])["probabilities"]
    for split_ref, name, given in zip(rows["split_ref"], rows["id"], rows["probabilities_lm"], strict=True):
        assert given == pytest.approx(probabilities[split_ref, name], abs=1e-7)

    mixed = table(base / "data/inputs/half-gkd/rows.parquet")
    assert mixed["probabilities_lm"].notna().all()
    assert (
        mixed["probabilities_encoder"].notna() == (mixed["split_ref"] == "finance/pool")
    ).all()  # it teaches in the first phase only
    assert table(base / "data/inputs/tiny-gold/rows.parquet").columns.tolist() == list(rows.columns[:6])
    for split in ("validation", "test"):
        scored = table(base / f"data/inputs/tiny-kd/{split}.parquet")
        assert scored["id"].tolist() == table(finance / f"{split}.parquet")["id"].tolist()
        assert set(scored["split_ref"]) == {f"finance/{split}"} and scored["label"].notna().all()


def test_an_experiment_file_holds_all_that_decides_a_student(base):
    found = {name: json.loads((base / f"data/inputs/{name}/experiment.json").read_text()) for name in SMOKE["students"]}
    for name, facts in found.items():
        spec = StudentConfig.model_validate(facts["spec"])
        assert spec.phases == StudentConfig.model_validate(SMOKE["students"][name]).phases
        task = Task.model_validate(facts["task"])
        assert task.names == ["positive", "neutral", "negative"]  # the order of probability vectors
        whole = load_task("finance-sentiment").model_copy(
            update={"perturbations": Task.model_fields["perturbations"].get_default(call_default_factory=True)}
        )
        assert (task == whole) == (spec.arch == "causal")
        assert facts["model"]["folder"] == f"models/{spec.model}" and len(facts["model"]["content"]["sha256"]) == 64
        assert facts["source"] == "finance"
    validation = json.loads((base / "data/teacher/encoder/metrics.json").read_text())["validation"]
    assert found["half-gkd"]["teachers"]["encoder"] == validation
    assert found["tiny-gold"]["teachers"] == {}


def write_inputs(repo: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "distillery", "inputs", "students"]
    env = os.environ | {"PYTHONPATH": "src"}
    return subprocess.run(command, cwd=repo, env=env, capture_output=True, text=True, timeout=60)


def test_reasons_are_for_the_label_that_a_row_is_taught_with():
    """Not those that argue for another label, nor those of a teacher that the others outvote."""
    row = {"label": None, "probabilities_a": [0.6, 0.4], "probabilities_b": [0.1, 0.9], "probabilities_c": None}
    assert _agreeing_rationales(row, ["a", "b", "c"], {"a": "up", "b": "down"}) == ["down"]
    assert _agreeing_rationales(row | {"label": "x"}, ["a", "b", "c"], {"a": "up", "b": "down"}) == ["up", "down"]
    # an unparsed answer has no label for which its rationale could be
    assert _agreeing_rationales(row, ["a", "b", "c"], {"b": "down", "c": "?"}) == ["down"]
    assert _agreeing_rationales(row, ["c"], {"c": "?"}) == []

    class Held(StageTables):
        def __init__(self):
            pass

        def rows(self, split_ref):
            return [{"id": i, "label": None, "rationale": "hidden", "split_ref": split_ref} for i in "12"]

        def signals(self, teacher, split_ref):
            p = {"a": [0.6, 0.4], "b": [0.1, 0.9]}[teacher]
            return {
                i: {"probabilities": p, "fold": -1, "rationale": f"{teacher} {i}", "contradicts": i == "2"}
                for i in "12"
            }

    def rows(teachers):
        phase = {"data": ["s/pool"], "teachers": teachers, "loss": {"ce": 1.0, "rationale": 1.0}, "steps": 1}
        student = StudentConfig(model="m", arch="causal", phases=[phase | {"learning_rate": 1e-3}])
        teacher = TeacherConfig(kind="lm", model="m")
        params = Params.model_construct(students={"s": student}, teachers={"a": teacher, "b": teacher})
        return [row["rationale"] for row in student_rows(Held(), params, "s")[0]]

    assert rows(["a"]) == ["a 1", None] and rows(["a", "b"]) == ["b 1", None]


def test_inputs_are_the_same_bytes_and_name_a_row_without_a_signal(base, tmp_path):
    repo = shutil.copytree(base, tmp_path / "repo", symlinks=True)
    before = {path: path.read_bytes() for path in (repo / "data/inputs").rglob("*") if path.is_file()}
    assert write_inputs(repo).returncode == 0
    assert before == {path: path.read_bytes() for path in (repo / "data/inputs").rglob("*") if path.is_file()}
    agreement = {"metric": "agreement"}
    setting("students", "tiny-kd", "phases", 0, "early_stopping", value=agreement)(repo)
    file = repo / "data/teacher/lm/signals.parquet"
    signals = table(file)
    assert write_inputs(repo).returncode == 0
    watched, known = table(repo / "data/inputs/tiny-kd/validation.parquet"), signals.set_index("id")["probabilities"]
    assert len(watched) > 10
    for name, probabilities in zip(watched["id"], watched["probabilities_lm"], strict=True):
        assert list(probabilities) == pytest.approx(list(known[name]), abs=1e-6)
    assert "probabilities_lm" not in table(repo / "data/inputs/tiny-kd/test.parquet")
    signals[signals["split"] != "validation"].to_parquet(file)
    done = write_inputs(repo)
    assert done.stderr == (
        "error: students.tiny-kd: `early_stopping: {metric: agreement}`, but `lm` has no distribution over labels for "
        "rows of finance/validation\n"
    )
    lost = signals[signals["split"] == "pool"].index[3]
    signals.drop(index=lost).to_parquet(file)
    done = write_inputs(repo)
    name, rows = signals["id"][lost], (signals["split"] == "pool").sum()
    assert (done.returncode, done.stderr) == (
        1,
        f"error: students.tiny-kd: teacher `lm` has no signal for 1 of {rows} rows of finance/pool (first: {name})\n",
    )
