"""Documents out of docstrings: real English text wherever Python is installed. Standard library only.

The files of the standard library and of the installed packages are parsed; nothing is imported.
"""

from __future__ import annotations

import ast
import hashlib
import os
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from distlm.data.lines import nearest, unreadable
from distlm.errors import Problem

_TEST_FOLDERS = {"test", "tests", "idle_test"}  # their docstrings say little, and fixtures are full of broken files
_MIN_WORDS = 10


def _import_roots() -> list[str]:
    return list(dict.fromkeys(sysconfig.get_paths()[key] for key in ("stdlib", "purelib", "platlib")))


def missing_packages(packages: list[str] | None) -> list[Problem]:
    """Named packages that are not installed. Looks at the import system's roots only."""
    installed = {path.name.removesuffix(".py") for root in _import_roots() for path in Path(root).glob("*")}
    return [
        Problem(
            f"no such package is installed; give the name that `import` takes{nearest(name, installed)}", value=name
        )
        for name in sorted(set(packages or ()) - installed)
    ]


def find_modules(packages: list[str] | None) -> list[Path]:
    """The Python files below the roots of the import system, ordered by a hash of their names, so that the first few
    are of many packages. The names alone decide, not where Python is installed."""
    wanted = set(packages) if packages is not None else None
    modules: dict[str, Path] = {}
    for root in _import_roots():
        for folder, subfolders, names in os.walk(root):
            if folder == root and wanted is not None:
                subfolders[:] = [name for name in subfolders if name in wanted]
                names = [name for name in names if name.removesuffix(".py") in wanted]
            subfolders[:] = [
                name
                for name in subfolders
                if name not in _TEST_FOLDERS and name not in ("site-packages", "__pycache__")
            ]
            for name in names:
                path = Path(folder, name)
                if name.endswith(".py") and path.is_file():  # editors leave dangling links
                    modules.setdefault(path.relative_to(root).as_posix(), path)
    return [modules[name] for name in sorted(modules, key=_hash)]


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "ignore"), digest_size=16).digest()


def package_of(module: Path) -> str:
    """The top-level package (or module) that a file of `find_modules` belongs to, as `import` takes it."""
    # One root may lie below another one, as site-packages does.
    root = max((root for root in _import_roots() if module.is_relative_to(root)), key=len)
    return module.relative_to(root).parts[0].removesuffix(".py")


def module_docs(paths: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """(file, document) for each module that has docstrings: those of the module, its classes and its functions, of ten
    words or more, joined by blank lines. A docstring that came before is left out."""
    seen: set[bytes] = set()
    for path in paths:
        new = []
        for docstring in _docstrings(path):
            digest = _hash(docstring)
            if digest not in seen:
                seen.add(digest)
                new.append(docstring)
        if new:
            yield path, "\n\n".join(new)


def _docstrings(path: Path) -> Iterator[str]:
    try:
        code = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    if b'"""' not in code and b"'''" not in code:
        return  # saves the time of parsing; a docstring of ten words in single quotes is rare
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escape sequences
            tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError):
        return  # templates and code for other versions of Python
    for node in _statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)  # as inspect.cleandoc leaves it
            if docstring and len(docstring.split()) >= _MIN_WORDS:
                yield docstring.encode("utf-8", "ignore").decode()


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """The tree and all statements below it, in the order of the file; expressions are not visited."""
    stack = [tree]
    while stack:
        node = stack.pop()
        yield node
        for block in ("finalbody", "orelse", "handlers", "body"):
            statements = getattr(node, block, None)
            if isinstance(statements, list):
                stack.extend(reversed(statements))
