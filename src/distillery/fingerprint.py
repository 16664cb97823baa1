"""Fingerprints of code: of what a module computes, not of its comments, docstrings and layout.

Pipeline stages and the keys of cached results depend on fingerprints, not on files. So an edit that changes no result
makes nothing run again. A fingerprint is the module's syntax tree without comments, docstrings and the annotations of
functions, written as text again. Annotations in a class body stay: pydantic and dataclasses act on them.

A new Python version may write a tree in another way; fingerprints then change once.

Parsing the package takes a second, so :func:`remembered` keeps the result for every text in a file between two runs.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from distillery.files import write_json

PACKAGE = Path(__file__).resolve().parent


class _WithoutProse(ast.NodeTransformer):
    """Removes docstrings, and the annotations of arguments, returns and local variables: no result depends on them."""

    def __init__(self) -> None:
        self.scopes: list[type] = []  # around the visited node, the innermost last

    def _visit_scope(self, node: ast.AST) -> ast.AST:
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            node.body = node.body[1:] or [ast.Pass()]
        self.scopes.append(type(node))
        self.generic_visit(node)
        self.scopes.pop()
        return node

    visit_Module = visit_ClassDef = _visit_scope

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self._visit_scope(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        """A string below a field of a class describes it."""
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text and self.scopes[-1] is ast.ClassDef else self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        if self.scopes[-1] in (ast.Module, ast.ClassDef) or not node.simple:
            return node
        return ast.Assign([node.target], node.value) if node.value else ast.Pass()


def normalized(source: str) -> str:
    """`source` without comments, docstrings and the annotations of functions, in one layout.

    Raises SyntaxError when `source` is not Python.
    """
    return _write_normalized(ast.parse(source))


def _write_normalized(tree: ast.Module) -> str:
    """The text of `tree`, which it changes, without what does not count."""
    return ast.unparse(ast.fix_missing_locations(_WithoutProse().visit(tree))) + "\n"


# the key of a module's text, see `_read_module` -> its fingerprint, and every dotted name that it imports
_known: dict[str, tuple[str, list[str]]] = {}


@cache
def _reader() -> bytes:
    """What else than a module's text decides what is read from it."""
    return sys.version.encode() + Path(__file__).read_bytes()


@cache
def _read_module(source: str) -> tuple[str, list[str]]:
    """The fingerprint of a module with the text `source`, and every dotted name that it imports."""
    key = hashlib.sha256(_reader() + source.encode()).hexdigest()
    if key not in _known:
        tree = ast.parse(source)
        names = _imported_names(tree)  # before docstrings go
        _known[key] = hashlib.sha256(_write_normalized(tree).encode()).hexdigest(), sorted(names)
    return _known[key]


@contextmanager
def remembered(file: Path) -> Iterator[None]:
    """Take what is known of modules from `file`, and leave there what is known after this block.

    A file that is missing or broken only costs time.
    """
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        _known.update({key: (digest, names) for key, (digest, names) in stored.items()})
    except (OSError, ValueError, TypeError, AttributeError):
        stored = {}
    yield
    if _known.keys() != stored.keys():
        write_json(file, _known)


def _module_path(module: str, package: Path) -> Path | None:
    """The file of `module` (a dotted name below `package`), or None when there is no such module."""
    base = package.joinpath(*module.split(".")[1:])
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file() and path != package / "__init__.py":
            return path
    return None


def _imported_names(tree: ast.Module) -> set[str]:
    """Every dotted name that `tree` imports anywhere in it, but for type checkers alone."""
    names: set[str] = set()
    nodes: list[ast.AST] = [tree]
    while nodes:
        node = nodes.pop()
        if _is_type_checking(node):
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported(source: str, package: Path = PACKAGE) -> set[str]:
    """The modules of `package` that `source` imports anywhere in it, as dotted names; also the packages around them.

    Imports for type checkers alone do not count. The top-level `__init__` is left out: no result depends on it.
    """
    parts = [name.split(".") for name in _read_module(source)[1]]
    modules = {".".join(names[:i]) for names in parts if names[0] == package.name for i in range(2, len(names) + 1)}
    return {name for name in modules if _module_path(name, package)}


def closure(modules: Iterable[str], package: Path = PACKAGE, without: Iterable[str] = ()) -> list[str]:
    """`modules` and all that they import, directly or not, sorted.

    without: modules and packages to leave out, with what only they import.
    """
    pending, visited, excluded = set(modules), set(), tuple(without)
    while pending := pending - visited:
        module = pending.pop()
        if module in excluded or module.startswith(tuple(f"{name}." for name in excluded)):
            continue
        visited.add(module)
        path = _module_path(module, package)
        pending |= imported(path.read_text(encoding="utf-8"), package) if path else set()
    return sorted(visited)


def _file_fingerprint(path: Path) -> str:
    """sha256 of the normalized source in the file `path`."""
    return _read_module(path.read_text(encoding="utf-8"))[0]


@cache
def digest(module: str, package: Path = PACKAGE) -> str:
    """sha256 of the normalized source of `module`. Raises ValueError when there is no such module."""
    path = _module_path(module, package)
    if path is None:
        raise ValueError(f"no module {module} in {package}")
    return _file_fingerprint(path)


@cache
def code_digest(*names: str) -> str:
    """One sha256 for the code of the modules `names` (below the package, `losses`), for the key of a cached result.

    The name of a package stands for all modules in it.
    """
    lines = []
    for name in names:
        folder = PACKAGE.joinpath(*name.split("."))
        files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
        lines += [f"{file.relative_to(PACKAGE).as_posix()} {_file_fingerprint(file)}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
