"""The job file: what is accepted, and what each mistake is told."""

from __future__ import annotations

import datetime
import math
from pathlib import Path
from typing import Any

import pytest

from ddp.errors import JobFileError
from ddp.job import BatchSection, Job, OptimizerSection, apply_overrides, load_job, parse_job

VALID: dict[str, Any] = {
    "run": {"steps": 10},
    "task": {"name": "digits"},
    "batch": {"global_batch_size": 64, "micro_batch_size": 16},
}


def test_defaults_fill_what_is_left_out() -> None:
    job = parse_job(VALID)
    assert job.optimizer.name == "adamw" and job.transport.name == "auto" and job.metrics.host == "127.0.0.1"
    assert job.run.id is None and job.run.epochs is None


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["run.id=a-1.b_c", "optimizer.betas=[0.8, 0.99]", "optimizer.gradient_clip_norm=1"],
        ["task.name=text", "task.width=32", "optimizer.name=sgd", "optimizer.momentum=0.9", "optimizer.nesterov=true"],
        ["task.name=my.module:Task", "task.options={size = 3, names = ['a', 'b']}", "evaluation.target=0.5"],
        ["batch.global_batch_size=auto", "batch.initial=16", "batch.largest=512", "optimizer.tuned_batch_size=64"],
    ],
)
def test_the_resolved_job_reads_back_equal(tmp_path: Path, overrides: list[str]) -> None:
    job = parse_job(apply_overrides(VALID, overrides))
    path = tmp_path / "job.toml"
    path.write_text(job.to_toml())
    assert load_job(path) == job


def test_options_keep_their_toml_types(tmp_path: Path) -> None:
    options = "{ f = inf, g = -inf, whole = 1.0, day = 2031-02-03, at = 2031-02-03T04:05:06Z, deep = [{ on = true }] }"
    job = parse_job(apply_overrides(VALID, ["task.name=my.module:Task", f"task.options={options}"]))
    (tmp_path / "again.toml").write_text(job.to_toml())
    again = load_job(tmp_path / "again.toml")
    assert again == job
    assert again.model_dump()["task"]["options"] == {
        "f": math.inf,
        "g": -math.inf,
        "whole": 1.0,
        "day": datetime.date(2031, 2, 3),
        "at": datetime.datetime(2031, 2, 3, 4, 5, 6, tzinfo=datetime.UTC),
        "deep": [{"on": True}],
    }
    assert type(again.model_dump()["task"]["options"]["whole"]) is float


def test_accumulation_is_the_fewest_passes_that_hold_the_batch() -> None:
    for ranks in range(1, 6):
        for batch in range(1, 40):
            for micro in range(1, batch + 1):
                section = BatchSection(global_batch_size=batch, micro_batch_size=micro)
                if ranks > batch:
                    with pytest.raises(
                        JobFileError, match=rf"{batch} examples a step are fewer than the {ranks} ranks"
                    ):
                        section.gradient_accumulation_steps(ranks)
                    continue
                steps, held = 0, 0
                while held < batch:
                    steps, held = steps + 1, held + ranks * micro
                assert section.gradient_accumulation_steps(ranks) == steps, (ranks, batch, micro)


def test_where_the_micro_batch_is_left_open_a_step_has_four_gradients() -> None:
    for ranks, expected in ((1, 4), (2, 2), (3, 2), (4, 1), (5, 1)):
        for batch in (64, 100, 131):
            section = BatchSection(global_batch_size=batch)
            assert section.gradient_accumulation_steps(ranks) == expected
            assert ranks * expected * section.examples_at_once(ranks) >= batch
    assert BatchSection(examples_per_rank=10).examples_per_step(3) == 30


def adaptive(**settings: int) -> BatchSection:
    return BatchSection(global_batch_size="auto", **settings)


def test_a_batch_that_adapts_itself_starts_and_stays_inside_its_limits() -> None:
    assert adaptive().examples_per_step(2) == 64 and adaptive().examples_per_step(100) == 100
    assert adaptive(initial=16).examples_per_step(2) == 16
    assert adaptive(smallest=100).examples_per_step(2) == 100
    assert adaptive(largest=20).examples_per_step(2) == 20
    assert adaptive().limits(2, 1472) == (2, 184)
    assert adaptive().limits(2, 100) == (2, 64)  # not under where it starts
    assert adaptive(smallest=8, largest=5000).limits(2, 1472) == (8, 1472)
    assert adaptive(initial=16).examples_at_once(2, 256) == 64 and adaptive(micro_batch_size=9).examples_at_once(2) == 9
    with pytest.raises(JobFileError, match="smallest <= initial <= largest does not hold: 32, 16, "):
        parse_job({**VALID, "batch": {"global_batch_size": "auto", "smallest": 32, "initial": 16}})
    with pytest.raises(JobFileError, match="follows the noise scale"):
        parse_job({**VALID, "batch": {"global_batch_size": "auto"}, "noise_scale": {"enabled": False}})


def test_adams_factor_has_half_the_exponent() -> None:
    sections = [OptimizerSection(name="sgd"), OptimizerSection(), OptimizerSection(learning_rate_exponent=0.7)]
    assert [(section.rule, section.rule_exponent) for section in sections] == [
        ("noise_scale", 1.0),
        ("noise_scale", 0.5),
        ("noise_scale", 0.7),
    ]
    with pytest.raises(ValueError, match="not a setting of the rule linear"):
        OptimizerSection(learning_rate_rule="linear", learning_rate_exponent=1.0)


def test_overrides_leave_the_table_alone_and_take_toml_values() -> None:
    result = apply_overrides(VALID, ["run.steps=3", "task.name=text", "metrics.enabled=false", "run.id = x"])
    assert result["run"] == {"steps": 3, "id": "x"} and result["task"]["name"] == "text"
    assert result["metrics"]["enabled"] is False
    assert VALID["run"] == {"steps": 10}


@pytest.mark.parametrize("override", ["run.steps", "steps=3", "run.=3", ".steps=3", "=3", "run.steps.more=3"])
def test_malformed_overrides_are_named(override: str) -> None:
    with pytest.raises(JobFileError, match="--set"):
        apply_overrides(VALID, [override])


@pytest.mark.parametrize(
    ("override", "path", "words"),
    [
        ("run.stps=3", "run.stps", ["unknown key", "did you mean steps?", "valid: id, directory"]),
        ("run.global_batch_size=3", "run.global_batch_size", ["unknown key (did you mean batch.global_batch_size?)"]),
        ("batsh.size=3", "batsh", ["unknown key", "did you mean batch?"]),
        ("task.chanels=3", "task.chanels", ["did you mean channels?", "valid: name, channels"]),
        ("task.name=digit", "task.name", ["'digit'", "did you mean digits?", "module:attr"]),
        ("task.name=3", "task.name", ["3"]),
        ("optimizer.name=addam", "optimizer.name", ["did you mean adam?", "valid: sgd, momentum, nesterov, adagrad,"]),
        ("transport.name=nccl", "transport.name", ["'nccl' is not valid", "auto, shared_memory, c10d"]),
        ("transport.wire=int4", "transport.wire", ["did you mean int8?", "gradient, bfloat16, float16, int8"]),
        ("transport.overlap=sometimes", "transport.overlap", ["'sometimes' is not valid", "auto, true, false"]),
        ("transport.pin=core", "transport.pin", ["'core' is not valid", "auto, true, false"]),
        ("batch.global_batch_size=0", "batch.global_batch_size", ["greater than 0, not 0"]),
        ("batch.global_batch_size=-4", "batch.global_batch_size", ["greater than 0"]),
        ("batch.global_batch_size=6.5", "batch.global_batch_size", ["integer", "6.5"]),
        ("batch.global_batch_size='64'", "batch.global_batch_size", ["integer", "'64'"]),
        ("batch.global_batch_size=aut", "batch.global_batch_size", ['"auto" or a valid integer', "did you mean auto?"]),
        ("noise_scale.sample_every=0", "noise_scale.sample_every", ['"auto" or greater than 0, not 0']),
        ("batch.largest=128", "batch", ['largest needs global_batch_size = "auto"']),
        ("batch.examples_per_rank=8", "batch", ["either global_batch_size or examples_per_rank"]),
        (
            "optimizer.learning_rate_rule=root",
            "optimizer.learning_rate_rule",
            ["'root' is not valid", "sqrt, noise_scale"],
        ),
        ("batch.micro_batch_size=65", "batch.micro_batch_size", ["larger than batch.global_batch_size"]),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate", ["finite", "nan"]),
        ("optimizer.learning_rate=true", "optimizer.learning_rate", ["number", "True"]),
        ("optimizer.momentum=0.9", "optimizer", ["momentum is not a setting of adamw"]),
        ("run.epochs=3", "run", ["either epochs or steps"]),
        ("run.id=../elsewhere", "run.id", ["'../elsewhere' is not a run id"]),
        ("run.id=a/b", "run.id", ["'a/b' is not a run id"]),
        ("run.id=..", "run.id", ["'..' is not a run id"]),
        ("run.id=", "run.id", ["'' is not a run id"]),
        ("metrics.port=65536", "metrics.port", ["65535"]),
        ("metrics.certificate=c.pem", "metrics", ["certificate and private_key go together"]),
        ("evaluation.every_steps=0", "evaluation.every_steps", ["greater than 0"]),
    ],
)
def test_a_mistake_is_told_with_its_path(tmp_path: Path, override: str, path: str, words: list[str]) -> None:
    file = tmp_path / "job.toml"
    file.write_text(parse_job(VALID).to_toml())
    with pytest.raises(JobFileError) as caught:
        load_job(file, [override])
    message = str(caught.value)
    assert message.startswith(f"{file}: ") and path in message and "\n" not in message
    for word in words:
        assert word in message


def test_every_mistake_is_told_at_once() -> None:
    with pytest.raises(JobFileError) as caught:
        parse_job({"run": {"steps": 1, "sed": 3}, "task": {"name": "digits"}})
    assert {line.split(": ")[1] for line in str(caught.value).splitlines()} == {"run.sed", "batch"}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match="cannot read the job file: No such file"):
        load_job(tmp_path / "absent.toml")
    with pytest.raises(JobFileError, match="cannot read the job file: Is a directory"):
        load_job(tmp_path)
    broken = tmp_path / "broken.toml"
    broken.write_text("[run\nsteps = 3")
    with pytest.raises(JobFileError, match=r"not valid TOML.*line 1"):
        load_job(broken)
    broken.write_bytes(b"[run]\n\xff = 3")
    with pytest.raises(JobFileError, match=r"not UTF-8 text \(byte 6\)"):
        load_job(broken)


def test_a_job_does_not_change() -> None:
    job = parse_job(VALID)
    with pytest.raises(ValueError, match="frozen"):
        job.run.steps = 3  # type: ignore[misc]
    assert isinstance(job, Job)
