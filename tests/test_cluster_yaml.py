"""cluster.yaml, prepared and validated by Ray's own code, and held to what its comments and docs/cluster.md promise."""

from __future__ import annotations

import copy
import json
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def prepared(written: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of the file: defaults filled in, commands merged, limits set."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(written))
    validate_config(config)
    return config


def test_ray_adds_nothing_that_was_meant_and_missing(written: dict[str, Any], prepared: dict[str, Any]) -> None:
    import ray.autoscaler

    # Ray drops or ignores some keys in silence: a top-level min_workers, a missing max_workers (it becomes 2).
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text(encoding="utf-8"))
    assert set(written) <= set(schema["properties"])
    assert prepared["max_workers"] == written["max_workers"]
    pools = {name: pool for name, pool in prepared["available_node_types"].items() if name != "head"}
    assert set(prepared["available_node_types"]) == {"head", *pools} == set(written["available_node_types"])
    assert sum(pool["max_workers"] for pool in pools.values()) == prepared["max_workers"]
    assert prepared["head_node_type"] == "head"
    # Ours stand in place of Ray's own, which install another Ray.
    assert prepared["setup_commands"] == written["setup_commands"]
    assert prepared["head_setup_commands"] == written["setup_commands"] + written["head_setup_commands"]
    assert prepared["worker_setup_commands"] == written["setup_commands"]


def test_pools_start_empty_and_only_they_have_gpus(prepared: dict[str, Any]) -> None:
    head, rollout, learner = (prepared["available_node_types"][name] for name in ("head", "rollout", "learner"))
    assert "GPU" not in head["resources"] and head["resources"]["CPU"] >= 2
    for pool in (rollout, learner):
        assert pool["min_workers"] == 0 and pool["max_workers"] >= 1 and pool["resources"]["GPU"] >= 1
    assert rollout["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in learner["node_config"]
    assert prepared["provider"]["cache_stopped_nodes"] is False
    # Ray's own choice of image is too old for torch.
    assert all(pool["node_config"]["ImageId"] for pool in (head, rollout, learner))


def test_every_ray_demands_the_token_and_every_machine_has_it(prepared: dict[str, Any]) -> None:
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in prepared[key]
        if "ray start" in command
    ]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token ray start" in command for command in starts)
    assert prepared["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--dashboard-host=127.0.0.1" in starts[0] and "--autoscaling-config=" in starts[0]
    assert "$RAY_HEAD_IP:6379" in starts[1]


def test_the_mounted_files_are_what_the_installation_needs(prepared: dict[str, Any]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = ["pyproject.toml", "constraints.txt", *project["project"]["license-files"], *packages]
    mounts = {there: here for there, here in prepared["file_mounts"].items() if "auth_token" not in there}
    assert mounts == {f"~/rayllm/{name}": f"./{name}" for name in needed}
    assert all((ROOT / here).exists() for here in mounts.values())
    [install] = [command for command in prepared["setup_commands"] if "~/rayllm/constraints.txt" in command]
    assert install.endswith("pip install -q -c ~/rayllm/constraints.txt ~/rayllm")


def test_commands_are_well_formed_and_can_run_twice(prepared: dict[str, Any], tmp_path: Path) -> None:
    keys = ("head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
    for command in {command for key in keys for command in prepared[key]}:
        checked = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True)
        assert checked.returncode == 0, f"{command}: {checked.stderr}"
    [shells] = [command for command in prepared["setup_commands"] if ".bashrc" in command]
    for _ in range(2):
        subprocess.run(["bash", "-c", shells], env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}, check=True)
    lines = (tmp_path / ".bashrc").read_text(encoding="utf-8").splitlines()
    assert lines[1:3] == ["export PATH=$HOME/venv/bin:$PATH", "export RAY_AUTH_MODE=token"] and len(lines) == 5


@pytest.mark.parametrize(
    "fault",
    [
        {"autoscaling_mode": "default"},
        {"head_node_type": "rollout_"},
        {"available_node_types": {"head": {"node_config": {}}}},
        {"max_workers": "ten"},
    ],
)
def test_ray_refuses_what_is_wrong(written: dict[str, Any], fault: dict[str, Any]) -> None:
    """The validation above can fail: Ray's schema is there and used."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises((ValueError, jsonschema.ValidationError)):
        validate_config(prepare_config({**copy.deepcopy(written), **fault}))
