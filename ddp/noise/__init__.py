"""Gradient noise scale: numbers in, numbers out. Nothing here imports torch."""
