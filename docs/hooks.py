"""For mkdocs: pages of the repository that lie outside docs/, and links to what is no page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {  # of the site, from the repository
    "recipes.md": "recipes/README.md",
    "design.md": "DESIGN.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
}
PICTURES = {
    path.name: f"recipes/results/{path.name}" for path in ROOT.glob("recipes/results/*.svg")
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and pictures that lie elsewhere."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    for name, source in PICTURES.items():
        files.append(File.generated(config, f"pictures/{name}", abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are on the site: to its pages, or, of files that are none, as text."""
    here = ROOT / PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def link(match: re.Match[str]) -> str:
        picture, text, target, anchor = match.groups(default="")
        if "://" in target:
            return match.group(0)
        path = (here.parent / target).resolve()
        if not path.exists():
            return match.group(0)  # mkdocs says so, and fails
        inside = str(path.relative_to(ROOT))
        by_source = {source: page for page, source in PAGES.items()}
        by_source |= {source: f"pictures/{name}" for name, source in PICTURES.items()}
        if inside.startswith("docs/") and path.is_file():
            return f"{picture}[{text}]({inside.removeprefix('docs/')}{anchor})"
        if inside == "README.md":
            return f"{picture}[{text}](index.md)"
        if inside in by_source:
            return f"{picture}[{text}]({by_source[inside]}{anchor})"
        return text if text.strip("`") == inside else f"{text} (`{inside}`)"

    return LINK.sub(link, markdown)
