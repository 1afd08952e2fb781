"""Wrong flags, by hand: what `wrong_inputs.py` tries besides the values beyond the declared bounds.

A line `--flag: a | b c` is two inputs, `--flag a` and `--flag b c`, behind the flags of a short run. `{here}` is a folder
of the case's own, with an empty `file` in it; `{stock}` holds one unfinished run of each script and the models and data
of `short_runs.starting_points`.
"""

import importlib.util
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

LANGUAGE = ["grpo_arithmetic", "grpo_mixed"]
SCRIPTS = [*LANGUAGE, "ppo_fetch", "gr00t_finetune", "ppo_gr00t"]


@dataclass
class Case:
    """A wrong input: `words` behind the script's own flags (or alone), and what is broken for it."""

    script: str
    kind: str
    words: list[str]
    alone: bool = False
    spoil: Callable[[Path, Path], object] = lambda stock, here: None  # makes {here} from {stock}
    name: str = ""  # of what is spoilt
    loads: bool = False  # that it is wrong can be seen in the weights only: reading them is no fault

    def __str__(self) -> str:
        return f"{self.script} {' '.join(map(repr, self.words))[:100]} {self.name}"


NAMES = ["", "a/b", "../../x", "/tmp/x", "a\nb", "x" * 300, ".", "..", "-", "a b\n"]
EVERYWHERE = """
--output-dir: '' | {here}/file | {here}/file/below | /proc/nowhere | /dev/null
--device: foo | '' | meta | mps | cuda:0 | CPU | Auto | xla
--seed: -1 | 9223372036854775808 | 18446744073709551616 | 1.5 | nan |
--no-such-flag: 3
word:
--track=maybe:
--tracker: foo | '' | Wandb
--wandb-mode: foo
--keep: 0
--save-every: -1
"""
RESUME = """
--resume: '' | {here}/nowhere | {here}/file | {here} | / | {stock}/lm | {stock}/demos
"""
GRPO = """
--rewards: binary binary | nonsense | | binary length --reward-weights 1
--reward-weights: nan | inf
--min-num: 5 --max-num 2
--operations: '' | % | '+ -'
--batch-size: 7
--micro-batch-size: 3
--num-generations: 1
--fsdp:
--attn-implementation: flash_attention_2
--max-completion-length: 5000
--temperature: 0 | -1 | inf
--model-name: '' | {here}/nowhere | nobody/nothing | {here} | {stock}/gr00t | {here}/file
--init-from: '' | {here}/nowhere | {here} | {stock}/ppo_fetch | {stock}/grpo_arithmetic
--eval-dataset: '' | {here}/nowhere.jsonl | nobody/nothing | {here} | {stock}/demos/meta/info.json
--epsilon: 1e300 | -0.1
--max-grad-norm: -1
--eval-samples: 0
--kl-gradient: k2 | reverse --beta 0
--importance: row
--baseline: mean
--normalize-rewards: | --rewards binary length --baseline others | --rewards binary length --scale-rewards none
--top-entropy: -0.1 | 1.1 | nan
--chat: | --system-prompt ''
--system-prompt: brief
--thinking:
"""  # --init-from with a --model-name, which the short run has, contradicts itself
FLAGS = {
    "grpo_arithmetic": f"""{GRPO}
--n-samples: 100000000
--fresh: --min-num 3 --max-num 3 --operations +
--tasks: words
""",
    "grpo_mixed": f"""{GRPO}
--curriculum progressive: --operations + | --min-num 3
--curriculum dynamic: --operations + | --min-num 3
--curriculum three_stage: --min-num 3
--tasks: nonsense | words words | rg: | rg:nonsense |
--tasks word_problems --word-problems: {{here}}/nowhere.jsonl | {{stock}}/eval.jsonl | a/b
--proportions: 1 2 3 | 1 nan | 1 -1 | 1e-300 1
""",
    "ppo_fetch": """
--env-id: '' | Nothing-v0 | FetchReach | FetchReach-v1 | FetchReach-v99 | CartPole-v1
--env-backend gymnasium --env-id: '' | Nothing-v0 | Blackjack-v1 | Ant-v2 | CartPole-v99 | a/b/c | nothing:CartPole-v1
--env-backend gymnasium --env-id CartPole-v1: --observation-mode full | --reward-mode shaped
--num-envs 3 --env-groups 2:
--num-minibatches: 7
--total-timesteps: 10
--eval-only:
--gamma: 1.1
--num-threads: 0 | 1000000
--torch-threads: 0
--init-from: '' | {here} | {here}/nowhere | {stock}/ppo_gr00t
--init-from {stock}/ppo_fetch: --hidden 16 | --env-id FetchPush-v4
--log-std-init: 1e9
""",
    "gr00t_finetune": """
--model-path: '' | {here} | {here}/nowhere | {here}/file | {stock}/lm | a/b | Lite | {stock}/ppo_fetch
--model-path {stock}/gr00t: --lora-rank 4 --tune-llm
--model-path {stock}/gr00t --eval-only: --embodiment-tag gr1
--dataset-path: '' | {here} | {here}/nowhere | {here}/file | {stock}/lm | a/b | | {stock}/demos {here}/nowhere
--data-config: '' | nonsense | nowhere:X | json:dumps | json: | :X | so100
--lora-rank: 4
--lora-full-model:
--batch-size 5 --gradient-accumulation-steps 2:
--fsdp:
--eval-only:
--val-episodes: 6 | 100
--execute-steps: 17 | 0
--denoising-sweep: 0
--adam-betas: 0.9 | 0.9 1 | -1 0.9
--warmup-ratio: 1.5
--embodiment-tag: nobody
--tokenizer: {here}/nowhere
--cache-dir: ''
--torch-threads: 1000000
--num-workers: -1
""",
    "ppo_gr00t": """
--model-path: '' | {here} | {here}/nowhere | {here}/file | {stock}/lm | a/b | lite | {stock}/ppo_fetch
--env-id: '' | FetchSlide-v4 | CartPole-v1 | FetchReach | FetchReach-v1
--data-config: '' | nonsense | nowhere:X | json:dumps
--noise-range: 0.2 0.1 | 0.1 | 0 1
--sampler flow-noise --critic-warmup: 0
--lora-full-model:
--execute-steps: 17
--num-minibatches: 3
--total-timesteps: 10
--num-envs 3 --env-groups 2:
--embodiment-tag: gr1
--noise-level: -1
--num-threads: 1000000
--tokenizer: {here}/nowhere
--lora-rank: -1
""",
}
if not torch.cuda.is_available():
    EVERYWHERE += "--device: cuda\n"
if not importlib.util.find_spec("Box2D"):
    FLAGS["ppo_fetch"] += "--env-backend gymnasium --env-id: LunarLander-v3\n"


def inputs(table: str) -> Iterator[list[str]]:
    """The inputs that the lines of a table stand for, as words."""
    for line in filter(None, table.splitlines()):
        flag, _, values = line.partition(":") if line.endswith(":") else line.partition(": ")
        yield from (shlex.split(flag) + shlex.split(value) for value in values.split("|"))


def flag_cases() -> Iterator[Case]:
    for number, script in enumerate(SCRIPTS):
        yield from (Case(script, "names", ["--exp-name", name]) for name in NAMES)
        yield from (Case(script, "flags", words) for words in inputs(EVERYWHERE + FLAGS[script]))
        other = SCRIPTS[(number + 1) % len(SCRIPTS)]
        resumed = [*inputs(RESUME), ["--resume", f"{{stock}}/{other}"]]
        yield from (Case(script, "run folders", words, alone=True) for words in resumed)
        yield Case(script, "flags", ["--resume", f"{{stock}}/{script}", "--seed", "7"], alone=True)
