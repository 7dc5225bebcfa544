"""HPSv2 and ImageReward: weights under their published names against their arithmetic, written anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, interpolate, layer_norm, linear, pad
from torch.testing import assert_close
from transformers import AutoTokenizer, BertTokenizerFast, CLIPModel

from mmalign.lab.clip import CLIP
from mmalign.records import Outcome
from mmalign.rewardmodels import load
from mmalign.rewardmodels.formats import read_open_clip
from mmalign.testing import check_reward, prompts_of

ROOT = Path(__file__).resolve().parents[2]
LAB_CLIP = ROOT / "assets/lab/clip"
PROMPTS = ["a red circle", "two blue stars"]


def outcome(height: int = 64, width: int = 64, seed: int = 0) -> Outcome:
    random = torch.Generator().manual_seed(seed)
    return Outcome(prompts_of(PROMPTS, 1), torch.rand(2, 3, height, width, generator=random))


# HPSv2


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> tuple[str, str]:
    """A CLIP of transformers with other weights, and a file as HPSv2 publishes it: open_clip's names."""
    folder = tmp_path_factory.mktemp("hps")
    network, processor = read_open_clip(str(LAB_CLIP))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(network.config).save_pretrained(folder / "clip")
    processor.save_pretrained(folder / "clip")
    AutoTokenizer.from_pretrained(LAB_CLIP).save_pretrained(folder / "clip")
    from safetensors.torch import load_file

    state = load_file(LAB_CLIP / "open_clip_model.safetensors")
    torch.save({"epoch": 1, "state_dict": state}, folder / "HPS_tiny.pt")
    return str(folder / "clip"), str(folder / "HPS_tiny.pt")


def test_hpsv2_is_the_cosine_of_the_published_weights(published):
    model, weights = published
    judged = outcome()
    found = load("hpsv2", model=model, weights=weights)(judged).values[:, 0]
    clip = CLIP.load(LAB_CLIP)
    with torch.no_grad():
        seen, read = clip.encode_images(judged.media), clip.encode_ids(clip.ids(PROMPTS))
    assert_close(found, (seen * read).sum(1), atol=2e-5, rtol=0)
    assert (found - load("hpsv2", model=model)(judged).values[:, 0]).abs().max() > 1e-2


def test_hpsv2_pads_what_is_not_square_with_black(published):
    model, weights = published
    reward = load("hpsv2", model=model, weights=weights)
    wide = outcome(40, 64)
    square = Outcome(wide.prompts, pad(wide.media, (0, 0, 12, 12)))
    assert_close(reward(wide).values, reward(square).values)


def test_hpsv2_keeps_the_contract_and_has_a_gradient(published):
    model, weights = published
    reward = load("hpsv2", model=model, weights=weights)
    check_reward(reward, outcome())
    media = outcome().media.requires_grad_()
    reward.differentiate(Outcome(outcome().prompts, media)).sum().backward()
    assert media.grad.abs().max() > 0


def test_weights_that_do_not_fit_are_refused(published, tmp_path):
    model, _ = published
    with pytest.raises(ValueError, match="hpsv2: there is no file"):
        load("hpsv2", model=model, weights=str(tmp_path / "none.pt"))
    torch.save({"state_dict": {"logit_scale": torch.tensor(1.0)}}, tmp_path / "part.pt")
    with pytest.raises(ValueError, match=r"part.pt does not fit"):
        load("hpsv2", model=model, weights=str(tmp_path / "part.pt"))
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load("hpsv2", model=model, weights=str(tmp_path / "text.pt"))


# ImageReward

WIDTH, READS, PATCH, SIDE, DEPTH = 64, 128, 16, 32, 2
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "two", "blue", "stars"]


def drawn(random: torch.Generator, *shape: int) -> Tensor:
    return 0.2 * torch.randn(shape, generator=random)


@pytest.fixture(scope="module")
def image_reward(tmp_path_factory) -> tuple[dict[str, Tensor], str, str]:
    """Random weights under the names of BLIP's code, as ImageReward.pt has them; the file, the tokenizer."""
    folder, random = tmp_path_factory.mktemp("ir"), torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def layer(name: str, high: int, low: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = drawn(random, high, low), drawn(random, high)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = 1 + drawn(random, width), drawn(random, width)

    eye = "blip.visual_encoder"
    state[f"{eye}.cls_token"] = drawn(random, 1, 1, WIDTH)
    state[f"{eye}.pos_embed"] = drawn(random, 1, 1 + (SIDE // PATCH) ** 2, WIDTH)
    state[f"{eye}.patch_embed.proj.weight"] = drawn(random, WIDTH, 3, PATCH, PATCH)
    state[f"{eye}.patch_embed.proj.bias"] = drawn(random, WIDTH)
    for i in range(DEPTH):
        at = f"{eye}.blocks.{i}"
        norm(f"{at}.norm1", WIDTH)
        norm(f"{at}.norm2", WIDTH)
        layer(f"{at}.attn.qkv", 3 * WIDTH, WIDTH)
        layer(f"{at}.attn.proj", WIDTH, WIDTH)
        layer(f"{at}.mlp.fc1", 96, WIDTH)
        layer(f"{at}.mlp.fc2", WIDTH, 96)
    norm(f"{eye}.norm", WIDTH)
    text = "blip.text_encoder"
    state[f"{text}.embeddings.position_ids"] = torch.arange(40)[None]
    state[f"{text}.embeddings.word_embeddings.weight"] = drawn(random, len(WORDS), READS)
    state[f"{text}.embeddings.position_embeddings.weight"] = drawn(random, 40, READS)
    norm(f"{text}.embeddings.LayerNorm", READS)
    for i in range(DEPTH):
        at = f"{text}.encoder.layer.{i}"
        for kind, low in (("attention", READS), ("crossattention", WIDTH)):
            layer(f"{at}.{kind}.self.query", READS, READS)
            layer(f"{at}.{kind}.self.key", READS, low)
            layer(f"{at}.{kind}.self.value", READS, low)
            layer(f"{at}.{kind}.output.dense", READS, READS)
            norm(f"{at}.{kind}.output.LayerNorm", READS)
        layer(f"{at}.intermediate.dense", 80, READS)
        layer(f"{at}.output.dense", READS, 80)
        norm(f"{at}.output.LayerNorm", READS)
    for place, (high, low) in {0: (24, READS), 2: (12, 24), 4: (8, 12), 6: (4, 8), 7: (1, 4)}.items():
        layer(f"mlp.layers.{place}", high, low)
    state["blip.vision_proj.weight"] = drawn(random, 4, WIDTH)  # published, and not used
    torch.save(state, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder / "bert")
    return state, str(folder / "ImageReward.pt"), str(folder / "bert")


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads of 64 numbers, one picture and prompt at a time: [t, d], [s, d], [s, d]."""
    parts = []
    for one, other, value in zip(*(x.split(64, 1) for x in (q, k, v)), strict=True):
        parts.append((one @ other.T / 8).softmax(1) @ value)
    return torch.cat(parts, 1)


def original(state: dict[str, Tensor], picture: Tensor, ids: list[int]) -> float:
    """The score of one picture [3, 32, 32] and the words of its prompt, by the equations of BLIP and BERT."""

    def lin(name: str, x: Tensor) -> Tensor:
        return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    eye, text = "blip.visual_encoder", "blip.text_encoder"
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    shown = (picture - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    patches = shown.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 0, 3, 4).flatten(0, 1)
    weight = state[f"{eye}.patch_embed.proj.weight"].flatten(1)
    x = linear(patches.flatten(1), weight, state[f"{eye}.patch_embed.proj.bias"])
    x = torch.cat([state[f"{eye}.cls_token"][0], x]) + state[f"{eye}.pos_embed"][0]
    for i in range(DEPTH):
        at = f"{eye}.blocks.{i}"
        x = x + lin(
            f"{at}.attn.proj", attend(*lin(f"{at}.attn.qkv", norm(f"{at}.norm1", x, 1e-6)).chunk(3, 1))
        )
        x = x + lin(f"{at}.mlp.fc2", gelu(lin(f"{at}.mlp.fc1", norm(f"{at}.norm2", x, 1e-6))))
    seen = norm(f"{eye}.norm", x, 1e-6)
    words = state[f"{text}.embeddings.word_embeddings.weight"][ids]
    y = words + state[f"{text}.embeddings.position_embeddings.weight"][: len(ids)]
    y = norm(f"{text}.embeddings.LayerNorm", y, 1e-12)
    for i in range(DEPTH):
        at = f"{text}.encoder.layer.{i}"
        for kind, source in (("attention", None), ("crossattention", seen)):
            other = y if source is None else source
            own = f"{at}.{kind}.self"
            looked = attend(lin(f"{own}.query", y), lin(f"{own}.key", other), lin(f"{own}.value", other))
            out = lin(f"{at}.{kind}.output.dense", looked)
            y = norm(f"{at}.{kind}.output.LayerNorm", out + y, 1e-12)
        out = lin(f"{at}.output.dense", gelu(lin(f"{at}.intermediate.dense", y)))
        y = norm(f"{at}.output.LayerNorm", out + y, 1e-12)
    z = y[0]
    for place in (0, 2, 4, 6, 7):
        z = lin(f"mlp.layers.{place}", z)
    return float((z - 0.16717362830052426) / 1.0333394966054072)


def test_image_reward_is_the_published_arithmetic(image_reward):
    state, weights, tokenizer = image_reward
    judged = outcome(SIDE, SIDE)
    found = load("image_reward", weights=weights, tokenizer=tokenizer)(judged).values[:, 0]
    for picture, prompt, value in zip(judged.media, PROMPTS, found.tolist(), strict=True):
        ids = [WORDS.index(word) for word in ("[CLS]", *prompt.split(), "[SEP]")]
        assert value == pytest.approx(original(state, picture, ids), abs=1e-4)


def test_image_reward_sees_the_middle_of_what_is_not_square(image_reward):
    _, weights, tokenizer = image_reward
    reward = load("image_reward", weights=weights, tokenizer=tokenizer)
    wide = outcome(64, 128)
    middle = interpolate(wide.media, (32, 64), mode="bicubic", antialias=True).clamp(0, 1)[..., 16:48]
    assert_close(reward(wide).values, reward(Outcome(wide.prompts, middle)).values, atol=1e-5, rtol=0)


def test_image_reward_keeps_the_contract_and_has_a_gradient(image_reward):
    _, weights, tokenizer = image_reward
    reward = load("image_reward", weights=weights, tokenizer=tokenizer, batch=1)
    check_reward(reward, outcome(SIDE, SIDE))
    media = outcome(SIDE, SIDE).media.requires_grad_()
    reward.differentiate(Outcome(outcome().prompts, media)).sum().backward()
    assert media.grad.abs().max() > 0


def test_a_file_that_is_no_image_reward_is_refused(image_reward, tmp_path):
    state, _, tokenizer = image_reward
    lacking = {key: value for key, value in state.items() if "layer.1.intermediate" not in key}
    torch.save(lacking, tmp_path / "part.pt")
    with pytest.raises(
        ValueError, match=r"part.pt is no ImageReward: .*it lacks encoder.layer.1.intermediate"
    ):
        load("image_reward", weights=str(tmp_path / "part.pt"), tokenizer=tokenizer)
