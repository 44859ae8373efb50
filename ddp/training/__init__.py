"""The parts of a training run, and `trainer`, where the step reads down."""
