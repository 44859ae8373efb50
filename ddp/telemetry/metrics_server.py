"""The metrics endpoint: one thread on rank 0 that answers scrapes, and that nobody can make work hard.

Rank 0 trains in the same process. So there is one thread, which never waits for one client; a bounded number of
connections, each with a deadline, of which the oldest gives way to a new one; one rendered page for all who ask within
half a second; and a budget of processor time (`work_budget`). Under a flood the endpoint gets slower, not the run.
"""

from __future__ import annotations

import errno
import logging
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics

from ddp.errors import UsageError
from ddp.job import is_loopback
from ddp.telemetry.http_connection import Answer, Connection, Next
from ddp.telemetry.work_budget import SHARE, WorkBudget

THREAD_NAME = "ddp-metrics"
MOST_CONNECTIONS = 64
CONNECTION_SECONDS = 10.0
PAGE_SECONDS = 0.5
SILENT_SECONDS = 10  # that the kernel keeps a client which says nothing
BACKLOG = 1024  # connections that wait in the kernel for their turn
ACCEPTED_AT_ONCE = 8  # between two looks at the budget
OPENMETRICS = "application/openmetrics-text"  # for a client that says it reads this; plain text for all others
FORMATS: dict[bool, tuple[Callable[[CollectorRegistry], bytes], str]] = {
    False: (generate_latest, CONTENT_TYPE_PLAIN_0_0_4),
    True: (openmetrics.generate_latest, openmetrics.CONTENT_TYPE_LATEST),
}

log = logging.getLogger(__name__)


class Page:
    """The registry as text, rendered at most every `PAGE_SECONDS` for each format, and with half of the budget at most.

    What a client sends chooses one of two formats and goes no further: neither a library that parses it, nor an answer.
    """

    def __init__(self, registry: CollectorRegistry, clock: Callable[[], float] = time.monotonic) -> None:
        self._registry, self._clock = registry, clock
        self._held: dict[bool, tuple[float, Answer]] = {}  # by whether it is OpenMetrics: until when, what

    def __call__(self, accept: str) -> Answer:
        is_openmetrics = OPENMETRICS in accept.lower()
        now = self._clock()
        held = self._held.get(is_openmetrics)
        if held is None or now >= held[0]:
            before = time.thread_time()
            try:
                encode, content_type = FORMATS[is_openmetrics]
                answer = Answer("200 OK", encode(self._registry), content_type)
            except Exception as error:  # a reading that cannot be shown must not end the endpoint
                log.warning("metrics cannot be rendered: %s", error)
                answer = Answer("500 Internal Server Error", b"metrics cannot be rendered; the log says why\n")
            seconds = max(PAGE_SECONDS, 2 * (time.thread_time() - before) / SHARE)
            held = self._held[is_openmetrics] = (now + seconds, answer)
        return held[1]


class MetricsServer:
    """The endpoint as it was really bound; `close` stops its thread and frees the port."""

    def __init__(
        self, listener: socket.socket, registry: CollectorRegistry, tls: ssl.SSLContext | None, asked_host: str
    ) -> None:
        self.host, self.port = (str(listener.getsockname()[0]), int(listener.getsockname()[1]))
        self._asked_host = asked_host
        self._listener, self._tls, self._page = listener, tls, Page(registry)
        self._connections: dict[Connection, None] = {}  # oldest first
        self._closing = threading.Event()
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, None)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self._thread.start()

    @property
    def scheme(self) -> str:
        return "http" if self._tls is None else "https"

    @property
    def address(self) -> str:
        """host:port as others reach it, with an IPv6 host in brackets, as a URL and a Prometheus target want it.

        A certificate is for a name: the one that was asked for, or the machine's where it is all of its addresses.
        """
        host = self.host
        if host in ("0.0.0.0", "::"):
            host = socket.gethostname()
        elif self._tls is not None or not is_loopback(host):
            host = self._asked_host
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.address}/metrics"

    def close(self) -> None:
        """Safe to call twice."""
        self._closing.set()
        with suppress(OSError):
            self._wake.send(b"\0")
        self._thread.join()
        self._wake.close()

    def _run(self) -> None:
        """The thread. Whatever goes wrong here is a warning: training does not depend on being watched."""
        with suppress(OSError):  # so that `top -H` shows what it takes
            Path(f"/proc/self/task/{threading.get_native_id()}/comm").write_text(THREAD_NAME, encoding="ascii")
        try:
            self._serve(WorkBudget())
        except Exception as error:
            log.warning("metrics are no longer served, training goes on: %s: %s", type(error).__name__, error)
        finally:
            for connection in list(self._connections):
                self._end(connection)
            self._selector.close()
            self._listener.close()
            self._woken.close()

    def _serve(self, budget: WorkBudget) -> None:
        while not self._closing.is_set():
            for key, _ in self._selector.select(self._seconds_to_deadline()):
                while (pause := budget.pause_seconds()) and not self._closing.wait(pause):
                    pass
                if self._closing.is_set():
                    return
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.data, Connection) and key.data in self._connections:
                    self._advance(key.data)
            self._end_the_late()

    def _seconds_to_deadline(self) -> float | None:
        oldest = next(iter(self._connections), None)
        return None if oldest is None else max(0.0, oldest.deadline - time.monotonic())

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                client, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    raise
                self._closing.wait(1.0)  # the task has all files that a process may open: later, perhaps
                return
            if (connection := self._begin(client)) is not None:
                self._advance(connection)

    def _begin(self, client: socket.socket) -> Connection | None:
        client.setblocking(False)
        if self._tls is not None:
            try:
                client = self._tls.wrap_socket(client, server_side=True, do_handshake_on_connect=False)
            except (OSError, ValueError):  # it has gone already
                client.close()
                return None
        if len(self._connections) >= MOST_CONNECTIONS:
            self._end(next(iter(self._connections)))
        connection = Connection(client, time.monotonic() + CONNECTION_SECONDS, self._page)
        self._connections[connection] = None
        return connection

    def _advance(self, connection: Connection) -> None:
        following = connection.advance()
        if following is Next.END:
            self._end(connection)
        elif following is not connection.waits_for:
            events = selectors.EVENT_READ if following is Next.READ else selectors.EVENT_WRITE
            change = self._selector.register if connection.waits_for is None else self._selector.modify
            change(connection.socket, events, connection)
            connection.waits_for = following

    def _end(self, connection: Connection) -> None:
        del self._connections[connection]
        if connection.waits_for is not None:
            self._selector.unregister(connection.socket)
        connection.close()

    def _end_the_late(self) -> None:
        now = time.monotonic()
        while (oldest := next(iter(self._connections), None)) is not None and oldest.deadline <= now:
            self._end(oldest)


def serve(
    registry: CollectorRegistry,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    tls: ssl.SSLContext | None = None,
    another_port_if_taken: bool = False,
) -> MetricsServer:
    """Serve `registry` from a thread; port 0 takes a free one.

    Args:
        another_port_if_taken: a restarted run goes on with a free port where its own is still in use, and says so.

    Raises:
        UsageError: the address cannot be bound, with the port and what to do.
    """
    try:
        listener = _listen(host, port)
    except OSError as error:
        if not (another_port_if_taken and port and error.errno == errno.EADDRINUSE):
            raise UsageError(_cannot_bind(error, host, port)) from None
        log.warning("metrics.port: port %d on %s is still in use after the restart: taking a free one", port, host)
        return serve(registry, host, 0, tls=tls)
    return MetricsServer(listener, registry, tls, host)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except UnicodeError:
        raise socket.gaierror(socket.EAI_NONAME, "not a host's name") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if (defer := getattr(socket, "TCP_DEFER_ACCEPT", None)) is not None:
            # Linux keeps those who connect and say nothing to itself: they cost this process nothing.
            listener.setsockopt(socket.IPPROTO_TCP, defer, SILENT_SECONDS)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except BaseException:
        listener.close()
        raise
    return listener


def _cannot_bind(error: OSError, host: str, port: int) -> str:
    if isinstance(error, socket.gaierror):
        return f"metrics.host: {host} is no address of this machine: {error.strerror}; set metrics.host to one"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"metrics.host: {host} is no address of this machine; set metrics.host to one, or leave it out"
    remedy = "set metrics.port to another one, or to 0 for a free one"
    if error.errno == errno.EADDRINUSE:
        return f"metrics.port: port {port} on {host} is in use by another process; {remedy}"
    return f"metrics.port: cannot serve metrics on port {port} of {host}: {error.strerror or error}; {remedy}"
