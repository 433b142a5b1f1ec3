"""Settings that another setting leaves without effect, refused where they were given all the same. Torch-free."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jsonargparse import Namespace

from autoencoder.runtime.command_line import CommandLine
from autoencoder.runtime.config_file import plain
from autoencoder.runtime.errors import ConfigError


@dataclass(frozen=True)
class Idle:
    """Some values of `switch` leave `keys` without effect; all are dotted keys of one group."""

    switch: str
    idles: Callable[[Any], bool]
    """Whether a value of `switch` does."""
    keys: Sequence[str]
    remedy: str
    """Why, and what to do; `{value}` stands for that of `switch`."""

    def check(self, line: CommandLine, values: Callable[[str], Any], defaults: Namespace) -> None:
        """Refuse those of `keys` that were given where they can only be a mistake.

        They may come from a file that a later one, or the command line, has switched off; as defaults; and from a file that gives the whole
        group, which is a record of a configuration (`--print_config`, a run's `config.yaml`).

        Raises:
            ConfigError: the first of them, the others named.
        """
        if not self.idles(values(self.switch)):
            return
        switched = line.rank(self.switch)
        idle = [key for key in self.keys if self._meant(key, line, values, defaults) and line.rank(key) >= switched]
        if idle:
            also = f" (so would {', '.join(idle[1:])})" if idle[1:] else ""
            remedy = self.remedy.format(value=values(self.switch))
            raise line.located(ConfigError(idle[0], plain(values(idle[0])), f"it would have no effect{also}: {remedy}"))

    def _meant(self, key: str, line: CommandLine, values: Callable[[str], Any], defaults: Namespace) -> bool:
        """Whether it was given, by someone who did not just write everything down."""
        if line.rank(key) < 0 or values(key) is None:
            return False
        if line.on_command_line(key):
            return True
        return plain(values(key)) != plain(defaults.get(key)) and not line.whole_group(key)


OPTIMIZER = Idle(
    "optimizer.name",
    lambda name: name != "muon",
    ("optimizer.muon_lr", "optimizer.muon_momentum"),
    "optimizer.name is {value}. If it is meant, give optimizer.name=muon with it, else leave it out",
)
"""What has no effect beside what in the optimiser of either stage."""
AVERAGE = Idle(
    "train.ema_halflife_images",
    lambda halflife: halflife is None,
    ("train.ema_rampup",),
    "train.ema_halflife_images is null, so that there is no half-life to shorten. Give one, or leave it out",
)
"""The same of the moving average."""
