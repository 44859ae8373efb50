"""What can befall a run, each injected for real: one row a fault, shared by `make soak` and tests/test_faults.py.

    verdict.py        what a case came to, and what a row is
    faulty_task.py    the task that the runs train; it does the injuring, in its own rank
    small_job.py      the job around it, and the weights that an undisturbed run ends with
    running.py        starts ranks in every way there is, and ends all that was started
    warm.py           ranks without a launcher, and without the seconds that importing torch takes
    evidence.py       what a run left behind: outcome, checkpoints, weights, metrics
    rows.py           the list of rows
    kills.py stops.py silences.py saving.py numbers.py telemetry_faults.py    the rows

A row makes its cases from a seed, and runs one in an empty folder of its own.
"""

from pathlib import Path


def faulty_task_file() -> Path:
    """The file that a case's folder gets a copy of."""
    return Path(__file__).with_name("faulty_task.py")
