"""Shows what CLIP tells the diffusion model: pictures that φ draws from a run's conditions, before and after training.

    python extras/reconstruct.py runs/miniature                         # writes runs/miniature/reconstruct.png
    python extras/reconstruct.py runs/l14 rows.png --images photos --count 6

Below each image are the pictures that φ draws from the condition of the untouched CLIP, then of the trained one. Both
use the same initial noise, patches of the recap, and linear layer (from the end of the run). DDIM adds no noise, so the
pictures differ only by what CLIP says.

The images are not chosen by hand. By default they are the first images of --count evenly spaced pairs of the run's
benchmark, and so spread over its types; without a benchmark, the first images of the run's data.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.errors import UserError, exit_on_user_error, one_line, usage_error


def read_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.error = usage_error
    add = parser.add_argument
    add("run", metavar="RUN", help="the folder of a run")
    add("file", nargs="?", metavar="FILE.png", help="where to write (default: RUN/reconstruct.png, read by report.py)")
    add("--images", nargs="+", metavar="PATH", help="a folder, or files (default: from the benchmark, or the data)")
    add("--count", type=int, default=10, metavar="N", help="maximum number of images (%(default)s)")
    add("--steps", type=int, default=50, metavar="N", help="DDIM steps (%(default)s)")
    add("--guidance", type=float, default=1, metavar="G", help="classifier-free guidance; 1 is none (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="seed of the noise and the patches (%(default)s)")
    args = parser.parse_args(argv)
    if args.count < 1 or not 1 <= args.steps <= 1000 or args.seed < 0 or not 1 <= args.guidance < float("inf"):
        raise UserError("--count and --guidance must be at least 1, --steps from 1 to 1000, --seed at least 0")
    if not Path(args.run, "args.json").is_file():
        raise UserError(f"{args.run}: not the folder of a run (args.json is missing)")
    args.file = args.file or f"{args.run}/reconstruct.png"
    if Path(args.file).suffix.lower() != ".png" or not Path(args.file).absolute().parent.is_dir():
        raise UserError(f"{args.file}: must be a FILE.png in an existing folder")
    return args


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a typo are answered at once
    with exit_on_user_error("reconstruct.py"):
        args = read_args()

import copy
import json
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw, ImageFont, ImageOps

from condition import VisualCondition, draw_patch_indices
from data import open_images
from harness.checkpoint import load_checkpoint, read_state
from harness.mmvp import read_mmvp
from harness.pictures import read_image
from harness.processes import default_precision
from model import Diffusion
from train import build


@dataclass
class Reconstruction:
    """The parts of a run; `towers` are the weights of the vision tower, before and after training."""

    args: argparse.Namespace
    diffusion: Diffusion
    conditioner: VisualCondition
    towers: tuple[dict, dict]

    @property
    def image_size(self) -> int:
        return self.args.image_size or self.diffusion.image_size

    @torch.no_grad()
    def conditions(self, images: torch.Tensor, seed: int) -> list[torch.Tensor]:
        """The two conditions c of images (B, 3, S, S) in [0, 1], before and after training, each (B, 1 + K, W) fp32."""
        rngs, found = [np.random.default_rng((seed, i)) for i in range(len(images))], []
        patch_indices = draw_patch_indices(self.conditioner.recap, 1, rngs, images.device)
        for tower in self.towers:
            self.conditioner.visual.load_state_dict(tower)
            c, _ = self.conditioner(images, self.diffusion.text_embedding, patch_indices)  # (B, 1, 1 + K, W)
            found.append(c[:, 0].float())
        return found

    def noise(self, count: int, seed: int) -> torch.Tensor:
        """The initial noise of each picture, (count, 4, h, w) fp32; independent of `count`."""
        side = self.image_size // self.diffusion.downsampling
        shape = (self.diffusion.unet.config.in_channels, side, side)
        drawn = [np.random.default_rng((seed, 1, i)).standard_normal(shape, dtype=np.float32) for i in range(count)]
        return torch.from_numpy(np.stack(drawn)).to(self.diffusion.text_embedding.device)

    def draw(
        self, condition: torch.Tensor, noise: torch.Tensor, steps: int, guidance: float, progress: bool = True
    ) -> torch.Tensor:
        """What φ draws by DDIM from `noise` (B, 4, h, w) under c (B, L, W): pixels in [0, 1], (B, 3, S, S).

        Classifier-free guidance: ε = ε(text) + `guidance` · (ε(c) − ε(text)). The pipeline needs a text of L tokens; if
        the recap has another length, the mean of the text's tokens is repeated.
        """
        text, dtype = self.diffusion.text_embedding, self.diffusion.unet.dtype
        if text.shape[1] != condition.shape[1]:
            text = text.mean(1, keepdim=True)
        pipeline = StableDiffusionPipeline(
            vae=self.diffusion.vae, unet=self.diffusion.unet, text_encoder=None, tokenizer=None,
            scheduler=DDIMScheduler.from_pretrained(self.args.diffusion, subfolder="scheduler"),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipeline.set_progress_bar_config(desc="draw", leave=False, disable=not progress)
        self.diffusion.vae.enable_slicing()  # decodes one picture at a time
        return pipeline(
            prompt_embeds=condition.to(dtype), negative_prompt_embeds=text.expand_as(condition).to(dtype),
            latents=noise.to(dtype), height=self.image_size, width=self.image_size,
            num_inference_steps=steps, guidance_scale=guidance, output_type="pt",
        ).images.float()  # fmt: skip


def load_run(run: str, device: torch.device) -> Reconstruction:
    """Loads the run in the folder `run`. UserError: it is not a run, or it has no trained weights."""
    try:
        args = argparse.Namespace(**json.loads(Path(run, "args.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{run}: not the folder of a run: args.json cannot be read ({one_line(error)})") from None
    if args.random_weights:
        raise UserError(f"{run}: was started with --random-weights, so its φ cannot draw")
    checkpoint = Path(run, "checkpoint.pt")
    if read_state(checkpoint) is None:
        raise UserError(f"{run}: has no checkpoint.pt yet; the run writes it at its first save")
    args.precision, args.compile, args.grad_checkpointing = default_precision(device), False, False
    _, diffusion, conditioner = build(args, device)
    before = copy.deepcopy(conditioner.visual.state_dict())
    load_checkpoint(checkpoint, conditioner)
    after = copy.deepcopy(conditioner.visual.state_dict())
    return Reconstruction(args, diffusion, conditioner, (before, after))


def read_images(args: argparse.Namespace, chosen: list[str] | None, count: int, size: int) -> torch.Tensor:
    """Up to `count` images, (B, 3, size, size) in [0, 1], from `chosen`: files, a folder, or None for the default.

    UserError: there are no images, or one cannot be read.
    """
    if args.mmvp and not chosen:
        paths = [pair.images[0] for pair in read_mmvp(args.mmvp)]
        chosen = paths[:: max(1, len(paths) // count)]
    if chosen and not Path(chosen[0]).is_dir():
        images = [read_image(path) for path in chosen[:count]]
    else:
        source = open_images(chosen or args.data)
        if source is None:
            raise UserError("the run's --data is synthetic; pass images with --images")
        images = [read_image(source.name(i), source.read(i)) for i in range(min(count, len(source)))]
    return torch.stack([central_square(image, size) for image in images])


def central_square(image: Image.Image, size: int) -> torch.Tensor:
    """The central square of an RGB image, (3, size, size) in [0, 1], bicubic."""
    square = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255


def sheet(rows: dict[str, torch.Tensor], note: str) -> Image.Image:
    """Rows of pictures (B, 3, S, S) in [0, 1], each with its name on the left, and a note at the bottom."""
    count, _, _, size = next(iter(rows.values())).shape
    side = size * max(1, 128 // size) if size <= 256 else 256  # enlarge small pictures by an integer factor
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


def main(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = load_run(args.run, device)
    images = read_images(run.args, args.images, args.count, run.image_size).to(device)
    noise, conditions = run.noise(len(images), args.seed), run.conditions(images, args.seed)
    before, after = [run.draw(c, noise, args.steps, args.guidance) for c in conditions]
    trained = not run.args.freeze_projection or run.args.projection_steps
    layer = f"{run.args.projection} start, {'then trained' if trained else 'frozen'}"
    note = f"same noise, patches and linear layer ({layer}); DDIM, {args.steps} steps, guidance {args.guidance:g}"
    sheet({"image": images, "untouched CLIP": before, "after training": after}, note).save(args.file, optimize=True)
    print(f"wrote {args.file}: {note}")


if __name__ == "__main__":
    with exit_on_user_error("reconstruct.py"):
        main(args)
