"""A client of vLLM's OpenAI-compatible API that stamps every token as it arrives.

A token is stamped when the piece of the streamed answer that holds it is read from the socket; tokens of one
piece share a time. Prompts are sent, and tokens received, as ids.
"""

import json
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from evalsuite.core.errors import EngineDied, EvalError, UsageError, first_line
from evalsuite.data.models import Checkpoint
from evalsuite.engines.base import Generated

TIMEOUT = httpx.Timeout(10.0, read=None)  # a long prefill sends nothing for minutes
# of a request: how the ids of the tokens are asked for, the better way first
ID_WAYS: tuple[dict[str, Any], ...] = (
    {"return_token_ids": True},
    {"logprobs": 0, "return_tokens_as_token_ids": True},
)
TOKEN_ID = "token_id:"
PROBE = [0, 0]  # vLLM 0.32's linear attention on the CPU cannot take a prompt of a single token


@dataclass(frozen=True)
class ServedModel:
    """A model as a server lists it; `longest` is the most tokens that prompt and output may have."""

    name: str
    longest: int | None


@dataclass(frozen=True)
class _Event:
    """From a request's thread: None for its first token, then what came of it."""

    place: int
    value: Generated | EvalError | None


class CompletionsClient:
    """Sends requests to one server.

    Args:
        url: without a path.
        explain: given what went wrong and what was heard of it, the error to raise.
    """

    def __init__(self, url: str, explain: Callable[[str, str], EvalError]) -> None:
        self.url = url
        self._explain = explain
        self._http = httpx.Client(base_url=url, timeout=TIMEOUT, limits=httpx.Limits(max_connections=None))
        self._way: dict[str, Any] = {}
        self._model = ""

    def healthy(self) -> bool:
        try:
            return self._http.get("/health").is_success
        except httpx.TransportError:
            return False

    def choose(self, checkpoint: Checkpoint) -> ServedModel:
        """Find the model among those served, and how its server tells the ids of tokens.

        Raises:
            UsageError: the server serves another model, or tells no ids.
            EngineDied: nothing answers.
        """
        models: list[dict[str, Any]] = self.ask("GET", "/v1/models").get("data", [])
        ours = {checkpoint.name, str(checkpoint.folder)}
        served = next((model for model in models if ours & {model.get("id"), model.get("root")}), None)
        if served is None:
            listed = ", ".join(str(model.get("id")) for model in models) or "nothing"
            raise UsageError(
                f"The server at {self.url} serves {listed}, not {checkpoint.name}.",
                todo="name the model as the server does, or give the URL of the server that serves it.",
            )
        self._model = str(served["id"])
        self._way = self._way_to_ids()
        return ServedModel(self._model, served.get("max_model_len"))

    def _way_to_ids(self) -> dict[str, Any]:
        for way in ID_WAYS:
            body = {"model": self._model, "prompt": PROBE, "max_tokens": 1, "ignore_eos": True, **way}
            if token_ids(self.ask("POST", "/v1/completions", body)["choices"][0]):
                return way
        raise UsageError(
            f"The server at {self.url} does not tell the ids of its tokens.",
            cause="it is no vLLM, or an old one.",
            todo="use a server of vLLM 0.26 or later.",
        )

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One request that is not streamed.

        Raises:
            UsageError: the server refuses it, or is no vLLM server.
            EngineDied: nothing answers, or the server failed.
        """
        try:
            response = self._http.request(method, path, json=body)
        except httpx.TransportError as error:
            raise self._lost(error) from error
        if response.is_error:
            raise self._refused(response.status_code, response.text)
        try:
            return response.json()
        except ValueError as error:
            raise UsageError(
                f"{self.url} answers, but not as a vLLM server does.",
                cause=f"{path} is no JSON.",
                todo="check --server-url.",
            ) from error

    def collective_rpc(self, method: str, /, *, args: tuple[Any, ...] = ()) -> Sequence[Any]:
        """Call a method of each of vLLM's workers by name; the server must have its development endpoints.

        Raises:
            UsageError, EngineDied: as `ask`.
        """
        return self.ask("POST", "/collective_rpc", {"method": method, "args": list(args)})["results"]

    def generate(
        self, prompts: Sequence[NDArray[np.int64]], output_len: int, on_first_token: Callable[[], None]
    ) -> list[Generated]:
        """All prompts at once, each on a connection and a thread of its own, as `Generator.generate`."""
        events: queue.Queue[_Event] = queue.Queue()
        gate = threading.Barrier(len(prompts))

        def send(place: int) -> None:
            tokens = prompts[place].tolist()
            gate.wait()
            try:
                result = self._stream(tokens, output_len, partial(events.put, _Event(place, None)))
            except EvalError as error:
                events.put(_Event(place, error))
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                strange = EngineDied(f"{self.url} streams what no vLLM server does.", cause=first_line(error))
                events.put(_Event(place, strange))
            else:
                events.put(_Event(place, result))

        for place in range(len(prompts)):
            threading.Thread(target=send, args=(place,), daemon=True).start()
        results: dict[int, Generated] = {}
        begun = 0
        while len(results) < len(prompts):
            event = events.get()
            if isinstance(event.value, EvalError):
                raise event.value
            if event.value is not None:
                results[event.place] = event.value
                continue
            begun += 1
            if begun == len(prompts):
                on_first_token()
        return [results[place] for place in range(len(prompts))]

    def close(self) -> None:
        self._http.close()

    def _stream(self, prompt: list[int], output_len: int, begun: Callable[[], None]) -> Generated:
        """One request; `begun` is called at its first token."""
        body = {
            "model": self._model, "prompt": prompt, "max_tokens": output_len, "ignore_eos": True,
            "temperature": 0, "stream": True, **self._way,
        }  # fmt: skip
        ids: list[int] = []
        times: list[float] = []
        rest = b""
        submitted = time.monotonic()
        try:
            with self._http.stream("POST", "/v1/completions", json=body) as response:
                if response.is_error:
                    raise self._refused(response.status_code, response.read().decode(errors="replace"))
                for piece in response.iter_raw():
                    now = time.monotonic()
                    *lines, rest = (rest + piece).split(b"\n")
                    new = [token for line in lines for token in self._tokens_of(line)]
                    if new and not ids:
                        begun()
                    ids += new
                    times += [now] * len(new)
        except httpx.TransportError as error:
            raise self._lost(error) from error
        if len(ids) != output_len:
            raise EngineDied(f"The server gave {len(ids)} tokens instead of {output_len}.")
        return Generated(np.array(ids), submitted, np.array(times))

    def _tokens_of(self, line: bytes) -> list[int]:
        """Token ids in one line of a stream of server-sent events."""
        data = line.strip().removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or data == b"[DONE]":
            return []
        event = json.loads(data)
        if "error" in event:
            raise self._refused(int(event["error"].get("code") or 500), data.decode())
        return token_ids(event["choices"][0]) if event.get("choices") else []

    def _lost(self, error: httpx.TransportError) -> EvalError:
        return self._explain(f"No answer from the server at {self.url}.", first_line(error))

    def _refused(self, status: int, text: str) -> EvalError:
        message = _error_message(text)
        if 400 <= status < 500:
            return UsageError(
                "The server refused the request.",
                cause=f"{message} (status {status})",
                todo="change what it objects to, such as --input-len, --output-len or --max-model-len.",
            )
        return self._explain(f"The server at {self.url} failed with status {status}.", message)


def token_ids(choice: dict[str, Any]) -> list[int]:
    """Ids of the tokens in one choice of an answer or of an event; empty where it tells none."""
    if choice.get("token_ids") is not None:
        return [int(token) for token in choice["token_ids"]]
    tokens: list[str] = (choice.get("logprobs") or {}).get("tokens") or []
    return [int(token.removeprefix(TOKEN_ID)) for token in tokens if token.startswith(TOKEN_ID)]


def _error_message(text: str) -> str:
    """What an error answer of the server says."""
    try:
        answer: Any = json.loads(text)
    except ValueError:
        return text.strip()[:400] or "no message"
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message", error) if isinstance(error, dict) else error)
