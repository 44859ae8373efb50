"""The [optimizer], [schedule] and [initialisation] tables: what they take, what they refuse and how they say so."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest

from ddp.errors import JobFileError
from ddp.job import Job, parse_job


def job_with(**tables: dict[str, Any]) -> Job:
    whole = {"run": {"steps": 3}, "task": {"name": "digits"}, "batch": {"global_batch_size": 8}}
    return parse_job({**whole, **tables})


GOOD: list[tuple[str, dict[str, Any]]] = [
    *(("optimizer", {"name": name}) for name in ("sgd", "momentum", "adagrad", "rmsprop", "adadelta", "adam")),
    ("optimizer", {"name": "nesterov", "nesterov": True}),
    ("optimizer", {"name": "sgd", "momentum": 0.9, "nesterov": True}),
    ("optimizer", {"name": "rmsprop", "alpha": 0.9, "centered": True, "momentum": 0.5}),
    ("optimizer", {"name": "adamw", "betas": [0.5, 0.9], "final_momentum": 0.99, "momentum_epochs": 0.5}),
    ("optimizer", {"groups": [{"parameters": ["*.bias"], "weight_decay": 0.0}, {"parameters": ["head.*"]}]}),
    ("schedule", {"name": "1/t", "decay_epochs": 2.5, "warmup_epochs": 1.0}),
    ("schedule", {"name": "step", "step_every_epochs": 30.0}),
    ("schedule", {"name": "plateau", "metric": "loss", "min_learning_rate": 1e-5}),
    ("initialisation", {"file": "x", "skip": ["head.*"], "freeze": ["features.*"]}),
    ("initialisation", {"weights": "kaiming_normal", "activation": "tanh", "biases": "leave"}),
]


@pytest.mark.parametrize(("table", "keys"), GOOD, ids=str)
def test_a_job_is_read_back_as_it_was_written(table: str, keys: dict[str, Any]) -> None:
    job = job_with(**{table: keys})
    assert parse_job(tomllib.loads(job.to_toml())) == job


def test_each_optimizer_has_torchs_defaults_and_its_exponent() -> None:
    found = {name: job_with(optimizer={"name": name}).optimizer for name in ("momentum", "adagrad", "adadelta", "adam")}
    assert [each.learning_rate for each in found.values()] == [1e-3, 1e-2, 1.0, 1e-3]
    assert [each.epsilon for each in found.values()] == [1e-8, 1e-10, 1e-6, 1e-8]
    assert [each.first_momentum for each in found.values()] == [0.9, 0.0, 0.0, 0.9]
    assert [each.rule_exponent for each in found.values()] == [1.0, 0.5, 0.5, 0.5]
    assert job_with(schedule={"name": "1/t", "decay_steps": 3}).schedule.name == "inverse_time"


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("optimizer", {"name": "rmspropp"}, "optimizer.name: 'rmspropp' is not valid (did you mean rmsprop?)"),
    ("optimizer", {"name": "adam", "momentum": 0.5}, "momentum is not a setting of adam; its momentum is betas[0]"),
    ("optimizer", {"name": "adagrad", "rho": 0.5}, "rho is not a setting of adagrad"),
    ("optimizer", {"name": "sgd", "epsilon": 1e-3}, "epsilon is not a setting of sgd"),
    ("optimizer", {"name": "momentum", "nesterov": True}, 'use name = "nesterov"'),
    ("optimizer", {"name": "momentum", "momentum": 0.0}, "momentum needs a momentum above 0"),
    ("optimizer", {"name": "momentum", "final_momentum": 0.99}, "either momentum_steps or momentum_epochs"),
    ("optimizer", {"name": "sgd", "final_momentum": 0.99, "momentum_steps": 3}, "a momentum above 0 to start from"),
    ("optimizer", {"name": "adam", "momentum_steps": 3}, "need final_momentum"),
    ("optimizer", {"name": "adadelta", "final_momentum": 0.9, "momentum_steps": 3}, "not a setting of adadelta"),
    ("optimizer", {"groups": [{"parameters": ["a"], "lr_factor": 2.0}]}, "optimizer.groups.0.lr_factor: unknown key"),
    ("optimizer", {"groups": [{"parameters": []}]}, "optimizer.groups.0.parameters"),
    ("schedule", {"name": "expotential"}, "did you mean exponential?"),
    ("schedule", {"name": "step"}, "step needs either step_every_steps or step_every_epochs"),
    ("schedule", {"name": "step", "step_every_steps": 2, "step_every_epochs": 2.0}, "step needs either"),
    ("schedule", {"name": "exponential", "decay_steps": 5}, "exponential needs a factor"),
    ("schedule", {"name": "cosine", "patience": 3}, "patience is not a setting of cosine"),
    ("schedule", {"name": "plateau", "factor": 1.5}, "schedule.factor"),
    ("schedule", {"warmup_steps": 3, "warmup_epochs": 1.0}, "either warmup_steps or warmup_epochs"),
    ("initialisation", {"weights": "kaiming"}, "did you mean kaiming_"),
    ("initialisation", {"only": ["a.*"]}, "they need initialisation.file"),
    ("initialisation", {"activation": "tanh"}, "activation needs initialisation.weights"),
    ("initialisation", {"file": "a\0b"}, "zero character"),
]


@pytest.mark.parametrize(("table", "keys", "words"), BAD, ids=str)
def test_a_mistake_is_told_in_one_line(table: str, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(JobFileError) as caught:
        job_with(**{table: keys})
    assert words in str(caught.value) and "\n" not in str(caught.value)
