"""Models that cannot be used: one sentence on the command line, before the weights of any model are loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig, LlamaForCausalLM, T5Config

from support.commandline import POLICY, SIMULATOR, SMALL_RL, failure
from support.faultserver import Reply, searching
from support.modelserver import models
from support.tiny import make_model, make_tokenizer
from zs_lightning.errors import UserError
from zs_lightning.models.checks import check_logits, check_models
from zs_lightning.models.loading import load_model, load_tokenizer
from zs_lightning.models.lora import add_lora
from zs_lightning.models.sizes import bare_model
from zs_lightning.models.specs import SHIPPED, LoraSpec, ModelSpec, resolve_path, weights_key

pytestmark = pytest.mark.usefixtures("environment")

PLAIN = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.steps=1", *SMALL_RL]
NO_ADAPTER = "--model.search.model.adapter=null"


def without_weights(folder):
    """The shipped base without what takes long to load."""
    shutil.copytree(SHIPPED, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    return f"./{folder}"


def said(capsys, *options):
    """What a policy's run says that ends at once. Neither model has weights to load."""
    policy, simulator = without_weights("policy"), without_weights("simulator")
    roles = [f"--model.model.path={policy}", f"--model.search.model.path={simulator}", NO_ADAPTER]
    code, sentence = failure(capsys, "fit", POLICY, *roles, *PLAIN, *options)
    assert code == 2
    assert not [*Path("runs").rglob("config.yaml"), *Path("runs").rglob("trajectories")], "nothing has begun"
    return sentence.removeprefix("error: ")


ROLES = ["--model.model", "--model.search.model"]


@pytest.mark.parametrize("role", ROLES)
def test_there_is_no_such_model(role, capsys):
    sentence = f"{role[2:]}.path: there is no folder ./nowhere; expected a model folder, a hub name or `miniature`"
    assert said(capsys, f"{role}.path=./nowhere") == sentence
    Path("empty").mkdir()
    assert "the folder ./empty has no config.json" in failure(capsys, "fit", POLICY, NO_ADAPTER, f"{role}.path=./empty")[1]


@pytest.mark.parametrize("role", ROLES)
def test_a_model_that_writes_no_text_is_refused(role, capsys):
    T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2).save_pretrained("t5")
    shutil.copy(SHIPPED / "tokenizer.json", "t5")
    sentence = f"{role[2:]}.path: ./t5 is a t5, which is no decoder of text; choose one that is"
    assert said(capsys, f"{role}.path=./t5") == sentence
    Path("unknown").mkdir()
    Path("unknown/config.json").write_text(json.dumps({"model_type": "never-heard-of"}))
    sentence = failure(capsys, "fit", POLICY, NO_ADAPTER, f"{role}.path=./unknown")[1]
    assert sentence.startswith(
        f"error: {role[2:]}.path: no model could be loaded from ./unknown: The checkpoint you are trying to load"
    )
    assert "never-heard-of" in sentence


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize(
    ("device", "sentence"),
    [
        ("cuda:1", "there is no cuda:1 here, which has no CUDA card that torch can use; set another device, or auto"),
        ("gpu", "expected cpu, cuda, cuda:1 … or auto; got gpu"),
    ],
)
def test_a_device_that_is_not_here(device, sentence, role, capsys):
    assert said(capsys, f"{role}.device={device}") == f"{role[2:]}.device: {sentence}"


def test_a_tokenizer_without_end(capsys):
    tokenizer = make_tokenizer("raw")
    tokenizer.eos_token = None
    make_model("qwen3").config.save_pretrained("endless")
    tokenizer.save_pretrained("endless")
    sentence = "model.model.path: the tokenizer of ./endless has no end-of-text token; set eos_token in its config"
    assert failure(capsys, "fit", SIMULATOR, "--model.model.path=./endless") == (2, f"error: {sentence}")
    assert said(capsys, "--model.model.path=./endless") == sentence


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("other", [{"kind": "qwen3", "hidden_size": 48}, {"kind": "qwen3", "num_hidden_layers": 9}])
def test_an_adapter_of_another_base(other, shared, capsys):
    add_lora(make_model(**other), LoraSpec(r=2), 0).save_pretrained("adapter")
    options = ["--model.search.model.adapter=adapter", *(["--model.search.model.path=policy"] if shared else [])]
    sentence = said(capsys, *options, "--model.lora.r=2")
    base = "./policy" if shared else "./simulator"
    assert sentence.startswith(f"model.search.model.adapter: adapter does not fit the model {base}, which has no such layer as")
    assert sentence.endswith("; set the model that it was trained on")


def test_weights_that_do_not_fit_on_their_card(monkeypatch):
    """Policy and simulator together; here there is no card to ask."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    weights = sum(parameter.nbytes for parameter in load_model(ModelSpec(device="cpu")).parameters())
    specs = {"model.model": ModelSpec(device="cuda"), "model.search.model": ModelSpec(device="auto")}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * weights, 2 * weights))
    check_models(specs)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * weights - 1, 2 * weights))
    sentence = r"^model\.model and model\.search\.model: the weights take .* GB, and cuda:?0? has .* GB free; set quantization"
    with pytest.raises(ValueError, match=sentence):
        check_models(specs)
    check_models({"model.model": specs["model.model"], "model.search.model": ModelSpec(device="cpu")})


# ---------------------------------------------------------------------- the hub


@pytest.fixture
def hub(serve, monkeypatch):
    """A hub on loopback that answers for every file as the test says."""

    def start(*answer, **headers):
        server = serve(lambda asked: Reply({"error": "no"}, status=answer[0], headers=headers))
        url = server.url("")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        return server

    return start


def test_a_gated_model(hub, capsys):
    server = hub(401, **{"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
    change = "accept its terms on its page of the hub and log in with `hf auth login`, or take another"
    for role in ROLES:
        assert said(capsys, f"{role}.path=org/gated") == f"{role[2:]}.path: org/gated is gated; {change}"
        assert server.asked


def test_a_name_that_the_hub_does_not_know(hub, capsys):
    hub(404, **{"X-Error-Code": "RepoNotFound"})
    sentence = said(capsys, "--model.model.path=org/nothing")
    assert sentence.startswith("model.model.path: no model could be loaded from org/nothing: org/nothing is not a local folder")


# ---------------------------------------------------------------------- logits that are not those of the head

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 384}
SCALED = {"cohere": (CohereConfig, "logit_scale", 0.25), "granite": (GraniteConfig, "logits_scaling", 8.0)}


@pytest.mark.parametrize("kind", SCALED)
def test_a_model_that_scales_its_logits_is_refused_and_not_one_with_scale_1(kind):
    config_class, key, scale = SCALED[kind]
    tokens = {f"{name}_token_id": 0 for name in ("bos", "eos", "pad")}
    AutoModelForCausalLM.from_config(config_class(**SIZES, **tokens, **{key: scale})).save_pretrained("scaled")
    sentence = f"^model.model.path: ./scaled is a {kind} that changes its logits after the vocabulary head; choose a model"
    with pytest.raises(ValueError, match=sentence):
        load_model(ModelSpec(path="./scaled"))
    AutoModelForCausalLM.from_config(config_class(**SIZES, **tokens, **{key: 1.0})).save_pretrained("scaled")
    assert load_model(ModelSpec(path="./scaled")).config.model_type == kind


class Doubling(LlamaForCausalLM):
    """Says in no option that its logits are not those of its head."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2
        return output


def test_logits_are_compared_with_those_of_the_head(tiny_model):
    check_logits(tiny_model, "tiny")
    with pytest.raises(ValueError, match="tiny is a llama that changes its logits after the vocabulary head"):
        check_logits(Doubling(make_model("llama").config).eval(), "tiny")


# ---------------------------------------------------------------------- servers and numbers


def test_a_server_that_answers_nonsense(serve, capsys):
    before = searching()
    server = serve(lambda asked: models("tiny") if asked.method == "GET" else {"weather": "fine"})
    options = ["--model.search=ServedSimulatorSearch", f"--model.search.hosts={server.url('')}"]
    code, sentence = failure(capsys, "fit", POLICY, f"--model.model.path={without_weights('policy')}", *PLAIN, *options)
    assert code == 2
    assert sentence.startswith("error: search: served_simulator cannot be used: ")
    assert "choices" in sentence
    assert not searching() - before


NUMBERS = {
    "--model.optimizer.lr=-1": "model.optimizer: Invalid learning rate: -1.0",
    "--model.group_size=0": "model.group_size: expected 1 or more; got 0",
    "--model.updates_per_rollout=0": "model.updates_per_rollout: expected 1 or more; got 0",
    "--model.micro_batch_tokens=0": "model.micro_batch_tokens: expected 1 or more; got 0",
    "--model.loss.kl_coef=-0.5": "loss.kl_coef: expected 0 or more; got -0.5",
    "--model.loss.clip_low=-1": "loss.clip_low: expected 0 or more; got -1",
    "--model.loss.clip_high=nan": "model.loss.clip_high: expected a number; got nan",
    "--model.reward.format_weight=-1": "reward.format_weight: expected a number from 0 to 1; got -1",
    "--model.warmup_steps=-1": "model.warmup_steps: expected 0 or more; got -1",
    "--model.max_grad_norm=-1": "model.max_grad_norm: expected 0 or more; got -1",
    "--model.search.count=0": (
        "search: expected count and slots >= 1, and max_new_tokens from 1 to below max_length; got 0, 128, 64, 160"
    ),
    "--model.search.max_length=64": (
        "search: expected count and slots >= 1, and max_new_tokens from 1 to below max_length; got 3, 128, 64, 64"
    ),
    "--trainer.precision=bf16-true": "trainer.precision: expected 32-true or bf16-mixed; got bf16-true",
    "--trainer.precision=16-mixed": (
        "trainer.precision: expected 32-true or bf16-mixed; got 16-mixed, in which models made in bfloat16 may overflow and "
        "small gradients vanish; on a card without bfloat16 set 32-true with dtype: float32 of the models"
    ),
}


@pytest.mark.parametrize(
    ("precision", "quantization", "refused"),
    [("32-true", "none", True), ("32-true", "nf4", True), ("bf16-mixed", "nf4", True), ("bf16-mixed", "none", False)],
)
def test_gradients_in_float16(precision, quantization, refused, capsys):
    options = ["--model.model.dtype=float16", f"--model.model.quantization={quantization}", f"--trainer.precision={precision}"]
    sentence = said(capsys, *options)
    assert sentence.startswith("model.model.dtype: training goes wrong in float16, in which small") == refused


@pytest.mark.parametrize("option", NUMBERS)
def test_a_number_that_makes_no_sense(option, capsys):
    assert said(capsys, option) == NUMBERS[option]


def test_null_on_the_command_line_is_no_text(capsys):
    """Not a folder called None: the run goes on until the weights, which are missing."""
    assert "no model could be loaded from ./simulator" in said(capsys)


# ---------------------------------------------------------------------- program code


def with_code(folder, **settings):
    """A folder of the shipped base whose configuration names a class of a file beside it, which tells that it ran."""
    place = without_weights(folder)
    settings["auto_map"] = {name: "own.Own" for name in ("AutoConfig", "AutoModel", "AutoModelForCausalLM")}
    config = json.loads(Path(folder, "config.json").read_text()) | settings
    Path(folder, "config.json").write_text(json.dumps(config))
    Path(folder, "own.py").write_text(f"open({str(Path('ran').absolute())!r}, 'w')\nclass Own: pass\n")
    return place


CODE = "brings program code of its own (auto_map), which is never run here; take a model of a kind that transformers knows"


@pytest.fixture
def yes(monkeypatch):
    """Somebody who answers every question with yes."""
    monkeypatch.setattr("builtins.input", lambda asked="": "y")


@pytest.mark.parametrize("role", ROLES)
def test_a_model_that_brings_program_code(role, yes, capsys):
    place = with_code("own", model_type="own")
    assert said(capsys, f"{role}.path={place}") == f"{role[2:]}.path: {place} {CODE}"
    assert not Path("ran").exists()


def test_code_that_no_other_command_runs(yes, capsys):
    place = with_code("own", model_type="own")
    estimated = (POLICY, f"--model.model.path={place}", "--card=24")
    assert failure(capsys, "estimate", *estimated) == (2, f"error: model path: {place} {CODE}")
    options = ("--search=DenseSearch", "--search.corpus=notes", f"--search.model={place}")
    Path("notes").mkdir()
    Path("notes/a.txt").write_text("A note.")
    assert failure(capsys, "serve", *options) == (2, f"error: search.model: {place} {CODE}")
    # The configuration's class is known, that of the model is not.
    place = with_code("seen", model_type="clip_vision_model")
    with pytest.raises(ValueError, match="auto_map"):
        bare_model(ModelSpec(path=place).config, "float32")
    assert not Path("ran").exists()


def test_a_model_of_a_known_kind_leaves_its_code_alone(yes):
    shutil.copytree(SHIPPED, "known")
    assert load_model(ModelSpec(path=with_code("known"), device="cpu"))
    assert not Path("ran").exists()


def test_a_model_may_be_named_from_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    without_weights(tmp_path / "base")
    spec = ModelSpec(path="~/base", adapter="~/mine")
    assert (spec.path, spec.adapter) == (str(tmp_path / "base"), str(tmp_path / "mine"))
    assert load_tokenizer("~/base").eos_token_id == load_tokenizer("miniature").eos_token_id
    assert weights_key("~/base") == weights_key(str(tmp_path / "base"))
    assert ModelSpec() == ModelSpec(path="miniature", adapter=None)
    for path in ("~nouser/base", f"./{'x' * 300}"):
        with pytest.raises(UserError, match=f"^path: there is no folder {path}; expected a model folder"):
            resolve_path(path)
        assert weights_key(path) == path
