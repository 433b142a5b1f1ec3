"""Publishing files as a model repository of the hub: what would be sent, and sending it. Torch-free.

A repository gets the files of an export, in one commit, and nothing else.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autoencoder import __version__
from autoencoder.export_folder import published
from autoencoder.runtime.errors import ConfigError, UsageError, first_line, require
from autoencoder.runtime.idle import Idle

if TYPE_CHECKING:
    from huggingface_hub import HfApi

KEY = "push_to_hub"
UNPUBLISHED = Idle(
    KEY, lambda given: given is None, ("private", "dry_run"), "nothing is published. Give --push_to_hub OWNER/NAME with it, or leave it out"
)
_CARD = "README.md"
_WEIGHTS = re.compile(r"(?:(?:transformer|vae)/)?diffusion_pytorch_model[\w.-]*\.(?:safetensors|bin|json)")
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN to a token that may write (huggingface.co/settings/tokens)"


def check_publishing(license: str | None, repository: str | None) -> None:
    """Raise `ConfigError` for a licence or a repository that the hub would refuse by its name."""
    identifier = license is None or re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license)
    require(bool(identifier), "license", license, "give the hub's identifier, in small letters, such as apache-2.0, cc-by-4.0 or other")
    if repository is None:
        return
    # Where nothing is published, the command need not wait for the library.
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    remedy = "give OWNER/NAME: letters, digits, `-`, `_` and `.`, 96 of each at most, without `--`, `..` or `.git` at the end"
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise ConfigError(KEY, repository, remedy) from error
    require("/" in repository, KEY, repository, remedy)


@dataclass(frozen=True)
class Upload:
    """What is to be published, as what."""

    repository: str
    """`OWNER/NAME`."""
    private: bool
    """Whether to make it a private one."""
    folder: Path
    """An export: all of its files are sent."""

    @property
    def files(self) -> dict[str, Path]:
        """Files by their paths in the repository."""
        return {name: self.folder / name for name in published(self.folder)}

    @property
    def url(self) -> str:
        """Where it will be."""
        return f"https://huggingface.co/{self.repository}"


@dataclass(frozen=True)
class Remote:
    """A repository as it is."""

    private: bool
    files: frozenset[str]

    def superseded(self, upload: Upload) -> list[str]:
        """Other weights, of the names that loaders look for, beside those of `upload`: they would be loaded as variants of them."""
        folders = {Path(name).parent for name in upload.files if _WEIGHTS.fullmatch(name)}
        return sorted(name for name in self.files - upload.files.keys() if _WEIGHTS.fullmatch(name) and Path(name).parent in folders)


def log_in(repository: str) -> "HfApi":
    """The hub's client, once the hub has accepted a token; what takes long may start then.

    Raises:
        UsageError: no token, one that is not valid, or no network.
    """
    api = _client()
    try:
        api.whoami()
    except Exception as error:  # huggingface_hub and its HTTP library each raise kinds of their own
        raise _refusal(repository, error) from error
    return api


def publish(upload: Upload, api: "HfApi") -> str:
    """Make the repository where it does not exist and send the files in one commit; what was done, in a line.

    Raises:
        UsageError: the hub refuses, cannot be reached, or has a public repository where a private one is asked for.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

    made = False
    try:
        there = _find(upload.repository, api)
        if there is not None and upload.private and not there.private:
            remedy = f"{upload.repository} exists and is public; make it private in its settings first, give another name, or leave it out"
            raise ConfigError("private", True, remedy)
        if there is None:
            # Without `private` an organisation's own default holds.
            api.create_repo(upload.repository, repo_type="model", private=upload.private or None, exist_ok=True)
            made = True
        stale = [] if there is None else there.superseded(upload)
        operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [CommitOperationDelete(name) for name in stale]
        operations += [CommitOperationAdd(name, file) for name, file in upload.files.items()]
        api.create_commit(upload.repository, operations, commit_message=f"Export of firststage {__version__}", repo_type="model")
    except UsageError:
        raise
    except Exception as error:  # as above
        raise _refusal(upload.repository, error, made=made) from error
    removed = f"; removed {', '.join(stale)}" if stale else ""
    return f"published: {upload.url} ({len(upload.files)} files{removed})"


def describe(upload: Upload) -> str:
    """What `publish` would do, and the card, as text; asks the hub what is there, and sends nothing."""
    try:
        there, told = _find(upload.repository, _client()), ""
    except Exception as error:  # as above
        there, told = None, f"whether it exists could not be asked: {_reason(error)}"
    visibility = "private" if upload.private else "public, unless its owner's default is private"
    if there is not None:
        visibility = "private" if there.private else "public"
        told = "it exists"
        if upload.private and not there.private:
            told += "; --private would be refused: make it private in its settings first"
    told = told or "it would be made"
    held, sizes = (frozenset() if there is None else there.files), {name: file.stat().st_size for name, file in upload.files.items()}
    rows = [(("replaces" if name in held else "sends"), name, _bytes(size)) for name, size in sizes.items()]
    rows += [("removes", name, "other weights") for name in ([] if there is None else there.superseded(upload))]
    width = max(len(name) for _, name, _ in rows)
    card = re.sub(r"<details>.*?</details>", _folded, (upload.folder / _CARD).read_text(encoding="utf-8"), flags=re.DOTALL)
    return "\n".join(
        [
            f"dry run: {upload.url} ({visibility}; {told})",
            *(f"  {what:8}  {name:{width}}  {size:>13}" for what, name, size in rows),
            f"{len(sizes)} files, {_bytes(sum(sizes.values()))}; nothing was sent. The card:",
            "",
            *(f"  | {line}".rstrip() for line in card.splitlines()),
        ]
    )


def _client() -> "HfApi":
    import huggingface_hub

    return huggingface_hub.HfApi(library_name="firststage", library_version=__version__)


def _find(repository: str, api: "HfApi") -> Remote | None:
    """The repository; None where there is none that the token may see."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.model_info(repository)
    except RepositoryNotFoundError:
        return None
    return Remote(bool(info.private), frozenset(file.rfilename for file in info.siblings or ()))


def _refusal(repository: str, error: Exception, *, made: bool = False) -> UsageError:
    from huggingface_hub.errors import LocalTokenNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    owner = repository.split("/")[0]
    if isinstance(error, LocalTokenNotFoundError):
        remedy = f"there is no token; {_LOG_IN}"
    elif status == 401:
        remedy = f"the hub does not accept the token; {_LOG_IN}"
    elif status in (403, 404):
        remedy = f"the token may not write there ({first_line(error)}); give one that may write as {owner}, or another OWNER/NAME"
    elif status is not None:
        remedy = f"the hub refuses: {first_line(error)}"
    else:
        remedy = f"the hub cannot be reached ({_reason(error)}); check the network, and HF_HUB_OFFLINE and HF_ENDPOINT where they are set"
    if made:
        remedy += ". The repository was made and is still empty"
    return ConfigError(KEY, repository, f"{remedy}. Nothing was published")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}".rstrip(":. ")


def _folded(details: re.Match[str]) -> str:
    summary = re.search(r"<summary>(.*?)</summary>", details[0])
    return f"({summary[1] if summary else 'folded away'}: {details[0].count(chr(10)) + 1} lines, folded away)"


def _bytes(size: int) -> str:
    """`921 bytes`, `15.5 MB`."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"
