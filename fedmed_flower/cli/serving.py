"""The page of `fedmed watch`: three addresses behind a secret one, on this machine alone."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

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
# A stranger may have written the report: in its frame or tab it loads nothing, reaches nothing of
# this page, and runs no script but the one of this package's reports.
_REPORT = (
    "sandbox allow-scripts; default-src 'none'; script-src {script}; style-src 'unsafe-inline'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)


@dataclass(frozen=True)
class _Answer:
    """What is sent back: status, body, and headers beside those of every answer."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


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

    async def __call__(
        self,
        scope: Mapping[str, Any],
        receive: Callable[[], Awaitable[Any]],
        send: Callable[[dict[str, Any]], Awaitable[None]],
    ) -> None:
        """Answer a request; what it carries is not read."""
        if scope["type"] != "http":
            return
        # Nothing here waits, so that the folder never has two readers at once.
        answer = self._answer(scope)
        headers = {**_HEADERS, **answer.headers, "Content-Length": str(len(answer.body))}
        if answer.status == 304:
            del headers["Content-Length"]
        pairs = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": pairs})
        await send({"type": "http.response.body", "body": answer.body})

    def _answer(self, scope: Mapping[str, Any]) -> _Answer:
        headers = [(name, value.decode("latin-1")) for name, value in scope["headers"]]
        hosts = [value.lower() for name, value in headers if name == b"host"]
        if len(hosts) != 1 or hosts[0] not in self._hosts:
            return _refusal(421, "this is not the address of the page")
        if scope["method"] != "GET":
            return _refusal(405, "only GET is answered")
        token, slash, name = scope["path"].removeprefix("/").partition("/")
        if slash and secrets.compare_digest(token.encode(), self._token):
            if name == "":
                return _content(self._page.encode(), "text/html", self._policy)
            if name == "state":
                known = [value for key, value in headers if key == b"if-none-match"]
                query = parse_qs(scope["query_string"].decode("latin-1"))
                return self._state(known, {key: values[0] for key, values in query.items()})
            if name == "report":
                return self._report()
        return _refusal(404, "there is nothing at this address")

    def _state(self, known: list[str], asked: Mapping[str, str]) -> _Answer:
        """Return what has happened, and of the chosen metric what has been added."""
        digest = hashlib.sha256(self._run.refresh().encode()).hexdigest()
        tag = f'"{digest[:32]}"'
        if tag in known:
            return _Answer(304, headers={"ETag": tag})
        state = self._run.state()
        chosen = (asked.get("phase", ""), asked.get("metric", ""))
        phase, metric = chosen if all(chosen) else state["main"]
        since = _whole(asked.get("since", ""))
        curve = self._run.curve(phase, metric, _whole(asked.get("generation", "")), since)
        state["curve"] = {"phase": phase, "metric": metric, **curve}
        body = json.dumps(state, allow_nan=False, separators=(",", ":")).encode()
        return _content(body, "application/json", _NOTHING, {"ETag": tag})

    def _report(self) -> _Answer:
        try:
            content = self._run.report()
        except OSError as error:
            return _refusal(404, f"there is no report: {error.strerror}")
        script = files("fedmed_flower.reports").joinpath("script.js").read_text(encoding="utf-8")
        return _content(content, "text/html", _REPORT.format(script=_named(script)))


def _content(
    body: bytes, media_type: str, policy: str, more: Mapping[str, str] | None = None
) -> _Answer:
    headers = {"Content-Type": f"{media_type}; charset=utf-8", "Content-Security-Policy": policy}
    return _Answer(200, body, {**headers, **(more or {})})


def _refusal(status: int, text: str) -> _Answer:
    headers = {"Content-Type": "text/plain; charset=utf-8", "Content-Security-Policy": _NOTHING}
    return _Answer(status, text.encode(), headers)


def _hash_of(page: str, tag: str) -> str:
    """Return how a policy names the one script or style of a page."""
    (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    return _named(content)


def _named(content: str) -> str:
    """Return a script or style as a policy names it."""
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _whole(text: str) -> int:
    """Return a whole number from 0 on; -1 if the text is another one."""
    return int(text) if text.isdecimal() and len(text) < 13 else -1
