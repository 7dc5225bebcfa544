"""Picture files, on the disk or inside a zip: `folder/images.zip/0001.png` is a member of an archive."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


def missing(file: Path | str) -> str | None:
    """Why there is no such picture file, or None where there is one."""
    archive, member = _inside(Path(file))
    if archive is None:
        return None if Path(file).is_file() else f"there is no picture {file}"
    if not zipfile.is_zipfile(archive):
        return f"{archive} is no zip archive"
    with zipfile.ZipFile(archive) as opened:
        return None if member in opened.NameToInfo else f"{archive} holds no {member}"


def open_picture(file: Path | str) -> Image.Image:
    """The picture in RGB, at its own size; ValueError names the file that cannot be read."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(_read(Path(file)))) as picture:
            return picture.convert("RGB")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{file} cannot be read as a picture: {error}") from error


def _read(file: Path) -> bytes:
    archive, member = _inside(file)
    if archive is None:
        return file.read_bytes()
    with zipfile.ZipFile(archive) as opened:
        return opened.read(member)


def _inside(file: Path) -> tuple[Path | None, str]:
    """The zip that a path leads into, and the member's name."""
    for parent in file.parents:
        if parent.suffix == ".zip" and parent.is_file():
            return parent, file.relative_to(parent).as_posix()
    return None, ""
