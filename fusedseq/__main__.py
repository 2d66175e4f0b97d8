"""The command `fusedseq`, also `python -m fusedseq`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import fusedseq

COMMANDS = """commands:
  info [--json]   versions, backends, instruction sets, threads, environment variables
  info --kernels  what every Triton kernel needs of a GPU: compiles all of them, which takes minutes at first
  bench ...       time fusedseq beside torch.nn and others; `fusedseq bench --help` says more
"""


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    # What follows `bench` is for its own parsers.
    if arguments[:1] == ["bench"]:
        from fusedseq.bench.cli import main as bench

        return int(bench(arguments[1:]))
    parser = argparse.ArgumentParser(
        prog="fusedseq", epilog=COMMANDS, usage="fusedseq [--version] COMMAND ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"fusedseq {fusedseq.__version__}")
    parser.add_argument("command", choices=["info", "bench"], metavar="COMMAND", help="one of those below")
    parser.add_argument("--json", action="store_true", help="info: as JSON")
    said = "info: compile every Triton kernel for sm_80 and sm_90, which takes no GPU, and report registers and more"
    parser.add_argument("--kernels", action="store_true", help=said)
    options = parser.parse_args(arguments)

    from fusedseq import info

    if options.kernels:
        return info.kernels()
    found = info.collect()
    print(json.dumps(found, indent=2) if options.json else info.render(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
