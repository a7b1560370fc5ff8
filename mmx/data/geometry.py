"""Boxes, points, meshes and skeletons on the host."""

from collections.abc import Sequence

import numpy as np

from mmx.errors import InputError


def layout_boxes(boxes: np.ndarray, page: tuple[float, float], cells: int = 1000) -> dict[str, np.ndarray]:
    """Boxes of words on a page as ids for tables (LayoutLM, arXiv 1912.13318).

    Args:
        boxes: left, top, right, bottom of each word, `(L, 4)`, in the unit of `page`.
        page: (width, height) of the page.
        cells: how finely a page is divided; ids are 0 to `cells`.

    Returns:
        left, top, right, bottom, box_width, box_height: `(L,)` int32 each.
    """
    boxes = np.asarray(boxes, np.float64)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise InputError(f"layout: expected boxes (L, 4), got {boxes.shape}")
    scaled = np.floor(boxes * cells / np.asarray([*page, *page])).astype(np.int32)
    if (scaled < 0).any() or (scaled > cells).any():
        raise InputError(f"layout: expected boxes (L, 4) inside the page of {page}, got {boxes.shape}: {boxes.tolist()[:4]}")
    left, top, right, bottom = scaled.T
    if (right < left).any() or (bottom < top).any():
        raise InputError("layout: a box ends before it begins; boxes are left, top, right, bottom")
    return {"left": left, "top": top, "right": right, "bottom": bottom, "box_width": right - left, "box_height": bottom - top}


def sample_points(vertices: np.ndarray, faces: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Points spread evenly over the surface of a mesh of triangles: `(V, 3), (F, 3) int -> (count, 3)`."""
    corners = np.asarray(vertices, np.float32)[np.asarray(faces)]  # (F, 3, 3)
    edges = corners[:, 1:] - corners[:, :1]
    area = np.linalg.norm(np.cross(edges[:, 0], edges[:, 1]), axis=-1)
    if not area.sum() > 0:
        raise InputError("mesh: its triangles have no area; nothing can be sampled from it")
    chosen = rng.choice(len(area), count, p=area / area.sum())
    root, along = np.sqrt(rng.random((count, 1))), rng.random((count, 1))
    a, b, c = corners[chosen].swapaxes(0, 1)
    return ((1 - root) * a + root * (1 - along) * b + root * along * c).astype(np.float32)


def farthest_points(points: np.ndarray, count: int) -> np.ndarray:
    """Indices of `count` points, each the farthest from those before it (PointNet++, arXiv 1706.02413): `(P, C) -> (count,)`."""
    if not 0 < count <= len(points):
        raise InputError(f"points: cannot choose {count} of {len(points)}")
    chosen = np.zeros(count, int)
    nearest = np.full(len(points), np.inf)
    for i in range(1, count):
        nearest = np.minimum(nearest, np.square(points - points[chosen[i - 1]]).sum(-1))
        chosen[i] = nearest.argmax()
    return chosen


def unit_sphere(points: np.ndarray) -> np.ndarray:
    """Moves the mean of the points to the origin and the farthest of them to distance 1: `(P, 3) -> (P, 3)`."""
    centred = points - points.mean(0)
    return (centred / max(np.linalg.norm(centred, axis=-1).max(), 1e-12)).astype(np.float32)


def skeleton(joints: int, bones: Sequence[tuple[int, int]]) -> np.ndarray:
    """The edges of a graph of joints, both ways: `(joints, joints)` bool."""
    edges = np.zeros((joints, joints), bool)
    for a, b in bones:
        if not (0 <= a < joints and 0 <= b < joints):
            raise InputError(f"skeleton: bone ({a}, {b}) joins joints that are not among the {joints}")
        edges[a, b] = edges[b, a] = True
    return edges


COCO_BONES = (
    *((0, 1), (0, 2), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 6), (5, 7), (7, 9), (6, 8), (8, 10)),
    *((5, 11), (6, 12), (11, 12), (11, 13), (13, 15), (12, 14), (14, 16)),
)  # of COCO's 17 key points: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles
