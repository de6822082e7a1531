"""The command line: verbs, exit codes, and errors of one line.

Commands import what they need when they are called, so that ``--help`` answers at once.
"""

from dsm_tune.cli.rim import main

__all__ = ["main"]
