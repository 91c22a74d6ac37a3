"""Pictures as files hold them, made 8-bit sRGB, upright and framed; what cannot be used rightly is refused.

EXIF rotation and colour profiles are applied, transparency laid on white, and CMYK, palette and 16-bit pictures are
converted.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path, PurePath

import numpy as np
from PIL import AvifImagePlugin, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401 which register
from torch import Tensor

from difftuning_control.data.profiles import in_srgb
from difftuning_control.errors import UserError
from difftuning_control.system.untrusted import MAX_PIXELS, MOST_PIXELS

READING = 3  # how files become pixels, for the keys of caches: by their colour profiles, since 3 also what is clear
# what the extensions stand for; pictures of other kinds Pillow may hand to another program (EPS to Ghostscript)
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF")
BITS, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # tags of a TIFF, and a value of the latter
EXTENSIONS = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif"}
UNREAD = {  # of cameras and browsers, which people take for pictures to tune on
    **dict.fromkeys((".heic", ".heif", ".hif"), "HEIC"),
    ".jxl": "JPEG XL",
    ".jp2": "JPEG 2000",
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"), "raw"),
}
SIGNATURES = {  # from the fifth byte on
    b"ftyphei": "HEIC",
    b"ftyphev": "HEIC",
    b"ftypmif1": "HEIC",
    b"ftypavi": "AVIF",  # where Pillow was built without it
    b"JXL ": "JPEG XL",
    b"jP  ": "JPEG 2000",
}


def refuse_unread(name: str) -> None:
    """Refuse a picture whose name says a kind that is not read; of a raw file Pillow would take the small preview.

    Raises:
        UserError: saying which kind.
    """
    kind = UNREAD.get(PurePath(name).suffix.lower())
    if kind is not None:
        raise UserError(_of_kind(kind))


def unread_among(files: Iterable[Path]) -> list[Path]:
    """Pictures of kinds that are not read, of which no other of the same name is read, in order."""
    known = sorted(files)
    read = {p.with_suffix("") for p in known if p.suffix.lower() in EXTENSIONS}
    return [p for p in known if p.suffix.lower() in UNREAD and p.with_suffix("") not in read]


def _of_kind(kind: str) -> str:
    return f"is a {kind} picture, which is not read; save it as PNG or JPEG"


def decode_image(
    content: bytes, max_pixels: int = MAX_PIXELS, convert: Callable[[Image.Image], Image.Image] | None = None
) -> Image.Image:
    """An encoded picture as 8-bit RGB, upright, on white where it is transparent; or as `convert` makes it.

    Raises:
        UserError: if it is empty, no picture of the known formats, damaged, animated, or has more than `max_pixels`.
    """
    if not content:
        raise UserError("is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata in pictures that are whole
            with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
                if opened.width * opened.height > max_pixels:
                    raise _too_large(opened.width * opened.height, max_pixels)
                # the further frames of a phone's JPEG (MPO) are its previews, depth and gain maps
                if opened.format != "MPO" and (frames := getattr(opened, "n_frames", 1)) > 1:
                    raise UserError(f"is animated ({frames} frames); save the frame you want as a picture")
                opened.load()
                return (convert or to_rgb)(opened)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(_unread(content)) from None
    except Image.DecompressionBombError:
        raise _too_large(MOST_PIXELS + 1, max_pixels) from None
    except Exception as error:  # decoders raise whatever they stumble over
        raise UserError(f"is damaged or of an unsupported kind ({' '.join(str(error).split())})") from None


def _unread(content: bytes) -> str:
    """What is wrong with content of no known format."""
    kind = next((kind for sign, kind in SIGNATURES.items() if content[4:].startswith(sign)), None)
    if kind is None and content.startswith(b"\xff\x0a"):
        kind = "JPEG XL"
    if kind is None:
        return "is not a picture that can be read"
    return _of_kind(kind)


def _too_large(pixels: int, allowed: int) -> UserError:
    if pixels > MOST_PIXELS:
        return UserError(f"has more than {MOST_PIXELS} pixels, expected at most {allowed}; scale it down")
    return UserError(f"has {pixels} pixels, expected at most {allowed} (--data.max_pixels allows more)")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as 8-bit sRGB: upright, on white where it is transparent, 16 bits scaled to 8."""
    return _on(_upright(image), "white").convert("RGB")


def to_grey(image: Image.Image) -> Image.Image:
    """A mask as 8-bit greys: upright, on black where it is transparent, 16 bits scaled to 8."""
    return _on(_upright(image), "black").convert("L")


def opacity(image: Image.Image) -> Image.Image:
    """How opaque a picture is, as 8-bit greys, upright; white where it is nowhere transparent."""
    upright = _upright(image)
    if not upright.has_transparency_data:
        return Image.new("L", upright.size, 255)
    return upright.convert("RGBA").getchannel("A")


def _on(image: Image.Image, colour: str) -> Image.Image:
    """A picture laid on a colour where it is transparent."""
    if not image.has_transparency_data:
        return image
    rgba = image.convert("RGBA")
    ground = Image.new("RGBA", rgba.size, colour)
    ground.alpha_composite(rgba)
    return ground


def _upright(image: Image.Image) -> Image.Image:
    """Any picture upright and in 8-bit sRGB, with its transparency."""
    tags = getattr(image, "tag_v2", {})  # of a TIFF, which an upright copy no longer has
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        image = _to_eight_bit(image, tags.get(BITS, (16,))[0], tags.get(PHOTOMETRIC) == WHITE_IS_ZERO)
    return in_srgb(image)


def _to_eight_bit(image: Image.Image, bits: int, is_negative: bool) -> Image.Image:
    """16-bit, 12-bit and float greys; Pillow's own `convert` clips them instead of scaling.

    Args:
        bits: that each value of the file has.
        is_negative: whether 0 stands for white, which Pillow heeds in 8-bit pictures alone.

    Raises:
        UserError: if values lie outside of what a picture has: depth in metres or normals in −1 to 1 must be scaled
            first.
    """
    values = np.asarray(image).astype(np.float64)
    most, ranges = (255, "0 to 1 or 0 to 255") if image.mode == "F" else (65535, "0 to 255 or 0 to 65535")
    if values.size and not (values.min() >= 0 and values.max() <= most):
        raise UserError(f"has values from {values.min():g} to {values.max():g}; expected {ranges}")
    highest = values.max(initial=0)
    if image.mode == "F":
        full = 1.0 if highest <= 1 else 255.0
    elif image.mode.startswith("I;16"):
        full = 4095.0 if bits == 12 else 65535.0
    else:
        full = 65535.0 if highest > 255 else 255.0
    scaled = (values / full * 255).round().clip(0, 255).astype(np.uint8)
    grey = Image.fromarray(255 - scaled if is_negative else scaled)
    if isinstance(transparent := image.info.get("transparency"), int):  # a value that stands for no colour
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def frame(
    image: Image.Image,
    height: int,
    width: int,
    crop: tuple[float, float] = (0.5, 0.5),
    resample: Image.Resampling = Image.Resampling.LANCZOS,
) -> np.ndarray:
    """Resize until the frame is just covered and crop it at the relative position, (height, width, 3) uint8.

    Args:
        crop: relative position (x, y) of the frame within what is left over, each in [0, 1]; the middle by default.
    """
    size, left, top = placed(image.size, height, width, crop)
    if size == image.size or size[0] * size[1] <= MAX_PIXELS:
        resized = image.resize(size, resample) if size != image.size else image
        return np.array(resized.crop((left, top, left + width, top + height)))  # a copy that may be written to
    # of a narrow strip, whose ends would fill the memory only to be cut off
    across, down = image.width / size[0], image.height / size[1]
    right, bottom = min((left + width) * across, image.width), min((top + height) * down, image.height)
    return np.array(image.resize((width, height), resample, (left * across, top * down, right, bottom)))


def placed(
    size: tuple[int, int], height: int, width: int, crop: tuple[float, float] = (0.5, 0.5)
) -> tuple[tuple[int, int], int, int]:
    """What `frame` does to a picture of (width, height): the size it is resized to, and the crop's left and top."""
    scale = max(height / size[1], width / size[0])
    if scale != 1:
        size = (max(width, round(size[0] * scale)), max(height, round(size[1] * scale)))
    return size, round((size[0] - width) * crop[0]), round((size[1] - height) * crop[1])


def fit_square(image: Image.Image, resolution: int, crop: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """A picture in a square frame, scaled to [-1, 1], (3, resolution, resolution) float32."""
    pixels = frame(image, resolution, resolution, crop).astype(np.float32)
    return np.ascontiguousarray((pixels / 127.5 - 1).transpose(2, 0, 1))


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] to PIL pictures, as diffusers rounds them."""
    return [Image.fromarray(array) for array in to_arrays(pixels)]


def to_arrays(pixels: Tensor) -> np.ndarray:
    """(B, 3, H, W) in [-1, 1] to (B, H, W, 3) uint8, as diffusers rounds them."""
    return ((pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().float().numpy() * 255).round().astype(np.uint8)
