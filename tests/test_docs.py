"""The README and the pages in docs/ say what is true: their blocks run as written, their links lead somewhere.

How a page's code blocks are taken, from top to bottom, in an empty folder:

- ```` ```sh ```` is run by bash with the commands of this environment, and must succeed.
- ```` ```text ```` is what the last ``sh`` printed: each line must be among its output, in this order; ``...`` stands for
  anything.
- ```` ```python title="train.py" ```` (or another language) is written to that file; something below must use it.
- ```` ```python ```` without a title is run.

An HTML comment before a block makes an exception: ``<!-- not run: why -->``, ``<!-- exits with 2 -->``, and, for a block
that would take too long or change the machine, ``<!-- the test runs instead (why): commands -->``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from attrs import frozen
from runs import environment

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
EXAMPLE = DOCS / "example-plugin"
RUN_PAGES = [
    "README.md",
    *(
        f"docs/{name}.md"
        for name in (
            *("tutorial", "configuration", "training", "sampling", "schedulers", "text-encoders", "data", "features"),
            "planning",
        )
    ),
    *(
        pytest.param(f"docs/{name}.md", marks=pytest.mark.slow)
        for name in (
            *("plugins", "runs", "prompts", "prompters", "step-caches", "models", "weights", "autoencoders"),
            "open-sora-configs",
        )
    ),
]
ALL_PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(DOCS.glob("*.md")),
    *sorted(ROOT.glob("opensora-*/README.md")),
]
# The quickstart as it is, with less of everything: what pages find in outputs/000-quickstart.
SHORT_QUICKSTART = """\
opensora-run quickstart --stages.data.num_clips 40 --stages.data.num_held_out 8 --stages.train.max_steps 3 \
    --stages.train.model.hidden_size 64 --stages.sample.model.hidden_size 64 --stages.sample.num_sample 1 \
    --stages.sample.scheduler.num_sampling_steps 2"""

FENCE = re.compile(r"^(?P<comment><!--.*?-->\n+)?^```(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
EXCEPTION = re.compile(r"<!-- (not run: .{10,}|exits with \d+|the test runs instead \(.{10,}?\):\n.+)\s-->", re.DOTALL)
INSTEAD = re.compile(r"<!-- the test runs instead \((?P<why>.+?)\):\n(?P<commands>.+?)\n-->", re.DOTALL)


@frozen
class Block:
    """A fenced code block."""

    place: str
    language: str
    title: str | None
    text: str
    comment: str

    @property
    def is_run(self) -> bool:
        return not self.comment.startswith("<!-- not run:")

    @property
    def commands(self) -> str:
        instead = INSTEAD.fullmatch(self.comment)
        return instead["commands"] if instead else self.text

    @property
    def exit_code(self) -> int:
        found = re.fullmatch(r"<!-- exits with (\d+) -->", self.comment)
        return int(found[1]) if found else 0


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        language, _, rest = match["info"].partition(" ")
        title = re.fullmatch(r'title="(.+)"', rest.strip())
        line = text[: match.start("info")].count("\n") + 1
        comment = (match["comment"] or "").strip()
        place = f"{page.relative_to(ROOT)}:{line}"
        found.append(Block(place, language, title[1] if title else None, match["text"], comment))
    assert len(found) * 2 == len(re.findall(r"^\s*```", text, re.MULTILINE)), f"{page}: a code block is not closed"
    return found


@pytest.fixture(scope="session")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The outputs folder after a quickstart."""
    folder = tmp_path_factory.mktemp("quickstart")
    done = run_commands(SHORT_QUICKSTART, folder)
    assert done.returncode == 0, done.stdout
    return folder / "outputs"


def run_commands(commands: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a block by bash; errors and output together, as a terminal shows them."""
    plugins = folder / ".plugins"  # where a page's plugin is installed, so that the environment stays as it is
    variables = {
        **environment(),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(plugins),
        "PLUGINS": str(plugins),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], cwd=folder, env=variables,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="session")
def runs(
    request: pytest.FixtureRequest, outputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[None]]]:
    """The pages that are tested, each being run in a folder of its own; two at a time, since most of it is start-up."""
    tests = [
        item for item in request.session.items if getattr(item, "originalname", "") == "test_blocks_run_as_written"
    ]
    with ThreadPoolExecutor(2) as pool:
        pages = [item.callspec.params["page"] for item in tests]  # type: ignore[attr-defined]  # they are parametrized
        yield {page: pool.submit(run_page, page, outputs, tmp_path_factory.mktemp("page")) for page in pages}


@pytest.mark.parametrize("page", RUN_PAGES)
def test_blocks_run_as_written(page: str, runs: dict[str, Future[None]]) -> None:
    runs[page].result()


def run_page(page: str, outputs: Path, folder: Path) -> None:
    """Run all blocks of a page in an empty folder."""
    shutil.copytree(outputs, folder / "outputs")
    output = ""
    for block in blocks(ROOT / page):
        if not block.is_run:
            continue
        if block.title:
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "text":
            assert_shown(block, output)
        else:
            assert block.language in ("sh", "python"), f"{block.place}: no way to run {block.language or 'it'}"
            commands = block.commands if block.language == "sh" else f"python - <<'END'\n{block.text}\nEND"
            done = run_commands(commands, folder)
            output = done.stdout
            assert done.returncode == block.exit_code, f"{block.place} ends with {done.returncode}:\n{output}"


def assert_shown(block: Block, output: str) -> None:
    """Every line of the block is in the output, in order."""
    rest = output.splitlines()
    for line in filter(str.strip, block.text.splitlines()):
        pattern = ".*".join(re.escape(" ".join(part.split())) for part in line.split("..."))
        while rest and not re.fullmatch(pattern, " ".join(rest[0].split())):
            rest.pop(0)
        assert rest or line.strip() == "...", f"{block.place}: not printed: {line}\n--- printed:\n{output}"
        rest = rest[1:] if line.strip() != "..." else rest


@pytest.mark.parametrize("page", RUN_PAGES)
def test_files_of_a_page_are_used_and_exceptions_have_reasons(page: str) -> None:
    found = blocks(ROOT / page)
    for number, block in enumerate(found):
        assert not block.comment or EXCEPTION.fullmatch(block.comment), (
            f"{block.place}: no such exception, or no reason"
        )
        if block.title and block.is_run and not is_example(block):
            users = [each.text for each in found[number + 1 :]]
            assert any(Path(block.title).name in text for text in users), f"{block.place}: nothing uses {block.title}"


def is_example(block: Block) -> bool:
    return block.title is not None and Path(block.title).parent.name == "tiny-video-model"


@pytest.mark.parametrize("page", ["README.md", "docs/plugins.md"])
def test_plugin_on_the_page_is_the_example(page: str) -> None:
    shown = {Path(block.title).name: block.text for block in blocks(ROOT / page) if block.title and is_example(block)}
    assert {"pyproject.toml", "tiny_video_model.py"} <= set(shown)
    for name, text in shown.items():
        whole = (EXAMPLE / name).read_text(encoding="utf-8")
        if page == "README.md":
            assert_abridged(text, whole, name)
        else:
            assert text == whole, f"{page} shows another {name} than docs/example-plugin"


def assert_abridged(text: str, whole: str, name: str) -> None:
    """Every part of ``text`` stands in ``whole``, in order; lines with ``...`` alone stand for what is left out."""
    position = 0
    for part in re.split(r"^ *# \.\.\.\n", text, flags=re.MULTILINE):
        found = whole.find(part.strip("\n"), position)
        assert found >= 0, f"README shows what is not in docs/example-plugin/{name}:\n{part}"
        position = found + len(part.strip("\n"))


def test_flags_in_the_table_are_those_there_are() -> None:
    from opensora.core.config.overrides import FLAGS

    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    same, others = text.split("The others:")
    rows = [re.findall(r"`(--[a-z-]+)`", line) for line in same.splitlines() if line.startswith("|")]
    listed = {flag for row in rows for flag in row}
    assert listed == {flag.name for flag in FLAGS if not flag.keys or flag.paths == (flag.name[2:].replace("-", "_"),)}
    nested = dict(re.findall(r"^\| `(--[a-z-]+)` \| `([\w.]+)`", others, re.MULTILINE))
    assert nested == {flag.name: flag.paths[0] for flag in FLAGS if flag.name not in listed}
    for flag in FLAGS:
        if flag.name in listed:
            row = next(line for line in same.splitlines() if line.startswith("|") and f"`{flag.name}`" in line)
            assert row.startswith(f"| {flag.group} |"), f"{flag.name} is a flag for {flag.group}"


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference pages, as the documentation's build makes them."""
    folder = tmp_path_factory.mktemp("reference")
    subprocess.run([sys.executable, DOCS / "reference.py", folder], env=environment(), check=True)
    return folder


def test_reference_has_every_component_and_hook(reference: Path) -> None:
    index = (reference / "index.md").read_text(encoding="utf-8")
    for path in ROOT.glob("opensora-*/pyproject.toml"):
        groups = tomllib.loads(path.read_text(encoding="utf-8"))["project"].get("entry-points", {})
        for group, entries in groups.items():
            page = reference / f"{group.removeprefix('opensora.')}.md"
            for name in entries:
                assert f"| `{name}` |" in index
                if page.exists() and page.stem != "configs":
                    title = f"opensora {name}" if page.stem == "commands" else name
                    assert f"## `{title}`" in page.read_text(encoding="utf-8")
    assert "--dry-run" in (reference / "commands.md").read_text(encoding="utf-8")
    assert "`max_unreadable`" in (reference / "pipelines.md").read_text(encoding="utf-8")
    assert "### `denoiser_wrapper`" in (reference / "hooks.md").read_text(encoding="utf-8")


def test_every_option_has_help(reference: Path) -> None:
    rows = [line for page in reference.glob("*.md") for line in page.read_text(encoding="utf-8").splitlines()]
    bare = [
        row for row in rows if row.startswith("| `") and row.endswith("|  |") and not row.startswith("| `pipeline`")
    ]
    assert not bare


def links(text: str) -> Iterator[str]:
    prose = FENCE.sub("", text)
    yield from re.findall(r"\]\(([^)\s]+)\)", prose)
    yield from re.findall(r'(?:src|href)="([^"]+)"', prose)


def anchors(text: str) -> set[str]:
    """What headings can be linked by."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    plain = [re.sub(r"\[(.+?)\]\(.*?\)", r"\1", heading) for heading in headings]
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in plain}


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path, reference: Path) -> None:
    for link in links(page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        if path.is_relative_to(DOCS / "reference"):
            path = reference / path.relative_to(DOCS / "reference")
        assert path.exists(), f"{page.relative_to(ROOT)}: {link} leads nowhere"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), (
                f"{page.relative_to(ROOT)}: no heading for {link}"
            )


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_plain(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "TODO" not in text, "a placeholder is left"
    for number, line in enumerate(text.splitlines(), start=1):
        assert not re.search(r"(?<![\w.])/(?:home|work|tmp|root|Users)/", line), f"{page}:{number}: an absolute path"


@pytest.mark.parametrize("readme", sorted(ROOT.glob("opensora-*/README.md")), ids=lambda path: path.parent.name)
def test_python_in_a_package_readme_runs(readme: Path, outputs: Path, tmp_path: Path) -> None:
    shutil.copytree(outputs, tmp_path / "outputs")
    for block in blocks(readme):
        if block.language == "python" and block.is_run:
            done = run_commands(f"python - <<'END'\n{block.text}\nEND", tmp_path)
            assert done.returncode == 0, f"{block.place}:\n{done.stdout}"
