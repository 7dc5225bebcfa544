"""The lab's video model: trained from nothing, continued exactly, encoded as plain diffusers encodes it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from mmalign.lab.pretrain_video import (
    VideoPretraining,
    draw_clips,
    encode_texts,
    pretrain_video,
    sample_clips,
    scores,
    token_ids,
    video_latents,
)

TINY = VideoPretraining(
    clips=24,
    vae_width=8,
    vae_steps=2,
    vae_frames=1,
    vae_batch=2,
    layers=1,
    heads=1,
    text_width=32,
    flow_steps=2,
    flow_decay=1,
    flow_batch=2,
    save_every=1,
)
PROMPTS = ["a red circle moves left", "a blue star appears"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("video")
    seen = []
    pretrain_video(TINY, out, lambda pipeline, step: seen.append(step))
    assert seen == [1, 2]
    return out


def test_plain_diffusers_loads_and_samples_it(trained):
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(trained / "pipeline")
    clips = sample_clips(pipeline, PROMPTS, 2, 1.0, 0)
    assert clips.shape == (2, 9, 3, 32, 32)
    found = scores(clips, PROMPTS)
    assert all(0 <= found[name] <= 1 for name in ("strict", "soft", "direction", "static"))
    config = json.loads((trained / "pipeline/vae/config.json").read_text())
    assert config["latents_std"] != [1.0] * 8
    assert "_name_or_path" not in config


def test_texts_are_what_the_pipeline_encodes(trained):
    from diffusers import WanPipeline

    pipeline = WanPipeline.from_pretrained(trained / "pipeline")
    ids, mask = token_ids(pipeline.tokenizer, [*PROMPTS, ""], 16)
    ours = encode_texts(pipeline.text_encoder, ids, mask)
    theirs, _ = pipeline.encode_prompt(
        [*PROMPTS, ""], do_classifier_free_guidance=False, max_sequence_length=16
    )
    assert_close(ours, theirs)


def test_latents_are_standardized(trained):
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(trained / "vae")
    clips, _ = draw_clips(24, 0)
    latents = video_latents(vae, clips)
    assert latents.shape == (24, 8, 5, 8, 8)
    assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(8), atol=1e-3, rtol=0)
    assert (latents.std((0, 2, 3, 4)) <= 1.01).all()


@pytest.mark.slow
def test_a_broken_off_run_goes_on_to_the_same_end(trained, tmp_path):
    class Stopped(Exception):
        pass

    def stop(pipeline, step):
        raise Stopped

    with pytest.raises(Stopped):
        pretrain_video(TINY, tmp_path, stop)
    pretrain_video(TINY, tmp_path)
    for part in ("transformer", "text_encoder", "vae"):
        (first,) = (trained / "pipeline" / part).glob("*.safetensors")
        again = load_file(tmp_path / "pipeline" / part / first.name)
        for name, tensor in load_file(first).items():
            assert torch.equal(tensor, again[name]), name


def test_other_settings_are_refused(trained):
    from dataclasses import replace

    with pytest.raises(ValueError, match="begun with other settings of \\['layers'\\]"):
        pretrain_video(replace(TINY, layers=2), trained)
