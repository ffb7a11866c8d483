"""What a run did: in the terminal, as one HTML file, or live.

    python -m launch.report runs/quickstart                    # a view in the terminal, and runs/quickstart/report.html
    python -m launch.report runs/a runs/b --output both.html   # two runs in one file, side by side
    python -m launch.report --serve runs/ --port 8008          # every run below runs/, while it still goes on

The server answers on loopback unless `--host` says otherwise; it shows what models wrote to whoever can reach it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from launch.command import Parser
from open_agentrl_jax.telemetry import report
from open_agentrl_jax.telemetry.screen import curve
from open_agentrl_jax.types import UserError

SHOWN = ("accuracy/mean", "reward/mean", "tool_calls/mean", "tool_success/mean", "response_length/mean")
CURVES = (
    "reward/mean",
    "accuracy/mean",
    "actor/entropy",
    "actor/pg_clipfrac",
    "response_length/mean",
    "tool_calls/mean",
)


def view(directory: Path, console: Console) -> None:
    """Prints a run: held-out figures, curves as text, how episodes ended, the problems it fails most."""
    metrics = report.read_metrics(directory)
    table = report.Table(directory / "trajectories.jsonl")
    table.update()
    steps = ", ".join(f"{len(columns['step'])} {phase}" for phase, columns in metrics.items())
    console.print(f"[bold]{escape(str(directory))}[/bold]  {steps} steps, {len(table)} trajectories")
    evals = metrics.get("eval", {})
    if evals:
        grid = Grid("held-out problems", f"step {evals['step'][0]}", f"step {evals['step'][-1]}", title_justify="left")
        for name in SHOWN:
            if name in evals:
                grid.add_row(name, *(_figure(evals[name][i]) for i in (0, -1)))
        console.print(grid)
    curves = Grid("by step", "", box=None, show_header=False)
    curves.columns[1].no_wrap = True
    for phase, names in (("sft", ("loss",)), ("rl", CURVES)):
        for name in names:
            values = [v for v in metrics.get(phase, {}).get(name, ()) if v is not None]
            if values:
                curves.add_row(f"{phase} {name}", curve(values, width=36))
    if curves.row_count:
        console.print(curves)
    if len(table):
        c, last = table.columns, max(table.columns["step"])
        stops = Counter(c["stop"])
        console.print("stops: " + ", ".join(f"{escape(stop)} {n}" for stop, n in stops.most_common()))
        worst = [
            (sum(c["accuracy"][first:end]) / (end - first), end - first, c["phase"][first], c["problem"][first])
            for first, end in table.groups()
            if c["step"][first] == last
        ]
        for accuracy, n, phase, problem in sorted(worst)[:5]:
            console.print(
                f"  {phase} {last}: {accuracy:.2f} of {n} right: {problem[:80]}", markup=False, highlight=False
            )


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


class Runs:
    """The runs below a folder, each with its index, which follows the growing file."""

    def __init__(self, root: Path):
        self.root = root
        self._tables: dict[str, report.Table] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Newest first."""
        found = [self.root] if (self.root / "metrics.jsonl").exists() else []
        found += [path.parent for path in self.root.glob("*/metrics.jsonl")]
        found.sort(key=lambda path: (path / "metrics.jsonl").stat().st_mtime, reverse=True)
        return ["." if path == self.root else path.name for path in found]

    def part(self, name: str, part: str) -> bytes:
        """What the page asks for: head, index, vocabulary or chunk<number>.

        Raises:
            KeyError: there is none of that name.
        """
        if name not in self.names():
            raise KeyError(name)
        directory = (self.root / name).absolute()
        if part == "vocabulary":
            return report.encode(report.read_vocabulary(directory))
        with self._lock:
            table = self._tables.setdefault(name, report.Table(directory / "trajectories.jsonl"))
            table.update()
            sizes = [b - a for a, b in zip(table.starts[:-1], table.starts[1:], strict=True)]
            bounds = report.chunks(sizes)
            if part == "head":
                return report.encode(report.head(directory, table, bounds))
            if part == "index":
                return report.encode(table.columns)
            if part.startswith("chunk") and part[5:].isdigit() and int(part[5:]) < len(bounds):
                return table.read(*bounds[int(part[5:])])
        raise KeyError(part)


def make_server(root: Path, host: str, port: int) -> ThreadingHTTPServer:
    """The server of all runs below `root`; `serve_forever` starts it."""
    runs = Runs(root)
    page = report.page("", served=True).encode()

    class Handler(BaseHTTPRequestHandler):
        """GET / is the page, GET /data the names, GET /data/<run>/<part> a part."""

        def do_GET(self) -> None:
            """Answers."""
            path = [unquote(piece) for piece in self.path.split("?")[0].strip("/").split("/")]
            try:
                if path == [""]:
                    return self._answer(200, page, "text/html; charset=utf-8")
                if path == ["data"]:
                    return self._answer(200, json.dumps(runs.names()).encode(), "application/json")
                if len(path) == 3 and path[0] == "data":
                    return self._answer(200, runs.part(path[1], path[2]), "application/json")
                self._answer(404, b"there is no such page", "text/plain")
            except KeyError as error:
                self._answer(404, f"there is no {error}".encode(), "text/plain; charset=utf-8")
            except UserError as error:
                self._answer(500, str(error).encode(), "text/plain; charset=utf-8")

        def _answer(self, status: int, body: bytes, kind: str) -> None:
            packed = "gzip" in self.headers.get("Accept-Encoding", "") and len(body) > 1000
            body = gzip.compress(body, 3) if packed else body
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Cache-Control", "no-store")
            if packed:
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    return ThreadingHTTPServer((host, port), Handler)


def main() -> int:
    """The command."""
    parser = Parser(prog="launch.report", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="run directories")
    parser.add_argument("--output", type=Path, help="the file to write; default: report.html in the first run")
    parser.add_argument("--serve", type=Path, metavar="DIR", help="serve the runs below DIR")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8008)
    options = parser.parse_args()
    console = Console(soft_wrap=True)
    try:
        if options.serve:
            if not options.serve.is_dir():
                raise UserError(f"--serve={options.serve}: not a folder; give the one that holds the runs")
            try:
                server = make_server(options.serve, options.host, options.port)
            except (OSError, OverflowError) as error:  # taken, or no number of a port
                why = getattr(error, "strerror", "") or error
                raise UserError(f"--port {options.port} at {options.host}: {why}; give another port") from error
            print(f"http://{options.host}:{server.server_address[1]}  (Ctrl-C ends it)", flush=True)
            server.serve_forever()
        elif not options.runs:
            raise UserError("no run given; e.g. python -m launch.report runs/quickstart")
        for directory in options.runs:
            view(directory, console)
        path = report.write_report(options.runs, options.output)
        console.print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB); open it in a browser", soft_wrap=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
