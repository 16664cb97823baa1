"""Predictions whose rows several processes share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pandas as pd

from distillery.models.label_model import LabelModel
from distillery.models.predictions import predict_rows, predict_splits
from distillery.training.processes import gather, process_count, process_rank
from distillery.training.sharding import choose_methods, predict_in_step, whole_weights

Value = TypeVar("Value")


def predict_together(
    model: LabelModel,
    splits: dict[str, pd.DataFrame],
    predict: Callable[[LabelModel, pd.DataFrame], pd.DataFrame] = predict_rows,
) -> pd.DataFrame:
    """:func:`predict_splits` with the rows shared over the processes. All of them return the same table.

    predict: computes the predictions of rows.
    """
    if process_count() == 1:
        return predict_splits(model, splits, predict)
    return predict_splits(model, splits, lambda model, rows: _predict_share(model, rows, predict))


def _predict_share(
    model: LabelModel, rows: pd.DataFrame, predict: Callable[[LabelModel, pd.DataFrame], pd.DataFrame]
) -> pd.DataFrame:
    """`predict(model, rows)`, each process a share of `rows`."""
    if model.sharded is not None:
        choose_methods(model, model.encode(rows["text"].tolist()))
    if len(rows) < process_count():
        return predict_alike(model, lambda: predict(model, rows))
    shares = [range(rank, len(rows), process_count()) for rank in range(process_count())]
    share = list(shares[process_rank()])
    # of a sharded model every process has as many rows, whose batches then are as many
    missing = len(shares[0]) - len(share) if model.sharded is not None else 0
    given = rows.iloc[share + share[-1:] * missing].reset_index(drop=True)
    own = predict_alike(model, lambda: predict(model, given))
    parts = [part[: len(share)].set_axis(share) for part, share in zip(gather(own), shares, strict=True)]
    return pd.concat(parts).sort_index().reset_index(drop=True)


def predict_alike(model: LabelModel, predict: Callable[[], Value]) -> Value:
    """What `predict` returns, which all processes call for as many rows: of a sharded model they gather its weights."""
    if model.task.kind != "qa":
        return predict_in_step(model, predict)
    with whole_weights(model):  # answers differ in their lengths
        return predict()
