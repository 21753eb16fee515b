r"""A manual page as plain text.

Understands the `man` macros, tables (`tbl`) and the escapes of roff that real pages use, as groff_man(7), groff(7)
and tbl(1) describe them; what only moves ink about is dropped. Paragraphs become single lines.
"""

from __future__ import annotations

import re
import unicodedata

_CHARACTERS = """
aq=' dq=" lq=“ rq=” oq=‘ cq=’ Bq=„ bq=‚ bu=• em=— en=– hy=- co=© rg=® tm=™ ha=^ ti=~ rs=\\ bv=| ba=| br=| mu=×
pl=+ mi=− di=÷ <==≤ >==≥ !==≠ ==≡ ~~=≈ ->=→ <-=← ua=↑ da=↓ <>=↔ rA=⇒ lA=⇐ de=° sc=§ ps=¶ ga=` aa=´ at=@ sh=#
Do=$ Eu=€ Po=£ Ye=¥ ct=¢ lB=[ rB=] lC={ rC=} la=⟨ ra=⟩ Fo=« Fc=» fo=‹ fc=› 12=½ 14=¼ 34=¾ +-=± if=∞ sr=√ eq==
sl=/ ul=_ dg=† dd=‡ mc=µ S1=¹ S2=² S3=³ *a=α *b=β *g=γ *d=δ *e=ε *l=λ *m=μ *p=π *s=σ *w=ω *D=Δ *S=Σ *W=Ω ss=ß
ae=æ AE=Æ oe=œ OE=Œ /o=ø /O=Ø oa=å oA=Å -D=Ð -d=đ Tp=þ TP=Þ r!=¡ r?=¿ lh=☜ rh=☞ sq=□ OK=✓ es=∅ mo=∈ no=¬ an=∧
ca=∩ cu=∪ sb=⊂ sp=⊃ pd=∂ gr=∇ is=∫ te=∃ fa=∀ pt=∝ Om=º Of=ª bb=¦ lf=⌊ rf=⌋ lc=⌈ rc=⌉ f/=⁄ fm=′ sd=″
"""
_SPECIAL = {pair[:2]: pair[3:] for pair in _CHARACTERS.split()}
_ACCENTS = {"'": "\u0301", "`": "\u0300", ":": "\u0308", "^": "\u0302", "~": "\u0303", ",": "\u0327", "v": "\u030c"}
_STRINGS = {"Aq": "'", "C`": '"', "C'": '"', 'L"': '"', 'R"': '"', "lq": "“", "rq": "”", "R": "®", "Tm": "™", "S": ""}
_ESCAPE = re.compile(
    r"""\\(?:
      (?P<comment>["\#].*)
    | [fF](?:\[[^]]*]|\(..|.)                       # fonts
    | s(?:\[[^]]*]|[-+]?\([-+]?..|[-+]?\d{1,2})     # sizes
    | [mMgYkV](?:\[[^]]*]|\(..|.)                   # colours, registers
    | n[-+]?(?:\[[^]]*]|\(..|.)
    | [hvwlLoDbxXNRABSHC]'[^']*'                    # motions, widths, drawing
    | \((?P<two>..) | \[(?P<long>[^]]*)]
    | \*(?:\[(?P<string>[^]]*)]|\((?P<string2>..)|(?P<string1>.))
    | (?P<one>.)
    )""",
    re.VERBOSE,
)
_ONE = {
    "-": "-",
    "e": "\\",
    "E": "\\",
    "\\": "\\",
    " ": " ",
    "~": " ",
    "0": " ",
    "t": "\t",
    "'": "´",
    "`": "`",
    ".": ".",
}
_FONTS = {"B", "I", "R", "SM", "SB"}
_MIXED = {"BR", "RB", "IR", "RI", "BI", "IB"}
_PARAGRAPHS = {"PP", "LP", "P", "HP"}


def manpage_text(roff: str) -> str:
    """The text of a manual page written with the `man` macros.

    Args:
        roff: the page's source.

    Returns:
        Plain text with a heading on a line of its own; empty for pages that only point to another one (`.so`) and for
        pages written with the `mdoc` macros, which are another language.
    """
    if re.search(r"(?m)^\.(so |Dd\b|Dt\b)", roff):
        return ""
    page = _Page()
    joined = re.sub(r"(?<!\\)((?:\\\\)*)\\\n", r"\1", roff.replace("\r\n", "\n"))
    page.read(joined.split("\n"))
    return page.text()


def manpage_licence(roff: str) -> str:
    """The licence that a page's comments state, as far as they use one of the customary forms; else nothing."""
    comments = "\n".join(line for line in roff.splitlines() if line.lstrip(".'").startswith('\\"'))
    if stated := re.search(r"SPDX-License-Identifier:\s*(\S+(?: (?:OR|AND|WITH) \S+)*)", comments):
        return stated[1]
    if stated := re.search(r"LICENSE_START\(([^)]*)\)", comments):
        return _MARKS.get(stated[1], f"LICENSE_START({stated[1]})")
    words = re.sub(r'[\s.\'\\"]+', " ", comments)
    return next((licence for phrase, licence in _PHRASES if phrase in words), "")


_MARKS = {
    "VERBATIM": "Linux-man-pages-copyleft",
    "VERBATIM_ONE_PARA": "Linux-man-pages-1-para",
    "VERBATIM_TWO_PARA": "Linux-man-pages-copyleft-2-para",
    "GPLv2+_DOC_FULL": "GPL-2.0-or-later",
    "GPLv2+_SW_3_PARA": "GPL-2.0-or-later",
    "GPLv2+_DOC_ONEPARA": "GPL-2.0-or-later",
    "GPL_NOVERSION_ONELINE": "GPL-1.0-or-later",
    "BSD_4_CLAUSE_UCB": "BSD-4-Clause-UC",
    "BSD_3_CLAUSE_UCB": "BSD-3-Clause",
    "PUBLIC_DOMAIN": "public domain",
}
_PHRASES = (
    ("GNU Free Documentation License", "GFDL"),
    ("GNU General Public License", "GPL"),
    ("Redistribution and use in source", "BSD"),
    ("make and distribute verbatim copies", "Linux-man-pages-copyleft"),
    ("public domain", "public domain"),
)


def _plain(text: str) -> str:
    """Replaces the escapes of roff by the characters they stand for."""
    return _ESCAPE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    name = match["two"] or match["long"]
    if name is not None:
        if name in _SPECIAL:
            return _SPECIAL[name]
        if code := re.fullmatch(r"u([0-9A-Fa-f]{4,6})", name):
            value = int(code[1], 16)
            return chr(value) if value < 0xD800 or 0xE000 <= value < 0x110000 else ""
        if len(name) == 2 and name[0] in _ACCENTS:
            return unicodedata.normalize("NFC", name[1] + _ACCENTS[name[0]])
        return ""
    string = match["string"] or match["string2"] or match["string1"]
    if string is not None:
        return _STRINGS.get(string, "")
    return _ONE.get(match["one"] or "", "")


def _arguments(text: str) -> list[str]:
    """Splits a macro's arguments at spaces outside double quotes; a doubled quote inside is a quote."""
    found = re.findall(r'"((?:[^"]|"")*)"?|((?:\\.|[^\s"])(?:\\.|[^\s])*)', text)
    return [_plain(quoted.replace('""', '"') if quoted or not bare else bare) for quoted, bare in found]


def _wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"


class _Page:
    """The state of formatting: finished lines, the paragraph under way, and what the next line is to be."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._words = ""
        self._fill = True
        self._depth = 0
        self._body = False
        self._next: str | None = None
        self._else = False

    def read(self, lines: list[str]) -> None:
        at = 0
        while at < len(lines):
            line = lines[at]
            at += 1
            if not line.startswith((".", "'")):
                self._text(_plain(line))
                continue
            name, _, rest = line[1:].strip().partition(" ")
            if "\t" in name:
                name, _, rest = line[1:].strip().partition("\t")
            if name in ("de", "de1", "am", "ig"):
                end = "." + (rest.split()[1] if len(rest.split()) > 1 else ".")
                at = next((k for k in range(at, len(lines)) if lines[k].strip() == end), len(lines)) + 1
            elif name in ("if", "ie", "el"):
                at = self._condition(name, rest.strip(), lines, at)
            elif name == "TS":
                end_at = next((k for k in range(at, len(lines)) if lines[k].startswith(".TE")), len(lines))
                self._table(lines[at:end_at])
                at = end_at + 1
            else:
                self._macro(name, rest)

    def _condition(self, name: str, rest: str, lines: list[str], at: int) -> int:
        """Takes the branch for terminals; returns the line to go on with."""
        if name == "el":
            holds, body = self._else, rest
        else:
            test = re.match(r"(!?)(n\b|t\b|\S+)\s*(.*)", rest)
            holds = bool(test) and test is not None and (test[2] == "n") != bool(test[1]) and test[2] in "nt"
            body = test[3] if test else ""
            self._else = not holds
        if not body.startswith("\\{"):
            if holds:
                self.read([body])
            return at
        depth, inside = body.count("\\{") - body.count("\\}"), [body[2:].lstrip("\\ ")]
        while depth > 0 and at < len(lines):
            depth += lines[at].count("\\{") - lines[at].count("\\}")
            inside.append(lines[at].replace("\\}", "").rstrip())
            at += 1
        if holds:
            self.read([line for line in inside if line not in ("", ".")])
        return at

    def _macro(self, name: str, rest: str) -> None:
        if name == "TH":
            self._break()
            words = _arguments(rest)
            self._lines.append(f"{words[0]}({words[1]})" if len(words) > 1 else " ".join(words))
        elif name in ("SH", "SS"):
            self._heading(" ".join(_arguments(rest)))
        elif name in _FONTS:
            self._styled(" ".join(_arguments(rest)))
        elif name in _MIXED:
            self._styled("".join(_arguments(rest)))
        elif name in _PARAGRAPHS:
            self._break(blank=True)
            self._body = False
        elif name in ("TP", "TQ"):
            self._break(blank=name == "TP")
            self._body, self._next = False, "tag"
        elif name == "IP":
            self._break(blank=True)
            self._body = False
            if words := _arguments(rest):
                self._tag(words[0])
            self._body = True
        elif name in ("RS", "RE"):
            self._break()
            self._depth = max(0, self._depth + (1 if name == "RS" else -1))
        elif name in ("nf", "EX", "Vb", "fi", "EE", "Ve"):
            self._break()
            self._fill = name in ("fi", "EE", "Ve")
        elif name in ("br", "sp", "Sp"):
            self._break(blank=name != "br")
        elif name in ("UR", "MT"):
            self._styled(" ".join(_arguments(rest)))

    def _heading(self, title: str) -> None:
        self._break(blank=True)
        self._depth, self._body, self._fill = 0, False, True
        if title:
            self._lines.append(title)
        else:
            self._next = "heading"

    def _styled(self, text: str) -> None:
        """Text of a font macro; without arguments the macro means the next line, which is text anyway."""
        if text:
            self._text(text)

    def _tag(self, text: str) -> None:
        self._lines.append("    " * self._depth + text)

    def _text(self, text: str) -> None:
        if self._next and text.strip():
            heading, self._next = self._next == "heading", None
            if heading:
                self._lines.append(text.strip())
            else:
                self._tag(text.strip())
                self._body = True
        elif not text.strip():
            self._break(blank=True)
        elif not self._fill:
            self._lines.append(self._indent() + text.rstrip())
        else:
            text = re.sub(r"\s+", " ", text).strip()
            joint = "" if self._words and _wide(self._words[-1]) and _wide(text[0]) else " "
            self._words = self._words + joint + text if self._words else text

    def _indent(self) -> str:
        return "    " * (self._depth + self._body)

    def _break(self, *, blank: bool = False) -> None:
        """Ends the paragraph under way."""
        if self._words:
            self._lines.append(self._indent() + self._words)
            self._words = ""
        if blank and self._lines and self._lines[-1]:
            self._lines.append("")

    def _table(self, lines: list[str]) -> None:
        """Rows of a table, cells separated by tabs."""
        self._break(blank=True)
        options = re.search(r"tab\s*\((.)\)", lines[0]) if lines else None
        separator = options[1] if options else "\t"
        begin = next((k for k, line in enumerate(lines) if line.rstrip().endswith(".") and line[0] != "."), -1) + 1
        text = "\n".join(line for line in lines[begin:] if not re.match(r"""^([.']\\"|_$|=$|\.T&|\.sp|\.PP)""", line))
        text = re.sub(r"T\{\n(.*?)\nT\}", lambda cell: _cell(cell[1]), text, flags=re.DOTALL)
        for row in text.split("\n"):
            cells = [_plain(cell).strip() for cell in row.split(separator)]
            if any(cells):
                self._lines.append("\t".join(cells).rstrip())
        self._break(blank=True)

    def text(self) -> str:
        self._break()
        return re.sub(r"\n{3,}", "\n\n", "\n".join(self._lines)).strip() + "\n"


def _cell(block: str) -> str:
    """A cell of several lines, with its macros taken away."""
    page = _Page()
    page.read(block.split("\n"))
    return " ".join(page.text().split())
