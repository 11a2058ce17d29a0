#!/usr/bin/env python3
"""Writes grafana/dashboards/*.json. Change a file in boards/, run this, commit both; `make dashboards` checks that they agree."""

import json
import sys
from pathlib import Path

sys.dont_write_bytecode = True
sys.path.insert(0, str(Path(__file__).parent))

from boards import agent, fleet, node, pair  # noqa: E402 (only found by the path above)

DASHBOARDS = Path(__file__).parent / "dashboards"


def boards():
    """Every dashboard, by the name of its file."""
    return {"fleet": fleet.board(), "pair": pair.board(), "node": node.board(), "agent": agent.board()}


def text(board):
    return json.dumps(board.json, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    for name, board in boards().items():
        (DASHBOARDS / f"{name}.json").write_text(text(board), encoding="utf-8")
