"""The encoder as it encodes: pixels in, moments in their stored dtype out."""

import threading

import numpy as np
import torch
from torch import Tensor

from autoencoder.data.batch import Batch
from autoencoder.data.pixels import to_images
from autoencoder.latents.lanes import Lanes
from autoencoder.latents.plan import Plan
from autoencoder.model import AutoencoderKL, encode
from autoencoder.pixel_recipe import PixelRecipe
from autoencoder.runtime.errors import TrainingError

_AUTOCAST = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def lanes_of(vae: AutoencoderKL, device: torch.device, side: int, batch_size: int) -> Lanes:
    """How this network encodes microbatches of `batch_size` crops of `side` pixels here."""
    return Lanes.of(device, width=vae.config["block_out_channels"][0], side=side, batch_size=batch_size)


class Encoder:
    """A batch's `mean`, and `logvar` where the plan stores it, (B, c, h, w); not scaled by the model's `scaling_factor`.

    Several threads may call it.
    """

    def __init__(self, vae: AutoencoderKL, plan: Plan, device: torch.device) -> None:
        self._vae, self._device = vae.to(device).eval(), device
        if plan.recipe["precision"] == "fp32":
            # What the recipe calls fp32 is to be that: by default convolutions on GPUs round their inputs to 10 bits.
            torch.backends.cudnn.allow_tf32 = False
        self._precision, self._moments = plan.recipe["precision"], plan.recipe["moments"]
        self._pixels = PixelRecipe.from_json(plan.recipe["pixels"])
        self.lanes = lanes_of(vae, device, plan.recipe["data"]["resolution"], plan.recipe["batch_size"])
        self.on_cpu, self._launching = device.type == "cpu", threading.Lock()
        self._dtype, self._shapes = {"fp32": np.float32, "fp16": np.float16}[plan.recipe["dtype"]], plan.shapes

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> dict[str, np.ndarray]:
        """Raises TrainingError naming the image where a moment is not finite, or does not fit the stored dtype."""
        computed = self._compute(batch) if self.on_cpu else self._fetch(batch)
        moments = {}
        for name, tensor in computed.items():
            exact = tensor.numpy()
            assert exact.shape[1:] in self._shapes
            with np.errstate(over="ignore"):  # reported below, with the image
                moments[name] = exact.astype(self._dtype)
            self._check(name, exact, moments[name], batch)
        return moments

    def _compute(self, batch: Batch) -> dict[str, Tensor]:
        """The moments in float32, on the device."""
        placed = batch.to(self._device)
        images = to_images(placed.pixels, self._pixels, placed.valid)
        with torch.autocast(self._device.type, dtype=_AUTOCAST[self._precision], enabled=self._precision != "fp32"):
            posterior = encode(self._vae, images)
        exact = {"mean": posterior.mean, **({"logvar": posterior.logvar} if self._moments else {})}
        return {name: value.float() for name, value in exact.items()}

    def _fetch(self, batch: Batch) -> dict[str, Tensor]:
        """The moments in page-locked memory of the host; whoever waits for them lets the next microbatch be launched meanwhile."""
        # One after the other, so that activations take the memory of one microbatch, and the copies stand right behind what they copy.
        with self._launching:
            computed = self._compute(batch)
            host = {name: torch.empty(value.shape, pin_memory=True).copy_(value, non_blocking=True) for name, value in computed.items()}
            done = torch.cuda.Event()
            # In a thread that nobody told of another GPU the current stream is the first one's.
            done.record(torch.cuda.current_stream(self._device))
        done.synchronize()
        return host

    def _check(self, name: str, computed: np.ndarray, stored: np.ndarray, batch: Batch) -> None:
        bad = ~np.isfinite(stored).reshape(len(stored), -1).all(1) & (batch.weight.numpy() > 0)
        if not bad.any():
            return
        row = int(np.argmax(bad))
        where = f"{name} of image {batch.ids[row]} (row {int(batch.position[row])})"
        if np.isfinite(computed[row]).all():
            raise TrainingError(f"{where} reaches {np.abs(computed[row]).max():.4g}, fp16 ends at 65504; encode with --dtype fp32")
        remedy = "check the autoencoder's weights" if self._precision == "fp32" else "encode with --precision fp32"
        raise TrainingError(f"{where} is not finite in {self._precision}; {remedy}")
