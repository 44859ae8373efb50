"""From gradients to readings: what a step's units add up to, which gradients count, and `ddp.attach`."""
