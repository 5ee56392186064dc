"""
Loads a model and a memory and answers a prompt: a process that shares nothing with the one that read.

    python -m modeling_hope.cli.recall MODEL MEMORY < prompt.json
"""

from __future__ import annotations

import json
import sys

from transformers import AutoModelForCausalLM

from modeling_hope import HopeCache

from .demo import answer


def main() -> None:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
    memory = HopeCache.from_pretrained(sys.argv[2], model=model)
    print(json.dumps(answer(model, json.load(sys.stdin), memory)))


if __name__ == "__main__":
    main()
