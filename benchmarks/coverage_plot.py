"""The plot docs/coverage.svg from the rows of the coverage benchmark."""

from collections.abc import Mapping
from typing import Any

from _record import ROOT
from coverage_modes import Mode
from coverage_report import figures

PLOT = ROOT / "docs" / "coverage.svg"


def plot(payload: Mapping[str, Any]) -> None:
    """Shares of the sites by family, attnopt beside Inductor, in the modes for which both were counted."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "attnopt"  # the same picture for the same figures
    from matplotlib import pyplot as plt

    shown = [
        f for f in figures(payload["rows"]) if f.inductor is not None and f.sites and f.family != "decoys"
    ]
    names = [
        f"{f.family}\n{'padded' if Mode.parse(f.mode).mask == 'left' else 'no mask'}\n{f.sites} sites"
        for f in shown
    ]
    figure, axes = plt.subplots(figsize=(max(6.0, 1.1 * len(shown)), 4.0), layout="constrained")
    for shift, label, color in ((-0.2, "attnopt", "#2a6f97"), (0.2, "Inductor", "#c9ada7")):
        shares = [100 * (f.share if label == "attnopt" else (f.inductor or 0) / f.sites) for f in shown]
        bars = axes.bar([n + shift for n in range(len(shown))], shares, 0.4, label=label, color=color)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(shown)), names, fontsize=8)
    axes.set_ylabel("sites replaced, %")
    axes.set_ylim(0, 110)
    axes.legend(frameon=False, ncols=2)
    figure.savefig(PLOT, metadata={"Date": None})
