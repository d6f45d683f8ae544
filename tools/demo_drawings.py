"""Draw the pictures of the demo: the things the embedded base knows, and the creature it does not know.

`python tools/demo_drawings.py` writes the training pictures of the quickstart again, the same to the byte.
"""

import argparse
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parents[1]))
from library.files import write_text_whole, written_whole

SIZE = 128  # pixels, the side of a drawing
SUPERSAMPLING = 4  # drawn this much larger, then reduced, so that edges are smooth

COLOURS = {
    "red": (214, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 215, 60),
    "green": (60, 160, 70),
    "blue": (50, 100, 215),
    "purple": (130, 70, 190),
    "pink": (245, 140, 185),
    "brown": (125, 80, 45),
    "black": (25, 25, 30),
    "white": (250, 250, 250),
}
BACKGROUNDS = {
    "white": (245, 245, 242),
    "gray": (150, 152, 156),
    "blue": (150, 200, 240),
    "green": (165, 215, 155),
    "yellow": (250, 235, 160),
    "pink": (250, 205, 215),
    "purple": (200, 180, 230),
    "black": (40, 40, 48),
}
NUM_REGULARISATION = 24  # as many as the creature gets in an epoch (12 drawings, twice)
RADII = {"small": 27, "": 38, "big": 49}  # half the height of the thing, in pixels


class Canvas:
    """A picture whose coordinates are relative to the thing drawn: the unit square [-1, 1] x [-1, 1]."""

    def __init__(self, background: tuple[int, int, int], centre_xy: tuple[float, float], radius: float):
        side = SIZE * SUPERSAMPLING
        self.image = Image.new("RGB", (side, side), background)
        self.draw = ImageDraw.Draw(self.image)
        self.centre_xy = centre_xy
        self.radius = radius

    def _pixels(self, points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        cx, cy = self.centre_xy
        return [((cx + x * self.radius) * SUPERSAMPLING, (cy + y * self.radius) * SUPERSAMPLING) for x, y in points]

    def polygon(self, points: list[tuple[float, float]], colour) -> None:
        self.draw.polygon(self._pixels(points), fill=colour)

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour) -> None:
        (left, top), (right, bottom) = self._pixels([(x - rx, y - ry), (x + rx, y + ry)])
        self.draw.ellipse((left, top, right, bottom), fill=colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour)

    def line(self, points: list[tuple[float, float]], width: float, colour) -> None:
        pixels = self._pixels(points)
        thickness = max(1, round(width * self.radius * SUPERSAMPLING))
        self.draw.line(pixels, fill=colour, width=thickness, joint="curve")
        for x, y in (pixels[0], pixels[-1]):
            self.draw.ellipse((x - thickness / 2, y - thickness / 2, x + thickness / 2, y + thickness / 2), fill=colour)

    def finished(self) -> Image.Image:
        return self.image.resize((SIZE, SIZE), Image.Resampling.BOX)


def shade(colour: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    """The colour darker (factor < 1) or lighter (factor > 1)."""
    if factor <= 1:
        return tuple(round(c * factor) for c in colour)
    return tuple(round(255 - (255 - c) * (2 - factor)) for c in colour)


def contrast(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """A colour for details that is seen on this one."""
    return shade(colour, 0.45) if sum(colour) > 240 else (120, 120, 128)


def star_points(num_tips: int, inner: float) -> list[tuple[float, float]]:
    points = []
    for k in range(2 * num_tips):
        angle = math.pi * k / num_tips - math.pi / 2
        radius = 1.0 if k % 2 == 0 else inner
        points.append((radius * math.cos(angle), radius * math.sin(angle)))
    return points


def heart_points() -> list[tuple[float, float]]:
    points = []
    for k in range(80):
        t = 2 * math.pi * k / 80
        x = 16 * math.sin(t) ** 3
        y = -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
        points.append((x / 16, y / 16 + 0.1))
    return points


def draw_circle(c: Canvas, colour) -> None:
    c.ellipse(0, 0, 0.95, 0.95, colour)


def draw_square(c: Canvas, colour) -> None:
    c.box(-0.85, -0.85, 0.85, 0.85, colour)


def draw_triangle(c: Canvas, colour) -> None:
    c.polygon([(0, -0.95), (0.98, 0.8), (-0.98, 0.8)], colour)


def draw_star(c: Canvas, colour) -> None:
    c.polygon(star_points(5, 0.42), colour)


def draw_heart(c: Canvas, colour) -> None:
    c.polygon(heart_points(), colour)


def draw_diamond(c: Canvas, colour) -> None:
    c.polygon([(0, -1), (0.72, 0), (0, 1), (-0.72, 0)], colour)


def draw_ring(c: Canvas, colour) -> None:
    background = c.image.getpixel((0, 0))
    c.ellipse(0, 0, 0.98, 0.98, colour)
    c.ellipse(0, 0, 0.55, 0.55, background)


def draw_cross(c: Canvas, colour) -> None:
    c.box(-0.32, -0.95, 0.32, 0.95, colour)
    c.box(-0.95, -0.32, 0.95, 0.32, colour)


def draw_tree(c: Canvas, colour) -> None:
    c.box(-0.16, 0.3, 0.16, 1, COLOURS["brown"])
    c.polygon([(0, -1), (0.75, 0.0), (-0.75, 0.0)], colour)
    c.polygon([(0, -0.55), (0.9, 0.55), (-0.9, 0.55)], colour)


def draw_balloon(c: Canvas, colour) -> None:
    c.line([(0, 0.4), (0.08, 0.7), (-0.06, 1)], 0.06, (90, 90, 95))
    c.ellipse(0, -0.3, 0.66, 0.72, colour)
    c.polygon([(0, 0.36), (0.14, 0.54), (-0.14, 0.54)], shade(colour, 0.8))


def draw_house(c: Canvas, colour) -> None:
    c.box(-0.75, -0.15, 0.75, 0.95, colour)
    c.polygon([(0, -1), (0.98, -0.1), (-0.98, -0.1)], shade(colour, 0.55) if sum(colour) > 150 else (110, 110, 118))
    c.box(-0.2, 0.3, 0.2, 0.95, contrast(colour))


def draw_fish(c: Canvas, colour) -> None:
    c.polygon([(0.35, 0), (1, -0.55), (1, 0.55)], shade(colour, 0.75))
    c.ellipse(-0.2, 0, 0.78, 0.55, colour)
    c.ellipse(-0.6, -0.13, 0.13, 0.13, (255, 255, 255))
    c.ellipse(-0.62, -0.13, 0.065, 0.065, (20, 20, 20))


def draw_boat(c: Canvas, colour) -> None:
    c.polygon([(-0.95, 0.35), (0.95, 0.35), (0.6, 0.9), (-0.6, 0.9)], colour)
    c.box(-0.06, -0.95, 0.06, 0.4, COLOURS["brown"])
    c.polygon([(0.14, -0.9), (0.8, 0.2), (0.14, 0.2)], shade(colour, 1.45) if sum(colour) < 700 else (190, 190, 195))


def draw_car(c: Canvas, colour) -> None:
    c.polygon([(-0.6, 0.0), (-0.38, -0.5), (0.4, -0.5), (0.65, 0.0)], shade(colour, 0.7))
    c.box(-1, -0.05, 1, 0.42, colour)
    for x in (-0.52, 0.52):
        c.ellipse(x, 0.45, 0.27, 0.27, (20, 20, 24))
        c.ellipse(x, 0.45, 0.12, 0.12, (200, 200, 205))


def draw_cat(c: Canvas, colour) -> None:
    for side in (-1, 1):
        c.polygon([(side * 0.85, -1), (side * 0.8, -0.1), (side * 0.2, -0.55)], colour)
    c.ellipse(0, 0.12, 0.88, 0.8, colour)
    for x in (-0.36, 0.36):
        c.ellipse(x, -0.02, 0.16, 0.2, (255, 255, 255))
        c.ellipse(x, 0.0, 0.08, 0.14, (20, 20, 20))
    c.polygon([(-0.13, 0.34), (0.13, 0.34), (0, 0.5)], COLOURS["pink"])


def draw_mushroom(c: Canvas, colour) -> None:
    c.box(-0.28, 0, 0.28, 0.9, (238, 226, 200))
    c.draw.pieslice([*c._pixels([(-0.98, -0.95)])[0], *c._pixels([(0.98, 0.95)])[0]], start=180, end=360, fill=colour)
    spot = (250, 250, 245) if sum(colour) < 700 else (170, 170, 175)
    for x, y, r in ((-0.45, -0.35, 0.17), (0.15, -0.6, 0.16), (0.55, -0.25, 0.15)):
        c.ellipse(x, y, r, r, spot)


def draw_flower(c: Canvas, colour) -> None:
    c.box(-0.07, 0.1, 0.07, 1, COLOURS["green"])
    for k in range(6):
        angle = math.pi / 3 * k
        c.ellipse(0.42 * math.cos(angle), -0.3 + 0.42 * math.sin(angle), 0.29, 0.29, colour)
    c.ellipse(0, -0.3, 0.25, 0.25, COLOURS["yellow"] if colour != COLOURS["yellow"] else COLOURS["brown"])


def draw_moon(c: Canvas, colour) -> None:
    background = c.image.getpixel((0, 0))
    c.ellipse(0, 0, 0.95, 0.95, colour)
    c.ellipse(0.45, -0.15, 0.78, 0.78, background)


THINGS = {
    name.removeprefix("draw_"): function for name, function in list(globals().items()) if name.startswith("draw_")
}


def draw_creature(c: Canvas, look_x: float = 0.0) -> None:
    """The new concept: blue with orange stripes, one eye, two antennae, two feet."""
    blue, orange = COLOURS["blue"], COLOURS["orange"]
    for side in (-1, 1):
        c.line([(side * 0.2, -0.5), (side * 0.45, -0.92)], 0.09, blue)
        c.ellipse(side * 0.45, -0.9, 0.13, 0.13, orange)
        c.ellipse(side * 0.32, 0.88, 0.24, 0.14, orange)
    c.ellipse(0, 0.15, 0.7, 0.75, blue)
    for y in (0.3, 0.58):
        half_width = 0.7 * math.sqrt(max(0.0, 1 - ((y + 0.05 - 0.15) / 0.75) ** 2))
        c.box(-half_width, y, half_width, y + 0.13, orange)
    c.ellipse(0, -0.13, 0.34, 0.34, (255, 255, 255))
    c.ellipse(look_x * 0.14, -0.13, 0.16, 0.18, (20, 20, 25))


def caption_of(size: str, colour: str, thing: str, background: str) -> str:
    """The sentence the base is trained with: "a small yellow fish on a blue background"."""
    return " ".join(word for word in ("a", size, colour, thing, "on a", background, "background") if word)


def draw_thing(thing: str, colour: str, size: str, background: str, centre_xy: tuple[float, float]) -> Image.Image:
    canvas = Canvas(BACKGROUNDS[background], centre_xy, RADII[size])
    THINGS[thing](canvas, COLOURS[colour])
    return canvas.finished()


def jittered_centre(rng: random.Random, radius: float) -> tuple[float, float]:
    room = max(0.0, SIZE / 2 - radius - 4)
    return (SIZE / 2 + rng.uniform(-room, room) * 0.6, SIZE / 2 + rng.uniform(-room, room) * 0.6)


def drawings(count: int, seed: int) -> Iterator[tuple[Image.Image, str]]:
    """`count` drawings with captions; things, colours, sizes and backgrounds come equally often."""
    rng = random.Random(seed)
    things = sorted(THINGS)
    for index in range(count):
        thing = things[index % len(things)]
        colour = rng.choice(sorted(COLOURS))
        background = rng.choice([name for name in sorted(BACKGROUNDS) if name != colour])
        size = rng.choice(sorted(RADII))
        centre_xy = jittered_centre(rng, RADII[size])
        yield draw_thing(thing, colour, size, background, centre_xy), caption_of(size, colour, thing, background)


def creature_pictures(seed: int = 7) -> Iterator[tuple[Image.Image, str]]:
    """Twelve drawings of the creature on different backgrounds, captioned with its trigger word."""
    rng = random.Random(seed)
    backgrounds = [*sorted(BACKGROUNDS), "white", "blue", "green", "yellow"]
    for index, background in enumerate(backgrounds):
        size = ("", "big", "small")[index % 3]
        canvas = Canvas(BACKGROUNDS[background], jittered_centre(rng, RADII[size]), RADII[size])
        draw_creature(canvas, look_x=rng.choice([-1.0, 0.0, 1.0]))
        words = ["a", size, "yabin", "on a", background, "background"]
        yield canvas.finished(), " ".join(word for word in words if word)


def write_pictures(folder: Path, pictures: Iterator[tuple[Image.Image, str]], stem: str) -> int:
    count = 0
    for count, (image, caption) in enumerate(pictures, start=1):
        with written_whole(folder / f"{stem}{count:02d}.png") as unfinished:
            image.save(unfinished, optimize=True)
        write_text_whole(folder / f"{stem}{count:02d}.txt", caption + "\n")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description="write the training and regularisation pictures of the quickstart")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parents[1] / "assets" / "demo_pictures")
    options = parser.parse_args()
    for folder, pictures, stem in (
        ("train/2_yabin", creature_pictures(), "yabin"),
        ("reg/1_things", drawings(NUM_REGULARISATION, seed=1000), "thing"),
    ):
        count = write_pictures(options.output_dir / folder, pictures, stem)
        print(f"{count} pictures with captions in {options.output_dir / folder}")


if __name__ == "__main__":
    main()
