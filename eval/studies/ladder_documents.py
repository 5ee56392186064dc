"""What more context is worth to each of the ladder's models: long documents, read past what they were trained on."""

import dataclasses
import math
from collections.abc import Mapping
from functools import lru_cache, partial
from hashlib import sha256
from itertools import islice, pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml
from huggingface_hub.dataclasses import strict
from transformers import AutoModelForCausalLM

from modeling_hope import HopeForCausalLM
from modeling_hope.conversion import convert, load_tokenizer
from modeling_hope.eval.reading import read, with_window
from modeling_hope.eval.small_model import small_transformer
from modeling_hope.training.ladder_runs import finished_runs
from modeling_hope.training.markdown_table import markdown_table
from modeling_hope.training.options import option
from modeling_hope.training.plots import new_figure, save_figure
from modeling_hope.training.recipe import SAVED
from modeling_hope.training.run_directory import MODEL
from modeling_hope.training.rungs import RUNGS

from .document_settings import SMALL, DocumentSettings, check_documents, documents_of
from .study import Part, Report, Result, Study


ABOUT = """Long documents, read by the ladder's models past the length that they were trained on: perplexity by how much of a document
has been read, in tokens. Attention, the Transformer's too, slides with a window of that length; memories read on without a
bound. Models whose levels were trained to learn are read frozen, and learning."""
BOUNDS = (0, 64, 256, 512, 1024, 2048, 4096, 8192)  # tokens from the start, between which losses are averaged
SMALL_WINDOW = 64


@strict
@dataclasses.dataclass
class LadderDocumentsSettings(DocumentSettings):
    """What the study is told."""

    runs: str = option(
        "ladder", "models", "directory of the ladder's runs, --out of python -m modeling_hope.training.ladder"
    )
    rungs: list[str] = option(list, "models", "of the ladder; none: all whose runs came to their end", tuple(RUNGS))
    seeds: list[int] = option(lambda: [0, 1], "study", "of the runs (default: 0 1)")
    tokens: int = option(2048, "documents", "of each document; shorter ones are left out")
    most: int = option(32, "documents", "documents, the first ones in the order of a hash of their text")

    def __post_init__(self) -> None:
        # What the ladder is measured on.
        self.documents = self.documents or [str(Path(self.corpus) / "test")]


def check(settings: LadderDocumentsSettings) -> None:
    if unknown := [name for name in settings.rungs if name not in RUNGS]:
        raise ValueError(f"`rungs`: there is no {unknown[0]!r}, only {', '.join(RUNGS)}.")
    if settings.most < 1:
        raise ValueError(f"`most` is {settings.most}: give at least 1 document.")
    if not _runs(settings):
        raise ValueError(
            f"`runs`: in {settings.runs} no run of these `rungs` and `seeds` has come to its end. Give --out of `python -m "
            "modeling_hope.training.ladder run`."
        )
    check_documents(settings)


def _runs(settings: LadderDocumentsSettings) -> dict[tuple[str, int], str]:
    """Where the runs are, by rung and seed."""
    if settings.runs.startswith(SMALL):
        return {("transformer", 0): settings.runs}
    found = {(name, seed): str(place) for name, seed, place in finished_runs(Path(settings.runs))}
    return {
        (name, seed): place
        for (name, seed), place in found.items()
        if seed in settings.seeds and name in (settings.rungs or RUNGS)
    }


def _readings(name: str) -> tuple[str, ...]:
    return ("frozen", "learning") if RUNGS[name].learns else ("frozen",)


def parts(settings: LadderDocumentsSettings) -> Mapping[str, Part]:
    return {
        f"{name}/{seed}/{kind}": partial(_read, settings, place, kind)
        for (name, seed), place in _runs(settings).items()
        for kind in _readings(name)
    }


@lru_cache(maxsize=1)
def load_run(place: str, device: str) -> tuple[HopeForCausalLM, Any]:
    """The model of a run, as Hope, with a window of the length that it was trained on; and its tokenizer."""
    if place.startswith(SMALL):
        model, tokenizer = small_transformer(int(place.removeprefix(SMALL)))
        window = SMALL_WINDOW
    else:
        model = AutoModelForCausalLM.from_pretrained(Path(place) / MODEL, dtype=torch.float32).eval()
        tokenizer = load_tokenizer(Path(place) / MODEL)
        window = yaml.safe_load((Path(place) / SAVED).read_text(encoding="utf-8"))["sequence_length"]
    if not isinstance(model, HopeForCausalLM):
        model = convert(model, periods=[None], check=False)
    model.config.attention_sinks = 0  # in view is what was when it was trained, and no more
    return with_window(model, window).to(device), tokenizer


def long_documents(settings: LadderDocumentsSettings, tokenizer: Any) -> dict[str, torch.Tensor]:
    """
    The first tokens, `[tokens]` int64, of documents that have as many, by name.

    Raises:
        ValueError: there is none.
    """
    texts = {name: text() for name, text in documents_of(settings).items()}
    ordered = sorted(texts, key=lambda name: sha256(texts[name].encode()).digest())  # so that no source comes first
    tokenized = ((name, tokenizer(texts[name], verbose=False).input_ids) for name in ordered)
    long = ((name, torch.tensor(ids[: settings.tokens])) for name, ids in tokenized if len(ids) >= settings.tokens)
    if not (found := dict(islice(long, settings.most))):
        raise ValueError(f"`tokens`: no document has {settings.tokens}. Give longer `documents`, or fewer tokens.")
    return found


def _bounds(settings: LadderDocumentsSettings) -> list[int]:
    return [*(bound for bound in BOUNDS if bound < settings.tokens), settings.tokens]


def _read(settings: LadderDocumentsSettings, place: str, kind: str, _: Path) -> Result:
    model, tokenizer = load_run(place, settings.device)
    documents = long_documents(settings, tokenizer)
    losses = {name: read(model, ids, learn=kind == "learning").losses for name, ids in documents.items()}
    spans = [(max(start - 1, 0), stop - 1) for start, stop in pairwise(_bounds(settings))]
    return {
        "losses": {name: [mean(of[start:stop]) for start, stop in spans] for name, of in losses.items()},
        "text": sha256(torch.stack(list(documents.values())).numpy().tobytes()).hexdigest(),
    }


def report(settings: LadderDocumentsSettings, found: Mapping[str, Result]) -> Report:
    if len({result["text"] for result in found.values()}) > 1:
        raise ValueError(
            "`documents`: some readings are of other text than others, or by another tokenizer. Give another --out."
        )
    runs = _runs(settings)
    seeds = {name: [seed for other, seed in runs if other == name] for name, _ in runs}
    curves = {
        (name, kind): _perplexities([found[f"{name}/{seed}/{kind}"] for seed in seeds[name]])
        for name in seeds
        for kind in _readings(name)
    }
    spans = list(pairwise(_bounds(settings)))
    count = len(next(iter(found.values()))["losses"])
    table = markdown_table(
        ["", "", "seeds", *(f"{start:,} to {stop:,}" for start, stop in spans)],
        [
            [name, kind, ", ".join(map(str, seeds[name])), *(f"{value:.2f}" for value in curve)]
            for (name, kind), curve in curves.items()
        ],
        names=3,
    )
    figures = {
        "readings": dict(found),
        "perplexity": [{"rung": name, "reading": kind, "by_part": curve} for (name, kind), curve in curves.items()],
    }
    return Report(
        f"Perplexity of {count} documents, the mean loss over them and over seeds:\n\n{table}",
        figures,
        lambda path: _plot(spans, curves, path),
    )


def _perplexities(readings: list[Result]) -> list[float]:
    """Of each part of the documents."""
    documents = [losses for reading in readings for losses in reading["losses"].values()]
    return [math.exp(mean(part)) for part in zip(*documents, strict=True)]


def _plot(spans: list[tuple[int, int]], curves: Mapping[tuple[str, str], list[float]], path: Path) -> None:
    figure, axes = new_figure(size=(8, 5))
    for (name, kind), curve in curves.items():
        axes.plot(range(len(spans)), curve, "-" if kind == "learning" else "--", marker=".", label=f"{name}, {kind}")
    axes.set_xticks(range(len(spans)), [f"{start:,} to {stop:,}" for start, stop in spans])
    axes.set_xlabel("part of a document, in tokens")
    axes.set_ylabel("perplexity, mean over documents and seeds")
    axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


STUDY = Study(
    name="ladder_documents",
    about=ABOUT,
    settings=LadderDocumentsSettings,
    quick={"runs": "small:0", "seeds": [0], "documents": ["generated:0", "generated:1"], "tokens": 256},
    parts=parts,
    report=report,
    check=check,
)
