"""`gigacam report`: pages to read, print and keep, of finished runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from schemas.errors import GigacamError, SpecError

if TYPE_CHECKING:
    from schemas.run import ImageReport, RunReport

RUN, IMAGE = "run.json", "report.json"


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def report(
        out: Annotated[
            list[str], typer.Argument(metavar="OUT...", help="Output folders of gigacam explain, or folders of single images.", show_default=False)
        ],
        top: Annotated[int, typer.Option("--top", min=0, help="Strongest tiles to show of each map.")] = 4,
        batch_only: Annotated[
            bool, typer.Option("--batch-only", help="Write the page of the whole run alone, not one for each image.")
        ] = False,
    ) -> None:  # fmt: skip
        """Write a report of each image and of each run: one HTML file each, to read, print or send."""
        folders = [Path(name) for name in out]
        for folder in folders:
            _check(folder)
        failed = False
        for folder in folders:
            failed |= not report_folder(folder, top, batch_only)
        if failed:
            raise typer.Exit(1)


def _check(folder: Path) -> None:
    if (folder / RUN).is_file() or (folder / IMAGE).is_file():
        return
    below = sorted(path.parent for path in folder.glob(f"*/{RUN}"))
    hint = f"did you mean {below[0]}?" if below else "give the --out folder of gigacam explain"
    msg = f"{folder}: holds neither {RUN} nor {IMAGE}; {hint}"
    raise SpecError(msg)


def report_folder(folder: Path, top: int, batch_only: bool) -> bool:
    """Write the pages of a run, or of one image's folder; whether all were."""
    if not (folder / RUN).is_file():
        return _image(folder, _read_image(folder / IMAGE), "", top)
    from workers.report.batch import write_batch_page
    from workers.report.private import names_of

    run = _read_run(folder / RUN)
    names = names_of(run.images)
    complete = True
    if not batch_only:
        for image, name in zip(run.images, names, strict=True):
            page = folder / image.image_id / IMAGE
            if image.image_id and image.status != "duplicate" and page.is_file():
                complete &= _image(page.parent, _read_image(page), name, top)
    print(write_batch_page(folder, run, names))
    return complete


def _image(folder: Path, report: ImageReport, name: str, top: int) -> bool:
    # Loaded here: a wrong request is answered before torch is imported for its tables of methods.
    from workers.cam.bag_methods import BAG_METHODS
    from workers.cam.methods import METHODS
    from workers.report.image import write_image_page
    from workers.report.private import names_of

    tile_methods = {key: row.info for key, row in METHODS.items()}
    bag_methods = {key: row.info for key, row in BAG_METHODS.items()}
    try:
        print(write_image_page(folder, name or names_of([report])[0], report, tile_methods, bag_methods, top))
    except GigacamError as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    return True


def _read_run(path: Path) -> RunReport:
    from pydantic import ValidationError

    from schemas.run import RunReport

    try:
        return RunReport.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise SpecError(_other_version(path, error)) from error


def _read_image(path: Path) -> ImageReport:
    from pydantic import ValidationError

    from schemas.run import ImageReport

    try:
        return ImageReport.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise SpecError(_other_version(path, error)) from error


def _other_version(path: Path, error: Exception) -> str:
    return f"{path}: was not written by this version of gigacam ({error}); explain again"
