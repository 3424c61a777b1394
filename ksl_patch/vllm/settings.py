"""This package's part of vLLM's `--additional-config`, which reaches every process and the compile cache's key."""

from __future__ import annotations

from typing import Any

import msgspec

from ksl_patch.errors import RunError

KEY = "ksl_patch"


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `--additional-config '{"ksl_patch": {...}}'` may hold.

    max_rows: rows that every slot has room for; None for vLLM's `--max-lora-rank`.
    folders: where names that are not loaded are looked up, and what the routes may load from.
    runtime: whether the routes may load, replace and unload. template: whether prompts get the patch's template.
    orgs: users and organisations of the Hub whose patches a request, or the routes, may name.
    by_language: whether a request for the base that says a language gets a patch of it. strict_language: or a 406.
    base_languages: tags of languages that the base speaks itself.
    other_scripts: whether a patch in another script of the language will do. detect_language: whether the text says the
        language where nothing else does. languages: tags by NAME@DIGEST, of patches of which the local store has
        another description.
    page: whether a page for people is at /patches.
    guard: whether vLLM's own routes for adapters, which read any path, are closed.
    key: file of the public key that every patch must be signed with.
    kept_bytes: host memory for patches that were read, in each worker; beyond it a patch that no request in flight
        needs is read again when one does.
    """

    max_rows: int | None = None
    folders: tuple[str, ...] = ()
    orgs: tuple[str, ...] = ()
    runtime: bool = False
    template: bool = False
    by_language: bool = False
    base_languages: tuple[str, ...] = ()
    strict_language: bool = False
    other_scripts: bool = False
    detect_language: bool = False
    languages: dict[str, str | None] = {}
    page: bool = False
    guard: bool = False
    key: str | None = None
    kept_bytes: int = 2 << 30


def read_settings(additional_config: Any) -> Settings:
    """The settings in a vLLM `additional_config`. Raises RunError for what is not one."""
    given = additional_config.get(KEY, {}) if isinstance(additional_config, dict) else {}
    try:
        return msgspec.convert(given, Settings)
    except msgspec.ValidationError as error:
        raise RunError(f"--additional-config has no valid {KEY!r} ({error}).") from error


def embedding_alone(lora_config: Any) -> bool:
    """Whether an engine gives adapters to the input embedding and to nothing else, as `ksl-patch serve` has it."""
    return bool(getattr(lora_config, "ksl_patch_alone", lora_config.target_modules == ["embed_tokens"]))
