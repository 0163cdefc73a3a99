"""A drawn world of 64 × 64 pixels: scenes, their pictures and captions, and a benchmark in MMVP-VLM's layout.

A scene shows one thing of ten classes (SHAPES) and six colours, with nine details (DETAILS): MMVP-VLM's nine types.
All are drawn uniformly and independently. A person sees each of them at a glance.
"""

from __future__ import annotations

import csv
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PREFIX = "a photo of "  # in front of half of CLIP's captions, and of the benchmark's statements
CLIP_NAMES = [0.8] + 9 * [1 / 8]  # how often a caption names the colour and each of the nine details
DIFFUSION_NAMES = [0.8] + 9 * [1 / 2]

SIZE = 64  # pixels per side
COLOURS = dict(
    red=(214, 40, 40), green=(40, 160, 60), blue=(45, 80, 220),
    yellow=(235, 200, 30), purple=(175, 45, 190), orange=(245, 130, 30),
)  # fmt: skip
GROUNDS = {
    "on white": (250, 250, 250), "on grey": (150, 150, 150), "on pink": (250, 180, 205), "on mint": (165, 225, 190),
}  # fmt: skip
DETAILS = {  # MMVP-VLM's nine types, and the values of each
    "Orientation": ("upright", "inverted"),
    "Presence": ("with hat", "without hat"),
    "State": ("whole", "broken"),
    "Quantity": ("under one star", "under two stars", "under three stars"),
    "Spatial": ("at left", "at right"),
    "Color": tuple(GROUNDS),  # of the ground
    "Structural Character": ("plain", "striped", "checked"),
    "Text": ("beside A", "beside E", "beside O", "beside X"),
    "Camera Perspective": ("near", "far"),
}
SHAPES = {  # in percent of a square, y down: polygons "x y x y …"; "+ box" draws an ellipse, "- box" cuts one out
    "house": ["10 45 50 5 90 45 90 100 62 100 62 65 38 65 38 100 10 100"],
    "tree": ["50 0 90 70 10 70", "40 70 60 70 60 100 40 100"],
    "cup": ["10 15 75 15 62 100 23 100", "+ 55 25 100 70", "- 64 36 89 59", "10 15 75 15 70 50 20 60"],
    "boat": ["0 65 100 65 80 100 20 100", "45 0 55 0 55 65 45 65", "55 2 95 50 55 50"],
    "mushroom": ["+ 0 5 100 95", "- -10 50 110 130", "35 45 65 45 72 100 28 100"],
    "heart": ["+ 2 5 54 60", "+ 46 5 98 60", "6 42 94 42 50 100"],
    "crown": ["5 10 27 50 50 2 73 50 95 10 95 100 5 100"],
    "bottle": ["40 0 60 0 60 30 78 45 78 100 22 100 22 45 40 30"],
    "shirt": ["30 5 70 5 100 30 88 50 75 42 75 100 25 100 25 42 12 50 0 30"],
    "key": ["+ 20 0 80 54", "- 40 16 60 36", "40 45 60 45 60 100 40 100"]
    + ["60 64 85 64 85 76 60 76", "60 86 85 86 85 100 60 100"],
}
CLASSES = tuple(SHAPES)
VALUES = [len(CLASSES), len(COLOURS), *(len(v) for v in DETAILS.values())]  # of each column of a scene


def caption(scene, named) -> str:
    """The caption of a scene (11,). It names the class, and the colour and details that `named` (10,) bool selects."""
    word = [f"{v[i]} " if n else "" for v, i, n in zip([tuple(COLOURS), *DETAILS.values()], scene[1:], named)]
    colour, orientation, presence, state, quantity, place, ground, structure, letter, camera = word
    words = camera + orientation + state + structure + colour + CLASSES[scene[0]] + " "
    return ("the " + words + presence + place + ground + letter + quantity).strip()


def draw(scene, rng: np.random.Generator) -> Image.Image:
    """The picture of a scene (11,), SIZE × SIZE. The rng draws what no caption names: jitter, shade, phase."""
    return draw_with_mask(scene, rng)[0]


def draw_with_mask(scene, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """The picture, and the mask of the thing without its hat: how much it covers of each pixel, 0 to 255."""
    kind, colour, turned, hatless, broken, stars, right, ground, structure, letter, far = scene
    k = 4  # draws at four times the size, then reduces
    jitter, shade, phase = rng.uniform(-1.5, 1.5, 2), rng.uniform(0.88, 1, 3), rng.integers(0, 4)
    background = tuple(list(GROUNDS.values())[ground])
    canvas = Image.new("RGB", (SIZE * k, SIZE * k), background)
    ink = ImageDraw.Draw(canvas)
    for i in range(stars + 1):  # upper left, in a row
        x, y, r = (8 + 13 * i) * k, 9 * k, np.array([5.5, 2.3]) * k
        points = [(x + r[j % 2] * np.sin(np.pi * j / 5), y - r[j % 2] * np.cos(np.pi * j / 5)) for j in range(10)]
        ink.polygon(points, fill=(255, 225, 80), outline=(90, 60, 0), width=2)
    ink.rectangle((47 * k, 1 * k, 63 * k, 17 * k), fill="white", outline=(60, 60, 60), width=4)  # the sign, upper right
    font = ImageFont.load_default(15 * k)
    ink.text((55 * k, 9 * k), DETAILS["Text"][letter][-1], fill="black", font=font, anchor="mm", stroke_width=2)

    side = (23 if far else 37) * k  # the object, below
    mask, hat = Image.new("L", (side, side)), Image.new("L", (side, side))
    pen, top = ImageDraw.Draw(mask), 0 if hatless else 0.24
    for part in SHAPES[CLASSES[kind]]:
        numbers = np.array([int(n) for n in part.strip("+- ").split()]).reshape(-1, 2) / 100
        points = [(x * side, (top + (1 - top) * y) * side) for x, y in numbers]
        if len(points) == 2:
            pen.ellipse((*points[0], *points[1]), fill=255 * (part[0] == "+"))
        else:
            pen.polygon(points, fill=255)
    if not hatless:
        brim = ImageDraw.Draw(hat)
        brim.rectangle((0.2 * side, 0.17 * side, 0.8 * side, 0.25 * side), fill=255)
        brim.rectangle((0.32 * side, 0, 0.68 * side, 0.2 * side), fill=255)
    if broken:
        gap = ((0, 0.75), (0.4, 0.52), (0.6, 0.7), (1, 0.42), (1, 0.58), (0.6, 0.86), (0.4, 0.68), (0, 0.91))
        pen.polygon([(x * side, (top + (1 - top) * y) * side) for x, y in gap], fill=0)
    light = tuple((np.array(list(COLOURS.values())[colour]) * shade).astype(int))
    dark = tuple((np.array(light) * 0.35).astype(int))
    body, cell = Image.new("RGB", (side, side), light), 6 * k
    brush = ImageDraw.Draw(body)
    for y in range(-2, side // cell + 1):
        for x in range(-2, side // cell + 1):
            if structure == 1 and y % 2 or structure == 2 and (x + y) % 2:
                left, upper = x * cell + phase * cell // 2, y * cell + phase * cell // 2
                brush.rectangle((left, upper, left + cell - 1, upper + cell - 1), fill=dark)
    if turned:
        mask, hat = mask.transpose(Image.Transpose.FLIP_TOP_BOTTOM), hat.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    centre = np.array([(51 if far else 44) if right else (13 if far else 20), 41]) + jitter
    corner = tuple((centre * k - side / 2).astype(int))
    canvas.paste(body, corner, mask)
    canvas.paste((0, 190, 215), corner, hat)
    covered = Image.new("L", canvas.size)
    covered.paste(mask, corner)
    return canvas.reduce(k), covered.reduce(k)


def random_scenes(count: int, seed: int | tuple[int, int]) -> np.ndarray:
    """Scenes (count, 11) int: the indices of class, colour and the nine details."""
    return np.random.default_rng(seed).integers(0, VALUES, (count, len(VALUES)))


def write_images(out: Path, count: int = 2000, seed: int = 3) -> None:
    """Writes images.tar, with KEY.jpg and KEY.txt for each scene, in img2dataset's layout."""
    rng = np.random.default_rng((seed, 0))
    with tarfile.open(out / "images.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, scene in enumerate(random_scenes(count, seed)):
            named = rng.random(10) < CLIP_NAMES
            for suffix, content in (("jpg", jpeg(draw(scene, rng))), ("txt", caption(scene, named).encode())):
                member = tarfile.TarInfo(f"{i:09}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_mmvp(out: Path, pairs: int = 100, seed: int = 2) -> None:
    """Writes a benchmark in MMVP-VLM's layout, with `pairs` pairs of each type.

    A pair shows one scene twice, with one detail changed. A statement names class, colour and that detail.
    """
    rows, rng = [["Question ID", "Type", "Statement"]], np.random.default_rng((seed, 0))
    for detail, (name, values) in enumerate(DETAILS.items()):
        (out / "MLLM_VLM Images" / name).mkdir(parents=True, exist_ok=True)
        for scene in random_scenes(pairs, (seed, detail)):
            drawn = int(rng.integers(2**31))
            for value in rng.choice(len(values), 2, replace=False):
                scene[2 + detail] = value
                image = draw(scene, np.random.default_rng(drawn))
                (out / "MLLM_VLM Images" / name / f"{len(rows)}.jpg").write_bytes(jpeg(image))
                rows.append([len(rows), name, caption(scene, np.isin(np.arange(10), (0, 1 + detail)))])
    with open(out / "Questions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
