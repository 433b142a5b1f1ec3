"""The discriminator's network: our PatchGAN, or one of the user's own that is tried once before it trains."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from autoencoder.adversarial.losses import r1_penalty
from autoencoder.adversarial.patchgan import PatchGAN
from autoencoder.adversarial_config import AdversarialConfig
from autoencoder.own_module import build_module, called, check_alone, noise, tried
from autoencoder.runtime.errors import ConfigError

KEY = "objective.adversarial.own"


def build_discriminator(config: AdversarialConfig, *, shape: tuple[int, int, int], seed: int, device: torch.device) -> nn.Module:
    """A network from images of this shape (C, H, W) to logits (B, 1, h, w), in evaluation mode for good, the same for one seed.

    Raises:
        ConfigError: a class of the user's own that cannot be found or constructed, or whose network cannot be trained exactly.
    """
    if not config.own.given:
        return PatchGAN(shape[0], width=config.width, layers=config.layers, norm=config.norm, seed=seed).to(device)
    # In training mode dropout would draw at random, and spectral norms would move with every forward pass.
    network = build_module(config.own, KEY, seed=seed, channels=shape[0]).to(device).eval()
    images = noise(2, *shape, seed=0, device=device)
    # Unlike the first, so that it would be felt there.
    images[1] = 0.5 + 0.1 * images[1]
    _Trial(config, network).run(images)
    return network


def described(config: AdversarialConfig, network: nn.Module) -> str:
    """Class, arguments and size of one of the user's own, for a log."""
    numbers = sum(parameter.numel() for parameter in network.parameters())
    return f"discriminator: {config.own}, {numbers / 1e6:.2f} M parameters"


def _fixed(norm: _BatchNorm) -> bool:
    """Whether it is as it was learned elsewhere: parameters that do not train, statistics that are its own."""
    parameters = list(norm.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters) and norm.running_mean is not None


class _Trial:
    """Each demand on a network of the user's own, and its refusal."""

    def __init__(self, config: AdversarialConfig, network: nn.Module) -> None:
        self.config, self.network = config, network

    def run(self, images: Tensor) -> None:
        """All of them, on images (B, C, H, W)."""
        tried(lambda: self._run(images), tuple(images.shape), self._refuse)

    def _run(self, images: Tensor) -> None:
        self._check_parts()
        before = {name: tensor.clone() for name, tensor in self.network.state_dict().items()}
        with torch.no_grad():
            self._check_logits(called(self.network, images, refuse=self._refuse), images)
        leaf = images.clone().requires_grad_()
        self._check_gradients(self.network(leaf), leaf)
        if self.config.r1 > 0:
            self._check_penalty(images)
        with torch.no_grad():
            check_alone(self.network(images), called(self.network, images[:1], refuse=self._refuse), self._refuse)
        moved = [name for name, tensor in self.network.state_dict().items() if not torch.equal(tensor, before[name])]
        if moved:
            raise self._refuse(
                f"a forward pass changes {moved[0]}, which would depend on the number of microbatches; keep no running state"
            )

    def _check_parts(self) -> None:
        for name, module in self.network.named_modules():
            if isinstance(module, _BatchNorm) and not _fixed(module):
                raise self._refuse(
                    f"{name or 'it'} is a {type(module).__name__}: in evaluation mode, in which it runs, its statistics would never move, "
                    "and statistics of a batch would tie images to each other; give GroupNorm, or freeze its parameters where it has "
                    "learned its statistics before"
                )
        if not any(parameter.requires_grad for parameter in self.network.parameters()):
            raise self._refuse("it has no parameter that trains")
        places: dict[int, str] = {}
        for name, tensor in self.network.state_dict().items():
            if not isinstance(tensor, Tensor):
                raise self._refuse(f"its state has {name}, a {type(tensor).__name__}; a checkpoint holds tensors alone")
            other = places.setdefault(tensor.data_ptr(), name) if tensor.numel() else name
            if other != name:
                raise self._refuse(f"its state has one tensor under two names, {other} and {name}, where a checkpoint needs one name each")

    def _check_logits(self, logits: Tensor, images: Tensor) -> None:
        if logits.ndim != 4 or logits.shape[:2] != (len(images), 1) or not logits.numel():
            taken = tuple(images.shape)
            raise self._refuse(f"images {taken} give {tuple(logits.shape)}; give logits of patches, ({len(images)}, 1, h, w)")
        if not logits.isfinite().all():
            raise self._refuse("its logits are not finite for images of noise")

    def _check_gradients(self, logits: Tensor, leaf: Tensor) -> None:
        if not logits.requires_grad:
            raise self._refuse("it has no gradient; leave out no_grad and detach")
        trained = {name: parameter for name, parameter in self.network.named_parameters() if parameter.requires_grad}
        to_images, *others = torch.autograd.grad(logits.sum(), [leaf, *trained.values()], allow_unused=True)
        if to_images is None or not to_images.isfinite().all():
            raise self._refuse(f"its gradient to the images is {'missing' if to_images is None else 'not finite'}")
        unused = [name for name, gradient in zip(trained, others, strict=True) if gradient is None]
        if unused:
            raise self._refuse(
                f"its output does not depend on {', '.join(unused[:3])}; remove what is unused, or give it requires_grad=False"
            )

    def _check_penalty(self, images: Tensor) -> None:
        trained = [parameter for parameter in self.network.parameters() if parameter.requires_grad]

        def penalty() -> Tensor:
            found = r1_penalty(self.network, images)
            torch.autograd.grad(found.sum(), trained, allow_unused=True)
            return found

        tried(penalty, tuple(images.shape), lambda finding: self._refuse(f"{finding}, by the R1 penalty (objective.adversarial.r1)"))

    def _refuse(self, finding: str) -> ConfigError:
        remedy = f"{finding}. A discriminator maps images (B, C, H, W) in [-1, 1] to logits (B, 1, h, w)"
        return ConfigError(f"{KEY}.class_path", self.config.own.class_path, remedy)
