"""HunyuanDiT: a transformer that predicts noise, or v, sampled as `pipelines/sd.py` says."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmalign.pipelines.flow import Condition
from mmalign.pipelines.pixart import PixArtSigma


class HunyuanDiT(PixArtSigma):
    """Adapter of `HunyuanDiTPipeline`, as `PixArtSigma` is one; texts are of 77 and of 256 tokens.

    Its network is told a size before resizing of 1024 pixels a side, as the pipeline has it by default.
    """

    kind = "HunyuanDiTPipeline"
    rescales = True

    @property
    def rescale(self) -> float:  # type: ignore[override]
        return self.settings.guidance_rescale

    def encode(self, text: str) -> Condition:
        found: dict[str, Tensor] = {}
        for place, (name, length) in enumerate((("clip", 77), ("t5", 256))):
            embeds, _, mask, _ = self.pipeline.encode_prompt(
                [text],
                self.device,
                do_classifier_free_guidance=False,
                max_sequence_length=length,
                text_encoder_index=place,
            )
            found |= {name: embeds[0], f"{name}_mask": mask[0]}
        return found

    def predict(self, network: nn.Module, y: Tensor, t: Tensor, condition: Condition) -> Tensor:
        high, wide = (side * self.scale for side in y.shape[2:])
        predicted: Tensor = network(
            y.to(condition["clip"].dtype),
            t,
            encoder_hidden_states=condition["clip"],
            text_embedding_mask=condition["clip_mask"],
            encoder_hidden_states_t5=condition["t5"],
            text_embedding_mask_t5=condition["t5_mask"],
            image_meta_size=y.new_tensor([1024, 1024, high, wide, 0, 0]).repeat(len(y), 1),
            style=torch.zeros(len(y), dtype=torch.long, device=y.device),
            image_rotary_emb=self.places(y),
            return_dict=False,
        )[0]
        return predicted[:, : self.channels]

    def places(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Rotations of every token, on the grid of a picture of 512 pixels a side."""
        from diffusers.models.embeddings import get_2d_rotary_pos_embed
        from diffusers.pipelines.hunyuandit import pipeline_hunyuandit as plain

        grid = y.shape[2] // self.patch, y.shape[3] // self.patch
        region = plain.get_resize_crop_region_for_grid(grid, 512 // self.scale // self.patch)
        size = self.config.hidden_size // self.config.num_attention_heads
        found: tuple[Tensor, Tensor] = get_2d_rotary_pos_embed(
            size, region, grid, device=y.device, output_type="pt"
        )
        return found
