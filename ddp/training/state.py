"""What of a trainer goes into a checkpoint: one small part each, registered by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer, RMSprop

from ddp.errors import CheckpointError
from ddp.training.data import OPEN
from ddp.training.extra_state import ExtraState
from ddp.training.optimizers import moments
from ddp.training.random_state import random_state, restore_random_state
from ddp.training.registry import Registry
from ddp.training.sampling import LossWeighted
from ddp.training.trainer import Trainer

_BRING_BACK = "start a new run, or bring {} back"


def register_state(trainer: Trainer, registry: Registry) -> None:
    """Register all that `trainer` goes on from; parts that come later register themselves beside these."""
    model = trainer.model.module
    registry.add("parameters", Parameters(model), remedy=_BRING_BACK.format("the model"), required=True)
    registry.add("buffers", Buffers(model), owner="rank", remedy=_BRING_BACK.format("the model"), required=True)
    registry.add(
        "optimizer", OptimizerState(trainer.optimizer), remedy=_BRING_BACK.format("the optimizer"), required=True
    )
    registry.add("counters", Counters(trainer), remedy=_BRING_BACK.format("the data"), required=True)
    registry.add("course", trainer.course, required=True)
    if isinstance(sampler := trainer.course.sampler, LossWeighted):
        registry.add("sampling", sampler, remedy="start a new run, or bring the sampling back")
    if (stream := trainer.course.stream) is not None:
        registry.add(
            "stream", stream, owner="rank" if stream.is_sharded else "all", remedy=_BRING_BACK.format("the data")
        )
    if (tracker := trainer.watch.tracker) is not None:
        off = "start a new run, or resume without it, --set noise_scale.enabled=false"
        registry.add("noise_scale", tracker, remedy=off)
    if trainer.averaged is not None:
        average = trainer.averaged.module
        registry.add("averaged_weights", trainer.averaged)
        registry.add("averaged_parameters", Parameters(average))
        registry.add("averaged_buffers", Buffers(average), owner="rank")
    if trainer.passes.scale.enabled:
        registry.add("loss_scale", trainer.passes.scale)
    if (ending := trainer.early_stopping) is not None:
        registry.add("early_stopping", ending)
        if ending.parameters is not None and ending.buffers is not None:
            registry.add("best_parameters", ending.parameters)
            registry.add("best_buffers", ending.buffers, owner="rank")
    registry.add("extra_state", ExtraState(model), owner="rank")
    registry.add("state_dict", Names(model))
    registry.add("judge", trainer.judge)
    registry.add("shards", trainer.watch.shards)
    registry.add("exchange", trainer.exchange, owner="rank alone")
    registry.add("random", Generators(), owner="rank alone", required=True)


READINGS_BYTES = 1 << 20  # that the windows of the noise scale grow to, where layers are few


def expected_bytes(trainer: Trainer) -> int:
    """What a checkpoint will take, over all ranks, without the small parts: before a first step has made the moments."""
    module = trainer.model.module
    trained = sum(_bytes(each) for each in module.parameters() if each.requires_grad)
    kept = sum(map(_bytes, module.parameters())) + trainer.world_size * sum(map(_bytes, module.buffers()))
    ending = trainer.early_stopping
    copies = 1 + (trainer.averaged is not None) + (ending is not None and ending.parameters is not None)
    return (
        copies * kept + moments(trainer.job.optimizer) * trained + READINGS_BYTES * (trainer.watch.tracker is not None)
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@dataclass(frozen=True, slots=True)
class Parameters:
    """A model's parameters, by name."""

    module: nn.Module

    def state_dict(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.module.named_parameters()}

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        check_same("parameter", state, self.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        _copy_into(self.state_dict(), state)


@dataclass(frozen=True, slots=True)
class Buffers:
    """A model's buffers, by name: running statistics, which each rank has of its own."""

    module: nn.Module

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.module.named_buffers())

    def check_state(self, state: Mapping[str, Tensor]) -> None:
        check_same("buffer", state, self.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        _copy_into(self.state_dict(), state)


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """An optimizer's moments and settings."""

    optimizer: Optimizer

    def state_dict(self) -> dict[str, Any]:
        return {**self.optimizer.state_dict(), "class": type(self.optimizer).__name__}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """As the optimizer itself does, which changes nothing before; and the shapes, beyond which a fused one would read."""
        if state["class"] != type(self.optimizer).__name__:
            raise CheckpointError(
                f"belongs to another optimizer: {state['class']}, not {type(self.optimizer).__name__}"
            )
        sizes, here = ([len(group["params"]) for group in groups] for groups in (state["param_groups"], self._groups))
        if sizes != here:
            raise CheckpointError(f"belongs to another optimizer: its groups have {sizes} parameters, here {here}")
        for saved, group in zip(state["param_groups"], self._groups, strict=True):
            if not all(type(saved.get(key, 1.0)) in (int, float) for key in ("lr", "learning_rate_factor")):
                raise CheckpointError("belongs to another optimizer: its learning rates are no numbers")
            if (names := saved.get("param_names")) != (here := group.get("param_names")) and names and here:
                raise CheckpointError(
                    f"belongs to another optimizer: a group of {', '.join(map(str, names[:3]))} there, of {', '.join(here[:3])} here"
                )
        self._check_moments(state)
        parameters = [parameter for group in self._groups for parameter in group["params"]]
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state["state"].get(number, {}).items():
                if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                    raise CheckpointError(
                        f"belongs to another optimizer: {name} of parameter {number} is {tuple(value.shape)}, the parameter "
                        f"{tuple(parameter.shape)}"
                    )

    def _check_moments(self, state: Mapping[str, Any]) -> None:
        """RMSprop alone has some that its settings ask for, and makes none on the way."""
        if not isinstance(self.optimizer, RMSprop):
            return
        for saved, here in zip(state["param_groups"], self._groups, strict=True):
            asked = {"grad_avg": here["centered"], "momentum_buffer": here["momentum"] > 0}
            kept = [state["state"][number] for number in saved["params"] if number in state["state"]]
            if missing := [name for name, on in asked.items() if on and any(name not in each for each in kept)]:
                raise CheckpointError(
                    f"belongs to another optimizer: RMSprop without {', '.join(missing)} there, with it here"
                )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The moments; settings are the job's, as those of the schedule and of clipping are."""
        groups = [
            {**here, "params": saved["params"]} for here, saved in zip(self._groups, state["param_groups"], strict=True)
        ]
        self.optimizer.load_state_dict({**state, "param_groups": groups})

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups


@dataclass(frozen=True, slots=True)
class Counters:
    """Steps and examples so far, and how many examples there were to train on."""

    trainer: Trainer

    def state_dict(self) -> dict[str, int]:
        trainer = self.trainer
        return {
            "step": trainer.step_count,
            "examples_total": trainer.examples_total,
            "training_examples": trainer.plan.examples,
        }

    def check_state(self, state: Mapping[str, int]) -> None:
        if any(type(state[name]) is not int or state[name] < 0 for name in self.state_dict()):
            raise CheckpointError(f"its counters are no numbers of steps and examples: {dict(state)}")
        if state["training_examples"] != self.trainer.plan.examples:
            raise CheckpointError(
                f"written while training on {_told(state['training_examples'])} examples, the training set now has "
                f"{_told(self.trainer.plan.examples)}"
            )

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.trainer.step_count, self.trainer.examples_total = state["step"], state["examples_total"]


def _told(examples: int) -> str:
    return "a stream's number of" if examples == OPEN else f"{examples:,}"


@dataclass(frozen=True, slots=True)
class Names:
    """For whoever exports the model: what its own state_dict has, tied weights twice, and what each is saved as."""

    module: nn.Module

    def state_dict(self) -> dict[str, str]:
        tensors = (*self.module.named_parameters(), *self.module.named_buffers())
        saved = {id(tensor): name for name, tensor in tensors}
        state = self.module.state_dict(keep_vars=True)
        return {name: saved[id(tensor)] for name, tensor in state.items() if id(tensor) in saved}

    def check_state(self, state: Mapping[str, str]) -> None:
        """The parameters and buffers tell whether it is the same model."""

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Nothing to take."""


class Generators:
    """The random generators of this process."""

    def state_dict(self) -> dict[str, Any]:
        return random_state()

    def check_state(self, state: Mapping[str, Any]) -> None:
        if missing := random_state().keys() - state.keys():
            raise CheckpointError(f"has no state of the generators {', '.join(sorted(missing))}")

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        restore_random_state(state)


def _copy_into(present: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in present.items():
            tensor.copy_(saved[name])


def check_same(kind: str, saved: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> None:
    for name in [*saved, *present]:
        old, new = saved.get(name), present.get(name)
        if old is None or new is None or (old.shape, old.dtype) != (new.shape, new.dtype):
            raise CheckpointError(
                f"belongs to another model: {kind} {name} is {_describe(old)} there and {_describe(new)} here"
            )


def _describe(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
