"""vLLM's own flags and VLLM_PLUGINS, as far as `ksl-patch serve` reads and extends them, without vLLM."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from typing import Any, NamedTuple, NoReturn

from ksl_patch.errors import RunError
from ksl_patch.vllm.settings import KEY


class Flags(NamedTuple):
    """vLLM's flags that matter here; additional and lora are taken out of the rest."""

    api_keys: list[str]
    api_servers: int | None
    additional: dict[str, Any]
    lora: list[str]
    names: list[str]
    rest: list[str]


def read_flags(flags: list[str]) -> Flags:
    """In the spellings that vLLM's own parser takes, which has the last word where it is at hand (launch.py)."""
    plain = []
    for flag in flags:
        name, equals, value = flag.partition("=")
        dashed = name.replace("_", "-") if name.startswith("--") else name
        ours = any(dashed.startswith(each) for each in ("--api-", "--additional-", "--lora-modules", "--served-"))
        plain.append(dashed + equals + value if ours else flag)
    if any(re.match("--max[-_]loras($|=)", flag) for flag in flags):
        raise RunError("--slots says how many different patches a batch may have: give that for --max-loras.")
    if any(flag.startswith("--additional-config.") for flag in plain):
        raise RunError("give --additional-config as one JSON object, which this adds its own settings to.")
    read, take = _Parser(add_help=False), _Parser(add_help=False)
    read.add_argument("--api-key", nargs="*")
    read.add_argument("--served-model-name", nargs="*")
    read.add_argument("--api-server-count", "-asc", type=int)
    take.add_argument("--additional-config", type=_json_object, default={})
    take.add_argument("--lora-modules", nargs="*", action="extend", default=[])
    found, _ = read.parse_known_args(plain)
    taken, rest = take.parse_known_args(plain)
    return Flags(
        api_keys=found.api_key or [],
        api_servers=found.api_server_count,
        additional=dict(taken.additional_config),
        lora=taken.lora_modules,
        names=found.served_model_name or [],
        rest=rest,
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RunError(f"{message}.")


def _json_object(text: str) -> dict[str, Any]:
    read: Any = None
    with suppress(ValueError, RecursionError):
        read = json.loads(text)
    if not isinstance(read, dict):
        raise argparse.ArgumentTypeError("needs a JSON object")
    return read


def plugins() -> str:
    """VLLM_PLUGINS with ours: vLLM wants endpoint plugins named, and then loads only what is named."""
    if "VLLM_PLUGINS" in os.environ:
        named = [name for name in os.environ["VLLM_PLUGINS"].split(",") if name]
        return ",".join([*named, *({KEY} - set(named))])
    groups = ("general", "platform", "io_processor", "stat_logger")
    installed = {point.name for group in groups for point in metadata.entry_points(group=f"vllm.{group}_plugins")}
    others = {point.name for point in metadata.entry_points(group="vllm.endpoint_plugins")}
    return ",".join(sorted((installed - others) | {KEY}))


def check_flags(*, runtime: bool, changing: bool, api_keys: Sequence[str], api_servers: int | None) -> None:
    """Raise RunError for flags of vLLM's that do not go with these settings.

    runtime: whether the routes may change what is served. changing: whether names may come while serving.
    """
    if runtime and not (any(api_keys) or os.environ.get("VLLM_API_KEY")):
        raise RunError("--allow-runtime-patches needs an API key: give --api-key KEY, or set VLLM_API_KEY.")
    if changing and api_servers not in (None, 1):
        raise RunError("names that change while serving belong to one API server: leave --api-server-count out.")
