"""Data-parallel training that measures, while it trains, when more ranks stop paying.

`import ddp` loads no torch; the names below are imported when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddp.metering.attach import GradientMeter, attach
    from ddp.noise.noise_scale import Reading

__version__ = "0.1.0"
__all__ = ["GradientMeter", "Reading", "__version__", "attach"]

_HOME = {"attach": "ddp.metering.attach", "GradientMeter": "ddp.metering.attach", "Reading": "ddp.noise.noise_scale"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'ddp' has no attribute {name!r}")
