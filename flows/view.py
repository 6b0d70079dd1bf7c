"""`gigacam view`: the web viewer over finished and running output folders."""

from __future__ import annotations

import os
import re
import secrets
import socket
import sys
import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from schemas.errors import SpecError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
TOKEN = r"[A-Za-z0-9._~-]"
"""What a token is made of."""

Outs = Annotated[
    list[str], typer.Argument(metavar="OUT...", help="Output folders of gigacam explain.", show_default=False)
]
Port = Annotated[int, typer.Option("--port", help="0: a free one.", min=0, max=65535)]
Host = Annotated[
    str,
    typer.Option(
        "--host",
        help="Address to listen at; any but this machine's own needs a token, which is made if none is given.",
    ),
]
Token = Annotated[str, typer.Option("--token", help="Who does not bring it sees nothing. Default: none.")]
Cors = Annotated[
    str,
    typer.Option(
        "--cors",
        metavar="ORIGIN",
        help="Origin of a web viewer that may read the OME-Zarr by URL; *: any. Default: none.",
    ),
]
Source = Annotated[
    list[str],
    typer.Option(
        "--source",
        metavar="DIR",
        help="Where images lie that were moved since; found by name, taken if unchanged. Default: where they were.",
    ),
]
Label = Annotated[
    bool,
    typer.Option("--label", help="Show the pictures of a slide's label and glass, which may bear a name."),
]
Open = Annotated[bool, typer.Option("--open/--no-open", help="Open the page in this machine's browser.")]


def register(app: typer.Typer) -> None:
    """Add the command to the application."""

    @app.command()
    def view(out: Outs, port: Port = 8765, host: Host = "127.0.0.1", token: Token = "", cors: Cors = "",
             source: Source = [], label: Label = False, open_page: Open = False) -> None:  # fmt: skip  # noqa: B006
        """Show heatmaps in a browser: a gallery, slides and volumes under heat; nothing leaves this machine."""
        folders = run_folders(out)
        sources = tuple(_folder(name, "--source") for name in source)
        serve(folders, sources, host, port, token, cors, label, open_page)


def run_folders(out: list[str]) -> tuple[Path, ...]:
    """The output folders named, each with something to show.

    Raises
    ------
    SpecError
        One of them is none.
    """
    from workers.viewer.catalog import BATCH, image_folders

    found = []
    for name in out:
        folder = _folder(name, "OUT")
        if not image_folders(folder) and not os.path.exists(folder / BATCH):
            others = [p for p in (folder / "run", folder.absolute().parent) if image_folders(p)]
            hint = f"did you mean {others[0]}?" if others else "give what was the --out of gigacam explain"
            msg = f"{folder}: holds no run of gigacam; {hint}"
            raise SpecError(msg)
        found.append(folder.absolute())
    return tuple(dict.fromkeys(found))


def serve(
    folders: tuple[Path, ...], sources: tuple[Path, ...], host: str, port: int, token: str, cors: str,
    label: bool, open_page: bool,
) -> None:  # fmt: skip
    """Serve until Ctrl-C.

    Raises
    ------
    SpecError
        The address or port cannot be had, or the token has what an address cannot hold as it is.
    """
    from workers.viewer.app import http_server
    from workers.viewer.pages import Settings

    cors = cors.rstrip("/")
    if cors and not re.fullmatch(r"\*|https?://[^/\s,]+", cors):
        msg = f"--cors {cors}: expected the origin of a page, such as https://viewer.example.org, or *"
        raise SpecError(msg)
    if strange := re.sub(TOKEN, "", token):
        msg = f"--token: has {strange!r}; expected letters, digits and . _ ~ -, which an address holds as they are. Choose another token"
        raise SpecError(msg)
    local = host in LOOPBACK
    if not local and not token:
        token = secrets.token_urlsafe(16)
    settings = Settings(
        folders, sources, hosts=LOOPBACK if local else (), token=token, cors=cors, label=label
    )
    listening = _listen(host, port)
    name = f"[{host}]" if ":" in host else host
    url = f"http://{name}:{listening.getsockname()[1]}/" + (f"?token={token}" if token else "")
    print(f"viewer: {url}\nCtrl-C ends it", flush=True)
    if open_page:
        webbrowser.open(url)
    try:
        http_server(settings).run(sockets=[listening])
    except KeyboardInterrupt:
        print("viewer ended", file=sys.stderr)
    finally:
        listening.close()


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
            listening.listen(2048)  # who is quick may knock before the server has started
        except OSError:
            listening.close()
            raise
    except OSError as error:
        msg = f"--host {host} --port {port}: cannot listen there ({error.strerror or error}); choose another port, or 0 for a free one"
        raise SpecError(msg) from error
    return listening


def _folder(name: str, what: str) -> Path:
    folder = Path(name).expanduser()
    if not os.path.isdir(folder):
        msg = f"{what} {folder}: no such folder; check the path"
        raise SpecError(msg)
    return folder
