import json

import pytest
import uvloop

from benchmarks import channel


@pytest.mark.slow
@pytest.mark.parametrize("row", ["channel", "router"])
def test_every_token_arrives_and_the_figures_add_up(row, monkeypatch):
    monkeypatch.setattr(channel, "WARM_UP_S", 0.2)
    load = channel.Load(streams=16, workers=2, prompt_tokens=50, answer_tokens=20, step_ms=5, seconds=1.0)
    run = {"channel": channel.channel_row, "router": channel.router_row}[row]
    result = uvloop.run(run(load))
    assert result.wrong == 0
    assert result.answers > 16
    assert result.offered_tok_s == pytest.approx(16 * 200 * 20 / 19)
    assert 0 < result.tok_s < 1.1 * result.offered_tok_s
    us = result.us_per_token
    assert us["path"] == us["router"] + us["workers"]
    assert us["engines"] <= us["workers"]
    assert 0 <= result.delay_p50_ms <= result.delay_p99_ms < 800
    table = channel.render([result]).splitlines()
    assert [len(line) for line in table] == [len(table[0])] * 2
    json.dumps(channel.asdict(result))
