"""A run in words, and the model card of its CLIP, which report.py writes."""

import html
import re
from string import Template

CARD = Template("""---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags:
- clip
- diva
---

# $clip, after diffusion feedback

The vision tower of this CLIP was trained further, on images without captions, by DIVA
([Diffusion Feedback Helps CLIP See Better](https://arxiv.org/abs/2407.20171)): its visual features are the condition
of a frozen diffusion model, and the gradient of that model's loss is the feedback. The text tower is as it was.

    folder = huggingface_hub.snapshot_download("OWNER/NAME")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")

$summary Recap $recap, text joins by $join, N = $states, learning rate $lr, seed $seed, $precision; $versions.

$verdict

$scores

The weights keep the licence of the CLIP that they come from; this card claims none. The diffusion model and the images
have licences of their own.
""")


def summary(run) -> str:
    """What learnt from what, on which images, for how long, and what it was scored on. Of paths the last two parts."""
    args, more = run.args, " and more" if len(run.args["data"]) > 3 else ""
    names = [args["clip"], args["diffusion"], args["mmvp"], *args["data"][:3]]
    clip, diffusion, mmvp, *data = ("/".join(name.split("/")[-2:]) for name in names)
    scored = f"Scored on {run.pairs:,} pairs of {mmvp}." if run.pairs else "It was not scored."
    if args["random_weights"]:
        scored = "Its weights were random at the start, so there is nothing to score."
    words = f"{clip} learnt from {diffusion}, on {', '.join(data)}{more}: {len(run.curves['loss']):,} of "
    return words + f"{args['steps']:,} steps, {args['batch_size']:,} images each, recipe {args['recipe']}. {scored}"


def markdown(value: object) -> str:
    """One line of Markdown that shows `value` and does nothing else: whatever comes from a file goes through here."""
    return html.escape(re.sub(r"[\\`*_\[\]|#~$!]", r"\\\g<0>", " ".join(str(value).split())), quote=False)


def card(run) -> str:
    values = run.args | dict(clip="/".join(run.args["clip"].split("/")[-2:]), summary=summary(run), verdict=run.verdict)
    values["versions"] = ", ".join(f"{name} {version}" for name, version in run.args["versions"].items())
    lines = ["| " + " | ".join(map(markdown, row)) + " |" for row in run.rows]
    if lines:
        lines.insert(1, "|---" * len(run.rows[0]) + "|")
    return CARD.substitute({key: markdown(value) for key, value in values.items()}, scores="\n".join(lines))
