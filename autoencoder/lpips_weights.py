"""What LPIPS needs: its backbone's weights, the least side of an image, and which channels it sees. Torch-free, so that what is missing is
found before torch is imported."""

import os
from pathlib import Path

from autoencoder.runtime.errors import ConfigError, require

TORCHVISION = {
    "vgg": ("vgg16", "vgg16-397923af.pth"),
    "alex": ("alexnet", "alexnet-owt-7be5be79.pth"),
    "squeeze": ("squeezenet1_1", "squeezenet1_1-b8a52dc0.pth"),
}
"""torchvision's model behind each LPIPS network, and the name of its ImageNet weights in torchvision's cache."""
SMALLEST = {"vgg": 16, "alex": 31, "squeeze": 17}
"""Least side of an image that leaves every layer of each network a feature, in pixels."""


def check_side(net: str, side: int, *, key: str) -> None:
    """Refuse crops on which `net` has no features; the message names `key`, the side in pixels."""
    require(side >= SMALLEST[net], key, side, f"LPIPS with {net} needs at least {SMALLEST[net]} pixels")


def backbone_bands(bands: tuple[int, ...] | None, channels: int, *, key: str = "objective.perceptual.bands") -> tuple[int, ...]:
    """Indices of the image channels that LPIPS sees, one (as grey) or three (as RGB).

    Without `bands`: the one of grey images, the three of RGB, the first three of four (RGBA, or RGB and near infrared).

    Raises:
        ConfigError: channels for which there is no such rule, or bands that are not there; the message names `key`.
    """
    known = {1: (0,), 3: (0, 1, 2), 4: (0, 1, 2)}
    if bands is None:
        require(channels in known, key, None, f"images have {channels} channels: give the one or three of them that LPIPS is to see")
        return known[channels]
    there = len(bands) in (1, 3) and all(0 <= band < channels for band in bands)
    require(there, key, bands, f"give one or three indices of the images' channels, 0 to {channels - 1}")
    return tuple(bands)


def lpips_weights_path(net: str, weights: str | None, *, key: str = "objective.perceptual.weights") -> Path | None:
    """The file that holds the weights of `net`: `weights`, or torchvision's own in its cache; None for `random`.

    Raises:
        ConfigError: no such file, or not a .pth or .safetensors; the message names `key` and the remedies.
    """
    if weights == "random":
        return None
    model, filename = TORCHVISION[net]
    cached = _cache() / filename
    path = cached if weights is None else Path(weights).expanduser()
    remedy = (
        f"fill torchvision's cache once (python -c \"import torchvision; torchvision.models.{model}(weights='IMAGENET1K_V1')\", "
        f"or copy {filename} to {cached.parent}), or set {key} to a file with torchvision's {model} (.pth or .safetensors)"
    )
    if not path.is_file():
        raise ConfigError(key, weights, f"LPIPS needs the weights of {model} and {path} is not there: {remedy}")
    if path.suffix not in (".pth", ".safetensors"):
        raise ConfigError(key, weights, f"its name ends in neither .pth nor .safetensors: {remedy}")
    return path


def _cache() -> Path:
    """Where torch.hub keeps checkpoints (`torch.hub.get_dir()`)."""
    home = os.getenv("TORCH_HOME") or Path(os.getenv("XDG_CACHE_HOME") or "~/.cache") / "torch"
    return Path(home).expanduser() / "hub" / "checkpoints"
