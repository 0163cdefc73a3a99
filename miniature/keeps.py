"""How much of a scene is kept in the pictures that φ draws from CLIP's condition, before and after a run.

    python miniature/keeps.py RUN            # default: runs/miniature

As in extras/reconstruct.py, φ draws unseen scenes from the condition of the untouched CLIP and of the trained one, with
the same noise, patches and linear layer. A linear probe on pixels, fitted to other scenes that the VAE has encoded and
decoded, predicts class, colour and the nine details. Two columns bound what can be kept: "VAE alone", the decoded
scenes themselves, and "caption", pictures that φ draws from full captions. The control "another's" compares the
pictures after training with another scene.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.errors import UserError, exit_on_user_error, usage_error


def read_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = usage_error
    parser.add_argument("run", nargs="?", default="runs/miniature", metavar="RUN", help="a run's folder (%(default)s)")
    parser.add_argument("--guidance", type=float, default=1, metavar="G", help="1 is no guidance (%(default)s)")
    args = parser.parse_args(argv)
    if not 1 <= args.guidance < float("inf"):
        raise UserError("--guidance must be at least 1")
    if args.run == parser.get_default("run") and not Path(args.run).exists():
        raise UserError(f"{args.run}: not found; run `python train.py` first, or pass a run")
    return args


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a typo are answered at once
    with exit_on_user_error("keeps.py"):
        args = read_args()

import numpy as np
import torch
from tqdm import tqdm

from extras.reconstruct import load_run
from miniature import world
from miniature.claims import answers, change, draw_scenes, markdown, score
from miniature.gates import ridge
from miniature.models import DEVICE, encode
from model import embed_texts

SCENES, STEPS = 300, 25  # scenes to draw, DDIM steps


def table(scenes: np.ndarray, reads: list[np.ndarray]) -> str:
    """The results in Markdown.

    Args:
        scenes: (n, 11).
        reads: predictions for the decoded scenes, the pictures from captions, those before and after, each (n, 11).
    """
    decoded, caption, before, after = (answers(read == scenes) for read in reads)
    another = answers(reads[3] == np.roll(scenes, 1, 0))
    names, nine = ["class", "colour", *world.DETAILS, "**mean of the nine**"], slice(2, 11)
    rows = [["kept, in percent", "VAE alone", "caption", "before", "after", "change (95% interval)", "another's"]]
    for name, part in zip(names, [slice(k, k + 1) for k in range(11)] + [nine]):
        figures = [f"{score(outcome[:, part].sum(0)):.1f}" for outcome in (decoded, caption, before, after, another)]
        points, low, high = change(before[:, part], after[:, part])
        rows.append([name, *figures[:4], f"{points:+.1f} ({low:+.1f} … {high:+.1f})", figures[4]])
    return markdown(rows)


@torch.no_grad()
def main(args: argparse.Namespace) -> None:
    run = load_run(args.run, DEVICE)
    if run.image_size != world.SIZE:
        raise UserError(f"{args.run}: must be a run of a miniature; its images have {run.image_size} pixels per side")
    fitted, drawn = draw_scenes(3000, seed=62), draw_scenes(SCENES, seed=63)
    scenes, vae = np.concatenate([fitted[0], drawn[0]]), run.diffusion.vae
    pixels = torch.from_numpy(np.stack([*fitted[1], *drawn[1]])).permute(0, 3, 1, 2)
    latents = encode(vae, pixels, scale=1)
    pictures = [vae.decode(z).sample / 2 + 0.5 for z in latents.split(250)]  # first the decoded scenes
    captions = embed_texts(run.args.diffusion, [world.caption(scene, [True] * 10) for scene in drawn[0]])
    conditions = [captions.to(DEVICE), *run.conditions(pixels[3000:].to(DEVICE) / 255, seed=0)]
    noise = run.noise(SCENES, seed=0)
    for condition in conditions:
        parts = tqdm(list(zip(condition.split(25), noise.split(25))), desc="draw", unit="25 pictures", leave=False)
        pictures += [run.draw(c, z, STEPS, args.guidance, progress=False) for c, z in parts]
    reads = ridge(torch.cat(pictures).clamp(0, 1).cpu(), scenes[:3000]).reshape(4, SCENES, -1)
    print(f"{SCENES} unseen scenes, DDIM with {STEPS} steps, guidance {args.guidance:g}, {args.run}\n")
    print(table(drawn[0], list(reads)))


if __name__ == "__main__":
    with exit_on_user_error("keeps.py"):
        main(args)
