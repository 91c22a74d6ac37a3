"""A folder to take to a machine with a GPU and without a network: the checkout, wheels, diffusers' training scripts.

python tests/gpu/make_pack.py --to build/gpu-pack      # then, over there: sh run.sh
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TAKEN = (
    "difftuning_control",
    "pipelines",
    "examples",
    "tests",
    "docs",
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
    "NOTICE",
    "MANIFEST.in",
    "Makefile",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    ".pre-commit-config.yaml",
)
PEERS = (
    "text_to_image/train_text_to_image_lora.py",
    "text_to_image/train_text_to_image_lora_sdxl.py",
    "controlnet/train_controlnet.py",
    "controlnet/train_controlnet_sdxl.py",
)
NEEDED = ("datasets", "torchvision", "ftfy", "Jinja2")  # by the scripts
SOURCE = "https://raw.githubusercontent.com/huggingface/diffusers/v{version}/examples/{path}"
RUN = """\
#!/bin/sh
# Measures what there is to measure on this machine's GPU; a second call goes on where the first one ended.
set -e
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python3}
if [ -d wheels ]; then
    test -x .venv/bin/python || "$PYTHON" -m venv .venv
    PYTHON=.venv/bin/python
    $PYTHON -m pip install -q --no-index --find-links wheels 'difftuning-control[test]' NEEDED
fi
export HF_HUB_OFFLINE=1 PYTHONPATH=.
exec $PYTHON tests/gpu/measure.py --peers peers --output results "$@"
"""


def make(to: Path, peers: Path | None = None, wheels: bool = True) -> None:
    """Fill the folder anew.

    Args:
        peers: folder that has the scripts; they are fetched, in the version of the installed diffusers, when None.
        wheels: fetch the wheels of all that is needed, for this machine's system and Python.
    """
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    for name in TAKEN:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        else:
            shutil.copy2(ROOT / name, to / name)
    (to / "peers").mkdir()
    for path in PEERS:
        target = to / "peers" / Path(path).name
        if peers is not None:
            shutil.copy2(peers / target.name, target)
        else:
            with urllib.request.urlopen(SOURCE.format(version=version("diffusers"), path=path)) as found:
                target.write_bytes(found.read())
    if wheels:
        pip = [sys.executable, "-m", "pip"]
        subprocess.run([*pip, "wheel", "-q", "-w", str(to / "wheels"), f"{ROOT}[test]", *NEEDED], check=True)
    script = to / "run.sh"
    script.write_text(RUN.replace("NEEDED", " ".join(NEEDED)), encoding="utf-8")
    script.chmod(0o755)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, default=ROOT / "build" / "gpu-pack")
    parser.add_argument("--peers", type=Path, help="folder of diffusers' training scripts; fetched when not given")
    parser.add_argument("--no-wheels", action="store_true", help="for a machine that has all packages")
    asked = parser.parse_args(given)
    make(asked.to.resolve(), asked.peers, not asked.no_wheels)
    print(f"done: {asked.to}; take it to the machine with the GPU, and run run.sh there")


if __name__ == "__main__":
    main()
