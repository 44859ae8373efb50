"""What `ddp sweep --dry-run` prints: the stages with their ranges, as far as they are known before anything has run."""

from __future__ import annotations

from ddp.sweep.stages import expand, plan_stage
from ddp.sweep.sweep_file import Sweep


def plan_text(sweep: Sweep) -> str:
    """A line a stage, and one for each of its dimensions."""
    lines: list[str] = []
    ranks = sweep.section.ranks
    for stage in expand(sweep):
        plan = plan_stage(sweep, stage, ())
        epochs, steps = stage.length
        length = (
            f"{epochs:g} epochs"
            if epochs is not None
            else f"{steps} steps"
            if steps is not None
            else "the job's length"
        )
        lines.append(
            f"{stage.name}: {plan.trials} trials, {stage.sampler}, {length}, {ranks} rank{'s' * (ranks > 1)} each"
        )
        for each in plan.space.dimensions:
            if each.key in stage.varied:
                when = " and ".join(f"{key} is {' or '.join(values)}" for key, values in each.when.items())
                before = any(each.key in earlier.varied for earlier in expand(sweep)[: stage.index])
                narrowed = (
                    f", {stage.narrow:g} times as wide around the best" if before and each.kind != "choice" else ""
                )
                lines.append(f"  {each.key}: {each.text()}{narrowed}{f' where {when}' if when else ''}")
    return "\n".join(lines)
