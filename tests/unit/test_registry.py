"""What is in the folders is found, in an order that does not depend on the file system."""

from attnopt.registry import kernels, rules
from attnopt.rule import Kernel


def test_every_rule_and_kernel_is_found_by_name() -> None:
    assert {"softmax", "sdpa", "linear", "fused"} <= {rule.name for rule in rules()}
    assert {"reference", "sdpa", "streaming", "lightning", "sparq"} <= {kernel.name for kernel in kernels()}


def test_they_come_sorted_and_each_once() -> None:
    for found in ([r.name for r in rules()], [k.name for k in kernels()]):
        assert found == sorted(set(found))


def test_every_kernel_is_one() -> None:
    assert all(isinstance(kernel, Kernel) for kernel in kernels())
    assert all(kernel.reads and kernel.family in {"softmax", "linear"} for kernel in kernels())


def test_every_rule_starts_somewhere() -> None:
    assert all(rule.anchors for rule in rules())


def test_asking_again_gives_the_same_objects() -> None:
    assert rules() is rules()
    assert kernels() is kernels()
