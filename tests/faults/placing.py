"""Says where things run on a cluster; a program: ``placing.py ADDRESS``.

Prints a line of JSON, then another one whenever it is sent a line: by resource of the node, where
plans are timed, and where the members of a crew are.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

import ray

from dsm_tune.searching.crew import Cluster, Crew, connected, run_alone, timing_node

WORKERS = 2


def node() -> str:
    return str(ray.get_runtime_context().get_node_id())


def nothing() -> None: ...


def here(made: Any, item: Any) -> str:
    return node()


def main() -> None:
    cluster = Cluster(sys.argv[1], WORKERS)
    # Ray tells of nodes that have left on standard output.
    with contextlib.redirect_stdout(sys.stderr), connected(cluster):
        crew, timed = Crew(nothing, cluster), ""
        while True:
            names = {n["NodeID"]: sorted({*n["Resources"]} & {*sys.argv[2:]}) for n in ray.nodes()}
            crew.members()
            for index in range(WORKERS):
                crew.settle(index)
            timed, cpus = timing_node(before=timed) or ("", 1)
            found = {
                "timed": [names[run_alone(node, cpus=cpus, node=timed)] for _ in range(4)],
                "crew": sorted(names[one] for one in crew.map(here, range(2 * WORKERS))),
            }
            print(json.dumps(found), file=sys.__stdout__, flush=True)
            if not sys.stdin.readline():
                return


if __name__ == "__main__":
    main()
