"""What a kept benchmark output may say of the machine that printed it."""

import subprocess

import pytest

import tiny


@pytest.fixture
def keep():
    return tiny.load_benchmark("keep")


@pytest.mark.parametrize(
    ("printed", "kept"),
    [
        ("searched /home/me/some-run/out, 0 keys", "searched FOLDER/out, 0 keys"),
        ("--data /srv/data/fpb", "--data FOLDER/fpb"),
        ("17.0 rows/s and tokens/s", "17.0 rows/s and tokens/s"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("benchmarks/results/teach.txt", "benchmarks/results/teach.txt"),
    ],
)
def test_folders_of_the_machine_are_left_out(keep, printed, kept):
    assert keep.shortened(printed) == kept


@pytest.mark.parametrize(("load", "remark"), [(0.1, ""), (3.0, ", beside other work")])
def test_a_busy_machine_is_named(keep, monkeypatch, load, remark):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 9.0, 9.0))
    assert keep.other_work() == remark


@pytest.mark.parametrize(
    "file",
    [
        "src/a.py",
        "studies/a/a.py",
        "studies/a/a.yaml",
        "recipes/a.yaml",
        "notebooks/a.ipynb",
        "tasks/a.yaml",
        "dvc.yaml",
    ],
)
def test_a_commit_is_marked_when_what_decides_a_result_has_changed(keep, tmp_path, file):
    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True)

    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text("1")
    git("init"), git("add", "."), git("commit", "-m", "first")
    (tmp_path / "notes.md").write_text("decides nothing")
    assert not keep.commit(tmp_path).endswith("+")
    (tmp_path / file).write_text("2")
    assert keep.commit(tmp_path).endswith("+")


def test_the_progress_of_training_is_no_part_of_a_table(keep):
    printed = "model  seconds\ntraining: step 10/21, loss 0.5848\nstudent 0.4\na step 3 of 4 is no such line\n"
    assert keep.without_progress(printed) == "model  seconds\nstudent 0.4\na step 3 of 4 is no such line\n"
