"""Texts written by another engine (vLLM, SGLang) behind an OpenAI-compatible endpoint.

The server holds the base model; the weights that are trained reach it as adapter files in a folder that both
see, under a new name after every change, so that no cache of the server can hold what older weights made.
Of each text come the tokens themselves and their log-probabilities, never a text to be tokenized again.

What the endpoint does not prescribe is a `Dialect`: where adapters are loaded, how a request names one, how
tokens are asked for and told.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmalign.contracts import RolloutError, RolloutSettings


@dataclass(frozen=True)
class Request:
    """One text to write: the body of a chat completion without its model, and how long its prompt is."""

    body: Mapping[str, Any]
    prompt_tokens: int


@dataclass(frozen=True)
class Written:
    """The tokens of a text and their log-probabilities in the server."""

    tokens: list[int]
    log_prob: list[float]


@dataclass(frozen=True)
class Dialect:
    """How one kind of server is spoken to.

    wants: what a request asks for, so that tokens are told. named: the model of a request, from base model
    and adapter. read: tokens, their log-probabilities and the length of the prompt from an answer; KeyError
    or TypeError where it lacks them. needs: what such a server must know.
    """

    versioned: bool  # whether endpoints of adapters lie below the version, or beside it
    wants: Mapping[str, Any]
    named: Callable[[str, str], str]
    read: Callable[[Mapping[str, Any]], tuple[list[int], list[float], int]]
    needs: str


def read_vllm(reply: Mapping[str, Any]) -> tuple[list[int], list[float], int]:
    """Ids in a list of their own, log-probabilities where the endpoint has them."""
    choice = reply["choices"][0]
    likely = [float(one["logprob"]) for one in choice["logprobs"]["content"]]
    return [int(number) for number in choice["token_ids"]], likely, len(reply["prompt_token_ids"])


def read_sglang(reply: Mapping[str, Any]) -> tuple[list[int], list[float], int]:
    """Triples of log-probability, id and word in what the engine itself says of a text."""
    told = reply["choices"][0]["meta_info"]
    triples = told["output_token_logprobs"]
    return [int(one[1]) for one in triples], [float(one[0]) for one in triples], int(told["prompt_tokens"])


DIALECTS = {
    "vllm": Dialect(
        versioned=True,
        wants={"return_token_ids": True},
        named=lambda base, adapter: adapter,
        read=read_vllm,
        needs="return_token_ids (vLLM 0.10.2 or later)",
    ),
    "sglang": Dialect(
        versioned=False,
        wants={"return_meta_info": True},
        named=lambda base, adapter: f"{base}:{adapter}",
        read=read_sglang,
        needs="return_meta_info of chat completions (SGLang 0.5.13 has it)",
    ),
}


class RolloutServer:
    """A client of one server, and the adapter of this process in it."""

    def __init__(self, settings: RolloutSettings, model: str) -> None:
        """model: the name of the base model in the server."""
        try:
            import httpx
        except ImportError:
            raise ImportError("policy.rollout needs httpx: pip install 'mmalign[judges]'") from None
        self.settings, self.model, self.dialect = settings, model, DIALECTS[settings.server]
        self._url = settings.url.rstrip("/")
        self._adapters = self._url if self.dialect.versioned else self._url.rpartition("/")[0]
        secret = os.environ.get(settings.key)
        headers = {"Authorization": f"Bearer {secret}"} if secret else {}
        self._client = httpx.Client(headers=headers, timeout=settings.timeout)
        self._faults: tuple[type[Exception], ...] = (httpx.HTTPError,)
        self._loaded: tuple[str, Path] | None = None
        self._known = ""
        self._count = 0

    def check(self) -> None:
        """Raise RolloutError where nobody answers, or the base model is not there."""
        served = [str(one.get("id")) for one in self._ask("GET", f"{self._url}/models").get("data", [])]
        if self.model not in served:
            raise RolloutError(
                f"policy.rollout.model: {self.settings.url} serves {', '.join(served) or 'nothing'}, not "
                f"{self.model}"
            )

    def load(self, fingerprint: str, save: Callable[[Path], None]) -> bool:
        """Give the server the weights that `save` writes, unless it has those of that fingerprint."""
        if fingerprint == self._known:
            return False
        self._count += 1
        name = f"{self.settings.adapter}-{os.getpid()}-{self._count}"
        folder = (Path(self.settings.folder) / name).resolve()
        save(folder)
        told = {"lora_name": name, "lora_path": str(folder)}
        self._ask("POST", f"{self._adapters}/load_lora_adapter", told)
        before, self._loaded, self._known = self._loaded, (name, folder), fingerprint
        if before is not None:
            self._ask("POST", f"{self._adapters}/unload_lora_adapter", {"lora_name": before[0]})
            shutil.rmtree(before[1], ignore_errors=True)
        return True

    def write(self, requests: Sequence[Request]) -> list[Written]:
        """The texts, in the order of the requests; RolloutError where one cannot be had."""
        with ThreadPoolExecutor(min(self.settings.parallel, len(requests)), "rollout") as pool:
            return list(pool.map(self._one, requests))

    def _one(self, request: Request) -> Written:
        model = self.model if self._loaded is None else self.dialect.named(self.model, self._loaded[0])
        wants = {"model": model, "logprobs": True, "n": 1, **self.dialect.wants}
        reply = self._ask("POST", f"{self._url}/chat/completions", {**request.body, **wants})
        try:
            tokens, log_prob, read = self.dialect.read(reply)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise RolloutError(
                f"policy.rollout: the answer of {self.settings.url} does not tell tokens, log-probabilities "
                f"and the length of the prompt ({error!r}); a server of the kind "
                f"{self.settings.server!r} must know {self.dialect.needs}"
            ) from None
        if len(tokens) != len(log_prob) or not tokens:
            raise RolloutError(f"policy.rollout: {len(tokens)} tokens came with {len(log_prob)} logprobs")
        if read != request.prompt_tokens:
            raise RolloutError(
                f"policy.rollout: the server reads a prompt in {read} tokens and this policy in "
                f"{request.prompt_tokens}; both need the same processor, pixel limits and chat template"
            )
        return Written(tokens, log_prob)

    def _ask(self, verb: str, address: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What the server answers; load and errors of the server are waited for, a few times."""
        settings, problem = self.settings, ""
        for attempt in range(settings.retries + 1):
            if attempt:
                time.sleep(min(30.0, settings.pause * 2 ** (attempt - 1)))
            try:
                reply = self._client.request(verb, address, json=body)
            except self._faults as error:
                problem = f"{type(error).__name__}: {error}".rstrip(": ")
                continue
            problem = f"status {reply.status_code}: {reply.text[:200]}"
            if reply.status_code == 200:
                try:
                    found: dict[str, Any] = reply.json()
                    return found
                except ValueError:  # the adapter's endpoints answer in words
                    return {}
            if reply.status_code != 429 and reply.status_code < 500:
                break
        raise RolloutError(f"policy.rollout: {address} gave no answer: {problem}")
