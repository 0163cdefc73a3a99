"""Tests of the method, each against an independent computation. They need no GPU and no network.

The models are the miniature's and a small SigLIP with random weights, built at the end of this file; both are loaded by
the same code as real ones. harness/test_run.py tests fault tolerance, harness/test_input.py the error messages.
"""

import argparse
import io
import json
import math
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

import beyond
import condition
import data
import evaluate_mmvp
import model
import train
from condition import Recap, parse_recap
from harness import scores
from harness.checkpoint import read_checkpoint, read_state
from harness.errors import Stopped, UserError
from harness.options import parse_args
from harness.pretrained import quiet
from harness.processes import process_group
from harness.recipes import BASELINES, MINIATURE, RECIPES, TYPES, beyond_the_paper, locate_clip

CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------------------------
# condition.py: Algorithm 1, lines 2 and 3


@pytest.mark.parametrize("name", ["miniature", "siglip"])
def test_tokens_are_clips_own(clips, name):
    clip = model.load_clip(clips[name])
    visual, images = clip.model.visual, torch.randn(3, 3, clip.image_size, clip.image_size)
    with torch.no_grad():
        cls, local = condition.visual_tokens(visual, images)
        assert torch.equal(cls, clip.model.encode_image(images))  # bit for bit
        assert torch.equal(local, local_tokens(visual, images))
    assert local.shape[1] == clip.num_patches


def local_tokens(visual: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The patch tokens, computed by other library calls."""
    if hasattr(visual, "trunk"):
        return visual.trunk.forward_features(images)[:, visual.trunk.num_prefix_tokens :]
    visual.output_tokens = True
    local = visual(images)[1] @ visual.proj
    visual.output_tokens = False
    return local


class NoInit(torch.overrides.TorchFunctionMode):
    """Skips in-place writes: initializing a model costs no time before it moves to the meta device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__.endswith("_") and not function.__name__.startswith("_"):  # normal_, fill_, clamp_, …
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def test_every_recipe_has_the_papers_tokens():
    papers = {  # patches of its CLIP, tokens of its condition
        "openai-vit-l-14-224": (256, 77), "openai-vit-l-14-336": (576, 77),
        "metaclip-vit-l-14-224": (256, 257), "metaclip-vit-h-14-224": (256, 257),
        "siglip-so400m-14-224": (256, 43), "siglip-so400m-14-384": (729, 73),
        "dfn-vit-h-14-224": (256, 257), "dfn-vit-h-14-378": (729, 365),
    }  # fmt: skip
    assert set(papers) == {name for name, recipe in RECIPES.items() if recipe.published}
    num_patches = {}
    for name, (patches, tokens) in papers.items():
        recipe, (source, tag) = RECIPES[name], locate_clip(name)
        assert tag in open_clip.list_pretrained_tags_by_model(source)
        if source not in num_patches:
            with NoInit():
                num_patches[source] = model.load_clip(name, random_weights=True, device="meta").num_patches
        assert num_patches[source] == patches
        assert parse_recap(recipe.recap, patches).count + 1 == tokens
        assert (recipe.join == "positions") == (tokens == 77)
        assert not beyond_the_paper(vars(recipe))
        assert np.mean(BASELINES[name]) == pytest.approx(recipe.published[0], abs=0.06)  # mean of the nine types


def test_recap_is_uniform_and_without_replacement():
    rngs = [np.random.default_rng(i) for i in range(4000)]
    patches = condition.draw_patch_indices(Recap("random", 20, 5), 2, rngs, CPU).numpy()  # (images, states, K)
    assert patches.shape == (4000, 2, 5)
    assert all(len(set(state)) == 5 for image in patches for state in image)
    counts = np.bincount(patches.ravel(), minlength=20)  # each of 20 patches: 8,000 draws of 5 of 20
    assert abs(counts - 2000).max() < 5 * math.sqrt(8000 * 0.25 * 0.75)
    together = (patches == 3).any(-1) & (patches == 7).any(-1)  # each pair of patches: 5 · 4 / (20 · 19)
    assert abs(together.mean() - 1 / 19) < 5 * math.sqrt(1 / 19 / 8000)
    assert (patches[:, 0] == patches[:, 1]).all(-1).mean() < 0.01  # each state has its own


# ---------------------------------------------------------------------------------------------------------------------
# The loss and its gradient: Algorithm 1, lines 2 to 5


def written_out(clip, diffusion, conditioner, recap: str, images, latents, drawn: dict) -> torch.Tensor:
    """The paper's algorithm written out, image by image and state by state, in the precision of its arguments."""
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2  # SD's schedule
    linear, losses = conditioner.projection, []
    for b, image in enumerate(images):
        cls, local = clip.encode_image(image[None])[0], local_tokens(clip.visual, image[None])[0]
        for n, t in enumerate(drawn["timesteps"][b].tolist()):
            if recap == "pool:7":
                tokens = [local[i : i + 7].mean(0) for i in range(0, 98, 7)]  # of 100 patches, two are dropped
            elif recap.startswith("random"):
                tokens = [local[i] for i in drawn["patch_indices"][b, n].tolist()]
            else:
                tokens = list(local) if recap == "all" else []
            tokens = torch.stack([cls, *tokens]) @ linear.weight.T + linear.bias
            text = diffusion.text_embedding[0]
            c = tokens + (text.mean(0) if conditioner.join == "mean" else text)
            alpha_bar = torch.prod(1 - beta[: t + 1])
            z, noise = latents[b], drawn["noise"][b, n]
            z_t = alpha_bar.sqrt() * z + (1 - alpha_bar).sqrt() * noise
            target = noise
            if diffusion.prediction_type == "v_prediction":
                target = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * z
            output = diffusion.unet(z_t[None], torch.tensor([t]), c[None]).sample[0]
            losses.append(((output - target) ** 2).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    "case",
    [
        "miniature random:30% mean epsilon",
        "miniature random:23 positions v_prediction",  # 1 + 23 tokens, as many as the text has positions
        "miniature all mean v_prediction",
        "miniature none mean epsilon",
        "siglip pool:7 mean epsilon",
    ],
)
def test_loss_and_gradients_are_algorithm_1(clips, tmp_path, case):
    name, recap, join, prediction = case.split()
    folder = Path(shutil.copytree(MINIATURE / "diffusion", tmp_path / "diffusion"))
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', f'"{prediction}"'))
    clip, diffusion = model.load_clip(clips[name]), model.load_diffusion(f"{folder}", "red house", torch.float32, CPU)
    parsed = parse_recap(recap, clip.num_patches)
    torch.manual_seed(3)
    conditioner = condition.VisualCondition(clip, diffusion, parsed, join)
    images = torch.rand(2, 3, 32, 32)
    latents, rngs = diffusion.encode(images), data.image_rngs(4, [(0, 0), (0, 1)])
    patch_indices = condition.draw_patch_indices(parsed, 3, rngs, CPU)
    timesteps, noise = train.draw_states(train.Draws(4, parsed, 3, range(1000)), latents.shape[1:], rngs, CPU)

    c, _ = conditioner(images, diffusion.text_embedding, patch_indices)
    loss = train.denoising_loss(diffusion, latents, c, timesteps, noise)
    loss.backward()
    gradients = {k: p.grad.double() for k, p in conditioner.named_parameters()}

    conditioner.double().zero_grad()
    diffusion.unet.double()
    diffusion.text_embedding = diffusion.text_embedding.double()
    drawn = dict(timesteps=timesteps, noise=noise.double(), patch_indices=patch_indices)
    images = clip.preprocess_batch(images).double()
    expected = written_out(clip.model, diffusion, conditioner, recap, images, latents.double(), drawn)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    largest = max(p.grad.norm() for p in conditioner.parameters())
    for k, p in conditioner.named_parameters():
        assert (gradients[k] - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-6 * largest, k
    assert all(p.grad is None for p in [*diffusion.unet.parameters(), *diffusion.vae.parameters()])


def test_condition_in_bf16_is_near_fp32():
    clip, losses = model.load_clip("miniature"), []
    for dtype in (torch.float32, torch.bfloat16):
        diffusion = model.load_diffusion(f"{MINIATURE}/diffusion", "", dtype, CPU)
        torch.manual_seed(5)
        conditioner = condition.VisualCondition(clip, diffusion, parse_recap("all", 64), "mean")
        pixels, noise, t = torch.rand(4, 3, 64, 64), torch.randn(4, 2, 4, 8, 8), torch.randint(0, 1000, (4, 2))
        c, _ = conditioner(pixels, diffusion.text_embedding)
        losses.append(train.denoising_loss(diffusion, diffusion.encode(pixels), c, t, noise))
        assert losses[-1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.01)


def test_text_embedding_and_latents_are_diffusers():
    """Against diffusers' pipeline: the embedding of the prompt, and the VAE's mean times the scaling factor."""
    folder = MINIATURE / "diffusion"
    diffusion = model.load_diffusion(str(folder), "the red house", torch.float32, CPU)
    pipe = StableDiffusionPipeline.from_pretrained(folder).to(torch.float32)
    torch.testing.assert_close(diffusion.text_embedding, pipe.encode_prompt("the red house", "cpu", 1, False)[0])
    pixels = torch.rand(2, 3, 32, 32)
    moments = pipe.vae.quant_conv(pipe.vae.encoder(pixels * 2 - 1))
    scale = json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"]
    torch.testing.assert_close(diffusion.encode(pixels), moments[:, :4] * scale)


def test_training_preprocesses_images_as_evaluation_does():
    """Against Pillow's bicubic resize and the CLIP's own mean and std, within the rounding of Pillow's 8 bits."""
    clip, image = model.load_clip("miniature"), picture(150)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
    std = torch.tensor(clip.model.visual.preprocess_cfg["std"])[:, None, None]
    difference = (clip.preprocess_batch(pixels)[0] - clip.preprocess_image(image)) * std * 255
    assert difference.abs().max() < 5  # Pillow rounds and clips twice, after rows and after columns


# ---------------------------------------------------------------------------------------------------------------------
# data.py: Algorithm 1, line 1, and the draws


def test_shards_read_what_tarfile_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng, shards, expected = np.random.default_rng(0), [], []
    for s in range(3):
        files = {}
        for i in range(4):
            key = f"{s:05}{i:04}" + "long" * 40 * (i == 2)  # a name longer than 100 bytes has another header
            files[f"{key}.jpg"] = rng.bytes(int(rng.integers(1, 2000)))
            files |= {f"{key}.txt": b"caption", f"{key}.json": b"{}"}
        shards.append(str(write_shard(tmp_path / f"{s:05}.tar", files)))
        with tarfile.open(shards[-1]) as tar:
            expected += [tar.extractfile(m).read() for m in tar.getmembers() if m.name.endswith(".jpg")]
    images = data.open_images([f"{tmp_path}/*.tar"])
    assert [images.read(i) for i in range(len(images))] == expected

    caches = list((tmp_path / "cache" / "diva").iterdir())  # written there and nowhere else
    assert len(caches) == 3 and len(list(tmp_path.iterdir())) == 4
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)  # read from the cache
        assert np.array_equal(data.open_images(shards).members, images.members)
    caches[0].write_bytes(caches[0].read_bytes()[:100])  # truncated: indexed again
    assert np.array_equal(data.open_images(shards).members, images.members)
    write_shard(Path(shards[0]), {"a.png": b"12345"})  # changed: indexed again
    assert data.open_images(shards).read(0) == b"12345" and len(data.open_images(shards)) == 9
    monkeypatch.setenv("XDG_CACHE_HOME", f"{shards[1]}/no/folder")  # no cache can be written
    assert data.open_images(shards).read(0) == b"12345"


def test_crops_have_the_papers_area_and_ratio(monkeypatch):
    rng = np.random.default_rng(0)
    for width, height in ((500, 375), (375, 500), (1000, 200), (64, 64)):
        boxes = np.array([data.random_crop_box(width, height, rng) for _ in range(500)])
        w, h = (boxes[:, 2:] - boxes[:, :2]).T
        assert boxes.min() >= 0 and boxes.max() <= 1 + 1e-9
        ratio = w * width / (h * height)
        assert ratio.min() > 3 / 4 - 1e-9 and ratio.max() < 4 / 3 + 1e-9
        if width != 1000:  # 1000 × 200 is too wide, so it gets its largest centered crop
            assert (w * h).min() > 0.9 - 1e-9
    # A crop decoded at a fraction of its size and resized once, against cropping and resizing the whole image
    image = picture(1600).crop((0, 0, 1600, 1200))
    monkeypatch.setattr(data, "random_crop_box", lambda width, height, rng: (0.05, 0.02, 0.97, 0.99))
    crop = data.decode_crop(jpeg(image, quality=95), 128, rng).transpose(1, 2, 0)
    whole = image.crop((80, 24, 1552, 1188)).resize((128, 128), Image.Resampling.BICUBIC)
    assert np.abs(crop.astype(int) - np.asarray(whole)).mean() < 3


def test_draws_depend_on_seed_step_and_position_alone(tmp_path):
    shard = write_shard(tmp_path / "0.tar", {f"{i}.jpg": jpeg(picture(40, i)) for i in range(5)})
    source = data.open_images([f"{shard}"])

    def read(micro_batch: int, processes: int, workers: int, seed: int = 0) -> dict:
        """Pixels and draws of steps 1 and 2 of a batch of 4, by step and position."""
        items = {}
        for rank in range(processes):
            dataset = data.TrainingImages(source, 64, 4, seed)
            keys = data.micro_batch_keys(1, 3, 4, micro_batch, rank, processes)
            for batch in data.read_batches(dataset, keys, workers, CPU):
                rngs, recap = data.image_rngs(seed, batch["keys"]), Recap("random", 64, 19)
                patch_indices = condition.draw_patch_indices(recap, 2, rngs, CPU)
                draws = train.Draws(seed, recap, 2, range(1000))
                timesteps, noise = train.draw_states(draws, (4, 8, 8), rngs, CPU)
                for i, key in enumerate(batch["keys"]):
                    items[key] = [batch["images"][i], timesteps[i], noise[i], patch_indices[i]]
        return items

    one = read(4, 1, 0)
    assert sorted(one) == [(step, position) for step in (1, 2) for position in range(4)]
    for other in (read(1, 2, 0), read(2, 1, 3)):
        assert one.keys() == other.keys()
        assert all(torch.equal(a, b) for key in one for a, b in zip(one[key], other[key], strict=True))
    changed = read(4, 1, 0, seed=1)
    assert not any(torch.equal(one[key][2], changed[key][2]) for key in one)
    noises = torch.stack([item[2] for item in one.values()])
    assert len(noises.flatten(1).unique(dim=0)) == 8  # each image has its own noise
    assert noises.mean().abs() < 5 / math.sqrt(noises.numel()) and abs(noises.std() - 1) < 0.05

    rngs = [np.random.default_rng(i) for i in range(5000)]
    for low, high in ((0, 1000), (500, 900)):
        draws = train.Draws(0, Recap("none", 1, 0), 2, range(low, high))
        t = train.draw_states(draws, (1, 1, 1), rngs, CPU)[0].numpy()
        assert t.min() == low and t.max() == high - 1  # uniform: its mean within five standard errors
        assert abs(t.mean() - (low + high - 1) / 2) < 5 * (high - low) / math.sqrt(12 * 10_000)

    order = data.TrainingImages(source, 64, 4)
    seen = [order.index(*divmod(i, 4)) for i in range(10)]  # 2.5 steps: two epochs of 5 images
    assert sorted(seen[:5]) == sorted(seen[5:]) == [0, 1, 2, 3, 4] and seen[:5] != seen[5:]


# ---------------------------------------------------------------------------------------------------------------------
# train.py: Algorithm 1, line 6, and a run


def test_learning_rate_is_the_papers():
    def rate(step: int, steps: int, warmup: float, start: int = 0) -> float:
        return train.learning_rate(step, train.Stage(None, range(start, start + steps), 1e-4, warmup, 1, 0))

    rates = [rate(step, 4600, 0.005) for step in range(4600)]
    assert rates[:23] == pytest.approx([1e-4 * k / 24 for k in range(1, 24)]) and rates[23] == max(rates) == 1e-4
    assert rates[23 + 4577 // 2] == pytest.approx(0.5e-4, rel=1e-3) and 0 < rates[-1] < 1e-10
    assert rates == [rate(step, 4600, 0.005, start=7) for step in range(7, 4607)]  # a later stage
    assert rate(0, 1, 0) == 1e-4
    assert rate(0, 5, 0.03) == 0.5e-4  # at least one step warms up


@pytest.mark.parametrize(
    "more, moving, rates",
    [
        ("", ["visual projection"] * 3, (2 / 3, 4 / 3, 2)),  # two of the three steps warm up
        ("--freeze-projection --ldifs 9", ["visual"] * 3, (2 / 3, 4 / 3, 2)),
        ("--projection-steps 1 --projection-lr 3", ["projection"] + ["visual projection"] * 2, (1.5, 1, 2)),
    ],
)
def test_steps_are_clipped_sgd_with_momentum_and_nothing_else_moves(tmp_path, monkeypatch, more, moving, rates):
    """Three steps of `train`, against steps taken by hand with the clipped gradient of each whole batch.

    LDIFS is the mean squared distance to the original CLIP's class token; the logged loss excludes it.
    """
    flags = f"--micro-batch 1 --max-grad-norm 0.05 --lr 2 --warmup 0.67 --momentum 0.8 {more}"
    args, build, built = settings("unused", flags), train.build, []
    monkeypatch.setattr(train, "build", lambda *args: built.append(build(*args)) or built[-1])
    out = run(tmp_path / "run", flags)
    clip, diffusion, conditioner = build(args, CPU)  # before training
    original = model.load_clip("miniature").model
    dataset = data.TrainingImages(data.open_images(args.data), 64, 4, args.seed)
    draws, velocity = train.Draws(args.seed, conditioner.recap, 2, range(1000)), {}
    for step, (line, parts, lr) in enumerate(zip(metrics(out), moving, rates, strict=True)):
        batch = data.to_device(data.collate([dataset[step, position] for position in range(4)]), CPU)
        rngs, latents = data.image_rngs(args.seed, batch["keys"]), diffusion.encode(batch["images"])
        patch_indices = condition.draw_patch_indices(conditioner.recap, 2, rngs, CPU)
        c, cls = conditioner(batch["images"], diffusion.text_embedding, patch_indices)
        timesteps, noise = train.draw_states(draws, latents.shape[1:], rngs, CPU)
        loss = train.denoising_loss(diffusion, latents, c, timesteps, noise)
        original_cls = original.encode_image(clip.preprocess_batch(batch["images"])).detach()
        conditioner.zero_grad()
        (loss + args.ldifs * (cls - original_cls).square().mean()).backward()
        parameters = {k: p for k, p in conditioner.named_parameters() if k.split(".")[0] in parts.split()}
        norm = torch.cat([p.grad.flatten() for p in parameters.values()]).norm()
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-4) and line["lr"] == pytest.approx(lr)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and norm > 0.05
        if step and parts != moving[step - 1]:
            velocity = {}  # each stage has its own optimizer
        with torch.no_grad():
            for k, p in parameters.items():
                velocity[k] = 0.8 * velocity.get(k, 0) + p.grad * 0.05 / norm
                p -= lr * velocity[k]
    trained = weights(out)
    for k, p in conditioner.named_parameters():
        torch.testing.assert_close(trained[k], p.detach(), rtol=1e-4, atol=1e-5)

    start, (theta, phi, _) = original.state_dict(), built[0]  # after training
    moved = {k for k, v in theta.model.state_dict().items() if not torch.equal(v, start[k])}
    assert moved == {k for k, _ in theta.model.visual.named_parameters(prefix="visual")}
    assert torch.equal(trained["projection.weight"], conditioner.projection.weight) == ("freeze" in more)
    for part in ("vae", "unet"):
        after, before = getattr(phi, part).state_dict(), getattr(diffusion, part).state_dict()
        assert all(torch.equal(v, before[k]) for k, v in after.items())


@pytest.mark.parametrize("more", ["", "--optimizer adamw --projection-steps 2"])
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, monkeypatch, more):
    """Stopped during the fourth step, which it completes; with two stages, also during the first stage's last step."""
    flags = f"--steps 5 --save-every 2 --micro-batch 2 {more}"
    whole, begun = run(tmp_path / "whole", flags), 0
    for end in (2, 4) if more else (4,):
        with monkeypatch.context() as patch:
            losses = at_loss(patch, 2 * (end - begun) - 1, lambda: signal.raise_signal(signal.SIGTERM))
            with pytest.raises(Stopped, match=f"SIGTERM: stopped after {end} steps, .* the same command again"):
                run(tmp_path / "run", flags)
        assert len(losses) == 2 * (end - begun) and steps_saved(tmp_path / "run") == end
        begun = end
    assert_same_run(whole, run(tmp_path / "run", flags))
    assert_saved(tmp_path / "run")
    with pytest.raises(UserError, match="holds another run .steps 5 there, 6 here; .*seed 0 there, 1 here.; .*remove"):
        run(tmp_path / "run", f"{more} --steps 6 --seed 1")


@pytest.mark.parametrize(
    "micro_batch, more", [(1, ""), *(pytest.param(2, m, marks=pytest.mark.slow) for m in ("", "--projection-steps 1"))]
)
def test_processes_and_accumulation_give_the_same_weights(tmp_path, micro_batch, more):
    """Processes × micro-batch × accumulation: 2 × 1 × 2 (slow: 2 × 2 × 1), against 1 × 4 × 1 and 1 × 2 × 2."""
    command = f"{TORCHRUN} train.py {SMALL} {tmp_path}/two --micro-batch {micro_batch} {more}".split()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    one, start = weights(run(tmp_path / "one", more)), model.load_clip("miniature").model.visual.state_dict()
    assert max((one[f"visual.{k}"] - v).norm() / v.norm() for k, v in start.items()) > 1e-4  # it was trained
    assert_near(one, weights(tmp_path / "two"), 1e-5)
    assert_near(one, weights(run(tmp_path / "accumulated", f"--micro-batch 2 {more}")), 1e-5)


@pytest.mark.parametrize("name", ["miniature", "siglip", "ViT-B-32:openai"])
def test_open_clip_loads_the_saved_clip(clips, tmp_path, name):
    clip = model.load_clip(clips.get(name, name), random_weights=":" in name)
    clip.save(tmp_path)
    reloaded, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    texts, image = ["a photo of the red house", "blue"], picture(50)
    tokens, pixels = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(texts), preprocess(image)
    assert torch.equal(tokens, clip.tokenizer()(texts)) and torch.equal(pixels, clip.preprocess_image(image))
    reloaded.eval()
    with torch.no_grad():
        assert torch.equal(reloaded.encode_image(pixels[None]), clip.model.encode_image(pixels[None]))
        assert torch.equal(reloaded.encode_text(tokens), clip.model.encode_text(tokens))
    if ":" in name:  # OpenAI's weights need QuickGELU, which the name of this architecture does not imply
        assert json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]["quick_gelu"]


# ---------------------------------------------------------------------------------------------------------------------
# beyond.py


def test_a_fitted_projection_maps_class_tokens_to_text_embeddings():
    """Against NumPy's least squares; class tokens get the mean and the variance of the texts."""
    rng = np.random.default_rng(0)
    phrases = rng.standard_normal((500, 6)) @ rng.standard_normal((6, 6)) + rng.standard_normal(6)
    states = phrases @ rng.standard_normal((6, 5)) + rng.standard_normal((500, 5))
    tokens = rng.standard_normal((400, 6)) * 5 + 3
    projection = torch.nn.Linear(6, 5).double()
    beyond.fit_linear(projection, *map(torch.from_numpy, (phrases, states, tokens)))
    centred, image = phrases - phrases.mean(0), tokens - tokens.mean(0)
    ridge = np.sqrt(0.3 * centred.var() * 500) * np.eye(6)  # as further rows whose target is zero
    rows = np.concatenate([centred, ridge])
    fitted = np.linalg.lstsq(rows, np.concatenate([states - states.mean(0), np.zeros((6, 5))]), rcond=None)[0]
    expected = image * np.linalg.norm(centred) / np.linalg.norm(image) * np.sqrt(400 / 500) @ fitted + states.mean(0)
    np.testing.assert_allclose(projection(torch.from_numpy(tokens)).detach(), expected, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# evaluate_mmvp.py


@pytest.mark.parametrize("name", ["miniature", "siglip"])
def test_scores_follow_the_benchmarks_rule(clips, name):
    """Against the benchmark's rule written out pair by pair, with open_clip's own calls."""
    pairs = evaluate_mmvp.read_mmvp(f"{MINIATURE}/mmvp")[::20]  # five of each type
    cosines = evaluate_mmvp.similarities(model.load_clip(clips[name]), pairs, CPU, batch_size=10)
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clips[name]}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clips[name]}")
    clip.eval()
    expected = np.zeros((2, len(pairs)), bool)
    for p, pair in enumerate(pairs):
        images = torch.stack([preprocess(Image.open(path)) for path in pair.images])
        with torch.no_grad():
            texts = clip.encode_text(tokenizer(["a photo of " + s for s in pair.statements]), normalize=True)
            unit = clip.encode_image(images, normalize=True)
            local = [[token / token.norm() for token in tokens] for tokens in local_tokens(clip.visual, images)]
            both = unit + torch.stack([sum(tokens) / len(tokens) for tokens in local])
        for e, embedding in enumerate((unit, both / both.norm(dim=1, keepdim=True))):
            logits = 100 * texts @ embedding.T
            torch.testing.assert_close(torch.from_numpy(cosines[e, p]), logits / 100, atol=1e-6, rtol=0)
            chosen = [1 if softmax[0] > 0.5 else 2 for softmax in logits.softmax(1)]
            expected[e, p] = chosen == [1, 2]
    assert np.array_equal(evaluate_mmvp.pairs_right(cosines), expected)
    types = [pair.type for pair in pairs]
    by_type = {t: 100 * np.mean([right for right, other in zip(expected[0], types) if other == t]) for t in TYPES}
    assert scores.type_scores(expected[0], types) == pytest.approx(by_type)
    assert scores.average(expected[0], types) == pytest.approx(np.mean(list(by_type.values())))


def test_a_tie_goes_to_the_second_image():
    right, tied, tied_second, wrong = (0.3, 0.2, 0.2, 0.3), (0.3, 0.3, 0.2, 0.3), (0.3, 0.2, 0.2, 0.2), (0.2, 0.3) * 2
    cosines = np.array([right, tied, tied_second, wrong]).reshape(4, 2, 2)
    assert evaluate_mmvp.pairs_right(cosines).tolist() == [True, False, True, False]


@pytest.mark.parametrize("kind", ["cls", "cls+local", "sum", "random:5"])
def test_the_released_embedding_follows_the_released_rule(kind):
    """Against the rule written out for one pair, with the same draws of patches."""
    torch.manual_seed(0)
    cls, local = torch.randn(2, 8), torch.randn(2, 7, 8)
    embeddings = evaluate_mmvp.embed_released(kind, cls, local, np.random.default_rng(3), draws=4)
    drawn = np.random.default_rng(3).integers(7, size=(2, 4, 2, 5))
    assert len(embeddings) == (4 if kind == "random:5" else 1)
    for k, s, i in np.ndindex(len(embeddings), 2, 2):  # draws, statements, images
        unit = cls[i] / cls[i].norm()
        both = unit + sum(token / token.norm() for token in local[i]) / 7
        noisy = cls[i] + sum(local[i, p] for p in drawn[i, k, s]) / 5
        expected = {"cls": unit, "cls+local": both / both.norm(), "sum": both, "random:5": noisy / noisy.norm()}
        torch.testing.assert_close(embeddings[k, s, i], expected[kind])


def test_the_released_score_does_not_depend_on_the_batch():
    pairs, clip = evaluate_mmvp.read_mmvp(f"{MINIATURE}/mmvp")[::180], model.load_clip("miniature")
    one, other = (evaluate_mmvp.similarities(clip, pairs, CPU, n, released="random:19") for n in (2, 10))
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_embeddings_that_are_not_finite_are_refused():
    pairs = evaluate_mmvp.read_mmvp(f"{MINIATURE}/mmvp")[:1]
    for weight in ("visual.proj", "text_projection"):
        clip = model.load_clip("miniature")
        clip.model.get_parameter(weight).data[0, 0] = math.nan
        with pytest.raises(UserError, match="its embeddings are not finite"):
            evaluate_mmvp.similarities(clip, pairs, CPU)


def test_intervals_and_p_values():
    """The bootstrap of nine types of 15 pairs, and McNemar's test, against the binomial distribution in closed form."""
    types = [name for name in TYPES for _ in range(15)]
    right = np.random.default_rng(1).random(135) < 0.3
    shares = [right[np.array(types) == name].mean() for name in TYPES]
    spread = 100 * math.sqrt(sum(p * (1 - p) / 15 for p in shares)) / 9  # of the mean of nine binomial shares
    low, high = scores.interval(right, types)
    assert (high - low) / (2 * 1.96 * spread) == pytest.approx(1, abs=0.05)
    assert (low + high) / 2 == pytest.approx(scores.average(right, types), abs=0.8)
    assert scores.mcnemar(14, 5) == pytest.approx(2 * 16_664 / 2**19)  # 2 · P(X ≤ 5), X ~ B(19, 1/2)
    assert scores.mcnemar(0, 6) == 2 / 2**6 and scores.mcnemar(3, 3) == scores.mcnemar(0, 0) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Small models and small runs, shared with the other tests

ROOT = Path(__file__).parent
SMALL = "--recap random:30% --join mean --timesteps 0:1000 --projection random --projection-steps 0 --optimizer sgd "
SMALL += "--seed 0 --no-freeze-projection --lr 0.01 --ldifs 0 --states 2 "
SMALL += "--steps 3 --batch-size 4 --micro-batch 4 --workers 0 --mmvp none --out"
TORCHRUN = f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node=2"


def write_clip(folder: Path, embed_dim: int, vision: dict, **more) -> Path:
    """An open_clip folder of a CLIP with random weights and the miniature's tokenizer and preprocessing."""
    folder = Path(shutil.copytree(MINIATURE / "clip", folder))
    config = json.loads((folder / "open_clip_config.json").read_text())
    text = config["model_cfg"]["text_cfg"] | more.pop("text_cfg", {})
    config["model_cfg"] = dict(embed_dim=embed_dim, vision_cfg=vision, text_cfg=text, **more)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    with quiet():
        clip = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def write_siglip(folder: Path) -> Path:
    """A SigLIP whose vision tower is timm's `test_vit`, with 100 patches."""
    vision = dict(timm_model_name="test_vit", timm_model_pretrained=False, timm_pool="map", timm_proj="none")
    return write_clip(folder, 64, vision | dict(image_size=160), custom_text=True, init_logit_bias=-10)


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> dict[str, str]:
    """A ViT and a SigLIP."""
    siglip = write_siglip(tmp_path_factory.mktemp("clips") / "siglip")
    return {"miniature": f"{MINIATURE}/clip", "siglip": f"{siglip}"}


def settings(out: str | Path, flags: str = "") -> argparse.Namespace:
    """The settings of a small run of the miniature."""
    args = parse_args(f"{SMALL} {out} {flags}".split())
    args.precision = args.precision or "fp32"
    return args


def run(out: Path, flags: str = "") -> Path:
    """A small run of the miniature in this process; returns its folder `out`."""
    with process_group() as device:
        train.train(settings(out, flags), device)
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(out / "checkpoint.pt")["weights"]


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps_saved(out: Path) -> int:
    return read_state(out / "checkpoint.pt")["step"]


def assert_same_run(one: Path, other: Path) -> None:
    """The same weights and optimizer state bit for bit, and the same lines in metrics.jsonl."""
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and len(a) > 1 and all(torch.equal(a[k], b[k]) for k in a)
    a, b = (read_checkpoint(out / "checkpoint.pt")["optimizer"]["state"] for out in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[i][k], b[i][k]) for i in a for k in a[i])
    kept = ("step", "loss", "grad_norm", "lr", "unreadable")
    assert [[line[k] for k in kept] for line in metrics(one)] == [[line[k] for k in kept] for line in metrics(other)]


def assert_near(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], share: float) -> None:
    """No tensor differs by more than `share` of its norm."""
    for k, v in one.items():
        assert (other[k] - v).norm() <= share * v.norm(), k


def assert_saved(out: Path) -> None:
    """open_clip loads OUT/clip with the weights of the last step."""
    clip, trained = open_clip.create_model(f"local-dir:{out}/clip"), weights(out)
    assert all(torch.equal(v, trained[f"visual.{k}"]) for k, v in clip.visual.state_dict().items())


def at_loss(monkeypatch, number: int, act) -> list:
    """Calls `act` before the `number`-th loss of a run is computed. Returns a list that grows with each loss."""
    loss, losses = train.denoising_loss, []

    def counted(*args) -> torch.Tensor:
        losses.append(1)
        if len(losses) == number:
            act()
        return loss(*args)

    monkeypatch.setattr(train, "denoising_loss", counted)
    return losses


def picture(side: int, turned: int = 0) -> Image.Image:
    return Image.effect_mandelbrot((side, side), (-2, -1.5, 1, 1.5), 100).rotate(turned).convert("RGB")


def jpeg(image: Image.Image, **more) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **more)
    return buffer.getvalue()


def write_shard(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def write_mmvp(folder: Path, pairs: int = 2) -> Path:
    """The first pairs of the miniature's benchmark."""
    folder.mkdir()
    images, questions = "MLLM_VLM Images", (MINIATURE / "mmvp" / "Questions.csv").read_text().splitlines(True)
    (folder / images).symlink_to((MINIATURE / "mmvp" / images).absolute())
    (folder / "Questions.csv").write_text("".join(questions[: 1 + 2 * pairs]))
    return folder
