"""From an image to the diffusion model's condition: Algorithm 1, lines 2 and 3 (paper, section 3.3).

visual tokens V  →  dense recap  →  linear layer  →  joined with the text's embedding  =  condition c
"""

import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from harness.errors import UserError


@dataclass(frozen=True)
class Recap:
    """Visual dense recap (section 3.3): which of a CLIP's P local tokens join the class token.

    The paper: with all of them, reconstruction is too easy to teach anything; with none, it is too hard. (It takes all
    for MetaCLIP and for DFN at 224.)
    """

    kind: str  # "random", "pool", "all" or "none"
    num_patches: int  # P
    count: int  # K, how many tokens join
    window: int = 1  # of "pool": so many patches in a row are averaged into one token


def parse_recap(spec: str, num_patches: int) -> Recap:
    """Reads a recap as the command line has it, for a CLIP of `num_patches` local tokens.

    `random:76` or `random:30%` of the patches (percentages floor), `pool:6` (windows of 6; a last short one is
    dropped), `all`, `none`.

    Raises:
        UserError: it cannot be read, or asks for no patch or for more than there are.
    """
    if spec in ("all", "none"):
        return Recap(spec, num_patches, num_patches if spec == "all" else 0)
    match = re.fullmatch("(random|pool):([0-9]{1,9})(%?)", spec)
    kind, number, percent = match.groups() if match else ("", "", "")
    if not kind or (kind == "pool" and percent):
        raise UserError(f"--recap {spec!r}: must be random:COUNT, random:SHARE%, pool:WINDOW, all or none")
    number = int(number) * num_patches // 100 if percent else int(number)
    if not 1 <= number <= num_patches:
        raise UserError(f"--recap {spec!r}: asks for {number} patches, and this CLIP has 1 to {num_patches} to give")
    if kind == "random":
        return Recap("random", num_patches, number)
    return Recap("pool", num_patches, num_patches // number, number)


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
    out = visual.forward_intermediates(
        images,
        indices=1,  # the last layer alone
        normalize_intermediates=True,
        output_fmt="NLC",
    )
    local = out["image_intermediates"][-1]
    if getattr(visual, "proj", None) is not None:
        local = local @ visual.proj  # on its own: one product for class and patches would round differently
    return out["image_features"], local


def draw_patches(recap: Recap, states: int, rngs: list[np.random.Generator]) -> torch.Tensor | None:
    """The patches of a random recap, without replacement, for each image and each of its N states: (B, N, K) int64.

    None for the other recaps, whose tokens are the same in all states.
    """
    if recap.kind != "random":
        return None
    drawn = [[rng.permutation(recap.num_patches)[: recap.count] for _ in range(states)] for rng in rngs]
    return torch.from_numpy(np.array(drawn))


def dense_recap(
    cls: torch.Tensor, local: torch.Tensor, recap: Recap, patches: torch.Tensor | None = None
) -> torch.Tensor:
    """Visual dense recap (section 3.3; Alg. 1, line 3): the class token and a part of the local tokens.

    Args:
        cls: (B, D).
        local: (B, P, D).
        patches: (B, N, K), of `draw_patches`, for a random recap.

    Returns:
        (B, N, 1 + K, D); N is 1 where the states do not differ.
    """
    if recap.kind == "random":
        image = torch.arange(len(local), device=local.device)[:, None, None]  # each with its own patches
        chosen = local[image, patches]  # (B, N, K, D)
    elif recap.kind == "pool":
        windows = local[:, : recap.count * recap.window].unflatten(1, (recap.count, recap.window))
        chosen = windows.mean(2)[:, None]  # (B, 1, K, D)
    else:  # "all" or "none"
        chosen = local[:, None, : recap.count]  # (B, 1, K, D)
    cls = cls[:, None, None].expand(-1, chosen.shape[1], -1, -1)  # (B, N, 1, D)
    return torch.cat([cls, chosen], dim=2)


class VisualCondition(nn.Module):
    """All that can learn: CLIP's vision tower θ and the linear layer into the U-Net's cross-attention. DDP wraps this.

    Args:
        clip, diffusion: of model.py; `diffusion` is not kept: φ stays outside what is trained and synchronised.
        recap: of `parse_recap`.
        join: "positions" adds the text's embedding position by position, "mean" adds its mean to every token.

    Raises:
        UserError: the recap and the text have different lengths, and are to be added position by position.
    """

    def __init__(self, clip, diffusion, recap: Recap, join: str):
        super().__init__()
        positions = diffusion.text.shape[1]
        if join == "positions" and 1 + recap.count != positions:
            raise UserError(
                f"--join positions: the text has {positions} positions, the recap {1 + recap.count} tokens; "
                f"use --join mean"
            )
        self.visual = clip.model.visual
        self.projection = nn.Linear(clip.config["embed_dim"], diffusion.text.shape[-1])  # D → W
        self.recap, self.join, self.bf16 = recap, join, diffusion.unet.dtype == torch.bfloat16

    def forward(
        self, images: torch.Tensor, text: torch.Tensor, patches: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images for CLIP (B, 3, s, s), text (1, L, W), patches (B, N, K) or None → condition c (B, N, 1 + K, W), and
        the class token (B, D) of V. N is 1 where the states share c.
        """
        device = "cuda" if images.is_cuda else "cpu"
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            cls, local = visual_tokens(self.visual, images)  # Alg. 1, line 2: V
            return self.from_tokens(cls, local, text, patches), cls  # Alg. 1, line 3: c

    def from_tokens(
        self, cls: torch.Tensor, local: torch.Tensor, text: torch.Tensor, patches: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Visual tokens (B, D) and (B, P, D) → condition c; the rest as in `forward`."""
        tokens = self.projection(dense_recap(cls, local, self.recap, patches))  # (B, N, 1 + K, W)
        if self.join == "mean":
            text = text.mean(1, keepdim=True)  # (1, 1, W)
        return tokens + text
