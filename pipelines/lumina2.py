"""Lumina-Image 2.0."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mmalign.pipelines.family import Family, renormalized
from mmalign.pipelines.flow import Condition, guided


class Lumina2(Family):
    """Adapter of `Lumina2Pipeline`: time runs upward and the prediction points to the data.

    Guidance keeps the norm of each row of places. Its prompts stand behind a system prompt, the negative one
    does not.
    """

    kind = "Lumina2Pipeline"

    def default_pixels(self) -> tuple[int, int]:
        side = int(self.pipeline.default_sample_size) * self.scale
        return side, side

    def encode(self, text: str) -> Condition:
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            [text],
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=self.device,
        )
        return {"embeds": embeds[0], "mask": mask[0]}

    def encode_negative(self, text: str, pictures: Tensor) -> Condition:
        embeds, mask = self.pipeline._get_gemma_prompt_embeds(
            [text], device=self.device, max_sequence_length=self.max_sequence_length
        )
        return {"embeds": embeds[0], "mask": mask[0]}

    def tokens(self, shape: Sequence[int]) -> int:
        """What the pipeline takes for it, where its shift is dynamic."""
        return shape[0]

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        ahead: Tensor = network(
            hidden_states=x.to(condition["embeds"].dtype),
            timestep=1 - sigma,
            encoder_hidden_states=condition["embeds"],
            encoder_attention_mask=condition["mask"],
            return_dict=False,
        )[0]
        return -ahead

    def combine(self, both: Tensor, guidance: float) -> Tensor:
        return renormalized(guided(both, guidance), both.chunk(2)[1], -1)
