"""The exposition is parsed back and compared with the records that went in."""

from __future__ import annotations

import math
import socket
import threading
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from ddp.errors import UsageError
from ddp.telemetry.critical_batches import CriticalBatch
from ddp.telemetry.metrics import STEP_DURATION_BUCKETS_SECONDS, Metrics
from ddp.telemetry.metrics_server import serve
from ddp.telemetry.noise_metrics import MOST_LAYERS
from telemetry_records import (
    adam_steps,
    batch_changes,
    evaluation_records,
    feed,
    part_readings,
    reading,
    run_info,
    step_records,
    with_reading,
)

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(registry: CollectorRegistry) -> Samples:
    return parse(generate_latest(registry).decode())


def parse(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def one(samples: Samples, name: str, /, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


def test_every_name_is_documented_and_none_is_missing() -> None:
    registry, info = CollectorRegistry(), run_info()
    feed(Metrics(registry, info), info, last_step=60)
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert all(family.documentation for family in families)
    assert {sample.name for family in families for sample in family.samples} == {
        "ddp_all_reduce_bytes_total",
        "ddp_batch_size_changes_total",
        "ddp_checkpoint_failures_in_a_row",
        "ddp_checkpoint_save_seconds_total",
        "ddp_checkpoint_stall_seconds_total",
        "ddp_data_efficiency_ratio",
        "ddp_evaluation_metric",
        "ddp_events_total",
        "ddp_examples_total",
        "ddp_global_batch_size_examples",
        "ddp_gradient_noise_scale_examples",
        "ddp_gradient_noise_scale_headline_info",
        "ddp_gradient_noise_scale_high_examples",
        "ddp_gradient_noise_scale_low_examples",
        "ddp_gradient_noise_scale_sampled_every_steps",
        "ddp_gradient_noise_scale_state",
        "ddp_gradient_noise_scale_steps_needed",
        "ddp_gradient_squared_norm",
        "ddp_gradient_variance_trace",
        "ddp_last_step_timestamp_seconds",
        "ddp_learning_rate",
        "ddp_loss",
        "ddp_phase_seconds_total",
        "ddp_restarts_total",
        "ddp_run_finished",
        "ddp_run_info",
        "ddp_step_duration_seconds_bucket",
        "ddp_step_duration_seconds_count",
        "ddp_step_duration_seconds_sum",
        "ddp_step_longest_interval_seconds",
        "ddp_steps_total",
        "ddp_straggler_rank",
        "ddp_straggler_slowdown_ratio",
        "ddp_world_size",
    }


def test_samples_equal_the_latest_records() -> None:
    registry, info = CollectorRegistry(), run_info(restarts=3)
    feed(Metrics(registry, info), info, last_step=69)
    steps, evaluations = step_records(info, 69), evaluation_records(info, 69)
    last, noise = steps[-1], steps[-1].reading
    assert noise is not None
    samples = scrape(registry)
    assert one(samples, "ddp_steps_total") == 69
    assert one(samples, "ddp_examples_total") == 69 * 64
    assert one(samples, "ddp_restarts_total") == 3
    assert one(samples, "ddp_world_size") == 2
    assert one(samples, "ddp_global_batch_size_examples") == 64
    assert one(samples, "ddp_learning_rate") == last.learning_rate
    assert one(samples, "ddp_loss", split="training") == last.loss
    assert one(samples, "ddp_loss", split="validation") == evaluations[-1].loss
    assert one(samples, "ddp_straggler_rank") == last.straggler_rank
    assert one(samples, "ddp_last_step_timestamp_seconds") == last.unix_time
    assert one(samples, "ddp_all_reduce_bytes_total") == sum(record.all_reduce_bytes for record in steps)
    assert one(samples, "ddp_gradient_noise_scale_examples", metric="plain") == noise.noise_scale
    assert one(samples, "ddp_gradient_noise_scale_low_examples", metric="plain") == noise.low
    assert one(samples, "ddp_gradient_noise_scale_high_examples", metric="plain") == noise.high
    assert one(samples, "ddp_gradient_squared_norm", metric="plain") == noise.squared_norm
    assert one(samples, "ddp_gradient_variance_trace", metric="plain") == noise.variance_trace
    for record in evaluations[-2:]:
        assert one(samples, "ddp_evaluation_metric", split=record.split, name="loss") == record.loss
        assert one(samples, "ddp_evaluation_metric", split=record.split, name="accuracy") == record.metrics["accuracy"]
    labels = {
        "task": "digits",
        "optimizer": "adam",
        "transport": "shared_memory",
        "sampling": "uniform",
        "version": "0.1.0",
    }
    assert one(samples, "ddp_run_info", **labels) == 1


def test_times_add_up() -> None:
    registry, info = CollectorRegistry(), run_info()
    metrics = Metrics(registry, info)
    durations = [0.0005, 0.001, 0.0011, 0.03, 7.0, 100.0]  # a bound belongs to its own bucket
    steps = [replace(record, duration_seconds=d) for record, d in zip(step_records(info), durations, strict=False)]
    for record in steps:
        metrics.step(record)
    samples = scrape(registry)
    for bound in STEP_DURATION_BUCKETS_SECONDS:
        below = np.count_nonzero(np.array(durations) <= bound)
        assert one(samples, "ddp_step_duration_seconds_bucket", le=str(bound)) == below
    assert one(samples, "ddp_step_duration_seconds_bucket", le="+Inf") == len(durations)
    assert one(samples, "ddp_step_duration_seconds_count") == len(durations)
    assert one(samples, "ddp_step_duration_seconds_sum") == pytest.approx(sum(durations))
    for rank in (0, 1):
        total = sum(record.phase_seconds[rank]["wait"] for record in steps)
        assert one(samples, "ddp_phase_seconds_total", phase="wait", rank=str(rank)) == pytest.approx(total)


@pytest.mark.parametrize("state", ["unresolved", "beyond_data", "lower_bound", "wide", "resolved"])
def test_the_state_is_one_hot(state: str) -> None:
    registry, info = CollectorRegistry(), run_info()
    noise = reading(state, math.nan, 10.0, math.inf)  # type: ignore[arg-type]
    Metrics(registry, info).step(with_reading(step_records(info, 1)[0], noise))
    states = {key[1][1][1]: value for key, value in scrape(registry).items() if key[0].endswith("scale_state")}
    assert len(states) == 5
    assert {name for name, value in states.items() if value == 1} == {state}
    assert sum(states.values()) == 1


def test_both_metrics_the_headline_and_layers_are_the_latest_records() -> None:
    registry, info = CollectorRegistry(), run_info()
    metrics, steps = Metrics(registry, info), adam_steps(info, 102)
    for record in steps:
        metrics.step(record)
    noise, sampled = steps[-1].noise, steps[99].noise
    assert noise is not None and noise.preconditioned is not None and sampled is not None and not noise.parts
    samples = scrape(registry)
    for metric, each in (("plain", noise.plain), ("preconditioned", noise.preconditioned)):
        assert one(samples, "ddp_gradient_noise_scale_examples", metric=metric) == each.noise_scale
        assert one(samples, "ddp_gradient_noise_scale_low_examples", metric=metric) == each.low
        assert one(samples, "ddp_gradient_noise_scale_high_examples", metric=metric) == each.high
        assert one(samples, "ddp_gradient_noise_scale_steps_needed", metric=metric) == each.steps_needed
        assert one(samples, "ddp_gradient_variance_trace", metric=metric) == each.variance_trace
        assert one(samples, "ddp_gradient_noise_scale_state", metric=metric, state=each.state) == 1
    assert one(samples, "ddp_gradient_noise_scale_headline_info", metric="preconditioned", method="ranks") == 1
    assert one(samples, "ddp_gradient_noise_scale_sampled_every_steps") == 5
    efficiency = 1 / (1 + info.global_batch_size / noise.preconditioned.noise_scale)  # the headline's
    assert one(samples, "ddp_data_efficiency_ratio", end="point") == pytest.approx(efficiency)
    layers = {key: value for key, value in samples.items() if key[0] == "ddp_layer_noise_scale_examples"}
    assert len(layers) == 24  # the groups are not layers
    for each in sampled.parts:
        if each.part == "layer":
            value = one(samples, "ddp_layer_noise_scale_examples", layer=each.name, metric=each.metric)
            assert value == pytest.approx(each.reading.noise_scale, nan_ok=True)


def test_the_method_is_that_of_the_latest_observation() -> None:
    registry, info = CollectorRegistry(), run_info()
    metrics, template = Metrics(registry, info), step_records(info, 1)[0]
    assert template.noise is not None
    for method, expected in (("none", "none"), ("split", "split"), ("none", "split")):
        metrics.step(replace(template, noise=replace(template.noise, method=method)))
        shown = [dict(labels)["method"] for name, labels in scrape(registry) if name.endswith("headline_info")]
        assert shown == [expected]


def test_a_model_of_any_size_makes_a_bounded_number_of_series() -> None:
    registry, info = CollectorRegistry(), run_info()
    metrics, template = Metrics(registry, info), step_records(info, 1)[0]
    assert template.noise is not None
    shown: list[set[str]] = []
    for layers in (500, 400):  # a layer that is frozen in between takes no other's place
        metrics.step(replace(template, noise=replace(template.noise, parts=part_readings(100, layers))))
        shown.append({dict(labels)["layer"] for name, labels in scrape(registry) if name.startswith("ddp_layer_")})
    assert len(shown[0]) == MOST_LAYERS
    assert {"blocks.0.linear", "blocks.499.linear"} < shown[0]
    assert shown[1] == {name for name in shown[0] if int(name.split(".")[1]) < 400}


def test_an_adapting_batch_is_shown_as_it_is_now() -> None:
    registry, info = CollectorRegistry(), run_info()
    metrics, record = Metrics(registry, info), step_records(info, 30)[-1]
    assert one(scrape(registry), "ddp_global_batch_size_examples") == 64
    for change in batch_changes(info):
        metrics.batch_change(change)
    metrics.step(with_reading(replace(record, global_batch_size=256), reading("resolved", 64.0, 32.0, 128.0)))
    samples = scrape(registry)
    assert one(samples, "ddp_global_batch_size_examples") == 256
    assert one(samples, "ddp_batch_size_changes_total") == 2
    assert [one(samples, "ddp_data_efficiency_ratio", end=end) for end in ("low", "point", "high")] == [
        *(pytest.approx(1 / 9), pytest.approx(1 / 5), pytest.approx(1 / 3))
    ]


def test_a_measured_critical_batch_size_is_named_with_what_it_was_measured_for() -> None:
    registry = CollectorRegistry()
    measured = [
        CriticalBatch("sweep", "adam", "loss 0.3", 147.0, 120.0, 180.0),
        CriticalBatch("branched", "adam", "loss 0.3", 90.0, math.nan, math.inf),
    ]
    Metrics(registry, run_info(), measured)
    samples = scrape(registry)
    for each in measured:
        labels = {"method": each.method, "optimizer": each.optimizer, "target": each.target}
        shown = [
            one(samples, f"ddp_critical_batch_size_{end}", **labels)
            for end in ("examples", "low_examples", "high_examples")
        ]
        assert shown == pytest.approx([each.critical_batch_size, each.low, each.high], nan_ok=True)


def test_nan_and_infinity_are_samples() -> None:
    registry, info = CollectorRegistry(), run_info()
    noise = reading("lower_bound", math.nan, 16.0, math.inf)
    Metrics(registry, info).step(with_reading(replace(step_records(info, 1)[0], loss=math.nan), noise))
    samples = scrape(registry)
    assert math.isnan(one(samples, "ddp_loss", split="training"))
    assert math.isnan(one(samples, "ddp_gradient_noise_scale_examples", metric="plain"))
    assert one(samples, "ddp_gradient_noise_scale_high_examples", metric="plain") == math.inf
    assert one(samples, "ddp_data_efficiency_ratio", end="low") == pytest.approx(16 / (16 + 64))
    assert math.isnan(one(samples, "ddp_data_efficiency_ratio", end="point"))
    assert one(samples, "ddp_data_efficiency_ratio", end="high") == 1.0


def test_a_resume_continues_its_counters() -> None:
    registry, info = CollectorRegistry(), run_info(start_step=115)
    metrics = Metrics(registry, info)
    before = scrape(registry)
    assert one(before, "ddp_steps_total") == 115
    assert ("ddp_examples_total", ()) not in before  # not known yet: a zero would look like a reset
    metrics.step(step_records(info)[0])
    assert one(scrape(registry), "ddp_steps_total") == 116
    assert one(scrape(registry), "ddp_examples_total") == 116 * 64


def test_without_the_noise_scale_nothing_speaks_of_it() -> None:
    registry, info = CollectorRegistry(), run_info()
    Metrics(registry, info).step(with_reading(step_records(info, 1)[0], None))
    names = {name for name, _ in scrape(registry)}
    assert "ddp_loss" in names
    assert not any("noise" in name or "efficiency" in name for name in names)


def test_a_scrape_shows_one_step_as_a_whole() -> None:
    registry, info = CollectorRegistry(), run_info()
    metrics = Metrics(registry, info)
    template, stop = step_records(info, 1)[0], threading.Event()

    def train() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            metrics.step(replace(template, step=step, examples_total=64 * step, loss=float(step)))

    trainer = threading.Thread(target=train)
    metrics.step(template)
    trainer.start()
    try:
        for _ in range(200):
            samples = scrape(registry)
            step = one(samples, "ddp_steps_total")
            assert one(samples, "ddp_examples_total") == 64 * step
            assert step == 1 or one(samples, "ddp_loss", split="training") == step
    finally:
        stop.set()
        trainer.join(timeout=30)


def test_serves_on_a_free_loopback_port_and_frees_it() -> None:
    registry, info = CollectorRegistry(), run_info()
    feed(Metrics(registry, info), info, last_step=46)
    server = serve(registry)
    assert server.host == "127.0.0.1"
    assert server.address == f"127.0.0.1:{server.port}"
    with urllib.request.urlopen(f"http://{server.address}/metrics", timeout=10) as response:
        body = response.read().decode()
    assert one(parse(body), "ddp_examples_total") == 46 * 64
    threads_before = threading.active_count()
    server.close()
    assert threading.active_count() < threads_before
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://{server.address}/metrics", timeout=10)
    again = serve(registry, port=server.port)
    again.close()


def test_a_port_in_use_is_named_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = occupied.getsockname()[1]
        with pytest.raises(UsageError, match=rf"port {port} on 127.0.0.1 is in use.*metrics\.port.* 0 "):
            serve(CollectorRegistry(), port=port)


def test_an_ipv6_address_is_written_as_in_a_url() -> None:
    try:
        server = serve(CollectorRegistry(), host="::1")
    except UsageError:
        pytest.skip("this machine has no IPv6 loopback")
    assert server.address == f"[::1]:{server.port}"
    server.close()
