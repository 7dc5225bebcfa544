"""A tiny real pipeline for tests, and the checks that every policy and every reward must pass.

They are public: a new model or reward, also outside of this project, is one call away from being checked.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign.contracts import Key, Policy, RewardModel, TellsStates
from mmalign.plans import forwards
from mmalign.records import (
    Masks,
    Outcome,
    Pick,
    Plan,
    Prompts,
    RewardSignal,
    Spans,
    Steps,
    Trajectory,
    Where,
    Whole,
)

# Words that the tiny tokenizers know whole; others are spelled by letters.
WORDS = """
    a an the and of in on to left right above below one two three four with no not picture photo
    red green blue yellow purple orange white black small large big
    square circle triangle star cross cat dog hat
""".split()  # noqa: SIM905

# The table of Stable Diffusion 1, 2 and XL.
DIFFUSION: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


def tiny_sd3(folder: Path, seed: int = 0, t5: bool = True) -> Path:
    """Write a complete `StableDiffusion3Pipeline` with random weights into `folder` and give it back.

    A forward takes milliseconds on a CPU: 32x32 pixels, latents [4, 8, 8], two layers, texts of at most 16
    CLIP tokens. Equal seeds give equal weights. t5: False leaves the third text encoder out, as small set-ups
    do.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

    clip_tokens, t5_tokens = _clip_tokenizer(), _t5_tokenizer()
    clip = _clip_config(clip_tokens)
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
            vae=_vae(scaling_factor=1.5, shift_factor=0.06, use_quant_conv=False, use_post_quant_conv=False),
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


def tiny_sd(folder: Path, seed: int = 0, prediction: str = "epsilon") -> Path:
    """Write a complete `StableDiffusionPipeline` with random weights into `folder` and give it back.

    As tiny as `tiny_sd3`, with the table and the scheduler of Stable Diffusion 1.5. prediction: "epsilon" or
    "v_prediction", as 2.1 has it.
    """
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextModel

    tokens = _clip_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionPipeline(
            unet=_unet(cross_attention_dim=16),
            scheduler=PNDMScheduler(skip_prk_steps=True, prediction_type=prediction, **DIFFUSION),
            vae=_vae(scaling_factor=0.18215),
            text_encoder=CLIPTextModel(_clip_config(tokens)),
            tokenizer=tokens,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


def tiny_sdxl(folder: Path, seed: int = 0, prediction: str = "epsilon") -> Path:
    """Write a complete `StableDiffusionXLPipeline` with random weights; otherwise as `tiny_sd`."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    tokens = _clip_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionXLPipeline(
            unet=_unet(
                cross_attention_dim=32,
                use_linear_projection=True,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=6 * 8 + 16,
            ),
            scheduler=EulerDiscreteScheduler(
                timestep_spacing="leading", prediction_type=prediction, **DIFFUSION
            ),
            vae=_vae(scaling_factor=0.13025),
            text_encoder=CLIPTextModel(_clip_config(tokens)),
            tokenizer=tokens,
            text_encoder_2=CLIPTextModelWithProjection(_clip_config(tokens)),
            tokenizer_2=_clip_tokenizer(),
            add_watermarker=False,
        )
    pipeline.save_pretrained(folder)
    return Path(folder)


def _unet(**given: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=4,
        **given,
    )


def _vae(**given: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(4, 4, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=32,
        **given,
    )


def _clip_config(tokens: Any) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
        max_position_embeddings=16,
        hidden_act="gelu",
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )


def prompts_of(texts: list[str], group: int, extra: list[Mapping[str, object]] | None = None) -> Prompts:
    """Every text `group` times: group numbers count the texts, member numbers the samples of one text."""
    count = torch.arange(len(texts))
    return Prompts(
        [text for text in texts for _ in range(group)],
        count.repeat_interleave(group),
        torch.arange(group).repeat(len(texts)),
        [one for one in (extra or [{} for _ in texts]) for _ in range(group)],
    )


def check_policy(policy: Policy, prompts: Prompts, plan: Plan, tolerance: float = 1e-6) -> None:
    """Raise AssertionError where `policy` breaks what the loop relies on.

    prompts: at least two groups of two or more. tolerance: how far a log-probability may be off when the same
    thing is computed in another batch, and a hundred times that for media; 1e-6 is for fp32.
    """
    key: Key = (0, "check")
    before = policy.forwards.sample
    trajectory = policy.sample(prompts, plan, key)
    rows = policy.forwards.sample - before
    _check_trajectory(trajectory, prompts, plan)
    if isinstance(trajectory.outcome.media, Tensor):
        _check_tree(policy, trajectory, plan, key, rows, tolerance)
    _check_streams(policy, trajectory, plan, key, tolerance)
    _check_replay(policy, trajectory, tolerance)
    _check_gradients(policy, trajectory)
    _check_copies(policy, trajectory)
    _check_footprints(policy, trajectory)
    if isinstance(policy, TellsStates) and trajectory.mask.any():
        _check_states(policy, trajectory)


def _check_trajectory(trajectory: Trajectory, prompts: Prompts, plan: Plan) -> None:
    samples, media = len(prompts), trajectory.outcome.media
    assert trajectory.mask.dtype == torch.bool, f"mask must be bool, is {trajectory.mask.dtype}"
    assert trajectory.log_prob.shape[:2] == trajectory.mask.shape, (
        f"log_prob {tuple(trajectory.log_prob.shape)} does not begin with mask {tuple(trajectory.mask.shape)}"
    )
    assert trajectory.log_prob.dtype == torch.float32, (
        f"log_prob must be fp32, is {trajectory.log_prob.dtype}"
    )
    assert not trajectory.log_prob.requires_grad, "sampling must not keep a graph"
    assert torch.isfinite(trajectory.log_prob).all(), "log_prob is not finite"
    views = trajectory.outcome.views
    assert len(media) == samples * views, f"{len(media)} media for {samples} samples of {views} views"
    if isinstance(media, Tensor):
        assert views == plan.views, f"{views} views for a plan of {plan.views}"
        assert media.min() >= 0, f"media go down to {media.min()}"
        assert media.max() <= 1, f"media go up to {media.max()}"
    for name, tensor in trajectory.replay.items():
        assert len(tensor) == samples, f"replay[{name!r}] has {len(tensor)} rows for {samples} samples"
        assert not tensor.is_floating_point() or tensor.dtype == torch.float32, (
            f"replay[{name!r}] is not fp32"
        )


def _check_streams(policy: Policy, trajectory: Trajectory, plan: Plan, key: Key, tolerance: float) -> None:
    prompts, media = trajectory.outcome.prompts, trajectory.outcome.media
    again = policy.sample(prompts, plan, key)
    assert _same(media, again.outcome.media, 0), "equal keys gave other samples"
    assert torch.equal(trajectory.log_prob, again.log_prob), "equal keys gave other log-probabilities"
    backwards = torch.arange(len(prompts)).flip(0)[: len(prompts) - 1]
    part = policy.sample(prompts.take(backwards), plan, key).outcome
    views = trajectory.outcome.views
    rows = (backwards[:, None] * views + torch.arange(views)).flatten()
    expected = media[rows] if isinstance(media, Tensor) else [media[i] for i in rows.tolist()]
    assert _same(expected, part.media, 100 * tolerance), "a sample depends on its batch"
    other = policy.sample(prompts, plan, (*key, "other")).outcome.media
    assert not _same(media, other, 0), "another key gave the same samples"
    if isinstance(media, Tensor):
        for shared in (False, True):
            quiet = policy.sample(prompts, Plan(plan.steps, share_noise=shared), key).outcome.media
            assert isinstance(quiet, Tensor)
            for group in sorted(set(prompts.group.tolist())):
                members = quiet[(prompts.group == group).to(quiet.device)]
                alike = _same(members, members[:1].expand_as(members), 100 * tolerance)
                found = "alike" if alike else "different"
                assert alike == shared or len(members) < 2, (
                    f"with share_noise={shared} members of group {group} are {found}"
                )


def _check_tree(
    policy: Policy, trajectory: Trajectory, plan: Plan, key: Key, rows: int, tolerance: float
) -> None:
    """Members are one where the plan says so, and the network sees what they share once."""
    prompts, likely = trajectory.outcome.prompts, trajectory.log_prob
    group, member = prompts.group.cpu(), prompts.member.cpu()
    for column, step in enumerate(plan.sde_steps):
        names = torch.stack([group, plan.heirs(member, step)], 1)
        node = torch.unique(names, dim=0, return_inverse=True)[1]
        for one in range(int(node.max()) + 1):
            shared = likely[(node == one).to(likely.device), column]
            assert float((shared - shared[:1]).abs().max()) == 0, (
                f"members that share the action at step {step} have different log-probabilities of it"
            )
        found = len(
            torch.unique(likely[:, column].flatten(1) if likely.ndim > 2 else likely[:, column], dim=0)
        )
        assert found == int(node.max()) + 1, (
            f"after step {step} there are {found} different members where the plan has {int(node.max()) + 1}"
        )
    sample, train = forwards(plan, group, member)
    assert rows in (sample, 2 * sample), (
        f"sampling took {rows} network rows, the plan {sample}, or twice that"
    )
    before = policy.forwards.train
    for pick in policy.picks(trajectory, torch.arange(len(prompts)), size=4):
        policy.evaluate(trajectory, pick)
    rows = policy.forwards.train - before
    assert rows in (train, 2 * train), f"an update took {rows} network rows, the plan {train}, or twice that"
    learned = torch.tensor(
        [plan.learned is None or step in plan.learned for step in plan.sde_steps], dtype=torch.bool
    )
    assert plan.renoise or torch.equal(trajectory.mask.cpu(), learned.expand(len(prompts), -1)), (
        "mask must be True at the actions that are learned"
    )
    if plan.values:  # what an action ends in is the sample itself
        media, views = trajectory.outcome.media, len(plan.strides)
        plain = policy.sample(prompts, replace(plan, values=False), key).outcome.media
        assert isinstance(media, Tensor)
        last = media.reshape(len(prompts), plan.views, *media.shape[1:])[:, -views:].flatten(0, 1)
        assert _same(last, plain, 100 * tolerance), "the last of the values is not the sample"


def _check_replay(policy: Policy, trajectory: Trajectory, tolerance: float) -> None:
    samples = len(trajectory)
    seen = torch.zeros(trajectory.mask.shape, dtype=torch.int64)
    for pick in policy.picks(trajectory, torch.arange(samples), size=4):
        with torch.no_grad():
            now = policy.evaluate(trajectory, pick)
        recorded = trajectory.log_prob[pick.rows, pick.columns]
        assert now.log_prob.shape == recorded.shape, (
            f"log_prob is {tuple(now.log_prob.shape)} in evaluation and {tuple(recorded.shape)} in sampling"
        )
        off = float((now.log_prob - recorded).abs().max())
        assert off <= tolerance, (
            f"an unchanged policy finds its own actions off by {off:.1e} in log-probability"
        )
        seen.index_put_((pick.rows.cpu(), pick.columns.cpu()), torch.tensor(1), accumulate=True)
    assert torch.equal(seen, trajectory.mask.cpu().long()), (
        "picks must hold every unmasked action exactly once"
    )
    some = torch.tensor([samples - 1, 0])
    rows = {int(row) for pick in policy.picks(trajectory, some, size=4) for row in pick.rows}
    assert rows <= {0, samples - 1}, f"picks of samples {some.tolist()} hold {sorted(rows)}"


def _check_gradients(policy: Policy, trajectory: Trajectory) -> None:
    parameters = dict(policy.module.named_parameters())
    trainable = [p for p in parameters.values() if p.requires_grad]
    assert trainable, "nothing is trainable"
    assert all(p.dtype == torch.float32 for p in trainable), "trainable parameters must be fp32"
    for p in trainable:
        p.grad = None
    for pick in policy.picks(trajectory, torch.arange(len(trajectory)), size=4):
        torch.autograd.backward(policy.evaluate(trajectory, pick).log_prob.sum())
    reached = [p for p in trainable if p.grad is not None and bool(p.grad.abs().sum() > 0)]
    assert not trajectory.mask.any() or reached, "the log-probability has no gradient"
    assert all(torch.isfinite(p.grad).all() for p in reached if p.grad is not None), (
        "a gradient is not finite"
    )
    for name, p in parameters.items():
        assert p.requires_grad or p.grad is None, f"the frozen {name} got a gradient"
        p.grad = None


def _check_copies(policy: Policy, trajectory: Trajectory) -> None:
    live = [p for p in policy.module.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in live]
    name = "check_policy"
    policy.copies.save(name)
    try:
        with torch.no_grad():
            for p in live:
                p.add_(0.1)
        moved = [p.detach().clone() for p in live]
        with policy.copies.use(name):
            assert all(map(torch.equal, live, before)), "copies.use does not give the saved values"
        assert all(map(torch.equal, live, moved)), "copies.use does not give the live values back"
    finally:
        with torch.no_grad():
            for p, value in zip(live, before, strict=True):
                p.copy_(value)
        policy.copies.state_dict().pop(name, None)


def _check_footprints(policy: Policy, trajectory: Trajectory) -> None:
    samples, actions = trajectory.mask.shape
    grid = (samples, 3, *trajectory.log_prob.shape[1:])
    units = torch.arange(3).expand(samples, 3)
    placed = 0
    wheres: list[Where] = [
        Whole(),
        Steps(units.clamp(max=max(0, actions - 1))),
        Spans(units, units + 1),
        Masks(torch.rand(samples, 3, 1, 12, 12, generator=torch.Generator().manual_seed(0))),
    ]
    for where in wheres:
        kind = type(where).__name__
        try:
            footprint = policy.locate(where, trajectory)
        except TypeError as error:
            if kind not in str(error):
                raise AssertionError(f"the error for {kind} does not name it: {error}") from error
            continue
        placed += 1
        assert bool((footprint >= 0).all()), f"the footprint of {kind} has negative parts"
        fits = footprint.ndim == len(grid) and all(
            a in (1, b) for a, b in zip(footprint.shape, grid, strict=True)
        )
        assert fits, f"the footprint of {kind} is {tuple(footprint.shape)}, which does not fit {grid}"
    assert placed, "the policy can place nothing, not even Whole"


def _check_states(policy: TellsStates, trajectory: Trajectory) -> None:
    row, column = trajectory.mask.cpu().nonzero(as_tuple=True)
    whole = policy.states(trajectory, Pick(row, column))
    for name, tensor in (("x", whole.x), ("sigma", whole.sigma), ("text", whole.text)):
        assert len(tensor) == len(row), f"states: {name} has {len(tensor)} rows for {len(row)} actions"
        assert torch.isfinite(tensor).all(), f"states: {name} is not finite"
        assert not tensor.requires_grad, f"states: {name} must not keep a graph"
    assert whole.sigma.ndim == 1, f"states: sigma must be [n], is {tuple(whole.sigma.shape)}"
    assert whole.text.ndim == 2, f"states: text must be [n, D], is {tuple(whole.text.shape)}"
    few = torch.arange(len(row)).flip(0)[::2]
    part = policy.states(trajectory, Pick(row[few], column[few]))
    for name in ("x", "sigma", "text"):
        same = torch.equal(getattr(part, name), getattr(whole, name)[few.to(whole.x.device)])
        assert same, f"states: {name} depends on what else is picked"
    texts = [trajectory.outcome.prompts.text[i] for i in row.tolist()]
    for i, text in enumerate(texts):
        alike = torch.equal(whole.text[i], whole.text[0])
        assert alike or text != texts[0], f"states: text differs between samples of the prompt {text!r}"


def check_reward(model: RewardModel, outcome: Outcome) -> None:
    """Raise AssertionError where `model` breaks what scoring relies on; outcome: at least two samples."""
    media, prompts, views = outcome.media, outcome.prompts, outcome.views
    before = media.clone() if isinstance(media, Tensor) else list(media)
    signal = model(outcome)
    samples = len(prompts)
    assert model.name, "a reward needs a name"
    assert signal.name == model.name, f"the signal of {model.name!r} is called {signal.name!r}"
    assert len(signal.values) == samples, f"{len(signal.values)} verdicts for {samples} samples"
    assert signal.values.is_floating_point(), f"values must be float, are {signal.values.dtype}"
    assert not signal.values.requires_grad, "values must not keep a graph"
    assert signal.valid is not None
    assert signal.valid.any(), "no verdict is valid"
    assert signal.details is None or len(signal.details) == samples, "details must be one mapping a sample"
    assert _same(before, media, 0), f"{model.name} changed its input"
    for rows in (
        torch.arange(samples // 2),
        torch.arange(samples // 2, samples),
        torch.tensor([samples - 1]),
    ):
        places = (rows[:, None] * views + torch.arange(views)).flatten()
        part = media[places] if isinstance(media, Tensor) else [media[i] for i in places.tolist()]
        _check_part(signal, model(Outcome(prompts.take(rows), part, views)), rows)
    _check_where(signal, outcome)


def _check_part(whole: RewardSignal, part: RewardSignal, rows: Tensor) -> None:
    """Ragged units are padded, so a part may have fewer; what it has must be equal, and the rest invalid."""
    assert whole.valid is not None
    assert part.valid is not None
    count = min(whole.values.shape[1], part.values.shape[1])
    values, valid = whole.values[rows], whole.valid[rows]
    assert torch.equal(valid[:, :count], part.valid[:, :count]), (
        "which verdicts are valid depends on the batch"
    )
    assert not valid[:, count:].any(), "a sample has fewer units in a smaller batch"
    assert not part.valid[:, count:].any(), "a sample has more units in a smaller batch"
    off = float((values[:, :count] - part.values[:, :count]).abs().max()) if count else 0.0
    scale = 1 + float(values.abs().max()) if values.numel() else 1.0
    assert off <= 1e-4 * scale, f"values depend on the batch, by {off:.1e}"


def _check_where(signal: RewardSignal, outcome: Outcome) -> None:
    samples, units = signal.values.shape
    where, valid = signal.where, signal.valid
    assert valid is not None
    if isinstance(where, Masks):
        assert where.mask.ndim == 5, f"masks must be [B, U, F, H, W], are {tuple(where.mask.shape)}"
        assert where.mask.shape[:2] == (samples, units), (
            f"masks {tuple(where.mask.shape)} for {samples}x{units}"
        )
        assert where.mask.min() >= 0, "a mask has negative parts"
        assert where.mask.max() <= 1, "a mask has parts above 1"
    elif isinstance(where, Spans):
        assert where.start.shape == where.end.shape == (samples, units), "spans must be [B, U]"
        assert isinstance(outcome.media, list), "only text has Spans"
        for i, j in valid.nonzero().tolist():
            text, start, end = outcome.media[i * outcome.views], int(where.start[i, j]), int(where.end[i, j])
            assert 0 <= start <= end <= len(text), (
                f"span {start}..{end} lies outside of {len(text)} characters"
            )
    elif isinstance(where, Steps):
        assert where.index.shape == (samples, units), "steps must be [B, U]"
        assert bool((where.index[valid] >= 0).all()), "a step is negative"


def _same(a: Tensor | list[str], b: Tensor | list[str], tolerance: float) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and float((a - b).abs().max()) <= tolerance
    return a == b


def _clip_tokenizer() -> Any:
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


def _t5_tokenizer() -> Any:
    from transformers import T5TokenizerFast

    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    vocab += [(character, -5.0) for character in string.ascii_letters + string.digits + string.punctuation]
    vocab += [("▁" + word, -3.0) for word in WORDS]
    return T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=64)
