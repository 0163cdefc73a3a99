"""Weights of a CLIP as others publish them, under open_clip's names; and under transformers' names, for the export.

A file (.pth, .pt, .ckpt, .bin, .safetensors) or a folder holds one of these:

    the whole CLIP             under open_clip's names, or OpenAI's (as DIVA's), or transformers' (GenHancer's, DCR's)
    the vision tower alone     under the same names, with `visual.` or `vision_model.` before them or not (un²CLIP's)

It may lie under `state_dict` or `model`, and a wrapper's name (`module.`) may stand before every name. Nothing that is
pickled is executed. transformers' CLIPVisionModel has no projection and is refused; its CLIPModel and its
CLIPVisionModelWithProjection have one.
"""

from __future__ import annotations

import os
import pickle
import re
import sys
import warnings
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors.torch import load_file

from harness.errors import UserError, brief

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
FORMS = {  # the patch embedding's name shows the form → what to put before every name, to make it the whole CLIP's
    "visual.conv1.weight": "",
    "visual.trunk.patch_embed.proj.weight": "",
    "vision_model.embeddings.patch_embedding.weight": "",
    "conv1.weight": "visual.",
    "trunk.patch_embed.proj.weight": "visual.",
    "embeddings.patch_embedding.weight": "vision_model.",
}
NO_WEIGHTS = re.compile(r"(input_resolution|context_length|vocab_size|.*\.position_ids)$")  # OpenAI's, transformers'
FILES = ("model*.safetensors", "pytorch_model*.bin", "open_clip_*.safetensors", "open_clip_*.bin")  # of a folder
Tensors = dict[str, torch.Tensor]


def replace_weights(model: torch.nn.Module, source: str, whole: bool = False) -> None:
    """Puts the weights of a file or folder, or of a hub's (`hf-hub:OWNER/NAME/PATH`), in place of a CLIP's own.

    If they are what the CLIP has already, this is said on stderr. With `whole` the vision tower alone is not enough.

    Raises:
        UserError: they cannot be read, or do not fit.
    """
    own, weights = model.state_dict(), read_weights(source, model)
    if whole and len(weights) < len(own):
        raise UserError(f"{source}: holds the vision tower alone; for a text tower, name ARCH:TAG before the @")
    same = all(torch.equal(value, own[name]) for name, value in weights.items())
    if same and os.environ.get("RANK", "0") == "0":
        print(f"{source}: the same weights as this CLIP's own", file=sys.stderr)
    model.load_state_dict(weights, strict=False)  # what is missing is the text tower, or nothing


def read_weights(source: str, model: torch.nn.Module) -> Tensors:
    """The weights of `source` for an open_clip `model`: its names, shapes, device and dtype (so fp16 becomes fp32).

    Either the whole state dict or that of the vision tower, complete in both cases.

    Raises:
        UserError: they cannot be read; or a weight is missing, left over, or of another shape.
    """
    own, found = model.state_dict(), whole_names(read_tensors(source))
    if "vision_model.embeddings.patch_embedding.weight" in found:
        try:
            found = from_transformers(found, own)
        except RuntimeError as error:  # parts that cannot be joined
            raise UserError(f"{source}: does not fit: {brief(error)}") from error
    else:
        found = {open_clip_name(name, nested=hasattr(model, "text")): value for name, value in found.items()}
    tower = [name for name in own if name.startswith("visual.")]
    expected = own if any(name in found for name in own.keys() - set(tower)) else tower
    missing = [name for name in expected if name not in found]
    left_over = [name for name in found if name not in own]
    for names, problem in ((missing, "has no {}"), (left_over, "has {}, which this CLIP has not")):
        if names:
            more = f" (and {len(names) - 1} more such names)" if len(names) > 1 else ""
            raise UserError(f"{source}: does not fit: it {problem.format(names[0])}{more}")
    weights = {}
    for name, value in found.items():
        shape = own[name].shape
        if value.squeeze().shape == own[name].squeeze().shape:  # timm has an axis of one that transformers has not
            value = value.reshape(shape)
        if value.shape != shape:
            raise UserError(f"{source}: does not fit: its {name} is {tuple(value.shape)}, this CLIP's {tuple(shape)}")
        weights[name] = value.to(own[name])
    return weights


def read_tensors(source: str) -> Tensors:
    """What the file, or the files of the folder, hold by name. UserError: it is not a plain dict of tensors."""
    path = fetch(source) if source.startswith("hf-hub:") else Path(source)
    files = [path]
    if path.is_dir():
        found = [sorted(path.glob(pattern)) for pattern in FILES]
        files = next((some for some in found if some), [])
    if not files:
        raise UserError(f"{source}: no weights in this folder ({', '.join(FILES)})")
    held = {}
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's, about old forms of its files
            for file in files:  # several are the parts of one
                safe = file.suffix == ".safetensors"
                held |= load_file(file) if safe else torch.load(file, "cpu", weights_only=True)
        for wrapper in ("state_dict", "model"):
            held = held[wrapper] if isinstance(held.get(wrapper), dict) else held
        return {name: value for name, value in held.items() if torch.is_tensor(value) and not NO_WEIGHTS.match(name)}
    except pickle.UnpicklingError:  # its message advises to execute them
        raise UserError(f"{source}: holds pickled objects that are no tensors; nothing pickled is executed") from None
    except Exception as error:  # whatever torch and safetensors make of a broken file
        raise UserError(f"{source}: could not be read as weights: {brief(error).split('. ')[0]}") from error


def fetch(source: str) -> Path:
    """The local copy of `hf-hub:OWNER/NAME/PATH`, a file of a hub's repository or a folder in it."""
    owner, name, path = source.removeprefix("hf-hub:").split("/", 2)
    try:
        if path.endswith((".pth", ".pt", ".ckpt", ".bin", ".safetensors")):
            return Path(hf_hub_download(f"{owner}/{name}", path))
        return Path(snapshot_download(f"{owner}/{name}", allow_patterns=f"{path}/*model*")) / path
    except Exception as error:  # the hub's client raises many kinds
        raise UserError(f"{source} could not be fetched from the hub: {brief(error)}") from error


def whole_names(tensors: Tensors) -> Tensors:
    """The names without a wrapper's (`module.`), and with the tower's (`visual.`) where that is missing."""
    for patch_embedding, lacking in FORMS.items():
        for name in tensors:
            wrapper = name.removesuffix(patch_embedding)
            if wrapper != name and (not wrapper or wrapper.endswith(".")):
                inner = {n: v for n, v in tensors.items() if n.startswith(wrapper)}
                outer = {n: v for n, v in tensors.items() if not n.startswith(wrapper)}
                return {lacking + n.removeprefix(wrapper): v for n, v in inner.items()} | outer
    return tensors


def open_clip_name(name: str, nested: bool) -> str:
    """A text tower's weight is called `text.NAME` in some of open_clip's CLIPs (`nested`), and NAME in others."""
    bare = name.removeprefix("text.")
    return f"text.{bare}" if nested and not bare.startswith(("visual.", "logit_")) else bare


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


def from_transformers(weights: Tensors, own: Tensors) -> Tensors:
    """The inverse, for a CLIP whose weights are `own`: what it has no name for keeps transformers' name."""
    found, used = {}, set()
    for ours in own:
        name = transformers_name(ours)
        parts = [name.replace("qkv", f"{p}_proj") for p in "qkv"] if ".qkv." in name else [name]
        if not all(part in weights for part in parts):
            continue
        used.update(parts)
        if ".qkv." in name:
            found[ours] = torch.cat([weights[part] for part in parts])
        elif ".attn_pool." in ours and ".in_proj_" in name:
            q, k, v = weights[name].tensor_split(3)
            found[ours] = q if ".q." in ours else torch.cat([k, v])
        else:
            found[ours] = weights[name].T if name.endswith("_projection.weight") else weights[name]
    return found | {name: value for name, value in weights.items() if name not in used}
