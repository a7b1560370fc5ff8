"""Positions by value, against formulas written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmx.errors import InputError
from mmx.layers import positions as P  # noqa: N812


def test_grid_coordinates_are_row_major():
    np.testing.assert_array_equal(P.grid_coordinates((2, 3)), [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]])
    assert P.grid_coordinates((2, 3, 4)).shape == (24, 3)


def test_sincos_is_the_formula():
    table = np.asarray(P.sincos(np.arange(7)[:, None], 6))
    for place in range(7):
        angles = [place / 10_000 ** (i / 3) for i in range(3)]
        np.testing.assert_allclose(table[place], np.concatenate([np.sin(angles), np.cos(angles)]), atol=1e-6)
        angles = [place / 10_000 ** (i / 2) for i in range(3)]
        closed = P.sincos(np.asarray([[place]]), 6, closed=True)[0]
        np.testing.assert_allclose(closed, np.concatenate([np.sin(angles), np.cos(angles)]), atol=1e-6)
    far = 4000 / 10_000 ** (np.arange(3) / 3)
    np.testing.assert_allclose(P.sincos(np.asarray([[4000]]), 6)[0], [*np.sin(far), *np.cos(far)], atol=1e-7)


def test_interleaved_is_the_formula():
    table = P.interleaved(2000, 6)
    for place in (0, 5, 1999):
        for k in range(6):
            angle = place / 10_000 ** (2 * (k // 2) / 6)
            np.testing.assert_allclose(table[place, k], (np.sin, np.cos)[k % 2](angle), atol=1e-7)


@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 4)])
def test_sincos_gives_each_axis_its_share(grid):
    coordinates, width = P.grid_coordinates(grid), 26
    table, share = np.asarray(P.sincos(coordinates, width)), 2 * (width // (2 * len(grid)))
    for axis in range(len(grid)):
        own = P.sincos(coordinates[:, axis : axis + 1], share)
        np.testing.assert_allclose(table[:, axis * share : (axis + 1) * share], own, atol=1e-6)
    assert not table[:, len(grid) * share :].any()
    assert len(np.unique(table.round(5), axis=0)) == len(table)
    with pytest.raises(InputError, match="too small"):
        P.sincos(coordinates, 2 * len(grid) - 1)


def test_fourier_is_the_formula():
    found = np.asarray(P.fourier(P.grid_coordinates((5, 9)), 3, (5, 9)))
    assert found.shape == (45, 2 * (2 * 3 + 1))
    for index, (row, column) in enumerate(P.grid_coordinates((5, 9))):
        expected = []
        for place, size in ((row, 5), (column, 9)):
            x = 2 * place / (size - 1) - 1
            f = np.linspace(1, size / 2, 3)
            expected += [*np.sin(np.pi * x * f), *np.cos(np.pi * x * f), x]
        np.testing.assert_allclose(found[index], expected, atol=1e-5)


def test_resampling(rng):
    table = rng.standard_normal((12, 5)).astype("f")
    assert P.resample(table, (3, 4), (3, 4)) is table
    assert P.resample(table, (3, 4), (6, 8)).shape == (48, 5)
    flat = np.full((12, 5), 0.7, "f")
    np.testing.assert_allclose(P.resample(flat, (3, 4), (5, 2)), 0.7, rtol=1e-5)
    ramp = P.grid_coordinates((8,)).astype("f")  # a slope stays a slope away from the borders
    inner = np.asarray(P.resample(ramp, (8,), (16,)))[4:12, 0]
    np.testing.assert_allclose(np.diff(inner), 0.5, atol=0.02)


def test_sampling_a_table_equals_linear_resampling(rng):
    table = rng.standard_normal((12, 5)).astype("f")
    for rows, columns in ((3, 4), (6, 8), (5, 4)):
        place = P.grid_coordinates((rows, columns))[None]
        found = P.sample(table, (3, 4), place, np.asarray([[rows, columns]]))
        expected = jax.image.resize(table.reshape(3, 4, 5), (rows, columns, 5), "linear", antialias=False)
        np.testing.assert_allclose(found[0], expected.reshape(-1, 5), atol=1e-5)


def test_sampling_by_corners_is_interpolation_along_both_axes(rng):
    table = rng.standard_normal((12, 5)).astype("f")
    for rows, columns in ((3, 4), (6, 8), (5, 1)):
        found = P.sample(
            table, (3, 4), P.grid_coordinates((rows, columns))[None], np.asarray([[rows, columns]]), how="align_corners"
        )
        for feature in range(5):
            expected = table[:, feature].reshape(3, 4)
            expected = np.stack([np.interp(np.linspace(0, 2, rows), range(3), column) for column in expected.T], 1)
            expected = np.stack([np.interp(np.linspace(0, 3, columns), range(4), row) for row in expected])
            np.testing.assert_allclose(found[0, :, feature].reshape(rows, columns), expected, atol=1e-5)


def test_sampling_a_table_smoothly_equals_linear_resampling(rng):
    table = rng.standard_normal((35, 5)).astype("f")
    for rows, columns in ((3, 4), (6, 8), (5, 2), (1, 1)):
        place = P.grid_coordinates((rows, columns))[None]
        found = P.sample(table, (5, 7), place, np.asarray([[rows, columns]]), how="antialias")
        expected = jax.image.resize(table.reshape(5, 7, 5), (rows, columns, 5), "linear", antialias=True)
        np.testing.assert_allclose(found[0], expected.reshape(-1, 5), atol=1e-5)


def test_rotary_scores_depend_on_distance_only(rng):
    query, key = (rng.standard_normal((1, 1, 2, 8)).astype("f") for _ in range(2))

    def score(i, j):
        return np.einsum("blhk,blhk->h", *(P.rotate(x, np.asarray([[n]]), 100.0) for x, n in ((query, i), (key, j))))

    np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-4)
    assert not np.allclose(score(7, 3), score(7, 4))
    np.testing.assert_allclose(P.rotate(query, np.zeros((1, 1)), 100.0), query)
    with pytest.raises(InputError, match="odd"):
        P.rotate(query[..., :7], np.zeros((1, 1)), 100.0)


def test_rotary_is_the_formula(rng):
    x = rng.standard_normal((2, 5, 3, 8)).astype("f")
    found = P.rotate(x, np.arange(5)[:, None], 10_000.0)
    for place in range(5):
        for pair in range(4):
            angle = place * 10_000.0 ** (-pair / 4)
            a, b = x[:, place, :, pair], x[:, place, :, pair + 4]
            np.testing.assert_allclose(found[:, place, :, pair], a * np.cos(angle) - b * np.sin(angle), atol=1e-5)
            np.testing.assert_allclose(found[:, place, :, pair + 4], b * np.cos(angle) + a * np.sin(angle), atol=1e-5)


def test_a_place_on_every_axis_is_a_place_on_one(rng):
    x = rng.standard_normal((1, 6, 2, 8)).astype("f")
    line = np.arange(6)[:, None]
    np.testing.assert_allclose(P.rotate(x, np.tile(line, 3), 100.0), P.rotate(x, line, 100.0))
    per_example = jnp.broadcast_to(line, (1, 6, 1))
    np.testing.assert_allclose(P.rotate(x, per_example, 100.0), P.rotate(x, line, 100.0))


def test_distance_buckets():
    """Values of T5's own function for 32 buckets up to 128."""
    distance = np.asarray([0, 1, 7, 8, 12, 16, 127, 128, 1000, -1, -7, -8, -20, -128])
    expected = [0, 17, 23, 24, 25, 26, 31, 31, 31, 1, 7, 8, 10, 15]
    np.testing.assert_array_equal(P.distance_buckets(distance, 32), expected)


def test_distance_buckets_of_the_past():
    """T5's decoder: all buckets for what is behind; one bucket for all that is still to come."""
    behind = [0, 0, 1, 2, 3, 4, 4, 5, 7, 7, 7, 7]  # 4 + 4 log(8 / 4) / log(10 / 4) is 7.03
    distance = -np.asarray([-5, 0, 1, 2, 3, 4, 5, 6, 8, 10, 11, 500])
    np.testing.assert_array_equal(P.distance_buckets(distance, 8, 10, past=True), behind)


def test_box_geometry():
    box = jnp.asarray([[0.1, 0.2, 0.5, 0.9]])
    np.testing.assert_allclose(P.box_geometry(box, 4), box)
    np.testing.assert_allclose(P.box_geometry(box, 5)[0, 4], 0.4 * 0.7, rtol=1e-5)
    np.testing.assert_allclose(P.box_geometry(box, 7)[0, 4:], [0.4, 0.7, 0.28], rtol=1e-5)
    with pytest.raises(InputError, match="4, 5 or 7"):
        P.box_geometry(box, 6)
