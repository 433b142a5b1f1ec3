"""Perceptual distances: auxiliary losses beside the ELBO, not part of it.

Each takes images and reconstruction (B, C, H, W) in [-1, 1] to a distance (B,), at least float32, with gradients to the reconstruction
that are finite also where it equals the images.
"""

import hashlib
import warnings
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import autoencoder.runtime.torchvision_operators  # noqa: F401  (before lpips)
from autoencoder.lpips_weights import TORCHVISION, backbone_bands, lpips_weights_path
from autoencoder.metrics import structural_similarity
from autoencoder.objective_config import PerceptualConfig
from autoencoder.own_distance import OwnDistance
from autoencoder.runtime.errors import UsageError, first_line

from lpips import LPIPS  # isort: skip


def build_perceptual(config: PerceptualConfig, channels: int = 3) -> nn.Module | None:
    """The configured distance between images of so many channels, or None.

    Raises:
        UsageError: LPIPS whose backbone has no weights, or channels of which it would not know which to see; a class of the user's own that
            cannot be found or constructed.
    """
    if config.name == "ssim":
        return SSIMDistance(config.window)
    if config.name == "lpips":
        return LPIPSDistance(config.net, config.weights, bands=backbone_bands(config.bands, channels))
    if config.name == "own":
        return OwnDistance(config.own)
    return None


class SSIMDistance(nn.Module):
    """1 - SSIM under a Gaussian window of `window` pixels a side, data range 2 (Wang et al. 2004); 0 for identical images, at most 2."""

    def __init__(self, window: int = 7) -> None:
        super().__init__()
        self.window = window

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """The distance, (B,)."""
        return 1 - structural_similarity(images, reconstruction, window=self.window, data_range=2.0)


class LPIPSDistance(nn.Module):
    """LPIPS version 0.1 (Zhang et al. 2018, eq. 1), the networks and heads of its authors' package.

    Frozen; stays as it is in `train()`. Unlike the package's own forward it takes no gradient of the images' features, and keeps the
    gradient finite where all features of a place are zero. The backbone follows autocast; all after it is at least float32.

    Args:
        net: `vgg`, `alex` or `squeeze`.
        weights: a file with torchvision's weights of the backbone (.pth or .safetensors), None for torchvision's cache, or `random`: the
            same random backbone every time, for benchmarks and tests.
        bands: indices of the channels that the backbone sees, one (as grey) or three (as RGB).

    Raises:
        UsageError: weights that are missing, cannot be read or are not of this backbone.
    """

    def __init__(self, net: str = "vgg", weights: str | None = None, *, bands: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.net, self.bands = net, bands
        path = lpips_weights_path(net, weights)
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.filterwarnings("ignore", category=UserWarning, module="torchvision")
            torch.manual_seed(0)
            model = LPIPS(net=net, pretrained=True, pnet_rand=True, verbose=False)
        self.scaling, self.backbone = model.scaling_layer, model.net
        for number, head in enumerate(model.lins):
            self.register_buffer(f"head{number}", head.model[-1].weight.detach())  # (1, C, 1, 1)
        if path is not None:
            _load_backbone(self.backbone, path, net)

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """The distance, (B,), of the bands that the backbone sees; a single one is shown to it as grey."""
        with torch.no_grad():
            targets = self._features(images)
        features = self._features(reconstruction)
        distance = torch.stack(
            [
                ((feature - target).square() * self.get_buffer(f"head{number}")).sum(1).mean((1, 2))
                for number, (feature, target) in enumerate(zip(features, targets, strict=True))
            ]
        )
        return distance.sum(0)

    def described(self) -> str:
        """The weights in use, for a log: SHA-256 of the backbone's and of the heads' tensors."""
        backbone, heads = self.backbone.state_dict(), dict(self.named_buffers(recurse=False))
        return f"LPIPS {self.net}: sha256 of the backbone's weights {_sha256(backbone)}, of the heads' {_sha256(heads)}"

    def _features(self, images: Tensor) -> list[Tensor]:
        """Each layer's features, (B, C, h, w), as unit vectors along C, at least float32."""
        # By slices: an index tensor would have to be copied to the device.
        seen = images if self.bands is None else torch.cat([images[:, band : band + 1] for band in self.bands], dim=1)
        scaled = self.scaling(seen.to(self.scaling.shift.dtype).expand(-1, 3, -1, -1))
        return [_unit(feature.to(torch.promote_types(feature.dtype, torch.float32))) for feature in self.backbone(scaled)]


def _unit(features: Tensor) -> Tensor:
    """features / |features| along C. The epsilon is inside the root, whose slope at zero features would be infinite without it."""
    return features / (features.square().sum(1, keepdim=True) + 1e-10).sqrt()


def _sha256(tensors: dict[str, Tensor]) -> str:
    """Over names, shapes and values in the order of the names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _load_backbone(backbone: nn.Module, path: Path, net: str) -> None:
    """Copy torchvision's `features.N.*` into the package's `sliceS.N.*`; a classifier in the file is left out."""
    try:
        saved = load_file(path) if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, OSError, EOFError, ValueError, RuntimeError) as error:
        raise UsageError(f"{path}: cannot be read: {first_line(error)}; give a .pth or .safetensors of tensors alone") from error
    for name, value in backbone.state_dict().items():
        key = f"features.{name.split('.', 1)[1]}"
        if key not in saved or saved[key].shape != value.shape:
            found = f"of shape {tuple(saved[key].shape)}" if key in saved else "missing"
            model = TORCHVISION[net][0]
            raise UsageError(f"{path}: {key} is {found}, not of shape {tuple(value.shape)}; give the weights of torchvision's {model}")
        value.copy_(saved[key])
