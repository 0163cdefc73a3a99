"""DIVA, "Diffusion Feedback Helps CLIP See Better" (arXiv 2407.20171): Algorithm 1 in a plain DDP loop.

    torchrun train.py --recipe openai-vit-l-14-224 --data 'cc3m/*.tar' --mmvp MMVP/MMVP_VLM --out runs/l14
    torchrun --nproc_per_node 8 train.py ... (the same)
    python train.py ... (the same, one process)

Line numbers in comments, `Alg. 1, line 4`, are those of the algorithm. Lines 1 and 6 are the loop in `train`, lines 2
and 3 `VisualCondition.forward` in condition.py, lines 4 and 5 `denoising_loss`.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.metadata
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

from model import RECIPES, Clip, Diffusion, Recap, Recipe, check_diffusion, load_checkpoint, load_clip
from model import embed_phrases, load_diffusion, locate_clip, one_sentence, parse_recap, read_state, recipe_of
from model import save_checkpoint, save_clip, synchronise, write_whole

PROCESSES = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1  # torchrun says how many there are
# what may change when a run goes on
FREE = {"micro_batch", "compile", "grad_checkpointing", "save_every", "mmvp", "out", "workers", "overwrite"}


# ---------------------------------------------------------------------------------------------------------------------
# The command line


EXAMPLES = """
examples:
  torchrun train.py                              the miniature: all of it, in half a minute on a CPU
  torchrun --nproc_per_node 8 train.py --recipe openai-vit-l-14-224 --data 'cc3m/*.tar' --mmvp MMVP/MMVP_VLM
  python train.py --recipe openai-vit-l-14-224 --data photos --clip ViT-B-16:openai --recap random:30% --join mean

The same command again goes on where a run has stopped. Recipes, and the CLIP of each:

"""


class Help(argparse.RawDescriptionHelpFormatter):
    """Says the default of every option that has one; the others' texts say what holds where they are not given."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)

    def _get_help_string(self, action: argparse.Action) -> str:
        value = " ".join(action.default) if isinstance(action.default, tuple) else str(action.default)
        has_one = value not in ("None", "False", "", argparse.SUPPRESS)
        return action.help + f" (default: {value})".replace("%", "%%") * has_one


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The recipe's row, with what the command line overrides. SystemExit: what the arguments alone show to be wrong."""
    start = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # read first: the recipe gives the defaults
    start.error = sys.exit
    start.add_argument("--recipe", help="the row of the table to start from", default="miniature", metavar="NAME")
    name = start.parse_known_args(argv)[0].recipe
    if name not in RECIPES:
        raise SystemExit(f"--recipe {name}: no such recipe; there are {', '.join(RECIPES)}")

    parser = argparse.ArgumentParser(
        usage="train.py [--recipe NAME] [--data PATH ...] [--mmvp PATH] [--out DIR] [options]",
        description="Post-train a CLIP with the feedback of a frozen diffusion model, on images only.",
        epilog=EXAMPLES + "\n".join(f"  {name:23} {row.clip}" for name, row in RECIPES.items()),
        formatter_class=Help,
        parents=[start],
        allow_abbrev=False,
    )
    parser.error = sys.exit  # a sentence, without the usage in front of it
    count, number = dict(type=at_least(1, int), metavar="N"), dict(type=at_least(0, float), metavar="X")
    add = parser.add_argument_group("the run").add_argument
    add("--data", help="a folder of images, shards or globs of them, or `synthetic`", nargs="+", metavar="PATH")
    add("--mmvp", help="score before and after on MMVP-VLM: a folder, or the hub's MMVP/MMVP_VLM", metavar="PATH")
    add("--out", help="where everything is written", default=f"runs/{name}", metavar="DIR")
    add("--overwrite", help="start anew where OUT holds a run, instead of resuming it", action="store_true")
    add = parser.add_argument_group("the method").add_argument
    add("--clip", help="a recipe, ARCH:TAG of open_clip, hf-hub:OWNER/NAME, or a saved folder", metavar="NAME")
    add("--diffusion", help="Stable Diffusion 1.x or 2.x, diffusers' layout: hub name or folder", metavar="NAME")
    add("--recap", help="random:COUNT, random:SHARE%%, pool:WINDOW, all or none", metavar="SPEC")
    add("--join", help="how the text's embedding is added: by position, or its mean", choices=("positions", "mean"))
    add("--text", help="the text beside the visual tokens; if not given, empty")
    add("--states", help="N, the noisy states per image", **count)
    add("--image-size", help="side of the diffusion model's images in pixels; if not given, its own", **count)
    add("--projection", help="where the linear layer starts: at random, or fitted", choices=("random", "fitted"))
    add("--freeze-projection", help="train the vision tower alone, not the linear layer", action="store_true")
    add = parser.add_argument_group("training").add_argument
    add("--steps", help="optimizer steps", **count)
    add("--batch-size", help="images per step, over all processes", **count)
    add("--micro-batch", help="images per process at once; the rest is accumulated", **count)
    add("--lr", help="peak learning rate", **number)
    add("--momentum", help="of SGD", **number)
    add("--warmup", help="share of the steps in which the rate rises; a cosine to 0 follows", **number)
    add("--max-grad-norm", help="gradients are clipped to this norm; 0: they are not", **number)
    add("--seed", help="of every random draw", type=at_least(0, int), metavar="N")
    add = parser.add_argument_group("the machine").add_argument
    add("--precision", help="of the computation; if not given, bf16 on CUDA, else fp32", choices=("bf16", "fp32"))
    add("--workers", help="processes that read images; if not given, up to 8", type=at_least(0, int), metavar="N")
    add("--save-every", help="steps between two saves", **count)
    add("--compile", help="compile CLIP, the VAE and the U-Net: minutes at the start", action="store_true")
    add("--grad-checkpointing", help="compute activations again in the backward pass: less memory", action="store_true")
    add("--random-weights", help="no download: untrained architectures, a random text embedding", action="store_true")
    parser.set_defaults(**{k: v for k, v in vars(RECIPES[name]).items() if k not in ("patches", "published")})
    args = parser.parse_args(argv)
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    """SystemExit for what the arguments alone show to be wrong, before anything is imported or loaded."""
    if args.data is None:
        raise SystemExit("--data is needed: a folder of images, shards ('cc3m/*.tar'), or `synthetic`")
    for path in args.data:
        if path != "synthetic" and not any(c in path for c in "*?[") and not os.path.exists(path):
            raise SystemExit(f"--data {path}: no such file or folder")
    if os.path.exists(args.out) and not os.path.isdir(args.out):
        raise SystemExit(f"--out {args.out}: is a file; a run needs a folder")
    if args.overwrite and Path(args.out).resolve() in Path(args.clip).resolve().parents:
        raise SystemExit(f"--overwrite: would delete {args.clip}, the CLIP to train; name another --out")
    if args.overwrite and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise SystemExit("--overwrite: every restart (torchrun --max-restarts) would delete the run; use another --out")
    locate_clip(args.clip)
    check_diffusion(args.diffusion)
    if args.random_weights and not os.path.isdir(args.diffusion) and args.diffusion != Recipe.diffusion:
        raise SystemExit(f"--random-weights: builds {Recipe.diffusion} or the architecture of a folder")
    if args.random_weights and args.projection == "fitted":
        raise SystemExit("--projection fitted: needs a text encoder that has learnt, not --random-weights")
    known = recipe_of(args.clip)
    recap = parse_recap(args.recap, RECIPES[known].patches if known else 10**9)  # how many there are shows when loaded
    if known and not os.path.isdir(args.diffusion):
        check_join(args.join, 1 + recap.count, 77)  # every Stable Diffusion 1.x and 2.x reads 77 positions of text
    if args.image_size and args.image_size % 8 and not os.path.isdir(args.diffusion):  # and has latents of an eighth
        raise SystemExit(f"--image-size {args.image_size}: must be a multiple of 8")
    at_once = args.micro_batch * PROCESSES
    if args.batch_size % at_once:
        raise SystemExit(
            f"--batch-size {args.batch_size}: must be a multiple of {at_once}, which is "
            f"--micro-batch {args.micro_batch} × {PROCESSES} process{'es' * (PROCESSES > 1)}; change one of them"
        )
    if args.warmup > 1:
        raise SystemExit(f"--warmup {args.warmup}: is a share of the steps, 0 to 1")


def check_join(join: str, tokens: int, positions: int) -> None:
    """SystemExit unless a condition of `tokens` tokens can join a text of `positions` positions."""
    if join == "positions" and tokens != positions:
        raise SystemExit(f"--join positions: the text has {positions} positions, the recap {tokens} tokens; use mean")


def at_least(low: int, kind: type):
    """An argument's type: a whole number (int) or a number (float) of at least `low`."""

    def parse(text: str):
        with contextlib.suppress(ValueError):
            if low <= (number := kind(text)) < 2**63:
                return number
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number of at least {low}")

    return parse


if __name__ == "__main__":  # before the imports below, which take seconds: a mistyped argument is answered at once
    with one_sentence("train.py"):
        args = parse_args()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.distributed.rendezvous import rendezvous  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402

import evaluate_mmvp  # noqa: E402
from condition import VisualCondition, count_patches, draw_patches, fit_projection, visual_tokens  # noqa: E402
from data import TrainingImages, collate, micro_batches, open_images, read_batches, to_device  # noqa: E402
from extras.log import Log, everyone, plan, ways_on  # noqa: E402
from extras.report import report_finished  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# The method


def draw(rng: np.random.Generator, shape: tuple[int, ...], num_timesteps: int, num_patches: int, recap: Recap) -> dict:
    """All that Algorithm 1 draws for one image, for its N states at once. `shape` is the noise's, (N, 4, h, w)."""
    drawn = dict(
        timesteps=rng.integers(0, num_timesteps, shape[0]),  # Alg. 1, line 4: t ~ U{0 … T − 1}, (N,)
        noise=rng.standard_normal(shape, dtype=np.float32),  # Alg. 1, line 4: ε ~ N(0, I), (N, 4, h, w)
    )
    if recap.window is None:  # Alg. 1, line 3: each state has patches of its own, (N, K)
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
    if diffusion.prediction_type == "v_prediction":  # another way to say ε, given z_t
        target = alphas_cumprod.sqrt() * noise - (1 - alphas_cumprod).sqrt() * latents
    return F.mse_loss(noise_pred, target.flatten(0, 1))  # Alg. 1, line 5: L


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """η at a step (0 … steps − 1): rises linearly over int(warmup · steps) steps to `peak`, then a cosine to 0."""
    rising = int(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))


# ---------------------------------------------------------------------------------------------------------------------
# Around the method


def start_processes() -> torch.device:
    """Joins the process group that torchrun announces, or makes one of this process alone; returns its device."""
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise SystemExit(f"--nproc_per_node: more processes than the {torch.cuda.device_count()} GPUs of this node")
        torch.cuda.set_device(device)
    else:
        device = torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    store, rank = dist.HashStore(), 0
    if "RANK" in os.environ:
        store, rank, _ = next(rendezvous("env://"))
        if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:  # on one node a restart finds the old keys
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # what is on the CPU waits for no GPU
    hour = datetime.timedelta(hours=1)
    dist.init_process_group(backend, store=store, rank=rank, world_size=PROCESSES, timeout=hour)
    return device


def build(args: argparse.Namespace, device: torch.device, files) -> tuple:
    """A Clip (θ), a Diffusion (φ), the VisualCondition that is trained, and the TrainingImages of `files` with all that
    is drawn for each. SystemExit: `args` ask for what does not fit together; a recap, before weights are read.
    """
    if known := recipe_of(args.clip):
        patches = RECIPES[known].patches
    else:
        patches = count_patches(load_clip(args.clip, random_weights=True, device="meta").model.visual)
    recap = parse_recap(args.recap, patches)
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    clip = load_clip(args.clip, args.random_weights, str(device))
    diffusion = load_diffusion(args.diffusion, args.text, dtype, device, args.random_weights)
    check_join(args.join, 1 + recap.count, diffusion.text.shape[1])
    encoder = VisualCondition(clip, diffusion, recap, args.join, args.seed).to(device)
    encoder.projection.requires_grad_(not args.freeze_projection)
    if args.grad_checkpointing:
        clip.model.visual.set_grad_checkpointing()
        diffusion.unet.enable_gradient_checkpointing()
    if args.compile:
        for module in (encoder, diffusion.vae.encoder, diffusion.unet):
            module.compile()
    size = args.image_size or diffusion.image_size
    shape = (args.states, *diffusion.latent_shape(size))  # (N, 4, h, w)
    steps = len(diffusion.alphas_cumprod)  # T
    draws = functools.partial(draw, shape=shape, num_timesteps=steps, num_patches=patches, recap=recap)
    return clip, diffusion, encoder, TrainingImages(files, size, args.batch_size, args.seed, draws)


@torch.no_grad()
def start_fitted(encoder: VisualCondition, clip: Clip, diffusion: str, dataset: TrainingImages, device) -> None:
    """Starts the linear layer by `fit_projection`; 64 images give the visual tokens' mean and spread."""
    batch = to_device(collate([dataset[0, i] for i in range(64)]), device)
    cls, local = visual_tokens(encoder.visual, clip.view(batch["images"]))
    tokens = torch.cat([cls, local.flatten(0, 1)])  # (64 · (1 + P), D)
    fit_projection(encoder.projection, *embed_phrases(clip, diffusion), tokens)


def check_out(args: argparse.Namespace) -> dict:
    """The state of the run in OUT that goes on, or of one that begins.

    SystemExit: OUT holds another run than this one, unless it is to be overwritten.
    """
    state = None if args.overwrite else read_state(Path(args.out) / "checkpoint")
    here = json.loads(json.dumps(vars(args)))
    if state is None:
        return dict(step=0, unreadable=0)
    found = state["args"]
    what = [f"{k} {found.get(k)!r} there, {here[k]!r} here" for k in here if k not in FREE and found.get(k) != here[k]]
    if what:
        raise SystemExit(f"{args.out}: holds another run ({'; '.join(what)}); name another --out or --overwrite")
    return state


def open_out(args: argparse.Namespace) -> None:
    """Makes OUT with its args.json: every setting of the run and the versions that it runs with."""
    out = Path(args.out)
    if args.overwrite:
        for part in ("checkpoint.old", "checkpoint", "clip.old", "clip", "mmvp"):
            if (out / part).exists():
                shutil.rmtree(out / part)
        for name in ("metrics.jsonl", "report.html"):
            (out / name).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    packages = ("torch", "open_clip_torch", "diffusers", "transformers")
    versions = {name: importlib.metadata.version(name) for name in packages}
    write_whole(out / "args.json", json.dumps(vars(args) | dict(versions=versions), indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1


def train(args: argparse.Namespace) -> None:
    """One run, from the models and the images to OUT/clip and, with --mmvp, its scores before and after."""
    device = start_processes()
    first, out = dist.get_rank() == 0, Path(args.out)
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    if not first:
        dist.barrier()  # until the first process has checked and indexed what the others then find
    state = check_out(args)
    files = open_images(args.data, progress=first)
    total, first_step = len(files or ()), state["step"]
    if first_step and state["images"] != total:
        raise SystemExit(f"{out}: its run has {state['images']} images, --data now {total}; bring them back to go on")
    pairs = evaluate_mmvp.read_mmvp(args.mmvp) if args.mmvp else None
    if first:
        dist.barrier()
    if first_step == args.steps and (not pairs or (out / "mmvp" / "scores.json").exists()):
        if first:
            scores = ", scores in mmvp/ (evaluate_mmvp.py scores it on other pairs)" * bool(pairs)
            print(f"{out}: this run is finished{scores}; --overwrite starts anew")
            print(report_finished(out))  # it may have died before
        dist.destroy_process_group()
        return

    clip, diffusion, encoder, dataset = build(args, device, files)
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=args.lr, momentum=args.momentum)
    if first:
        print(plan(args, first_step, clip, encoder, dataset, device), flush=True)
        if pairs:
            recipe = None if args.random_weights else recipe_of(args.clip)  # whose published scores stand beside ours
            before = evaluate_mmvp.similarities(clip, pairs, device)
            print(f"\n{evaluate_mmvp.report([f'{args.clip}, before'], [before], pairs, [recipe])}\n", flush=True)
        open_out(args)
    dist.barrier()
    if args.projection == "fitted":
        start_fitted(encoder, clip, args.diffusion, TrainingImages(files, dataset.size, 64, args.seed), device)
    if first_step:
        load_checkpoint(out / "checkpoint", encoder, optimizer)
    ddp = DistributedDataParallel(encoder, gradient_as_bucket_view=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    if len(set(everyone((first_step, len(dataset))))) > 1:
        raise SystemExit("steps taken or images differ between processes; all need the same --out and --data")
    keys = functools.partial(
        micro_batches, first_step, args.steps, args.batch_size, args.micro_batch, dist.get_rank(), PROCESSES
    )
    if args.workers is None:
        args.workers = min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    accumulation = args.batch_size // (args.micro_batch * PROCESSES)
    log = Log(args, first_step, state["unreadable"])
    batches = read_batches(dataset, keys, args.workers)

    def save(step: int) -> None:
        if step:
            synchronise(log.path)  # first: its lines are never behind the checkpoint
        state = dict(step=step, unreadable=log.unreadable, images=total, args=vars(args))
        save_checkpoint(out / "checkpoint", encoder, optimizer, state)

    for step in range(first_step, args.steps):
        losses, unreadable = [], []
        for micro in range(accumulation):
            log.stop_if_asked(step, save)  # by SIGTERM, SIGINT or SIGUSR1
            ddp.require_backward_grad_sync = micro == accumulation - 1  # processes average gradients once a step
            batch = to_device(next(batches), device)  # with t, ε and the patches of its N states, from `draw`
            images = batch["images"]  # Alg. 1, line 1: x, (B, 3, S, S)
            with autocast:
                condition = ddp(clip.view(images), diffusion.text, batch.get("patches"))  # Alg. 1, lines 2 and 3: V, c
            latents = diffusion.encode(images)  # z, (B, 4, S/8, S/8)
            loss = denoising_loss(  # Alg. 1, lines 4 and 5: ℓ, L
                diffusion, latents, condition, batch["timesteps"], batch["noise"]
            )
            (loss / accumulation).backward()  # through the frozen φ into θ
            losses.append(loss.detach())
            unreadable += batch["unreadable"]
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        log.step(step, losses, unreadable, grad_norm, lr)  # ends the run, before the step, if it is not finite
        optimizer.step()  # Alg. 1, line 6: θ ← θ − η ∇L; φ never changes
        optimizer.zero_grad()
        if first and ((step + 1) % args.save_every == 0 or step + 1 == args.steps):
            save_clip(clip, out / "clip")  # first: a run that dies in between comes here again
            save(step + 1)
            log.time = time.perf_counter()  # the next step's speed is its own
    log.close()

    if first:
        if pairs:
            names = [f"{args.clip}, before", f"{out}/clip"]
            cosines = [before, evaluate_mmvp.similarities(clip, pairs, device)]
            print(f"\n{evaluate_mmvp.report(names, cosines, pairs, [recipe, None])}\n")
            evaluate_mmvp.save_scores(out / "mmvp", names, cosines, pairs)
        print(report_finished(out))  # OUT/report.html, and the model card in OUT/clip
        print(ways_on(args, clip))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with one_sentence("train.py"):
        train(args)
