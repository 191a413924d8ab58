"""Loads a saved program in a process of its own and answers the questions that the original was asked.

    python examples/reload.py PROGRAM.pt2 QUESTION.pt ANSWERS.pt

QUESTION.pt holds `ids` (1, S), `prompt` and `count`; ANSWERS.pt gets the fields of `measuring.Answers`.
"""

import sys
from dataclasses import asdict

import torch
from measuring import answers
from rich.console import Console
from rich.progress import track

import attnopt  # noqa: F401 - registers the operators that a rewritten program calls


def main(program: str, question: str, out: str) -> None:
    """Loads, asks, saves."""
    model = torch.export.load(program).module()
    asked = torch.load(question, weights_only=True)
    console = Console(stderr=True)
    said = answers(
        model,
        asked["ids"],
        prompt=asked["prompt"],
        count=asked["count"],
        progress=lambda steps: track(
            steps, "  continuing, in a fresh process", console=console, transient=True
        ),
    )
    torch.save(asdict(said), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
