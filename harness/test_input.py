"""What people and disks give: what cannot be used ends in a sentence."""

from test_smoke import CPU, ROOT, SMALL  # first: it sets what the libraries read when they are imported
from test_smoke import jpeg, run, settings, write_clip, write_mmvp, write_shard

import errno
import http.server
import io
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate_mmvp
import model
from condition import parse_recap
from harness.checkpoint import load_checkpoint, read_state, save_checkpoint
from harness.errors import Stopped, UserError, exit_on_user_error
from harness.mmvp import Pair, read_mmvp
from harness.options import parse_args
from harness.recipes import MINIATURE, SD21, SD21_MIRROR
from harness.sources import find_images, shard_index


# ---------------------------------------------------------------------------------------------------------------------
# Arguments and folders that do not fit


def refused(message: str):
    """A `with` block that has to end in a UserError of one line that matches `message`."""
    return pytest.raises(UserError, match=rf"\A(?=.*{message})[^\n]*\Z")


@pytest.mark.parametrize(
    "more, message",
    [
        ("--recipe openai", "--recipe openai: no such recipe; there are miniature, miniature-paper, openai-vit"),
        ("--data nowhere/0.tar", "--data nowhere/0.tar: no such file or folder"),
        ("--batch-size 0", "--batch-size: 0: must be from 1 to"),
        ("--lr fast", "argument --lr: 'fast' is not a number"),
        ("--steps 1.5", "argument --steps: '1.5' is not a whole number"),
        ("--lr nan", "--lr: nan: must be from 0 to"),
        ("--states 1000000000", "--states: 1000000000: must be from 1 to"),
        ("--warmup 23", "--warmup: 23: must be from 0 to 1"),
        ("--data synthetic --projection fitted", "the linear layer would be fitted to noise"),
        ("--precision fp16", "argument --precision: invalid choice"),
        ("--clip ViT-L-14", "ViT-L-14: no such CLIP; name a recipe"),
        ("--clip miniature@", "no such weights"),
        ("--clip miniature@hf-hub:a/b", "hf-hub:a/b: no such weights; name a file, .* or hf-hub:OWNER/NAME/PATH"),
        ("--diffusion nowhere", "nowhere: no such diffusion model"),
        ("--seed 99999999999999999999", "--seed: 99999999999999999999: must be from 0 to"),
        ("--timesteps 500", "--timesteps '500': must be LOW:HIGH"),
        ("--timesteps 0:1001", "must be LOW:HIGH, with 0 ≤ LOW < HIGH ≤ 1000"),
        ("--projection-steps 4", "--projection-steps 4: are a part of the 3 --steps"),
        ("--text \udc80", "--text .*: is not a line of text in UTF-8"),
        (f"--out {__file__}/run", "is a file; a folder is needed"),
        ("--random-weights --diffusion a/b", f"--random-weights: builds {SD21}"),
        ("--stepz 3", "unrecognized arguments: --stepz 3"),
    ],
)
def test_bad_arguments_end_in_a_sentence_before_anything_is_loaded(tmp_path, more, message):
    with refused(message):
        settings(tmp_path / "run", more)


@pytest.mark.parametrize(
    "more, message",
    [
        ("--recap random:65", "asks for 65 patches, and this CLIP has 1 to 64"),
        ("--recap pool:0", "asks for 0 patches"),
        ("--recap dense", "must be random:COUNT, random:SHARE%"),
        ("--recap all --join positions", "the text has 24 positions, the recap 65 tokens"),
        ("--image-size 36", "--image-size 36: must be a multiple of 8"),
        ("--data {}/one.tar --projection fitted", "--projection fitted: needs two images at least"),
        ("--clip no-arch --random-weights", "CLIP no-arch could not be loaded: "),
        ("--clip ViT-B-32:nobody --recap all", "open_clip has no weights of that name .for ViT-B-32: openai"),
        ("--clip hf-hub:nobody/nothing", "CLIP hf-hub:nobody/nothing could not be loaded"),
        ("--clip miniature@hf-hub:a/b/x.pth", "hf-hub:a/b/x.pth could not be fetched from the hub: "),
        (f"--diffusion {SD21}", f"could not be loaded: .*--diffusion {SD21_MIRROR}"),
        ("--data {}/none.tar", "none.tar: no images"),
        ("--data {}/folder", "folder: no images in this folder"),
        ("--data {}/*.zip", "zip: no such file"),
        ("--data {}/*.tar {}/folder", "a folder among shards"),
        ("--mmvp {}/folder", "folder: no image folder"),
    ],
)
def test_bad_input_ends_in_a_sentence(tmp_path, more, message):
    (tmp_path / "folder").mkdir()
    write_shard(tmp_path / "none.tar", {"0.txt": b"caption"})
    write_shard(tmp_path / "one.tar", {"0.jpg": jpeg(Image.new("RGB", (40, 40)))})
    with refused(message):
        run(tmp_path / "run", more.replace("{}", f"{tmp_path}"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name, old, new, message",
    [
        ("clip/open_clip_model.safetensors", "", None, "clip: no weights in this folder"),
        ("clip/open_clip_config.json", "", None, "no CLIP in this folder .open_clip_config.json is missing"),
        ("clip/open_clip_config.json", '"layers": 4', '"layers": 5', "clip: does not fit: it has no "),
        ("clip/open_clip_config.json", "{", "[", "CLIP .*clip could not be loaded: "),
        ("diffusion/unet/config.json", "", None, "no Stable Diffusion in .* .unet/config.json is missing"),
        ("diffusion/unet/config.json", "128\n", "192\n", "diffusion model .*diffusion could not be loaded: "),
        ("diffusion/text_encoder/config.json", "", None, "text_encoder/config.json is missing"),
        ("diffusion/scheduler/scheduler_config.json", "epsilon", "sample", "no Stable Diffusion 1.x or 2.x"),
        ("diffusion/scheduler/scheduler_config.json", "1000", "500", "--timesteps '0:1000': .* LOW < HIGH ≤ 500"),
    ],
)
def test_a_folder_that_is_not_whole_or_another_models_is_refused(tmp_path, name, old, new, message):
    part = name.split("/")[0]
    shutil.copytree(MINIATURE / part, tmp_path / part)
    if new is None:
        (tmp_path / name).unlink()
    else:
        content = (tmp_path / name).read_text()
        assert old in content
        (tmp_path / name).write_text(content.replace(old, new))
    with refused(message):
        run(tmp_path / "run", f"--{part} {tmp_path / part}")
    assert not (tmp_path / "run").exists()


class Payload:
    """A pickle that leaves a file behind when it is executed."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def saved(content) -> bytes:
    """The bytes that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("pickled", [pickle.dumps, saved])
@pytest.mark.parametrize(
    "name, message",
    [
        ("clip/open_clip_pytorch_model.bin", "clip/open_clip_pytorch_model.bin: holds pickled objects"),
        ("diffusion/unet/diffusion_pytorch_model.bin", "diffusion model .*diffusion could not be loaded: "),
        ("diffusion/vae/diffusion_pytorch_model.bin", "diffusion model .*diffusion could not be loaded: "),
        ("diffusion/text_encoder/pytorch_model.bin", "diffusion model .*diffusion could not be loaded: "),
    ],
)
def test_no_weights_execute_anything(tmp_path, name, message, pickled):
    """Pickled weights in place of safetensors are refused, and what they would do is not done."""
    part = name.split("/")[0]
    shutil.copytree(MINIATURE / part, tmp_path / part)
    for file in (tmp_path / name).parent.glob("*.safetensors"):
        file.unlink()
    (tmp_path / name).write_bytes(pickled(dict(weight=torch.ones(3), code=Payload(tmp_path / "executed"))))
    with refused(message):
        run(tmp_path / "run", f"--{part} {tmp_path / part}")
    assert not (tmp_path / "executed").exists()


def test_a_text_that_is_not_read_to_its_end_is_refused():
    with refused("--text: has 42 tokens with its start and end, and this text encoder reads 24"):
        model.load_diffusion(f"{MINIATURE}/diffusion", "red " * 40, torch.float32, CPU)


def test_other_towers_are_refused(tmp_path):
    vit = dict(image_size=16, patch_size=4, width=24, layers=2, head_width=12, pool_type="avg")
    timm = dict(image_size=160, timm_model_name="test_vit", timm_pool="map", timm_proj="")  # projects inside the trunk
    for name, vision, more in (("vit", vit, {}), ("timm", timm, dict(custom_text=True))):
        with refused("neither a ViT with a class token nor a timm one"):
            model.load_clip(f"{write_clip(tmp_path / name, 24, vision, **more)}")


@pytest.mark.parametrize(
    "environment, message",
    [
        ("RANK=0", "RANK is set, but WORLD_SIZE, MASTER_ADDR, MASTER_PORT not: start with torchrun"),
        ("SLURM_NTASKS=2", "SLURM runs 2 tasks, and each would train alone into one folder: start torchrun"),
        ("RANK=0 WORLD_SIZE=3 MASTER_ADDR=x MASTER_PORT=1", "--batch-size 32: cannot be shared by 3 processes"),
    ],
)
def test_processes_that_cannot_train_together_are_refused(monkeypatch, environment, message):
    for assignment in environment.split():
        monkeypatch.setenv(*assignment.split("="))
    with refused(message):
        parse_args(["--batch-size", "32"])


@pytest.mark.parametrize("processes, most, expected", [(1, 32, 32), (2, 32, 16), (1, 7, 4), (4, 64, 8)])
def test_micro_batch_is_the_largest_that_divides(monkeypatch, processes, most, expected):
    for name, value in dict(RANK=0, WORLD_SIZE=processes, MASTER_ADDR="localhost", MASTER_PORT=1).items():
        monkeypatch.setenv(name, f"{value}")
    assert parse_args(f"--batch-size 32 --micro-batch {most}".split()).micro_batch == expected


def test_a_setting_that_is_overridden_is_said(capsys):
    assert parse_args(["--batch-size", "61", "--micro-batch", "16"]).micro_batch == 1
    assert parse_args(["--random-weights"]).projection == "random"
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("--micro-batch 16: does not divide the 61 images of a process, so it is 1")
    assert said[1].startswith("--random-weights: the linear layer starts at random")


@pytest.mark.parametrize(
    "flags, out",
    [
        ("", "runs/miniature"),
        ("--lr 0.02 --workers 3 --micro-batch 8 --mmvp x", "runs/miniature-lr-0.02"),
        ("--recap all --no-freeze-projection", "runs/miniature-recap-all-no-freeze-projection"),
        ("--recipe openai-vit-l-14-224 --data synthetic --seed 1", "runs/openai-vit-l-14-224-data-_synthetic_-seed-1"),
    ],
)
def test_each_variation_has_a_folder_of_its_own(flags, out):
    assert parse_args(flags.split()).out == out


@pytest.mark.parametrize(
    "rows, content, message",
    [
        ((1,), "Id,Type,Statement", "row 1: the header must be"),
        ((3,), "2,Orient,a cat", "row 3: type 'Orient' differs from its partner's, 'Orientation'"),
        ((2,), "1,Color", "row 2: needs an id, a type and a statement"),
        ((2,), "one,Color,a cat", "row 2: the id 'one' is not a number"),
        ((2,), "9" * 5001 + ",Color,a cat", "row 2: the id '9{20}' is not a number"),
        ((2, 3), "{}," + "C" * 300 + ",a cat", "row 2: type 'C{50}' has no folder"),
        ((3,), "9,Color,a cat", "row 3: id 9 does not follow"),
        ((2,), "2,Color,a cat", "row 2: a pair begins with an odd id"),
        ((4, 5), "1,Color,a cat", "row 4: the id 1 is already in use"),
        ((3,), '2,Color,"a cat', "Questions.csv: cannot be read"),
        ((5,), "", "row 4: rows come in pairs"),
        ((2, 3), "{},../Color,a cat", "row 2: type '../Color' has no folder"),
        ((4, 5), "1{},Color,a cat", "row 4: no such image: .*13.jpg"),
        ((2, 3, 4, 5), "", "row 1: "),
    ],
)
def test_a_bad_benchmark_is_refused_by_row(tmp_path, rows, content, message):
    """Row n holds the id n − 1."""
    questions = write_mmvp(tmp_path / "mmvp") / "Questions.csv"
    lines = questions.read_text().splitlines()
    for n in rows:
        lines[n - 1] = content.format(n - 1)
    questions.write_text("\n".join(lines))
    with refused(message):
        read_mmvp(f"{tmp_path}/mmvp")


def test_a_benchmarks_broken_picture_is_named(tmp_path):
    pairs = read_mmvp(f"{write_mmvp(tmp_path / 'mmvp')}")
    (tmp_path / "broken.jpg").write_bytes(pairs[0].images[0].read_bytes()[:300])
    broken = Pair(pairs[0].ids, pairs[0].type, pairs[0].statements, (tmp_path / "broken.jpg",) * 2)
    with refused("broken.jpg: not a readable image"):
        evaluate_mmvp.similarities(model.load_clip("miniature"), [pairs[1], broken], CPU)


# ---------------------------------------------------------------------------------------------------------------------
# Commands: a sentence on the terminal, the exit code, and no waiting


@pytest.mark.parametrize(
    "error, code, said",
    [
        (UserError("no such thing"), 2, "command: no such thing"),
        (Stopped("stopped", 15), 143, "command: stopped"),
        (OSError(errno.ENOSPC, "No space left"), 2, "command: [Errno 28] No space left"),
        (KeyboardInterrupt(), 130, "command: interrupted"),
        (MemoryError(), 2, "command: not enough memory; use less"),
        (RuntimeError("CUDA out of memory. Tried\n to"), 2, "command: not enough memory; use less"),
    ],
)
def test_a_command_ends_in_a_sentence(capsys, error, code, said):
    with pytest.raises(SystemExit) as end, exit_on_user_error("command", "use less"):
        raise error
    assert end.value.code == code and capsys.readouterr().err == f"{said}\n"


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("x"), AssertionError()])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)), exit_on_user_error("command"):
        raise error


def test_a_terminal_that_cannot_show_a_letter_ends_nothing(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", terminal)
    with exit_on_user_error("command"):
        print("θ at 64²")
    terminal.flush()
    assert terminal.buffer.getvalue() == "? at 64²\n".encode("latin-1")


@pytest.mark.parametrize(
    "flags, exit_code, lines", [("--help", 0, 0), ("--clip x", 2, 1), ("--recipe openai-vit-l-14-336 --lr x", 2, 1)]
)
def test_help_and_mistyped_arguments_do_not_wait_for_torch(flags, exit_code, lines):
    code = "import runpy, sys\ntry: runpy.run_path('train.py', run_name='__main__')\n"
    code += "finally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *flags.split()], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (exit_code, lines), done.stderr
    assert done.stdout.splitlines()[-1] == "False"


LEVELS = ["train", "beyond evaluate_mmvp", "model", "condition data", "harness"]  # from the top
COMMANDS = ["extras", "miniature"]  # of their own: they import what they like, and nothing imports them


def test_imports_run_downward():
    """Reads the import lines of all modules but the tests and the commands."""
    level = {name: i for i, names in enumerate(LEVELS) for name in names.split()}
    commands = {path.stem for folder in COMMANDS for path in (ROOT / folder).glob("*.py")}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("harness/*.py")]:
        if path.name.startswith("test_"):
            continue
        names = re.findall(r"^ *(?:from|import) ([\w.]+)", path.read_text(), re.MULTILINE)
        imported = {name.split(".")[0] for name in names}
        assert not imported & {*COMMANDS, *commands, "test_smoke", ""}, path  # "": a relative one
        inside = path.parent.name == "harness"  # whose modules import one another
        here = level["harness" if inside else path.stem]
        for name in imported & level.keys():
            assert level[name] > here or inside and name == "harness", f"{path} imports {name}"


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub on which everything is missing or gated."""

    def do_GET(self):
        gated = "gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("X-Error-Message", "Access is restricted" if gated else "Repository not found")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    "reached, command, words",
    [
        (True, "evaluate_mmvp.py --mmvp {mmvp} hf-hub:a/missing", "CLIP hf-hub:a/missing could not be loaded"),
        (True, "evaluate_mmvp.py --mmvp {mmvp} hf-hub:a/gated", "CLIP hf-hub:a/gated could not be loaded"),
        (True, "train.py {run} --diffusion a/gated", "diffusion model a/gated could not be loaded"),
        (True, "evaluate_mmvp.py miniature --mmvp a/gated", "data set a/gated could not be fetched"),
        (False, "train.py {run} --diffusion a/missing", "diffusion model a/missing could not be loaded"),
    ],
)
def test_a_hub_that_refuses_is_a_sentence(tmp_path, reached, command, words):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = f"http://127.0.0.1:{server.server_port if reached else 1}"
    environment = os.environ | dict(HF_ENDPOINT=hub, HF_HUB_OFFLINE="0", HF_HOME=f"{tmp_path}/home")
    command = command.format(mmvp=f"{MINIATURE}/mmvp", run=f"{SMALL} {tmp_path}/run").split()
    command = [sys.executable, *command]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    server.shutdown()
    said = [line for line in done.stderr.splitlines() if line.strip() and "shard/s" not in line]  # but for the bar
    assert done.returncode == 2 and len(said) == 1 and words in said[0], done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Mutated input: a result or a sentence

ODD = [b'"', b",", b"\n", b"\0", b"-", b"9" * 20, b"9" * 5000, b"{", b"[", "é".encode()]


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes changed, cut out, repeated or made odd, one to eight times; sometimes cut off."""
    for _ in range(rng.integers(1, 9)):
        at, length = rng.integers(len(content) + 1), rng.integers(1, 20)
        before, part, after = content[:at], content[at : at + length], content[at + length :]
        parts = [rng.bytes(length), b"", part + part, ODD[rng.integers(len(ODD))] + part]
        content = before + parts[rng.integers(4)] + after
    return content[: rng.integers(len(content) + 1)] if rng.random() < 0.2 else content


@pytest.fixture(scope="module")
def parsers(tmp_path_factory) -> dict:
    """For each parser a file with good content, and a function that reads the file."""
    folder, cache = tmp_path_factory.mktemp("parsers"), Path(os.environ["XDG_CACHE_HOME"]) / "diva"
    tar, recap = write_shard(folder / "0.tar", {f"{i}.jpg": b"12345" for i in range(3)}), folder / "recap"
    others = set(cache.glob("*"))
    shard_index(f"{tar}")
    (index,) = set(cache.glob("*")) - others
    # three headers with their images, and the first of the two empty blocks at the end
    short_tar = folder / "1.tar"
    short_tar.write_bytes(tar.read_bytes()[:3584])
    recap.write_text("random:50%")
    mmvp, small, linear = write_mmvp(folder / "mmvp"), folder / "small", torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(linear.parameters(), 1, momentum=0.9)
    linear(torch.ones(2)).sum().backward()
    optimizer.step()
    save_checkpoint(small, linear, optimizer, dict(step=3, unreadable=0, images="9", settings=dict(lr=0.1), code=[{}]))
    return {
        "index": (short_tar, lambda: find_images(f"{short_tar}")),
        "cache": (index, lambda: shard_index(f"{tar}")),
        "mmvp": (mmvp / "Questions.csv", lambda: read_mmvp(f"{mmvp}")),
        "recap": (recap, lambda: parse_recap(recap.read_text(errors="replace"), 16)),
        "state": (small / "state.json", lambda: read_state(small)),
        "weights": (small / "weights.safetensors", lambda: load_checkpoint(small, linear, optimizer)),
        "optimizer": (small / "optimizer.safetensors", lambda: load_checkpoint(small, linear, optimizer)),
    }


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["index", "cache", "mmvp", "recap", "state", "weights", "optimizer"])
def test_no_parser_crashes(parsers, name, count):
    path, parse = parsers[name]
    good, rng, refusals = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(count):
        path.write_bytes(mutated(good, rng))
        try:
            found = parse()
            if name in ("index", "cache"):  # whatever it says, it says of places in the file
                assert found.shape[1] == 2 and found.min(initial=0) >= 0 and found.max(initial=0) < 20_000
        except UserError as error:
            assert "\n" not in str(error).strip()
            refusals += 1
    path.write_bytes(good)
    parse()
    assert refusals > count / 20 or name == "cache"
