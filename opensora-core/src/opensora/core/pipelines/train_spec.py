"""What training configs may say. Nothing here imports torch."""

from __future__ import annotations

import os
from typing import Any, Literal

from attrs import field, frozen
from attrs.validators import and_, ge, gt, le, lt, min_len, optional

from opensora.core.config.structure import ComponentConfig
from opensora.core.errors import ConfigError
from opensora.core.pipelines.composition_spec import CompositionSpec, RunSpec

__all__ = ["LoopSpec", "TrainSpec"]


@frozen(kw_only=True, slots=False)
class LoopSpec(RunSpec):
    """What all training has: data, steps, an optimizer, checkpoints."""

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

    grad_checkpoint: bool = False
    """Compute each block's activations again in backward: less memory, about a third more time."""
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
    lr: float = field(default=1e-4, validator=gt(0))
    """The optimizer's learning rate, after warm-up."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After warm-up: stay, or fall to 0 at the last step."""
    warmup_steps: int | None = field(default=None, validator=optional(ge(0)))
    """Steps over which the learning rate rises."""
    optimizer: ComponentConfig | None = None
    """None: AdamW. Else dict(type="torch.optim.SGD", momentum=0.9): the import path of a class, and its options but lr.
    weight_decay is passed on, if it knows that."""
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

    # ---- beside the loop
    ema_decay: float = field(default=0.9999, validator=and_(ge(0), lt(1)))
    """Of the averaged weights that sampling uses; 0 keeps none."""
    log_every: int = field(default=1, validator=gt(0))
    """Steps between log records."""
    ckpt_every: int = field(default=0, validator=ge(0))
    """Steps between checkpoints; 0: only at the end and on signals."""
    keep_last: int = field(default=2, validator=ge(0))
    """Checkpoints kept; 0 keeps all."""
    wandb: bool = False
    """There is no hook for Weights & Biases yet: True is accepted from older configs, and refused when run."""

    def __attrs_post_init__(self) -> None:
        if self.start_from_scratch and not self.load:
            raise ConfigError("start_from_scratch needs load: a run folder or checkpoint to take the weights from.")

    def unbuilt(self) -> list[str]:
        """What this config asks for that can be read but not run yet."""
        return ["wandb = True (metrics.jsonl and TensorBoard have the same numbers)"] if self.wandb else []

    def default_hooks(self) -> list[ComponentConfig]:
        """The hooks that take part unless ``without_hooks`` says otherwise."""
        hooks = [_hook("ema", decay=self.ema_decay)] if self.ema_decay else []
        hooks += [
            _hook("progress"),
            _hook("console"),
            _hook("jsonl"),
            _hook("tensorboard"),
            _hook("checkpoints", every=self.ckpt_every, keep_last=self.keep_last),
        ]
        return [*hooks, _hook("loss-plot")]


@frozen(kw_only=True)
class TrainSpec(LoopSpec, CompositionSpec):
    """Train a denoiser on captioned or labelled clips."""

    pipeline: Literal["train"] = "train"
    bucket_config: dict[str, Any] | None = None
    """{resolution: {frames: (probability, batch size)}}, for datasets whose clips differ in size; goes before batch_size."""
    mask_ratios: dict[str, float] | None = None
    """Share of samples by frame mask (see `opensora.core.frame_masks`): which frames are given instead of noised."""
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


    text_cache_gib: float = field(default=1.0, validator=ge(0))
    """Memory on the CPU, in each process, for embeddings of captions. If those of all samples fit, each caption is encoded
    once; otherwise batch by batch, and nothing is kept."""
    preview_every: int = field(default=0, validator=ge(0))
    """Steps between previews; 0 is never."""
    preview_prompts: list[str] = field(factory=list)
    """What the previews show; empty: the first captions of the data."""
    compile: bool = False
    """Compile each block by torch.compile: slower to start, by seconds to minutes for each new size, faster after."""
    offload: bool = False
    """Keep activations in the CPU's memory between forward and backward: GPU memory for time on the bus."""
    trainable: list[str] | None = field(default=None, validator=optional(min_len(1)))
    """Train these parts alone: regular expressions, each of which must match the whole name of a parameter, or of a module that
    it is in, such as temporal_blocks or .*attn.*. None: all that the model doesn't freeze. The hook lora adds its adapters."""

    def default_hooks(self) -> list[ComponentConfig]:
        """See `LoopSpec.default_hooks`."""
        hooks = super().default_hooks()
        if self.preview_every:
            hooks.insert(-1, _hook("previews", every=self.preview_every, prompts=self.preview_prompts))
        return hooks


def _hook(name: str, **options: Any) -> ComponentConfig:
    """The config of a hook."""
    return ComponentConfig(type=name, options=options)
