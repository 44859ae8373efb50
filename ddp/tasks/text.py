"""Byte-level language model on the source text of the running Python's standard library.

Some 15 to 30 MB of real text that every machine already has, and a problem that is far from solved when a
demonstration ends: the noise scale stays finite and grows.
"""

from __future__ import annotations

import math
import os
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddp.errors import UsageError
from ddp.job import Activation, TextSection
from ddp.tasks.base import Goal, TensorExamples
from ddp.tasks.networks import ACTIVATIONS

VOCABULARY = 256
VALIDATION_EVERY = 20  # one file in so many is kept for validation, whole: no text is in both sets


class TextTask:
    """Predict each next byte. Batches are ((n, context_length + 1) uint8,); losses are in nats per byte."""

    goals: Mapping[str, Goal] = {"bits_per_byte": "min", "accuracy": "max"}
    class_dimension = -1

    def __init__(self, section: TextSection) -> None:
        self.section = section

    def model(self) -> nn.Module:
        section = self.section
        return LanguageModel(
            *(section.context_length, section.layers, section.heads, section.width),
            dropout=section.dropout,
            activation=section.activation,
        )

    def datasets(self) -> tuple[TensorExamples, TensorExamples]:
        root = Path(sysconfig.get_path("stdlib"))
        training_files, validation_files = split_files(source_files(root))
        length = self.section.context_length + 1
        training = windows(training_files, length)
        validation = windows(validation_files, length)
        if not len(training) or len(validation) < self.section.validation_examples:
            raise UsageError(
                f"task.validation_examples: the Python sources under {root} hold {len(training)} training and "
                f"{len(validation)} validation examples of {length} bytes, {self.section.validation_examples} asked"
            )
        # Spread evenly over the files: neighbouring windows come from one module and are much alike.
        wanted = self.section.validation_examples
        chosen = torch.arange(wanted) * len(validation) // wanted
        return TensorExamples(training), TensorExamples(validation[chosen])

    def loss(self, model: nn.Module, batch: tuple[Tensor]) -> Tensor:
        inputs, targets = _shift(batch)
        return self._losses(model, model(inputs), targets)

    def metrics(self, model: nn.Module, batch: tuple[Tensor]) -> Mapping[str, Tensor]:
        inputs, targets = _shift(batch)
        return _metrics(model(inputs), targets)

    def loss_and_metrics(self, model: nn.Module, batch: tuple[Tensor]) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Both from one forward; the loss is smoothed while the model is in training mode, the metrics never are."""
        inputs, targets = _shift(batch)
        logits = model(inputs)
        return self._losses(model, logits, targets), _metrics(logits.detach(), targets)

    def _losses(self, model: nn.Module, logits: Tensor, targets: Tensor) -> Tensor:
        return _cross_entropy(logits, targets, self.section.label_smoothing if model.training else 0.0)


def _metrics(logits: Tensor, targets: Tensor) -> Mapping[str, Tensor]:
    return {
        "bits_per_byte": _cross_entropy(logits, targets) / math.log(2),
        "accuracy": (logits.argmax(dim=-1) == targets).float().mean(dim=1),
    }


def source_files(root: Path) -> list[Path]:
    """The *.py files below `root` without installed packages, in an order that no file system decides."""
    names: list[tuple[str, Path]] = []
    for directory, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in {"site-packages", "dist-packages", "__pycache__"}]
        paths = [Path(directory, name) for name in files if name.endswith(".py")]
        names += [(path.relative_to(root).as_posix(), path) for path in paths]
    return [path for _, path in sorted(names)]


def split_files(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Training and validation files, the latter every 20th."""
    training = [path for index, path in enumerate(files) if index % VALIDATION_EVERY]
    return training, list(files[::VALIDATION_EVERY])


def windows(files: Sequence[Path], length: int) -> Tensor:
    """The files' bytes end to end, cut without overlap: (examples, length) uint8; the rest is left out."""
    text = bytearray().join(path.read_bytes() for path in files)
    examples = len(text) // length
    if not examples:
        return torch.empty(0, length, dtype=torch.uint8)
    return torch.frombuffer(text, dtype=torch.uint8, count=examples * length).view(examples, length)


def _shift(batch: tuple[Tensor]) -> tuple[Tensor, Tensor]:
    """Inputs and what follows each of them, both (n, context_length) int64."""
    text = batch[0].long()
    return text[:, :-1], text[:, 1:]


def _cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean over positions, in nats: (n, length, 256), (n, length) -> (n,)."""
    losses = functional.cross_entropy(
        logits.transpose(1, 2), targets, reduction="none", label_smoothing=label_smoothing
    )
    return losses.mean(dim=1)


class LanguageModel(nn.Module):
    """Decoder-only transformer with pre-normalisation and one matrix for embedding and output.

    Takes (n, length) int64 with length <= context_length, returns logits (n, length, 256).
    """

    def __init__(
        self,
        context_length: int,
        layers: int,
        heads: int,
        width: int,
        *,
        dropout: float = 0.0,
        activation: Activation = "gelu",
    ) -> None:
        super().__init__()
        self.bytes = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context_length, width)
        blocks = [Block(heads, width, dropout, activation) for _ in range(layers)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.apply(_initialise_)
        for block in blocks:  # keep the residual stream's variance independent of depth (GPT-2)
            for projection in (block.attention.output, block.contract):
                nn.init.normal_(projection.weight, std=0.02 / math.sqrt(2 * layers))

    def forward(self, text: Tensor) -> Tensor:
        hidden = self.bytes(text) + self.positions.weight[: text.shape[1]]
        return functional.linear(self.norm(self.blocks(hidden)), self.bytes.weight)


class Block(nn.Module):
    """Attention, then a two-layer perceptron of four times the width, each added to its input."""

    def __init__(self, heads: int, width: int, dropout: float, activation: Activation) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CausalAttention(heads, width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.activation = ACTIVATIONS[activation]()
        self.contract = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden)))
        return hidden + self.dropout(self.contract(self.activation(self.expand(self.norm(hidden)))))


class CausalAttention(nn.Module):
    """Multi-head attention of each position to itself and those before it."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.heads = heads
        self.input = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        n, length, width = hidden.shape
        # (n, length, 3 width) -> three of (n, heads, length, width / heads)
        query, key, value = self.input(hidden).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(attended.transpose(1, 2).reshape(n, length, width))


def _initialise_(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
