"""Kernels that read, change and write shared memory at once give other bits each time: none here uses atomics.

https://github.com/fla-org/flash-linear-attention/issues/889, https://github.com/Dao-AILab/flash-attention/issues/359
"""

from source import PACKAGE

KERNELS = [module for module in PACKAGE if module.name.startswith("attnopt.kernels.")]


def test_no_kernel_adds_atomically() -> None:
    assert [module.name for module in KERNELS if "atomic_" in module.text] == []
    assert any(module.is_triton for module in KERNELS)
