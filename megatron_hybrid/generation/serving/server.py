"""The place where connections come in, each of which gets a thread of its own."""

import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from socketserver import TCPServer
from threading import BoundedSemaphore, Condition, Thread
from typing import Any

from megatron_hybrid.errors import UserError
from megatron_hybrid.generation.serving.asked import Served
from megatron_hybrid.generation.serving.connection import Connection
from megatron_hybrid.generation.serving.loop import Loop

logger = logging.getLogger(__name__)

MOST_CONNECTIONS = 1024


@dataclass(frozen=True)
class Api:
    """What the threads of a server answer by."""

    served: Served
    loop: Loop


class Server(ThreadingHTTPServer):
    """A place that is taken at once, and listened at from `open` on.

    Raises:
        UserError: the place cannot be had.
    """

    daemon_threads = True
    block_on_close = False
    allow_reuse_port = False
    request_queue_size = 128

    def __init__(self, host: str, port: int) -> None:
        self.api: Api | None = None
        self._thread: Thread | None = None
        self._connections = BoundedSemaphore(MOST_CONNECTIONS)
        self._answering, self._changed = 0, Condition()
        self._host, self._port = host, port
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            self.address_family = found[0][0]
            super().__init__((host, port), Connection, bind_and_activate=False)
            self.server_bind()
        except (OSError, UnicodeError) as error:
            if hasattr(self, "socket"):
                self.server_close()
            raise self._refused(error) from error

    def server_bind(self) -> None:
        """As HTTPServer's, which asks the network for this machine's name."""
        TCPServer.server_bind(self)

    def _refused(self, error: Exception) -> UserError:
        why = getattr(error, "strerror", None) or error
        return UserError(f"--serve {self._port} cannot listen at --host {self._host}: {why}")

    @property
    def url(self) -> str:
        """Its address, with the port that was found where 0 asked for any."""
        host, port = self.socket.getsockname()[:2]
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def open(self, api: Api) -> None:
        """Listen, in a thread of its own.

        Raises:
            UserError: somebody else does by now.
        """
        self.api = api
        try:
            self.server_activate()
        except OSError as error:
            raise self._refused(error) from error
        self._thread = Thread(target=self.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listen no longer; connections that there are stay."""
        if self._thread is not None:
            self.shutdown()
        self.server_close()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """While a thread has a request."""
        with self._changed:
            self._answering += 1
        try:
            yield
        finally:
            with self._changed:
                self._answering -= 1
                self._changed.notify_all()

    def wait(self, seconds: float) -> None:
        """Until all requests have their answers."""
        with self._changed:
            self._changed.wait_for(lambda: not self._answering, timeout=seconds)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a connection a thread, or none where there are too many."""
        if not self._connections.acquire(blocking=False):
            request.setblocking(False)
            request.send(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n")
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._connections.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """As its base's."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Where the base class would print: a connection that broke is nobody's fault here."""
        broke = isinstance(sys.exception(), OSError)
        logger.log(
            logging.DEBUG if broke else logging.ERROR, "connection of %s", client_address,
            exc_info=True,
        )  # fmt: skip
