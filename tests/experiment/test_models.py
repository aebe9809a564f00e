"""What is known of an evaluation's models before their weights are here."""

import pytest

from evalsuite.core.errors import ModelError
from evalsuite.data.hub import HubFiles
from evalsuite.experiment.evaluation import Evaluation
from evalsuite.experiment.models import Models

PPL = {"command": "ppl"}


def before(tmp_path, **fields):
    evaluation = Evaluation.model_validate({"question": "?", "steps": [PPL]} | fields)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return Models(evaluation, tmp_path / "work").before(scratch)


@pytest.fixture
def hub(monkeypatch, demo_folder):
    """A hub with one model, whose configuration is the built-in model's."""
    from evalsuite.data.models import Checkpoint, find_checkpoint

    def find(model, weights=True, *, download=True):
        if model == "owner/name":
            if weights or not download:
                raise ModelError("not in the cache")
            return Checkpoint(model, demo_folder, weights=False)
        return find_checkpoint(model, weights, download=download)

    monkeypatch.setattr("evalsuite.experiment.models.find_checkpoint", find)
    monkeypatch.setattr(
        "evalsuite.experiment.models.list_files", lambda model: HubFiles(total_bytes=9, missing_bytes=7)
    )


def test_a_model_on_this_disk(tmp_path):
    found = before(tmp_path, candidate="demo")["candidate"]
    assert (found.planned.origin, found.planned.fits_disk) == ("here", True)
    assert found.planned.weights_bytes == 25_921_656


def test_a_model_that_the_hub_lists(tmp_path, hub):
    found = before(tmp_path, candidate="owner/name")["candidate"]
    assert (found.planned.origin, found.planned.weights_bytes, found.planned.fits_disk) == ("hub", 7, True)
    assert found.checkpoint.weights  # as it will be


def test_without_a_hub_sizes_come_from_a_geometry_or_are_unknown(tmp_path, hub, monkeypatch, demo_folder):
    def fails(model):
        raise ModelError("no hub")

    monkeypatch.setattr("evalsuite.experiment.models.list_files", fails)
    given = {"candidate": "owner/name", "geometry": {"candidate": str(demo_folder)}}
    found = before(tmp_path, **given)["candidate"]
    assert (found.planned.origin, found.checkpoint.name) == ("geometry", "owner/name")
    assert found.planned.weights_bytes == pytest.approx(25.8e6, rel=0.01)
    (tmp_path / "b").mkdir()
    unknown = before(tmp_path / "b", candidate="owner/name")["candidate"]
    assert (unknown.planned.origin, unknown.planned.weights_bytes, unknown.checkpoint) == (
        "unknown",
        None,
        None,
    )
    assert unknown.planned.fits_disk is None


def test_a_name_that_is_nothing_is_refused(tmp_path):
    with pytest.raises(ModelError, match="No model is called"):
        before(tmp_path, candidate="nothing")


def test_random_weights_need_none(tmp_path):
    step = {"command": "speed", "load_format": "dummy"}
    found = before(tmp_path, candidate="demo", steps=[step])["candidate"]
    assert (found.planned.weights_bytes, found.checkpoint.weights) == (0, False)


def test_a_candidate_to_be_made_has_the_configuration_that_it_will_have(tmp_path):
    steps = [{"command": "quantize", "recipe": {"method": "rtn"}}, PPL]
    found = before(tmp_path, baseline="demo", steps=steps)
    candidate = found["candidate"]
    assert candidate.planned.origin == "made"
    assert 6e6 < candidate.planned.weights_bytes < 8e6
    assert candidate.checkpoint.config()["quantization_config"]["quant_method"] == "compressed-tensors"
    assert candidate.checkpoint.slug == candidate.short
