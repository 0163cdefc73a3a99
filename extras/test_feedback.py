"""extras/feedback.py: the gradient is the loss's own slope, the needle is the slope of the margins along it."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from extras import feedback
from harness.errors import UserError
from harness.mmvp import read_mmvp
from harness.options import parse_args
from harness.recipes import MINIATURE

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def seen() -> tuple:
    """The miniature's parts as train.py builds them, and five pairs of its benchmark."""
    args = parse_args(["--data=synthetic", "--projection=random", "--states=2"])
    args.precision = "fp32"
    parts = train.build(args, CPU, None)
    parts[2].requires_grad_(False)
    return parts, feedback.Pairs(parts[0], parts[1], read_mmvp(f"{MINIATURE}/mmvp")[:450:90], 64, CPU)


def margins(pairs: feedback.Pairs, cls: torch.Tensor) -> torch.Tensor:
    """How much nearer each pair's statements are to their own image, by hand, (pairs,)."""
    found = []
    for p, texts in enumerate(pairs.texts.double()):
        images = [v / v.norm() for v in cls[2 * p : 2 * p + 2].double()]
        found.append(texts[0] @ (images[0] - images[1]) + texts[1] @ (images[1] - images[0]))
    return torch.stack(found)


def test_the_needle_is_the_slope_of_the_margins(seen):
    """Against a difference quotient; 1 on the average where the gradient is the words' own, 0 where it is across."""
    _, pairs = seen
    gradient = torch.from_numpy(np.random.default_rng(0).normal(size=pairs.cls.shape)).float()
    slopes = torch.autograd.functional.jacobian(lambda cls: margins(pairs, cls), pairs.cls)  # (pairs, images, D)
    words = slopes.sum(0)  # an image is in one pair only
    h = 1e-4
    rise = (
        (margins(pairs, pairs.cls.double() - h * gradient) - margins(pairs, pairs.cls.double() + h * gradient)) / 2 / h
    )
    lengths = [torch.cat([v[2 * p], v[2 * p + 1]]).norm() for v in (words, gradient) for p in range(len(rise))]
    steep, long = torch.stack(lengths).unflatten(0, (2, -1))
    found = feedback.needles(pairs, gradient)
    assert np.allclose(found, rise / steep / long.mean(), atol=1e-4) and np.abs(found).max() > 0.01
    assert feedback.needles(pairs, -words).mean() == pytest.approx(1, abs=1e-4)
    both = words.unflatten(0, (-1, 2)).flatten(1)
    across = gradient.unflatten(0, (-1, 2)).flatten(1)
    across = across - (across * both).sum(1, keepdim=True) / both.square().sum(1, keepdim=True) * both
    assert np.allclose(feedback.needles(pairs, across.unflatten(1, (2, -1)).flatten(0, 1)), 0, atol=1e-4)


def test_the_gradient_is_the_slope_of_each_images_loss(seen):
    """Each image's own loss, the mean over two draws, rises along its gradient, whatever else is in the batch."""
    parts, pairs = seen
    _, diffusion, conditioner, dataset = parts
    gradient = feedback.feedback(parts, pairs, pairs.cls, draws=2, at_once=3, seed=5, what="")

    @torch.no_grad()
    def loss(i: int, token: torch.Tensor) -> float:
        found = []
        for draw in range(2):
            drawn = dataset.draw(np.random.default_rng((5, draw, i)))
            drawn = {key: torch.from_numpy(value)[None] for key, value in drawn.items()}
            condition = conditioner.condition(token[None], pairs.local[[i]], diffusion.text)
            found.append(train.denoising_loss(diffusion, pairs.latents[[i]], condition, **drawn).double())
        return float(sum(found) / 2)

    for i in (0, 4, 9):
        token, slope = pairs.cls[i], gradient[i]
        h = 0.02 * token.norm() / slope.norm()
        assert (loss(i, token + h * slope) - loss(i, token - h * slope)) / (2 * h) == pytest.approx(
            float(slope.square().sum()), rel=0.03
        )


def test_moves_along_the_words_win_every_pair(seen, monkeypatch):
    parts, pairs = seen
    own = argparse.Namespace(draws=1, moves=8)

    def words(parts, pairs, cls, *rest):
        return -torch.autograd.functional.jacobian(lambda cls: margins(pairs, cls), cls).sum(0)

    monkeypatch.setattr(feedback, "feedback", words)
    found = feedback.measure(parts, pairs, own, 8, 0)
    assert found["scores"][0] < found["scores"][-1] == 100 and len(found["scores"]) == 9
    assert found["needle"]["all"]["mean"] == pytest.approx(1, abs=1e-4)


def test_the_command_prints_and_writes_its_figures(tmp_path, capsys):
    options = "--pairs 1 --draws 1 --moves 1 --states 1 --projection-steps 2 --projection random --batch-size 2"
    feedback.main([*options.split(), "--workers", "0", "--json", str(tmp_path / "f.json")])
    stages = json.loads((tmp_path / "f.json").read_text())["stages"]
    printed = capsys.readouterr().out
    assert list(stages) == ["random start", "linear layer after step 2"]
    first, second = (stage["needle"] for stage in stages.values())
    assert len(first) == 10 and first != second  # nine types and all: the layer has learnt
    assert all(f"{row['mean']:+.3f}" in printed for stage in (first, second) for row in stage.values())


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--draws 0", "--draws and --pairs must be at least 1"),
        ("--json nowhere/f.json", "there is no such folder"),
        ("--recipe openai-vit-l-14-224 --data synthetic --mmvp=", "--mmvp is needed"),
        ("--data synthetic", "the linear layer is fitted to images"),
        ("--recipe openai-vit-l-14-224 --mmvp x", "--data is needed"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        feedback.main(options.split())
