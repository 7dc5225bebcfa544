"""A client for chat models behind an OpenAI-compatible endpoint (vLLM, SGLang, or a service), for judges.

Many questions are asked at once. One that is refused for load (429, 5xx) or takes too long is asked again
after a pause that doubles; what a server says about waiting is kept to. Budgets of calls and tokens are
reserved before a question leaves, so that they are never exceeded. Answers are kept by the content of their
question, if a folder is named, and can be replayed from there alone. A question without an answer has a
reason, and never raises.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

LONGEST_PAUSE = 30.0


@dataclass(frozen=True)
class Question:
    """One conversation that wants an answer.

    messages: as the endpoint takes them. attempt: counts how often the same was asked before, so that an
    answer of no use is not taken from the cache again. schema: JSON schema that the answer must follow, for
    servers that can be held to one.
    """

    messages: Sequence[Mapping[str, Any]]
    temperature: float = 0.0
    attempt: int = 0
    schema: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Answer:
    """What came back: a text, or the problem; and what it cost, nothing where it was known."""

    text: str | None
    problem: str = ""
    calls: int = 0
    tokens: int = 0


@dataclass
class Endpoint:
    """A chat model at an address."""

    url: str  # up to and with the version, http://localhost:8000/v1
    model: str  # name that the server knows it by
    key: str = "OPENAI_API_KEY"  # environment variable that holds the key, where one is needed
    longest: int = 1024  # tokens of an answer, at most
    parallel: int = 8  # questions at the same time
    timeout: float = 60.0  # seconds after which a question has failed
    retries: int = 4  # further tries of a question that failed
    pause: float = 0.5  # seconds before the first of them; doubles
    calls: int = 0  # most that may be sent in all, tries included; 0: any number
    tokens: int = 0  # most that may be spent in all, questions and answers; 0: any number
    image_tokens: int = 2048  # what a picture may cost at most, for the budget
    cache: str | None = None  # folder that answers are kept in
    replay: bool = False  # ask nobody; what is not in the folder has no answer
    spent_calls: int = field(default=0, init=False)
    spent_tokens: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"endpoint: url must begin with http:// or https://, got {self.url!r}")
        for name in ("longest", "parallel", "image_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"endpoint: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("retries", "pause", "calls", "tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"endpoint: {name} must not be negative, got {getattr(self, name)}")
        if not self.timeout > 0:
            raise ValueError(f"endpoint: timeout must be positive, got {self.timeout}")
        if self.replay and self.cache is None:
            raise ValueError("endpoint: replay takes answers from a folder: name it as cache")
        try:
            import httpx
        except ImportError:
            raise ImportError("endpoint needs httpx: pip install 'mmalign[judges]'") from None
        secret = os.environ.get(self.key)
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        self._client = httpx.Client(headers=headers, timeout=self.timeout)
        self._faults: tuple[type[Exception], ...] = (httpx.HTTPError,)
        self._lock = threading.Lock()

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """An answer for each question, in their order."""
        if not questions:
            return []
        with ThreadPoolExecutor(min(self.parallel, len(questions)), "judge") as pool:
            return list(pool.map(self._one, questions))

    def _one(self, question: Question) -> Answer:
        body = self._body(question)
        name = hashlib.sha256(json.dumps([body, question.attempt], sort_keys=True).encode()).hexdigest()
        if (known := self._known(name)) is not None:
            return Answer(known)
        if self.replay:
            return Answer(None, f"the recording {self.cache} has no answer to this")
        calls = tokens = 0
        problem = ""
        for attempt in range(self.retries + 1):
            most = self.longest + self._bound(question)
            if not self._reserve(most):
                problem = "the budget of calls or tokens is spent"
                break
            calls += 1
            text, used, problem, wait = self._send(body)
            tokens += self._settle(most, used)
            if text is not None:
                self._keep(name, text)
                return Answer(text, "", calls, tokens)
            if wait is None:
                break
            if attempt < self.retries:
                doubled = self.pause * 2**attempt * random.uniform(0.75, 1.25)
                time.sleep(min(LONGEST_PAUSE, max(wait, doubled)))
        return Answer(None, problem, calls, tokens)

    def _body(self, question: Question) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(question.messages),
            "temperature": question.temperature,
            "max_tokens": self.longest,
        }
        if question.schema is not None:
            schema = {"name": "answer", "schema": question.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body

    def _send(self, body: Mapping[str, Any]) -> tuple[str | None, int | None, str, float | None]:
        """Text, tokens used, what went wrong, and how long to wait before another try (None: no other)."""
        try:
            reply = self._client.post(f"{self.url.rstrip('/')}/chat/completions", json=body)
        except self._faults as error:
            return None, None, f"{type(error).__name__}: {error}".rstrip(": "), 0.0
        if reply.status_code == 429 or reply.status_code >= 500:
            told = reply.headers.get("retry-after", "")
            return None, 0, f"status {reply.status_code}", float(told) if told.isdecimal() else 0.0
        if reply.status_code != 200:
            return None, 0, f"status {reply.status_code}: {reply.text[:200]}", None
        try:
            found = reply.json()
            text = found["choices"][0]["message"]["content"]
            used = found.get("usage", {}).get("total_tokens")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return None, None, "the answer is no chat completion", 0.0
        if not isinstance(text, str):
            return None, None, "the answer holds no text", 0.0
        return text, used if isinstance(used, int) else None, "", None

    # ---- budget

    def _bound(self, question: Question) -> int:
        """Tokens of a question, at most: no token is shorter than a byte."""
        texts, images = 0, 0
        for message in question.messages:
            content = message["content"]
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part["type"] == "text":
                    texts += len(part["text"].encode())
                else:
                    images += 1
        return texts + images * self.image_tokens + 64 * len(question.messages)

    def _reserve(self, tokens: int) -> bool:
        with self._lock:
            if self.calls and self.spent_calls >= self.calls:
                return False
            if self.tokens and self.spent_tokens + tokens > self.tokens:
                return False
            self.spent_calls += 1
            self.spent_tokens += tokens
            return True

    def _settle(self, reserved: int, used: int | None) -> int:
        """Give back what was not used; where that is not known, all of it counts as used."""
        spent = reserved if used is None else used
        with self._lock:
            self.spent_tokens += spent - reserved
        return spent

    # ---- cache

    def _known(self, name: str) -> str | None:
        if self.cache is None:
            return None
        file = Path(self.cache) / name[:2] / f"{name}.json"
        try:
            text = json.loads(file.read_text(encoding="utf-8"))["text"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return text if isinstance(text, str) else None

    def _keep(self, name: str, text: str) -> None:
        if self.cache is None:
            return
        file = Path(self.cache) / name[:2] / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_name(f".{name}.{os.getpid()}.{threading.get_ident()}")
        beside.write_text(json.dumps({"text": text}), encoding="utf-8")
        beside.replace(file)


def said(text: str) -> dict[str, Any]:
    """A part of a message that is text."""
    return {"type": "text", "text": text}


def shown(picture: Image.Image, side: int = 1024) -> dict[str, Any]:
    """A part of a message that is a picture, as PNG in the message itself; larger ones are made smaller."""
    picture = picture.convert("RGB")
    picture.thumbnail((side, side))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
