"""Where a viewer in a browser finds the heatmap."""

from __future__ import annotations

from urllib.parse import quote, urlsplit

from schemas.errors import SpecError
from workers.export.context import HEATMAP, ExportContext


def heatmap_url(context: ExportContext, name: str) -> str:
    """Address of the heatmap's folder, from `--url`, at which the output folder is served.

    Parameters
    ----------
    name
        Of the export, for the message.

    Raises
    ------
    SpecError
        There is no `--url`, or it is no http or https address.
    """
    url = context.options.url.rstrip("/")
    if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
        msg = (
            f"export {name!r}: --url {context.options.url!r}: the viewer loads the heatmap through the web; give the address at "
            "which the output folder is served, such as http://127.0.0.1:8000/raw/0 of gigacam view --cors"
        )
        raise SpecError(msg)
    return f"{url}/{quote(context.image_id)}/{HEATMAP}"
