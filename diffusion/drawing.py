"""From a pipeline to images: what the command `sample` does."""

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from autoencoder.artifact import load_preprocessing
from autoencoder.identity import ENCODER
from autoencoder.model import decode, decoded_at_once, downsampling
from autoencoder.preview import Preview
from autoencoder.report.pictures import plain_grid
from autoencoder.runtime.errors import ConfigError, UsageError, first_line, require
from autoencoder.runtime.files import replace_text
from diffusion import sampling
from diffusion.config import WHOLE
from diffusion.denoiser import NULL_CLASS, Denoiser
from diffusion.pipeline_path import pipeline_folder
from diffusion.process import Process
from diffusion.sample import SampleConfig
from diffusion.schedulers import check_sampler, read_process

from diffusers import DiTPipeline  # isort: skip
from diffusers.utils import logging  # isort: skip

RECORD = "samples.json"
MOST_IN_GRID = 256
FREE = ("pipeline", "images", "batch_size", "columns", "out")
"""Settings that do not change an image; what the pipeline's path stands for is recorded by its weights."""


def open_pipeline(path: str) -> tuple[Any, dict[int, str]]:
    """The stock pipeline, in fp32, and its class names by number.

    Raises:
        UsageError: it does not load, or its network predicts a variance.
    """
    place = str(pipeline_folder(path) or path)
    # It has a bar for three files, and does not know its own class table.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        pipe = DiTPipeline.from_pretrained(place, use_safetensors=True).to(torch.float32)
        table = DiTPipeline.load_config(place).get("id2label") or {}
        names = {int(number): str(name) for number, name in table.items()}
    except Exception as error:  # diffusers, huggingface_hub and safetensors each raise kinds of their own
        raise UsageError(f"pipeline: {path} cannot be loaded as a DiTPipeline: {first_line(error)}") from error
    network = pipe.transformer.config
    if network["out_channels"] not in (None, network["in_channels"]):
        raise ConfigError("pipeline", path, "its network predicts a variance, too; use DiTPipeline itself for it")
    return pipe, names


def draw(config: SampleConfig) -> None:
    """Write the images that are not there yet, and the grid of them all; says how fast."""
    pipe, names = open_pipeline(config.pipeline)
    process, its_shift = read_process(pipe.scheduler, config.pipeline)
    time_shift = its_shift if config.time_shift is None else config.time_shift
    config = dataclasses.replace(config, time_shift=time_shift)
    check_sampler(process, config.sampler, time_shift)
    idle = not names and tuple(config.guidance_interval) != WHOLE
    remedy = "this pipeline has no classes, so nothing is guided; leave it out"
    require(not idle, "guidance_interval", list(config.guidance_interval), remedy)
    labels = _labels(config, names)
    folder = pipeline_folder(config.pipeline)
    preview = Preview.from_json(None if folder is None else load_preprocessing(Path(folder) / "vae"))
    out = Path(config.out)
    _claim(out, config, _digest(pipe, process))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    denoiser, vae = Denoiser(pipe.transformer.to(device).eval()), pipe.vae.to(device).eval()
    side, channels = pipe.transformer.config["sample_size"], pipe.transformer.config["in_channels"]
    missing = [n for n in range(config.images) if not _file(out, n).is_file()]
    throughput = _Throughput()
    denoiser.register_forward_hook(throughput.count)
    began = time.monotonic()
    bar = tqdm(total=config.images, initial=config.images - len(missing), unit="img", disable=None)
    for first in range(0, len(missing), config.batch_size):
        numbers = missing[first : first + config.batch_size]
        start = sampling.noise(config.seed, numbers, (channels, side, side)).to(device)
        with (
            throughput.timed(device),
            torch.autocast(device.type, getattr(torch, _DTYPES[config.precision]), enabled=config.precision != "fp32"),
        ):
            latents = sampling.sample(
                denoiser, start, labels[numbers].to(device), process=process, sampler=config.sampler, steps=config.steps,
                guidance=config.guidance, guidance_interval=config.guidance_interval, time_shift=time_shift,
            )  # fmt: skip
        with torch.no_grad():
            # The factor of pipelines that are not folded; ours have 1.
            chunks = (latents / vae.config["scaling_factor"]).split(decoded_at_once(side * downsampling(vae)))
            pixels = torch.cat([preview.each(decode(vae, chunk)) for chunk in chunks])
        for number, image in zip(numbers, pixels, strict=True):
            _save(image, _file(out, number))
        bar.update(len(numbers))
    bar.close()
    rate = f", {len(missing) / (time.monotonic() - began):.1f} images/s; {throughput}" if missing else ""
    _write_grid(out, config)
    print(f"{config.images} images in {out} ({len(missing)} new{rate}); grid.png shows {min(config.images, MOST_IN_GRID)}", file=sys.stderr)


_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclasses.dataclass
class _Throughput:
    """How often the network was evaluated, by latents, and how long sampling took, without decoding."""

    evaluations: int = 0
    seconds: float = 0.0

    def count(self, network: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        """A forward hook of the network."""
        self.evaluations += len(output)

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        """Count the time of a batch in."""
        began = time.monotonic()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds += time.monotonic() - began

    def __str__(self) -> str:
        return f"{self.evaluations / self.seconds:.0f} network evaluations/s"


def _labels(config: SampleConfig, names: dict[int, str]) -> Tensor:
    """Labels (images,) of the images: the asked classes in turn."""
    if config.classes is None:
        turn = sorted(names) or [NULL_CLASS]
    elif not names:
        raise ConfigError("classes", config.classes, "this pipeline has no classes; leave it out")
    else:
        turn = [_class(given, names) for given in config.classes]
    return torch.tensor(turn)[torch.arange(config.images) % len(turn)]


def _class(given: str | int, names: dict[int, str]) -> int:
    """The number of a class by its name, one of its names (stock pipelines part them by commas) or its number.

    "7" is the class that is called so, and class 7 only where none is; 7 is always class 7.
    """
    called = [number for number, name in names.items() if given in (name, *(part.strip() for part in name.split(",")))]
    if len(called) == 1:
        return called[0]
    if called:
        raise ConfigError("classes", given, f"the classes {', '.join(map(str, called))} are called so; give one of these numbers")
    if str(given).isdecimal() and int(given) in names:
        return int(given)
    shown = ", ".join(f"{number}: {name}" for number, name in list(names.items())[:12])
    raise ConfigError("classes", given, f"no such class; there are {shown}{', ...' if len(names) > 12 else ''}")


def _digest(pipe: Any, process: Process) -> str:
    """SHA-256 over all that makes images of noise, wherever the pipeline lies."""
    digest = hashlib.sha256(str(pipe.vae.config["scaling_factor"]).encode())
    if process.head != "velocity":
        digest.update(process.head.encode())
        digest.update(pipe.scheduler.alphas_cumprod.numpy())
    for part in (pipe.transformer, pipe.vae):
        for name, tensor in sorted(part.state_dict().items()):
            if not name.startswith(ENCODER):
                digest.update(f"{name} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()


def _claim(out: Path, config: SampleConfig, weights: str) -> None:
    """Take the folder for these settings and weights; ConfigError where it holds images of others."""
    given = {key: value for key, value in dataclasses.asdict(config).items() if key not in FREE}
    settings = {"weights": weights, **given, "guidance_interval": list(config.guidance_interval)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        record = out / RECORD
        if record.is_file():
            old = json.loads(record.read_text())
            changed = [f"{key}: {old.get(key)!r} -> {value!r}" for key, value in settings.items() if old.get(key) != value]
            if changed:
                raise ConfigError("out", str(out), f"holds images of other settings ({'; '.join(changed)}); give another folder")
        elif any(out.glob("*.png")):
            raise ConfigError("out", str(out), f"holds PNGs and no {RECORD}; give a folder that is new or empty")
        replace_text(record, json.dumps(settings, indent=1))
    except OSError as error:
        raise ConfigError("out", str(out), f"cannot be written ({error.strerror}); give a folder that can be") from error
    except (json.JSONDecodeError, AttributeError) as error:
        raise ConfigError("out", str(out), f"its {RECORD} is damaged ({error}); give a folder that is new or empty") from error


def _file(out: Path, number: int) -> Path:
    return out / f"{number:06d}.png"


def _save(image: Tensor, path: Path) -> None:
    """One image (C, H, W), uint8, as a PNG that is there whole or not at all."""
    pixels = image.movedim(0, -1).numpy()
    beside = path.with_suffix(".partial")
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(beside, "png")
    beside.replace(path)


def _write_grid(out: Path, config: SampleConfig) -> None:
    images = [np.asarray(Image.open(_file(out, n))) for n in range(min(config.images, MOST_IN_GRID))]
    stacked = np.stack([image if image.ndim == 3 else image[..., None] for image in images])
    plain_grid(torch.from_numpy(stacked).movedim(-1, 1), columns=config.columns).save(out / "grid.png")
