"""A run under SGD that saves the gradients of every step, a discriminator's among them.

`python -m tests.gradients PROCESSES OUT COMMAND ARGV...`
"""

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from tests.children import together, without_pictures


def main(processes: int, out: Path, argv: list[str]) -> int:
    """Train with plain SGD; the main process writes `gradients.safetensors` and the end's weights and average."""
    import autoencoder.runtime.loop as loop
    from autoencoder.adversarial.player import Discriminator
    from autoencoder.runtime import launch
    from autoencoder.runtime.config import OptimizerConfig
    from autoencoder.runtime.optim import Optimizers
    from diffusion import command

    torch.set_num_threads(1)
    without_pictures()
    saved: dict[str, torch.Tensor] = {}

    def sgd(module: nn.Module, config: OptimizerConfig, **options: object) -> Optimizers:
        names = {p: n for n, p in module.named_parameters() if p.requires_grad}
        return Optimizers({"sgd": torch.optim.SGD(names, lr=config.lr, fused=True)}, names)

    def note(step: int, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                saved[f"{step}/{name}"] = parameter.grad.clone()

    finish, finished = Discriminator.finish, [0]

    def finish_and_note(player: Discriminator, gradients: list[torch.Tensor], images: int) -> torch.Tensor:
        norm = finish(player, gradients, images)
        for name, parameter in player.network.named_parameters():
            saved[f"discriminator-{finished[0]}/{name}"] = parameter.grad.clone()
        finished[0] += 1
        return norm

    loop.build_optimizers = sgd  # type: ignore[assignment]
    Discriminator.finish = finish_and_note  # type: ignore[method-assign]
    launched = launch.launch

    def recorded(config: Any, run: Any, build: Any, **options: Any) -> int:
        accelerator = launch.build_accelerator(config.train)
        assert accelerator.num_processes == processes, f"{accelerator.num_processes} processes, not {processes}"
        code = launched(config, run, build, trainer_options={"on_gradients": note})
        if accelerator.is_main_process:
            save_file(saved, out / "gradients.safetensors")
        return code

    launch.launch = recorded  # type: ignore[assignment]
    code = command.main(argv)
    # Where the system tells: a thread of the group that outlives the command can abort the process on its way out.
    threads = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name], f"threads of the group are left: {threads}"
    return code


def launch(out: Path, processes: int, argv: list[str]) -> None:
    """`train_autoencoder` in so many processes; its run and the gradients are in the folder `out`."""
    out.mkdir()
    together(processes, out / "console", train, processes, out, argv)


def train(processes: int, out: Path, argv: list[str]) -> None:
    """What each of them does."""
    sys.exit(main(processes, out, ["train_autoencoder", *argv, "--out", str(out / "run")]))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
