"""Fault tolerance: signals, kills, a full disk, broken images; a resumed run is bit-identical."""

import argparse
import contextlib
import csv
import errno
import fcntl
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import beyond
import data
import evaluate_mmvp
import harness.metrics
import harness.processes
import harness.run
import model
import train
from harness.errors import Stopped
from harness.processes import default_precision, process_group
from harness.recipes import MINIATURE, RECIPES
from harness.signals import SIGNALS, StopSignals
from harness.test_input import refused
from test_smoke import (
    ROOT, SMALL, TORCHRUN, assert_near, assert_same_run, assert_saved, at_loss, jpeg, metrics, picture, run, settings,
    steps_saved, weights, write_mmvp, write_shard, write_siglip,
)  # fmt: skip

STEPS = "--steps 5 --save-every 2"
FULL_SIZE = [name for name in RECIPES if name != "miniature"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run of STEPS."""
    return run(tmp_path_factory.mktemp("whole") / "run", STEPS)


def stop_run(monkeypatch, out: Path, steps: int, name: str, more: str = "") -> None:
    """Starts a run of STEPS that the signal `name` stops after `steps`."""
    number, usual = signal.Signals[name], signal.getsignal(signal.Signals[name])
    losses = at_loss(monkeypatch, steps, lambda: signal.raise_signal(number))
    with refused(f"{name}: stopped after {steps} steps, .* the same command again to resume") as stop:
        run(out, f"{STEPS} {more}")
    assert stop.type is Stopped and stop.value.exit_code == 128 + number
    assert len(losses) == steps_saved(out) == steps and signal.getsignal(number) == usual


# ---------------------------------------------------------------------------------------------------------------------
# What a run prints and does


def test_a_run_prints_its_plan_and_the_next_steps(tmp_path, capfd):
    out = run(tmp_path / "run", "--steps 5 --micro-batch 2")
    said = capfd.readouterr().out.splitlines()
    lines = {line[:12].rstrip(): line[13:] for line in said}
    expected = ["recipe", "CLIP θ", "diffusion φ", "condition", "images", "steps", "beyond DIVA", "scores", "writes"]
    assert list(lines)[:9] == expected
    tower = sum(v.numel() for k, v in weights(out).items() if k.startswith("visual"))
    assert float(re.search(r"([\d.e-]+) M ", lines["CLIP θ"])[1]) * 1e6 == pytest.approx(tower, rel=1e-3)
    assert lines["condition"].startswith("20 tokens, recap random:30%, text '' added by mean")
    assert lines["images"].startswith("2,000 at 64², 2 noisy states each")
    assert "0 to 5, sgd, lr 0.01, batch 4 = 1 process × micro-batch 2 × 2 accumulated" in lines["steps"]
    assert lines["beyond DIVA"] == "no options" and lines["scores"] == "none (no --mmvp)"
    assert [line[13:] for line in said[10:]] == [
        f'open_clip.create_model_and_transforms("local-dir:{out}/clip")',
        f"python evaluate_mmvp.py miniature {out}/clip",
        f"python extras/reconstruct.py {out}",
        f"python extras/export.py {out}/clip {out}/transformers",
        f"python extras/report.py {out}",
    ]
    untrained = settings(out, f"--random-weights --mmvp {MINIATURE}/mmvp")
    advice = harness.run.next_steps(untrained, SimpleNamespace(tokenizer_error=None))
    assert "reconstruct.py" not in advice and "evaluate_mmvp.py" not in advice  # they would refuse


def test_a_run_says_how_long_it_takes_without_the_scoring(tmp_path, monkeypatch, capfd):
    """Each step takes a minute, except the first (1,000 seconds), which allocates and compiles."""
    clock, events, similarities = iter([0, *range(1000, 10_000, 60)]), [], train.similarities
    monkeypatch.setattr(harness.metrics, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(train, "similarities", lambda *args: events.append("scores") or similarities(*args))
    bar = harness.metrics.tqdm
    monkeypatch.setattr(harness.metrics, "tqdm", lambda **options: events.append("starts") or bar(**options))
    mmvp = write_mmvp(tmp_path / "mmvp")
    flags = f"--mmvp {mmvp} --steps 13 --batch-size 1 --image-size 16 --states 1"
    out = run(tmp_path / "run", flags)
    said = capfd.readouterr().out
    assert f"scores       before and after training, on {mmvp}" in said
    assert said.count("the remaining 2 steps will take about 2.0 min") == said.count("will take") == 1
    assert events == ["scores", "starts", "scores"] and metrics(out)[5]["images_per_second"] == round(1 / 60, 3)
    clock = iter(range(100))  # a second for each step: not worth a line
    run(tmp_path / "short", flags)
    assert "will take" not in capfd.readouterr().out


def test_the_logged_loss_excludes_the_penalty(tmp_path, monkeypatch, whole):
    monkeypatch.setattr(beyond.Ldifs, "__call__", lambda self, cls, images: 0 * cls.sum() + 7)
    out = run(tmp_path / "run", f"{STEPS} --ldifs 1")
    assert [line["loss"] for line in metrics(out)] == [line["loss"] for line in metrics(whole)]


def test_one_image_is_enough_and_may_move(tmp_path, monkeypatch):
    folder, moved = tmp_path / "job1", tmp_path / "job2"
    folder.mkdir()
    (folder / "one.jpg").write_bytes(jpeg(picture(40)))
    assert_saved(run(tmp_path / "run", f"--data {folder}"))
    folder.rename(moved)
    monkeypatch.setattr(train, "build", None)  # finished: nothing is loaded
    run(tmp_path / "run", f"--data {moved} --clip {MINIATURE}/../miniature/clip/")


def test_bf16_is_the_default_only_where_the_hardware_has_it(monkeypatch):
    for device, ampere, expected in (("cpu", True, "fp32"), ("cuda", True, "bf16"), ("cuda", False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or ampere)
        assert default_precision(torch.device(device)) == expected


def test_gradients_are_averaged_once_a_step_and_held_once(tmp_path, monkeypatch):
    """DDP communicates in 3 of 12 backward passes; from the second step on the gradients are in its two buckets."""
    buckets, storages, backward = [], [], torch.Tensor.backward

    def watch(state, bucket):
        buckets.append(bucket.index())
        return allreduce_hook(None, bucket)

    def watched(conditioner, **options):
        def count(loss):
            backward(loss)
            storages.append(len({p.grad.untyped_storage().data_ptr() for p in conditioner.parameters()}))

        monkeypatch.setattr(torch.Tensor, "backward", count)
        ddp = DistributedDataParallel(conditioner, **options)
        ddp.register_comm_hook(None, watch)
        return ddp

    monkeypatch.setattr(train, "DistributedDataParallel", watched)
    run(tmp_path / "run", "--micro-batch 1")
    assert buckets.count(0) == 3 and storages[0] == 58 and len(storages) == 12 and max(storages[4:]) <= 2


def test_bf16_runs_theta_under_autocast_and_phi_in_bf16(tmp_path, monkeypatch):
    build, dtypes, parts = train.build, set(), []

    def watched(*args) -> tuple:
        clip, diffusion, conditioner = build(*args)
        parts.extend([clip.model, diffusion.unet, diffusion.vae])
        layer = clip.model.visual.transformer.resblocks[0].mlp.c_fc
        layer.register_forward_hook(lambda *call: dtypes.add(call[-1].dtype))
        diffusion.unet.register_forward_pre_hook(lambda unet, inputs: dtypes.add(inputs[0].dtype))  # z_t
        return clip, diffusion, conditioner

    monkeypatch.setattr(train, "build", watched)
    run(tmp_path / "run", "--precision bf16")
    assert dtypes == {parts[1].dtype, parts[2].dtype} == {torch.bfloat16}
    assert {p.dtype for p in parts[0].parameters()} == {torch.float32}
    assert not any(module.training for part in parts for module in part.modules())


@pytest.mark.parametrize("name", ["miniature", "siglip"])
def test_grad_checkpointing_keeps_less_and_changes_nothing(tmp_path, name):
    """Fewer bytes are saved for the backward passes; the result is bit-identical."""
    clip, kept, outs = write_siglip(tmp_path / name) if name == "siglip" else name, [], []
    for more in ("", "--grad-checkpointing"):
        tensors = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            tensors[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outs.append(run(tmp_path / f"run{more}", f"--clip {clip} --recap pool:5 --steps 1 {more}"))
        kept.append(sum(tensors.values()))
    assert kept[1] < 0.35 * kept[0]  # 0.44 or more if only φ or only θ were checkpointed
    assert_same_run(*outs)


@pytest.mark.slow
def test_the_next_steps_work_as_printed(tmp_path, capfd):
    out = run(tmp_path / "run", f"--mmvp {write_mmvp(tmp_path / 'mmvp')}")
    commands = re.findall(r"python (extras/.*)", capfd.readouterr().out)
    for command in commands:
        finish(f"{sys.executable} {command}")
    assert len(commands) == 3 and (out / "report.html").stat().st_size > (out / "reconstruct.png").stat().st_size


@pytest.mark.slow
def test_a_compiled_run_has_the_same_losses(tmp_path, whole):
    """Within 1e-5: fp32 sums are computed in another order."""
    for a, b in zip(metrics(whole), metrics(run(tmp_path / "run", f"{STEPS} --compile")), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_step_at_full_size(tmp_path, name):
    """One step of every recipe but `miniature`, with random weights; open_clip loads the saved CLIP."""
    flags = "--random-weights --data synthetic --steps 1 --batch-size 1 --micro-batch 1 --precision bf16"
    out = run(tmp_path / "run", f"--recipe {name} {flags}")
    (line,) = metrics(out)
    assert 0.5 < line["loss"] < 2 and line["grad_norm"] > 0  # ε has variance 1, and an untrained U-Net predicts about 0
    assert_saved(out)


def test_a_clip_is_saved_without_its_tokenizer(tmp_path):
    clip = model.load_clip(f"{write_siglip(tmp_path / 'siglip')}")
    clip.source = "ViT-B-16-SigLIP"  # its tokenizer is on the hub, which is offline here
    clip.save(tmp_path / "saved")
    assert clip.tokenizer_error.startswith("the tokenizer of ViT-B-16-SigLIP could not be loaded: ")
    reloaded = open_clip.create_model(f"local-dir:{tmp_path}/saved")
    assert all(torch.equal(v, clip.model.state_dict()[k]) for k, v in reloaded.state_dict().items())


def test_a_finished_run_evaluates_once(tmp_path, capsys, monkeypatch, whole):
    two, three = (f"{STEPS} --mmvp {write_mmvp(tmp_path / f'{pairs}', pairs)}" for pairs in (2, 3))
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    scores = out / "mmvp" / "scores.json"
    run(out, two)
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(train, "compare", None)  # it dies while it scores on another benchmark
        run(out, three)
    for mmvp, pairs in ((three, 3), (two, 2)):  # not scored yet, or on another benchmark
        run(out, mmvp)
        assert json.loads(scores.read_text())["pairs"] == pairs
    before = scores.stat().st_mtime_ns
    monkeypatch.setattr(train, "load_clip", None)  # nothing may be loaded
    capsys.readouterr()
    run(out, two)
    assert re.search(f"{out}: this run is finished.*; remove that folder to start over\n", capsys.readouterr().out)
    assert scores.stat().st_mtime_ns == before


def test_the_command_compares_two_clips(tmp_path, monkeypatch, capsys):
    """The same scores as the run's own; each figure is recomputed from pairs.csv."""
    mmvp, scores = write_mmvp(tmp_path / "mmvp"), tmp_path / "scores"
    header, *lines = (MINIATURE / "mmvp" / "Questions.csv").read_text().splitlines(True)
    lines = [line for i, line in enumerate(lines) if i % 200 < 10]  # 5 pairs of each type
    (mmvp / "Questions.csv").write_text("".join([header, *lines]))
    run(tmp_path / "run", f"--mmvp {mmvp} --lr 1")
    capsys.readouterr()
    command = f"evaluate_mmvp.py {MINIATURE}/clip {tmp_path}/run/clip --mmvp {mmvp} --out {scores}"
    monkeypatch.setattr(sys, "argv", command.split())
    evaluate_mmvp.main(evaluate_mmvp.read_args())
    said = capsys.readouterr().out
    clips, theirs = (
        json.loads((folder / "scores.json").read_text())["clips"] for folder in (scores, tmp_path / "run" / "mmvp")
    )
    assert clips[1]["change"] == theirs[1]["change"] and len(clips) == 2
    with open(scores / "pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 45
    for embedding, change in zip(evaluate_mmvp.EMBEDDINGS, clips[1]["change"], strict=True):
        names = [f"{embedding} s{s} i{i}" for s in (1, 2) for i in (1, 2)]
        a, b, c, d = np.array([[float(row[name]) for name in names] for row in rows]).T
        right = (a > b) & (d > c)
        assert right.tolist() == [row[f"{embedding} right"] == "1" for row in rows]
        before, after = right.reshape(2, 45)
        averages = [100 * before.mean(), 100 * after.mean()]  # all types have the same number of pairs
        assert [clip[embedding]["average"] for clip in clips] == pytest.approx(averages)
        assert all(f"{average:.1f}" in said for average in averages)
        assert (change["won"], change["lost"]) == (sum(after & ~before), sum(before & ~after))
        assert change["points"] == pytest.approx(averages[1] - averages[0])


def test_shards_that_change_while_they_are_read_are_skipped(tmp_path, monkeypatch, capfd):
    """Of forty shards one is removed, one truncated, one replaced during a run: images are counted and named."""
    files = {f"{i}.jpg": jpeg(picture(40, 90 * i)) for i in range(4)}
    for s in range(40):
        write_shard(tmp_path / f"{s:02}.tar", files)

    def harm() -> None:
        (tmp_path / "03.tar").unlink()
        os.truncate(tmp_path / "07.tar", 2000)
        write_shard(tmp_path / "11.tar", {"0.txt": b"caption" * 100, "1.jpg": files["1.jpg"]})

    at_loss(monkeypatch, 11, harm)
    flags = f"--data {tmp_path}/*.tar --steps 40 --save-every 40 --states 1 --image-size 16"
    lines = metrics(run(tmp_path / "run", flags))
    names = [name for line in lines for name in line.get("skipped", [])]
    assert lines[10]["unreadable"] == 0 and lines[-1]["unreadable"] == len(names) > 8
    assert {Path(name.split(" at byte")[0]).name for name in names} == {"03.tar", "07.tar", "11.tar"}
    said = capfd.readouterr()
    assert said.err.count(f"cannot read {names[0]}: replaced by another image") == said.err.count("cannot read") == 1
    assert f"\n{len(names)} images could not be read" in said.out
    write_shard(tmp_path / "07.tar", files)
    with refused("this run used other images"):
        run(tmp_path / "run", flags)


# ---------------------------------------------------------------------------------------------------------------------
# What ends a run, and how it resumes


def test_the_linear_layer_is_fitted_once(tmp_path, monkeypatch):
    fits = []
    monkeypatch.setattr(beyond, "fit_projection", lambda *args: fits.append(args))
    stop_run(monkeypatch, tmp_path, 2, "SIGTERM", "--projection fitted")
    run(tmp_path, f"{STEPS} --projection fitted")
    assert steps_saved(tmp_path) == 5 and len(fits) == 1


@pytest.mark.parametrize("saves", [1, 3])
def test_a_run_that_dies_in_a_save_resumes_in_the_same_bits(tmp_path, monkeypatch, whole, saves):
    """In its first or its last save, before the checkpoint is written; in the last, OUT/clip is already written."""
    save, calls = harness.run.save_checkpoint, []

    def die(*args) -> None:
        calls.append(1)
        if len(calls) == saves:
            raise KeyboardInterrupt
        save(*args)

    monkeypatch.setattr(harness.run, "save_checkpoint", die)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", STEPS)
    assert_same_run(whole, run(tmp_path / "run", STEPS))
    assert_saved(tmp_path / "run")


def test_a_full_disk_costs_nothing_but_time(tmp_path, monkeypatch, whole):
    """The second save does not fit: one sentence, and the first save is intact; with more room the run resumes."""
    size, (soft, hard) = (whole / "checkpoint.pt").stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    with monkeypatch.context() as patch, refused("checkpoint.pt: could not be written"):
        at_loss(patch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard)))
        try:
            run(tmp_path, STEPS)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert steps_saved(tmp_path) == 2 and not list(tmp_path.glob("*.part"))
    assert_same_run(whole, run(tmp_path, STEPS))


def test_a_loss_that_is_not_finite_stops_before_its_step(tmp_path, monkeypatch):
    loss, factors = train.denoising_loss, iter([1, 1, math.nan])
    monkeypatch.setattr(train, "denoising_loss", lambda *args: loss(*args) * next(factors))
    with refused(r"step 2: the loss is nan .* \(process 0\); the step was not taken"):
        run(tmp_path / "run", "--save-every 1")
    assert steps_saved(tmp_path / "run") == 2


@pytest.mark.slow
def test_memory_does_not_grow(tmp_path, monkeypatch):
    """20,000 steps: resident memory after the first 1,000 stays within 2%."""
    rate, resident = train.learning_rate, []

    def watch(step: int, *args) -> float:
        if step % 100 == 0:
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]))
        return rate(step, *args)

    monkeypatch.setattr(train, "learning_rate", watch)
    small = "--batch-size 1 --micro-batch 1 --states 1 --image-size 16 --save-every 5000 --lr 1e-4"
    run(tmp_path / "run", f"{small} --steps 20000")
    assert len(resident) == 200 and max(resident[10:]) < 1.02 * resident[10]


# ---------------------------------------------------------------------------------------------------------------------
# What a run resumes from


def test_changed_code_is_refused_by_name_or_recorded(tmp_path, monkeypatch):
    out, hashes = tmp_path / "run", harness.run.code_hashes()
    stop_run(monkeypatch, out, 2, "SIGINT")
    monkeypatch.setattr(harness.run, "code_hashes", lambda: hashes | {"train.py": "edited"})
    with refused(r"run: train.py changed since .*; choose another --out, or resume anyway with --changed-code"):
        run(out, STEPS)
    run(out, f"{STEPS} --changed-code")
    code = json.loads((out / "args.json").read_text())["code"]
    assert [(c["step"], c["train.py"]) for c in code] == [(0, hashes["train.py"]), (2, "edited")]


def test_comments_docstrings_and_layout_are_not_changed_code(tmp_path, monkeypatch):
    for name in harness.run.METHOD:
        shutil.copy(ROOT / name, tmp_path)
    before, train_py = harness.run.code_hashes(), tmp_path / "train.py"
    monkeypatch.setattr(harness.run, "ROOT", tmp_path)
    code = train_py.read_text()
    edited = "# a comment\n" + code.replace('"""The method:', '"""My method:').replace("\n\n\n", "\n\n")
    train_py.write_text(edited)
    assert "My method" in edited and harness.run.code_hashes() == before
    train_py.write_text(code.replace("0.5 * (1 + math.cos", "0.6 * (1 + math.cos"))
    assert [name for name, code in harness.run.code_hashes().items() if code != before[name]] == ["train.py"]


def test_paths_in_the_repository_are_compared_relative_to_it(tmp_path, monkeypatch):
    kept = []
    for name in ("repository", "moved", "elsewhere"):
        (tmp_path / name / "clip").mkdir(parents=True)
        monkeypatch.setattr(harness.run, "ROOT", tmp_path / ("repository" if name == "elsewhere" else name))
        args = argparse.Namespace(clip=f"{tmp_path}/{name}/clip", diffusion="A/B")
        kept.append(harness.run.comparable_settings(args))
    assert kept[0] == kept[1] == dict(clip="clip", diffusion="A/B") and kept[2]["clip"] == f"{tmp_path}/elsewhere/clip"


def test_a_run_of_the_former_form_is_refused(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    with refused("written by an earlier version, so it cannot be resumed; remove the folder"):
        run(tmp_path)


def test_a_disk_without_permissions_and_fsync_keeps_a_run(tmp_path, monkeypatch):
    def refuse(*args, **more):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    monkeypatch.setattr(os, "chmod", refuse)
    assert_saved(run(tmp_path / "run"))


def test_clips_are_kept_along_a_run(tmp_path, monkeypatch):
    """The run is stopped at the last one, which has the weights of that step; OUT/clip is not written yet."""
    stop_run(monkeypatch, tmp_path, 4, "SIGUSR1", "--keep-every 2")
    assert sorted(path.name for path in tmp_path.glob("clip*")) == ["clip-000002", "clip-000004"]
    kept, stopped = open_clip.create_model(f"local-dir:{tmp_path}/clip-000004"), weights(tmp_path)
    assert all(torch.equal(v, stopped[f"visual.{k}"]) for k, v in kept.visual.state_dict().items())


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_asks_to_stop_unless_it_is_ignored(number):
    usual, signals = signal.getsignal(number), StopSignals()
    with signals.caught():
        signals.armed = True
        signal.raise_signal(number)
        assert signals.number == number and signal.getsignal(number) == signal.SIG_DFL  # a second one ends the process
    assert signal.getsignal(number) == usual
    signal.signal(number, signal.SIG_IGN)  # like SIGHUP under nohup
    try:
        with StopSignals().caught():
            assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, usual)


def test_signals_that_end_the_process_at_once(monkeypatch):
    """One before the first batch, and a second one, unless torchrun forwards what a cluster sent to all processes."""
    signals, ended = StopSignals(), []
    monkeypatch.setenv("RANK", "0")
    with signals.caught(), monkeypatch.context() as patch:
        patch.setattr(signal, "raise_signal", ended.append)
        signals.receive(signal.SIGUSR2, None)
        signals.armed = True
        signals.receive(signal.SIGTERM, None)
        signals.receive(signal.SIGTERM, None)  # within ECHO
        assert ended == [signal.SIGUSR2] and signals.number == signal.SIGTERM
        signals.time -= 3
        signals.receive(signal.SIGINT, None)
        assert ended[1:] == [signal.SIGINT] and signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_a_signal_while_a_batch_never_comes_saves_the_last_whole_step(tmp_path, monkeypatch, whole):
    collate = data.collate

    def stuck(items: list) -> dict:
        if items[0]["keys"][0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait()  # forever
        return collate(items)

    with monkeypatch.context() as patch, refused("SIGTERM: stopped after 3 steps"):
        patch.setattr(data, "collate", stuck)
        run(tmp_path / "run", STEPS)
    assert steps_saved(tmp_path / "run") == 3
    assert_same_run(whole, run(tmp_path / "run", STEPS))


def as_rank_zero(monkeypatch, processes: int, store: dist.Store) -> None:
    """Pretends that torchrun started this process as rank 0 of `processes`, alone on its node."""
    monkeypatch.setattr(harness.processes, "rendezvous", lambda url: iter([(store, 0, processes)]))
    for name, value in dict(RANK=0, WORLD_SIZE=processes, LOCAL_WORLD_SIZE=1, TORCHELASTIC_RESTART_COUNT=3).items():
        monkeypatch.setenv(name, f"{value}")


def test_nodes_that_cannot_reach_each_other_are_told_what_to_set(monkeypatch):
    def refuse(*args, **more):
        raise RuntimeError("Gloo connectFullMesh failed with 127.0.1.1: Connection refused")

    as_rank_zero(monkeypatch, 2, dist.HashStore())
    monkeypatch.setattr(dist, "init_process_group", refuse)
    with refused("nodes cannot reach each other .*Connection refused.*GLOO_SOCKET_IFNAME"), process_group():
        pass


def test_a_restart_has_its_own_keys(monkeypatch):
    """After a restart torchrun's store still holds the addresses of the processes that died."""
    stores, kept = [], dist.HashStore()
    as_rank_zero(monkeypatch, 1, kept)
    monkeypatch.setattr(dist, "init_process_group", lambda *args, store, **more: stores.append(store))
    monkeypatch.setattr(dist, "barrier", lambda: None)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with process_group():
        stores[0].set("address", "new")
    assert kept.get("3/address") == b"new"


# ---------------------------------------------------------------------------------------------------------------------
# Whole processes: torchrun, kills


LONG = "--steps 150 --micro-batch 1 --save-every 20"


def start(command: str, out: Path, lines: int) -> subprocess.Popen:
    """Starts a run in the background and returns once its metrics.jsonl has `lines` lines."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(command.split(), cwd=ROOT, start_new_session=True, **pipes)
    deadline, log = time.monotonic() + 120, out / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and log.read_bytes().count(b"\n") >= lines:
            break
        time.sleep(0.002)
    return process


def finish(command: str) -> None:
    subprocess.run(command.split(), cwd=ROOT, check=True, capture_output=True, timeout=300)


def faulty(script: Path, fault: str) -> Path:
    """A script that executes `fault` and then trains as train.py does."""
    script.write_text(
        f"import os, sys, time; sys.path.insert(0, os.getcwd())\n"
        f"import torch, data, train\n"
        f"from harness.errors import exit_on_user_error\n"
        f"from harness.options import parse_args\n"
        f"from harness.processes import process_group\n"
        f"{fault}\n"
        f"with exit_on_user_error('train.py'), process_group() as device: train.train(parse_args(), device)\n"
    )
    return script


def test_a_lost_terminal_stops_a_run(tmp_path):
    """SIGHUP arrives, and writing to the terminal fails. Threads still read the step's batches, so it finishes."""
    master, terminal = os.openpty()
    flags = "--steps 1000 --batch-size 16 --micro-batch 2 --states 1 --workers 2"
    command = f"{sys.executable} train.py {SMALL} {tmp_path}/run {flags}"
    process = subprocess.Popen(
        command.split(), cwd=ROOT, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(terminal)
    while not (tmp_path / "run" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    os.close(master)
    assert process.wait(timeout=60) == 128 + signal.SIGHUP
    assert steps_saved(tmp_path / "run") == len(metrics(tmp_path / "run")) >= 1


def test_two_processes_resume_from_what_the_first_reads(tmp_path, monkeypatch, whole):
    """With accumulation. Process 1 cannot read the state, as on a network disk; the result is that of one process."""
    stop_run(monkeypatch, tmp_path / "two", 2, "SIGTERM")
    fault = "import harness.run\nif os.environ['RANK'] == '1': harness.run.read_state = None"
    finish(f"{TORCHRUN} {faulty(tmp_path / 'two.py', fault)} {SMALL} {tmp_path}/two {STEPS} --micro-batch 1")
    assert_near(weights(whole), weights(tmp_path / "two"), 1e-5)
    losses = [[line["loss"] for line in metrics(out)] for out in (whole, tmp_path / "two")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.fixture(scope="module")
def whole_of_two(tmp_path_factory) -> Path:
    """An uninterrupted run of two processes, long enough to be disturbed."""
    out = tmp_path_factory.mktemp("two") / "run"
    finish(f"{TORCHRUN} train.py {SMALL} {out} {LONG}")
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_torchrun_stops_and_resumes(tmp_path, whole_of_two, name):
    """A signal to torchrun stops both processes with one sentence; the resumed run ends like an uninterrupted one."""
    out = tmp_path / "run"
    command = f"{TORCHRUN} --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGUSR1 train.py {SMALL} {out} {LONG}"
    process = start(command, out, 30)
    process.send_signal(signal.Signals[name])
    said, _ = process.communicate(timeout=20)
    assert process.returncode != 0
    assert said.count(f"train.py: {name}: stopped after") == 1
    assert 30 <= steps_saved(out) == len(metrics(out)) < 150
    if name == "SIGUSR1":  # it resumes in one process
        finish(f"{sys.executable} train.py {SMALL} {out} {LONG}")
        assert_near(weights(whole_of_two), weights(out), 1e-5)
    else:
        finish(command)
        assert_same_run(whole_of_two, out)


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once(tmp_path):
    """During a micro-batch of many seconds, after which the first signal would have stopped the run."""
    flags = "--steps 2 --batch-size 640 --micro-batch 640 --states 4"
    process = start(f"{sys.executable} train.py {SMALL} {tmp_path} {flags}", tmp_path, 1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=2)
    assert process.returncode == -signal.SIGHUP


@pytest.mark.slow
def test_torchrun_restarts_a_run_that_lost_a_process(tmp_path, whole_of_two):
    out = tmp_path / "run"
    process = start(f"{TORCHRUN} --max-restarts=3 train.py {SMALL} {out} {LONG}", out, 50)
    workers = subprocess.run(f"pgrep -P {process.pid}".split(), capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert_same_run(whole_of_two, out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, words",
    [
        ("raise ValueError('a bug')", "[rank1]: ValueError: a bug"),
        ("return loss(*args) * float('nan')", "(process 1); the step was not taken"),
    ],
)
def test_one_process_that_fails_ends_all_and_its_error_is_shown(tmp_path, fault, words):
    """Process 1 raises, or has a loss that is not finite, at its sixth loss, while process 0 waits."""
    fault = (
        "loss, losses = train.denoising_loss, []\n"
        "def fail(*args):\n"
        "    losses.append(1)\n"
        f"    if os.environ['RANK'] == '1' and len(losses) == 6: {fault}\n"
        "    return loss(*args)\n"
        "train.denoising_loss = fail"
    )
    command = f"{TORCHRUN} {faulty(tmp_path / 'fails.py', fault)} {SMALL} {tmp_path}/run {LONG}"
    done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and words in done.stderr and "[rank0]: Traceback" not in done.stderr
    assert "raise" in fault or "train.py: step 2: the loss is nan" in done.stderr


@pytest.mark.slow
def test_sigkill_at_twenty_moments(tmp_path):
    """Killed at random moments and during saves, every run ends bit-identical to an undisturbed one."""
    command = f"{sys.executable} train.py {SMALL} {{}} --steps 16 --save-every 1"
    finish(command.format(tmp_path / "whole"))
    rng, kills, inside, runs = np.random.default_rng(0), 0, 0, 0
    while kills < 20 or inside < 5:
        out = tmp_path / f"run{runs}"
        runs += 1
        for _ in range(5):
            log = out / "metrics.jsonl"
            process = start(command.format(out), out, 1 + (len(metrics(out)) if log.exists() else 0))
            began = time.time()  # files of an earlier kill are older

            def saving() -> bool:
                with contextlib.suppress(FileNotFoundError):  # it was renamed in between
                    return (out / "checkpoint.pt.part").stat().st_mtime > began
                return False

            if rng.random() < 0.5:
                time.sleep(rng.uniform(0, 0.3))
            else:
                while process.poll() is None and not saving():
                    pass
                time.sleep(rng.uniform(0, 0.02))
            process.kill()
            process.communicate()
            kills += process.returncode == -signal.SIGKILL
            inside += process.returncode == -signal.SIGKILL and saving()
        finish(command.format(out))
        assert_same_run(tmp_path / "whole", out)
