"""``python -m dsm_tune`` is ``dsm-tune``."""

from dsm_tune.cli import main

main()
