"""OmniGen."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmalign.contracts import PolicySettings
from mmalign.pipelines.family import Family, filled, schedule
from mmalign.pipelines.flow import Condition

PICTURE = "<|image_"  # how a text begins to name a picture


class OmniGen(Family):
    """Adapter of `OmniGenPipeline`, text to image; its network reads words by itself.

    Time runs upward and the prediction points to the data. As in diffusers, what guidance leads away from is
    put at the places of the prompt: of a longer text the first tokens fall together. Prompts of unequal
    length are asked about apart, as each has places of its own. Where there is no negative prompt, it is the
    pipeline's.
    """

    kind = "OmniGenPipeline"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, settings: PolicySettings, pipeline: Any = None) -> None:
        super().__init__(settings, pipeline)
        self.words = self.network.embed_tokens.weight.detach().clone()  # whole, however the network is held
        self.unwanted = len(self._read(self._negative(settings.negative_prompt)))

    def read_schedule(self) -> None:
        super().read_schedule()
        if not self.pipeline.scheduler.config.get("invert_sigmas"):
            raise ValueError(
                "the time that OmniGen is told rises to the picture, and its scheduler has invert_sigmas "
                "false; set it to true in scheduler/scheduler_config.json"
            )

    # ---- texts

    def encode(self, text: str) -> Condition:
        """A text by its tokens, after what fills it up: places in the network are counted from the end."""
        if PICTURE in text:
            raise ValueError(
                f"prompt {text!r} names a picture ({PICTURE}...), and OmniGen is shown none here"
            )
        tokens = torch.tensor(self._read(text))
        kept, mask = filled(tokens.flip(0)[:, None], self.max_sequence_length, text)
        ids, seen = kept[:, 0].flip(0), mask.flip(0)
        words = self.words[ids.to(self.words.device)]
        return {"embeds": words, "ids": ids, "mask": seen, "length": torch.tensor(len(tokens))}

    def encode_negative(self, text: str, pictures: Tensor) -> Condition:
        return self.encode(self._negative(text))

    def _negative(self, text: str) -> str:
        reader = type(self.pipeline.multimodal_processor).__call__
        return text or str(inspect.signature(reader).parameters["negative_prompt"].default)

    def _read(self, text: str) -> list[int]:
        return list(self.pipeline.multimodal_processor.process_multi_modal_prompt(text, None)["input_ids"])

    # ---- time

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        even = np.linspace(1, 0, steps + 1)[:steps].tolist()
        return 1 - schedule(self.pipeline.scheduler, steps, even, None)

    # ---- the network

    def velocity(
        self,
        network: nn.Module,
        x: Tensor,
        sigma: Tensor,
        condition: Condition,
        negative: Condition | None,
        guidance: float,
    ) -> Tensor:
        if negative is not None:
            negative = {**negative, "length": condition["length"]}
        return super().velocity(network, x, sigma, condition, negative, guidance)

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        found = torch.empty_like(x)
        for length in condition["length"].unique().tolist():
            rows = (condition["length"] == length).nonzero().flatten()
            seen = {name: tensor[rows] for name, tensor in condition.items()}
            found[rows] = self._equal(network, x[rows], sigma[rows], seen, length).float()
        return found

    def _equal(
        self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition, length: int
    ) -> Tensor:
        """The velocity where all prompts are of one length."""
        count = int(condition["mask"].sum(1).max())
        seen, drawn = condition["mask"][:, -count:], 1 + self.tokens(x.shape[1:])  # and the time
        steps = torch.arange(count + drawn, device=x.device)
        # The network turns by the first row alone, and stretches by the largest place of all.
        places = torch.stack([(steps - count + own).clamp(min=0) for own in (length, self.unwanted)])
        ahead: Tensor = network(
            hidden_states=x.to(condition["embeds"].dtype),
            timestep=(1 - sigma) * self.pipeline.scheduler.config.num_train_timesteps,
            input_ids=condition["ids"][:, -count:],
            input_img_latents=[],
            input_image_sizes={},
            attention_mask=visible(seen, drawn),
            position_ids=places,
            return_dict=False,
        )[0]
        return -ahead


def visible(seen: Tensor, drawn: int) -> Tensor:
    """What each token sees, [n, L + drawn, L + drawn] in fp32: words those before, the picture all.

    seen: [n, L], where words are. drawn: the time, which counts as a word, and then places of the picture.
    Where there are no words, everything is seen, which nothing reads.
    """
    n, words = seen.shape
    real = torch.cat([seen.bool(), seen.new_ones(n, drawn).bool()], 1)
    order = torch.ones(words + drawn, words + drawn, device=seen.device).tril().bool()
    order[words + 1 :] = True
    return ((order & real[:, None]) | ~real[:, :, None]).float()
