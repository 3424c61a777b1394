"""The routes `/v1/patches` of the API server, as one of vLLM's endpoint plugins; what they do is served.py's."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import re
import weakref
from argparse import Namespace
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse
from starlette.datastructures import State
from vllm.lora.resolver import LoRAResolverRegistry

from ksl_patch.errors import DataError
from ksl_patch.patch.by_language import accepted
from ksl_patch.vllm.languages import Languages
from ksl_patch.vllm.middleware import Middleware
from ksl_patch.vllm.refusals import RefusalError, refuse
from ksl_patch.vllm.resolver import PatchResolver
from ksl_patch.vllm.served import Patches, checked_name
from ksl_patch.vllm.settings import read_settings
from ksl_patch.vllm.sources import NamedPatchFile, PatchFile

router = APIRouter(prefix="/v1/patches")


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
        if settings.page:
            app.get("/patches", include_in_schema=False)(show_page)
        app.add_middleware(Middleware, state=app.state, guard=settings.guard, by_language=settings.by_language)
        app.add_exception_handler(RefusalError, refuse)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        """Take the engine and the names that vLLM serves."""
        state.openai_serving_models.lora_resolver_lock = _Locks()
        state.ksl_patch = Patches(engine_client, state.openai_serving_models, read_settings(args.additional_config))
        state.ksl_languages = Languages(state.ksl_patch)
        await state.ksl_patch.start()


async def show_page() -> HTMLResponse:
    """A page on which a person types, chooses a language, and sees base and patch side by side."""
    text = files("ksl_patch.vllm").joinpath("page.html").read_text("utf-8")
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    policy = f"default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src {allowed}"
    headers = {"content-security-policy": f"{policy}; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"}
    return HTMLResponse(text, headers=headers | {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer"})


@router.get("")
async def list_patches(request: Request, language: str | None = None) -> dict[str, Any]:
    """Every patch with its digest, size and requests served.

    language: tags as in `Accept-Language`; says which patch a request of that language would get, and why.
    """
    patches = _patches(request)
    found: dict[str, Any] = {"object": "list", "data": [patches.describe(name) for name in patches.names()]}
    if language is not None:
        try:
            said = accepted(language)
            if said.ignored:
                raise DataError(f"{said.ignored[0][:100]!r} is not a language with a weight, such as 'pt-BR;q=0.5'.")
            choice = request.app.state.ksl_languages.find(said.tags, said.refused)
        except DataError as error:
            raise RefusalError(400, str(error)) from error
        found["choice"] = dataclasses.asdict(choice) | {"is_used": patches.settings.by_language}
    return found


@router.get("/{name:path}")
async def show_patch(name: str, request: Request) -> dict[str, Any]:
    """One patch, with the template it was trained with."""
    return _patches(request).describe(checked_name(name, hub=True), full=True)


@router.post("", status_code=201)
async def load_patch(file: NamedPatchFile, request: Request) -> dict[str, Any]:
    """Serve another patch."""
    patches = _patches(request)
    return patches.describe(await patches.load(file, file.name), full=True)


@router.put("/{name:path}")
async def replace_patch(name: str, file: PatchFile, request: Request) -> dict[str, Any]:
    """Put another patch behind a name, from the next request on."""
    patches = _patches(request)
    await patches.replace(checked_name(name, hub=True), file)
    return patches.describe(name, full=True)


@router.delete("/{name:path}")
async def unload_patch(name: str, request: Request, wait: float = 0.0) -> dict[str, Any]:
    """Forget a patch. wait: seconds to give the requests that use it; 409 when some still do then."""
    patches = _patches(request)
    patches.may_change()
    await patches.unload(checked_name(name, hub=True), min(max(wait, 0.0), 600.0))
    return {"name": name, "unloaded": True}


def _patches(request: Request) -> Patches:
    patches: Patches = request.app.state.ksl_patch
    return patches
