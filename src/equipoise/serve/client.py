"""A client of the HTTP door that answers like any other responder (:mod:`equipoise.types`).

So whatever measures a responder can measure what really comes through the door: template, policy,
sampling and all. It checks that the setting it asked for is the one that was applied.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from equipoise.config import Sampling
from equipoise.errors import ServingError
from equipoise.seeds import derive_seed
from equipoise.steer.responders import setting_key
from equipoise.types import Completion, DialSetting, Prompt

_BUSY_TRIES = 60
_MAX_WAIT_SECONDS = 5.0


class HttpResponder:
    """Asks an equipoise server, several requests at a time.

    Args:
        url: Of the server, e.g. ``http://127.0.0.1:8000``.
        key: API key.
        model: Name in the API, with ``@scenario`` where it is not the key's default.
        attributes: The model's dials, in the order of the settings.
        sampling: ``top_k`` is the server's own and ignored.
        workers: Requests under way.
        timeout: Seconds per request.
        name: Row name in reports.
    """

    def __init__(
        self,
        url: str,
        key: str,
        model: str,
        *,
        attributes: Sequence[str],
        sampling: Sampling,
        workers: int = 8,
        timeout: float = 300.0,
        name: str = "served",
    ) -> None:
        self.name = name
        self.tokens_through_model = 0
        self._url, self._key, self._model = urlsplit(url), key, model
        self._attributes, self._sampling = tuple(attributes), sampling
        self._workers, self._timeout = workers, timeout

    def respond(
        self, prompts: Sequence[Prompt], settings: Sequence[DialSetting], *, seed: int
    ) -> list[list[Completion]]:
        """Return completions shaped (P, C).

        Raises:
            ServingError: The server refused, failed, or applied another setting.
        """
        jobs = [
            (prompt, place, setting) for prompt in prompts for place, setting in enumerate(settings)
        ]
        with ThreadPoolExecutor(self._workers) as pool:
            flat = list(pool.map(lambda job: self._one(*job, seed=seed), jobs))
        self.tokens_through_model += sum(tokens for _, tokens in flat)
        width = len(settings)
        rows = [completion for completion, _ in flat]
        return [rows[start : start + width] for start in range(0, len(rows), width)]

    def _one(
        self, prompt: Prompt, place: int, setting: DialSetting, *, seed: int
    ) -> tuple[Completion, int]:
        asked = {
            attribute: "auto" if level is None else {"level": level}
            for attribute, level in zip(self._attributes, setting.levels, strict=True)
        }
        body = {
            "model": self._model,
            "messages": [{"role": m.role, "content": m.content} for m in prompt.messages],
            "dials": asked,
            "temperature": self._sampling.temperature,
            "top_p": self._sampling.top_p,
            "max_tokens": self._sampling.max_tokens,
            "seed": derive_seed(seed, prompt.id, setting_key(setting)),
        }
        answer = self._answer(json.dumps(body).encode())
        choice, applied = answer["choices"][0], answer["dials"]["effective"]
        levels = tuple(
            None if applied[attribute] == "auto" else applied[attribute]["level"]
            for attribute in self._attributes
        )
        if levels != setting.levels:
            raise ServingError(
                "the server applied another setting than was asked for",
                why=f"asked for {setting_key(setting)}, got {setting_key(DialSetting(levels))}",
                fix="ask within the ranges of this key and scenario",
            )
        completion = Completion(
            prompt_id=prompt.id,
            sample_index=place,
            text=choice["message"]["content"],
            finish=choice["finish_reason"],
            n_tokens=answer["usage"]["completion_tokens"],
            model_hash=answer["model_hash"],
            setting=setting,
        )
        return completion, int(answer["usage"]["total_tokens"])

    def _answer(self, body: bytes) -> dict[str, Any]:
        for _ in range(_BUSY_TRIES):
            try:
                status, wait, data = self._post(body)
            except (OSError, HTTPException) as error:
                raise _failed(type(error).__name__) from error
            if status == 200:
                answer: dict[str, Any] = json.loads(data)
                return answer
            if status != 429:
                break
            time.sleep(min(wait, _MAX_WAIT_SECONDS))
        raise _failed(f"status {status}, code {_code(data)}")

    def _post(self, body: bytes) -> tuple[int, float, bytes]:
        kind = HTTPSConnection if self._url.scheme == "https" else HTTPConnection
        connection = kind(self._url.netloc, timeout=self._timeout)
        headers = {"authorization": f"Bearer {self._key}", "content-type": "application/json"}
        try:
            path = f"{self._url.path.rstrip('/')}/v1/chat/completions"
            connection.request("POST", path, body, headers)
            reply = connection.getresponse()
            return reply.status, float(reply.headers.get("retry-after") or 1.0), reply.read()
        finally:
            connection.close()


def _code(data: bytes) -> str:
    try:
        return str(json.loads(data)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return "unknown"


def _failed(why: str) -> ServingError:
    return ServingError(
        "the server gave no answer",
        why=why,
        fix="see that it runs, that the key is right, and what its log says",
    )
