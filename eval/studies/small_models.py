"""Small models of the ladder's rungs on data that is made: their sizes, a training that goes on after a kill, scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from modeling_hope import HopeConfig
from modeling_hope.training.rungs import ATTENTION, RUNGS, SELF, config_of


CHECKPOINT = "checkpoint.pt"
IGNORED = -100
BUCKET = 16  # batches whose sequences are sorted by length together
WARMUP = 50  # steps
LARGEST_NORM = 1.0  # of a gradient
TEST_TOKENS = 25_600  # in one batch of a test

# The rungs that are steps toward Hope, without those that leave a part of it out.
STEPS = tuple(name for name, rung in RUNGS.items() if rung.kind == "step")

# Logits `[batch, width, classes]` of a model for inputs `[batch, width]`.
Reader = Callable[[nn.Module, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Data:
    """Inputs and targets, int64 `[sequences, width]`; targets are -100 where nothing is asked, and behind the end."""

    inputs: torch.Tensor
    targets: torch.Tensor

    @classmethod
    def of(cls, sequences: list[tuple[list[int], list[int]]]) -> Data:
        width = max(len(inputs) for inputs, _ in sequences)
        inputs, targets = (torch.full((len(sequences), width), empty) for empty in (0, IGNORED))
        for row, (tokens, asked) in enumerate(sequences):
            inputs[row, : len(tokens)], targets[row, : len(asked)] = torch.tensor(tokens), torch.tensor(asked)
        return cls(inputs, targets)

    @property
    def lengths(self) -> torch.Tensor:
        """Up to the last target, by sequence."""
        places = torch.arange(1, self.targets.shape[1] + 1)
        return (self.targets.ne(IGNORED) * places).amax(1)

    def rows(self, rows: torch.Tensor) -> Data:
        """Some sequences, no wider than they are long."""
        found = Data(self.inputs[rows], self.targets[rows])
        width = int(found.lengths.max())
        return Data(found.inputs[:, :width], found.targets[:, :width])


@dataclass(frozen=True)
class Protocol:
    """
    Attributes:
        rate, decay, betas: AdamW's; without decay it is Adam.
        batch: sequences in a step.
        epochs: at most.
        last_rate: what the rate falls to, along a cosine, from epoch to epoch; `None`: it stays.
        patience: epochs in a row with all that is held out right, after which training ends; `None`: it never does.
        by: the share that counts: of `whole` sequences, or of `positions`.
    """

    rate: float
    decay: float
    betas: tuple[float, float]
    batch: int
    epochs: int
    last_rate: float | None = None
    patience: int | None = None
    by: str = "positions"

    def rate_at(self, epoch: int) -> float:
        if self.last_rate is None:
            return self.rate
        return self.last_rate + (self.rate - self.last_rate) * (1 + math.cos(math.pi * epoch / self.epochs)) / 2

    def ends(self, curve: list[dict[str, float]]) -> bool:
        """Whether there is nothing more to do."""
        last = [point[self.by] for point in curve[-(self.patience or 0) :]]
        solved = self.patience is not None and len(curve) >= self.patience and min(last) == 1
        return len(curve) >= self.epochs or solved or bool(curve and not math.isfinite(curve[-1]["loss"]))


@dataclass(frozen=True)
class Score:
    """
    Attributes:
        whole: share of sequences of which every asked position is right.
        positions: share of the asked positions that are right.
        classes: the same of every class among the targets, and the mean of those.
        loss: nats a position.
    """

    whole: float
    positions: float
    classes: float
    loss: float


def check_rungs(rungs: list[str]) -> None:
    """Raise `ValueError` where there is no such rung, or it is one with a part left out."""
    if unknown := [name for name in rungs if name not in STEPS]:
        raise ValueError(f"`rungs`: there is no {unknown[0]!r}, only {', '.join(STEPS)}.")


def rung_config(
    name: str, base: Mapping[str, Any], parameters: int, vocab_size: int, fields: Mapping[str, Any]
) -> HopeConfig:
    """
    The config of a rung, with levels so wide that it has about `parameters`. All are Hope models: the Transformer is one
    with attention and a level that never learns. Nor do the other levels, as targets here are no next tokens, and what
    is read is shorter than their periods.

    Args:
        base: fields of all rungs.
        fields: in the place of the memory's defaults, for rungs that have one.

    Raises:
        ValueError: it has more parameters without any level.
    """
    attention = name in ("transformer", "hope_attention")
    own = {**ATTENTION, **SELF} if name == "transformer" else {**RUNGS[name].fields, "cms_training": "static"}
    rung = replace(RUNGS[name], fields={**own, **({} if attention else fields)})
    return HopeConfig(vocab_size=vocab_size, **config_of(rung, {"config": dict(base)}, parameters, vocab_size))


def epoch_batches(generator: torch.Generator, lengths: torch.Tensor, batch: int) -> Iterator[torch.Tensor]:
    """Rows of an epoch's batches: every sequence once, those of a batch of about one length."""
    batches: list[torch.Tensor] = []
    for rows in torch.randperm(len(lengths), generator=generator).split(BUCKET * batch):
        batches += rows[lengths[rows].argsort(stable=True)].split(batch)
    for place in torch.randperm(len(batches), generator=generator).tolist():
        yield batches[place]


def fit(
    model: nn.Module, read: Reader, train: Data, held_out: Data, protocol: Protocol, seed: int, place: Path
) -> list[dict[str, float]]:
    """
    Train a model in place, from its last checkpoint on if there is one: each epoch writes one.

    Returns:
        The scores on what is held out, by epoch. They end where the loss is no number.
    """
    optimizer = torch.optim.AdamW(model.parameters(), protocol.rate, betas=protocol.betas, weight_decay=protocol.decay)
    curve: list[dict[str, float]] = []
    saved = place / CHECKPOINT
    device, lengths = next(model.parameters()).device, train.lengths
    if saved.is_file():
        kept = torch.load(saved, map_location=device, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        curve = kept["curve"]
    place.mkdir(parents=True, exist_ok=True)
    while not protocol.ends(curve):
        model.train()
        epoch = len(curve)
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        for step, rows in enumerate(epoch_batches(generator, lengths, protocol.batch), 1):
            for group in optimizer.param_groups:
                group["lr"] = protocol.rate_at(epoch) * (min(1.0, step / WARMUP) if epoch == 0 else 1.0)
            batch = train.rows(rows)
            loss = _loss(read(model, batch.inputs.to(device)), batch.targets.to(device))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), LARGEST_NORM)
            optimizer.step()
        curve.append(asdict(score(model, read, held_out)))
        staged = saved.with_suffix(".part")
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "curve": curve}, staged)
        staged.replace(saved)
    return curve


@torch.no_grad()
def score(model: nn.Module, read: Reader, data: Data) -> Score:
    """What a model gets right, in `eval()` mode, longest sequences last."""
    model.eval()
    device, order = next(model.parameters()).device, data.lengths.argsort(stable=True)
    whole, right, classes, losses = [], [], [], []
    for rows in order.split(max(1, TEST_TOKENS // data.inputs.shape[1])):
        part = data.rows(rows)
        targets = part.targets.to(device)
        logits = read(model, part.inputs.to(device))
        hits, asked = logits.argmax(-1) == targets, targets != IGNORED
        whole.append((hits | ~asked).all(1))
        right.append(hits[asked])
        classes.append(targets[asked])
        losses.append(_loss(logits, targets, "sum"))
    rights, named = torch.cat(right).double(), torch.cat(classes)
    by_class = [rights[named == name].mean() for name in named.unique()]
    return Score(
        torch.cat(whole).double().mean().item(),
        rights.mean().item(),
        torch.stack(by_class).mean().item(),
        (torch.stack(losses).sum() / len(rights)).item(),
    )


def _loss(logits: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction=reduction, ignore_index=IGNORED)


@dataclass(frozen=True)
class Tuned:
    """
    Attributes:
        chosen: the protocol with the best last score on what is held out.
        model: what it trained.
        curves: of all protocols.
    """

    chosen: str
    model: nn.Module
    curves: dict[str, list[dict[str, float]]]


def tune(
    make: Callable[[], nn.Module],
    read: Reader,
    train: Data,
    held_out: Data,
    protocols: Mapping[str, Protocol],
    seed: int,
    place: Path,
) -> Tuned:
    """Train a model by each of several protocols, all from the same weights, and choose; checkpoints lie below `place`."""
    curves, best, chosen, found = {}, (-1.0, 0.0), next(iter(protocols)), make()
    for name, protocol in protocols.items():
        model = make()
        curves[name] = fit(model, read, train, held_out, protocol, seed, place / name)
        last = curves[name][-1]
        rank = (last[protocol.by], -last["loss"]) if math.isfinite(last["loss"]) else (-1.0, 0.0)
        if rank > best:
            best, chosen, found = rank, name, model
    return Tuned(chosen, found, curves)


def forget_checkpoints(place: Path) -> None:
    """Of a part that came to its end."""
    for path in place.glob(f"**/{CHECKPOINT}"):
        path.unlink()
