"""train.py's command line: a recipe and its overrides, checked before anything is loaded."""

from __future__ import annotations

import argparse
import os

from harness.errors import UserError, usage_error, warn
from harness.files import check_writable
from harness.recipes import GROUPS, OPTIONS, RECIPES, RUN, Recipe, as_typed, check_diffusion, flag_of, locate_clip

MAY_CHANGE_ON_RESUME = {option.name for option in OPTIONS if option.metadata["may_change"]}
EXAMPLES = """
examples:
  python train.py                                the miniature, in minutes on a CPU
  torchrun --nproc_per_node 8 train.py --recipe openai-vit-l-14-224 --data 'cc3m/*.tar' --mmvp MMVP/MMVP_VLM
  python train.py --recipe openai-vit-l-14-224 --data photos --clip ViT-B-16:openai --recap random:30% --join mean

Run the same command again to resume. Recipes, and their CLIPs:

"""


def make_parser(recipe: str) -> argparse.ArgumentParser:
    """All options, with the recipe's settings as defaults."""
    row = RECIPES[recipe]
    parser = argparse.ArgumentParser(
        usage="train.py [--recipe NAME] [--data PATH ...] [--mmvp PATH] [--out DIR] [options]",
        description="Post-train a CLIP with the feedback of a frozen diffusion model, on images only.",
        epilog=EXAMPLES + "\n".join(f"  {name:29} {row.clip}" for name, row in RECIPES.items()),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32),
        allow_abbrev=False,
    )
    parser.error = usage_error
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    help = f"a set of settings, listed below; other options override them ({recipe})"
    groups[RUN].add_argument("--recipe", default=recipe, metavar="NAME", help=help)
    for option in OPTIONS:
        default, help = getattr(row, option.name), option.metadata["help"]
        if default not in (None, "") and default is not False:
            help += f" ({as_typed(default)})".replace("%", "%%")
        flag, arguments = flag_of(option.name), option.metadata["arguments"]
        groups[option.metadata["group"]].add_argument(flag, default=default, help=help, **arguments)
    return parser


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run, from `argv` or the command line: a value for each option of `Recipe`, and the recipe.

    Raises:
        UserError: a mistake that shows in the arguments alone.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.error = usage_error
    first.add_argument("--recipe", default="miniature")
    recipe = first.parse_known_args(argv)[0].recipe
    if recipe not in RECIPES:
        raise UserError(f"--recipe {recipe}: no such recipe; expected one of {', '.join(RECIPES)}")
    args = make_parser(recipe).parse_args(argv)
    if args.mmvp == "none":
        args.mmvp = None
    processes = count_processes()
    check_args(args, processes)
    if args.random_weights and args.projection == "fitted":
        warn("--random-weights: uses --projection random, because the text encoders are untrained")
        args.projection = "random"
    share = args.batch_size // processes
    most = min(share, args.micro_batch)
    args.micro_batch = next(n for n in range(most, 0, -1) if share % n == 0)
    if args.micro_batch < most:
        warn(f"--micro-batch {most}: reduced to {args.micro_batch}: it must divide the {share} images per process")
    if args.workers is None:
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        args.workers = min(8, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    args.out = args.out or f"runs/{recipe}"
    check_writable(args.out, "--out")
    return args


def count_processes() -> int:
    """The number of processes that train together.

    Raises:
        UserError: torchrun did not start them.
    """
    if "RANK" in os.environ:
        missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise UserError(f"RANK is set, but not {', '.join(missing)}: start with torchrun, or unset RANK")
        return int(os.environ["WORLD_SIZE"])
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")  # set by srun, in contrast to an allocation's SLURM_NTASKS
    if tasks != "1":
        raise UserError(f"srun starts {tasks} tasks, and each would train alone: use one task per node, with torchrun")
    return 1


def check_args(args: argparse.Namespace, processes: int) -> None:
    """UserError for a mistake that shows in the arguments alone."""
    if not args.text.isprintable():  # bytes that are not UTF-8 are not printable either
        raise UserError(f"--text {args.text!r}: must be one line of UTF-8 text")
    if args.data is None:
        raise UserError("--data is required: a folder of images, shards ('cc3m/*.tar'), or `synthetic`")
    for path in args.data:
        if path != "synthetic" and not any(c in path for c in "*?[{") and not os.path.exists(path):
            raise UserError(f"--data {path}: no such file or folder")
    if args.data == ["synthetic"] and args.projection == "fitted" and not args.random_weights:
        raise UserError("--data synthetic: the linear layer cannot be fitted to noise; use --projection random")
    if args.projection_steps > args.steps:
        raise UserError(f"--projection-steps {args.projection_steps}: must not exceed --steps ({args.steps})")
    locate_clip(args.clip, args.random_weights)
    check_diffusion(args.diffusion)
    if args.random_weights and not os.path.isdir(args.diffusion) and args.diffusion != Recipe.diffusion:
        raise UserError(f"--random-weights: --diffusion must be a folder or {Recipe.diffusion}")
    if args.batch_size % processes:
        raise UserError(f"--batch-size {args.batch_size}: must be a multiple of the number of processes ({processes})")


def less_memory(args: argparse.Namespace) -> str:
    """Advice for a run that does not fit into memory."""
    smaller = f"try --micro-batch {args.micro_batch // 2} and" if args.micro_batch > 1 else "try"
    return f"{smaller} --grad-checkpointing, then fewer --states or a smaller --image-size"
