"""extras/bench.py: the step that is measured is train.py's, and its work is the least."""

import copy
import math
import re

import pytest
import torch

import train
from extras import bench
from extras.bench import ReleasedDiffusion, ReleasedStep, Step, executed_work, least_work, on_meta
from harness.errors import UserError
from harness.processes import process_group

CPU = torch.device("cpu")
SMALL = "--optimizer sgd --lr 0.01 --warmup 0 --ldifs 0 --no-freeze-projection --momentum 0 --micro-batch 4"


@pytest.fixture
def group():
    """The process group of one that the loop asks for."""
    with process_group():
        yield


def settings(options: str):
    return bench.read_args(options.split(), CPU)


FULL_SIZE = [("openai-vit-l-14-224", 77, 0.486), ("siglip-so400m-14-224", 43, 0.661)]
SLOW = [
    ("openai-vit-l-14-336", 77, 1.145), ("metaclip-vit-l-14-224", 257, 0.486), ("metaclip-vit-h-14-224", 257, 1.003),
    ("siglip-so400m-14-384", 73, 2.010), ("dfn-vit-h-14-224", 257, 1.003), ("dfn-vit-h-14-378", 365, 3.020),
]  # fmt: skip
FULL_SIZE += [pytest.param(*row, marks=pytest.mark.slow) for row in SLOW]


@pytest.mark.parametrize("name, tokens, clip", FULL_SIZE)
def test_nothing_is_computed_twice(group, name, tokens, clip):
    """The work of a full-size step beside the least, and that beside TFLOP counted before this code was written."""
    step = on_meta(settings(f"--recipe {name} --micro-batch 2 --precision bf16"))
    work, least = executed_work(step), least_work(step)
    assert 0.999 < work / sum(least.values()) < 1.02
    unet = 1.671 + (1.714 - 1.671) * (tokens - 77) / (257 - 77)  # a state's, forward and backward: linear in the tokens
    assert least == pytest.approx({"VAE": 1.117, "CLIP": clip, "U-Net": 2 * unet}, rel=2e-3)
    if name == "openai-vit-l-14-224":
        assert work == pytest.approx(4.95, rel=0.01)


def test_work_that_is_not_needed_is_counted(group):
    """More of it than the least: weight gradients of φ, and what the released step does again for each state."""
    step = on_meta(settings(SMALL))
    work, least = executed_work(step), least_work(step)
    text = ReleasedStep(step).diffusion.text_encoder.config
    width, positions = text.hidden_size, text.max_position_embeddings
    layer = positions * (4 * width**2 + 2 * width * text.intermediate_size + 2 * width * positions)
    once_a_state = 2 * text.num_hidden_layers * layer / 1e12  # for all images of a micro-batch
    tower = least["CLIP"] + 3 * 2 * 64 * 128 * 128 / 1e12  # and its 64 local tokens through the projection
    released = executed_work(ReleasedStep(step))
    assert released == pytest.approx(work + tower + step.args.states * once_a_state / 4, rel=1e-4)
    step.diffusion.unet.requires_grad_(True)
    assert executed_work(step) / sum(least.values()) > 1.2


def test_the_step_is_a_runs_own(group):
    """Its weights after a step that is taken apart, beside SGD written out; the parts are all of it."""
    step = Step(settings(SMALL), CPU)
    names = dict(step.conditioner.named_parameters())
    before = {name: p.detach().clone() for name, p in names.items()}
    batch = next(step.batches())
    rngs, recap = train.image_rngs(step.args.seed, [(0, i) for i in range(4)]), step.conditioner.recap
    timesteps, noise = train.draw_states((2, 4, 8, 8), 500, 1000, rngs)
    patches = train.draw_patch_indices(recap, 2, rngs)
    condition, _ = step.conditioner(step.clip.preprocess_batch(batch["images"]), step.diffusion.text_embedding, patches)
    loss = train.denoising_loss(step.diffusion, step.diffusion.encode(batch["images"]), condition, timesteps, noise)
    gradients = dict(zip(names, torch.autograd.grad(loss, list(names.values()))))
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
    start = bench.now(CPU)
    seconds = step.parts()
    whole = bench.now(CPU) - start
    for name, p in names.items():
        moved = 0.01 * min(1, step.args.max_grad_norm / norm) * gradients[name]
        torch.testing.assert_close(p.detach(), before[name] - moved, atol=1e-6, rtol=1e-5)
    assert list(seconds) == ["copy", "draws", "VAE", "CLIP", "U-Net forward", "backward", "optimizer"]
    assert 0.9 * whole < sum(seconds.values()) < whole


def test_the_released_step_goes_state_by_state(group, monkeypatch):
    """With our text and the VAE's own input, its gradient is the mean over the states: ours with each as an image."""
    step = Step(settings(f"{SMALL} --states 3 --max-grad-norm 0"), CPU)
    released, calls, start = ReleasedStep(step), [], copy.deepcopy(step.conditioner.state_dict())
    step.args.states, step.args.micro_batch, step.args.batch_size = 1, 12, 12
    images = step.batch["images"].repeat(3, 1, 1, 1)
    step.batch = dict(step.batch, images=images, keys=[(state, i) for state in range(3) for i in range(4)])
    step()
    here = copy.deepcopy(step.conditioner.state_dict())
    step.conditioner.load_state_dict(start)
    parts = {"text": released.diffusion.text_encoder, "U-Net": released.diffusion.unet}
    parts["VAE"] = released.diffusion.vae.quant_conv
    for name, module in parts.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    with monkeypatch.context() as patch:
        patch.setattr(ReleasedDiffusion, "text", step.diffusion.text_embedding)
        patch.setattr(released.diffusion, "numbers", torch.stack([torch.zeros(3, 1, 1), torch.ones(3, 1, 1)] * 2))
        released()
    for name, value in step.conditioner.state_dict().items():
        torch.testing.assert_close(value - start[name], here[name] - start[name], atol=1e-7, rtol=1e-3)
    calls.clear()
    released()
    assert calls == ["VAE", "text", "U-Net", "text", "U-Net", "text", "U-Net"]


def test_the_table(capsys):
    """The figures that follow from one another do so, and none is missing."""
    bench.main(f"{SMALL} --times 1 --as-released".split())
    rows = dict(re.findall(r"^\| (.+?) \| ([\d.,e+-]+) \|", capsys.readouterr().out, re.MULTILINE))
    figures = {name: float(value.replace(",", "")) for name, value in rows.items()}
    assert len(figures) == 16 and all(0 < value < math.inf for value in figures.values())
    assert figures["images a second"] == pytest.approx(1000 / figures["the step, ms an image"], rel=0.02)
    work = figures["work, TFLOP an image"]
    assert figures["… TFLOP/s"] == pytest.approx(work * figures["images a second"], rel=0.02)
    assert figures["… TFLOP an image"] > work and 1 <= figures["… over the least that is needed"] < 1.1


@pytest.mark.parametrize("options, message", [("--times 0", "--times: must be at least 1"), ("--recipe x", "no such")])
def test_a_mistake_is_a_sentence(options, message):
    with pytest.raises(UserError, match=message):
        bench.main(options.split())
