"""The same call inside a CUDA graph: captured once, replayed without the host's part of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from attnbench.measure.call import Grads, TorchCall


class NotCapturable(Exception):
    """The call does something that a CUDA graph cannot hold; the message says what."""


@dataclass(frozen=True)
class Graphed:
    """A call whose passes replay graphs. Outputs stand where the capture left them."""

    forward_graph: torch.cuda.CUDAGraph
    backward_graph: torch.cuda.CUDAGraph | None
    out: Tensor
    grads: Grads

    def forward(self) -> Tensor:
        self.forward_graph.replay()
        return self.out

    def backward(self, out: Tensor) -> Grads:  # noqa: ARG002 - the graph knows its own output
        assert self.backward_graph is not None
        self.backward_graph.replay()
        return self.grads


def capture(call: TorchCall, device: torch.device, *, backward: bool, warmups: int = 3) -> Graphed:
    """Captures forward and backward of a call, each into a graph of its own.

    Raises:
        NotCapturable: a capture failed.
    """
    aside = _aside(device)
    try:
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(warmups):
                out = call.forward()
                if backward:
                    call.backward(out)
                del out
        torch.cuda.current_stream(device).wait_stream(aside)
        graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
        grads: Grads = ()
        with torch.cuda.graph(graphs[0], stream=aside):
            out = call.forward()
        if backward:
            with torch.cuda.graph(graphs[1], pool=graphs[0].pool(), stream=aside):
                grads = call.backward(out)
        return Graphed(graphs[0], graphs[1] if backward else None, out, grads)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise NotCapturable(str(error).strip().partition("\n")[0] or type(error).__name__) from None


@cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures. cuBLAS has a workspace for each stream that it ever worked on, and a new one, cut from
    whatever block is free, would keep from the device all the memory that the block is a part of."""
    return torch.cuda.Stream(device)
