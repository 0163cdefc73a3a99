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
import resource
import shutil
import sys
import time
from pathlib import Path

from model import RECIPES, SETTINGS, Diffusion, Recap, Recipe, check_diffusion, load_checkpoint, load_clip
from model import load_diffusion, locate_clip, one_sentence, parse_recap, recipe_of, save_checkpoint, save_clip

PROCESSES = int(os.environ.get("WORLD_SIZE", 1))  # torchrun says how many there are
FREE = ("micro_batch", "save_every", "mmvp", "out", "workers", "overwrite")  # may differ when a run goes on


# ---------------------------------------------------------------------------------------------------------------------
# The command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The recipe's row, with what the command line overrides. SystemExit: what the arguments alone show to be wrong."""
    parser = argparse.ArgumentParser(
        description="Post-train a CLIP with the feedback of a frozen diffusion model, on images only.",
        epilog="Recipes: " + ", ".join(RECIPES) + ".",
        argument_default=argparse.SUPPRESS,
    )
    parser.error = sys.exit  # a sentence, without the usage in front of it

    def add(group, flag: str, help: str, default=None, **options) -> None:
        default = getattr(Recipe, flag[2:].replace("-", "_"), None) if default is None else default
        shown = "the recipe's" if default is None else "empty" if default == "" else default
        group.add_argument(flag, help=f"{help} (default: {shown})", **options)

    count, number = dict(type=at_least(1, int)), dict(type=at_least(0, float))
    run = parser.add_argument_group("the run")
    add(run, "--recipe", "the row of the table to start from", "miniature", metavar="NAME")
    add(run, "--data", "a folder of images, shards, globs of shards, or `synthetic`", nargs="+", metavar="PATH")
    add(run, "--mmvp", "MMVP-VLM, to score before and after: a folder or the hub's MMVP/MMVP_VLM", metavar="PATH")
    add(run, "--out", "where everything is written", "runs/RECIPE", metavar="DIR")
    add(run, "--overwrite", "start anew where OUT holds a run", "go on with it", action="store_true")
    method = parser.add_argument_group("the method")
    add(method, "--clip", "a recipe, ARCH:TAG of open_clip, hf-hub:OWNER/NAME, or a saved folder", metavar="NAME")
    add(method, "--diffusion", "Stable Diffusion 1.x or 2.x, diffusers' layout: hub name or folder", metavar="NAME")
    add(method, "--recap", "random:COUNT, random:SHARE%%, pool:WINDOW, all or none", metavar="SPEC")
    add(method, "--join", "the text's embedding joins by position, or by its mean", choices=("positions", "mean"))
    add(method, "--text", "the text beside the visual tokens")
    add(method, "--states", "N, the noisy states per image", **count)
    add(method, "--image-size", "side of the diffusion model's images in pixels", "its own", **count)
    add(method, "--freeze-projection", "train the vision tower alone, not the linear layer", action="store_true")
    training = parser.add_argument_group("training")
    add(training, "--steps", "optimizer steps", **count)
    add(training, "--batch-size", "images per step, over all processes", **count)
    add(training, "--micro-batch", "images per process at once; the rest is accumulated", **count)
    add(training, "--lr", "peak learning rate of SGD", **number)
    add(training, "--momentum", "of SGD", **number)
    add(training, "--warmup", "share of the steps in which the rate rises; a cosine to 0 follows", **number)
    add(training, "--max-grad-norm", "gradients are clipped to this norm; 0: they are not", **number)
    add(training, "--seed", "of every draw", type=at_least(0, int))
    machine = parser.add_argument_group("the machine")
    add(machine, "--precision", "of the computation", "bf16 on CUDA, else fp32", choices=("bf16", "fp32"))
    add(machine, "--workers", "processes that read images, for each that trains", "up to 8", type=at_least(0, int))
    add(machine, "--save-every", "steps between two saves", **count)
    add(machine, "--random-weights", "no download: the same architectures, untrained", "off", action="store_true")
    given = vars(parser.parse_args(argv))

    name = given.setdefault("recipe", "miniature")
    if name not in RECIPES:
        raise SystemExit(f"--recipe {name}: no such recipe; there are {', '.join(RECIPES)}")
    row = {setting: getattr(RECIPES[name], setting) for setting in SETTINGS}
    rest = dict(out=f"runs/{name}", overwrite=False, precision=None, workers=None, random_weights=False)
    args = argparse.Namespace(**row | rest | given)
    check_args(args)
    return args


def check_args(args: argparse.Namespace) -> None:
    """SystemExit for what the arguments alone show to be wrong, before anything is imported or loaded."""
    if args.data is None:
        raise SystemExit("--data is needed: a folder of images, shards ('cc3m/*.tar'), or `synthetic`")
    for path in args.data:
        if path != "synthetic" and not any(c in path for c in "*?[") and not os.path.exists(path):
            raise SystemExit(f"--data {path}: no such file or folder")
    locate_clip(args.clip)
    check_diffusion(args.diffusion)
    if known := recipe_of(args.clip):
        recap = parse_recap(args.recap, RECIPES[known].patches)
        if not os.path.isdir(args.diffusion):
            check_join(args.join, 1 + recap.count, 77)  # every Stable Diffusion 1.x and 2.x reads 77 positions of text
    at_once = args.micro_batch * PROCESSES
    if args.batch_size % at_once:
        raise SystemExit(
            f"--batch-size {args.batch_size}: must be a multiple of {at_once}, "
            f"which is --micro-batch {args.micro_batch} × {PROCESSES} processes"
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
            if low <= (number := kind(text)) < math.inf:
                return number
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number of at least {low}")

    return parse


if __name__ == "__main__":  # before the imports below, which take seconds: a mistyped argument is answered at once
    with one_sentence("train.py"):
        args = parse_args()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from tqdm import tqdm  # noqa: E402

import evaluate_mmvp  # noqa: E402
from condition import VisualCondition, count_patches, draw_patches  # noqa: E402
from data import TrainingImages, make_loader, micro_batches, open_images  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# The method


def draw(rng: np.random.Generator, shape: tuple[int, ...], timesteps: int, patches: int, recap: Recap) -> dict:
    """All that Algorithm 1 draws for one image, for its N states at once; `shape` is that of the noise, (N, 4, h, w).

    Returns a dict: `timesteps` (N,), uniform over 0 … T − 1; `noise` (N, 4, h, w), standard normal, fp32; and, where
    the recap is not the same for all states, its `patches` (N, K).
    """
    drawn = dict(timesteps=rng.integers(0, timesteps, shape[0]), noise=rng.standard_normal(shape, dtype=np.float32))
    if recap.kind in ("random", "none"):
        drawn["patches"] = draw_patches(patches, recap.count, shape[0], rng)
    return drawn


def denoising_loss(
    diffusion: Diffusion, latents: torch.Tensor, condition: torch.Tensor, timesteps: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Algorithm 1, lines 4 and 5 (Eq. 3): how badly φ denoises images with c as condition, all states in one call.

    Args:
        latents: z, (B, 4, h, w) fp32.
        condition: c, (B, N, L, W), or (B, 1, L, W) for all states.
        timesteps: t, (B, N) int64 in 0 … T − 1.
        noise: ε, (B, N, 4, h, w) fp32.

    Returns:
        The mean squared error over images, states and latent elements, a scalar in fp32.
    """
    alphas_cumprod = diffusion.alphas_cumprod[timesteps][..., None, None, None]  # ᾱ_t, (B, N, 1, 1, 1)
    signal, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    latents = latents[:, None]  # (B, 1, 4, h, w)
    noisy_latents = signal * latents + sigma * noise  # Alg. 1, line 4: z_t, (B, N, 4, h, w)
    condition = condition.expand(-1, noise.shape[1], -1, -1)  # (B, N, L, W)
    dtype = diffusion.unet.dtype
    noise_pred = diffusion.unet(
        noisy_latents.flatten(0, 1).to(dtype), timesteps.flatten(), condition.flatten(0, 1).to(dtype)
    ).sample.float()  # ε_φ(z_t, t, c), (B · N, 4, h, w)
    target = noise if diffusion.prediction_type == "epsilon" else signal * noise - sigma * latents
    return F.mse_loss(noise_pred, target.flatten(0, 1))  # Alg. 1, line 5


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
        torch.cuda.set_device(device)
    else:
        device = torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=1), **alone)
    return device


@contextlib.contextmanager
def first_process_first():
    """The first process goes through the block before the others, so that what it writes is there for them."""
    if dist.get_rank() > 0:
        dist.barrier()
    yield
    if dist.get_rank() == 0:
        dist.barrier()


def to_device(batch: dict, device: torch.device) -> dict:
    """A batch's tensors on `device`, its images as pixels in [0, 1]."""
    batch = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
    return dict(batch, images=batch["images"].float() / 255)


def sync_if(last: bool, model: DistributedDataParallel):
    """Gradients are averaged over the processes once a step: in the last micro-batch, forward and backward."""
    return contextlib.nullcontext() if last else model.no_sync()


class Log:
    """What the run says: the bar and metrics.jsonl, written by the first process, and the reasons to stop it."""

    def __init__(self, args: argparse.Namespace, first_step: int, unreadable: int, device: torch.device):
        self.args, self.first, self.unreadable, self.names = args, dist.get_rank() == 0, unreadable, []
        self.loss, self.smooth, self.unread = torch.zeros((), device=device), None, 0
        self.path = Path(args.out) / "metrics.jsonl"
        if self.first and self.path.exists():  # a run that goes on: the lines after its checkpoint come again
            lines = [line for line in self.path.read_text().splitlines(True) if line.endswith("}\n")]
            self.path.write_text("".join(line for line in lines if json.loads(line)["step"] < first_step))
        self.bar = tqdm(total=args.steps, initial=first_step, unit="step", dynamic_ncols=True, disable=not self.first)
        self.time = time.perf_counter()

    def add(self, loss: torch.Tensor, unreadable: list[str]) -> None:
        """A micro-batch's share of the step's loss, and the files that could not be read for it."""
        self.loss += loss.detach()
        self.unread += len(unreadable)
        self.names = (self.names + unreadable)[:3]

    def agree(self, step: int, grad_norm: torch.Tensor) -> tuple[float, float]:
        """The step's loss and gradient norm, the same in every process: the one host–device sync of a step.

        Raises, before the step is taken:
            SystemExit: one of the two is not finite, or more than one image in ten cannot be read.
        """
        sums = torch.stack([self.loss / dist.get_world_size(), self.loss.new_tensor(self.unread)])
        dist.all_reduce(sums)
        loss, unread, norm = torch.cat([sums, grad_norm[None]]).tolist()
        self.loss.zero_()
        self.unread, self.unreadable = 0, self.unreadable + int(unread)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise SystemExit(
                f"step {step}: the loss is {loss}, its gradient's norm {norm}; this step was not taken, and what was "
                f"saved before is in {self.args.out}"
            )
        reads = (step + 1) * self.args.batch_size + self.unreadable
        if reads >= 100 and self.unreadable * 10 > reads:
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, self.names)
            names = "; ".join(sum(everyone, [])[:3])
            raise SystemExit(f"step {step}: {self.unreadable} of {reads} images could not be read: {names}")
        return loss, norm

    def write(self, step: int, loss: float, grad_norm: float, lr: float) -> None:
        """A line in metrics.jsonl, and the bar."""
        now = time.perf_counter()
        speed, self.time = self.args.batch_size / (now - self.time), now
        self.smooth = loss if self.smooth is None else 0.95 * self.smooth + 0.05 * loss
        if torch.cuda.is_available():
            memory = torch.cuda.max_memory_allocated()
        else:  # the most this process has held, which Linux counts in KiB and macOS in bytes
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if self.first:
            line = dict(step=step, loss=loss, grad_norm=grad_norm, lr=lr, images_per_second=round(speed, 3))
            line |= dict(peak_memory_gib=round(memory / 2**30, 3), unreadable=self.unreadable)
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        self.bar.set_postfix_str(f"loss {self.smooth:.4f}, {speed:.3g} images/s, lr {lr:.1e}", refresh=False)
        self.bar.update()


def check_out(args: argparse.Namespace) -> None:
    """SystemExit if OUT holds another run than this one, unless it is to be overwritten."""
    path = Path(args.out) / "args.json"
    if path.exists() and not args.overwrite:
        found, here = json.loads(path.read_text()), json.loads(json.dumps(vars(args)))
        what = [f"{k} {found.get(k)} there, {here[k]} here" for k in here if k not in FREE and found.get(k) != here[k]]
        if what:
            raise SystemExit(f"{args.out}: holds another run ({'; '.join(what)}); name another --out or --overwrite")


def open_out(args: argparse.Namespace) -> None:
    """Makes OUT with its args.json: every setting of the run and the versions that it runs with."""
    out = Path(args.out)
    if args.overwrite:
        for part in ("checkpoint", "checkpoint.old", "clip", "mmvp"):
            shutil.rmtree(out / part, ignore_errors=True)
        (out / "metrics.jsonl").unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    packages = ("torch", "open_clip_torch", "diffusers", "transformers")
    versions = {name: importlib.metadata.version(name) for name in packages}
    (out / "args.json").write_text(json.dumps(vars(args) | dict(versions=versions), indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Algorithm 1


def train(args: argparse.Namespace) -> None:
    """One run, from the models and the images to OUT/clip and, with --mmvp, its scores before and after."""
    device = start_processes()
    first, out = dist.get_rank() == 0, Path(args.out)
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    with first_process_first():
        check_out(args)
        files = open_images(args.data, progress=first)
        pairs = evaluate_mmvp.read_mmvp(args.mmvp) if args.mmvp else None

    # θ and φ
    clip = load_clip(args.clip, args.random_weights)
    patches = count_patches(clip.model.visual)
    recap = parse_recap(args.recap, patches)
    diffusion = load_diffusion(args.diffusion, args.text, dtype, device, args.random_weights)
    check_join(args.join, 1 + recap.count, diffusion.text.shape[1])
    size = args.image_size or diffusion.image_size
    latent_shape = diffusion.latent_shape(size)
    clip.model.to(device)
    module = VisualCondition(clip, diffusion, recap, args.join, args.seed).to(device)
    module.projection.requires_grad_(not args.freeze_projection)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=args.lr, momentum=args.momentum)
    if first and pairs:
        before = evaluate_mmvp.similarities(clip, pairs, device)
        print(evaluate_mmvp.report([f"{args.clip}, before"], [before], pairs, [recipe_of(args.clip)]), flush=True)
    with first_process_first():
        if first:
            open_out(args)
        first_step, unreadable = load_checkpoint(out / "checkpoint", module, optimizer)
    model = DistributedDataParallel(module, gradient_as_bucket_view=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    # The images, with all that is drawn for each
    draws = functools.partial(
        draw, shape=(args.states, *latent_shape), timesteps=len(diffusion.alphas_cumprod), patches=patches, recap=recap
    )
    images = TrainingImages(files, size, args.batch_size, args.seed, draws)
    keys = micro_batches(first_step, args.steps, args.batch_size, args.micro_batch, dist.get_rank(), PROCESSES)
    share = min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    workers = share if args.workers is None else args.workers
    batches = iter(make_loader(images, keys, workers, pin_memory=device.type == "cuda"))
    accumulation = args.batch_size // (args.micro_batch * PROCESSES)
    if first:
        print(
            f"{args.recipe}: {args.clip}, taught by {args.diffusion}\n"
            f"training {sum(p.numel() for p in parameters):,} parameters in {args.precision} on {PROCESSES} × {device.type}\n"
            f"condition: recap {args.recap}, {1 + recap.count} tokens, joined by {args.join}; N = {args.states}\n"
            f"images: {len(images):,} at {size} × {size} pixels\n"
            f"steps: {first_step} to {args.steps}, each of {args.batch_size} images = "
            f"{PROCESSES} processes × {args.micro_batch} × {accumulation} accumulated\n"
            f"writing to {out}",
            flush=True,
        )

    log = Log(args, first_step, unreadable, device)
    for step in range(first_step, args.steps):
        for micro in range(accumulation):
            batch = to_device(next(batches), device)  # Alg. 1, line 1: x, and t, ε and the patches of its N states
            with sync_if(micro == accumulation - 1, model):
                with autocast:
                    condition = model(clip.view(batch["images"]), diffusion.text, batch.get("patches"))  # lines 2, 3
                latents = diffusion.encode(batch["images"])
                loss = denoising_loss(diffusion, latents, condition, batch["timesteps"], batch["noise"])  # lines 4, 5
                (loss / accumulation).backward()
            log.add(loss / accumulation, batch["unreadable"])
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm or math.inf)
        loss, grad_norm = log.agree(step, grad_norm)
        lr = optimizer.param_groups[0]["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        optimizer.step()  # Alg. 1, line 6: θ moves, φ never does
        optimizer.zero_grad()
        log.write(step, loss, grad_norm, lr)
        if first and ((step + 1) % args.save_every == 0 or step + 1 == args.steps):
            save_checkpoint(out / "checkpoint", module, optimizer, step + 1, log.unreadable)
            save_clip(clip, out / "clip")
    log.bar.close()

    if first:
        print(f"{out}/clip: open_clip.create_model_and_transforms('local-dir:{out}/clip')")
        if clip.no_tokenizer:
            print(f"saved without its tokenizer: {clip.no_tokenizer}")
        if pairs:
            names = [f"{args.clip}, before", f"{out}/clip"]
            cosines = [before, evaluate_mmvp.similarities(clip, pairs, device)]
            print("\n" + evaluate_mmvp.report(names, cosines, pairs, [recipe_of(args.clip), None]))
            evaluate_mmvp.save_scores(out / "mmvp", names, cosines, pairs)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with one_sentence("train.py"):
        train(args)
