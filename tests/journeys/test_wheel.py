"""What users get: the wheel, by the list of its files, and installed alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from difftuning_control import __version__
from support.marks import needs
from support.pictures import write_pictures

ROOT = Path(__file__).resolve().parents[2]
BUILT = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE")
FOLDERS = ("difftuning_control", "pipelines", "examples")
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
pytestmark = needs("setuptools", "77")


def build(work: Path, *left_out: str) -> Path:
    """A wheel of a copy of the checkout, since a build writes beside what it builds."""
    copy, ignored = work / "checkout", shutil.ignore_patterns("__pycache__", "*.pyc", *left_out)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=ignored)
    for name in BUILT:
        shutil.copy(ROOT / name, copy / name)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(work)], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return next(work.glob("*.whl"))


def test_the_wheel_has_the_code_and_what_users_copy(tmp_path):
    with zipfile.ZipFile(build(tmp_path, "*.png", "*.safetensors")) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(next(name for name in names if name.endswith("METADATA"))).decode()
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "difftuning_control").rglob("*.py")}
    assert sources <= names
    for pattern in ("pipelines/*.py", "examples/*.yaml", "examples/*.py", "examples/hooks/*", "examples/launch/*"):
        files = {path.relative_to(ROOT).as_posix() for path in ROOT.glob(pattern) if path.is_file()}
        assert files
        assert {f"difftuning_control/shipped/{file}" for file in files} <= names
    package = ROOT / "difftuning_control"
    beside = [p for p in package.rglob("*") if p.suffix in (".json", ".jsonl", ".txt", ".j2") or p.name == "py.typed"]
    assert len(beside) > 20
    assert {path.relative_to(ROOT).as_posix() for path in beside} <= names
    assert not [name for name in names if name.startswith(("tests/", "examples/", "pipelines/"))]
    assert f"\nVersion: {__version__}\n" in metadata
    assert "Requires-Python: >=3.10" in metadata
    assert "License-Expression: Apache-2.0" in metadata


PIPELINE = """
import difftuning_control as d
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(
    d.embedded_model(), custom_pipeline=d.pipeline_path("difftuning_sd"), trust_remote_code=True
)
pipe.load_lora_weights("run", weight_name="pytorch_lora_weights.safetensors")
pipe.set_extras(domain_guidance=True)
drawn = pipe("red apple", num_inference_steps=2, guidance_scale=2.0)
print(d.__file__, type(pipe).__name__, drawn.images[0].size)
"""


@pytest.mark.slow
def test_the_wheel_alone_trains_draws_by_its_pipeline_file_and_lists_recipes(tmp_path):
    """In an environment of its own, which finds the libraries of this one, with no checkout near."""
    home, work = tmp_path / "venv", tmp_path / "work"
    venv.create(home, with_pip=False)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    script = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(own)]
    subprocess.run([*script, str(build(tmp_path))], check=True)
    (own / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    write_pictures(work / "pictures")
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run(*words: str) -> str:
        done = subprocess.run([python, *words], cwd=work, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    difftune = ("-m", "difftuning_control.cli")
    small = ["--bank.size", "8", "--bank.steps", "2", "--training.max_steps", "20", "--output", "run"]
    run(*difftune, "train", "--data.path", "pictures", *small)
    assert (work / "run" / "pytorch_lora_weights.safetensors").exists()
    drawn = run("-c", PIPELINE)
    assert str(own) in drawn
    assert "DiffTuningPipeline (64, 64)" in drawn
    assert "sd15_lora" in run(*difftune, "recipes")
    printed = run(*difftune, "recipes", "sd15_lora")
    assert printed == (ROOT / "examples" / "sd15_lora.yaml").read_text(encoding="utf-8")
