"""A CLIP in transformers' form, as multimodal language models take their vision tower.

    python extras/export.py runs/l14/clip l14-clip            # what a run has saved
    python extras/export.py openai-vit-l-14-224 origin-clip   # or any CLIP that evaluate_mmvp.py takes

AutoModel reads a CLIPModel from a ViT with a class token and a SiglipModel from a timm tower that pools by attention;
AutoImageProcessor and AutoTokenizer read theirs. Before the folder gets its name it is loaded and compared with ours in
fp32: image features, patch tokens (for a CLIPModel after the final LayerNorm and the projection, which follow its
`last_hidden_state`) and text features. What differs by more than TOLERANCE is not written.

Pixels equal open_clip's with backend="pil"; transformers' default backend rounds otherwise, by at most two grey levels
of 255. If a picture is 3, 7, 11 … pixels too long, both cut its middle one pixel beside open_clip's. Call the tokenizer
with padding="max_length", truncation=True. It cleans texts as open_clip's does, but for curly quotes, broken encodings
and HTML (ftfy). A CLIPTokenizer pads with the end token, where open_clip has zeros.
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

sys.path.insert(0, str(Path(__file__).parents[1]))
from condition import visual_tokens
from harness.errors import UserError, exit_on_user_error, usage_error
from harness.files import replaced_folder
from harness.pretrained import quiet
from harness.weights import to_transformers
from model import Clip, load_clip

TOLERANCE = 5e-5  # of the largest value; at full size fp32 noise is 2e-6, and tanh in place of the exact GELU 2e-4
TEXTS = ["", "a photo of a cat", "Two dogs, one_on the LEFT!", "it's 12:30\n\tin  São Paulo", "red blue " * 100]
ACTIVATIONS = {  # by how torch prints them
    "QuickGELU()": "quick_gelu",
    "GELU(approximate='none')": "gelu",
    "GELU(approximate='tanh')": "gelu_pytorch_tanh",
    "GELUTanh()": "gelu_pytorch_tanh",
}


def export(clip: Clip, folder: str | os.PathLike) -> dict[str, float]:
    """Writes `clip` as a transformers folder in place of what is there, and returns its `differences`.

    A tokenizer that cannot be had is left out; `clip.tokenizer_error` then says why.

    UserError: transformers has no such CLIP, or the folder cannot be written; what was there is whole.
    """
    try:
        weights = to_transformers(clip.model.state_dict())
        for name, value in weights.items():
            if not value.isfinite().all():
                raise UserError(f"its {name} is not finite")
        family = "Siglip" if "vision_model.head.probe" in weights else "CLIP"
        tokenizer = None
        with contextlib.suppress(UserError):
            tokenizer = transformers_tokenizer(clip)
        with replaced_folder(folder) as new, quiet():
            transformers_config(clip, family, tokenizer).save_pretrained(new)
            save_file(weights, new / "model.safetensors", metadata=dict(format="pt"))
            image_processor(clip, family).save_pretrained(new)
            if tokenizer:
                tokenizer.save_pretrained(new)
            largest = differences(clip, new, family, tokenizer)
            for name, difference in largest.items():
                if not difference <= TOLERANCE:
                    raise UserError(f"its {name} differ from a {family}Model's by {difference:.1e}")
    except UserError as reason:
        raise UserError(f"{clip.source} cannot be exported: {reason}") from None
    return largest


def transformers_config(clip: Clip, family: str, tokenizer):
    """The CLIPConfig or SiglipConfig of `clip`. UserError: a tower is not a plain transformer."""
    model = clip.model
    patches = next(module for module in model.visual.modules() if isinstance(module, nn.Conv2d))
    vision = tower_config(model.visual) | dict(image_size=clip.image_size, patch_size=patches.kernel_size[0])
    text = tower_config(model.text if hasattr(model, "text") else model.transformer)
    text |= dict(vocab_size=model.vocab_size, max_position_embeddings=model.context_length)
    text |= {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id", None) for k in ("bos", "eos", "pad")}
    if not tokenizer and family == "CLIP":
        text["eos_token_id"] = model.vocab_size - 1  # the token that is read: to open_clip the highest
    width = {"projection_dim" if family == "CLIP" else "projection_size": clip.config["embed_dim"]}
    return getattr(transformers, f"{family}Config")(
        text_config=text | width, vision_config=vision | width, architectures=[f"{family}Model"], **width
    )


def tower_config(tower: nn.Module) -> dict:
    """What the configurations of both towers say. UserError: it is not a plain transformer."""
    blocks = [module for module in tower.modules() if hasattr(module, "attn") and hasattr(module, "mlp")]
    if not blocks:
        raise UserError(f"a {type(tower).__name__} is neither of open_clip nor of timm")
    first, activation = list(blocks[0].mlp.children())[:2]
    if str(activation) not in ACTIVATIONS:
        raise UserError(f"the activation {activation} is none of {', '.join(ACTIVATIONS)}")
    return dict(
        hidden_size=first.in_features,
        intermediate_size=first.out_features,
        hidden_act=ACTIVATIONS[str(activation)],
        num_hidden_layers=len(blocks),
        num_attention_heads=blocks[0].attn.num_heads,
        layer_norm_eps=next(module.eps for module in blocks[0].modules() if isinstance(module, nn.LayerNorm)),
    )


def transformers_tokenizer(clip: Clip):
    """Its tokenizer as one of transformers, which cleans texts itself. UserError: it cannot be loaded."""
    theirs, length = clip.tokenizer(), clip.model.context_length
    if isinstance(theirs, open_clip.SimpleTokenizer):
        words = [*theirs.encoder][:-2] + ["<|startoftext|>", "<|endoftext|>"]
        vocabulary = dict(zip(words, theirs.encoder.values()))
        return transformers.CLIPTokenizer(vocabulary, [*theirs.bpe_ranks], model_max_length=length)
    clean, steps = clip.config["text_cfg"].get("tokenizer_kwargs", {}).get("clean", "whitespace"), []
    if clean == "canonicalize":
        steps += [normalizers.Replace("_", " "), normalizers.Replace(Regex(f"[{re.escape(string.punctuation)}]"), "")]
    if clean != "whitespace":
        steps += [normalizers.Lowercase()]
    backend = theirs.tokenizer.backend_tokenizer
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), backend.normalizer]
    backend.normalizer = normalizers.Sequence([step for step in steps if step is not None])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=length,
        model_input_names=["input_ids"],  # SigLIP reads its padding: no attention mask
        **theirs.tokenizer.special_tokens_map,
    )


def image_processor(clip: Clip, family: str):
    """Its preprocessing as an image processor of transformers. UserError: it pads."""
    cfg, square = clip.model.visual.preprocess_cfg, dict(height=clip.image_size, width=clip.image_size)
    if cfg["resize_mode"] == "longest":
        raise UserError("transformers has no image processor that fits the longest side and pads")
    shortest = cfg["resize_mode"] == "shortest"
    return getattr(transformers, f"{family}ImageProcessor")(
        size=dict(shortest_edge=clip.image_size) if shortest else square,
        do_center_crop=shortest,
        crop_size=square,
        resample=2 if cfg["interpolation"] == "bilinear" else 3,
        image_mean=list(cfg["mean"]),
        image_std=list(cfg["std"]),
    )


@torch.no_grad()
def differences(clip: Clip, folder: Path, family: str, tokenizer) -> dict[str, float]:
    """Loads what was exported to `folder`: its largest difference from `clip` over the largest value, by output.

    UserError: a weight has no place in transformers' model, or lacks there.
    """
    options = dict(output_loading_info=True, ignore_mismatched_sizes=True)
    model, loaded = transformers.AutoModel.from_pretrained(folder, **options)
    if odd := [key for kind in ("missing", "unexpected", "mismatched") for key in sorted(loaded[f"{kind}_keys"])]:
        raise UserError(f"it and a {family}Model differ in {odd[0]}")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, clip.image_size, clip.image_size, generator=generator)
    if tokenizer:
        ids, reloaded = clip.tokenizer()(TEXTS), transformers.AutoTokenizer.from_pretrained(folder)
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = usage_error
    parser.add_argument("clip", metavar="CLIP", help="a recipe, ARCH:TAG, hf-hub:OWNER/NAME, a folder, CLIP@WEIGHTS")
    parser.add_argument("folder", metavar="DIR", help="where to write it; must not exist")
    args = parser.parse_args(argv)
    for folder in (args.folder, f"{args.folder}.new"):  # the latter is where it is written first
        if os.path.lexists(folder):
            raise UserError(f"{folder}: exists already; an export takes a new folder")
    clip = load_clip(args.clip)
    for name, difference in export(clip, args.folder).items():
        print(f"{name:14}  differ by {difference:.1e}")
    why = f", without a tokenizer: {clip.tokenizer_error}" if clip.tokenizer_error else ""
    print(f"written: {args.folder}{why}")


if __name__ == "__main__":
    with exit_on_user_error("export.py"):
        main()
