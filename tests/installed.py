"""Run by the nox session ``install`` where only some packages are there: commands work, models build, hints are right.

python tests/installed.py opensora-core opensora-models
"""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

CONFIG = """
model = dict(type="STDiT3", hidden_size=48, depth=1, num_heads=4)
scheduler = dict(type="rflow")
dataset = dict(type="VideoTextDataset", data_path="clips.csv")
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of the commands as a user would."""
    return subprocess.run(
        [Path(sys.executable).with_name(command[0]), *command[1:]], capture_output=True, text=True, check=False
    )


def main() -> None:
    """Check what must hold with exactly the packages that the arguments name."""
    expected = set(sys.argv[1:])
    plugins = run("opensora", "plugins", "--json")
    assert plugins.returncode == 0, plugins.stderr
    listed = {plugin["distribution"] for plugin in json.loads(plugins.stdout)}
    assert listed == expected, f"{listed} are installed, not {expected}"
    for command in (
        ["opensora", "--help"],
        ["opensora-run", "--help"],
        ["opensora", "doctor"],
        ["opensora", "configs"],
    ):
        done = run(*command)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    verified = run("opensora", "verify", "models", "STDiT3", "hidden_size=48", "depth=1", "num_heads=4")
    assert verified.returncode == 0, verified.stderr
    with TemporaryDirectory() as folder:
        config = Path(folder, "config.py")
        config.write_text(CONFIG)
        done = run("opensora-run", str(config))
    assert done.returncode == 2, done.stderr
    needed = ("opensora-schedulers", "opensora-data")  # in the order in which the config asks for them
    if missing := next((name for name in needed if name not in expected), None):
        assert f"pip install {missing}" in done.stderr, done.stderr
    else:
        assert "clips.csv" in done.stderr, done.stderr
    print(f"{', '.join(sorted(expected))}: as they should be")


if __name__ == "__main__":
    main()
