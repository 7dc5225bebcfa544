"""Picture files, on the disk or inside a zip or tar: `folder/images.zip/0001.png` is a member of an archive.

A video is a folder of frames (on the disk, or inside an archive), a list of frames, or one file.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import tarfile
import zipfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


STILLS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FPS = 24.0  # of a video that does not say, as transformers has it


@dataclass(frozen=True)
class Clip:
    """Where a video lies: a folder of frames, a file, or the files of its frames in their order.

    fps: frames a second; a file says its own.
    """

    place: str | tuple[str, ...]
    fps: float = FPS


def listed(folder: Path, split: str) -> list[Path]:
    """Files of the pictures that a folder's metadata.jsonl names, but for those of another split.

    ValueError where a line is no JSON object, names no file, or one that is missing.
    """
    found = []
    source = folder / "metadata.jsonl"
    for number, line in enumerate(source.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            file = folder / row["file_name"]
        except (ValueError, KeyError, TypeError):
            wrong = "is no JSON object with a 'file_name'"
            raise ValueError(f"{source}, line {number}: {wrong}, got {line[:80]!r}") from None
        if row.get("split", split) != split:
            continue
        if not file.is_file():
            raise ValueError(f"{file}: named in metadata.jsonl, line {number}, but missing")
        found.append(file)
    return found


def asked(extra: Mapping[str, object]) -> str | Clip | None:
    """What a prompt asks about, by its "image" or "video"; None where it has neither."""
    image, video, fps = extra.get("image"), extra.get("video"), extra.get("fps", FPS)
    if isinstance(image, str):
        return image
    if not isinstance(video, str | list) or not isinstance(fps, int | float):
        return None
    return Clip(video if isinstance(video, str) else tuple(map(str, video)), float(fps))


def frames_of(place: str | Sequence[str]) -> list[str] | None:
    """The frames of a video in their order, 2 before 10; None where one file holds them all."""
    if not isinstance(place, str):
        return list(place)
    archive, inside = _inside(Path(place))
    if archive is not None:
        start = inside.rstrip("/") + "/"
        names = [str(archive / name) for name in _members(archive) if name.startswith(start)]
    elif Path(place).is_dir():
        names = [str(path) for path in Path(place).iterdir()]
    else:
        return None
    return sorted((n for n in names if n.lower().endswith(STILLS)), key=_counting)


def missing_video(place: str | Sequence[str]) -> str | None:
    """Why there is no such video, or None where there is one."""
    frames = frames_of(place)
    if frames is None:
        return None if Path(str(place)).is_file() else f"there is no video {place}"
    if not frames:
        return f"the video {place} has no frames ({', '.join(STILLS)})"
    return next(filter(None, map(missing, frames)), None)


def still(extra: Mapping[str, object]) -> Image.Image | None:
    """A picture of what a prompt asks about: a video's frame in the middle; None where that is not known."""
    what = asked(extra)
    if isinstance(what, str):
        return open_picture(what)
    frames = frames_of(what.place) if what is not None else None
    return open_picture(frames[len(frames) // 2]) if frames else None


def _counting(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in names by their value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def missing(file: Path | str) -> str | None:
    """Why there is no such picture file, or None where there is one."""
    archive, member = _inside(Path(file))
    if archive is None:
        return None if Path(file).is_file() else f"there is no picture {file}"
    if not _is_archive(archive):
        return f"{archive} is no {archive.suffix[1:]} archive"
    return None if member in _members(archive) else f"{archive} holds no {member}"


def stills_in(place: Path) -> list[Path]:
    """The picture files in a folder, the folders and tar shards in it, or in one zip or tar, by name."""
    found = list(place.rglob("*")) if place.is_dir() else []
    shards = [path for path in found if path.suffix == ".tar"] if place.is_dir() else [place]
    found += [shard / name for shard in shards if _is_archive(shard) for name in _members(shard)]
    return sorted(path for path in found if path.suffix.lower() in STILLS)


def open_picture(file: Path | str) -> Image.Image:
    """The picture in RGB, at its own size; ValueError names the file that cannot be read."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(_read(Path(file)))) as picture:
            return picture.convert("RGB")
    except (OSError, KeyError, zipfile.BadZipFile, tarfile.TarError) as error:
        raise ValueError(f"{file} cannot be read as a picture: {error}") from error


def in_message(picture: Image.Image) -> str:
    """A picture as a URL that holds all of it, PNG, as chat endpoints take it."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _read(file: Path) -> bytes:
    archive, member = _inside(file)
    if archive is None:
        return file.read_bytes()
    return _opened(archive).read(member)


class _Shard:
    """A tar without compression, by where its members lie; it keeps no file open, so threads may share it."""

    def __init__(self, file: str) -> None:
        self._file = file
        with tarfile.open(file, "r:") as archive:
            self.places = {member.name: (member.offset_data, member.size) for member in archive}

    def read(self, member: str) -> bytes:
        start, size = self.places[member]
        with open(self._file, "rb") as file:
            file.seek(start)
            return file.read(size)


def _is_archive(file: Path) -> bool:
    if file.suffix != ".tar":
        return file.is_file() and zipfile.is_zipfile(file)
    try:
        with tarfile.open(file, "r:"):
            return True
    except (OSError, tarfile.TarError):
        return False


def _members(archive: Path) -> Collection[str]:
    """Names of what an archive holds."""
    opened = _opened(archive)
    return opened.places if isinstance(opened, _Shard) else opened.NameToInfo


def _opened(archive: Path) -> zipfile.ZipFile | _Shard:
    """An archive that is kept open as long as it is the same file: its list of members is long to read."""
    state = archive.stat()
    return _kept_open(str(archive), state.st_mtime_ns, state.st_size, os.getpid())


@lru_cache(maxsize=8)
def _kept_open(archive: str, modified: int, size: int, process: int) -> zipfile.ZipFile | _Shard:
    return _Shard(archive) if archive.endswith(".tar") else zipfile.ZipFile(archive)


def _inside(file: Path) -> tuple[Path | None, str]:
    """The zip or tar that a path leads into, and the member's name."""
    for parent in file.parents:
        if parent.suffix in (".zip", ".tar") and parent.is_file():
            return parent, file.relative_to(parent).as_posix()
    return None, ""
