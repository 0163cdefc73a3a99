"""Additions to DIVA that made it work on the miniature. All are off in the paper's recipes.

You do not need this file to follow the paper. The default run uses four additions; miniature/README.md has the gain
without each.

    addition                                             the paper
    the linear layer is fitted to random phrases and     it starts at random and is trained with CLIP
      frozen (`fit_projection`, `stages`)
    t is drawn from 500 to 999 (--timesteps)             from 0 to 999
    a penalty keeps the class token close to the         no penalty
      original's (`Ldifs`)
    AdamW (`build_optimizer` in train.py)                SGD
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
from harness.pretrained import find_diffusion, quiet
from model import Clip, embed_texts


def stages(args, conditioner: VisualCondition) -> list[tuple[list[nn.Parameter], range, float]]:
    """What each `Stage` of a run needs, in order: the parameters to train, the steps, the maximum learning rate.

    The first --projection-steps train the linear layer alone, with CLIP frozen, as in GenHancer (ICCV 2025) and DCR
    (CVPR 2026). With --freeze-projection the rest of the run trains CLIP alone.
    """
    tower, layer = list(conditioner.visual.parameters()), list(conditioner.projection.parameters())
    first = (layer, range(args.projection_steps), args.projection_lr)
    second = (tower if args.freeze_projection else tower + layer, range(args.projection_steps, args.steps), args.lr)
    return [(parameters, step_range, max_lr) for parameters, step_range, max_lr in (first, second) if len(step_range)]


class Ldifs:
    """A penalty that keeps the class token close to the original CLIP's; without it CLIP forgets classes.

    LDIFS, the L2 distance in feature space (Mukhoti et al., arXiv 2308.10320, TMLR 2024), on the class token alone:
    `weight` times the mean squared difference.
    """

    def __init__(self, clip: Clip, weight: float):
        self.original, self.preprocess = copy.deepcopy(clip.model.visual).requires_grad_(False), clip.preprocess_batch
        self.weight = weight

    def __call__(self, cls: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Class tokens (B, D) of images (B, 3, S, S) in [0, 1] → a scalar."""
        device = "cuda" if cls.is_cuda else "cpu"
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=cls.dtype == torch.bfloat16):
            original_cls = self.original(self.preprocess(images))
        return self.weight * (cls.float() - original_cls.float()).square().mean()


def fit_projection(args, clip: Clip, conditioner: VisualCondition, dataset: TrainingImages) -> None:
    """Fits the linear layer to random phrases, in closed form, instead of initializing it at random.

    It needs no captions: CLIP and φ embed the same phrases, random words of φ's vocabulary. A ridge regression maps
    CLIP's embedding of a phrase to φ's embedding of its end token, which decides most of the image at high noise in
    Stable Diffusion ("Towards Understanding the Working Mechanism of Text-to-Image Diffusion Model", NeurIPS 2024).
    Class tokens of images and embeddings of texts lie apart (the modality gap), so the layer also shifts and scales
    class tokens to the phrases' mean and variance. "The CLIP Model is Secretly an Image-to-Prompt Converter" (NeurIPS
    2023) also derives such a layer in closed form: it inverts the text projection of a text tower that CLIP and φ
    share. This fit needs no shared tower.

    Raises:
        UserError: CLIP has no tokenizer, or there are fewer than two readable images.
    """
    if len(dataset) < 2:
        raise UserError("--projection fitted: needs at least two images; use --projection random")
    device = conditioner.projection.weight.device
    clip_texts, phi_texts = embed_phrases(clip, args.diffusion, args.text, device)
    cls = class_tokens(clip, dataset, min(1000, len(dataset)), device)
    fit_linear(conditioner.projection, clip_texts, phi_texts, cls)


@torch.no_grad()
def fit_linear(projection: nn.Linear, clip_texts: torch.Tensor, phi_texts: torch.Tensor, cls: torch.Tensor) -> None:
    """Solves the ridge regression, and writes it into `projection`, D → W.

    The ridge is 0.3 times the mean variance. With 0.01 the fit predicts new phrases better, but CLIP mostly gains less
    if φ's text tower is not its own: class tokens follow their captions badly in directions in which texts vary little.

    Args:
        clip_texts: (n, D), CLIP's embeddings of phrases.
        phi_texts: (n, W), φ's embeddings of their end tokens, minus that of --text.
        cls: (m, D), the class tokens of some images.
    """
    clip_texts, phi_texts, cls = clip_texts.double(), phi_texts.double(), cls.double()
    x, y, centered_cls = clip_texts - clip_texts.mean(0), phi_texts - phi_texts.mean(0), cls - cls.mean(0)
    covariance = x.T @ x / len(x)  # (D, D)
    ridge = 0.3 * covariance.diagonal().mean() * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weight = torch.linalg.solve(covariance + ridge, x.T @ y / len(x))  # (D, W), maps texts
    weight *= (x.square().mean() / centered_cls.square().mean()).sqrt()  # maps class tokens, whose variance differs
    projection.weight.copy_(weight.T)
    projection.bias.copy_(phi_texts.mean(0) - cls.mean(0) @ weight)


def embed_phrases(
    clip: Clip, name: str, text: str, device, count: int = 2000, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`count` random phrases, embedded by CLIP and by the diffusion model `name`.

    Returns CLIP's embeddings (count, D), and φ's embeddings of the end token minus that of `text` (count, W). `--join
    mean` adds the text embedding's mean over positions, but subtracting that mean here made CLIP learn less
    ("mean-corrected fit" in miniature/chosen.csv).
    """
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(find_diffusion(name) / "tokenizer", trust_remote_code=False)
        vocabulary = tokenizer.get_vocab()
        whole = [word for word in vocabulary if word.endswith("</w>")] or list(vocabulary)  # BPE marks a word's end
        words = sorted(word for word in (w.removesuffix("</w>") for w in whole) if word.isalpha())
        rng = np.random.default_rng(seed)
        phrases = [" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(count)]
        embeddings = embed_texts(name, [text, *phrases], device, end_only=True)  # (1 + count, W)
    with torch.no_grad():
        ids = clip.tokenizer()(phrases).to(device)
        clip_texts = torch.cat([clip.model.encode_text(part) for part in ids.split(64)])  # (count, D)
    return clip_texts, embeddings[1:] - embeddings[0]


@torch.no_grad()
def class_tokens(clip: Clip, dataset: TrainingImages, count: int, device: torch.device) -> torch.Tensor:
    """The class tokens of the first `count` training images, (count, D)."""
    tokens = []
    for start in range(0, count, 50):
        batch = collate([dataset[0, i] for i in range(start, min(start + 50, count))])
        images = to_device(batch, device)["images"]
        tokens.append(visual_tokens(clip.model.visual, clip.preprocess_batch(images))[0])
    return torch.cat(tokens)
