"""Text out of HTML, and out of Mallard, the XML of GNOME's help."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

from .plain_text import Block, one_line


HEADINGS = {"h1": 1, "h2": 2, "h3": 3, "h4": 4, "h5": 5, "h6": 6, "title": 1}
CONTAINERS = {
    *("address", "article", "aside", "blockquote", "body", "center", "dd", "details", "div", "dl", "dt", "fieldset"),
    *("figcaption", "figure", "html", "li", "main", "ol", "section", "table", "tbody", "td", "tfoot", "th", "thead"),
    *("tr", "ul", "caption"),
    *("note", "page", "quote", "terms", "tree"),
}
CODE = {"pre", "screen", "listing"}
BLOCKS = {*HEADINGS, *CONTAINERS, *CODE, "p", "hr"}
VOID = {"br", "hr", "img", "input", "meta", "col", "area", "base", "wbr"}
SKIPPED_TAGS = {
    *("head", "script", "style", "nav", "header", "footer", "form", "select", "button", "svg", "math", "iframe"),
    *("object", "noscript", "textarea"),
    *("info", "media", "links", "comment"),
}
# Classes, ids and roles of what Sphinx, DocBook, AsciiDoc, Publican, Drupal and SQLite's own pages put around their text.
SKIPPED_MARKS = {
    *("navigation", "search", "contentinfo", "banner"),
    *(
        "related",
        "sphinxsidebar",
        "headerlink",
        "toctree-wrapper",
        "contents",
        "footer",
        "genindextable",
        "modindextable",
    ),
    *(
        "wy-nav-side",
        "wy-nav-top",
        "wy-breadcrumbs",
        "rst-footer-buttons",
        "viewcode-link",
        "linenos",
        "doc-translation",
    ),
    *("navheader", "navfooter", "toc", "lot", "docnav", "indexterm", "index", "footer-text", "ulink-url"),
    *("book-navigation", "page-links"),
    *(
        "menu",
        "mainmenu",
        "submenu",
        "searchmenu",
        "fancy_toc",
        "tagline",
        "imgcontainer",
        "version_switcher_placeholder",
    ),
}
# An open element that the start of another ends, and the elements beyond which it is not looked for.
CELLS = {"td", "th"}
ENDS = {
    "li": ({"li"}, {"ul", "ol"}),
    "dt": ({"dt", "dd"}, {"dl"}),
    "dd": ({"dt", "dd"}, {"dl"}),
    "tr": ({"tr"}, {"table"}),
    "td": (CELLS, {"table", "tr"}),
    "th": (CELLS, {"table", "tr"}),
}
DEEPEST = 150  # elements within each other; what is never closed would else nest without end
LONGEST_CELL = 300  # characters: tables with longer cells lay out text
LONGEST_TERM = 300


class Element:
    __slots__ = ("children", "skipped", "tag")

    def __init__(self, tag: str, skipped: bool = False) -> None:
        self.tag = tag
        self.skipped = skipped
        self.children: list[Element | str] = []


class _TreeBuilder(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Element("html")
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in BLOCKS:
            self._end({"p", *HEADINGS} - {"title"}, CONTAINERS)
        if tag in ENDS:
            self._end(*ENDS[tag])
        element = Element(tag, is_skipped(tag, attrs))
        self.open[-1].children.append(element)
        if tag not in VOID and len(self.open) < DEEPEST:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, is_skipped(tag, attrs)))

    def handle_endtag(self, tag: str) -> None:
        self._end({tag}, set() if tag in BLOCKS or tag in SKIPPED_TAGS else BLOCKS)

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)

    def _end(self, tags: set[str], beyond: set[str]) -> None:
        for place in range(len(self.open) - 1, 0, -1):
            if self.open[place].tag in tags:
                del self.open[place:]
                return
            if self.open[place].tag in beyond:
                return


def is_skipped(tag: str, attrs: list[tuple[str, str | None]]) -> bool:
    marks = {mark for name, value in attrs if name in ("class", "id", "role") and value for mark in value.split()}
    return tag in SKIPPED_TAGS or not marks.isdisjoint(SKIPPED_MARKS)


def read_html(text: str) -> list[Block]:
    """The text of a page, without navigation, contents, scripts and forms."""
    builder = _TreeBuilder()
    builder.feed(text)
    builder.close()
    return blocks_in(builder.root)


def read_mallard(text: str) -> list[Block]:
    """The text of a page of GNOME's help."""
    return blocks_in(_element(ElementTree.fromstring(text)))


def _element(node: ElementTree.Element) -> Element:
    tag = str(node.tag).rpartition("}")[2]
    made = Element({"item": "li", "steps": "ol", "list": "ul", "media": "img"}.get(tag, tag), tag in SKIPPED_TAGS)
    made.children = [node.text or ""]
    for child in node:
        made.children += [_element(child), child.tail or ""]
    return made


def blocks_in(element: Element) -> list[Block]:
    """The blocks of an element, in order."""
    blocks: list[Block] = []
    line: list[str] = []

    def end_line() -> None:
        # Two line breaks end a paragraph, one does not.
        blocks.extend(Block(one_line(part)) for part in re.split(r"\v\s*\v", "".join(line)) if part.strip())
        line.clear()

    def walk(parent: Element) -> None:
        for child in parent.children:
            if isinstance(child, str):
                line.append(child)
            elif child.skipped:
                continue
            elif child.tag == "br":
                line.append("\v")
            elif child.tag in BLOCKS:
                end_line()
                blocks.extend(_block(child))
            else:
                walk(child)

    walk(element)
    end_line()
    return blocks


def _block(element: Element) -> list[Block]:
    if element.tag in CODE:
        return [Block(text_in(element), "code")]
    if element.tag in HEADINGS:
        return [Block(one_line(text_in(element)), "heading", HEADINGS[element.tag])]
    if element.tag == "p":
        inside = [child for child in element.children if not isinstance(child, str) or child.strip()]
        alone = inside[0] if len(inside) == 1 else None
        if isinstance(alone, Element) and alone.tag in ("strong", "b"):
            return [Block(one_line(text_in(alone)), "heading", 7)]
    if element.tag in ("ul", "ol"):
        return _items(element)
    if element.tag == "dl":
        return _definitions(element)
    if element.tag == "tr":
        return _row(element)
    return blocks_in(element)


def _items(element: Element) -> list[Block]:
    blocks: list[Block] = []
    number = 0
    for child in element.children:
        if isinstance(child, Element) and not child.skipped:
            inside = blocks_in(child)
            if child.tag == "li" and inside and inside[0].kind in ("text", "heading"):
                number += 1
                mark = "-" if element.tag == "ul" else f"{number}."
                inside[0] = Block(f"{mark} {inside[0].text}", "item")
            blocks += inside
    return blocks


def _definitions(element: Element) -> list[Block]:
    """Each term and the first paragraph that defines it as one."""
    blocks: list[Block] = []
    term = ""
    for child in element.children:
        if not isinstance(child, Element) or child.skipped:
            continue
        inside = blocks_in(child)
        if child.tag == "dt":
            text = " ".join(block.text for block in inside)
            term = f"{term}, {text}" if term and text else term or text
            continue
        if term and inside and inside[0].kind == "text" and len(term) <= LONGEST_TERM:
            inside[0] = Block(f"{term.rstrip(':')}: {inside[0].text}")
        elif term:
            blocks.append(Block(term))
        term = ""
        blocks += inside
    return [*blocks, Block(term)] if term else blocks


def _row(element: Element) -> list[Block]:
    cells = [blocks_in(child) for child in element.children if isinstance(child, Element) and not child.skipped]
    texts = [" ".join(block.text for block in cell) for cell in cells if cell]
    if all(len(text) <= LONGEST_CELL for text in texts) and not any(b.kind == "code" for cell in cells for b in cell):
        return [Block((": " if len(texts) == 2 else " | ").join(texts), "row")] if texts else []
    return [block for cell in cells for block in cell]


def text_in(element: Element) -> str:
    """All text inside, as it stands."""
    parts = []
    for child in element.children:
        if isinstance(child, str):
            parts.append(child)
        elif not child.skipped:
            parts.append("\n" if child.tag == "br" else text_in(child))
    return "".join(parts)
