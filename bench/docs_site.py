"""What MkDocs asks of this project while it builds the site (`hooks` of mkdocs.yml)."""

from __future__ import annotations

import re
from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Blocks that a test must not run are marked as such, "sh no-run" and "py-old": here they are sh and Python."""
    markdown = re.sub(r"^( *```sh) no-run$", r"\1", markdown, flags=re.MULTILINE)
    return re.sub(r"^( *```)py-old$", r"\1python", markdown, flags=re.MULTILINE)
