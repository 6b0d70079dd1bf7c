"""Vendor the viewer's JavaScript libraries: fetched by npm, checked against what is pinned here, licences beside them.

    python deploy/vendor_viewer.py            fetch what is missing or differs
    python deploy/vendor_viewer.py --check    only say whether all is there as pinned; touches no network

A new version is pinned by hand: its `integrity` is what `npm view NAME@VERSION dist.integrity` says, and the digest of
each file is printed when it differs.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

VENDOR = Path(__file__).resolve().parents[1] / "workers" / "viewer" / "static" / "vendor"


@dataclass(frozen=True)
class Package:
    """One npm package: the files taken from its tarball, each with the sha256 it must have."""

    name: str
    version: str
    integrity: str
    files: dict[str, str]
    inside: str = ""
    """Folder of the library that has this one bundled in: only its licence is taken."""

    @property
    def folder(self) -> Path:
        return VENDOR / (self.inside or f"{self.name.rpartition('/')[2]}-{self.version}")

    def differing(self) -> list[str]:
        """Members whose vendored copy is missing or is not what is pinned."""
        return [member for member, digest in self.files.items() if _sha256(self.target(member)) != digest]

    def fetch(self) -> None:
        """Get the tarball through npm, check it, and take the files out of it."""
        with tempfile.TemporaryDirectory() as temporary:
            command = [
                "npm",
                "pack",
                f"{self.name}@{self.version}",
                "--pack-destination",
                temporary,
                "--silent",
            ]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            (tarball,) = Path(temporary).iterdir()
            found = "sha512-" + base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
            if found != self.integrity:
                sys.exit(
                    f"{self.name}@{self.version}: npm gave {found}; pinned is {self.integrity}; nothing was changed"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            with tarfile.open(tarball) as archive:
                for member in self.files:
                    content = archive.extractfile(f"package/{member}")
                    if content is None:
                        sys.exit(f"{self.name}@{self.version}: has no file {member}")
                    self.target(member).write_bytes(content.read())

    def target(self, member: str) -> Path:
        own = Path(member).name
        return self.folder / (f"LICENSE.{self.name.strip('@').replace('/', '-')}.txt" if self.inside else own)


NIIVUE = "niivue-0.69.0"

PACKAGES = (
    Package(
        "openseadragon",
        "6.1.1",
        "sha512-g4iKe2q8B642SaBT3+x4ZF3/8b1TxPPydyjmtrOLgDrlYWMKd9ZXM+1Cb/xa9DVySkvs/7l6HR1nHKfD5F3Tsw==",
        {
            "build/openseadragon/openseadragon.min.js": "14d587cd3ee7c4861f1a41077ce642029364a21029956ba635bd8fb1202cf9ad",
            "LICENSE.txt": "17da96b26ac706d2cbd06d4555dedb43026782f4943faf0156fe7acf89454228",
        },
    ),
    # Its LICENSE.txt is written here, being that of its repository: the npm package has none.
    Package(
        "@niivue/niivue",
        "0.69.0",
        "sha512-YMjQvJgD1W2b7DuoxkwlC4VxbrgIePRJ5qyQzXKxi2v2MBVg285P/CIQyg46oDDGDIcaNlbd+MhtO/edMbXJkA==",
        {"dist/niivue.umd.js": "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"},
    ),
    Package(
        "@lukeed/uuid",
        "2.0.1",
        "sha512-qC72D4+CDdjGqJvkFMMEAtancHUQ7/d/tAiHf64z8MopFDmcrtbcJuerDtFceuAfQJ2pDSfCKCtbqoGBNnwg0w==",
        {"license": "9a9edad7baae52622bddf3c15b2ef8a33d2c89f2d25408ad13e8a7481c6b0c97"},
        inside=NIIVUE,
    ),
    Package(
        "@ungap/structured-clone",
        "1.3.0",
        "sha512-WmoN8qaIAo7WTYWbAZuG8PYEhn5fkz7dZrqTBZ7dtt//lL2Gwms1IcnQ5yHqjDfX8Ft5j4YzDM23f87zBfDe9g==",
        {"LICENSE": "dc6d4961d8b6ee747231582ae9c53ce1d66bf76bc9f5a28f554c0e97210953bf"},
        inside=NIIVUE,
    ),
    Package(
        "array-equal",
        "1.0.2",
        "sha512-gUHx76KtnhEgB3HOuFYiCm3FIdEs6ocM2asHvNTkfu/Y09qQVrrVVaOKENmS2KkSaGoxgXNqC+ZVtR/n0MOkSA==",
        {"LICENSE": "965ef284f7f4c176842ec2e87fa13e79feed777d56d7a21a5a3b38f1bb6dc288"},
        inside=NIIVUE,
    ),
    Package(
        "fflate",
        "0.8.2",
        "sha512-cPJU47OaAoCbg0pBvzsgpTPhmhqI5eJjh/JIu8tPj5q+T7iLvW/JAYUqmE7KOB4R1ZyEhzBaIQpQpardBF5z8A==",
        {"LICENSE": "805f6cb28bb8b6d3a0badd83c93bccd9671fa01a3b4b92b7042b0743325ac243"},
        inside=NIIVUE,
    ),
    Package(
        "gl-matrix",
        "3.4.3",
        "sha512-wcCp8vu8FT22BnvKVPjXa/ICBWRq/zjFfdofZy1WSpQZpphblv12/bOQLBC1rMM7SGOFS9ltVmKOHil5+Ml7gA==",
        {"LICENSE.md": "f87e6877ea01390f34e32b1a618c3e5a718d0d57c4730d8195681419bcdc64d3"},
        inside=NIIVUE,
    ),
    Package(
        "nifti-reader-js",
        "0.8.0",
        "sha512-iO1iIhQDfKniy+l/86HfOPte7So+SxBmBiMSiUB2VXU7z4hSewMTlE3h0fCgfzfXvMUa+ilzLTJ2ZHmtFw6EWw==",
        {"LICENSE": "35d89c5827cb1f9685ffc3fb6ebcc9532f75663554ed6efddadad95071bae5c9"},
        inside=NIIVUE,
    ),
    Package(
        "numcodecs",
        "0.3.2",
        "sha512-6YSPnmZgg0P87jnNhi3s+FVLOcIn3y+1CTIgUulA3IdASzK9fJM87sUFkpyA+be9GibGRaST2wCgkD+6U+fWKw==",
        {"LICENSE": "785e5823c2471046f06ae8f64f0374557f1a14ec786febf690e2dbc65e804ce7"},
        inside=NIIVUE,
    ),
    Package(
        "zarrita",
        "0.5.4",
        "sha512-i88iN2+HqIQ+uiCEWLfhjbYNXAJD7IrM4h3lFwFclfqEOOhxp10amRWtqmgN5jbuy3+h0LwdyLVVzk4y9rTLgg==",
        {"LICENSE": "5cf6038da98164b5e3de3c38b6361b81a3cfd3bee73e56c9dae28798dbe19892"},
        inside=NIIVUE,
    ),
    Package(
        "@zarrita/storage",
        "0.1.3",
        "sha512-ZyCMYN3LuCNtKxro9876r/KyHyXV+ie2Bhk1qYsJR4Jp+sAjoVRRNNSJPsJxk64ZgFFezayO5S2hCu88/1Odwg==",
        {"LICENSE": "5cf6038da98164b5e3de3c38b6361b81a3cfd3bee73e56c9dae28798dbe19892"},
        inside=NIIVUE,
    ),
)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"


def main() -> int:
    """Command line; 1 where what is there is not what is pinned."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="fetch nothing")
    check = parser.parse_args().check
    status = 0
    for package in PACKAGES:
        if package.differing() and not check:
            package.fetch()
        for member in package.differing():
            status = 1
            target = package.target(member)
            print(f"{target}: sha256 {_sha256(target)}; pinned is {package.files[member]}")
    print("differs from what is pinned" if status else f"{VENDOR}: as pinned")
    return status


if __name__ == "__main__":
    sys.exit(main())
