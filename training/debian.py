"""
Debian packages: found by name, fetched without being installed, and read without being unpacked.

By apt, which checks its mirrors' signatures; or from a mirror given by its address, where there is no apt.
"""

from __future__ import annotations

import gzip
import lzma
import re
import shutil
import subprocess
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


ARCHITECTURE = "amd64"  # whose index is read: what we fetch is for all, and listed in every one
DEFAULT_SUITE = "stable"
TIMEOUT = 60  # seconds without an answer


@dataclass(frozen=True)
class Package:
    """
    What an index says of a package.

    Attributes:
        path: of the file under the mirror's address.
        sha256: of the file, in hex.
    """

    name: str
    version: str
    path: str
    sha256: str
    depends: str = ""


class Apt:
    """The packages that this machine's apt knows."""

    @staticmethod
    def is_here() -> bool:
        return shutil.which("apt-get") is not None and shutil.which("apt-cache") is not None

    def find(self, name: str) -> Package | None:
        done = subprocess.run(
            ["apt-cache", "show", "--no-all-versions", name], capture_output=True, text=True, check=False
        )
        return next((package for package in packages(done.stdout) if package.name == name), None)

    def fetch(self, package: Package, directory: Path) -> Path:
        command = ["apt-get", "download", "--quiet", f"{package.name}={package.version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=directory)
        found = list(directory.glob("*.deb"))
        if done.returncode or not found:
            raise ValueError(f"apt-get could not download {package.name}:\n{done.stderr.strip()}")
        return found[0]


class Mirror:
    """
    The packages of a Debian mirror.

    Args:
        url: of the folder that holds `dists` and `pool`.
        suite: `stable`, or a release by name.

    Raises:
        ValueError: there is no index of packages at that address.
    """

    def __init__(self, url: str, suite: str = DEFAULT_SUITE) -> None:
        self.url = url.rstrip("/")
        self._packages: dict[str, Package] = {}
        folder = f"dists/{suite}/main/binary-{ARCHITECTURE}"
        for name, unpack in (("Packages.xz", lzma.decompress), ("Packages.gz", gzip.decompress)):
            try:
                index = unpack(self._get(f"{folder}/{name}")).decode()
            except urllib.error.HTTPError as error:
                if error.code != 404:
                    raise ValueError(f"The mirror {self.url} did not give {folder}/{name}: {error}") from error
                continue
            except OSError as error:
                raise ValueError(f"The mirror {self.url} cannot be reached: {error}") from error
            self._packages = {package.name: package for package in packages(index)}
            return
        raise ValueError(f"The mirror {self.url} has no index {folder}/Packages: is {suite!r} one of its suites?")

    def find(self, name: str) -> Package | None:
        return self._packages.get(name)

    def fetch(self, package: Package, directory: Path) -> Path:
        target = directory / Path(package.path).name
        try:
            target.write_bytes(self._get(package.path))
        except OSError as error:
            raise ValueError(f"The mirror {self.url} did not give {package.path}: {error}") from error
        return target

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"{self.url}/{path}", timeout=TIMEOUT) as answer:
            return answer.read()


def packages(index: str) -> Iterator[Package]:
    """The packages that an index lists, in its order."""
    for part in index.split("\n\n"):
        fields = dict(re.findall(r"^([A-Za-z0-9-]+): *(.*)$", part, flags=re.M))
        if fields.keys() >= {"Package", "Version", "Filename", "SHA256"}:
            yield Package(
                fields["Package"], fields["Version"], fields["Filename"], fields["SHA256"], fields.get("Depends", "")
            )


def resolve(index: Apt | Mirror, name: str, real: str | None = None) -> Package:
    """
    A package by its name.

    Args:
        real: pattern of the name of the package that it depends on and that holds its files, where it holds none itself,
            as `linux-doc` depends on `linux-doc-6.1`.

    Raises:
        ValueError: the index has no such package, or it depends on none that matches.
    """
    package = index.find(name)
    if package is None:
        raise ValueError(f"no Debian package {name} is known (with apt, `apt-get update` renews what is)")
    if real is None:
        return package
    for needed in re.split(r"[,|]", package.depends):
        needed = re.split(r"[\s(:]", needed.strip())[0]
        if re.fullmatch(real, needed):
            return resolve(index, needed)
    raise ValueError(f"the Debian package {name} depends on none called {real}: {package.depends or 'on nothing'}")


def files_in(deb: Path) -> Iterator[tuple[str, bytes]]:
    """
    The files of a package: their paths, without a leading `./`, and what they hold. Links are left out.

    Raises:
        ValueError: the file is no package, or compressed in a way that needs `dpkg-deb`, which is not here.
    """
    with tempfile.TemporaryFile() as unpacked:
        unpacked.write(_tar(deb))
        unpacked.seek(0)
        with tarfile.open(fileobj=unpacked, mode="r:") as archive:
            for member in archive:
                opened = archive.extractfile(member) if member.isfile() else None
                if opened is not None:
                    yield member.name.removeprefix("./"), opened.read()


def _tar(deb: Path) -> bytes:
    data = deb.read_bytes()
    if not data.startswith(b"!<arch>\n"):
        raise ValueError(f"{deb} is no Debian package.")
    place = 8
    while place + 60 <= len(data):
        name, size = data[place : place + 16].decode().strip().rstrip("/"), int(data[place + 48 : place + 58])
        content = data[place + 60 : place + 60 + size]
        place += 60 + size + size % 2
        if not name.startswith("data.tar"):
            continue
        if name.endswith(".xz"):
            return lzma.decompress(content)
        if name.endswith(".gz"):
            return gzip.decompress(content)
        if name == "data.tar":
            return content
        if shutil.which("dpkg-deb"):
            return subprocess.run(["dpkg-deb", "--fsys-tarfile", str(deb)], capture_output=True, check=True).stdout
        raise ValueError(f"{deb} holds {name}, which only `dpkg-deb` reads here: install dpkg.")
    raise ValueError(f"{deb} holds no data.tar.")
