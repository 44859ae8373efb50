"""Residual networks for images (He et al. 2015, arXiv:1512.03385, table 1), the network that throughput is told in.

The stride of a bottleneck lies on its 3x3 convolution, as is usual since; shortcuts that change the shape are 1x1
convolutions (option B). Convolutions begin as in He et al. 2015, arXiv:1502.01852, by the outputs' number.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

EXPANSION = 4  # of a bottleneck's channels
BLOCKS: Mapping[int, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
BOTTLENECKS_FROM = 50


class Block(nn.Module):
    """Convolutions, each with BatchNorm, added to the input or to its projection, then ReLU."""

    def __init__(self, inputs: int, channels: int, stride: int, *, bottleneck: bool) -> None:
        super().__init__()
        outputs = channels * (EXPANSION if bottleneck else 1)
        if bottleneck:
            kernels = [(inputs, channels, 1, 1), (channels, channels, 3, stride), (channels, outputs, 1, 1)]
        else:
            kernels = [(inputs, channels, 3, stride), (channels, outputs, 3, 1)]
        layers: list[nn.Module] = []
        for each in kernels:
            layers += [_convolution(*each), nn.BatchNorm2d(each[1]), nn.ReLU(inplace=True)]
        self.residual = nn.Sequential(*layers[:-1])
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(_convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
        self.activation = nn.ReLU(inplace=True)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.activation(self.residual(hidden) + self.shortcut(hidden))


def residual_network(depth: int, classes: int, *, width: int = 64, dropout: float = 0.0) -> nn.Sequential:
    """(n, 3, height, width) to (n, classes), for any height and width.

    Args:
        depth: one of BLOCKS.
        width: channels of the first stage; each of the three that follow has twice as many.
    """
    bottleneck = depth >= BOTTLENECKS_FROM
    layers: list[nn.Module] = [
        _convolution(3, width, 7, 2),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
    ]
    inputs = width
    for stage, count in enumerate(BLOCKS[depth]):
        channels = width << stage
        for number in range(count):
            stride = 2 if stage and not number else 1
            layers.append(Block(inputs, channels, stride, bottleneck=bottleneck))
            inputs = channels * (EXPANSION if bottleneck else 1)
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(inputs, classes)]
    return nn.Sequential(*layers)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return layer
