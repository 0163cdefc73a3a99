"""What DIVA does not do, and what its feedback was found to need on the miniature. Off in the paper's recipes.

To read the paper, skip this file. Here is what makes the default run work, and what its gain of 14.4 ± 0.8 points of
`cls` becomes without it (3,600 pairs, mean of five seeds; below, of two; miniature/README.md):

    beyond the paper                                          as in the paper                              gain
    the linear layer is fitted to texts (`fit_projection`)    it starts at random, and is trained along    +0.2
    … and frozen (`stages`)                                   it is fitted, and trained along              +10.8
    t is from 500 to 999 (--timesteps)                        t is from 0 to 999                           +2.3
    a pull toward the untouched CLIP (`Pull`)                 none; class accuracy falls by 15.1           −3.0
    AdamW (`build_optimizer` in train.py)                     SGD, at a rate of 0.3                        +6.5
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer

from condition import VisualCondition, visual_tokens
from data import TrainingImages, collate, to_device
from harness.errors import UserError
from harness.pretrained import quiet
from model import Clip, embed_texts


def stages(args, conditioner: VisualCondition) -> list[tuple[list[nn.Parameter], range, float]]:
    """What learns, in which steps, and up to which learning rate.

    With --projection-steps the linear layer learns alone first; with --freeze-projection it then stays as it is.
    GenHancer and DCR found that CLIP gains more in two such stages.
    """
    tower, layer = list(conditioner.visual.parameters()), list(conditioner.projection.parameters())
    first = (layer, range(args.projection_steps), args.projection_lr)
    second = (tower if args.freeze_projection else tower + layer, range(args.projection_steps, args.steps), args.lr)
    return [(parameters, steps, peak) for parameters, steps, peak in (first, second) if len(steps)]


class Pull:
    """Holds CLIP near to where it was: `strength` times the mean square distance of class tokens from the untouched
    CLIP's. Without it CLIP forgets.
    """

    def __init__(self, clip: Clip, strength: float):
        self.untouched = copy.deepcopy(clip.model.visual).requires_grad_(False)
        self.strength = strength

    def __call__(self, cls: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Class tokens (B, D) of prepared images (B, 3, s, s) → a scalar."""
        device = "cuda" if cls.is_cuda else "cpu"
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=cls.dtype == torch.bfloat16):
            before = self.untouched(images)
        return self.strength * (cls.float() - before.float()).square().mean()


def fit_projection(args, clip: Clip, conditioner: VisualCondition, images: TrainingImages) -> None:
    """Starts the linear layer where the U-Net expects a sentence, instead of at random: no image is needed with text.

    CLIP and φ read the same phrases, random words of φ's vocabulary. A ridge regression maps CLIP's embeddings of them
    to φ's states of their end token, which carries the sentence. An image's class token is no text: it is brought to
    the phrases' mean, and to their mean square distance from it.

    Raises:
        UserError: CLIP has no tokenizer, or there are fewer than two images, or one that cannot be read.
    """
    if len(images) < 2:
        raise UserError("--projection fitted: needs two images at least; use --projection random")
    device = conditioner.projection.weight.device
    texts, states = embed_phrases(clip, args.diffusion, args.text, device)
    tokens = class_tokens(clip, images, min(1000, len(images)), device)
    fit_linear(conditioner.projection, texts, states, tokens)


@torch.no_grad()
def fit_linear(projection: nn.Linear, texts: torch.Tensor, states: torch.Tensor, tokens: torch.Tensor) -> None:
    """The fit itself, into `projection` D → W.

    Args:
        texts: (n, D), CLIP's embeddings of phrases.
        states: (n, W), φ's states of the end token, less that of the text that joins.
        tokens: (m, D), the class tokens of some images.
    """
    texts, states, tokens = texts.double(), states.double(), tokens.double()
    x, y, centred = texts - texts.mean(0), states - states.mean(0), tokens - tokens.mean(0)
    covariance = x.T @ x / len(x)  # (D, D)
    ridge = 0.01 * covariance.diagonal().mean() * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(covariance + ridge, x.T @ y / len(x))  # (D, W), from texts to states
    weight *= (x.square().mean() / centred.square().mean()).sqrt()  # and from images
    projection.weight.copy_(weight.T)
    projection.bias.copy_(states.mean(0) - tokens.mean(0) @ weight)


def embed_phrases(clip: Clip, name: str, text: str, device, count: int = 2000) -> tuple[torch.Tensor, torch.Tensor]:
    """What CLIP and the diffusion model `name` make of the same phrases; so no captions are needed.

    Returns CLIP's embeddings (count, D), and φ's states of the end token less that of `text` (count, W).
    Subtracting the mean of the text's states instead, which is what `--join mean` adds, taught CLIP less
    (miniature/README.md).
    """
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(name, subfolder="tokenizer", trust_remote_code=False)
        vocabulary = tokenizer.get_vocab()
        whole = [word for word in vocabulary if word.endswith("</w>")] or list(vocabulary)  # BPE marks a word's end
        words = sorted(word for word in (w.removesuffix("</w>") for w in whole) if word.isalpha())
        rng = np.random.default_rng(0)
        phrases = [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(count)]
        states = embed_texts(name, [text, *phrases], device, end_only=True)  # (1 + count, W)
    with torch.no_grad():
        ids = clip.tokenizer()(phrases).to(device)
        embeddings = torch.cat([clip.model.encode_text(part) for part in ids.split(64)])  # (count, D)
    return embeddings, states[1:] - states[0]


@torch.no_grad()
def class_tokens(clip: Clip, images: TrainingImages, count: int, device: torch.device) -> torch.Tensor:
    """The class tokens of the first `count` images of training, (count, D)."""
    tokens = []
    for start in range(0, count, 50):
        batch = collate([images[0, i] for i in range(start, min(start + 50, count))])
        pixels = to_device(batch, device)["images"]
        tokens.append(visual_tokens(clip.model.visual, clip.prepare(pixels))[0])
    return torch.cat(tokens)
