"""The journal that masters share, what is drawn from it, and what is concluded: in one process, with made-up results."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar, Self
from xml.etree import ElementTree

import pytest

from browser import drawn
from ddp.errors import DdpError, UsageError
from ddp.job import load_job
from ddp.sweep.findings import Findings, find, write_findings
from ddp.sweep.findings_text import in_words
from ddp.sweep.journal import FILE_NAME, Journal, build_sampler
from ddp.sweep.locks import PLANNING_LOCK, FileLock, Masters, held
from ddp.sweep.opening import opened_directory
from ddp.sweep.page import write_sweep_page
from ddp.sweep.planning import Planner, Work
from ddp.sweep.stages import plan_stage
from ddp.sweep.sweep_file import Sweep, load_sweep
from ddp.sweep.trials import Trial, TrialResult

SWEEP = """
[sweep]
trials = 12
sampler = "{sampler}"
seed = 3
[sweep.pruner]
startup_trials = 2
[sweep.dimensions]
"optimizer.learning_rate" = {{ low = 1e-3, high = 1.0, points = 4 }}
"optimizer.name" = ["sgd", "adam"]
"optimizer.momentum" = {{ low = 0.0, high = 0.9, points = 2, when = {{ "optimizer.name" = "sgd" }} }}
[[sweep.stages]]
name = "coarse"
steps = 10
[[sweep.stages]]
name = "fine"
steps = 20
trials = 6
[run]
steps = 40
[task]
name = "quadratic"
[batch]
global_batch_size = 8
[evaluation]
metric = "distance"
"""
BEST_RATE = 0.03


class InOneProcess(Masters):
    """Record locks are between processes: here each says itself whether it is there."""

    here: ClassVar[set[str]] = set()

    def __enter__(self) -> Self:
        super().__enter__()
        self.here.add(self.name)
        return self

    def __exit__(self, *error: object) -> None:
        self.here.discard(self.name)
        super().__exit__(*error)

    def lives(self, name: str) -> bool:
        return name in self.here


class Desk:
    """A master's part of a sweep without its processes."""

    def __init__(self, directory: Path, sweep: Sweep) -> None:
        self.directory, self.sweep = directory, sweep
        self.masters = InOneProcess(directory)
        self.masters.__enter__()
        self.journal = Journal(directory, sweep.section.pruner)
        self.planner = Planner(sweep, self.journal, self.masters, directory)

    def work(self) -> Work:
        found = self.planner.next()
        assert not isinstance(found, str), found
        return found

    def run(self, result: Any = None) -> list[Trial]:
        """All trials one after another, each with `result(trial)`."""
        done: list[Trial] = []
        while not isinstance(work := self.planner.next(), str):
            self.journal.tell(work.trial, (result or planted)(work.trial))
            done.append(work.trial)
        return done

    def findings(self) -> Findings:
        return find(self.sweep, self.journal, self.planner, "min")


def planted(trial: Trial) -> TrialResult:
    """The further from the best rate the worse, by factors."""
    rate = trial.values["optimizer.learning_rate"]
    cost = abs(float(f"{rate:.3e}") / BEST_RATE - 1) if rate > BEST_RATE else BEST_RATE / rate - 1
    return TrialResult("complete", "", cost, cost, 1.0, cost / 2, 0.5, 1.0, 10, 0.5, 300 << 20)


def desk(folder: Path, sampler: str = "random", *overrides: str) -> Desk:
    (folder / "s.toml").write_text(SWEEP.format(sampler=sampler))
    directory = folder / "out"
    directory.mkdir(exist_ok=True)
    return Desk(directory, load_sweep(folder / "s.toml", [f"sweep.directory={directory}", *overrides]))


def test_what_the_nth_trial_is_does_not_depend_on_who_asks(tmp_path: Path) -> None:
    """One master, and three that take turns, of which one comes late: the same values, each once."""
    folders = [tmp_path / "one", tmp_path / "three"]
    for folder in folders:
        folder.mkdir()
    alone = [trial.values for trial in desk(folders[0]).run()]
    together = [desk(folders[1]), desk(folders[1])]
    first = [each.work().trial for each in (*together, *together)]
    together.append(desk(folders[1]))
    rest = [each.work().trial for _ in range(2) for each in together] + [together[0].work().trial for _ in range(2)]
    drawn = [*first, *rest]
    assert [trial.number for trial in drawn] == list(range(12))
    assert [trial.values for trial in drawn] == alone[:12]
    assert len({trial.values["optimizer.learning_rate"] for trial in drawn}) == 12
    assert together[1].planner.next() == "wait"  # the next stage needs these to end
    for trial in drawn:
        together[0].journal.tell(trial, planted(trial))
    assert together[2].work().trial.values == alone[12]


def test_a_trial_of_a_master_that_is_gone_is_taken_over(tmp_path: Path) -> None:
    one, other = desk(tmp_path), desk(tmp_path)
    begun = one.work()
    assert other.work().trial.number == 1
    one.journal.note_spent(begun.trial, 2.5)
    one.masters.__exit__()
    taken = other.work()
    assert taken.again and taken.trial.number == 0 and taken.trial.values == begun.trial.values
    assert taken.trial.spent_seconds == other.journal.trials("coarse")[0].spent_seconds == 2.5
    assert other.work().trial.number == 2


@pytest.mark.parametrize("sampler", ["random", "grid"])
def test_a_master_that_is_killed_while_it_draws(tmp_path: Path, sampler: str) -> None:
    """However much of a new trial is in the journal: the next master makes it the same one, and none is lost."""
    (tmp_path / "whole").mkdir()
    whole = desk(tmp_path / "whole", sampler)
    for _ in range(3):
        whole.work()
    lines = (whole.directory / FILE_NAME).read_bytes().splitlines(keepends=True)
    expected = [trial.values for trial in whole.journal.trials("coarse")]
    whole.masters.__exit__()
    for cut in range(len(lines) - 14, len(lines)):
        folder = tmp_path / str(cut)
        (folder / "out").mkdir(parents=True)
        (folder / "out" / FILE_NAME).write_bytes(b"".join(lines[:cut]) + b'{"op_code": 5, "half a li')
        later = desk(folder, sampler)
        while len(found := later.journal.trials("coarse")) < 3 or not all(trial.values for trial in found):
            later.work()
        assert [trial.number for trial in found] == [0, 1, 2]
        assert (
            [trial.values for trial in found[:2]] == expected[:2]
            if sampler == "grid"
            else found[0].values == expected[0]
        )
        if sampler == "grid":
            assert found[2].values == expected[2]
        later.masters.__exit__()


def test_a_grid_runs_every_point_once(tmp_path: Path) -> None:
    one = desk(tmp_path, "grid")
    done = [trial.values for trial in one.run() if trial.stage == "coarse"]
    assert len(done) == 4 * (2 + 1)  # sgd with two momenta, adam without
    assert len({json.dumps(values, sort_keys=True) for values in done}) == len(done)


@pytest.mark.parametrize("sampler", ["random", "tpe", "qmc", "nsgaii"])
def test_samplers_find_a_planted_optimum(tmp_path: Path, sampler: str) -> None:
    """60 trials over three decades, of which the best is within a factor of 1.3."""
    wanted = desk(tmp_path, sampler, "sweep.stages=[]", "sweep.trials=60")
    wanted.run()
    best = wanted.findings().best
    assert best is not None
    assert best.values["optimizer.learning_rate"] == pytest.approx(BEST_RATE, rel=0.3)


def test_the_second_stage_is_narrower_and_better(tmp_path: Path) -> None:
    one = desk(tmp_path)
    trials = one.run()
    coarse, fine = ([each for each in trials if each.stage == stage] for stage in ("coarse", "fine"))
    best = min(coarse, key=lambda trial: planted(trial).cost).values["optimizer.learning_rate"]
    low, high = best / 1000**0.25, best * 1000**0.25  # half of three decades
    rates = [trial.values["optimizer.learning_rate"] for trial in fine]
    assert max(1e-3, low) <= min(rates) and max(rates) <= min(1.0, high)
    found = one.findings()
    assert found.best is not None and found.best.stage == "fine"
    assert all(trial.stage == "fine" for trial in found.compared)  # trials of other lengths are not compared


def test_pruning_compares_the_nth_evaluations(tmp_path: Path) -> None:
    one = desk(tmp_path)
    for _ in range(2):
        trial = one.work().trial
        assert [one.journal.report(trial, n, 1.0 / n) for n in (1, 2, 3)] == [False] * 3
        one.journal.tell(trial, planted(trial))
    good, bad = one.work().trial, one.work().trial
    assert not one.journal.report(good, 1, 0.9)
    assert not one.journal.report(bad, 1, 0.9)
    assert one.journal.report(bad, 2, 0.8)  # where the others had 0.5
    assert not one.journal.report(good, 2, 0.4)


def test_warnings_of_borders_but_not_where_the_job_itself_ends(tmp_path: Path) -> None:
    def best_at_the_end(trial: Trial) -> TrialResult:
        cost = -trial.values["optimizer.learning_rate"] + trial.values.get("optimizer.momentum", 0.0)
        return TrialResult("complete", "", cost, cost)

    one = desk(tmp_path, "grid")
    one.run(best_at_the_end)
    found = one.findings()
    assert [each for each in found.warnings if "momentum" in each] == []  # below 0 there is none
    (warning, *_) = [each for each in found.warnings if "learning_rate" in each]
    assert re.search(r"best value of stage coarse, 1, lies on the upper border of its range, 0.001 to 1, log", warning)
    other = tmp_path / "inside"
    other.mkdir()
    inside = desk(other)
    inside.run()
    assert inside.findings().warnings == ()


def test_what_is_written_and_said(tmp_path: Path) -> None:
    one = desk(tmp_path)

    def mixed(trial: Trial) -> TrialResult:
        endings = {2: TrialResult("failed", "was killed by SIGKILL"), 3: TrialResult("diverged", "not finite")}
        return endings.get(trial.number, planted(trial)) if trial.stage == "coarse" else planted(trial)

    one.run(mixed)
    found = one.findings()
    write_findings(found, one.directory)
    results = json.loads((one.directory / "results.json").read_text())
    best = next(each for each in results["trials"] if each["rank"] == 1)
    assert results["best"] == f"{best['stage']}/{best['trial']}"
    assert [each["state"] for each in results["trials"][:4]] == ["complete", "complete", "failed", "diverged"]
    job = load_job(one.directory / "best.toml")
    assert job.optimizer.learning_rate == best["values"]["optimizer.learning_rate"]
    assert job.run.steps == 40 and job.run.id is None
    words = in_words(found)
    assert "one validation fold" in words and "fine/trial-" in words
    assert "1 of 12 trials failed, the first one: was killed by SIGKILL" in words
    assert results["stages"][0]["importance"].keys() >= {"optimizer.learning_rate"}
    assert sum(results["stages"][0]["importance"].values()) == pytest.approx(1)


def test_masters_that_end_together_write_the_best_job_one_after_another(tmp_path: Path) -> None:
    source = Path(__file__).resolve().parent.parent / "examples" / "digits.toml"
    code = (
        "import sys; from pathlib import Path; from ddp.job import load_job; from ddp.sweep.job_of_trial import write_job\n"
        f"job = load_job({str(source)!r}); print(flush=True); sys.stdin.readline()\n"
        "for _ in range(300): write_job(Path(sys.argv[1]), job)"
    )

    def ready() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", code, str(tmp_path / "best.toml")]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    with ready() as one, ready() as other:
        for each in (one, other):
            assert each.stdin is not None and each.stdout is not None
            each.stdout.readline()
            each.stdin.write(b"\n")
            each.stdin.flush()
        assert [each.wait(timeout=60) for each in (one, other)] == [0, 0]
    assert load_job(tmp_path / "best.toml") == load_job(source)
    assert [path.name for path in tmp_path.iterdir()] == ["best.toml"]


def test_every_trial_failing_ends_the_sweep(tmp_path: Path) -> None:
    one = desk(tmp_path)
    for _ in range(3):
        one.journal.tell(one.work().trial, TrialResult("failed", "no such device"))
    with pytest.raises(DdpError, match="every trial so far failed, the last one: no such device"):
        one.planner.next()
    later = desk(tmp_path)  # with room on the disk, say
    later.journal.tell(later.work().trial, TrialResult("failed", "no such device"))
    assert later.work().trial.number == 4


def test_a_stage_without_anything_to_go_on_from(tmp_path: Path) -> None:
    one = desk(tmp_path)
    with pytest.raises(DdpError, match="stage coarse: no trial came to its end, so fine has nothing"):
        one.run(lambda trial: TrialResult("diverged"))


def test_locks_end_with_their_holder(tmp_path: Path) -> None:
    with held(FileLock(tmp_path / "lock")):
        acquire = (
            "import sys, ddp.sweep.locks as l; l.PATIENCE_SECONDS = 0.1\n"
            "try: l.FileLock(l.Path(sys.argv[1])).acquire()\n"
            "except l.DdpError as e: print(e)"
        )
        assert "another master has held this lock" in elsewhere(acquire, tmp_path / "lock")
    assert elsewhere(acquire, tmp_path / "lock") == ""
    begin = "import os, sys, ddp.sweep.locks as l; m = l.Masters(l.Path(sys.argv[1])); m.__enter__(); print(m.name)"
    with Masters(tmp_path) as one:
        see = f"import sys, ddp.sweep.locks as l; print(l.Masters(l.Path(sys.argv[1])).lives({one.name!r}))"
        assert elsewhere(see, tmp_path) == "True\n"
        gone = elsewhere(f"{begin}; sys.stdout.flush(); os.kill(os.getpid(), 9)", tmp_path).strip()
        assert (tmp_path / "masters" / gone).exists()
        assert not one.lives(gone) and not one.lives("") and one.lives(one.name)
        assert one.others() == []
    assert list((tmp_path / "masters").iterdir()) == []


def test_a_master_comes_in_while_no_other_looks_who_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else one that has made its file, and not locked it yet, is taken for gone for good, and its trials run twice."""
    seen: list[str] = []
    look = (
        "import sys, ddp.sweep.locks as l; l.PATIENCE_SECONDS = 0.0\n"
        "try: l.FileLock(l.Path(sys.argv[1])).acquire()\n"
        "except l.DdpError: print('held')"
    )

    class Slow(Masters):
        def __enter__(self) -> Masters:
            seen.append(elsewhere(look, tmp_path / "out" / PLANNING_LOCK))
            return super().__enter__()

    monkeypatch.setattr("ddp.sweep.opening.Masters", Slow)
    (tmp_path / "s.toml").write_text(SWEEP.format(sampler="random"))
    sweep = load_sweep(tmp_path / "s.toml", [f"sweep.directory={tmp_path / 'out'}"])
    with opened_directory(sweep, resume=False, join=True):
        assert seen == ["held\n"]
        assert elsewhere(look, tmp_path / "out" / PLANNING_LOCK) == ""


def elsewhere(code: str, path: Path) -> str:
    """What a process prints that gets `path`."""
    command = [sys.executable, "-c", code, str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stdout


def test_a_file_that_is_no_journal(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FILE_NAME).write_text("this is not one\nnor this\n")
    with pytest.raises(UsageError, match="cannot be used as a sweep's journal"):
        desk(tmp_path).planner.next()


def test_without_optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match=re.escape("pip install -e '.[search]'")):
        desk(tmp_path)


def test_seeds_differ_by_number_and_stage() -> None:
    import optuna

    drawn = set()
    for seed in ((3, 0), (3, 1), (4, 0)):
        for number in range(3):
            study = optuna.create_study(sampler=build_sampler("random", seed, number))
            drawn.add(study.ask().suggest_float("x", 0, 1))
    assert len(drawn) == 9


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    one = desk(tmp_path_factory.mktemp("page"), "random", "sweep.trials=24")

    def some_diverge(trial: Trial) -> TrialResult:
        if trial.values["optimizer.learning_rate"] > 0.3:
            return TrialResult("diverged", "loss of <step 3> is not finite", seconds=0.2)
        return planted(trial) if trial.number % 5 else TrialResult("pruned", "others", 2.0, 2.0, 1.0, 2.0, 1.0)

    one.run(some_diverge)
    return write_sweep_page(one.findings(), one.directory / "report.html")


def test_the_page_draws_each_dimension_against_four_quantities(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    labels = [each.get("aria-label") for each in root.iter("{http://www.w3.org/2000/svg}svg")]
    for key in ("optimizer.learning_rate", "optimizer.name", "optimizer.momentum"):
        assert f"{key} against training distance, validation distance, memory, MiB, run time, s" in labels
    assert "one validation fold" in text and "loss of &lt;step 3&gt; is not finite" in text
    assert "Which dimensions matter" in text
    assert "http://" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", text)


def test_a_browser_draws_it(page: Path, tmp_path: Path) -> None:
    assert drawn(page, tmp_path / "profile").count("<figure") >= 4


def test_a_plan_is_the_same_for_every_master(tmp_path: Path) -> None:
    one, other = desk(tmp_path), desk(tmp_path)
    for trial in [one.work().trial for _ in range(12)]:
        one.journal.tell(trial, planted(trial))
    assert one.work().trial.stage == "fine"
    stage = other.planner.stages[1]
    plans = [each.planner.plan(stage) for each in (one, other)]
    plans.append(plan_stage(other.sweep, stage, ()))
    texts = [json.dumps(each and each.to_json()) for each in plans]
    assert texts[0] == texts[1] != texts[2]
