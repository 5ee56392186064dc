"""How many levels, and how slow the slowest: what they are worth on documents and on needles."""

import dataclasses
import math
from collections.abc import Mapping
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch.nn import functional as F

from modeling_hope import HopeCache, HopeForCausalLM
from modeling_hope.conversion import convert, load_tokenizer
from modeling_hope.eval.generators.needles import KINDS, needle_samples
from modeling_hope.eval.reading import feed, read
from modeling_hope.eval.small_model import small_transformer
from modeling_hope.training.markdown_table import markdown_table
from modeling_hope.training.options import option
from modeling_hope.training.plots import new_figure, save_figure

from .document_settings import SMALL, DocumentSettings, check_documents, documents_of, ids_of
from .study import Part, Report, Result, Study


ABOUT = """Number of levels and slowest period (figure 7; there on MK-NIAH, LongHealth and QASPER): a converted Transformer with each, on long
documents (second-half perplexity against the same model frozen) and on needles in a haystack (the value asked for, as greedy
decoding would say it, and its loss). Each level is a given number of times as fast as the next. More levels learn more from
a token, so each configuration has its own rate: of a document the one that was best on the others, and of needles the one
that was best on all documents."""
FROZEN = "frozen"


@strict
@dataclasses.dataclass
class LevelsSettings(DocumentSettings):
    """What the study is told."""

    seeds: list[int] = option(lambda: [0], "study", "of the haystacks (default: 0)")
    source: str = option("", "models", "the Transformer to convert: directory of safetensors, or .gguf file")
    strategy: str = option("depth", "models", "how its MLPs become levels", choices=("depth", "split", "stack"))
    window: int | None = option(1024, "models", "of attention, besides 4 sinks; none: as the source has it")
    rates: list[float] = option(
        lambda: [0.05, 0.1, 0.2], "levels", "learning rates of every level, to choose from (default: 0.05 0.1 0.2)"
    )
    levels: list[int] = option(lambda: [1, 2, 3], "levels", "numbers of levels (default: 1 2 3)")
    slowest: list[int] = option(
        lambda: [512, 2048, 4096], "levels", "tokens per update of the slowest level (default: 512 2048 4096)"
    )
    factor: int = option(2, "levels", "by which each level is faster than the next")
    needles: str = option("multikey", "needles", "a kind with one value to say", choices=tuple(KINDS))
    needle_tokens: int = option(2048, "needles", "of a haystack, prompt and answer")
    needle_samples: int = option(8, "needles", "haystacks of each seed")

    def __post_init__(self) -> None:
        # Whoever chooses by this study reports on others: those of `test_time_learning`.
        self.documents = self.documents or ["craft-handbook", "speech-2024"]


def periods_of(settings: LevelsSettings, levels: int, slowest: int) -> list[int]:
    """Fastest first."""
    return [slowest // settings.factor**place for place in reversed(range(levels))]


def check(settings: LevelsSettings) -> None:
    if not settings.source:
        raise ValueError(
            "`source` is empty: give the Transformer to convert, e.g. --source hope-demo/wheels/NAME.gguf."
        )
    if settings.source.startswith(SMALL):
        if not settings.source.removeprefix(SMALL).isdecimal():
            raise ValueError(f"`source`: after {SMALL} comes a seed, e.g. {SMALL}0.")
    elif not Path(settings.source).exists():
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
    if not settings.rates or min(settings.rates) <= 0:
        raise ValueError("`rates` must be above 0: give e.g. --rates 0.05 0.1.")
    if settings.needle_samples < 1:
        raise ValueError(f"`needle_samples` is {settings.needle_samples}: give at least 1.")
    check_documents(settings)
    if len(settings.rates) > 1 and len(documents_of(settings)) < 2:
        raise ValueError(
            "`rates`: of a document the rate is taken that was best on the others, and there is but one. Give two "
            "`documents` or more, or one rate."
        )
    _tokenizer(settings.source)
    try:
        _haystacks(settings, settings.seeds[0], samples=1)
    except ValueError as error:
        raise ValueError(f"`needle_tokens`: {str(error).removeprefix('`lengths`: ')} Give more.") from None


def parts(settings: LevelsSettings) -> Mapping[str, Part]:
    made: dict[str, Part] = {}
    for key, learner in _learners(settings).items():
        for document in documents_of(settings):
            made[f"{key}/documents/{document}"] = partial(_document, settings, learner, document)
        for seed in settings.seeds:
            made[f"{key}/needles/seed-{seed}"] = partial(_needles, settings, learner, seed)
    return made


@dataclasses.dataclass(frozen=True)
class Learner:
    """Levels of these periods, fastest first, and the rate of all."""

    periods: tuple[int, ...]
    rate: float


def _configurations(settings: LevelsSettings) -> dict[str, tuple[int, ...]]:
    """Periods by name."""
    return {
        f"{levels}-levels/{slowest}": tuple(periods_of(settings, levels, slowest))
        for levels, slowest in product(settings.levels, settings.slowest)
    }


def _learners(settings: LevelsSettings) -> dict[str, Learner | None]:
    """By name of the configuration, and rate; `None`: frozen."""
    return {FROZEN: None} | {
        _at(key, rate): Learner(periods, rate)
        for key, periods in _configurations(settings).items()
        for rate in settings.rates
    }


def _at(configuration: str, rate: float) -> str:
    return f"{configuration}/rate-{rate:g}"


@lru_cache(maxsize=1)
def _tokenizer(source: str) -> Any:
    if source.startswith(SMALL):
        return small_transformer(int(source.removeprefix(SMALL)))[1]
    return load_tokenizer(source)


@lru_cache(maxsize=1)
def _model(source: str, strategy: str, window: int | None, device: str, periods: tuple[int, ...]) -> HopeForCausalLM:
    options: dict[str, Any] = {"strategy": strategy, "window": window, "periods": periods, "check": False}
    if source.startswith(SMALL):
        return convert(small_transformer(int(source.removeprefix(SMALL)))[0], **options).to(device)
    return convert(source, dtype=torch.float32, **options).to(device)


def _reader(settings: LevelsSettings, learner: Learner | None) -> HopeForCausalLM:
    periods = learner.periods if learner else next(iter(_configurations(settings).values()))
    model = _model(settings.source, settings.strategy, settings.window, settings.device, periods)
    if learner:
        model.config.cms_learning_rates = learner.rate
    return model


def _document(settings: LevelsSettings, learner: Learner | None, document: str, _: Path) -> Result:
    ids = ids_of(document, documents_of(settings)[document](), _tokenizer(settings.source), settings.tokens)
    reading = read(_reader(settings, learner), ids, learn=learner is not None)
    return {"second_half": reading.perplexity(0.5), "all": reading.perplexity(), "tokens": len(ids)}


def _haystacks(settings: LevelsSettings, seed: int, samples: int) -> list[dict[str, Any]]:
    tokenizer = _tokenizer(settings.source)
    return list(needle_samples(settings.needles, tokenizer, settings.needle_tokens, samples, seed))


def _needles(settings: LevelsSettings, learner: Learner | None, seed: int, _: Path) -> Result:
    model, tokenizer = _reader(settings, learner), _tokenizer(settings.source)
    said = [
        answered(
            model,
            tokenizer,
            f"{sample['input']} {sample['gen_prefix']}",
            f" {sample['outputs'][0]}",
            learn=learner is not None,
        )
        for sample in _haystacks(settings, seed, settings.needle_samples)
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
    feed(model, memory, asked[:-1], "all" if learn else "off")
    last = torch.cat([asked[-1:], wanted[:-1]])
    logits = model(last[None], past_key_values=memory, learn="off").logits[0].float()
    return bool((logits.argmax(-1) == wanted).all()), float(F.cross_entropy(logits, wanted))


def chosen_rates(gains: Mapping[float, Mapping[str, float]]) -> tuple[dict[str, float], float]:
    """
    Args:
        gains: by rate and document.

    Returns:
        For each document the rate that was best on the others, and the one that was best on all.
    """

    def best(documents: list[str]) -> float:
        return max(gains, key=lambda rate: mean(gains[rate][document] for document in documents))

    documents = list(next(iter(gains.values())))
    if len(gains) == 1:
        return dict.fromkeys(documents, next(iter(gains))), next(iter(gains))
    return {one: best([other for other in documents if other != one]) for one in documents}, best(documents)


def report(settings: LevelsSettings, found: Mapping[str, Result]) -> Report:
    documents, configurations = list(documents_of(settings)), _configurations(settings)
    by_rate = {
        key: {rate: _gains(documents, _at(key, rate), found) for rate in settings.rates} for key in configurations
    }
    gains: dict[str, dict[str, float]] = {}
    needles = {FROZEN: _needles_of(settings, FROZEN, found)}
    rows = [["frozen", "", "", "", "", _time(documents, FROZEN, found), *_shown(needles[FROZEN])]]
    every = []
    for key, periods in configurations.items():
        rates, rate = chosen_rates(by_rate[key])
        gains[key] = {document: by_rate[key][rates[document]][document] for document in documents}
        needles[key] = _needles_of(settings, _at(key, rate), found)
        named = [str(len(periods)), ", ".join(map(str, periods))]
        taken = ", ".join(f"{each:g}" for each in dict.fromkeys([*rates.values(), rate]))
        means = [f"{mean(gains[key].values()):.1%}", f"{min(gains[key].values()):.1%}"]
        rows.append([*named, taken, *means, _time(documents, _at(key, rate), found), *_shown(needles[key])])
        for each, of in by_rate[key].items():
            every.append([*named, f"{each:g}", *(f"{of[name]:.1%}" for name in documents)])
    tables = [
        f"Strategy `{settings.strategy}`; {len(documents)} documents of at most {settings.tokens:,} tokens; "
        f"{settings.needle_samples} haystacks of {settings.needle_tokens:,} tokens ({settings.needles}) for each seed.\n",
        markdown_table(
            [
                "levels",
                "periods",
                "rate",
                "lower second-half perplexity",
                "the least",
                "time",
                "needles found",
                "loss of the value",
            ],
            rows,
            names=2,
        ),
        "\nLower second-half perplexity by rate:\n",
        markdown_table(["levels", "periods", "rate", *documents], every, names=2),
    ]
    figures = {
        "results": dict(found),
        "by_rate": [
            {"configuration": key, "rate": rate, "gains": of} for key in by_rate for rate, of in by_rate[key].items()
        ],
        "gains": gains,
        "needles": needles,
    }
    return Report("\n".join(tables), figures, lambda path: _plot(settings, gains, needles, path))


def _gains(documents: list[str], key: str, found: Mapping[str, Result]) -> dict[str, float]:
    """By document: how much lower the perplexity of its second half is than frozen; -inf where that is no number."""
    halves = {
        document: [found[f"{name}/documents/{document}"]["second_half"] for name in (key, FROZEN)]
        for document in documents
    }
    return {document: -math.inf if half is None else 1 - half / frozen for document, (half, frozen) in halves.items()}


def _time(documents: list[str], key: str, found: Mapping[str, Result]) -> str:
    return f"{sum(found[f'{key}/documents/{document}']['seconds'] for document in documents):.0f} s"


def _needles_of(settings: LevelsSettings, key: str, found: Mapping[str, Result]) -> Result:
    """Means over seeds."""
    of = [found[f"{key}/needles/seed-{seed}"] for seed in settings.seeds]
    losses = [math.inf if result["loss"] is None else result["loss"] for result in of]
    return {"accuracy": mean(result["accuracy"] for result in of), "loss": mean(losses)}


def _shown(needles: Result) -> list[str]:
    return [f"{needles['accuracy']:.0%}", f"{needles['loss']:.3f}"]


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
        "documents": ["generated:0", "generated:1"],
        "tokens": 256,
        "rates": [0.05, 0.1],
        "levels": [1, 2],
        "slowest": [32, 64],
        "needle_tokens": 640,
        "needle_samples": 2,
    },
    parts=parts,
    report=report,
    check=check,
)
