"""``python -m distillery <verb>``: see :mod:`distillery.cli`."""

from distillery.cli import main

main()
