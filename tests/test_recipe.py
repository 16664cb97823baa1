"""Recipes: overlays, folders of their own, and stand-ins built from a config."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pandas as pd
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from distillery.cli import main
from distillery.config.load import load_params, validate_section
from distillery.config.schema import DIVERGENCES, Params
from distillery.data.readers import read_source
from distillery.errors import UserError
from distillery.files import read_yaml, repository_root
from distillery.pipeline import published_settings, recipe
from distillery.pipeline.plan.resources import dense_bytes
from distillery.pipeline.published_features import (
    COLUMNS,
    FIGURE_COLUMNS,
    PAGE_FILE,
    STATUSES,
    features_page,
    missing_places,
    read_features,
    read_figures,
)
from distillery.pipeline.published_settings import (
    SETTINGS_FILE,
    recipe_settings,
    setting_rows,
    settings_at,
    settings_page,
    value_text,
)
from distillery.pipeline.recipe import load_recipe, merge_overlay, prepare_folder, prepare_recipe, run_recipe

RECIPES = sorted(path.stem for path in (tiny.ROOT / "recipes").glob("*.yaml"))


def test_an_overlay_changes_keys_items_and_takes_away():
    base = {"a": {"b": 1, "c": [{"d": 1, "e": 2}, {"d": 3}], "f": [1, 2]}, "g": 4}
    over = {"a": {"b": None, "c": {0: {"d": 9}}, "f": [5]}, "h": {"i": 6}}
    assert merge_overlay(base, over) == {
        "a": {"c": [{"d": 9, "e": 2}, {"d": 3}], "f": [5]},
        "g": 4,
        "h": {"i": 6},
    }
    assert base["a"]["b"] == 1


def test_a_gpu_without_a_plan_starts_no_run(monkeypatch):
    monkeypatch.setattr(recipe, "run_recipe_command", lambda *_: pytest.fail("the recipe was started"))
    with pytest.raises(SystemExit, match="error: --gpu is of the plan: add --plan, or leave --gpu out"):
        main(["recipe", "stepbystep-gpt2", "--gpu", "h100-80gb"])


@pytest.fixture
def repository(tmp_path):
    """The tiny experiment with one recipe in it: itself with another seed, and a smaller overlay."""
    repo = tiny.experiment(tmp_path / "repo")
    (repo / "recipes").mkdir()
    text = (repo / "params.yaml").read_text().replace("seeds: [0]", "seeds: [7]")
    small = "scale: {small: {seeds: [8], students: {tiny-kd: {phases: {1: {steps: 1}}}}}}\n"
    (repo / "recipes" / "other.yaml").write_text(text + small)
    return repo


def test_a_recipe_has_a_folder_of_its_own(repository):
    before = subprocess.run(["git", "status", "--porcelain"], cwd=repository, capture_output=True, text=True).stdout
    whole, small = prepare_recipe(repository, "other"), prepare_recipe(repository, "other", "small")
    assert whole != small
    assert load_params(whole / "params.yaml").seeds == [7]
    loaded = load_params(small / "params.yaml")
    assert (loaded.seeds, loaded.students["tiny-kd"].phases[1].steps) == ([8], 1)
    assert repository_root(small / "notebooks") == small  # what runs there finds its own params.yaml
    assert load_params(repository / "params.yaml").seeds == [0]
    assert (
        before
        == subprocess.run(["git", "status", "--porcelain"], cwd=repository, capture_output=True, text=True).stdout
    )
    for shared in (".cache/models", ".cache/answers"):  # nothing is fetched or paid for twice
        assert (small / shared).resolve() == (whole / shared).resolve() == repository / shared
    (small / "runs").mkdir()
    kept = (small / "src/distillery/config/load.py").stat().st_mtime_ns
    (repository / "notebooks" / "01_data.ipynb").unlink()
    assert prepare_recipe(repository, "other", "small") == small
    assert (small / "runs").exists()  # what it wrote stays
    assert not (small / "notebooks" / "01_data.ipynb").exists()
    assert (small / "src/distillery/config/load.py").stat().st_mtime_ns == kept


def test_the_scale_all_agree_reads_the_published_file_or_names_it(tmp_path):
    """As PhraseBank has it: `sentence@label` in latin-1, without a header; it is never fetched."""
    line = "recipes/pkd-albert.yaml: data/phrasebank/Sentences_AllAgree.txt: no such file; the recipe needs: Sentences_"
    with pytest.raises(UserError, match=f"^{re.escape(line)}[^\n]*$"):
        prepare_recipe(tiny.ROOT, "pkd-albert", "all-agree")
    source = validate_section(Params, load_recipe(tiny.ROOT, "pkd-albert", "all-agree"), "pkd-albert").data["fpb"]
    (tmp_path / "data/phrasebank").mkdir(parents=True)
    lines = ['Ahlström "rose" ; it says , 5 %.@positive', "A loss of EUR 2 mn .@negative", "It is so .@neutral"]
    (tmp_path / source.source).write_bytes("".join(f"{line}\r\n" for line in lines).encode("latin-1"))
    rows = read_source(source, tmp_path).rows
    assert [f"{row[source.columns.text]}@{row[source.columns.label]}" for row in rows] == lines
    without = source.model_copy(update={"delimiter": None})
    with pytest.raises(UserError, match=r"cannot read `.txt`; allowed: "):
        read_source(without, tmp_path)


def test_a_recipe_takes_the_answers_that_its_teacher_reads_along(repository, tmp_path):
    (repository / "data/answers").mkdir()
    (repository / "data/answers/far.csv").write_text("id,label\n1,positive\n")
    raw, columns = load_recipe(repository, "other", None), {"id": "id", "text": None, "label": "label"}
    raw["teachers"]["far"] = {"kind": "answers", "answers": {"files": ["data/answers/far.csv"], "columns": columns}}
    folder = prepare_folder(repository, raw, tmp_path / "folder", "other")
    assert (folder / "data/answers/far.csv").read_text() == "id,label\n1,positive\n"


def key_order(section, path=""):
    """The keys of every section of a file, in their order."""
    if isinstance(section, list):
        return {key: keys for i, item in enumerate(section) for key, keys in key_order(item, f"{path}.{i}").items()}
    if not isinstance(section, dict):
        return {}
    below = [key_order(value, f"{path}.{key}") for key, value in section.items()]
    return {path: list(section)} | {key: keys for part in below for key, keys in part.items()}


def test_old_keys_of_a_recipe_and_of_its_scale_are_read(repository, capsys):
    path = repository / "recipes" / "other.yaml"
    old = path.read_text().replace("{phases: {1: {steps: 1}}}", "{phases: {1: {take: {agree: true}}}}")
    path.write_text(old)
    loaded = load_params(prepare_recipe(repository, "other", "small") / "params.yaml")
    assert loaded.students["tiny-kd"].phases[1].pseudo_labels.agreement
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    key = "students.tiny-kd.phases.1.take"
    assert lines[1].startswith(f"recipes/other.yaml, scale small: {key}: renamed to pseudo_labels; the old key is read")


def test_a_recipe_runs_there_with_dvc(repository):
    """The first stage is enough to see that DVC works without git and writes to that folder alone."""
    folder = prepare_recipe(repository, "other", "small")
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "repro", "strip"], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert (folder / "build/notebooks/01_data.ipynb").exists()
    assert not (repository / "build").exists()


def test_a_recipe_with_a_search_first_searches(repository, monkeypatch):
    """The steps, their folder and their environment; what each step does is tested beside it."""
    path, runs = repository / "recipes" / "other.yaml", []
    path.write_text(path.read_text() + "search: {student: tiny-gold, learning_rate: [1.0e-4, 1.0e-2]}\n")
    status = {"search": 0}

    def run(command, cwd, env, stdout):
        step = next((word for word in ("search", "inputs", "distill") if word in command), "repro")
        runs.append((step, cwd, env["PYTHONHASHSEED"], env["PYTHONPATH"]))
        return subprocess.CompletedProcess(command, status.get(step, 0))

    monkeypatch.setattr(recipe.subprocess, "run", run)
    whole = prepare_recipe(repository, "other")
    assert run_recipe(whole) == 0
    assert runs == [(step, whole, "0", str(whole / "src")) for step in ("inputs", "search", "repro")]
    status["search"] = 3
    assert run_recipe(whole) == 3 and runs[-1][0] == "search"  # nothing is trained with settings that were not found
    status.clear()
    assert run_recipe(whole, stages=["distill"]) == 0  # the other steps as ever
    assert [step for step, *_ in runs[-3:]] == ["inputs", "search", "distill"]
    without = prepare_folder(repository, load_recipe(repository, "other") | {"search": None}, whole, "other")
    assert run_recipe(without) == 0 and [step for step, *_ in runs[-2:]] == ["distill", "repro"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["none"], "error: recipes/none.yaml: no such recipe; there are: other"),
        (["other", "--scale", "tiny"], "error: recipes/other.yaml: no scale `tiny`; there are: small"),
    ],
)
def test_an_unknown_recipe_or_scale_ends_in_one_line(repository, arguments, line):
    command = [sys.executable, "-m", "distillery", "recipe", *arguments]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, line + "\n")


OF_THIS_PROJECT = ("candidates", "finance-full", "qwen-gkd", "qwen-half", "qwen-label-free", "qwen-written")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_whole_experiment_at_every_scale(name, tmp_path):
    raw = read_yaml(tiny.ROOT / "recipes" / f"{name}.yaml")
    for scale in [None, *(raw.get("scale") or {})]:
        recipe = load_recipe(tiny.ROOT, name, scale)
        folder = prepare_folder(tiny.ROOT, recipe, tmp_path / str(scale), name)
        assert key_order(read_yaml(folder / "params.yaml")) == key_order(recipe)
        loaded = load_params(folder / "params.yaml")
        claims = loaded.recipe.published if loaded.recipe else []
        models = {claim.model for claim in claims if not claim.model.endswith("(not run here)")}
        # an untrained model has the name of the first student that starts from it
        starts = {(spec.model, str(spec.init.layers)): student for student, spec in reversed(loaded.students.items())}
        assert models <= {*loaded.students, *loaded.teachers, *(f"{student}, untrained" for student in starts.values())}
    assert "recipe" in raw or name in OF_THIS_PROJECT
    if "recipe" in raw:  # a published system: where it is from, what it needs, and what small means
        assert loaded.recipe.source and loaded.recipe.needs and loaded.recipe.differences


@pytest.mark.parametrize("name", RECIPES)
def test_random_weights_are_at_the_scale_machinery_alone(name):
    """A score of any other scale can show what was learned; that scale shows that an encoder-decoder runs."""
    for scale in [None, *(read_yaml(tiny.ROOT / "recipes" / f"{name}.yaml").get("scale") or {})]:
        loaded = load_recipe(tiny.ROOT, name, scale)
        drawn = [model for model, spec in loaded["models"].items() if spec.get("random")]
        assert bool(drawn) == (scale == "machinery")
        if drawn:
            assert {student["arch"] for student in loaded["students"].values()} == {"seq2seq"}


ORIGINS = ("hub", "revision", "wheel", "random", "hub_splits", "hub_config", "api")


@pytest.mark.parametrize("name", RECIPES)
def test_every_guess_and_difference_names_a_setting_of_the_recipe(name):
    for scale in [None, *(read_yaml(tiny.ROOT / "recipes" / f"{name}.yaml").get("scale") or {})]:
        params = validate_section(Params, load_recipe(tiny.ROOT, name, scale), name)
        settings = recipe_settings(tiny.ROOT, params)
        for notes in (params.recipe.guesses, params.recipe.differences) if params.recipe else ():
            assert [setting for setting in notes if not settings_at(settings, setting)] == []
            # nor does one speak of an origin that the models and data of this scale do not have
            origins = [path for path in notes if path.rpartition(".")[2] in ORIGINS]
            assert [path for path in origins if not any(settings_at(settings, path))] == []
            assert all(notes.values())


@pytest.mark.parametrize("name", RECIPES)
def test_every_setting_of_the_source_is_the_recipes_or_has_a_reason(name):
    """And no reason is for a setting that does not differ; a guess is one where the source names two values."""
    raw, rows = load_recipe(tiny.ROOT, name), setting_rows(tiny.ROOT, name)
    assert bool(rows) == ("recipe" in raw)
    different = {row.setting for row in rows if not row.same}
    assert [row.setting for row in rows if not row.same and not row.why] == []
    assert sorted(set(raw.get("recipe", {}).get("differences") or {}) - different) == []
    same = {row.setting for row in rows if row.same}
    assert [row.setting for row in rows if row.origin == "guesses" and row.setting not in same] == []
    assert all(row.place for row in rows)
    copies = ("hub:atrost/financial_phrasebank@main", "hub:lighteval/siqa@main")  # no source names them
    assert not [row.setting for row in rows if row.source in copies]


def test_the_page_of_settings_is_that_of_the_recipes():
    assert (tiny.ROOT / SETTINGS_FILE).read_text(encoding="utf-8") == settings_page(tiny.ROOT)


def test_the_features_of_the_sources_are_where_the_table_has_them(tmp_path):
    """Every place exists in the code of today, every feature that does not work says why, and the page is current."""
    rows = read_features(tiny.ROOT)
    assert tuple(rows.columns) == COLUMNS and set(rows["status"]) <= set(STATUSES)
    assert not rows.duplicated(["source", "feature"]).any()
    assert [place for where in rows["where"] for place in missing_places(tiny.ROOT, where)] == []
    unexplained = rows[(rows["status"] != "works") & (rows["remark"] == "")]
    assert unexplained["feature"].tolist() == []
    assert rows.loc[(rows["status"] == "works") & (rows["where"] == ""), "feature"].tolist() == []
    page = (tiny.ROOT / PAGE_FILE).read_text(encoding="utf-8")
    assert page == features_page(tiny.ROOT)
    assert f"| {(rows['status'] == 'works').sum()} |" in page and f"| {len(rows)} |" in page
    (tmp_path / "a.py").write_text("x = 1\n")
    assert missing_places(tmp_path, "a.py; a.py: x = 1; a.py: y; b.py") == ["a.py: y", "b.py"]


def test_every_published_figure_has_its_place():
    """The scores of recipes, and the figures that no run compares; a total is that of its parts."""
    for name in RECIPES:
        params = validate_section(Params, load_recipe(tiny.ROOT, name), name)
        assert [claim.model for claim in (params.recipe.published if params.recipe else []) if not claim.place] == []
    figures = read_figures(tiny.ROOT)
    assert tuple(figures.columns) == FIGURE_COLUMNS and (figures["place"] != "").all()
    assert set(figures["source"]) <= set(read_features(tiny.ROOT)["source"])
    assert not figures.duplicated(["source", "of", "figure"]).any()
    value = figures[figures["source"] == "anon-crisis"].pivot(index="of", columns="figure", values="value")
    for column, total in (("articles", 219_292), ("articles after two filters", 137_308)):
        assert value[column].drop(["all themes", "articles labelled by people"], errors="ignore").sum() == total
    memory = value.dropna(subset=["total, GB"])
    parts = memory[["weights, GB", "gradients, GB", "optimizer, GB", "gradients' copy in float32, GB"]].sum(axis=1)
    assert len(memory) == 6 and parts.tolist() == pytest.approx(memory["total, GB"].tolist(), rel=0.03)
    page = features_page(tiny.ROOT)
    assert "| anon-crisis | Refugee_Crisis | articles | 82,671 | table 1 |  |" in page and "| 0.0014 |" in page


def test_the_page_of_recipes_agrees_with_them():
    """How many seeds a scale has, when a student chooses its rows, and what the teachers of the memory table weigh."""
    page = (tiny.ROOT / "recipes/README.md").read_text(encoding="utf-8")
    ran = (
        pd.read_csv(tiny.ROOT / "benchmarks/recipes.csv")[["recipe", "scale"]].drop_duplicates().itertuples(index=False)
    )
    seeds = {(scale, len(load_recipe(tiny.ROOT, name, scale)["seeds"])) for name, scale in ran}
    assert {(scale, number) for scale, number in seeds if number > 1} == {("sizes", 2), ("active", 2)}
    assert "one seed each but for the scales `sizes` and `active`, which have two:" in page
    active = load_recipe(tiny.ROOT, "multiteacher-distilbert", "active")["students"]
    for name in ("doubt", "disagreement"):
        first, *others = active[name]["phases"]
        assert "select" not in first and first["steps"] == 20 and ["select" in phase for phase in others] == [True] * 3
    models = {"anon-crisis-llama2": "meta-llama--Llama-2-13b-hf", "anon-crisis-opt": "facebook--opt-13b"}
    for recipe_name, model in (models | {"finnews-bloom": "Orkhan--llama-2-7b-absa"}).items():
        config = read_yaml(tiny.ROOT / f"recipes/facts/{model}.yaml")["config"]["value"]
        with torch.device("meta"):
            teacher = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        assert f"| {recipe_name} | {dense_bytes(teacher, 'bfloat16') / 1e9:.1f} |" in page


def test_settings_are_found_by_names_positions_and_stars():
    settings = {"a": {"b.c": {"d": 1}, "b": {"c": 3}}, "e": [{"f": 1}, {"f": 2}]}
    assert settings_at(settings, "a.b.c.d") == [1] and settings_at(settings, "a.b.c") == [{"d": 1}, 3]
    assert settings_at(settings, "e.*.f") == [1, 2] and settings_at(settings, "e.1.f") == [2]
    assert (
        settings_at(settings, "*.*.f") == [1, 2] and settings_at(settings, "e.2.f") == settings_at(settings, "x") == []
    )
    assert [value_text(value) for value in (None, [], False, 5e-5, 3367, {"ce": 0.5, "kl": [1, "a"]})] == [
        "none",
        "none",
        "no",
        "5e-05",
        "3,367",
        "ce 0.5, kl 1, a",
    ]


def test_settings_are_compared_with_those_of_the_recipe(repository, capsys, monkeypatch):
    """A list of names with a section's, all values under a star with one; an unknown key ends in one line."""
    path = repository / "recipes" / "other.yaml"
    text = path.read_text()
    named = [
        {"setting": "seeds", "source": [7], "place": "1"},
        {"setting": "students.*.phases.*.batch_size", "source": 99, "place": "2"},
        {"setting": "tasks.finance-sentiment.labels", "source": ["positive", "neutral", "negative"], "place": "3"},
        {"setting": "evaluate.headline", "source": "x|y", "place": "4"},
    ]

    def write(settings: list) -> None:
        notes = {"differences": {"students.*.phases.*.batch_size": "smaller | here"}, "guesses": {}}
        path.write_text(text + json.dumps({"recipe": {"source": "s", "settings": settings} | notes})[1:-1] + "\n")

    write(named)
    rows = setting_rows(repository, "other")
    assert [row.same for row in rows] == [True, False, True, False]
    assert [(row.why, row.origin) for row in rows[1::2]] == [("smaller | here", "differences"), ("", "")]
    monkeypatch.setattr(published_settings, "repository_root", lambda: repository)
    main(["recipe", "other", "--settings"])
    assert "| `evaluate.headline` | x\\|y | 4 |" in capsys.readouterr().out
    write([*named, {"setting": "students.*.phases.0.gone", "source": 1, "place": "5"}])
    line = r"recipes/other.yaml: recipe.settings.4: the recipe has no key `students.\*.phases.0.gone`"
    with pytest.raises(UserError, match=line):
        setting_rows(repository, "other")
    for other in (["--scale", "small"], ["--plan"], ["--gpu", "h100-80gb"]):
        with pytest.raises(SystemExit, match="error: --settings is for the full scale, and alone"):
            main(["recipe", "other", "--settings", *other])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_weighs_its_divergences_as_its_source_does(name):
    """Without a factor T^2 that the source does not write; a recipe that has the factor says so in its phase."""
    with_factor = {"pkd-albert"}  # plain distillation as Hinton et al. (2015) write it
    for scale in [None, *(read_yaml(tiny.ROOT / "recipes" / f"{name}.yaml").get("scale") or {})]:
        params = validate_section(Params, load_recipe(tiny.ROOT, name, scale), name)
        phases = [phase for student in params.students.values() for phase in student.phases]
        softened = [phase for phase in phases if phase.temperature != 1 and not set(DIVERGENCES).isdisjoint(phase.loss)]
        if params.recipe:
            assert all(phase.scale_by_t2 == (name in with_factor) for phase in softened)
            assert all("scale_by_t2" in phase.model_fields_set for phase in softened)


def test_three_domains_have_their_score_and_time_for_a_row():
    """A latency as it is, a number of rows a second as its inverse, of one scale; each model is one of its recipe."""
    domains = tiny.load_benchmark("domains")
    table = [("multiteacher-distilbert", "finbert", "accuracy", 0.9, 0.5)]
    table += [("multiteacher-distilbert", "finbert", "latency_p50_ms", 10.0, 8.0)]
    table += [("trivia-t5", "t5-small", "sentences_per_second", 5.0, None)]
    frame = pd.DataFrame(table, columns=["recipe", "model", "score", "published", "this run"]).assign(scale="small")
    frame = pd.concat([frame.assign(scale="sizes", published=None), frame])  # a question of this project's own
    drawn = domains.figure_svg(domains.figure_domains(domains.domain_rows(frame)))
    for svg in (drawn, (tiny.ROOT / domains.FIGURE).read_text(encoding="utf-8")):
        assert "$" not in svg and ">100</text>" in svg  # ticks are numbers, not formulas that nothing typesets
    rows = domains.domain_rows(frame).set_index(["domain", "role", "origin"])
    assert rows.loc[("finance", "teacher", "this run")].tolist() == [0.5, 8.0]
    assert rows.loc[("trivia", "student", "published"), "milliseconds"] == 200
    assert len(rows) == 12 and rows["score"].notna().sum() == 2
    for recipe_name, teacher, student, _ in domains.DOMAINS.values():
        raw = load_recipe(tiny.ROOT, recipe_name)
        assert teacher in raw["teachers"] and student in raw["students"]


@pytest.mark.parametrize(
    ("kind", "arch"), [("t5", "seq2seq"), ("gpt2", "causal"), ("llama", "causal"), ("bert", ""), ("albert", "")]
)
def test_a_stand_in_is_built_from_its_config(kind, arch, tmp_path):
    from transformers import AutoModel

    from distillery.config.schema import ModelConfig
    from distillery.models.fetch import fetch_model
    from distillery.models.load import load_tokenizer

    spec = ModelConfig(random={"type": kind, "words": ["data/corpora/math.jsonl", "tasks/math.yaml"], "layers": 2})
    folder = fetch_model("tiny", spec, tmp_path)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer("How many minutes do they take?")["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert json.loads((folder / "config.json").read_text())["model_type"] == kind
    model = AutoModel.from_pretrained(folder)
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert fetch_model("tiny", spec, tmp_path) == folder
    assert fetch_model("tiny", spec, tmp_path / "again").name == folder.name
    weights = [(path / "model.safetensors").read_bytes() for path in (folder, tmp_path / "again" / folder.name)]
    assert weights[0] == weights[1]
