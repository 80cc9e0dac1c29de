"""Processes that build, damage, read and die on one cache at once, as a command with totals.

    python tests/cache_soak.py --processes 16 --rounds 200

Each round a child stores and looks up entries under a few shared keys and is killed with SIGKILL at a random moment; a
second kind truncates or flips files in place. Whatever is looked up must be whole: the content says which key it is
for and carries its own hash.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from sparsec.codegen.cache import Cache

KEYS = tuple(hashlib.sha256(bytes([n])).hexdigest() for n in range(6))
BAD, READ, MISSED, STORED = range(4)


def content(key: str, salt: int) -> bytes:
    """What a key may hold: its name, a body, and the hash of both."""
    body = key.encode() + random.Random(f"{key}{salt}").randbytes(20_000)
    return body + hashlib.sha256(body).digest()


def whole(key: str, data: bytes) -> bool:
    return data[:64] == key.encode() and hashlib.sha256(data[:-32]).digest() == data[-32:]


def work(root: str, seed: int, counts: object) -> None:
    """Store and look up until killed."""
    rng, box = random.Random(seed), Cache(Path(root))
    while True:
        key = rng.choice(KEYS)
        with box.lock(key):
            entry = box.lookup(key)
            if entry is None or rng.random() < 0.3:
                with box.workspace() as folder:
                    (folder / "out.so").write_bytes(content(key, rng.randrange(4)))
                    entry = box.store(key, folder / "out.so", "source", {"spec": "[]"})
                counts[STORED] += 1  # type: ignore[index]
        entry = box.lookup(key)
        if entry is None:
            counts[MISSED] += 1  # type: ignore[index]
            continue
        try:
            data = entry.library.read_bytes()
        except FileNotFoundError:  # evicted or replaced since; the loader builds again
            counts[MISSED] += 1  # type: ignore[index]
            continue
        counts[READ if whole(key, data) else BAD] += 1  # type: ignore[index]


def harm(root: Path, rng: random.Random) -> None:
    """What a crashing machine leaves: a file cut short, or emptied, under its final name; replaced, never rewritten."""
    files = [p for p in (root / "kernels").glob("*") if p.suffix in (".json", ".c")]
    if files:
        victim = rng.choice(files)
        draft = root / "tmp" / f"harm{rng.randrange(10**9)}"
        try:
            draft.write_bytes(victim.read_bytes()[: rng.randrange(200)])
            draft.chmod(0o600)
            os.replace(draft, victim)
        except OSError:
            return


def run(processes: int, rounds: int, seed: int, pause: float = 0.05) -> dict[str, int]:
    """Totals: children killed, entries stored, entries read whole, misses, and bad reads, which must be none."""
    context = multiprocessing.get_context("fork")
    counts = context.Array("q", 4, lock=False)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "cache"
        Cache(root)
        children = [context.Process(target=work, args=(str(root), seed + n, counts)) for n in range(processes)]
        for child in children:
            child.start()
        killed = 0
        for round_number in range(rounds):
            time.sleep(rng.random() * pause)
            at = rng.randrange(processes)
            os.kill(children[at].pid or 0, signal.SIGKILL)
            children[at].join()
            killed += 1
            harm(root, rng)
            children[at] = context.Process(target=work, args=(str(root), seed + 1000 + round_number, counts))
            children[at].start()
        for child in children:
            child.kill()
            child.join()
        clean = all(Cache(root).lookup(k) is None or whole(k, Cache(root).lookup(k).library.read_bytes()) for k in KEYS)  # type: ignore[union-attr]
    return {
        "killed": killed, "stored": counts[STORED], "read": counts[READ], "missed": counts[MISSED],
        "bad": counts[BAD] + (not clean),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description="Build, kill and read on one cache from many processes.")
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    totals = run(options.processes, options.rounds, options.seed)
    print(f"seed {options.seed}, {options.processes} processes: " + ", ".join(f"{v} {k}" for k, v in totals.items()))
    return 1 if totals["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
