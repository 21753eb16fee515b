"""A web page as plain text: its body without navigation, scripts and forms."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_DROPPED = re.compile(r"head|script|style|nav|header|footer|aside|form|button|noscript|svg|template|select|iframe")
_DROPPED_ROLES = {"navigation", "search", "banner", "contentinfo"}
_DROPPED_NAMES = re.compile(
    r"^(related|sphinxsidebar|mobile-nav|menu-wrapper|navheader|navfooter|nav_table|footer|toc|tocframe|contents"
    r"|headerlink|SearchFrame|DonationFrame|DEBUG|relatedtopics|highlighting-settings|clearer|noteicon)$"
)
_VOID = re.compile(r"area|base|br|col|embed|hr|img|input|link|meta|param|source|track|wbr")
_BLOCKS = re.compile(
    r"address|article|blockquote|body|caption|center|dd|details|div|dl|dt|fieldset|figcaption|figure|h[1-6]|li|main"
    r"|ol|p|pre|section|summary|table|tbody|t[dhr]|thead|tfoot|ul"
)
_SPACED = re.compile(r"p|pre|h[1-6]|table|[uod]l|blockquote|section")


def webpage_text(html: str) -> str:
    """The text of a web page: a line for each paragraph, blank lines between blocks, `pre` as it stands.

    Args:
        html: the page, well formed or not.

    Returns:
        Plain text; empty if the page has none.
    """
    parser = _Reader()
    # Marked sections belong to XML; the parser of some Python versions fails on those it does not know.
    parser.feed(re.sub(r"<!\[[^>]*>?", "", html))
    parser.close()
    return parser.text()


class _Reader(HTMLParser):
    """Collects the text between the tags that matter."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._open: list[tuple[str, bool]] = []
        self._parts: list[str] = []
        self._dropping = 0
        self._pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "br":
            self._parts.append("\n")
        if _VOID.fullmatch(tag):
            return
        if tag in ("p", "li", "dt", "dd", "tr", "td", "th") and self._open and self._open[-1][0] == tag:
            self.handle_endtag(tag)  # HTML lets these end without a tag
        names = dict(attrs)
        known = [*(names.get("class") or "").split(), names.get("id") or ""]
        drop = (
            bool(_DROPPED.fullmatch(tag))
            or names.get("role") in _DROPPED_ROLES
            or any(map(_DROPPED_NAMES.match, known))
        )
        self._open.append((tag, drop))
        self._dropping += drop
        self._pre += tag == "pre"
        self._break(tag)
        if tag == "li" and not self._dropping:
            self._parts.append("- ")

    def handle_endtag(self, tag: str) -> None:
        if not any(tag == name for name, _ in self._open):
            return
        while self._open:
            name, dropped = self._open.pop()
            self._dropping -= dropped
            self._pre -= name == "pre"
            if name == tag:
                break
        self._break(tag)

    def handle_data(self, data: str) -> None:
        if self._dropping:
            return
        if not self._pre:
            data = re.sub(r"\s+", " ", data)
            if not self._parts or self._parts[-1][-1:].isspace():
                data = data.lstrip(" ")
        if data:
            self._parts.append(data)

    def _break(self, tag: str) -> None:
        """Ends a line after a block; cells of a row stay on one."""
        if self._dropping or not _BLOCKS.fullmatch(tag):
            return
        in_cell = any(name in ("td", "th") for name, _ in self._open)
        if tag in ("td", "th"):
            self._parts.append("\t")
        elif not in_cell or self._pre or tag == "pre":
            spaced = _SPACED.fullmatch(tag) and not (tag == "p" and any(name == "li" for name, _ in self._open))
            if spaced or not (self._parts and self._parts[-1].endswith("\n")):
                self._parts.append("\n\n" if spaced else "\n")

    def text(self) -> str:
        text = "".join(self._parts).replace("\r\n", "\n").replace("\u00a0", " ").replace("¶", "")
        text = re.sub(r"[ \t]*\t[ \t]*", "\t", text)
        text = re.sub(r"[ \t]+\n", "\n", text)
        text = re.sub(r"\n[\t ]*\t", "\n", text)
        text = re.sub(r"(?m)^- *\n+", "- ", text)
        return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n" if text.strip() else ""
