"""What training configs may say. Nothing here imports torch."""

from __future__ import annotations

import os
from typing import Any, ClassVar, Literal

from attrs import field, frozen
from attrs.validators import and_, ge, gt, le, lt, min_len, optional

from opensora.core.config.structure import ComponentConfig
from opensora.core.errors import ConfigError
from opensora.core.pipelines.composition_spec import CompositionSpec, RunSpec

__all__ = ["FeaturesSpec", "LoopSpec", "TrainSpec"]


def _checkpointing(_: object, __: object, value: bool | int | str) -> None:
    if not isinstance(value, bool | str) and value < 1:
        raise ConfigError(f"grad_checkpoint is {value}; every n-th block needs n of at least 1. Or use True or False.")


@frozen(kw_only=True, slots=False)
class LoopSpec(RunSpec):
    """What all training has: data, steps, an optimizer, checkpoints."""

    fixed_keys: ClassVar[frozenset[str]] = frozenset(
        {
            "model",
            "vae",
            "text_encoder",
            "scheduler",
            "dataset",
            "seed",
            "trainable",
            "bucket_config",
            "balance",
            "mask_ratios",
        }
    )
    """What decides what is trained, and on what in which order: a run that goes on may not change these unasked."""
    free_keys: ClassVar[frozenset[str]] = frozenset(
        {"model.from_pretrained", "model.adapter", "model.partial", "model.grow"}
        | {"text_encoder.device", "text_encoder.dtype", "text_encoder.shard"}
    )
    """Those among them that make no difference once a checkpoint is there."""

    dataset: ComponentConfig
    """The clips."""

    # ---- where
    run_folder: str | None = None
    """This very folder instead of a numbered one."""
    resume: bool = False
    """Go on in run_folder if it holds a checkpoint, instead of refusing it."""
    load: str | None = None
    """Run folder or checkpoint to go on from: in its own run folder, or in a new one if it isn't the newest."""
    start_from_scratch: bool = False
    """With load: take weights, EMA and optimizer, but start at step 0 in a new run folder."""
    allow_changes: bool = False
    """Go on even where the config says otherwise than the checkpoint's about what is trained, or on what."""

    grad_checkpoint: bool | int | Literal["selective"] = field(default=False, validator=_checkpointing)
    """Compute activations of blocks again in backward, to save memory. True: of all blocks, for about a third more time; 3:
    of every third; "selective": all but the results of matrix products and attention, for less time and more memory."""
    num_workers: int = field(factory=lambda: min(4, os.cpu_count() or 1), validator=ge(0))
    """Processes that read clips ahead; 0 reads in the training process. At first 4, or as many as there are processors."""

    # ---- how long, how many at once
    accumulation_steps: int = field(default=1, validator=gt(0))
    """Micro-batches an optimizer step."""
    epochs: int = field(default=1000, validator=gt(0))
    """Passes over the data at most."""
    max_steps: int | None = field(default=None, validator=optional(gt(0)))
    """Optimizer steps at most; None: as many as the epochs hold."""

    # ---- optimization
    optimizer: ComponentConfig | None = None
    """None: AdamW. Else dict(type="torch.optim.SGD", momentum=0.9): the import path of a class, and its options but lr.
    weight_decay is passed on, if it knows that."""
    lr: float = field(default=1e-4, validator=gt(0))
    """The optimizer's learning rate, after warm-up."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: stay, or fall to 0 at the last step."""
    warmup_steps: int | None = field(default=None, validator=optional(ge(0)))
    """Steps over which the learning rate rises."""
    weight_decay: float = field(default=0.0, validator=ge(0))
    """AdamW's."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's."""
    adam_eps: float = field(default=1e-8, validator=gt(0))
    """AdamW's."""
    grad_clip: float = field(default=0.0, validator=ge(0))
    """Largest global gradient norm; 0 is unlimited."""
    max_left_out: int = field(default=10, validator=gt(0))
    """Stop after so many steps in a row without finite gradients."""
    max_unreadable: float = field(default=0.05, validator=and_(ge(0), le(1)))
    """Stop when more than this share of the rows can't be read."""
    step_timeout_s: float = field(default=1800.0, validator=ge(0))
    """A process whose step, save or hooks take longer ends, with its stacks, and the others with it; 0 waits for ever. The
    first step has three times as long, to compile."""

    # ---- beside the loop
    ema_decay: float = field(default=0.9999, validator=and_(ge(0), lt(1)))
    """Of the averaged weights that sampling uses; 0 keeps none."""
    log_every: int = field(default=1, validator=gt(0))
    """Steps between log records."""
    ckpt_every: int = field(default=0, validator=ge(0))
    """Steps between checkpoints; 0: only at the end and on signals."""
    keep_last: int = field(default=2, validator=ge(0))
    """Checkpoints kept; 0 keeps all."""
    keep_every: int = field(default=0, validator=ge(0))
    """Besides the last ones, keep checkpoints whose step is a multiple of this; 0 keeps none."""
    async_checkpoints: bool = False
    """Write checkpoints while training goes on, from a copy in the CPU's memory: a kill meanwhile costs that checkpoint."""
    wandb: bool = False
    """Log to Weights & Biases too; hooks = [dict(type="wandb", mode="offline")] has options."""

    def __attrs_post_init__(self) -> None:
        if self.start_from_scratch and not self.load:
            raise ConfigError("start_from_scratch needs load: a run folder or checkpoint to take the weights from.")

    def default_hooks(self) -> list[ComponentConfig]:
        """The hooks that take part unless ``without_hooks`` says otherwise."""
        hooks = [_hook("ema", decay=self.ema_decay)] if self.ema_decay else []
        hooks += [
            _hook("progress"),
            _hook("console"),
            _hook("jsonl"),
            _hook("tensorboard"),
            *([_hook("wandb")] if self.wandb else []),
            _hook("checkpoints", every=self.ckpt_every, keep_last=self.keep_last, keep_every=self.keep_every),
        ]
        return [*hooks, _hook("loss-plot")]


@frozen(kw_only=True)
class FeaturesSpec:
    """Latents and embeddings of captions that are computed once and kept in a folder."""

    folder: str = field(validator=min_len(1))
    """Where they are; runs and processes may share it."""
    max_gib: float | None = field(default=None, validator=optional(gt(0)))
    """Of the folder: what was unused for longest goes. None: no limit."""
    fill: bool = True
    """Compute and keep what is missing. False: only read the folder, and stop at the first feature that is missing."""
    video: bool = True
    """Keep latents."""
    text: bool = True
    """Keep embeddings of captions."""

    def __attrs_post_init__(self) -> None:
        if not (self.video or self.text):
            raise ConfigError("features: video and text are both False, so nothing is kept. Leave features out.")


@frozen(kw_only=True)
class ValidationSpec:
    """The loss on fixed clips, with fixed noise, at fixed timesteps: the same each time but for the weights."""

    every: int = field(default=500, validator=gt(0))
    """Steps; also before the first step, and after the last."""
    data: ComponentConfig | None = None
    """A dataset of its own, with the run's bucket_config; or else held_out."""
    held_out: float = field(default=0.0, validator=and_(ge(0), lt(1)))
    """Share of the rows of the training data that are not trained on, but measured."""
    num_clips: int = field(default=64, validator=gt(0))
    """Clips at most. Their latents stay in the CPU's memory."""
    num_timesteps: int = field(default=10, validator=gt(0))
    """Timesteps at which each clip is measured, evenly spread. Each costs a call of the denoiser."""
    ema: bool | None = None
    """Measure the averaged weights, which change more steadily and are what is sampled, or (False) those that are trained.
    None: the averaged ones, if the run keeps any."""
    seed: int = 0
    """Of the choice of clips, and of their noise."""

    def __attrs_post_init__(self) -> None:
        if (self.data is None) == (self.held_out == 0):
            raise ConfigError(
                "validation needs clips: either data = dict(type=..., ...), a dataset of its own, or held_out = 0.01, "
                "a share of the training data."
            )


@frozen(kw_only=True)
class TrainSpec(LoopSpec, CompositionSpec):
    """Train a denoiser on captioned or labelled clips."""

    pipeline: Literal["train"] = "train"
    bucket_config: dict[str, Any] | None = None
    """{resolution: {frames: (probability, batch size)}}, for datasets whose clips differ in size; goes before batch_size."""
    balance: Literal["tokens"] | None = None
    """tokens: with buckets, the micro-batches of a step have nearly as many latent tokens on all processes; rows that can't
    be matched wait for the next epoch. None: they differ, and processes wait for the slowest."""
    compile: bool = False
    """Compile each block by torch.compile: slower to start, by seconds to minutes for new sizes, and faster after."""
    offload: bool = False
    """Keep activations in the CPU's memory between forward and backward: GPU memory for time on the bus."""
    trainable: list[str] | None = field(default=None, validator=optional(min_len(1)))
    """Train these parts alone: regular expressions, each of which must match the whole name of a parameter, or of a module
    that it is in, such as temporal_blocks or .*attn.*. None: all that the model doesn't freeze. Hook lora adds its own."""
    mask_ratios: dict[str, float] | None = None
    """Share of samples by frame mask (see `opensora.core.frame_masks`): which frames are given instead of noised."""
    text_cache_gib: float = field(default=1.0, validator=ge(0))
    """Memory on the CPU, in each process, for embeddings of captions. If those of all samples fit, each caption is encoded
    once; otherwise batch by batch, and nothing is kept."""
    features: FeaturesSpec | None = None
    """Latents and embeddings that are computed once: a dict with folder, max_gib, fill, video and text. None: every time."""
    validation: ValidationSpec | None = None
    """A loss that one can read: a dict with every, data or held_out, num_clips, num_timesteps, ema and seed. None: no
    validation."""
    preview_every: int = field(default=0, validator=ge(0))
    """Steps between previews; 0 is never."""
    preview_prompts: list[str] = field(factory=list)
    """What the previews show; empty: the first captions of the data."""

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        if self.compile and self.grad_checkpoint == "selective":
            raise ConfigError(
                'torch.compile chooses by itself what is kept, so that compile excludes grad_checkpoint = "selective". '
                "Use grad_checkpoint = True or a number with it."
            )

    def default_hooks(self) -> list[ComponentConfig]:
        """See `LoopSpec.default_hooks`."""
        hooks = super().default_hooks()
        if self.validation:
            hooks.insert(-1, _hook("validation"))
        if self.preview_every:
            hooks.insert(-1, _hook("previews", every=self.preview_every, prompts=self.preview_prompts))
        return hooks


def _hook(name: str, **options: Any) -> ComponentConfig:
    """The config of a hook."""
    return ComponentConfig(type=name, options=options)
