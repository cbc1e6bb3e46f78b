"""One image file to RGB, whatever it holds: grey, palette, alpha, 16 bits, CMYK, rotated by EXIF.

Pillow alone, without torch. What torchvision's decoder reads to the same values, and faster, is
said by `torchvision_agrees`.
"""

import io
import logging
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin

# What counts as an image by its name, in lower case.
SUFFIXES = frozenset(
    [
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".tif", ".tiff"),
        *(".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".pnm"),
    ]
)

# The content decides, not the name. Other formats are not tried: some of Pillow's run programs.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "PPM", TiffImagePlugin.TiffImageFile.format)
_FORMATS += (WebPImagePlugin.WebPImageFile.format,)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF = {"exif", "Raw profile type exif"}  # where Pillow keeps it
_SIDEWAYS = 5  # from this orientation on width and height are exchanged

_JPEG = b"\xff\xd8\xff"
_APP1 = b"\xff\xe1"
_HEADER = 1 << 17  # of a JPEG: two segments of the greatest length
THINNEST = 64

# Pillow logs damaged tags; without a handler Python would print them.
logging.getLogger("PIL").addHandler(logging.NullHandler())


class BadImage(ValueError):
    """A file that is no whole image. Its text goes on from the path: "is truncated"."""


def decode(path: str | Path) -> Image.Image:
    """The image in a file, mode RGB, upright.

    - Opaque 8-bit RGB comes out as Pillow decodes it; colour profiles are not applied.
    - EXIF orientation is applied. An orientation in XMP alone is not: torchvision and web
      browsers do not read it.
    - Grey and 1 bit are repeated to three channels, palettes are looked up, CMYK is converted.
    - What is transparent is laid on white, the page that cut-out images are made for. Opaque
      pixels keep their values.
    - 16 bits keep their high byte, as Pillow does for 16-bit colour. 32-bit integers and
      floating point have no agreed range: they pass within 0 .. 65535 and 0 .. 1, and are
      refused beyond.
    - Of an animation the first frame is taken.

    Raises:
        BadImage: missing, not readable, empty, truncated, no image, or too many pixels.
    """
    return decode_bytes(read(path)[0])


def read(path: str | bytes | Path) -> tuple[bytes, os.stat_result]:
    """The bytes of a file, and its size and times from before they were read.

    Raises:
        BadImage: missing, not readable, or no regular file.
    """
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise BadImage("is a folder")
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise BadImage("is no regular file")
        with open(path, "rb", buffering=0) as file:
            return file.readall(), status
    except (FileNotFoundError, NotADirectoryError):
        raise BadImage("is missing") from None
    except OSError as error:
        raise BadImage(f"cannot be read ({error.strerror or error})") from error


def decode_bytes(content: bytes) -> Image.Image:
    """As `decode`, of the bytes of a file.

    Raises:
        BadImage: as there.
    """
    with _opened(content) as image:
        _load(image)
        turn = _TURNS.get(_orientation(image))
        return _rgb(image if turn is None else image.transpose(turn))


def displayed_size(content: bytes) -> tuple[int, int]:
    """Width and height of the upright image, decoded through once so that damage is found.

    A JPEG is decoded to grey at an eighth of its size, which reads all of its data as well.

    Raises:
        BadImage: as `decode`.
    """
    if not content.startswith(_JPEG):
        return decode_bytes(content).size
    with _opened(content) as image:
        size = image.size
        image.draft("L", (1, 1))
        image.load()
        return size[::-1] if _orientation(image) >= _SIDEWAYS else size


def torchvision_agrees(content: bytes) -> bool:
    """Whether torchvision reads this JPEG to the values of `decode_bytes`.

    That is `torchvision.io.decode_image` with mode RGB and `apply_exif_orientation`. It looks for
    the orientation in the first APP1 segment alone; where XMP lies there it misses EXIF.
    """
    return content.startswith(_JPEG) and content.count(_APP1, 0, _HEADER) < 2


def square(image: Image.Image, size: int) -> np.ndarray:
    """The centre of an image, uint8 [size, size, 3]; unchanged where it has that size.

    The shorter side is resized to `size`, bilinear and antialiased, then the centre is cropped:
    to the value what torchvision's v2.Resize and v2.CenterCrop give for a PIL image. One that is
    thinner than 1 : 64 loses its ends first, since resized it could be larger than memory.
    """
    width, height = image.size
    short = min(width, height)
    if max(width, height) > THINNEST * short:
        return square(
            _centre(image, min(width, THINNEST * short), min(height, THINNEST * short)), size
        )
    if short != size:  # the longer side is truncated, as in v2.Resize
        shape = int(size * width / short), int(size * height / short)
        image = image.resize(shape, Image.Resampling.BILINEAR)
    return np.array(_centre(image, size, size))


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    """The centre; where the margins are not equal, rounded to even as in v2.CenterCrop."""
    if image.size == (width, height):
        return image
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


@contextmanager
def _opened(content: bytes) -> Iterator[Image.Image]:
    """The image in `content`; whatever goes wrong inside is a BadImage, and nothing is printed."""
    if not content:
        raise BadImage("is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                yield image
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("is no image") from None
    except Image.DecompressionBombError:
        raise BadImage(f"has more than {2 * Image.MAX_IMAGE_PIXELS:,} pixels") from None
    except MemoryError:
        raise BadImage("does not fit in memory when decoded") from None
    except Exception as error:  # Pillow's decoders raise a dozen kinds on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        if "truncated" in reason.lower():
            raise BadImage("is truncated") from error
        raise BadImage(f"does not decode ({reason})") from error


def _load(image: Image.Image) -> None:
    """Decode the pixels. libtiff writes to the screen by itself, past Python: that is kept off."""
    if image.format != "TIFF":
        image.load()
        return
    screen = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        image.load()
    finally:
        os.dup2(screen, 2)
        os.close(screen)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of a loaded image, 1 .. 8; 1 is upright, and where nothing is said.

    Pillow has turned a TIFF already.
    """
    if not _EXIF & image.info.keys():  # Pillow would look into XMP
        return 1
    for xmp in ("xmp", "XML:com.adobe.xmp"):
        image.info.pop(xmp, None)
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF is none, as for torchvision
        return 1
    return found if found in _TURNS else 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB") if image.mode != "RGB" else image
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as grey of 8 bits, by the rules of `decode`."""
    values = np.asarray(image)
    if image.mode == "F":
        if not (values.min() >= 0 and values.max() <= 1):  # refuses NaN as well
            raise BadImage("has floating-point pixels outside 0 .. 1")
        return Image.fromarray(np.rint(255 * values).astype(np.uint8))
    if values.min() < 0 or values.max() > 65535:
        raise BadImage("has integer pixels outside 0 .. 65535")
    grey = (values >> 8).astype(np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[values == transparent] = 255
    return Image.fromarray(grey)
