"""LPIPS against reference vectors at procedural weights, and its loaders."""

from __future__ import annotations

import pytest
import torch

from opensora.core import ShapeError, WeightsError
from opensora.models.vae import lpips
from opensora.models.vae.lpips import LPIPS, load_lpips


@pytest.mark.parametrize("case", ["rgb32", "rgb48x16"])
def test_distances_and_gradients_are_the_reference_ones(case, procedural_lpips, golden):
    vectors = golden("lpips")
    a, b = vectors.inputs(case)["a"], vectors.inputs(case)["b"].requires_grad_()
    expected = vectors.outputs(case)
    for index, feature in enumerate(procedural_lpips.iter_features(a)):
        torch.testing.assert_close(feature.mean(), expected[f"feat{index}_mean"], rtol=0, atol=1e-5)
        torch.testing.assert_close(feature.std(), expected[f"feat{index}_std"], rtol=0, atol=1e-5)
    distance = procedural_lpips(a, b)
    torch.testing.assert_close(distance, expected["val"], rtol=0, atol=1e-5)
    distance.sum().backward()
    gradient = vectors.grads(case)["input.b"]
    assert (b.grad - gradient).abs().max() <= 1e-4 * gradient.abs().max()


def test_keys_and_counts_are_those_of_the_published_class(assert_key_table):
    with torch.device("meta"):
        model = LPIPS()
    assert_key_table(model, "LPIPS")


def test_equal_images_have_distance_zero_and_it_never_trains(procedural_lpips):
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    assert procedural_lpips.train()(images, images).abs().max() == 0
    assert not any(module.training for module in procedural_lpips.modules())


@pytest.mark.parametrize("shape", [(1, 4, 32, 32), (1, 3, 32, 15), (3, 32, 32)])
def test_what_it_cannot_compare(shape, procedural_lpips):
    with pytest.raises(ShapeError, match="at least 16x16"):
        procedural_lpips(torch.zeros(shape), torch.zeros(shape))


def published(model):
    """The same weights as two files of the published names."""
    vgg = {
        f"features.{key.split('.', 2)[2]}": value for key, value in model.state_dict().items() if key.startswith("net.")
    }
    heads = {key: value for key, value in model.state_dict().items() if key.startswith("lin")}
    return vgg | {"classifier.0.weight": torch.zeros(2)}, heads


@pytest.fixture(scope="module")
def folder(procedural_lpips, tmp_path_factory):
    path = tmp_path_factory.mktemp("lpips")
    vgg, heads = published(procedural_lpips)
    torch.save(vgg, path / "vgg16-397923af.pth")
    torch.save(heads, path / "vgg.pth")
    return path


@pytest.mark.parametrize("way", ["folder", "files"])
def test_published_files_load(way, folder, procedural_lpips):
    source = folder if way == "folder" else [folder / "vgg.pth", str(folder / "vgg16-397923af.pth")]
    state = load_lpips(source).state_dict()
    assert all(torch.equal(state[key], value) for key, value in procedural_lpips.state_dict().items())


def test_one_file_of_all_weights_loads(tmp_path, procedural_lpips):
    torch.save(procedural_lpips.state_dict(), tmp_path / "all.pt")
    assert torch.equal(load_lpips(tmp_path / "all.pt").lin4.model[1].weight, procedural_lpips.lin4.model[1].weight)


@pytest.mark.parametrize(
    ("name", "words"), [("vgg.pth", "VGG16 can't be found"), ("vgg16-397923af.pth", "the heads can't be found")]
)
def test_half_of_the_files_says_what_is_missing(name, words, folder):
    with pytest.raises(WeightsError, match=words):
        load_lpips(folder / name)


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_source_without_weights_says_so(name, tmp_path):
    with pytest.raises(WeightsError, match="perceptual_weights"):
        load_lpips(tmp_path / name)


def test_without_network_the_message_says_which_files_to_give(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(WeightsError, match=r"can't be downloaded .* perceptual_weights"):
        load_lpips()


def test_a_changed_download_is_refused_and_removed(tmp_path, monkeypatch, procedural_lpips):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, **_: torch.save({}, path))
    with pytest.raises(WeightsError, match="other bytes"):
        load_lpips()
    assert not (tmp_path / "checkpoints" / "lpips-v0.1-vgg.pth").exists()


def test_downloaded_files_are_used(tmp_path, monkeypatch, procedural_lpips):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert lpips.downloaded_weights() is None
    (tmp_path / "checkpoints").mkdir()
    for state, name in zip(published(procedural_lpips), ("vgg16-397923af.pth", "lpips-v0.1-vgg.pth"), strict=True):
        torch.save(state, tmp_path / "checkpoints" / name)
    assert torch.equal(load_lpips().net.slice5[1].weight, procedural_lpips.net.slice5[1].weight)
