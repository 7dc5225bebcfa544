"""Every model family as a tiny pipeline of the real classes, and how to ask it for what our policy draws.

A family is one adapter and one row of `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from mmalign.contracts import PolicySettings
from mmalign.pipelines.family import pack
from mmalign.testing import (
    DIFFUSION,
    WORDS,
    _clip_config,
    _clip_tokenizer,
    _t5_tokenizer,
    _unet,
    _vae,
    tiny_sd,
    tiny_sd3,
    tiny_sdxl,
)


@dataclass(frozen=True)
class Row:
    """One family.

    build: its tiny pipeline. settings: of a policy over it. size: of a picture, not square. call: what a call
    of the plain pipeline needs besides, at the settings. latents: ours as a call takes them. besides: what
    else of them. begun: noise with the pictures in it, where a call that is given noise does not put them in.
    sources: pictures that a prompt names. one_by_one: the plain pipeline takes one prompt at a time. alone:
    that without a list, and no noise but what it draws. own_picture: it takes a picture for each prompt, and
    else the same for all. negative: it takes a negative prompt. own_negative: it has one where none is given.
    true_guidance: it has another than what the network is told. takes_length: it takes a max_sequence_length.
    takes_size: it is told height and width. loads_lora: it can load a LoRA, and not just its denoiser.
    peft_lora: neither can. prepare: what is set in the plain pipeline before a call. shown: what we make of
    what it draws.
    """

    build: Callable[[], Any]
    call: Callable[[PolicySettings], dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=dict)
    size: tuple[int, int] = (32, 48)
    frames: int | None = None
    latents: Callable[[Tensor], Tensor] = lambda x: x
    besides: Callable[[Tensor], dict[str, Tensor]] = lambda x: {}
    begun: Callable[[Any, Tensor, list[Any], PolicySettings], Tensor] = lambda pipe, noise, pics, s: noise
    sources: int = 0
    one_by_one: bool = False
    alone: bool = False
    own_picture: bool = False
    negative: bool = True
    own_negative: bool = False
    true_guidance: bool = True
    takes_length: bool = True
    takes_size: bool = True
    loads_lora: bool = True
    peft_lora: bool = False
    prepare: Callable[[Any, PolicySettings], None] = lambda pipeline, settings: None
    shown: Callable[[Tensor], Tensor] = lambda x: x

    def load_lora(self, pipeline: Any, folder: Path) -> None:
        """As a user of plain diffusers does it, or of peft where diffusers cannot."""
        network = "unet" if hasattr(pipeline, "unet") else "transformer"
        if self.peft_lora:
            from peft import PeftModel

            setattr(pipeline, network, PeftModel.from_pretrained(getattr(pipeline, network), folder))
            return
        if self.loads_lora:
            pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
            second = "pytorch_lora_weights_2.safetensors"
            if (folder / second).is_file():
                pipeline.load_lora_weights(folder, weight_name=second, load_into_transformer_2=True)
        else:
            file = "pytorch_lora_weights.safetensors"
            getattr(pipeline, network).load_lora_adapter(folder, prefix=network, weight_name=file)

    def unload_lora(self, pipeline: Any) -> None:
        for name in ("transformer", "transformer_2", "unet"):
            if (network := getattr(pipeline, name, None)) is None:
                continue
            if self.peft_lora:
                setattr(pipeline, name, network.unload())
            else:
                network.unload_lora()


# ---- parts


def words_tokenizer(
    template: str = "", length: int = 4096, known: str = "", marks: Sequence[str] = (), **special: str
) -> Any:
    """A byte-level tokenizer that knows some words whole, in the place of those of language models.

    known: a text whose words are known besides. marks: further ones of its special tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for word in [*("Ġ" + w for w in WORDS), *(piece for piece, _ in split.pre_tokenize_str(known))]:
        for end in range(2, len(word) + 1):
            if (word[: end - 1], word[end - 1]) not in merges:
                merges.append((word[: end - 1], word[end - 1]))
                vocab.setdefault(word[:end], len(vocab))
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = split
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in (*MARKS, *marks)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<pad>", model_max_length=length, **special
    )
    made.chat_template = template or CHAT
    return made


def marked_tokenizer(**special: Any) -> Any:
    """Texts of GLM and Llama begin with marks, so that none is empty."""
    from tokenizers.processors import TemplateProcessing

    tokens, mark = words_tokenizer(**special), "<|im_start|>"
    tokens.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{mark} $A", special_tokens=[(mark, tokens.convert_tokens_to_ids(mark))]
    )
    return tokens


MARKS = (
    *("<pad>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}{{ c.text }}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def t5(tokens: Any, kind: str = "T5EncoderModel", width: int = 32) -> Any:
    import transformers

    config = {"UMT5EncoderModel": "UMT5Config"}.get(kind, "T5Config")
    return getattr(transformers, kind)(
        getattr(transformers, config)(
            vocab_size=len(tokens),
            d_model=width,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def image_vae(**given: Any) -> Any:
    return _vae(
        **{"scaling_factor": 0.7, "shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False}
        | given
    )


def flow(**given: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**given)


# ---- Stable Diffusion


def written(kind: str, write: Callable[..., Path], **given: Any) -> Any:
    """What `write` of `mmalign.testing` puts into a folder."""
    import diffusers

    with TemporaryDirectory() as home:
        return getattr(diffusers, kind).from_pretrained(write(Path(home), **given))


def sd(prediction: str = "epsilon") -> Any:
    return written("StableDiffusionPipeline", tiny_sd, prediction=prediction)


def sdxl(prediction: str = "epsilon") -> Any:
    return written("StableDiffusionXLPipeline", tiny_sdxl, prediction=prediction)


def call_rescaled(settings: PolicySettings) -> dict[str, Any]:
    return {"guidance_scale": settings.guidance, "guidance_rescale": settings.guidance_rescale}


# ---- FLUX.1 and Chroma


def flux(kind: str = "FluxPipeline", guidance: bool = True) -> Any:
    import diffusers
    from transformers import CLIPTextModel

    clip, t5_tokens = _clip_tokenizer(), _t5_tokenizer()
    return getattr(diffusers, kind)(
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 2, 2),
        ),
        scheduler=flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        vae=image_vae(),
        text_encoder=CLIPTextModel(_clip_config(clip)),
        tokenizer=clip,
        text_encoder_2=t5(t5_tokens),
        tokenizer_2=t5_tokens,
    )


def call_flux(settings: PolicySettings) -> dict[str, Any]:
    return {"guidance_scale": settings.embedded_guidance or 3.5, "true_cfg_scale": settings.guidance}


def call_kontext(settings: PolicySettings) -> dict[str, Any]:
    area = settings.height * settings.width
    return {**call_flux(settings), "max_area": area, "_auto_resize": False}


def chroma() -> Any:
    from diffusers import ChromaPipeline, ChromaTransformer2DModel

    tokens = _t5_tokenizer()
    return ChromaPipeline(
        transformer=ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 2, 2),
            approximator_num_channels=16,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        scheduler=flow(use_dynamic_shifting=True),
        vae=image_vae(),
        text_encoder=t5(tokens),
        tokenizer=tokens,
    )


# ---- Qwen-Image


def qwen_vae() -> Any:
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(
        base_dim=16,  # with few channels the norms of some pixels are near 0 and blow up rounding
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.2, 0.8, 1.0, 1.5],
    )


def qwen_text(tokens: Any) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    mark = tokens.convert_tokens_to_ids
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                **SMALL,
                "vocab_size": len(tokens),
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 16,
                "fullatt_block_indexes": [0],
                "window_size": 112,
            },
            image_token_id=mark("<|image_pad|>"),
            video_token_id=mark("<|video_pad|>"),
            vision_start_token_id=mark("<|vision_start|>"),
            vision_end_token_id=mark("<|vision_end|>"),
        )
    )


def qwen(kind: str = "QwenImagePipeline") -> Any:
    import diffusers

    tokens = words_tokenizer()
    parts: dict[str, Any] = {}
    if "Edit" in kind:
        from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

        shown = Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56)
        parts["processor"] = Qwen2VLProcessor(shown, tokens, Qwen2VLVideoProcessor(), chat_template=CHAT)
    return getattr(diffusers, kind)(
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 2, 2),
        ),
        scheduler=flow(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
        vae=qwen_vae(),
        text_encoder=qwen_text(tokens),
        tokenizer=tokens,
        **parts,
    )


def call_qwen(settings: PolicySettings) -> dict[str, Any]:
    return {"true_cfg_scale": settings.guidance}


# ---- Qwen-Image 2.1


def qwen3_vl(kind: str, tokens: Any, layers: int) -> Any:
    import transformers

    mark = tokens.convert_tokens_to_ids
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    text = {**SMALL, "num_hidden_layers": layers, "vocab_size": len(tokens), "head_dim": 8}
    seen = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen3VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config={**seen, "deepstack_visual_indexes": []},
        image_token_id=mark("<|image_pad|>"),
        video_token_id=mark("<|video_pad|>"),
        vision_start_token_id=mark("<|vision_start|>"),
        vision_end_token_id=mark("<|vision_end|>"),
    )
    return getattr(transformers, kind)(config)


def qwen3_processor(tokens: Any) -> Any:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    return Qwen3VLProcessor(Qwen2VLImageProcessor(), tokens, Qwen3VLVideoProcessor(), chat_template=CHAT)


def qwen21() -> Any:
    import diffusers

    tokens = words_tokenizer()
    return diffusers.QwenImage21Pipeline(
        transformer=diffusers.QwenImage21Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            context_in_dim=16,
            mlp_ratio=2,
            axes_dims_rope=(4, 2, 2),
        ),
        scheduler=flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192),
        vae=diffusers.AutoencoderKLQwenImage21(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.2, 0.8, 1.0, 1.5],
        ),
        text_encoder=qwen3_vl("Qwen3VLForConditionalGeneration", tokens, 2),
        processor=qwen3_processor(tokens),
    )


def on_white(pictures: Tensor) -> Tensor:
    """Pictures [n, 4, H, W] with a channel of how much they cover."""
    return pictures[:, :3] * pictures[:, 3:] + (1 - pictures[:, 3:])


# ---- Krea 2


def krea2(**given: Any) -> Any:
    from diffusers import Krea2Pipeline, Krea2Transformer2DModel

    tokens = words_tokenizer(known="describe the image by detailing color shape size texture and background")
    return Krea2Pipeline(
        transformer=Krea2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            attention_head_dim=12,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            timestep_embed_dim=16,
            text_hidden_dim=16,
            num_text_layers=2,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=16,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=(4, 4, 4),
        ),
        scheduler=flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=6400),
        vae=qwen_vae(),
        text_encoder=qwen3_vl("Qwen3VLModel", tokens, 3),
        tokenizer=tokens,
        text_encoder_select_layers=(1, 3),
        **given,
    )


# ---- HunyuanImage, HunyuanDiT, Kolors


def hunyuan_image() -> Any:
    import diffusers
    from diffusers.guiders import ClassifierFreeGuidance
    from transformers import ByT5Tokenizer

    tokens, letters = words_tokenizer(), ByT5Tokenizer()
    return diffusers.HunyuanImagePipeline(
        transformer=diffusers.HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=16,
            text_embed_2_dim=32,
            rope_axes_dim=(4, 4),
        ),
        scheduler=flow(shift=4.0),
        vae=diffusers.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32, 32),
            layers_per_block=1,
            spatial_compression_ratio=4,
            sample_size=64,
            scaling_factor=0.8,
        ),
        text_encoder=qwen_text(tokens),
        tokenizer=tokens,
        text_encoder_2=t5(letters),
        tokenizer_2=letters,
        guider=ClassifierFreeGuidance(guidance_scale=3.5),
    )


def hunyuan_dit() -> Any:
    import diffusers
    from transformers import BertConfig, BertModel

    tokens, t5_tokens = words_tokenizer(), _t5_tokenizer()
    return diffusers.HunyuanDiTPipeline(
        transformer=diffusers.HunyuanDiT2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            patch_size=2,
            sample_size=16,
            hidden_size=16,
            num_layers=4,
            mlp_ratio=2.0,
            cross_attention_dim=16,
            cross_attention_dim_t5=32,
            pooled_projection_dim=16,
        ),
        scheduler=diffusers.DDPMScheduler(
            prediction_type="v_prediction", timestep_spacing="leading", clip_sample=False
        ),
        vae=eightfold_vae(),
        text_encoder=BertModel(
            BertConfig(
                vocab_size=len(tokens),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
            )
        ),
        tokenizer=tokens,
        text_encoder_2=t5(t5_tokens),
        tokenizer_2=t5_tokens,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def kolors() -> Any:
    import diffusers
    from diffusers.pipelines.kolors import ChatGLMModel
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    tokens = chatglm_tokenizer()
    text = ChatGLMModel(
        ChatGLMConfig(
            num_layers=2,
            padded_vocab_size=1000,
            hidden_size=16,
            ffn_hidden_size=32,
            kv_channels=8,
            num_attention_heads=2,
            seq_length=256,
            multi_query_attention=True,
            multi_query_group_num=1,
            original_rope=True,
        )
    )
    for weights in text.parameters():  # it leaves them as memory was
        torch.nn.init.normal_(weights, 0.0, 0.2)
    return diffusers.KolorsPipeline(
        unet=_unet(
            cross_attention_dim=32,
            use_linear_projection=True,
            encoder_hid_dim=16,
            encoder_hid_dim_type="text_proj",
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **DIFFUSION),
        vae=_vae(scaling_factor=0.13025),
        text_encoder=text,
        tokenizer=tokens,
    )


def chatglm_tokenizer() -> Any:
    """Its file is there as long as it is."""
    import sentencepiece
    from diffusers.pipelines.kolors import ChatGLMTokenizer

    home = TemporaryDirectory()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 20),
        model_prefix=f"{home.name}/tokenizer",
        vocab_size=200,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    made = ChatGLMTokenizer(f"{home.name}/tokenizer.model")
    made.home = home
    return made


# ---- CogView3-Plus, ERNIE-Image


def cogview3() -> Any:
    import diffusers

    tokens = _t5_tokenizer()
    return diffusers.CogView3PlusPipeline(
        transformer=diffusers.CogView3PlusTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=32,
            time_embed_dim=8,
            condition_dim=4,
            pos_embed_max_size=16,
            sample_size=8,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            num_train_timesteps=999,  # as CogVideoX's
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        ),
        vae=image_vae(shift_factor=None),
        text_encoder=t5(tokens),
        tokenizer=tokens,
    )


def ernie_image() -> Any:
    import diffusers
    import transformers

    tokens = words_tokenizer()
    network = diffusers.ErnieImageTransformer2DModel(
        hidden_size=24,
        num_attention_heads=2,
        num_layers=1,
        ffn_hidden_size=16,
        in_channels=16,
        out_channels=16,
        text_in_dim=16,
        rope_axes_dim=(4, 4, 4),
    )
    for layer in (network.adaLN_modulation[-1], network.final_linear):  # that begin with 0
        torch.nn.init.normal_(layer.weight, 0.0, 0.2)
    return diffusers.ErnieImagePipeline(
        transformer=network,
        scheduler=flow(shift=4.0),
        vae=flux2_vae(),
        text_encoder=transformers.Mistral3Model(mistral3(tokens, 2)),
        tokenizer=tokens,
    )


# ---- Ideogram 4, Lumina-Next, Nucleus-Image


def ideogram4() -> Any:
    import diffusers

    tokens = words_tokenizer()

    def network() -> Any:
        return diffusers.Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=16,
            adaln_dim=16,
            llm_features_dim=13 * 16,
            mrope_section=(4, 2, 2),
        )

    return diffusers.Ideogram4Pipeline(
        scheduler=flow(),
        vae=flux2_vae(),
        text_encoder=qwen3_vl("Qwen3VLModel", tokens, 36),
        tokenizer=tokens,
        transformer=network(),
        unconditional_transformer=network(),
    )


def begun_below(pipeline: Any, noise: Tensor, pictures: list[Any], settings: PolicySettings) -> Tensor:
    """Its schedule begins a little below 1, and a flow with as much noise as there is there."""
    from diffusers.pipelines.ideogram4 import pipeline_ideogram4 as plain

    mu = plain._resolution_aware_mu(settings.height, settings.width, 0.0)
    pipeline.scheduler.set_timesteps(sigmas=plain._logit_normal_sigmas(1, mu, std=1.5).tolist())
    first = pipeline.scheduler.sigmas[0]
    return noise * torch.hypot(first, 1 - first)


def lumina() -> Any:
    from diffusers import LuminaNextDiT2DModel, LuminaPipeline

    tokens = marked_tokenizer()
    network = LuminaNextDiT2DModel(
        sample_size=16,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=2,
        cross_attention_dim=16,
    )
    torch.nn.init.zeros_(network.pad_token)  # that nothing sees, and that is left as memory was
    torch.nn.init.normal_(network.layers[0].gate)  # that begins with 0
    return LuminaPipeline(
        transformer=network,
        scheduler=flow(shift=4.0),
        vae=eightfold_vae(),
        text_encoder=gemma(tokens),
        tokenizer=tokens,
    )


def eightfold_vae(**given: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.7,
        **given,
    )


def nucleus_image() -> Any:
    import diffusers
    from diffusers.pipelines.nucleusmoe_image import pipeline_nucleusmoe_image as plain

    tokens = words_tokenizer(known=plain.DEFAULT_SYSTEM_PROMPT)
    network = diffusers.NucleusMoEImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 2, 2),
        mlp_ratio=2.0,
        dense_moe_strategy="all_moe",
        num_experts=4,
        moe_intermediate_dim=16,
        capacity_factors=2.0,
    )
    for name, weights in network.named_parameters():
        if ".experts." in name:  # that are left as memory was
            torch.nn.init.normal_(weights, 0.0, 0.2)
    return diffusers.NucleusMoEImagePipeline(
        transformer=network,
        scheduler=flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        vae=qwen_vae(),
        text_encoder=qwen3_vl("Qwen3VLForConditionalGeneration", tokens, 8),
        processor=qwen3_processor(tokens),
    )


# ---- Bria and FIBO


def bria() -> Any:
    from diffusers import BriaPipeline, BriaTransformer2DModel

    tokens = _t5_tokenizer()
    return BriaPipeline(
        transformer=BriaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=[4, 2, 2],
        ),
        scheduler=flow(shift=3.0),
        vae=image_vae(),
        text_encoder=t5(tokens),
        tokenizer=tokens,
    )


def fibo() -> Any:
    import diffusers
    from transformers import SmolLM3Config, SmolLM3ForCausalLM

    tokens = marked_tokenizer()
    return diffusers.BriaFiboPipeline(
        transformer=diffusers.BriaFiboTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=[4, 2, 2],
            text_encoder_dim=16,
        ),
        scheduler=flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        vae=diffusers.AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            is_residual=True,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.2, 0.8, 1.0, 1.5],
            scale_factor_spatial=16,
        ),
        text_encoder=SmolLM3ForCausalLM(
            SmolLM3Config(
                vocab_size=128001,  # no text is told as the last of them
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                **SMALL,
            )
        ),
        tokenizer=tokens,
    )


def fibo2() -> Any:
    import diffusers

    network = diffusers.BriaFibo2Transformer2DModel(
        in_channels=4,
        dim=24,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=3 * 16,
        injection_layer_ids=(0, 1, 2, 3, 4),
        perceiver_num_layers=1,
        min_num_gist_tokens=4,
        max_num_gist_tokens=12,
        gist_step=2,
        gist_min_text_len=20,
        gist_max_text_len=100,
        axes_dims=(4, 4, 4),
        axes_lens=(64, 64, 64),
    )
    for name, weights in network.named_parameters():
        if name.endswith("cross_attn_gate"):  # that begins with 0
            torch.nn.init.normal_(weights)
    tokens = words_tokenizer()
    return diffusers.BriaFibo2Pipeline(
        transformer=network,
        scheduler=flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        vae=flux2_vae(),
        text_encoder=qwen3_vl("Qwen3VLForConditionalGeneration", tokens, 36),
        processor=qwen3_processor(tokens),
    )


# ---- Ovis-Image and LongCat-Image


def ovis_image() -> Any:
    from diffusers import OvisImagePipeline, OvisImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    tokens = words_tokenizer()
    return OvisImagePipeline(
        transformer=OvisImageTransformer2DModel(
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 2, 2),
        ),
        scheduler=flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        vae=image_vae(),
        text_encoder=Qwen3Model(Qwen3Config(vocab_size=len(tokens), head_dim=8, **SMALL)),
        tokenizer=tokens,
    )


def longcat_image() -> Any:
    from diffusers import LongCatImagePipeline, LongCatImageTransformer2DModel
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    tokens = words_tokenizer()
    return LongCatImagePipeline(
        transformer=LongCatImageTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=[4, 2, 2],
        ),
        scheduler=flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15),
        vae=image_vae(),
        text_encoder=qwen_text(tokens),
        tokenizer=tokens,
        text_processor=Qwen2VLProcessor(
            Qwen2VLImageProcessor(), tokens, Qwen2VLVideoProcessor(), chat_template=CHAT
        ),
    )


# ---- Z-Image


def z_image(kind: str = "ZImagePipeline") -> Any:
    import diffusers
    import transformers

    tokens = words_tokenizer()
    parts: dict[str, Any] = {}
    if "Omni" in kind:
        seen = transformers.Siglip2VisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=16
        )
        parts["siglip"] = transformers.Siglip2VisionModel(seen)
        parts["siglip_processor"] = transformers.Siglip2ImageProcessor()
    return getattr(diffusers, kind)(
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            siglip_feat_dim=16 if parts else None,
            axes_dims=[4, 6, 6],
            axes_lens=[256, 64, 64],
        ),
        scheduler=flow(shift=3.0),
        vae=image_vae(),
        text_encoder=transformers.Qwen3Model(
            transformers.Qwen3Config(vocab_size=len(tokens), head_dim=8, **SMALL)
        ),
        tokenizer=tokens,
        **parts,
    )


# ---- Wan


def wan(kind: str = "WanPipeline", extra: int = 0, experts: bool = False, **given: Any) -> Any:
    """extra: channels that the network sees beside the latent. experts: two networks."""
    import diffusers

    tokens = _t5_tokenizer()
    image_dim = given.pop("image_dim", None)

    def network() -> Any:
        return diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4 + extra,
            out_channels=4,
            text_dim=32,
            freq_dim=16,
            ffn_dim=16,
            num_layers=1,
            rope_max_seq_len=32,
            image_dim=image_dim,
            added_kv_proj_dim=24 if image_dim else None,
        )

    if experts:
        given |= {"transformer_2": network(), "boundary_ratio": 0.9}
    if image_dim:
        from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

        given["image_encoder"] = CLIPVisionModel(
            CLIPVisionConfig(
                hidden_size=image_dim,
                intermediate_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=32,
                patch_size=16,
            )
        )
        given["image_processor"] = CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
    return getattr(diffusers, kind)(
        transformer=network(),
        scheduler=flow(shift=3.0),
        vae=diffusers.AutoencoderKLWan(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.2, 0.8, 1.0, 1.5],
            scale_factor_temporal=2,
            scale_factor_spatial=4,
        ),
        text_encoder=t5(tokens, "UMT5EncoderModel"),
        tokenizer=tokens,
        **given,
    )


def call_scale(settings: PolicySettings) -> dict[str, Any]:
    return {"guidance_scale": settings.guidance}


# ---- HunyuanVideo


def hunyuan_video(image_condition_type: str | None = None, guidance_embeds: bool = True) -> Any:
    """From a picture, where the network says how it is told of one."""
    import diffusers
    from transformers import CLIPTextModel, LlamaConfig, LlamaModel

    clip = _clip_tokenizer()
    clip.model_max_length = 77
    clip_config = _clip_config(clip)
    clip_config.max_position_embeddings = 77
    small = SMALL | {"num_hidden_layers": 3}
    if image_condition_type is None:
        tokens, kind, parts = words_tokenizer(), "HunyuanVideoPipeline", {}
        text: Any = LlamaModel(LlamaConfig(vocab_size=len(tokens), **small))
    else:
        text, tokens, parts = llava(small)
        kind = "HunyuanVideoImageToVideoPipeline"
    return getattr(diffusers, kind)(
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=9 if image_condition_type == "latent_concat" else 4,
            out_channels=4,
            image_condition_type=image_condition_type,
            guidance_embeds=guidance_embeds,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=16,
            pooled_projection_dim=16,
            rope_axes_dim=(2, 4, 4),
        ),
        scheduler=flow(shift=7.0),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
        text_encoder=text,
        tokenizer=tokens,
        text_encoder_2=CLIPTextModel(clip_config),
        tokenizer_2=clip,
        **parts,
    )


def llava(small: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """HunyuanVideo's reader of texts and pictures, its tokenizer, and what else comes with it.

    As its pipeline counts places, the words of its template are tokens (one is two), 103 before the prompt,
    and a picture is 24 by 24 of them.
    """
    import transformers
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video_image2video as plain

    marks = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>")
    known = plain.DEFAULT_PROMPT_TEMPLATE["template"].replace("detailing", "detail") + "\ning"
    for mark in marks:
        known = known.replace(mark, "")
    tokens = marked_tokenizer(known=known, marks=marks)
    text = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            text_config={"model_type": "llama", "vocab_size": len(tokens), **small},
            vision_config={
                "model_type": "clip_vision_model",
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 48,
                "patch_size": 2,
            },
            image_token_index=tokens.convert_tokens_to_ids("<image>"),
            pad_token_id=tokens.pad_token_id,
        )
    )
    shown = transformers.CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    return text, tokens, {"image_processor": shown}


def call_hunyuan(settings: PolicySettings) -> dict[str, Any]:
    return {"true_cfg_scale": settings.guidance, "guidance_scale": 6.0}


def hunyuan_video15(kind: str = "HunyuanVideo15Pipeline") -> Any:
    import diffusers
    from diffusers import AutoencoderKLHunyuanVideo15, HunyuanVideo15Transformer3DModel
    from diffusers.guiders import ClassifierFreeGuidance
    from transformers import ByT5Tokenizer, Qwen2_5_VLTextModel
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig

    tokens, letters = words_tokenizer(), ByT5Tokenizer()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = Qwen2_5_VLTextConfig(
        vocab_size=len(tokens), rope_parameters=rope, **SMALL | {"num_hidden_layers": 3}
    )
    given: dict[str, Any] = {}
    if "Image" in kind:
        from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

        given["feature_extractor"] = SiglipImageProcessor(size={"height": 32, "width": 32})
        given["image_encoder"] = SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=12,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=32,
                patch_size=16,
            )
        )
    return getattr(diffusers, kind)(
        transformer=HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=16,
            text_embed_2_dim=32,
            image_embed_dim=12,
            rope_axes_dim=(2, 2, 12),
            target_size=64,
            task_type="i2v" if "Image" in kind else "t2v",
        ),
        scheduler=flow(shift=7.0),
        vae=AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(16, 16, 16),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=2,
            downsample_match_channel=False,
            upsample_match_channel=False,
            scaling_factor=0.8,
        ),
        text_encoder=Qwen2_5_VLTextModel(config),
        tokenizer=tokens,
        text_encoder_2=t5(letters),
        tokenizer_2=letters,
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
        **given,
    )


def set_guider(pipeline: Any, settings: PolicySettings) -> None:
    pipeline.guider = pipeline.guider.new(guidance_scale=settings.guidance)


def set_guider_and_size(pipeline: Any, settings: PolicySettings) -> None:
    """Its pipeline chooses the size by the picture's and an area."""
    set_guider(pipeline, settings)
    size = settings.height, settings.width
    pipeline.video_processor.calculate_default_height_width = lambda **_: size


# ---- FLUX.2


def flux2(kind: str = "Flux2Pipeline") -> Any:
    import diffusers
    import transformers

    tokens = words_tokenizer()
    if kind == "Flux2Pipeline":
        text = transformers.Mistral3ForConditionalGeneration(mistral3(tokens, 31))
    else:
        text = transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(vocab_size=len(tokens), head_dim=8, **SMALL | {"num_hidden_layers": 28})
        )
    return getattr(diffusers, kind)(
        transformer=diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=kind == "Flux2Pipeline",
        ),
        scheduler=flow(use_dynamic_shifting=True),
        vae=flux2_vae(),
        text_encoder=text,
        tokenizer=tokens,
    )


def flux2_vae() -> Any:
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
    )
    torch.nn.init.uniform_(vae.bn.running_mean, -0.2, 0.2)
    torch.nn.init.uniform_(vae.bn.running_var, 0.7, 1.5)
    return vae


def mistral3(tokens: Any, layers: int) -> Any:
    from transformers import Mistral3Config

    return Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": len(tokens),
            "head_dim": 8,
            **SMALL | {"num_hidden_layers": layers},
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
    )


# ---- LTX-Video


def ltx(kind: str = "LTXPipeline", scaling_factor: float = 0.8) -> Any:
    import diffusers
    from diffusers import AutoencoderKLLTXVideo, LTXVideoTransformer3DModel

    tokens = _t5_tokenizer()
    vae = AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1, 1, 1, 1),
        patch_size=1,
        scaling_factor=scaling_factor,
    )
    vae.latents_mean.copy_(vae.latents_mean.new_tensor([0.1, -0.2, 0.3, 0.0]))
    vae.latents_std.copy_(vae.latents_std.new_tensor([1.2, 0.8, 1.0, 1.5]))
    return getattr(diffusers, kind)(
        transformer=LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=1,
            caption_channels=32,
        ),
        scheduler=flow(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1),
        vae=certain(vae),
        text_encoder=t5(tokens),
        tokenizer=tokens,
    )


def begun(pipeline: Any, noise: Tensor, pictures: list[Any], settings: PolicySettings) -> Tensor:
    """Noise as a call takes it, with the pictures where the pipeline puts them if it draws that itself."""
    size = {"height": settings.height, "width": settings.width}
    shown = pipeline.video_processor.preprocess(pictures, **size)
    own, given = pipeline.prepare_latents(
        shown, len(noise), noise.shape[-1], num_frames=settings.frames, dtype=noise.dtype, **size
    )
    return torch.where(given[..., None] > 0, own, noise)


def begun_compressed(pipeline: Any, noise: Tensor, pictures: list[Any], settings: PolicySettings) -> Tensor:
    """As `begun`, with pictures compressed as a call does it, in the units that a call takes."""
    import numpy as np
    from diffusers.pipelines.ltx2 import utils
    from PIL import Image

    strength = utils.DEFAULT_IMAGE_CRF
    seen = [utils.apply_image_conditioning_crf(np.array(one.convert("RGB")), strength) for one in pictures]
    tokens, vae = begun(pipeline, noise, [Image.fromarray(one) for one in seen], settings), pipeline.vae
    latents = pipeline._unpack_latents(tokens, 3, settings.height // 4, settings.width // 4)
    return pipeline._denormalize_latents(latents, vae.latents_mean, vae.latents_std)


def ltx2(kind: str = "LTX2Pipeline", scaling_factor: float = 0.8) -> Any:
    import diffusers
    from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video, LTX2VideoTransformer3DModel
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tokens = words_tokenizer()
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False),
        decoder_inject_noise=(False,) * 4,
        downsample_type=("spatiotemporal",) * 4,
        upsample_residual=(False,) * 3,
        upsample_factor=(1, 1, 1),
        patch_size=1,
        scaling_factor=scaling_factor,
    )
    vae.latents_mean.copy_(vae.latents_mean.new_tensor([0.1, -0.2, 0.3, 0.0]))
    vae.latents_std.copy_(vae.latents_std.new_tensor([1.2, 0.8, 1.0, 1.5]))
    connected = {
        f"{kind}_connector_{name}": value
        for kind in ("video", "audio")
        for name, value in {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_learnable_registers": None,
        }.items()
    }
    return getattr(diffusers, kind)(
        transformer=LTX2VideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            vae_scale_factors=(4, 4, 4),
            audio_in_channels=8,
            audio_out_channels=8,
            audio_num_attention_heads=2,
            audio_attention_head_dim=4,
            audio_cross_attention_dim=8,
            num_layers=1,
            caption_channels=16,
        ),
        scheduler=flow(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1),
        vae=vae,
        audio_vae=AutoencoderKLLTX2Audio(
            base_channels=8,
            ch_mult=(1, 1, 2),
            num_res_blocks=1,
            latent_channels=2,
            resolution=32,
            mel_bins=16,
        ),
        text_encoder=Gemma3ForConditionalGeneration(
            Gemma3Config(
                text_config={
                    **SMALL,
                    "vocab_size": len(tokens),
                    "head_dim": 8,
                    "layer_types": ["full_attention"] * 2,
                },
                vision_config={
                    "hidden_size": 8,
                    "intermediate_size": 8,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 2,
                    "image_size": 16,
                    "patch_size": 8,
                },
                mm_tokens_per_image=4,
                image_token_index=tokens.convert_tokens_to_ids("<|image_pad|>"),
            )
        ),
        tokenizer=tokens,
        connectors=LTX2TextConnectors(caption_channels=16, text_proj_in_factor=3, **connected),
        vocoder=LTX2Vocoder(
            in_channels=32,
            hidden_channels=16,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3]],
        ),
    )


def call_ltx2(settings: PolicySettings) -> dict[str, Any]:
    call = {"guidance_scale": settings.guidance, "audio_guidance_scale": settings.guidance}
    call |= {f"{kind}stg_scale": 0.0 for kind in ("", "audio_")}
    call |= {f"{kind}modality_scale": 1.0 for kind in ("", "audio_")}
    return call | {f"{kind}guidance_rescale": 0.0 for kind in ("", "audio_")}


def sound_behind(x: Tensor) -> dict[str, Tensor]:
    """Nine tokens of eight numbers behind the three frames of the video."""
    return {"audio_latents": x[:, :, 3:].flatten(1)[:, :72].unflatten(1, (9, 8))}


def sound_unpacked(x: Tensor) -> dict[str, Tensor]:
    """As `sound_behind`, in two channels of four numbers."""
    return {"audio_latents": sound_behind(x)["audio_latents"].unflatten(2, (2, 4)).transpose(1, 2)}


def by_token(x: Tensor) -> Tensor:
    """Latents [n, C, *place] as tokens [n, places, C]."""
    return x.flatten(2).transpose(1, 2)


# ---- Lumina 2, AuraFlow, Sana, CogView4


def gemma(tokens: Any) -> Any:
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(vocab_size=len(tokens), head_dim=8, pad_token_id=0, **SMALL))


def lumina2() -> Any:
    from diffusers import Lumina2Pipeline, Lumina2Transformer2DModel

    tokens = words_tokenizer()
    return Lumina2Pipeline(
        transformer=Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=24,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=2,
            axes_dim_rope=(4, 4, 4),
            axes_lens=(512, 64, 64),
            cap_feat_dim=16,
        ),
        scheduler=flow(shift=6.0),
        vae=image_vae(),
        text_encoder=gemma(tokens),
        tokenizer=tokens,
    )


def aura_flow() -> Any:
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel

    tokens = _t5_tokenizer()
    return AuraFlowPipeline(
        transformer=AuraFlowTransformer2DModel(
            sample_size=8,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pos_embed_max_size=256,
        ),
        scheduler=flow(shift=1.73),
        vae=image_vae(shift_factor=None),
        text_encoder=t5(tokens, "UMT5EncoderModel"),
        tokenizer=tokens,
    )


def deep_vae() -> Any:
    from diffusers import AutoencoderDC

    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        scaling_factor=0.4,
    )


def sana() -> Any:
    from diffusers import SanaPipeline, SanaTransformer2DModel

    tokens = words_tokenizer()
    return SanaPipeline(
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=16,
            sample_size=32,
        ),
        scheduler=flow(shift=3.0),
        vae=deep_vae(),
        text_encoder=gemma(tokens),
        tokenizer=tokens,
    )


def dreamlite(kind: str = "DreamLitePipeline") -> Any:
    import diffusers

    tokens = words_tokenizer(known="describe the image by detailing color shape size texture and background")
    return getattr(diffusers, kind)(
        text_encoder=qwen3_vl("Qwen3VLForConditionalGeneration", tokens, 2),
        tokenizer=tokens,
        processor=qwen3_processor(tokens),
        vae=diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
            scaling_factor=0.8,
            shift_factor=0.1,
        ),
        unet=diffusers.DreamLiteUNetModel(
            block_out_channels=(8, 16, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=16,
            encoder_hid_dim=16,
            encoder_hid_dim_type="text_proj_rms",
            addition_embed_type="time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=16,
            ff_mult=2,
        ),
        scheduler=flow(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.16),
    )


def omnigen() -> Any:
    """Its prompts are short enough for the near stretch of its rotations, its negative prompt is not."""
    from diffusers import OmniGenPipeline, OmniGenTransformer2DModel

    tokens = words_tokenizer()
    return OmniGenPipeline(
        transformer=OmniGenTransformer2DModel(
            hidden_size=16,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=16,
            num_layers=2,
            pad_token_id=0,
            vocab_size=len(tokens),
            max_position_embeddings=4096,
            original_max_position_embeddings=256,
            rope_scaling={"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 2.5, 3.0]},
            pos_embed_max_size=16,
            time_step_dim=16,
        ),
        scheduler=flow(invert_sigmas=True, num_train_timesteps=1),
        vae=eightfold_vae(),
        tokenizer=tokens,
    )


def cogview4() -> Any:
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel
    from transformers import GlmConfig, GlmModel

    tokens = marked_tokenizer(padding_side="left")
    return CogView4Pipeline(
        transformer=CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=4,
            pos_embed_max_size=128,
            sample_size=8,
            rope_axes_dim=(4, 4),
        ),
        scheduler=flow(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75, time_shift_type="linear"),
        vae=image_vae(shift_factor=None),
        text_encoder=GlmModel(GlmConfig(vocab_size=len(tokens), head_dim=8, pad_token_id=0, **SMALL)),
        tokenizer=tokens,
    )


# ---- CogVideoX, HiDream


# ---- PixArt


def pixart(kind: str = "PixArtSigmaPipeline", **given: Any) -> Any:
    import diffusers

    tokens = _t5_tokenizer()
    return getattr(diffusers, kind)(
        transformer=diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=24,
            in_channels=4,
            out_channels=8,  # noise, and a variance that was learned
            num_layers=2,
            cross_attention_dim=48,
            caption_channels=32,
            **{"sample_size": 16, "use_additional_conditions": False} | given,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(timestep_spacing="leading"),
        vae=image_vae(shift_factor=None),
        text_encoder=t5(tokens),
        tokenizer=tokens,
    )


def call_pixart(settings: PolicySettings) -> dict[str, Any]:
    return {"guidance_scale": settings.guidance, "use_resolution_binning": False, "clean_caption": False}


def by_ddim(pipeline: Any, settings: PolicySettings) -> None:
    from diffusers import DDIMScheduler

    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)


# ---- Kandinsky 3


def kandinsky3() -> Any:
    import diffusers

    tokens = _t5_tokenizer()
    network = diffusers.Kandinsky3UNet(
        in_channels=4,
        time_embedding_dim=8,
        groups=2,
        attention_head_dim=4,
        layers_per_block=2,
        block_out_channels=(8, 8, 8, 16),
        cross_attention_dim=8,
        encoder_hid_dim=32,
    )
    still = [part[-1] for name, part in network.named_modules() if name.endswith("context_mlp")]
    for part in (
        *still,
        network.encoder_hid_proj.projection_norm,
    ):  # which begin with 0, as nothing told them
        torch.nn.init.normal_(part.weight, 0.0, 0.2)
        torch.nn.init.normal_(part.bias, 0.0, 0.2)
    return diffusers.Kandinsky3Pipeline(
        unet=network,
        scheduler=diffusers.DDPMScheduler(  # as published
            beta_schedule="squaredcos_cap_v2", steps_offset=1, timestep_spacing="leading"
        ),
        movq=codebook(norm_type="spatial"),
        text_encoder=t5(tokens),
        tokenizer=tokens,
    )


def codebook(**given: Any) -> Any:
    from diffusers import VQModel

    made = VQModel(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 32, 32),  # as few as spatial norms take
        latent_channels=4,
        **given,
    )
    torch.nn.init.normal_(made.quantize.embedding.weight, 0.0, 5.0)  # as wide as unscaled latents
    return made


# ---- Kandinsky 5


def kandinsky5() -> Any:
    import diffusers
    from transformers import CLIPTextModel, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    tokens, clip = words_tokenizer(), _clip_tokenizer()
    seen = _clip_config(clip)
    seen.max_position_embeddings = 77
    network = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=16,
        in_text_dim2=16,
        time_dim=16,
        model_dim=16,
        ff_dim=32,
        num_text_blocks=2,
        num_visual_blocks=1,
        axes_dims=(4, 2, 2),
    )
    for name, weights in network.named_parameters():
        if "modulation" in name:  # which begins with 0
            torch.nn.init.normal_(weights, 0.0, 0.2)
    return diffusers.Kandinsky5T2IPipeline(
        transformer=network,
        scheduler=flow(shift=3.0),
        vae=eightfold_vae(shift_factor=0.1),
        text_encoder=qwen_text(tokens),
        tokenizer=Qwen2VLProcessor(
            Qwen2VLImageProcessor(), tokens, Qwen2VLVideoProcessor(), chat_template=CHAT
        ),
        text_encoder_2=CLIPTextModel(seen),
        tokenizer_2=clip,
    )


def unrounded(pipeline: Any, settings: PolicySettings) -> None:
    """Queries and keys keep their precision, and the size that is asked for is drawn."""
    from mmalign.pipelines.kandinsky5 import Attention

    pipeline.transformer.set_attn_processor(Attention())
    pipeline.resolutions = [(settings.width, settings.height)]


# ---- PRX


def prx_network(**given: Any) -> Any:
    from diffusers import PRXTransformer2DModel

    made = PRXTransformer2DModel(
        context_in_dim=16, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=1, axes_dim=[4, 4], **given
    )
    for block in made.blocks:  # whose gates begin with 0
        torch.nn.init.normal_(block.modulation.lin.weight, 0.0, 0.2)
        torch.nn.init.normal_(block.modulation.lin.bias, 0.0, 0.2)
    return made


def prx(vae: Any = None) -> Any:
    from diffusers import PRXPipeline
    from transformers import T5GemmaConfig
    from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

    from mmalign.pipelines.prx import name_encoder

    name_encoder()  # for the plain pipeline
    tokens = words_tokenizer()
    half = {**SMALL, "vocab_size": len(tokens), "head_dim": 8, "pad_token_id": 0}
    both = T5GemmaConfig(encoder=half, decoder=half)
    encoder = T5GemmaEncoder(both.encoder)

    def as_published(folder: Path, **given: Any) -> None:
        """Beside its weights stands the configuration of both halves, of which its loader takes its own."""
        T5GemmaEncoder.save_pretrained(encoder, folder, **given)
        both.save_pretrained(folder)

    encoder.save_pretrained = as_published
    return PRXPipeline(
        transformer=prx_network(in_channels=4),
        scheduler=flow(shift=3.0),
        text_encoder=encoder,
        tokenizer=tokens,
        vae=image_vae() if vae is None else vae,
        default_sample_size=256,
    )


def call_prx(settings: PolicySettings) -> dict[str, Any]:
    return {
        "guidance_scale": settings.guidance,
        "tokenizer_max_length": settings.max_sequence_length,
        "use_resolution_binning": False,
    }


def prx_pixel() -> Any:
    from diffusers import PRXPixelPipeline

    tokens = words_tokenizer()
    return PRXPixelPipeline(
        transformer=prx_network(in_channels=3, patch_size=4, bottleneck_size=8, resolution_embeds=True),
        scheduler=flow(shift=3.0),
        text_encoder=qwen3_vl("Qwen3VLModel", tokens, 2).language_model,
        tokenizer=tokens,
        prompt_max_tokens=16,
    )


# ---- Latent diffusion


def ldm(vae: Any = None) -> Any:
    import diffusers
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    tokens = words_tokenizer()
    return diffusers.LDMTextToImagePipeline(
        unet=_unet(cross_attention_dim=16),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
        ),
        vqvae=eightfold_vae() if vae is None else vae,
        bert=LDMBertModel(
            LDMBertConfig(
                vocab_size=len(tokens),
                encoder_layers=1,
                encoder_ffn_dim=16,
                encoder_attention_heads=2,
                head_dim=8,
                d_model=16,
                init_std=0.5,
            )
        ),
        tokenizer=tokens,
    )


def by_clipped_ddim(pipeline: Any, settings: PolicySettings) -> None:
    """DDIM that keeps to the clean estimate that it has clipped, as DDPM does."""
    from diffusers import DDIMScheduler

    class Clipped(DDIMScheduler):
        def step(self, *args: Any, **given: Any) -> Any:
            return super().step(*args, use_clipped_model_output=True, **given)

    pipeline.scheduler = Clipped.from_config(pipeline.scheduler.config)


def cogvideo(kind: str = "CogVideoXPipeline", **given: Any) -> Any:
    import diffusers
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel

    tokens = _t5_tokenizer()
    return getattr(diffusers, kind)(
        transformer=CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=32,
            num_layers=1,
            sample_width=24,
            sample_height=16,
            sample_frames=5,
            temporal_compression_ratio=2,
            max_text_seq_length=16,
            **{"in_channels": 4} | given,
        ),
        scheduler=CogVideoXDDIMScheduler(
            num_train_timesteps=999,  # three steps divide it, as fifty do a thousand
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        ),
        vae=certain(
            AutoencoderKLCogVideoX(
                down_block_types=("CogVideoXDownBlock3D",) * 2,
                up_block_types=("CogVideoXUpBlock3D",) * 2,
                block_out_channels=(8, 8),
                latent_channels=4,
                layers_per_block=1,
                norm_num_groups=4,
                temporal_compression_ratio=2,
                scaling_factor=0.8,
            )
        ),
        text_encoder=t5(tokens),
        tokenizer=tokens,
    )


def certain(vae: Any) -> Any:
    """An encoder without variance, as its pipeline draws the latent of a picture."""
    last = vae.encoder.conv_out.conv
    last.weight.data[4:] = 0
    last.bias.data[4:] = -30
    return vae


def frames_first(x: Tensor) -> Tensor:
    """Latents [n, C, F, h, w] as [n, F, C, h, w]."""
    return x.transpose(1, 2)


def hidream() -> Any:
    from diffusers import HiDreamImagePipeline, HiDreamImageTransformer2DModel
    from transformers import CLIPTextModelWithProjection, LlamaConfig, LlamaForCausalLM

    clips, t5_tokens, tokens = [_clip_tokenizer(), _clip_tokenizer()], _t5_tokenizer(), marked_tokenizer()
    return HiDreamImagePipeline(
        transformer=HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=[32, 16],
            text_emb_dim=32,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(4, 2, 2),
            max_resolution=(32, 32),
            llama_layers=[0, 1],
        ),
        scheduler=flow(shift=3.0),
        vae=image_vae(),
        text_encoder=CLIPTextModelWithProjection(_clip_config(clips[0])),
        tokenizer=clips[0],
        text_encoder_2=CLIPTextModelWithProjection(_clip_config(clips[1])),
        tokenizer_2=clips[1],
        text_encoder_3=t5(t5_tokens),
        tokenizer_3=t5_tokens,
        text_encoder_4=LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **SMALL)),
        tokenizer_4=tokens,
    )


def keep_size(pipeline: Any, settings: PolicySettings) -> None:
    """HiDream's pipeline brings pictures to the area of a square of this side."""
    side = (settings.height * settings.width) ** 0.5
    pipeline.default_sample_size = side / pipeline.vae_scale_factor


FAMILIES = {
    "StableDiffusion3Pipeline": Row(lambda: written("StableDiffusion3Pipeline", tiny_sd3), call_scale),
    "StableDiffusionPipeline": Row(
        sd, call_rescaled, {"guidance_rescale": 0.7}, takes_length=False, prepare=by_ddim
    ),
    "StableDiffusionPipeline of v": Row(
        lambda: sd("v_prediction"), call_scale, takes_length=False, prepare=by_ddim
    ),
    "StableDiffusionXLPipeline": Row(
        sdxl,
        call_rescaled,
        {"guidance_rescale": 0.7},
        own_negative=True,  # zeros
        takes_length=False,
        prepare=by_ddim,
    ),
    "StableDiffusionXLPipeline of v": Row(
        lambda: sdxl("v_prediction"), call_scale, own_negative=True, takes_length=False, prepare=by_ddim
    ),
    "FluxPipeline": Row(flux, call_flux, latents=pack),
    "FluxPipeline without guidance": Row(lambda: flux(guidance=False), call_flux, latents=pack),
    "FluxKontextPipeline": Row(
        lambda: flux("FluxKontextPipeline"), call_kontext, latents=pack, sources=1, own_picture=True
    ),
    "ChromaPipeline": Row(chroma, lambda s: {"guidance_scale": s.guidance}, latents=pack),
    "QwenImagePipeline": Row(qwen, call_qwen, {"max_sequence_length": 120}, latents=pack),
    "QwenImageEditPipeline": Row(
        lambda: qwen("QwenImageEditPipeline"), call_qwen, latents=pack, sources=1, own_picture=True
    ),
    "QwenImageEditPlusPipeline": Row(
        lambda: qwen("QwenImageEditPlusPipeline"), call_qwen, latents=pack, sources=2, one_by_one=True
    ),
    "QwenImage21Pipeline": Row(
        qwen21,
        call_qwen,
        {"max_sequence_length": 200},
        size=(64, 96),
        latents=lambda x: x.flatten(2).transpose(1, 2),
        one_by_one=True,  # places of a picture are counted on from the longest of its texts
        takes_length=False,
        shown=on_white,
    ),
    "Krea2Pipeline": Row(
        krea2, lambda s: {"guidance_scale": s.guidance - 1}, {"max_sequence_length": 200}, latents=pack
    ),
    "OvisImagePipeline": Row(
        ovis_image, call_scale, {"max_sequence_length": 250}, latents=pack, loads_lora=False
    ),
    "LongCatImagePipeline": Row(
        longcat_image,
        lambda s: {"guidance_scale": s.guidance, "enable_prompt_rewrite": False},
        latents=pack,
        takes_length=False,
        loads_lora=False,
    ),
    "ZImagePipeline": Row(z_image, lambda s: {"guidance_scale": s.guidance - 1}, {"max_sequence_length": 48}),
    "ZImageOmniPipeline": Row(
        lambda: z_image("ZImageOmniPipeline"),
        lambda s: {"guidance_scale": s.guidance - 1},
        {"max_sequence_length": 48},
    ),
    "WanPipeline": Row(wan, call_scale, frames=5),
    "WanPipeline 5B": Row(lambda: wan(expand_timesteps=True), call_scale, frames=5),
    "WanPipeline A14B": Row(
        lambda: wan(experts=True),
        lambda s: {"guidance_scale": s.guidance, "guidance_scale_2": s.low_noise_guidance},
        {"low_noise_guidance": 2.0},
        frames=5,
    ),
    "WanImageToVideoPipeline": Row(
        lambda: wan("WanImageToVideoPipeline", 6, image_dim=16), call_scale, frames=5, sources=1
    ),
    "WanImageToVideoPipeline 5B": Row(
        lambda: wan("WanImageToVideoPipeline", expand_timesteps=True), call_scale, frames=5, sources=1
    ),
    "WanImageToVideoPipeline A14B": Row(
        lambda: wan("WanImageToVideoPipeline", 6, experts=True), call_scale, frames=5, sources=1
    ),
    "PixArtAlphaPipeline": Row(
        lambda: pixart("PixArtAlphaPipeline", sample_size=128, use_additional_conditions=True),
        call_pixart,
        peft_lora=True,
        prepare=by_ddim,
    ),
    "PixArtSigmaPipeline": Row(pixart, call_pixart, peft_lora=True, prepare=by_ddim),
    "HunyuanImagePipeline": Row(
        hunyuan_image, lambda s: {}, takes_length=False, loads_lora=False, prepare=set_guider
    ),
    "HunyuanDiTPipeline": Row(
        hunyuan_dit,
        lambda s: {
            "guidance_scale": s.guidance,
            "guidance_rescale": s.guidance_rescale,
            "use_resolution_binning": False,
        },
        {"guidance_rescale": 0.4},
        size=(64, 96),
        takes_length=False,
        peft_lora=True,
        prepare=by_ddim,
    ),
    "CogView3PlusPipeline": Row(cogview3, call_scale, takes_length=False, peft_lora=True),
    "ErnieImagePipeline": Row(
        ernie_image, lambda s: {"guidance_scale": s.guidance, "use_pe": False}, takes_length=False
    ),
    "Ideogram4Pipeline": Row(
        ideogram4,
        lambda s: {"guidance_scale": s.guidance, "guidance_schedule": None},
        {"max_sequence_length": 48},
        latents=lambda x: x.flatten(2).transpose(1, 2),
        begun=begun_below,
        negative=False,
    ),
    "LuminaPipeline": Row(
        lumina,
        lambda s: {"guidance_scale": s.guidance, "clean_caption": False},
        size=(64, 96),
        takes_length=False,
        peft_lora=True,
    ),
    "NucleusMoEImagePipeline": Row(
        nucleus_image, call_scale, {"max_sequence_length": 200}, latents=pack, loads_lora=False
    ),
    "BriaPipeline": Row(bria, call_scale, latents=pack, takes_length=False, loads_lora=False),
    "BriaFiboPipeline": Row(
        fibo,
        call_scale,
        {"max_sequence_length": 48},
        size=(64, 96),
        latents=lambda x: x.flatten(2).transpose(1, 2),
    ),
    "BriaFibo2Pipeline": Row(
        fibo2,
        lambda s: {"guidance_scale": s.guidance, "render_text_images": False},
        {"max_sequence_length": 260},
        takes_length=False,
        own_negative=True,
    ),
    "KolorsPipeline": Row(kolors, call_scale, takes_length=False, prepare=by_ddim),
    "Kandinsky3Pipeline": Row(
        kandinsky3,
        lambda s: {"guidance_scale": s.guidance - 1},
        size=(64, 128),
        one_by_one=True,  # texts of a batch are cut where the longest ends
        own_negative=True,
        takes_length=False,
        peft_lora=True,
        prepare=by_clipped_ddim,
        shown=lambda pictures: (pictures / 2 + 0.5).clamp(0, 1),
    ),
    "Kandinsky5T2IPipeline": Row(
        kandinsky5,
        call_scale,
        {"max_sequence_length": 200},
        size=(64, 96),
        latents=lambda x: x.permute(0, 2, 3, 1)[:, None],
        one_by_one=True,  # a batch of its pipeline reads what fills its texts up
        prepare=unrounded,
    ),
    "LDMTextToImagePipeline": Row(
        ldm,
        call_scale,
        size=(64, 96),
        negative=False,
        takes_length=False,
        loads_lora=False,
    ),
    "LDMTextToImagePipeline with a codebook": Row(
        lambda: ldm(codebook()),
        call_scale,
        size=(64, 96),
        negative=False,
        takes_length=False,
        loads_lora=False,
    ),
    "PRXPipeline": Row(
        prx,
        call_prx,
        one_by_one=True,  # guided, its pipeline tells the time of one prompt alone
        takes_length=False,
        peft_lora=True,
    ),
    "PRXPipeline of a deep autoencoder": Row(
        lambda: prx(deep_vae()),
        call_prx,
        one_by_one=True,  # guided, its pipeline tells the time of one prompt alone
        size=(32, 64),
        takes_length=False,
        peft_lora=True,
    ),
    "PRXPixelPipeline": Row(
        prx_pixel,
        lambda s: {"guidance_scale": s.guidance, "use_resolution_binning": False},
        latents=lambda x: 2 * x,  # its noise is twice as wide
        one_by_one=True,
        takes_length=False,
        peft_lora=True,
        shown=lambda pictures: (pictures / 2 + 0.5).clamp(0, 1),
    ),
    "LTXPipeline": Row(
        ltx, call_rescaled, {"guidance_rescale": 0.7}, size=(32, 64), frames=9, latents=by_token
    ),
    "LTXImageToVideoPipeline": Row(
        lambda: ltx("LTXImageToVideoPipeline", 1.0),  # its pipeline knows no factor when it encodes
        call_rescaled,
        {"guidance_rescale": 0.7},
        size=(32, 64),
        frames=9,
        latents=by_token,
        begun=begun,
        sources=1,
        own_picture=True,
    ),
    "LTX2Pipeline": Row(
        ltx2,
        call_ltx2,
        size=(32, 64),
        frames=9,
        latents=lambda x: by_token(x[:, :, :3]),
        besides=sound_behind,
    ),
    "LTX2ImageToVideoPipeline": Row(
        lambda: ltx2("LTX2ImageToVideoPipeline", 1.0),  # as of LTXImageToVideoPipeline
        call_ltx2,
        size=(32, 64),
        frames=9,
        latents=lambda x: by_token(x[:, :, :3]),
        besides=sound_unpacked,
        begun=begun_compressed,
        sources=1,
        own_picture=True,
    ),
    "Lumina2Pipeline": Row(lumina2, call_scale, {"max_sequence_length": 200}),
    "AuraFlowPipeline": Row(aura_flow, call_scale),
    "SanaPipeline": Row(
        sana, lambda s: {"guidance_scale": s.guidance, "use_resolution_binning": False}, size=(32, 64)
    ),
    "DreamLitePipeline": Row(
        dreamlite,
        call_scale,
        {"max_sequence_length": 200},
        one_by_one=True,
        alone=True,
        loads_lora=False,
    ),
    "DreamLiteMobilePipeline": Row(
        lambda: dreamlite("DreamLiteMobilePipeline"),
        lambda s: {},
        {"max_sequence_length": 200},
        one_by_one=True,
        alone=True,
        negative=False,
        true_guidance=False,
        loads_lora=False,
    ),
    "OmniGenPipeline": Row(
        omnigen,
        call_scale,
        {"max_sequence_length": 500},
        size=(64, 96),
        one_by_one=True,  # places of all texts are those of the first
        negative=False,
        takes_length=False,
        peft_lora=True,
    ),
    "CogView4Pipeline": Row(cogview4, call_scale, {"max_sequence_length": 40}),
    "CogVideoXPipeline": Row(cogvideo, call_scale, frames=5, latents=frames_first),
    "CogVideoXPipeline 1.5": Row(
        lambda: cogvideo(use_rotary_positional_embeddings=True, patch_size_t=2, patch_bias=False),
        call_scale,
        frames=5,
        latents=frames_first,
    ),
    "CogVideoXImageToVideoPipeline": Row(
        lambda: cogvideo("CogVideoXImageToVideoPipeline", in_channels=8),
        call_scale,
        frames=5,
        latents=frames_first,
        sources=1,
        own_picture=True,
    ),
    "CogVideoXImageToVideoPipeline 1.5": Row(
        lambda: cogvideo(
            "CogVideoXImageToVideoPipeline",
            in_channels=8,
            use_rotary_positional_embeddings=True,
            patch_size_t=2,
            patch_bias=False,
            ofs_embed_dim=8,
        ),
        call_scale,
        frames=5,
        latents=frames_first,
        sources=1,
        own_picture=True,
    ),
    "HiDreamImagePipeline": Row(hidream, call_scale, size=(32, 128), prepare=keep_size),
    "HunyuanVideoPipeline": Row(hunyuan_video, call_hunyuan, {"max_sequence_length": 512}, frames=5),
    "HunyuanVideoImageToVideoPipeline": Row(
        lambda: hunyuan_video("token_replace"),
        lambda s: {"true_cfg_scale": s.guidance, "guidance_scale": 1.0},
        {"max_sequence_length": 32},
        frames=5,
        sources=1,
        one_by_one=True,  # its negative prompt takes one black picture
    ),
    "HunyuanVideoImageToVideoPipeline latent_concat": Row(
        lambda: hunyuan_video("latent_concat", guidance_embeds=False),
        lambda s: {"true_cfg_scale": s.guidance, "num_frames": 9},
        {"max_sequence_length": 32},
        frames=5,
        sources=1,
        one_by_one=True,
    ),
    "HunyuanVideo15Pipeline": Row(
        hunyuan_video15,
        lambda s: {},
        frames=5,
        one_by_one=True,  # its autoencoder decodes one video at a time
        takes_length=False,
        loads_lora=False,
        prepare=set_guider,
    ),
    "HunyuanVideo15ImageToVideoPipeline": Row(
        lambda: hunyuan_video15("HunyuanVideo15ImageToVideoPipeline"),
        lambda s: {},
        frames=5,
        sources=1,
        one_by_one=True,
        takes_length=False,
        takes_size=False,
        loads_lora=False,
        prepare=set_guider_and_size,
    ),
    "Flux2Pipeline": Row(
        flux2,
        lambda s: {"guidance_scale": s.embedded_guidance},
        {"max_sequence_length": 400},
        size=(64, 96),  # its pipeline refuses smaller pictures
        negative=False,
        true_guidance=False,
        sources=2,
    ),
    "Flux2Pipeline without references": Row(
        flux2,
        lambda s: {"guidance_scale": s.embedded_guidance},
        {"max_sequence_length": 400},
        negative=False,
        true_guidance=False,
    ),
    "Flux2KleinPipeline": Row(
        lambda: flux2("Flux2KleinPipeline"), call_scale, {"max_sequence_length": 40}, negative=False
    ),
    "Flux2KleinPipeline with references": Row(
        lambda: flux2("Flux2KleinPipeline"),
        call_scale,
        {"max_sequence_length": 40},
        size=(64, 96),
        negative=False,
        sources=2,
    ),
}
