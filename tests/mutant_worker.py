"""Runs tests in a copy of the tree, each time in a fork of this process that knows the libraries.

Reads tasks as JSON lines: tests, seconds (time limit), and where they are to be measured the file
that gets the lines which each test reaches. Answers with the exit code, -1 for "took too long".
"""

from __future__ import annotations

import compileall
import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import time
from collections import defaultdict
from pathlib import Path

import coverage
import pytest

LIBRARIES = ("torchvision", "timm.data", "timm.scheduler", "timm.loss", "timm.utils", "fvcore.nn")
LIBRARIES += ("torch.utils.tensorboard", "torch._dynamo", "safetensors.torch", "yacs.config")
LIBRARIES += ("torch.distributed", "torch.testing", "triton", "sklearn.datasets")


class Timer:
    """A pytest plugin: seconds of each test, the tests that pass, and who runs for `coverage`."""

    def __init__(self, cov: coverage.Coverage) -> None:
        self.cov, self.seconds, self.failed = cov, defaultdict(float), set()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Begin a test, in this process and in those that it starts."""
        os.environ["MUTANTS_TEST"] = nodeid
        self.cov.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """End a part of a test."""
        self.seconds[report.nodeid] += report.duration
        if not report.passed:
            self.failed.add(report.nodeid)


def measure(tests: list[str], result: Path) -> int:
    """Run tests and write {"tests": {name: seconds}, "lines": {file: {line: [name, ...]}}}.

    A line that is reached while a test file is imported has the name "".
    """
    folder = result.with_suffix(".parts")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    settings = folder / "coveragerc"
    settings.write_text(
        f"[run]\ndata_file = {folder}/data\nparallel = true\npatch = _exit\n"
        f"source = {Path.cwd()}\nomit = {Path.cwd()}/tests/*\ncontext = ${{MUTANTS_TEST-}}\n"
    )
    os.environ["COVERAGE_PROCESS_START"] = str(settings)
    cov = coverage.Coverage(config_file=str(settings))
    timer = Timer(cov)
    cov.start()
    code = pytest.main(["-q", "-p", "no:cacheprovider", *tests], plugins=[timer])
    cov.stop()
    cov.save()
    lines: dict = defaultdict(lambda: defaultdict(list))
    for part in folder.glob("data*"):
        data = coverage.CoverageData(str(part))
        with contextlib.suppress(coverage.exceptions.DataError):  # its process was killed
            data.read()
        for file in data.measured_files():
            for line, names in data.contexts_by_lineno(file).items():
                lines[str(Path(file).relative_to(Path.cwd()))][line] += names
    passed = {name: t for name, t in timer.seconds.items() if name not in timer.failed}
    result.write_text(json.dumps({"tests": passed, "lines": lines}))
    shutil.rmtree(folder)
    return code


def in_fork(task: dict, log: Path) -> int:
    """Run a task in a fork; the processes that it started end with it."""
    child = os.fork()
    if child == 0:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if task["measured"]:
            code = measure(task["tests"], Path(task["measured"]))
        else:
            code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *task["tests"]])
        os._exit(int(code))
    end = time.monotonic() + task["seconds"]
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL) if not done[0] else None
    if not done[0]:
        os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(done[1]) if done[0] else -1


if __name__ == "__main__":
    compileall.compile_dir(".", quiet=1)  # a mutated file is newer than its bytecode
    for name in LIBRARIES:
        importlib.import_module(name)
    for line in sys.stdin:
        sys.stdout.write(f"{in_fork(json.loads(line), Path(sys.argv[1]))}\n")
        sys.stdout.flush()
