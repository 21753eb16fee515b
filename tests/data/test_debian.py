"""Debian packages, made here: downloading is replaced, unpacking is real."""

import gzip
import hashlib
import io
import lzma
import re
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import zstandard

from tozan.data import debian
from tozan.errors import UserError

MAN = r""".\" SPDX-License-Identifier: MIT
.TH A 1
.SH NAME
a \- 山
"""
PACKERS = {
    "data.tar.xz": lzma.compress,
    "data.tar.zst": zstandard.compress,
    "data.tar.gz": gzip.compress,
    "data.tar": bytes,
}


def package(kind: str = "data.tar.xz") -> bytes:
    """A small .deb."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        files = {
            "./usr/share/man/man1/a.1.gz": gzip.compress(MAN.encode()),
            "./usr/share/man/man1/mdoc.1.gz": gzip.compress(b".Dd x\n.Dt A 1\n"),
            "./usr/share/man/man1/latin.1.gz": gzip.compress(b".TH \xe9\n"),
            "./usr/share/man/page.html": b"<h1>Page</h1>",
            "./usr/share/man/genindex.html": b"<h1>Index</h1>",
            "./etc/other": b"not text",
        }
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("./usr/share/man/man1/link.1.gz")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    found = b"!<arch>\n"
    for name, content in (
        ("debian-binary", b"2.0\n"),
        ("control.tar.xz", b"odd"),
        (kind, PACKERS[kind](buffer.getvalue())),
    ):
        found += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        found += content + b"\n" * (len(content) % 2)
    return found


def listed(content: bytes, version: str = "1:2-3", sha256: str | None = None) -> debian.Package:
    digest = sha256 or hashlib.sha256(content).hexdigest()
    return debian.Package("tozan-doc", version, digest, len(content), "usr/share/man/*", "GPL-2.0-only")


@pytest.mark.parametrize("kind", PACKERS)
def test_documents_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    content = package(kind)
    (tmp_path / "tozan-doc_1%3a2-3_all.deb").write_bytes(content)
    monkeypatch.setattr(debian, "packages", lambda: [listed(content)])
    notes = Counter()
    page, web = debian.debian(tmp_path, notes=notes)
    assert page.text == "A(1)\n\nNAME\na - 山\n"
    assert (page.licence, web.licence) == ("MIT", "GPL-2.0-only")
    assert page.source == "Debian package tozan-doc 1:2-3"
    assert web.text == "Page\n"
    assert notes == {"pages in mdoc left out": 1, "pages that are no UTF-8 left out": 1}


def test_another_version_is_taken_with_a_warning(tmp_path: Path):
    (tmp_path / "tozan-doc_1%3a2-4_all.deb").write_bytes(package())
    told, notes = [], Counter()
    assert len(debian.fetch([listed(b"other")], tmp_path, notes, told.append)) == 1
    assert "1:2-4 instead of 1:2-3" in told[0]
    assert notes == {"packages in another version than listed": 1}


def test_a_listed_version_with_other_contents_is_refused(tmp_path: Path):
    (tmp_path / "tozan-doc_1%3a2-3_all.deb").write_bytes(package())
    with pytest.raises(UserError, match="damaged"):
        debian.fetch([listed(b"other")], tmp_path, Counter(), print)


def test_machines_without_apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="no apt-get"):
        debian.fetch([listed(b"")], tmp_path, Counter(), print)


def test_apts_own_words_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = tmp_path / "apt-get"
    script.write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(UserError, match="Unable to locate package"):
        debian.fetch([listed(b"")], tmp_path / "cache", Counter(), print)


@pytest.mark.parametrize("damage", ["empty", "not ar", "cut", "no data", "noise"])
def test_damaged_packages_are_named(tmp_path: Path, damage: str):
    whole = package()
    content = {
        "empty": b"",
        "not ar": b"x" * 300,
        "cut": whole[:-60],
        "no data": whole.replace(b"data.tar.xz", b"else.tar.xz"),
        "noise": whole[:-200] + bytes(200),
    }[damage]
    path = tmp_path / "a_1_all.deb"
    path.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(str(path))):
        list(debian.unpack(path, "*"))


def test_the_list_is_complete():
    found = debian.packages()
    assert len({package.name for package in found}) == 12
    assert all(re.fullmatch("[0-9a-f]{64}", package.sha256) and package.size and package.text for package in found)
