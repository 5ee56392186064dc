"""Frozen against learning perplexity over long documents, by one model or by several that stand beside the first."""

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean

from modeling_hope.eval.reading import READINGS, read_as
from modeling_hope.training.markdown_table import markdown_table
from modeling_hope.training.plots import new_figure, save_figure

from .document_settings import ReaderSettings, check_readers, documents_of, ids_of, load_reader
from .study import Part, Report, Result, Study


ABOUT = """Frozen against learning perplexity of the second half of long documents (section 7.3 of the paper; it has no table of this).

Each document is read three times by each model: frozen with its window and sinks, learning with the same, and frozen at
the native context. Every token's loss is taken before the model has learned from it."""
EIGHTHS = 8  # of a document, whose losses are kept
WORSE = 0.01  # a document counts as worse when its perplexity rises by more


def parts(settings: ReaderSettings) -> Mapping[str, Part]:
    return {
        f"{model}/{kind}/{document}": partial(_read, settings, settings.models[model], kind, document)
        for model, kind, document in product(settings.models, READINGS, documents_of(settings))
    }


def _read(settings: ReaderSettings, model: str, kind: str, document: str, _: Path) -> Result:
    reader, tokenizer = load_reader(model, settings.device)
    ids = ids_of(document, documents_of(settings)[document](), tokenizer, settings.tokens)
    reading = read_as(kind, reader, ids)
    return {
        "first_half": reading.perplexity(0, 0.5),
        "second_half": reading.perplexity(0.5),
        "all": reading.perplexity(),
        "parts": [reading.perplexity(part / EIGHTHS, (part + 1) / EIGHTHS) for part in range(EIGHTHS)],
        "tokens": len(ids),
    }


def report(settings: ReaderSettings, found: Mapping[str, Result]) -> Report:
    models, documents = list(settings.models), list(documents_of(settings))
    for document, *keys in ([name, *_keys(models, name)] for name in documents):
        if len({found[key]["tokens"] for key in keys}) > 1:
            raise ValueError(
                f"`documents`: some readings of {document!r} have more tokens than others, as its text has changed. Delete "
                f"{settings.out}/parts/*/*/{document}, and run again."
            )
    gains = {
        (name, other, kind): {
            document: 1
            - found[f"{name}/learning/{document}"]["second_half"] / found[f"{other}/{kind}/{document}"]["second_half"]
            for document in documents
        }
        for name in models
        for other, kind in _rivals(name, models[0])
    }
    halves = [
        [
            document,
            f"{found[f'{models[0]}/frozen/{document}']['tokens']:,}",
            *(f"{found[key]['second_half']:.2f}" for key in _keys(models, document)),
        ]
        for document in documents
    ]
    readings = [f"{name}, {kind}" if len(models) > 1 else kind for name in models for kind in READINGS]
    tables = [
        "Learning against frozen, second half: how much lower its perplexity is.\n",
        markdown_table(
            ["", "against", "mean", "least", f"of {len(documents)} worse by over {WORSE:.0%}", "the worst"],
            [
                [name, _against(name, other, kind), *_summary(by_document)]
                for (name, other, kind), by_document in gains.items()
            ],
            names=2,
        ),
        "\nPerplexity of the second half:\n",
        markdown_table(["document", "tokens", *readings], halves),
    ]
    figures = {
        "readings": dict(found),
        "gains": [
            {
                "model": name,
                "against": other,
                "reading": kind,
                "mean": mean(by_document.values()),
                "documents": by_document,
            }
            for (name, other, kind), by_document in gains.items()
        ],
    }
    return Report("\n".join(tables), figures, lambda path: _plot(models, documents, found, gains, path))


def _keys(models: Iterable[str], document: str) -> list[str]:
    return [f"{name}/{kind}/{document}" for name in models for kind in READINGS]


def _rivals(name: str, first: str) -> list[tuple[str, str]]:
    """Whose frozen readings a model is compared with: its own, and the first model's."""
    return [(other, kind) for kind in ("frozen", "native") for other in dict.fromkeys((name, first))]


def _against(name: str, other: str, kind: str) -> str:
    return f"{'itself' if other == name else other}, {'same window' if kind == 'frozen' else 'native context'}"


def _summary(by_document: Mapping[str, float]) -> list[str]:
    worst = min(by_document, key=by_document.__getitem__)
    worse = sum(gain < -WORSE for gain in by_document.values())
    return [f"{mean(by_document.values()):.1%}", f"{by_document[worst]:.1%}", str(worse), worst]


def _plot(
    models: list[str],
    documents: list[str],
    found: Mapping[str, Result],
    gains: Mapping[tuple[str, str, str], Mapping[str, float]],
    path: Path,
) -> None:
    figure, (left, right) = new_figure(1, 2, size=(12, 2 + 0.25 * len(documents)))
    for name in models:
        left.scatter(
            [100 * gains[name, name, "frozen"][document] for document in documents], documents, s=18, label=name
        )
        for kind, style in zip(READINGS, ("--", "-", ":"), strict=True):
            mean_of = [
                mean(found[f"{name}/{kind}/{document}"]["parts"][part] for document in documents)
                for part in range(EIGHTHS)
            ]
            right.plot(range(1, EIGHTHS + 1), mean_of, style, label=f"{name}, {kind}")
    left.axvline(0, color="#888888", linewidth=0.8)
    left.invert_yaxis()
    left.set_xlabel("lower perplexity by learning, second half, %")
    right.set_xlabel(f"part of the document, of {EIGHTHS}")
    right.set_ylabel("perplexity, mean over documents")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


STUDY = Study(
    name="test_time_learning",
    about=ABOUT,
    settings=ReaderSettings,
    quick={
        "models": {"small": "small:0", "other": "small:1"},
        "documents": ["generated:0", "generated:1"],
        "tokens": 256,
    },
    parts=parts,
    report=report,
    check=check_readers,
)
