"""An artifact detector: a tower and two small heads, taught what damage looks like and where it is.

    places   l_j = h(f_j)                              is there damage at place j?
    whole    l   = g(f_0) + a log mean_j exp(l_j) + b  is there damage anywhere?

    reward   = sigma(-l / T),  the probability of artifact-free;  T by calibration on held-out pictures

f_0, f_j: what the tower gives of the whole and of its places. Rewards that read prompts do not see such
damage (arXiv:2601.03468), and policies pay with it. Blind to the prompt: alone it rewards blank pictures.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mmalign.records import Masks, Outcome, RewardSignal, Unit
from mmalign.rewardmodels.features import Tower
from mmalign.rewardmodels.inputs import pictures
from mmalign.rewardmodels.precisions import Precision, dtype_of

HEADS, SAID = "heads.safetensors", "detector.json"
Grain = Literal["sample", "region"]


class Detector(nn.Module):
    """Logits of damage for pictures [n, 3, H, W] in [0, 1]: of the whole [n], and of places [n, rows * rows].

    tower: folder of an image model whose places are as wide as its whole, see features.py.
    """

    def __init__(self, tower: str, width: int = 64) -> None:
        super().__init__()
        self._tower = Tower(tower)
        self.network: nn.Module = self._tower.network
        with torch.no_grad():
            _, places, dims = self._tower.tokens(torch.zeros(1, 3, 64, 64)).shape
        self.rows, self.width, self.temperature = round((places - 1) ** 0.5), width, 1.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.place, self.whole = (
                nn.Sequential(nn.LayerNorm(dims), nn.Linear(dims, width), nn.GELU(), nn.Linear(width, 1))
                for _ in range(2)
            )
        self.mix = nn.Parameter(torch.tensor([1.0, 0.0]))  # a, b

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self._tower.tokens(images)
        places = self.place(tokens[:, 1:])[..., 0]
        pooled = places.logsumexp(1) - torch.tensor(float(places.shape[1])).log()
        return self.whole(tokens[:, 0])[:, 0] + self.mix[0] * pooled + self.mix[1], places

    def to(self, *args: Any, **kwargs: Any) -> Detector:
        super().to(*args, **kwargs)
        self._tower.move(self.mix.device)
        return self

    def save(self, folder: Path) -> None:
        """The tower as transformers saves it, the heads, and the temperature; weights in fp16."""
        from safetensors.torch import save_file

        self.network.half()
        self.network.save_pretrained(folder)  # type: ignore[operator]
        self.network.float()
        mean, std = (x.flatten().tolist() for x in self._tower.scale)
        side = {"height": self._tower.size, "width": self._tower.size}
        prepared = {"image_mean": mean, "image_std": std, "size": side}
        (folder / "preprocessor_config.json").write_text(json.dumps(prepared, indent=2) + "\n")
        heads = {k: v.half() for k, v in self.state_dict().items() if not k.startswith("network.")}
        save_file(heads, folder / HEADS)
        said = {"width": self.width, "temperature": self.temperature}
        (folder / SAID).write_text(json.dumps(said, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str) -> Detector:
        """What `save` wrote, in fp32; ValueError where there is none."""
        from safetensors.torch import load_file

        if not (Path(folder) / SAID).is_file():
            raise ValueError(f"artifact: there is no detector {folder}; scripts/artifacts.py train makes one")
        said = json.loads((Path(folder) / SAID).read_text())
        detector = cls(folder, said["width"])
        detector.load_state_dict(
            {key: value.float() for key, value in load_file(Path(folder) / HEADS).items()}, strict=False
        )
        detector.network.float()
        detector.temperature = said["temperature"]
        return detector.eval().requires_grad_(False)


@dataclass(eq=False)
class Artifact:
    """The probability that a picture is free of artifacts, 0 to 1, by a detector; blind to the prompt.

    grain region: that of each place of the detector's grid instead; the heat map is 1 minus it.
    """

    detector: str = "assets/lab/artifact"  # folder that scripts/artifacts.py train wrote
    grain: Grain = "sample"  # a verdict on the whole, or on each place
    precision: Precision = "fp32"  # of the tower; bf16 or fp16 are faster on a GPU, its heads stay in fp32
    batch: int = 64  # pictures at once; lower it for less memory
    name = "artifact"

    def __post_init__(self) -> None:
        if self.grain not in get_args(Grain):
            raise ValueError(f"artifact: grain must be one of sample, region, got {self.grain!r}")
        if self.batch < 1:
            raise ValueError(f"artifact: batch must be at least 1, got {self.batch}")
        dtype = dtype_of(self.name, self.precision)
        self._detector = Detector.load(self.detector)
        self._detector.network.to(dtype)

    @torch.no_grad()
    def __call__(self, outcome: Outcome) -> RewardSignal:
        whole, places = self._judge(pictures(self.name, outcome))
        if self.grain == "sample":
            return RewardSignal(self.name, whole[:, None])
        return RewardSignal(self.name, places, Unit.REGION, where=self._grid(len(places)))

    def differentiate(self, outcome: Outcome) -> Tensor:
        """The probability for the whole [B * views]; gradients reach the media."""
        return self._judge(pictures(self.name, outcome, graph=True))[0]

    def _judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities of being free of artifacts: of the whole [n] and of places [n, places]."""
        detector = self._detector.to(images.device)
        parts = [detector(part) for part in torch.split(images, self.batch)]
        whole, places = (torch.cat(part) for part in zip(*parts, strict=True))
        return (-whole / detector.temperature).sigmoid(), (-places / detector.temperature).sigmoid()

    def _grid(self, count: int) -> Masks:
        """Which place each unit speaks of; the grid stretches over the picture."""
        rows = self._detector.rows
        places = torch.eye(rows * rows).reshape(1, rows * rows, 1, rows, rows)
        return Masks(places.expand(count, -1, -1, -1, -1))
