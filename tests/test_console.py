"""A console that goes away, is full or has few letters: a training goes on, a result is not lost
silently.
"""

import errno
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from runs import ROOT, arguments, run, write_images

from quadmamba.main import main
from quadmamba.tools import check_data
from quadmamba.utils.console import lasting_console
from quadmamba.utils.signals import StopRequest

FLAGS = ("--batch-size", 4, "--epochs", 1)
LOG = "quadmamba_lite/default/log.jsonl"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("dätä"))


class Gone(io.StringIO):
    """A stream that takes some letters, and then fails."""

    def __init__(self, error, letters=0):
        super().__init__()
        self.error, self.letters = error, letters

    def write(self, text):
        self.letters -= len(text)
        if self.letters < 0:
            raise self.error
        return super().write(text)


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


def hung_up():
    """A terminal that has gone."""
    master, slave = pty.openpty()
    os.close(master)
    return os.fdopen(slave, "w", buffering=1)


STREAMS = {
    "reader left": lambda: Gone(BrokenPipeError(errno.EPIPE, "Broken pipe"), 300),
    "closed": closed,
    "none": lambda: None,
    "hung up": hung_up,
    "full": lambda: Gone(OSError(errno.ENOSPC, "No space left on device"), 1000),
    "quota": lambda: Gone(OSError(errno.EDQUOT, "Disk quota exceeded")),
    "ascii": lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii"),
}


def steps(out):
    lines = (out / LOG).read_text().splitlines()
    return [entry["updates"] for entry in map(json.loads, lines) if entry["kind"] == "train"]


@pytest.mark.parametrize("kind", STREAMS)
def test_C8_a_console_that_fails_ends_no_training(data, tmp_path, monkeypatch, kind):
    out = STREAMS[kind]()
    err = None if kind == "none" else io.StringIO() if kind == "full" else STREAMS[kind]()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    code = run("--data-path", data, "--output", tmp_path, *FLAGS)
    monkeypatch.undo()
    assert code == 0
    assert steps(tmp_path) == [1, 2, 3, 4]
    if kind == "reader left":
        assert out.getvalue().startswith("quadmamba_lite  train")
    if kind == "ascii":
        out.seek(0)
        assert r"d\xe4t\xe4" in out.read()
    if kind == "full":
        assert "stdout takes no more (No space left on device)" in err.getvalue()


@pytest.mark.parametrize("tail", ["| head -n 2", "<&- >&- 2>&-"], ids=["head", "closed"])
def test_C8_in_a_shell(data, tmp_path, tail):
    words = arguments("--data-path", data, "--output", tmp_path, *FLAGS, DATA__WORKERS=1)
    script = f'"$0" main.py "$@" {tail}; exit ${{PIPESTATUS[0]}}'
    command = ["bash", "-c", script, sys.executable, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert steps(tmp_path) == [1, 2, 3, 4]
    for word in ("Traceback", "Exception ignored", "BrokenPipe"):
        assert word not in done.stderr
    if "head" in tail:
        assert done.stdout.count("\n") == 2


def test_C8_a_closed_descriptor_is_no_place_for_a_file():
    """Else what a library prints would go into the log or a checkpoint."""
    script = (
        "import os; from quadmamba.utils.console import lasting_console\n"
        "with lasting_console():\n"
        "    os._exit(os.open('/dev/null', os.O_RDONLY))"
    )
    command = ["bash", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, script]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode > 2


def test_C8_what_libraries_print_is_lost_too():
    script = (
        "import os, sys; from quadmamba.utils.console import lasting_console\n"
        "with lasting_console():\n"
        "    sys.stdin.readline(), sys.stdout.write('x'), sys.stdout.flush()\n"
        "    os.write(1, b'by itself')"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, text=True, **pipes)
    process.stdout.close()
    process.stdout = None
    assert process.communicate("go\n", timeout=60) == (None, "")
    assert process.returncode == 0


def test_C8_a_result_on_a_full_disk_is_an_error(monkeypatch, capsys, tmp_path):
    write_images(tmp_path, train=1, val=1)
    for program, words in ((main, arguments("--info")), (check_data.main, [str(tmp_path)])):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", STREAMS["full"]())
            sys.stdout.letters = 0
            assert program(words) == 2
        err = capsys.readouterr().err
        assert err == "error: cannot write the result to stdout: No space left on device\n"


def test_C8_a_reader_that_has_left_wanted_no_more(monkeypatch, tmp_path):
    write_images(tmp_path, train=1, val=1)
    monkeypatch.setattr(sys, "stdout", Gone(BrokenPipeError(errno.EPIPE, "Broken pipe"), 20))
    assert check_data.main([str(tmp_path)]) == 0
    assert main(arguments("--info")) == 0


def test_C8_a_console_that_is_full_for_a_moment_is_not_given_up(monkeypatch):
    read, write = os.pipe()
    os.set_blocking(write, False)
    stream = os.fdopen(write, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    with lasting_console():
        for _ in range(100):
            sys.stdout.write("x" * 1000)
        os.read(read, 1 << 20)
        sys.stdout.write("after\n")
    os.set_blocking(read, False)
    stream.flush()
    assert os.read(read, 1 << 20).endswith(b"after\n")
    monkeypatch.undo()
    stream.close()
    os.close(read)


def received(*numbers, wait=0.0):
    """What a request to stop has received after these signals."""
    with StopRequest() as stop:
        for number in numbers:
            os.kill(os.getpid(), number)
            end = time.monotonic() + 5
            while not stop.received and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(wait)
        return stop.received


def test_C8_a_terminal_that_goes_away_saves_and_ends(monkeypatch):
    monkeypatch.setattr("quadmamba.utils.signals._ECHO_S", 0.1)
    before = signal.getsignal(signal.SIGHUP)
    assert received(signal.SIGHUP, signal.SIGHUP, wait=0.3) == signal.SIGHUP  # not impatient
    assert signal.getsignal(signal.SIGHUP) == before


def test_C8_nohup_is_heeded():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            while not stop.received:
                time.sleep(0.01)
            assert stop.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
