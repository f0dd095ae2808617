"""The short flags that the field knows, and the keys that they set."""

from __future__ import annotations

from typing import Literal

from attrs import field, frozen

Kind = Literal["int", "float", "str", "bool", "switch", "strs", "pair", "size", "frames", "every", "mark"]
"""How a flag's text is read. bool: yes/true/t/y/1 or no/false/f/n/0. switch: no text, True. strs: one or more. pair: two.
size: height and width. frames: a number, or a name such as 4s. every: a number, or nothing: 5. mark: as bool, or a path."""
Group = Literal["all", "sampling", "training"]


@frozen
class Flag:
    """A short name of one or more keys."""

    name: str
    kind: Kind
    help: str
    keys: tuple[str, ...] = ()
    """Dotted; the first part of a nested one must be in the config. None given: the flag's own name."""
    also: tuple[str, ...] = ()
    """Nested keys that are set too if the config has their first part."""
    replaces: tuple[str, ...] = ()
    """Keys of the file that would win over this one, and are dropped."""
    group: Group = field(default="all", kw_only=True)

    @property
    def paths(self) -> tuple[str, ...]:
        """The dotted keys that must be set."""
        return self.keys or (self.name[2:].replace("-", "_"),)


def _sampling(name: str, kind: Kind, text: str, *keys: str, also: str = "", replaces: str = "") -> Flag:
    return Flag(name, kind, text, keys, tuple(also.split()), tuple(replaces.split()), group="sampling")


def _training(name: str, kind: Kind, text: str) -> Flag:
    return Flag(name, kind, text, group="training")


FLAGS: tuple[Flag, ...] = (
    Flag("--seed", "int", "where random numbers start"),
    Flag(
        "--ckpt-path",
        "str",
        "weights of the model: a file, a run folder or a hub id",
        ("model.from_pretrained",),
        ("discriminator.from_pretrained",),
    ),
    Flag("--batch-size", "int", "samples at once, in each process"),
    Flag("--outputs", "str", "parent of run folders"),
    Flag("--name", "str", "name of the run folder, after its number"),
    Flag("--device", "str", "cpu, cuda, cuda:1, ...; by default the first GPU there is"),
    Flag("--dtype", "str", "precision: fp32, fp16 or bf16"),
    Flag("--resolution", "str", "240p, 512, ...; with --aspect-ratio", replaces=("image_size",)),
    Flag("--data-path", "str", "table of the dataset", ("dataset.data_path",)),
    Flag(
        "--flash-attn",
        "bool",
        "of older configs, without effect",
        ("model.enable_flash_attn",),
    ),
    Flag("--layernorm-kernel", "bool", "of older configs, without effect", ("model.enable_layernorm_kernel",)),
    _sampling("--prompt", "strs", "one or more prompts"),
    _sampling("--prompt-path", "str", "prompts: .txt one a line, .csv or .jsonl with settings", replaces="prompt"),
    _sampling("--prompt-generator", "str", "prompt that is sampled without end if there is no other"),
    _sampling("--negative-prompt", "str", "what guidance leads away from"),
    _sampling("--start-index", "int", "first prompt to sample; numbers the files"),
    _sampling("--end-index", "int", "prompt before which to stop"),
    _sampling("--num-sample", "int", "videos for each prompt"),
    _sampling(
        "--num-frames", "frames", "frames, or 2s, 4s, 8s, 16s; 1: an image", "num_frames", also="dataset.num_frames"
    ),
    _sampling("--image-size", "size", "height and width in pixels", "image_size", also="dataset.image_size"),
    _sampling("--aspect-ratio", "str", "height:width, such as 9:16", replaces="image_size"),
    _sampling("--fps", "int", "frames a second that the model is told"),
    _sampling("--save-fps", "int", "frames a second of the files"),
    _sampling("--frame-interval", "int", "distance of the frames that the model was trained on"),
    _sampling("--num-sampling-steps", "int", "denoising steps", "scheduler.num_sampling_steps"),
    _sampling("--cfg-scale", "float", "guidance: 1 is off, 7 follows the prompt closely", "scheduler.cfg_scale"),
    _sampling("--save-dir", "str", "folder for the samples"),
    _sampling("--sample-name", "str", "first part of the file names"),
    _sampling("--prompt-as-path", "switch", "name files after their prompts"),
    _sampling("--image", "str", "image that the video begins with"),
    _sampling("--last-image", "str", "image that it ends with"),
    _sampling("--extend", "str", "video to go on from"),
    _sampling("--connect", "pair", "two images or videos to lead from one to the other"),
    _sampling("--edit", "str", "video to change, as far as --strength says"),
    _sampling("--strength", "float", "of --edit: above 0 hardly, 1 all"),
    _sampling("--reference-path", "strs", "images or videos for --mask-strategy, one item a prompt"),
    _sampling("--mask-strategy", "strs", "where the references go, one item a prompt"),
    _sampling("--loop", "int", "rounds, each going on from the last: long videos"),
    _sampling("--condition-frame-length", "int", "latent frames that a round takes from the last"),
    _sampling("--aes", "float", "aesthetic score to ask for"),
    _sampling("--flow", "float", "motion score to ask for"),
    _sampling("--camera-motion", "str", "camera motion to ask for"),
    _sampling("--llm-refine", "bool", "let a language model rewrite the prompts"),
    _sampling("--watermark", "mark", "put a mark, or this png, on a copy of each file"),
    _sampling("--format", "str", "of the files: mp4, gif, or frames for a folder of png"),
    _sampling("--preview", "every", "write a cheap preview of each video every so many steps"),
    _sampling("--verbose", "int", "0 silent, 1 progress over videos, 2 over steps too"),
    _training("--lr", "float", "learning rate after warm-up"),
    _training("--warmup-steps", "int", "steps over which the learning rate rises"),
    _training("--load", "str", "run folder or checkpoint to go on from"),
    _training("--start-from-scratch", "switch", "with --load: take the weights, but start at step 0"),
    _training("--allow-changes", "switch", "with --load: go on with another model, data or seed than the checkpoint's"),
    Flag("--wandb", "bool", "log to Weights & Biases", group="training"),
)
"""In the order of ``--help``."""
