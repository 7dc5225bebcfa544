"""Wan 2.1 and 2.2, text to video and image to video; the A14B models with both of their experts."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmalign.contracts import PolicySettings
from mmalign.pipelines.family import Standardized, VideoFamily, read, schedule, toward
from mmalign.pipelines.flow import Condition, Experts, guided


class Wan(Standardized, VideoFamily):
    """Adapter of `WanPipeline`; where it has a second expert, that one is trained as well.

    Its multistep solvers are replaced by Euler steps on their sigmas.
    """

    kind = "WanPipeline"

    def __init__(self, settings: PolicySettings, pipeline: Any = None) -> None:
        if pipeline is None:
            pipeline = read(self.kind, settings, ("transformer", "transformer_2"))
        super().__init__(settings, pipeline)
        if pipeline.transformer_2 is not None:
            experts = {"transformer": pipeline.transformer, "transformer_2": pipeline.transformer_2}
            boundary = pipeline.config.boundary_ratio * pipeline.scheduler.config.num_train_timesteps
            self.network = Experts(experts, boundary)

    @property
    def patch(self) -> int:  # type: ignore[override]
        return int(self.config.patch_size[1])

    @property
    def channels(self) -> int:
        return int(self.pipeline.vae.config.z_dim)

    def sigmas(self, steps: int, shape: Sequence[int]) -> Tensor:
        return schedule(self.pipeline.scheduler, steps, None, None)

    def velocity(
        self,
        network: nn.Module,
        x: Tensor,
        sigma: Tensor,
        condition: Condition,
        negative: Condition | None,
        guidance: float,
    ) -> Tensor:
        low = self.settings.low_noise_guidance
        if low is None or negative is None:
            return super().velocity(network, x, sigma, condition, negative, guidance)
        both = {name: torch.cat([negative[name], condition[name]]) for name in condition}
        velocity = self.predict(network, torch.cat([x, x]), torch.cat([sigma, sigma]), both)
        early = cast(Experts, self.network).early(sigma * self.pipeline.scheduler.config.num_train_timesteps)
        return guided(velocity, torch.where(early, guidance, low).reshape(-1, 1, 1, 1, 1))

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        time = sigma * self.pipeline.scheduler.config.num_train_timesteps
        return self._call(network, x, time, condition)

    def _call(self, network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """time: [n], or [n, F, h, w] in steps of the noise that each place has."""
        if self.pipeline.config.expand_timesteps:
            places = time if time.ndim > 1 else time.reshape(-1, 1, 1, 1).expand(-1, *x.shape[2:])
            time = places[:, :, :: self.patch, :: self.patch].flatten(1)
        shown = {"encoder_hidden_states_image": condition["shown"]} if "shown" in condition else {}
        velocity: Tensor = network(
            hidden_states=x, timestep=time, encoder_hidden_states=condition["embeds"], **shown, **self._plain
        )[0]
        return velocity

    @property
    def _plain(self) -> dict[str, bool]:
        """Experts answer with a tuple, as a network does that is asked for one."""
        return {} if isinstance(self.network, Experts) else {"return_dict": False}


class WanImageToVideo(Wan):
    """Adapter of `WanImageToVideoPipeline`: a video that begins with the prompt's picture.

    The 5B model takes the picture in place of the first frame of its latent (`toward`).
    """

    kind = "WanImageToVideoPipeline"
    needs_pictures = True

    def __init__(self, settings: PolicySettings, pipeline: Any = None) -> None:
        try:
            importlib.import_module("ftfy")
        except ImportError as error:
            raise ImportError(
                "policy.model: the texts of Wan's image to video are mended by ftfy: "
                "pip install 'mmalign[wan]'"
            ) from error
        super().__init__(settings, pipeline)

    def encode_with(self, text: str, pictures: Tensor) -> Condition:
        if len(pictures) > 1:
            raise ValueError(f"a video of Wan begins with one picture, got {len(pictures)} for {text!r}")
        seen = dict(self.encode(text))
        if self.pipeline.config.expand_timesteps:
            return seen | {"first": self._encoded(pictures[:, :, None])[0]}
        rest = pictures.new_full((1, 3, self.frames - 1, *pictures.shape[2:]), 0.5)  # gray, 0 to the encoder
        video = self._encoded(torch.cat([pictures[:, :, None], rest], 2))[0]
        given = torch.zeros(self.temporal, *video.shape[1:], device=video.device)
        given[:, 0] = 1
        if self.config.image_dim is not None:
            picture = self.pipeline.video_processor.postprocess_video(
                pictures[:, :, None] * 2 - 1, output_type="pil"
            )
            seen["shown"] = self.pipeline.encode_image(picture[0][0], self.device)[0]
        return seen | {"first": torch.cat([given, video])}

    def _encoded(self, video: Tensor) -> Tensor:
        return self.from_vae(self.pipeline.vae.encode(video * 2 - 1).latent_dist.mode())

    def predict(self, network: nn.Module, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        time = sigma * self.pipeline.scheduler.config.num_train_timesteps
        if not self.pipeline.config.expand_timesteps:
            return self._call(network, torch.cat([x, condition["first"]], 1), time, condition)
        picture = condition["first"]
        places = time.reshape(-1, 1, 1, 1).repeat(1, *x.shape[2:])
        places[:, 0] = 0
        seen = torch.cat([picture.to(x.dtype), x[:, :, 1:]], 2)
        return toward(picture, x, sigma, self._call(network, seen, places, condition))
