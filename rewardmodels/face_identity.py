"""Whether a picture shows the person of its reference: the largest face of one beside that of the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mmalign.pictures import open_picture
from mmalign.records import Outcome, Prompts, RewardSignal
from mmalign.rewardmodels.faces import Face, Faces
from mmalign.rewardmodels.inputs import extras, pictures, texts


@dataclass(eq=False)
class FaceIdentity:
    """Cosine of the largest face of a picture and of the prompt's `reference_image`; 0 to 1.

    Several references count as one, the mean of their unit descriptors; a prompt without takes the first of
    its `source`. The descriptors hold no negative number, so that no cosine is below 0. A picture without a
    face has 0 and not a missing verdict, or hiding the face would pay; a reference without one is an error.
    """

    model: str = "data/faces"  # folder of the networks that scripts/fetch_assets.py faces brings
    # Score from which something is a face, by both networks that look for them. Lower it for faces in
    # profile or half hidden, raise it where paintings or things pass for faces.
    threshold: float = 0.5
    batch: int = 32  # pictures at once; lower it for less memory
    name = "face_identity"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"face_identity: batch must be at least 1, got {self.batch}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"face_identity: threshold must lie between 0 and 1, got {self.threshold}")
        try:
            self._faces = Faces(Path(self.model), self.threshold)
        except ValueError as error:
            raise ValueError(f"face_identity: model: {error}") from error
        self._known: dict[str, Tensor] = {}

    def read_ahead(self, prompts: Prompts) -> None:
        """Look at the references of all prompts; ValueError names the prompt without, or the file without a
        face."""
        for text, extra in zip(prompts.text, prompts.extra, strict=True):
            self._wanted(text, extra)

    @torch.no_grad()
    def __call__(self, outcome: Outcome) -> RewardSignal:
        values, found = self._judge(pictures(self.name, outcome), outcome)
        details: list[Mapping[str, object]] = [told(faces) for faces in found]
        return RewardSignal(self.name, values[:, None], details=details)

    def differentiate(self, outcome: Outcome) -> Tensor:
        """The cosine [B * views]; gradients reach the media, of each the square around the largest face."""
        return self._judge(pictures(self.name, outcome, graph=True), outcome)[0]

    def _judge(self, images: Tensor, outcome: Outcome) -> tuple[Tensor, list[list[Face]]]:
        """Values [n], and the faces of each picture."""
        self._faces.to(images.device)
        wanted = [
            self._wanted(text, extra) for text, extra in zip(texts(outcome), extras(outcome), strict=True)
        ]
        found = [faces for part in torch.split(images, self.batch) for faces in self._faces.find(part)]
        value = 0 * images.flatten(1)[:, 0]  # of the graph of the pictures, also where none shows a face
        shown = torch.tensor([row for row, faces in enumerate(found) if faces], dtype=torch.int64)
        for rows in torch.split(shown, self.batch) if len(shown) else ():
            boxes = torch.stack([found[row][0].box for row in rows.tolist()])
            rows = rows.to(images.device)
            seen = self._faces.describe(images[rows], boxes)
            like = torch.stack([wanted[row] for row in rows.tolist()]).to(seen)
            value = value.index_put((rows,), (seen * like).sum(1))
        return value, found

    def _wanted(self, text: str, extra: Mapping[str, object]) -> Tensor:
        """The descriptor [1024] of the person that a prompt asks for, of length 1."""
        files = references(extra)
        if not files:
            raise ValueError(f'face_identity: prompt {text!r} names no "reference_image"')
        return F.normalize(torch.stack([self._reference(file) for file in files]).mean(0), dim=0)

    @torch.no_grad()
    def _reference(self, file: str) -> Tensor:
        if file not in self._known:
            import numpy as np

            pixels = torch.from_numpy(np.array(open_picture(Path(file)))).to(self._faces.device)
            picture = pixels.permute(2, 0, 1)[None].float() / 255
            (faces,) = self._faces.find(picture)
            if not faces:
                raise ValueError(
                    f"face_identity: no face is found on the reference {file}; take a picture that shows it "
                    "larger and from the front, or lower threshold"
                )
            self._known[file] = self._faces.describe(picture, faces[0].box[None])[0]
        return self._known[file]


def references(extra: Mapping[str, object]) -> Sequence[str]:
    """Pictures of the person of a prompt: its `reference_image`, one or several, else its first `source`."""
    named = extra.get("reference_image")
    if named is None:
        source = extra.get("source")
        named = source[:1] if isinstance(source, list) else source
    files = [named] if isinstance(named, str) else named
    return files if isinstance(files, list) and all(isinstance(file, str) for file in files) else ()


def told(faces: Sequence[Face]) -> Mapping[str, object]:
    """What is said of a picture: whether there is a face, how many, and of the largest its box and score."""
    if not faces:
        return {"found": False, "faces": 0}
    return {
        "found": True,
        "faces": len(faces),
        "score": faces[0].score,
        "box": [round(float(side), 1) for side in faces[0].box],
    }
