"""The study of training on with learning on: what it reads, how, and its report."""

import json
import math

import pytest

from modeling_hope import HopeForCausalLM
from modeling_hope.training import continued

from .conftest import chat_tokenizer, tiny_config, tiny_model


WINDOW = {
    "layer_types": ["sliding_attention"] * 2,
    "sliding_window": 8,
    "attention_sinks": 2,
    "cms_periods": [8, 16, None],
}


def test_documents_are_read_and_compared(tmp_path, capsys):
    out, results, documents = tmp_path / "out", tmp_path / "results", tmp_path / "story.txt"
    documents.write_text(" ".join(f"w{9 + i % 7}" for i in range(40)))
    for name, seed in (("converted", 0), ("trained", 1)):
        tiny_model(seed, **WINDOW).save_pretrained(tmp_path / name)
        chat_tokenizer().save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="there are no readings"):
        continued.main(["report", "--out", str(out)])
    models = [f"{name}={tmp_path / name}" for name in ("trained", "converted")]
    read = ["read", "--out", str(out), "--documents", str(documents), "--tokens", "32", "--models"]
    continued.main([*read, models[0]])
    (continued.place(out, "trained", "native", "story")).unlink()
    with pytest.raises(ValueError, match=r"'trained', 'native', 'story'.* was not read"):
        continued.main(["report", "--out", str(out)])
    capsys.readouterr()
    continued.main([*read, *models])
    assert capsys.readouterr().out.count("\n") == 4  # what was there is not read again
    continued.main(["report", "--out", str(out), "--results", str(results)])
    found = json.loads((results / "continued.json").read_text())["story"]
    with pytest.raises(ValueError, match="two are called 'story'"):
        continued.main([*read, *models, "--documents", str(documents), str(documents)])
    with pytest.raises(SystemExit):
        continued.main([*read, str(tmp_path)])
    continued.place(out, "trained", "native", "story").unlink()
    continued.main([*read, models[0], "--tokens", "16"])
    with pytest.raises(ValueError, match="'story' some readings have more tokens"):
        continued.main(["report", "--out", str(out)])
    ours = found["converted"]
    assert found["trained"].keys() == ours.keys() == set(continued.READINGS)
    for reading in ours.values():
        assert math.isclose(
            reading["all"], (reading["first_half"] ** 16 * reading["second_half"] ** 15) ** (1 / 31), rel_tol=0.05
        )
    assert len({reading["second_half"] for reading in ours.values()}) == 3
    assert f"| story | {ours['frozen']['second_half']:.2f} |" in (results / "continued.md").read_text()


def test_a_model_with_the_whole_document_in_view(tmp_path):
    tiny_model(**WINDOW).save_pretrained(tmp_path)
    native = continued.load(tmp_path, native=True)
    assert native.config.layer_types == ["full_attention"] * 2
    assert native.config.sliding_window is None
    whole = HopeForCausalLM(tiny_config(**{**WINDOW, "layer_types": ["full_attention"] * 2, "sliding_window": None}))
    assert whole.load_state_dict(native.state_dict())
