"""The lab's CLIP and vision transformer: their arithmetic, their files, and what trains them."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize
from torch.testing import assert_close

from mmalign.lab import vocabulary
from mmalign.lab.clip import CLIP, END, CLIPSize, Tower, vocabulary_of
from mmalign.lab.pretrain_clip import (
    ClipTraining,
    change_word,
    contrast,
    held_out,
    lab_words,
    train_clip,
    write_tokenizer,
)
from mmalign.lab.pretrain_dino import (
    STUDENT,
    DinoTraining,
    Head,
    balanced,
    crops,
    distill,
    knn_accuracy,
    train_dino,
)
from mmalign.lab.pretrain_loop import keyed
from mmalign.lab.pretrain_styles import StylesTraining, measure_styles, train_styles
from mmalign.lab.prompts import held_out_prompts
from mmalign.lab.vit import ViT, ViTSize

LAB = Path(__file__).resolve().parents[2] / "assets/lab"

TINY = ViTSize(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
SMALL = CLIPSize(32, 8, Tower(16, 2, 2), Tower(16, 1, 2), 24, 8)


def halved(module: nn.Module) -> nn.Module:
    """The module with the weights that fp16 can hold."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.half().float())
    return module


def test_a_block_of_the_transformer_is_torchs_own():
    vit = ViT(TINY).eval()
    block, theirs = (
        vit.blocks[0],
        nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", 1e-6, batch_first=True, norm_first=True),
    )
    with torch.no_grad():
        for name, value in block.state_dict().items():
            if value.ndim == 1:
                block.state_dict()[name].normal_()
    theirs.load_state_dict(
        {
            "self_attn.in_proj_weight": block.attn.qkv.weight,
            "self_attn.in_proj_bias": block.attn.qkv.bias,
            "self_attn.out_proj.weight": block.attn.proj.weight,
            "self_attn.out_proj.bias": block.attn.proj.bias,
            "linear1.weight": block.mlp.fc1.weight,
            "linear1.bias": block.mlp.fc1.bias,
            "linear2.weight": block.mlp.fc2.weight,
            "linear2.bias": block.mlp.fc2.bias,
            "norm1.weight": block.norm1.weight,
            "norm1.bias": block.norm1.bias,
            "norm2.weight": block.norm2.weight,
            "norm2.bias": block.norm2.bias,
        }
    )
    x = torch.randn(3, 5, 16)
    assert_close(block(x), theirs.train()(x), rtol=1e-5, atol=1e-5)


def test_patches_are_in_reading_order_and_know_nothing_of_each_other_before_the_blocks():
    vit = ViT(TINY)
    vit.blocks = nn.Sequential()
    x = torch.zeros(1, 3, 32, 32)
    before = vit(x)[1]
    x[:, :, 8:16, 16:24] = 1  # second row, third column of a grid of four
    changed = (vit(x)[1] != before).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [1 * 4 + 2]


def test_a_smaller_picture_gets_positions_between_those_of_the_larger_one():
    vit = ViT(TINY)
    with torch.no_grad():
        ramp = torch.arange(4.0).repeat(4)  # the column of each place
        vit.pos_embed[0, 1:] = ramp[:, None]
    assert_close(vit.positions(torch.Size((16, 16)))[0, 1:, 0], torch.tensor([0.5, 2.5, 0.5, 2.5]))


def test_a_folder_gives_the_transformer_back(tmp_path: Path):
    vit = halved(ViT(TINY))
    vit.save(tmp_path)
    x = torch.randn(2, 3, 32, 32)
    assert_close(ViT.load(tmp_path)(x), vit(x), rtol=0, atol=0)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        ViT.load(tmp_path / "elsewhere")


def test_timm_reads_the_folder(tmp_path: Path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    vit = halved(ViT(TINY)).eval()
    vit.save(tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    token, patches = vit(x)
    assert_close(theirs.forward_features(x), torch.cat([token[:, None], patches], 1), rtol=1e-4, atol=1e-4)


def a_clip(folder: Path) -> CLIP:
    clip = halved(CLIP(SMALL, vocabulary_of(lab_words()))).eval()
    clip.save(folder)
    write_tokenizer(list(clip.words), SMALL.context, folder)
    return clip


def test_a_folder_gives_clip_back(tmp_path: Path):
    clip = a_clip(tmp_path)
    again = CLIP.load(tmp_path)
    images, texts = torch.rand(2, 3, 32, 32), ["two red circles", 'the word "cat" in blue']
    assert_close(again.encode_images(images), clip.encode_images(images), rtol=0, atol=0)
    assert_close(again.encode_texts(texts), clip.encode_texts(texts), rtol=0, atol=0)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        CLIP.load(tmp_path)


def test_open_clip_reads_the_folder(tmp_path: Path):
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    clip = a_clip(tmp_path)
    theirs, _ = open_clip.create_model_from_pretrained(f"local-dir:{tmp_path}")
    texts, images = held_out_prompts()[:8], torch.rand(2, 3, 32, 32)
    ids = open_clip.get_tokenizer(f"local-dir:{tmp_path}")(texts)
    assert (ids == clip.ids(texts)).all()
    assert_close(theirs.encode_text(ids, normalize=True), clip.encode_texts(texts), rtol=1e-4, atol=1e-5)
    seen = theirs.encode_image((images - 0.5) / 0.5, normalize=True)
    assert_close(seen, clip.encode_images(images), rtol=1e-4, atol=1e-5)


def test_the_saved_tokenizer_cuts_texts_as_clip_does(tmp_path: Path):
    from transformers import AutoTokenizer

    clip = a_clip(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*held_out_prompts(), "a red circle, outlined", "a purple elephant"]
    found = tokenizer(texts, padding="max_length", max_length=24, truncation=True, return_tensors="pt")
    assert (found["input_ids"] == clip.ids(texts)).all()
    assert clip.words[END] == len(clip.words) - 1
    assert set(vocabulary()) <= set(clip.words)


def test_what_follows_the_end_of_a_text_changes_nothing():
    clip = CLIP(SMALL, vocabulary_of(lab_words()))
    ids = clip.ids(["a red circle"])
    longer = ids.clone()
    longer[:, -3:] = clip.words["red"]
    assert_close(clip.encode_ids(longer), clip.encode_ids(ids))


def test_contrast_is_the_cross_entropy_both_ways_and_equal_captions_are_no_mistake():
    seen, read = (normalize(torch.randn(4, 6), dim=-1) for _ in range(2))
    own = torch.eye(4, dtype=torch.bool)
    logits, right = 7 * seen @ read.T, torch.arange(4)
    expected = (cross_entropy(logits, right) + cross_entropy(logits.T, right)) / 2
    assert_close(contrast(seen, read, torch.tensor(7.0), own), expected)
    pair = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    perfect = normalize(torch.tensor([[1.0, 0], [1, 0], [0, 1]]), dim=-1)
    loss = contrast(perfect, perfect, torch.tensor(100.0), pair)
    assert_close(loss, torch.tensor(2 / 3) * torch.tensor(2.0).log())  # the entropy of the two-fold caption


def test_a_changed_word_makes_another_prompt():
    generator = keyed(0, "changed", 0)
    for prompt in held_out_prompts():
        changed = change_word(prompt, generator)
        assert changed != prompt
        assert len(changed.split()) == len(prompt.split())


def test_held_out_pictures_have_different_prompts():
    data = held_out(40, 0)
    bare = [c.removesuffix(f", {s}") for c, s in zip(data.captions, data.styles, strict=True)]
    assert len(set(bare)) == 40


def test_distillation_is_the_cross_entropy_over_pairs_of_views():
    student, target = torch.randn(3, 2, 5), torch.randn(2, 2, 5).softmax(-1)
    terms = []
    for u in range(2):
        terms += [cross_entropy(student[v] / STUDENT, target[u]) for v in range(3) if v != u]
    assert_close(distill(student, target), torch.stack(terms).mean())


def test_the_teacher_uses_all_prototypes_alike_and_keeps_what_is_nearest():
    scores = torch.cat([torch.eye(6), torch.eye(6)]) + torch.tensor(
        [0.5, 0, 0, 0, 0, 0]
    )  # all near the first
    share = balanced(scores, 0.05)
    assert_close(share.sum(1), torch.ones(12))
    assert_close(share.sum(0), torch.full((6,), 2.0), atol=1e-3, rtol=0)
    assert share.argmax(1).tolist() == [*range(6), *range(6)]


def test_a_whole_crop_is_the_picture_and_a_part_lies_inside():
    images = torch.rand(5, 3, 64, 64)
    whole = crops(images, (1.0, 1.0), 64, keyed(0, "crop", 0))
    assert (whole - images).abs().max() < 0.2  # a tenth of gain, and noise of 0.02 in its standard deviation
    inside = torch.zeros(8, 3, 64, 64)
    inside[:, :, 16:48, 16:48] = 1
    part = crops(inside, (0.4, 0.4), 32, keyed(0, "crop", 1))
    assert part.shape == (8, 3, 32, 32)
    assert part.mean() > 0.25


def test_prototypes_are_compared_by_direction():
    head = Head(4, 6)
    scores = head(torch.randn(3, 4))
    assert scores.shape == (3, 6)
    assert scores.abs().max() <= 1 + 1e-6


def test_nearest_neighbors_vote_and_rows_without_a_label_are_left_out():
    base = torch.cat([torch.randn(20, 8) + 6 * torch.eye(8)[i] for i in (0, 1)])
    known = ["a"] * 20 + ["b"] * 20
    test = torch.stack([6 * torch.eye(8)[0], 6 * torch.eye(8)[1], torch.zeros(8)])
    assert knn_accuracy(base, known, test, ["a", "b", ""]) == 100
    assert knn_accuracy(base, known, test, ["b", "a", ""]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("which", ["clip", "dino"])
def test_a_training_that_was_stopped_goes_on_as_if_it_had_not_been(which, tmp_path: Path):
    schedule = {"scenes": 40, "batch": 8, "save_every": 2, "precision": "fp32"}
    if which == "clip":
        config, train = ClipTraining(**schedule, steps=4, size=replace(SMALL, image_size=64)), train_clip
    else:
        config = DinoTraining(**schedule, steps=4, locals=1, prototypes=16, size=replace(TINY, img_size=64))
        train = train_dino
    from mmalign.lab.pretrain_loop import Stage

    train(config, tmp_path / "whole")
    save, stopped = Stage._save, []

    def stop_at_two(stage: Stage, step: int) -> None:
        save(stage, step)
        stopped.append(step)
        if len(stopped) == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "_save", stop_at_two)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "parts")
        train(config, tmp_path / "parts")
    one, other = (
        torch.load(tmp_path / name / f"{which}.pt", weights_only=True) for name in ("whole", "parts")
    )
    assert stopped == [2, 4]
    assert one["step"] == other["step"] == 4
    assert_close(other["modules"], one["modules"], rtol=0, atol=0)
    assert_close(other["average"], one["average"], rtol=0, atol=0)
    losses = [json.loads(row)["loss"] for row in (tmp_path / "whole" / f"{which}.jsonl").open()]
    assert len(losses) == 4
    assert any(a != b for a, b in pairwise(losses))


# The autoencoder of all styles


@pytest.mark.slow
def test_the_shipped_autoencoder_draws_other_styles_and_keeps_plain_latents():
    from diffusers import AutoencoderKL

    first = AutoencoderKL.from_pretrained(LAB / "flow", subfolder="vae").eval()
    vae = AutoencoderKL.from_pretrained(LAB / "styles_vae").float().eval()
    found = measure_styles(vae, first, count=40, seed=5)
    assert found["pastel"] > 90
    assert found["night"] > 90
    assert found["plain"] > 95
    assert found["latents"] < 0.1  # of a deviation of 1
    before = measure_styles(first, first, count=40, seed=5)
    assert before["pastel"] < 20
    assert before["latents"] == 0


@pytest.mark.slow
def test_training_it_writes_an_autoencoder_that_holds_plain_latents(tmp_path):
    from diffusers import AutoencoderKL

    tiny = {"scenes": 32, "steps": 6, "batch": 4, "scored": 12, "save_every": 3}
    config = StylesTraining(start=str(LAB / "flow"), precision="fp32", **tiny)
    found = train_styles(config, tmp_path)
    assert found["latents"] < 0.5
    AutoencoderKL.from_pretrained(tmp_path / "styles_vae")
    rows = [json.loads(line) for line in (tmp_path / "styles.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    assert rows[0]["moved"] == pytest.approx(0, abs=1e-6)  # it begins where it was
    free = train_styles(replace(config, hold=0.0), tmp_path / "free")
    assert free["latents"] > found["latents"]
