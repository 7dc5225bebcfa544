"""Captioned pictures: drawn from the lab, a folder with metadata.jsonl, or webdataset shards."""

import io
import json
import random
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmalign.lab.scenes import Scene

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Captioned:
    """pictures: uint8 [N, size, size, 3], with one caption each."""

    pictures: Tensor
    captions: list[str]

    def __post_init__(self) -> None:
        if len(self.pictures) != len(self.captions) or not self.captions:
            raise ValueError(
                f"Captioned: got {len(self.pictures)} pictures and {len(self.captions)} captions"
            )

    @classmethod
    def of(cls, pairs: Sequence[tuple[np.ndarray, str]]) -> "Captioned":
        return cls(torch.from_numpy(np.stack([picture for picture, _ in pairs])), [text for _, text in pairs])


@dataclass(frozen=True)
class Styled:
    """pictures: uint8 [N, 64, 64, 3], with captions, styles, scenes and kinds of damage ("" for none)."""

    pictures: Tensor
    captions: list[str]
    styles: list[str]
    scenes: list[Scene]
    damage: list[str]


def draw_lab(count: int, seed: int) -> Captioned:
    """Training scenes of the lab with their prompts; nothing held out is among them."""
    from mmalign.lab import training_pair

    rng = random.Random(f"pretrain {seed}")
    return Captioned.of([training_pair(rng, split="train") for _ in range(count)])


def draw_styled(count: int, seed: int, split: str = "train", damaged: float = 0.0) -> Styled:
    """Scenes of the lab, half of them in another style than plain, a share of them damaged.

    The style stands at the end of every other caption that could name one.
    """
    from mmalign.lab import compose, render, sample_task, write_prompt
    from mmalign.lab.corruptions import SEEN, corrupt
    from mmalign.lab.render import STYLES

    rng, draws = random.Random(f"styled {split} {seed}"), np.random.default_rng(seed)
    pictures, captions, styles, scenes, damage = [], [], [], [], []
    for _ in range(count):
        task = sample_task(rng, split=split)
        scene, style = compose(task, rng), rng.choice(STYLES) if rng.random() < 0.5 else STYLES[0]
        picture, kind = render(scene, style=style), ""
        if rng.random() < damaged:
            kind = rng.choice(SEEN)
            picture = (255 * corrupt(picture / 255, kind, draws).picture).round().astype(np.uint8)
        told = style != STYLES[0] and rng.random() < 0.5
        pictures.append(picture)
        captions.append(write_prompt(task) + (f", {style}" if told else ""))
        styles.append(style)
        scenes.append(scene)
        damage.append(kind)
    return Styled(torch.from_numpy(np.stack(pictures)), captions, styles, scenes, damage)


def read_captioned(source: Path, size: int, split: str | None = "train") -> Captioned:
    """Every picture of a folder or of one .tar shard, cropped to its middle square and resized.

    A folder holds metadata.jsonl, each line with "file_name" and "text", or .tar shards with a picture and
    a .txt or .json ("text" or "caption") of the same name. Rows that state another "split" are left out.
    """
    if source.is_dir() and (source / "metadata.jsonl").exists():
        found = _folder(source, split)
    else:
        shards = [source] if source.suffix == ".tar" else sorted(source.glob("*.tar"))
        if not shards:
            raise ValueError(f"{source}: expected a metadata.jsonl or .tar shards")
        found = (pair for shard in shards for pair in _shard(shard, split))
    pairs = [(decode(name, data, size), caption) for name, data, caption in found]
    if not pairs:
        raise ValueError(f"{source}: holds no captioned picture of split {split!r}")
    return Captioned.of(pairs)


def decode(name: str, data: bytes, size: int) -> np.ndarray:
    """The middle square of a picture, on white where it is transparent, uint8 [size, size, 3]."""
    from PIL import Image

    try:
        picture = Image.open(io.BytesIO(data)).convert("RGBA")
    except Exception as error:
        raise ValueError(f"{name}: is not a readable picture ({error})") from error
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    square = picture.crop((left, top, left + side, top + side))
    return np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))


def listed(folder: Path, split: str | None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The pictures that a folder's metadata.jsonl names, with their rows; those of another split left out."""
    for number, line in enumerate((folder / "metadata.jsonl").read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{folder / 'metadata.jsonl'}, line {number}: is not JSON ({error})") from error
        if split and row.get("split", split) != split:
            continue
        if "file_name" not in row:
            raise ValueError(f"{folder / 'metadata.jsonl'}, line {number}: has no 'file_name'")
        path = folder / row["file_name"]
        if not path.exists():
            raise ValueError(f"{path}: named in metadata.jsonl, line {number}, but missing")
        yield path, row


def _folder(folder: Path, split: str | None) -> Iterator[tuple[str, bytes, str]]:
    for path, row in listed(folder, split):
        yield str(path), path.read_bytes(), _caption(str(path), row)


def _shard(shard: Path, split: str | None) -> Iterator[tuple[str, bytes, str]]:
    """Members of one name up to its first dot belong together."""
    samples: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(shard) as archive:
            for member in archive:
                if (file := archive.extractfile(member)) is not None:
                    folder, slash, name = member.name.rpartition("/")
                    key, _, extension = name.partition(".")
                    samples.setdefault(folder + slash + key, {})["." + extension.lower()] = file.read()
    except tarfile.TarError as error:
        raise ValueError(f"{shard}: is not a readable tar ({error})") from error
    for key, parts in samples.items():
        name = f"{shard}: {key}"
        extension = next((extension for extension in PICTURES if extension in parts), "")
        if not extension:
            raise ValueError(f"{name}: has no picture, only {sorted(parts)}")
        try:
            row = json.loads(parts.get(".json", b"{}"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}.json: is not JSON ({error})") from error
        if ".txt" in parts:
            row["text"] = parts[".txt"].decode("utf-8").strip()
        if not split or row.get("split", split) == split:
            yield name + extension, parts[extension], _caption(name + extension, row)


def _caption(name: str, row: dict[str, Any]) -> str:
    text = row.get("text", row.get("caption"))
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name}: has no caption, expected a 'text' that is not empty")
    return text.strip()
