"""The task `images`: digits written as IDX files and as pictures, standardised, split and told apart; and what is refused."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from ddp.errors import LoaderError, UsageError
from ddp.job import ImagesSection, load_job
from ddp.tasks import pictures
from ddp.tasks.augmentation import RandomAffine
from ddp.tasks.idx import write_idx
from ddp.tasks.images import STATISTICS_VALUES, ImagesTask, Pictures
from ranks import RankPool
from training_runs import differences, job, losses_of, saved, train_ranks

EXAMPLES = Path(__file__).parent.parent / "examples"
BUNDLED: Any = load_digits()
IMAGES = np.repeat(np.repeat((15 * BUNDLED.images).astype(np.uint8), 2, axis=1), 3, axis=2)  # 16 high, 24 wide
LABELS = BUNDLED.target.astype(np.uint8)


def write(folder: Path, prefix: str = "", *, first: int = 0, training: int = 70, validation: int = 30) -> Path:
    """So many digits as IDX files, labels from `first` on."""
    folder.mkdir(exist_ok=True)
    rows = {"train": slice(0, training), "t10k": slice(training, training + validation)}
    for part, chosen in rows.items():
        if chosen.stop > chosen.start:
            write_idx(folder / f"{prefix}{part}-images-idx3-ubyte.gz", IMAGES[chosen])
            write_idx(folder / f"{prefix}{part}-labels-idx1-ubyte", LABELS[chosen] + first)
    return folder


def task(folder: Path, **settings: Any) -> ImagesTask:
    return ImagesTask(ImagesSection(name="images", path=str(folder), **settings))


# IDX files


def test_the_digits_come_back_standardised_by_the_training_set(tmp_path: Path) -> None:
    made = task(write(tmp_path))
    training, validation = made.datasets()
    assert (len(training), len(validation)) == (70, 30)
    mean, deviation = IMAGES[:70].astype(float).mean(), IMAGES[:70].astype(float).std()
    for dataset, first in ((training, 0), (validation, 70)):
        images, labels = dataset.collate(dataset.__getitems__([5, 0, 11]))
        expected = (IMAGES[[first + 5, first, first + 11]].astype(float) - mean) / deviation
        np.testing.assert_allclose(images[:, 0].numpy(), expected, atol=1e-5)
        assert labels.tolist() == LABELS[[first + 5, first, first + 11]].tolist()
        assert torch.equal(dataset[5][0], images[0]) and images.dtype == torch.float32
    assert made.model()(images).shape == (3, 10)


def test_letters_are_numbered_from_one_and_lie_on_their_side(tmp_path: Path) -> None:
    folder = write(tmp_path, "emnist-letters-", first=1)
    upright, _ = task(folder).datasets()
    as_they_are, _ = task(folder, transposed=False).datasets()
    images, labels = upright.__getitems__(range(70))
    assert torch.equal(images, as_they_are.__getitems__(range(70))[0].transpose(2, 3))
    assert labels.tolist() == LABELS[:70].tolist()  # from 0 on
    assert list(task(folder).images.classes) == [str(number) for number in range(1, 11)]
    turned, _ = task(write(tmp_path / "mnist"), transposed=True).datasets()
    assert turned[0][0].shape == (1, 24, 16)


def test_without_a_validation_set_a_part_is_kept_the_same_for_every_run(tmp_path: Path) -> None:
    folder = write(tmp_path, validation=0)
    torch.manual_seed(1)
    training, validation = task(folder, validation_fraction=0.25).datasets()
    torch.manual_seed(2)
    again, _ = task(folder, validation_fraction=0.25).datasets()
    assert (len(training), len(validation)) == (52, 18)
    assert np.array_equal(training.rows, again.rows)
    assert sorted([*training.rows, *validation.rows]) == list(range(70))
    assert training.labels.tolist() == LABELS[training.rows].tolist()
    assert training.__getitems__([3, 40])[1].tolist() == LABELS[training.rows[[3, 40]]].tolist()
    mean = float(training.__getitems__(range(52))[0].mean())
    assert abs(mean) < 1e-5  # of the training part alone
    with pytest.raises(UsageError, match="task.validation_fraction: it leaves none of the 70 images"):
        task(folder, validation_fraction=0.999).datasets()


def test_a_set_whose_parts_do_not_fit_is_refused(tmp_path: Path) -> None:
    write(tmp_path)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", np.full(30, 77, np.uint8))
    with pytest.raises(UsageError, match="t10k-labels-idx1-ubyte has the label 77, which no training image has"):
        task(tmp_path).datasets()
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", LABELS[:29])
    with pytest.raises(UsageError, match="t10k-images-idx3-ubyte.gz has 30 images, t10k-labels-idx1-ubyte 29 labels"):
        task(tmp_path).datasets()
    write(tmp_path)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", IMAGES[:30, :9])
    with pytest.raises(UsageError, match="images of another height or width"):
        task(tmp_path).datasets()
    alone = write(tmp_path / "alone", validation=0)
    write_idx(alone / "train-labels-idx1-ubyte", np.zeros(70, np.uint8))
    with pytest.raises(UsageError, match="one class only"):
        task(alone).datasets()
    write(alone, validation=0)
    write_idx(alone / "train-images-idx3-ubyte.gz", np.full((70, 4, 4), 9, np.uint8))
    with pytest.raises(UsageError, match="one and the same grey"):
        task(alone).model()


def test_a_folder_with_neither_says_what_it_looks_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match=f"task.path: {tmp_path} holds neither IDX files .* nor pictures"):
        task(tmp_path).model()
    with pytest.raises(UsageError, match="task.prefix: .* holds no IDX files"):
        task(tmp_path, prefix="emnist-letters").model()
    with pytest.raises(UsageError, match=f"task.path: cannot read {tmp_path / 'nowhere'}: No such file"):
        task(tmp_path / "nowhere").model()
    with pytest.raises(UsageError, match="notes.txt: Not a directory"):
        task(tmp_path / "notes.txt").model()


# Pictures


def draw(folder: Path, shades: dict[str, list[int]], suffix: str = ".png") -> None:
    """One-coloured pictures of 10x6 by class, of these shades."""
    for name, values in shades.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number, value in enumerate(values):
            Image.new("RGB", (10, 6), (value, 0, 255)).save(folder / name / f"{number}{suffix}")


def test_pictures_are_told_by_the_folders_they_lie_in(tmp_path: Path) -> None:
    draw(tmp_path / "train", {"dog": [10, 20, 30], "cat": [200, 220]})
    draw(tmp_path / "validation", {"dog": [40], "cat": []}, ".bmp")
    (tmp_path / "train" / "cat" / "notes.txt").touch()
    (tmp_path / "train" / "cat" / ".hidden.png").touch()
    (tmp_path / "train" / ".cache").mkdir()
    made = task(tmp_path, size=4)
    training, validation = made.datasets()
    assert list(made.images.classes) == ["cat", "dog"]
    images, labels = training.__getitems__(range(5))
    assert images.shape == (5, 3, 4, 4) and labels.tolist() == [0, 0, 1, 1, 1]
    shades = np.array([200, 220, 10, 20, 30])
    expected = (shades - shades.mean()) / shades.std()
    np.testing.assert_allclose(images[:, 0, 2, 1].numpy(), expected, atol=1e-5)
    assert (images[:, 1:] == 0).all()  # channels that are the same throughout stay finite
    seen, label = validation[0]
    np.testing.assert_allclose(seen[0].numpy(), (40 - shades.mean()) / shades.std(), atol=1e-5)
    assert int(label) == 1
    grey, _ = task(tmp_path, size=4, colour=False).datasets()
    assert grey[0][0].shape == (1, 4, 4)
    assert made.model()(images).shape == (5, 2)


def test_the_statistics_of_large_pictures_take_no_more_memory_than_those_of_small_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, taken = Pictures.take, []

    def noted(self: Pictures, indices: Sequence[int]) -> torch.Tensor:
        pixels = take(self, indices)
        taken.append(pixels.numel())
        return pixels

    monkeypatch.setattr(Pictures, "take", noted)
    draw(tmp_path, {"a": [1, 2, 3, 4], "b": [5, 6, 7, 8]})
    training, _ = task(tmp_path, size=700).datasets()
    assert len(training) == 7 and max(taken) <= STATISTICS_VALUES
    assert abs(float(training.__getitems__(range(7))[0][:, 0].mean())) < 1e-5


def test_classes_without_a_validation_set_are_split(tmp_path: Path) -> None:
    draw(tmp_path, {"a": list(range(8)), "b": list(range(100, 112))})
    training, validation = task(tmp_path, size=4, validation_fraction=0.2).datasets()
    assert (len(training), len(validation)) == (16, 4)


def test_a_corrupt_picture_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "train", {"a": [1, 2], "b": [3, 4]})
    bad = tmp_path / "train" / "b" / "1.png"
    training, _ = task(tmp_path, size=4, validation_fraction=0.1).datasets()
    bad.write_bytes(bad.read_bytes()[:50])
    position = [str(training.source.paths[row]) for row in training.rows].index(str(bad))  # type: ignore[attr-defined]
    with pytest.raises(LoaderError, match=f"data: {bad}: cannot read the picture: .*mend it or take it away"):
        training[position]
    with pytest.raises(UsageError, match=f"data: {bad}: cannot read"):
        task(tmp_path, size=4).datasets()
    bad.unlink()
    os.mkfifo(bad)
    with pytest.raises(UsageError, match=f"{bad}: cannot read the picture: it is not a plain file"):
        task(tmp_path, size=4).datasets()
    bad.unlink()
    bad.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 5 5\n")
    with pytest.raises(UsageError, match="cannot identify image file"):
        task(tmp_path, size=4).datasets()
    Image.new("I;16", (3, 3)).save(bad)
    with pytest.raises(UsageError, match="more than eight bits"):
        task(tmp_path, size=4).datasets()
    monkeypatch.setattr(pictures, "MOST_PIXELS", 59)
    with pytest.raises(UsageError, match="it has 10 x 6 pixels, more than 59"):
        task(tmp_path, size=4).datasets()


def test_classes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    draw(tmp_path / "train", {"a": [1, 2], "b": []})
    with pytest.raises(UsageError, match=f"task.path: {tmp_path / 'train' / 'b'} has no picture in it"):
        task(tmp_path).datasets()
    draw(tmp_path / "train", {"b": [9]})
    draw(tmp_path / "val", {"c": [1]})
    with pytest.raises(UsageError, match=f"{tmp_path / 'val' / 'c'}: .* has no class of that name"):
        task(tmp_path).datasets()
    (tmp_path / "val" / "c").rename(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=f"{tmp_path / 'val'} has no picture in its classes' folders"):
        task(tmp_path).datasets()


def test_pictures_without_pillow_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path, {"a": [1], "b": [2]})
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(UsageError, match="task images: Pillow.* `report` extra"):
        task(tmp_path).datasets()


# Augmentation


def changed(
    monkeypatch: pytest.MonkeyPatch, images: torch.Tensor, draw: tuple[float, float, float], **how: float
) -> Any:
    """By the given draws between -1 and 1 of angle, shift across and down."""
    monkeypatch.setattr(torch, "rand", lambda _, n, **__: (torch.tensor(draw)[:, None].expand(3, n) + 1) / 2)
    made = RandomAffine(**{"rotation_degrees": 0.0, "shift": 0.0, **how}).changed(images)
    monkeypatch.undo()
    return made


def test_images_are_turned_and_shifted_as_torch_itself_does(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    turned = changed(monkeypatch, images, (1.0, 0.0, 0.0), rotation_degrees=90.0)
    torch.testing.assert_close(turned, torch.rot90(images, 1, (2, 3)), atol=1e-5, rtol=0)
    wide = torch.rand(2, 1, 4, 10, dtype=torch.float64)
    half = changed(monkeypatch, wide, (-1.0, 0.0, 0.0), rotation_degrees=180.0)
    torch.testing.assert_close(half, wide.flip(2, 3), atol=1e-5, rtol=0)
    centre = torch.zeros(1, 1, 5, 9)
    centre[0, 0, 2, 6] = 1.0  # two pixels to the right of the middle: a quarter turn takes it two pixels up
    quarter = changed(monkeypatch, centre, (1.0, 0.0, 0.0), rotation_degrees=90.0)
    assert quarter[0, 0, 0, 4] == pytest.approx(1.0, abs=1e-4)
    shifted = changed(monkeypatch, wide, (0.0, 1.0, 0.0), shift=0.2)  # two pixels, and the edge repeats itself
    torch.testing.assert_close(shifted[..., :8], wide[..., 2:], atol=1e-5, rtol=0)
    torch.testing.assert_close(shifted[..., 8:], wide[..., 9:].expand(-1, -1, -1, 2), atol=1e-5, rtol=0)
    down = changed(monkeypatch, wide, (0.0, 0.0, -1.0), shift=0.25)
    torch.testing.assert_close(down[:, :, 1:], wide[:, :, :3], atol=1e-5, rtol=0)


def test_each_image_is_changed_in_its_own_way_while_training_only(tmp_path: Path) -> None:
    made = task(write(tmp_path), augment=True, shift=0.2, batch_norm=False)
    plain = task(tmp_path, batch_norm=False)
    torch.manual_seed(0)
    model = made.model()
    torch.manual_seed(0)
    other = plain.model()
    assert list(model.state_dict()) == list(other.state_dict())
    batch = made.datasets()[0].__getitems__([0] * 9)
    assert len(set(model(batch[0]).sum(dim=1).tolist())) == 9
    torch.manual_seed(4)
    losses = made.loss(model, batch)
    torch.manual_seed(4)
    assert torch.equal(made.loss(model, batch), losses)
    assert torch.equal(made.loss(model.eval(), batch), plain.loss(other.eval(), batch))


def test_a_run_on_files_that_is_resumed_is_the_same_run(rank_pool: RankPool, tmp_path: Path) -> None:
    """With augmentation, smoothing and dropout, whose draws go on where they were."""
    settings = {
        "task__name": "images",
        "task__path": str(write(tmp_path / "files")),
        "task__channels": 2,
        "task__units": 5,
        "task__augment": True,
        "task__dropout": 0.2,
        "task__label_smoothing": 0.1,
        "batch__global_batch_size": 21,
        "batch__micro_batch_size": 6,
        "transport__name": "shared_memory",
    }
    train_ranks(rank_pool, 2, job(tmp_path / "whole", run__steps=9, **settings))
    for steps in (4, 9):
        (ended, _) = train_ranks(rank_pool, 2, job(tmp_path, run__steps=steps, **settings), resume="auto")
        assert ended.kind == "", ended.message
    whole, parts = (saved(folder / "run", 9, 2) for folder in (tmp_path / "whole", tmp_path))
    assert differences(whole, parts) == []


def test_the_example_reads_the_files_that_the_script_beside_it_writes(
    rank_pool: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    importlib.import_module("digits_as_idx").main(tmp_path / "files")
    settings = [f"task.path={tmp_path / 'files'}", f"run.directory={tmp_path}", "run.epochs=2", "run.id=run"]
    example = load_job(EXAMPLES / "images.toml", [*settings, "metrics.enabled=false"])
    (ended, _) = train_ranks(rank_pool, 2, example)
    assert ended.kind == "", ended.message
    assert "325 examples" in ended.printed
    losses = losses_of(tmp_path / "run")
    assert len(losses) == 46 and np.mean(losses[-8:]) < 0.6 * losses[0]


def test_a_missing_folder_ends_all_ranks_alike(rank_pool: RankPool, tmp_path: Path) -> None:
    ended = train_ranks(rank_pool, 2, job(tmp_path, task__name="images", task__path=str(tmp_path / "none")))
    assert [each.kind for each in ended] == ["UsageError"] * 2
    assert "task.path: cannot read" in ended[1].message and not (tmp_path / "run").exists()


def test_a_layer_that_draws_anew_makes_the_set_without_an_end() -> None:
    from ddp.training.measuring import population

    assert population(nn.Sequential(RandomAffine(5.0, 0.0), nn.Linear(1, 1)), 61) == float("inf")
