"""A CLIP in transformers' form, as multimodal language models take their vision tower.

    python extras/export.py runs/l14/clip l14-clip            # what a run has saved
    python extras/export.py openai-vit-l-14-224 origin-clip   # or any CLIP that evaluate_mmvp.py takes

AutoModel reads a CLIPModel from a ViT with a class token and a SiglipModel from a timm tower that pools by attention
(whose GELU stays open_clip's exact one, where transformers' default is the tanh approximation); AutoImageProcessor and
AutoTokenizer read theirs. Before the folder gets its name it is loaded and compared with ours in fp32: image features,
patch tokens (after the final LayerNorm and the projection, which follow a CLIPModel's `last_hidden_state`) and text
features. What differs by more than TOLERANCE is not written.

Pixels equal open_clip's with backend="pil"; transformers' default backend rounds otherwise, by at most two grey levels
of 255. Both cut the middle of a picture one pixel beside open_clip's where it stands over by 3, 7, 11 … pixels. The
tokenizer is to be called with padding="max_length", truncation=True; it cleans texts as open_clip's does, but for
curly quotes, broken encodings and HTML (ftfy). A CLIPTokenizer pads with the end token, where open_clip has zeros.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import string
import sys
from pathlib import Path

import open_clip
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Regex, normalizers
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from condition import visual_tokens
from model import Clip, load_clip, one_sentence, quiet, replaced_folder

TOLERANCE = 5e-5  # of the largest value; at full size fp32 noise is 2e-6, and tanh in place of the exact GELU 2e-4
TEXTS = ["", "a photo of a cat", "Two dogs, one_on the LEFT!", "it's 12:30\n\tin  São Paulo", "red blue " * 100]
ACTIVATIONS = {"QuickGELU()": "quick_gelu", "GELU(approximate='none')": "gelu"}
ACTIVATIONS |= dict.fromkeys(("GELU(approximate='tanh')", "GELUTanh()"), "gelu_pytorch_tanh")
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
    (r"\.attn\.(in_proj_|qkv\.)", ".self_attn.qkv."),
    (r"\.attn\.(out_)?proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn_pool\.latent$", ".head.probe"),
    (r"\.attn_pool\.(q|kv)\.", ".head.attention.in_proj_"),
    (r"\.attn_pool\.proj\.", ".head.attention.out_proj."),
    (r"\.attn_pool\.norm\.", ".head.layernorm."),
    (r"\.attn_pool\.mlp\.", ".head.mlp."),
]


def renamed_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of an open_clip CLIP under transformers' names and in its shapes; unknown names stay recognisable."""
    renamed = {}
    for name, value in weights.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
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


def tower_config(tower: nn.Module) -> dict:
    """What the configurations of both towers say. SystemExit: it is not a plain transformer."""
    blocks = [module for module in tower.modules() if hasattr(module, "attn") and hasattr(module, "mlp")]
    if not blocks:
        raise SystemExit(f"a {type(tower).__name__} is neither of open_clip nor of timm")
    first, activation = list(blocks[0].mlp.children())[:2]
    if str(activation) not in ACTIVATIONS:
        raise SystemExit(f"the activation {activation} is none of {', '.join(ACTIVATIONS)}")
    return dict(
        hidden_size=first.in_features, intermediate_size=first.out_features, hidden_act=ACTIVATIONS[str(activation)],
        num_hidden_layers=len(blocks), num_attention_heads=blocks[0].attn.num_heads,
        layer_norm_eps=next(module.eps for module in blocks[0].modules() if isinstance(module, nn.LayerNorm)),
    )


def transformers_tokenizer(clip: Clip):
    """Its tokenizer as one of transformers, which cleans texts itself. SystemExit: it cannot be loaded."""
    own, length = clip.tokenizer(), clip.model.context_length
    if isinstance(own, open_clip.SimpleTokenizer):
        vocabulary = dict(zip([*own.encoder][:-2] + ["<|startoftext|>", "<|endoftext|>"], own.encoder.values()))
        return transformers.CLIPTokenizer(vocabulary, [*own.bpe_ranks], model_max_length=length)
    clean, steps = clip.config["text_cfg"].get("tokenizer_kwargs", {}).get("clean", "whitespace"), []
    if clean == "canonicalize":
        steps += [normalizers.Replace("_", " "), normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), "")]
    if clean != "whitespace":
        steps += [normalizers.Lowercase()]
    backend = own.tokenizer.backend_tokenizer
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), backend.normalizer]
    backend.normalizer = normalizers.Sequence([step for step in steps if step is not None])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=length, **own.tokenizer.special_tokens_map,
        model_input_names=["input_ids"],  # SigLIP reads its padding: no attention mask
    )


def image_processor(clip: Clip, family: str):
    """Its preprocessing as an image processor of transformers. SystemExit: it pads."""
    own, side = clip.model.visual.preprocess_cfg, clip.image_size
    if own["resize_mode"] == "longest":
        raise SystemExit("transformers has no image processor that fits the longest side and pads")
    square = dict(height=side, width=side)
    shortest = own["resize_mode"] == "shortest"
    return getattr(transformers, f"{family}ImageProcessor")(
        size=dict(shortest_edge=side) if shortest else square, do_center_crop=shortest, crop_size=square,
        resample=2 if own["interpolation"] == "bilinear" else 3,
        image_mean=list(own["mean"]), image_std=list(own["std"]),
    )


@torch.no_grad()
def differences(clip: Clip, folder: Path, family: str, tokenizer) -> dict[str, float]:
    """Loads what was exported to `folder`: its largest difference from `clip` over the largest value, by output.

    SystemExit: a weight has no place in transformers' model, or lacks there.
    """
    options = dict(output_loading_info=True, ignore_mismatched_sizes=True)
    model, loaded = transformers.AutoModel.from_pretrained(folder, **options)
    if odd := [key for kind in ("missing", "unexpected", "mismatched") for key in sorted(loaded[f"{kind}_keys"])]:
        raise SystemExit(f"it and a {family}Model differ in {odd[0]}")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, clip.image_size, clip.image_size, generator=generator)
    if tokenizer:
        reloaded = transformers.AutoTokenizer.from_pretrained(folder)
        ids = clip.tokenizer()(TEXTS)
        tokens = reloaded(TEXTS, padding="max_length", truncation=True, return_tensors="pt")
    else:
        ids = torch.randint(clip.model.vocab_size - 1, (4, clip.model.context_length), generator=generator)
        ids[:, -1] = clip.model.vocab_size - 1
        tokens = dict(input_ids=ids)
    vision, text = model.vision_model(images), model.text_model(**tokens)
    theirs = [vision.pooler_output, vision.last_hidden_state, text.pooler_output]
    if family == "CLIP":
        local = model.vision_model.post_layernorm(vision.last_hidden_state[:, 1:])
        theirs = [model.visual_projection(theirs[0]), model.visual_projection(local), model.text_projection(theirs[2])]
    ours = [*visual_tokens(clip.model.visual, images), clip.model.encode_text(ids)]
    names = ("image features", "patch tokens", "text features")
    return {n: float((a - b).abs().max() / b.abs().max()) for n, a, b in zip(names, theirs, ours)}


def export(clip: Clip, folder: str | os.PathLike) -> dict[str, float]:
    """Writes `clip` as a transformers folder in place of what is there, and returns its `differences`.

    A tokenizer that cannot be had is left out; `clip.no_tokenizer` then says why. SystemExit: the CLIP cannot be
    expressed in transformers, or the folder cannot be written; what was there is whole.
    """
    model, weights = clip.model, renamed_weights(clip.model.state_dict())
    family = "Siglip" if "vision_model.head.probe" in weights else "CLIP"
    tokenizer = None
    with contextlib.suppress(SystemExit):
        tokenizer = transformers_tokenizer(clip)
    try:
        vision = tower_config(model.visual)
        patches = next(module for module in model.visual.modules() if isinstance(module, nn.Conv2d))
        vision |= dict(image_size=clip.image_size, patch_size=patches.kernel_size[0])
        text = tower_config(model.text if hasattr(model, "text") else model.transformer)
        text |= dict(vocab_size=model.vocab_size, max_position_embeddings=model.context_length)
        text |= {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id", None) for k in ("bos", "eos", "pad")}
        if not tokenizer and family == "CLIP":
            text["eos_token_id"] = model.vocab_size - 1  # the token that is read: to open_clip the highest
        width = {"projection_dim" if family == "CLIP" else "projection_size": clip.config["embed_dim"]}
        config = getattr(transformers, f"{family}Config")(
            text_config=text | width, vision_config=vision | width, architectures=[f"{family}Model"], **width
        )
        with replaced_folder(folder) as new, quiet():
            config.save_pretrained(new)
            save_file(weights, new / "model.safetensors", metadata=dict(format="pt"))
            image_processor(clip, family).save_pretrained(new)
            if tokenizer:
                tokenizer.save_pretrained(new)
            found = differences(clip, new, family, tokenizer)
            for name, difference in found.items():
                if not difference <= TOLERANCE:
                    raise SystemExit(f"its {name} differ from a {family}Model's by {difference:.1e}")
    except SystemExit as reason:
        raise SystemExit(f"{clip.source} cannot be exported: {reason}") from None
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = sys.exit
    parser.add_argument("clip", metavar="CLIP", help="a recipe, ARCH:TAG of open_clip, hf-hub:OWNER/NAME, or a folder")
    parser.add_argument("folder", metavar="DIR", help="where to write it; must not exist")
    args = parser.parse_args(argv)
    for folder in (args.folder, f"{args.folder}.new"):  # the latter is where it is written first
        if os.path.lexists(folder):
            raise SystemExit(f"{folder}: exists already; an export takes a new folder")
    clip = load_clip(args.clip)
    for name, difference in export(clip, args.folder).items():
        print(f"{name:14}  differ by {difference:.1e}")
    print(f"written: {args.folder}" + (f", without a tokenizer: {clip.no_tokenizer}" if clip.no_tokenizer else ""))


if __name__ == "__main__":
    with one_sentence("export.py"):
        main()
