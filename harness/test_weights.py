"""Loading weights: each published format of CLIP and φ is read bit for bit, and weights that do not fit are refused."""

import io
import json
import logging
import pickle
import re
import shutil
import sys
import zipfile
from functools import partial
from pathlib import Path

import diffusers
import huggingface_hub
import open_clip
import pytest
import timm
import torch
import transformers
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file

import beyond
import evaluate_mmvp
import model
from harness.pretrained import quiet
from harness.recipes import MINIATURE, locate_clip, recipe_of, split_weights
from harness.test_input import refused, saved
from harness.weights import to_transformers
from test_smoke import CPU, run, write_clip, write_mmvp

VIT = dict(image_size=16, patch_size=4, width=24, layers=2, head_width=12)
SIGLIP = dict(image_size=18, timm_model_name="tiny_siglip", timm_pool="map", timm_proj="none")
SIGLIP_TEXT = dict(no_causal_mask=True, proj_bias=True, pool_type="last", tokenizer_kwargs=dict(clean="canonicalize"))
SAVED = "open_clip_model.safetensors"
ROW = torch.ones(3)


@timm.models.register_model
def tiny_siglip(pretrained=False, **options):
    """A small SigLIP vision tower; timm's small ones have class tokens or registers."""
    sizes = dict(img_size=18, patch_size=4, embed_dim=24, depth=2, num_heads=2, mlp_ratio=3.7)
    return timm.models.VisionTransformer(num_classes=0, global_pool="map", class_token=False, **sizes)


def write_tiny_siglip(folder: Path) -> Path:
    tanh = dict(norm_kwargs=dict(eps=1e-6), act_kwargs=dict(approximate="tanh"), mlp_ratio=3.7)
    return write_clip(folder, 24, SIGLIP, text_cfg=SIGLIP_TEXT | tanh, custom_text=True, init_logit_bias=-10)


def perturbed(clip: model.Clip) -> model.Clip:
    """Perturbs all weights: a fresh CLIP's biases are all 0, and the weights of its norms all 1."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in clip.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return clip


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, str]:
    """A ViT, a small SigLIP, and a ViT whose text tower open_clip nests under `text.`."""
    folder = tmp_path_factory.mktemp("clips")
    nested = write_clip(folder / "nested", 20, VIT, custom_text=True)
    return dict(miniature="miniature", siglip=f"{write_tiny_siglip(folder / 'siglip')}", nested=f"{nested}")


@pytest.fixture
def after() -> torch.nn.Module:
    """The miniature's CLIP with other weights, as after training."""
    return perturbed(model.load_clip("miniature")).model


def write(path: Path, state: dict) -> Path:
    if ".safetensors" in path.name and ".pth" not in path.name:
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def change_config(file: Path, **values) -> None:
    """Sets entries of a JSON file; None removes an entry."""
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def equal(one: dict, other: dict) -> bool:
    return all(torch.equal(value, other[key]) for key, value in one.items())


def without(state: dict, name: str) -> dict:
    return {key: value for key, value in state.items() if key != name}


# ---------------------------------------------------------------------------------------------------------------------
# Weights that are read


def named(state: dict, prefix: str) -> dict:
    return {prefix + name: value for name, value in state.items()}


def whole(clip) -> dict:
    return clip.state_dict()


def tower(clip) -> dict:
    return clip.visual.state_dict()


def openai(clip) -> dict:
    scalars = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
    return {name.removeprefix("text."): value for name, value in clip.state_dict().items()} | scalars


def transformers_whole(clip) -> dict:
    positions = {f"{part}_model.embeddings.position_ids": torch.arange(9)[None] for part in ("text", "vision")}
    return to_transformers(clip.state_dict()) | positions


def transformers_tower(clip) -> dict:
    return {name: value for name, value in to_transformers(clip.state_dict()).items() if name.startswith("vis")}


FILES = {  # what a file is called, and what the weights are nested in
    "whole.safetensors": whole,
    "whole.safetensors.ckpt": whole,  # the content counts, not the name
    "whole.pth.safetensors": whole,
    "whole half.pth": lambda clip: clip.half().state_dict(),
    "whole trained.ckpt": lambda clip: dict(epoch=3, state_dict=named(clip.state_dict(), "module.")),
    "whole model.pth": lambda clip: dict(model=clip.state_dict(), optimizer=dict(step=3)),
    "tower.safetensors": tower,
}
NAMES = {  # what the weights are called
    "whole.pth": whole,
    "whole openai.pt": openai,
    "whole compiled.pth": lambda clip: dict(
        ema={re.sub(r"(blocks\.\d+\.)", r"\1_orig_mod.", name): value for name, value in clip.state_dict().items()}
    ),
    "whole transformers.bin": transformers_whole,
    "tower.ckpt": tower,
    "tower visual.pth": lambda clip: named(tower(clip), "visual."),
    "tower module.pth": lambda clip: named(tower(clip), "module."),
    "tower both.pth": lambda clip: dict(model=named(tower(clip), "module.visual.")),
    "tower transformers.bin": transformers_tower,
    "tower wrapped.bin": lambda clip: named(transformers_tower(clip), "clip."),
}
SIGLIP_NAMES = {  # a CLIPVisionModel has no projection
    "tower SiglipVisionModel.bin": lambda clip: {
        name.removeprefix("vision_model."): value for name, value in transformers_tower(clip).items()
    }
}
FORMS = FILES | NAMES | SIGLIP_NAMES
CASES = [("miniature", form) for form in FILES] + [("siglip", form) for form in SIGLIP_NAMES]
CASES += [(name, form) for name in ("miniature", "nested", "siglip") for form in NAMES]


@pytest.mark.parametrize("name, form", CASES)
def test_each_format_is_read_bit_for_bit(clips, tmp_path, capsys, name, form):
    before, trained = model.load_clip(clips[name]), perturbed(model.load_clip(clips[name]))
    file = write(tmp_path / form, FORMS[form](trained.model))
    read = model.load_clip(f"{clips[name]}@{file}")
    for key, value in read.model.state_dict().items():
        changed = "whole" in form or key.startswith("visual.")
        expected = (trained if changed else before).model.state_dict()[key]
        assert value.dtype == torch.float32 and torch.equal(value, expected.float()), key
    assert read.config == before.config and read.image_size == before.image_size
    assert torch.equal(read.tokenizer()(["a photo of red cat"]), before.tokenizer()(["a photo of red cat"]))
    assert capsys.readouterr().err == ""


def released(clip) -> dict:
    """The state dict that the released code saves: that of its whole model, including Stable Diffusion."""
    state = named(clip.state_dict(), "class_model.model.") | {"class_model.final_fc.bias": ROW, "visual_proj.bias": ROW}
    for part, prefix in (("vae", "vae."), ("unet", "unet."), ("text_encoder", "text_encoder.text_model.")):
        (file,) = (MINIATURE / "diffusion" / part).glob("*.safetensors")
        state |= named(load_file(file), prefix)
    return state


def test_a_nested_clip_is_found_by_its_vision_tower(tmp_path, capsys, after):
    file = write(tmp_path / "CLIP_after_GenFT.pth", released(after))
    assert equal(model.load_clip(f"miniature@{file}").model.state_dict(), after.state_dict())
    ignored = "class_model.final_fc, text_encoder, unet, vae, visual_proj"
    assert capsys.readouterr().err == f"{file}: the CLIP is class_model.model.*; ignored: {ignored}\n"
    write(file, released(after) | dict(ema=tower(after)))
    with refused(r"GenFT.pth: holds 2 CLIPs \(class_model.model.\*, ema.\*\); save one of them"):
        model.load_clip(f"miniature@{file}")


@pytest.mark.parametrize(
    "names, message",
    [
        ("model-00001-of-00002.safetensors model-00002-of-00002.safetensors", ""),
        ("pytorch_model-00001-of-00001.bin training_args.bin", ""),
        ("model-00001-of-00002.safetensors", "missing shard model-00002-of-00002.safetensors"),
        ("model.safetensors model_1.safetensors", "holds both model.safetensors and model_1.safetensors; name"),
        ("model-00001-of-00001.safetensors model.safetensors", "holds both model-00001-of-00001.safetensors and model"),
        ("pytorch_model.bin pytorch_model_1.bin", "holds both pytorch_model.bin and pytorch_model_1.bin"),
    ],
)
def test_only_the_shards_of_one_model_are_joined(tmp_path, after, names, message):
    parts = [name for name in names.split() if "args" not in name]
    for i, name in enumerate(parts):
        write(tmp_path / name, dict(list(after.state_dict().items())[i :: len(parts)]))
    if "args" in names:
        torch.save(dict(code=[1]), tmp_path / "training_args.bin")
    if message:
        with refused(f"{tmp_path}: .*{message}"):
            model.load_clip(f"miniature@{tmp_path}")
    else:
        assert equal(model.load_clip(f"miniature@{tmp_path}").model.state_dict(), after.state_dict())


def test_identical_weights_are_reported(tmp_path, capsys):
    state = tower(model.load_clip("miniature").model)
    file = write(tmp_path / "tower.pth", state)
    model.load_clip(f"miniature@{file}")
    assert capsys.readouterr().err == f"{file}: the same weights as this CLIP's own\n"
    assert model.load_clip(f"miniature@{MINIATURE}/clip").source.endswith("clip")  # open_clip's own folder
    assert "the same weights" in capsys.readouterr().err
    state["ln_post.bias"][0] += 1e-6
    model.load_clip(f"miniature@{write(file, state)}")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("family, name", [("CLIP", "nested"), ("Siglip", "siglip")])
def test_a_folder_of_transformers_gives_its_features(clips, tmp_path, family, name):
    """Compared with a CLIPModel and a SiglipModel that transformers builds, as small as `clips`."""
    vision = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=4, hidden_act="gelu")
    text = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=55, max_position_embeddings=24)
    text |= dict(bos_token_id=1, eos_token_id=54, pad_token_id=0)
    if family == "CLIP":
        vision |= dict(intermediate_size=96, image_size=16)
        text |= dict(intermediate_size=512, hidden_act="gelu")
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    else:
        vision |= dict(intermediate_size=88, image_size=18)
        text |= dict(intermediate_size=473, hidden_act="gelu_pytorch_tanh", projection_size=24)
        config = transformers.SiglipConfig(text_config=text, vision_config=vision)
    theirs = transformers.AutoModel.from_config(config).eval()
    theirs.save_pretrained(tmp_path)
    clip = model.load_clip(f"{clips[name]}@{tmp_path}").model
    images, ids = torch.randn(2, 3, *clip.visual.image_size), torch.randint(54, (2, 24))
    ids[:, -1] = 54
    with torch.no_grad():
        for features, expected in (
            (clip.encode_image(images), theirs.get_image_features(images).pooler_output),
            (clip.encode_text(ids), theirs.get_text_features(ids).pooler_output),
        ):
            assert (features - expected).abs().max() < 1e-5 * expected.abs().max()
    assert clip.logit_scale == theirs.logit_scale


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty cache of the hub; `cached` adds repositories in the layout of `hf download`."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", f"{tmp_path}/hub")
    monkeypatch.setattr(open_clip.pretrained, "hf_hub_download", partial(hf_hub_download, cache_dir=f"{tmp_path}/hub"))
    return tmp_path / "hub"


def cached(hub: Path, name: str) -> Path:
    """The cached snapshot of OWNER/NAME: a folder for the test to create and fill."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return repository / "snapshots" / ("0" * 40)


def test_weights_come_from_the_hub(hub, after):
    folder = cached(hub, "OWNER/NAME") / "Some" / "model2.5b"
    folder.mkdir(parents=True)
    write(folder / "tower.pth", tower(after))
    write(folder / "model.safetensors", tower(after))
    for path in ("Some/model2.5b/tower.pth", "Some/model2.5b"):
        assert equal(tower(model.load_clip(f"miniature@hf-hub:OWNER/NAME/{path}").model), tower(after))
    with refused("model OWNER/OTHER: could not be fetched from the hub: .*[Cc]annot find"):
        model.load_clip("miniature@hf-hub:OWNER/OTHER/tower.pth")


def test_cached_models_load_offline(hub, capsys):
    """φ, which has no tokenizer/config.json, and a CLIP whose tokenizer is in another repository."""
    shutil.copytree(MINIATURE / "diffusion", cached(hub, "OWNER/phi"))
    read, expected = load_phi("OWNER/phi"), load_phi(MINIATURE / "diffusion")
    assert equal(read.unet.state_dict(), expected.unet.state_dict())
    assert torch.equal(read.text_embedding, expected.text_embedding)

    clip_folder, tokenizer = cached(hub, "OWNER/clip"), cached(hub, "OWNER/tokenizer")
    shutil.copytree(MINIATURE / "clip", clip_folder, ignore=shutil.ignore_patterns("tok*"))
    shutil.copytree(MINIATURE / "clip", tokenizer, ignore=shutil.ignore_patterns("open*"))
    config = (clip_folder / "open_clip_config.json").read_text()
    (clip_folder / "open_clip_config.json").write_text(config.replace('"own"', '"OWNER/tokenizer"'))
    capsys.readouterr()
    clip, miniature = model.load_clip(f"hf-hub:OWNER/clip@{MINIATURE}/clip"), model.load_clip("miniature")
    assert capsys.readouterr().err.endswith("the same weights as this CLIP's own\n")  # and assumes no preprocessing
    assert equal(clip.model.state_dict(), miniature.model.state_dict())
    assert torch.equal(clip.tokenizer()(["a red house"]), miniature.tokenizer()(["a red house"]))
    for one, other in zip(
        beyond.embed_phrases(clip, "OWNER/phi", "", CPU, 3),
        beyond.embed_phrases(miniature, f"{MINIATURE}/diffusion", "", CPU, 3),
    ):
        assert torch.equal(one, other)


def test_an_architecture_alone_takes_a_whole_clip(tmp_path, capsys, after):
    config = json.loads((MINIATURE / "clip" / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "tiny-arch.json").write_text(json.dumps(config | dict(quick_gelu=True)))
    open_clip.add_model_config(tmp_path / "tiny-arch.json")
    read = model.load_clip(f"tiny-arch@{write(tmp_path / 'whole.pth', whole(after))}").model
    assert equal(read.state_dict(), after.state_dict())
    assert type(read.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    assumed = "assuming QuickGELU and open_clip's default preprocessing (mean (0.48145466, 0.4578275, 0.40821073), std"
    assert f"tiny-arch@{tmp_path}/whole.pth: {assumed}" in capsys.readouterr().err
    random = model.load_clip("tiny-arch", random_weights=True)
    assert random.image_size == 64 and random.tokenizer_error.startswith("no tokenizer with --random-weights")
    with refused("tower.pth: holds only the vision tower; for the text tower, put ARCH:TAG"):
        model.load_clip(f"tiny-arch@{write(tmp_path / 'tower.pth', tower(after))}")


def test_a_folder_without_preprocessing_is_named(tmp_path, capsys):
    folder = Path(shutil.copytree(MINIATURE / "clip", tmp_path / "clip"))
    change_config(folder / "open_clip_config.json", preprocess_cfg=None)
    model.load_clip(f"{folder}")
    said = capsys.readouterr().err
    assert said.startswith(f"{folder}: assuming open_clip's default preprocessing (mean (0.48145466, ")
    assert said.endswith("bicubic, shortest)\n") and said.count("\n") == 1


def test_names_with_an_at_sign(tmp_path, monkeypatch):
    home = tmp_path / "user@corp.example.com"
    for folder in (tmp_path / "me@home", home / "clip"):
        shutil.copytree(MINIATURE / "clip", folder)
    (home / "w@1.pth").touch()
    (tmp_path / "L@224.pth").touch()
    monkeypatch.chdir(tmp_path)
    assert split_weights("me@home") == ("me@home", None) and locate_clip("me@home") == ("local-dir:me@home", None)
    assert split_weights("ViT-L-14:openai@L@224.pth") == ("ViT-L-14:openai", "L@224.pth")
    assert locate_clip("ViT-L-14:openai@L@224.pth") == ("ViT-L-14", "openai")
    assert locate_clip("ViT-L-14@L@224.pth") == ("ViT-L-14", None)
    for weights in (f"{home}/w@1.pth", "L@224.pth", "hf-hub:a/b/c.pth"):
        assert split_weights(f"{home}/clip@{weights}") == (f"{home}/clip", weights)
    with refused("^typo.pth: no such weights"):
        locate_clip(f"{home}/clip@typo.pth")
    with refused("^v1: no such weights; .* `hf download a/b --revision v1 --local-dir DIR` and name DIR"):
        locate_clip("hf-hub:a/b@v1")
    assert recipe_of("openai-vit-l-14-224") and not recipe_of("openai-vit-l-14-224@L@224.pth")


def test_every_command_takes_clip_at_weights(tmp_path, monkeypatch, after):
    file = write(tmp_path / "after.pth", after.state_dict())
    out = run(tmp_path / "run", f"--clip miniature@{file} --lr 0")
    assert equal(load_file(out / "clip" / SAVED), after.state_dict())
    command = f"evaluate_mmvp.py miniature@{file} {out}/clip --mmvp {write_mmvp(tmp_path / 'mmvp')} --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", command.split())
    evaluate_mmvp.main(evaluate_mmvp.read_args())
    pairs = [line.split(",", 1)[1] for line in (tmp_path / "pairs.csv").read_text().splitlines()[1:]]
    assert pairs and pairs[: len(pairs) // 2] == pairs[len(pairs) // 2 :]


# ---------------------------------------------------------------------------------------------------------------------
# Weights that are refused

K_PROJ = "vision_model.encoder.layers.0.self_attn.k_proj"


@pytest.mark.parametrize(
    "form, lacks, more, message",
    [
        (whole, "visual.ln_post.bias", {}, "missing weight visual.ln_post.bias"),
        (whole, "ln_final.weight", {}, "missing weight ln_final.weight"),
        (tower, "proj", {}, "missing weight visual.proj"),
        (transformers_tower, "visual_projection.weight", {}, "missing weight visual.proj$"),
        (transformers_whole, f"{K_PROJ}.bias", {}, "missing weight visual.transformer.resblocks.0.attn.in_proj_bias$"),
        (lambda clip: {}, "", {"other": ROW}, r"missing weight visual.class_embedding \(and 55 more\)"),
        (whole, "", {"final_fc.weight": ROW}, "unexpected weight final_fc.weight"),
        (tower, "", {"projection": ROW}, "unexpected weight visual.projection"),
        (transformers_tower, "", {"vision_model.a": ROW, "b": ROW}, r"unexpected weight b \(and 1 more\)"),
        (tower, "", {"proj": ROW}, r"wrongly shaped weight visual.proj \(3,\) instead of \(128, 128\)"),
        (transformers_whole, "", {f"{K_PROJ}.weight": torch.ones(2, 3)}, "Sizes of tensors must match"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, form, lacks, more, message):
    state = form(model.load_clip("miniature").model)
    assert not lacks or lacks in state
    file = write(tmp_path / "misfit.pth", without(state, lacks) | more)
    with refused(f"{file}: does not fit.*: {message}"):
        model.load_clip(f"miniature@{file}")


def torchscript() -> bytes:
    """An archive in the layout of torch.jit.save, as OpenAI publishes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("ViT/constants.pkl", pickle.dumps(()))
    return buffer.getvalue()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(tmp_path, after, suffix, share):
    file = write(tmp_path / f"cut{suffix}", after.state_dict())
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with refused(f"{file}: could not be read as weights: .*[a-z]") as stop:
        model.load_clip(f"miniature@{file}")
    assert len(str(stop.value)) < 400


@pytest.mark.parametrize(
    "content, message",
    [
        (b"epoch 1, loss 0.1\n", "could not be read as weights: neither a safetensors nor a torch.save file"),
        (b"version https://git-lfs.github.com/spec/v1\noid\n", "is a git-lfs pointer.*git lfs pull"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (saved([1, 2]), "could not be read as weights: expected a dict of tensors, got a list"),
        (saved({1: ROW}), "does not fit this CLIP: missing weight "),
        (torchscript(), "is a TorchScript program, which is not executed; .*ARCH:openai"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content, message):
    (tmp_path / "odd.bin").write_bytes(content)
    with refused(f"odd.bin: {message}"):
        model.load_clip(f"miniature@{tmp_path}/odd.bin")


# ---------------------------------------------------------------------------------------------------------------------
# The diffusion model's files

PARTS = dict(unet="diffusion_pytorch_model", vae="diffusion_pytorch_model", text_encoder="model")  # as safetensors


def load_phi(folder: Path | str) -> model.Diffusion:
    return model.load_diffusion(f"{folder}", "red house", torch.float32, CPU)


def assert_miniatures_phi(folder: Path) -> None:
    read, expected = load_phi(folder), load_phi(MINIATURE / "diffusion")
    assert equal(read.unet.state_dict(), expected.unet.state_dict())
    assert equal(read.vae.state_dict(), expected.vae.state_dict())
    assert torch.equal(read.text_embedding, expected.text_embedding)


@pytest.fixture
def phi(tmp_path) -> Path:
    """A copy of the miniature's diffusion model, which the test changes."""
    return Path(shutil.copytree(MINIATURE / "diffusion", tmp_path / "phi"))


@pytest.mark.parametrize("part", PARTS)
def test_all_weights_of_the_diffusion_model_are_loaded(phi, part):
    file = phi / part / f"{PARTS[part]}.safetensors"
    state = load_file(file)
    last = list(state)[-1]
    for wrong, message in (
        (without(state, last), f"missing weight {last}$"),
        (state | dict(extra=ROW, more=ROW + 1), r"unexpected weight extra \(and 1 more\)"),
        (state | {last: ROW}, rf"wrongly shaped weight {last} \(3,\) instead of \("),
    ):
        write(file, wrong)
        with refused(f"diffusion model {phi} could not be loaded: its {part}: {message}"):
            load_phi(phi)
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    with refused(f"{file}: is a git-lfs pointer"):
        load_phi(phi)
    write(file, state).rename(file.with_stem("odd"))
    with refused(f"its {part} has no {file.name}; rename the right one of odd.safetensors to"):
        load_phi(phi)


@pytest.mark.parametrize(
    "part, values, message",
    [
        ("scheduler", dict(beta_start=None), "its scheduler, a DDPMScheduler, has no DDPM noise schedule"),
        ("scheduler", dict(beta_schedule=None), "expected beta_end, beta_schedule, beta_start, num_train_timesteps in"),
        ("scheduler", dict(_class_name="FlowMatchEulerDiscreteScheduler"), "a FlowMatchEulerDiscreteScheduler, has no"),
        ("scheduler", dict(prediction_type="flow_prediction"), "not a Stable Diffusion 1.x or 2.x: it predicts flow"),
        ("unet", dict(time_cond_proj_dim=256), "its U-Net reads 4 and has time_cond_proj_dim"),
    ],
)
def test_another_kind_of_diffusion_model_is_refused(phi, part, values, message):
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    change_config(phi / part / name, **values)
    with refused(message):
        model.load_diffusion(f"{phi}", "", torch.float32, CPU, random_weights=True)


def test_alphas_cumprod_follow_the_configured_betas(phi):
    change_config(phi / "scheduler" / "scheduler_config.json", _class_name="PNDMScheduler", beta_start=0.001)
    beta = torch.linspace(0.001**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(load_phi(phi).alphas_cumprod.double(), (1 - beta).cumprod(0), rtol=1e-5, atol=0)


def test_the_image_size_is_the_unets(phi):
    diffusion = load_phi(phi)
    for size, pixels in ((8, 64), ([8, 8], 64), (None, 0), ([8, 16], 0)):
        diffusion.unet.register_to_config(sample_size=size)
        if pixels:
            assert diffusion.image_size == pixels
        else:
            with refused("the U-Net's sample_size is .*; give --image-size"):
                _ = diffusion.image_size


def test_a_missing_shard_is_named(phi):
    kind = diffusers.UNet2DConditionModel
    kind.from_pretrained(phi / "unet").save_pretrained(phi / "unet", max_shard_size="1MB")
    (phi / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert_miniatures_phi(phi)
    index = phi / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    (phi / "unet" / json.loads(index.read_text())["weight_map"]["conv_out.bias"]).unlink()
    with refused("its unet: .*diffusion_pytorch_model-000..-of-000...safetensors"):
        load_phi(phi)
    index.unlink()
    with refused("its unet has no diffusion_pytorch_model.safetensors; its shards need .*safetensors.index.json"):
        load_phi(phi)


def test_old_weight_names_of_diffusion_models_are_read(phi):
    """Names of Stable Diffusion 1.x: the VAE's attention, and the text encoder's position numbers."""
    file, renamed = phi / "vae" / "diffusion_pytorch_model.safetensors", {}
    for name, value in load_file(file).items():
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = value
    assert renamed.keys() != load_file(file).keys()
    write(file, renamed)
    file = phi / "text_encoder" / "model.safetensors"
    write(file, load_file(file) | {"text_model.embeddings.position_ids": torch.arange(24)[None]})
    assert_miniatures_phi(phi)


@pytest.mark.parametrize("suffix", [".fp16.safetensors", ".bin", ".fp16.bin"])
def test_all_file_names_of_a_diffusion_models_weights_are_read(phi, suffix):
    for part, stem in PARTS.items():
        file = phi / part / f"{stem}.safetensors"
        if part == "text_encoder" and "bin" in suffix:
            stem = "pytorch_model"
        write(file.with_name(stem + suffix), load_file(file))
        file.unlink()
    assert_miniatures_phi(phi)


def test_quiet_can_be_nested():
    with quiet():
        with quiet():
            pass
        assert not logging.getLogger().isEnabledFor(logging.ERROR)
    assert logging.getLogger().isEnabledFor(logging.ERROR)
