"""firststage's own commands as the benchmarks run them: as processes of one thread, whose CPU seconds are told. Measures nothing itself."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import frame

QUIET = ["--log.trackers=[]", "--log.progress=false", "--data.workers=0"]
"""Settings of training runs that nobody watches."""


def command(*argv: str) -> float:
    """Run a firststage command on one thread; the CPU seconds that it took. Ends the benchmark where it fails."""
    code = "import sys; from diffusion.command import main; sys.exit(main(sys.argv[1:]))"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code, *argv], cwd=frame.ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def trained(folder: Path, *argv: str) -> float:
    """Run a training command into `folder`, unless it is finished there; the CPU seconds that it took in all."""
    note = folder / "cpu_seconds.json"
    if not (folder / "finished.json").exists():
        spent = command(*argv, *QUIET, "--out", str(folder))
        note.write_text(json.dumps(spent + (json.loads(note.read_text()) if note.exists() else 0.0)))
    return float(json.loads(note.read_text()))


def folder_name(run: str) -> str:
    """The folder of a run by its name in words."""
    return run.replace(",", "").replace(" ", "-")
