"""train.py's command line: the recipe's row and what the command line overrides, checked before anything is loaded."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import asdict

from harness.errors import UserError, fail
from harness.files import check_writable
from harness.recipes import RECIPES, Recipe, check_diffusion, check_join, locate_clip, parse_recap
from harness.recipes import parse_timesteps, recipe_of

PROCESSES = int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1  # torchrun says how many there are
EXAMPLES = """
examples:
  torchrun train.py                              the miniature: all of it, in four minutes on a CPU
  torchrun --nproc_per_node 8 train.py --recipe openai-vit-l-14-224 --data 'cc3m/*.tar' --mmvp MMVP/MMVP_VLM
  python train.py --recipe openai-vit-l-14-224 --data photos --clip ViT-B-16:openai --recap random:30% --join mean

The same command again goes on where a run has stopped. Recipes, and the CLIP of each:

"""
# what may change when a run goes on, and is not part of the folder's name
FREE = {"micro_batch", "compile", "grad_checkpointing", "save_every", "mmvp", "out", "workers"}
LIMITS = {  # the least and the most that an option can be
    "states": (1, 1000), "image_size": (1, 4096), "steps": (1, 10**9), "batch_size": (1, 10**6),
    "micro_batch": (1, 10**6), "save_every": (1, 10**9), "projection_steps": (0, 10**9), "projection_lr": (0, 1000),
    "lr": (0, 1000), "momentum": (0, 1), "warmup": (0, 1), "max_grad_norm": (0, 10**6), "pull": (0, 10**6),
    "seed": (0, 2**63 - 1), "workers": (0, 1000),
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run.

    Raises:
        UserError: what the arguments alone show to be wrong.
    """
    start = argparse.ArgumentParser(add_help=False, allow_abbrev=False)  # read first: the recipe gives the defaults
    start.error = fail
    start.add_argument("--recipe", help="the row of the table to start from", default="miniature", metavar="NAME")
    name = start.parse_known_args(argv)[0].recipe
    if name not in RECIPES:
        raise UserError(f"--recipe {name}: no such recipe; there are {', '.join(RECIPES)}")
    defaults = dict(recipe=name) | asdict(RECIPES[name])
    defaults = {key: value for key, value in defaults.items() if key not in ("patches", "published")}

    parser = argparse.ArgumentParser(
        usage="train.py [--recipe NAME] [--data PATH ...] [--mmvp PATH] [--out DIR] [options]",
        description="Post-train a CLIP with the feedback of a frozen diffusion model, on images only.",
        epilog=EXAMPLES + "\n".join(f"  {name:23} {row.clip}" for name, row in RECIPES.items()),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32),
        parents=[start],
        allow_abbrev=False,
    )
    parser.error = fail

    def group(title: str):
        add_argument = parser.add_argument_group(title).add_argument

        def add(flag: str, help: str, **more) -> None:
            default = defaults.get(flag[2:].replace("-", "_"))
            if default not in (None, "") and default is not False:
                help += " (default: " + (" ".join(default) if flag == "--data" else f"{default}") + ")"
            add_argument(flag, help=help.replace("%", "%%"), **more)

        return add

    add = group("the run")
    add("--data", "a folder of images, shards or globs of them, or `synthetic`", nargs="+", metavar="PATH")
    add("--mmvp", "score before and after on MMVP-VLM: a folder, or the hub's MMVP/MMVP_VLM", metavar="PATH")
    add("--out", f"where everything is written; if not given, runs/{name} and what differs from it", metavar="DIR")
    add = group("the method")
    add("--clip", "a recipe, ARCH:TAG of open_clip, hf-hub:OWNER/NAME or a folder; CLIP@WEIGHTS too", metavar="NAME")
    add("--diffusion", "Stable Diffusion 1.x or 2.x, diffusers' layout: hub name or folder", metavar="NAME")
    add("--recap", "random:COUNT, random:SHARE%, pool:WINDOW, all or none", metavar="SPEC")
    add("--join", "how the text's embedding is added: by position, or its mean", choices=("positions", "mean"))
    add("--text", "the text beside the visual tokens; if not given, empty")
    add("--states", "N, the noisy states per image", type=int, metavar="N")
    add("--image-size", "side of the diffusion model's images in pixels; if not given, its own", type=int, metavar="N")
    add("--timesteps", "t is drawn from LOW to HIGH - 1", metavar="LOW:HIGH")
    add("--projection", "where the linear layer starts: at random, or fitted", choices=("random", "fitted"))
    add("--projection-steps", "the first steps train the linear layer alone, CLIP frozen", type=int, metavar="N")
    add("--freeze-projection", "after --projection-steps, train the tower alone", action=argparse.BooleanOptionalAction)
    add("--pull", "weight of the class token's mean square distance to the untouched CLIP's", type=float, metavar="X")
    add = group("training")
    add("--steps", "optimizer steps", type=int, metavar="N")
    add("--batch-size", "images per step, over all processes", type=int, metavar="N")
    add("--micro-batch", "at most so many images per process at once; the rest is accumulated", type=int, metavar="N")
    add("--lr", "peak learning rate", type=float, metavar="X")
    add("--projection-lr", "the same, of the first --projection-steps", type=float, metavar="X")
    add("--optimizer", "the paper's SGD, or AdamW without weight decay", choices=("sgd", "adamw"))
    add("--momentum", "of SGD", type=float, metavar="X")
    add("--warmup", "share of the steps in which the rate rises; a cosine to 0 follows", type=float, metavar="X")
    add("--max-grad-norm", "gradients are clipped to this norm; 0: they are not", type=float, metavar="X")
    add("--seed", "of every random draw", type=int, metavar="N")
    add = group("the machine")
    add("--precision", "of the computation; if not given, bf16 on CUDA, else fp32", choices=("bf16", "fp32"))
    add("--workers", "processes that read images; if not given, up to 8", type=int, metavar="N")
    add("--save-every", "steps between two saves", type=int, metavar="N")
    add("--compile", "compile CLIP, the VAE and the U-Net: minutes at the start", action="store_true")
    add("--grad-checkpointing", "compute activations again in the backward pass: less memory", action="store_true")
    add("--random-weights", "no download: untrained architectures, a random text embedding", action="store_true")
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    check_args(args)
    if args.random_weights:
        args.projection = "random"  # a text encoder that has not learnt has nothing to be fitted to
    args.micro_batch = largest_divisor(args.batch_size // PROCESSES, args.micro_batch)
    if args.workers is None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        args.workers = min(8, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if args.out is None:
        args.out = f"runs/{name}" + "".join(changed_settings(args, defaults))
    check_writable(args.out, "--out")
    return args


def changed_settings(args: argparse.Namespace, defaults: dict) -> list[str]:
    """What a run changes in its recipe, as parts of a folder's name: `-lr-0.02`."""
    parts = []
    for key, value in vars(args).items():
        if key in FREE or value is None or value == defaults.get(key, False):
            continue
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            part = f"-{flag}" if value else f"-no-{flag}"
        else:
            part = f"-{flag}-{value:g}" if isinstance(value, float) else f"-{flag}-{value}"
        parts.append(re.sub(r"[^\w.%-]+", "_", part)[:60])
    return parts


def check_args(args: argparse.Namespace) -> None:
    """UserError for what the arguments alone show to be wrong."""
    for name, (low, high) in LIMITS.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be from {low} to {high}")
    if not args.text.isprintable():  # as bytes that are no UTF-8
        raise UserError(f"--text {args.text!r}: is not a line of text in UTF-8")
    if args.data is None:
        raise UserError("--data is needed: a folder of images, shards ('cc3m/*.tar'), or `synthetic`")
    for path in args.data:
        if path != "synthetic" and not any(c in path for c in "*?[") and not os.path.exists(path):
            raise UserError(f"--data {path}: no such file or folder")
    if args.projection_steps > args.steps:
        raise UserError(f"--projection-steps {args.projection_steps}: are a part of the {args.steps} --steps")
    parse_timesteps(args.timesteps)
    locate_clip(args.clip, args.random_weights)
    check_diffusion(args.diffusion)
    if args.random_weights and not os.path.isdir(args.diffusion) and args.diffusion != Recipe.diffusion:
        raise UserError(f"--random-weights: builds {Recipe.diffusion} or the architecture of a folder")
    known = recipe_of(args.clip)
    recap = parse_recap(args.recap, RECIPES[known].patches if known else 10**9)  # how many there are shows when loaded
    if not os.path.isdir(args.diffusion):  # every Stable Diffusion 1.x and 2.x reads 77 positions of text
        if known:
            check_join(args.join, recap, 77)
        if args.image_size and args.image_size % 8:  # and has latents of an eighth
            raise UserError(f"--image-size {args.image_size}: must be a multiple of 8")
    if args.batch_size % PROCESSES:
        raise UserError(f"--batch-size {args.batch_size}: cannot be shared by {PROCESSES} processes; use a multiple")


def largest_divisor(number: int, most: int) -> int:
    """The largest whole number up to `most` that divides `number`."""
    return next(d for d in range(min(number, most), 0, -1) if number % d == 0)


def less_memory(args: argparse.Namespace) -> str:
    """What to try where a run does not fit into memory."""
    smaller = f"try --micro-batch {args.micro_batch // 2} and" if args.micro_batch > 1 else "try"
    return f"{smaller} --grad-checkpointing, then fewer --states or a smaller --image-size"
