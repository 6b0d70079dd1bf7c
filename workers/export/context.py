"""What an exporter is given: the finished outputs of one image, the options, and how to reach the source."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from schemas.errors import SourceError, SpecError, StoreError
from schemas.export import ExportOptions
from schemas.image import ImageMeta, Kind, ReadOptions
from schemas.run import HeatmapInfo, ImageReport
from workers.readers import open_image
from workers.readers.reader import Reader
from workers.store.heatmap import HeatmapStore
from workers.store.tiles import TilesStore

log = logging.getLogger("gigacam")

HEATMAP = "heatmap.ome.zarr"


@dataclass(frozen=True)
class ExportContext:
    """One image's outputs, opened for reading."""

    folder: Path
    """`OUT/<image_id>`."""
    heatmap: HeatmapStore
    stored_tiles: TilesStore | None
    report: ImageReport | None
    """None where the run has written none yet."""
    options: ExportOptions

    @classmethod
    def open(cls, folder: str | Path, options: ExportOptions | None = None) -> Self:
        """Open the outputs in `folder`; neither the source nor `tiles.zarr` nor a report needs to be there.

        Raises
        ------
        StoreError
            There is no heatmap, or it is of another version.
        """
        folder = Path(folder)
        tiles = folder / "tiles.zarr"
        return cls(
            folder=folder,
            heatmap=HeatmapStore.open(folder / HEATMAP),
            stored_tiles=TilesStore.open(tiles) if TilesStore.exists(tiles) else None,
            report=_report(folder / "report.json"),
            options=options or ExportOptions(),
        )

    @property
    def image_id(self) -> str:
        return self.folder.resolve().name

    @property
    def info(self) -> HeatmapInfo:
        return self.heatmap.info

    @property
    def kind(self) -> Kind:
        return "slide" if self.info.spacing_unit == "um" else "volume"

    @cached_property
    def channels(self) -> tuple[int, ...]:
        """Indices of the channels asked for, in the heatmap's order.

        Raises
        ------
        SpecError
            The heatmap has no such channel.
        """
        rows = self.info.channels
        chosen: set[int] = set()
        for word in self.options.channels:
            found = {i for i, row in enumerate(rows) if word in (f"{row.method}:{row.target}", row.method)}
            if not found and word.isdigit() and int(word) < len(rows):
                found = {int(word)}
            if not found:
                known = ", ".join(f"{i} {row.method}:{row.target}" for i, row in enumerate(rows))
                msg = f"--channel {word}: {self.image_id} has no such channel; it has {known}"
                raise SpecError(msg)
            chosen |= found
        return tuple(sorted(chosen)) if chosen else tuple(range(len(rows)))

    @property
    def tiles(self) -> TilesStore:
        """`tiles.zarr`; StoreError where it is gone."""
        if self.stored_tiles is None:
            msg = f"{self.folder / 'tiles.zarr'}: is not there, and this export needs the tiles; explain the image again"
            raise StoreError(msg)
        return self.stored_tiles

    @property
    def image(self) -> ImageMeta:
        """What was known of the source when it was explained; the source itself need not be there.

        Raises
        ------
        StoreError
            Neither `tiles.zarr` nor `report.json` is there.
        """
        if self.stored_tiles is not None:
            return self.stored_tiles.info.image
        if self.report is not None and "image" in self.report.provenance:
            return ImageMeta.model_validate(self.report.provenance["image"])
        msg = f"{self.folder}: neither tiles.zarr nor report.json says what the source is; explain the image again"
        raise StoreError(msg)

    @contextmanager
    def source(self) -> Iterator[Reader]:
        """The source, read as it was when it was explained, for as long as the block lasts.

        Raises
        ------
        SourceError
            It is not where it was, or another image lies there.
        """
        meta = self.image
        try:
            reader = open_image(meta.uri, self._read_options())
        except SourceError as error:
            msg = f"{error.message} ({self.image_id} was made from it; if it was moved, explain it again from there: nothing is computed twice)"
            raise SourceError(msg) from error
        try:
            if reader.meta.identity != meta.identity or reader.meta.shape_l0 != self.info.grid.shape_l0:
                msg = (
                    f"{meta.uri}: is no longer the image that {self.image_id} was made from; explain it again"
                )
                raise SourceError(msg)
            yield reader
        finally:
            reader.close()

    def _read_options(self) -> ReadOptions:
        if self.stored_tiles is not None:
            return self.stored_tiles.info.spec.read
        spec = self.report.provenance.get("spec", {}) if self.report is not None else {}
        return ReadOptions.model_validate(spec.get("read", {}))


def image_folders(out: str | Path) -> list[Path]:
    """Folders of the images of an output folder, or that folder itself, by name.

    Raises
    ------
    SpecError
        There is none.
    """
    out = Path(out)
    if (out / HEATMAP).is_dir():
        return [out]
    found = sorted(path.parent for path in out.glob(f"*/{HEATMAP}"))
    if not found:
        below = sorted({path.parent.parent for path in out.glob(f"*/*/{HEATMAP}")})
        hint = f"did you mean {below[0]}?" if below else "give the --out folder of gigacam explain"
        msg = f"{out}: holds no explained image; {hint}"
        raise SpecError(msg)
    return found


def _report(path: Path) -> ImageReport | None:
    if not path.exists():
        return None
    try:
        return ImageReport.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError:
        log.warning("%s is not of this version and is left aside", path)
        return None
