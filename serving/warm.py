"""Memories that are held in RAM, under a budget of bytes; those used longest ago make room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from modeling_hope.cache_hope import HopeCache


Storages = dict[Any, int]


class WarmMemories:
    """
    Memories by the place of their files, from any thread. All are on disk: what makes room is lost to nobody.

    A place's files never change, so neither does its memory, whoever writes the session's next one. What forks share
    counts once.

    Args:
        budget: bytes at most; a memory that is larger alone is not kept.

    Attributes:
        bytes: held.
        hits, misses, evictions: so far.
    """

    def __init__(self, budget: int):
        self.budget, self.bytes = budget, 0
        self.hits = self.misses = self.evictions = 0
        self._lock = threading.Lock()
        self._memories: OrderedDict[str, tuple[HopeCache, Storages]] = OrderedDict()  # used longest ago first
        self._users: dict[Any, int] = {}  # of each storage, how many memories

    def __len__(self) -> int:
        return len(self._memories)

    def get(self, place: str) -> HopeCache | None:
        with self._lock:
            if place not in self._memories:
                self.misses += 1
                return None
            self.hits += 1
            self._memories.move_to_end(place)
            return self._memories[place][0]

    def put(self, place: str, memory: HopeCache) -> HopeCache:
        """Keep a memory; the one to use, which is another's that was first where two were."""
        with self._lock:
            if place in self._memories:
                memory = self._take(place)
            self._add(place, memory)
        return memory

    def measure(self, place: str) -> None:
        """Count a memory again, which grows while it is used: sums of slow weights and changes are kept with it."""
        with self._lock:
            if place in self._memories:
                self._add(place, self._take(place))

    def drop(self, place: str) -> None:
        with self._lock:
            if place in self._memories:
                self._take(place)

    def clear(self) -> None:
        with self._lock:
            self._memories.clear()
            self._users.clear()
            self.bytes = 0

    def _add(self, place: str, memory: HopeCache) -> None:
        storages = memory.storages()
        if sum(storages.values()) > self.budget:
            return
        self._memories[place] = memory, storages
        for storage, size in storages.items():
            users = self._users.get(storage, 0)
            self._users[storage] = users + 1
            self.bytes += 0 if users else size
        while self.bytes > self.budget:
            self._take(next(iter(self._memories)))
            self.evictions += 1

    def _take(self, place: str) -> HopeCache:
        memory, storages = self._memories.pop(place)
        for storage, size in storages.items():
            self._users[storage] -= 1
            if not self._users[storage]:
                del self._users[storage]
                self.bytes -= size
        return memory
