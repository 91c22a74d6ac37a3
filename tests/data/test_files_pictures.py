"""Pictures that were read wrongly without a word: colour profiles, deep greys of scanners, strips of many pixels."""

import io
import json
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from difftuning_control.data.images import decode_image, frame, to_rgb
from difftuning_control.data.sources import load_images
from difftuning_control.errors import UserError

# --- colour profiles ------------------------------------------------------------------------------------------------

SRGB_TO_XYZ = np.array([[0.4360, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
P3_TO_XYZ = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])


def profile_of(matrix: np.ndarray) -> bytes:
    """Pillow's own sRGB profile with other primaries: the columns of a matrix to XYZ under D50."""
    content = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    (count,) = struct.unpack_from(">I", content, 128)
    for i in range(count):
        name, offset, _ = struct.unpack_from(">4sII", content, 132 + 12 * i)
        if name in (b"rXYZ", b"gXYZ", b"bXYZ"):
            column = matrix[:, b"rgb".index(name[:1])]
            struct.pack_into(">3i", content, offset + 8, *(round(float(v) * 65536) for v in column))
    return bytes(content)


def press_profile() -> bytes:
    """Of a press that prints magenta on yellow as a dark red and all else as white: a table of the 16 corners."""
    corners = bytearray(bytes([255, 128, 128]) * 16)
    corners[18:21] = bytes([122, 196, 176])  # Lab (48, 68, 48)
    ramp = bytes(range(256))
    matrix = struct.pack(">9i", *np.eye(3, dtype=int).ravel() * 65536)
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + ramp * 4 + bytes(corners) + ramp * 3
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    size = 128 + 4 + 24 + len(table) + len(white)
    start = struct.pack(">I4sI4s4s4s12x4s", size, b"lcms", 0x02100000, b"prtr", b"CMYK", b"Lab ", b"acsp")
    head = start.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    place = 128 + 4 + 24
    tags = struct.pack(">I", 2) + struct.pack(">4sII", b"A2B0", place, len(table))
    tags += struct.pack(">4sII", b"wtpt", place + len(table), len(white))
    return head.ljust(128, b"\0") + tags + table + white


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixel(content: bytes) -> list[int]:
    found = decode_image(content)
    assert found.mode == "RGB"
    assert "icc_profile" not in found.info
    return np.asarray(found)[0, 0].tolist()


def in_srgb(colour: tuple[int, int, int], matrix: np.ndarray) -> np.ndarray:
    """What a colour is in sRGB, by the formulas of the standard."""
    values = np.array(colour) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    linear = np.linalg.solve(SRGB_TO_XYZ, matrix @ linear).clip(0, 1)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055) * 255


COLOUR = (180, 110, 80)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_picture_of_a_wide_gamut_has_the_colours_that_it_is_shown_with(kind):
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    content = encoded(Image.new("RGB", (8, 8), COLOUR), kind, icc_profile=profile_of(P3_TO_XYZ), **options)
    expected = in_srgb(COLOUR, P3_TO_XYZ)
    assert np.abs(expected - COLOUR).max() > 8
    np.testing.assert_allclose(pixel(content), expected, atol=3)


def test_profiles_of_palettes_and_of_transparent_pictures_are_heeded_too():
    profile, expected = profile_of(P3_TO_XYZ), in_srgb(COLOUR, P3_TO_XYZ)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, *COLOUR])
    np.testing.assert_allclose(pixel(encoded(palette, icc_profile=profile)), expected, atol=3)
    half = Image.new("RGBA", (8, 8), (*COLOUR, 51))
    np.testing.assert_allclose(pixel(encoded(half, icc_profile=profile)), 0.2 * expected + 0.8 * 255, atol=3)
    half.putpixel((0, 0), (*COLOUR, 0))
    assert pixel(encoded(half, icc_profile=profile)) == [255, 255, 255]
    clear = Image.new("RGB", (8, 8), COLOUR)  # one colour of which is clear
    assert pixel(encoded(clear, icc_profile=profile, transparency=COLOUR)) == [255, 255, 255]


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_inks_are_those_of_the_press_that_the_profile_is_of(kind):
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    assert pixel(encoded(red, kind, **options))[0] >= 254
    found = pixel(encoded(red, kind, icc_profile=press_profile(), **options))
    lab = Image.fromarray(np.array([[[122, 68, 48]]], np.uint8), "LAB").convert("RGB")
    np.testing.assert_allclose(found, np.asarray(lab)[0, 0], atol=6)
    assert found[0] < 240


@pytest.mark.parametrize(
    ("image", "profile"),
    [
        (Image.new("RGB", (4, 4), COLOUR), profile_of(SRGB_TO_XYZ)),
        (Image.new("RGB", (4, 4), COLOUR), press_profile()),
        (Image.new("RGB", (4, 4), COLOUR), b"no profile"),
        (Image.new("L", (4, 4), 90), profile_of(P3_TO_XYZ)),
        (Image.fromarray(np.full((4, 4), 90 * 257, np.uint16)), profile_of(P3_TO_XYZ)),
    ],
    ids=["sRGB", "of another mode", "damaged", "grey", "deep grey"],
)
def test_profiles_that_stand_for_srgb_or_do_not_fit_change_nothing(image, profile):
    expected = pixel(encoded(image))
    assert pixel(encoded(image, icc_profile=profile)) == expected


def test_a_profile_is_applied_once():
    content = encoded(Image.new("RGB", (8, 8), COLOUR), icc_profile=profile_of(P3_TO_XYZ))
    once = decode_image(content)
    assert to_rgb(once).tobytes() == once.tobytes() == to_rgb(Image.open(io.BytesIO(content))).tobytes()


# --- deep greys -----------------------------------------------------------------------------------------------------


def tiff(values: list[int], bits: int, photometric: int = 1, kind: int = 1) -> bytes:
    """A row of greys as a scanner writes it.

    Args:
        photometric: 0 where 0 is white.
        kind: of the values: 1 without a sign, 2 with one.
    """
    if bits == 12:
        (first, second) = values
        data = bytes([first >> 4, (first & 15) << 4 | second >> 8, second & 255])
    else:
        data = struct.pack(f"<{len(values)}{'I' if bits == 32 else 'h' if kind == 2 else 'H'}", *values)
    tags = {256: len(values), 257: 1, 258: bits, 259: 1, 262: photometric, 273: 134, 277: 1, 278: 1, 279: len(data)}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in ({**tags, 339: kind}).items())
    return b"II*\0" + struct.pack("<IH", 8, 10) + entries + bytes(4) + data


@pytest.mark.parametrize(
    ("content", "greys"),
    [
        (tiff([0, 4095], 12), [0, 255]),
        (tiff([0, 2048], 12), [0, 128]),
        (tiff([0, 65535], 16), [0, 255]),
        (tiff([0, 60000], 16, photometric=0), [255, 22]),
        (tiff([0, 30000], 16, kind=2), [0, 117]),
    ],
    ids=["12 bits", "half of 12 bits", "16 bits", "0 is white", "with a sign"],
)
def test_greys_of_scanners_are_neither_dark_nor_negatives(content, greys):
    assert np.asarray(decode_image(content))[0, :, 0].tolist() == greys


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (tiff([0, 2**24], 32), r"has values from 0 to 1\.67772e\+07; expected 0 to 255 or 0 to 65535"),
        (tiff([5, 4_000_000_000], 32), r"has values from -2\.94967e\+08 to 5; expected 0 to 255 or 0 to 65535"),
        (tiff([-5, 3000], 16, kind=2), r"has values from -5 to 3000; expected 0 to 255 or 0 to 65535"),
    ],
)
def test_whole_numbers_that_are_no_greys_are_refused_and_not_cut(content, said):
    with pytest.raises(UserError, match=said):
        decode_image(content)


def test_a_deep_grey_that_stands_for_transparency_is_white():
    deep = Image.fromarray(np.array([[30000, 10000]], np.uint16))
    assert np.asarray(decode_image(encoded(deep, transparency=30000)))[0, :, 0].tolist() == [255, 39]


# --- strips ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", [(0.5, 0.5), (0.0, 0.0), (1.0, 1.0)])
@pytest.mark.parametrize("tall", [True, False])
def test_a_strip_of_many_pixels_is_framed_without_its_ends(tall, crop):
    shades = (np.arange(200_000) * 255 // 199_999).astype(np.uint8)[None, :, None].repeat(3, 2)
    strip = Image.fromarray(shades.transpose(1, 0, 2) if tall else shades)
    found = frame(strip, 32, 32, crop)  # 3 million by 32 pixels, were it resized whole
    assert found.shape == (32, 32, 3)
    assert np.abs(found.astype(int) - crop[0] * 255).max() <= 1


def test_a_strip_is_framed_like_the_middle_that_is_left_of_it():
    rng = np.random.default_rng(0)
    strip = Image.fromarray(rng.integers(0, 256, (2, 300_000, 3), np.uint8))  # 5 million by 32 pixels
    part = strip.crop((149_900, 0, 150_100, 2))
    assert np.abs(frame(strip, 32, 32).astype(int) - frame(part, 32, 32)).max() <= 1


def test_what_was_kept_of_pictures_that_were_read_otherwise_is_made_anew(monkeypatch):
    from difftuning_control.data import framing

    now = framing.Framing(64).identity
    monkeypatch.setattr(framing, "READING", framing.READING + 1)
    assert framing.Framing(64).identity != now


# --- kinds of files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("end", "kind"), [("avif", "AVIF"), ("jfif", "JPEG"), ("jpe", "JPEG"), ("JPG", "JPEG"), ("webp", "WEBP")]
)
def test_what_browsers_save_is_read(tmp_path, end, kind):
    content = encoded(Image.new("RGB", (32, 24), (200, 30, 30)), kind)
    (tmp_path / f"a.{end}").write_bytes(content)
    (example,) = load_images(str(tmp_path), default_caption="red").examples
    assert (example.name, example.size) == (f"a.{end}", (32, 24))
    assert np.abs(np.asarray(example.load())[12, 16].astype(int) - (200, 30, 30)).max() < 12


UNREAD = {
    "IMG_1.HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), "HEIC"),
    "a.heif": (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(99), "HEIC"),
    "a.jxl": (b"\xff\x0a" + bytes(99), "JPEG XL"),
    "b.jxl": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(99), "JPEG XL"),
    "a.jp2": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(99), "JPEG 2000"),
    "a.NEF": (encoded(Image.new("RGB", (16, 12)), "TIFF"), "raw"),  # a TIFF with a preview, as such files are
}


@pytest.mark.parametrize("name", UNREAD)
def test_pictures_of_kinds_that_are_not_read_are_said(tmp_path, name):
    (tmp_path / name).write_bytes(UNREAD[name][0])
    (tmp_path / "red.png").write_bytes(encoded(Image.new("RGB", (8, 8))))
    data = load_images(str(tmp_path), default_caption="red")
    assert [e.name for e in data.examples] == ["red.png"]
    assert data.notes == [
        f"left out of {tmp_path}: {name}; HEIC, JPEG XL, JPEG 2000 and raw files are not read; save them as PNG or JPEG"
    ]
    (tmp_path / "red.png").unlink()
    with pytest.raises(UserError, match=rf"no usable picture, but 1 other files \(left out of .*{name}; HEIC"):
        load_images(str(tmp_path), default_caption="red")


@pytest.mark.parametrize("name", UNREAD)
def test_metadata_that_name_one_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(UNREAD[name][0])
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "red"}))
    with pytest.raises(UserError, match=rf"{name} in .* is a {UNREAD[name][1]} picture, which is not read; save it as"):
        load_images(str(tmp_path))


def test_one_may_lie_beside_a_picture_of_its_name(tmp_path):
    for name in ("IMG_1.HEIC", "IMG_2.CR2", "c.psd"):
        (tmp_path / name).write_bytes(b"raw")
        (tmp_path / name).with_suffix(".jpg").write_bytes(encoded(Image.new("RGB", (8, 8)), "JPEG"))
    data = load_images(str(tmp_path), default_caption="red")
    assert ([e.name for e in data.examples], data.ignored_files) == (["IMG_1.jpg", "IMG_2.jpg", "c.jpg"], 3)
    assert data.notes == []


@pytest.mark.parametrize("name", [name for name in UNREAD if UNREAD[name][1] != "raw"])
def test_one_by_the_name_of_a_jpeg_is_known_by_its_bytes(name):
    content, kind = UNREAD[name]
    with pytest.raises(UserError, match=f"is a {kind} picture, which is not read; save it as PNG or JPEG"):
        decode_image(content)
