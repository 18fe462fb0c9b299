"""Draws a synthetic dataset in CIFAR-10's format, as pickles of the official layout.

Ten shapes, each drawn at a random place, size and angle over a shaded background with noise, in a colour that is likely
for its class but not only for it: a small network soon learns the colours and then, over some epochs, the shapes. It serves
machines without network or data; accuracy on it means nothing.
"""

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from fastcifar import files

NAME = "synthetic dataset: accuracy means nothing"
BATCH = 10_000  # images in a pickle, as in the official archive
NOISE = 0.05  # standard deviation per pixel and channel, in units of the full range
HUE_SPREAD = 0.15  # standard deviation of a class's hue, in turns; classes are a tenth of a turn apart

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _colour(hue: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Saturated colours [N, 1, 1, 3] in 0..1 of hues in turns and brightnesses in 0..1."""
    phase = hue[:, None] + np.array([0, 1 / 3, 2 / 3], np.float32)
    return ((0.5 + 0.5 * np.cos(2 * np.pi * phase)) * value[:, None])[:, None, None, :]


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u) * 0.866 + v * 0.5, -v) - 0.5


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.hypot(u, v) - 0.65 - 0.35 * np.cos(5 * np.arctan2(v, u))


def _box(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v))


# Each shape as a field over its own coordinates (about -1..1): negative inside, positive outside.
SHAPES: dict[str, Distance] = {
    "disc": lambda u, v: np.hypot(u, v) - 0.9,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.75) - 0.2,
    "square": lambda u, v: _box(u, v) - 0.8,
    "frame": lambda u, v: np.abs(_box(u, v) - 0.7) - 0.18,
    "triangle": _triangle,
    "cross": lambda u, v: np.minimum(np.maximum(np.abs(u) - 1, np.abs(v) - 0.3), np.maximum(np.abs(u) - 0.3, np.abs(v) - 1)),
    "stripes": lambda u, v: np.maximum(_box(u, v) - 0.9, np.cos(3.5 * np.pi * u) * 0.2),
    "checker": lambda u, v: np.maximum(_box(u, v) - 0.9, np.sin(np.pi * 1.1 * u) * np.sin(np.pi * 1.1 * v) * 0.4),
    "crescent": lambda u, v: np.maximum(np.hypot(u, v) - 0.95, 0.75 - np.hypot(u - 0.5, v)),
    "star": _star,
}


def draw(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return images [count, 32, 32, 3] uint8 and labels [count] int64, classes equally likely."""
    labels = rng.integers(len(SHAPES), size=count)
    place = rng.uniform(-4, 4, (2, count, 1, 1)).astype(np.float32)  # pixels from the centre
    angle = rng.uniform(0, 2 * np.pi, (count, 1, 1)).astype(np.float32)
    radius = rng.uniform(8, 13, (count, 1, 1)).astype(np.float32)  # pixels
    hue = (labels / len(SHAPES) + HUE_SPREAD * rng.standard_normal(count)).astype(np.float32)
    ink = _colour(hue, rng.uniform(0.4, 1, count).astype(np.float32))
    # The background differs from the ink by at least 0.25 in every channel, modulo 1, so that the shape can be seen.
    paper = (ink + rng.uniform(0.25, 0.75, ink.shape).astype(np.float32)) % 1
    shade = rng.uniform(-0.02, 0.02, (2, count, 1, 1)).astype(np.float32)  # brightness gained per pixel, down and right

    y, x = np.mgrid[-15.5:16, -15.5:16].astype(np.float32)
    dy, dx = y - place[0], x - place[1]
    u = (np.cos(angle) * dx + np.sin(angle) * dy) / radius
    v = (np.cos(angle) * dy - np.sin(angle) * dx) / radius
    distance = np.empty_like(u)
    for label, shape in enumerate(SHAPES.values()):
        chosen = labels == label
        distance[chosen] = shape(u[chosen], v[chosen])
    cover = np.clip(0.5 - distance * radius, 0, 1)[..., None]  # share of the pixel inside the shape
    light = (shade[0] * y + shade[1] * x)[..., None] + NOISE * rng.standard_normal((count, 32, 32, 3), np.float32)
    image = paper + (ink - paper) * cover + light
    return np.clip(image * 255, 0, 255).round().astype(np.uint8), labels


def write_pickles(folder: Path, *, train: int, test: int, seed: int = 0) -> Iterator[int]:
    """Write `data_batch_1..5`, `test_batch` and `batches.meta`; yield the number of images after each part is drawn.

    train, test: images in each split; `train` is a multiple of 5. The same seed gives the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {f"data_batch_{i + 1}": train // 5 for i in range(5)} | {"test_batch": test}
    for stream, (name, size) in enumerate(sizes.items()):
        rng = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, stream]))
        parts = []
        for first in range(0, size, 1000):  # a thousand at a time stays within the cache
            parts.append(draw(min(1000, size - first), rng))
            yield len(parts[-1][1])
        rows = np.concatenate([images.transpose(0, 3, 1, 2).reshape(-1, 3072) for images, _ in parts])
        labels = np.concatenate([labels for _, labels in parts]).tolist()
        batch = {b"batch_label": NAME.encode(), b"labels": labels, b"data": rows}
        files.write_bytes(folder / name, pickle.dumps(batch, protocol=4))
    meta = {b"label_names": [name.encode() for name in SHAPES], b"num_cases_per_batch": train // 5, b"num_vis": 3072}
    files.write_bytes(folder / "batches.meta", pickle.dumps(meta, protocol=4))
