"""The vision towers of open_clip: which ones the recap can read, and that training and saving keep each kind whole."""

import time
import json

import open_clip
import pytest
import torch
from open_clip.model import _build_vision_tower
from test_smoke import NoInit

import model
from harness.errors import UserError
from harness.pretrained import quiet

REFUSED = """coca_ViT-B-32 coca_ViT-L-14
"""

def shapes_of(name: str) -> torch.nn.Module:
    """The tower of an architecture on the meta device, with at most two blocks: its tokens keep their shapes."""
    config = open_clip.get_model_config(name)
    vision = config["vision_cfg"]
    if isinstance(vision.get("layers"), int):
        vision = vision | dict(layers=2)
    with NoInit(), quiet(), torch.device("meta"):
        visual = _build_vision_tower(config["embed_dim"], vision).eval()
    if isinstance(getattr(visual, "trunk", None), torch.nn.Module) and hasattr(visual.trunk, "blocks"):
        visual.trunk.blocks = visual.trunk.blocks[:2]
    size = visual.image_size
    visual.preprocess_cfg = dict(size=size if isinstance(size, tuple) else (size, size))
    return visual

def test_sweep():
    ok, bad, seen = 0, [], {}
    T = {}
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        key = json.dumps([config["embed_dim"], config["vision_cfg"]], sort_keys=True)
        if key not in seen:
            t = time.time()
            try:
                v = shapes_of(name)
                T[name] = [time.time() - t]
                t = time.time()
                seen[key] = model.count_patches(v, name)
            except UserError:
                seen[key] = 0
            T[name].append(time.time() - t)
        if seen[key]: ok += 1
        else: bad.append(name)
    print(ok, bad, len(seen))
    print(sum(a for a,b in T.values()), sum(b for a,b in T.values()))
    print(sorted(((b,a,n) for n,(a,b) in T.items()))[-10:])
    print(sorted(((a,b,n) for n,(a,b) in T.items()))[-10:])
