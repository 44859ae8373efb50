"""One connection to the metrics endpoint: a small request in, an answer out, never a moment's waiting.

As much of HTTP as a scrape needs. A request may have 8 KiB and no body; whatever is larger or no HTTP is answered
with one line and ended.
"""

from __future__ import annotations

import logging
import re
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

MOST_REQUEST_BYTES = 8192
REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) (\S{1,2000}) HTTP/1\.[01]\Z")
PATHS = ("/metrics", "/")

log = logging.getLogger(__name__)


class Next(Enum):
    """What a connection waits for."""

    READ = 1
    WRITE = 2
    END = 3


@dataclass(frozen=True, slots=True)
class Request:
    """What is answered: the method, the path without its query, and what the client can read."""

    method: str
    path: str
    accept: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """A status line's words, a body and its type."""

    status: str
    body: bytes
    content_type: str = "text/plain; charset=utf-8"

    def encoded(self, *, head_only: bool = False) -> bytes:
        head = (
            f"HTTP/1.1 {self.status}\r\nContent-Type: {self.content_type}\r\nContent-Length: {len(self.body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        return head.encode() + (b"" if head_only else self.body)


BAD_REQUEST = Answer("400 Bad Request", b"not an HTTP request\n")
NOT_FOUND = Answer("404 Not Found", b"metrics are at /metrics\n")
NOT_ALLOWED = Answer("405 Method Not Allowed", b"GET and HEAD only\n")


def parse_request(head: bytes) -> Request | None:
    """The request whose lines, up to the empty one, are `head`; None where that is no HTTP."""
    first, *lines = head.split(b"\r\n")
    match = REQUEST_LINE.match(first)
    if match is None:
        return None
    accept = ""
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon:
            return None
        if name.strip().lower() == b"accept":
            accept = value.strip().decode("latin-1")
    return Request(match[1].decode(), match[2].decode("latin-1").partition("?")[0], accept)


def answer_to(head: bytes, page: Callable[[str], Answer]) -> bytes:
    """What is sent back; `page` makes the answer to a scrape from what the client can read."""
    request = parse_request(head)
    if request is None:
        return BAD_REQUEST.encoded()
    if request.method not in ("GET", "HEAD"):
        return NOT_ALLOWED.encoded()
    found = page(request.accept) if request.path in PATHS else NOT_FOUND
    return found.encoded(head_only=request.method == "HEAD")


class Connection:
    """A client's socket, non-blocking; `advance` does what can be done now and says what to wait for."""

    def __init__(self, client: socket.socket, deadline: float, page: Callable[[str], Answer]) -> None:
        self.socket, self.deadline = client, deadline
        self.waits_for: Next | None = None
        self._page = page
        self._shaking_hands = isinstance(client, ssl.SSLSocket)
        self._received = bytearray()
        self._to_send: memoryview | None = None

    def advance(self) -> Next:
        try:
            if self._shaking_hands:
                assert isinstance(self.socket, ssl.SSLSocket)
                self.socket.do_handshake()
                self._shaking_hands = False
            while self._to_send is None:
                if not self._receive():
                    return Next.END
            return self._send(self._to_send)
        except (ssl.SSLWantReadError, BlockingIOError):
            return Next.READ
        except ssl.SSLWantWriteError:
            return Next.WRITE
        except OSError:  # a client that went away, or speaks no TLS
            return Next.END
        except Exception as error:  # whatever one client brings about ends its connection, and no other
            log.debug("a client of the metrics endpoint is let go: %s: %s", type(error).__name__, error)
            return Next.END

    def _receive(self) -> bool:
        """Read once; with a whole request the answer is ready. False where the client has ended."""
        received = self.socket.recv(4096)
        if not received:
            return False
        self._received += received
        head, end, _ = bytes(self._received).partition(b"\r\n\r\n")
        if end:
            self._to_send = memoryview(answer_to(head, self._page))
        elif len(self._received) > MOST_REQUEST_BYTES:
            self._to_send = memoryview(BAD_REQUEST.encoded())
        return True

    def _send(self, left: memoryview) -> Next:
        while left:
            try:
                left = self._to_send = left[self.socket.send(left) :]
            except BlockingIOError:
                return Next.WRITE
        return Next.END

    def close(self) -> None:
        self.socket.close()
