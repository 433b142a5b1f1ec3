"""The shards of a plan that are not done, in words. Torch-free."""

from collections.abc import Sequence

from autoencoder.latents.plan import Plan

SHOWN = 8
"""Ranges of shards that a message names."""


def not_done(plan: Plan, missing: Sequence[int]) -> str:
    """`shards 3, 7-9 of 120 (of the images of photos/) are not done; run ...`."""
    found = ranges(missing)
    shown = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found[:SHOWN])
    more = f" and {sum(last - first + 1 for first, last in found[SHOWN:]):,} more" if len(found) > SHOWN else ""
    sources = list(dict.fromkeys(_source(plan, first) for first, _ in found))
    return (
        f"{'shard' if len(missing) == 1 else 'shards'} {shown}{more} of {plan.shards} ({' and '.join(sources)}) "
        f"{'is' if len(missing) == 1 else 'are'} not done; run encode_dataset for {'it' if len(missing) == 1 else 'them'}, "
        "with these images and --only encode, or without --only"
    )


def ranges(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending numbers as ranges, first and last of each."""
    members = set(numbers)
    return list(zip([n for n in numbers if n - 1 not in members], [n for n in numbers if n + 1 not in members], strict=True))


def _source(plan: Plan, shard: int) -> str:
    """The images that a shard is of, as one gives them."""
    source = plan.segment_of(shard).source
    return f"data.own {source['name']}" if "own" in source else f"data.source {source['name']}"
