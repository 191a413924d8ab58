"""The kernels for direct use; each is one differentiable operator with a torch path for machines without a GPU."""

from attnopt.kernels.lightning.op import lightning_attention, lightning_step
from attnopt.kernels.sparq.op import sparq_attention
from attnopt.kernels.sparq.op_step import sparq_append, sparq_step
from attnopt.kernels.streaming.places import streaming_attention

__all__ = [
    "lightning_attention",
    "lightning_step",
    "sparq_append",
    "sparq_attention",
    "sparq_step",
    "streaming_attention",
]
