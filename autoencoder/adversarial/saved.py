"""The discriminator's weights beside a run's: saved at its end, taken along by the next phase."""

from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import nn

from autoencoder.runtime.errors import UsageError, first_line
from autoencoder.runtime.files import partial, put

FILE = "discriminator.safetensors"
"""Its name in a run's folder, and in a checkpoint's."""


def save_discriminator(network: nn.Module, folder: Path) -> None:
    """Write its weights into a run's folder, in one move."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}, partial(folder / FILE))
    put(folder / FILE)


def start_from(network: nn.Module | None, path: str) -> str | None:
    """Give `network` the discriminator of the run or checkpoint at `path`; what a log should say of it.

    Raises:
        UsageError: a file that cannot be read.
    """
    file = Path(path) / FILE
    if not file.is_file():
        return None if network is None else f"init_from: {path} has no discriminator; it starts anew"
    if network is None:
        return f"init_from: {path} has a discriminator, which this run has no use for (objective.adversarial.name is `none`)"
    try:
        state = file.with_name("adversarial.safetensors")
        if state.is_file() and not load_file(state)["accuracy.mass"]:
            return f"init_from: the discriminator of {path} had not begun to train; it starts anew"
        found = load_file(file)
    except Exception as error:  # safetensors raises several kinds, each a damaged or foreign file
        raise UsageError(f"{file}: cannot be read: {first_line(error)}; remove it to start the discriminator anew") from error
    own = network.state_dict()
    for name in [*own, *found]:
        ours, theirs = (tuple(state[name].shape) if name in state else "none" for state in (own, found))
        if ours != theirs:
            return (
                f"init_from: the discriminator of {path} has {name} of shape {theirs}, this run's {ours}; it starts anew. To take it "
                "along, give the objective.adversarial.width, layers and norm of its run, or its `own`"
            )
    network.load_state_dict(found)
    return f"init_from: the discriminator of {path} goes on"
