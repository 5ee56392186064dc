"""
Whether self-modifying memories start alive (they take in what is written, and keep some of it), whether they stay
stable over long streams, and by how much they amplify a small change.

    python -m modeling_hope.eval.memory_health alive
    python -m modeling_hope.eval.memory_health alive --hidden 32 --json alive.json
    python -m modeling_hope.eval.memory_health stable
    python -m modeling_hope.eval.memory_health stable --tokens 131072 --reads chunk --retentions initial
    python -m modeling_hope.eval.memory_health growth

`alive`: 16 memories (depth 2, width 64) as the model initialises them; the config's default chunks and retention, l2 and
the delta term. 64 pairs of random unit vectors are written into each, pass after pass until the error has fallen by 80%,
and then 1,000 further random pairs once. Errors are mean |M(k) - v|^2 over the 64 pairs: after writing, relative to the
unwritten memory's; after the further tokens, relative to a memory that read those only. gamma is no fast weight, so what a
memory adds to k keeps the norm 1, and no writing brings the error below 6%.

`stable`: small models (width 64, 2 layers, 2 heads) read 32,768 random tokens, and one token 32,768 times, nothing but
their memories learning, at the start and after 300 steps of the `recall` task. Every 256 tokens, by layer: 1 / rms, which
its memories multiply by, of all of them at 64 fixed random unit inputs, the largest (the rms's eps bounds it by 1000) and
the 99th percentile; the norm of their change from the initial weights; and the largest logit. A stream passes when all
logits are finite, and
    peak: the largest in the second half is at most twice the largest in the first half, for each of these,
    drift: the mean over the last quarter is at most 1.25 times that over the third, for all but the largest 1 / rms.
Where nothing grows, the largest 1 / rms still moves by 15% from one 256 tokens to the next, single bursts reach twice the
norm around them, and means of quarters differ by a fifth: hence the percentile, the means and the bounds. What tells
growth from wandering is that as many quantities fall as rise, which the last line counts, and a longer stream (--tokens).

`growth`: an untrained layer (width 128, 2 heads, alpha 0.999, float64) reads 4 rows of 1,024 random tokens, and again with
W1 changed by 1e-7 noise. By how much the difference of what it adds has grown from its first tokens after a chunk to the last
64, in nats per 100 tokens, by the rate and by how often the memories that make keys, values, rates and decays are renewed. In a
backward pass, gradients through time grow alike.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from modeling_hope import HopeCache, HopeConfig, HopeForCausalLM
from modeling_hope.delta_rule import decay_of
from modeling_hope.eval.memory_tasks import TASKS, make_model, training
from modeling_hope.memory_chunk import FastWeights, after_chunk, write
from modeling_hope.memory_rule import SMALLEST, Rule, read, unit
from modeling_hope.self_modifying_memory import START_OUTER, Memories, SelfModifyingMemory


Log = Callable[[str], None]

MEMORIES, WIDTH, PAIRS, FURTHER = 16, 64, 64, 1000
RULE = Rule(objective="l2", delta_decay=True, self_values=False)
WRITTEN, KEPT, MOST_PASSES = 0.2, 0.8, 24  # errors that pass, and when to give up writing
PASSES = (1, 2, 4, 8, 16)
MOMENTA = (0.0, 0.5)
SCALES = (0.05, 0.1, 0.2, 0.5)  # of W1
RATES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
PAIR_RATE = 0.1
START_RATE: float = HopeConfig().memory_initial_rate  # type: ignore[assignment]
START_DECAY = HopeConfig().memory_initial_decay
# Of the pairs, and of the further tokens.
RATE_PAIRS = ((0.1, 0.1), (0.1, 0.05), (0.1, 0.02), (0.1, 0.01), (0.02, 0.02))
DECAYS = (0.9, 0.97, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 1.0)

READS, RETENTIONS = ("token", "chunk"), ("initial", "zero")
RENEWALS, GROWTH_RATES, GROWTH_TOKENS, SMALL_CHANGE = (16, 64, 256), (0.1, 0.4, 1.0), 1024, 1e-7
PIECE, PROBES = 256, 64
PEAK, DRIFT = 2.0, 1.25  # what growth may be


@dataclass(frozen=True)
class Retained:
    """
    What pairs were worth.

    Attributes:
        passes: over the pairs until the error had fallen by 80%, at most 24.
        written: the error then, relative to the unwritten memory's.
        kept: the error after the further tokens, relative to a memory that read those only.
    """

    passes: int
    written: float
    kept: float

    @property
    def good(self) -> bool:
        return self.written <= WRITTEN and self.kept <= KEPT

    def __str__(self) -> str:
        passes = "-" if self.written > WRITTEN else str(self.passes)
        return f"{self.kept:.2f} ({passes}){'+' if self.good else ''}"


class Bench:
    """
    New memories, and the pairs to write into them.

    Args:
        hidden: hidden units of a memory.
        scale: of W1 at the start.
        mu: of the momentum; 0 is none, unset what the model starts with.
    """

    def __init__(self, hidden: int, scale: float = START_OUTER, mu: float | None = None):
        torch.manual_seed(0)
        config = HopeConfig(
            hidden_size=MEMORIES * WIDTH, num_attention_heads=MEMORIES, memory_hidden_size=hidden, memory_momentum=True
        )
        memories = Memories(config, ["memory"])
        memories.initialise()
        memories.w1.mul_(scale / START_OUTER)
        if mu is not None:
            assert memories.momentum is not None
            memories.momentum.copy_(torch.tensor(mu).logit())
        maps, self.constants = memories(slice(None), 1, torch.float32)
        zeros = tuple(torch.zeros_like(weights) for weights in maps)
        self.chunk_size = config.memory_chunk_size
        self.start = FastWeights(maps, maps, zeros)
        self.k, self.v, self.further_k, self.further_v = (
            unit(torch.randn(MEMORIES, WIDTH, count)) for count in (PAIRS, PAIRS, FURTHER, FURTHER)
        )
        self.unwritten = self.error(self.start)

    def write(self, weights: FastWeights, k: torch.Tensor, v: torch.Tensor, rate: float, alpha: float) -> FastWeights:
        """Write keys and values `[memories, width, tokens]`; the last chunk may be a shorter one."""
        for keys, values in zip(k.split(self.chunk_size, -1), v.split(self.chunk_size, -1), strict=True):
            rates = torch.full((MEMORIES, 1, 1, keys.shape[-1]), rate)
            decay = decay_of(torch.full((MEMORIES, keys.shape[-1]), math.log(alpha)))
            written = write(weights, self.constants, keys, values, rates, decay, RULE, True, False)
            weights = after_chunk(weights, self.constants, written, True)
        return weights

    def error(self, weights: FastWeights) -> float:
        """Mean |M(k) - v|^2 of the pairs."""
        recalled = read(weights.now, self.constants.gamma, self.k)[:, 0]
        return (recalled - self.v).square().sum(1).mean().item()

    def errors(self, rate: float) -> list[float]:
        """After each number of PASSES over the pairs, without decay: the error relative to the unwritten memory's."""
        weights, found = self.start, []
        for _ in range(max(PASSES)):
            weights = self.write(weights, self.k, self.v, rate, 1.0)
            found.append(self.error(weights) / self.unwritten)
        return [found[passes - 1] for passes in PASSES]

    def retained(self, rate: float, further_rate: float, alpha: float) -> Retained:
        """Write until the error has fallen by 80%, then read the further tokens; everything decays by `alpha`."""
        weights, written, passes = self.start, 1.0, 0
        while written > WRITTEN and passes < MOST_PASSES:
            weights, passes = self.write(weights, self.k, self.v, rate, alpha), passes + 1
            written = self.error(weights) / self.unwritten
        after, without = (
            self.error(self.write(start, self.further_k, self.further_v, further_rate, alpha))
            for start in (weights, self.start)
        )
        return Retained(passes, written, after / without)


@torch.no_grad()
def alive(hidden: int, log: Log) -> dict[str, Any]:
    """What writing takes, what is kept by alpha, and whether the start that the model has passes."""
    log(f"hidden {hidden}: error after writing without decay, by rate b")
    log(f"{'mu':<4} {'W1':>5} {'passes':>6}  " + " ".join(f"{rate:>5}" for rate in RATES))
    writing = []
    for mu, scale in product(MOMENTA, SCALES):
        bench = Bench(hidden, scale, mu)
        for passes, errors in zip(PASSES, zip(*map(bench.errors, RATES), strict=True), strict=True):
            log(f"{mu:<4} {scale:>5} {passes:>6}  " + " ".join(f"{error:5.2f}" for error in errors))
            writing.append({"mu": mu, "scale": scale, "passes": passes, "errors": errors})

    log(f"\nhidden {hidden}: error after {FURTHER} further tokens, by alpha; in brackets the passes it took to write")
    log(f"(- where {MOST_PASSES} did not reach {WRITTEN}); + where they did, and the error is {KEPT} or less")
    log(f"{'mu':<4} {'W1':>5} {'b':>5} {'then':>5}  " + " ".join(f"{alpha:<10}" for alpha in DECAYS))
    keeping = []
    for mu, scale in product(MOMENTA, SCALES):
        bench = Bench(hidden, scale, mu)
        for rate, further in RATE_PAIRS:
            curve = [bench.retained(rate, further, alpha) for alpha in DECAYS]
            log(f"{mu:<4} {scale:>5} {rate:>5} {further:>5}  " + " ".join(f"{point!s:<10}" for point in curve))
            settings = {"mu": mu, "scale": scale, "rate": rate, "further_rate": further}
            keeping.append(settings | {"curve": [asdict(point) for point in curve]})

    start = Bench(hidden).retained(PAIR_RATE, START_RATE, START_DECAY)
    log(
        f"\nThe model's start (W1 {START_OUTER}, b {START_RATE}, alpha {START_DECAY}; pairs written at {PAIR_RATE}): "
        f"{'pass' if start.good else 'FAIL'}, {start.written:.2f} after {start.passes} passes, {start.kept:.2f} in the end"
    )
    curves = {"rates": RATES, "writing": writing, "decays": DECAYS, "keeping": keeping}
    return {"hidden": hidden, "start": asdict(start) | {"pass": start.good}} | curves


def layer_health(mixer: SelfModifyingMemory, state: dict[str, torch.Tensor], probes: torch.Tensor) -> torch.Tensor:
    """
    Of a layer's memories in each row: 1 / rms at the probes `[D, probes]`, its largest and its 99th percentile, and the
    norm of their change; `[rows, 3]`.

    `state`: the tensors of a `MemoryState`.
    """
    inverse, squares = [], torch.zeros(len(state["conv"]))
    for name, group in mixer.groups.items():
        now = [state[f"{name}.now.{map_name}"] for map_name in mixer.memories.map_names]
        rest, _ = mixer.memories(group.memories, 1, torch.float32)
        squares += sum((a - b).square().flatten(1).sum(1) for a, b in zip(now, rest, strict=True))
        w2, w1 = now
        hidden = F.silu((w2 @ probes).view(*w1.shape[:3], -1, probes.shape[1]))
        inverse.append(torch.rsqrt((w1 @ hidden).square().mean(-2) + SMALLEST).flatten(1))
    found = torch.cat(inverse, 1)
    return torch.stack([found.amax(1), found.quantile(0.99, 1), squares.sqrt()], 1)


@torch.no_grad()
def read_streams(model: HopeForCausalLM, ids: torch.Tensor) -> list[dict[str, Any]]:
    """Read the rows of `ids` `[rows, tokens]`; of each its health from piece to piece, and whether it passes."""
    cache = HopeCache(model.config, batch_size=len(ids))
    mixers: list[SelfModifyingMemory] = [layer.mixer for layer in model.model.layers]
    probes = unit(torch.randn(mixers[0].head_dim, PROBES, generator=torch.Generator().manual_seed(0)))
    logits, layers = [], []
    for piece in ids.split(PIECE, 1):
        logits.append(model(piece, past_key_values=cache, learn="off").logits.float().abs().amax((1, 2)))
        states = [layer.mixer.tensors for layer in cache.layers]  # type: ignore[union-attr]
        layers.append(torch.stack([layer_health(*each, probes) for each in zip(mixers, states, strict=True)], 1))
    largest, high, change = torch.stack(layers, 1).unbind(-1)
    tracks = {"logit": torch.stack(logits, 1)[..., None], "largest": largest, "high": high, "change": change}
    return [verdict({name: track[row] for name, track in tracks.items()}) for row in range(len(ids))]


def verdict(tracks: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Whether what was logged, `[pieces, layers]` each, is that of a stable stream."""
    halves = {name: torch.stack([half.amax(0) for half in track.chunk(2)]) for name, track in tracks.items()}
    peak = max((second / first).max().item() for first, second in halves.values())
    quarters = [[quarter.mean(0) for quarter in tracks[name].chunk(4)] for name in ("logit", "high", "change")]
    drifts = torch.cat([fourth / third for _, _, third, fourth in quarters])
    drift = drifts.max().item()
    finite = bool(tracks["logit"].isfinite().all())
    good = finite and peak <= PEAK and drift <= DRIFT
    log = {name: track.tolist() for name, track in tracks.items()}
    return {
        "pass": good,
        "finite": finite,
        "peak": peak,
        "drift": drift,
        "drifts": drifts.tolist(),
        "halves": {name: half.amax(1).tolist() for name, half in halves.items()},
        "pieces": log,
    }


def stable(
    tokens: int, steps: int, log: Log, reads: Sequence[str] = READS, retentions: Sequence[str] = RETENTIONS
) -> list[dict[str, Any]]:
    """Every combination's health over a stream of random tokens, and over one token again and again."""
    log(
        f"{tokens} tokens; the largest over the first half > over the second half; peak and drift of whichever is worst"
    )
    columns = f"{'':<5}{'logit':^17}{'1 / rms':^17}{'|change|':^17}{'peak':>5}{'drift':>6}"
    log(f"{'read':<6}{'retention':<10}{'b_max':<6}{'steps':<6}{'dtype':<9}{'stream':<10}{columns}")
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(TASKS["recall"].vocab_size, (1, tokens), generator=generator)
    streams = torch.cat([random, random[:, :1].expand(1, tokens)])
    results: list[dict[str, Any]] = []
    for way, retention, largest in product(reads, retentions, (1.0, 2.0)):
        fields = {"memory_read": way, "memory_retention": retention, "memory_max_rate": largest}
        model = make_model(TASKS["recall"], 0, **fields)
        for trained in (0, steps):
            for _ in training(model, TASKS["recall"], trained):
                pass
            for dtype in (torch.float32, torch.bfloat16):
                rows = read_streams(copy.deepcopy(model).to(dtype).eval(), streams)
                for name, found in zip(("random", "one token"), rows, strict=True):
                    kind = {"steps": trained, "dtype": str(dtype).removeprefix("torch."), "stream": name}
                    results.append(fields | kind | found)
                    shown = (found["halves"][track] for track in ("logit", "largest", "change"))
                    numbers = "".join(f"{first:>7.3g} > {second:<7.3g}" for first, second in shown)
                    log(
                        f"{way:<6}{retention:<10}{largest:<6}{trained:<6}{kind['dtype']:<9}{name:<10}"
                        f"{'pass' if found['pass'] else 'FAIL':<5}{numbers}{found['peak']:5.2f}{found['drift']:6.2f}"
                    )
    drifts = [drift for result in results for drift in result["drifts"]]
    log(
        f"{sum(result['pass'] for result in results)} of {len(results)} pass; from the third quarter to the last "
        f"{sum(drift > 1.05 for drift in drifts)} of {len(drifts)} quantities rise by more than 5%, and "
        f"{sum(drift < 1 / 1.05 for drift in drifts)} fall by as much"
    )
    return results


def small_changes_growth(rate: float, renewal: int) -> float:
    """Of what one layer adds, in nats per 100 tokens."""
    torch.manual_seed(0)
    config = HopeConfig(
        vocab_size=256,
        hidden_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        cms_periods=[None],
        projection_chunk_size=renewal,
        memory_initial_rate=rate,
        memory_initial_decay=0.999,
    )
    model = HopeForCausalLM(config).double().eval()
    mixer: Any = model.model.layers[0].mixer
    ids = torch.randint(256, (4, GROWTH_TOKENS), generator=torch.Generator().manual_seed(1))
    added: list[torch.Tensor] = []
    mixer.register_forward_hook(lambda module, inputs, outputs: added.append(outputs[0]))
    with torch.no_grad():
        model(ids, use_cache=False)
        noise = torch.randn(mixer.memories.w1.shape, generator=torch.Generator().manual_seed(2))
        mixer.memories.w1 += SMALL_CHANGE * noise
        model(ids, use_cache=False)
    difference = (added[0] - added[1]).norm(dim=-1).mean(0)
    first, last = difference[16:48].mean().log(), difference[-64:].mean().log()
    return (last - first).item() / (GROWTH_TOKENS - 80) * 100


def growth(log: Log) -> list[dict[str, float]]:
    """Growth by rate, and by tokens from renewal to renewal."""
    results = []
    log(f"{'renewed every':<15}" + "".join(f"{f'rate {rate:g}':>10}" for rate in GROWTH_RATES))
    for renewal in RENEWALS:
        found = [small_changes_growth(rate, renewal) for rate in GROWTH_RATES]
        results += [
            {"renewal": renewal, "rate": rate, "growth": nats} for rate, nats in zip(GROWTH_RATES, found, strict=True)
        ]
        log(f"{renewal:<15}" + "".join(f"{nats:10.2f}" for nats in found))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["alive", "stable", "growth"])
    parser.add_argument("--hidden", type=int, default=64, help="alive: hidden units of a memory")
    parser.add_argument("--tokens", type=int, default=32768, help="stable: of a stream; 4,096 are too few to settle")
    parser.add_argument("--steps", type=int, default=300, help="stable: of training")
    parser.add_argument("--reads", nargs="+", choices=READS, default=READS, help="stable: default all")
    parser.add_argument("--retentions", nargs="+", choices=RETENTIONS, default=RETENTIONS, help="stable: default all")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # the tensors are small
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)

    def log(line: str) -> None:
        print(line, flush=True)

    results: Any
    if arguments.study == "alive":
        results = alive(arguments.hidden, log)
    elif arguments.study == "growth":
        results = growth(log)
    else:
        results = stable(arguments.tokens, arguments.steps, log, arguments.reads, arguments.retentions)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
