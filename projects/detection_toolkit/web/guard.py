"""What the page's server answers, and to whom: everything else is refused before Gradio sees it.

Gradio has many more routes than the page uses, some of which fetch addresses for whoever asks or
write files. The guard is an ASGI application around all of it, Gradio's own middleware included.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import re
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from ..texts import shown
from .storage import UploadFolder

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["Guard", "ServedNames", "is_loopback"]

logger = logging.getLogger(__name__)

_FILE = "/gradio_api/file="
_JOIN = "/gradio_api/queue/join"
_UPLOAD = "/gradio_api/upload"

# All that the page asks for. A file is looked at besides: it has to be the page's own.
_ROUTES = tuple(
    (method, re.compile(pattern))
    for method, pattern in (
        ("GET", r"/"),
        ("GET", r"/(assets|static)/[\w.@+/-]+"),
        ("GET", r"/(theme\.css|favicon\.ico)"),
        ("GET", r"/gradio_api/startup-events"),  # when Gradio starts; later it does nothing
        ("GET", r"/gradio_api/app_id"),  # after a lost connection
        ("GET", r"/gradio_api/heartbeat/\w+"),
        ("GET", r"/gradio_api/(queue/data|upload_progress)"),
        ("POST", _UPLOAD),
        ("POST", _JOIN),
        ("GET", re.escape(_FILE) + r".+"),
    )
)
# What a server that is about to end waits for, and what it still answers.
_WAITED_FOR = re.compile(f"{_JOIN}|{_UPLOAD}|/gradio_api/queue/data|{_FILE}.+")
_LAST_ANSWERS = ("/gradio_api/queue/data", "/gradio_api/upload_progress", _FILE)

_SESSION = re.compile(r"[\w-]{1,100}")
_BODY = "http.response.body"
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]+)?")

_MAX_PATH = 2000  # letters; of a file's name are 255 allowed
_MAX_CALL = 2**18  # bytes of a call: numbers, and names of files
_MULTIPART = 2**20  # bytes that may surround the file of an upload
_MAX_DRAINED = 2**26  # bytes of a refused request that are read, so that its sender sees why
IDLE_SECONDS = 30.0
"""A request that sends nothing for so long has been broken off."""
UPLOAD_SECONDS = 600.0
"""Within which an upload has to be complete."""


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens at an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class ServedNames:
    """The names under which a browser may know the page.

    Another name in a request's ``Host`` is that of a foreign page, which has pointed its own name
    to this machine to read what is here.
    """

    def __init__(self, host: str, allowed: Sequence[str] = ()):
        """
        Args:
            host: at which the server listens. At an address of this machine alone, names are
                those of this machine alone; else any address will do, and the machine's name.
            allowed: further names, of proxies and in the network's DNS.
        """
        self._local = is_loopback(host)
        self._allowed = {name.lower() for name in allowed}
        self._names = {"localhost", host.lower(), *self._allowed}
        if not self._local:
            own = socket.gethostname().lower()
            self._names |= {own, f"{own}.local"}

    def serves(self, host: str) -> bool:
        """Whether a ``Host`` header, with or without a port, is one of the page's."""
        name = _name_of(host)
        if name is None:
            return False
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        # An address cannot be pointed elsewhere.
        return address.is_loopback or not self._local

    def is_own(self, origin: str, hosts: Sequence[str]) -> bool:
        """Whether an ``Origin`` is the page itself, by the hosts that its request names."""
        scheme, separator, host = origin.lower().partition("://")
        if not separator or scheme not in ("http", "https"):
            return False
        default = ":443" if scheme == "https" else ":80"
        named = {name.lower().strip().removesuffix(default) for name in hosts}
        return host.removesuffix(default) in named or _name_of(host) in self._allowed


def _name_of(host: str) -> str | None:
    match = _HOST.fullmatch(host.lower())
    return match[1].strip("[]").rstrip(".") if match else None


class _Refused(Exception):
    def __init__(self, status: int, text: str):
        super().__init__(text)
        self.status = status


class Guard:
    """An ASGI application around the page's."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        names: ServedNames,
        folder: UploadFolder,
        max_upload: int,
        policy: str,
    ):
        """
        Args:
            app: Gradio's.
            names: of the page.
            folder: of the files that it takes and gives.
            max_upload: bytes of a file.
            policy: Content-Security-Policy of all answers.
        """
        self._app = app
        self._names = names
        self._folder = folder
        self._max_body = max_upload + _MULTIPART
        self._headers = [
            (b"content-security-policy", policy.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"cross-origin-resource-policy", b"same-origin"),
            (b"referrer-policy", b"same-origin"),
        ]
        self._ending = False
        self._unanswered = 0

    @property
    def unanswered(self) -> int:
        """Requests in work, and users who wait for the outcome of one."""
        return self._unanswered

    def end(self) -> None:
        """From now on give only the answers that somebody waits for."""
        self._ending = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return

        has_begun = has_ended = False

        async def send_with_headers(message: Message) -> None:
            nonlocal has_begun, has_ended
            if message["type"] == "http.response.start":
                has_begun = True
                ours = {name for name, _ in self._headers}
                others = [h for h in message.get("headers", []) if h[0].lower() not in ours]
                message = {**message, "headers": [*others, *self._headers]}
            has_ended = has_begun and not message.get("more_body", message["type"] != _BODY)
            await send(message)

        path = _route_path(scope)
        waits = _WAITED_FOR.fullmatch(path) is not None
        body = _Body(receive)
        self._unanswered += waits
        try:
            await self._answer(scope, path, body.receive, send_with_headers)
        except _Refused as refused:
            logger.debug("refused %s %r: %s", scope["method"], path[:80], refused)
            await _say(send_with_headers, refused.status, str(refused), body.drain)
        except Exception as error:
            # What Gradio makes of a request that its page does not send.
            reason = shown(str(error).partition("\n")[0][:200])
            kind = type(error).__name__
            logger.warning("%s %s failed (%s: %s)", scope["method"], shown(path[:80]), kind, reason)
            if not has_begun:
                await _say(send_with_headers, 500, "The request cannot be answered.")
            elif not has_ended:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._unanswered -= waits

    async def _answer(self, scope: Scope, path: str, receive: Receive, send: Send) -> None:
        method = scope["method"]
        self._check_sender(scope, path)
        if (
            len(path) > _MAX_PATH
            or ".." in path.split("/")
            or not any(
                method == allowed and pattern.fullmatch(path) for allowed, pattern in _ROUTES
            )
        ):
            raise _Refused(404, "The page has nothing there.")
        if path.startswith(_FILE) and not self._folder.owns(path[len(_FILE) :]):
            raise _Refused(404, "The page has no such file.")
        if self._ending and not path.startswith(_LAST_ANSWERS):
            raise _Refused(503, "The server is about to end.")
        if path == _JOIN:
            body = await _read(receive)
            self._check_call(body)
            await self._app(scope, _replay(body, receive), send)
        elif path == _UPLOAD:
            await self._take_upload(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check_sender(self, scope: Scope, path: str) -> None:
        headers: dict[bytes, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.lower(), []).append(value.decode("latin-1"))
        hosts = headers.get(b"host", [])
        if len(hosts) != 1 or not self._names.serves(hosts[0]):
            raise _Refused(
                403, "The page is not served under this name; --allowed-host NAME allows it."
            )
        # A foreign page cannot send this header: its browser would have to ask first.
        forwarded = [value.split(",")[0] for value in headers.get(b"x-forwarded-host", [])]
        for origin in headers.get(b"origin", []):
            if not self._names.is_own(origin, [*hosts, *forwarded]):
                raise _Refused(403, "Another page may not use this one.")
        if not {"cross-site", "same-site"}.isdisjoint(headers.get(b"sec-fetch-site", [])):
            opened = (
                scope["method"] == "GET"
                and path == "/"
                and headers.get(b"sec-fetch-mode") == ["navigate"]
                and headers.get(b"sec-fetch-dest") == ["document"]
            )
            if not opened:  # a link to the page is no use of it
                raise _Refused(403, "Another page may not use this one.")

    def _check_call(self, body: bytes) -> None:
        """Gradio would fetch a file whose "path" is an address."""
        try:
            call = json.loads(body)
            fine = isinstance(call, dict) and self._is_local(call)
            if fine and not _SESSION.fullmatch(call.get("session_hash", "")):
                raise ValueError("Gradio waits for nobody")
        except (ValueError, TypeError, RecursionError):
            raise _Refused(400, "The request cannot be read.") from None
        if not fine:
            raise _Refused(403, "Only files that were uploaded here can be used.")

    def _is_local(self, value: Any) -> bool:
        if isinstance(value, dict):
            rest = dict(value)
            if "path" in value:
                path, url = rest.pop("path"), rest.pop("url", None)
                if not isinstance(path, str) or not self._folder.owns(path):
                    return False
                if url is not None and (
                    not isinstance(url, str) or unquote(url.partition(_FILE)[2]) != path
                ):
                    return False
            return all(self._is_local(x) for x in (*rest, *rest.values()))
        if isinstance(value, list):
            return all(self._is_local(x) for x in value)
        return not isinstance(value, str) or "://" not in value

    async def _take_upload(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._max_body:
            raise _Refused(413, "The upload exceeds the maximum allowed size.")
        if not await asyncio.to_thread(self._folder.reserve, self._max_body):
            raise _Refused(503, "Too many pictures are uploaded right now: try again later.")
        upload = _LimitedBody(receive, self._max_body)
        answer: list[Message] = []

        async def keep(message: Message) -> None:
            answer.append(message)

        try:
            await self._app(scope, upload.receive, keep)
        except Exception:
            # What Gradio makes of a body that ends early.
            if upload.refused is None and not upload.broken_off:
                raise
        finally:
            self._folder.release(self._max_body)
        if upload.refused is not None:
            raise upload.refused
        # Now only: Gradio puts the file where the answer says after it has answered.
        for message in answer:
            await send(message)


class _Body:
    """The body of a request, of which some may be left when it is refused."""

    def __init__(self, receive: Receive):
        self._receive = receive
        self._complete = False

    async def receive(self) -> Message:
        message = await self._receive()
        self._complete = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message

    async def drain(self) -> None:
        """Read on for a while: a connection that closes early shows its sender no answer."""
        left, deadline = _MAX_DRAINED, time.monotonic() + IDLE_SECONDS
        while left > 0 and not self._complete:
            try:
                message = await asyncio.wait_for(self.receive(), deadline - time.monotonic())
            except asyncio.TimeoutError:
                return
            left -= len(message.get("body", b""))


class _LimitedBody:
    """The body of a request, which ends where it becomes too large or too slow."""

    def __init__(self, receive: Receive, max_body: int):
        self._receive = receive
        self._left = max_body
        self._deadline = time.monotonic() + UPLOAD_SECONDS
        self._complete = False
        self.refused: _Refused | None = None
        self.broken_off = False

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        if self.refused is not None:
            return {"type": "http.disconnect"}
        wait = min(IDLE_SECONDS, self._deadline - time.monotonic())
        try:
            message = await asyncio.wait_for(self._receive(), max(wait, 0))
        except asyncio.TimeoutError:
            self.refused = _Refused(408, "The upload takes too long.")
            return {"type": "http.disconnect"}
        if message["type"] == "http.disconnect":
            self.broken_off = True
            return message
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            self.refused = _Refused(413, "The upload exceeds the maximum allowed size.")
            return {"type": "http.disconnect"}
        self._complete = not message.get("more_body", False)
        return message


async def _read(receive: Receive) -> bytes:
    """The whole body of a call."""
    body = bytearray()
    more = True
    while more:
        try:
            message = await asyncio.wait_for(receive(), IDLE_SECONDS)
        except asyncio.TimeoutError:
            raise _Refused(408, "The request takes too long.") from None
        if message["type"] == "http.disconnect":
            raise _Refused(400, "The request was broken off.")
        body += message.get("body", b"")
        if len(body) > _MAX_CALL:
            raise _Refused(413, "The request exceeds the maximum allowed size.")
        more = message.get("more_body", False)
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


async def _say(
    send: Send, status: int, text: str, before_end: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Answer in words; what comes before the end does not keep them waiting."""
    body = text.encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    if before_end is not None:
        await before_end()
    await send({"type": "http.response.body", "body": b""})


def _route_path(scope: Scope) -> str:
    """Without the path at which a proxy shows the page, if the proxy has left it there."""
    path: str = scope["path"]
    root = scope.get("root_path", "").rstrip("/")
    if root and (path == root or path.startswith(root + "/")):
        return path[len(root) :] or "/"
    return path
