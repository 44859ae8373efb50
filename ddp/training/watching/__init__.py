"""Looks at the layers of a watched step, on all ranks alike.

    watch.py        the observer: before the forward, before and after the update; one all-reduce a look
    outputs.py      what layers put out, by forward hooks that are there in that step only
    weights.py      how far the update moves the weights, and the gradient that moved them
    counts.py       values into the histogram's fixed bins
    first_layer.py  the first layer's weights as images

What is made of it, and which steps are watched, is `ddp.watching`, without torch.
"""

from ddp.training.watching.watch import LayerWatch

__all__ = ["LayerWatch"]
