"""extras/reconstruct.py: φ draws by DDIM, and the pictures differ only by what CLIP says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from condition import visual_tokens
from extras import reconstruct
from harness.checkpoint import save_checkpoint
from harness.errors import UserError
from harness.options import parse_args
from harness.recipes import MINIATURE
from model import load_clip

CPU = torch.device("cpu")


@torch.no_grad()
def write_run(out: Path, *options: str, tower: float = 1) -> nn.ModuleDict:
    """Writes the folder of a run, with the miniature's vision tower times `tower`; returns the trained modules."""
    args = vars(parse_args([*options, "--out", str(out)])) | dict(versions={}, code=[])
    out.mkdir(exist_ok=True)
    (out / "args.json").write_text(json.dumps(args))
    torch.manual_seed(3)
    trained = nn.ModuleDict(dict(visual=load_clip("miniature").model.visual, projection=nn.Linear(128, 128)))
    for parameter in trained.visual.parameters():
        parameter.mul_(tower)
    state = dict(step=1, unreadable=0, images="", settings={}, code=[{}])
    save_checkpoint(out / "checkpoint.pt", trained, torch.optim.SGD(trained.parameters()), state)
    return trained


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Folders of runs: whole, without a checkpoint, with random weights, with broken settings."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "run")
    for name in ("begun", "random", "broken"):
        (folder / name).mkdir()
    args = (folder / "run" / "args.json").read_text()
    (folder / "begun" / "args.json").write_text(args)
    (folder / "random" / "args.json").write_text(args.replace('"random_weights": false', '"random_weights": true'))
    (folder / "broken" / "args.json").write_text("[1]")
    return folder


@pytest.mark.parametrize("guidance, tokens", [(1, 20), (3, 24), (3, 20)])
def test_the_pictures_are_those_of_ddim(runs, guidance, tokens):
    """Compared with DDIM written out (arXiv 2010.02502, Eq. 12, σ = 0); a text of another length counts as its mean."""
    run = reconstruct.load_run(f"{runs}/run", CPU)
    diffusion, text = run.diffusion, torch.randn(1, 24, 128, generator=torch.manual_seed(0))
    diffusion.text_embedding, condition, noise = text, torch.randn(2, tokens, 128), run.noise(2, seed=4)
    text = (text if tokens == 24 else text.mean(1, keepdim=True)).expand(2, tokens, -1)
    found, z = run.draw(condition, noise, steps=5, guidance=guidance), noise
    for t in (801, 601, 401, 201, 1):
        alpha = diffusion.alphas_cumprod[t]
        next_alpha = diffusion.alphas_cumprod[t - 200] if t > 1 else torch.tensor(1.0)
        with torch.no_grad():
            with_clip, alone = (diffusion.unet(z, t, c).sample for c in (condition, text))
            eps = alone + guidance * (with_clip - alone)
            z = next_alpha.sqrt() * (z - (1 - alpha).sqrt() * eps) / alpha.sqrt() + (1 - next_alpha).sqrt() * eps
            expected = diffusion.vae.decode(z / diffusion.vae.config.scaling_factor).sample / 2 + 0.5
    assert torch.allclose(found, expected.clamp(0, 1), atol=1e-3) and found.std() > 0.1
    assert torch.equal(run.noise(3, seed=4)[:2], noise)


def test_the_conditions_differ_by_the_tower_alone(tmp_path):
    """Both apply the run's linear layer to each CLIP's tokens: here the class token and all patches, written out."""
    trained = write_run(tmp_path, "--recap", "all", "--join", "mean", tower=1.1)
    run, images, clip = reconstruct.load_run(str(tmp_path), CPU), torch.rand(2, 3, 64, 64), load_clip("miniature")
    before, after = run.conditions(images, seed=0)
    layer = trained.projection.double()
    for found, visual in ((before, clip.model.visual), (after, trained.visual)):
        with torch.no_grad():
            cls, local = visual_tokens(visual, clip.preprocess_batch(images))
            tokens = torch.cat([cls[:, None], local], 1).double()
            expected = layer(tokens) + run.diffusion.text_embedding.double().mean(1)
        assert torch.allclose(found.double(), expected, atol=1e-4)
    assert (before - after).abs().max() > 0.1


def test_an_unchanged_tower_draws_the_same_pictures(runs, tmp_path, capsys):
    """Even with random patches; the page shows the pixels enlarged, and is written where report.py looks for it."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    for i in (0, 1):
        Image.fromarray(pixels[i]).save(tmp_path / f"{i}.png")
    images = [f"{tmp_path}/0.png", f"{tmp_path}/1.png"]
    reconstruct.main(reconstruct.read_args([f"{runs}/run", "--steps", "2", "--images", *images]))
    page = np.asarray(Image.open(runs / "run" / "reconstruct.png"))
    rows = [[page[y : y + 128, x : x + 128] for x in (130, 260)] for y in (0, 130, 260)]
    for i in (0, 1):
        assert (rows[0][i] == pixels[i].repeat(2, 0).repeat(2, 1)).all()
        assert (rows[1][i] == rows[2][i]).all() and rows[1][i].std() > 10
    assert (rows[1][0] != rows[1][1]).any()
    printed = capsys.readouterr().out
    assert "fitted start, frozen" in printed and "2 steps, guidance 1" in printed


def test_the_images_come_from_the_benchmark_then_from_the_data(tmp_path):
    """Every n-th pair's first image; --images overrides both; the central square is cropped."""
    args = parse_args(["--out", str(tmp_path)])
    found = reconstruct.read_images(args, None, 10, 64)
    assert len(found) == 10
    paths = sorted(Path(MINIATURE, "mmvp", "MLLM_VLM Images").glob("*/*.jpg"), key=lambda path: int(path.stem))
    for k, path in enumerate(paths[::180]):  # of 900 pairs, every 90th
        assert (found[k].permute(1, 2, 0).numpy() * 255 == np.asarray(Image.open(path))).all()
    args.mmvp = None
    assert not torch.equal(reconstruct.read_images(args, None, 10, 64), found)
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, 32:64] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert reconstruct.read_images(args, [str(tmp_path)], 9, 32).min() == 1


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("TMP", "not the folder of a run"),
        ("TMP/broken", "args.json cannot be read"),
        ("TMP/run TMP/page.jpg", "must be a FILE.png in an existing folder"),
        ("TMP/run TMP/no/page.png", "must be a FILE.png in an existing folder"),
        ("TMP/run --steps 0", "--steps from 1 to 1000"),
        ("TMP/run --guidance 0.5", "--guidance must be at least 1"),
        ("TMP/run --images TMP/run/args.json", "args.json: not a readable image"),
        ("TMP/begun", "has no checkpoint.pt yet"),
        ("TMP/random", "started with --random-weights"),
    ],
)
def test_what_cannot_be_drawn_is_refused(runs, options, sentence):
    with pytest.raises(UserError, match=sentence):
        reconstruct.main(reconstruct.read_args(options.replace("TMP", str(runs)).split()))
