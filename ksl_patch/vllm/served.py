"""The patches that one API server serves: loaded, replaced, unloaded, their templates applied; routes.py has URLs."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import time
import warnings
from pathlib import Path
from typing import Any

from vllm.lora.request import LoRARequest

from ksl_patch.base.model_digests import tokenizer_digest
from ksl_patch.errors import KslPatchError, OtherVocabularyWarning, PatchError
from ksl_patch.patch import Patch, TemplateMeta
from ksl_patch.patch.names import check_name
from ksl_patch.store.hub import HubReference
from ksl_patch.store.local import Store
from ksl_patch.vllm.prompts import Content, Prompts
from ksl_patch.vllm.refusals import RefusalError
from ksl_patch.vllm.resolver import resolved
from ksl_patch.vllm.server_metrics import follow, make_metrics
from ksl_patch.vllm.settings import Settings
from ksl_patch.vllm.sources import PatchFile, open_file

logger = logging.getLogger("vllm.ksl_patch")


class Patches:
    """The patches that one API server serves. Names and requests are vLLM's; what they hold is ours.

    models: vLLM's `OpenAIServingModels`.
    """

    def __init__(self, engine: Any, models: Any, settings: Settings) -> None:
        self.settings = settings
        self._engine, self._models = engine, models
        self._content = functools.lru_cache(maxsize=4096)(_read)
        self._served: dict[str, int] = {}
        self._languages: dict[str, tuple[int, str | None]] = {}  # of what was loaded here: its id, and its language
        self._metrics = make_metrics()
        self._prompts = Prompts(engine, self._metrics)
        self._metrics["loaded"].set_function(lambda: len(self.names()))
        follow(engine.output_processor, self._metrics, self._came)

    async def start(self) -> None:
        """Ask the workers for their bank."""
        banks = await self._engine.collective_rpc("ksl_patch_bank")
        self._metrics["bank"].set(max(bank["bytes"] for bank in banks))
        for name in self.names():
            self.content(name)

    def names(self) -> list[str]:
        """The names that stand for patches now."""
        return [name for name, request in self._models.lora_requests.items() if Path(request.lora_path).is_file()]

    def requests(self) -> tuple[LoRARequest, ...]:
        """All that is served now, in its order: other ones where anything was loaded, replaced or unloaded."""
        return tuple(self._models.lora_requests.values())

    def language(self, name: str) -> str | None:
        """The BCP 47 tag of a patch as it was given: the store has one description for equal rows. Raises a 404."""
        content, own = self.content(name), self._languages.get(name)
        if own is not None and own[0] == self._models.lora_requests[name].lora_int_id:
            return own[1]
        if (key := f"{name}@{content.digest}") in self.settings.languages:
            return self.settings.languages[key]
        return resolved.get((name, self._models.lora_requests[name].lora_path), content.meta.language)

    def is_base(self, name: str) -> bool:
        """Whether a name is the base's."""
        return bool(self._models.is_base_model(name))

    def digest(self, name: str) -> str | None:
        """Of what a name stands for now."""
        try:
            return self.content(name).digest
        except RefusalError:
            return None

    def is_served(self, name: str) -> bool:
        """Whether a name is a patch's or another adapter's."""
        return name in self._models.lora_requests

    def content(self, name: str) -> Content:
        """What a name stands for now. Raises a 404."""
        request = self._models.lora_requests.get(name)
        if request is None or not Path(request.lora_path).is_file():
            raise RefusalError(404, f"no patch named {name[:100]} is loaded.")
        content: Content = self._content(request.lora_path)
        return content

    def describe(self, name: str, *, full: bool = False) -> dict[str, Any]:
        """A patch for the routes."""
        content = self.content(name)
        meta = content.meta
        summary: dict[str, Any] = {
            "name": name,
            "digest": content.digest,
            "language": self.language(name),
            "side": meta.side,
            "rows": len(content.token_ids),
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
            raise RefusalError(403, message)

    async def load(self, file: PatchFile, name: str | None) -> str:
        """Put a patch behind a new name."""
        patch = await self._read(file)
        name = checked_name(name or patch.meta.name)
        async with self._models.lora_resolver_lock[name]:
            if self._models.is_base_model(name) or name in self._models.lora_requests:
                raise RefusalError(409, f"{name} is served already: replace it, or choose another name.")
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
                raise RefusalError(409, f"{running} requests use {name}: wait for them with ?wait=SECONDS.")
            await asyncio.sleep(0.02)

    def apply_template(self, body: dict[str, Any], name: Any) -> bool:
        """Give a completion's prompts the template of its patch; whether anything was changed.

        Raises RefusalError where the template needs more than a sentence.
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
            raise RefusalError(
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
        except RefusalError:
            return None

    def _came(self, request: LoRARequest, prompt: str | None, token_ids: list[int] | None) -> None:
        """A request for a patch, or another adapter; what it began with may be replaced by now."""
        name = request.lora_name
        self._served[name] = self._served.get(name, 0) + 1
        if Path(request.lora_path).is_file():
            self._prompts.came(name, self._content(request.lora_path), prompt, token_ids)

    async def _read(self, file: PatchFile) -> Patch:
        self.may_change()
        if sum(where is not None for where in (file.path, file.digest, file.hub)) != 1:
            raise RefusalError(400, "give one of the path, the digest, and the Hub's reference of a patch.")
        try:
            patch = await asyncio.to_thread(open_file, file, self.settings)
            tokenizer = self._engine.tokenizer
            if tokenizer is not None:
                await asyncio.to_thread(_check_vocabulary, patch, tokenizer)
        except KslPatchError as error:
            raise RefusalError(400, str(error)) from error
        return patch

    async def _add(self, name: str, patch: Patch) -> LoRARequest:
        """Load a patch into the engine under an id that no other content ever had."""
        try:
            path = await asyncio.to_thread(Store().add, patch)
            base = self._models.base_model_paths[0].name
            request = LoRARequest(name, self._models.lora_id_counter.inc(1), str(path), base_model_name=base)
            await self._engine.add_lora(request)
        except KslPatchError as error:
            raise RefusalError(400, str(error)) from error
        except Exception as error:
            if self._engine.errored:
                raise
            raise RefusalError(400, _reason(error)) from error
        self._languages[name] = request.lora_int_id, patch.meta.language
        return request

    def _in_flight(self, name: str) -> int:
        return sum(state.lora_name == name for state in self._engine.output_processor.request_states.values())


def checked_name(name: str, *, hub: bool = False) -> str:
    """A patch's name. hub: or a reference to the Hub, as a request may have had it. Raises a 400."""
    try:
        if hub and "/" in name:
            HubReference.parse(name)
        else:
            check_name(name)
    except PatchError as error:
        raise RefusalError(400, str(error)) from error
    return name


def _read(path: str) -> Content:
    patch = Patch.load(path)
    return Content(patch.digest, patch.meta, frozenset(patch.token_ids.tolist()), patch.nbytes)


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
