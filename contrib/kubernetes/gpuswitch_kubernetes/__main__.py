"""The agent as a program: in a pod of a DaemonSet, or by hand with --kubeconfig."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence

from gpuswitch_kubernetes.agent import Agent
from gpuswitch_kubernetes.cluster import Cluster, ClusterError, connect
from gpuswitch_kubernetes.decide import Limits
from gpuswitch_kubernetes.service import Service
from gpuswitch_kubernetes.users import Rules

EXAMPLE = """\
example: kubectl annotate node gpu1 gpuswitch.io/desired.0000_01_00_0=vfio
example: python3 -m gpuswitch_kubernetes --node gpu1 --kubeconfig ~/.kube/config --dry-run
"""


def main(words: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # Nothing has to be put in order, whatever is under way.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        cluster = Cluster(connect(options.kubeconfig), options.node)
        if options.clear:
            cluster.clear()
            return 0
        agent = Agent(cluster, Service(options.gpuswitchctl), _rules(options), _limits(options))
        if options.dry_run:
            print(json.dumps(_shown(agent), indent=2))
            return 0
    except ClusterError as error:
        print(f"gpuswitch-agent: {error}", file=sys.stderr)
        return 1
    return agent.run()


def _shown(agent: Agent) -> object:
    """What would be done, for people and programs."""
    facts, decision = agent.look()
    return {
        "node": facts.node["metadata"]["name"],
        "condition": {"status": decision.status, "reason": decision.word, "message": decision.text},
        "tainted": decision.tainted,
        "annotations": decision.annotations,
        "gpus": [
            {
                "address": verdict.address,
                "reason": verdict.word,
                "text": verdict.text,
                "begins": verdict.begins,
                "evicts": [f"{pod['metadata']['namespace']}/{pod['metadata']['name']}" for pod in verdict.evicts],
            }
            for verdict in decision.verdicts
        ],
    }


def _rules(options: argparse.Namespace) -> Rules:
    return Rules(
        options.evict == "all", tuple(options.resource), tuple(options.vfio_resource), tuple(options.evict_label)
    )


def _limits(options: argparse.Namespace) -> Limits:
    return Limits(options.deadline, options.switches, options.window)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "gpuswitch-agent",
        description="Move GPUs of a Kubernetes node as its annotations say.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    node = os.environ.get("NODE_NAME")
    parser.add_argument(
        "--node", default=node, required=node is None, help="the node that this is (default: $NODE_NAME)"
    )
    parser.add_argument("--kubeconfig", metavar="FILE", help="how to reach the API server (default: as a pod does)")
    parser.add_argument("--gpuswitchctl", default="gpuswitchctl", metavar="PROGRAM", help="(default: %(default)s)")
    parser.add_argument(
        "--evict",
        choices=("resources", "all"),
        default="resources",
        help=(
            "pods that use a GPU, or, before it goes to vfio, all but static ones and those of DaemonSets "
            "(default: %(default)s)"
        ),
    )
    parser.add_argument(
        "--resource",
        action="append",
        default=[],
        metavar="NAME",
        help="pods that ask for this use a GPU as well; may be given again; ends in -: all names that begin so",
    )
    parser.add_argument(
        "--vfio-resource",
        action="append",
        default=[],
        metavar="NAME",
        help="pods that ask for this use a GPU that is on vfio, and go before it goes home; may be given again",
    )
    parser.add_argument(
        "--evict-label",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        type=_label,
        help="pods with this label go, too, such as the device plugin; may be given again",
    )
    parser.add_argument(
        "--deadline",
        type=_positive,
        default=Limits.deadline_seconds,
        metavar="SECONDS",
        help="give a desire up that could not be begun for so long (default: %(default)g)",
    )
    parser.add_argument(
        "--switches", type=_count, default=Limits.switches, metavar="N", help="of one GPU ... (default: %(default)s)"
    )
    parser.add_argument(
        "--window",
        type=_positive,
        default=Limits.window_seconds,
        metavar="SECONDS",
        help="... within this time at most (default: %(default)g)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print as JSON what would be done, and change nothing")
    parser.add_argument("--clear", action="store_true", help="take what the agent wrote away from the node, and end")
    return parser


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return int(text)


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no label: write KEY=VALUE")
    return key, value


if __name__ == "__main__":
    sys.exit(main())
