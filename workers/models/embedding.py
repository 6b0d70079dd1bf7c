"""An embedding read inside a network: what a layer gives, averaged over the tile, or its class token.

Hooks, so that the network keeps the names its weights and layers were published with.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from schemas.errors import ModelError
from workers.cam.capture import submodule
from workers.cam.tokens import Arrangement, TokenLayout, looks_channels_last


class Embedding:
    """Makes a network's output an embedding `(B, D)`.

    Parameters
    ----------
    how
        `mean` over the cells or patches of the layer's output, or the `class` token, the first.
    layer
        Name of a submodule; empty: the network itself.
    tokens
        What the card says of how layers lie.
    """

    def __init__(self, how: Literal["mean", "class"], layer: str, tokens: TokenLayout) -> None:
        self._how = how
        self._layer = layer
        self._tokens = tokens
        self._handle: Any = None
        self._found: Tensor | None = None

    def attach(self, network: nn.Module) -> None:
        """From now on the network gives the embedding.

        Raises
        ------
        ModelError
            No such layer.
        """
        if self._layer:
            submodule(network, self._layer)
        network.register_forward_pre_hook(self._begin)
        network.register_forward_hook(self._end, always_call=True)

    def _begin(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._found = None
        if self._layer:
            tile = tuple(inputs[0].shape[2:])

            def embed(_module: nn.Module, _inputs: Any, output: Any) -> None:
                self._found = self._pooled(output, tile)

            # Last of the hooks there: what was put in the place of the layer's output is what is embedded. And at once: what
            # comes next may change it in place.
            self._handle = network.get_submodule(self._layer).register_forward_hook(embed)

    def _end(self, _network: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Tensor | None:
        found, self._found = self._found, None
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if output is None:  # an exception is on its way
            return None
        if not self._layer:
            return self._pooled(output, tuple(inputs[0].shape[2:]))
        if found is None:
            msg = (
                f"[network] embedding_layer = {self._layer!r} does not run in a pass; name a layer that does"
            )
            raise ModelError(msg)
        return found

    def _pooled(self, output: Any, tile: tuple[int, ...]) -> Tensor:
        output = getattr(output, "last_hidden_state", output)
        if isinstance(output, tuple | list) and output:
            output = output[0]
        name = self._layer or "the network"
        if not isinstance(output, Tensor) or output.ndim < 3:
            shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            msg = (
                f"[network] embedding = {self._how!r}: {name} gives {shape}; expected feature maps or tokens. Name in "
                "embedding_layer a layer before pooling, or leave embedding out where the network gives (tiles, numbers)"
            )
            raise ModelError(msg)
        lies = self._lies(tuple(output.shape), tile, name)
        if self._how == "mean":
            return lies.encode(output).flatten(2).mean(2)
        if lies.layout != "tokens" or not lies.prefix:
            msg = (
                f"[network] embedding = 'class': the output of {name}, {tuple(output.shape)}, has no class token before its "
                "patches; use embedding = 'mean'"
            )
            raise ModelError(msg)
        return output[:, 0]

    def _lies(self, shape: tuple[int, ...], tile: tuple[int, ...], name: str) -> Arrangement:
        if len(shape) == 3 and len(tile) > 1:
            return replace(self._tokens, layout="tokens").fit(shape, tile, name)
        said = self._tokens.layout if self._tokens.layout != "tokens" else ""
        if not said and looks_channels_last(shape, tile):
            msg = (
                f"[network] embedding = {self._how!r}: {name} gives shape {shape}, which parts the tile more evenly as (tiles, *grid, "
                "channels); write [cam] layout = 'channels_last', or layout = 'channels_first' if it is so after all"
            )
            raise ModelError(msg)
        return replace(self._tokens, layout=said).fit(shape, tile, name)
