"""A chat template, one turn at a time: what a conversation adds to a stream, without the transcript before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


Message = Mapping[str, Any]

# Stands for an answer: private-use characters, which no template and no message holds.
ANSWER = "\ue0a7\ue0a8\ue0a9"
QUESTION: Message = {"role": "user", "content": "Hello"}
FIX = "Set `tokenizer.chat_template` to one that writes every turn once and for all, or use `generate()`."


class ChatTurns:
    """
    The tokens that the turns of a conversation are made of, by a tokenizer's chat template.

    The template renders a made-up conversation whose answer is known by its characters; what follows that answer is
    what follows every answer.

    Args:
        tokenizer: with a `chat_template`.
        options: for the template: `tools`, `enable_thinking` and the like.

    Raises:
        ValueError: there is no template, or it cannot be rendered turn by turn.
    """

    def __init__(self, tokenizer: Any, options: Mapping[str, Any] | None = None):
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                "The tokenizer has no chat template: set `tokenizer.chat_template`, or use `generate()` on plain text."
            )
        self.tokenizer, self.options = tokenizer, dict(options or {})

    def first(self, messages: Sequence[Message]) -> list[int]:
        """All of a conversation that begins, up to where its answer starts."""
        rendered = self._render(messages, ask=True)
        later = self._render([*messages, _said(ANSWER), QUESTION], ask=True)
        # The answer's first token may be the space that the template writes.
        if not later.startswith(rendered) or not later[len(rendered) :].lstrip().startswith(ANSWER):
            raise ValueError(
                "The chat template renders a turn otherwise once later turns follow it, and what a memory has read cannot be "
                f"read again. {FIX}"
            )
        return self._tokens(rendered)

    def closing(self) -> list[int]:
        """What ends an answer, the token that the model samples for it included."""
        return self._tokens(self._after_answer([QUESTION, _said(ANSWER)], ask=False))

    def next(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """What ends the answer before, and the new turn up to where its answer starts."""
        rest = self._tokens(self._after_answer([QUESTION, _said(ANSWER), *messages], ask=True))
        closing = self.closing()
        # Where one token spans the end and what follows, both are of the new turn.
        cut = len(closing) if rest[: len(closing)] == closing else 0
        return rest[:cut], rest[cut:]

    def ends(self) -> list[int]:
        """Special tokens that end an answer."""
        added = self.tokenizer.added_tokens_decoder
        special = {*self.tokenizer.all_special_ids, *(token for token, known in added.items() if known.special)}
        return [token for token in self.closing() if token in special]

    def unsaid(self, closing: list[int], last: int) -> list[int]:
        """The part of what ends an answer that the model, whose last token this is, has not said itself."""
        return closing[closing.index(last) + 1 :] if last in closing and last in self.ends() else closing

    def _after_answer(self, messages: Sequence[Message], ask: bool) -> str:
        parts = self._render(messages, ask).split(ANSWER)
        if len(parts) != 2:
            raise ValueError(f"The chat template writes an earlier answer {len(parts) - 1} times. {FIX}")
        return parts[1]

    def _render(self, messages: Sequence[Message], ask: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=ask, tokenize=False, **self.options
            )
        except Exception as error:  # a template may raise anything, for any reason
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise ValueError(
                f"The chat template refuses messages by {roles}: {error}. Give others, or set another `tokenizer.chat_template`."
            ) from error

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def _said(answer: str) -> Message:
    return {"role": "assistant", "content": answer}
