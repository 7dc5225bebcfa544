"""Whether a video shows the subject of a reference, judged on its noisy latents: the latent identity reward
of DreamVideo-Omni (arXiv:2603.12257), with the input and the loss of PRFL (arXiv:2511.21541).

    h(z)  = tokens of z after the first blocks of the denoiser, at its noise level and with its text
    u     = q + attention(q, k, k),    q = h(latent of the reference, 0),  k = h(z_t, t)
    R     = sigmoid(MLP(mean u))

The network reads latents at any noise level, so that a policy can be taught by it in the middle of sampling
(`mmalign.algorithms.lirefl`), and nothing is decoded. It is a copy of the policy's own denoiser, and knows no
latents but those of the autoencoder it was trained with. `query: video` exchanges q and k (the paper's
accuracy falls from .720 to .455).

Differs from the paper in that the reference passes through the same blocks as the video, as a clip of one
frame without noise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from mmalign.pictures import open_picture
from mmalign.records import Outcome, Prompts, RewardSignal
from mmalign.rewardmodels.inputs import frames

HEAD, SAID = "head.safetensors", "identity.json"
Query = Literal["reference", "video"]


class IdentityNetwork(nn.Module):
    """Logits [n] that noisy latents z [n, C, f, h, w] show the subject of references [n, C, 1, h, w].

    transformer: a Wan denoiser; its blocks after `blocks` are removed. query: what asks in the attention.
    hidden: width of the MLP.
    """

    def __init__(
        self, transformer: Any, blocks: int, query: Query = "reference", hidden: int = 256, seed: int = 0
    ) -> None:
        super().__init__()
        if not 1 <= blocks <= len(transformer.blocks):
            raise ValueError(
                f"blocks must lie in 1..{len(transformer.blocks)}, as many as the denoiser has, got {blocks}"
            )
        if query not in get_args(Query):
            raise ValueError(f"query must be reference or video, got {query!r}")
        transformer.blocks = transformer.blocks[:blocks]
        transformer.register_to_config(num_layers=blocks)
        self.transformer, self.query, self.hidden = transformer, query, hidden
        heads = transformer.config.num_attention_heads
        width = heads * transformer.config.attention_head_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.asks, self.answers = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
            self.mlp = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, 1)
            )

    def forward(self, z: Tensor, time: Tensor, text: Tensor, reference: Tensor) -> Tensor:
        """time: [n], in the denoiser's own unit; text: [n, length, width] embeddings."""
        video = self.features(z, time, text)
        still = self.features(reference, torch.zeros_like(time), text)
        asks, answers = (still, video) if self.query == "reference" else (video, still)
        answers = self.answers(answers)
        found, _ = self.attention(self.asks(asks), answers, answers, need_weights=False)
        logit: Tensor = self.mlp((asks + found).mean(1))[:, 0]
        return logit

    def features(self, z: Tensor, time: Tensor, text: Tensor) -> Tensor:
        """Tokens [n, places, width] behind the last block that is left."""
        denoiser = self.transformer
        turns = denoiser.rope(z)
        tokens: Tensor = denoiser.patch_embedding(z).flatten(2).transpose(1, 2)
        _, level, words, _ = denoiser.condition_embedder(time, text, None)
        level = level.unflatten(1, (6, -1))
        for block in denoiser.blocks:
            tokens = block(tokens, words, level, turns)
        return tokens

    @property
    def head(self) -> dict[str, Tensor]:
        """All that is not the denoiser's, by name."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("transformer.")}

    def save(self, folder: Path, base: str) -> None:
        """The blocks as diffusers saves them, and the head, in fp16; base: the pipeline of the latents."""
        from safetensors.torch import save_file

        self.transformer.half()
        self.transformer.save_pretrained(folder / "transformer")
        self.transformer.float()
        save_file({k: v.half().contiguous() for k, v in self.head.items()}, folder / HEAD)
        said = {"base": base, "query": self.query, "hidden": self.hidden}
        (folder / SAID).write_text(json.dumps(said, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> IdentityNetwork:
        """What `save` wrote, in fp32, frozen."""
        from diffusers import WanTransformer3DModel
        from safetensors.torch import load_file

        said = json.loads((folder / SAID).read_text())
        transformer = WanTransformer3DModel.from_pretrained(folder / "transformer").float()
        network = cls(transformer, len(transformer.blocks), said["query"], said["hidden"])
        state = {key: value.float() for key, value in load_file(folder / HEAD).items()}
        network.load_state_dict(state | {f"transformer.{k}": v for k, v in transformer.state_dict().items()})
        return network.eval().requires_grad_(False)


class LatentSpace:
    """What a Wan pipeline makes of videos, pictures and texts; frozen, texts and pictures once each.

    base: folder or hub id of the pipeline; its denoiser is not loaded.
    """

    def __init__(self, base: str) -> None:
        from diffusers import WanPipeline

        try:
            self.pipeline: Any = WanPipeline.from_pretrained(base, transformer=None, transformer_2=None)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"latent_identity: the latents of {base} are unknown, it does not load as a Wan pipeline: "
                f"{error}"
            ) from error
        for part in (self.pipeline.vae, self.pipeline.text_encoder):
            part.eval().requires_grad_(False)
        self.length = min(int(self.pipeline.tokenizer.model_max_length), 512)
        self._texts: dict[str, Tensor] = {}
        self._references: dict[tuple[str, int, int], Tensor] = {}

    def time(self, sigma: Tensor) -> Tensor:
        """Noise levels in the denoiser's unit."""
        return sigma * float(self.pipeline.scheduler.config.num_train_timesteps)

    @torch.no_grad()
    def videos(self, media: Tensor, batch: int = 64) -> Tensor:
        """Latents [n, C, f, h, w] of videos [n, F, 3, H, W] in [0, 1]."""
        vae = self.pipeline.vae.to(media.device)
        shape = (1, -1, 1, 1, 1)
        mean = media.new_tensor(vae.config.latents_mean).reshape(shape)
        std = media.new_tensor(vae.config.latents_std).reshape(shape)
        parts = torch.split(media.transpose(1, 2) * 2 - 1, batch)
        raw = torch.cat([vae.encode(part).latent_dist.mode() for part in parts])
        return (raw - mean) / std

    @torch.no_grad()
    def texts(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """Embeddings [n, length, width] as the pipeline has them."""
        for text in texts:
            if text not in self._texts:
                self.pipeline.text_encoder.to(device)
                self._texts[text] = self.pipeline.encode_prompt(
                    [text], do_classifier_free_guidance=False, max_sequence_length=self.length, device=device
                )[0][0].float()
        return torch.stack([self._texts[text] for text in texts]).to(device)

    def reference(self, file: str, places: tuple[int, int], device: torch.device) -> Tensor:
        """The latent [C, 1, h, w] of a picture file, its middle scaled to fill the size of the videos."""
        if (key := (file, *places)) not in self._references:
            scale = int(self.pipeline.vae_scale_factor_spatial)
            picture = read_reference(file, places[0] * scale, places[1] * scale)
            self._references[key] = self.videos(picture[None, None].to(device))[0]
        return self._references[key].to(device)


def read_reference(file: str, height: int, width: int) -> Tensor:
    """A picture file, or a member of a zip, as [3, height, width] in [0, 1]."""
    import numpy as np
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(open_picture(file), (width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 255


def reference_of(extra: Mapping[str, object]) -> str | None:
    """The picture file of the subject of a prompt: its `reference_image`, else the first of its `source`."""
    for key in ("reference_image", "source"):
        named = extra.get(key)
        if isinstance(named, list) and named:
            named = named[0]
        if isinstance(named, str):
            return named
    return None


@dataclass(eq=False)
class LatentIdentity:
    """The probability that a video keeps the subject of its prompt's `reference_image`, 0 to 1, on latents.

    `lirefl` asks it about noisy latents and needs no decoder; videos are encoded first. A prompt without a
    reference gets no verdict.
    """

    model: str = "assets/lab/video_identity"  # folder that scripts/latent_identity.py train wrote
    # Pipeline that makes the latents, which must be those of the policy; null: that of the training.
    base: str | None = None
    batch: int = 64  # videos at once; lower it for less memory
    name = "latent_identity"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"latent_identity: batch must be at least 1, got {self.batch}")
        folder = Path(self.model)
        if not (folder / SAID).is_file():
            raise ValueError(
                f"latent_identity: model: there is no network in {folder}; scripts/latent_identity.py train "
                "makes one"
            )
        base = json.loads((folder / SAID).read_text())["base"] if self.base is None else self.base
        self._network, self._space = IdentityNetwork.load(folder), LatentSpace(base)

    @torch.no_grad()
    def __call__(self, outcome: Outcome) -> RewardSignal:
        videos = frames(self.name, outcome)
        rows = torch.arange(len(outcome.prompts)).repeat_interleave(outcome.views)
        z = self._space.videos(videos, self.batch)
        value, known = self._judge(outcome.prompts.take(rows), z, z.new_zeros(()))
        return RewardSignal(self.name, value[:, None], valid=known[:, None])

    def on_latents(self, prompts: Prompts, z: Tensor, sigma: Tensor) -> Tensor:
        """The probability [n] for latents z [n, C, f, h, w] at the noise level sigma; gradients reach z."""
        return self._judge(prompts, z, sigma)[0]

    def _judge(self, prompts: Prompts, z: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities [n], and which are known; 0 without a gradient where there is no reference."""
        wanted = self._network.transformer.config.in_channels
        if z.ndim != 5 or z.shape[1] != wanted:
            raise ValueError(
                f"latent_identity: its network reads latents [n, {wanted}, frames, h, w], and was given "
                f"{list(z.shape)}: it was trained on another autoencoder than that of the policy"
            )
        files = [reference_of(extra) for extra in prompts.extra]
        known = torch.tensor([file is not None for file in files], device=z.device)
        value = z.new_zeros(len(z))
        rows = known.nonzero()[:, 0]
        for part in torch.split(rows, self.batch):
            chosen = part.tolist()
            value = value.index_put((part,), self._asked(prompts, files, z[part], sigma, chosen))
        return value, known

    def _asked(
        self, prompts: Prompts, files: Sequence[str | None], z: Tensor, sigma: Tensor, rows: Sequence[int]
    ) -> Tensor:
        places = (int(z.shape[3]), int(z.shape[4]))
        still = [self._space.reference(str(files[i]), places, z.device) for i in rows]
        text = self._space.texts([prompts.text[i] for i in rows], z.device)
        time = self._space.time(sigma.expand(len(rows)))
        network = self._network.to(z.device)
        probability: Tensor = network(z.float(), time, text, torch.stack(still)).sigmoid()
        return probability
