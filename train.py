"""DIVA, "Diffusion Feedback Helps CLIP See Better" (arXiv 2407.20171): Algorithm 1 in a plain DDP loop.

    python train.py                                    # the miniature, on a CPU
    torchrun --nproc_per_node 8 train.py --recipe openai-vit-l-14-224 --data 'cc3m/*.tar' --mmvp MMVP/MMVP_VLM

Start at `algorithm_1`: its comments number the lines of Algorithm 1.
"""

from harness.errors import UserError, exit_on_user_error
from harness.options import less_memory, parse_args

if __name__ == "__main__":  # before the imports that take seconds, so that --help and a typo are answered at once
    with exit_on_user_error("train.py"):
        args = parse_args()

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import beyond
from condition import Recap, VisualCondition, draw_patch_indices, parse_recap
from data import TrainingImages, image_rngs, micro_batch_keys, open_images, read_batches
from evaluate_mmvp import compare, similarities
from harness.mmvp import read_mmvp
from harness.processes import copy_to_device, default_precision, process_group, rank_zero_first
from harness.run import Run
from model import Clip, Diffusion, load_clip, load_diffusion


@dataclass(frozen=True)
class Draws:
    """Settings of the random draws for each image: the patches of its recap, its timesteps and its noise."""

    seed: int
    recap: Recap
    states: int  # N, the noisy states of an image
    timestep_range: range  # t is uniform over this; any but range(1000) is not in the paper


@dataclass
class Stage:
    """One call of `algorithm_1`: a range of steps and their settings. The paper has one stage.

    If you add a setting that the loop needs, make it a field of `Stage` or `Draws`.
    """

    optimizer: torch.optim.Optimizer  # holds the parameters that are trained in this stage
    step_range: range
    max_lr: float
    warmup: float  # share of the steps
    accumulation: int  # micro-batches per step and process
    max_grad_norm: float  # not in the paper, but in the released code; 0: no clipping
    penalty: beyond.Ldifs | None = None  # not in the paper


def algorithm_1(conditioner, diffusion: Diffusion, batches, draws: Draws, stage: Stage, run) -> None:
    """The method: each step updates θ, the linear layer or both to lower the denoising loss of the frozen φ.

    Gradients are clipped as in the released code; the paper does not mention clipping.

    Args:
        conditioner: a `VisualCondition` in DDP; it holds everything that can be trained.
        batches: micro-batches, from `read_batches`.
        run: records the loss, logs and saves (harness/run.py); training resumes at `run.first_step`.
    """
    optimizer = stage.optimizer
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for step in range(max(run.first_step, stage.step_range.start), stage.step_range.stop):
        lr = learning_rate(step, stage)  # η
        for group in optimizer.param_groups:
            group["lr"] = lr
        for i in range(stage.accumulation):
            conditioner.require_backward_grad_sync = i == stage.accumulation - 1  # like DDP.no_sync: one average a step
            batch = next(batches)
            images = batch["images"]  # Alg. 1, line 1: x, (B, 3, S, S) in [0, 1]
            rngs = image_rngs(draws.seed, batch["keys"])  # one per image; they draw the patches, then t, then ε
            patch_indices = draw_patch_indices(draws.recap, draws.states, rngs, images.device)  # (B, N, K)
            condition, cls = conditioner(images, diffusion.text_embedding, patch_indices)  # Alg. 1, lines 2, 3: V, c
            latents = diffusion.encode(images)  # z, (B, 4, S/8, S/8); φ is frozen, so without a gradient
            timesteps, noise = draw_states(draws, latents.shape[1:], rngs, images.device)  # Alg. 1, line 4: t, ε
            loss = denoising_loss(diffusion, latents, condition, timesteps, noise)  # Alg. 1, lines 4, 5: z_t, ℓ, L
            objective = loss + stage.penalty(cls, images) if stage.penalty else loss  # not in the paper
            (objective / stage.accumulation).backward()  # through the frozen φ into θ
            run.record(loss, batch)  # logs L without the penalty
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, stage.max_grad_norm or math.inf)  # not in the paper
        run.log(step, grad_norm, lr)  # raises if the loss or its gradient is not finite
        optimizer.step()  # Alg. 1, line 6: θ ← θ − η ∇L; φ has no gradient and is not in the optimizer
        optimizer.zero_grad(set_to_none=False)  # in place: the gradients are views of DDP's buckets
        run.save(step + 1)  # every --save-every steps; raises Stopped after a signal


def draw_states(
    draws: Draws, shape: tuple[int, ...], rngs: list[np.random.Generator], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Algorithm 1, line 4: timesteps t ~ U (B, N) int64, and noise ε ~ N(0, I) (B, N, 4, h, w) fp32.

    `shape` is that of one latent, (4, h, w); `rngs` has one generator per image. NumPy draws on the CPU, so that a GPU
    run draws the same numbers as a CPU run.
    """
    timesteps = [rng.integers(draws.timestep_range.start, draws.timestep_range.stop, draws.states) for rng in rngs]
    noise = [rng.standard_normal((draws.states, *shape), dtype=np.float32) for rng in rngs]
    return copy_to_device(np.stack(timesteps), device), copy_to_device(np.stack(noise), device)


def denoising_loss(
    diffusion: Diffusion, latents: torch.Tensor, condition: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Algorithm 1, lines 4 and 5 (Eq. 3): the mean squared error of φ's noise prediction under the condition c.

    The U-Net sees B images with N states each as one batch of B · N.

    Args:
        latents: z, (B, 4, h, w) fp32.
        condition: c, (B, N, 1 + K, W), or (B, 1, 1 + K, W) if the states share it.
        timesteps: t, (B, N) int64.
        noise: ε, (B, N, 4, h, w) fp32.

    Returns:
        L, a scalar in fp32.
    """
    alpha_bar = diffusion.alphas_cumprod[timesteps][..., None, None, None]  # ᾱ_t, (B, N, 1, 1, 1)
    latents = latents[:, None]  # (B, 1, 4, h, w), shared by the states
    noisy_latents = alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise  # Alg. 1, line 4: z_t
    condition = condition.expand(-1, noise.shape[1], -1, -1)  # (B, N, 1 + K, W)
    dtype = diffusion.unet.dtype
    noise_pred = diffusion.unet(
        noisy_latents.flatten(0, 1).to(dtype), timesteps.flatten(), condition.flatten(0, 1).to(dtype)
    ).sample.float().unflatten(0, timesteps.shape)  # ε_φ(z_t, t, c), (B, N, 4, h, w)
    target = noise
    if diffusion.prediction_type == "v_prediction":  # not in the paper; ‖v error‖² = ‖ε error‖² / ᾱ_t
        target = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * latents
    error = (noise_pred - target).square().mean((2, 3, 4))  # ℓ of each state, (B, N); multiply weights (B, N) here
    return error.mean()  # Alg. 1, line 5: L


def learning_rate(step: int, stage: Stage) -> float:
    """η at a step of the run: a linear warm-up, then a cosine decay from `max_lr` to 0 (section 4.1: 0.5% warm-up)."""
    step, steps = step - stage.step_range.start, len(stage.step_range)
    warmup_steps = max(1, int(stage.warmup * steps)) if stage.warmup else 0
    if step < warmup_steps:
        return stage.max_lr * (step + 1) / (warmup_steps + 1)
    return stage.max_lr * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


def build(args, device: torch.device) -> tuple[Clip, Diffusion, VisualCondition]:
    """Loads θ and φ, and builds the module that turns θ's tokens into φ's condition. extras/ calls it too.

    Raises:
        UserError: a model cannot be loaded, or the settings do not fit it.
    """
    clip = load_clip(args.clip, args.random_weights, str(device))
    recap = parse_recap(args.recap, clip.num_patches)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    diffusion = load_diffusion(args.diffusion, args.text, dtype, device, args.random_weights)
    if args.timesteps[1] > len(diffusion.alphas_cumprod):
        raise UserError(f"--timesteps: the schedule of {args.diffusion} has {len(diffusion.alphas_cumprod)} timesteps")
    if args.image_size and args.image_size % diffusion.downsampling:
        raise UserError(f"--image-size {args.image_size}: must be a multiple of {diffusion.downsampling}")
    torch.manual_seed(args.seed)  # initializes the linear layer
    conditioner = VisualCondition(clip, diffusion, recap, args.join).to(device)
    if args.grad_checkpointing:
        clip.model.visual.set_grad_checkpointing()
        diffusion.unet.enable_gradient_checkpointing()
    if args.compile:
        for module in (conditioner, diffusion.vae.encoder, diffusion.unet):
            module.compile()
    return clip, diffusion, conditioner


def build_optimizer(args, conditioner: VisualCondition, parameters: list) -> torch.optim.Optimizer:
    """Builds an optimizer of `parameters` and freezes the conditioner's others. The loop sets the learning rate."""
    conditioner.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    if args.optimizer == "adamw":  # not in the paper
        return torch.optim.AdamW(parameters, weight_decay=0)
    return torch.optim.SGD(parameters, momentum=args.momentum)  # section 4.1: momentum 0.9, no weight decay


def train(args, device: torch.device) -> None:
    """One run: loads the models and the images, trains, saves OUT/clip, and scores it if --mmvp is given."""
    args.precision = args.precision or default_precision(device)  # parse_args does not know the device
    with rank_zero_first() as is_rank_zero:  # rank 0 indexes the shards; the others read that index
        files = open_images(args.data, progress=is_rank_zero)
        pairs = read_mmvp(args.mmvp) if args.mmvp else []
    run = Run(args, "synthetic" if files is None else files.fingerprint())
    if run.finished:
        return
    clip, diffusion, conditioner = build(args, device)
    dataset = TrainingImages(files, args.image_size or diffusion.image_size, args.batch_size, args.seed)
    if args.projection == "fitted" and not run.first_step:
        beyond.fit_projection(args, clip, conditioner, dataset)
    penalty = beyond.Ldifs(clip, args.ldifs) if args.ldifs else None
    draws = Draws(args.seed, conditioner.recap, args.states, range(*args.timesteps))
    rank, processes = dist.get_rank(), dist.get_world_size()
    accumulation = args.batch_size // (args.micro_batch * processes)
    keys = micro_batch_keys(run.first_step, args.steps, args.batch_size, args.micro_batch, rank, processes)
    batches = read_batches(dataset, keys, args.workers, device, run.waiting)
    stages = [(list(conditioner.parameters()), range(args.steps), args.lr)]  # the paper's one stage trains everything
    if args.projection_steps or args.freeze_projection:  # as in the default recipe
        stages = beyond.stages(args, conditioner)
    with run.started(clip, diffusion, conditioner, dataset):
        before = similarities(clip, pairs, device) if is_rank_zero and pairs else None  # the other ranks wait
        for parameters, step_range, max_lr in stages:
            optimizer = build_optimizer(args, conditioner, parameters)
            run.restore(optimizer, step_range)
            stage = Stage(
                optimizer, step_range, max_lr, warmup=args.warmup, accumulation=accumulation,
                max_grad_norm=args.max_grad_norm, penalty=penalty,
            )  # fmt: skip
            ddp = DistributedDataParallel(conditioner, gradient_as_bucket_view=True)
            algorithm_1(ddp, diffusion, batches, draws, stage, run)
    if is_rank_zero and pairs:
        cosines = [before, similarities(clip, pairs, device)]
        print(compare([args.clip, f"{args.out}/clip"], cosines, pairs, f"{args.out}/mmvp"))
    run.end()


if __name__ == "__main__":
    with exit_on_user_error("train.py", less_memory(args)), process_group() as device:
        train(args, device)
