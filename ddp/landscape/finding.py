"""The landscape of one network as values, and how it is taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddp.landscape.curvature import largest_eigenvalue
from ddp.landscape.directions import filter_normalised, norm_of
from ddp.landscape.surface import fixed_examples, losses_at
from ddp.trained import Trained
from ddp.training.place import Place

if TYPE_CHECKING:
    from torch import Tensor

SLICE = (0, 1)  # numbers of the directions that span it
SHARES = (0.25, 0.5, 1.0)  # of the radius, at which the mean rise is taken
DIRECTIONS = 8  # that it is a mean over, both ways


@dataclass(frozen=True, slots=True)
class Asked:
    """Attributes:
    radius: of the slice, in lengths of the filter-normalised directions.
    points: along each side.
    examples: at most, of the training set's sample or of the validation set.
    """

    radius: float = 1.0
    points: int = 25
    examples: int = 512
    split: str = "training"
    seed: int = 0

    @property
    def axis(self) -> NDArray[np.float64]:
        """From -radius to radius, exactly symmetric about 0."""
        half = np.linspace(0.0, self.radius, self.points // 2 + 1)[1:]
        return np.concatenate([-half[::-1], [0.0], half])


@dataclass(frozen=True, slots=True)
class Rise:
    """How much higher the loss is at a distance, as a mean over random directions; `deviation` among them."""

    radius: float
    mean: float
    deviation: float


@dataclass(frozen=True, slots=True)
class Landscape:
    """Attributes:
    losses: (points, points): along the second direction, then along the first.
    norms: of the two directions.
    sharpness: mean rises, the farthest last.
    largest_eigenvalue: of the Hessian; NaN where it is not known.
    parameters: how many the network has.
    architecture: names and shapes of all parameters.
    """

    name: str
    path: str
    optimizer: str
    split: str
    examples: int
    loss: float
    losses: NDArray[np.float64]
    norms: tuple[float, float]
    sharpness: tuple[Rise, ...]
    largest_eigenvalue: float
    parameters: int
    architecture: tuple[tuple[str, tuple[int, ...]], ...]


def survey(place: Place, trained: Trained, asked: Asked) -> Landscape:
    """Take it. Collective."""
    splits = trained.plan.splits
    dataset = splits.training_sample if asked.split == "training" else splits.validation
    examples = fixed_examples(trained, dataset, asked.examples, place.device)
    module = trained.module
    slice_ = [filter_normalised(module, asked.seed, number) for number in SLICE]
    others = [filter_normalised(module, asked.seed, number) for number in range(len(SLICE), len(SLICE) + DIRECTIONS)]
    axis = asked.axis
    grid = [_offset(slice_, (x, y)) for y in axis for x in axis]
    radii = [share * asked.radius for share in SHARES]
    around = [_offset([each], (sign * radius,)) for radius in radii for each in others for sign in (1.0, -1.0)]
    values = losses_at(place, trained, examples, [*grid, *around])
    losses = values[: len(grid)].reshape(len(axis), len(axis))
    centre = float(losses[len(axis) // 2, len(axis) // 2])
    rises = values[len(grid) :].reshape(len(radii), DIRECTIONS, 2).mean(axis=2) - centre
    return Landscape(
        name=trained.name,
        path=str(trained.saved.path),
        optimizer=optimizer_of(trained),
        split=asked.split,
        examples=examples.count,
        loss=centre,
        losses=losses,
        norms=(norm_of(slice_[0]), norm_of(slice_[1])),
        sharpness=tuple(
            Rise(radius, float(each.mean()), float(each.std(ddof=1))) for radius, each in zip(radii, rises, strict=True)
        ),
        largest_eigenvalue=largest_eigenvalue(place, trained, examples, asked.seed),
        parameters=sum(each.numel() for each in module.parameters()),
        architecture=tuple((name, tuple(each.shape)) for name, each in module.named_parameters()),
    )


def optimizer_of(trained: Trained) -> str:
    """In words, such as "sgd with SAM, rho 0.05"."""
    section = trained.job.optimizer
    return section.name + (f" with SAM, rho {section.sam_rho:g}" if section.sam_rho else "")


def to_json(found: Sequence[Landscape], asked: Asked) -> dict[str, Any]:
    """Plain values; a number that is not finite is null."""
    networks: list[dict[str, Any]] = []
    for each in found:
        table = {**asdict(each), "losses": each.losses.tolist()}
        del table["architecture"]
        networks.append(_known(table))
    return {**asdict(asked), "axis": asked.axis.tolist(), "networks": networks}


def _known(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _known(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_known(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _offset(directions: Sequence[Sequence[Tensor]], lengths: Sequence[float]) -> Callable[[], Sequence[Tensor]]:
    """What is added to the weights, made when it is wanted."""

    def make() -> list[Tensor]:
        total = [lengths[0] * each for each in directions[0]]
        for direction, length in zip(directions[1:], lengths[1:], strict=True):
            total = [each + length * more for each, more in zip(total, direction, strict=True)]
        return total

    return make
