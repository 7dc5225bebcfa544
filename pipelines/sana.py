"""Sana: linear attention on the latents of a deep-compression autoencoder."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mmalign.pipelines.family import Family, schedule
from mmalign.pipelines.flow import Condition


class Sana(Family):
    """Adapter of `SanaPipeline`.

    Prompts stand behind instructions to its language model, the negative one does not. Sizes are taken as
    they are, where the pipeline by default goes to the nearest of its bins.
    """

    kind = "SanaPipeline"
    patch = 1

    def encode(self, text: str) -> Condition:
        return self._encode(text, self.default("complex_human_instruction"))

    def encode_negative(self, text: str, pictures: Tensor) -> Condition:
        return self._encode(text, None)

    def _encode(self, text: str, instruction: list[str] | None) -> Condition:
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            [text],
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            complex_human_instruction=instruction,
            device=self.device,
        )
        return {"embeds": embeds[0], "mask": mask[0]}

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        return schedule(self.pipeline.scheduler, steps, None, None)

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        embeds = condition["embeds"]
        time = sigma * self.pipeline.scheduler.config.num_train_timesteps * self.config.timestep_scale
        velocity: Tensor = network(
            x.to(embeds.dtype),
            encoder_hidden_states=embeds,
            encoder_attention_mask=condition["mask"],
            timestep=time,
            return_dict=False,
        )[0]
        return velocity[:, : self.channels]

    def latents(self, media: Tensor) -> Tensor:
        return self.from_vae(self.pipeline.vae.encode(media * 2 - 1).latent)
