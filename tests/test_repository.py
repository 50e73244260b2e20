"""What is kept here agrees with itself, and names nothing that is only on somebody's machine."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import realtime
from scripts.update_pins import EXTRAS

ROOT = Path(__file__).resolve().parent.parent

# In pieces, or this file would name them.
REGISTRIES = [
    ".".join(labels)
    for labels in (
        ("pypi", "org"),
        ("pythonhosted", "org"),
        ("anaconda", "org"),
        ("npmjs", "org"),
        ("npmjs", "com"),
        ("yarnpkg", "com"),
        ("crates", "io"),
        ("rubygems", "org"),
    )
]
FORBIDDEN = re.compile("|".join([*map(re.escape, REGISTRIES), r"(?<![\w.~$})/-])/(?:root|home|Users|work)(?![\w.-])"]))


def repository_files() -> list[Path]:
    """Return what is committed, and what would be: new files that are not ignored."""
    if not (ROOT / ".git").exists() and "CI" not in os.environ:
        pytest.skip("not a git checkout")
    # A clone may belong to another user than the one who runs the tests; git refuses that unless told.
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others"]
    listing = subprocess.run([*command, "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    names = os.fsdecode(listing.stdout).split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def forbidden_in(text: str) -> list[str]:
    """Return the lines that name a package registry or an absolute path of a machine."""
    return [line.strip() for line in text.splitlines() if FORBIDDEN.search(line)]


def test_no_file_names_a_registry_or_a_path_of_a_machine() -> None:
    """Installing goes by the user's own settings, and paths are relative to the repository."""
    found = {}
    for file in repository_files():
        content = file.read_bytes()
        if b"\0" not in content and (lines := forbidden_in(content.decode(errors="replace"))):
            found[str(file.relative_to(ROOT))] = lines
    assert found == {}


@pytest.mark.parametrize(
    "line",
    [
        f"pip install --index-url https://{REGISTRIES[0]}/simple x",
        f"https://files.{REGISTRIES[1]}/packages/x.whl",
        "cd /" + "root/x",
        'open("/' + 'home/someone/.env")',
        "WORKDIR /" + "work",
    ],
)
def test_a_forbidden_name_is_found(line: str) -> None:
    """The search finds what it is there to find."""
    assert forbidden_in(f"first\n{line}\nlast") == [line]


@pytest.mark.parametrize("line", ["GET /workers", "https://example.com/home", "root /usr/share/nginx/html;"])
def test_what_only_looks_alike_is_left_alone(line: str) -> None:
    """URLs and longer names are no paths of a machine."""
    assert forbidden_in(line) == []


def test_changelog_is_at_the_package_version() -> None:
    """The newest release in the changelog is the version that the package says it is."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    releases = re.findall(r"^## \[?v?(\d+\.\d+\.\d+\S*?)\]?(?:\s|$)", changelog, re.MULTILINE)
    assert releases, "CHANGELOG.md has no heading like `## 1.2.3`"
    assert releases[0] == realtime.__version__


def pins(name: str) -> dict[str, str]:
    """Return the packages that a file of requirements/ pins, with their versions."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    found: dict[str, str] = {}
    for line in lines:
        if line and not line.startswith(("#", "-r ")):
            package, _, version = line.partition("==")
            assert re.fullmatch(r"[\w.]+", version), f"not of the form name==version: {line}"
            found[canonicalize_name(package)] = version
    return found


def test_pins_are_within_what_the_project_asks_for() -> None:
    """Each dependency is pinned, in the right file, to a version that its range allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = [one for name in EXTRAS for one in project["project"]["optional-dependencies"][name]]
    asked = {
        "runtime.txt": [*project["project"]["dependencies"], *extras],
        "dev.txt": project["dependency-groups"]["dev"],
    }
    for file, requirements in asked.items():
        pinned = pins(file)
        for requirement in map(Requirement, requirements):
            version = pinned.get(canonicalize_name(requirement.name))
            assert version is not None, f"{requirement} is not pinned in {file}: make pins"
            assert requirement.specifier.contains(version), f"{file} pins {version}, asked is {requirement}"


def test_no_package_is_pinned_twice() -> None:
    """What the server runs on is pinned in one place, so that the checks run on the same."""
    assert pins("runtime.txt").keys() & pins("dev.txt").keys() == set()
