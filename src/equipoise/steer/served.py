"""A client of the server that answers like any other responder (:mod:`equipoise.types`).

So whatever measures a responder can measure what really comes over HTTP: template, policy,
sampling and all. It checks that the setting it asked for is the one that was applied.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2

from equipoise.config import Sampling
from equipoise.errors import ServingError
from equipoise.seeds import derive_seed
from equipoise.steer.responders import setting_key
from equipoise.types import Completion, DialSetting, Prompt

_BUSY_TRIES = 60
_MAX_WAIT_SECONDS = 5.0
_ANSWER_SECONDS = 300.0


class HttpResponder:
    """Asks an equipoise server, several requests at a time.

    Args:
        url: Of the server, e.g. ``http://127.0.0.1:8000``.
        key: API key.
        model: Name in the API, with ``@scenario`` where it is not the key's default.
        attributes: The model's dials, in the order of the settings.
        sampling: ``top_k`` is the server's own and ignored.
        workers: Requests under way.
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
        name: str = "served",
    ) -> None:
        self.name = name
        self.tokens_through_model = 0
        self._model, self._attributes, self._sampling = model, tuple(attributes), sampling
        self._workers = workers
        self._client = httpx2.Client(
            base_url=url,
            headers={"authorization": f"Bearer {key}"},
            timeout=_ANSWER_SECONDS,
            trust_env=False,  # a proxy of the environment is for elsewhere
            # A connection for each request: one that is kept may be closed just as it is used.
            limits=httpx2.Limits(max_keepalive_connections=0),
        )

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
        answer = self._answer(
            {
                "model": self._model,
                "messages": [{"role": m.role, "content": m.content} for m in prompt.messages],
                "dials": asked,
                "temperature": self._sampling.temperature,
                "top_p": self._sampling.top_p,
                "max_tokens": self._sampling.max_tokens,
                "seed": derive_seed(seed, prompt.id, setting_key(setting)),
            }
        )
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

    def _answer(self, body: dict[str, Any]) -> dict[str, Any]:
        why = "too busy"
        for _ in range(_BUSY_TRIES):
            try:
                reply = self._client.post("v1/chat/completions", json=body)
                if reply.status_code == 200:
                    answer: dict[str, Any] = reply.json()
                    return answer
                code = reply.json()["error"]["code"]
            except httpx2.TransportError as error:
                why = type(error).__name__
                break
            except (ValueError, KeyError, TypeError):
                code = "unknown"
            why = f"status {reply.status_code}, code {code}"
            if reply.status_code != 429:
                break
            wait = float(reply.headers.get("retry-after") or 1.0)
            time.sleep(min(wait, _MAX_WAIT_SECONDS))
        raise ServingError(
            "the server gave no answer",
            why=why,
            fix="see that it runs, that the key is right, and what its log says",
        )
