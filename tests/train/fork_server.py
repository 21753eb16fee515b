"""Runs `tozan` verbs in forked children, so that a killed attempt costs no imports.

Reads a JSON list of words per line, answers with the child's process id, and when it has ended with its wait status.
"""

from __future__ import annotations

import json
import os
import sys

import tozan.report.live  # noqa: F401
from tozan import cli
from tozan.train import machine

machine.measure_gemm_rate = lambda *_: 1e12  # nobody looks at MFU, and to measure takes 0.3 s of each attempt


def child(words: list[str]) -> None:
    """Be `tozan WORDS`, silently."""
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1):
            os.dup2(quiet, descriptor)
        code = cli.main(words)
    finally:
        os._exit(code)


for line in sys.stdin:
    process = os.fork()
    if process == 0:
        child(json.loads(line))
    print(process, flush=True)
    print(os.waitpid(process, 0)[1], flush=True)
