"""Gradient noise scale: numbers in, numbers out. Nothing here imports torch.

From gradients to readings

    moments.py         squared norms of one step -> unbiased |G|^2 and tr(Sigma), one observation
    interval.py        confidence interval of a ratio of two means
    noise_scale.py     observations -> the running noise scale, its interval and its state
    readings.py        what is known of a run's noise scales after some step
    tracker.py         the windows of a run: the whole model and its parts, plain and preconditioned
    sampling.py        which steps are looked at more closely
    shards.py          are the ranks' shards what the noise scale assumes?
    fixed_order.py     the same for sorted data that ranks take in turn

What follows from a reading

    efficiency.py      what a batch size costs at a noise scale: steps, examples, the fastest batch
    learning_rate.py   the rate at another batch size
    advice.py          what it would mean for the batch, in one sentence

From runs to critical batch sizes

    best_rate.py       steps at each batch size's best learning rate, and the bootstrap over seeds
    hyperbola.py       S = S_min + E_min/B fitted to them
    critical_batch.py  B_crit with its interval, or why there is none
    harmless_batch.py  the largest batch that does no harm
    estimate.py        a value and the interval around it
"""
