"""The command `fedmed watch`: a page that follows a run."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import webbrowser
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated

import typer

from fedmed_flower.cli.tables import console, input_errors
from fedmed_flower.errors import InputError

# Bytes of the secret part of the address.
_SECRET = 24
# Seconds between two looks whether Ctrl-C was pressed.
_LOOK = 0.5
# Seconds that open requests are given at the end.
_GRACE = 1


def watch(
    folder: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder; it need not exist yet.")
    ],
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the page; 0 takes a free one.")
    ] = 0,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")
    ] = True,
) -> None:
    """Show a run in the browser while it goes on. Ctrl-C ends it; the run is not touched."""
    import secrets

    with input_errors():
        folder = folder.expanduser().absolute()
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file: give the folder of a run")
        with _listening(port) as listener:
            _serve(folder, listener, secrets.token_urlsafe(_SECRET), browser)


def _listening(port: int) -> socket.socket:
    """Return a socket that listens on this machine alone."""
    from fedmed_flower.cli.serving import HOST

    listener = socket.socket()
    try:
        # A port whose last user has just gone can be used at once.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((HOST, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise InputError(
            f"--port {port} cannot be used ({error.strerror}): give another, or leave --port out "
            "for a free one"
        ) from error
    return listener


def _serve(folder: Path, listener: socket.socket, token: str, browser: bool) -> None:
    """Serve the page until Ctrl-C."""
    import asyncio
    import gc

    import uvicorn

    from fedmed_flower.cli.serving import HOST, WatchPage

    class Server(uvicorn.Server):
        # uvicorn looks ten times a second whether it shall end, which costs more than to answer
        # the page once.
        async def main_loop(self) -> None:
            await self.on_tick(0)
            while not self.should_exit:
                await asyncio.sleep(_LOOK)

    port = listener.getsockname()[1]
    url = f"http://{HOST}:{port}/{token}/"
    page = WatchPage(folder, port, token)
    # The plainest parts of uvicorn: others take longer to load than they save.
    config = uvicorn.Config(
        page,
        http="auto",
        loop="asyncio",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=_GRACE,
    )
    console.print(f"{folder} is shown at {url}")
    console.print("The address is secret, and of this machine alone. Ctrl-C ends the page.")
    # What has been loaded is never garbage; to look for some in it costs more than the page.
    gc.freeze()
    try:
        with _opened(url) if browser and _has_screen() else nullcontext():
            Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        # uvicorn passes it on when it has closed the page.
        console.print("the page is closed")


def _has_screen() -> bool:
    """Return whether a browser would open beside the terminal, and not in it."""
    return sys.platform == "darwin" or bool({"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys())


@contextmanager
def _opened(url: str) -> Iterator[None]:
    """Open an address in the browser by a file that only this user can read.

    What stands in a command line, every user of a machine can read.
    """
    with tempfile.TemporaryDirectory(prefix="fedmed-watch-") as folder:
        file = Path(folder, "open.html")
        file.write_text(f'<meta http-equiv="refresh" content="0; url={url}">', encoding="utf-8")
        webbrowser.open(file.as_uri())
        yield
