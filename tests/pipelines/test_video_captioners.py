"""Captioners that read videos: frames chosen evenly, texts and log-probabilities those of transformers."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from captioners import clip, pictures, tiny_captioner, tiny_llava
from PIL import Image
from test_captioner import KEY, assert_same_learning, gradients, policy_of, stir
from torch.testing import assert_close

from mmalign.contracts import TextSettings
from mmalign.data import PromptError, read_prompts
from mmalign.evaluation import described
from mmalign.pictures import Clip, frames_of
from mmalign.pipelines.videos import evenly, open_video
from mmalign.records import Plan, Prompts

pytest.importorskip("num2words")  # of SmolVLM's processor
GREEDY = TextSettings(max_tokens=8, temperature=1e-4)
READ = {  # family -> the part that sees
    "Qwen2VL": "model.visual",
    "Qwen2_5_VL": "model.visual",
    "Qwen3VL": "model.visual",
    "SmolVLM": "model.vision_model",
    "LlavaOnevision": "model.vision_tower",
    "InternVL": "model.vision_tower",
}
WRITTEN = ("input_ids", "attention_mask", "mm_token_type_ids")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[Clip]:
    folder = tmp_path_factory.mktemp("clips")
    return [
        Clip(str(Path(clip(folder / name, tone=tone)[0]).parent)) for name, tone in (("a", 0), ("b", 200))
    ]


@pytest.fixture(scope="module", params=READ)
def family(request, tmp_path_factory) -> tuple[str, Path]:
    return request.param, tiny_captioner(request.param, tmp_path_factory.mktemp(request.param))


def asked(clips: list[Clip], members: int = 3) -> Prompts:
    group = torch.arange(len(clips)).repeat_interleave(members)
    return Prompts(
        [("describe the picture", "two")[int(g) % 2] for g in group],
        group,
        torch.arange(members).repeat(len(clips)),
        [{"video": clips[int(g)].place} for g in group],
    )


def read(policy: Any, question: str, place: str) -> dict[str, Any]:
    """What the processor itself makes of frames 1, 3, 6 and 8 of ten, by its own chat template."""
    frames = [Image.open(f"{place}/frame_{i}.png") for i in (1, 3, 6, 8)]
    about = {"total_num_frames": 10, "fps": 24.0, "frames_indices": [1, 3, 6, 8], "duration": 10 / 24}
    processor = policy.adapter.processor
    content = [{"type": "video"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    found = processor(
        text=text, videos=[frames], video_metadata=[about], do_sample_frames=False, return_tensors="pt"
    )
    return {name: part for name, part in found.items() if name != "video_metadata"}


def test_its_texts_are_those_of_generate(family, clips):
    policy, prompts = policy_of(family[1], GREEDY, frames=4), asked(clips, 1)
    said = policy.texts(prompts, KEY)
    for text, question, extra in zip(said, prompts.text, prompts.extra, strict=True):
        inputs = read(policy, question, str(extra["video"]))
        banned = [[int(token)] for token in policy.adapter.banned]
        ids = policy.module.generate(**inputs, max_new_tokens=8, do_sample=False, bad_words_ids=banned)
        new = ids[0, inputs["input_ids"].shape[1] :]
        assert text == policy.adapter.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_its_log_probabilities_are_those_of_one_plain_forward(family, clips):
    policy = policy_of(family[1], TextSettings(max_tokens=8), frames=4)
    stir(policy)
    prompts = asked(clips, 2)
    trajectory = policy.sample(prompts, Plan(1), KEY)
    for row in range(len(trajectory)):
        token = trajectory.replay["token"][row, : int(trajectory.mask[row].sum())][None]
        inputs = read(policy, prompts.text[row], str(prompts.extra[row]["video"]))
        length = inputs["input_ids"].shape[1]
        for part in [part for part in WRITTEN if part in inputs]:
            more = token if part == "input_ids" else torch.full_like(token, int(part == "attention_mask"))
            inputs[part] = torch.cat([inputs[part], more], 1)
        with torch.no_grad():
            logits = policy.module(**inputs).logits[0, length - 1 : -1]
        logits[:, list(policy.adapter.banned)] = -torch.inf
        wanted = logits.log_softmax(-1).gather(1, token[0][:, None])[:, 0]
        assert_close(trajectory.log_prob[row, : token.shape[1]], wanted, atol=2e-5, rtol=0)


def test_a_group_is_read_once_with_the_same_gradient(family, clips):
    name, folder = family
    shared, apart = (
        policy_of(folder, TextSettings(max_tokens=8, share_prefix=share), frames=4) for share in (True, False)
    )
    stir(shared)
    stir(apart)
    trajectory = shared.sample(asked(clips), Plan(1), KEY)
    calls: list[int] = []
    shared.module.get_submodule(READ[name]).register_forward_hook(lambda *_: calls.append(1))
    gradients(shared, trajectory, 6)
    assert len(calls) == 1
    assert_same_learning(shared, apart, trajectory)


def test_it_sees_its_video(family, clips):
    policy = policy_of(family[1], frames=4)
    policy.check(asked(clips))
    assert policy.texts(asked(clips, 4), KEY) != policy.texts(asked(clips[::-1], 4), KEY)


def test_pictures_and_videos_stand_in_one_batch(clips, tmp_path):
    policy = policy_of(tiny_captioner("Qwen2_5_VL", tmp_path), frames=4)
    files = pictures(tmp_path / "pictures", 2)
    both = Prompts(
        ["two", "two"],
        torch.tensor([0, 1]),
        torch.tensor([0, 0]),
        [{"video": clips[0].place}, {"image": files[0]}],
    )
    together = policy.sample(both, Plan(1), KEY)
    for row in range(2):
        alone = policy.sample(both.take(torch.tensor([row])), Plan(1), KEY)
        assert alone.outcome.media == together.outcome.media[row : row + 1]
        assert_close(alone.log_prob[0], together.log_prob[row], atol=2e-5, rtol=0)


def test_git_of_several_frames_reads_a_video(clips, tmp_path):
    policy = policy_of(tiny_captioner("GITVideo", tmp_path), GREEDY, frames=4)
    prompts = asked(clips, 1)
    said = policy.texts(prompts, KEY)
    processor = policy.adapter.processor
    for text, question, extra in zip(said, prompts.text, prompts.extra, strict=True):
        frames = [Image.open(f"{extra['video']}/frame_{i}.png") for i in (1, 3, 6, 8)]
        pixels = processor(images=frames, return_tensors="pt")["pixel_values"][None]
        words = processor.tokenizer(question, add_special_tokens=False)["input_ids"]
        words = torch.tensor([[processor.tokenizer.cls_token_id, *words]])
        banned = [[int(token)] for token in policy.adapter.banned]
        ids = policy.module.generate(
            pixel_values=pixels, input_ids=words, max_new_tokens=8, do_sample=False, bad_words_ids=banned
        )
        new = ids[0, words.shape[1] :]
        assert text == policy.adapter.tokenizer.decode(new, skip_special_tokens=True).strip()
    with pytest.raises(ValueError, match="came to 51 places before the text"):
        policy_of(tmp_path, frames=3).texts(prompts, KEY)
    with pytest.raises(ValueError, match=r"a video of policy\.frames=4"):
        policy.adapter.encode("two", frames[0])


@pytest.mark.parametrize("name", ["LLaVA", "Gemma3", "PaliGemma", "BLIP", "GIT", "Florence2"])
def test_a_model_that_reads_no_videos_says_so(name, clips, tmp_path):
    folder = tiny_llava(tmp_path) if name == "LLaVA" else tiny_captioner(name, tmp_path)
    with pytest.raises(ValueError, match=r"takes no videos|pictures, not videos"):
        policy_of(folder, frames=4).texts(asked(clips, 1), KEY)


# Where frames come from


def colors(video: Any) -> list[int]:
    return [frame.getpixel((0, 0))[0] for frame in video.frames]


def test_frames_are_taken_from_the_middle_of_equal_parts():
    assert evenly(10, 4) == [1, 3, 6, 8]
    assert evenly(3, 1) == [1]
    assert evenly(3, 8) == evenly(3, None) == [0, 1, 2]


def test_a_folder_a_list_and_a_zip_hold_the_same_frames(clips, tmp_path):
    files = frames_of(clips[0].place)
    assert files is not None
    assert [Path(file).stem for file in files] == [f"frame_{i}" for i in range(10)]  # 2 before 10 and so on
    with zipfile.ZipFile(tmp_path / "clips.zip", "w") as archive:
        for file in reversed(files):
            archive.write(file, f"inside/a/{Path(file).name}")
    expected = [25, 75, 150, 200]
    for place in (clips[0].place, tuple(files), str(tmp_path / "clips.zip" / "inside" / "a")):
        video = open_video(Clip(place), 4)
        assert colors(video) == expected
        assert (video.numbers, video.total) == ([1, 3, 6, 8], 10)


def test_a_file_is_decoded(tmp_path):
    cv2 = pytest.importorskip("cv2")
    import numpy as np

    file = str(tmp_path / "clip.avi")
    out = cv2.VideoWriter(file, cv2.VideoWriter_fourcc(*"MJPG"), 5.0, (32, 32))
    for i in range(10):
        out.write(np.full((32, 32, 3), 25 * i, dtype=np.uint8))
    out.release()
    video = open_video(Clip(file), 4)
    assert video.total == 10
    assert video.fps == pytest.approx(5.0)
    assert colors(video) == pytest.approx([25, 75, 150, 200], abs=6)
    with pytest.raises(ValueError, match=r"policy\.frames must say how many"):
        open_video(Clip(file), None)


def test_what_is_no_video_is_said(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises((ValueError, ImportError), match=r"bad\.mp4"):
        open_video(Clip(str(tmp_path / "bad.mp4")), 4)
    with pytest.raises(ValueError, match="there is no video"):
        open_video(Clip(str(tmp_path / "none.mp4")), 4)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (9, 8)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match="differ in size"):
        open_video(Clip((str(tmp_path / "a.png"), str(tmp_path / "b.png"))), None)


def test_prompts_name_videos_from_their_own_folder(tmp_path):
    clip(tmp_path / "clips" / "a", 3)
    lines = tmp_path / "prompts.jsonl"
    lines.write_text(
        '{"prompt": "x", "video": "clips/a", "fps": 2}\n'
        '{"prompt": "y", "video": ["clips/a/frame_0.png", "clips/a/frame_2.png"]}\n'
    )
    first, second = read_prompts(lines)
    assert first.extra == {"video": str(tmp_path / "clips/a"), "fps": 2}
    assert second.extra["video"] == [str(tmp_path / f"clips/a/frame_{i}.png") for i in (0, 2)]
    for wrong, said in (
        ('"clips/b"', "there is no video"),
        ('"clips"', "has no frames"),
        ('["clips/a/frame_7.png"]', "there is no picture"),
    ):
        lines.write_text(f'{{"prompt": "x", "video": {wrong}}}\n')
        with pytest.raises(PromptError, match=f"line 1: .*{said}"):
            read_prompts(lines)


def test_grids_show_the_frame_in_the_middle(clips):
    sheet = described(asked(clips, 1))
    side = sheet.shape[-1]
    seen = (sheet[:, :, : min(side, 16), : min(side, 16)].mean((2, 3)) * 255).round().tolist()
    assert seen == [[125, 130, 0], [125, 130, 200]]
