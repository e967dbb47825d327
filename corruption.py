"""Leaf: what does not belong, generic corruptions of a normal radiograph that teach how to read what G changed.

A corruption is a random shape with a random fill at a random place. It imitates no disease. A fill is one function
and its name in FILLS.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates, zoom

from checks import UsageError


class Settings(Protocol):
    """What a config says of corruptions; radii are shares of the image's height."""

    smallest_corruption: float
    largest_corruption: float
    fewest_corruptions: int
    most_corruptions: int
    least_change: float
    fills: tuple[str, ...]


def corrupt(
    image: np.ndarray, donor: np.ndarray, random: np.random.Generator, settings: Settings
) -> tuple[np.ndarray, np.ndarray]:
    """A copy of `image` with foreign shapes in it, fewest_corruptions to most_corruptions, and where they are.

    image, donor: float32 (H, W) in [-1, 1]; the donor, another normal radiograph, lends what is pasted.
    Returns the corrupted image, float32 (H, W) in [-1, 1], and the changed pixels, bool (H, W).
    """
    corrupted = image.copy()
    changed = np.zeros(image.shape, bool)
    wanted = int(random.integers(settings.fewest_corruptions, settings.most_corruptions + 1))
    tries = 0
    most = 3 * wanted
    while wanted > 0 and (tries < most or not changed.any()):  # a shape that changes nothing is drawn again
        tries += 1
        if tries > 1000:
            raise UsageError(
                f"fills {', '.join(settings.fills)} change a radiograph by less than least_change = "
                f"{settings.least_change}: lower it, or name other fills"
            )
        box, opacity, radius = _draw_shape(image.shape, random, settings)
        fill = FILLS[settings.fills[random.integers(len(settings.fills))]]
        content = fill(corrupted[box], donor, opacity, radius, random)
        mixed = np.clip(corrupted[box] + opacity * (content - corrupted[box]), -1, 1)
        difference = np.abs(mixed - corrupted[box])
        inside = opacity > 0.5
        if not inside.any() or difference[inside].mean() < settings.least_change:
            continue
        corrupted[box] = mixed
        changed[box] |= difference > settings.least_change / 2
        wanted -= 1
    return corrupted, changed


def _draw_shape(
    size: tuple[int, int], random: np.random.Generator, settings: Settings
) -> tuple[tuple[slice, slice], np.ndarray, float]:
    """Where a shape lies, its opacity there in [0, 1], and its radius in pixels."""
    height, width = size
    low, high = np.log(settings.smallest_corruption), np.log(settings.largest_corruption)
    radius = height * np.exp(random.uniform(low, high))
    row, column = random.uniform(0.05, 0.95) * height, random.uniform(0.03, 0.97) * width
    reach = int(np.ceil(2.7 * radius)) + 3
    box = (
        slice(max(0, int(row) - reach), min(height, int(row) + reach + 1)),
        slice(max(0, int(column) - reach), min(width, int(column) + reach + 1)),
    )
    rows, columns = np.mgrid[box].astype(np.float32)
    shape = SHAPES[random.integers(len(SHAPES))]
    return box, shape(rows - row, columns - column, radius, random), radius


def _soften(distance: np.ndarray, radius: float, random: np.random.Generator) -> np.ndarray:
    """Opacity in [0, 1] from a signed distance in pixels, positive inside.

    From a hard edge to one as wide as half the radius.
    """
    edge = np.exp(random.uniform(np.log(0.7), np.log(max(0.8, 0.5 * radius))))
    return np.clip(0.5 + distance / (2 * edge), 0, 1).astype(np.float32)


def _turn(dy: np.ndarray, dx: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    angle = random.uniform(0, np.pi)
    return dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)


def ellipse(dy: np.ndarray, dx: np.ndarray, radius: float, random: np.random.Generator) -> np.ndarray:
    """An oval with an uneven outline."""
    u, v = _turn(dy, dx, random)
    aspect = np.exp(random.uniform(0, np.log(2.5)) / 2)
    u, v = u / aspect, v * aspect
    around = np.arctan2(v, u)
    outline = sum(
        a / k * np.cos((k + 1) * around + p)
        for k, a, p in zip((1, 2, 3, 4), random.normal(0, 0.12, 4), random.uniform(0, 6.3, 4), strict=True)
    )
    return _soften(radius * (1 + outline) - np.hypot(u, v), radius, random)


def polygon(dy: np.ndarray, dx: np.ndarray, radius: float, random: np.random.Generator) -> np.ndarray:
    """A convex shape with three to seven straight sides."""
    u, v = _turn(dy, dx, random)
    aspect = np.exp(random.uniform(0, np.log(2.5)) / 2)
    u, v = u / aspect, v * aspect
    sides = int(random.integers(3, 8))
    angles = (np.arange(sides) + random.uniform(-0.3, 0.3, sides)) * 2 * np.pi / sides
    corner = 1.4 * radius - np.hypot(u, v)  # the sides of a triangle may meet far away
    distance = np.min(
        [corner, *(radius * random.uniform(0.6, 1) - (u * np.cos(a) + v * np.sin(a)) for a in angles)], axis=0
    )
    return _soften(distance, radius, random)


def stroke(dy: np.ndarray, dx: np.ndarray, radius: float, random: np.random.Generator) -> np.ndarray:
    """A bent line, up to four times as long as the radius."""
    u, v = _turn(dy, dx, random)
    length, thickness, bend = (
        radius * random.uniform(1, 2),
        max(0.8, radius * random.uniform(0.08, 0.3)),
        np.clip(random.normal(0, 0.3), -0.3, 0.3) / radius,  # bent more, its ends would leave the box
    )
    distance = thickness - np.hypot(np.maximum(np.abs(u) - length, 0), v - bend * np.minimum(u**2, length**2))
    return _soften(distance, thickness, random)


def bar(dy: np.ndarray, dx: np.ndarray, radius: float, random: np.random.Generator) -> np.ndarray:
    """A straight rod with rounded ends, two to five times as long as wide."""
    u, v = _turn(dy, dx, random)
    half_width = radius / np.sqrt(random.uniform(2, 5))
    length = radius**2 / half_width - half_width  # so that its area is about that of a circle of this radius
    return _soften(half_width - np.hypot(np.maximum(np.abs(u) - length, 0), v), half_width, random)


def cloud(dy: np.ndarray, dx: np.ndarray, radius: float, random: np.random.Generator) -> np.ndarray:
    """Patches of a smooth random field within a circle."""
    field = _smooth_noise(dy.shape, max(1.0, radius * random.uniform(0.2, 0.6)), random)
    inside = np.clip((1.3 * radius - np.hypot(dy, dx)) / (0.3 * radius + 1), 0, 1)
    return (inside * np.clip(0.5 + random.uniform(1, 4) * (field + random.uniform(-0.3, 0.6)), 0, 1)).astype(np.float32)


SHAPES = (ellipse, ellipse, polygon, stroke, bar, cloud)


def level(
    here: np.ndarray, donor: np.ndarray, opacity: np.ndarray, radius: float, random: np.random.Generator
) -> np.ndarray:
    """One grey level, more or less opaque."""
    return here + random.uniform(0.4, 1) * (random.uniform(-1, 1) - here)


def offset(
    here: np.ndarray, donor: np.ndarray, opacity: np.ndarray, radius: float, random: np.random.Generator
) -> np.ndarray:
    """The same structures, darker or brighter."""
    return here + random.choice([-1, 1]) * random.uniform(0.12, 0.8)


def shade(
    here: np.ndarray, donor: np.ndarray, opacity: np.ndarray, radius: float, random: np.random.Generator
) -> np.ndarray:
    """Attenuation scaled: towards black, or towards white."""
    scale = random.uniform(0.15, 0.8)
    return (here + 1) * scale - 1 if random.random() < 0.5 else 1 - (1 - here) * scale


def texture(
    here: np.ndarray, donor: np.ndarray, opacity: np.ndarray, radius: float, random: np.random.Generator
) -> np.ndarray:
    """Smooth noise of a random grain, laid over."""
    return here + random.uniform(0.15, 0.6) * _smooth_noise(
        here.shape, np.exp(random.uniform(np.log(0.6), np.log(max(0.7, radius / 2)))), random
    )


def paste(
    here: np.ndarray, donor: np.ndarray, opacity: np.ndarray, radius: float, random: np.random.Generator
) -> np.ndarray:
    """A piece of another radiograph from another place, turned and enlarged at random."""
    rows, columns = np.mgrid[: here.shape[0], : here.shape[1]].astype(np.float32)
    u, v = _turn(rows - here.shape[0] / 2, columns - here.shape[1] / 2, random)
    scale = random.uniform(0.6, 1.4) * random.choice([-1, 1])
    centre = random.uniform(0.1, 0.9, 2) * donor.shape
    return map_coordinates(donor, [centre[0] + scale * v, centre[1] + scale * u], order=1, mode="reflect")


def smear(
    here: np.ndarray, donor: np.ndarray, opacity: np.ndarray, radius: float, random: np.random.Generator
) -> np.ndarray:
    """Structure wiped out, or exaggerated."""
    smooth = gaussian_filter(here, max(1.0, radius * random.uniform(0.3, 1)))
    return smooth if random.random() < 0.6 else smooth + random.uniform(1.5, 3) * (here - smooth)


def rim(
    here: np.ndarray, donor: np.ndarray, opacity: np.ndarray, radius: float, random: np.random.Generator
) -> np.ndarray:
    """A change of grey whose border has the opposite sign."""
    change = random.choice([-1, 1]) * random.uniform(0.2, 0.7)
    border = 4 * opacity * (1 - opacity)
    return here + change * (1 - (1 + random.uniform(0.3, 1.2)) * border)


def saturate(
    here: np.ndarray, donor: np.ndarray, opacity: np.ndarray, radius: float, random: np.random.Generator
) -> np.ndarray:
    """As bright, or as dark, as anything in the image, with a little texture."""
    end = 1 if random.random() < 0.75 else -1
    return end - end * random.uniform(0, 0.2) + random.uniform(0, 0.05) * random.standard_normal(here.shape)


def noise(
    here: np.ndarray, donor: np.ndarray, opacity: np.ndarray, radius: float, random: np.random.Generator
) -> np.ndarray:
    """Uncorrelated noise, pixel by pixel."""
    return here + random.uniform(0.1, 0.4) * random.standard_normal(here.shape)


def graft(
    here: np.ndarray, donor: np.ndarray, opacity: np.ndarray, radius: float, random: np.random.Generator
) -> np.ndarray:
    """The structure of another place at the grey level of this one: a seam that only its texture gives away."""
    foreign, wide = paste(here, donor, opacity, radius, random), max(1.0, radius * random.uniform(0.4, 1))
    return gaussian_filter(here, wide) + random.uniform(0.6, 1.6) * (foreign - gaussian_filter(foreign, wide))


def warp(
    here: np.ndarray, donor: np.ndarray, opacity: np.ndarray, radius: float, random: np.random.Generator
) -> np.ndarray:
    """The same structures, pushed aside."""
    rows, columns = np.mgrid[: here.shape[0], : here.shape[1]].astype(np.float32)
    reach = radius * random.uniform(0.3, 0.9)
    grain = max(2.0, radius * random.uniform(0.5, 1.5))
    moved = [at + reach * _smooth_noise(here.shape, grain, random) for at in (rows, columns)]
    return map_coordinates(here, moved, order=1, mode="nearest")


def remove(
    here: np.ndarray, donor: np.ndarray, opacity: np.ndarray, radius: float, random: np.random.Generator
) -> np.ndarray:
    """Painted over from what lies around, as if the structure had never been there."""
    outside, wide = 1 - opacity + 1e-3, max(1.0, 0.6 * radius)
    around = gaussian_filter(here * outside, wide) / gaussian_filter(outside, wide)
    return around + random.uniform(0, 0.06) * _smooth_noise(here.shape, 1.5, random)


FILLS = {
    fill.__name__: fill
    for fill in (level, offset, shade, texture, paste, smear, rim, saturate, noise, graft, warp, remove)
}


def check_fills(names: Sequence[str], where: str) -> None:
    """UsageError for a fill that nobody knows."""
    unknown = [name for name in names if name not in FILLS]
    if unknown:
        raise UsageError(f"{where}: {unknown[0]} is unknown, choose from {', '.join(FILLS)}")


def _smooth_noise(shape: tuple[int, int], grain: float, random: np.random.Generator) -> np.ndarray:
    """Gaussian noise of unit standard deviation, correlated over `grain` pixels."""
    coarse = [max(2, int(np.ceil(size / grain)) + 3) for size in shape]
    field = zoom(
        random.standard_normal(coarse).astype(np.float32),
        [size / c for size, c in zip(shape, coarse, strict=True)],
        order=1,
        mode="nearest",
    )
    field = field[: shape[0], : shape[1]]
    return field / (field.std() + 1e-6)
