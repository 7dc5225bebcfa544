"""HPSv3 and VideoAlign on a tiny Qwen2-VL with random weights, under the names of the published files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from safetensors.torch import save_file
from torch import Tensor

from mmalign.records import Outcome, Unit
from mmalign.rewardmodels import load
from mmalign.rewardmodels.vlm_head import VIDEO_SCORES, VIDEO_TOKENS, merged, plain_names
from mmalign.testing import check_reward, prompts_of

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
from captioners import tiny_captioner

PROMPTS = ["a red dog", "two cats"]
HIDDEN = 32
MEANS, STDS = (3.6757, 1.1646, 2.8105), (2.2476, 1.3811, 2.5121)  # of the published configuration


def old_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As transformers named them when these weights were published."""
    return {
        key.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value.clone()
        for key, value in state.items()
    }


class Tiny:
    """A base model on disk, and what training has made of it: tokens, weights, a head."""

    def __init__(self, folder: Path, tokens: list[str], head: dict[str, Tensor]) -> None:
        self.base, self.tokens, self.head = str(tiny_captioner("Qwen2VL", folder / "base")), tokens, head
        self.processor = T.AutoProcessor.from_pretrained(self.base)
        self.processor.tokenizer.add_special_tokens({"additional_special_tokens": tokens})
        self.processor.tokenizer.padding_side = "right"
        self.model = T.Qwen2VLForConditionalGeneration.from_pretrained(self.base).eval()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.model.resize_token_embeddings(len(self.processor.tokenizer), mean_resizing=False)
            for parameter in self.model.parameters():  # training has moved all of it
                parameter.data += 0.05 * torch.randn_like(parameter)
        self.ids = self.processor.tokenizer.convert_tokens_to_ids(tokens)
        self.template = folder / "instruction.txt"
        self.template.write_text("describe the picture {text_prompt} " + " ".join(tokens))

    def state(self) -> dict[str, Tensor]:
        return old_names(self.model.state_dict()) | self.head

    def hidden(self, media: dict[str, Any], prompt: str) -> Tensor:
        """Last states at the reward tokens of one question, [tokens, 32]."""
        kind = "image" if "images" in media else "video"
        text = "describe the picture " + prompt + " " + " ".join(self.tokens)
        content = [{"type": kind}, {"type": "text", "text": text}]
        told = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        inputs = self.processor(text=[told], return_tensors="pt", **media)
        with torch.no_grad():
            last = self.model.model(**inputs).last_hidden_state[0]
        return torch.stack([last[inputs["input_ids"][0].tolist().index(token)] for token in self.ids])


def drawn(*shape: int, seed: int) -> Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def hps(tmp_path_factory) -> tuple[Tiny, str]:
    head = {
        **{"rm_head.0.weight": drawn(24, HIDDEN, seed=1), "rm_head.0.bias": drawn(24, seed=2)},
        **{"rm_head.3.weight": drawn(16, 24, seed=3), "rm_head.3.bias": drawn(16, seed=4)},
        **{"rm_head.5.weight": drawn(2, 16, seed=5), "rm_head.5.bias": drawn(2, seed=6)},
    }
    folder = tmp_path_factory.mktemp("hps")
    tiny = Tiny(folder, ["<|Reward|>"], head)
    save_file(tiny.state(), folder / "HPSv3.safetensors")
    return tiny, str(folder / "HPSv3.safetensors")


@pytest.fixture(scope="module")
def aligned(tmp_path_factory) -> tuple[Tiny, str]:
    folder = tmp_path_factory.mktemp("aligned")
    tiny = Tiny(folder, list(VIDEO_TOKENS), {"rm_head.weight": drawn(1, HIDDEN, seed=1)})
    torch.save(tiny.state(), folder / "model.pth")
    return tiny, str(folder / "model.pth")


def pictures(seed: int = 0) -> Outcome:
    media = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return Outcome(prompts_of(PROMPTS, 1), (media * 255).round() / 255)


def videos(length: int = 4) -> Outcome:
    media = torch.rand(2, length, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return Outcome(prompts_of(PROMPTS, 1), (media * 255).round() / 255)


def test_hpsv3_is_the_mean_of_the_published_head(hps):
    tiny, weights = hps
    judged = pictures()
    reward = load("hpsv3", model=tiny.base, weights=weights, template=str(tiny.template), pixels=32 * 32)
    found = reward(judged).values[:, 0].tolist()
    for image, prompt, value in zip(judged.media, PROMPTS, found, strict=True):
        x = tiny.hidden({"images": [(image * 255).byte()]}, prompt)[0]
        for place in (0, 3):
            x = (tiny.head[f"rm_head.{place}.weight"] @ x + tiny.head[f"rm_head.{place}.bias"]).relu()
        mean, _ = tiny.head["rm_head.5.weight"] @ x + tiny.head["rm_head.5.bias"]
        assert value == pytest.approx(float(mean), abs=1e-4)
    check_reward(reward, judged)


def test_every_picture_is_brought_to_one_number_of_pixels(hps):
    tiny, weights = hps
    settings = {"model": tiny.base, "weights": weights, "template": str(tiny.template)}
    reward = load("hpsv3", **settings, pixels=32 * 32)
    larger = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    resized = torch.nn.functional.interpolate(larger, (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    assert reward._judge.size(64, 64, 32 * 32) == (32, 32)
    assert reward._judge.size(64, 16, 32 * 32) == (64, 16)
    small, large = (reward(Outcome(pictures().prompts, media)).values for media in (resized, larger))
    assert torch.allclose(small, large, atol=1e-5)


def test_videoalign_standardizes_the_three_scores(aligned):
    tiny, weights = aligned
    judged = videos()
    settings = {"model": tiny.base, "weights": weights, "template": str(tiny.template)}
    found = load("videoalign", **settings, grain="criterion")(judged)
    assert found.unit is Unit.CRITERION
    for video, prompt, row, told in zip(judged.media, PROMPTS, found.values, found.details, strict=True):
        media = {"videos": [[*(video * 255).byte()]], "do_sample_frames": False}
        raw = tiny.hidden(media, prompt) @ tiny.head["rm_head.weight"][0]
        wanted = [(float(x) - m) / s for x, m, s in zip(raw, MEANS, STDS, strict=True)]
        assert row.tolist() == pytest.approx(wanted, abs=1e-4)
        assert [told[name] for name in VIDEO_SCORES] == pytest.approx(wanted, abs=1e-4)
    total = load("videoalign", **settings)(judged)
    assert total.values[:, 0].tolist() == pytest.approx(found.values.sum(1).tolist(), abs=1e-4)


def test_frames_are_chosen_evenly_and_in_pairs(aligned):
    tiny, weights = aligned
    settings = {"model": tiny.base, "weights": weights, "template": str(tiny.template)}
    reward = load("videoalign", **settings, frames=4)
    long = videos(10)
    few = Outcome(long.prompts, long.media[:, [0, 3, 6, 9]])
    assert torch.allclose(reward(long).values, reward(few).values, atol=1e-5)
    odd = videos(3)
    even = Outcome(odd.prompts, odd.media[:, [0, 1, 2, 2]])
    assert torch.allclose(reward(odd).values, reward(even).values, atol=1e-5)


def test_adapters_in_the_weights_are_merged():
    base, low, high = drawn(6, 4, seed=1), drawn(2, 4, seed=2), drawn(6, 2, seed=3)
    at = "base_model.model.model.layers.0.self_attn.q_proj"
    state = {
        f"{at}.base_layer.weight": base,
        f"{at}.lora_A.default.weight": low,
        f"{at}.lora_B.default.weight": high,
        "base_model.model.visual.norm.weight": base[0],
        "base_model.model.rm_head.modules_to_save.default.weight": low,
        "base_model.model.rm_head.original_module.weight": low + 1,
    }
    found = plain_names(merged("videoalign", state, alpha=8.0))
    assert found.keys() == {
        "model.language_model.layers.0.self_attn.q_proj.weight",
        "model.visual.norm.weight",
        "rm_head.weight",
    }
    merged_weight = found["model.language_model.layers.0.self_attn.q_proj.weight"]
    assert torch.allclose(merged_weight, base + 4 * high @ low)
    assert torch.equal(found["rm_head.weight"], low)
    with pytest.raises(ValueError, match="videoalign: the weights hold adapters; give their lora_alpha"):
        merged("videoalign", state, alpha=None)


def test_what_cannot_be_is_refused_with_its_mend(hps, tmp_path):
    tiny, weights = hps
    settings = {"model": tiny.base, "weights": weights, "template": str(tiny.template)}
    with pytest.raises(ValueError, match=r"hpsv3: there is no template nowhere.txt"):
        load("hpsv3", **settings | {"template": "nowhere.txt"})
    (tmp_path / "bad.txt").write_text("{text_prompt} and no token")
    with pytest.raises(ValueError, match=r"must hold <\|Reward\|> once"):
        load("hpsv3", **settings | {"template": str(tmp_path / "bad.txt")})
    headless = {key: value for key, value in tiny.state().items() if not key.startswith("rm_head")}
    save_file(headless, tmp_path / "headless.safetensors")
    with pytest.raises(ValueError, match="holds no rm_head"):
        load("hpsv3", **settings | {"weights": str(tmp_path / "headless.safetensors")})
    partial = {key: value for key, value in tiny.state().items() if "layers.1." not in key}
    save_file(partial, tmp_path / "partial.safetensors")
    with pytest.raises(ValueError, match="does not fit"):
        load("hpsv3", **settings | {"weights": str(tmp_path / "partial.safetensors")})
    with pytest.raises(ValueError, match="videoalign: batch must be at least 1 and frames even, got 4, 3"):
        load("videoalign", **settings, frames=3)
