"""A data set of latents gone through: every file, the whole against the manifest, and a report of what its rows are like."""

import functools
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from autoencoder.data.order import spread
from autoencoder.identity import identity
from autoencoder.latents.check import PLAN
from autoencoder.latents.comparing import ANOTHER_LATENT, compare, open_originals, summary
from autoencoder.latents.damage import TOLERANCE, Damage, Looked, deviation, look
from autoencoder.latents.folder import VAE
from autoencoder.latents.peculiarities import DEVIATIONS, SHOWN, TYPES, Measured, duplicates, far_off, rounding_error
from autoencoder.latents.plan import digest
from autoencoder.latents.progress import Progress
from autoencoder.latents.reader import MANIFEST, Latents, LatentsError, read_manifest
from autoencoder.latents.statistics import Moments
from autoencoder.model import AutoencoderKL, narrow
from autoencoder.pretrained import open_pretrained
from autoencoder.runtime.errors import ConfigError, UsageError, first_line
from autoencoder.runtime.files import write_out
from autoencoder.runtime.lock import hold, release
from autoencoder.verify_latents import VerifyConfig

REWRITE = "run the same encode_dataset command again, which rewrites it from the records"
SAMPLED = 256
"""Rows that the cost of storage types is taken from."""


def verify_latents(config: VerifyConfig) -> int:
    """Check the data set, say what was found and write it down; returns the exit code, 1 where there is damage."""
    folder = Path(config.latents)
    damage: list[Damage] = []
    told: dict[str, Any] = {"rows": 0}
    try:
        manifest = read_manifest(folder)
    except LatentsError as error:
        what, _, remedy = str(error).partition("; ")
        damage.append(Damage(MANIFEST, what.removeprefix(f"{folder / MANIFEST}: "), remedy))
    else:
        damage += _verify(config, folder, manifest, told)
    told["damage"] = [{"file": d.file, "what": d.what, "remedy": d.remedy} for d in damage]
    if config.out is not None:
        write_out(config.out, json.dumps(told, indent=1))
        print(f"written to {config.out}")
    if not damage:
        print(f"{folder}: no damage")
        return 0
    for one in damage:
        print(one, file=sys.stderr)
    print(f"{folder}: {len(damage)} {'thing is' if len(damage) == 1 else 'things are'} damaged", file=sys.stderr)
    if config.mend:
        _mend(folder, damage)
    return 1


def _verify(config: VerifyConfig, folder: Path, manifest: dict[str, Any], told: dict[str, Any]) -> list[Damage]:
    """Fill `told`, print it, and return what is wrong."""
    planless = _check_plan(folder, manifest)
    # Before terabytes are read for an answer that a wrong source would keep back.
    originals = open_originals(folder, config.data) if config.decode and not planless else None
    looked = _look(config, folder, manifest)
    damage = [one for each in looked for one in each.damage]
    vae, wrong = _open_vae(folder, manifest)
    damage += [*planless, *wrong]
    whole = not any(each.damage for each in looked)
    if whole:
        damage += _check_whole(manifest, looked, told)
    rows = sum(len(each.ids) for each in looked)
    told |= {"rows": rows, "shards": len(looked), "bytes": sum(each.bytes for each in looked), "rows_hash": manifest["rows_hash"]}
    measured = [each.measured for each in looked if each.measured is not None]
    if rows:
        ids = np.concatenate([each.ids for each in looked])
        _describe(Measured.joined(measured), ids, functools.partial(_name, folder, manifest, looked), told)
    if not whole:
        print("damaged shards are left out of this, and statistics and images are not compared")
    if not whole or not rows:
        return damage
    latents = Latents(folder)
    _describe_rounding(latents, told)
    if originals is not None and vae is not None:
        compared = compare(latents, vae, config.decode, originals)
        told["decoded"] = summary(compared)
        damage += _say_compared(told["decoded"], folder, manifest, looked)
    return damage


def _look(config: VerifyConfig, folder: Path, manifest: dict[str, Any]) -> list[Looked]:
    """All shards, several at once."""
    threads = config.threads or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    progress, begun, looked = Progress(manifest["rows"], 0, verb="verified"), time.monotonic(), []
    shards = range(len(manifest["shards"]))
    with ThreadPoolExecutor(threads) as pool:
        for number, each in zip(shards, pool.map(functools.partial(look, folder, manifest), shards), strict=True):
            progress.advance(manifest["shards"][number]["rows"])
            looked.append(each)
    progress.close(finished=True)
    read = sum(each.bytes for each in looked) / 2**20
    print(f"files      {3 * len(looked)} of {len(looked)} shards, {read:,.1f} MiB, {read / (time.monotonic() - begun):,.1f} MiB/s")
    return looked


def _check_plan(folder: Path, manifest: dict[str, Any]) -> list[Damage]:
    """Whether the plan is there and that of the manifest, or one that more images were appended to."""
    try:
        plan = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        told = plan.pop("sha256")
        if told != digest(plan):
            what = "has been edited (its sha256 does not fit)"
        elif plan["segments"][: len(manifest["segments"])] != manifest["segments"] or plan["recipe"] != manifest["recipe"]:
            what = "is not the plan of these rows"
        else:
            return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        what = f"cannot be read ({error!r})"
    return [Damage(PLAN, what, "put it back: rows are read without it, but no shard is made again and no image appended")]


def _open_vae(folder: Path, manifest: dict[str, Any]) -> tuple[AutoencoderKL | None, list[Damage]]:
    """The autoencoder beside the latents, and what is wrong with it."""
    remedy = f"delete {VAE}/ and run the same encode_dataset command again, which writes it anew"
    if not (folder / VAE).is_dir():
        return None, [Damage(f"{VAE}/", "is missing", remedy)]
    try:
        opened = open_pretrained(str(folder / VAE), key="latents")
        vae = narrow(opened.vae)
    except Exception as error:
        # Whatever a damaged file makes of the libraries that read it.
        return None, [Damage(f"{VAE}/", f"cannot be opened ({first_line(error)})", remedy)]
    found = identity(vae, manifest["recipe"]["pixels"])
    wrong = [
        Damage(f"{VAE}/", f"its {name} is {getattr(found, name)[:16]}..., the manifest says {manifest[name][:16]}...", remedy)
        for name in ("encoder_hash", "decoder_hash")
        if getattr(found, name) != manifest[name]
    ]
    return (None if wrong else vae), wrong


def _check_whole(manifest: dict[str, Any], looked: list[Looked], told: dict[str, Any]) -> list[Damage]:
    """Rows and statistics of all shards together against the manifest."""
    damage = []
    ids = np.concatenate([each.ids for each in looked])
    lost = {row for bad in manifest["bad"] for row in range(bad["rows"][0], bad["rows"][1] + 1)}
    planned = sum(segment["images"] for segment in manifest["segments"]) * manifest["rows_per_image"]
    if len(ids) != manifest["rows"]:
        damage.append(Damage(MANIFEST, f"{manifest['rows']:,} rows, its shards have {len(ids):,}", REWRITE))
    unique = np.unique(ids)
    if len(unique) != len(ids):
        damage.append(Damage(MANIFEST, f"{len(ids) - len(unique):,} ids are in several shards", "encode the data set again"))
    elif (
        len(ids) + len(lost) != planned or (len(ids) and ids.max() >= planned) or lost & set(unique[np.isin(unique, sorted(lost))].tolist())
    ):
        what = f"{planned:,} rows were planned, {len(ids):,} are there and {len(lost):,} are listed as unreadable (`bad`)"
        damage.append(Damage(MANIFEST, what, "encode the data set again"))
    moments = functools.reduce(Moments.merge, (each.moments for each in looked if each.moments is not None))
    if moments.count:
        off = deviation(moments.statistics(), manifest["statistics"])
        told["statistics"] = {"largest_deviation": off, **moments.statistics()}
        print(f"statistics {off:.1e} standard deviations off the manifest's, {moments.count:,} values a channel")
        if not off <= TOLERANCE:
            damage.append(Damage(MANIFEST, f"`statistics` are {off:.3g} standard deviations off those of the rows", REWRITE))
    return damage


def _describe(measured: Measured, ids: np.ndarray, name: Any, told: dict[str, Any]) -> None:
    """Equal rows and rows far off, printed and told."""
    repeats, groups = duplicates(measured.digest)
    told["duplicates"] = {"rows": repeats, "groups": [[{"id": int(ids[n]), "name": name(n)} for n in group] for group in groups]}
    print(f"duplicates {repeats:,} rows repeat another bit for bit" + (":" if repeats else ""))
    for group in told["duplicates"]["groups"][:5]:
        print("  " + " = ".join(f"{row['id']} ({row['name']})" for row in group[:5]))
    told["outliers"] = {}
    for kind, words, values in (("norm", "norm", measured.norm), ("kl", "KL", measured.kl)):
        distance = far_off(values)
        worst = np.argsort(-np.abs(distance), kind="stable")[: min(SHOWN, int((distance != 0).sum()))]
        listed = [
            {"id": int(ids[n]), "name": name(n), "value": float(values[n]), "deviations": round(float(distance[n]), 2)} for n in worst
        ]
        told["outliers"][kind] = {"rows": int((distance != 0).sum()), "median": float(np.median(values)), "worst": listed}
        print(f"outliers   {int((distance != 0).sum()):,} rows whose {words} is more than {DEVIATIONS:g} robust deviations off")
        for row in listed[:5]:
            print(f"  {row['id']} ({row['name']}): {row['value']:.4g}, {row['deviations']:+.1f} deviations")


def _describe_rounding(latents: Latents, told: dict[str, Any]) -> None:
    """What each storage type's rounding is, beside the posterior's own width."""
    squares: dict[str, list[np.ndarray]] = {name: [] for name in TYPES}
    for shape in latents.shapes:
        rows = latents.of_shape(shape)
        read = rows.gather(spread(len(rows), max(1, SAMPLED * len(rows) // len(latents))))
        std = latents.std[:, None, None] if read.logvar is None else np.exp(0.5 * read.logvar.astype(np.float64))
        for name, errors in squares.items():
            errors.append(np.square(rounding_error(read.mean, name) / std).reshape(-1))
    told["rounding"] = {name: float(np.sqrt(np.concatenate(errors).mean())) for name, errors in squares.items()}
    whose = "the posterior's" if latents.has_logvar else "the channel's"
    listed = ", ".join(f"{name} {100 * value:.2g}%" for name, value in told["rounding"].items())
    print(f"rounding   of means, in % of {whose} standard deviation: {listed}; stored: {latents.manifest['dtype']}")


def _say_compared(told: dict[str, Any], folder: Path, manifest: dict[str, Any], looked: list[Looked]) -> list[Damage]:
    """Print what a comparison came to; the rows that are not of their images as damage."""
    if told["psnr_db"] is not None:
        quality, distance = told["psnr_db"], told["distance"]
        print(
            f"decoded    {told['rows']} rows, PSNR to their images {quality['mean']:.2f} dB, least {quality['least']:.2f}; encoded again "
            f"they are {distance['mean']:.1e} standard deviations off, at most {distance['most']:.1e}"
        )
    lost = [f"{name} {'equal' if value is None else f'{value:.1f} dB'}" for name, value in told["rounding_psnr_db"].items()]
    if lost:
        print(f"  decoded from narrower types, PSNR to the decoded rows: {', '.join(lost)}")
    for row in told["far_below"]:
        print(f"  {row['id']} ({row['name']}): {row['psnr_db']:.2f} dB, far below the others")
    for name in told["unreadable"]:
        print(f"  {name}: can be read no more")
    ids, damage = [each.ids for each in looked], []
    for row in told["others"]:
        shard = next(n for n, held in enumerate(ids) if row["id"] in held)
        file = manifest["shards"][shard]["file"]
        off = row["distance"] > ANOTHER_LATENT
        what = (
            f"row of id {row['id']} is not the latent of {row['name']} ({row['distance']:.2f} standard deviations off)"
            if off
            else f"row of id {row['id']} has label {row['label']}, {row['name']} has {row['source_label']}"
        )
        remedy = (
            f"if the image is what it was, delete {Path(file).stem}.json (or give --mend) and run the same encode_dataset command again"
        )
        damage.append(Damage(file, what, remedy, shard))
    return damage


def _name(folder: Path, manifest: dict[str, Any], looked: list[Looked], place: int) -> str:
    """The image of the row at `place` among those that were looked at."""
    for entry, each in zip(manifest["shards"], looked, strict=True):
        if place < len(each.ids):
            return str(pyarrow.parquet.read_table(folder / entry["table"]["file"], columns=["name"])["name"][place].as_py())
        place -= len(each.ids)
    raise IndexError(place)


def _mend(folder: Path, damage: list[Damage]) -> None:
    """Delete the records of the shards that are to be made again, and the manifest, which does not hold without them."""
    manifest = read_manifest(folder) if any(one.shard is not None for one in damage) else None
    shards = sorted({one.shard for one in damage if one.shard is not None})
    if manifest is None:
        print("--mend: no shard is to be made again; see above")
        return
    if any(one.file == PLAN for one in damage):
        raise UsageError(f"--mend: {folder / PLAN} is damaged, and shards cannot be made again without it; put it back first")
    notes: list[str] = []
    try:
        lock = hold(folder, notes)
    except ConfigError as error:
        raise UsageError(f"--mend: {error}") from error
    try:
        # The manifest last: without it the next run would believe the records that are left.
        for shard in shards:
            (folder / manifest["shards"][shard]["file"]).with_suffix(".json").unlink(missing_ok=True)
        (folder / MANIFEST).unlink()
    except OSError as error:
        raise UsageError(f"--mend: {folder}: cannot be changed ({error.strerror}); see to it that it can be written") from error
    finally:
        release(lock)
    records = "the record of 1 shard" if len(shards) == 1 else f"the records of {len(shards)} shards"
    print(f"--mend: {records} and {MANIFEST} are deleted; run the same encode_dataset command again")
