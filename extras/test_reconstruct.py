"""extras/reconstruct.py: the pictures are diffusers' own, and differ by what CLIP says alone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

from condition import visual_tokens
from extras import reconstruct
from harness.errors import UserError
from harness.options import parse_args
from harness.recipes import MINIATURE
from model import load_clip

CPU = torch.device("cpu")


def write_run(out: Path, *options: str, tower: float = 1) -> tuple[dict, dict]:
    """A run's folder, its vision tower `tower` times the miniature's; returns the tower and the linear layer."""
    args = vars(parse_args([*options, "--out", str(out)])) | dict(versions={}, code=[])
    (out / "checkpoint").mkdir(parents=True)
    (out / "args.json").write_text(json.dumps(args))
    weights = {key: tower * value for key, value in load_clip("miniature").model.visual.state_dict().items()}
    torch.manual_seed(3)
    layer = dict(weight=0.1 * torch.randn(128, 128), bias=torch.randn(128))
    named = {f"visual.{k}": v for k, v in weights.items()} | {f"projection.{k}": v for k, v in layer.items()}
    save_file(named, out / "checkpoint" / "weights.safetensors")
    return weights, layer


@pytest.mark.parametrize("guidance", [1, 3])
def test_the_pictures_are_diffusers_own(tmp_path, guidance):
    """Its pipeline, with the same latents, the condition as prompt and the empty text as the negative one."""
    write_run(tmp_path)
    run = reconstruct.load_run(str(tmp_path), CPU)
    run.diffusion.text_embedding = torch.randn(run.diffusion.text_embedding.shape, generator=torch.manual_seed(0))
    condition, noise = torch.randn(2, *run.diffusion.text_embedding.shape[1:]), run.noise(2, seed=4)
    pipe = StableDiffusionPipeline.from_pretrained(f"{MINIATURE}/diffusion", torch_dtype=torch.float32)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        expected = pipe(
            prompt_embeds=condition, negative_prompt_embeds=run.diffusion.text_embedding.expand(2, -1, -1), latents=noise,
            num_inference_steps=6, guidance_scale=guidance, output_type="pt",
        ).images  # fmt: skip
    found = run.draw(condition, noise, steps=6, guidance=guidance)
    assert torch.allclose(found, expected, atol=1e-4) and found.std() > 0.1
    assert torch.equal(run.noise(3, seed=4)[:2], noise)  # an image's own


def test_the_conditions_differ_by_the_tower_alone(tmp_path):
    """Both are the run's linear layer over each CLIP's tokens, here the class token's and all patches', by hand."""
    tower, layer = write_run(tmp_path, "--recap", "all", "--join", "mean", tower=1.1)
    run, images = reconstruct.load_run(str(tmp_path), CPU), torch.rand(2, 3, 64, 64)
    before, after = run.conditions(images, seed=0)
    clip = load_clip("miniature")
    for found, weights in ((before, clip.model.visual.state_dict()), (after, tower)):
        clip.model.visual.load_state_dict(weights)
        with torch.no_grad():
            cls, local = visual_tokens(clip.model.visual, clip.preprocess_batch(images))
        tokens = torch.cat([cls[:, None], local], 1).double()
        expected = tokens @ layer["weight"].double().T + layer["bias"] + run.diffusion.text_embedding.double().mean(1)
        assert torch.allclose(found.double(), expected, atol=1e-4)
    assert (before - after).abs().max() > 0.1


def test_a_tower_that_has_not_changed_draws_the_same_pictures(tmp_path, capsys):
    """With random patches; and the page has the pixels, enlarged, under one another."""
    write_run(tmp_path / "run")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    for i in (0, 1):
        Image.fromarray(pixels[i]).save(tmp_path / f"{i}.png")
    images = [f"{tmp_path}/0.png", f"{tmp_path}/1.png"]
    reconstruct.main([f"{tmp_path}/run", f"{tmp_path}/page.png", "--steps", "2", "--images", *images])
    page = np.asarray(Image.open(tmp_path / "page.png"))
    rows = [[page[y : y + 128, x : x + 128] for x in (130, 260)] for y in (0, 130, 260)]
    for i in (0, 1):
        assert (rows[0][i] == pixels[i].repeat(2, 0).repeat(2, 1)).all()
        assert (rows[1][i] == rows[2][i]).all() and rows[1][i].std() > 10
    assert (rows[1][0] != rows[1][1]).any()
    said = capsys.readouterr().out
    assert "fitted at its start, and frozen" in said and "2 steps, guidance 1" in said


def test_the_images_are_the_benchmarks_then_the_datas(tmp_path):
    """One of a pair, spread over the types; a folder that is named comes first; a middle square is cropped."""
    args = parse_args(["--out", str(tmp_path)])
    found = reconstruct.read_images(args, None, 9, 64)
    for k, folder in enumerate(Path(path) for path in ["Orientation", "Presence", "State"]):
        path = Path(MINIATURE, "mmvp", "MLLM_VLM Images", folder, f"{200 * k + 1}.jpg")
        assert (found[k].permute(1, 2, 0).numpy() * 255 == np.asarray(Image.open(path))).all()
    args.mmvp = None
    assert not torch.equal(reconstruct.read_images(args, None, 9, 64), found)
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert reconstruct.read_images(args, [str(tmp_path)], 9, 32).min() == 1


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("TMP TMP/page.png", "is no run's folder"),
        ("TMP/run TMP/page.jpg", "must be a FILE.png in a folder that exists"),
        ("TMP/run TMP/no/page.png", "must be a FILE.png in a folder that exists"),
        ("TMP/run TMP/page.png --steps 0", "--steps from 1 to 1000"),
        ("TMP/run TMP/page.png --images TMP/run/args.json", "args.json: not a readable image"),
        ("TMP/begun TMP/page.png", "has no checkpoint yet"),
        ("TMP/random TMP/page.png", "its weights were random"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, options, sentence):
    write_run(tmp_path / "run")
    write_run(tmp_path / "random", "--random-weights", "--projection", "random")
    (tmp_path / "begun").mkdir()
    shutil.copy(tmp_path / "run" / "args.json", tmp_path / "begun")
    with pytest.raises(UserError, match=sentence):
        reconstruct.main(options.replace("TMP", str(tmp_path)).split())
