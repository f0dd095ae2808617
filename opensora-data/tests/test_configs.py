"""The shipped configs say what their pipelines understand. That they run is tested across packages."""

import pytest

from opensora.core.config.evaluate import evaluate
from opensora.core.config.names import iter_configs, resolve
from opensora.core.config.structure import structure
from opensora.core.pipelines.sample_spec import SampleSpec
from opensora.core.pipelines.stages import StagesSpec
from opensora.core.pipelines.train_spec import TrainSpec
from opensora.data.digits.clips import captions
from opensora.data.digits.grade import GradeSpec
from opensora.data.digits.make import MakeDigitsSpec
from opensora.data.video_text import VideoTextSpec

SPECS = {"make-digits": MakeDigitsSpec, "train": TrainSpec, "sample": SampleSpec, "grade": GradeSpec}


def test_all_configs_are_found_and_described():
    ours = {config.name: config.summary for config in iter_configs() if config.distribution == "opensora-data"}
    assert set(ours) == {"quickstart", "quickstart/grade", "quickstart/long"}
    assert all(ours.values())


@pytest.mark.parametrize("name", ["quickstart", "quickstart/long"])
def test_the_stages_fit_together(name):
    stages = structure(StagesSpec, evaluate(resolve(name)).values).stages
    data, train, sample, grade = (structure(SPECS[stage["pipeline"]], stage) for stage in stages.values())
    dataset = structure(VideoTextSpec, train.dataset.options)
    assert dataset.data_path == f"{data.save_dir}/clips.csv"
    assert grade.held_out == f"{data.save_dir}/held_out.csv"
    assert grade.samples == sample.save_dir
    assert sample.size == (dataset.num_frames, *dataset.image_size) == (data.num_frames, data.canvas, data.canvas)
    assert sample.fps == data.fps
    assert (train.vae, train.text_encoder) == (sample.vae, sample.text_encoder)
    assert {**train.model.options, "from_pretrained": train.run_folder} == sample.model.options
    assert sample.prompt == [caption for _, _, caption in captions()]
    assert len(sample.prompt) * sample.num_sample == 80


def test_grading_alone_takes_the_newest_run():
    assert structure(GradeSpec, evaluate(resolve("quickstart/grade")).values).samples == "outputs"
