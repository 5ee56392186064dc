"""
What somebody does who has torch and Transformers and not this package: `python -I trial.py REQUEST`.

REQUEST is JSON: `packages` (a directory to import from, or null), `directory` (of the model), `lines` (Python) and `results` (a
file). Each step's finding is written there, and with the first that fails its error, by the step's name.
"""

import contextlib
import importlib.util
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


PROMPT = "Hello, my name is"
NEW_TOKENS = 8


def main(request: dict[str, Any]) -> None:
    findings: dict[str, dict[str, str]] = {}

    def step(name: str, action: Callable[[], str]) -> None:
        try:
            findings[name] = {"found": action()}
        except Exception as error:  # whatever it is, the report says it
            findings[name] = {"error": f"{type(error).__name__}: {error}"}
        Path(request["results"]).write_text(json.dumps(findings), encoding="utf-8")
        if "error" in findings[name]:
            sys.exit(1)

    directory: str = request["directory"]
    held: dict[str, Any] = {}
    step("loads", lambda: loads(directory, held))
    step("generates", lambda: generates(directory, held))
    step("remembers", lambda: remembers(held))
    held.clear()
    step("how to use", lambda: runs(request["lines"]))


def loads(directory: str, held: dict[str, Any]) -> str:
    if importlib.util.find_spec("modeling_hope") is not None:
        raise RuntimeError("modeling_hope is installed in this environment: give one with torch and transformers alone")
    import torch
    import transformers

    load = transformers.AutoModelForCausalLM.from_pretrained
    try:
        load(directory, trust_remote_code=False)
    except ValueError:
        pass
    else:
        raise RuntimeError("it was loaded without trust_remote_code=True")
    model, info = load(directory, trust_remote_code=True, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            raise RuntimeError(f"{kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:3]}")
    held["model"] = model.eval()
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"{type(model).__name__}, {dtype}, through trust_remote_code, by torch {torch.__version__.partition('+')[0]} and "
        f"transformers {transformers.__version__} without this package"
    )


def generates(directory: str, held: dict[str, Any]) -> str:
    import torch
    from transformers import AutoTokenizer

    model = held["model"]
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=True)
    held["prompt"] = prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    if not prompt.shape[1]:
        raise RuntimeError(f"the tokenizer makes nothing of {PROMPT!r}")
    with torch.no_grad():
        if not bool(torch.isfinite(model(prompt).logits).all()):
            raise RuntimeError("its logits are not finite")
    said = model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False)[0, prompt.shape[1] :]
    if not len(said):
        raise RuntimeError("it says nothing")
    return f"{PROMPT!r} goes on with {tokenizer.decode(said)!r}"


def remembers(held: dict[str, Any]) -> str:
    """A memory that was saved and loaded goes on as the one that was not."""
    model, prompt = held["model"], held["prompt"]
    memory = model.new_memory()
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    model.generate(prompt, past_key_values=memory, **options)
    memory.save_pretrained("trial-memory")
    loaded = model.load_memory("trial-memory")
    said = [model.generate(prompt, past_key_values=each, **options).tolist() for each in (memory, loaded)]
    if said[0] != said[1]:
        raise RuntimeError("a memory that was saved and loaded goes on otherwise")
    return "a memory that was saved and loaded goes on the same"


def runs(lines: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(lines, "how to use", "exec"), {"__name__": "__main__"})
    return f"the card's {len(lines.splitlines())} lines ran, and printed {printed.getvalue().strip()!r}"


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if asked["packages"]:
        sys.path.append(asked["packages"])
    main(asked)
