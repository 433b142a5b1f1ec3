"""What the two players minimise, per image, from the logits (B, 1, h, w) that the discriminator gives an image's patches."""

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d, relu, softplus


def discriminator_loss(name: str, real: Tensor, fake: Tensor) -> Tensor:
    """Half the losses of real and of fake patches, a mean over patches, (B,).

    `hinge`: max(0, 1 - real) and max(0, 1 + fake) (Lim & Ye 2017); `non_saturating`: the binary cross entropy -ln sigmoid(real) and
    -ln sigmoid(-fake) (Goodfellow et al. 2014). Both with the factor 1/2 of Esser et al. 2021.
    """
    if name == "hinge":
        return 0.5 * (_patches(relu(1 - real)) + _patches(relu(1 + fake)))
    return 0.5 * (_patches(softplus(-real)) + _patches(softplus(fake)))


def generator_loss(name: str, fake: Tensor) -> Tensor:
    """-fake (`hinge`) or -ln sigmoid(fake) (`non_saturating`), a mean over patches, (B,)."""
    return _patches(-fake if name == "hinge" else softplus(-fake))


def accuracy(real: Tensor, fake: Tensor, valid: Tensor | None = None) -> Tensor:
    """Share of patches, real and fake, on whose side of zero the logit lies, (B,); a logit of zero is neither.

    Where pixels are missing, not `valid` (B, 1, H, W), both show the same: of an image that has patches without any, those alone count.
    """
    right = 0.5 * ((real > 0).to(real) + (fake < 0).to(fake))
    if valid is None:
        return _patches(right)
    whole = (adaptive_max_pool2d((~valid).to(real), real.shape[-2:]) == 0).to(real)
    counted = torch.where(whole.flatten(1).any(1).view(-1, 1, 1, 1), whole, 1.0)
    return (right * counted).flatten(1).sum(1) / counted.flatten(1).sum(1)


def r1_penalty(discriminator: nn.Module, images: Tensor) -> Tensor:
    """|grad_x D(x)|^2 at real images, (B,), D(x) the mean over patches (Mescheder et al. 2018, eq. 9, without gamma / 2).

    Outside autocast: a gradient of a gradient has no digits to spare.
    """
    images = images.detach().requires_grad_()
    with torch.autocast(images.device.type, enabled=False):
        score = _patches(discriminator(images))
        (gradient,) = torch.autograd.grad(score.sum(), images, create_graph=True)
        return gradient.square().flatten(1).sum(1)


def _patches(values: Tensor) -> Tensor:
    return values.flatten(1).mean(1)
