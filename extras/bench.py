"""What a training step costs, and what stands around it: time, memory, and work beside the least that is needed.

    python extras/bench.py --recipe openai-vit-l-14-224 --micro-batch 32   # one step, with these settings of train.py
    python extras/bench.py --recipe openai-vit-l-14-224 --as-released   # beside the released code's work, alternately
    python extras/bench.py --all --minutes 10 --json costs.json --readme   # everything, for extras/README.md

The step is train.py's own (see step.py), on one device, with random weights and synthetic images: one micro-batch and
an optimizer step, which a run that accumulates takes less often. `--all` measures the most telling figures first, until
the time is over. On a GPU it takes openai-vit-l-14-224 at the largest micro-batch that fits; without one, this recipe
with one image in bf16, then the miniature; with `--recipe`, that one.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import math
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import open_images
from evaluate_mmvp import embed_images, similarities
from extras.step import ReleasedStep, Step, executed_work, least_work, now, on_meta, release_memory
from harness.errors import UserError, fail, one_sentence
from harness.files import write_whole
from harness.mmvp import read_mmvp
from harness.options import parse_args
from harness.processes import join_processes
from harness.recipes import RECIPES
from harness.run import peak_memory
from model import load_clip

ROOT = Path(__file__).parent.parent
RECIPE = "openai-vit-l-14-224"  # which `--all` is about
ONE_IMAGE = "--recipe openai-vit-l-14-224 --micro-batch 1 --batch-size 1 --precision bf16"  # where there is no GPU
ONE_STEP = "--random-weights --data synthetic --micro-batch 1 --batch-size 1 --steps 1"
WHOLE = 640  # the paper's batch: micro-batches are tried that divide it
MARKERS = "<!-- bench -->", "<!-- /bench -->"  # in a Markdown file, around the tables
GIB = 2**30


class TimeOver(Exception):
    """The minutes do not suffice for this figure."""


class Bench:
    """What the measurements share: train.py's options, the device, and the time they have.

    `times` is how often a figure is taken; all must be over at `deadline`, of `time.monotonic`.
    """

    def __init__(self, options: list[str], device: torch.device, times: int, deadline: float, data: list[str] | None):
        self.options, self.device, self.times, self.deadline, self.data = options, device, times, deadline, data
        self.limit = (deadline - time.monotonic()) / 10  # seconds for one figure
        self.micro_batch, self.took = None, 0.0  # the largest, once it is found; seconds of the last `step`
        self.recipe, self.works, self.peak = self.args().recipe, {}, peak_memory()

    def args(self, more: str = "") -> argparse.Namespace:
        """train.py's settings, with `more` options after the command line's."""
        args = parse_args([*self.options, *more.split(), "--random-weights", "--data", "synthetic"])
        args.precision = args.precision or ("bf16" if self.device.type == "cuda" else "fp32")
        args.micro_batch = self.micro_batch or args.micro_batch
        return args

    def step(self, more: str = "") -> Step:
        """The step with these settings, warmed up; not begun if the last one took longer than there is time left."""
        self.check(self.took)
        start = time.monotonic()
        step = Step(self.args(more), self.device)
        step.warm_up()
        self.took = time.monotonic() - start
        return step

    def check(self, seconds: float) -> None:
        """TimeOver if what takes so long would end after the deadline."""
        if time.monotonic() + seconds > self.deadline:
            raise TimeOver

    def time(self, *calls: Callable, share: float = 1, expected: float = 0) -> list[list[float]]:
        """Seconds of each of `calls`, taken alternately: twice at least, then while a share of the limit lasts.

        A round that would end after the deadline is not begun; `expected` is how long the first will take.
        """
        rounds, start = [], time.monotonic()
        while len(rounds) < self.times:
            here, last = time.monotonic(), sum(rounds[-1]) if rounds else expected
            if here + last > self.deadline or (len(rounds) >= 2 and here - start > share * self.limit):
                break
            borders = [now(self.device)]
            for call in calls:
                call()
                borders.append(now(self.device))
            rounds.append(np.diff(borders).tolist())
        if not rounds:
            raise TimeOver
        return [list(seconds) for seconds in zip(*rounds)]

    def work(self, step: Step) -> float:
        """TFLOP per image that this step executes."""
        args, released = step.args, isinstance(step, ReleasedStep)
        key = (args.clip, args.recap, args.diffusion, args.states, args.image_size, args.grad_checkpointing, released)
        if key not in self.works:
            meta = on_meta(args)
            self.works[key] = executed_work(ReleasedStep(meta) if released else meta).total()
        return self.works[key]

    @functools.cached_property
    def ceiling(self) -> list[float]:
        """TFLOP/s of the device in products of large square matrices, in the step's precision."""
        size, products = (8192, 50) if self.device.type == "cuda" else (2048, 1)
        dtype = torch.bfloat16 if self.args().precision == "bf16" else torch.float32
        a, b = torch.randn(2, size, size, device=self.device).to(dtype)
        a @ b
        (seconds,) = self.time(lambda: [a @ b for _ in range(products)])
        return [2 * size**3 * products / s / 1e12 for s in seconds]

    def row(self, what: str, step: Step, seconds: list[float] | None = None) -> dict:
        """The figures of a warm step, of these times if it was timed before.

        The memory is the GPU's. Without one it is the process's, given for the first step if that raised it.
        """
        if self.device.type == "cuda" and not seconds:
            torch.cuda.reset_peak_memory_stats()
            self.peak = 0
        count, seconds = step.args.micro_batch, seconds or self.time(step, expected=step.seconds)[0]
        peak, work = peak_memory(), self.work(step)
        row = figure(f"{what}, micro-batch {count}", [1000 * s / count for s in seconds], "ms an image")
        row |= dict(images_per_second=1000 / row["value"], gib=peak / GIB if peak > self.peak else None)
        self.peak = math.inf
        speed = work * row["images_per_second"]  # TFLOP/s
        return row | dict(tflop_per_image=work, share_of_ceiling=speed / median(self.ceiling))


def figure(what: str, values: list[float], unit: str) -> dict:
    """One figure: the median of its values, the least, the most, and how many there are."""
    return dict(what=what, value=median(values), low=min(values), high=max(values), times=len(values), unit=unit)


# ---------------------------------------------------------------------------------------------------------------------
# The measurements: each yields its figures as it has them


def ceiling(bench: Bench) -> Iterator[dict]:
    """The device's own ceiling: a product of large matrices."""
    yield figure(f"ceiling: matrix product in {bench.args().precision}", bench.ceiling, "TFLOP/s")


def plain_step(bench: Bench) -> Iterator[dict]:
    """The step, its parts, and its work over the least."""
    step, taken = bench.step(), []
    if bench.device.type == "cuda" and "--micro-batch" not in bench.options:
        yield from largest_micro_batch(bench, step)
    yield bench.row(f"{bench.recipe}, {step.args.precision}", step)
    if not step.args.compile:  # a compiled module takes no marks
        bench.time(lambda: taken.append(step.parts()), share=0.5, expected=step.seconds)
    for part in taken[0] if taken else ():
        ms = [1000 * seconds[part] / step.args.micro_batch for seconds in taken]
        yield figure(f"{bench.recipe}, a part: {part}", ms, "ms an image")
    over = bench.work(step) / least_work(on_meta(step.args)).total()
    yield figure(f"{bench.recipe}: work executed over the least, counted", [over], "times")


def largest_micro_batch(bench: Bench, step: Step) -> Iterator[dict]:
    """The largest divisor of the paper's batch that fits, and what an image costs in memory; for a GPU."""
    peaks = {}
    for count in [n for n in range(1, WHOLE + 1) if WHOLE % n == 0]:
        torch.cuda.reset_peak_memory_stats()
        step.take(count)
        step.warm_up()
        if step.args.micro_batch < count:  # it did not fit
            break
        peaks[count] = peak_memory() / GIB
    bench.micro_batch = most = max(peaks)
    step.take(most)
    each = (peaks[most] - peaks[1]) / max(1, most - 1)
    yield figure(f"{bench.recipe}: largest micro-batch that fits, of the divisors of {WHOLE}", [most], "images")
    yield figure(f"{bench.recipe}: memory of each image", [each], "GiB")
    yield figure(f"{bench.recipe}: memory of all else", [peaks[1] - each], "GiB")


def as_released(bench: Bench) -> Iterator[dict]:
    """The released step's work, imitated, alternately with this step."""
    step = bench.step()
    if bench.device.type == "cuda":
        step.take(max(1, step.args.micro_batch // 2))  # both models have to fit
    bench.check(3 * step.seconds)
    released = ReleasedStep(step)
    released.warm_up()
    step.take(released.args.micro_batch)
    here, there = bench.time(step, released, expected=step.seconds + released.seconds)
    yield bench.row(f"{bench.recipe}, the released step's work", released, there)
    what = f"{bench.recipe}: the released step's time over this one's, taken alternately"
    yield figure(what, [b / a for a, b in zip(here, there)], "times")


def compiled(bench: Bench) -> Iterator[dict]:
    """--compile: the first step, which compiles, and those after it."""
    bench.check(180)  # it takes minutes, and nothing can stop it
    start = now(bench.device)
    step = bench.step("--compile")
    yield figure(f"{bench.recipe}, --compile: models and first step", [now(bench.device) - start], "s")
    yield bench.row(f"{bench.recipe}, --compile", step)


def states(bench: Bench) -> Iterator[dict]:
    """N, the noisy states per image."""
    for count in (1, 2, 4, 8):
        yield bench.row(f"{bench.recipe}, N = {count}", bench.step(f"--states {count}"))


def sizes(bench: Bench) -> Iterator[dict]:
    """Image sizes: a half, three quarters and three halves of the diffusion model's own."""
    own = on_meta(bench.args()).images.size
    for size in (own // 2, own * 3 // 4, own * 3 // 2):
        yield bench.row(f"{bench.recipe}, {size}²", bench.step(f"--image-size {size}"))


def recipes(bench: Bench) -> Iterator[dict]:
    """The paper's other recipes."""
    for name in RECIPES:
        if "miniature" not in (name, bench.recipe) and name != bench.recipe:
            yield bench.row(name, bench.step(f"--recipe {name}"))


def checkpointing(bench: Bench) -> Iterator[dict]:
    """--grad-checkpointing: less memory for more time."""
    yield bench.row(f"{bench.recipe}, --grad-checkpointing", bench.step("--grad-checkpointing"))


def layouts(bench: Bench) -> Iterator[dict]:
    """The diffusion model in channels-last layout."""
    step = bench.step()
    for module in (step.diffusion.vae, step.diffusion.unet):
        module.to(memory_format=torch.channels_last)
    step.warm_up()
    yield bench.row(f"{bench.recipe}, φ in channels-last layout", step)


def loader(bench: Bench) -> Iterator[dict]:
    """Reading, decoding, cropping and drawing for 512², on one core."""
    images, speeds = on_meta(bench.args("--image-size 512")).images, []
    with tempfile.TemporaryDirectory() as folder:
        for i in range(0 if bench.data else 20):
            coarse = np.random.default_rng(i).integers(0, 256, (94, 125, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(f"{folder}/{i}.jpg", quality=90)
        images.files = open_images(bench.data or [folder])
        for start in range(0, 200, 40):
            begin = time.process_time()
            for position in range(start, start + 40):
                images[0, position]
            speeds.append(40 / (time.process_time() - begin))
    what = "--data" if bench.data else "drawn JPEGs of 500 × 375"
    yield figure(f"reading {what} for 512², one core", speeds, "images a second")


def start_up(bench: Bench) -> Iterator[dict]:
    """From the command to --help, and to the first logged step."""
    train_py, quiet = [sys.executable, str(ROOT / "train.py")], dict(stdout=subprocess.DEVNULL)
    (seconds,) = bench.time(lambda: subprocess.run([*train_py, "--help"], check=True, **quiet))
    yield figure("train.py --help", seconds, "s")

    def first_line() -> None:
        with tempfile.TemporaryDirectory() as out:
            metrics = Path(out, "run", "metrics.jsonl")
            command = [*train_py, *bench.options, *ONE_STEP.split(), "--out", str(metrics.parent)]
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL, **quiet)
            while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
                time.sleep(0.02)
            process.kill()
            if process.wait() > 0:
                raise UserError(f"{' '.join(command)}: ended without a step")

    (seconds,) = bench.time(first_line, share=0.5)
    yield figure(f"{bench.recipe}: from the command to the first step's log", seconds, "s")


def host_syncs(bench: Bench) -> Iterator[dict]:
    """How often a step waits for the GPU, as the profiler counts it."""
    if bench.device.type == "cuda":
        step = bench.step()
        few, more = count_syncs(step, 2), count_syncs(step, 4)  # the profiler's own are in both
        what = f"{bench.recipe}: host–device syncs of a step, of which the log's is one"
        yield figure(what, [(more - few) / 2], "syncs")


def count_syncs(step: Step, steps: int) -> int:
    """The CUDA calls that wait while so many steps are taken."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
    return sum(re.fullmatch("cuda[A-Za-z]*Synchronize", event.name) is not None for event in profiler.events())


def evaluation(bench: Bench) -> Iterator[dict]:
    """Scoring pairs of the miniature's benchmark, alternately with encoding alone."""
    pairs = read_mmvp(RECIPES["miniature"].mmvp)[:48]
    clip = load_clip(bench.args().clip, random_weights=True, device=str(bench.device))
    images = torch.rand(32, 3, clip.image_size, clip.image_size, device=bench.device)
    tokens = clip.tokenizer()(["a photo of a cat"] * 32).to(bench.device)

    def encode() -> None:
        with torch.inference_mode():
            for _ in range(2 * len(pairs) // 32):
                embed_images(clip.model.visual, images)
                clip.model.encode_text(tokens, normalize=True)

    def evaluate() -> None:
        similarities(clip, pairs, bench.device, progress=False)

    encode()
    evaluate()  # both to warm up
    alone, whole = bench.time(encode, evaluate)
    ratios = [b / a for a, b in zip(alone, whole)]
    yield figure(f"{bench.recipe}: evaluation over encoding alone, taken alternately", ratios, "times")


FULL_SIZE_ON_CPU = (ceiling, plain_step, as_released)
ALL = (
    ceiling, plain_step, as_released, compiled, states, sizes, recipes, checkpointing, layouts, loader, start_up,
    host_syncs, evaluation,
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The command


def measure(bench: Bench, measurements) -> tuple[list[dict], list[str]]:
    """The figures, each said on stderr as soon as it is there, and what was left out."""
    rows, left_out = [], []
    for measurement in measurements:
        why = ""
        try:
            for row in measurement(bench):
                rows.append(row)
                print("{what}: {value:.4g} {unit}".format(**row), file=sys.stderr, flush=True)
        except TimeOver:
            why = "the time was over"
        except torch.OutOfMemoryError:
            why = "the memory of the GPU does not suffice"
        if why:
            left_out.append(f"{bench.recipe}: {measurement.__doc__} ({why})")
        release_memory()
    return rows, left_out


def device_name(device: torch.device) -> str:
    """The card's name, or the CPU's with the threads that compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    models = re.findall("model name\\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    return f"{(models or [platform.machine()])[0]} CPU, {torch.get_num_threads()} threads"


def number(value: float | None) -> str:
    """Three digits; empty for None."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def markdown(result: dict) -> str:
    """The figures as two tables: the steps, and all else."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    steps = ["| step | images/s | ms an image | least … most | times | TFLOP an image | of the ceiling | GiB |"]
    steps += ["|---|---|---|---|---|---|---|---|"]
    others = ["| what | figure | least … most | times |", "|---|---|---|---|"]
    for row in result["figures"]:
        spread = f"{number(row['low'])} … {number(row['high'])}" if row["times"] > 1 else ""
        if "tflop_per_image" in row:
            speed, value = number(row["images_per_second"]), number(row["value"])
            work, share, gib = number(row["tflop_per_image"]), f"{row['share_of_ceiling']:.0%}", number(row["gib"])
            steps.append(
                f"| {row['what']} | {speed} | {value} | {spread} | {row['times']} | {work} | {share} | {gib} |"
            )
        else:
            others.append(f"| {row['what']} | {number(row['value'])} {row['unit']} | {spread} | {row['times']} |")
    head = f"Measured on {result['device']}, {result['date']} ({versions}). Each figure is a median."
    left_out = ["", *(f"- Left out: {text}" for text in result["left_out"])] if result["left_out"] else []
    return "\n".join([head, "", *steps, "", *others, *left_out]) + "\n"


def put_between_markers(text: str, file: Path) -> None:
    """Replaces what stands between the two markers of a Markdown file. UserError: they are not there."""
    begin, end = MARKERS
    head, found, rest = file.read_text(encoding="utf-8").partition(begin)
    _, ended, tail = rest.partition(end)
    if not (found and ended):
        raise UserError(f"--readme {file}: needs the lines {begin} and {end}, between which the tables go")
    write_whole(file, f"{head}{begin}\n{text}{end}{tail}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="All else: train.py's options.", allow_abbrev=False
    )
    parser.error = fail
    parser.add_argument("--all", help="everything, the most telling first", action="store_true")
    parser.add_argument("--minutes", help="for --all (default: 10)", type=float, default=10, metavar="M")
    parser.add_argument("--times", help="to take each figure (default: 10)", type=int, default=10, metavar="N")
    parser.add_argument("--as-released", help="the released step's work too, imitated", action="store_true")
    parser.add_argument("--data", help="images whose reading is timed, as for train.py", nargs="+", metavar="PATH")
    parser.add_argument("--json", help="a file for the figures", type=Path, metavar="FILE")
    readme = "put the tables between the markers of a Markdown file (extras/README.md)"
    parser.add_argument("--readme", help=readme, type=Path, nargs="?", const=ROOT / "extras/README.md", metavar="FILE")
    own, options = parser.parse_known_args(argv)
    if own.minutes <= 0 or own.times < 1:
        raise UserError("--minutes and --times: must be above 0")
    if own.json and not own.json.absolute().parent.is_dir():
        raise UserError(f"--json {own.json}: there is no folder {own.json.parent}")
    if own.readme:
        put_between_markers("", own.readme)  # a mistake shows before anything is measured

    device = join_processes()
    if not own.all:
        lists = [(options, (ceiling, plain_step, as_released) if own.as_released else (ceiling, plain_step))]
    elif "--recipe" in options:
        lists = [(options, ALL)]
    elif device.type == "cuda":
        lists = [(["--recipe", RECIPE, *options], ALL)]
    else:
        lists = [([*ONE_IMAGE.split(), *options], FULL_SIZE_ON_CPU), (options, ALL)]
    deadline = time.monotonic() + 60 * own.minutes if own.all else math.inf
    figures, left_out = [], []
    for chosen, measurements in lists:
        if device.type == "cpu":  # where compilation gains little and takes long, it comes last
            measurements = sorted(measurements, key=lambda measurement: measurement is compiled)
        found, missing = measure(Bench(chosen, device, own.times, deadline, own.data), measurements)
        figures, left_out = figures + found, left_out + missing
    torch.distributed.destroy_process_group()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "open_clip_torch")}
    result = dict(device=device_name(device), date=f"{datetime.date.today()}", versions=versions)
    result |= dict(figures=figures, left_out=left_out)
    if own.json:
        write_whole(own.json, json.dumps(result, indent=2) + "\n")
    if own.readme:
        put_between_markers(markdown(result), own.readme)
    print(markdown(result), end="")


if __name__ == "__main__":
    with one_sentence("bench.py"):
        main()
