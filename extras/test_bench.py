"""extras/bench.py: it measures train.py's own step, which computes nothing twice."""

import copy
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from condition import visual_tokens
from extras import bench
from extras.bench import ReleasedStep, Step, executed_work, on_meta
from harness.errors import UserError

CPU = torch.device("cpu")
SMALL = "--optimizer sgd --lr 0.01 --warmup 0 --ldifs 0 --no-freeze-projection --momentum 0 --micro-batch 4"


def settings(options: str):
    args = bench.read_args(options.split())
    args.precision = args.precision or "fp32"
    return args


FULL_SIZE = [
    ("openai-vit-l-14-224", 77, 0.486), ("siglip-so400m-14-224", 43, 0.661), ("openai-vit-l-14-336", 77, 1.145),
    ("metaclip-vit-l-14-224", 257, 0.486), ("metaclip-vit-h-14-224", 257, 1.003), ("siglip-so400m-14-384", 73, 2.010),
    ("dfn-vit-h-14-224", 257, 1.003), ("dfn-vit-h-14-378", 365, 3.020),
]  # fmt: skip
FULL_SIZE[1:] = [pytest.param(*row, marks=pytest.mark.slow) for row in FULL_SIZE[1:]]


@pytest.mark.parametrize("name, tokens, clip", FULL_SIZE)
def test_nothing_is_computed_twice(name, tokens, clip):
    """A full-size step executes only the TFLOP that its models need, as counted before this code was written."""
    work = executed_work(on_meta(settings(f"--recipe {name} --micro-batch 2 --precision bf16")))
    unet = 1.671 + (1.714 - 1.671) * (tokens - 77) / (257 - 77)  # a state, forward and backward: linear in the tokens
    assert work == pytest.approx(1.117 + clip + 2 * unet, rel=3e-3)


def test_unnecessary_work_is_counted():
    """φ's weight gradients, and what the released step repeats for each state: CLIP and the text encoder."""
    step = on_meta(settings(SMALL))
    work, released = executed_work(step), ReleasedStep(step)
    visual, text = step.clip.model.visual, released.text_encoder.config
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        visual_tokens(visual, torch.empty(1, 3, 64, 64, device="meta"))
    to_pixels = 2 * 64 * visual.conv1.weight.numel()  # the pixels get no gradient
    tower = (3 * counter.get_total_flops() - to_pixels) / 1e12
    width, positions = text.hidden_size, text.max_position_embeddings
    layer = positions * (4 * width**2 + 2 * width * text.intermediate_size + 2 * width * positions)
    once_per_state = 2 * text.num_hidden_layers * layer / 1e12  # for all images of a micro-batch
    assert executed_work(released) == pytest.approx(work + tower + 2 * once_per_state / 4, rel=1e-4)
    step.diffusion.unet.requires_grad_(True)
    assert executed_work(step) > 1.2 * work


@pytest.mark.parametrize("options", ["", "--channels-last --cudnn-benchmark"])
def test_the_step_is_that_of_a_run(options):
    """The weights after a timed step are compared with SGD written out; the parts add up to the step."""
    step = Step(settings(f"{SMALL} {options}"), CPU)
    layout = torch.channels_last if options else torch.contiguous_format
    assert step.diffusion.unet.conv_in.weight.is_contiguous(memory_format=layout)
    names = dict(step.conditioner.named_parameters())
    before = {name: p.detach().clone() for name, p in names.items()}
    images = next(step.batches())["images"]
    rngs = train.image_rngs(step.args.seed, [(0, i) for i in range(4)])
    patch_indices = train.draw_patch_indices(step.conditioner.recap, 2, rngs, CPU)
    timesteps, noise = train.draw_states(step.draws, (4, 8, 8), rngs, CPU)
    condition, _ = step.conditioner(images, step.diffusion.text_embedding, patch_indices)
    loss = train.denoising_loss(step.diffusion, step.diffusion.encode(images), condition, timesteps, noise)
    gradients = dict(zip(names, torch.autograd.grad(loss, list(names.values()))))
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
    start = bench.now(CPU)
    seconds = step.parts()
    whole = bench.now(CPU) - start
    for name, p in names.items():
        moved = 0.01 * min(1, step.args.max_grad_norm / norm) * gradients[name]
        torch.testing.assert_close(p.detach(), before[name] - moved, atol=1e-6, rtol=1e-5)
    assert list(seconds) == ["copy", "draws", "CLIP", "VAE", "U-Net forward", "backward", "optimizer"]
    assert 0.9 * whole < sum(seconds.values()) < whole


def test_the_released_step_takes_one_state_at_a_time(monkeypatch):
    """With our text, its gradient is the mean over states: equal to ours with each state as a separate image."""
    step = Step(settings(f"{SMALL} --states 3 --max-grad-norm 0"), CPU)
    released, calls, start = ReleasedStep(step), [], copy.deepcopy(step.conditioner.state_dict())
    step.draws = released.draws  # one state of an image
    images = np.tile(step.batch["images"], (3, 1, 1, 1))
    step.batch = dict(step.batch, images=images, keys=[(state, i) for state in range(3) for i in range(4)])
    step()
    here = copy.deepcopy(step.conditioner.state_dict())
    step.conditioner.load_state_dict(start)
    ours, phi = SimpleNamespace(last_hidden_state=step.diffusion.text_embedding), released.diffusion
    with monkeypatch.context() as patch:
        patch.setattr(released.text_encoder, "forward", lambda tokens: ours)
        released()
    for name, value in step.conditioner.state_dict().items():
        torch.testing.assert_close(value - start[name], here[name] - start[name], atol=1e-7, rtol=1e-3)
    for name, module in dict(text=released.text_encoder, unet=phi.unet, vae=phi.vae.quant_conv).items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    released()
    assert calls == ["vae", "text", "unet", "text", "unet", "text", "unet"]


def test_the_table(capsys):
    """It holds all figures, and derived figures agree."""
    bench.main(settings(f"{SMALL} --times 1 --as-released"))
    rows = dict(re.findall(r"^\| (.+?) \| ([\d.,e+-]+) \|", capsys.readouterr().out, re.MULTILINE))
    figures = {name: float(value.replace(",", "")) for name, value in rows.items()}
    assert len(figures) == 15 and all(0 < value < math.inf for value in figures.values())
    assert figures["images per second"] == pytest.approx(1000 / figures["the step, ms per image"], rel=0.02)
    work = figures["work, TFLOP per image"]
    assert figures["TFLOP/s"] == pytest.approx(work * figures["images per second"], rel=0.02)
    assert figures["… of the released step"] > work


@pytest.mark.parametrize("options, processes, words", [("--times 0", "1", "at least 1"), ("", "2", "one process")])
def test_what_cannot_be_measured_is_refused(options, processes, words, monkeypatch):
    for key, value in dict(RANK="0", WORLD_SIZE=processes, MASTER_ADDR="localhost", MASTER_PORT="1").items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=words):
        bench.read_args(options.split())
