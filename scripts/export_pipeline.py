"""`firststage export_pipeline`, from a checkout without installing it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffusion.command import main

if __name__ == "__main__":
    sys.exit(main(["export_pipeline", *sys.argv[1:]]))
