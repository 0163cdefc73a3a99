"""From an image to the diffusion model's condition: Algorithm 1, lines 2 and 3 (paper, section 3.3).

visual tokens V  →  dense recap  →  linear layer  →  plus the text embedding  =  condition c
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from harness.errors import UserError
from harness.processes import copy_to_device


@dataclass(frozen=True)
class Recap:
    """Visual dense recap (section 3.3): which of a CLIP's P patch tokens are kept beside the class token.

    According to the paper, reconstruction is too easy with all of them and too hard with none. (It still keeps all of
    them for MetaCLIP, and for DFN at 224.)
    """

    kind: str  # "random", "pool", "all" or "none"
    num_patches: int  # P
    count: int  # K, the number of patch tokens that are kept
    window: int = 1  # of "pool": how many consecutive patches are averaged into one token


def parse_recap(spec: str, num_patches: int) -> Recap:
    """Parses --recap for a CLIP with `num_patches` patch tokens.

    `random:76` or `random:30%` of the patches (percentages are rounded down), `pool:6` (windows of 6; an incomplete
    last window is dropped), `all`, `none`.

    Raises:
        UserError: the spec is malformed, or asks for no patch or for more patches than there are.
    """
    if spec in ("all", "none"):
        return Recap(spec, num_patches, num_patches if spec == "all" else 0)
    match = re.fullmatch("(random|pool):([0-9]{1,9})(%?)", spec)
    kind, number, percent = match.groups() if match else ("", "", "")
    if not match or (kind == "pool" and percent):
        raise UserError(f"--recap {spec!r}: must be random:COUNT, random:SHARE%, pool:WINDOW, all or none")
    number = int(number) * num_patches // 100 if percent else int(number)
    if not 1 <= number <= num_patches:
        raise UserError(f"--recap {spec!r}: must take between 1 and {num_patches} patches of this CLIP, not {number}")
    if kind == "random":
        return Recap("random", num_patches, number)
    return Recap("pool", num_patches, num_patches // number, number)


def visual_tokens(visual: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """CLIP's visual tokens V (Alg. 1, line 2): the class token and the patch tokens, called `local`.

    Both are taken after the tower's final LayerNorm and CLIP's own projection into the joint space. In a tower that
    pools by attention or averages (SigLIP, PE-Core, CLIPA), the pooled vector replaces the class token. With attention
    pooling, the patch tokens lie outside the joint space. The class token equals `clip.encode_image(images)` bit for
    bit in fp32.

    Args:
        visual: the vision tower of an open_clip CLIP, its own ViT or one of timm's.
        images: (B, 3, s, s), preprocessed for this CLIP.

    Returns:
        The class token (B, D) and the P patch tokens (B, P, D).
    """
    # indices=1: the last layer only
    features = visual.forward_intermediates(images, indices=1, normalize_intermediates=True, output_fmt="NLC")
    local = features["image_intermediates"][-1]  # (B, P, width)
    if hasattr(visual, "trunk"):  # timm's; these three are identities in SigLIP
        local = visual.head(visual.trunk.head(visual.trunk.fc_norm(local)))
    elif visual.proj is not None:
        local = local @ visual.proj  # without the class token, which stays identical to encode_image
    return features["image_features"], local


def draw_patch_indices(
    recap: Recap, states: int, rngs: list[np.random.Generator], device: torch.device
) -> torch.Tensor | None:
    """Which patches a random recap takes, without replacement, for each image and each of its N states.

    Returns (B, N, K) int64, or None for the other recaps, which take the same tokens in every state.
    """
    if recap.kind != "random":
        return None
    drawn = [[rng.permutation(recap.num_patches)[: recap.count] for _ in range(states)] for rng in rngs]
    return copy_to_device(np.array(drawn), device)


def dense_recap(
    cls: torch.Tensor, local: torch.Tensor, recap: Recap, patch_indices: torch.Tensor | None = None
) -> torch.Tensor:
    """Visual dense recap (section 3.3; Alg. 1, line 3): the class token and some of the patch tokens.

    Args:
        cls: (B, D).
        local: (B, P, D).
        patch_indices: (B, N, K), from `draw_patch_indices`, for a random recap.

    Returns:
        (B, N, 1 + K, D), with N = 1 if all states take the same tokens.
    """
    if recap.kind == "random":
        image = torch.arange(len(local), device=local.device)[:, None, None]
        chosen = local[image, patch_indices]  # (B, N, K, D)
    elif recap.kind == "pool":
        windows = local[:, : recap.count * recap.window].unflatten(1, (recap.count, recap.window))
        chosen = windows.mean(2)[:, None]  # (B, 1, K, D)
    else:  # "all" or "none"
        chosen = local[:, None, : recap.count]  # (B, 1, K, D)
    cls = cls[:, None, None].expand(-1, chosen.shape[1], -1, -1)  # (B, N, 1, D)
    return torch.cat([cls, chosen], dim=2)


class VisualCondition(nn.Module):
    """Everything that can be trained: CLIP's vision tower θ and `projection`, the linear layer to the U-Net's width W.

    DDP wraps this module; φ stays outside it. The tower is `clip.model.visual` itself, so saving `clip` saves what was
    trained.

    Args:
        clip: a `model.Clip`.
        diffusion: a `model.Diffusion`; only its widths and its dtype are used.
        recap: from `parse_recap`.
        join: "positions" adds the text embedding position by position, "mean" adds its mean to every token.

    Raises:
        UserError: `join` is "positions", and the recap is not as long as the text embedding.
    """

    def __init__(self, clip, diffusion, recap: Recap, join: str):
        super().__init__()
        positions, width = diffusion.text_embedding.shape[1:]
        if join == "positions" and 1 + recap.count != positions:
            raise UserError(
                f"--join positions: the recap has {1 + recap.count} tokens, but the text embedding has {positions} "
                f"positions; use --join mean"
            )
        self.visual, self.preprocess = clip.model.visual, clip.preprocess_batch
        self.projection = nn.Linear(clip.config["embed_dim"], width)  # D → W
        self.recap, self.join, self.bf16 = recap, join, diffusion.unet.dtype == torch.bfloat16

    def forward(
        self, images: torch.Tensor, text_embedding: torch.Tensor, patch_indices: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images → condition c, and the class token of V.

        Args:
            images: (B, 3, S, S) in [0, 1].
            text_embedding: (1, L, W), or (B, L, W) with a text for each image.
            patch_indices: (B, N, K) for a random recap.

        Returns:
            c (B, N, 1 + K, W), with N = 1 if the states share it, and the class token (B, D).
        """
        clip_input = self.preprocess(images)  # the same crop at CLIP's size, (B, 3, s, s)
        device = "cuda" if images.is_cuda else "cpu"
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            cls, local = visual_tokens(self.visual, clip_input)  # Alg. 1, line 2: V
            return self.build_condition(cls, local, text_embedding, patch_indices), cls  # Alg. 1, line 3: c

    def build_condition(
        self, cls: torch.Tensor, local: torch.Tensor, text_embedding: torch.Tensor, patch_indices: torch.Tensor | None
    ) -> torch.Tensor:
        """Visual tokens, (B, D) and (B, P, D) → condition c. The other arguments are those of `forward`."""
        tokens = self.projection(dense_recap(cls, local, self.recap, patch_indices))  # (B, N, 1 + K, W)
        if self.join == "mean":
            text_embedding = text_embedding.mean(1, keepdim=True)  # (1 or B, 1, W)
        return tokens + text_embedding[:, None]  # the same text for every state
