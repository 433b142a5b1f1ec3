"""firststage: the diffusion stage. Importing this package imports no torch."""

__all__ = ["command"]
