"""What a card's `[output]` says the network puts out, as something that reads it."""

from __future__ import annotations

from workers.cam.readout import Readout, Region, Scores, Similarity, Symbols
from workers.models.card import LoadedCard
from workers.models.checkpoint import load_vectors


def make_readout(loaded: LoadedCard) -> Readout:
    """The readout of a card; ModelError if its reference vectors cannot be had."""
    spec = loaded.card.tile_output
    match spec.kind:
        case "mask":
            return Region(spec.region)
        case "sequence":
            return Symbols(spec.symbol_score, spec.padding)
        case "embedding" if spec.references:
            vectors = load_vectors(loaded.folder / spec.references, spec.references_sha256, spec.classes)
            return Similarity(vectors, spec.similarity)
    return Scores()
