"""tozan: trains large language models on CPU supercomputers, clusters and any machine PyTorch runs on.

What the command line does can be done from Python, in a few lines:

    import tozan

    tozan.build_data("texts/", "data/mine")
    tozan.train_model("run.toml", {"optim.lr": 1e-3})
    print("".join(tozan.generate("runs/first", "Once")))

Importing tozan is instant: these names load what they need when they are first used (PEP 562). `train` and `data` are
packages, so the functions have names of their own.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tozan.api import (
        build_data,
        convert,
        evaluate,
        figures,
        generate,
        load_config,
        open_model,
        train_model,
        write_report,
    )
    from tozan.errors import Problem, UserError

__version__ = "0.1.0"

# A lost peer is one line of ours; torch's C++ side, which reads this when it is loaded, adds a stack for every call.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

__all__ = [
    "Problem",
    "UserError",
    "__version__",
    "build_data",
    "convert",
    "evaluate",
    "figures",
    "generate",
    "load_config",
    "open_model",
    "train_model",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "tozan.errors" if name in ("Problem", "UserError") else "tozan.api"
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
