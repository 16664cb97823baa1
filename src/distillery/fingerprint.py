"""Fingerprints of code: what a module computes, whatever its comments, docstrings and layout say.

Pipeline stages and the keys of kept results depend on fingerprints, not on files. So an edit that changes no result
makes nothing run again. A fingerprint is the module's syntax tree without comments, docstrings and the annotations of
functions, written out as text again. Annotations in a class body stay: pydantic and dataclasses act on them.

A new Python version may write a tree out in another way; fingerprints then change once.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
NAME = PACKAGE.name


class _WithoutProse(ast.NodeTransformer):
    """Removes what decides no result: docstrings, and the annotations of arguments, returns and local variables."""

    def __init__(self) -> None:
        self.scopes: list[type] = []  # of the node at hand, the innermost last

    def _scope(self, node: ast.AST) -> ast.AST:
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            node.body = node.body[1:] or [ast.Pass()]
        self.scopes.append(type(node))
        self.generic_visit(node)
        self.scopes.pop()
        return node

    visit_Module = visit_ClassDef = _scope

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self._scope(node)

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

    Raises SyntaxError when `source` is no Python.
    """
    tree = _WithoutProse().visit(ast.parse(source))
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def _path(module: str, package: Path) -> Path | None:
    """The file of `module` (a dotted name below `package`), or None when there is no such module."""
    base = package.joinpath(*module.split(".")[1:])
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file() and path != package / "__init__.py":
            return path
    return None


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imported(source: str, package: Path = PACKAGE) -> set[str]:
    """The modules of `package` that `source` imports anywhere in it, as dotted names; also the packages they lie in.

    Imports for type checkers alone do not count. The top-level `__init__` is left out: no result hangs on it.
    """
    named: set[str] = set()
    todo = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if _type_checking(node):
            continue
        todo += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            named |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    parents = {".".join(parts[:i]) for name in named for parts in [name.split(".")] for i in range(2, len(parts) + 1)}
    return {name for name in parents if name.split(".")[0] == package.name and _path(name, package)}


def closure(modules: Iterable[str], package: Path = PACKAGE, without: Iterable[str] = ()) -> list[str]:
    """`modules` and all that they import, directly or not, sorted.

    without: modules and packages to leave out, with what only they import.
    """
    todo, done, barred = set(modules), set(), tuple(without)
    while todo := todo - done:
        module = todo.pop()
        if module in barred or module.startswith(tuple(f"{package}." for package in barred)):
            continue
        done.add(module)
        path = _path(module, package)
        todo |= imported(path.read_text(encoding="utf-8"), package) if path else set()
    return sorted(done)


@cache
def digest(module: str, package: Path = PACKAGE) -> str:
    """sha256 of the normalized source of `module`. Raises ValueError when there is no such module."""
    path = _path(module, package)
    if path is None:
        raise ValueError(f"no module {module} in {package}")
    return hashlib.sha256(normalized(path.read_text(encoding="utf-8")).encode()).hexdigest()


@cache
def code_digest(*names: str) -> str:
    """One sha256 for the code of the modules `names` (below the package, `losses`), for the key of a kept result.

    The name of a package stands for all modules in it.
    """
    lines = []
    for name in names:
        folder = PACKAGE.joinpath(*name.split("."))
        files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
        for file in files:
            text = normalized(file.read_text(encoding="utf-8"))
            lines.append(f"{file.relative_to(PACKAGE).as_posix()} {hashlib.sha256(text.encode()).hexdigest()}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
