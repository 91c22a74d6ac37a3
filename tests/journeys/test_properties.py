"""Whatever comes from outside, a value or one sentence comes out; `HYPOTHESIS_PROFILE=thorough` tries more."""

import ast
import html
import io
import json
import os
import re
import unicodedata
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from difftuning_control.data.images import decode_image
from difftuning_control.data.sources import load_images
from difftuning_control.errors import UserError
from difftuning_control.evaluation.drawing import save_grid
from difftuning_control.recipe.recipe import Recipe
from difftuning_control.system.durable import write_json
from difftuning_control.system.text import code_span, harmless, plain_markdown, python_text
from difftuning_control.verbs.commands import COMMANDS
from difftuning_control.verbs.parse import keys_of, parse

few = settings(derandomize=True, database=None, deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
settings.register_profile("few", few)
settings.register_profile("thorough", few, derandomize=False, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "few"))
slow = settings(max_examples=settings().max_examples // 2)

TEXT = st.text(st.characters(codec=None), max_size=40)  # with lone surrogates, controls and bidirectional marks
HOSTILE = st.sampled_from(
    [
        "",
        " ",
        "\0",
        "a\nb",
        "\ud800",
        "\u202eexe",
        "\x1b[2J",
        "<script>alert(1)</script>",
        "=cmd|' /C calc'!A0",
        "```\n# x",
        "{{ 7*7 }}",
        "x" * 5000,
        "長" * 3000,
        "../../etc/passwd",
        "/etc/passwd",
        "null",
        "1e999",
        "$x$",
        "\u200d👩‍👩‍👧",
        "a\u2028b",
    ]
)
WORDS = TEXT | HOSTILE
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, 2, 0.5, 10**30, True])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda part: st.lists(part, max_size=3) | st.dictionaries(WORDS, part, max_size=3),
    max_leaves=5,
)


def value_or_sentence(make):
    """What a function gives, or None where it raises one sentence; anything else that it raises is a failure."""
    try:
        return make()
    except UserError as error:
        text = str(error)
    assert len(text.strip()) > 8
    assert "Traceback" not in text
    return None


# --- recipes --------------------------------------------------------------------------------------------------------

KEYS = sorted(k for k in keys_of(COMMANDS["train"]))


def recipe_of(path: Path) -> Recipe:
    command = parse(["train", "--config", str(path)])[1]
    return Recipe(**{f.name: getattr(command, f.name) for f in fields(Recipe)})


def nested(leaves: dict[str, object]) -> dict[str, object]:
    values: dict[str, object] = {}
    for key, value in leaves.items():
        *sections, leaf = key.split(".")
        part = values
        for section in sections:
            part = part.setdefault(section, {})
            if not isinstance(part, dict):
                return values
        part[leaf] = value
    return values


@pytest.mark.wide
@slow
@given(leaves=st.dictionaries(st.sampled_from(KEYS), NUMBERS | WORDS | VALUES, min_size=1, max_size=2))
def test_a_recipe_of_any_values_is_refused_in_a_sentence_or_repeats_itself(tmp_path_factory, leaves):
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    path.write_text(yaml.safe_dump(nested(leaves)), encoding="utf-8", errors="surrogatepass")
    found = value_or_sentence(lambda: recipe_of(path))
    if found is None:
        return
    path.write_text(yaml.safe_dump(found.to_dict(), sort_keys=False, allow_unicode=True), encoding="utf-8")
    assert recipe_of(path) == found


@slow
@given(content=st.binary(max_size=60) | WORDS.map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_a_recipe_of_any_bytes_is_refused_in_a_sentence(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(content)
    assert value_or_sentence(lambda: recipe_of(path)) is None


BOMB = "control:\n  params:\n    a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"    {b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("control: {params: {a: " + "[" * 5000 + "]" * 5000 + "}}", "is nested more than 32 levels deep"),
        (BOMB, "has aliases (*) that stand for more than 100000 values"),
        ("control: {params: &c {a: *c}}", "has aliases (*) that stand for more than 100000 values"),
        ("training: {max_steps: " + "9" * 5000 + "}", "has a value that cannot be read (Exceeds the limit"),
        ("output: 2020-13-45", "has a value that cannot be read (month must be"),
        ('output: "a\\0b"', "output has a NUL"),
        ("output: !!python/object/apply:os.mkdir [{made}]", "is not valid YAML: could not determine a constructor"),
        ("output: !!python/name:os.system", "is not valid YAML: could not determine a constructor"),
        ("model: {class_path: os.mkdir, init_args: {path: {made}}}", "has an unknown key model.class_path"),
        ("adapter: {class_path: difftuning_control.recipe.AdapterConfig}", "has an unknown key adapter.class_path"),
    ],
    ids=lambda text: text[:30],
)
def test_yaml_that_expands_or_builds_objects_is_refused(tmp_path, text, expected):
    (tmp_path / "recipe.yaml").write_text(text.replace("{made}", str(tmp_path / "made")))
    with pytest.raises(UserError) as refused:
        recipe_of(tmp_path / "recipe.yaml")
    assert expected in str(refused.value)
    assert not (tmp_path / "made").exists()


def test_parameters_that_look_like_a_class_stay_values(tmp_path):
    params = {"class_path": "os.mkdir", "init_args": {"path": str(tmp_path / "made")}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"method": "controlnet", "control": {"params": params}}))
    assert recipe_of(tmp_path / "recipe.yaml").control.params == params
    assert not (tmp_path / "made").exists()


# --- captions and metadata ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("outside")
    Image.new("RGB", (9, 9), "red").save(root / "private.png")
    (root / "data").mkdir()
    Image.new("RGB", (8, 8), "blue").save(root / "data" / "own.png")
    return root / "data"


@given(caption=WORDS)
def test_any_caption_arrives_as_it_is_or_is_refused_and_can_be_shown(folder, caption):
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "own.png", "text": caption}))
    data = value_or_sentence(lambda: load_images(str(folder)))
    if data is None:
        assert not caption.strip() or any("\ud800" <= c <= "\udfff" or c == "\0" for c in caption)
        return
    assert [e.caption for e in data.examples] == [caption.strip()]
    assert len(data.fingerprint) == 16
    save_grid(folder.parent / "grid.png", {"base": [Image.new("RGB", (8, 8))]}, [caption])
    write_json(folder.parent / "kept.json", {"caption": caption})
    assert json.loads((folder.parent / "kept.json").read_text(encoding="utf-8")) == {"caption": caption}


@given(text=WORDS)
def test_any_text_can_be_written_and_shown_without_harm(text):
    shown = harmless(text)
    assert not {unicodedata.category(c) for c in shown if c not in "\u200c\u200d"} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    code = python_text(text)
    assert ast.literal_eval(code) == text
    assert not set(code) & set("`\n\x1b")
    marked = plain_markdown(text)
    assert not set(marked) & set("<\n")
    assert html.unescape(marked).replace("\\", "") == shown.replace("\\", "")
    spans = [len(run) for run in re.findall(r"`+", text)]
    fence = "`" * (max(spans, default=0) + 1)
    code = code_span(text)
    assert (code[: len(fence)], code[-len(fence) :]) == (fence, fence)
    assert shown in code


def names_inside(row: object) -> bool:
    return isinstance(row, dict) and row.get("file_name") in ("own.png", "./own.png")


NAMES = st.sampled_from(
    ["own.png", "./own.png", "../private.png", "sub/../../private.png", "own.png/", "x" * 300, "gone.png"]
)
ROWS = st.lists(
    st.fixed_dictionaries({}, optional={"file_name": NAMES | VALUES, "text": st.just("red") | VALUES, "other": VALUES})
    | VALUES,
    min_size=1,
    max_size=3,
)


@given(rows=ROWS, absolute=st.booleans(), kind=st.sampled_from(["jsonl", "csv"]))
def test_any_metadata_give_pictures_of_the_folder_or_a_sentence(folder, rows, absolute, kind):
    if absolute:
        rows = [*rows, {"file_name": str(folder.parent / "private.png"), "text": "red"}]
    for name in ("metadata.jsonl", "metadata.csv"):
        (folder / name).unlink(missing_ok=True)
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        lines = ["file_name,text", *(",".join(map(str, r.values())) if isinstance(r, dict) else str(r) for r in rows)]
        (folder / "metadata.csv").write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    data = value_or_sentence(lambda: load_images(str(folder), skip_bad=True))
    if data is not None:
        assert {example.load().size for example in data.examples} == {(8, 8)}
        if kind == "jsonl":
            assert len(data) <= sum(map(names_inside, rows))
    (folder / f"metadata.{kind}").unlink()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"file_name": ' + "9" * 5000 + "}", '{"file_name": "a\\u0000b", "text": "x"}']
)
def test_metadata_that_no_program_wrote_are_refused_in_a_sentence(folder, text):
    (folder / "metadata.jsonl").write_text(text)
    assert value_or_sentence(lambda: load_images(str(folder))) is None
    (folder / "metadata.jsonl").unlink()


# --- pictures -------------------------------------------------------------------------------------------------------


def encoded(mode: str, kind: str, **options: object) -> bytes:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (13, 17, 4), np.uint8), "RGBA")
    picture = noise.convert("L").convert("I;16") if mode == "I;16" else noise.convert("RGB").convert(mode)
    picture = noise if mode == "RGBA" else noise.convert("LA") if mode == "LA" else picture
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded("RGB", "JPEG", exif=exif)


WHOLE = {
    **{f"png {mode}": encoded(mode, "PNG") for mode in ("1", "L", "P", "LA", "I;16", "RGB", "RGBA")},
    "jpeg cmyk": encoded("CMYK", "JPEG"),
    "jpeg rotated": rotated(),
    "tiff": encoded("RGB", "TIFF"),
    "tiff float": encoded("F", "TIFF"),
    "webp": encoded("RGBA", "WEBP"),
    "gif": encoded("P", "GIF"),
    "bmp": encoded("RGB", "BMP"),
}


def check_picture(content: bytes) -> None:
    found = value_or_sentence(lambda: decode_image(content, max_pixels=10_000))
    if found is not None:
        assert found.mode == "RGB"
        assert found.width * found.height <= 10_000


@given(content=st.binary(max_size=200), start=st.sampled_from(["", *WHOLE]))
def test_random_bytes_give_a_picture_or_a_sentence(content, start):
    check_picture(WHOLE[start][:40] + content if start else content)


@given(name=st.sampled_from(list(WHOLE)), share=st.floats(0, 1), place=st.floats(0, 0.999), value=st.integers(0, 255))
def test_truncated_and_altered_files_give_a_picture_or_a_sentence(name, share, place, value):
    content = WHOLE[name]
    check_picture(content[: int(len(content) * share)])
    altered = bytearray(content)
    altered[int(len(content) * place)] = value
    check_picture(bytes(altered))


@pytest.mark.parametrize("name", WHOLE)
def test_every_mode_is_read_upright(name):
    assert decode_image(WHOLE[name]).size == ((13, 17) if "rotated" in name else (17, 13))
