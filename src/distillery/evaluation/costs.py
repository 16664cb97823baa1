"""What predictions cost, from measured speed and tokens and from prices in `params.yaml`."""

from __future__ import annotations

from distillery.config.schema import Params
from distillery.evaluation.results import ModelResult

PRICED_ROWS = 1000  # that a price is for


def dollars_per_1000_rows(params: Params, result: ModelResult, rows_per_second: float | None) -> float | None:
    """US dollars for the predictions of 1,000 rows; None where a price or a measure is missing.

    Of a teacher behind an endpoint: the price of the mean tokens that a row took. Of a model that ran here: its share
    of an hour of the machine, which does nothing else and is never idle.
    """
    teacher = params.teachers.get(result.key) if result.role == "teacher" else None
    if teacher is not None and teacher.kind == "api":
        price, tokens = teacher.api.price, result.tokens_per_row
        if price is None or tokens is None:
            return None
        return PRICED_ROWS * (tokens["input"] * price.input + tokens["output"] * price.output) / 1e6
    hourly = params.evaluate.machine_price_per_hour
    if hourly is None or not rows_per_second:
        return None
    return PRICED_ROWS / rows_per_second / 3600 * hourly
