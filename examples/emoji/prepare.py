"""Fetch the emoji sets, rasterise them, and write what the embedded model is trained and tuned on.

    python examples/emoji/prepare.py --work build/emoji [--assets difftuning_control/assets]

Writes into the work folder
    base.npz, base.json      pictures (N, 64, 64, 3) uint8 of the four base styles, and one record a picture
    vae.npz                  every further picture that only the autoencoder sees
and into the assets folder (with --assets) the two few-shot styles, `icons` and `flat`, each as `tune/` (64 pictures)
and `eval/` (the others), PNG files with a `metadata.jsonl` whose caption is the name alone.

Needs `npm` (the sets are npm packages) and `pip install resvg-py pillow numpy`.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

SIZE = 64
SEED = 20241
BASE_STYLES = {"noto": "noto", "twemoji": "twemoji", "emojione": "emojione", "fxemoji": "fxemoji"}
TARGET_STYLES = {"fluent-emoji-high-contrast": "icons", "fluent-emoji-flat": "flat"}
AUTOENCODER_ONLY = "mdi"  # black glyphs: the autoencoder must be able to draw lines, the denoiser never sees them
CATEGORIES = ("Animals & Nature", "Food & Drink", "Objects", "Activities")
TONE = re.compile(r"skin-tone|-(light|medium|dark)(-|$)")
TUNE_SIZE = 64
HELD_OUT = 32


def fetch(package: str, folder: Path) -> dict:
    """The icon set of one `@iconify-json` package; downloaded once."""
    path = folder / package / "icons.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        out = subprocess.run(
            ["npm", "pack", "--silent", f"@iconify-json/{package}"],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        )
        with tarfile.open(folder / out.stdout.strip().splitlines()[-1]) as tar:
            for member in tar.getmembers():
                if member.isfile() and "/" in member.name:
                    target = folder / package / Path(member.name).name
                    target.parent.mkdir(exist_ok=True)
                    target.write_bytes(tar.extractfile(member).read())
    icons = json.loads(path.read_text())
    metadata = path.parent / "metadata.json"
    icons["metadata"] = json.loads(metadata.read_text()) if metadata.exists() else {}
    return icons


def rasterise(icons: dict, name: str) -> np.ndarray | None:
    """The icon on a white ground, (64, 64, 3) uint8; None where nearly nothing is drawn."""
    icon = icons["icons"][name]
    width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
    box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" '
        f'width="{width}" height="{height}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=4 * SIZE, height=4 * SIZE)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture)
    pixels = np.asarray(ground.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX))
    return pixels if (pixels < 200).any(-1).mean() > 0.02 else None


def concept_names(noto: dict) -> dict[str, str]:
    """Name → category of the concepts that the base model learns: noto's names are everybody's reference."""
    found = {}
    for category, names in noto["metadata"]["categories"].items():
        for name in names:
            heart = category == "Smileys & Emotion" and name.endswith("-heart")
            if (category in CATEGORIES or heart) and name in noto["icons"] and not TONE.search(name):
                found[name] = category
    return found


def match(icons: dict, style: str, names: dict[str, str]) -> dict[str, str]:
    """Reference name → this set's own key; fxemoji runs its words together."""
    if style == "fxemoji":
        keys = {key.replace("-", ""): key for key in icons["icons"]}
        return {name: keys[name.replace("-", "")] for name in names if name.replace("-", "") in keys}
    return {name: name for name in names if name in icons["icons"]}


def words(name: str) -> str:
    return name.replace("-", " ")


def build_base(sets: dict[str, dict], work: Path) -> tuple[dict[str, str], set[str], list[np.ndarray]]:
    names = concept_names(sets["noto"])
    matched = {style: match(sets[pkg], style, names) for pkg, style in BASE_STYLES.items()}
    names = {n: c for n, c in names.items() if sum(n in m for m in matched.values()) >= 2}
    targets = [set(match(sets[pkg], style, names)) for pkg, style in TARGET_STYLES.items()]
    common = sorted(set(names).intersection(*targets))
    held_out = set(random.Random(SEED).sample(common, HELD_OUT))
    images, records, others = [], [], []
    for package, style in BASE_STYLES.items():
        used = {key: name for name, key in matched[style].items() if name in names}
        for key in sorted(sets[package]["icons"]):
            if TONE.search(key) or (picture := rasterise(sets[package], key)) is None:
                continue
            if key not in used:
                others.append(picture)
                continue
            name = used[key]
            images.append(picture)
            records.append({"style": style, "name": words(name), "category": names[name], "held_out": name in held_out})
    np.savez_compressed(work / "base.npz", images=np.stack(images))
    (work / "base.json").write_text(json.dumps(records, indent=0))
    print(f"base: {len(images)} pictures of {len(names)} names, {len(held_out)} names held out")
    return names, held_out, others


def write_target(icons: dict, style: str, names: dict[str, str], held_out: set[str], assets: Path) -> None:
    """`tune/` and `eval/` of one few-shot style; names that the base never saw go to `eval/`."""
    pictures = {n: p for n in match(icons, style, names) if (p := rasterise(icons, n)) is not None}
    by_category: dict[str, list[str]] = {}
    for name in sorted(set(pictures) - held_out):
        by_category.setdefault(names[name], []).append(name)
    rng = random.Random(SEED + 1)
    queues = [rng.sample(v, len(v)) for _, v in sorted(by_category.items())]
    tune: list[str] = []
    while len(tune) < TUNE_SIZE:  # in turn from every category, so that 8 or 32 of them are balanced too
        tune += [queue.pop() for queue in queues if queue]
    tune = tune[:TUNE_SIZE]
    for part, chosen in (("tune", tune), ("eval", sorted(set(pictures) - set(tune)))):
        folder = assets / style / part
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for name in chosen:
            Image.fromarray(pictures[name]).save(folder / f"{name}.png", optimize=True)
            row = {"file_name": f"{name}.png", "text": words(name), "category": names[name]}
            lines.append(json.dumps(row | {"known_to_base": name not in held_out}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{style}/{part}: {len(chosen)} pictures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--assets", type=Path, default=None)
    args = parser.parse_args()
    packages = [*BASE_STYLES, *TARGET_STYLES, AUTOENCODER_ONLY]
    sets = {package: fetch(package, args.work / "npm") for package in packages}
    names, held_out, others = build_base(sets, args.work)
    glyphs = sorted(sets[AUTOENCODER_ONLY]["icons"])
    for name in random.Random(SEED + 2).sample(glyphs, 2000):
        if (picture := rasterise(sets[AUTOENCODER_ONLY], name)) is not None:
            others.append(picture)
    np.savez_compressed(args.work / "vae.npz", images=np.stack(others))
    print(f"autoencoder only: {len(others)} pictures")
    if args.assets:
        for package, style in TARGET_STYLES.items():
            write_target(sets[package], style, names, held_out, args.assets)


if __name__ == "__main__":
    main()
