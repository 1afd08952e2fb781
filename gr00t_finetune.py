"""GR00T N1.5 or N1.7: a flow-matching policy that turns camera images, joint state and an instruction into actions.

    data        LeRobot folders; sample = frame, state, instruction, the next H actions a, normalised to [-1, 1]
    noise       eps ~ N(0, I),  s ~ Beta(1.5, 1),  t falls with s (see flow_time),  x_t = (1 - t) eps + t a
    objective   minimise  mean over valid entries of |v(x_t, t, frame, state, instruction) - (a - eps)|^2
    policy      x_0 ~ N(0, I),  x <- x + v(x, k / K) / K  for k = 0 .. K - 1,  K = 4 (Euler)

Every line of the algorithm that is an equation carries it: grep for "eq:". The networks, their published transforms
and the reading of data sets are in common/robot/. --model-path says which of the two versions it is; what differs
between them is asked of the model, and tabled in docs/gr00t_finetune.md.

Against the reference: no flash-attn, no logits that nobody reads, frames are decoded once and never reopened, episodes
are held out and evaluated beside two baselines, --resume is bit-exact, a LoRA run saves a whole model.

Dims: B samples, V cameras, S tokens, H action steps (N1.5: 16, N1.7: 40), D padded action dims (32, 132), of which the
robot has some.

    uv run python gr00t_finetune.py                              # tiny model, bundled demonstrations, a laptop CPU
    uv run python gr00t_finetune.py --model-path lite            # no images: closed loop on Fetch in minutes
    uv run python gr00t_finetune.py --model-path tiny-n17        # the same with N1.7
    uv run python gr00t_finetune.py --model-path nvidia/GR00T-N1.5-3B --dataset-path DIR --data-config so100_dualcam
    uv run python gr00t_finetune.py --eval-only --model-path RUN_DIR/best --dataset-path DIR

Equations next to symbols, metrics and results: docs/gr00t_finetune.md.
"""

import common.stop  # noqa: F401, first: Ctrl-C is heard while the rest is imported

import math
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import tyro
from annotated_types import Interval, MinLen
from torch import Tensor, nn
from torch.utils.data import Dataset

from common.cli import Count, Name, Natural, NonNegative, Partial, Positive, Text, Threads, fail, parse
from common.log import watched
from common.parallel import World, clip_gradients, shard, sum_gradients
from common.robot.demonstrations import Demonstrations, Split, check_units, make_metadata, prepared, read_mixture
from common.robot.fetch import FetchVec
from common.robot.fetch_robot import INSTRUCTIONS, FetchRobot, misfit
from common.robot.gr00t import HeadConfig, Network
from common.robot.gr00t_n15 import GR00TConfig
from common.robot.gr00t_n17 import GR00TN17Config
from common.robot.lerobot import Episodes, find_folder, read_info, read_modality
from common.robot.lora import LoRALinear, load_adapters
from common.robot.policy import GR00TArgs, Policy, Stored, read_stored, save_policy, trained_parts
from common.robot.report import Tally, describe, draw_open_loop, in_words, open_loop_tables, student
from common.robot.transforms import to_device
from common.robot.video import no_renderer
from common.run import FREE, Run, RunArgs
from common.stats import wilson
from common.streams import stream, stream_seed

Batch = dict[str, Tensor]

# ---- 1. Config -------------------------------------------------------------------------------------------------------


@dataclass
class Args(GR00TArgs, RunArgs):
    # run
    exp_name: Name = "gr00t_finetune"
    tags: tuple[str, ...] = ("gr00t", "flow-matching")
    torch_threads: Threads | None = None  # CPU threads of torch; default: torch's own choice
    save_every: Annotated[Natural, tyro.conf.arg(aliases=["--save-steps"])] = 1000
    """optimizer steps between checkpoints, 0: only at the end"""

    # data
    dataset_path: Annotated[tuple[Text, ...], MinLen(1)] | None = None
    """LeRobot v2.0, v2.1, v3.0 folders or hub ids (user/name or user/name@revision); several make a mixture;
    default: the checkpoint's with --eval-only, assets/fetch_demos otherwise"""
    val_episodes: Natural | None = None
    """episodes held out of each data set, evenly spaced; default: a tenth, at least 1"""
    max_samples: Count | None = None  # train on this many frames, drawn at random from all data sets; default: all
    balance_dataset_weights: bool = True
    """several data sets: draw them in proportion to their frames; off: equally often"""
    balance_trajectory_weights: bool = True
    """several data sets: draw episodes in proportion to their frames; off: equally often"""
    num_workers: Annotated[int, Interval(ge=0, le=1024)] = 0
    """processes that prepare batches; 0: in the training process"""
    cache_side: Natural = 256
    """larger frames are cached at SIDE x SIDE, N1.7's at that short side (1080p: a 30th of the disk); 0: as recorded"""
    cache_dir: Text | None = None  # folder of the memory-mapped frame cache; default: <output-dir>/frame_cache
    prompt_form: Literal["plain", "bracketed"] = "plain"
    """bracketed: the instruction as ['…'], which the reference's inference writes by accident"""

    # model
    model_path: Text = "tiny"
    """tiny, lite, tiny-n17, lite-n17, a folder in the published layout, a run folder, or a hub id such as
    nvidia/GR00T-N1.5-3B or nvidia/GR00T-N1.7-3B"""
    data_config: Text | None = None
    """cameras, joints, units: one of common/robot/data_configs.py, auto (all of modality.json), module:NAME, for N1.7 a
    FILE.py; default: the checkpoint's with --eval-only, fetch for a Fetch robot, fourier_gr1_arms_only otherwise"""
    lora_dropout: Partial = 0.1  # dropout before the adapters
    mask_padding: bool = False  # keep pad tokens out of the action head's attention (the reference lets them in)

    # update
    max_steps: Count | None = None  # optimizer steps; default: by model size, 10,000 for the full one
    batch_size: Count | None = None
    """samples of an optimizer step, over all processes; default: by model size, 32 for the full one"""
    noises_per_sample: Count | None = None
    """noises and times of the flow drawn for each sample, 1 to 8: the backbone runs once for all; default: by model
    size, 1 for the full one as in the reference"""
    gradient_accumulation_steps: Count = 1
    """micro-batches that a batch is cut into; the result is that of the whole batch"""
    learning_rate: Positive | None = None  # AdamW step size at its peak; default: by model size, 1e-4 for the full one
    adam_betas: tuple[Partial, Partial] | None = None
    """AdamW's memory of gradients and of their squares; default: by model size, 0.95 0.999 for the full one"""
    weight_decay: NonNegative = 1e-5  # AdamW decay of matrices; biases and LayerNorms have none
    warmup_ratio: Partial = 0.05
    """share of the steps that raise the step size from 0; a half cosine lowers it to 0 afterwards"""
    max_grad_norm: NonNegative | None = None
    """gradient norm to clip to, 0: never; default: by model size, 1 for the full one"""
    amp: Literal["auto", "off", "bf16"] = "auto"  # mixed precision; auto: bf16 on a GPU, off on a CPU
    augment: bool = True  # random crop and colour jitter
    state_dropout: Partial | None = None
    """share of the training samples whose state is hidden, 0 to 0.8; default: by model size, 0.2 for the full N1.7"""

    # speed: neither changes what is computed, but for rounding and dropout's random stream
    compile: bool = False
    """torch.compile the action head, for training and sampling; the first steps take minutes at full size"""
    fsdp: bool = False
    """several processes share one copy of weights, gradients and AdamW moments (FSDP) instead of a copy each"""

    # evaluation
    log_every: Count = 10  # steps between lines of metrics
    eval_every: Natural | None = None
    """steps between measurements of the validation loss, 0: only at the end; default: a fifth of the run"""
    eval_batches: Count = 8  # validation batches, always the same frames and noise
    eval_trajs: Count | None = None  # held-out episodes of the open-loop evaluation; default: all
    eval_steps: Count = 150  # steps of each, at most
    denoising_steps: Count = 4  # Euler steps K of the policy
    denoising_sweep: tuple[Count, ...] = (1, 2, 4, 8)  # other numbers of Euler steps to measure at the end
    closed_loop: bool = True  # let the policy act in the Fetch simulator, where the data is of it
    closed_loop_episodes: Count = 100  # episodes of each task, always the same ones
    execute_steps: Annotated[int, Interval(ge=1, le=1000)] = 8
    """actions taken of each predicted chunk before the next look, at most all of it"""


# What differs by model where a flag is not given.
SHORT = dict(adam_betas=(0.9, 0.95), max_grad_norm=10.0, state_dropout=0.0)  # minutes of training: large steps
FULL = dict(max_steps=10_000, noises_per_sample=1, learning_rate=1e-4, max_grad_norm=1.0)
RECIPES = {
    "tiny": SHORT | dict(max_steps=1800, batch_size=16, noises_per_sample=4, learning_rate=5e-3),
    "lite": SHORT | dict(max_steps=2000, batch_size=64, noises_per_sample=1, learning_rate=6e-3),
    "n15": FULL | dict(batch_size=32, adam_betas=(0.95, 0.999), state_dropout=0.0),
    "tiny-n17": SHORT | dict(max_steps=1800, batch_size=16, noises_per_sample=4, learning_rate=5e-3),
    "lite-n17": SHORT | dict(max_steps=2000, batch_size=64, noises_per_sample=1, learning_rate=6e-3),
    "n17": FULL | dict(batch_size=64, adam_betas=(0.9, 0.999), state_dropout=0.2),
}
FIGURES = 3  # held-out episodes that are drawn
EVALUATION = 0  # seed of the noise in evaluations, whatever --seed is
FRESH = {"tiny": partial(GR00TConfig.tiny, patch_size=16, vocab_size=280), "lite": GR00TConfig.lite}
FRESH |= {"tiny-n17": GR00TN17Config.tiny, "lite-n17": GR00TN17Config.lite}


def find_stored(args: Args, checkpoint: Path | None = None) -> Stored:
    """What the folder says that the model comes from, or what is known of a fresh one."""
    if args.model_path in FRESH and not checkpoint:
        config = FRESH[args.model_path]()
        return Stored(args.model_path, sees=not config.instruction_vocab, version=config.version)
    return read_stored(str(checkpoint or args.model_path))


def resolve(args: Args, stored: Stored | None = None) -> Args:
    """Fills in what depends on the model and, in an evaluation, on the checkpoint."""
    old = {}
    if args.eval_only and args.model_path not in FRESH:
        stored = stored or find_stored(args)
        old = stored.args | ({"embodiment_tag": stored.about.embodiment_tag} if stored.about else {})
    for name in ("dataset_path", "embodiment_tag", "val_episodes", "batch_size"):
        if getattr(args, name) is None and old.get(name) is not None:
            args = replace(args, **{name: tuple(old[name]) if isinstance(old[name], list) else old[name]})
    fastest = "bf16" if torch.cuda.is_available() and args.device != "cpu" else "off"
    recipe = RECIPES[args.model_path if args.model_path in FRESH else stored.version if stored else "n15"]
    args = replace(
        args,
        dataset_path=args.dataset_path or ("assets/fetch_demos",),
        embodiment_tag=args.embodiment_tag or "new_embodiment",
        tune_llm=args.tune_llm or args.model_path in FRESH,  # nothing random stays as it is
        tune_visual=args.tune_visual or args.model_path in FRESH,
        amp=fastest if args.amp == "auto" else args.amp,
        **{key: value for key, value in recipe.items() if getattr(args, key) is None},
    )
    return replace(args, eval_every=args.max_steps // 5 if args.eval_every is None else args.eval_every)


def check(args: Args, world: World) -> None:
    """What can be wrong with the flags alone."""
    parts = world.size * args.gradient_accumulation_steps
    if args.batch_size and args.batch_size % parts:
        fail(
            f"--batch-size {args.batch_size} does not divide into {world.size} process(es) x "
            f"--gradient-accumulation-steps {args.gradient_accumulation_steps}; "
            f"try --batch-size {max(args.batch_size // parts, 1) * parts}"
        )
    if args.lora_rank and args.model_path in FRESH:
        fail(f"--lora-rank adapts a trained model; {args.model_path} is a fresh one: give --model-path a checkpoint")
    if args.lora_rank and (args.tune_llm or args.tune_visual or not args.tune_diffusion_model):
        fail(
            "--lora-rank trains adapters and embodiment layers only: drop --tune-llm, --tune-visual and "
            "--no-tune-diffusion-model; --lora-full-model puts adapters into the backbone too"
        )
    if args.fsdp and (args.lora_rank or args.compile):
        fail("--fsdp goes with neither --lora-rank, whose adapters are small, nor --compile: drop one of them")
    if args.fsdp and world.size == 1:
        fail("--fsdp shares the weights among processes: start several with uv run torchrun --nproc-per-node N")
    if args.eval_only and args.model_path in FRESH:
        fail("--eval-only measures a trained model: give --model-path a run folder or a checkpoint")


# ---- 2. Data: who trains on what, in which order ---------------------------------------------------------------------


def set_weights(sets: list[Episodes], args: Args) -> np.ndarray:
    """Probability of drawing from each data set."""
    sizes = np.array([episodes.starts[-1] for episodes in sets], dtype=np.float64)
    return sizes / sizes.sum() if args.balance_dataset_weights else np.full(len(sets), 1 / len(sets))


def read_data(args: Args, stored: Stored, say=print, trained: bool = False) -> tuple[Args, Demonstrations, dict]:
    """Reads and checks everything but frames. Returns args with the data config named, and the metadata to save.

    trained: the checkpoint knows how to see and act, in which units; the flags and the data set have to agree with it.
    """
    folders, tag = [find_folder(path) for path in args.dataset_path], args.embodiment_tag
    info = read_info(folders[0])
    modality = read_modality(folders[0], info, lambda text: None)
    if trained:
        about = stored.acts(args.data_config, tag, args.tokenizer, modality)
        if not stored.about:  # an older folder: the flags say it
            about = about.model_copy(update=dict(cache_side=args.cache_side, prompt_form=args.prompt_form))
        elif args.prompt_form != Args.prompt_form:
            about = about.model_copy(update=dict(prompt_form=args.prompt_form))
        sets = read_mixture(folders, about.data_config, f"checkpoint '{stored.source}'", say)
        metadata = stored.embodiment(tag, about.data_config)
        check_units(sets, about.data_config, metadata, stored.source)
    else:
        name = args.data_config or ("fetch" if info.get("robot_type") == "fetch" else "fourier_gr1_arms_only")
        config = stored.find_config(name, modality)
        config = config if stored.sees else replace(config, video=())
        sets = read_mixture(folders, config, name, say)
        metadata = make_metadata(sets, config, set_weights(sets, args), tag)
        said = dict(cache_side=args.cache_side, prompt_form=args.prompt_form, tokenizer=args.tokenizer)
        about = stored.describe(name, config, tag, fps=info.get("fps"), **said)
    data = Demonstrations(sets, about.data_config, metadata, stored.row(tag), about)
    return replace(args, data_config=about.name), data, stored.metadata | {tag: metadata}


def validation_episodes(count: int, held_out: int | None) -> list[int]:
    """Positions of the episodes to hold out, evenly spaced, so that every stretch of the recording is represented."""
    held_out = min(max(count // 10, 1), count - 1) if held_out is None else held_out
    if held_out >= count:
        fail(f"--val-episodes {held_out} leaves nothing to train on: the data set has {count} episodes")
    return sorted({int((i + 0.5) * count / held_out) for i in range(held_out)})


def hold_out(data: Demonstrations, args: Args) -> Split:
    held = data.split([validation_episodes(len(episodes.ids), args.val_episodes) for episodes in data.sets])
    if args.max_samples and args.max_samples < len(held.rows):
        held.rows = np.sort(stream(args.seed, "frames").choice(held.rows, args.max_samples, replace=False))
        held.episodes = [e for e in held.episodes if np.any((held.rows >= e.start) & (held.rows < e.end))]
    if args.eval_only and not held.val_episodes:
        fail("--eval-only needs held-out episodes; --val-episodes is 0 or the data set has one episode")
    return held


@dataclass
class Plan:
    """Which samples a batch is made of, and from which random stream each takes its augmentation, noise and time."""

    rows: np.ndarray  # (B,)
    draws: np.ndarray  # (B,) numbers of the samples' streams: how many samples were drawn before, or the row
    stream: str = "training"
    seed: int = EVALUATION  # of the run in training; evaluations draw the same in every run
    length: int = 0  # S: prompts are padded to this, at least
    augment: bool = False
    noises: int = 1  # R: noises and times of each sample
    hidden: float = 0.0  # share of the samples whose state is hidden


class Samples(Dataset):
    """Batches of demonstrations, with the noises and times of the flow that belong to their draws.

    `samples[plan]`: what the interface sees of the rows (images, ids and mask of the prompts, state), action and
    action_mask (B, H, D), embodiment_id (1,), and noise (B * R, H, D) and t (B * R,), R = `plan.noises` in a row for
    each sample; where states are hidden, state_dropped (B,) too.
    """

    def __init__(self, data: Demonstrations, config: HeadConfig):
        self.data, self.config = data, config

    def __getitem__(self, plan: Plan) -> Batch:
        c, R = self.config, plan.noises
        rngs = [stream(plan.seed, plan.stream, draw) for draw in plan.draws]
        # eq: s ~ Beta(1.5, 1): small t, that is much noise, is drawn more often
        t = [flow_time(rng.beta(c.noise_beta_alpha, c.noise_beta_beta, R), c) for rng in rngs]
        noise = [rng.standard_normal((R, c.action_horizon, c.action_dim), dtype=np.float32) for rng in rngs]
        batch = self.data.batch(plan.rows, plan.length, rngs if plan.augment else None)
        batch["noise"] = torch.from_numpy(np.concatenate(noise))  # (B R, H, D)
        batch["t"] = torch.from_numpy(np.concatenate(t).astype(np.float32))  # (B R,)
        if plan.hidden:  # twice, as in the reference: the numbers, to mid-range, and the token that is made of them
            hidden = torch.from_numpy(np.array([rng.random(2) < plan.hidden for rng in rngs]))  # (B, 2)
            batch["state"][hidden[:, 0]] = 0
            batch["state_dropped"] = hidden[:, 1]
        return batch


class Order:
    """Which row each draw of the run takes: a function of the seed and the draw's number, so a run can go on anywhere.

    One data set: permutation after permutation. Several: data set by weight, episode, frame (uniform in proportion).
    """

    def __init__(self, data: Demonstrations, rows: np.ndarray, args: Args):
        self.seed, self.by_frame = args.seed, args.balance_trajectory_weights
        self.weights = set_weights(data.sets, args)
        self.pools = [rows[data.part[rows] == n] for n in range(len(data.sets))]
        self.by_episode = [np.split(pool, np.flatnonzero(np.diff(data.end[pool])) + 1) for pool in self.pools]
        self.permutation: tuple[int, np.ndarray] = (-1, rows)

    def row(self, draw: int) -> int:
        if len(self.pools) == 1:
            epoch, i = divmod(draw, len(self.pools[0]))
            if self.permutation[0] != epoch:
                self.permutation = (epoch, stream(self.seed, "epoch", epoch).permutation(self.pools[0]))
            return int(self.permutation[1][i])
        rng = stream(self.seed, "mixture", draw)
        n = rng.choice(len(self.weights), p=self.weights)
        pool = self.pools[n] if self.by_frame else self.by_episode[n][rng.integers(len(self.by_episode[n]))]
        return int(pool[rng.integers(len(pool))])


def plans(order: Order, data: Demonstrations, args: Args, world: World, first: int):
    """The micro-batches of this process from step `first` on. A step's batch does not depend on how it is cut."""
    parts = np.array_split(np.arange(args.batch_size), world.size * args.gradient_accumulation_steps)
    own = parts[world.rank * args.gradient_accumulation_steps :][: args.gradient_accumulation_steps]
    for step in range(first, args.max_steps):
        draws = np.arange(step * args.batch_size, (step + 1) * args.batch_size)
        rows = np.array([order.row(int(draw)) for draw in draws])
        shared = dict(length=data.longest_prompt(rows), augment=args.augment, noises=args.noises_per_sample)
        shared |= dict(hidden=args.state_dropout)
        for part in own:
            yield Plan(rows[part], draws[part], seed=args.seed, **shared)


# ---- 3. Model --------------------------------------------------------------------------------------------------------


def fresh_config(args: Args, horizon: int) -> HeadConfig:
    """Of a model to be made, for the chunks of the data config."""
    return FRESH[args.model_path](mask_padding=args.mask_padding, action_horizon=horizon, max_seq_len=max(horizon, 64))


def plan_model(args: Args, stored: Stored, horizon: int) -> HeadConfig:
    """What will be loaded, or made (no folder). What is wrong with its files or the flags ends the program here."""
    if stored.folder:
        model, _ = stored.network.plan(stored.folder, attn_implementation=args.attn_implementation)
    else:
        with torch.device("meta"):
            model = stored.network(fresh_config(args, horizon), args.attn_implementation)
    trained_parts(model, args)
    return model.config


def load_model(args: Args, stored: Stored, horizon: int, run: Run) -> tuple[Network, dict[str, LoRALinear]]:
    """The model with what trains unfrozen, and its adapters. What is frozen is stored as autocast computes it."""
    torch.manual_seed(stream_seed(args.seed, "weights") % 2**63)
    network = stored.network
    if not stored.folder:
        model = network.toy(fresh_config(args, horizon), args.attn_implementation).to(run.world.device)
    else:
        frozen = not (args.tune_llm or args.tune_visual)
        model = network.from_pretrained(
            stored.folder,
            device=run.world.device,
            backbone_dtype=torch.bfloat16 if args.amp == "bf16" and frozen else torch.float32,
            mask_padding=args.mask_padding or None,
            attn_implementation=args.attn_implementation,
        )
    if args.model_path in FRESH:
        model.carried = {}  # made anew by every save of such a model, as if it had never been loaded
    torch.manual_seed(stream_seed(args.seed, "adapters") % 2**63)
    adapters = trained_parts(model, args)
    if args.compile:
        model.compile_head()
    if args.fsdp:
        shard(model, model.units(), run.world, methods=("vl_features", "velocity"))
    return model, adapters


def set_training(model: Network, adapters: dict[str, LoRALinear]) -> None:
    """Training mode: frozen parts stay in evaluation mode, adapters drop out wherever they are."""
    model.train()
    for adapter in adapters.values():
        adapter.dropout.train()


def parameter_groups(model: Network, weight_decay: float) -> list[dict]:
    """Trainable parameters, decayed and not: no decay for LayerNorms and for names with "bias" in them.

    N1.7 spares RMSNorms too, N1.5 decays them. The embodiment layers' biases are called `b`, so they decay in both.
    """
    norms = {f"{n}.{k}" for n, m in model.named_modules() if isinstance(m, nn.LayerNorm) for k in ("weight", "bias")}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name not in norms and not any(part in name for part in model.not_decayed)].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


# ---- 4. Algorithm ----------------------------------------------------------------------------------------------------


def flow_time(s, config: HeadConfig):
    """A draw of Beta(1.5, 1) -> time of the flow: 0 is noise, 1 is data. Its density falls with t, the mean is 0.4."""
    # eq: t = (0.999 - s) / 0.999 (N1.5);  t = 0.999 (1 - s) (N1.7)
    return (config.noise_s - s) / config.noise_s if config.version == "n15" else config.noise_s * (1 - s)


def sample_time(config: HeadConfig, count: int, device: torch.device) -> Tensor:
    """(count,) times of the flow."""
    beta = torch.distributions.Beta(config.noise_beta_alpha, config.noise_beta_beta)
    return flow_time(beta.sample((count,)).to(device), config)


def velocity_error(
    model: Network, batch: Batch, noise: Tensor | None = None, t: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared error (B * R, H, D) of the predicted velocity, which entries count, the times t (B * R,) of it."""
    R = 1 if noise is None else len(noise) // len(batch["action"])
    x_1, state, valid = (batch[key].repeat_interleave(R, 0) for key in ("action", "state", "action_mask"))
    x_1 = x_1.float()  # (B R, H, D)
    x_0 = torch.randn_like(x_1) if noise is None else noise
    t = sample_time(model.config, len(x_1), x_1.device) if t is None else t
    tau = t[:, None, None]
    # eq: x_t = (1 - t) x_0 + t x_1   [flow matching, arXiv 2210.02747]
    x_t = (1 - tau) * x_0 + tau * x_1
    # eq: u = dx_t / dt = x_1 - x_0
    v_target = x_1 - x_0
    features, mask = model.vl_features(batch)  # (B, S, W), once for all R noises of a sample: it sees none of them
    dropped = {}
    if "state_dropped" in batch and model.training:  # so that the policy learns to look at the pictures
        dropped["state_dropped"] = batch["state_dropped"].repeat_interleave(R, 0)  # (B R,)
    v_pred = model.velocity(features, mask, state, x_t, t, batch["embodiment_id"], **dropped)  # (B R, H, D)
    return (v_pred.float() - v_target) ** 2, valid, t


def masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """Mean over the valid entries of the whole batch: not of padded dims, nor of steps beyond the robot's chunk."""
    # eq: L = sum m |v - u|^2 / (sum m + 1e-6)
    return (error * mask).sum() / (mask.sum() + 1e-6)


def flow_matching_loss(model: Network, batch: Batch, noise: Tensor | None = None, t: Tensor | None = None) -> Tensor:
    """Flow-matching loss of a batch of demonstrations, a scalar in float32.

    Args:
        batch: as the model takes it, with action and action_mask (B, H, D).
        noise: x_0 (B * R, H, D), R in a row for each sample; drawn from N(0, I) with R = 1 when None.
        t: (B * R,) at most 1; drawn (see `sample_time`) when None.
    """
    error, valid, _ = velocity_error(model, batch, noise, t)
    return masked_mean(error, valid)


@torch.no_grad()
def sample_actions(model: Network, batch: Batch, noise: Tensor | None = None, num_steps: int = 4, **rtc) -> Tensor:
    """Actions (B, H, D) in normalised units, float32: Euler's method from noise (t = 0) to data (t = 1).

    Args:
        batch: observations, as the model takes them.
        noise: x_0 (B, H, D); drawn from N(0, I) when None.
        num_steps: K, evaluations of the velocity.
        rtc: rtc_previous and what else `real_time_chunk` takes, where a chunk is to go on from the previous one.
    """
    config, state = model.config, batch["state"]
    if noise is None:
        noise = torch.randn(len(state), config.action_horizon, config.action_dim, device=state.device)
    features, mask = model.vl_features(batch)  # once: they do not depend on t
    x, w = real_time_chunk(noise.float(), **rtc) if rtc else (noise.float(), 1.0)
    for k in range(num_steps):
        t = torch.full((len(x),), k / num_steps, dtype=torch.float64, device=x.device)
        # eq: x_{k+1} = x_k + w v(x_k, k / K) / K, w = 1 but in a chunk that goes on
        x = x + w * model.velocity(features, mask, state, x, t, batch["embodiment_id"]).float() / num_steps
    return x


def real_time_chunk(
    x: Tensor, rtc_previous: Tensor, rtc_overlap_steps: int, rtc_frozen_steps=0, rtc_ramp_rate=6.0, rtc_horizon=0
) -> tuple[Tensor, Tensor]:
    """A start x_0 (B, H, D), instead of noise x, that goes on from the chunk (B, n, D) under way, and the weights w
    (H, 1) of the flow from there.

    The first `rtc_overlap_steps` are the end of the previous chunk's first `rtc_horizon` steps (0: of all), of which
    `rtc_frozen_steps` stay as they are: they will be executed by the time the new ones are there. Not for actions that
    are relative to the state: the previous chunk refers to an older state.
    """
    o, f, end = rtc_overlap_steps, rtc_frozen_steps, rtc_horizon or rtc_previous.shape[1]
    if not 0 <= f <= o <= min(end, x.shape[1]) or end > rtc_previous.shape[1]:
        raise ValueError(f"{f} frozen of {o} steps that overlap: of {end} and {x.shape[1]} that there are")
    # eq: x_0[:o] = previous[end - o : end]
    x = torch.cat([rtc_previous[:, end - o : end].to(x), x[:, o:]], dim=1)
    # eq: w_j = (1 - e^(-rate j / (n + 1))) / (1 - e^-rate), j = 1 .. n = o - f; 0 before them, 1 after
    j = torch.arange(1, o - f + 1, device=x.device)
    ramp = (1 - torch.exp(-rtc_ramp_rate * j / (o - f + 1))) / (1 - math.exp(-rtc_ramp_rate))
    return x, torch.cat([x.new_zeros(f), ramp, x.new_ones(x.shape[1] - o)])[:, None]


def learning_rate(k: int, args: Args) -> float:
    """Step size of step k = 0, 1, …: from 0 up in a line, then down to 0 along half a cosine."""
    warmup = math.ceil(args.warmup_ratio * args.max_steps)
    if k < warmup:
        # eq: lr_k = lr k / W
        return args.learning_rate * k / warmup
    # eq: lr_k = lr (1 + cos(pi (k - W) / (T - W))) / 2
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * (k - warmup) / max(args.max_steps - warmup, 1)))


def autocast(args: Args, device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=args.amp == "bf16")


def update(model: Network, optimizer, batches, tally: Tally, args: Args, run: Run) -> Tensor | None:
    """One optimizer step, micro-batch by micro-batch. Returns the gradient's norm (), or None where it is not finite:
    the weights are then still those of the step before."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for _ in range(args.gradient_accumulation_steps):
        with run.clock("data"):
            batch = to_device(next(batches), model.device)
        with autocast(args, model.device):
            error, valid, t = velocity_error(model, batch, batch["noise"], batch["t"])
        # eq: L = sum_m (B_m / B) L_m: every sample has the same number of valid entries
        loss = masked_mean(error, valid) * (len(batch["action"]) / args.batch_size)
        loss.backward()
        tally.add(error, valid, t)
    sum_gradients(parameters, run.world)
    grad_norm = clip_gradients(parameters, args.max_grad_norm)
    if not grad_norm.isfinite():  # the same in every process
        return None
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm


# ---- 5. Evaluate: recorded episodes ----------------------------------------------------------------------------------


@torch.no_grad()
def validate(model: Network, samples: Samples, rows: np.ndarray, args: Args) -> dict[str, float]:
    """Loss and error of sampled actions on held-out frames: evenly spaced ones, the same noise and times every time.

    The loss is not what a policy is for: most of it is the last stretch of the flow, which the samples hardly feel.
    """
    if not len(rows):
        return {}
    model.eval()
    data, count = samples.data, min(len(rows), args.eval_batches * args.batch_size)
    chosen = rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]
    tally = Tally(model.device, model.config.action_dim)
    for part in pieces(np.arange(count), args.batch_size):
        batch = to_device(samples[Plan(chosen[part], part, "validation")], model.device)
        with autocast(args, model.device):
            error, valid, t = velocity_error(model, batch, batch["noise"], batch["t"])
        tally.add(error, valid, t)
    error = predict_rows(model, samples, chosen, args, args.denoising_steps) - data.actions(chosen)
    metrics = tally.metrics("val", data.interface.action_names())
    return metrics | {"val/mse": float(np.mean(error[..., : data.dims] ** 2))}


def pieces(x: np.ndarray, size: int) -> list[np.ndarray]:
    return np.split(x, range(size, len(x), size))


def policy_of(model: Network, samples: Samples, args: Args) -> Policy:
    """The policy as it is measured: observations to actions as everywhere, by this file's sampler."""
    return Policy(model, samples.data.interface, sample_actions, args.denoising_steps, args.amp == "bf16")


def predict_rows(model: Network, samples: Samples, rows: np.ndarray, args: Args, num_steps: int) -> np.ndarray:
    """The policy's actions (B, H, D) for recorded rows, in model units; the noise depends on the row alone."""
    policy = policy_of(model, samples, args)
    parts = watched(pieces(rows, args.batch_size), "open loop")
    batches = (samples[Plan(part, part, "open loop")] for part in parts)
    return torch.cat([policy.chunk(batch, batch["noise"], num_steps) for batch in batches]).numpy()


def open_loop(model: Network, samples: Samples, held: Split, args: Args, num_steps: int) -> list[dict]:
    """Replays held-out episodes: every h rows the policy predicts the h actions that follow, from the recording.

    Returns a dict for each episode: recorded, predicted, hold, mean (T, d) in raw units (T rows of the episode, at most
    --eval-steps), and normalized (T, 2, D): prediction and recording in model units.
    """
    data, results, episodes = samples.data, [], held.val_episodes[: args.eval_trajs]
    h = data.interface.horizon
    if not episodes:
        return []
    mean_action = data.raw_action[held.rows].mean(0)
    looks = [np.arange(e.start, min(e.end, e.start + args.eval_steps), h) for e in episodes]
    cuts = np.cumsum([len(rows) for rows in looks])[:-1]
    chunks = predict_rows(model, samples, np.concatenate(looks), args, num_steps)  # (looks of all episodes, H, D)
    for episode, rows, chunk in zip(episodes, looks, np.split(chunks, cuts)):
        recorded = data.raw_action[episode.start : min(episode.end, episode.start + args.eval_steps)]
        T = len(recorded)
        # the action before each chunk; before the first there is none yet
        held_action = [mean_action, *data.raw_action[rows[1:] - 1]]
        both = np.stack([chunk, data.actions(rows)], axis=2)[:, :h]  # (looks, h, 2, D)
        results.append(
            {
                "episode": episode.number,
                "instruction": data.instructions[data.text[episode.start]],
                "recorded": recorded,
                "predicted": np.concatenate(data.interface.actions(chunk, data.state_at(rows)))[:T],
                "hold": np.repeat(held_action, h, axis=0)[:T],
                "mean": np.broadcast_to(mean_action, recorded.shape),
                "normalized": np.concatenate(both)[:T, :, : data.dims],
            }
        )
    return results


def episode_errors(result: dict) -> dict[str, float]:
    """Errors of the policy on an episode and of two baselines, in raw units but for mse_normalized."""
    recorded, predicted = result["recorded"], result["predicted"]
    return {
        "mse": np.mean((predicted - recorded) ** 2),
        "mse_normalized": np.mean(np.diff(result["normalized"], axis=1) ** 2),
        "mse_hold_last": np.mean((result["hold"] - recorded) ** 2),
        "mse_mean_action": np.mean((result["mean"] - recorded) ** 2),
        "max_error": np.abs(predicted - recorded).max(),
        # eq: smoothness = mean |a^_{i+1} - a^_i|^2: how much successive predictions jump
        "smoothness": np.mean(np.diff(predicted, axis=0) ** 2),
    }


def open_loop_metrics(errors: list[dict], prefix: str) -> dict[str, float]:
    """Means over episodes, with a 95 % interval of the error (Student's t: the episodes are few)."""
    if not errors:
        return {}
    metrics = {f"{prefix}/{name}": float(np.mean([e[name] for e in errors])) for name in errors[0]}
    mse = np.array([e["mse"] for e in errors])
    half = student(len(mse) - 1) * mse.std(ddof=1) / math.sqrt(len(mse)) if len(mse) > 1 else math.nan
    interval = {f"{prefix}/mse_low": float(mse.mean() - half), f"{prefix}/mse_high": float(mse.mean() + half)}
    return metrics | interval | {f"{prefix}/num_trajectories": len(errors)}


# ---- 6. Evaluate: closed loop on Fetch -------------------------------------------------------------------------------


@torch.no_grad()
def closed_loop(model: Network, samples: Samples, env_id: str, args: Args) -> dict[str, float]:
    """The policy plays `--closed-loop-episodes` episodes of 50 steps, seeds 0 and up, which no demonstration has.

    Success is that of the last step; `once` counts episodes that were at the goal after any step.
    """
    n, robot = args.closed_loop_episodes, FetchRobot(samples.data.interface, env_id)
    every = min(args.execute_steps, samples.data.interface.horizon)
    policy = policy_of(model, samples, args)
    envs = FetchVec(env_id, n)
    obs, _ = envs.reset(seed=0)
    once, final = np.zeros(n, bool), np.zeros(n, bool)
    for step in watched(range(envs.max_episode_steps), f"closed loop, {env_id}"):
        if step % every == 0:
            rngs = [stream(EVALUATION, "closed loop", step, i) for i in range(n)]
            noise = np.stack([rng.standard_normal(policy.interface.chunk_shape, dtype=np.float32) for rng in rngs])
            arrays, parts = envs.get_state()[0], []
            look = robot.observation(obs, arrays["physics"], arrays["goal"])
            for first in range(0, n, args.batch_size):
                part = slice(first, first + args.batch_size)
                batch = policy.interface.see({key: value[part] for key, value in look.items()})
                chunk = policy.chunk(batch, torch.from_numpy(noise[part]))
                parts.append(robot.actions(chunk, every))
            actions = np.concatenate(parts)  # (N, every, 4)
        obs, _, _, dones, infos = envs.step(actions[:, step % every])
        final = infos["final_info"]["is_success"].astype(bool) if dones.all() else infos["is_success"].astype(bool)
        once |= final
    envs.close()
    robot.close()
    low, high = wilson(final.sum(), n)
    found = dict(success_rate=final.mean(), success_rate_low=low, success_rate_high=high, success_once=once.mean())
    return {f"closed_loop/{env_id.removesuffix('-v4')}/{name}": float(value) for name, value in found.items()}


def act(model: Network, samples: Samples, args: Args, say) -> dict[str, float]:
    """Closed loop in every task that the demonstrations have, where there is a simulator for them."""
    data, found = samples.data, {}
    if not args.closed_loop or any(episodes.info.get("robot_type") != "fetch" for episodes in data.sets):
        return {}
    off = misfit(data.config) or (data.config.video and no_renderer())
    for env_id, instruction in INSTRUCTIONS.items():
        if instruction in data.instructions and not off:
            try:
                found |= closed_loop(model, samples, env_id, args)
            except Exception as error:  # whatever a graphics driver throws must not cost the run its result
                if not data.config.video:
                    raise
                off = f"it needs pictures: {type(error).__name__}: {error}"
    if off:
        say(f"closed loop is off: {off}")
    return found


# ---- 7. Main ---------------------------------------------------------------------------------------------------------


def evaluate(model: Network, samples: Samples, held: Split, args: Args, run: Run, step: int) -> dict[str, float]:
    """The whole evaluation: held-out episodes with several numbers of Euler steps, tables, figures, simulator."""
    results = open_loop(model, samples, held, args, args.denoising_steps)
    errors = [episode_errors(result) for result in results]
    metrics = open_loop_metrics(errors, "eval")
    for k in args.denoising_sweep if results else ():
        again = results if k == args.denoising_steps else open_loop(model, samples, held, args, k)
        metrics[f"eval/mse_k{k}"] = float(np.mean([episode_errors(result)["mse"] for result in again]))
    if results and run.world.main:
        names = samples.data.interface.action_names(raw=True)
        open_loop_tables(run, step, results, errors, names)
        for result in results[:FIGURES]:
            path = run.folder / "open_loop" / f"episode_{result['episode']:06d}.png"
            draw_open_loop(result, names, samples.data.interface.horizon, path)
    metrics |= act(model, samples, args, run.say)
    run.table("evaluation_summary", step, [metrics])
    return metrics


def train(model: Network, adapters: dict, samples: Samples, held: Split, metadata: dict, args: Args, run: Run) -> None:
    """The loop: an optimizer step, its line of metrics, what the policy does on held-out episodes, a checkpoint."""
    data, world, device = samples.data, run.world, model.device
    takes_part = world.main or args.fsdp  # in evaluations; sharded weights compute in all processes at once
    optimizer = torch.optim.AdamW(  # fused: in place, without a second copy of the gradients
        parameter_groups(model, args.weight_decay), lr=args.learning_rate, betas=args.adam_betas, eps=1e-8, fused=True
    )
    state = {"args": asdict(args), "rows": len(data.end), "train_s": 0.0, "base": {}, "last": {}, "sums": None}
    state, tally = run.resume(state, optimizer), Tally(device, model.config.action_dim)
    if state["rows"] != len(data.end):
        fail(f"--resume needs the data of the run: it had {state['rows']} rows, this has {len(data.end)}")
    if run.checkpoint:
        if adapters:
            load_adapters(adapters, run.checkpoint)
        if world.main:  # what was summed up since the last line of metrics
            tally.load(state["sums"])
    else:
        run.say(describe(model, data, held, args, run))
        if takes_part:
            results = open_loop(model, samples, held, args, args.denoising_steps)
            state["base"] = open_loop_metrics([episode_errors(result) for result in results], "base")
            run.write(0, state["base"] | validate(model, samples, held.val_rows, args))
    plan = plans(Order(data, held.rows, args), data, args, world, run.first)
    batches = prepared(samples, plan, args.num_workers, device)
    spent = Counter()  # seconds since the last line of metrics

    def write(folder: Path | None) -> dict:
        save_policy(folder, model, adapters, metadata, data.interface.about)
        return {"sums": tally.sums(world)}

    for step in run.steps(args.max_steps):
        # 1. an optimizer step. dropout: a stream per step and process, so that a run can go on anywhere
        torch.manual_seed(stream_seed(args.seed, "dropout", step, world.rank) % 2**63)
        set_training(model, adapters)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        grad_norm = update(model, optimizer, batches, tally, args, run)
        if grad_norm is None:
            run.say(f"step {step + 1}: gradients are not finite; lower --learning-rate, or look at the data")
            sys.exit(1)
        spent.update(run.seconds, steps=1, all=time.time() - run.started)
        state["train_s"] += time.time() - run.started

        # 2. log
        metrics = {}
        if run.due(step + 1, args.log_every):
            metrics = tally.metrics("train", data.interface.action_names(), world) | {
                "train/grad_norm": grad_norm.item(),
                "train/learning_rate": optimizer.param_groups[0]["lr"],
                "train/epoch": (step + 1) * args.batch_size / len(held.rows),
                "time/samples_per_s": spent["steps"] * args.batch_size / spent["all"],
                "time/waiting_for_data": spent["data"] / spent["all"],
                "time/train_s": state["train_s"],
            }
            if device.type == "cuda":
                metrics["time/memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
            spent.clear()

        # 3. evaluate, save, stop
        if takes_part and len(held.val_rows) and run.due(step + 1, args.eval_every):
            state["last"] = validate(model, samples, held.val_rows, args)
            run.is_best(step + 1, -state["last"]["val/mse"])
            metrics |= state["last"]
        if takes_part and run.due(step + 1, every=0):
            state["last"] |= evaluate(model, samples, held, args, run, step + 1)
            metrics |= state["last"]
        shown = {"loss": metrics.get("train/loss"), "val": state["last"].get("val/loss")}
        run.end_step(step + 1, metrics, state, optimizer, write, **shown)

    took = f"{args.max_steps} steps in {state['train_s']:.1f} s of training, {run.log.elapsed:.0f} s in all"
    words = *in_words(state["last"], state["base"]), f"{took}; figures of episodes in {run.folder}/open_loop"
    run.finish("\n".join(words))


def main(args: Args) -> None:
    run = Run(__file__, args, FREE | {"num_workers", "cache_dir", "data_config"})
    check(run.args, run.world)  # flags, before a checkpoint is looked for
    stored = find_stored(run.args, run.checkpoint)  # what a run is resumed with is its checkpoint's
    args = resolve(run.args, stored)
    check(args, run.world)
    if args.amp == "bf16":  # what autocast leaves in fp32, such as rotary angles, is to be exact
        torch.set_float32_matmul_precision("highest")
    if args.torch_threads:
        torch.set_num_threads(args.torch_threads)
    # everything that can be wrong with data, checkpoint and tokenizer is found before a model is loaded or a run folder
    # made
    say = print if run.world.main else lambda text: None
    args, data, metadata = read_data(args, stored, say, trained=args.eval_only or bool(run.checkpoint))
    held, interface = hold_out(data, args), data.interface
    if args.execute_steps > max(interface.horizon, Args.execute_steps):
        fail(f"--execute-steps {args.execute_steps}: at most {interface.horizon}, a chunk of this data config")
    interface.fit(plan_model(args, stored, interface.horizon), data.instructions)
    if data.config.video:
        used = held.val_episodes if args.eval_only else held.val_episodes + held.episodes
        cache_dir = Path(args.cache_dir or f"{args.output_dir}/frame_cache")
        data.open_frames(used, cache_dir, interface.about.cache_side, run.world)
        if not args.eval_only:
            data.describe_frames(held.rows)
    with run.open(args):
        model, adapters = load_model(args, stored, interface.horizon, run)
        samples = Samples(data, model.config)
        if not args.eval_only:
            train(model, adapters, samples, held, metadata, args, run)
        elif run.world.main or args.fsdp:
            metrics = validate(model, samples, held.val_rows, args) | evaluate(model, samples, held, args, run, 0)
            run.write(0, metrics)
            run.say("\n".join([*in_words(metrics, {}), f"evaluated {args.model_path}; {run.folder}"]))
    sys.exit(run.exit_code)


if __name__ == "__main__":
    main(parse(Args, __doc__))
