"""Runs commands, a few at a time, in an order that respects which run starts from which. For run_all.sh.

    bash run_all.sh list table1 | python tools/run_jobs.py --jobs 2

Reads one command per line. A job with a result is skipped; where one fails, only the jobs that start
from it are not run. Output goes to <log_dir>/logs/<name>.txt. A signal is passed on to every job that
runs, which saves and ends. Exit codes: 0 all done, 2 some failed, 75 stopped by a signal.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import utils

STOPPED = utils.STOPPED
START_UP = 60  # starting and evaluating take about as long as this many steps


@dataclass
class Job:
    """A command, the file that it leaves when it is done, and the run folders that it reads."""

    words: list[str]
    name: str
    result: Path
    needs: list[Path]
    log: Path
    began: float = 0.0
    process: subprocess.Popen | None = None

    @property
    def script(self) -> str:
        return self.words[1]

    @property
    def size(self) -> int:
        """How long it takes, relative to others of the same script."""
        return START_UP + int(value(self.words, "--steps") or 0)


def value(words: list[str], option: str) -> str | None:
    """The value of an option, where it is given."""
    return words[words.index(option) + 1] if option in words[:-1] else None


def read_job(line: str) -> Job:
    """Raises InputError where a line lacks what the queue reads of it."""
    try:
        words = shlex.split(line)
    except ValueError as error:  # as "No closing quotation"
        raise utils.InputError(f"a job is no command ({error}): {line.strip()}") from None
    steps = value(words, "--steps") or "0"
    if not steps.isdecimal():
        raise utils.InputError(f"a job needs a whole number of --steps: {line.strip()}")
    evaluates = "evaluate.py" in words
    for option in ("--weights", "--output") if evaluates else ("--log_dir", "--name"):
        if not value(words, option):
            raise utils.InputError(f"a job needs {option}: {line.strip()}")
    if not evaluates:
        log_dir = Path(value(words, "--log_dir"))
        name = value(words, "--name")
        needs = [Path(value(words, "--init") or "none")]
        return Job(
            words, name, log_dir / name / "result.json", needs, log_dir / "logs" / f"{name}.txt"
        )
    needs = [Path(word) for word in words[words.index("--weights") + 1 :]]  # the last option
    log_dir = needs[0].parent
    output = Path(value(words, "--output"))
    files = {"depth": output / "depth.json", "seg": output / "segmentation.json"}
    name = f"{words[2]} {os.path.relpath(output, log_dir)}"
    log = log_dir / "logs" / f"{name.replace(' ', '_').replace('/', '_')}.txt"
    return Job(words, name, files.get(words[2], output), needs, log)


class Queue:
    """Jobs in the order in which they are wanted; what another job has yet to make is waited for."""

    def __init__(self, jobs: list[Job], at_once: int):
        self.total = len(jobs)
        self.waiting = [job for job in jobs if not job.result.exists()]
        self.at_once = at_once
        self.running = []
        self.finished = self.total - len(self.waiting)
        self.failed = []
        self.stopped = False
        self.signalled = False  # until the signal is passed on
        self.seconds = {}  # by script: what finished jobs took, and their sizes
        if self.finished:
            print(f"{self.finished} of {self.total} jobs are done already")

    def run(self) -> int:
        for number in (*utils.SIGNALS, signal.SIGQUIT):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, self.stop)
        try:
            self.work()
        finally:  # after an error, too, no job stays behind
            self.end_jobs()
            for job in self.running:
                job.process.wait()
        if self.stopped:
            print("stopped; the same command continues", file=sys.stderr)
            return STOPPED
        if self.failed:
            print(f"error: {len(self.failed)} jobs failed, see above", file=sys.stderr)
            return 2
        return 0

    def work(self) -> None:
        """Until all jobs have ended, or those that run when a signal comes."""
        while self.running or (self.waiting and not self.stopped):
            self.start_jobs()
            if self.signalled:
                self.signalled = False
                self.end_jobs()
            for job in [job for job in self.running if job.process.poll() is not None]:
                self.running.remove(job)
                self.finish(job)
            time.sleep(0.1)

    def stop(self, number: int, frame: object) -> None:
        self.stopped = True
        self.signalled = True

    def end_jobs(self) -> None:
        """Every run saves and ends."""
        for job in self.running:
            job.process.terminate()

    def start_jobs(self) -> None:
        """Starts the first jobs whose runs are there, as many as there is room for."""
        for job in list(self.waiting):
            if len(self.running) >= self.at_once or self.stopped:
                return
            if any(run in self.folders(self.failed) for run in job.needs):
                self.waiting.remove(job)
                self.fail(job, "not run, as the run it starts from failed")
            elif not any(run in self.folders(self.waiting + self.running) for run in job.needs):
                self.waiting.remove(job)
                self.start(job)

    @staticmethod
    def folders(jobs: list[Job]) -> set[Path]:
        return {job.result.parent for job in jobs if "evaluate.py" not in job.words}

    def start(self, job: Job) -> None:
        """In a session of its own, so that Ctrl-C in a terminal reaches a job once, through `stop`."""
        job.began = time.monotonic()
        try:
            job.log.parent.mkdir(parents=True, exist_ok=True)
            with open(job.log, "w") as log:
                job.process = subprocess.Popen(
                    job.words,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:  # no such program, no place for its log
            self.fail(job, f"failed to start: {error}")
        else:
            self.running.append(job)

    def finish(self, job: Job) -> None:
        code = job.process.returncode
        if code == STOPPED or (code and self.stopped):
            self.stopped = True
            how = "saved" if code == STOPPED else f"exit code {code}"
            print(f"stopped, {how}: {job.name}", file=sys.stderr)
        elif code:
            lines = job.log.read_text(errors="replace").splitlines()
            self.fail(
                job, f"failed with exit code {code}: {lines[-1] if lines else ''} (see {job.log})"
            )
        else:
            self.succeed(job)

    def succeed(self, job: Job) -> None:
        """Unless the job has left nothing."""
        try:
            score = score_of(job)
        except (OSError, ValueError, TypeError):
            self.fail(job, f"failed: no result in {job.result} (see {job.log})")
            return
        seconds = time.monotonic() - job.began
        spent, size = self.seconds.get(job.script, (0, 0))
        self.seconds[job.script] = (spent + seconds, size + job.size)
        self.finished += 1
        self.show(f"{job.name} {score}", self.time_left())

    def fail(self, job: Job, reason: str) -> None:
        self.failed.append(job)
        self.finished += 1
        self.show(f"{job.name} {reason}", "")

    def show(self, text: str, left: str) -> None:
        width = len(str(self.total))
        print(f"[{self.finished:{width}}/{self.total}] {text.strip()}{left}", flush=True)

    def time_left(self) -> str:
        """From what jobs of the same script took for their size; of scripts unseen, from all."""
        jobs = self.waiting + self.running
        if not jobs:
            return ""
        spent, size = map(sum, zip(*self.seconds.values()))
        left = 0.0
        for job in jobs:
            seconds, steps = self.seconds.get(job.script, (spent, size))
            left += seconds / steps * job.size
            if job.process is not None:
                left -= min(time.monotonic() - job.began, seconds / steps * job.size)
        minutes = max(1, round(left / min(self.at_once, len(jobs)) / 60))
        return (
            f", about {minutes} min left" if minutes < 120 else f", about {minutes / 60:.0f} h left"
        )


def score_of(job: Job) -> str:
    """What to show of a finished job; raises an error where there is nothing to show."""
    if job.result.suffix != ".json":
        job.result.stat()
        return f"-> {job.result}"
    result = dict(json.loads(job.result.read_text()))
    if result.get("miou") is not None:
        return f"mIoU {result['miou']:.1f} %"
    return f"abs_rel {result['abs_rel']:.3f}" if "abs_rel" in result else ""


def main() -> int:
    parser = utils.Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", type=utils.within(int, 1), default=1, help="how many run at a time")
    args = parser.parse_args()
    jobs = [read_job(line) for line in sys.stdin if line.strip()]
    return Queue(jobs, args.jobs).run()


if __name__ == "__main__":
    utils.run_main(main)
