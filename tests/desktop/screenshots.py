# SPDX-License-Identifier: Apache-2.0
"""Makes packaging/desktop/screenshots, for the documentation and AppStream, from the last pictures of tests/desktop.

python tests/desktop/screenshots.py
"""

from __future__ import annotations

from box import ROOT, SHOTS, WIDTH
from PIL import Image, ImageDraw

TARGET = ROOT / "packaging" / "desktop" / "screenshots"
WALLPAPER = (68, 97, 123)  # in place of the black of a screen that has nothing on it
# The visible part of the screen: left, top, right, bottom.
PARTS = {
    "menu-light": (WIDTH - 720, 0, WIDTH, 420),
    "finder": (140, 95, 860, 600),
}


def main() -> None:
    for name, part in PARTS.items():
        with Image.open(SHOTS / f"{name}.png") as picture:
            shown = picture.convert("RGB")
        ImageDraw.floodfill(shown, (0, shown.height - 1), WALLPAPER)
        shown.crop(part).quantize(256).save(TARGET / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
