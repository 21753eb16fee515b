"""The corpus that is always there: the documentation, docstrings and source of the running Python's library."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from tozan.data.document import Document

LICENCE = "PSF-2.0"
_SKIPPED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "ensurepip",
    "idle_test",
    "site-packages",
    "test",
    "tests",
    # Tables of code points, which read like no other Python.
    "encodings",
    # The topics become documents of their own.
    "pydoc_data",
    # Frozen test modules and demos with a style of their own.
    "__phello__",
    "turtledemo",
}
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def standard_library(limit: int | None = None) -> Iterator[Document]:
    """The text that comes with every Python: language topics, module pages, and source, in an order that never changes.

    Three kinds of documents: the topics of `help()` (the language reference), one page per module made of its
    docstrings, and the modules' source. Pages and source of one module share a group, so both fall in the same split.
    Test folders are left out.

    Args:
        limit: stop before the text is longer than this many characters; default: all, about 15 million.

    Yields:
        Documents under the licence PSF-2.0.
    """
    source = f"Python {sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro} standard library"
    length = 0
    for name, text, group in _texts():
        length += len(text)
        if limit is not None and length > limit:
            return
        yield Document(name, text, source, LICENCE, group)


def _texts() -> Iterator[tuple[str, str, str]]:
    """Name, text and group of each document."""
    yield from _topics()
    yield from _compiled()
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if _SKIPPED_FOLDERS.intersection(inside.parts[:-1]) or path.name.startswith(("_sysconfigdata", "__phello__")):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
            tree = ast.parse(text)
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue  # files that are meant to be broken, such as lib2to3's samples
        name = inside.as_posix()
        if page := _page(name, tree):
            yield f"{name} (documentation)", page, name
        yield name, text, name


def _topics() -> Iterator[tuple[str, str, str]]:
    """The language reference as `help()` shows it."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions leave it out
        return
    for name in sorted(topics):
        yield f"topics/{name}", topics[name], f"topics/{name}"


def _page(name: str, tree: ast.Module) -> str:
    """A module's docstrings under the signatures they belong to, or nothing if it has none."""
    parts = [f"{name}\n{'=' * len(name)}\n"]
    if doc := ast.get_docstring(tree):
        parts.append(doc + "\n")
    parts += _definitions(tree, "")
    return "\n".join(parts) if len(parts) > 1 else ""


def _definitions(node: ast.Module | ast.ClassDef, indent: str) -> Iterator[str]:
    for child in node.body:
        if not isinstance(child, _Definition) or not (doc := ast.get_docstring(child)):
            continue
        if isinstance(child, ast.ClassDef):
            bases = ", ".join(map(ast.unparse, child.bases))
            signature = f"class {child.name}({bases}):" if bases else f"class {child.name}:"
        else:
            signature = f"def {child.name}({ast.unparse(child.args)}):"
        yield f"{indent}{signature}\n" + _indented(doc, indent + "    ") + "\n"
        if isinstance(child, ast.ClassDef):
            yield from _definitions(child, indent + "    ")


def _indented(text: str, indent: str) -> str:
    return "\n".join(indent + line if line.strip() else "" for line in text.splitlines())


def _compiled() -> Iterator[tuple[str, str, str]]:
    """Pages of the modules written in C, whose docstrings stand in no source file."""
    folder = Path(sysconfig.get_path("stdlib")) / "lib-dynload"
    names = set(sys.builtin_module_names) | {path.name.split(".")[0] for path in folder.glob("*.so")}
    for name in sorted(names):
        if "test" in name or name.startswith("xx") or name == "__main__":
            continue
        try:
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
                module = importlib.import_module(name)
        except ImportError:  # needs a library that this machine has not got
            continue
        if page := _live_page(module):
            yield f"{name} (documentation)", page, name


def _live_page(module: ModuleType) -> str:
    """Docstrings of an imported module: its own, its functions', its classes' and their methods'."""
    parts = [f"{module.__name__}\n{'=' * len(module.__name__)}\n"]
    if doc := inspect.getdoc(module):
        parts.append(doc + "\n")
    for name, value in sorted(vars(module).items()):
        if name.startswith("__") or not (inspect.isbuiltin(value) or inspect.isclass(value)):
            continue
        if inspect.isclass(value) and value.__module__ not in (module.__name__, "builtins"):
            continue
        parts += _entry(name, value, "")
        if inspect.isclass(value):
            for method, attribute in sorted(vars(value).items()):
                if not method.startswith("_"):
                    parts += _entry(method, attribute, "    ")
    return "\n".join(parts) if len(parts) > 1 else ""


def _entry(name: str, value: object, indent: str) -> Iterator[str]:
    doc = getattr(value, "__doc__", None)
    if not isinstance(doc, str) or not doc.strip():
        return
    signature = re.sub(r"\$\w+(, )?", "", getattr(value, "__text_signature__", None) or "(...)")
    head = f"class {name}:" if inspect.isclass(value) else f"def {name}{signature}:"
    yield f"{indent}{head}\n" + _indented(inspect.cleandoc(doc), indent + "    ") + "\n"
