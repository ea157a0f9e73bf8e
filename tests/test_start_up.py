"""What a start imports: each mode only what it needs, and no more time than torch and timm take."""

import inspect
import subprocess
import sys
import time

import pytest
import torch
from runs import ROOT

HEAVY = {
    *("torch", "timm", "torchvision", "torch._dynamo", "torch._inductor", "torch.distributed.fsdp"),
    *("triton", "fvcore", "tensorboard", "sklearn", "matplotlib", "pandas", "scipy", "sympy"),
    *("PIL", "numpy", "quadmamba.models", "quadmamba.data", "quadmamba.utils.engine"),
}
RUN = "import sys; from quadmamba.main import main\ntry: main({words})\nexcept SystemExit: pass\n"
INFO = ["--info", "--cfg", "quadmamba_small"]
COUNTS = {"torch", "triton", "fvcore", "numpy", "quadmamba.models"}  # what --info needs
STARTS = {
    "import quadmamba": ("import quadmamba", set()),
    "-h": (RUN.format(words=["-h"]), set()),
    "a wrong flag": (RUN.format(words=["--epoch", "3"]), set()),
    "a wrong key": (RUN.format(words=[*INFO, "--opts", "TRAIN.EPOCH", "3"]), set()),
    "no configuration": (RUN.format(words=["--eval"]), set()),
    "--info": (RUN.format(words=INFO), COUNTS),
    "quadmamba.build_model": ("import quadmamba\nquadmamba.build_model", COUNTS - {"fvcore"}),
}


def python(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("code", "needed"), STARTS.values(), ids=STARTS)
def test_a_start_imports_only_what_it_needs(code, needed):
    found = f"\nimport sys; print(sorted(set(sys.modules) & {HEAVY}))"
    assert python(code + found).splitlines()[-1] == str(sorted(needed))


def test_the_names_of_the_package_are_those_of_its_models():
    import quadmamba
    from quadmamba import models

    assert {name: getattr(quadmamba, name) for name in ("QuadMamba", "build_model")} == {
        "QuadMamba": models.QuadMamba,
        "build_model": models.build_model,
    }
    with pytest.raises(AttributeError, match="module 'quadmamba' has no attribute 'nothing'"):
        quadmamba.nothing  # noqa: B018


def test_maps_are_marked_as_constants_as_the_compiler_marks_them():
    from quadmamba.models import orders

    def function():
        return 0

    mark = vars(torch.compiler.assume_constant_result(function))
    assert mark
    (boxed,) = inspect.getclosurevars(orders.cross_routes).nonlocals.values()
    assert mark.items() <= vars(boxed).items()


def seconds(code):
    """Seconds of computing, to which other load adds less than to those of a clock."""
    timed = f"{code}\nimport os; print(sum(os.times()[:2]))"
    return float(python(timed).splitlines()[-1])


def test_a_start_takes_at_most_1_3_times_that_of_torch_and_timm():
    starts = {
        "torch, timm": "import torch, timm",
        "--info": RUN.format(words=INFO),
        "-h": RUN.format(words=["-h"]),
        "import quadmamba": "import quadmamba",
        "build_model": "from quadmamba.models import build_model",
    }
    best = dict.fromkeys(starts, float("inf"))
    end = time.monotonic() + 60
    for attempt in range(5):
        for name, code in starts.items():  # side by side
            best[name] = min(best[name], seconds(code))
        ratios = {name: best[name] / best["torch, timm"] for name in best}
        if attempt and max(ratios.values()) <= 1.3 or time.monotonic() > end:
            break
    assert max(ratios.values()) <= 1.3, ratios
