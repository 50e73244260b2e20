"""The documentation as a site: it builds, its links lead somewhere, and its pages load nothing from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts import site

ATTRIBUTE = re.compile(r'<(\w+)[^>]*?\s(href|src|srcset)="?([^"\s>]+)')


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does, where a link that leads nowhere is an error."""
    folder = tmp_path_factory.mktemp("site") / "site"
    site.build(folder)
    return folder


def references(page: Path) -> list[tuple[str, str]]:
    """What the elements of a built page refer to: the element's name, and where to."""
    return [(name, target) for name, _, target in ATTRIBUTE.findall(page.read_text())]


def test_every_page_is_there_and_in_the_navigation(built: Path) -> None:
    """Each page of the repository is one of the site, and can be reached from the first."""
    home = (built / "index.html").read_text()
    for page in site.PAGES:
        name = str(page.relative_to(site.ROOT).with_suffix(".html"))
        name = "index.html" if name == "README.html" else name.replace("bench/README.html", "bench/index.html")
        assert (built / name).is_file(), name
        assert f'href="{name}"' in home or name == "index.html", name


def test_links_between_pages_lead_somewhere(built: Path) -> None:
    """To files that are there, those of the repository that a page links to among them."""
    for page in [page for page in built.rglob("*.html") if page.name != "404.html"]:
        for _, target in references(page):
            if not re.match(r"[a-z]+:|#|//", target):
                assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"


def test_pages_load_nothing_from_elsewhere(built: Path) -> None:
    """No script, style, font or picture of another host: what leads away is a link that somebody has to follow."""
    for page in built.rglob("*.html"):
        loaded = [target for name, target in references(page) if name != "a"]
        assert [target for target in loaded if re.match(r"https?:|//", target)] == [], page.name


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So does one to a heading that is not there."""

    def lay_out_wrongly(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "README.md").write_text("# Here\n\n[there](#nowhere) and [there](nothing.md)\n")

    monkeypatch.setattr(site, "lay_out", lay_out_wrongly)
    with pytest.raises(SystemExit, match="2 issues"):
        site.build(tmp_path / "site")
