"""PRX and PRX Pixel: transformers whose texts stand beside the picture and are never changed by it."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mmalign.contracts import PolicySettings
from mmalign.pipelines.family import Family, schedule
from mmalign.pipelines.flow import Condition


class PRX(Family):
    """Adapter of `PRXPipeline`; its texts are cleaned as there.

    Sizes are taken as they are, where the pipeline by default goes to the nearest of its bins.
    """

    kind = "PRXPipeline"
    lora_targets = ("img_qkv_proj", "txt_kv_proj", "to_out.0")
    default_side = 512  # of pixels

    def __init__(self, settings: PolicySettings, pipeline: Any = None) -> None:
        name_encoder()
        try:
            importlib.import_module("ftfy")
        except ImportError as error:
            raise ImportError(
                "policy.model: the texts of PRX are mended by ftfy: pip install 'mmalign[prx]'"
            ) from error
        super().__init__(settings, pipeline)

    @property
    def patch(self) -> int:  # type: ignore[override]
        return int(self.config.patch_size)

    def default_pixels(self) -> tuple[int, int]:
        side = int(self.pipeline.config.default_sample_size or self.default_side)
        return side, side

    def encode(self, text: str) -> Condition:
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            [text], self.device, False, tokenizer_max_length=self.max_sequence_length
        )
        return {"embeds": embeds[0], "mask": mask[0]}

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        return schedule(self.pipeline.scheduler, steps, None, None)

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        embeds = condition["embeds"]
        predicted: Tensor = network(
            hidden_states=x.to(embeds.dtype),
            timestep=sigma,
            encoder_hidden_states=embeds,
            attention_mask=condition["mask"],
            return_dict=False,
        )[0]
        return predicted

    def latents(self, media: Tensor) -> Tensor:
        encoded = self.vae.encode(media * 2 - 1)
        return self.from_vae(encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode())


class PRXPixel(PRX):
    """Adapter of `PRXPixelPipeline`, which draws the picture itself and predicts it clean.

    It lives in y = (1 - t) x0 + t s e, with noise of another deviation s. With

        c = 1 - t + t s       sigma = t s / c       x = y / c = (1 - sigma) x0 + sigma e

    it is a flow model at times that are shifted by s, and the Euler step in x is that in y. The pipeline has
    (y - x0) / max(t, 0.05) for its velocity s e - x0, from which follows that in x,

        e - x0 = c / s (s e - x0 - (s - 1) x)

    Texts are of as many tokens as the model says, whatever `policy.max_sequence_length` is.
    """

    kind = "PRXPixelPipeline"
    default_side = 1024

    @property
    def _deviation(self) -> float:
        return float(self.pipeline.config.noise_scale)

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        t, s = super().sigmas(steps, shape), self._deviation
        return t * s / (1 - t + t * s)

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        s = self._deviation
        t = (sigma / (s - (s - 1) * sigma)).reshape(-1, 1, 1, 1)
        c = 1 - t + t * s
        clean = super().predict(network, c * x, t.flatten(), condition).float()
        return c / s * ((c * x - clean) / t.clamp(min=0.05) - (s - 1) * x)

    def decode(self, latents: Tensor) -> Tensor:
        return (latents / 2 + 0.5).clamp(0, 1)

    def latents(self, media: Tensor) -> Tensor:
        return media * 2 - 1


def name_encoder() -> None:
    """Let the loader of diffusers find the text encoder of PRX among the classes of transformers.

    diffusers names it there, but in a module that transformers puts aside when it first reads
    `processing_utils`, as it may do in between.
    """
    from diffusers.pipelines import prx

    importlib.import_module("transformers.processing_utils")
    transformers = importlib.import_module("transformers")
    if not hasattr(transformers, "T5GemmaEncoder"):
        setattr(transformers, "T5GemmaEncoder", prx.T5GemmaEncoder)  # noqa: B010
