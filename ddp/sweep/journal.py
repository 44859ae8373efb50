"""Optuna's side of a sweep: one study a stage, all in one journal file that several masters may share.

Everything that a sweep knows is in this file: whatever ends a master, a later one goes on from it. Optuna draws the
values, decides which trials are pruned, and gives the importance of dimensions; costs are always minimised.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddp.errors import DdpError, UsageError
from ddp.sweep.locks import FileLock, held
from ddp.sweep.sections import PrunerSection, SamplerName
from ddp.sweep.space import optuna_parameters
from ddp.sweep.stages import StagePlan
from ddp.sweep.trials import Trial, TrialResult, result_from

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import FrozenTrial
    from optuna.trial import Trial as Asked

FILE_NAME = "journal.log"
VALUES, MASTER, SPENT, RESULT = "values", "master", "spent_seconds", "result"  # attributes of a trial
PLAN = "plan"  # of a study
FEWEST_FOR_IMPORTANCE = 10


class Journal:
    """The studies of one sweep. Each method is one or a few appends; who needs several to belong together holds a lock.

    Raises:
        UsageError: Optuna is not installed, or the file is not a journal.
    """

    def __init__(self, directory: Path, pruner: PrunerSection) -> None:
        optuna = imported_optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        self._path = directory / FILE_NAME
        lock: Any = FileLock(directory / f".{FILE_NAME}.lock")
        with held(lock):
            mend(self._path)
        self._pruner = build_pruner(pruner)
        with self._understood():
            self._storage = JournalStorage(JournalFileBackend(str(self._path), lock_obj=lock))
        self._studies: dict[str, Study] = {}

    def plan(self, stage: str) -> dict[str, Any] | None:
        """What `begin` kept; None where the stage has not begun."""
        with self._understood():
            found = next((each for each in self._storage.get_all_studies() if each.study_name == stage), None)
            return None if found is None else found.user_attrs.get(PLAN)

    def begin(self, stage: str, plan: StagePlan) -> None:
        with self._understood():
            self._study(stage).set_user_attr(PLAN, plan.to_json())

    def trials(self, stage: str) -> list[Trial]:
        """All of a stage, in the order of their numbers; none where it has not begun."""
        with self._understood():
            if all(each.study_name != stage for each in self._storage.get_all_studies()):
                return []
            known = self._study(stage).get_trials(deepcopy=False)
        return [_trial(stage, frozen) for frozen in known if frozen.state.name != "WAITING"]

    def ask(self, stage: str, plan: StagePlan, sampler: SamplerName, seed: tuple[int, int], master: str) -> Trial:
        """A new trial: the next point of a grid, or values that the sampler draws.

        The sampler is made anew, its seed from `seed` and the trial's number: which values the n-th trial has does not
        depend on who asks.
        """
        with self._understood(), quiet():
            from optuna.trial import TrialState

            study = self._study(stage)
            known = study.get_trials(deepcopy=False)
            study.sampler = build_sampler(sampler, seed, len(known))
            if plan.grid and all(each.state != TrialState.WAITING for each in known):  # else a killed master's next one
                study.enqueue_trial(optuna_parameters(plan.grid[len(known)], plan.space.dimensions))
            return self._drawn(stage, study.ask(), plan, master)

    def claim(
        self, trial: Trial, plan: StagePlan, sampler: SamplerName, seed: tuple[int, int], master: str
    ) -> Trial | None:
        """Take over a trial whose master is gone; None where it had ended, and only that had not been said."""
        from optuna.trial import Trial as Asked

        with self._understood(), quiet():
            frozen = self._storage.get_trial(self._id(trial))
            if RESULT in frozen.user_attrs:
                self.tell(trial, result_from(frozen.user_attrs[RESULT]))
                return None
            if VALUES not in frozen.user_attrs:  # its master was killed while it drew
                study = self._study(trial.stage)
                study.sampler = build_sampler(sampler, seed, trial.number)
                return self._drawn(trial.stage, Asked(study, self._id(trial)), plan, master)
        self._set(trial, MASTER, master)
        return replace(trial, master=master)

    def _drawn(self, stage: str, asked: Asked, plan: StagePlan, master: str) -> Trial:
        values = plan.space.draw(asked)
        asked.set_user_attr(MASTER, master)
        asked.set_user_attr(VALUES, values)
        return Trial(stage, asked.number, values, master)

    def note_spent(self, trial: Trial, seconds: float) -> None:
        """For an attempt that ends without a result."""
        self._set(trial, SPENT, seconds)

    def report(self, trial: Trial, evaluation: int, cost: float) -> bool:
        """Note the cost at the trial's evaluation of that number, from 1; whether others were better by then."""
        with self._understood(), quiet():
            self._storage.set_trial_intermediate_value(self._id(trial), evaluation, cost)
            study = self._study(trial.stage)
            return self._pruner.prune(study, self._storage.get_trial(self._id(trial)))

    def tell(self, trial: Trial, result: TrialResult) -> None:
        """The trial has ended."""
        from optuna.trial import TrialState

        self._set(trial, RESULT, asdict(result))
        with self._understood(), quiet():
            study = self._study(trial.stage)
            if result.state == "complete":
                study.tell(trial.number, result.cost)
            else:
                study.tell(trial.number, state=TrialState.FAIL if result.state == "failed" else TrialState.PRUNED)

    def importance(self, stage: str) -> dict[str, float]:
        """How much of the cost each dimension explains, summing to 1; empty where there are too few trials."""
        from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

        if sum(trial.is_complete for trial in self.trials(stage)) < FEWEST_FOR_IMPORTANCE:
            return {}
        with contextlib.suppress(ValueError, RuntimeError, ZeroDivisionError), quiet():  # all trials alike, for example
            found = get_param_importances(self._study(stage), evaluator=PedAnovaImportanceEvaluator())
            return {key: float(value) for key, value in found.items() if value == value}
        return {}

    def _set(self, trial: Trial, name: str, value: Any) -> None:
        with self._understood():
            self._storage.set_trial_user_attr(self._id(trial), name, value)

    def _id(self, trial: Trial) -> int:
        study_id = self._storage.get_study_id_from_name(trial.stage)
        return self._storage.get_trial_id_from_study_id_trial_number(study_id, trial.number)

    def _study(self, stage: str) -> Study:
        if stage not in self._studies:
            import optuna

            with quiet():
                self._studies[stage] = optuna.create_study(
                    storage=self._storage,
                    study_name=stage,
                    direction="minimize",
                    load_if_exists=True,
                    sampler=optuna.samplers.RandomSampler(),
                    pruner=self._pruner,
                )
        return self._studies[stage]

    @contextlib.contextmanager
    def _understood(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DdpError(
                f"{self._path}: cannot be written or read: {error.strerror or error}; the trials that finished before are "
                "kept: go on with --resume once the cause is gone"
            ) from None
        except (ValueError, KeyError) as error:
            if isinstance(error, KeyError) or "log format" in str(error) or "JSON" in type(error).__name__:
                raise UsageError(f"{self._path}: cannot be used as a sweep's journal: {error!r}") from None
            raise


def imported_optuna() -> Any:
    """The library.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise UsageError(
            "sweep: Optuna, which draws the trials, is not installed: pip install -e '.[search]'"
        ) from None
    return optuna


def build_sampler(name: SamplerName, seed: tuple[int, int], number: int) -> BaseSampler:
    """Optuna's sampler of that name for the trial of that number.

    Args:
        seed: the sweep's and the stage's.
    """
    from optuna import samplers

    own = int(np.random.SeedSequence((*seed, number)).generate_state(1)[0])
    shared = int(np.random.SeedSequence(seed).generate_state(1)[0])
    with quiet():
        match name:
            case "tpe":
                return samplers.TPESampler(seed=own, constant_liar=True)
            case "qmc":  # one sequence, whose next point the study knows
                return samplers.QMCSampler(seed=shared, scramble=True, warn_independent_sampling=False)
            case "cmaes":
                return samplers.CmaEsSampler(seed=own, warn_independent_sampling=False)
            case "gp":
                return samplers.GPSampler(seed=own)
            case "nsgaii":
                return samplers.NSGAIISampler(seed=own)
            case "random" | "grid":  # a grid's points are handed to it
                return samplers.RandomSampler(seed=own)


def build_pruner(section: PrunerSection) -> BasePruner:
    from optuna import pruners

    startup = {"n_startup_trials": section.startup_trials, "n_warmup_steps": section.startup_evaluations}
    match section.name:
        case "median":
            return pruners.MedianPruner(**startup)
        case "percentile":
            return pruners.PercentilePruner(section.percentile, **startup)
        case "successive_halving":
            return pruners.SuccessiveHalvingPruner()
        case "hyperband":
            return pruners.HyperbandPruner()
        case "none":
            return pruners.NopPruner()


def mend(path: Path) -> None:
    """Cut off a last line that is not whole, as a full disk or a power failure may leave it: it was never acted upon.

    Raises:
        UsageError: that file is not to be written by us.
    """
    if path.is_symlink():
        raise UsageError(f"{path} is a link, which is not followed: put what it leads to in its place")
    with contextlib.suppress(FileNotFoundError), open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        tail_bytes = min(size, 1 << 20)
        file.seek(size - tail_bytes)
        tail = file.read(tail_bytes)
        if tail and not tail.endswith(b"\n"):
            file.truncate(size - tail_bytes + tail.rfind(b"\n") + 1)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Optuna says by warnings that samplers and arguments may change in later versions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _trial(stage: str, frozen: FrozenTrial) -> Trial:
    kept = frozen.user_attrs
    result = result_from(kept[RESULT]) if RESULT in kept and frozen.state.is_finished() else None
    return Trial(stage, frozen.number, kept.get(VALUES, {}), kept.get(MASTER, ""), kept.get(SPENT, 0.0), result)
