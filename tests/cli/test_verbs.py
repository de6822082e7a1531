"""What the verbs do besides tuning, and what a terminal shows."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch
from command_line import Ended, contents, environment, start

from dsm_tune import target, tuning
from dsm_tune.cli.group import verbs
from dsm_tune.cli.options import TIMEOUT, Mapped, gather
from dsm_tune.cli.studies import write
from dsm_tune.cli.terminal import Terminal, printable, to_json
from dsm_tune.plan import Geometry, MergePlan
from dsm_tune.profile import DeviceProfile
from dsm_tune.results import BudgetReport, Evaluation, Fault, Result, TuneResult
from dsm_tune.searching.search import Progress
from dsm_tune.searching.study import Record

Call = Callable[..., Ended]
TUNE = verbs.commands["tune"]


# -- options --------------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_file_and_the_file_over_the_environment(
    tmp_path: Path,
) -> None:
    file = tmp_path / "tune.toml"
    file.write_text(
        "budget-gmacs = '60%'\ntrials = 7\nseed = 3\nexperiment = 'file'\npretrained = true\n"
        "model_kwargs = {qk_norm = true}\ntimeout = 9\njson = true"
    )
    flags = {"config": str(file), "seed": 5, "pretrained": False, "trials": None}
    given = gather(TUNE, flags, {"MLFLOW_EXPERIMENT_NAME": "environment"})
    assert given.values["as_json"] is True
    config = given.config()
    assert (config.budget_gflops, config.trials, config.seed) == ("60%", 7, 5)
    assert (config.experiment, config.pretrained, config.timeout) == ("file", False, 9.0)
    assert config.model_kwargs == {"qk_norm": True}
    named = gather(TUNE, {"budget_ms": "5"}, {"MLFLOW_EXPERIMENT_NAME": "environment"})
    assert named.config().experiment == "environment"


def test_only_a_model_of_the_user_has_a_time_limit_by_default() -> None:
    assert gather(TUNE, {"budget_ms": "5"}, {}).config().timeout is None
    mine = {"budget_ms": "5", "model": "deit_tiny_patch16_224", "images": "photographs"}
    assert gather(TUNE, mine, {}).config().timeout == TIMEOUT


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"qk_norm": true, "depth": 3}', {"qk_norm": True, "depth": 3}),
        ("qk_norm=true,init_values=1e-5", {"qk_norm": True, "init_values": 1e-5}),
        ("qk_norm=True pool=avg", {"qk_norm": True, "pool": "avg"}),
        ("{}", {}),
    ],
)
def test_model_kwargs_are_json_or_pairs(text: str, expected: dict[str, Any]) -> None:
    assert Mapped().convert(text, None, None) == expected


def test_tune_is_meant_where_no_verb_is_given(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(tuning, "tune", lambda config, listener: asked.append(config) or 1 / 0)
    for arguments in (["--budget-gmacs", "2"], ["tune", "--budget-gflops", "2"]):
        assert call(*arguments).code == 1
    assert asked[0] == asked[1]
    assert asked[0].budget_gflops == "2"


# -- ends -----------------------------------------------------------------------------------------


def test_a_defect_is_one_line_and_with_v_a_traceback(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect(*_: Any, **__: Any) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(tuning, "tune", defect)
    plain = call("--budget-gflops", "2")
    assert (plain.code, plain.out) == (1, "")
    assert plain.err == (
        "dsm-tune: error: a defect: RuntimeError: first second; "
        "run again with -v for the traceback\n"
    )
    verbose = call("--budget-gflops", "2", "-v")
    assert verbose.code == 1
    assert "Traceback" in verbose.err
    assert verbose.err.splitlines()[-1] == "dsm-tune: error: a defect: RuntimeError: first second"


def test_an_interruption_before_anything_is_stored_says_so(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "tune", interrupted)
    ended = call("--budget-gflops", "2")
    assert (ended.code, ended.out) == (130, "")
    assert ended.err == "dsm-tune: interrupted before anything was stored\n"


def test_what_libraries_print_does_not_reach_stdout(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noisy(*_: Any, **__: Any) -> None:
        print("chatter")
        raise ValueError

    monkeypatch.setattr(tuning, "tune", noisy)
    assert call("--budget-gflops", "2", "--json").out == ""


def test_a_broken_pipe_is_quiet(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    for arguments in (["doctor"], ["--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "dsm_tune", *arguments],
            env=environment(),
            cwd=tmp_path,
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
    os.close(write)


def test_messages_are_one_printable_line() -> None:
    assert printable("a\nb\x1b[31m\tc") == "a b [31m c"


def test_the_document_names_no_password(capsys: pytest.CaptureFixture[str]) -> None:
    uri = "postgresql://me:hush@db.example/mlflow"
    result: Any = SimpleNamespace(tracking_uri=uri, to_dict=lambda: {"tracking_uri": uri})
    write(result, {"as_json": True}, None, front=False)
    shown = json.loads(capsys.readouterr().out)
    assert shown == {"tracking_uri": "postgresql://***@db.example/mlflow"}


def test_show_has_a_line_for_each_kind_of_fault(capsys: pytest.CaptureFixture[str]) -> None:
    counts = dict.fromkeys(("complete", "pruned", "failed", "duplicate"), 0)
    geometry = Geometry((6, 6), 1, 5, 32, 2, 64, 4, 10, "token")
    dense = Result(MergePlan("toy", geometry), 1.0)
    faults = [Fault("worker", 2, "last: trial 7\non 5 images"), Fault("driver", 1)]
    budget = BudgetReport(None, 0.5, "p50", 1, True, False, None)
    images = {"search": 1, "holdout": 1, "labelled": False}
    result = TuneResult(
        *("s", "done", 1.0, "", "", "toy", {}, images, [], 1, budget, dense, dense, dense, counts),
        *([], None, faults),
    )
    write(result, {}, None, front=True)
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "fault: 2 evaluations were started again: their workers had died "
        "(last: trial 7 on 5 images) fault: 1 run ended without a word and was resumed" in shown
    )


def test_json_has_null_for_what_is_no_number() -> None:
    assert to_json({"a": [float("nan"), 1.5], "b": float("inf")}) == (
        '{\n "a": [\n  null,\n  1.5\n ],\n "b": null\n}'
    )


# -- progress -------------------------------------------------------------------------------------


def record(number: int) -> Record:
    plan = MergePlan("m", Geometry((14, 14), 1, 8, 48, 2, 192, 4, 10, "token"))
    return Record(number, 1, 0, "", {}, plan, {9: Evaluation(9, 0.5, 1.0)}, "complete")


def ticking() -> Callable[[], float]:
    now = iter(range(1000))
    return lambda: float(next(now))


def test_progress_without_a_terminal_is_a_line_now_and_then() -> None:
    stream = io.StringIO()
    with Terminal(stream, clock=ticking()) as terminal:
        terminal.say("searching")
        for done in range(1, 21):
            terminal.progress(Progress(done, 20, 0.0123456, 0.1, record(done)))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "searching"
    assert lines[1] == "5/20 trials, best divergence 0.0123, 15 s left"
    assert lines[-1] == "20/20 trials, best divergence 0.0123"
    assert len(lines) == 5


def test_verbose_tells_each_trial_and_quiet_none() -> None:
    loud, silent = io.StringIO(), io.StringIO()
    with Terminal(loud, verbose=True) as terminal:
        terminal.progress(Progress(1, 2, None, 0.0, record(7)))
    assert loud.getvalue() == "trial 7 complete 0.0738 GMACs divergence 0.5 dense\n"
    with Terminal(silent, quiet=True) as terminal:
        terminal.say("searching")
        terminal.progress(Progress(2, 2, None, 0.0, record(7)))
    assert silent.getvalue() == ""


def test_a_closed_stderr_does_not_stop_a_search() -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with Terminal(Closed()) as terminal:
        terminal.say("searching")
        terminal.say("still searching")


def test_a_terminal_shows_a_bar_within_eighty_columns() -> None:
    script = (
        "import sys, time\nsys.path.insert(0, 'tests/cli')\nfrom test_verbs import *\n"
        "with Terminal(sys.stderr) as terminal:\n"
        "    terminal.say('searching [bold]' + 'x' * 10)\n"
        "    terminal.progress(Progress(1200, 5000, 0.000123456, 0.1, record(7)))\n"
        "    time.sleep(0.3)\n"
    )
    primary, secondary = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment(TERM="xterm"),
        cwd=Path(__file__).parents[2],
        stderr=secondary,
    )
    assert done.wait() == 0
    os.close(secondary)
    shown = os.read(primary, 1 << 16).decode()
    os.close(primary)
    plain = click.unstyle(shown)
    assert "searching [bold]xxxxxxxxxx" in plain
    assert "1200/5000 trials, best divergence 0.000123" in plain
    assert max(len(part) for line in plain.splitlines() for part in line.split("\r")) <= 80


# -- curve, profile, doctor, ui -------------------------------------------------------------------


def test_curve_prints_the_delay_of_the_demo_and_its_stability(call: Call) -> None:
    told = call("curve", "--json")
    assert told.code == 0
    document = told.json
    assert document["images"] == 64
    assert len(document["similarity_curve"]) == 5
    assert document["transition"] is False  # so few blocks: D is round(depth / 6)
    assert document["delay"] == 1
    assert sum(document["stability"].values()) == pytest.approx(1)
    shown = call("curve")
    assert f"D = {document['delay']} of 5 blocks" in shown.out
    assert max(map(len, shown.out.splitlines())) <= 80


@pytest.mark.parametrize(("name", "start"), [("c.png", b"\x89PNG"), ("c.svg", b"<?xml")])
def test_curve_draws(call: Call, name: str, start: bytes) -> None:
    assert call("curve", "--plot", name).code == 0
    assert Path(name).read_bytes().startswith(start)
    assert list(contents(Path.cwd())) == [name]


def test_profile_writes_a_file_that_tune_takes(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "_patience", lambda geometry: 0.05)
    threads = torch.get_num_threads()
    ended = call("profile", "-o", "here.json", "--batch-size", "2", "--threads", "1")
    torch.set_num_threads(threads)
    assert ended.code == 0, ended
    assert ended.out.startswith("here.json: ")
    profile = DeviceProfile.load("here.json")
    assert (profile.batch_size, profile.dtype) == (2, "float32")
    assert list(contents(Path.cwd())) == ["here.json"]
    error = call("--budget-ms", "5", "--device-profile", "here.json").error
    assert "made for the batch size 2, but got 1" in error
    assert list(contents(Path.cwd())) == ["here.json"]


def test_doctor_finds_all_well_and_writes_nothing(call: Call) -> None:
    told = call("doctor", "--json")
    assert told.code == 0, told
    assert told.json["ok"] is True
    assert {"Python", "torch", "ray", "CPU", "study store", "MLflow store", "Ray"} <= {
        check["name"] for check in told.json["checks"]
    }
    assert call("doctor").out.splitlines()[-1] == "all is well"
    assert not contents(Path.cwd())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["--storage", "sqlite:///no/such/folder/x.db"], "study store"),
        (["--storage", "sqlite:///plain.txt"], "study store"),
        (["--storage", "not a url"], "study store"),
        (["--tracking-uri", "runs"], "MLflow store"),
        (["--tracking-uri", "http://me:secret@127.0.0.1:1"], "MLflow store"),
        (["--ray-address", "127.0.0.1:1"], "Ray"),
        (["--ray-address", "nonsense"], "Ray"),
    ],
)
def test_doctor_says_what_is_wrong(call: Call, arguments: list[str], name: str) -> None:
    Path("plain.txt").write_text("no database, but longer than the header that one has" * 9)
    told = call("doctor", "--json", *arguments)
    assert told.code == 2
    assert [check["name"] for check in told.json["checks"] if check["status"] == "failed"] == [name]
    assert "secret" not in told.out
    assert call("doctor", *arguments).out.splitlines()[-1] == f"failed: {name}"
    assert list(contents(Path.cwd())) == ["plain.txt"]


@pytest.mark.slow
def test_ui_serves_the_store_on_this_machine_only(tmp_path: Path) -> None:
    from dsm_tune.reviewing import stores

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's, about SQLAlchemy
        stores.find_experiment(stores.connect(uri), "digits")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
        taken = start("ui", "--port", f"{port}", cwd=tmp_path, stderr=subprocess.PIPE)
        assert taken.communicate()[1].startswith("dsm-tune: error: --host and --port must be free")
        assert taken.returncode == 2
    process = start("ui", "--port", f"{port}", cwd=tmp_path, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == (
            f"the MLflow UI is at http://127.0.0.1:{port} (Ctrl-C ends it)\n"
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                    assert answer.read() == b"OK"
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=1)
    finally:
        process.kill()
        process.communicate()
