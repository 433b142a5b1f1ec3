"""The account against exact ground truth: pPCA and linear VAEs on grey images, such as MNIST's, as values in [0, 1].

Three parts. The optimal linear VAE in closed form, whose log weights are log p(x) whatever z is drawn. A linear VAE trained from a random
start with the project's objective, and how far it stays below log p(x) over time. One trained under beta, whose active units are those
with an eigenvalue above beta sigma**2. Writes benchmarks/results/ppca-<device>.json.
"""

import json
import math
import time
from typing import Any

import frame
import numpy as np
import torch
from torch import Tensor

from autoencoder.config import DataConfig
from autoencoder.data.sources import open_source
from autoencoder.diagnostics import LatentStatistics
from autoencoder.objective_config import KLConfig, LikelihoodConfig, ObjectiveConfig
from autoencoder.runtime.config import OptimizerConfig
from autoencoder.runtime.device import describe
from tests.linear_vae import PPCA, LinearVAE, account, train

# Units turn towards the eigenvectors last and slowly, and the noise of a batch turns them back: every step takes all images.
ADAM = OptimizerConfig(lr=3e-2, betas=(0.9, 0.95))
SAMPLES = 8


def read(path: str) -> Tensor:
    """Images (N, D) in [0, 1], float64."""
    source = open_source(path, split="train", config=DataConfig(source=path, channels=1))
    return torch.from_numpy(np.stack([source.read(i).pixels.ravel() for i in range(len(source))])).double() / 255


def closed_form(images: Tensor, units: int) -> dict[str, float]:
    """The optimal linear VAE, measured."""
    ppca = PPCA.fit(images, units)
    terms, log_p = account(ppca.linear_vae(), images, ppca.sigma, samples=1), ppca.evidence.log_prob(images)
    noisy = account(ppca.linear_vae(), images, ppca.sigma, samples=SAMPLES).elbo - log_p
    return {
        "units": units,
        "noise_variance": ppca.noise_variance.item(),
        "log_likelihood_nats": ppca.log_likelihood,
        "rate_nats": ppca.rate,
        "log_weight_nats": terms.iwae.mean().item(),
        "log_weight_largest_error_of_an_image_nats": (terms.iwae - log_p).abs().max().item(),
        "kl_nats": terms.kl.mean().item(),
        "elbo_error_nats": noisy.mean().item(),
        "elbo_standard_error_nats": noisy.std().item() / math.sqrt(len(images)),
    }


def trained(images: Tensor, units: int, steps: int) -> dict[str, Any]:
    """A linear VAE trained in float32 with the scale that follows the error, measured in float64."""
    ppca = PPCA.fit(images, units)
    config = ObjectiveConfig(likelihood=LikelihoodConfig(name="gaussian", scale="analytic", value=0.3, decay=0.95))
    vae, curve, started, measuring = start(images, units), [], time.process_time(), 0.0
    for progress in train(vae, images.float(), config, ADAM, batch=len(images), steps=steps, every=steps // 10):
        before = time.process_time()
        terms = measured(vae, images, progress.sigma, samples=1)
        measuring += time.process_time() - before
        gap = ppca.log_likelihood - terms.elbo.mean().item()
        curve.append({"step": progress.step, "cpu_seconds": round(before - started - measuring, 1), "gap_nats": gap})
        print(f"units {units}, step {progress.step}: {gap:.3f} nats below log p(x)", flush=True)
    terms = measured(vae, images, progress.sigma, samples=SAMPLES)
    return {
        "units": units,
        "steps": steps,
        "batch": len(images),
        "curve": curve,
        "elbo_nats": terms.elbo.mean().item(),
        "gap_nats": ppca.log_likelihood - terms.elbo.mean().item(),
        "log_weight_nats": terms.iwae.mean().item(),
        "kl_nats": terms.kl.mean().item(),
        "noise_variance": progress.sigma**2,
    }


def trained_under_beta(images: Tensor, units: int, active: int, beta: float, steps: int) -> dict[str, Any]:
    """A linear VAE trained at the fixed sigma that leaves `active` of its units something to carry."""
    ppca = PPCA.fit(images, units).keeping(active, beta=beta)
    config = ObjectiveConfig(likelihood=LikelihoodConfig(name="gaussian", scale="fixed", value=ppca.sigma), kl=KLConfig(weight=beta))
    vae, statistics = start(images, units), LatentStatistics()
    list(train(vae, images.float(), config, ADAM, batch=len(images), steps=steps, every=steps))
    with torch.no_grad():
        statistics.add(vae.double().encode(images), torch.ones(len(images)))
    return {
        "units": units,
        "steps": steps,
        "beta": beta,
        "sigma": ppca.sigma,
        "eigenvalues_about_beta_sigma_squared": ppca.eigenvalues[active - 1 : active + 1].tolist(),
        "beta_sigma_squared": beta * ppca.sigma**2,
        "active_by_eigenvalue": int(ppca.active.sum()),
        "active_measured": int(statistics.active_units().sum()),
        "rate_nats": ppca.rate,
        "kl_nats": sum(c.kl_nats for c in statistics.channels()),
        "mean_variances": sorted((c.mean_variance for c in statistics.channels()), reverse=True),
        "mean_variances_at_the_optimum": [max(0.0, 1 - beta * ppca.sigma**2 / value) for value in ppca.eigenvalues[:units].tolist()],
    }


def start(images: Tensor, units: int) -> LinearVAE:
    """A random linear VAE in float32, its encoder centred on the mean image: the pixels' mean would else dwarf their variances."""
    torch.manual_seed(0)
    return LinearVAE(images.mean(0).float(), units)


def measured(vae: LinearVAE, images: Tensor, sigma: float, *, samples: int) -> Any:
    """The account in float64 of a network in float32."""
    exact = LinearVAE(vae.get_buffer("center").double(), len(vae.logvar))
    exact.load_state_dict(vae.state_dict())
    return account(exact, images, sigma, samples=samples)


def main() -> None:
    """Measure and write the result."""
    parser = frame.parser(__doc__)
    parser.add_argument(
        "--images", help="a file of small grey images, such as MNIST's test images in parquet; without it nothing is measured"
    )
    parser.add_argument("--units", type=int, nargs="+", default=[2, 20, 50], help="latents of the closed form")
    parser.add_argument("--trained-units", type=int, default=20, help="latents of what is trained")
    parser.add_argument("--steps", type=int, default=1400, help="optimiser steps of the training that shall reach log p(x)")
    parser.add_argument("--beta", type=float, default=30.0)
    parser.add_argument("--active", type=int, default=6, help="units that sigma leaves active under beta")
    parser.add_argument("--beta-steps", type=int, default=250)
    options = parser.parse_args()
    if options.images is None:
        print("no images given, so nothing is measured; add --images FILE")
        return

    images = read(options.images)
    result: dict[str, Any] = {**frame.made_with(describe(torch.device("cpu"))), "images": list(images.shape)}
    result["closed_form"] = [closed_form(images, units) for units in options.units]
    for row in result["closed_form"]:
        print(json.dumps(row), flush=True)
    result["trained"] = trained(images, options.trained_units, options.steps)
    result["trained_under_beta"] = trained_under_beta(images, options.trained_units, options.active, options.beta, options.beta_steps)
    print(json.dumps(result["trained_under_beta"], indent=1), flush=True)
    file = frame.result_file("ppca", result["device"])
    frame.write(file, result)
    frame.say_written(file)


if __name__ == "__main__":
    main()
