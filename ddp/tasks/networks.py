"""What the built-in tasks' networks are made of: activations by their names, and a small convolutional network."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

from torch import nn

from ddp.errors import UsageError
from ddp.job import Activation, ConvolutionalSection

ACTIVATIONS: Mapping[Activation, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
MOST_WEIGHTS = 1 << 32  # of a layer: more is a slip, and would fill the memory


def convolutional_network(
    section: ConvolutionalSection, image: tuple[int, int, int], classes: int, augmentation: nn.Module | None = None
) -> nn.Sequential:
    """Convolutions of 3x3 that each halve the resolution, then fully connected layers: (n, *image) to (n, classes).

    Args:
        image: channels, height and width.
        augmentation: what comes first; the layers' names are the same with and without.

    Raises:
        UsageError: the network would be absurdly large.
    """
    inputs, height, width = image
    outputs = section.channels
    layers: list[nn.Module] = []
    for _ in range(section.layers):
        _check(9 * inputs * outputs)
        layers.append(nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=not section.batch_norm))
        if section.batch_norm:
            layers.append(nn.BatchNorm2d(outputs))
        layers.append(ACTIVATIONS[section.activation]())
        inputs = outputs
        if min(height, width) > 1:
            layers.append(nn.MaxPool2d(2))
            height, width, outputs = height // 2, width // 2, 2 * outputs
    features = inputs * height * width
    _check(features * (section.units or classes))
    layers.append(nn.Flatten())
    if section.units:
        layers += [nn.Linear(features, section.units), ACTIVATIONS[section.activation]()]
        features = section.units
    layers += [nn.Dropout(section.dropout), nn.Linear(features, classes)]
    named = {str(index): layer for index, layer in enumerate(layers)}
    return nn.Sequential(OrderedDict({**({"augmentation": augmentation} if augmentation else {}), **named}))


def _check(weights: int) -> None:
    if weights > MOST_WEIGHTS:
        raise UsageError(
            f"task.channels, task.layers, task.units: a layer would have {weights:,} weights; lower one of them"
        )
