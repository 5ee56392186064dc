"""The model card: a template filled in with facts, a description and results, under metadata for the hub."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

import modeling_hope.model_cards
from modeling_hope.training.markdown_table import markdown_table

from .absolute_paths import absolute_paths
from .description import Description
from .directory_checks import RENDERED
from .facts import CardFacts
from .model_directory import RESULTS
from .result_files import ResultFile


TEMPLATE = Path(next(iter(modeling_hope.model_cards.__path__))) / "template.md"
TAGS = ["hope", "nested-learning", "test-time-learning", "custom_code"]


def render(facts: CardFacts, description: Description, results: Sequence[tuple[ResultFile, str]]) -> str:
    """
    Args:
        results: files, each with its SHA-256.

    Raises:
        ValueError: a fact holds an absolute path.
    """
    found = [each for file, _ in results for each in file.results]
    data = ModelCardData(
        license=facts.license,
        license_link=facts.license_link,
        language=facts.language,
        base_model=facts.base_model or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*TAGS, *facts.tags],
        model_name=facts.name,
        eval_results=found or None,
    )
    if not found:
        data.model_name = None
    template = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    ).from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(
        metadata=data.to_yaml().strip(),
        rendered=RENDERED,
        facts=facts,
        model=description,
        usage=usage(facts.repository, description.chat),
        results=[
            (file, digest, shlex.quote(f"{RESULTS}/{file.name}"), results_table(file.results))
            for file, digest in results
        ],
        training=[training(file) for file, _ in results if file.kind == "training"],
        size=size,
    )
    if paths := absolute_paths(ModelCard(text).text):
        raise ValueError(f"The card says {paths[0]}: it tells of your machine. Write a name in the facts in its place.")
    return text


def usage(place: str, chat: bool) -> str:
    """Python of ten lines, that the checks run too."""
    ask = f'session.{"chat" if chat else "generate"}("What is the name of Ada\'s dog?", max_new_tokens=20)'
    return f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

name = {json.dumps(place)}
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
session = get_class_from_dynamic_module("auto_hope.HopeSession", name)(model, tokenizer)
session.read("Ada lives in Lisbon. Her dog is called Biscuit.")  # of any length; a Path reads a file
print({ask})
session.save("memory")  # tomorrow: type(session).load("memory", model, tokenizer)"""


def results_table(results: Sequence[EvalResult]) -> str:
    rows = [
        (each.dataset_name, each.metric_name or each.metric_type, number(each.metric_value) + error(each))
        for each in results
    ]
    return markdown_table(["data", "metric", "value"], rows, names=2)


def number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def error(result: EvalResult) -> str:
    args = result.metric_args or {}
    stderr = f" ± {number(args['stderr'])}" if "stderr" in args else ""
    part = "documents" in args and args["documents"] != args.get("of")
    return stderr + (f", of the first {args['documents']:,} of {args['of']:,} documents" if part else "")


def training(file: ResultFile) -> dict[str, Any]:
    """What a run's result says of data and compute, and its recipe."""
    recipe = {
        name: value for name, value in (file.content.get("recipe") or {}).items() if value not in (None, "", [], {})
    }
    recipe.pop("out", None)
    return {
        **file.content,
        "recipe": yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None, width=100).strip(),
    }


def size(count: float) -> str:
    """Bytes, in the unit that people read."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:,.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
