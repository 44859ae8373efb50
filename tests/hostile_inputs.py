"""Inputs that mean harm to whatever reads files, names and environments; for hypothesis and for `benchmarks/fuzz.py`.

Each check takes an input, hands it to the reader in a folder of its own, and fails unless the reader answers or refuses
with one of the project's own errors, and leaves everything outside of that folder alone.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge

from ddp import outcome, topology
from ddp.errors import CheckpointError, JobFileError, TopologyError, UsageError
from ddp.job import apply_overrides, check_run_id, load_job, parse_job, resolve_run_id
from ddp.search.sweep_file import load_sweep
from ddp.telemetry.http_connection import MOST_REQUEST_BYTES, Connection, Next
from ddp.telemetry.metrics_server import Page
from ddp.training.run_directory import open_run_directory

ROOT = Path(__file__).resolve().parent.parent
JOBS = [path.read_bytes() for path in sorted((ROOT / "examples").glob("*.toml"))]
PIECES = (
    *(
        b"[",
        b"[[",
        b"]",
        b"{",
        b"}",
        b"=",
        b".",
        b",",
        b'"',
        b"'''",
        b"\\u0000",
        b"\\ud800",
        b"\0",
        b"\n",
        b"\r",
        b"\xff",
    ),
    *(b"nan", b"inf", b"-1", b"1e999", b"9" * 5000, b"0x" + b"f" * 400, b"1979-05-27T07:32:00Z", b"true", b"[1, [2]]"),
    *(
        b"[" * 2000,
        b"a = {" * 500,
        b"x." * 2000 + b"y = 1",
        b"[a]\n" * 2,
        b"../../etc",
        b"/",
        b"task.name",
        b"[metrics]",
    ),
    *(
        b'id = "..\\n"',
        b'directory = "\\u0000"',
        b"seed = 18446744073709551616",
        b'name = "os:system"',
        b"port = 65536",
    ),
)
VARIABLES = sorted(
    {
        name
        for family in topology.FAMILIES
        for name in (
            *family.traces,
            *(family.rank, family.world_size, family.local_rank, family.local_world_size, family.restarts),
            *family.also_needed,
            *([family.node] if family.node else []),
        )
    }
)

texts = st.text(st.characters(codec="utf-8"), max_size=80)
words = st.one_of(
    texts, st.sampled_from(["0", "1", "2", "-1", "٣", "1_0", "+1", " 1", "1\n", "2(x3),1", "2(x", "9" * 5000])
)


@st.composite
def mutated_jobs(draw: st.DrawFn) -> bytes:
    """One of the examples with pieces of it cut out, and others put in."""
    content = draw(st.sampled_from(JOBS))
    for _ in range(draw(st.integers(1, 6))):
        begin = draw(st.integers(0, len(content)))
        end = min(len(content), begin + draw(st.integers(0, 40)))
        piece = draw(st.one_of(st.sampled_from(PIECES), st.binary(max_size=12)))
        content = content[:begin] + piece + content[end:]
    return content


job_files = st.one_of(st.binary(max_size=300), texts.map(str.encode), mutated_jobs())
overrides = st.lists(
    st.one_of(
        texts,
        st.tuples(
            st.sampled_from(
                ["run.id", "run.directory", "run.steps", "task.name", "task.options.a", "a.b", "metrics.host"]
            ),
            st.one_of(texts, st.sampled_from([piece.decode("latin-1") for piece in PIECES])),
        ).map("=".join),
        st.integers(2, 3000).map(lambda depth: "a." * depth + "b=1"),
    ),
    max_size=3,
)
environments = st.dictionaries(st.sampled_from(VARIABLES), words, max_size=10)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=12,
)
OUTCOME = {"code": 0, "rank": 0, "world_size": 1, "host": "h", "step": None, "cause": "done", "consequence": False}
outcomes = st.one_of(
    st.binary(max_size=200),
    json_values.map(lambda value: json.dumps(value).encode()),
    st.dictionaries(st.sampled_from(sorted(OUTCOME)), json_values, max_size=3).map(
        lambda change: json.dumps({**OUTCOME, **change}).encode()
    ),
    st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b"9" * 6000, b"\xff\xfe", b"NaN"]),
)
run_ids = st.one_of(
    texts, st.sampled_from(["..", ".", "", "a/b", "٣", "a\n", "x" * 64, "x" * 65, "a\0b", "-", "_a", "a..b", "targets"])
)
manifests = st.one_of(
    st.binary(max_size=300), json_values.map(lambda value: json.dumps(value).encode()), st.just(b"[" * 100_000)
)

header_pieces = st.one_of(
    st.binary(max_size=12),
    st.sampled_from(
        [
            *(b"text/plain", b"application/openmetrics-text", b"; version=", b"1.0.0", b"2", b"x", b"; escaping="),
            *(b",", b";", b"=", b"q=0.5", b"\r\n", b"\r", b"\n", b"\0", b":", b"\xff", b"9" * 5000, b"a" * 9000),
        ]
    ),
)
headers = st.tuples(
    st.sampled_from([b"Accept: ", b"ACCEPT:", b"Host: a\r\naccept: ", b"X", b""]), st.lists(header_pieces, max_size=6)
).map(lambda header: header[0] + b"".join(header[1]))
request_lines = st.one_of(
    st.sampled_from([b"GET /metrics HTTP/1.1\r\n", b"HEAD / HTTP/1.0\r\n", b"PUT /metrics HTTP/1.1\r\n", b""]),
    st.lists(header_pieces, max_size=4).map(b"".join),
)
requests = st.tuples(request_lines, headers, st.sampled_from([b"\r\n\r\n", b"\r\n", b""])).map(b"".join)


def check_job_file(folder: Path, content: bytes) -> None:
    """As a job and as a sweep; what is read is written and read back as it was."""
    path = folder / "job.toml"
    path.write_bytes(content)
    with contextlib.suppress(JobFileError):
        job = load_job(path)
        written = job.to_toml()
        path.write_text(written, encoding="utf-8", newline="")
        assert load_job(path).to_toml() == written
    path.write_bytes(content)
    with contextlib.suppress(JobFileError):
        load_sweep(path)


def check_overrides(folder: Path, given: list[str]) -> None:
    table = {"run": {"steps": 1}, "task": {"name": "digits"}, "batch": {"global_batch_size": 8}}
    with contextlib.suppress(JobFileError):
        parse_job(apply_overrides(table, given))


def check_run_ids(folder: Path, value: str) -> None:
    """What passes is a name of letters of ASCII inside the folder; what does not makes nothing anywhere."""
    job = parse_job(
        {
            "run": {"steps": 1, "directory": str(folder / "inside" / "runs")},
            "task": {"name": "digits"},
            "batch": {"global_batch_size": 8},
        }
    )
    before = sorted(folder.iterdir())
    try:
        check_run_id(value)
    except ValueError:
        for attempt in (
            lambda: open_run_directory(job, value, resume=True),
            lambda: resolve_run_id(None, {"DDP_RUN_ID": value}, "generated") == "generated" or 1 / 0,
        ):
            with contextlib.suppress(UsageError):
                attempt()
        assert sorted(folder.iterdir()) == before
        return
    assert value.isascii() and not {"/", "\0", "\n"} & set(value) and value not in (".", "..") and len(value) <= 64
    run = open_run_directory(job, value, resume=True)
    assert run.path.resolve().parent == (folder / "inside" / "runs").resolve()
    run.close()
    run.discard()


def check_environment(folder: Path, environ: Mapping[str, str]) -> None:
    try:
        here = topology.from_environment(environ)
    except TopologyError:
        return
    assert 0 <= here.rank < here.world_size and 0 <= here.local_rank < here.local_world_size <= here.world_size


def check_outcome(folder: Path, content: bytes) -> None:
    path = folder / "outcome.json"
    path.write_bytes(content)
    read = outcome.read(path)
    if read is not None:
        assert type(read.code) is int and type(read.cause) is str and read.message()
    outcome.claim(path, outcome.success(0, 1))
    assert sorted(folder.iterdir()) == [path]


def check_manifest(folder: Path, content: bytes) -> None:
    from ddp.checkpoint.manifest import parse_manifest

    with contextlib.suppress(ValueError, CheckpointError):
        parse_manifest(content)


def check_request(folder: Path, content: bytes) -> None:
    """Each request that is whole, or too large, gets an answer of ours, and what clients send is not kept."""
    registry = CollectorRegistry()
    Gauge("number", "One.", registry=registry).set(41)
    page = Page(registry)
    ours, client = socket.socketpair()
    with closing(Connection(ours, 0.0, page)) as connection, client:
        ours.setblocking(False)
        client.sendall(content)
        client.shutdown(socket.SHUT_WR)
        assert connection.advance() is Next.END
        ours.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: client.recv(1 << 16), b""))
    if b"\r\n\r\n" in content[:MOST_REQUEST_BYTES]:
        assert answer.startswith(b"HTTP/1.1 ") and answer.count(b"HTTP/1.1 ") == 1
    assert len(page._held) <= 1


@dataclass(frozen=True)
class Reader:
    """What is tried, on which inputs."""

    name: str
    inputs: st.SearchStrategy[Any]
    check: Callable[[Path, Any], None]


READERS = (
    Reader("job file", job_files, check_job_file),
    Reader("--set", overrides, check_overrides),
    Reader("run id", run_ids, check_run_ids),
    Reader("environment", environments, check_environment),
    Reader("outcome", outcomes, check_outcome),
    Reader("manifest", manifests, check_manifest),
    Reader("request", requests, check_request),
)
