"""Does a step down the denoising loss raise the pair score? Answers in minutes, before you train for days.

    python extras/feedback.py                                                            # the miniature
    python extras/feedback.py --recipe two-stage-openai-vit-l-14-224 --mmvp MMVP/MMVP_VLM --data 'cc3m/*.tar' \
        --projection fitted --projection-steps 0 --timesteps 500:1000

**The alignment.** A pair of the benchmark has images A, B and statements a, b; m is the sum of its margins
cos(a, A) − cos(a, B) and cos(b, B) − cos(b, A). g is the gradient of the denoising loss with respect to the two class
tokens, averaged over `--draws` draws of the N states. The alignment of the pair is −g · ∇m / (|∇m| mean |g|), where the
mean is over all pairs: on average, the cosine between a step down the loss and the direction in which the margins grow
fastest. At 0 the two are unrelated, at 1 they are the same. z is the mean alignment of the pairs divided by its
standard error.

**The fit.** With --projection fitted, R² tells how well the linear layer predicts φ's embeddings of 500 new random
phrases: the squared correlation over phrases and dimensions, each dimension centered on its mean. It is near 1 if φ and
CLIP share a text tower.

**Moving class tokens.** Gradient descent on the class tokens themselves, without training CLIP: `--moves` steps, each
a fifth of their mean distance from their center. The benchmark is scored after each step.

The alignment and the moves are measured with the initial linear layer (--projection random or fitted) and, with
--projection-steps and --data, again after that many steps of training only the layer. Takes the options of train.py;
saves nothing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from harness.errors import UserError, exit_on_user_error, usage_error
from harness.options import count_processes, parse_args


def read_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of train.py and this command's own options."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="Also takes all options of train.py.", allow_abbrev=False
    )
    parser.error = usage_error
    add = parser.add_argument
    add("--pairs", type=int, default=10**9, metavar="N", help="pairs of each type (default: all)")
    add("--draws", type=int, default=3, metavar="N", help="draws of N states to average (default: 3)")
    add("--moves", type=int, default=8, metavar="N", help="gradient steps on the class tokens (default: 8)")
    own, options = parser.parse_known_args(argv)
    if min(own.draws, own.pairs) < 1 or own.moves < 0:
        raise UserError("--draws and --pairs must be at least 1, --moves at least 0")
    args = parse_args([*options, "--steps", "1000000000"])  # --projection-steps must not exceed it
    if count_processes() > 1:
        raise UserError("runs as one process: start it with python, not with torchrun")
    if not args.mmvp:
        raise UserError("--mmvp is needed: the hub's MMVP/MMVP_VLM, or a folder in its layout")
    if args.data == ["synthetic"] and args.projection_steps:
        raise UserError("--data synthetic: --projection-steps trains the linear layer on images; pass some with --data")
    return argparse.Namespace(**vars(args) | vars(own))


if __name__ == "__main__":  # before the imports that take seconds, so that --help and a typo are answered at once
    with exit_on_user_error("feedback.py"):
        args = read_args()

import numpy as np
import torch
from torch.nn.functional import normalize
from tqdm import tqdm

from beyond import embed_phrases, fit_projection
from condition import draw_patch_indices
from data import TrainingImages, image_rngs, micro_batch_keys, open_images, read_batches
from evaluate_mmvp import encode_pairs, pairs_right
from extras.bench import NoRun
from extras.reconstruct import central_square
from harness.mmvp import Pair, read_mmvp
from harness.pictures import read_image
from harness.precision import full_fp32
from harness.processes import default_precision
from harness.scores import average, interval, type_names, type_scores
from train import Draws, Stage, algorithm_1, build, build_optimizer, denoising_loss, draw_states

MOVE = 0.2  # mean length of a step of the class tokens, relative to their mean distance from their center


def check_finite(what: str, *values: torch.Tensor) -> None:
    """Raises UserError if `what` is not finite."""
    if not all(value.isfinite().all() for value in values):
        raise UserError(f"{what}: not finite; the weights are broken, or --projection-lr is too high")


class LayerSteps(NoRun):
    """Replaces `Run` while only the linear layer is trained; checks the gradients."""

    def log(self, step: int, grad_norm: torch.Tensor, lr: float) -> None:
        check_finite(f"the gradient at step {step} of the linear layer", grad_norm)


class Pairs:
    """The benchmark, encoded by φ and CLIP; `types` are the pairs' types.

    The images, pair by pair: `latents` z (2 · pairs, 4, h, w), `cls` (2 · pairs, D) and `local` (2 · pairs, P, D).
    The statements: `texts` (pairs, 2, D), unit length. UserError: one of them is not finite.
    """

    @torch.no_grad()
    def __init__(self, clip, diffusion, pairs: list[Pair], size: int, device: torch.device):
        self.types, latents = [pair.type for pair in pairs], []
        with full_fp32():
            self.cls, self.local, self.texts = map(torch.cat, zip(*encode_pairs(clip, pairs, device)))
        for pair in tqdm(pairs, desc="VAE", unit="pair", leave=False):
            squares = [central_square(read_image(path), size) for path in pair.images]
            latents.append(diffusion.encode(torch.stack(squares).to(device)))
        self.latents = torch.cat(latents)
        check_finite("the encoded benchmark", self.latents, self.cls, self.local, self.texts)

    def cosines(self, cls: torch.Tensor) -> torch.Tensor:
        """The cosines of statements and images within each pair: (pairs, 2 statements, 2 images)."""
        return torch.einsum("psd,pid->psi", self.texts, normalize(cls, dim=-1).unflatten(0, (-1, 2)))


def feedback(args, diffusion, conditioner, pairs: Pairs, cls: torch.Tensor, seed: int) -> torch.Tensor:
    """The gradient of each image's denoising loss w.r.t. its class token, averaged over --draws draws: (images, D)."""
    mean, draws = torch.zeros_like(cls), Draws(seed, conditioner.recap, args.states, range(*args.timesteps))
    for draw in tqdm(range(args.draws), desc="draws", unit="draw", leave=False):
        for images in torch.arange(len(cls)).split(args.micro_batch):
            token, latents = cls[images].clone().requires_grad_(), pairs.latents[images]
            rngs = image_rngs(seed, [(draw, i) for i in images.tolist()])
            patch_indices = draw_patch_indices(draws.recap, draws.states, rngs, cls.device)
            condition = conditioner.build_condition(token, pairs.local[images], diffusion.text_embedding, patch_indices)
            timesteps, noise = draw_states(draws, latents.shape[1:], rngs, cls.device)
            loss = denoising_loss(diffusion, latents, condition, timesteps, noise) * len(token)  # a sum over images
            mean[images] += torch.autograd.grad(loss, token)[0] / args.draws
    check_finite("the gradient of the denoising loss", mean)
    return mean


def alignments(pairs: Pairs, gradient: torch.Tensor) -> np.ndarray:
    """The alignment of each pair, (pairs,), given the images' gradients (2 · pairs, D). UserError: it is not finite."""
    cls = pairs.cls.clone().requires_grad_()
    cosines = pairs.cosines(cls)
    margins = cosines[:, 0, 0] - cosines[:, 0, 1] + cosines[:, 1, 1] - cosines[:, 1, 0]  # m, (pairs,)
    toward = torch.autograd.grad(margins.sum(), cls)[0].unflatten(0, (-1, 2)).flatten(1)  # ∇m, (pairs, 2 · D)
    down = -gradient.unflatten(0, (-1, 2)).flatten(1)  # −g
    alignment = (toward * down).sum(1) / toward.norm(dim=1) / down.norm(dim=1).mean()
    check_finite("the alignment", alignment)
    return alignment.cpu().numpy()


def measure(args, diffusion, conditioner, pairs: Pairs) -> tuple[dict[str, dict], tuple[float, float]]:
    """Returns the alignment, its z, and the score before and after each move: for each type and for all pairs.

    Also returns the 95% interval of the total change in the score of all pairs. z is NaN for a single pair.
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
        z = chosen.mean() / spread * len(chosen) ** 0.5 if spread else float("nan")
        rows[name] = dict(alignment=chosen.mean(), z=z, scores=[score[name] for score in scores])
    return rows, interval(rights[-1].astype(int) - rights[0], types)


@torch.no_grad()
def fit_r2(args, clip, conditioner) -> float:
    """R² of the fitted layer on new phrases (in the miniature, single words among them are not new)."""
    layer = conditioner.projection
    clip_texts, phi_texts = embed_phrases(clip, args.diffusion, args.text, layer.weight.device, count=500, seed=1)
    found, expected = (x - x.mean(0) for x in (layer(clip_texts), phi_texts))  # (500, W)
    return ((found * expected).sum() ** 2 / (found.square().sum() * expected.square().sum())).item()


def table(stage: str, rows: dict[str, dict], change: tuple[float, float]) -> str:
    """The results of `measure` as text."""
    width = max(len(name) for name in [stage, *rows])
    lines = [f"\n{stage:{width}}    alignment      z  score before → after each move (chance: 25)"]
    for name, row in rows.items():
        scores = " → ".join(f"{score:.1f}" for score in row["scores"])
        lines.append(f"  {name:{width}}  {row['alignment']:+.3f}  {row['z']:5.1f}  {scores}")
    if len(rows["all"]["scores"]) > 1:
        lines[-1] += " (95% interval of the change {:+.1f} … {:+.1f})".format(*change)
    return "\n".join(lines)


def train_layer(args, diffusion, conditioner, dataset: TrainingImages) -> None:
    """Trains the linear layer alone for --projection-steps."""
    optimizer = build_optimizer(args, conditioner, list(conditioner.projection.parameters()))
    steps, accumulation = args.projection_steps, args.batch_size // args.micro_batch
    draws = Draws(args.seed, conditioner.recap, args.states, range(*args.timesteps))
    stage = Stage(optimizer, range(steps), args.projection_lr, args.warmup, accumulation, args.max_grad_norm)
    keys = micro_batch_keys(0, steps, args.batch_size, args.micro_batch, 0, 1)
    batches = read_batches(dataset, keys, args.workers, diffusion.text_embedding.device)
    with tqdm(batches, "linear layer", steps * accumulation, unit="micro-batch", leave=False) as batches:
        algorithm_1(conditioner, diffusion, iter(batches), draws, stage, LayerSteps())


def main(args: argparse.Namespace) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.precision = args.precision or default_precision(device)
    everything, benchmark = read_mmvp(args.mmvp), []
    for name in type_names([pair.type for pair in everything]):
        benchmark += [pair for pair in everything if pair.type == name][: args.pairs]
    clip, diffusion, conditioner = build(args, device)
    size, layer_steps = args.image_size or diffusion.image_size, args.projection_steps
    dataset = TrainingImages(open_images(args.data), size, args.batch_size, args.seed)
    passes = 2 * len(benchmark) * args.draws * args.states * max(1, args.moves) * (2 if layer_steps else 1)
    passes += layer_steps * args.batch_size * args.states
    tflop = passes * 1.671 * (size / 512) ** 2
    print(f"{passes:,} forward and backward passes of the U-Net; for Stable Diffusion, {tflop:,.0f} TFLOP", flush=True)
    if args.projection == "fitted":
        fit_projection(args, clip, conditioner, dataset)
        print(f"the fit: R² {fit_r2(args, clip, conditioner):.3f} on 500 new phrases", flush=True)
    pairs = Pairs(clip, diffusion, benchmark, size, device)
    print(table(f"{args.projection} start", *measure(args, diffusion, conditioner, pairs)), flush=True)
    if layer_steps:
        train_layer(args, diffusion, conditioner, dataset)
        print(table(f"after {layer_steps} steps of the layer", *measure(args, diffusion, conditioner, pairs)))


if __name__ == "__main__":
    with exit_on_user_error("feedback.py", "try a smaller --micro-batch"):
        main(args)
