"""The account of both stages in a pipeline's card: read from an evaluation's JSON, checked to be of these weights. Torch-free."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoencoder.card import hub_dataset, public_name, table
from autoencoder.runtime.errors import ConfigError, first_line
from diffusion.pipeline_path import network_hash

_GIVE = "give what `evaluate_autoencoder --model M --pipeline P --out F.json` wrote of this pipeline"
_PRIORS = {"standard_normal": "N(0, I)", "learned": "this model", "calibrated": "this model, calibrated"}
"""Priors of an account, by what a card calls them."""


@dataclass(frozen=True)
class Account:
    """What a card tells of it."""

    text: str
    """Markdown."""
    model_index: list[dict[str, Any]] | None
    """Bits/dim for the hub, where the images are a split of a data set there and not those that were encoded for the prior."""


def read_account(path: str, folder: Path) -> Account:
    """The account in the JSON file `path`, of the pipeline in `folder`.

    Raises:
        ConfigError: under `account`: no account in it, or one of other weights; with both hashes.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        account, provenance = report["account"], report["provenance"]
        found = {name: provenance[name] for name in ("encoder_hash", "decoder_hash")} | {"network_hash": account["network_hash"]}
        told = Account(_text(account, provenance), _model_index(account, provenance))
    except (OSError, ValueError) as error:
        raise ConfigError("account", path, f"cannot be read as JSON ({first_line(error)}); {_GIVE}") from error
    except KeyError as error:
        raise ConfigError("account", path, f"is no evaluation with an account (no {first_line(error)}); {_GIVE}") from error
    except (TypeError, AttributeError) as error:
        raise ConfigError("account", path, f"is no evaluation with an account; {_GIVE}") from error
    for name, expected in _hashes(folder).items():
        if found[name] != expected:
            remedy = f"it is of other weights\n  {name} there:      {found[name]}\n  of the pipeline: {expected}\n{_GIVE}"
            raise ConfigError("account", path, remedy)
    return told


def _hashes(folder: Path) -> dict[str, str]:
    """What identifies a pipeline: its autoencoder before folding, and its network."""
    try:
        folded = json.loads((folder / "vae" / "preprocessing.json").read_text(encoding="utf-8"))["folded"]["of"]
        return {"encoder_hash": folded["encoder_hash"], "decoder_hash": folded["decoder_hash"], "network_hash": network_hash(folder)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = f"does not tell which autoencoder it has (vae/preprocessing.json: {first_line(error)}); leave --account out"
        raise ConfigError("pipeline", str(folder), remedy) from error


def _text(account: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    # The label's own nats are in no bound on a crop that is given its class.
    labelled = account["labelled"]
    of = "−log p(x|y)" if labelled == account["crops"] else "−log p(x|y) and −log p(x)" if labelled else "−log p(x)"
    priors = [name for name in _PRIORS if name in account]
    rows = [["NLL, E_q[−log p(x|z)]", *[_figure(account["nll_nats"])] * len(priors)]]
    rows += [
        [title, *(_figure(account[name][key]) for name in priors)]
        for title, key in (
            ("Rate, E_q[−log p(z)] − H(q(z|x))", "rate_nats"),
            (f"Bound on {of}", "total_nats"),
            ("Bits/dim", "bits_per_dim"),
        )
        if all(key in account[name] for name in priors)
    ]
    saved, given = account["saved_nats"], "" if not labelled else f", {labelled:,} of them given their class"
    low, high = account["log_snr"]
    seen = " These images are among those that were encoded for the prior, which may know them by heart." if account["same_images"] else ""
    calibrated = " Calibrated: the network's estimate scaled by noise level, which only the bound has and not the samples."
    return "\n".join(
        [
            table(rows, ("nats an image, ± standard error", *(_PRIORS[name] for name in priors))),
            "",
            f"The bound of the whole on {of}, by the prior that is assumed for the latents. The diffusion model saves "
            f"{_figure(saved)} nats an image. On {account['crops']:,} crops of {account['images']:,} images "
            f"({public_name(provenance['data']['source'])}{given}), log SNR from {low:g} to {high:g}."
            f"{seen}{calibrated if 'calibrated' in priors else ''}",
        ]
    )


def _figure(told: Mapping[str, float | None]) -> str:
    error = "" if told["standard_error"] is None else f" ± {told['standard_error']:.2g}"
    return f"{told['mean']:,.5g}{error}"


def _model_index(account: Mapping[str, Any], provenance: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    data = provenance["data"]
    name = hub_dataset(data["source"], data["fingerprint"])
    if name is None or account["same_images"] or "bits_per_dim" not in account["learned"]:
        return None
    metric = {"type": "bits_per_dim", "name": "Bits/dim, a bound", "value": round(account["learned"]["bits_per_dim"]["mean"], 4)}
    result = {
        "task": {"type": "unconditional-image-generation", "name": "Image density"},
        "dataset": {"type": name, "name": name, "split": data["source"].removeprefix(f"{name} ").strip("()")},
        "metrics": [metric],
    }
    return [{"name": "Latent diffusion pipeline", "results": [result]}]
