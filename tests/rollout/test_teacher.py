"""launch.collect with a real SGLang server as its teacher: a model that only the server has loaded."""

import json

import pytest

from configs import quickstart
from launch import collect
from open_agentrl_jax.rollout.servers import LaunchedServers
from open_agentrl_jax.run.policy import create_model
from open_agentrl_jax.types import UserError
from tests.launch.runs import ROOT

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]


def test_servers_teach_with_the_weights_they_were_started_with(tmp_path):
    config = quickstart.get_config()
    config.data.train, config.data.eval, config.packing.length = str(ROOT / "tests/launch/problems.jsonl"), "", 0
    config.agent.max_prompt, config.agent.max_response, config.rollout.engine = 512, 32, "sglang"
    config.model.new.hidden_size, config.model.new.head_dim, config.model.new.num_layers = 64, 16, 2
    create_model(config, tmp_path / "teacher")
    options = collect.Options(teacher=str(tmp_path / "teacher"), tries=2, output=str(tmp_path / "out"))
    with LaunchedServers(tmp_path / "teacher", 1, log_dir=tmp_path / "logs", context_length=1024) as servers:
        servers.wait()
        config.rollout.servers = tuple(servers.urls)
        cards = []
        for _ in range(2):
            with pytest.raises(UserError, match="none of 24 trajectories was kept"):  # it never learned anything
                collect.main(config, options)
            cards.append(json.loads((tmp_path / "out" / "card.json").read_text()))
    first, second = cards
    assert first["trajectories"]["not_graded"] == 0 and first["trajectories"]["tries"] == 24
    assert first["teacher"]["calls"] >= 24 and first["teacher"]["calls saved by the journal"] == 0
    assert second["teacher"] == {"calls": 0, "calls saved by the journal": first["teacher"]["calls"]}
    assert second["trajectories"] == first["trajectories"]
