"""The prompts that reach the engine with a patch: whether they are its template's, and what it changes in them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from ksl_patch.patch import PatchMeta

logger = logging.getLogger("vllm.ksl_patch")

_DECODED = 16  # of a patch's prompts whose text vLLM does not say, those that are looked at


@dataclass(frozen=True)
class Content:
    """What a file of the store says."""

    digest: str
    meta: PatchMeta
    token_ids: frozenset[int]
    nbytes: int


class Prompts:
    """Counts what patches change in prompts, and warns, once for each content, of what has little or no effect.

    engine: whose tokenizer says what token ids are. metrics: "patched" and "unaffected" count.
    """

    def __init__(self, engine: Any, metrics: dict[str, Any]) -> None:
        self._engine, self._metrics = engine, metrics
        self._warned: set[tuple[str, str]] = set()
        self._looked_at: dict[str, int] = {}

    def came(self, name: str, content: Content, prompt: str | None, token_ids: list[int] | None) -> None:
        """A request for a patch. prompt, token_ids: as far as they are known."""
        self._count(name, content, token_ids)
        self._look_at(name, content, prompt, token_ids)

    def _once(self, what: str, content: Content) -> bool:
        """Whether this is not said yet."""
        key = (what, content.digest)
        if key in self._warned:
            return False
        self._warned.add(key)
        return True

    def _count(self, name: str, content: Content, token_ids: list[int] | None) -> None:
        if token_ids is None:
            return
        positions = sum(map(content.token_ids.__contains__, token_ids))
        self._metrics["patched"].labels(patch=name).inc(positions)
        if positions or content.meta.side != "input":
            return
        self._metrics["unaffected"].labels(patch=name).inc()
        if self._once("effect", content):
            logger.warning(
                "ksl_patch: a prompt for %r has none of the patch's %d tokens, so the base answers it until an answer "
                "has one; ksl_patch:requests_without_effect_total counts such requests (said once).",
                name,
                len(content.token_ids),
            )

    def _look_at(self, name: str, content: Content, prompt: str | None, token_ids: list[int] | None) -> None:
        """Warn of a prompt of any route that the patch's template could not have given."""
        template, digest = content.meta.template, content.digest
        if template is None or ("template", digest) in self._warned:
            return
        if prompt is None:
            looked_at = self._looked_at[digest] = self._looked_at.get(digest, 0) + 1
            if looked_at > _DECODED or token_ids is None or self._engine.tokenizer is None:
                return
            prompt = self._engine.tokenizer.decode(token_ids)
            first = template.pieces()[0]
            # Without the token that a text begins with, which a template that is none of a chat's does not have.
            prompt = prompt[max(prompt.find(first), 0) :]
        if not template.matches(prompt) and self._once("template", content):
            logger.warning(
                "ksl_patch: a prompt for %r does not match the template that the patch was trained with, which "
                "GET /v1/patches/%s shows and --apply-template gives to completions (said once).",
                name,
                name,
            )
