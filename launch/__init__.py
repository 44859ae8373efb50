"""Starts a job's ranks: `render` makes the command, `submit` runs it. Imports `ddp.job` and `ddp.errors` only."""
