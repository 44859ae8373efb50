"""The built-in tasks' networks and what regularises them: keys of the job file, and losses against formulas by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ddp.errors import JobFileError, UsageError
from ddp.job import DigitsSection, SyntheticImagesSection, TextSection, parse_job
from ddp.tasks.digits import CLASSES, IMAGE, DigitsTask
from ddp.tasks.networks import ACTIVATIONS, convolutional_network
from ddp.tasks.resnet import residual_network
from ddp.tasks.synthetic_images import SyntheticImagesTask
from ddp.tasks.text import TextTask


def network(image: tuple[int, int, int] = IMAGE, **keys: Any) -> nn.Sequential:
    return convolutional_network(DigitsSection(name="digits", **keys), image, CLASSES)


def test_left_alone_the_digits_network_is_what_it_always_was() -> None:
    """Layer by layer, name by name and bit for bit: old checkpoints and figures hold."""
    torch.manual_seed(3)
    made = DigitsTask(DigitsSection(name="digits", channels=5)).model()
    torch.manual_seed(3)
    before = nn.Sequential(
        nn.Conv2d(1, 5, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(5, 10, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.0),
        nn.Linear(40, 10),
    )
    assert str(made) == str(before)
    assert list(made.state_dict()) == list(before.state_dict())
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(made(images), before(images))


def test_layers_units_and_activation_are_keys() -> None:
    made = network((3, 9, 4), channels=2, layers=5, units=7, activation="gelu", batch_norm=False, dropout=0.3)
    convolutions = [(each.in_channels, each.out_channels) for each in made if isinstance(each, nn.Conv2d)]
    assert convolutions == [(3, 2), (2, 4), (4, 8), (8, 8), (8, 8)]  # 9x4 halves twice, to 2x1
    linear = [(each.in_features, each.out_features) for each in made if isinstance(each, nn.Linear)]
    assert linear == [(8 * 2 * 1, 7), (7, 10)]
    assert sum(isinstance(each, nn.GELU) for each in made) == 6 and not any(isinstance(each, nn.ReLU) for each in made)
    assert isinstance(made[-2], nn.Dropout) and made[-2].p == 0.3
    assert made(torch.randn(2, 3, 9, 4)).shape == (2, 10)
    with pytest.raises(UsageError, match="task.channels, task.layers, task.units: a layer would have"):
        network((1, 1 << 13, 1 << 13), layers=12, channels=1 << 20)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_trains(name: Any) -> None:
    outputs = network(activation=name, channels=2, units=3)(torch.randn(4, 1, 8, 8))
    outputs.sum().backward()
    assert outputs.shape == (4, 10)


def test_a_wrong_key_is_answered_with_the_right_one() -> None:
    table: dict[str, Any] = {
        "run": {"steps": 1},
        "batch": {"global_batch_size": 8},
        "task": {"name": "digits", "activation": "rellu", "layer": 3},
    }
    with pytest.raises(JobFileError) as error:
        parse_job(table)
    assert "task.activation: 'rellu' is not valid (did you mean relu?)" in str(error.value)
    assert "task.layer: unknown key (did you mean layers?)" in str(error.value)
    with pytest.raises(JobFileError, match="unknown task 'image'.*did you mean images"):
        parse_job({**table, "task": {"name": "image"}})
    with pytest.raises(JobFileError, match="task.path: missing"):
        parse_job({**table, "task": {"name": "images"}})


# Regularisation


def smoothed(logits: Tensor, label: int, smoothing: float) -> float:
    """Szegedy et al. 2015 (arXiv:1512.00567), section 7, for one example."""
    values = logits.detach().double().numpy()
    logs = values - np.log(np.exp(values).sum())
    return -(1 - smoothing) * logs[label] - smoothing * logs.mean()


class Counting(nn.Module):
    """How often a model is called."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += 1
        return self.model(inputs)


def test_labels_are_smoothed_while_training_and_only_then() -> None:
    task = DigitsTask(DigitsSection(name="digits", label_smoothing=0.3, channels=4, batch_norm=False))
    plain = DigitsTask(DigitsSection(name="digits"))
    torch.manual_seed(0)
    model = Counting(task.model())
    images, labels = task.datasets()[0].__getitems__(range(6))
    batch = images, labels
    losses, metrics = task.loss_and_metrics(model, batch)
    assert model.calls == 1 and losses.requires_grad and not metrics["accuracy"].requires_grad
    logits = model(batch[0])
    expected = [smoothed(logits[i], int(batch[1][i]), 0.3) for i in range(6)]
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-5)
    assert torch.equal(task.loss(model, batch), losses)
    assert torch.equal(task.metrics(model, batch)["accuracy"], metrics["accuracy"])
    assert torch.equal(task.loss(model.eval(), batch), plain.loss(model, batch))


def test_the_language_model_smooths_drops_out_and_takes_an_activation() -> None:
    small: dict[str, Any] = {"name": "text", "context_length": 5, "layers": 1, "heads": 2, "width": 8}
    task = TextTask(TextSection(**small, label_smoothing=0.2))
    torch.manual_seed(0)
    model = Counting(task.model())
    batch = (torch.randint(0, 256, (3, 6), dtype=torch.uint8),)
    losses, metrics = task.loss_and_metrics(model, batch)
    assert model.calls == 1
    logits = model(batch[0][:, :5].long())
    expected = [np.mean([smoothed(logits[i, t], int(batch[0][i, t + 1]), 0.2) for t in range(5)]) for i in range(3)]
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-5)
    for name, values in task.metrics(model, batch).items():
        assert torch.equal(values, metrics[name])
    bits = metrics["bits_per_byte"] * float(np.log(2))
    torch.testing.assert_close(task.loss(model.eval(), batch), bits)

    dropping = TextTask(TextSection(**small, dropout=0.5, activation="tanh")).model()
    text = batch[0][:, :5].long()
    assert not torch.equal(dropping(text), dropping(text))
    assert torch.equal(dropping.eval()(text), dropping(text))
    assert any(isinstance(each, nn.Tanh) for each in dropping.modules())


# The residual network and its images


@pytest.mark.parametrize(
    ("depth", "parameters"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (101, 44_549_160)]
)
def test_residual_networks_have_the_published_size(depth: int, parameters: int) -> None:
    with torch.device("meta"):
        model = residual_network(depth, 1000)
    assert sum(each.numel() for each in model.parameters()) == parameters


def test_a_residual_network_halves_five_times_and_trains() -> None:
    model = residual_network(50, 7, width=2)
    images = torch.randn(2, 3, 65, 40)
    assert model[:-4](images).shape == (2, 64, 3, 2)
    model(images).square().sum().backward()
    assert all(bool(each.grad.abs().sum() > 0) for each in model.parameters() if each.grad is not None)


def test_synthetic_images_are_the_same_whenever_they_are_asked_for() -> None:
    section = SyntheticImagesSection(
        name="synthetic_images", size=9, classes=5, examples=50, validation_examples=8, noise=0.1, width=4
    )
    task = SyntheticImagesTask(section)
    training, validation = task.datasets()
    assert (len(training), len(validation)) == (50, 8)
    images, labels = training.__getitems__(range(50))
    again, same = SyntheticImagesTask(section).datasets()[0].__getitems__([7, 3])
    assert torch.equal(again, images[[7, 3]]) and torch.equal(same, labels[[7, 3]])
    assert torch.equal(training[7][0], images[7])
    assert len({image.numpy().tobytes() for image in [*images, *validation.__getitems__(range(8))[0]]}) == 58
    assert set(labels.tolist()) == set(range(5)) and torch.equal(training.labels, labels)
    means = torch.stack([images[labels == label].mean(dim=0) for label in range(5)])
    seen, truth = validation.__getitems__(range(8))
    assert torch.equal((seen[:, None] - means).square().sum(dim=(2, 3, 4)).argmin(dim=1), truth)  # can be learnt
    batch = training.collate((images, labels))
    assert task.loss(task.model(), batch).shape == (50,)
