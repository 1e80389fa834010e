"""Draw a folder of images to try `data=FOLDER` with: circles, squares, stars and triangles of any size and angle.

    python -m tools.shapes my_images          500 of each, in my_images/circle, my_images/square, ...
    python -m tools.shapes my_images 2000     more of them
"""
import math
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

# How many corners, and how far from the middle the outline is between two of them, as a part of the radius.
SHAPES = {"circle": (40, math.cos(math.pi / 40)), "square": (4, math.cos(math.pi / 4)), "star": (5, 0.45),
          "triangle": (3, math.cos(math.pi / 3))}


def draw(name, rng, size=28, fine=8):
    """One shape, white on black: a polygon, drawn `fine` times as large and then made small."""
    corners, between = SHAPES[name]
    radius, turn = rng.uniform(0.22, 0.44) * size * fine, rng.uniform(0, 2 * math.pi)
    room = max(0, size * fine / 2 - radius - fine)     # to move in without touching the edge
    x, y = (size * fine / 2 + rng.uniform(-room, room) for _ in "xy")
    points = []
    for k in range(2 * corners):
        r, angle = radius * (between if k % 2 else 1), turn + math.pi * k / corners
        points.append((x + r * math.cos(angle), y + r * math.sin(angle)))
    image = Image.new("L", (size * fine, size * fine))
    ImageDraw.Draw(image).polygon(points, fill=255)
    return image.resize((size, size), Image.Resampling.BOX)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    count = (argv[1:] or ["500"])[0]
    if not 0 < len(argv) < 3 or argv[0].startswith("-") or not count.isdecimal():
        print(__doc__)
        return 0 if {"-h", "--help"} & set(argv) else 2
    folder = Path(argv[0])
    if folder.exists():
        print(f"error: {folder} exists already, and nothing in it is written over: name a new folder", file=sys.stderr)
        return 2
    rng = random.Random(0)
    for name in SHAPES:
        (folder / name).mkdir(parents=True)
        for i in range(int(count)):
            draw(name, rng).save(folder / name / f"{i:04d}.png")
    print(f"{folder}: {count} images of each of {', '.join(SHAPES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
