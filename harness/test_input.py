"""Every kind of bad input, from arguments to broken files, ends in a one-sentence error."""

import errno
import http.server
import io
import json
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
from test_smoke import CPU, ROOT, SMALL, jpeg, run, settings, write_mmvp, write_shard

import evaluate_mmvp
import model
from condition import parse_recap
from harness.checkpoint import load_checkpoint, read_state, save_checkpoint
from harness.errors import Stopped, UserError, exit_on_user_error
from harness.mmvp import Pair, read_mmvp
from harness.options import make_parser, parse_args
from harness.recipes import MINIATURE, RECIPES, SD21, SD21_MIRROR, beyond_the_paper
from harness.sources import find_images, shard_index


# ---------------------------------------------------------------------------------------------------------------------
# Arguments and folders


def refused(message: str):
    """Expects a one-line UserError that contains `message`, a regular expression."""
    return pytest.raises(UserError, match=rf"\A(?=.*{message})[^\n]*\Z")


@pytest.mark.parametrize(
    "more, message",
    [
        ("--recipe openai", "--recipe openai: no such recipe; expected one of miniature, miniature-paper"),
        ("--data nowhere/0.tar", "--data nowhere/0.tar: no such file or folder"),
        ("--batch-size 0", "argument --batch-size: 0: must be between 1 and"),
        ("--lr fast", "argument --lr: 'fast' is not a number"),
        ("--steps 1.5", "argument --steps: '1.5' is not an integer"),
        ("--lr nan", "argument --lr: nan: must be between 0.0 and"),
        ("--warmup 23", "argument --warmup: 23: must be between 0.0 and 1.0"),
        ("--data synthetic --projection fitted", "--data synthetic: the linear layer cannot be fitted to noise"),
        ("--precision fp16", "argument --precision: invalid choice"),
        ("--clip ViT-L-14", "ViT-L-14: no such CLIP; expected a recipe"),
        ("--clip miniature@", ": no such weights"),
        ("--clip miniature@hf-hub:a/b", "hf-hub:a/b: no such weights; expected a file, .* or hf-hub:OWNER/NAME/PATH"),
        ("--clip hf-hub:a/b@main", "main: no such weights; .*; for a revision, run `hf download a/b --revision main"),
        ("--diffusion nowhere", "nowhere: no such diffusion model"),
        ("--seed 99999999999999999999", "argument --seed: 99999999999999999999: must be between 0 and"),
        ("--timesteps 500", "argument --timesteps: '500': must be LOW:HIGH"),
        ("--timesteps 0:1001", "must be LOW:HIGH, with 0 ≤ LOW < HIGH ≤ 1000"),
        ("--projection-steps 4", r"--projection-steps 4: must not exceed --steps \(3\)"),
        ("--recipe dfn-vit-h-14-224", "--data is required"),
        ("--text \udc80", "--text .*: must be one line of UTF-8 text"),
        (f"--out {__file__}/run", "is a file; a folder is needed"),
        ("--random-weights --diffusion a/b", f"--random-weights: --diffusion must be a folder or {SD21}"),
        ("--stepz 3", "unrecognized arguments: --stepz 3; --help lists the options"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(tmp_path, more, message):
    with refused(message):
        settings(tmp_path / "run", more)


@pytest.mark.parametrize(
    "more, message",
    [
        ("--recap random:65", "must take between 1 and 64 patches of this CLIP, not 65"),
        ("--recap pool:0", "must take between 1 and 64 patches"),
        ("--recap dense", "must be random:COUNT, random:SHARE%"),
        ("--recap all --join positions", "the recap has 65 tokens, but the text embedding has 24 positions"),
        ("--image-size 36", "--image-size 36: must be a multiple of 8"),
        ("--data {}/one.tar --projection fitted", "--projection fitted: needs at least two images"),
        ("--clip no-arch --random-weights", "CLIP no-arch could not be loaded: "),
        ("--clip ViT-B-32:nobody --recap all", "unknown tag; open_clip's tags for ViT-B-32: openai"),
        ("--clip hf-hub:nobody/nothing", "CLIP hf-hub:nobody/nothing could not be loaded"),
        ("--clip miniature@hf-hub:a/b/x.pth", "model a/b: could not be fetched from the hub: "),
        (f"--diffusion {SD21}", f"could not be loaded: .*--diffusion {SD21_MIRROR}"),
        ("--data {}/none.tar", "none.tar: no images"),
        ("--data {}/folder", "folder: no images in this folder"),
        ("--data {}/*.zip", "zip: no such file"),
        ("--data {}/*.tar {}/folder", "a folder among shards"),
        ("--mmvp {}/folder", "folder: no image folder"),
    ],
)
def test_bad_input_is_refused_before_the_first_step(tmp_path, more, message):
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
        ("clip/open_clip_config.json", "", None, "not a CLIP folder: open_clip_config.json is missing"),
        ("clip/open_clip_config.json", '"layers": 4', '"layers": 5', "clip: does not fit this CLIP: missing weight "),
        ("clip/open_clip_config.json", "{", "[", "CLIP .*clip could not be loaded: "),
        ("diffusion/unet/config.json", "", None, "not a Stable Diffusion folder in .*: unet/config.json is missing"),
        ("diffusion/unet/config.json", "128\n", "192\n", "diffusion model .*diffusion could not be loaded: "),
        ("diffusion/scheduler/scheduler_config.json", "epsilon", "sample", "not a Stable Diffusion 1.x or 2.x"),
        ("diffusion/scheduler/scheduler_config.json", "1000", "500", "--timesteps: the schedule .* has 500"),
    ],
)
def test_a_broken_model_folder_is_refused(tmp_path, name, old, new, message):
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
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def saved(content) -> bytes:
    """The bytes that `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("pickled", [pickle.dumps, saved])
@pytest.mark.parametrize(
    "name, message",
    [
        ("clip/open_clip_pytorch_model.bin", "clip/open_clip_pytorch_model.bin: contains pickled objects"),
        ("diffusion/unet/diffusion_pytorch_model.bin", "diffusion model .*diffusion could not be loaded: "),
        ("diffusion/vae/diffusion_pytorch_model.bin", "diffusion model .*diffusion could not be loaded: "),
        ("diffusion/text_encoder/pytorch_model.bin", "diffusion model .*diffusion could not be loaded: "),
    ],
)
def test_pickled_code_in_weights_is_not_executed(tmp_path, name, message, pickled):
    part = name.split("/")[0]
    shutil.copytree(MINIATURE / part, tmp_path / part)
    for file in (tmp_path / name).parent.glob("*.safetensors"):
        file.unlink()
    (tmp_path / name).write_bytes(pickled(dict(weight=torch.ones(3), code=Payload(tmp_path / "executed"))))
    with refused(message):
        run(tmp_path / "run", f"--{part} {tmp_path / part}")
    assert not (tmp_path / "executed").exists()


def test_a_text_longer_than_the_text_encoders_context_is_refused():
    with refused("--text: must have at most 24 tokens with its start and end, not 42"):
        model.load_diffusion(f"{MINIATURE}/diffusion", "red " * 40, torch.float32, CPU)


@pytest.mark.parametrize(
    "environment, message",
    [
        ("RANK=0", "RANK is set, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start with torchrun"),
        ("SLURM_STEP_NUM_TASKS=2", "srun starts 2 tasks, and each would train alone: use one task per node"),
        ("RANK=0 WORLD_SIZE=3 MASTER_ADDR=x MASTER_PORT=1", "--batch-size 32: must be a multiple of .* processes .3"),
    ],
)
def test_processes_that_cannot_train_together_are_refused(monkeypatch, environment, message):
    for assignment in environment.split():
        monkeypatch.setenv(*assignment.split("="))
    with refused(message):
        parse_args(["--batch-size", "32"])


def test_one_process_trains_in_an_allocation_of_several_tasks(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")  # in the shell that salloc opens, before any srun
    assert parse_args([]).recipe == "miniature"


@pytest.mark.parametrize("processes, batch, most, expected", [(2, 32, 32, 16), (1, 32, 7, 4), (1, 61, 16, 1)])
def test_the_micro_batch_divides_the_images_per_process(monkeypatch, capsys, processes, batch, most, expected):
    for name, value in dict(RANK=0, WORLD_SIZE=processes, MASTER_ADDR="localhost", MASTER_PORT=1).items():
        monkeypatch.setenv(name, f"{value}")
    assert parse_args(f"--batch-size {batch} --micro-batch {most}".split()).micro_batch == expected
    share = batch // processes
    reduced = f"--micro-batch {most}: reduced to {expected}: it must divide the {share} images per process\n"
    assert capsys.readouterr().err == (reduced if expected < min(share, most) else "")


def test_untrained_text_encoders_fit_no_projection(capsys):
    assert parse_args(["--random-weights"]).projection == "random"
    assert capsys.readouterr().err.startswith("--random-weights: uses --projection random")


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_options_beyond_the_paper_give_the_recipe_when_typed(recipe):
    row = vars(RECIPES[recipe])
    options = " ".join(beyond_the_paper(json.loads(json.dumps(row))))  # as in args.json
    args = parse_args(["--recipe", "miniature-paper", "--steps", "5600", *options.split()])
    names = ["timesteps", "optimizer", "projection", "projection_steps", "projection_lr", "freeze_projection", "ldifs"]
    assert [getattr(args, name) for name in names] == [row[name] for name in names]
    assert args.out == "runs/miniature-paper"


def test_help_shows_the_recipes_settings():
    for recipe, timesteps in (("miniature", "500:1000"), ("openai-vit-l-14-336", "0:1000")):
        text, row = make_parser(recipe).format_help(), RECIPES[recipe]
        assert all(f"({value})" in text for value in (timesteps, row.recap, row.lr))


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


def test_a_broken_picture_of_the_benchmark_is_named(tmp_path):
    pairs = read_mmvp(f"{write_mmvp(tmp_path / 'mmvp')}")
    (tmp_path / "broken.jpg").write_bytes(pairs[0].images[0].read_bytes()[:300])
    broken = Pair(pairs[0].ids, pairs[0].type, pairs[0].statements, (tmp_path / "broken.jpg",) * 2)
    with refused("broken.jpg: not a readable image"):
        evaluate_mmvp.similarities(model.load_clip("miniature"), [pairs[1], broken], CPU)


# ---------------------------------------------------------------------------------------------------------------------
# Commands: one sentence on stderr, the exit code, and an immediate answer


@pytest.mark.parametrize(
    "error, code, printed",
    [
        (UserError("no such thing"), 2, "command: no such thing"),
        (Stopped("stopped", 15), 143, "command: stopped"),
        (OSError(errno.ENOSPC, "No space left"), 2, "command: [Errno 28] No space left"),
        (KeyboardInterrupt(), 130, "command: interrupted"),
        (MemoryError(), 2, "command: not enough memory; use less"),
        (RuntimeError("CUDA out of memory. Tried\n to"), 2, "command: not enough memory; use less"),
    ],
)
def test_a_command_prints_one_sentence_and_exits(capsys, error, code, printed):
    with pytest.raises(SystemExit) as end, exit_on_user_error("command", "use less"):
        raise error
    assert end.value.code == code and capsys.readouterr().err == f"{printed}\n"


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("x"), AssertionError()])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)), exit_on_user_error("command"):
        raise error


def test_a_terminal_without_greek_letters_is_no_error(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", terminal)
    with exit_on_user_error("command"):
        print("θ at 64²")
    terminal.flush()
    assert terminal.buffer.getvalue() == "? at 64²\n".encode("latin-1")


FILES = sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("extras/*.py")) + sorted(ROOT.glob("miniature/*.py"))
COMMANDS = [f"{path.relative_to(ROOT)}" for path in FILES if 'if __name__ == "__main__"' in path.read_text()]
WITHOUT_TORCH = """
import os, runpy, sys
path = sys.argv[1]
sys.path[0], sys.modules["torch"] = os.path.dirname(path), None  # None: importing torch fails
for flag, exit_code in (("--help", 0), ("--no-such-option", 2)):
    sys.argv = [path, flag]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        assert end.code == exit_code, end.code
print(os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_answers_before_torch_is_imported(command):
    """Help on stdout, one line for a typo on stderr. `harness` sets GOMP_SPINCOUNT before torch is imported."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    line = [sys.executable, "-c", WITHOUT_TORCH, f"{ROOT / command}"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stdout.startswith("usage: ")
    assert done.stdout.splitlines()[-1] == "1000"


def test_a_linked_command_finds_its_modules(tmp_path):
    (tmp_path / "export.py").symlink_to(ROOT / "extras" / "export.py")
    subprocess.run([sys.executable, "-I", f"{tmp_path}/export.py", "--help"], check=True, capture_output=True)


LEVELS = ["train", "beyond evaluate_mmvp", "model", "condition data", "harness"]  # from the top


def test_imports_run_downward():
    """Nothing imports extras/ or miniature/; those may import anything."""
    level = {name: i for i, names in enumerate(LEVELS) for name in names.split()}
    never = {"extras", "miniature"} | {path.stem for path in FILES if path.parent != ROOT}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("harness/*.py")]:
        if path.name.startswith(("test_", "conftest")):
            continue
        names = re.findall(r"^ *(?:from|import) ([\w.]+)", path.read_text(), re.MULTILINE)
        imported = {name.split(".")[0] for name in names}
        assert not imported & {*never, "test_smoke", ""}, path  # "": a relative import
        inside = path.parent.name == "harness"  # its modules import each other
        here = level["harness" if inside else path.stem]
        for name in imported & level.keys():
            assert level[name] > here or inside and name == "harness", f"{path} imports {name}"


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub on which every repository is missing or gated."""

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
        (True, "evaluate_mmvp.py miniature --mmvp a/gated", "dataset a/gated: could not be fetched"),
        (False, "train.py {run} --diffusion a/missing", "diffusion model a/missing could not be loaded"),
    ],
)
def test_a_hub_that_refuses_or_is_down_is_a_sentence(tmp_path, reached, command, words):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = f"http://127.0.0.1:{server.server_port if reached else 1}"
    environment = os.environ | dict(HF_ENDPOINT=hub, HF_HUB_OFFLINE="0", HF_HOME=f"{tmp_path}/home")
    command = command.format(mmvp=f"{MINIATURE}/mmvp", run=f"{SMALL} {tmp_path}/run").split()
    command = [sys.executable, *command]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    server.shutdown()
    printed = [line for line in done.stderr.splitlines() if line.strip() and "shard/s" not in line]  # no progress bar
    assert done.returncode == 2 and len(printed) == 1 and words in printed[0], done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Fuzzing: each parser returns a result or raises UserError

ODD = [b'"', b",", b"\n", b"\0", b"-", b"9" * 20, b"9" * 5000, b"{", b"[", "é".encode()]


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Replaces, removes, repeats or prefixes one to eight pieces with odd bytes; sometimes truncates."""
    for _ in range(rng.integers(1, 9)):
        at, length = rng.integers(len(content) + 1), rng.integers(1, 20)
        before, part, after = content[:at], content[at : at + length], content[at + length :]
        parts = [rng.bytes(length), b"", part + part, ODD[rng.integers(len(ODD))] + part]
        content = before + parts[rng.integers(4)] + after
    return content[: rng.integers(len(content) + 1)] if rng.random() < 0.2 else content


@pytest.fixture(scope="module")
def parsers(tmp_path_factory) -> dict:
    """For each parser, a valid file and a function that parses it."""
    folder, cache = tmp_path_factory.mktemp("parsers"), Path(os.environ["XDG_CACHE_HOME"]) / "diva"
    tar, recap = write_shard(folder / "0.tar", {f"{i}.jpg": b"12345" for i in range(3)}), folder / "recap"
    others = set(cache.glob("*"))
    shard_index(f"{tar}")
    (index,) = set(cache.glob("*")) - others
    # three headers with their images, and the first of the two empty blocks at the end
    short_tar = folder / "1.tar"
    short_tar.write_bytes(tar.read_bytes()[:3584])
    recap.write_text("random:50%")
    mmvp, checkpoint, linear = write_mmvp(folder / "mmvp"), folder / "checkpoint.pt", torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(linear.parameters(), 1, momentum=0.9)
    linear(torch.ones(2)).sum().backward()
    optimizer.step()
    state = dict(step=3, unreadable=0, images="9", settings=dict(lr=0.1), code=[{}])
    save_checkpoint(checkpoint, linear, optimizer, state)
    return {
        "index": (short_tar, lambda: find_images(f"{short_tar}")),
        "cache": (index, lambda: shard_index(f"{tar}")),
        "mmvp": (mmvp / "Questions.csv", lambda: read_mmvp(f"{mmvp}")),
        "recap": (recap, lambda: parse_recap(recap.read_text(errors="replace"), 16)),
        "state": (checkpoint, lambda: read_state(checkpoint)),
        "checkpoint": (checkpoint, lambda: load_checkpoint(checkpoint, linear, optimizer)),
    }


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["index", "cache", "mmvp", "recap", "state", "checkpoint"])
def test_no_parser_crashes(parsers, monkeypatch, name, count):
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # too slow: each broken cache is written again
    path, parse = parsers[name]
    good, rng, refusals = path.read_bytes(), np.random.default_rng(0), 0
    for _ in range(count):
        path.write_bytes(mutated(good, rng))
        try:
            found = parse()
            if name in ("index", "cache"):  # offsets and sizes
                assert found.shape[1] == 2 and found.min(initial=0) >= 0 and found.max(initial=0) < 20_000
        except UserError as error:
            assert "\n" not in str(error).strip()
            refusals += 1
    path.write_bytes(good)
    parse()
    assert refusals > count / 20 or name == "cache"
