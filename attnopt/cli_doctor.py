"""Is everything there that attnopt needs, and does it work here? `attnopt doctor`."""

import importlib.util
import os
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Literal

import torch
from torch import Tensor, nn

from attnopt.errors import AttnoptError, OptionError
from attnopt.options import Options

Status = Literal["ok", "warning", "missing"]

_TORCH = (2, 11)
_EXTRAS = {"transformers": "hf", "gguf": "hf", "safetensors": "hf", "jinja2": "report"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. missing: attnopt cannot do its work without it."""

    name: str
    status: Status
    detail: str

    def as_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)


def examine() -> Iterator[Finding]:
    """Looks at one thing after the other."""
    for look in (
        _python,
        _torch,
        _device,
        _triton,
        _interpreter,
        _compiler,
        _operators,
        _backend,
        _variables,
        _torchvision,
    ):
        yield look()
    yield from (_extra(package) for package in _EXTRAS)
    yield _self_test()


def table(findings: Sequence[Finding]) -> str:
    """The findings as plain text, a line each."""
    width = max(len(finding.name) for finding in findings)
    return "\n".join(f"{finding.status:<8} {finding.name:<{width}}  {finding.detail}" for finding in findings)


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _torch() -> Finding:
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    old = found < _TORCH
    wanted = f"; wanted {'.'.join(map(str, _TORCH))} or newer" if old else ""
    return Finding("torch", "missing" if old else "ok", torch.__version__ + wanted)


def _device() -> Finding:
    if not torch.cuda.is_available():
        return Finding(
            "device", "ok", f"no GPU; torch paths on {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"
        )
    major, minor = torch.cuda.get_device_capability()
    return Finding("device", "ok", f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}")


def _triton() -> Finding:
    if importlib.util.find_spec("triton") is None:
        needed = torch.cuda.is_available()
        return Finding(
            "triton",
            "missing" if needed else "warning",
            "not installed; the GPU kernels need it: pip install triton",
        )
    found, wanted = version("triton"), _pinned_triton()
    if wanted and found != wanted:
        return Finding("triton", "warning", f"{found}, but torch {torch.__version__} was made with {wanted}")
    return Finding("triton", "ok", found)


def _pinned_triton() -> str:
    """The Triton version that torch's own metadata names, "" if none."""
    pins = (re.match(r"(?:pytorch-)?triton==([\w.]+)", line) for line in requires("torch") or ())
    return next((pin[1] for pin in pins if pin), "")


def _interpreter() -> Finding:
    on = os.environ.get("TRITON_INTERPRET") == "1"
    if on and torch.cuda.is_available():
        return Finding(
            "interpreter", "warning", "TRITON_INTERPRET=1 although there is a GPU: kernels will be very slow"
        )
    detail = "TRITON_INTERPRET=1: Triton kernels run in Python, without bf16" if on else "off"
    return Finding("interpreter", "ok", detail)


def _compiler() -> Finding:
    """Inductor writes C++; the default inner compiler needs something to compile it with."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return Finding("C++ compiler", "ok", get_cpp_compiler())
    except (InvalidCxxCompiler, RuntimeError, OSError):
        return Finding(
            "C++ compiler", "missing", "none found; Inductor needs one: install g++, or use inner=aot_eager"
        )


def _operators() -> Finding:
    import attnopt.ops  # noqa: F401 - registers them
    from attnopt.registry import kernels, rules

    registered = sorted(
        {
            name.split("::")[1].split(".")[0]
            for name in torch._C._dispatch_get_all_op_names()
            if name.startswith("attnopt::")
        }
    )
    counts = f"{len(rules())} rules, kernels {', '.join(kernel.name for kernel in kernels())}"
    return Finding(
        "operators",
        "ok" if registered else "missing",
        f"{', '.join(registered) or 'none registered'}; {counts}",
    )


def _backend() -> Finding:
    from torch._dynamo.backends.registry import list_backends

    if "attnopt" in list_backends(exclude_tags=()):
        return Finding("backend", "ok", 'torch.compile(model, backend="attnopt")')
    return Finding(
        "backend", "missing", "torch.compile does not know it; install attnopt with pip (pip install -e .)"
    )


def _variables() -> Finding:
    try:
        changed = Options.parse().changed()
    except OptionError as error:
        return Finding("variables", "missing", str(error))
    return Finding(
        "variables", "ok", ", ".join(f"{k}={v}" for k, v in changed.items()) or "no ATTNOPT_* option is set"
    )


def _torchvision() -> Finding:
    """A torchvision built for another torch breaks even `import transformers`."""
    try:
        found = version("torchvision")
    except PackageNotFoundError:
        return Finding("torchvision", "ok", "not installed (not needed)")
    if torch.version.cuda is None and "+cpu" not in found:
        return Finding(
            "torchvision", "warning", f"{found} beside a CPU build of torch: imports of transformers may fail"
        )
    return Finding("torchvision", "ok", found)


def _extra(package: str) -> Finding:
    try:
        return Finding(package, "ok", version(package))
    except PackageNotFoundError:
        return Finding(package, "ok", f"not installed (optional: pip install 'attnopt[{_EXTRAS[package]}]')")


class _Toy(nn.Module):
    """Two layers of causal attention."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).tril()
        for _ in range(2):
            scores = (x @ x.transpose(-1, -2) * 0.25).masked_fill(~mask, float("-inf"))
            x = x + torch.softmax(scores, -1) @ x
        return x


def _self_test() -> Finding:
    """Rewrites a toy and compares."""
    from attnopt.cli_compare import compare
    from attnopt.programs import rewrite

    inputs = (torch.randn(1, 2, 24, 16, generator=torch.Generator().manual_seed(0)),)
    try:
        program = torch.export.export(_Toy(), inputs)
        rewritten, report = rewrite(program, Options())
        checks = compare(program, rewritten, inputs, {}, exact=True)
    except (AttnoptError, RuntimeError, ImportError) as error:
        return Finding("self-test", "missing", f"{type(error).__name__}: {error}")
    done = len(report.having("rewritten"))
    fine = done == 2 and all(check.verdict == "ok" for check in checks)
    detail = f"{done} of 2 sites rewritten, relative error {checks[0].relative_error:.1e}"
    return Finding("self-test", "ok" if fine else "missing", detail)


def missing(findings: Sequence[Finding]) -> list[Finding]:
    """What attnopt cannot do without."""
    return [finding for finding in findings if finding.status == "missing"]
