"""The page as a server of one process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence

from starlette.applications import Starlette

from ..engine.predictor import Predictor
from .guard import Guard, ServedNames
from .page import PAGE_POLICY, STYLE, Page, gr
from .storage import UploadFolder
from .viewing import ExampleImages, StageViewer

__all__ = ["serve"]

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 30.0
"""Between two looks at the files."""
END_SECONDS = 20.0
"""That whoever waits for an answer is given when the server is told to end."""

_SESSIONS = 50  # whose pictures are kept: about 10 MB each
_WAITING = 64  # requests


def serve(
    predictor: Predictor,
    *,
    subtitle: str,
    host: str,
    port: int,
    folder: str,
    root_path: str = "",
    allowed_hosts: Sequence[str] = (),
    max_upload: int,
) -> bool:
    """Show a detector until SIGINT or SIGTERM, and answer what has been asked until then.

    Args:
        predictor: as ``build_inspected_detector`` makes it.
        subtitle: below the heading.
        host, port: to listen at.
        folder: in which Gradio keeps files.
        root_path: where a proxy shows the page.
        allowed_hosts: further names of the page, besides those of ``host``.
        max_upload: bytes.

    Returns:
        whether all work is done. If not, threads still compute for users who have waited for
        ``END_SECONDS``, and the process must not end as Python's do: PyTorch would abort it.

    Raises:
        OSError: the address cannot be listened at.
    """
    spec = predictor.metadata.get("shapes_spec", None)
    page = Page(
        StageViewer(predictor),
        ExampleImages(spec) if spec is not None else None,
        max_upload=max_upload,
    )
    blocks = page.build(type(predictor.model).__name__, subtitle)
    blocks.queue(max_size=_WAITING, default_concurrency_limit=1)
    door = _Door(ServedNames(host, allowed_hosts), UploadFolder(folder), max_upload)
    # Fonts of the browser's machine: the theme's own would be fetched.
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    try:
        with _patient_start():
            blocks.launch(
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
                num_workers=0,  # other processes would answer besides this one
                app_kwargs={"lifespan": door.open},
                _frontend=False,  # a second look at whether it answers, of three seconds
            )
    except OSError as error:
        raise OSError(f"cannot listen at {host}:{port}: choose another --port or --host") from error
    logger.info("The page is at http://%s:%d%s", host, port, root_path)
    signals = _Signals()
    signals.wait()
    door.guard.end()
    deadline = time.monotonic() + END_SECONDS
    while (door.guard.unanswered or page.running) and time.monotonic() < deadline:
        if signals.wait_for_another(0.05):
            break
    blocks.close(verbose=False)
    return not page.running


@contextlib.contextmanager
def _patient_start() -> Iterator[None]:
    """While this lasts, Gradio waits for its server; by itself it gives up after five seconds."""
    from gradio import http_server

    before = http_server.Server.run_in_thread

    def run_in_thread(server: http_server.Server) -> None:
        if server.reloader:  # which Gradio starts, too
            return before(server)
        server.thread = threading.Thread(target=server.run, daemon=True)
        server.thread.start()
        while not server.started:
            if not server.thread.is_alive():
                raise http_server.ServerFailedToStartError("the server has ended")
            time.sleep(0.01)

    http_server.Server.run_in_thread = run_in_thread
    try:
        yield
    finally:
        http_server.Server.run_in_thread = before


class _Door:
    """The guard, put around Gradio's application when that starts, and the sweeping of files."""

    guard: Guard

    def __init__(self, names: ServedNames, folder: UploadFolder, max_upload: int):
        self._names = names
        self._folder = folder
        self._max_upload = max_upload

    @contextlib.asynccontextmanager
    async def open(self, app: Starlette) -> AsyncIterator[None]:
        """Before the first request: as a middleware, it would be within some of Gradio's."""
        if app.middleware_stack is None:
            raise RuntimeError("this version of Starlette starts before it has built its stack")
        self.guard = app.middleware_stack = Guard(
            app.middleware_stack,
            names=self._names,
            folder=self._folder,
            max_upload=self._max_upload,
            policy=PAGE_POLICY,
        )
        sweeper = asyncio.create_task(self._sweep())
        try:
            yield
        finally:
            sweeper.cancel()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                await asyncio.to_thread(self._folder.sweep)
            except Exception:
                logger.exception("old files could not be deleted")


class _Signals:
    """SIGINT and SIGTERM: the first asks for the end, another one for haste."""

    def __init__(self) -> None:
        self._first = threading.Event()
        self._second = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, *_: object) -> None:
        (self._second if self._first.is_set() else self._first).set()

    def wait(self) -> None:
        # Again and again: where another thread has been given the signal, as the system may choose
        # while a process is stopped, this one is not woken by it.
        while not self._first.wait(0.5):
            pass

    def wait_for_another(self, seconds: float) -> bool:
        return self._second.wait(seconds)
