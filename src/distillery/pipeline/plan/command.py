"""`distillery recipe <name> --plan`: print the plan of a recipe, and of all recipes one table in recipes/PLAN.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from distillery.errors import UserError
from distillery.files import atomic_write, read_yaml, repository_root
from distillery.models.runtime import configure_runtime
from distillery.pipeline.plan.costs import (
    SEARCH,
    api_costs,
    check_gpu,
    disk_bytes,
    searched_phase,
    stage_memory,
    training_hours,
)
from distillery.pipeline.plan.facts import MODEL_FACTS
from distillery.pipeline.plan.resolve import RecipePlan, resolve_recipe
from distillery.pipeline.plan.resources import (
    GPU_ORIGIN,
    GPUS,
    UTILISATION,
    dense_bytes,
    merged_parameters,
    nf4_bytes,
    size_text,
)

DEFAULT_GPU = "a100-80gb"
SIZES = {"models", "data"}  # sections of an overlay that make a run smaller
COLUMNS = ("recipe", "optimizer steps", "GPU memory, GB", "of it activations", "stage", "disk, GB", "hours", "API, $")
COLUMNS = (*COLUMNS, "failed", "unknown")
HEADING = """# The recipes at full scale, without their weights

`make recipe NAME=all PLAN=1` wrote this table ([how](README.md#the-plan-of-a-recipe)). GPU memory is that of the stage
that needs most, activations counted in float32. Steps are those of one seed. Hours are those of the trainings of all
seeds, and of the trials of a search, on {gpu} at {share:.0%} of its peak, one GPU or as many as `compute.processes`.
Figures are computed from shapes and numbers of rows; none is measured. `failed` and `unknown` count checks.

"""


def run_plan(name: str, gpu: str = DEFAULT_GPU, scale: str | None = None) -> None:
    """Print the plan of recipe `name` at `scale`, or of `all`; exit with 1 when a check failed. Raises UserError."""
    if gpu not in GPUS:
        raise UserError(f"gpu: `{gpu}` is not known; there are: {', '.join(GPUS)}")
    if name == "all" and scale:
        raise UserError("--scale: needs the name of one recipe in place of `all`")
    configure_runtime()
    root, rows, notes, failed = repository_root(), [], [], []
    for recipe, overlay in planned_scales(root) if name == "all" else [(name, scale)]:
        plan = resolve_recipe(root, recipe, scale=overlay)
        text, row = describe_plan(plan, gpu)
        print(text, flush=True)
        rows.append(row)
        notes += source_hours(plan)
        failed += [f"{plan.title}: {finding.place}: {finding.text}" for finding in plan.failed]
    if name == "all":
        write_table(root / "recipes/PLAN.md", rows, gpu, notes)
        print("all recipes: recipes/PLAN.md")
    if failed:
        print("\n".join(f"failed: {line}" for line in failed), file=sys.stderr)
        sys.exit(1)


def planned_scales(root: Path) -> list[tuple[str, str | None]]:
    """Each recipe, and each of its scales of full size: none is `small`, and models and data stay."""
    recipes: list[tuple[str, str | None]] = []
    for path in sorted((root / "recipes").glob("*.yaml")):
        scales = read_yaml(path).get("scale") or {}
        full = [scale for scale, overlay in scales.items() if scale != "small" and not SIZES & set(overlay or {})]
        recipes += [(path.stem, scale) for scale in [None, *full]]
    return recipes


def describe_plan(plan: RecipePlan, gpu: str) -> tuple[str, Sequence[str]]:
    """The tables of a plan as text, and its row in the table of all recipes."""
    stages, disk, hours, costs = stage_memory(plan), disk_bytes(plan), training_hours(plan, gpu), api_costs(plan)
    check_gpu(plan, stages, gpu)
    parts = [f"\n{plan.title}: from shapes alone", _models(plan), _origins(plan)]
    parts += [_sources(plan), _phases(plan, hours)]
    header = ("stage", "weights", "gradients", "optimizer", "activations, at most", "total, GB")
    sizes = [
        (stage, *map(size_text, (m.weights, m.gradients, m.optimizer, m.activations, m.total)))
        for stage, m in stages.items()
    ]
    parts.append(text_table(header, sizes))
    total = None if None in disk.values() else sum(size for size in disk.values() if size is not None)
    parts.append(text_table(("disk", "GB"), [(kind, size_text(size)) for kind, size in disk.items()]))
    calls = [
        (name, *(_number(value) for value in vars(cost).values()), _price_text(plan, name))
        for name, cost in costs.items()
    ]
    header = ("endpoint", "requests", "input tokens", "output tokens", "dollars", "price")
    parts += [text_table(header, calls)] if calls else []
    parts.append(text_table(("check", "of", "result"), [(f.status, f.place, f.text) for f in plan.findings]))
    processes = plan.params.compute.processes
    gpus = gpu if processes == 1 else f"{processes} x {gpu}"
    parts.append(
        f"hours: on {gpus} at {UTILISATION:.0%} of the peak, assumed; neither labelling nor decoding is counted\n"
        f"{gpu}: {GPU_ORIGIN}"
    )
    stage, most = max(stages.items(), key=lambda item: item[1].total)
    known = [cost.dollars for cost in costs.values() if cost.dollars is not None]
    row = (
        plan.title,
        _number(_sum_known([phase.steps for phase in plan.phases])),
        size_text(most.total),
        size_text(most.activations),
        stage,
        size_text(total),
        _number(_sum_known(list(hours.values()))),
        f"{sum(known):.2f}" if known else "–",
        str(len(plan.failed)),
        str(sum(finding.status == "unknown" for finding in plan.findings)),
    )
    return "\n\n".join(parts), row


def source_hours(plan: RecipePlan) -> list[str]:
    """A line with the hours on the GPU of the source, where it names one whose data sheet is known."""
    lines = []
    for named in plan.params.recipe.settings if plan.params.recipe else []:
        gpu = next((gpu for gpu in GPUS if gpu.partition("-")[0].upper() in str(named.source)), None)
        if named.setting == "recipe.needs" and gpu:
            hours = _number(_sum_known(list(training_hours(plan, gpu).values())))
            lines.append(
                f"{plan.title}: the source has {named.source}; the trainings here take {hours} hours on {gpu}."
            )
    return lines


def _models(plan: RecipePlan) -> str:
    rows = []
    for name, facts in plan.facts.items():
        owners = [f"teachers.{t}" for t, spec in plan.params.teachers.items() if spec.model == name]
        owners += [f"students.{s}" for s, spec in plan.params.students.items() if spec.model == name]
        model = next((plan.models[owner].model for owner in owners if owner in plan.models), None)
        config = facts.facts.get("config")
        sizes = ("unknown",) * 3
        if model is not None:
            in_4_bits = "–" if plan.models and model.get_output_embeddings() is None else size_text(nf4_bytes(model))
            sizes = f"{merged_parameters(model):,}", size_text(dense_bytes(model, "bfloat16")), in_4_bits
        architecture = config.value.get("model_type", "unknown") if config else "unknown"
        tokenizer = facts.facts["tokenizer"].value["family"] if "tokenizer" in facts.facts else "unknown"
        files = "unknown" if facts.files is None else f"{len(facts.files)} files"
        rows.append((name, facts.origin, architecture, *sizes, tokenizer, files))
    header = (
        "model",
        "origin",
        "architecture",
        "parameters",
        "16 bits, GB",
        "4 bits, GB",
        "tokenizer",
        "files",
    )
    return text_table(header, rows)


def _origins(plan: RecipePlan) -> str:
    """Where each fact about a model comes from: a row for each origin."""
    rows = []
    for name, model in plan.facts.items():
        sources = {key: model.facts[key].source if key in model.facts else "unknown" for key in MODEL_FACTS}
        for source in dict.fromkeys(sources.values()):
            keys = [key.replace("_", " ") for key, origin in sources.items() if origin == source]
            rows.append((name, ", ".join(keys), source))
    return text_table(("model", "facts", "origin"), rows)


def _price_text(plan: RecipePlan, teacher: str) -> str:
    price = plan.params.teachers[teacher].api.price
    return "none" if price is None else price.origin or "of unknown origin"


def _sources(plan: RecipePlan) -> str:
    rows = [
        (name, *map(_number, source.counts.values()), source.origin, source.texts_origin)
        for name, source in plan.sources.items()
    ]
    return text_table(("data", "train", "pool", "validation", "test", "numbers of rows", "texts"), rows)


def _phases(plan: RecipePlan, hours: dict[str, float | None]) -> str:
    rows = [
        (
            phase.owner,
            _number(phase.rows),
            _number(phase.steps),
            "unknown" if phase.tokens is None else f"{phase.tokens[0]:.0f}",
            "unknown" if phase.tokens is None else str(phase.tokens[1]),
            "unknown" if phase.step is None else f"{phase.step.flops / 1e12:.2f}",
            _number(hours[phase.owner]),
        )
        for phase in plan.phases
    ]
    if search := plan.params.search:
        owner = f"search of {searched_phase(search)}: {search.trials} x {search.folds} trainings"
        rows.append((owner, *("",) * 5, _number(hours[SEARCH])))
    return text_table(("training", "rows", "steps", "tokens a row", "longest", "TFLOP a batch", "hours"), rows)


def _sum_known(values: Sequence[float | None]) -> float | None:
    return None if any(value is None for value in values) else sum(value for value in values if value is not None)


def _number(value: float | None) -> str:
    if value is None:
        return "unknown"
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, each as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join(lines)


def write_table(path: Path, rows: Sequence[Sequence[str]], gpu: str, notes: Sequence[str] = ()) -> None:
    """Write the table of all recipes as Markdown, and `notes` below it."""
    lines = [f"| {' | '.join(row)} |" for row in (COLUMNS, ["---"] + ["--:"] * (len(COLUMNS) - 1), *rows)]
    parts = [HEADING.format(gpu=gpu, share=UTILISATION) + "\n".join(lines), *notes]
    with atomic_write(path) as scratch:
        scratch.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
