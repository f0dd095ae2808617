"""Datasets of captioned videos and labelled images, and the moving digits of the quickstart."""

from importlib import import_module

_HOMES = {
    "labelled_images": ("ClassImages", "ClassImagesSpec"),
    "ready_features": ("FeatureDataset", "FeatureDatasetSpec"),
    "tables": ("read_table",),
    "temporal": ("sample_frames",),
    "variable_video_text": ("VariableVideoTextDataset", "VariableVideoTextSpec"),
    "video_text": ("VideoTextDataset", "VideoTextSpec"),
    "web_dataset": ("WebDataset", "WebDatasetSpec"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__version__ = "0.1.0"
__all__ = sorted(_HOME_OF)  # noqa: PLE0605  # computed from the table above


def __getattr__(name: str) -> object:
    if name in _HOME_OF:
        return getattr(import_module(f"opensora.data.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
