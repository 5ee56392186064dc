"""
What people do who have Transformers and not this package: `python without_package.py WORK`, in an environment of theirs.

`WORK/models` has directories with code, `WORK/changed/memory` one with other code, and the Hub's cache `tiny/hope`. What
happens goes into `WORK/results.json`, and what is saved again into `WORK/again`.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module


def converse(model, directory):
    """Logits of a call that learns, and the tokens of three turns; before the last the memory is saved and loaded."""
    ids = torch.randint(3, 40, (3, 1, 11), generator=torch.Generator().manual_seed(5))
    options = {"max_new_tokens": 5, "do_sample": False, "learn": "all"}
    with torch.no_grad():
        logits = model(ids[0], learn="all").logits
    memory = model.new_memory()
    turns = [model.generate(part, past_key_values=memory, **options) for part in ids[:2]]
    memory.save_pretrained(directory)
    for remembered in (memory, model.load_memory(directory)):
        turns.append(model.generate(ids[2], past_key_values=remembered, **options))
    return {
        "logits": logits.tolist(),
        "turns": [turn.tolist() for turn in turns],
        "updates": [list(row.updates) for row in memory.rows],
    }


def refusal(load):
    try:
        load()
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def package(hope_class):
    return hope_class.__module__.rpartition(".")[0]


def use(directory, again):
    """Talk, save, and do the same with what was saved; load both by every Auto class that the config names."""
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    model.save_pretrained(again)
    copy = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
    loaded = {
        (place.name, name): getattr(transformers, name).from_pretrained(place, trust_remote_code=True)
        for place in (directory, again)
        for name in model.config.auto_map
    }
    config = loaded[directory.name, "AutoConfig"]
    built = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
    return {
        "first": converse(model, again.with_name(f"{again.name}-memory")),
        "again": converse(copy, again.with_name(f"{again.name}-again-memory")),
        "classes": [[*place_and_name, type(each).__name__] for place_and_name, each in loaded.items()],
        "packages": len({package(type(each)) for each in loaded.values()}),
        "configs": len({type(config), type(model.config), type(model).config_class, type(built).config_class}),
    }


def main(work):
    models = work / "models"
    first = next(models.iterdir())
    results = {
        "package": importlib.util.find_spec("modeling_hope") is not None,
        "refused": [
            refusal(lambda options=options: AutoModelForCausalLM.from_pretrained(first, **options))
            for options in ({}, {"trust_remote_code": False})
        ],
    }
    results["used"] = {
        place.name: use(place, work / "again" / f"{place.name}-again") for place in sorted(models.iterdir())
    }

    changed = AutoModelForCausalLM.from_pretrained(work / "changed" / "memory", trust_remote_code=True)
    changed.save_pretrained(work / "again" / "changed")
    model = AutoModelForCausalLM.from_pretrained(models / "memory", trust_remote_code=True)
    results["changed"] = [
        hasattr(sys.modules[f"{package(type(each))}.stream_record"], "CHANGED") for each in (model, changed)
    ]
    memory = changed.new_memory()
    results["memory_of_other_code"] = refusal(lambda: model(torch.tensor([[3, 4]]), past_key_values=memory))

    from_hub = AutoModelForCausalLM.from_pretrained("tiny/hope", trust_remote_code=True)
    from_hub.save_pretrained(work / "again" / "hub")
    results["hub"] = converse(from_hub, work / "again" / "hub-memory")

    cache_class = get_class_from_dynamic_module("auto_hope.HopeCache", models / "memory")
    results["same_cache_class"] = cache_class is type(model.new_memory())
    tokenizer = AutoTokenizer.from_pretrained(models / "memory", trust_remote_code=True)
    talk = pipeline("text-generation", str(models / "memory"), trust_remote_code=True, dtype=model.dtype)
    said = talk("w3 w4 w5", max_new_tokens=4, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    prompt = tokenizer("w3 w4 w5", return_tensors="pt")
    results["pipeline"] = said == model.generate(**prompt, max_new_tokens=4, do_sample=False)[0].tolist()
    (work / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
