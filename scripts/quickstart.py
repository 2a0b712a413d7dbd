"""Runs the pipeline in miniature: simulator, policy, tests, report. Every stage is a command that you can run yourself.

While one stage trains, tests of the untrained model run beside it; two stages never share a core.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CONFIGS = Path("configs/miniature")


class Quickstart:
    """The stages, with one run folder for all of them."""

    def __init__(self, name: str, seed: int, world_seed: int) -> None:
        self.folder, self.begun = Path("runs") / name, time.monotonic()
        if self.folder.exists():
            sys.exit(f"error: {self.folder} already exists; choose another --name or delete it")
        self.common = [f"--seed_everything={seed}", f"--data.source.init_args.world_seed={world_seed}"]
        self.bm25 = [f"--model.search.init_args.world_seed={world_seed}"]
        self.poor = ["--model.search.init_args.drop=0.5", "--data.test_rows=300"]
        (self.folder / "logs").mkdir(parents=True)

    def command(self, stage: str, *arguments: str, threads: int = 1, show: bool = False) -> float:
        """Runs one command; returns its seconds. What it prints goes to a log file, unless it is shown."""
        command = ["-m", "zs_lightning", *arguments]
        shown = " ".join(shlex.quote(part) for part in ["python", *command])
        print(f"\n[{time.monotonic() - self.begun:4.0f} s] {stage}\n$ {shown}", flush=True)
        start = time.monotonic()
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        log = self.folder / "logs" / f"{stage.replace(' ', '_')}.log"
        with log.open("w") as file:
            output = None if show else file
            done = subprocess.run([sys.executable, *command], env=environment, stdout=output, stderr=output, check=False)
        if done.returncode:
            sys.exit(f"error: {stage} failed; see {log}\n" + ("" if show else "".join(log.read_text().splitlines(True)[-5:])))
        return time.monotonic() - start

    def test(self, name: str, *arguments: str, config: str = "test") -> float:
        options = [f"--config={CONFIGS / config}.yaml", f"--run.folder={self.folder / name}", *self.common, *arguments]
        return self.command(f"test {name}", "test", *options)

    def fit_simulator(self) -> float:
        config, folder = CONFIGS / "simulator.yaml", self.folder / "simulator"
        return self.command("fit simulator", "fit", f"--config={config}", f"--run.folder={folder}", *self.common, show=True)

    def fit_policy(self) -> float:
        config, adapter = CONFIGS / "policy.yaml", self.folder / "simulator" / "model"
        options = [f"--run.folder={self.folder / 'policy'}", f"--model.search.init_args.model.adapter={adapter}"]
        return self.command("fit policy", "fit", f"--config={config}", *options, *self.common, threads=2, show=True)

    def test_untrained(self) -> float:
        """With a search at will, with a poorer engine, and with one search by the question itself (one-shot RAG)."""
        rag = ["--model.rollout.retrieve_first=true", "--model.rollout.max_turns=0"]
        seconds = self.test("base", *self.bm25) + self.test("base_poor", *self.bm25, *self.poor)
        return seconds + self.test("one_shot", *self.bm25, *rag)

    def test_trained(self) -> float:
        checkpoint = f"--ckpt_path={self.folder / 'policy' / 'last.ckpt'}"
        seconds = self.test("trained", checkpoint, *self.bm25)
        return seconds + self.test("no_search", checkpoint, *self.bm25, "--model.rollout.max_turns=0")

    def test_elsewhere(self) -> float:
        """The trained policy with a poorer engine and with the simulator; the simulator itself."""
        checkpoint, few = f"--ckpt_path={self.folder / 'policy' / 'last.ckpt'}", "--data.test_rows=300"
        adapter = f"--model.search.init_args.model.adapter={self.folder / 'simulator' / 'model'}"
        seconds = self.test("trained_poor", checkpoint, *self.bm25, *self.poor)
        for noise in ("0.0", "0.5"):
            options = [checkpoint, adapter, few, f"--model.noise_prob={noise}"]
            seconds += self.test(f"trained_noise_{noise}", *options, config="policy")
        options = [f"--ckpt_path={self.folder / 'simulator' / 'last.ckpt'}"]
        return seconds + self.test("simulator_recall", *options, config="simulator")

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
            show=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="quickstart", help="run folder, runs/NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world-seed", type=int, default=0, help="another world than the one the base model knows")
    parser.add_argument("--install-seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    run = Quickstart(arguments.name, arguments.seed, arguments.world_seed)
    seconds = {"install": arguments.install_seconds}
    with ThreadPoolExecutor(2) as lanes:
        untrained, simulator = lanes.submit(run.test_untrained), lanes.submit(run.fit_simulator)
        seconds["simulator_sft"] = simulator.result()
        seconds["test"] = untrained.result()
    seconds["policy_rl"] = run.fit_policy()
    with ThreadPoolExecutor(2) as lanes:
        tests = lanes.submit(run.test_trained), lanes.submit(run.test_elsewhere)
        seconds["test"] += sum(test.result() for test in tests)
    run.compare(seconds)
    print(f"\nDone in {arguments.install_seconds + time.monotonic() - run.begun:.0f} s.")
    print(f"Report: {run.folder / 'report.html'}\nCurves: .venv/bin/tensorboard --logdir {run.folder}")


if __name__ == "__main__":
    main()
