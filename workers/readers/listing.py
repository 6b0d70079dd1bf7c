"""From what a user names (files, folders, globs, a CSV) to the images meant, one by one."""

from __future__ import annotations

import csv
import glob
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from schemas.errors import SpecError
from schemas.image import ImageRequest, ReadOptions
from workers.readers.opening import PICTURE_SUFFIXES, VENDOR_SUFFIXES, companion_slide

SUFFIXES = (*VENDOR_SUFFIXES, ".tif", ".tiff", ".nii", ".nii.gz", ".npy", *PICTURE_SUFFIXES)
COLUMNS = ("image", "mpp", "target", "spacing")
STORES = ("tiles.zarr", "heatmap.ome.zarr")
"""What marks the output folder of an image; nothing in such a folder is input."""

log = logging.getLogger("gigacam")


def expand(uris: Sequence[str]) -> list[ImageRequest]:
    """List the images that `uris` mean, in order; folders and globs sorted by name.

    A file, a `procedural:` URI, an OME-Zarr directory, a DICOM series and an MRXS folder are one image each.
    Any other folder is searched, deep, for images by suffix and for DICOM series. A `.csv` has a column
    `image` (paths relative to the CSV) and may have `mpp` (um), `target`, `spacing` (mm: `z y x`).
    A path that does not exist stays in the list and fails by name when it is opened. What gigacam wrote is
    left out, so that the same command resumes a run whose outputs lie among its inputs; a file or a Zarr
    store that is named itself is listed all the same.

    Raises
    ------
    SpecError
        A glob or folder without any image, nothing but outputs, or a CSV that does not hold what it should.
    """
    images = [image for uri in uris for image in _expand(uri)]
    if uris and not images:
        msg = f"{', '.join(uris)}: only outputs of gigacam; name such a file or store itself to explain it"
        raise SpecError(msg)
    return images


def _expand(uri: str) -> Iterator[ImageRequest]:
    path = Path(uri.removeprefix("file://")).expanduser()
    if uri.startswith("procedural:") or ("://" in uri and not uri.startswith("file://")):
        yield ImageRequest(uri=uri)
    elif path.is_dir():
        found = list(_folder(path, named=True))
        if not found and any(is_output(p) for p in (path, *path.rglob("*"))):
            log.warning("%s: holds only what gigacam wrote; left out", path)
        elif not found:
            msg = f"{path}: a folder without any image; expected slides, volumes, DICOM series or OME-Zarr in it"
            raise SpecError(msg)
        yield from found
    elif path.suffix.lower() == ".csv":
        yield from _csv(path)
    elif not path.exists() and glob.has_magic(uri):
        matches = sorted(glob.glob(str(path), recursive=True))
        if not matches:
            msg = f"{uri}: no file or folder matches this pattern; quote it if the shell has changed it"
            raise SpecError(msg)
        for match in matches:
            if not any(is_output(p) for p in (Path(match), *Path(match).parents)):
                yield from _expand(match)
    else:
        yield ImageRequest(uri=str(path))


def _folder(folder: Path, named: bool = False) -> Iterator[ImageRequest]:
    from workers.readers.dicom import grouped
    from workers.readers.ngff import is_zarr

    if is_output(folder) and not (named and is_zarr(folder)):
        return
    if is_zarr(folder) or companion_slide(folder):
        yield ImageRequest(uri=str(companion_slide(folder) or folder))
        return
    series = grouped(folder)
    files = [p for p in folder.iterdir() if not p.name.startswith(".")]
    if len(series) == 1 and not any(is_image_file(p) for p in files):
        yield ImageRequest(uri=str(folder))
        series = []
    for entry in sorted(
        [*(p for p in files if p.is_dir() or is_image_file(p)), *(g[0].path for g in series)]
    ):
        if not entry.is_dir():
            yield ImageRequest(uri=str(entry))
        elif companion_slide(entry) is None:
            # an .mrxs file is listed itself; its companion folder would be the same image again
            yield from _folder(entry)


def is_output(folder: Path) -> bool:
    """Whether a folder is a store that gigacam wrote, or the output folder of an image with such a store."""
    return any(_has_ledger(store) for store in (folder, *(folder / name for name in STORES)))


def _has_ledger(store: Path) -> bool:
    try:
        meta = json.loads((store / "zarr.json").read_bytes())
        return "gigacam" in meta["attributes"]
    except (OSError, ValueError, LookupError, TypeError):  # no Zarr group, or one that says nothing of us
        return False


def is_image_file(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith(SUFFIXES)


def _csv(path: Path) -> Iterator[ImageRequest]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            columns = [c.strip() for c in rows.fieldnames or ()]
            rows.fieldnames = columns
            lines = [(rows.line_num, row) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        msg = f"{path}: cannot be read as CSV ({error}); expected UTF-8 text with a header line"
        raise SpecError(msg) from error
    if "image" not in columns or not set(columns) <= set(COLUMNS):
        msg = f"{path}: columns {columns}; expected image, and at most mpp, target, spacing"
        raise SpecError(msg)
    if not lines:
        msg = f"{path}: has no rows below its header"
        raise SpecError(msg)
    for number, row in lines:
        if None in row or any(v is None for v in row.values()):
            msg = f"{path}, line {number}: expected {len(columns)} values ({', '.join(columns)})"
            raise SpecError(msg)
        values = {k: v.strip() for k, v in row.items()}
        options = _options(path, number, values)
        image = values["image"]
        if not image:
            msg = f"{path}, line {number}: the column image is empty"
            raise SpecError(msg)
        if "://" not in image and not image.startswith("procedural:"):
            image = str(path.parent / Path(image).expanduser())
        for request in _expand(image):
            merged = request.options.model_copy(update=options.model_dump(exclude_none=True))
            target = values.get("target", "") or request.target
            yield ImageRequest(uri=request.uri, options=merged, target=target)


def _options(path: Path, number: int, values: dict[str, str]) -> ReadOptions:
    try:
        mpp = values.get("mpp", "")
        spacing = values.get("spacing", "").replace(",", " ").split()
        sizes = [float(v) for v in spacing]
        if len(sizes) not in (0, 3):
            msg = f"spacing has {len(sizes)} values; expected three: z y x in mm"
            raise ValueError(msg)
        return ReadOptions(
            mpp_um=float(mpp) if mpp else None,
            spacing_mm=(sizes[0], sizes[1], sizes[2]) if sizes else None,
        )
    except (ValueError, ValidationError) as error:
        msg = f"{path}, line {number}: {error}"
        raise SpecError(msg) from error
