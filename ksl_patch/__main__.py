"""`python -m ksl_patch`, which is what `accelerate launch -m ksl_patch build ...` runs."""

from ksl_patch.cli import main

main()
