"""Show a detector in the browser: detections after every stage, and how its queries get there.

Without --config-file it is the detector of the built-in shapes. The page needs no network and is
reachable from this machine only, unless --host says otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..engine import user_errors
from ..engine.arguments import add_config_arguments, parse_arguments
from ..engine.parsers import Parser, make_parser
from ..errors import UserError
from .guard import is_loopback

logger = logging.getLogger("detection_toolkit.web")

EXAMPLES = """
PROG
PROG --config-file output/mine/config.yaml --port 8000
"""
MAX_UPLOAD = 20 * 2**20  # bytes


def get_parser(prog: str | None = None) -> Parser:
    """The command line."""
    parser = make_parser(__doc__, EXAMPLES, prog or "python -m detection_toolkit.web")
    add_config_arguments(parser)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=7860, help="(default: %(default)s)")
    parser.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name of the page, of a proxy or in the network's DNS; may be repeated",
    )
    parser.add_argument(
        "--root-path",
        default="",
        metavar="PATH",
        help="where a proxy in front shows the page, for example /detector",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    """Serve the page until the process is told to end.

    Does not return if a request is still in work then.
    """
    if not 1 <= args.port <= 65535:
        raise UserError(f"--port {args.port}: must be between 1 and 65535")
    from ..engine.inspection import build_inspected_detector
    from ..memory import keep_memory_on_cpu

    with tempfile.TemporaryDirectory(prefix="detection_toolkit-web-") as folder:
        # Gradio takes these from the environment only. Its files are gone with the process.
        os.environ["GRADIO_TEMP_DIR"] = folder
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        with _without_proxies():
            from .serving import serve  # Gradio, which is optional, and slow to import

        overrides = [f"train.device={args.device}", *args.opts]
        predictor = build_inspected_detector(
            args.config_file, overrides, trust_config=args.trust_config
        )
        keep_memory_on_cpu(predictor.model)
        weights = Path(predictor.cfg.train.init_checkpoint or "no weights").name
        if not is_loopback(args.host):
            logger.warning("Whoever reaches %s can use the page: it asks no password", args.host)
        with _without_proxies():
            done = serve(
                predictor,
                subtitle=f"{args.config_file}, {weights}, {predictor.model.device.type.upper()}",
                host=args.host,
                port=args.port,
                folder=folder,
                root_path=args.root_path,
                allowed_hosts=args.allowed_host,
                max_upload=MAX_UPLOAD,
            )
    if not done:
        logger.warning("A request that still was in work is given up")
        logging.shutdown()
        sys.stdout.flush()
        # Python's own end would take the interpreter away below PyTorch's threads: an abort.
        os._exit(0)


@contextlib.contextmanager
def _without_proxies() -> Iterator[None]:
    """Hide the proxies of the environment from Gradio, which would ask them for its own page.

    Weights are fetched through them, so they are hidden for a while only.
    """
    names = [n for n in os.environ if n.lower() in ("http_proxy", "https_proxy", "all_proxy")]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


def main(argv: Sequence[str] | None = None, *, prog: str | None = None) -> int:
    """Returns the exit code."""
    args = parse_arguments(get_parser(prog), argv)
    from ..engine.logs import set_up_console

    set_up_console("detection_toolkit")
    with user_errors():
        run(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
