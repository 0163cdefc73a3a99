"""evaluate_mmvp.py: its options, fp32, warnings, and the change by the released embedding."""

from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch

from evaluate_mmvp import compare, pairs_right, read_args, similarities
from extras.zero_shot import classify
from harness.errors import UserError
from harness.evaluate import warn_of_limits
from harness.mmvp import Pair, read_mmvp
from harness.precision import full_fp32
from harness.recipes import MINIATURE
from harness.scores import interval
from model import Clip, load_clip


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return read_mmvp(f"{MINIATURE}/mmvp")[::180]


@pytest.mark.parametrize(
    "command, kinds",
    [
        ("two-stage-openai-vit-l-14-224 two-stage-openai-vit-l-14-224@WEIGHTS --released", ["random:76"] * 2),
        ("openai-vit-l-14-224 siglip-so400m-14-224 MINIATURE --released", ["random:76", "cls", "random:19"]),
        ("MINIATURE@WEIGHTS ViT-B-16:openai --released metaclip-vit-l-14-224", ["random:19", "cls+local"]),
        ("dfn-vit-h-14-378 --released", ["sum"]),
        ("openai-vit-l-14-224", []),
    ],
)
def test_each_clip_has_its_recipes_kind(tmp_path, command, kinds):
    (tmp_path / "w.pth").touch()
    command = command.replace("WEIGHTS", f"{tmp_path}/w.pth").replace("MINIATURE", f"{MINIATURE}/clip")
    assert read_args(command.split()).kinds == kinds
    with pytest.raises(UserError, match="--released a: needs the name of a recipe"):
        read_args([*command.replace("--released", "").split(), "--released", "a"])


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_scores_are_computed_in_full_fp32(pairs, precision):
    """Checks the settings in both towers during the call, and after it."""
    clip, seen, settings = load_clip("miniature"), [], torch.backends.cudnn.allow_tf32
    now = lambda: (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)  # noqa: E731
    for module in (clip.model.visual.conv1, clip.model.ln_final):
        module.register_forward_hook(lambda *_: seen.append(now()))
    torch.set_float32_matmul_precision(precision)
    try:
        similarities(clip, pairs, "cpu")
        classify(clip, [torch.zeros(1, 3, 64, 64)], ["cat", "dog"], "cpu", ["a photo of the {}"])
        assert len(seen) >= 4 and set(seen) == {("highest", False)}
        with pytest.raises(KeyError), full_fp32():
            raise KeyError
        assert now() == (precision, settings)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_released_change_is_that_of_the_means(pairs):
    """The mean over each CLIP's draws, pair by pair; the interval is over pairs."""
    cosines = list(np.random.default_rng(0).random((2, 2 + 7, len(pairs), 2, 2), dtype=np.float32))
    before, after = (pairs_right(clip[2:]).mean(0) for clip in cosines)
    types = [pair.type for pair in pairs]
    text = compare(["a", "b"], cosines, pairs, kinds=["random:19"] * 2)
    points = [100 * np.mean([a - b for a, b, other in zip(after, before, types) if other == t]) for t in set(types)]
    ends = "{:+.1f} … {:+.1f}".format(*interval(after - before, types))
    assert f"Released, mean of draws: {np.mean(points):+.1f} points (95% interval {ends})" in text
    assert "chance: 25" in text


@pytest.mark.parametrize("architecture, warned", [("ViT-B-16-SigLIP", True), ("vit_medium_patch16_gap_256", False)])
def test_towers_that_pool_by_attention_are_named(architecture, warned, pairs, capsys):
    clip = Clip(open_clip.create_model(architecture, device="meta"), architecture, config={}, num_patches=0)
    clip.tokenizer = lambda: open_clip.get_tokenizer("ViT-B-32")
    warn_of_limits(clip, pairs)
    assert (f"{architecture} pools by attention" in capsys.readouterr().err) == warned


def test_unknown_words_are_counted(pairs, capsys):
    others = [replace(pair, statements=(pair.statements[0], "two zebras in Africa")) for pair in pairs[:3]]
    warn_of_limits(load_clip("miniature"), pairs)
    assert not capsys.readouterr().err
    warn_of_limits(load_clip("miniature"), pairs + others)
    assert f"3 of {2 * len(pairs) + 6} statements have words" in capsys.readouterr().err
