"""A tiny real pipeline for tests, and the checks that every policy and every reward must pass.

They are public: a new model or reward, also outside of this project, is one call away from being checked.
"""

from __future__ import annotations

import string
from pathlib import Path

import torch

# Words that the tiny tokenizers know whole; others are spelled by letters.
WORDS = """
    a an the and of in on to left right above below one two three four with no not picture photo
    red green blue yellow purple orange white black small large big
    square circle triangle star cross cat dog hat
""".split()  # noqa: SIM905


def tiny_sd3(folder: Path, seed: int = 0, t5: bool = True) -> Path:
    """Write a complete `StableDiffusion3Pipeline` with random weights into `folder` and give it back.

    A forward takes milliseconds on a CPU: 32x32 pixels, latents [4, 8, 8], two layers, texts of at most 16
    CLIP tokens. Equal seeds give equal weights. t5: False leaves the third text encoder out, as small set-ups
    do.
    """
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    clip_tokens, t5_tokens = _clip_tokenizer(), _t5_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(clip_tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
        max_position_embeddings=16,
        hidden_act="gelu",
        bos_token_id=clip_tokens.bos_token_id,
        eos_token_id=clip_tokens.eos_token_id,
        pad_token_id=clip_tokens.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=2,
                joint_attention_dim=32,
                caption_projection_dim=16,
                pooled_projection_dim=32,
                out_channels=4,
                pos_embed_max_size=16,
                qk_norm="rms_norm",
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=AutoencoderKL(
                in_channels=3,
                out_channels=3,
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3,
                block_out_channels=(4, 4, 8),
                layers_per_block=1,
                latent_channels=4,
                norm_num_groups=2,
                sample_size=32,
                scaling_factor=1.5,
                shift_factor=0.06,
                use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            text_encoder=CLIPTextModelWithProjection(clip),
            tokenizer=clip_tokens,
            text_encoder_2=CLIPTextModelWithProjection(clip),
            tokenizer_2=_clip_tokenizer(),
            text_encoder_3=T5EncoderModel(
                T5Config(
                    vocab_size=len(t5_tokens),
                    d_model=32,
                    d_kv=8,
                    d_ff=64,
                    num_layers=1,
                    num_heads=4,
                    feed_forward_proj="gated-gelu",
                    is_encoder_decoder=False,
                    use_cache=False,
                )
            )
            if t5
            else None,
            tokenizer_3=t5_tokens if t5 else None,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


def _clip_tokenizer():  # type: ignore[no-untyped-def]  # imported where it is used
    from transformers import CLIPTokenizer

    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1}
    for character in string.ascii_lowercase + string.digits + string.punctuation:
        vocab[character] = len(vocab)
        vocab[character + "</w>"] = len(vocab)
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            if (pieces[0], pieces[1]) not in merges:
                merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
            vocab.setdefault(pieces[0], len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=16)


def _t5_tokenizer():  # type: ignore[no-untyped-def]  # imported where it is used
    from transformers import T5TokenizerFast

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocab += [(character, -5.0) for character in string.ascii_letters + string.digits + string.punctuation]
    vocab += [("▁" + word, -3.0) for word in WORDS]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=64)
