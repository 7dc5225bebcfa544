"""A small vision transformer with the parameter names, numbers and files of timm's, without timm.

    timm.create_model("local-dir:assets/lab/dino", pretrained=True, num_classes=0)

loads the same folder (Dosovitskiy et al. 2021,
arXiv:2010.11929: pre-norm blocks, a class token, learned positions).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

CONFIG, WEIGHTS = "config.json", "model.safetensors"
MEAN, STD = 0.5, 0.5  # what pixels in [0, 1] are normalized by


@dataclass(frozen=True)
class ViTSize:
    """The shape of a vision transformer, by timm's names."""

    img_size: int = 64
    patch_size: int = 8
    embed_dim: int = 96
    depth: int = 4
    num_heads: int = 3
    mlp_ratio: float = 4.0


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        # Written out: on CPUs the fused form is a third slower in bf16, for its backward.
        attention = (q @ k.transpose(-2, -1) * (d // self.heads) ** -0.5).softmax(-1)
        mixed: Tensor = self.proj((attention @ v).transpose(1, 2).reshape(b, n, d))
        return mixed


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Block(nn.Module):
    def __init__(self, size: ViTSize) -> None:
        super().__init__()
        width = size.embed_dim
        self.norm1, self.attn = nn.LayerNorm(width, eps=1e-6), Attention(width, size.num_heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=1e-6), Mlp(width, int(width * size.mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEmbed(nn.Module):
    def __init__(self, size: ViTSize) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, size.embed_dim, size.patch_size, size.patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class ViT(nn.Module):
    """Pictures [B, 3, S, S], normalized, to a class token [B, D] and patch tokens [B, N, D], row by row.

    S may be any multiple of the patch: positions are interpolated to the grid of the picture.
    """

    def __init__(self, size: ViTSize) -> None:
        super().__init__()
        self.size, width = size, size.embed_dim
        self.patch_embed = PatchEmbed(size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        grid = size.img_size // size.patch_size
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid**2, width))
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.patch_embed(x)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1)
        tokens = self.norm(self.blocks(tokens + self.positions(x.shape[-2:])))
        return tokens[:, 0], tokens[:, 1:]

    def positions(self, pixels: torch.Size) -> Tensor:
        """Position embeddings [1, 1 + N, D] for a picture of so many pixels."""
        rows, columns = (side // self.size.patch_size for side in pixels)
        grid = self.size.img_size // self.size.patch_size
        if (rows, columns) == (grid, grid):
            return self.pos_embed
        places = self.pos_embed[:, 1:].reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
        places = interpolate(places, (rows, columns), mode="bilinear", align_corners=False)
        return torch.cat([self.pos_embed[:, :1], places.flatten(2).transpose(1, 2)], 1)

    def save(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Writes the folder that timm's `local-dir:` and `load` read, weights in fp16."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        side = self.size.img_size
        config = {
            "architecture": "vit_tiny_patch16_224",
            "num_classes": 0,
            "num_features": self.size.embed_dim,
            "global_pool": "token",
            "model_args": asdict(self.size),
            "pretrained_cfg": {
                "input_size": [3, side, side],
                "fixed_input_size": True,
                "interpolation": "bicubic",
                "crop_pct": 1.0,
                "mean": [MEAN] * 3,
                "std": [STD] * 3,
                "num_classes": 0,
                "first_conv": "patch_embed.proj",
                "classifier": "head",
            },
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        weights = {key: value.half().contiguous() for key, value in (state or self.state_dict()).items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: Path) -> ViT:
        """What `save` wrote, in fp32."""
        from safetensors.torch import load_file

        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"{folder}: has no {CONFIG}; expected a folder that ViT.save wrote")
        config = json.loads((folder / CONFIG).read_text())
        vit = cls(ViTSize(**config["model_args"]))
        vit.load_state_dict({key: value.float() for key, value in load_file(folder / WEIGHTS).items()})
        return vit


def normalized(images: Tensor) -> Tensor:
    """Pixels in [0, 1] as the transformer sees them."""
    return (images - MEAN) / STD
