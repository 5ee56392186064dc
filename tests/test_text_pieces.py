"""Text cut into pieces that are tokenized one by one."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from modeling_hope import text_pieces


PROSE = "It was, as they say, a long  and stormy night.\n\nNobody saw the rider (or his 2 horses) come in.\nRain fell. "
# A piece of SentencePiece's, before the pre-tokenizers: the start of a text is that of a word.
LLAMA = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]


def trained(kind):
    """BPE tokenizers that begin words in different ways."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    byte = kind == "byte"
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if byte else pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    tokenizer.train_from_iterator([PROSE], trainer)
    if kind == "llama":
        raw = json.loads(tokenizer.to_str())
        raw |= {"pre_tokenizer": None, "normalizer": {"type": "Sequence", "normalizers": LLAMA}}
        tokenizer = Tokenizer.from_str(json.dumps(raw))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("kind", ["byte", "metaspace", "llama"])
def test_tokens_are_those_of_the_whole(kind, monkeypatch):
    monkeypatch.setattr(text_pieces, "BLOCK", 60)
    tokenizer = trained(kind)
    texts = [PROSE * 6, ""]
    if kind == "byte":  # the others begin a line as if a space stood before it
        texts.append("\n".join(["night", "rider"] * 30))
    texts.append(", ".join(["(night)", "[2]"] * 30))
    for text in texts:
        parts = list(text_pieces.text_pieces([text[:70], text[70:]], text_pieces.prepends_space(tokenizer)))
        assert len(parts) > len(text) / 60 - 1 and max(map(len, parts), default=0) <= 60
        assert [token for part in parts for token in tokenizer(part).input_ids] == tokenizer(text).input_ids


def test_text_without_a_place_to_cut_loses_nothing(monkeypatch):
    monkeypatch.setattr(text_pieces, "BLOCK", 60)
    for text in ("x" * 200, "我" * 150, " " * 130, "\n" * 61, "a b" + "x" * 100):
        for drop_space in (False, True):
            parts = list(text_pieces.text_pieces([text], drop_space))
            assert max(map(len, parts)) <= 60
            assert len("".join(parts)) == len(text) or drop_space


def test_bytes_ahead(tmp_path):
    (tmp_path / "text").write_text("äbc\n" * 3, encoding="utf-8")
    with (tmp_path / "text").open("rb") as file:
        file.read(5)
        assert text_pieces.text_bytes(file) == 10
    assert text_pieces.text_bytes("äb") == 3 and text_pieces.text_bytes(["a"]) is None
    assert text_pieces.text_bytes(tmp_path / "text") == 15
    (tmp_path / "raw").write_bytes(b"a\xffb")
    assert "".join(text_pieces.text_blocks(tmp_path / "raw")) == "a\ufffdb"
