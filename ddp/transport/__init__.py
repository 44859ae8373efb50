"""The gradient data plane: one contract (`base`), several implementations, chosen by `select`."""
