"""`export_autoencoder`: a checkpoint or a finished run as a folder or file that other tools load."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from autoencoder.data.paths import check_source
from autoencoder.data.remote import check_local
from autoencoder.evaluate import EvaluateDataConfig
from autoencoder.export_folder import check_place
from autoencoder.model_path import check_model, is_checkpoint
from autoencoder.publishing import UNPUBLISHED, Upload, check_publishing
from autoencoder.runtime import cli
from autoencoder.runtime.errors import ConfigError, UsageError, require
from autoencoder.runtime.lock import make_folder

if TYPE_CHECKING:
    from autoencoder.model import AutoencoderKL


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write an autoencoder's weights for other tools."""

    checkpoint: str
    """A checkpoint (`RUN/checkpoints/step-*`, its moving average; its latents have not been measured), a finished run, a diffusers
    folder, a hub id, or a single file."""
    out: str
    """Folder to write (`diffusers`), or file ending in .safetensors (`ldm`)."""
    format: Literal["diffusers", "ldm"] = "diffusers"
    """`diffusers`: a folder for `AutoencoderKL.from_pretrained`; `ldm`: one file with the names of the LDM code base, which ComfyUI and
    others read, with configuration and pixel recipe in its metadata."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the written weights."""
    scaling_factor: float | None = None
    """What diffusion models multiply the latents with, where `checkpoint` does not tell: a checkpoint before its run's end, a single file
    of others (0.18215 for Stable Diffusion 1 and 2, 0.13025 for SDXL, 0.3611 for FLUX)."""
    shift_factor: float | None = None
    """What they subtract before, with `scaling_factor` (0.1159 for FLUX; most have none)."""
    subfolder: str | None = None
    """Subfolder of `checkpoint` (such as `vae`)."""
    revision: str | None = None
    """Hub revision of `checkpoint`."""
    variant: str | None = None
    """Weight variant of `checkpoint` (such as `fp16`)."""
    audit: str | None = None
    """Images (as for `data.source`) to measure the fp16 headroom on, which sets `force_upcast` in the exported configuration; null
    keeps it as it is: measured at the end of a run, true for a checkpoint that has not been audited."""
    audit_resolution: int | None = None
    """Side of the central crops of `audit` in pixels; null takes that of training."""
    license: str | None = None
    """Licence of the weights for the model card, by the hub's identifier (`apache-2.0`, `cc-by-4.0`, `other`, ...); null names none."""
    push_to_hub: str | None = None
    """Publish what is written as this repository of the hub, `OWNER/NAME`, made where it does not exist. Takes a token (`hf auth login`,
    or HF_TOKEN)."""
    private: bool = False
    """Make it a private repository."""
    dry_run: bool = False
    """Write `out`, say what `push_to_hub` would send, and send nothing."""

    def __post_init__(self) -> None:
        check_local(self.out, "out")
        check_publishing(self.license, self.push_to_hub)
        require(self.scaling_factor is None or self.scaling_factor > 0, "scaling_factor", self.scaling_factor, "give a factor above 0")
        alone = self.shift_factor is not None and self.scaling_factor is None
        require(not alone, "shift_factor", self.shift_factor, "give scaling_factor with it")
        if self.format == "ldm":
            for key in ("license", "push_to_hub"):
                remedy = "a single file has no model card and is not published; leave it out, or give format=diffusers with it"
                require(getattr(self, key) is None, key, getattr(self, key), remedy)
            require(self.out.endswith(".safetensors"), "out", self.out, "give a file name ending in .safetensors for format `ldm`")
        else:
            check_place(self.out)
        resolution = self.audit_resolution
        remedy = "leave it out unless there is an `audit` that it is for"
        require(resolution is None or self.audit is not None, "audit_resolution", resolution, remedy)
        require(resolution is None or resolution >= 8, "audit_resolution", resolution, "give at least 8 pixels")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return cli.run(lambda: _export(argv))


def _export(argv: list[str] | None) -> int:
    config = cli.parse(
        ExportConfig,
        argv,
        prog="firststage export_autoencoder",
        description="Write an autoencoder's weights for other tools.",
        idle=(UNPUBLISHED,),
    )
    check_model(config.checkpoint, "checkpoint", config.subfolder, config.variant)
    if config.audit is not None:
        check_source(config.audit, "audit")
    import torch

    from autoencoder import artifact, export_folder, model, publishing
    from autoencoder.card import HUB_ID
    from autoencoder.experimental.saved import describe, find_families, left_out, save_families
    from autoencoder.model_card import model_card
    from autoencoder.pretrained import open_pretrained
    from autoencoder.single_file import save_single_file

    api = None if config.push_to_hub is None or config.dry_run else publishing.log_in(config.push_to_hub)
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.dtype]
    opened = open_pretrained(
        config.checkpoint, subfolder=config.subfolder, revision=config.revision, variant=config.variant, key="checkpoint"
    )
    vae, recipe = opened.vae, opened.preprocessing
    worst = max(float(p.detach().abs().max()) for p in vae.parameters())
    if dtype == torch.float16 and worst > 65504:
        raise UsageError(f"dtype: fp16 cannot hold these weights (largest {worst:.3g}, fp16 ends at 65504); give bf16 or fp32")
    if model.is_widened(vae):
        kept = "are left out" if config.format == "ldm" else "go into likelihood.safetensors"
        print(f"per-pixel scale: stock code has no place for the decoder's log scales; these rows of conv_out {kept}")
    families = find_families(vae, config.checkpoint, config.subfolder)
    if config.audit is not None:
        _audit(vae, recipe, config)
    if families is not None:
        print(describe(families.config) if config.format == "diffusers" else left_out(families.config))
    if config.scaling_factor is not None:
        remedy = f"{config.checkpoint} tells its own, {vae.config['scaling_factor']:g}: leave it out"
        require(not opened.scale_known, "scaling_factor", config.scaling_factor, remedy)
        vae.register_to_config(scaling_factor=config.scaling_factor, shift_factor=config.shift_factor)
    known = opened.scale_known or config.scaling_factor is not None
    if not known:
        print(_unknown_scale(config.format, is_checkpoint(config.checkpoint)))
    out = Path(config.out)
    if config.format == "ldm":
        make_folder(out.absolute().parent, "the export")
        described = None if recipe is None else artifact.describe(vae, recipe)
        save_single_file(vae, out, preprocessing=described, scale_known=known, dtype=dtype)
    else:
        beside = export_folder.begin(out)
        try:
            card = model_card(vae, recipe, checkpoint=config.checkpoint, dtype=config.dtype, scale_known=known)
            card = card.with_front(license=config.license).loaded_from(config.push_to_hub or HUB_ID)
            (beside / "README.md").write_text(card.text(), encoding="utf-8")
            if recipe is None:
                artifact.save_stock(model.narrow(vae).to(dtype), beside)
                if not known:
                    artifact.save_preprocessing({artifact.SCALE_UNKNOWN: True}, beside)
            else:
                told = recipe if known else {**recipe, artifact.SCALE_UNKNOWN: True}
                artifact.save_autoencoder(vae, beside, preprocessing=told, likelihood=opened.likelihood, dtype=dtype)
            if families is not None:
                save_families(families, beside)
            export_folder.finish(beside, out, {"dtype": config.dtype})
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    print(f"written to {out} ({config.format}, {config.dtype})")
    if config.push_to_hub is not None:
        upload = Upload(config.push_to_hub, config.private, out)
        print(publishing.describe(upload) if api is None else publishing.publish(upload, api))
    return 0


def _unknown_scale(format: str, checkpoint: bool) -> str:
    """What is said of a scaling factor that nobody has told."""
    written = "stays 1" if format == "diffusers" else "is left out"
    if checkpoint:
        return (
            f"scaling_factor {written}: the latents of a checkpoint have not been measured. Export the finished run, whose have been, or "
            "give --scaling_factor, 1 / their standard deviation (encode_dataset measures that)"
        )
    return f"scaling_factor {written}: the file does not tell it. Give --scaling_factor as its diffusion models have it"


def _audit(vae: "AutoencoderKL", preprocessing: dict[str, Any] | None, config: ExportConfig) -> None:
    """Measure the headroom, say it, and set `force_upcast` in the network's configuration."""
    import torch

    from autoencoder.artifact import pixels_of
    from autoencoder.data.loader import ValidationSet
    from autoencoder.data.sources import open_evaluation
    from autoencoder.evaluation_text import headroom
    from autoencoder.headroom import measure_headroom
    from autoencoder.measuring import crops_of
    from autoencoder.model import downsampling
    from autoencoder.obeying import obeying
    from autoencoder.probing import MOST_CROPS

    assert config.audit is not None
    resolution, recipe = config.audit_resolution, pixels_of(vae, preprocessing)
    try:
        data = crops_of(EvaluateDataConfig(resolution=resolution), config.audit, preprocessing, recipe)
    except ConfigError as error:
        raise ConfigError("audit_resolution", resolution, error.remedy) from None
    factor = downsampling(vae)
    if data.resolution % factor:
        raise ConfigError("audit_resolution", data.resolution, f"give a multiple of {factor}, the network's downsampling factor")
    side = data.resolution // factor
    latent_shape = (int(vae.config["latent_channels"]), side, side)
    with obeying(recipe, config.checkpoint, key="audit", given=config.audit):
        images = open_evaluation(data, split=None, images=MOST_CROPS)
    crops = ValidationSet(images, data, seed=0, batch_size=1, latent_shape=latent_shape)
    found = measure_headroom(vae, crops, recipe, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    vae.to("cpu").register_to_config(force_upcast=found.force_upcast)
    print(headroom(found.report()))
