"""Rewards behind a server: what comes back is what the reward says, and no request brings it down."""

from __future__ import annotations

import random
import socket
import threading
import time
from dataclasses import replace
from urllib.parse import urlparse

import httpx
import msgpack
import pytest
import torch
from ranks import Brighter
from servers import running
from torch.testing import assert_close
from toys import Brightness, Redness, ToyFlow, names, source

from mmalign.algorithms.flow_grpo import FlowGRPO
from mmalign.contracts import LearnedReward
from mmalign.pairwise import win_rates
from mmalign.records import Masks, Outcome, Prompts, RewardSignal, Spans, Steps, Unit, Whole
from mmalign.scoring import Scorer
from mmalign.serving import Frozen, ServingSettings, application, fingerprint, freeze
from mmalign.trainer import Trainer, TrainingSettings
from mmalign.wire import WireError, dump_outcome, dump_signal, outcome_of, pack, signal_of, unpack


def pictures(count: int = 3, views: int = 1) -> Outcome:
    media = torch.rand(count * views, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    prompts = names(1, count)
    extra = [{"number": i, "nested": {"list": [1, "two", None, True]}} for i in range(count)]
    return Outcome(Prompts(prompts.text, prompts.group, prompts.member, extra), media, views)


def message(outcome: Outcome) -> bytes:
    return pack({"outcome": dump_outcome(outcome)})


# Bytes


@pytest.mark.parametrize("media", ["pictures", "video", "texts"])
def test_an_outcome_comes_through_to_the_last_bit(media):
    sent = pictures(2, views=2)
    if media == "video":
        sent = Outcome(sent.prompts, torch.rand(4, 5, 3, 2, 2), 2)
    if media == "texts":
        sent = Outcome(sent.prompts, ["a cat", "zwei Hünde", "", "三"], 2)
    came = outcome_of(unpack(pack(dump_outcome(sent))))
    assert came.prompts.text == sent.prompts.text
    assert torch.equal(came.prompts.group, sent.prompts.group)
    assert torch.equal(came.prompts.member, sent.prompts.member)
    assert came.prompts.extra == sent.prompts.extra
    assert came.views == 2
    assert torch.equal(came.media, sent.media) if media != "texts" else came.media == sent.media


def test_pixels_may_be_rounded_to_256_levels():
    sent = pictures()
    body = pack(dump_outcome(sent, "uint8"))
    assert_close(outcome_of(unpack(body)).media, sent.media, atol=0.5 / 255 + 1e-6, rtol=0)
    assert len(body) < len(pack(dump_outcome(sent)))


@pytest.mark.parametrize(
    "where",
    [
        Whole(),
        Steps(torch.tensor([[0, 1], [2, 3]])),
        Spans(torch.tensor([[0, 4], [1, 2]]), torch.tensor([[2, 9], [3, 4]])),
        Masks(torch.rand(2, 2, 1, 3, 3)),
    ],
    ids=lambda w: type(w).__name__,
)
def test_a_verdict_comes_through_with_its_units_and_places(where):
    sent = RewardSignal(
        "r",
        torch.tensor([[1.5, torch.nan], [-2.0, 0.25]]),
        Unit.REGION,
        torch.tensor([[True, True], [False, True]]),
        where,
        [{"seen": "cat", "score": 0.5}, {}],
    )
    came = signal_of(unpack(pack(dump_signal(sent))), 2)
    assert came.name == "r"
    assert came.unit is Unit.REGION
    assert torch.equal(came.values, sent.values)
    assert torch.equal(came.valid, sent.valid)
    assert came.details == sent.details
    assert type(came.where) is type(where)
    for name, tensor in vars(where).items():
        assert torch.equal(getattr(came.where, name), tensor)


def test_what_cannot_be_sent_is_said_before_it_is():
    with pytest.raises(WireError, match="cannot be sent"):
        pack({"x": object()})
    with pytest.raises(WireError, match="complex64 cannot be sent"):
        pack(torch.zeros(1, dtype=torch.complex64))


def changed(value: dict, path: tuple[str, ...], new: object) -> bytes:
    """A message with one value replaced."""
    here = value
    for part in path[:-1]:
        here = here[part]
    here[path[-1]] = new
    return msgpack.packb(value)


FAULTS = {
    ("outcome", "text"): ["x", [], [1], None, ["0"] * 9],
    ("outcome", "views"): [0, -1, 1.5, "1", 10**9, True, None],
    ("outcome", "extra"): [[1, 2, 3], {}, "x"],
    ("outcome", "media"): [None, 3, ["a"], {}, {"dtype": "float32"}],
    ("outcome", "media", "dtype"): ["float16", "object", 4, None, ["float32"]],
    ("outcome", "media", "shape"): [
        [3, 3, 2],
        [3, 3, 2, 3],
        [-3, 3, 2, 2],
        [3.0, 3, 2, 2],
        "x",
        [2**40] * 4,
        [True] * 4,
    ],
    ("outcome", "media", "data"): [b"", b"x" * 99, "x", None, 12],
    ("outcome", "group", "shape"): [[2], [1, 3]],
    ("outcome", "member"): [[0, 1, 2], None],
}


@pytest.mark.parametrize(
    ("path", "new"),
    [(path, new) for path, values in FAULTS.items() for new in values],
    ids=lambda v: str(v)[:30],
)
def test_every_wrong_field_is_a_wire_error(path, new):
    with pytest.raises(WireError):
        outcome_of(unpack(changed(unpack(message(pictures())), path, new))["outcome"], 4096)


# The server


class Picky(Redness):
    """Raises on every picture."""

    name = "picky"

    def __init__(self) -> None:
        super().__init__("picky")

    def __call__(self, outcome):
        raise ValueError("I do not like it")


@pytest.fixture(scope="module")
def server():
    with running(Redness(), Brightness(by_place=True), Picky(), megabytes=0.2, outcomes=64) as found:
        yield found


def post(server, body: bytes, name: str = "redness", **more):
    return httpx.post(f"{server.url}/score/{name}", content=body, timeout=20, **more)


@pytest.mark.parametrize("reward", [Redness(), Brightness(by_place=True)], ids=lambda r: r.name)
def test_a_served_reward_says_what_it_says_here(server, reward):
    shown = pictures()
    answer = unpack(post(server, message(shown), reward.name).content)
    came, here = signal_of(answer["verdict"], 3), reward(shown)
    assert torch.equal(came.values, here.values)
    assert came.details == here.details
    assert came.unit is here.unit
    assert answer["reasons"] == {}


def test_it_describes_itself(server):
    described = httpx.get(f"{server.url}/describe").json()
    assert set(described["rewards"]) == {"redness", "brightness", "picky"}
    assert described["limits"] == {"bytes": 200000, "outcomes": 64}
    assert "red" in described["rewards"]["redness"]["about"]
    assert fingerprint("lab", {"measure": "soft"}) != fingerprint("lab", {"measure": "strict"})


def test_failures_of_a_reward_are_missing_verdicts_with_their_reason(server):
    answer = unpack(post(server, message(pictures()), "picky").content)
    assert not signal_of(answer["verdict"], 3).valid.any()
    assert answer["reasons"] == {"ValueError: I do not like it": 3}


def test_refusals_say_why(server):
    assert post(server, b"\xc1").status_code == 400
    assert "not msgpack" in post(server, b"\xc1").json()["error"]
    assert post(server, message(pictures()), "none").status_code == 404
    assert "redness" in post(server, message(pictures()), "none").json()["error"]
    assert post(server, b"x" * 300000).status_code == 413
    assert "at most 64" in post(server, message(pictures(65))).json()["error"]


def test_a_token_is_asked_for_where_there_is_one():
    with running(Redness(), token="secret") as server:
        body = message(pictures())
        assert post(server, body).status_code == 401
        assert post(server, body, headers={"Authorization": "Bearer guess"}).status_code == 401
        assert post(server, body, headers={"Authorization": "Bearer secret"}).status_code == 200
        assert httpx.get(f"{server.url}/describe").status_code == 401
        assert httpx.get(f"{server.url}/health").json()["status"] == "ok"


class Waits(Redness):
    def __call__(self, outcome):
        time.sleep(0.3)
        return super().__call__(outcome)


def test_more_requests_than_may_wait_are_told_to_come_again():
    with running(Waits(), waiting=1) as server:
        body, found = message(pictures()), []
        threads = [threading.Thread(target=lambda: found.append(post(server, body))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(answer.status_code for answer in found) == [200, 503, 503]
        assert next(a for a in found if a.status_code == 503).headers["Retry-After"] == "1"


def test_a_judge_of_pairs_answers_by_the_win_rates_of_whole_groups():
    shown = Outcome(names(2, 3), pictures(6).media)
    with running(Brighter(), members=3) as server:
        answer = unpack(post(server, message(shown), "brightness").content)
        here = win_rates(Brighter(), shown)[0]
        found = signal_of(answer["verdict"], 6)
        assert torch.equal(found.values, here.values)
        assert found.details == here.details
        assert httpx.get(f"{server.url}/describe").json()["rewards"]["brightness"]["compares"]
        several = post(server, message(pictures(3, views=2)), "brightness")
        assert (several.status_code, "one completion a sample" in several.text) == (422, True)
        large = post(server, message(pictures(4)), "brightness")
        assert (large.status_code, "at most 3 members" in large.text) == (400, True)
        twice = replace(shown, prompts=replace(shown.prompts, member=torch.zeros_like(shown.prompts.member)))
        assert "same group and member" in post(server, message(twice), "brightness").json()["error"]


def test_pictures_are_judged_on_the_device_of_the_server():
    class Place(Redness):
        def __call__(self, outcome):
            seen.append(outcome.media.device.type)
            return RewardSignal("redness", torch.zeros(len(outcome.prompts), 1))

    seen: list[str] = []
    with running(Place(), device="meta") as server:
        assert post(server, message(pictures())).status_code == 200
    assert seen == ["meta"]


def test_rewards_that_cannot_be_served_are_refused():
    with pytest.raises(ValueError, match="'taught' learns: serve it frozen"):
        application([(Taught(), {})])
    with pytest.raises(ValueError, match=r"'taught' learns from the run that it judges; .*--learned RUN"):
        freeze(Taught(), None)
    with pytest.raises(ValueError, match="names of their own"):
        application([(Redness(), {}), (Redness(), {})])
    with pytest.raises(ValueError, match="megabytes must be positive"):
        ServingSettings(megabytes=0)


class Taught(Redness):
    """A reward that learns how much to add."""

    name = "taught"

    def __init__(self) -> None:
        self.more = torch.zeros(1)

    def __call__(self, outcome):
        return RewardSignal("taught", outcome.media[:, 0].flatten(1).mean(1, keepdim=True) + self.more)

    def fit(self, outcome):
        self.more = self.more + 1
        return {"more": self.more.item()}

    def state_dict(self):
        return {"more": self.more}

    def load_state_dict(self, state):
        self.more = state["more"]


def run_of(reward, folder):
    """A run of two iterations that has taught a reward, and its last checkpoint."""
    algorithm = FlowGRPO(steps=3, clip=1e-2).build({reward.name: 1.0})
    settings = TrainingSettings(iterations=2, learning_rate=1e-3, batch=1000, save_every=2)
    policy, prompts = ToyFlow(algorithm.noise), source(2, 4)
    Trainer(policy, algorithm, Scorer([reward]), prompts, settings, run_dir=folder).run()
    return folder


def test_a_reward_that_learns_is_served_as_a_run_has_left_it(tmp_path):
    run, shown = run_of(Taught(), tmp_path / "run"), pictures()
    frozen = freeze(Taught(), run)
    assert not isinstance(frozen, LearnedReward)
    with running(frozen) as server:
        found = signal_of(unpack(post(server, message(shown), "taught").content)["verdict"], 3)
        assert_close(found.values, Taught()(shown).values + 2)
        said = httpx.get(f"{server.url}/describe").json()["rewards"]["taught"]
    assert said["frozen"]
    assert said["about"] == "A reward that learns how much to add."
    assert said["fingerprint"] != fingerprint("taught", {}, Frozen(Taught(), {"more": torch.ones(1)}))


def test_a_run_that_has_not_taught_the_reward_is_named(tmp_path):
    run = run_of(Redness(), tmp_path / "run")
    with pytest.raises(ValueError, match="run has taught no reward, not 'taught'"):
        freeze(Taught(), run)
    assert isinstance(freeze(Redness(), None), Redness)  # nothing to be learned, and no run needed


# A thousand malformed requests


def mutated(rng: random.Random, value):
    """A message with something somewhere in it replaced by something else."""
    junk = [None, True, -1, 2**63, 1.5, float("nan"), "x", b"\x00" * 7, [], {}, [[[]]], {"a": {}}]
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        if rng.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutated(rng, value[key])}
    if isinstance(value, list) and value and rng.random() < 0.5:
        place = rng.randrange(len(value))
        return [*value[:place], mutated(rng, value[place]), *value[place + 1 :]]
    return rng.choice(junk)


def malformed(rng: random.Random, good: bytes) -> bytes:
    kind = rng.randrange(5)
    if kind == 0:
        return rng.randbytes(rng.randrange(400))
    if kind == 1:
        return good[: rng.randrange(len(good))]  # truncated
    if kind == 2:  # long lists, maps, texts and bytes that are not there, also inside of each other
        return b"".join(
            rng.choice([b"\xdd", b"\xdf", b"\xdb", b"\xc6"]) + b"\xff\xff\xff\xff"
            for _ in range(rng.randrange(1, 200))
        )
    if kind == 3:
        flipped = bytearray(good)
        for _ in range(rng.randrange(1, 9)):
            flipped[rng.randrange(len(flipped))] = rng.randrange(256)
        return bytes(flipped)
    return msgpack.packb(mutated(rng, unpack(good)))


def raw(server, data: bytes) -> None:
    """Bytes as they are, and then gone."""
    url = urlparse(server.url)
    with socket.create_connection((url.hostname, url.port), timeout=5) as line:
        line.sendall(data)


def test_a_thousand_malformed_requests_leave_it_up_and_answering(server):
    rng, good = random.Random(0), message(pictures())
    seen: dict[int, int] = {}
    with httpx.Client(timeout=20) as client:
        for _ in range(900):
            status = client.post(f"{server.url}/score/redness", content=malformed(rng, good)).status_code
            seen[status] = seen.get(status, 0) + 1
    head = b"POST /score/redness HTTP/1.1\r\nHost: x\r\n"
    for _ in range(25):
        raw(server, head + b"Content-Length: 1000000000000000\r\n\r\n" + good)  # huge
        raw(server, head + b"Content-Length: 5000\r\n\r\n" + good[:50])  # truncated, then hung up
        raw(server, head + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFF\r\n" + good)
        raw(server, rng.randbytes(200))
    assert set(seen) <= {200, 400}, seen  # a flipped pixel is still a picture
    assert seen[400] > 700
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
    answer = unpack(post(server, good).content)
    assert torch.equal(signal_of(answer["verdict"], 3).values, Redness()(pictures()).values)
