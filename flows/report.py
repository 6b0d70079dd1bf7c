"""`gigacam report`: pages to read, print and keep, of finished runs."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from schemas.errors import GigacamError, SpecError

if TYPE_CHECKING:
    from schemas.run import RunReport

log = logging.getLogger("gigacam")

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
        return _image(folder, "", top)
    from workers.report.batch import write_batch_page
    from workers.report.private import names_of

    run = _read_run(folder / RUN)
    names = names_of(run.images)
    complete = True
    if not batch_only:
        for image, name in zip(run.images, names, strict=True):
            own = folder / image.image_id
            if image.image_id and image.status != "duplicate" and (own / IMAGE).is_file():
                complete &= _image(own, name, top)
    print(write_batch_page(folder, run, names))
    return complete


def _image(folder: Path, name: str, top: int) -> bool:
    from pydantic import ValidationError

    # Loaded here: a wrong request is answered before torch is imported for its tables of methods.
    from schemas.run import ImageReport
    from workers.cam.bag_methods import BAG_METHODS
    from workers.cam.methods import METHODS
    from workers.report.image import write_image_page
    from workers.report.private import names_of

    tile_methods = {key: row.info for key, row in METHODS.items()}
    bag_methods = {key: row.info for key, row in BAG_METHODS.items()}
    path = folder / IMAGE
    try:
        report = ImageReport.model_validate_json(path.read_text(encoding="utf-8"))
        print(write_image_page(folder, name or names_of([report])[0], report, tile_methods, bag_methods, top))
    except Exception as error:  # one image's page, whatever is wrong with it, never ends the others
        if isinstance(error, GigacamError):
            message = error.message
        elif isinstance(error, ValidationError):
            message = _other_version(path, error)
        else:
            message = f"{path}: {type(error).__name__}: {error}"
            log.exception("%s: its page failed", folder)
        print(f"error: {message}", file=sys.stderr)
        return False
    return True


def _read_run(path: Path) -> RunReport:
    from pydantic import ValidationError

    from schemas.run import RunReport

    try:
        return RunReport.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise SpecError(_other_version(path, error)) from error


def _other_version(path: Path, error: Exception) -> str:
    return f"{path}: was not written by this version of gigacam ({error}); explain again"
