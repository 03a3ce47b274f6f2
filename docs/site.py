"""What mkdocs needs to build the site from pages that also read well in the repository.

The pages outside docs/ (research, benchmarks, tests, changes, contributing) join the site. Links between pages keep
their relative form in the sources; here they become links within the site. A link to a file that is no page leads to
the repository when `repo_url` is set, and is plain text otherwise.
"""

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
OUTSIDE = (
    "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/gpu.md", "benchmarks/gpu_variants.md",
    "research/README.md", "research/study.md", "tests/README.md", "tests/ROBUSTNESS.md",
)  # fmt: skip
README = "readme/README.md"  # in the site, though in no menu: so that its links are checked
PICTURES = "research/figures/*.png"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|#|mailto:)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and pictures outside docs/."""
    pictures = sorted(ROOT.glob(PICTURES))
    for path in (*(ROOT / name for name in OUTSIDE), *pictures):
        if path.exists():  # an sdist has no research
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    files.append(File.generated(config, README, abs_src_path=str(ROOT / "README.md")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn links by place in the repository into links within the site."""
    source = page.file.src_uri
    here = source if source in OUTSIDE else "README.md" if source == README else f"docs/{source}"
    if source == README:
        page.meta["search"] = {"exclude": True}

    def relinked(match: Any) -> str:
        mark, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        place = posixpath.normpath(posixpath.join(posixpath.dirname(here), target))
        uri = place.removeprefix("docs/")
        if files.get_file_from_path(uri) is not None:
            return f"{mark}[{text}]({posixpath.relpath(uri, posixpath.dirname(source) or '.')}{anchor})"
        if not (ROOT / place).exists():
            return match[0]  # mkdocs reports it
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/HEAD/{place})"
        return text

    fences = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(relinked, part) for part in fences)


def on_config(config: Any) -> Any:
    """The repository's address comes from the environment: the sources name none."""
    config.repo_url = os.environ.get("REPO_URL") or None
    return config
