"""What the configs of the pipelines ``train-vae`` and ``sample-vae`` may say."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from attrs import field, frozen
from attrs.validators import and_, ge, gt, in_, le, lt, optional

from opensora.core.config.structure import ComponentConfig
from opensora.core.errors import ConfigError
from opensora.core.pipelines.composition_spec import RunSpec
from opensora.core.pipelines.train_spec import LoopSpec
from opensora.core.sizes import parse_num_frames

__all__ = ["LossSpec", "SampleVAESpec", "TrainVAESpec"]

NOT_NEGATIVE: Any = optional(ge(0))  # its type doesn't go with a default other than None


@frozen(kw_only=True, slots=False)
class LossSpec(RunSpec):
    """What both pipelines say about losses and about the data."""

    perceptual_loss_weight: float | None = field(default=0.1, validator=NOT_NEGATIVE)
    """Of LPIPS against the absolute difference of pixels; None or 0: off."""
    perceptual_weights: str | list[str] | None = None
    """Of LPIPS: a folder, a file or several, with VGG16 (torchvision's) and the heads (vgg.pth). "download": those that are
    published. None: those too; training downloads them if need be, measuring does without."""
    kl_loss_weight: float | None = field(default=1e-6, validator=NOT_NEGATIVE)
    """Of the Kullback-Leibler divergence, which goes with the loss of pixels; None or 0: off."""
    logvar_init: float = 0.0
    """Log of the width of the distribution that reconstructions are measured with."""
    num_frames: int | str | None = None
    """As older configs repeat it: must be what dataset says."""
    image_size: tuple[int, int] | None = None
    """As older configs repeat it: must be what dataset says."""

    def check_data(self, dataset: ComponentConfig) -> None:
        """Refuse sizes at top level other than the dataset's, which count.

        Raises:
            ConfigError: They differ.
        """
        frames = None if self.num_frames is None else parse_num_frames(self.num_frames)
        size = None if self.image_size is None else tuple(self.image_size)
        own: dict[str, Any] = dict(dataset.options)
        if "image_size" in own and own["image_size"] is not None:
            own["image_size"] = tuple(own["image_size"])
        if isinstance(own.get("num_frames"), str):
            own["num_frames"] = parse_num_frames(own["num_frames"])
        for key, value in (("num_frames", frames), ("image_size", size)):
            if value is not None and own.get(key) != value:
                raise ConfigError(
                    f"{key} is {value} at top level, but dataset.{key} is {own.get(key)}. Set dataset.{key}."
                )


@frozen(kw_only=True)
class TrainVAESpec(LoopSpec, LossSpec):
    """Train a video autoencoder on clips."""

    kinds: ClassVar[Mapping[str, str]] = {
        "model": "vaes",
        "discriminator": "discriminators",
        "dataset": "datasets",
        "accelerator": "accelerators",
    }

    pipeline: Literal["train-vae"] = "train-vae"
    lr: float = field(default=1e-5, validator=gt(0))
    """AdamW's learning rate, after warm-up; of the discriminator too."""
    ema_decay: float = field(default=0.0, validator=and_(ge(0), lt(1)))
    """Of averaged weights; 0 keeps none."""

    # ---- what is compared
    use_real_rec_loss: bool = False
    """Compare pixels, with LPIPS, and add the KL divergence."""
    use_z_rec_loss: bool = False
    """Compare the image autoencoder's latents with what the temporal one gives back."""
    use_image_identity_loss: bool = False
    """Single images: compare the image autoencoder's latents with the temporal one's, which are to be the same."""
    learn_logvar: bool = False
    """Let the optimizer change logvar too. Open-Sora's own had no hold of it."""

    # ---- what is shown
    mixed_strategy: Literal["mixed_video_image", "mixed_video_random"] | None = None
    """mixed_video_image: the first frame alone in a share of the steps. mixed_video_random: so many frames from the first on,
    1 to all, drawn anew in each step."""
    mixed_image_ratio: float = field(default=0.0, validator=and_(ge(0), le(1)))
    """That share of the steps."""

    # ---- adversarial training
    discriminator: ComponentConfig | None = None
    """Tells reconstructions from real videos; None: no adversarial training."""
    discriminator_factor: float = field(default=1.0, validator=ge(0))
    """Weight of adversarial losses, on both sides."""
    discriminator_start: int = -1
    """Optimizer step from which they count."""
    generator_factor: float = field(default=0.5, validator=ge(0))
    """Weight of the autoencoder's adversarial loss, once its gradient is made as large as the reconstruction's."""
    generator_loss_type: str = field(default="hinge", validator=in_(("hinge", "non-saturating")))
    """hinge or non-saturating."""
    discriminator_loss_type: str = field(default="hinge", validator=in_(("hinge", "vanilla", "non-saturating")))
    """hinge, vanilla or non-saturating."""
    lecam_loss_weight: float | None = field(default=None, validator=NOT_NEGATIVE)
    """Of LeCam regularisation, which keeps the discriminator from growing too sure; None or 0: off."""
    gradient_penalty_loss_weight: float | None = field(default=None, validator=NOT_NEGATIVE)
    """Of the discriminator's gradient penalty; None or 0: off."""

    def __attrs_post_init__(self) -> None:
        super().__attrs_post_init__()
        self.check_data(self.dataset)
        if not (self.use_real_rec_loss or self.use_z_rec_loss):
            raise ConfigError(
                "There is nothing to learn: set use_z_rec_loss (compares latents) or use_real_rec_loss (compares pixels)."
            )
        if self.mixed_image_ratio and self.mixed_strategy != "mixed_video_image":
            raise ConfigError('mixed_image_ratio has no effect: it needs mixed_strategy="mixed_video_image".')

    @property
    def needs_pixels(self) -> bool:
        """Whether any loss looks at reconstructed pixels."""
        return self.use_real_rec_loss or self.discriminator is not None

    @property
    def needs_lpips(self) -> bool:
        """Whether any loss uses LPIPS."""
        return self.use_real_rec_loss and bool(self.perceptual_loss_weight)


@frozen(kw_only=True)
class SampleVAESpec(LossSpec):
    """Encode and decode a dataset, and measure what became of it."""

    kinds: ClassVar[Mapping[str, str]] = {"model": "vaes", "dataset": "datasets", "accelerator": "accelerators"}

    pipeline: Literal["sample-vae"] = "sample-vae"
    dataset: ComponentConfig
    """The clips. They come in its order."""
    num_samples: int | None = field(default=None, validator=optional(gt(0)))
    """Clips at most; None: all."""
    sample_posterior: bool = True
    """Draw latents from the posterior, as in training; False takes its mean."""
    cal_stats: bool = False
    """Measure mean and standard deviation of the latents, by channel."""
    log_stats_every: int = field(default=100, validator=gt(0))
    """Batches between lines in the log."""
    num_workers: int = field(factory=lambda: min(4, os.cpu_count() or 1), validator=ge(0))
    """Processes that read clips ahead; 0 reads in this process."""
    max_unreadable: float = field(default=0.05, validator=and_(ge(0), le(1)))
    """Stop when more than this share of the rows can't be read."""

    save_dir: str | None = None
    """This very folder instead of a numbered run folder."""
    save_videos: bool = True
    """Write originals and reconstructions; False only measures."""
    crf: int = field(default=10, validator=ge(0))
    """H.264's quality: 0 is lossless, 18 looks so."""
    verbose: int = field(default=1, validator=ge(0))
    """0: no progress, 1: progress over clips."""

    def __attrs_post_init__(self) -> None:
        self.check_data(self.dataset)
