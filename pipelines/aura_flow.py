"""AuraFlow."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mmalign.pipelines.family import Family, schedule
from mmalign.pipelines.flow import Condition


class AuraFlow(Family):
    """Adapter of `AuraFlowPipeline`; embeddings behind the end of a text are 0."""

    kind = "AuraFlowPipeline"
    lora_targets = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "linear_1",
    )

    @property
    def patch(self) -> int:  # type: ignore[override]
        return int(self.config.patch_size)

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        return schedule(self.pipeline.scheduler, steps, None, None)

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        embeds = condition["embeds"]
        velocity: Tensor = network(
            x.to(embeds.dtype), encoder_hidden_states=embeds, timestep=sigma, return_dict=False
        )[0]
        return velocity
