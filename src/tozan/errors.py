"""The one way tozan tells a user about her mistake: what, where, which rule, and what to write instead."""

from __future__ import annotations

import sys
from dataclasses import dataclass

EXIT_AGAIN = 75
"""Exit status of a run that was asked to stop and has saved its state: started again, it continues (EX_TEMPFAIL)."""

EXIT_LOST = 14
"""Exit status of a rank that ends because another is lost or hangs."""


@dataclass(frozen=True)
class Problem:
    """One mistake, said so that it can be mended without reading the source."""

    where: str
    """Where the value came from: `run.toml:12`, `--optim.lr`, `shard-00003.tar:doc-17 @ 8192`."""
    what: str
    """The value as it was written, and the rule it breaks with that rule's numbers."""
    fix: str = ""
    """What to write instead."""

    def __str__(self) -> str:
        fix = f"\n    → {self.fix}" if self.fix else ""
        return f"{self.where}: {self.what}{fix}"


class UserError(Exception):
    """Mistakes that the user can mend; the command line prints them without a traceback and exits with 2.

    Attributes:
        problems: every mistake found, not only the first.
    """

    def __init__(self, *problems: Problem) -> None:
        if not problems:
            raise ValueError("a UserError needs at least one Problem")
        self.problems = list(problems)
        super().__init__("\n".join(map(str, problems)))


def say(text: str) -> None:
    """Print a line on standard error in one piece, so that lines of processes that share a terminal do not mix."""
    sys.stderr.write(f"tozan: {text}\n")
    sys.stderr.flush()
