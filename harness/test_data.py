"""Unusual images, folders and shards are read as users expect, and what is skipped is reported."""

import io
import os
import pwd
import re
import struct
import subprocess
import sys
import tarfile
import time
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, PngImagePlugin

import data
from harness.pictures import FORMATS, IMAGE_SUFFIXES, read_image, to_rgb
from harness.sources import expand_paths
from harness.test_input import refused
from test_smoke import ROOT, jpeg, metrics, picture, run, write_shard

# ---------------------------------------------------------------------------------------------------------------------
# Images


def encoded(image: Image.Image, format: str, **more) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **more)
    return buffer.getvalue()


RAMP = np.linspace(0, 255, 64, dtype=np.uint8)[None].repeat(48, 0)  # dark on the left, light on the right


def test_images_look_as_in_a_viewer():
    gray = Image.fromarray(RAMP)
    black_or_white = 255 * (RAMP > 127).astype(np.uint8)
    images = [gray.convert(mode) for mode in ("L", "RGB", "P", "LA", "RGBA")] + [gray.convert("RGB").convert("CMYK")]
    images += [Image.fromarray(black_or_white).convert("1")]
    for image in images:
        rgb, expected = to_rgb(image), black_or_white if image.mode == "1" else RAMP
        assert rgb.mode == "RGB" and np.abs(np.asarray(rgb).mean(-1) - expected).max() <= 1, image.mode
    with pytest.raises(ValueError, match="no defined white level"):
        to_rgb(Image.fromarray(RAMP.astype(np.float32)))

    transparent, opaque = gray.convert("RGBA"), np.eye(48, 64)
    transparent.putalpha(Image.fromarray((255 * opaque).astype(np.uint8)))  # opaque on the diagonal, white elsewhere
    assert np.array_equal(np.asarray(to_rgb(transparent))[..., 0], np.where(opaque, RAMP, 255))
    palette = Image.fromarray((RAMP > 127).astype(np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.info["transparency"] = 0  # the left half
    assert np.asarray(to_rgb(palette))[0, [0, 63]].tolist() == [[255, 255, 255], [0, 0, 255]]


@pytest.mark.parametrize("order", "<>")
def test_16_bit_gray_is_the_same_in_training_and_scoring(tmp_path, monkeypatch, order):
    """Here the training crop is the whole image. Both must be the 8-bit ramp; Pillow alone clips it to white."""
    monkeypatch.setattr(data, "random_crop_box", lambda *sides: (0, 0, 1, 1))
    square = RAMP[:, :48]
    image = Image.fromarray((square.astype(np.uint16) * 257).astype(f"{order}u2"))
    path = tmp_path / "0.tif"
    image.save(path)
    assert image.mode == {"<": "I;16", ">": "I;16B"}[order]
    trained = data.decode_crop(path.read_bytes(), 48, None)
    assert np.array_equal(trained.transpose(1, 2, 0), read_image(path))
    assert np.array_equal(trained[0], square)


def exif(kind: int, value: bytes, count: int = 1) -> bytes:
    """EXIF data with only the orientation, stored as a value of type `kind`."""
    return b"Exif\0\0II*\0" + struct.pack("<IHHHI4sI", 8, 1, 0x0112, kind, count, value, 0)


@pytest.mark.parametrize("size", [32, 16])  # the latter decodes JPEG at half its size
def test_images_are_rotated_as_in_a_viewer(monkeypatch, size):
    """Each orientation is compared with NumPy's, in formats with EXIF before or after the pixels."""
    boxes = []
    monkeypatch.setattr(data, "random_crop_box", lambda *sides: boxes.append(sides[:2]) or (0, 0, 1, 1))
    slope = RAMP // 2 + np.arange(48, dtype=np.uint8)[:, None] * 2  # its corners differ
    flips = {1: slope, 2: slope[:, ::-1], 3: slope[::-1, ::-1], 4: slope[::-1]}
    flips |= {5: slope.T, 6: np.rot90(slope, -1), 7: slope[::-1, ::-1].T, 8: np.rot90(slope)}
    for value, expected in flips.items():
        orientation, square = exif(3, bytes([value, 0, 0, 0])), Image.fromarray(expected).resize((size, size), 3)
        for format in ("JPEG", "PNG", "WEBP", "TIFF"):
            more = dict(exif=orientation) if format != "TIFF" else dict(tiffinfo={0x0112: value})
            image = encoded(Image.fromarray(slope).convert("RGB"), format, quality=95, **more)
            crop = data.decode_crop(image, size, None).mean(0)
            assert np.abs(crop - np.asarray(square)).max() < 8, (value, format)
            shrink = 2 if (size, format) == (16, "JPEG") else 1
            assert boxes[-1] == tuple(side // shrink for side in expected.shape[::-1]), (value, format)


def test_broken_metadata_loses_no_pixels():
    """Random bytes, an orientation of the wrong type or out of range, truncated old PNG metadata: all are ignored."""
    image, profile = Image.fromarray(RAMP).convert("RGB"), PngImagePlugin.PngInfo()
    profile.add_text("Raw profile type exif", "\nexif\n 8\n4578")
    broken = [b"\xff" * 30, exif(2, b"6\0\0\0", 2), exif(1, b"\6\0\0\0"), exif(3, b"\x63\0\0\0")]
    files = [encoded(image, format, exif=content) for format in ("JPEG", "PNG", "WEBP") for content in broken]
    files += [encoded(image, "PNG", pnginfo=profile), encoded(image, "JPEG2000")]
    for content in files:
        crop = data.decode_crop(content, 32, np.random.default_rng(0))
        assert (crop[:, :, 31] - crop[:, :, 0].astype(int)).min() > 200  # upright: light on the right
        with pytest.raises(OSError):  # Pillow has many messages for a truncated image
            data.decode_crop(content[: len(content) * 2 // 3], 32, np.random.default_rng(0))


def test_images_of_extreme_sizes(tmp_path):
    """One pixel, a line of pixels, and a header that claims 900 million of them."""
    for size in ((1, 1), (3000, 1), (1, 3000)):
        assert (data.decode_crop(encoded(Image.new("L", size, 77), "PNG"), 32, np.random.default_rng(0)) == 77).all()
    good = encoded(Image.new("L", (1, 1)), "PNG")
    header = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + good[24:29]
    (tmp_path / "0.png").write_bytes(good[:12] + header + zlib.crc32(header).to_bytes(4, "big") + good[33:])
    (tmp_path / "1.png").write_bytes(good)
    dataset = data.TrainingImages(data.open_images([f"{tmp_path}"]), 32, 2)
    (name,) = [name for position in (0, 1) for name in dataset[0, position]["unreadable"]]
    assert name.startswith(f"{tmp_path}/0.png (") and "decompression bomb" in name


@pytest.mark.parametrize("source", ["", "0.tar"])
def test_postscript_is_refused_and_not_executed(tmp_path, monkeypatch, source):
    """An EPS file named .jpg, in a folder and in a shard; a fake Ghostscript creates a file when it starts."""
    eps, good = encoded(picture(40), "EPS"), jpeg(picture(40))
    assert eps.startswith(b"%!PS-Adobe")
    started, program = tmp_path / "started", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {started}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # look for it again

    images = tmp_path / "images"
    images.mkdir()
    for name, content in {"0.jpg": eps, "1.jpg": good}.items():
        (images / name).write_bytes(content)
    write_shard(images / "0.tar", {"0.jpg": eps, "1.jpg": good})
    dataset = data.TrainingImages(data.open_images([f"{images}/{source}"]), 32, 2)
    names = [name for position in (0, 1) for name in dataset[0, position]["unreadable"]]
    assert names == [f"{dataset.files.name(0)} (unsupported image format)"]
    with refused("0.jpg: not a readable image .unsupported image format"):
        read_image(images / "0.jpg")
    assert not started.exists()
    with pytest.raises(OSError), Image.open(io.BytesIO(eps)) as image:
        image.load()
    assert started.exists()  # Pillow by itself does start it


def test_suffixes_of_images():
    assert {"", ".jpg", ".jpeg", ".png", ".webp", ".avif", ".tif", ".mpo", ".tga"} <= IMAGE_SUFFIXES
    assert not {".eps", ".pdf", ".rgb", ".txt", ".json"} & IMAGE_SUFFIXES and set(FORMATS) <= Image.OPEN.keys()


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_a_folder_is_searched_with_its_subfolders(tmp_path, capsys, monkeypatch):
    folder, elsewhere = tmp_path / ".photos", tmp_path / "elsewhere"  # hidden, but given by name
    for place in ("a/b", ".git/objects", "a/.ipynb_checkpoints", "folder.jpg"):
        (folder / place).mkdir(parents=True)
    images = ["a/b/y.webp", "a/no_suffix", "a/x.PNG", "z.jpg"]
    hidden = [".git/objects/4f5d", "a/.ipynb_checkpoints/x-checkpoint.png", "a/._x.png"]
    for name in [*images, *hidden, "a/notes.txt"]:
        (folder / name).write_bytes(name.encode())
    os.mkfifo(folder / "pipe.jpg")  # reading it would block
    elsewhere.mkdir()
    (elsewhere / "w.jfif").write_bytes(b"linked")
    links = {"linked": elsewhere, "linked again": elsewhere, "a/up": folder, "9.jpg": "nowhere", "loop.jpg": "loop.jpg"}
    for link, target in links.items():
        (folder / link).symlink_to(target)
    files = data.open_images([f"{folder}"])
    assert [files.read(i).decode() for i in range(len(files))] == [*images[:3], "linked", "z.jpg"]
    assert len(files.fingerprint()) == 12
    start, *kinds = re.split(r" \(|, |\)\n", capsys.readouterr().err)
    assert start == f"{folder}: skipped 7 entries"
    assert sorted(kinds) == ["", ".txt: 1", "dangling links: 2", "hidden: 3", "pipes or devices: 1"]
    scandir = os.scandir

    def without_permission(place: str):
        if place.endswith("/a"):
            raise PermissionError(13, "Permission denied", place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", without_permission)
    assert len(data.open_images([f"{folder}"])) == 2
    assert f"{folder}/a: folder skipped (Permission denied)\n" in capsys.readouterr().err


def test_a_fingerprint_depends_on_the_images_but_not_on_their_folder(tmp_path):
    def fingerprints(place: str, name: str, content: bytes, shard: str = "0.tar") -> list[str]:
        """Of a folder with one image, and of a shard with the same image."""
        folder = tmp_path / place
        folder.mkdir()
        (folder / name).write_bytes(content)
        write_shard(folder / shard, {name: content})
        return [data.open_images([source]).fingerprint() for source in (f"{folder}", f"{folder}/*.tar")]

    one = fingerprints("one", "a.jpg", b"12345")
    assert fingerprints("two", "a.jpg", b"54321") == one
    longer = fingerprints("longer", "a.jpg", b"1234")
    assert longer[0] != one[0] and longer[1] != one[1]
    assert fingerprints("renamed", "b.jpg", b"12345")[0] != one[0]
    other_shard = fingerprints("shard", "a.jpg", b"12345", "1.tar")
    assert other_shard[0] == one[0] and other_shard[1] != one[1]
    assert data.open_images(["synthetic"]) is None


# ---------------------------------------------------------------------------------------------------------------------
# Shards


def test_brace_lists_and_globs_are_expanded(tmp_path, monkeypatch):
    assert list(expand_paths("cc3m/{00008..00011}.tar")) == [f"cc3m/{i:05}.tar" for i in range(8, 12)]
    assert list(expand_paths("{a,b}/{0..1}.tar")) == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]
    for i in (0, 2):
        write_shard(tmp_path / f"{i}.tar", {f"{i}.jpg": b"12345"})
    assert len(data.open_images([f"{tmp_path}/{{0,2}}.tar"])) == 2
    with refused("/1.tar, .*/3.tar: no such file"):
        data.open_images([f"{tmp_path}/{{0..3}}.tar"])

    for place in ("br [x]/sub", "{a,b}/sub", "br x"):  # an existing folder is taken literally
        (tmp_path / place).mkdir(parents=True)
        write_shard(tmp_path / place / "0.tar", {})
    monkeypatch.chdir(tmp_path)
    for place in ("br [x]/sub", "{a,b}/sub"):
        assert list(expand_paths(place)) == [place]
        for pattern in ("*.tar", "[0-9].tar", "{0,0}.tar"):
            assert set(expand_paths(f"{place}/{pattern}")) == {f"{place}/0.tar"}
            assert set(expand_paths(f"{tmp_path}/{place}/{pattern}")) == {f"{tmp_path}/{place}/0.tar"}
        assert list(expand_paths(f"{place.split('/')[0]}/*/*.tar")) == [f"{place}/0.tar"]


def test_files_beside_the_shards_are_skipped_by_name(tmp_path, capsys):
    """As img2dataset writes them. A single file is opened whatever its name."""
    write_shard(tmp_path / "0.tar", {"0.jpg": b"12345"})
    for name in ("0_stats.json", "1_stats.json", "0.parquet"):
        (tmp_path / name).write_bytes(b"{}")
    assert len(data.open_images([f"{tmp_path}/*"])) == 1
    assert capsys.readouterr().err == "skipped 3 files that are not named .tar (.json: 2, .parquet: 1)\n"
    with refused("0.parquet: not a complete tar file"):
        data.open_images([f"{tmp_path}/0.parquet"])
    (tmp_path / "0.tar").rename(tmp_path / "shard")
    assert len(data.open_images([f"{tmp_path}/shard"])) == 1


def test_tars_joined_with_cat_are_read_to_the_end(tmp_path):
    contents = [f"{i}".encode() * (500 + i) for i in range(6)]
    with open(tmp_path / "0.tar", "wb") as joined:
        for i in (0, 2, 4):
            part = write_shard(tmp_path / "part", {"a.jpg": contents[i], "b.jpg": contents[i + 1]})
            joined.write(part.read_bytes())
    images = data.open_images([f"{tmp_path}/0.tar"])
    assert [images.read(i) for i in range(6)] == contents


def test_incomplete_shards_are_reported_together(tmp_path):
    """Truncated in an image, between two, in a header; a broken header; other bytes after the end; a size of −512."""
    good = write_shard(tmp_path / "good.tar", {f"{i}.jpg": b"12345" for i in range(3)}).read_bytes()
    negative = tarfile.TarInfo("1.jpg")
    negative.size = -512
    back = tarfile.TarInfo("0.jpg").tobuf() + negative.tobuf(tarfile.GNU_FORMAT)
    bad = {
        "cut": (good[:1800], "unexpected end of data"),
        "cut_between": (good[:2048], "the empty blocks at its end are missing"),
        "cut_in_a_header": (good[:2200], "no header at byte 2048"),
        "broken": (good[:1024] + b"x" * 100 + good[1124:], "no header at byte 1024"),
        "more": (good + b"page" * 200, f"no header at byte {len(good)}"),
        "back": (back + bytes(1024), "a negative size"),
        "text": (b"no tar " * 100, "invalid header"),
    }
    for name, (content, _) in bad.items():
        (tmp_path / f"{name}.tar").write_bytes(content)
    (tmp_path / "gz.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with refused("unpack it: gzip -dc") as refusal:
        data.open_images([f"{tmp_path}/*.tar"])
    said = str(refusal.value)
    for name, (_, reason) in bad.items():
        assert f"{tmp_path}/{name}.tar: not a complete tar file ({reason}); download it again" in said, said
    assert f"{tmp_path}/gz.tar: gzipped, so single images cannot be read; " in said and "good" not in said


def test_links_and_hidden_members_are_ignored(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo("link.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        for name in (".git/a.jpg", "./.ipynb_checkpoints/b.jpg", "._c.jpg", "./d.jpg", "../e.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    images = data.open_images([f"{tmp_path}/0.tar"])
    assert [images.read(i) for i in range(len(images))] == [b"./d.jpg", b"../e.jpg"]


@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_a_sparse_member_is_refused(tmp_path, format):
    """Its holes are not stored, so its bytes cannot be read in one piece."""
    with open(tmp_path / "0.bmp", "wb") as file:
        file.write(encoded(Image.new("L", (64, 64)), "BMP"))
        file.truncate(1 << 20)
    (tmp_path / "1.bmp").write_bytes(b"12345")
    for sparse in ([], ["-S"]):
        command = ["tar", f"--format={format}", *sparse, "-cf", "0.tar", "0.bmp", "1.bmp"]
        subprocess.run(command, cwd=tmp_path, check=True)
        if not sparse:
            assert data.open_images([f"{tmp_path}/0.tar"]).read(0) == (tmp_path / "0.bmp").read_bytes()
    with refused("0.tar: 0.bmp is sparse; create the tar without tar's -S"):
        data.open_images([f"{tmp_path}/0.tar"])


@pytest.mark.parametrize("sizes", [[700, 1500], [700, 701]])  # the latter have their headers at the same offsets
def test_a_shard_replaced_by_one_of_the_same_size_and_time_is_indexed_again(tmp_path, sizes):
    path = tmp_path / "0.tar"
    for order in (1, -1):
        contents = {f"{size}.jpg": b"x" * size for size in sizes[::order]}
        write_shard(path, contents)
        os.utime(path, (10**9, 10**9))
        images = data.open_images([f"{path}"])
        assert [images.read(i) for i in range(2)] == list(contents.values())


@pytest.mark.parametrize("cache", ["", "relative", "{}/cache"])
def test_a_user_without_a_home_reads_shards(tmp_path, monkeypatch, cache):
    """As with `docker run --user 54321`: the index is cached in XDG_CACHE_HOME if that is usable, else not at all."""
    write_shard(tmp_path / "0.tar", {"0.jpg": b"12345"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # no entry for this user
    monkeypatch.setenv("XDG_CACHE_HOME", cache.format(tmp_path))
    assert len(data.open_images(["0.tar"])) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", *(["cache"] if "{}" in cache else [])]


# ---------------------------------------------------------------------------------------------------------------------
# Unreadable images, and the reader threads


def test_unreadable_images_are_replaced_and_too_many_stop_the_run(tmp_path):
    good, folder = jpeg(picture(40)), tmp_path / "few"
    folder.mkdir()
    paths = [folder / f"{i:03}.jpg" for i in range(63)]
    for path, content in zip(paths, 60 * [good] + [b"", b"not an image", good[: len(good) // 2]]):
        path.write_bytes(content)
    flags = f"--data {folder} --steps 21 --batch-size 6 --micro-batch 6 --states 1 --image-size 16"
    out = run(tmp_path / "run", flags)
    dataset = data.TrainingImages(data.open_images([f"{folder}"]), 32, 6)
    order = [dataset.index(*divmod(i, 6)) for i in range(140)]
    skipped = 0
    for place in range(126):
        while order[place] >= 60:  # the last three are broken
            place, skipped = place + 1, skipped + 1
    assert metrics(out)[-1]["unreadable"] == skipped >= 6

    for path in paths[:9]:
        path.write_bytes(b"")
    with refused(r"step \d+: \d+ of \d+ images could not be read: .*\.jpg \(unsupported image format"):
        run(tmp_path / "run2", flags)
    for path in paths:
        path.unlink()
    with refused(r"31 images in a row could not be read: .*\.jpg \(.*No such file"):
        dataset[0, 0]


def test_an_exception_ends_the_process_at_once(tmp_path):
    """Even if one read hangs and others are at work, few files can be opened, and TMPDIR is too long for a socket."""
    code = """if True:
        import sys, time, torch, data
        class Images(data.TrainingImages):
            def __getitem__(self, key):
                time.sleep(1000 * (key[0] == 2))
                item = super().__getitem__(key)
                while key[0] > 2:
                    data.collate([dict(item, images=item["images"][:, :8, :8])])
                return item
        keys = data.micro_batch_keys(0, 9, 4, 4, 0, 1)
        for i, batch in enumerate(data.read_batches(Images(None, 512, 4), keys, 4, torch.device("cpu"))):
            print(tuple(batch["images"].shape), time.monotonic(), flush=True)
            assert i == 0, "a bug"
    """
    place = tmp_path / ("long" * 20)
    place.mkdir()
    command = ["bash", "-c", 'ulimit -n 32; exec "$@"', "-", sys.executable, "-c", code]
    environment = os.environ | dict(TMPDIR=f"{place}", PYTHONPATH=f"{ROOT}")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert [line[:17] for line in lines] == ["(4, 3, 512, 512) "] * 2 and time.monotonic() - float(lines[1][17:]) < 5
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "AssertionError: a bug"
