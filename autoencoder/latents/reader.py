"""Read a folder of latents that `encode_dataset` made: this one file, numpy and torch are enough. Copy it beside a trainer of your own.

    latents = Latents("LATENTS")
    rows = latents.gather([3, 1, 2])                       # float32 arrays (N, c, h, w)
    z = rows.mean + np.exp(0.5 * rows.logvar) * noise      # a draw from the posterior
    z = (z - latents.mean[:, None, None]) / latents.std[:, None, None]

Format: docs/latents-format.md.
"""

import hashlib
import json
import math
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

FORMAT, VERSION, MANIFEST = "firststage-latents", 2, "manifest.json"
MOST_MAPPED = 2**14
"""Shards that are mapped into memory at once: Linux gives a process 65,530 mappings."""
MOST_KEPT = 2**26
"""Bytes of a batch whose memory is kept for the next."""
_DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "I64": np.dtype("<i8")}

_AGAIN = "copy it again, or delete it and run the same encode_dataset command again"

Shape = tuple[int, int, int]
"""(c, h, w) of a row."""


class LatentsError(ValueError):
    """A folder of latents that is incomplete, damaged or not as its manifest says; the message says what to do."""


@dataclass(frozen=True)
class Rows:
    """Rows of a data set of latents, in the order that was asked for."""

    mean: np.ndarray
    """(N, c, h, w) float32: the posterior's means, not normalised."""
    logvar: np.ndarray | None
    """(N, c, h, w) float32: its log-variances; None where only means were stored."""
    label: np.ndarray
    """(N,) int64; -1 where there is none."""
    id: np.ndarray
    """(N,) int64: the row's number in the plan; image = id // rows_per_image."""


class Latents(Dataset[dict[str, torch.Tensor]]):
    """The rows of `folder`, memory-mapped: 0 .. len - 1 in the order of its shards, rows of unreadable images left out.

    Opening reads the manifest and the sizes of the shards; a shard is opened when a row of it is first asked for, and keeps no file
    open. Raises LatentsError for a folder that was not finished, a manifest of another version or edited by hand, and shards that are
    missing or of another size; on opening a shard, for tensors other than the manifest says and labels outside its table. Picklable:
    a copy opens the folder again.
    """

    def __init__(self, folder: str | Path, shape: Sequence[int] | None = None) -> None:
        """`shape` (c, h, w) takes the rows of this shape alone, numbered from 0."""
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.shapes: list[Shape] = [_shape(entry) for entry in self.manifest["shapes"]]
        self.labels: list[str] | None = self.manifest["labels"]
        self.has_logvar = "logvar" in self.manifest["contents"]
        self.rows_per_image: int = self.manifest["rows_per_image"]
        # float64 (c,): (z - mean) / std has zero mean and unit variance in every channel, over draws from the posteriors of all shapes.
        self.mean = np.array(self.manifest["statistics"]["mean"], dtype=np.float64)
        self.std = np.array(self.manifest["statistics"]["std"], dtype=np.float64)
        self._entries: list[dict[str, Any]] = self.manifest["shards"]
        self._only = None if shape is None else _shape(shape)
        if self._only is not None:
            if self._only not in self.shapes:
                raise LatentsError(f"{self.folder}: no rows of shape {self._only}; it has {_listed(self.shapes)}")
            self._entries = [entry for entry in self._entries if _shape(entry["shape"]) == self._only]
            self.shapes = [self._only]
        self._starts = np.cumsum([0, *(entry["rows"] for entry in self._entries)])
        self._opened: dict[int, dict[str, np.ndarray]] = {}
        self._memory = _Memory()
        self._check_sizes()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def shape(self) -> Shape:
        """(c, h, w) of every row; LatentsError where rows differ."""
        if len(self.shapes) > 1:
            raise LatentsError(f"{self.folder}: rows of {_listed(self.shapes)}; take those of one shape: of_shape({self.shapes[0]})")
        return self.shapes[0]

    def of_shape(self, shape: Sequence[int]) -> "Latents":
        """The rows of one shape (c, h, w), numbered from 0; `mean` and `std` stay those of the whole data set."""
        return Latents(self.folder, shape)

    def gather(self, rows: Sequence[int] | np.ndarray) -> Rows:
        """The rows with these numbers, read in the order of the files: quickest for numbers that ascend.

        Raises IndexError for a number outside 0 .. len - 1, and LatentsError for rows of more than one shape, and naming shard and row
        where a value is not finite.
        """
        wanted = np.asarray(rows, dtype=np.int64).reshape(-1)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"row {wanted.min() if wanted.min() < 0 else wanted.max()} of {len(self)}")
        order = np.argsort(wanted, kind="stable")
        ordered = wanted[order]
        shards = np.searchsorted(self._starts, ordered, side="right") - 1
        local = ordered - self._starts[shards]
        cuts = [*np.flatnonzero(np.diff(shards, prepend=-1)).tolist(), len(ordered)]
        numbers = shards[cuts[:-1]].tolist()
        kinds = ("mean", "logvar") if self.has_logvar else ("mean",)
        found = dict(zip(kinds, self._memory.lend((len(kinds), len(wanted), *self._shape_of(numbers))), strict=True))
        found |= {name: np.empty(len(wanted), np.int64) for name in ("label", "id")}
        ascending = bool((order[1:] > order[:-1]).all())
        places, singles = order.tolist(), local.tolist()
        for number, first, last in zip(numbers, cuts, cuts[1:], strict=False):
            tensors = self._opened.get(number) or self._open(number)
            if last - first == 1:
                place, row = places[first], singles[first]
                for name, into in found.items():
                    into[place] = tensors[name][row]
                continue
            for name, into in found.items():
                if ascending and into.dtype == tensors[name].dtype:
                    # Straight to its place: `clip` is what spares numpy's own buffer, the bounds are checked.
                    tensors[name].take(local[first:last], 0, into[first:last], "clip")
                else:
                    into[order[first:last]] = tensors[name][local[first:last]]
        for name in kinds:
            place = not_finite(found[name])
            if place is not None:
                number = int(np.searchsorted(self._starts, wanted[place], side="right")) - 1
                row = wanted[place] - self._starts[number]
                raise LatentsError(f"{self._path(number)}: {name} of row {row} is not finite; {_AGAIN}")
        return Rows(found["mean"], found.get("logvar"), found["label"], found["id"])

    def labels_of(self) -> np.ndarray:
        """The labels of all rows, (N,) int64."""
        return self._column("label")

    @property
    def ids(self) -> np.ndarray:
        """The ids of all rows, (N,) int64; ascending within a shard, and over all where there is one shape."""
        return self._column("id")

    def check(self) -> "Latents":
        """Open every shard, of which otherwise the size alone is known; returns the same latents."""
        for number in range(len(self._entries)):
            self._open(number)
        return self

    def __getitem__(self, row: "int | list[int] | np.ndarray") -> dict[str, torch.Tensor]:
        """`mean`, `logvar` where stored, `label` and `id`: of a row, or of several as one batch."""
        if isinstance(row, (list, np.ndarray)):
            return {name: torch.from_numpy(values) for name, values in vars(self.gather(row)).items() if values is not None}
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[dict[str, torch.Tensor]]:
        """What a DataLoader takes for a batch that it puts together itself."""
        columns = self[rows]
        return [{name: values[i] for name, values in columns.items()} for i in range(len(rows))]

    def __getstate__(self) -> tuple[Path, Shape | None]:
        return self.folder, self._only

    def __setstate__(self, state: tuple[Path, Shape | None]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def _path(self, number: int) -> Path:
        return self.folder / self._entries[number]["file"]

    def _shape_of(self, numbers: list[int]) -> Shape:
        """The one shape of these shards."""
        if len(self.shapes) == 1 or not numbers:
            return self.shapes[0]
        shapes = list(dict.fromkeys(_shape(self._entries[number]["shape"]) for number in numbers))
        if len(shapes) > 1:
            raise LatentsError(f"{self.folder}: rows of {_listed(shapes)} asked for at once; take rows of one shape: of_shape({shapes[0]})")
        return shapes[0]

    def _column(self, name: str) -> np.ndarray:
        found = np.empty(len(self), np.int64)
        for number, (first, last) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            found[first:last] = self._open(number)[name]
        return found

    def _open(self, number: int) -> dict[str, np.ndarray]:
        """The tensors of a shard by name."""
        opened = self._opened.get(number)
        if opened is None:
            shard = Shard(self._path(number))
            shard.open()
            check_shard(shard, self._entries[number], has_logvar=self.has_logvar, classes=None if self.labels is None else len(self.labels))
            if len(self._opened) >= MOST_MAPPED:
                self._opened.pop(next(iter(self._opened)))
            opened = self._opened[number] = shard.tensors
        return opened

    def _check_sizes(self) -> None:
        for entry in self._entries:
            path = self.folder / entry["file"]
            try:
                size = path.stat().st_size
            except OSError as error:
                raise LatentsError(f"{path}: cannot be read ({error.strerror}); {_AGAIN}") from error
            if size != entry["bytes"]:
                raise LatentsError(f"{path}: {size} bytes, the manifest says {entry['bytes']}; {_AGAIN}")


class _Memory:
    """Memory for batches. What nobody holds any more is lent again: pages that are there already take a fraction of the time of others,
    which the system has to find and clear."""

    def __init__(self) -> None:
        self._lent: list[tuple[np.ndarray, weakref.ref[_Lent]]] = []

    def lend(self, shape: tuple[int, ...]) -> np.ndarray:
        """A float32 array of this shape, its values whatever they are."""
        memory, tried = None, []
        # Threads may ask at once: what is taken from the list is seen by one of them alone.
        with suppress(IndexError):
            while memory is None:
                kept, holder = self._lent.pop()
                if kept.shape == shape and holder() is None:
                    memory = kept
                else:
                    tried.append((kept, holder))
        memory = np.empty(shape, np.float32) if memory is None else memory
        lent = _Lent(memory)
        self._lent.extend(reversed(tried[:2]))
        if memory.nbytes <= MOST_KEPT:
            self._lent.append((memory, weakref.ref(lent)))
        return np.asarray(lent)


class _Lent:
    """Lives as long as an array that views it does."""

    def __init__(self, memory: np.ndarray) -> None:
        self.memory, self.__array_interface__ = memory, memory.__array_interface__


class Shard:
    """A safetensors file: an 8-byte length, a JSON header, the tensors' bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, np.ndarray] = {}

    def open(self) -> None:
        """Map the tensors into memory, read-only; LatentsError for one that ends beyond the file or is not as its header says."""
        try:
            size = self.path.stat().st_size
            # numpy's memmap would hold a file descriptor for each shard, of which a process may have a thousand.
            content = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8).numpy() if size else np.empty(0, np.uint8)
        except (OSError, RuntimeError) as error:
            raise LatentsError(f"{self.path}: cannot be read ({getattr(error, 'strerror', None) or error}); {_AGAIN}") from error
        self.load(content)

    def load(self, content: np.ndarray) -> None:
        """The tensors of a file with these bytes, (n,) uint8; LatentsError as of `open`."""
        length = int.from_bytes(content[:8].tobytes(), "little")
        if len(content) < 8 + length:
            raise LatentsError(f"{self.path}: {len(content)} bytes, shorter than its header; {_AGAIN}")
        try:
            header = {name: entry for name, entry in json.loads(content[8 : 8 + length].tobytes()).items() if name != "__metadata__"}
            self.tensors = {name: self._tensor(name, entry, content, 8 + length) for name, entry in header.items()}
        except LatentsError:
            raise
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise LatentsError(f"{self.path}: not a safetensors file, or a damaged header ({error!r}); {_AGAIN}") from error

    def _tensor(self, name: str, entry: dict[str, Any], content: np.ndarray, offset: int) -> np.ndarray:
        first, last = (offset + value for value in entry["data_offsets"])
        if entry["dtype"] not in _DTYPES:
            raise LatentsError(f"{self.path}: {name} has dtype {entry['dtype']}; this reader knows {', '.join(_DTYPES)}")
        dtype = _DTYPES[entry["dtype"]]
        if last > len(content):
            raise LatentsError(f"{self.path}: {len(content)} bytes, but {name} ends at {last}; {_AGAIN}")
        if last - first != dtype.itemsize * math.prod(entry["shape"]):
            raise LatentsError(f"{self.path}: {name} has {last - first} bytes, not those of its shape; {_AGAIN}")
        tensor = content[first:last].view(dtype).reshape(entry["shape"])
        tensor.flags.writeable = False
        return tensor


def check_shard(shard: Shard, entry: dict[str, Any], *, has_logvar: bool, classes: int | None) -> None:
    """LatentsError where the tensors are not those that the manifest's `entry` says, or a label is outside its table of `classes`."""
    shape = _shape(entry["shape"])
    for name, inner in {"mean": shape, **({"logvar": shape} if has_logvar else {}), "label": (), "id": ()}.items():
        wanted = (entry["rows"], *inner)
        held = shard.tensors[name].shape if name in shard.tensors else "no such tensor"
        if held != wanted:
            raise LatentsError(f"{shard.path}: {name}: {held}, the manifest says {wanted}; {_AGAIN}")
    label = shard.tensors["label"]
    outside = label < -1 if classes is None else (label < -1) | (label >= classes)
    if outside.any():
        row = int(np.argmax(outside))
        table = "labels are -1 (none) or more" if classes is None else f"the table has {classes} classes"
        raise LatentsError(f"{shard.path}: row {row} has label {label[row]}, but {table}; mend the source's labels and encode again")


def not_finite(values: np.ndarray) -> int | None:
    """The first of the rows (N, ...) that holds a value that is not finite; None where there is none."""
    # A finite sum has nothing else in it, and takes a fraction of the time; one of finite values that overflows is looked at in full.
    if math.isfinite(torch.from_numpy(values).sum()):
        return None
    finite = np.isfinite(values).reshape(len(values), -1).all(1)
    return None if finite.all() else int(np.argmin(finite))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`; LatentsError where it is missing, edited or of a version that this reader does not know."""
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LatentsError(f"{folder}: no {MANIFEST}, so not finished; run the same encode_dataset command again") from error
    except (OSError, ValueError) as error:
        raise LatentsError(f"{path}: cannot be read ({error}); run encode_dataset again, which rewrites it from the records") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise LatentsError(f"{path}: not the manifest of latents (no `format: {FORMAT}`); give a folder that encode_dataset made")
    if manifest.get("version") != VERSION:
        raise LatentsError(f"{path}: version {manifest.get('version')}, this reader knows {VERSION}; take the reader of that version")
    if manifest.get("sha256") != manifest_digest(manifest):
        raise LatentsError(
            f"{path}: edited since it was written (its sha256 does not fit); run encode_dataset again, which rewrites it from the records"
        )
    return manifest


def manifest_digest(manifest: dict[str, Any]) -> str:
    """SHA-256 over the manifest without its own `sha256`, as JSON with sorted keys and without spaces."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _shape(given: Sequence[int]) -> Shape:
    c, h, w = given
    return c, h, w


def _listed(shapes: list[Shape]) -> str:
    return f"shape{'s' if len(shapes) > 1 else ''} {', '.join(map(str, shapes))}"
