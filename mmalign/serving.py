"""Rewards over HTTP: `mmalign serve-rewards lab jpeg_compressibility --port 8100`.

    GET  /health             alive, and how much it has judged
    GET  /describe           rewards, their settings, a fingerprint of each, limits
    POST /score/{reward}     msgpack {"outcome": ...} (`mmalign.wire`) -> {"digest", "verdict", "reasons"}

A judge of pairs answers by win rates (`mmalign.pairwise`), and needs whole groups in a request: /describe
says that it compares. A reward that learns is served frozen, as a run has left it.

Bodies are msgpack, never pickle, read up to a limit and checked before a reward sees them. A reward judges
one request at a time, in a thread; so many may wait, further ones are told to come again (503). With a token
every request but /health must carry it ("Authorization: Bearer ..."). It speaks plain HTTP: put it behind a
proxy that speaks TLS where others can listen.
"""

import asyncio
import hashlib
import hmac
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmalign import __version__
from mmalign.checkpoints import read_state, weights_of
from mmalign.contracts import LearnedReward, Reward, RewardError, judges_alone
from mmalign.records import Outcome, Prompts, RewardSignal
from mmalign.scoring import verdict
from mmalign.wire import WireError, dump_signal, mapping_of, outcome_of, pack, unpack

MSGPACK = "application/msgpack"


@dataclass(frozen=True)
class ServingSettings:
    """What a server takes."""

    token: str = ""  # that requests must carry; empty: none is asked for
    megabytes: float = 256.0  # of a request's body, at most
    outcomes: int = 4096  # of a request, at most
    waiting: int = 64  # requests of a reward at the same time; more are told to come again
    members: int = (
        256  # of a group that a judge of pairs compares; it answers about members squared questions
    )
    patience: float = 60.0  # seconds in which the body of a request must have come
    device: str = ""  # where pictures are judged; empty: the accelerator, if there is one

    def __post_init__(self) -> None:
        for name in ("megabytes", "outcomes", "waiting", "members", "patience"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


def fingerprint(name: str, settings: Mapping[str, object], reward: Reward | None = None) -> str:
    """Of a reward with its settings, and with what it has learned: equal ones give equal verdicts."""
    learned = [reward.state] if isinstance(reward, Frozen) else []
    said = json.dumps([__version__, name, settings, *learned], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


class Frozen:
    """A reward that learns, as a run has left it: it scores, and offers nothing that could train it."""

    def __init__(self, reward: LearnedReward, state: dict[str, object]) -> None:
        reward.load_state_dict(state)
        self.name, self._reward, self.__doc__ = reward.name, reward, type(reward).__doc__
        self.state = hashlib.sha256(pack(state)).hexdigest()[:16]  # of what it has learned

    def __call__(self, outcome: Outcome) -> RewardSignal:
        return self._reward(outcome)


def freeze(reward: Reward, run: Path | None) -> Reward:
    """The reward, frozen as it was at the last checkpoint of a run if it is one that learns.

    ValueError where there is no run, or none that has taught such a reward.
    """
    if not isinstance(reward, LearnedReward):
        return reward
    if run is None:
        raise ValueError(
            f"{reward.name!r} learns from the run that it judges; it is served as such a run has left it: "
            "--learned RUN"
        )
    taught = read_state(weights_of(run))["ranks"][0]["rewards"]
    if reward.name not in taught:
        raise ValueError(f"{run} has taught {', '.join(taught) or 'no reward'}, not {reward.name!r}")
    return Frozen(reward, taught[reward.name])


@dataclass
class Served:
    """A reward behind the server."""

    reward: Reward
    settings: Mapping[str, object]
    turn: asyncio.Lock
    requests: int = 0
    outcomes: int = 0
    waiting: int = 0


def check_servable(rewards: Sequence[Reward]) -> None:
    """ValueError for rewards that cannot work behind a server."""
    for reward in rewards:
        if isinstance(reward, LearnedReward):
            raise ValueError(f"{reward.name!r} learns: serve it frozen (freeze)")
    names = [reward.name for reward in rewards]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"a server needs rewards with names of their own, got {names}")


def application(
    rewards: Sequence[tuple[Reward, Mapping[str, object]]], settings: ServingSettings | None = None
) -> Any:
    """The ASGI application; rewards: each with the settings that it was made with, for its fingerprint."""
    try:
        from fastapi import FastAPI, Request, Response
        from fastapi.responses import JSONResponse
    except ImportError:
        raise ImportError("serving rewards needs the extra: pip install 'mmalign[serve]'") from None

    settings = settings or ServingSettings()
    check_servable([reward for reward, _ in rewards])
    served = {reward.name: Served(reward, given, asyncio.Lock()) for reward, given in rewards}
    limit, device = int(settings.megabytes * 1e6), device_of(settings)
    app = FastAPI(
        title="mmalign rewards", version=__version__, docs_url=None, redoc_url=None, openapi_url=None
    )

    # Annotations are evaluated as they stand, so that FastAPI sees the classes imported above.
    def refuse(status: int, said: str) -> Any:
        return JSONResponse({"error": said}, status, {"Retry-After": "1"} if status == 503 else None)

    def allowed(request: Any) -> bool:
        given = request.headers.get("authorization", "")
        return not settings.token or hmac.compare_digest(
            given.encode("utf-8", "replace"), f"Bearer {settings.token}".encode()
        )

    async def body_of(request: Any) -> bytes | None:
        """The body, or None if it is too large; never more than the limit is held."""
        said = request.headers.get("content-length", "0")
        if said.isdecimal() and len(said) < 20 and int(said) > limit:
            return None
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > limit:
                return None
            parts.append(part)
        return b"".join(parts)

    def answer(one: Served, body: bytes) -> bytes:
        message = mapping_of(unpack(body), "request", ("outcome",))
        outcome = outcome_of(message["outcome"], settings.outcomes)
        if isinstance(outcome.media, Tensor):
            outcome = replace(outcome, media=outcome.media.to(device))
        if not judges_alone(one.reward):
            check_groups(outcome.prompts, settings.members)
        signal, reasons = verdict(one.reward, outcome)
        one.outcomes += len(signal.values)
        digest = hashlib.sha256(body).hexdigest()
        return pack({"digest": digest, "verdict": dump_signal(signal), "reasons": dict(reasons)})

    async def health() -> Any:
        counts = {name: {"requests": s.requests, "outcomes": s.outcomes} for name, s in served.items()}
        return {"status": "ok", "rewards": counts}

    async def describe(request: Request) -> Any:
        if not allowed(request):
            return refuse(401, "a token is needed: Authorization: Bearer ...")
        return {
            "version": __version__,
            "limits": {"bytes": limit, "outcomes": settings.outcomes},
            "rewards": {
                name: {
                    "fingerprint": fingerprint(name, one.settings, one.reward),
                    "settings": json.loads(json.dumps(dict(one.settings), default=str)),
                    "compares": not judges_alone(one.reward),
                    "frozen": isinstance(one.reward, Frozen),
                    "about": (one.reward.__doc__ or "").split("\n\n")[0].strip(),
                }
                for name, one in served.items()
            },
        }

    async def score(name: str, request: Request) -> Any:
        if not allowed(request):
            return refuse(401, "a token is needed: Authorization: Bearer ...")
        one = served.get(name)
        if one is None:
            return refuse(404, f"there is no reward {name[:80]!r} here; there are {', '.join(served)}")
        if one.waiting >= settings.waiting:
            return refuse(503, f"{one.waiting} requests are waiting for {name}; come again")
        one.waiting += 1
        try:
            async with asyncio.timeout(settings.patience):
                body = await body_of(request)
            if body is None:
                return refuse(413, f"at most {limit} bytes in a request; send fewer outcomes at once")
            async with one.turn:
                found = await asyncio.to_thread(answer, one, body)
        except TimeoutError:
            return refuse(408, f"the request has not come whole within {settings.patience:g} seconds")
        except WireError as error:
            return refuse(400, str(error))
        except RewardError as error:
            return refuse(422, str(error))
        finally:
            one.waiting -= 1
        one.requests += 1
        return Response(found, media_type=MSGPACK)

    app.add_api_route("/health", health)
    app.add_api_route("/describe", describe)
    app.add_api_route("/score/{name}", score, methods=["POST"])
    return app


def device_of(settings: ServingSettings) -> torch.device:
    """Where pictures are judged."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return torch.device(settings.device) if settings.device else found or torch.device("cpu")


def check_groups(prompts: Prompts, most: int) -> None:
    """WireError where a group is too large to be compared, or a name is given twice."""
    group, member = prompts.group.tolist(), prompts.member.tolist()
    if max(Counter(group).values()) > most:
        raise WireError(f"outcome.group: at most {most} members of a group are compared")
    if len(set(zip(group, member, strict=True))) < len(group):
        raise WireError("outcome.member: two samples have the same group and member")


def serve(app: Any, host: str, port: int) -> None:
    """Run the application until stopped."""
    import uvicorn

    uvicorn.run(app, host=host, port=port, log_level="warning", timeout_keep_alive=30, limit_concurrency=512)
