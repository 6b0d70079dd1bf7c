"""`gigacam napari`: an image and its heatmap in napari, an optional extra."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Annotated

import typer

from flows.options import words
from schemas.errors import GigacamError, SpecError

log = logging.getLogger("gigacam")


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command()
    def napari(
        out: Annotated[
            str,
            typer.Argument(
                metavar="OUT", help="Folder of one explained image: OUT/IMAGE.", show_default=False
            ),
        ],
        channel: Annotated[
            str,
            typer.Option(
                "--channel",
                help="Channels, comma separated: METHOD:TARGET, METHOD, or the index. Default: all.",
            ),
        ] = "",
    ) -> None:
        """Open an image and its heatmap in napari (install gigacam[napari])."""
        from schemas.export import ExportOptions
        from workers.export.context import ExportContext, image_folders
        from workers.export.layers import heat_layers, show, source_layer
        from workers.export.words import INTENDED_USE

        folders = image_folders(out)
        if len(folders) > 1:
            named = ", ".join(str(f) for f in folders[:5])
            msg = f"{out}: holds {len(folders)} images; name the folder of one: {named}{', ...' if len(folders) > 5 else ''}"
            raise SpecError(msg)
        context = ExportContext.open(folders[0], ExportOptions(channels=words(channel)))
        with ExitStack() as opened:
            layers = heat_layers(context)
            try:
                layers.insert(0, source_layer(opened.enter_context(context.source()), context.image_id))
            except GigacamError as error:
                log.warning("the heatmap is shown without its source: %s", error.message)
            show(layers, f"{context.image_id}   {INTENDED_USE}")
