"""Latent diffusion, of which Stable Diffusion came: a UNet that predicts noise, with a BERT of its own."""

from __future__ import annotations

from torch import Tensor, nn

from mmalign.pipelines.flow import Condition
from mmalign.pipelines.pixart import PixArtSigma


class LatentDiffusion(PixArtSigma):
    """Adapter of `LDMTextToImagePipeline`, equal to it with a `DDIMScheduler` where no noise is drawn.

    Texts are of 77 tokens, whatever `policy.max_sequence_length` is. The pipeline guides away from an empty
    text alone. An autoencoder with a codebook decodes the nearest of its entries, and gradients pass there as
    if it did not.
    """

    kind = "LDMTextToImagePipeline"
    component = "unet"
    autoencoder = "vqvae"
    patch = 1

    def encode(self, text: str) -> Condition:
        tokens = self.pipeline.tokenizer(
            [text], padding="max_length", max_length=77, truncation=True, return_tensors="pt"
        )
        return {"embeds": self.pipeline.bert(tokens.input_ids.to(self.device))[0][0]}

    def predict(self, network: nn.Module, y: Tensor, t: Tensor, condition: Condition) -> Tensor:
        predicted: Tensor = network(y, t, encoder_hidden_states=condition["embeds"], return_dict=False)[0]
        return predicted

    def latents(self, media: Tensor) -> Tensor:
        encoded = self.vae.encode(media * 2 - 1)
        return self.from_vae(encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode())
