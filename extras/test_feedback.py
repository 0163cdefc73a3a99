"""extras/feedback.py: the gradient is the slope of the loss, the alignment is the slope of the margins along it."""

import copy
import re
from operator import attrgetter
from statistics import fmean, stdev

import numpy as np
import pytest
import torch

import beyond
import train
from condition import draw_patch_indices
from extras import feedback
from harness.errors import UserError
from harness.mmvp import read_mmvp
from harness.recipes import TYPES

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def seen() -> tuple:
    """The miniature's settings, CLIP, φ and conditioner, and five pairs of its benchmark."""
    args = feedback.read_args(["--data=synthetic", "--projection=random", "--states=2", "--micro-batch=4", "--draws=2"])
    args.precision = "fp32"
    clip, diffusion, conditioner = train.build(args, CPU)
    return args, clip, diffusion, conditioner, feedback.Pairs(clip, diffusion, read_mmvp(args.mmvp)[:450:90], 64, CPU)


def margins(pairs: feedback.Pairs, cls: torch.Tensor) -> torch.Tensor:
    """How much closer each pair's statements are to their own image, written out: (pairs,)."""
    found = []
    for p, texts in enumerate(pairs.texts.double()):
        first, second = [v / v.norm() for v in cls[2 * p : 2 * p + 2].double()]
        found.append((texts[0] - texts[1]) @ (first - second))
    return torch.stack(found)


def words(pairs: feedback.Pairs, cls: torch.Tensor) -> torch.Tensor:
    """The direction in which the margins grow fastest, (2 · pairs, D); an image is in one pair only."""
    return torch.autograd.functional.jacobian(lambda cls: margins(pairs, cls).sum(), cls)


def test_the_alignment_is_the_slope_of_the_margins(seen):
    """Compared with a difference quotient; the mean is 1 along the words' direction; orthogonal to it, all are 0."""
    pairs = seen[-1]
    gradient = torch.from_numpy(np.random.default_rng(0).normal(size=pairs.cls.shape)).float()
    toward, h = words(pairs, pairs.cls), 1e-4
    down, up = margins(pairs, pairs.cls.double() - h * gradient), margins(pairs, pairs.cls.double() + h * gradient)
    both, long = toward.reshape(len(down), -1), gradient.reshape(len(down), -1)  # (pairs, 2 · D)
    expected = (down - up) / 2 / h / both.norm(dim=1) / long.norm(dim=1).mean()
    found = feedback.alignments(pairs, gradient)
    assert np.allclose(found, expected, atol=1e-4) and np.abs(found).max() > 0.01
    assert feedback.alignments(pairs, -toward).mean() == pytest.approx(1, abs=1e-4)
    across = long - (long * both).sum(1, keepdim=True) / both.square().sum(1, keepdim=True) * both
    assert np.allclose(feedback.alignments(pairs, across.reshape(pairs.cls.shape)), 0, atol=1e-4)


def test_the_gradient_is_the_slope_of_each_images_loss(seen):
    """Compared with a difference quotient of each image's loss, averaged over two draws, in float64."""
    args, _, diffusion, conditioner, pairs = seen
    gradient = feedback.feedback(args, diffusion, conditioner, pairs, pairs.cls, seed=5).double()
    conditioner, unet = copy.deepcopy(conditioner).double(), copy.deepcopy(diffusion.unet).double()
    local, latents = pairs.local.double(), pairs.latents.double()
    draws = train.Draws(5, conditioner.recap, 2, range(500, 1000))
    text, alphas = diffusion.text_embedding.double(), diffusion.alphas_cumprod.double()

    @torch.no_grad()
    def loss(i: int, token: torch.Tensor) -> float:
        losses = []
        for draw in range(2):
            rngs = train.image_rngs(5, [(draw, i)])
            patch_indices = draw_patch_indices(conditioner.recap, 2, rngs, CPU)
            timesteps, noise = train.draw_states(draws, (4, 8, 8), rngs, CPU)
            alpha = alphas[timesteps[0]][:, None, None, None]
            noisy = alpha**0.5 * latents[i] + (1 - alpha) ** 0.5 * noise[0]
            condition = conditioner.build_condition(token[None], local[[i]], text, patch_indices)
            losses.append(((unet(noisy, timesteps[0], condition[0]).sample - noise[0]) ** 2).mean().item())
        return sum(losses) / 2

    for i in (0, 4, 9):
        token, slope = pairs.cls[i].double(), gradient[i]
        h = 1e-3 * token.norm() / slope.norm()
        rise = (loss(i, token + h * slope) - loss(i, token - h * slope)) / (2 * h.item())
        assert rise == pytest.approx(slope.square().sum().item(), rel=1e-3)


def test_moves_along_the_words_win_every_pair(seen, monkeypatch):
    args, _, *rest, pairs = seen
    monkeypatch.setattr(feedback, "feedback", lambda *args: -words(pairs, args[-2]))
    row = feedback.measure(args, *rest, pairs)[0]["all"]
    assert row["scores"][0] < row["scores"][-1] == 100 and len(row["scores"]) == 9
    assert row["alignment"] == pytest.approx(1, abs=1e-4)
    alignments = feedback.alignments(pairs, -words(pairs, pairs.cls)).tolist()
    assert row["z"] == pytest.approx(fmean(alignments) / stdev(alignments) * 5**0.5, rel=1e-3)


def test_r2_is_that_of_the_regression(seen):
    """Compared with NumPy's correlation, and with a layer whose predictions have nothing to do with φ's embeddings."""
    args, clip, _, conditioner, _ = seen
    conditioner = copy.deepcopy(conditioner)
    random = feedback.fit_r2(args, clip, conditioner)
    clip_texts, phi_texts = beyond.embed_phrases(clip, args.diffusion, "", CPU)
    beyond.fit_linear(conditioner.projection, clip_texts, phi_texts, clip_texts[:100])
    fitted = feedback.fit_r2(args, clip, conditioner)
    new, expected = beyond.embed_phrases(clip, args.diffusion, "", CPU, count=500, seed=1)
    layer = conditioner.projection
    found = new.numpy() @ layer.weight.detach().numpy().T
    columns = [(x - x.mean(0)).ravel() for x in (found, expected.numpy())]
    assert fitted == pytest.approx(np.corrcoef(*columns)[0, 1] ** 2, rel=1e-4)
    assert random < 0.05 and 0.97 < fitted < 0.99


def test_the_command_prints_its_figures(capsys):
    """With one pair per type, the figures of all pairs are the types' means; training the layer changes them."""
    options = "--pairs 1 --draws 1 --moves 1 --states 1 --projection-steps 2 --projection random --batch-size 2"
    feedback.main(feedback.read_args([*options.split(), "--workers", "0"]))
    cost, start, end = re.split("\nrandom start |\nafter 2 steps of the layer ", capsys.readouterr().out)
    assert cost.startswith(f"{2 * 2 * 9 + 2 * 2} forward and backward")  # both images of nine pairs, twice; the layer
    row = r"^  (\S.*?) +([+-][\d.]{5})  +(?:nan|-?[\d.]+)  ([\d.]+) → ([\d.]+)"  # name, alignment, z of all, two scores
    before, after = re.findall(row, start, re.MULTILINE), re.findall(row, end, re.MULTILINE)
    assert [name for name, *_ in before] == [name for name, *_ in after] == [*TYPES, "all"] and before != after
    for rows in (before, after):
        *types, overall = np.array([figures for _, *figures in rows], float)
        alignment, *scores = np.mean(types, 0)
        assert overall[0] == pytest.approx(alignment, abs=1.1e-3) and overall[1:] == pytest.approx(scores, abs=0.06)


@pytest.mark.parametrize(
    "part, path, what",
    [
        (0, "model.visual", "the encoded benchmark"),
        (0, "model.transformer", "the encoded benchmark"),
        (1, "vae.encoder", "the encoded benchmark"),
        (2, "projection", "the gradient of the denoising loss"),
    ],
)
def test_figures_that_are_not_finite_are_refused(part, path, what, seen, monkeypatch):
    args, *modules = seen
    parts = copy.deepcopy(modules[:3])
    next(attrgetter(path)(parts[part]).parameters()).data.view(-1)[0] = float("nan")
    with pytest.raises(UserError, match=f"{what}: not finite"):
        pairs = feedback.Pairs(*parts[:2], read_mmvp(args.mmvp)[:1], 64, CPU)
        feedback.measure(args, *parts[1:], pairs)


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--draws 0", "--draws and --pairs must be at least 1"),
        ("--moves -1", "--moves at least 0"),
        ("--mmvp none", "--mmvp is needed"),
        ("--data synthetic --projection random --projection-steps 1", "trains the linear layer on images"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        feedback.read_args(options.split())
