"""GenEval's rules on scripted boxes, and tiny detectors of transformers behind them."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
import transformers as T
from torch.testing import assert_close

from mmalign.records import Outcome
from mmalign.rewardmodels import load
from mmalign.rewardmodels.detectors import Found, ZeroShot, apart, overlapping
from mmalign.rewardmodels.geneval import GenEval, relations
from mmalign.testing import check_reward, prompts_of

LAB_CLIP = str(Path(__file__).resolve().parents[2] / "assets/lab/clip")


def box(x: float, y: float, size: float = 10.0) -> list[float]:
    return [x - size / 2, y - size / 2, x + size / 2, y + size / 2]


def found(*boxes: list[float], scores: list[float] | None = None) -> Found:
    count = len(boxes)
    return Found(torch.tensor(boxes).reshape(count, 4), torch.tensor(scores or [0.95] * count))


class Scripted:
    """A detector that finds what it is told."""

    sure = 0.9

    def __init__(self, things: dict[str, Found]) -> None:
        self.things = things

    def objection(self, classes) -> None:
        return None

    def __call__(self, image, classes) -> dict[str, Found]:
        nothing = Found(torch.zeros(0, 4), torch.zeros(0))
        return {name: self.things.get(name, nothing) for name in classes}


@pytest.fixture
def reward(monkeypatch):
    """A reward whose detector finds what it is told, and whose colors are those that it is told."""

    def make(
        things: dict[str, Found], colors: dict[tuple[float, ...], str] | None = None, **settings
    ) -> GenEval:
        monkeypatch.setattr(ZeroShot, "__init__", lambda self, *_: None)
        made = load("geneval", clip=LAB_CLIP, **settings)
        made.detects = Scripted(things)
        if colors is not None:
            made._color = lambda image, where, name: colors[tuple(where.tolist())]
        return made

    return make


def judged(made: GenEval, **extra) -> dict:
    outcome = Outcome(prompts_of(["x"], 1, [extra]), torch.rand(1, 3, 64, 64))
    (detail,) = made(outcome).details
    return dict(detail)


def test_an_object_is_there_or_not(reward):
    made = reward({"dog": found(box(20, 20))})
    assert judged(made, include=[{"class": "dog", "count": 1}])["strict"] == 1
    missing = judged(made, include=[{"class": "dog", "count": 1}, {"class": "cat", "count": 1}])
    assert (missing["strict"], missing["soft"]) == (0, 0.5)
    assert missing["wrong"] == ["cat: 0 of 1"]


def test_boxes_count_from_the_threshold_on_and_surer_where_a_number_is_asked_for(reward):
    made = reward({"dog": found(box(20, 20), box(40, 40), scores=[0.95, 0.5])})
    two = [{"class": "dog", "count": 2}]
    assert judged(made, include=two)["strict"] == 1
    surer = judged(made, include=two, category="counting")
    assert (surer["strict"], surer["soft"]) == (0, 0.5)
    assert judged(made, include=two, tag="counting")["soft"] == 0.5  # as GenEval's files call it
    faint = reward({"dog": found(box(20, 20), scores=[0.2])})
    assert judged(faint, include=[{"class": "dog", "count": 1}])["strict"] == 0


def test_too_many_are_wrong_where_they_are_excluded(reward):
    made = reward({"dog": found(box(10, 10), box(30, 30), box(50, 50))})
    asked = {"include": [{"class": "dog", "count": 2}], "exclude": [{"class": "dog", "count": 3}]}
    assert judged(made, **asked)["soft"] == 0.5
    assert judged(made, include=asked["include"])["strict"] == 1


def test_each_box_needs_its_color(reward):
    one, other = box(20, 20), box(44, 44)
    made = reward({"dog": found(one, other)}, {tuple(one): "red", tuple(other): "blue"})
    detail = judged(made, include=[{"class": "dog", "count": 2, "color": "red"}])
    assert detail["strict"] == 0
    assert detail["soft"] == 0.75  # both are there, one is red
    assert detail["wrong"] == ["dog: 1 of 2 red"]


def test_places_are_told_from_the_group_that_is_named(reward):
    things = {"dog": found(box(10, 30)), "cat": found(box(50, 30))}
    include = [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}]
    assert judged(reward(things), include=include)["strict"] == 1
    include[1]["position"] = ["above", 0]
    assert judged(reward(things), include=include)["wrong"] == ["dog: not above cat"]


@pytest.mark.parametrize(
    ("one", "wanted"),
    [
        (box(10, 50), {"left of"}),
        (box(90, 50), {"right of"}),
        (box(50, 10), {"above"}),
        (box(50, 90), {"below"}),
        (box(10, 10), {"left of", "above"}),
        (box(51, 51), set()),  # nearer than a tenth of the sum of their sizes
        (box(90, 60), {"right of"}),
    ],
)
def test_relations_follow_the_published_rule(one, wanted):
    other = box(50, 50)
    assert relations(torch.tensor(one), torch.tensor(other)) == wanted
    dx = math.copysign(max(0, abs(one[0] - other[0]) - 2), one[0] - other[0])  # 0.1 (10 + 10)
    gap = math.hypot(one[0] - other[0], one[1] - other[1])
    assert ("right of" in wanted) == (dx / gap > 0.5)


def test_of_boxes_that_overlap_the_surer_stays():
    boxes = torch.tensor([box(20, 20), box(21, 20), box(50, 50)])
    assert overlapping(boxes[0], boxes[1]) == pytest.approx(90 / 110)
    assert overlapping(boxes[0], boxes[2]) == 0
    assert apart(boxes, torch.tensor([0.5, 0.9, 0.7]), 0.7).tolist() == [1, 2]
    assert apart(boxes, torch.tensor([0.5, 0.9, 0.7]), 0.9).tolist() == [1, 2, 0]


def test_colors_are_those_of_the_crop(reward):
    """The lab's CLIP tells a red half from a blue one."""
    made = reward({"circle": found([0.0, 0.0, 32.0, 64.0])})
    image = torch.full((3, 64, 64), 0.92)
    for left, color in ((8, (0.87, 0.14, 0.14)), (40, (0.16, 0.26, 0.89))):
        image[:, 20:44, left : left + 16] = torch.tensor(color)[:, None, None]
    halves = [torch.tensor([left, 0.0, left + 32, 64.0]) for left in (0.0, 32.0)]
    assert [made._color(image, half, "square") for half in halves] == ["red", "blue"]


def test_a_prompt_that_asks_for_nothing_has_no_verdict(reward):
    made = reward({})
    outcome = Outcome(
        prompts_of(["a", "b"], 1, [{}, {"include": [{"class": "dog"}]}]), torch.rand(2, 3, 64, 64)
    )
    signal = made(outcome)
    assert signal.valid[:, 0].tolist() == [False, True]
    assert "no include" in signal.details[0]["missing"]
    check_reward(made, outcome)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"count": 1}, "needs a class"),
        ({"class": "dog", "count": 0}, "dog: count must be at least 1, got 0"),
        ({"class": "dog", "position": ["beside", 0]}, "dog: position must be one of left of, right of"),
        ({"class": "dog", "position": ["above", 2]}, "got \\['above', 2\\]"),
    ],
)
def test_a_prompt_that_cannot_be_judged_has_no_verdict(reward, wrong, said):
    detail = judged(reward({}), include=[{"class": "cat"}, wrong])
    assert re.search(said, detail["missing"])


# Detectors of transformers


def words_and_end() -> T.PreTrainedTokenizerFast:
    """A token for each word, and after them the highest one, where an owl as a CLIP pools its text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    every = ["<pad>", "<unk>", "a", "photo", "of", "dog", "cat", "<end>"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(every)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", every.index("<end>"))]
    )
    return T.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )


def owl(folder: Path) -> str:
    words = words_and_end()
    text = {"vocab_size": len(words), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "image_size": 32,
        "patch_size": 8,
    }
    heads = {"num_attention_heads": 2}
    config = T.Owlv2Config(
        text_config=text | heads | {"max_position_embeddings": 16},
        vision_config=vision | heads,
        projection_dim=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        T.Owlv2ForObjectDetection(config).save_pretrained(folder)
    T.Owlv2Processor(T.Owlv2ImageProcessor(size={"height": 32, "width": 32}), words).save_pretrained(folder)
    return str(folder)


def test_an_owl_finds_what_the_library_finds(tmp_path):
    folder = owl(tmp_path)
    image = (torch.rand(3, 48, 48, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    least = 0.0
    detector = ZeroShot(folder, "fp32", least, overlap=1.0)
    told = detector(image, ["dog", "cat"])
    processor = T.AutoProcessor.from_pretrained(folder)
    model = T.AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()
    for name in ("dog", "cat"):
        inputs = processor(
            text=[[f"a photo of a {name}"]], images=[(image * 255).byte()], return_tensors="pt"
        )
        with torch.no_grad():
            out = model(**inputs)
        (known,) = processor.post_process_grounded_object_detection(
            out, threshold=0.0, target_sizes=[(48, 48)]
        )
        order = known["scores"].argsort(descending=True, stable=True)[:16]
        assert_close(told[name].scores, known["scores"][order])
        assert_close(told[name].boxes, known["boxes"][order])
    assert len(told["dog"].scores) > 0
    differ = (told["dog"].scores - told["cat"].scores).abs().max()
    assert differ > 5e-4  # it is the class that is found, and not whatever is there


def test_a_model_that_is_no_detector_is_refused():
    with pytest.raises(ValueError, match="geneval: model no/such/folder does not load as a detector"):
        load("geneval", model="no/such/folder", clip=LAB_CLIP)
    for wrong, said in (({"measure": "mean"}, "measure must be"), ({"threshold": 2.0}, "threshold must lie")):
        with pytest.raises(ValueError, match=said):
            load("geneval", model="no/such/folder", clip=LAB_CLIP, **wrong)


def grounding_dino(folder: Path) -> str:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "dog", "cat", "a"]
    swin = T.SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 2],
        window_size=2,
        out_features=["stage2", "stage3", "stage4"],
    )
    bert = T.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    few = {f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("attention_heads", "layers")}
    config = T.GroundingDinoConfig(
        backbone_config=swin, text_config=bert, d_model=32, num_queries=6, max_text_len=32, **few
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        T.GroundingDinoForObjectDetection(config).save_pretrained(folder)
    images = T.GroundingDinoImageProcessor(size={"shortest_edge": 128, "longest_edge": 128})
    tokens = T.BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    T.GroundingDinoProcessor(images, tokens).save_pretrained(folder)
    return str(folder)


def test_a_detector_that_reads_sentences_is_asked_for_one_class_at_a_time(tmp_path):
    folder = grounding_dino(tmp_path)
    image = (torch.rand(3, 48, 48, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    told = ZeroShot(folder, "fp32", 0.0, overlap=1.0)(image, ["dog", "cat"])
    processor = T.AutoProcessor.from_pretrained(folder)
    model = T.AutoModelForZeroShotObjectDetection.from_pretrained(folder).eval()
    for name in ("dog", "cat"):
        inputs = processor(text=[f"{name}."], images=[(image * 255).byte()], return_tensors="pt")
        with torch.no_grad():
            out = model(**inputs)
        scores = out.logits[0].sigmoid().amax(1)  # of each query, the best over the tokens
        middles, sizes = out.pred_boxes[0].split(2, 1)
        boxes = 48 * torch.cat([middles - sizes / 2, middles + sizes / 2], 1)
        order = scores.argsort(descending=True, stable=True)
        assert_close(told[name].scores, scores[order], atol=1e-5, rtol=0)
        assert_close(told[name].boxes, boxes[order], atol=1e-3, rtol=0)
