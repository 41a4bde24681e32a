"""The page as a server of one process."""

from __future__ import annotations

import logging
import signal
import threading

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..engine.predictor import Predictor
from .page import PAGE_POLICY, STYLE, build_page, gr
from .viewing import ExampleImages, StageViewer

__all__ = ["serve"]

logger = logging.getLogger(__name__)

_SESSIONS = 50  # whose pictures are kept: about 10 MB each
_WAITING = 64  # requests


def serve(
    predictor: Predictor,
    *,
    subtitle: str,
    host: str,
    port: int,
    root_path: str = "",
    max_upload: int,
) -> None:
    """Show a detector until SIGINT or SIGTERM.

    Args:
        predictor: as ``build_inspected_detector`` makes it.
        subtitle: below the heading.
        host, port: to listen at.
        root_path: where a proxy shows the page.
        max_upload: bytes.

    Raises:
        OSError: the address cannot be listened at.
    """
    spec = predictor.metadata.get("shapes_spec", None)
    page = build_page(
        StageViewer(predictor),
        ExampleImages(spec) if spec is not None else None,
        title=type(predictor.model).__name__,
        subtitle=subtitle,
        max_upload=max_upload,
    )
    page.queue(max_size=_WAITING, default_concurrency_limit=1)
    # Fonts of the browser's machine: the theme's own would be fetched.
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    try:
        page.launch(
            server_name=host,
            server_port=port,
            root_path=root_path or None,
            share=False,
            inbrowser=False,
            prevent_thread_lock=True,
            quiet=True,
            max_file_size=max_upload,
            state_session_capacity=_SESSIONS,
            footer_links=[],
            ssr_mode=False,
            enable_monitoring=False,
            run_history=False,
            theme=gr.themes.Soft(primary_hue="blue", **fonts),
            css=STYLE,
            app_kwargs={"middleware": [Middleware(_PagePolicy)]},
        )
    except OSError as error:
        raise OSError(f"cannot listen at {host}:{port}: choose another --port or --host") from error
    logger.info("The page is at http://%s:%d%s", host, port, root_path)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    page.close(verbose=False)


class _PagePolicy:
    """Adds the page's security policy to every answer."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", PAGE_POLICY.encode())
                message["headers"] = [*message.get("headers", []), policy]
            await send(message)

        await self.app(scope, receive, send_with_policy if scope["type"] == "http" else send)
