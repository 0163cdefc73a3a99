"""Weights of a CLIP as others publish them, under open_clip's names; and under transformers' names, for the export.

A file or a folder (see harness/tensors.py) holds one of these:

    the whole CLIP             under open_clip's names, or OpenAI's (as DIVA's), or transformers' (GenHancer's, DCR's)
    the vision tower alone     under the same names, with `visual.` or `vision_model.` before them or not (un²CLIP's)

It may lie inside something else, such as a training state (`state_dict`, `model`, `ema`, …) or the whole model of the
released DIVA: it is known by its vision tower, of which there must be one; what else is there is named and left aside.
transformers' CLIPVisionModel has no projection and is refused; its CLIPModel and its CLIPVisionModelWithProjection
have one.
"""

from __future__ import annotations

import os
import re

import torch

from harness.errors import UserError, one_line, warn
from harness.tensors import Tensors, first_of, read_tensors

NAMES = [  # of open_clip and of timm → of transformers, one after the other
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
    (r"\.attn\.(in_proj_|qkv\.)", ".self_attn.qkv."),  # three of transformers': q_proj, k_proj, v_proj
    (r"\.attn\.(out_)?proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn_pool\.latent$", ".head.probe"),
    (r"\.attn_pool\.(q|kv)\.", ".head.attention.in_proj_"),  # two of timm's in one: q above k and v
    (r"\.attn_pool\.proj\.", ".head.attention.out_proj."),
    (r"\.attn_pool\.norm\.", ".head.layernorm."),
    (r"\.attn_pool\.mlp\.", ".head.mlp."),
]
PATCH_EMBEDDINGS = {  # the name shows the form → what to put before every name, to make it the whole CLIP's
    "visual.conv1.weight": "",
    "visual.trunk.patch_embed.proj.weight": "",
    "vision_model.embeddings.patch_embedding.weight": "",
    "conv1.weight": "visual.",
    "trunk.patch_embed.proj.weight": "visual.",
    "embeddings.patch_embedding.weight": "vision_model.",
}


def replace_weights(model: torch.nn.Module, source: str, whole: bool = False) -> None:
    """Puts the weights of a file or folder, or of a hub's (`hf-hub:OWNER/NAME/PATH`), in place of a CLIP's own.

    If they are what the CLIP has already, this is said on stderr. With `whole` it has none yet, and the vision tower
    alone is not enough.

    Raises:
        UserError: they cannot be read, or do not fit.
    """
    before, weights = model.state_dict(), read_weights(source, model)
    if whole and len(weights) < len(before):
        raise UserError(f"{source}: holds the vision tower alone; for a text tower, name ARCH:TAG before the @")
    if not whole and all(torch.equal(value, before[name]) for name, value in weights.items()):
        warn(f"{source}: the same weights as this CLIP's own")
    model.load_state_dict(weights, strict=False)  # what is missing is the text tower, or nothing


def read_weights(source: str, model: torch.nn.Module) -> Tensors:
    """The weights of `source` for an open_clip `model`: its names, shapes, device and dtype (so fp16 becomes fp32).

    Either the whole state dict or that of the vision tower, complete in both cases.

    Raises:
        UserError: they cannot be read; or a weight is missing, left over, or of another shape.
    """
    expected, tensors = model.state_dict(), find_clip(source, read_tensors(source))
    if "vision_model.embeddings.patch_embedding.weight" in tensors:
        try:
            tensors = from_transformers(tensors, list(expected))
        except RuntimeError as error:  # parts that cannot be joined
            raise UserError(f"{source}: does not fit: {one_line(error)}") from error
    else:
        names = {name.removeprefix("text."): name for name in expected}  # nested in some of open_clip's CLIPs
        tensors = {names.get(name.removeprefix("text."), name): value for name, value in tensors.items()}
    if not any(name in tensors for name in expected if not name.startswith("visual.")):
        expected = {name: value for name, value in expected.items() if name.startswith("visual.")}
    for names, problem in (
        ([name for name in expected if name not in tensors], "has no {}"),
        ([name for name in tensors if name not in expected], "has {}, which this CLIP has not"),
    ):
        if names:
            raise UserError(f"{source}: does not fit: it {problem.format(first_of(names))}")
    weights = {}
    for name, value in tensors.items():
        shape = expected[name].shape
        if value.squeeze().shape == expected[name].squeeze().shape:  # timm has an axis of one that transformers has not
            value = value.reshape(shape)
        if value.shape != shape:
            raise UserError(f"{source}: does not fit: its {name} is {tuple(value.shape)}, this CLIP's {tuple(shape)}")
        weights[name] = value.to(expected[name])
    return weights


def find_clip(source: str, tensors: Tensors) -> Tensors:
    """The CLIP among `tensors`, without what stands before its names, and with its tower's (`visual.`) where it lacks.

    Raises:
        UserError: there are two.
    """
    prefixes = {}  # of each vision tower → what its names lack
    for name, value in tensors.items():
        end = next((end for end in PATCH_EMBEDDINGS if f".{name}".endswith(f".{end}")), None)
        if end and value.ndim == 4 and value.shape[1] == 3:  # it reads colours; a `conv1` of a U-Net does not
            prefixes[name.removesuffix(end)] = PATCH_EMBEDDINGS[end]
    if not prefixes:
        return tensors
    if len(prefixes) > 1:
        known = ", ".join(f"{prefix}*" for prefix in sorted(prefixes))
        raise UserError(f"{source}: holds {len(prefixes)} CLIPs ({known}); save the one that you mean in a file alone")
    prefix, lacking = prefixes.popitem()
    aside = sorted({beginning(name, prefix) for name in tensors if not name.startswith(prefix)})
    if aside:
        warn(f"{source}: the CLIP is {prefix}*; left aside: {', '.join(aside)}")
    return {lacking + name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}


def beginning(name: str, prefix: str) -> str:
    """A name up to its first part that is not the prefix's: `class_model.final_fc` beside `class_model.model.`."""
    parts = name.split(".")
    return ".".join(parts[: len(os.path.commonprefix([parts, prefix.split(".")])) + 1])


def transformers_name(name: str) -> str:
    """transformers' name of an open_clip weight, with `qkv` for its three; unknown names stay recognisable."""
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
            renamed[name] = torch.cat([renamed[name], value])  # the pooling's k and v join its q
        elif name.endswith("_projection.weight"):
            renamed[name] = value.T.contiguous()
        else:
            renamed[name] = value.squeeze(0) if name.endswith("position_embedding.weight") else value.contiguous()
    for name in renamed.keys() & {"logit_scale", "logit_bias"}:
        renamed[name] = renamed[name].reshape(1 if "vision_model.head.probe" in renamed else ())
    return renamed


def from_transformers(weights: Tensors, names: list[str]) -> Tensors:
    """The inverse, for a CLIP whose weights have these `names`: what has none of them keeps transformers' name."""
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
