"""Print what becomes of the files that people have: the rows that are read, or the line that is printed.

    PYTHONPATH=src python benchmarks/files_read.py

The files are those of tests/field_files.py, most of them written by the tools that people use.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from distillery.files import repository_root

sys.path.insert(0, str(repository_root() / "tests"))

from field_files import FILES, HEADER, listing


def main() -> None:
    print(HEADER)
    for group, files in FILES.items():
        for file in files:
            with tempfile.TemporaryDirectory() as folder:
                file.write(Path(folder))
                print(listing(group, file, file.outcome(Path(folder))))


if __name__ == "__main__":
    main()
