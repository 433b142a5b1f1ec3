"""Where the backbone of LPIPS has its weights. Torch-free, so that a missing file is found before torch is imported."""

import os
from pathlib import Path

from autoencoder.runtime.errors import ConfigError

TORCHVISION = {
    "vgg": ("vgg16", "vgg16-397923af.pth"),
    "alex": ("alexnet", "alexnet-owt-7be5be79.pth"),
    "squeeze": ("squeezenet1_1", "squeezenet1_1-b8a52dc0.pth"),
}
"""torchvision's model behind each LPIPS network, and the name of its ImageNet weights in torchvision's cache."""


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
