"""All that a run goes on from, by name: whatever has a state registers here and is in every checkpoint from then on.

A part that all ranks hold alike is written once, by rank 0; one that each rank has of its own (running statistics,
generators) is written by each. A checkpoint is taken in whole or not at all: every part looks at its state before
any part takes it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from ddp.errors import CheckpointError

# Whose state it is: all ranks' alike; each rank's own, of which a rank that is new gets a copy of another's; each
# rank's own, without which a rank that is new begins afresh.
Owner = Literal["all", "rank", "rank alone"]

logger = logging.getLogger("ddp.training")
_UNREADABLE = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


class Stateful(Protocol):
    """What can be registered. A state holds plain values and tensors, nested."""

    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any], /) -> object: ...


@runtime_checkable
class Checking(Protocol):
    """A part that can tell by a look at a state whether it would take it; others try with a copy of themselves."""

    def check_state(self, state: Mapping[str, Any], /) -> None:
        """
        Raises:
            CheckpointError: it would not, and why.
        """


@runtime_checkable
class Gathering(Protocol):
    """A part that all ranks hold alike only after they have told each other what each has seen."""

    def gather(self) -> None:
        """Collective."""


@dataclass(frozen=True, slots=True)
class _Entry:
    part: Stateful
    owner: Owner
    remedy: str  # where its state cannot be taken
    required: bool


class Registry:
    """The parts of one rank, in the order in which they take their states."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}

    def add(
        self,
        name: str,
        part: Stateful,
        *,
        owner: Owner = "all",
        remedy: str = "start a new run, or resume an earlier checkpoint",
        required: bool = False,
    ) -> None:
        """Register `part`.

        Args:
            remedy: what to do where its state cannot be taken, for the error's message.
            required: a checkpoint without it is refused; any other part then begins afresh, and rank 0 says so.
        """
        if name in self._entries:
            raise ValueError(f"{name} is registered already")
        self._entries[name] = _Entry(part, owner, remedy, required)

    def gather(self) -> None:
        """Before the states are saved. Collective where a part is `Gathering`."""
        for entry in self._entries.values():
            if isinstance(entry.part, Gathering):
                entry.part.gather()

    def shared(self) -> dict[str, Any]:
        """The states of what all ranks hold alike, by name."""
        return {name: each.part.state_dict() for name, each in self._entries.items() if each.owner == "all"}

    def own(self) -> dict[str, Any]:
        """Those of what this rank has of its own."""
        return {name: each.part.state_dict() for name, each in self._entries.items() if each.owner != "all"}

    def check(self, path: Path, shared: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Look at all states without taking any.

        Raises:
            CheckpointError: one that is needed is missing, or a part would not take its own.
        """
        for name, entry in self._entries.items():
            states = shared if entry.owner == "all" else own
            if name in states:
                self._attempt(path, name, states[name], trial=True)
            elif entry.required:
                raise CheckpointError(f"{path}: has no state of {name}; {entry.remedy}")

    def restore(self, path: Path, shared: Mapping[str, Any], own: Mapping[str, Any], *, newcomer: bool) -> list[str]:
        """Every part takes its state; the names of those that found none.

        Args:
            newcomer: this rank was none of those that wrote the checkpoint; `own` is a copy of another's.
        """
        missing: list[str] = []
        for name, entry in self._entries.items():
            states = shared if entry.owner == "all" else own
            if name not in states:
                missing.append(name)
            elif not (newcomer and entry.owner == "rank alone"):
                self._attempt(path, name, states[name], trial=False)
        return missing

    def _attempt(self, path: Path, name: str, state: Mapping[str, Any], *, trial: bool) -> None:
        entry = self._entries[name]
        try:
            if not trial:
                entry.part.load_state_dict(state)
            elif isinstance(entry.part, Checking):
                entry.part.check_state(state)
            else:
                deepcopy(entry.part).load_state_dict(state)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}; {entry.remedy}") from error
        except _UNREADABLE as error:
            raise CheckpointError(f"{path}: the state of {name} cannot be read: {error!r}; {entry.remedy}") from error
