"""Fetch the emoji sets, rasterise them, and write what the embedded model is trained, measured and tuned on.

    python examples/emoji/prepare.py --work build/emoji [--assets difftuning_control/assets]

Writes into the work folder
    base.npz, base.json      pictures (N, 128, 128, 4) uint8, premultiplied, of the base styles; one record a picture
    vae.npz                  every further picture that only the autoencoder sees, (N, 64, 64, 3) uint8
    unseen/STYLE.npz, .json  the styles that no training sees, for survival.py: (N, 64, 64, 3) uint8 and their names
and into the assets folder (with --assets) the two few-shot styles, `icons` and `flat`, each as `tune/` (64 pictures)
and `eval/` (the others), PNG files with a `metadata.jsonl` whose caption is the name alone.

The sets' licences are read from the packages; one that is not in LICENCES (share-alike, say) stops the script. Fluent
Emoji in colour is left out as well: its drawings are those of the flat ones, which the base must not have seen.

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
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

SIZE = 64
SEED = 20241
REFERENCE = {"noto": "noto", "twemoji": "twemoji", "emojione": "emojione", "fxemoji": "fxemoji"}
FURTHER = {"noto-v1": "blob"}  # draws the names that two of the reference sets have
UNSEEN = {"fluent-emoji-flat": "flat", "streamline-emojis": "streamline"}
TARGET_STYLES = {"fluent-emoji-high-contrast": "icons", "fluent-emoji-flat": "flat"}
AUTOENCODER_ONLY = "mdi"  # black glyphs: the autoencoder must be able to draw lines, the denoiser never sees them
LICENCES = ("Apache-2.0", "CC-BY-4.0", "MIT")
CATEGORIES = ("Animals & Nature", "Food & Drink", "Objects", "Activities")
SHAPES = re.compile(r"(red|orange|yellow|green|blue|purple|brown)-(circle|square)$")  # words of colour, to compose
TONE = re.compile(r"skin-tone|-(light|medium|dark)(-|$)")
TUNE_SIZE = 64
HELD_OUT = 32
COMPOSED = ("blue-book", "yellow-heart", "green-circle", "purple-square")  # held out too: made of words that are known


def fetch(package: str, folder: Path) -> dict:
    """The icon set of one `@iconify-json` package; downloaded once."""
    path = folder / package / "icons.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", f"@iconify-json/{package}"]
        out = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
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


def check_licence(package: str, folder: Path) -> None:
    """Raises SystemExit where the package's licence is none of LICENCES."""
    licence = json.loads((folder / package / "info.json").read_text())["license"]["spdx"]
    if licence not in LICENCES:
        raise SystemExit(f"{package} is under {licence}; expected one of {', '.join(LICENCES)}.")


def rasterise_rgba(icons: dict, name: str) -> Image.Image:
    """The icon in the middle of a transparent ground, 256 × 256."""
    icon = icons["icons"][name]
    width, height = (icon.get(k, icons.get(k, 16)) for k in ("width", "height"))
    side = max(width, height)
    left, top = icon.get("left", 0) - (side - width) / 2, icon.get("top", 0) - (side - height) / 2
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left:g} {top:g} {side} {side}" width="{side}" height="{side}">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=4 * SIZE, height=4 * SIZE)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def on_white(picture: Image.Image) -> np.ndarray | None:
    """The picture on a white ground, (64, 64, 3) uint8; None where nearly nothing is drawn."""
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture)
    pixels = np.asarray(ground.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX))
    return pixels if (pixels < 200).any(-1).mean() > 0.02 else None


def rasterise(icons: dict, name: str) -> np.ndarray | None:
    return on_white(rasterise_rgba(icons, name))


def premultiplied(picture: Image.Image) -> np.ndarray:
    """(128, 128, 4) uint8, colours times alpha."""
    pixels = np.asarray(picture, np.float32)
    pixels = np.concatenate([pixels[..., :3] * pixels[..., 3:] / 255, pixels[..., 3:]], -1)
    return pixels.reshape(2 * SIZE, 2, 2 * SIZE, 2, 4).mean((1, 3)).round().astype(np.uint8)


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
    """Reference name → this set's own key; fxemoji runs its words together, streamline numbers its drawings."""
    if style == "fxemoji":
        keys = {key.replace("-", ""): key for key in icons["icons"]}
        return {name: keys[name.replace("-", "")] for name in names if name.replace("-", "") in keys}
    if style == "streamline":
        keys = {re.sub(r"-\d+$", "", key): key for key in sorted(icons["icons"], reverse=True)}
        return {name: keys[name] for name in names if name in keys}
    return {name: name for name in names if name in icons["icons"]}


def words(name: str) -> str:
    return name.replace("-", " ")


def choose_names(sets: dict[str, dict]) -> tuple[dict[str, str], set[str]]:
    """Name → category of what two reference sets draw, and the names that all training leaves out."""
    names = concept_names(sets["noto"])
    matched = {style: match(sets[pkg], style, names) for pkg, style in REFERENCE.items()}
    names = {n: c for n, c in names.items() if sum(n in m for m in matched.values()) >= 2}
    targets = [set(match(sets[pkg], style, names)) for pkg, style in TARGET_STYLES.items()]
    common = sorted(set(names).intersection(*targets))
    return names, set(random.Random(SEED).sample(common, HELD_OUT))


def both_forms(icons: dict, name: str) -> tuple[np.ndarray | None, np.ndarray]:
    """On white at 64 pixels (None where nearly nothing is drawn), and premultiplied at 128."""
    picture = rasterise_rgba(icons, name)
    return on_white(picture), premultiplied(picture)


def build_base(
    sets: dict[str, dict], names: dict[str, str], held_out: set[str], work: Path, pool: Executor
) -> list[np.ndarray]:
    """Writes the base; returns the sets' other pictures."""
    shapes = {key: "Shapes" for key in sets["noto"]["icons"] if SHAPES.match(key)}
    images, records, others = [], [], []
    for package, style in (REFERENCE | FURTHER).items():
        used = {key: name for name, key in match(sets[package], style, names | shapes).items()}
        keys = [key for key in sorted(sets[package]["icons"]) if not TONE.search(key)]
        single = [{**sets[package], "icons": {key: sets[package]["icons"][key]}, "metadata": {}} for key in keys]
        for key, (flat, rgba) in zip(keys, pool.map(both_forms, single, keys, chunksize=50)):
            if flat is None:
                continue
            if key not in used:
                others.append(flat)
                continue
            name = used[key]
            images.append(rgba)
            record = {"style": style, "name": words(name), "category": (names | shapes)[name]}
            records.append(record | {"held_out": name in held_out or name in COMPOSED, "composed": name in COMPOSED})
        print(f"{style}: {len(images)} pictures so far", flush=True)
    np.savez_compressed(work / "base.npz", images=np.stack(images))
    (work / "base.json").write_text(json.dumps(records, indent=0))
    print(f"base: {len(images)} pictures of {len({r['name'] for r in records})} names")
    return others


def write_unseen(icons: dict, style: str, names: dict[str, str], held_out: set[str], folder: Path) -> None:
    """The pictures of one style that no training sees, with the names that the base knows."""
    pictures = {n: p for n, k in match(icons, style, names).items() if (p := rasterise(icons, k)) is not None}
    known = sorted(set(pictures) - held_out - set(COMPOSED))
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / f"{style}.npz", images=np.stack([pictures[n] for n in known]))
    rows = [{"name": words(n), "category": names[n]} for n in known]
    (folder / f"{style}.json").write_text(json.dumps(rows, indent=0))
    print(f"unseen {style}: {len(known)} pictures")


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
    if overlap := set(tune) & set(COMPOSED):
        raise SystemExit(f"{sorted(overlap)} would be tuned on, and yet the base does not know them.")
    unknown = held_out | set(COMPOSED)
    for part, chosen in (("tune", tune), ("eval", sorted(set(pictures) - set(tune)))):
        folder = assets / style / part
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for name in chosen:
            Image.fromarray(pictures[name]).save(folder / f"{name}.png", optimize=True)
            row = {"file_name": f"{name}.png", "text": words(name), "category": names[name]}
            lines.append(json.dumps(row | {"known_to_base": name not in unknown}))
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        print(f"{style}/{part}: {len(chosen)} pictures")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/emoji"))
    parser.add_argument("--assets", type=Path, default=None)
    parser.add_argument("--processes", type=int, default=1)
    args = parser.parse_args()
    packages = [*REFERENCE, *FURTHER, *TARGET_STYLES, *UNSEEN, AUTOENCODER_ONLY]
    sets = {package: fetch(package, args.work / "npm") for package in dict.fromkeys(packages)}
    for package in sets:
        check_licence(package, args.work / "npm")
    names, held_out = choose_names(sets)
    for package, style in UNSEEN.items():
        write_unseen(sets[package], style, names, held_out, args.work / "unseen")
    with ProcessPoolExecutor(args.processes) as pool:
        others = build_base(sets, names, held_out, args.work, pool)
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
