"""From what data sets hold to raw arrays: sound, video, boxes, meshes, tables, code, codes."""

import textwrap

import numpy as np
import pytest

from mmx.data.audio import log_mel, log_power, mel_filters, power_spectrum, stack_frames
from mmx.data.code import data_flow
from mmx.data.codes import PADDING, UNKNOWN, Codebook, Vocabulary, code_hierarchy
from mmx.data.geometry import COCO_BONES, farthest_points, layout_boxes, sample_points, skeleton, unit_sphere
from mmx.data.table import column_ranks, table_tokens
from mmx.data.video import sample_frames
from mmx.errors import InputError


def tone(frequency, seconds=0.5, rate=16_000):
    return np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate).astype("f")


def test_power_spectrum_is_a_windowed_fourier_transform(rng):
    x = rng.standard_normal(1000).astype("f")
    found = power_spectrum(x, 400, 160, 512)
    assert found.shape == (1 + (1000 - 400) // 160, 257)
    for t in range(len(found)):
        frame = x[t * 160 : t * 160 + 400] * np.hanning(401)[:400]
        n, k = np.arange(400), np.arange(257)[:, None]
        np.testing.assert_allclose(
            found[t], np.abs((frame * np.exp(-2j * np.pi * k * n / 512)).sum(1)) ** 2, rtol=1e-3, atol=1e-3
        )
    with pytest.raises(InputError, match="does not hold a window of 600"):
        power_spectrum(x, 600, 160, 512)
    with pytest.raises(InputError, match="at least 400 samples"):
        power_spectrum(x[:399])


@pytest.mark.parametrize("frequency", [300.0, 1000.0, 4000.0])
def test_a_tone_is_where_it_belongs(frequency):
    mel = log_mel(tone(frequency), bins=40)
    assert mel.shape == (1 + (8000 - 400) // 160, 40) and mel.dtype == np.float32
    centres = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 42)[1:-1] / 2595) - 1)
    assert set(mel.argmax(1)) == {int(np.abs(centres - frequency).argmin())}
    assert abs(log_power(tone(frequency)).argmax(1)[0] - frequency / 16_000 * 512) <= 1


def test_mel_filters_share_every_frequency():
    filters = mel_filters(20, 1024, 16_000)
    inner = filters[50:400].sum(1)
    np.testing.assert_allclose(inner, 1.0, atol=1e-5)  # neighbouring triangles add up to one
    assert (filters.max(0) > 0.5).all()


def test_frames_around_their_samples_and_levelled_ones(rng):
    x = rng.standard_normal(900).astype("f") + 3
    centred = power_spectrum(x, 400, 160, 400, centred=True)
    mirrored = np.concatenate([x[200:0:-1], x, x[-2:-202:-1]])
    assert centred.shape == (1 + 900 // 160, 201)
    np.testing.assert_array_equal(centred, power_spectrum(mirrored, 400, 160, 400))
    found = power_spectrum(x, 400, 160, 512, periodic=False, level=True, emphasis=0.9)
    frame = x[160:560].astype("d")
    frame -= frame.mean()
    frame = np.concatenate([frame[:1] * (1 - 0.9), frame[1:] - 0.9 * frame[:-1]]) * np.hanning(400)
    np.testing.assert_allclose(found[1], np.abs(np.fft.rfft(frame, 512)) ** 2, rtol=1e-3, atol=1e-3)


def test_mel_filters_of_slaney_and_kaldi():
    mel = np.linspace(0, 15 + 27 * np.log(8) / np.log(6.4), 12)  # 8000 Hz
    hertz = np.where(mel < 15, mel / 0.015, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))
    frequencies = np.arange(201) * 40.0
    found = mel_filters(10, 400, 16_000, scale="slaney", area=True)
    for i in range(10):
        triangle = np.interp(frequencies, hertz[i : i + 3], [0, 1, 0])
        np.testing.assert_allclose(found[:, i], 2 * triangle / (hertz[i + 2] - hertz[i]), atol=1e-7)
    found, over = mel_filters(10, 400, 16_000, lowest=20, over="mel"), 1127 * np.log(1 + frequencies / 700)
    mel = np.linspace(1127 * np.log(1 + 20 / 700), 1127 * np.log(1 + 8000 / 700), 12)
    for i in range(10):
        np.testing.assert_allclose(found[:, i], np.interp(over, mel[i : i + 3], [0, 1, 0]), atol=1e-6)


def test_frames_are_stacked():
    frames = np.arange(22).reshape(11, 2)
    np.testing.assert_array_equal(stack_frames(frames, 4), np.arange(16).reshape(2, 8))


def test_frames_are_sampled_evenly(rng):
    video = np.arange(12)[:, None, None, None] * np.ones((1, 2, 2, 3))
    assert sample_frames(video, 4)[:, 0, 0, 0].tolist() == [1, 4, 7, 10]
    assert sample_frames(video[:2], 4)[:, 0, 0, 0].tolist() == [0, 0, 1, 1]
    drawn = {tuple(sample_frames(video, 4, rng)[:, 0, 0, 0].astype(int) // 3) for _ in range(9)}
    assert drawn == {(0, 1, 2, 3)}
    with pytest.raises(InputError, match="T >= 1"):
        sample_frames(video[:0], 4)


def test_layout_boxes():
    boxes = layout_boxes(np.asarray([[10, 20, 110, 40], [0, 0, 200, 100]]), (200, 100))
    assert {k: v.tolist() for k, v in boxes.items()} == {
        "left": [50, 0], "top": [200, 0], "right": [550, 1000], "bottom": [400, 1000], "box_width": [500, 1000], "box_height": [200, 1000],
    }  # fmt: skip
    for wrong in ([[0, 0, 1]], [[0, 0, 201, 10]], [[-1, 0, 1, 1]], [[5, 0, 1, 1]]):
        with pytest.raises(InputError, match="layout"):
            layout_boxes(np.asarray(wrong), (200, 100))


def test_points_of_a_mesh_lie_on_it_evenly(rng):
    vertices = np.asarray([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 3]])
    faces = np.asarray([[0, 1, 2], [0, 1, 3]])  # areas 1/2 and 3/2
    points = sample_points(vertices, faces, 4000, rng)
    on_first = np.isclose(points[:, 2], 0)
    assert np.isclose(points[~on_first, 1], 0).all() and (points >= 0).all()
    np.testing.assert_allclose(on_first.mean(), 0.25, atol=0.03)
    np.testing.assert_allclose(points[on_first].mean(0), [1 / 3, 1 / 3, 0], atol=0.03)
    with pytest.raises(InputError, match="no area"):
        sample_points(vertices, np.asarray([[0, 0, 0]]), 4, rng)


def test_farthest_points_and_the_unit_sphere(rng):
    line = np.asarray([[0.0], [1], [2], [10], [5]])
    assert farthest_points(line, 4).tolist() == [0, 3, 4, 2]
    ball = unit_sphere(rng.standard_normal((50, 3)) * 7 + 3)
    np.testing.assert_allclose(np.linalg.norm(ball, axis=1).max(), 1, rtol=1e-5)
    np.testing.assert_allclose(ball.mean(0), 0, atol=1e-6)
    with pytest.raises(InputError, match="cannot choose 6 of 5"):
        farthest_points(line, 6)


def test_skeleton():
    edges = skeleton(17, COCO_BONES)
    assert (edges == edges.T).all() and edges.sum() == 2 * len(COCO_BONES) and edges.any(1).all()
    with pytest.raises(InputError, match=r"bone \(0, 17\)"):
        skeleton(17, [(0, 17)])


def test_a_table_becomes_tokens_with_rows_columns_and_ranks():
    raw, mask = table_tokens(["name", "age"], [["ann lee", "30"], ["bo", "4"]], lambda text: [len(w) for w in text.split()], 9)
    assert raw["ids"].tolist() == [4, 3, 3, 3, 2, 2, 1, 0, 0]
    assert raw["row"].tolist() == [0, 0, 1, 1, 1, 2, 2, 0, 0]
    assert raw["column"].tolist() == [1, 2, 1, 1, 2, 1, 2, 0, 0]
    assert raw["rank"].tolist() == [0, 0, 0, 0, 2, 0, 1, 0, 0]
    assert mask.tolist() == [True] * 7 + [False] * 2
    short, mask = table_tokens(["name", "age"], [["ann lee", "30"]], lambda text: [len(w) for w in text.split()], 3)
    assert mask.all() and short["ids"].tolist() == [4, 3, 3]
    assert column_ranks(["1,200", "3%", "3", "-1"]) == [3, 2, 2, 1]
    assert column_ranks(["1", "n/a"]) == column_ranks(["1", "nan"]) == [0, 0]
    tall, _ = table_tokens(["n"], [[str(i)] for i in range(300)], lambda text: [1], 301)
    assert tall["row"].max() == tall["rank"].max() == 255
    with pytest.raises(InputError, match="row 1 has 1 cells, the header 2"):
        table_tokens(["a", "b"], [["1", "2"], ["3"]], lambda _: [1], 9)


def flow(source):
    found = data_flow(textwrap.dedent(source))
    return {
        (f"{found.names[i]}@{found.places[i][0]}", f"{found.names[j]}@{found.places[j][0]}")
        for i, j in zip(*np.nonzero(found.edges), strict=True)
    }


def test_data_flow_of_assignments():
    assert flow("""\
        a = 1
        b = a
        a, c = b, a
        a += b
        """) == {("a@2", "a@1"), ("b@2", "a@2"), ("b@3", "b@2"), ("a@3", "a@1"), ("a@3", "b@3"), ("a@3", "a@3"),
                 ("c@3", "b@3"), ("c@3", "a@3"), ("b@4", "b@2"), ("a@4", "b@4"), ("a@4", "a@3")}  # fmt: skip


def test_data_flow_joins_branches_and_feeds_loops_back():
    assert {("x@5", "x@2"), ("x@5", "x@4")} <= flow("if q:\n  x = 1\nelse:\n  x = 2\ny = x\n")
    assert ("x@5", "x@1") not in flow("x = 0\nif q:\n  x = 1\nelse: x = 2\ny = x\n")
    looped = flow("x = 0\nfor i in r:\n  y = x\n  x = i\nz = x\n")
    assert {("x@3", "x@1"), ("x@3", "x@4"), ("x@5", "x@1"), ("x@5", "x@4"), ("i@2", "r@2"), ("x@4", "i@4")} <= looped


def test_data_flow_of_functions_comprehensions_and_objects():
    assert {("a@2", "a@1"), ("b@3", "b@2")} <= flow("def f(a):\n  b = a\n  return b\n")
    assert ("a@3", "a@1") not in flow("def f(a):\n  return 1\nprint(a)\n")
    assert {("v@1", "v@1"), ("out@1", "v@1")} <= flow("out = [v for v in xs]\n")
    assert ("d@2", "v@2") in flow("d = {}\nd[0] = v\n")
    assert {("n@1", "m@1"), ("n@2", "n@1")} <= flow("if (n := m):\n  print(n)\n")
    assert ("x@1", "x@1") in flow("x = 1; y = [x for x in a]; z = x\n")
    found = data_flow("x = 1\ny = [x for x in a]\nz = x\n")
    last, first = len(found.names) - 2, 0
    assert found.names[last] == "x" and found.edges[last].nonzero()[0].tolist() == [first]
    assert ("x@2", "x@2") not in {e for e in flow("for x in xs:\n  x = x + 1\n") if e[0] == e[1] == "x@1"}
    assert ("y@4", "y@3") in flow("match q:\n  case 1:\n    y = 2\nprint(y)\n")
    assert {("a@2", "a@1"), ("k@2", "k@1")} <= flow("def f(*a, **k):\n  return a, k\n")
    with pytest.raises(InputError, match="cannot be parsed as Python"):
        data_flow("def f(:")


def test_vocabulary():
    vocabulary = Vocabulary(["E11", "I10", "E11", "J45", "I10", "E11"], 4)
    assert len(vocabulary) == 4 and vocabulary.ids == {"E11": 2, "I10": 3}
    ids, mask = vocabulary.encode(["J45", "E11"], 3)
    assert ids.tolist() == [UNKNOWN, 2, PADDING] and mask.tolist() == [True, True, False]
    assert vocabulary.encode(["E11", "J45", "I10", "I10"], 2)[0].tolist() == [3, 3]  # the last ones stay


def test_codes_belong_to_categories_and_those_to_chapters():
    nodes, edges = code_hierarchy(["E11.9", "E11.2", "I10"])
    assert nodes == ["E11.9", "E11.2", "I10", "E11", "I", "E"]
    pairs = {(nodes[i], nodes[j]) for i, j in zip(*np.nonzero(edges), strict=True) if i < j}
    assert pairs == {("E11.9", "E11"), ("E11.2", "E11"), ("E11", "E"), ("I10", "I")}
    assert (edges == edges.T).all()


def test_codebook_finds_clusters(rng):
    centres = 10 * rng.standard_normal((5, 3))
    vectors = np.concatenate([c + 0.1 * rng.standard_normal((40, 3)) for c in centres])
    book = Codebook.learn(vectors, 5, rng)
    ids = book.encode(vectors)
    assert ids.dtype == np.int32 and all(len(set(part)) == 1 for part in ids.reshape(5, 40)) and len(set(ids)) == 5
    np.testing.assert_allclose(book.decode(ids), np.repeat(centres, 40, 0), atol=0.2)
    assert book.encode(vectors.reshape(20, 10, 3)).shape == (20, 10)
    with pytest.raises(InputError, match="at least as many vectors"):
        Codebook.learn(vectors[:3], 5, rng)
