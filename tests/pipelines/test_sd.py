"""What is particular to models that predict noise: times, tables, DDIM; the rest is in test_families.py."""

import copy
import json
import shutil

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch.testing import assert_close
from toys import Brightness, initial

from mmalign.algorithms.ddpo import DDPO
from mmalign.algorithms.draft import DRaFT
from mmalign.algorithms.flow_grpo import FlowGRPO
from mmalign.contracts import LoraSettings, PolicySettings
from mmalign.data import Prompt, PromptSource
from mmalign.pipelines import load
from mmalign.pipelines.flow import FlowPolicy
from mmalign.pipelines.sd import StableDiffusion, StableDiffusionXL
from mmalign.randomness import generator, normals
from mmalign.records import Minibatch, Pick, Plan
from mmalign.rewardmodels.lab_colors import LabColors
from mmalign.scoring import Scorer
from mmalign.sde import Noise
from mmalign.testing import check_policy, prompts_of, tiny_sd, tiny_sdxl
from mmalign.trainer import Trainer, TrainingSettings

KEY = (0, "test")
TEXTS = ["a red cat", "two blue dogs on the left"]
KINDS = {
    "sd": (tiny_sd, "epsilon", StableDiffusionPipeline, StableDiffusion),
    "sd, v": (tiny_sd, "v_prediction", StableDiffusionPipeline, StableDiffusion),
    "sdxl": (tiny_sdxl, "epsilon", StableDiffusionXLPipeline, StableDiffusionXL),
    "sdxl, v": (tiny_sdxl, "v_prediction", StableDiffusionXLPipeline, StableDiffusionXL),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("tiny")
    return {
        kind: write(place / kind.replace(", ", "_"), prediction=predicts)
        for kind, (write, predicts, _, _) in KINDS.items()
    }


@pytest.fixture(scope="module")
def read():
    return {}


@pytest.fixture
def make(folders, read):
    """`make(kind, noise, **settings)`: a policy over a tiny model; what was read from disk once is copied."""

    def build(kind="sd", noise=None, *, chunk=64, seed=0, **settings):
        policy = PolicySettings(str(folders[kind]), **({"lora": LoraSettings(rank=4, alpha=6)} | settings))
        key = (kind, policy.precision, policy.lora.rank == 0, policy.guidance_rescale)
        if key not in read:
            read[key] = KINDS[kind][3](policy)
        return FlowPolicy(
            copy.deepcopy(read[key]), policy, noise or Noise("ddim", 1.0), chunk=chunk, seed=seed
        )

    return build


@pytest.fixture
def plain(folders):
    """The model's own pipeline with the DDIM scheduler of its table."""

    def build(kind, **parts):
        pipeline = KINDS[kind][2].from_pretrained(folders[kind], **parts)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return build


def both(policy, pipeline, texts=TEXTS, steps=5, **call) -> tuple[torch.Tensor, torch.Tensor]:
    """The same noise through our ODE and through the plain pipeline."""
    prompts, settings = prompts_of(texts, 1), policy.settings
    negative = [settings.negative_prompt] * len(texts) if settings.negative_prompt else None
    theirs = pipeline(
        prompts.text,
        height=settings.height,
        width=settings.width,
        negative_prompt=negative,
        num_inference_steps=steps,
        guidance_scale=settings.guidance,
        latents=initial(prompts, policy.shape, KEY),
        output_type="pt",
        **call,
    ).images
    return policy.images(prompts, steps, KEY), theirs


def stir(policy) -> None:
    """Give every trainable parameter another value, as training would."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in policy.module.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=draw))


# ---- parity


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_images_are_equal_away_from_the_square_and_at_other_numbers_of_steps(make, plain, kind):
    policy = make(kind, guidance=3.0, height=48, width=32)
    for steps in (1, 7):
        ours, theirs = both(policy, plain(kind), steps=steps)
        assert ours.shape == (2, 3, 48, 32)
        assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("config", [{"timestep_spacing": "trailing"}, {"set_alpha_to_one": True}], ids=str)
def test_images_are_equal_on_other_schedules(folders, plain, tmp_path, config):
    folder = with_scheduler(folders["sd"], tmp_path, **config)
    policy = load(PolicySettings(str(folder), lora=LoraSettings(4, 6)), Noise("ddim", 1.0))
    pipeline = plain("sd")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **config)
    assert_close(*both(policy, pipeline), atol=1e-5, rtol=0)


def test_zero_terminal_noise_to_signal_is_equal_where_v_is_predicted(folders, plain, tmp_path):
    config = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    folder = with_scheduler(folders["sd, v"], tmp_path, **config)
    policy = load(PolicySettings(str(folder), lora=LoraSettings(4, 6)), Noise("ddim", 1.0))
    assert policy._schedule(5)[0] > 0.9999
    pipeline = plain("sd, v")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **config)
    assert_close(*both(policy, pipeline), atol=1e-5, rtol=0)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_stochastic_sampling_is_ddim_with_eta(make, plain, eta):
    policy, pipeline = make("sd", Noise("ddim", eta)), plain("sd")
    prompts = prompts_of(TEXTS, 2)
    trajectory = policy.sample(prompts, Plan(5, (0, 1, 2, 3)), KEY)
    names = list(zip(prompts.group.tolist(), prompts.member.tolist(), strict=True))
    y, scheduler = initial(prompts, policy.shape, KEY), pipeline.scheduler
    embeds = torch.stack([policy._encode(text)["embeds"] for text in prompts.text])
    scheduler.set_timesteps(5)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            noise = pipeline.unet(y, t, encoder_hidden_states=embeds).sample
            streams = [generator(*KEY, "noise", i, *name) for name in names]
            drawn = {"eta": eta, "variance_noise": normals(streams, policy.shape)} if i < 4 else {}
            y = scheduler.step(noise, t, y, **drawn).prev_sample
        media = pipeline.vae.decode(y / pipeline.vae.config.scaling_factor).sample
    assert_close(trajectory.outcome.media, (media / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_is_told_the_timesteps_of_the_scheduler(make, kind):
    policy, seen = make(kind), []
    policy.module.register_forward_pre_hook(
        lambda _, __, named: seen.append(named["timestep"]), with_kwargs=True
    )
    policy.images(prompts_of(TEXTS, 1), 7, KEY)
    assert torch.stack(seen)[:, 0].tolist() == policy.adapter.scheduler.timesteps.tolist()


def test_times_between_two_of_the_table_are_interpolated(make):
    adapter = make("sd").adapter
    levels = adapter.levels
    assert torch.equal(adapter.time(levels), torch.arange(1000.0))
    middle = (levels[:-1] + levels[1:]) / 2
    assert_close(adapter.time(middle), torch.arange(999.0) + 0.5, atol=1e-2, rtol=0)
    assert adapter.time(torch.tensor([0.0, 1.0])).tolist() == [0.0, 999.0]


@pytest.mark.parametrize("kind", ["sd", "sd, v"])
def test_the_velocity_is_noise_less_data_by_the_models_own_estimates(make, plain, kind):
    policy, scheduler = make(kind), plain(kind).scheduler
    scheduler.set_timesteps(5)
    y, t = torch.randn(2, *policy.shape), scheduler.timesteps[2]
    texts = policy._texts(TEXTS, 1.0)
    a = scheduler.alphas_cumprod[t]
    c = a.sqrt() + (1 - a).sqrt()
    sigma = policy._schedule(5)[2].expand(2)
    with torch.no_grad():
        velocity = policy._velocity(y / c, sigma, texts, 1.0)
        predicted = policy.module(y, t, encoder_hidden_states=texts.positives()["embeds"]).sample
    clean = scheduler.step(predicted, t, y).pred_original_sample
    noise = (y - a.sqrt() * clean) / (1 - a).sqrt()
    assert_close(velocity, noise - clean, atol=2e-5, rtol=1e-5)


# ---- a policy like any other


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("plan", "noise"),
    [
        (Plan(5, (0, 1, 2, 3)), Noise("ddim", 1.0)),
        (Plan(6, (1, 2), True, (1, 2)), Noise("flow", 0.7)),
    ],
    ids=["every step", "window"],
)
def test_the_policy_keeps_its_contract(make, kind, plan, noise):
    check_policy(make(kind, noise, guidance=3.0), prompts_of(TEXTS, 2), plan, tolerance=1e-5)


def test_the_divergence_from_the_base_is_zero_at_first_and_then_that_of_gaussians(make):
    policy, prompts = make("sd"), prompts_of(TEXTS, 2)
    policy.copies.save("reference")
    trajectory = policy.sample(prompts, Plan(4, (0, 1, 2)), KEY)
    pick = Pick(*trajectory.mask.nonzero(as_tuple=True))

    def gap() -> torch.Tensor:
        with torch.no_grad():
            now = policy.evaluate(trajectory, pick)
            with policy.copies.use("reference"):
                base = policy.evaluate(trajectory, pick)
        normal = [torch.distributions.Normal(e.mean, e.std.expand_as(e.mean)) for e in (now, base)]
        exact = torch.distributions.kl_divergence(*normal)
        assert_close((now.mean - base.mean) ** 2 / (2 * now.std**2), exact, atol=1e-6, rtol=1e-4)
        return exact.mean()

    assert gap() == 0
    stir(policy)
    assert gap() > 0


def test_with_guidance_the_gradient_flows_through_both_halves(make):
    policy, grads = make("sd", guidance=3.0), []
    trajectory = policy.sample(prompts_of(TEXTS, 2), Plan(3, (0, 1)), KEY)

    def note(_, __, output) -> None:
        output[0].register_hook(grads.append)

    handle = policy.module.register_forward_hook(note)
    policy.evaluate(
        trajectory, Pick(torch.arange(4), torch.zeros(4, dtype=torch.int64))
    ).log_prob.sum().backward()
    handle.remove()
    negative, positive = grads[0].flatten(1).norm(dim=1).chunk(2)
    assert (negative > 0).all()
    assert_close(positive / negative, torch.full((4,), 3.0 / 2.0))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_half_precision_runs_and_stores_fp32(make, kind, precision):
    policy = make(kind, guidance=2.0, precision=precision)
    trajectory = policy.sample(prompts_of(TEXTS, 2), Plan(3, (0, 1)), KEY)
    for tensor in (trajectory.log_prob, trajectory.outcome.media, *trajectory.replay.values()):
        assert tensor.dtype in (torch.float32, torch.int64)
        assert torch.isfinite(tensor).all()


# ---- files


def test_saved_full_weights_do_the_same_in_plain_diffusers(make, plain, tmp_path):
    policy = make("sd", lora=LoraSettings(rank=0))
    stir(policy)
    policy.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["unet"]
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert_close(*both(policy, plain("sd", unet=unet)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rank", [0, 4])
def test_loading_gives_back_what_was_saved(make, tmp_path, rank):
    policy = make("sd", lora=LoraSettings(rank, 6))
    stir(policy)
    policy.save(tmp_path)
    other = make("sd", lora=LoraSettings(rank, 6), seed=1)
    other.load(tmp_path)
    for a, b in zip(policy.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(a, b)


# ---- training


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize(
    "method",
    [
        DDPO(steps=4, clip=1e-2),
        DDPO(steps=4, clip=None, kl=0.01),
        FlowGRPO(steps=4, clip=1e-2, kl=0.01, noise=Noise("ddim", 1.0)),
    ],
    ids=lambda method: type(method).__name__,
)
def test_methods_train_its_lora_alone_by_steps_of_ddim(make, kind, method):
    algorithm = method.build({"brightness": 1.0})
    policy = make(kind, algorithm.noise)
    before = {n: p.detach().clone() for n, p in policy.module.named_parameters()}
    prompts = PromptSource([Prompt(text) for text in TEXTS], 2, 3, 0)
    settings = TrainingSettings(iterations=2, learning_rate=1e-3, batch=6, updates=1)
    found = Trainer(policy, algorithm, Scorer([Brightness()]), prompts, settings)
    metrics = found.step(0)
    assert metrics["grad_norm"] > 0
    if "log_ratio_max" in metrics:
        assert metrics["log_ratio_max"] < 1e-5
    found.step(1)
    moved = {n for n, p in policy.module.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if ".lora_" in n}


@pytest.mark.parametrize("kind", ["sd", "sdxl, v"])
def test_rewards_are_differentiated_through_it_to_the_sample_that_was_finished(make, kind):
    algorithm = DRaFT(steps=5, last=2).build({"lab_colors": 1.0})
    algorithm.through.meet([LabColors(width=0.5, area=0.5)])
    policy, seen = make(kind, algorithm.noise), []
    trajectory = policy.sample(prompts_of(TEXTS, 2), algorithm.plans(0, 0)[0], KEY)
    pick, decode = Pick(*trajectory.mask.nonzero(as_tuple=True)), policy.decode
    policy.decode = lambda latents: seen.append(decode(latents)) or seen[-1]
    losses, _ = algorithm.objective(policy, Minibatch(trajectory, pick, torch.zeros(1, 4), torch.ones(4)))
    losses.sum().backward()
    assert_close(seen[0].detach(), trajectory.outcome.media, atol=1e-5, rtol=0)
    assert_close(
        trajectory.outcome.media, policy.images(trajectory.outcome.prompts, 5, KEY), atol=1e-6, rtol=0
    )
    assert any(p.grad is not None and p.grad.norm() > 0 for p in policy.module.parameters())


# ---- errors


def with_scheduler(folder, place, **config):
    """A copy of a model's folder with other settings of its scheduler."""
    shutil.copytree(folder, place / "other")
    file = place / "other" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return place / "other"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "sample"}, "it predicts sample, and can predict epsilon or v_prediction"),
        ({"thresholding": True, "_class_name": "DDIMScheduler"}, "steps with a clip have no density"),
        (
            {"rescale_betas_zero_snr": True, "_class_name": "DDIMScheduler"},
            "a prediction of the noise says nothing",
        ),
    ],
    ids=["sample", "clip", "zero terminal"],
)
def test_a_scheduler_without_gaussian_steps_is_refused(folders, tmp_path, config, message):
    folder = with_scheduler(folders["sd"], tmp_path, **config)
    if name := config.get("_class_name"):
        index = json.loads((folder / "model_index.json").read_text())
        index["scheduler"] = ["diffusers", name]
        (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"policy.model: .*{message}"):
        load(PolicySettings(str(folder)), Noise("ddim", 1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_shift_is_refused(folders, kind):
    with pytest.raises(ValueError, match=r"policy\.shift must be null: the schedule of a Stable.* has none"):
        load(PolicySettings(str(folders[kind]), shift=3.0), Noise("ddim", 1.0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"height": 36}, "policy.height must be a multiple of 8 for this model, got 36"),
        ({"width": 0}, "policy.width must be a multiple of 8"),
        ({"leave_out": ("text_encoder",)}, "policy.leave_out: nothing of a StableDiffusionPipeline"),
        ({"lora": LoraSettings(targets=("nothing",))}, r"policy.lora.targets: \['nothing'\] fit no layer"),
    ],
    ids=["height", "width", "leave out", "targets"],
)
def test_settings_that_do_not_fit_are_refused(folders, wrong, message):
    with pytest.raises(ValueError, match=message):
        load(PolicySettings(str(folders["sd"]), **wrong), Noise("ddim", 1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_latents_of_pictures_are_those_of_the_plain_autoencoder_at_the_end_of_the_schedule(make, plain, kind):
    """A clean picture is what the last step of the schedule would have left of it, freed of its noise."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pipeline, adapter = plain(kind), make(kind).adapter
    mean = pipeline.vae.encode(pipeline.image_processor.preprocess(images)).latent_dist.mean
    signal = pipeline.scheduler.final_alpha_cumprod.sqrt()
    found = adapter.latents(images)
    assert_close(found * signal, mean * pipeline.vae.config.scaling_factor, atol=1e-5, rtol=1e-5)
    shown = pipeline.image_processor.postprocess(pipeline.vae.decode(mean, return_dict=False)[0], "pt")
    assert_close(adapter.decode(found), shown, atol=1e-5, rtol=0)
