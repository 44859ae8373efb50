"""What a line says as named numbers, under the same names in every tracker.

`training/loss` is a step's; the evaluated sample of the training set is `training_sample/loss`, the validation set
`validation/loss`. What was not measured is left out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

OF_STEPS = ("loss", "learning_rate", "momentum", "gradient_norm", "global_batch_size", "noise_scale")
OF_STEPS_TOO = ("duration_seconds", "cpu_seconds")


def scalars(line: Mapping[str, Any], metric: str) -> dict[str, float]:
    """Of a step or an evaluation; of anything else nothing.

    Args:
        metric: the name of the evaluation metric.
    """
    if line["kind"] == "step":
        named = {f"training/{name}": line.get(name) for name in (*OF_STEPS, *OF_STEPS_TOO)}
        named[f"training/{metric}"] = line.get("metric") if metric != "loss" else line["loss"]
    elif line["kind"] == "evaluation":
        split = "training_sample" if line["split"] == "training" else line["split"]
        values = {"loss": line["loss"], "penalty": line["penalty"], **line["metrics"]}
        named = {f"{split}/{name}": value for name, value in values.items()}
    else:
        return {}
    return {plain(name): float(value) for name, value in named.items() if value is not None}


def plain(name: str) -> str:
    """With letters that every tracker takes, and no longer than they do."""
    return re.sub(r"[^A-Za-z0-9_\-./ ]", "_", name)[:200]
