"""What a model must be before it is trained: a whole folder, a tokenizer that fits, log-probs that are one number.

Everything wrong ends in one line, and all but NaN weights and other log-probs before a weight is read.
"""

import builtins
import json
import pickle
import re
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, VOCAB, make_model
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from common.language import lm, probe, watch
from grpo_arithmetic import Args, token_logprobs

CPU = torch.device("cpu")
TINY = ROOT / "assets" / "tiny-qwen2"
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"intermediate_size": 64, "num_key_value_heads": 4, "max_position_embeddings": 512, "pad_token_id": 0}
MPT = {"vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}
NEO = {"vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 32}
NEO |= {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 512}
FALCON = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64}
LONG = SMALL | {
    "original_max_position_embeddings": 64,
    "rope_parameters": LONG | {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4},
}
HYBRID = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
HYBRID = SMALL | HYBRID | {"num_experts": 2, "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4}


def random_model(kind: str, config: dict):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config), attn_implementation="eager")
    with torch.no_grad():
        for p in model.parameters():  # away from the near-uniform distribution of a fresh model
            p.mul_(3.0) if p.dim() > 1 else None
    return model.float().eval()


def refused(capsys, function, *args) -> str:
    """The one line that it ends in."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and re.fullmatch(r"error: [^\n]+\n", error)
    return error


# ---- log-probs -------------------------------------------------------------------------------------------------------

SHORT, LONGER = 20, 60  # tokens of the longest prompt; with 16 new ones below and above the limits of the configs here
CANNOT = [
    ("mpt", MPT, SHORT, "shared rows differ from plain ones by .* nats.*--share-prompt False trains it"),
    ("gpt_neo", NEO, LONGER, "decoded rows differ from plain ones by .* nats.*up to 32 tokens together work"),
    ("bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}, SHORT, "decoded rows end in"),
    ("falcon", FALCON | {"alibi": True}, SHORT, "decoded rows end in"),
    ("mamba", {"vocab_size": VOCAB, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 2}, SHORT, "decoded rows"),
    ("jamba", HYBRID, SHORT, "decoded rows end in"),
    ("phi3", LONG, LONGER, "decoded rows differ from plain ones by .* nats.*up to 64 tokens together work"),
    ("mistral", SMALL | {"sliding_window": 64}, LONGER, "up to 64 tokens together work"),
    ("cohere", SMALL, SHORT, "its own logits differ"),
]
CAN = [
    ("phi3", LONG, SHORT),
    ("gpt_neo", NEO | {"window_size": 256}, SHORT),
    ("falcon", FALCON, SHORT),
    ("llama", SMALL | {"rope_parameters": LONG["rope_parameters"] | {"rope_type": "yarn", "factor": 8.0}}, LONGER),
    *[(kind, SMALL, LONGER) for kind in ("mistral", "gemma", "olmo", "opt", "gpt_neox", "stablelm", "smollm3", "phi")],
]


@pytest.mark.parametrize("kind, config, longest, line", CANNOT, ids=[c[0] for c in CANNOT])
def test_a_model_whose_log_probs_depend_on_how_they_are_computed_is_refused(kind, config, longest, line, capsys):
    model = random_model(kind, config)
    error = refused(capsys, probe.check, model, Args(num_generations=4), longest)
    assert re.search(line, error) and type(model).__name__ in error


@pytest.mark.parametrize("kind, config, longest", CAN, ids=[c[0] for c in CAN])
def test_models_that_are_one_whatever_the_layout_pass(kind, config, longest):
    probe.check(random_model(kind, config), Args(num_generations=4), longest)


@pytest.mark.parametrize("flags", [{}, {"decode": "graph"}, {"gradient_checkpointing": True}, {"dtype": "bfloat16"}])
def test_the_bundled_model_passes_with_every_way_to_compute(flags):
    args = Args(**flags)
    model = lm.load_model(args, CPU)
    attention = model.config._attn_implementation
    probe.check(model, args, 17)
    assert model.config._attn_implementation == attention
    probe.check(model, replace(args, num_generations=64), 400)  # 1,024 columns, of 512 that it has positions for


def test_the_probe_computes_in_float32_where_the_device_is_set_up_with_tf32():
    """On a GPU join_world allows TF32: ten bits of a product's factors, by which a model differs from itself."""
    model, seen = make_model(), set()
    model.base_model.register_forward_hook(lambda *_: seen.add(torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision("high")
    try:
        probe.check(model, Args(), 8)
        assert seen == {"highest"} and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_what_a_refusal_recommends_works(capsys):
    """MPT's plain rows and decoding agree, so it trains without shared ones; GPT-Neo within its window."""
    probe.check(random_model("mpt", MPT), Args(share_prompt=False), SHORT)
    probe.check(random_model("mpt", MPT), Args(micro_batch_size=1), SHORT)  # rows of one completion
    neo = random_model("gpt_neo", NEO)
    probe.check(neo, Args(share_prompt=False), 32 - 16)
    assert "--share-prompt False" in refused(capsys, probe.check, neo, Args(), 32 - 16), "wider than the window"
    error = refused(capsys, probe.check, random_model("gpt_oss", SMALL | {"head_dim": 8}), Args(decode="graph"), SHORT)
    assert "sinks" in error and "--decode eager" in error


def test_the_gap_that_the_probe_names_is_the_one_that_training_would_have(capsys):
    """GPT-Neo at 76 tokens: sampled log-probs and those of the update, on the tokens of a run."""
    from test_grpo_model import rollout

    model, prompts = random_model("gpt_neo", NEO), [[i % 200 for i in range(60)]]
    ids, mask, sampled = rollout(model, prompts=prompts, T=16)
    rows = torch.tensor(prompts), torch.tensor([60]), ids, mask
    trained, _ = token_logprobs(model, *rows, temperature=0.7, vocab_size=259, share_prompt=False)
    assert (trained - sampled).abs().max() > probe.TOLERANCE


def test_a_gap_of_sampler_and_trainer_alarms_in_float32_but_not_in_bfloat16():
    metrics = {"train/sampling_logp_difference/mean": 0.06}
    (text,) = watch.alarms(metrics).values()
    assert "sampler and trainer" in text and watch.alarms(metrics, low_precision=True) == {}
    assert watch.alarms({"train/sampling_logp_difference/mean": 1e-4}) == {}


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def framing(before: list[str], after: list[str]):
    """The bundled tokenizer, which puts these tokens around every text."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokens = [(token, tokenizer.convert_tokens_to_ids(token)) for token in {*before, *after}]
    frame = TemplateProcessing(single=[*before, "$A", *after], special_tokens=tokens)
    tokenizer.backend_tokenizer.post_processor = frame
    return tokenizer


def test_prompts_have_no_end_token_behind_them_and_one_beginning():
    end, begin, text = "<|endoftext|>", "<|im_start|>", "Calculate: 1 + 2 = "
    plain = AutoTokenizer.from_pretrained(TINY)
    bare, first = plain(text).input_ids, plain.convert_tokens_to_ids(begin)
    assert lm.encode(plain, [text, "3"]) == plain([text, "3"]).input_ids
    assert framing([], [end])(text).input_ids == [*bare, 256], "or this tests nothing"
    assert lm.encode(framing([], [end]), [text, "3"]) == [bare, plain("3").input_ids]
    assert lm.encode(framing([begin], [end]), [text]) == [[first, *bare]]
    assert framing([begin], [])(begin + text).input_ids == [first, first, *bare]
    assert lm.encode(framing([begin], []), [begin + text, text]) == [[first, *bare]] * 2
    assert lm.encode(framing([], [end]), [text + end]) == [[*bare, 256]], "what a prompt says is left alone"


# ---- folders ---------------------------------------------------------------------------------------------------------


def edited(name: str, **fields):
    def change(folder):
        old = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(old | fields))

    return change


def written(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def weights(change):
    """The weights with what `change(tensors)` does to them."""

    def rewrite(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return rewrite


def index(file: str, **fields):
    """The weights as a shard, which an index calls `file`."""

    def move(folder):
        names = dict.fromkeys(load_file(folder / "model.safetensors"), file)
        (folder / "model.safetensors").rename(folder / "shard.safetensors")
        found = {"metadata": {}, "weight_map": names} | fields
        (folder / "model.safetensors.index.json").write_text(json.dumps(found))

    return move


def several(*changes):
    return lambda folder: [change(folder) for change in changes]


def without(*patterns: str):
    return lambda folder: [file.unlink() for pattern in patterns for file in folder.glob(pattern)]


def drop(*parts: str):
    return weights(lambda x: [x.pop(key) for key in list(x) if any(part in key for part in parts)])


NO_END = several(
    *(edited(f"{name}.json", eos_token_id=None) for name in ("config", "generation_config")),
    edited("tokenizer_config.json", eos_token=None),
)
GATE = "model.layers.0.mlp.gate_proj.weight"
BROKEN = {
    "no tokenizer": (without("tokenizer*"), "holds no tokenizer"),
    "half a tokenizer": (written("tokenizer.json", '{"version": "1.0", "mo'), "the tokenizer of"),
    "a tokenizer that is a list": (written("tokenizer_config.json", "[]"), "the tokenizer of"),
    "half a config": (written("config.json", '{"model_type": "qw'), "config.json"),
    "a config that is a list": (written("config.json", "[]"), "config.json"),
    "a config that is null": (written("config.json", "null"), "config.json"),
    "no config": (without("config.json"), "config.json"),
    "an empty folder": (without("*"), "config.json"),
    "an unknown model": (edited("config.json", model_type="nope"), "nope"),
    "no heads": (edited("config.json", num_attention_heads=0), "config"),
    "a width in words": (edited("config.json", hidden_size="wide"), "hidden_size"),
    "a classifier": (edited("config.json", model_type="albert"), "albert config makes no causal language model"),
    "a quantized model": (edited("config.json", quantization_config={"quant_method": "fp8"}), "quantization_config"),
    "weights elsewhere": (edited("config.json", transformers_weights="../x.safetensors"), "transformers_weights"),
    "an adapter": (written("adapter_config.json", "{}"), "is an adapter"),
    "an adapter alone": (several(without("config.json"), written("adapter_config.json", "{}")), "is an adapter"),
    "integer weights": (
        weights(lambda x: x.update({GATE: x[GATE].to(torch.int8)})),
        f"floating-point numbers ({GATE})",
    ),
    "a missing weight": (drop("layers.2.mlp.up"), "lacks model.layers.2.mlp.up_proj.weight"),
    "a missing layer": (drop("layers.2."), "and 9 more"),
    "a layer too many": (weights(lambda x: x.update({"model.layers.4.x": torch.ones(2)})), "holds model.layers.4.x"),
    "another shape": (weights(lambda x: x.update({"model.norm.weight": torch.ones(2)})), "model.norm.weight is (2,)"),
    "half the weights": (
        lambda folder: (folder / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes()[:-9]),
        "cannot be loaded",
    ),
    "empty weights": (written("model.safetensors", ""), "cannot be loaded"),
    "no weights": (without("*.safetensors"), "model.safetensors"),
    "an index that leaves": (index("../good/model.safetensors"), "no file of its folder"),
    "an index of nothing": (index("other.safetensors"), "no file of its folder"),
    "an index of numbers": (index("shard.safetensors", weight_map={"a": 3}), "index.json"),
    "a null index": (several(without("*.safetensors"), written("model.safetensors.index.json", "null")), "index.json"),
    "an end beyond": (edited("generation_config.json", eos_token_id=999), "end token 999 is none of the model's 272"),
    "a negative end": (edited("generation_config.json", eos_token_id=[258, -1]), "end token -1"),
    "an end in words": (edited("generation_config.json", eos_token_id="stop"), "eos_token_id"),
    "no end": (NO_END, "names no end token"),
    "a large tokenizer": (
        several(
            edited("config.json", vocab_size=100, pad_token_id=None),
            weights(lambda x: x.update({"model.embed_tokens.weight": x["model.embed_tokens.weight"][:100].clone()})),
        ),
        "the tokenizer has 259 tokens, the model 100",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_ends_in_one_line_before_a_weight_is_read(name, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(TINY, tmp_path / "model")
    change, words = BROKEN[name]
    change(folder)
    monkeypatch.setattr(lm.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    assert words in refused(capsys, lm.load_tokenizer, Args(model_name=str(folder)))


def test_weights_that_are_no_numbers_are_named(tmp_path, capsys):
    folder = shutil.copytree(TINY, tmp_path / "model")
    weights(lambda x: x[GATE][3].fill_(torch.nan))(folder)
    args = Args(model_name=str(folder))
    lm.load_tokenizer(args)
    assert GATE in refused(capsys, lm.load_model, args, CPU)


def test_a_checkpoint_to_resume_is_checked_like_a_model(tmp_path, capsys):
    folder = shutil.copytree(TINY, tmp_path / "step-1")
    index("../good/model.safetensors")(folder)
    assert "no file of its folder" in refused(capsys, lm.load_model, Args(), CPU, folder)


@pytest.mark.parametrize("change", [index("shard.safetensors"), lambda folder: None], ids=["sharded", "whole"])
def test_whole_folders_load(change, tmp_path):
    folder = shutil.copytree(TINY, tmp_path / "model")
    change(folder)
    args = Args(model_name=str(folder))
    lm.load_tokenizer(args)
    loaded = lm.load_model(args, CPU).state_dict()
    assert all(torch.equal(x, loaded[key]) for key, x in load_file(TINY / "model.safetensors").items())


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_names_that_transformers_changes_on_the_way_are_not_missing(kind, tmp_path, tokenizer):
    """GPT-2's files leave out a prefix and have masks of old; a mixture's have a tensor an expert, its model has one."""
    if kind == "gpt2":
        model = make_model("gpt2")
    else:
        model = random_model(kind, SMALL | {"num_local_experts": 2})
        model.generation_config = GenerationConfig(eos_token_id=256)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    if kind == "gpt2":
        old = {key.removeprefix("transformer."): x for key, x in load_file(tmp_path / "model.safetensors").items()}
        old["h.0.attn.bias"] = torch.ones(1, 1, 128, 128, dtype=torch.uint8)
        save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    args = Args(model_name=str(tmp_path))
    lm.load_tokenizer(args)
    loaded = lm.load_model(args, CPU)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), loaded.parameters(), strict=True))


# ---- payloads: each would leave a mark -------------------------------------------------------------------------------


class Payload:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


def code(file: str, **fields):
    """A module in the folder that leaves the mark when it is imported, and what asks for it."""

    def change(folder):
        source = f"open({str(folder / 'mark')!r}, 'w')\nclass Evil: model_type = 'evil'\n"
        (folder / "payload.py").write_text(source)
        edited(file, **fields)(folder)

    return change


def pickled(name: str):
    def change(folder):
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(pickle.dumps(Payload(folder / "mark")))

    return change


AUTO = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "payload.Evil")
PAYLOADS = {
    "a config's code": code("config.json", model_type="evil", auto_map=AUTO),
    "a known model's code": code("config.json", auto_map=AUTO),
    "a tokenizer's code": code(
        "tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": ["payload.Evil", "payload.Evil"]}
    ),
    "a pickle": pickled("pytorch_model.bin"),
    "a pickle in disguise": pickled("model.safetensors"),
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_a_model_folder_runs_nothing_and_asks_nothing(name, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(TINY, tmp_path / "model")
    PAYLOADS[name](folder)
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("asked on the terminal"))
    args = Args(model_name=str(folder))
    try:
        lm.load_tokenizer(args)
        lm.load_model(args, CPU)
    except SystemExit as stop:
        assert stop.code == 2 and re.fullmatch(r"error: [^\n]+\n", capsys.readouterr().err)
    for load in (lm.load_model, lm.load_tokenizer):  # nor does one alone
        try:
            load(args, *([CPU] if load is lm.load_model else []))
        except SystemExit as stop:
            assert stop.code == 2
    assert not (folder / "mark").exists()
    if name == "a pickle":
        assert "save_pretrained(folder) writes model.safetensors" in refused(capsys, lm.load_tokenizer, args)
