"""The figures, the table and the plot of linear_model_gpu.py, from its rows."""

from typing import Any

from _record import ROOT

PLOT = ROOT / "docs" / "linear_model.svg"
#: Each form as the plot names it, and its colour.
FORMS = {
    "attnopt": ("TransNormer, N x N through attnopt", "#2a6f97"),
    "fla": ("the same, fla called by hand", "#e09f3e"),
    "softmax": ("LLaMA, cuDNN attention", "#9e2a2b"),
    "plain": ("TransNormer, N x N by Inductor", "#8d99ae"),
}

Row = dict[str, Any]


def summary(rows: list[Row]) -> Row:
    """The claim in numbers: what each form keeps of its tokens/s from the shortest length to the longest; the peers."""
    speed = {(row["form"], row["length"]): row["tokens_per_second"] for row in rows if "error" not in row}
    lengths = sorted({length for _, length in speed})
    ends = (lengths[0], lengths[-1]) if lengths else (0, 0)
    kept = {
        form: speed[form, ends[1]] / speed[form, ends[0]]
        for form in FORMS
        if {(form, end) for end in ends} <= {*speed}
    }
    beside = {
        form: {
            str(n): speed["attnopt", n] / speed[form, n]
            for n in lengths
            if {("attnopt", n), (form, n)} <= {*speed}
        }
        for form in FORMS
        if form != "attnopt"
    }
    return {"lengths": list(ends), "kept": kept, "times_as_fast_as": beside, **agreement(rows)}


def agreement(rows: list[Row]) -> Row:
    """How far the forms of one function are apart at the most: the first loss, and its gradient's norm."""
    held = {(row["form"], row["length"]): row for row in rows if "error" not in row}
    pairs = [
        (held["attnopt", length], row)
        for (form, length), row in held.items()
        if form in {"fla", "plain"} and ("attnopt", length) in held
    ]
    if not pairs:
        return {}
    return {
        "largest_relative_difference_of_the_first_loss": max(
            apart(a["losses"][0], b["losses"][0]) for a, b in pairs
        ),
        "largest_relative_difference_of_the_gradient_norm": max(
            apart(a["gradient_norm"], b["gradient_norm"]) for a, b in pairs
        ),
    }


def apart(a: float, b: float) -> float:
    """|a - b| / |b|."""
    return abs(a - b) / abs(b)


def line(row: Row) -> str:
    """One row as it comes."""
    if "error" in row:
        return f"{row['form']:>8} {row['length']:>7}  {row['error']}"
    spread = " ".join(f"{s:.3f}" for s in row["seconds"])
    losses = " ".join(f"{loss:.4f}" for loss in row["losses"])
    return (
        f"{row['form']:>8} {row['length']:>7} {row['tokens_per_second']:>11,.0f} tokens/s ({spread} s; first "
        f"{row['first_step_seconds']:.1f} s), {cell_of_memory(row)}, loss {losses} {row.get('sites', '')}"
    )


def table(rows: list[Row]) -> str:
    """Thousands of tokens per second and GiB at the peak, by length and form."""
    held = {(row["form"], row["length"]): row for row in rows if "error" not in row}
    lines = [f"{'length':>8}" + "".join(f"{form:>24}" for form in FORMS)]
    for length in sorted({length for _, length in held}):
        cells = [cell(held[form, length]) if (form, length) in held else "-" for form in FORMS]
        lines.append(f"{length:>8}" + "".join(f"{text:>24}" for text in cells))
    kept = summary(rows)["kept"]
    lines.append(f"{'kept':>8}" + "".join(f"{kept.get(form, float('nan')):>24.3f}" for form in FORMS))
    return "\n".join(lines)


def cell(row: Row) -> str:
    """One place of the table."""
    return f"{row['tokens_per_second'] / 1e3:.1f} k/s {cell_of_memory(row)}"


def cell_of_memory(row: Row) -> str:
    """GiB, if they were counted."""
    return f"{row['peak_bytes'] / 2**30:.1f} GiB" if row["peak_bytes"] else "-"


def plot(rows: list[Row]) -> None:
    """Tokens per second and peak memory over the length, into docs/linear_model.svg."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "attnopt"  # the same picture for the same figures
    from matplotlib import pyplot as plt

    figure, (speed, memory) = plt.subplots(1, 2, figsize=(9.0, 3.6), layout="constrained")
    for form, (label, color) in FORMS.items():
        held = sorted((r for r in rows if r["form"] == form and "error" not in r), key=lambda r: r["length"])
        lengths = [r["length"] for r in held]
        look = {"label": label, "color": color, "marker": "o", "markersize": 4}
        speed.plot(lengths, [r["tokens_per_second"] / 1e3 for r in held], **look)
        memory.plot(lengths, [(r["peak_bytes"] or 0) / 2**30 for r in held], **look)
    for axes, what in ((speed, "thousand tokens per second"), (memory, "peak memory, GiB")):
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("sequence length, as many tokens in each step")
        axes.set_ylabel(what)
    speed.legend(frameon=False, fontsize=8)
    figure.savefig(PLOT, metadata={"Date": None})
    plt.close(figure)
