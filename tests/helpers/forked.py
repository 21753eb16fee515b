"""Python programs forked from a process that has torch imported, so that starting one costs no imports.

    process = Forked([script, "2", "loop"], RANK=0, WORLD_SIZE=2)     # as `python script 2 loop` would be

Reads like a `subprocess.Popen` with pipes for text.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from ranks import fork_context


class Forked:
    """A running program.

    Args:
        words: the path of a script, and its arguments.
        variables: what its environment has beside this process's.
    """

    def __init__(self, words, **variables):
        environment = os.environ | {name: str(value) for name, value in variables.items()}
        context, self._folder = fork_context(), tempfile.TemporaryDirectory(prefix="tozan-forked-")
        self._errors = Path(self._folder.name) / "stderr"
        read, self._typed = context.Pipe(duplex=False)
        self._printed, written = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_run, args=(list(map(str, words)), environment, read, written, str(self._errors)), daemon=True
        )
        self._process.start()
        read.close()
        written.close()
        self.stdout, self.pid = os.fdopen(os.dup(self._printed.fileno())), self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def type(self, text):
        """Write to its stdin, if it has not ended yet."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._typed.fileno(), text.encode())

    def communicate(self, timeout=None):
        """(stdout, stderr) of the program, after it has ended."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return self.stdout.read(), self._errors.read_text()

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self._process.kill()
        self._process.join()
        self.stdout.close()


def _run(words, environment, read, written, errors):
    """Be `python WORDS`."""
    for descriptor, stream in enumerate((read.fileno(), written.fileno(), os.open(errors, os.O_WRONLY | os.O_CREAT))):
        os.dup2(stream, descriptor)
    sys.stdin = os.fdopen(0, closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = words
    runpy.run_path(words[0], run_name="__main__")
