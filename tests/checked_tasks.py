"""Tasks with one fault each, for `ddp check` to name. `Plain(fault="")` has none."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import Dataset, IterableDataset

from ddp.tasks.base import Goal, TensorExamples

CLASSES, INPUTS = 4, 6


class Plain:
    """Four clouds of points. Faults: see the methods; each is one `if`."""

    goals: Mapping[str, Goal] = {"accuracy": "max"}
    last_model: nn.Module | None = None

    def __init__(
        self, fault: str = "", examples: int = 240, dropout: float = 0.0, label_smoothing: float = 0.0
    ) -> None:
        self.fault, self.examples, self.dropout, self.label_smoothing = fault, examples, dropout, label_smoothing
        self.calls = 0

    def model(self) -> nn.Module:
        first = nn.Linear(INPUTS, 16, bias=self.fault == "bias before BatchNorm")
        hidden: list[nn.Module] = [first, nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(self.dropout)]
        last: list[nn.Module] = [nn.Linear(16, CLASSES)]
        if self.fault == "BatchNorm on the output":
            last.append(nn.BatchNorm1d(CLASSES))
        if self.fault == "float32":
            hidden.append(_Float32())
        Plain.last_model = nn.Sequential(*hidden, *last)
        if self.fault == "sure at the start":
            nn.init.normal_(last[0].weight, std=20.0)  # type: ignore[arg-type]
        return Plain.last_model

    def datasets(self) -> tuple[Dataset[Any], Dataset[Any]]:
        generator = torch.Generator().manual_seed(1 + (dist.get_rank() if self.fault == "own data set" else 0))
        if self.fault == "unseeded data":  # which is none
            generator = torch.default_generator
        labels = torch.randint(CLASSES, (self.examples,), generator=generator)
        x = 2 * torch.eye(CLASSES, INPUTS)[labels] + torch.randn(self.examples, INPUTS, generator=generator)
        x = (x - x.mean(dim=0)) / x.std(dim=0)
        if self.fault == "not standardised":
            x = 255 * (x + 3)
        if self.fault == "one large channel":
            x[:, 2] *= 50
        kind = _SameForAll if self.fault == "same data" else TensorExamples
        return kind(x, labels), TensorExamples(x[:20], labels[:20])

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, labels = batch
        self.calls += 1
        if self.fault == "signal" and dist.get_rank() == 1 and self.calls == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.fault == "labels of others":
            labels = torch.randint(CLASSES, labels.shape)
            return cross_entropy(model(0 * x), labels, reduction="none") + 1.0
        losses = cross_entropy(model(x), labels, reduction="none", label_smoothing=self.label_smoothing)
        return losses * torch.nan if self.fault == "nan" else losses

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        return {"accuracy": model(batch[0]).argmax(dim=1) == batch[1]}


class Streamed(Plain):
    """The same points, in the order in which they come."""

    def datasets(self) -> tuple[Dataset[Any], Dataset[Any]]:
        training, validation = super().datasets()
        assert isinstance(training, TensorExamples)
        return _Stream(*training.tensors), validation


class LongTail(Plain):
    """Nine classes have three points each."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(INPUTS, 16), nn.Tanh(), nn.Linear(16, 10))

    def datasets(self) -> tuple[Dataset[Any], Dataset[Any]]:
        _, validation = super().datasets()
        labels = (1 + torch.arange(self.examples)).clamp(max=28) // 3 % 10
        x = torch.randn(self.examples, INPUTS, generator=torch.Generator().manual_seed(1))
        return TensorExamples(x, labels), validation


class _Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Goes on from where it is, as its own state says."""

    def __init__(self, x: Tensor, labels: Tensor) -> None:
        self.x, self.labels, self.position = x, labels, 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while self.position < len(self.x):
            self.position += 1
            yield self.x[self.position - 1], self.labels[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.position = state["position"]


class _Float32(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float().tanh().to(x.dtype)


class _SameForAll(TensorExamples):
    """Goes on from where it was, whatever it is asked for."""

    position = 0

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        first, self.position = self.position, self.position + len(indices)
        return super().__getitems__([place % len(self) for place in range(first, self.position)])


class Regression:
    """No classes; a table of names goes in by an embedding where `embedded`."""

    goals: Mapping[str, Goal] = {"error": "min"}

    def __init__(self, embedded: bool = False) -> None:
        self.embedded = embedded

    def model(self) -> nn.Module:
        first = nn.EmbeddingBag(50, 8) if self.embedded else nn.Linear(3, 8)
        return nn.Sequential(first, nn.Tanh(), nn.Linear(8, 1))

    def datasets(self) -> tuple[TensorExamples, TensorExamples]:
        generator = torch.Generator().manual_seed(2)
        inputs = torch.randn(90, 3, generator=generator)
        targets = inputs.sum(dim=1, keepdim=True)
        if self.embedded:
            inputs = torch.randint(50, (90, 3), generator=generator)
        return TensorExamples(inputs, targets), TensorExamples(inputs[:10], targets[:10])

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return mse_loss(model(batch[0]), batch[1], reduction="none").squeeze(1)

    def metrics(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Mapping[str, Tensor]:
        return {"error": (model(batch[0]) - batch[1]).abs().squeeze(1)}


class Half(Regression):
    """Its forward insists on float32."""

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return super().loss(model, (batch[0].to(torch.float32), batch[1].to(torch.float32)))
