"""A real Prometheus server, as its own unprivileged user, finds a real job and is asked what it saw."""

from __future__ import annotations

import http.client
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from certificates import make_pair
from ddp.telemetry.critical_batches import CriticalBatch
from ddp.telemetry.metrics import Metrics
from ddp.telemetry.metrics_server import serve
from ddp.telemetry.recording import open_recording, read_steps
from ddp.telemetry.targets import publish
from telemetry_records import adam_steps, feed, run_info, step_records

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGURATION = REPOSITORY / "deploy" / "prometheus" / "prometheus.yml"
SERVER_USER = "prometheus"
DEADLINE_SECONDS = 90.0


def require(condition: bool, need: str) -> None:
    """Skip where something is missing, but fail in CI, which installs it."""
    if not condition:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI needs {need}")
        pytest.skip(f"needs {need}")


def program(name: str) -> str:
    path = shutil.which(name)
    require(path is not None, f"{name} (Debian package prometheus)")
    assert path is not None
    return path


def has_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


Found = TypeVar("Found")


def wait_for(what: str, attempt: Callable[[], Found | None]) -> Found:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < deadline:
        if (found := attempt()) is not None:
            return found
        time.sleep(0.2)
    pytest.fail(f"{what}: not within {DEADLINE_SECONDS} s")


@pytest.fixture
def project() -> Iterator[Path]:
    """A folder laid out as the repository is, where the server's user may look (pytest's own is private)."""
    folder = Path(tempfile.mkdtemp(prefix="ddp-prometheus-"))
    try:
        folder.chmod(0o755)
        copy = folder / "deploy" / "prometheus"
        copy.mkdir(parents=True)
        shutil.copy(CONFIGURATION, copy)
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def prometheus_server(project: Path) -> Iterator[Callable[[str], dict[str, float]]]:
    """The server on the copied configuration; yields an instant query: run -> value."""
    server = program("prometheus")
    require(os.geteuid() == 0, "root, to start the server as its own user")
    require(has_user(SERVER_USER), f"the user {SERVER_USER}")
    data = project / "data"
    data.mkdir()
    shutil.chown(data, SERVER_USER)
    command = [
        *(server, f"--config.file={project / 'deploy' / 'prometheus' / 'prometheus.yml'}"),
        *(f"--storage.tsdb.path={data}", "--web.listen-address=127.0.0.1:0", "--log.level=info"),
    ]
    log = project / "prometheus.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, user=SERVER_USER, group=SERVER_USER, extra_groups=[], cwd="/", stdout=out, stderr=out
        )
    try:
        address = wait_for("the server's address", lambda: listening_address(log, process))
        wait_for("the server", lambda: ready(address))
        yield lambda query: instant_query(address, query)
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def listening_address(log: Path, process: subprocess.Popen[bytes]) -> str | None:
    text = log.read_text()
    if process.poll() is not None:
        pytest.fail(f"the server ended:\n{text}")
    found = re.search(r'msg="Listening on" address=(\S+)', text)
    return found.group(1) if found else None


def ready(address: str) -> bool | None:
    try:
        with urllib.request.urlopen(f"http://{address}/-/ready", timeout=5) as response:
            return True if response.status == http.client.OK else None
    except OSError:
        return None


def instant_query(address: str, query: str) -> dict[str, float]:
    text = urllib.parse.urlencode({"query": query})
    with urllib.request.urlopen(f"http://{address}/api/v1/query?{text}", timeout=10) as response:
        answer = json.load(response)
    assert answer["status"] == "success"
    return {each["metric"].get("run", ""): float(each["value"][1]) for each in answer["data"]["result"]}


EXAMPLES = 3 * 1_472.0  # that the job below has trained on in the end


@contextmanager
def scraped_job(project: Path, *settings: str) -> Iterator[Callable[[str], dict[str, float]]]:
    """Two ranks under torchrun whose last numbers a server has; they end well afterwards."""
    own = ["run.id=scraped", f"run.directory={project / 'runs'}", "run.epochs=3", "metrics.hold_seconds=15"]
    command = [sys.executable, "-m", "launch", "torchrun", str(REPOSITORY / "examples" / "digits.toml")]
    command += ["--nproc-per-node", "2", *(word for setting in (*own, *settings) for word in ("--set", setting))]
    with prometheus_server(project) as query, (project / "job.log").open("w") as log:
        job = subprocess.Popen(command, cwd=project, stdout=log, stderr=log)
        try:
            seen = {"scraped": EXAMPLES}
            wait_for("all examples", lambda: True if query("ddp_examples_total") == seen else None)
            yield query
            assert job.wait(timeout=DEADLINE_SECONDS) == 0, (project / "job.log").read_text()
        finally:
            if job.poll() is None:
                job.terminate()
                job.wait(timeout=60)


def test_the_server_accepts_the_configuration() -> None:
    command = [program("promtool"), "check", "config", str(CONFIGURATION)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "SUCCESS" in done.stdout


def test_promtool_accepts_the_exposition() -> None:
    promtool, registry, info = program("promtool"), CollectorRegistry(), run_info()
    metrics = Metrics(registry, info, [CriticalBatch("sweep", "adam", 'loss "0.3"', 147.0, 120.0, 180.0)])
    for record in adam_steps(info, 100):
        metrics.step(record)
    command = [promtool, "check", "metrics"]
    done = subprocess.run(command, check=False, input=generate_latest(registry), capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_runs_are_found_by_the_glob_and_forgotten_when_they_end(project: Path) -> None:
    """Two at once, told apart by their label; one in a file that points elsewhere than this machine is not scraped."""
    targets = project / "runs" / "targets"
    with prometheus_server(project) as query:  # started first: the folder is not there yet
        opened = []
        for run_id, last_step in (("first", 40), ("second", 120)):
            registry, info = CollectorRegistry(), run_info(run_id=run_id)
            feed(Metrics(registry, info), info, last_step)
            server = serve(registry)
            opened += [server, publish(targets, run_id, server.address)]
        foreign = publish(targets, "foreign", "192.0.2.1:80")
        try:
            expected = {"first": 40 * 64.0, "second": 120 * 64.0}
            wait_for("both runs", lambda: True if query("ddp_examples_total") == expected else None)
            last = step_records(run_info(), 120)[-1].reading
            assert last is not None
            assert query('ddp_gradient_noise_scale_examples{metric="plain"}')["second"] == last.noise_scale
            assert query("ddp_gradient_noise_scale_state == 1").keys() == {"first", "second"}
            assert query("up") == {"first": 1.0, "second": 1.0}
        finally:
            foreign.close()
            for each in reversed(opened):
                each.close()
        wait_for("the end of both", lambda: True if query("up") == {} else None)


def test_a_real_job_is_scraped_over_tls(project: Path) -> None:
    """Two ranks, a certificate that signs itself, and a server that knows it and shows a certificate of its own."""
    server, client = make_pair(project, "server"), make_pair(project, "client")
    for path in (client.key, client.certificate, server.certificate):
        shutil.chown(path, SERVER_USER)
    configuration = project / "deploy" / "prometheus" / "prometheus.yml"
    text = configuration.read_text().replace("rule_files: [alerts.yml]", "")
    commented = re.findall(r"^( +)# (tls_config:|  (?:ca|cert|key)_file: .*)$", text, re.MULTILINE)
    assert len(commented) == 4
    text = re.sub(r"^( +)# (tls_config:|  (?:ca|cert|key)_file: .*)$", r"\1\2", text, flags=re.MULTILINE)
    for name, path in (
        ("server.pem", server.certificate),
        ("client.pem", client.certificate),
        ("client.key", client.key),
    ):
        text = text.replace(f"/etc/prometheus/{name}", str(path))
    configuration.write_text(text)
    settings = [f"metrics.certificate={server.certificate}", f"metrics.private_key={server.key}"]
    settings += [f"metrics.client_certificates={client.certificate}"]
    with scraped_job(project, *settings) as query:
        assert query("up") == {"scraped": 1.0}


def test_a_real_job_is_scraped(project: Path) -> None:
    """Two ranks under torchrun; what the server saw last is what the run's own record says."""
    with scraped_job(project) as query:
        noise = query('ddp_gradient_noise_scale_examples{metric="plain"}')
        states = query('ddp_gradient_noise_scale_state{metric="plain"} == 1')
        headline = "ddp_gradient_noise_scale_headline_info"
        joined = query(f"ddp_gradient_noise_scale_examples * on (run, metric) group_left (method) {headline}")
        with closing(open_recording(project / "runs" / "scraped" / "run.db")) as database:
            *_, last = read_steps(database)
        assert last.noise is not None
        assert (last.examples_total, states) == (EXAMPLES, {"scraped": 1.0})
        assert noise == pytest.approx({"scraped": last.noise.plain.noise_scale}, nan_ok=True)
        assert joined == pytest.approx({"scraped": last.noise.reading.noise_scale}, nan_ok=True)
    assert list((project / "runs" / "targets").iterdir()) == []
