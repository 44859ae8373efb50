"""Clients that mean harm to a metrics endpoint: some say nothing, some a byte at a time, some nonsense, some ask without end.

    python benchmarks/hostile_clients.py HOST PORT [--connections 500] [--seconds 10] [--tls]

A quarter of the connections each. Whoever is cut off comes back at once. Prints one line of JSON: connections that were
accepted, answers, and bytes sent. Runs at the lowest priority, so that what it takes from the machine is what the endpoint
gives it to do.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import socket
import ssl
import time
from contextlib import suppress
from dataclasses import dataclass, field

REQUESTS = {
    "silent": b"",
    "slow": b"GET /metrics HTTP/1.1\r\nHost: x\r\nX-Filler: " + b"a" * 4000,
    "malformed": b"\x16\x03\x01\x00\xff HTTP " + bytes(range(256)) * 8 + b"\r\n\r\n",
    "greedy": b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n",
}
SLOW_SECONDS = 0.2  # between two bytes


@dataclass
class Client:
    """One of the connections: `rest` is what it has yet to say."""

    kind: str
    address: tuple[str, int]
    socket: socket.socket | None = None
    rest: bytes = b""
    next_byte: float = 0.0


@dataclass
class Flood:
    """All of them, in one thread."""

    address: tuple[str, int]
    tls: bool
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("connected", "answered", "sent_bytes"), 0))
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def run(self, connections: int, seconds: float) -> dict[str, int]:
        clients = [Client(list(REQUESTS)[each % len(REQUESTS)], self.address) for each in range(connections)]
        for client in clients:
            self.connect(client)
        end = time.monotonic() + seconds
        slow = [client for client in clients if client.kind == "slow"]
        while (now := time.monotonic()) < end:
            for key, events in self.selector.select(0.05):
                self.turn(key.data, events)
            for client in slow:
                if client.socket is not None and client.rest and client.next_byte and now >= client.next_byte:
                    self.say(client, 1)
        for client in clients:
            self.drop(client)
        return self.counts

    def connect(self, client: Client) -> None:
        client.socket = socket.socket()
        client.socket.setblocking(False)
        client.rest, client.next_byte = REQUESTS[client.kind], 0.0
        with suppress(BlockingIOError):
            client.socket.connect(client.address)
        self.selector.register(client.socket, selectors.EVENT_WRITE, client)

    def turn(self, client: Client, events: int) -> None:
        assert client.socket is not None
        try:
            if events & selectors.EVENT_WRITE:
                self.counts["connected"] += 1
                self.selector.modify(client.socket, selectors.EVENT_READ, client)
                if self.tls and client.kind == "greedy":
                    client.rest = hello() + client.rest
                self.say(client, 1 if client.kind == "slow" else len(client.rest))
            elif received := client.socket.recv(1 << 16):
                self.counts["answered"] += received.startswith(b"HTTP/1.1") or received[:1] == b"\x16"
            else:
                raise ConnectionResetError
        except OSError:
            self.drop(client)
            self.connect(client)

    def say(self, client: Client, size: int) -> None:
        assert client.socket is not None
        with suppress(OSError):
            self.counts["sent_bytes"] += client.socket.send(client.rest[:size])
        client.rest, client.next_byte = client.rest[size:], time.monotonic() + SLOW_SECONDS

    def drop(self, client: Client) -> None:
        if client.socket is not None:
            self.selector.unregister(client.socket)
            client.socket.close()
            client.socket = None


def hello() -> bytes:
    """The first bytes of a TLS client, which make a server compute its half of a handshake."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname="localhost").do_handshake()
    return outgoing.read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("--connections", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--tls", action="store_true", help="the greedy ones begin handshakes")
    given = parser.parse_args()
    os.nice(19)
    before = time.process_time()
    counts = Flood((given.host, given.port), given.tls).run(given.connections, given.seconds)
    print(json.dumps({**counts, "own_seconds": round(time.process_time() - before, 3)}), flush=True)


if __name__ == "__main__":
    main()
