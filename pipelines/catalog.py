"""The page on model families: `python -m mmalign.pipelines.catalog > docs/models.md`."""

from __future__ import annotations

from collections.abc import Iterator

from mmalign.pipelines import ADAPTERS

# Pipeline -> models that come in it, what it does, and what is particular to it here.
ITS_DENOISER = (
    "its denoiser loads the LoRA, not its pipeline: `transformer.load_lora_adapter(folder, "
    "prefix='transformer', weight_name=...)`"
)
MODELS = {
    "StableDiffusion3Pipeline": ("SD3, SD3.5", "text to image", "with or without T5"),
    "StableDiffusionPipeline": ("SD 1.x, 2.x", "text to image", "predicts noise or v; sampled by DDIM"),
    "StableDiffusionXLPipeline": ("SDXL", "text to image", "predicts noise or v; sampled by DDIM"),
    "FluxPipeline": ("FLUX.1-dev, schnell, Krea", "text to image", "embedded and true guidance"),
    "FluxKontextPipeline": ("FLUX.1-Kontext", "editing", "one source picture"),
    "ChromaPipeline": ("Chroma", "text to image", "masked text"),
    "Flux2Pipeline": ("FLUX.2-dev", "text to image, references", "embedded guidance only"),
    "Flux2KleinPipeline": ("FLUX.2-klein", "text to image, references", "true guidance away from no text"),
    "QwenImagePipeline": ("Qwen-Image", "text to image", "guidance keeps each token's norm"),
    "QwenImageEditPipeline": ("Qwen-Image-Edit", "editing", "one source picture"),
    "QwenImageEditPlusPipeline": ("Qwen-Image-Edit-2509, 2511", "editing", "several source pictures"),
    "QwenImage21Pipeline": (
        "Qwen-Image 2.1",
        "text to image",
        "pictures lie on white where they are transparent; its editing is not adapted",
    ),
    "Krea2Pipeline": ("Krea 2", "text to image", "guidance is the pipeline's scale plus 1"),
    "OvisImagePipeline": ("Ovis-Image", "text to image", ITS_DENOISER),
    "LongCatImagePipeline": (
        "LongCat-Image",
        "text to image",
        "prompts as they are (`enable_prompt_rewrite=False`); guidance makes no token larger; its LoRA as of "
        "Ovis-Image",
    ),
    "ZImagePipeline": ("Z-Image, Z-Image-Turbo", "text to image", "guidance is the pipeline's scale plus 1"),
    "ZImageOmniPipeline": (
        "Z-Image-Omni",
        "text to image",
        "guidance as of Z-Image; `policy.leave_out: [siglip, siglip_processor]` saves the memory",
    ),
    "Lumina2Pipeline": ("Lumina-Image 2.0", "text to image", "guidance keeps the norm of each row of places"),
    "AuraFlowPipeline": ("AuraFlow", "text to image", ""),
    "SanaPipeline": ("Sana", "text to image", "instructions before the prompt; any size"),
    "DreamLitePipeline": (
        "DreamLite",
        "text to image",
        "its denoiser loads the LoRA: `unet.load_lora_adapter(folder, prefix='unet', weight_name=...)`",
    ),
    "DreamLiteMobilePipeline": ("DreamLite-mobile", "text to image", "without guidance; its LoRA as above"),
    "OmniGenPipeline": (
        "OmniGen",
        "text to image",
        "without pictures; its LoRA as of PixArt-alpha",
    ),
    "PixArtAlphaPipeline": (
        "PixArt-alpha",
        "text to image",
        "predicts noise; sampled by DDIM; its LoRA is for peft: "
        "`PeftModel.from_pretrained(pipe.transformer, folder)`",
    ),
    "PixArtSigmaPipeline": ("PixArt-Sigma", "text to image", "as PixArt-alpha"),
    "CogView4Pipeline": ("CogView4", "text to image", "its network is told the time before the shift"),
    "HunyuanImagePipeline": (
        "HunyuanImage 2.1",
        "text to image",
        "plain guidance in place of its guiders; its LoRA as of Ovis-Image; distilled models are refused",
    ),
    "HunyuanDiTPipeline": (
        "HunyuanDiT",
        "text to image",
        "predicts v; sampled by DDIM; its LoRA as of PixArt-alpha",
    ),
    "CogView3PlusPipeline": (
        "CogView3-Plus",
        "text to image",
        "predicts v; sampled by DDIM; its LoRA as of PixArt-alpha",
    ),
    "ErnieImagePipeline": (
        "ERNIE-Image",
        "text to image",
        "prompts as they are (`use_pe=False`; `policy.leave_out: [pe]` saves the memory)",
    ),
    "Ideogram4Pipeline": (
        "Ideogram 4",
        "text to image",
        "guided by a second network, which is not trained; one guidance for all steps",
    ),
    "NucleusMoEImagePipeline": (
        "Nucleus-Image",
        "text to image",
        "a mixture of experts; its LoRA as of Ovis-Image",
    ),
    "BriaPipeline": ("Bria 3.2", "text to image", "its LoRA as of Ovis-Image"),
    "BriaFiboPipeline": ("FIBO", "text to image", "every block sees a layer of the text's encoder"),
    "BriaFibo2Pipeline": (
        "Fibo 2.0",
        "text to image",
        "captions in JSON, of up to `policy.max_sequence_length` tokens; without pictures of their texts "
        "(`render_text_images=False`)",
    ),
    "LuminaPipeline": (
        "Lumina-Next",
        "text to image",
        "three channels are guided; its LoRA as of PixArt-alpha",
    ),
    "Kandinsky3Pipeline": (
        "Kandinsky 3",
        "text to image",
        "predicts noise; sampled by DDIM on clipped estimates, which `noise: {kind: ddim, level: 1}` makes "
        "its own DDPM; guidance is the pipeline's scale plus 1; its LoRA as of PixArt-alpha",
    ),
    "Kandinsky5T2IPipeline": (
        "Kandinsky 5 (pictures)",
        "text to image",
        "outside of bf16 compared with its pipeline where that does not round queries and keys to bfloat16",
    ),
    "KolorsPipeline": ("Kolors", "text to image", "predicts noise; sampled by DDIM"),
    "LDMTextToImagePipeline": (
        "LDM",
        "text to image",
        "predicts noise; sampled by DDIM; with or without a codebook; its LoRA is for its denoiser: "
        "`unet.load_lora_adapter(folder, prefix='unet', weight_name=...)`",
    ),
    "PRXPipeline": ("PRX", "text to image", "any size; `mmalign[prx]`; its LoRA as of PixArt-alpha"),
    "PRXPixelPipeline": (
        "PRX Pixel",
        "text to image",
        "draws pixels, and predicts them clean; its noise is wider, which is a shift of its times; as PRX",
    ),
    "HiDreamImagePipeline": (
        "HiDream-I1",
        "text to image",
        "a mixture of experts; any size; Dev and Fast step as `noise: {kind: cps, level: 1}`",
    ),
    "WanPipeline": (
        "Wan 2.1, 2.2 (5B, A14B)",
        "text to video",
        "both experts are trained, each with its guidance",
    ),
    "WanImageToVideoPipeline": ("Wan 2.1, 2.2 (5B, A14B)", "image to video", "one source picture"),
    "LTXPipeline": ("LTX-Video", "text to video", "clean latents are decoded"),
    "LTXImageToVideoPipeline": ("LTX-Video", "image to video", "one source picture"),
    "LTX2Pipeline": (
        "LTX-2",
        "text to video",
        "its sound is drawn and trained with it, and not decoded; one guidance for both: the pipeline's own "
        "for the sound, its rescaling, its guidance across modalities and STG are off",
    ),
    "LTX2ImageToVideoPipeline": (
        "LTX-2",
        "image to video",
        "one source picture, compressed as its videos were (`mmalign[video]`); sound and guidance as above",
    ),
    "CogVideoXPipeline": ("CogVideoX, 1.5", "text to video", "predicts v; sampled by DDIM"),
    "CogVideoXImageToVideoPipeline": ("CogVideoX, 1.5", "image to video", "one source picture"),
    "HunyuanVideoPipeline": ("HunyuanVideo", "text to video", "embedded and true guidance"),
    "HunyuanVideoImageToVideoPipeline": (
        "HunyuanVideo",
        "image to video",
        "one source picture, in its latent or beside it; `policy.frames` are those that are kept",
    ),
    "HunyuanVideo15Pipeline": (
        "HunyuanVideo 1.5",
        "text to video",
        ITS_DENOISER,
    ),
    "HunyuanVideo15ImageToVideoPipeline": (
        "HunyuanVideo 1.5",
        "image to video",
        "one source picture; its LoRA as above; step-distilled models are refused",
    ),
}

# Pipeline -> recipes of real checkpoints in assets/recipes/, which `mmalign train --dry-run` checks.
RECIPES = {
    "StableDiffusion3Pipeline": ("sd35_flow_grpo", "sd35_diffusion_nft"),
    "StableDiffusionXLPipeline": ("sdxl_ddpo",),
    "FluxPipeline": ("flux_mix_grpo",),
    "FluxKontextPipeline": ("kontext_flow_grpo",),
    "QwenImagePipeline": ("qwen_image_fast",),
    "ZImagePipeline": ("z_image_nft",),
    "WanPipeline": ("wan21_flow_grpo", "wan22_nft"),
    "HunyuanVideoPipeline": ("hunyuan_dance_grpo",),
}

# Text-to-image pipelines of diffusers 0.42 that cannot be trained here, and why.
ABSENT = {
    "consistency models, whose steps draw noise anew, so that there is no sample of an ODE to prove an "
    "adapter against": (
        "LatentConsistencyModelPipeline",
        "SanaSprintPipeline",
    ),
    "several models in a row, each with noise of its own, and a policy is one network": (
        "StableCascadeCombinedPipeline",
        "KandinskyV22CombinedPipeline",
        "KandinskyCombinedPipeline",
        "IFPipeline",
        "WuerstchenCombinedPipeline",
        "StableUnCLIPPipeline",
        "UnCLIPPipeline",
    ),
    "parts of those": (
        "KandinskyPipeline",
        "KandinskyPriorPipeline",
        "KandinskyV22PriorPipeline",
        "StableCascadeDecoderPipeline",
        "StableCascadePriorPipeline",
        "WuerstchenDecoderPipeline",
        "WuerstchenPriorPipeline",
    ),
    "tokens of the picture are drawn, before its latent or in its place": (
        "GlmImagePipeline",
        "AmusedPipeline",
        "VQDiffusionPipeline",
    ),
    "where it guides, noise that is drawn anew at each step takes the place of the text, so that its "
    "velocity is no function of the state": ("UniDiffuserPipeline",),
    "it computes the keys and values of its references at the first step alone, so that later velocities "
    "depend on that step; without references it draws as FLUX.2-klein": ("Flux2KleinKVPipeline",),
    "editors that draw without a picture too; of editors those above are adapted": (
        "BriaFiboEditPipeline",
        "JoyImageEditPipeline",
        "JoyImageEditPlusPipeline",
    ),
    "it cannot be made without cosmos_guardrail, which mmalign does not ask for": (
        "Cosmos2TextToImagePipeline",
    ),
    "Stable Diffusion with another sampler, guidance, text encoder or further inputs or outputs; only its "
    "plain pipeline is adapted": (
        "AltDiffusionPipeline",
        "BlipDiffusionPipeline",
        "SemanticStableDiffusionPipeline",
        "StableDiffusionAttendAndExcitePipeline",
        "StableDiffusionGLIGENPipeline",
        "StableDiffusionGLIGENTextImagePipeline",
        "StableDiffusionLDM3DPipeline",
        "StableDiffusionModelEditingPipeline",
        "StableDiffusionPanoramaPipeline",
        "StableDiffusionParadigmsPipeline",
        "StableDiffusionPipelineSafe",
        "StableDiffusionPix2PixZeroPipeline",
        "StableDiffusionSAGPipeline",
        "VersatileDiffusionTextToImagePipeline",
    ),
    "networks in ONNX, which have no gradients": (
        "OnnxStableDiffusionPipeline",
        "StableDiffusionOnnxPipeline",
    ),
    "models above under perturbed attention guidance (PAG), which no adapter has": (
        "HunyuanDiTPAGPipeline",
        "KolorsPAGPipeline",
        "PixArtSigmaPAGPipeline",
        "SanaPAGPipeline",
        "StableDiffusion3PAGPipeline",
        "StableDiffusionPAGPipeline",
        "StableDiffusionXLPAGPipeline",
    ),
    "models above that see a control picture as well (and PAG), of which no adapter knows": (
        "CogView4ControlPipeline",
        "FluxControlNetPipeline",
        "FluxControlPipeline",
        "QwenImageControlNetPipeline",
        "StableDiffusion3ControlNetPipeline",
        "StableDiffusionControlNetPAGPipeline",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionXLControlNetPAGPipeline",
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetUnionPipeline",
        "ZImageControlNetInpaintPipeline",
        "ZImageControlNetPipeline",
    ),
    "videos drawn chunk by chunk, each after those before it, and a policy draws at once": (
        "HeliosPipeline",
        "HeliosPyramidPipeline",
    ),
}

HEAD = """
# Models

Made by `python -m mmalign.pipelines.catalog`; a test keeps it current.

A model is a local folder in diffusers format, or a hub id, named as `policy.model`. Its
`model_index.json` names the pipeline class, and that names the adapter; there is no flag to set. Every
adapter below is tested on a tiny pipeline of the real classes, saved and loaded from disk: our ODE sample
equals the pipeline's own for the same noise to 1e-5, for two prompts at once, with guidance on and off,
away from the square, and in several frames; a step of Flow-GRPO and of DiffusionNFT changes LoRA weights
alone; the ratio before the first update is 1; and the saved LoRA, loaded in plain diffusers, draws our
sample.

Where a model comes with a multistep solver (Wan's UniPC), it is sampled by Euler steps on that solver's
sigmas: stochastic steps are defined on those.

An editor, a model with references and image to video take the pictures that a prompt names as its
`source`, in a `.jsonl` file: a path from the folder of the file, a list of paths, or members of a zip.
They are fitted to `policy.height` and `policy.width`. Videos are media `[B, F, 3, H, W]`; `policy.frames`
is their length.

The two experts of Wan 2.2 A14B are one policy. Their LoRAs are two files. The second,
`pytorch_lora_weights_2.safetensors`, is loaded by `load_lora_weights` with `load_into_transformer_2=True`.

## Memory of a video step

`mmalign benchmark --recipe lab_video_grpo --steps 5,10,20,40 prompts.group=12 prompts.per_iteration=2
training.batch=24`, 24 clips of 9 frames at 32 pixels, bytes of live tensors on a CPU, beside what was there
before the iteration:

| steps | peak | stored states | rest |
|---|---|---|---|
| 5 | 85.0 MB | 3.0 MB | 82.0 MB |
| 10 | 88.7 MB | 6.6 MB | 82.0 MB |
| 20 | 96.1 MB | 14.0 MB | 82.1 MB |
| 40 | 110.8 MB | 28.8 MB | 82.1 MB |

Stored are state, next state and mean of every action; nothing else grows with the steps. Latents are decoded
in parts of at most 16,384 places, and never less than one clip; what an autoencoder does with the frames of
one clip is its own affair (those of Wan and CogVideoX take them a few at a time). On a GPU the same command
tells what the allocator says; that has not been measured.

## Families
""".strip()


def markdown() -> str:
    """The page."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield from (
        HEAD,
        "",
        "| models | task | pipeline | adapter | particular | tests | recipes |",
        "|---|---|---|---|---|---|---|",
    )
    for pipeline, (models, task, particular) in MODELS.items():
        module, _, name = ADAPTERS[pipeline].partition(":")
        adapter = f"`{module.replace('mmalign.', '').replace('.', '/')}.py` {name}"
        own = {"sd": ", `test_sd.py`", "sd3": ", `test_sd3.py`"}.get(module.rpartition(".")[2], "")
        recipes = ", ".join(f"`{recipe}`" for recipe in RECIPES.get(pipeline, ()))
        yield (
            f"| {models} | {task} | `{pipeline}` | {adapter} | {particular} "
            f"| `tests/pipelines/test_families.py`{own} | {recipes or '–'} |"
        )
    yield from ("", "Text-to-image pipelines of diffusers 0.42 without an adapter, and why:", "")
    for reason, pipelines in ABSENT.items():
        yield f"- {', '.join(f'`{pipeline}`' for pipeline in pipelines)}: {reason}."


if __name__ == "__main__":
    print(markdown(), end="")
