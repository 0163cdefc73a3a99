"""extras/report.py and card.py: every figure beside the one recomputed from pairs.csv, and text that stays text."""

import base64
import csv
import html.parser
import io
import json
import re
import runpy
import sys
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from evaluate_mmvp import EMBEDDINGS, mcnemar, save_scores, verdict
from extras import report
from harness.errors import UserError, one_sentence
from harness.mmvp import read_mmvp
from harness.recipes import TYPES

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "a | b `c` [d](javascript:e) *f*\n# g {h} $i",
    "\udc80&lt;",
]


def write_mmvp(folder: Path, pairs_per_type: int = 2, types: tuple[str, ...] = ("Color", "Camera Perspective")) -> Path:
    rng, rows = np.random.default_rng(0), [["Question ID", "Type", "Statement"]]
    for type_name in types:
        images = folder / "MLLM_VLM Images" / type_name
        images.mkdir(parents=True)
        for _ in range(2 * pairs_per_type):
            i = len(rows)
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(images / f"{i}.jpg")
            rows.append([i, type_name, " ".join(rng.choice(["red", "blue", "cat", "dog", "left", "right"], 3))])
    with open(folder / "Questions.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def write_run(out: Path, mmvp: Path | None, steps: int = 3, **args) -> Path:
    """What a run leaves that a report reads, with scores drawn at random if there is a benchmark."""
    settings = dict(recipe="openai-vit-l-14-224", clip="some/folder/vit", diffusion="some/sd", data=["a/b/photos"])
    settings |= dict(recap="random:76", join="mean", states=2, lr=0.1, seed=7, precision="fp32", random_weights=False)
    settings |= dict(steps=steps, batch_size=4, mmvp=mmvp and str(mmvp), versions=dict(torch="2.14.1")) | args
    (out / "clip").mkdir(parents=True)
    (out / "checkpoint").mkdir()
    (out / "args.json").write_text(json.dumps(settings))
    state = dict(step=steps, unreadable=0, images=0, args={})
    (out / "checkpoint" / "state.json").write_text(json.dumps(state))
    rng = np.random.default_rng(0)
    with open(out / "metrics.jsonl", "w") as file:
        for step in range(steps):
            file.write(json.dumps(dict(step=step, loss=rng.random(), grad_norm=rng.random(), lr=0.1)) + "\n")
    if mmvp:
        pairs = read_mmvp(str(mmvp))
        cosines = rng.random((2, 2, len(pairs), 2, 2), dtype=np.float32)
        cosines[:, :, 0] = 0.25  # ties
        save_scores(out / "mmvp", ["before", "after"], list(cosines), pairs)
    return out


def write_report(out: Path, monkeypatch, *more: str) -> None:
    """What the command does."""
    monkeypatch.setattr(sys, "argv", ["report.py", str(out), *more])
    report.main()


class Tree(html.parser.HTMLParser):
    """The elements of a page as a browser finds them."""

    def __init__(self):
        super().__init__()
        self.builder, self.open = xml.etree.ElementTree.TreeBuilder(), []

    def handle_starttag(self, tag, attributes):
        self.builder.start(tag, dict(attributes))
        self.open.append(tag)
        if tag in ("meta", "img"):
            self.handle_endtag(tag)

    def handle_startendtag(self, tag, attributes):  # in SVG
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.builder.end(tag)

    def handle_data(self, data):
        self.builder.data(data)


def read_page(out: Path) -> xml.etree.ElementTree.Element:
    """The page, which is whole and asks for nothing from elsewhere."""
    tree = Tree()
    tree.feed((out / "report.html").read_text(encoding="utf-8").strip())
    tree.handle_endtag("html")  # which HTML leaves out
    tree.close()
    assert not tree.open
    page = tree.builder.close()
    for element in page.iter():
        assert element.tag not in ("script", "link", "iframe", "object", "base", "a")
        assert not any(name.startswith("on") or name in ("href", "style", "srcset") for name in element.attrib)
        assert element.get("src", "data:image/jpeg;base64,").startswith("data:image/jpeg;base64,")
    style = page.find("style").text
    assert "url(" not in style and "@import" not in style and "color-scheme: light dark" in style
    return page


def words(element) -> str:
    return " ".join(" ".join(element.itertext()).split())


def change(points: float, low: float, high: float, won: int, lost: int, embedding: str = "cls") -> dict:
    return dict(embedding=embedding, points=points, low=low, high=high, won=won, lost=lost, p=mcnemar(won, lost))


@pytest.mark.parametrize(
    "before, pairs, said",
    [
        (change(0, 0, 0, 0, 0), 135, "No effect seen in cls: .*; with 135 pairs, only a change of about 4.4 points or"),
        (change(0.7, -4.4, 5.9, 7, 6), 135, "No effect seen in cls: .*5.9, p = 1.; with .* about 6.7 points"),
        (change(4.4, 0, 8.9, 6, 0), 135, "Inconclusive in cls: .*p = 0.031.; with 135 pairs, .* about 4.4 points"),
        (change(-8.1, -16.3, 0, 10, 21), 135, "Inconclusive in cls: -8.1 points .* about 9.6 points"),
        (change(6.7, 1.5, 11.9, 14, 5), 135, "Inconclusive in cls: .*p = 0.064"),
        (change(7.4, 1.5, 11.9, 15, 5), 135, r"A gain in cls: \+7.4 points .95% interval \+1.5 … \+11.9, p = 0.041..$"),
        (change(-7.4, -11.9, -1.5, 5, 15), 135, "A loss in cls: -7.4 points [^;]*$"),
        (change(25, 0, 75, 1, 0), 4, "Inconclusive in cls: .*; 4 pairs are too few to show any change.$"),
    ],
)
def test_a_change_in_words(before, pairs, said):
    assert re.match(said, verdict([before], pairs))


def test_the_verdict_weighs_both_embeddings():
    cls, local = change(-8.1, -16.3, 0, 10, 21), change(-8.9, -15.6, -2.2, 4, 16, "cls+local")
    assert re.fullmatch("A loss in cls.local: .*. Inconclusive in cls: .* would show.", verdict([cls, local], 135))
    both = verdict([local | dict(embedding="cls"), local], 135)
    assert both.startswith("A loss in cls and cls+local: -8.9 points") and both.count("-8.9 points") == 2


def test_the_change_that_would_show_is_the_smallest():
    """Of as many changed pairs, one fewer won would leave p at 0.05 or more, and this many do not."""
    for changed in (6, 13, 40):
        half = changed // 2
        said = verdict([change(0, -1, 1, half, changed - half)], 135)
        net = round(float(re.search("about (.*) points", said)[1]) * 1.35)
        won = (changed + net) // 2
        assert mcnemar(won, changed - won) < 0.05 <= mcnemar(won - 1, changed - won + 1)


def test_the_page_says_what_pairs_csv_says(tmp_path, monkeypatch, capsys):
    """Every figure beside the one recomputed from pairs.csv; each pair that changed, and no other, with its images."""
    mmvp = write_mmvp(tmp_path / "mmvp", 3, tuple(TYPES))
    out = write_run(tmp_path / "run", mmvp)
    write_report(out, monkeypatch)
    assert capsys.readouterr().out == f"written: {out}/report.html, {out}/clip/README.md\n"
    page = read_page(out)
    with open(out / "mmvp" / "pairs.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    articles = {words(article.find("h3/small")): article for article in page.iter("article")}
    right, count = np.zeros((2, 2, 9)), 0  # (embeddings, CLIPs, types)
    for both in zip(rows[:27], rows[27:], strict=True):
        ids, told = f"{both[0]['id1']}, {both[0]['id2']}", []
        for e, embedding in enumerate(EMBEDDINGS):
            margins = [[float(row[f"{embedding} s{s} i{s}"]) - float(row[f"{embedding} s{s} i{3 - s}"]) for row in both]
                       for s in (1, 2)]  # fmt: skip
            before, after = (margins[0][k] > 0 and margins[1][k] >= 0 for k in (0, 1))  # a tie: the second image
            right[e, :, TYPES.index(both[0]["type"])] += before, after
            if before != after:
                told += [f"{'won' if after else 'lost'} in {embedding}"]
                told += [f"{old:+.5f} → {new:+.5f}" for old, new in margins]
        if told:
            count += 1
            article = articles.pop(ids)
            assert words(article.find("h3")) == f"{both[0]['type']} {ids}"
            assert [words(p) for p in article.iter("p")] == [both[0]["statement1"], both[0]["statement2"]]
            assert [words(part) for part in article if part.tag in ("b", "small")] == told
            for image, name in zip(article.iter("img"), (both[0]["id1"], both[0]["id2"]), strict=True):
                shown = Image.open(io.BytesIO(base64.b64decode(image.get("src").partition(",")[2])))
                with Image.open(mmvp / "MLLM_VLM Images" / both[0]["type"] / f"{name}.jpg") as original:
                    assert np.abs(np.array(shown, dtype=int) - np.array(original)).mean() < 20  # JPEG of noise
    assert count > 5 and not articles and f"{count} of 27 pairs changed" in words(page)

    right *= 100 / 3
    changes = json.loads((out / "mmvp" / "scores.json").read_text())["clips"][1]["change"]
    assert words(page.find("h1")) == verdict(changes, 27)
    table = [[words(cell) for cell in row] for row in page.find("div/table")]
    by_type = np.concatenate([right, right.mean(2, keepdims=True)], 2)
    for t, name in enumerate([*TYPES, "Average"]):
        figures = [f"{b:.1f} {a:.1f} {a - b:+.1f}".split() for b, a in by_type[:, :, t]]
        assert table[1 + t] == [name, *figures[0], *figures[1]]
    assert table[-1][3::3] == ["{low:+.1f} … {high:+.1f}".format(**c) for c in changes]

    card = ModelCard.load(out / "clip" / "README.md")
    data = dict(library_name="open_clip", pipeline_tag="zero-shot-image-classification", tags=["clip", "diva"])
    assert card.data.to_dict() == data and "\n# folder/vit, after" in card.text
    assert (
        report.summary(report.read_run(out)) in card.text.replace("\\_", "_")
        and "seed 7, fp32; torch 2.14.1." in card.text
    )
    assert [
        [cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"(?m)^\| .*", card.text)
    ] == table


def test_what_was_not_scored_has_no_scores(tmp_path, monkeypatch):
    """Nor has a run with random weights, and a run that is on its way has no card."""
    mmvp = write_mmvp(tmp_path / "mmvp")
    for args, said in ((dict(), "It was not scored"), (dict(random_weights=True), "random at the start")):
        out = write_run(tmp_path / said, mmvp if args else None, **args)
        write_report(out, monkeypatch)
        page, card = read_page(out), (out / "clip" / "README.md").read_text()
        assert words(page.find("h1")) == "Not scored" and said in words(page) and said in card
        assert [words(h2) for h2 in page.iter("h2")] == ["Training"] and "Chance" not in words(page)
        assert "cls" not in words(page.find("h1")) + card
    lines = (out / "metrics.jsonl").read_text().splitlines(True)
    (out / "metrics.jsonl").write_text("".join(lines[:2]) + lines[2][:20])  # as a run leaves it on its way
    state = (out / "checkpoint" / "state.json").read_text()
    (out / "checkpoint" / "state.json").write_text(state.replace('"step": 3', '"step": 2'))
    (out / "clip" / "README.md").unlink()
    write_report(out, monkeypatch)
    assert ": 2 of 3 steps" in words(read_page(out)) and not (out / "clip" / "README.md").exists()


def test_the_curves_are_means_of_the_steps(tmp_path, monkeypatch):
    for steps, points in ((30_000, 300), (301, 300), (40, 40), (2, 2), (1, 1)):
        out = write_run(tmp_path / f"{steps}", None, steps)
        write_report(out, monkeypatch)
        assert (out / "report.html").stat().st_size < 60_000
        figure, rate = read_page(out).iter("figure")
        assert words(figure).startswith("Loss: mean squared error mean of the first tenth")
        assert words(rate).startswith("Learning rate") and words(figure).endswith(f"step {steps:,}")
        lines = [line.get("points").split() for line in figure.iter("polyline")]
        assert [len(line) - 1 for line in lines] == [points, min(20, steps)]
        xs, ys = np.array([point.split(",") for point in lines[0][:-1]], float).T
        high, low = (float(words(figure.findall("p")[k]).split()[0]) for k in (0, 1))
        losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
        if steps % points == 0:
            assert high + ys * (low - high) == pytest.approx(np.reshape(losses, (points, -1)).mean(1), abs=0.006)
            assert xs == pytest.approx((np.arange(points) + 0.5) / points, abs=1e-4)


def test_of_many_pairs_a_hundred_are_shown(tmp_path, monkeypatch):
    """As many won as lost; where there are few of one, more of the other."""
    out = write_run(tmp_path / "run", write_mmvp(tmp_path / "mmvp", 150))
    write_report(out, monkeypatch)
    page = read_page(out)
    outcomes = [words(article.find("b")).split()[0] for article in page.iter("article")]
    assert outcomes == ["won"] * 50 + ["lost"] * 50 and len(list(page.iter("img"))) == 200
    assert re.search(r"[12][0-9]{2} of 300 pairs changed; 100 are shown", words(page))
    run, few = report.read_run(out), 7
    lost = [pair for pair in run.changed if pair["changes"][0][1] == "lost"]
    run.changed = [pair for pair in run.changed if pair not in lost[few:]]
    outcomes = re.findall('<article>.*?<b class="(won|lost)">', report.changed_pairs(run, None))
    assert sorted(outcomes) == ["lost"] * few + ["won"] * min(100 - few, len(run.changed) - few)


def test_hostile_text_stays_text(tmp_path, monkeypatch):
    out = write_run(tmp_path / "run", write_mmvp(tmp_path / "mmvp", 3, ("Color",)))
    args = json.loads((out / "args.json").read_text())
    args |= dict(clip=HOSTILE[0], diffusion=HOSTILE[1], recipe=HOSTILE[2], data=HOSTILE, mmvp=HOSTILE[0], lr=HOSTILE[3])
    args |= dict(recap=HOSTILE[1], join=HOSTILE[2], versions={text: text for text in HOSTILE})
    (out / "args.json").write_text(json.dumps(args | {HOSTILE[1]: HOSTILE}))
    with open(out / "mmvp" / "pairs.csv", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    for i, row in enumerate(rows):
        names = dict(type=HOSTILE[i % 3], id1=HOSTILE[0], id2=HOSTILE[1], statement1=HOSTILE[2], statement2=HOSTILE[1])
        rows[i] = row | names
    with open(out / "mmvp" / "pairs.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, reader.fieldnames)
        writer.writeheader()
        writer.writerows(rows)
    scores = (out / "mmvp" / "scores.json").read_text()
    (out / "mmvp" / "scores.json").write_text(scores.replace('"Color"', json.dumps(HOSTILE[2])))
    write_report(out, monkeypatch)
    page = read_page(out)
    found = "".join(page.itertext())
    assert not list(page.iter("img")) and all(text in found for text in HOSTILE[1:3]) and "<script>" in found
    body = (out / "clip" / "README.md").read_text(encoding="utf-8").removeprefix("---\n").split("\n---\n", 1)[1]
    assert "<" not in body and "`" not in body.replace("\\`", "") and "\n# g" not in body
    assert not re.search(r"(?<!\\)\[d", body) and not re.search(r"(?<!\\)\*f", body)
    for row in [line for line in body.splitlines() if line.startswith("|")]:
        assert len(re.findall(r"(?<!\\)\|", row)) == 8


def test_a_benchmark_that_is_gone_or_another_is_said(tmp_path, monkeypatch):
    mmvp = write_mmvp(tmp_path / "mmvp")
    out = write_run(tmp_path / "run", mmvp)
    mmvp.rename(tmp_path / "moved")
    write_report(out, monkeypatch)
    before = read_page(out)
    assert f"Without pictures, which --mmvp PATH brings back: {mmvp}: no such folder" in words(before)
    assert not list(before.iter("img")) and list(before.iter("article"))
    write_report(out, monkeypatch, "--mmvp", str(tmp_path / "moved"))
    page = read_page(out)
    assert len(list(page.iter("img"))) == 2 * len(list(page.iter("article"))) and "Without" not in words(page)
    whole = (out / "report.html").read_bytes()
    other = write_mmvp(tmp_path / "other")
    questions = other / "Questions.csv"
    questions.write_text(re.sub("(Color|Perspective),", r"\1,no ", questions.read_text()))
    with pytest.raises(UserError, match="not the benchmark that was scored .pair [0-9]+, [0-9]+ differs"):
        write_report(out, monkeypatch, "--mmvp", str(other))
    for image in (tmp_path / "moved").rglob("*.jpg"):
        image.write_bytes(b"no image")
    with pytest.raises(UserError, match="jpg: not a readable image"):
        write_report(out, monkeypatch, "--mmvp", str(tmp_path / "moved"))
    assert (out / "report.html").read_bytes() == whole and not list(out.rglob("*.part"))


@pytest.mark.parametrize(
    "name, old, new, message",
    [
        ("", "", None, "run: no run in this folder .args.json is missing"),
        ("args.json", "", None, "run: no run in this folder .args.json is missing"),
        ("args.json", "{", "[", "args.json: not what a run writes"),
        ("args.json", '"clip"', '"klip"', "args.json: not what a run writes .KeyError: 'clip'"),
        ("metrics.jsonl", "", None, "run: this run has taken no step yet"),
        ("metrics.jsonl", '"step": 1, "loss"', '"step": 1, loss', "metrics.jsonl: not what a run .*: line 2 col"),
        ("metrics.jsonl", '"lr": 0.1', '"lr": NaN', "metrics.jsonl: not .*ValueError: a number is not finite"),
        ("metrics.jsonl", '"lr": 0.1', '"lr": [1]', "metrics.jsonl: not what a run writes .TypeError"),
        ("mmvp/scores.json", '"won": ', '"won": 1', "scores.json: .*its scores are not those of pairs.csv"),
        ("mmvp/scores.json", "{", "", "scores.json: not what a run writes .JSONDecodeError"),
        ("mmvp/pairs.csv", "", None, "pairs.csv: not what a run writes .FileNotFoundError"),
        ("mmvp/pairs.csv", "after,", '"after,', "pairs.csv: not what a run writes .Error"),
        ("mmvp/pairs.csv", "before,Color", "before,Colour", "pairs.csv: .*the pairs of the two CLIPs differ"),
        ("mmvp/pairs.csv", "cls s1 i1", "cls", "pairs.csv: not what a run writes .KeyError: 'cls s1 i1'"),
    ],
)
def test_no_report_of_what_no_run_wrote(tmp_path, monkeypatch, capsys, name, old, new, message):
    """One sentence, exit code 2, and the report that was there before is whole."""
    out = write_run(tmp_path / "run", write_mmvp(tmp_path / "mmvp"))
    path = out / name
    if new is None:
        path.rename(tmp_path / "gone")
    else:
        path.write_text(path.read_text().replace(old, new))
    if out.exists():
        (out / "report.html").write_text("the last one")
    with pytest.raises(SystemExit) as stop, one_sentence("report.py"):
        write_report(out, monkeypatch)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and re.search(message, said)
    assert not out.exists() or (out / "report.html").read_text() == "the last one"
    assert not list(tmp_path.rglob("*.part")) and not (out / "clip" / "README.md").exists()


def test_the_command(tmp_path, monkeypatch, capsys):
    """As it is typed, from another folder."""
    out = write_run(tmp_path / "run", write_mmvp(tmp_path / "mmvp"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["report.py", "run"])
    runpy.run_path(report.__file__, run_name="__main__")
    assert capsys.readouterr().out == "written: run/report.html, run/clip/README.md\n"
    assert read_page(out).find("title").text == "DIVA: run"
    monkeypatch.setattr(sys, "argv", ["report.py", "run", "--pictures"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(report.__file__, run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "report.py: unrecognized arguments: --pictures; --help lists the options\n"


ODD = np.array([b'"', b",", b"\n", b"\0", b"-", b"9" * 20, b"9" * 5000, b"{", b"[", "é".encode()], dtype=object)


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Bytes changed, cut out, repeated or cut off, one to eight times."""
    content = bytearray(content)
    for _ in range(rng.integers(1, 9)):
        at, length = int(rng.integers(len(content) + 1)), int(rng.integers(1, 20))
        match rng.integers(5):
            case 0:
                content[at : at + length] = rng.bytes(length)
            case 1:
                del content[at : at + length]
            case 2:
                content[at:at] = content[at : at + length]
            case 3:
                content[at:at] = rng.choice(ODD)
            case 4 if rng.random() < 0.2:
                del content[at:]
    return bytes(content)


@pytest.mark.parametrize("count", [200, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["args.json", "metrics.jsonl", "mmvp/scores.json", "mmvp/pairs.csv"])
def test_no_mutated_file_crashes_the_report(tmp_path, name, count):
    """Mutated inputs end in a page and a card, or in a sentence."""
    out = write_run(tmp_path / "run", write_mmvp(tmp_path / "mmvp"))
    good, rng, refused = (out / name).read_bytes(), np.random.default_rng(0), 0
    for _ in range(count):
        (out / name).write_bytes(mutated(good, rng))
        try:
            run = report.read_run(out)
            assert report.page(run) and report.card(run)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    (out / name).write_bytes(good)
    assert report.page(report.read_run(out)) and refused > count / 20
