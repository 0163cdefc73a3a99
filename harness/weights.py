"""Reads a CLIP's published weights into open_clip's names; renames them to transformers' names for the export.

A file or a folder (see harness/tensors.py) holds one of these:

    the whole CLIP             under open_clip's names, or OpenAI's (as DIVA's), or transformers' (GenHancer's, DCR's)
    the vision tower alone     under the same names, with or without the prefix `visual.` or `vision_model.` (un²CLIP's)

They may be nested in something else, such as a training state (`state_dict`, `model`, `ema`, …) or the released DIVA's
whole model. The CLIP is found by its vision tower; there must be exactly one. Everything else is ignored with a
warning. transformers' CLIPVisionModel has no projection and is refused; use its CLIPModel or its
CLIPVisionModelWithProjection.
"""

from __future__ import annotations

import os
import re

import torch

from harness.errors import UserError, one_line, warn
from harness.tensors import Tensors, check_names, read_tensors

NAMES = [  # regular expressions, applied in this order: open_clip's and timm's names → transformers'
    (r"^(positional_embedding|token_embedding|transformer|ln_final|text_projection)", r"text.\1"),  # of a plain CLIP
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^text\.text_projection$", "text_projection.weight"),
    (r"^text\.text_projection\.", "text_model.head."),
    (r"^visual\.(trunk\.)?", "vision_model."),
    (r"^text\.", "text_model."),
    (r"^(vision_model\.)(ln_post|norm)\.", r"\1post_layernorm."),
    (r"\.ln_pre\.", ".pre_layrnorm."),  # transformers' spelling
    (r"\.ln_final\.", ".final_layer_norm."),
    (r"\.(class_embedding|token_embedding)", r".embeddings.\1"),
    (r"\.(conv1|patch_embed\.proj)\.", ".embeddings.patch_embedding."),
    (r"\.(positional_embedding|pos_embed)$", ".embeddings.position_embedding.weight"),
    (r"\.(transformer\.res)?blocks\.", ".encoder.layers."),
    (r"\.(ln_|norm)([12])\.", r".layer_norm\2."),
    (r"\.attn\.(in_proj_|qkv\.)", ".self_attn.qkv."),  # in transformers q_proj, k_proj, v_proj
    (r"\.attn\.(out_)?proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn_pool\.latent$", ".head.probe"),
    (r"\.attn_pool\.(q|kv)\.", ".head.attention.in_proj_"),  # in transformers one tensor: q, then k and v
    (r"\.attn_pool\.proj\.", ".head.attention.out_proj."),
    (r"\.attn_pool\.norm\.", ".head.layernorm."),
    (r"\.attn_pool\.mlp\.", ".head.mlp."),
]


def replace_weights(model: torch.nn.Module, source: str, whole: bool = False) -> None:
    """Replaces a CLIP's weights with those of a file, a folder or `hf-hub:OWNER/NAME/PATH`.

    Warns if they equal the CLIP's own weights. With `whole`, the model has no weights yet, so a vision tower alone is
    refused.

    Raises:
        UserError: they cannot be read, or do not fit.
    """
    before, weights = model.state_dict(), read_weights(source, model)
    if whole and len(weights) < len(before):
        raise UserError(f"{source}: holds only the vision tower; for the text tower, put ARCH:TAG before the @")
    if not whole and all(torch.equal(value, before[name]) for name, value in weights.items()):
        warn(f"{source}: the same weights as this CLIP's own")
    model.load_state_dict(weights, strict=False)  # only the text tower may be missing


def read_weights(source: str, model: torch.nn.Module) -> Tensors:
    """The weights of `source` under the names of an open_clip `model`, in its shapes, dtype and device.

    The result is the complete state dict of the model or of its vision tower.

    Raises:
        UserError: they cannot be read, or a weight is missing, unexpected or of another shape.
    """
    expected, tensors = model.state_dict(), find_clip(source, read_tensors(source), model)
    if "vision_model.embeddings.patch_embedding.weight" in tensors:
        try:
            tensors = from_transformers(tensors, list(expected))
        except RuntimeError as error:  # q, k and v of different shapes
            raise UserError(f"{source}: does not fit: {one_line(error)}") from error
    else:
        names = {name.removeprefix("text."): name for name in expected}  # some of open_clip's CLIPs nest the text tower
        tensors = {names.get(name.removeprefix("text."), name): value for name, value in tensors.items()}
    if not any(name in tensors for name in expected if not name.startswith("visual.")):
        expected = {name: value for name, value in expected.items() if name.startswith("visual.")}
    weights, misshapen = {}, []
    for name in expected.keys() & tensors.keys():
        value, own = tensors[name], expected[name]
        if value.squeeze().shape == own.squeeze().shape:  # timm has an axis of size 1 that transformers lacks
            weights[name] = value.reshape(own.shape).to(own)
        else:
            misshapen.append(f"{name} {tuple(value.shape)} instead of {tuple(own.shape)}")
    what = f"{source}: does not fit this CLIP"
    check_names(what, expected.keys() - tensors.keys(), tensors.keys() - expected.keys(), misshapen)
    return weights


def find_clip(source: str, tensors: Tensors, model: torch.nn.Module) -> Tensors:
    """The CLIP in `tensors`, without its names' prefix; a tower alone gets the prefix `visual.` or `vision_model.`.

    Raises:
        UserError: there are several.
    """
    def reads_pixels(weight: torch.Tensor) -> bool:  # a vision tower's first convolution; a U-Net's reads latents
        return weight.ndim == 4 and weight.shape[1] == 3

    state = model.visual.state_dict()
    ours = next(name for name, weight in state.items() if reads_pixels(weight))  # `conv1.weight` of a ViT
    theirs = transformers_name(f"visual.{ours}").removeprefix("vision_model.")
    ends = {f"visual.{ours}": "", f"vision_model.{theirs}": "", ours: "visual.", theirs: "vision_model."}
    prefixes = {}  # of each vision tower → what to prepend to its names
    for name, weight in tensors.items():
        end = next((end for end in ends if f".{name}".endswith(f".{end}")), None)
        if end and reads_pixels(weight):
            prefixes[name.removesuffix(end)] = ends[end]
    if not prefixes:
        return tensors
    if len(prefixes) > 1:
        known = ", ".join(f"{prefix}*" for prefix in sorted(prefixes))
        raise UserError(f"{source}: holds {len(prefixes)} CLIPs ({known}); save one of them to a separate file")
    prefix, lacking = prefixes.popitem()
    ignored = sorted({beginning(name, prefix) for name in tensors if not name.startswith(prefix)})
    if ignored:
        warn(f"{source}: the CLIP is {prefix}*; ignored: {', '.join(ignored)}")
    return {lacking + name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}


def beginning(name: str, prefix: str) -> str:
    """A name up to the first part that differs from the prefix: `class_model.final_fc` for `class_model.model.`."""
    parts = name.split(".")
    return ".".join(parts[: len(os.path.commonprefix([parts, prefix.split(".")])) + 1])


def transformers_name(name: str) -> str:
    """transformers' name of an open_clip weight, with `qkv` for q, k and v; unknown names stay recognizable."""
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def to_transformers(weights: Tensors) -> Tensors:
    """The weights of an open_clip CLIP under transformers' names and in its shapes."""
    renamed = {}
    for ours, value in weights.items():
        name = transformers_name(ours)
        if ".qkv." in name:
            renamed |= {name.replace("qkv", f"{p}_proj"): part.clone() for p, part in zip("qkv", value.chunk(3))}
        elif name in renamed:
            renamed[name] = torch.cat([renamed[name], value])  # the pooling's q, then its k and v
        elif name.endswith("_projection.weight"):
            renamed[name] = value.T.contiguous()
        else:
            renamed[name] = value.squeeze(0) if name.endswith("position_embedding.weight") else value.contiguous()
    for name in renamed.keys() & {"logit_scale", "logit_bias"}:
        renamed[name] = renamed[name].reshape(1 if "vision_model.head.probe" in renamed else ())
    return renamed


def from_transformers(weights: Tensors, names: list[str]) -> Tensors:
    """The inverse, for a CLIP whose open_clip weights have these `names`. Weights without a match keep their name."""
    renamed, used = {}, set()
    for ours in names:
        name = transformers_name(ours)
        parts = [name.replace("qkv", f"{p}_proj") for p in "qkv"] if ".qkv." in name else [name]
        if not all(part in weights for part in parts):
            continue
        used.update(parts)
        if ".qkv." in name:
            renamed[ours] = torch.cat([weights[part] for part in parts])
        elif ".attn_pool." in ours and ".in_proj_" in name:
            q, k, v = weights[name].tensor_split(3)
            renamed[ours] = q if ".q." in ours else torch.cat([k, v])
        else:
            renamed[ours] = weights[name].T if name.endswith("_projection.weight") else weights[name]
    return renamed | {name: value for name, value in weights.items() if name not in used}
