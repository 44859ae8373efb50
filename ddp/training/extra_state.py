"""What modules keep beside parameters and buffers, by torch's own `get_extra_state` and `set_extra_state`: each rank's own."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class ExtraState:
    """Of one model, by the names of its modules; empty for most."""

    module: nn.Module

    def state_dict(self) -> dict[str, Any]:
        return {name: deepcopy(each.get_extra_state()) for name, each in self._keepers().items()}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Only a module itself knows what it takes."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, each in self._keepers().items():
            if name in state:
                each.set_extra_state(deepcopy(state[name]))

    def _keepers(self) -> dict[str, nn.Module]:
        modules = self.module.named_modules()
        return {name: each for name, each in modules if type(each).get_extra_state is not nn.Module.get_extra_state}
