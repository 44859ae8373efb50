"""The first layer's weights as images: a convolution's filters, or a linear layer's rows where its input is square."""

from __future__ import annotations

import math

import torch
from torch import nn

from ddp.training.watching.outputs import CONVOLUTIONS
from ddp.training.watching.weights import ROOT
from ddp.watching.layers import WeightPictures

MOST_PICTURES = 64
SMALLEST_SIDE, LARGEST_SIDE = 3, 64  # pixels


def first_layer(module: nn.Module) -> tuple[str, nn.Module] | None:
    """The first module with parameters of its own, in the model's order, that is no normalisation."""
    for name, each in module.named_modules():
        has_parameters = next(each.parameters(recurse=False), None) is not None
        is_convolution = isinstance(each, nn.modules.conv._ConvNd)
        if has_parameters and (is_convolution or not isinstance(each, (*CONVOLUTIONS, nn.LayerNorm))):
            return name or ROOT, each
    return None


def weight_pictures(name: str, layer: nn.Module) -> WeightPictures | None:
    """None where the weights of `layer` are no images."""
    if isinstance(layer, nn.Conv2d):
        weight = layer.weight.detach()
    elif isinstance(layer, nn.Linear) and (channels := _square_channels(layer.in_features)):
        side = math.isqrt(layer.in_features // channels)
        weight = layer.weight.detach().view(layer.out_features, channels, side, side)
    else:
        return None
    total, channels, height, width = weight.shape
    if not min(height, width) >= SMALLEST_SIDE or max(height, width) > LARGEST_SIDE:
        return None
    kept = weight[:MOST_PICTURES]
    if channels != 3:
        kept = kept[:, :1]
    values = kept.to("cpu", torch.float32).contiguous().numpy().astype("<f4")
    shape = (len(kept), kept.shape[1], height, width)
    return WeightPictures(name, shape, total, values.tobytes())


def _square_channels(inputs: int) -> int:
    """1 for a grey image, 3 for a coloured one; 0 where the inputs are no square."""
    return next((channels for channels in (1, 3) if math.isqrt(inputs // channels) ** 2 * channels == inputs), 0)
