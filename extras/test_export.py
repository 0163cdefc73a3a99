"""The exported CLIP has the same outputs in transformers as in open_clip; other CLIPs are refused."""

import math

import pytest
import timm
import torch
import transformers
from PIL import Image

import condition
import model
from extras import export
from harness.errors import UserError
from harness.recipes import RECIPES
from harness.test_weights import SIGLIP, SIGLIP_TEXT, VIT, perturbed, write_tiny_siglip
from harness.weights import read_weights
from test_smoke import write_clip

OPENAI_TEXT = dict(context_length=77, vocab_size=49408, hf_tokenizer_name=None)  # with open_clip's built-in tokenizer
FULL_SIZE = [name for name in RECIPES if name != "miniature"]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name, resize_mode", [("vit", "squash"), ("siglip", "squash"), ("openai", "shortest")])
def test_the_exported_clip_is_ours(tmp_path, capsys, name, resize_mode):
    folder, out = tmp_path / "clip", tmp_path / "new" / "exported"
    if name == "siglip":
        write_tiny_siglip(folder)
    elif name == "openai":
        write_clip(folder, 20, VIT, text_cfg=OPENAI_TEXT, quick_gelu=True)
    else:
        write_clip(folder, 20, VIT | dict(norm_kwargs=dict(eps=0.1)))
    clip = perturbed(model.load_clip(f"{folder}"))
    clip.model.visual.preprocess_cfg["resize_mode"] = resize_mode
    clip.save(folder)
    export.main(export.read_args([f"{folder}", f"{out}"]))
    said = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in said[:3]] == ["image features", "patch tokens", "text features"]
    assert said[3:] == [f"written: {out}"] and [*out.parent.iterdir()] == [out]
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1
    with pytest.raises(UserError, match="exported: already exists; an export needs a new folder"):
        export.read_args([f"{folder}", f"{out}"])

    clip, theirs = model.load_clip(f"{folder}"), transformers.AutoModel.from_pretrained(out)
    assert type(theirs).__name__ == ("SiglipModel" if name == "siglip" else "CLIPModel")
    image = Image.effect_noise((50, 37), 90).convert("RGB")
    ours = clip.preprocess_image(image)[None]
    for backend, gray_levels in (("pil", 1e-3), ("torchvision", 2.01)):  # transformers' default rounds differently
        processor = transformers.AutoImageProcessor.from_pretrained(out, backend=backend)
        pixels = processor(images=image, return_tensors="pt").pixel_values
        std = torch.tensor(clip.model.visual.preprocess_cfg["std"])[:, None, None]
        assert ((pixels - ours) * std * 255).abs().max() < gray_levels

    texts = ["a photo of red hat", " Two\n dogs,  left_right! ", "", "blue " * 100]
    ids, tokenizer = clip.tokenizer()(texts), transformers.AutoTokenizer.from_pretrained(out)
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    assert ids.shape == tokens.input_ids.shape and torch.equal(ids[ids > 0], tokens.input_ids[ids > 0])  # 0 pads

    with torch.no_grad():
        cls, local = condition.visual_tokens(clip.model.visual, ours)
        found = theirs.vision_model(ours, output_hidden_states=True)
        patches = found.last_hidden_state
        if name != "siglip":
            patches = theirs.visual_projection(theirs.vision_model.post_layernorm(patches[:, 1:]))
        assert relative(theirs.get_image_features(ours).pooler_output, cls) < 1e-5
        assert relative(patches, local) < 1e-5
        assert relative(theirs.get_text_features(**tokens).pooler_output, clip.model.encode_text(ids)) < 1e-5
        if name != "siglip":  # LLaVA reads this layer
            vision = transformers.CLIPVisionModel.from_pretrained(out)(ours, output_hidden_states=True)
            before = clip.model.visual.forward_intermediates(ours, indices=2, output_fmt="NLC")["image_intermediates"]
            assert relative(vision.hidden_states[-2][:, 1:], before[0]) < 1e-5
    for scalar in ("logit_scale", "logit_bias"):
        if getattr(clip.model, scalar) is not None:
            assert getattr(theirs, scalar).item() == getattr(clip.model, scalar).item()

    back = model.load_clip(f"{folder}@{out}").model.state_dict()
    assert all(torch.equal(value, back[key]) for key, value in clip.model.state_dict().items())


@timm.models.register_model
def tiny_eva(pretrained=False, **options):
    sizes = dict(img_size=18, patch_size=6, embed_dim=24, depth=1, num_heads=2)
    return timm.models.eva.Eva(num_classes=0, swiglu_mlp=True, **sizes)


TIMM = dict(custom_text=True, init_logit_bias=-10)
MASKED = SIGLIP_TEXT | dict(no_causal_mask=False, layers=2)
CLIPA = VIT | dict(pool_type="avg", final_ln_after_pool=True)
CLASS_TOKEN = SIGLIP | dict(timm_model_name="test_vit", image_size=160)
REFUSED = [
    (24, CLIPA, {}, "image features differ from a CLIPModel's by "),
    (24, SIGLIP | dict(timm_model_name="tiny_eva"), dict(custom_text=True), "transformers has no class for its Eva"),
    (24, VIT | dict(ls_init_value=0.1), {}, "CLIPModel does not fit: unexpected weight vision_model.*ls_1.gamma"),
    (24, VIT | dict(no_ln_pre=True), {}, "CLIPModel does not fit: missing weight vision_model.pre_layrnorm.bias"),
    (24, VIT, dict(init_logit_bias=-10), "CLIPModel does not fit: unexpected weight logit_bias"),
    (24, VIT, dict(text_cfg=dict(pool_type="first")), "its text features differ from a CLIPModel's by "),
    (24, SIGLIP, TIMM | dict(text_cfg=MASKED), "its text features differ from a SiglipModel's by "),
    (24, SIGLIP, TIMM, "SiglipModel does not fit: missing weight text_model.head.bias"),
    (64, CLASS_TOKEN, TIMM | dict(text_cfg=SIGLIP_TEXT), "does not fit: unexpected weight vision_model.cls_token"),
]


@pytest.mark.parametrize("width, vision, more, message", REFUSED)
def test_clips_without_a_transformers_class_are_refused(tmp_path, width, vision, more, message):
    folder = write_clip(tmp_path / "clip", width, vision, **more)
    with pytest.raises(UserError, match=f"local-dir:{folder}: cannot be exported: .*{message}") as stop:
        export.main(export.read_args([f"{folder}", f"{tmp_path}/exported"]))
    assert "\n" not in str(stop.value) and [path.name for path in tmp_path.iterdir()] == ["clip"]


def spoil(clip: model.Clip) -> None:
    clip.model.token_embedding.weight.data[5, 0] = math.inf  # of a word that the compared texts lack


@pytest.mark.parametrize(
    "change, message",
    [
        (spoil, "its text_model.embeddings.token_embedding.weight is not finite"),
        (lambda clip: clip.model.visual.preprocess_cfg.update(resize_mode="longest"), "no image processor"),
        (lambda clip: setattr(clip.model.transformer.resblocks[0].mlp, "gelu", torch.nn.SiLU()), "no class for its"),
    ],
)
def test_a_changed_clip_is_refused(tmp_path, change, message):
    clip = model.load_clip("miniature")
    change(clip)
    with pytest.raises(UserError, match=message):
        export.export(clip, tmp_path / "exported")
    assert not any(tmp_path.iterdir())


def test_a_clip_without_a_tokenizer_is_exported(tmp_path, capsys):
    folder, out = write_tiny_siglip(tmp_path / "clip"), tmp_path / "exported"
    (folder / "tokenizer_config.json").unlink()
    export.main(export.read_args([f"{folder}", f"{out}"]))
    assert f"without a tokenizer: {folder}: this CLIP was saved without its tokenizer" in capsys.readouterr().out
    names = sorted(path.name for path in out.iterdir())
    assert names == ["config.json", "model.safetensors", "preprocessor_config.json"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_every_architecture_is_exported_and_read_back(tmp_path, name):
    clip = perturbed(model.load_clip(name, random_weights=True))
    differences = export.export(clip, tmp_path / "exported")
    print(name, differences)
    assert max(differences.values()) < 5e-6
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "exported", backend="pil")
    image = Image.effect_noise((500, 333), 90).convert("RGB")
    pixels = processor(images=image, return_tensors="pt").pixel_values[0]
    assert (pixels - clip.preprocess_image(image)).abs().max() < 1e-5
    back = read_weights(f"{tmp_path}/exported", clip.model)
    assert all(torch.equal(value, back[key]) for key, value in clip.model.state_dict().items())
