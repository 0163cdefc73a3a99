"""Images as people have them: odd pictures are read, odd places are searched, and nothing is passed over in silence."""

from test_smoke import ROOT, jpeg, metrics, picture, run, write_shard  # first: it sets what the libraries read

import io
import os
import pwd
import struct
import subprocess
import sys
import tarfile
import time
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

import data
from harness.sources import IMAGE_SUFFIXES, named_paths
from harness.test_input import refused

# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def encoded(image: Image.Image, format: str, **more) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **more)
    return buffer.getvalue()


RAMP = np.linspace(0, 255, 64, dtype=np.uint8)[None].repeat(48, 0)  # dark on the left, light on the right


def test_images_come_out_as_a_person_sees_them():
    grey = Image.fromarray(RAMP)
    black_or_white = 255 * (RAMP > 127).astype(np.uint8)
    images = [grey.convert(mode) for mode in ("L", "RGB", "P", "LA", "RGBA")]
    images += [grey.convert("RGB").convert("CMYK"), Image.fromarray(RAMP.astype(np.uint16) * 257)]  # 16-bit grey
    images += [Image.fromarray(black_or_white).convert("1")]
    for image in images:
        rgb, expected = data.to_rgb(image), black_or_white if image.mode == "1" else RAMP
        assert rgb.mode == "RGB" and np.abs(np.asarray(rgb).mean(-1) - expected).max() <= 1, image.mode
    with pytest.raises(ValueError, match="does not say what is white"):
        data.to_rgb(Image.fromarray(RAMP.astype(np.float32)))

    transparent, opaque = grey.convert("RGBA"), np.eye(48, 64)
    transparent.putalpha(Image.fromarray((255 * opaque).astype(np.uint8)))  # opaque on the diagonal: the rest is white
    assert np.array_equal(np.asarray(data.to_rgb(transparent))[..., 0], np.where(opaque, RAMP, 255))
    palette = Image.fromarray((RAMP > 127).astype(np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.info["transparency"] = 0  # the left half
    assert np.asarray(data.to_rgb(palette))[0, [0, 63]].tolist() == [[255, 255, 255], [0, 0, 255]]


def exif(kind: int, value: bytes, count: int = 1) -> bytes:
    """EXIF data of one entry: the orientation, as a value of that kind."""
    return b"Exif\0\0II*\0" + struct.pack("<IHHHI4sI", 8, 1, 0x0112, kind, count, value, 0)


def test_pictures_are_turned_as_a_viewer_turns_them(monkeypatch):
    """Beside NumPy: each orientation, in formats that keep it before or behind the pixels."""
    boxes = []
    monkeypatch.setattr(data, "random_crop_box", lambda *sides: boxes.append(sides[:2]) or (0, 0, 1, 1))
    flips = {1: RAMP, 2: RAMP[:, ::-1], 3: RAMP[::-1, ::-1], 4: RAMP[::-1]}
    flips |= {5: RAMP.T, 6: np.rot90(RAMP, -1), 7: RAMP[::-1, ::-1].T, 8: np.rot90(RAMP)}
    for value, expected in flips.items():
        orientation, square = exif(3, bytes([value, 0, 0, 0])), Image.fromarray(expected).resize((32, 32), 3)
        for format in ("JPEG", "PNG", "WEBP", "TIFF"):
            more = dict(exif=orientation) if format != "TIFF" else dict(tiffinfo={0x0112: value})
            image = encoded(Image.fromarray(RAMP).convert("RGB"), format, quality=95, **more)
            crop = data.decode_crop(image, 32, None).float().mean(0).numpy()
            assert np.abs(crop - np.asarray(square)).max() < 8 and boxes[-1] == expected.shape[::-1], (value, format)


def test_broken_metadata_loses_no_pixels():
    """EXIF that is no EXIF, an orientation that is no number, PNG's old way to write it: as if it were not there."""
    image, profile = Image.fromarray(RAMP).convert("RGB"), PngImagePlugin.PngInfo()
    profile.add_text("Raw profile type exif", "\nexif\n 8\n4578")
    broken = [b"\xff" * 30, exif(2, b"6\0\0\0", 2), exif(1, b"\6\0\0\0"), exif(3, b"\x63\0\0\0")]
    files = [encoded(image, format, exif=content) for format in ("JPEG", "PNG", "WEBP") for content in broken]
    for content in [*files, encoded(image, "PNG", pnginfo=profile)]:
        crop = data.decode_crop(content, 32, np.random.default_rng(0))
        assert (crop[:, :, 31] - crop[:, :, 0].int()).min() > 200  # upright: light on the right
        with pytest.raises(OSError):  # Pillow's many sentences on a picture cut short
            data.decode_crop(content[: len(content) * 2 // 3], 32, np.random.default_rng(0))


def test_no_picture_is_too_odd_to_be_counted(tmp_path):
    """One pixel, a thread of pixels, and a header that promises 900 million of them."""
    for size in ((1, 1), (3000, 1), (1, 3000)):
        assert (data.decode_crop(encoded(Image.new("L", size, 77), "PNG"), 32, np.random.default_rng(0)) == 77).all()
    good = encoded(Image.new("L", (1, 1)), "PNG")
    header = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + good[24:29]
    (tmp_path / "0.png").write_bytes(good[:12] + header + zlib.crc32(header).to_bytes(4, "big") + good[33:])
    (tmp_path / "1.png").write_bytes(good)
    images = data.TrainingImages(data.open_images([f"{tmp_path}"]), 32, 2)
    (name,) = [name for position in (0, 1) for name in images[0, position]["unreadable"]]
    assert name.startswith(f"{tmp_path}/0.png (") and "decompression bomb" in name


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def test_a_folder_is_searched_with_all_below_it_and_says_what_it_leaves_out(tmp_path, capsys, monkeypatch):
    folder = tmp_path / "photos"
    (folder / "a" / "b").mkdir(parents=True)
    for name in ("z.jpg", "a/x.PNG", "a/b/y.webp", "a/notes.txt", "a/._x.png", "a/no_suffix"):
        (folder / name).write_bytes(name.encode())
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")  # to wait for what comes out of it would be to wait for ever
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "w.jfif").write_bytes(b"linked")
    for link, target in (("linked", elsewhere), ("linked again", elsewhere), ("a/up", folder)):
        (folder / link).symlink_to(target)
    files = data.open_images([f"{folder}"])
    found = [files.read(i) for i in range(len(files))]
    assert found == [b"a/b/y.webp", b"a/no_suffix", b"a/x.PNG", b"linked", b"", b"z.jpg"]
    assert capsys.readouterr().err == f"{folder}: 2 files are left out, by their names no images (1 .txt, 1 .png)\n"
    scandir = os.scandir

    def without_rights(place: str):
        if place.endswith("/a"):
            raise PermissionError(13, "Permission denied", place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", without_rights)
    assert len(data.open_images([f"{folder}"])) == 3
    assert capsys.readouterr().err == f"{folder}/a: this folder is passed over (Permission denied)\n"


def test_what_pillow_reads_is_an_image():
    """Each suffix that counts is one of Pillow's; those of its own that do not are no pictures, or need a program."""
    Image.init()
    readable = {suffix for suffix, format in Image.registered_extensions().items() if format in Image.OPEN}
    assert IMAGE_SUFFIXES - readable == {"", ".mpo"}  # the latter are JPEGs
    assert not IMAGE_SUFFIXES & {".eps", ".ps", ".mpg", ".mpeg", ".h5", ".hdf", ".wmf", ".emf", ".fits"}


def test_a_fingerprint_is_of_the_images_and_not_of_their_place(tmp_path):
    def fingerprints(place: str, name: str, content: bytes, shard: str = "0.tar") -> list[str]:
        """Of a folder with one image, and of a shard with the same."""
        folder = tmp_path / place
        folder.mkdir()
        (folder / name).write_bytes(content)
        write_shard(folder / shard, {name: content})
        return [data.fingerprint(data.open_images([source])) for source in (f"{folder}", f"{folder}/*.tar")]

    one = fingerprints("one", "a.jpg", b"12345")
    assert fingerprints("two", "a.jpg", b"54321") == one
    longer = fingerprints("longer", "a.jpg", b"1234")
    assert longer[0] != one[0] and longer[1] != one[1]
    assert fingerprints("renamed", "b.jpg", b"12345")[0] != one[0]
    other_shard = fingerprints("shard", "a.jpg", b"12345", "1.tar")
    assert other_shard[0] == one[0] and other_shard[1] != one[1]
    assert data.fingerprint(data.open_images(["synthetic"])) == "synthetic"


# ---------------------------------------------------------------------------------------------------------------------
# Shards


def test_lists_in_braces_are_taken(tmp_path):
    assert list(named_paths("cc3m/{00008..00011}.tar")) == [f"cc3m/{i:05}.tar" for i in range(8, 12)]
    assert list(named_paths("{a,b}/{0..1}.tar")) == ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]
    (tmp_path / "{a,b}").mkdir()
    assert list(named_paths(f"{tmp_path}/{{a,b}}")) == [f"{tmp_path}/{{a,b}}"]  # as it is there
    for i in (0, 2):
        write_shard(tmp_path / f"{i}.tar", {f"{i}.jpg": b"12345"})
    assert len(data.open_images([f"{tmp_path}/{{0,2}}.tar"])) == 2
    with refused("/1.tar, .*/3.tar: no such file"):
        data.open_images([f"{tmp_path}/{{0..3}}.tar"])


def test_tars_joined_with_cat_are_read_to_the_end(tmp_path):
    contents = [f"{i}".encode() * (500 + i) for i in range(6)]
    with open(tmp_path / "0.tar", "wb") as joined:
        for i in (0, 2, 4):
            part = write_shard(tmp_path / "part", {"a.jpg": contents[i], "b.jpg": contents[i + 1]})
            joined.write(part.read_bytes())
    images = data.open_images([f"{tmp_path}/0.tar"])
    assert [images.read(i) for i in range(6)] == contents


def test_shards_that_are_not_whole_are_all_named_at_once(tmp_path):
    """Cut in an image, between two, in a header; a broken header; something else behind the end; a size of −512."""
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
        assert f"{tmp_path}/{name}.tar: not a whole tar file ({reason}); fetch it again" in said, said
    assert f"{tmp_path}/gz.tar: gzipped, so no image can be read alone; " in said and "good" not in said


def test_members_that_are_no_files_are_ignored(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for kind in (tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo("link.jpg")
            member.type, member.linkname, member.size = kind, "/etc/passwd", 3 * (kind == tarfile.REGTYPE)
            tar.addfile(member, io.BytesIO(b"abc"))
    images = data.open_images([f"{tmp_path}/0.tar"])
    assert len(images) == 1 and images.read(0) == b"abc"


@pytest.mark.parametrize("cache", ["", "relative", "{}/cache"])
def test_a_user_without_a_home_reads_shards(tmp_path, monkeypatch, cache):
    """As `docker run --user 54321`: the index is kept where XDG_CACHE_HOME says, or nowhere."""
    write_shard(tmp_path / "0.tar", {"0.jpg": b"12345"})
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # this user's id has no entry
    monkeypatch.setenv("XDG_CACHE_HOME", cache.format(tmp_path))
    assert len(data.open_images(["0.tar"])) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", *(["cache"] if "{}" in cache else [])]


# ---------------------------------------------------------------------------------------------------------------------
# Images that cannot be read, and the threads that read


def test_unreadable_images_are_replaced_and_too_many_stop_the_run(tmp_path):
    good, folder = jpeg(picture(40)), tmp_path / "few"
    folder.mkdir()
    paths = [folder / f"{i:03}.jpg" for i in range(63)]
    for path, content in zip(paths, 60 * [good] + [b"", b"not an image", good[: len(good) // 2]]):
        path.write_bytes(content)
    flags = f"--data {folder} --steps 21 --batch-size 6 --micro-batch 6 --states 1 --image-size 16"
    out = run(tmp_path / "run", flags)
    images = data.TrainingImages(data.open_images([f"{folder}"]), 32, 6)
    order = [images.index(*divmod(i, 6)) for i in range(140)]
    passed_over = 0
    for place in range(126):
        while order[place] >= 60:  # the broken ones are the last three
            place, passed_over = place + 1, passed_over + 1
    assert metrics(out)[-1]["unreadable"] == passed_over >= 6

    for path in paths[:9]:
        path.write_bytes(b"")
    with refused(r"step \d+: \d+ of \d+ images could not be read: .*\.jpg \(not an image"):
        run(tmp_path / "run2", flags)
    for path in paths:
        path.unlink()
    with refused(r"31 images in a row could not be read: .*\.jpg \(.*No such file"):
        images[0, 0]


def test_an_exception_ends_the_process_at_once(tmp_path):
    """Though a read hangs; with few files to be opened, and in a place whose name is too long for a socket."""
    code = """if True:
        import sys, time, torch, data
        class Images(data.TrainingImages):
            def __getitem__(self, key):
                time.sleep(1000 * (key[0] == 2))
                return super().__getitem__(key)
        images = Images(None, 512, 4)
        for i, batch in enumerate(data.read_batches(images, data.batch_keys(0, 9, 4, 4, 0, 1), 2, torch.device("cpu"))):
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
