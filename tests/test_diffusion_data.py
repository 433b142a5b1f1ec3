"""Batches of latents: what is held out, functions of seed and position, draws with the stored moments, labels dropped once."""

from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from autoencoder.data.steps import Steps
from autoencoder.latents.reader import Latents
from autoencoder.runtime.config import TrainConfig
from autoencoder.runtime.rng import generator
from diffusion import denoiser
from diffusion.config import ConditioningConfig, DenoiserConfig, LatentsConfig, ProcessConfig, TrainDiffusionConfig
from diffusion.data import LatentBatch, LatentLoader, TrainRows, ValidationRows, hold_out
from diffusion.denoiser import NULL_CLASS
from diffusion.space import LatentSpace, of_latents
from tests.small_latents import encode_photos, write_latents, write_photos, write_vae

CONFIG = TrainDiffusionConfig(
    latents="", out="", process=ProcessConfig(t_mean=0.4, t_std=1.3), conditioning=ConditioningConfig(dropout=0.15)
)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vae(tmp_path_factory.mktemp("vae") / "vae", seed=0)


@pytest.fixture(scope="module")
def latents(vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Latents:
    """Of an untrained encoder, whose posteriors are about as wide as the latents are spread."""
    folder = tmp_path_factory.mktemp("data")
    return Latents(encode_photos(vae, write_photos(folder / "photos"), folder / "latents"))


@pytest.fixture(scope="module")
def space(latents: Latents) -> LatentSpace:
    return of_latents(latents, conditional=True)


@pytest.fixture(scope="module")
def rows(latents: Latents, space: LatentSpace) -> TrainRows:
    return TrainRows(latents, np.arange(len(latents)), space, CONFIG)


# What is held out


def crops(folder: Path, vae: Path, images: int, views: int, lost: tuple[int, ...] = (), seed: int = 0) -> Latents:
    """`views` rows an image, but for the images in `lost`; their values depend on `seed`."""
    id = np.array([i * views + view for i in range(images) if i not in lost for view in range(views)])
    mean = np.random.default_rng(seed).standard_normal((len(id), 1, 2, 2))
    return Latents(write_latents(folder, vae, mean, id=id, rows_per_image=views))


@pytest.mark.parametrize(("images", "views", "most", "held"), [(120, 4, 20, 20), (120, 4, 512, 48), (150, 3, 20, 18), (1000, 1, 7, 7)])
def test_rows_of_an_image_are_held_out_together(tmp_path: Path, vae: Path, images: int, views: int, most: int, held: int) -> None:
    latents = crops(tmp_path / "latents", vae, images, views, lost=(3,))
    training, validation = hold_out(latents, most)
    assert sorted([*training, *validation]) == list(range(len(latents)))
    assert len(validation) == held - (held > len(latents) // 10) * views
    seen, unseen = (set((latents.ids[chosen] // views).tolist()) for chosen in (training, validation))
    assert not seen & unseen
    assert (np.diff(training) > 0).all()
    assert (np.diff(validation) > 0).all()


@pytest.mark.parametrize(("images", "views", "most"), [(1000, 1, 50), (1000, 4, 512), (997, 3, 7), (150, 2, 1000), (500, 1, 1)])
@pytest.mark.parametrize("order", ["ascending", "any"])
def test_held_out_are_the_first_images_of_a_permutation_that_have_so_many_rows(images: int, views: int, most: int, order: str) -> None:
    rng = np.random.default_rng(0)
    ids = np.sort(rng.choice(images * views, images * views * 9 // 10, replace=False))
    ids = ids if order == "ascending" else rng.permutation(ids)

    class Rows:
        rows_per_image = views

        def __len__(self) -> int:
            return len(ids)

    Rows.ids = ids  # type: ignore[attr-defined]
    training, held = hold_out(Rows(), most)  # type: ignore[arg-type]
    wanted, chosen = max(1, min(most, len(ids) // 10)), set[int]()
    for image in generator(0, "held out latents", 0).permutation(np.unique(ids // views)).tolist():
        if chosen and np.isin(ids // views, [*chosen, image]).sum() > wanted:
            break
        chosen.add(image)
    expected = np.isin(ids // views, list(chosen))
    np.testing.assert_array_equal(held, np.flatnonzero(expected))
    np.testing.assert_array_equal(training, np.flatnonzero(~expected))


def test_data_sets_of_few_images_hold_out_rows(tmp_path: Path, vae: Path) -> None:
    training, validation = hold_out(crops(tmp_path / "latents", vae, images=6, views=50), 512)
    assert len(validation) == 30
    assert sorted([*training, *validation]) == list(range(300))
    # Five an image on average; none at all from one has a chance of 1 in 40.
    assert set((validation // 50).tolist()) == set(range(6))


def test_what_is_held_out_depends_on_the_rows_alone(tmp_path: Path, vae: Path) -> None:
    one, other = (crops(tmp_path / str(seed), vae, images=120, views=2, seed=seed) for seed in (0, 1))
    assert all(np.array_equal(*pair) for pair in zip(hold_out(one, 10), hold_out(other, 10), strict=True))
    # A larger share holds the smaller one: rows that one run has validated on are not trained on by the next.
    assert set(hold_out(one, 10)[1].tolist()) < set(hold_out(one, 20)[1].tolist())


# Functions of seed and position


def joined(batches: list[LatentBatch]) -> LatentBatch:
    return LatentBatch(**{name: torch.cat([vars(batch)[name] for batch in batches]) for name in vars(batches[0])})


def assert_same(one: LatentBatch, other: LatentBatch) -> None:
    for name, value in vars(one).items():
        assert torch.equal(value, vars(other)[name]), name


@pytest.mark.parametrize(("microbatch", "world", "workers"), [(None, 1, 0), (None, 3, 0), (3, 1, 0), (3, 2, 0), (2, 2, 2)])
def test_steps_are_the_same_whatever_the_split(rows: TrainRows, microbatch: int | None, world: int, workers: int) -> None:
    # Three epochs of 60 rows; the last step has 4 rows, which three processes cannot share evenly.
    parts = [Steps(images=180, batch_size=11, microbatch=microbatch, rank=rank, world=world) for rank in range(world)]
    loaders = [LatentLoader(rows, steps, first_step=3, workers=workers, pin_memory=False) for steps in parts]
    seen = []
    for split in zip(*loaders, strict=True):
        (step,) = {step for step, _ in split}
        whole = joined([batch for _, batches in split for batch in batches])
        real = LatentBatch(**{name: value[whole.weight > 0] for name, value in vars(whole).items()})
        assert_same(real, rows.batch(range(11 * step, min(11 * step + 11, 180))))
        seen.append(step)
    assert seen == list(range(3, 17))


def test_padding_weighs_nothing_and_breaks_nothing(rows: TrainRows) -> None:
    padding = rows.batch(range(33, 33))
    assert padding.weight.tolist() == [0.0]
    assert padding.latents.shape == (1, *rows.space.shape)
    assert padding.latents.isfinite().all()
    # A process without a row of its own has such a batch.
    (step, batches), *_ = LatentLoader(
        rows, Steps(images=2, batch_size=8, microbatch=None, rank=0, world=4), first_step=0, workers=0, pin_memory=False
    )
    assert (step, [batch.weight.tolist() for batch in batches]) == (0, [[0.0]])


def places(latents: Latents, space: LatentSpace, positions: range, seed: int) -> np.ndarray:
    """The rows at these positions of a run on all rows, found by their means, which `draw=mean` hands out as they are."""
    config = TrainDiffusionConfig(latents="", out="", data=LatentsConfig(draw="mean"), train=TrainConfig(seed=seed))
    means = space.normalize(torch.from_numpy(latents.gather(range(len(latents))).mean))
    batch = TrainRows(latents, np.arange(len(latents)), space, config).batch(positions)
    return np.array([int((means == value).flatten(1).all(1).nonzero()) for value in batch.latents])


def test_an_epoch_has_every_row_once_and_another_seed_another_order(latents: Latents, space: LatentSpace) -> None:
    orders = [places(latents, space, epoch, seed).tolist() for epoch, seed in ((range(60), 0), (range(60, 120), 0), (range(60), 1))]
    assert all(sorted(found) == list(range(60)) for found in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_validation_draws_are_functions_of_the_place(latents: Latents, space: LatentSpace) -> None:
    held = ValidationRows(latents, np.arange(0, 60, 5), space, CONFIG)
    whole, parts = held.read(range(12)), [held.read(range(5)), held.read(range(5, 12))]
    for value, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(value, torch.cat(pieces))
    assert not torch.equal(whole[0][0], whole[0][1])


# Distributions


def test_draws_have_the_stored_moments(rows: TrainRows, latents: Latents, space: LatentSpace) -> None:
    epochs, stored = 60, latents.gather(range(60))
    assert stored.logvar is not None
    drawn = rows.batch(range(60 * epochs))
    row = places(latents, space, range(60 * epochs), seed=0)
    values = space.denormalize(drawn.latents).numpy()
    z = (values - stored.mean[row]) / np.exp(0.5 * stored.logvar[row])
    # Standard normal if mean and variance are right: so are its average, its variance, and those of each value over the draws.
    count = z.size
    assert abs(z.mean()) < 5 / np.sqrt(count)
    assert abs(np.square(z).mean() - 1) < 5 * np.sqrt(2 / count)
    # Wide posteriors and narrow ones alike: what is left of the variance does not go with theirs.
    logvar = stored.logvar[row] - stored.logvar.mean()
    assert abs(((np.square(z) - 1) * logvar).mean()) < 5 * np.sqrt(2 / count) * logvar.std()
    of_rows = np.stack([z[row == number].mean(0) for number in range(60)]) * np.sqrt(epochs)
    assert abs(np.square(of_rows).mean() - 1) < 5 * np.sqrt(2 / of_rows.size)
    assert scipy.stats.kstest(z[:, 0, 0, 0], "norm").pvalue > 1e-4
    # The process's noise is another draw.
    noise = drawn.noise.numpy()
    assert abs((z * noise).mean()) < 5 / np.sqrt(count)
    assert abs(np.square(noise).mean() - 1) < 5 * np.sqrt(2 / count)
    logit = torch.logit(drawn.t).numpy()
    assert scipy.stats.kstest(logit, "norm", args=(0.4, 1.3)).pvalue > 1e-4


def test_normalised_latents_have_mean_0_and_variance_1(rows: TrainRows, latents: Latents, space: LatentSpace) -> None:
    stored = latents.gather(range(60))
    assert stored.logvar is not None
    mean = space.normalize(torch.from_numpy(stored.mean)).double()
    posterior = torch.from_numpy(np.exp(stored.logvar)).double() / torch.tensor(space.std, dtype=torch.float64).view(-1, 1, 1).square()
    torch.testing.assert_close(mean.mean((0, 2, 3)), torch.zeros(4, dtype=torch.float64), atol=1e-6, rtol=0)
    total = mean.var((0, 2, 3), correction=0) + posterior.mean((0, 2, 3))
    torch.testing.assert_close(total, torch.ones(4, dtype=torch.float64), atol=1e-5, rtol=0)
    # Both parts matter here; a posterior's own spread is not lost.
    assert (posterior.mean((0, 2, 3)) > 0.1).all()
    drawn = rows.batch(range(60 * 20)).latents.double()
    # Spread over draws alone: the rows are all there. Five standard errors.
    error = 5 / np.sqrt(drawn[:, 0].numel())
    assert (drawn.mean((0, 2, 3)).abs() < error).all()
    assert ((drawn.var((0, 2, 3)) - 1).abs() < 2 * error).all()
    torch.testing.assert_close(space.normalize(space.denormalize(drawn)), drawn)


# Labels


def test_labels_are_dropped_at_the_configured_rate(rows: TrainRows, latents: Latents) -> None:
    positions = range(60 * 50)
    labels = rows.batch(positions).labels.numpy()
    dropped, share = (labels == NULL_CLASS).mean(), CONFIG.conditioning.dropout
    assert abs(dropped - share) < 5 * np.sqrt(share * (1 - share) / len(positions))
    # The others are those of their rows, each seen 50 times.
    assert set(labels.tolist()) == {0, 1, NULL_CLASS}
    never = TrainRows(latents, rows.rows, rows.space, TrainDiffusionConfig(latents="", out="", conditioning=ConditioningConfig(dropout=0)))
    kept = never.batch(positions).labels.numpy()
    assert np.bincount(kept).tolist() == np.multiply(50, np.bincount(latents.labels_of())).tolist()
    assert (labels[labels != NULL_CLASS] == kept[labels != NULL_CLASS]).all()


def test_labels_are_dropped_in_the_batch_alone(rows: TrainRows) -> None:
    torch.manual_seed(0)
    network = denoiser.build(DenoiserConfig(preset="tiny", layers=3, heads=1, head_dim=16), rows.space.shape).train()
    seen: list[torch.Tensor] = []
    assert network.embedder is not None
    network.embedder.class_embedder.embedding_table.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    batch = rows.batch(range(200))
    with torch.no_grad():
        network(batch.latents, batch.t, batch.labels)
    assert len(seen) == 1
    assert torch.equal(seen[0], batch.labels)


def test_rows_without_a_label_and_runs_without_classes_have_the_null_class(tmp_path: Path, vae: Path) -> None:
    label = np.array([0, 1, -1] * 10)
    latents = Latents(write_latents(tmp_path / "latents", vae, np.random.default_rng(0).standard_normal((30, 4, 2, 2)), label=label))
    config = TrainDiffusionConfig(latents="", out="", conditioning=ConditioningConfig(dropout=0))
    for conditional, expected in ((True, {0: 10, 1: 10, NULL_CLASS: 10}), (False, {NULL_CLASS: 30})):
        space = of_latents(latents, conditional=conditional)
        assert space.labels == (["0", "1"] if conditional else None)
        labels = TrainRows(latents, np.arange(30), space, config).batch(range(30)).labels
        assert dict(zip(*(value.tolist() for value in labels.unique(return_counts=True)), strict=True)) == expected
        held = ValidationRows(latents, np.arange(30), space, config).read(range(30))[2]
        assert held.tolist() == [NULL_CLASS if number < 0 or not conditional else number for number in label]
