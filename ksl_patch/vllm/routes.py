"""What the API server gets: `/v1/patches`, prompt templates, and metrics. One of vLLM's endpoint plugins."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import logging
import time
import warnings
import weakref
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from prometheus_client import Counter, Gauge, Histogram
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import State
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolverRegistry

from ksl_patch.base.digest import tokenizer_digest
from ksl_patch.errors import KslPatchError, OtherVocabularyWarning, PatchError, RunError
from ksl_patch.patch import Patch, PatchMeta, TemplateMeta
from ksl_patch.patch.names import check_name
from ksl_patch.store.hub import HubReference
from ksl_patch.store.local import Store
from ksl_patch.vllm.resolver import PatchResolver, from_folders, from_hub, from_store
from ksl_patch.vllm.settings import Settings, read_settings

logger = logging.getLogger("vllm.ksl_patch")
router = APIRouter(prefix="/v1/patches")

# vLLM's own routes for adapters, and SageMaker's names of them.
_GUARDED = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/adapters")
# Routes of vLLM that take a completion's prompt. SageMaker's takes a patch by this header, and not by the body.
_COMPLETIONS = ("/v1/completions", "/v1/completions/render", "/invocations")
_ADAPTER_HEADER = b"x-amzn-sagemaker-adapter-identifier"
_MAX_BODY = 16 * 2**20
_DECODED = 16  # of a patch's prompts whose text vLLM does not say, those that are looked at
_LATENCY = {"buckets": (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)}


class PatchFile(BaseModel):
    """What to load: a file's path, in the configured folders, a digest of the local store, or ORG/REPO of the Hub."""

    model_config = ConfigDict(extra="forbid")
    path: str | None = Field(None, max_length=4096)
    digest: str | None = Field(None, max_length=64)
    hub: str | None = Field(None, max_length=1024)


class NamedPatchFile(PatchFile):
    """The same and the name it is to have; by default its own."""

    name: str | None = Field(None, max_length=96)


@dataclass(frozen=True)
class _Content:
    """What a file of the store says."""

    digest: str
    meta: PatchMeta
    rows: int
    nbytes: int


class _RefusalError(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Locks(weakref.WeakValueDictionary[str, asyncio.Lock]):
    """vLLM's locks by name, which go when nobody holds them: names come from requests."""

    def __getitem__(self, name: str) -> asyncio.Lock:
        return self.setdefault(name, asyncio.Lock())


class PatchRoutes:
    """The plugin: it adds the routes and the middleware, and begins when the engine is up."""

    name = "ksl_patch"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes. The resolver must be known before vLLM's own state is made."""
        settings = read_settings(getattr(app.state.args, "additional_config", None))
        if settings.folders or settings.orgs:
            LoRAResolverRegistry.register_resolver("ksl_patch", PatchResolver(settings))
        app.include_router(router)
        app.add_middleware(Prompts, state=app.state, guard=settings.guard)
        app.add_exception_handler(_RefusalError, _refuse)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Take the engine and the names that vLLM serves."""
        state.openai_serving_models.lora_resolver_lock = _Locks()
        state.ksl_patch = Patches(engine_client, state.openai_serving_models, read_settings(args.additional_config))
        await state.ksl_patch.start()


class Patches:
    """The patches that one API server serves. Names and requests are vLLM's; what they hold is ours.

    models: vLLM's `OpenAIServingModels`.
    """

    def __init__(self, engine: Any, models: Any, settings: Settings) -> None:
        self.settings = settings
        self._engine, self._models = engine, models
        self._content = functools.lru_cache(maxsize=4096)(_read)
        self._warned: set[str] = set()
        self._looked_at: dict[str, int] = {}
        self._served: dict[str, int] = {}
        self._metrics = _metrics()
        self._metrics["loaded"].set_function(lambda: len(self.names()))
        self._count(engine.output_processor)

    async def start(self) -> None:
        """Ask the workers for their bank."""
        banks = await self._engine.collective_rpc("ksl_patch_bank")
        self._metrics["bank"].set(max(bank["bytes"] for bank in banks))
        for name in self.names():
            self.content(name)

    def names(self) -> list[str]:
        """The names that stand for patches now."""
        return [name for name, request in self._models.lora_requests.items() if Path(request.lora_path).is_file()]

    def is_served(self, name: str) -> bool:
        """Whether a name is a patch's or another adapter's."""
        return name in self._models.lora_requests

    def content(self, name: str) -> _Content:
        """What a name stands for now. Raises a 404."""
        request = self._models.lora_requests.get(name)
        if request is None or not Path(request.lora_path).is_file():
            raise _RefusalError(404, f"no patch named {name[:100]} is loaded.")
        content: _Content = self._content(request.lora_path)
        return content

    def describe(self, name: str, *, full: bool = False) -> dict[str, Any]:
        """A patch for the routes."""
        content = self.content(name)
        meta = content.meta
        summary: dict[str, Any] = {
            "name": name,
            "digest": content.digest,
            "language": meta.language,
            "side": meta.side,
            "rows": content.rows,
            "bytes": content.nbytes,
            "requests": self._served.get(name, 0),
            "in_flight": self._in_flight(name),
        }
        if full:
            template = meta.template
            summary["template"] = None if template is None else dataclasses.asdict(template)
            summary |= {"licence": meta.licence, "created": meta.created, "base": meta.base.model_id}
        return summary

    def may_change(self) -> None:
        """Raise a 403 where patches are fixed."""
        if not self.settings.runtime:
            message = "patches are fixed on this server: it was started without --allow-runtime-patches."
            raise _RefusalError(403, message)

    async def load(self, file: PatchFile, name: str | None) -> str:
        """Put a patch behind a new name."""
        patch = await self._read(file)
        name = _named(name or patch.meta.name)
        async with self._models.lora_resolver_lock[name]:
            if self._models.is_base_model(name) or name in self._models.lora_requests:
                raise _RefusalError(409, f"{name} is served already: replace it, or choose another name.")
            with self._metrics["load"].time():
                self._models.lora_requests[name] = await self._add(name, patch)
        return name

    async def replace(self, name: str, file: PatchFile) -> None:
        """Put another content behind a name, for the requests that come; those in flight keep theirs."""
        patch = await self._read(file)
        async with self._models.lora_resolver_lock[name]:
            self.content(name)
            with self._metrics["replace"].time():
                self._models.lora_requests[name] = await self._add(name, patch)

    async def unload(self, name: str, wait: float) -> None:
        """Forget a name, once no request uses it."""
        until = time.monotonic() + wait
        while True:
            async with self._models.lora_resolver_lock[name]:
                self.content(name)
                running = self._in_flight(name)
                if not running:
                    del self._models.lora_requests[name]
                    return
            if time.monotonic() >= until:
                raise _RefusalError(409, f"{running} requests use {name}: wait for them with ?wait=SECONDS.")
            await asyncio.sleep(0.02)

    def prompts(self, body: dict[str, Any], name: Any) -> bool:
        """Give a completion's prompts the template of its patch; whether anything was changed.

        Raises _RefusalError where the template needs more than a sentence.
        """
        prompts = body.get("prompt")
        if not self.settings.template or not isinstance(name, str) or not prompts:
            return False
        one = isinstance(prompts, str)
        texts = [prompts] if one else prompts
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            return False
        template = self._template(name)
        if template is None:
            return False
        others = not all(map(template.matches, texts))
        if others and template.fields:
            raise _RefusalError(
                400,
                f"the template of {name} has {', '.join(map(repr, template.fields))} beside the sentence: send the "
                f"whole prompt, as GET /v1/patches/{name} shows it.",
            )
        texts = [text if template.matches(text) else template.render(text) for text in texts]
        body["prompt"] = texts[0] if one else texts
        if template.chat:
            body["add_special_tokens"] = False
        stops = body.get("stop_token_ids") or []
        if template.end_token_id is not None and isinstance(stops, list):  # vLLM refuses others
            body["stop_token_ids"] = [*stops, template.end_token_id]
        return True

    def _template(self, name: str) -> TemplateMeta | None:
        try:
            return self.content(name).meta.template
        except _RefusalError:
            return None

    def _look_at(self, name: str, prompt: str | None, token_ids: list[int] | None) -> None:
        """Warn, once for each patch, of a prompt of any route that its template could not have given."""
        template = self._template(name)
        digest = None if template is None else self.content(name).digest
        if template is None or digest is None or digest in self._warned:
            return
        if prompt is None:
            looked_at = self._looked_at[digest] = self._looked_at.get(digest, 0) + 1
            if looked_at > _DECODED or token_ids is None or self._engine.tokenizer is None:
                return
            prompt = self._engine.tokenizer.decode(token_ids)
            first = template.pieces()[0]
            # Without the token that a text begins with, which a template that is none of a chat's does not have.
            prompt = prompt[max(prompt.find(first), 0) :]
        if not template.matches(prompt):
            self._warned.add(digest)
            logger.warning(
                "ksl_patch: a prompt for %r does not match the template that the patch was trained with, which "
                "GET /v1/patches/%s shows and --apply-template gives to completions (said once).",
                name,
                name,
            )

    async def _read(self, file: PatchFile) -> Patch:
        self.may_change()
        if sum(where is not None for where in (file.path, file.digest, file.hub)) != 1:
            raise _RefusalError(400, "give one of the path, the digest, and the Hub's reference of a patch.")
        try:
            patch = await asyncio.to_thread(_open, file, self.settings)
            tokenizer = self._engine.tokenizer
            if tokenizer is not None:
                await asyncio.to_thread(_check_vocabulary, patch, tokenizer)
        except KslPatchError as error:
            raise _RefusalError(400, str(error)) from error
        return patch

    async def _add(self, name: str, patch: Patch) -> LoRARequest:
        """Load a patch into the engine under an id that no other content ever had."""
        try:
            path = await asyncio.to_thread(Store().add, patch)
            base = self._models.base_model_paths[0].name
            request = LoRARequest(name, self._models.lora_id_counter.inc(1), str(path), base_model_name=base)
            await self._engine.add_lora(request)
        except KslPatchError as error:
            raise _RefusalError(400, str(error)) from error
        except Exception as error:
            if self._engine.errored:
                raise
            raise _RefusalError(400, _reason(error)) from error
        return request

    def _in_flight(self, name: str) -> int:
        return sum(state.lora_name == name for state in self._engine.output_processor.request_states.values())

    def _count(self, processor: Any) -> None:
        """Count requests when they come and tokens when they end, by patch, on this server's output processor."""
        add, finish = processor.add_request, processor._update_stats_from_finished

        @functools.wraps(add)
        def adding(request: Any, *args: Any, **kwargs: Any) -> Any:
            if request.lora_request is not None:
                name = request.lora_request.lora_name
                self._served[name] = self._served.get(name, 0) + 1
                self._metrics["requests"].labels(patch=name).inc()
                self._look_at(name, args[0] if args else kwargs.get("prompt"), request.prompt_token_ids)
            return add(request, *args, **kwargs)

        @functools.wraps(finish)
        def finishing(req_state: Any, *args: Any, **kwargs: Any) -> Any:
            if req_state.lora_name is not None:
                self._metrics["prompt"].labels(patch=req_state.lora_name).inc(req_state.prompt_len)
                tokens = req_state.detokenizer.num_output_tokens() if req_state.detokenizer else 0
                self._metrics["generation"].labels(patch=req_state.lora_name).inc(tokens)
            return finish(req_state, *args, **kwargs)

        processor.add_request, processor._update_stats_from_finished = adding, finishing


class Prompts:
    """ASGI middleware: closes vLLM's own adapter routes, and gives completions the patch's template."""

    def __init__(self, app: Any, state: State, guard: bool) -> None:
        self._app, self._state, self._guard = app, state, guard

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or pass it on."""
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._guard and path.startswith(_GUARDED):
            await _error(403, "this server loads adapters through /v1/patches only.")(scope, receive, send)
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
                changed = isinstance(content, dict) and self._state.ksl_patch.prompts(content, name)
            except _RefusalError as error:
                await _error(error.status, str(error))(scope, receive, send)
                return
            if changed:
                body = json.dumps(content).encode()
                headers = [(k, v) for k, v in scope["headers"] if k != b"content-length"]
                scope = {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
                messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Any:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, replay, send)


@router.get("")
async def list_patches(request: Request) -> dict[str, Any]:
    """Every patch with its digest, size and requests served."""
    patches = _patches(request)
    return {"object": "list", "data": [patches.describe(name) for name in patches.names()]}


@router.get("/{name:path}")
async def show_patch(name: str, request: Request) -> dict[str, Any]:
    """One patch, with the template it was trained with."""
    return _patches(request).describe(_named(name, hub=True), full=True)


@router.post("", status_code=201)
async def load_patch(file: NamedPatchFile, request: Request) -> dict[str, Any]:
    """Serve another patch."""
    patches = _patches(request)
    return patches.describe(await patches.load(file, file.name), full=True)


@router.put("/{name:path}")
async def replace_patch(name: str, file: PatchFile, request: Request) -> dict[str, Any]:
    """Put another patch behind a name, from the next request on."""
    patches = _patches(request)
    await patches.replace(_named(name, hub=True), file)
    return patches.describe(name, full=True)


@router.delete("/{name:path}")
async def unload_patch(name: str, request: Request, wait: float = 0.0) -> dict[str, Any]:
    """Forget a patch. wait: seconds to give the requests that use it; 409 when some still do then."""
    patches = _patches(request)
    patches.may_change()
    await patches.unload(_named(name, hub=True), min(max(wait, 0.0), 600.0))
    return {"name": name, "unloaded": True}


def _patches(request: Request) -> Patches:
    patches: Patches = request.app.state.ksl_patch
    return patches


def _named(name: str, *, hub: bool = False) -> str:
    """A patch's name. hub: or a reference to the Hub, as a request may have had it. Raises a 400."""
    try:
        if hub and "/" in name:
            HubReference.parse(name)
        else:
            check_name(name)
    except PatchError as error:
        raise _RefusalError(400, str(error)) from error
    return name


def _open(file: PatchFile, settings: Settings) -> Patch:
    if file.digest is not None:
        return from_store(file.digest, settings)
    if file.hub is not None:
        return from_hub(file.hub, settings)
    if "\0" in (file.path or ""):
        raise RunError("the path has a NUL in it.")
    return from_folders(Path(file.path or ""), settings)


def _read(path: str) -> _Content:
    patch = Patch.load(path)
    return _Content(patch.digest, patch.meta, len(patch.token_ids), patch.nbytes)


@functools.cache
def _vocabulary(tokenizer: Any) -> str:
    return tokenizer_digest(tokenizer)


def _check_vocabulary(patch: Patch, tokenizer: Any) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", OtherVocabularyWarning)
        patch.check_vocabulary(tokenizer, _vocabulary(tokenizer))
    for each in said:
        logger.warning("%s", each.message)


def _reason(error: Exception) -> str:
    """The loader's sentence in what vLLM's layers made of it."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = next((line for line in lines if "Error" in line), lines[0])
    return text.split("method failed: ")[-1].split("Error: ")[-1].split("Error('")[-1].strip(" '\")")


def _error(status: int, message: str) -> JSONResponse:
    kind = {403: "PermissionDeniedError", 404: "NotFoundError", 409: "ConflictError"}.get(status, "BadRequestError")
    return JSONResponse({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, _RefusalError)
    return _error(error.status, str(error))


@functools.cache
def _metrics() -> dict[str, Any]:
    by_patch = {"labelnames": ("patch",)}
    return {
        "loaded": Gauge("ksl_patch:patches_loaded", "Patches served by name.", multiprocess_mode="max"),
        "bank": Gauge("ksl_patch:bank_bytes", "Bytes of the bank on each device.", multiprocess_mode="max"),
        "requests": Counter("ksl_patch:requests", "Requests by patch.", **by_patch),
        "prompt": Counter("ksl_patch:prompt_tokens", "Prompt tokens of finished requests by patch.", **by_patch),
        "generation": Counter("ksl_patch:generation_tokens", "Generated tokens by patch.", **by_patch),
        "load": Histogram("ksl_patch:load_seconds", "Time to load a patch into the engine.", **_LATENCY),
        "replace": Histogram("ksl_patch:replace_seconds", "Time to replace a patch in the engine.", **_LATENCY),
    }
