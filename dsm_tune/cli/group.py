"""The group of verbs; the modules beside this one put theirs in."""

from __future__ import annotations

import click

from dsm_tune.errors import ConfigError, nearest

__all__ = ["verbs"]

EXAMPLES = """\b
The first verb is meant where none is given:
  dsm-tune --budget-ms 5              the embedded demo model and its images
  dsm-tune --budget-gflops 60%        60 % of the dense model's multiply-adds
  dsm-tune --model deit_small_patch16_224 --checkpoint deit.safetensors \\
           --images photos --budget-gflops 2.7
`dsm-tune tune --help` lists the options. Exit codes: 0 done, 1 a defect,
2 bad input, 3 nothing meets the budget, 4 verify failed, 130 interrupted
and saved."""


class Verbs(click.Group):
    """Takes the first verb, tune, where the first word is none."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put ``tune`` in front of options."""
        first = args[0] if args else ""
        if first and not first.startswith("-") and first not in self.commands:
            raise ConfigError(
                f"{first[:60]!r} is no verb{nearest(first, self.commands)}; "
                f"accepted are {', '.join(self.commands)} and the options of tune"
            )
        if first not in self.commands and first not in ("--help", "-h", "--version"):
            args = ["tune", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they are used."""
        return list(self.commands)


def _show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from dsm_tune.versions import version

        click.echo(f"dsm-tune {version()}")
        ctx.exit()


@click.group(cls=Verbs, epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
def verbs() -> None:
    """Tunes training-free token merging of Vision Transformers to a budget."""
