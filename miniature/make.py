"""Makes the miniature: a drawn world in the formats of real data, with its own CLIP and diffusion model.

    python miniature/make.py all --out world         # everything below, in this order
    python miniature/make.py images --out world      # images.tar, in CC3M's shard layout
    python miniature/make.py mmvp --pairs 400 --seed 7 DIR  # a benchmark in MMVP-VLM's layout, 400 pairs of each type
    python miniature/make.py clip --out world        # clip/, a folder for open_clip
    python miniature/make.py vae --out world         # diffusion/vae
    python miniature/make.py diffusion --out world   # diffusion/, a Stable Diffusion folder for diffusers
    python miniature/make.py check --out world       # check the gates; --samples FILE.png draws pictures from captions

To make a diffusion model whose text encoder is another CLIP's text tower, as in Stable Diffusion 2, in 1,500 steps
(it reuses the miniature's VAE and most of its U-Net):

    python miniature/make.py clip --out other --seed 1
    python miniature/make.py diffusion --out other --seed 1 --vae miniature/diffusion/vae \\
        --start miniature/diffusion/unet --steps 1500

For a text tower of another size, add `--text-width 96 --text-layers 3` to the first command. For one that the
contrastive loss trained as well, also add `--contrastive`.

world.py draws the world, models.py trains the models, gates.py checks them. Everything is seeded.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.errors import UserError, exit_on_user_error, usage_error


def read_args(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.error = usage_error
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("all", "images", "mmvp", "clip", "vae", "diffusion", "check"):
        part = parts.add_parser(name)
        part.error = usage_error
        add = part.add_argument
        if name == "mmvp":
            add("out", type=Path, metavar="DIR", help="a new or empty folder")
            add("--pairs", type=int, default=100, metavar="N", help="pairs of each type (%(default)s)")
            add("--seed", type=int, default=2, metavar="N", help="seed of the scenes (%(default)s)")
        else:
            add("--out", type=Path, default=Path("world"), metavar="DIR", help="the world's folder (%(default)s)")
        if name in ("all", "clip", "vae", "diffusion"):
            add("--seed", type=int, default=0, metavar="N", help="seed of scenes, weights and noise (%(default)s)")
        if name == "clip":
            add("--text-width", type=int, default=128, metavar="N", help="width of the text tower (%(default)s)")
            add("--text-layers", type=int, default=2, metavar="N", help="depth of the text tower (%(default)s)")
            add("--contrastive", action="store_true", help="train both towers with the contrastive loss")
        if name == "diffusion":
            add("--steps", type=int, default=4500, metavar="N", help="training steps (%(default)s)")
            add("--vae", type=Path, metavar="FOLDER", help="a VAE to use instead of DIR/diffusion/vae")
            add("--start", type=Path, metavar="FOLDER", help="a U-Net whose weights to start from, where shapes match")
        if name == "check":
            add("--samples", metavar="FILE.png", help="draw 24 pictures from captions")
    args = parser.parse_args(argv)
    if args.part == "clip" and (args.text_width < 32 or args.text_width % 32):
        raise UserError(f"--text-width {args.text_width}: must be a multiple of 32, the width of a head")
    if args.part == "diffusion":
        for folder in (args.vae, args.start):
            if folder and not (folder / "config.json").is_file():
                raise UserError(f"{folder}: no config.json; pass a folder such as miniature/diffusion/unet")
    if args.part == "mmvp" and args.out.exists() and any(args.out.iterdir()):
        raise UserError(f"{args.out}: not empty; choose another folder")
    return args


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a typo are answered at once
    with exit_on_user_error("make.py"):
        args = read_args()

from miniature import gates, models, world


def main(args: argparse.Namespace) -> None:
    functions = dict(
        images=world.write_images, mmvp=world.write_mmvp, clip=models.make_clip, vae=models.make_vae,
        diffusion=models.make_diffusion, check=gates.check,
    )  # fmt: skip
    settings = vars(args).copy()
    calls = {settings.pop("part"): settings}
    if args.part == "all":
        folder = dict(out=args.out)
        calls = dict(images=folder, mmvp=dict(out=args.out / "mmvp"))
        calls |= dict(clip=settings, vae=settings, diffusion=settings, check=folder)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, arguments in calls.items():
        start = time.perf_counter()
        functions[name](**arguments)
        print(f"{name}: {time.perf_counter() - start:.0f} s on {models.DEVICE.type}, in {args.out}", flush=True)


if __name__ == "__main__":
    with exit_on_user_error("make.py"):
        main(args)
