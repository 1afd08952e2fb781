"""Whether a model folder is whole and can be trusted: read from names, shapes and configs, before any weight is."""

from pathlib import Path

import torch
from pydantic import StrictInt
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM
from typing_extensions import TypedDict

from common.cli import fail
from common.files import Object, read_json

# code and pickles that come with a model are never run; which weights were missing or left over is for check_names
SAFE = {"trust_remote_code": False, "use_safetensors": True, "dtype": torch.float32}
SAFE |= {"output_loading_info": True, "ignore_mismatched_sizes": True}


class Index(TypedDict):
    metadata: Object
    weight_map: dict[str, str]


class Generation(TypedDict, total=False):
    eos_token_id: StrictInt | list[StrictInt] | None


def some(names) -> str:
    """The first few of these names."""
    names = sorted(map(str, names))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def reason(error: Exception) -> str:
    """What a library says, in short."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def outline(name: str, config):
    """The model that a config describes, without weights."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a config of a wrong kind or with impossible numbers raises whatever it runs into
        fail(f"'{name}': a {config.model_type} config makes no causal language model ({reason(error)})")


def check_folder(name: str):
    """The config and outline of a folder or hub id. Of a folder: with every weight there, in its shape and as a float.

    Only configs and the headers of weight files are read. Exit code 2 for whatever is wrong with them.
    """
    folder = Path(name)
    if (folder / "adapter_config.json").exists():
        fail(f"'{name}' is an adapter, not a model: merge it into its base (peft: merge_and_unload, save_pretrained)")
    if folder.is_dir():
        found = read_json(folder / "config.json", Object, "it should describe a model of transformers")
        read_json(folder / "generation_config.json", Generation, "config.json will do without this file", optional=True)
        if foreign := {"quantization_config", "transformers_weights"} & set(found):
            fail(f"'{name}' has weights of another kind ({some(foreign)} in config.json); floats can be trained")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # what is missing, damaged or asks for code of its own raises whatever its reader raises
        where = "its config.json describes none" if folder.is_dir() else "no folder, nor found on the hub"
        fail(f"no model '{name}': {where} ({reason(error)}); without --model-name the bundled model needs no network")
    model = outline(name, config)
    if folder.is_dir():
        check_weights(folder, config, model)
    return config, model


def check_weights(folder: Path, config, model) -> None:
    """The headers of a folder's weight files hold all that `model`, an outline, needs."""
    shapes, integers = {}, set()
    for file in weight_files(folder):
        try:
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    shapes[key] = tensors.get_slice(key).get_shape()
                    if tensors.get_slice(key).get_dtype() not in ("F64", "F32", "F16", "BF16"):
                        integers.add(key)
        except (OSError, SafetensorError) as error:
            fail(f"the weights '{file}' cannot be loaded ({reason(error)}): copy the file again")
    own = {n for full, _ in model.named_parameters() for n in (full, full.removeprefix(f"{model.base_model_prefix}."))}
    if integers := {key for key in integers if key in own or key.endswith("weight")}:
        fail(f"'{folder}' has weights that are no floating-point numbers ({some(integers)}), which cannot be trained")
    empty = {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}  # no memory behind it
    try:
        _, info = type(model).from_pretrained(None, config=config, state_dict=empty, **SAFE)
    except Exception as error:  # renaming and merging tensors of an unknown layout raises whatever it runs into
        fail(f"the weights of '{folder}' do not fit its config ({reason(error)})")
    check_names(folder, info)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, as transformers chooses them."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if any(folder.glob("pytorch_model*.bin")) and not index.exists():
        fail(
            f"'{folder}' holds its weights as a pickle, which can run code when it is read; where you trust it, "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder) writes model.safetensors"
        )
    shards = read_json(index, Index, "a model folder holds it, or model.safetensors")["weight_map"].values()
    for shard in shards:
        if Path(shard).name != shard or not (folder / shard).exists():
            fail(f"'{index}' names '{shard}', which is no file of its folder: copy all files of the model")
    return [folder / shard for shard in sorted(set(shards))]


def check_names(name, info: dict) -> None:
    """No weight is missing, left over or of another shape, as transformers tells it."""
    for key, found, expected in sorted(info["mismatched_keys"]):
        fail(f"'{name}': {key} is {tuple(found)}, by config.json {tuple(expected)}; it is another model's config")
    if info["missing_keys"]:
        fail(f"'{name}' lacks {some(info['missing_keys'])}, which would be random: copy the whole model")
    if info["unexpected_keys"]:
        fail(f"'{name}' holds {some(info['unexpected_keys'])}, for which its config.json has no place")


def check_tokens(name: str, tokenizer, size: int, stop_ids) -> None:
    """The tokenizer has words, the model has room for them (`size` ids), and a completion can end."""
    if not tokenizer("1 + 2 = 3").input_ids:
        fail(f"'{name}' holds no tokenizer: copy tokenizer.json and tokenizer_config.json of the model into it")
    markers = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}  # never part of a prompt
    if words := {word for word, i in tokenizer.get_vocab().items() if i >= size and i not in markers}:
        fail(f"'{name}': the tokenizer has {len(tokenizer)} tokens, the model {size}: no place for {some(words)}")
    if not stop_ids:
        fail(f"'{name}' names no end token: no completion would end; set eos_token_id in its generation_config.json")
    if wrong := [i for i in stop_ids if not 0 <= i < size]:
        fail(f"'{name}': end token {wrong[0]!r} is none of the model's {size} ids; correct generation_config.json")
