"""Serve a detector over HTTP; requests that come together go through the network together.

    python examples/serve.py --config-file output/mine/config.yaml --port 8000
    curl --data-binary @picture.jpg http://127.0.0.1:8000

It answers in JSON, with COCO's results. Pure standard library: threads read requests and decode
pictures, and one thread runs the network, on what waits, up to --batch-size pictures.
"""

import argparse
import io
import json
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from detectron2.structures import Instances
from PIL import ImageOps

from detection_toolkit.data.images import open_picture
from detection_toolkit.engine import Predictor, shipped_config
from detection_toolkit.engine.detections import coco_results
from detection_toolkit.export import OnnxPredictor
from detection_toolkit.visualization import select_confident

LARGEST_REQUEST = 32 * 2**20  # bytes
LARGEST_PICTURE = 50_000_000  # pixels


class Batcher:
    """Lets one thread detect in what others ask for at the same time."""

    def __init__(self, predictor: Predictor | OnnxPredictor, batch_size: int, seconds: float):
        """
        Args:
            predictor: is used by the thread alone.
            batch_size: at most so many pictures together.
            seconds: that the first picture of a batch waits for others.
        """
        self.predictor, self.batch_size, self.seconds = predictor, batch_size, seconds
        self.waiting: queue.SimpleQueue[tuple[np.ndarray, Future]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def detect(self, picture: np.ndarray) -> Instances:
        """Of a BGR picture (H, W, 3), once its batch is done; raises what the predictor raises."""
        future: Future = Future()
        self.waiting.put((picture, future))
        return future.result()

    def _work(self) -> None:
        while True:
            batch = [self.waiting.get()]
            end = time.monotonic() + self.seconds
            while len(batch) < self.batch_size:
                try:
                    batch.append(self.waiting.get(timeout=max(0.0, end - time.monotonic())))
                except queue.Empty:
                    break
            try:
                self._answer(batch)
            except Exception:
                for one in batch:  # the others of the batch are not to fail with one
                    try:
                        self._answer([one])
                    except Exception as error:
                        one[1].set_exception(error)

    def _answer(self, batch: Sequence[tuple[np.ndarray, Future]]) -> None:
        pictures = [picture for picture, _ in batch]
        found = list(self.predictor.predict(pictures, batch_size=len(batch)))
        for (_, future), instances in zip(batch, found):
            future.set_result(instances)


def decode(body: bytes) -> np.ndarray:
    """BGR picture (H, W, 3) of an encoded one.

    Raises:
        ValueError, OSError: it is none, or too large.
    """
    with open_picture(io.BytesIO(body)) as image:
        if image.width * image.height > LARGEST_PICTURE:
            raise ValueError(f"{image.width}x{image.height} pixels are too many")
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))[:, :, ::-1]


def make_server(
    predictor: Predictor | OnnxPredictor,
    address: tuple[str, int],
    *,
    batch_size: int = 8,
    seconds: float = 0.01,
    threshold: float = 0.3,
) -> ThreadingHTTPServer:
    """A server whose ``serve_forever`` answers; see :class:`Batcher` for the arguments."""
    batcher = Batcher(predictor, batch_size, seconds)
    names = predictor.metadata.get("thing_classes", None)

    class Handler(BaseHTTPRequestHandler):
        timeout = 30

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > LARGEST_REQUEST:
                self._send(413, {"error": f"send up to {LARGEST_REQUEST} bytes, with their number"})
                return
            try:
                instances = batcher.detect(decode(self.rfile.read(int(length))))
            except (ValueError, OSError) as error:
                self._send(400, {"error": str(error)})
                return
            kept = select_confident(instances, threshold)
            self._send(200, coco_results(kept, 0, names))

        def _send(self, status: int, answer: object) -> None:
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return ThreadingHTTPServer(address, Handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", default=shipped_config(), help="config or run's folder")
    parser.add_argument("--onnx", help="exported detector in place of the config")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    chosen = OnnxPredictor(args.onnx) if args.onnx else Predictor.from_config(args.config_file)
    server = make_server(chosen, (args.host, args.port), batch_size=args.batch_size)
    print(f"http://{args.host}:{server.server_port}", flush=True)
    server.serve_forever()
