"""Another engine writes: a server that really samples from the tiny model, with weights that it is given."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from captioners import pictures, tiny_captioner, tiny_llava
from runs import ROOT
from test_captioner import KEY, asked, policy_of, stir
from torch.testing import assert_close

from mmalign.algorithms.grpo import GRPO
from mmalign.cli import main
from mmalign.contracts import LoraSettings, PolicySettings, RolloutError, RolloutSettings, TextSettings
from mmalign.data import Prompt, PromptSource
from mmalign.mismatch import corrected, importance, mismatch
from mmalign.overlap import joined
from mmalign.pipelines import load
from mmalign.pipelines.captioner import CaptionPolicy
from mmalign.records import Advantage, Behavior, Outcome, Plan, Prompts, RewardSignal, Trajectory
from mmalign.scoring import Scorer
from mmalign.sde import Noise
from mmalign.trainer import Trainer, TrainingSettings

TEXT = TextSettings(max_tokens=8)


class Engine:
    """An OpenAI-compatible server with adapters that are loaded while it runs, as vLLM.

    deaf: it says that it loads adapters, and goes on with the base model. heat: of what it draws from, beside
    what is asked. slow: seconds before each text. broken: statuses of the next answers.
    """

    kind = "vllm"
    adapters_at = "/v1"  # where adapters are loaded

    def __init__(self, folder: Path, place: Path) -> None:
        self.model, self.place = folder, place
        self.adapters: dict[str, CaptionPolicy] = {"base": policy_of(folder, TEXT)}
        self.paths: list[tuple[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.deaf, self.heat, self.slow, self.extra_prompt = False, 1.0, 0.0, 0
        self.broken: list[int] = []
        lock, engine = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = {"data": [{"id": name} for name in engine.adapters]}
                self.reply(*((200, found) if self.path == "/v1/models" else (404, {"detail": "Not Found"})))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    if engine.broken:
                        self.reply(engine.broken.pop(0), {"error": "not now"})
                        return
                    routes = {
                        "/v1/chat/completions": engine.chat_completions,
                        f"{engine.adapters_at}/load_lora_adapter": engine.load_lora_adapter,
                        f"{engine.adapters_at}/unload_lora_adapter": engine.unload_lora_adapter,
                    }
                    if self.path not in routes:
                        self.reply(404, {"detail": "Not Found"})
                        return
                    self.reply(200, routes[self.path](body))

            def reply(self, status: int, content: Any) -> None:
                try:
                    self.send_response(status)
                    self.end_headers()
                    said = content if isinstance(content, str) else json.dumps(content)
                    self.wfile.write(said.encode())
                except OSError:
                    pass  # the other side has stopped waiting

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def load_lora_adapter(self, body: dict[str, Any]) -> Any:
        policy = policy_of(self.model, TEXT)
        if not self.deaf:
            policy.load(Path(body["lora_path"]))
        self.adapters[body["lora_name"]] = policy
        self.paths.append((body["lora_name"], body["lora_path"]))
        return "Success"

    def unload_lora_adapter(self, body: dict[str, Any]) -> Any:
        del self.adapters[body["lora_name"]]
        return "Success"

    def chat_completions(self, body: dict[str, Any]) -> dict[str, Any]:
        time.sleep(self.slow)
        self.bodies.append(body)
        assert [body[name] for name in ("top_p", "top_k", "min_p", "repetition_penalty")] == [1, -1, 0, 1]
        policy = self.adapters[self.adapter_of(body["model"])]
        image, text = body["messages"][0]["content"]
        file = self.place / f"{len(self.bodies)}.png"
        file.write_bytes(base64.b64decode(image["image_url"]["url"].partition(",")[2]))
        policy.text = replace(
            TEXT, temperature=body["temperature"] * self.heat, max_tokens=body["max_tokens"]
        )
        one = Prompts([text["text"]], torch.tensor([0]), torch.tensor([0]), [{"image": str(file)}])
        drawn = policy.sample(one, Plan(1), (body["seed"],))
        count = int(drawn.mask.sum())
        read = policy._inputs(text["text"], str(file))["input_ids"].shape[1] + self.extra_prompt
        return self.answer(
            body, drawn.replay["token"][0, :count].tolist(), drawn.log_prob[0, :count].tolist(), read
        )

    def adapter_of(self, model: str) -> str:
        return model

    def answer(
        self, body: dict[str, Any], token: list[int], likely: list[float], read: int
    ) -> dict[str, Any]:
        """Ids beside the text and beside the choices, where they are asked for."""
        choice: dict[str, Any] = {"index": 0, "logprobs": listed(likely)}
        asked_for = body.get("return_token_ids", False)
        told = {"prompt_token_ids": [0] * read} if asked_for else {}
        return {"choices": [choice | ({"token_ids": token} if asked_for else {})], **told}


class SGLangEngine(Engine):
    """The same as SGLang: adapters are loaded beside the version and named after a colon.

    Ids are told with their log-probabilities in what the engine says of a text, and nowhere else.
    """

    kind = "sglang"
    adapters_at = ""

    def load_lora_adapter(self, body: dict[str, Any]) -> Any:
        super().load_lora_adapter(body)
        return {"success": True, "error_message": "", "loaded_adapters": dict(self.paths)}

    def unload_lora_adapter(self, body: dict[str, Any]) -> Any:
        super().unload_lora_adapter(body)
        return {"success": True, "error_message": "", "loaded_adapters": {}}

    def adapter_of(self, model: str) -> str:
        base, _, adapter = model.partition(":")
        assert base == "base"
        return adapter or base

    def answer(
        self, body: dict[str, Any], token: list[int], likely: list[float], read: int
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "logprobs": listed(likely)}
        if body.get("return_meta_info", False):
            triples = [[value, number, None] for value, number in zip(likely, token, strict=True)]
            choice["meta_info"] = {"prompt_tokens": read, "output_token_logprobs": triples}
        return {"choices": [choice], "usage": {"prompt_tokens": read, "completion_tokens": len(token)}}


def listed(likely: list[float]) -> dict[str, Any]:
    return {"content": [{"token": "", "logprob": value, "top_logprobs": []} for value in likely]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[str]:
    return pictures(tmp_path_factory.mktemp("pictures"), 2)


@pytest.fixture
def engine(request, folder, tmp_path) -> Iterator[Engine]:
    made: Engine = getattr(request, "param", Engine)(folder, tmp_path)
    yield made
    made.http.shutdown()
    made.http.server_close()


both = pytest.mark.parametrize("engine", [Engine, SGLangEngine], indirect=True)


def served(engine: Engine, **settings: Any) -> CaptionPolicy:
    given = {
        "server": engine.kind,
        "model": "base",
        "pause": 0.0,
        "retries": 1,
        "folder": str(engine.place / "adapters"),
        "parallel": 4,
    } | settings
    return policy_of(engine.model, TEXT, rollout=RolloutSettings(engine.url, **given))


@both
def test_texts_are_the_servers_and_log_probabilities_of_both_are_kept(engine, files):
    policy, prompts = served(engine), asked(files)
    stir(policy)
    trajectory = policy.sample(prompts, Plan(1), KEY)
    assert trajectory.behavior is not None
    assert_close(trajectory.log_prob, trajectory.behavior.log_prob, atol=1e-4, rtol=0)
    for pick in policy.picks(trajectory, torch.arange(len(trajectory)), 3):
        now = policy.evaluate(trajectory, pick).log_prob
        assert_close(now, trajectory.log_prob[pick.rows, pick.columns], atol=1e-4, rtol=0)
    assert len({body["seed"] for body in engine.bodies}) == len(prompts)
    assert {engine.adapter_of(body["model"]) for body in engine.bodies} == {engine.paths[-1][0]}
    assert {int(i) for body in engine.bodies for i in body["logit_bias"]} == set(policy.adapter.banned)
    again = policy.sample(prompts, Plan(1), KEY)
    assert again.outcome.media == trajectory.outcome.media
    assert policy.forwards.sample == 0


@both
def test_the_server_gets_new_weights_when_there_are_new_ones(engine, files):
    policy, prompts = served(engine), asked(files, 1)
    policy.sample(prompts, Plan(1), KEY)
    policy.sample(prompts, Plan(1), KEY)
    assert len(engine.paths) == 1
    stir(policy)
    moved = policy.sample(prompts, Plan(1), KEY)
    (first, gone), (second, there) = engine.paths
    assert set(engine.adapters) == {"base", second} != {"base", first}
    assert not Path(gone).exists()
    assert (Path(there) / "adapter_config.json").is_file()
    assert moved.behavior is not None
    assert_close(moved.log_prob, moved.behavior.log_prob, atol=1e-4, rtol=0)


@both
def test_a_server_that_keeps_old_weights_stops_the_run(engine, files):
    policy = served(engine, limit=0.05)
    engine.deaf = True
    stir(policy)
    with pytest.raises(RolloutError, match="it did not take the adapter"):
        policy.sample(asked(files), Plan(1), KEY)


@pytest.mark.parametrize(
    ("engine", "server", "said"),
    [
        (SGLangEngine, "vllm", "/v1/load_lora_adapter gave no answer: status 404"),
        (Engine, "sglang", r":\d+/load_lora_adapter gave no answer: status 404"),
    ],
    indirect=["engine"],
)
def test_a_server_of_another_kind_is_an_error(engine, files, server, said):
    with pytest.raises(RolloutError, match=said):
        served(engine, server=server).sample(asked(files, 1), Plan(1), KEY)


@both
def test_a_server_that_does_not_tell_tokens_is_an_error(engine, files):
    tell = engine.answer
    engine.answer = lambda body, *told: tell({}, *told)
    needs = {"vllm": "return_token_ids", "sglang": "return_meta_info"}[engine.kind]
    with pytest.raises(RolloutError, match=f"of the kind '{engine.kind}' must know {needs}"):
        served(engine).sample(asked(files, 1), Plan(1), KEY)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ([404], "load_lora_adapter gave no answer: status 404"),
        ([503, 503], "load_lora_adapter gave no answer: status 503"),
    ],
)
def test_a_server_that_fails_is_an_error(engine, files, broken, said):
    engine.broken = broken
    with pytest.raises(RolloutError, match=said):
        served(engine).sample(asked(files, 1), Plan(1), KEY)


def test_a_server_that_is_busy_for_a_moment_is_asked_again(engine, files):
    engine.broken = [429]
    assert len(served(engine).sample(asked(files, 1), Plan(1), KEY)) == 2


def test_slow_and_dead_servers_are_errors(engine, files):
    policy = served(engine, timeout=0.3, retries=0)
    engine.slow = 1.0
    with pytest.raises(RolloutError, match="ReadTimeout"):
        policy.sample(asked(files, 1), Plan(1), KEY)
    engine.http.shutdown()
    engine.http.server_close()
    with pytest.raises(RolloutError, match=f"{engine.url}/models gave no answer: ConnectError"):
        policy.check(asked(files))


def test_a_run_does_not_begin_without_its_server(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    rollout = f"{{url: 'http://127.0.0.1:9/v1', folder: {tmp_path}, retries: 0}}"
    given = ["--config", "assets/recipes/lab_holistic.yaml", f"policy.rollout={rollout}"]
    assert main(["train", *given, f"run.dir={tmp_path / 'run'}"]) == 2
    assert "http://127.0.0.1:9/v1/models gave no answer: ConnectError" in capsys.readouterr().err


def test_what_the_server_does_not_serve_or_read_alike_is_said(engine, files):
    policy = policy_of(
        engine.model, TEXT, rollout=RolloutSettings(engine.url, model="other", folder=str(engine.place))
    )
    with pytest.raises(RolloutError, match="serves base, not other"):
        policy.check(asked(files))
    engine.extra_prompt = 3
    with pytest.raises(RolloutError, match="both need the same processor"):
        served(engine).sample(asked(files, 1), Plan(1), KEY)


def test_a_clip_and_a_model_without_chat_are_refused(engine, files, tmp_path):
    prompts = replace(asked(files, 1), extra=[{"video": [files[0]]}] * 2)
    with pytest.raises(ValueError, match="pictures, not videos"):
        served(engine).sample(prompts, Plan(1), KEY)
    rollout = RolloutSettings(engine.url, model="base", folder=str(tmp_path))
    with pytest.raises(ValueError, match="no chat template"):
        policy_of(tiny_captioner("BLIP", tmp_path / "blip"), rollout=rollout)
    for wrong in ({"lora": LoraSettings(rank=0)}, {"text": TextSettings(top_p=0.9)}):
        text = wrong.pop("text", TEXT)
        with pytest.raises(ValueError, match=r"rank above 0 and policy\.text\.top_p=1"):
            policy_of(engine.model, text, rollout=rollout, **wrong)
    for name, value in (
        ("cap", 0.0),
        ("retries", -1),
        ("url", "localhost"),
        ("url must end in the version", "http://localhost:30000"),
        ("server must be one of vllm, sglang", "tgi"),
        ("timeout", 0.0),
        ("folder", ""),
    ):
        with pytest.raises(ValueError, match=name):
            replace(rollout, **{name.partition(" ")[0]: value})


# The correction


def drawn(log_prob: list[list[float]], behavior: list[list[float]], cap: float = 2.0) -> Trajectory:
    now = torch.tensor(log_prob)
    prompts = Prompts(["x"] * len(now), torch.zeros(len(now)).long(), torch.arange(len(now)), [{}] * len(now))
    return Trajectory(
        Outcome(prompts, ["x"] * len(now)),
        now,
        now < 0,
        {},
        Plan(1),
        behavior=Behavior(torch.tensor(behavior), cap),
    )


def test_a_model_that_draws_has_no_use_for_it(tmp_path):
    rollout = RolloutSettings("http://localhost:1/v1", folder=str(tmp_path))
    with pytest.raises(ValueError, match=r"policy\.rollout is of captioners"):
        load(PolicySettings(str(ROOT / "assets/lab/flow"), rollout=rollout), Noise())


def test_importance_weights_make_the_engines_mean_the_policys():
    p, b = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    gain = torch.tensor([3.0, -1.0, 2.0, 5.0])
    whole = importance(p.log(), b.log(), 100.0)
    assert_close((b * whole * gain).sum(), (p * gain).sum())
    assert_close(importance(p.log(), b.log(), 2.0), torch.tensor([0.25, 2 / 3, 1.5, 2.0]))


def test_numbers_of_the_mismatch_by_hand():
    half, third = torch.tensor(0.5).log().item(), torch.tensor(1 / 3).log().item()
    # Weights 1/2 : 1/2 = 1, 1 : 1/3 = 3 (cut at 2), 1/3 : 1/2 = 2/3; the last place is not counted.
    trajectory = drawn([[half, -1e-9], [third, 0.0]], [[half, third], [half, -5.0]])
    found = mismatch(trajectory, lambda rows: rows)
    d = [0.0, -third, third - half]
    w = [1.0, 3.0, 2 / 3]
    assert found["rollout/gap"] == pytest.approx(sum(map(abs, d)) / 3, abs=1e-6)
    kl = sum(a - 1 - x for a, x in zip(w, d, strict=True)) / 3
    assert found["rollout/kl"] == pytest.approx(kl, abs=1e-6)
    assert found["rollout/ess"] == pytest.approx(sum(w) ** 2 / (3 * sum(x * x for x in w)), abs=1e-6)
    assert found["rollout/truncated"] == pytest.approx(1 / 3)
    advantage = Advantage(torch.tensor([[[1.0], [-1.0]]]), torch.ones(2, 2), ("total",))
    values = corrected(advantage, trajectory).values
    assert_close(values, torch.tensor([[[1.0, 2.0], [-2 / 3, -1.0]]]))


def test_two_ranks_measure_as_one():
    whole = drawn([[-1.0, -0.5], [-2.0, -3.0]], [[-1.5, -0.4], [-1.0, -3.5]])
    parts = [drawn([[-1.0, -0.5]], [[-1.5, -0.4]]), drawn([[-2.0, -3.0]], [[-1.0, -3.5]])]
    sums: list[torch.Tensor] = []
    for part in parts:
        mismatch(part, lambda rows: sums.append(rows) or rows)  # type: ignore[func-returns-value]
    together = mismatch(parts[0], lambda rows: torch.cat(sums))
    assert together == pytest.approx(mismatch(whole, lambda rows: rows))


def test_parts_that_were_drawn_apart_are_joined():
    parts = [drawn([[-1.0]], [[-2.0]]), drawn([[-3.0]], [[-4.0]], cap=2.0)]
    whole = joined(parts)
    assert whole.behavior is not None
    assert_close(whole.behavior.log_prob, torch.tensor([[-2.0], [-4.0]]))
    assert whole.behavior.cap == 2.0


class Dogs:
    """How often a text names a dog."""

    name = "dogs"

    def __call__(self, outcome: Outcome) -> RewardSignal:
        texts: Any = outcome.media
        return RewardSignal(self.name, torch.tensor([[float(text.count("dog"))] for text in texts]))


def trainer_of(policy: CaptionPolicy, files: list[str]) -> Trainer:
    prompts = [Prompt("describe the picture", {"image": file}) for file in files]
    return Trainer(
        policy,
        GRPO().build({"dogs": 1.0}),
        Scorer([Dogs()]),
        PromptSource(prompts, 2, 8, 0),
        TrainingSettings(iterations=2, updates=1, learning_rate=1e-2, ema_decay=0),
    )


def test_the_gradient_is_weighted(engine, files):
    alike, cut = (trainer_of(served(engine, cap=cap), files).step(0) for cap in (2.0, 1e-3))
    assert alike["grad_norm"] > 0
    assert alike["rollout/ess"] == pytest.approx(1)
    assert cut["grad_norm"] == pytest.approx(1e-3 * alike["grad_norm"], rel=1e-3)


@both
def test_a_run_with_an_engine_that_draws_otherwise(engine, files):
    engine.heat = 1.3
    trainer = trainer_of(served(engine, limit=1.0, cap=1.5), files)
    first = trainer.step(0)
    assert first["ratio"] == pytest.approx(1, abs=1e-5)
    assert first["rollout/gap"] > 0.01
    assert 0 < first["rollout/ess"] < 1
    assert first["rollout/kl"] > 0
    assert first["reward/dogs/group_std"] > 0
    before = len(engine.paths)
    trainer.step(1)
    assert len(engine.paths) == before + 1
