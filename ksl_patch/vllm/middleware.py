"""Middleware of the API server: closes vLLM's own adapter routes, and gives completions their patch's template."""

from __future__ import annotations

import json
from typing import Any

from starlette.datastructures import State

from ksl_patch.vllm.refusals import RefusalError, refusal

# vLLM's own routes for adapters, and SageMaker's names of them.
_GUARDED = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters")
# Routes of vLLM that take a completion's prompt. SageMaker's takes a patch by this header, and not by the body.
_COMPLETIONS = ("/v1/completions", "/v1/completions/render", "/invocations")
_ADAPTER_HEADER = b"x-amzn-sagemaker-adapter-identifier"
_MAX_BODY = 16 * 2**20


class Middleware:
    """Looks at every HTTP request before vLLM does. guard: whether its own adapter routes are closed."""

    def __init__(self, app: Any, state: State, guard: bool) -> None:
        self._app, self._state, self._guard = app, state, guard

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or pass it on."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._guard and path.startswith(_GUARDED):
            await refusal(403, "this server loads adapters through /v1/patches only.")(scope, receive, send)
        elif path in _COMPLETIONS and scope["method"] == "POST" and hasattr(self._state, "ksl_patch"):
            await self._completion(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _completion(self, scope: Any, receive: Any, send: Any) -> None:
        messages, body = [], b""
        while True:
            message = await receive()
            messages.append(message)
            body += message.get("body", b"")
            if message["type"] != "http.request" or not message.get("more_body") or len(body) > _MAX_BODY:
                break
        if not messages[-1].get("more_body"):
            try:
                content = json.loads(body)
            except (ValueError, RecursionError):
                content = None
            name = content.get("model") if isinstance(content, dict) else None
            if scope["path"].endswith("/invocations"):
                header = dict(scope["headers"]).get(_ADAPTER_HEADER)
                if header is not None:
                    name = header.decode("latin-1")
                elif isinstance(name, str) and name.isascii() and self._state.ksl_patch.is_served(name):
                    # Without it the base answers there, whatever the body names.
                    scope = {**scope, "headers": [*scope["headers"], (_ADAPTER_HEADER, name.encode("latin-1"))]}
            try:
                changed = isinstance(content, dict) and self._state.ksl_patch.apply_template(content, name)
            except RefusalError as error:
                await refusal(error.status, str(error))(scope, receive, send)
                return
            if changed:
                body = json.dumps(content).encode()
                headers = [(k, v) for k, v in scope["headers"] if k != b"content-length"]
                scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
                messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, replay, send)
