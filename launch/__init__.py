"""Starts a job's ranks: `render` makes the command, `submit` runs it.

Of `ddp` it imports the job file, the errors and the outcome only: it answers a bad job in a fraction of a second.
"""
