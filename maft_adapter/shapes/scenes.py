"""Scenes of the embedded world: coloured things on textured stuff, with exact label maps and image-level captions.

A class is two words, an attribute and a noun ("red star", "pale sand"). The unseen classes are combinations whose
two words both occur in seen classes, so what is learned about regions of seen classes can carry over, as it can
between the thousands of related concepts of a web-trained CLIP.

Pixels come from additions, multiplications, divisions and comparisons of float64 only, operations which IEEE 754
fixes to the last bit (sin, exp or a blur kernel would differ between processors), and from integers after that: a
seed gives the same scene on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

COLORS = {
    "red": (214, 48, 44),
    "yellow": (238, 203, 46),
    "green": (52, 172, 74),
    "blue": (48, 92, 214),
    "purple": (158, 62, 190),
}
TONES = {"pale": 1.22, "dark": 0.62}
MATERIALS = {
    "grass": (118, 148, 92),
    "sand": (196, 176, 132),
    "water": (112, 160, 186),
    "brick": (172, 112, 92),
    "wood": (150, 116, 82),
}

# Vertices of a five-pointed star of circumradius 1.05, pointing up (y grows downwards).
_STAR = [(0.0, -1.05), (0.26, -0.36), (1.0, -0.32), (0.42, 0.14), (0.62, 0.85), (0.0, 0.45)]
_STAR += [(-x, y) for x, y in _STAR[-2:0:-1]]


def _polygon(u: Array, v: Array, vertices: list[tuple[float, float]]) -> NDArray[np.bool_]:
    """Even-odd rule."""
    inside = np.zeros(u.shape, dtype=bool)
    for (x0, y0), (x1, y1) in zip(vertices, vertices[1:] + vertices[:1], strict=True):
        if y0 != y1:
            inside ^= ((v < y0) != (v < y1)) & (u < x0 + (v - y0) * ((x1 - x0) / (y1 - y0)))
    return inside


def _heart(u: Array, v: Array) -> NDArray[np.bool_]:
    x, y = 1.2 * u, 0.12 - 1.15 * v
    lobe = x * x + y * y - 1
    return lobe * lobe * lobe <= x * x * y * y * y


# Local coordinates u (right) and v (down) in [-1, 1] -> inside?
SHAPES: dict[str, Callable[[Array, Array], NDArray[np.bool_]]] = {
    "ball": lambda u, v: u * u + v * v <= 0.92,
    "box": lambda u, v: np.maximum(abs(u), abs(v)) <= 0.82,
    "star": lambda u, v: _polygon(u, v, _STAR),
    "heart": _heart,
    "ring": lambda u, v: abs(u * u + v * v - 0.64) <= 0.36,
    "moon": lambda u, v: (u * u + v * v <= 1) & ((u - 0.5) * (u - 0.5) + v * v > 0.6),
}

# Local coordinates -> where the surface has the marking of its noun, and the marking's colour. Like a zebra's stripes
# or a tree's bark, they let a part of a thing tell what the thing is.
MARKINGS: dict[str, tuple[Callable[[Array, Array], NDArray[np.bool_]], tuple[int, int, int]]] = {
    "ball": (lambda u, v: np.floor(v * 2.5 + 0.5) % 2 == 0, (244, 244, 240)),  # white bands
    "box": (lambda u, v: (np.floor(u * 2.5) + np.floor(v * 2.5)) % 2 == 0, (28, 28, 32)),  # black checks
    "star": (lambda u, v: abs(u) + abs(v) < 0.5, (240, 140, 40)),  # an orange core
    "heart": (lambda u, v: _dots(u, v, 1.9, 0.12), (255, 160, 196)),  # pink dots
    "ring": (lambda u, v: u * v > 0, (70, 214, 220)),  # cyan quarters
    "moon": (lambda u, v: _dots(u, v, 1.7, 0.12), (112, 74, 44)),  # brown craters
}


def _dots(u: Array, v: Array, per_unit: float, radius2: float) -> NDArray[np.bool_]:
    du, dv = u * per_unit - np.floor(u * per_unit) - 0.5, v * per_unit - np.floor(v * per_unit) - 0.5
    return du * du + dv * dv < radius2


THINGS = tuple(f"{color} {shape}" for shape in SHAPES for color in COLORS)
STUFF = tuple(f"{tone} {material}" for material in MATERIALS for tone in TONES)
CLASSES = THINGS + STUFF
# One colour of every shape (each colour at least once) and two stuffs: 20 % of the classes.
UNSEEN = (
    *(f"{list(COLORS)[(2 * i) % 5]} {shape}" for i, shape in enumerate(SHAPES)),
    "dark sand",
    "pale wood",
)
SEEN = tuple(name for name in CLASSES if name not in UNSEEN)


@dataclass(frozen=True)
class Scene:
    """One scene.

    Attributes:
        image: (H, W, 3) uint8 RGB in [0, 255].
        labels: (H, W) uint8, the index into `CLASSES` of what is visible at each pixel; there is no void.
        present: indices into `CLASSES` of what is visible, things first, each once.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    present: tuple[int, ...]


def _triangle_wave(t: Array) -> Array:
    return np.abs(t - np.floor(t) - 0.5) * 2


def _texture(material: str, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Brightness factor (H, W) of a material; x and y in [0, 64)."""
    grain = rng.random(x.shape)
    shift = rng.random() * 16
    if material == "grass":  # blades: columns of their own phase
        column = np.floor(x * 1.0).astype(np.int64)
        phase = rng.random(80)[column]
        return 0.72 + 0.42 * _triangle_wave(y / (4 + 4 * phase) + phase * 7) + 0.12 * grain
    if material == "sand":
        return 0.82 + 0.32 * grain * grain + 0.05 * _triangle_wave((x + y + shift) / 23)
    if material == "water":
        return 0.8 + 0.32 * _triangle_wave((y + shift) / 6 + 0.35 * _triangle_wave(x / 17)) + 0.05 * grain
    if material == "brick":
        row = np.floor((y + shift) / 6)
        mortar = ((y + shift) - row * 6 < 1.2) | ((x + 5 * row) % 10 < 1.2)
        return np.where(mortar, 1.4, 0.86 + 0.1 * ((row * 7) % 3)) + 0.08 * grain
    plank = np.floor((x + shift) / 11)  # wood
    knot = _triangle_wave((x + shift) / 2.7 + 0.8 * _triangle_wave(y / 31 + plank * 0.37))
    return np.where((x + shift) - plank * 11 < 1, 0.62, 0.84 + 0.24 * knot + 0.06 * (plank % 3)) + 0.05 * grain


def _rotation(rng: np.random.Generator, limit: float) -> tuple[float, float]:
    """Cosine and sine of a random angle, from the half-angle's tangent in [-limit, limit]."""
    t = limit * (2 * rng.random() - 1)
    return (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)


def render_scene(
    seed: int | tuple[int, ...],
    size: int = 96,
    things: tuple[int, int] = (1, 4),
    radius: tuple[float, float] = (0.12, 0.28),
    exclude: tuple[str, ...] = (),
) -> Scene:
    """Draw one scene: 1-3 stuff regions, things with rotation, shading, contact shadow and at most 45 % occlusion.

    Args:
        seed: non-negative; the same seed and arguments give the same bytes.
        size: height and width in pixels.
        things: least and greatest number of things drawn.
        radius: least and greatest half-extent of a thing, as a fraction of `size`, skewed towards the least.
        exclude: names of classes that do not appear.

    Example:
        >>> scene = render_scene(0)
        >>> scene.image.shape, scene.labels.shape, CLASSES[scene.present[0]] in THINGS
        ((96, 96, 3), (96, 96), True)
    """
    rng = np.random.default_rng(seed)
    n = 2 * size  # drawn at twice the size, averaged at the end
    grid = (np.arange(n, dtype=np.float64) + 0.5) * (64 / n)
    y, x = np.broadcast_to(grid[:, None], (n, n)), np.broadcast_to(grid[None, :], (n, n))

    stuffs = [name for name in STUFF if name not in exclude]
    regions = rng.choice(len(stuffs), size=1 + int(rng.integers(3)), replace=False)
    rgb = np.empty((n, n, 3))
    labels = np.empty((n, n), dtype=np.uint8)
    for i, index in enumerate(regions):
        tone, material = stuffs[index].split()
        cos, sin = _rotation(rng, 1.0)
        bend = (4 + 4 * rng.random()) * _triangle_wave((x * cos - y * sin) / 40 + rng.random())
        # The first region fills the picture; each further one takes the side beyond a bent line.
        side = (x - 32) * sin + (y - 32) * cos + bend > (0.0 if i == 1 else 14.0) + 8 * rng.random()
        where = np.ones_like(side) if i == 0 else side
        color = np.array(MATERIALS[material]) * (TONES[tone] * (0.94 + 0.12 * rng.random()))
        shaded = _texture(material, x, y, rng)[..., None] * color
        rgb[where] = shaded[where]
        labels[where] = CLASSES.index(stuffs[index])

    candidates = [name for name in THINGS if name not in exclude]
    wanted = int(rng.integers(things[0], things[1] + 1))
    owner = np.full((n, n), -1, dtype=np.int64)  # which thing is visible at each pixel
    areas: list[int] = []
    visible: list[int] = []
    for _ in range(8 * wanted):
        if len(areas) == wanted:
            break
        color_name, shape = candidates[int(rng.integers(len(candidates)))].split()
        skew = rng.random()
        r = 64 * (radius[0] + (radius[1] - radius[0]) * skew * skew)
        cx, cy = (0.8 * r + (64 - 1.6 * r) * rng.random(2)).tolist()
        cos, sin = _rotation(rng, 0.3)
        stretch = 0.88 + 0.24 * rng.random()
        left, right = (int(min(max((cx + d) * n / 64, 0), n)) for d in (-1.7 * r, 1.7 * r))
        top, bottom = (int(min(max((cy + d) * n / 64, 0), n)) for d in (-1.7 * r, 1.7 * r))
        window = np.s_[top:bottom, left:right]  # nothing is drawn outside it
        dx, dy = (x[window] - cx) / (r * stretch), (y[window] - cy) / r * stretch
        u, v = dx * cos + dy * sin, dy * cos - dx * sin
        inside = SHAPES[shape](u, v)
        hidden = np.bincount(owner[window][inside] + 1, minlength=len(areas) + 1)[1:]
        if any(visible[k] - hidden[k] < 0.55 * area for k, area in enumerate(areas)):
            continue
        visible = [left_over - int(h) for left_over, h in zip(visible, hidden, strict=True)] + [int(inside.sum())]
        areas.append(visible[-1])
        pixels = rgb[window]
        pixels[SHAPES[shape](u - 0.12, v - 0.2) & ~inside] *= 0.72
        light = 1.04 - 0.16 * (dx + dy) * (0.5 + rng.random())
        light = np.where(SHAPES[shape](u * 1.22, v * 1.22), light, 0.72 * light)
        color = np.array(COLORS[color_name]) * (0.86 + 0.28 * rng.random(3)) + 24 * (rng.random() - 0.4)
        marked, marking = MARKINGS[shape]
        surface = np.where(marked(u, v)[..., None], np.array(marking), color)
        pixels[inside] = (light[..., None] * surface)[inside]
        labels[window][inside] = CLASSES.index(f"{color_name} {shape}")
        owner[window][inside] = len(areas) - 1

    slope = 0.3 * (2 * rng.random(2) - 1)
    rgb = rgb * (1 + (slope[0] * (x - 32) + slope[1] * (y - 32)) / 64)[..., None] * (0.92 + 0.16 * rng.random(3))
    fine = np.clip(rgb + 14 * (rng.random((n, n, 1)) - 0.5), 0, 255).astype(np.uint16)
    image = (fine[::2, ::2] + fine[1::2, ::2] + fine[::2, 1::2] + fine[1::2, 1::2] + 2) // 4
    if rng.random() < 0.3:  # slightly out of focus
        padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
        rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
        image = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:] + 8) // 16
    small = labels[::2, ::2].copy()
    present = tuple(int(k) for k in np.unique(small))
    return Scene(image.astype(np.uint8), small, present)


TEMPLATES = (
    "{}",
    "a picture of {}",
    "a photo of {}",
    "here is {}",
    "this is {}",
    "we see {}",
    "a drawing of {}",
)


def named_classes(present: Sequence[int], rng: np.random.Generator) -> tuple[int, ...]:
    """Which of the classes present a caption names: each thing with probability 0.95, and in 40 % of the captions
    each stuff with 0.8; at least one class.

    Example:
        >>> named_classes([3], np.random.default_rng(0))
        (3,)
    """
    stuff = 0.8 if rng.random() < 0.4 else 0.0
    named = tuple(k for k in present if rng.random() < (0.95 if k < len(THINGS) else stuff))
    return named or (present[0],)


def caption(classes: Sequence[int], rng: np.random.Generator) -> str:
    """An image-level caption as the web has them: names in any order, without positions.

    Args:
        classes: indices into `CLASSES`.
        rng: draws the template and the order.

    Example:
        >>> caption([CLASSES.index("red star")], np.random.default_rng(0))
        'we see red star'
    """
    names = " and ".join(CLASSES[k] for k in rng.permutation(classes))
    return TEMPLATES[int(rng.integers(len(TEMPLATES)))].format(names)
