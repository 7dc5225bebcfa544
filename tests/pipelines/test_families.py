"""Every adapter is its diffusers pipeline, number for number, and trains as a LoRA that diffusers loads."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, Row
from PIL import Image
from torch.testing import assert_close
from toys import initial
from training import trainer

from mmalign.algorithms.diffusion_nft import DiffusionNFT
from mmalign.algorithms.flow_grpo import FlowGRPO
from mmalign.contracts import LoraSettings, PolicySettings
from mmalign.data import Prompt, PromptSource
from mmalign.pipelines import ADAPTERS, load
from mmalign.records import Renoise, RewardSignal
from mmalign.sde import Noise
from mmalign.testing import prompts_of

KEY = (0, "test")
TEXTS = ["a red cat", "two blue dogs on the left of a circle"]
STEPS = 3


class Bright:
    """The mean of pictures and videos."""

    name = "bright"

    def __call__(self, outcome):
        return RewardSignal(self.name, outcome.media.flatten(1).mean(1)[:, None])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """`world(name)`: the row, the folder of its pipeline, what was read from it, pictures to start from."""
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


def policy_of(world, name: str, noise=None, **settings):
    """A policy over a family; what was read from disk once is copied."""
    row, folder, _, _, ours = world(name)
    given = {"height": row.size[0], "width": row.size[1], "frames": row.frames, "max_sequence_length": 16}
    given |= {"lora": LoraSettings(4, 6)} | row.settings | settings
    policy = PolicySettings(str(folder), **given)
    if not ours:
        ours["pipeline"] = load(replace(policy, lora=LoraSettings(0)), Noise()).adapter.pipeline
        ours["kind"] = type(load(policy, Noise()).adapter)
    from mmalign.pipelines.flow import FlowPolicy

    adapter = ours["kind"](policy, copy.deepcopy(ours["pipeline"]))
    return FlowPolicy(adapter, policy, noise or Noise())


def extras(row: Row, files: list[str]) -> list[dict]:
    """What each prompt names as its source."""
    if not files:
        return [{}, {}]
    return [{"source": file} for file in files] if row.own_picture else [{"source": files}] * 2


def prompts_for(row: Row, files: list[str]):
    return prompts_of(TEXTS, 1, extras(row, files))


def theirs(policy, plain, row: Row, files: list[str], monkeypatch) -> torch.Tensor:
    """What the plain pipeline makes of the same texts and the same noise."""
    settings, prompts = policy.settings, prompts_for(row, files)
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    high, wide = row.size
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda *_: (wide, high, None))
    monkeypatch.setattr(pipeline_qwenimage_edit_plus, "calculate_dimensions", lambda *_: (wide, high))
    pictures = [Image.open(file) for file in files]
    call = {"height": high, "width": wide, "num_inference_steps": STEPS, "output_type": "pt"}
    call |= row.call(settings)
    if row.takes_length:
        call["max_sequence_length"] = settings.max_sequence_length
    if row.frames:
        call["num_frames"] = row.frames
    if pictures:
        call["image"] = pictures if len(pictures) > 1 else pictures[0]
    noise = row.latents(initial(prompts, policy.shape, KEY))
    drawn = []
    for part in ([0], [1]) if row.one_by_one else ([0, 1],):
        asked = {"prompt": [TEXTS[i] for i in part], "latents": noise[part]}
        if row.negative:
            asked["negative_prompt"] = [settings.negative_prompt] * len(part)
        out = plain(**call, **asked)
        drawn.append(out.images if hasattr(out, "images") else out.frames)
    return torch.cat([torch.as_tensor(part) for part in drawn])


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_sample_is_that_of_the_plain_pipeline(world, name, guidance, monkeypatch):
    row, _, plain, files, _ = world(name)
    policy = policy_of(
        world, name, guidance=guidance, negative_prompt="a white square" if row.negative else ""
    )
    ours = policy.images(prompts_for(row, files), STEPS, KEY)
    expected = theirs(policy, plain, row, files, monkeypatch)
    assert ours.shape == expected.shape
    assert_close(ours, expected, atol=row.close, rtol=row.close)
    assert (ours[0] - ours[1]).abs().max() > 1e-2
    assert ours.std() > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_of_training_changes_the_lora_alone_and_diffusers_loads_it(world, name, tmp_path, monkeypatch):
    row, _, plain, files, _ = world(name)
    asked = [Prompt(text, extra) for text, extra in zip(TEXTS, extras(row, files), strict=True)]
    prompts = PromptSource(asked, 2, 2, 0)
    policy = policy_of(world, name, FlowGRPO().noise, guidance=2.0)
    weights = {n: p.detach().clone() for n, p in policy.module.named_parameters()}
    for method in (FlowGRPO(steps=3), DiffusionNFT(steps=2, renoise=Renoise(2))):
        before = {n: p.detach().clone() for n, p in policy.module.named_parameters()}
        found = trainer(method, 1, policy=policy, prompts=prompts, reward=Bright(), batch=4, updates=1)
        found.run()
        (metrics,) = found.tracker.metrics.values()
        if isinstance(method, FlowGRPO):
            assert abs(metrics["ratio"] - 1) < 1e-5
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
        expected = theirs(policy, plain, row, files, monkeypatch)
        assert_close(ours, expected, atol=row.close, rtol=row.close)
        with policy._base():
            assert (policy.images(prompts_for(row, files), STEPS, KEY) - ours).abs().max() > 1e-3
    finally:
        row.unload_lora(plain)


def test_every_adapter_has_a_row():
    tested = {name.partition(" ")[0] for name in FAMILIES}
    elsewhere = {"StableDiffusion3Pipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline"}
    assert tested | elsewhere == set(ADAPTERS)
    assert all(Path(path.partition(":")[0].replace(".", "/")).name for path in ADAPTERS.values())
