"""Links to the repository in the package's metadata, from its address in pyproject.toml."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# A link or an image of Markdown whose target is a file of the repository.
RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


class RepositoryLinks(MetadataHookInterface):
    """Sets the project's URLs, and makes the links of the README absolute for PyPI."""

    def update(self, metadata: dict[str, Any]) -> None:  # noqa: D102
        repository, documentation = self.config["repository"], self.config["documentation"]
        version = metadata["version"]
        development = ".dev" in version
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        if repository:
            revision = "main" if development else f"v{version}"
            text = absolute(text, repository, revision)
            metadata["urls"] = {
                "Repository": repository,
                "Issues": f"{repository}/issues",
                "Changelog": f"{repository}/blob/{revision}/CHANGELOG.md",
            }
            if documentation:
                metadata["urls"]["Documentation"] = documentation
        elif not development:
            raise ValueError(
                f"the links of the release {version} need the address of the repository: "
                "set `repository` in [tool.hatch.metadata.hooks.custom] of pyproject.toml"
            )
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def absolute(text: str, repository: str, revision: str) -> str:
    """The README with links that lead to a revision of the repository."""

    def replace(match: re.Match[str]) -> str:
        image, words, path = match.groups()
        kind = "raw" if image else "blob"
        return f"{image}[{words}]({repository}/{kind}/{revision}/{path})"

    return RELATIVE.sub(replace, text)
