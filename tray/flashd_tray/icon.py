# SPDX-License-Identifier: Apache-2.0
"""The icon: a bolt, drawn separately for each size, with a different shape for each state.

Panels may be light or dark, which is unknown, so the colours have a medium luminance: 3:1 or better against both (WCAG
2.1, 1.4.11). States differ in shape, not only in colour, for colour-blind users.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

from flashd_tray.snapshot import State

SIZES = (16, 22, 24, 32, 48, 64, 96)  # sizes that panels use, including those for high-density screens
STEPS = 10  # steps of progress; more would not be distinguishable
_FINER = 8  # drawn larger by this factor, then scaled down smoothly

Colour = tuple[int, int, int]

BLUE: Colour = (32, 126, 216)
GREY: Colour = (128, 128, 128)
AMBER: Colour = (184, 113, 8)
RED: Colour = (224, 60, 54)
WHITE: Colour = (255, 255, 255)

COLOURS = {
    State.AWAY: GREY,
    State.IDLE: GREY,
    State.SERVING: BLUE,
    State.SWAPPING: BLUE,
    State.CONVERTING: AMBER,
    State.FAILED: RED,
}

# In a square of side 1. The bolt fills its height; inside a ring it is made smaller. Its two level edges stand on whole
# pixels at every size: between them they would be a blur.
_BOLT = ((0.60, 0.02), (0.17, 0.57), (0.46, 0.57), (0.38, 0.98), (0.83, 0.40), (0.53, 0.40))
_RING_SCALE = 0.62


def draw(state: State, progress: float | None = None, size: int = 64) -> Image.Image:
    """Draws the icon in one size. `progress` is from 0 to 1, for states that have it."""
    side = size * _FINER
    image = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    pen = ImageDraw.Draw(image)
    colour = COLOURS[state]
    stroke = max(_FINER, round(side * 0.09))  # never thinner than a pixel
    match state:
        case State.SWAPPING | State.CONVERTING:
            _bolt(pen, side, colour, scale=_RING_SCALE)
            _ring(pen, size, colour, progress)
        case State.IDLE:
            _hollow_bolt(pen, side, colour, stroke)
        case State.AWAY:
            _hollow_bolt(pen, side, colour, stroke, shift=-0.14)
            _cross(pen, size, colour)
        case State.FAILED:
            _bolt(pen, side, colour, shift=-0.14)
            _badge(pen, size, colour)
        case State.SERVING:
            _bolt(pen, side, colour)
    return image.resize((size, size), Image.Resampling.BOX)


def _bolt(pen: ImageDraw.ImageDraw, side: int, colour: Colour, *, scale: float = 1.0, shift: float = 0.0) -> None:
    pen.polygon([(x + shift * side, y) for x, y in _points(side, scale)], fill=colour)


def _hollow_bolt(pen: ImageDraw.ImageDraw, side: int, colour: Colour, stroke: int, *, shift: float = 0.0) -> None:
    points = [(x + shift * side, y) for x, y in _points(side, 0.92)]
    pen.line([*points, points[0], points[1]], fill=colour, width=stroke, joint="curve")


def _points(side: int, scale: float) -> list[tuple[float, float]]:
    offset = (1 - scale) / 2
    placed = [((offset + scale * x) * side, (offset + scale * y) * side) for x, y in _BOLT]
    (top, left, inner, bottom, right, outer) = placed
    lower = round(left[1] / _FINER) * _FINER - 1  # the pen's last row is filled as well
    upper = round(right[1] / _FINER) * _FINER
    return [top, (left[0], lower), (inner[0], lower), bottom, (right[0], upper), (outer[0], upper)]


def _ring(pen: ImageDraw.ImageDraw, size: int, colour: Colour, progress: float | None) -> None:
    """Draws an arc that shows the progress, on a faint circle; three short arcs if the progress is unknown.

    Its width is whole pixels, from the edge of the square inwards.
    """
    stroke = max(2, round(size * 0.09)) * _FINER
    box = (0, 0, size * _FINER - 1, size * _FINER - 1)
    pen.arc(box, 0, 360, fill=(*colour, 90), width=stroke)
    if progress is None:
        for start in (-90, 30, 150):
            pen.arc(box, start, start + 60, fill=colour, width=stroke)
    else:
        pen.arc(box, -90, -90 + 360 * max(progress, 1 / STEPS), fill=colour, width=stroke)


def _badge(pen: ImageDraw.ImageDraw, size: int, colour: Colour) -> None:
    """An exclamation mark in the lower right corner, cut free from the bolt, on whole pixels: it is small."""
    width, gap = max(2, round(size * 0.15)), max(1, round(size * 0.07))
    left, top = size - width, round(size * 0.42)

    def block(x: int, y: int, until_x: int, until_y: int, fill: tuple[int, ...]) -> None:
        pen.rectangle((x * _FINER, y * _FINER, until_x * _FINER - 1, until_y * _FINER - 1), fill=fill)

    block(left - gap, top - gap, size, size, (0, 0, 0, 0))
    block(left, top, size, size - width - gap, colour)
    block(left, size - width, size, size, colour)


def _cross(pen: ImageDraw.ImageDraw, size: int, colour: Colour) -> None:
    """A cross in the lower right corner, where a bolt that was shifted leaves room."""
    edge, stroke = round(size * 0.34), size * 0.085
    low, high = (size - edge + stroke / 2) * _FINER, (size - stroke / 2) * _FINER
    for start, end in (((low, low), (high, high)), ((low, high), (high, low))):
        pen.line([start, end], fill=colour, width=round(stroke * _FINER))


class Theme:
    """Icon files in our own folder, in the layout of an icon theme, so that the panel can choose the size."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def icon(self, state: State, progress: float | None = None) -> str:
        """Returns the name of the icon. Its files are written on first use."""
        step = "" if progress is None else f"-{round(progress * STEPS)}"
        name = f"flashd-tray-{state}{step}"
        if not self._path(name, SIZES[-1]).exists():
            stepped = None if progress is None else round(progress * STEPS) / STEPS
            for size in SIZES:  # the largest last, which shows that all are written
                path = self._path(name, size)
                path.parent.mkdir(parents=True, exist_ok=True)
                draw(state, stepped, size).save(path)
            draw(state, stepped, SIZES[-1]).save(self.folder / f"{name}.png")  # for panels without support of themes
        return name

    def file(self, state: State) -> Path:
        """Returns the icon as one file, for programs without support of themes."""
        return self._path(self.icon(state), SIZES[-1])

    def _path(self, name: str, size: int) -> Path:
        return self.folder / "hicolor" / f"{size}x{size}" / "apps" / f"{name}.png"
