"""From an image to the diffusion model's condition: Algorithm 1, lines 2 and 3 (paper, section 3.3).

    visual tokens V  →  dense recap  →  linear layer  →  joined with the text's embedding  =  condition c
"""

import numpy as np
import torch
from torch import nn


def count_patches(visual: nn.Module) -> int:
    """P, the number of local tokens of a vision tower of open_clip.

    Raises:
        SystemExit: it is neither a ViT that pools by class token nor a timm tower that pools by attention.
    """
    if getattr(visual, "pool_type", None) == "tok" and visual.attn_pool is None and not visual.final_ln_after_pool:
        return visual.grid_size[0] * visual.grid_size[1]
    trunk = getattr(visual, "trunk", None)
    if getattr(trunk, "attn_pool", None) is not None and isinstance(trunk.head, nn.Identity) and not len(visual.head):
        return trunk.patch_embed.num_patches
    raise SystemExit("this vision tower is neither a ViT with a class token nor a timm one that pools by attention")


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


def draw_patches(patches: int, count: int, states: int, rng: np.random.Generator) -> np.ndarray:
    """For each noisy state, `count` of an image's `patches` patches without replacement: (states, count) int64."""
    return np.stack([rng.permutation(patches)[:count] for _ in range(states)])


def dense_recap(
    cls: torch.Tensor, local: torch.Tensor, patches: torch.Tensor | None, window: int | None
) -> torch.Tensor:
    """Visual dense recap (section 3.3; Alg. 1, line 3): the class token and a part of the local tokens.

    The class token alone makes the reconstruction too hard to teach anything, all patches make it too easy.

    Args:
        cls: (B, D).
        local: (B, P, D).
        patches: (B, N, K) int64, the random patches of each of N states; K = 0 leaves the class token alone.
            None: every local token, the same for all states.
        window: without patches, local tokens are averaged in runs of this many; a last incomplete run is dropped.

    Returns:
        (B, N, 1 + K, D); N is 1 where the states do not differ.
    """
    if patches is None:
        runs = local.shape[1] // window
        chosen = local[:, : runs * window].unflatten(1, (runs, window)).mean(2)[:, None]  # (B, 1, P // window, D)
    else:
        rows = torch.arange(len(local), device=local.device)[:, None, None]
        chosen = local[rows, patches]  # (B, N, K, D)
    cls = cls[:, None, None].expand(-1, chosen.shape[1], -1, -1)  # (B, N, 1, D)
    return torch.cat([cls, chosen], dim=2)


@torch.no_grad()
def fit_projection(projection: nn.Linear, phrases: torch.Tensor, states: torch.Tensor, tokens: torch.Tensor) -> None:
    """Starts the linear layer where the U-Net's cross-attention expects words, in place of at random; not the paper's.

    Least squares (a ridge of a hundredth of the variance) from CLIP's embeddings of some phrases to φ's own text
    states of the same phrases. Visual tokens are no texts, so they are first brought to the phrases' mean and spread.

    Args:
        projection: D → W, changed in place.
        phrases: (n, D), CLIP's text embeddings.
        states: (n, W), φ's text states less those of the text that joins.
        tokens: (m, D), the visual tokens of some images.
    """
    spread = phrases.var(0).mean().sqrt()
    x, y = (phrases - phrases.mean(0)) / spread, states - states.mean(0)
    weight = torch.linalg.solve(x.T @ x + 0.01 * len(x) * torch.eye(x.shape[1], device=x.device), x.T @ y)  # (D, W)
    weight /= tokens.var(0).mean().sqrt()
    projection.weight.copy_(weight.T)
    projection.bias.copy_(states.mean(0) - tokens.mean(0) @ weight)


class VisualCondition(nn.Module):
    """All that is trained: CLIP's vision tower θ and the linear layer into the U-Net's cross-attention. DDP wraps this.

    Args:
        clip, diffusion: of model.py; `diffusion` is not kept: φ stays outside what is trained and synchronised.
        recap: of `model.parse_recap`.
        join: "positions" adds the text's embedding position by position, "mean" its mean over positions to every token.
        seed: of the linear layer's random start, the same on every device.
    """

    def __init__(self, clip, diffusion, recap, join: str, seed: int):
        super().__init__()
        torch.manual_seed(seed)
        self.visual = clip.model.visual
        self.projection = nn.Linear(clip.config["embed_dim"], diffusion.text.shape[-1])  # D → W
        self.count, self.window, self.join = recap.count, recap.window, join

    def forward(self, images: torch.Tensor, text: torch.Tensor, patches: torch.Tensor | None = None) -> torch.Tensor:
        """Images for CLIP (B, 3, s, s), text (1, L, W), patches (B, N, K) or None → condition c (B, N, 1 + K, W)."""
        cls, local = visual_tokens(self.visual, images)  # Alg. 1, line 2
        tokens = self.projection(dense_recap(cls, local, patches, self.window))  # Alg. 1, line 3: (B, N, 1 + K, W)
        return tokens + (text if self.join == "positions" else text.mean(1, keepdim=True))
