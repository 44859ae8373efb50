"""`ddp check` on whole jobs: what is right passes, and each fault is named by the check that is there for it."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddp.check.chance import count_classes
from ddp.check.command import check_job
from ddp.check.examination import examine
from ddp.check.matrix_rate import rate_verdict
from ddp.check.observing import Call
from ddp.check.overfitting import Overfitted, overfit_verdict
from ddp.check.preparation import plain_copy
from ddp.check.ranks import Trained, equal_norms, most_shared
from ddp.check.subject import Subject
from ddp.check.threads import useful_threads
from ddp.check.verdicts import Verdict, to_json
from ddp.errors import DdpError
from ddp.job import Job, load_job, parse_job, regularisers, without_regularisation
from ddp.tasks import load_task
from ddp.tasks.base import TensorExamples
from ddp.topology import Topology
from jobs import python, run_command
from ranks import RankPool
from training_runs import agent_environment

ROOT = Path(__file__).resolve().parent.parent
MODULES = ["checked_tasks", "examples"]
ALONE = {"same weights on all ranks", "one data set on all ranks", "different data on each rank"}


def job(name: str, *, weight_decay: float = 0.0, **options: Any) -> Job:
    task = {"name": name, "options": options} if ":" in name else {"name": name, **options}
    return parse_job(
        {
            "run": {"steps": 30, "device": "cpu", "threads_per_rank": 1},
            "task": task,
            "batch": {"global_batch_size": 24},
            "optimizer": {"learning_rate": 1e-3, "weight_decay": weight_decay},
            "evaluation": {"metric": "loss"},
            "transport": {"timeout_seconds": 30.0},
            "metrics": {"enabled": False},
        }
    )


def checked(rank: int, world_size: int, store_address: str, jobs: list[Job]) -> list[tuple[dict[str, Any], str]]:
    """Of each job what rank 0 printed, by check, and the error that ended it."""
    found: list[tuple[dict[str, Any], str]] = []
    for each in jobs:
        printed, ended = io.StringIO(), ""
        with agent_environment(store_address), contextlib.redirect_stdout(printed):
            try:
                here = Topology(rank, world_size, rank, world_size, launcher="torchrun", restarts=len(found))
                check_job(each, here, burn_in=4, allow_import=MODULES, as_json=True)
            except DdpError as error:
                ended = f"{type(error).__name__}: {error}"
        text = printed.getvalue()
        found.append(({check["check"]: check for check in json.loads(text)["checks"]} if text else {}, ended))
    return found


FAULTS: dict[str, tuple[str, str, str]] = {
    "BatchNorm on the output": ("no BatchNorm on the output", "failed", "the outputs come from 5, a BatchNorm"),
    "not standardised": ("standardised inputs", "warning", "inputs: not centred, not scaled"),
    "one large channel": ("standardised inputs", "warning", "channel 2 much larger than the others"),
    "sure at the start": ("loss at chance level", "failed", "log(4) is 1.386"),
    "labels of others": ("20 examples overfitted", "failed", "on 20 examples"),
    "float32": ("gradient", "skipped", "float gives float32"),
    "bias before BatchNorm": ("dead parameters", "warning", "zero in all entries looked at of 0.bias"),
    "nan": ("first steps of training", "failed", "not finite"),
}
RIGHT = [
    job("digits", weight_decay=0.01, dropout=0.3),
    job("quadratic"),
    job("checked_tasks:Plain", weight_decay=0.1, dropout=0.2, label_smoothing=0.1),
    job("examples.custom_task:Spirals"),
    job("checked_tasks:Regression"),
    job("checked_tasks:Regression", embedded=True),
    job("text", context_length=32, layers=1, heads=2, width=32, validation_examples=8),
    job("checked_tasks:Streamed", examples=100),
]


@pytest.fixture(scope="module")
def on_one_rank(rank_pool: RankPool) -> list[tuple[dict[str, Any], str]]:
    """The right jobs, then those with one fault each."""
    faulty = [job("checked_tasks:Plain", fault=fault) for fault in FAULTS]
    half = [job("checked_tasks:Half")]
    (found,) = rank_pool.run(1, checked, [*RIGHT, *faulty, *half], timeout=200.0)
    return found


@pytest.mark.parametrize("number", range(len(RIGHT)))
def test_right_jobs_pass(on_one_rank: list[tuple[dict[str, Any], str]], number: int) -> None:
    checks, ended = on_one_rank[number]
    assert ended == ""
    assert {name: check["found"] for name, check in checks.items() if check["status"] in ("failed", "warning")} == {}
    assert checks["gradient"]["status"] == "ok"
    assert {name for name, check in checks.items() if "there is one rank" in check["found"]} == ALONE


def test_what_the_right_jobs_are_told(on_one_rank: list[tuple[dict[str, Any], str]]) -> None:
    digits, quadratic, plain, spirals, regression, embedded, text, streamed = (
        checks for checks, _ in on_one_rank[: len(RIGHT)]
    )
    assert digits["gradient of regularisation"]["status"] == "ok"
    assert "log(10)" in digits["loss at chance level"]["found"]
    assert {"weight decay", "dropout", "label smoothing"} == set(digits["stronger regularisation"]["figures"])
    assert "random features" in digits["20 examples overfitted"]["advice"]
    assert quadratic["standardised inputs"]["status"] == "skipped"
    assert quadratic["loss at chance level"]["status"] == "skipped"
    assert {"weight decay", "dropout", "label smoothing"} == set(plain["stronger regularisation"]["figures"])
    assert plain["gradient of regularisation"]["figures"]["norm_over_data_norm"] > 0
    assert spirals["loss at chance level"]["figures"]["classes"] == 2
    assert text["loss at chance level"]["figures"]["classes"] == 256
    assert "int64" in text["standardised inputs"]["found"]
    assert "no classes" in regression["loss at chance level"]["found"]
    assert "int64" in embedded["standardised inputs"]["found"]
    assert "embedding" in embedded["standardised inputs"]["advice"]
    assert streamed["20 examples overfitted"]["figures"]["examples"] == 20  # the first steps have taken 96 of 100


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(on_one_rank: list[tuple[dict[str, Any], str]], fault: str) -> None:
    checks, ended = on_one_rank[len(RIGHT) + list(FAULTS).index(fault)]
    name, status, words = FAULTS[fault]
    assert checks[name]["status"] == status, checks[name]
    assert words in checks[name]["found"]
    failing = [each for each, check in checks.items() if check["status"] == "failed"]
    assert ended == (f"ChecksFailedError: {len(failing)} of 13 checks failed: {', '.join(failing)}" if failing else "")


def test_a_forward_in_float32_gets_a_line(on_one_rank: list[tuple[dict[str, Any], str]]) -> None:
    checks, ended = on_one_rank[-1]
    assert ended == ""
    assert checks["gradient"]["status"] == "skipped"
    assert checks["gradient"]["found"].startswith("the loss cannot be computed in double precision: RuntimeError: ")


def test_two_ranks(rank_pool: RankPool) -> None:
    jobs = [
        job("checked_tasks:Plain", weight_decay=0.1),
        job("checked_tasks:Plain", fault="same data"),
        job("checked_tasks:Plain", fault="own data set"),
        job("checked_tasks:Plain", fault="BatchNorm on the output"),
        job("quadratic"),
        job("checked_tasks:Plain", fault="signal"),
        parse_job(
            {**job("checked_tasks:Plain").model_dump(exclude_none=True), "normalisation": {"sync_batch_norm": True}}
        ),
        job("checked_tasks:Plain", fault="unseeded data", dropout=0.2),
        parse_job(
            {
                **job("checked_tasks:LongTail").model_dump(exclude_none=True),
                "batch": {"global_batch_size": 80},
                "sampling": {"name": "class_balanced"},
            }
        ),
    ]
    first, second = rank_pool.run(2, checked, jobs, timeout=200.0)
    assert [ended for _, ended in first] == [ended for _, ended in second]
    assert all(checks == {} for checks, _ in second)  # rank 0 speaks
    right, same, own, normalised, quadratic, stopped, synchronised, unseeded, balanced = first
    for checks, ended in (right, synchronised):
        assert ended == ""
        assert [name for name, check in checks.items() if check["status"] in ("failed", "warning")] == []
        assert all(checks[name]["status"] == "ok" for name in ALONE)
    assert right[0]["gradient"]["figures"]["parameters"][0]["judged"] > 6  # each rank looks at entries of its own
    assert same[0]["different data on each rank"]["status"] == "failed"
    assert "ranks 0 and 1 have 100% of their examples in common" in same[0]["different data on each rank"]["found"]
    assert own[0]["one data set on all ranks"]["status"] == "warning"
    assert unseeded[0]["one data set on all ranks"]["status"] == "ok"
    assert balanced[0]["different data on each rank"]["status"] == "ok", balanced[0]["different data on each rank"]
    assert "BatchNorm" in normalised[0]["no BatchNorm on the output"]["found"]
    assert stopped == ({}, "StoppedError: stopped by SIGTERM before all was checked: run the check again")
    assert quadratic[1] == ""
    assert "copies of each other" in quadratic[0]["different data on each rank"]["found"]


def test_the_command_names_the_planted_bug(tmp_path: Path) -> None:
    command = python("-m", "ddp", "check", "--allow-import", "examples", "examples/check_planted_bug.toml")
    ended = run_command([*command, "--set", "run.device=cpu"], ROOT)
    assert ended.code == 1, ended.stderr
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("failed")]
    assert line.startswith("failed   gradient: relative error")
    assert (
        "in 4 of 6 parameters: 0.weight, 0.bias, 2.weight, 2.bias; right in 4.weight, 4.bias -> a backward is wrong"
        in line
    )
    assert ended.stdout.splitlines()[-1].startswith("7 ok, 1 failed")
    assert ended.stderr.endswith("error: 1 of 13 checks failed: gradient\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["examples/check_planted_bug.toml"], "give --allow-import examples.check_planted_bug"),
        (["examples/digits.toml", "--set", "task.chanels=3"], "did you mean"),
        (["examples/digits.toml", "--burn-in", "0"], "--burn-in"),
    ],
)
def test_usage_errors_end_with_2(arguments: list[str], message: str) -> None:
    ended = run_command(python("-m", "ddp", "check", *arguments), ROOT)
    assert ended.code == 2
    assert message in ended.stderr and "Traceback" not in ended.stderr


def test_without_regularisation_switches_off_what_has_a_key() -> None:
    custom = job("checked_tasks:Plain", weight_decay=0.1, dropout=0.5, label_smoothing=0.1, augment=True, other=3)
    plain = without_regularisation(custom)
    assert plain.optimizer.weight_decay == 0.0 and custom.optimizer.weight_decay == 0.1
    assert plain.task.options == {"dropout": 0.0, "label_smoothing": 0.0, "augment": False, "other": 3}  # type: ignore[union-attr]
    assert without_regularisation(plain) == plain
    digits = without_regularisation(load_job(ROOT / "examples/digits.toml", ["task.dropout=0.5"]))
    assert digits.task.dropout == 0.0  # type: ignore[union-attr]
    assert [each.key for each in regularisers(digits)] == [
        *("optimizer.weight_decay", "task.dropout", "task.label_smoothing"),
    ]
    assert [each.key for each in regularisers(job("quadratic"))] == ["optimizer.weight_decay"]


def test_nothing_of_the_job_is_changed() -> None:
    given = job("checked_tasks:Plain", weight_decay=0.1, dropout=0.2, label_smoothing=0.1)
    plain = without_regularisation(given)
    task, plain_task = (load_task(each.task, allow_import=MODULES) for each in (given, plain))
    training, _ = plain_task.datasets()
    assert isinstance(training, TensorExamples)
    subject = Subject(
        *(given, plain, task, plain_task, task.model(), task.model(), training),
        decay={"0.weight": 0.1},
        device=torch.device("cpu"),
    )
    models = (subject.initial, subject.model)
    before = [{name: each.clone() for name, each in model.state_dict().items()} for model in models]
    data, generators, dtype = (
        [each.clone() for each in training.tensors],
        torch.get_rng_state(),
        torch.get_default_dtype(),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as everywhere in tests: cores are shared
    try:
        verdicts = list(examine(subject, Trained(4), MODULES))
    finally:
        torch.set_num_threads(threads)
    assert [verdict.line() for verdict in verdicts if verdict.status == "failed"] == []
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(each, state[name]) for name, each in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.2]
    assert all(torch.equal(one, other) for one, other in zip(data, training.tensors, strict=True))
    assert torch.equal(generators, torch.get_rng_state()) and torch.get_default_dtype() == dtype


@pytest.mark.parametrize(
    ("outputs", "labels", "classes", "positions"),
    [
        (torch.zeros(8, 10), torch.arange(8), 10, 1),
        (torch.zeros(8, 5, 4, 4), torch.arange(8 * 16).view(8, 4, 4) % 5, 5, 16),
        (torch.zeros(8, 12, 256), torch.arange(8 * 13).view(8, 13).to(torch.uint8), 256, 12),
        (torch.zeros(8, 1), torch.tensor([0.0, 1.0] * 4), 2, 1),
        (torch.zeros(8), torch.tensor([0, 1] * 4), 2, 1),
        (torch.zeros(8, 10), torch.arange(8) + 5, None, 1),
        (torch.zeros(8, 10), torch.randn(8, 10), None, 1),
        (torch.zeros(8, 1), torch.randn(8, 1), None, 1),
    ],
)
def test_classes_are_told_by_outputs_and_labels(
    outputs: Tensor, labels: Tensor, classes: int | None, positions: int
) -> None:
    call = Call(torch.zeros(8), [], [outputs])
    assert count_classes(object(), call, {"x": torch.randn(8, 3), "labels": labels}) == (classes, positions)  # type: ignore[arg-type]


def test_a_task_may_say_its_classes() -> None:
    class Told:
        classes = 7

    assert count_classes(Told(), Call(torch.zeros(8), [], [torch.zeros(8, 2, 7)]), ()) == (7, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("start", "best", "ran_out", "status"),
    [
        (2.0, 0.01, False, "ok"),
        (2.0, -0.5, False, "ok"),
        (2.0, 0.1, False, "warning"),
        (2.0, 1.0, False, "failed"),
        (2.0, 1.0, True, "warning"),
        (math.nan, math.inf, False, "failed"),
        (-1.0, -3.0, False, "skipped"),
    ],
)
def test_verdicts_on_overfitting(start: float, best: float, ran_out: bool, status: str) -> None:
    done = Overfitted(nn.Linear(1, 1), (), start, best, 9, ran_out=ran_out)
    assert overfit_verdict(done, 20).status == status


def test_threads_are_as_before_also_after_an_error() -> None:
    threads = torch.get_num_threads()
    with pytest.raises(ValueError, match="in the middle"), useful_threads(lambda: None):
        raise ValueError("in the middle")
    assert torch.get_num_threads() == threads


def test_a_copy_keeps_frozen_what_the_job_freezes() -> None:
    given = job("checked_tasks:Plain")
    given = parse_job({**given.model_dump(exclude_none=True), "initialisation": {"freeze": ["0.*"]}})
    task = load_task(given.task, allow_import=MODULES)
    copied = plain_copy(given, task, task.model())
    frozen = [name for name, each in copied.named_parameters() if not each.requires_grad]
    assert frozen == ["0.weight"]


def test_a_line_and_json_say_the_same() -> None:
    verdict = Verdict("gradient", "failed", "it is wrong", "mend it", {"error": math.inf, "index": (1, 2)})
    assert verdict.line() == "failed   gradient: it is wrong -> mend it"
    told = json.loads(to_json([verdict, Verdict("inputs", "ok", "fine")]))
    assert told["counts"] == {"ok": 1, "warning": 0, "failed": 1, "skipped": 0}
    assert told["checks"][0]["figures"] == {"error": None, "index": [1, 2]}
    assert told["checks"][1] == {"check": "inputs", "status": "ok", "found": "fine", "advice": "", "figures": {}}


def test_examples_in_common() -> None:
    assert most_shared([list("abcd"), list("efgh")]) == (0, 1, 0.0)
    assert most_shared([list("abcd"), list("efgh"), list("gcba")]) == (0, 2, 0.75)
    assert most_shared([list("aaaa"), list("aaaa")]) is None
    assert most_shared([[], list("ab")]) is None


def test_equal_norms() -> None:
    assert equal_norms([(1.0, 2.0, 1.0), (3.0, 4.0, 3.0)]) == ((0, 2),)
    assert equal_norms([(0.0, 0.0)]) == () == equal_norms([]) == equal_norms([(1.0,)])


def test_rates() -> None:
    assert rate_verdict(1e9, 2e10, 1e11, threads=2, examples=8).status == "ok"
    slow = rate_verdict(1e9, 2e9, 1e11, threads=2, examples=8)
    assert slow.status == "warning" and "2.0% of the BLAS rate" in slow.found
    assert rate_verdict(1e5, 2e10, 1e11, threads=2, examples=8).status == "skipped"
    assert "busy" in rate_verdict(1e9, 2e8, 1e8, threads=1, examples=8).advice
