"""Steps against batch size: the curve S = S_min (1 + (B_crit/B)^alpha), fitted to many sets of points at once.

With alpha = 1 it is McCandlish's hyperbola (arXiv:1812.06162, equation 2.11), log S = log(S_min + E_min/B) with
E_min = S_min B_crit; the free exponent is there to check it. Least squares in logarithms, since runs differ
by factors, made robust by Huber's weights: one batch size that is off does not carry the fit away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

HUBER = 1.345  # standard errors beyond which a point counts less: 95 % efficient on normal residuals
BEYOND_GRID = math.log(64)  # how far outside the batch sizes B_crit is looked for
STARTS = 81
ITERATIONS = 40
EXPONENTS = (0.2, 5.0)  # what a free exponent may be


@dataclass(frozen=True, slots=True)
class CurveFit:
    """Fitted curves, one for each set of points; arrays of shape (...).

    Attributes:
        log_smallest_steps: log S_min.
        log_critical_batch_size: log B_crit; on the edge of what was searched where the points show no bend.
        exponent: alpha; ones where it was not free.
        residuals: log S - fit, shape (..., batch sizes).
    """

    log_smallest_steps: Array
    log_critical_batch_size: Array
    exponent: Array
    residuals: Array


def fit_curve(log_batch_sizes: Array, log_steps: Array, *, free_exponent: bool = False) -> CurveFit:
    """Fit each row of points.

    Args:
        log_batch_sizes: shape (n,), finite, n >= 3 (4 with a free exponent).
        log_steps: shape (..., n), finite.
        free_exponent: whether alpha is fitted too.
    """
    rows = log_steps.reshape(-1, log_steps.shape[-1])
    parameters = _start(log_batch_sizes, rows)
    for _ in range(ITERATIONS):
        parameters, moved = _gauss_newton(log_batch_sizes, rows, parameters, free_exponent)
        if moved < 1e-10:
            break
    residuals = rows - _curve(log_batch_sizes, parameters)
    shape = log_steps.shape[:-1]
    u, v, alpha = (column.reshape(shape) for column in parameters.T)
    return CurveFit(u, v, alpha, residuals.reshape(log_steps.shape))


def log_curve(log_batch_sizes: Array, log_smallest: float, log_critical: float, exponent: float = 1.0) -> Array:
    """log S at these batch sizes, shape (n,)."""
    return _curve(log_batch_sizes, np.array([[log_smallest, log_critical, exponent]]))[0]


def _curve(x: Array, parameters: Array) -> Array:
    """(n,), (m, 3) -> (m, n)."""
    u, v, alpha = (column[:, None] for column in parameters.T)
    return u + np.logaddexp(0.0, alpha * (v - x))


def _start(x: Array, y: Array) -> Array:
    """The best of a grid of B_crit with alpha = 1; log S_min is then a mean. The sum of squares has several valleys."""
    grid = np.linspace(float(x.min()) - BEYOND_GRID, float(x.max()) + BEYOND_GRID, STARTS, dtype=np.float64)
    bend = np.logaddexp(0.0, grid[:, None] - x)
    # (a - b)^2 summed over the points, without an array of rows x grid x points
    bend_0, y_0 = bend - bend.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    squares = (bend_0**2).sum(1) - 2 * y_0 @ bend_0.T
    best = squares.argmin(axis=1)
    return np.stack([(y - bend[best]).mean(1), grid[best], np.ones(len(y))], axis=1)


def _gauss_newton(x: Array, y: Array, parameters: Array, free_exponent: bool) -> tuple[Array, float]:
    """One reweighted step on all rows; the new parameters and the largest change."""
    residuals = y - _curve(x, parameters)
    weights = _huber_weights(residuals, 3 if free_exponent else 2)
    slope = _sigmoid(parameters[:, 2:] * (parameters[:, 1:2] - x))
    columns = [np.ones_like(slope), parameters[:, 2:] * slope]
    if free_exponent:
        columns.append((parameters[:, 1:2] - x) * slope)
    design = np.stack(columns, axis=-1)
    normal: Array = np.einsum("mn,mni,mnj->mij", weights, design, design)
    normal += 1e-9 * np.eye(normal.shape[-1])  # a curve without a bend says nothing of where it would be
    right: Array = np.einsum("mn,mni,mn->mi", weights, design, residuals)
    step = np.linalg.solve(normal, right[..., None])[..., 0].astype(np.float64)
    moved = parameters.copy()
    moved[:, : step.shape[1]] += np.clip(step, -0.5, 0.5)
    moved[:, 1] = np.clip(moved[:, 1], x.min() - BEYOND_GRID, x.max() + BEYOND_GRID)
    moved[:, 2] = np.clip(moved[:, 2], *EXPONENTS)
    return moved, float(np.abs(moved - parameters).max(initial=0.0))


def _huber_weights(residuals: Array, fitted: int) -> Array:
    """1 within HUBER robust standard errors, falling as 1/|residual| beyond; shape as `residuals`."""
    n = residuals.shape[1]
    size = np.abs(residuals)
    scale = 1.4826 * np.median(size, axis=1, keepdims=True) * math.sqrt(n / max(n - fitted, 1))
    return np.minimum(1.0, HUBER * np.maximum(scale, 1e-12) / np.maximum(size, 1e-12))


def _sigmoid(z: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -z))
