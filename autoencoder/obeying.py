"""Images for a model that has its pixel recipe: what does not fit is not a setting's fault but the images'. Torch-free."""

from collections.abc import Iterator
from contextlib import contextmanager

from autoencoder.pixel_recipe import PixelRecipe
from autoencoder.runtime.errors import ConfigError


@contextmanager
def obeying(recipe: PixelRecipe, model: str, *, key: str, given: str | None) -> Iterator[None]:
    """Turn a refusal of a setting that the recipe decides into one of the images, `given` under `key`."""
    try:
        yield
    except ConfigError as error:
        if error.key.rpartition(".")[2] not in recipe.data_settings():
            raise
        # The remedy for a setting follows the finding.
        finding = error.remedy.partition(";")[0]
        raise refusal(recipe, model, key=key, given=given, finding=finding) from error


def refusal(recipe: PixelRecipe, model: str, *, key: str, given: str | None, finding: str) -> ConfigError:
    """What is said of images that a model cannot take."""
    return ConfigError(key, given, f"{finding}; {model} takes {described(recipe)}: give such images, or a model of images like these")


def described(recipe: PixelRecipe) -> str:
    """What files a recipe takes, in words."""
    count = recipe.channels
    words = f"images of {count} channel{'' if count == 1 else 's'}"
    if recipe.bands is not None:
        words += f", bands {', '.join(map(str, recipe.bands))} of a file counted from 0"
    if recipe.low is not None and recipe.high is not None:
        ranges = dict.fromkeys(f"{low:g} to {high:g}" for low, high in zip(recipe.low, recipe.high, strict=True))
        words += f", values from {', '.join(ranges)}"
    else:
        words += ", 8-bit or 16-bit integers"
    return words if recipe.may_miss else f"{words}, none missing"
