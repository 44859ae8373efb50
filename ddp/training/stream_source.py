"""The examples of a streaming data set, pass after pass, with a place that a checkpoint can keep and come back to.

A place is a number of examples into a pass. Examples may be looked at before they are taken, which moves no place. Coming
back starts at the newest state of the data set's own that lies before (`state_dict` and `load_state_dict` where it has
both), at the pass's beginning otherwise, and reads over what lies between.

A shuffle buffer of k takes k examples after each other, puts them in an order drawn from the seed, the pass and the
buffer's number, hands them all out and begins anew. It is always known how it came about, so that it need not be saved.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from ddp.errors import CheckpointError
from ddp.training.random_state import preserved_random_state

logger = logging.getLogger("ddp.training")


@dataclass(frozen=True, slots=True)
class Anchor:
    """A place from which a pass can be read on: after so many examples and buffers, with the data set in this state."""

    place: int = 0
    buffers: int = 0
    state: Any = None


class Source:
    """Reads `dataset` from the beginning, again and again.

    Args:
        seed: of what the shuffle buffer draws.
    """

    def __init__(self, dataset: Any, *, shuffle_buffer: int, seed: tuple[int, ...]) -> None:
        self._dataset, self._buffer, self._seed = dataset, shuffle_buffer, seed
        self._is_stateful = all(callable(getattr(dataset, name, None)) for name in ("state_dict", "load_state_dict"))
        self._initial = deepcopy(dataset.state_dict()) if self._is_stateful else None
        self._pass, self._place = 0, 0
        self._anchors = deque([Anchor()])  # the first is the one to come back to
        self._ahead: deque[Any] = deque()  # read and not taken
        self._iterator: Iterator[Any] | None = None
        self._buffers = 0  # of this pass that were read
        self._has_ended = False

    @property
    def passes(self) -> int:
        """That are finished."""
        return self._pass

    @property
    def place(self) -> int:
        """Examples of this pass that were taken."""
        return self._place

    def look(self, count: int) -> list[Any]:
        """The next examples of this pass, without taking them; fewer where it has no more."""
        while len(self._ahead) < count and self._read():
            pass
        return list(islice(self._ahead, count))

    def take(self) -> Any:
        """The next example, which `look` has shown to be there."""
        self._place += 1
        return self._ahead.popleft()

    def mark(self) -> None:
        """Where nothing is read ahead, this is the place to come back to."""
        if self._is_stateful and not self._buffer and not self._ahead and self._iterator is not None:
            self._anchors = deque([self._anchor(self._place)])

    def next_pass(self) -> None:
        """Begin at the beginning again, whatever is left of this pass."""
        self._go_to(self._pass + 1, Anchor())

    def state_dict(self) -> dict[str, Any]:
        self._drop_anchors()
        anchor = self._anchors[0]
        return {
            "pass": self._pass,
            "place": self._place,
            "buffer": self._buffer,
            "anchor": {"place": anchor.place, "buffers": anchor.buffers, "state": deepcopy(anchor.state)},
        }

    def check_state(self, state: Mapping[str, Any]) -> None:
        anchor = state["anchor"]
        numbers = (state["pass"], state["place"], state["buffer"], anchor["place"], anchor["buffers"])
        if any(type(number) is not int or number < 0 for number in numbers) or anchor["place"] > state["place"]:
            raise CheckpointError(f"its place in the stream is none: {numbers}")
        if state["place"] and state["buffer"] != self._buffer:
            raise CheckpointError(
                f"read with sampling.shuffle_buffer = {state['buffer']}, here {self._buffer}, in the middle of a pass"
            )
        if anchor["place"] and not self._is_stateful:
            raise CheckpointError("its data set had a state of its own; here it has no state_dict and load_state_dict")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What lies between is read over when the next example is wanted."""
        self.check_state(state)
        self._go_to(state["pass"], Anchor(**state["anchor"]))
        self._place = state["place"]

    def _go_to(self, number: int, anchor: Anchor) -> None:
        self._pass, self._place, self._anchors = number, 0, deque([anchor])
        self._ahead.clear()
        self._iterator, self._has_ended = None, False

    def _read(self) -> bool:
        """Read one more example, or a buffer of them; whether there was any."""
        if self._iterator is None:
            self._iterator = self._opened()
            self._pass_over()
        if self._has_ended:
            return False
        wanted = self._buffer or 1
        if self._buffer:
            self._add_anchor()
        examples = list(islice(self._iterator, wanted))
        self._has_ended = len(examples) < wanted
        if self._buffer:
            generator = np.random.default_rng((*self._seed, self._pass, self._buffers))
            examples = [examples[index] for index in generator.permutation(len(examples))]
            self._buffers += 1
        self._ahead.extend(examples)
        return bool(examples)

    def _opened(self) -> Iterator[Any]:
        """The pass from the anchor on; how far beyond it the run is, is left to `_pass_over`.

        A data set with a state begins a pass in the one that it was given in, whatever was read of it since.
        """
        anchor = self._anchors[0]
        if self._is_stateful and not anchor.place:
            self._dataset.load_state_dict(deepcopy(self._initial))
        if callable(set_epoch := getattr(self._dataset, "set_epoch", None)):
            set_epoch(self._pass)
        if anchor.place:
            self._dataset.load_state_dict(deepcopy(anchor.state))
        self._buffers = anchor.buffers
        return iter(self._dataset)

    def _pass_over(self) -> None:
        """From the anchor to where the run is. Whatever reading draws, training goes on with the generators it has."""
        wanted, self._place = self._place, self._anchors[0].place
        if self._place < wanted and not self._is_stateful:
            logger.info(
                "the training stream has no state of its own (state_dict and load_state_dict): %d examples are read over to "
                "come back to where the run was",
                wanted - self._place,
            )
        with preserved_random_state():
            while self._place < wanted:
                if not self.look(1):
                    raise CheckpointError(
                        f"the training stream ends after {self._place} examples of pass {self._pass}; it had more than "
                        f"{wanted} when the checkpoint was written: bring its data back, or start a new run"
                    )
                self.take()

    def _add_anchor(self) -> None:
        place = self._place + len(self._ahead)
        if self._is_stateful and place > self._anchors[-1].place:
            self._drop_anchors()
            self._anchors.append(self._anchor(place))

    def _drop_anchors(self) -> None:
        """All before the last one that is not ahead of the run; a rank that saves no state has no other use for them."""
        while len(self._anchors) > 1 and self._anchors[1].place <= self._place:
            self._anchors.popleft()

    def _anchor(self, place: int) -> Anchor:
        return Anchor(place, self._buffers, deepcopy(self._dataset.state_dict()))
