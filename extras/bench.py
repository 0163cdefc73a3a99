"""What a training step costs: its time and where it goes, its memory, and its work beside the least that is needed.

    python extras/bench.py                                                 # the miniature
    python extras/bench.py --recipe openai-vit-l-14-224 --micro-batch 32   # takes all of train.py's options
    python extras/bench.py --recipe openai-vit-l-14-224 --as-released      # and the released code's work, alternately

The step is train.py's own loop, on one device and without DDP, with random weights and synthetic images: one
micro-batch and the optimizer. How to read the figures: extras/README.md.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

sys.path.insert(0, str(Path(__file__).parents[1]))
import data
import train
from beyond import Ldifs, stages
from harness.errors import UserError, exit_on_user_error, usage_error
from harness.options import parse_args
from harness.processes import process_group
from harness.metrics import peak_memory
from model import Diffusion

OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))  # each channel's mean, deviation
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def nothing(*_) -> None:
    """What a run (harness/run.py) does around a step is not measured."""


class Step:
    """One step of train.py's loop that trains θ, with the same micro-batch of synthetic images each time.

    `args` are those of `read_args`; on the device "meta" nothing is computed.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        self.run = SimpleNamespace(first_step=0, note=nothing, log=nothing, save=nothing)
        self.clip, self.diffusion, self.conditioner = train.build(args, device)
        self.ldifs = Ldifs(self.clip, args.ldifs) if args.ldifs else None
        parameters = stages(args, self.conditioner)[-1][0]
        self.optimizer = train.build_optimizer(args, self.conditioner, parameters)
        self.image_size = args.image_size or self.diffusion.image_size
        images = data.TrainingImages(None, self.image_size, args.batch_size, args.seed)
        self.batch = data.collate([images[0, i] for i in range(args.micro_batch)])

    def batches(self) -> Iterator[dict]:
        while True:
            yield data.to_device(self.batch, self.device)

    def __call__(self) -> float:
        """Takes one step, and says how many seconds it took."""
        models, batches, start = (self.clip, self.diffusion, self.conditioner), self.batches(), now(self.device)
        train.algorithm_1(self.args, *models, self.optimizer, self.args.lr, range(1), batches, self.run, self.ldifs)
        return now(self.device) - start

    def parts(self) -> Counter:
        """Seconds of each part of one step, not compiled; the device is waited for at each border."""
        seconds, border = Counter(), now(self.device)

        def ends(function: Callable, part: str) -> Callable:
            """`function`, with which a part of the step ends."""

            def timed(*args):
                nonlocal border
                result, end = function(*args), now(self.device)
                seconds[part] += end - border
                border = end
                return result

            return timed

        with ExitStack() as stack:
            for owner, name, part in (  # what the loop calls, in its order
                (data, "to_device", "copy"),
                (train, "image_rngs", "draws"),
                (self.diffusion, "encode", "VAE"),
                (train, "copy_to_device", "draws"),
                (self.conditioner, "forward", "CLIP"),
                (self.diffusion.unet, "forward", "U-Net forward"),
                (self.run, "note", "backward"),
                (self.run, "save", "optimizer"),
            ):
                stack.enter_context(patch.object(owner, name, ends(getattr(owner, name), part)))
            self()
        return seconds


def now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class ReleasedStep(Step):
    """An imitation of the released step's work with the models of `step`; not its code, and not its numbers.

    As there, the N states of an image go one by one through CLIP, φ's text encoder and the U-Net, each with a backward
    pass of its own; the VAE encodes an image once. Not imitated: the first state's weight in the gradient, the way
    patches are drawn, and what the Trainer around the step costs.
    """

    def __init__(self, step: Step):
        self.device, self.run, self.batch, self.ldifs = step.device, step.run, step.batch, None
        self.clip, self.conditioner, self.optimizer = step.clip, step.conditioner, step.optimizer
        self.diffusion = ReleasedDiffusion(step.diffusion, step.args.diffusion, self.device)
        self.states, self.args = step.args.states, copy.copy(step.args)
        self.args.states = 1  # to the loop each state is a micro-batch of its own
        self.args.batch_size *= self.states

    def batches(self) -> Iterator[dict]:
        for batch in super().batches():
            for state in range(self.states):
                yield batch | dict(keys=[(state, position) for _, position in batch["keys"]])


class ReleasedDiffusion(Diffusion):
    """φ in fp32 under autocast to the precision of `diffusion`, so its weights are cast anew at each use.

    Its `text` is embedded each time it is read. The VAE's input is normalised for OpenAI's CLIP, and brought back by
    ImageNet's numbers.
    """

    def __init__(self, diffusion: Diffusion, name: str, device: torch.device):
        kind = "cuda" if device.type == "cuda" else "cpu"  # there is no autocast for meta
        cast = torch.autocast(kind, torch.bfloat16, enabled=diffusion.unet.dtype == torch.bfloat16)
        if os.path.isdir(name):
            config = CLIPTextConfig.from_pretrained(name, subfolder="text_encoder")
        else:  # 2.1-base's
            depth = dict(num_hidden_layers=23, num_attention_heads=16)
            config = CLIPTextConfig(hidden_size=1024, intermediate_size=4096, **depth)
        with torch.device(device):
            self.text_encoder = CLIPTextModel(config).requires_grad_(False).eval()
            self.tokens = torch.zeros(1, config.max_position_embeddings, dtype=torch.int64)
            self.numbers = torch.tensor([*OPENAI, *IMAGENET])[:, :, None, None]
        self.vae, self.unet = copy.deepcopy(diffusion.vae).float(), copy.deepcopy(diffusion.unet).float()
        self.vae.encode, self.unet.forward = cast(self.vae.encode), cast(self.unet.forward)
        self.text_encoder.forward = cast(self.text_encoder.forward)
        self.alphas_cumprod, self.prediction_type = diffusion.alphas_cumprod, diffusion.prediction_type
        self.encoded = None, None

    @property
    def text(self) -> torch.Tensor:
        return self.text_encoder(self.tokens).last_hidden_state.float()

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """As `Diffusion.encode`; the states of an image share its latents."""
        if self.encoded[0] is not images:
            mean, std, imagenet_mean, imagenet_std = self.numbers
            self.encoded = images, super().encode((images - mean) / std * imagenet_std + imagenet_mean)
        return self.encoded[1]


def on_meta(args: argparse.Namespace) -> Step:
    """The step of `args` with shapes alone, not compiled: the counter does not see into compiled kernels."""
    meta = torch.device("meta")
    with meta:
        return Step(argparse.Namespace(**vars(args) | dict(compile=False)), meta)


def executed_work(step: Step) -> float:
    """TFLOP per image that a step on the meta device executes, by torch's own counter.

    What a fused kernel computes again in its backward pass is not work.
    """
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    return counter.get_total_flops() / step.args.micro_batch / 1e12


def least_work(step: Step) -> dict[str, float]:
    """The least TFLOP per image, from one forward pass of each model alone and a rule for what must come back.

    A product costs as much again for the gradient of each of its factors. The VAE needs none. CLIP's tower needs both,
    but for that of the pixels. The frozen U-Net needs those of activations, which are one factor in a layer and both in
    attention, and none before the first layer that reads the condition: what is there depends on z_t and t alone.
    """
    size, small, unet = step.image_size, step.clip.image_size, step.diffusion.unet
    with torch.device("meta"):
        image, pixels, t = torch.empty(1, 3, size, size), torch.empty(1, 3, small, small), torch.empty(1).long()
        latents = step.diffusion.encode(image).to(unet.dtype)
        condition = torch.empty(1, 1 + step.conditioner.recap.count, unet.config.cross_attention_dim).to(unet.dtype)
    readers = [module.to_k for name, module in unet.named_modules() if name.endswith(".attn2")]
    vae, _ = forward_work(step.diffusion.encode, image)
    tower, _ = forward_work(step.conditioner.visual, pixels)
    state, behind = forward_work(unet, latents, t, condition, since=readers)
    of_pixels, attention = tower["convolution"], behind["bmm"]  # of a batch of one, layers are never bmm
    flop = {"VAE": vae.total(), "CLIP": 3 * tower.total() - of_pixels}
    flop["U-Net"] = step.args.states * (state.total() + behind.total() + attention)
    return {part: value / 1e12 for part, value in flop.items()}


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


def measure(args: argparse.Namespace, device: torch.device, times: int, released: bool) -> dict[str, list[float]]:
    """The figures of a step, each with all its values."""
    meta, step = on_meta(args), Step(args, device)
    step()
    if device.type == "cuda":  # the memory of a step, not that of loading
        torch.cuda.reset_peak_memory_stats()
    step()
    gib = peak_memory() / 2**30
    here, there, parts = [], [], []
    if released:
        imitation = ReleasedStep(step)
        imitation()
    for _ in range(times):
        here.append(step())
        if released:
            there.append(imitation())
        if not args.compile:
            parts.append(step.parts())
    image, work = 1000 / args.micro_batch, executed_work(meta)  # from seconds to ms an image; TFLOP an image
    figures = {"the step, ms an image": [seconds * image for seconds in here]}
    for part in parts[0] if parts else ():
        figures[f"… {part}"] = [seconds[part] * image for seconds in parts]
    figures["images a second"] = [args.micro_batch / seconds for seconds in here]
    figures["memory, GiB"] = [gib]
    figures["work, TFLOP an image"] = [work]
    figures["… over the least that is needed"] = [work / sum(least_work(meta).values())]
    figures["… TFLOP/s"] = [work * args.micro_batch / seconds for seconds in here]
    if released:
        figures["the released step's work, ms an image"] = [seconds * image for seconds in there]
        figures["… its time over the step's"] = [b / a for a, b in zip(here, there)]
        figures["… TFLOP an image"] = [executed_work(ReleasedStep(meta))]
    return figures


def read_args(options: list[str], device: torch.device) -> argparse.Namespace:
    """train.py's settings, for one micro-batch a step."""
    args = parse_args([*options, "--random-weights", "--data", "synthetic", "--projection", "random"])
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "fp32")
    args.batch_size = args.micro_batch
    return args


def number(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def markdown(figures: dict[str, list[float]]) -> str:
    """A table: of each figure the median, and where it was taken often the least, the most and how often."""
    lines = ["| | median | least … most | times |", "|---|---|---|---|"]
    for what, values in figures.items():
        spread = f"{number(min(values))} … {number(max(values))}" if len(values) > 1 else ""
        lines.append(f"| {what} | {number(median(values))} | {spread} | {len(values)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], epilog="All else: train.py's options.", allow_abbrev=False
    )
    parser.error = usage_error
    parser.add_argument("--times", help="to take each figure (default: 10)", type=int, default=10, metavar="N")
    parser.add_argument("--as-released", help="the released step's work too, imitated", action="store_true")
    own, options = parser.parse_known_args(argv)
    if own.times < 1:
        raise UserError("--times: must be at least 1")
    with process_group() as device:
        if dist.get_world_size() > 1:
            raise UserError("one device is measured: start bench.py with python")
        args = read_args(options, device)
        figures = measure(args, device, own.times, own.as_released)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.recipe}, {args.precision}, micro-batch {args.micro_batch}, N = {args.states}")
    print(f"{name}, torch {torch.__version__}, {datetime.date.today()}\n\n{markdown(figures)}")


if __name__ == "__main__":
    with exit_on_user_error("bench.py", "a smaller --micro-batch needs less"):
        main()
