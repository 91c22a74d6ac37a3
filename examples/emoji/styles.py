"""Styles to tune on, from far from the embedded model's own to near: icon sets of npm, as folders `tune/` and `eval/`.

    python examples/emoji/styles.py --work build/styles                      # the eight
    python examples/emoji/styles.py --work build/styles --styles streamline  # one

A picture is one of a name that the embedded model knows, its caption the name alone, 64 × 64 on white, black where a
set has no colours. `tune/` has 32 pictures, in turn from every category; `eval/` the others. None of it is committed.
The licences are read from the packages, and one that is not named below stops the script. Needs `npm`, and
`pip install -e '.[emoji]'`.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ASSETS = Path(__file__).parents[2] / "difftuning_control" / "assets"
CARRIED = ("icons", "flat")  # by the package
SEED, TUNE_SIZE, LEAST = 20250, 32, 112  # 80 are drawn, half of them in the search
WORDED, WORD = (
    "-word",
    "zbx emoji",
)  # icons-word has the pictures of icons, and captions that begin with a word of its own


@dataclass(frozen=True)
class Style:
    """An icon set.

    Args:
        package: of @iconify-json.
        licence: as SPDX writes it.
        endings: of the set's names, the first that there is.
    """

    package: str
    licence: str
    endings: tuple[str, ...] = ("",)


STYLES = {
    "icons": Style("fluent-emoji-high-contrast", "MIT"),  # black glyphs
    "glyph": Style("mdi", "Apache-2.0"),  # no emoji
    "game": Style("game-icons", "CC-BY-3.0"),  # no emoji: woodcut-like
    "line": Style("hugeicons", "MIT", ("", "-01", "-02")),  # no emoji: thin lines
    "streamline": Style("streamline-emojis", "CC-BY-4.0", ("", "-1", "-2")),  # outlines, flat colours
    "outline": Style("openmoji", "CC-BY-SA-4.0"),  # outlines, flat colours
    "gradient": Style("fluent-emoji", "MIT"),  # shaded
    "flat": Style("fluent-emoji-flat", "MIT"),  # nearest to the model's own styles
}
UNSEEN = {  # by which no default was chosen
    "mono": Style("emojione-monotone", "CC-BY-4.0"),  # black glyphs of emoji
    "classic": Style("emojione-v1", "CC-BY-SA-4.0"),  # shaded
    "duotone": Style("ph", "MIT", ("-duotone",)),  # no emoji: lines, filled with grey
    "park": Style("icon-park", "Apache-2.0"),  # no emoji: lines and one colour
}
# what sets without emoji call things; an emoji's face or colour is left out as well
OTHER_WORDS = {
    "1st place medal": "medal",
    "adhesive bandage": "bandage",
    "artist palette": "palette",
    "balance scale": "scale-balance",
    "beer mug": "glass-mug",
    "birthday cake": "cake",
    "bow and arrow": "bow-arrow",
    "cherries": "fruit-cherries",
    "closed book": "book",
    "cocktail glass": "martini",
    "croissant": "food-croissant",
    "desktop computer": "computer",
    "ear of corn": "corn",
    "electric plug": "plug",
    "file folder": "folder",
    "four leaf clover": "clover",
    "guitar": "guitar-acoustic",
    "hamburger": "burger",
    "hot beverage": "coffee",
    "identification card": "id-card",
    "maple leaf": "leaf-maple",
    "mobile phone": "smartphone",
    "old key": "key",
    "red apple": "food-apple",
    "sewing needle": "needle",
    "soccer ball": "football",
    "sunflower": "flower",
    "teacup without handle": "tea",
    "television": "tv",
    "wrapped gift": "gift",
}


def known_names() -> dict[str, str]:
    """Name → category of all that the embedded model was trained on."""
    rows = [row for part in ("tune", "eval") for row in read_rows(ASSETS / "flat" / part)]
    return {row["text"]: row["category"] for row in rows if row["known_to_base"]}


def read_rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def write_rows(folder: Path, rows: list[dict]) -> None:
    lines = [json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def keys_of(name: str, style: Style) -> list[str]:
    """What a set may call a name, the likeliest first."""
    said = [name, name.removesuffix(" face"), name.removeprefix("red "), name.removeprefix("slice of ")]
    said += [OTHER_WORDS[name]] if name in OTHER_WORDS else []
    return [word.replace(" ", "-") + ending for word in dict.fromkeys(said) for ending in style.endings]


def pictures_of(
    icons: dict, style: Style, names: dict[str, str], rasterise: Callable[[dict, str], np.ndarray | None]
) -> dict[str, np.ndarray]:
    """Name → picture; no two names have the same drawing."""
    pictures, taken = {}, set()
    for name in names:
        key = next((k for k in keys_of(name, style) if k in icons["icons"] and k not in taken), None)
        if key is not None and (picture := rasterise(icons, key)) is not None:
            pictures[name] = picture
            taken.add(key)
    return pictures


def chosen_to_tune(pictures: dict[str, np.ndarray], names: dict[str, str]) -> list[str]:
    """In turn from every category, so that the first 8 or 24 are balanced too."""
    rng, by_category = random.Random(SEED), dict[str, list[str]]()
    for name in sorted(pictures):
        by_category.setdefault(names[name], []).append(name)
    queues = [rng.sample(queue, len(queue)) for _, queue in sorted(by_category.items())]
    tune: list[str] = []
    while len(tune) < TUNE_SIZE:
        tune += [queue.pop() for queue in queues if queue]
    return tune[:TUNE_SIZE]


def write(folder: Path, chosen: list[str], pictures: dict[str, np.ndarray], names: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in chosen:
        file = name.replace(" ", "-") + ".png"
        Image.fromarray(pictures[name]).save(folder / file, optimize=True)
        rows.append({"file_name": file, "text": name, "category": names[name]})
    write_rows(folder, rows)


def check_licence(style: Style, folder: Path) -> None:
    info = json.loads((folder / style.package / "info.json").read_text(encoding="utf-8"))
    if (licence := info["license"]["spdx"]) != style.licence:
        raise SystemExit(f"{style.package} is under {licence}; expected {style.licence}.")


def data_of(target: str, work: Path) -> tuple[str, str]:
    """Where a style's pictures lie: those to tune on, and the others."""
    if target in CARRIED:
        return f"embedded/{target}", f"embedded/{target}-eval"
    style = target.removesuffix(WORDED)
    folder = ASSETS / style if style in CARRIED else make(style, work / "styles")
    if style != target:
        folder = with_word(folder, work / "styles" / target)
    return str(folder / "tune"), str(folder / "eval")


def with_word(source: Path, folder: Path) -> Path:
    """A style's pictures with `WORD` before each caption; copied once."""
    for part in ("tune", "eval"):
        if (folder / part / "metadata.jsonl").exists():  # written last
            continue
        (folder / part).mkdir(parents=True, exist_ok=True)
        rows = read_rows(source / part)
        for row in rows:
            shutil.copyfile(source / part / row["file_name"], folder / part / row["file_name"])
        write_rows(folder / part, [row | {"text": f"{WORD} {row['text']}"} for row in rows])
    return folder


def make(name: str, work: Path) -> Path:
    """The folder of a style, with `tune/` and `eval/`; made once."""
    folder, style = work / name, (STYLES | UNSEEN)[name]
    if (folder / "eval" / "metadata.jsonl").exists():  # written last
        return folder
    from prepare import fetch, rasterise  # saves resvg where the folder is there

    icons, names = fetch(style.package, work / "npm"), known_names()
    check_licence(style, work / "npm")
    pictures = pictures_of(icons, style, names, rasterise)
    if len(pictures) < LEAST:
        raise SystemExit(f"{style.package} draws {len(pictures)} of the known names; expected at least {LEAST}.")
    tune = chosen_to_tune(pictures, names)
    write(folder / "tune", tune, pictures, names)
    write(folder / "eval", sorted(pictures.keys() - set(tune)), pictures, names)
    print(f"{name}: {len(pictures)} pictures, {style.package}, {style.licence}", flush=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/styles"))
    parser.add_argument("--styles", nargs="+", choices=[*STYLES, *UNSEEN], default=list(STYLES))
    args = parser.parse_args()
    for name in args.styles:
        make(name, args.work)


if __name__ == "__main__":
    main()
