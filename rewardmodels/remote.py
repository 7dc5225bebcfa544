"""A reward that works on other machines: any that `mmalign serve-rewards` serves, on one or several servers.

Outcomes are sent in requests of a few samples, several at a time. A request that fails (refused, timed out,
answered with garbage) goes to the next server after a pause that doubles; one that takes long may be sent to
a second server as well, and the first good answer counts. A server that failed is asked last for a while.
Only when every try has failed do its samples lack a verdict. Answers are kept by their content, if a folder
is named. To a judge of pairs whole groups are sent, and kept. A reward that learns is served frozen: it is
not trained from here.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mmalign.records import Outcome, RewardSignal
from mmalign.verdicts import joined, rows_of
from mmalign.wire import WireError, dump_outcome, dump_signal, mapping_of, pack, signal_of, unpack

TOKEN = "MMALIGN_REWARD_TOKEN"
LONGEST_PAUSE = 30.0


@dataclass
class Server:
    """One server, and when it may be asked first again (time.monotonic)."""

    url: str
    free: float = 0.0


class Unanswered(Exception):
    """A server that gave no usable answer; refused: it would give none to this request later either."""

    def __init__(self, server: Server, said: str, refused: bool = False) -> None:
        super().__init__(f"{server.url}: {said}")
        self.server, self.refused = server, refused


@dataclass
class Remote:
    """A reward served elsewhere, over HTTP."""

    reward: str  # its name on the servers
    servers: tuple[str, ...]  # their addresses, http://host:port
    # Samples a request, or one group if that is more; lower it where a request takes longer than `timeout`.
    batch: int = 16
    parallel: int = 4  # requests at the same time
    timeout: float = 60.0  # seconds after which a request has failed
    retries: int = 4  # further tries of a request that failed
    backoff: float = 0.5  # seconds before the first of them; doubles with each
    rest: float = 30.0  # seconds in which a server that failed is asked only where no other is left
    hedge: float = 0.0  # seconds after which a slow request is also sent to a second server; 0: never
    cache: str = ""  # folder of answers already given; empty: none
    pixels: Literal["float32", "uint8"] = "float32"  # uint8 sends a fourth, rounded to 256 levels
    token: str = ""  # of the servers; empty: that in the environment variable MMALIGN_REWARD_TOKEN

    def __post_init__(self) -> None:
        for name in ("batch", "parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"remote: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("timeout", "backoff"):
            if not getattr(self, name) > 0:
                raise ValueError(f"remote: {name} must be positive, got {getattr(self, name)}")
        if self.retries < 0 or self.hedge < 0:
            raise ValueError(
                f"remote: retries and hedge must not be negative, got {self.retries}, {self.hedge}"
            )
        if self.pixels not in ("float32", "uint8"):
            raise ValueError(f"remote: pixels must be float32 or uint8, got {self.pixels!r}")
        urls = [self.servers] if isinstance(self.servers, str) else list(self.servers)
        if bad := [url for url in urls if not url.startswith(("http://", "https://"))]:
            raise ValueError(f"remote: a server is http://host:port, got {bad[0]!r}")
        if not urls:
            raise ValueError("remote: servers names none")
        try:
            import httpx
            import msgpack  # noqa: F401
        except ImportError:
            raise ImportError("remote rewards need the extra: pip install 'mmalign[serve]'") from None
        token = self.token or os.environ.get(TOKEN, "")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        limits = httpx.Limits(max_connections=4 * self.parallel)
        self._http = httpx.Client(timeout=self.timeout, headers=headers, limits=limits, trust_env=False)
        self._servers = [Server(url.rstrip("/")) for url in urls]
        self._lock, self._next, self._said = threading.Lock(), 0, set[tuple[str, str]]()
        self._random = random.Random()  # of pauses alone
        # Requests that lost a race end by themselves, within `timeout`.
        self._requests = ThreadPoolExecutor(4 * self.parallel, "request")
        said = self._meet()
        self._fingerprint, self.compares = str(said["fingerprint"]), bool(said.get("compares"))
        if said.get("frozen"):
            warnings.warn(
                f"reward {self.reward!r} is served frozen: it scores as a run has left it, and learns "
                "nothing of what pleases it here. Where it is to learn, give it to the run itself",
                RuntimeWarning,
                stacklevel=3,
            )

    @property
    def name(self) -> str:
        return self.reward

    def _meet(self) -> Mapping[str, object]:
        """Ask every server what it serves; gives what they say of the reward. One that is down is said."""
        found: dict[str, str] = {}
        said: Mapping[str, object] = {}
        for server in self._servers:
            try:
                answer = self._http.get(f"{server.url}/describe", timeout=min(self.timeout, 10.0))
                answer.raise_for_status()
                said = answer.json()["rewards"].get(self.reward, {})
                found[server.url] = str(said.get("fingerprint", ""))
            except Exception as error:  # whatever it is, the server is not asked first
                self._complain(server, f"does not describe itself ({error or type(error).__name__})")
                server.free = time.monotonic() + self.rest
        if not found:
            raise ValueError(f"remote: none of the servers {', '.join(s.url for s in self._servers)} answers")
        if lacking := [url for url, fingerprint in found.items() if not fingerprint]:
            raise ValueError(f"remote: {', '.join(lacking)} does not serve {self.reward!r}")
        if len(set(found.values())) > 1:
            raise ValueError(
                f"remote: servers differ in {self.reward!r}, by its settings or their version: {found}"
            )
        return said

    def __call__(self, outcome: Outcome) -> RewardSignal:
        views, known = outcome.views, dict[int, RewardSignal]()

        def learn(rows: Sequence[int], signal: RewardSignal) -> None:
            known.update({row: rows_of(signal, place * views, views) for place, row in enumerate(rows)})

        asked, keys = list[list[int]](), dict[int, str]()
        for rows in self._together(outcome):
            keys[rows[0]] = self._key(outcome, rows) if self.cache else ""
            signal = self._recall(keys[rows[0]], len(rows) * views)
            if signal is None:
                asked.append(rows)
            else:
                learn(rows, signal)
        parts = list(chunks(asked, self.batch))
        with ThreadPoolExecutor(self.parallel, "remote") as pool:
            answers = list(pool.map(lambda part: self._judge(outcome, [*chain(*part)]), parts))
        for part, (signal, answered) in zip(parts, answers, strict=True):
            learn([*chain(*part)], signal)
            if answered and self.cache:
                for rows in part:
                    self._keep(keys[rows[0]], joined(self.name, [known[row] for row in rows]))
        return joined(self.name, [known[row] for row in range(len(outcome.prompts))])

    def _together(self, outcome: Outcome) -> list[list[int]]:
        """The samples that must be in one request: each alone, or those of a group in their order."""
        prompts = outcome.prompts
        if not self.compares:
            return [[row] for row in range(len(prompts))]
        names = list(zip(prompts.group.tolist(), prompts.member.tolist(), strict=True))
        order = sorted(range(len(names)), key=names.__getitem__)
        return [list(rows) for _, rows in groupby(order, lambda row: names[row][0])]

    def _judge(self, outcome: Outcome, rows: Sequence[int]) -> tuple[RewardSignal, bool]:
        """The verdict on some samples, and whether a server gave it."""
        body, count = (
            pack({"outcome": dump_outcome(at(outcome, rows), self.pixels)}),
            len(rows) * outcome.views,
        )
        failed, refused, said = list[Server](), set[str](), ""
        for attempt in range(self.retries + 1):
            if attempt:
                self._pause(attempt)
            try:
                signal, asked = self._race(body, count, failed[-1:])
            except Unanswered as error:
                said = str(error)
                failed.append(error.server)
                refused |= {error.server.url} if error.refused else set()
                if len(refused) == len(self._servers):
                    break
                continue
            told = {"tries": float(attempt + 1), "hedged": float(asked > 1)}
            details = signal.details or [{}] * count
            return replace(signal, details=[{**row, **told} for row in details]), True
        missing = torch.zeros(count, 1, dtype=torch.bool)
        lost = RewardSignal(
            self.name, torch.zeros(count, 1), valid=missing, details=[{"missing": said}] * count
        )
        return lost, False

    def _pause(self, attempt: int) -> None:
        """Wait before a further try: twice as long each time, and not all at once."""
        longest = min(self.backoff * 2 ** (attempt - 1), LONGEST_PAUSE)
        time.sleep(longest * (0.5 + self._random.random() / 2))

    def _race(self, body: bytes, rows: int, avoid: Sequence[Server]) -> tuple[RewardSignal, int]:
        """The first good answer, of one server or, where it is slow, of two; and how many were asked."""
        first = self._choose(avoid)
        running = {self._requests.submit(self._ask, first, body, rows)}
        asked, patience = 1, self.hedge if self.hedge and len(self._servers) > 1 else None
        error: Unanswered | None = None
        while running:
            done, running = wait(running, patience, FIRST_COMPLETED)
            if not done:
                second = self._choose([first])
                self._complain(first, f"takes more than {self.hedge:g} s; a second server is asked as well")
                running = {*running, self._requests.submit(self._ask, second, body, rows)}
                asked, patience = 2, None
            for future in done:
                try:
                    return future.result(), asked
                except Unanswered as failure:
                    error = failure
        assert error is not None
        raise error

    def _choose(self, avoid: Sequence[Server]) -> Server:
        """The next server in turn that has not failed lately; one to be avoided only if there is no other."""
        with self._lock:
            self._next += 1
            turn = [self._servers[(self._next + i) % len(self._servers)] for i in range(len(self._servers))]
        now = time.monotonic()
        return min(turn, key=lambda server: (server.free > now, server in avoid, server.free))

    def _ask(self, server: Server, body: bytes, rows: int) -> RewardSignal:
        """One request; Unanswered if anything is wrong with the answer."""
        import httpx

        try:
            answer = self._http.post(
                f"{server.url}/score/{self.reward}",
                content=body,
                headers={"Content-Type": "application/msgpack"},
            )
        except httpx.HTTPError as error:
            raise self._failure(server, f"{type(error).__name__}: {error}") from None
        if answer.status_code != 200:
            refused = answer.status_code in (400, 413, 422)
            raise self._failure(server, f"status {answer.status_code}: {answer.text[:200]}", refused)
        try:
            message = mapping_of(unpack(answer.content), "answer", ("digest", "verdict", "reasons"))
            if message["digest"] != hashlib.sha256(body).hexdigest():
                raise WireError("the answer is to another request")
            signal = signal_of(message["verdict"], rows)
        except WireError as error:
            raise self._failure(server, f"an answer that cannot be read: {error}") from None
        if signal.name != self.reward:
            raise self._failure(server, f"an answer of {signal.name!r:.80}")
        server.free = 0.0
        return signal

    def _failure(self, server: Server, said: str, refused: bool = False) -> Unanswered:
        if not refused:
            server.free = time.monotonic() + self.rest
        self._complain(server, said)
        return Unanswered(server, said, refused)

    def _complain(self, server: Server, said: str) -> None:
        """Warn once of each kind of trouble with a server."""
        kind = said.partition(":")[0]
        with self._lock:
            new = (server.url, kind) not in self._said
            self._said.add((server.url, kind))
        if new:
            warnings.warn(
                f"reward {self.reward!r}: {server.url}: {said} (said once)", RuntimeWarning, stacklevel=2
            )

    # Answers that were given before.

    def _key(self, outcome: Outcome, rows: Sequence[int]) -> str:
        """A name for all that the verdict on samples that are judged together depends on."""
        part, here = at(outcome, rows), torch.arange(len(rows))
        unnamed = replace(part, prompts=replace(part.prompts, group=torch.zeros_like(here), member=here))
        return hashlib.sha256(
            self._fingerprint.encode() + pack(dump_outcome(unnamed, self.pixels))
        ).hexdigest()

    def _file(self, key: str) -> Path:
        return Path(self.cache) / key[:2] / key[2:]

    def _recall(self, key: str, rows: int) -> RewardSignal | None:
        if not key or not (path := self._file(key)).is_file():
            return None
        try:
            signal = signal_of(unpack(path.read_bytes()), rows)
        except WireError:
            return None  # it is asked for again, and written anew
        return replace(signal, details=[{**row, "cached": 1.0} for row in signal.details or [{}] * rows])

    def _keep(self, key: str, signal: RewardSignal) -> None:
        path = self._file(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        beside.write_bytes(pack(dump_signal(signal)))
        beside.replace(path)


def at(outcome: Outcome, rows: Sequence[int]) -> Outcome:
    """Some samples of an outcome, with all their completions."""
    places = torch.tensor([row * outcome.views + view for row in rows for view in range(outcome.views)])
    media: Tensor | list[str]
    if isinstance(outcome.media, Tensor):
        media = outcome.media[places.to(outcome.media.device)]
    else:
        media = [outcome.media[i] for i in places.tolist()]
    return Outcome(outcome.prompts.take(torch.tensor(list(rows))), media, outcome.views)


def chunks(groups: Sequence[list[int]], size: int) -> Iterator[list[list[int]]]:
    """Groups of samples in parts of at most `size` samples, but of one group at least."""
    part: list[list[int]] = []
    for group in groups:
        if part and sum(map(len, part)) + len(group) > size:
            yield part
            part = []
        part.append(group)
    if part:
        yield part
