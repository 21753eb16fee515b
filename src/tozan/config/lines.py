"""On which line of a TOML file each key stands: tomllib does not say, and an error message must.

The scanner reads text that tomllib has already accepted, so it only needs to find its way, not to judge. It knows the
whole key grammar (bare, quoted and dotted keys, tables, arrays of tables, inline tables) and skips values by their
shape. A property test holds its paths to those of tomllib.
"""

from __future__ import annotations

import re
import tomllib

Path = tuple[str | int, ...]

_SPACE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_BLANK = re.compile(r"[ \t]*")
_KEY = re.compile(r'"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'|[A-Za-z0-9_-]+')
# The closing quotes of a multi-line string may be preceded by up to two quotes that belong to the string.
_STRING = re.compile(
    r'"""(?:[^\\]|\\.)*?"""(?:"{0,2})'
    r"|'''.*?'''(?:'{0,2})"
    r'|"(?:[^"\\\n]|\\.)*"'
    r"|'[^'\n]*'",
    re.DOTALL,
)
# Numbers, booleans and dates; a date may hold one blank before its time (1979-05-27 07:32:00).
_SCALAR = re.compile(r"\d{4}-\d\d-\d\d \d\d:[^\s,\]}#]*|[^\s,\]}#]+")


def key_lines(text: str) -> dict[Path, int]:
    """The line (from 1) of every key, table header and array element of a valid TOML document.

    Args:
        text: a document that `tomllib.loads` accepts.

    Returns:
        `{("optim", "lr"): 12, ("metrics", "profile"): 20, ("metrics", "profile", 0): 21, ...}`; where a path is
        written more than once (a table opened again by a dotted key), the first line counts.
    """
    return _Scanner(text).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.line = 1
        self.lines: dict[Path, int] = {}
        self.array_tables: dict[Path, int] = {}  # how many [[x]] of each path were seen

    def scan(self) -> dict[Path, int]:
        table: Path = ()
        self.skip(_SPACE)
        while self.at < len(self.text):
            if self.text[self.at] == "[":
                table = self.header()
            else:
                self.assignment(table)
            self.skip(_SPACE)
        return self.lines

    def skip(self, pattern: re.Pattern[str]) -> str:
        """Move past what `pattern` matches here, counting lines, and return it."""
        match = pattern.match(self.text, self.at)
        found = match.group() if match else ""
        self.move(len(found))
        return found

    def move(self, characters: int) -> None:
        self.line += self.text.count("\n", self.at, self.at + characters)
        self.at += characters

    def note(self, path: Path, line: int) -> None:
        for length in range(1, len(path) + 1):
            self.lines.setdefault(path[:length], line)

    def key(self) -> Path:
        """A bare, quoted or dotted key."""
        parts: list[str] = []
        while True:
            self.skip(_BLANK)
            raw = self.skip(_KEY)
            if not raw:
                raise ValueError(f"no key at line {self.line}")
            # A quoted key is written like a string value, so tomllib can undo its escapes.
            parts.append(tomllib.loads(f"k={raw}")["k"] if raw[0] in "\"'" else raw)
            self.skip(_BLANK)
            if self.text[self.at] != ".":
                return tuple(parts)
            self.move(1)

    def header(self) -> Path:
        """`[a.b]` or `[[a.b]]`: the path of the table that it opens."""
        double = self.text.startswith("[[", self.at)
        line = self.line
        self.move(2 if double else 1)
        written = self.key()
        self.move(2 if double else 1)
        path: Path = ()
        for position, part in enumerate(written):
            path = (*path, part)
            last = position == len(written) - 1
            if double and last:
                self.array_tables[path] = self.array_tables.get(path, 0) + 1
            if path in self.array_tables:  # a further header speaks of the newest element
                path = (*path, self.array_tables[path] - 1)
        self.note(path, line)
        return path

    def assignment(self, table: Path) -> None:
        """`key = value` inside `table`."""
        line = self.line
        path = table + self.key()
        self.note(path, line)
        self.move(1)  # the equals sign
        self.skip(_BLANK)
        self.value(path)

    def value(self, path: Path) -> None:
        opening = self.text[self.at]
        if opening == "[":
            self.array(path)
        elif opening == "{":
            self.inline_table(path)
        elif not self.skip(_STRING if opening in "\"'" else _SCALAR):
            raise ValueError(f"no value at line {self.line}")

    def array(self, path: Path) -> None:
        self.move(1)
        self.skip(_SPACE)
        index = 0
        while self.text[self.at] != "]":
            self.note((*path, index), self.line)
            self.value((*path, index))
            index += 1
            self.separator()
        self.move(1)

    def inline_table(self, path: Path) -> None:
        self.move(1)
        self.skip(_SPACE)
        while self.text[self.at] != "}":
            self.assignment(path)
            self.separator()
        self.move(1)

    def separator(self) -> None:
        self.skip(_SPACE)
        if self.text[self.at] == ",":
            self.move(1)
            self.skip(_SPACE)
