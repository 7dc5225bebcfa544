"""The shipped model: plain diffusers draws with it, well enough to read and badly enough to be improved."""

import pytest
from runs import ROOT

from mmalign.lab.pretrain_score import score_pipeline
from mmalign.lab.prompts import held_out_prompts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline.from_pretrained(ROOT / "assets/lab/flow")


def test_the_lab_model_leaves_something_to_learn_and_asks_for_guidance(pipeline):
    plain, guided = (score_pipeline(pipeline, held_out_prompts(), 1, 10, g).share() for g in (1.0, 2.5))
    assert 0.15 < plain[0] < 0.35, "strict, without guidance"
    assert 0.25 < guided[0] < 0.60, "strict, with guidance 2.5"
    assert guided[0] > plain[0] + 0.04
    assert guided[1] > plain[1] + 0.04, "soft"
