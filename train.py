"""DIVA, "Diffusion Feedback Helps CLIP See Better" (arXiv 2407.20171): Algorithm 1 in a plain DDP loop.

    torchrun train.py                                  # the miniature
    torchrun --nproc_per_node 8 train.py --recipe openai-vit-l-14-224 --data 'cc3m/*.tar' --mmvp MMVP/MMVP_VLM
    python train.py ...                                # the same, one process

The lines of Algorithm 1 stand in the comments. The loop is `algorithm_1`: start there.
"""

from harness.errors import UserError, one_sentence
from harness.options import less_memory, parse_args

if __name__ == "__main__":  # before the imports below, which take seconds: a mistyped argument is answered at once
    with one_sentence("train.py"):
        args = parse_args()

import math

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import beyond
from condition import VisualCondition, draw_patches, parse_recap
from data import STATES, TrainingImages, batch_keys, fingerprint, open_images, read_batches
from evaluate_mmvp import compare, similarities
from harness.mmvp import read_mmvp
from harness.processes import copy_to, joined_processes, main_first
from harness.recipes import parse_timesteps
from harness.run import Run
from model import Clip, Diffusion, load_clip, load_diffusion


def image_rngs(seed: int, keys: list[tuple[int, int]]) -> list[np.random.Generator]:
    """A generator for each image. What an image draws depends on seed, step and its place in the batch alone."""
    return [np.random.default_rng((STATES, seed, step, position)) for step, position in keys]


def draw_states(
    shape: tuple[int, ...], low: int, high: int, rngs: list[np.random.Generator]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Algorithm 1, line 4: t ~ U{low … high − 1}, (B, N) int64, and ε ~ N(0, I), (B, N, 4, h, w) fp32.

    `shape` is that of one image's noise, (N, 4, h, w). The paper draws t from the whole schedule: 0 and 1000.
    """
    timesteps = np.stack([rng.integers(low, high, shape[0]) for rng in rngs])
    noise = np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in rngs])
    return torch.from_numpy(timesteps), torch.from_numpy(noise)


def denoising_loss(
    diffusion: Diffusion, latents: torch.Tensor, condition: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Algorithm 1, lines 4 and 5 (Eq. 3): how badly φ denoises images with c as condition.

    The N states are an axis, folded into the batch for the U-Net. latents z (B, 4, h, w); condition c (B, N, L, W), or
    (B, 1, L, W) for all states; timesteps t (B, N); noise ε (B, N, 4, h, w) → L, a scalar; all but t in fp32.
    """
    alpha_bar = diffusion.alphas_cumprod[timesteps][..., None, None, None]  # ᾱ_t, (B, N, 1, 1, 1)
    latents = latents[:, None]  # the same z for all states, (B, 1, 4, h, w)
    noisy_latents = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise  # Alg. 1, line 4: z_t
    condition = condition.expand(-1, noise.shape[1], -1, -1)  # (B, N, L, W)
    dtype = diffusion.unet.dtype
    noise_pred = diffusion.unet(
        noisy_latents.flatten(0, 1).to(dtype), timesteps.flatten(), condition.flatten(0, 1).to(dtype)
    ).sample.float()  # ε_φ(z_t, t, c), (B · N, 4, h, w)
    target = noise
    if diffusion.prediction_type == "v_prediction":  # not the paper's: its squared error is that of ε over ᾱ_t
        target = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    return F.mse_loss(noise_pred, target.flatten(0, 1))  # Alg. 1, line 5: L, a mean over elements too


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """η at a step (0 … steps − 1): rises linearly in a share `warmup` of the steps, then a cosine from `peak` to 0.

    Section 4.1 of the paper: 4,600 steps, of which 0.5% warm up.
    """
    rising = max(1, int(warmup * steps)) if warmup else 0
    if step < rising:
        return peak * (step + 1) / (rising + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def algorithm_1(
    args, clip: Clip, diffusion: Diffusion, conditioner, optimizer, peak: float, steps: range, batches, run, pull=None
) -> None:
    """The method: each step lowers φ's denoising loss by moving what the optimizer holds, θ and the linear layer.

    Gradients are clipped as in the released code; the paper does not speak of it.

    Args:
        conditioner: a VisualCondition, in DDP.
        peak: the highest learning rate.
        steps: this stage's; the rate rises and falls to 0 within them.
        batches: of `read_batches`.
        run: keeps the loss, logs and saves (harness/run.py), and says at which step to begin.
        pull: not the paper's: a `beyond.Pull`.
    """
    parameters = optimizer.param_groups[0]["params"]
    recap = parse_recap(args.recap, clip.num_patches)
    low, high = parse_timesteps(args.timesteps)
    accumulation = args.batch_size // (args.micro_batch * dist.get_world_size())  # micro-batches a step and process
    for step in range(max(run.first_step, steps.start), steps.stop):
        lr = learning_rate(step - steps.start, len(steps), peak, args.warmup)  # η
        optimizer.param_groups[0]["lr"] = lr
        for i in range(accumulation):
            conditioner.require_backward_grad_sync = i == accumulation - 1  # DDP averages the gradients once a step
            batch = next(batches)
            images = batch["images"]  # Alg. 1, line 1: x, (B, 3, S, S), in [0, 1]
            rngs = image_rngs(args.seed, batch["keys"])
            latents = diffusion.encode(images)  # z, (B, 4, S/8, S/8), without a gradient
            timesteps, noise = draw_states((args.states, *latents.shape[1:]), low, high, rngs)  # Alg. 1, line 4: t, ε
            patches = draw_patches(recap, args.states, rngs)  # Alg. 1, line 3: of each state, (B, N, K)
            timesteps, noise, patches = copy_to(images.device, timesteps, noise, patches)
            prepared = clip.prepare(images)  # (B, 3, s, s)
            condition, cls = conditioner(prepared, diffusion.text, patches)  # Alg. 1, lines 2 and 3: V, c
            loss = denoising_loss(diffusion, latents, condition, timesteps, noise)  # Alg. 1, lines 4 and 5: ℓ, L
            objective = loss + pull(cls, prepared) if pull else loss  # not the paper's: keeps CLIP near its start
            (objective / accumulation).backward()  # through the frozen φ into θ
            run.note(loss, batch)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
        run.log(step, grad_norm, lr)  # ends the run if this is not finite, or too many images cannot be read
        optimizer.step()  # Alg. 1, line 6: θ ← θ − η ∇L; φ takes no gradient and is not in the optimizer
        optimizer.zero_grad()
        run.save(step + 1)  # every --save-every steps; ends the run if a signal asked for it


def build(args, device: torch.device) -> tuple[Clip, Diffusion, VisualCondition]:
    """θ, φ, and what carries θ's tokens to φ. UserError: they cannot be loaded, or do not fit together."""
    clip = load_clip(args.clip, args.random_weights, str(device))
    recap = parse_recap(args.recap, clip.num_patches)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    diffusion = load_diffusion(args.diffusion, args.text, dtype, device, args.random_weights)
    parse_timesteps(args.timesteps, len(diffusion.alphas_cumprod))  # refused if the schedule has fewer
    if args.image_size and args.image_size % diffusion.downsampling:
        raise UserError(f"--image-size {args.image_size}: must be a multiple of {diffusion.downsampling}")
    torch.manual_seed(args.seed)  # of the linear layer, which starts at random
    conditioner = VisualCondition(clip, diffusion, recap, args.join).to(device)
    if args.grad_checkpointing:
        clip.model.visual.set_grad_checkpointing()
        diffusion.unet.enable_gradient_checkpointing()
    if args.compile:
        for module in (conditioner, diffusion.vae.encoder, diffusion.unet):
            module.compile()
    return clip, diffusion, conditioner


def build_optimizer(args, conditioner: VisualCondition, parameters: list) -> torch.optim.Optimizer:
    """What learns is what the optimizer holds: all else of the conditioner is frozen. The loop sets its rate."""
    conditioner.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    if args.optimizer == "adamw":  # not the paper's
        return torch.optim.AdamW(parameters, weight_decay=0)
    return torch.optim.SGD(parameters, momentum=args.momentum)  # section 4.1: momentum 0.9, no weight decay


def train(args, device: torch.device) -> None:
    """One run, from the models and the images to OUT/clip and, with --mmvp, its scores before and after."""
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")  # the device is known only here
    with main_first() as main:  # the others find what it has indexed
        files = open_images(args.data, progress=main)
        pairs = read_mmvp(args.mmvp) if args.mmvp else []
    run = Run(args, fingerprint(files))
    if run.finished:
        return
    clip, diffusion, conditioner = build(args, device)
    images = TrainingImages(files, args.image_size or diffusion.image_size, args.batch_size, args.seed)
    if args.projection == "fitted" and not run.first_step:
        beyond.fit_projection(args, clip, conditioner, images)
    pull = beyond.Pull(clip, args.pull) if args.pull else None
    stages = [(list(conditioner.parameters()), range(args.steps), args.lr)]  # the paper's: all learns, in all steps
    if args.projection_steps or args.freeze_projection:
        stages = beyond.stages(args, conditioner)
    rank, processes = dist.get_rank(), dist.get_world_size()
    keys = batch_keys(run.first_step, args.steps, args.batch_size, args.micro_batch, rank, processes)
    batches = read_batches(images, keys, args.workers, device)
    with run.started(clip, diffusion, conditioner, images):
        before = similarities(clip, pairs, device) if run.main and pairs else None
        for parameters, steps, peak in stages:
            optimizer = build_optimizer(args, conditioner, parameters)
            run.restore(optimizer, steps)
            ddp = DistributedDataParallel(conditioner, gradient_as_bucket_view=True)
            algorithm_1(args, clip, diffusion, ddp, optimizer, peak, steps, batches, run, pull)
    if run.main and pairs:
        cosines = [before, similarities(clip, pairs, device)]
        print(compare([args.clip, f"{args.out}/clip"], cosines, pairs, f"{args.out}/mmvp"))
    run.end()


if __name__ == "__main__":
    with one_sentence("train.py", less_memory(args)), joined_processes() as device:
        train(args, device)
