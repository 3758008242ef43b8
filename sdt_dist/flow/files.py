"""A flow's checkpoint as it travels: the text and the bytes of its two files, checked without torch.

See docs/concepts/flow.md.

Machines need not share a disk: a driver reads a checkpoint once, and whoever has rows of p makes a `Flow` of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from sdt_dist.errors import CheckpointError
from sdt_dist.flow.info import INFO_FILE, WEIGHTS_FILE, FlowHead, arrays_digest, check_model
from sdt_dist.models.card import ModelCard

BUNDLED = Path(__file__).parent / "weights"


@dataclass(frozen=True, slots=True)
class FlowFiles:
    """flow.json and model.safetensors of one flow; `source` is where they come from, for people."""

    info_text: str
    weights: bytes
    source: str = "a flow that was sent"

    @classmethod
    def read(cls, directory: str | Path) -> FlowFiles:
        """The files of a checkpoint directory, or of the flow on board, `bundled`.

        CheckpointError unless they are there, ours and undamaged.
        """
        folder = BUNDLED if str(directory) == "bundled" else Path(directory)
        if not folder.is_dir():
            raise CheckpointError(
                f"flow: {folder} is no directory; give the directory of a flow's checkpoint, or bundled."
            )
        texts = []
        for name in (INFO_FILE, WEIGHTS_FILE):
            try:
                texts.append((folder / name).read_bytes())
            except OSError as error:
                raise CheckpointError(
                    f"flow: {folder / name} cannot be read ({error.strerror}); give a whole checkpoint."
                ) from error
        files = cls(texts[0].decode(errors="replace"), texts[1], str(folder))
        files.check()
        return files

    @property
    def head(self) -> FlowHead:
        """What flow.json says."""
        return FlowHead.of(self.info_text, f"{self.source}/{INFO_FILE}")

    @property
    def identity(self) -> str:
        """The flow's identity."""
        return self.head.identity

    def check(self) -> None:
        """CheckpointError unless the weights are those that flow.json names, all finite."""
        place = f"{self.source}/{WEIGHTS_FILE}"
        wanted = self.head.weights
        try:
            arrays = load(self.weights)
        except (SafetensorError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"flow: {place} cannot be read ({error}); give a whole checkpoint."
            ) from error
        bad = [name for name, array in arrays.items() if not np.isfinite(array).all()]
        if bad:
            raise CheckpointError(
                f"flow: {place} holds NaN or infinity in {bad[0]!r}; it is damaged, or its training diverged."
            )
        digest = arrays_digest(arrays)
        if digest != wanted:
            raise CheckpointError(
                f"flow: {place} has weights {digest}, {INFO_FILE} says {wanted!r}: the files of two versions, or damage; "
                "save the flow again."
            )

    def check_model(self, card: ModelCard) -> None:
        """CheckpointError unless the flow was trained for the model of this card."""
        head = self.head
        check_model(head.spec, head.info, card)
