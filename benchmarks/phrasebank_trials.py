"""Which settings of the PhraseBank study help its distilled student, on validation rows alone?

    PYTHONPATH=src python benchmarks/phrasebank_trials.py FOLDER ["NAME OF A TRIAL" ...] [--test]

FOLDER holds PhraseBank's files as studies/phrasebank/README.md has them. Trains the student minilm-l6-kd of seed 0 once
for each overlay in studies/phrasebank/trials.yaml, or for those that are named. Prints accuracy and macro-F1 on the
validation rows of 50-agree, and on the unanimous ones; with --test on the test rows, for a trial that these chose.
Finished models are kept in `.cache/phrasebank/`, so that a killed run goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from distillery.config.load import validate_section
from distillery.errors import UserError
from distillery.files import read_yaml, repository_root
from distillery.pipeline.recipe import merge_overlay

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `studies`

from studies.phrasebank.data import read_phrasebank, study_rows
from studies.phrasebank.settings import StudySettings
from studies.phrasebank.study import CACHE, fit_teachers, split_rows, subset_scores, train_student
from studies.phrasebank.training import stack_probabilities

STUDENT = "minilm-l6-kd"


def main(data: Path, *names: str, split: str = "validation") -> None:
    """Train the student of each overlay and print its scores on `split`.

    Raises UserError for a name that is no trial.
    """
    study = repository_root() / "studies/phrasebank"
    overlays = read_yaml(study / "trials.yaml")
    if unknown := set(names) - set(overlays):
        raise UserError(
            f"trials.yaml: no trial `{min(unknown)}`; there are: {', '.join(f'`{name}`' for name in overlays)}"
        )
    base, phrasebank = read_yaml(study / "params.yaml"), read_phrasebank(data)
    lines = []
    for name in names or overlays:
        overlay = overlays[name]
        settings = validate_section(StudySettings, merge_overlay(base, overlay), f"trials.yaml: {name}")
        rows = study_rows(phrasebank, [], settings, 0)
        teachers = fit_teachers(STUDENT, settings, rows, 0, CACHE)
        predictions, cost = train_student(STUDENT, settings, rows, teachers, 0, CACHE)
        p = stack_probabilities(predictions, split)
        both = subset_scores(split_rows(rows)[split], p)
        scores = "   ".join(f"{scores['accuracy']:.4f} / {scores['macro_f1']:.4f}" for scores in both)
        minutes = "unknown" if cost.minutes is None else f"{cost.minutes:.1f}"
        lines.append(f"{name:60}   {scores}   {minutes:>7}")
    print(f"{f'accuracy / macro-F1 on {split} rows of seed 0':60}   50-agree          all-agree         minutes")
    print("\n".join(lines))


if __name__ == "__main__":
    try:
        names = [name for name in sys.argv[2:] if name != "--test"]
        main(Path(sys.argv[1]), *names, split="test" if "--test" in sys.argv else "validation")
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
