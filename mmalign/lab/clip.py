"""A small CLIP with the parameter names, numbers and files of open_clip's, without open_clip.

    open_clip.create_model_from_pretrained("local-dir:assets/lab/clip")
    open_clip.get_tokenizer("local-dir:assets/lab/clip")

load the same folder (Radford et al. 2021, arXiv:2103.00020).
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from mmalign.lab.grammar import tokens

CONFIG, WEIGHTS, TOKENIZER = "open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"
MEAN, STD = 0.5, 0.5  # what pixels in [0, 1] are normalized by
PAD, START, UNKNOWN, END = (
    "<pad>",
    "<start>",
    "<unk>",
    "<end>",
)  # END has the highest id: open_clip pools there


@dataclass(frozen=True)
class Tower:
    """The transformer of one side."""

    width: int
    layers: int
    heads: int


@dataclass(frozen=True)
class CLIPSize:
    """Both sides and the space they share."""

    image_size: int = 64
    patch_size: int = 8
    vision: Tower = Tower(128, 4, 4)
    text: Tower = Tower(64, 3, 2)
    context: int = 24  # tokens of a text, start and end included
    embed_dim: int = 64


class ResidualBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        layers = [
            ("c_fc", nn.Linear(width, 4 * width)),
            ("gelu", nn.GELU()),
            ("c_proj", nn.Linear(4 * width, width)),
        ]
        self.mlp = nn.Sequential(OrderedDict(layers))  # type: ignore[arg-type]

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        seen = self.ln_1(x)
        x = x + self.attn(seen, seen, seen, attn_mask=mask, need_weights=False)[0]
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class Transformer(nn.Module):
    def __init__(self, tower: Tower) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualBlock(tower.width, tower.heads) for _ in range(tower.layers))
        for name, parameter in self.named_parameters():  # as open_clip draws them
            scale = tower.width**-0.5
            if name.endswith("in_proj_weight"):
                nn.init.normal_(parameter, std=scale)
            elif name.endswith(("out_proj.weight", "c_proj.weight")):
                nn.init.normal_(parameter, std=scale * (2 * tower.layers) ** -0.5)
            elif name.endswith("c_fc.weight"):
                nn.init.normal_(parameter, std=(2 * tower.width) ** -0.5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    def __init__(self, size: CLIPSize) -> None:
        super().__init__()
        tower, grid = size.vision, size.image_size // size.patch_size
        scale = tower.width**-0.5
        self.conv1 = nn.Conv2d(3, tower.width, size.patch_size, size.patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(tower.width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(grid**2 + 1, tower.width))
        self.ln_pre, self.transformer = nn.LayerNorm(tower.width), Transformer(tower)
        self.ln_post = nn.LayerNorm(tower.width)
        self.proj = nn.Parameter(scale * torch.randn(tower.width, size.embed_dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.conv1(x).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(x), 1, -1)
        x = self.ln_pre(torch.cat([first, patches], 1) + self.positional_embedding)
        x = self.ln_post(self.transformer(x))
        return x[:, 0], x[:, 1:]


class CLIP(nn.Module):
    """Two towers; pictures are [B, 3, S, S] in [0, 1], texts are sentences of the lab.

    words: the vocabulary by token id, see `vocabulary_of`.
    """

    def __init__(self, size: CLIPSize, words: Sequence[str]) -> None:
        super().__init__()
        self.size, self.words = size, {word: i for i, word in enumerate(words)}
        width = size.text.width
        self.visual = Visual(size)
        self.transformer = Transformer(size.text)
        self.token_embedding = nn.Embedding(len(words), width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(size.context, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, size.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The class token [B, D] and the patch tokens [B, N, D] before the projection."""
        found: tuple[Tensor, Tensor] = self.visual((images - MEAN) / STD)
        return found

    def encode_images(self, images: Tensor) -> Tensor:
        """Embeddings of length 1, [B, E]."""
        return normalize(self.features(images)[0] @ self.visual.proj, dim=-1)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of length 1, [B, E]."""
        return self.encode_ids(self.ids(texts).to(self.logit_scale.device))

    def encode_ids(self, ids: Tensor) -> Tensor:
        """Embeddings of length 1, [B, E], of token ids [B, context]."""
        x = self.token_embedding(ids) + self.positional_embedding
        mask = torch.full((ids.shape[1],) * 2, -torch.inf, device=x.device, dtype=x.dtype).triu(1)
        x = self.ln_final(self.transformer(x, mask))
        pooled = x[torch.arange(len(x), device=x.device), ids.argmax(-1)]
        return normalize(pooled @ self.text_projection, dim=-1)

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Token ids [B, context]; what does not fit is cut off, as open_clip does."""
        rows = torch.full((len(texts), self.size.context), self.words[PAD])
        for row, text in zip(rows, texts, strict=True):
            known = [self.words.get(token, self.words[UNKNOWN]) for token in tokens(text)]
            line = [self.words[START], *known[: self.size.context - 2], self.words[END]]
            row[: len(line)] = torch.tensor(line)
        return rows

    def save(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Writes config and weights (fp16) as open_clip's `local-dir:` reads them, beside the tokenizer."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        vision, text = self.size.vision, self.size.text
        config = {
            "model_cfg": {
                "embed_dim": self.size.embed_dim,
                "vision_cfg": {
                    "image_size": self.size.image_size,
                    "patch_size": self.size.patch_size,
                    "width": vision.width,
                    "layers": vision.layers,
                    "head_width": vision.width // vision.heads,
                },
                "text_cfg": {
                    "context_length": self.size.context,
                    "vocab_size": len(self.words),
                    "hf_tokenizer_name": folder.name,  # open_clip then looks into this folder
                    "width": text.width,
                    "layers": text.layers,
                    "heads": text.heads,
                },
            },
            "preprocess_cfg": {
                "mean": [MEAN] * 3,
                "std": [STD] * 3,
                "interpolation": "bicubic",
                "resize_mode": "squash",
            },
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        weights = {key: value.half().contiguous() for key, value in (state or self.state_dict()).items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: Path) -> CLIP:
        """What `save` wrote, in fp32, with the vocabulary of the folder's tokenizer."""
        from safetensors.torch import load_file

        for name in (CONFIG, WEIGHTS, TOKENIZER):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder}: has no {name}; expected a folder as assets/lab/clip")
        config = json.loads((folder / CONFIG).read_text())["model_cfg"]
        vision, text = config["vision_cfg"], config["text_cfg"]
        vocabulary = json.loads((folder / TOKENIZER).read_text())["model"]["vocab"]
        size = CLIPSize(
            vision["image_size"],
            vision["patch_size"],
            Tower(vision["width"], vision["layers"], vision["width"] // vision["head_width"]),
            Tower(text["width"], text["layers"], text["heads"]),
            text["context_length"],
            config["embed_dim"],
        )
        clip = cls(size, sorted(vocabulary, key=vocabulary.get))
        clip.load_state_dict({key: value.float() for key, value in load_file(folder / WEIGHTS).items()})
        return clip


def vocabulary_of(words: Sequence[str]) -> list[str]:
    """Words by token id, with the marks that a text is framed by."""
    return [PAD, START, UNKNOWN, *sorted(words), END]
