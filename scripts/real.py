"""Takes a small language model the whole way in real English: from a dictionary to a policy that searches it.

Every stage is a command that you can run yourself, on the files of configs/own. One that is killed goes on when the same line
is given again, and one that is done is not repeated. The dictionary is Debian's of computing; real.sh fetches it.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
PROGRAM = ("-m", "zs_lightning")
PARTS = "{train: 0.7, validation: 0.1, test: 0.2}"
TURNS = "{max_turns: 2, max_new_tokens: 96, max_observation_tokens: 192, max_length: 768, slots: 16, noise_draw: query}"


def call(words: list[str]) -> int:
    """The exit code of a command of this Python."""
    return subprocess.run([sys.executable, *words], check=False).returncode


@dataclass
class Stage:
    """A command of this Python. It goes on from what it has left, or begins anew without that folder."""

    name: str
    words: list[str]
    anew: Path | None = None


class Real:
    """The stages, with one folder for all of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.folder, self.options = options.folder, options
        made = self.folder / "dictionary"
        self.corpus, self.questions = made / "corpus.jsonl", made / "questions.jsonl"
        self.book = self.folder / "stages.json"
        chosen = {"model": options.model, "encoder": options.encoder, "share": options.share}
        chosen["dictionary"] = str(options.dictionary)
        self.state = json.loads(self.book.read_text()) if self.book.exists() else {"options": chosen, "stages": {}}
        if self.state["options"] != chosen and not options.stages:
            was = " ".join(f"--{name} {value}" for name, value in self.state["options"].items())
            sys.exit(f"error: {self.folder} was begun with {was}; give these, or another --folder")

    def share(self, whole: int) -> str:
        return str(max(2, round(whole * self.options.share)))

    def job(self, command: str, name: str, folder: str, *words: str) -> list[str]:
        """A fit or test of configs/own/NAME.yaml on the CPU, with the model and the folder of this run."""
        common = [f"--model.model.path={self.options.model}", "--model.model.dtype=float32", "--trainer.precision=32-true"]
        common += [f"--run.folder={self.folder / folder}"]
        return [*PROGRAM, command, f"--config=configs/own/{name}.yaml", *common, *words]

    def asked(self) -> list[str]:
        """The questions of a policy's stage, the same parts in each."""
        return [f"--data.source.path={self.questions}", f"--data.source.splits={PARTS}", f"--model.rollout={TURNS}"]

    def engine(self, key: str, name: str = "BM25Search") -> list[str]:
        options = {"corpus": self.corpus, "count": 2, "cache": self.folder / "index"}
        return [f"--{key}={name}", *(f"--{key}.{option}={value}" for option, value in options.items())]

    def stages(self) -> list[Stage]:
        return [*self.simulator(), *self.policy(), *self.tests()]

    def simulator(self) -> list[Stage]:
        """The dictionary, what a simulator learns from it, and how good that one is."""
        folder, records = self.folder / "records", self.folder / "records" / "records.jsonl"
        build = [f"--folder={folder}", f"--source.path={self.questions}", f"--source.splits={PARTS}", *self.engine("search")]
        build += [f"--model.path={self.options.model}", "--model.dtype=float32"]
        build += ["--rollout.retrieve_first=true", "--rollout.max_turns=0"]
        taught = [f"--data.source.path={records}", "--data.batch_size=8", f"--data.steps={self.share(300)}"]
        taught += ["--data.validation_rows=16", "--run.save_every=10", "--model.count=2", "--model.max_new_tokens=128"]
        taught += ["--model.optimizer.init_args.lr=1e-3", "--model.micro_batch_tokens=3072", "--model.checkpointing=false"]
        untrained = ["--search=SimulatorSearch", f"--search.model.path={self.options.model}", "--search.model.dtype=float32"]
        untrained += ["--search.prompts=zerosearch", "--search.count=2", "--search.max_new_tokens=128"]
        # Without --records: they are asked of its test part, which it was not taught.
        measured = [f"trained={self.folder / 'simulator'}", f"--rows={self.share(60)}"]
        measured += [f"--out={self.folder / 'measured'}", *self.engine("real"), *untrained]
        return [
            Stage("dictionary", ["scripts/dictionary.py", str(self.options.dictionary), str(self.corpus.parent)]),
            Stage("records", [*PROGRAM, "build-simulator-data", "--config=configs/own/build_simulator_data.yaml", *build]),
            Stage("simulator", self.job("fit", "simulator", "simulator", *taught)),
            Stage("measured", [*PROGRAM, "measure-simulator", *measured]),
        ]

    def policy(self) -> list[Stage]:
        """A supervised start, and RL against the simulator."""
        few = [*self.asked(), "--data.batch_size=4", "--model.micro_batch_tokens=3072", "--model.checkpointing=false"]
        shown = [*few, f"--data.steps={self.share(150)}", "--data.validation_rows=32", "--model.optimizer.init_args.lr=1e-3"]
        shown += ["--run.save_every=10", *self.engine("model.search"), *self.engine("model.demonstrations.search")]
        learnt = [*few, f"--data.steps={self.share(60)}", "--data.validation_rows=48", "--model.optimizer.init_args.lr=1e-4"]
        learnt += [f"--model.model.adapter={self.folder / 'start' / 'model'}", "--model.group_size=4", "--run.save_every=1"]
        learnt += [f"--model.search.model={{path: policy, adapter: {self.folder / 'simulator' / 'best'}}}"]
        learnt += ["--model.search.prompts=zerosearch", "--model.search.count=2", "--model.search.max_new_tokens=128"]
        learnt += ["--trainer.limit_val_batches=1.0", f"--trainer.val_check_interval={self.share(15)}"]
        learnt += self.engine("model.validation_search")
        return [
            Stage("start", self.job("fit", "start", "start", *shown)),
            Stage("policy", self.job("fit", "policy", "policy", *learnt)),
        ]

    def tests(self) -> list[Stage]:
        """On questions that no stage has seen, with engines that no policy has seen; and the comparison."""
        bm25, trained = self.engine("model.search"), f"--ckpt_path={self.folder / 'policy'}"
        dense = [*self.engine("model.search", "DenseSearch"), f"--model.search.model={self.options.encoder}"]
        asked = [*self.asked(), f"--data.test_rows={self.share(400)}"]
        tests = {
            "base": bm25,
            "begun": [*bm25, f"--ckpt_path={self.folder / 'start'}"],
            "trained": [*bm25, trained],
            "trained_dense": [*dense, trained],
            "no_search": [*bm25, trained, "--model.rollout.max_turns=0"],
        }
        stages = []
        for name, words in tests.items():
            # A test begins anew, in a folder that must not hold another.
            stages.append(Stage(f"test {name}", self.job("test", "test", name, *asked, *words), anew=self.folder / name))
        compared = [f"{name}={self.folder / name}" for name in tests]
        compared += [f"--training={self.folder / 'policy'}", f"--out={self.folder / 'report'}"]
        return [*stages, Stage("compare", [*PROGRAM, "compare", *compared])]

    def run(self) -> None:
        """Every stage that is not done, each from where it was; what it took is kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for stage in self.stages():
            kept = self.state["stages"].setdefault(stage.name, {"lives": 0, "seconds": 0.0, "done": False})
            if kept["done"]:
                print(f"{stage.name}: done before, in {clock(kept['seconds'])}")
                continue
            if kept["lives"]:
                print(f"{stage.name}: goes on")
                if stage.anew is not None:
                    shutil.rmtree(stage.anew, ignore_errors=True)
            kept["lives"] += 1
            self.keep()
            print(f"\n$ {shlex.join(['python', *stage.words])}", flush=True)
            began = time.monotonic()
            code = call(stage.words)
            kept["seconds"] += time.monotonic() - began
            kept["done"] = code == 0
            self.keep()
            if code:
                sys.exit(f"error: {stage.name} ended with {code}; the same line goes on")
        self.show()

    def keep(self) -> None:
        new = self.book.with_suffix(".new")
        new.write_text(json.dumps(self.state, indent=1) + "\n")
        new.replace(self.book)

    def show(self) -> None:
        """What each stage took here."""
        for stage in self.stages():
            kept = self.state["stages"].get(stage.name)
            said = "not begun" if not kept else f"{clock(kept['seconds']):>8}" + ("" if kept["done"] else ", not done")
            if kept and kept["lives"] > 1:
                said += f", begun {kept['lives']} times"
            print(f"{stage.name:<20}{said}")


def clock(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=MODEL, help="a small language model, a folder or a hub name")
    add("--encoder", default=ENCODER, help="an encoder of sentences, for the engine that searches by meaning")
    add("--dictionary", type=Path, default=Path("runs/foldoc/usr/share/dictd"), help="with foldoc.index and foldoc.dict.dz")
    add("--folder", type=Path, default=Path("runs/real"))
    said = "of all steps and rows: 0.03 goes the whole way in some minutes, and learns nothing"
    add("--share", type=float, default=1.0, help=said)
    add("--stages", action="store_true", help="say what each stage took so far, and run none")
    options = parser.parse_args(words)
    if not 0 < options.share <= 1:
        parser.error(f"--share: expected more than 0 and at most 1; got {options.share}")
    real = Real(options)
    if options.stages:
        return real.show()
    if not (options.dictionary / "foldoc.index").exists():
        parser.error(f"--dictionary: expected a folder with foldoc.index; got {options.dictionary}; see --help")
    real.run()


if __name__ == "__main__":
    main()
