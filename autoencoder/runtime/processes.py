"""What launchers say in the environment, read before torch is imported."""

import os


def is_main_process() -> bool:
    """Whether this process is the first of those that torchrun or accelerate started, or the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def expected_processes() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))
