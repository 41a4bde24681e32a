#!/usr/bin/env python3
"""Many faults, and a table of what became of them: ``make soak``.

    PYTHONPATH=tests python tests/faults/soak.py --kills 100 --documents 10000

"Survived" are the runs that ended, after --resume, with the weights of an undisturbed run to the
last bit, and the inputs that were used or refused in words. Exit code 1: something was lost.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from coco_files import make_document, write_dataset
from fault_runs import (
    data_overrides,
    difference,
    dying_at_rename,
    dying_in_step,
    dying_in_write,
    fork,
    fork_two,
    run_forked,
    run_overrides,
    start,
    wait,
)
from fuzzing import (
    IMAGES,
    checkpoint,
    damaged,
    documents,
    try_checkpoint,
    try_document,
    try_image,
)
from hypothesis import HealthCheck, Phase, given, seed, settings
from tabulate import tabulate

from detection_toolkit.engine.folder_lock import LOCK_NAME
from detection_toolkit.engine.interruption import EXIT_INTERRUPTED

STEPS = 40
KILLED = -9
HANGS = 124  # as of timeout(1)


@dataclass
class Row:
    """A line of the table."""

    fault: str
    tried: int = 0
    lost: int = 0
    seconds: float = 0.0
    note: str = ""


class Soak:
    """The undisturbed runs, and the runs that faults happen to."""

    def __init__(self, folder: Path, generator: random.Random):
        self.folder = folder
        self.random = generator
        self.rows: list[Row] = []
        document = make_document(num_images=7)
        for image in document["images"][::2]:
            image["height"], image["width"] = 96, 64
        self.data = data_overrides(*write_dataset(folder / "data", document))
        self.number = 0
        # What an undisturbed run takes, from its start; faults at random times are spread over it.
        self.seconds = 0.0

    def random_time(self) -> float:
        """Seconds after the start of a run."""
        return self.random.uniform(0.1, 1.0) * self.seconds

    def overrides(self, output: Path, *further: str) -> list[str]:
        """Of a run with all that outlives an interruption."""
        options = [f"train.max_iter={STEPS}", "train.eval_period=15", *further]
        return run_overrides(output, self.data, *options)

    def output(self) -> Path:
        """A new folder for a run."""
        self.number += 1
        folder = self.folder / f"run{self.number}"
        folder.mkdir()
        return folder

    @contextmanager
    def row(self, fault: str) -> Iterator[Row]:
        """Count, and tell how it went."""
        row = Row(fault)
        self.rows.append(row)
        begin = time.monotonic()
        yield row
        row.seconds = time.monotonic() - begin
        print(f"{fault}: {row.tried} tried, {row.lost} lost, {row.seconds:.0f} s", flush=True)

    def lose(self, row: Row, count: int, why: str, output: Path) -> None:
        """A run that is not what it should be; its folder is named."""
        row.lost += max(1, count)
        row.note = f"{why} ({output})"
        print(f"LOST: {why}; see {output / 'console.txt'}", flush=True)

    def compare(self, row: Row, faults: int, reference: Path, output: Path) -> None:
        """A run that has been resumed to its end, with an undisturbed one."""
        for name in ("model_final", "model_best"):
            found = difference(reference, output, name)
            if found:
                return self.lose(row, faults, f"{name}: {found}", output)
        records = [json.loads((f / "model_best.json").read_text()) for f in (reference, output)]
        if records[0] != records[1]:
            self.lose(row, faults, f"best value: {records}", output)

    def undisturbed(self) -> Path:
        """A run that nothing happens to."""
        output, begin = self.output(), time.monotonic()
        code = run_forked(self.overrides(output), log=output / "console.txt")
        self.seconds = time.monotonic() - begin
        if code:
            sys.exit(f"the undisturbed run ends with code {code}: see {output / 'console.txt'}")
        return output

    def disturb(
        self,
        fault: str,
        count: int,
        reference: Path,
        attempt: Callable[[list[str], Path], int],
        expected: int,
    ) -> None:
        """Start runs with ``--resume`` that ``attempt`` disturbs, until so many faults happened.

        Args:
            fault, count: of the row.
            reference: an undisturbed run.
            attempt: starts one, and returns its exit code.
            expected: exit code where the fault has happened; 0 is a run that was quicker.
        """
        with self.row(fault) as row:
            trained = 0
            while row.tried < count:
                output, faults, code = self.output(), 0, expected
                while code == expected and row.tried < count:
                    workers = self.random.choice([0, 0, 0, 2])
                    options = self.overrides(output, f"dataloader.train.num_workers={workers}")
                    begun = _times_begun(output)
                    try:
                        code = attempt(options, output)
                    except TimeoutError:
                        code = HANGS
                    row.tried += code != 0  # another code than expected is lost below
                    faults += code == expected
                    trained += code == expected and _times_begun(output) > begun
                if code == expected:
                    log = output / "console.txt"
                    code = run_forked(["--resume", *self.overrides(output)], log=log)
                if code:
                    self.lose(row, faults, f"exit code {code}", output)
                else:
                    self.compare(row, faults, reference, output)
            row.note = row.note or f"{trained} after training had begun"

    def kill(self, count: int, reference: Path) -> None:
        """SIGKILL at every kind of moment."""
        rng = self.random

        def at_random_times(options: list[str], output: Path) -> int:
            child = fork(["--resume", *options], log=output / "console.txt")
            return wait(child, kill_after=self.random_time())

        def sabotaged(make: Callable[[], Callable[[], None]]) -> Callable[[list[str], Path], int]:
            def attempt(options: list[str], output: Path) -> int:
                arguments = ["--resume", *options]
                return run_forked(arguments, sabotage=make(), log=output / "console.txt")

            return attempt

        quarter = count // 4
        kinds = [
            ("SIGKILL at a random time", count - 3 * quarter, at_random_times),
            ("SIGKILL in a step", quarter, sabotaged(lambda: dying_in_step(rng.randint(1, 9)))),
            (
                "SIGKILL in the writing of a checkpoint",
                quarter,
                sabotaged(lambda: dying_in_write(rng.randint(1, 3), share=rng.random())),
            ),
            (
                "SIGKILL before or after a renaming",
                quarter,
                sabotaged(lambda: dying_at_rename(rng.randint(1, 6), after=rng.random() < 0.5)),
            ),
        ]
        for fault, number, attempt in kinds:
            self.disturb(fault, number, reference, attempt, KILLED)

    def kill_command(self, count: int, reference: Path) -> None:
        """SIGKILL to `python train_net.py` itself, imports and all."""

        def attempt(options: list[str], output: Path) -> int:
            process = start("--resume", *options)
            try:
                process.wait(self.random.uniform(2.0, 9.0))
            except subprocess.TimeoutExpired:
                process.kill()
            (output / "console.txt").open("a").write(process.communicate()[0])
            return process.returncode

        fault = "SIGKILL to the command, at a random time"
        self.disturb(fault, count, reference, attempt, KILLED)

    def ask(self, count: int, reference: Path) -> None:
        """SIGTERM and SIGUSR1 to `python train_net.py` with loader processes, real ends and all.

        Every other one is sent to the whole process group, as schedulers do. Most come in training;
        while the interpreter starts or ends, they end the process in the system's way.
        """
        rng = self.random

        def attempt(options: list[str], output: Path) -> int:
            log = output / "console.txt"
            number = rng.choice([signal.SIGTERM, signal.SIGUSR1])
            workers = f"dataloader.train.num_workers={rng.randint(1, 2)}"
            begun, begin = _times_begun(output), time.monotonic()
            process = start("--resume", *options, workers, "dataloader.test.num_workers=1", log=log)
            if rng.random() < 0.75:
                while process.poll() is None and _times_begun(output) == begun:
                    time.sleep(0.02)
                begin = time.monotonic()
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, begin + self.random_time() - time.monotonic()))
            if process.poll() is None:
                send = rng.choice([os.kill, os.killpg])
                send(process.pid, number)
            try:
                code = process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                return HANGS
            outside = _times_begun(output) == begun or (output / "model_final.pth").is_file()
            return EXIT_INTERRUPTED if code == -number and outside else code

        fault = "SIGTERM or SIGUSR1 to the command with loader processes"
        self.disturb(fault, count, reference, attempt, EXIT_INTERRUPTED)

    def kill_one_of_two(self, count: int) -> None:
        """One process of two; the other must end within a minute."""
        whole = self.output()
        log = whole / "console.txt"
        begin = time.monotonic()
        codes = [wait(child) for child in fork_two(self.overrides(whole), log=log)]
        seconds = time.monotonic() - begin
        if any(codes):
            sys.exit(f"the undisturbed run of two processes ends with codes {codes}: see {log}")
        with self.row("SIGKILL to one of two processes (Gloo)") as row:
            slowest = 0.0
            while row.tried < count:
                output, faults, codes = self.output(), 0, [KILLED]
                log = output / "console.txt"
                while any(codes) and row.tried < count:
                    children = fork_two(["--resume", *self.overrides(output)], log=log)
                    victim = self.random.randrange(2)
                    after = self.random.uniform(0.1, 1.0) * seconds
                    code = wait(children[victim], kill_after=after)
                    begin = time.monotonic()
                    try:
                        codes = [code, wait(children[1 - victim], timeout=60.0)]
                    except TimeoutError:
                        codes = [HANGS]
                    if codes[0] != KILLED:  # it was quicker, or is lost
                        row.tried += any(codes)
                        break
                    slowest = max(slowest, time.monotonic() - begin)
                    row.tried += 1
                    faults += 1
                if KILLED in codes:
                    children = fork_two(["--resume", *self.overrides(output)], log=log)
                    codes = [wait(child) for child in children]
                if any(codes):
                    self.lose(row, faults, f"exit codes {codes}", output)
                else:
                    self.compare(row, faults, whole, output)
            row.note = row.note or f"the other ended within {slowest:.1f} s"

    def damage(self, count: int, reference: Path) -> None:
        """The newest checkpoint of a run that was killed."""
        rng = self.random
        with self.row("newest checkpoint damaged") as row:
            for _ in range(count):
                output = self.output()
                log = output / "console.txt"
                death = dying_in_step(rng.randint(8, 30))
                run_forked(self.overrides(output), sabotage=death, log=log)
                newest = output / (output / "last_checkpoint").read_text()
                content = newest.read_bytes()
                changed = bytearray(content)
                for _ in range(rng.randint(1, 20)):
                    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
                cut = content[: rng.randrange(len(content))]
                newest.write_bytes(rng.choice([bytes(changed), cut, bytes(len(content)), b""]))
                row.tried += 1
                code = run_forked(["--resume", *self.overrides(output)], log=log)
                if code:
                    self.lose(row, 1, f"exit code {code}", output)
                else:
                    self.compare(row, 1, reference, output)

    def fill_disk(self, count: int, reference: Path) -> None:
        """A file system too small for the run, which then gets room."""
        size = max(p.stat().st_size for p in reference.glob("model_*.pth")) // 1024
        with self.row("disk full") as row:
            for _ in range(count):
                folder = self.output()
                disk, log = folder / "disk", folder / "console.txt"
                disk.mkdir()
                room = f"size={int(size * self.random.uniform(0.5, 3.5)) + 60}k"
                mount = ["mount", "-t", "tmpfs", "-o", room, "tmpfs", str(disk)]
                if subprocess.run(mount, capture_output=True).returncode:
                    row.note = "not tried: this user may not mount a file system"
                    return
                try:
                    output = disk / "output"
                    code = run_forked(["--resume", *self.overrides(output)], log=log)
                    row.tried += code != 0  # else there was room for all of it
                    if code not in (0, 1):
                        self.lose(row, 1, f"exit code {code}", folder)
                        continue
                    more = ["mount", "-o", "remount,size=64m", str(disk)]
                    subprocess.run(more, check=True)
                    code = run_forked(["--resume", *self.overrides(output)], log=log)
                    if code:
                        self.lose(row, 1, f"exit code {code} with more room", folder)
                    else:
                        self.compare(row, 1, reference, output)
                finally:
                    subprocess.run(["umount", "-l", str(disk)], check=True)

    def plant_links(self, count: int, reference: Path) -> None:
        """Links to somebody's file, wherever a run or its evaluation writes."""
        written = [path.relative_to(reference) for path in reference.rglob("*") if path.is_file()]
        names = [name for name in written if name.name not in ("console.txt", LOCK_NAME)]
        secret = self.folder / "secret"
        with self.row("links in the place of outputs") as row:
            refused = 0
            for _ in range(count):
                output = self.output()
                secret.write_text("mine")
                for name in self.random.sample(names, self.random.randint(1, 4)):
                    (output / name).parent.mkdir(parents=True, exist_ok=True)
                    (output / name).symlink_to(secret)
                row.tried += 1
                log = output / "console.txt"
                code = run_forked(["--resume", *self.overrides(output)], log=log)
                is_refused = code == 1 and " is a link, to " in log.read_text()
                refused += is_refused
                if secret.read_text() != "mine":
                    self.lose(row, 1, "a link was followed", output)
                elif code == 0:
                    self.compare(row, 1, reference, output)
                elif not is_refused:
                    self.lose(row, 1, f"exit code {code}", output)
            row.note = row.note or f"{count - refused} ended well, {refused} refused"

    def start_twice(self, count: int, reference: Path) -> None:
        """Two runs in one folder at the same moment; every second time where one was killed."""
        with self.row("two runs in one folder") as row:
            for number in range(count):
                output = self.output()
                arguments = ["--resume", *self.overrides(output)]
                logs = [output / "console.txt", output.with_name(f"{output.name}.txt")]
                if number % 2:
                    child = fork(arguments, log=logs[0])
                    wait(child, kill_after=self.random_time())
                row.tried += 1
                codes = [wait(child) for child in [fork(arguments, log=log) for log in logs]]
                said = sum("of a run that is not over" in log.read_text() for log in logs)
                # Both end well where the first was over before the second came.
                if sorted(codes) not in ([0, 0], [0, 1]) or said != sum(codes):
                    self.lose(row, 1, f"exit codes {codes}", output)
                else:
                    self.compare(row, 1, reference, output)

    def fuzz(self, fault: str, count: int, attempt: Callable[[int], bool]) -> None:
        """Inputs that are used (True) or refused in words (False)."""
        with self.row(fault) as row:
            used = 0
            for i in range(count):
                row.tried += 1
                try:
                    used += attempt(i)
                except Exception as error:
                    row.lost += 1
                    row.note = f"{type(error).__name__}: {str(error)[:60]}"
                    print(f"LOST: input {i}: {type(error).__name__}: {error}", flush=True)
            row.note = row.note or f"{used} used, {count - used} refused"

    def fuzz_documents(self, count: int, number: int) -> None:
        """Hypothesis chooses; each is loaded as training does."""
        folder = self.folder / "fuzzing"
        write_dataset(folder, num_images=3)
        found: list[object] = []

        @seed(number)
        @settings(
            max_examples=count,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(document=documents())
        def collect(document: object) -> None:
            found.append(document)

        collect()
        name = "COCO JSON, changed at random"
        # Hypothesis may find fewer that differ.
        self.fuzz(name, len(found), lambda i: try_document(found[i], folder))

    def fuzz_images(self, count: int, number: int) -> None:
        """Flipped bits, cut and added bytes, in eight formats."""
        generator = np.random.default_rng(number)
        names = list(IMAGES)
        path = self.folder / "image"
        with _silent_decoders():
            self.fuzz(
                "images, changed at random",
                count,
                lambda i: try_image(damaged(IMAGES[names[i % len(names)]], generator), path),
            )

    def fuzz_checkpoints(self, count: int, number: int) -> None:
        """The same, of a file of torch.save."""
        generator = np.random.default_rng(number)
        good, path = checkpoint(), self.folder / "a.pth"
        self.fuzz(
            "checkpoints, changed at random",
            count,
            lambda i: try_checkpoint(damaged(good, generator), path),
        )

    def send_requests(self, count: int, number: int) -> None:
        """To the page's server: bytes of good requests, changed at random, or broken off. It may
        refuse, but must go on to serve its page, and end well."""
        generator = np.random.default_rng(number)
        log = self.folder / "page.txt"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "detection_toolkit.web", "--port", str(port)]
        with (
            self.row("requests to the page, changed at random") as row,
            log.open("w") as output,
            subprocess.Popen(command, stdout=output, stderr=output) as server,
        ):
            while server.poll() is None and "The page is at" not in log.read_text():
                time.sleep(0.1)
            good, *others = (request.replace(b"PORT", b"%d" % port) for request in _REQUESTS)
            answered = 0
            for i in range(count):
                row.tried += 1
                request = damaged([good, *others][i % len(_REQUESTS)], generator)
                answered += bool(_answer(port, request, seconds=1))
                # Of another user.
                if not _answer(port, good, seconds=20).startswith(b"HTTP/1.1 200"):
                    self.lose(row, 1, f"no page after request {i}", log.with_suffix(""))
                    break
            server.send_signal(signal.SIGTERM)
            code = server.wait(HANGS)
            if code:
                self.lose(row, 1, f"the server ended with {code}", log.with_suffix(""))
            row.note = row.note or f"{answered} answered"

    def print_table(self) -> None:
        """The figures."""
        rows = [
            (r.fault, r.tried, r.tried - r.lost, r.lost, f"{r.seconds:.0f}", r.note)
            for r in self.rows
        ]
        headers = ["fault", "tried", "survived", "lost", "seconds", ""]
        print("\n" + tabulate(rows, headers=headers, tablefmt="github"))


_HEAD = b" HTTP/1.1\r\nHost: localhost:PORT\r\nConnection: close\r\n"
_CALL = b'{"data": [null], "fn_index": 2, "session_hash": "a", "path": "http://127.0.0.1/"}'
_PART = (
    b"--x\r\nContent-Disposition: form-data; name=files; filename=a.png\r\n\r\n\x89PNG\r\n--x--\r\n"
)
_BODY = b"Content-Type: %s\r\nContent-Length: %d\r\n\r\n%s"
# The first is the page.
_REQUESTS = (
    b"GET /" + _HEAD + b"\r\n",
    b"GET /gradio_api/file=/etc/passwd" + _HEAD + b"\r\n",
    b"POST /gradio_api/queue/join" + _HEAD + _BODY % (b"application/json", len(_CALL), _CALL),
    b"POST /gradio_api/upload"
    + _HEAD
    + _BODY % (b"multipart/form-data; boundary=x", len(_PART), _PART),
)


def _answer(port: int, request: bytes, *, seconds: float) -> bytes:
    """The first bytes that come back; none where the server waits for more, or hangs up."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        with suppress(OSError):
            connection.sendall(request)
            return connection.recv(64)
    return b""


def _times_begun(output: Path) -> int:
    """How often training has begun in a folder."""
    log = output / "console.txt"
    return log.read_text().count("Starting training from iteration") if log.is_file() else 0


@contextmanager
def _silent_decoders() -> Iterator[None]:
    """libtiff writes past Python, a line for every file that it does not like."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, number in [
        ("kills", 100),
        ("command-kills", 10),
        ("signals", 14),
        ("pair-kills", 20),
        ("damages", 20),
        ("full-disks", 10),
        ("links", 20),
        ("pairs", 20),
        ("documents", 10000),
        ("images", 10000),
        ("checkpoints", 2000),
        ("requests", 500),
    ]:
        parser.add_argument(f"--{name}", type=int, default=number, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of all choices")
    return parser


def main() -> int:
    """Returns the exit code."""
    args = get_parser().parse_args()
    warnings.simplefilter("ignore")
    # What is said of ten thousand documents; runs have a log of their own.
    logging.getLogger("detection_toolkit.data").setLevel(logging.ERROR)
    logging.getLogger("detectron2.data").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="stageinteractor-soak-") as name:
        os.environ["HOME"] = name  # where repaired documents are cached
        soak = Soak(Path(name), random.Random(args.seed))
        reference = soak.undisturbed()
        soak.kill(args.kills, reference)
        soak.kill_command(args.command_kills, reference)
        soak.ask(args.signals, reference)
        soak.kill_one_of_two(args.pair_kills)
        soak.damage(args.damages, reference)
        soak.fill_disk(args.full_disks, reference)
        soak.plant_links(args.links, reference)
        soak.start_twice(args.pairs, reference)
        soak.fuzz_documents(args.documents, args.seed)
        soak.fuzz_images(args.images, args.seed)
        soak.fuzz_checkpoints(args.checkpoints, args.seed)
        soak.send_requests(args.requests, args.seed)
        soak.print_table()
    lost = sum(row.lost for row in soak.rows)
    print(f"\n{lost} lost, {(time.monotonic() - begin) / 60:.1f} minutes")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
