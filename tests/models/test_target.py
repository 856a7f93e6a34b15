"""What a command is pointed at: a stage of a run or a model, wherever one stands."""

from pathlib import Path

import pytest

from posttrain.errors import ArtifactError
from posttrain.models.target import split_target
from tiny_runs import copied_run


def test_a_model_is_a_model_inside_of_a_run_folder_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What has a scheme is no stage; nor is a model folder that was written beside the stages."""
    run = copied_run(tmp_path / "run")
    (run / "exported").mkdir()
    (run / "exported" / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.chdir(run)
    assert split_target("random:tiny") is None
    assert split_target("package:gemma3-270m") is None
    assert split_target("exported") is None
    assert split_target("dpo") == (Path("."), "dpo")
    assert split_target(str(run / "dpo")) == (run, "dpo")
    assert split_target(str(run)) is not None
    with pytest.raises(ArtifactError, match="no finished stage"):
        split_target("dqo")
