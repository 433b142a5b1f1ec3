"""The model card of a pipeline: what it is, how to sample it, how it was trained and on what, what was measured, where it comes from."""

from collections.abc import Mapping, Sequence
from typing import Any

from autoencoder.card import HUB_ID, TAG, Card, hub_dataset, provenance_section, public_name, settings_section, table
from autoencoder.runtime.config import count
from autoencoder.runtime.config_file import plain
from diffusion.config import ProcessConfig, TrainDiffusionConfig
from diffusion.space import LatentSpace

_CLASSES_SHOWN = 20
_NAMES = {
    "frechet": "Fréchet distance of samples to held-out latents",
    "frechet_floor": "... of training latents (what a perfect model would have)",
    "frechet_untrained": "... of an untrained model's samples",
}
_HEADS = {"velocity": "the velocity", "v": "v", "epsilon": "the noise"}
"""What a network gives, in words."""
_SETTINGS = ("data", "conditioning", "denoiser", "process", "sampling", "optimizer", "train")
WEIGHTS, ACCOUNT = "Weights", "Account"
AFTER = ("Measured", "Recipe", "Data", "Provenance")
"""Sections of a run's card that those of an export stand before."""


def model_card(config: TrainDiffusionConfig, space: LatentSpace, *, evaluation: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """The card as Markdown with the hub's front matter. Holds no path: provenance names sources by what they call themselves."""
    data = provenance.get("latents", {}).get("data", [])
    named = list(dict.fromkeys(name for source in data if (name := hub_dataset(source["name"], source["fingerprint"]))))
    kind = "flow-matching" if config.process.name == "flow" else "diffusion"
    card = Card(
        {
            "library_name": "diffusers",
            "pipeline_tag": "unconditional-image-generation",
            "tags": ["diffusers", "latent-diffusion", kind, "dit", TAG],
        },
        {"": _introduction(config, space)},
    )
    card = card.with_front(datasets=named or None)
    if space.labels is not None:
        shown = [f"{i}: {name}" for i, name in enumerate(space.labels[:_CLASSES_SHOWN])]
        more = [f"... {space.classes - _CLASSES_SHOWN} more in `model_index.json`"] if space.classes > _CLASSES_SHOWN else []
        card = card.with_section("Classes", ", ".join(shown + more))
    names = {"loss": _loss_words(config.process), **_NAMES}
    measured = table([(names.get(name, name), f"{metric['mean']:.4g}") for name, metric in evaluation["metrics"].items()])
    told = evaluation.get("frechet_on")
    card = card.with_section("Measured", f"{measured}\n\n{told}" if told else measured)
    settings = {name: value for name, value in plain(config).items() if name in _SETTINGS}
    card = card.with_section("Recipe", f"{table(_recipe(config, space, provenance))}\n\n{settings_section(settings)}")
    card = card.with_section("Data", _data(space, data))
    return card.with_section("Provenance", provenance_section(_published(provenance, config))).text()


def weights_section(variants: Mapping[str, Any], steps: int) -> str:
    """What there is beside fp32, and how far its samples are from those of fp32; `variants` as in `export.json`."""
    rows = [("fp32", "", "", "")]
    for name, told in variants.items():
        load = f'`variant="{name}", torch_dtype=torch.{"float16" if name == "fp16" else "bfloat16"}`'
        rows.append((name, load, f"{told['largest_difference_of_latents']:.2g}", f"{told['psnr_db']:.1f} dB"))
    note = (
        f"Two images of each, {steps} steps, by stock diffusers in a fresh process, beside those of fp32 from the same noise: largest "
        "difference of the normalised latents, and PSNR."
    )
    if "fp16" in variants:
        note += " fp16 is imitated there: its weights, and what each layer gives rounded to it, summed in fp32 as GPUs do."
    return f"{table(rows, ('weights', 'to `from_pretrained`', 'latents', 'images'))}\n\n{note}"


def _introduction(config: TrainDiffusionConfig, space: LatentSpace) -> str:
    channels, height, width = space.shape
    kind = f"Class-conditional ({space.classes} classes)" if space.classes else "Unconditional"
    size = f"DiT {config.denoiser.preset}, patch {config.denoiser.patch_size}"
    lines = [
        "# Latent diffusion pipeline",
        "",
        f"{kind} {process_words(config.process)} ({size}) on {channels} x {height} x {width} latents of a KL autoencoder. A stock "
        "`DiTPipeline`: the per-channel normalisation of the latents is folded into the autoencoder's 1x1 convolutions, and "
        "`scaling_factor` is 1.",
        "",
        "```python",
        "import torch",
        "from diffusers import DiTPipeline",
        "",
        f'pipe = DiTPipeline.from_pretrained("{HUB_ID}")',
        _call(config, space),
        "```",
        "",
        _scheduler(config),
    ]
    return "\n".join(lines)


def process_words(process: ProcessConfig) -> str:
    """What kind of model it is."""
    if process.name == "flow":
        return "flow-matching model"
    return f"variance-preserving diffusion model that predicts {_HEADS[process.head]}"


def _loss_words(process: ProcessConfig) -> str:
    """What the validation loss is of, and what it is where the network gives 0: of the velocity two unit variances, of others one."""
    of = f"Validation loss (squared error of {_HEADS[process.head]} a latent value"
    if process.weight != "unit":
        return f"{of}, weighted over t: {process.weight})"
    return f"{of}; {2 if process.head == 'velocity' else 1} untrained)"


def _recipe(config: TrainDiffusionConfig, space: LatentSpace, provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    network, train, optimizer = config.denoiser.shape(), config.train, config.optimizer
    width, tokens = network["heads"] * network["head_dim"], (space.shape[1] // config.denoiser.patch_size) ** 2
    millions = f", {provenance['parameters'] / 1e6:.1f}M parameters" if "parameters" in provenance else ""
    rate = f"learning rate {optimizer.lr:g}" + (f" (Muon's {optimizer.muon_lr:g})" if optimizer.name == "muon" else "")
    seen, rows = count(train.images, "train.images"), provenance.get("latents", {}).get("training_rows")
    epochs = f", {seen / rows:.1f} epochs of {rows:,} rows" if rows else ""
    return [
        ("Process", f"{process_words(config.process)}; times {config.process.times}, loss weights {config.process.weight}"),
        ("Network", f"{network['layers']} blocks, width {width}, {network['heads']} heads, {tokens} tokens{millions}"),
        ("Optimiser", f"{optimizer.name}, {rate}, {optimizer.schedule}"),
        ("Length", f"{seen:,} latents in batches of {train.batch_size}{epochs}"),
        ("Classes left out in training", f"{config.conditioning.dropout:.0%}" if space.classes else "no classes"),
        *([("Weights", str(provenance["weights"]))] if "weights" in provenance else []),
        ("Precision", str(provenance.get("precision", train.precision))),
    ]


def _data(space: LatentSpace, sources: Sequence[Mapping[str, Any]]) -> str:
    rows = [(public_name(source["name"]), f"{source['images']:,} images") for source in sources]
    rows += [("Rows of latents", f"{space.rows:,}"), ("`encoder_hash`", space.encoder_hash), ("`decoder_hash`", space.decoder_hash)]
    return f"{table(rows)}\n\nThe hashes are those of the autoencoder before its latents' normalisation was folded into it."


def _published(provenance: Mapping[str, Any], config: TrainDiffusionConfig) -> dict[str, Any]:
    """Without paths: of one that a note names, its last part alone."""
    notes = provenance.get("notes", [])
    for path in (config.latents, config.vae, config.init_from):
        if path is not None:
            notes = [note.replace(path, public_name(path)) for note in notes]
    return {**provenance, "notes": notes}


def _scheduler(config: TrainDiffusionConfig) -> str:
    """What may stand in the scheduler's place."""
    euler, process = "`DiTPipeline` runs Euler schedulers wrongly in silence.", config.process
    if process.name == "flow":
        return f"Keep the scheduler or another DPM-Solver++ on flow sigmas: {euler}"
    if (process.schedule, process.head) == ("squaredcos_cap_v2", "epsilon"):
        return (
            f"Keep the scheduler: DDIM would begin where the table has no signal left, of which a predicted noise says nothing, and {euler}"
        )
    ddim = '`DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, timestep_spacing="trailing")`'
    return f"Keep the scheduler or take {ddim}: {euler}"


def _call(config: TrainDiffusionConfig, space: LatentSpace) -> str:
    steps, seed = config.sampling.steps, "generator=torch.manual_seed(0)"
    if not space.classes:
        return f"images = pipe(class_labels=[1000] * 4, guidance_scale=1, num_inference_steps={steps}, {seed}).images"
    labels = [i % space.classes for i in range(4)]
    return f"images = pipe(class_labels={labels}, guidance_scale={config.guidance}, num_inference_steps={steps}, {seed}).images"
