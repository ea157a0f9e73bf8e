"""Mixers and blocks as one node of the autograd graph each: kernels in straight-line code.

An op of `quadmamba.kernels.fused` costs 100 to 300 us of host time in each direction, most of it
for the module, the checks and the node around a kernel or two. The functions here call the same
kernels one after the other, and all of them are one node.
"""

from quadmamba.kernels.nodes.block import Block
from quadmamba.kernels.nodes.mixer import Mixer, Quadrants
from quadmamba.kernels.nodes.node import run

__all__ = ["Block", "Mixer", "Quadrants", "run"]
