from __future__ import annotations

import dataclasses
import itertools
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

import scaling_model
from ddp.transport.row import ROW_LENGTH
from scaling_model import Between, Model, Point, Setting, fit, load, projection, relative_errors, split, traffic

MEBIBYTE = 1 << 20
TRUE = Model(
    inside=np.array([2e-6, 3e-6, 2e-11, 5e-11]),
    ours=Between(1.05, np.array([1e-4, 2e-5, 1.2e-9])),
    ring=Between(1.1, np.array([2e-4, 6e-5, 1.5e-9])),
)
SIZES = (1 << 16, 1 << 18, 1 << 20, 1 << 22, 25 << 20)


def settings() -> list[Setting]:
    inside = [Setting("inside", size, 1, ranks, 2) for size, ranks in itertools.product(SIZES, (2, 3, 4))]
    between = [
        Setting(name, size, nodes, ranks, 2, rate)
        for name in ("ours", "ring")
        for size, (nodes, ranks), rate in itertools.product(SIZES, ((2, 1), (2, 2), (4, 1)), (2e8, 1e9, 4e9))
    ]
    return inside + between


def test_what_is_sent_is_counted_by_hand() -> None:
    flat = traffic(Setting("ring", 4000, 2, 2, 2))
    assert (flat.messages, flat.rank_bytes, flat.node_bytes) == (6, 6000, 6000)  # a node passes on one rank's share
    sliced = traffic(Setting("ours", 4000, 2, 2, 2))
    assert (sliced.messages, sliced.rank_bytes, sliced.node_bytes) == (2, 2000, 4000)
    assert traffic(Setting("ring", 4000, 1, 4, 2)).node_bytes == 0


def test_a_model_is_found_again_from_its_own_points() -> None:
    points = [Point(each, TRUE.seconds(each)) for each in settings()]
    fitted, held_out = split(points)
    assert len(fitted) + len(held_out) == len(points)
    assert len(held_out) > 10
    found = fit(fitted)
    np.testing.assert_allclose(found.inside, TRUE.inside, rtol=1e-6)
    for one, other in ((found.ours, TRUE.ours), (found.ring, TRUE.ring)):
        assert one.link == pytest.approx(other.link)
        np.testing.assert_allclose(one.cores, other.cores, rtol=1e-6)
    assert max(relative_errors(found, held_out)) < 1e-6


def test_noise_shows_as_an_error_of_its_size_on_points_held_out() -> None:
    generator = np.random.default_rng(1)
    points = [Point(each, TRUE.seconds(each) * math.exp(0.1 * generator.standard_normal())) for each in settings()]
    fitted, held_out = split(points)
    errors = relative_errors(fit(fitted), held_out)
    assert 0.03 < np.median(errors) < 0.2
    assert min(fit(fitted).ring.cores) >= 0


def test_every_size_rate_and_algorithm_stays_in_the_fit() -> None:
    fitted, held_out = split([Point(each, 1.0) for each in settings()])
    for name in ("inside", "ours", "ring"):
        kept = {point.setting.size_bytes for point in fitted if point.setting.algorithm == name}
        left = {point.setting.size_bytes for point in held_out if point.setting.algorithm == name}
        assert {min(SIZES), max(SIZES)} <= kept
        assert left - kept, "whole sizes are held out"
    assert {point.setting.bits_per_second for point in fitted if point.setting.nodes > 1} == {2e8, 4e9}


def test_the_projection_has_a_core_a_rank_and_grows_with_the_ranks() -> None:
    rows = projection(TRUE, 100 * MEBIBYTE, 8, (10, 400))
    assert [ranks for ranks, _, _ in rows[10]] == [8 * 2**power for power in range(12)]
    for points in rows.values():
        for column in (1, 2):
            assert all(one[column] < next_[column] for one, next_ in itertools.pairwise(points))
    one_node = Setting("inside", 100 * MEBIBYTE, 1, 8, 8)
    assert rows[10][0][1] == pytest.approx(TRUE.seconds(one_node))
    both = [Setting("ours", 100 * MEBIBYTE, 2, 8, 16, rate) for rate in (1e9, 400e9)]
    assert TRUE.seconds(both[0]) == pytest.approx(1.05 * 8 * 100 * MEBIBYTE / 1e9)  # each node sends its 100 MiB once
    messages = 1e-4 + 2 * 2e-5 + 1.2e-9 * 100 * MEBIBYTE / 8
    assert TRUE.seconds(both[1]) == pytest.approx(TRUE.seconds(one_node) + messages)


def test_points_are_read_back(tmp_path: Path) -> None:
    points = [Point(each, 1.5) for each in settings()]
    (tmp_path / "points.json").write_text(json.dumps([asdict(point) for point in points]))
    assert load(tmp_path / "points.json") == points


@pytest.mark.parametrize("name", ["chart.svg", "chart.png"])
def test_the_whole_program_on_saved_points(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [Point(each, TRUE.seconds(each)) for each in settings()]
    (tmp_path / "points.json").write_text(json.dumps([dataclasses.asdict(point) for point in points]))
    arguments = ["--points", str(tmp_path / "points.json"), "--chart", str(tmp_path / name), "--gbits", "10", "25"]
    monkeypatch.setattr("sys.argv", ["scaling_model.py", *arguments])
    assert scaling_model.main() == 0
    printed = capsys.readouterr().out
    assert "| 16,384 |" in printed
    assert "held out" in printed
    assert f"{8 * ROW_LENGTH} bytes a rank and step" in printed  # float64
    assert (tmp_path / name).stat().st_size > 1000
