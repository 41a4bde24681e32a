"""Pictures as they come, and what becomes of each."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 48, 64


class Case(NamedTuple):
    """A file, and what the code makes of it."""

    name: str
    """Of the file."""
    write: Callable[[Path], None]
    size: tuple[int, int]
    """(height, width) as it is used."""
    refused: str | None = None
    """Part of the message where it is not used."""


def gradient(height=HEIGHT, width=WIDTH):
    """(H, W) uint8, darker at the left; no two columns of the first 64 alike."""
    return np.tile((np.arange(width) * 4 % 256).astype(np.uint8), (height, 1))


def rgb(height=HEIGHT, width=WIDTH):
    return Image.fromarray(gradient(height, width)).convert("RGB")


def encoded(image, extension, **options):
    file = io.BytesIO()
    image.save(file, extension, **options)
    return file.getvalue()


def mode(name, extension, **options):
    def write(path):
        image = rgb().quantize() if name == "P" else rgb().convert(name)
        path.write_bytes(encoded(image, extension, **options))

    return write


def sixteen_bits(path):
    Image.fromarray(gradient().astype(np.uint16) * 257).save(path)


def sixteen_bits_of_three_channels(path):
    import cv2

    image = np.repeat(gradient()[..., None].astype(np.uint16) * 257, 3, 2)
    path.write_bytes(cv2.imencode(".png", image)[1].tobytes())


def floating_point(path):
    Image.fromarray(gradient().astype(np.float32) / 255).save(path)


def thirty_two_bits(path):
    Image.fromarray(gradient().astype(np.int32) * 10**6).save(path)


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by 90 degrees to show
    rgb().transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)


def broken_exif(path):
    path.write_bytes(
        encoded(rgb(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xffnonsense", quality=95)
    )


def plain(height=HEIGHT, width=WIDTH, extension="PNG"):
    def write(path):
        path.write_bytes(encoded(rgb(height, width), extension))

    return write


def animated(path):
    pictures = [rgb(), Image.new("RGB", (WIDTH, HEIGHT), "red")]
    pictures[0].save(path, "GIF", save_all=True, append_images=pictures[1:])


def part_of(share, extension="JPEG"):
    def write(path):
        content = encoded(rgb(200, 300), extension)
        path.write_bytes(content[: int(share * len(content))])

    return write


def content(data):
    return lambda path: path.write_bytes(data)


def bomb(path):
    """A PNG of some hundred bytes that claims to be 20,000 pixels wide and high."""
    content = bytearray(encoded(Image.new("1", (8, 8)), "PNG"))
    content[16:24] = struct.pack(">II", 20000, 20000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def folder(path):
    path.mkdir()


CASES = [
    Case("grey.png", mode("L", "PNG"), (HEIGHT, WIDTH)),
    Case("grey-alpha.png", mode("LA", "PNG"), (HEIGHT, WIDTH)),
    Case("palette.png", mode("P", "PNG"), (HEIGHT, WIDTH)),
    Case("palette-transparent.png", mode("P", "PNG", transparency=3), (HEIGHT, WIDTH)),
    Case("rgba.png", mode("RGBA", "PNG"), (HEIGHT, WIDTH)),
    Case("cmyk.jpg", mode("CMYK", "JPEG", quality=95), (HEIGHT, WIDTH)),
    Case("ycbcr.jpg", mode("YCbCr", "JPEG", quality=95), (HEIGHT, WIDTH)),
    Case("sixteen-bits.png", sixteen_bits, (HEIGHT, WIDTH)),
    Case("sixteen-bits.tif", sixteen_bits, (HEIGHT, WIDTH)),
    Case("sixteen-bits-colour.png", sixteen_bits_of_three_channels, (HEIGHT, WIDTH)),
    Case("rotated.jpg", rotated, (HEIGHT, WIDTH)),
    Case("broken-exif.jpg", broken_exif, (HEIGHT, WIDTH)),
    Case("animated.gif", animated, (HEIGHT, WIDTH)),
    Case("wrong-extension.png", plain(extension="JPEG"), (HEIGHT, WIDTH)),
    Case("no-extension", plain(), (HEIGHT, WIDTH)),
    Case("with spaces .png", plain(), (HEIGHT, WIDTH)),
    Case("grün ☃ 画像.png", plain(), (HEIGHT, WIDTH)),
    Case("new\nline.png", plain(), (HEIGHT, WIDTH)),
    Case("percent%20{}.png", plain(), (HEIGHT, WIDTH)),
    Case("one-pixel.png", plain(1, 1), (1, 1)),
    Case("wide.png", plain(30, 20000), (30, 20000)),
    Case("floating-point.tif", floating_point, (HEIGHT, WIDTH), "no known range"),
    Case("thirty-two-bits.tif", thirty_two_bits, (HEIGHT, WIDTH), "no known range"),
    Case("truncated.jpg", part_of(0.6), (200, 300), "truncated"),
    Case("truncated.png", part_of(0.6, "PNG"), (200, 300), "truncated"),
    Case("header-only.jpg", part_of(0.02), (200, 300), "Truncated"),
    Case("empty.jpg", content(b""), (HEIGHT, WIDTH), "cannot identify"),
    Case("a-page.jpg", content(b"<html>404</html>"), (HEIGHT, WIDTH), "cannot identify"),
    Case("a-folder.jpg", folder, (HEIGHT, WIDTH), "IsADirectoryError"),
    Case("bomb.png", bomb, (20000, 20000), "limit of"),
]
USED = [case for case in CASES if case.refused is None]
REFUSED = [case for case in CASES if case.refused is not None]
