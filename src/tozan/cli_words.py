"""What all verbs of the command line share: the type of a path, and how examples stand in a help text."""

from __future__ import annotations

from pathlib import Path

import click

FOLDER = click.Path(path_type=Path)


def examples(*lines: str) -> str:
    """The end of a verb's help: lines that may be typed as they stand."""
    # A line of its own with a backspace character keeps click from re-filling the paragraph.
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
