"""The bundled tasks' data and models, and the messages for a task that cannot be loaded."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from ddp.errors import UsageError
from ddp.job import (
    TASKS,
    CustomSection,
    DigitsSection,
    ImagesSection,
    QuadraticSection,
    SyntheticImagesSection,
    TextSection,
    load_job,
)
from ddp.tasks import METHODS, REGISTRY, load_task
from ddp.tasks.base import Task, TensorExamples, metric_goal
from ddp.tasks.digits import DigitsTask
from ddp.tasks.images import ImagesTask
from ddp.tasks.synthetic import QuadraticTask
from ddp.tasks.synthetic_images import SyntheticImagesTask
from ddp.tasks.text import LanguageModel, TextTask, source_files, split_files, windows

EXAMPLES = Path(__file__).parent.parent / "examples"


# Loading


def test_registered_tasks_come_by_name() -> None:
    assert type(load_task(DigitsSection(name="digits"), allow_import=())) is DigitsTask
    assert type(load_task(TextSection(name="text"), allow_import=())) is TextTask
    assert type(load_task(QuadraticSection(name="quadratic"), allow_import=())) is QuadraticTask
    assert type(load_task(SyntheticImagesSection(name="synthetic_images"), allow_import=())) is SyntheticImagesTask
    assert type(load_task(ImagesSection(name="images", path="nowhere"), allow_import=())) is ImagesTask
    assert set(REGISTRY) == set(TASKS) == {"digits", "text", "quadratic", "images", "synthetic_images"}


def test_importing_the_registry_imports_no_torch() -> None:
    code = "import sys, ddp.tasks; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module with right and wrong tasks, in the working directory and not on Python's path."""
    name = "some_tasks_of_a_user"
    text = """
from examples_of_a_user import Whole
class Configured(Whole):
    def __init__(self, size, depth=2):
        self.size, self.depth = size, depth
class Faulty(Whole):
    def __init__(self):
        raise TypeError("a defect inside")
class NoLoss(Whole):
    loss = None
class NoGoals(Whole):
    goals = ("accuracy",)
class OddGoal(Whole):
    goals = {"accuracy": "up"}
NUMBER = 3
"""
    whole = f"class Whole:\n    goals = {{'score': 'max'}}\n    {' = '.join(METHODS)} = lambda self: None\n"
    (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "examples_of_a_user.py").write_text(whole)
    (tmp_path / "lacks_something.py").write_text("import no_such_library_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    for imported in (name, "examples_of_a_user", "lacks_something"):
        monkeypatch.delitem(sys.modules, imported, raising=False)
    return name


def load(name: str, **options: Any) -> Any:
    return load_task(CustomSection(name=name, options=options), allow_import=[name.partition(":")[0]])


def test_a_custom_task_gets_its_options(module: str) -> None:
    task = load(f"{module}:Configured", size=5)
    assert (task.size, task.depth) == (5, 2)


def test_a_custom_task_needs_the_flag_and_runs_nothing_without(module: str) -> None:
    with pytest.raises(UsageError, match=f"{module}:Configured.*--allow-import"):
        load_task(CustomSection(name=f"{module}:Configured", options={"size": 5}), allow_import=())
    assert module not in sys.modules


@pytest.mark.parametrize(
    ("attribute", "options", "message"),
    [
        ("Missing", {}, r"module 'some_tasks_of_a_user' \(.*some_tasks_of_a_user.py\) has no attribute 'Missing'"),
        ("NUMBER", {}, "is a int; name a class or function"),
        ("Configured", {}, r"task.options: missing a required argument: 'size'; .* takes \(size, depth=2\)"),
        ("Configured", {"size": 1, "colour": 2}, r"task.options: .*'colour'; .* takes \(size, depth=2\)"),
        ("NoLoss", {}, r"\(NoLoss\) has no method loss"),
        ("NoGoals", {}, r"\(NoGoals\) needs goals"),
        ("OddGoal", {}, r"\(OddGoal\) needs goals.*'up'"),
    ],
)
def test_a_wrong_custom_task_is_answered_clearly(
    module: str, attribute: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load(f"{module}:{attribute}", **options)


@pytest.mark.parametrize("name", ["nowhere_to_be_found", "nowhere_to_be_found.inner"])
def test_a_missing_module_is_named_with_where_it_was_looked_for(module: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"no module 'nowhere_to_be_found' in {tmp_path}"):
        load(f"{name}:Task")


def test_a_defect_of_the_users_code_keeps_its_own_error(module: str) -> None:
    with pytest.raises(TypeError, match="a defect inside"):
        load(f"{module}:Faulty")
    with pytest.raises(ModuleNotFoundError, match="no_such_library_anywhere"):
        load("lacks_something:Task")


def test_digits_without_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match=r"`examples` extra"):
        DigitsTask(DigitsSection(name="digits")).datasets()


def test_the_example_job_files_are_valid_and_name_metrics_of_their_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES.parent)
    for name, goal in (
        ("digits", "max"),
        ("images", "max"),
        ("text", "min"),
        ("custom_task", "max"),
    ):
        job = load_job(EXAMPLES / f"{name}.toml")
        task = load_task(job.task, allow_import=["examples"])
        assert metric_goal(task, job.evaluation.metric) == goal
        assert job.evaluation.target is not None


# Metrics


def test_a_metric_has_a_direction_and_an_unknown_one_is_refused() -> None:
    task = cast(Task, SimpleNamespace(goals={"accuracy": "max", "error_rate": "min"}))
    assert metric_goal(task, "accuracy") == "max"
    assert metric_goal(task, "error_rate") == metric_goal(task, "loss") == "min"
    with pytest.raises(UsageError, match=r"'acuracy' \(did you mean accuracy\?\); valid: accuracy, error_rate, loss"):
        metric_goal(task, "acuracy")


def test_tensor_examples_refuse_unequal_lengths() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        TensorExamples(torch.zeros(2), torch.zeros(3))


# Digits


def test_digits_splits_the_bundled_images_the_same_for_every_run() -> None:
    torch.manual_seed(1)
    training, validation = DigitsTask(DigitsSection(name="digits")).datasets()
    torch.manual_seed(2)
    again, _ = DigitsTask(DigitsSection(name="digits", channels=8)).datasets()
    assert (len(training), len(validation)) == (1472, 325)
    assert torch.equal(training.tensors[0], again.tensors[0])

    bundled: Any = load_digits()
    images = torch.cat([training.tensors[0], validation.tensors[0]]).double().flatten(1)
    labels = torch.cat([training.tensors[1], validation.tensors[1]])
    # Undo the standardisation: pixels are whole numbers from 0 to 16, so the darkest and brightest give the scale.
    pixels = ((images - images.min()) / (images.max() - images.min()) * 16).round().long().numpy()
    got = sorted([*row, label] for row, label in zip(pixels.tolist(), labels.tolist(), strict=True))
    expected = sorted(
        [*map(int, image.flatten()), int(k)] for image, k in zip(bundled.images, bundled.target, strict=True)
    )
    assert got == expected


def test_digits_are_standardised_by_the_training_set_alone() -> None:
    training, validation = (
        images.tensors[0].double() for images in DigitsTask(DigitsSection(name="digits")).datasets()
    )
    assert abs(float(training.mean())) < 1e-5
    assert abs(float(training.std()) - 1) < 1e-5
    assert abs(float(validation.mean())) > 1e-4  # its own mean would be 0


def test_the_network_follows_its_section() -> None:
    def layers(**settings: Any) -> list[nn.Module]:
        return list(DigitsTask(DigitsSection(name="digits", **settings)).model().modules())

    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in layers()) == 2
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in layers(batch_norm=False))
    assert [layer.out_channels for layer in layers(channels=5) if isinstance(layer, nn.Conv2d)] == [5, 10]
    assert [layer.p for layer in layers(dropout=0.3) if isinstance(layer, nn.Dropout)] == [0.3]


def test_digits_loss_and_accuracy_are_values_of_single_examples() -> None:
    torch.manual_seed(0)
    task = DigitsTask(DigitsSection(name="digits"))
    model = task.model().eval()
    images, labels = task.datasets()[1].__getitems__(range(7))
    with torch.no_grad():
        probabilities = model(images).double().softmax(dim=1)
        losses, metrics = task.loss(model, (images, labels)), task.metrics(model, (images, labels))
    expected = [-math.log(float(probabilities[i, labels[i]])) for i in range(7)]
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-5)
    assert metrics["accuracy"].tolist() == [int(probabilities[i].argmax()) == int(labels[i]) for i in range(7)]


# Text


def write_sources(root: Path, count: int = 41) -> None:
    """Files of distinct characters and lengths, in several folders; and some that are no sources."""
    for index in range(count):
        path = root / f"package{index % 3}" / f"module{index}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(chr(0x100 + index) * (50 + index), encoding="utf-8")
    for other in ("site-packages/x.py", "package0/__pycache__/y.py", "package0/data.txt"):
        (root / other).parent.mkdir(exist_ok=True)
        (root / other).write_text("not a source")


def test_the_sources_are_the_py_files_in_one_order(tmp_path: Path) -> None:
    write_sources(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in source_files(tmp_path)]
    assert names == sorted(f"package{i % 3}/module{i}.py" for i in range(41))


def test_a_file_is_either_for_training_or_for_validation(tmp_path: Path) -> None:
    write_sources(tmp_path)
    training, validation = split_files(source_files(tmp_path))
    assert len(validation) == 3
    assert len(training) == 38
    assert not set(training) & set(validation)
    texts = [bytes(windows(files, 7).flatten().tolist()).decode(errors="ignore") for files in (training, validation)]
    assert texts[0]
    assert texts[1]
    assert not set(texts[0]) & set(texts[1])


def test_windows_are_the_text_end_to_end(tmp_path: Path) -> None:
    write_sources(tmp_path, count=5)
    files = source_files(tmp_path)
    text = b"".join(path.read_bytes() for path in files)
    got = windows(files, 13)
    assert got.shape == (len(text) // 13, 13)
    assert got.dtype == torch.uint8
    assert bytes(got.flatten().tolist()) == text[: got.numel()]
    assert windows([], 13).shape == (*windows(files, 10000).shape[:1], 13) == (0, 13)


def test_the_standard_library_gives_both_sets() -> None:
    training, validation = TextTask(TextSection(name="text", validation_examples=100)).datasets()
    assert len(training) * 65 > 5_000_000
    assert len(validation) == 100
    assert len({bytes(row.tolist()) for row in validation.tensors[0]}) > 95  # spread out, not one place


def test_more_validation_examples_than_there_are_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"task.validation_examples: .* validation examples of 65 bytes, 1000000000 asked"
    ):
        TextTask(TextSection(name="text", validation_examples=10**9)).datasets()


def test_text_loss_and_metrics_are_those_of_the_next_byte() -> None:
    torch.manual_seed(0)
    task = TextTask(TextSection(name="text", context_length=9, layers=1, heads=2, width=8))
    model = task.model()
    batch = (torch.randint(0, 256, (3, 10), dtype=torch.uint8),)
    with torch.no_grad():
        losses, metrics = task.loss(model, batch), task.metrics(model, batch)
        probabilities = model(batch[0][:, :9].long()).double().softmax(dim=-1)
    for i in range(3):
        text = [int(byte) for byte in batch[0][i]]
        picked = [float(probabilities[i, t, text[t + 1]]) for t in range(9)]
        hits = [int(probabilities[i, t].argmax()) == text[t + 1] for t in range(9)]
        assert float(losses[i]) == pytest.approx(-sum(map(math.log, picked)) / 9, rel=1e-5)
        assert float(metrics["bits_per_byte"][i]) == pytest.approx(-sum(map(math.log2, picked)) / 9, rel=1e-5)
        assert float(metrics["accuracy"][i]) == pytest.approx(sum(hits) / 9)


def test_a_position_sees_itself_and_what_came_before_and_nothing_later() -> None:
    torch.manual_seed(0)
    model = LanguageModel(context_length=12, layers=2, heads=2, width=16).double().eval()
    text = torch.randint(0, 256, (1, 12))
    changed = text.clone()
    changed[0, 5] += 1 if changed[0, 5] < 255 else -1
    with torch.no_grad():
        difference = (model(text) - model(changed)).abs().amax(dim=-1)[0]
    assert (difference[:5] == 0).all()
    assert (difference[5:] > 0).all()


def test_a_fresh_language_model_knows_nothing_and_can_learn_a_sentence() -> None:
    torch.manual_seed(0)
    model = LanguageModel(context_length=16, layers=1, heads=2, width=32)
    text = torch.tensor(list(b"for i in range(3)"))[None]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses: list[float] = []
    for _ in range(60):
        loss = cross_entropy(model(text[:, :-1]).transpose(1, 2), text[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(256), rel=0.05)
    assert losses[-1] < 0.1
