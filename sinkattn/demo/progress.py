"""A progress bar on stderr; silent where stderr is no terminal."""

import sys
import threading
import time


class Progress:
    """total : the work in all. stopped : Event, optional; once it is set, `advance` raises."""

    def __init__(self, total, file=None, stopped=None):
        self.stopped = stopped
        self.file = file or sys.stderr
        self.total, self.done, self.label = max(total, 1), 0, ""
        self.begun, self.shown = time.perf_counter(), 0.0
        self.quiet = not self.file.isatty()
        self.lock = threading.Lock()

    def stage(self, label):
        self.label = label
        self._show(force=True)

    def advance(self, amount):
        if self.stopped is not None and self.stopped.is_set():
            raise InterruptedError("the demo was stopped")
        with self.lock:
            self.done += amount
            self._show()

    def _show(self, force=False):
        now = time.perf_counter()
        if self.quiet or (now - self.shown < 0.1 and not force):
            return
        self.shown = now
        share = min(self.done / self.total, 1.0)
        bar = "#" * round(30 * share)
        line = f"[{bar:<30}] {share:4.0%} {now - self.begun:5.0f} s  {self.label}"
        self.file.write(f"\r{line[:78]:<78}")
        self.file.flush()

    def close(self):
        if not self.quiet:
            self.file.write("\r" + " " * 78 + "\r")
            self.file.flush()
