"""A chat client against a server that is slow, overloaded, dead or talks nonsense; and the judge on it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from PIL import Image

from mmalign.claims import Comparison, Difference, Fault, to_json, to_lines
from mmalign.records import Outcome, Prompts
from mmalign.rewardmodels.claimdiff import ClaimDiff, Holistic
from mmalign.rewardmodels.endpoint import Endpoint, Question, said, shown
from mmalign.rewardmodels.vlm_judge import EndpointJudge, rating
from mmalign.scoring import Scorer

Reply = tuple[int, Any]
FOUND = Comparison(
    (Difference("color", "a red dog", "a blue dog", "B", Fault("color_hallucination", "", 3)),), "B"
)


class Server:
    """An endpoint whose answers are a function of (number of the request, its body)."""

    def __init__(self, answer: Callable[[int, dict[str, Any]], Reply]) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    number = len(server.bodies)
                    server.bodies.append(body)
                    server.headers.append(dict(self.headers))
                status, content = answer(number, body)
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def serve():
    made: list[Server] = []

    def start(answer: Callable[[int, dict[str, Any]], Reply]) -> Server:
        made.append(Server(answer))
        return made[-1]

    yield start
    for server in made:
        server.close()


def spoke(text: str, tokens: int | None = 10) -> Reply:
    usage = {} if tokens is None else {"usage": {"total_tokens": tokens}}
    return 200, {"choices": [{"message": {"content": text}}], **usage}


def question(text: str = "hello") -> Question:
    return Question([{"role": "user", "content": text}])


def endpoint(server: Server, **settings: Any) -> Endpoint:
    return Endpoint(server.url, "judge", **{"pause": 0.001, **settings})


def test_answers_come_in_the_order_of_their_questions(serve):
    def slower_first(number: int, body: dict[str, Any]) -> Reply:
        text = body["messages"][0]["content"]
        time.sleep(0.02 * (5 - int(text)))
        return spoke(f"answer {text}")

    server = serve(slower_first)
    found = endpoint(server).ask([question(str(i)) for i in range(5)])
    assert [answer.text for answer in found] == [f"answer {i}" for i in range(5)]
    assert sum(answer.calls for answer in found) == 5
    assert server.bodies[0]["model"] == "judge"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_under_load_is_asked_again(serve, status):
    server = serve(lambda number, body: spoke("yes") if number == 2 else (status, {"error": "later"}))
    (answer,) = endpoint(server).ask([question()])
    assert (answer.text, answer.calls, answer.tokens) == ("yes", 3, 10)


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ((503, {}), "status 503"),
        ((200, b"garbage"), "no chat completion"),
        ((200, {"choices": []}), "no chat"),
    ],
)
def test_a_server_that_never_answers_is_given_up_on(serve, reply, said):
    server = serve(lambda number, body: reply)
    (answer,) = endpoint(server, retries=2).ask([question()])
    assert answer.text is None
    assert said in answer.problem
    assert len(server.bodies) == 3


def test_a_question_that_is_refused_is_not_asked_again(serve):
    server = serve(lambda number, body: (400, {"error": "no such model"}))
    (answer,) = endpoint(server).ask([question()])
    assert "no such model" in answer.problem
    assert len(server.bodies) == 1


def test_a_slow_or_dead_server_is_a_problem_and_no_exception(serve):
    server = serve(lambda number, body: (time.sleep(0.5), spoke("late"))[1])
    (answer,) = endpoint(server, timeout=0.05, retries=0).ask([question()])
    assert answer.text is None
    assert "Timeout" in answer.problem
    (answer,) = Endpoint("http://127.0.0.1:9/v1", "judge", retries=0).ask([question()])
    assert answer.text is None
    assert "Connect" in answer.problem


def test_the_budget_of_calls_is_never_exceeded(serve):
    server = serve(lambda number, body: spoke("yes") if number % 2 else (500, {}))
    client = endpoint(server, calls=7, parallel=8, retries=3)
    found = client.ask([question(str(i)) for i in range(20)])
    assert len(server.bodies) == 7 == client.spent_calls
    lost = [answer for answer in found if answer.text is None]
    assert lost
    assert all("budget" in answer.problem for answer in lost)


def test_the_budget_of_tokens_is_reserved_before_a_question_leaves(serve):
    server = serve(lambda number, body: spoke("yes", 100))
    client = endpoint(server, tokens=1000, longest=100, parallel=4)  # a question reserves 169 at most
    found = client.ask([question() for _ in range(30)])
    assert client.spent_tokens <= 1000
    assert sum(answer.tokens for answer in found) == client.spent_tokens
    assert sum(answer.text is not None for answer in found) >= 5
    unknown = endpoint(serve(lambda number, body: spoke("yes", None)), tokens=1000, longest=100)
    assert sum(answer.text is not None for answer in unknown.ask([question() for _ in range(30)])) == 5


def test_answers_are_kept_by_the_content_of_their_question(serve, tmp_path):
    server = serve(lambda number, body: spoke(f"answer {number}"))
    client = endpoint(server, cache=str(tmp_path))
    first = client.ask([question("a"), question("b")])
    again = endpoint(server, cache=str(tmp_path)).ask([question("a"), question("b")])
    assert [answer.text for answer in again] == [answer.text for answer in first]
    assert [answer.calls for answer in again] == [0, 0]
    assert len(server.bodies) == 2
    replayed = endpoint(server, cache=str(tmp_path), replay=True).ask([question("a"), question("c")])
    assert replayed[0].text == first[0].text
    assert "has no answer" in replayed[1].problem
    assert len(server.bodies) == 2


def test_the_key_is_taken_from_the_environment(serve, monkeypatch):
    server = serve(lambda number, body: spoke("yes"))
    monkeypatch.setenv("MY_KEY", "secret")
    endpoint(server, key="MY_KEY").ask([question()])
    assert server.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"url": "localhost"}, "url must begin"),
        ({"longest": 0}, "longest must be at least 1"),
        ({"calls": -1}, "calls must not be negative"),
        ({"timeout": 0.0}, "timeout must be positive"),
        ({"replay": True}, "name it as cache"),
    ],
)
def test_settings_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        Endpoint(**{"url": "http://localhost/v1", "model": "judge", **wrong})


# The judge


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (40, 20), (200, 10, 10)).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


def outcome(picture: str, *captions: str, reference: str = "a blue dog") -> Outcome:
    count = len(captions)
    extra = {"image": picture, "reference": reference}
    prompts = Prompts(
        ["look"] * count, torch.zeros(count, dtype=torch.int64), torch.arange(count), [extra] * count
    )
    return Outcome(prompts, list(captions))


def claimdiff(server: Server, **settings: Any) -> ClaimDiff:
    given = {"url": server.url, "model": "judge", "endpoint": {"pause": 0.001, "retries": 1}, **settings}
    return ClaimDiff(judge="endpoint", settings=given)


def texts(body: dict[str, Any]) -> list[str]:
    return [part["text"] for part in body["messages"][0]["content"] if part["type"] == "text"]


@pytest.mark.parametrize("form", [to_json, to_lines])
def test_a_judge_sees_picture_and_reference_before_the_caption(serve, picture, form):
    server = serve(lambda number, body: spoke(form(FOUND)))
    signal = claimdiff(server)(outcome(picture, "a red dog"))
    assert float(signal.values) == 0.0
    assert signal.details[0]["claims"][0]["error"] == "color_hallucination"
    content = server.bodies[0]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["text", "image_url", "text", "text"]
    assert texts(server.bodies[0])[1:] == ["B: a blue dog", "A: a red dog"]
    assert content[1]["image_url"]["url"].startswith("data:image/png;base64,")


def test_an_answer_that_cannot_be_read_is_asked_for_again_with_a_temperature(serve, picture):
    server = serve(lambda number, body: spoke(to_json(FOUND) if number == 2 else "I see a dog."))
    assert claimdiff(server)(outcome(picture, "a red dog")).valid.all()
    assert [body["temperature"] > 0 for body in server.bodies] == [False, True, True]


def test_a_judge_that_prefers_a_place_is_cancelled_by_swapping(serve, picture):
    first = Comparison((Difference("style", "x", "y", "A", None, Fault("style_error", "", 1)),), "A")
    server = serve(lambda number, body: spoke(to_json(first)))
    reward = ClaimDiff(
        judge="endpoint",
        mode="relative",
        settings={"url": server.url, "model": "judge", "swap": True, "endpoint": {"pause": 0.001}},
    )
    assert float(reward(outcome(picture, "a red dog")).values) == 0.5
    orders = {tuple(texts(body)[1:]) for body in server.bodies}
    assert orders == {("B: a blue dog", "A: a red dog"), ("A: a blue dog", "B: a red dog")}


def test_several_looks_are_averaged(serve, picture):
    none = Comparison((), "Tie")
    server = serve(lambda number, body: spoke(to_json(FOUND if number % 2 else none)))
    reward = claimdiff(server, looks=4, endpoint={"parallel": 1})
    assert float(reward(outcome(picture, "a red dog")).values) == 0.5
    assert len(server.bodies) == 4
    assert all(body["temperature"] == 0.7 for body in server.bodies)


def test_a_server_can_be_held_to_the_schema(serve, picture):
    server = serve(lambda number, body: spoke(to_json(FOUND)))
    claimdiff(server, structured=True)(outcome(picture, "a red dog"))
    assert server.bodies[0]["response_format"]["json_schema"]["schema"]["required"] == [
        "differences",
        "overall_winner",
    ]


@pytest.mark.filterwarnings("ignore:reward 'claimdiff'")
def test_a_judge_that_fails_in_a_fifth_of_cases_leaves_those_without_a_verdict(serve, picture):
    def flaky(number: int, body: dict[str, Any]) -> Reply:
        return spoke("nonsense") if texts(body)[-1].endswith(("3", "8")) else spoke(to_json(FOUND))

    captions = [f"a red dog {i}" for i in range(10)]
    reward = claimdiff(serve(flaky), attempts=1)
    scores = Scorer([reward], 0.25)(outcome(picture, *captions))
    assert scores.signals[0].valid[:, 0].tolist() == [i not in (3, 8) for i in range(10)]
    assert sum(scores.reasons["claimdiff"].values()) == 2


def test_a_picture_that_cannot_be_read_costs_no_call(serve, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"x")
    server = serve(lambda number, body: spoke(to_json(FOUND)))
    signal = claimdiff(server)(outcome(str(tmp_path / "bad.png"), "a red dog"))
    assert not signal.valid.any()
    assert "cannot be read as a picture" in signal.details[0]["missing"]
    assert not server.bodies


def test_a_rating_is_a_tenth_of_the_number(serve, picture):
    server = serve(lambda number, body: spoke("7"))
    reward = Holistic(judge="endpoint", settings={"url": server.url, "model": "judge"})
    assert float(reward(outcome(picture, "a red dog")).values) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("answer", "number"), [("8", 8), ("I'd say 3, no: 9.5", 9.5), ("10/10", 10), ("Rating: 10.", 10)]
)
def test_numbers_are_read(answer, number):
    assert rating(answer) == number


def test_costs_are_told(serve, picture):
    url = serve(lambda number, body: spoke(to_json(FOUND), 321)).url
    judge = EndpointJudge("judge", url=url, swap=True)
    from mmalign.rewardmodels.caption_judges import Case

    (judged,) = judge.compare([Case("a red dog", "a blue dog", picture)])
    assert (judged.calls, judged.tokens) == (2, 642)


def test_pictures_go_into_messages_no_larger_than_asked():
    part = shown(Image.new("RGB", (300, 100)), 64)
    assert part["type"] == "image_url"
    assert said("x") == {"type": "text", "text": "x"}
