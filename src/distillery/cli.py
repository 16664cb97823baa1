"""The command line: ``distillery <verb>``, or ``python -m distillery <verb>``.

Each verb imports what it needs when it runs. A user's mistake ends with one line and exit status 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from distillery.errors import UserError


def check() -> None:
    """Validate params.yaml, its task files and models, and count what it names."""
    from distillery.config.effects import unused_settings
    from distillery.config.load import load_params
    from distillery.config.trackers import check_trackers
    from distillery.pipeline.model_checks import check_models
    from distillery.pipeline.task_checks import check_task_kinds
    from distillery.tasks.schema import load_task

    params = load_params()
    for source in params.data.values():
        load_task(source.task)
    check_task_kinds(params)
    check_models(params)
    check_trackers(params.tracking)
    for line in unused_settings(params):
        print(f"warning: params.yaml: {line}", file=sys.stderr)
    print(
        f"params.yaml: {len(params.data)} source(s), {len(params.teachers)} teacher(s), "
        f"{len(params.students)} student(s) x {len(params.seeds)} seed(s)"
    )


def new(file: str, name: str | None, text: str | None, label: list[str]) -> None:
    """Draft a task file and params.yaml from a data file, and say what was guessed."""
    from distillery.files import repository_root
    from distillery.pipeline.draft import new_experiment

    print("\n".join(new_experiment(repository_root(), file, name, text, label)))


def schema(write: bool) -> None:
    """Print the JSON schema of params.yaml, or write it and the reference of all keys into docs/."""
    from distillery.config.reference_docs import REFERENCE_FILE, SCHEMA_FILE, reference_markdown, schema_json
    from distillery.files import repository_root
    from distillery.tasks.schema import Task

    if not write:
        print(schema_json(), end="")
        return
    for file, text in ((SCHEMA_FILE, schema_json()), (REFERENCE_FILE, reference_markdown(Task))):
        path = repository_root() / file
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(file)


def leaderboard() -> None:
    """Print the leaderboard of the last run as a Markdown table."""
    import pandas as pd

    from distillery.files import Paths, repository_root
    from distillery.report.page import leaderboard_markdown

    path = Paths(repository_root()).reports / "leaderboard.csv"
    if not path.exists():
        raise UserError("reports/leaderboard.csv: not there yet; run `make repro` first")
    print(leaderboard_markdown(pd.read_csv(path)))


def strip() -> None:
    """First stage: check params.yaml, write what the stages depend on into build/."""
    from distillery.pipeline.strip import run_strip

    run_strip()


def inputs(role: str) -> None:
    """Write what each teacher or student learns from."""
    from distillery.config.load import load_params
    from distillery.files import repository_root
    from distillery.pipeline.inputs import write_student_inputs, write_teacher_records

    writers = {"teachers": write_teacher_records, "students": write_student_inputs}
    writers[role](repository_root(), load_params())


def run(notebook: str, selectors: Sequence[Sequence[str]]) -> None:
    """Run one notebook as a stage of the pipeline."""
    from distillery.pipeline.run_notebook import run_stage

    run_stage(notebook, selectors)


def lesson(name: str | None) -> None:
    """Execute the lessons, or one of them, into reports/lessons/."""
    from distillery.pipeline.lessons import run_lessons

    run_lessons(name)


def study(name: str, parameters: Sequence[Sequence[str]]) -> None:
    """Execute the notebook of a study."""
    from distillery.pipeline.studies import run_study

    run_study(name, parameters)


def recipe(name: str, scale: str | None, plan: bool, gpu: str | None, settings: bool) -> None:
    """Run a published system in a folder of its own, plan it without its weights, or show its settings."""
    if settings:
        from distillery.pipeline.published_settings import print_settings

        if scale or plan or gpu:
            raise UserError("--settings is for the full scale, and alone: leave --scale, --plan and --gpu out")
        return print_settings(name)
    if plan:
        from distillery.pipeline.plan.command import DEFAULT_GPU, run_plan

        return run_plan(name, gpu or DEFAULT_GPU, scale)
    if gpu:
        raise UserError("--gpu is of the plan: add --plan, or leave --gpu out")
    from distillery.pipeline.recipe import run_recipe_command

    run_recipe_command(name, scale)


def plan(teacher: str, **options: Any) -> None:
    """Print what it takes to let a teacher label its rows: calls, tokens, hours, dollars. Calls no endpoint."""
    from distillery.pipeline.plan.labelling import run_labelling_plan

    run_labelling_plan(teacher, **options)


def label(teacher: str, source: str, target: str, ray: int | None) -> None:
    """Label a folder of Parquet files with a teacher into another one; a killed run continues with what is missing."""
    from distillery.teachers.parts import label_folder

    label_folder(teacher, source, target, ray)


def answers(name: str | None) -> None:
    """Ask the models of data/answers/*.yaml for label probabilities, into the .jsonl files beside them."""
    from distillery.files import repository_root
    from distillery.teachers.asking import write_answers

    root = repository_root()
    files = [root / f"data/answers/{name}.yaml"] if name else sorted((root / "data/answers").glob("*.yaml"))
    for path in files:
        print(write_answers(root, path.relative_to(root).as_posix()).relative_to(root))


def texts(name: str | None) -> None:
    """Let the models of data/texts/*.yaml write labelled texts from a task file, into the .jsonl files beside them."""
    from distillery.files import repository_root
    from distillery.teachers.writing import write_texts

    root = repository_root()
    files = [root / f"data/texts/{name}.yaml"] if name else sorted((root / "data/texts").glob("*.yaml"))
    for path in files:
        print(write_texts(root, path.relative_to(root).as_posix()).relative_to(root))


def search(write: bool) -> None:
    """Search settings for one phase of a student."""
    from distillery.pipeline.environment import restart_with_environment

    restart_with_environment()
    from distillery.pipeline.search import run_search

    run_search(write)


def times(since: float) -> None:
    """Print how long each stage took when it last ran here."""
    from distillery.files import repository_root
    from distillery.pipeline.stage_times import summarize_stage_times

    print(summarize_stage_times(repository_root(), since) or "no stage had to run")


def predict(student: str, **options: Any) -> None:
    """Predict the rows of a table with a finished student; a killed run continues when it is started again."""
    from pathlib import Path

    from distillery.deploy.predict import PredictOptions, predict_file

    options["text_columns"] = tuple(options["text_columns"])
    n = predict_file(Path(student), PredictOptions(**options))
    print(f"{n:,} rows predicted", file=sys.stderr)


def export(student: str) -> None:
    """Write a finished classifier as ONNX, a causal model as GGUF, in two precisions, and score both beside it."""
    from pathlib import Path

    from distillery.deploy.exports import export_folder

    print(export_folder(Path(student)).T.to_string(header=False))


def push(student: str, repo: str, public: bool) -> None:
    """Upload a finished student with its model card to a model hub, private by default; HF_TOKEN is the token."""
    from pathlib import Path

    from distillery.deploy.push import push_student

    print("\n".join(push_student(Path(student), repo, public)))


def serve(student: str, **options: Any) -> None:
    """Serve a finished student over HTTP: POST /predict, GET /health, GET /metrics."""
    from pathlib import Path

    from distillery.deploy.serve import run_server

    run_server(Path(student), **options)


def parser() -> argparse.ArgumentParser:
    """The parser of all verbs; `command` holds the function to call."""
    top = argparse.ArgumentParser(prog="distillery", description="Distil large language models into small ones.")
    verbs = top.add_subparsers(title="verbs", metavar="<verb>", required=True)

    def verb(command: Callable[..., None]) -> argparse.ArgumentParser:
        added = verbs.add_parser(command.__name__, help=command.__doc__, description=command.__doc__)
        added.set_defaults(command=command)
        return added

    verb(check)
    drafting = verb(new)
    drafting.add_argument("file", help="a data file of the repository, such as data/reviews.csv")
    drafting.add_argument("--name", help="of the task and the source; the name of the file when not given")
    drafting.add_argument("--text", help="the column with the texts; guessed when not given")
    drafting.add_argument(
        "--label",
        action="append",
        default=[],
        help="the column with the labels, or again and again each of the columns of 1 and 0; guessed when not given",
    )
    verb(schema).add_argument(
        "--write", action="store_true", help="write docs/params.schema.json and docs/parameters.md"
    )
    verb(leaderboard)
    verb(strip)
    verb(inputs).add_argument("role", choices=("teachers", "students"))
    running = verb(run)
    running.add_argument("notebook", help="its name without folder and ending, such as 04_distill")
    running.add_argument(
        "-p", dest="selectors", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a selector"
    )
    verb(lesson).add_argument("name", nargs="?", help="a file of notebooks/lessons/ without folder and ending")
    _add_labelling_arguments(verb)
    verb(answers).add_argument("name", nargs="?", help="a file of data/answers/ without folder and ending; all without")
    verb(texts).add_argument("name", nargs="?", help="a file of data/texts/ without folder and ending; all without it")
    running_study = verb(study)
    running_study.add_argument("name", help="a folder of studies/")
    running_study.add_argument(
        "-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter"
    )
    running_recipe = verb(recipe)
    running_recipe.add_argument("name", help="a file of recipes/ without folder and ending")
    running_recipe.add_argument("--scale", help="an overlay, such as `small`: stand-ins for its models and data")
    running_recipe.add_argument("--plan", action="store_true", help="check it without weights; `all`: every recipe")
    running_recipe.add_argument("--gpu", help="of the plan, such as h100-80gb")
    running_recipe.add_argument(
        "--settings", action="store_true", help="its source's settings beside its own; `all` writes them for every one"
    )
    verb(times).add_argument(
        "--since", type=float, default=0.0, help="only stages that ended later; seconds since 1970"
    )
    verb(search).add_argument("--write", action="store_true", help="put the best settings into params.yaml")
    _add_deploy_arguments(verb)
    return top


def _positive(text: str) -> int:
    """A whole number above 0, for the parser."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _add_labelling_arguments(verb: Callable[[Callable[..., None]], argparse.ArgumentParser]) -> None:
    planning, labelling = verb(plan), verb(label)
    planning.add_argument("teacher", help="its name in params.yaml")
    labelling.add_argument("teacher", help="its name in params.yaml")
    planning.add_argument("--source", help="one of the sources that it labels; all when not given")
    planning.add_argument("--rows", type=_positive, help="as many rows like those of the source, such as 1000000")
    planning.add_argument("--rate", type=float, help="calls a second of one endpoint, or rows of a machine")
    planning.add_argument("--workers", type=_positive, help="endpoints, or machines; those of params.yaml without it")
    labelling.add_argument("source", help="a folder of .parquet files with a column `text`")
    labelling.add_argument("target", help="the folder for them with the columns `prediction` and `probabilities`")
    labelling.add_argument("--ray", type=_positive, metavar="WORKERS", help="label with Ray, a local model a worker")


def _add_deploy_arguments(verb: Callable[[Callable[..., None]], argparse.ArgumentParser]) -> None:
    """The verbs that use a finished student."""
    exporting, predicting, serving, pushing = verb(export), verb(predict), verb(serve), verb(push)
    for added in (exporting, predicting, serving, pushing):
        added.add_argument("student", help="the folder of a run, such as runs/tiny-kd-0, or a copy of its model folder")
    for added in (predicting, serving):
        engines = ("auto", "onnx-int8", "onnx-float32", "torch")
        added.add_argument("--engine", choices=engines, default="auto", help="auto: an export if there is one")
        added.add_argument("--threads", type=_positive, help="to compute with; all cores when not given")
        added.add_argument("--abstain", action="store_true", help="leave out predictions of low confidence")
    predicting.add_argument("--input", default="-", help="CSV, TSV, JSON lines or Parquet; - is standard input")
    predicting.add_argument("--output", default="-", help="as --input; - is standard output")
    formats = ("csv", "tsv", "jsonl", "parquet")
    predicting.add_argument("--format", choices=formats, help="where no suffix shows it: of - and unknown suffixes")
    predicting.add_argument(
        "--text", dest="text_columns", nargs="+", default=[], metavar="COLUMN", help="joined to the text of a row"
    )
    predicting.add_argument("--encoding", default="utf-8-sig", help="of the input, such as cp1252")
    predicting.add_argument("--probabilities", action="store_true", help="add a column for each label")
    predicting.add_argument("--prefix", default="", help="of the names of the added columns")
    pushing.add_argument("repo", help="user/name, of the hub at HF_ENDPOINT; made if it is not there")
    pushing.add_argument("--public", action="store_true", help="make it public, or upload to one that is")
    serving.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves other machines, too")
    serving.add_argument("--port", type=int, default=8000, help="0 takes a free one")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the verb that the command line names."""
    options = vars(parser().parse_args(arguments))
    command = options.pop("command")
    try:
        command(**options)
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
    except BrokenPipeError:  # the reader of the output has enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] == "distillery":
            raise
        sys.exit(
            f"error: {sys.executable} has no package `{missing.name}`; "
            "run `make repro`, or activate the environment first: source .venv/bin/activate"
        )
