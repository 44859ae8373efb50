"""Many runs in one pandas table: the best of each, and their curves over steps and over processor time.

python examples/query.py runs/* --output curves.png
"""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

import matplotlib
import pandas

from ddp.telemetry.gather import gather

matplotlib.use("Agg")

BEST = """
SELECT run_id, optimizer, world_size, max(accuracy) AS best_accuracy, min(validation.loss) AS best_loss,
    max(validation.step) AS steps, max(cpu_seconds) AS cpu_seconds, max(elapsed_seconds) AS elapsed_seconds
FROM validation JOIN runs USING (run_id) GROUP BY run_id ORDER BY best_loss
"""
CURVES = "SELECT run_id, step, elapsed_seconds, cpu_seconds, loss, accuracy FROM {view} ORDER BY run_id, step"
PARAMETERS = """
SELECT run_id, name || '.' || subname AS parameter, step, avg(value * value) AS mean_square,
    avg(gradient * gradient) AS gradient_mean_square
FROM parameters GROUP BY run_id, parameter, step
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="directories of runs, or patterns")
    parser.add_argument("--output", type=Path, default=Path("curves.png"))
    arguments = parser.parse_args()
    with closing(gather(arguments.runs)) as database:
        print(pandas.read_sql_query(BEST, database).to_string(index=False))
        training = pandas.read_sql_query(CURVES.format(view="training"), database)
        validation = pandas.read_sql_query(CURVES.format(view="validation"), database)
        parameters = pandas.read_sql_query(PARAMETERS, database)
    draw(training, validation, parameters, arguments.output)
    print(arguments.output)


def draw(training: pandas.DataFrame, validation: pandas.DataFrame, parameters: pandas.DataFrame, output: Path) -> None:
    """Loss over steps, accuracy over processor time, and the size of recorded parameters; a colour a run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    losses, accuracies, sizes = figure.subplots(1, 3)
    for number, (run_id, steps) in enumerate(training.groupby("run_id")):
        colour, evaluated = f"C{number % 10}", validation[validation.run_id == run_id]
        smooth = steps.loss.rolling(max(1, len(steps) // 40), min_periods=1).mean()
        losses.plot(steps.step, smooth, color=colour, alpha=0.5)
        losses.plot(evaluated.step, evaluated.loss, color=colour, marker="o", markersize=3, label=run_id)
        accuracies.plot(evaluated.cpu_seconds, evaluated.accuracy, color=colour, marker="o", markersize=3)
        for _, entries in parameters[parameters.run_id == run_id].groupby("parameter"):
            sizes.plot(entries.step, entries.mean_square**0.5, color=colour, linewidth=0.9)
    losses.set(xlabel="step", ylabel="loss", yscale="log", title="Loss: training, and validation with marks")
    accuracies.set(xlabel="processor seconds, all ranks", title="Accuracy on the validation set")
    sizes.set(xlabel="step", title="Root mean square of recorded parameters")
    if 0 < training.run_id.nunique() <= 12:
        losses.legend(fontsize=7)
    figure.savefig(output, dpi=110)


if __name__ == "__main__":
    main()
