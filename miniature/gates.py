"""Four gates that a world must pass to be worth an experiment. `make.py check` prints them.

    1  CLIP knows classes (zero-shot, ≥ 85%) but overlooks details (pair score from 25 to 60), and can learn them: 100
       steps of its vision tower on full captions raise the pair score
    2  the VAE keeps the details: a linear probe predicts them from latents and reconstructions nearly as well as from
       the images
    3  the diffusion model reads its captions: its loss is higher if one detail of a caption is wrong (z > 5 for at
       least seven of nine); and it reads the end token alone, which lowers the loss 90% as much as the whole caption
    4  pictures that it draws from captions match them (judged by eye)
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch.nn import functional as F

from evaluate_mmvp import EMBEDDINGS, pairs_right, similarities
from extras.zero_shot import classify
from harness.mmvp import read_mmvp
from harness.scores import average, interval
from miniature.models import DEVICE, embed_captions, encode, learn_captions, pool
from miniature.world import (
    CLASSES, DETAILS, DIFFUSION_NAMES, PREFIX, SIZE, VALUES, caption, draw, random_scenes, write_mmvp,
)  # fmt: skip
from model import load_clip


def check(out: Path, samples: str | None = None) -> None:
    """Prints the gates of the world in `out`; gate 4 writes its pictures to the file `samples`."""
    scenes, pixels = pool(4000, 12)
    check_clip(out / "clip", scenes, pixels)
    pipe = StableDiffusionPipeline.from_pretrained(out / "diffusion", torch_dtype=torch.float32).to(DEVICE)
    latents = check_vae(pipe.vae, scenes, pixels)
    check_reading(pipe, scenes[:2000], latents[:2000])
    if samples:
        draw_samples(pipe, samples)


def gate(text: str, passed: bool) -> None:
    print(f"    {text}  {'passed' if passed else 'NOT PASSED'}", flush=True)


def check_clip(folder: Path, scenes: np.ndarray, pixels: torch.Tensor) -> None:
    """Gate 1. Trains on the scenes and pixels for 100 steps with full captions."""
    print("1  CLIP knows classes but overlooks details")
    clip = load_clip(str(folder), device=str(DEVICE))
    accuracy = unseen_accuracy(clip)
    gate(f"class, zero-shot, 3,000 unseen pictures: {accuracy:.1f}% (≥ 85)", accuracy >= 85)
    with tempfile.TemporaryDirectory() as benchmark:
        write_mmvp(Path(benchmark), pairs=100, seed=11)
        pairs = read_mmvp(benchmark)
        types = [pair.type for pair in pairs]
        before = pairs_right(similarities(clip, pairs, DEVICE))
        for embedding, right in zip(EMBEDDINGS, before):
            score, (low, high) = average(right, types), interval(right, types)
            fits = 25 < score < 60
            gate(f"pair score, 900 unseen pairs, {embedding}: {score:.1f} ({low:.1f}–{high:.1f}) (25–60)", fits)
        learn_captions(clip.model, scenes, pixels, 12)
        after = pairs_right(similarities(clip, pairs, DEVICE))[0]
    low, high = interval(after.astype(int) - before[0], types)
    text = f"after 100 steps of its vision tower on full captions: {average(after, types):.1f}"
    gate(f"{text}, {low:+.1f} to {high:+.1f} points (> 0)", low > 0)


@torch.no_grad()
def check_vae(vae, scenes: np.ndarray, pixels: torch.Tensor) -> torch.Tensor:
    """Gate 2. Returns the latents (n, 4, 8, 8)."""
    print("2  the VAE keeps the details: a linear probe's accuracy from images, reconstructions, latents, in percent")
    latents = encode(vae, pixels, vae.config.scaling_factor)
    decoded = torch.cat([vae.decode(z / vae.config.scaling_factor).sample for z in latents.split(250)])
    reads = [ridge(x.cpu(), scenes[:3000]) for x in (pixels, decoded, latents)]
    accuracies = [100 * (read == scenes[3000:]).mean(0)[2:] for read in reads]
    for name, values, image, reconstruction, latent in zip(DETAILS, VALUES[2:], *accuracies):
        text = f"{name:21} {image:5.1f} {reconstruction:5.1f} {latent:5.1f} (chance {100 / values:.0f})"
        gate(text, min(reconstruction, latent) > image - 5)
    return latents


def check_reading(pipe: StableDiffusionPipeline, scenes: np.ndarray, latents: torch.Tensor) -> None:
    """Gate 3."""
    print("3  the diffusion model reads: its loss rises if one detail is wrong (2,000 unseen pictures, t ≥ 300)")
    parts, clear = list(zip(np.split(scenes, range(250, len(scenes), 250)), latents.split(250))), 0
    for k, name in enumerate(DETAILS, start=2):
        rng, rises = np.random.default_rng(k), []
        for right, z in parts:
            wrong = right.copy()
            wrong[:, k] = (wrong[:, k] + rng.integers(1, VALUES[k], len(wrong))) % VALUES[k]
            named = np.isin(np.arange(10), (0, k - 1))  # the captions name class, colour and this detail
            readings = [([caption(scene, named) for scene in side], False) for side in (right, wrong)]
            of_right, of_wrong = losses(pipe, z, readings, 300, rng)
            rises.append(of_wrong - of_right)
        rise = torch.cat(rises).double()
        z_value = (rise.mean() / (rise.std() / len(rise) ** 0.5)).item()
        clear += z_value > 5
        print(f"    {name:21} {rise.mean():+.5f}  z = {z_value:.1f}")
    gate(f"z > 5 for {clear} of nine (≥ 7)", clear >= 7)

    rng, found = np.random.default_rng(14), []
    for part, z in parts:
        named = rng.random((len(z), 10)) < DIFFUSION_NAMES
        captions = [caption(scene, n) for scene, n in zip(part, named)]
        found.append(losses(pipe, z, [([""] * len(z), False), (captions, False), (captions, True)], 0, rng))
    none, whole, alone = torch.cat(found, 1).mean(1).tolist()
    share = 100 * (none - alone) / (none - whole)
    text = f"loss without a caption {none:.4f}, with one {whole:.4f}, with its end token alone {alone:.4f}"
    gate(f"{text}: {share:.0f}% of the caption's effect (≥ 90)", share >= 90)


@torch.no_grad()
def losses(pipe: StableDiffusionPipeline, latents: torch.Tensor, readings: list, lowest: int, rng) -> torch.Tensor:
    """The denoising losses (readings, B) of latents (B, 4, 8, 8), all with the same noise and timesteps ≥ `lowest`.

    Each of the `readings` is a list of B captions, and whether only their end tokens are read.
    """
    t = torch.from_numpy(rng.integers(lowest, 1000, len(latents))).to(DEVICE)
    noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32)).to(DEVICE)
    noisy, found = pipe.scheduler.add_noise(latents, noise, t), []
    for captions, alone in readings:
        embeddings = embed_captions(pipe.text_encoder, captions, pipe.tokenizer, alone)
        found.append((pipe.unet(noisy, t, embeddings).sample - noise).square().mean((1, 2, 3)))
    return torch.stack(found)


def draw_samples(pipe: StableDiffusionPipeline, file: str) -> None:
    """Gate 4."""
    rng = np.random.default_rng(13)
    captions = [caption(scene, rng.random(10) < DIFFUSION_NAMES) for scene in random_scenes(24, 13)]
    torch.manual_seed(0)
    sheet = Image.new("RGB", (8 * SIZE, 3 * SIZE))
    for i, image in enumerate(pipe(captions, num_inference_steps=50, guidance_scale=2.0).images):
        sheet.paste(image, (i % 8 * SIZE, i // 8 * SIZE))
    sheet.resize((16 * SIZE, 6 * SIZE), Image.Resampling.NEAREST).save(file)
    print("4  the captions of the pictures, row by row:\n    " + "\n    ".join(captions))


def ridge(x: torch.Tensor, labels: np.ndarray, penalty: float = 0.1) -> np.ndarray:
    """A linear probe: ridge regression on one-hot labels, fitted to the first rows of `x`, then applied to the others.

    Args:
        x: (n, ...), features.
        labels: (fitted, columns) int, those of the first rows.

    Returns:
        The labels of the other rows, (n − fitted, columns) int.
    """
    fitted, x = len(labels), x.flatten(1).float()
    x = (x - x[:fitted].mean(0)) / (x[:fitted].std(0) + 1e-6) / x.shape[1] ** 0.5
    x, others = x[:fitted], x[fitted:]
    one_hot = [F.one_hot(torch.from_numpy(column)).double() for column in labels.T]
    targets = torch.cat(one_hot, 1)  # (fitted, all labels)
    mean = targets.mean(0)

    def solve(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.linalg.solve((a @ a.T).double() + penalty * torch.eye(len(a)), b)

    if fitted > x.shape[1]:  # both branches give the same weight; solve the smaller system
        weight = solve(x.T, x.T.double() @ (targets - mean))
    else:
        weight = x.T.double() @ solve(x, targets - mean)
    scores = (others.double() @ weight + mean).split([column.shape[1] for column in one_hot], 1)
    return torch.stack([s.argmax(1) for s in scores], 1).numpy()


def unseen_accuracy(clip) -> float:
    """Zero-shot accuracy in percent, over the ten classes, on 3,000 scenes that no training has drawn."""
    scenes, rng = random_scenes(3000, 10), np.random.default_rng(10)
    batches = torch.stack([clip.preprocess_image(draw(scene, rng)) for scene in scenes]).split(250)
    named = classify(clip, batches, CLASSES, DEVICE, [PREFIX + "the {}"])
    return 100 * float((named == scenes[:, 0]).mean())
