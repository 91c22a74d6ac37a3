"""The README from its first command to its last: what it says to type is run, on the embedded model and in few steps.

A Hub id becomes the embedded model, and flags at the end of each command make it short. Nothing else is changed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from difftuning_control import embedded_model
from difftuning_control.cli import main
from difftuning_control.data.sources import load_images
from support.documents import FENCE, ROOT, difftune_commands

README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB = "stable-diffusion-v1-5/stable-diffusion-v1-5"
TRAINING = {
    "model.id": "embedded",
    "data.resolution": "64",
    "data.limit": "16",
    "bank.size": "12",
    "bank.steps": "2",
    "training.max_steps": "2",
    "training.batch_size": "5",
    "training.gradient_accumulation_steps": "1",
    "training.gradient_checkpointing": "false",
    "training.mixed_precision": "no",
    "training.validation_size": "2",
    "training.sample_every": "0",
}
CONTROL = {"every": "2", "size": "2", "steps": "2"}
FEW = {"data.limit": "40", "data.validation_path": "null", "data.holdout": "0.5"}  # the pilot encodes all held-out ones
PILOT = {"sides": '["plain", "difftuning_tau1"]', "learning_rates": "[1e-3]", "seeds": "[0, 1]"}
DRAWN = {"pictures": "5", "steps": "2"}
SHORT: dict[str, dict[str, str]] = {
    "train": TRAINING,
    "pilot": TRAINING | FEW | {f"pilot.{key}": value for key, value in (PILOT | DRAWN).items()},
    "analyze": {f"analysis.{key}": value for key, value in (DRAWN | {"rows": "4", "draws": "1"}).items()},
    "evaluate": DRAWN | {"seeds": "[0, 1]"},
    "sample": {"steps": "2"},
}


def shortened(words: list[str]) -> list[str]:
    """A command of the README that takes seconds."""
    flags = dict(SHORT.get(words[0], {}))
    if any("controlnet" in word for word in words) and words[0] == "train":
        flags |= {f"control.fidelity.{key}": value for key, value in CONTROL.items()}
        flags |= {"data.holdout": "0.25", "training.lr_warmup_steps": "0"}
    if not any("emoji" in word or "pilot" in word for word in words) and words[0] == "train":
        flags |= {"data.holdout": "0.25"}
    return [*("embedded" if word == HUB else word for word in words), *(f"--{k}={v}" for k, v in flags.items())]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """What a reader has: the checkout's examples, a folder of pictures with captions in text files, and a photo."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "my_pictures").mkdir()
    for number, example in enumerate(load_images("embedded/flat").examples[:16]):
        example.load().convert("RGB").save(tmp_path / "my_pictures" / f"{number}.png")
        (tmp_path / "my_pictures" / f"{number}.txt").write_text(example.caption)
    shutil.copy(tmp_path / "my_pictures" / "0.png", tmp_path / "photo.png")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def provide(words: list[str]) -> None:
    """Give the runs that a page takes for granted: copies of a LoRA run."""
    flag = next((flag for flag in ("--runs", "--run") if flag in words), None)
    bare = words[1] if words[0] in ("export", "sample") else ""
    named = words[words.index(flag) + 1] if flag is not None else bare
    for place in re.findall(r"runs/\w+", named):
        if not Path(place).exists():
            if not Path("given").exists():
                recipe = ["--config", "examples/emoji_lora.yaml", "--output", "given"]
                main(shortened(["train", *recipe]))
            shutil.copytree("given", place)


def follow(page: str, scope: dict) -> list[str]:
    """Run a page's commands and its Python in their order; returns the verbs."""
    done = []
    for _, language, body in FENCE.findall(page):
        if language == "python":
            exec(compile(body.replace(f'"{HUB}"', repr(str(embedded_model()))), "the page", "exec"), scope)
        for words in difftune_commands(f"```bash\n{body}```") if language == "bash" else ():
            if words[0] in ("completion", "ui"):  # need packages of their own, and are tested with them
                continue
            provide(words)
            main(shortened(words))
            done.append(words[0])
    return done


@pytest.mark.wide
def test_the_readme_from_top_to_bottom(desk):
    scope: dict = {"photo": Image.open("photo.png").convert("RGB")}
    done = follow(README, scope)
    assert {"train", "resume", "sample", "export", "pilot", "analyze", "evaluate"} <= set(done)
    for run in ("mine", "power", "my_controlnet", "pilot"):
        assert any(Path("runs", run).iterdir()), run
    assert json.loads(Path("runs/mine/run.json").read_text())["status"] == "complete"
    assert Path("runs/my_controlnet/controlnet/control_spec.json").exists()
    assert scope["pipe"].get_active_adapters()
    assert scope["image"].size == (64, 64)
    assert os.listdir("exports/power")


@pytest.mark.wide
@pytest.mark.parametrize(
    ("page", "verbs"),
    [
        ("getting-started.md", ["train", "sample", "recipes", "recipes"]),
        ("control.md", ["train", "train", "sample"]),
        ("export.md", ["export"] * 3),
    ],
)
def test_a_page_from_top_to_bottom(page, verbs, desk):
    scope: dict = {"photo": Image.open("photo.png").convert("RGB")}
    assert follow((ROOT / "docs" / page).read_text(encoding="utf-8"), scope) == verbs
    if page == "control.md":
        assert scope["image"].size == (64, 64)
