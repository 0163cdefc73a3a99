"""What a training step costs, and how near that is to the least work it needs and to what the device can do.

    python extras/bench.py --recipe openai-vit-l-14-224 --micro-batch 32 --json l14.json
    python extras/bench.py --steps 3 --data 'cc3m/*.tar'  # the miniature, and what reading these images costs

The step is train.py's, on one device, with random weights and synthetic images: one micro-batch and an optimizer step,
which a run that accumulates takes less often. Its work is counted on torch's meta device, without being done, with
attention as two products of matrices: what a fused kernel computes again in its backward pass is time, not work.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import TrainingImages, open_images, read_batches, to_device
from extras.log import peak_memory
from model import one_sentence
from train import at_least, build, denoising_loss, parse_args

WARM_UP = 2  # steps


class Step:
    """`step()` trains on one micro-batch, read beforehand; `args` of `train.parse_args`, with a precision.

    SystemExit: a model or a setting that a run would refuse.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        self.clip, self.diffusion, self.encoder, self.images = build(args, device, files=None)
        self.parameters = [p for p in self.encoder.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(self.parameters, lr=args.lr, momentum=args.momentum)
        kind = "cuda" if device.type == "cuda" else "cpu"  # there is no autocast for meta
        self.autocast = torch.autocast(kind, torch.bfloat16, enabled=args.precision == "bf16")
        self.batch = next(read_batches(self.images, lambda: [[(0, i) for i in range(args.micro_batch)]], workers=0))

    def __call__(self, mark: Callable[[str], None] = lambda part: None) -> None:
        """One step, as in `train.train`; `mark` is told the name of each part when it ends."""
        batch = to_device(self.batch, self.device)
        images = batch["images"]  # (B, 3, S, S)
        mark("copy")
        with self.autocast:
            condition = self.encoder(self.clip.view(images), self.diffusion.text, batch.get("patches"))
        mark("CLIP")
        latents = self.diffusion.encode(images)
        mark("VAE")
        loss = denoising_loss(self.diffusion, latents, condition, batch["timesteps"], batch["noise"])
        mark("U-Net forward")
        loss.backward()
        mark("backward")
        torch.nn.utils.clip_grad_norm_(self.parameters, self.args.max_grad_norm or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        mark("optimizer")


# ---------------------------------------------------------------------------------------------------------------------
# Work, on the meta device


def executed_work(step: Step) -> dict[str, float]:
    """TFLOP per image of each part of a step on the meta device, by torch's own counter."""
    work, counter = {}, FlopCounterMode(display=False)
    with counter:
        step(lambda part: work.update({part: counter.get_total_flops() - sum(work.values())}))
    return {part: flop / step.args.micro_batch / 1e12 for part, flop in work.items()}


def floor_work(step: Step) -> dict[str, float]:
    """The least TFLOP per image, from one forward pass of each model alone and a rule for what must come back.

    A product costs as much again for the gradient of each of its factors. The VAE needs none; CLIP's tower both, but
    for that of the pixels; the frozen U-Net those of activations, which are one factor in a layer and both in
    attention, and none before the first layer that reads the condition: what is there depends on z_t and t alone.
    """
    vae, unet, meta = step.diffusion.vae, step.diffusion.unet, partial(torch.empty, device="meta")
    latents = meta(1, *step.diffusion.latent_shape(step.images.size), dtype=unet.dtype)
    condition = meta(1, 1 + step.encoder.count, unet.config.cross_attention_dim, dtype=unet.dtype)
    readers = [module.to_k for name, module in unet.named_modules() if name.endswith(".attn2")]
    image, _ = forward_work(vae.encode, meta(1, 3, step.images.size, step.images.size, dtype=vae.dtype))
    tower, _ = forward_work(step.encoder.visual, meta(1, 3, step.clip.image_size, step.clip.image_size))
    state, behind = forward_work(unet, latents, meta(1, dtype=torch.int64), condition, since=readers)
    pixels, attention = tower["convolution"], behind["bmm"]  # of a batch of one, layers are never bmm
    flop = dict(VAE=image.total(), CLIP=3 * tower.total() - pixels)
    flop["U-Net"] = step.args.states * (state.total() + behind.total() + attention)
    return {part: flop / 1e12 for part, flop in flop.items()}


def forward_work(model: Callable, *inputs: torch.Tensor, since: Sequence = ()) -> tuple[Counter, Counter]:
    """FLOP of a forward pass by operator: all, and those from the first call of one of the modules `since` on."""
    counts, counter = [], FlopCounterMode(display=False)

    def note(*_) -> None:
        counts.append(Counter({op.__name__: flop for op, flop in counter.get_flop_counts()["Global"].items()}))

    hooks = [module.register_forward_pre_hook(note) for module in since]
    with counter:
        model(*inputs)
    note()
    for hook in hooks:
        hook.remove()
    return counts[-1], counts[-1] - counts[0]


# ---------------------------------------------------------------------------------------------------------------------
# Time


def now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(step: Step, steps: int) -> dict[str, float]:
    """Median seconds of the parts of a step, for which the device waits at each border, and of further whole steps."""
    seconds, border = defaultdict(list), 0.0

    def mark(part: str) -> None:
        nonlocal border
        last, border = border, now(step.device)
        seconds[part].append(border - last)

    for i in tqdm(range(WARM_UP + 2 * steps), desc="bench", unit="step", dynamic_ncols=True):
        if i == WARM_UP:
            seconds.clear()
        border = now(step.device)
        if i < WARM_UP + steps:
            step(mark)
        else:
            step()
            mark("total")
    return {part: statistics.median(times) for part, times in seconds.items()}


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of the device in a product of large square matrices: the median of five goes."""
    size, products = (8192, 50) if device.type == "cuda" else (2048, 1)
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    seconds = []
    for _ in range(1 + 5):  # the first warms up
        start = now(device)
        for _ in range(products):
            a @ b
        seconds.append(now(device) - start)
    return 2 * size**3 * products / statistics.median(seconds[1:]) / 1e12


def reading_speed(images: TrainingImages, count: int = 200) -> float:
    """Images per second that one core reads, decodes, crops and draws for."""
    start = time.process_time()
    for position in range(count):
        images[0, position]
    return count / (time.process_time() - start)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="Recipe, models and method: train.py's options.", allow_abbrev=False
    )
    parser.error = sys.exit
    count = dict(type=at_least(1, int), metavar="N")
    parser.add_argument("--micro-batch", help="images per step; if not given, the recipe's micro-batch", **count)
    parser.add_argument("--steps", help="to time; as many again time the parts", default=10, **count)
    parser.add_argument("--data", help="images whose reading is timed, as for train.py", nargs="+", metavar="PATH")
    parser.add_argument("--json", help="a file for the figures", type=Path, metavar="FILE")
    own, rest = parser.parse_known_args(argv)
    batch = ["--micro-batch", f"{own.micro_batch}", "--batch-size", f"{own.micro_batch}"] if own.micro_batch else []
    args = parse_args([*rest, *batch, "--data", *(own.data or ["synthetic"]), "--random-weights"])
    if own.json and not own.json.parent.is_dir():
        raise SystemExit(f"--json {own.json}: there is no folder {own.json.parent}")
    files = open_images(args.data)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")

    try:
        step = Step(args, device)
        seconds = measure(step, own.steps)
    except torch.OutOfMemoryError:
        raise SystemExit(f"--micro-batch {args.micro_batch}: does not fit into the memory of this GPU") from None
    memory = peak_memory()  # of the steps alone
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU with {torch.get_num_threads()} threads"
    limit = ceiling(device, step.diffusion.unet.dtype)
    args.compile = False  # the counter does not see into compiled kernels
    del step  # its memory
    step = Step(args, torch.device("meta"))
    work, floor = executed_work(step), floor_work(step)
    ms = {part: 1000 * s / args.micro_batch for part, s in seconds.items()}
    work["total"], floor["total"] = sum(work.values()), sum(floor.values())
    speed = 1000 * work["total"] / ms["total"]
    figures = dict(
        recipe=args.recipe, clip=args.clip, diffusion=args.diffusion, image_size=step.images.size, states=args.states,
        tokens=1 + step.encoder.count, device=name, torch=torch.__version__, precision=args.precision,
        micro_batch=args.micro_batch, steps=own.steps, images_per_second=1000 / ms["total"],
        peak_memory_gib=memory / 2**30, ms_per_image=ms, tflop_per_image=work,
        floor_tflop_per_image=floor, executed_over_floor=work["total"] / floor["total"], tflop_per_second=speed,
        ceiling_tflop_per_second=limit, share_of_ceiling=speed / limit,
    )
    if files:
        step.images.files = files
        figures["images_read_per_second_and_core"] = reading_speed(step.images)
    if own.json:
        own.json.write_text(json.dumps(figures, indent=2) + "\n")

    for key, value in figures.items():
        if not isinstance(value, dict):
            print(f"{key:32}{f'{value:.4g}' if isinstance(value, float) else value}")
    print("\nper image            ms      TFLOP    TFLOP/s")
    for part in ms:
        print(f"{part:13} {ms[part]:9.4g}  {work[part]:9.4g}  {1000 * work[part] / ms[part]:9.4g}")
    print("floor         " + " + ".join(f"{part} {floor[part]:.4g}" for part in floor if part != "total"))


if __name__ == "__main__":
    with one_sentence("bench.py"):
        main()
