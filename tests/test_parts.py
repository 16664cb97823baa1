"""A folder of Parquet files labelled part by part: each is written once and whole, here and by workers of Ray."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

import loopback
import test_api_endpoints as served
import tiny
from distillery.cli import main
from distillery.config.load import validate_section
from distillery.config.schema import Params
from distillery.errors import UserError
from distillery.files import file_digest
from distillery.teachers.parts import INPUT_DIGEST, PartsLabelling, gpu_share, label_here, label_with_ray
from report_project import experiment

TEXTS = served.TEXTS[:12]
ROWS = {"a": 12, "b": 8, "c": 0}


@pytest.fixture
def root(tmp_path) -> Path:
    """Three parts, the last one empty."""
    (tmp_path / "tasks").symlink_to(tiny.ROOT / "tasks")
    (tmp_path / "in").mkdir()
    pd.DataFrame({"id": range(12), "text": TEXTS, "note": "kept"}).to_parquet(tmp_path / "in/a.parquet")
    pd.DataFrame({"text": TEXTS[:8]}).to_parquet(tmp_path / "in/b.parquet")
    pd.DataFrame({"text": pd.Series([], dtype=str)}).to_parquet(tmp_path / "in/c.parquet")
    return tmp_path


def labelling(root: Path, teacher: str = "far", url: str = served.NOWHERE, **changes: Any) -> PartsLabelling:
    far = {"kind": "api", "api": {"model": "m", "endpoints": [{"base_url": url}], "max_attempts": 1}}
    tree = experiment(teachers={"big": {"kind": "lm", "model": "large", "prompt": "plain"}, "far": far | changes})
    tree["data"]["demo"]["task"] = "finance-sentiment"
    tree["models"]["large"]["folder"] = str(root / "models/tiny-llama")
    params = validate_section(Params, tree, "params.yaml")
    return PartsLabelling(root, params, teacher, root / "in", root / "out")


def predictions(root: Path) -> list[str]:
    return pd.read_parquet(root / "out/a.parquet")["prediction"].tolist()


def test_each_part_is_labelled_once_and_keeps_its_columns(root):
    with loopback.Proxy(served.Answers()) as proxy:
        request = labelling(root, url=proxy.url)
        assert [(part.stem, rows) for part, rows in label_here(request)] == list(ROWS.items())
        calls = len(proxy.requests)
        assert calls == 12 and list(label_here(request)) == []
    a = pd.read_parquet(root / "out/a.parquet")
    assert list(a.columns) == ["id", "text", "note", "prediction", "probabilities"]
    assert a["prediction"].tolist() == [served.TASK.names[i] for i in served.EXPECTED[:12]]
    assert np.argmax(np.stack(a["probabilities"]), -1).tolist() == served.EXPECTED[:12]
    assert len(pd.read_parquet(root / "out/c.parquet")) == 0
    assert sorted(path.name for path in (root / "out").iterdir()) == [*(f"{k}.parquet" for k in ROWS), "labelling.json"]


def test_the_command_prints_a_line_for_each_part_or_that_none_is_missing(root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    (root / "dvc.yaml").touch()
    with loopback.Proxy(served.Answers()) as proxy:
        with (root / "params.yaml").open("w", encoding="utf-8") as file:
            YAML().dump(labelling(root, url=proxy.url).params.model_dump(exclude_defaults=True), file)
        for expected in (
            ["a.parquet: 12 rows", "b.parquet: 8 rows", "c.parquet: 0 rows"],
            ["out: every part of in is"],
        ):
            main(["label", "far", "in", "out"])
            printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("far: ")]
            assert all(map(str.startswith, printed, expected)) and len(printed) == len(expected)


def test_a_run_that_stops_continues_with_the_missing_parts_and_writes_no_half_one(root):
    with loopback.Proxy(served.Answers()) as proxy:
        request = labelling(root, url=proxy.url)
        run = label_here(request)
        next(run)
        run.close()
        before = (root / "out/a.parquet").stat().st_mtime_ns
        pd.DataFrame({"text": served.TEXTS[30:31]}).to_parquet(root / "in/b.parquet")  # its answer is not kept
        with pytest.raises(UserError, match="no answer from"):
            list(label_here(labelling(root)))
        assert sorted(path.name for path in (root / "out").iterdir()) == ["a.parquet", "labelling.json"]
        pd.DataFrame({"text": TEXTS[:8]}).to_parquet(root / "in/b.parquet")
        assert [part.stem for part, _ in label_here(request)] == ["b", "c"]
        assert (root / "out/a.parquet").stat().st_mtime_ns == before


def test_labels_of_other_rows_or_of_another_teacher_are_not_mixed(root):
    with loopback.Proxy(served.Answers()) as proxy:
        list(label_here(labelling(root, url=proxy.url)))
        other = labelling(root, url=proxy.url, few_shot=2)
        with pytest.raises(UserError, match="out: holds labels of another teacher, or of other settings; name another"):
            list(label_here(other))
        pd.DataFrame({"text": TEXTS[2:4]}).to_parquet(root / "in/b.parquet")
        with pytest.raises(UserError, match=r"out/b.parquet: labels other rows than .*in/b.parquet now holds; delete"):
            list(label_here(labelling(root, url=proxy.url)))


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ({"sentence": ["x"]}, "d.parquet: has no column `text`; it has: sentence"),
        (
            {"text": ["x"], "prediction": ["up"]},
            "d.parquet: has a column `prediction` already, which the label goes to",
        ),
        ({"text": ["x", None]}, "d.parquet: row 1 (from 0) has no text"),
        ({"text": [1, 2]}, "d.parquet: column `text` is of type int64; it has to be text"),
        (None, "d.parquet: cannot be read as Parquet: "),
    ],
)
def test_a_part_that_cannot_be_labelled_is_named_before_the_first_call(root, columns, line):
    if columns:
        pd.DataFrame(columns).to_parquet(root / "in/d.parquet")
    else:
        (root / "in/d.parquet").write_text("no table")
    with pytest.raises(UserError) as raised:
        list(label_here(labelling(root)))
    assert line in str(raised.value) and not (root / "out").exists()


def test_a_target_that_cannot_be_read_ends_in_one_line(root):
    (root / "out").write_text("a file")
    with pytest.raises(UserError, match="out: is no folder; name another one"):
        list(label_here(labelling(root)))
    (root / "out").unlink()
    (root / "out").mkdir()
    (root / "out/a.parquet").write_text("no table")
    with pytest.raises(UserError, match="out/a.parquet: cannot be read as Parquet: "):
        list(label_here(labelling(root)))
    (root / "out/labelling.json").write_text("{")
    with pytest.raises(UserError, match="out/labelling.json: is damaged; name another folder"):
        list(label_here(labelling(root)))


def test_what_decides_the_labels_of_a_folder(root):
    """The servers of a model do not, and the vendor's own is none of them; gold rows in the prompt do, as do the files
    of a local model."""
    tiny.build_models(root / "models")
    train = root / "data/processed/demo/train.parquet"
    train.parent.mkdir(parents=True)

    def settings(teacher: str = "far", **changes: Any) -> Any:
        return labelling(root, teacher, **changes)._settings()

    assert settings() == settings(url="http://other/v1") != settings(api={"model": "m"})
    seen = []
    for change in ("one", "another"):
        pd.DataFrame({"text": [change]}).to_parquet(train)
        (root / "models/tiny-llama/config.json").write_text(change)
        seen.append((settings(few_shot=2), settings(few_shot=2, examples_from="gold"), settings("big")))
    assert [old == new for old, new in zip(*seen, strict=True)] == [True, False, False]


def test_a_request_that_cannot_be_met_ends_in_one_line(root):
    with pytest.raises(UserError, match="ray: an endpoint takes `concurrency` and `endpoints` in params.yaml: leave"):
        list(label_with_ray(labelling(root), 2))
    with pytest.raises(UserError, match="teacher: `nobody` is not in params.yaml; there are: big, far"):
        list(label_here(labelling(root, "nobody")))
    for part in (root / "in").iterdir():
        part.unlink()
    with pytest.raises(UserError, match="in: holds no .parquet file"):
        list(label_here(labelling(root)))


@pytest.mark.parametrize(("gpus", "workers", "share"), [(0, 4, 0), (8, 4, 1), (4, 4, 1), (2, 4, 1 / 2), (3, 4, 1 / 2)])
def test_workers_of_ray_take_all_gpus_and_fit_on_them(gpus, workers, share):
    assert gpu_share(gpus, workers) == share
    assert not share or gpus * int(1 / share) >= workers


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra [scale], which has Ray")
def test_workers_of_ray_label_as_this_process_does(root, monkeypatch):
    import ray

    tiny.build_models(root / "models")
    request = labelling(root, "big")
    expected = {part.stem: rows for part, rows in label_here(request)}
    here = {name: pd.read_parquet(root / f"out/{name}.parquet") for name in ROWS}
    (root / "out/a.parquet").unlink()
    (root / "out/b.parquet").unlink()
    kept = (root / "out/c.parquet").stat().st_mtime_ns
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    try:
        assert {part.stem: rows for part, rows in label_with_ray(request, 2)} == {k: expected[k] for k in "ab"}
        assert list(label_with_ray(request, 2)) == []
        for name, frame in here.items():
            pd.testing.assert_frame_equal(pd.read_parquet(root / f"out/{name}.parquet"), frame)
            digest = pq.read_schema(root / f"out/{name}.parquet").metadata[INPUT_DIGEST].decode()
            assert digest == file_digest(root / f"in/{name}.parquet")
        assert (root / "out/c.parquet").stat().st_mtime_ns == kept
        (root / "out/b.parquet").unlink()
        (root / "out/labelling.json").unlink()  # it has the digest of the model
        for file in (root / "models/tiny-llama").iterdir():
            file.unlink()
        with pytest.raises(UserError, match="tiny-llama holds no config.json"):  # one line, from a worker
            list(label_with_ray(request, 2))
    finally:
        ray.shutdown()
