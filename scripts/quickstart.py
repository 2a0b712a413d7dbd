"""Runs the pipeline in miniature: simulator, policy, tests, report. Every stage is a command that you can run yourself.

A tiny model gains little from a second thread: training takes a process for each of two cores, and the tests run two at a
time, in processes that load the libraries once.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

CONFIGS = Path("configs/miniature")
CORES = min(2, len(os.sched_getaffinity(0)))
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def run_in_process(arguments: list[str], log: Path) -> tuple[int, float]:
    """Runs a command in this process, which may have run others before; its exit status and seconds."""
    from zs_lightning.cli import main

    start, code = time.monotonic(), 0
    sys.stdout.flush()
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            main(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
        sys.stdout.flush()
    return code, time.monotonic() - start


class Quickstart:
    """The stages, with one run folder for all of them."""

    def __init__(self, name: str, seed: int, world_seed: int) -> None:
        self.folder, self.begun = Path("runs") / name, time.monotonic()
        if self.folder.exists():
            sys.exit(f"error: {self.folder} already exists; choose another --name or delete it")
        self.common = [f"--seed_everything={seed}", f"--data.source.init_args.world_seed={world_seed}"]
        self.bm25 = [f"--model.search.init_args.world_seed={world_seed}"]
        # Every ten steps, 64 questions that no training asks.
        self.real = ["--model.validation_search=BM25Search", f"--model.validation_search.world_seed={world_seed}"]
        self.real += ["--trainer.limit_val_batches=1.0", "--trainer.val_check_interval=10"]
        self.adapter = f"--model.search.init_args.model.adapter={self.folder / 'simulator' / 'model'}"
        (self.folder / "logs").mkdir(parents=True)

    def announce(self, stage: str, arguments: list[str]) -> None:
        shown = " ".join(shlex.quote(part) for part in ["python", "-m", "zs_lightning", *arguments])
        print(f"\n[{time.monotonic() - self.begun:4.0f} s] {stage}\n$ {shown}", flush=True)

    def command(self, stage: str, *arguments: str) -> float:
        """Runs one command in the foreground; returns its seconds."""
        self.announce(stage, list(arguments))
        start = time.monotonic()
        words = [sys.executable, "-m", "zs_lightning", *arguments]
        if subprocess.run(words, env=ONE_THREAD | os.environ, check=False).returncode:
            sys.exit(f"error: {stage} failed")
        return time.monotonic() - start

    def fit(self, name: str, *arguments: str) -> float:
        options = [f"--run.folder={self.folder / name}", f"--trainer.devices={CORES}", *self.common, *arguments]
        return self.command(f"fit {name}", "fit", f"--config={CONFIGS / name}.yaml", *options)

    def tests(self) -> dict[str, list[str]]:
        """Arguments of each test: of the policy before and after training, with BM25, with a poorer one, with none, with the
        simulator, and with one search by the question itself (one-shot RAG); of the simulator by itself. The longest first."""
        simulator = f"--ckpt_path={self.folder / 'simulator' / 'last.ckpt'}"
        policy = f"--ckpt_path={self.folder / 'policy' / 'last.ckpt'}"
        few = "--data.test_rows=300"
        poor, silent = ["--model.search.init_args.drop=0.5", few], "--model.rollout.max_turns=0"
        settings = {
            "trained": ("test", policy, *self.bm25),
            "trained_noise_0.5": ("policy", policy, self.adapter, few, "--model.noise_prob=0.5"),
            "trained_noise_0.0": ("policy", policy, self.adapter, few, "--model.noise_prob=0.0"),
            "trained_poor": ("test", policy, *self.bm25, *poor),
            "base": ("test", *self.bm25),
            "simulator_recall": ("simulator", simulator),
            "no_search": ("test", policy, *self.bm25, silent),
            "base_poor": ("test", *self.bm25, *poor),
            "one_shot": ("test", *self.bm25, "--model.rollout.retrieve_first=true", silent),
        }
        return {
            name: ["test", f"--config={CONFIGS / config}.yaml", f"--run.folder={self.folder / name}", *self.common, *options]
            for name, (config, *options) in settings.items()
        }

    def test(self) -> float:
        """Runs all tests, as many at a time as there are cores; returns the sum of their seconds."""
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # Read when the processes load torch.
        with ProcessPoolExecutor(CORES, mp_context=get_context("spawn")) as processes:
            running: dict[str, Future[tuple[int, float]]] = {}
            for name, arguments in self.tests().items():
                self.announce(f"test {name}", arguments)
                running[name] = processes.submit(run_in_process, arguments, self.log(name))
            for name, future in running.items():
                if future.result()[0]:
                    processes.shutdown(cancel_futures=True)
                    sys.exit(f"error: test {name} failed\n{''.join(self.log(name).read_text().splitlines(True)[-5:])}")
        return sum(future.result()[1] for future in running.values())

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"test_{name}.log"

    def compare(self, seconds: dict[str, float]) -> None:
        folders = {name: self.folder / name for name in ("base", "trained", "no_search", "one_shot")}
        others = {f"{policy}@bm25, half of the calls unrelated": f"{policy}_poor" for policy in ("base", "trained")}
        others |= {f"trained@simulator, noise {noise}": f"trained_noise_{noise}" for noise in ("0.0", "0.5")}
        self.command(
            "compare",
            "compare",
            *(f"{name}={folder}" for name, folder in folders.items()),
            *(f"{name}={self.folder / folder}" for name, folder in others.items()),
            f"--simulator={self.folder / 'simulator_recall'}",
            f"--training={self.folder / 'policy'}",
            f"--out={self.folder}",
            *(f"--seconds={name}={value:.1f}" for name, value in seconds.items()),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="quickstart", help="run folder, runs/NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world-seed", type=int, default=0, help="another world than the one the base model knows")
    parser.add_argument("--install-seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    run = Quickstart(arguments.name, arguments.seed, arguments.world_seed)
    seconds = {"install": arguments.install_seconds, "simulator_sft": run.fit("simulator")}
    seconds["policy_rl"] = run.fit("policy", run.adapter, *run.real)
    seconds["test"] = run.test()
    run.compare(seconds)
    print(f"\nDone in {arguments.install_seconds + time.monotonic() - run.begun:.0f} s.")
    print(f"Report: {run.folder / 'report.html'}\nCurves: .venv/bin/tensorboard --logdir {run.folder}")


if __name__ == "__main__":
    main()
