"""Pictures of what CLIP tells the diffusion model: what φ draws from a run's conditions, before and after.

    python extras/reconstruct.py runs/miniature rows.png
    python extras/reconstruct.py runs/l14 rows.png --images photos --count 6

Under each image stands what φ draws from the condition of the untouched CLIP, and from that of the trained one. All
else is the same: the first noise, the drawn patches, and the linear layer, which is the run's at its end. DDIM adds no
noise of its own. With `--guidance G`, ε is moved from that of the text alone to that of the condition, G times the way;
training has none of this, so G is 1.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from condition import VisualCondition, draw_patch_indices
from data import open_images, to_rgb
from harness.checkpoint import load_checkpoint, whole_checkpoint
from harness.errors import UserError, exit_on_user_error, one_line, usage_error
from harness.mmvp import read_mmvp
from model import Clip, Diffusion
from train import build


@dataclass
class Reconstruction:
    """A run's parts; `towers` are the vision tower's weights, untouched and trained."""

    args: argparse.Namespace
    clip: Clip
    diffusion: Diffusion
    conditioner: VisualCondition
    towers: tuple[dict, dict]

    @property
    def image_size(self) -> int:
        return self.args.image_size or self.diffusion.image_size

    @torch.no_grad()
    def conditions(self, images: torch.Tensor, seed: int) -> list[torch.Tensor]:
        """c of images (B, 3, S, S) in [0, 1], from the untouched CLIP and from the trained one: two (B, 1 + K, W)."""
        rngs, found = [np.random.default_rng((seed, i)) for i in range(len(images))], []
        patches = draw_patch_indices(self.conditioner.recap, 1, rngs)
        for tower in self.towers:
            self.conditioner.visual.load_state_dict(tower)
            c, _ = self.conditioner(self.clip.preprocess_batch(images), self.diffusion.text_embedding, patches)  # (B, 1, 1 + K, W)
            found.append(c[:, 0].float())
        return found

    def noise(self, count: int, seed: int) -> torch.Tensor:
        """Where the drawing starts, (count, 4, h, w); an image's own whatever their number."""
        unet = self.diffusion.unet.config
        side = self.image_size * unet.sample_size // self.diffusion.image_size
        shape = (unet.in_channels, side, side)
        drawn = [np.random.default_rng((seed, 1, i)).standard_normal(shape, dtype=np.float32) for i in range(count)]
        return torch.from_numpy(np.stack(drawn)).to(self.diffusion.text_embedding.device)

    @torch.no_grad()
    def draw(
        self, condition: torch.Tensor, noise: torch.Tensor, steps: int, guidance: float, progress: bool = True
    ) -> torch.Tensor:
        """What φ draws: DDIM from `noise` (B, 4, h, w) under c (B, L, W) → pixels in [0, 1], (B, 3, S, S)."""
        unet, vae = self.diffusion.unet, self.diffusion.vae
        scheduler = DDIMScheduler.from_pretrained(self.args.diffusion, subfolder="scheduler")
        scheduler.set_timesteps(steps)
        latents, condition = noise * scheduler.init_noise_sigma, condition.to(unet.dtype)
        text = self.diffusion.text_embedding.expand(len(noise), -1, -1).to(unet.dtype)
        for t in tqdm(scheduler.timesteps, desc="draw", unit="step", leave=False, disable=not progress):
            predicted = unet(latents.to(unet.dtype), t, condition).sample.float()  # ε (or v) of c
            if guidance != 1:
                alone = unet(latents.to(unet.dtype), t, text).sample.float()
                predicted = alone + guidance * (predicted - alone)
            latents = scheduler.step(predicted, t, latents).prev_sample
        pixels = [vae.decode(z[None].to(vae.dtype) / vae.config.scaling_factor).sample.float() for z in latents]
        return (torch.cat(pixels) / 2 + 0.5).clamp(0, 1)


def load_run(run: str, device: torch.device) -> Reconstruction:
    """The parts of the run in the folder `run`. UserError: it is none, or has no weights to show."""
    try:
        args = argparse.Namespace(**json.loads(Path(run, "args.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{run}: is no run's folder, its args.json cannot be read ({one_line(error)})") from None
    if args.random_weights:
        raise UserError(f"{run}: its weights were random at the start, so there is nothing to see")
    if whole_checkpoint(Path(run, "checkpoint")) is None:
        raise UserError(f"{run}: has no checkpoint yet, and so no linear layer")
    args.precision = "bf16" if device.type == "cuda" else "fp32"
    args.compile = args.grad_checkpointing = False
    clip, diffusion, conditioner = build(args, device)
    untouched = copy.deepcopy(conditioner.visual.state_dict())
    load_checkpoint(Path(run, "checkpoint"), conditioner)
    trained = copy.deepcopy(conditioner.visual.state_dict())
    return Reconstruction(args, clip, diffusion, conditioner, (untouched, trained))


def read_images(args: argparse.Namespace, chosen: list[str] | None, count: int, size: int) -> torch.Tensor:
    """Up to `count` images, (B, 3, size, size) in [0, 1].

    `chosen` are files, or a folder; if not given, the run's benchmark, one image of a pair, spread over its types, or
    the run's data. UserError: there are none, or one cannot be read.
    """
    if args.mmvp and not chosen:
        paths = [pair.images[0] for pair in read_mmvp(args.mmvp)]
        chosen = paths[:: max(1, len(paths) // count)]
    if chosen and not Path(chosen[0]).is_dir():
        files = [(path, Path(path).read_bytes()) for path in chosen[:count]]
    else:
        source = open_images(chosen or args.data)
        if source is None:
            raise UserError("the run's data are synthetic; name --images")
        files = [(source.name(i), source.read(i)) for i in range(min(count, len(source)))]
    return torch.stack([read_square(name, content, size) for name, content in files])


def read_square(name: str | Path, content: bytes, size: int) -> torch.Tensor:
    """The middle square of an encoded image, (3, size, size) in [0, 1], bicubic. UserError: it cannot be read."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            square = ImageOps.fit(to_rgb(image), (size, size), Image.Resampling.BICUBIC)
    except Exception:  # Pillow raises almost any exception on a broken file
        raise UserError(f"{name}: not a readable image") from None
    return torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255


def sheet(rows: dict[str, torch.Tensor], note: str) -> Image.Image:
    """Rows of pictures (B, 3, S, S), each with its name at the left, and a line below."""
    count, _, _, size = next(iter(rows.values())).shape
    side = size * max(1, 128 // size) if size <= 256 else 256  # whole pixels, enlarged
    resample = Image.Resampling.NEAREST if size <= 128 else Image.Resampling.LANCZOS
    font, left, cell = ImageFont.load_default(15), 130, side + 2
    page = Image.new("RGB", (left + cell * count, cell * len(rows) + 24), "white")
    ink = ImageDraw.Draw(page)
    for r, (name, pictures) in enumerate(rows.items()):
        ink.text((left - 10, r * cell + side // 2), name, fill="black", font=font, anchor="rm")
        for b, pixels in enumerate(pictures.cpu()):
            picture = Image.fromarray((pixels.permute(1, 2, 0) * 255).round().byte().numpy())
            page.paste(picture.resize((side, side), resample), (left + b * cell, r * cell))
    ink.text((left, page.height - 6), note, fill="black", font=font, anchor="ls")
    return page


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="What the diffusion model draws from CLIP's condition, before and after."
    )
    parser.error = usage_error
    parser.add_argument("run", metavar="RUN", help="a run's folder")
    parser.add_argument("file", metavar="FILE.png", help="where the picture goes")
    images = "a folder, or files (default: of the run's benchmark, or else of its data)"
    parser.add_argument("--images", nargs="+", metavar="PATH", help=images)
    parser.add_argument("--count", type=int, default=10, metavar="N", help="at most so many images (%(default)s)")
    parser.add_argument("--steps", type=int, default=50, metavar="N", help="of DDIM (%(default)s)")
    parser.add_argument("--guidance", type=float, default=1, metavar="G", help="classifier-free; 1: none (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise and the patches (%(default)s)")
    own = parser.parse_args(argv)
    if own.count < 1 or not 1 <= own.steps <= 1000 or own.seed < 0:
        raise UserError("--count must be at least 1, --steps from 1 to 1000, --seed 0 or more")
    if Path(own.file).suffix.lower() != ".png" or not Path(own.file).absolute().parent.is_dir():
        raise UserError(f"{own.file}: must be a FILE.png in a folder that exists")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = load_run(own.run, device)
    images = read_images(run.args, own.images, own.count, run.image_size).to(device)
    noise, conditions = run.noise(len(images), own.seed), run.conditions(images, own.seed)
    before, after = [run.draw(c, noise, own.steps, own.guidance) for c in conditions]
    learns = not run.args.freeze_projection or run.args.projection_steps
    layer = f"the run's, {run.args.projection} at its start, {'then trained' if learns else 'and frozen'}"
    note = f"same noise, patches and linear layer ({layer}); DDIM, {own.steps} steps, guidance {own.guidance:g}"
    sheet({"image": images, "untouched CLIP": before, "after training": after}, note).save(own.file, optimize=True)
    print(f"written: {own.file}; {note}")


if __name__ == "__main__":
    with exit_on_user_error("reconstruct.py"):
        main()
