"""What a prompt may be, the same for every backend (docs/architecture/search.md)."""

from __future__ import annotations

from sdt_dist.errors import ContextError
from sdt_dist.protocols import Root


def check_context(root: Root, num_new: int, max_context: int, *, embeddings: bool = False) -> None:
    """ContextError for an empty prompt, or one that leaves no room for `num_new` tokens within `max_context`.

    embeddings: whether the backend takes a prompt's embeddings.
    """
    length = len(root.prompt)
    if not length:
        raise ContextError("prompt: empty; a prompt needs at least one token.")
    if length + num_new > max_context:
        raise ContextError(
            f"prompt: {length} tokens and {num_new} new ones exceed the model's context of {max_context}; shorten the "
            "prompt or lower max_new_tokens."
        )
    if root.embeddings is not None and not embeddings:
        raise ContextError(
            "prompt: it has embeddings, which only a vllm model in this process takes, opened with prompt_embeddings=True; "
            "give token ids instead."
        )
