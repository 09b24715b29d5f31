"""The page of `fedmed watch`: three addresses behind a secret one, on this machine alone."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from fedmed_flower.reports.live import LiveFolder

HOST = "127.0.0.1"
# No page of another site can read or frame what is answered.
_HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_NOTHING = "default-src 'none'; frame-ancestors 'none'"
# A stranger may have written the report: it runs no script and loads nothing, also in its own tab.
_REPORT = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'"
)


class WatchPage:
    """An ASGI application that shows a run folder under ``/TOKEN/``.

    It answers GET alone, and only if the request was addressed to this machine: somebody else's
    name can be made to point here (DNS rebinding), and a browser then sends that name as the host.

    Parameters
    ----------
    folder : Path
        A run folder; it need not exist yet.
    port : int
        The port that requests are addressed to.
    token : str
        The secret part of the address, without which nothing is shown.
    """

    def __init__(self, folder: Path, port: int, token: str) -> None:
        self._run = LiveFolder(folder)
        self._token = token.encode()
        names = (HOST, "localhost")
        self._hosts = {f"{name}:{port}" for name in names} | (set(names) if port == 80 else set())
        self._page = files("fedmed_flower.cli").joinpath("watch.html").read_text(encoding="utf-8")
        # Its own script and style are all that runs.
        self._policy = (
            f"default-src 'none'; script-src {_hash_of(self._page, 'script')}; "
            f"style-src {_hash_of(self._page, 'style')}; connect-src 'self'; frame-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "http":
            # Nothing here waits, so that the folder never has two readers at once.
            await self._answer(Request(scope))(scope, receive, send)

    def _answer(self, request: Request) -> Response:
        hosts = request.headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self._hosts:
            return _refusal(421, "this is not the address of the page")
        if request.method != "GET":
            return _refusal(405, "only GET is answered")
        _, _, path = request.url.path.partition("/")
        token, slash, name = path.partition("/")
        if slash and secrets.compare_digest(token.encode(), self._token):
            if name == "":
                return _response(self._page.encode(), "text/html", self._policy)
            if name == "state":
                return self._state(request)
            if name == "report":
                return self._report()
        return _refusal(404, "there is nothing at this address")

    def _state(self, request: Request) -> Response:
        stamp = hashlib.sha256(self._run.refresh().encode()).hexdigest()[:32]
        tag = {"ETag": f'"{stamp}"'}
        if request.headers.get("if-none-match") == tag["ETag"]:
            return Response(status_code=304, headers={**_HEADERS, **tag})
        asked = request.query_params
        state = self._run.state()
        chosen = (asked.get("phase", ""), asked.get("metric", ""))
        phase, metric = chosen if all(chosen) else state["main"]
        since = _whole(asked.get("since", ""))
        curve = self._run.curve(phase, metric, _whole(asked.get("generation", "")), since)
        state["curve"] = {"phase": phase, "metric": metric, **curve}
        body = json.dumps(state, allow_nan=False, separators=(",", ":")).encode()
        return _response(body, "application/json", _NOTHING, tag)

    def _report(self) -> Response:
        try:
            content = self._run.report()
        except OSError as error:
            return _refusal(404, f"there is no report: {error.strerror}")
        return _response(content, "text/html", _REPORT)


def _response(
    body: bytes, media_type: str, policy: str, more: Mapping[str, str] | None = None
) -> Response:
    headers = {**_HEADERS, **(more or {}), "Content-Security-Policy": policy}
    return Response(body, headers=headers, media_type=media_type)


def _refusal(code: int, text: str) -> Response:
    return PlainTextResponse(text, code, {**_HEADERS, "Content-Security-Policy": _NOTHING})


def _hash_of(page: str, tag: str) -> str:
    """Return how a policy names the one script or style of a page."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _whole(text: str) -> int:
    """Return a whole number from 0 on; -1 if the text is another one."""
    return int(text) if text.isdecimal() and len(text) < 13 else -1
