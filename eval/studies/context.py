"""Perplexity of the same tokens with more and more text before them."""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean

from huggingface_hub.dataclasses import strict

from modeling_hope.eval.long_documents import OF_EACH_SOURCE
from modeling_hope.eval.reading import READINGS, read_as
from modeling_hope.training.markdown_table import markdown_table
from modeling_hope.training.options import option
from modeling_hope.training.plots import new_figure, save_figure

from .document_settings import ReaderSettings, check_readers, config_of, documents_of, ids_of, load_reader
from .study import Part, Report, Result, Study


ABOUT = """Perplexity against context used (figure 10): the last tokens of long documents, the same ones each time, scored after more
and more of the text before them was read: frozen with the model's window and sinks, learning with the same, and frozen at
the native context. Each reading begins with an empty memory."""


@strict
@dataclasses.dataclass
class ContextSettings(ReaderSettings):
    """What the study is told."""

    contexts: list[int] = option(
        lambda: [256, 1024, 2048, 4096, 7168],
        "documents",
        "tokens read before those that are scored (default: 256 1024 2048 4096 7168)",
        least=1,
    )
    scored: int = option(1024, "documents", "tokens that are scored", least=1)

    def __post_init__(self) -> None:
        self.documents = self.documents or list(OF_EACH_SOURCE)

    @property
    def needed(self) -> int:
        """Tokens of a document that are read."""
        return max(self.contexts) + self.scored


def check(settings: ContextSettings) -> None:
    check_readers(settings)
    for name, place in settings.models.items():
        native = config_of(place).max_position_embeddings
        if settings.needed > native:
            raise ValueError(
                f"`contexts`: {max(settings.contexts)} and {settings.scored} scored tokens are more than the {native} that "
                f"{name} was trained to have in view: lower them, or leave {name} out."
            )


def parts(settings: ContextSettings) -> Mapping[str, Part]:
    return {
        f"{model}/{kind}/{document}": partial(_read, settings, settings.models[model], kind, document)
        for model, kind, document in product(settings.models, READINGS, documents_of(settings))
    }


def _read(settings: ContextSettings, model: str, kind: str, document: str, _: Path) -> Result:
    reader, tokenizer = load_reader(model, settings.device)
    ids = ids_of(document, documents_of(settings)[document](), tokenizer, settings.needed, settings.needed)
    readings = [
        read_as(kind, reader, ids[max(settings.contexts) - context :]).losses[-settings.scored :]
        for context in settings.contexts
    ]
    return {"losses": [mean(losses) for losses in readings]}


def report(settings: ContextSettings, found: Mapping[str, Result]) -> Report:
    documents = list(documents_of(settings))
    curves = {
        (name, kind): [
            math.exp(mean(found[f"{name}/{kind}/{document}"]["losses"][place] for document in documents))
            for place in range(len(settings.contexts))
        ]
        for name, kind in product(settings.models, READINGS)
    }
    tables = [
        f"Perplexity of {settings.scored:,} tokens, over {len(documents)} documents, by tokens read before them:\n",
        markdown_table(
            ["model", "reading", *(f"{context:,}" for context in settings.contexts)],
            [[*key, *(f"{value:.2f}" for value in curve)] for key, curve in curves.items()],
            names=2,
        ),
    ]
    figures = {
        "documents": documents,
        "losses": dict(found),
        "perplexity": [{"model": name, "reading": kind, "by_context": curve} for (name, kind), curve in curves.items()],
    }
    return Report("\n".join(tables), figures, lambda path: _plot(settings, curves, path))


def _plot(settings: ContextSettings, curves: Mapping[tuple[str, str], list[float]], path: Path) -> None:
    figure, axes = new_figure(size=(7, 4.5))
    for (name, kind), curve in curves.items():
        style = dict(zip(READINGS, ("--", "-", ":"), strict=True))[kind]
        axes.plot(settings.contexts, curve, style, marker=".", label=f"{name}, {kind}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(settings.contexts, [f"{context:,}" for context in settings.contexts])
    axes.set_xlabel("tokens read before")
    axes.set_ylabel(f"perplexity of {settings.scored:,} tokens")
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


STUDY = Study(
    name="context",
    about=ABOUT,
    settings=ContextSettings,
    quick={
        "models": {"small": "small:0"},
        "documents": ["generated:0", "generated:1"],
        "contexts": [32, 128],
        "scored": 64,
    },
    parts=parts,
    report=report,
    check=check,
)
