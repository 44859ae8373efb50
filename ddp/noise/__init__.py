"""Gradient noise scale: numbers in, numbers out. Nothing here imports torch.

moments.py       squared norms of one step -> unbiased |G|^2 and tr(Sigma), one observation
interval.py      confidence interval of a ratio of two means
noise_scale.py   observations -> the running noise scale, its interval and its state
efficiency.py    what a batch size costs at a noise scale: steps, examples, the fastest batch
advice.py        a reading -> what it would mean for the batch, in one sentence
"""
