"""Write the pins in requirements/ anew: the newest versions that pyproject.toml allows.

Runs on the standard library alone, in an environment of its own: `make pins`.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("openai", "redis")
"""What a server may run on beside its dependencies. The extra otel is with the tools."""
NOT_PINNED = {"pip", "setuptools", "wheel"}


def main() -> None:
    """Resolve the runtime's dependencies, then the tools on top of them, and write down both."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras: dict[str, list[str]] = project["project"]["optional-dependencies"]
    runtime = [*project["project"]["dependencies"], *(one for name in EXTRAS for one in extras[name])]
    dev: list[str] = project["dependency-groups"]["dev"]
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder, "bin", "python")
        for_running = installed_after(python, runtime)
        for_working = installed_after(python, [*runtime, *dev])
    moved = {name for name, version in for_running.items() if for_working[name] != version}
    if moved:
        sys.exit(f"The tools need other versions than the runtime: {', '.join(sorted(moved))}")
    write("runtime", "What the server runs on, with the extras openai and redis.", for_running, runtime)
    tools = {name: version for name, version in for_working.items() if name not in for_running}
    write("dev", "What the checks run on, on top of the runtime.", tools, dev, include="-r runtime.txt")


def installed_after(python: Path, requirements: list[str]) -> dict[str, str]:
    """Install what is required; return every package that is there then, with its version."""
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "--quiet", *requirements], check=True)
    subprocess.run([*pip, "check"], check=True)
    listing = subprocess.run([*pip, "list", "--format=freeze"], check=True, capture_output=True, text=True)
    pins = (line.split("==") for line in listing.stdout.splitlines())
    return {normal(name): version for name, version in pins if name not in NOT_PINNED}


def write(name: str, purpose: str, pins: dict[str, str], direct: list[str], include: str = "") -> None:
    """Write one file: first what pyproject.toml asks for, then what that brings along."""
    asked = {normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in direct}  # type: ignore[index]
    lines = [f"# {purpose} Written by `make pins`; pyproject.toml says what for.", include, "", "# asked for"]
    lines += [f"{package}=={pins[package]}" for package in sorted(pins) if package in asked]
    lines += ["", "# brought along"]
    lines += [f"{package}=={pins[package]}" for package in sorted(pins) if package not in asked]
    text = "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"
    (ROOT / "requirements" / f"{name}.txt").write_text(text)


def normal(name: str) -> str:
    """Return the one spelling of a package's name that compares equal."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
