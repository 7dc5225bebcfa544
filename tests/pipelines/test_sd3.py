"""What SD3 has besides its row in test_families.py; bad models are refused in plain words."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch.testing import assert_close
from toys import initial

from mmalign.contracts import LoraSettings, PolicySettings
from mmalign.pipelines import load, pipeline_class
from mmalign.records import Plan
from mmalign.sde import Noise
from mmalign.testing import prompts_of

LAB = Path(__file__).parents[2] / "assets" / "lab" / "flow"
KEY = (0, "test")
TEXTS = ["a red cat", "two blue dogs on the left"]


def plain(folder: Path, **parts) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def both(policy, pipeline, texts=TEXTS, steps=5, **call) -> tuple[torch.Tensor, torch.Tensor]:
    """The same noise through our ODE and through the plain pipeline."""
    prompts = prompts_of(texts, 1)
    settings = policy.settings
    theirs = pipeline(
        prompts.text,
        height=settings.height,
        width=settings.width,
        negative_prompt=[settings.negative_prompt] * len(texts),
        num_inference_steps=steps,
        guidance_scale=settings.guidance,
        max_sequence_length=settings.max_sequence_length,
        latents=initial(prompts, policy.shape, KEY),
        output_type="pt",
        **call,
    ).images
    return policy.images(prompts, steps, KEY), theirs


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_images_are_equal_without_t5(make, tiny_without_t5, guidance):
    without = {"text_encoder_3": None, "tokenizer_3": None}
    ours, theirs = both(make(guidance=guidance, folder=tiny_without_t5), plain(tiny_without_t5, **without))
    assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_t5_can_be_left_out_of_a_model_that_has_it(make, tiny):
    policy = make(leave_out=("text_encoder_3",))
    assert policy.adapter.pipeline.text_encoder_3 is None
    ours, theirs = both(policy, plain(tiny, text_encoder_3=None, tokenizer_3=None))
    assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (ours - both(make(), plain(tiny))[1]).abs().max() > 1e-3


def test_another_autoencoder_decodes_in_place_of_the_models_own(tiny, tmp_path):
    own = AutoencoderKL.from_pretrained(tiny, subfolder="vae")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = AutoencoderKL.from_config(own.config)
    other.save_pretrained(tmp_path)
    policy = load(settings_of(tiny, vae=str(tmp_path)), Noise())
    ours, theirs = both(policy, plain(tiny, vae=other))
    assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (ours - both(policy, plain(tiny))[1]).abs().max() > 1e-3


def test_an_autoencoder_of_other_latents_is_refused(tiny, tmp_path):
    own = AutoencoderKL.from_pretrained(tiny, subfolder="vae")
    AutoencoderKL.from_config({**own.config, "latent_channels": 3}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"policy.vae: .* has latent_channels 3, and the model's own"):
        load(settings_of(tiny, vae=str(tmp_path)), Noise())
    with pytest.raises(ValueError, match=r"policy.vae: no/such/folder does not load as AutoencoderKL"):
        load(settings_of(tiny, vae="no/such/folder"), Noise())


@pytest.mark.parametrize(
    "config",
    [{"shift": 1.0}, {"shift": 5.0}, {"use_dynamic_shifting": True}, {"use_karras_sigmas": True}],
    ids=str,
)
def test_images_are_equal_on_every_schedule(make, with_scheduler, config):
    folder = with_scheduler(**config)
    ours, theirs = both(make(folder=folder), plain(folder))
    assert_close(ours, theirs, atol=1e-5, rtol=0)


def same_embeddings(policy, pipeline, texts, steps) -> tuple[torch.Tensor, torch.Tensor]:
    """As `both`, but the pipeline gets our encoded texts: encoders round otherwise in a batch than alone."""
    ours = [policy._encode(text) for text in texts]
    embeds, pooled = (torch.stack([one[name] for one in ours]) for name in ("embeds", "pooled"))
    negative = policy._encode(policy.settings.negative_prompt)
    theirs = pipeline(
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=negative["embeds"].expand_as(embeds),
        negative_pooled_prompt_embeds=negative["pooled"].expand_as(pooled),
        num_inference_steps=steps,
        guidance_scale=policy.settings.guidance,
        latents=initial(prompts_of(texts, 1), policy.shape, KEY),
        output_type="pt",
    ).images
    return policy.images(prompts_of(texts, 1), steps, KEY), theirs


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_given_the_same_embeddings_images_are_equal_to_rounding(make, tiny, guidance):
    ours, theirs = same_embeddings(make(guidance=guidance), plain(tiny), TEXTS, 10)
    assert_close(ours, theirs, atol=3e-6, rtol=0)


@pytest.mark.skipif(not (LAB / "model_index.json").is_file(), reason="assets/lab/flow is not there")
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_images_of_the_lab_model_are_equal(guidance):
    settings = PolicySettings(str(LAB), guidance=guidance, max_sequence_length=16, lora=LoraSettings(4, 6))
    policy, pipeline, texts = load(settings, Noise()), plain(LAB), ["a red circle", "two blue squares"]
    assert_close(*same_embeddings(policy, pipeline, texts, 10), atol=3e-6, rtol=0)
    assert_close(*both(policy, pipeline, texts, 10), atol=1e-5, rtol=0)


def test_the_network_is_told_the_exact_time(make):
    policy, seen = make(), []

    def note(_, __, named):
        seen.append(named["timestep"])

    policy.module.register_forward_pre_hook(note, with_kwargs=True)
    policy.images(prompts_of(TEXTS, 1), 7, KEY)
    sigmas = policy._schedule(7)
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    assert_close(torch.stack(seen), (sigmas[:-1, None] * 1000).expand(7, 2), atol=0, rtol=0)
    assert (torch.stack(seen) % 1 != 0).any()


# ---- files


def stir(policy) -> None:
    """Give every trainable parameter another value, as training would."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in policy.module.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=draw))


def test_saved_full_weights_do_the_same_in_plain_diffusers(make, tiny, tmp_path):
    policy = make(lora=LoraSettings(rank=0))
    stir(policy)
    policy.save(tmp_path)
    policy.save(tmp_path)  # again over the first
    transformer = SD3Transformer2DModel.from_pretrained(tmp_path / "transformer")
    assert_close(*both(policy, plain(tiny, transformer=transformer)), atol=1e-5, rtol=0)
    assert [file.name for file in tmp_path.iterdir()] == ["transformer"]


@pytest.mark.parametrize("rank", [0, 4])
def test_loading_gives_back_what_was_saved(make, tmp_path, rank):
    policy = make(lora=LoraSettings(rank, 6))
    stir(policy)
    policy.save(tmp_path)
    written = "pytorch_lora_weights.safetensors" if rank else "transformer"
    assert [file.name for file in tmp_path.iterdir()] == [written]
    other = make(lora=LoraSettings(rank, 6), seed=1)
    other.copies.save("reference")
    other.load(tmp_path)
    for a, b in zip(policy.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(a, b)
    with other.copies.use("reference"):
        assert not torch.equal(other.module.proj_out.weight, policy.module.proj_out.weight) or rank
    prompts = prompts_of(TEXTS, 1)
    assert torch.equal(policy.images(prompts, 3, KEY), other.images(prompts, 3, KEY))


def test_a_gathered_state_dict_can_be_saved(make, tmp_path):
    policy = make()
    stir(policy)
    state = {name: tensor.clone() for name, tensor in policy.module.state_dict().items()}
    policy.save(tmp_path / "own")
    policy.save(tmp_path / "given", state)
    own, given = (
        load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("own", "given")
    )
    assert own.keys() == given.keys()
    assert all(torch.equal(own[name], given[name]) for name in own)


def test_weights_of_another_shape_are_refused(make, tmp_path):
    make(lora=LoraSettings(rank=2)).save(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit this policy \(policy.lora, policy.model\)"):
        make().load(tmp_path)
    with pytest.raises(FileNotFoundError, match="there are no weights of this policy"):
        make().load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="transformer"):
        make(lora=LoraSettings(rank=0)).load(tmp_path)


# ---- errors


def settings_of(folder, **more) -> PolicySettings:
    return PolicySettings(str(folder), **more)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"policy.model: there is no folder .*nowhere.*hub id"):
        load(settings_of(tmp_path / "nowhere"), Noise())


def test_a_missing_hub_model_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"policy.model: there is no folder nobody/nothing, and"):
        load(settings_of("nobody/nothing"), Noise())


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"policy.model: .* is no pipeline and no captioner, it has no model_index.json"
    ):
        load(settings_of(tmp_path), Noise())


def test_a_broken_index_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text("{not json")
    with pytest.raises(ValueError, match=r"policy.model: .*model_index.json cannot be read"):
        load(settings_of(tmp_path), Noise())


def test_an_unknown_pipeline_names_the_known_ones(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FooPipeline"}))
    with pytest.raises(ValueError, match=r"holds a FooPipeline, .* for .*StableDiffusion3Pipeline"):
        pipeline_class(str(tmp_path))


def test_a_pipeline_with_missing_parts_is_refused(tiny, tmp_path):
    (tmp_path / "model_index.json").write_text((tiny / "model_index.json").read_text())
    with pytest.raises(ValueError, match=r"policy.model: .* does not load as a pipeline"):
        load(settings_of(tmp_path), Noise())


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae"])
def test_weights_that_were_cut_off_are_refused(tiny, tmp_path, part):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    (weights,) = (tmp_path / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"policy.model: .* does not load as a pipeline: \S"):
        load(settings_of(tmp_path), Noise())


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_3"])
def test_a_tokenizer_without_files_is_refused(tiny, tmp_path, name):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / name).iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=rf"does not load as a pipeline: its {name} has no words"):
        load(settings_of(tmp_path), Noise())


def test_a_scheduler_without_a_flow_is_refused(with_scheduler):
    folder = with_scheduler()
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "DDIMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    with pytest.raises(ValueError, match=r"policy.model: .* scheduler is DDIMScheduler"):
        load(settings_of(folder), Noise())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"height": 36}, "policy.height must be a multiple of 8 for this model, got 36"),
        ({"width": 4}, "policy.width must be a multiple of 8"),
        ({"height": 0}, "policy.height must be a multiple of 8"),
        ({"width": 256}, "policy.width can be at most 128 for this model, got 256"),
        ({"guidance": 0.5}, r"policy.guidance must be 1 \(off\) or more, got 0.5"),
        ({"precision": "int8"}, "policy.precision must be one of fp32, bf16, fp16, got 'int8'"),
        ({"lora": LoraSettings(targets=("nothing",))}, r"policy.lora.targets: \['nothing'\] fit no layer"),
        ({"lora": LoraSettings(rank=-1)}, "policy.lora.rank must be 0 .* or more, got -1"),
        ({"shift": -1.0}, "policy.shift must be positive, got -1.0"),
        ({"leave_out": ("text_encoder_9",)}, "policy.leave_out: text_encoder_9 is no component"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_fit_are_refused(tiny, wrong, message):
    with pytest.raises(ValueError, match=message):
        load(settings_of(tiny, **wrong), Noise())


def test_a_policy_without_noise_has_no_actions(make):
    policy, prompts = make(Noise("flow", 0.0)), prompts_of(TEXTS, 2)
    assert policy.sample(prompts, Plan(4), KEY).log_prob.shape == (4, 0)
    with pytest.raises(ValueError, match="zero SDE noise with an SDE algorithm"):
        policy.sample(prompts, Plan(4, (1,)), KEY)


def test_latents_of_pictures_are_those_of_the_plain_image_to_image_pipeline(make, tiny):
    from diffusers import StableDiffusion3Img2ImgPipeline

    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pipeline = StableDiffusion3Img2ImgPipeline(**plain(tiny).components)
    posterior = pipeline.vae.encode(pipeline.image_processor.preprocess(images)).latent_dist
    # Both draws of noise are left out: that of the posterior, and that of the noised start.
    pipeline.vae.encode = lambda _: type("Mean", (), {"latents": posterior.mean})
    pipeline.scheduler.scale_noise = lambda sample, timestep, noise: sample
    theirs = pipeline.prepare_latents(images, None, 2, 1, torch.float32, "cpu")
    assert_close(make().adapter.latents(images), theirs, atol=1e-5, rtol=0)


def test_the_lab_decodes_what_it_encodes():
    policy = load(PolicySettings(str(LAB), max_sequence_length=16, lora=LoraSettings(4, 4)), Noise())
    images = policy.images(prompts_of(["two red circles"], 2), 4, KEY)
    again = policy.adapter.decode(policy.adapter.latents(images))
    assert (again - images).abs().mean() < 0.03
