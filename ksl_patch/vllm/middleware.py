"""Middleware of the API server: closes vLLM's adapter routes, chooses by language, and applies patches' templates."""

from __future__ import annotations

import json
from typing import Any

from starlette._utils import get_route_path
from starlette.datastructures import State

from ksl_patch.vllm.languages import Answer
from ksl_patch.vllm.refusals import RefusalError, refusal

# vLLM's own routes for adapters, and SageMaker's names of them.
_GUARDED = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters")
# Routes of vLLM that take a completion's prompt. SageMaker's takes a patch by this header, and not by the body.
_COMPLETIONS = ("/v1/completions", "/v1/completions/render", "/invocations")
_ADAPTER_HEADER = b"x-amzn-sagemaker-adapter-identifier"
# Others that answer, and name a model.
_CHATS = (
    "/v1/chat/completions", "/v1/chat/completions/render", "/v1/chat/completions/batch", "/v1/responses",
    "/v1/responses/render", "/v1/messages", "/v1/messages/render", "/cohere/v2/chat", "/inference/v1/generate",
)  # fmt: skip
_MAX_BODY = 64 * 2**20


class Middleware:
    """Looks at every HTTP request before vLLM does. guard: whether its own adapter routes are closed.

    by_language: whether requests for the base may get a patch of their language.
    """

    def __init__(self, app: Any, state: State, *, guard: bool, by_language: bool) -> None:
        self._app, self._state, self._guard = app, state, guard
        self._by_language = by_language
        self._read = (*_COMPLETIONS, *_CHATS) if by_language else _COMPLETIONS

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or pass it on."""
        path = get_route_path(scope) if "path" in scope else ""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._guard and path.startswith(_GUARDED):
            await refusal(403, "this server loads adapters through /v1/patches only.")(scope, receive, send)
        elif path in self._read and scope["method"] == "POST" and hasattr(self._state, "ksl_patch"):
            await self._generation(scope, receive, send, path)
        else:
            await self._app(scope, receive, send)

    async def _generation(self, scope: Any, receive: Any, send: Any, path: str) -> None:
        messages, length = [], 0
        while True:
            message = await receive()
            messages.append(message)
            length += len(message.get("body", b""))
            if message["type"] != "http.request" or not message.get("more_body") or length > _MAX_BODY:
                break
        if messages[-1].get("more_body"):
            await refusal(413, f"a request has at most {_MAX_BODY:,} bytes.")(scope, receive, send)
            return
        body = b"".join(message.get("body", b"") for message in messages)
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            content = None
        if isinstance(content, dict):
            try:
                scope, answer, changed = self._changed(scope, content, path)
            except RefusalError as error:
                await refusal(error.status, str(error))(scope, receive, send)
                return
            if changed:
                body = json.dumps(content).encode()
                headers = [(k, v) for k, v in scope["headers"] if k != b"content-length"]
                scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
                messages = [{"type": "http.request", "body": body, "more_body": False}]
            if answer is not None:
                send = self._saying(answer, send)

        async def replay() -> Any:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, replay, send)

    def _changed(self, scope: Any, content: dict[str, Any], path: str) -> tuple[Any, Answer | None, bool]:
        """Choose and write a request anew: its scope, who answers by language, and whether its body is another.

        Raises RefusalError.
        """
        patches, header, answer = self._state.ksl_patch, None, None
        if path == "/invocations":
            header = dict(scope["headers"]).get(_ADAPTER_HEADER)
        keys = len(content)
        if self._by_language and header is None:
            answer = self._state.ksl_languages.choose(scope["headers"], content)
        changed = len(content) != keys or (answer is not None and answer.choice.name is not None)
        name = content.get("model") if header is None else header.decode("latin-1")
        in_body = path == "/invocations" and header is None
        if in_body and isinstance(name, str) and name.isascii() and patches.is_served(name):
            # Without it the base answers there, whatever the body names.
            scope = {**scope, "headers": [*scope["headers"], (_ADAPTER_HEADER, name.encode("latin-1"))]}
        if path in _COMPLETIONS:
            changed = patches.apply_template(content, name) or changed
        return scope, answer, changed

    def _saying(self, answer: Answer, send: Any) -> Any:
        """A `send` whose response says who answers."""

        async def saying(message: Any) -> None:
            if message["type"] == "http.response.start":
                name, succeeds = answer.choice.name, message["status"] < 400
                now = None if name is None else self._state.ksl_patch.digest(name)
                own = answer.headers(now, succeeds=succeeds)
                message = {**message, "headers": [*message.get("headers", ()), *own]}
            await send(message)

        return saying
