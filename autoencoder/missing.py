"""Missing values of images: counted nowhere.

`valid` is (B, 1, H, W), True where a pixel was observed, or None where all of the batch were. Images (B, C, H, W) are 0, mid-grey, where a
pixel is missing: that is what the encoder sees there. Likelihood, errors and quality leave such pixels out; a distance that wants whole
images, perceptual or adversarial, is shown a reconstruction that has the image's own values there (`filled`).
"""

import torch
from torch import Tensor


def filled(reconstruction: Tensor, images: Tensor, valid: Tensor | None) -> Tensor:
    """The reconstruction with the image's values where they are missing: no distance sees a difference there, no gradient leaves it."""
    return reconstruction if valid is None else torch.where(valid, reconstruction, images)


def observed_values(images: Tensor, valid: Tensor | None) -> Tensor | int:
    """Values of each image that were observed, (B,), at least 1: padding has none; C * H * W for all where nothing is missing."""
    values = images[0].numel()
    return values if valid is None else (valid.flatten(1).sum(1) * images.shape[1]).clamp(min=1)


def observed_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of (B, C, H, W) over the values of each image that were observed, (B,); 0 for an image without any."""
    if valid is None:
        return values.flatten(1).mean(1)
    return torch.where(valid, values, 0.0).flatten(1).sum(1) / observed_values(values, valid)
