"""Imports run downward: each room uses only the rooms below it, and login nodes need no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "tozan"

# What each room may import of tozan, itself aside. `models.arithmetic` is the one description of sizes, which running,
# pricing and checking share: plain standard library, so that `config` may use it too. Every room may use `errors` and
# `amounts`.
ALLOWED = {
    "errors": set(),
    "files": set(),
    "schedules": set(),
    "layout": set(),
    "wire": set(),
    "amounts": set(),
    "cpuinfo": set(),
    "config": {"models.arithmetic", "cpuinfo"},
    "ops": {"cpuinfo"},
    "models": {"ops"},
    "comm": {"layout", "files", "wire", "cpuinfo"},
    "parallel": {"models", "ops", "comm", "schedules", "layout", "optim.gradients"},
    "optim": {"comm", "layout", "ops"},
    "data": {"files"},
    "checkpoint": {"models", "files", "layout"},
    "recovery": {"files", "config", "comm.place", "planner"},
    "planner": {"models.arithmetic", "models", "schedules", "layout", "config", "files", "wire"},
    "report": {"models.arithmetic", "planner", "config", "files", "bench.result", "schedules", "layout"},
    "train": {
        *("parallel", "checkpoint", "optim", "data", "models", "ops", "comm", "planner", "config", "layout"),
        *("schedules", "files", "recovery"),
    },
    "chaos": {"recovery", "config", "checkpoint", "data", "train", "comm"},
    "bench": {
        *("train", "parallel", "models", "ops", "optim", "data", "comm", "planner", "config", "layout", "files"),
        "cpuinfo",
    },
    "demo": {"train", "data", "report", "config", "models", "planner", "files"},
    "api": {"train", "data", "checkpoint", "models", "report", "config", "planner", "bench"},
    "cli_words": set(),
    "cli_plan": {"cli_words", "planner", "report"},
    "cli_bench": {"cli_words", "bench"},
    "cli_chaos": {"cli_words", "recovery", "chaos", "config", "comm"},
    "cli_report": {"cli_words", "api", "report"},
    "forkserver": {"cli", "chaos", "comm"},
    "cli": {
        *(
            "cli_plan",
            "cli_bench",
            "cli_chaos",
            "cli_report",
            "cli_words",
            "comm",
            "api",
            "demo",
            "train",
            "data",
            "report",
        ),
        *("config", "planner", "bench"),
    },
    "__main__": {"cli"},
    "__init__": {"api"},
}

TORCH_FREE = [
    "cli",
    "cli_chaos",
    "cli_report",
    "recovery",
    "api",
    "config",
    "planner",
    "report",
    "schedules",
    "layout",
    "wire",
    "amounts",
    "cpuinfo",
    "data",
    "models",
    "errors",
]
STANDARD_LIBRARY_AND = {"config": {"pydantic", "rich"}, "schedules": set(), "layout": set(), "errors": set()}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


@cache
def imports(path: Path) -> list[tuple[str, int]]:
    """Every module that a file imports, anywhere in it, with its line; `from tozan import x` counts as `tozan.x`."""
    found: list[tuple[str, int]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            module = str(node.module)
            whole = module == "tozan" or (SOURCE.parent / module.replace(".", "/")).is_dir()
            found += [(f"{module}.{alias.name}" if whole else module, node.lineno) for alias in node.names]
    return found


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def upward() -> Iterator[str]:
    """Imports of a room that is not below."""
    for path in files():
        room = room_of(path)
        for module, line in imports(path):
            parts = module.split(".")
            if parts[0] != "tozan" or len(parts) < 2 or parts[1] in (room, "errors", "amounts", "__version__"):
                continue
            allowed = ALLOWED[room]
            if parts[1] not in allowed and ".".join(parts[1:3]) not in allowed:
                yield f"{path.relative_to(SOURCE)}:{line}: {room} must not import {module}"


def test_every_room_has_its_place() -> None:
    assert {room_of(path) for path in files()} <= set(ALLOWED)


def test_imports_run_downward() -> None:
    assert list(upward()) == []


@pytest.mark.parametrize("room", STANDARD_LIBRARY_AND)
def test_small_rooms_use_the_standard_library(room: str) -> None:
    foreign = {
        module.partition(".")[0]
        for path in files()
        if room_of(path) == room
        for module, _ in imports(path)
        if module.partition(".")[0] not in sys.stdlib_module_names
    }
    assert foreign - {"tozan"} <= STANDARD_LIBRARY_AND[room]


def test_models_and_ops_import_torch_only() -> None:
    foreign = {
        module.partition(".")[0]
        for path in files()
        if room_of(path) in ("models", "ops")
        for module, _ in imports(path)
        if module.partition(".")[0] not in sys.stdlib_module_names
    }
    assert foreign <= {"tozan", "torch", "triton"}  # which comes with PyTorch where there are GPUs


def test_command_line_starts_light() -> None:
    """At its top, `cli.py` imports click and the standard library only."""
    tree = ast.parse((SOURCE / "cli.py").read_text(encoding="utf-8"))
    top = {
        name.partition(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)])
    }
    assert {name for name in top if name not in sys.stdlib_module_names} == {"click", "tozan"}


def test_login_node_rooms_run_without_torch() -> None:
    """Every module of the torch-free rooms imports where torch is not installed."""
    modules = [
        ".".join(("tozan", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        for path in files()
        if room_of(path) in TORCH_FREE
    ] + ["tozan.bench.result"]
    lazy = {"tozan.models.layers", "tozan.models.gpt2", "tozan.models.llama", "tozan.models.generate"}
    program = "import importlib, sys; sys.modules['torch'] = None; [importlib.import_module(m) for m in sys.argv[1:]]"
    done = subprocess.run(
        [sys.executable, "-c", program, *sorted(set(modules) - lazy)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_import_tozan_is_instant() -> None:
    program = (
        "import sys; before = set(sys.modules); import tozan\n"
        "assert not set(sys.modules) - before & {'torch', 'numpy', 'pydantic', 'click'}\n"
        "assert {name for name in sys.modules if name.startswith('tozan')} == {'tozan'}\n"
        "assert all(hasattr(tozan, name) for name in tozan.__all__)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
