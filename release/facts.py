"""What only people know of a model, and its card says: no figures, which come from files of results."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from huggingface_hub.utils import validate_repo_id


FACTS = "facts.yaml"
EXAMPLE = """name: SmolLM2 135M Hope
repository: owner/name
license: apache-2.0
base_model: [HuggingFaceTB/SmolLM2-135M-Instruct]
summary: What the model is, in a paragraph.
training_data: What the weights were trained on, and under which licences.
compute: On what, and for how long.
limitations: What it is not good for."""


@strict
@dataclasses.dataclass
class CardFacts:
    """
    The keys of `facts.yaml`.

    Attributes:
        name: of the model, the card's title.
        repository: from which its users load it: owner/name on the hub, or a directory where it is not there.
        license: of the weights, by the hub's name for it, as `apache-2.0`.
        summary, training_data, compute, limitations: Markdown.
        license_link: where a licence that the hub has no name for (`other`) can be read.
        base_model: repositories of the models it was made of.
        language: codes of ISO 639-1.
        tags: further ones for the hub.

    Raises:
        ValueError, StrictDataclassError: a field is missing, or has an impossible type or value.
    """

    name: str
    repository: str
    license: str
    summary: str
    training_data: str
    compute: str
    limitations: str
    license_link: str | None = None
    base_model: list[str] = dataclasses.field(default_factory=list)
    language: list[str] = dataclasses.field(default_factory=lambda: ["en"])
    tags: list[str] = dataclasses.field(default_factory=list)

    def validate_texts(self) -> None:
        """Part of the strict validation."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, str) and not value.strip():
                raise ValueError(f"`{field.name}` is empty: write what people should know.")
        if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.license):
            raise ValueError(
                f"`license` is {self.license!r}: give the hub's name for it, e.g. apache-2.0, mit or other."
            )
        if self.license == "other" and self.license_link is None:
            raise ValueError("`license_link` is missing, which a `license` called other needs.")
        for name in (self.repository, *self.base_model):
            try:
                validate_repo_id(name)
            except HFValidationError as error:
                raise ValueError(f"`repository` and `base_model` are names on the hub, owner/name: {error}") from None


def read_facts(card: Path) -> CardFacts:
    """
    Of a card's directory.

    Raises:
        ValueError: there are none, or one is missing, unknown or impossible.
    """
    path = card / FACTS
    try:
        fields: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing. Write what only you know of the model, for example\n\n{EXAMPLE}"
        ) from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}.") from None
    known = {field.name: field for field in dataclasses.fields(CardFacts)}
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds no `field: value` lines. For example\n\n{EXAMPLE}")
    if unknown := [str(name) for name in fields if name not in known]:
        raise ValueError(f"{path}: there is no fact `{unknown[0]}`. There are {', '.join(known)}.")
    needed = [n for n, field in known.items() if field.default_factory is field.default is dataclasses.MISSING]
    if missing := [name for name in needed if name not in fields]:
        raise ValueError(f"{path}: `{missing[0]}` is missing. For example\n\n{EXAMPLE}")
    texts: dict[str, Any] = {name: value.strip() if isinstance(value, str) else value for name, value in fields.items()}
    try:
        return CardFacts(**texts)
    except (ValueError, StrictDataclassError) as error:
        said = str(error).strip().splitlines()[-1].strip().removeprefix("ValueError: ").removeprefix("TypeError: ")
        raise ValueError(f"{path}: {said}") from None
