"""The endpoint under clients that are slow, malformed or many, over TLS, and where its port is lost."""

from __future__ import annotations

import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from certificates import make_pair
from ddp.errors import JobFileError, UsageError
from ddp.job import MetricsSection, check_exposure, is_loopback
from ddp.job.job_file import parse_job
from ddp.telemetry import metrics_server
from ddp.telemetry.http_connection import MOST_REQUEST_BYTES, Answer, answer_to, parse_request
from ddp.telemetry.metrics_server import MOST_CONNECTIONS, MetricsServer, Page, serve
from ddp.telemetry.tls import tls_context
from ddp.telemetry.work_budget import BURST_SECONDS, WorkBudget

PAGE = Answer("200 OK", b"page\n")


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    registry = CollectorRegistry()
    Gauge("number", "One.", registry=registry).set(41)
    served = serve(registry)
    yield served
    served.close()


def ask(server: MetricsServer, request: bytes, *, at_once: int = 1 << 20, pause: float = 0.0) -> bytes:
    """All that comes back for `request`, sent in pieces of `at_once` bytes."""
    with socket.create_connection((server.host, server.port), timeout=30) as client:
        for begin in range(0, len(request), at_once):
            client.sendall(request[begin : begin + at_once])
            time.sleep(pause)
        return received(client)


def received(client: socket.socket) -> bytes:
    answer = b""
    with suppress(ConnectionResetError):
        while more := client.recv(1 << 16):
            answer += more
    return answer


def scrape(url: str, context: ssl.SSLContext | None = None) -> str:
    with urllib.request.urlopen(url, timeout=30, context=context) as answer:
        return answer.read().decode()


# --- requests ---


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: a", 200),
        (b"GET / HTTP/1.0", 200),
        (b"GET /metrics?name=x HTTP/1.1", 200),
        (b"HEAD /metrics HTTP/1.1", 200),
        (b"GET /etc/passwd HTTP/1.1", 404),
        (b"GET /../metrics HTTP/1.1", 404),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 5", 405),
        (b"", 400),
        (b"GET /metrics", 400),
        (b"GET /metrics HTTP/2.0", 400),
        (b"GET  /metrics HTTP/1.1", 400),
        (b"GET /metrics HTTP/1.1\r\nno header", 400),
        (b"\x16\x03\x01\x00\xff\x00", 400),
        (b"GET /" + b"a" * 5000 + b" HTTP/1.1", 400),
        (b"GET /metrics HTTP/1.1\n", 400),
    ],
)
def test_what_is_answered(request_head: bytes, status: int) -> None:
    answer = answer_to(request_head, lambda _: PAGE)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert b"Connection: close" in head
    if not request_head.startswith(b"HEAD"):
        assert f"Content-Length: {len(body)}".encode() in head


def test_the_clients_format_is_passed_on() -> None:
    request = parse_request(b"GET /metrics HTTP/1.1\r\nACCEPT:  application/openmetrics-text;version=1.0.0 \r\nX: y")
    assert request is not None
    assert (request.path, request.accept) == ("/metrics", "application/openmetrics-text;version=1.0.0")
    assert parse_request(b"GET /metrics HTTP/1.1\r\nAccept: \xff\xfe") is not None


def test_the_client_chooses_one_of_two_formats_and_no_more() -> None:
    """Its text reaches neither the library's parser, which a version that is no number ends, nor the pages that are held."""
    page = Page(CollectorRegistry())
    kinds = ("text/plain", "application/openmetrics-text", "APPLICATION/OpenMetrics-Text", "*/*")
    for version in ("1.0.0", "x", "2", "1" * 5000, *(f"1.0.{number}" for number in range(20))):
        for kind in kinds:
            answer = page(f"{kind}; version={version}; escaping=x")
            is_openmetrics = "openmetrics" in kind.lower()
            assert answer.content_type.startswith(
                "application/openmetrics-text; version=1.0.0;" if is_openmetrics else "text/plain; version=0.0.4;"
            )
            assert answer.body.endswith(b"# EOF\n") == is_openmetrics
    assert len(page._held) == 2


def test_what_one_client_brings_about_ends_its_connection_alone(server: MetricsServer) -> None:
    whole = server._page

    def page(accept: str) -> Answer:
        return whole(accept) if accept == "*/*" else 1 / 0  # type: ignore[return-value]

    server._page = page  # type: ignore[assignment]
    for _ in range(3):
        assert ask(server, b"GET /metrics HTTP/1.1\r\nAccept: text/plain; version=x\r\n\r\n") == b""
    assert b"number 41.0" in ask(server, b"GET /metrics HTTP/1.1\r\nAccept: */*\r\n\r\n")


def test_a_request_may_come_in_pieces_and_may_not_be_large(server: MetricsServer) -> None:
    assert b"number 41.0" in ask(server, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", at_once=3, pause=0.001)
    assert ask(server, b"GET /metrics HTTP/1.1\r\nX: " + b"a" * MOST_REQUEST_BYTES).startswith(b"HTTP/1.1 400 ")
    assert ask(server, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").count(b"HTTP/1.1") == 1


def test_a_page_larger_than_the_kernel_holds_arrives_whole() -> None:
    registry = CollectorRegistry()
    gauge = Gauge("wide", "Many.", ["name"], registry=registry)
    for number in range(500):
        gauge.labels(f"{number:024000}").set(number)
    with closing(serve(registry)) as server:
        assert scrape(server.url).count("wide{") == 500


def test_the_page_is_shared_for_a_moment() -> None:
    registry, now = CollectorRegistry(), [0.0]
    gauge = Gauge("number", "One.", registry=registry)
    page = Page(registry, lambda: now[0])
    seen = []
    for moment in (0.0, 0.4, 0.6, 0.7, 1.2):
        now[0] = moment
        gauge.set(moment)
        seen.append(page("").body.decode().split()[-1])
    assert seen == ["0.0", "0.0", "0.6", "0.6", "1.2"]


def test_a_page_that_cannot_be_rendered_is_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Collector):
        def collect(self) -> Iterator[Metric]:
            raise RuntimeError("no reading")
            yield

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Broken())
    with closing(serve(registry)) as server:
        with pytest.raises(urllib.error.HTTPError, match="500") as caught:
            scrape(server.url)
        caught.value.close()
        assert ask(server, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert "no reading" in caplog.text


# --- floods ---


def test_work_is_a_share_of_time_after_a_burst() -> None:
    clock, worked = [0.0], [0.0]
    budget = WorkBudget(0.01, lambda: clock[0], lambda: worked[0])
    assert budget.pause_seconds() == 0
    worked[0] = 2 * BURST_SECONDS
    assert budget.pause_seconds() > BURST_SECONDS / 0.01
    for _ in range(1000):
        clock[0] += budget.pause_seconds() or 0.001
        worked[0] += 0.0004 * (budget.pause_seconds() == 0)
    assert worked[0] - BURST_SECONDS == pytest.approx(0.01 * clock[0], rel=0.2, abs=0.002)
    clock[0] += 1e6  # what is not used is not kept
    assert budget.pause_seconds() == 0
    worked[0] += 1.01 * BURST_SECONDS
    assert budget.pause_seconds() > 0


def test_a_scrape_gets_through_five_hundred_connections(server: MetricsServer) -> None:
    """Silent ones, ones that stop in the middle and ones that talk nonsense; none of them waits for another."""
    with ExitStack() as clients:
        for number in range(500):
            client = clients.enter_context(socket.create_connection((server.host, server.port), timeout=30))
            client.sendall((b"", b"GET /metr", b"\0\r\n\r\n", b"GET /metrics HTTP/1.1\r\nX: ")[number % 4])
        assert "number 41.0" in scrape(server.url)
        assert threading.active_count() < 20
        assert len(server._connections) <= MOST_CONNECTIONS
    assert "number 41.0" in scrape(server.url)


def test_who_does_not_finish_in_time_is_let_go(server: MetricsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "CONNECTION_SECONDS", 0.05)
    assert ask(server, b"GET /metrics HTTP/1.1\r\n") == b""
    assert server._connections == {}


def test_clients_that_go_away_in_the_middle_harm_nobody(server: MetricsServer) -> None:
    for number in range(40):
        client = socket.create_connection((server.host, server.port), timeout=30)
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n" if number % 2 else b"GET /")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close with a reset
        client.close()
    assert "number 41.0" in scrape(server.url)


def test_a_thread_that_dies_is_a_warning(server: MetricsServer, caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> None:
        raise OSError("the port is lost")

    server._accept = broken  # type: ignore[method-assign]
    with pytest.raises(OSError, match="reset|closed|refused"):
        scrape(server.url)
    server.close()
    assert "metrics are no longer served, training goes on: OSError: the port is lost" in caplog.text


def test_a_restarted_run_takes_another_port_where_its_own_is_in_use(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} on 127.0.0.1 is in use"):
            serve(CollectorRegistry(), port=port)
        with closing(serve(CollectorRegistry(), port=port, another_port_if_taken=True)) as server:
            assert server.port != port
    assert f"port {port} on 127.0.0.1 is still in use" in caplog.text


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid", "a" * 70, ".", "a b"])
def test_a_host_that_is_not_here_is_named(host: str) -> None:
    with pytest.raises(UsageError, match="metrics.host"):
        serve(CollectorRegistry(), host=host)


# --- TLS and exposure ---


def section(**values: object) -> MetricsSection:
    return MetricsSection.model_validate(values)


def test_over_tls_with_a_certificate_of_ones_own(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, "server")
    context = tls_context(section(certificate=str(pair.certificate), private_key=str(pair.key)))
    assert context is not None and context.minimum_version == ssl.TLSVersion.TLSv1_2
    registry = CollectorRegistry()
    Gauge("number", "One.", registry=registry).set(41)
    with closing(serve(registry, tls=context)) as server:
        assert server.url == f"https://127.0.0.1:{server.port}/metrics"
        trusting = ssl.create_default_context(cafile=str(pair.certificate))
        assert "number 41.0" in scrape(server.url, trusting)
        with pytest.raises(urllib.error.URLError, match="self-signed"):
            scrape(server.url, ssl.create_default_context())
        assert b"number" not in ask(server, b"GET /metrics HTTP/1.1\r\n\r\n")  # in clear
        assert "number 41.0" in scrape(server.url, trusting)


def test_only_known_clients_where_the_job_says_so(tmp_path: Path) -> None:
    pair, known, unknown = (make_pair(tmp_path, name) for name in ("server", "known", "unknown"))
    context = tls_context(
        section(
            certificate=str(pair.certificate), private_key=str(pair.key), client_certificates=str(known.certificate)
        )
    )
    registry = CollectorRegistry()
    Gauge("number", "One.", registry=registry).set(41)
    with closing(serve(registry, tls=context)) as server:
        for client in (None, unknown):
            trusting = ssl.create_default_context(cafile=str(pair.certificate))
            if client is not None:
                trusting.load_cert_chain(client.certificate, client.key)
            with pytest.raises(OSError, match="(?i)alert|eof|reset|broken|closed"):
                scrape(server.url, trusting)
        trusting = ssl.create_default_context(cafile=str(pair.certificate))
        trusting.load_cert_chain(known.certificate, known.key)
        assert "number 41.0" in scrape(server.url, trusting)


def test_a_key_that_others_may_read_and_files_that_are_none(tmp_path: Path) -> None:
    pair, other = make_pair(tmp_path, "server"), make_pair(tmp_path, "other")
    (tmp_path / "text").write_text("no certificate")
    good = {"certificate": str(pair.certificate), "private_key": str(pair.key)}
    for change, message in (
        ({"certificate": str(tmp_path / "nowhere")}, "metrics.certificate: cannot read .*nowhere: No such file"),
        ({"certificate": str(tmp_path / "text")}, "are no PEM certificate with its key"),
        ({"certificate": str(other.certificate)}, "are no PEM certificate with its key: KEY_VALUES_MISMATCH"),
        ({"private_key": str(tmp_path / "nowhere")}, "metrics.private_key: cannot read .*nowhere: No such file"),
        ({"private_key": str(tmp_path)}, "metrics.private_key: cannot read .*: Is a directory"),
        ({"client_certificates": str(tmp_path / "text")}, "metrics.client_certificates: .* holds no PEM certificates"),
        ({"client_certificates": str(tmp_path / "no")}, "metrics.client_certificates: cannot read"),
    ):
        with pytest.raises(UsageError, match=message):
            tls_context(section(**good | change))
    for mode in (0o640, 0o604, 0o622):
        pair.key.chmod(mode)
        with pytest.raises(UsageError, match=f"others may read .*: run `chmod 600 {pair.key}` first"):
            tls_context(section(**good))


def test_other_machines_need_tls_or_a_word_on_the_command_line() -> None:
    for host in ("127.0.0.1", "127.3.2.1", "::1", "localhost"):
        assert is_loopback(host)
        check_exposure(section(host=host), insecure=False)
    tls = {"certificate": "c.pem", "private_key": "k.pem"}
    for host in ("0.0.0.0", "::", "10.0.0.1", "node-7", "localhost.example", "127.0.0.1.example"):
        assert not is_loopback(host)
        with pytest.raises(UsageError, match=f"metrics.host: {host} is reached from other machines.*--insecure"):
            check_exposure(section(host=host), insecure=False)
        check_exposure(section(host=host), insecure=True)
        check_exposure(section(host=host, **tls), insecure=False)
        check_exposure(section(host=host, enabled=False), insecure=False)


def test_no_job_file_can_say_insecure() -> None:
    job = {"run": {"steps": 1}, "task": {"name": "digits"}, "batch": {"global_batch_size": 8}}
    for bad in ({"insecure": True}, {"certificate": "c"}, {"private_key": "k"}, {"client_certificates": "a"}):
        with pytest.raises(JobFileError, match="metrics"):
            parse_job({**job, "metrics": {"host": "0.0.0.0", **bad}})


def test_the_address_that_others_are_told(tmp_path: Path) -> None:
    with closing(serve(CollectorRegistry(), host="0.0.0.0")) as server:
        assert server.address == f"{socket.gethostname()}:{server.port}"
    pair = make_pair(tmp_path, "server")
    context = tls_context(section(certificate=str(pair.certificate), private_key=str(pair.key)))
    with closing(serve(CollectorRegistry(), host="localhost", tls=context)) as server:
        assert server.address == f"localhost:{server.port}"  # what the certificate is for
