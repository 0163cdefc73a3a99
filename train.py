"""DIVA, "Diffusion Feedback Helps CLIP See Better" (arXiv 2407.20171): Algorithm 1 in a plain DDP loop.

    torchrun train.py                                  # the miniature
    torchrun --nproc_per_node 8 train.py --recipe openai-vit-l-14-224 --data 'cc3m/*.tar' --mmvp MMVP/MMVP_VLM
    python train.py ...                                # the same, one process

Algorithm 1, by the numbers of its lines: the loop is `algorithm_1` below (lines 1 and 6), the condition is
`VisualCondition.forward` in condition.py (lines 2 and 3), the loss is `denoising_loss` below (lines 4 and 5). t, ε and
the patches of each image come with its batch: `draw` below makes them. L is a mean over latent elements too.
"""

from harness.errors import one_sentence
from harness.options import less_memory, parse_args

if __name__ == "__main__":  # before the imports below, which take seconds: a mistyped argument is answered at once
    with one_sentence("train.py"):
        args = parse_args()

import contextlib
import copy
import functools
import itertools
import math
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from condition import VisualCondition, count_patches, draw_patches, fit_projection, visual_tokens
from data import TrainingImages, batch_keys, collate, open_images, read_batches, to_device
from evaluate_mmvp import change, report, save_scores, similarities, verdict
from harness.mmvp import read_mmvp
from harness.processes import join_processes, main_first
from harness.recipes import RECIPES, Recap, check_join, parse_recap, parse_timesteps, recipe_of
from harness.run import Run, plan, ways_on
from model import Diffusion, embed_phrases, load_clip, load_diffusion


def draw(
    rng: np.random.Generator, shape: tuple[int, ...], timesteps: tuple[int, int], num_patches: int, recap: Recap
) -> dict:
    """All that Algorithm 1 draws for one image, for its N states at once. `shape` is the noise's, (N, 4, h, w)."""
    drawn = dict(
        timesteps=rng.integers(*timesteps, shape[0]),  # Alg. 1, line 4: t ~ U{0 … T − 1}, or a part of it, (N,)
        noise=rng.standard_normal(shape, dtype=np.float32),  # Alg. 1, line 4: ε ~ N(0, I), (N, 4, h, w)
    )
    if recap.kind == "random":  # Alg. 1, line 3: each state has patches of its own, (N, K)
        drawn["patches"] = draw_patches(num_patches, recap.count, shape[0], rng)
    return drawn


def denoising_loss(
    diffusion: Diffusion, latents: torch.Tensor, condition: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Algorithm 1, lines 4 and 5 (Eq. 3): how badly φ denoises images with c as condition.

    The N states are an axis, folded into the batch for the U-Net. latents z (B, 4, h, w); condition c (B, N, L, W), or
    (B, 1, L, W) for all states; timesteps t (B, N); noise ε (B, N, 4, h, w) → L, a scalar; all but t in fp32.
    """
    alphas_cumprod = diffusion.alphas_cumprod[timesteps][..., None, None, None]  # ᾱ_t, (B, N, 1, 1, 1)
    latents = latents[:, None]  # the same z for all states, (B, 1, 4, h, w)
    noisy_latents = alphas_cumprod.sqrt() * latents + (1 - alphas_cumprod).sqrt() * noise  # Alg. 1, line 4: z_t
    condition = condition.expand(-1, noise.shape[1], -1, -1)  # (B, N, L, W)
    dtype = diffusion.unet.dtype
    noise_pred = diffusion.unet(
        noisy_latents.flatten(0, 1).to(dtype), timesteps.flatten(), condition.flatten(0, 1).to(dtype)
    ).sample.float()  # ε_φ(z_t, t, c), (B · N, 4, h, w)
    target = noise
    if diffusion.prediction_type == "v_prediction":  # its error is that of ε times 1 / ᾱ_t
        target = alphas_cumprod.sqrt() * noise - (1 - alphas_cumprod).sqrt() * latents
    return F.mse_loss(noise_pred, target.flatten(0, 1))  # Alg. 1, line 5: L


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """η at a step (0 … steps − 1): rises linearly over int(warmup · steps) steps to `peak`, then a cosine to 0."""
    rising = int(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


def algorithm_1(args, clip, diffusion: Diffusion, conditioner, optimizer, batches, run) -> None:
    """The method: each step lowers φ's denoising loss by moving θ. `run` logs, saves, and says where to begin."""
    parameters = optimizer.param_groups[0]["params"]
    accumulation = args.batch_size // (args.micro_batch * dist.get_world_size())  # micro-batches a step and process
    for step in range(run.first_step, args.steps):
        lr = set_stage(args, step, conditioner, optimizer)  # η
        for batch in micro_batches(batches, accumulation, conditioner):
            images = batch["images"]  # Alg. 1, line 1: x, (B, 3, S, S)
            prepared = clip.prepare(images)  # (B, 3, s, s)
            condition, cls = conditioner(  # Alg. 1, lines 2 and 3: V, c
                prepared, diffusion.text, batch.get("patches")
            )
            latents = diffusion.encode(images)  # z, (B, 4, S/8, S/8)
            loss = denoising_loss(  # Alg. 1, lines 4 and 5: ℓ, L
                diffusion, latents, condition, batch["timesteps"], batch["noise"]
            )
            pull = args.pull * clip.drift(cls, prepared) if args.pull else 0  # not the paper's: --pull
            ((loss + pull) / accumulation).backward()  # through the frozen φ into θ
            run.note(loss, batch)
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
        run.log(step, grad_norm, lr)  # ends the run, before the step, if it is not finite
        optimizer.step()  # Alg. 1, line 6: θ ← θ − η ∇L; φ never changes
        optimizer.zero_grad()
        run.save(step + 1)


def set_stage(args, step: int, conditioner, optimizer) -> float:
    """Sets what a step trains, and its rate, which is returned.

    The first --projection-steps train the linear layer alone; then θ learns, and the layer with it unless it is frozen.
    """
    first = args.projection_steps
    alone = step < first
    tower, layer = not alone, alone or not args.freeze_projection  # whether they are trained
    for name, parameter in conditioner.named_parameters():
        parameter.requires_grad_(layer if "projection." in name else tower)
    if alone:
        lr = learning_rate(step, first, args.projection_lr, args.warmup)
    else:
        lr = learning_rate(step - first, args.steps - first, args.lr, args.warmup)
    optimizer.param_groups[0]["lr"] = lr
    return lr


def micro_batches(batches, count: int, conditioner):
    """The next `count` batches: one step. With the last, DDP averages the gradients over the processes."""
    for i, batch in enumerate(itertools.islice(batches, count), start=1):
        conditioner.require_backward_grad_sync = i == count
        yield batch


def build(args, device: torch.device, files) -> tuple:
    """A Clip (θ), a Diffusion (φ), the VisualCondition that is trained, and the TrainingImages of `files`.

    Raises:
        UserError: `args` ask for what does not fit together; a recap, before weights are read.
    """
    if known := recipe_of(args.clip):
        patches = RECIPES[known].patches
    else:
        patches = count_patches(load_clip(args.clip, random_weights=True, device="meta").model.visual)
    recap = parse_recap(args.recap, patches)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    clip = load_clip(args.clip, args.random_weights, str(device))
    diffusion = load_diffusion(args.diffusion, args.text, dtype, device, args.random_weights)
    check_join(args.join, recap, diffusion.text.shape[1])
    conditioner = VisualCondition(clip, diffusion, recap, args.join, args.seed).to(device)
    if args.pull:
        clip.untouched = copy.deepcopy(clip.model.visual).requires_grad_(False)
    if args.grad_checkpointing:
        clip.model.visual.set_grad_checkpointing()
        diffusion.unet.enable_gradient_checkpointing()
    if args.compile:
        for module in (conditioner, diffusion.vae.encoder, diffusion.unet):
            module.compile()
    size = args.image_size or diffusion.image_size
    shape = (args.states, *diffusion.latent_shape(size))  # of the noise, (N, 4, S/8, S/8)
    if args.projection == "fitted":
        images = TrainingImages(files, size, args.batch_size, args.seed)
        tokens = class_tokens(clip, images, min(1000, len(images)), device)
        fit_projection(conditioner.projection, *embed_phrases(clip, args.diffusion, args.text), tokens)
    timesteps = parse_timesteps(args.timesteps, len(diffusion.alphas_cumprod))
    draws = functools.partial(draw, shape=shape, timesteps=timesteps, num_patches=patches, recap=recap)
    return clip, diffusion, conditioner, TrainingImages(files, size, args.batch_size, args.seed, draws)


@torch.no_grad()
def class_tokens(clip, images: TrainingImages, count: int, device: torch.device) -> torch.Tensor:
    """The class tokens of the first `count` images of training, (count, D)."""
    found, keys = [], [(0, i) for i in range(count)]
    for start in range(0, count, 50):
        batch = to_device(collate([images[key] for key in keys[start : start + 50]]), device)
        found.append(visual_tokens(clip.model.visual, clip.prepare(batch["images"]))[0])
    return torch.cat(found)


def build_optimizer(args, conditioner) -> torch.optim.Optimizer:
    """Of CLIP's vision tower and the linear layer, and of nothing else."""
    conditioner.projection.requires_grad_(args.projection_steps > 0 or not args.freeze_projection)
    parameters = [p for p in conditioner.parameters() if p.requires_grad]
    if args.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0)
    return torch.optim.SGD(parameters, lr=args.lr, momentum=args.momentum)


def train(args) -> None:
    """One run, from the models and the images to OUT/clip and, with --mmvp, its scores before and after."""
    device, out = join_processes(), Path(args.out)
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    with main_first() as main:
        files = open_images(args.data, progress=main)
        pairs = read_mmvp(args.mmvp) if args.mmvp else []
        run = Run(args, images=len(files or ()))
    if run.finished and main:
        print(run.finished_line())
    if not run.finished:
        clip, diffusion, conditioner, dataset = build(args, device, files)
        optimizer = build_optimizer(args, conditioner)
        if main:
            print(plan(args, run.first_step, clip, conditioner, dataset, device), flush=True)
        before = similarities(clip, pairs, device) if main and pairs else None
        run.start(clip, conditioner, optimizer)
        rank, processes = dist.get_rank(), dist.get_world_size()
        keys = batch_keys(run.first_step, args.steps, args.batch_size, args.micro_batch, rank, processes)
        batches = read_batches(dataset, keys, args.workers, device)
        staged = args.projection_steps > 0  # then a part of the parameters has no gradient
        ddp = DistributedDataParallel(conditioner, gradient_as_bucket_view=True, find_unused_parameters=staged)
        with contextlib.closing(run):
            algorithm_1(args, clip, diffusion, ddp, optimizer, batches, run)
        if main and pairs:
            names, cosines = [f"{args.clip}, before", f"{out}/clip"], [before, similarities(clip, pairs, device)]
            recipe = None if args.random_weights else recipe_of(args.clip)  # whose published scores stand beside ours
            print(f"\n{report(names, cosines, pairs, [recipe, None])}\n")
            save_scores(out / "mmvp", names, cosines, pairs)
            print(verdict(change(*cosines, pairs), len(pairs)))
        if main:
            print(ways_on(args, clip))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with one_sentence("train.py", less_memory(args)):
        train(args)
