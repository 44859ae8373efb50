"""The views of a record that questions are asked of: runs, training, validation, parameters.

One text for a run's own file and for many runs gathered in one database (`gather`), where `run_id` is a column of every
table. `accuracy` is the evaluation metric, whatever its name is: `metric_name` says it. Times count from the run's first
beginning: `elapsed_seconds` on the clock, interruptions included; `cpu_seconds` is the processor time of all ranks in the
steps before that one. `validation` has a row for each evaluation of the validation set, with rates and sizes of the step
before it; other splits are in `evaluations`. An entry of a parameter has its place in the flattened parameter (`index`),
and in the matrix of `row`s that the first dimension makes; the name is the module's, the subname the parameter's in it.
"""

from __future__ import annotations

VIEW_NAMES = ("runs", "training", "validation", "parameters")


def views(many: bool = False) -> str:
    """SQL that makes the views where they are missing.

    Args:
        many: whether every table has a `run_id`, and rows of several runs.
    """
    same_run = "{0}.run_id = {1}.run_id" if many else "TRUE"
    return f"""
CREATE VIEW IF NOT EXISTS runs AS
SELECT run.*, (SELECT min(first.started_unix_time) FROM run AS first
               WHERE {same_run.format("first", "run")}) AS began_unix_time
FROM run WHERE part = (SELECT max(last.part) FROM run AS last WHERE {same_run.format("last", "run")});
CREATE VIEW IF NOT EXISTS training AS
SELECT runs.run_id AS run_id, steps.step AS step, steps.epoch AS epoch, steps.unix_time AS unix_time,
    steps.unix_time - runs.began_unix_time AS elapsed_seconds,
    sum(steps.cpu_seconds) OVER (PARTITION BY runs.run_id ORDER BY steps.step) AS cpu_seconds,
    steps.loss AS loss,
    coalesce(steps.metric, CASE runs.metric WHEN 'loss' THEN steps.loss END) AS accuracy, runs.metric AS metric_name,
    steps.examples AS batch_size, steps.learning_rate AS learning_rate, steps.momentum AS momentum
FROM steps JOIN runs ON {same_run.format("runs", "steps")};
CREATE VIEW IF NOT EXISTS validation AS
SELECT runs.run_id AS run_id, evaluations.step AS step, evaluations.epoch AS epoch, evaluations.unix_time AS unix_time,
    evaluations.unix_time - runs.began_unix_time AS elapsed_seconds, training.cpu_seconds AS cpu_seconds,
    evaluations.loss AS loss, evaluations.penalty AS penalty,
    CASE runs.metric WHEN 'loss' THEN evaluations.loss ELSE evaluation_metrics.value END AS accuracy,
    runs.metric AS metric_name, training.batch_size AS batch_size, training.learning_rate AS learning_rate,
    training.momentum AS momentum
FROM evaluations JOIN runs ON {same_run.format("runs", "evaluations")}
LEFT JOIN evaluation_metrics ON {same_run.format("evaluation_metrics", "evaluations")}
    AND evaluation_metrics.step = evaluations.step AND evaluation_metrics.split = evaluations.split
    AND evaluation_metrics.name = runs.metric
LEFT JOIN training ON training.run_id = runs.run_id AND training.step = evaluations.step
WHERE evaluations.split = 'validation';
CREATE VIEW IF NOT EXISTS parameters AS
SELECT runs.run_id AS run_id, parameter_values.step AS step, entries.name AS name, entries.subname AS subname,
    entries."index" AS "index", entries."row" AS "row", entries."column" AS "column",
    parameter_values.value AS value, parameter_values.gradient AS gradient
FROM parameter_values
JOIN parameter_entries AS entries ON {same_run.format("entries", "parameter_values")}
    AND entries.id = parameter_values.entry
JOIN runs ON {same_run.format("runs", "parameter_values")};
"""
