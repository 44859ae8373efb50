"""Random directions in the space of a network's weights, filter-normalised (Li, Xu, Taylor, Studer and Goldstein 2018).

Each filter of a direction gets the norm of the network's filter, so that a step of one length means the same to networks of
different scale: without it, one with larger weights looks flatter. Biases and normalisation layers stay where they are
(the paper's section 4).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

NORMALISATION = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def filter_normalised(module: nn.Module, seed: int, number: int) -> list[Tensor]:
    """One direction, a tensor for each parameter, on its device and of its dtype.

    What is drawn depends on the seed, the number, and the parameters' order and shapes alone: networks of one architecture
    get the same draws, each scaled to its own weights. Rows of a matrix and kernels of a convolution are filters; a vector
    that is neither a bias nor of a normalisation layer is one as a whole.
    """
    generator = torch.Generator().manual_seed(_seed_of(seed, number))
    still = unperturbed(module)
    direction: list[Tensor] = []
    for name, parameter in module.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        scaled = torch.zeros_like(draw) if name in still else _scaled(draw, parameter.detach().cpu().double())
        direction.append(scaled.to(parameter))
    return direction


def unperturbed(module: nn.Module) -> set[str]:
    """Names of parameters that no direction moves: biases, those of normalisation layers, and frozen ones."""
    names: set[str] = set()
    for prefix, layer in module.named_modules():
        for name, parameter in layer.named_parameters(recurse=False):
            if isinstance(layer, NORMALISATION) or name.endswith("bias") or not parameter.requires_grad:
                names.add(f"{prefix}.{name}" if prefix else name)
    return names


def norm_of(direction: Sequence[Tensor]) -> float:
    """Euclidean, over all parameters."""
    return float(sum(each.double().square().sum().item() for each in direction)) ** 0.5


def _scaled(draw: Tensor, weights: Tensor) -> Tensor:
    """Each filter with the norm of the weights' own."""
    filters = (len(draw), -1) if draw.dim() > 1 else (1, -1)
    drawn, own = draw.reshape(filters), weights.reshape(filters)
    norms = drawn.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return (drawn * (own.norm(dim=1, keepdim=True) / norms)).reshape(draw.shape)


def _seed_of(seed: int, number: int) -> int:
    import numpy as np

    return int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0] >> 1)
