"""What a run's bits and figures depend on besides its configuration."""

import platform
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Versions of what weights and figures depend on, bit by bit."""
    named = {"python": platform.python_version()}
    for package in ("firststage", "torch", "diffusers", "pytorch-msssim", "numpy", "pillow"):
        try:
            named[package] = version(package)
        except PackageNotFoundError:
            named[package] = "not installed"
    return named
