"""`ddp check`: what can be found wrong with a job before its long run. The job's model and data stay as they are."""
