"""What a run logs: `metrics.jsonl`, one JSON object a line, and accelerate's trackers by name."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autoencoder.runtime.errors import ConfigError


class MetricsFile:
    """Lines of named scalars. Every line is on its way to the disk when `append` returns: a killed process loses none."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, line: Mapping[str, Any]) -> None:
        """Write a line. JSON has no NaN or infinity: such values become null and their names join the line's list `nonfinite`."""
        names = [key for key, value in line.items() if isinstance(value, float) and not math.isfinite(value)]
        written = {**line, **dict.fromkeys(names)}
        if names:
            written["nonfinite"] = sorted({*line.get("nonfinite", ()), *names})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(written, allow_nan=False) + "\n")

    def cut_back(self, step: int) -> None:
        """Take away the lines of later steps, and a line torn by a crash: the log of a run that goes on from `step`.

        Returns to this step (phase `rollback`) are taken away, too: the checkpoint knows of them, and they are written again.
        """
        if not self.path.exists():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _step(line) < step or (_step(line) == step and json.loads(line).get("phase") != "rollback")]
        partial = self.path.with_name(f"{self.path.name}.partial")
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)


class Trackers:
    """accelerate's trackers by name (`tensorboard`, `wandb`, ...), for the main process to log to."""

    def __init__(self, names: Sequence[str], folder: Path, *, settings: Mapping[str, Any], resume_step: int) -> None:
        """Start trackers for the run in `folder`: tensorboard writes to `folder/tensorboard`.

        `settings` (dotted) goes to those that show a run's configuration. tensorboard hides what it had of
        steps after `resume_step`. Raises `ConfigError` for a tracker that is unknown or not installed.
        """
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        installed = sorted(str(name) for name in get_available_trackers())
        for name in names:
            known = name in LOGGER_TYPE_TO_CLASS
            if name not in installed:
                remedy = f"which is not installed (pip install {name.replace('_', '-')})" if known else "which accelerate does not know"
                raise ConfigError("log.trackers", name, f"{remedy}; give names among {', '.join(installed)}, or [] for none")
        self._trackers = []
        for name in names:
            kind = LOGGER_TYPE_TO_CLASS[name]
            if name == "tensorboard":
                tracker = kind("tensorboard", str(folder), purge_step=resume_step + 1)
            else:
                tracker = kind("firststage", *([str(folder)] if kind.requires_logging_directory else []))
            tracker.start()
            if name != "tensorboard":
                tracker.store_init_configuration(dict(settings))
            self._trackers.append(tracker)

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Send named scalars of a step."""
        for tracker in self._trackers:
            tracker.log(dict(values), step=step)

    def close(self) -> None:
        """Flush and end the trackers."""
        for tracker in self._trackers:
            tracker.finish()


def _step(line: str) -> float:
    """The step of a line; infinite for a torn one."""
    try:
        return float(json.loads(line)["step"]) if line.endswith("\n") else math.inf
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf
