"""Mutation testing: small faults are put in, one at a time, and it is seen whether a test fails.

    python tests/mutants.py [--seed 0] [--count 150] [--only models utils/optim.py]

A mutant lives in a copy of the tree; the tests that reach its lines run there, quickest first.
Which tests reach which lines is measured before and kept in build/mutants; test files whose sources
have changed since are measured again. tests/mutants.yaml lists what is left out: code that needs a
GPU, and mutants that change nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import queue
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml
from mutant_sites import Mutant, sample

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "mutants"
FOLDERS = ("configs", "data", "models", "utils")
WORKERS = 2
BUDGET_S = 40.0  # for the tests of one mutant, by the times that were measured
PASS = 85.0  # percent


class Copy:
    """A copy of the tree, as the package `quadmamba`, and the process that runs its tests."""

    def __init__(self, number: int) -> None:
        self.folder = BUILD / str(number) / "quadmamba"
        shutil.rmtree(self.folder.parent, ignore_errors=True)
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, names.split("\0")):
            if (ROOT / name).is_file():
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.folder / name)
        start = "import coverage\ncoverage.process_startup()\n"
        (self.folder.parent / "sitecustomize.py").write_text(start)
        env = {"PYTHONPATH": str(self.folder.parent), "PYTHONDONTWRITEBYTECODE": "1"}
        env |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
        self.log = BUILD / f"{number}.log"
        self.process = subprocess.Popen(
            [sys.executable, "tests/mutant_worker.py", str(self.log)],
            cwd=self.folder,
            env=os.environ | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, tests: list[str], seconds: float, measured: str = "") -> int:
        """The exit code of pytest, -1 where it took too long."""
        task = {"tests": tests, "seconds": seconds, "measured": measured}
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


def measure_all(copies: queue.Queue[Copy], leave_out: list[str]) -> dict[str, dict]:
    """What each test file reaches, measured again where it or a source has changed."""
    root, found = copies.queue[0].folder, {}
    helpers = [p for p in (root / "tests").glob("*.py") if not p.name.startswith(("test_", "mut"))]

    def stamp(path: Path, reach: dict) -> str:
        files = [path, *sorted(helpers), *(root / name for name in sorted(reach.get("lines", ())))]
        return hashlib.sha256(b"".join(p.read_bytes() for p in files if p.exists())).hexdigest()

    def one(path: Path) -> None:
        kept = BUILD / f"{path.stem}.json"
        reach = json.loads(kept.read_text()) if kept.exists() else {}
        if reach.get("stamp") != stamp(path, reach):
            kept.unlink(missing_ok=True)
            copy = copies.get()
            code = copy.run([f"tests/{path.name}"], 1500, str(kept))
            copies.put(copy)
            nothing = {"tests": {}, "lines": {}}  # of a process that did not come to its end
            reach = json.loads(kept.read_text()) if kept.exists() else nothing
            kept.write_text(json.dumps({**reach, "stamp": stamp(path, reach)}))
            tests = reach["tests"]
            took = f"{len(tests)} tests, {sum(tests.values()):.0f} s"
            print(f"measured {path.name}: {took}" + (f", exit code {code}" if code else ""))
        found[path.name] = reach

    paths = [p for p in sorted((root / "tests").glob("test_*.py")) if p.name not in leave_out]
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(one, paths))
    return found


def reaching(mutant: Mutant, found: dict[str, dict]) -> list[tuple[float, str]]:
    """(seconds, name) of the tests for a mutant, quickest first; none where its lines never run.

    Lines that run at an import have no test of their own: those of the scope around count.
    """
    for number, (first, last) in enumerate(mutant.spans):
        tests, at_import = {}, False
        for reach in found.values():
            for line, names in reach["lines"].get(mutant.path, {}).items():
                if first <= int(line) <= last:
                    at_import |= "" in names
                    if "" not in names:
                        tests |= {name: reach["tests"].get(name) for name in names}
        if tests and not (number == 0 and at_import) or number == 0 and not at_import:
            break
    else:
        users = [r["tests"] for r in found.values() if mutant.path in r["lines"]]
        tests = {name: seconds for passed in users for name, seconds in passed.items()}
    chosen, total = [], 0.0
    for seconds, name in sorted((s, n) for n, s in tests.items() if s is not None):
        if (total := total + seconds) < BUDGET_S or not chosen:
            chosen.append((seconds, name))
    return chosen


def judge(mutant: Mutant, copies: queue.Queue[Copy], found: dict[str, dict]) -> str:
    """ "killed", "too long", "survived" or "not run"."""
    tests = reaching(mutant, found)
    if not tests:
        return "not run"
    copy = copies.get()
    path = copy.folder / mutant.path
    times = path.stat()
    path.write_text(mutant.after)
    code = copy.run([name for _, name in tests], 60 + 4 * sum(s for s, _ in tests))
    path.write_text(mutant.before)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    copies.put(copy)
    return {0: "survived", -1: "too long"}.get(code, "killed")


def known(mutant: Mutant, entries: list[dict]) -> bool:
    """Whether tests/mutants.yaml lists it."""
    gone, come = mutant.changed()
    return any(
        mutant.path == entry["path"]
        and entry.get("inside", "") in ("", ".".join(mutant.scopes), *mutant.scopes)
        and entry.get("line", "") in ("", *gone)
        and entry.get("becomes", "") in ("", *come)
        for entry in entries
    )


def main() -> int:
    """Print the survivors and the score of each folder; 1 where it is below PASS."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--only", nargs="*", default=FOLDERS, help="folders and files")
    options = parser.parse_args()
    listed = yaml.safe_load((ROOT / "tests/mutants.yaml").read_text())
    BUILD.mkdir(parents=True, exist_ok=True)
    copies: queue.Queue[Copy] = queue.Queue()
    for number in range(WORKERS):
        copies.put(Copy(number))
    found = measure_all(copies, listed["tests_without_mutants"])
    entries = [*listed["needs_a_gpu"], *listed["equivalent"]]
    mutants = sample(copies.queue[0].folder, options.only, options.seed)
    fresh = (mutant for mutant in mutants if not known(mutant, entries))
    chosen = list(itertools.islice(fresh, options.count))
    scores: dict[str, Counter[str]] = defaultdict(Counter)
    with ThreadPoolExecutor(WORKERS) as pool:
        results = pool.map(lambda mutant: judge(mutant, copies, found), chosen)
        for mutant, result in zip(chosen, results):
            scores[mutant.path.split("/")[0]][result] += 1
            if result in ("survived", "not run"):
                gone, come = mutant.changed()
                print(f"\n{result}: {mutant.path}:{mutant.line} {'.'.join(mutant.scopes)}")
                print("\n".join([*(f"  - {x}" for x in gone), *(f"  + {x}" for x in come)]))
    for name, results in {**scores, "all": sum(scores.values(), Counter())}.items():
        score = 100 * (results["killed"] + results["too long"]) / results.total()
        print(f"{name:<8} {score:5.1f} %  {dict(results)}")
    return int(score < PASS)


if __name__ == "__main__":
    sys.exit(main())
