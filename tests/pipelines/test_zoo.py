import json
import sys

import numpy as np
import pytest
import sedimo_zoo
import torch
from safetensors.torch import save_file
from sedimo_zoo.classifier import EXTRACTOR_NAME, Classifier

from sedimo.errors import InputError, MissingExtraError, StateError
from sedimo.lab.images import feature_extractor, reference_statistics
from sedimo.pipelines.loading import load_pipeline, zoo_path
from tolerances import FLOAT32_FORMULA, FLOAT32_NETWORK, FLOAT64_FORMULA, FLOAT64_SUM

N_KID = 20


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return Classifier().eval()


@pytest.fixture
def data(tmp_path, monkeypatch, classifier):
    """A stand-in for the package's data, with an untrained classifier."""
    folder = tmp_path / "cifar-classifier"
    folder.mkdir()
    halved = {k: v.half() if v.is_floating_point() else v for k, v in classifier.state_dict().items()}
    save_file(halved, folder / "model.safetensors")
    classifier.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in halved.items()})
    features = torch.randn(50, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    statistics = {
        "mean": features.mean(0),
        "covariance": torch.cov(features.T),
        "features": features[:N_KID].half(),
    }
    save_file({k: v.contiguous() for k, v in statistics.items()}, folder / "statistics.safetensors")
    record = {"extractor": EXTRACTOR_NAME, "n_reference_images": 50, "test_accuracy": 0.1}
    (folder / "training.json").write_text(json.dumps(record))
    monkeypatch.setattr(sedimo_zoo, "DATA", tmp_path)
    return tmp_path


def test_features_are_those_of_the_classifier(data, classifier):
    images = torch.rand(3, 3, 32, 32)
    name, extract = feature_extractor()
    assert name == "cifar-resnet"
    with torch.no_grad():
        expected = classifier.features(images * 2 - 1)
    torch.testing.assert_close(extract(images), expected)
    assert extract(images).shape == (3, 256)


def test_many_images_go_in_parts(data):
    _, extract = feature_extractor()
    images = torch.rand(251, 3, 32, 32)
    features = extract(images)
    alone = extract(images[250:])
    torch.testing.assert_close(features[250:], alone, rtol=FLOAT32_NETWORK, atol=FLOAT32_FORMULA)


def test_other_sizes_are_resized(data):
    _, extract = feature_extractor()
    flat = torch.full((1, 3, 64, 64), 0.25)
    small = extract(flat[:, :, :32, :32])  # the same, as weights of resizing sum to 1
    torch.testing.assert_close(extract(flat), small, rtol=FLOAT32_NETWORK, atol=FLOAT32_FORMULA)
    stripes = torch.tensor([0.0, 1.0, 1.0, 0.0]).repeat(32).expand(1, 3, 128, 128)  # their mean is 0.5 everywhere
    features, grey, white = (
        extract(stripes),
        extract(torch.full((1, 3, 32, 32), 0.5)),
        extract(torch.ones(1, 3, 32, 32)),
    )
    assert (features - grey).norm() < 0.3 * (white - grey).norm()  # white is what picking pixels would see
    with pytest.raises(InputError, match=r"\[B, 3, H, W\], got \[1, 1, 32, 32\]"):
        extract(torch.rand(1, 1, 32, 32))


def test_reference_statistics(data):
    real, reference = reference_statistics()
    features = torch.randn(50, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()
    assert np.array_equal(reference.mean, torch.from_numpy(features).mean(0).numpy())
    np.testing.assert_allclose(reference.covariance, np.cov(features.T), rtol=FLOAT64_FORMULA, atol=FLOAT64_SUM)
    assert np.array_equal(real.values, features[:N_KID].astype(np.float16))
    assert (real.extractor, reference.n) == ("cifar-resnet", 50)


def test_the_embedded_pipeline_loads_by_name(data, tiny_pipeline_folder):
    (data / "cifar-dit").symlink_to(tiny_pipeline_folder)
    assert zoo_path("cifar-dit") == data / "cifar-dit"
    assert load_pipeline("zoo:cifar-dit", device="cpu").name == "zoo:cifar-dit"


def test_unknown_models_and_missing_data(data):
    with pytest.raises(InputError, match="has no model 'dog'; it has: cifar-dit"):
        load_pipeline("zoo:dog")
    with pytest.raises(StateError, match=r"without its data.*cifar-dit"):
        zoo_path("cifar-dit")


@pytest.mark.parametrize("file", ["model.safetensors", "statistics.safetensors", "training.json"])
@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_missing_or_damaged_data(data, file, damage):
    path = data / "cifar-classifier" / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(b"{}")
    with pytest.raises(StateError):
        (feature_extractor if file == "model.safetensors" else reference_statistics)()


@pytest.mark.parametrize("use", [lambda: zoo_path("cifar-dit"), feature_extractor, reference_statistics])
def test_without_the_package_the_extra_is_named(monkeypatch, use):
    monkeypatch.setitem(sys.modules, "sedimo_zoo", None)
    monkeypatch.setitem(sys.modules, "sedimo_zoo.classifier", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'sedimo\[zoo\]'"):
        use()
