"""The commands in the READMEs are valid."""

import re
import shlex
import textwrap
from pathlib import Path

import pytest
from PIL import Image

from harness.options import parse_args
from harness.recipes import MINIATURE, OPTIONS, flag_of

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", ROOT / "harness" / "RELEASED.md"]
READMES += [ROOT / folder / "README.md" for folder in ("harness", "extras", "miniature")]
COMMANDS = {  # each line once, without its comment
    line.strip().split("  #")[0].replace("\\\n", " ")
    for readme in READMES
    for line in re.findall(r"^ {4}.*(?:\\\n.*)*$", readme.read_text(), re.MULTILINE)
}


def arguments(command: str, script: str) -> list[str]:
    """The words after a script's name, up to the next command, with a value for each variable of a loop."""
    text = re.split(r" && |;", command.partition(script)[2])[0]
    for name, value in {"$recap": "all", "$part": "0000", "$diffusion": "A/B", "$(basename A/B)": "B"}.items():
        text = text.replace(name, value)
    return shlex.split(text)


@pytest.mark.parametrize("command", sorted(c for c in COMMANDS if "train.py" in c and "..." not in c))
def test_train_takes_the_commands(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert parse_args(arguments(command, "train.py")).steps >= 1


@pytest.mark.parametrize("script", ["evaluate_mmvp.py", "extras/report.py", "extras/export.py", "extras/bench.py",
                                    "extras/feedback.py", "extras/zero_shot.py", "extras/reconstruct.py",
                                    "miniature/make.py", "miniature/experiment.py", "miniature/claims.py"])  # fmt: skip
def test_options_in_the_readmes_exist(script):
    """Each --option belongs to the command before it, or to train.py."""
    files = [script, "harness/evaluate.py"] if script == "evaluate_mmvp.py" else [script]
    source = "".join((ROOT / file).read_text() for file in files)
    source += "".join(f'"{flag_of(option.name)}"' for option in OPTIONS) + '"--recipe"'
    named = {word for c in COMMANDS if script in c for word in re.findall(r"--[a-z-]+", c.partition(script)[2])}
    assert all(f'"{option}"' in source for option in named), named


def test_the_snippet_that_loads_a_trained_clip_runs(tmp_path):
    code = textwrap.dedent(re.search(r"(?: {4}.+\n)+", (ROOT / "README.md").read_text())[0])
    Image.new("RGB", (80, 70)).save(tmp_path / "photo.jpg")
    for name, path in {"runs/miniature/clip": MINIATURE / "clip", "photo.jpg": tmp_path / "photo.jpg"}.items():
        assert name in code
        code = code.replace(name, f"{path}")
    exec(code, names := {})
    assert names["features"].shape == (1, 128)
