"""The pictures of a folder: captions, what is wrong with each, copies, and what a square leaves of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from PIL import Image

from difftuning_control.data.examples import Columns, Row
from difftuning_control.data.images import EXTENSIONS, decode_image, placed
from difftuning_control.data.sources import list_rows
from difftuning_control.errors import UserError
from difftuning_control.recipe.captioning import Captioning
from difftuning_control.system.durable import beside
from difftuning_control.system.text import file_stem
from difftuning_control.system.untrusted import BYTES_PER_PIXEL, MAX_PIXELS, is_text, read_file
from difftuning_control.verbs.ui.captioning import drafts_of
from difftuning_control.verbs.ui.files import picture_address
from difftuning_control.verbs.ui.folders import why_refused
from difftuning_control.verbs.ui.places import Places
from difftuning_control.verbs.ui.render import render

MOST = 500  # pictures of a folder that are looked at
PAGE = 24
ALIKE = 5  # bits of 64 in which the shapes of two copies may differ,
SHARE = 0.2  # as a share of the bits that one of them has, since a plain ground has few,
TINT = 10  # and by how much of 255 the mean red, green or blue
NO_CAPTION = "has no caption; write one"
BAD_NAME = "has a name that is not UTF-8, with which it cannot be shown here; rename it"


@dataclass(frozen=True)
class Picture:
    """One picture of a folder.

    Args:
        problems: why training would refuse it, in words; none where it would not.
        notes: what else there is to see; of a copy first what it is a copy of.
        frame: left, top, width and height of what a square keeps, in hundredths of the picture.
        copy_of: the picture before it that it is a copy of.
        draft: a caption that a model proposed and nobody has seen yet.
    """

    name: str
    caption: str | None
    size: tuple[int, int] = (0, 0)
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    frame: tuple[float, float, float, float] = (0, 0, 100, 100)
    copy_of: str | None = None
    draft: str | None = None

    @property
    def is_small(self) -> bool:
        """Whether it would be enlarged."""
        return any(note.startswith("smaller") for note in self.notes)

    @property
    def warnings(self) -> list[str]:
        """The notes that stand out: what it is a copy of, and a name that cannot be shown."""
        return [*(self.notes[:1] if self.copy_of else ()), *(note for note in self.notes if note == BAD_NAME)]

    @property
    def framing(self) -> str:
        """What a square does to it, in a few words."""
        cropped = [note.replace("a square leaves out ", "") + " cropped" for note in self.notes if "a square" in note]
        return ", ".join([*cropped, *(["enlarged"] if self.is_small else [])])


@dataclass(frozen=True)
class Facts:
    """What the content of a picture's file says: its size, a digest of its bytes, its shape in bits, its mean
    colour, or a problem."""

    size: tuple[int, int] = (0, 0)
    digest: str = ""
    shape: int = 0
    colour: tuple[int, int, int] = (0, 0, 0)
    problem: str | None = None


def pictures_of(places: Places, folder: str, side: int) -> list[Picture]:
    """The pictures of a folder as training reads and checks them, with copies named.

    Args:
        side: of the square that they are trained at.

    Raises:
        UserError: if it is no folder of this page, or training could read nothing of it.
    """
    real = places.readable(folder)
    if not real.is_dir():
        raise UserError(f"{folder} is no folder; choose one with pictures.")
    rows, bad = list_rows(str(real), Columns(), Captioning(), None, None)
    found, seen = [Picture(name, None, problems=(why,)) for name, why in bad.items()], list[tuple[str, Facts]]()
    drafts = drafts_of(places, real)
    for row in rows[:MOST]:
        facts = _facts_of(real / row.name)
        picture = _with_copies(_picture(row, facts, side), facts, seen)
        found.append(replace(picture, draft=None if picture.caption else drafts.get(row.name)))
        seen.append((row.name, facts))
    return sorted(found, key=lambda picture: picture.name)


def _picture(row: Row, facts: Facts, side: int) -> Picture:
    caption = row.caption.strip() if isinstance(row.caption, str) else None
    problems = tuple(filter(None, [facts.problem, None if caption else NO_CAPTION]))
    named = () if is_text(row.name) else (BAD_NAME,)
    if not all(facts.size):
        return Picture(row.name, caption, problems=problems, notes=named)
    (wide, high), left, top = placed(facts.size, side, side)
    frame = (100 * left / wide, 100 * top / high, 100 * side / wide, 100 * side / high)
    lost, smallest = 1 - side * side / (wide * high), min(facts.size)
    notes = [f"a square leaves out {lost:.0%}"] if lost > 0.005 else []
    notes += [f"smaller than {side}, and would be enlarged"] if smallest < side else []
    return Picture(row.name, caption, facts.size, problems, (*notes, *named), frame)


def _with_copies(picture: Picture, facts: Facts, seen: Sequence[tuple[str, Facts]]) -> Picture:
    for name, other in seen:
        if facts.digest and facts.digest == other.digest:
            return replace(picture, notes=(f"the same file as {name}", *picture.notes), copy_of=name)
        if _are_alike(facts, other):
            return replace(picture, notes=(f"looks like {name}", *picture.notes), copy_of=name)
    return picture


def _are_alike(one: Facts, other: Facts) -> bool:
    """Whether two pictures have the same shape and the same mean colour."""
    differing, all_bits = (bin(bits).count("1") for bits in (one.shape ^ other.shape, one.shape | other.shape))
    tint = max(abs(a - b) for a, b in zip(one.colour, other.colour))
    return one.shape != 0 and differing <= min(ALIKE, SHARE * all_bits) and tint <= TINT


def _facts_of(path: Path) -> Facts:
    try:
        return _facts(str(path), path.stat().st_mtime_ns)
    except OSError as error:
        return Facts(problem=f"cannot be read ({error.strerror})")


@lru_cache(maxsize=4 * MOST)
def _facts(path: str, changed: int) -> Facts:
    try:
        content = read_file(path, MAX_PIXELS * BYTES_PER_PIXEL)
        image = decode_image(content)
    except UserError as error:
        return Facts(problem=str(error))
    red, green, blue = image.resize((1, 1), Image.Resampling.BOX).tobytes()
    return Facts(image.size, hashlib.sha256(content).hexdigest(), _shape(image), (red, green, blue))


def _shape(image: Image.Image) -> int:
    """Where a small grey version of the picture becomes brighter to the right, as bits; 0 of a picture without any."""
    small = image.convert("L").resize((9, 8), Image.Resampling.BILINEAR).tobytes()
    pairs = [(small[9 * y + x], small[9 * y + x + 1]) for y in range(8) for x in range(8)]
    return sum(1 << i for i, (left, right) in enumerate(pairs) if right > left + 2)


# --- what is shown --------------------------------------------------------------------------------------------------


def gallery(
    places: Places,
    folder: str,
    found: Sequence[Picture],
    page: int,
    chosen: str | None,
    side: int | None = None,
    only: bool = False,
) -> str:
    """A page of the pictures, and what is wrong in all of them.

    Args:
        side: of the square that they are trained at.
        only: show those alone that training would refuse.
    """
    real, found = places.readable(folder), to_show(found, only)
    part = found[page * PAGE : (page + 1) * PAGE]
    shown = [(p, _address(real, p, 384)) for p in part]
    return render(
        "pictures",
        shown=shown,
        count=len(found),
        most=MOST,
        bad=_what_is_wrong(found),
        refused=why_refused(places, folder),
        notes=_what_is_to_see(found, side),
        chosen=chosen,
        page=page,
        size=PAGE,
        only=only,
        no_caption=NO_CAPTION,
    )


def to_show(found: Sequence[Picture], only: bool) -> list[Picture]:
    """All pictures, or those alone that training would refuse."""
    return [picture for picture in found if picture.problems or not only]


def _what_is_wrong(found: Sequence[Picture]) -> list[str]:
    drafted = sum(p.draft is not None for p in found)
    bare = sum(NO_CAPTION in p.problems for p in found)
    spoilt = sum(any(text != NO_CAPTION for text in p.problems) for p in found)
    parts = [f"{bare} without a caption" + (f" ({drafted} drafted)" if drafted else "")] if bare else []
    return parts + ([f"{spoilt} that cannot be read or used"] if spoilt else [])


def _what_is_to_see(found: Sequence[Picture], side: int | None) -> list[str]:
    copies, small = sum(p.copy_of is not None for p in found), sum(p.is_small for p in found)
    parts = [f"{copies} like another"] if copies else []
    return parts + ([f"{small} smaller than {side or 'the square'}"] if small else [])


def one_picture(places: Places, folder: str, picture: Picture | None) -> str:
    """A picture large, with its frame."""
    address = None if picture is None else _address(places.readable(folder), picture, 768)
    return render("picture", picture=picture, address=address)


def _address(folder: Path, picture: Picture, side: int) -> str | None:
    """Where the page finds it; None of what cannot be read, or has a name that no address can hold."""
    return picture_address(folder / picture.name, side) if all(picture.size) and is_text(picture.name) else None


# --- what is added --------------------------------------------------------------------------------------------------


def add_pictures(places: Places, folder: str, files: Sequence[str]) -> list[str]:
    """Copy uploaded pictures into a folder under free names; returns these.

    Raises:
        UserError: naming the first that is no picture or too large, or if the folder is not this page's; nothing is
            copied then.
    """
    target = places.writable(folder)
    contents = []
    for file in files:
        path = Path(file)
        try:
            content = read_file(path, MAX_PIXELS * BYTES_PER_PIXEL)
            decode_image(content)
        except UserError as error:
            raise UserError(f"{path.name} {error}; nothing was added.") from None
        except OSError as error:
            raise UserError(f"{path.name} cannot be read ({error.strerror}); nothing was added.") from None
        if path.suffix.lower() not in EXTENSIONS:
            raise UserError(f"{path.name} is no picture; expected one of {', '.join(sorted(EXTENSIONS))}.")
        contents.append((path, content))
    names = []
    for path, content in contents:
        names.append(_free(target, file_stem(path.stem), path.suffix.lower()))
        with beside(target / names[-1]) as temporary:
            temporary.write_bytes(content)
    return names


def _free(folder: Path, stem: str, suffix: str) -> str:
    number, name = 1, f"{stem}{suffix}"
    while (folder / name).exists():
        number += 1
        name = f"{stem}-{number}{suffix}"
    return name
