"""Many records as one database, and questions to it; compared with each file asked by itself."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from ddp.__main__ import main
from ddp.errors import UsageError
from ddp.telemetry.gather import gather
from ddp.telemetry.query import Answer, ask, render
from ddp.telemetry.recorder import Recorder
from ddp.telemetry.recording import open_recording
from ddp.telemetry.records import ParameterEntries, ParametersRecord, RunInfo
from telemetry_records import evaluation_records, make_older, run_info, step_records

RUNS = 23  # more than the ten files that SQLite attaches at a time
STEPS = 30


def record(folder: Path, info: RunInfo, loss: float = 0.0) -> None:
    """A run in `folder` with an evaluation and parameters; `loss` is added to each step's."""
    folder.mkdir(parents=True)
    recorder = Recorder(folder / "run.db", info)
    for step in step_records(info, STEPS):
        momentum = 0.5 + step.step / 100
        recorder.step(replace(step, loss=step.loss + loss, metric=0.25, momentum=momentum, cpu_seconds=0.5))
    for evaluation in evaluation_records(info, STEPS):
        recorder.evaluation(replace(evaluation, penalty=0.125))
    entries = ParameterEntries("body.0.weight", (3, 4), (0, 5, 11), (1.0, math.nan, 3.0), (0.1, 0.2, 0.3))
    recorder.parameters(ParametersRecord(1, (entries, ParameterEntries("scale", (), (0,), (2.0,), (math.nan,)))))
    recorder.close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for number in range(RUNS):
        record(folder / f'it\'s "{number}" #%?;--', run_info(run_id=f"run-{number}"), loss=number)
    (folder / "targets").mkdir()
    return folder


def test_more_runs_than_can_be_attached_become_one_table(runs: Path) -> None:
    before = {path: (path / "run.db").read_bytes() for path in runs.glob("it*")}
    with closing(gather(runs / "*")) as database:
        rows = database.execute("SELECT run_id, count(*), avg(loss) FROM training GROUP BY run_id").fetchall()
        database.execute("CREATE TEMP VIEW own AS SELECT * FROM training")  # a copy that is the caller's to use
    base = statistics.fmean(step.loss for step in step_records(run_info(), STEPS))
    assert {name: (count, loss) for name, count, loss in rows} == {
        f"run-{number}": (STEPS, pytest.approx(base + number)) for number in range(RUNS)
    }
    assert {path: (path / "run.db").read_bytes() for path in runs.glob("it*")} == before
    assert all([each.name for each in path.iterdir()] == ["run.db"] for path in before)


def test_the_views_of_one_file_and_of_many_say_the_same(runs: Path) -> None:
    file = next(runs.glob('it*"7"*')) / "run.db"
    with closing(open_recording(file)) as one, closing(gather([runs / "*"])) as many:
        for view in ("training", "validation", "parameters"):
            order = 'ORDER BY step, "index"' if view == "parameters" else "ORDER BY step"
            own = one.execute(f"SELECT * FROM {view} {order}")
            names = [name for name, *_ in own.description]
            others = many.execute(f"SELECT * FROM {view} WHERE run_id = 'run-7' {order}")
            assert [name for name, *_ in others.description] == names
            assert others.fetchall() == list(map(tuple, own)) != []


def test_what_the_views_say(runs: Path) -> None:
    first = step_records(run_info(), STEPS)
    with closing(gather([next(runs.glob('it*"0"*'))])) as database:
        database.row_factory = sqlite3.Row
        training = database.execute("SELECT * FROM training ORDER BY step").fetchall()
        (validation,) = database.execute("SELECT * FROM validation").fetchall()
        parameters = database.execute('SELECT * FROM parameters ORDER BY name DESC, "index"').fetchall()
        (began,) = database.execute("SELECT min(started_unix_time) FROM run").fetchone()
    assert [row["step"] for row in training] == list(range(1, STEPS + 1))
    for row, step in zip(training, first, strict=True):
        assert (row["epoch"], row["unix_time"], row["loss"]) == (step.epoch, step.unix_time, step.loss)
        assert row["elapsed_seconds"] == pytest.approx(step.unix_time - began)
        assert (row["cpu_seconds"], row["accuracy"], row["metric_name"]) == (step.step / 2, 0.25, "accuracy")
        assert (row["batch_size"], row["learning_rate"]) == (step.examples, step.learning_rate)
        assert row["momentum"] == 0.5 + step.step / 100
    (evaluation,) = [each for each in evaluation_records(run_info(), STEPS) if each.split == "validation"]
    at = training[evaluation.step - 1]
    assert (validation["step"], validation["loss"], validation["penalty"]) == (23, evaluation.loss, 0.125)
    assert validation["accuracy"] == evaluation.metrics["accuracy"]
    for name in ("cpu_seconds", "batch_size", "learning_rate", "momentum"):
        assert validation[name] == at[name]
    assert [tuple(row)[2:] for row in parameters] == [
        ("body.0", "weight", 0, 0, 0, 1.0, 0.1),
        ("body.0", "weight", 5, 1, 1, None, 0.2),
        ("body.0", "weight", 11, 2, 3, 3.0, 0.3),
        ("", "scale", 0, 0, 0, 2.0, None),
    ]


def test_the_loss_is_the_metric_where_that_is_watched(tmp_path: Path) -> None:
    record(tmp_path / "a", replace(run_info(), metric="loss"))
    (training,) = ask("SELECT count(*), sum(accuracy = 0.25) FROM training", [tmp_path / "a"]).rows
    (validation,) = ask("SELECT accuracy = loss FROM validation", [tmp_path / "a"]).rows
    assert (training, validation) == ((STEPS, STEPS), (1,))


def test_runs_of_one_name_stay_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        record(tmp_path / folder, run_info(run_id="'; DROP TABLE steps; --"))
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    names = ask("SELECT run_id, path FROM runs ORDER BY path", [tmp_path / "*", tmp_path / "a"]).rows
    assert names == [
        (f"'; DROP TABLE steps; -- ({tmp_path / each})", str(tmp_path / each / "run.db")) for each in "abc"
    ]
    assert ask("SELECT count(*), max(cpu_seconds) FROM training", [tmp_path / "*"]).rows == [(3 * STEPS, STEPS / 2)]


def test_records_of_the_release_before_are_gathered_with_the_others(tmp_path: Path) -> None:
    for folder in ("old", "new"):
        record(tmp_path / folder, run_info(run_id=folder))
    make_older(tmp_path / "old" / "run.db")
    before = (tmp_path / "old" / "run.db").read_bytes()
    rows = ask(
        "SELECT run_id, count(loss), count(momentum), max(cpu_seconds) FROM training GROUP BY run_id", [tmp_path / "*"]
    )
    assert rows.rows == [("new", STEPS, STEPS, STEPS / 2), ("old", STEPS, 0, None)]
    assert (tmp_path / "old" / "run.db").read_bytes() == before


def test_what_is_no_record_is_refused_or_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record(tmp_path / "good", run_info())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.db").write_text("no database at all, and long enough to be told from one" * 20)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "run.db").symlink_to(tmp_path / "good" / "run.db")
    (tmp_path / "begun").mkdir()
    Recorder(tmp_path / "begun" / "run.db", run_info()).close()
    with closing(sqlite3.connect(tmp_path / "begun" / "run.db")) as database, database:
        database.execute("DELETE FROM run")
    assert ask("SELECT count(*) FROM runs", [tmp_path / "*"]).rows == [(1,)]
    assert sorted(message.split(":")[0] for message in caplog.messages) == [
        f"{tmp_path / name / 'run.db'}" + (" is a link, which is not followed" if name == "linked" else "")
        for name in ("bad", "begun", "linked")
    ]
    for name, said in (
        ("bad", "not a database"),
        ("linked", "is a link"),
        ("begun", "has not begun"),
        ("none", "no record"),
    ):
        with pytest.raises(UsageError, match=said):
            gather(tmp_path / name)
    with pytest.raises(UsageError, match="no run with a run.db is there"):
        gather(tmp_path / "x*")
    with pytest.raises(UsageError, match="no run is named"):
        gather([])


def test_what_a_file_says_besides_its_tables_stays_there(tmp_path: Path) -> None:
    """A table that is a view of an endless question, and a view that lies."""
    record(tmp_path / "a", run_info())
    with closing(sqlite3.connect(tmp_path / "a" / "run.db")) as database, database:
        database.execute("DROP TABLE phases")
        database.execute(
            "CREATE VIEW phases AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i AS step FROM n"
        )
        database.execute("DROP VIEW training")
        database.execute("CREATE VIEW training AS SELECT 'lies' AS loss")
    assert ask("SELECT count(*), (SELECT count(*) FROM phases) FROM training", [tmp_path / "a"]).rows == [(STEPS, 0)]


@pytest.mark.parametrize(
    ("question", "said"),
    [
        ("ATTACH '{new}' AS other", "may read the runs' tables and nothing else"),
        ("VACUUM INTO '{new}'", "may read"),
        ("PRAGMA user_version = 7", "may read"),
        ("DELETE FROM steps", "may read"),
        ("CREATE TABLE mine (x)", "may read"),
        ("SELECT 1; SELECT 2", "one statement at a time"),
        ("SELECT load_extension('x')", "no such function|not authorized"),
        ("SELECT * FROM trainings", "no such table: trainings; there are training, validation"),
        ("SELEC 1", "syntax error"),
        ("", "gives no rows"),
        ("SELECT '\0'", "query: "),
    ],
)
def test_a_question_reads_and_does_nothing_else(runs: Path, tmp_path: Path, question: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        ask(question.format(new=tmp_path / "new"), [next(runs.glob("it*"))])
    assert list(tmp_path.iterdir()) == []


ANSWER = Answer(
    ("run", "loss", "text"), [("a", 0.125, None), ("b", math.inf, "one\n\x1b[2Jtwo"), ("c", None, b"\x00\xff")]
)


def test_the_forms_of_an_answer() -> None:
    table = render(ANSWER)
    assert "\x1b" not in table and len(table.splitlines()) == 5 and "one\\n\\x1b[2Jtwo" in table
    assert json.loads(render(ANSWER, "json")) == [
        {"run": "a", "loss": 0.125, "text": None},
        {"run": "b", "loss": "Infinity", "text": "one\n\x1b[2Jtwo"},
        {"run": "c", "loss": None, "text": "x'00ff'"},
    ]
    assert list(csv.reader(io.StringIO(render(ANSWER, "csv"))))[1:] == [
        ["a", "0.125", ""],
        ["b", "Infinity", "one\n\x1b[2Jtwo"],
        ["c", "", "x'00ff'"],
    ]
    assert render(Answer(("a", "bc"), [])) == "a  bc\n-  --\n"
    joined = Answer(("loss", "loss"), [(0.25, 0.5)])
    assert render(joined, "csv") == "loss,loss\n0.25,0.5\n"
    with pytest.raises(UsageError, match="several columns are called loss: name them apart with AS"):
        render(joined, "json")


def test_the_command(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question = "SELECT run_id, max(step) AS steps FROM training GROUP BY run_id ORDER BY run_id LIMIT 2"
    with pytest.raises(SystemExit) as ended:
        main(["query", question, os.fspath(runs / "*")])
    assert ended.value.code == 0
    assert capsys.readouterr().out == "run_id  steps\n------  -----\nrun-0      30\nrun-1      30\n"
    with pytest.raises(SystemExit) as ended:
        main(["query", question, os.fspath(runs / "*"), "--json"])
    assert json.loads(capsys.readouterr().out) == [{"run_id": f"run-{i}", "steps": 30} for i in (0, 1)]
    with pytest.raises(SystemExit) as ended:
        main(["query", "SELECT nothing", os.fspath(runs / "*"), "--csv"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_example_asks_with_pandas_and_draws(runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    script = Path(__file__).parent.parent / "examples" / "query.py"
    output = tmp_path / "curves.png"
    command = [sys.executable, str(script), str(runs / 'it*"1*'), "--output", str(output)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 1 + 11 + 1 and "best_accuracy" in lines[0]  # runs 1 and 10 to 19
    assert output.read_bytes().startswith(b"\x89PNG")
