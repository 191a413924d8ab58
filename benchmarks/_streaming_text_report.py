"""The tables and the plot of streaming_text_gpu.py, from its rows."""

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from _record import ROOT

Row = dict[str, Any]

PLOT = ROOT / "docs" / "streaming_text.svg"
COLORS = {"4 sinks": "#2a6f97", "0 sinks": "#9e2a2b", "full attention": "#8d99ae"}


def table(parts: Row) -> str:
    """What was found, part by part."""
    return "\n".join(line for name, row in parts.items() for line in LINES[name](row))


def novels_lines(row: Row) -> Iterator[str]:
    """Part a."""
    yield f"a. {row['tokens']:,} tokens, {row['budget']:,} keys seen: perplexity"
    for sinks, value in row["perplexity_by_sinks"].items():
        yield f"   {sinks} sinks: {value:.3f}"
    windows = row["recomputed"]
    yield f"   windows recomputed at {windows['windows']:,} positions: {windows['perplexity']:.3f}; there"
    for sinks, found in windows["by_sinks"].items():
        yield (
            f"   {sinks} sinks: {found['perplexity']:.3f}, {found['ratio']:.4f} times as much, "
            f"+- {found['standard_error']:.4f}"
        )


def millions_lines(row: Row) -> Iterator[str]:
    """Part b."""
    yield f"b. {row['tokens']:,} tokens in {row['seconds_of_the_stream']:.1f} s"
    yield f"   perplexity of each {row['bucket']:,}: {extremes(row['perplexity_by_bucket'])}"
    yield f"   of each round: {extremes(row['perplexity_by_round'], '.4f')}"
    yield f"   bytes allocated: {extremes([x or 0 for x in row['allocated_bytes']], '.0f')}"
    yield f"   ms a token: {extremes([x['milliseconds_per_token'] for x in row['decoding']])}"
    checks = row["checks"]
    yield (
        f"   {checks['points']} check points: gaps to a fresh text {checks['stream_to_fresh']}, "
        f"same first choice at {checks['same_first_choice']:.3f}"
    )
    yield (
        f"   {checks['exact_points']} of them against fp32: stream {checks['stream_to_exact']}, fresh text "
        f"{checks['fresh_to_exact']}; at the worst {checks['worst_times_fresh_error']:.2f} times the fresh text's gap"
    )


def prefill_lines(row: Row) -> Iterator[str]:
    """Part c."""
    yield (
        f"c. {row['tokens']:,} tokens: {row['parallel_seconds']:.3f} s in parallel; {row['stepped_tokens']:,} one by "
        f"one in {row['stepped_seconds']:.1f} s; {row['times_faster']:.0f} times faster"
    )
    gaps = ", ".join(f"{name} {row[name]}" for name in row if "_to_" in name)
    yield f"   gaps of logits: {gaps}; same first choice at {row['same_first_choice']:.4f}"


def latency_lines(row: Row) -> Iterator[str]:
    """Part d."""
    yield f"d. ms of a token; the paper's figure is {row['paper']} times"
    for found in row["rows"]:
        ways = [name[len("times_faster_than_") :] for name in found if name.startswith("times_faster_than_")]
        beside = ", ".join(
            f"recomputed {way} {found[f'recomputed_{way}_ms']:.3f} ({found[f'times_faster_than_{way}']:.1f} times)"
            for way in ways
        )
        yield f"   {found['model']} B{found['batch']} {found['keys']:,} keys: {found['step_ms']:.3f}; {beside}"


LINES: dict[str, Callable[[Row], Iterator[str]]] = {
    "a": novels_lines,
    "b": millions_lines,
    "c": prefill_lines,
    "d": latency_lines,
}


def claims(parts: Row) -> Iterator[str]:
    """Each claim, whether it holds, and by what."""
    for name, row in parts.items():
        for what, value, bar in BARS[name](row):
            yield f"   {'holds' if value <= bar else 'FAILS'}: {what}: {value:.4g}, at most {bar:.4g}"


def novels_bars(row: Row) -> Iterator[tuple[str, float, float]]:
    """Part a."""
    mine = row["recomputed"]["by_sinks"]["4"]
    yield "perplexity of the stream, times that of recomputed windows", mine["ratio"], 1.01
    with_sinks, without = row["curves"]["4 sinks"], row["curves"]["0 sinks"]
    ratios = [a / b for a, b in zip(with_sinks[1:], without[1:], strict=True)]
    yield "perplexity with 4 sinks, times that without, in the worst bucket", max(ratios), 1.0


def millions_bars(row: Row) -> Iterator[tuple[str, float, float]]:
    """Part b: the same text is read in each round, so rounds have to cost the same."""
    rounds, times = row["perplexity_by_round"], [x["milliseconds_per_token"] for x in row["decoding"]]
    if rounds:
        yield "perplexity of the worst round, times that of the best", max(rounds) / min(rounds), 1.002
    memory = [x or 1 for x in row["allocated_bytes"]]
    yield "most memory after a segment, times the least", max(memory) / min(memory), 1.001
    yield "slowest token, times the median", max(times) / median(times), 1.05
    checks = row["checks"]
    gap, noise = checks["stream_to_exact"]["median"], checks["fresh_to_exact"]["median"]
    yield "median gap of the stream to fp32, times that of a fresh text", gap / noise, 1.1
    yield (
        "worst gap of the stream to fp32, times that of its fresh text",
        checks["worst_times_fresh_error"],
        2.0,
    )


def prefill_bars(row: Row) -> Iterator[tuple[str, float, float]]:
    """Part c."""
    yield "time in parallel, times that one by one", 1 / row["times_faster"], 0.01
    gap, noise = row["stepped_to_exact"]["median"], row["parallel_to_exact"]["median"]
    yield "median gap of steps to fp32, times that of the parallel form", max(gap / noise, noise / gap), 1.1


def latency_bars(row: Row) -> Iterator[tuple[str, float, float]]:
    """Part d."""
    most = max((x["keys"] for x in row["rows"]), default=0)
    for found in row["rows"]:
        ways = [way for way in ("fused", "eager") if f"times_faster_than_{way}" in found]
        for way in ways if found["keys"] == most else []:
            what = f"{found['model']}, {found['batch']} at once, {most:,} keys: a step's time, of {way} recomputation's"
            yield what, 1 / found[f"times_faster_than_{way}"], 1 / row["paper"]


BARS: dict[str, Callable[[Row], Iterator[tuple[str, float, float]]]] = {
    "a": novels_bars,
    "b": millions_bars,
    "c": prefill_bars,
    "d": latency_bars,
}


def extremes(values: list[float], form: str = ".3f") -> str:
    """First, least, most, last."""
    if not values:
        return "none"
    first, least, most, last = (format(x, form) for x in (values[0], min(values), max(values), values[-1]))
    return f"first {first}, least {least}, most {most}, last {last}"


def plot(parts: Row) -> None:
    """What there is of the four parts, into docs/streaming_text.svg."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "attnopt"  # the same picture for the same figures
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10.0, 6.4), layout="constrained")
    if "a" in parts:
        plot_novels(axes[0, 0], parts["a"])
    if "b" in parts:
        plot_millions(axes[0, 1], axes[1, 0], parts["b"])
    if "d" in parts:
        plot_latency(axes[1, 1], parts["d"])
    figure.savefig(PLOT, metadata={"Date": None})
    plt.close(figure)


def plot_novels(axes: Any, row: Row) -> None:
    """Perplexity past the trained length: stable with sinks."""
    longest = len(row["curves"]["full attention"])
    for name, values in row["curves"].items():
        shown = values[: 2 * longest]
        ends = [(n + 1) * row["bucket"] for n in range(len(shown))]
        axes.plot(ends, shown, label=name, color=COLORS.get(name), marker="o", markersize=3)
    axes.axvline(row["trained_length"], color="#cccccc", linewidth=1, label="trained length")
    axes.set_yscale("log")
    axes.set_xlabel("tokens read of Austen's novels")
    axes.set_ylabel(f"perplexity of each {row['bucket']:,}")
    axes.legend(frameon=False, fontsize=8)


def plot_millions(axes: Any, beside: Any, row: Row) -> None:
    """Four million tokens: perplexity; memory, and the time of a token."""
    values = row["perplexity_by_bucket"]
    axes.plot([(n + 1) * row["bucket"] / 1e6 for n in range(len(values))], values, color=COLORS["4 sinks"])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("million tokens streamed")
    axes.set_ylabel(f"perplexity of each {row['bucket']:,}")
    step = row["tokens"] / 1e6 / max(1, len(row["allocated_bytes"]))
    memory = [(x or 0) / 2**20 for x in row["allocated_bytes"]]
    beside.plot([(n + 1) * step for n in range(len(memory))], memory, color="#2a6f97", label="MiB allocated")
    times = [(x["position"] / 1e6, 1e3 * x["milliseconds_per_token"]) for x in row["decoding"]]
    beside.plot(
        *zip(*times, strict=True), color="#e09f3e", marker="o", markersize=3, label="microseconds of a token"
    )
    beside.set_ylim(bottom=0)
    beside.set_xlabel("million tokens streamed")
    beside.legend(frameon=False, fontsize=8)


def plot_latency(axes: Any, row: Row) -> None:
    """How many times faster a step is than a window that is recomputed."""
    for model, batch in sorted({(x["model"], x["batch"]) for x in row["rows"]}):
        found = [x for x in row["rows"] if (x["model"], x["batch"]) == (model, batch)]
        found.sort(key=lambda x: x["keys"])
        keys, times = [x["keys"] for x in found], [x["times_faster_than_fused"] for x in found]
        axes.plot(keys, times, marker="o", markersize=4, label=f"{model}, {batch} at once")
    axes.axhline(row["paper"], color="#cccccc", linewidth=1, label="the paper, Llama-2-7B")
    axes.set_yscale("log")
    axes.set_xlabel("keys seen")
    axes.set_ylabel("times faster than recomputing the window")
    axes.legend(frameon=False, fontsize=8)
