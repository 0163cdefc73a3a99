"""extras/bench.py and step.py: the step that is measured is train.py's, its work is the least, the list is whole."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from extras import bench
from extras.step import ReleasedDiffusion, ReleasedStep, Step, executed_work, least_work, on_meta
from harness.errors import UserError
from harness.options import parse_args
from harness.processes import join_processes

CPU = torch.device("cpu")
SMALL = "--recap random:30% --join mean --optimizer sgd --lr 0.01 --states 2 --micro-batch 4 --batch-size 4"


@pytest.fixture
def group():
    """The process group of one that the loop asks for."""
    join_processes()
    yield
    torch.distributed.destroy_process_group()


def settings(options: str = SMALL, precision: str = "fp32"):
    args = parse_args([*options.split(), "--no-freeze-projection", "--random-weights", "--data", "synthetic"])
    args.precision = precision
    return args


FULL_SIZE = [
    ("openai-vit-l-14-224", 77, 0.486),
    ("siglip-so400m-14-224", 43, 0.661),
    *(
        pytest.param(*row, marks=pytest.mark.slow)
        for row in (
            ("openai-vit-l-14-336", 77, 1.145),
            ("metaclip-vit-l-14-224", 257, 0.486),
            ("metaclip-vit-h-14-224", 257, 1.003),
            ("siglip-so400m-14-384", 73, 2.010),
            ("dfn-vit-h-14-224", 257, 1.003),
            ("dfn-vit-h-14-378", 365, 3.020),
        )
    ),
]


@pytest.mark.parametrize("name, tokens, clip", FULL_SIZE)
def test_nothing_is_computed_twice(group, name, tokens, clip):
    """The work of a full-size step beside the least, and that beside TFLOP counted before this code was written."""
    step = on_meta(settings(f"--recipe {name} --micro-batch 2 --batch-size 2", "bf16"))
    work, least = executed_work(step).total(), least_work(step)
    assert 0.999 < work / least.total() < 1.02
    unet = 1.671 + (1.714 - 1.671) * (tokens - 77) / (257 - 77)  # a state's, forward and backward: linear in the tokens
    assert least == pytest.approx({"VAE": 1.117, "CLIP": clip, "U-Net": 2 * unet}, rel=2e-3)
    if name == "openai-vit-l-14-224":
        assert work == pytest.approx(4.95, rel=0.01)


def test_work_that_is_not_needed_is_counted(group):
    """More of it than the least: weight gradients of φ, and what the released step does again for each state."""
    step = on_meta(settings())
    work, least = executed_work(step).total(), least_work(step)
    text = ReleasedStep(step).diffusion.text_encoder.config
    width, positions = text.hidden_size, text.max_position_embeddings
    layer = positions * (4 * width**2 + 2 * width * text.intermediate_size + 2 * width * positions)
    once_a_state = 2 * text.num_hidden_layers * layer / 1e12  # for all images of a micro-batch
    tower = least["CLIP"] + 3 * 2 * 64 * 128 * 128 / 1e12  # and its 64 local tokens through the projection
    released = executed_work(ReleasedStep(step)).total()
    assert released == pytest.approx(work + tower + step.args.states * once_a_state / 4, rel=1e-4)
    step.diffusion.unet.requires_grad_(True)
    assert executed_work(step).total() / least.total() > 1.2


def test_the_step_is_a_runs_own(group):
    """Its weights after a step beside SGD written out, with the loss of `train.denoising_loss`."""
    step, marks = Step(settings(), CPU), []
    names = dict(step.conditioner.named_parameters())
    before = {name: p.detach().clone() for name, p in names.items()}
    batch = next(step.batches(lambda part: None))
    condition, _ = step.conditioner(step.clip.prepare(batch["images"]), step.diffusion.text, batch.get("patches"))
    latents = step.diffusion.encode(batch["images"])
    loss = train.denoising_loss(step.diffusion, latents, condition, batch["timesteps"], batch["noise"])
    gradients = dict(zip(names, torch.autograd.grad(loss, list(names.values()))))
    norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
    step(marks.append)
    assert marks == ["copy", "CLIP", "VAE", "U-Net forward", "backward", "optimizer"]
    for name, p in names.items():
        moved = step.args.lr * min(1, step.args.max_grad_norm / norm) * gradients[name]
        torch.testing.assert_close(p.detach(), before[name] - moved, atol=1e-6, rtol=1e-5)
    marks.clear()
    step()
    assert not marks  # the hooks are gone


def test_the_released_step_goes_state_by_state(group, monkeypatch):
    """With our text and the VAE's own input, its gradient is that of Algorithm 1: the mean over the states."""
    step = Step(settings(f"{SMALL} --states 3 --max-grad-norm 0 --momentum 0"), CPU)
    start = {name: p.detach().clone() for name, p in step.conditioner.state_dict().items()}
    step()
    here = {name: p.detach().clone() for name, p in step.conditioner.state_dict().items()}
    step.conditioner.load_state_dict(start)

    released, calls = ReleasedStep(step), []
    parts = dict(text=released.diffusion.text_encoder, VAE=released.diffusion.vae.quant_conv)
    parts["U-Net"] = released.diffusion.unet
    for name, module in parts.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    with monkeypatch.context() as patch:
        patch.setattr(ReleasedDiffusion, "text", step.diffusion.text)
        patch.setattr(released.diffusion, "numbers", torch.stack([torch.zeros(3, 1, 1), torch.ones(3, 1, 1)] * 2))
        released()
    assert calls == ["VAE", "U-Net", "U-Net", "U-Net"]
    for name, value in step.conditioner.state_dict().items():
        torch.testing.assert_close(value - start[name], here[name] - start[name], atol=1e-7, rtol=1e-3)

    calls.clear()
    released()
    assert calls == ["text", "VAE", "U-Net", "text", "U-Net", "text", "U-Net"]


def test_the_whole_list(tmp_path, capsys):
    """`--all` on the miniature: every measurement gives figures, in the JSON file and between the README's markers."""
    readme, file = tmp_path / "README.md", tmp_path / "costs.json"
    readme.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    options = f"--all --recipe miniature --micro-batch 4 --batch-size 4 --times 1 --json {file} --readme {readme}"
    with torch.compiler.set_stance("force_eager"):  # compilation takes minutes
        bench.main(options.split())
    result, out = json.loads(file.read_text()), capsys.readouterr().out
    assert not result["left_out"]
    assert readme.read_text() == f"before\n<!-- bench -->\n{out}<!-- /bench -->\nafter\n"
    rows = {row["what"]: row for row in result["figures"]}
    assert all(0 < row["low"] <= row["value"] <= row["high"] < math.inf for row in rows.values())
    for text in (
        "ceiling", "a part: CLIP", "counted", "released", "--compile", "N = 8", "32²", "--grad-checkpointing",
        "channels-last", "reading", "--help", "first step's log", "evaluation",
    ):  # fmt: skip
        assert any(text in what for what in rows), text
    plain, ceiling = rows["miniature, fp32, micro-batch 4"], rows["ceiling: matrix product in fp32"]["value"]
    assert plain["images_per_second"] == pytest.approx(1000 / plain["value"])
    assert plain["share_of_ceiling"] == pytest.approx(plain["tflop_per_image"] * plain["images_per_second"] / ceiling)
    parts = sum(row["value"] for what, row in rows.items() if "a part" in what)
    assert parts == pytest.approx(plain["value"], rel=0.8)  # each was taken once, on a machine that is shared
    work = [rows[f"miniature, N = {n}, micro-batch 4"]["tflop_per_image"] for n in (1, 2, 4, 8)]
    assert (work[3] - work[2]) / 4 == pytest.approx((work[2] - work[1]) / 2) == pytest.approx(work[1] - work[0])


def test_time_that_is_over_is_said(group):
    over = bench.Bench([], CPU, times=1, deadline=0, data=None)
    rows, left_out = bench.measure(over, (bench.ceiling, bench.compiled))
    assert not rows
    assert left_out[0] == "miniature: The device's own ceiling: a product of large matrices. (the time was over)"
    assert len(left_out) == 2


def test_the_largest_micro_batch(group, monkeypatch):
    """On a GPU that has 13 GiB, for a step that takes 3 and 2 more for each image."""

    def memory() -> int:
        return (3 + 2 * step.args.micro_batch) * bench.GIB

    def call(step) -> None:
        if memory() > 13 * bench.GIB:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(Step, "__call__", call)
    monkeypatch.setattr(bench, "peak_memory", memory)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    step = Step(settings(), CPU)
    one = bench.Bench([], CPU, times=1, deadline=math.inf, data=None)
    assert [row["value"] for row in bench.largest_micro_batch(one, step)] == [5, 2, 3]
    assert step.args.micro_batch == one.args().micro_batch == 5
    step.take(8)
    step.warm_up()
    assert step.args.micro_batch == 4


@pytest.mark.parametrize(
    "options, message",
    [
        ("--json nowhere/x.json", "--json nowhere/x.json: there is no folder nowhere"),
        ("--readme LICENSE", "--readme LICENSE: needs the lines <!-- bench -->"),
        ("--times 0", "--minutes and --times: must be above 0"),
        ("--recipe x", "--recipe x: no such recipe"),
    ],
)
def test_a_mistake_is_a_sentence(options, message, monkeypatch):
    monkeypatch.chdir(bench.ROOT)
    try:
        with pytest.raises(UserError, match=message):
            bench.main(options.split())
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
