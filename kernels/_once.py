"""Backward passes are operators of their own, and have no gradient: who asks for one is told so by name."""

from typing import Any

from torch._library.custom_ops import CustomOpDef

from attnopt.errors import UnsupportedError


def differentiable_once(backward: CustomOpDef, kernel: str) -> None:
    """Gives `backward`, the backward pass of `kernel`, a gradient that raises UnsupportedError."""

    def refuse(ctx: object, *grads: object) -> Any:
        del ctx, grads
        raise UnsupportedError(
            f"{kernel} attention has no second derivative (a gradient penalty, a Hessian): wanted one backward pass. "
            f"Leave the site as it is with options={{'deny': ['{kernel}']}}, or torch.compiler.disable the attention"
        )

    backward.register_autograd(refuse)
