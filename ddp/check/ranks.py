"""Do the ranks train one model on different data? What each has fetched is compared by hashes, the weights by checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddp.check.observing import tensors_in
from ddp.check.subject import Subject
from ddp.check.verdicts import Verdict
from ddp.tasks.base import Batch
from ddp.training.agreement import gather_texts
from ddp.training.replicas import checksum, verdict

WEIGHTS, DATA, DATA_SET = "same weights on all ranks", "different data on each rank", "one data set on all ranks"
COMPARED = 16  # examples of the data set itself
REPEATED = 0.5  # share of a rank's examples that may be copies of each other, for anything to be told
COPIED = 0.5  # share of a rank's examples that another has too, that is a failure
SAME = 1.0  # the same where ranks draw with replacement, so that both may come upon the few examples of a rare class
ALONE = "there is one rank"


@dataclass(frozen=True, slots=True)
class Trained:
    """What the first steps of training have told of one rank.

    Attributes:
        fetched: the step and a hash of each example that this rank trained on, as it was fetched.
        same_gradients: pairs of ranks whose own gradients had the same norm in every step.
        fault: why training ended early; "" where it did not.
    """

    steps: int
    fetched: tuple[str, ...] = ()
    same_gradients: tuple[tuple[int, int], ...] = ()
    fault: str = ""


def check_weights(subject: Subject) -> Verdict:
    """Checksums of the fresh parameters and of those after the first steps. Collective."""
    if subject.world_size == 1:
        return Verdict(WEIGHTS, "skipped", ALONE)
    for model, when in ((subject.initial, "before the first step"), (subject.model, "after the first steps")):
        suspects = verdict([int(each) for each in gather_texts(str(checksum(model.parameters())))])
        if suspects is not None:
            found = f"{suspects.in_words()} {when}"
            return Verdict(WEIGHTS, "failed", found, _ADVICE_WEIGHTS, {"ranks": list(suspects.ranks)})
    return Verdict(WEIGHTS, "ok", f"equal bit for bit on {subject.world_size} ranks, at the start and after training")


_ADVICE_WEIGHTS = "look for weights that are changed outside the optimizer, by what is random or rank-dependent; test the machine's memory"


def check_data(subject: Subject, trained: Trained) -> Verdict:
    """Whether two ranks trained on the same examples. Collective."""
    if subject.world_size == 1:
        return Verdict(DATA, "skipped", ALONE)
    indices = subject.examples(max(min(COMPARED, subject.size // subject.world_size), 1))
    ranks = [each.split() for each in gather_texts(" ".join(trained.fetched))]
    unaugmented = [each.split() for each in gather_texts(" ".join(hashes(subject, indices)))]
    limit = COPIED if subject.job.sampling.name == "uniform" else SAME
    for seen, how, most in ((ranks, "in training", limit), (unaugmented, "before augmentation", COPIED)):
        if (pair := most_shared(seen)) is not None and pair[2] >= most:
            found = f"ranks {pair[0]} and {pair[1]} have {pair[2]:.0%} of their examples in common, {how}"
            return Verdict(DATA, "failed", found, _ADVICE_DATA, {"ranks": pair[:2], "share": pair[2]})
    if trained.same_gradients:
        first, second = trained.same_gradients[0]
        found = f"ranks {first} and {second} had gradients of the same norm in each of {trained.steps} steps"
        return Verdict(DATA, "failed", found, _ADVICE_DATA, {"ranks": [first, second]})
    shared = most_shared(ranks)
    if shared is None:
        return Verdict(DATA, "skipped", "the examples are copies of each other: whose they are cannot be told")
    count = sum(map(len, ranks))
    return Verdict(
        DATA, "ok", f"{count} examples fetched in {trained.steps} steps, {shared[2]:.0%} of them by two ranks"
    )


_ADVICE_DATA = (
    "each rank has to draw its own examples: let the data set answer [i] with example i, whatever the rank, and leave it to the "
    "trainer to deal them out"
)


def check_data_set(subject: Subject) -> Verdict:
    """Whether example i is the same on all ranks. Collective."""
    if subject.world_size == 1:
        return Verdict(DATA_SET, "skipped", ALONE)
    indices = list(range(0, subject.size, -(-subject.size // COMPARED)))
    sizes = gather_texts(str(subject.size))
    if len(set(sizes)) > 1:
        return Verdict(
            DATA_SET, "failed", f"{', '.join(sizes)} examples on the ranks, in their order", _ADVICE_DATA_SET
        )
    ranks = gather_texts(" ".join(hashes(subject, indices)))
    others = [rank for rank, text in enumerate(ranks) if text != ranks[0]]
    if others:
        found = f"with all generators seeded alike, the same indices give rank {others[0]} other examples than rank 0"
        return Verdict(DATA_SET, "warning", found, _ADVICE_DATA_SET, {"ranks": others})
    return Verdict(DATA_SET, "ok", f"{len(indices)} of {subject.size} examples compared on {subject.world_size} ranks")


_ADVICE_DATA_SET = (
    "make the same data set on every rank, with a seed of its own: the trainer deals its indices out, and of a data set that "
    "is different on each rank only a part would be seen in an epoch"
)


def most_shared(ranks: Sequence[Sequence[str]]) -> tuple[int, int, float] | None:
    """The two ranks with most examples in common and the share of the smaller's that is; None where nothing can be told.

    Where examples repeat themselves within a rank, others have them too without a fault.
    """
    sets = [set(each) for each in ranks]
    if any(len(each) <= REPEATED * len(whole) or not whole for each, whole in zip(sets, ranks, strict=True)):
        return None
    pairs = [(first, second) for second in range(len(sets)) for first in range(second)]
    shares = [(len(sets[a] & sets[b]) / min(len(sets[a]), len(sets[b])), a, b) for a, b in pairs]
    share, first, second = max(shares, key=lambda each: each[0])
    return first, second, share


def hashes(subject: Subject, indices: Iterable[int]) -> list[str]:
    """Of each of these training examples by itself, without augmentation, whatever it draws seeded alike."""
    return [example_hashes(subject.fetch([index]), 1)[0] for index in indices]


def example_hashes(batch: Batch, examples: int) -> list[str]:
    """One hash for each example of a batch, from the tensors that have a row for it."""
    tensors = [each for each in tensors_in(batch) if each.dim() and len(each) == examples]
    return [_hash([tensor[row] for tensor in tensors]) for row in range(examples)]


def equal_norms(history: Sequence[Sequence[float]]) -> tuple[tuple[int, int], ...]:
    """Pairs of ranks whose numbers are the same in every step; `history` has a sequence over the ranks for each step."""
    if not history or len(history[0]) < 2:
        return ()
    ranks = range(len(history[0]))
    alike = [(a, b) for b in ranks for a in range(b) if all(_close(step[a], step[b]) for step in history)]
    return tuple(alike)


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-5 * max(abs(one), abs(other)) and one > 0


def _hash(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{plain.dtype} {tuple(tensor.shape)}".encode())
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]
