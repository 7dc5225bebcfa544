"""Fetches what is too large for the repository, from packages of npm.

    python scripts/fetch_assets.py emoji       # Fluent Emoji 3D with their names, at 64 and 256 pixels
    python scripts/fetch_assets.py detector    # a CenterNet of COCO's classes, for `geneval`
    python scripts/fetch_assets.py faces       # what finds faces and tells them apart, for `face_identity`

The packages are MIT, come through `npm pack` from the registry npm is set to, and must match a checksum.
Rerunning goes on where the last run stopped. Flags are left out: their names say nothing about their looks.
"""

import argparse
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SIZES = (64, 256)
HELD_OUT = 0.05  # share of the names


@dataclass(frozen=True)
class Package:
    """One version of an npm package, by the sha256 of its tarball."""

    name: str
    version: str
    sha256: str

    @property
    def tarball(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


PICTURES = Package(
    "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"
)
NAMES = Package(
    "@emoji-mart/data", "1.2.1", "93899f6e12097a8842fb63d8b84b3d68f7ef2bbe625735a2f5d48bfc33237c2c"
)
HUMAN = Package(
    "@vladmandic/human", "3.3.6", "425e9c51dbbca0c8934362b170cb0d54c2529c11c654b3c03092b16e9d6ad3f7"
)
NETWORKS = {"detector": ("centernet",), "faces": ("blazeface", "facemesh", "faceres")}
USED = {
    "detector": "geneval: {{weight: 1, model: {out}, clip: null}}",
    "faces": "face_identity: {{weight: 1, model: {out}}}",
}


@dataclass(frozen=True)
class Emoji:
    """Its caption, its code points as file names spell them, and what it belongs to."""

    caption: str
    code: str
    category: str


def fetch(package: Package, folder: Path) -> Path:
    """The verified tarball of a package in the folder, downloaded if it is not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / package.tarball
    if not path.exists():
        if shutil.which("npm") is None:
            raise SystemExit(
                f"fetch_assets: npm was not found; install Node.js, or put {package.tarball} "
                f"(npm pack {package.name}@{package.version} on another machine) into {folder}"
            )
        command = ["npm", "pack", "--silent", f"{package.name}@{package.version}"]
        arriving = folder / "arriving"
        arriving.mkdir(exist_ok=True)
        ended = subprocess.run(command, cwd=arriving, capture_output=True, text=True)
        if ended.returncode:
            raise SystemExit(f"fetch_assets: {' '.join(command)} failed:\n{ended.stderr.strip()}")
        os.replace(arriving / package.tarball, path)
        arriving.rmdir()
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise SystemExit(
            f"fetch_assets: {path} has sha256 {found}, expected {package.sha256}; delete it and run again, "
            "and if that does not help the registry does not serve what we trained on"
        )
    return path


def read_names(tarball: Path) -> list[Emoji]:
    """Every emoji but flags, in its default look, in the order of its code."""
    with tarfile.open(tarball) as archive:
        table = json.load(archive.extractfile("package/sets/15/native.json"))
    found = [
        Emoji(
            caption(table["emojis"][key]["name"]), table["emojis"][key]["skins"][0]["unified"], category["id"]
        )
        for category in table["categories"]
        if category["id"] != "flags"
        for key in category["emojis"]
    ]
    return sorted(found, key=lambda emoji: emoji.code)


def caption(name: str) -> str:
    """A name as a prompt: lower case, words and commas alone."""
    words = re.findall(r"[a-z0-9]+|,", name.lower().replace("’", "").replace("'", ""))
    return " ".join(words).replace(" ,", ",")


def split_captions(captions: Sequence[str], seed: int = 0) -> tuple[list[str], list[str]]:
    """Captions for training and held-out ones: of several words, each of which occurs in training."""
    order = sorted(set(captions))
    random.Random(seed).shuffle(order)
    left = Counter(word for text in order for word in text.split())
    held_out: list[str] = []
    for text in order:
        words = text.split()
        if len(held_out) < HELD_OUT * len(order) and len(words) > 1 and all(left[word] > 1 for word in words):
            held_out.append(text)
            left.subtract(words)
    return [text for text in order if text not in held_out], held_out


def write_folders(pictures: Path, emojis: Sequence[Emoji], out: Path) -> None:
    """Writes out/64, out/256 and the lists of prompts; `out` appears only when all is there."""
    from PIL import Image

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tarfile.open(pictures) as archive:
        data = {
            Path(member.name).stem: archive.extractfile(member).read()
            for member in archive
            if member.isfile() and member.name.endswith(".webp")
        }
    # A caption names one picture; what is left over are older codes for the same emoji.
    named = {emoji.caption: emoji for emoji in emojis if emoji.code in data}
    train, held_out = split_captions(list(named))
    split = {**dict.fromkeys(train, "train"), **dict.fromkeys(held_out, "heldout")}
    for size in SIZES:
        folder = partial / str(size)
        folder.mkdir(parents=True)
        with open(folder / "metadata.jsonl", "w", encoding="utf-8") as rows:
            for text, emoji in sorted(named.items()):
                picture = Image.open(io.BytesIO(data[emoji.code])).convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert(
                    "RGB"
                )
                if picture.size != (size, size):
                    picture = picture.resize((size, size), Image.Resampling.LANCZOS)
                file = f"{emoji.code}.png"
                picture.save(folder / file)
                row = {"file_name": file, "text": text, "split": split[text], "category": emoji.category}
                rows.write(json.dumps(row) + "\n")
    for name, prompts in (("train", train), ("heldout", held_out)):
        (partial / f"prompts_{name}.txt").write_text(
            "".join(f"{text}\n" for text in sorted(prompts)), "utf-8"
        )
    os.rename(partial, out)
    print(f"{out}: {len(train)} pictures with prompts for training, {len(held_out)} held out")


def write_networks(tarball: Path, names: Sequence[str], out: Path) -> None:
    """Writes the files of the networks side by side; `out` appears only when all are there."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    files = [f"models/{name}.{kind}" for name in names for kind in ("json", "bin")]
    with tarfile.open(tarball) as archive:
        for name in (*files, "LICENSE"):
            (partial / Path(name).name).write_bytes(archive.extractfile(f"package/{name}").read())
    os.rename(partial, out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("emoji", *NETWORKS), default="emoji")
    parser.add_argument("--out", type=Path, help="folder to write; data/WHAT where left out")
    parser.add_argument("--downloads", type=Path, default=Path("data/downloads"))
    chosen = parser.parse_args()
    out = chosen.out or Path("data") / chosen.what
    if out.exists():
        print(f"{out}: is there already")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    if chosen.what in NETWORKS:
        write_networks(fetch(HUMAN, chosen.downloads), NETWORKS[chosen.what], out)
        print(f"{out}: {USED[chosen.what].format(out=out)}")
    else:
        names = read_names(fetch(NAMES, chosen.downloads))
        write_folders(fetch(PICTURES, chosen.downloads), names, out)


if __name__ == "__main__":
    main()
