"""The [batch] table, and how a step's examples are laid out over ranks."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from ddp.errors import JobFileError
from ddp.job.fields import Positive, Section

UNITS = 4  # gradients of separate examples that a step should have for its noise scale, where that is left open
RUN_AWAY = 1 << 62


class BatchSection(Section):
    """Examples a step over all ranks, and examples a rank holds in memory at once."""

    global_batch_size: Positive | Literal["auto"] | None = Field(
        default=None, description='examples a step over all ranks; "auto" follows the noise scale and the step time'
    )
    examples_per_rank: Positive | None = Field(default=None, description="a step, instead of global_batch_size")
    micro_batch_size: Positive | None = Field(
        default=None, description="examples a rank holds at once; ceil(4 / ranks) micro-batches a rank where left out"
    )
    initial: Positive | None = Field(default=None, description="auto: where it starts, 64 where left out")
    smallest: Positive | None = Field(default=None, description="auto: lower limit, the ranks where left out")
    largest: Positive | None = Field(default=None, description="auto: upper limit, 1/8 of the data where left out")

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.global_batch_size is None) == (self.examples_per_rank is None):
            raise ValueError("give either global_batch_size or examples_per_rank")
        limits = {"initial": self.initial, "smallest": self.smallest, "largest": self.largest}
        given = [name for name, value in limits.items() if value is not None]
        if given and not self.adapts:
            raise ValueError(f'{", ".join(given)} needs global_batch_size = "auto"')
        low, start, high = self.smallest or 1, self.initial or self.smallest or 1, self.largest or RUN_AWAY
        if not low <= start <= high:
            raise ValueError(f"smallest <= initial <= largest does not hold: {low}, {start}, {high}")
        return self

    @property
    def adapts(self) -> bool:
        """Whether the global batch size is chosen while training."""
        return self.global_batch_size == "auto"

    def examples_per_step(self, world_size: int) -> int:
        """The global batch size over so many ranks; where it adapts itself, the one it starts from.

        Raises:
            JobFileError: a step has fewer examples than there are ranks.
        """
        if self.examples_per_rank is not None:
            return self.examples_per_rank * world_size
        if isinstance(self.global_batch_size, int):
            if world_size > self.global_batch_size:
                raise JobFileError(
                    f"batch.global_batch_size: {self.global_batch_size} examples a step are fewer than the "
                    f"{world_size} ranks; raise it or start fewer ranks"
                )
            return self.global_batch_size
        return max(self.initial or min(max(64, self.smallest or 1), self.largest or RUN_AWAY), world_size)

    def examples_at_once(self, world_size: int, examples_per_step: int | None = None) -> int:
        """The micro-batch size: as given, else so that a step has at least four gradients to compare.

        `examples_per_step`: over all ranks, where that is not what the run starts with.
        """
        if self.micro_batch_size is not None:
            return self.micro_batch_size
        whole = self.examples_per_step(world_size) if examples_per_step is None else examples_per_step
        return -(-whole // (world_size * -(-UNITS // world_size)))

    def gradient_accumulation_steps(self, world_size: int) -> int:
        """Micro-batches of a rank in a step: ceil(examples_per_step / (world_size * examples_at_once))."""
        return -(-self.examples_per_step(world_size) // (world_size * self.examples_at_once(world_size)))

    def limits(self, world_size: int, training_examples: int) -> tuple[int, int]:
        """The smallest and the largest global batch size where it adapts itself."""
        smallest = max(self.smallest or 1, world_size)
        largest = self.largest or max(training_examples // 8, self.examples_per_step(world_size))
        return smallest, max(min(largest, training_examples), smallest)
