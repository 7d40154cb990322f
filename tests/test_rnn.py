"""`attn.benchmarks.rnn`: the task can be solved, what is counted is exact, and the page shows the committed figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from fake_timer import FakeTimer

from attn.benchmarks import recall, rnn

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "rnn.json"


def test_the_answers_are_the_values_of_the_keys() -> None:
    keys, values, answers = recall.sequences(20, 8, torch.Generator().manual_seed(0))
    assert keys.shape == values.shape == (20, 16)
    for row in range(20):
        shown = dict(zip(keys[row, :8].tolist(), values[row, :8].tolist(), strict=True))
        assert len(shown) == 8
        assert [shown[key] for key in keys[row, 8:].tolist()] == answers[row].tolist()
    assert bool((values[:, 8:] == recall.VALUES).all())
    assert not torch.equal(keys[:, :8], keys[:, 8:])


def test_attention_learns_to_look_up() -> None:
    found = recall.learned("attention, causal", steps=150)
    assert min(found["right"]) > 0.9
    assert max(recall.learned("LSTM", steps=1)["right"]) < 0.3


@pytest.mark.parametrize("name", rnn.FLOPS_OF_TOKEN)
def test_flops_of_a_recurrent_net(name: str) -> None:
    net = recall.NETS[name](rnn.FEATURES, rnn.HEADS)
    assert 2 * sum(p.numel() for p in net.parameters() if p.dim() == 2) == rnn.FLOPS_OF_TOKEN[name]


def test_times_figures_and_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rnn, "ProcessorTimer", FakeTimer)
    out, threads = tmp_path / "rnn.json", torch.get_num_threads()
    command = ["--seconds", "0", "--lengths", "8,16", "--cut", "4,16", "--steps", "1", "--json", str(out)]
    assert rnn.main(command) == 0
    assert torch.get_num_threads() == threads
    found = json.loads(out.read_text())
    for part, lengths in (("one_sequence", (8, 16)), ("same_tokens", (4, 16)), ("one_more", (8, 16))):
        assert [(r["net"], r["length"]) for r in found[part]] == [(net, n) for n in lengths for net in recall.NETS]
        assert all(r["p50_ms"] == 10.0 for r in found[part])
    assert [r["batch"] for r in found["same_tokens"]] == [4] * 4 + [1] * 4
    assert [r["net"] for r in found["recall"]] == list(recall.NETS)
    assert "share recalled" in capsys.readouterr().out
    pytest.importorskip("matplotlib")
    figure = tmp_path / "rnn.png"
    assert rnn.main(["--part", "none", "--json", str(out), "--plot", str(figure)]) == 0
    assert json.loads(out.read_text()) == found
    assert figure.stat().st_size > 20_000


def test_a_processor_timer_counts_work() -> None:
    a = torch.randn(300, 300)
    clock = rnn.ProcessorTimer()
    assert clock.sample(lambda: a @ a) > 0
    assert clock.memory(lambda: None) is None


@pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the source tree is not here")
def test_the_page_shows_the_committed_figures() -> None:
    assert rnn.text(json.loads(RESULTS.read_text())) in (ROOT / "docs" / "rnn.md").read_text()
