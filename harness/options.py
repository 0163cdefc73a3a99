"""train.py's command line: the recipe's row and what the command line overrides, checked before anything is loaded."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import asdict
from functools import partial

from harness.errors import UserError, usage_error, warn
from harness.files import check_writable
from harness.recipes import RECIPES, Recipe, check_diffusion, locate_clip, parse_timesteps

# not compared when a run goes on, and not part of the folder's name
MAY_CHANGE_ON_RESUME = {
    "micro_batch", "compile", "grad_checkpointing", "save_every", "keep_every", "mmvp", "out", "workers",
    "changed_code",
}  # fmt: skip
EXAMPLES = """
examples:
  torchrun train.py                              the miniature: all of it, in six to eight minutes on a CPU
  torchrun --nproc_per_node 8 train.py --recipe openai-vit-l-14-224 --data 'cc3m/*.tar' --mmvp MMVP/MMVP_VLM
  python train.py --recipe openai-vit-l-14-224 --data photos --clip ViT-B-16:openai --recap random:30% --join mean

The same command again goes on where a run has stopped. Recipes, and the CLIP of each:

"""


def number(kind: type, low: float, high: float, text: str):
    """An argument's value, a whole number or not (`kind` int or float), from `low` to `high`."""
    try:
        value = kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"{text}: must be from {low} to {high}")
    return value


def make_parser(recipe: str) -> argparse.ArgumentParser:
    """All options; the defaults are the recipe's."""
    row = RECIPES[recipe]
    count, natural = partial(number, int, 1, 10**9), partial(number, int, 0, 10**9)
    factor, share = partial(number, float, 0, 10**6), partial(number, float, 0, 1)
    pixels, states = partial(number, int, 1, 4096), partial(number, int, 1, 1000)
    parser = argparse.ArgumentParser(
        usage="train.py [--recipe NAME] [--data PATH ...] [--mmvp PATH] [--out DIR] [options]",
        description="Post-train a CLIP with the feedback of a frozen diffusion model, on images only.",
        epilog=EXAMPLES + "\n".join(f"  {name:23} {row.clip}" for name, row in RECIPES.items()),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32),
        allow_abbrev=False,
    )
    parser.error = usage_error
    add = parser.add_argument_group("the run").add_argument
    add("--recipe", default=recipe, metavar="NAME", help="the row of the table to start from (%(default)s)")
    data = " ".join(row.data or ["no default"])
    add("--data", nargs="+", metavar="PATH", help=f"a folder of images, shards, globs of them, or `synthetic` ({data})")
    add("--mmvp", metavar="PATH", help="scores before and after: MMVP-VLM's hub name, a folder, or none (%(default)s)")
    add("--out", metavar="DIR", help=f"where all is written; if not given, runs/{recipe} and what differs from it")
    add = parser.add_argument_group("the method").add_argument
    add("--clip", metavar="NAME", help="a recipe, ARCH:TAG, hf-hub:OWNER/NAME, a folder, CLIP@WEIGHTS (%(default)s)")
    add("--diffusion", metavar="NAME", help="Stable Diffusion 1.x or 2.x, a hub name or a folder (%(default)s)")
    add("--recap", metavar="SPEC", help="random:COUNT, random:SHARE%%, pool:WINDOW, all or none (%(default)s)")
    add("--join", choices=("positions", "mean"), help="the text is added by position, or its mean (%(default)s)")
    add("--text", help="the text beside the visual tokens; if not given, empty")
    add("--states", type=states, metavar="N", help="N, the noisy states per image (%(default)s)")
    add("--image-size", type=pixels, metavar="N", help="side of φ's images in pixels; if not given, its own")
    add = parser.add_argument_group("beyond the paper (beyond.py)").add_argument
    add("--timesteps", metavar="LOW:HIGH", help="t is drawn from LOW to HIGH - 1 (%(default)s)")
    add("--projection", choices=("random", "fitted"), help="the linear layer's start; fitted: to texts (%(default)s)")
    add("--projection-steps", type=natural, metavar="N", help="the first N steps train that layer alone (%(default)s)")
    add("--projection-lr", type=factor, metavar="X", help="their peak learning rate (%(default)s)")
    add("--freeze-projection", action=argparse.BooleanOptionalAction, help="after them it stays as it is (%(default)s)")
    add("--optimizer", choices=("sgd", "adamw"), help="the paper's SGD, or AdamW (%(default)s)")
    add("--ldifs", type=factor, metavar="X", help="how strongly CLIP is held near to the untouched one (%(default)s)")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=count, metavar="N", help="optimizer steps (%(default)s)")
    add("--batch-size", type=count, metavar="N", help="images per step, over all processes (%(default)s)")
    add("--micro-batch", type=count, metavar="N", help="images at once per process; gradients add up (%(default)s)")
    add("--lr", type=factor, metavar="X", help="peak learning rate (%(default)s)")
    add("--momentum", type=share, metavar="X", help="of SGD (%(default)s)")
    add("--warmup", type=share, metavar="X", help="share of steps in which --lr rises; a cosine follows (%(default)s)")
    add("--max-grad-norm", type=factor, metavar="X", help="gradients are clipped to it; 0: they are not (%(default)s)")
    add("--seed", type=partial(number, int, 0, 2**63 - 1), metavar="N", help="of every random draw (%(default)s)")
    add = parser.add_argument_group("the machine").add_argument
    add("--precision", choices=("bf16", "fp32"), help="of the computation; if not given, bf16 on CUDA, else fp32")
    add("--workers", type=partial(number, int, 0, 1000), metavar="N", help="batches read ahead; if not given, up to 8")
    add("--save-every", type=count, metavar="N", help="steps between two saves (%(default)s)")
    add("--keep-every", type=natural, metavar="N", help="steps between CLIPs kept as OUT/clip-000100 … (%(default)s)")
    add("--compile", action="store_true", help="compile CLIP, the VAE and the U-Net: minutes at the start")
    add("--grad-checkpointing", action="store_true", help="compute activations again backward: less memory, slower")
    add("--random-weights", action="store_true", help="no download: untrained architectures, a random text embedding")
    add("--changed-code", action="store_true", help="go on in a run although the code has changed since")
    parser.set_defaults(**{key: value for key, value in asdict(row).items() if key not in ("published", "released")})
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run.

    Raises:
        UserError: what the arguments alone show to be wrong.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.error = usage_error
    first.add_argument("--recipe", default="miniature")
    recipe = first.parse_known_args(argv)[0].recipe
    if recipe not in RECIPES:
        raise UserError(f"--recipe {recipe}: no such recipe; there are {', '.join(RECIPES)}")
    parser = make_parser(recipe)
    args = parser.parse_args(argv)
    if args.mmvp == "none":
        args.mmvp = None
    processes = count_processes()
    check_args(args, processes)
    if args.random_weights and args.projection == "fitted":
        warn("--random-weights: the linear layer starts at random too, as no text encoder has learnt anything")
        args.projection = "random"
    share = args.batch_size // processes
    micro_batch = largest_divisor(share, args.micro_batch)
    if micro_batch < min(share, args.micro_batch):
        warn(
            f"--micro-batch {args.micro_batch}: does not divide the {share} images of a process, so it is {micro_batch}"
        )
    args.micro_batch = micro_batch
    if args.workers is None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        args.workers = min(8, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if args.out is None:
        args.out = f"runs/{recipe}" + "".join(changed_settings(args, parser))
    check_writable(args.out, "--out")
    return args


def count_processes() -> int:
    """How many processes train together: torchrun says it. UserError: they were started in another way."""
    if "RANK" in os.environ:
        missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UserError(f"RANK is set, but {', '.join(missing)} not: start with torchrun, or unset RANK")
        return int(os.environ["WORLD_SIZE"])
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", "1"))
    if tasks != "1":
        raise UserError(f"SLURM runs {tasks} tasks, and each would train alone into one folder: start torchrun in one")
    return 1


def changed_settings(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """What a run changes in its recipe, as parts of a folder's name: `-lr-0.02`."""
    parts = []
    for key, value in vars(args).items():
        if key in MAY_CHANGE_ON_RESUME or value is None or value == parser.get_default(key):
            continue
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            part = f"-{flag}" if value else f"-no-{flag}"
        else:
            part = f"-{flag}-{value:g}" if isinstance(value, float) else f"-{flag}-{value}"
        parts.append(re.sub(r"[^\w.%-]+", "_", part)[:60])
    return parts


def check_args(args: argparse.Namespace, processes: int) -> None:
    """UserError for what the arguments alone show to be wrong."""
    if not args.text.isprintable():  # bytes that are no UTF-8 come as such characters
        raise UserError(f"--text {args.text!r}: is not a line of text in UTF-8")
    if args.data is None:
        raise UserError("--data is needed: a folder of images, shards ('cc3m/*.tar'), or `synthetic`")
    for path in args.data:
        if path != "synthetic" and not any(c in path for c in "*?[{") and not os.path.exists(path):
            raise UserError(f"--data {path}: no such file or folder")
    if args.data == ["synthetic"] and args.projection == "fitted" and not args.random_weights:
        raise UserError("--data synthetic: the linear layer would be fitted to noise; use --projection random")
    if args.projection_steps > args.steps:
        raise UserError(f"--projection-steps {args.projection_steps}: are a part of the {args.steps} --steps")
    args.timesteps = parse_timesteps(args.timesteps)
    locate_clip(args.clip, args.random_weights)
    check_diffusion(args.diffusion)
    if args.random_weights and not os.path.isdir(args.diffusion) and args.diffusion != Recipe.diffusion:
        raise UserError(f"--random-weights: builds {Recipe.diffusion} or the architecture of a folder")
    if not os.path.isdir(args.diffusion) and args.image_size and args.image_size % 8:
        raise UserError(f"--image-size {args.image_size}: must be a multiple of 8")
    if args.batch_size % processes:
        raise UserError(f"--batch-size {args.batch_size}: cannot be shared by {processes} processes; use a multiple")


def largest_divisor(number: int, most: int) -> int:
    """The largest whole number up to `most` that divides `number`."""
    return next(d for d in range(min(number, most), 0, -1) if number % d == 0)


def less_memory(args: argparse.Namespace) -> str:
    """What to try where a run does not fit into memory."""
    smaller = f"try --micro-batch {args.micro_batch // 2} and" if args.micro_batch > 1 else "try"
    return f"{smaller} --grad-checkpointing, then fewer --states or a smaller --image-size"
