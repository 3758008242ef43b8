"""Keys of shared evidence: equal exactly where walks of one search are valid known mass of another.

See docs/concepts/exactness.md#shared-evidence.

blake2b digests, the same in every process; Python's hash() differs per process.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from sdt_dist.protocols import PriorLaw


def evidence_key(
    *,
    model: str,
    tokenizer: str,
    law: PriorLaw | None,
    max_new_tokens: int,
    reward: str,
    context: bytes,
) -> str:
    """The key [32 hex digits] of a problem's evidence.

    model, tokenizer: names that pin weights and vocabulary. law, max_new_tokens: the definition of p (None: the model's own, which its name fixes). reward: the
    identity of its terms WITHOUT their multipliers (`rewards.spec.reward_identity`). context: a digest or the bytes
    of everything that the model or the reward sees of the problem (prompt, full history).
    """
    facts = [
        model,
        tokenizer,
        law and asdict(law),
        max_new_tokens,
        reward,
        hashlib.blake2b(context).hexdigest(),
    ]
    return hashlib.blake2b(json.dumps(facts).encode(), digest_size=16).hexdigest()


def shard_of(key: str, num_shards: int) -> int:
    """Which of `num_shards` store shards holds a key: in [0, num_shards), the same in every process."""
    return (
        int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") % num_shards
    )
