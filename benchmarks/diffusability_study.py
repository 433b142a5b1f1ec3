"""Which cheap figures of an autoencoder foretell how well a diffusion model samples its latents: small VAEs, the same tiny DiT on each.

Ten VAEs of CIFAR-10 (KL weight, latent channels, equivariance), each measured on the test images; on the latents of each the same DiT
from several seeds, by the same number of images. Quality is the Fréchet distance of its unguided samples to the test images, in the
features of a classifier that is trained here on the same training images; that of the VAE's reconstructions stands beside it. Rank
correlations (Spearman) of each figure with the mean quality over seeds, with intervals by a bootstrap over VAEs. One thread. Writes
benchmarks/results/diffusability-study-<device>.json after each run; what it has is not made again.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import frame
import numpy as np
from commands import command, folder_name, trained

LENGTH = ["--train.images=40k", "--train.batch_size=16", "--train.ema_halflife_images=2k", "--log.validate_every_images=40k"]
NETWORK = ["--model.block_out_channels=[16,32,64]", "--objective.likelihood.name=laplace", "--objective.likelihood.scale=learned"]
NETWORK += ["--objective.kl.schedule=constant", "--objective.kl.anneal_images=0"]


def vae(weight: float, channels: int, equivariance: float = 0.0) -> list[str]:
    """Settings of a VAE: KL weight, latent channels (8 x 8 sites), weight of the equivariance term."""
    told = [f"--objective.kl.weight={weight}", f"--model.latent_channels={channels}"]
    return told + ([f"--objective.equivariance.weight={equivariance}", "--objective.equivariance.share=0.5"] if equivariance else [])


VAES = {
    "beta 1, 4 channels": vae(1, 4),
    "beta 4, 4 channels": vae(4, 4),
    "beta 16, 4 channels": vae(16, 4),
    "beta 1, 8 channels": vae(1, 8),
    "beta 4, 8 channels": vae(4, 8),
    "beta 16, 8 channels": vae(16, 8),
    "beta 4, 16 channels": vae(4, 16),
    "beta 16, 16 channels": vae(16, 16),
    "beta 4, 4 channels, equivariance": vae(4, 4, 0.3),
    "beta 4, 8 channels, equivariance": vae(4, 8, 0.3),
}
DIFFUSION = ["--config=demo", "--denoiser.patch_size=2", "--train.images=40k", "--log.validate_every_images=40k", "--sampling.evaluate=512"]
SAMPLES = 2000
CHEAP = {
    "rate": "KL to N(0, I), nats",
    "account": "rate under the diffusion model, nats",
    "psnr": "PSNR, dB",
    "reconstruction": "Fréchet distance of reconstructions",
    "decoder_error": "equivariance error of the decoder",
    "encoder_error": "equivariance error of the encoder",
    "high": "share of latent energy above half of Nyquist",
    "loss": "validation loss of the diffusion model",
    "own": "Fréchet distance in the latents themselves",
}
"""Figures that need no classifier, and in words; the last two, and the account, need the diffusion model."""
BOOTSTRAPS = 2000


def pictures(folder: Path) -> np.ndarray:
    """The numbered PNGs of a folder, (N, 32, 32, 3) uint8."""
    from PIL import Image

    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in sorted(folder.glob("[0-9]*.png"))])


def autoencoder(name: str, options: argparse.Namespace) -> Path:
    """The trained VAE, and its latents of the training images beside it."""
    folder = options.runs / folder_name(name) / "autoencoder"
    data = [f"--data.source={options.train}", f"--data.validation_source={options.test}"]
    trained(folder, "train_autoencoder", "--config=cifar10", *data, *NETWORK, *LENGTH, *VAES[name])
    latents = folder.parent / "latents"
    if not (latents / "manifest.json").exists():
        command("encode_dataset", f"--model={folder}", f"--data.source={options.train}", "--data.workers=0", f"--out={latents}")
    return folder


def reconstructions(folder: Path, images: Any) -> Any:
    """Reconstructions of the posterior modes, (N, 3, 32, 32), rounded to 8 bit."""
    import torch

    from autoencoder.model import decode, encode, narrow
    from autoencoder.pretrained import open_pretrained

    network = narrow(open_pretrained(str(folder)).vae)
    with torch.no_grad():
        made = torch.cat([decode(network, encode(network, part).mode()) for part in images.split(100)])
    return ((made.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def measure(name: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """One diffusion run on the latents of a VAE: quality of its samples, loss, distance in the latents, and the account."""
    import classifier

    from diffusion.frechet import frechet_distance

    folder = options.runs / folder_name(name) / f"diffusion-{seed}"
    trained(folder, "train_diffusion", *DIFFUSION, f"--latents={folder.parent / 'latents'}", f"--train.seed={seed}")
    network, reference = options.judge
    drawn = folder / "samples"
    told = ["--guidance=1", f"--images={SAMPLES}", "--sampler=heun", "--steps=20", f"--seed={seed}"]
    command("sample", f"--pipeline={folder}", *told, f"--out={drawn}")
    quality = frechet_distance(classifier.features_of(network, classifier.to_images(pictures(drawn))), reference)
    shutil.rmtree(drawn)
    metrics = json.loads((folder / "evaluation.json").read_text())["metrics"]
    loss, own = metrics["loss"]["mean"], metrics["frechet"]["mean"]
    return {"quality": round(quality, 3), "loss": round(loss, 4), "own": round(own, 3), "account": account(name, folder, options)}


def account(name: str, pipeline: Path, options: argparse.Namespace) -> float:
    """Nats of an image's latents under the diffusion model, less the posterior's entropy: the rate that the account of the whole has."""
    out = pipeline / "account.json"
    told = [f"--model={pipeline.parent / 'autoencoder'}", f"--pipeline={pipeline}", f"--data.source={options.test}"]
    command("evaluate_autoencoder", *told, "--data.workers=0", "--account.images=500", "--account.price=false", f"--out={out}")
    return round(json.loads(out.read_text())["account"]["calibrated"]["rate_nats"]["mean"], 2)


def figures(name: str, options: argparse.Namespace) -> dict[str, float]:
    """What the VAE alone says, on the test images."""
    import classifier

    from diffusion.frechet import frechet_distance

    folder = autoencoder(name, options)
    out = folder / "test.json"
    argv = [f"--model={folder}", f"--data.source={options.test}", "--diffusability=true", "--data.workers=0", f"--out={out}"]
    command("evaluate_autoencoder", *argv)
    report = json.loads(out.read_text())
    metrics, told = report["metrics"], report["diffusability"]
    network, reference = options.judge
    back = classifier.features_of(network, reconstructions(folder, options.images))
    return {
        "rate": round(metrics["kl_nats"]["mean"], 2),
        "psnr": round(metrics["psnr_db"]["mean"], 3),
        "elbo": round(metrics["elbo_nats"]["mean"], 2),
        "reconstruction": round(frechet_distance(back, reference), 3),
        "decoder_error": round(told["decoder_error"], 4),
        "encoder_error": round(told["encoder_error"], 4),
        "high": round(told["spectrum"]["latents"]["octaves"][0]["share"], 4),
    }


def correlations(vaes: dict[str, Any]) -> dict[str, Any]:
    """Spearman's rank correlation of each cheap figure with quality, over the VAEs that have all of both; 95% by bootstrap."""
    from scipy.stats import spearmanr

    rows = [told for told in vaes.values() if told.get("seeds")]
    if len(rows) < 4:
        return {}
    quality = np.array([np.mean([run["quality"] for run in told["seeds"].values()]) for told in rows])
    rng, found = np.random.default_rng(0), dict[str, Any]()
    for key in CHEAP:
        value = np.array([told[key] if key in told else np.mean([run[key] for run in told["seeds"].values()]) for told in rows])
        chosen = [rng.integers(0, len(rows), len(rows)) for _ in range(BOOTSTRAPS)]
        drawn = [spearmanr(value[pick], quality[pick]).statistic for pick in chosen if len(set(pick.tolist())) > 2]
        low, high = np.nanquantile(drawn, [0.025, 0.975])
        test = spearmanr(value, quality)
        found[key] = {"rank_correlation": round(float(test.statistic), 3), "low": round(float(low), 3), "high": round(float(high), 3)}
        found[key]["p_value"] = round(float(test.pvalue), 4)
    return found


def main() -> None:
    """Measure and write."""
    parser = frame.parser(__doc__)
    parser.add_argument("--train", type=Path, help="CIFAR-10's training images as a parquet file with columns image and label")
    parser.add_argument("--test", type=Path, help="test images, alike")
    parser.add_argument("--runs", type=Path, help="folder for the runs")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1], help="seeds of the diffusion models")
    parser.add_argument("--only", nargs="*", choices=list(VAES), help="VAEs; the others stay as the result file has them")
    options = parser.parse_args()
    if not (options.train and options.test and options.runs):
        print("diffusability_study: left out; give --train, --test and --runs to measure it")
        return
    import classifier
    import torch

    torch.set_num_threads(1)
    options.runs.mkdir(parents=True, exist_ok=True)
    device = frame.device_name(one_thread=True)
    file = frame.result_file("diffusability-study", device)
    result: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {**frame.made_with(device), "vaes": {}}
    network, accuracy = classifier.trained(options.runs / "classifier.safetensors", options.train, options.test)
    options.images, _ = classifier.read(options.test)
    options.judge = network, classifier.features_of(network, options.images)
    result["classifier"] = {"test_accuracy": round(accuracy, 4), "floor": round(floor(options), 3)}
    for seed in options.seeds:
        for name in options.only or VAES:
            told = result["vaes"].setdefault(name, {"seeds": {}})
            if "rate" not in told:
                told |= figures(name, options)
            if str(seed) not in told["seeds"]:
                told["seeds"][str(seed)] = measure(name, seed, options)
                print(name, seed, told["seeds"][str(seed)], flush=True)
            result["correlations"] = correlations(result["vaes"])
            frame.write(file, result)
    frame.say_written(file)


def floor(options: argparse.Namespace) -> float:
    """The distance of as many training images as there are samples to the test images."""
    import classifier

    from diffusion.frechet import frechet_distance

    network, reference = options.judge
    images, _ = classifier.read(options.train)
    return frechet_distance(classifier.features_of(network, images[:: len(images) // SAMPLES][:SAMPLES]), reference)


if __name__ == "__main__":
    main()
