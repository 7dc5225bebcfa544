"""Prompts: the same global batch for any number of ranks, and errors that name the line."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmalign.data import Prompt, PromptError, PromptSettings, PromptSource, read_prompts
from mmalign.records import Prompts


def names(prompts: Prompts) -> set[tuple[int, int, str]]:
    return set(zip(prompts.group.tolist(), prompts.member.tolist(), prompts.text, strict=True))


def source(count: int = 10, per_iteration: int = 4, group: int = 6, seed: int = 0) -> PromptSource:
    return PromptSource([Prompt(f"p{i}", {"i": i}) for i in range(count)], per_iteration, group, seed)


def test_text_and_json_files(tmp_path):
    (tmp_path / "a.txt").write_text("a red cat\n two dogs  \n\n", encoding="utf-8-sig")
    assert [p.text for p in read_prompts(tmp_path / "a.txt")] == ["a red cat", "two dogs"]
    (tmp_path / "b.jsonl").write_text('{"prompt": "a cat", "answer": 3}\n{"prompt": "zwei Bögen"}\n')
    first, second = read_prompts(tmp_path / "b.jsonl")
    assert first == Prompt("a cat", {"answer": 3})
    assert second.text == "zwei Bögen"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", "", "holds no prompts"),
        ("a.txt", "\n\n", "holds no prompts"),
        ("a.txt", "one\n\nthree\n", "line 2: the prompt is empty"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": ""}\n', "line 2: the prompt is empty"),
        ("a.jsonl", '{"prompt": "x"}\n{"text": "y"}\n', "line 2: each line must be an object with a text"),
        ("a.jsonl", '{"prompt": "x"}\nnot json\n', "line 2: not valid JSON"),
        ("a.jsonl", "[1]\n", "line 1"),
        ("a.csv", "x", "not '.csv'"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(PromptError, match=said):
        read_prompts(tmp_path / name)


def test_missing_files_and_impossible_sizes():
    with pytest.raises(PromptError, match="no such prompt file"):
        read_prompts("nowhere.txt")
    with pytest.raises(PromptError, match="group must be at least 1"):
        PromptSettings("x.txt", group=0)
    with pytest.raises(PromptError, match="at least 1"):
        PromptSettings("x.txt", per_iteration=0)
    with pytest.raises(PromptError, match="4 distinct prompts, there are 3"):
        source(count=3)
    with pytest.raises(PromptError, match="multiple of 5"):
        source().at(0, 0, 5)


def test_groups_are_whole_numbers_that_go_on_counting():
    first, second = source().at(0), source().at(1)
    assert first.group.dtype == first.member.dtype == torch.int64
    assert sorted(set(first.group.tolist())) == [0, 1, 2, 3]
    assert sorted(set(second.group.tolist())) == [4, 5, 6, 7]
    assert len(first) == 24
    for group in range(4):
        rows = first.group == group
        assert sorted(first.member[rows].tolist()) == list(range(6))
        assert len({text for text, own in zip(first.text, rows, strict=True) if own}) == 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 50), st.sampled_from([(4, 6), (3, 6), (6, 4)]), st.sampled_from([1, 2, 3, 6]))
def test_any_number_of_ranks_shares_the_same_batch(iteration, shape, world):
    one = source(10, *shape)
    if shape[0] % world and shape[1] % world:
        return
    parts = [one.at(iteration, rank, world) for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert sum(len(part) for part in parts) == len(one.at(iteration))
    assert set().union(*map(names, parts)) == names(one.at(iteration))


def test_groups_stay_whole_where_they_can():
    parts = [source(per_iteration=4, group=6).at(0, rank, 2) for rank in range(2)]
    assert not set(parts[0].group.tolist()) & set(parts[1].group.tolist())
    split = [source(per_iteration=3, group=6).at(0, rank, 2) for rank in range(2)]
    assert set(split[0].group.tolist()) == set(split[1].group.tolist())


def test_an_epoch_shows_each_prompt_once_and_the_next_in_another_order():
    epoch = [text for i in range(5) for text in dict.fromkeys(source(per_iteration=2).at(i).text)]
    after = [text for i in range(5, 10) for text in dict.fromkeys(source(per_iteration=2).at(i).text)]
    assert sorted(epoch) == sorted(after) == sorted(f"p{i}" for i in range(10))
    assert epoch != after
    other = [text for i in range(5) for text in dict.fromkeys(source(per_iteration=2, seed=1).at(i).text)]
    assert epoch != other


def test_no_iteration_sees_a_prompt_twice_even_where_epochs_meet():
    for i in range(20):
        assert len(set(source(per_iteration=4).at(i).text)) == 4


def test_extra_travels_with_its_prompt():
    prompts = source().at(3)
    assert all(extra["i"] == int(text[1:]) for text, extra in zip(prompts.text, prompts.extra, strict=True))


def test_sources_are_found_from_the_folder_of_the_file(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    file = tmp_path / "edits.jsonl"
    file.write_text('{"prompt": "x", "source": "a.png"}\n{"prompt": "y", "source": ["a.png", "b.png"]}')
    one, two = read_prompts(file)
    assert one.extra["source"] == str(tmp_path / "a.png")
    assert two.extra["source"] == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    file.write_text('{"prompt": "x", "source": ["a.png", "c.png"]}')
    with pytest.raises(PromptError, match=r"line 1: there is no picture .*c\.png"):
        read_prompts(file)
    file.write_text('{"prompt": "x", "reference_image": ["b.png", "a.png"]}')
    assert read_prompts(file)[0].extra["reference_image"] == [
        str(tmp_path / "b.png"),
        str(tmp_path / "a.png"),
    ]
