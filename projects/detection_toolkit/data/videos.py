"""Which files are opened as videos.

OpenCV's decoder goes by a file's content, and some formats that it knows are lists of other files
or addresses (HLS playlists, ``ffconcat``, DASH): a stranger's "video" would choose what is read.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO

from ..errors import UserError
from ..texts import shown

__all__ = ["VIDEO_SUFFIXES", "check_video"]

_FORMATS = {
    "MP4": (".mp4", ".m4v"),
    "MOV": (".mov",),
    "AVI": (".avi",),
    "MKV": (".mkv",),
    "WebM": (".webm",),
    "MPEG": (".mpg", ".mpeg", ".ts", ".mts", ".m2ts"),
    "WMV": (".wmv",),
    "FLV": (".flv",),
    "Ogg": (".ogv",),
    "GIF": (),  # is a picture, where pictures and videos are taken
}
VIDEO_SUFFIXES = tuple(suffix for suffixes in _FORMATS.values() for suffix in suffixes)
"""Of the files that are taken for videos where they may also be pictures."""

# That hold their own frames, whatever their names.
_BEGINNINGS = (
    b"\x1a\x45\xdf\xa3",  # Matroska, WebM
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11",  # WMV, ASF
    b"FLV\x01",
    b"OggS",
    b"GIF87a",
    b"GIF89a",
    b"\x00\x00\x01",  # MPEG, and H.264 and H.265 without a container
    b"\x00\x00\x00\x01",
    b"\xff\xd8\xff",  # Motion JPEG
    b"YUV4MPEG2 ",
)
_QUICKTIME = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot")
_PACKET = 188  # bytes of a packet of an MPEG transport stream, some with a time of four before it
# What FFmpeg looks for anywhere before the first zero byte, whatever a file begins with: DASH, IMF
# and SDP. It looks at 5 MB.
_LISTS = (b"<mpd", b"<compositionplaylist", b"c=in ip")
_LOOKED_AT = 5_000_000


def check_video(path: str | Path) -> None:
    """Refuse what is no file of a container that holds its own frames.

    Raises:
        UserError: it is none.
        OSError: it cannot be read.
    """
    with Path(path).open("rb") as file:
        head = file.read(2 * _PACKET + 8)
        text = _text_at_beginning(file)
    is_known = (
        head.startswith(_BEGINNINGS)
        or head[4:8] in _QUICKTIME
        or (head[:4] == b"RIFF" and head[8:12] == b"AVI ")
        or head[:1] == b"G" == head[_PACKET : _PACKET + 1]
        or head[4:5] == b"G" == head[_PACKET + 8 : _PACKET + 9]
    )
    if not is_known or any(mark in text for mark in _LISTS):
        raise UserError(f"{shown(path)} is no video of a known format ({', '.join(_FORMATS)})")


def _text_at_beginning(file: IO[bytes]) -> bytes:
    """What C takes for a text, in small letters."""
    file.seek(0)
    text = bytearray()
    while len(text) < _LOOKED_AT and (part := file.read(2**16)):
        before, zero, _ = part.partition(b"\0")
        text += before
        if zero:
            break
    return bytes(text).lower()
