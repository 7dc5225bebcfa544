"""Every adapter is its diffusers pipeline, number for number, and trains as a LoRA that diffusers loads."""

import copy
import importlib.util
import inspect
import json
import math
import re
import shutil
import statistics
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from families import FAMILIES, Row
from PIL import Image
from runs import ROOT
from torch.testing import assert_close
from toys import initial
from training import trainer

from mmalign.algorithms.diffusion_nft import DiffusionNFT
from mmalign.algorithms.flow_grpo import FlowGRPO
from mmalign.assembly import drawn_quickly
from mmalign.config import load_config
from mmalign.contracts import LoraSettings, PolicySettings
from mmalign.data import Prompt, PromptSource
from mmalign.pipelines import ADAPTERS, catalog, kandinsky5, load
from mmalign.pipelines.blueprint import META, PATTERNS, Supposing, blank_policy, blank_text, supposing
from mmalign.pipelines.family import shifted
from mmalign.pipelines.flow import FlowPolicy
from mmalign.pipelines.omnigen import visible
from mmalign.planning import _fused_attention, live_bytes, measure, rehearse
from mmalign.randomness import generator, normals
from mmalign.records import Masks, Pick, Plan, Renoise, RewardSignal
from mmalign.sde import Noise, transition
from mmalign.testing import prompts_of

KEY = (0, "test")
TEXTS = ["a red cat", "two blue dogs on the left of a circle"]
STEPS = 3


class Bright:
    """The mean of pictures and videos."""

    name = "bright"

    def __call__(self, outcome):
        return RewardSignal(self.name, outcome.media.flatten(1).mean(1)[:, None])


def assert_same(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to 1e-5 of their length; single numbers may be off by more, as processors round differently."""
    assert_close(ours, expected, atol=1e-4, rtol=0)
    assert (ours - expected).norm() <= 1e-5 * expected.norm()


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    """Qwen's editors bring pictures to a megapixel; tiny ones stay as they are."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

    high, wide = FAMILIES["QwenImageEditPipeline"].size
    monkeypatch.setattr(edit, "calculate_dimensions", lambda *_: (wide, high, None))
    monkeypatch.setattr(plus, "calculate_dimensions", lambda *_: (wide, high))


@pytest.fixture(autouse=True)
def mended_texts(monkeypatch):
    """ftfy, which Wan's image to video and PRX ask for, leaves plain texts as they are."""
    from diffusers.pipelines.prx import pipeline_prx, pipeline_prx_pixel
    from diffusers.pipelines.wan import pipeline_wan_i2v

    try:
        import ftfy
    except ImportError:
        ftfy = types.ModuleType("ftfy")
        ftfy.fix_text = str
        monkeypatch.setitem(sys.modules, "ftfy", ftfy)
    for module in (pipeline_wan_i2v, pipeline_prx, pipeline_prx_pixel):
        monkeypatch.setattr(module, "ftfy", ftfy, raising=False)


@pytest.fixture(autouse=True)
def compressed_pictures(monkeypatch):
    """Where there is no av, pictures of LTX-2 are coarsened in place of compressed."""
    from diffusers.pipelines.ltx2 import utils

    try:
        import av  # noqa: F401
    except ImportError:
        monkeypatch.setitem(sys.modules, "av", types.ModuleType("av"))
        monkeypatch.setattr(utils, "apply_image_conditioning_crf", lambda image, crf: image // crf * crf)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """`world(name)`: the row, its folder, the plain pipeline, pictures to start from, what was read."""
    found = {}
    home = tmp_path_factory.mktemp("families")

    def build(name: str):
        if name not in found:
            row, folder = FAMILIES[name], home / name.replace(" ", "_")
            torch.manual_seed(0)
            pipeline = row.build()
            pipeline.save_pretrained(folder)
            files = []
            for i in range(row.sources * (1 + row.own_picture)):
                pixels = torch.randint(256, (*row.size, 3), generator=torch.Generator().manual_seed(i))
                files.append(str(home / f"{folder.name}_{i}.png"))
                Image.fromarray(pixels.byte().numpy()).save(files[-1])
            plain = type(pipeline).from_pretrained(folder)
            plain.set_progress_bar_config(disable=True)
            ours = {}
            found[name] = row, folder, plain, files, ours
        return found[name]

    return build


def settings_of(world, name: str, **settings) -> PolicySettings:
    row, folder, *_ = world(name)
    given = {"height": row.size[0], "width": row.size[1], "frames": row.frames, "max_sequence_length": 16}
    given |= {"lora": LoraSettings(4, 6)} | row.settings | settings
    if not row.true_guidance:
        given["embedded_guidance"] = given.pop("guidance")
    return PolicySettings(str(folder), **given)


def policy_of(world, name: str, noise=None, **settings):
    """A policy over a family; what was read from disk once is copied."""
    policy, ours = settings_of(world, name, **settings), world(name)[-1]
    if not ours:
        kind = type(load(policy, Noise()).adapter)  # first, for settings may be refused
        ours["pipeline"] = load(replace(policy, lora=LoraSettings(0), shift=None), Noise()).adapter.pipeline
        ours["kind"] = kind
    adapter = ours["kind"](policy, copy.deepcopy(ours["pipeline"]))
    return FlowPolicy(adapter, policy, noise or Noise())


def extras(row: Row, files: list[str]) -> list[dict]:
    """What each prompt names as its source."""
    if not files:
        return [{}, {}]
    return [{"source": file} for file in files] if row.own_picture else [{"source": files}] * 2


def prompts_for(row: Row, files: list[str]):
    return prompts_of(TEXTS, 1, extras(row, files))


def theirs(policy, plain, row: Row, files: list[str]) -> torch.Tensor:
    """What the plain pipeline makes of the same texts and the same noise."""
    settings, prompts = policy.settings, prompts_for(row, files)
    row.prepare(plain, settings)
    high, wide = row.size
    pictures = [Image.open(file) for file in files]
    call: dict = {"num_inference_steps": STEPS, "output_type": "pt"}
    if row.takes_size:
        call |= {"height": high, "width": wide}
    if row.takes_length:
        call["max_sequence_length"] = settings.max_sequence_length
    if row.frames:
        call["num_frames"] = row.frames
    if pictures:
        call["image"] = pictures if len(pictures) > 1 else pictures[0]
    call |= row.call(settings)
    drawn_noise = initial(prompts, policy.shape, KEY)
    noise = row.begun(plain, row.latents(drawn_noise), pictures, settings)
    besides = row.besides(drawn_noise)
    drawn = []
    for part in ([0], [1]) if row.one_by_one else ([0, 1],):
        asked = {"prompt": [TEXTS[i] for i in part], "latents": noise[part]}
        asked |= {name: value[part] for name, value in besides.items()}
        if row.negative and not (row.own_negative and not settings.negative_prompt):
            asked["negative_prompt"] = [settings.negative_prompt] * len(part)
        if row.alone:
            drawn_here = asked.pop("latents")
            plain.prepare_latents = lambda *_, noise=drawn_here: noise
            asked = {name: value[0] for name, value in asked.items()}
        out = plain(**call, **asked)
        drawn.append(next(getattr(out, name) for name in ("images", "frames", "image") if hasattr(out, name)))
    return row.shown(torch.cat([torch.as_tensor(part) for part in drawn]))


# Most used; the others take their turn in `make test` alone.
QUICK = {
    "FluxKontextPipeline",
    "FluxPipeline",
    "HunyuanVideoPipeline",
    "QwenImagePipeline",
    "StableDiffusion3Pipeline",
    "StableDiffusionXLPipeline",
    "WanPipeline",
    "ZImagePipeline",
}
SLOW = set(FAMILIES) - QUICK
MARKED = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in FAMILIES]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", MARKED)
def test_a_sample_is_that_of_the_plain_pipeline(world, name, guidance):
    row, _, plain, files, _ = world(name)
    policy = policy_of(
        world, name, guidance=guidance, negative_prompt="a white square" if row.negative else ""
    )
    ours = policy.images(prompts_for(row, files), STEPS, KEY)
    expected = theirs(policy, plain, row, files)
    assert ours.shape == expected.shape
    assert_same(ours, expected)
    assert (ours[0] - ours[1]).abs().max() > 1e-2
    assert ours.std() > 1e-2


@pytest.mark.parametrize("name", MARKED)
def test_a_step_of_training_changes_the_lora_alone_and_diffusers_loads_it(world, name, tmp_path):
    row, _, plain, files, _ = world(name)
    asked = [Prompt(text, extra) for text, extra in zip(TEXTS, extras(row, files), strict=True)]
    prompts = PromptSource(asked, 2, 2, 0)
    policy = policy_of(world, name, FlowGRPO().noise, guidance=2.5)
    weights = {n: p.detach().clone() for n, p in policy.module.named_parameters()}
    for method in (FlowGRPO(steps=3), DiffusionNFT(steps=2, renoise=Renoise(2))):
        before = {n: p.detach().clone() for n, p in policy.module.named_parameters()}
        found = trainer(method, 1, policy=policy, prompts=prompts, reward=Bright(), batch=4, updates=1)
        found.run()
        (metrics,) = found.tracker.metrics.values()
        if isinstance(method, FlowGRPO):
            assert metrics["log_ratio_max"] < 1e-5  # the largest of either sign
        moved = {n for n, p in policy.module.named_parameters() if not torch.equal(p, before[n])}
        assert moved
        assert all(".lora_" in n for n in moved)
    assert all(torch.equal(p, weights[n]) for n, p in policy.module.named_parameters() if ".lora_" not in n)
    with torch.no_grad():
        for n, p in policy.module.named_parameters():
            if ".lora_B." in n:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))))
    policy.save(tmp_path)
    row.load_lora(plain, tmp_path)
    try:
        ours = policy.images(prompts_for(row, files), STEPS, KEY)
        expected = theirs(policy, plain, row, files)
        assert_same(ours, expected)
        with policy._base():
            assert (policy.images(prompts_for(row, files), STEPS, KEY) - ours).abs().max() > 1e-3
    finally:
        row.unload_lora(plain)


@pytest.mark.parametrize("name", MARKED)
def test_every_adapter_of_a_family_has_a_part_in_its_predictions(world, name):
    """Ranks that exchange gradients wait for those of all parameters."""
    row, _, _, files, _ = world(name)
    policy = policy_of(world, name, FlowGRPO().noise, guidance=1.0)
    trajectory = policy.sample(prompts_for(row, files), Plan(3, (0, 1)), KEY)
    pick = Pick(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]))
    policy.evaluate(trajectory, pick).log_prob.sum().backward()
    trained = {n: p.grad for n, p in policy.module.named_parameters() if p.requires_grad}
    assert not [n for n, slope in trained.items() if slope is None]


def test_every_adapter_of_the_recipe_of_qwen_image_has_a_part_in_its_predictions(world):
    """Its last block has a perceptron for the text as well, which nothing reads."""
    recipe = Path(__file__).parents[2] / "assets" / "recipes" / "qwen_image_fast.yaml"
    targets = tuple(yaml.safe_load(recipe.read_text())["policy"]["lora"]["targets"])
    policy = policy_of(world, "QwenImagePipeline", FlowGRPO().noise, lora=LoraSettings(4, 6, targets))
    trajectory = policy.sample(prompts_of(TEXTS, 1), Plan(2, (0,)), KEY)
    policy.evaluate(trajectory, Pick(torch.tensor([0, 1]), torch.tensor([0, 0]))).log_prob.sum().backward()
    trained = {n: p.grad for n, p in policy.module.named_parameters() if p.requires_grad}
    assert any(".0.txt_mlp." in n for n in trained)
    assert not [n for n, slope in trained.items() if slope is None]


@pytest.mark.parametrize("name", MARKED)
def test_a_family_tells_what_actions_were_taken_in(world, name):
    row, _, _, files, _ = world(name)
    policy = policy_of(world, name, FlowGRPO().noise, guidance=1.0)
    trajectory = policy.sample(prompts_for(row, files), Plan(2, (0,)), KEY)
    state = policy.states(trajectory, Pick(torch.tensor([1, 0]), torch.tensor([0, 0])))
    assert torch.equal(state.x, trajectory.replay["x"][[1, 0], 0])
    assert state.sigma.tolist() == [float(trajectory.sigmas[0])] * 2
    assert state.text.isfinite().all()
    assert (state.text[0] - state.text[1]).abs().max() > 1e-2
    assert not state.text.requires_grad


def test_every_adapter_has_a_row():
    tested = {name.partition(" ")[0] for name in FAMILIES}
    assert tested == set(ADAPTERS)


def test_the_page_on_models_is_current():
    assert set(catalog.MODELS) == set(ADAPTERS)
    page = Path(__file__).parents[2] / "docs" / "models.md"
    assert page.read_text() == catalog.markdown()


# Pipelines of diffusers 0.42 that need a prompt and no picture, and draw none.
OTHER_MEDIA = {
    "sound": (
        *("AceStepPipeline", "AudioLDM2Pipeline", "AudioLDMPipeline", "LongCatAudioDiTPipeline"),
        *("MusicLDMPipeline", "StableAudioPipeline", "StableAudio3Pipeline"),
        *("StableAudio3AudioToAudioPipeline", "StableAudio3InpaintPipeline"),
    ),
    "video": (
        *("AllegroPipeline", "AnimateDiffControlNetPipeline", "AnimateDiffPAGPipeline"),
        *("AnimateDiffPipeline", "AnimateDiffSDXLPipeline", "AnimateDiffSparseControlNetPipeline"),
        *("AnyFlowFARPipeline", "AnyFlowPipeline", "Cosmos2_5_PredictBasePipeline"),
        *("Cosmos2_5_TransferPipeline", "Cosmos3OmniPipeline", "CosmosTextToWorldPipeline"),
        *("EasyAnimatePipeline", "Kandinsky5T2VPipeline", "Kandinsky6TI2VAPipeline", "LTXConditionPipeline"),
        *("LTX2ConditionPipeline", "LTX2DFRPipeline", "LTX2DFRTemporalRefinePipeline", "LTX2HDRPipeline"),
        *("LTX2InContextPipeline", "LTXI2VLongMultiPromptPipeline", "LattePipeline", "MochiPipeline"),
        *("MotifVideoPipeline", "SanaVideoPipeline", "WanVACEPipeline"),
        *("SkyReelsV2DiffusionForcingPipeline", "SkyReelsV2Pipeline", "TextToVideoSDPipeline"),
        *("TextToVideoZeroPipeline", "TextToVideoZeroSDXLPipeline"),
    ),
    "3D": ("ShapEPipeline",),
    "text": ("DiffusionGemmaPipeline", "LLaDA2Pipeline"),
}
# Pipelines that need a picture or a video although their call has None for it, by what they are called.
FROM_ONE = re.compile(
    "Img2Img|Inpaint|Control|Adapter|Upscale|SuperResolution|Pix2Pix|Depth2Img|DiffEdit|FluxFill"
    "|(Image|Video)(To|2)(Video|World)|^(CycleDiffusion|HunyuanImageRefiner|I2VGenXL|LongCatImageEdit"
    "|QwenImageLayered)Pipeline"
)


def takes_a_prompt_alone(kind: type) -> bool:
    """A call of this pipeline takes a prompt, and needs no picture, mask or video beside it."""
    given = inspect.signature(kind.__call__).parameters
    media = [name for name in given if re.search("(^|_)(images?|video)$", name)]
    needed = any(given[name].default is inspect.Parameter.empty for name in media)
    starts = set(media) - {"ip_adapter_image"} and FROM_ONE.search(kind.__name__)
    return "prompt" in given and not needed and not starts


def test_every_text_to_image_pipeline_has_an_adapter_or_a_reason():
    import diffusers
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    if not diffusers.__version__.startswith("0.42."):
        pytest.skip("the page speaks of diffusers 0.42")
    absent, other = (
        [n for names in lists.values() for n in names] for lists in (catalog.ABSENT, OTHER_MEDIA)
    )
    told = absent + other
    assert len(set(told)) == len(told)
    assert all(hasattr(diffusers, name) for name in told)
    assert not set(told) & set(ADAPTERS)
    exported = {
        name: getattr(diffusers, name) for name in dir(diffusers) if re.search("Pipeline(Safe)?$", name)
    }
    prompted = {
        name
        for name, kind in exported.items()
        if issubclass(kind, diffusers.DiffusionPipeline) and takes_a_prompt_alone(kind)
    }
    assert len(prompted) > 80
    known = {kind.__name__ for kind in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()} | prompted
    assert known <= set(told) | set(ADAPTERS)


def test_most_adapters_are_short_files():
    files = {importlib.util.find_spec(place.partition(":")[0]).origin for place in ADAPTERS.values()}
    assert len(files) > 30
    assert statistics.median(len(Path(file).read_text().splitlines()) for file in files) <= 150


def test_cosmos2_cannot_be_made_without_its_guard():
    from diffusers import Cosmos2TextToImagePipeline
    from diffusers.utils import is_cosmos_guardrail_available

    if is_cosmos_guardrail_available():
        pytest.skip("the page speaks of where it is not installed")
    parts = ("text_encoder", "tokenizer", "transformer", "vae", "scheduler")
    with pytest.raises(ImportError, match="`cosmos_guardrail` is not installed"):
        Cosmos2TextToImagePipeline(**dict.fromkeys(parts))


def test_a_multistep_solver_gives_way_to_euler_steps_on_its_sigmas(world):
    from diffusers import UniPCMultistepScheduler

    policy = policy_of(world, "WanPipeline")
    own = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    policy.adapter.pipeline.scheduler = own
    own.set_timesteps(4)
    assert_close(policy.adapter.sigmas(4, policy.shape), torch.as_tensor(own.sigmas).float())


# Theirs is the schedule of a diffusion model, which has no shift.
UNSHIFTED = [
    name
    for name in FAMILIES
    if name.startswith(("CogVideoX", "CogView3", "HunyuanDiT", "Kandinsky3", "Kolors", "LDM", "PixArt"))
    or name.startswith(("StableDiffusionPipeline", "StableDiffusionXL"))
]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
        for name in FAMILIES
        if name not in UNSHIFTED
    ],
)
def test_with_a_shift_a_sample_is_that_of_the_plain_pipeline_with_a_scheduler_of_that_shift(
    world, name, monkeypatch
):
    row, _, plain, files, _ = world(name)
    own = plain.scheduler
    fixed = {"shift": 2.0, "use_dynamic_shifting": False, "shift_terminal": None}
    monkeypatch.setattr(plain, "scheduler", type(own).from_config(own.config, **fixed))
    policy = policy_of(world, name, guidance=1.0, shift=2.0)
    ours = policy.images(prompts_for(row, files), STEPS, KEY)
    assert_same(ours, theirs(policy, plain, row, files))
    usual = policy_of(world, name, guidance=1.0).adapter.sigmas(STEPS, policy.shape)
    assert (policy.adapter.sigmas(STEPS, policy.shape) - usual).abs().max() > 0.02


@pytest.mark.parametrize(
    ("name", "steps"), [("FluxPipeline", 6), ("HunyuanVideoPipeline", 16), ("QwenImagePipeline", 5)]
)
def test_a_shift_moves_even_times_whatever_the_models_own(world, name, steps):
    """As the public programs of MixGRPO and DanceGRPO do."""
    policy = policy_of(world, name, shift=5.0)
    even = torch.linspace(1, 0, steps + 1)
    moved = 5 * even / (1 + 4 * even)
    assert_close(policy.adapter.sigmas(steps, policy.shape), moved, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_shift_of_a_multistep_solver_is_its_flow_shift(dynamic):
    from diffusers import UniPCMultistepScheduler

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    theirs = UniPCMultistepScheduler(**flow, flow_shift=7.0)
    theirs.set_timesteps(4)
    found = shifted(UniPCMultistepScheduler(**flow, flow_shift=3.0, use_dynamic_shifting=dynamic), 7.0)
    found.set_timesteps(4)
    assert_close(torch.as_tensor(found.sigmas), torch.as_tensor(theirs.sigmas))


def test_the_steps_of_distilled_models_are_those_of_cps_at_full_noise(world):
    """HiDream-I1-Dev and Fast come with an LCM scheduler: it draws all of the noise anew."""
    from diffusers import FlowMatchLCMScheduler

    policy = policy_of(world, "HiDreamImagePipeline")
    own = FlowMatchLCMScheduler(shift=6.0)
    policy.adapter.pipeline.scheduler = own
    own.set_timesteps(4)
    sigmas = policy.adapter.sigmas(4, policy.shape)
    assert_close(sigmas, own.sigmas)
    x, velocity = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for step in range(3):
        moved = transition(x, velocity, sigmas[step], sigmas[step + 1], Noise("cps", 1.0), sigmas[1])
        drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(step))
        theirs = own.step(
            velocity, own.timesteps[step], x, generator=torch.Generator().manual_seed(step), return_dict=False
        )[0]
        assert_close(moved.mean + moved.std * drawn, theirs, atol=1e-6, rtol=1e-5)
        x = theirs


def test_kandinsky3_with_ddim_noise_is_its_own_clipping_ddpm(world, monkeypatch):
    """The pipeline as it comes, with our noise; its last step draws next to none."""
    from diffusers import DDPMScheduler
    from diffusers.schedulers import scheduling_ddpm

    _, _, plain, _, _ = world("Kandinsky3Pipeline")
    policy = policy_of(world, "Kandinsky3Pipeline", Noise("ddim", 1.0), guidance=4.0)
    prompts = prompts_of(TEXTS[:1], 1)
    drawn = iter([normals([generator(*KEY, "noise", i, 0, 0)], policy.shape) for i in range(3)])
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: next(drawn))

    def theirs(clip: bool):
        own = DDPMScheduler.from_config(plain.scheduler.config, clip_sample=clip)
        monkeypatch.setattr(plain, "scheduler", own)
        latents = initial(prompts, policy.shape, KEY)
        call = {"height": 64, "width": 128, "num_inference_steps": 3, "guidance_scale": 3.0}
        return plain(TEXTS[:1], **call, latents=latents, output_type="pt").images / 2 + 0.5

    assert plain.scheduler.config.clip_sample
    ours = policy.sample(prompts, Plan(3, (0, 1)), KEY).outcome.media
    assert_same(ours, theirs(clip=True).clamp(0, 1))
    drawn = iter([normals([generator(*KEY, "noise", i, 0, 0)], policy.shape) for i in range(3)])
    assert (ours - theirs(clip=False).clamp(0, 1)).abs().max() > 1e-2


def test_another_autoencoder_takes_the_place_of_that_which_the_pipeline_calls_otherwise(world, tmp_path):
    folder, plain = world("Kandinsky3Pipeline")[1:3]
    other = copy.deepcopy(plain.movq)
    with torch.no_grad():
        other.decoder.conv_out.bias.add_(0.5)
    other.save_pretrained(tmp_path)
    settings = PolicySettings(str(folder), vae=str(tmp_path), lora=LoraSettings(4, 6), precision="bf16")
    adapter = load(settings, Noise()).adapter
    assert torch.equal(adapter.pipeline.movq.decoder.conv_out.bias, other.decoder.conv_out.bias)
    assert {p.dtype for p in adapter.pipeline.movq.parameters()} == {torch.float32}
    media = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(adapter.latents(media), other.encode(media * 2 - 1).latents)


def test_kandinsky5_differs_from_its_pipeline_by_a_rounding_that_bf16_has_anyway(world):
    from diffusers.models.transformers.transformer_kandinsky import Kandinsky5AttnProcessor

    row, _, plain, files, _ = world("Kandinsky5T2IPipeline")
    policy = policy_of(world, "Kandinsky5T2IPipeline", guidance=3.0)
    row.prepare(plain, policy.settings)
    ours = policy.images(prompts_for(row, files), STEPS, KEY)
    row = replace(
        row, prepare=lambda pipeline, _: pipeline.transformer.set_attn_processor(Kandinsky5AttnProcessor())
    )
    off = (ours - theirs(policy, plain, row, files)).abs().max()
    assert 1e-6 < off < 5e-3
    network = copy.deepcopy(plain.transformer).bfloat16()
    attention, turns = network.visual_transformer_blocks[0].self_attention, network.visual_rope_embeddings
    attention.query_norm.float(), attention.key_norm.float()  # as torch warns otherwise
    rope = turns((2, 1, 4, 6), [torch.arange(1), torch.arange(4), torch.arange(6)]).flatten(1, 3)
    x = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        rounded = attention(x, rotary_emb=rope)
        attention.set_processor(kandinsky5.Attention())
        assert torch.equal(attention(x, rotary_emb=rope), rounded)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_nothing_sees_what_texts_of_kandinsky5_are_filled_up_with(world, checkpointing):
    policy = policy_of(world, "Kandinsky5T2IPipeline", gradient_checkpointing=checkpointing)
    network, adapter = policy.module.train(), policy.adapter
    seen = dict(policy._texts(TEXTS, 1.0).positives())
    assert not seen["mask"].all(1).any()
    filled = seen["embeds"].clone().requires_grad_()
    filled.data[~seen["mask"]] = 5.0
    x = torch.randn(2, *policy.shape, generator=torch.Generator().manual_seed(0))
    velocity = adapter.predict(network, x, torch.full((2,), 0.5), seen | {"embeds": filled})
    with torch.no_grad():
        assert_close(velocity, adapter.predict(network, x, torch.full((2,), 0.5), seen), atol=1e-6, rtol=0)
    (slope,) = torch.autograd.grad(velocity.square().sum(), filled)
    assert not slope[~seen["mask"]].any()
    assert slope[seen["mask"]].abs().amax(1).min() > 0


def test_gradients_pass_a_codebook_as_if_the_nearest_entries_had_been_given(world):
    adapter = policy_of(world, "LDMTextToImagePipeline with a codebook").adapter
    x = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    (slope,) = torch.autograd.grad((adapter.decode(x) * weight).sum(), x)
    nearest = adapter.vae.quantize(adapter.to_vae(x.detach()))[0].requires_grad_()
    assert len(torch.unique(nearest.detach().transpose(0, 1).flatten(1).T, dim=0)) > 10
    media = (adapter.vae.decode(nearest, force_not_quantize=True).sample / 2 + 0.5).clamp(0, 1)
    (expected,) = torch.autograd.grad((media * weight).sum(), nearest)
    assert_close(slope, expected / adapter.vae.config.scaling_factor)
    assert slope.abs().max() > 0


def test_what_guidance_leads_kandinsky3_away_from_is_cut_with_its_prompt(world):
    row, _, plain, files, _ = world("Kandinsky3Pipeline")
    longer = "two blue dogs on the left of a white square and a red cat"
    policy = policy_of(world, "Kandinsky3Pipeline", guidance=3.0, negative_prompt=longer)
    shown = policy._texts([*TEXTS, longer], 1.0).positives()["mask"].sum(1).tolist()
    assert shown[0] + 1 < shown[1] < shown[2] - 1
    ours = policy.images(prompts_for(row, files), STEPS, KEY)
    assert_same(ours, theirs(policy, plain, row, files))
    alone = policy.images(prompts_of(TEXTS[:1], 1), STEPS, KEY)
    assert_same(ours[:1], alone)


def test_schedules_of_distilled_models_are_their_own(world):
    """Krea 2's has one shift for all sizes, that of Qwen-Image 2.1 is a list of sigmas."""
    policy = policy_of(world, "Krea2Pipeline")
    policy.adapter.pipeline.register_to_config(is_distilled=True)
    even = torch.tensor([1.0, 0.75, 0.5, 0.25])
    shifted = math.exp(1.15) / (math.exp(1.15) + (1 / even - 1))
    assert_close(policy.adapter.sigmas(4, policy.shape), torch.cat([shifted, torch.zeros(1)]))
    policy = policy_of(world, "QwenImage21Pipeline")
    policy.adapter.pipeline.register_to_config(sample_sigmas=[1.0, 0.6])
    mu = policy.adapter.shift(2, policy.shape)
    shifted = math.exp(mu) / (math.exp(mu) + (1 / torch.tensor([1.0, 0.6]) - 1))
    assert_close(policy.adapter.sigmas(2, policy.shape), torch.cat([shifted, torch.zeros(1)]))
    with pytest.raises(ValueError, match="sampled in 2 steps, at sigmas of its own; got 3"):
        policy.adapter.sigmas(3, policy.shape)


def test_a_schedule_that_ends_early_has_no_single_step_and_rewards_are_tried_on_two(world):
    policy, prompts = policy_of(world, "QwenImagePipeline"), prompts_of(TEXTS, 1)
    with pytest.raises(ValueError, match=r"a schedule of 1 steps must fall .*, got \[nan, 0"):
        policy.images(prompts, 1, KEY)
    drawn = drawn_quickly(policy, prompts, 8)
    assert torch.equal(drawn, policy.images(prompts, 2, (0, "probe")))
    assert drawn.isfinite().all()
    distilled = policy_of(world, "QwenImage21Pipeline")
    distilled.adapter.pipeline.register_to_config(sample_sigmas=[1.0, 0.6, 0.3])
    assert torch.equal(drawn_quickly(distilled, prompts, 3), distilled.images(prompts, 3, (0, "probe")))
    with pytest.raises(ValueError, match="sampled in 3 steps, at sigmas of its own; got 8"):
        drawn_quickly(distilled, prompts, 8)


@pytest.mark.parametrize(
    "name", ["QwenImage21Pipeline", "ErnieImagePipeline", "BriaFibo2Pipeline", "OmniGenPipeline"]
)
def test_texts_that_a_model_takes_whole_are_not_cut(world, name):
    policy = policy_of(world, name, max_sequence_length=2)
    with pytest.raises(ValueError, match=r"policy\.max_sequence_length is 2, .* of 'a red cat' it sees \d"):
        policy.images(prompts_of(TEXTS, 1), 2, KEY)


def test_z_image_omni_needs_no_encoder_of_pictures(world):
    folder = world("ZImageOmniPipeline")[1]
    settings = PolicySettings(
        str(folder), height=32, width=48, max_sequence_length=48, leave_out=("siglip", "siglip_processor")
    )
    policy = load(settings, Noise())
    assert policy.adapter.pipeline.siglip is None
    whole = policy_of(world, "ZImageOmniPipeline", guidance=settings.guidance)
    found, expected = (p.images(prompts_of(TEXTS, 1), 2, KEY) for p in (policy, whole))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("negative", ["a white square", "a white square " * 8])
def test_omnigen_leads_away_from_a_given_text_as_from_its_own(world, monkeypatch, negative):
    """Shorter and longer than the prompts."""
    row, _, plain, files, _ = world("OmniGenPipeline")
    reader = type(plain.multimodal_processor).__call__
    usual = inspect.signature(reader).parameters["negative_prompt"].default
    given = tuple(negative if default == usual else default for default in reader.__defaults__)
    policy = policy_of(world, "OmniGenPipeline", guidance=3.0, negative_prompt=negative)
    ours = policy.images(prompts_for(row, files), STEPS, KEY)
    away = policy_of(world, "OmniGenPipeline", guidance=3.0).images(prompts_for(row, files), STEPS, KEY)
    monkeypatch.setattr(reader, "__defaults__", given)
    assert_same(ours, theirs(policy, plain, row, files))
    assert (ours - away).abs().max() > 1e-3


def test_what_omnigen_draws_does_not_depend_on_other_prompts(world):
    policy = policy_of(world, "OmniGenPipeline", guidance=3.0)
    asked = (prompts_of(texts, 1) for texts in (TEXTS, TEXTS[:1]))
    both, alone = (policy._roll_out(prompts, Plan(STEPS), KEY, 3.0).views[0].x for prompts in asked)
    assert_close(both[:1], alone, atol=1e-6, rtol=1e-6)


def test_words_see_those_before_them_and_the_picture_sees_all():
    seen = visible(torch.tensor([[False, True, True]]), 3)
    assert seen[0].tolist() == [
        [1, 1, 1, 1, 1, 1],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 1],
    ]


def test_omnigen_needs_a_time_that_rises_and_prompts_without_pictures(world):
    adapter = policy_of(world, "OmniGenPipeline").adapter
    with pytest.raises(ValueError, match=r"names a picture .*, and OmniGen is shown none here"):
        adapter.encode("a cat as in <img><|image_1|></img>")
    own = adapter.pipeline.scheduler
    adapter.pipeline.scheduler = type(own).from_config(own.config, invert_sigmas=False)
    with pytest.raises(
        ValueError, match=r"invert_sigmas false; set it to true in scheduler/scheduler_config"
    ):
        type(adapter)(adapter.settings, adapter.pipeline)


def test_a_unet_that_is_trained_whole_is_read_as_it_is(world):
    row, folder, plain, _, _ = world("DreamLitePipeline")
    settings = PolicySettings(
        str(folder), height=row.size[0], width=row.size[1], precision="bf16", lora=LoraSettings(0)
    )
    policy = load(settings, Noise())
    own = dict(plain.unet.named_parameters())
    assert all(torch.equal(p, own[n]) for n, p in policy.module.named_parameters())
    assert policy.adapter.pipeline.text_encoder.dtype == torch.bfloat16


def test_latents_of_dreamlite_are_those_of_its_tiny_autoencoder(world):
    adapter = policy_of(world, "DreamLitePipeline").adapter
    media = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw = world("DreamLitePipeline")[2].vae.encode(media * 2 - 1).latents
        assert_close(adapter.latents(media), (raw - 0.1) * 0.8)
    assert adapter.latent_shape(None, None) == (4, 128, 128)


def test_captions_in_json_lose_what_is_empty_in_them(world, monkeypatch):
    row, _, plain, files, _ = world("BriaFibo2Pipeline")
    written = {"short_description": "a red cat", "lighting": {}, "text_render": [{"text": "hi"}]}
    plainly = {"structured_caption": "two blue dogs", "edit_instruction": "none"}
    captions = [json.dumps(caption, indent=1) for caption in (written, plainly)]
    monkeypatch.setattr(sys.modules[__name__], "TEXTS", captions)
    policy = policy_of(world, "BriaFibo2Pipeline")
    assert_close(
        policy.images(prompts_for(row, files), STEPS, KEY),
        theirs(policy, plain, row, files),
        atol=1e-5,
        rtol=0,
    )
    shorter = json.dumps({k: v for k, v in written.items() if v}, separators=(",", ":"))
    seen, compact, plain_text = (policy.adapter.encode(text) for text in (captions[0], shorter, "a red cat"))
    assert torch.equal(seen["embeds"], compact["embeds"])
    assert seen["mask"].sum() > plain_text["mask"].sum()


def test_pictures_are_latents_in_the_statistics_of_fibo2s_autoencoder(world):
    plain = world("BriaFibo2Pipeline")[2]
    adapter = policy_of(world, "BriaFibo2Pipeline").adapter
    media = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (own,) = plain.prepare_image_latents([media * 2 - 1], 1, media.device, media.dtype)
        assert_close(adapter.latents(media), own, atol=1e-6, rtol=1e-6)
        assert_close(adapter.to_vae(adapter.from_vae(own)), own, atol=1e-6, rtol=1e-6)


def test_pictures_given_to_a_model_of_transparent_ones_are_opaque(world):
    adapter = policy_of(world, "QwenImage21Pipeline").adapter
    media = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        opaque = torch.cat([media, torch.ones(1, 1, 64, 96)], 1)[:, :, None] * 2 - 1
        raw = adapter.pipeline.vae.encode(opaque).latent_dist.mode()
        assert_close(adapter.latents(media), adapter.from_vae(raw)[:, :, 0])


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("FluxPipeline", {"frames": 5}, "policy.frames: this model makes pictures, not videos; got 5"),
        ("FluxPipeline", {"guidance_rescale": 0.5}, "policy.guidance_rescale must be 0: a FluxPipeline has"),
        ("FluxPipeline", {"height": 36}, "policy.height must be a multiple of 8 for this model, got 36"),
        ("WanPipeline", {"frames": 6}, "policy.frames must be 1 more than a multiple of 2 .*, got 6"),
        ("CogVideoXPipeline", {"max_sequence_length": 20}, "policy.max_sequence_length must be 16 for this"),
        ("KolorsPipeline", {"guidance_rescale": 0.5}, "policy.guidance_rescale must be 0: a KolorsPipeline"),
        ("CogVideoXPipeline", {"guidance_rescale": 0.5}, "policy.guidance_rescale must be 0: a CogVideoX"),
        (
            "WanPipeline",
            {"low_noise_guidance": 2.0},
            "policy.low_noise_guidance must be null: this model has one",
        ),
        (
            "WanPipeline A14B",
            {"low_noise_guidance": 0.5},
            r"policy.low_noise_guidance must be 1 \(off\) or more",
        ),
        ("LTX2Pipeline", {"guidance_rescale": 0.5}, "policy.guidance_rescale must be 0: those of LTX-2"),
        ("CogVideoXPipeline", {"shift": 3.0}, "policy.shift must be null: CogVideoXDDIMScheduler, the sched"),
        ("FluxPipeline", {"shift": 0.0}, "policy.shift must be positive, got 0.0"),
        ("HiDreamImagePipeline", {"height": 256, "width": 128}, "this model has 256 places, .* takes 512"),
        ("Flux2KleinPipeline", {"width": 4}, "policy.width must be a multiple of 8"),
        (
            "Kandinsky3Pipeline",
            {"height": 96},
            "policy.height must be a multiple of 64 for this model, got 96",
        ),
        (
            "Kandinsky3Pipeline",
            {"gradient_checkpointing": True},
            "policy.gradient_checkpointing must be false: a Kandinsky3UNet has none",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(world, name, wrong, message):
    with pytest.raises(ValueError, match=message):
        policy_of(world, name, **wrong)


@pytest.mark.parametrize("name", ["CogVideoXPipeline", "CogVideoXPipeline 1.5"])
def test_frames_that_the_network_needs_besides_are_no_part_of_the_video(world, name):
    """Three frames of the latent, and of 1.5, which takes two at once, a fourth that is not decoded."""
    policy = policy_of(world, name)
    assert policy.shape[1] == (4 if name.endswith("1.5") else 3)
    latents, extra = torch.randn(1, *policy.shape), policy.adapter.extra
    vae, plain = policy.adapter.pipeline.vae, latents[:, :, extra:]
    with torch.no_grad():
        media = policy.adapter.decode(latents)
        assert_close(media, (vae.decode(plain / 0.8).sample / 2 + 0.5).clamp(0, 1).transpose(1, 2))
        again = policy.adapter.latents(media)
        assert again.shape == latents.shape
        raw = vae.encode(media.transpose(1, 2) * 2 - 1).latent_dist.mode()
        assert_close(again[:, :, extra:], raw * 0.8)


@pytest.mark.parametrize(
    ("name", "before", "behind"),
    [
        ("CogVideoXPipeline 1.5", 1, 0),
        ("HunyuanVideoImageToVideoPipeline latent_concat", 1, 0),
        ("LTX2Pipeline", 0, 1),
    ],
)
def test_masks_lie_on_the_frames_of_the_video_alone(world, name, before, behind):
    adapter = policy_of(world, name).adapter
    policy = FlowPolicy(adapter, replace(adapter.settings, lora=LoraSettings(0)), Noise(), split="frames")
    frames = policy.shape[1] - before - behind
    length = (frames - 1) * adapter.temporal + 1
    trajectory = types.SimpleNamespace(log_prob=torch.zeros(1, 2, policy.shape[1]))
    for at in range(length):
        mask = torch.zeros(1, 1, length, 32, 32)
        mask[:, :, at] = 1
        found = policy.locate(Masks(mask), trajectory)[0, 0, 0]
        expected = torch.zeros(policy.shape[1])
        # The first frame of the latent stands for one, each further one for `temporal`.
        expected[before + -(-at // adapter.temporal)] = 1 if at == 0 else 1 / adapter.temporal
        assert_close(found, expected)


def test_given_videos_are_of_the_length_that_the_model_draws(world, tmp_path):
    """Of a latent with a frame before the video's, for which the first of the video stands still."""
    policy = policy_of(world, "HunyuanVideoImageToVideoPipeline latent_concat", frames=9)
    adapter, files = policy.adapter, []
    for at in range(11):
        pixels = torch.randint(256, (32, 48, 3), generator=torch.Generator().manual_seed(at))
        files.append(str(tmp_path / f"{at:02}.png"))
        Image.fromarray(pixels.byte().numpy()).save(files[-1])
    media, latents = policy._given(prompts_of(TEXTS[:1], 1, [{"video": files}]))
    assert media.shape == (1, 9, 3, 32, 48)
    assert latents.shape[1:] == policy.shape == (4, 4, 4, 6)
    video = torch.cat([media[:, :1]] * 4 + [media], 1).transpose(1, 2)
    with torch.no_grad():
        raw = adapter.pipeline.vae.encode(video * 2 - 1).latent_dist.mode()
        assert_close(latents * 0.999, raw * adapter.pipeline.vae.config.scaling_factor)
        again = adapter.pipeline.vae.decode(raw).sample[:, :, 4:]
        assert_close(adapter.decode(latents), (again / 2 + 0.5).clamp(0, 1).transpose(1, 2))


def test_the_sound_lies_behind_the_video_and_what_it_does_not_fill_has_no_velocity(world):
    policy = policy_of(world, "LTX2Pipeline")
    adapter, x = policy.adapter, torch.randn(2, *policy.shape, generator=torch.Generator().manual_seed(0))
    assert policy.shape == (4, 4, 8, 16)
    video, sound = adapter.parted(x)
    assert (video.shape[2], sound.shape) == (3, (2, 9, 8))
    again = adapter.joined(video, sound, x)
    assert torch.equal(again[:, :, :3], x[:, :, :3])
    flat = again[:, :, 3:].flatten(1)
    assert torch.equal(flat[:, :72], x[:, :, 3:].flatten(1)[:, :72])
    assert not flat[:, 72:].any()
    with torch.no_grad():
        texts = policy._texts(TEXTS, 1.0)
        velocity = adapter.predict(policy.module, x, torch.full((2,), 0.5), texts.positives())
        quiet = adapter.joined(video, torch.zeros_like(sound), x)
        other = adapter.predict(policy.module, quiet, torch.full((2,), 0.5), texts.positives())
        media = adapter.decode(x)
        given = adapter.latents(media)
    assert not velocity[:, :, 3:].flatten(1)[:, 72:].any()
    assert (velocity - other)[:, :, :3].abs().max() > 1e-5  # the video hears its sound
    assert media.shape == (2, 9, 3, 32, 64)
    assert given.shape == x.shape
    assert not given[:, :, 3:].any()


@pytest.mark.parametrize("name", ["LTX2Pipeline", "LTX2ImageToVideoPipeline"])
def test_the_sound_of_a_sample_is_that_of_the_plain_pipeline(world, name, monkeypatch):
    row, _, plain, files, _ = world(name)
    audio, heard = plain.audio_vae, []
    policy = policy_of(world, name, guidance=3.0)
    decode = audio.decode
    monkeypatch.setattr(audio, "decode", lambda z, **given: heard.append(z) or decode(z, **given))
    theirs(policy, plain, row, files)
    end = policy._roll_out(prompts_for(row, files), Plan(STEPS), KEY, 3.0).views[0].x
    ours = policy.adapter.parted(end)[1] * audio.latents_std + audio.latents_mean
    expected = heard[0].transpose(1, 2).flatten(2)  # [n, channels, length, bins] as tokens
    assert expected.shape == (2, 9, 8)
    assert_same(ours, expected)
    assert (ours[0] - ours[1]).abs().max() > 1e-1


def test_the_experts_of_a_mixture_let_gradients_through(world):
    """The slope along a direction is the difference quotient; where experts give no gradient it is not."""
    policy = policy_of(world, "HiDreamImagePipeline", gradient_checkpointing=True)
    texts = policy._texts(TEXTS, 1.0)
    network, adapter = policy.module.double(), policy.adapter
    seen = {name: tensor.double() for name, tensor in texts.positives().items()}
    draw = torch.Generator().manual_seed(0)
    x, ahead, weight = (torch.randn(2, *policy.shape, generator=draw).double() for _ in range(3))
    sigma = torch.full((2,), 0.5).double()

    def value(x):
        return (adapter.predict(network, x, sigma, seen) * weight).sum()

    x.requires_grad_()
    slope = (torch.autograd.grad(value(x), x)[0] * ahead).sum()
    with torch.no_grad():
        quotient = (value(x + 1e-4 * ahead) - value(x - 1e-4 * ahead)) / 2e-4
    assert_close(slope, quotient, rtol=1e-2, atol=0)  # places are turned in fp32


def test_videos_are_decoded_by_parts(world, monkeypatch):
    policy = policy_of(world, "WanPipeline")
    prompts, sizes, decode = prompts_of(TEXTS, 1), [], policy.adapter.decode
    whole = policy.images(prompts, 2, KEY)
    monkeypatch.setattr("mmalign.pipelines.flow.DECODED_PLACES", 1)
    monkeypatch.setattr(policy.adapter, "decode", lambda x: sizes.append(len(x)) or decode(x))
    assert_close(policy.images(prompts, 2, KEY), whole, atol=5e-6, rtol=0)
    assert sizes == [1, 1]


def test_pictures_of_ltx2_need_a_codec(world, monkeypatch):
    policy_of(world, "LTX2ImageToVideoPipeline")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"compressed by av: pip install 'mmalign\[video\]'"):
        policy_of(world, "LTX2ImageToVideoPipeline")


@pytest.mark.parametrize("name", ["PRXPipeline", "PRXPixelPipeline"])
def test_texts_of_prx_need_ftfy(world, name, monkeypatch):
    policy_of(world, name)
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match=r"mended by ftfy: pip install 'mmalign\[prx\]'"):
        policy_of(world, name)


def test_the_text_encoder_of_prx_is_found_whatever_was_imported_before(world, monkeypatch):
    import transformers

    folder = world("PRXPipeline")[1]
    monkeypatch.delattr(transformers, "T5GemmaEncoder")
    adapter = load(PolicySettings(str(folder), lora=LoraSettings(4, 6)), Noise()).adapter
    assert type(adapter.pipeline.text_encoder) is transformers.T5GemmaEncoder


def test_a_model_of_pixels_has_no_other_autoencoder(world, tmp_path):
    folder = world("PRXPixelPipeline")[1]
    with pytest.raises(ValueError, match=r"policy\.vae must be null: a PRXPixelPipeline has no"):
        load(PolicySettings(str(folder), vae=str(tmp_path)), Noise())


@pytest.mark.parametrize("t", [1.0, 0.6, 0.03])
def test_the_velocity_of_wider_noise_is_noise_less_data_by_the_models_own_estimates(world, t):
    """Below t = 0.05 the estimates are those of the pipeline's step, which is shorter there."""
    policy = policy_of(world, "PRXPixelPipeline")
    seen = policy._texts(TEXTS, 1.0).positives()
    y = torch.randn(2, *policy.shape, generator=torch.Generator().manual_seed(0))
    c, time = 1 + t, torch.full((2,), t)  # its noise has a deviation of 2
    with torch.no_grad():
        velocity = policy.adapter.predict(policy.module, y / c, time * 2 / c, seen)
        shown = policy.module(y, time, seen["embeds"], attention_mask=seen["mask"]).sample
    clean = y - t * (y - shown) / max(t, 0.05)
    noise = (y - (1 - t) * clean) / (2 * t)
    assert_close(velocity, noise - clean, atol=1e-4, rtol=1e-4)


def test_step_distilled_models_of_hunyuan_video_are_refused(world):
    adapter = policy_of(world, "HunyuanVideo15ImageToVideoPipeline").adapter
    adapter.pipeline.transformer.register_to_config(use_meanflow=True)
    with pytest.raises(ValueError, match=r"mean velocity up to a second time.*use_meanflow false"):
        type(adapter)(adapter.settings, adapter.pipeline)


@pytest.mark.parametrize("distilled", ["use_meanflow", "guidance_embeds"])
def test_distilled_models_of_hunyuan_image_are_refused(world, distilled):
    adapter = policy_of(world, "HunyuanImagePipeline").adapter
    adapter.pipeline.transformer.register_to_config(**{distilled: True})
    with pytest.raises(ValueError, match=r"mean velocity up to a second time.*guidance_embeds false"):
        type(adapter)(adapter.settings, adapter.pipeline)


def test_hunyuan_video_from_a_picture_needs_a_network_that_is_told_of_one(world):
    adapter = policy_of(world, "HunyuanVideoImageToVideoPipeline").adapter
    pipeline = copy.copy(adapter.pipeline)
    pipeline.transformer = world("HunyuanVideoPipeline")[2].transformer
    with pytest.raises(ValueError, match=r"no image_condition_type; .* token_replace or latent_concat"):
        type(adapter)(adapter.settings, pipeline)


@pytest.mark.parametrize(
    "name", ["SanaPipeline", "Lumina2Pipeline", "HunyuanVideoImageToVideoPipeline latent_concat"]
)
def test_a_prompt_of_the_words_of_the_negative_one_is_encoded_as_a_prompt(world, name):
    row, _, _, files, _ = world(name)
    policy = policy_of(world, name, negative_prompt=TEXTS[0], guidance=2.0)
    other = policy_of(world, name, negative_prompt="a white square", guidance=2.0)
    seen, plain = (p._seen(prompts_for(row, files), 2.0) for p in (policy, other))
    positive, expected = seen.positives()["embeds"][0], plain.positives()["embeds"][0]
    assert torch.equal(positive, expected)
    assert not torch.equal(positive, seen.negatives()["embeds"][0])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Flux2Pipeline", r"FLUX\.2 is told its guidance"),
        ("DreamLiteMobilePipeline", "guidance is distilled into DreamLite-mobile"),
    ],
)
def test_models_without_true_guidance_take_none(world, name, reason):
    folder = world(name)[1]
    with pytest.raises(ValueError, match=rf"policy\.guidance must be 1: {reason}"):
        load(PolicySettings(str(folder), guidance=2.0), Noise())


def test_sources_that_do_not_fit_are_refused(world):
    files, policy = world("FluxKontextPipeline")[3], policy_of(world, "FluxKontextPipeline")
    with pytest.raises(ValueError, match=r"prompt 'a red cat' names no picture to start from"):
        policy.images(prompts_of(TEXTS, 1), 2, KEY)
    with pytest.raises(ValueError, match="Kontext edits one picture, got 2 as source of 'a red cat'"):
        policy.images(prompts_of(TEXTS, 1, [{"source": files}] * 2), 2, KEY)
    uneven = [{"source": files}, {"source": files[0]}]
    with pytest.raises(ValueError, match=r"all prompts need equally many pictures as source, got \[1, 2\]"):
        policy.images(prompts_of(TEXTS, 1, uneven), 2, KEY)


def test_references_are_optional_and_change_the_picture(world):
    row, _, _, files, _ = world("Flux2Pipeline")
    policy = policy_of(world, "Flux2Pipeline", guidance=3.0)
    without, seen = (policy.images(prompts_of(TEXTS, 1, e), 2, KEY) for e in (None, extras(row, files)))
    assert (without - seen).abs().max() > 1e-4


@pytest.mark.parametrize(
    "name",
    [
        "WanImageToVideoPipeline 5B",
        "LTXImageToVideoPipeline",
        "LTX2ImageToVideoPipeline",
        "HunyuanVideoImageToVideoPipeline",
    ],
)
def test_a_video_from_a_picture_ends_with_it_as_its_first_frame(world, name, monkeypatch):
    """Whatever noise the steps draw; of the latent, as decoders look ahead."""
    row, _, _, files, _ = world(name)
    policy, ends = policy_of(world, name, Noise("flow", 0.7)), []
    decode = policy.adapter.decode
    monkeypatch.setattr(policy.adapter, "decode", lambda x: ends.append(x.clone()) or decode(x))
    prompts = prompts_for(row, files)
    policy.sample(prompts, Plan(4, (0, 1)), KEY)
    policy.images(prompts, 4, (1, "other"))
    noisy, clean = ends
    given = policy._seen(prompts, 1.0).positives()["first"]
    for end in ends:
        assert_close(end[:, :, :1], given, atol=1e-5, rtol=1e-5)
    assert (noisy[:, :, 1:] - clean[:, :, 1:]).abs().max() > 1e-1


def same_condition(policy: FlowPolicy, pictures: torch.Tensor) -> None:
    """What the planner takes for a text is what the adapter encodes, and its model runs on it."""
    adapter = policy.adapter
    real = adapter.encode_with(TEXTS[0], pictures) if len(pictures) else adapter.encode(TEXTS[0])
    blank = blank_policy(policy.settings, Noise())
    told = blank_text(blank, len(pictures))
    assert {name: (value.shape, value.dtype) for name, value in told.items()} == {
        name: (value.shape, value.dtype) for name, value in real.items()
    }
    blank = blank_policy(replace(policy.settings, precision="fp32"), Noise())
    told = blank_text(blank, len(pictures))
    seen = {name: value.expand(2, *value.shape) for name, value in told.items()}
    x, sigma = torch.empty(2, *blank.shape, device=META), torch.empty(2, device=META)
    with _fused_attention(), supposing(blank):  # as the planner; masks on the CPU have no part in attention
        velocity = blank.adapter.velocity(blank.module, x, sigma, seen, None, 1.0)
        velocity.sum().backward()
    with torch.no_grad():
        media = blank.adapter.decode(x)
    assert velocity.shape == x.shape
    assert media.shape == policy.adapter.decode(torch.zeros(2, *policy.shape)).shape


PLANNED = [name for name in FAMILIES if name.split()[0] in PATTERNS]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in PLANNED]
)
def test_a_plan_knows_what_the_network_sees_of_a_text(world, name):
    policy = load(settings_of(world, name, precision="bf16", guidance=1.0), Noise())
    row = world(name)[0]
    same_condition(policy, torch.rand(row.sources, 3, *row.size))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["HiDreamImagePipeline", "HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"]
)
def test_networks_that_read_what_tensors_hold_need_the_bytes_that_are_supposed(world, name):
    """Of HiDream few, for its experts do not get equally many tokens."""
    policy = policy_of(world, name)
    row, rows = world(name)[0], 4
    predicted = measure(blank_policy(policy.settings, Noise()), rows, rows, pictures=row.sources)
    adapter, network = policy.adapter, policy.module
    pictures = torch.rand(row.sources, 3, *row.size)
    text = adapter.encode_with(TEXTS[0], pictures) if row.sources else adapter.encode(TEXTS[0])

    def forward():
        seen = {name: value.expand(rows, *value.shape).clone() for name, value in text.items()}
        x, sigma = torch.rand(rows, *policy.shape), torch.rand(rows)
        return adapter.velocity(network, x, sigma, seen, None, 1.0)

    assert live_bytes(network, forward).peak == pytest.approx(predicted.plain, rel=0.02)


def test_a_plan_supposes_which_places_are_taken():
    x = torch.empty(8, 3, device=META)
    mask = torch.empty(8, dtype=torch.bool, device=META)
    with Supposing(0.25, answer=False):
        assert x[mask].shape == (2, 3)
        assert x[~mask].shape == (6, 3)
        x[mask] = torch.empty(2, 3, device=META)
        assert not torch.all(x == 0)
        high, wide = torch.tensor([3, 2], device=META)
        assert x[: high * wide].shape == (6, 3)
    with pytest.raises(NotImplementedError):
        x[mask]


def test_a_plan_of_an_editor_needs_the_processor_that_counts_its_pictures(world, tmp_path):
    settings = settings_of(world, "QwenImageEditPipeline")
    folder = shutil.copytree(settings.model, tmp_path / "model")
    shutil.rmtree(folder / "processor")
    with pytest.raises(ValueError, match="holds no processor, by which tokens of pictures are counted"):
        blank_text(blank_policy(replace(settings, model=str(folder)), Noise()))


def test_a_plan_counts_the_pictures_that_prompts_name(world, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    row, folder, *_ = world("Flux2KleinPipeline")
    found = []
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    for sources in ((), ("a.png",), ("a.png", "b.png")):
        file = tmp_path / f"{len(sources)}.jsonl"
        extra = {"source": list(sources)} if sources else {}
        file.write_text("".join(json.dumps({"prompt": f"{i} cats", **extra}) + "\n" for i in range(64)))
        given = [f"policy.model={folder}", f"policy.height={row.size[0]}", f"policy.width={row.size[1]}"]
        given += ["policy.max_sequence_length=40", f"prompts.file={file}", f"prompts.heldout_file={file}"]
        config = load_config(ROOT / "assets/recipes/lab_flow_grpo.yaml", given)
        found.append(rehearse(config)[1].measured.forward_flops)
    none, one, two = found
    assert none < one < two


def test_all_that_a_plan_knows_is_compared():
    assert {name.split()[0] for name in PLANNED} == set(PATTERNS)
