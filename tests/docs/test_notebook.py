"""examples/quickstart.ipynb: a notebook without outputs whose cells run in order, without Jupyter."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from PIL import Image

from difftuning_control.verbs.parse import parse
from support.documents import ROOT

NOTEBOOK = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
TEXT = "\n".join("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "markdown")


def test_it_is_a_notebook_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in NOTEBOOK["cells"]]
    assert len(set(ids)) == len(ids) == len([i for i in ids if re.fullmatch(r"[\w-]{1,64}", i)])
    assert all(cell["outputs"] == [] for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code")
    for number, cell in enumerate(CODE):
        compile(cell, f"cell {number}", "exec")


def test_what_its_text_names_is_there(tmp_path):
    for path in re.findall(r"`((?:docs|examples)/[\w./-]+)`", TEXT):
        assert (ROOT / path).is_file(), path
    (command,) = re.findall(r"`difftune (pilot [^`]+)`", TEXT)
    command = command.replace("examples/", f"{ROOT}/examples/")
    assert parse(command.split())[0] == "pilot"


@pytest.mark.wide
def test_its_cells_run_in_order(tmp_path):
    command = [sys.executable, "-c", "\n\n".join(CODE)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    output = tmp_path / "runs" / "quickstart"
    assert (output / "pytorch_lora_weights.safetensors").exists()
    run = json.loads((output / "run.json").read_text(encoding="utf-8"))
    assert (run["status"], run["steps"]) == ("complete", 60)
    for role, rises in (("target", False), ("bank", True)):
        before, after = (sum(run["losses"][role][side]["loss"]) for side in ("base", "tuned"))
        assert (after > 0.97 * before) is rises
    with Image.open(output / "comparison.png") as found:
        picture = found.convert("RGB")
    assert picture.size == (512, 256)
    above, below = picture.crop((0, 0, 512, 128)), picture.crop((0, 128, 512, 256))
    assert colour(below) < colour(above)  # what was tuned on is black and white


def colour(picture: Image.Image) -> float:
    """Mean saturation, 0 to 255."""
    values = list(picture.convert("HSV").getchannel("S").getdata())
    return sum(values) / len(values)
