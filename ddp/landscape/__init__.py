"""The loss around trained weights: `ddp landscape` evaluates a two-dimensional slice across ranks, and draws it.

`directions` are filter-normalised, `surface` evaluates points dealt out over the ranks, `curvature` is the largest
eigenvalue of the Hessian. Networks come from `ddp.trained`.
"""
