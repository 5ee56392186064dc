"""Text out of manuals: Perl's pod, and pages for man."""

from __future__ import annotations

import html
import re

from .plain_text import Block, one_line


def read_pod(text: str) -> list[Block]:
    """The text of a pod file; what is meant for one kind of output only is left out."""
    blocks: list[Block] = []
    term, outside, within = "", True, ""
    for part in re.split(r"\n[ \t]*\n", text.strip("\n")):
        part = part.strip("\n")
        command = re.match(r"=([a-z]+\d?)\s*(.*)", part, flags=re.S)
        if command:
            name, argument = command.groups()
            outside = name == "cut"
            if name in ("begin", "end"):
                within = argument if name == "begin" else ""
            elif name.startswith("head"):
                blocks.append(Block(pod_line(argument), "heading", int(name[4:])))
            elif name == "item":
                if term not in ("", "-"):
                    blocks.append(Block(f"- {term}", "item"))
                term = "-" if argument in ("", "*", "o", "-") else pod_line(re.sub(r"^\*\s+", "", argument))
            elif name == "back" and term not in ("", "-"):
                blocks.append(Block(f"- {term}", "item"))
                term = ""
        elif outside or within or not part.strip():
            continue
        elif part[0] in " \t":
            if blocks and blocks[-1].kind == "code" and not term:
                blocks[-1] = Block(f"{blocks[-1].text}\n\n{part}", "code")
            else:
                blocks += _term(term)
                blocks.append(Block(part, "code"))
            term = ""
        else:
            blocks.append(_defined(term, pod_line(part)))
            term = ""
    return [*blocks, *_term(term)]


def _term(term: str) -> list[Block]:
    return [Block(f"- {term}", "item")] if term not in ("", "-") else []


def _defined(term: str, text: str) -> Block:
    if not term:
        return Block(text)
    if re.fullmatch(r"-|\d+\.?", term):
        return Block(f"{term} {text}", "item")
    return Block(f"{term.rstrip(':')}: {text}")


OPEN, SHUT = "\x01", "\x02"  # angle brackets that are meant


def pod_line(text: str) -> str:
    """A paragraph of pod without its codes, on one line."""
    text = re.sub(r"E<(\w+)>", _character, text)
    text = re.sub(r"([A-Z])(<<+)\s+(.*?)\s+>>+", lambda m: _shown(m[1], _kept(m[3])), text, flags=re.S)
    text = re.sub(r"->|=>|<=", lambda m: _kept(m[0]), text)
    last = None
    while text != last:
        last, text = text, re.sub(r"([A-Z])<([^<>]*)>", lambda m: _shown(m[1], m[2]), text)
    return one_line(text.replace(OPEN, "<").replace(SHUT, ">"))


def _character(match: re.Match[str]) -> str:
    name = match[1]
    code = {"sol": "/", "verbar": "|"}.get(name)
    if code is None:
        code = chr(int(name, 0)) if re.fullmatch(r"0x[0-9a-fA-F]+|[1-9]\d*", name) else html.unescape(f"&{name};")
    return _kept(code)


def _kept(text: str) -> str:
    return text.replace("<", OPEN).replace(">", SHUT)


def _shown(code: str, text: str) -> str:
    if code in "XZ":
        return ""
    if code == "L":
        label, bar, _ = text.partition("|")
        if bar:
            return label
        page, _, section = text.partition("/")
        section = section.strip('"')
        if "://" in text or not section:
            return text
        return f"{section} in {page}" if page else section
    return text


MAN_STRINGS = {'L"': '"', 'R"': '"', "Aq": "'", "--": "—", "PI": "π", "C`": "", "C'": ""}
MAN_SPECIAL = {
    "aq": "'",
    "dq": '"',
    "em": "—",
    "en": "\u2013",
    "co": "©",
    "bu": "*",
    "lq": '"',
    "rq": '"',
    "oq": "'",
    "cq": "'",
}
MAN_ESCAPES = {"-": "-", "e": "\\", "\\": "\\", " ": " ", "~": " ", "0": " ", "'": "'", "`": "`"}


def read_man(text: str) -> list[Block]:
    """The text of a manual page."""
    blocks: list[Block] = []
    paragraph: list[str] = []
    code: list[str] | None = None
    term, term_next = "", False

    def end_paragraph() -> None:
        nonlocal term
        if paragraph:
            blocks.append(_defined(term, one_line(" ".join(paragraph))))
            term = ""
        paragraph.clear()

    lines = text.split("\n")
    start = next((i for i, line in enumerate(lines) if line.startswith(".TH")), -1)
    for line in lines[start + 1 :]:
        line = re.sub(r"^\.el +", "", line)  # `.ie n` before it is for terminals, which need no fonts
        if line.startswith(".ie "):
            continue
        macro = re.match(r"[.'][ \t]*([A-Za-z\\\"]+)[ \t]*(.*)", line)
        if not macro:
            shown = man_line(line)
            if code is not None:
                code.append(shown)
            elif term_next:
                term, term_next = one_line(shown), False
            elif shown.strip():
                paragraph.append(shown)
            else:
                end_paragraph()
            continue
        name, argument = macro.groups()
        words = [quoted or word for quoted, word in re.findall(r'"((?:[^"]|"")*)"|(\S+)', argument)]
        if name in ("Ve", "fi", "EE") and code is not None:
            blocks.append(Block("\n".join(code), "code"))
            code = None
        elif name in ("Vb", "nf", "EX"):
            end_paragraph()
            blocks += _term(term)
            term, code = "", []
        elif name in ("SH", "SS"):
            end_paragraph()
            blocks += _term(term)
            blocks.append(Block(man_line(" ".join(words)), "heading", 1 if name == "SH" else 2))
            term = ""
        elif name in ("IP", "TP"):
            end_paragraph()
            blocks += _term(term)
            shown = one_line(man_line(words[0])) if name == "IP" and words else ""
            term, term_next = "-" if name == "IP" and shown in ("", "*", "•") else shown, name == "TP"
        elif name in ("PP", "P", "LP", "Sp", "sp", "RS", "RE", "br"):
            end_paragraph()
        elif name in ("B", "I", "BR", "BI", "IR", "RB", "RI", "IB"):
            shown = man_line(("" if len(name) == 2 else " ").join(words))
            if term_next:
                term, term_next = one_line(shown), False
            else:
                paragraph.append(shown)
    end_paragraph()
    return [*blocks, *_term(term)]


def man_line(text: str) -> str:
    """A line without roff's escapes."""
    return re.sub(
        r"\\(?:f(?:\(..|\[[^]]*\]|.)|s(?:[+-]?\d)|\*\((..)|\((..)|\[([^]]*)\]|(.?))",
        lambda m: (
            MAN_STRINGS.get(m[1], "")
            if m[1]
            else MAN_SPECIAL.get(m[2] or m[3], "")
            if m[2] or m[3]
            else MAN_ESCAPES.get(m[4] or "", "")
        ),
        text,
    )
