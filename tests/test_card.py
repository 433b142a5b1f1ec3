"""Model cards: front matter that the hub takes, sections, and nothing of this machine."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from autoencoder import export
from autoencoder.card import Card, hub_dataset, provenance_section, public_name, settings_section, table, without_paths
from autoencoder.data.sources import open_images
from autoencoder.data_config import DataConfig
from diffusion.card import model_card, weights_section
from diffusion.config import ConditioningConfig, ProcessConfig, TrainDiffusionConfig
from tests.children import SMALL, run
from tests.pipelines import parts

TEXT = """---
license: mit
tags:
- a
---

# Title

Words.

```python
## no heading
```

## One

1

## Two

2
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on photos in a folder, by a discretised likelihood."""
    folder = tmp_path_factory.mktemp("secret_place")
    for n in range(24):
        (folder / "photos").mkdir(exist_ok=True)
        Image.radial_gradient("L").rotate(15 * n).resize((40, 40)).convert("RGB").save(folder / "photos" / f"{n}.png")
    source = ["--data.source", str(folder / "photos"), "--data.validation_images=2"]
    likelihood = "--objective.likelihood.name=discretized_logistic"
    assert run([*SMALL, *source, "--train.images=80", likelihood, "--out", str(folder / "run")]) == 0
    return folder / "run"


def exported(checkpoint: Path | str, out: Path, *more: str) -> str:
    """The card of an export."""
    assert export.main(["--checkpoint", str(checkpoint), "--out", str(out), *more]) == 0
    return (out / "README.md").read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    return Card.parse(text).sections[heading]


def test_a_card_is_what_it_was_parsed_from() -> None:
    card = Card.parse(TEXT)
    assert card.text() == TEXT
    assert card.front == {"license": "mit", "tags": ["a"]}
    assert list(card.sections) == ["", "One", "Two"]
    assert card.with_section("Between", "x", before=("Zero", "Two")).text() == TEXT.replace("## Two", "## Between\n\nx\n\n## Two")
    assert card.with_section("Last", "x").text() == TEXT + "\n## Last\n\nx\n"
    assert card.with_section("One", "other").text() == TEXT.replace("\n1\n", "\nother\n")
    assert card.with_section("One", None).text() == TEXT.replace("## One\n\n1\n\n", "")
    assert card.with_front(license=None).text() == TEXT
    assert card.with_front(license="apache-2.0").text() == TEXT.replace("mit", "apache-2.0")


@pytest.mark.parametrize("text", ["# Title\n", "---\n- a\n---\n# Title\n", "---\na: [\n---\n# Title\n"])
def test_front_matter_that_is_none_is_none(text: str) -> None:
    card = Card.parse(text)
    assert card.front == {} and card.sections == {"": "# Title"}


def test_settings_lose_paths_and_arguments_of_own_classes_and_keep_all_else() -> None:
    given = {"source": "/home/me/photos/", "remote": "s3://bucket/birds", "hub": "owner/birds", "n": [1, 2.5, None, "20k"]}
    own = {"class_path": "mine.Images", "init_args": {"root": "/home/me"}}
    assert without_paths({**given, "own": own}) == {
        "source": "photos", "remote": "birds", "hub": "owner/birds", "n": [1, 2.5, None, "20k"], "own": {"class_path": "mine.Images"},
    }  # fmt: skip
    assert public_name("https://me:secret@host.org/birds/0.tar?signature=secret") == "0.tar"
    assert public_name("s3://bucket/birds/?.tar") == "?.tar"
    assert public_name("owner/birds (train)") == "owner/birds (train)"
    assert public_name("/data/owner/birds (train)") == "birds (train)"


def test_only_sources_of_the_hub_are_data_sets_of_the_hub(tmp_path: Path) -> None:
    import datasets

    fingerprint = datasets.Dataset.from_dict({"x": [1]})._fingerprint
    assert hub_dataset("owner/birds (train)", fingerprint) == "owner/birds"
    assert hub_dataset("mnist (test)", fingerprint) == "mnist"
    folder = tmp_path / "birds (train)"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    for config in (DataConfig(source="demo"), DataConfig(source=str(folder))):
        source = open_images(config, split="train")
        assert hub_dataset(Path(source.name).name, source.fingerprint) is None


def test_a_table_holds_bars_and_line_ends() -> None:
    assert table([("a|b", "c\nd")], ("x", "y")) == "| x | y |\n| --- | --- |\n| a\\|b | c d |"


def test_an_autoencoders_card_tells_the_runs_own_figures(trained: Path, tmp_path: Path) -> None:
    text = exported(trained, tmp_path / "out", "--license", "mit")
    front = ModelCard(text).data
    assert (front.license, front.library_name, front.datasets, front.eval_results) == ("mit", "diffusers", None, None)
    report = json.loads((trained / "evaluation.json").read_text())
    for name, title in (("psnr_db", "PSNR"), ("kl_nats", r"KL to N\(0, I\)"), ("bits_per_dim", "Bits/dim, of the ELBO")):
        its = report["metrics"][name]
        assert re.search(rf"\| {title} \| {its['mean']:.4g} \| {its['low']:.4g} to {its['high']:.4g} \|", text), name
    assert report["provenance"]["encoder_hash"] in section(text, "Latents")
    scale = json.loads((trained / "vae" / "config.json").read_text())["scaling_factor"]
    assert f"| `scaling_factor` | {scale:.6g} |" in section(text, "Latents")
    assert "preset: tiny" in section(text, "Training") and "80 crops of 16 pixels of photos in batches of 8" in section(text, "Training")
    assert "| Values that become -1 and 1 | 0 and 255 |" in section(text, "Images")


def test_no_card_holds_a_path_of_this_machine(trained: Path, tmp_path: Path) -> None:
    checkpoint = trained / "checkpoints" / "step-00000005"
    for n, given in enumerate((trained, checkpoint, trained / "vae", tmp_path / "0")):
        text = exported(given, tmp_path / str(n))
        assert "secret_place" not in text and str(tmp_path) not in text, given
    text = exported(checkpoint, tmp_path / "checkpoint")
    assert "Measured" not in Card.parse(text).sections, "it is not the run's end that has been measured"
    assert "| `scaling_factor` | unknown: measure" in section(text, "Latents")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_autoencoders_cards_code_runs(trained: Path, tmp_path: Path, dtype: str) -> None:
    text = exported(trained, tmp_path / "out", "--dtype", dtype)
    code = text.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code.replace("PATH_OR_HUB_ID", str(tmp_path / "out")), names)
    assert names["reconstruction"].shape == names["images"].shape == (1, 3, 16, 16)
    assert names["latents"].shape[1] == names["vae"].config["latent_channels"]
    assert str(names["vae"].dtype).endswith({"fp32": "float32", "bf16": "bfloat16"}[dtype])
    scale = names["vae"].config["scaling_factor"]
    assert float((names["normalised"].float() - names["latents"].float() * scale).abs().max()) < 1e-2 * float(names["latents"].abs().max())


def test_a_card_of_changed_weights_has_no_figures_of_the_old_ones(trained: Path, tmp_path: Path) -> None:
    changed = tmp_path / "run"
    shutil.copytree(trained, changed)
    report = json.loads((changed / "evaluation.json").read_text())
    report["provenance"]["decoder_hash"] = "0" * 64
    (changed / "evaluation.json").write_text(json.dumps(report))
    assert "Measured" not in Card.parse(exported(changed, tmp_path / "out")).sections


@pytest.mark.parametrize("place", ["pipeline/vae", "vae"])
def test_an_autoencoder_within_a_run_of_another_stage_has_a_card_of_its_own(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    diffusion = tmp_path / "diffusion"
    shutil.copytree(trained / "vae", diffusion / place)
    (diffusion / "config.yaml").write_text("latents: latents/\n")
    text = exported(diffusion / "pipeline/vae" if place == "pipeline/vae" else diffusion, tmp_path / "out")
    assert list(Card.parse(text).sections) == ["", "Latents", "Images", "Provenance"]
    said = capsys.readouterr().err
    assert ("left out of the model card: latents: no such setting" in said) == (place == "vae")


def test_figures_on_a_data_set_of_the_hub_go_into_the_model_index(trained: Path, tmp_path: Path) -> None:
    changed = tmp_path / "run"
    shutil.copytree(trained, changed)
    report = json.loads((changed / "evaluation.json").read_text())
    report["provenance"]["data"] |= {"source": "owner/birds (test)", "fingerprint": "0123456789abcdef"}
    (changed / "evaluation.json").write_text(json.dumps(report))
    config = (changed / "config.yaml").read_text()
    (changed / "config.yaml").write_text(re.sub(r"  source: .*", "  source: owner/birds", config, count=1))
    front = ModelCard(exported(changed, tmp_path / "out")).data
    assert front.datasets == ["owner/birds"]
    found = {result.metric_type: result for result in front.eval_results or ()}
    assert found.keys() == {"psnr", "ssim", "bits_per_dim"}
    assert found["psnr"].metric_value == pytest.approx(report["metrics"]["psnr_db"]["mean"], abs=1e-4)
    assert {(result.dataset_type, result.dataset_split) for result in found.values()} == {("owner/birds", "test")}


def test_a_pipelines_card_tells_recipe_and_data_of_the_hub() -> None:
    space = parts().space
    sources = [
        {"name": "owner/birds (train)", "fingerprint": "0123456789abcdef", "images": 500},
        {"name": "/home/me/more", "fingerprint": "0" * 64, "images": 100},
    ]
    provenance = {
        "weights": "the best",
        "latents": {"data": sources, "training_rows": 400_000},
        "parameters": 33_000_000,
        "precision": "bf16",
        "notes": ["the decoder of /home/me/vae"],
    }
    config = TrainDiffusionConfig(
        latents="/home/me/latents", out="/home/me/run", vae="/home/me/vae", process=ProcessConfig(name="vp", prediction="epsilon")
    )
    text = model_card(
        config, space, evaluation={"metrics": {"loss": {"mean": 0.5}}}, provenance={**provenance, "latents": {"data": sources[:1]}}
    )
    assert ModelCard(text).data.datasets == ["owner/birds"]
    assert "flow-matching" not in (ModelCard(text).data.tags or [])
    assert "variance-preserving diffusion model that predicts the noise" in text
    assert "| Validation loss (squared error of the noise a latent value; 1 untrained) | 0.5 |" in text
    assert "33.0M parameters" in section(text, "Recipe") and "| Precision | bf16 |" in section(text, "Recipe")
    assert "| Weights | the best |" in section(text, "Recipe") and "times logit_normal, loss weights unit" in section(text, "Recipe")
    assert "schedule: linear" in section(text, "Recipe")
    assert "| owner/birds (train) | 500 images |" in section(text, "Data")
    assert "/home" not in text and '"the decoder of vae"' in section(text, "Provenance")
    assert "clip_sample=False" in text
    cosine = replace(config, process=replace(config.process, schedule="squaredcos_cap_v2"))
    blind = model_card(cosine, space, evaluation={"metrics": {}}, provenance={})
    assert "clip_sample=False" not in blind and "DDIM would begin where the table has no signal left" in blind
    both = model_card(config, space, evaluation={"metrics": {}}, provenance=provenance)
    assert "| Length | 20,000,000 latents in batches of 256, 50.0 epochs of 400,000 rows |" in section(both, "Recipe")
    assert "| more | 100 images |" in section(both, "Data")
    no_classes = TrainDiffusionConfig(latents="l", out="o", conditioning=ConditioningConfig(dropout=0))
    flow = model_card(no_classes, parts(None).space, evaluation={"metrics": {}}, provenance={})
    assert "flow-matching" in (ModelCard(flow).data.tags or []) and ModelCard(flow).data.datasets is None
    assert "| Classes left out in training | no classes |" in flow


def test_sections_that_are_folded_away_hold_what_they_were_given() -> None:
    given = {"a": {"b": [1, 2]}, "c": "naïve"}
    assert json.loads(provenance_section(given).split("```json\n")[1].split("\n```")[0]) == given
    assert settings_section(given).split("```yaml\n")[1].split("\n```")[0] == "a:\n  b: [1, 2]\nc: naïve"
    figures = {"largest_difference_of_latents": 0.0123, "psnr_db": 61.23}
    assert '| bf16 | `variant="bf16", torch_dtype=torch.bfloat16` | 0.012 | 61.2 dB |' in weights_section({"bf16": figures}, 8)
    assert "imitated" not in weights_section({"bf16": figures}, 8) and "imitated" in weights_section({"fp16": figures}, 8)
