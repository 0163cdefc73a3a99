"""The miniature: what lies in the repository is what make.py draws, and its diffusion model is a teacher."""

from test_smoke import CPU, run, settings, weights  # first: it sets what the libraries read when they are imported

import io
import math

import make
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPTextModel

import data
import model
import train
import beyond
from condition import VisualCondition, parse_recap
from harness.mmvp import read_mmvp
from harness.recipes import MINIATURE, TYPES


def test_the_miniature_is_what_its_script_draws(tmp_path):
    """The images and the benchmark in the repository are make.py's, within the rounding of another JPEG codec."""
    make.write_images(tmp_path)
    make.write_mmvp(tmp_path / "mmvp")
    embedded, drawn = (data.open_images([f"{folder}/images.tar"], False) for folder in (MINIATURE, tmp_path))
    assert len(embedded) == len(drawn) == 2000
    pictures = [(embedded.read(i), drawn.read(i)) for i in range(0, 2000, 125)]
    for pair, other in zip(*(read_mmvp(f"{folder}/mmvp") for folder in (MINIATURE, tmp_path)), strict=True):
        assert (pair.ids, pair.type, pair.statements) == (other.ids, other.type, other.statements)
        pictures += [(a.read_bytes(), b.read_bytes()) for a, b in zip(pair.images, other.images)]
    for both in pictures:
        one, other = (np.asarray(Image.open(io.BytesIO(content))).astype(int) for content in both)
        assert one.shape == (64, 64, 3) and np.abs(one - other).mean() < 2


def test_a_pair_differs_in_one_detail():
    pairs = read_mmvp(f"{MINIATURE}/mmvp")
    assert [pair.type for pair in pairs] == [name for name in TYPES for _ in range(100)]
    regions = {"Quantity": (0, 0, 45, 18), "Text": (46, 0, 64, 18)}  # else the thing and its ground, below
    for pair in pairs:
        words = [statement.split() for statement in pair.statements]
        said = {" ".join(word for word in words[i] if word not in words[1 - i]) for i in (0, 1)} - {""}
        phrases = make.DETAILS[pair.type]
        assert all(any(set(s.split()) <= set(phrase.split()) for phrase in phrases) for s in said)
        one, other = (np.asarray(Image.open(path)).astype(int) for path in pair.images)
        changed = np.abs(one - other).max(-1) > 60
        assert changed.any()
        left, top, right, bottom = regions.get(pair.type, (0, 0, 64, 64))
        outside = changed.copy()
        outside[top:bottom, left:right] = False
        assert not outside.any()
        if pair.type not in ("Color", *regions):
            assert not changed[:16].any()  # the stars and the sign stay


@pytest.fixture(scope="module")
def teacher() -> tuple:
    """The miniature's diffusion model, a reader of its captions, 80 unseen scenes, their pixels and latents."""
    folder = f"{MINIATURE}/diffusion"
    diffusion = model.load_diffusion(folder, "", torch.float32, CPU)
    tokenizer = AutoTokenizer.from_pretrained(folder, subfolder="tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32)
    scenes, rng = make.random_scenes(80, 41), np.random.default_rng(41)
    pixels = np.stack([np.asarray(make.draw(scene, rng)) for scene in scenes])
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255

    @torch.no_grad()
    def read(captions: list[str]) -> torch.Tensor:
        tokens = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        return encoder(tokens).last_hidden_state[:, None]  # (B, 1, L, W)

    return diffusion, read, scenes, pixels, diffusion.encode(pixels)


def unseen_losses(diffusion, latents: torch.Tensor, condition: torch.Tensor, lowest: int) -> np.ndarray:
    """train.py's loss of each four scenes under a condition, at t from `lowest`, with the same draws for every one."""
    losses = []
    for b in range(0, len(latents), 4):
        rng = np.random.default_rng(b)
        t = torch.from_numpy(rng.integers(lowest, 1000, (4, 4)))
        noise = torch.from_numpy(rng.standard_normal((4, 4, *latents.shape[1:]), dtype=np.float32))
        with torch.no_grad():
            losses.append(train.denoising_loss(diffusion, latents[b : b + 4], condition[b : b + 4], t, noise).item())
    return np.array(losses)


def clearly_lower(losses: np.ndarray, others: np.ndarray) -> bool:
    """By three standard errors of the difference."""
    rises = others - losses
    return rises.mean() > 3 * rises.std(ddof=1) / math.sqrt(len(rises))


def test_the_teacher_reads_its_captions(teacher):
    """train.py's loss with the right caption, and with one wrong in a single detail."""
    diffusion, read, scenes, _, latents = teacher
    scenes, latents, clear = scenes[:40], latents[:40], 0
    for k, values in enumerate(make.DETAILS.values(), start=2):
        named = np.isin(np.arange(10), (0, k - 1))  # the caption says class, colour and this detail
        wrong = scenes.copy()
        wrong[:, k] = (wrong[:, k] + 1) % len(values)
        sides = [read([make.caption(scene, named) for scene in side]) for side in (scenes, wrong)]
        clear += clearly_lower(*(unseen_losses(diffusion, latents, side, 300) for side in sides))
    assert clear >= 7


def test_a_fitted_class_token_says_more_than_the_empty_text(teacher):
    """On unseen scenes, before any training; and another scene's class token says less than nothing."""
    diffusion, _, scenes, pixels, latents = teacher
    args = settings("unused", "--recap none")
    clip, _, conditioner = train.build(args, CPU)
    beyond.fit_projection(args, clip, conditioner, data.TrainingImages(data.open_images(args.data), 64, 4))
    with torch.no_grad():
        own, _ = conditioner(clip.preprocess_batch(pixels), diffusion.text_embedding)
    nothing = diffusion.text_embedding[:, None].expand(len(scenes), -1, -1, -1)
    losses = [unseen_losses(diffusion, latents, c, 500) for c in (own, nothing, own.roll(1, 0))]
    assert clearly_lower(losses[0], losses[1]) and clearly_lower(losses[1], losses[2])


def test_the_linear_layer_alone_learns_to_say_more(teacher, tmp_path):
    """Forty steps from a random start: on unseen scenes the loss falls, and another scene's class token costs more."""
    diffusion, _, _, pixels, latents = teacher
    flags = "--recap none --batch-size 16 --micro-batch 16 --optimizer adamw"
    out = run(tmp_path / "run", f"{flags} --steps 40 --projection-steps 40 --projection-lr 0.003")
    clip = model.load_clip("miniature")
    torch.manual_seed(0)
    conditioner = VisualCondition(clip, diffusion, parse_recap("none", 64), "mean")
    with torch.no_grad():
        start, _ = conditioner(clip.preprocess_batch(pixels), diffusion.text_embedding)
        conditioner.load_state_dict(weights(out))
        end, _ = conditioner(clip.preprocess_batch(pixels), diffusion.text_embedding)
    losses = [unseen_losses(diffusion, latents, c, 0) for c in (end, start, end.roll(1, 0))]
    assert clearly_lower(losses[0], losses[1]) and clearly_lower(losses[0], losses[2])
