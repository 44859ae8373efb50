"""Batch normalisation over all ranks' examples of a micro-batch, on CPU, where torch's SyncBatchNorm does not run.

Ranks add up count, sum and sum of squares of each channel in one float64 vector, and in backward the two sums that the
gradient needs: one collective each way, in a process group of their own so that they do not mix with DDP's.
On CUDA it is torch's.
"""

from __future__ import annotations

import copy
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm


def synchronised(module: nn.Module, device: torch.device, timeout_seconds: float = 300.0) -> nn.Module:
    """`module` with every batch normalisation over all ranks; the same parameters and buffers. Collective.

    Args:
        timeout_seconds: for a rank to come before the others give it up.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    return _converted(module, dist.new_group(timeout=timedelta(seconds=timeout_seconds)))


def _converted(module: nn.Module, group: Any) -> nn.Module:
    if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm):
        return SyncBatchNorm.like(module, group)
    for name, child in module.named_children():
        setattr(module, name, _converted(child, group))
    return module


class SyncBatchNorm(_BatchNorm):
    """Takes (n, channels, ...); each rank may bring another n. In evaluation it is plain batch normalisation."""

    _group: Any = None

    @classmethod
    def like(cls, layer: _BatchNorm, group: Any) -> SyncBatchNorm:
        """With the layer's own parameters, buffers and mode."""
        new = cls(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        new._parameters, new._buffers = layer._parameters, layer._buffers
        new._group = group
        new.training = layer.training
        return new

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 -- torch's name
        if input.dim() < 2:
            raise ValueError(f"batch normalisation needs (n, channels, ...), not {input.dim()} dimensions")

    def __deepcopy__(self, memo: dict[int, Any]) -> SyncBatchNorm:
        """A process group is no value: the copy meets in the same one."""
        memo[id(self._group)] = self._group
        new = SyncBatchNorm.__new__(SyncBatchNorm)
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 -- torch's name
        self._check_input_dim(input)
        if not self.training:
            statistics = (self.running_mean, self.running_var)
            by_batch = self.running_mean is None  # the rank's own: an evaluation gives ranks other numbers of batches
            return nn.functional.batch_norm(input, *statistics, self.weight, self.bias, by_batch, 0.0, self.eps)
        channels = input.transpose(0, 1).flatten(1).to(torch.promote_types(input.dtype, torch.float32))
        normalised, mean, variance, count = cast(
            "tuple[Tensor, Tensor, Tensor, Tensor]", _Normalise.apply(channels, self.eps, self._group)
        )
        self._remember(mean, variance, count.detach())
        shape = (input.shape[1], input.shape[0], *input.shape[2:])
        output = normalised.view(shape).transpose(0, 1)
        if self.weight is not None:
            per_channel = (1, -1) + (1,) * (input.dim() - 2)
            output = output * self.weight.view(per_channel) + self.bias.view(per_channel)
        return output.to(input.dtype).contiguous()

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Running statistics as torch's: the variance without bias, the momentum of None a plain average."""
        if self.running_mean is None or self.running_var is None:
            return
        factor = self.momentum
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            factor = 1.0 / float(self.num_batches_tracked) if factor is None else factor
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor or 0.0)
        unbiased = variance * (count / (count - 1.0).clamp(min=1.0)).to(variance.dtype)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor or 0.0)


class _Normalise(torch.autograd.Function):
    """(channels, values of this rank) to zero mean and unit variance over the values of all ranks."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, eps: float, group: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = values.double()
        count = values.new_full((1,), values.shape[1], dtype=torch.float64)
        sums = _sum_over_ranks(torch.cat([wide.sum(1), wide.square().sum(1), count]), group)
        total, squares = sums[:-1].chunk(2)
        mean = total / sums[-1]
        variance = (squares / sums[-1] - mean.square()).clamp_(min=0.0)
        scale = (variance + eps).rsqrt()
        normalised = ((wide - mean[:, None]) * scale[:, None]).to(values.dtype)
        ctx.save_for_backward(normalised, scale, sums[-1:])
        ctx.group = group
        mean, variance, everyones = mean.to(values.dtype), variance.to(values.dtype), sums[-1].clone()
        ctx.mark_non_differentiable(mean, variance, everyones)
        ctx.set_materialize_grads(False)
        return normalised, mean, variance, everyones

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None, None]:
        """d = scale * (g - mean(g) - normalised * mean(g * normalised)), means over all ranks' values."""
        normalised, scale, count = ctx.saved_tensors
        gradient = gradients[0]
        wide = torch.zeros_like(normalised).double() if gradient is None else gradient.double()
        sums = _sum_over_ranks(torch.cat([wide.sum(1), (wide * normalised).sum(1)]), ctx.group) / count
        offset, slope = sums.chunk(2)
        result = (wide - offset[:, None] - normalised * slope[:, None]) * scale[:, None]
        return result.to(normalised.dtype), None, None


def _sum_over_ranks(vector: Tensor, group: Any) -> Tensor:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(vector, group=group)
    return vector
