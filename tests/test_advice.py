"""The sentences: their arithmetic against the model itself, and what each state does and does not say."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from ddp.noise.advice import advise
from ddp.noise.noise_scale import Reading

RESOLVED = Reading("resolved", 71.0, 56.0, 92.0, 1.0, 71.0, 300, 100, 0.0, False)
NOTHING = replace(
    RESOLVED, noise_scale=math.nan, low=math.nan, high=math.nan, state="unresolved", steps_needed=math.nan
)
READINGS = {
    "unmeasured": replace(NOTHING, observations=0, window=0),
    "early": replace(NOTHING, observations=12, window=12),
    "unresolved": replace(NOTHING, steps_needed=140.0),
    "hopeless": replace(NOTHING, steps_needed=math.inf),
    "beyond_data": replace(RESOLVED, state="beyond_data", noise_scale=5000.0, low=2100.0, high=math.inf),
    "lower_bound": replace(
        RESOLVED, state="lower_bound", noise_scale=math.inf, low=320.0, high=math.inf, steps_needed=77.0
    ),
    "wide": replace(RESOLVED, state="wide", low=40.0, high=300.0, steps_needed=20.0),
    "resolved": RESOLVED,
    "drifting": replace(RESOLVED, drifting=True),
    "noiseless": replace(RESOLVED, noise_scale=0.0, low=0.0, high=0.0),
}


def test_a_resolved_reading_in_full() -> None:
    assert advise(RESOLVED, 64) == (
        "At 64 examples a step the noise scale is 71 (56-92). If the model holds here, doubling the batch would take "
        "23-29 % fewer steps and 41-53 % more examples."
    )


@pytest.mark.parametrize(
    ("batch", "low", "high"), [(64, 56.0, 92.0), (1, 30.0, 31.0), (1000, 7.0, 21.0), (37, 900.0, 3000.0)]
)
def test_ranges_come_from_the_two_curves(batch: int, low: float, high: float) -> None:
    """S = S_min (1 + B/b) and E = E_min (1 + b/B), at b and at 2b, at both ends of the interval."""
    fewer = [1 - (1 + end / (2 * batch)) / (1 + end / batch) for end in (low, high)]
    more = [(1 + 2 * batch / end) / (1 + batch / end) - 1 for end in (high, low)]
    sentence = advise(replace(RESOLVED, low=low, high=high), batch)
    for words, ends in (("fewer steps", fewer), ("more examples", more)):
        said = re.search(rf"([\d-]+) % {words}", sentence)
        assert said is not None
        numbers = [int(number) for number in said[1].split("-")]
        assert [numbers[0], numbers[-1]] == [round(100 * end) for end in ends]


def test_a_lower_bound_bounds_both_shares() -> None:
    sentence = advise(READINGS["lower_bound"], 64)
    assert "at least 320" in sentence
    assert "at least 42 % fewer steps and at most 17 % more examples" in sentence  # (1 + 2.5)/(1 + 5), 1/(1 + 5)
    assert "About 77 more observations" in sentence


def test_the_other_states_give_no_advice() -> None:
    for name in ("unmeasured", "early", "unresolved", "hopeless", "beyond_data", "wide"):
        assert "doubling" not in advise(READINGS[name], 64)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unmeasured", "at least two ranks or micro-batches"),
        ("early", "12 of 25 observations"),
        ("unresolved", "About 140 more observations"),
        ("hopeless", "more ranks or micro-batches"),
        ("beyond_data", "The gradient is mostly noise: the training set is nearly fitted. A larger batch is not what"),
        ("wide", "between 40 and 300"),
        ("drifting", "71 (56-92), the mean of 100 observations over which it moved"),
        ("noiseless", "0 % fewer steps and 100 % more examples"),
    ],
)
def test_each_state_in_words(name: str, words: str) -> None:
    assert words in advise(READINGS[name], 64)


@pytest.mark.parametrize("name", READINGS)
def test_every_sentence_is_one_a_reader_can_have(name: str) -> None:
    for sentence in (advise(READINGS[name], 64), advise(READINGS[name], 1, when="epoch 3.0")):
        assert "critical" not in sentence
        assert "nan" not in sentence
        assert not re.search(r"\binf\b", sentence)
        assert sentence[0].isupper()
        assert sentence.endswith((".", ".)"))


def test_the_moment_is_named() -> None:
    assert advise(RESOLVED, 64, when="epoch 3.0").startswith(
        "At epoch 3.0, with 64 examples a step, the noise scale is"
    )


def test_small_and_large_noise_scales_are_readable() -> None:
    assert " 2.3 (2-3.1)" in advise(replace(RESOLVED, noise_scale=2.34, low=2.0, high=3.06), 64)
    assert " 12,346 (9,876-20,000)" in advise(replace(RESOLVED, noise_scale=12345.6, low=9876.0, high=2e4), 64)


def test_metric_and_method_are_named() -> None:
    said = advise(RESOLVED, 64, metric="preconditioned", method="micro_batches")
    assert said.startswith("At 64 examples a step the noise scale in Adam's metric is 71 (56-92, from micro-batches).")
    assert "(56-92, from halves of batches)" in advise(RESOLVED, 64, method="split")
    for name in ("beyond_data", "lower_bound", "wide", "unresolved", "early"):
        assert "the noise scale in Adam's metric is" in advise(READINGS[name], 64, metric="preconditioned")
