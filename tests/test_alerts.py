"""The alert rules: promtool runs their own tests, which notice what they should; and what they read is served."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from ddp.telemetry.goodput import Goodput
from ddp.telemetry.metrics import Metrics
from ddp.telemetry.records import RunEvent
from telemetry_records import feed, run_info

FOLDER = Path(__file__).resolve().parents[1] / "deploy" / "prometheus"
RULES = (FOLDER / "alerts.yml").read_text(encoding="utf-8")
TESTS = (FOLDER / "alerts_test.yml").read_text(encoding="utf-8")
ON_ONE_LINE = re.sub(r"(?<!>-)\n {10,}(?=and |unless |max_over|\* |> |clamp|time\()", " ", RULES)  # each expression


def promtool(*arguments: str, folder: Path = FOLDER) -> subprocess.CompletedProcess[str]:
    program = shutil.which("promtool")
    if program is None:
        if os.environ.get("CI") == "true":
            pytest.fail("CI needs promtool (Debian package prometheus)")
        pytest.skip("needs promtool (Debian package prometheus)")
    return subprocess.run([program, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_the_rules_pass_their_tests() -> None:
    ended = promtool("test", "rules", "alerts_test.yml")
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize(
    ("rule", "broken"),
    [
        ('{end="high"} < 1/3', '{end="low"} < 1/3'),
        ("< 1/3", "< 1/2"),
        ("and on (instance, job, run) ddp_steps_total > 1000", ""),
        ('state="resolved"}[1m]', 'state=~"resolved|wide"}[1m]'),
        (
            'max_over_time(ddp:noise_scale_state:headline{state="resolved"}[1m])',
            'ddp:noise_scale_state:headline{state="resolved"}',
        ),
        ("* on (instance, job, run, metric) group_left () ddp_gradient_noise_scale_headline_info", ""),
        ("for: 10m", "for: 1m"),
        ('{end="low"} > 10/11', '{end="high"} > 10/11'),
        ("resolved|lower_bound", "resolved"),
        ('unless on (instance, job, run) ddp:noise_scale_state:headline{state="beyond_data"} == 1', ""),
        ("10 * ddp_step_duration_seconds_sum", "2 * ddp_step_duration_seconds_sum"),
        ("_count, 60)", "_count, 600)"),
        ("_count, 60)", "_count, 0)"),
        (
            "and on (instance, job, run) time() - ddp_last_step_timestamp_seconds > 1.5 * ddp_step_longest_interval_seconds",
            "",
        ),
        ("> 1.5 * ddp_step_longest", "> 15 * ddp_step_longest"),
        (
            "ddp_step_longest_interval_seconds and on (instance, job, run) ddp_run_finished == 0",
            "ddp_step_longest_interval_seconds",
        ),
        ("for: 30s", "for: 5m"),
        ('up{job="ddp"} == 0', "up == 0"),
        ('up{job="ddp"} == 0', 'up{job="ddp"} == 2'),
        ('up{job="ddp"} == 0\n        for: 1m', 'up{job="ddp"} == 0\n        for: 0m'),
        ("ddp_checkpoint_failures_in_a_row > 0", "ddp_checkpoint_failures_in_a_row > 1"),
        ("ddp_straggler_rank >= 0", "ddp_straggler_rank > 0"),
        ("ddp_straggler_rank >= 0\n        for: 10m", "ddp_straggler_rank >= 0\n        for: 4m"),
        ("ddp_goodput_ratio < 0.5", "ddp_goodput_ratio < 0.7"),
        ("> 3600", "> 36"),
        ("> 3600 and on (instance, job, run) ddp_run_finished == 0", "> 3600"),
        ("for: 15m", "for: 0m"),
        (
            'ddp_events_total{kind="replicas_differ"} > ddp_events_total{kind="replicas_differ"} offset 1h',
            "vector(0) > 1",
        ),
        ('unless ddp_events_total{kind="replicas_differ"} offset 1h', ""),
        ('ddp_events_total{kind="replicas_differ"} > 0', 'ddp_events_total{kind=~".*"} > 0'),
    ],
)
def test_their_tests_notice_a_broken_rule(rule: str, broken: str, tmp_path: Path) -> None:
    assert rule in ON_ONE_LINE
    assert not _rules_pass(ON_ONE_LINE.replace(rule, broken), tmp_path)


def test_their_tests_pass_with_each_expression_on_one_line(tmp_path: Path) -> None:
    """Which is what the broken ones are made from."""
    assert _rules_pass(ON_ONE_LINE, tmp_path)


def _rules_pass(rules: str, folder: Path) -> bool:
    (folder / "alerts.yml").write_text(rules, encoding="utf-8")
    (folder / "alerts_test.yml").write_text(TESTS, encoding="utf-8")
    valid = promtool("check", "rules", "alerts.yml", folder=folder)
    assert valid.returncode == 0, valid.stderr
    return promtool("test", "rules", "alerts_test.yml", folder=folder).returncode == 0


def test_the_server_loads_them() -> None:
    ended = promtool("check", "config", "prometheus.yml")
    assert ended.returncode == 0, ended.stderr
    assert "9 rules found" in ended.stdout


def test_a_run_serves_every_series_that_they_read() -> None:
    registry = CollectorRegistry()
    info = run_info()
    metrics = Metrics(registry, info, goodput=Goodput(0.0))
    feed(metrics, info, last_step=100)
    metrics.event(RunEvent(100, 1.0, "saved", -1, "saved"))
    served = generate_latest(registry).decode()
    for text in (RULES, TESTS):
        for name in set(re.findall(r"\b(ddp_\w+)(?!\w*:)", re.sub(r"#.*", "", text))):
            assert re.search(rf"^{name}(\{{| )", served, re.MULTILINE), name
    for label in ("metric", "state"):
        assert re.search(rf"^ddp_gradient_noise_scale_state\{{[^}}]*{label}=", served, re.MULTILINE)
    for sample in ('ddp_data_efficiency_ratio{end="high"}', 'ddp_data_efficiency_ratio{end="low"}'):
        assert sample in served
    assert re.search(r"^ddp_gradient_noise_scale_headline_info\{[^}]*metric=", served, re.MULTILINE)
