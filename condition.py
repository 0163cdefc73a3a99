"""From an image to the diffusion model's condition: Algorithm 1, lines 2 and 3 (paper, section 3.3).

visual tokens V  →  dense recap  →  linear layer  →  joined with the text's embedding  =  condition c
"""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from harness.errors import UserError
from harness.recipes import Recap


def visual_tokens(visual: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP's visual tokens of an image (Alg. 1, line 2): the class token and the local patch tokens.

    For a ViT both are taken after the tower's final LayerNorm and carried through CLIP's visual projection into the
    joint space. For a timm tower that pools by attention (SigLIP) the pooled vector plays the class token, and the
    local tokens are the trunk's outputs, which are not in the joint space. The class token equals
    `clip.encode_image(images)` to the last bit in fp32.

    Args:
        visual: the vision tower of an open_clip CLIP.
        images: (B, 3, s, s), preprocessed as this CLIP asks.

    Returns:
        The class token (B, D) and the P local tokens (B, P, D).
    """
    out = visual.forward_intermediates(images, indices=1, normalize_intermediates=True, output_fmt="NLC")
    local = out["image_intermediates"][-1]
    if getattr(visual, "proj", None) is not None:
        local = local @ visual.proj  # on its own: one product for class and patches would round differently
    return out["image_features"], local


def dense_recap(
    cls: torch.Tensor, local: torch.Tensor, recap: Recap, patches: torch.Tensor | None = None
) -> torch.Tensor:
    """Visual dense recap (section 3.3; Alg. 1, line 3): the class token and a part of the local tokens.

    The paper: with all local tokens, reconstruction is too easy to teach anything; with none, it is too hard. (Two
    later methods, GenHancer and DCR, found the class token alone to be best.)

    Args:
        cls: (B, D).
        local: (B, P, D).
        recap: of `recipes.parse_recap`: K local tokens; "pool" averages them in windows and drops a last short one.
        patches: (B, N, K) int64, for "random": which patches join in each of the N states.

    Returns:
        (B, N, 1 + K, D); N is 1 where the states do not differ.
    """
    if recap.kind == "random":
        rows = torch.arange(len(local), device=local.device)[:, None, None]
        chosen = local[rows, patches]  # (B, N, K, D)
    else:  # "all" is windows of one, "none" no window
        windows = local[:, : recap.count * recap.window].unflatten(1, (recap.count, recap.window))
        chosen = windows.mean(2)[:, None]  # (B, 1, K, D)
    cls = cls[:, None, None].expand(-1, chosen.shape[1], -1, -1)  # (B, N, 1, D)
    return torch.cat([cls, chosen], dim=2)


def draw_patches(patches: int, count: int, states: int, rng: np.random.Generator) -> np.ndarray:
    """For each noisy state, `count` of an image's `patches` patches without replacement: (states, count) int64."""
    return np.stack([rng.permutation(patches)[:count] for _ in range(states)])


class VisualCondition(nn.Module):
    """All that is trained: CLIP's vision tower θ and the linear layer into the U-Net's cross-attention. DDP wraps this.

    Args:
        clip, diffusion: of model.py; `diffusion` is not kept: φ stays outside what is trained and synchronised.
        recap: of `recipes.parse_recap`.
        join: "positions" adds the text's embedding position by position, "mean" its mean over positions to every token.
        seed: of the linear layer's random start, the same on every device.
    """

    def __init__(self, clip, diffusion, recap: Recap, join: str, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.visual = clip.model.visual
        self.projection = nn.Linear(clip.config["embed_dim"], diffusion.text.shape[-1])  # D → W
        self.recap, self.join, self.dtype = recap, join, diffusion.unet.dtype

    def forward(self, images: torch.Tensor, text: torch.Tensor, patches: torch.Tensor | None = None) -> tuple:
        """Images for CLIP (B, 3, s, s), text (1, L, W), patches (B, N, K) or None → condition c (B, N, 1 + K, W), and
        the class token (B, D) behind it.

        N is 1 where the states share c. A class token alone that joins by position is added at all L positions but the
        first: (B, 1, L, W).
        """
        kind = "cuda" if images.is_cuda else "cpu"
        with torch.autocast(kind, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            cls, local = visual_tokens(self.visual, images)  # Alg. 1, line 2: V
            return self.condition(cls, local, text, patches), cls  # Alg. 1, line 3: c

    def condition(self, cls, local, text, patches=None) -> torch.Tensor:
        """Visual tokens (B, D) and (B, P, D) → condition c; the rest as in `forward` (Alg. 1, line 3)."""
        tokens = self.projection(dense_recap(cls, local, self.recap, patches))  # (B, N, 1 + K, W)
        if self.join == "mean":
            return tokens + text.mean(1, keepdim=True)
        if self.recap.kind == "none":  # one token, added at every position but the first, the start token's
            tokens = F.pad(tokens.expand(-1, -1, text.shape[1] - 1, -1), (0, 0, 1, 0))  # (B, 1, L, W)
        return tokens + text


@torch.no_grad()
def fit_projection(projection: nn.Linear, phrases: torch.Tensor, states: torch.Tensor, tokens: torch.Tensor) -> None:
    """Starts the linear layer where the U-Net expects a sentence, instead of at random; not the paper's.

    A ridge regression maps CLIP's text embeddings of some phrases to φ's states of the same phrases. An image's class
    token is no text: it is first brought to the phrases' mean and covariance, by the linear map that moves it least
    (optimal transport between two normal distributions).

    Args:
        projection: D → W, changed in place.
        phrases: (n, D), CLIP's text embeddings.
        states: (n, W), φ's states of the end token, less that of the text that joins.
        tokens: (m, D), the class tokens of some images.
    """
    x, y, v = (a.double() - a.double().mean(0) for a in (phrases, states, tokens))
    text, image = (a.T @ a / len(a) for a in (x, v))  # covariances, (D, D)
    eye = torch.eye(len(text), dtype=torch.float64, device=text.device)
    text_to_state = torch.linalg.solve(text + 0.01 * text.trace() / len(text) * eye, x.T @ y / len(x))  # (D, W)
    image = image + 0.02 * image.trace() / len(image) * eye
    root, inverse = matrix_power(image, 0.5), matrix_power(image, -0.5)
    image_to_text = inverse @ matrix_power(root @ text @ root, 0.5) @ inverse  # (D, D), symmetric
    weight = image_to_text @ text_to_state  # (D, W)
    projection.weight.copy_(weight.T)
    projection.bias.copy_(states.double().mean(0) - tokens.double().mean(0) @ weight)


def matrix_power(symmetric: torch.Tensor, power: float) -> torch.Tensor:
    """A power of a symmetric matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(symmetric)
    return vectors * values.clamp(min=1e-12) ** power @ vectors.T


def count_patches(visual: nn.Module) -> int:
    """P, the number of local tokens of a vision tower of open_clip.

    Raises:
        UserError: it is neither a ViT that pools by class token nor a timm tower that pools by attention.
    """
    if getattr(visual, "pool_type", None) == "tok" and visual.attn_pool is None and not visual.final_ln_after_pool:
        return visual.grid_size[0] * visual.grid_size[1]
    trunk = getattr(visual, "trunk", None)
    if getattr(trunk, "attn_pool", None) is not None and isinstance(trunk.head, nn.Identity) and not len(visual.head):
        return trunk.patch_embed.num_patches
    raise UserError("this vision tower is neither a ViT with a class token nor a timm one that pools by attention")
