"""Shows what a run did: in the terminal, as one HTML file, or live.

    python -m launch.report runs/quickstart                    # the terminal, and runs/quickstart/report.html
    python -m launch.report runs/a runs/b --output both.html   # two runs in one file, side by side
    python -m launch.report --serve runs/ --port 8008          # all runs below runs/, while they train

The server listens on loopback. Other addresses (--host) need REPORT_TOKEN in the environment: whoever can reach the
server can read every conversation.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from launch.command import Parser, one_line_errors
from open_agentrl_jax.telemetry import overview, report, server
from open_agentrl_jax.text import printable
from open_agentrl_jax.types import UserError


def main() -> int:
    """The command."""
    parser = Parser(prog="launch.report", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="run directories")
    parser.add_argument("--output", type=Path, help="the file to write; default: report.html in the first run")
    parser.add_argument("--serve", type=Path, metavar="DIR", help="serve the runs below DIR")
    parser.add_argument("--host", default="127.0.0.1", help="with --serve; beyond loopback REPORT_TOKEN must be set")
    parser.add_argument("--port", type=int, default=8008, help="with --serve; 0: any free one")
    options = parser.parse_args()
    with one_line_errors():
        if options.serve:
            return serve(options)
        if not options.runs:
            raise UserError("no run given; e.g. python -m launch.report runs/quickstart")
        console = Console(soft_wrap=True)
        for directory in options.runs:
            overview.show(directory, console)
        path = report.write_report(options.runs, options.output)
        print(printable(f"{path} ({path.stat().st_size / 2**20:.1f} MiB); open it in a browser"))
    return 0


def serve(options: argparse.Namespace) -> int:
    """Serves until Ctrl-C."""
    if not options.serve.is_dir():
        raise UserError(f"--serve={options.serve}: not a folder; give the one that holds the runs")
    token = os.environ.get("REPORT_TOKEN", "")
    with server.make_server(options.serve, options.host, options.port, token=token) as serving:
        login = "/?token=$REPORT_TOKEN" if token else ""
        print(f"http://{options.host}:{serving.server_address[1]}{login}  (Ctrl-C ends it)", flush=True)
        try:
            serving.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
