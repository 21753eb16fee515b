"""Manual pages to text: what a reader of `man` would read."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tozan.data.manpage import manpage_licence, manpage_text

PAGE = r"""'\" t
.\" SPDX-License-Identifier: GPL-2.0-or-later
.\" seen by nobody
.de ZZ
swallowed
..
.ie n .ds Aq '
.el .ds Aq \(aq
.if t swallowed, too
.if n \{\
shown
.\}
.TH CLIMB 1 2020-01-01 "GNU" "User Commands"
.SH NAME
climb \- go up
.SH "SEE ME"
.PP
First line
second\-line \fBbold\fR and \f[I]italic\f[], caf\['e] \(co \[u5C71].
.TP
\fB\-v\fR, \fB\-\-verbose\fR
Say more \\
.B loudly
.IP 1. 4
Item
.RS
.BR open (2),
.BI "int f(int " x );
.RE
.nf
  keep   this
    as it is
.fi
.TS
tab(;) allbox;
l l.
a;T{
.B long
cell
T}
c;d
.TE
山に
登る
and down
"""


def test_a_page():
    text = manpage_text(PAGE)
    assert "swallowed" not in text
    assert "seen by nobody" not in text
    assert text.startswith("shown\nCLIMB(1)\n\nNAME\nclimb - go up\n\nSEE ME\n")
    assert "First line second-line bold and italic, café © 山.\n" in text
    assert "\n-v, --verbose\n    Say more \\ loudly\n" in text
    assert "\n1.\n    Item\n" in text
    assert "open(2), int f(int x);\n" in text
    assert "  keep   this\n" in text
    assert "a\tlong cell\nc\td\n" in text
    assert "山に登る and down\n" in text
    assert "\\f" not in text


@pytest.mark.parametrize("page", [".so man3/printf.3\n", ".Dd January 1\n.Dt LS 1\n.Sh NAME\n", ""])
def test_pages_without_text_of_their_own(page: str):
    assert manpage_text(page).strip() == ""


@pytest.mark.parametrize(
    ("comments", "licence"),
    [
        (r".\" SPDX-License-Identifier: MIT", "MIT"),
        (r".\" SPDX-License-Identifier: GPL-2.0-only OR MIT", "GPL-2.0-only OR MIT"),
        (r".\" %%%LICENSE_START(VERBATIM)", "Linux-man-pages-copyleft"),
        (r".\" %%%LICENSE_START(ODD_ONE)", "LICENSE_START(ODD_ONE)"),
        ('.\\" under the GNU General\n.\\" Public License', "GPL"),
        ('.\\" Redistribution and use in source and binary forms', "BSD"),
        ("This text mentions the GNU General Public License", ""),
    ],
)
def test_licences_that_pages_state(comments: str, licence: str):
    assert manpage_licence(comments + "\n.TH A 1\n") == licence


@given(st.lists(st.sampled_from([*PAGE.split("\n"), ".TS", ".if \\{", "\\[", "\\*(", '.B "x', ".el", ".TE", "T{"])))
@settings(max_examples=200, deadline=None)
def test_no_page_breaks_the_reader(lines: list[str]):
    manpage_text("\n".join(lines))


@given(st.text(alphabet="\\.'\"TSB[](){}fn 山\n"))
@settings(max_examples=200, deadline=None)
def test_no_characters_break_the_reader(page: str):
    manpage_text(page)
    manpage_licence(page)
