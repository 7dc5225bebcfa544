"""A reward behind real servers: some die, some are slow, some talk nonsense, and no sample is lost."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image
from ranks import Brighter
from servers import Running, pretending, running
from toys import Brightness, Notes, Redness, ToyFlow, names, source

from mmalign.algorithms.flow_grpo import FlowGRPO
from mmalign.contracts import LearnedReward, judges_alone
from mmalign.pairwise import win_rates
from mmalign.records import Outcome, Prompts, RewardSignal
from mmalign.rewardmodels import load
from mmalign.rewardmodels.jpeg import JpegCompressibility
from mmalign.rewardmodels.remote import Remote
from mmalign.scoring import RewardError, Scorer, verdict
from mmalign.serving import Frozen
from mmalign.testing import check_reward
from mmalign.trainer import Trainer, TrainingSettings
from mmalign.wire import dump_signal, pack

QUICK = {"timeout": 5.0, "backoff": 0.01, "rest": 0.2}


def pictures(count: int = 5, seed: int = 0) -> Outcome:
    media = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    return Outcome(names(1, count), media)


@pytest.fixture(scope="module")
def server():
    with running(Redness(), Brightness(by_place=True)) as found:
        yield found


@pytest.mark.parametrize("local", [Redness(), Brightness(by_place=True)], ids=lambda r: r.name)
@pytest.mark.parametrize("batch", [1, 2, 16])
def test_it_says_what_the_reward_says(server, local, batch):
    remote = load("remote", reward=local.name, servers=(server.url,), batch=batch, **QUICK)
    shown = pictures()
    found, here = remote(shown), local(shown)
    assert remote.name == local.name
    assert torch.equal(found.values, here.values)
    assert torch.equal(found.valid, here.valid)
    assert found.unit is here.unit
    for name, tensor in vars(here.where).items():
        assert torch.equal(getattr(found.where, name), tensor)
    assert all(row["tries"] == 1 and row["hedged"] == 0 for row in found.details)


def test_it_keeps_the_contract_of_rewards(server):
    check_reward(load("remote/again", reward="redness", servers=server.url, **QUICK), pictures())


def test_what_is_wrong_is_said_before_the_run(server):
    with pytest.raises(ValueError, match="does not serve 'lab'"):
        Remote("lab", (server.url,), **QUICK)
    with pytest.raises(ValueError, match=r"http://host:port, got 'here'"):
        Remote("redness", ("here",))
    with (
        pytest.warns(RuntimeWarning, match="does not describe itself"),
        pytest.raises(ValueError, match="none of"),
    ):
        Remote("redness", ("http://127.0.0.1:9",), **QUICK)
    with pytest.raises(ValueError, match="batch must be at least 1"):
        Remote("redness", (server.url,), batch=0)


def test_servers_must_serve_the_same_reward(server):
    strict = running(Redness(), made_with={"measure": "strict"})
    with strict as other, pytest.raises(ValueError, match="servers differ in 'redness'"):
        Remote("redness", (server.url, other.url), **QUICK)


def ask(server, answer, **more):
    """The verdicts of a remote reward with one good server and one that answers so, and what it said."""
    with pretending(server, answer) as url, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = Remote("redness", (url, server.url), batch=1, **{**QUICK, **more})(pictures())
    return found, " ".join(str(one.message) for one in said)


def slow(body: bytes) -> tuple[int, bytes]:
    time.sleep(1.0)
    return 500, b""


def other_rows(body: bytes) -> tuple[int, bytes]:
    verdict = dump_signal(RewardSignal("redness", torch.zeros(7, 1)))
    return 200, pack({"digest": hashlib.sha256(body).hexdigest(), "verdict": verdict, "reasons": {}})


def stale(body: bytes) -> tuple[int, bytes]:
    return 200, pack({"digest": "0" * 64, "verdict": dump_signal(Redness()(pictures(1))), "reasons": {}})


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda body: (200, b"\xc1\xc1"), "not msgpack"),
        (lambda body: (200, b""), "not msgpack"),
        (lambda body: (200, pack({"hello": 1})), "answer must be a mapping"),
        (stale, "to another request"),
        (other_rows, "1 outcomes were asked about, 7 are answered"),
        (lambda body: (500, b"out of memory"), "status 500: out of memory"),
        (lambda body: (400, b"what?"), "status 400"),
        (slow, "ReadTimeout"),
    ],
)
def test_nonsense_is_asked_for_again_elsewhere_and_said(server, answer, said):
    found, warned = ask(server, answer, timeout=0.5 if answer is slow else 5.0)
    assert torch.equal(found.values, Redness()(pictures()).values)
    assert found.valid.all()
    assert said in warned
    assert max(row["tries"] for row in found.details) >= 2


def test_a_slow_answer_is_overtaken_by_a_second_server(server):
    began = time.perf_counter()
    found, warned = ask(server, slow, hedge=0.1)
    assert torch.equal(found.values, Redness()(pictures()).values)
    assert max(row["hedged"] for row in found.details) == 1
    assert "a second server is asked as well" in warned
    assert time.perf_counter() - began < 0.9


def test_a_server_that_failed_rests(server):
    asked = []

    def fails(body):
        asked.append(body)
        return 500, b""

    ask(server, fails, rest=60.0, parallel=1)
    assert len(asked) == 1  # five samples, one request each


@pytest.mark.filterwarnings("ignore:reward 'redness'")
def test_without_any_answer_there_is_no_verdict_and_the_reason_is_told(server):
    with pretending(server, lambda body: (500, b"broken")) as url:
        remote = Remote("redness", (url,), retries=2, **QUICK)
        found = remote(pictures(2))
        assert not found.valid.any()
        assert "status 500: broken" in found.details[0]["missing"]
        with pytest.raises(RewardError, match="no verdict for 100%"):
            Scorer([remote])(pictures(2))


@pytest.mark.filterwarnings("ignore:reward 'redness'")
def test_a_request_that_every_server_refuses_is_not_repeated(server):
    asked = []

    def refuses(body):
        asked.append(body)
        return 422, b"not such pictures"

    with pretending(server, refuses) as url:
        Remote("redness", (url,), retries=9, **QUICK)(pictures(1))
    assert len(asked) == 1


# Judges of pairs


class Pairs(Brighter):
    """Tells which prompts it was asked about."""

    def __init__(self) -> None:
        super().__init__(both_orders=False)
        self.asked: list[int] = []

    def prefer(self, prompts, first, second):
        self.asked += prompts.group.tolist()
        return super().prefer(prompts, first, second)


@pytest.mark.parametrize("batch", [1, 5, 100])
def test_a_judge_of_pairs_is_sent_whole_groups_wherever_they_lie(batch):
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shown = Outcome(names(3, 4).take(order), pictures(12).media)
    with running(Brighter()) as server:
        remote = Remote("brightness", (server.url,), batch=batch, **QUICK)
        assert not judges_alone(remote)
        found, here = verdict(remote, shown)[0], win_rates(Brighter(), shown)[0]
    assert torch.equal(found.values, here.values)
    assert [row["consistent"] for row in found.details] == [1.0] * 12
    with pytest.raises(ValueError, match="compares pairs"), running(Brighter()) as server:
        load("framewise", of="remote", settings={"reward": "brightness", "servers": (server.url,), **QUICK})


def test_verdicts_on_a_group_are_kept_together(tmp_path):
    judge, shown = Pairs(), Outcome(names(2, 3), pictures(6).media)
    with running(judge) as server:
        remote = Remote("brightness", (server.url,), cache=str(tmp_path), **QUICK)
        first = remote(shown)
        assert sorted(judge.asked) == [0] * 3 + [1] * 3
        again = remote(shown)
        assert len(judge.asked) == 6
        assert torch.equal(again.values, first.values)
        media = shown.media.clone()
        media[5] = 0.0
        remote(Outcome(shown.prompts, media))
        assert judge.asked[6:] == [1] * 3  # a group of which one picture is another, and no other group


def test_a_group_that_lies_on_several_processes_is_refused():
    def gather(rows):
        """Rows of two processes, that hold other members of the same groups."""
        return torch.cat([rows, rows + torch.tensor([0, 3]) if rows.ndim == 2 else rows])

    with running(Brighter()) as server:
        remote = Remote("brightness", (server.url,), **QUICK)
        with pytest.raises(RewardError, match=r"make prompts\.per_iteration a multiple of the processes"):
            verdict(remote, Outcome(names(2, 3), pictures(6).media), gather)


def test_a_run_learns_from_a_judge_elsewhere_as_from_one_here():
    here, seen = train(Brighter(), 3)
    with running(Brighter()) as server:
        found, notes = train(Remote("brightness", (server.url,), batch=2, **QUICK), 3)
    for step, metrics in seen.metrics.items():
        assert notes.metrics[step]["reward/brightness/group_std"] == metrics["reward/brightness/group_std"]
    for mine, theirs in zip(here.learner.parameters, found.learner.parameters, strict=True):
        assert torch.equal(mine, theirs)


# Rewards that learn


def test_a_critic_that_is_served_scores_as_it_did_and_is_not_trained(tmp_path):
    for number, picture in enumerate(torch.rand(8, 4, 4, 3, generator=torch.Generator().manual_seed(9))):
        Image.fromarray((picture * 255).byte().numpy()).save(tmp_path / f"{number}.png")
    settings = {"references": str(tmp_path), "features": "pixels", "width": 8, "learning_rate": 1e-2}
    critic, shown = load("adversarial", **settings), pictures(8)
    critic.fit(shown)
    with running(Frozen(load("adversarial", **settings), critic.state_dict())) as server:
        with pytest.warns(RuntimeWarning, match="'adversarial' is served frozen"):
            remote = Remote("adversarial", (server.url,), **QUICK)
        before = remote(shown).values
        assert torch.equal(before, critic(shown).values)
        assert before.std() > 0
        assert not isinstance(remote, LearnedReward)
        _, notes = train(remote, 2)
        assert torch.equal(remote(shown).values, before)
    assert not any("/fit/" in name for metrics in notes.metrics.values() for name in metrics)


# The cache


class Counts(Redness):
    asked = 0

    def __call__(self, outcome):
        self.asked += len(outcome.prompts)
        return super().__call__(outcome)


def test_answers_are_kept_by_what_was_asked(tmp_path):
    reward = Counts()
    with running(reward) as server:
        settings = {"reward": "redness", "servers": (server.url,), "cache": str(tmp_path), **QUICK}
        first = Remote(**settings)(pictures())
        again = Remote(**settings)(pictures())  # another process would read the same files
        assert reward.asked == 5
        assert torch.equal(first.values, again.values)
        assert all(row["cached"] == 1 for row in again.details)
        Remote(**settings)(pictures(seed=1))
        assert reward.asked == 10  # other pictures
        shown = pictures()
        prompts = replace(shown.prompts, text=["other"] * 5)
        Remote(**settings)(Outcome(prompts, shown.media))
        assert reward.asked == 15  # other prompts
        moved = Prompts(
            shown.prompts.text, shown.prompts.group + 7, shown.prompts.member, shown.prompts.extra
        )
        Remote(**settings)(Outcome(moved, shown.media))
        assert reward.asked == 15  # the same pictures in another group
        for file in tmp_path.rglob("*"):
            if file.is_file():
                file.write_bytes(b"\xc1")
        assert torch.equal(Remote(**settings)(pictures()).values, first.values)
        assert reward.asked == 20  # what cannot be read is asked for again


@pytest.mark.filterwarnings("ignore:reward 'redness'")
def test_a_missing_answer_is_not_kept(server, tmp_path):
    with pretending(server, lambda body: (500, b"")) as url:
        Remote("redness", (url,), retries=0, cache=str(tmp_path), **QUICK)(pictures(2))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


# A run


def train(reward, iterations: int, between=lambda iteration: None):
    algorithm, notes = FlowGRPO(steps=3, clip=1e-2).build({reward.name: 1.0}), Notes()
    settings = TrainingSettings(
        iterations=iterations, learning_rate=1e-3, batch=1000, overlap=2, max_missing=0.0
    )
    found = Trainer(
        ToyFlow(algorithm.noise),
        algorithm,
        Scorer([reward], 0.0),
        source(4, 4),
        settings,
        tracker=notes,
        evaluate=lambda iteration: between(iteration) or {},
    )
    found.run()
    return found, notes


def test_a_run_loses_no_sample_to_dying_slow_and_babbling_servers():
    """One of two good servers is killed in the middle; a third is slow, a fourth answers with garbage."""
    here, seen = train(Redness(), 6)
    with running(Redness()) as stays:
        dies = Running([Redness()])
        with (
            pretending(stays, slow) as late,
            pretending(stays, lambda body: (200, os.urandom(200))) as babbles,
            warnings.catch_warnings(record=True) as said,
        ):
            warnings.simplefilter("always")
            reward = Remote(
                "redness",
                (late, dies.url, babbles, stays.url),
                batch=2,
                hedge=0.1,
                **{**QUICK, "timeout": 0.7},
            )
            found, notes = train(reward, 6, lambda iteration: dies.kill() if iteration == 3 else None)
    told = " ".join(str(one.message) for one in said)
    assert f"{dies.url}: " in told
    assert f"{babbles}: an answer that cannot be read" in told
    assert f"{late}: takes more than 0.1 s" in told
    for step, metrics in seen.metrics.items():
        assert notes.metrics[step]["reward/redness/missing"] == 0
        assert notes.metrics[step]["reward/redness"] == metrics["reward/redness"]
        assert notes.metrics[step]["reward/redness/tries"] >= 1
        assert notes.metrics[step]["seconds/reward"] > 0
    for mine, theirs in zip(here.learner.parameters, found.learner.parameters, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.slow
def test_a_process_that_serves_is_killed_and_the_other_goes_on():
    root = Path(__file__).resolve().parents[2]
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    command = [sys.executable, str(root / "scripts/serve_rewards.py"), "jpeg_compressibility", "--port"]
    environment = {**os.environ, "MMALIGN_REWARD_TOKEN": "secret"}
    servers = [subprocess.Popen([*command, str(port)], cwd=root, env=environment) for port in ports]
    try:
        for port in ports:
            for _ in range(300):
                try:
                    httpx.get(f"http://127.0.0.1:{port}/health")
                    break
                except httpx.HTTPError:
                    time.sleep(0.2)
        urls = tuple(f"http://127.0.0.1:{port}" for port in ports)
        remote = Remote("jpeg_compressibility", urls, token="secret", **QUICK)
        shown = Outcome(names(1, 8), torch.rand(8, 3, 16, 16))
        expected = JpegCompressibility()(shown).values
        assert torch.equal(remote(shown).values, expected)
        servers[0].send_signal(signal.SIGKILL)
        servers[0].wait()
        with pytest.warns(RuntimeWarning, match=urls[0]):
            found = [remote(shown).values for _ in range(4)]
        assert all(torch.equal(values, expected) for values in found)
    finally:
        for server in servers:
            server.kill()
            server.wait()
