"""When a run has learnt enough: Keras's rules written down once more, the best weights brought back, on all ranks."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from ddp.errors import JobFileError
from ddp.job import EarlyStoppingSection
from ddp.telemetry.recording import open_recording, read_evaluations, read_events
from ddp.training.early_stopping import BestTensors, EarlyStopping
from ranks import RankPool
from training_runs import differences, job, saved, steps_of, train_ranks


def keras(values: list[float], mode: str, patience: int, min_delta: float, baseline: float | None, start: int) -> int:
    """At which of `values` Keras's callback would stop; their number where it would not."""
    better = (lambda a, b: a - min_delta > b) if mode == "max" else (lambda a, b: a + min_delta < b)
    best, wait = -math.inf if mode == "max" else math.inf, 0
    for epoch, value in enumerate(values):
        if epoch < start:
            continue
        wait += 1
        if better(value, best):
            best = value
            if baseline is None or better(value, baseline):
                wait = 0
                continue
        if wait >= patience and epoch > 0:
            return epoch
    return len(values)


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("patience", [0, 1, 3])
@pytest.mark.parametrize("min_delta, baseline, start", [(0.0, None, 0), (0.2, None, 0), (0.0, 0.4, 0), (0.1, 0.6, 2)])
def test_it_stops_where_keras_does(
    mode: Any, patience: int, min_delta: float, baseline: float | None, start: int
) -> None:
    source = random.Random(patience)
    for _ in range(200):
        # The first value is an improvement on nothing: with a baseline, Keras does not stop at epoch 0 for its sake.
        values = [source.choice([source.random(), math.nan] if source.random() < 0.1 else [source.random()])]
        values += [source.random() for _ in range(12)]
        section = EarlyStoppingSection(
            patience=patience, min_delta=min_delta, baseline=baseline, start_from_epoch=start, mode=mode
        )
        ending = EarlyStopping(section, mode)
        stops = len(values)
        for epoch, value in enumerate(values):
            ending.observe(epoch + 1, float(epoch), value)
            if ending.stopped:
                stops = epoch
                break
        assert stops == keras(values, mode, patience, min_delta, baseline, start), values


def test_an_evaluation_that_is_made_again_counts_once() -> None:
    """A run that goes on in another directory makes that of its first step again."""
    before = EarlyStopping(EarlyStoppingSection(patience=2), "min")
    for step, value in ((3, 1.0), (6, 1.0)):
        before.observe(step, 0.0, value)
    after = EarlyStopping(EarlyStoppingSection(patience=2), "min")
    after.load_state_dict(before.state_dict())
    after.observe(6, 0.0, 1.0)
    assert (after.seen, after.waited, after.stopped) == (2, 1, False)
    after.observe(9, 0.0, 1.0)
    assert after.stopped


def test_an_evaluation_that_only_the_end_brought_counts_where_it_is_the_best() -> None:
    ending = EarlyStopping(EarlyStoppingSection(patience=2), "min")
    for step, value in ((1, 1.0), (2, 1.5)):
        ending.observe(step, float(step), value)
    assert not ending.observe(3, 3.0, 1.2, due=False) and (ending.waited, ending.seen, ending.stopped) == (1, 2, False)
    assert ending.observe(4, 4.0, 0.5, due=False) and (ending.best_step, ending.waited) == (4, 0)


def test_a_table_without_patience_is_refused_and_one_with_it_is_read_back(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match="early stopping needs patience"):
        job(tmp_path, early_stopping__min_delta=0.1)
    with pytest.raises(JobFileError, match="averaged weights need decay"):
        job(tmp_path, averaged_weights__every_steps=3)
    assert EarlyStoppingSection().enabled is False and job(tmp_path, early_stopping__patience=0).early_stopping.enabled


def overfitting(folder: Path, **settings: Any) -> Any:
    """Linear regression at a rate at which the validation loss (of all there is, 61 examples) goes up and down."""
    return job(
        folder,
        run__steps=120,
        optimizer__learning_rate=0.35,
        evaluation__every_steps=3,
        early_stopping__patience=4,
        **settings,
    )


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_run_stops_and_ends_with_its_best_weights(rank_pool: RankPool, tmp_path: Path, world_size: int) -> None:
    here = overfitting(tmp_path, early_stopping__restore_best_weights=True)
    ended = train_ranks(rank_pool, world_size, here)
    assert {one.kind for one in ended} == {""}
    with open_recording(tmp_path / "run" / "run.db") as database:
        validation = [each for each in read_evaluations(database) if each.split == "validation"]
        (event,) = [each for each in read_events(database) if each.kind == "stopped_early"]
    last = steps_of(tmp_path / "run")[-1].step
    # The last record is of the weights that were brought back; the one it replaced was no improvement.
    losses = {each.step: each.loss for each in validation[:-1]}
    best = min(losses, key=lambda step: losses[step])
    assert last < 120 and last == best + 12 and f"step {best}" in event.text
    assert validation[-1].step == last and validation[-1].loss == pytest.approx(losses[best], rel=1e-6)
    for one in ended[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one.parameters, ended[0].parameters, strict=True))
    parameters = saved(tmp_path / "run", last, world_size)["shared"]["parameters"]
    assert all(torch.equal(a, b) for a, b in zip(parameters.values(), ended[0].parameters, strict=True))


def test_a_run_in_two_parts_stops_at_the_same_step_with_the_same_weights(rank_pool: RankPool, tmp_path: Path) -> None:
    train_ranks(rank_pool, 2, overfitting(tmp_path / "whole", early_stopping__restore_best_weights=True))
    last = steps_of(tmp_path / "whole" / "run")[-1].step
    # A signal stops it, once an epoch, again and again.
    options = {"task__options": {"action": "signal", "example": 1}}
    here = overfitting(tmp_path / "parts", early_stopping__restore_best_weights=True, **options)
    parts = 0
    while (ended := train_ranks(rank_pool, 2, here, resume="auto"))[0].kind:
        assert {one.kind for one in ended} == {"StoppedError"}, ended[0].message
        parts += 1
    assert parts > 2
    whole, parts = (saved(tmp_path / folder / "run", last, 2) for folder in ("whole", "parts"))
    for name in ("parameters", "early_stopping", "best_parameters"):
        assert not differences(whole["shared"][name], parts["shared"][name])
    # A finished run that is resumed is over; with more patience it goes on.
    assert {one.kind for one in train_ranks(rank_pool, 2, here, resume="auto")} == {""}
    assert steps_of(tmp_path / "parts" / "run")[-1].step == last
    more = here.model_copy(update={"early_stopping": here.early_stopping.model_copy(update={"patience": 9})})
    train_ranks(rank_pool, 2, more, resume="auto")
    assert steps_of(tmp_path / "parts" / "run")[-1].step > last


def test_what_is_kept_is_a_copy_and_another_models_is_refused() -> None:
    model = torch.nn.Linear(2, 1)
    best = BestTensors(lambda: dict(model.named_parameters()))
    best.bring_back()  # nothing yet
    best.keep()
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1)
    best.bring_back()
    assert torch.equal(model.weight, before)
    with pytest.raises(Exception, match="another model"):
        best.check_state({"weight": torch.zeros(3, 3)})
    best.check_state({})
