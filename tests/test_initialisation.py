"""Weights drawn by torch's own functions, taken from files good and bad, and frozen."""

from __future__ import annotations

import copy
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import init

from ddp.errors import UsageError
from ddp.job import InitialisationSection
from ddp.training.initialisation import freeze_, initialise_, load_weights_

DRAWN: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "xavier_uniform": lambda weight, g: init.xavier_uniform_(weight, gain=5 / 3, generator=g),
    "xavier_normal": lambda weight, g: init.xavier_normal_(weight, gain=5 / 3, generator=g),
    "kaiming_uniform": lambda weight, g: init.kaiming_uniform_(weight, nonlinearity="tanh", generator=g),
    "kaiming_normal": lambda weight, g: init.kaiming_normal_(weight, nonlinearity="tanh", generator=g),
    "orthogonal": lambda weight, g: init.orthogonal_(weight, gain=5 / 3, generator=g),
}


class Network(nn.Module):
    """A backbone with batch normalisation, and a head of so many outputs."""

    def __init__(self, outputs: int = 4) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Tanh(), nn.ConvTranspose2d(5, 3, 2))
        self.head = nn.Linear(3, outputs)

    @property
    def convolution(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self.features[0])

    @property
    def norm(self) -> nn.BatchNorm2d:
        return cast(nn.BatchNorm2d, self.features[1])

    @property
    def up(self) -> nn.ConvTranspose2d:
        return cast(nn.ConvTranspose2d, self.features[3])

    @property
    def running_mean(self) -> Tensor:
        assert self.norm.running_mean is not None
        return self.norm.running_mean


def section(**settings: Any) -> InitialisationSection:
    return InitialisationSection.model_validate(settings)


@pytest.mark.parametrize("name", DRAWN)
def test_weights_are_torchs_for_the_same_seed(name: str) -> None:
    model, norm = Network(), torch.arange(5.0)
    model.norm.weight.data.copy_(norm)
    global_state = torch.get_rng_state()
    initialise_(model, section(weights=name, activation="tanh"), seed=11)
    assert torch.equal(global_state, torch.get_rng_state())  # what the run draws is the same for every initialisation
    generator = torch.Generator().manual_seed(11)
    for layer in (model.convolution, model.up, model.head):
        assert torch.equal(layer.weight, DRAWN[name](torch.empty_like(layer.weight), generator))
        assert layer.bias is not None and not layer.bias.any()
    assert torch.equal(model.norm.weight, norm)


def test_biases_may_stay_and_shared_weights_are_drawn_once() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.Sequential(first, second)
    second.weight = first.weight
    biases = [first.bias.clone(), second.bias.clone()]
    initialise_(model, section(weights="xavier_normal", biases="leave", activation="linear"), seed=3)
    expected = init.xavier_normal_(torch.empty(4, 4), generator=torch.Generator().manual_seed(3))
    assert torch.equal(second.weight, expected) and all(map(torch.equal, biases, [first.bias, second.bias]))
    with pytest.raises(UsageError, match="no linear or convolution layer"):
        initialise_(nn.Sequential(nn.Embedding(3, 2)), section(weights="orthogonal"), seed=0)


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    path.chmod(0o600)
    return path


def test_a_whole_model_or_a_backbone_comes_from_a_file_of_anybody(tmp_path: Path) -> None:
    source, model = Network(), Network()
    source.running_mean.fill_(0.25)
    whole = write(tmp_path / "whole.safetensors", source.state_dict())
    assert load_weights_(model, section(file=str(whole))) == 11
    assert all(map(torch.equal, model.state_dict().values(), source.state_dict().values()))
    other = Network(7)
    head = other.head.weight.clone()
    for choice in ({"only": ["features.*"]}, {"skip": ["head.*"]}):
        other.features.load_state_dict(Network().features.state_dict())
        assert load_weights_(other, section(file=str(whole), **choice)) == 9
        assert all(map(torch.equal, other.features.state_dict().values(), source.features.state_dict().values()))
        assert torch.equal(other.head.weight, head)
    narrow = {name: each.bfloat16() if each.is_floating_point() else each for name, each in source.state_dict().items()}
    load_weights_(model, section(file=str(write(tmp_path / "narrow.safetensors", narrow))))
    assert torch.equal(model.head.weight, source.head.weight.bfloat16().float())


def test_of_tied_weights_one_name_in_the_file_is_enough(tmp_path: Path) -> None:
    embedding, layer = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
    layer.weight, model = embedding.weight, nn.Sequential(embedding, layer)
    weight = torch.randn(4, 3)
    load_weights_(model, section(file=str(write(tmp_path / "tied.safetensors", {"0.weight": weight}))))
    assert torch.equal(layer.weight, weight)


def test_all_that_does_not_fit_is_in_one_message_and_nothing_is_taken(tmp_path: Path) -> None:
    model = Network()
    before = copy.deepcopy(model.state_dict())
    tensors = {**model.state_dict(), "head.weight": torch.zeros(7, 3), "neck.weight": torch.zeros(2)}
    del tensors["features.3.bias"]
    path = write(tmp_path / "other.safetensors", tensors)
    with pytest.raises(UsageError) as caught:
        load_weights_(model, section(file=str(path)))
    message = str(caught.value)
    for words in (
        "missing: features.3.bias",
        "unexpected: neck.weight",
        "another shape: head.weight (7, 3), here (4, 3)",
    ):
        assert words in message
    assert "initialisation.skip" in message and "\n" not in message
    broken = {**model.state_dict(), "head.bias": torch.tensor([0.0, torch.nan, 0.0, 0.0])}
    path = write(tmp_path / "broken.safetensors", broken)
    with pytest.raises(UsageError, match="not finite.*head.bias"):
        load_weights_(model, section(file=str(path)))
    counts = {**model.state_dict(), "head.bias": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(UsageError, match="of another kind"):
        load_weights_(model, section(file=str(write(tmp_path / "counts.safetensors", counts))))
    for key, pattern, hint in (
        ("only", "feature.*", r"did you mean features.\*"),
        ("skip", "haed.*", r"did you mean head.\*"),
    ):
        with pytest.raises(UsageError, match=f"initialisation.{key}: .*{hint}"):
            load_weights_(model, section(file=str(path), **{key: [pattern]}))
    with pytest.raises(UsageError, match="leave nothing"):
        load_weights_(model, section(file=str(path), only=["head.*"], skip=["head.*"]))
    assert all(map(torch.equal, before.values(), model.state_dict().values()))


def test_a_file_that_is_not_to_be_trusted_is_refused(tmp_path: Path) -> None:
    model = Network()
    good = write(tmp_path / "good.safetensors", model.state_dict())
    content = good.read_bytes()
    bad = {
        "missing": None,
        "empty": b"",
        "pickle": b"\x80\x04K\x01.",
        "short": content[:-1],
        "no table": struct.pack("<Q", 2) + b"[]",
        "huge header": struct.pack("<Q", 1 << 62) + b"{}",
        "deep": struct.pack("<Q", 200_000) + b"[" * 200_000,
        "gap": content + b"\0",
        "texts that are none": struct.pack("<Q", 18) + b'{"__metadata__":5}',
    }
    for name, text in bad.items():
        path = tmp_path / name
        if text is not None:
            path.write_bytes(text)
            path.chmod(0o600)
        with pytest.raises(UsageError, match=r"^initialisation\.file: "):
            load_weights_(model, section(file=str(path)))
    (tmp_path / "link").symlink_to(good)
    with pytest.raises(UsageError, match="is a link"):
        load_weights_(model, section(file=str(tmp_path / "link")))
    good.chmod(0o666)
    with pytest.raises(UsageError, match="every user may write"):
        load_weights_(model, section(file=str(good)))
    with pytest.raises(UsageError, match="Is a directory"):
        load_weights_(model, section(file=str(tmp_path)))


def test_frozen_normalisation_stays_in_evaluation_mode_whoever_calls_train() -> None:
    model = Network().double()
    freeze_(model, ["features.*"])
    assert [name for name, each in model.named_parameters() if each.requires_grad] == ["head.weight", "head.bias"]
    for each in (model, copy.deepcopy(model)):
        before = each.running_mean.clone()
        each.train()
        inputs = torch.randn(3, 2, 6, 6, dtype=torch.float64, requires_grad=True)
        out = each.features(inputs)
        assert not each.norm.training and torch.equal(each.running_mean, before)
        assert each.norm.num_batches_tracked == 0
        alone = each.features(inputs[:1])  # does not depend on the others of the batch
        torch.testing.assert_close(out[:1], alone)
        assert each.features[2].training
    freeze_(model, ["features.*"])
    assert len(model.norm._forward_pre_hooks) == 1


def test_a_layer_that_is_frozen_in_part_goes_on_normalising_by_its_batch() -> None:
    model = Network()
    freeze_(model, ["features.1.weight"])
    assert model.norm.training and not model.norm.weight.requires_grad
    bare = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False))
    freeze_(bare, ["0.*"])
    assert bare[1].training
    freeze_(bare, ["*"])
    assert not bare[1].training
    with pytest.raises(
        UsageError, match=r"initialisation.freeze: 'features.9.\*' names nothing.*did you mean features"
    ):
        freeze_(model, ["features.9.*"])
