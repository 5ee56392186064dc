"""How many levels, and how slow the slowest: what they are worth on documents and on needles."""

import dataclasses
from collections.abc import Mapping
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch.nn import functional as F
from transformers import AutoTokenizer

from modeling_hope import HopeCache, HopeForCausalLM
from modeling_hope.conversion import convert
from modeling_hope.eval.generators.needles import KINDS, needle_samples
from modeling_hope.eval.reading import read
from modeling_hope.eval.small_model import small_transformer
from modeling_hope.training.markdown_table import markdown_table
from modeling_hope.training.options import option
from modeling_hope.training.plots import new_figure, save_figure

from .document_settings import SMALL, DocumentSettings, check_documents, documents_of, ids_of
from .study import Part, Report, Result, SeededSettings, Study


ABOUT = """Number of levels and slowest period (figure 7; there on MK-NIAH, LongHealth and QASPER): a converted Transformer with each, on long
documents (second-half perplexity against the same model frozen) and on needles in a haystack (the value asked for, as greedy
decoding would say it, and its loss). Each level is a given number of times as fast as the next."""
FROZEN = "frozen"


@strict
@dataclasses.dataclass
class LevelsSettings(SeededSettings, DocumentSettings):
    """What the study is told."""

    seeds: list[int] = option(lambda: [0], "study", "of haystacks (default: 0)", least=0)
    source: str = option("", "models", "the Transformer to convert: directory of safetensors, or .gguf file")
    strategy: str = option("depth", "models", "how its MLPs become levels", choices=("depth", "split", "stack"))
    window: int | None = option(1024, "models", "of attention, besides 4 sinks; none: as the source has it")
    learning_rate: float = option(0.1, "models", "of every level")
    levels: list[int] = option(lambda: [1, 2, 3], "levels", "numbers of levels (default: 1 2 3)")
    slowest: list[int] = option(
        lambda: [512, 2048, 4096], "levels", "tokens per update of the slowest level (default: 512 2048 4096)"
    )
    factor: int = option(2, "levels", "by which each level is faster than the next")
    needles: str = option("multikey", "needles", "a kind with one value to say", choices=tuple(KINDS))
    needle_tokens: int = option(2048, "needles", "of a haystack, prompt and answer")
    needle_samples: int = option(8, "needles", "haystacks")

    def __post_init__(self) -> None:
        self.documents = self.documents or ["bayes-workflow", "style-guide"]


def periods_of(settings: LevelsSettings, levels: int, slowest: int) -> list[int]:
    """Fastest first."""
    return [slowest // settings.factor**place for place in reversed(range(levels))]


def check(settings: LevelsSettings) -> None:
    if not settings.source:
        raise ValueError(
            "`source` is empty: give the Transformer to convert, e.g. --source hope-demo/wheels/NAME.gguf."
        )
    if not settings.source.startswith(SMALL) and not Path(settings.source).exists():
        raise ValueError(f"`source`: there is no {settings.source}.")
    if KINDS[settings.needles].asked * KINDS[settings.needles].values > 1:
        raise ValueError(
            f"`needles`: {settings.needles} asks for several values, in no order. Give one that asks for one."
        )
    if not settings.levels or min(settings.levels) < 1 or settings.factor < 2:
        raise ValueError("`levels` must be 1 or more, and `factor` 2 or more: give e.g. --levels 1 2 3 --factor 2.")
    for levels, slowest in product(settings.levels, settings.slowest):
        fastest, rest = divmod(slowest, settings.factor ** (levels - 1))
        if rest or fastest < 2:
            raise ValueError(
                f"`slowest`: {levels} levels cannot end at {slowest} tokens, each {settings.factor} times as fast as the next "
                "and the fastest at 2 tokens or more. Give a power of `factor`, or fewer `levels`."
            )
    check_documents(settings)


def parts(settings: LevelsSettings) -> Mapping[str, Part]:
    made: dict[str, Part] = {}
    for key, periods in _configurations(settings).items():
        for document in documents_of(settings):
            made[f"{key}/documents/{document}"] = partial(_document, settings, periods, document)
        made[f"{key}/needles"] = partial(_needles, settings, periods)
    return made


def _configurations(settings: LevelsSettings) -> dict[str, list[int] | None]:
    """Periods by name; `None`: frozen."""
    return {FROZEN: None} | {
        f"{levels}-levels/{slowest}": periods_of(settings, levels, slowest)
        for levels, slowest in product(settings.levels, settings.slowest)
    }


@lru_cache(maxsize=1)
def _load(
    source: str, strategy: str, window: int | None, rate: float, device: str, periods: tuple[int, ...]
) -> tuple[HopeForCausalLM, Any]:
    options: dict[str, Any] = {"strategy": strategy, "window": window, "learning_rates": rate, "periods": periods}
    if source.startswith(SMALL):
        transformer, tokenizer = small_transformer(int(source.removeprefix(SMALL)))
        return convert(transformer, check=False, **options).to(device), tokenizer
    path = Path(source)
    gguf = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
    tokenizer = AutoTokenizer.from_pretrained(path.parent if gguf else path, **gguf)
    return convert(path, dtype=torch.float32, check=False, **options).to(device), tokenizer


def _reader(settings: LevelsSettings, periods: list[int] | None) -> tuple[HopeForCausalLM, Any]:
    chosen = periods or periods_of(settings, settings.levels[0], settings.slowest[0])
    fields = ("source", "strategy", "window", "learning_rate", "device")
    return _load(*(getattr(settings, name) for name in fields), tuple(chosen))


def _document(settings: LevelsSettings, periods: list[int] | None, document: str, _: Path) -> Result:
    model, tokenizer = _reader(settings, periods)
    ids = ids_of(document, documents_of(settings)[document](), tokenizer, settings.tokens)
    reading = read(model, ids, learn=periods is not None)
    return {"second_half": reading.perplexity(0.5), "all": reading.perplexity(), "tokens": len(ids)}


def _needles(settings: LevelsSettings, periods: list[int] | None, _: Path) -> Result:
    model, tokenizer = _reader(settings, periods)
    seed = settings.seeds[0]
    said = [
        answered(
            model,
            tokenizer,
            f"{sample['input']} {sample['gen_prefix']}",
            f" {sample['outputs'][0]}",
            learn=periods is not None,
        )
        for sample in needle_samples(settings.needles, tokenizer, settings.needle_tokens, settings.needle_samples, seed)
    ]
    return {"accuracy": mean(right for right, _ in said), "loss": mean(loss for _, loss in said)}


@torch.no_grad()
def answered(model: HopeForCausalLM, tokenizer: Any, prompt: str, answer: str, *, learn: bool) -> tuple[bool, float]:
    """Whether greedy decoding would go on with the answer after the prompt, and the answer's loss, in nats a token."""
    asked, wanted = (
        tokenizer(text, return_tensors="pt", verbose=False, **options).input_ids[0].to(model.device)
        for text, options in ((prompt, {}), (answer, {"add_special_tokens": False}))
    )
    memory = HopeCache(model.config)
    read(model, asked[:-1], learn=learn, memory=memory)
    last = torch.cat([asked[-1:], wanted[:-1]])
    logits = model(last[None], past_key_values=memory, learn="off").logits[0].float()
    return bool((logits.argmax(-1) == wanted).all()), float(F.cross_entropy(logits, wanted))


def report(settings: LevelsSettings, found: Mapping[str, Result]) -> Report:
    documents, configurations = list(documents_of(settings)), _configurations(settings)
    gains = {
        key: {
            document: 1
            - found[f"{key}/documents/{document}"]["second_half"]
            / found[f"{FROZEN}/documents/{document}"]["second_half"]
            for document in documents
        }
        for key in configurations
    }
    needles = {key: found[f"{key}/needles"] for key in configurations}
    rows = []
    for key, periods in configurations.items():
        spent = sum(found[f"{key}/documents/{document}"]["seconds"] for document in documents)
        least = min(gains[key].values())
        learned = ["", ""] if periods is None else [f"{mean(gains[key].values()):.1%}", f"{least:.1%}"]
        shown = ["frozen", ""] if periods is None else [str(len(periods)), ", ".join(map(str, periods))]
        rows.append(
            [*shown, *learned, f"{spent:.0f} s", f"{needles[key]['accuracy']:.0%}", f"{needles[key]['loss']:.3f}"]
        )
    tables = [
        f"Strategy `{settings.strategy}`; {len(documents)} documents of at most {settings.tokens:,} tokens; {settings.needle_samples} haystacks "
        f"of {settings.needle_tokens:,} tokens ({settings.needles}).\n",
        markdown_table(
            [
                "levels",
                "periods",
                "lower second-half perplexity",
                "the least",
                "time",
                "needles found",
                "loss of the value",
            ],
            rows,
            names=2,
        ),
    ]
    figures = {"results": dict(found), "gains": gains}
    return Report("\n".join(tables), figures, lambda path: _plot(settings, gains, needles, path))


def _plot(
    settings: LevelsSettings, gains: Mapping[str, Mapping[str, float]], needles: Mapping[str, Result], path: Path
) -> None:
    figure, (left, right) = new_figure(1, 2, size=(10, 4))
    for slowest in settings.slowest:
        keys = [f"{levels}-levels/{slowest}" for levels in settings.levels]
        left.plot(
            settings.levels, [100 * mean(gains[key].values()) for key in keys], marker="o", label=f"slowest {slowest:,}"
        )
        right.plot(settings.levels, [needles[key]["loss"] for key in keys], marker="o", label=f"slowest {slowest:,}")
    right.axhline(needles[FROZEN]["loss"], color="#888888", linewidth=0.8, label="frozen")
    left.set_ylabel("lower second-half perplexity, %")
    right.set_ylabel("loss of the needle's value, nats a token")
    for axes in (left, right):
        axes.set_xticks(settings.levels)
        axes.set_xlabel("levels")
        axes.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


STUDY = Study(
    name="levels",
    about=ABOUT,
    settings=LevelsSettings,
    quick={
        "source": "small:0",
        "window": 64,
        "documents": ["generated:0"],
        "tokens": 256,
        "levels": [1, 2],
        "slowest": [32, 64],
        "needle_tokens": 640,
        "needle_samples": 2,
    },
    parts=parts,
    report=report,
    check=check,
)
