"""One connection: HTTP/1.1 of the standard library, with limits, and what it is asked for."""

import io
import json
import logging
import select
import socket
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from queue import Empty
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from megatron_hybrid.generation.request import Event
from megatron_hybrid.generation.serving.answer import Answer
from megatron_hybrid.generation.serving.asked import read_asked
from megatron_hybrid.generation.serving.loop import Ticket
from megatron_hybrid.generation.serving.refused import RefusedError
from megatron_hybrid.json_text import parse_json

if TYPE_CHECKING:
    from megatron_hybrid.generation.serving.server import Api, Server

logger = logging.getLogger(__name__)

MOST_BODY_BYTES = 16 * 2**20
# For a request to come in (headers, and again its body), and for a client to take a piece.
TIMEOUT_S = 60.0
# How often a thread that waits for events looks whether its client is still there.
_LOOK_S = 0.25
# After a refusal, for the client to see it: what it still sends is read that long.
_LINGER_S = 2.0
_POSTS = ("/v1/completions", "/v1/chat/completions")
_GETS = ("/v1/models", "/health")


class _Until(socket.SocketIO):
    """A connection's input, until a moment."""

    end = 0.0

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(max(self.end - time.monotonic(), 0.001))  # type: ignore[attr-defined]
        return super().readinto(buffer)


class Connection(BaseHTTPRequestHandler):
    """One connection, and its requests one after the other."""

    protocol_version = "HTTP/1.1"
    server_version, sys_version = "megatron-hybrid", ""
    disable_nagle_algorithm = True
    server: "Server"

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self._input = _Until(self.connection, "r")
        self.rfile = io.BufferedReader(self._input)

    def handle_one_request(self) -> None:
        self._begun = self._read = False
        self._input.end = time.monotonic() + TIMEOUT_S
        super().handle_one_request()

    def do_GET(self) -> None:
        self._read = not any(n in self.headers for n in ("Content-Length", "Transfer-Encoding"))
        self._guarded(self._get)

    def do_POST(self) -> None:
        self._guarded(self._post)

    def _guarded(self, work: Callable[[], None]) -> None:
        """Whatever goes wrong is the answer, where none has begun."""
        with self.server.answering():
            try:
                work()
            except RefusedError as refused:
                self._refuse(refused)
            except OSError:  # the client has gone, or takes nothing
                self.close_connection = True
            except Exception:
                logger.exception("%s %s", self.command, self.path)
                self._refuse(RefusedError(500, "the server failed; its log says how"))

    # -- routes ------------------------------------------------------------------------------------

    @property
    def _api(self) -> "Api":
        assert self.server.api is not None
        return self.server.api

    @property
    def _route(self) -> str:
        return unquote(self.path.partition("?")[0]).rstrip("/")

    def _get(self) -> None:
        served = self._api.served
        model = {"id": served.name, "object": "model", "created": served.created,
                 "owned_by": "megatron-hybrid"}  # fmt: skip
        if self._route == "/health":
            ending = self._api.loop.closed
            self._say(503 if ending else 200, {"status": "ending" if ending else "ok"})
        elif self._route == "/v1/models":
            self._say(200, {"object": "list", "data": [model]})
        elif self._route == f"/v1/models/{served.name}":
            self._say(200, model)
        else:
            raise self._no_route("POST" if self._route in _POSTS else None)

    def _post(self) -> None:
        if self._route not in _POSTS:
            gets = ("/health", "/v1/models", f"/v1/models/{self._api.served.name}")
            raise self._no_route("GET" if self._route in gets else None)
        api = self._api
        asked = read_asked(self._body(), api.served, chat=self._route == "/v1/chat/completions")
        ticket = api.loop.hand_in(asked.prompts, asked.params)
        try:
            answer, events = Answer(asked, api.served), self._events(ticket)
            if asked.stream:
                self._stream(answer.chunks(events))
            else:
                self._say(200, answer.whole(events))
        finally:
            api.loop.give_up(ticket)

    def _no_route(self, other: str | None) -> RefusedError:
        if other is not None:
            return RefusedError(405, f"{self._route} takes {other}", headers={"Allow": other})
        return RefusedError(
            404, f"there is no {self._route[:100]!r}; allowed: {', '.join((*_POSTS, *_GETS))}"
        )

    def _events(self, ticket: Ticket) -> Iterator[tuple[int, Event]]:
        """Events of a ticket to their end, as long as the client is there."""
        left = len(ticket.prompts) * ticket.params.n
        while left:
            if _hung_up(self.connection):
                raise ConnectionAbortedError
            try:
                item = ticket.events.get(timeout=_LOOK_S)
            except Empty:
                continue
            if item is None:
                raise RefusedError(503, "the server ended before the answer did")
            left -= item[1].end is not None
            yield item

    # -- bodies ------------------------------------------------------------------------------------

    def _body(self) -> Any:
        self._check_head()
        length = int(self.headers["Content-Length"])
        self._input.end = time.monotonic() + TIMEOUT_S
        try:
            data = self.rfile.read(length)
        except TimeoutError:
            raise RefusedError(408, f"the body did not come within {TIMEOUT_S:g} s") from None
        if len(data) < length:
            raise ConnectionAbortedError
        self._read = True
        try:
            return parse_json(data)
        except ValueError as error:
            raise RefusedError(400, f"the body is not JSON: {error}") from None

    def _check_head(self) -> None:
        """Refuse what need not be read."""
        length = self.headers["Content-Length"]
        if length is None or "Transfer-Encoding" in self.headers:
            raise RefusedError(411, "the body needs a Content-Length")
        if not (length.isascii() and length.isdecimal() and len(length) < 20):
            raise RefusedError(400, f"Content-Length={length[:50]!r} must be a whole number")
        if int(length) > MOST_BODY_BYTES:
            raise RefusedError(
                413, f"the body has {length} bytes; allowed: at most {MOST_BODY_BYTES}"
            )
        kind = self.headers.get_content_type()
        if kind != "application/json":
            # Also what keeps a page in a browser, which may send other types, from asking.
            raise RefusedError(415, f"Content-Type={kind[:100]!r} must be 'application/json'")

    def handle_expect_100(self) -> bool:
        """Ask for the body only where it is going to be read."""
        try:
            self._check_head()
        except RefusedError as refused:
            self._refuse(refused)
            return False
        return super().handle_expect_100()

    # -- answers -----------------------------------------------------------------------------------

    def _say(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content, allow_nan=False).encode()
        length = {"Content-Length": str(len(data))}
        self._head(status, "application/json", length | (headers or {}))
        if self.command != "HEAD":
            self.wfile.write(data)

    def _head(self, status: int, kind: str, headers: dict[str, str]) -> None:
        self.connection.settimeout(TIMEOUT_S)
        self._begun = True
        if self._api.loop.closed:
            self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _stream(self, chunks: Iterator[dict[str, Any]]) -> None:
        """Server-sent events, in chunks of HTTP where the client knows them."""
        chunked = self.request_version != "HTTP/1.0"
        self.close_connection = self.close_connection or not chunked
        headers = {"Cache-Control": "no-cache"} | (
            {"Transfer-Encoding": "chunked"} if chunked else {}
        )
        self._head(200, "text/event-stream", headers)

        def send(text: str) -> None:
            data = f"data: {text}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data) if chunked else data)

        try:
            for chunk in chunks:
                send(json.dumps(chunk, allow_nan=False))
        except RefusedError as refused:
            send(json.dumps(refused.content))
            self.close_connection = True
        else:
            send("[DONE]")
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def _refuse(self, refused: RefusedError) -> None:
        if self._begun:
            self.close_connection = True
            return
        # What is still to come of the request would be taken for the next one.
        self.close_connection = self.close_connection or not self._read
        try:
            self._say(refused.status, refused.content, refused.headers)
            if not self._read:
                self._linger()
        except OSError:
            self.close_connection = True

    def _linger(self) -> None:
        """Read on for a moment: closed with something unread, a connection loses its answer."""
        self.connection.shutdown(socket.SHUT_WR)
        end = time.monotonic() + _LINGER_S
        while (left := end - time.monotonic()) > 0:
            self.connection.settimeout(left)
            if not self.connection.recv(2**16):
                return

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class finds wrong with a request, as all else is told."""
        self.close_connection = True
        self._refuse(RefusedError(int(code), message or self.responses[code][0]))

    def log_message(self, format: str, *args: Any) -> None:
        """No access log, but for who debugs."""
        logger.debug("%s %s", self.address_string(), format % args)


def _hung_up(connection: socket.socket) -> bool:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    if not poll.poll(0):
        return False
    try:
        return connection.recv(1, socket.MSG_PEEK) == b""
    except OSError:
        return True
