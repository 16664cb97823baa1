"""From the bytes of a file to its text: compression and encoding."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zipfile
import zlib
from pathlib import PurePosixPath

from distillery.errors import UserError

DECOMPRESS = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}
BYTE_ORDER_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
SAMPLE = 4096  # bytes at the start of a file that show whether it is UTF-16
MAX_IMPLAUSIBLE = 0.02  # share of the characters beyond ASCII
ENCODINGS = "cp1252 (Western Europe), cp1250 (Central Europe), cp1251 (Cyrillic), gb18030, shift_jis, mac_roman, …"


def decompress(name: str, content: bytes) -> tuple[str, bytes]:
    """The name and content of the file inside a .gz, .bz2, .xz or .zip file; other files as they are.

    Raises UserError when it is damaged, or an archive of several files.
    """
    suffix = PurePosixPath(name).suffix.lower()
    try:
        if suffix in DECOMPRESS:
            return name[: -len(suffix)], DECOMPRESS[suffix](content)
        if suffix != ".zip":
            return name, content
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [member for member in archive.namelist() if not _is_hidden(member)]
            if len(members) != 1:
                shown = ", ".join(members[:5]) or "none"
                raise UserError(f"{name}: {len(members)} files inside ({shown}); needs exactly one: unpack the archive")
            return members[0], archive.read(members[0])
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile):
        raise UserError(f"{name}: not a {suffix} file, or damaged") from None
    except (RuntimeError, NotImplementedError):
        raise UserError(f"{name}: needs a password, or is packed in an unknown way: unpack it") from None


def _is_hidden(member: str) -> bool:
    """Whether a member of an archive is a folder, or a hidden file such as those that macOS adds."""
    return member.endswith("/") or any(part.startswith((".", "__MACOSX")) for part in member.split("/"))


def decode(name: str, content: bytes, encoding: str | None = None) -> tuple[str, str | None]:
    """The text of a file, and what was decided on its encoding, where it is not UTF-8.

    Without `encoding`: by the byte order mark; UTF-8 where the bytes allow; UTF-16 where every other byte is zero;
    cp1252 where that gives plausible words of Western Europe. Raises UserError for anything else, naming the line.
    """
    mark = next((mark for mark in BYTE_ORDER_MARKS if content.startswith(mark)), b"")
    shown_encoding = BYTE_ORDER_MARKS.get(mark) or _wide_encoding(content)
    chosen = encoding or shown_encoding or "utf-8"
    try:
        text = content.decode(chosen).removeprefix("\ufeff")
        return text, None if encoding or chosen == "utf-8" else _decision(chosen)
    except UnicodeDecodeError as error:
        place = _place(name, content, error.start)
        if encoding:
            raise UserError(f"{place} is not {encoding}, which `encoding` names") from None
        western = None if shown_encoding else _western_text(content)
        if western is None:
            raise UserError(
                f"{place} is not UTF-8; save the file as UTF-8, or name its encoding: `encoding:` {ENCODINGS}"
            ) from None
        return western, _decision("cp1252")


def _place(name: str, content: bytes, offset: int) -> str:
    line = content.count(b"\n", 0, offset) + 1
    return f"{name}, line {line}: byte 0x{content[offset]:02x} at offset {offset}"


def _decision(encoding: str) -> str:
    return f"The encoding of the file is taken for {encoding}; `encoding:` names another."


def _wide_encoding(content: bytes) -> str | None:
    """UTF-16 without a mark: most of its characters are ASCII, so that every other byte is zero."""
    sample = content[:SAMPLE]
    zeros = [sample[start::2].count(0) / max(1, len(sample) // 2) for start in (0, 1)]
    if len(content) % 2 == 0 and max(zeros) > 0.5 and min(zeros) < 0.1:
        return "utf-16-le" if zeros[1] > zeros[0] else "utf-16-be"
    return None


def _western_text(content: bytes) -> str | None:
    """`content` in cp1252, or None where that gives no plausible words.

    Text in another encoding of one byte a character gives runs of accented letters (Cyrillic, Greek), signs inside
    words (Central Europe, DOS, old Macintosh) or capitals after small letters.
    """
    try:
        text = content.decode("cp1252")
    except UnicodeDecodeError:
        return None
    special = len(re.findall(r"[^\x00-\x7f]", text))
    runs = sum(map(len, re.findall(r"[^\W\d_a-zA-Z]{3,}", text)))
    signs = len(re.findall(r"(?<=[^\W\d_])[^\w\x00-\x7f’‘·\xad](?=[^\W\d_])", text))
    signs += len(re.findall(r"(?<=[^\W\d_])[¹²³ªº¼½¾„‚ˆ¿¡]", text))
    capitals = len(re.findall(r"(?<=[a-zà-öø-ÿ])[À-ÖØ-ÞŠŽŒŸƒ]", text))
    controls = len(re.findall(r"[\x00-\x08\x0e-\x1f]", text))
    return text if controls == 0 and runs + signs + capitals <= MAX_IMPLAUSIBLE * special else None
