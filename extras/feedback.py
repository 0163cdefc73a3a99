"""Does the feedback point toward the right words? Asked in minutes, before a training that takes days.

    python extras/feedback.py                                                            # the miniature
    python extras/feedback.py --recipe openai-vit-l-14-224 --recap none --join positions --mmvp MMVP/MMVP_VLM \
        --data 'cc3m/*.tar' --projection-steps 500 --timesteps 500:1000 --json feedback.json

**The needle.** A pair of the benchmark has images A, B and statements a, b, with the margins cos(a, A) − cos(a, B) and
cos(b, B) − cos(b, A). Let each image's class token take one small step down its own denoising loss: do the margins
rise? To first order the rise of their sum m is −∇m · g, where g is the loss's gradient, averaged over `--draws` draws
of the N states.
It is divided by |∇m| and by the mean |g| over pairs, so it is a cosine on the average: 0 means that the feedback has no
direction, 1 that it is the direction of the words. z is its mean over its standard error over pairs.

**Without a network in between.** The class tokens themselves move down their own loss, `--moves` times by a fifth of
their mean distance from their centre, and the benchmark is scored again. What is gained there is what φ knows; what a
training then gains is what the vision tower can learn of it.

Both are given at the start of the linear layer (--projection random or fitted) and, with --projection-steps and --data,
after that many steps of the layer alone, by train.py's own loop. Options are train.py's; nothing is saved but --json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.functional import normalize
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from condition import visual_tokens
from data import batch_keys, open_images, read_batches, to_rgb
from evaluate_mmvp import average, interval, pairs_right, type_names, type_scores
from harness.errors import UserError, fail, one_sentence
from harness.mmvp import read_mmvp
from harness.options import parse_args
from harness.processes import join_processes
from train import algorithm_1, build, build_optimizer, denoising_loss

MOVE = 0.2  # of the class tokens' mean distance from their centre, the mean length of a move


class Bar:
    """In the place of a run (harness/run.py): a bar, and nothing saved."""

    first_step = 0

    def __init__(self, steps: int):
        self.bar = tqdm(total=steps, desc="linear layer", unit="step", leave=False)

    def note(self, loss: torch.Tensor, batch: dict) -> None:
        self.loss = loss.detach()

    def log(self, step: int, grad_norm: torch.Tensor, lr: float) -> None:
        self.bar.set_postfix_str(f"loss {self.loss:.4f}", refresh=False)
        self.bar.update()

    def save(self, step: int) -> None:
        if step == self.bar.total:
            self.bar.close()


class Pairs:
    """The benchmark's images and statements as φ and CLIP see them; `types` (pairs,) are their types' names.

    `latents` z (2 · pairs, 4, h, w), `cls` (2 · pairs, D) and `local` (2 · pairs, P, D) are the images', pair by pair;
    `texts` (pairs, 2, D) the statements', of length 1.
    """

    @torch.no_grad()
    def __init__(self, clip, diffusion, pairs, size: int, device: torch.device):
        self.types = [pair.type for pair in pairs]
        latents, cls, local, texts, tokenizer = [], [], [], [], clip.tokenizer()
        for pair in tqdm(pairs, desc="encode", unit="pair", leave=False):
            pixels = []
            for path in pair.images:
                with Image.open(path) as image:
                    square = to_rgb(image).resize((size, size), Image.Resampling.BICUBIC)
                pixels.append(torch.from_numpy(np.array(square)).permute(2, 0, 1) / 255)
            pixels = torch.stack(pixels).to(device)  # (2, 3, S, S)
            latents.append(diffusion.encode(pixels))
            for into, tokens in zip((cls, local), visual_tokens(clip.model.visual, clip.prepare(pixels))):
                into.append(tokens)
            words = tokenizer(["a photo of " + statement for statement in pair.statements]).to(device)
            texts.append(clip.model.encode_text(words, normalize=True))
        self.latents, self.cls, self.local, self.texts = *map(torch.cat, (latents, cls, local)), torch.stack(texts)

    def cosines(self, cls: torch.Tensor) -> torch.Tensor:
        """Of statements and images within each pair, (pairs, 2 statements, 2 images)."""
        return torch.einsum("psd,pid->psi", self.texts, normalize(cls, dim=-1).unflatten(0, (-1, 2)))


def feedback(parts, pairs: Pairs, cls: torch.Tensor, draws: int, at_once: int, seed: int, what: str) -> torch.Tensor:
    """Each image's gradient of its own denoising loss by its class token, the mean over `draws` draws: (images, D)."""
    _, diffusion, conditioner, dataset = parts
    found = torch.zeros_like(cls)
    for draw in tqdm(range(draws), desc=what, unit="draw", leave=False):
        for start in range(0, len(cls), at_once):
            part = slice(start, start + at_once)
            drawn = [dataset.draw(np.random.default_rng((seed, draw, i))) for i in range(len(cls))[part]]
            drawn = {key: torch.from_numpy(np.stack([d[key] for d in drawn])).to(cls.device) for key in drawn[0]}
            token = cls[part].clone().requires_grad_()
            condition = conditioner.condition(token, pairs.local[part], diffusion.text, drawn.get("patches"))
            loss = denoising_loss(diffusion, pairs.latents[part], condition, drawn["timesteps"], drawn["noise"])
            found[part] += torch.autograd.grad(loss * len(token), token)[0] / draws  # the loss is a mean over images
    return found


def needles(pairs: Pairs, gradient: torch.Tensor) -> np.ndarray:
    """The needle of each pair, (pairs,), for the images' gradients (2 · pairs, D)."""
    cls = pairs.cls.clone().requires_grad_()
    cosines = pairs.cosines(cls)
    margins = cosines[:, 0, 0] - cosines[:, 0, 1] + cosines[:, 1, 1] - cosines[:, 1, 0]  # (pairs,)
    toward = torch.autograd.grad(margins.sum(), cls)[0].unflatten(0, (-1, 2)).flatten(1)  # ∇m, (pairs, 2 · D)
    down = -gradient.unflatten(0, (-1, 2)).flatten(1)
    return ((toward * down).sum(1) / toward.norm(dim=1) / down.norm(dim=1).mean()).cpu().numpy()


def measure(parts, pairs: Pairs, own: argparse.Namespace, at_once: int, seed: int) -> dict:
    """The needle in all and by type with z, and the pair score before and after each move of the class tokens."""
    gradient = feedback(parts, pairs, pairs.cls, own.draws, at_once, seed, "needle")
    values, cls, rights = needles(pairs, gradient), pairs.cls, [pairs_right(pairs.cosines(pairs.cls).cpu().numpy())]
    length = MOVE * (cls - cls.mean(0)).norm(dim=1).mean()
    for move in range(own.moves):
        cls = cls - length * gradient / gradient.norm(dim=1).mean()
        rights.append(pairs_right(pairs.cosines(cls).cpu().numpy()))
        if move + 1 < own.moves:
            gradient = feedback(parts, pairs, cls, own.draws, at_once, seed + 1 + move, f"move {move + 2}")
    names, types = np.array(pairs.types), pairs.types
    rows = {name: values[names == name] for name in type_names(types)} | {"all": values}
    return dict(
        needle={name: dict(mean=float(v.mean()), z=z_value(v)) for name, v in rows.items()},
        scores=[average(right, types) for right in rights],
        change=dict(zip(("low", "high"), interval(rights[-1].astype(int) - rights[0], types))),
        types_before=type_scores(rights[0], types),
        types_after=type_scores(rights[-1], types),
    )


def z_value(values: np.ndarray) -> float | None:
    """The mean over its standard error; None for a single value, or for equal ones."""
    spread = values.std(ddof=1) if len(values) > 1 else 0
    return float(values.mean() / spread * len(values) ** 0.5) if spread else None


def text(stages: dict[str, dict]) -> str:
    """The figures of each stage as a table."""
    names = {name for found in stages.values() for name in found["needle"]}
    width, lines = max(map(len, [*stages, *names])), []
    for stage, found in stages.items():
        lines += ["", f"{stage:{width + 2}}  needle      z  score before → after each move"]
        for name, row in found["needle"].items():
            z = "" if row["z"] is None else f"{row['z']:.1f}"
            line = f"  {name:{width}}  {row['mean']:+.3f}  {z:>5}"
            if name == "all":
                scores = " → ".join(f"{score:.1f}" for score in found["scores"])
                line += "  {} (95% interval of the change {low:+.1f} … {high:+.1f})".format(scores, **found["change"])
            else:
                line += f"  {found['types_before'][name]:.1f} → {found['types_after'][name]:.1f}"
            lines.append(line)
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Does the feedback of a diffusion model point toward the right words, for this CLIP?",
        epilog="Recipe, models, method and --projection-steps: train.py's options.",
        allow_abbrev=False,
    )
    parser.error = fail
    parser.add_argument("--pairs", type=int, metavar="N", help="of each type; if not given, all")
    parser.add_argument("--draws", type=int, default=3, metavar="N", help="draws of N states, averaged (default: 3)")
    parser.add_argument("--moves", type=int, default=8, metavar="N", help="of the class tokens (default: 8)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="a file for the figures")
    own, rest = parser.parse_known_args(argv)
    if min(own.draws, own.pairs or 1) < 1 or own.moves < 0:
        raise UserError("--draws and --pairs must be at least 1, --moves at least 0")
    if own.json and not own.json.absolute().parent.is_dir():
        raise UserError(f"--json {own.json}: there is no such folder")
    args = parse_args([*rest, "--steps", "1000000000"])  # --projection-steps are a part of them
    if not args.mmvp:
        raise UserError("--mmvp is needed: the hub's MMVP/MMVP_VLM, or a folder in its layout")
    if args.data == ["synthetic"] and (args.projection_steps or args.projection == "fitted"):
        raise UserError("--data synthetic: the linear layer is fitted to images, or trained on them; name some")

    device = join_processes()
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    found = read_mmvp(args.mmvp)
    kept = {name: [pair for pair in found if pair.type == name][: own.pairs] for name in {p.type for p in found}}
    found = [pair for pair in found if pair in kept[pair.type]]
    args.steps = max(1, args.projection_steps)
    parts = clip, diffusion, conditioner, dataset = build(args, device, open_images(args.data))
    passes = 2 * len(found) * own.draws * args.states * max(1, own.moves) * (2 if args.projection_steps else 1)
    passes += args.projection_steps * args.batch_size * args.states
    tflop = 1.671 * (dataset.size / 512) ** 2
    print(f"{passes:,} passes of the U-Net, forward and back; with Stable Diffusion's, {passes * tflop:,.0f} TFLOP")
    pairs = Pairs(clip, diffusion, found, dataset.size, device)
    conditioner.requires_grad_(False)
    stages = {f"{args.projection} start": measure(parts, pairs, own, args.micro_batch, args.seed)}
    if args.projection_steps:
        conditioner.requires_grad_(True)
        optimizer = build_optimizer(args, conditioner)
        keys = batch_keys(0, args.steps, args.batch_size, args.micro_batch, 0, 1)
        batches = read_batches(dataset, keys, args.workers, device)
        algorithm_1(args, clip, diffusion, conditioner, optimizer, batches, Bar(args.steps))
        conditioner.requires_grad_(False)
        after = f"linear layer after step {args.projection_steps}"
        stages[after] = measure(parts, pairs, own, args.micro_batch, args.seed)
    print(text(stages))
    if own.json:
        own.json.write_text(json.dumps(dict(args=vars(args), pairs=len(found), stages=stages), indent=2) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    with one_sentence("feedback.py", "a smaller --micro-batch needs less"):
        main()
