"""Verb of a cluster: submit."""

from __future__ import annotations

from typing import Any

import click

from dsm_tune.cli import options
from dsm_tune.cli.exits import BAD_INPUT, DEFECT, DONE, INFEASIBLE, INTERRUPTED, end, fail
from dsm_tune.cli.group import verbs
from dsm_tune.cli.options import gather, with_options
from dsm_tune.cli.outputs import listening
from dsm_tune.cli.studies import write
from dsm_tune.errors import ConfigError, StudyError

__all__ = ["submit"]


@verbs.command()
@with_options(options.SUBMIT)
@click.pass_context
def submit(ctx: click.Context, /, driver_resource: str | None, **values: Any) -> int:
    """Run the same tune as a job of a Ray cluster.

    The job goes on when this command ends. The same command again follows it, or goes on with its
    study. Files are named as the cluster's nodes see them; passwords stay in their environment.
    """
    from dsm_tune import submission
    from dsm_tune.searching.jobs import JobServer

    given = gather(ctx.command, values)
    config = given.config()
    address = submission.dashboard_address(config.ray_address)
    submission.check(config)
    storage = submission.readable_storage(config)
    if given.values.get("as_json") and storage is None:
        raise ConfigError(
            "--json needs the study's store as this machine reaches it: --storage or OPTUNA_STORAGE"
        )
    study = config.study_name
    job_id = ""
    try:
        with listening(given.values) as terminal:
            for line in submission.warnings(config, address):
                terminal.say(line)
            server = JobServer(address)
            running = server.find_running(study)
            if running is None:
                job_id = server.submit(study, submission.entrypoint(config), driver_resource)
                terminal.say(f"study {study}: job {job_id} on {address}")
            else:
                job_id = running.id
                terminal.say(f"study {study}: following job {job_id} on {address}, which runs it")
            job = server.follow(job_id, terminal.say)
    except KeyboardInterrupt:
        return _left(job_id, address)
    if job.status == "STOPPED":
        return end("the job was stopped; the same command goes on with its study", INTERRUPTED)
    code = job.exit_code if job.status == "FAILED" else DONE
    if code not in (DONE, INFEASIBLE):
        return _failed(code, job_id, job.message)
    if storage is not None:
        _show(study, storage, given.values)
    return code


def _left(job_id: str, address: str) -> int:
    if not job_id:
        return end("interrupted before anything was submitted", INTERRUPTED)
    where = f"{job_id} --address {address}"
    return end(
        f"the job goes on without this command; `ray job logs -f {where}` follows it, as does "
        f"this command again; `ray job stop {where}` ends it",
        INTERRUPTED,
    )


def _failed(code: int | None, job_id: str, message: str) -> int:
    """What the job's own last line has said already, or what Ray says of its end."""
    if code in (BAD_INPUT, INTERRUPTED):
        return end(f"job {job_id} ended with exit code {code}", code)
    return fail(f"job {job_id} failed: {' '.join(message.split())[:300]}", DEFECT)


def _show(study: str, storage: str, values: Any) -> None:
    from dsm_tune.answer import show

    try:
        result = show(study, storage=storage)
    except StudyError as error:
        raise StudyError(
            f"the job is done, but its answer must be readable from here: {error}; "
            f"`dsm-tune show {study}` reads it where the store is reached"
        ) from None
    write(result, values, storage, front=False)
