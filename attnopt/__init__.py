"""attnopt: a compiler for attention in PyTorch.

    compiled = torch.compile(model, backend="attnopt")

finds every attention in a model, however it is spelled, proves what it computes and replaces it by a fused kernel.
`explain` shows what it would do, `rewrite` works on exported programs, `ops` has the kernels themselves.
"""

from typing import TYPE_CHECKING

from attnopt import ops

if TYPE_CHECKING:
    from attnopt.backend import reports
    from attnopt.options import Options
    from attnopt.programs import explain, rewrite
    from attnopt.spec import AttentionSpec

__version__ = "0.1.0"
__all__ = ["AttentionSpec", "Options", "__version__", "explain", "ops", "reports", "rewrite"]

_LAZY = {
    "AttentionSpec": "attnopt.spec",
    "Options": "attnopt.options",
    "explain": "attnopt.programs",
    "reports": "attnopt.backend",
    "rewrite": "attnopt.programs",
}


def __getattr__(name: str) -> object:
    """The compiler is imported when it is first used; the operators are registered at once."""
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'attnopt' has no attribute {name!r}")
