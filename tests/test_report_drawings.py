"""What the report draws: pictures of crops, curves, numbers."""

import math
import re

import numpy as np
import pytest
import torch

from autoencoder.report.charts import MOST_POINTS, Line, curves, thin
from autoencoder.report.pictures import GAP, grid, plain_grid, side_by_side
from autoencoder.report.quantities import duration, images_seen, number
from tests.report_pages import crops


def find(crop: np.ndarray, picture: np.ndarray) -> tuple[int, int]:
    """(top, left) of the only place where the crop stands in the picture."""
    windows = np.lib.stride_tricks.sliding_window_view(picture, crop.shape).squeeze(2)
    ((top, left),) = np.argwhere((windows == crop).all(axis=(2, 3, 4))).tolist()
    return top, left


def test_grid_puts_each_reconstruction_below_its_original_in_reading_order() -> None:
    originals, reconstructions = crops(5, seed=1), crops(5, seed=2)
    magnified = np.asarray(grid(originals, reconstructions, columns=3))
    picture = magnified[::16, ::16]  # 8-pixel crops become 128 pixels wide
    assert np.array_equal(picture.repeat(16, 0).repeat(16, 1), magnified)
    above = [find(crop.permute(1, 2, 0).numpy(), picture) for crop in originals]
    below = [find(crop.permute(1, 2, 0).numpy(), picture) for crop in reconstructions]
    assert above == sorted(above)
    assert len({top for top, _ in above[:3]}) == 1
    assert above[3][0] > below[0][0]
    for (top, left), (its_top, its_left) in zip(above, below, strict=True):
        assert left == its_left
        assert 8 < its_top - top < 16
    left_over = picture[above[3][0] :, above[2][1] :]
    assert (left_over == GAP).all()


@pytest.mark.parametrize(("height", "width"), [(8, 8), (40, 64)])
def test_a_plain_grid_is_its_pictures_in_reading_order(height: int, width: int) -> None:
    pixels = torch.randint(0, 256, (5, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    factor = 128 // height
    magnified = np.asarray(plain_grid(pixels, columns=3))
    picture = magnified[::factor, ::factor]
    assert np.array_equal(picture.repeat(factor, 0).repeat(factor, 1), magnified)
    places = [find(crop.permute(1, 2, 0).numpy(), picture) for crop in pixels]
    gap = places[1][1] - width
    assert 1 <= gap < 8
    assert places == [(i // 3 * (height + gap), i % 3 * (width + gap)) for i in range(5)]
    assert picture.shape == (2 * height + gap, 3 * width + 2 * gap, 3)
    assert (picture[height + gap :, 2 * (width + gap) :] == GAP).all()


def test_a_plain_grid_of_fewer_pictures_than_columns_has_no_empty_ones() -> None:
    assert np.array_equal(np.asarray(plain_grid(crops(2), columns=6)), np.asarray(plain_grid(crops(2), columns=2)))


def test_large_crops_keep_their_size_and_grey_ones_their_mode() -> None:
    picture = grid(crops(2, side=150, channels=1), crops(2, side=150, channels=1), columns=8)
    assert picture.mode == "L"
    assert 300 < picture.width < 320


def test_side_by_side_is_the_two_and_a_gap() -> None:
    left, right = crops(1, side=60, seed=1)[0], crops(1, side=60, seed=2)[0]
    picture = np.asarray(side_by_side(left, right))
    assert np.array_equal(picture[:, :60], left.permute(1, 2, 0))
    assert np.array_equal(picture[:, -60:], right.permute(1, 2, 0))
    assert (picture[:, 60:-60] == GAP).all()


def test_pictures_refuse_what_they_cannot_show() -> None:
    with pytest.raises(ValueError, match="float32"):
        grid(crops(1).float(), crops(1), columns=1)
    with pytest.raises(ValueError, match="one shape"):
        grid(crops(2), crops(3), columns=1)
    with pytest.raises(ValueError, match="at least one"):
        plain_grid(crops(0), columns=1)
    with pytest.raises(ValueError, match="4 axes"):
        plain_grid(crops(1)[0], columns=1)
    with pytest.raises(ValueError, match="channels"):
        side_by_side(crops(1, channels=2)[0], crops(1, channels=2)[0])


# Values as text


def test_numbers_read_well() -> None:
    assert number(-12345.678, 1) == "−12,345.7"
    assert number(0.00012345678, None) == "0.0001235"
    assert number(13805.4, None) == "13,805"
    assert number(None, 2) == "—"
    assert number(math.nan, 2) == "not a number"
    assert [images_seen(n) for n in (0, 640, 12_500, 1_500_000)] == ["0", "640", "12.5k", "1.5M"]
    assert [duration(s) for s in (5, 185, 3600 * 26 + 61)] == ["5 s", "3 min 05 s", "26 h 01 min"]


# Charts


def drawn_points(svg: str, colour: int) -> np.ndarray:
    """(x, y) of each vertex of the longest line of a colour."""
    paths = re.findall(rf'<path d="([^"]*)"[^>]*stroke: var\(--series-{colour}\)', svg)
    return np.array([[float(n) for n in pair] for pair in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", max(paths, key=len))])


def test_a_curve_is_its_values_on_straight_scales() -> None:
    rng = np.random.default_rng(0)
    x, y = np.arange(1, 21) * 1000, rng.normal(size=20)
    points = drawn_points(curves([Line(list(x), list(y), 0, "train")], name="a", cut=False), 0)
    assert len(points) == 20
    for data, drawn, direction in ((x, points[:, 0], 1), (y, -points[:, 1], 1)):
        slope, offset = np.polyfit(data, drawn, 1)
        assert slope * direction > 0
        np.testing.assert_allclose(slope * data + offset, drawn, atol=0.02)


def test_a_start_far_off_does_not_flatten_the_rest() -> None:
    y = [1e6, 1e5, *np.linspace(2, 1, 98)]
    line = Line(list(range(100)), y, 0, "validation")
    cut, whole = (drawn_points(curves([line], name="a", cut=cut), 0)[-90:, 1] for cut in (True, False))
    assert np.ptp(cut) > 80  # points of about 140 that the axis is high
    assert np.ptp(whole) < 1


def test_a_short_run_stays_on_the_chart_of_a_long_one() -> None:
    long = Line(list(range(0, 1000, 10)), [1e3] * 2 + [1.0 + i % 2 for i in range(98)], 0, "validation")
    short = Line([1, 2, 3], [30.0, 31.0, 32.0], 1, "validation")
    heights = drawn_points(curves([long, short], name="a"), 1)[:, 1]
    assert (heights > 0).all()


def test_thinning_keeps_the_mean_and_shows_what_was_not_finite() -> None:
    x, y = np.arange(MOST_POINTS * 5.0), np.random.default_rng(0).normal(size=MOST_POINTS * 5)
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) == MOST_POINTS
    assert thin_y.mean() == pytest.approx(y.mean())
    assert thin_x.mean() == pytest.approx(x.mean())
    y[7] = math.nan
    assert np.flatnonzero(np.isnan(thin(x, y)[1])).tolist() == [1]


def test_charts_on_a_page_share_no_ids_and_bring_no_colours() -> None:
    svgs = [curves([Line([0, 1], [1, 2], 0, "validation")], name=name) for name in ("a", "b")]
    ids = [re.findall(r'\bid="([^"]*)"', svg) for svg in svgs]
    assert not set(ids[0]) & set(ids[1])
    for svg, its in zip(svgs, ids, strict=True):
        assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', svg)) <= set(its)
        assert not re.findall(r"#[0-9a-f]{6}\b", svg)
