"""The miniature: make.py draws the files in the repository, and the diffusion model reads its captions."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import beyond
import data
import model
import train
from harness.errors import UserError
from harness.mmvp import read_mmvp
from harness.recipes import MINIATURE, RECIPES, TYPES
from miniature import experiment, make, models, world
from test_smoke import CPU, run, settings, weights


def test_make_draws_the_files_in_the_repository(tmp_path):
    """The images and the benchmark, up to the rounding of other JPEG codecs."""
    world.write_images(tmp_path)
    world.write_mmvp(tmp_path / "mmvp")
    embedded, drawn = (data.open_images([f"{folder}/images.tar"], False) for folder in (MINIATURE, tmp_path))
    assert len(embedded) == len(drawn) == 2000
    pictures = [(embedded.read(i), drawn.read(i)) for i in range(0, 2000, 125)]
    for pair, other in zip(*(read_mmvp(f"{folder}/mmvp") for folder in (MINIATURE, tmp_path)), strict=True):
        assert (pair.ids, pair.type, pair.statements) == (other.ids, other.type, other.statements)
        pictures += [(a.read_bytes(), b.read_bytes()) for a, b in zip(pair.images, other.images)]
    for both in pictures:
        one, other = (np.asarray(Image.open(io.BytesIO(content))).astype(int) for content in both)
        assert one.shape == (64, 64, 3) and np.abs(one - other).mean() < 2


def test_a_pair_differs_in_one_detail():
    pairs = read_mmvp(f"{MINIATURE}/mmvp")
    assert [pair.type for pair in pairs] == [name for name in TYPES for _ in range(100)]
    regions = {"Color": (0, 0, 64, 64), "Quantity": (0, 0, 45, 18), "Text": (46, 0, 64, 18)}
    for pair in pairs:
        words = [statement.split() for statement in pair.statements]
        said = {" ".join(word for word in words[i] if word not in words[1 - i]) for i in (0, 1)} - {""}
        phrases = world.DETAILS[pair.type]
        assert all(any(set(s.split()) <= set(phrase.split()) for phrase in phrases) for s in said)
        one, other = (np.asarray(Image.open(path)).astype(int) for path in pair.images)
        changed = np.abs(one - other).max(-1) > 60
        assert changed.any()
        left, top, right, bottom = regions.get(pair.type, (0, 16, 64, 64))  # all but the stars and the sign
        changed[top:bottom, left:right] = False
        assert not changed.any()


def test_the_diffusion_model_reads_with_the_text_tower_of_its_world(tmp_path, monkeypatch):
    """A world whose CLIP has another text tower, and whose diffusion model starts from the miniature's.

    Compares its text encoder with open_clip's tower, and its U-Net and VAE with those that it starts from.
    """
    start = MINIATURE / "diffusion"
    monkeypatch.setattr(models, "POOL", 64)
    models.make_clip(tmp_path, 1, steps=2, text_steps=2, text_width=96, text_layers=3, contrastive=True, batch=8)
    models.make_diffusion(tmp_path, seed=1, steps=2, vae=start / "vae", start=start / "unet", batch=8)
    clip = model.load_clip(f"{tmp_path}/clip").model
    captions = ["the near red key", "a photo of the house beside A under two stars"]
    ids = models.tokens(captions, models.tokenizer(24))
    with torch.no_grad():
        hidden = clip.transformer(clip.token_embedding(ids) + clip.positional_embedding, attn_mask=clip.attn_mask)
        expected = clip.ln_final(hidden)  # (2, 24, 96)
    embedded = model.embed_texts(f"{tmp_path}/diffusion", captions)
    for row, tokens, right in zip(embedded, captions, expected):
        length = 2 + len(tokens.split())  # the padding differs; no earlier token attends to it
        assert torch.allclose(row[:length], right[:length], atol=1e-2)  # fp16
    own, first = (model.load_diffusion(f"{w}/diffusion", "", torch.float32, CPU) for w in (tmp_path, MINIATURE))
    assert own.text_embedding.shape == (1, 24, 96) and len(clip.transformer.resblocks) == 3
    assert all(torch.equal(a, b) for a, b in zip(own.vae.parameters(), first.vae.parameters()))
    others, fresh = dict(first.unet.named_parameters()), []
    for name, weight in own.unet.named_parameters():
        if weight.shape != others[name].shape:
            fresh.append(name)
        else:
            assert (weight - others[name]).abs().max() < 0.01  # two steps of at most 1e-3
    assert len(fresh) == 8 and all(".attn2.to_k." in name or ".attn2.to_v." in name for name in fresh)


@pytest.mark.parametrize("contrastive", [True, False])
def test_which_towers_learn(contrastive):
    """The text tower is trained with the vision tower only if `contrastive`."""
    clip, rng = model.load_clip("miniature").model, np.random.default_rng(0)
    before = {name: value.clone() for name, value in clip.named_parameters()}
    scenes, pixels = models.pool(16, 1)
    models.fit_clip(clip, scenes, pixels, world.CLIP_NAMES, rng, 2, 1e-3, batch=8, text=contrastive)
    moved = {n for n, value in clip.named_parameters() if not torch.equal(value, before[n]) and n != "logit_scale"}
    assert any(n.startswith("visual.") for n in moved)
    assert any(not n.startswith("visual.") for n in moved) == contrastive


@pytest.mark.parametrize(
    "argv, message",
    [
        ("clip --text-width 100", "--text-width 100: must be a multiple of 32"),
        ("diffusion --start {tmp}", "no config.json"),
        ("diffusion --vae {tmp}", "no config.json"),
        ("mmvp {tmp}/..", "not empty"),
        ("vae --steps 5", "unrecognized arguments"),
    ],
)
def test_make_refuses(tmp_path, argv, message):
    with pytest.raises(UserError, match=message):
        make.read_args(argv.format(tmp=tmp_path).split())


@pytest.fixture(scope="module")
def teacher() -> tuple:
    """The miniature's diffusion model, 80 unseen scenes, their pixels and latents."""
    diffusion = model.load_diffusion(f"{MINIATURE}/diffusion", "", torch.float32, CPU)
    scenes, rng = world.random_scenes(80, 41), np.random.default_rng(41)
    pixels = np.stack([np.asarray(world.draw(scene, rng)) for scene in scenes])
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    return diffusion, scenes, pixels, diffusion.encode(pixels)


def unseen_losses(diffusion, latents: torch.Tensor, condition: torch.Tensor, lowest: int) -> np.ndarray:
    """train.py's losses of four scenes at a time under a condition, with fixed draws and t from `lowest`."""
    losses = []
    for b in range(0, len(latents), 4):
        rng = np.random.default_rng(b)
        t = torch.from_numpy(rng.integers(lowest, 1000, (4, 4)))
        noise = torch.from_numpy(rng.standard_normal((4, 4, *latents.shape[1:]), dtype=np.float32))
        with torch.no_grad():
            losses.append(train.denoising_loss(diffusion, latents[b : b + 4], condition[b : b + 4], t, noise).item())
    return np.array(losses)


def clearly_lower(losses: np.ndarray, others: np.ndarray) -> bool:
    """Lower by three standard errors of the difference."""
    rises = others - losses
    return rises.mean() > 3 * rises.std(ddof=1) / math.sqrt(len(rises))


def test_the_teacher_reads_its_captions(teacher):
    """train.py's loss is lower with the right caption than with a caption that is wrong in one detail."""
    diffusion, scenes, _, latents = teacher
    scenes, latents, clear = scenes[:24], latents[:24], 0
    for k, values in enumerate(world.DETAILS.values(), start=2):
        named = np.isin(np.arange(10), (0, k - 1))  # the caption says class, colour and this detail
        wrong = scenes.copy()
        wrong[:, k] = (wrong[:, k] + 1) % len(values)
        captions = [world.caption(scene, named) for scene in (*scenes, *wrong)]
        sides = model.embed_texts(f"{MINIATURE}/diffusion", captions)[:, None].chunk(2)
        clear += clearly_lower(*(unseen_losses(diffusion, latents, side, 300) for side in sides))
    assert clear >= 7


def test_a_class_token_says_more_than_the_empty_text_and_than_the_start(teacher, tmp_path):
    """Losses on unseen scenes, with a fitted layer, and with a layer trained for ten steps."""
    diffusion, scenes, pixels, latents = teacher
    args = settings("unused", "--recap none")
    clip, _, conditioner = train.build(args, CPU)

    @torch.no_grad()
    def condition() -> torch.Tensor:
        return conditioner(pixels, diffusion.text_embedding)[0]

    start, empty = condition(), diffusion.text_embedding[:, None].expand(len(scenes), -1, -1, -1)
    beyond.fit_projection(args, clip, conditioner, data.TrainingImages(data.open_images(args.data), 64, 4))
    own = condition()
    losses = [unseen_losses(diffusion, latents, c, 500) for c in (own, empty, own.roll(1, 0))]
    assert clearly_lower(losses[0], losses[1]) and clearly_lower(losses[1], losses[2])

    flags = "--recap none --batch-size 16 --micro-batch 16 --optimizer adamw --steps 10 --projection-steps 10"
    conditioner.load_state_dict(weights(run(tmp_path / "run", f"{flags} --projection-lr 0.01")))
    end = condition()
    losses = [unseen_losses(diffusion, latents, c, 0) for c in (end, start, end.roll(1, 0))]
    assert clearly_lower(losses[0], losses[1]) and clearly_lower(losses[0], losses[2])


def test_rows_are_names_patterns_and_flags():
    """train.py's parser accepts all rows, and "four times the steps" has four times the recipe's."""
    assert list(experiment.read_args([]).rows) == list(experiment.ROWS)
    paper, row = "the paper's recipe --lr 5e-6 --recap all", "four times the steps"
    rows = experiment.read_args(["--rows", f"{row}*", paper, "--flags=--states 1"]).rows
    assert list(rows) == [row, f"{row}, class token alone", paper]
    longer, grid = (experiment.run_settings(name, rows[name], 3, Path("runs")) for name in (row, paper))
    assert (longer.steps, longer.states, longer.seed, longer.mmvp) == (4 * RECIPES["miniature"].steps, 1, 3, None)
    assert (grid.lr, grid.recap, grid.projection, grid.ldifs, grid.timesteps) == (5e-6, "all", "random", 0, (0, 1000))
    for arguments, message in (("--rows=no pull", "no such row"), ("--flags=--diffusion ./no", "./no: no such")):
        with pytest.raises(UserError, match=message):
            experiment.read_args([arguments])


@pytest.mark.parametrize("row, seen", [("as the recipe", [0, 1, 2]), ("as the recipe, another image", [2, 0, 1])])
def test_the_control_takes_the_condition_of_the_image_before(tmp_path, monkeypatch, row, seen):
    conditions = []

    def train_once(args, device):
        train.denoising_loss(None, None, torch.arange(3), None, None)
        Path(args.out, "metrics.jsonl").write_text("".join(f'{{"loss": {i}}}\n' for i in range(21)))

    monkeypatch.setattr(train, "train", train_once)
    monkeypatch.setattr(train, "denoising_loss", None)  # so that it is restored
    monkeypatch.setattr(experiment, "denoising_loss", lambda *args: conditions.append(args[2].tolist()))
    monkeypatch.setattr(experiment, "measure", lambda *folders: {})
    experiment.run(row, "--projection-steps 1", 3, tmp_path)
    found = json.loads((tmp_path / f"{row}-3.json").read_text())
    assert conditions == [seen] and found["loss"] == [1.5, 19.5]  # the first and the last two of those that train CLIP


def test_the_table_of_rows(tmp_path):
    """Two seeds of one row, 27 pairs; a folder with another benchmark is refused."""
    args = experiment.read_args(["--rows", "as the recipe", "--seeds", "1", "2", "--pairs", "3", f"--out={tmp_path}"])
    world.write_mmvp(tmp_path / "mmvp", 3, seed=20)
    rng = np.random.default_rng(0)
    right = rng.integers(0, 2, (3, 2, 27))  # before and two seeds, embeddings, pairs
    of = dict(pairs=3, pairs_seed=20, flags="")
    (tmp_path / "before.json").write_text(json.dumps(dict(right=right[0].tolist(), accuracy=97.0, of=of)))
    for seed, accuracy in ((1, 96.0), (2, 95.0)):
        found = dict(right=right[seed].tolist(), accuracy=accuracy, loss=[0.03 * seed, 0.01 * seed])
        (tmp_path / f"as the recipe-{seed}.json").write_text(json.dumps(found))
    experiment.write_benchmark(args)
    header, table, by_type = experiment.table(args.rows, args.seeds, tmp_path).split("\n\n")
    cells = [cell.strip() for cell in table.splitlines()[2].split("|")[1:-1]]
    change = 100 * (right[1:] - right[0]).astype(float)  # (seeds, embeddings, pairs)
    for k, cell in enumerate(cells[2:4]):
        mean, over_pairs, over_seeds = (float(x) for x in cell.split(" ± "))
        assert mean == pytest.approx(change[:, k].mean(), abs=0.006)
        assert over_pairs == pytest.approx(np.std(change[:, k].mean(0)) / math.sqrt(27), abs=0.006)
        assert over_seeds == pytest.approx(abs(change[0, k].mean() - change[1, k].mean()) / 2, abs=0.006)
    assert cells[:2] == ["as the recipe", "2"] and cells[4:] == ["-1.5", "0.0450 → 0.0150"]
    assert header.endswith("class 97.0")
    kinds = [float(cell) for cell in by_type.splitlines()[3].split("|")[2:-1]]
    assert kinds == pytest.approx(change[:, 0].mean(0).reshape(9, 3).mean(1), abs=0.06)
    args.pairs_seed = 31
    with pytest.raises(UserError, match="choose another folder"):
        experiment.write_benchmark(args)
