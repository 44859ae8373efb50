"""Counts in logarithmic bins with a sign, at fixed edges: what ranks count can be added up as it is.

A float32's bits are its sign, its exponent and its mantissa: the leading ones, taken as a whole number, say which octave
(or half or quarter of one) it lies in. So a value is put into its bin by a shift, and edges are exact: 2^e with one bin an
octave, 2^e times 1 and 1.5 with two, times 1, 1.25, 1.5 and 1.75 with four.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SMALLEST_EXPONENT, LARGEST_EXPONENT = -40, 16  # edges go from 2^-40 (9e-13) to 2^16
SIGNS = 2
MANTISSA_BITS, EXPONENTS, BIAS = 23, 256, 127


@dataclass(frozen=True, slots=True)
class Histogram:
    """How often values fell into each bin.

    Attributes:
        bins_per_octave: 1, 2 or 4.
        counts: shape (bins,); from the most negative bin over the one around zero, |x| < 2^-40, to the largest.
            The outermost two hold all that lies beyond.
        not_finite: infinities and NaN, in no bin.
    """

    bins_per_octave: int
    counts: tuple[int, ...]
    not_finite: int = 0

    @property
    def total(self) -> int:
        """All finite values."""
        return sum(self.counts)

    @property
    def near_zero(self) -> int:
        """Values with |x| < 2^-40, zero among them."""
        return self.counts[len(self.counts) // 2]


def bins(bins_per_octave: int) -> int:
    """How many bins there are."""
    return SIGNS * magnitudes(bins_per_octave) + 1


def magnitudes(bins_per_octave: int) -> int:
    """Bins of one sign."""
    return (LARGEST_EXPONENT - SMALLEST_EXPONENT) * bins_per_octave


def edges(bins_per_octave: int) -> NDArray[np.float64]:
    """The bins' edges in rising order, shape (bins + 1,): a positive bin is [low, high), a negative one (low, high]."""
    octaves = 2.0 ** np.arange(SMALLEST_EXPONENT, LARGEST_EXPONENT)
    fractions = 1 + np.arange(bins_per_octave) / bins_per_octave
    positive = np.append((octaves[:, None] * fractions).ravel(), 2.0**LARGEST_EXPONENT)
    return np.concatenate([-positive[::-1], positive])


def shift(bins_per_octave: int) -> int:
    """Bits of a float32 to leave out, so that the rest is its `code`: `bits >> shift & (codes - 1)`."""
    return MANTISSA_BITS - (bins_per_octave.bit_length() - 1)


def codes(bins_per_octave: int) -> int:
    """How many codes there are: a sign, an exponent, the leading bits of the mantissa."""
    return SIGNS * EXPONENTS * bins_per_octave


def bin_of_code(bins_per_octave: int) -> NDArray[np.int64]:
    """The bin of each code, shape (codes,); the number of bins stands for what is not finite."""
    count, half = bins(bins_per_octave), magnitudes(bins_per_octave)
    magnitude = np.arange(EXPONENTS * bins_per_octave)
    exponent = magnitude // bins_per_octave - BIAS
    place = magnitude - (SMALLEST_EXPONENT + BIAS) * bins_per_octave  # from the smallest edge
    offset = np.where(exponent < SMALLEST_EXPONENT, 0, np.minimum(place + 1, half))
    finite = exponent < EXPONENTS - 1 - BIAS
    positive, negative = np.where(finite, half + offset, count), np.where(finite, half - offset, count)
    return np.concatenate([positive, negative]).astype(np.int64)
