"""Several networks as one: `ddp ensemble` evaluates members and ensemble across ranks, averages weights, and distils.

`combining` is the mean of predictions, `joint` evaluates all in one pass, `soup` averages weights, `distillation` is the
task that a student is trained on. Members come from `ddp.trained`.
"""
