"""Does the feedback point toward the right words? Asked in minutes, before a training that takes days.

    python extras/feedback.py                                                            # the miniature
    python extras/feedback.py --recipe two-stage-openai-vit-l-14-224 --mmvp MMVP/MMVP_VLM --data 'cc3m/*.tar' \
        --projection-steps 500 --timesteps 500:1000

**The alignment.** A pair of the benchmark has images A, B and statements a, b, with the margins cos(a, A) − cos(a, B) and
cos(b, B) − cos(b, A). Let each image's class token take one small step down its own denoising loss: to first order the
sum m of the margins rises by −∇m · g, where g is the loss's gradient, averaged over `--draws` draws of the N states. It
is divided by |∇m| and by the mean |g| over pairs, so it is a cosine on the average: 0 means that the feedback has no
direction, 1 that it is the direction of the words. z is its mean over its standard error over pairs.

**Without a network in between.** The class tokens themselves move down their own loss, `--moves` times by a fifth of
their mean distance from their centre, and the benchmark is scored again. What is gained there is what φ knows.

Both are given at the start of the linear layer (--projection random or fitted) and, with --projection-steps and --data,
after that many steps of the layer alone, by train.py's own loop. Options are train.py's; nothing is saved.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.functional import normalize
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
from beyond import fit_projection
from condition import draw_patch_indices, visual_tokens
from data import TrainingImages, batch_keys, open_images, read_batches
from evaluate_mmvp import pairs_right
from extras.reconstruct import read_square
from harness.errors import UserError, exit_on_user_error, usage_error
from harness.mmvp import Pair, read_mmvp
from harness.options import parse_args
from harness.processes import copy_to_device, process_group
from harness.recipes import TYPES, parse_timesteps
from harness.scores import average, interval, type_names, type_scores
from train import algorithm_1, build, build_optimizer, denoising_loss, draw_states, image_rngs

MOVE = 0.2  # of the class tokens' mean distance from their centre, the mean length of a move


def check_finite(what: str, *values: torch.Tensor) -> None:
    """UserError: `what` is not finite."""
    if not all(value.isfinite().all() for value in values):
        raise UserError(f"{what}: not finite; weights are broken, or --projection-lr is too high")


class Bar:
    """In the place of a run (harness/run.py): a bar, and nothing saved."""

    first_step = 0

    def __init__(self, steps: int):
        self.bar = tqdm(total=steps, desc="linear layer", unit="step", leave=False)

    def note(self, loss: torch.Tensor, batch: dict) -> None:
        self.loss = loss.detach()

    def log(self, step: int, grad_norm: torch.Tensor, lr: float) -> None:
        check_finite(f"the loss of the linear layer's step {step}, or its gradient", self.loss, grad_norm)
        self.bar.update()

    def save(self, step: int) -> None:
        if step == self.bar.total:
            self.bar.close()


class Pairs:
    """The benchmark's images and statements as φ and CLIP see them; `types` (pairs,) are their types' names.

    `latents` z (2 · pairs, 4, h, w), `cls` (2 · pairs, D) and `local` (2 · pairs, P, D) are the images', pair by pair;
    `texts` (pairs, 2, D) the statements', of length 1. UserError: one of them is not finite.
    """

    @torch.no_grad()
    def __init__(self, clip, diffusion, pairs, size: int, device: torch.device):
        self.types = [pair.type for pair in pairs]
        latents, cls, local, texts, tokenizer = [], [], [], [], clip.tokenizer()
        for pair in tqdm(pairs, desc="encode", unit="pair", leave=False):
            squares = [read_square(path, path.read_bytes(), size) for path in pair.images]
            pixels = torch.stack(squares).to(device)  # (2, 3, S, S)
            latents.append(diffusion.encode(pixels))
            tokens = visual_tokens(clip.model.visual, clip.preprocess_batch(pixels))
            cls.append(tokens[0])
            local.append(tokens[1])
            words = tokenizer(["a photo of " + statement for statement in pair.statements]).to(device)
            texts.append(clip.model.encode_text(words, normalize=True))
        self.latents, self.texts = torch.cat(latents), torch.stack(texts)
        self.cls, self.local = torch.cat(cls), torch.cat(local)
        check_finite("the latents of the benchmark's images", self.latents)
        check_finite("CLIP's tokens of the benchmark's images", self.cls, self.local)
        check_finite("CLIP's embeddings of the benchmark's statements", self.texts)

    def cosines(self, cls: torch.Tensor) -> torch.Tensor:
        """Of statements and images within each pair, (pairs, 2 statements, 2 images)."""
        return torch.einsum("psd,pid->psi", self.texts, normalize(cls, dim=-1).unflatten(0, (-1, 2)))


def feedback(args, diffusion, conditioner, pairs: Pairs, cls: torch.Tensor, seed: int) -> torch.Tensor:
    """Each image's gradient of its own denoising loss by its class token, the mean over --draws draws: (images, D)."""
    mean, (low, high) = torch.zeros_like(cls), parse_timesteps(args.timesteps)
    for draw in tqdm(range(args.draws), desc="draws", unit="draw", leave=False):
        for images in torch.arange(len(cls)).split(args.micro_batch):
            token, latents = cls[images].clone().requires_grad_(), pairs.latents[images]
            rngs = image_rngs(seed, [(draw, i) for i in images.tolist()])
            timesteps, noise = draw_states((args.states, *latents.shape[1:]), low, high, rngs)
            patches = draw_patch_indices(conditioner.recap, args.states, rngs)
            timesteps, noise, patches = copy_to_device(cls.device, timesteps, noise, patches)
            condition = conditioner.build_condition(token, pairs.local[images], diffusion.text_embedding, patches)
            loss = denoising_loss(diffusion, latents, condition, timesteps, noise) * len(token)  # it was a mean
            mean[images] += torch.autograd.grad(loss, token)[0] / args.draws
    check_finite("the gradient of the denoising loss", mean)
    return mean


def alignments(pairs: Pairs, gradient: torch.Tensor) -> np.ndarray:
    """The alignment of each pair, (pairs,), for the images' gradients (2 · pairs, D). UserError: it is not finite."""
    cls = pairs.cls.clone().requires_grad_()
    cosines = pairs.cosines(cls)
    margins = cosines[:, 0, 0] - cosines[:, 0, 1] + cosines[:, 1, 1] - cosines[:, 1, 0]  # (pairs,)
    toward = torch.autograd.grad(margins.sum(), cls)[0].unflatten(0, (-1, 2)).flatten(1)  # ∇m, (pairs, 2 · D)
    down = -gradient.unflatten(0, (-1, 2)).flatten(1)
    alignment = (toward * down).sum(1) / toward.norm(dim=1) / down.norm(dim=1).mean()
    check_finite("the alignment", alignment)
    return alignment.cpu().numpy()


def measure(args, diffusion, conditioner, pairs: Pairs) -> dict:
    """`rows`: of each type and of all the alignment, its z, and the score before and after each move of the class tokens.

    z is None for a single pair, and where all alignments are equal. `change` is the 95% interval of what all moves change
    in the score of all.
    """
    cls, types, rights = pairs.cls, pairs.types, [pairs_right(pairs.cosines(pairs.cls).cpu().numpy())]
    gradient = feedback(args, diffusion, conditioner, pairs, cls, args.seed)
    values, length = alignments(pairs, gradient), MOVE * (cls - cls.mean(0)).norm(dim=1).mean()
    for move in range(args.moves):
        if move:
            gradient = feedback(args, diffusion, conditioner, pairs, cls, args.seed + move)
        cls = cls - length * gradient / gradient.norm(dim=1).mean()
        rights.append(pairs_right(pairs.cosines(cls).cpu().numpy()))
    scores = [type_scores(right, types) | {"all": average(right, types)} for right in rights]
    rows = {}
    for name in scores[0]:
        chosen = values if name == "all" else values[np.array(types) == name]
        spread = chosen.std(ddof=1) if len(chosen) > 1 else 0
        z = float(chosen.mean() / spread * len(chosen) ** 0.5) if spread else None
        rows[name] = dict(alignment=float(chosen.mean()), z=z, scores=[score[name] for score in scores])
    return dict(rows=rows, change=interval(rights[-1].astype(int) - rights[0], types))


def table(stages: dict[str, dict]) -> str:
    """The figures of each stage as text."""
    width, lines = max(len(name) for name in [*stages, *TYPES]), []
    for stage, found in stages.items():
        lines.append(f"\n{stage:{width + 2}}  alignment      z  score before → after each move")
        for name, row in found["rows"].items():
            z = "" if row["z"] is None else f"{row['z']:.1f}"
            scores = " → ".join(f"{score:.1f}" for score in row["scores"])
            lines.append(f"  {name:{width}}  {row['alignment']:+.3f}  {z:>5}  {scores}")
        lines[-1] += " (95% interval of the change {:+.1f} … {:+.1f})".format(*found["change"])
    return "\n".join(lines)


def follow(args, device: torch.device, benchmark: list[Pair]) -> dict[str, dict]:
    """The figures of `measure` at the start of the linear layer and, with --projection-steps, after them."""
    clip, diffusion, conditioner = build(args, device)
    size, layer_steps = args.image_size or diffusion.image_size, args.projection_steps
    images = TrainingImages(open_images(args.data), size, args.batch_size, args.seed)
    passes = 2 * len(benchmark) * args.draws * args.states * max(1, args.moves) * (2 if layer_steps else 1)
    passes += layer_steps * args.batch_size * args.states
    tflop = passes * 1.671 * (size / 512) ** 2
    print(f"{passes:,} passes of the U-Net, forward and back; with Stable Diffusion's, {tflop:,.0f} TFLOP", flush=True)
    if args.projection == "fitted":
        fit_projection(args, clip, conditioner, images)
    pairs = Pairs(clip, diffusion, benchmark, size, device)
    stages = {f"{args.projection} start": measure(args, diffusion, conditioner, pairs)}
    if layer_steps:
        layer = list(conditioner.projection.parameters())
        optimizer = build_optimizer(args, conditioner, layer)
        keys = batch_keys(0, layer_steps, args.batch_size, args.micro_batch, 0, 1)
        batches = read_batches(images, keys, args.workers, device)
        run, steps = Bar(layer_steps), range(layer_steps)
        algorithm_1(args, clip, diffusion, conditioner, optimizer, args.projection_lr, steps, batches, run)
        stages[f"linear layer after step {layer_steps}"] = measure(args, diffusion, conditioner, pairs)
    return stages


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Does the feedback of a diffusion model point toward the right words, for this CLIP?",
        epilog="Recipe, models, method and --projection-steps: train.py's options.",
        allow_abbrev=False,
    )
    parser.error = usage_error
    add = parser.add_argument
    add("--pairs", type=int, default=10**9, metavar="N", help="of each type; if not given, all")
    add("--draws", type=int, default=3, metavar="N", help="draws of N states, averaged (default: 3)")
    add("--moves", type=int, default=8, metavar="N", help="of the class tokens (default: 8)")
    own, rest = parser.parse_known_args(argv)
    if min(own.draws, own.pairs) < 1 or own.moves < 0:
        raise UserError("--draws and --pairs must be at least 1, --moves at least 0")
    args = parse_args([*rest, "--steps", "1000000000"])  # --projection-steps are a part of them
    args.draws, args.moves = own.draws, own.moves
    if not args.mmvp:
        raise UserError("--mmvp is needed: the hub's MMVP/MMVP_VLM, or a folder in its layout")
    if args.data == ["synthetic"] and args.projection_steps:
        raise UserError("--data synthetic: the linear layer is trained on images; name some")
    with process_group() as device:
        if dist.get_world_size() > 1:
            raise UserError("one process does it all: start feedback.py with python")
        args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
        everything, benchmark = read_mmvp(args.mmvp), []
        for name in type_names([pair.type for pair in everything]):
            benchmark += [pair for pair in everything if pair.type == name][: own.pairs]
        print(table(follow(args, device, benchmark)))


if __name__ == "__main__":
    with exit_on_user_error("feedback.py", "a smaller --micro-batch needs less"):
        main()
