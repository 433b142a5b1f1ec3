"""The end of a diffusion run: evaluate the averaged weights, draw, export the pipeline, report."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoencoder.card import public_name
from autoencoder.data.order import spread
from autoencoder.identity import Identity
from autoencoder.report.page import write_report
from autoencoder.report.pictures import grid
from autoencoder.runtime.averages import described
from autoencoder.runtime.files import replace_text
from autoencoder.runtime.rng import generator
from autoencoder.runtime.versions import versions
from diffusion import frechet
from diffusion.card import model_card
from diffusion.data import draw, gather
from diffusion.denoiser import Denoiser, stock
from diffusion.evaluation import Nothing, TwoSample, mean_loss, nearest, two_sample
from diffusion.pipeline import Parts, write_pipeline
from diffusion.pipeline_path import network_hash
from diffusion.task import DiffusionTask

NEIGHBOURS = 16
"""Samples that are shown above their nearest training latents."""
MOST_CANDIDATES = 50_000
"""Training rows that are searched for them, spread evenly."""
CHUNK = 2048


def finish(
    task: DiffusionTask, module: Denoiser, recipe: dict[str, Any], identity: Identity, notes: Sequence[str], chosen: dict[str, Any]
) -> None:
    """Write `evaluation.json`, `images/neighbours.png`, `pipeline/` and `report.html`; every process calls it.

    `chosen` is what `evaluation.json` says of how `module` was chosen among moving averages.
    """
    levels = task.noise_levels(module)
    if task.accelerator.is_main_process:
        metrics: dict[str, Any] = {"loss": _metric(mean_loss(levels))}
        report: dict[str, Any] = {
            "metrics": metrics,
            "noise_levels": [vars(level) for level in levels],
            "classes": task.space.labels,
            **chosen,
        }
        if _number(task) == 1:
            task.accelerator.print("1 held-out row is too few for a Fréchet distance: it is left out")
        elif _number(task):
            asked = task.config.sampling.evaluate
            fewer = f", not {asked:,}: as many as rows are held out" if _number(task) < asked else ""
            task.accelerator.print(f"sampling {_number(task):,} latents for the evaluation{fewer}")
            measured = _compare(task, module)
            metrics["frechet"], metrics["frechet_floor"] = _metric(measured.samples), _metric(measured.floor)
            metrics["frechet_untrained"] = _metric(measured.untrained)
            report["frechet_on"] = _frechet_on(task, measured)
        _draw_neighbours(task, module)
        told = {
            **_provenance(task, notes),
            "weights": described(task.config.train, chosen),
            "pipeline_vae": asdict(identity),
            "parameters": sum(parameter.numel() for parameter in module.parameters()),
        }
        report["provenance"] = told
        card = model_card(task.config, task.space, evaluation=report, provenance=told)
        sampling = task.config.sampling
        parts = Parts(stock(module), task.vae, task.space, recipe, identity, card, task.config.process, sampling.time_shift)
        difference = write_pipeline(parts, task.folder / "pipeline")
        task.accelerator.print(
            f"{task.folder / 'pipeline'}: loaded and sampled by stock diffusers in a fresh process; "
            f"latents differ from our own sampler's by {difference:.1g}"
        )
        made = {"network_hash": network_hash(task.folder / "pipeline"), "largest_difference_to_stock": difference}
        report["provenance"] = {**told, "pipeline": made}
        replace_text(task.folder / "evaluation.json", json.dumps(report, indent=1))
        write_report([task.folder], task.folder / "report.html")
        task.accelerator.print(_summary(metrics, task.folder))
    task.accelerator.wait_for_everyone()


def _summary(metrics: dict[str, Any], folder: Path) -> str:
    value = {name: f"{metric['mean']:.4g}" for name, metric in metrics.items()}
    distance = (
        f", Fréchet distance {value['frechet']} (training rows {value['frechet_floor']}, untrained {value['frechet_untrained']})"
        if "frechet" in value
        else ""
    )
    return f"validation loss {value['loss']}{distance}; look at {folder / 'report.html'}"


def _number(task: DiffusionTask) -> int:
    return min(task.config.sampling.evaluate, len(task.validation_rows), len(task.train_rows.rows))


@torch.no_grad()
def _compare(task: DiffusionTask, module: Denoiser) -> TwoSample:
    """Unguided samples, held-out and training latents, and samples of an untrained network, as many of each."""
    number = _number(task)
    held_out, _, labels = task.validation_rows.read(spread(len(task.validation_rows), number).tolist())
    samples, untrained = (task.samples(network, labels, guidance=1.0) for network in (module, Nothing()))
    return two_sample(samples, held_out, _training(task, number), untrained)


def _training(task: DiffusionTask, most: int) -> Tensor:
    """Normalised draws (N, c, h, w) of at most `most` training rows, spread evenly."""
    read = gather(task.train_rows.latents, _spread(task, most))
    noise = generator(task.config.train.seed, "training rows", 0).standard_normal(read.mean.shape, dtype=np.float32)
    return draw(read, noise, task.space, task.config.data.draw)


def _spread(task: DiffusionTask, most: int) -> np.ndarray:
    """Numbers of at most `most` training rows, spread evenly."""
    rows = task.train_rows.rows
    return rows[spread(len(rows), most)]


def _means(task: DiffusionTask) -> Iterator[Tensor]:
    """Normalised posterior means of the candidates for nearest neighbours, in chunks."""
    rows = _spread(task, MOST_CANDIDATES)
    for start in range(0, len(rows), CHUNK):
        yield task.space.normalize(torch.from_numpy(gather(task.train_rows.latents, rows[start : start + CHUNK]).mean))


def _draw_neighbours(task: DiffusionTask, module: Denoiser) -> None:
    """Samples, each above the training latent (posterior mean) nearest to it, both decoded."""
    samples = task.samples(module, task.sample_labels(NEIGHBOURS), task.config.guidance)
    found = nearest(samples, _means(task))
    folder = task.folder / "images"
    folder.mkdir(exist_ok=True)
    grid(task.images(samples), task.images(found), columns=8).save(folder / "neighbours.png")


def _frechet_on(task: DiffusionTask, measured: TwoSample) -> str:
    channels, height, width = task.space.shape
    k = frechet.block(task.space.shape)
    pooled = f" averaged over {k} x {k} blocks" if k > 1 else ""
    return (
        "Fréchet distance between Gaussians fitted to the autoencoder's own normalised latents "
        f"({channels} x {height} x {width}{pooled}) of {measured.number} unguided samples ({task.config.sampling.sampler}, "
        f"{task.config.sampling.steps} steps) and of {measured.number} held-out rows. Floor: training rows in place of samples. "
        "Untrained: samples of the untrained network. Not comparable with FID."
    )


def _metric(value: float) -> dict[str, Any]:
    return {"mean": value, "low": None, "high": None, "unit": ""}


def _provenance(task: DiffusionTask, notes: Sequence[str]) -> dict[str, Any]:
    data = [_published(segment["source"]) for segment in task.train_rows.latents.manifest["segments"]]
    space, config = task.space, task.config
    latents = {
        "rows_hash": space.rows_hash,
        "rows": space.rows,
        "training_rows": len(task.train_rows.rows),
        "shape": list(space.shape),
        "data": data,
    }
    return {
        "encoder_hash": space.encoder_hash,
        "decoder_hash": space.decoder_hash,
        "latents": latents,
        "sampling": {**{key: value for key, value in asdict(config.sampling).items() if key != "evaluate"}, "guidance": config.guidance},
        "validation": f"error of the {task.config.process.head} on {len(task.validation_rows)} held-out rows at fixed times and noise",
        "images_seen": task.steps.images,
        "seed": config.train.seed,
        "precision": task.accelerator.mixed_precision,
        "threads": torch.get_num_threads(),
        "notes": list(notes),
        "versions": versions(),
    }


def _published(source: dict[str, Any]) -> dict[str, Any]:
    """What the card says of images; it may be published."""
    # The arguments of a class of the user's own have no place there; the name is its path.
    return {key: value for key, value in source.items() if key != "own"} | {"name": public_name(source["name"])}
