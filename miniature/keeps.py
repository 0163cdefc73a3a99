"""How much of a scene the pictures keep that φ draws from CLIP's condition, before and after a run.

    python miniature/keeps.py                # of the last default run, runs/miniature
    python miniature/keeps.py RUN

What extras/reconstruct.py shows, counted: for unseen scenes φ draws from the condition of the untouched CLIP and of the
trained one, with the same noise, patches and linear layer. A linear reader of pixels (gate 2's, fitted to other scenes
that the VAE has encoded and decoded) then says what it sees: class, colour, and the nine details. Two columns say what
could be kept: "VAE alone" is what it reads of the scenes themselves, decoded; "caption" what it reads of pictures that
φ draws from captions that name everything. "Another's" is the control: the pictures after training, held against
another scene.

The scenes' seeds are 62 (to fit) and 63 (to draw); the list of all is in claims.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import make  # first: it finds the files at the top
import numpy as np
import torch
from claims import change, draw_scenes, score, share
from tqdm import tqdm

from extras.reconstruct import Reconstruction, load_run
from harness.errors import UserError, exit_on_user_error, usage_error
from model import embed_texts


def draw_all(run: Reconstruction, conditions: list[torch.Tensor], steps: int, guidance: float) -> list[torch.Tensor]:
    """What φ draws from each of these conditions of the same scenes (B, L, W), with the same noise."""
    noise, found = run.noise(len(conditions[0]), seed=0), []
    for condition in conditions:
        parts = tqdm(list(zip(condition.split(25), noise.split(25))), desc="draw", unit="25 pictures", leave=False)
        found.append(torch.cat([run.draw(c, z, steps, guidance, progress=False) for c, z in parts]))
    return found


def table(scenes: np.ndarray, reads: list[np.ndarray]) -> str:
    """What is read of the decoded scenes, and of pictures from captions, before and after, each (n, 11): Markdown."""
    whole, caption, before, after = (share(read == scenes) for read in reads)
    another = share(reads[3] == np.roll(scenes, 1, 0))
    names, nine = ["class", "colour", *make.DETAILS, "**mean of the nine**"], slice(2, 11)
    columns = [slice(k, k + 1) for k in range(11)] + [nine]
    header = "| kept, in percent | VAE alone | caption | before | after | change (95% interval) | another's |"
    lines = [header, "|---" * 7 + "|"]
    for name, part in zip(names, columns):
        figures = [f"{score(outcome[:, part].sum(0)):.1f}" for outcome in (whole, caption, before, after, another)]
        points, low, high = change(before[:, part], after[:, part])
        figures.insert(4, f"{points:+.1f} ({low:+.1f} … {high:+.1f})")
        lines.append(f"| {name} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description="What the pictures keep that φ draws from CLIP's condition.")
    parser.error = usage_error
    parser.add_argument("run", nargs="?", default="runs/miniature", metavar="RUN", help="a run's folder (%(default)s)")
    parser.add_argument("--scenes", type=int, default=300, metavar="N", help="how many are drawn (%(default)s)")
    parser.add_argument("--steps", type=int, default=25, metavar="N", help="of DDIM (%(default)s)")
    parser.add_argument("--guidance", type=float, default=1, metavar="G", help="classifier-free; 1: none (%(default)s)")
    args = parser.parse_args()
    if args.scenes < 2 or not 1 <= args.steps <= 1000:
        raise UserError("--scenes must be at least 2, --steps from 1 to 1000")
    if args.run == parser.get_default("run") and not Path(args.run).exists():
        raise UserError(f"{args.run}: there is none yet; `python train.py` makes it, or name a run")
    run = load_run(args.run, make.DEVICE)
    if run.image_size != make.SIZE:
        raise UserError(f"{args.run}: is no run of a miniature, its images have {run.image_size} pixels a side")
    fitted, drawn = draw_scenes(3000, seed=62), draw_scenes(args.scenes, seed=63)
    scenes, vae = np.concatenate([fitted[0], drawn[0]]), run.diffusion.vae
    pixels = torch.from_numpy(np.stack([*fitted[1], *drawn[1]])).permute(0, 3, 1, 2)
    latents = make.encode(vae, pixels, scale=1)
    decoded = torch.cat([vae.decode(z).sample / 2 + 0.5 for z in latents.split(250)]).clamp(0, 1)
    captions = embed_texts(run.args.diffusion, [make.caption(scene, [True] * 10) for scene in drawn[0]])
    conditions = [captions.to(make.DEVICE), *run.conditions(pixels[3000:].to(make.DEVICE) / 255, seed=0)]
    pictures = draw_all(run, conditions, args.steps, args.guidance)
    reads = make.ridge(torch.cat([decoded, *pictures]).cpu(), scenes[:3000]).reshape(4, args.scenes, -1)
    print(f"{args.scenes} unseen scenes, DDIM with {args.steps} steps, guidance {args.guidance:g}, {args.run}\n")
    print(table(drawn[0], list(reads)))


if __name__ == "__main__":
    with exit_on_user_error("keeps.py"):
        main()
