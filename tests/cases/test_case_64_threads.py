"""Rules and kernels hold no state: https://github.com/pytorch/pytorch/issues/118260, 136833, 111569."""

import copy
from concurrent.futures import ThreadPoolExecutor

import torch
from graphs import aten_graph
from spellings import SPELLINGS

from attnopt.backend import rewrite_graph
from attnopt.options import Options

PROGRAMS = SPELLINGS[::6]


def verdicts(modules: list[torch.fx.GraphModule]) -> list[str]:
    reports = [rewrite_graph(copy.deepcopy(module), Options(), gradient=False)[0] for module in modules]
    return [f"{site.verdict} {site.spec} {report.warnings}" for report in reports for site in report.sites]


def test_graphs_may_be_rewritten_in_many_threads() -> None:
    modules = [aten_graph(s.attend, *s.inputs()) for s in PROGRAMS]
    alone = verdicts(modules)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(verdicts, [modules] * 4))
    assert together == [alone] * 4
