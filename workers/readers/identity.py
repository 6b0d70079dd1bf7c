"""What makes two images the same image: their content, never a path or a time.

Up to 8 MiB a file counts whole; beyond that its size, its first and last MiB and 64 evenly spaced
64 KiB blocks, so that the identity of a 4 GB slide costs milliseconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from schemas.errors import SourceError

MIB = 1 << 20
WHOLE_BYTES = 8 * MIB
BLOCK_BYTES = 64 << 10
BLOCKS = 64


def text_identity(text: str) -> str:
    """sha256 (hex) of `text`: procedural images by their canonical URI."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_identity(path: Path) -> str:
    """sha256 (hex) over the size and the sampled content of one file.

    Raises
    ------
    SourceError
        The file cannot be read.
    """
    try:
        size = path.stat().st_size
        digest = hashlib.sha256(b"%d\n" % size)
        with path.open("rb") as file:
            if size <= WHOLE_BYTES:
                digest.update(file.read())
            else:
                spans = [(0, MIB), (size - MIB, MIB)]
                spans += [(i * (size - BLOCK_BYTES) // (BLOCKS - 1), BLOCK_BYTES) for i in range(BLOCKS)]
                for start, length in spans:
                    file.seek(start)
                    digest.update(file.read(length))
    except OSError as error:
        msg = f"{path}: cannot be read ({error.strerror or error}); check that it exists and its permissions"
        raise SourceError(msg) from error
    return digest.hexdigest()


def folder_identity(folder: Path) -> str:
    """sha256 (hex) over the sorted (relative name, sampled content) of every file below `folder`."""
    digest = hashlib.sha256()
    files = sorted((p.relative_to(folder).as_posix(), p) for p in folder.rglob("*") if p.is_file())
    for name, path in files:
        digest.update(f"{name}\0{file_identity(path)}\n".encode())
    return digest.hexdigest()


def slide_identity(path: Path) -> str:
    """Identity of a file; of an `.mrxs` with the companion folder that holds its pixels."""
    companion = path.with_suffix("")
    if path.suffix.lower() == ".mrxs" and companion.is_dir():
        return combined_identity(file_identity(path), folder_identity(companion))
    return file_identity(path)


def series_identity(instances: Iterable[tuple[str, int]]) -> str:
    """sha256 (hex) over the sorted (SOPInstanceUID, size in bytes) of a DICOM series."""
    lines = sorted(f"{uid} {size}" for uid, size in instances)
    return text_identity("\n".join(lines))


def combined_identity(*parts: str) -> str:
    """Identity of several things that make one image (a file and its companion folder, a volume and a time)."""
    return text_identity("\n".join(parts))
