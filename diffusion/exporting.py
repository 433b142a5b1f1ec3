"""From a finished pipeline to a folder to publish: what the command `export_pipeline` does."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from autoencoder import export_folder, publishing
from autoencoder.card import HUB_ID, Card
from autoencoder.publishing import Upload
from autoencoder.runtime.errors import ConfigError, TrainingError
from autoencoder.runtime.files import replace_text
from diffusion.account_card import read_account
from diffusion.card import ACCOUNT, AFTER, WEIGHTS, weights_section
from diffusion.export import ExportPipelineConfig
from diffusion.pipeline import GATE_STEPS, GATE_TOLERANCE, INDEX
from diffusion.variants import check_fp16, compare, difference_to_own, request, sample_reference, write_variant

CARD = "README.md"
_PUBLISHED = re.compile(
    r"model_index\.json|README\.md|scheduler/scheduler_config\.json|transformer/config\.json|vae/(config|preprocessing)\.json"
    r"|(transformer|vae)/diffusion_pytorch_model(-\d+-of-\d+)?\.safetensors(\.index\.json)?"
)
"""What of a pipeline's folder is published: variants are made anew."""


def export(config: ExportPipelineConfig, folder: Path) -> None:
    """Copy the pipeline in `folder` to `config.out` with what is asked for; nothing is in place before all of it has been sampled."""
    api = None if config.push_to_hub is None or config.dry_run else publishing.log_in(config.push_to_hub)
    account = None if config.account is None else read_account(config.account, folder)
    out = Path(config.out)
    beside = export_folder.begin(out)
    try:
        left = _copy(folder, beside)
        variants, headroom = _variants(config, beside)
        card = Card.parse((beside / CARD).read_text(encoding="utf-8")) if (beside / CARD).is_file() else _plain_card()
        earlier = _repository(folder)
        card = card.with_front(license=config.license).loaded_from(config.push_to_hub or earlier, earlier)
        card = card.with_section(WEIGHTS, weights_section(variants, GATE_STEPS) if variants else None, before=AFTER)
        if account is not None:
            card = card.with_section(ACCOUNT, account.text, before=AFTER[1:])
            # An earlier account's figures are not this one's.
            card = card.without_front("model-index").with_front(**{"model-index": account.model_index})
        replace_text(beside / CARD, card.text())
        told = {"repository": config.push_to_hub or earlier, "variants": variants, "fp16_headroom": headroom}
        export_folder.finish(beside, out, told)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    aside = f"; not published: {', '.join(left)}" if left else ""
    print(f"written to {out} ({len(export_folder.published(out))} files{aside})")
    if config.push_to_hub is not None:
        upload = Upload(config.push_to_hub, config.private, out)
        print(publishing.describe(upload) if api is None else publishing.publish(upload, api))


def _variants(config: ExportPipelineConfig, folder: Path) -> tuple[dict[str, Any], float]:
    """Write the variants; how far each is from fp32, and the headroom of fp16."""
    asked = request(len(json.loads((folder / INDEX).read_text(encoding="utf-8")).get("id2label") or {}))
    try:
        reference = sample_reference(folder, asked)
    except TrainingError as error:
        reason = str(error).removeprefix(f"{folder}: ").replace(str(folder), config.pipeline)
        raise ConfigError("pipeline", config.pipeline, f"{reason}; let the run write it again") from error
    layer, headroom = reference.layer, reference.headroom
    difference = difference_to_own(folder, asked, reference)
    if difference is not None and not difference <= GATE_TOLERANCE:
        remedy = f"stock diffusers samples something else than we do (latents differ by {difference:.2g}); let the run write it again"
        raise ConfigError("pipeline", config.pipeline, remedy)
    beside = "its scheduler is not ours" if difference is None else f"latents differ from our own sampler's by {difference:.1g}"
    print(f"fp32: loaded and sampled by stock diffusers in a fresh process; {beside}; fp16 headroom {headroom:.3g} times ({layer})")
    if "fp16" in config.variants:
        check_fp16(reference)
        _say_upcast(folder)
    variants: dict[str, Any] = {}
    for name in config.variants:
        write_variant(folder, name)
        found = compare(folder, name, asked, reference)
        print(f"{name}: latents differ from those of fp32 by up to {found.latents:.2g}; PSNR of the images {found.psnr_db:.1f} dB")
        variants[name] = found.to_json()
    return variants, headroom


def _copy(folder: Path, beside: Path) -> list[str]:
    """Copy what is published; returns the rest."""
    left = []
    for name in export_folder.published(folder):
        if _PUBLISHED.fullmatch(name):
            (beside / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / name, beside / name)
        elif name != export_folder.RECORD:
            left.append(name)
    return left


def _repository(folder: Path) -> str:
    """What the code of the card in `folder`, which may be an earlier export, loads: HUB_ID as long as that has no name."""
    try:
        return str(json.loads((folder / export_folder.RECORD).read_text(encoding="utf-8"))["repository"])
    except (OSError, ValueError, KeyError, TypeError):
        return HUB_ID


def _say_upcast(folder: Path) -> None:
    if json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8")).get("force_upcast", True):
        print(
            "vae: force_upcast is true (on images its activations come close to where fp16 ends, or nobody has measured them); "
            "DiTPipeline does not read it, and the decoder's on these samples leave enough"
        )


def _plain_card() -> Card:
    code = f'from diffusers import DiTPipeline\n\npipe = DiTPipeline.from_pretrained("{HUB_ID}")'
    front = {"library_name": "diffusers", "pipeline_tag": "unconditional-image-generation", "tags": ["diffusers", "dit"]}
    return Card(front, {"": f"# Latent diffusion pipeline\n\n```python\n{code}\n```"})
