"""The fenced blocks of the README and of docs/, with the markers that say how each is tested.

A marker is a comment right before its block: `<!-- shell -->`, or with an argument
`<!-- module: myjobs.py -->`. A JSON block without a marker is the answer to the block before it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests import ROOT

PAGES: Final = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

SHOP: Final = ROOT / "docs" / "examples" / "shop"
"""The example program. `test_shop.py` runs the commands of its README."""

WORKERS: Final = ROOT / "docs" / "examples" / "workers"
"""The workers in Python and TypeScript. `tests/remote` runs them."""

REACT: Final = ROOT / "docs" / "examples" / "react"
"""The frontend. `test_react.py` builds it and drives it in a browser."""

MARKERS: Final = {
    "module": "python",
    "shell": "console",
    "graphql": "graphql",
    "subscription": "graphql",
    "sql": "sql",
    "entry point": "toml",
    "unit": "ini",
    "workflow": "yaml",
    "nginx": "nginx",
    "client": "ts yaml json toml python",
}
"""The markers, each with the languages of its blocks."""

_BLOCK: Final = re.compile(
    r"(?:^<!-- (?P<kind>[a-z ]+?)(?:: (?P<argument>\S+))? -->\n)?"
    r"^ *```(?P<language>\w*)\n(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block. `answer` is the text of the JSON block that follows it as its answer."""

    page: str
    line: int
    kind: str | None
    argument: str | None
    language: str
    text: str
    answer: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page in order, each answer as a part of the block that it answers."""
    content = page.read_text("utf-8")
    blocks: list[Block] = []
    end = 0
    for found in _BLOCK.finditer(content):
        between = content[end : found.start()]
        language, text = found["language"], found["text"]
        answers = (
            found["kind"] is None
            and language == "json"
            and not between.strip()
            and bool(blocks)
            and blocks[-1].kind in ("graphql", "subscription")
            and blocks[-1].answer is None
        )
        end = found.end()
        if answers:
            last = blocks.pop()
            blocks.append(
                Block(
                    last.page,
                    last.line,
                    last.kind,
                    last.argument,
                    last.language,
                    last.text,
                    answer=text,
                )
            )
            continue
        line = content.count("\n", 0, found.start()) + 1
        blocks.append(Block(page.name, line, found["kind"], found["argument"], language, text))
    return blocks


def blocks(kind: str, *pages: str) -> list[Block]:
    """The blocks with this marker, of the pages with these names; of all pages without names."""
    return [
        block
        for page in PAGES
        if not pages or page.name in pages
        for block in blocks_of(page)
        if block.kind == kind
    ]


def write_modules(folder: Path, modules: Sequence[Block] | None = None) -> list[Path]:
    """Write the Python examples into a folder, each under its name."""
    written = []
    for block in blocks("module") if modules is None else modules:
        assert block.argument is not None, f"{block}: the marker names no file"
        path = folder / block.argument
        assert not path.exists(), f"{block}: another example is called {block.argument}"
        path.write_text(block.text, "utf-8")
        written.append(path)
    return written


def matches(shown: object, came: object) -> bool:
    """Whether an answer is as shown. `…` in a shown text stands for any text, and a shown number
    with a fraction stands for similar ones."""
    match shown:
        case dict():
            return (
                isinstance(came, dict)
                and shown.keys() == came.keys()
                and all(matches(value, came[key]) for key, value in shown.items())
            )
        case list():
            return (
                isinstance(came, list)
                and len(shown) == len(came)
                and all(map(matches, shown, came))
            )
        case str():
            return isinstance(came, str) and pattern_of(shown).fullmatch(came) is not None
        case float():
            return isinstance(came, float) and math.isclose(shown, came, rel_tol=0.5)
    return shown == came and type(shown) is type(came)


def pattern_of(shown: str) -> re.Pattern[str]:
    """What matches a shown text, where `…` stands for any text."""
    return re.compile(".*?".join(map(re.escape, shown.split("…"))), re.DOTALL)
