"""What a flood of its metrics endpoint costs a run: step times with 0 and with 500 hostile connections, in turn.

    python benchmarks/metrics_endpoint.py [--rounds 10] [--seconds 6] [--connections 500] [--tls] [--json FILE]

A real run of two ranks trains throughout. In each round there is quiet, then the flood at another process's endpoint of the
same kind (what the clients themselves take from the machine), then the flood at the run's own. Steps come from the run's own
record; within each phase all but its first second count. Printed are medians over rounds of a phase's median step time, and
the median of the rounds' ratios with its range; the share of a core that the endpoint's thread took, as the kernel counts it;
and how long a scrape took meanwhile, one a second.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddp.telemetry.metrics_server import THREAD_NAME
from ddp.telemetry.recording import open_recording

FOLDER = Path(__file__).resolve().parent
PHASES = ("quiet", "flood elsewhere", "flood at the run")
SETTLE_SECONDS = 1.0
SCRAPE_TIMEOUT_SECONDS = 10.0  # Prometheus' own
JOB = """
[run]
id = "run"
steps = 100_000_000
threads_per_rank = 1
directory = "{directory}/runs"
[task]
name = "digits"
[batch]
global_batch_size = 128
[metrics]
port = 0
"""
ELSEWHERE = """
import sys, time
from prometheus_client import REGISTRY
from ddp.telemetry.metrics_server import serve
print(serve(REGISTRY).port, flush=True)
sys.stdin.read()
"""


@dataclass(frozen=True)
class Phase:
    """Its begin and end in unix time; the endpoint's share of a core; what the clients did; seconds that scrapes took."""

    begin: float
    end: float
    share: float
    clients: dict[str, int]
    scrapes: list[float]


Step = tuple[float, float]  # unix time at its end, seconds it took


@contextmanager
def run_of_two_ranks(folder: Path, tls: bool) -> Iterator[int]:
    """A run that goes on until it is stopped; yields the port of its endpoint."""
    job = JOB.format(directory=folder)
    if tls:
        make_certificate(folder)
        job += f'certificate = "{folder}/certificate.pem"\nprivate_key = "{folder}/key.pem"\n'
    (folder / "job.toml").write_text(job)
    command = [sys.executable, "-m", "launch", "torchrun", str(folder / "job.toml"), "--nproc-per-node", "2"]
    with (folder / "log").open("w") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        targets = folder / "runs" / "targets" / "run.json"
        deadline = time.monotonic() + 120
        while not targets.exists():
            assert time.monotonic() < deadline and run.poll() is None, (folder / "log").read_text()
            time.sleep(0.2)
        time.sleep(5)
        yield int(json.loads(targets.read_text())[0]["targets"][0].rpartition(":")[2])
        assert run.poll() is None, (folder / "log").read_text()
    finally:
        run.send_signal(signal.SIGTERM)
        run.wait(timeout=60)


def make_certificate(folder: Path) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "certificate.pem")]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    (folder / "key.pem").chmod(0o600)


@contextmanager
def endpoint_elsewhere() -> Iterator[int]:
    """The same endpoint in a process that does nothing else."""
    command = [sys.executable, "-c", ELSEWHERE]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline())
        process.kill()


def endpoint_thread(folder: Path) -> Path:
    """Where the kernel counts what the run's endpoint takes, by the name that its thread has there."""
    for comm in Path("/proc").glob("[0-9]*/task/*/comm"):
        with suppress(OSError):
            command = (comm.parents[2] / "cmdline").read_bytes().decode()
            if comm.read_text().strip() == THREAD_NAME and str(folder) in command:
                return comm.with_name("schedstat")
    raise SystemExit("the run has no thread for its metrics")


def seconds_of(thread: Path) -> float:
    return int(thread.read_text().split()[0]) / 1e9


def phase(name: str, port: int, given: argparse.Namespace, run_port: int, thread: Path) -> Phase:
    counts, scrapes = {}, []
    clients: subprocess.Popen[str] | None = None
    if name != "quiet":
        command = [sys.executable, str(FOLDER / "hostile_clients.py"), "127.0.0.1", str(port)]
        command += ["--connections", str(given.connections), "--seconds", str(given.seconds + SETTLE_SECONDS)]
        clients = subprocess.Popen(
            [*command, *(["--tls"] if given.tls else [])], stdout=subprocess.PIPE, text=True, env=os.environ
        )
    time.sleep(SETTLE_SECONDS)
    begin, worked = time.time(), seconds_of(thread)
    while (now := time.time()) < begin + given.seconds:
        scrapes.append(scrape(run_port, given.tls))
        time.sleep(max(0.0, 1.0 - (time.time() - now)))
    end = time.time()
    share = (seconds_of(thread) - worked) / (end - begin)
    if clients is not None:
        answer, _ = clients.communicate(timeout=120)
        counts = json.loads(answer)
    time.sleep(SETTLE_SECONDS)
    return Phase(begin, end, share, counts, scrapes)


def scrape(port: int, tls: bool) -> float:
    """Seconds; infinity where none came in time."""
    context = ssl._create_unverified_context() if tls else None
    begin = time.monotonic()
    try:
        url = f"http{'s' if tls else ''}://127.0.0.1:{port}/metrics"
        with urllib.request.urlopen(url, timeout=SCRAPE_TIMEOUT_SECONDS, context=context) as answer:
            assert b"ddp_steps_total" in answer.read()
    except OSError:
        return float("inf")
    return time.monotonic() - begin


def step_seconds(steps: list[Step], begin: float, end: float) -> list[float]:
    return [seconds for unix_time, seconds in steps if begin <= unix_time - seconds and unix_time <= end]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--connections", type=int, default=500)
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        told: list[dict[str, Phase]] = []
        with run_of_two_ranks(folder, given.tls) as port, endpoint_elsewhere() as other:
            thread = endpoint_thread(folder)
            for number in range(given.rounds):
                order = PHASES if number % 2 == 0 else PHASES[::-1]
                ports = dict(zip(PHASES, (0, other, port), strict=True))
                told.append({each: phase(each, ports[each], given, port, thread) for each in order})
        with closing(open_recording(folder / "runs" / "run" / "run.db")) as database:
            rows = database.execute("SELECT unix_time, duration_seconds FROM steps ORDER BY step")
            steps: list[Step] = [(float(end), float(seconds)) for end, seconds in rows]
    figures = analysed(told, steps)
    print(show(figures, given))
    if given.json:
        Path(given.json).write_text(json.dumps(figures, indent=2) + "\n")


def analysed(told: list[dict[str, Phase]], steps: list[Step]) -> dict[str, dict[str, Any]]:
    figures: dict[str, dict[str, Any]] = {}
    taken = [{name: step_seconds(steps, each[name].begin, each[name].end) for name in PHASES} for each in told]
    for name in PHASES:
        scrapes = sorted(seconds for each in told for seconds in each[name].scrapes)
        figures[name] = {
            "median_ms": 1e3 * statistics.median(statistics.median(each[name]) for each in taken),
            "mean_ms": 1e3 * statistics.median(statistics.fmean(each[name]) for each in taken),
            "ratios_of_medians": [statistics.median(each[name]) / statistics.median(each["quiet"]) for each in taken],
            "ratios_of_means": [statistics.fmean(each[name]) / statistics.fmean(each["quiet"]) for each in taken],
            "share_of_a_core": statistics.median(each[name].share for each in told),
            "scrape_median_seconds": statistics.median(scrapes),
            "scrape_worst_seconds": scrapes[-1],
            "scrapes_lost": sum(seconds == float("inf") for seconds in scrapes),
            "scrapes": len(scrapes),
            "clients": [each[name].clients for each in told],
        }
    return figures


def show(figures: dict[str, dict[str, Any]], given: argparse.Namespace) -> str:
    lines = [
        f"{given.connections} connections{', TLS' if given.tls else ''}, {given.rounds} rounds of {given.seconds:g} s",
        "phase             median step  mean step  median / quiet (range)   mean / quiet   endpoint   scrape: median, worst, lost",
    ]
    for name, each in figures.items():
        ratios = sorted(each["ratios_of_medians"])
        lines.append(
            f"{name:17} {each['median_ms']:8.3f} ms {each['mean_ms']:7.3f} ms   {statistics.median(ratios):.4f} "
            f"({ratios[0]:.4f}-{ratios[-1]:.4f})      {statistics.median(each['ratios_of_means']):.4f}     {100 * each['share_of_a_core']:5.2f} %    "
            f"{each['scrape_median_seconds']:.3f} s, {each['scrape_worst_seconds']:.2f} s, "
            f"{each['scrapes_lost']} of {each['scrapes']}"
        )
        if each["clients"][0]:
            mean = {key: statistics.fmean(one[key] for one in each["clients"]) for key in each["clients"][0]}
            lines.append(
                "                  clients, a phase: " + ", ".join(f"{key} {value:,.1f}" for key, value in mean.items())
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
