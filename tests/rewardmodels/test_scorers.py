"""Scorers with weights, on tiny random networks of the real classes, against their formulas written out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers as T
from PIL import Image
from torch import nn
from torch.nn.functional import cosine_similarity, sigmoid
from torch.testing import assert_close

from mmalign.contracts import DifferentiableReward
from mmalign.pairwise import win_rates
from mmalign.records import Outcome, Prompts
from mmalign.rewardmodels import load
from mmalign.rewardmodels.endpoint import shown
from mmalign.rewardmodels.ocr import OcrAccuracy, accuracy, closest
from mmalign.rewardmodels.precisions import DTYPES
from mmalign.rewardmodels.vlm_score import ArtifactQuestion, VlmPreference, VlmScore, picture_of, preferred
from mmalign.testing import check_reward

sys.path.insert(0, str(Path(__file__).parents[1] / "pipelines"))
import captioners
from captioners import tiny_llava, tokenizer
from test_endpoint import Server, serve, spoke  # noqa: F401  # a fixture

PROMPTS = ["a red cat", "two blue dogs on the left", "a hat"]


def sentences() -> T.PreTrainedTokenizerFast:
    """The words of the captioners, with an end after each text, where a CLIP looks for its meaning."""
    from tokenizers import processors

    words = tokenizer(())
    end = ("<end>", words.eos_token_id)
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[end]
    )
    return words


def save(model, folder: Path, size: int = 16) -> str:
    """A two-tower model as a folder that AutoModel, AutoTokenizer and AutoImageProcessor load."""
    with torch.no_grad():
        model.logit_scale.fill_(1.7)
        if hasattr(model, "logit_bias"):
            model.logit_bias.fill_(-0.4)
    model.save_pretrained(folder)
    sentences().save_pretrained(folder)
    kind = T.SiglipImageProcessor if "Siglip" in type(model).__name__ else T.CLIPImageProcessor
    more = {} if kind is T.SiglipImageProcessor else {"crop_size": {"height": size, "width": size}}
    shape = {"height": size, "width": size} if kind is T.SiglipImageProcessor else {"shortest_edge": size}
    kind(size=shape, **more).save_pretrained(folder)
    return str(folder)


VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
TEXT = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> str:
    """One that finds each of the pictures more like its prompt than not: no cosine is below 0."""
    torch.manual_seed(6)
    config = T.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=24)
    return save(T.CLIPModel(config), tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def siglip(tmp_path_factory) -> str:
    torch.manual_seed(0)
    config = T.SiglipConfig(text_config=TEXT | {"projection_size": 32}, vision_config=VISION)
    return save(T.SiglipModel(config), tmp_path_factory.mktemp("siglip"))


@pytest.fixture
def outcome() -> Outcome:
    media = torch.rand(3, 3, 24, 20, generator=torch.Generator().manual_seed(0))
    return Outcome(Prompts(PROMPTS, torch.arange(3), torch.zeros(3, dtype=torch.int64), [{}] * 3), media)


def embedded(folder: str, outcome: Outcome, pad: str | bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of the plain library, pictures through its own processor."""
    model, words = T.AutoModel.from_pretrained(folder), T.AutoTokenizer.from_pretrained(folder)
    pixels = T.AutoImageProcessor.from_pretrained(folder)(
        images=list(outcome.media), do_rescale=False, return_tensors="pt"
    )["pixel_values"]
    tokens = words(PROMPTS, padding=pad, max_length=12, truncation=True, return_tensors="pt")
    asked = {"input_ids": tokens["input_ids"]}
    if pad is True:
        asked["attention_mask"] = tokens["attention_mask"]
    with torch.no_grad():
        out = model(pixel_values=pixels, **asked)
    return out.image_embeds, out.text_embeds


def test_clip_score_is_hessels_formula(clip, outcome):
    cosine = cosine_similarity(*embedded(clip, outcome))
    found = load("clip_score", model=clip)(outcome).values[:, 0]
    assert_close(found, 2.5 * cosine, atol=2e-3, rtol=0)
    assert found.min() > 0.05  # each of them is the formula's, and none is cut off
    weighed = load("clip_score", model=clip, weight=100.0)(outcome).values[:, 0]
    assert_close(weighed, 40 * found)


def test_clip_score_is_0_where_a_picture_is_unlike_its_prompt(clip, outcome, tmp_path):
    model = T.CLIPModel.from_pretrained(clip)
    with torch.no_grad():
        model.visual_projection.weight.neg_()
    reward = load("clip_score", model=save(model, tmp_path))
    assert cosine_similarity(*embedded(str(tmp_path), outcome)).max() < 0
    assert reward(outcome).values[:, 0].tolist() == [0.0] * 3
    media = outcome.media.clone().requires_grad_()
    reward.differentiate(Outcome(outcome.prompts, media)).sum().backward()
    assert not media.grad.any()


def test_pickscore_is_the_temperature_times_the_cosine(clip, outcome):
    cosine = cosine_similarity(*embedded(clip, outcome))
    found = load("pickscore", model=clip, processor=None)(outcome).values[:, 0]
    torch.testing.assert_close(found, torch.tensor(1.7).exp() * cosine, atol=5e-3, rtol=0)


def test_siglip_is_a_probability_of_the_pair(siglip, outcome):
    cosine = cosine_similarity(*embedded(siglip, outcome, "max_length"))
    found = load("siglip", model=siglip)(outcome).values[:, 0]
    torch.testing.assert_close(found, sigmoid(torch.tensor(1.7).exp() * cosine - 0.4), atol=2e-3, rtol=0)


def test_a_clip_is_no_siglip(clip, outcome):
    with pytest.raises(ValueError, match="no bias of its logits"):
        load("siglip", model=clip)(outcome)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("deep", [False, True])
def test_the_aesthetic_score_is_a_head_on_the_normalized_embedding(clip, outcome, tmp_path, deep, ending):
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(24, 8), nn.Dropout(0.2), nn.Linear(8, 1)) if deep else nn.Linear(24, 1)
    state = {f"layers.{name}" if deep else name: value for name, value in layers.state_dict().items()}
    file = tmp_path / f"head.{ending}"
    if ending == "pth":
        torch.save(state, file)
    else:
        from safetensors.torch import save_file

        save_file(state, file)
    images, _ = embedded(clip, outcome)
    wanted = layers.eval()(images / images.norm(dim=1, keepdim=True))[:, 0].detach()
    found = load("aesthetic", model=clip, head=str(file))(outcome).values[:, 0]
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=0)


def test_a_head_of_another_clip_is_refused(clip, tmp_path):
    torch.save(nn.Linear(7, 1).state_dict(), tmp_path / "head.pth")
    with pytest.raises(ValueError, match="takes 7 numbers and is given 24"):
        load("aesthetic", model=clip, head=str(tmp_path / "head.pth"))
    with pytest.raises(ValueError, match="there is no file"):
        load("aesthetic", model=clip, head=str(tmp_path / "none.pth"))


def test_dino_similarity_is_the_cosine_of_the_library(tmp_path):
    """Pictures of the published preprocessing: bicubic, by the mean and deviation of ImageNet."""
    small = {k: v for k, v in VISION.items() if k != "intermediate_size"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = T.Dinov2Model(T.Dinov2Config(**small, mlp_ratio=2, initializer_range=0.2)).eval()
    model.save_pretrained(tmp_path / "dino")
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    crop = {"height": 16, "width": 16}
    prepare = T.BitImageProcessor(
        size={"shortest_edge": 16}, crop_size=crop, resample=3, image_mean=mean, image_std=std
    )
    prepare.save_pretrained(tmp_path / "dino")
    random = torch.Generator().manual_seed(0)
    media, others = (torch.rand(2, 3, 3, 24, 24, generator=random) * 255).round() / 255
    others[1] = media[1].flip(-1)
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for file, picture in zip(files, others, strict=True):
        picture_of(picture).save(file)
    extra = [{"reference_image": str(file)} for file in files]
    shown = Outcome(Prompts(PROMPTS, torch.arange(3), torch.zeros(3, dtype=torch.int64), extra), media)
    found = load("dino_similarity", model=str(tmp_path / "dino"))(shown).values[:, 0]
    every = [*map(picture_of, media), *map(Image.open, files)]
    with torch.no_grad():
        seen = model(**prepare(every, return_tensors="pt")).pooler_output
    wanted = cosine_similarity(seen[:3], seen[3:])
    assert_close(found, wanted, atol=5e-3, rtol=0)
    assert (wanted[:, None] - wanted)[~torch.eye(3, dtype=torch.bool)].abs().min() > 2e-2


def test_dino_similarity_compares_with_the_reference_of_the_prompt(tmp_path, outcome):
    torch.manual_seed(0)
    model = T.Dinov2Model(T.Dinov2Config(**{k: v for k, v in VISION.items() if k != "intermediate_size"}))
    model.save_pretrained(tmp_path / "dino")
    picture_of(outcome.media[0]).save(tmp_path / "same.png")
    Image.new("RGB", (20, 24), (255, 0, 0)).save(tmp_path / "other.png")
    files = [str(tmp_path / name) for name in ("same.png", "other.png", "same.png")]
    prompts = Prompts(
        PROMPTS, torch.arange(3), torch.zeros(3, dtype=torch.int64), [{"reference_image": f} for f in files]
    )
    reward = load("dino_similarity", model=str(tmp_path / "dino"))
    found = reward(Outcome(prompts, outcome.media)).values[:, 0]
    assert found[0] > 0.999
    assert found[1] < 0.9
    assert found[2] < 0.999  # another picture than its reference
    several = [{"reference_image": files}] * 3
    for extra in ([{}] * 3, several):
        with pytest.raises(ValueError, match='names no "reference_image", one file'):
            reward(Outcome(Prompts(PROMPTS, prompts.group, prompts.member, extra), outcome.media))


@pytest.mark.parametrize("name", ["clip_score", "pickscore", "sharpness"])
def test_gradients_reach_the_pixels(name, clip, outcome):
    settings = {"sharpness": {}, "pickscore": {"processor": None, "model": clip}}.get(name, {"model": clip})
    reward = load(name, **settings)
    assert isinstance(reward, DifferentiableReward)
    media = outcome.media.clone().requires_grad_()
    values = reward.differentiate(Outcome(outcome.prompts, media))
    torch.testing.assert_close(values.detach(), reward(outcome).values[:, 0])
    values.sum().backward()
    assert values.min() > 0  # nothing is cut off, so that each picture has a slope
    assert media.grad.flatten(1).abs().amax(1).min() > 0


def test_they_are_rewards_like_any_other(clip, siglip, outcome):
    for reward in (load("clip_score", model=clip), load("siglip", model=siglip), load("sharpness")):
        check_reward(reward, outcome)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": "/nowhere/at/all"}, "does not load"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"batch": 0}, "batch must be at least 1"),
    ],
)
def test_what_cannot_be_loaded_is_named(clip, settings, said):
    with pytest.raises(ValueError, match=said):
        load("clip_score", **({"model": clip} | settings))


# Language models


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> str:
    return str(tiny_llava(tmp_path_factory.mktemp("llava")))


def test_vqa_score_is_yes_against_no(llava, outcome):
    reward = load("vqa_score", model=llava, yes=("dog",), no=("cat",), question="describe the picture {}")
    found = reward(outcome).values[:, 0]
    processor = T.AutoProcessor.from_pretrained(llava)
    model = T.AutoModelForImageTextToText.from_pretrained(llava)
    for image, prompt, value in zip(outcome.media, PROMPTS, found, strict=True):
        content = [
            {"type": "image", "image": picture_of(image)},
            {"type": "text", "text": f"describe the picture {prompt}"},
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.no_grad():
            p = model(**inputs).logits[0, -1].softmax(0)
        yes, no = (p[processor.tokenizer.convert_tokens_to_ids(word)] for word in ("dog", "cat"))
        assert value == pytest.approx(float(yes / (yes + no)), abs=1e-5)


def test_the_artifact_question_is_no_against_yes_and_says_the_same_twice(tmp_path, monkeypatch, outcome):
    monkeypatch.setattr(captioners, "WORDS", [*captioners.WORDS, "yes", "no"])
    model = str(tiny_llava(tmp_path / "llava"))
    twice = Outcome(outcome.prompts, outcome.media[[0, 1, 0]])
    found = load("artifact_question", model=model)(twice).values[:, 0]
    yes = load("vqa_score", model=model, question=ArtifactQuestion.question + "{}")
    empty = Prompts([""] * 3, outcome.prompts.group, outcome.prompts.member, outcome.prompts.extra)
    assert_close(found, 1 - yes(Outcome(empty, twice.media)).values[:, 0])
    assert found.min() >= 0
    assert found.max() <= 1
    assert found[0] == found[2] != found[1]


# Of each score by a cosine, or by a probability, where it is steepest: what a rounding is multiplied by.
SLOPES = {
    "clip_score": 2.5,
    "pickscore": 5.5,
    "siglip": 1.4,
    "hpsv2": 1.0,
    "aesthetic": 1.0,
    "vqa_score": 1.0,
}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", SLOPES)
def test_half_precision_gives_nearly_the_same(name, precision, clip, siglip, llava, outcome, tmp_path):
    settings = {"siglip": {"model": siglip}, "pickscore": {"model": clip, "processor": None}}.get(
        name, {"model": clip}
    )
    if name == "aesthetic":
        head = nn.Linear(24, 1)
        head.load_state_dict({"weight": torch.ones(1, 24) / 24**0.5, "bias": torch.zeros(1)})
        torch.save(head.state_dict(), tmp_path / "head.pth")
        settings["head"] = str(tmp_path / "head.pth")
    if name == "vqa_score":
        words = {"yes": ("dog",), "no": ("cat",), "question": "describe the picture {}"}
        settings = {"model": llava, **words}
    full, half = (load(name, **settings, precision=p)(outcome).values for p in ("fp32", precision))
    assert half.dtype == torch.float32
    eps = torch.finfo(DTYPES[precision]).eps
    assert_close(half, full, atol=2 * SLOPES[name] * eps, rtol=0)
    assert (half - full).abs().max() > eps / 20  # the network did compute in it


def test_words_that_are_no_token_are_refused(llava):
    with pytest.raises(ValueError, match="has no token for yes"):
        load("vqa_score", model=llava)
    with pytest.raises(ValueError, match="must hold"):
        load("vqa_score", model=llava, question="yes?")


def test_a_judge_behind_an_endpoint_gives_numbers_in_its_range(serve, outcome):  # noqa: F811
    said = ["Fine. Final score: 4", "Final Score: 9", "no idea"]

    def answer(number, body):
        text = body["messages"][0]["content"][1]["text"]
        return spoke(said[next(i for i, prompt in enumerate(PROMPTS) if f'"{prompt}"' in text)])

    signal = VlmScore(serve(answer).url, "judge")(outcome)
    assert signal.values[0, 0] == 4
    assert signal.valid[:, 0].tolist() == [True, False, False]


def test_a_judge_of_pairs_is_asked_in_both_orders(serve, outcome):  # noqa: F811
    server = serve(lambda number, body: spoke("The first. Better: first"))
    prompts = Prompts(["a hat"] * 3, torch.zeros(3, dtype=torch.int64), torch.arange(3), [{}] * 3)
    judge = VlmPreference(server.url, "judge")
    assert judge.prefer(prompts, outcome.media, outcome.media).tolist() == [1.0, 1.0, 1.0]
    signal, _ = win_rates(judge, Outcome(prompts, outcome.media))
    assert signal.values[:, 0].tolist() == [0.5, 0.5, 0.5]  # whoever comes first is preferred: no preference
    server = serve(lambda number, body: spoke("I cannot say"))
    assert VlmPreference(server.url, "judge").prefer(prompts, outcome.media, outcome.media).isnan().all()


@pytest.mark.parametrize(
    ("answer", "share"),
    [
        ("The hat is red. Better: first", 1.0),
        ("**Better:** Second.", 0.0),
        ("Better:\ntie", 0.5),
        ("At first sight: Better: first\nLooked at again, Better: second", 0.0),
        ("Image 1 is better.", 1.0),
        ("The second is blurred.\n\n**Image 1** is better overall", 1.0),
        ("Both are sharp. In conclusion, Image 2 is better.", 0.0),
        ("Color: Image 1 is better.\nDetail: Image 1 is better.\nConclusion: Image 2 is better.", 0.0),
        ("<think>Image 1 is better. No, it lacks a hat.</think><answer>Image 2 is better</answer>", 0.0),
        ("Both images are equally good.", 0.5),
    ],
)
def test_a_verdict_is_read_as_it_was_asked_for_or_as_unified_reward_says_it(answer, share):
    assert preferred(answer) == share


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "Better: first or second",
        "Better: first, Better: second, or Better: tie",  # the question said again
        "Image 1 is better. Image 2 is better.",
        "Image 1 is better. Better: second",
        "I cannot say whether Image 1 is better.",
        "Image 1 is better in color, and in detail Image 2 is better.",
        "Color: Image 1 is better.",
        "Image 1 is not better.",
        "Image 12 is better.",
        "<think>Image 1 is better. Better: first",  # cut off before it answered
    ],
)
def test_an_ambiguous_answer_is_no_verdict(answer):
    assert preferred(answer) != preferred(answer)


def test_a_judge_of_pairs_may_answer_as_unified_reward_does(serve):  # noqa: F811
    """Whichever place the red picture has, it is the better one."""
    media = torch.zeros(2, 3, 8, 8)
    media[0, 0] = 1
    red = shown(picture_of(media[0]))

    def answer(number, body):
        return spoke(f"Image {body['messages'][0]['content'].index(red) + 1} is better.")

    prompts = Prompts(["a hat"] * 2, torch.zeros(2, dtype=torch.int64), torch.arange(2), [{}] * 2)
    judge = VlmPreference(serve(answer).url, "judge")
    assert judge.prefer(prompts, media, media.flip(0)).tolist() == [1.0, 0.0]
    signal, _ = win_rates(judge, Outcome(prompts, media))
    assert signal.values[0, 0] > signal.values[1, 0]


# Writing in pictures


@pytest.mark.parametrize(
    ("found", "wanted", "value"),
    [
        ("HELLO", "hello", 1.0),
        ("say hel lo now", "Hello!", 1.0),
        ("hallo", "hello", 0.8),
        ("", "hello", 0.0),
        ("xyz", "hello", 0.0),
        ("he", "hello", 0.4),
    ],
)
def test_accuracy_counts_edits_by_length(found, wanted, value):
    assert accuracy(found, wanted) == pytest.approx(value)


def test_the_closest_part_is_that_of_all_parts():
    def distance(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b[1:]) + (a[0] != b[0]), distance(a[1:], b) + 1, distance(a, b[1:]) + 1)

    for wanted, found in (("abc", "xabdy"), ("ab", "ba"), ("aab", "ab"), ("abc", "")):
        parts = {found[i:j] for i in range(len(found) + 1) for j in range(i, len(found) + 1)}
        assert closest(wanted, found) == min(distance(wanted, part) for part in parts)


def reads_cat(image: torch.Tensor) -> str:
    """A reader of one's own; small pictures reach it enlarged."""
    assert min(image.shape[-2:]) >= 256
    return "cat"


def test_a_prompt_that_quotes_nothing_has_no_verdict(outcome):
    signal = OcrAccuracy(reader="test_scorers:reads_cat")(outcome)
    assert not signal.valid.any()
    prompts = Prompts(['a sign "cat"'] * 3, torch.arange(3), torch.zeros(3, dtype=torch.int64), [{}] * 3)
    signal = OcrAccuracy(reader="test_scorers:reads_cat")(Outcome(prompts, outcome.media))
    assert signal.values[:, 0].tolist() == [1.0] * 3
    with pytest.raises(ValueError, match="reader must be a path"):
        OcrAccuracy(reader="test_scorers:nothing")


@pytest.mark.slow
def test_real_writing_is_read():
    pytest.importorskip("rapidocr_onnxruntime", reason="pip install 'mmalign[ocr]'")
    from PIL import ImageDraw, ImageFont

    sheet = Image.new("RGB", (320, 100), "white")
    ImageDraw.Draw(sheet).text((20, 20), "MORNING", "black", ImageFont.load_default(48))
    pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8).reshape(100, 320, 3)
    media = (pixels.permute(2, 0, 1).float() / 255)[None].expand(2, -1, -1, -1)
    prompts = Prompts(
        ['a sign that says "Morning"', 'a sign that says "Evening"'],
        torch.arange(2),
        torch.zeros(2, dtype=torch.int64),
        [{}] * 2,
    )
    right, wrong = load("ocr")(Outcome(prompts, media)).values[:, 0].tolist()
    assert right > 0.8
    assert wrong < 0.6
