"""A Japanese and English corpus that every Debian can fetch: the documentation in some of its packages.

The packages are downloaded, never installed: `apt-get` finds, fetches and authenticates them with folders of its own,
as an ordinary user. Which packages, in which versions, with which hashes and licences: `debian.toml`.
"""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import importlib.resources
import io
import lzma
import os
import pwd
import re
import shutil
import subprocess
import tarfile
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import zstandard

from tozan.data.document import Document
from tozan.data.manpage import manpage_licence, manpage_text
from tozan.data.webpage import webpage_text
from tozan.errors import Problem, UserError

_SKIPPED_PAGES = re.compile(
    r"(^|/)(genindex[^/]*|py-modindex|search|contents|developers-reference|[^/]*-big-page[^/]*|lilypond-index[^/]*)\."
)
"""Indexes and pages that repeat all others."""
_LONGEST_MEMBER = 64 << 20


@dataclass(frozen=True)
class Package:
    """An entry of `debian.toml`.

    Attributes:
        name: of the package.
        version: that was there when the list was made.
        sha256: of that version's file.
        size: of that file in bytes.
        text: pattern of the files in it that are documents.
        licence: of those that do not state their own.
    """

    name: str
    version: str
    sha256: str
    size: int
    text: str
    licence: str


def packages() -> list[Package]:
    """The packages of the corpus."""
    listed = (importlib.resources.files("tozan.data") / "debian.toml").read_text()
    return [Package(**entry) for entry in tomllib.loads(listed)["package"]]


def debian(
    cache: Path | None = None,
    *,
    notes: Counter[str] | None = None,
    on_event: Callable[[str], None] = lambda _: None,
) -> Iterator[Document]:
    """The Japanese and English documentation of Debian: manual pages and handbooks, about 40 MB of text.

    Technical documentation is all it is: figures made with it are about that domain only.

    Args:
        cache: where downloaded packages are kept; default `tozan/debian` in the user's cache folder.
        notes: counts what was left out, and packages in other versions than listed.
        on_event: is told what is being done, and of other versions.

    Yields:
        Documents with the licence of the page, or of its package.

    Raises:
        UserError: this is no Debian, packages cannot be fetched, or a file is not what its hash says.
    """
    notes = Counter() if notes is None else notes
    folder = cache or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tozan" / "debian"
    files = fetch(packages(), folder, notes, on_event)
    for package, path in files:
        version = _version(path)
        source = f"Debian package {package.name} {version}"
        for name, data in unpack(path, package.text):
            if (document := _document(package, source, name, data, notes)) is not None:
                yield document


def fetch(
    wanted: list[Package], folder: Path, notes: Counter[str], on_event: Callable[[str], None]
) -> list[tuple[Package, Path]]:
    """Makes sure that each package's file is in a folder; downloads only what is not there.

    Returns:
        Each package with its file.

    Raises:
        UserError: packages are missing and cannot be fetched, or one has its listed version but not its listed hash.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        missing = [package for package in wanted if not _files(folder, package)]
        if missing:
            size = sum(package.size for package in missing)
            on_event(f"downloading {len(missing)} Debian packages, {size / 1e6:,.0f} MB")
            _download(missing, folder)
    except OSError as error:
        raise UserError(
            Problem(str(folder), f"cannot be used: {error.strerror}", "name another cache folder")
        ) from None
    found, problems = [], []
    for package in wanted:
        paths = _files(folder, package)
        if not paths:
            what = "could not be downloaded; apt-get knows no such package here"
            problems.append(Problem(package.name, what, "use a Debian 12 or the standard library's corpus"))
            continue
        path = paths[-1]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if digest == package.sha256:
            found.append((package, path))
        elif _version(path) == package.version:
            problems.append(Problem(str(path), f"is damaged: SHA-256 {digest}, not {package.sha256}", "delete it"))
        else:
            on_event(f"{package.name}: version {_version(path)} instead of {package.version}; the corpus will differ")
            notes["packages in another version than listed"] += 1
            found.append((package, path))
    if problems:
        raise UserError(*problems)
    return found


def _files(folder: Path, package: Package) -> list[Path]:
    """The package's files in a folder, the listed version last."""
    listed = f"{package.name}_{package.version.replace(':', '%3a')}_"
    return sorted(folder.glob(f"{package.name}_*.deb"), key=lambda path: (path.name.startswith(listed), path.name))


def _version(path: Path) -> str:
    """The version in a package's file name."""
    return path.name.split("_")[1].replace("%3a", ":")


def _download(wanted: list[Package], folder: Path) -> None:
    """Lets apt-get fetch packages into a folder: the listed version if there is one, else the one there is.

    Raises:
        UserError: there is no apt-get, or it fails; told with its own words.
    """
    if shutil.which("apt-get") is None:
        fix = "use the standard library's corpus, or build from a folder of your own text"
        raise UserError(Problem("debian", "there is no apt-get on this machine", fix))
    own = folder / "apt"
    for inside in ("state/lists/partial", "cache/archives/partial"):
        (own / inside).mkdir(parents=True, exist_ok=True)
    (own / "status").touch()
    # Folders of our own, so that neither root's rights nor root's package lists are needed or touched.
    options = [
        f"Dir::State={own / 'state'}",
        f"Dir::State::status={own / 'status'}",
        f"Dir::Cache={own / 'cache'}",
        f"APT::Sandbox::User={pwd.getpwuid(os.getuid()).pw_name}",
        "Acquire::Retries=3",
        "Acquire::http::Timeout=30",
    ]
    command = ["apt-get", "-q", *(word for option in options for word in ("-o", option))]
    _run([*command, "update"], folder)
    for package in wanted:
        listed = subprocess.run(
            [*command, "download", f"{package.name}={package.version}"], cwd=folder, capture_output=True, check=False
        )
        if listed.returncode:
            _run([*command, "download", package.name], folder)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (
            " ".join(line for line in done.stderr.splitlines() if line.startswith("E:")) or done.stderr.strip()[-500:]
        )
        fix = "check the network and the machine's package sources, or use the standard library's corpus"
        raise UserError(Problem("apt-get " + command[-1], f"failed: {said}", fix))


def unpack(path: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Reads the files of a Debian package whose names match a pattern, without writing any of them.

    Args:
        path: the `.deb`: an `ar` archive (deb(5), ar(5)) that holds a compressed tar.
        pattern: a shell pattern for names such as `usr/share/man/*`.

    Yields:
        Names and contents, in the archive's order; links are left out, as what they point to is there, too.

    Raises:
        UserError: the file is no Debian package, or damaged.
    """
    try:
        name, data = next(part for part in _parts(path.read_bytes()) if part[0].startswith("data.tar"))
        with tarfile.open(fileobj=io.BytesIO(_unpressed(name, data))) as archive:
            for member in archive:
                inside = member.name.removeprefix("./")
                if member.isreg() and member.size <= _LONGEST_MEMBER and fnmatch.fnmatchcase(inside, pattern):
                    file = archive.extractfile(member)
                    if file is not None:
                        yield inside, file.read()
    except (
        StopIteration,
        ValueError,
        EOFError,
        OSError,
        lzma.LZMAError,
        zstandard.ZstdError,
        tarfile.TarError,
    ) as error:
        raise UserError(Problem(str(path), f"is no whole Debian package: {error}", "delete it")) from None


def _parts(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Members of an `ar` archive."""
    if not data.startswith(b"!<arch>\n"):
        raise ValueError("it does not begin like one")
    at = 8
    while at + 60 <= len(data):
        head = data[at : at + 60]
        size = int(head[48:58])
        if size < 0 or at + 60 + size > len(data):
            raise ValueError(f"the part at {at} is truncated")
        yield head[:16].decode("ascii", "replace").rstrip(" /"), data[at + 60 : at + 60 + size]
        at += 60 + size + size % 2


def _unpressed(name: str, data: bytes) -> bytes:
    if name.endswith(".xz"):
        return lzma.decompress(data)
    if name.endswith(".zst"):
        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    return gzip.decompress(data) if name.endswith(".gz") else data


def _document(package: Package, source: str, name: str, data: bytes, notes: Counter[str]) -> Document | None:
    """A file of a package as a document, if it is one."""
    if _SKIPPED_PAGES.search(name):
        return None
    try:
        text = (gzip.decompress(data) if name.endswith(".gz") else data).decode()
    except (UnicodeDecodeError, OSError, EOFError):
        notes["pages that are no UTF-8 left out"] += 1
        return None
    if name.endswith(".html"):
        return Document(name, webpage_text(text), source, package.licence)
    if re.search(r"(?m)^\.D[dt]\b", text):
        notes["pages in mdoc left out"] += 1
        return None
    return Document(name, manpage_text(text), source, manpage_licence(text) or package.licence)
