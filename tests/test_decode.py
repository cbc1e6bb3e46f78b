import io
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2

from ltnorm.data.decode import (
    SUFFIXES,
    BadImage,
    decode,
    decode_bytes,
    displayed_size,
    square,
    torchvision_agrees,
)

ORIENTATION = 0x0112
# By the EXIF standard: where row 0 and column 0 of the stored image lie in the upright one.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def picture(width=30, height=20, seed=0):
    """A smooth random image, so that JPEG keeps most of it."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(2))


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def exif(orientation, endian="<"):
    found = Image.Exif()
    found.endian = endian
    found[ORIENTATION] = orientation
    return found.tobytes()


def values(content):
    image = decode_bytes(content)
    assert image.mode == "RGB"
    assert displayed_size(content) == image.size
    return np.asarray(image)


def grey(array):
    return np.repeat(np.asarray(array, np.uint8)[..., None], 3, axis=2)


def torchvision_values(content):
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    image = decode_image(data, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    return image.permute(1, 2, 0).numpy()


RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "JPEG", "WEBP", "GIF"])
def test_opaque_colour_is_what_pillow_gives(format):
    content = encoded(picture(), format)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert np.array_equal(values(content), expected)
    if format in ("PNG", "BMP", "TIFF", "PPM"):
        assert np.array_equal(expected, np.asarray(picture()))


def test_grey_one_bit_and_palette_are_their_colours():
    assert np.array_equal(values(encoded(Image.fromarray(RAMP), "PNG")), grey(RAMP))
    bits = Image.fromarray(RAMP > 100)
    assert np.array_equal(values(encoded(bits, "PNG")), grey(255 * (RAMP > 100)))
    palette = picture().quantize(16)
    assert palette.mode == "P"
    assert np.array_equal(values(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize(
    ("dtype", "format"),
    [(np.uint16, "PNG"), (np.uint16, "TIFF"), (">u2", "TIFF"), (np.int32, "TIFF")],
)
def test_sixteen_bits_are_scaled_not_clipped(dtype, format):
    # 257 v is the 16-bit value that shows as v; what lies between shows as one of its neighbours.
    deep = (257 * RAMP.astype(np.int64)).astype(dtype)
    content = encoded(Image.fromarray(deep), format)
    assert Image.open(io.BytesIO(content)).mode.startswith("I")
    assert np.array_equal(values(content), grey(RAMP))
    between = np.arange(0, 65536, 13)[:5000].reshape(50, 100).astype(dtype)
    error = values(encoded(Image.fromarray(between), format)) - between[..., None] / 257
    assert np.abs(error).max() <= 1


def test_sixteen_bits_in_a_pgm():
    content = b"P5 16 16 65535\n" + (257 * RAMP.astype(">u2")).astype(">u2").tobytes()
    assert np.array_equal(values(content), grey(RAMP))


def test_floating_point_within_one_is_scaled_and_else_refused():
    unit = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    assert np.array_equal(values(encoded(Image.fromarray(unit), "TIFF")), grey(RAMP))
    for factor in (1.01, -1, np.nan):
        content = encoded(Image.fromarray(np.float32(factor) * unit), "TIFF")
        for read in (decode_bytes, displayed_size):
            with pytest.raises(BadImage, match="floating-point"):
                read(content)
    deep = encoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF")
    with pytest.raises(BadImage, match="65535"):
        decode_bytes(deep)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_alpha_is_laid_on_white(format):
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    colour = np.asarray(picture(16, 16))
    image = np.dstack([colour, RAMP])
    found = values(encoded(Image.fromarray(image), format, **options)).astype(float)
    part = RAMP[..., None] / 255
    assert np.abs(found - (part * colour + (1 - part) * 255)).max() <= 0.51
    assert (found[RAMP == 0] == 255).all()
    opaque = encoded(Image.fromarray(np.dstack([colour, np.full_like(RAMP, 255)])), format)
    if format != "WEBP":
        assert np.array_equal(values(opaque), colour)


def test_other_kinds_of_transparency():
    half = np.dstack([RAMP, np.where(RAMP < 128, 0, 255)]).astype(np.uint8)
    expected = grey(np.where(RAMP < 128, 255, RAMP))
    assert np.array_equal(values(encoded(Image.fromarray(half, "LA"), "PNG")), expected)

    palette = picture().quantize(8)
    index = np.asarray(palette)
    on_white = np.array(palette.convert("RGB"))
    on_white[index == 3] = 255
    assert (index == 3).any()
    for format in ("PNG", "GIF"):
        assert np.array_equal(values(encoded(palette, format, transparency=3)), on_white)
    several = bytes([255, 255, 255, 0, 0])
    on_white[index == 4] = 255
    assert np.array_equal(values(encoded(palette, "PNG", transparency=several)), on_white)

    image = Image.new("RGB", (4, 4), (1, 2, 3))
    image.putpixel((0, 0), (9, 9, 9))
    found = values(encoded(image, "PNG", transparency=(1, 2, 3)))
    assert found[0, 0].tolist() == [9, 9, 9]
    assert (found[1:] == 255).all()

    deep = Image.fromarray(np.array([[0, 257], [514, 771]], np.uint16))
    found = values(encoded(deep, "PNG", transparency=514))
    assert found[..., 0].tolist() == [[0, 1], [255, 3]]


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_exif_orientation(orientation, format):
    options = {"exif": exif(orientation)} | ({"lossless": True} if format == "WEBP" else {})
    if format == "TIFF":
        options = {"tiffinfo": {ORIENTATION: orientation}}
    stored = picture()
    if format == "JPEG":  # what was stored is what the same file without EXIF holds
        stored = Image.open(io.BytesIO(encoded(stored, "JPEG")))
    found = values(encoded(picture(), format, **options))
    assert np.array_equal(found, UPRIGHT[orientation](np.asarray(stored)))


def test_damaged_exif_and_xmp_turn_nothing():
    plain = np.asarray(Image.open(io.BytesIO(encoded(picture(), "JPEG"))))
    for bad in (b"Exif\0\0rubbish", b"Exif\0\0II*\0\xff\xff\xff\xff", exif(6)[:-7], exif(11)):
        assert np.array_equal(values(encoded(picture(), "JPEG", exif=bad)), plain)
    assert np.array_equal(values(encoded(picture(), "JPEG", xmp=XMP)), plain)


def test_an_animation_is_its_first_frame():
    frames = [picture(seed=i).quantize(16) for i in range(3)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(content)).n_frames == 3
    assert np.array_equal(values(content), np.asarray(frames[0].convert("RGB")))


XMP = b'<rdf:Description tiff:Orientation="6"/>'


def jpegs():
    """Ordinary JPEGs by name."""
    for mode in ("RGB", "L", "CMYK"):
        for i, options in enumerate(({}, {"progressive": True}, {"quality": 40})):
            yield f"{mode}{i}", encoded(picture(61, 43).convert(mode), "JPEG", **options)
        yield f"{mode} turned", encoded(picture(61, 43).convert(mode), "JPEG", exif=exif(6))
    for subsampling in (0, 1, 2):
        yield f"4:x:x {subsampling}", encoded(picture(33, 47), "JPEG", subsampling=subsampling)
    for orientation in range(10):
        for endian in "<>":
            content = encoded(picture(), "JPEG", exif=exif(orientation, endian))
            yield f"exif {orientation}{endian}", content
    yield "rgb", encoded(picture(), "JPEG", keep_rgb=True)
    yield "xmp", encoded(picture(), "JPEG", xmp=XMP)
    cmyk = bytearray(encoded(picture().convert("CMYK"), "JPEG"))
    cmyk[cmyk.index(b"Adobe") + 11] = 2  # the colour transform of the Adobe segment: YCCK
    yield "YCCK", bytes(cmyk)


@pytest.mark.parametrize("content", [pytest.param(c, id=name) for name, c in jpegs()])
def test_torchvision_reads_jpegs_to_the_same_values(content):
    assert torchvision_agrees(content)
    assert np.array_equal(torchvision_values(content), values(content))


def test_where_torchvision_does_not_agree_it_is_said():
    # It looks into the first APP1 segment alone, and here that is not EXIF.
    content = encoded(picture(), "JPEG", exif=exif(6))
    xmp = b"http://ns.adobe.com/xap/1.0/\0<x/>"
    both = content[:2] + b"\xff\xe1" + struct.pack(">H", len(xmp) + 2) + xmp + content[2:]
    assert np.array_equal(values(both), values(content))
    assert not np.array_equal(torchvision_values(both).shape, values(both).shape)
    assert not torchvision_agrees(both)
    assert not torchvision_agrees(encoded(picture(), "PNG"))


def damaged():
    """Files that are no whole images: name, content, what is said."""
    for format in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "PPM", "WEBP"):
        content = encoded(picture(200, 150), format)
        yield f"half a {format}", content[: len(content) // 2], ""
        yield f"the head of a {format}", content[:12], ""
    progressive = encoded(picture(200, 150), "JPEG", progressive=True)
    for cut in (1, 2, 10, 400):
        yield f"progressive JPEG - {cut}", progressive[:-cut], "is truncated"
        yield f"JPEG - {cut}", encoded(picture(200, 150), "JPEG")[:-cut], "is truncated"
    lzw = bytearray(encoded(picture(), "TIFF", compression="tiff_lzw"))
    lzw[20:600] = bytes(580)
    yield "LZW", bytes(lzw), ""
    yield "empty", b"", "is empty"
    yield "text", b"<html>404 not found</html>", "is no image"
    yield "PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image"
    yield "bomb", b"P6 60000 60000 255\n", "has more than 178,956,970 pixels"


@pytest.mark.parametrize(
    ("content", "reason"), [pytest.param(c, reason, id=name) for name, c, reason in damaged()]
)
def test_what_is_no_whole_image_is_refused_without_a_word_on_the_screen(content, reason, capfd):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for read in (decode_bytes, displayed_size):
            with pytest.raises(BadImage) as error:
                read(content)
            assert reason in str(error.value)
            assert "\n" not in str(error.value)
    assert not told
    assert capfd.readouterr() == ("", "")


def test_a_large_image_is_no_warning(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decode_bytes(encoded(picture(30, 20), "PNG")).size == (30, 20)
        with pytest.raises(BadImage, match="more than 1,000 pixels"):
            decode_bytes(encoded(picture(40, 30), "PNG"))


def test_files_are_read_by_content_and_reasons_are_short(tmp_path):
    file = tmp_path / "a, 'ü'.JPEG"
    file.write_bytes(encoded(picture(), "PNG"))
    assert file.suffix.lower() in SUFFIXES
    assert np.array_equal(np.asarray(decode(file)), np.asarray(picture()))
    assert np.array_equal(np.asarray(decode(str(file))), np.asarray(picture()))
    for path, reason in (
        (tmp_path / "none.jpg", "is missing"),
        (file / "below.jpg", "is missing"),
        (tmp_path, "is a folder"),
        ("/dev/null", "is no regular file"),
        (tmp_path / ("x" * 300), "cannot be read"),
    ):
        with pytest.raises(BadImage, match=reason):
            decode(path)


@pytest.mark.parametrize("size", [1, 8, 33, 64])
def test_square_is_resize_and_centre_crop_of_torchvision(size):
    rng = np.random.default_rng(size)
    shapes = [(size, size), (size, size + 5), (2 * size + 1, size), *rng.integers(5, 90, (30, 2))]
    for width, height in shapes:
        image = picture(int(width), int(height))
        expected = v2.CenterCrop(size)(v2.Resize(size)(image))
        assert np.array_equal(square(image, size), np.asarray(expected)), (width, height)
    same = picture(size, size)
    assert np.array_equal(square(same, size), np.asarray(same))


def test_a_thin_image_does_not_fill_the_memory():
    thin = Image.new("RGB", (60_000, 1), (1, 2, 3))  # resized: 224 rows of 13 million pixels
    assert (square(thin, 224) == [1, 2, 3]).all()
    assert square(thin.transpose(Image.Transpose.ROTATE_90), 224).shape == (224, 224, 3)
