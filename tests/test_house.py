"""Rules of the house that no linter knows: nothing unpickles, and what is public can be read in one sitting."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "tozan"
FILES = sorted(SOURCE.rglob("*.py"))

# Modules that read or write pickle or other code-bearing formats, whatever is called in them.
BANNED_MODULES = {
    *("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "pandas"),
    *("torch.package", "torch.distributed.checkpoint", "multiprocessing.managers"),
}
# Calls that unpickle or run text: by the name of the function and of what it belongs to.
BANNED_CALLS = {
    *("eval", "exec", "torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "yaml.load", "yaml.unsafe_load"),
    *("dist.broadcast_object_list", "dist.all_gather_object", "dist.gather_object", "dist.scatter_object_list"),
    *("dist.send_object_list", "dist.recv_object_list"),
}
OBJECT_COLLECTIVES = {name.partition(".")[2] for name in BANNED_CALLS if name.startswith("dist.")}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def offences(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of everything in a file that could load or store objects as code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if banned_module(alias.name))
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name) for name in names if banned_module(name) or name in BANNED_CALLS)
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name in BANNED_CALLS or name.rpartition(".")[2] in OBJECT_COLLECTIVES:
                yield node.lineno, name
            yield from ((node.lineno, f"{name}(allow_pickle)") for word in node.keywords if pickles(word))


def banned_module(name: str) -> bool:
    parts = name.split(".")
    return any(".".join(parts[:length]) in BANNED_MODULES for length in range(1, len(parts) + 1))


def pickles(word: ast.keyword) -> bool:
    """`allow_pickle=` anything but False, and `weights_only=` anything but True."""
    safe = {"allow_pickle": False, "weights_only": True}
    if word.arg not in safe:
        return False
    return not (isinstance(word.value, ast.Constant) and word.value.value is safe[word.arg])


def test_no_pickle_anywhere() -> None:
    found = [
        f"{path.relative_to(SOURCE)}:{line}: {what}"
        for path in FILES
        for line, what in offences(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "from torch import load",
        "import torch.package",
        "def f():\n    import marshal",
        "torch.load('x')",
        "torch.save({}, 'x')",
        "np.load('x', allow_pickle=True)",
        "np.load('x', allow_pickle=flag)",
        "yaml.load(x)",
        "eval('1')",
        "exec('1')",
        "import torch.distributed as d\nd.all_gather_object(a, b)",
        "from torch.distributed import checkpoint",
    ],
)
def test_the_scan_sees(text: str) -> None:
    assert list(offences(ast.parse(text)))


@pytest.mark.parametrize(
    "text", ["model.eval()", "np.load('x')", "np.load('x', allow_pickle=False)", "json.load(f)", "yaml.safe_load(f)"]
)
def test_the_scan_spares(text: str) -> None:
    assert not list(offences(ast.parse(text)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_files_and_functions_are_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") < 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node, clean=False) or ""
            assert (node.end_lineno or 0) - node.lineno - docstring.count("\n") < 60, node.name
