"""Build the documentation as a site: `make docs`, or `python -m scripts.site FOLDER`.

The pages are laid out as they lie in the repository, with the files that they link to: a link that is right on a code
host is right in the site. Whatever leads nowhere, a heading that is not there too, fails the build.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("bench/*.md")])
STYLE = ROOT / "docs/site.css"
LINK = re.compile(r"(?:\]\(|\b(?:src|srcset)=\")([^)\s#\"]+)")


def build(site: Path) -> str:
    """Build into `site`, in place of what is there; what was said of it. Raises `SystemExit` with that, if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder, "pages"))
        shutil.copy(ROOT / "mkdocs.yml", folder)
        command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", "mkdocs.yml"]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if run.returncode != 0:
            raise SystemExit(run.stdout + run.stderr)
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(Path(folder, "site"), site)
    return run.stdout


def lay_out(folder: Path) -> None:
    """Copy the pages, and what they link to, into `folder`."""
    for file in sorted({*PAGES, *linked(), STYLE}):
        target = folder / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)


def linked() -> Iterator[Path]:
    """The files of the repository that the pages link to."""
    for page in PAGES:
        for target in LINK.findall(page.read_text()):
            file = (page.parent / target).resolve()
            if ":" not in target and file.is_file():
                yield file


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
