"""`gigacam export`: finished heatmaps, in the formats of other viewers."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.options import AsJson, words
from schemas.errors import GigacamError, SpecError, StoreError

if TYPE_CHECKING:
    from schemas.export import ExportOptions, ExportReport

log = logging.getLogger("gigacam")


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def export(
        out: Annotated[
            list[str],
            typer.Argument(
                metavar="OUT...",
                help="Folder of gigacam explain --out, or of one of its images.",
                show_default=False,
            ),
        ],
        to: Annotated[
            str,
            typer.Option(
                "--to", help="Formats, comma separated. Default: none; without one they are listed."
            ),
        ] = "",
        channel: Annotated[
            str,
            typer.Option(
                "--channel",
                help="Channels, comma separated: METHOD:TARGET, METHOD, or the index. Default: all of the heatmap.",
            ),
        ] = "",
        threshold: Annotated[
            float | None,
            typer.Option(
                "--threshold",
                help="Raw value (signed maps: magnitude) from which px are a region. Default: half the display window.",
            ),
        ] = None,
        max_regions: Annotated[
            int, typer.Option("--max-regions", help="Regions, and tiles, of a GeoJSON file: the strongest.")
        ] = 10_000,
        partial: Annotated[
            bool,
            typer.Option("--partial", help="Export heatmaps that are not complete too; the files say so."),
        ] = False,
        url: Annotated[
            str,
            typer.Option(
                "--url",
                help="Address at which OUT is served, for neuroglancer and vitessce: http://127.0.0.1:8000/raw/0. Default: none.",
            ),
        ] = "",
        source_url: Annotated[
            str,
            typer.Option(
                "--source-url",
                help="Neuroglancer's data source for the image itself. Default: the heatmap alone.",
            ),
        ] = "",
        as_json: AsJson = False,
    ) -> None:
        """Write finished heatmaps for other viewers, into OUT/IMAGE/export."""
        from workers.export.context import image_folders
        from workers.export.targets import EXPORTS, resolve

        if not words(to):
            listed = "\n".join(f"  {r.name:14} {'/'.join(r.kinds):13} {r.title}" for r in EXPORTS.values())
            msg = f"--to: names no format; the formats are\n{listed}"
            raise SpecError(msg)
        resolve(words(to))
        options = _options(
            channels=words(channel),
            threshold=threshold,
            max_regions=max_regions,
            partial=partial,
            url=url,
            source_url=source_url,
        )
        folders = [folder for one in out for folder in image_folders(one)]
        served = {folder.resolve().parent for folder in folders}
        if url and len(served) > 1:
            msg = f"--url {url}: is the address of one output folder, and {len(served)} are named; export each with its own --url"
            raise SpecError(msg)
        reports = [r for folder in folders for r in export_image(folder, words(to), options, quiet=as_json)]
        if as_json:
            print(json.dumps([r.model_dump(mode="json") for r in reports]))
        if all(r.skipped for r in reports):
            raise SpecError("; ".join(r.skipped for r in reports))
        raise typer.Exit(int(any(r.error for r in reports)))


def check_formats(names: Sequence[str]) -> None:
    """Refuse an unknown format before anything is computed: SpecError."""
    from workers.export.targets import resolve

    resolve(names)


def export_image(
    folder: Path, names: Sequence[str], options: ExportOptions | None = None, quiet: bool = True
) -> tuple[ExportReport, ...]:
    """Write exports of one image; what goes wrong with one ends in its report, and all but those that refer to it go on.

    Raises
    ------
    SpecError
        A format is unknown.
    """
    from schemas.export import ExportReport
    from workers.export.context import ExportContext
    from workers.export.targets import resolve, run_export

    reports: list[ExportReport] = []
    context: ExportContext | None = None
    failed: set[str] = set()
    for row in resolve(names):
        began = time.perf_counter()
        report = ExportReport(image_id=folder.resolve().name, name=row.name)
        try:
            if lacking := failed.intersection(row.needs):
                msg = f"{report.image_id}: {row.name} refers to {', '.join(lacking)}, which could not be written; put that right and export {row.name} again"
                raise StoreError(msg)
            context = context or ExportContext.open(folder, options)
            if context.kind in row.kinds:
                files = tuple(map(str, run_export(row, context)))
                report = report.model_copy(update={"files": files})
            else:
                why = f"{context.image_id}: a {context.kind} has no {row.name} export; it is for {row.kinds[0]}s"
                report = report.model_copy(update={"skipped": why})
        except Exception as error:  # one export's failure, whatever it is, never ends the others
            message = error.message if isinstance(error, GigacamError) else f"{type(error).__name__}: {error}"
            if not isinstance(error, GigacamError):
                log.exception("%s: %s failed", folder, row.name)
            report = report.model_copy(update={"error": message})
            failed.add(row.name)
        reports.append(report.model_copy(update={"seconds": time.perf_counter() - began}))
        if not quiet:
            _say(reports[-1])
    return tuple(reports)


def _say(report: ExportReport) -> None:
    if report.error:
        print(f"error: {report.name}: {report.error}", file=sys.stderr)
    elif report.skipped:
        print(f"skipped     {report.skipped}")
    else:
        first = report.files[0] if len(report.files) == 1 else str(Path(report.files[0]).parent)
        print(f"{report.name:11} {first}  {report.seconds:.1f} s")


def _options(**asked: Any) -> ExportOptions:
    from pydantic import ValidationError

    from flows.options import flag_errors
    from schemas.export import ExportOptions

    try:
        return ExportOptions(**asked)
    except ValidationError as error:
        raise SpecError(flag_errors(error)) from error
