"""Questions about a run and the machine it ran on: what would more ranks bring, what fits into memory."""
